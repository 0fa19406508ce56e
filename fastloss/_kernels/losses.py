"""The kernels of cross-entropy and log-sum-exp: tiles of rows, taken in turn by the workers.

Each kernel exists twice, over the tile functions of :mod:`rows` (contiguous class axis) and of :mod:`planes` (any
other, and few classes); the two give the same bits.

A kernel takes the number of workers, the totals to add to (int64, one row per exact sum of :mod:`sums`), its arrays as
flat memory and the geometry; it returns the sum, the sum of the weights (both rounded once, from the totals), how many
rows were kept, and how many targets were out of range. It never raises and never allocates per row.
"""

import numpy as np
from numba import prange

from fastloss._kernels import planes, rows, tiles
from fastloss._kernels._jit import Kernel, subroutine
from fastloss._kernels._simd import lanes, load, load_one, next_task, scalar, store
from fastloss._kernels._vecmath import LOG1P_LIMIT, log1p
from fastloss._kernels.sums import STATE_SIZE, add_block, add_state, rounded


@subroutine
def log1p_all(values, n):
    """log1p of ``values[:n]`` in place, a vector at a time."""
    like = values[0]
    for i in range(0, n, lanes(like)):
        store(values, i, log1p(load(values, i, like)))


@subroutine
def _finish_targets(
    x, geometry, offsets, n, targets, shifts, rest, difference, weight, options, smoothing, total_weight, loss, stage
):
    """The losses of a tile from the sums of its rows.

    Computes, with s the sum of exp(x[c] - x[t]) over c != t: loss = log1p(s); with smoothing eps the mean over the
    classes enters as (1 - eps) * w[t] * loss + eps / C * (sum(w) * log1p(s) + sum(w[c] * (x[t] - x[c]))).

    Method: shifting by the target keeps the digits of a small loss and needs no pass for the maximum. Where s is too
    large (the target lies some 88 below the maximum) or x[t] is no number, the row is summed again, shifted by the
    maximum.
    """
    like = weight[0]
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    again = 0
    for i in range(n):
        again += (targets[i] >= 0) & (not ((rest[i] < LOG1P_LIMIT) & (abs(shifts[i]) < np.inf)))
    if again:
        for i in range(n):
            if targets[i] < 0 or (rest[i] < LOG1P_LIMIT and np.isfinite(shifts[i])):
                shifts[i] = 0.0
            else:
                largest, rest[i], difference[i], _ = rows.max_shift_row(
                    x, offsets[i], stride, n_classes, None, 0, 0, weight,
                    scalar(1.0, like), scalar(0.0, like), like, (stage, stage),
                )  # fmt: skip
                shifts[i] = largest - shifts[i] if np.isfinite(largest) else scalar(np.nan, like)
    for i in range(n):
        loss[i] = rest[i]
    log1p_all(loss, n)
    smoothed = options[tiles.IS_SMOOTHED] != 0
    if smoothed or options[tiles.IS_WEIGHTED]:
        per_class = smoothing / n_classes
        for i in range(n):
            w = np.float64(weight[max(targets[i], 0)])
            value = w * np.float64(loss[i] + shifts[i] if again else loss[i])
            if smoothed:
                mean = total_weight * np.float64(loss[i]) + difference[i]
                value = (1.0 - smoothing) * value + per_class * mean
            loss[i] = value
    elif again:
        for i in range(n):
            loss[i] += shifts[i]
    for i in range(n):
        loss[i] = loss[i] if targets[i] >= 0 else 0.0


@subroutine
def put_rows(out, geometry, array, start, n, offsets, values):
    """Write the results of a tile's rows."""
    tiles.row_offsets(geometry, array, start, n, offsets)
    for i in range(n):
        out[offsets[i]] = values[i]


@subroutine
def collect(totals, states, counts):
    """Add what the workers have to the totals: the sums so far, rounded, the rows kept and the targets out of range."""
    kept, bad = 0, 0
    for worker in range(len(states)):
        add_state(totals[0], states[worker, 0])
        add_state(totals[1], states[worker, 1])
        kept += counts[worker, tiles.KEPT]
        bad += counts[worker, tiles.BAD]
    return rounded(totals[0]), rounded(totals[1]), kept, bad


def _cross_entropy(name, tile_sums):
    """Cross-entropy with index targets."""

    @subroutine
    def work(counter, totals, counts, x, target, weight, out, geometry, options, smoothing, total_weight):
        like = weight[0]
        n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
        width = geometry[tiles.TILE_ROWS] + tiles.PADDING
        scratch = planes.make_scratch(width, weight)
        stage = tiles.aligned(planes.BATCH * width, x)
        offsets = np.empty(width, np.int64)
        other_offsets = np.empty(width, np.int64)
        targets = np.empty(width, np.int64)
        near = np.empty(width, np.int32)
        shifts = tiles.aligned(width, weight)
        loss = tiles.aligned(width, weight)
        rest = np.empty(width, np.float64)
        difference = np.empty(width, np.float64)
        smoothed = options[tiles.IS_SMOOTHED] != 0
        while True:
            tile = next_task(counter)
            if tile >= geometry[tiles.N_TILES]:
                break
            start, n = tiles.tile_bounds(geometry, tile)
            tiles.row_offsets(geometry, tiles.TARGET, start, n, other_offsets)
            tiles.read_targets(target, other_offsets, n, n_classes, options, targets, near, counts)
            tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
            for i in range(n):
                shifts[i] = load_one(x, offsets[i] + max(targets[i], 0) * stride, like)
            tile_sums(
                x,
                geometry,
                start,
                offsets,
                n,
                targets,
                near,
                shifts,
                weight,
                smoothed,
                rest,
                difference,
                stage,
                scratch,
            )
            _finish_targets(
                x, geometry, offsets, n, targets, shifts, rest, difference,
                weight, options, smoothing, total_weight, loss, stage,
            )  # fmt: skip
            if options[tiles.WANTS_ROWS]:
                put_rows(out, geometry, tiles.OUT, start, n, other_offsets, loss)
            if options[tiles.WANTS_SUM]:
                add_block(totals[0], loss, n)
                if options[tiles.IS_WEIGHTED]:
                    for i in range(n):
                        loss[i] = weight[targets[i]] if targets[i] >= 0 else 0.0
                    add_block(totals[1], loss, n)

    def kernel(n_workers, totals, x, target, weight, out, geometry, options, smoothing, total_weight):
        counter = np.zeros(1, np.int64)
        states = np.zeros((n_workers, 2, STATE_SIZE), np.int64)
        counts = np.zeros((n_workers, 8), np.int64)
        for worker in prange(n_workers):
            work(
                counter, states[worker], counts[worker], x, target, weight, out,
                geometry, options, smoothing, total_weight,
            )  # fmt: skip
        return collect(totals, states, counts)

    return Kernel(name, kernel)


@subroutine
def _special_loss(x, y, geometry, offset, y_offset, weight, keep, spread, largest, log_rest):
    """The loss of a row that is not finite, term by term, so that it is the infinity or NaN that its terms make."""
    if not np.isfinite(largest):
        return np.nan
    stride, y_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, tiles.TARGET)
    total = 0.0
    for c in range(geometry[tiles.N_CLASSES]):
        logit = load_one(x, offset + c * stride, largest)
        mass = np.float64(weight[c]) * (np.float64(load_one(y, y_offset + c * y_stride, largest)) * keep + spread)
        total += mass * (np.float64(log_rest) + np.float64(largest - logit))
    return total


def _probabilities(name, tile_sums):
    """Cross-entropy with class probabilities: -sum(w * y * log_softmax(x)), y smoothed to y * keep + spread.

    Method: with M the maximum and L = log1p of the other terms' sum, the loss is L * sum(w y) + sum(w y (M - x)):
    nothing cancels where weights and probabilities are not negative, so a small loss keeps its digits.
    """

    @subroutine
    def work(counter, totals, x, y, weight, out, geometry, options, keep, spread):
        like = weight[0]
        width = geometry[tiles.TILE_ROWS] + tiles.PADDING
        scratch = planes.make_scratch(width, weight)
        stages = (tiles.aligned(planes.BATCH * width, x), tiles.aligned(planes.BATCH * width, y))
        offsets = np.empty(width, np.int64)
        y_offsets = np.empty(width, np.int64)
        largest = tiles.aligned(width, weight)
        loss = tiles.aligned(width, weight)
        rest = np.empty(width, np.float64)
        moment = np.zeros(width, np.float64)
        mass = np.zeros(width, np.float64)
        while True:
            tile = next_task(counter)
            if tile >= geometry[tiles.N_TILES]:
                break
            start, n = tiles.tile_bounds(geometry, tile)
            tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
            tiles.row_offsets(geometry, tiles.TARGET, start, n, y_offsets)
            tile_sums(
                x, geometry, start, offsets, n, y, y_offsets, weight, scalar(keep, like), scalar(spread, like),
                largest, rest, moment, mass, stages, scratch,
            )  # fmt: skip
            for i in range(n):
                loss[i] = rest[i]
            log1p_all(loss, n)
            for i in range(n):
                value = np.float64(loss[i]) * mass[i] + moment[i]
                if not np.isfinite(value):
                    value = _special_loss(
                        x, y, geometry, offsets[i], y_offsets[i], weight, keep, spread, largest[i], loss[i]
                    )
                loss[i] = value
            if options[tiles.WANTS_ROWS]:
                put_rows(out, geometry, tiles.OUT, start, n, offsets, loss)
            if options[tiles.WANTS_SUM]:
                add_block(totals[0], loss, n)

    def kernel(n_workers, totals, x, y, weight, out, geometry, options, keep, spread):
        counter = np.zeros(1, np.int64)
        states = np.zeros((n_workers, 2, STATE_SIZE), np.int64)
        for worker in prange(n_workers):
            work(counter, states[worker], x, y, weight, out, geometry, options, keep, spread)
        return collect(totals, states, np.zeros((n_workers, 2), np.int64))

    return Kernel(name, kernel)


def _logsumexp(name, tile_sums):
    """Log-sum-exp: the maximum plus log1p of the other terms' sum."""

    @subroutine
    def work(counter, x, out, geometry):
        like = out[0]
        width = geometry[tiles.TILE_ROWS] + tiles.PADDING
        scratch = planes.make_scratch(width, out)
        stage = tiles.aligned(planes.BATCH * width, x)
        offsets = np.empty(width, np.int64)
        largest = tiles.aligned(width, out)
        result = tiles.aligned(width, out)
        rest = np.empty(width, np.float64)
        unused = np.zeros(width, np.float64)
        while True:
            tile = next_task(counter)
            if tile >= geometry[tiles.N_TILES]:
                break
            start, n = tiles.tile_bounds(geometry, tile)
            tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
            tile_sums(
                x, geometry, start, offsets, n, None, offsets, None, like, like,
                largest, rest, unused, unused, (stage, stage), scratch,
            )  # fmt: skip
            for i in range(n):
                result[i] = rest[i]
            log1p_all(result, n)
            for i in range(n):
                result[i] += largest[i]
            put_rows(out, geometry, tiles.SECOND, start, n, offsets, result)

    def kernel(n_workers, x, out, geometry):
        counter = np.zeros(1, np.int64)
        for _ in prange(n_workers):
            work(counter, x, out, geometry)

    return Kernel(name, kernel)


cross_entropy_rows = _cross_entropy("cross_entropy_rows", rows.target_tile)
cross_entropy_planes = _cross_entropy("cross_entropy_planes", planes.target_tile)
probabilities_rows = _probabilities("probabilities_rows", rows.max_shift_tile)
probabilities_planes = _probabilities("probabilities_planes", planes.max_shift_tile)
logsumexp_rows = _logsumexp("logsumexp_rows", rows.max_shift_tile)
logsumexp_planes = _logsumexp("logsumexp_planes", planes.max_shift_tile)
