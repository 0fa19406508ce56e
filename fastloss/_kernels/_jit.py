"""The one place that compiles: options, the serial and the parallel form of a kernel, and what a helper costs.

Numba optimises every function that another calls, with all that it calls in turn, and compiles it to machine code of
its own, with wrappers to call it from Python, before the caller, into which LLVM has inlined it, is compiled. For the
helpers of the kernels that work is thrown away: :func:`inline` and :func:`subroutine` leave it out, and LLVM optimises
the code of a kernel once, as a whole.
"""

import itertools
import os

from numba import config, njit
from numba.core.bytecode import FunctionIdentity
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering

from fastloss._cache import DiskCache

__all__ = ["Kernel", "allocating", "inline", "subroutine"]

# Division by zero follows IEEE arithmetic instead of raising. No fast-math flag, here or anywhere: the order and the
# rounding of every operation are those of the source.
_OPTIONS = {"error_model": "numpy", "no_cfunc_wrapper": True}

# Numba tells functions of one name and signature, as the closures of the kernels are, apart by a number that counts the
# functions of the process, and the linker resolves a name to the first function loaded under it. So where two kernels
# are loaded that two processes have compiled and kept, one could call a function of the other's. A random beginning
# keeps the numbers of all processes apart.
FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(7), "little"))


class _HelperLower(Lower):
    """Keep a subroutine out of line: LLVM would inline one that is called once, and take longer."""

    def setup_function(self, fndesc):
        super().setup_function(fndesc)
        if not fndesc.inline:
            self.function.attributes.add("noinline")


class _HelperLibrary(JITCodeLibrary):
    """The code of a helper and of what it calls, for its callers to link: neither optimised nor compiled."""

    def finalize(self):
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            if hasattr(self, "_reload_init"):  # (Numba 0.61 has none.)
                self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _HelperLowering(NativeLowering):
    """Lower a function for inlining by its callers, without compiling it by itself."""

    _name = "fastloss_helper_lowering"

    @property
    def lowering_class(self):
        return _HelperLower

    def run_pass(self, state):
        state.flags.no_compile = True
        state.library = _HelperLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        super().run_pass(state)
        # Numba's tables want a builtin function of its own for each; this one raises when Python calls it.
        stand_in = {}.popitem
        state.targetctx.insert_user_function(stand_in, state["cr"].fndesc, [state.library])
        state["cr"] = state["cr"]._replace(cfunc=stand_in)
        return True


class _HelperCompiler(CompilerBase):
    def define_pipelines(self):
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [
            (_HelperLowering, description) if pass_ is NativeLowering else (pass_, description)
            for pass_, description in manager.passes
        ]
        manager._finalized = False
        manager.finalize()
        return [manager]


def _helper(function, **options):
    if config.DISABLE_JIT:
        return function
    return njit(function, no_cpython_wrapper=True, pipeline_class=_HelperCompiler, **_OPTIONS, **options)


def inline(function):
    """Compile a function for compiled code to call, always inlined: what runs per vector or per row."""
    return _helper(function, forceinline=True, _nrt=False)


def subroutine(function):
    """Compile a function for compiled code to call, never inlined: what runs per tile, or rarely.

    Without reference counts, as :func:`inline`: Numba counts each array argument of each call, with an atomic addition
    that the threads contend for, and the registers spilled around it. So neither may allocate.
    """
    return _helper(function, _nrt=False)


def allocating(function):
    """:func:`subroutine` that may allocate: what runs once per thread."""
    return _helper(function)


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
        dispatcher = njit(body, nogil=True, **_OPTIONS, **options)
        dispatcher._cache = DiskCache(name)
        return dispatcher
