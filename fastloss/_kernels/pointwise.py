"""The kernel of the Kullback-Leibler divergence: element by element, over two arrays of one broadcast shape.

A sum is taken in the loop that makes the values, which are not written: the exact sum's grids (see
:mod:`fastloss._kernels.sums`) are laid by the exponent of a tile before. A tile that does not fit them is evaluated
again, written, and added as a block, which gives the next guess.

Without prefetches: two streams that run through whole tiles are what the CPU's own prefetcher is made for (65,536 x 500
is read 1.04 times as fast without).
"""

import numpy as np

from fastloss._kernels import planes, tiles
from fastloss._kernels._jit import inline, subroutine
from fastloss._kernels._simd import (
    first_lane,
    fma,
    integer_like,
    iota,
    lanes,
    load,
    load_one,
    lowest_bit,
    mask_bits,
    scalar,
    splat,
    store,
    where,
)
from fastloss._kernels._vecmath import exp, log_difference
from fastloss._kernels.driver import ANY_NUMBER, GUESS, SECOND_SUM, make_kernel
from fastloss._kernels.sums import NO_GUESS, add_block, add_sums, add_vector, grids, no_sums

# The difference of float32, good to 1.2e-8 where it is small, gives values within 1e-6 in relative terms where the
# logarithms differ by this or more.
CLOSE = 2.0**-6
# Smaller probabilities are left to float64, whose numbers CLOSE times them are exactly.
SMALLEST = 2.0**-120


@inline
def _is_odd(difference, y):
    """Whether y * ``difference`` may be wrong in float32: y is neither 0 nor a large enough positive number, or the
    logarithms differ by less than :data:`CLOSE`.
    """
    like = first_lane(y)
    smallest, infinity = splat(scalar(SMALLEST, like)), splat(scalar(np.inf, like))
    zero, close = splat(scalar(0.0, like)), splat(scalar(CLOSE, like))
    size = where(difference < zero, -difference, difference)
    is_ordinary = ((y == zero) | (y >= smallest)) & (y < infinity) & (size >= close)
    return is_ordinary ^ (zero == zero)


@inline
def _any_divergence(x, y):
    """xlogy(y, y) - y * x in float64 of any x and y."""
    like = first_lane(y)
    zero, infinity, nan = splat(scalar(0.0, like)), splat(scalar(np.inf, like)), splat(scalar(np.nan, like))
    ordinary = y * log_difference(y, x)
    value = where((y >= zero) & (y < infinity), ordinary, where(y > zero, fma(-y, x, y), nan))
    return value + zero  # makes a -0 of y = 0 positive


@inline
def _divergence(x, y):
    """xlogy(y, y) - y * x as y * (log(y) - x), the difference with more digits than the data's: its terms cancel where
    the distributions are close. In float32 some are odd (see :func:`_is_odd`): these are 0, and told by a mask.
    """
    like = first_lane(y)
    zero = splat(scalar(0.0, like))
    if lanes(like) == lanes(0.0):
        return _any_divergence(x, y), zero != zero
    difference = log_difference(y, x)
    is_odd = _is_odd(difference, y)
    # (The fused zero makes a -0 of y = 0 positive.)
    return where(is_odd, zero, fma(y, difference, zero)), is_odd


@inline
def _log_divergence(x, y):
    """exp(y) * (y - x): the difference is exact where it matters, so the data's own precision does. None is odd.

    exp(y) is taken as exp(y / 2)**2, which overflows to inf where y does (exp alone gives NaN there) and reaches the
    subnormal numbers.
    """
    root = exp(y * splat(scalar(0.5, first_lane(y))))
    return root * root * (y - x), y != y


@subroutine
def _mend(x, x_at, y, y_at, odd, n_odd, numbers, inputs, targets, mended):
    """Take those values of a tile in float64 that ``odd`` tells (the first of some values, and which of them): into
    ``mended``, one after the other, with their ``numbers`` and a vector of zeros behind; how many they are.

    They are some in a hundred where the distributions are not close, so they are gathered to fill vectors.
    """
    n = 0
    for k in range(n_odd):
        bits = odd[k] & 0xFFFFFFFF
        while bits:
            i = (odd[k] >> 32) + lowest_bit(bits)
            bits &= bits - 1
            numbers[n] = i
            inputs[n] = load_one(x, x_at + i, 0.0)
            targets[n] = load_one(y, y_at + i, 0.0)
            n += 1
    for i in range(0, n, lanes(0.0)):
        store(mended, i, _any_divergence(load(inputs, i, 0.0), load(targets, i, 0.0)))
    store(mended, n, splat(scalar(0.0, mended[0])))
    return n


def _make_tile(divergence, has_odd):
    """The two ways through a tile of :func:`divergence`, some of whose values are odd or none."""

    @subroutine
    def write(x, x_at, y, y_at, n, scratch, values):
        """Write the divergences of a tile."""
        like = values[0]
        n_lanes = lanes(like)
        odd, numbers, mended = scratch.places[0], scratch.places[1], scratch.narrow[1]
        n_odd = 0
        for slot in range(0, n, n_lanes):
            i = planes.row_of(slot, n, n_lanes)
            value, is_odd = divergence(load(x, x_at + i, like), load(y, y_at + i, like))
            store(values, i, value)
            if has_odd:
                bits = mask_bits(is_odd)
                odd[n_odd] = (i << 32) | bits
                n_odd += bits != 0
        if n_odd:
            n_odd = _mend(x, x_at, y, y_at, odd, n_odd, numbers, scratch.wide[0], scratch.wide[1], mended)
            for i in range(n_odd):
                values[numbers[i]] = mended[i]

    @subroutine
    def add(x, x_at, y, y_at, n, scratch, exponent, state):
        """Add the divergences of a tile to an exact sum, if they fit the grids of ``exponent``; whether they did.

        Two vectors at a time, which go on the grids after the next two have been evaluated: the CPU, which looks some
        three vectors ahead, finds independent chains there (in the second-level cache, 1.15 times as fast as one after
        the other).
        """
        mended = scratch.narrow[1]
        like = mended[0]
        n_lanes = lanes(like)
        zero = splat(scalar(0.0, like))
        odd, n_odd = scratch.places[0], 0
        constants, sums = grids(zero, exponent), no_sums(zero)
        paired = n // (2 * n_lanes) * (2 * n_lanes)
        held, other_held = zero, zero
        for i in range(0, paired, 2 * n_lanes):
            j = i + n_lanes
            value, is_odd = divergence(load(x, x_at + i, like), load(y, y_at + i, like))
            other, other_is_odd = divergence(load(x, x_at + j, like), load(y, y_at + j, like))
            sums = add_vector(other_held, add_vector(held, sums, constants), constants)
            held, other_held = value, other
            if has_odd:
                bits = mask_bits(is_odd) | (mask_bits(other_is_odd) << n_lanes)
                odd[n_odd] = (i << 32) | bits
                n_odd += bits != 0
        sums = add_vector(other_held, add_vector(held, sums, constants), constants)
        n_vectors = paired // n_lanes + 2  # (with the zeros that were held first)
        for slot in range(paired, n, n_lanes):
            # The last vector is laid to end with the tile; a tile shorter than a vector starts it.
            i = planes.row_of(slot, n, n_lanes)
            lane = iota(like)
            is_new = (lane >= splat(integer_like(slot - i, like))) & (lane < splat(integer_like(n - i, like)))
            value, is_odd = divergence(load(x, x_at + i, like), load(y, y_at + i, like))
            sums = add_vector(where(is_new, value, zero), sums, constants)
            n_vectors += 1
            if has_odd:
                bits = mask_bits(is_odd & is_new)
                odd[n_odd] = (i << 32) | bits
                n_odd += bits != 0
        if n_odd:
            n_odd = _mend(x, x_at, y, y_at, odd, n_odd, scratch.places[1], scratch.wide[0], scratch.wide[1], mended)
            for i in range(0, n_odd, n_lanes):
                sums = add_vector(load(mended, i, like), sums, constants)
                n_vectors += 1
        return add_sums(zero, state, sums, exponent, n_vectors, True)

    return write, add


_write, _add = _make_tile(_divergence, True)
_write_log, _add_log = _make_tile(_log_divergence, False)


@inline
def _stage(array, geometry, which, start, n, offsets, stage):
    tiles.row_offsets(geometry, which, start, n, offsets)
    for i in range(n):
        stage[i] = array[offsets[i]]


@subroutine
def _kl_tile(tile, scratch, ledger, x, y, weight, out, geometry, keep, spread):
    """The pointwise divergence of a tile, and its exact sum."""
    n_lanes = lanes(out[0])
    offsets, values = scratch.places[0], scratch.narrow[0]
    start, n = tiles.tile_bounds(geometry, tile)
    is_log = geometry[tiles.IS_LOG] != 0
    wants_rows, wants_sum = geometry[tiles.WANTS_ROWS] != 0, geometry[tiles.WANTS_SUM] != 0
    if planes.is_direct(geometry, tiles.INPUT, start, n, n_lanes) and planes.is_direct(
        geometry, tiles.TARGET, start, n, n_lanes
    ):
        x_at, y_at = tiles.row_offset(geometry, tiles.INPUT, start), tiles.row_offset(geometry, tiles.TARGET, start)
        a, b = x, y
    else:
        _stage(x, geometry, tiles.INPUT, start, n, offsets, scratch.stage)
        _stage(y, geometry, tiles.TARGET, start, n, offsets, scratch.other_stage)
        x_at, y_at = np.int64(0), np.int64(0)
        a, b = scratch.stage, scratch.other_stage
    is_added = False
    if wants_sum and not wants_rows and ledger[GUESS] != NO_GUESS:
        if is_log:
            is_added = _add_log(a, x_at, b, y_at, n, scratch, ledger[GUESS], ledger[:SECOND_SUM])
        else:
            is_added = _add(a, x_at, b, y_at, n, scratch, ledger[GUESS], ledger[:SECOND_SUM])
    if is_added:
        return
    if is_log:
        _write_log(a, x_at, b, y_at, n, scratch, values)
    else:
        _write(a, x_at, b, y_at, n, scratch, values)
    if wants_rows:
        tiles.put_rows(out, geometry, tiles.OUT, start, n, offsets, values)
    if wants_sum:
        ledger[GUESS] = add_block(ledger[:SECOND_SUM], values, n)


kl = make_kernel("kl", _kl_tile, light=ANY_NUMBER)
