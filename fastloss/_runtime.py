"""Processes and threads: which form of a kernel runs, and with how many workers.

* Small work runs serially, in the caller's thread: starting threads costs more than it saves.
* One parallel region at a time. A caller that finds it busy computes serially, in its own thread, without waiting: no
  oversubscription, and Numba's workqueue layer, which ends the process when two threads enter it, is never entered
  twice.
* A forked child of a process that has started GNU OpenMP threads computes serially: that layer would end the child.
* ``numba.set_num_threads`` is respected, and never called.
"""

import os
import threading
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from fastloss._kernels.driver import LEDGER_SIZE
from fastloss._kernels.tiles import N_TILES
from fastloss._validation import Array

if TYPE_CHECKING:
    from fastloss._kernels._jit import Kernel

# Elements below which a kernel runs serially. Two threads take some 5 us to start; a thread scores about a million
# elements in a millisecond.
PARALLEL_THRESHOLD = 1 << 16

_region = threading.Lock()
_serial_only = False


def _threads_were_started() -> bool:
    try:
        return bool(numba.threading_layer() == "omp")
    except ValueError:  # no threading layer has been started
        return False


def _after_fork_in_child() -> None:
    global _region, _serial_only
    _region = threading.Lock()
    _serial_only = _serial_only or _threads_were_started()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def new_ledger() -> Array:
    """Where a kernel keeps its exact sums and counts, from call to call; see :mod:`fastloss._kernels.driver`."""
    return np.zeros((1, LEDGER_SIZE), np.int64)


def run(
    kernel: "Kernel",
    n_elements: int,
    ledger: Array,
    x: Array,
    y: Array,
    weight: Array,
    out: Array,
    geometry: Array,
    keep: float = 1.0,
    spread: float = 0.0,
) -> Any:
    """Run a kernel over the tiles of a geometry, in parallel where that pays and is allowed."""
    n_tiles = int(geometry[N_TILES])
    if n_elements >= PARALLEL_THRESHOLD and n_tiles > 1 and not _serial_only and _region.acquire(blocking=False):
        region = _region
        try:
            n_workers = min(numba.get_num_threads(), n_tiles)
            if n_workers > 1:
                ledgers = np.concatenate([ledger, np.zeros((n_workers - 1, LEDGER_SIZE), np.int64)])
                found = kernel.parallel(n_workers, ledgers, x, y, weight, out, geometry, keep, spread)
                ledger[0] = ledgers[0]
                return found
        finally:
            region.release()
    return kernel.serial(1, ledger, x, y, weight, out, geometry, keep, spread)
