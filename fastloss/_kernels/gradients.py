"""The kernels of the gradients: a tile's losses, then the entries of its gradient while its logits are in the cache.

Each is a tile function of :mod:`fastloss._kernels.driver` whose ``weight`` is three arrays: the class weights, the
*upstream* gradient (what the gradient of a row's loss is multiplied by: one value per row, or one for all, with strides
of 0) and the gradient. The loss comes from the very functions that compute it alone, so it has the same bits; an entry
of the gradient depends on its row's sums and its own logit only, so its bits are those of any batch and layout.
"""

import numpy as np

from fastloss._kernels import gather, losses, planes, pointwise, rows, tiles
from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels._simd import (
    fence,
    first_lane,
    fma,
    integer_like,
    iota,
    lanes,
    load,
    load_one,
    scalar,
    splat,
    store,
    store_columns,
    store_streaming,
    to_border,
    tree_sum,
    where,
)
from fastloss._kernels._vecmath import exp, exp_difference, exp_of_any
from fastloss._kernels.driver import BAD, BATCH, BLOCK, BLOCK_OF_ROWS, KEPT, SECOND_GUESS, SECOND_SUM, make_kernel
from fastloss._kernels.sums import add_block

# Their places in the geometry, behind the input, the targets and the losses.
GRADIENT, UPSTREAM = np.int64(3), np.int64(4)

# The target of a row with class probabilities: no class, and not ignored.
NO_CLASS, NO_NEAR_CLASS = np.int64(1) << 40, np.int32(2**31 - 1)

# The largest sum relative to the target that serves the gradient (a loss of 28). The rounding of x[c] - x[t] goes into
# all entries alike: up to here it is at most 2**-20, and beyond it nothing cancels in 1 - p[t].
LARGEST_SUM = 2.0**40

# Gradients of as many elements, which no cache holds, are written past the caches where planes lie apart: else each
# line is read before it is written (8 x 21 x 512 x 512 takes 1.2 times as long).
STREAMED = 1 << 22

# What a tile's rows have to be known of, as rows of ``scratch.narrow``: an entry of the gradient is, with
# p = exp(x - SHIFT) * INVERSE,
#   without masses   p * SCALE, and OWN at the target;
#   with masses m    (p * TOTAL - m) * SCALE, where m counts OWN more at the target, and TOTAL is the sum of the masses.
# Where x == TIE, the row's maximum if it has more than half of the probability, p is taken as 1 - SHORT.
SHIFT, INVERSE, SCALE, OWN, TOTAL, SHORT, TIE = range(7)


# ------------------------------------------------------------------------------------------------------ entries


@inline
def _entry(v, is_target, m, shift, inverse, scale, own, total, short, tie):
    """A vector of entries with masses; see :data:`SHIFT`.

    Accuracy: p within 3 ulp. The entry of the largest class is (TOTAL - m) - TOTAL * SHORT, in which nothing has been
    rounded off that counts: for a confident row and all of the mass on its class the difference is exactly 0.
    """
    p = exp_difference(v, shift) * inverse
    m = m + where(is_target, own, splat(scalar(0.0, first_lane(v))))
    return scale * where(v == tie, (total - m) - total * short, fma(p, total, -m))


@inline
def _mass(y, index, weight, c, keep, spread, like):
    """The masses of the classes from c on, without what the target's own class has more."""
    m = rows.class_mass(y, index, weight, c, keep, spread, like)
    return m * splat(spread) if y is None else m


@inline
def _write_block(
    x, origin, y, y_origin, weight, keep, spread, sink, sink_origin, low, high, n_classes, target, narrow, i
):
    """The entries of the classes ``low .. high`` of row i of a tile."""
    like = narrow[SHIFT, 0]
    n_lanes = lanes(like)
    shift, inverse, scale = splat(narrow[SHIFT, i]), splat(narrow[INVERSE, i]), splat(narrow[SCALE, i])
    own, total = splat(narrow[OWN, i]), splat(narrow[TOTAL, i])
    short, tie = splat(narrow[SHORT, i]), splat(narrow[TIE, i])
    lane, nothing = iota(like), splat(integer_like(0, like))
    end = low + (high - low) // n_lanes * n_lanes
    for c in range(low, end + n_lanes, n_lanes):
        begin = c
        if c == end:
            if end == high:
                break
            begin, _, _ = rows.tail(low, high, n_classes, n_lanes)
        is_target = lane - splat(integer_like(rows._near(target - begin), like)) == nothing
        v = load(x, begin - origin, like)
        m = _mass(y, begin - y_origin, weight, begin, keep, spread, like)
        store(sink, begin - sink_origin, _entry(v, is_target, m, shift, inverse, scale, own, total, short, tie))


@inline
def _clear_block(sink, sink_origin, low, high, n_classes, like):
    """Zeros for the classes ``low .. high`` of a row."""
    n_lanes = lanes(like)
    zero = splat(scalar(0.0, like))
    for c in range(low, high, n_lanes):
        begin = c
        if c + n_lanes > high:
            begin, _, _ = rows.tail(low, high, n_classes, n_lanes)
        store(sink, begin - sink_origin, zero)


@inline
def _write_rows(x, y, weight, keep, spread, geometry, start, offsets, y_offsets, n, gradient, targets, near, scratch):
    """Write the gradient of each row of a tile, class by class: for a contiguous class axis."""
    narrow, stage, other_stage, out_stage = scratch.narrow, scratch.stage, scratch.other_stage, scratch.out_stage
    like = narrow[SHIFT, 0]
    n_lanes = lanes(like)
    n_classes = geometry[tiles.N_CLASSES]
    stride, out_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, GRADIENT)
    y_stride = tiles.class_stride(geometry, tiles.TARGET)
    direct = out_stride == 1 and n_classes >= n_lanes
    for i in range(n):
        at = tiles.row_offset(geometry, GRADIENT, start + i)
        for low in range(0, n_classes, BLOCK):
            high = min(low + BLOCK, n_classes)
            begin = max(0, min(low, high - n_lanes))
            sink = gradient if direct else out_stage
            sink_origin = -at if direct else begin
            if targets[i] < 0:
                _clear_block(sink, sink_origin, low, high, n_classes, like)
            else:
                source, origin = rows._block_of(x, offsets[i], stride, low, high, n_classes, n_lanes, stage)
                if y is None:
                    _write_block(
                        source, origin, None, origin, weight, keep, spread, sink, sink_origin,
                        low, high, n_classes, targets[i], narrow, i,
                    )  # fmt: skip
                else:
                    y_source, y_origin = rows._block_of(
                        y, y_offsets[i], y_stride, low, high, n_classes, n_lanes, other_stage
                    )
                    _write_block(
                        source, origin, y_source, y_origin, weight, keep, spread, sink, sink_origin,
                        low, high, n_classes, targets[i], narrow, i,
                    )  # fmt: skip
            if not direct:
                for c in range(low, high):
                    gradient[at + c * out_stride] = out_stage[c - begin]


@inline
def _write_planes(x, y, weight, keep, spread, geometry, start, offsets, y_offsets, n, gradient, targets, near, scratch):
    """Write the gradient of each row of a tile, rows side by side: for a strided class axis, and few classes."""
    narrow, stage, other_stage, out_stage = scratch.narrow, scratch.stage, scratch.other_stage, scratch.out_stage
    like = narrow[SHIFT, 0]
    n_lanes, integer = lanes(like), integer_like(0, like)
    n_classes = geometry[tiles.N_CLASSES]
    stride, out_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, GRADIENT)
    width = tiles.scratch_width(geometry)
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = planes.is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    y_stride = tiles.class_stride(geometry, tiles.TARGET)
    y_direct = planes.is_direct(geometry, tiles.TARGET, start, n, n_lanes) if y is not None else direct
    out_direct = planes.is_direct(geometry, GRADIENT, start, n, n_lanes)
    out_offsets = scratch.places[1 if y is None else 2]  # (not where the targets are, if they are classes)
    tiles.row_offsets(geometry, GRADIENT, start, n, out_offsets)
    zero, nothing = splat(scalar(0.0, like)), splat(integer)
    for low in range(0, n_classes, BATCH):
        high = min(low + BATCH, n_classes)
        if not direct:
            planes.stage_classes(x, offsets, n, stride, low, high, width, stage, like)
        if y is not None:  # noqa: SIM102 - Numba drops this branch at compile time only as it stands
            if not y_direct:
                planes.stage_classes(y, y_offsets, n, y_stride, low, high, width, other_stage, like)
        for c in range(low, high):
            source = x if direct else stage
            at = offsets[0] + c * stride if direct else (c - low) * width
            sink = gradient if out_direct else out_stage
            sink_at = out_offsets[0] + c * out_stride if out_direct else (c - low) * width
            this_class = splat(integer_like(c, like))
            for slot in range(0, n_slots, n_lanes):
                row = planes.row_of(slot, n, n_lanes)
                v, target = load(source, at + row, like), load(near, row, integer)
                shift, inverse = load(narrow[SHIFT], row, like), load(narrow[INVERSE], row, like)
                scale, own = load(narrow[SCALE], row, like), load(narrow[OWN], row, like)
                m = splat(weight[c])
                if y is not None:
                    y_source = y if y_direct else other_stage
                    y_at = y_offsets[0] + c * y_stride if y_direct else (c - low) * width
                    m = m * fma(load(y_source, y_at + row, like), splat(keep), splat(spread))
                else:
                    m = m * splat(spread)
                total, short = load(narrow[TOTAL], row, like), load(narrow[SHORT], row, like)
                tie = load(narrow[TIE], row, like)
                value = _entry(v, target == this_class, m, shift, inverse, scale, own, total, short, tie)
                store(sink, sink_at + row, where(target < nothing, zero, value))
        if not out_direct:
            planes.unstage_classes(out_stage, gradient, out_offsets, n, out_stride, low, high, width, like)


@inline
def _scale_rows(geometry, start, n, gradient, offsets, near, targets, narrow, scratch):
    """Make the entries of the kept terms, which lie in the gradient: for a contiguous class axis."""
    like = narrow[SHIFT, 0]
    n_lanes = lanes(like)
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, GRADIENT)
    zero = splat(scalar(0.0, like))
    for i in range(n):
        at, end = offsets[i], offsets[i] + n_classes - n_lanes
        inverse, scale = narrow[INVERSE, i], narrow[SCALE, i]
        if stride == 1 and n_classes >= n_lanes:
            # (The last vector overlaps the one before, which is in place by then.)
            last = load(gradient, end, like)
            if targets[i] >= 0:
                for c in range(at, end, n_lanes):
                    store(gradient, c, (load(gradient, c, like) * splat(inverse)) * splat(scale))
                store(gradient, end, (last * splat(inverse)) * splat(scale))
            else:
                for c in range(at, end, n_lanes):
                    store(gradient, c, zero)
                store(gradient, end, zero)
        elif targets[i] >= 0:
            for c in range(n_classes):
                gradient[at + c * stride] = (gradient[at + c * stride] * inverse) * scale
        else:
            for c in range(n_classes):
                gradient[at + c * stride] = 0.0
        if targets[i] >= 0:
            gradient[at + targets[i] * stride] = narrow[OWN, i]


@inline
def _scaled(kept, at, c, target, inverse, scale, own):
    """The entries of class c of a vector of rows."""
    like = first_lane(inverse)
    zero, integer = splat(scalar(0.0, like)), splat(integer_like(0, like))
    value = where(target == splat(integer_like(c, like)), own, (load(kept, at, like) * inverse) * scale)
    return where(target < integer, zero, value)


@inline
def _scale_planes(geometry, start, n, gradient, offsets, near, targets, narrow, scratch):
    """Make the entries of the kept terms: for a strided class axis, and few classes."""
    kept, out_stage = scratch.kept, scratch.out_stage
    like = narrow[SHIFT, 0]
    n_lanes, integer = lanes(like), integer_like(0, like)
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, GRADIENT)
    width = tiles.scratch_width(geometry)
    n_slots = (n + n_lanes - 1) // n_lanes * n_lanes
    direct = planes.is_direct(geometry, GRADIENT, start, n, n_lanes)
    is_aligned = to_border(gradient, offsets[0]) == 0 and stride % n_lanes == 0 and n % n_lanes == 0
    streams = direct and is_aligned and len(gradient) >= STREAMED
    in_columns = stride == 1 and n >= n_lanes and n_classes >= 4
    if in_columns and n_classes <= BLOCK:
        for slot in range(0, n_slots, n_lanes):
            row = planes.row_of(slot, n, n_lanes)
            target, inverse = load(near, row, integer), load(narrow[INVERSE], row, like)
            scale, own = load(narrow[SCALE], row, like), load(narrow[OWN], row, like)
            for class_ in range(0, n_classes, 4):
                c = min(class_, n_classes - 4)
                at = c * width + row
                store_columns(
                    gradient, offsets, row, c,
                    _scaled(kept, at, c, target, inverse, scale, own),
                    _scaled(kept, at + width, c + 1, target, inverse, scale, own),
                    _scaled(kept, at + 2 * width, c + 2, target, inverse, scale, own),
                    _scaled(kept, at + 3 * width, c + 3, target, inverse, scale, own),
                )  # fmt: skip
        return
    for low in range(0, n_classes, BATCH):
        high = min(low + BATCH, n_classes)
        first = np.int64(0)
        if n_classes > BLOCK:
            first = low
            planes.stage_classes(gradient, offsets, n, stride, low, high, width, kept, like)
        for c in range(low, high):
            sink = gradient if direct else out_stage
            at = offsets[0] + c * stride if direct else (c - low) * width
            for slot in range(0, n_slots, n_lanes):
                row = planes.row_of(slot, n, n_lanes)
                target, inverse = load(near, row, integer), load(narrow[INVERSE], row, like)
                scale, own = load(narrow[SCALE], row, like), load(narrow[OWN], row, like)
                value = _scaled(kept, (c - first) * width + row, c, target, inverse, scale, own)
                if streams:
                    store_streaming(gradient, at + row, value)
                else:
                    store(sink, at + row, value)
        if not direct:
            planes.unstage_classes(out_stage, gradient, offsets, n, stride, low, high, width, like)
    if streams:
        fence()


# ----------------------------------------------------------------------------------------------- what rows need


@subroutine
def _read_upstream(upstream, geometry, start, n, offsets, scales):
    """The upstream gradients of a tile's rows."""
    like = scales[0]
    if tiles.is_dense(geometry, UPSTREAM, 0, start, n):
        value = splat(upstream[tiles.row_offset(geometry, UPSTREAM, start)])
        for i in range(0, n, lanes(like)):
            store(scales, i, value)
    else:
        tiles.row_offsets(geometry, UPSTREAM, start, n, offsets)
        for i in range(n):
            scales[i] = upstream[offsets[i]]


@subroutine
def _know_again(x, geometry, offsets, n, targets, narrow, scratch, kept, kept_offsets, kept_stride):
    """:func:`_know_targets`, and the terms, of the rows whose sum relative to the target is too large or no number:
    relative to the maximum.
    """
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    like = narrow[SHIFT, 0]
    for i in range(n):
        logit, rest = narrow[SHIFT, i], narrow[INVERSE, i]
        if targets[i] >= 0 and not (rest < LARGEST_SUM and np.isfinite(logit)):
            stages = (scratch.stage, scratch.stage)
            largest, other_rest = rows.max_shift_row(x, offsets[i], stride, n_classes, like, stages)
            rows.target_row(
                x, offsets[i], stride, 0, n_classes, n_classes, np.int64(-1), largest, scratch.stage,
                kept, kept_offsets[i], kept_stride, scratch.out_stage,
            )  # fmt: skip
            narrow[SHIFT, i] = largest
            narrow[INVERSE, i] = other_rest if np.isfinite(largest) else np.nan
            p = first_lane(exp(splat(logit - largest))) / scalar(1.0 + narrow[INVERSE, i], like)
            narrow[OWN, i] = scalar(1.0 - p, like)
        else:
            narrow[OWN, i] = rest / scalar(1.0 + rest, like)


@subroutine
def _know_targets(x, weight, geometry, offsets, n, targets, narrow, scratch, kept, kept_offsets, kept_stride):
    """From the targets' logits (in SHIFT), the sums relative to them (in INVERSE) and the upstream gradients (in
    SCALE), what makes entries of the kept terms.

    Computes, with s the sum of exp(x[c] - x[t]) over c != t, INVERSE = 1 / (1 + s), SCALE = upstream * w[t] and
    OWN = -SCALE * s / (1 + s).
    """
    like = narrow[SHIFT, 0]
    one, zero, nan = splat(scalar(1.0, like)), splat(scalar(0.0, like)), splat(scalar(np.nan, like))
    limit, infinity = splat(scalar(LARGEST_SUM, like)), splat(scalar(np.inf, like))
    integer = integer_like(0, like)
    nothing, count = splat(integer), splat(integer_like(1, like))
    again = nothing
    for i in range(0, n, lanes(like)):
        rest, logit = load(narrow[INVERSE], i, like), load(narrow[SHIFT], i, like)
        fits = (rest < limit) & (logit < infinity) & (logit > -infinity)
        again = again + where(load(scratch.near, i, integer) >= nothing, where(fits, nothing, count), nothing)
        store(narrow[OWN], i, rest / (one + rest))
    if tree_sum(again) > 0:
        _know_again(x, geometry, offsets, n, targets, narrow, scratch, kept, kept_offsets, kept_stride)
    if geometry[tiles.IS_WEIGHTED]:
        for i in range(n):
            if targets[i] >= 0:
                narrow[SCALE, i] *= weight[targets[i]]
    for i in range(0, n, lanes(like)):
        store(narrow[INVERSE], i, one / (one + load(narrow[INVERSE], i, like)))
        scale = load(narrow[SCALE], i, like)
        own = -(scale * load(narrow[OWN], i, like))
        # (An infinite gradient of the target's logarithm makes inf - inf, as PyTorch has it.)
        store(narrow[OWN], i, where(scale - scale == zero, own, nan))


@subroutine
def _know_masses(weight, geometry, n, targets, keep, spread, narrow, rest, mass):
    """From the maxima (in SHIFT), the other terms' sums and the summed masses, what :func:`_entry` needs.

    With index targets ``mass`` is the sum of the weights.
    """
    n_classes = geometry[tiles.N_CLASSES]
    for i in range(n):
        total = mass[i]
        narrow[OWN, i] = 0.0
        if 0 <= targets[i] < n_classes:
            own = keep * np.float64(weight[targets[i]])
            total = own + spread * total
            narrow[OWN, i] = own
        inverse = 1.0 / (1.0 + rest[i]) if np.isfinite(narrow[SHIFT, i]) else np.nan
        narrow[INVERSE, i] = inverse
        narrow[TOTAL, i] = total
        narrow[SHORT, i] = rest[i] * inverse
        # 1 - SHORT has more digits than the quotient only of a class with more than half of the probability. (Infinite
        # masses or upstream gradients make NaN of every class that has a share in them, as in PyTorch.)
        is_known = rest[i] < 1.0 and np.isfinite(total) and np.isfinite(narrow[SHIFT, i])
        narrow[TIE, i] = narrow[SHIFT, i] if is_known else np.nan
        if not np.isfinite(narrow[SCALE, i]):
            narrow[SCALE, i] = np.nan


@subroutine
def _write_confident_targets(
    x, weight, geometry, start, offsets, n, targets, keep, spread, narrow, rest, mass, gradient
):
    """Write the entries of the targets that are TIE again: the mass of all other classes, which little smoothing leaves
    hardly any, is rounded off in TOTAL - m, but known here.
    """
    stride, out_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, GRADIENT)
    like = narrow[SHIFT, 0]
    for i in range(n):
        target = targets[i]
        if target >= 0 and load_one(x, offsets[i] + target * stride, like) == narrow[TIE, i]:
            own = np.float64(weight[target])
            total, others = keep * own + spread * mass[i], spread * (mass[i] - own)
            entry = scalar(others - total * (rest[i] / (1.0 + rest[i])), like)
            gradient[tiles.row_offset(geometry, GRADIENT, start + i) + target * out_stride] = narrow[SCALE, i] * entry


# -------------------------------------------------------------------------------------------------------- tiles


@subroutine
def _weigh_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
    """The number of the targets kept and the exact sum of their weights: what a mean divides by."""
    targets, values = scratch.places[2], scratch.narrow[0]
    start, n = tiles.tile_bounds(geometry, tile)
    kept, bad = tiles.read_targets(y, geometry, start, n, scratch.places[1], targets, scratch.near)
    ledger[KEPT] += kept
    ledger[BAD] += bad
    if geometry[tiles.IS_WEIGHTED]:
        for i in range(n):
            values[i] = weight[targets[i]] if targets[i] >= 0 else 0.0
        ledger[SECOND_GUESS] = add_block(ledger[SECOND_SUM:KEPT], values, n, ledger[SECOND_GUESS])


@inline
def _kept_in_rows(geometry, n, gradient, offsets, scratch):
    """Where the terms of a tile's rows are kept: an array, the rows' offsets, and the stride of the classes."""
    return gradient, offsets, tiles.class_stride(geometry, GRADIENT)


@inline
def _kept_in_planes(geometry, n, gradient, offsets, scratch):
    if geometry[tiles.N_CLASSES] > BLOCK:
        return gradient, offsets, tiles.class_stride(geometry, GRADIENT)
    numbers = scratch.places[1]
    tiles.count_up(numbers, n)
    return scratch.kept, numbers, tiles.scratch_width(geometry)


def _cross_entropy(tile_sums, kept_in, scale):
    """Cross-entropy with index targets, and its gradient, w[t] * (softmax - one_hot).

    Method: the terms exp(x[c] - x[t]) of the sum are kept, and made into the entries when the sum is known.
    """

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, arrays, out, geometry, keep, spread):
        weight, upstream, gradient = arrays
        like = out[0]
        offsets, others, targets = scratch.places[0], scratch.places[1], scratch.places[2]
        near, narrow = scratch.near, scratch.narrow
        shifts, loss = narrow[6], narrow[7]
        start, n = tiles.tile_bounds(geometry, tile)
        losses.begin_targets(ledger, x, y, geometry, start, n, scratch)
        tiles.row_offsets(geometry, GRADIENT, start, n, others)
        tile_sums(
            x, geometry, start, offsets, n, targets, shifts, loss, scratch,
            gradient, others, tiles.class_stride(geometry, GRADIENT),
        )  # fmt: skip
        for i in range(0, n, lanes(like)):
            store(narrow[SHIFT], i, load(shifts, i, like))
            store(narrow[INVERSE], i, load(loss, i, like))
        losses._finish_targets(x, geometry, offsets, n, targets, near, shifts, loss, scratch)
        losses.weigh(weight, geometry, n, targets, loss)
        losses.deliver(ledger, weight, out, geometry, start, n, others, targets, loss, False)
        _read_upstream(upstream, geometry, start, n, others, narrow[SCALE])
        tiles.row_offsets(geometry, GRADIENT, start, n, others)
        kept, kept_offsets, kept_stride = kept_in(geometry, n, gradient, others, scratch)
        _know_targets(x, weight, geometry, offsets, n, targets, narrow, scratch, kept, kept_offsets, kept_stride)
        tiles.row_offsets(geometry, GRADIENT, start, n, others)
        scale(geometry, start, n, gradient, others, near, targets, narrow, scratch)

    return do_tile


def _smoothed_cross_entropy(loss_tile, write):
    """Cross-entropy with index targets and label smoothing, and its gradient, sum(m) * softmax - m with
    m = keep * w[t] * one_hot + spread * w.
    """

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, arrays, out, geometry, keep, spread):
        weight, upstream, gradient = arrays
        like = out[0]
        offsets, targets, near, narrow = scratch.places[0], scratch.places[2], scratch.near, scratch.narrow
        start, n = tiles.tile_bounds(geometry, tile)
        loss_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread)
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        _read_upstream(upstream, geometry, start, n, scratch.places[1], narrow[SCALE])
        _know_masses(weight, geometry, n, targets, keep, spread, narrow, scratch.wide[4], scratch.wide[6])
        write(
            x, None, weight, scalar(keep, like), scalar(spread, like), geometry, start, offsets, offsets, n,
            gradient, targets, near, scratch,
        )  # fmt: skip
        _write_confident_targets(
            x, weight, geometry, start, offsets, n, targets, keep, spread, narrow, scratch.wide[4], scratch.wide[6],
            gradient,
        )  # fmt: skip

    return do_tile


def _probabilities(loss_tile, write):
    """Cross-entropy with class probabilities, and its gradient, sum(m) * softmax - m with m = w * y."""

    @subroutine
    def do_tile(tile, scratch, ledger, x, y, arrays, out, geometry, keep, spread):
        weight, upstream, gradient = arrays
        like = out[0]
        offsets, y_offsets, narrow = scratch.places[0], scratch.places[1], scratch.narrow
        targets, near = scratch.places[2], scratch.near
        start, n = tiles.tile_bounds(geometry, tile)
        loss_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread)
        _read_upstream(upstream, geometry, start, n, offsets, narrow[SCALE])
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        tiles.row_offsets(geometry, tiles.TARGET, start, n, y_offsets)
        for i in range(n):
            targets[i] = NO_CLASS
            near[i] = NO_NEAR_CLASS
        _know_masses(weight, geometry, n, targets, keep, spread, narrow, scratch.wide[4], scratch.wide[6])
        write(
            x, y, weight, scalar(keep, like), scalar(spread, like), geometry, start, offsets, y_offsets, n,
            gradient, targets, near, scratch,
        )  # fmt: skip

    return do_tile


@subroutine
def _nll_tile(tile, scratch, ledger, x, y, arrays, out, geometry, keep, spread):
    """The negative log-likelihood, and the entries of its gradient that are not 0: -w[t]."""
    weight, upstream, gradient = arrays
    offsets, targets, scales = scratch.places[0], scratch.places[2], scratch.narrow[SCALE]
    start, n = tiles.tile_bounds(geometry, tile)
    gather._nll_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread)
    _read_upstream(upstream, geometry, start, n, offsets, scales)
    tiles.row_offsets(geometry, GRADIENT, start, n, offsets)
    stride = tiles.class_stride(geometry, GRADIENT)
    is_weighted = geometry[tiles.IS_WEIGHTED]
    for i in range(n):
        if targets[i] >= 0:
            own = -scales[i] * weight[targets[i]] if is_weighted else -scales[i]
            gradient[offsets[i] + targets[i] * stride] = own


@subroutine
def _kl_tile(tile, scratch, ledger, x, y, arrays, out, geometry, keep, spread):
    """The pointwise divergence, and its gradient, -y or -exp(y)."""
    _, upstream, gradient = arrays
    like = out[0]
    offsets, scales, values = scratch.places[0], scratch.narrow[SCALE], scratch.narrow[0]
    start, n = tiles.tile_bounds(geometry, tile)
    pointwise._kl_tile(tile, scratch, ledger, x, y, out, out, geometry, keep, spread)
    _read_upstream(upstream, geometry, start, n, offsets, scales)
    y_direct = planes.is_direct(geometry, tiles.TARGET, start, n, lanes(like))
    is_log = geometry[tiles.IS_LOG] != 0
    if not y_direct:
        pointwise._stage(y, geometry, tiles.TARGET, start, n, offsets, scratch.other_stage)
    source = y if y_direct else scratch.other_stage
    at = tiles.row_offset(geometry, tiles.TARGET, start) if y_direct else np.int64(0)
    for slot in range(0, n, lanes(like)):
        i = planes.row_of(slot, n, lanes(like))
        goal = load(source, at + i, like)
        if is_log:
            goal = exp_of_any(goal)
        store(values, i, -(goal * load(scales, i, like)))
    tiles.put_rows(gradient, geometry, GRADIENT, start, n, offsets, values)


weigh = make_kernel("weigh_targets", _weigh_tile)
cross_entropy_rows = make_kernel(
    "cross_entropy_gradient_rows", _cross_entropy(rows.target_tile, _kept_in_rows, _scale_rows)
)
cross_entropy_planes = make_kernel(
    "cross_entropy_gradient_planes",
    _cross_entropy(planes.target_tile, _kept_in_planes, _scale_planes),
    keeps=BLOCK_OF_ROWS,
)
smoothed_rows = make_kernel(
    "smoothed_gradient_rows", _smoothed_cross_entropy(losses._smoothed_cross_entropy(rows.max_shift_tile), _write_rows)
)
smoothed_planes = make_kernel(
    "smoothed_gradient_planes",
    _smoothed_cross_entropy(losses._smoothed_cross_entropy(planes.max_shift_tile), _write_planes),
)
probabilities_rows = make_kernel(
    "probabilities_gradient_rows", _probabilities(losses._probabilities(rows.max_shift_tile), _write_rows)
)
probabilities_planes = make_kernel(
    "probabilities_gradient_planes", _probabilities(losses._probabilities(planes.max_shift_tile), _write_planes)
)
nll = make_kernel("nll_gradient", _nll_tile)
kl = make_kernel("kl_gradient", _kl_tile)
