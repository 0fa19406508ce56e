"""What must be at rest when the process forks, for the child holds a copy of every lock and has none of the threads.

A lock that another thread holds at that moment stays locked in the child for ever: that of a module being imported,
Numba's compiler lock, LLVM's. So a fork waits until no other thread is importing the kernels, starting the threading
layer or compiling, and under TBB until no thread is inside a parallel region of ours, which takes a fraction of a
second (:mod:`fastloss._runtime` cuts long calls). Numba is not imported here: the hooks are in place before it is.
"""

# Hooks of their own, which must not come between ours: Numba imports both.
import concurrent.futures.thread  # noqa: F401
import functools
import logging  # noqa: F401
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

# The part of importlib that holds the locks of the modules being imported; one not yet found is not in sys.modules.
_importlib: Any = sys.modules["_frozen_importlib"]
_IMPORTED = ("fastloss", "llvmlite", "numba", "numpy", "scipy")

# By module, in the order in which Numba takes them.
_LOCKS = {
    "numba.core.compiler_lock": ["global_compiler_lock"],
    "numba.np.ufunc.parallel": ["_backend_init_thread_lock"],
    "llvmlite.binding.ffi": ["lib", "_lock"],
}

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


def _imports() -> set[str]:
    """The modules that a kernel needs, for Numba imports some of them late, and that other threads are importing."""
    own = threading.get_ident()
    return {
        name
        for name, reference in list(_importlib._module_locks.items())
        if name.partition(".")[0] in _IMPORTED and getattr(reference(), "owner", None) not in (None, own)
    }


def _compiler_locks() -> list[Any]:
    """The locks of Numba's compiler, of its threading layer and of LLVM, outermost first, as far as they are loaded."""
    locks = []
    for module, names in _LOCKS.items():
        lock = sys.modules.get(module)
        for name in names:
            lock = getattr(lock, name, None)
        if lock is not None:
            locks.append(lock)
    return locks


def _before() -> None:
    # In this order: who is in a parallel region may start the layer and compile, who starts the layer may compile.
    for lock in more_locks():
        _take(lock)
    _take(starting)
    _wait_for_imports_and_compilations()


def _wait_for_imports_and_compilations() -> None:
    """Who compiles may import, and who imports Numba calls LLVM: imports are not waited for with a lock of these taken.

    Each is waited for once: its thread may itself be waiting for a module that this thread, which forks, is importing.
    """
    n_before, waited = len(_taken), set[str]()
    while True:
        for lock in _compiler_locks():
            _take(lock)
        imports = _imports() - waited
        if not imports:
            return
        _release(n_before)
        for name in imports:
            _importlib._lock_unlock_module(name)
        waited |= imports


def _take(lock: Any) -> None:
    lock.__enter__()
    _taken.append(lock)


def _release(n_left: int) -> None:
    while len(_taken) > n_left:
        _taken.pop().__exit__(None, None, None)


def _after() -> None:
    _release(0)


def _after_in_child() -> None:
    global n_forks
    n_forks += 1
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
