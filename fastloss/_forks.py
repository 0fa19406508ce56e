"""What must be at rest when the process forks, for the child holds a copy of every lock and has none of the threads.

A lock that another thread holds at that moment stays locked in the child for ever: that of a module being imported,
Numba's compiler lock, LLVM's. So a fork waits until no other thread is importing the kernels, starting the threading
layer or compiling, and under TBB until no thread is inside a parallel region of ours, which takes a fraction of a
second (:mod:`fastloss._runtime` cuts long calls). Numba is not imported here: the hooks are in place before it is.
"""

import contextlib
import functools
import importlib
import logging  # noqa: F401 (hooks of its own, which must not come between ours: Numba imports it)
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Held while the runtime is imported and while the threading layer starts.
starting = threading.RLock()

# How often this process has come out of a fork since fastloss was imported.
n_forks = 0

# What the runtime has to say: the locks to take before a fork, outermost first.
more_locks: Callable[[], list[Any]] = list

_taken: list[Any] = []

_IMPORTED = ("fastloss", "llvmlite", "numba", "numpy", "scipy")

# In the ninth field of /proc/self/stat: forked, and no program executed since (include/linux/sched.h).
_PF_FORKNOEXEC = 0x40


@functools.cache
def runtime() -> Any:
    """:mod:`fastloss._runtime`, which imports Numba, and with it the kernels of the losses."""
    with starting:
        import numpy.ma  # noqa: F401 (Numba does, when it first sees an array)

        from fastloss import _runtime
        from fastloss._kernels import gather, losses, outputs, pointwise  # noqa: F401
    return _runtime


def is_fork() -> bool:
    """Whether this process is a fork of another, where that can be known, be it before fastloss was imported."""
    if n_forks:
        return True
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return bool(int(fields[6]) & _PF_FORKNOEXEC)
    except (OSError, ValueError, IndexError):
        return False


def _wait_for_imports() -> None:
    """Wait until no other thread is importing a module that a kernel needs; Numba imports some of them late."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _IMPORTED and getattr(getattr(module, "__spec__", None), "_initializing", False):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _compiler_locks() -> list[Any]:
    """Numba's and LLVM's locks, if these are loaded."""
    locks = []
    compiler_lock = getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", None)
    if compiler_lock is not None:
        locks.append(compiler_lock)
    ffi = sys.modules.get("llvmlite.binding.ffi")
    llvm_lock = getattr(getattr(ffi, "lib", None), "_lock", None)
    if llvm_lock is not None:
        locks.append(llvm_lock)
    return locks


def _before() -> None:
    # In this order: who is in a parallel region may start the layer and compile, who starts the layer may compile.
    for lock in more_locks():
        _take(lock)
    _take(starting)
    for lock in _compiler_locks():
        _take(lock)
    _wait_for_imports()


def _take(lock: Any) -> None:
    lock.__enter__()
    _taken.append(lock)


def _after() -> None:
    while _taken:
        _taken.pop().__exit__(None, None, None)


def _after_in_child() -> None:
    global n_forks
    n_forks += 1
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
