"""The kernel of the Kullback-Leibler divergence: element by element, over two arrays of one broadcast shape.

A sum is taken in the loop that makes the values, which are not written: the exact sum's grids (see
:mod:`fastloss._kernels.sums`) are laid by the exponent of a tile before. The first tile is written and added as a
block, which gives that exponent, and so is one with larger values than were guessed. Two grids do for most values; the
others, one in many, are set apart and put on three. A tile with more of them has the next tiles put on three grids
all, or on wide ones.

Without prefetches: two streams that run through whole tiles are what the CPU's own prefetcher is made for (65,536 x 500
is read 1.04 times as fast without).
"""

from collections import namedtuple

import numpy as np

from fastloss._kernels import planes, tiles
from fastloss._kernels._jit import by_dtype, inline, subroutine
from fastloss._kernels._simd import (
    any_lane,
    first_lane,
    fma,
    from_bits,
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
from fastloss._kernels._vecmath import exp_of_any, log_difference
from fastloss._kernels.driver import ANY_NUMBER, GUESS, SECOND_SUM, WAY, WAY_TILES, make_kernel
from fastloss._kernels.sums import MARGIN, NARROW, NARROWEST, NO_GUESS, WIDE, add_block

# The difference of float32, good to 6e-9 where it is small, gives values within 9e-7 in relative terms where the
# logarithms differ by 2**CLOSE or more.
CLOSE = -7
# Probabilities below 2**SMALLEST are left to float64, whose numbers 2**CLOSE times them are exactly.
SMALLEST = -120
# The ways to add a tile's values; of float64, the third is the fourth.
AS_BLOCK, TWO_GRIDS, THREE_GRIDS, WIDE_GRIDS = range(4)
# How many tiles go one way after one that did not suit the way before, until that is tried again.
STAY = 64
# A tile does not suit where more than one in so many values are set apart: each takes ten times what it would in its
# place, and a third grid for all of them a tenth more. (Where distributions are not close, one in two hundred is.)
APART = 64

_LARGEST_INTEGER = 0x7FFFFFFF


@inline
def _is_single(like):
    return lanes(like) != lanes(0.0)


@inline
def _is_apart(difference):
    """Whether the logarithms differ by 2**:data:`CLOSE` or more."""
    like = first_lane(difference)
    size = to_bits(difference) & splat(integer_like(_LARGEST_INTEGER, like))
    return size >= splat(integer_like((CLOSE + 127) << 23, like))


@inline
def _order(y):
    """Integers in the order of what is not negative, but for 0, which comes last."""
    return to_bits(y) + splat(integer_like(_LARGEST_INTEGER, first_lane(y)))


@inline
def _order_of_power(exponent, like):
    """:func:`_order` of 2**``exponent`` in float32."""
    return splat(integer_like(((exponent + 127) << 23) + _LARGEST_INTEGER, like))


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
    are good enough are told by a mask.
    """
    zero = splat(scalar(0.0, first_lane(y)))
    if not _is_single(first_lane(y)):
        return _any_divergence(x, y), zero == zero
    difference = log_difference(y, x)
    return y * difference, _is_apart(difference)


@inline
def _log_divergence(x, y):
    """exp(y) * (y - x): the difference is exact where it matters, so the data's own precision does: all are good."""
    zero = splat(scalar(0.0, first_lane(y)))
    return exp_of_any(y) * (y - x), zero == zero


@inline
def _target_order(y, value):
    return _order(y)


@inline
def _target_bound(exponent, like):
    """From which :func:`_target_order` on no value is below 2**``exponent`` that is good enough."""
    return _order_of_power(max(exponent - CLOSE, np.int64(SMALLEST)), like)


@inline
def _value_order(y, value):
    return _order(from_bits(to_bits(value) & splat(integer_like(_LARGEST_INTEGER, first_lane(y)))))


@inline
def _value_bound(exponent, like):
    """From which :func:`_value_order` on no value is below 2**``exponent``, nor subnormal."""
    return _order_of_power(max(exponent, np.int64(-126)), like)


@inline
def _bits_of_others(is_good, like):
    return mask_bits(is_good) ^ ((1 << lanes(like)) - 1)


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
def _mend(inputs, targets, begin, end):
    """The divergences of some pairs, in float64, in place of the ``targets``."""
    for k in range(begin, end, lanes(0.0)):
        store(targets, k, _any_divergence(load(inputs, k, 0.0), load(targets, k, 0.0)))


# The two divergences.
#   values(x, y)            those of two vectors, and whether they are good enough
#   order(y, value), bound(exponent, like)
#                           what is at least ``bound`` where a good value is 0 or not below 2**exponent
#   of_probabilities        whether some are not good enough, and negative targets are no numbers
Divergence = namedtuple("Divergence", "values order bound of_probabilities")

_OF_TARGET = Divergence(_divergence, _target_order, _target_bound, True)
_OF_LOG_TARGET = Divergence(_log_divergence, _value_order, _value_bound, False)


def _make_write(divergence):
    of_probabilities, evaluate = divergence.of_probabilities, divergence.values

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
            value, is_good = evaluate(load(x, x_at + i, like), target)
            store(values, i, value + zero)  # (makes a -0 of y = 0 positive)
            if of_probabilities and _is_single(like):
                is_good = is_good & (_order(target) >= smallest) & (target >= zero) & (target < infinity)
                n_words = _note(odd, n_words, i, _bits_of_others(is_good, like))
        if of_probabilities and _is_single(like):
            n_odd = _gather_odd(x, x_at, y, y_at, odd, n_words, numbers, inputs, targets)
            _mend(inputs, targets, 0, n_odd)
            for k in range(n_odd):
                values[numbers[k]] = targets[k]

    return write


def _make_add(divergence, kind):
    values, order, bound_of, of_probabilities = divergence
    grids, no_sums, add_vector, add_large, add_sums, reach = kind

    @inline
    def evaluate(x, y, bound):
        """The divergences of a vector, with 0 in place of those that are set apart, and the bits of these."""
        like = first_lane(y)
        value, is_good = values(x, y)
        if _is_single(like):
            is_good = is_good & (order(y, value) >= bound)
            value = where(is_good, value, splat(scalar(0.0, like)))
        return value, _bits_of_others(is_good, like)

    @subroutine
    def add(inputs, targets, places, x, x_at, y, y_at, n, exponent, state):
        """Add the divergences of a tile to an exact sum, if they are as large as ``exponent`` says: how many of them
        were set apart, or -1 if nothing was added.

        Two vectors at a time, which are added after the next two have been evaluated: the CPU, which looks some three
        vectors ahead, finds independent chains there (in the second-level cache, 1.15 times as fast as one after the
        other).

        Of float32, a value below 2**(exponent - reach) may have bits below all that the sums hold. Probabilities from
        2**(exponent - reach - CLOSE) on, with logarithms 2**CLOSE apart, give none; with log_target the values are
        looked at. Where there were negative probabilities the tile does not fit; an infinite one makes a value that
        does not.
        """
        like = inputs[0]
        n_lanes, zero = lanes(like), splat(scalar(0.0, like))
        bound, signs = bound_of(exponent - reach, like), splat(integer_like(0, like))
        odd, n_words = places[0], 0
        constants, sums = grids(zero, exponent), no_sums(zero)
        paired = n // (2 * n_lanes) * (2 * n_lanes)
        held, other_held = zero, zero
        for i in range(0, paired, 2 * n_lanes):
            j = i + n_lanes
            target, other_target = load(y, y_at + i, like), load(y, y_at + j, like)
            value, bits = evaluate(load(x, x_at + i, like), target, bound)
            other, other_bits = evaluate(load(x, x_at + j, like), other_target, bound)
            signs = signs | to_bits(target) | to_bits(other_target)
            sums = add_large(other_held, add_large(held, sums, constants), constants)
            held, other_held = value, other
            if _is_single(like):
                n_words = _note(odd, n_words, i, bits | (other_bits << n_lanes))
        sums = add_large(other_held, add_large(held, sums, constants), constants)
        n_vectors = paired // n_lanes + 2  # (with the zeros that were held first)
        for slot in range(paired, n, n_lanes):
            # The last vector is laid to end with the tile; a tile shorter than a vector starts it.
            i = planes.row_of(slot, n, n_lanes)
            lane = iota(like)
            is_new = (lane >= splat(integer_like(slot - i, like))) & (lane < splat(integer_like(n - i, like)))
            target = where(is_new, load(y, y_at + i, like), zero)
            value, bits = evaluate(load(x, x_at + i, like), target, bound)
            signs = signs | to_bits(target)
            sums = add_large(where(is_new, value, zero), sums, constants)
            n_vectors += 1
            if _is_single(like):
                n_words = _note(odd, n_words, i, bits & mask_bits(is_new))
        if of_probabilities and any_lane(signs < splat(integer_like(0, like))):
            return -1
        n_odd = _gather_odd(x, x_at, y, y_at, odd, n_words, places[1], inputs, targets)
        for k in range(0, n_odd, n_lanes):
            target = load(targets, k, like)
            value, is_good = values(load(inputs, k, like), target)
            if of_probabilities:
                is_good = is_good & (_order(target) >= _order_of_power(np.int64(SMALLEST), like))
                _mend(inputs, targets, k, k + n_lanes)
                value = where(is_good, value, load(targets, k, like))
            sums = add_vector(value, sums, constants)
            n_vectors += 1
        return n_odd if add_sums(zero, state, sums, exponent, n_vectors, True) else -1

    return add


@inline
def _go_on(ledger, way):
    """Take a way from the next tile on, the dearer ones for some tiles before the one before is tried again."""
    ledger[WAY], ledger[WAY_TILES] = min(way, np.int64(WIDE_GRIDS)), STAY


def _make_take(divergence):
    write = _make_write(divergence)
    add_narrow, add_wide = _make_add(divergence, NARROW), _make_add(divergence, WIDE)
    add_first, add_second = by_dtype(_make_add(divergence, NARROWEST), add_narrow), by_dtype(add_narrow, add_wide)

    @subroutine
    def add_tile(x, x_at, y, y_at, n, scratch, ledger):
        """Add the divergences of a tile to the ledger's sum, if they are as large as was guessed; whether they were."""
        inputs, targets, places = scratch.narrow[0], scratch.narrow[1], scratch.places
        guess, state, way = ledger[GUESS], ledger[:SECOND_SUM], ledger[WAY]
        if way == AS_BLOCK or guess == NO_GUESS:
            return False
        if way == TWO_GRIDS:
            n_apart = add_first(inputs, targets, places, x, x_at, y, y_at, n, guess, state)
        elif way == THREE_GRIDS:
            n_apart = add_second(inputs, targets, places, x, x_at, y, y_at, n, guess, state)
        else:
            n_apart = add_wide(inputs, targets, places, x, x_at, y, y_at, n, guess, state)
        if n_apart * APART > n:
            _go_on(ledger, way + 1)
        elif way != TWO_GRIDS:
            ledger[WAY_TILES] -= 1
            if ledger[WAY_TILES] == 0:
                _go_on(ledger, np.int64(AS_BLOCK) if way == THREE_GRIDS else way - 1)
        return n_apart >= 0

    @inline
    def take_tile(x, x_at, y, y_at, n, scratch, ledger, values, may_add):
        """Add the divergences of a tile, if they may be and fit, or write them; whether they were added."""
        was_added = may_add and add_tile(x, x_at, y, y_at, n, scratch, ledger)
        if not was_added:
            write(x, x_at, y, y_at, n, scratch, values)
        return was_added

    return take_tile


_take_tile, _take_log_tile = _make_take(_OF_TARGET), _make_take(_OF_LOG_TARGET)


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
    may_add = wants_sum and not wants_rows
    if is_log:
        was_added = _take_log_tile(a, x_at, b, y_at, n, scratch, ledger, values, may_add)
    else:
        was_added = _take_tile(a, x_at, b, y_at, n, scratch, ledger, values, may_add)
    if was_added:
        return
    if wants_rows:
        tiles.put_rows(out, geometry, tiles.OUT, start, n, offsets, values)
    if wants_sum:
        guess = ledger[GUESS]
        ledger[GUESS] = add_block(ledger[:SECOND_SUM], values, n, np.int64(NO_GUESS))
        # Where the guess was right, what did not fit spreads over too many binades for the way taken.
        if ledger[WAY] == AS_BLOCK or guess - 2 * MARGIN < ledger[GUESS] <= guess:
            _go_on(ledger, ledger[WAY] + 1)


kl = make_kernel("kl", _kl_tile, light=ANY_NUMBER)
