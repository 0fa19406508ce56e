"""Where compiled kernels are kept between processes, and why nothing that goes wrong there reaches the caller.

One directory, chosen once: ``FASTLOSS_CACHE_DIR``, else Numba's own setting (``NUMBA_CACHE_DIR``), else the user's
cache directory. Below it one directory per *stamp*, a hash of the kernels' sources and of the versions of fastloss,
NumPy, Numba, llvmlite and Python, so that no change of any of them ever meets old code; in that, one file per kernel,
signature and CPU.

Numba's own cache sees changes of a kernel's own file alone, raises where it finds no place to write, and raises on
damaged files. Here a file begins with the hash of the rest, is written under another name and renamed, and whatever
fails, the kernel is compiled in memory: the answer comes, later.
"""

import functools
import hashlib
import os
import pickle
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import _Cache, dumps
from numba.core.compiler import CompileResult
from numba.misc.appdirs import AppDirs

import fastloss

_SUFFIX = ".kernel"


def directory() -> Path:
    """The directory of all stamps; it need not exist."""
    chosen = os.environ.get("FASTLOSS_CACHE_DIR") or numba.config.CACHE_DIR
    if chosen:
        return Path(chosen) / "fastloss"
    return Path(AppDirs(appname="fastloss", appauthor=False).user_cache_dir)


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
    for path in sorted((Path(__file__).parent / "_kernels").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    """Whether a file or directory belongs to this user: what another user wrote is not loaded as code."""
    return not hasattr(os, "getuid") or path.stat().st_uid in (os.getuid(), 0)


class DiskCache(_Cache):  # type: ignore[misc] # Numba has no types, so its base class is Any
    """The cache of one kernel, as Numba's dispatchers use it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(directory() / stamp())

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Forget every version of this kernel."""
        for path in Path(self.cache_path).glob(f"{self._name}-*{_SUFFIX}"):
            path.unlink(missing_ok=True)

    def _path(self, sig: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr((str(sig), codegen.magic_tuple())).encode()).hexdigest()[:24]
        return Path(self.cache_path) / f"{self._name}-{key}{_SUFFIX}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel for a signature, or None."""
        target_context.refresh()
        if not self._enabled:
            return None
        try:
            path = self._path(sig, target_context.codegen())
            data = path.read_bytes()
            if not _is_ours(path):
                return None
            digest, payload = data[:32], data[32:]
            if hashlib.sha256(payload).digest() != digest:
                return None
            return CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:
            return None

    def save_overload(self, sig: Any, compiled: Any) -> None:
        """Keep a compiled kernel, if there is a place for it."""
        if not self._enabled or compiled.library.has_dynamic_globals:
            return
        temporary = None
        try:
            path = self._path(sig, compiled.codegen)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(path.parent):
                return
            payload = dumps(compiled._reduce())
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                temporary = file.name
                file.write(hashlib.sha256(payload).digest() + payload)
            Path(temporary).replace(path)
        except Exception:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
