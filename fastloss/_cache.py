"""Where compiled kernels are kept between processes, and why nothing that goes wrong there reaches the caller.

One directory, chosen once: ``FASTLOSS_CACHE_DIR``, else Numba's own setting (``NUMBA_CACHE_DIR``), else the user's
cache directory. Below it one directory per *stamp*, a hash of the kernels' sources and of the versions of fastloss,
NumPy, Numba, llvmlite and Python, so that no change of any of them ever meets old code; in that, one file per kernel,
signature and CPU.

Numba's own cache sees changes of a kernel's own file alone, raises where it finds no place to write, and raises on
damaged files. Here a file begins with the hash of its name and of the rest, is written under another name and renamed,
is loaded only if no other user (but the superuser) can have written it, and whatever fails, the kernel is compiled in
memory: the answer comes, later.
"""

import functools
import hashlib
import os
import pickle
import platform
import secrets
import stat
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import binding as llvm
from numba.core.caching import _Cache, dumps
from numba.core.compiler import CompileResult
from numba.core.runtime import _nrt_python
from numba.misc.appdirs import AppDirs

import fastloss

_SUFFIX, _TEMPORARY = ".kernel", ".tmp"

# Seconds after which a temporary file is one that a process left behind when it was killed.
_ABANDONED = 3600


@functools.cache
def directory() -> Path | None:
    """The directory of all stamps, which need not exist; None where there is no place for one."""
    chosen = os.environ.get("FASTLOSS_CACHE_DIR") or numba.config.CACHE_DIR
    if chosen:
        return Path(chosen).absolute() / "fastloss"
    path = Path(AppDirs(appname="fastloss", appauthor=False).user_cache_dir)
    return path if path.is_absolute() else None  # without a home directory it begins with "~"


@functools.cache
def stamp() -> str:
    """What the compiled code depends on, besides the CPU and the signature, in 16 hexadecimal digits."""
    versions = (
        fastloss.__version__,
        np.__version__,
        numba.__version__,
        llvmlite.__version__,
        platform.python_version(),
    )
    flags = (sys.abiflags if hasattr(sys, "abiflags") else "", bool(numba.config.BOUNDSCHECK), str(numba.config.OPT))
    digest = hashlib.sha256(repr((versions, flags)).encode())
    sources = (path for path in files("fastloss._kernels").iterdir() if path.name.endswith(".py"))
    for path in sorted(sources, key=lambda path: path.name):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def contents() -> tuple[int, int]:
    """How many kernels of this version the cache holds, and the bytes of all that it holds."""
    place = directory()
    n_kernels = n_bytes = 0
    if place is not None:
        for folder, _, names in os.walk(place):
            for name in names:
                try:
                    n_bytes += (Path(folder) / name).stat().st_size
                except OSError:  # just removed
                    continue
                n_kernels += name.endswith(_SUFFIX) and Path(folder).name == stamp()
    return n_kernels, n_bytes


def _is_trusted(status: os.stat_result) -> bool:
    """Whether only this user or the superuser can have written it: what another user wrote is not loaded as code."""
    for_others = stat.S_IWGRP | stat.S_IWOTH
    return not hasattr(os, "getuid") or (status.st_uid in (os.getuid(), 0) and not status.st_mode & for_others)


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole as soon as it has its name."""
    temporary = path.with_name(f"{path.name}-{secrets.token_hex(8)}{_TEMPORARY}")
    try:
        # Readable for others as far as the umask allows: a warmed cache may belong to the superuser.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for old in path.parent.glob(f"*{_TEMPORARY}"):
        if time.time() - old.stat().st_mtime > _ABANDONED:
            old.unlink(missing_ok=True)


@functools.cache
def _add_runtime_symbols() -> None:
    """What compiled code calls of Numba's runtime.

    Numba does this, and much that only compiling needs, when a target is refreshed: loading every implementation that
    it has, and SciPy's linear algebra, takes longer than all else in a call of a cached kernel.
    """
    for name, address in _nrt_python.c_helpers.items():
        llvm.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


class DiskCache(_Cache):  # type: ignore[misc] # Numba has no types, so its base class is Any
    """The cache of one kernel, as Numba's dispatchers use it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._enabled = True

    @property
    def cache_path(self) -> str:
        place = directory()
        return "" if place is None else str(place / stamp())

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Forget every version of this kernel."""
        for path in self._folder().glob(f"{self._name}-*{_SUFFIX}"):
            path.unlink(missing_ok=True)

    @staticmethod
    def _folder() -> Path:
        place = directory()
        if place is None:
            raise FileNotFoundError("no place for a cache")
        return place / stamp()

    def _path(self, sig: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr((str(sig), codegen.magic_tuple())).encode()).hexdigest()[:24]
        return self._folder() / f"{self._name}-{key}{_SUFFIX}"

    @staticmethod
    def _digest(path: Path, payload: bytes) -> bytes:
        return hashlib.sha256(path.name.encode() + payload).digest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel for a signature, or None."""
        compiled = None
        if self._enabled:
            try:
                path = self._path(sig, target_context.codegen())
                if _is_trusted(path.parent.stat()):
                    with path.open("rb") as file:
                        data = file.read() if _is_trusted(os.fstat(file.fileno())) else b""
                    digest, payload = data[:32], data[32:]
                    if digest == self._digest(path, payload):
                        _add_runtime_symbols()
                        compiled = CompileResult._rebuild(target_context, *pickle.loads(payload))
            except Exception:
                compiled = None
        if compiled is None:
            from fastloss._kernels._compiler import undisturbed

            undisturbed(target_context.refresh)  # the caller is going to compile
        return compiled

    def save_overload(self, sig: Any, compiled: Any) -> None:
        """Keep a compiled kernel, if there is a place for it."""
        if not self._enabled or compiled.library.has_dynamic_globals:
            return
        try:
            path = self._path(sig, compiled.codegen)
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if _is_trusted(path.parent.stat()):
                payload = dumps(compiled._reduce())
                _write(path, self._digest(path, payload) + payload)
        except Exception:
            return
