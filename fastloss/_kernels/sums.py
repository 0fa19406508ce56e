"""Exact sums: adding floating-point numbers without any rounding, and rounding once at the end.

Why exact: the result then cannot depend on the order of addition, so ``sum`` and ``mean`` have the same bits for any
number of threads, any tiling and any way of cutting the rows into pieces, without fixing an order for all of them.

The state of a sum is one row of :data:`STATE_SIZE` int64: a fixed-point number of :data:`N_LIMBS` digits in base 2**32,
lowest first, the lowest digit counting 2**:data:`LOWEST_BIT`, wide enough for every float64; then how many NaN, +inf
and -inf were added. This is the long accumulator of Kulisch (Computer Arithmetic and Validity, 2008). Digits may be
negative or exceed 2**32 for a while (an int64 has room for 2**30 additions) until :func:`_carry`.

Adding one number to the accumulator takes some 5 ns; a block of them costs under 1 ns each by the pre-rounding method
of Demmel and Nguyen (Parallel reproducible summation, IEEE Trans. Computers 64, 2015), see :func:`add_block`. A kernel
that makes a value per element adds them as they are made, in registers, by :func:`grids`, :func:`no_sums`,
:func:`add_vector` and :func:`add_sums`, with an exponent guessed from the block before: any that fits gives the same
sum, because the sum is exact, and whether it fits is seen at the end.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload

from fastloss._kernels._jit import Kernel, inline, subroutine
from fastloss._kernels._simd import (
    any_lane,
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
)

LOWEST_BIT = -1152
N_LIMBS = 74
NANS, INFINITIES, MINUS_INFINITIES = N_LIMBS, N_LIMBS + 1, N_LIMBS + 2
STATE_SIZE = N_LIMBS + 3

# The longest block of add_block: 2**50 * 4096 fits into an int64.
MAX_BLOCK = 4096
# The same where the exponent is guessed: values up to 2**51 units of the grid are taken for fitting.
MAX_GUESSED = 2048

# The exponents that the grids of float32 and of float64 take: the constant of the coarsest must be finite, that of the
# finest, some 2**67 and 2**100 below, a normal number.
LOWEST_NARROW, HIGHEST_NARROW = -81, 125
LOWEST_WIDE, HIGHEST_WIDE = -799, 959
# How far the guess for the next block lies above the largest exponent of this one: its largest value may be 16 times
# this one's, and 40 binades (43 of float64) are left for the smallest.
MARGIN = 4
NO_GUESS = 1 << 20

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
    carry = _ZERO
    for limb in range(N_LIMBS - 1):
        digit = state[limb] + carry
        state[limb] = digit & _MASK32
        carry = digit >> 32
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
def _lane_sum(lanes_):
    """The sum of int32 lanes as int64, which an int32 may not hold."""
    low, places = splat(integer_like(0xFFFF, np.float32(0))), splat(integer_like(16, np.float32(0)))
    return (np.int64(tree_sum(lanes_ >> places)) << 16) + np.int64(tree_sum(lanes_ & low))


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
def _grids32(exponent):
    grid, step, like = exponent - 21, np.int64(23) << 23, np.float32(0)
    bits = ((grid + 23 + 127) << 23) | (np.int64(1) << 22)
    high, middle = integer_like(bits, like), integer_like(bits - step, like)
    low = integer_like(bits - 2 * step, like)
    return from_bits(splat(high)), from_bits(splat(middle)), from_bits(splat(low))


@inline
def _no_sums32():
    zero = splat(integer_like(0, np.float32(0)))
    return zero, zero, zero, zero, zero


@inline
def _add_vector32(sums, grids, v):
    high, middle, low = grids
    high_sum, middle_sum, low_sum, lost, moved = sums
    bits, rest = _round(v, high)
    middle_bits, rest = _round(rest, middle)
    low_bits, last = _last_round(rest, low)
    moved = moved | (bits ^ to_bits(high))
    return high_sum + bits, middle_sum + middle_bits, low_sum + low_bits, lost | last, moved


@inline
def _add_sum32(state, total, grid, n_vectors):
    """Add the sum of the bits of ``n_vectors`` vectors on a grid, less the constant's, modulo 2**32."""
    constant = (n_vectors * (((grid + 23 + 127) << 1) | 1) & 0x3FF) << 22
    _add_integer(state, _lane_sum(total - splat(integer_like(constant, np.float32(0)))), grid)


@inline
def _add_sums32(state, sums, exponent, n_vectors, may_have_moved):
    high_sum, middle_sum, low_sum, lost, moved = sums
    zero, sign = splat(integer_like(0, np.float32(0))), splat(integer_like(1, np.float32(0)))
    outside = (lost << sign) != zero
    if may_have_moved:
        outside = outside | ((moved >> splat(integer_like(23, np.float32(0)))) != zero)
    if any_lane(outside):
        return False
    _add_sum32(state, high_sum, exponent - 21, n_vectors)
    _add_sum32(state, middle_sum, exponent - 44, n_vectors)
    _add_sum32(state, low_sum, exponent - 67, n_vectors)
    return True


@inline
def _grids64(exponent):
    grid, step = exponent - 49, np.int64(51) << 52
    bits = ((grid + 52 + 1023) << 52) | (np.int64(1) << 51)
    return from_bits(splat(bits)), from_bits(splat(bits - step))


@inline
def _no_sums64():
    return splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)


@inline
def _add_vector64(sums, grids, v):
    high, low = grids
    high_sum, low_sum, lost, moved = sums
    bits, rest = _round(v, high)
    low_bits, last = _last_round(rest, low)
    moved = moved | (bits ^ to_bits(high))
    return high_sum + bits, low_sum + low_bits, lost | last, moved


@inline
def _add_sum64(state, total, grid, n_vectors):
    """As :func:`_add_sum32`, modulo 2**64."""
    constant = n_vectors * (((grid + 52 + 1023) << 1) | 1) & 0x1FFF
    constant = ((constant ^ 0x1000) - 0x1000) << 51
    _add_integer(state, tree_sum(total - splat(np.int64(constant))), grid)


@inline
def _add_sums64(state, sums, exponent, n_vectors, may_have_moved):
    high_sum, low_sum, lost, moved = sums
    outside = (lost << splat(np.int64(1))) != splat(_ZERO)
    if may_have_moved:
        outside = outside | ((moved >> splat(np.int64(52))) != splat(_ZERO))
    if any_lane(outside):
        return False
    _add_sum64(state, high_sum, exponent - 49, n_vectors)
    _add_sum64(state, low_sum, exponent - 100, n_vectors)
    return True


def grids(exponent, like):
    """The constants of the grids for values of ``like``'s type below 2**(exponent + 1); see :func:`add_block`."""
    return _grids32(exponent) if isinstance(like, np.float32) else _grids64(exponent)


@overload(grids, jit_options={"forceinline": True})
def _(exponent, like):
    if like == types.float32:
        return lambda exponent, like: _grids32(exponent)
    return lambda exponent, like: _grids64(exponent)


def no_sums(like):
    """The sums of no vectors: one per grid; in which bits something was lost; which bits of the first have changed."""
    return _no_sums32() if isinstance(like, np.float32) else _no_sums64()


@overload(no_sums, jit_options={"forceinline": True})
def _(like):
    if like == types.float32:
        return lambda like: _no_sums32()
    return lambda like: _no_sums64()


def add_vector(sums, grids, v):
    """The sums with a vector more; see :func:`add_block`."""
    return (_add_vector32 if v.dtype == np.float32 else _add_vector64)(sums, grids, v)


@overload(add_vector, jit_options={"forceinline": True})
def _(sums, grids, v):
    if v.dtype == types.float32:
        return lambda sums, grids, v: _add_vector32(sums, grids, v)
    return lambda sums, grids, v: _add_vector64(sums, grids, v)


def add_sums(state, sums, exponent, n_vectors, like, is_guess):
    """Add the sums of ``n_vectors`` vectors on ``grids(exponent, like)``; whether that was exact (else nothing is
    added). Where the exponent ``is_guess``, the values may be anything, but no more than :data:`MAX_GUESSED` of them
    may differ from 0.
    """
    add = _add_sums32 if isinstance(like, np.float32) else _add_sums64
    return add(state, sums, exponent, n_vectors, is_guess)


@overload(add_sums, jit_options={"forceinline": True})
def _(state, sums, exponent, n_vectors, like, is_guess):
    if like == types.float32:
        return lambda state, sums, exponent, n_vectors, like, is_guess: _add_sums32(
            state, sums, exponent, n_vectors, is_guess
        )
    return lambda state, sums, exponent, n_vectors, like, is_guess: _add_sums64(
        state, sums, exponent, n_vectors, is_guess
    )


@inline
def _add_on_grids(state, values, n, exponent, like):
    """Add ``values`` below 2**(exponent + 1) on the grids of the type of ``like``; whether that was exact."""
    constants, sums = grids(exponent, like), no_sums(like)
    n_lanes = lanes(like)
    for i in range(0, n, n_lanes):
        sums = add_vector(sums, constants, load(values, i, like))
    return add_sums(state, sums, exponent, (n + n_lanes - 1) // n_lanes, like, False)


@inline
def _add_narrow(state, values, n):
    # (From inf or NaN on, the exponent is 128.)
    exponent = max(_largest_exponent(values, n, 23) - 127, np.int64(LOWEST_NARROW))
    if exponent <= HIGHEST_NARROW and _add_on_grids(state, values, n, exponent, values[0]):
        return True, min(exponent + MARGIN, np.int64(HIGHEST_NARROW))
    return exponent < 128 and _add_on_grids(state, values, n, exponent, 0.0), np.int64(NO_GUESS)


@inline
def _add_wide(state, values, n):
    exponent = max(_largest_exponent(values, n, 52) - 1023, np.int64(LOWEST_WIDE))
    if exponent <= HIGHEST_WIDE and _add_on_grids(state, values, n, exponent, values[0]):
        return True, min(exponent + MARGIN, np.int64(HIGHEST_WIDE))
    return False, np.int64(NO_GUESS)


def _add_grids(state, values, n):
    """Add a block on grids, if its exponents allow: whether that was exact (else nothing is added), and the guess."""
    return (_add_narrow if values.dtype == np.float32 else _add_wide)(state, values, n)


@overload(_add_grids, jit_options={"forceinline": True})
def _(state, values, n):
    if values.dtype == types.float32:
        return lambda state, values, n: _add_narrow(state, values, n)
    return lambda state, values, n: _add_wide(state, values, n)


@subroutine
def add_block(state, values, n):
    """Add ``values[:n]`` exactly; ``values`` is scratch with room for one vector more, which is overwritten. Returns an
    exponent for :func:`grids` that will probably do for a block like this one, or :data:`NO_GUESS`.

    Method: with M = 1.5 * 2**(p - 1 + g), where p is the precision, t = v + M holds v rounded to a multiple of 2**g in
    its low bits, so that the bits of t, added as integers, sum those multiples without error. The grid g is laid so
    that the block's largest value just fits. The remainder v - (t - M), which is exact, goes through finer grids in
    turn: three of float32 reach 2**-67 of the largest value with 16 lanes to a vector, two of float64 2**-100 with 8.
    The bits of M itself, as often as there are vectors, are taken off the integer at the end. A v too large for the
    grid changes the exponent of t.
    Where a value reaches below that too, or is not finite, or the exponents come near the ends of float64, the block is
    added number by number.
    """
    store(values, n, splat(scalar(0.0, values[0])))
    was_exact, guess = _add_grids(state, values, n)
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
        add_block(state, scratch, n)
        _carry(state)
    return rounded(state)


add_values = Kernel("add_values", _add_values)
