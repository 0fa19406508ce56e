"""The one place that compiles: options, the serial and the parallel form of a kernel, and what a helper costs.

Numba optimises every function that another calls, with all that it calls in turn, and compiles it to machine code of
its own, with wrappers to call it from Python, before the caller, into which LLVM has inlined it, is compiled. For the
helpers of the kernels that work is thrown away: :func:`inline` and :func:`subroutine` leave it out, and LLVM optimises
the code of a kernel once, as a whole.
"""

import numpy as np
from numba import config, njit

from fastloss._cache import DiskCache
from fastloss._kernels._compiler import ByDtype, Helper, KernelCompiler

__all__ = ["Kernel", "allocating", "by_dtype", "inline", "subroutine"]

# Division by zero follows IEEE arithmetic instead of raising. No fast-math flag, here or anywhere: the order and the
# rounding of every operation are those of the source.
_OPTIONS = {"error_model": "numpy", "no_cfunc_wrapper": True}


def _helper(function, **options):
    if not config.DISABLE_JIT:
        function._numba_type_ = Helper(function, no_cpython_wrapper=True, **_OPTIONS, **options)
    return function


def inline(function):
    """Compile a function for compiled code to call, always inlined: what runs per vector or per row."""
    return _helper(function, forceinline=True, _nrt=False)


def subroutine(function):
    """Compile a function for compiled code to call, never inlined: what runs per tile, or rarely.

    Without reference counts, as :func:`inline`: Numba counts each array argument of each call, with an atomic addition
    that the threads contend for, and the registers spilled around it. So neither may allocate.
    """
    return _helper(function, forceinline=False, _nrt=False)


def allocating(function):
    """:func:`subroutine` that may allocate: what runs once per thread."""
    return _helper(function, forceinline=False)


def by_dtype(narrow, wide):
    """One name for two helpers: ``narrow`` where the first argument is of float32, else ``wide``."""

    def choose(*args):
        return (narrow if args[0].dtype == np.float32 else wide)(*args)

    if not config.DISABLE_JIT:
        choose._numba_type_ = ByDtype(narrow._numba_type_, wide._numba_type_)
    return choose


class Kernel:
    """One Python body, compiled twice: ``serial`` holds no lock and starts no thread, ``parallel`` uses ``prange``.

    The body's first argument is the number of workers, the length of its one ``prange`` loop. ``name`` is the kernel's
    name in the cache.
    """

    def __init__(self, name, body):
        self.name = name
        self.serial = self._compile(f"{name}-serial", body)
        self.parallel = self._compile(f"{name}-parallel", body, parallel=True)

    @staticmethod
    def _compile(name, body, **options):
        if config.DISABLE_JIT:
            return body
        dispatcher = njit(body, nogil=True, pipeline_class=KernelCompiler, **_OPTIONS, **options)
        dispatcher._cache = DiskCache(name)
        return dispatcher
