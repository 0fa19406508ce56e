"""Where the rows lie: tiles of rows, their offsets in each array, their targets.

A kernel sees every array as one flat run of memory and a table of integers, the *geometry*, made by
:mod:`fastloss._views`. A *row* is everything but the class axis: one class distribution. The rows are numbered in the
order of a small nest of axes, outermost first, which :mod:`fastloss._views` has sorted by the input's memory order and
merged as far as all arrays allow. So one compiled kernel serves every shape and memory layout.

Geometry, int64: the header below, the lengths of the axes, then for each array (input first) where its first element
lies, its class stride, and its strides along the axes, counted in elements (in bytes for index targets).
"""

import numpy as np

from fastloss._kernels._jit import allocating, inline, subroutine
from fastloss._kernels._simd import load_integer

N_ROWS, N_CLASSES, TILE_ROWS, N_TILES, RUN, N_AXES = range(6)
HEADER = 6

# Slots beyond the rows of a tile: room for a vector, and a stride of the stages that spreads over the cache's sets.
PADDING = 16

# Index targets that are no class.
IGNORED, OUT_OF_RANGE = -1, -2

# Options of the index-target kernels, int64.
TARGET_KIND, HAS_IGNORE, IGNORE_INDEX, IS_WEIGHTED, WANTS_ROWS, WANTS_SUM = range(6)

# The arrays of a geometry. (NumPy integers: Numba would take each Python constant for a type of its own.)
INPUT, TARGET, OUT = np.int64(0), np.int64(1), np.int64(2)
SECOND = TARGET  # where there is no target, the result

# What a kernel counts, int64.
KEPT, BAD = range(2)

# The integer types of index targets; bool is read as uint8, and uint64 as int64 (from 2**63 on it is negative there, so
# out of range).
TARGET_KINDS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@allocating
def aligned(n, like):
    """Scratch for ``n`` elements of the dtype of the array ``like``, not initialised, on a cache line's border.

    Off it, every other vector would touch two lines: a tile of 100 classes takes 1.4 times as long.
    """
    raw = np.empty(n + 64 // like.itemsize, like.dtype)
    start = -raw.ctypes.data % 64 // like.itemsize
    return raw[start : start + n]


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


@subroutine
def row_offsets(geometry, array, start, n, offsets):
    """Write the offsets of the rows ``start .. start + n`` of an array."""
    n_axes = geometry[N_AXES]
    shape = HEADER
    strides = HEADER + n_axes + array * (n_axes + 2)
    length = geometry[shape + n_axes - 1]
    step = geometry[strides + 1 + n_axes]
    done = 0
    while done < n:
        first = (start + done) % length
        outer = (start + done) // length
        offset = geometry[strides] + first * step
        for axis in range(n_axes - 2, -1, -1):
            offset += (outer % geometry[shape + axis]) * geometry[strides + 2 + axis]
            outer //= geometry[shape + axis]
        count = min(n - done, length - first)
        for i in range(count):
            offsets[done + i] = offset + i * step
        done += count


@subroutine
def _read_targets(data, offsets, n, like, targets):
    for i in range(n):
        targets[i] = np.int64(load_integer(data, offsets[i], like))


@subroutine
def read_targets(data, offsets, n, n_classes, options, targets, near, counts):
    """Write the class of each row, ``IGNORED`` or ``OUT_OF_RANGE``; count the rows kept and the bad ones.

    ``near`` gets the low 32 bits, to be compared with classes in narrow lanes.
    """
    kind = options[TARGET_KIND]
    if kind == 3 or kind == 7:
        _read_targets(data, offsets, n, np.int64(0), targets)
    elif kind == 2:
        _read_targets(data, offsets, n, np.int32(0), targets)
    elif kind == 0:
        _read_targets(data, offsets, n, np.int8(0), targets)
    elif kind == 1:
        _read_targets(data, offsets, n, np.int16(0), targets)
    elif kind == 4:
        _read_targets(data, offsets, n, np.uint8(0), targets)
    elif kind == 5:
        _read_targets(data, offsets, n, np.uint16(0), targets)
    else:
        _read_targets(data, offsets, n, np.uint32(0), targets)
    has_ignore, ignore_index = options[HAS_IGNORE] != 0, options[IGNORE_INDEX]
    kept = 0
    bad = 0
    for i in range(n):
        target = targets[i]
        ignored = has_ignore and target == ignore_index
        outside = target < 0 or target >= n_classes
        targets[i] = IGNORED if ignored else (OUT_OF_RANGE if outside else target)
        near[i] = np.int32(targets[i])
        kept += not (ignored or outside)
        bad += outside and not ignored
    counts[KEPT] += kept
    counts[BAD] += bad


@subroutine
def copy_classes(x, offset, stride, low, high, stage):
    """Copy the classes ``low .. high`` of a row, wherever they lie, to the front of ``stage``."""
    for c in range(high - low):
        stage[c] = x[offset + (low + c) * stride]
