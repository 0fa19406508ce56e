"""Metrics that average one value per row: log loss of probabilities, Brier score and top-k accuracy of logits.

A kernel takes the number of workers, the totals to add to (int64, the exact sums of the values and of the weights), the
scores as flat memory, the codes of the true classes, the weights of the rows (empty if there are none), a table of
integers (the indices below) and two parameters. It returns both sums, rounded once, and how often it met each fault.
One column of scores stands for two classes: it is the score of the second one.

Log loss is computed in float64, on values converted exactly; the terms of a Brier score in the dtype of the logits. The
scores are read from memory once, and nothing but the values of a tile is stored.
"""

import numpy as np
from numba import prange

from fastloss._kernels._jit import Kernel, allocating, inline, subroutine
from fastloss._kernels._simd import (
    any_lane,
    copy,
    first_lane,
    integer_like,
    iota,
    lanes,
    load,
    load_columns,
    next_task,
    scalar,
    splat,
    store,
    tree_sum,
    where,
)
from fastloss._kernels._vecmath import exp, exp_difference, log
from fastloss._kernels.sums import FIRST_GUESS, STATE_SIZE, add_block, add_state, rounded

# The table: rows and classes, rows of a tile, tiles, where the first score lies, and the strides.
N_ROWS, N_CLASSES, TILE_ROWS, N_TILES, ORIGIN, ROW_STRIDE, CLASS_STRIDE = range(7)

# What a kernel counts: tiles, groups or rows with a value that has no meaning; rows that do not sum to one.
INVALID, NOT_NORMALISED = range(2)

_LANES, _MOST_LANES = 8, 16

# Classes of a group of rows that are staged at a time, and those whose terms are added before they go to float64.
BLOCK = 256
BATCH = 16

# Classes from which on a row is summed by itself: few of its last vector are then left over.
_WIDE = 48


# ----------------------------------------------------------------------------------------------------------- log loss


@inline
def _checked_sum(x, offset, n_classes):
    """The sum of a row of probabilities, and whether one of them lies outside [0, 1] or is NaN."""
    zero, one, total = splat(0.0), splat(1.0), splat(0.0)
    outside = zero != zero
    end = n_classes // _LANES * _LANES
    for c in range(0, end, _LANES):
        v = load(x, offset + c, 0.0)
        outside = outside | (v < zero) | (v > one)
        total = total + v
    result = tree_sum(total)
    is_outside = any_lane(outside)
    for c in range(end, n_classes):
        v = np.float64(x[offset + c])
        is_outside |= v < 0.0 or v > 1.0
        result += v
    return result, is_outside or result != result


@inline
def _checked_sums(x, offset, class_stride, n, n_classes, sums):
    """:func:`_checked_sum` of ``n`` rows that lie side by side, a vector of rows at a time; whether any is invalid."""
    zero, one = splat(0.0), splat(1.0)
    outside = zero != zero
    is_outside = False
    end = n // _LANES * _LANES
    for i in range(n):
        sums[i] = 0.0
    for c in range(n_classes):
        at = offset + c * class_stride
        for i in range(0, end, _LANES):
            v = load(x, at + i, 0.0)
            outside = outside | (v < zero) | (v > one)
            store(sums, i, load(sums, i, 0.0) + v)
        for i in range(end, n):
            v = np.float64(x[at + i])
            is_outside |= v < 0.0 or v > 1.0
            sums[i] += v
    for i in range(n):
        is_outside |= sums[i] != sums[i]
    return is_outside or any_lane(outside)


@subroutine
def _log_loss_tile(x, table, offset, codes, n, parameters, values, scratch, stage, group, faults):
    """The log losses -log(clip(p[t], eps, 1 - eps)) of a tile, and the checks that its probabilities are ones.

    ``parameters``: eps, and how far the sum of a row may be from 1.
    """
    n_classes, row_stride, class_stride = table[N_CLASSES], table[ROW_STRIDE], table[CLASS_STRIDE]
    tolerance = parameters[1]
    invalid, not_normalised = 0, 0
    if n_classes == 1:
        for i in range(n):
            p = x[offset + i * row_stride]
            invalid += not (p >= 0.0 and p <= 1.0)
            # The complement is rounded to the dtype of the probabilities, as scikit-learn does it.
            values[i] = p if codes[i] else np.float32(1.0) - p
    else:
        if class_stride != 1 and row_stride == 1:
            invalid += _checked_sums(x, offset, class_stride, n, n_classes, scratch)
            for i in range(n):
                not_normalised += not abs(scratch[i] - 1.0) <= tolerance
        else:
            for i in range(n):
                row = offset + i * row_stride
                if class_stride == 1:
                    total, is_invalid = _checked_sum(x, row, n_classes)
                else:
                    for c in range(n_classes):
                        scratch[c] = x[row + c * class_stride]
                    total, is_invalid = _checked_sum(scratch, 0, n_classes)
                invalid += is_invalid
                not_normalised += not abs(total - 1.0) <= tolerance
        for i in range(n):
            values[i] = x[offset + i * row_stride + codes[i] * class_stride]
    lowest, highest = splat(parameters[0]), splat(1.0 - parameters[0])
    for i in range(0, n, _LANES):
        p = load(values, i, 0.0)
        p = where(p < lowest, lowest, p)
        p = where(p > highest, highest, p)
        store(values, i, -log(p))
    faults[INVALID] += invalid
    faults[NOT_NORMALISED] += not_normalised


# -------------------------------------------------------------------------------------------- metrics of logits

# A vector holds the same class of as many rows, so that nothing is summed across its lanes. A group of rows is brought
# into that order in a stage, some classes at a time.


@inline
def _group_offsets(offset, row_stride, count, width, offsets):
    """Where the rows of a group begin; those that are missing in the last group are the last row again."""
    for i in range(width):
        offsets[i] = offset + min(i, count - 1) * row_stride


@inline
def _stage_classes(x, offsets, class_stride, width, low, high, like, stage):
    """Copy the classes ``low .. high`` of a group of ``width = lanes(like)`` rows: a vector for each class."""
    c = low
    if class_stride == 1:
        while c + 4 <= high:
            columns = load_columns(x, offsets, 0, c, like)
            for k in range(4):
                store(stage, (c - low + k) * width, columns[k])
            c += 4
    elif offsets[width - 1] - offsets[0] == width - 1:  # the rows lie side by side
        while c < high:
            copy(stage, (c - low) * width, x, offsets[0] + c * class_stride, like)
            c += 1
    while c < high:
        for i in range(width):
            stage[(c - low) * width + i] = x[offsets[i] + c * class_stride]
        c += 1


@inline
def _add_odds(x, offsets, class_stride, n_classes, targets, width, like, stage, own, odds, squares):
    """For a group of rows, with e = exp(x - x[t]), the sums of e and of e**2 over the wrong classes, in float64.

    A lane adds at most :data:`BATCH` terms in the compute type.
    """
    zero = splat(scalar(0.0, like))
    for i in range(width):
        odds[i] = 0.0
        squares[i] = 0.0
        own[i] = x[offsets[i] + targets[i] * class_stride]
    shift = load(own, 0, like)
    for low in range(0, n_classes, BLOCK):
        high = min(low + BLOCK, n_classes)
        _stage_classes(x, offsets, class_stride, width, low, high, like, stage)
        for i in range(width):
            own[i] = targets[i] - low  # exact where it may be one of the block
        target = load(own, 0, like)
        for batch in range(0, high - low, BATCH):
            total, square = zero, zero
            for c in range(batch, min(batch + BATCH, high - low)):
                e = exp_difference(load(stage, c * width, like), shift)
                e = where(target == splat(scalar(c, like)), zero, e)
                total = total + e
                square = square + e * e
            store(own, 0, total)
            store(own, width, square)
            for i in range(width):
                odds[i] += own[i]
                squares[i] += own[width + i]


@inline
def _odds_of_row(x, offset, class_stride, n_classes, code, like, stage):
    """The same for one row, whose classes fill vectors: lane by lane, then across."""
    width = lanes(like)
    shift, lane, zero = splat(x[offset + code * class_stride]), iota(like), splat(scalar(0.0, like))
    odds, squares = 0.0, 0.0
    for low in range(0, n_classes, BLOCK):
        high = min(low + BLOCK, n_classes)
        source, origin = x, offset + low
        if class_stride != 1 or offset + high + width > len(x):
            source, origin = stage, np.int64(0)
            for c in range(low, high):
                stage[c - low] = x[offset + c * class_stride]
        count = splat(integer_like(high - low, like))
        target = splat(integer_like(code - low if low <= code < high else np.int64(-1), like))
        total, square = zero, zero
        for c in range(0, high - low, width):
            place = lane + splat(integer_like(c, like))
            e = exp_difference(load(source, origin + c, like), shift)
            e = where((place < count) & (place != target), e, zero)
            total = total + e
            square = square + e * e
        odds += np.float64(tree_sum(total))
        squares += np.float64(tree_sum(square))
    return odds, squares


@inline
def _binary_odds(x, offsets, targets, width, like, own, odds, squares):
    """The same for one column: the other class has the logit 0."""
    for i in range(width):
        z = x[offsets[i]]
        own[i] = z if targets[i] == 0 else -z
    store(own, 0, exp(load(own, 0, like)))
    for i in range(width):
        odds[i] = own[i]
        squares[i] = odds[i] * odds[i]


@inline
def _exp_of(d):
    return first_lane(exp(splat(d)))


@subroutine
def _brier_of_row(x, row, class_stride, n_classes, code):
    """The Brier score of a row whose target lies far below or above the others; NaN if it has no softmax.

    As below, with the largest logit instead of the target's.
    """
    if n_classes == 1:
        z = np.float64(x[row])
        e = _exp_of(-abs(z))
        wrong = (1.0 if (z > 0.0) == (code == 0) else e) / (1.0 + e)
        return 2.0 * wrong * wrong
    largest = -np.inf
    for c in range(n_classes):
        v = np.float64(x[row + c * class_stride])
        if v != v:
            return np.nan
        largest = max(largest, v)
    if not np.isfinite(largest):
        return np.nan
    others, squares = 0.0, 0.0
    for c in range(n_classes):
        if c != code:
            e = _exp_of(np.float64(x[row + c * class_stride]) - largest)
            others += e
            squares += e * e
    whole = others + _exp_of(np.float64(x[row + code * class_stride]) - largest)
    return (others * others + squares) / (whole * whole)


@subroutine
def _brier_tile(x, table, offset, codes, n, parameters, values, scratch, stage, group, faults):
    """The Brier scores sum((p - y)**2) of a tile's rows, with p the softmax and y the one-hot class.

    With A = sum(exp(x[c] - x[t])) and B = sum(exp(x[c] - x[t])**2) over the wrong classes, it is
    (A**2 + B) / (1 + A)**2: a sum of positive numbers, in which nothing cancels where p[t] is nearly 1.
    """
    n_classes, row_stride, class_stride = table[N_CLASSES], table[ROW_STRIDE], table[CLASS_STRIDE]
    offsets, targets, odds, squares = group[0], group[1], scratch, scratch[_MOST_LANES:]
    like = x[0]
    width = lanes(like)
    own = stage[BLOCK * width :]
    # Between the limits e**2 neither overflows nor loses digits that count by underflow.
    limit = 2.0**500 if width == _LANES else 2.0**50
    invalid = 0
    for first in range(0, n, width):
        count = min(width, n - first)
        _group_offsets(offset + first * row_stride, row_stride, count, width, offsets)
        for i in range(width):
            targets[i] = codes[first + min(i, count - 1)]
        if n_classes == 1:
            _binary_odds(x, offsets, targets, width, like, own, odds, squares)
        elif n_classes >= _WIDE:
            for i in range(count):
                odds[i], squares[i] = _odds_of_row(x, offsets[i], class_stride, n_classes, targets[i], like, stage)
        else:
            _add_odds(x, offsets, class_stride, n_classes, targets, width, like, stage, own, odds, squares)
        for i in range(count):
            a = odds[i]
            if a * limit > 1.0 and a < limit:
                values[first + i] = (a * a + squares[i]) / ((1.0 + a) * (1.0 + a))
            else:
                score = _brier_of_row(x, offsets[i], class_stride, n_classes, targets[i])
                invalid += score != score
                values[first + i] = score
    faults[INVALID] += invalid


@inline
def _rank(x, offsets, class_stride, n_classes, targets, width, like, stage, counts):
    """Write how many classes come before the target of each row of a group; whether a row has no softmax, by lanes."""
    zero, one, infinite = splat(scalar(0.0, like)), splat(scalar(1.0, like)), splat(scalar(np.inf, like))
    for i in range(width):
        counts[i] = x[offsets[i] + targets[i] * class_stride]
    own = load(counts, 0, like)
    masked = zero - infinite
    before, bad, largest = zero, zero != zero, masked
    for low in range(0, n_classes, BLOCK):
        high = min(low + BLOCK, n_classes)
        for i in range(width):
            counts[i] = targets[i] - low
        target = load(counts, 0, like)
        _stage_classes(x, offsets, class_stride, width, low, high, like, stage)
        for c in range(low, high):
            v = load(stage, (c - low) * width, like)
            is_before = (v > own) | ((v == own) & (splat(scalar(c - low, like)) > target))
            before = before + where(is_before, one, zero)
            bad = bad | (v != v) | (v == infinite)
            largest = where(v > largest, v, largest)
    store(counts, 0, before)
    return bad | (largest == masked)


@subroutine
def _top_k_tile(x, table, offset, codes, n, parameters, values, scratch, stage, group, faults):
    """1 for the rows of a tile with fewer than k = ``parameters[0]`` classes before the true one, else 0.

    Larger logits come first, and of equal ones the last. With one column the second class takes a positive logit.
    """
    n_classes, row_stride, class_stride = table[N_CLASSES], table[ROW_STRIDE], table[CLASS_STRIDE]
    k = parameters[0]
    invalid = 0
    if n_classes == 1:
        for i in range(n):
            z = x[offset + i * row_stride]
            invalid += z != z
            values[i] = k > 1.0 or (z > 0.0) == (codes[i] == 1)
    else:
        offsets, targets = group[0], group[1]
        like = x[0]
        width = lanes(like)
        counts = stage[BLOCK * width :]
        for first in range(0, n, width):
            count = min(width, n - first)
            _group_offsets(offset + first * row_stride, row_stride, count, width, offsets)
            for i in range(width):
                targets[i] = codes[first + min(i, count - 1)]
            bad = _rank(x, offsets, class_stride, n_classes, targets, width, like, stage, counts)
            invalid += any_lane(bad)
            for i in range(count):
                values[first + i] = counts[i] < k
    faults[INVALID] += invalid


# ------------------------------------------------------------------------------------------------------ the kernels


def _average(name, tile_values, has_stage=True):
    """A kernel that sums the values of all rows and the weights."""

    @allocating
    def work(counter, totals, faults, x, codes, weights, table, parameters):
        n_rows, size = table[N_ROWS], table[TILE_ROWS]
        values = np.zeros(size + 2 * _LANES, np.float64)
        # One value per row or per class where the classes do not lie side by side, and a few else.
        staged = max(size, table[N_CLASSES]) if table[CLASS_STRIDE] != 1 else np.int64(0)
        scratch = np.empty(staged + 2 * _MOST_LANES, np.float64)
        stage = np.empty((BLOCK + 2) * _MOST_LANES if has_stage else 0, x.dtype)
        group = np.empty((2, _MOST_LANES), np.int64)
        is_weighted = len(weights) > 0
        guess, weight_guess = np.int64(FIRST_GUESS), np.int64(FIRST_GUESS)
        while True:
            tile = next_task(counter)
            if tile >= table[N_TILES]:
                break
            start = tile * size
            n = min(size, n_rows - start)
            offset = table[ORIGIN] + start * table[ROW_STRIDE]
            tile_codes = codes[start : start + n]
            tile_values(x, table, offset, tile_codes, n, parameters, values, scratch, stage, group, faults)
            if is_weighted:
                for i in range(n):
                    values[i] *= weights[start + i]
            guess = add_block(totals[0], values, n, guess)
            if is_weighted:
                for i in range(n):
                    values[i] = weights[start + i]
                weight_guess = add_block(totals[1], values, n, weight_guess)

    def kernel(n_workers, totals, x, codes, weights, table, parameters):
        counter = np.zeros(1, np.int64)
        states = np.zeros((n_workers, 2, STATE_SIZE), np.int64)
        faults = np.zeros((n_workers, 8), np.int64)
        for worker in prange(n_workers):
            work(counter, states[worker], faults[worker], x, codes, weights, table, parameters)
        invalid, not_normalised = 0, 0
        for worker in range(n_workers):
            add_state(totals[0], states[worker, 0])
            add_state(totals[1], states[worker, 1])
            invalid += faults[worker, INVALID]
            not_normalised += faults[worker, NOT_NORMALISED]
        return rounded(totals[0]), rounded(totals[1]), invalid, not_normalised

    return Kernel(name, kernel)


log_loss = _average("log_loss", _log_loss_tile, has_stage=False)
brier = _average("brier", _brier_tile)
top_k = _average("top_k", _top_k_tile)
