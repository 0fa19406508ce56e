"""The kernel of the Kullback-Leibler divergence: element by element, over two arrays of one broadcast shape.

A sum is taken in the loop that makes the values, which are not written: the exact sum's grids (see
:mod:`fastloss._kernels.sums`) are laid by the exponent of a tile before. A tile whose values spread over too many
binades goes on wide grids, one that does not fit is evaluated again, written, and added as a block, which gives the
next guess.

Without prefetches: two streams that run through whole tiles are what the CPU's own prefetcher is made for (65,536 x 500
is read 1.04 times as fast without).
"""

import numpy as np

from fastloss._kernels import planes, tiles
from fastloss._kernels._jit import inline, subroutine
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
    scalar,
    splat,
    store,
    to_bits,
    where,
)
from fastloss._kernels._vecmath import exp, log_difference
from fastloss._kernels.driver import ANY_NUMBER, GUESS, SECOND_SUM, WIDE_TILES, make_kernel
from fastloss._kernels.sums import MARGIN, NARROW, NO_GUESS, WIDE, add_block

# The difference of float32, good to 6e-9 where it is small, gives values within 9e-7 in relative terms where the
# logarithms differ by 2**CLOSE or more.
CLOSE = -7
# Probabilities below 2**SMALLEST are left to float64, whose numbers 2**CLOSE times them are exactly.
SMALLEST = -120
# How many tiles go on wide grids after one that does not fit the narrow ones, before these are tried again.
STAY_WIDE = 64

_LARGEST_INTEGER = 0x7FFFFFFF


@inline
def _is_close(difference):
    """Whether the logarithms differ by less than 2**:data:`CLOSE`."""
    like = first_lane(difference)
    size = to_bits(difference) & splat(integer_like(_LARGEST_INTEGER, like))
    return size < splat(integer_like((CLOSE + 127) << 23, like))


@inline
def _order(y):
    """Integers in the order of the probabilities, but for 0, which comes last."""
    return to_bits(y) + splat(integer_like(_LARGEST_INTEGER, first_lane(y)))


@inline
def _order_of_power(exponent, like):
    """:func:`_order` of 2**``exponent`` in float32; in float64, where no probability is too small, below all."""
    order = ((exponent + 127) << 23) + _LARGEST_INTEGER
    return splat(integer_like(order if lanes(like) != lanes(0.0) else np.int64(0), like))


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
    the distributions are close. For float32, y is 0 or from 2**:data:`SMALLEST` on and finite, and those values that
    are not good enough are told by a mask.
    """
    like = first_lane(y)
    zero = splat(scalar(0.0, like))
    if lanes(like) == lanes(0.0):
        return _any_divergence(x, y), zero != zero
    difference = log_difference(y, x)
    return y * difference, _is_close(difference)


@inline
def _log_divergence(x, y):
    """exp(y) * (y - x): the difference is exact where it matters, so the data's own precision does. None is odd.

    exp(y) is taken as exp(y / 2)**2, which overflows to inf where y does (exp alone gives NaN there) and reaches the
    subnormal numbers.
    """
    root = exp(y * splat(scalar(0.5, first_lane(y))))
    return root * root * (y - x), y != y


@inline
def _note(odd, n_words, first, bits):
    """Take note of the odd ones from a value on, the bits of a word, if there are any; how many words there are."""
    odd[n_words] = (first << 32) | bits
    return n_words + (bits != 0)


@subroutine
def _gather_odd(x, x_at, y, y_at, odd, n_words, numbers, inputs, targets):
    """Gather the pairs that ``odd`` tells and their numbers, with a vector of zeros behind; how many they are.

    They are one in two hundred where the distributions are not close.
    """
    n_odd = 0
    for word in range(n_words):
        bits = odd[word] & 0xFFFFFFFF
        while bits:
            i = (odd[word] >> 32) + lowest_bit(bits)
            bits &= bits - 1
            numbers[n_odd] = i
            inputs[n_odd] = load_one(x, x_at + i, inputs[0])
            targets[n_odd] = load_one(y, y_at + i, targets[0])
            n_odd += 1
    n_lanes = lanes(inputs[0])
    for k in range(n_odd, n_odd + 16, n_lanes):
        store(inputs, k, splat(scalar(0.0, inputs[0])))
        store(targets, k, splat(scalar(0.0, inputs[0])))
    return n_odd


@inline
def _mend(inputs, targets, n_odd):
    """The divergences of some pairs, in float64, in place of the ``targets``."""
    for k in range(0, n_odd, lanes(0.0)):
        store(targets, k, _any_divergence(load(inputs, k, 0.0), load(targets, k, 0.0)))


def _make_write(divergence, has_odd):
    @subroutine
    def write(x, x_at, y, y_at, n, scratch, values):
        """Write the divergences of a tile."""
        like = values[0]
        n_lanes = lanes(like)
        odd, numbers, inputs, targets = scratch.places[0], scratch.places[1], scratch.wide[0], scratch.wide[1]
        zero, infinity = splat(scalar(0.0, like)), splat(scalar(np.inf, like))
        smallest = _order_of_power(np.int64(SMALLEST), like)
        n_words = 0
        for slot in range(0, n, n_lanes):
            i = planes.row_of(slot, n, n_lanes)
            target = load(y, y_at + i, like)
            value, is_odd = divergence(load(x, x_at + i, like), target)
            store(values, i, value + zero)  # (makes a -0 of y = 0 positive)
            if has_odd:
                is_odd = is_odd | (_order(target) < smallest) | (target < zero) | (target == infinity)
                n_words = _note(odd, n_words, i, mask_bits(is_odd))
        if has_odd:
            n_odd = _gather_odd(x, x_at, y, y_at, odd, n_words, numbers, inputs, targets)
            _mend(inputs, targets, n_odd)
            for k in range(n_odd):
                values[numbers[k]] = targets[k]

    return write


def _make_add(divergence, has_odd, kind, is_wide):
    grids, no_sums, add_vector, add_large, add_sums = kind
    # The probabilities' own bound is the values' too (see below): nothing is lost on narrow grids, nor looked for.
    add_value = add_large if has_odd and not is_wide else add_vector

    @inline
    def evaluate(x, y, bound, least, signs):
        """The divergences of a vector, which of them are odd, and what is kept of the probabilities of all vectors."""
        value, is_odd = divergence(x, y)
        if has_odd:
            order, signs = _order(y), signs | to_bits(y)
            if is_wide:
                is_odd = is_odd | (order < bound)
                value = where(is_odd, splat(scalar(0.0, first_lane(y))), value)
            else:
                least = where(order < least, order, least)
        return value, is_odd, least, signs

    @subroutine
    def add(x, x_at, y, y_at, n, scratch, exponent, state):
        """Add the divergences of a tile to an exact sum, if they fit the grids of ``exponent``; whether they did.

        Two vectors at a time, which go on the grids after the next two have been evaluated: the CPU, which looks some
        three vectors ahead, finds independent chains there (in the second-level cache, 1.15 times as fast as one after
        the other).

        Narrow grids reach down to values of 2**(exponent - 44). Probabilities from 2**(exponent - 44 - CLOSE) on, with
        logarithms 2**CLOSE apart, have none below, and one minimum over the tile tells whether there were any others.
        (Of an odd value, what is added before it is known to be odd is taken off again.) Where there were negative
        probabilities the tile does not fit, either; an infinite one makes a value that does not.
        """
        inputs, targets = scratch.narrow[0], scratch.narrow[1]
        like = inputs[0]
        n_lanes = lanes(like)
        zero = splat(scalar(0.0, like))
        bound = _order_of_power(np.int64(SMALLEST) if is_wide else exponent - 44 - CLOSE, like)
        least, signs = splat(integer_like(_LARGEST_INTEGER, like)), splat(integer_like(0, like))
        odd, n_words = scratch.places[0], 0
        constants, sums = grids(zero, exponent), no_sums(zero)
        paired = n // (2 * n_lanes) * (2 * n_lanes)
        held, other_held = zero, zero
        for i in range(0, paired, 2 * n_lanes):
            j = i + n_lanes
            value, is_odd, least, signs = evaluate(
                load(x, x_at + i, like), load(y, y_at + i, like), bound, least, signs
            )
            other, other_is_odd, least, signs = evaluate(
                load(x, x_at + j, like), load(y, y_at + j, like), bound, least, signs
            )
            sums = add_value(other_held, add_value(held, sums, constants), constants)
            held, other_held = value, other
            if has_odd:
                n_words = _note(odd, n_words, i, mask_bits(is_odd) | (mask_bits(other_is_odd) << n_lanes))
        sums = add_value(other_held, add_value(held, sums, constants), constants)
        n_vectors = paired // n_lanes + 2  # (with the zeros that were held first)
        for slot in range(paired, n, n_lanes):
            # The last vector is laid to end with the tile; a tile shorter than a vector starts it.
            i = planes.row_of(slot, n, n_lanes)
            lane = iota(like)
            is_new = (lane >= splat(integer_like(slot - i, like))) & (lane < splat(integer_like(n - i, like)))
            target = where(is_new, load(y, y_at + i, like), zero)
            value, is_odd, least, signs = evaluate(load(x, x_at + i, like), target, bound, least, signs)
            sums = add_value(where(is_new, value, zero), sums, constants)
            n_vectors += 1
            if has_odd:
                n_words = _note(odd, n_words, i, mask_bits(is_odd & is_new))
        if has_odd:
            if any_lane((least < bound) | (signs < splat(integer_like(0, like)))):
                return False
            n_odd = _gather_odd(x, x_at, y, y_at, odd, n_words, scratch.places[1], inputs, targets)
            if not is_wide:
                for k in range(0, n_odd, n_lanes):
                    value, _ = divergence(load(inputs, k, like), load(targets, k, like))
                    sums = add_value(-value, sums, constants)
                    n_vectors += 1
            _mend(inputs, targets, n_odd)
            for k in range(0, n_odd, n_lanes):
                sums = add_vector(load(targets, k, like), sums, constants)
                n_vectors += 1
        return add_sums(zero, state, sums, exponent, n_vectors, True)

    return add


_write, _write_log = _make_write(_divergence, True), _make_write(_log_divergence, False)
_add, _add_log = _make_add(_divergence, True, NARROW, False), _make_add(_log_divergence, False, NARROW, False)
_add_wide, _add_wide_log = _make_add(_divergence, True, WIDE, True), _make_add(_log_divergence, False, WIDE, True)


@subroutine
def _add_tile(x, x_at, y, y_at, n, scratch, ledger, is_log):
    """Add the divergences of a tile to the ledger's sum, if they fit the grids that are guessed; whether they did."""
    guess, state = ledger[GUESS], ledger[:SECOND_SUM]
    if guess == NO_GUESS:
        return False
    if ledger[WIDE_TILES] > 0:
        ledger[WIDE_TILES] -= 1
        if is_log:
            return _add_wide_log(x, x_at, y, y_at, n, scratch, guess, state)
        return _add_wide(x, x_at, y, y_at, n, scratch, guess, state)
    if is_log:
        return _add_log(x, x_at, y, y_at, n, scratch, guess, state)
    return _add(x, x_at, y, y_at, n, scratch, guess, state)


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
    if wants_sum and not wants_rows and _add_tile(a, x_at, b, y_at, n, scratch, ledger, is_log):
        return
    if is_log:
        _write_log(a, x_at, b, y_at, n, scratch, values)
    else:
        _write(a, x_at, b, y_at, n, scratch, values)
    if wants_rows:
        tiles.put_rows(out, geometry, tiles.OUT, start, n, offsets, values)
    if wants_sum:
        guess = ledger[GUESS]
        ledger[GUESS] = add_block(ledger[:SECOND_SUM], values, n, np.int64(NO_GUESS))
        # Where the guess was right, what did not fit spreads over too many binades for narrow grids.
        if guess - 2 * MARGIN < ledger[GUESS] <= guess:
            ledger[WIDE_TILES] = STAY_WIDE


kl = make_kernel("kl", _kl_tile, light=ANY_NUMBER)
