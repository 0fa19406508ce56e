"""Where the rows lie: tiles of rows, their offsets in each array, their targets.

A kernel sees every array as one flat run of memory and a table of integers, the *geometry*, made by
:mod:`fastloss._views`. A *row* is everything but the class axis: one class distribution. The rows are numbered in the
order of a small nest of axes, outermost first, which :mod:`fastloss._views` has sorted by the input's memory order and
merged as far as all arrays allow. So one compiled kernel serves every shape and memory layout.

Geometry, int64: the header and the options below, the lengths of the axes, then for each array (input first) where its
first element lies, its class stride, and its strides along the axes, counted in elements (in bytes for index targets).
"""

import numpy as np

from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels._simd import (
    any_lane,
    iota,
    lane_steps,
    lanes,
    load,
    load_integers,
    load_target,
    load_targets,
    prefetch_l2,
    splat,
    store,
    tree_sum,
    where,
)

N_ROWS, N_CLASSES, TILE_ROWS, FIRST_TILE, N_TILES, RUN, N_AXES = range(7)
# Options: the kind of the targets, whether one of them is ignored and which, whether there are weights, what is wanted.
TARGET_KIND, HAS_IGNORE, IGNORE_INDEX, IS_WEIGHTED, WANTS_ROWS, WANTS_SUM, IS_LOG, WANTS_CORRECT = range(7, 15)
HEADER = 15

# Slots beyond the rows of a tile: room for a vector, and a stride of the stages that spreads over the cache's sets.
PADDING = 16

# Index targets that are no class.
IGNORED, OUT_OF_RANGE = -1, -2

# The arrays of a geometry. (NumPy integers: Numba would take each Python constant for a type of its own.)
INPUT, TARGET, OUT = np.int64(0), np.int64(1), np.int64(2)
SECOND = TARGET  # where there is no target, the result

# The integer types of index targets; bool is read as uint8, and uint64 as int64 (from 2**63 on it is negative there, so
# out of range).
TARGET_KINDS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@inline
def scratch_width(geometry):
    """Elements of scratch for a value per row: room for a vector more, and rows that begin on a cache line's border."""
    return (geometry[TILE_ROWS] + 15) // 16 * 16 + PADDING


@inline
def tile_bounds(geometry, tile):
    """First row and number of rows of a tile. Tiles do not cross the borders of runs of ``RUN`` rows."""
    run, size = geometry[RUN], geometry[TILE_ROWS]
    tiles_per_run = (run + size - 1) // size
    begin = (tile % tiles_per_run) * size
    return (tile // tiles_per_run) * run + begin, min(size, run - begin)


@inline
def class_stride(geometry, array):
    n_axes = geometry[N_AXES]
    return geometry[HEADER + n_axes + array * (n_axes + 2) + 1]


@inline
def inner_stride(geometry, array):
    n_axes = geometry[N_AXES]
    return geometry[HEADER + n_axes + (array + 1) * (n_axes + 2) - 1]


@inline
def is_dense(geometry, array, step, start, n):
    """Whether the rows ``start .. start + n`` of an array lie side by side, ``step`` apart."""
    length = geometry[HEADER + geometry[N_AXES] - 1]
    return inner_stride(geometry, array) == step and start % length + n <= length


@inline
def row_offset(geometry, array, row):
    """The offset of a row of an array."""
    n_axes = geometry[N_AXES]
    strides = HEADER + n_axes + array * (n_axes + 2)
    offset = geometry[strides]
    for axis in range(n_axes - 1, -1, -1):
        offset += (row % geometry[HEADER + axis]) * geometry[strides + 2 + axis]
        row //= geometry[HEADER + axis]
    return offset


@subroutine
def row_offsets(geometry, array, start, n, offsets):
    """Write the offsets of the rows ``start .. start + n`` of an array, and up to a vector of anything behind them."""
    length = geometry[HEADER + geometry[N_AXES] - 1]
    step = inner_stride(geometry, array)
    n_lanes = lanes(0.0)
    steps, vector_step = lane_steps(step), splat(n_lanes * step)
    done = 0
    while done < n:
        row = start + done
        count = min(n - done, length - row % length)
        value = splat(row_offset(geometry, array, row)) + steps
        for i in range(0, count, n_lanes):
            store(offsets, done + i, value)
            value = value + vector_step
        done += count


@inline
def count_up(numbers, n):
    """Write 0, 1, 2, ..."""
    for i in range(0, n, lanes(0.0)):
        store(numbers, i, lane_steps(np.int64(1)) + splat(i))


@subroutine
def _load_targets(data, geometry, start, n, offsets, targets):
    """Widen index targets to int64."""
    n_lanes = lanes(0.0)
    kind = geometry[TARGET_KIND]
    itemsize = 1 << (kind & 3)
    if is_dense(geometry, TARGET, itemsize, start, n) and n >= n_lanes:
        offset = row_offset(geometry, TARGET, start)
        if itemsize == 8:  # the usual ones, without asking for each vector
            for slot in range(0, n, n_lanes):
                i = min(slot, n - n_lanes)
                prefetch_l2(data, offset + i * 8, n * 8)  # the next tile's
                store(targets, i, load_integers(data, offset + i * 8, np.int64(0)))
        else:
            for slot in range(0, n, n_lanes):
                i = min(slot, n - n_lanes)
                store(targets, i, load_targets(data, offset + i * itemsize, kind))
    else:
        row_offsets(geometry, TARGET, start, n, offsets)
        for i in range(n):
            targets[i] = load_target(data, offsets[i], kind)


@subroutine
def _sort_out(targets, n, geometry, near):
    """Replace the targets that are ignored or no class, and those behind them; see :func:`read_targets`."""
    zero, one = splat(np.int64(0)), splat(np.int64(1))
    n_classes, ignore_index = splat(geometry[N_CLASSES]), splat(geometry[IGNORE_INDEX])
    has_ignore = splat(geometry[HAS_IGNORE]) == one
    kept, bad = zero, zero
    for i in range(0, n, lanes(0.0)):
        target = load_integers(targets, 8 * i, np.int64(0))
        value = where((target >= zero) & (target < n_classes), target, splat(np.int64(OUT_OF_RANGE)))
        value = where(has_ignore & (target == ignore_index), splat(np.int64(IGNORED)), value)
        value = where(iota(0.0) < splat(n - i), value, splat(np.int64(IGNORED)))
        kept = kept + where(value >= zero, one, zero)
        bad = bad + where(value == splat(np.int64(OUT_OF_RANGE)), one, zero)
        store(targets, i, value)
        store(near, i, value)
    return tree_sum(kept), tree_sum(bad)


@subroutine
def read_targets(data, geometry, start, n, offsets, targets, near):
    """Write the class of each row, ``IGNORED`` or ``OUT_OF_RANGE``, and ``IGNORED`` for a vector behind them; how many
    are kept, and how many out of range.

    ``near`` gets the low 32 bits, to be compared with classes in narrow lanes.
    """
    _load_targets(data, geometry, start, n, offsets, targets)
    n_lanes = lanes(0.0)
    zero = splat(np.int64(0))
    n_classes, ignore_index = splat(geometry[N_CLASSES]), splat(geometry[IGNORE_INDEX])
    # Almost every tile has no target but classes, of which none is ignored: one cheap pass tells.
    odd = zero != zero
    for slot in range(0, n, n_lanes):
        i = min(slot, n - n_lanes) if n >= n_lanes else slot
        target = load_integers(targets, 8 * i, np.int64(0))
        odd = odd | (target < zero) | (target >= n_classes) | (target == ignore_index)
        store(near, i, target)
    kept, bad = n, np.int64(0)
    if n < n_lanes or any_lane(odd):
        kept, bad = _sort_out(targets, n, geometry, near)
    for i in range(n, n + 2 * n_lanes, n_lanes):
        store(targets, i, splat(np.int64(IGNORED)))
        store(near, i, splat(np.int64(IGNORED)))
    return kept, bad


@subroutine
def copy_classes(x, offset, stride, low, high, stage):
    """Copy the classes ``low .. high`` of a row, wherever they lie, to the front of ``stage``."""
    for c in range(high - low):
        stage[c] = x[offset + (low + c) * stride]


@subroutine
def put_rows(out, geometry, array, start, n, offsets, values):
    """Write the results of a tile's rows."""
    n_lanes = lanes(values[0])
    if n >= n_lanes and is_dense(geometry, array, 1, start, n):
        offset = row_offset(geometry, array, start)
        for slot in range(0, n, n_lanes):
            i = min(slot, n - n_lanes)
            store(out, offset + i, load(values, i, values[0]))
    else:
        row_offsets(geometry, array, start, n, offsets)
        for i in range(n):
            out[offsets[i]] = values[i]
