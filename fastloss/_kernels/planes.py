"""Cross-entropy and log-sum-exp of a tile of rows at a time: for a strided class axis (segmentation), and few classes.

A vector holds one class of consecutive rows (pixels). Where these lie side by side in memory they are loaded from where
they are; otherwise a batch of classes is copied into a stage in the first-level cache, transposed. The arithmetic and
the order of addition are those of :mod:`fastloss._kernels.rows`, lane by lane, so the bits are the same.

Sums are kept by *slot*, inputs and results by row: where the rows do not fill the last vector, it is laid to end with
them, so its slots repeat rows of the vector before (:func:`row_of`), and no load leaves the tile.
"""

import numpy as np

from fastloss._kernels import tiles
from fastloss._kernels._jit import allocating, inline, subroutine
from fastloss._kernels._simd import (
    fma,
    integer_like,
    lanes,
    load,
    load_columns,
    scalar,
    splat,
    store,
    where,
)
from fastloss._kernels._vecmath import exp, exp_difference
from fastloss._kernels.rows import BLOCK, CHUNK, finite_shift, merge

# Classes copied into the stage at a time: with float32, a cache line of each row.
BATCH = 16


@inline
def row_of(slot, n, n_lanes):
    return min(slot, n - n_lanes) if n >= n_lanes else slot


@inline
def is_direct(geometry, array, start, n, n_lanes):
    """Whether the tile's rows lie side by side in memory, and fill a vector."""
    length = geometry[tiles.HEADER + geometry[tiles.N_AXES] - 1]
    return tiles.inner_stride(geometry, array) == 1 and n >= n_lanes and start % length + n <= length


@inline
def _fits(offsets, n, reach, size):
    """Whether ``reach`` elements from each offset on lie within an array."""
    largest = np.int64(0)
    for i in range(n):
        largest = max(largest, offsets[i])
    return largest + reach <= size


@subroutine
def stage_classes(x, offsets, n, stride, low, high, width, stage, like):
    """Copy the classes ``low .. high`` of the tile's rows into ``stage``, class by class."""
    n_lanes = lanes(like)
    if stride == 1 and n >= n_lanes and _fits(offsets, n, low + (high - low + 3) // 4 * 4, len(x)):
        for slot in range(0, n, n_lanes):
            row = row_of(slot, n, n_lanes)
            for c in range(low, high, 4):
                columns = load_columns(x, offsets, row, c, like)
                at = (c - low) * width + row
                store(stage, at, columns[0])
                if c + 1 < high:
                    store(stage, at + width, columns[1])
                if c + 2 < high:
                    store(stage, at + 2 * width, columns[2])
                if c + 3 < high:
                    store(stage, at + 3 * width, columns[3])
    elif stride == 1:
        for i in range(n):
            offset = offsets[i] + low
            for c in range(high - low):
                stage[c * width + i] = x[offset + c]
    else:
        for c in range(high - low):
            shift = (low + c) * stride
            for i in range(n):
                stage[c * width + i] = x[offsets[i] + shift]


@inline
def _lane_of(c, low, high, n_classes, n_lanes):
    """The lane that class c is added to: as in :mod:`rows`, the classes of the tail go to the last lanes."""
    if c < low + (high - low) // n_lanes * n_lanes:
        return (c - low) % n_lanes
    return c - high + n_lanes if n_classes >= n_lanes else c


@inline
def _is_first(c, low, high, n_classes, n_lanes):
    """Whether class c is the first of its lane (then it is stored, not added)."""
    return c - low < n_lanes and (high - low >= n_lanes or n_classes < n_lanes)


@inline
def _clear(sums, count, width, like):
    zero = splat(scalar(0.0, like))
    for i in range(0, count * width, lanes(like)):
        store(sums, i, zero)


@inline
def _fold(sums, n_classes, n_slots, width, like):
    """Fold the lanes by halves onto lane 0, leaving out those that no class has reached."""
    n_lanes = lanes(like)
    used = min(n_lanes, n_classes)
    half = n_lanes // 2
    while half >= 1:
        for lane in range(used - half):
            for slot in range(0, n_slots, n_lanes):
                low = load(sums, lane * width + slot, like)
                store(sums, lane * width + slot, low + load(sums, (lane + half) * width + slot, like))
        used = min(used, half)
        half //= 2


@inline
def _add_block(totals, sums, n_slots):
    """Add the folded sums of a block, or the totals of a chunk, to float64 totals."""
    for slot in range(n_slots):
        totals[slot] += np.float64(sums[slot])


@allocating
def make_scratch(width, like):
    """Per-thread memory of both tile functions, in the dtype of ``like``: lanes, values and float64 values."""
    n_lanes = lanes(like[0])
    return (
        tiles.aligned(n_lanes * width, like),
        tiles.aligned(n_lanes * width, like),
        tiles.aligned(n_lanes * width, like),
        np.empty((4, width), like.dtype),
        np.empty((8, width), np.float64),
    )


@subroutine
def _target_block(x, offsets, n, low, high, n_classes, stride, direct, near, shifts, width, sums, stage):
    """The classes ``low .. high`` of :func:`target_tile`: their sums, folded, are left in the first lane."""
    like = shifts[0]
    n_lanes = lanes(like)
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    zero, integer = splat(scalar(0.0, like)), integer_like(0, like)
    if high - low < n_lanes <= n_classes:
        _clear(sums, n_lanes, width, like)
    for c in range(low, high):
        if not direct and (c - low) % BATCH == 0:
            stage_classes(x, offsets, n, stride, c, min(c + BATCH, high), width, stage, like)
        source = x if direct else stage
        at = offsets[0] + c * stride if direct else (c - low) % BATCH * width
        lane = _lane_of(c, low, high, n_classes, n_lanes) * width
        first = _is_first(c, low, high, n_classes, n_lanes)
        this_class = splat(integer_like(c, like))
        for slot in range(0, n_slots, n_lanes):
            row = row_of(slot, n, n_lanes)
            d = load(source, at + row, like) - load(shifts, row, like)
            e = where(load(near, row, integer) == this_class, zero, exp(d))
            store(sums, lane + slot, e if first else load(sums, lane + slot, like) + e)
    _fold(sums, n_classes, n_slots, width, like)


@inline
def _few_classes_tile(x, offsets, n, n_classes, stride, direct, near, shifts, width, rest, sums, stage):
    """The case of :func:`target_tile` where each class has its own lane: 16 rows at a time, summed in the cache."""
    like = shifts[0]
    n_lanes = lanes(like)
    zero, integer = splat(scalar(0.0, like)), integer_like(0, like)
    if not direct:
        stage_classes(x, offsets, n, stride, 0, n_classes, width, stage, like)
    source = x if direct else stage
    step = stride if direct else width
    for slot in range(0, n, n_lanes):
        row = row_of(slot, n, n_lanes)
        at = (offsets[0] if direct else 0) + row
        shift, target = load(shifts, row, like), load(near, row, integer)
        for c in range(n_classes):
            d = load(source, at + c * step, like) - shift
            store(sums, c * n_lanes, where(target == splat(integer_like(c, like)), zero, exp(d)))
        used, half = n_classes, n_lanes // 2
        while half >= 1:
            for lane in range(used - half):
                upper = load(sums, (lane + half) * n_lanes, like)
                store(sums, lane * n_lanes, load(sums, lane * n_lanes, like) + upper)
            used = min(used, half)
            half //= 2
        store(rest, row, load(sums, 0, like))


@inline
def target_tile(x, geometry, start, offsets, n, targets, near, shifts, rest, stage, scratch):
    """Of each row, sum exp(x[c] - shift) over all classes but the target."""
    like = shifts[0]
    n_lanes = lanes(like)
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    sums, _, _, _, wide = scratch
    width = wide.shape[1]
    total, chunk_total = wide[0], wide[1]
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    if n_classes <= n_lanes:
        _few_classes_tile(x, offsets, n, n_classes, stride, direct, near, shifts, width, rest, sums, stage)
        return
    total[:n_slots] = 0.0
    for chunk in range(0, n_classes, CHUNK):
        chunk_total[:n_slots] = 0.0
        for low in range(chunk, min(chunk + CHUNK, n_classes), BLOCK):
            high = min(low + BLOCK, n_classes)
            _target_block(x, offsets, n, low, high, n_classes, stride, direct, near, shifts, width, sums, stage)
            _add_block(chunk_total, sums, n_slots)
        _add_block(total, chunk_total, n_slots)
    for slot in range(0, n_slots, n_lanes):
        row = row_of(slot, n, n_lanes)
        for i in range(n_lanes):
            rest[row + i] = total[slot + i]


@inline
def max_shift_tile(
    x,
    geometry,
    start,
    offsets,
    n,
    y,
    y_offsets,
    weight,
    keep,
    spread,
    exact,
    largest,
    rest,
    moment,
    mass,
    stages,
    scratch,
):
    """Of each row, the maximum, the sum of exp(x - maximum) without the maximum's own 1, the moment and the mass; see
    :func:`fastloss._kernels.rows.max_shift_chunk`.

    Passes over memory: one over the tile; a block of its classes is read again from the second-level cache.
    """
    like = largest[0]
    n_lanes = lanes(like)
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    sums, moments, masses, narrow, wide = scratch
    width = wide.shape[1]
    ties, block_largest, chunk_largest, factor = narrow[0], narrow[1], narrow[2], narrow[3]
    chunk_rest, chunk_ties, chunk_moment, chunk_mass = wide[0], wide[1], wide[2], wide[3]
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    y_stride = tiles.class_stride(geometry, tiles.TARGET) if y is not None else stride
    y_direct = is_direct(geometry, tiles.TARGET, start, n, n_lanes) if y is not None else direct
    zero, one = splat(scalar(0.0, like)), splat(scalar(1.0, like))
    lowest = splat(scalar(-np.inf, like))
    for i in range(n):
        largest[i] = -np.inf
        rest[i] = 0.0
        moment[i] = 0.0
        mass[i] = 0.0
    for chunk in range(0, n_classes, CHUNK):
        for slot in range(n_slots):
            chunk_largest[slot] = -np.inf
            chunk_rest[slot] = 0.0
            chunk_ties[slot] = 0.0
            chunk_moment[slot] = 0.0
            chunk_mass[slot] = 0.0
        for low in range(chunk, min(chunk + CHUNK, n_classes), BLOCK):
            high = min(low + BLOCK, n_classes)
            for slot in range(0, n_slots, n_lanes):
                store(block_largest, slot, lowest)
                store(ties, slot, zero)
            for c in range(low, high):
                if not direct and (c - low) % BATCH == 0:
                    stage_classes(x, offsets, n, stride, c, min(c + BATCH, high), width, stages[0], like)
                source = x if direct else stages[0]
                at = offsets[0] + c * stride if direct else (c - low) % BATCH * width
                for slot in range(0, n_slots, n_lanes):
                    v = load(source, at + row_of(slot, n, n_lanes), like)
                    m = load(block_largest, slot, like)
                    store(block_largest, slot, where(v > m, v, m))
            for slot in range(0, n_slots, n_lanes):
                old = load(chunk_largest, slot, like)
                new = load(block_largest, slot, like)
                store(factor, slot, exp(old - new))
            for slot in range(n_slots):
                if block_largest[slot] > chunk_largest[slot]:
                    chunk_rest[slot] = (chunk_rest[slot] + chunk_ties[slot]) * np.float64(factor[slot])
                    chunk_ties[slot] = 0.0
                    grown = block_largest[slot] - finite_shift(chunk_largest[slot])
                    chunk_moment[slot] += np.float64(grown) * chunk_mass[slot]
                    chunk_largest[slot] = block_largest[slot]
            if high - low < n_lanes <= n_classes:
                _clear(sums, n_lanes, width, like)
                _clear(moments, n_lanes, width, like)
                _clear(masses, n_lanes, width, like)
            for c in range(low, high):
                if (c - low) % BATCH == 0:
                    if not direct:
                        stage_classes(x, offsets, n, stride, c, min(c + BATCH, high), width, stages[0], like)
                    if y is not None:  # noqa: SIM102 - Numba drops this branch at compile time only as it stands
                        if not y_direct:
                            stage_classes(y, y_offsets, n, y_stride, c, min(c + BATCH, high), width, stages[1], like)
                source = x if direct else stages[0]
                staged = (c - low) % BATCH * width
                at = offsets[0] + c * stride if direct else staged
                lane = _lane_of(c, low, high, n_classes, n_lanes) * width
                first = _is_first(c, low, high, n_classes, n_lanes)
                for slot in range(0, n_slots, n_lanes):
                    row = row_of(slot, n, n_lanes)
                    v = load(source, at + row, like)
                    shift = load(chunk_largest, slot, like)
                    shift = where(shift > lowest, shift, zero)
                    tie = v == shift
                    d = v - shift
                    e = where(tie, zero, exp_difference(v, shift) if exact else exp(d))
                    store(sums, lane + slot, e if first else load(sums, lane + slot, like) + e)
                    store(ties, slot, load(ties, slot, like) + where(tie, one, zero))
                    if weight is not None:
                        m = splat(weight[c])
                        if y is not None:
                            y_source = y if y_direct else stages[1]
                            y_at = y_offsets[0] + c * y_stride if y_direct else staged
                            m = m * fma(load(y_source, y_at + row, like), splat(keep), splat(spread))
                        before = zero if first else load(moments, lane + slot, like)
                        store(moments, lane + slot, fma(m, -d, before))
                        before = zero if first else load(masses, lane + slot, like)
                        store(masses, lane + slot, before + m)
            _fold(sums, n_classes, n_slots, width, like)
            _add_block(chunk_rest, sums, n_slots)
            _add_block(chunk_ties, ties, n_slots)
            if weight is not None:
                _fold(moments, n_classes, n_slots, width, like)
                _add_block(chunk_moment, moments, n_slots)
                _fold(masses, n_classes, n_slots, width, like)
                _add_block(chunk_mass, masses, n_slots)
        for slot in range(0, n_slots, n_lanes):
            row = row_of(slot, n, n_lanes)
            for i in range(max(0, slot - row), n_lanes):
                at = slot + i
                without_own = chunk_rest[at] + (chunk_ties[at] - 1.0 if chunk_largest[at] > -np.inf else 0.0)
                largest[row + i], rest[row + i], moment[row + i], mass[row + i] = merge(
                    largest[row + i], rest[row + i], moment[row + i], mass[row + i],
                    chunk_largest[at], without_own, chunk_moment[at], chunk_mass[at],
                )  # fmt: skip


@inline
def write_tile(x, geometry, start, offsets, n, out, out_offsets, shifts, scales, is_log, stage, out_stage):
    """Write exp(x - shift) * scale, or x - shift - scale, for each row of a tile."""
    like = shifts[0]
    n_lanes = lanes(like)
    n_classes = geometry[tiles.N_CLASSES]
    stride, out_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, tiles.SECOND)
    width = geometry[tiles.TILE_ROWS] + tiles.PADDING
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    out_direct = is_direct(geometry, tiles.SECOND, start, n, n_lanes)
    for low in range(0, n_classes, BATCH):
        high = min(low + BATCH, n_classes)
        if not direct:
            stage_classes(x, offsets, n, stride, low, high, width, stage, like)
        for c in range(low, high):
            source = x if direct else stage
            at = offsets[0] + c * stride if direct else (c - low) * width
            sink = out if out_direct else out_stage
            sink_at = out_offsets[0] + c * out_stride if out_direct else (c - low) * width
            for slot in range(0, n_slots, n_lanes):
                row = row_of(slot, n, n_lanes)
                v, shift, scale = load(source, at + row, like), load(shifts, row, like), load(scales, row, like)
                store(sink, sink_at + row, (v - shift) - scale if is_log else exp_difference(v, shift) * scale)
        if not out_direct:
            _unstage_classes(out_stage, out, out_offsets, n, out_stride, low, high, width)


@subroutine
def _unstage_classes(stage, out, offsets, n, stride, low, high, width):
    """The way back of :func:`stage_classes`."""
    if stride == 1:
        for i in range(n):
            offset = offsets[i] + low
            for c in range(high - low):
                out[offset + c] = stage[c * width + i]
    else:
        for c in range(high - low):
            shift = (low + c) * stride
            for i in range(n):
                out[offsets[i] + shift] = stage[c * width + i]
