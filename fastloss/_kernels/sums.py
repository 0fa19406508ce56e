"""Exact sums: adding floating-point numbers without any rounding, and rounding once at the end.

Why exact: the result then cannot depend on the order of addition, so ``sum`` and ``mean`` have the same bits for any
number of threads, any tiling and any way of cutting the rows into pieces, without fixing an order for all of them.

The state of a sum is one row of :data:`STATE_SIZE` int64: a fixed-point number of :data:`N_LIMBS` digits in base 2**32,
lowest first, the lowest digit counting 2**:data:`LOWEST_BIT`, wide enough for every float64; then how many NaN, +inf
and -inf were added. This is the long accumulator of Kulisch (Computer Arithmetic and Validity, 2008). Digits may be
negative or exceed 2**32 for a while (an int64 has room for 2**30 additions) until :func:`_carry`.

Adding one number to the accumulator takes some 5 ns; a block of them costs under 1 ns each by the pre-rounding method
of Demmel and Nguyen (Parallel reproducible summation, IEEE Trans. Computers 64, 2015), see :func:`add_block`. A kernel
that makes a value per element adds them as they are made, in registers, by the functions of some :class:`Grids`, with
an exponent guessed from the block before: any that fits gives the same sum, because the sum is exact, and whether it
fits is seen at the end.
"""

import math
from collections import namedtuple

import numpy as np

from fastloss._kernels._jit import Kernel, by_dtype, inline, subroutine
from fastloss._kernels._simd import (
    any_lane,
    first_lane,
    from_bits,
    integer_like,
    lanes,
    load,
    scalar,
    splat,
    store,
    to_bits,
    tree_max,
    tree_sum,
    where,
    widen,
)

LOWEST_BIT = -1152
N_LIMBS = 74
NANS, INFINITIES, MINUS_INFINITIES = N_LIMBS, N_LIMBS + 1, N_LIMBS + 2
STATE_SIZE = N_LIMBS + 3

# The longest block of add_block: where the exponent is guessed, values up to 2**51 units of the grid (2**22 of float32)
# are taken for fitting, and 512 (256) of them fit into a lane.
MAX_BLOCK = 4096

# The exponents that the grids of float32 and of float64 take: the constant of the coarsest must be finite, that of the
# finest, some 2**67 and 2**202 below, a normal number.
LOWEST_32, HIGHEST_32 = -81, 125
LOWEST_64, HIGHEST_64 = -799, 959
# How far the guess for the next block lies above the largest exponent of this one: its largest value may be 16 times
# this one's, and 40 binades (43 of float64) are left for the smallest; on wide grids 174 (145).
MARGIN = 4
NO_GUESS = 1 << 20
# Before anything is known: losses and weights are mostly below 64, and few are below 2**-39.
FIRST_GUESS = 5

_ZERO = np.int64(0)
_MASK32 = np.int64(0xFFFFFFFF)


@subroutine
def _add_integer(state, value, exponent):
    """Add the int64 ``value`` times 2**``exponent``."""
    position = exponent - LOWEST_BIT
    limb, shift = position >> 5, position & 31
    low = (value & _MASK32) << shift
    high = (value >> 32) << shift
    state[limb] += low & _MASK32
    state[limb + 1] += ((low >> 32) & _MASK32) + (high & _MASK32)
    state[limb + 2] += high >> 32


@subroutine
def _add_float(state, value):
    """Add one float64."""
    if math.isnan(value):
        state[NANS] += 1
    elif math.isinf(value):
        state[INFINITIES if value > 0 else MINUS_INFINITIES] += 1
    elif value != 0.0:
        fraction, exponent = math.frexp(value)
        _add_integer(state, np.int64(fraction * 9007199254740992.0), np.int64(exponent) - 53)


@subroutine
def _carry(state):
    """Bring every digit but the last into [0, 2**32); the last keeps the sign."""
    first, top = 0, N_LIMBS - 1
    while first < top and state[first] == 0:
        first += 1
    while top > first and state[top - 1] == 0:
        top -= 1
    # All digits from the top on, but for the last, are 0: without a carry they stay so.
    carry, limb = _ZERO, first
    while limb < top or (carry != 0 and limb < N_LIMBS - 1):
        digit = state[limb] + carry
        state[limb] = digit & _MASK32
        carry = digit >> 32
        limb += 1
    state[N_LIMBS - 1] += carry


@subroutine
def add_state(state, other):
    """Add one sum to another."""
    for i in range(STATE_SIZE):
        state[i] += other[i]
    _carry(state)


@inline
def _largest_exponent(values, n, mantissa_bits):
    """The biased exponent of the largest magnitude of ``values[:n]``, padded with zeros (above all others with inf or
    NaN), or -1 if all are 0.
    """
    like = values[0]
    sign = splat(integer_like(1, like)) << splat(integer_like(512 // lanes(like) - 1, like))
    largest = to_bits(splat(scalar(0.0, like)))
    for i in range(0, n, lanes(like)):
        size = to_bits(load(values, i, like)) & (sign - splat(integer_like(1, like)))
        largest = where(size > largest, size, largest)
    bits = np.int64(tree_max(largest))
    return (bits >> mantissa_bits) if bits else np.int64(-1)


@inline
def _round(v, constant):
    """The bits of the sum with a grid's constant, and what is left of ``v``, exactly."""
    on_grid = v + constant
    return to_bits(on_grid), v - (on_grid - constant)


@inline
def _last_round(v, constant):
    """As :func:`_round`, but of what is left only some bits, which are 0 (but for a sign) if nothing is."""
    on_grid = v + constant
    return to_bits(on_grid), to_bits(on_grid - constant) ^ to_bits(v)


@inline
def _grids32(like, exponent):
    grid, step = exponent - 21, np.int64(23) << 23
    bits = ((grid + 23 + 127) << 23) | (np.int64(1) << 22)
    high, middle = integer_like(bits, np.float32(0)), integer_like(bits - step, np.float32(0))
    low = integer_like(bits - 2 * step, np.float32(0))
    return from_bits(splat(high)), from_bits(splat(middle)), from_bits(splat(low))


@inline
def _no_sums32(like):
    zero = splat(integer_like(0, np.float32(0)))
    return zero, zero, zero, zero, zero


@inline
def _add_vector32(v, sums, grids):
    high, middle, low = grids
    high_sum, middle_sum, low_sum, lost, moved = sums
    bits, rest = _round(v, high)
    middle_bits, rest = _round(rest, middle)
    low_bits, last = _last_round(rest, low)
    moved = moved | (bits ^ to_bits(high))
    return high_sum + bits, middle_sum + middle_bits, low_sum + low_bits, lost | last, moved


@inline
def _halves_sums(lanes_, half):
    """The sums of the upper and of the lower ``half`` bits of integer lanes, which may not hold the sum of both."""
    like = first_lane(from_bits(lanes_))
    places, low = splat(integer_like(half, like)), splat(integer_like((1 << half) - 1, like))
    return np.int64(tree_sum(lanes_ >> places)), np.int64(tree_sum(lanes_ & low))


@inline
def _add_sum32(state, total, grid, n_vectors):
    """Add the sum of the bits of ``n_vectors`` vectors on a grid, less the constant's, modulo 2**32."""
    constant = (n_vectors * (((grid + 23 + 127) << 1) | 1) & 0x3FF) << 22
    high, low = _halves_sums(total - splat(integer_like(constant, np.float32(0))), 16)
    _add_integer(state, (high << 16) + low, grid)


@inline
def _add_large32(v, sums, grids):
    high, middle, low = grids
    high_sum, middle_sum, low_sum, lost, moved = sums
    bits, rest = _round(v, high)
    middle_bits, rest = _round(rest, middle)
    moved = moved | (bits ^ to_bits(high))
    return high_sum + bits, middle_sum + middle_bits, low_sum + to_bits(rest + low), lost, moved


@inline
def _add_all_sums32(state, sums, exponent, n_vectors, n_fine, is_guess):
    high_sum, middle_sum, low_sum, lost, moved = sums
    zero, sign = splat(integer_like(0, np.float32(0))), splat(integer_like(1, np.float32(0)))
    outside = (lost << sign) != zero
    if is_guess:
        outside = outside | ((moved >> splat(integer_like(23, np.float32(0)))) != zero)
    if any_lane(outside):
        return False
    _add_sum32(state, high_sum, exponent - 21, n_vectors)
    _add_sum32(state, middle_sum, exponent - 44, n_vectors)
    if n_fine > 0:
        _add_sum32(state, low_sum, exponent - 67, n_fine)
    return True


@inline
def _add_sums32(like, state, sums, exponent, n_vectors, is_guess):
    return _add_all_sums32(state, sums, exponent, n_vectors, n_vectors, is_guess)


@inline
def _no_narrowest_sums32(like):
    return _no_sums32(like), _ZERO


@inline
def _add_fine32(v, sums, grids):
    of_grids, n_fine = sums
    return _add_vector32(v, of_grids, grids), n_fine + 1


@inline
def _add_coarse32(v, sums, grids):
    high, middle, _ = grids
    (high_sum, middle_sum, low_sum, lost, moved), n_fine = sums
    bits, rest = _round(v, high)
    moved = moved | (bits ^ to_bits(high))
    return (high_sum + bits, middle_sum + to_bits(rest + middle), low_sum, lost, moved), n_fine


@inline
def _add_narrowest_sums32(like, state, sums, exponent, n_vectors, is_guess):
    of_grids, n_fine = sums
    return _add_all_sums32(state, of_grids, exponent, n_vectors, n_fine, is_guess)


@inline
def _grids64(like, exponent):
    grid, step = exponent - 49, np.int64(51) << 52
    bits = ((grid + 52 + 1023) << 52) | (np.int64(1) << 51)
    return from_bits(splat(bits)), from_bits(splat(bits - step))


@inline
def _no_sums64(like):
    return splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)


@inline
def _add_vector64(v, sums, grids):
    high, low = grids
    high_sum, low_sum, lost, moved = sums
    bits, rest = _round(v, high)
    low_bits, last = _last_round(rest, low)
    moved = moved | (bits ^ to_bits(high))
    return high_sum + bits, low_sum + low_bits, lost | last, moved


@inline
def _wide_grids(like, exponent):
    high, second = _grids64(like, exponent)
    third, low = _grids64(like, exponent - 102)
    return high, second, third, low


@inline
def _no_wide_sums(like):
    return splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)


@inline
def _add_wide64(v, sums, grids):
    high, second, third, low = grids
    high_sum, second_sum, third_sum, low_sum, lost, moved = sums
    bits, rest = _round(v, high)
    second_bits, rest = _round(rest, second)
    third_bits, rest = _round(rest, third)
    low_bits, last = _last_round(rest, low)
    moved = moved | (bits ^ to_bits(high))
    return high_sum + bits, second_sum + second_bits, third_sum + third_bits, low_sum + low_bits, lost | last, moved


@inline
def _add_wide32(v, sums, grids):
    low, high = widen(v)
    return _add_wide64(high, _add_wide64(low, sums, grids), grids)


@inline
def _add_sum64(state, total, grid, n_vectors):
    """As :func:`_add_sum32`, modulo 2**64."""
    constant = n_vectors * (((grid + 52 + 1023) << 1) | 1) & 0x1FFF
    constant = ((constant ^ 0x1000) - 0x1000) << 51
    high, low = _halves_sums(total - splat(np.int64(constant)), 32)
    _add_integer(state, high, grid + 32)
    _add_integer(state, low, grid)


@inline
def _was_inexact64(lost, moved, is_guess):
    outside = (lost << splat(np.int64(1))) != splat(_ZERO)
    if is_guess:
        outside = outside | ((moved >> splat(np.int64(52))) != splat(_ZERO))
    return any_lane(outside)


@inline
def _add_sums64(like, state, sums, exponent, n_vectors, is_guess):
    high_sum, low_sum, lost, moved = sums
    if _was_inexact64(lost, moved, is_guess):
        return False
    _add_sum64(state, high_sum, exponent - 49, n_vectors)
    _add_sum64(state, low_sum, exponent - 100, n_vectors)
    return True


@inline
def _add_wide_sums64(like, state, sums, exponent, n_vectors, is_guess):
    high_sum, second_sum, third_sum, low_sum, lost, moved = sums
    if _was_inexact64(lost, moved, is_guess):
        return False
    _add_sum64(state, high_sum, exponent - 49, n_vectors)
    _add_sum64(state, second_sum, exponent - 100, n_vectors)
    _add_sum64(state, third_sum, exponent - 151, n_vectors)
    _add_sum64(state, low_sum, exponent - 202, n_vectors)
    return True


@inline
def _add_wide_sums32(like, state, sums, exponent, n_vectors, is_guess):
    return _add_wide_sums64(like, state, sums, exponent, 2 * n_vectors, is_guess)


# Vectors on grids, the functions by the type of the vectors, of which each takes one first.
#   grids(like, exponent)        the constants of the grids for values below 2**(exponent + 1), see add_block
#   no_sums(like)                the sums of no vectors, one per grid; in which bits something was lost, and which bits
#                                of the first have changed
#   add_vector(v, sums, grids)   the sums with a vector more
#   add_large(v, sums, grids)    the same, where no value of float32 but 0 is below 2**(exponent - reach)
#   add_sums(like, state, sums, exponent, n_vectors, is_guess)
#                                add the sums of so many vectors to a state; whether that was exact (else nothing is
#                                added). Where the exponent is a guess, the values may be anything, but no more than
#                                MAX_BLOCK of them may differ from 0.
Grids = namedtuple("Grids", "grids no_sums add_vector add_large add_sums reach")

# Three of float32, or two of float64.
NARROW = Grids(
    by_dtype(_grids32, _grids64),
    by_dtype(_no_sums32, _no_sums64),
    by_dtype(_add_vector32, _add_vector64),
    by_dtype(_add_large32, _add_vector64),
    by_dtype(_add_sums32, _add_sums64),
    44,
)

# Four of float64 for either: from the exponent down to 2**-202 times it. (Numbers of float32 that reach from 2**50 to
# the smallest there is fit, so no tile of probabilities, of whatever spread, is added number by number: the divergence
# of distributions of logits with a standard deviation of 16 would take 8 times as long.)
_add_wide = by_dtype(_add_wide32, _add_wide64)
WIDE = Grids(_wide_grids, _no_wide_sums, _add_wide, _add_wide, by_dtype(_add_wide_sums32, _add_wide_sums64), 178)

# As the narrow ones, but that the large values of float32 go on two grids alone: 7 operations for a vector in place of
# 11 (and of 7 for a sum of float64 that rounds, 5 of which widen the vector).
NARROWEST = Grids(
    by_dtype(_grids32, _grids64),
    by_dtype(_no_narrowest_sums32, _no_sums64),
    by_dtype(_add_fine32, _add_vector64),
    by_dtype(_add_coarse32, _add_vector64),
    by_dtype(_add_narrowest_sums32, _add_sums64),
    21,
)


def _make_add_on(kind):
    grids, no_sums, add_vector, _, add_sums, _ = kind

    @inline
    def add_on_grids(state, values, n, exponent, is_guess):
        """Add ``values`` below 2**(exponent + 1), or any for a guess; whether that was exact."""
        vector, n_lanes = splat(values[0]), lanes(values[0])
        constants, sums = grids(vector, exponent), no_sums(vector)
        for i in range(0, n, n_lanes):
            sums = add_vector(load(values, i, values[0]), sums, constants)
        return add_sums(vector, state, sums, exponent, (n + n_lanes - 1) // n_lanes, is_guess)

    return add_on_grids


_add_on_narrow, _add_on_wide = _make_add_on(NARROW), _make_add_on(WIDE)


def _make_add_grids(mantissa_bits, bias, lowest, highest):
    special = bias + 1  # the exponent of inf and NaN

    @inline
    def add_grids(values, state, n):
        """Add a block on grids, if its exponents allow: whether that was exact (else nothing is added), and a guess."""
        exponent = max(_largest_exponent(values, n, mantissa_bits) - bias, np.int64(lowest))
        was_exact = exponent <= highest and _add_on_narrow(state, values, n, exponent, False)
        if not was_exact and exponent < special and exponent <= HIGHEST_64:
            was_exact = _add_on_wide(state, values, n, exponent, False)
        return was_exact, min(exponent + MARGIN, np.int64(highest)) if was_exact else np.int64(NO_GUESS)

    return add_grids


_add_grids = by_dtype(_make_add_grids(23, 127, LOWEST_32, HIGHEST_32), _make_add_grids(52, 1023, LOWEST_64, HIGHEST_64))


@subroutine
def add_block(state, values, n, guess):
    """Add ``values[:n]`` exactly; ``values`` is scratch with room for one vector more, which is overwritten. Returns an
    exponent that will probably do for a block like this one, or :data:`NO_GUESS`. With such a ``guess`` there is
    no pass for the largest value.

    Method: with M = 1.5 * 2**(p - 1 + g), where p is the precision, t = v + M holds v rounded to a multiple of 2**g in
    its low bits, so that the bits of t, added as integers, sum those multiples without error. The grid g is laid so
    that the block's largest value just fits. The remainder v - (t - M), which is exact, goes through finer grids in
    turn: three of float32 reach 2**-67 of the largest value with 16 lanes to a vector, two of float64 2**-100 with 8,
    four 2**-202. The bits of M itself, as often as there are vectors, are taken off the integer at the end. A v too
    large for the grid changes the exponent of t.
    Where a value reaches below that too, or is not finite, or the exponents come near the ends of float64, the block is
    added number by number.
    """
    store(values, n, splat(scalar(0.0, values[0])))
    if guess != NO_GUESS and _add_on_narrow(state, values, n, guess, True):
        return guess
    was_exact, guess = _add_grids(values, state, n)
    if not was_exact:
        for i in range(n):
            _add_float(state, np.float64(values[i]))
        _carry(state)
    return guess


@subroutine
def rounded(state):
    """The sum as the nearest float64, ties to even, as IEEE arithmetic would give it without intermediate rounding."""
    if state[NANS] or (state[INFINITIES] and state[MINUS_INFINITIES]):
        return math.nan
    if state[INFINITIES]:
        return math.inf
    if state[MINUS_INFINITIES]:
        return -math.inf
    digits = _ZERO
    for limb in range(N_LIMBS):
        digits |= state[limb]
    if digits == 0:
        return 0.0
    _carry(state)
    negative = state[N_LIMBS - 1] < 0
    if negative:
        for limb in range(N_LIMBS):
            state[limb] = -state[limb]
        _carry(state)
    top = N_LIMBS - 1
    while top > 2 and state[top] == 0:
        top -= 1
    # Three digits below the top one hold at least 65 bits: 62 of them are kept, all others are one sticky bit.
    high, middle, low = state[top], state[top - 1], state[top - 2]
    sticky = False
    for limb in range(top - 2):
        sticky = sticky or state[limb] != 0
    used = 0
    while used < 32 and high >> used != 0:
        used += 1
    # kept = high (used bits), middle (32 bits) and the upper 30 - used bits of low
    spare = 30 - used
    if spare >= 0:
        kept = (high << (62 - used)) | (middle << spare) | (low >> (32 - spare))
        sticky = sticky or (low & ((np.int64(1) << (32 - spare)) - 1)) != 0
        exponent = (top - 2) * 32 + (32 - spare)
    else:
        kept = (high << 30) | (middle >> 2)
        sticky = sticky or low != 0 or (middle & 3) != 0
        exponent = (top - 1) * 32 + 2
    if sticky:
        kept |= 1
    if negative:
        for limb in range(N_LIMBS):
            state[limb] = -state[limb]
        _carry(state)
        kept = -kept
    return math.ldexp(np.float64(kept), exponent + LOWEST_BIT)


def _add_values(n_workers, state, values):
    """Add a one-dimensional array; returns the sum so far, rounded."""
    scratch = np.empty(MAX_BLOCK + 16, values.dtype)
    for begin in range(0, len(values), MAX_BLOCK):
        n = min(MAX_BLOCK, len(values) - begin)
        for i in range(n):
            scratch[i] = values[begin + i]
        add_block(state, scratch, n, np.int64(NO_GUESS))
        _carry(state)
    return rounded(state)


add_values = Kernel("add_values", _add_values)
