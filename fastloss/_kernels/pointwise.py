"""The kernel of the Kullback-Leibler divergence: element by element, over two arrays of one broadcast shape."""

import numpy as np

from fastloss._kernels import planes, tiles
from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels._simd import (
    first_lane,
    fma,
    lanes,
    load,
    load_one,
    lowest_bit,
    mask_bits,
    prefetch,
    scalar,
    splat,
    store,
    where,
)
from fastloss._kernels._vecmath import exp, log_difference
from fastloss._kernels.driver import ANY_NUMBER, SECOND_SUM, make_kernel
from fastloss._kernels.sums import add_block

# How far ahead of the loads memory is asked for, in bytes: past the tile, see :data:`fastloss._kernels.rows.AHEAD`.
AHEAD = 4096


# The compensated difference of float32, good to 1.2e-8, gives values within 1e-6 in relative terms where the logarithms
# differ by this or more.
CLOSE = 2.0**-6
# Smaller probabilities are left to float64, whose numbers CLOSE times them are exactly.
SMALLEST = 2.0**-120


@inline
def _divergence(x, y):
    """xlogy(y, y) - y * x as y * (log(y) - x), the difference with more digits than the data's: its terms cancel where
    the distributions are close. In float64, or for what :func:`_is_ordinary` passes.
    """
    return y * log_difference(y, x)


@inline
def _is_odd(value, y):
    """Whether :func:`_divergence` may be wrong in float32: y is neither 0 nor a large enough positive number, x is not
    finite (then the value is NaN), or the logarithms differ by less than :data:`CLOSE`.
    """
    like = first_lane(y)
    smallest, infinity = splat(scalar(SMALLEST, like)), splat(scalar(np.inf, like))
    zero, limit = splat(scalar(0.0, like)), y * splat(scalar(CLOSE, like))
    size = where(value < zero, -value, value)
    is_ordinary = ((y == zero) | (y >= smallest)) & (y < infinity) & (size >= limit)
    return is_ordinary ^ (zero == zero)


@inline
def _any_divergence(x, y):
    """:func:`_divergence` in float64 of any x and y."""
    like = first_lane(y)
    zero, infinity, nan = splat(scalar(0.0, like)), splat(scalar(np.inf, like)), splat(scalar(np.nan, like))
    value = where((y >= zero) & (y < infinity), _divergence(x, y), where(y > zero, fma(-y, x, y), nan))
    return value + zero  # makes a -0 of y = 0 positive


@subroutine
def _mend(x, x_at, y, y_at, values, odd, n_odd, numbers, inputs, targets):
    """Take those values of a tile anew, in float64, whose vectors and lanes ``odd`` tells; the rest is scratch.

    They are some in a hundred where the distributions are not close, so they are gathered to fill vectors.
    """
    n = 0
    for k in range(n_odd):
        bits = odd[k] & 0xFFFF
        while bits:
            i = (odd[k] >> 16) + lowest_bit(bits)
            bits &= bits - 1
            numbers[n] = i
            inputs[n] = load_one(x, x_at + i, 0.0)
            targets[n] = load_one(y, y_at + i, 0.0)
            n += 1
    for i in range(0, n, lanes(0.0)):
        store(inputs, i, _any_divergence(load(inputs, i, 0.0), load(targets, i, 0.0)))
    for i in range(n):
        values[numbers[i]] = inputs[i]


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
def _evaluate(x, x_at, y, y_at, n, is_log, scratch, values):
    """Write the divergences of a tile."""
    like = values[0]
    n_lanes = lanes(like)
    odd, n_odd = scratch.places[0], 0
    for slot in range(0, n, n_lanes):
        i = planes.row_of(slot, n, n_lanes)
        prefetch(x, x_at + i, AHEAD)
        prefetch(y, y_at + i, AHEAD)
        a, b = load(x, x_at + i, like), load(y, y_at + i, like)
        if is_log:
            store(values, i, _log_divergence(a, b))
        elif n_lanes == lanes(0.0):
            store(values, i, _any_divergence(a, b))
        else:
            value = _divergence(a, b) + splat(scalar(0.0, like))
            store(values, i, value)
            bits = mask_bits(_is_odd(value, b))
            odd[n_odd] = (i << 16) | bits
            n_odd += bits != 0
    if n_odd:
        _mend(x, x_at, y, y_at, values, odd, n_odd, scratch.places[1], scratch.wide[0], scratch.wide[1])


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
        _evaluate(x, x_offset, y, tiles.row_offset(geometry, tiles.TARGET, start), n, is_log, scratch, values)
    else:
        _stage(x, geometry, tiles.INPUT, start, n, offsets, scratch.stage)
        _stage(y, geometry, tiles.TARGET, start, n, offsets, scratch.other_stage)
        _evaluate(scratch.stage, 0, scratch.other_stage, 0, n, is_log, scratch, values)
    if geometry[tiles.WANTS_ROWS]:
        tiles.put_rows(out, geometry, tiles.OUT, start, n, offsets, values)
    if geometry[tiles.WANTS_SUM]:
        add_block(ledger[:SECOND_SUM], values, n)


kl = make_kernel("kl", _kl_tile, light=ANY_NUMBER)
