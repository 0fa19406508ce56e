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
from fastloss._kernels._jit import Kernel, allocating, inline, subroutine
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
def _sum_again(x, geometry, offsets, n, targets, shifts, rest, stage):
    """Of a tile's rows that could not be summed relative to the target, sum relative to the maximum.

    ``shifts`` then holds what the maximum adds to each row's loss (0 for the others).
    """
    n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
    like = shifts[0]
    for i in range(n):
        if targets[i] < 0 or (rest[i] < LOG1P_LIMIT and np.isfinite(shifts[i])):
            shifts[i] = 0.0
        else:
            largest, rest[i], _, _ = rows.max_shift_row(
                x, offsets[i], stride, n_classes, None, 0, 0, None, like, like, False, like, (stage, stage)
            )
            shifts[i] = largest - shifts[i] if np.isfinite(largest) else np.nan


@subroutine
def _finish_targets(x, geometry, offsets, n, targets, shifts, rest, weight, options, loss, stage):
    """The losses of a tile from the sums of its rows.

    Computes, with s the sum of exp(x[c] - x[t]) over c != t, the loss w[t] * log1p(s).

    Method: shifting by the target keeps the digits of a small loss and needs no pass for the maximum. Where s is too
    large (the target lies some 88 below the maximum) or x[t] is no number, the row is summed again, shifted by the
    maximum.
    """
    again = 0
    for i in range(n):
        again += (targets[i] >= 0) & (not ((rest[i] < LOG1P_LIMIT) & (abs(shifts[i]) < np.inf)))
    if again:
        _sum_again(x, geometry, offsets, n, targets, shifts, rest, stage)
    for i in range(n):
        loss[i] = rest[i]
    log1p_all(loss, n)
    if again:
        for i in range(n):
            loss[i] += shifts[i]
    if options[tiles.IS_WEIGHTED]:
        for i in range(n):
            loss[i] *= weight[max(targets[i], 0)]
    for i in range(n):
        loss[i] = loss[i] if targets[i] >= 0 else 0.0


@inline
def deliver(totals, out, geometry, start, n, offsets, targets, loss, weight, options):
    """Write the losses of a tile, or add them, and the weights of its targets, to the totals."""
    if options[tiles.WANTS_ROWS]:
        put_rows(out, geometry, tiles.OUT, start, n, offsets, loss)
    if options[tiles.WANTS_SUM]:
        add_block(totals[0], loss, n)
        if options[tiles.IS_WEIGHTED]:
            for i in range(n):
                loss[i] = weight[targets[i]] if targets[i] >= 0 else 0.0
            add_block(totals[1], loss, n)


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

    @allocating
    def work(counter, totals, counts, x, target, weight, out, geometry, options):
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
            tile_sums(x, geometry, start, offsets, n, targets, near, shifts, rest, stage, scratch)
            _finish_targets(x, geometry, offsets, n, targets, shifts, rest, weight, options, loss, stage)
            deliver(totals, out, geometry, start, n, other_offsets, targets, loss, weight, options)

    def kernel(n_workers, totals, x, target, weight, out, geometry, options):
        counter = np.zeros(1, np.int64)
        states = np.zeros((n_workers, 2, STATE_SIZE), np.int64)
        counts = np.zeros((n_workers, 8), np.int64)
        for worker in prange(n_workers):
            work(counter, states[worker], counts[worker], x, target, weight, out, geometry, options)
        return collect(totals, states, counts)

    return Kernel(name, kernel)


@subroutine
def _special_loss(x, y, geometry, offset, y_offset, weight, keep, spread, largest, log_rest):
    """Sum mass * -log_softmax(x) of a row term by term, where it is not finite: the inf or NaN that its terms make.

    The mass is weight * (y * keep + spread), or without ``y`` the weight.
    """
    if not np.isfinite(largest):
        return np.nan
    stride, y_stride = tiles.class_stride(geometry, tiles.INPUT), tiles.class_stride(geometry, tiles.TARGET)
    total = 0.0
    for c in range(geometry[tiles.N_CLASSES]):
        logit = load_one(x, offset + c * stride, largest)
        mass = np.float64(weight[c])
        if y is not None:
            mass *= np.float64(load_one(y, y_offset + c * y_stride, largest)) * keep + spread
        total += mass * (np.float64(log_rest) + np.float64(largest - logit))
    return total


def _smoothed_cross_entropy(name, tile_sums):
    """Cross-entropy with index targets and label smoothing.

    Computes (1 - eps) * w[t] * (M - x[t] + L) + eps / C * (L * sum(w) + sum(w[c] * (M - x[c]))), with M the maximum and
    L log1p of the other terms' sum.

    Method: relative to the maximum, because there every term is positive: with most of the weight on a likely class,
    the terms relative to the target would cancel.
    """

    @allocating
    def work(counter, totals, counts, x, target, weight, out, geometry, options, smoothing):
        like = weight[0]
        n_classes, stride = geometry[tiles.N_CLASSES], tiles.class_stride(geometry, tiles.INPUT)
        width = geometry[tiles.TILE_ROWS] + tiles.PADDING
        scratch = planes.make_scratch(width, weight)
        stage = tiles.aligned(planes.BATCH * width, x)
        offsets = np.empty(width, np.int64)
        other_offsets = np.empty(width, np.int64)
        targets = np.empty(width, np.int64)
        near = np.empty(width, np.int32)
        largest = np.zeros(width, weight.dtype)
        loss = tiles.aligned(width, weight)
        rest = np.empty(width, np.float64)
        moment = np.empty(width, np.float64)
        mass = np.empty(width, np.float64)
        per_class = smoothing / n_classes
        while True:
            tile = next_task(counter)
            if tile >= geometry[tiles.N_TILES]:
                break
            start, n = tiles.tile_bounds(geometry, tile)
            tiles.row_offsets(geometry, tiles.TARGET, start, n, other_offsets)
            tiles.read_targets(target, other_offsets, n, n_classes, options, targets, near, counts)
            tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
            tile_sums(
                x, geometry, start, offsets, n, None, offsets, weight, like, like, False,
                largest, rest, moment, mass, (stage, stage), scratch,
            )  # fmt: skip
            for i in range(n):
                loss[i] = rest[i]
            log1p_all(loss, n)
            for i in range(n):
                if targets[i] < 0:
                    loss[i] = 0.0
                elif not np.isfinite(largest[i]):
                    loss[i] = np.nan
                else:
                    logit = load_one(x, offsets[i] + targets[i] * stride, like)
                    at_target = np.float64(largest[i] - logit) + np.float64(loss[i])
                    uniform = np.float64(loss[i]) * mass[i] + moment[i]
                    if not np.isfinite(uniform):
                        uniform = _special_loss(x, None, geometry, offsets[i], 0, weight, 1.0, 0.0, largest[i], loss[i])
                    loss[i] = (1.0 - smoothing) * (np.float64(weight[targets[i]]) * at_target) + per_class * uniform
            deliver(totals, out, geometry, start, n, other_offsets, targets, loss, weight, options)

    def kernel(n_workers, totals, x, target, weight, out, geometry, options, smoothing):
        counter = np.zeros(1, np.int64)
        states = np.zeros((n_workers, 2, STATE_SIZE), np.int64)
        counts = np.zeros((n_workers, 8), np.int64)
        for worker in prange(n_workers):
            work(counter, states[worker], counts[worker], x, target, weight, out, geometry, options, smoothing)
        return collect(totals, states, counts)

    return Kernel(name, kernel)


def _probabilities(name, tile_sums):
    """Cross-entropy with class probabilities: -sum(w * y * log_softmax(x)), y smoothed to y * keep + spread.

    Method: with M the maximum and L = log1p of the other terms' sum, the loss is L * sum(w y) + sum(w y (M - x)):
    nothing cancels where weights and probabilities are not negative, so a small loss keeps its digits.
    """

    @allocating
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
                x, geometry, start, offsets, n, y, y_offsets, weight, scalar(keep, like), scalar(spread, like), False,
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

    @allocating
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
                x, geometry, start, offsets, n, None, offsets, None, like, like, False,
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
smoothed_rows = _smoothed_cross_entropy("smoothed_rows", rows.max_shift_tile)
smoothed_planes = _smoothed_cross_entropy("smoothed_planes", planes.max_shift_tile)
probabilities_rows = _probabilities("probabilities_rows", rows.max_shift_tile)
probabilities_planes = _probabilities("probabilities_planes", planes.max_shift_tile)
logsumexp_rows = _logsumexp("logsumexp_rows", rows.max_shift_tile)
logsumexp_planes = _logsumexp("logsumexp_planes", planes.max_shift_tile)
