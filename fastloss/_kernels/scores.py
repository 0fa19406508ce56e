"""Metrics that average one value per row: log loss of probabilities, Brier score and top-k accuracy of logits.

A kernel takes the number of workers, the totals to add to (int64, the exact sums of the values and of the weights), the
scores as flat memory, the codes of the true classes, the weights of the rows (empty if there are none), a table of
integers (the indices below) and two parameters. It returns both sums, rounded once, and how often it met each fault.
One column of scores stands for two classes: it is the score of the second one.

All arithmetic is in float64, on values converted exactly. The scores are read from memory once, and nothing but the
values of a tile is stored.
"""

import numpy as np
from numba import prange

from fastloss._kernels._jit import Kernel, allocating, inline, subroutine
from fastloss._kernels._simd import any_lane, iota, load, next_task, splat, store, tree_max, tree_sum, where
from fastloss._kernels._vecmath import exp, log
from fastloss._kernels.sums import STATE_SIZE, add_block, add_state, rounded

# The table: rows and classes, rows of a tile, tiles, where the first score lies, and the strides.
N_ROWS, N_CLASSES, TILE_ROWS, N_TILES, ORIGIN, ROW_STRIDE, CLASS_STRIDE = range(7)

# What a kernel counts: tiles (log loss) or rows with a value that has no meaning; rows that do not sum to one.
INVALID, NOT_NORMALISED = range(2)

_LANES = 8


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
def _log_loss_tile(x, table, offset, codes, n, parameters, values, scratch, faults):
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


@inline
def _stage(x, offset, class_stride, n_classes, stage):
    """Copy a row of logits, padded with -inf to whole vectors; its largest one, NaN if it has no softmax.

    One logit z of the second of two classes becomes -z and 0, or 0 and z: the one of the two without a positive number.
    """
    is_nan = False
    if n_classes == 1:
        z = np.float64(x[offset])
        stage[0], stage[1] = -max(z, 0.0), min(z, 0.0)
        is_nan = z != z
    else:
        for c in range(n_classes):
            v = np.float64(x[offset + c * class_stride])
            stage[c] = v
            is_nan |= v != v
    n = max(n_classes, 2)
    for c in range(n, _padded(n)):
        stage[c] = -np.inf
    largest = load(stage, 0, 0.0)
    for c in range(_LANES, n, _LANES):
        v = load(stage, c, 0.0)
        largest = where(v > largest, v, largest)
    result = tree_max(largest)
    return np.nan if is_nan or not np.isfinite(result) else result


@inline
def _padded(n):
    return (n + _LANES - 1) // _LANES * _LANES


@subroutine
def _brier_tile(x, table, offset, codes, n, parameters, values, scratch, faults):
    """The Brier scores sum((p - y)**2) of a tile's rows, with p the softmax and y the one-hot class.

    With e = exp(x - M), A = sum(e[c]) and B = sum(e[c]**2) over the wrong classes, it is (A**2 + B) / (A + e[t])**2: a
    sum of positive numbers, in which nothing cancels where p[t] is nearly 1.
    """
    n_classes = table[N_CLASSES]
    zero, lane = splat(0.0), iota(0.0)
    invalid = 0
    for i in range(n):
        row = offset + i * table[ROW_STRIDE]
        largest = _stage(x, row, table[CLASS_STRIDE], n_classes, scratch)
        if largest != largest:
            invalid += 1
        total, squares, own = zero, zero, zero
        target = splat(np.int64(codes[i]))
        for c in range(0, max(n_classes, 2), _LANES):
            e = exp(load(scratch, c, 0.0) - splat(largest))
            is_own = lane + splat(np.int64(c)) == target
            own = where(is_own, e, own)
            e = where(is_own, zero, e)
            total = total + e
            squares = squares + e * e
        others = tree_sum(total)
        whole = others + tree_sum(own)
        values[i] = (others * others + tree_sum(squares)) / (whole * whole)
    faults[INVALID] += invalid


@subroutine
def _top_k_tile(x, table, offset, codes, n, parameters, values, scratch, faults):
    """1 for the rows of a tile with fewer than k = ``parameters[0]`` classes before the true one, else 0.

    Larger logits come first, and of equal ones the last. With one column the second class takes a positive logit.
    """
    n_classes = table[N_CLASSES]
    one, zero, lane = splat(1.0), splat(0.0), iota(0.0)
    invalid = 0
    for i in range(n):
        row = offset + i * table[ROW_STRIDE]
        largest = _stage(x, row, table[CLASS_STRIDE], n_classes, scratch)
        if largest != largest:
            invalid += 1
        code = np.int64(codes[i])
        if n_classes == 1:
            values[i] = parameters[0] > 1.0 or (x[row] > 0.0) == (code == 1)
        else:
            own, target = splat(scratch[code]), splat(code)
            end = _padded(n_classes)
            before = zero
            for c in range(0, end, _LANES):
                v = load(scratch, c, 0.0)
                is_before = (v > own) | ((v == own) & (lane + splat(np.int64(c)) > target))
                before = before + where(is_before, one, zero)
            rank = tree_sum(before) - (end - n_classes if scratch[code] == -np.inf else 0)
            values[i] = 1.0 if rank < parameters[0] else 0.0
    faults[INVALID] += invalid


# ------------------------------------------------------------------------------------------------------ the kernels


def _average(name, tile_values):
    """A kernel that sums the values of all rows and the weights."""

    @allocating
    def work(counter, totals, faults, x, codes, weights, table, parameters):
        n_rows, size = table[N_ROWS], table[TILE_ROWS]
        values = np.zeros(size + 2 * _LANES, np.float64)
        scratch = np.empty(max(size, table[N_CLASSES]) + 2 * _LANES, np.float64)
        is_weighted = len(weights) > 0
        while True:
            tile = next_task(counter)
            if tile >= table[N_TILES]:
                break
            start = tile * size
            n = min(size, n_rows - start)
            offset = table[ORIGIN] + start * table[ROW_STRIDE]
            tile_values(x, table, offset, codes[start : start + n], n, parameters, values, scratch, faults)
            if is_weighted:
                for i in range(n):
                    values[i] *= weights[start + i]
            add_block(totals[0], values, n)
            if is_weighted:
                for i in range(n):
                    values[i] = weights[start + i]
                add_block(totals[1], values, n)

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


log_loss = _average("log_loss", _log_loss_tile)
brier = _average("brier", _brier_tile)
top_k = _average("top_k", _top_k_tile)
