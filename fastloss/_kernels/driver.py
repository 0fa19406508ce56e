"""The one driver of the kernels: workers take tiles in turn, each with scratch and a ledger of its own.

A kernel is a tile function: it gets the number of a tile, the scratch and the ledger of its thread, and the arguments
of the kernel. :func:`make_kernel` makes of it a :class:`Kernel` with the arguments

``n_workers, ledgers, x, y, weight, out, geometry, keep, spread``

where every array is flat memory, ``out`` has the compute dtype, and what a kernel has no use for is any array. It
returns the two sums so far, rounded, and how many rows were kept and how many targets out of range, so far. It never
raises, and never allocates per row.

A *ledger* is a row of int64: two exact sums (see :mod:`fastloss._kernels.sums`), what was counted, and in the first
one the number of the next task. The first worker's is the caller's, who may keep it from call to call; the others are
added to it.
"""

from collections import namedtuple

import numpy as np
from numba import prange

from fastloss._kernels import tiles
from fastloss._kernels._jit import Kernel, allocating, subroutine
from fastloss._kernels._simd import lanes, next_task
from fastloss._kernels.sums import STATE_SIZE, add_state, rounded

# Where in a ledger the second sum lies, and the counts; the shared counter has a cache line of its own.
SECOND_SUM = STATE_SIZE
KEPT, BAD = 2 * STATE_SIZE, 2 * STATE_SIZE + 1
NEXT_TASK = 2 * STATE_SIZE + 16
LEDGER_SIZE = 2 * STATE_SIZE + 32

# Classes whose terms are summed in the compute type before the sum goes to float64, and the piece of a long row that a
# thread takes: see :mod:`fastloss._kernels.rows`.
BLOCK = 256
CHUNK = 8192

# Classes of a tile's rows that are copied into a stage at a time: with float32, a cache line of each row.
BATCH = 16

# The scratch of a thread.
#   near      int32, the classes of the targets for narrow lanes
#   places    int64: the rows' offsets in the input, in another array, and the targets
#   narrow    compute dtype: a few values per row
#   wide      float64: a few values per row
#   sums      compute dtype: one value per lane and row, three times
#   stage     a copy of a block of the input's classes; other_stage, out_stage: a batch of another array's
#   kept      compute dtype: a block of classes, for the kernels that keep what they have computed
Scratch = namedtuple("Scratch", "near places narrow wide sums stage other_stage out_stage kept")


@allocating
def _make_scratch(x, y, out, geometry, keeps):
    width = tiles.scratch_width(geometry)
    n_lanes = lanes(out[0])
    stage_classes = min(max(BATCH, geometry[tiles.N_CLASSES]), BLOCK)
    integers, doubles = np.empty(1, np.int64), np.empty(1, np.float64)
    return Scratch(
        tiles.aligned(width, np.empty(1, np.int32)),
        tiles.aligned(3 * width, integers).reshape(3, width),
        tiles.aligned(8 * width, out).reshape(8, width),
        tiles.aligned(8 * width, doubles).reshape(8, width),
        tiles.aligned(3 * n_lanes * width, out).reshape(3, n_lanes * width),
        tiles.aligned(stage_classes * width, x),
        tiles.aligned(BATCH * width, y),
        tiles.aligned(BATCH * width, out),
        tiles.aligned(stage_classes * width if keeps else n_lanes, out),
    )


@subroutine
def _collect(ledgers, n_workers):
    """Add the workers' ledgers to the first; the sums, rounded, the rows kept and the targets out of range."""
    total = ledgers[0]
    for worker in range(1, n_workers):
        ledger = ledgers[worker]
        add_state(total[:SECOND_SUM], ledger[:SECOND_SUM])
        add_state(total[SECOND_SUM:KEPT], ledger[SECOND_SUM:KEPT])
        total[KEPT] += ledger[KEPT]
        total[BAD] += ledger[BAD]
        ledger[:] = 0
    total[NEXT_TASK] = 0
    return rounded(total[:SECOND_SUM]), rounded(total[SECOND_SUM:KEPT]), total[KEPT], total[BAD]


def make_kernel(name, do_tile, keeps=False):
    """A kernel of ``do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread)``."""

    @allocating
    def work(counter, ledger, x, y, weight, out, geometry, keep, spread):
        scratch = _make_scratch(x, y, out, geometry, keeps)
        size = geometry[tiles.TASK_TILES]
        while True:
            first = next_task(counter) * size
            if first >= geometry[tiles.N_TILES]:
                break
            for tile in range(first, min(first + size, geometry[tiles.N_TILES])):
                do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread)

    def kernel(n_workers, ledgers, x, y, weight, out, geometry, keep, spread):
        counter = ledgers[0, NEXT_TASK:]
        for worker in prange(n_workers):
            work(counter, ledgers[worker], x, y, weight, out, geometry, keep, spread)
        return _collect(ledgers, n_workers)

    return Kernel(name, kernel)
