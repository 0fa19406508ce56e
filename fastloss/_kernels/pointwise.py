"""The kernel of the Kullback-Leibler divergence: element by element, over two arrays of one broadcast shape."""

import numpy as np

from fastloss._kernels import planes, tiles
from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels._simd import first_lane, fma, lanes, load, prefetch, scalar, splat, store, where
from fastloss._kernels._vecmath import exp, log_difference
from fastloss._kernels.driver import SECOND_SUM, make_kernel
from fastloss._kernels.sums import add_block

# How far ahead of the loads memory is asked for, in bytes: past the tile, see :data:`fastloss._kernels.rows.AHEAD`.
AHEAD = 4096


@inline
def _divergence(x, y):
    """xlogy(y, y) - y * x as y * (log(y) - x), the difference with more digits than the data's: its terms cancel where
    the distributions are close.
    """
    like = first_lane(y)
    zero = splat(scalar(0.0, like))
    value = y * log_difference(y, x) + zero  # + 0 makes a -0 of y = 0 positive
    infinity, nan = splat(scalar(np.inf, like)), splat(scalar(np.nan, like))
    return where((y >= zero) & (y < infinity), value, where(y > zero, fma(-y, x, y), nan))


@inline
def _log_divergence(x, y):
    """exp(y) * (y - x): the difference is exact where it matters, so the data's own precision does.

    exp(y) is taken as exp(y / 2)**2, which overflows to inf where y does (exp alone gives NaN there) and reaches the
    subnormal numbers.
    """
    root = exp(y * splat(scalar(0.5, first_lane(y))))
    return root * root * (y - x)


@inline
def _stage(array, geometry, which, start, n, offsets, stage):
    tiles.row_offsets(geometry, which, start, n, offsets)
    for i in range(n):
        stage[i] = array[offsets[i]]


@inline
def _evaluate(x, x_at, y, y_at, n, is_log, values):
    like = values[0]
    for slot in range(0, n, lanes(like)):
        i = planes.row_of(slot, n, lanes(like))
        prefetch(x, x_at + i, AHEAD)
        prefetch(y, y_at + i, AHEAD)
        a, b = load(x, x_at + i, like), load(y, y_at + i, like)
        store(values, i, _log_divergence(a, b) if is_log else _divergence(a, b))


@subroutine
def _kl_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
    """The pointwise divergence of a tile, and its exact sum."""
    n_lanes = lanes(out[0])
    offsets, values = scratch.places[0], scratch.narrow[0]
    start, n = tiles.tile_bounds(geometry, tile)
    x_direct = planes.is_direct(geometry, tiles.INPUT, start, n, n_lanes)
    y_direct = planes.is_direct(geometry, tiles.TARGET, start, n, n_lanes)
    is_log = geometry[tiles.IS_LOG] != 0
    if x_direct and y_direct:
        x_offset = tiles.row_offset(geometry, tiles.INPUT, start)
        _evaluate(x, x_offset, y, tiles.row_offset(geometry, tiles.TARGET, start), n, is_log, values)
    else:
        _stage(x, geometry, tiles.INPUT, start, n, offsets, scratch.stage)
        _stage(y, geometry, tiles.TARGET, start, n, offsets, scratch.other_stage)
        _evaluate(scratch.stage, 0, scratch.other_stage, 0, n, is_log, values)
    if geometry[tiles.WANTS_ROWS]:
        tiles.put_rows(out, geometry, tiles.OUT, start, n, offsets, values)
    if geometry[tiles.WANTS_SUM]:
        add_block(ledger[:SECOND_SUM], values, n)


kl = make_kernel("kl", _kl_tile)
