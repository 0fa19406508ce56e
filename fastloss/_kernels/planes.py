"""Cross-entropy and log-sum-exp of a tile of rows at a time: for a strided class axis (segmentation), and few classes.

A vector holds one class of consecutive rows (pixels). Where these lie side by side in memory they are loaded from where
they are; otherwise a batch of classes is copied into a stage in the first-level cache, transposed. The arithmetic and
the order of addition are those of :mod:`fastloss._kernels.rows`, lane by lane, so the bits are the same.

Sums are kept by *slot*, inputs and results by row: where the rows do not fill the last vector, it is laid to end with
them, so its slots repeat rows of the vector before (:func:`row_of`), and no load leaves the tile.
"""

import numpy as np

from fastloss._kernels import tiles
from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels._memory import CACHE_LINE, IS_ZEN
from fastloss._kernels._simd import (
    any_lane,
    copy,
    first_lane,
    fma,
    integer_like,
    lanes,
    load,
    load_columns,
    load_integers,
    load_pairs,
    prefetch,
    prefetch_l2,
    scalar,
    splat,
    store,
    store_columns,
    where,
)
from fastloss._kernels._vecmath import exp, exp_falling, exp_falling_difference
from fastloss._kernels.driver import BATCH, BLOCK, CHUNK, GROUP, STAGED_ROWS, group_size, record_at
from fastloss._kernels.rows import (
    SLACK,
    add_term,
    close_segment,
    entry,
    find_scales,
    finite_shift,
    gather_targets,
    held_term,
    merge,
    put_record,
    rest_of_chunk,
    target_term,
    two_sum,
    whole_rest,
)

# A tile's rows of one class are a run of some hundred bytes, of which the CPU's own prefetcher learns too late: while a
# tile is read, the same classes of the next are asked for in the second-level cache, and where the terms are summed at
# once, this many classes ahead in the first (more would not fit into its sets, which planes that lie a power of two
# apart share). 16 x 150 x 128 x 128 takes 1.17 times as long with the latter alone, log-sum-exp of 1000 x 65,536 along
# axis 0 1.25 times.
AHEAD = 4

# Of more classes than a group has, the next tile would be asked for too early: its rows are asked for so many classes
# ahead. Log-sum-exp of 65,536 x 1000 along axis 0 takes 1.2 times as long without, and with 256.
AHEAD_OF_MANY = 64

# Classes that are searched for a maximum between a load and a store of the maxima so far.
SEARCHED = 4

# Classes of a lane that are added between a load and a store of its sum: log-sum-exp of 65,536 x 1000 along axis 0
# takes 1.08 times as long with one.
TOGETHER = 4

# How far ahead of rows of up to eight classes, which are read where they lie, memory is asked for, in bytes: 2 x 5 x 96
# x 128 x 128 takes 1.15 times as long without, and with 1024.
AHEAD_ROWS = 2048

# How many classes ahead of where some rows of few classes are copied theirs are asked for, and where. Planes that lie a
# power of two apart share eight lines of the second-level cache of AMD's Zen 4: 8 x 21 x 512 x 512 takes 1.3 times as
# long there if they are asked for as on an Intel Xeon.
AHEAD_CLASSES = 16 if IS_ZEN else 4
ask_for_class = prefetch if IS_ZEN else prefetch_l2

# Planes so many bytes apart, or a multiple of it, share a few sets of the first-level cache. Others of few classes are
# read where they lie on AMD's Zen, where to copy them shows: 8 x 21 x 500 x 500 takes 1.5 times as long on Zen 4.
PAGE = 4096

# How many bytes ahead contiguous rows of few classes are asked for, in the second-level cache. The CPU's own prefetcher
# falls behind: without, 5,000,000 x 2 takes 1.4 times as long, 1,000,000 x 10 and 8 x 512 x 512 x 21 1.3 times.
AHEAD_CONTIGUOUS = 16384


# Classes of a piece of a tile whose rows are long.
PIECE = CHUNK


@inline
def row_of(slot, n, n_lanes):
    return min(slot, n - n_lanes) if n >= n_lanes else slot


@inline
def is_direct(geometry, array, start, n, n_lanes):
    """Whether the tile's rows lie side by side in memory, and fill a vector."""
    return n >= n_lanes and tiles.is_dense(geometry, array, 1, start, n)


@inline
def _fits(offsets, n, reach, size):
    """Whether ``reach`` elements from each offset on lie within an array, for ``n`` rows, at least a vector."""
    n_lanes = lanes(0.0)
    last, outside = splat(size - reach), splat(0) != splat(0)
    for slot in range(0, n, n_lanes):
        i = min(slot, n - n_lanes)
        outside = outside | (load_integers(offsets, 8 * i, np.int64(0)) > last)
    return not any_lane(outside)


@inline
def _follow_on(offsets, n, step):
    """Whether ``n`` rows, at least a vector, lie ``step`` apart."""
    n_lanes = lanes(0.0)
    expected, outside = tiles.lane_steps(step) + splat(offsets[0]), splat(0) != splat(0)
    for slot in range(0, n, n_lanes):
        i = min(slot, n - n_lanes)
        outside = outside | (load_integers(offsets, 8 * i, np.int64(0)) != expected + splat(i * step))
    return not any_lane(outside)


@subroutine
def stage_classes(x, offsets, n, stride, low, high, width, stage, like):
    """Copy the classes ``low .. high`` of the tile's rows into ``stage``, class by class."""
    n_lanes = lanes(like)
    if stride == 1 and n >= n_lanes and low == 0 and high == 2 and _follow_on(offsets, n, 2):
        for slot in range(0, n, n_lanes):
            row = row_of(slot, n, n_lanes)
            pair = load_pairs(x, offsets[row], like)
            store(stage, row, pair[0])
            store(stage, width + row, pair[1])
    elif stride == 1 and n >= n_lanes and _fits(offsets, n, low + (high - low + 3) // 4 * 4, len(x)):
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


@subroutine
def unstage_classes(stage, out, offsets, n, stride, low, high, width, like):
    """The way back of :func:`stage_classes`."""
    n_lanes = lanes(like)
    if stride == 1 and n >= n_lanes and high - low >= 4:
        for slot in range(0, n, n_lanes):
            row = row_of(slot, n, n_lanes)
            for c in range(low, high, 4):
                begin = min(c, high - 4)
                at = (begin - low) * width + row
                store_columns(
                    out, offsets, row, begin,
                    load(stage, at, like), load(stage, at + width, like),
                    load(stage, at + 2 * width, like), load(stage, at + 3 * width, like),
                )  # fmt: skip
    elif stride == 1:
        for i in range(n):
            offset = offsets[i] + low
            for c in range(high - low):
                out[offset + c] = stage[c * width + i]
    else:
        for c in range(high - low):
            shift = (low + c) * stride
            for i in range(n):
                out[offsets[i] + shift] = stage[c * width + i]


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
def _fill(values, n, value):
    for i in range(0, n, lanes(first_lane(value))):
        store(values, i, value)


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


def _make_folded(step, part):
    @inline
    def folded(sums, at, used, like, lane):
        total = part(sums, at, used, like, lane)
        if lane + step < used:
            total = total + part(sums, at, used, like, lane + step)
        return total

    return folded


@inline
def _one_lane(sums, at, used, like, lane):
    return load(sums, lane * lanes(sums[0]) + at, like)


_folded = _one_lane
for _step in (8, 4, 2, 1):
    _folded = _make_folded(np.int64(_step), _folded)


@inline
def _fold_vector(sums, at, n_classes, like):
    """:func:`_fold` of a vector of rows, from row ``at`` on, in the type of ``like``. Through registers: log-sum-exp of
    10 classes side by side takes 1.06 times as long otherwise.
    """
    return _folded(sums, at, min(lanes(sums[0]), n_classes), like, np.int64(0))


@inline
def _put_folded(sums, n_classes, exact, totals, like):
    """The folded sums of a vector of rows, in float64: folded so if ``exact``."""
    if exact:
        for i in range(0, lanes(like), lanes(0.0)):
            store(totals, i, _fold_vector(sums, i, n_classes, 0.0))
    else:
        store(sums, 0, _fold_vector(sums, 0, n_classes, like))
        for i in range(0, lanes(like), lanes(0.0)):
            store(totals, i, load(sums, i, 0.0))


@inline
def _add_block(totals, sums, n_slots):
    """Add the folded sums of a block, or the totals of a chunk, to float64 totals."""
    for slot in range(0, n_slots, lanes(0.0)):
        store(totals, slot, load(totals, slot, 0.0) + load(sums, slot, 0.0))


@inline
def _add_rests(rest, rest_low, sums, n_slots):
    """:func:`_add_block`, with what the additions lose."""
    for slot in range(0, n_slots, lanes(0.0)):
        total, lost = two_sum(load(rest, slot, 0.0), load(sums, slot, 0.0))
        store(rest, slot, total)
        store(rest_low, slot, load(rest_low, slot, 0.0) + lost)


@inline
def _ask_ahead(x, at, stride, n, n_classes, n_slots, n_lanes):
    """Ask for what is read after the tile's rows of a class, from ``at`` on, in the second-level cache."""
    ahead = at + (n if n_classes <= GROUP else AHEAD_OF_MANY * stride)
    for slot in range(0, n_slots, n_lanes):
        prefetch_l2(x, ahead + slot, 0)


@subroutine
def _target_block(x, offsets, n, low, high, n_classes, stride, direct, near, shifts, width, sums, stage, kept):
    """The classes ``low .. high`` of :func:`target_tile`: their sums, folded, are left in the first lane."""
    like = shifts[0]
    n_lanes = lanes(like)
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    zero, integer = splat(scalar(0.0, like)), integer_like(0, like)
    if high - low < n_lanes <= n_classes:
        _fill(sums, n_lanes * width, zero)
    for c in range(low, high):
        if not direct and (c - low) % BATCH == 0:
            stage_classes(x, offsets, n, stride, c, min(c + BATCH, high), width, stage, like)
        source = x if direct else stage
        at = offsets[0] + c * stride if direct else (c - low) % BATCH * width
        lane = _lane_of(c, low, high, n_classes, n_lanes) * width
        first = _is_first(c, low, high, n_classes, n_lanes)
        this_class = splat(integer_like(c, like))
        if direct:
            _ask_ahead(x, at, stride, n, n_classes, n_slots, n_lanes)
            for slot in range(0, n_slots, n_lanes):
                prefetch(x, at + AHEAD * stride + slot, 0)
        for slot in range(0, n_slots, n_lanes):
            row = row_of(slot, n, n_lanes)
            shift = load(shifts, row, like)
            e = target_term(load(source, at + row, like), shift, kept, (c - low) * width + row)
            e = where(load(near, row, integer) == this_class, zero, e)
            store(sums, lane + slot, e if first else load(sums, lane + slot, like) + e)
    _fold(sums, n_classes, n_slots, width, like)


@inline
def _one_term(source, at, step, c, shift, target, kept, kept_at, kept_step):
    """exp(x - shift) of class c for a vector of rows, 0 for those whose target it is."""
    like = first_lane(shift)
    e = target_term(load(source, at + c * step, like), shift, kept, kept_at + c * kept_step)
    return where(target == splat(integer_like(c, like)), splat(scalar(0.0, like)), e)


@inline
def _lane_terms(source, at, step, lane, n_classes, n_lanes, shift, target, kept, kept_at, kept_step):
    """The sum of the one or two classes of a lane; see :func:`_lane_of`."""
    total = _one_term(source, at, step, lane, shift, target, kept, kept_at, kept_step)
    if lane + n_classes >= 2 * n_lanes:
        total = total + _one_term(source, at, step, lane + n_classes - n_lanes, shift, target, kept, kept_at, kept_step)
    return total


@inline
def _four_lanes(source, at, step, lane, quarter, n_classes, shift, target, kept, kept_at, kept_step):
    """The sum, by halves, of those of the lanes lane, lane + quarter, ... that have a class."""
    n_lanes = 4 * quarter
    total = _lane_terms(source, at, step, lane, n_classes, n_lanes, shift, target, kept, kept_at, kept_step)
    if lane + 2 * quarter < n_classes:
        total = total + _lane_terms(
            source, at, step, lane + 2 * quarter, n_classes, n_lanes, shift, target, kept, kept_at, kept_step
        )
    if lane + quarter < n_classes:
        other = _lane_terms(
            source, at, step, lane + quarter, n_classes, n_lanes, shift, target, kept, kept_at, kept_step
        )
        if lane + 3 * quarter < n_classes:
            other = other + _lane_terms(
                source, at, step, lane + 3 * quarter, n_classes, n_lanes, shift, target, kept, kept_at, kept_step
            )
        total = total + other
    return total


@inline
def _select_logit(source, at, step, n_classes, target, like):
    """The logits of the targets (of class 0 where there is none) of a vector of rows."""
    logit = load(source, at, like)
    for c in range(1, n_classes):
        logit = where(target == splat(integer_like(c, like)), load(source, at + c * step, like), logit)
    return logit


@inline
def _copy_rows(x, origin, next_origin, n_classes, stride, done, end, staged_rows, width, stage, like):
    """Copy the classes ``done .. end`` of some rows that lie side by side from ``origin`` on into ``stage``; after the
    last class, those from ``next_origin`` on are asked for.
    """
    n_lanes = lanes(like)
    for c in range(done, end):
        ahead = c + min(AHEAD_CLASSES, n_classes)
        ahead = origin + ahead * stride if ahead < n_classes else next_origin + (ahead - n_classes) * stride
        for slot in range(0, staged_rows, n_lanes):
            row = row_of(slot, staged_rows, n_lanes)
            ask_for_class(x, ahead + row, 0)
            copy(stage, c * width + row, x, origin + c * stride + row, like)


@inline
def _are_few(geometry, like):
    """Whether a lane has at most two classes."""
    return geometry[tiles.N_CLASSES] <= 2 * lanes(like)


def _make_few_classes(do_vector, end_rows):
    """A function that goes through the rows of a tile where a lane has at most two classes: ``do_vector`` sees a vector
    of rows at a time, ``end_rows`` each run of :data:`STAGED_ROWS` after that, with ``output`` as well. Both get the
    classes of the run's rows in ``source``, from ``origin`` on, ``step`` apart, the number ``begin`` of its first row
    in the tile, and ``args``.

    Some rows at a time go through the stage, which then stays in the first-level cache: planes that lie a power of two
    apart share its sets, and a vector that straddles two of its lines would be fetched twice. Where rows lie side by
    side, the next ones are copied while these are summed (8 x 21 x 512 x 512 takes 1.3 times as long one after the
    other). Very few classes are read where they lie, and on some CPUs others, see :data:`PAGE`.
    """

    @subroutine
    def do_tile(x, offsets, n, n_classes, stride, direct, stage, like, args, output):
        n_lanes = lanes(like)
        in_place = direct and (n_classes <= n_lanes // 2 or (IS_ZEN and stride * x.itemsize % PAGE != 0))
        is_copied = direct and not in_place
        staged_rows, width = min(STAGED_ROWS, n), _staged_width(n, like)
        next_stage = stage[len(stage) // 2 :]
        if is_copied:
            next_at = offsets[min(staged_rows, n - staged_rows)]
            _copy_rows(x, offsets[0], next_at, n_classes, stride, 0, n_classes, staged_rows, width, next_stage, like)
        for first in range(0, n, staged_rows):
            begin = min(first, n - staged_rows)
            next_begin = min(first + staged_rows, n - staged_rows)
            # (After the last rows of a tile those of the next follow.)
            next_at, after_next = offsets[next_begin], offsets[next_begin] + staged_rows
            done = np.int64(0) if is_copied and first + staged_rows < n else n_classes
            if is_copied:
                stage, next_stage = next_stage, stage
            elif not direct:
                for line in range(0, staged_rows * n_classes * x.itemsize, CACHE_LINE):
                    prefetch_l2(x, offsets[begin], line + AHEAD_CONTIGUOUS)
                stage_classes(x, offsets[begin:], staged_rows, stride, 0, n_classes, width, stage, like)
            source = x if in_place else stage
            origin = offsets[begin] if in_place else np.int64(0)
            step = stride if in_place else width
            for slot in range(0, staged_rows, n_lanes):
                if done < n_classes:
                    share = min(n_classes * (slot + n_lanes) // staged_rows, n_classes)
                    _copy_rows(
                        x, next_at, after_next, n_classes, stride, done, share, staged_rows, width, next_stage, like
                    )
                    done = share
                row = row_of(slot, staged_rows, n_lanes)
                if in_place:
                    for c in range(n_classes):
                        prefetch_l2(x, origin + row + c * stride, AHEAD_ROWS)
                do_vector(source, origin, step, n_classes, begin, row, args)
            end_rows(source, origin, step, n_classes, begin, staged_rows, args, output)

    return do_tile


@inline
def _staged_width(n, like):
    """How far apart classes lie in the stage of :func:`_make_few_classes`."""
    return (min(STAGED_ROWS, n) + lanes(like) - 1) // lanes(like) * lanes(like) + tiles.PADDING


@inline
def _target_vector(source, origin, step, n_classes, begin, row, args):
    """:func:`target_tile` of a vector of rows, summed in registers, in the order of the fold."""
    near, shifts, rest, kept, kept_step = args
    like = shifts[0]
    n_lanes = lanes(like)
    quarter, integer = n_lanes // 4, integer_like(0, like)
    at, place = origin + row, begin + row
    target = load(near, place, integer)
    if kept is None and n_classes == 2:
        # The other class is the only one that is summed.
        first_class, second_class = load(source, at, like), load(source, at + step, like)
        is_first = target == splat(integer)
        shift = where(is_first, first_class, second_class)
        store(shifts, place, shift)
        store(rest, place, exp(where(is_first, second_class, first_class) - shift))
        return
    shift = _select_logit(source, at, step, n_classes, target, like)
    store(shifts, place, shift)
    total = _four_lanes(source, at, step, 0, quarter, n_classes, shift, target, kept, place, kept_step)
    if quarter == 4 and n_classes > 2:
        total = total + _four_lanes(source, at, step, 2, quarter, n_classes, shift, target, kept, place, kept_step)
    if n_classes > 1:
        other = _four_lanes(source, at, step, 1, quarter, n_classes, shift, target, kept, place, kept_step)
        if quarter == 4 and n_classes > 3:
            other = other + _four_lanes(source, at, step, 3, quarter, n_classes, shift, target, kept, place, kept_step)
        total = total + other
    store(rest, place, total)


@inline
def _nothing_more(source, origin, step, n_classes, begin, n, args, output):
    pass


_target_of_few = _make_few_classes(_target_vector, _nothing_more)


@inline
def target_tile(x, geometry, start, offsets, n, targets, shifts, rest, scratch, kept, kept_offsets, kept_stride):
    """Of each row, sum exp(x[c] - shift) over all classes but the target, whose logit is the shift.

    The terms, the target's own included, are kept if ``kept`` is an array: as many classes as a block has in
    ``scratch.kept``, more of them in ``kept``.
    """
    like = shifts[0]
    n_lanes, n_doubles = lanes(like), lanes(0.0)
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    width = tiles.scratch_width(geometry)
    stage, near = scratch.stage, scratch.near
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    if _are_few(geometry, like):
        if kept is None:
            args = near, shifts, rest, None, width
            _target_of_few(x, offsets, n, n_classes, stride, direct, stage, like, args, None)
        else:
            kept_args = near, shifts, rest, scratch.kept, width
            _target_of_few(x, offsets, n, n_classes, stride, direct, stage, like, kept_args, None)
        return
    gather_targets(x, offsets, stride, n, targets, shifts)
    total = _target_classes(
        x, geometry, start, offsets, n, 0, n_classes, shifts, scratch, kept, kept_offsets, kept_stride
    )
    for slot in range(0, n_slots, n_lanes):
        row = row_of(slot, n, n_lanes)
        for i in range(0, n_lanes, n_doubles):
            store(rest, row + i, load(total, slot + i, 0.0))


@inline
def _target_classes(x, geometry, start, offsets, n, begin, end, shifts, scratch, kept, kept_offsets, kept_stride):
    """:func:`target_tile` of the classes ``begin .. end``, whole chunks, of more than two to a lane; the sums in
    float64, by slot.
    """
    like = shifts[0]
    n_lanes = lanes(like)
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    width = tiles.scratch_width(geometry)
    sums, stage, near = scratch.sums[0], scratch.stage, scratch.near
    total, chunk_total = scratch.wide[0], scratch.wide[1]
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    total[:n_slots] = 0.0
    for chunk in range(begin, end, CHUNK):
        chunk_total[:n_slots] = 0.0
        for low in range(chunk, min(chunk + CHUNK, end), BLOCK):
            high = min(low + BLOCK, end)
            if kept is None:
                _target_block(
                    x, offsets, n, low, high, n_classes, stride, direct, near, shifts, width, sums, stage, None
                )
            else:
                _target_block(
                    x, offsets, n, low, high, n_classes, stride, direct, near, shifts, width, sums, stage, scratch.kept
                )
                if n_classes > BLOCK:
                    unstage_classes(scratch.kept, kept, kept_offsets, n, kept_stride, low, high, width, like)
            _add_block(chunk_total, sums, n_slots)
        _add_block(total, chunk_total, n_slots)
    return total


@inline
def target_pieces(x, geometry, start, offsets, n, begin, end, targets, shifts, scratch):
    """The sums of :func:`target_tile` over a chunk of the classes, ``begin .. end``, into the records."""
    n_lanes = lanes(shifts[0])
    gather_targets(x, offsets, tiles.class_stride(geometry, tiles.INPUT), n, targets, shifts)
    total = _target_classes(x, geometry, start, offsets, n, begin, end, shifts, scratch, None, offsets, 0)
    for slot in range(0, n, n_lanes):
        row = row_of(slot, n, n_lanes)
        for i in range(row, min(row + n_lanes, n)):
            scratch.records[record_at(geometry, start + i, begin, 1)] = total[slot + i - row]


@subroutine
def _search_group(
    x, offsets, n, low, high, n_classes, stride, direct, width, stage, slot_step, class_step, group_largest
):
    """Copy the classes ``low .. high`` of the tile's rows into ``stage``, and find the largest of each row (by slot),
    but for NaN.
    """
    like = group_largest[0]
    n_lanes = lanes(like)
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    for slot in range(0, n_slots, n_lanes):
        store(group_largest, slot, splat(scalar(-np.inf, like)))
    for first in range(low, high, SEARCHED):
        last = min(first + SEARCHED, high)
        if direct:
            for c in range(first, last):
                _ask_ahead(x, offsets[0] + c * stride, stride, n, n_classes, n_slots, n_lanes)
        elif (first - low) % BATCH == 0:
            stage_classes(
                x, offsets, n, stride, first, min(first + BATCH, high), width, stage[(first - low) * width :], like
            )
        for slot in range(0, n_slots, n_lanes):
            row = row_of(slot, n, n_lanes)
            largest = load(group_largest, slot, like)
            for c in range(first, last):
                staged = (slot * slot_step if direct else row) + (c - low) * class_step
                at = offsets[0] + c * stride + row
                v = copy(stage, staged, x, at, like) if direct else load(stage, staged, like)
                largest = where(v > largest, v, largest)
            store(group_largest, slot, largest)


@inline
def _stage_block(y, offsets, n, low, high, stride, direct, width, stage, like):
    """Copy the classes ``low .. high`` of another array into ``stage``."""
    n_lanes = lanes(like)
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    if direct:
        for c in range(low, high):
            for slot in range(0, n_slots, n_lanes):
                row = row_of(slot, n, n_lanes)
                copy(stage, (c - low) * width + row, y, offsets[0] + c * stride + row, like)
    else:
        for c in range(low, high, BATCH):
            stage_classes(y, offsets, n, stride, c, min(c + BATCH, high), width, stage[(c - low) * width :], like)


@inline
def _copy_ahead(x, origin, stride, n, n_slots, place, end, count, stage, staged, slot_step, largest):
    """Copy a batch of classes of a vector of rows into ``stage``, class c to ``staged`` + c vectors, and take it into
    the ``largest``, but for NaN; this ``count`` times, up to class ``end``. ``place`` is the class and the slot
    to begin with; returns those that follow.

    So many classes at a time, for the stage to be written in runs of whole lines as well (4 classes: label
    smoothing of 4 x 20,000 x 256 takes 1.09 times as long).
    """
    like = largest[0]
    n_lanes = lanes(like)
    c, slot = place
    for _ in range(count):
        if c < end:
            row = row_of(slot, n, n_lanes)
            at, to = origin + c * stride + row, slot * slot_step + staged + c * n_lanes
            slot_largest = load(largest, slot, like)
            for k in range(BATCH if c + BATCH <= end else end - c):
                prefetch_l2(x, at + (k + AHEAD_OF_MANY) * stride, 0)
                v = copy(stage, to + k * n_lanes, x, at + k * stride, like)
                slot_largest = where(v > slot_largest, v, slot_largest)
            store(largest, slot, slot_largest)
            slot += n_lanes
            if slot >= n_slots:
                c, slot = c + BATCH, np.int64(0)
    return c, slot


@inline
def _max_shift_term(
    stage, at, shift, y_stage, y_at, weight, c, keep, spread, exact, kept, total, low, ties, moment, mass
):  # fmt: skip
    """Add class c of a vector of rows to the sums of its lane, and take it off the ``ties`` if it is none; see
    :func:`fastloss._kernels.rows._max_shift_block`. What is kept lies as ``y_stage``.
    """
    like = first_lane(shift)
    v = load(stage, at, like)
    differs = v != shift
    d = v - shift
    e = exp_falling_difference(v, shift) if exact else exp_falling(d)
    if kept is not None:
        store(kept, y_at, e)
    total, low = add_term(e, differs, exact, total, low)
    ties = where(differs, ties - splat(scalar(1.0, like)), ties)
    if weight is not None:
        m = splat(weight[c])
        if y_stage is not None:
            m = m * fma(load(y_stage, y_at, like), splat(keep), splat(spread))
        moment = fma(m, -d, moment)
        mass = mass + m
    return total, low, ties, moment, mass


@inline
def _max_shift_lane(
    stage, staged, class_step, shift, y_stage, y_staged, width, weight, keep, spread, exact, kept,
    lane, group, low, high, n_classes, ties,
):  # fmt: skip
    """The sums of a lane of the block ``low .. high`` for a vector of rows; see :func:`_lane_of`."""
    like = first_lane(shift)
    n_lanes = lanes(like)
    zero = splat(scalar(0.0, like))
    total, total_low, moment, mass = zero, zero, zero, zero
    is_short = n_classes < n_lanes
    end = low + (high - low) // n_lanes * n_lanes
    for c in range(low + lane, high if is_short else end, n_lanes):
        total, total_low, ties, moment, mass = _max_shift_term(
            stage, staged + (c - group) * class_step, shift, y_stage, (c - low) * width + y_staged, weight, c,
            keep, spread, exact, kept, total, total_low, ties, moment, mass,
        )  # fmt: skip
    c = high - n_lanes + lane
    if c >= end and not is_short:
        total, total_low, ties, moment, mass = _max_shift_term(
            stage, staged + (c - group) * class_step, shift, y_stage, (c - low) * width + y_staged, weight, c,
            keep, spread, exact, kept, total, total_low, ties, moment, mass,
        )  # fmt: skip
    return total + total_low, ties, moment, mass


@inline
def _rest_of_one_group(found, found_at, sums, sums_low, ties, slot, rest, lost, row):
    """:func:`fastloss._kernels.rows.whole_rest` of a vector of rows, each of one group. ``sums`` may be all, without
    ``sums_low``, and the sum rounded, without ``lost``.
    """
    one, zero = splat(1.0), splat(0.0)
    for i in range(0, lanes(found[0]), lanes(0.0)):
        own = where(load(found, found_at + i, 0.0) > splat(-np.inf), one, zero)
        total, low = two_sum(load(sums, slot + i, 0.0), load(ties, slot + i, 0.0) - own)
        if sums_low is not None:
            total, low = two_sum(total, load(sums_low, slot + i, 0.0) + low)
        if lost is not None:
            store(lost, row + i, low)
        store(rest, row + i, total)


@inline
def _largest_vector(source, origin, step, n_classes, begin, row, args):
    """:func:`max_shift_tile` of a vector of rows, without moments; the exponentials are kept, if ``kept`` is an array,
    as in the stage of the rows.
    """
    largest, rest, lost, sums, ties, exact, kept, width = args
    like = largest[0]
    n_lanes = lanes(like)
    at, place = origin + row, begin + row
    found = splat(scalar(-np.inf, like))
    for c in range(n_classes):
        v = load(source, at + c * step, like)
        found = where(v > found, v, found)
    store(largest, place, found)
    shift = _finite_shifts(largest, place, like)
    n_ties = splat(scalar(n_classes, like))
    for lane in range(min(n_lanes, n_classes)):
        total, n_ties, _, _ = _max_shift_lane(
            source, at, step, shift, None, row, width, None, like, like, exact, kept, lane, 0, 0, n_classes, n_classes,
            n_ties,
        )  # fmt: skip
        store(sums, lane * n_lanes, total)
    store(ties, 0, n_ties)
    _put_folded(sums, n_classes, exact, rest[place:], like)
    _rest_of_one_group(largest, place, rest[place:], None, ties, 0, rest, lost, place)


@inline
def _write_few(source, origin, step, n_classes, begin, n, args, output):
    """Write :func:`fastloss._kernels.rows.entry` of some rows, from what :func:`_largest_vector` has left."""
    largest, rest, lost, _, _, _, kept, width = args
    scales, lows, out, out_offsets, out_stride, out_direct, is_log = output
    like = largest[0]
    n_lanes = lanes(like)
    find_scales(largest, rest, lost, scales, lows, begin, n, is_log)
    for c in range(n_classes):
        for slot in range(0, n, n_lanes):
            # (What is scaled where it is kept must not be so twice.)
            row = row_of(slot, n, n_lanes) if out_direct or is_log else slot
            scale, scale_low = load(scales, begin + row, like), load(lows, begin + row, like)
            if is_log:
                v = load(source, origin + c * step + row, like)
                value = entry(v, load(largest, begin + row, like), scale, scale_low, True)
            else:
                value = entry(load(kept, c * width + row, like), None, scale, scale_low, False)
            if out_direct:
                store(out, out_offsets[begin] + c * out_stride + row, value)
            else:
                store(kept, c * width + row, value)
    if not out_direct:
        unstage_classes(kept, out, out_offsets[begin:], n, out_stride, 0, n_classes, width, like)


_largest_of_few = _make_few_classes(_largest_vector, _nothing_more)
_softmax_of_few = _make_few_classes(_largest_vector, _write_few)


@inline
def _few_largest(x, geometry, start, offsets, n, largest, rest, scratch):
    """:func:`max_shift_tile` of the logits alone of few classes; what is ``exact`` has :func:`scaled_tile`."""
    like = largest[0]
    direct = is_direct(geometry, tiles.INPUT, start, n, lanes(like))
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    args = largest, rest, None, scratch.sums[0], scratch.sums[1], False, None, _staged_width(n, like)
    _largest_of_few(x, offsets, n, n_classes, stride, direct, scratch.stage, like, args, None)


@inline
def can_scale(geometry, like):
    """Whether :func:`scaled_tile` serves."""
    return _are_few(geometry, like)


@inline
def scaled_tile(x, geometry, start, offsets, n, out, out_offsets, scratch):
    """Write the softmax, or its logarithm, of each row of a tile, of few classes: some rows at a time, from the
    first-level cache. (Of the tile's statistics first, then its entries, softmax of 3 x 1,000,000 along axis 0 takes
    2.3 times as long, of 1,000,000 x 10 1.2 times.)
    """
    largest, scales, lows = scratch.narrow[0], scratch.narrow[1], scratch.narrow[2]
    rest, lost = scratch.wide[4], scratch.wide[9]
    like = largest[0]
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    out_stride = tiles.class_stride(geometry, tiles.SECOND)
    direct = is_direct(geometry, tiles.INPUT, start, n, lanes(like))
    out_direct = is_direct(geometry, tiles.SECOND, start, n, lanes(like))
    args = largest, rest, lost, scratch.sums[0], scratch.sums[1], True, scratch.kept, _staged_width(n, like)
    output = scales, lows, out, out_offsets, out_stride, out_direct, geometry[tiles.IS_LOG] != 0
    _softmax_of_few(x, offsets, n, n_classes, stride, direct, scratch.stage, like, args, output)


@inline
def max_shift_tile(
    x, geometry, start, offsets, n, y, y_offsets, weight, keep, spread, exact, largest, rest, lost, moment, mass,
    scratch,
):  # fmt: skip
    """Of each row, the maximum, the sum of exp(x - maximum) without the maximum's own 1, what its rounding has lost
    (not of few classes that are not ``exact``), the moment and the mass; see
    :func:`fastloss._kernels.rows._max_shift_row`.
    """
    if weight is None and not exact and _are_few(geometry, largest[0]):
        _few_largest(x, geometry, start, offsets, n, largest, rest, scratch)
        return
    _max_shift_classes(
        x, geometry, start, offsets, n, 0, geometry[tiles.N_CLASSES], y, y_offsets, weight, keep, spread, exact,
        largest, rest, lost, moment, mass, scratch,
    )  # fmt: skip


@inline
def max_shift_pieces(
    x, geometry, start, offsets, n, begin, end, y, y_offsets, weight, keep, spread, exact, like, scratch
):
    """:func:`max_shift_tile` of a chunk of the classes, ``begin .. end``, into the records."""
    largest, rest, lost = scratch.narrow[0], scratch.wide[4], scratch.wide[9]
    moment, mass = scratch.wide[5], scratch.wide[6]
    _max_shift_classes(
        x, geometry, start, offsets, n, begin, end, y, y_offsets, weight, keep, spread, exact,
        largest, rest, lost, moment, mass, scratch,
    )  # fmt: skip
    for i in range(n):
        put_record(scratch, geometry, start + i, begin, largest[i], rest[i], lost[i], moment[i], mass[i])


@inline
def _max_shift_classes(
    x, geometry, start, offsets, n, begin, end, y, y_offsets, weight, keep, spread, exact, largest, rest, lost, moment,
    mass, scratch,
):  # fmt: skip
    """:func:`max_shift_tile` of the classes ``begin .. end``, whole chunks.

    Passes over memory: one, which finds the maxima of a group of classes and leaves a copy of it in the second-level
    cache (where the planes themselves, a power of two apart, would share a few of its sets). The copy is summed a
    vector of rows and a lane at a time, so that the sums stay in registers. Meanwhile the next group is searched and
    copied: waiting for memory takes turns with arithmetic (label smoothing of 4 x 20,000 x 256 takes 1.25 times as long
    one after the other). For log-sum-exp of more than a group see :func:`_many_classes`.
    """
    if weight is None and geometry[tiles.N_CLASSES] > GROUP and not exact:
        _many_classes(x, geometry, start, offsets, n, begin, end, largest, rest, lost, scratch)
        return
    like = largest[0]
    n_lanes = lanes(like)
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    width = tiles.scratch_width(geometry)
    stage, y_stage = scratch.stage, scratch.other_stage
    other_stage = stage[len(stage) // 2 // n_lanes * n_lanes :]
    sums, moments, masses = scratch.sums[0], scratch.sums[1], scratch.sums[2]
    narrow, wide = scratch.narrow, scratch.wide
    base, next_largest, ties = narrow[2], narrow[3], narrow[4]
    group_largest, chunk_largest, shifts = narrow[5], narrow[6], narrow[7]
    chunk_rest, chunk_ties, chunk_moment, chunk_mass = wide[0], wide[1], wide[2], wide[3]
    rest_low, older, older_low, block_total = wide[8], wide[7], wide[10], wide[11]
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    size = group_size(n_classes)
    # Rows that lie side by side are staged slot by slot, a class behind the other, else class by class.
    slot_step, class_step = min(size, n_classes) + 1, np.int64(n_lanes) if direct else width
    y_stride = tiles.class_stride(geometry, tiles.TARGET) if y is not None else stride
    y_direct = is_direct(geometry, tiles.TARGET, start, n, n_lanes) if y is not None else direct
    is_known = False
    asks = stride == 1 and n_classes <= BLOCK
    zero = splat(scalar(0.0, like))
    lowest, none = splat(scalar(-np.inf, like)), splat(0.0)
    _fill(largest, n_slots, lowest)
    _fill(rest, n_slots, none)
    _fill(lost, n_slots, none)
    _fill(moment, n_slots, none)
    _fill(mass, n_slots, none)
    for chunk in range(begin, end, CHUNK):
        _fill(chunk_largest, n_slots, lowest)
        _fill(base, n_slots, lowest)
        _fill(older, n_slots, none)
        _fill(older_low, n_slots, none)
        _fill(chunk_rest, n_slots, none)
        _fill(rest_low, n_slots, none)
        _fill(chunk_ties, n_slots, none)
        _fill(chunk_moment, n_slots, none)
        _fill(chunk_mass, n_slots, none)
        chunk_end = min(chunk + CHUNK, end)
        for group in range(chunk, chunk_end, size):
            group_end = min(group + size, chunk_end)
            if is_known:
                stage, other_stage = other_stage, stage
                group_largest, next_largest = next_largest, group_largest
            else:
                _search_group(
                    x, offsets, n, group, group_end, n_classes, stride, direct, width, stage, slot_step, class_step,
                    group_largest,
                )  # fmt: skip
            is_known = direct and group_end < end
            ahead, ahead_end = (group_end, np.int64(0)), min(group_end + size, end) if is_known else np.int64(0)
            for slot in range(0, n_slots, n_lanes):
                store(next_largest, slot, lowest)
                store(ties, slot, splat(scalar(group_end - group, like)))
            for first in range(0, n_slots, n_lanes):
                if group == chunk:
                    store(chunk_largest, first, load(group_largest, first, like))
                    continue
                for slot in range(first, first + n_lanes):
                    if group_largest[slot] > chunk_largest[slot]:
                        if chunk_largest[slot] > -np.inf:
                            base[slot], older[slot], older_low[slot] = close_segment(
                                chunk_largest[slot], chunk_rest[slot], rest_low[slot], chunk_ties[slot],
                                base[slot], older[slot], older_low[slot],
                            )  # fmt: skip
                            chunk_rest[slot] = 0.0
                            rest_low[slot] = 0.0
                            chunk_ties[slot] = 0.0
                        grown = group_largest[slot] - finite_shift(chunk_largest[slot])
                        chunk_moment[slot] += np.float64(grown) * chunk_mass[slot]
                        chunk_largest[slot] = group_largest[slot]
            for slot in range(0, n_slots, n_lanes):
                shift = load(chunk_largest, slot, like)
                store(shifts, slot, where(shift > lowest, shift, zero))
            for low in range(group, group_end, BLOCK):
                high = min(low + BLOCK, group_end)
                if y is not None:
                    _stage_block(y, y_offsets, n, low, high, y_stride, y_direct, width, y_stage, like)
                for slot in range(0, n_slots, n_lanes):
                    row = row_of(slot, n, n_lanes)
                    staged = slot * slot_step if direct else row
                    if asks:  # for contiguous rows of the next tile (log-sum-exp of 300,000 x 40: 1.5 times as fast)
                        for line in range(0, n_lanes * n_classes * x.itemsize, CACHE_LINE):
                            prefetch_l2(x, offsets[row], n * n_classes * x.itemsize + line)
                    shift, slot_ties = load(shifts, slot, like), load(ties, slot, like)
                    for lane in range(min(n_lanes, n_classes)):
                        ahead = _copy_ahead(
                            x, offsets[0], stride, n, n_slots, ahead, ahead_end, BLOCK // BATCH // n_lanes,
                            other_stage, -group_end * n_lanes, slot_step, next_largest,
                        )  # fmt: skip
                        if y is None:
                            s, slot_ties, a, m = _max_shift_lane(
                                stage, staged, class_step, shift, None, row, width, weight, keep, spread, exact,
                                None, lane, group, low, high, n_classes, slot_ties,
                            )  # fmt: skip
                        else:
                            s, slot_ties, a, m = _max_shift_lane(
                                stage, staged, class_step, shift, y_stage, row, width, weight, keep, spread, exact,
                                None, lane, group, low, high, n_classes, slot_ties,
                            )  # fmt: skip
                        store(sums, lane * n_lanes, s)
                        if weight is not None:
                            store(moments, lane * n_lanes, a)
                            store(masses, lane * n_lanes, m)
                    store(ties, slot, slot_ties)
                    _put_folded(sums, n_classes, exact, block_total, like)
                    _add_rests(chunk_rest[slot:], rest_low[slot:], block_total, n_lanes)
                    if weight is not None:
                        _put_folded(moments, n_classes, False, block_total, like)
                        _add_block(chunk_moment[slot:], block_total, n_lanes)
                        _put_folded(masses, n_classes, False, block_total, like)
                        _add_block(chunk_mass[slot:], block_total, n_lanes)
            _add_block(chunk_ties, ties, n_slots)
        for slot in range(0, n_slots, n_lanes):
            row = row_of(slot, n, n_lanes)
            if end - begin <= size:
                store(largest, row, load(chunk_largest, slot, like))
                _rest_of_one_group(chunk_largest, slot, chunk_rest, rest_low, chunk_ties, slot, rest, lost, row)
                for i in range(0, n_lanes, lanes(0.0)):
                    store(moment, row + i, load(chunk_moment, slot + i, 0.0))
                    store(mass, row + i, load(chunk_mass, slot + i, 0.0))
                continue
            for i in range(max(0, slot - row), n_lanes):
                at = slot + i
                whole, low = whole_rest(
                    chunk_largest[at], chunk_rest[at], rest_low[at], chunk_ties[at], base[at], older[at], older_low[at]
                )
                largest[row + i], rest[row + i], lost[row + i], moment[row + i], mass[row + i] = merge(
                    largest[row + i], rest[row + i], lost[row + i], moment[row + i], mass[row + i],
                    chunk_largest[at], whole, low, chunk_moment[at], chunk_mass[at],
                )  # fmt: skip


# ------------------------------------------------------------------------------- shift by about the maximum: long rows


@inline
def _find_shifts(source, at, step, n, n_slots, count, shifts):
    """The largest of ``count`` classes of each row, but for NaN."""
    like = shifts[0]
    n_lanes = lanes(like)
    for slot in range(0, n_slots, n_lanes):
        store(shifts, slot, splat(scalar(-np.inf, like)))
    for first in range(0, count, SEARCHED):
        for slot in range(0, n_slots, n_lanes):
            place = at + row_of(slot, n, n_lanes)
            largest = load(shifts, slot, like)
            for c in range(first, min(first + SEARCHED, count)):
                prefetch_l2(source, place + (c + AHEAD_OF_MANY) * step, 0)
                v = load(source, place + c * step, like)
                largest = where(v > largest, v, largest)
            store(shifts, slot, largest)


@inline
def _finite_shifts(shifts, slot, like):
    """:func:`fastloss._kernels.rows.finite_shift` of a vector of rows."""
    shift, lowest = load(shifts, slot, like), splat(scalar(-np.inf, like))
    return where(shift > lowest, shift, splat(scalar(0.0, like)))


@inline
def _load_low(lows, at, like):
    """What a lane's sum has lost: float64 sums alone keep it."""
    return load(lows, at, like) if lanes(like) == lanes(0.0) else splat(scalar(0.0, like))


@inline
def _store_lane(sums, lows, held, at, total, low, largest):
    store(sums, at, total)
    store(held, at, largest)
    if lanes(first_lane(total)) == lanes(0.0):
        store(lows, at, low)


@subroutine
def _sum_many_classes(source, at, step, n, begin, end, count, width, shifts, held, next_held, sums, lows):
    """The lanes' sums of a block of ``count`` classes for the slots ``begin .. end``, and what is held back after it;
    see :func:`fastloss._kernels.rows.held_term`.

    Class by class, as they lie in memory, but that the next ones of the same lane go along: so the sums are loaded and
    stored less often.
    """
    like = shifts[0]
    n_lanes = lanes(like)
    zero = splat(scalar(0.0, like))
    whole = count // n_lanes * n_lanes
    if whole == 0:
        for lane in range(0, n_lanes * width, width):
            for slot in range(lane + begin, lane + end, n_lanes):
                _store_lane(sums, lows, next_held, slot, zero, zero, load(held, slot, like))
    for first in range(0, whole, TOGETHER * n_lanes):
        last = min(first + TOGETHER * n_lanes, whole)
        for lane in range(n_lanes):
            for slot in range(begin, end, n_lanes):
                place, to = at + row_of(slot, n, n_lanes), lane * width + slot
                shift = _finite_shifts(shifts, slot, like)
                total = zero if first == 0 else load(sums, to, like)
                low = zero if first == 0 else _load_low(lows, to, like)
                largest = load(held if first == 0 else next_held, to, like)
                for c in range(first + lane, last, n_lanes):
                    prefetch_l2(source, place + (c + AHEAD_OF_MANY) * step, 0)
                    v = load(source, place + c * step, like)
                    largest, total, low = held_term(v, largest, shift, total, low)
                _store_lane(sums, lows, next_held, to, total, low, largest)
    for c in range(whole, count):
        for slot in range(begin, end, n_lanes):
            to = (c - count + n_lanes) * width + slot
            v = load(source, at + row_of(slot, n, n_lanes) + c * step, like)
            total, low, largest = load(sums, to, like), _load_low(lows, to, like), load(next_held, to, like)
            largest, total, low = held_term(v, largest, _finite_shifts(shifts, slot, like), total, low)
            _store_lane(sums, lows, next_held, to, total, low, largest)


@inline
def _largest_held(held, slot, width, like):
    largest = load(held, slot, like)
    for lane in range(1, lanes(like)):
        v = load(held, lane * width + slot, like)
        largest = where(v > largest, v, largest)
    return largest


@inline
def _complete_lanes(sums, lows, held, slot, width, shifts, largest, is_last):
    """The sums of a block's lanes, ready to be folded; those of the ``is_last`` one of a chunk with all that the lanes
    hold back but one maximum.
    """
    like = first_lane(largest)
    zero, one, lowest = splat(scalar(0.0, like)), splat(scalar(1.0, like)), splat(scalar(-np.inf, like))
    shift, is_met = _finite_shifts(shifts, slot, like), zero
    for lane in range(lanes(like)):
        at = lane * width + slot
        total, low, v = load(sums, at, like), _load_low(lows, at, like), load(held, at, like)
        if is_last:
            other = where((v == largest) & (is_met == zero), lowest, v)
            is_met = where(v == largest, one, is_met)
            _, total, low = held_term(other, v, shift, total, low)
        store(sums, at, total + low)


@inline
def _raise_shifts(shifts, found, slot, chunk_rest, rest_low, base, older, older_low):
    """Close the segment of each row of a vector that has a class too far above its shift; see
    :func:`fastloss._kernels.rows.close_segment`.
    """
    for i in range(slot, slot + lanes(shifts[0])):
        if found[i] > shifts[i] + scalar(SLACK, shifts[0]):
            if shifts[i] > -np.inf:
                base[i], older[i], older_low[i] = close_segment(
                    shifts[i], chunk_rest[i], rest_low[i], 0.0, base[i], older[i], older_low[i]
                )
                chunk_rest[i] = 0.0
                rest_low[i] = 0.0
            shifts[i] = found[i]


@inline
def _many_classes(x, geometry, start, offsets, n, begin, end, largest, rest, lost, scratch):
    """:func:`_max_shift_classes` of the logits alone of rows of several groups; see
    :func:`fastloss._kernels.rows._many_classes_row`.

    Passes over memory: one, in which a block is summed before its maxima are known. Where one turns out to lie too far
    above its row's shift, these rows are summed again.
    """
    like = largest[0]
    n_lanes = lanes(like)
    stride, width = tiles.class_stride(geometry, tiles.INPUT), tiles.scratch_width(geometry)
    sums, lows, held, next_held = scratch.sums[0], scratch.sums[1], scratch.sums[2], scratch.sums[3]
    base, shifts, found = scratch.narrow[2], scratch.narrow[3], scratch.narrow[4]
    chunk_rest, rest_low, older, older_low = scratch.wide[0], scratch.wide[1], scratch.wide[2], scratch.wide[3]
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    source, step = x if direct else scratch.stage, stride if direct else width
    for i in range(n):
        largest[i] = -np.inf
        rest[i] = 0.0
        lost[i] = 0.0
    for chunk in range(begin, end, CHUNK):
        chunk_end = min(chunk + CHUNK, end)
        for slot in range(n_slots):
            base[slot] = -np.inf
            older[slot] = 0.0
            older_low[slot] = 0.0
            chunk_rest[slot] = 0.0
            rest_low[slot] = 0.0
        for i in range(0, n_lanes * width, n_lanes):
            store(held, i, splat(scalar(-np.inf, like)))
        for low in range(chunk, chunk_end, BLOCK):
            high = min(low + BLOCK, chunk_end)
            at = offsets[0] + low * stride if direct else np.int64(0)
            if not direct:
                _stage_block(x, offsets, n, low, high, stride, False, width, scratch.stage, like)
            if low == chunk:
                _find_shifts(source, at, step, n, n_slots, high - low, shifts)
            _sum_many_classes(source, at, step, n, 0, n_slots, high - low, width, shifts, held, next_held, sums, lows)
            for slot in range(0, n_slots, n_lanes):
                block_largest = _largest_held(next_held, slot, width, like)
                if any_lane(block_largest > load(shifts, slot, like) + splat(scalar(SLACK, like))):
                    store(found, slot, block_largest)
                    _raise_shifts(shifts, found, slot, chunk_rest, rest_low, base, older, older_low)
                    _sum_many_classes(
                        source, at, step, n, slot, slot + n_lanes, high - low, width, shifts,
                        held, next_held, sums, lows,
                    )  # fmt: skip
                if high == chunk_end or n_lanes == lanes(0.0):
                    _complete_lanes(sums, lows, next_held, slot, width, shifts, block_largest, high == chunk_end)
            held, next_held = next_held, held
            _fold(sums, n_lanes, n_slots, width, like)
            _add_rests(chunk_rest, rest_low, sums, n_slots)
        for slot in range(0, n_slots, n_lanes):
            row = row_of(slot, n, n_lanes)
            store(found, slot, _largest_held(held, slot, width, like))
            for i in range(max(0, slot - row), min(n_lanes, n - row)):
                at = slot + i
                whole, low = rest_of_chunk(
                    x, offsets[row + i], stride, chunk, chunk_end, found[at], shifts[at],
                    chunk_rest[at], rest_low[at], base[at], older[at], older_low[at],
                )  # fmt: skip
                if chunk > begin:
                    found[at], whole, low, _, _ = merge(
                        largest[row + i], rest[row + i], lost[row + i], 0.0, 0.0, found[at], whole, low, 0.0, 0.0
                    )
                largest[row + i] = found[at]
                rest[row + i] = whole
                lost[row + i] = low


# ------------------------------------------------------------------------------------------------------- outputs


@inline
def write_tile(x, geometry, start, offsets, n, begin, end, out, out_offsets, shifts, scales, lows, is_log, scratch):
    """Write :func:`fastloss._kernels.rows.entry` of the classes ``begin .. end`` of each row of a tile."""
    stage, out_stage = scratch.stage, scratch.out_stage
    like = shifts[0]
    n_lanes = lanes(like)
    stride, out_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, tiles.SECOND)
    width = tiles.scratch_width(geometry)
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    out_direct = is_direct(geometry, tiles.SECOND, start, n, n_lanes)
    is_staged = not direct and geometry[tiles.N_CLASSES] <= GROUP  # by :func:`_search_group`
    for low in range(begin, end, BATCH):
        high = min(low + BATCH, end)
        if not direct and not is_staged:
            stage_classes(x, offsets, n, stride, low, high, width, stage, like)
        for c in range(low, high):
            source = x if direct else stage
            at = offsets[0] + c * stride if direct else (c if is_staged else c - low) * width
            sink = out if out_direct else out_stage
            sink_at = out_offsets[0] + c * out_stride if out_direct else (c - low) * width
            for slot in range(0, n_slots, n_lanes):
                row = row_of(slot, n, n_lanes)
                v, shift = load(source, at + row, like), load(shifts, row, like)
                scale, scale_low = load(scales, row, like), load(lows, row, like)
                store(sink, sink_at + row, entry(v, shift, scale, scale_low, is_log))
        if not out_direct:
            unstage_classes(out_stage, out, out_offsets, n, out_stride, low, high, width, like)
