"""``python -m fastloss info``: what a bug report needs to say about the machine and the versions."""

import importlib.metadata
import json
import os
import platform
import sys

import numpy as np

import fastloss
from fastloss import _forks


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def collect() -> dict[str, str]:
    """What there is to say, by name."""
    runtime = _forks.runtime()
    from fastloss import _cache

    place = _cache.directory()
    n_kernels, n_bytes = _cache.contents()
    cpu, n_bits = runtime.target()
    threads = "no" if not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled() else "yes"
    return {
        "fastloss": fastloss.__version__,
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "free-threaded": threads,
        "NumPy": np.__version__,
        "Numba": _version("numba"),
        "llvmlite": _version("llvmlite"),
        "system": platform.platform(),
        "CPU": f"{cpu}, {os.cpu_count()} logical",
        "vector width": f"{n_bits} bits",
        "threading layer": runtime.layer(),
        "threads": str(runtime.num_threads()),
        "cache": "none: no home directory" if place is None else str(place),
        "cached": f"{n_kernels} kernels of this version, {n_bytes / 1e6:.1f} MB in all",
    }


def show(as_json: bool) -> None:
    """Print it, as a table or as a JSON object."""
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
