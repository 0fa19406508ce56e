"""The driver of the losses' kernels: workers take tile after tile, each with scratch and a ledger of its own. (Those of
the metrics have the one of :mod:`fastloss._kernels.scores`.)

A kernel is a tile function: it gets the number of a tile, the scratch and the ledger of its thread, and the arguments
of the kernel. :func:`make_kernel` makes of it a :class:`TileKernel` with the arguments

``n_workers, ledger, x, y, weight, out, geometry, keep, spread``

where every array is flat memory, ``out`` has the compute dtype, and what a kernel has no use for is any array. It
returns the two sums so far, rounded, and how many rows were kept and how many targets out of range, so far. It never
raises, and never allocates per row.

A *ledger* is a row of int64: two exact sums (see :mod:`fastloss._kernels.sums`), what was counted, what the next tile's
values are guessed to be like, and how many tiles of the worker's share have been taken. Each worker has one; at the end
the others are added to the first. The caller may keep it from call to call, or give an empty array.
"""

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
from numba import config, float64, int64, prange

from fastloss._kernels import tiles
from fastloss._kernels._jit import Kernel, inline, subroutine
from fastloss._kernels._memory import CACHE_LINE, allocate, memory_type, release, take, take_rows
from fastloss._kernels._simd import lanes, next_task
from fastloss._kernels.sums import FIRST_GUESS, STATE_SIZE, add_state, rounded

# Where in a ledger the second sum lies, the counts (rows kept, targets out of range, predictions that are right), a
# guess for each sum, how values are added to the first and for how many tiles more; the counter, which other workers
# may use, has a cache line of its own.
SECOND_SUM = STATE_SIZE
KEPT, BAD, CORRECT = (2 * STATE_SIZE + i for i in range(3))
GUESS, SECOND_GUESS, WAY, WAY_TILES = (2 * STATE_SIZE + i for i in range(3, 7))
TAKEN = 2 * STATE_SIZE + 16
LEDGER_SIZE = 2 * STATE_SIZE + 32

# Classes whose terms are summed in the compute type before the sum goes to float64, and the least piece of a long row
# that a thread takes: see :mod:`fastloss._kernels.rows`.
BLOCK = 256
CHUNK = 8192

# Classes that are searched for a maximum at a time, before they are summed relative to it: some whole blocks, of which
# a row fits into the first-level cache and a tile of planes into the second. Where a row has more than one group, each
# is a block, for two of a tile of planes to fit: one that is summed, one that is copied.
GROUP = 1024

# Classes of a tile's rows that are copied into a stage at a time: with float32, a cache line of each row.
BATCH = 16

# Rows of few classes that are staged at a time; there is room for twice as many.
STAGED_ROWS = 64

# The scratch of a thread.
#   near      int32, the classes of the targets for narrow lanes
#   places    int64: the rows' offsets in the input, in another array, and the targets
#   narrow    compute dtype: a few values per row
#   wide      float64: a few values per row
#   sums      compute dtype: one value per lane and row, four times
#   stage     a copy of a group of the input's classes; other_stage: of a block of another array's; out_stage: of a
#             batch of the result's
#   kept      compute dtype, for the kernels that keep what they have computed: a block of classes of each row, a group
#             of one row, or the few classes of some rows
#   records   no scratch: float64, what is known of the chunks of the rows, for the kernels of a Split; see record_at()
#   memory    what the others are cut out of, to be released
Scratch = namedtuple("Scratch", "near places narrow wide sums stage other_stage out_stage kept records memory")

# As many classes per lane as there may be.
ANY_NUMBER = 1 << 40

# What there is room for in ``kept``.
NOTHING, BLOCK_OF_ROWS, GROUP_OF_ROW, STAGED = range(4)


@inline
def group_size(n_classes):
    return np.int64(GROUP if n_classes <= GROUP else BLOCK)


@inline
def record_at(geometry, row, c, size):
    """Where among the records, of ``size`` values each, that of a row's chunk is that begins with class c."""
    return (row * ((geometry[tiles.N_CLASSES] + CHUNK - 1) // CHUNK) + c // CHUNK) * size


@inline
def _padded(n_bytes):
    """Bytes up to the next border of a cache line."""
    return (n_bytes + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


@subroutine
def _make_scratch(x, y, out, geometry, light, keeps, records):
    width, n_classes = tiles.scratch_width(geometry), geometry[tiles.N_CLASSES]
    n_lanes, group = lanes(out[0]), group_size(n_classes)
    of_few = 2 * min(n_classes, 2 * n_lanes) * min(width, STAGED_ROWS + tiles.PADDING)
    if n_classes <= light * n_lanes:
        n_narrow, n_wide, n_lane_sums, n_others, n_out = 2, 2, 0, width, width
        n_staged = max(width, min(n_classes, group) + 2 * tiles.PADDING, of_few)
    else:
        n_narrow, n_wide, n_lane_sums, n_out = 8, 12, min(n_lanes, n_classes) * width, BATCH * width
        n_staged = max((max(BATCH, n_classes if n_classes <= group else 2 * group) + 1) * width, of_few)
        n_others = min(max(BATCH, n_classes), BLOCK) * width
    places = _padded(4 * width)
    wide = places + 24 * width
    narrow = wide + n_wide * 8 * width
    sums = narrow + n_narrow * out.itemsize * width
    stage = sums + 4 * out.itemsize * n_lane_sums
    other_stage = stage + _padded(n_staged * x.itemsize)
    out_stage = other_stage + _padded(n_others * y.itemsize)
    kept = out_stage + _padded(n_out * out.itemsize)
    n_kept = (0, n_others, min(n_classes, group) + tiles.PADDING, of_few // 2)[keeps]
    memory = allocate(kept + n_kept * out.itemsize + CACHE_LINE)
    return Scratch(
        take(memory, 0, width, np.int32(0)),
        take_rows(memory, places, 3, width, np.int64(0)),
        take_rows(memory, narrow, n_narrow, width, out),
        take_rows(memory, wide, n_wide, width, np.float64(0)),
        take_rows(memory, sums, 4, n_lane_sums, out),
        take(memory, stage, n_staged, x),
        take(memory, other_stage, n_others, y),
        take(memory, out_stage, n_out, out),
        take(memory, kept, n_kept, out),
        records,
        memory,
    )


@subroutine
def _new_ledgers(memory, n_workers, kept):
    """A ledger for each worker; the first goes on with what the caller has kept, if anything."""
    ledgers = take_rows(memory, 0, n_workers, LEDGER_SIZE, np.int64(0))
    for worker in range(n_workers):
        ledger = ledgers[worker]
        for i in range(LEDGER_SIZE):
            ledger[i] = kept[i] if worker == 0 and i < len(kept) else 0
        ledger[GUESS] = FIRST_GUESS
        ledger[SECOND_GUESS] = FIRST_GUESS
        ledger[WAY] = 0
        ledger[TAKEN] = 0
    return ledgers


@subroutine
def _collect(ledgers, n_workers, kept):
    """Add the workers' ledgers to the first, for the caller to keep; the sums, rounded, the rows kept and the targets
    out of range.
    """
    total = ledgers[0]
    for worker in range(1, n_workers):
        ledger = ledgers[worker]
        add_state(total[:SECOND_SUM], ledger[:SECOND_SUM])
        add_state(total[SECOND_SUM:KEPT], ledger[SECOND_SUM:KEPT])
        total[KEPT] += ledger[KEPT]
        total[BAD] += ledger[BAD]
        total[CORRECT] += ledger[CORRECT]
    sums = rounded(total[:SECOND_SUM]), rounded(total[SECOND_SUM:KEPT])
    for i in range(len(kept)):
        kept[i] = total[i]
    return sums[0], sums[1], total[KEPT], total[BAD]


class TileKernel(Kernel):
    """A kernel whose arguments are flat memory."""

    def __init__(self, name, body, split=None):
        super().__init__(name, body)
        self.split = split
        self._entries = {}

    def entry(self, is_parallel: bool, x: Any, y: Any, weight: Any, out: Any) -> Any:
        """What to call for arrays that are seen as these dtypes (``weight`` may be a tuple of them), positionally."""
        key = is_parallel, x, y, weight, out
        entry = self._entries.get(key)
        if entry is None:
            form, integers = self.parallel if is_parallel else self.serial, np.dtype(np.int64)
            dtypes = integers, x, y, weight, out, integers
            if config.DISABLE_JIT:
                entry = _python_entry(form, dtypes)
            else:
                entry = form.compile((int64, *map(memory_type, dtypes), float64, float64))
            self._entries[key] = entry
        return entry


def _python_entry(body, dtypes):
    def flat(array, dtype):
        if isinstance(dtype, tuple):
            return tuple(map(flat, array, dtype))
        if not (array.flags.c_contiguous and array.flags.aligned):
            raise BufferError("an array that is not C-contiguous and aligned")
        return array.reshape(-1).view(dtype)

    return lambda n_workers, *args: body(n_workers, *map(flat, args[:6], dtypes), *args[6:])


class Split(NamedTuple):
    """How several workers share the rows of a tile: in place of a kernel, others run one after the other.

    A tile of ``pieces`` is a piece, ``size`` classes, of the rows of a tile (see :func:`piece_bounds`), and its result
    a record of ``n_values`` for each row and chunk. ``join`` goes on from the records. ``write``, if there is one, goes
    through the pieces again. In all of them, ``weight`` is a tuple, of which the records are the second.
    """

    pieces: TileKernel
    size: int
    n_values: int
    join: TileKernel
    write: TileKernel | None = None


@inline
def piece_bounds(geometry, piece, size):
    """First row and number of rows of a piece, and its classes."""
    n_classes = geometry[tiles.N_CLASSES]
    n_pieces = (n_classes + size - 1) // size
    start, n = tiles.tile_bounds(geometry, piece // n_pieces)
    begin = piece % n_pieces * size
    return start, n, begin, min(begin + size, n_classes)


@inline
def _alone(weight):
    return weight, None


@inline
def _with_records(weight):
    return weight[0], weight[1]


def make_kernel(name, do_tile, light=0, keeps=NOTHING, split=None, has_records=False):
    """A kernel of ``do_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread)``.

    With up to ``light`` classes per lane, ``do_tile`` gets along with two rows of ``narrow`` and of ``wide``, no
    ``sums``, and of ``other_stage`` and ``out_stage`` one value per row. ``keeps`` says what ``kept`` has room for.
    ``split`` is a :class:`Split`, if there is one; ``has_records`` says that the kernel is part of one.
    """
    parts = _with_records if has_records else _alone

    @subroutine
    def work(ledgers, worker, n_workers, x, y, weight, out, geometry, keep, spread):
        """The worker's share of the tiles, then what others have left of theirs.

        A share is one run of tiles: what a worker asks for ahead of its loads is its own, and so are the pages of a
        new result, which two threads must not come to at once (softmax of 65,536 x 500 takes 1.3 times as long where
        they take the next tiles in turn).
        """
        weight, records = parts(weight)
        scratch = _make_scratch(x, y, out, geometry, light, keeps, records)
        first, n_tiles = geometry[tiles.FIRST_TILE], geometry[tiles.N_TILES]
        for i in range(n_workers):
            owner = (worker + i) % n_workers
            begin, end = first + owner * n_tiles // n_workers, first + (owner + 1) * n_tiles // n_workers
            while True:
                tile = begin + next_task(ledgers[owner][TAKEN:])
                if tile >= end:
                    break
                do_tile(tile, scratch, ledgers[worker], x, y, weight, out, geometry, keep, spread)
        release(scratch.memory)

    def kernel(n_workers, kept, x, y, weight, out, geometry, keep, spread):
        memory = allocate(8 * LEDGER_SIZE * n_workers + CACHE_LINE)
        ledgers = _new_ledgers(memory, n_workers, kept)
        for worker in prange(n_workers):
            work(ledgers, worker, n_workers, x, y, weight, out, geometry, keep, spread)
        found = _collect(ledgers, n_workers, kept)
        release(memory)
        return found

    return TileKernel(name, kernel, split)
