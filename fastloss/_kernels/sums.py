"""Exact sums: adding floating-point numbers without any rounding, and rounding once at the end.

Why exact: the result then cannot depend on the order of addition, so ``sum`` and ``mean`` have the same bits for any
number of threads, any tiling and any way of cutting the rows into pieces, without fixing an order for all of them.

The state of a sum is one row of :data:`STATE_SIZE` int64: a fixed-point number of :data:`N_LIMBS` digits in base 2**32,
lowest first, the lowest digit counting 2**:data:`LOWEST_BIT`, wide enough for every float64; then how many NaN, +inf
and -inf were added. This is the long accumulator of Kulisch (Computer Arithmetic and Validity, 2008). Digits may be
negative or exceed 2**32 for a while (an int64 has room for 2**30 additions) until :func:`_carry`.

Adding one number to the accumulator takes some 5 ns; a block of them costs under 1 ns each by the pre-rounding method
of Demmel and Nguyen (Parallel reproducible summation, IEEE Trans. Computers 64, 2015), see :func:`add_block`.
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
def _lane_sum(lanes_):
    """The sum of int32 lanes as int64, which an int32 may not hold."""
    low, places = splat(integer_like(0xFFFF, np.float32(0))), splat(integer_like(16, np.float32(0)))
    return (np.int64(tree_sum(lanes_ >> places)) << 16) + np.int64(tree_sum(lanes_ & low))


@inline
def _add_float32_grids(state, values, n, exponent):
    """Add float32 ``values`` below 2**(exponent + 1) on three grids; whether that was exact (else nothing is added)."""
    like = np.float32(0)
    grid = exponent - 21
    step = np.int64(23) << 23
    high_bits = ((grid + 23 + 127) << 23) | (np.int64(1) << 22)
    high = from_bits(splat(integer_like(high_bits, like)))
    middle = from_bits(splat(integer_like(high_bits - step, like)))
    low = from_bits(splat(integer_like(high_bits - 2 * step, like)))
    zero = splat(integer_like(0, like))
    high_sum, middle_sum, low_sum = zero, zero, zero
    outside = high != high
    for i in range(0, n, lanes(like)):
        v = load(values, i, like)
        on_high = v + high
        rest = v - (on_high - high)
        on_middle = rest + middle
        rest = rest - (on_middle - middle)
        on_low = rest + low
        outside = outside | (on_low - low != rest)
        high_sum = high_sum + (to_bits(on_high) - to_bits(high))
        middle_sum = middle_sum + (to_bits(on_middle) - to_bits(middle))
        low_sum = low_sum + (to_bits(on_low) - to_bits(low))
    if any_lane(outside):
        return False
    _add_integer(state, _lane_sum(high_sum), grid)
    _add_integer(state, _lane_sum(middle_sum), grid - 23)
    _add_integer(state, _lane_sum(low_sum), grid - 46)
    return True


@inline
def _add_float64_grids(state, values, n, exponent):
    """Add ``values`` below 2**(exponent + 1) on two grids of float64; whether that was exact, as above."""
    grid = exponent - 49
    step = np.int64(51) << 52
    high_bits = ((grid + 52 + 1023) << 52) | (np.int64(1) << 51)
    high, low = from_bits(splat(high_bits)), from_bits(splat(high_bits - step))
    high_sum, low_sum = splat(_ZERO), splat(_ZERO)
    outside = high != high
    for i in range(0, n, lanes(0.0)):
        v = load(values, i, 0.0)
        on_high = v + high
        rest = v - (on_high - high)
        on_low = rest + low
        outside = outside | (on_low - low != rest)
        high_sum = high_sum + (to_bits(on_high) - to_bits(high))
        low_sum = low_sum + (to_bits(on_low) - to_bits(low))
    if any_lane(outside):
        return False
    _add_integer(state, tree_sum(high_sum), grid)
    _add_integer(state, tree_sum(low_sum), grid - 51)
    return True


@inline
def _add_narrow(state, values, n):
    # The lowest of the three grids is 2**(exponent - 67), whose constant must be a normal float32.
    exponent = _largest_exponent(values, n, 23) - 127
    if -82 < exponent < 126 and _add_float32_grids(state, values, n, exponent):
        return True
    return exponent < 127 and _add_float64_grids(state, values, n, exponent)


@inline
def _add_wide(state, values, n):
    exponent = _largest_exponent(values, n, 52) - 1023
    return -800 < exponent < 960 and _add_float64_grids(state, values, n, exponent)


def _add_grids(state, values, n):
    """Add a block on grids, if its exponents allow; whether that was exact (else nothing is added)."""
    return (_add_narrow if values.dtype == np.float32 else _add_wide)(state, values, n)


@overload(_add_grids, jit_options={"forceinline": True})
def _(state, values, n):
    if values.dtype == types.float32:
        return lambda state, values, n: _add_narrow(state, values, n)
    return lambda state, values, n: _add_wide(state, values, n)


@subroutine
def add_block(state, values, n):
    """Add ``values[:n]`` exactly; ``values`` is scratch with room for one vector more, which is overwritten.

    Method: with M = 1.5 * 2**(p - 1 + g), where p is the precision, t = v + M holds v rounded to a multiple of 2**g in
    its low bits, so that the bits of t, added as integers, sum those multiples without error. The grid g is laid so
    that the block's largest value just fits. The remainder v - (t - M), which is exact, goes through finer grids in
    turn: three of float32 reach 2**-67 of the largest value with 16 lanes to a vector, two of float64 2**-100 with 8.
    Where a value reaches below that too, or is not finite, or the exponents come near the ends of float64, the block is
    added number by number.
    """
    store(values, n, splat(scalar(0.0, values[0])))
    if not _add_grids(state, values, n):
        for i in range(n):
            _add_float(state, np.float64(values[i]))
        _carry(state)


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
