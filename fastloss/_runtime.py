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


def _enter(n_elements: int, n_tasks: int) -> int:
    """How many workers to run. More than one: the parallel region is the caller's, who must release it."""
    if n_elements < PARALLEL_THRESHOLD or n_tasks < 2 or _serial_only or not _region.acquire(blocking=False):
        return 1
    n_workers: int = min(numba.get_num_threads(), n_tasks)
    if n_workers < 2:
        _region.release()
    return max(1, n_workers)


def run(kernel: "Kernel", n_elements: int, n_tasks: int, *args: Any) -> Any:
    """Run a kernel, in parallel where that pays and is allowed."""
    n_workers = _enter(n_elements, n_tasks)
    if n_workers == 1:
        return kernel.serial(1, *args)
    try:
        return kernel.parallel(n_workers, *args)
    finally:
        _region.release()


def new_ledger() -> Array:
    """Where a kernel keeps its exact sums and counts, from call to call; see :mod:`fastloss._kernels.driver`."""
    return np.zeros((1, LEDGER_SIZE), np.int64)


def run_tiles(
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
    """Run a kernel of :mod:`fastloss._kernels.driver` over the tiles of a geometry."""
    n_workers = _enter(n_elements, int(geometry[N_TILES]))
    if n_workers == 1:
        return kernel.serial(1, ledger, x, y, weight, out, geometry, keep, spread)
    try:
        ledgers = np.zeros((n_workers, LEDGER_SIZE), np.int64)
        ledgers[0] = ledger[0]
        found = kernel.parallel(n_workers, ledgers, x, y, weight, out, geometry, keep, spread)
        ledger[0] = ledgers[0]
        return found
    finally:
        _region.release()
