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

from fastloss._kernels._jit import Kernel, inline, subroutine
from fastloss._kernels._simd import (
    any_lane,
    first_lane,
    from_bits,
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
_FRACTION_BITS = np.int64(52)


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
def _largest(values, n):
    """The largest magnitude of ``values[:n]``, padded with zeros; NaN counts as 0 unless there is nothing else."""
    like = values[0]
    nothing = splat(scalar(0.0, like))
    largest, unequal = nothing, nothing != nothing
    for i in range(0, n, lanes(like)):
        v = load(values, i, like)
        size = where(v < nothing, -v, v)
        largest = where(size > largest, size, largest)
        unequal = unequal | (v != nothing)
    result = np.float64(tree_max(largest))
    return result if result > 0.0 or not any_lane(unequal) else math.nan


@inline
def _add_to_grid(state, values, n, grid, top):
    """Add the multiples of 2**``grid`` (and, one level down, of 2**(grid - 51)) that are values; whether all are."""
    high_bits = ((np.int64(grid + 52 + 1023)) << _FRACTION_BITS) | (np.int64(1) << np.int64(51))
    low_bits = high_bits - (np.int64(51) << _FRACTION_BITS)
    shift_high, shift_low = from_bits(splat(high_bits)), from_bits(splat(low_bits))
    sum_high, sum_low = splat(_ZERO), splat(_ZERO)
    outside = shift_high != shift_high
    for i in range(0, n, lanes(0.0)):
        v = load(values, i, 0.0)
        high = v + shift_high
        sum_high = sum_high + (to_bits(high) - splat(high_bits))
        if top:
            outside = outside | (high - shift_high != v)
        else:
            rest = v - (high - shift_high)
            low = rest + shift_low
            sum_low = sum_low + (to_bits(low) - splat(low_bits))
            outside = outside | (low - shift_low != rest)
    if any_lane(outside):
        return False
    _add_integer(state, tree_sum(sum_high), grid)
    if not top:
        _add_integer(state, tree_sum(sum_low), grid - 51)
    return True


@subroutine
def add_block(state, values, n):
    """Add ``values[:n]`` exactly; ``values`` is scratch with room for one vector more, which is overwritten.

    Method: with M = 1.5 * 2**(52 + g), t = v + M holds v rounded to a multiple of 2**g in its low bits, so that the
    bits of t, added as integers, sum those multiples without error. The grid g is laid so that the block's largest
    value just fits, and then reaches 2**-50 of it. If some value has bits below that, the remainder r = v - (t - M),
    which is exact, goes through a second, 2**51 times finer grid. Where a value reaches below that too, or is not
    finite, or the exponents come near the ends of float64, the block is added number by number.
    """
    store(values, n, splat(scalar(0.0, values[0])))
    largest = _largest(values, n)
    if largest == 0.0:
        return
    exponent = (first_lane(to_bits(splat(largest))) >> _FRACTION_BITS) - 1023
    # grid + 52 is the exponent of M; |v| < 2**(exponent + 1) = 2**(grid + 50)
    grid = exponent - 49
    fits = -800 < exponent < 960
    if fits and (_add_to_grid(state, values, n, grid, True) or _add_to_grid(state, values, n, grid, False)):
        return
    for i in range(n):
        _add_float(state, np.float64(values[i]))


@subroutine
def rounded(state):
    """The sum as the nearest float64, ties to even, as IEEE arithmetic would give it without intermediate rounding."""
    if state[NANS] or (state[INFINITIES] and state[MINUS_INFINITIES]):
        return math.nan
    if state[INFINITIES]:
        return math.inf
    if state[MINUS_INFINITIES]:
        return -math.inf
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
