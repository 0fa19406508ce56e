"""The kernel of the Kullback-Leibler divergence: element by element, over two arrays of one broadcast shape."""

import numpy as np
from numba import prange

from fastloss._kernels import planes, tiles
from fastloss._kernels._jit import Kernel, allocating, inline, subroutine
from fastloss._kernels._simd import first_lane, fma, lanes, load, next_task, scalar, splat, store, where
from fastloss._kernels._vecmath import exp, log
from fastloss._kernels.losses import collect
from fastloss._kernels.sums import STATE_SIZE, add_block


@inline
def _divergence(x, y):
    """xlogy(y, y) - y * x, in float64 whatever the data: log(y) and x cancel where the distributions are close."""
    zero = splat(0.0)
    return fma(-y, x, where(y == zero, zero, y * log(y)))


@inline
def _log_divergence(x, y):
    """exp(y) * (y - x): the difference is exact where it matters, so the data's own precision does.

    exp(y) is taken as exp(y / 2)**2, which overflows to inf where y does (exp alone gives NaN there) and reaches the
    subnormal numbers.
    """
    root = exp(y * splat(scalar(0.5, first_lane(y))))
    return root * root * (y - x)


@inline
def _source(array, geometry, which, start, n, offsets, stage, n_lanes):
    """Where to read a tile's elements: in place if they lie side by side, else copied to ``stage``."""
    if planes.is_direct(geometry, which, start, n, n_lanes):
        return array, offsets[0]
    for i in range(n):
        stage[i] = array[offsets[i]]
    return stage, offsets[0] * 0


@allocating
def _work(counter, totals, x, y, out, geometry, options, log_target):
    like = out[0]
    width = geometry[tiles.TILE_ROWS] + tiles.PADDING
    offsets = np.empty(width, np.int64)
    stage, y_stage = tiles.aligned(width, x), tiles.aligned(width, y)
    values = tiles.aligned(width, out)
    while True:
        tile = next_task(counter)
        if tile >= geometry[tiles.N_TILES]:
            break
        start, n = tiles.tile_bounds(geometry, tile)
        tiles.row_offsets(geometry, tiles.INPUT, start, n, offsets)
        source, at = _source(x, geometry, tiles.INPUT, start, n, offsets, stage, lanes(like))
        tiles.row_offsets(geometry, tiles.TARGET, start, n, offsets)
        y_source, y_at = _source(y, geometry, tiles.TARGET, start, n, offsets, y_stage, lanes(like))
        if log_target:
            for slot in range(0, n, lanes(like)):
                i = planes.row_of(slot, n, lanes(like))
                store(values, i, _log_divergence(load(source, at + i, like), load(y_source, y_at + i, like)))
        else:
            for slot in range(0, n, lanes(0.0)):
                i = planes.row_of(slot, n, lanes(0.0))
                store(values, i, _divergence(load(source, at + i, 0.0), load(y_source, y_at + i, 0.0)))
        if options[tiles.WANTS_ROWS]:
            tiles.row_offsets(geometry, tiles.OUT, start, n, offsets)
            for i in range(n):
                out[offsets[i]] = values[i]
        if options[tiles.WANTS_SUM]:
            add_block(totals[0], values, n)


def _kl(n_workers, totals, x, y, out, geometry, options, log_target):
    """The pointwise divergence, and its exact sum."""
    counter = np.zeros(1, np.int64)
    states = np.zeros((n_workers, 2, STATE_SIZE), np.int64)
    for worker in prange(n_workers):
        _work(counter, states[worker], x, y, out, geometry, options, log_target)
    return collect(totals, states, np.zeros((n_workers, 2), np.int64))


kl = Kernel("kl", _kl)
