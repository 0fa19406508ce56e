"""Cross-entropy and log-sum-exp of one row of classes at a time: for a contiguous class axis.

Order of addition, the same in :mod:`fastloss._kernels.planes`, so that a row has the same bits in every layout: within
a block of :data:`BLOCK` classes, class c is added to lane c modulo the number of lanes (the last classes of the row,
where they do not fill a vector, to the last lanes; see :func:`tail`), in the compute type. The lanes are folded by
halves. (For softmax a lane's float32 terms are added in two halves, see :func:`add_term`, and the lanes are folded in
float64.) The block sums are added in float64 within a chunk of :data:`CHUNK` classes (relative to the maximum, with
what the additions lose), and the chunk sums in float64; a chunk is the least piece of a long row that a thread takes.

Accuracy: a lane adds at most 16 float32 terms, so that a row's sum is within about 1e-6 of the exact one in the worst
case and 1e-7 in practice, for any number of classes.
"""

import numpy as np

from fastloss._kernels import tiles
from fastloss._kernels._jit import by_dtype, inline, subroutine
from fastloss._kernels._simd import (
    any_lane,
    first_lane,
    fma,
    integer_like,
    iota,
    lanes,
    load,
    load_one,
    lowest_bit,
    mask_bits,
    prefetch,
    prefetch_l2,
    scalar,
    splat,
    store,
    tree_max,
    tree_sum,
    where,
    widen,
)
from fastloss._kernels._vecmath import (
    exp,
    exp_and_difference,
    exp_difference_in_parts,
    exp_falling,
    exp_falling_difference,
    log1p,
)
from fastloss._kernels.driver import BLOCK, CHUNK, GROUP, group_size, record_at

# How far ahead of the loads memory is asked for, in bytes. The CPU's own prefetcher starts anew with every page of 4
# KiB; without this, 65,536 x 1000 takes 1.3 times as long (2 KiB and 8 KiB ahead: within 4 % of this).
AHEAD = 4096

# Float64 numbers up to 2**8, added to it, become multiples of 2**-44: see add_term().
GRID = 1.5 * 2.0**8

# How much the maximum of a chunk may grow before what was summed relative to its first is scaled down.
LARGE_GROWTH = 40.0

# How far classes of a long row may lie above the shift, see _many_classes_row(): the rounding of so small a difference
# changes its exponential by half a unit in the last place. Of 8192 normal numbers the largest is never so far above the
# largest of the first 256, so one shift does.
SLACK = 2.0


# ------------------------------------------------------------------------------------------- shift by the target


@inline
def tail(low, high, n_classes, n_lanes):
    """The classes of a block that do not fill a vector: where the vector that holds them begins, and its valid lanes.

    The vector is laid to end with the block, so that no load leaves the row; the lanes before ``first`` were added
    already. A row shorter than a vector starts it, padded.
    """
    if n_classes >= n_lanes:
        return high - n_lanes, n_lanes - (high - low) % n_lanes, n_lanes
    return low, low * 0, n_classes


@inline
def _near(distance):
    """A distance between classes as the 32 bits of a lane hold it: beyond a block it is only 'far'."""
    return distance if -BLOCK < distance < 2 * BLOCK else np.int64(2 * BLOCK)


@inline
def target_term(v, shifts, kept, at):
    """exp(v - shift), of which the value as if the difference were exact is ``kept`` (if that is an array)."""
    if kept is None:
        return exp(v - shifts)
    e, exact = exp_and_difference(v, shifts)
    store(kept, at, exact)
    return e


@inline
def _target_block(x, origin, low, high, n_classes, target, shift, kept, kept_origin):
    """Sum exp(x - shift) over the classes ``low .. high`` but the target; keep all of them, see :func:`target_row`."""
    n_lanes = lanes(shift)
    zero, shifts = splat(scalar(0.0, shift)), splat(shift)
    lane = iota(shift)
    at_target, step = splat(integer_like(0, shift)), splat(integer_like(n_lanes, shift))
    distance = lane - splat(integer_like(_near(target - low), shift))
    total = zero
    end = low + (high - low) // n_lanes * n_lanes
    for c in range(low, end, n_lanes):
        prefetch(x, c - origin, AHEAD)
        e = target_term(load(x, c - origin, shift), shifts, kept, c - kept_origin)
        total = total + where(distance == at_target, zero, e)
        distance = distance + step
    if end < high:
        begin, first, last = tail(low, high, n_classes, n_lanes)
        valid = (lane >= splat(integer_like(first, shift))) & (lane < splat(integer_like(last, shift)))
        distance = lane - splat(integer_like(_near(target - begin), shift))
        e = target_term(load(x, begin - origin, shift), shifts, kept, begin - kept_origin)
        total = total + where(valid & (distance != at_target), e, zero)
    return total


@inline
def _block_of(x, offset, stride, low, high, n_classes, n_lanes, stage):
    """Where to read the classes ``low .. high``: an array and the class that its first element would be."""
    if stride == 1 and n_classes >= n_lanes:
        return x, -offset
    begin = max(0, min(low, high - n_lanes))
    tiles.copy_classes(x, offset, stride, begin, high, stage)
    return stage, begin


@inline
def target_row(
    x, offset, stride, begin, end, n_classes, target, shift, stage, kept, kept_offset, kept_stride, kept_stage
):
    """Sum exp(x[c] - shift) over the classes ``begin .. end``, whole chunks, but the target, in float64.

    All of them, the target's own included, are written to ``kept``, if that is an array.
    """
    total = 0.0
    kept_directly = kept_stride == 1 and n_classes >= lanes(shift)
    for chunk in range(begin, end, CHUNK):
        chunk_total = 0.0
        block_total = splat(scalar(0.0, shift))
        for low in range(chunk, min(chunk + CHUNK, end), BLOCK):
            high = min(low + BLOCK, end)
            held = block_total
            source, origin = _block_of(x, offset, stride, low, high, n_classes, lanes(shift), stage)
            if kept is None:
                block_total = _target_block(source, origin, low, high, n_classes, target, shift, None, origin)
            else:
                first = max(0, min(low, high - lanes(shift)))
                sink = kept if kept_directly else kept_stage
                sink_origin = -kept_offset if kept_directly else first
                block_total = _target_block(source, origin, low, high, n_classes, target, shift, sink, sink_origin)
                if not kept_directly:
                    for c in range(low, high):
                        kept[kept_offset + c * kept_stride] = kept_stage[c - first]
            chunk_total += np.float64(tree_sum(held))
        total += chunk_total + np.float64(tree_sum(block_total))
    return total


# ------------------------------------------------------------------------------------------ shift by the maximum


@inline
def _larger(v, largest):
    """The larger one, lane by lane; NaN is passed over (the sum finds it)."""
    return where(v > largest, v, largest)


@inline
def _max_group(x, origin, low, high, n_classes, like):
    """The largest of the classes ``low .. high``, but for NaN: in four vectors, for the loads not to wait for it."""
    n_lanes = lanes(like)
    lowest = splat(scalar(-np.inf, like))
    a, b, c, d = lowest, lowest, lowest, lowest
    whole = low + (high - low) // (4 * n_lanes) * (4 * n_lanes)
    at = low - origin
    for _ in range(low, whole, 4 * n_lanes):
        a = _larger(load(x, at, like), a)
        b = _larger(load(x, at + n_lanes, like), b)
        c = _larger(load(x, at + 2 * n_lanes, like), c)
        d = _larger(load(x, at + 3 * n_lanes, like), d)
        at += 4 * n_lanes
    end = low + (high - low) // n_lanes * n_lanes
    for _ in range(whole, end, n_lanes):
        a = _larger(load(x, at, like), a)
        at += n_lanes
    if end < high:
        begin, first, last = tail(low, high, n_classes, n_lanes)
        lane = iota(like)
        valid = (lane >= splat(integer_like(first, like))) & (lane < splat(integer_like(last, like)))
        b = _larger(where(valid, load(x, begin - origin, like), lowest), b)
    return tree_max(_larger(_larger(a, b), _larger(c, d)))


@inline
def class_mass(y, index, weight, c, keep, spread, like):
    """Weight * (y * keep + spread) for the classes from c on; without ``y``, the weights alone."""
    if y is None:
        return load(weight, c, like)
    return load(weight, c, like) * fma(load(y, index, like), splat(keep), splat(spread))


@inline
def add_term(e, differs, exact, total, low):
    """Add exp(x - shift) to a lane's sum, ``total + low``, where x != shift; without that mask, everywhere.

    In float64, with no wider type for the sums of lanes to go to, a term is taken apart into a multiple of 2**-44,
    which sums of up to 2**9 hold exactly, and what is left, of which next to nothing is lost (1000 float64 classes:
    softmax was up to 5.6 ulp off). Not so in float32: the lanes' sums are good to some 2 ulp. If ``exact``, each term
    goes to the half of the sum that the one before has not gone to, so that half as many are added to either (of
    500,000,000 entries of softmax of 257 float32 classes 13 were off by more than 4 ulp, up to 5.0; now by 3.9).
    """
    like = first_lane(e)
    if lanes(like) == lanes(0.0):
        if differs is not None:
            e = where(differs, e, splat(scalar(0.0, like)))
        grid = splat(scalar(GRID, like))
        high = (e + grid) - grid
        return total + high, low + (e - high)
    total = total + e if differs is None else where(differs, total + e, total)
    return (low, total) if exact else (total, low)


@inline
def _max_shift_block(
    x, origin, ahead, low, high, n_classes, shift, y, y_origin, weight, keep, spread, exact, kept, ties, ahead_largest
):
    """Of the classes ``low .. high``: the sum of exp(x - shift) where x != shift, and of the mass
    m = weight * (y * keep + spread) the sum of m * (shift - x) and of m (not without ``weight``). Adds to ``ties``,
    lane by lane, how many x == shift, and takes into ``ahead_largest`` the elements ``ahead`` places behind. ``exact``
    counts the rounding of x - shift. The exponentials are written to ``kept``, if that is an array, class by class.
    """
    like = shift
    n_lanes = lanes(like)
    zero, one, shifts = splat(scalar(0.0, like)), splat(scalar(1.0, like)), splat(shift)
    total, total_low, moment, mass = zero, zero, zero, zero
    end = low + (high - low) // n_lanes * n_lanes
    # Those that are no ties are taken off: one mask serves the sum and the count.
    ties = ties + splat(scalar((end - low) // n_lanes, like))
    for c in range(low, end, n_lanes):
        at = c - origin
        prefetch(x, at + ahead, AHEAD)
        v = load(x, at, like)
        ahead_largest = _larger(load(x, at + ahead, like), ahead_largest)
        differs = v != shifts
        d = v - shifts
        e = exp_falling_difference(v, shifts) if exact else exp_falling(d)
        if kept is not None:
            store(kept, c, e)
        total, total_low = add_term(e, differs, exact, total, total_low)
        ties = where(differs, ties - one, ties)
        if weight is not None:
            m = class_mass(y, c - y_origin, weight, c, keep, spread, like)
            moment = fma(m, -d, moment)
            mass = mass + m
    if end < high:
        begin, first, last = tail(low, high, n_classes, n_lanes)
        lane = iota(like)
        valid = (lane >= splat(integer_like(first, like))) & (lane < splat(integer_like(last, like)))
        at = begin - origin
        v = load(x, at, like)
        ahead_largest = _larger(load(x, at + ahead, like), ahead_largest)
        tie = v == shifts
        d = v - shifts
        e = exp_falling_difference(v, shifts) if exact else exp_falling(d)
        if kept is not None:
            store(kept, begin, e)
        total, total_low = add_term(e, valid & (v != shifts), exact, total, total_low)
        ties = ties + where(valid & tie, one, zero)
        if weight is not None:
            m = class_mass(y, begin - y_origin, weight, begin, keep, spread, like)
            moment = where(valid, fma(m, -d, moment), moment)
            mass = mass + where(valid, m, zero)
    return total + total_low, moment, mass, ties, ahead_largest


@inline
def finite_shift(largest):
    """What to subtract when ``largest`` is the maximum so far: -inf would make NaN of masked classes."""
    return largest if largest > -np.inf else scalar(0.0, largest)


@inline
def scale_factor(old, new):
    """exp(old - new) of two maxima, a float64 number in two parts.

    The factor is the same error in all that it scales, and where the maxima grow evenly it is the same factor every
    time: with one of the compute type, softmax of 128,256 even float32 logits is off by 4 ulp instead of 3, and with
    one of float64, of 65,536 float64 ones by 4.2 instead of 3.
    """
    factor, low = exp_difference_in_parts(splat(np.float64(old)), splat(np.float64(new)))
    return first_lane(factor), first_lane(low)


@inline
def two_sum(a, b):
    """The rounded sum, and what its rounding has left out, exactly (Knuth)."""
    total = a + b
    added = total - a
    return total, (a - (total - added)) + (b - added)


@inline
def _add_scaled(total, low, factor, other, other_low):
    """The sum total + low plus factor * (other + other_low), float64 numbers in two parts each."""
    product = factor[0] * other
    lost = first_lane(fma(splat(factor[0]), splat(other), splat(-product)))
    total, rounding = two_sum(total, product)
    return total, low + (rounding + (lost + (factor[0] * other_low + factor[1] * other)))


@subroutine
def close_segment(largest, rest, rest_low, ties, base, older, older_low):
    """Join what was summed relative to ``largest``, now that a larger class has come, to what was summed before:
    ``older``, relative to ``base``, the first maximum of the chunk (-inf if there is none yet). All in two parts.

    To scale the sum so far down to each new maximum would round it every time. Only where exp(largest - base) would be
    large is the older sum scaled: little depends on it then.
    """
    total, lost = two_sum(rest, ties)
    low = rest_low + lost
    if not base > -np.inf:
        return largest, total, low
    if largest - base > LARGE_GROWTH:
        total, low = _add_scaled(total, low, scale_factor(base, largest), older, older_low)
        return largest, total, low
    older, older_low = _add_scaled(older, older_low, scale_factor(largest, base), total, low)
    return base, older, older_low


@inline
def whole_rest(largest, rest, rest_low, ties, base, older, older_low):
    """The sum of exp(x - largest) of a chunk without the maximum's own 1, in two parts, the first of which is the sum
    rounded; see :func:`close_segment`.
    """
    total, lost = two_sum(rest, ties - 1.0 if largest > -np.inf else ties)
    low = rest_low + lost
    if base > -np.inf:
        total, low = _add_scaled(total, low, scale_factor(base, largest), older, older_low)
    return two_sum(total, low)


@subroutine
def merge(largest, rest, low, moment, mass, other_largest, other_rest, other_low, other_moment, other_mass):
    """Join two pieces of a row: (maximum, sum of exp(x - maximum) without the maximum's own 1 and what its rounding has
    lost, moment, mass).
    """
    shift, other_shift = finite_shift(largest), finite_shift(other_largest)
    if other_largest > largest:
        factor, (whole, lost) = scale_factor(largest, other_largest), two_sum(1.0, rest)
        rest, low = _add_scaled(other_rest, other_low, factor, whole, lost + low)
        moment = other_moment + (moment + np.float64(other_shift - shift) * mass)
        largest = other_largest
    elif largest > other_largest:
        factor, (whole, lost) = scale_factor(other_largest, largest), two_sum(1.0, other_rest)
        rest, low = _add_scaled(rest, low, factor, whole, lost + other_low)
        moment = moment + (other_moment + np.float64(shift - other_shift) * other_mass)
    else:
        rest, low = _add_scaled(rest, low, (1.0, 0.0), other_rest, other_low)
        rest, lost = two_sum(rest, 1.0 if largest > -np.inf else 0.0)
        low += lost
        moment = moment + other_moment
    rest, low = two_sum(rest, low)
    return largest, rest, low, moment, mass + other_mass


@inline
def _folded(total):
    return np.float64(tree_sum(total))


@inline
def _folded_wide(total):
    low, high = widen(total)
    return tree_sum(low + high)


_folded_in_float64 = by_dtype(_folded_wide, _folded)


@inline
def _block_sum(total, exact):
    """The lanes of a block's sum, folded by halves: in float64 if ``exact``."""
    return _folded_in_float64(total) if exact else _folded(total)


@subroutine
def _sum_blocks(
    x, origin, ahead, low, high, n_classes, largest, y, y_offset, y_stride, weight, keep, spread, exact, y_stage,
    kept, rest, rest_low, moment, mass,
):  # fmt: skip
    """Add the blocks from ``low`` on to the sums of their chunk, relative to its ``largest`` so far; see
    :func:`_max_shift_block`. Up to ``high``, or, where a row has several groups, to before one with a larger class.
    Returns the sums, the ties, the largest of the elements ``ahead`` places behind the last block, and where that ends.

    A function of its own, in which nothing else is called, keeps the constants of the exponential in registers: LLVM
    loads them anew for every vector otherwise (log-sum-exp of 65,536 x 1000 takes 1.2 times as long). A block's sums
    are folded after those of the next have been taken: a fold waits for the last exponential, and the CPU does not look
    far enough ahead to have other work meanwhile (1.04 times).
    """
    shift = finite_shift(largest)
    zero, lowest = splat(scalar(0.0, shift)), splat(scalar(-np.inf, shift))
    ties, ahead_largest = zero, lowest
    s, a, m = zero, zero, zero
    block = low
    while block < high:
        end = min(block + BLOCK, high)
        held_s, held_a, held_m = s, a, m
        if n_classes > GROUP:
            ahead_largest = lowest
        if y is None:
            s, a, m, ties, ahead_largest = _max_shift_block(
                x, origin, ahead, block, end, n_classes, shift, None, origin, weight, keep, spread, exact,
                kept, ties, ahead_largest,
            )  # fmt: skip
        else:
            y_source, y_origin = _block_of(y, y_offset, y_stride, block, end, n_classes, lanes(shift), y_stage)
            s, a, m, ties, ahead_largest = _max_shift_block(
                x, origin, ahead, block, end, n_classes, shift, y_source, y_origin, weight, keep, spread, exact,
                kept, ties, ahead_largest,
            )  # fmt: skip
        rest, lost = two_sum(rest, _block_sum(held_s, exact))
        rest_low += lost
        moment += np.float64(tree_sum(held_a))
        mass += np.float64(tree_sum(held_m))
        block = end
        if n_classes > GROUP and any_lane(ahead_largest > splat(largest)):
            break
    rest, lost = two_sum(rest, _block_sum(s, exact))
    rest_low += lost
    moment += np.float64(tree_sum(a))
    mass += np.float64(tree_sum(m))
    return rest, rest_low, moment, mass, np.float64(tree_sum(ties)), tree_max(ahead_largest), block


# ------------------------------------------------------------------------- shift by about the maximum: long rows


@inline
def held_term(v, held, shift, total, low):
    """Add to a lane's sum the term of the lesser of v and the class ``held`` back, and hold the larger one back."""
    lesser = where(held < v, held, v)  # NaN if v is
    total, low = add_term(exp_falling(lesser - shift), None, False, total, low)
    return where(v > held, v, held), total, low


@inline
def _many_classes_block(x, origin, ahead, low, high, n_classes, shift, held, is_last):
    """Of the classes ``low .. high``: the lanes' sums, see :func:`held_term`, the classes held back, and the largest of
    the elements ``ahead`` places behind, lane by lane. The ``is_last`` block of a chunk adds what is held.
    """
    like = shift
    n_lanes = lanes(like)
    shifts, lane = splat(shift), iota(like)
    total, total_low = splat(scalar(0.0, like)), splat(scalar(0.0, like))
    ahead_largest = lowest = splat(scalar(-np.inf, like))
    end = low + (high - low) // n_lanes * n_lanes
    for c in range(low, end, n_lanes):
        at = c - origin
        prefetch(x, at + ahead, AHEAD)
        v = load(x, at, like)
        ahead_largest = _larger(load(x, at + ahead, like), ahead_largest)
        held, total, total_low = held_term(v, held, shifts, total, total_low)
    if end < high:
        begin, first, _ = tail(low, high, n_classes, n_lanes)
        valid = lane >= splat(integer_like(first, like))
        v = load(x, begin - origin, like)
        ahead_largest = _larger(load(x, begin - origin + ahead, like), ahead_largest)
        # What is no class of the block changes nothing.
        v = where(valid, v, lowest)
        held, total, total_low = held_term(v, held, shifts, total, total_low)
    if is_last:
        place = lowest_bit(mask_bits(held == splat(tree_max(held))))
        others = where(lane == splat(integer_like(place, like)), lowest, held)
        _, total, total_low = held_term(others, held, shifts, total, total_low)
    return total + total_low, held, ahead_largest


@subroutine
def _sum_many_classes(x, origin, ahead, low, high, chunk_end, n_classes, shift, held, rest, rest_low):
    """:func:`_sum_blocks` for :func:`_many_classes_row`: up to ``high``, or to before a block with a class too far
    above the ``shift``.
    """
    limit, finite = splat(shift + scalar(SLACK, shift)), finite_shift(shift)
    ahead_largest, total = splat(scalar(-np.inf, shift)), splat(scalar(0.0, shift))
    block = low
    while block < high:
        end = min(block + BLOCK, high)
        earlier = total
        total, held, ahead_largest = _many_classes_block(
            x, origin, ahead, block, end, n_classes, finite, held, end == chunk_end
        )
        rest, lost = two_sum(rest, np.float64(tree_sum(earlier)))
        rest_low += lost
        block = end
        if any_lane(ahead_largest > limit):
            break
    rest, lost = two_sum(rest, np.float64(tree_sum(total)))
    return rest, rest_low + lost, held, tree_max(ahead_largest), block


@subroutine
def rest_of_chunk(x, offset, stride, low, high, largest, shift, rest, rest_low, base, older, older_low):
    """The sum of exp(x - largest) over a chunk's classes ``low .. high`` without the maximum's own 1: from the ``rest``
    relative to the ``shift``, and the ``older`` relative to ``base``, see :func:`close_segment` and :func:`whole_rest`.
    """
    if largest == np.inf:
        # Relative to +inf everything is NaN or 0: only a NaN counts.
        rest = 0.0
        for c in range(low, high):
            v = load_one(x, offset + c * stride, largest)
            if v != v:
                rest = np.nan
        return rest, 0.0
    if not largest > -np.inf:
        return two_sum(rest, rest_low)
    total, total_low = _add_scaled(0.0, 0.0, scale_factor(shift, largest), rest, rest_low)
    if base > -np.inf:
        total, total_low = _add_scaled(total, total_low, scale_factor(base, largest), older, older_low)
    return two_sum(total, total_low)


@inline
def _many_classes_row(x, offset, stride, begin, end, n_classes, known, stages):
    """:func:`_max_shift_row` of the logits alone of a row of several groups.

    Method: the shift is the largest class of a chunk's first block, until a later block has one more than :data:`SLACK`
    above it, which is seldom: so the planes' kernel need not search a block before it is summed. For the maximum's own
    1 to be left out all the same, each lane holds the largest class back that it has met, and adds the lesser one
    instead; at the end of a chunk all that the lanes hold but one maximum is added.

    Accuracy: as :func:`max_shift_row`; a class above the shift is no worse than one as far below it.
    """
    like = known
    n_lanes = lanes(like)
    largest, rest, lost = scalar(-np.inf, like), 0.0, 0.0
    for low in range(begin, end, CHUNK):
        high = min(low + CHUNK, end)
        shift, base, older, older_low = scalar(-np.inf, like), scalar(-np.inf, like), 0.0, 0.0
        chunk_rest, rest_low = 0.0, 0.0
        held = splat(scalar(-np.inf, like))
        block = low
        while block < high:
            block_end = min(block + BLOCK, high)
            source, origin = _block_of(x, offset, stride, block, block_end, n_classes, n_lanes, stages[0])
            block_largest = known if known == known else _max_group(source, origin, block, block_end, n_classes, like)
            if block_largest > shift + scalar(SLACK, like):
                if shift > -np.inf:
                    base, older, older_low = close_segment(shift, chunk_rest, rest_low, 0.0, base, older, older_low)
                    chunk_rest, rest_low = 0.0, 0.0
                shift = block_largest
            ahead = np.int64(0)
            if stride == 1 and block + 2 * BLOCK <= n_classes:
                ahead = np.int64(BLOCK)
                block_end = min(block + (n_classes - block) // BLOCK * BLOCK - BLOCK, high)
            chunk_rest, rest_low, held, ahead_largest, block = _sum_many_classes(
                source, origin, ahead, block, block_end, high, n_classes, shift, held, chunk_rest, rest_low
            )
            known = ahead_largest if ahead != 0 else scalar(np.nan, like)
        chunk_largest = tree_max(held)
        chunk_rest, rest_low = rest_of_chunk(
            x, offset, stride, low, high, chunk_largest, shift, chunk_rest, rest_low, base, older, older_low
        )
        if low == begin:
            largest, rest, lost = chunk_largest, chunk_rest, rest_low
        else:
            largest, rest, lost, _, _ = merge(
                largest, rest, lost, 0.0, 0.0, chunk_largest, chunk_rest, rest_low, 0.0, 0.0
            )
    return largest, rest, lost, 0.0, 0.0, known


@inline
def _max_shift_row(
    x, offset, stride, begin, end, n_classes, y, y_offset, y_stride, weight, keep, spread, exact, known, to_next,
    stages, kept,
):  # fmt: skip
    """Of the classes ``begin .. end`` of a row, whole chunks: the maximum, the sum of exp(x - maximum) without the
    maximum's own 1 and what its rounding has lost, the moment and the mass; given the maximum of the first group,
    ``known`` (or NaN). Also the maximum of the group behind them, or, where the row is one group and ``to_next`` is not
    0, of the row that lies ``to_next`` behind it, or NaN. For ``kept`` see :func:`_max_shift_block`.

    Method: one pass over memory. Each group of classes is searched for a new maximum and then, from the first-level
    cache, summed with the largest value so far of its chunk as the shift; where that grew, what was summed before is
    kept apart, see :func:`close_segment`. The chunks are joined from the first on.

    A group is searched while the one before is summed, which costs little: the sums keep the units that multiply busy,
    the search those that add. Searched and then summed, row by row, each behind a call, log-sum-exp of 65,536 x 1000
    takes 1.13 times as long, label smoothing 1.18 times.
    """
    if weight is None and n_classes > GROUP and not exact:
        return _many_classes_row(x, offset, stride, begin, end, n_classes, known, stages)
    like = known
    n_lanes = lanes(like)
    in_place = stride == 1 and n_classes >= n_lanes
    size = group_size(n_classes)
    largest, rest, lost, moment, mass = scalar(-np.inf, like), 0.0, 0.0, 0.0, 0.0
    for low in range(begin, end, CHUNK):
        high = min(low + CHUNK, end)
        chunk_largest, base, older, older_low = scalar(-np.inf, like), scalar(-np.inf, like), 0.0, 0.0
        chunk_rest, rest_low, chunk_ties, chunk_moment, chunk_mass = 0.0, 0.0, 0.0, 0.0, 0.0
        group = low
        while group < high:
            group_end = min(group + size, high)
            source, origin = _block_of(x, offset, stride, group, group_end, n_classes, n_lanes, stages[0])
            group_largest = known if known == known else _max_group(source, origin, group, group_end, n_classes, like)
            if group_largest > chunk_largest:
                if chunk_largest > -np.inf:
                    base, older, older_low = close_segment(
                        chunk_largest, chunk_rest, rest_low, chunk_ties, base, older, older_low
                    )
                    chunk_rest, rest_low, chunk_ties = 0.0, 0.0, 0.0
                chunk_moment += np.float64(group_largest - finite_shift(chunk_largest)) * chunk_mass
                chunk_largest = group_largest
            ahead = np.int64(0)
            if in_place and n_classes <= size:
                ahead = to_next
            elif in_place and group + 2 * size <= n_classes:
                # A group is a block, and so is the next one up to here.
                ahead = size
                group_end = min(group + (n_classes - group) // size * size - size, high)
            chunk_rest, rest_low, chunk_moment, chunk_mass, ties, ahead_largest, group = _sum_blocks(
                source, origin, ahead, group, group_end, n_classes, chunk_largest, y, y_offset, y_stride, weight, keep,
                spread, exact, stages[1], kept, chunk_rest, rest_low, chunk_moment, chunk_mass,
            )  # fmt: skip
            chunk_ties += ties
            known = ahead_largest if ahead != 0 else scalar(np.nan, like)
        chunk_rest, rest_low = whole_rest(chunk_largest, chunk_rest, rest_low, chunk_ties, base, older, older_low)
        if low == begin:
            largest, rest, lost, moment, mass = chunk_largest, chunk_rest, rest_low, chunk_moment, chunk_mass
        else:
            largest, rest, lost, moment, mass = merge(
                largest, rest, lost, moment, mass, chunk_largest, chunk_rest, rest_low, chunk_moment, chunk_mass
            )
    return largest, rest, lost, moment, mass, known


@subroutine
def max_shift_row(x, offset, stride, n_classes, like, stages):
    """The maximum of a row, and the sum of exp(x - maximum) without the maximum's own 1, counting the rounding of the
    differences.
    """
    found = _max_shift_row(
        x, offset, stride, 0, n_classes, n_classes, None, 0, 0, None, like, like, True, scalar(np.nan, like), 0,
        stages, None,
    )  # fmt: skip
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------------- tiles


@inline
def gather_targets(x, offsets, stride, n, targets, shifts):
    """Write the logits of the targets (of class 0 where there is none).

    All are asked for before the first is loaded: 200,000 x 100 takes 1.1 times as long otherwise.
    """
    like = shifts[0]
    for i in range(n):
        prefetch_l2(x, offsets[i] + max(targets[i], 0) * stride, 0)
    for i in range(n):
        shifts[i] = load_one(x, offsets[i] + max(targets[i], 0) * stride, like)


@inline
def target_tile(x, geometry, start, offsets, n, targets, shifts, rest, scratch, kept, kept_offsets, kept_stride):
    """:func:`target_row` of each row of a tile that has a target, and the logits of the targets, the ``shifts``."""
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    gather_targets(x, offsets, stride, n, targets, shifts)
    for i in range(n):
        if targets[i] >= 0:
            rest[i] = target_row(
                x, offsets[i], stride, 0, n_classes, n_classes, targets[i], shifts[i], scratch.stage,
                kept, kept_offsets[i], kept_stride, scratch.out_stage,
            )  # fmt: skip


@inline
def max_shift_tile(
    x, geometry, start, offsets, n, y, y_offsets, weight, keep, spread, exact, largest, rest, lost, moment, mass,
    scratch,
):  # fmt: skip
    """:func:`_max_shift_row` of each row of a tile, whole."""
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    y_stride = tiles.class_stride(geometry, tiles.TARGET) if y is not None else stride
    stages = (scratch.stage, scratch.other_stage)
    known = scalar(np.nan, largest[0])
    for i in range(n):
        to_next = offsets[i + 1] - offsets[i] if i + 1 < n else np.int64(0)
        largest[i], rest[i], lost[i], moment[i], mass[i], known = _max_shift_row(
            x, offsets[i], stride, 0, n_classes, n_classes, y, y_offsets[i], y_stride, weight, keep, spread, exact,
            known, to_next, stages, None,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- pieces of a long row


# Classes of a piece: some chunks, in each of which the maximum of the next one's first group is found by the way.
PIECE = 4 * CHUNK


@inline
def target_pieces(x, geometry, start, offsets, n, begin, end, targets, shifts, scratch):
    """:func:`target_row` of the chunks of the classes ``begin .. end``, into the records."""
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    gather_targets(x, offsets, stride, n, targets, shifts)
    for i in range(n):
        if targets[i] >= 0:
            for chunk in range(begin, end, CHUNK):
                scratch.records[record_at(geometry, start + i, chunk, 1)] = target_row(
                    x, offsets[i], stride, chunk, min(chunk + CHUNK, end), n_classes, targets[i], shifts[i],
                    scratch.stage, None, offsets[i], 0, scratch.out_stage,
                )  # fmt: skip


@inline
def joined_targets(x, geometry, start, offsets, n, targets, shifts, rest, scratch, kept, kept_offsets, kept_stride):
    """:func:`target_tile` from the records."""
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    gather_targets(x, offsets, stride, n, targets, shifts)
    for i in range(n):
        if targets[i] >= 0:
            total = 0.0
            for chunk in range(0, n_classes, CHUNK):
                total += scratch.records[record_at(geometry, start + i, chunk, 1)]
            rest[i] = total


# Values that :func:`put_record` keeps.
FOUND = 5


@inline
def put_record(scratch, geometry, row, begin, largest, rest, lost, moment, mass):
    """Keep what is known of the chunk of a row that begins with the class ``begin``."""
    records, at = scratch.records, record_at(geometry, row, begin, FOUND)
    records[at] = largest
    records[at + 1] = rest
    records[at + 2] = lost
    records[at + 3] = moment
    records[at + 4] = mass


@inline
def max_shift_pieces(
    x, geometry, start, offsets, n, begin, end, y, y_offsets, weight, keep, spread, exact, like, scratch
):
    """:func:`_max_shift_row` of the chunks of the classes ``begin .. end``, into the records."""
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    y_stride = tiles.class_stride(geometry, tiles.TARGET) if y is not None else stride
    stages = (scratch.stage, scratch.other_stage)
    for i in range(n):
        known = scalar(np.nan, like)
        for chunk in range(begin, end, CHUNK):
            largest, rest, lost, moment, mass, known = _max_shift_row(
                x, offsets[i], stride, chunk, min(chunk + CHUNK, end), n_classes, y, y_offsets[i], y_stride, weight,
                keep, spread, exact, known, 0, stages, None,
            )  # fmt: skip
            put_record(scratch, geometry, start + i, chunk, largest, rest, lost, moment, mass)


@inline
def joined_max_shifts(
    x, geometry, start, offsets, n, y, y_offsets, weight, keep, spread, exact, largest, rest, lost, moment, mass,
    scratch,
):  # fmt: skip
    """:func:`max_shift_tile` from the records."""
    records, like = scratch.records, largest[0]
    for i in range(n):
        for chunk in range(0, geometry[tiles.N_CLASSES], CHUNK):
            at = record_at(geometry, start + i, chunk, FOUND)
            found = scalar(records[at], like), records[at + 1], records[at + 2], records[at + 3], records[at + 4]
            if chunk > 0:
                found = merge(
                    largest[i], rest[i], lost[i], moment[i], mass[i], found[0], found[1], found[2], found[3], found[4]
                )
            largest[i], rest[i], lost[i], moment[i], mass[i] = found


# ------------------------------------------------------------------------------------------------------- outputs


@inline
def entry(v, shift, scale, scale_low, is_log):
    """The softmax, or its logarithm, of a vector of classes; see :func:`fastloss._kernels.outputs._softmax`. Without
    ``shift``, v is the exponential of the difference.

    A softmax's scale is in two parts: rounded, it would be the same error in all entries of a row (of 30,000,000 of 257
    float32 classes 15 were off by more than 4 ulp instead of 2).
    """
    if shift is None:
        return fma(v, scale, v * scale_low)
    if not is_log:
        e = exp_falling_difference(v, shift)
        return fma(e, scale, e * scale_low)
    like = first_lane(v)
    d, lost = two_sum(v, -shift)
    if lanes(like) == lanes(0.0):
        # Counting the rounding of the difference keeps the worst error below that of x - M - log(S), 1.3 ulp.
        scale = scale - where(d > splat(scalar(-np.inf, like)), lost, splat(scalar(0.0, like)))
    return d - scale


@inline
def inverse_sum(rest, lost, like):
    """1 / (1 + rest + lost) of float64 vectors in two parts, where lost is no more than the rounding of rest; for a
    result of float32, one will do.
    """
    one = splat(1.0)
    if lanes(like) > lanes(0.0):
        return one / (one + rest), splat(0.0)
    total, rounding = two_sum(one, rest)
    rough = one / total
    correction = fma(-total, rough, one) - rough * (rounding + lost)
    inverse = fma(rough, correction, rough)
    return inverse, fma(rough, correction, rough - inverse)


@inline
def find_scales(largest, rest, lost, scales, lows, begin, n, is_log):
    """What :func:`entry` takes as the scale, for the rows ``begin .. begin + n`` of a tile; NaN where no maximum is
    finite.
    """
    like = largest[0]
    zero = splat(scalar(0.0, like))
    for i in range(begin, begin + n, lanes(like)):
        for k in range(i, i + lanes(like), lanes(0.0)):
            others = load(rest, k, 0.0)
            if is_log:
                store(scales, k, others)
                continue
            scale, low = inverse_sum(others, load(lost, k, 0.0), like)
            store(scales, k, scale)
            store(lows, k, (scale - load(scales, k, 0.0)) + low)
        found, scale = load(largest, i, like), load(scales, i, like)
        if is_log:
            scale = log1p(scale)
        store(scales, i, where(found - found == zero, scale, splat(scalar(np.nan, like))))


@inline
def _write_block(x, origin, out, out_origin, low, high, n_classes, shift, scale, scale_low, is_log):
    """:func:`entry` of the classes ``low .. high``."""
    n_lanes = lanes(scale)
    shifts, scales, lows = None if shift is None else splat(shift), splat(scale), splat(scale_low)
    end = low + (high - low) // n_lanes * n_lanes
    for c in range(low, end + n_lanes, n_lanes):
        begin = c
        if c == end:
            if end == high:
                break
            begin, _, _ = tail(low, high, n_classes, n_lanes)
        v = load(x, begin - origin, scale)
        store(out, begin - out_origin, entry(v, shifts, scales, lows, is_log))


@inline
def _write_row(
    x, offset, stride, begin, end, n_classes, out, out_offset, out_stride, shift, scale, scale_low, is_log, stage,
    out_stage,
):  # fmt: skip
    """:func:`entry` of the classes ``begin .. end`` of a row; without ``shift``, ``x`` is what was kept of it."""
    n_lanes = lanes(scale)
    direct = out_stride == 1 and n_classes >= n_lanes
    for low in range(begin, end, BLOCK):
        high = min(low + BLOCK, end)
        first = max(0, min(low, high - n_lanes))
        sink = out if direct else out_stage
        sink_origin = -out_offset if direct else first
        if shift is None:
            _write_block(x, 0, sink, sink_origin, low, high, n_classes, None, scale, scale_low, is_log)
        else:
            source, origin = _block_of(x, offset, stride, low, high, n_classes, n_lanes, stage)
            _write_block(source, origin, sink, sink_origin, low, high, n_classes, shift, scale, scale_low, is_log)
        if not direct:
            for c in range(low, high):
                out[out_offset + c * out_stride] = out_stage[c - first]


@inline
def can_scale(geometry, like):
    """Whether :func:`scaled_tile` serves: log_softmax has nothing to keep."""
    return geometry[tiles.N_CLASSES] <= GROUP and geometry[tiles.IS_LOG] == 0


@inline
def scaled_tile(x, geometry, start, offsets, n, out, out_offsets, scratch):
    """Write the softmax of each row of a tile: of rows that are one group.

    The exponentials that are summed are kept in the first-level cache, and scaled. To compute them anew takes 1.06 to
    1.16 times as long for 65,536 x 500, half of whose time are new pages, and 1.3 to 1.5 times for 2000 x 500. (Kept in
    the result instead, they are slower than that in the caches.)
    """
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    out_stride = tiles.class_stride(geometry, tiles.SECOND)
    stages, kept, like = (scratch.stage, scratch.other_stage), scratch.kept, scratch.kept[0]
    known = scalar(np.nan, like)
    for i in range(n):
        to_next = offsets[i + 1] - offsets[i] if i + 1 < n else np.int64(0)
        largest, rest, lost, _, _, known = _max_shift_row(
            x, offsets[i], stride, 0, n_classes, n_classes, None, 0, stride, None, like, like, True, known, to_next,
            stages, kept,
        )  # fmt: skip
        inverse, low = inverse_sum(splat(rest), splat(lost), like)
        inverse = first_lane(inverse)
        scale = scalar(inverse if np.isfinite(largest) else np.nan, like)
        scale_low = scalar((inverse - np.float64(scale)) + first_lane(low), like)
        _write_row(
            kept, 0, 1, 0, n_classes, n_classes, out, out_offsets[i], out_stride, None, scale, scale_low, False, kept,
            scratch.out_stage,
        )  # fmt: skip


@inline
def write_tile(x, geometry, start, offsets, n, begin, end, out, out_offsets, shifts, scales, lows, is_log, scratch):
    """Write :func:`entry` of the classes ``begin .. end`` of each row of a tile."""
    n_classes = geometry[tiles.N_CLASSES]
    stride, out_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, tiles.SECOND)
    for i in range(n):
        _write_row(
            x, offsets[i], stride, begin, end, n_classes, out, out_offsets[i], out_stride, shifts[i], scales[i],
            lows[i], is_log, scratch.stage, scratch.out_stage,
        )  # fmt: skip
