"""Processes and threads: which form of a kernel runs, with how many workers, and for how long at a time.

* Small work runs serially, in the caller's thread: starting threads costs more than it saves.
* One parallel region at a time. A caller that finds it busy computes serially, in its own thread, without waiting: no
  oversubscription.
* Numba's workqueue layer ends the process when two threads enter it, and another library may be the second. So under
  that layer there are parallel regions only while the process has a single Python thread: nobody can come in between.
* GNU OpenMP ends, or hangs, in a child forked after its threads have been started, by whatever library: such a child
  computes serially, and so does one forked after TBB was started. See :mod:`fastloss._forks` for the moment itself.
* Threads share the tiles of rows; where there are few, of long rows, they share pieces of them.
* A kernel cannot be interrupted, so long calls are cut: Ctrl-C is answered between the cuts.
* ``numba.set_num_threads`` is respected, and never called.
"""

import contextlib
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba.np.ufunc import parallel as numba_threads

from fastloss import _forks
from fastloss._kernels.driver import CHUNK, LEDGER_SIZE
from fastloss._kernels.tiles import FIRST_TILE, N_CLASSES, N_ROWS, N_TILES
from fastloss._validation import Array

if TYPE_CHECKING:
    from fastloss._kernels._jit import Kernel
    from fastloss._kernels.driver import Split, TileKernel

# Elements below which a kernel runs serially: two threads take some 5 us to start, in which one scores some 20,000
# elements; cross-entropy of 64 x 1000 takes 0.9 times as long in two, of 35 x 1000 1.4 times.
PARALLEL_THRESHOLD = 60_000

# The first cut of a long call, in elements (some milliseconds; a second from a disk at 16 MB/s), how long the others
# are to take, in seconds, and how many times longer a cut may be than the one before.
FIRST_CUT = 1 << 22
CUT_SECONDS = 0.2
CUT_GROWTH = 8

# Elements from where on threads share the rows of a tile: below, it takes longer (log-sum-exp of one row of 131,072
# classes in two threads 1.1 times as long, of 262,144 0.9 times). With as many tiles for each thread as the second
# says, or as many for one as for another, the threads end together anyway. A tile of more elements than the last is
# split in any case: it takes some hundredths of a second, and much more from a disk, without an answer to Ctrl-C.
SPLIT_THRESHOLD = 1 << 18
SPLIT_TILES = 4
LARGE_TILE = 1 << 25

# Who owns it is in a parallel region.
_region = threading.RLock()

# The threading layer in use: unknown before the first parallel call, and none where threads may not be started.
_UNKNOWN, _NONE = "unknown", "none"
_layer = _UNKNOWN
_layer_forks = _forks.n_forks


def _layer_in_numba() -> str:
    """The layer that is running, started by whatever library, or else the unknown one."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return _UNKNOWN


def _has_openmp() -> bool:
    """Whether GNU OpenMP is loaded: an own copy of some library counts too, for Numba may be bound to it."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


def _start_layer() -> str:
    """Start the threading layer, if this process may, and say which it is."""
    running = _layer_in_numba()
    if _forks.is_fork() and (running in ("omp", "tbb") or (running == _UNKNOWN and _has_openmp())):
        return _NONE
    if running != _UNKNOWN:
        return running
    # Numba would make a lock that all forks of this process share, and wait for it forever once a child was killed that
    # held it; to make it settles multiprocessing's start method, too. What it is to protect, a fork of ours waits for.
    if numba_threads._backend_init_process_lock is None:
        numba_threads._backend_init_process_lock = contextlib.nullcontext()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TBB that is too old
            numba.get_num_threads()
        return str(numba.threading_layer())
    except Exception:  # the layer that was asked for cannot be loaded
        return _NONE


def layer() -> str:
    """Numba's threading layer, or ``'none'`` where this process may not start threads."""
    global _layer, _layer_forks, _region
    if _layer == _UNKNOWN or _layer_forks != _forks.n_forks:
        with _forks.starting:
            if _layer_forks != _forks.n_forks:  # in the child its owner is gone
                _region = threading.RLock()
            _layer, _layer_forks = _start_layer(), _forks.n_forks
    return _layer


def num_threads() -> int:
    """How many threads the caller's parallel regions may have: what ``numba.set_num_threads`` said in its thread."""
    if layer() == _NONE:
        return 1
    # (numba.get_num_threads may take a lock that all forks of this process share.)
    return int(numba_threads._get_num_threads())


def _locks_before_fork() -> list[Any]:
    return [_region] if _layer == "tbb" else []


_forks.more_locks = _locks_before_fork


def _enter(n_elements: int, n_tasks: int) -> int:
    """How many workers to run. More than one: the parallel region is the caller's, who must leave it."""
    if n_elements < PARALLEL_THRESHOLD or n_tasks < 2:
        return 1
    n_workers = min(num_threads(), n_tasks)
    if n_workers < 2 or (_layer == "workqueue" and len(sys._current_frames()) > 1):
        return 1
    return n_workers if _region.acquire(blocking=False) else 1


def _leave() -> None:
    # As often as it was taken: Ctrl-C may have come between taking and leaving it.
    with contextlib.suppress(RuntimeError):
        while True:
            _region.release()


def run(kernel: "Kernel", n_elements: int, n_tasks: int, *args: Any) -> Any:
    """Run a kernel, in parallel where that pays and is allowed."""
    n_workers = _enter(n_elements, n_tasks)
    if n_workers == 1:
        return kernel.serial(1, *args)
    try:
        return kernel.parallel(n_workers, *args)
    finally:
        _leave()


# Whether the form of a kernel that a call does not run, serial or parallel, is compiled as well: to warm up.
compiles_both_forms = False

# What a kernel gets whose sums are not to be kept from call to call.
NO_LEDGER = np.zeros(0, np.int64)

# The flat memory of what a kernel reads and writes (x, y, weight and out), as what dtypes it is seen, and the factors
# (keep and spread).
Memory = tuple[Array, Array, Any, Array]
Dtypes = tuple[Any, Any, Any, Any]
Factors = tuple[float, float]


def new_ledger() -> Array:
    """Where a kernel keeps its exact sums and counts, from call to call; see :mod:`fastloss._kernels.driver`."""
    return np.zeros((1, LEDGER_SIZE), np.int64)


def run_tiles(
    kernel: "TileKernel",
    n_elements: int,
    ledger: Array,
    x: Array,
    y: Array,
    weight: Any,
    out: Array,
    geometry: Array,
    keep: float = 1.0,
    spread: float = 0.0,
) -> Any:
    """Run a kernel of :mod:`fastloss._kernels.driver` over the tiles of a geometry.

    Long calls in cuts, each some tiles of the geometry. What the ledger holds is exact, so the cuts leave no trace in
    the result.
    """
    weights = tuple(w.dtype for w in weight) if isinstance(weight, tuple) else weight.dtype
    dtypes = x.dtype, y.dtype, weights, out.dtype
    return run_typed(kernel, dtypes, n_elements, ledger, (x, y, weight, out), geometry, (keep, spread))


def run_typed(
    kernel: "TileKernel",
    dtypes: Dtypes,
    n_elements: int,
    ledger: Array,
    memory: Memory,
    geometry: Array,
    factors: Factors,
) -> Any:
    """:func:`run_tiles`, the memory seen as these dtypes."""
    if n_elements >= SPLIT_THRESHOLD and _splits(kernel, n_elements, geometry):
        return _run_split(kernel.split, dtypes, n_elements, ledger, memory, geometry, factors)
    if n_elements <= FIRST_CUT:
        return _run_cut(kernel, dtypes, n_elements, ledger, memory, geometry, factors)
    n_tiles = int(geometry[N_TILES])
    cut = geometry.copy()
    ledger = ledger if ledger.size else new_ledger()
    begin, size = 0, max(num_threads(), FIRST_CUT * n_tiles // n_elements)
    found = None
    while begin < n_tiles:
        started = time.perf_counter()
        cut[FIRST_TILE], cut[N_TILES] = begin, min(size, n_tiles - begin)
        found = _run_cut(kernel, dtypes, n_elements, ledger, memory, cut, factors)
        begin += size
        elapsed = max(time.perf_counter() - started, 1e-6)
        size = max(1, int(size * min(CUT_SECONDS / elapsed, CUT_GROWTH)))
    return found


def _run_cut(
    kernel: "TileKernel",
    dtypes: Dtypes,
    n_elements: int,
    ledger: Array,
    memory: Memory,
    geometry: Array,
    factors: Factors,
) -> Any:
    """Run a kernel over the tiles of a geometry at once."""
    n_workers = _enter(n_elements, int(geometry[N_TILES]))
    try:
        entry = kernel.entry(n_workers > 1, *dtypes)
        if compiles_both_forms:
            kernel.entry(n_workers == 1, *dtypes)
        return entry(n_workers, ledger, *memory, geometry, *factors)
    finally:
        if n_workers > 1:
            _leave()


def _splits(kernel: "TileKernel", n_elements: int, geometry: Array) -> bool:
    """Whether to split the rows."""
    split = kernel.split
    if split is None or geometry[N_CLASSES] <= split.size:
        return False
    n_tiles, n_threads = int(geometry[N_TILES]), num_threads()
    is_uneven = n_tiles % n_threads != 0 and n_tiles < SPLIT_TILES * n_threads
    return is_uneven or n_elements > LARGE_TILE * n_tiles


def _run_split(
    split: "Split",
    dtypes: Dtypes,
    n_elements: int,
    ledger: Array,
    memory: Memory,
    geometry: Array,
    factors: Factors,
) -> Any:
    """Run the kernels of a split one after the other."""
    n_classes = int(geometry[N_CLASSES])
    records = np.empty(int(geometry[N_ROWS]) * -(-n_classes // CHUNK) * split.n_values)
    pieces = geometry.copy()
    pieces[N_TILES] *= -(-n_classes // split.size)
    x, y, weight, out = memory
    memory = x, y, (weight, records), out
    dtypes = *dtypes[:2], (dtypes[2], records.dtype), dtypes[3]
    run_typed(split.pieces, dtypes, n_elements, NO_LEDGER, memory, pieces, factors)
    found = _run_cut(split.join, dtypes, records.size, ledger, memory, geometry, factors)
    if split.write is not None:
        run_typed(split.write, dtypes, n_elements, NO_LEDGER, memory, pieces, factors)
    return found


def target() -> tuple[str, int]:
    """The CPU that kernels are compiled for, and the bits of its vector registers."""
    from numba.core.registry import cpu_target

    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    enabled = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    return str(name), 512 if "avx512f" in enabled else 256 if "avx" in enabled else 128
