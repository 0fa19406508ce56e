"""exp, log1p and log of vectors, for float32 and float64: the same bits on every CPU.

Each function is built from its constants by one factory (:func:`_make_exp`, :func:`_make_log1p`, :func:`_make_log`), so
that there is one body for both dtypes. The polynomials were made, and their errors measured, by
``benchmarks/minimax.py``.
"""

import numpy as np

from fastloss._kernels._jit import by_dtype, inline
from fastloss._kernels._simd import (
    first_lane,
    fma,
    from_bits,
    negative_zeros_like,
    polynomial,
    polynomial_by_pairs,
    scalar,
    splat,
    to_bits,
    to_float,
    where,
)

__all__ = [
    "LOG1P_LIMIT",
    "exp",
    "exp_and_difference",
    "exp_difference",
    "exp_difference_in_parts",
    "exp_falling",
    "exp_falling_difference",
    "exp_of_any",
    "log",
    "log1p",
    "log_difference",
]


# Largest argument of log1p: its 2**-k is a normal float32 up to here. (float64 could go further; one bound is simpler.)
LOG1P_LIMIT = 2.0**126


def _split(value, dtype):
    """``value``, an exact ``(high, low)`` pair of floats, as two numbers of ``dtype``."""
    high, low = value
    first = dtype(high)
    return first, dtype((high - float(first)) + low)


# ln(2) = 0x1.62e42fefa39efp-1 + 0x1.abc9e3b39803fp-56 and log2(e), from their known expansions.
_LN2 = (float.fromhex("0x1.62e42fefa39efp-1"), float.fromhex("0x1.abc9e3b39803fp-56"))
_LOG2E = 1.4426950408889634


def _make_exp(dtype, coefficients, low, high):
    """Make exp(d), exp(d + low) where ``low`` is at most a unit in d's last place, or anything, NaN included, where d
    is clamped, and both, for vectors of ``dtype``; the first two again, the same bits in an operation less, where d is
    not positive; and exp(d + low) with what its last rounding loses.

    Computes exp(d) = 2**n * (1 + f + f**2 * p(f)) with n = rint(d * log2(e)), f = d - n * ln(2).

    Method: adding the constant ``shift`` rounds d * log2(e) to the integer n and leaves n plus the exponent bias in
    the low bits, so that one integer shift makes 2**n. ln(2) in two parts keeps f, and so the result, accurate for
    large |d|; in float32 its first part alone, which is within 2e-9, serves exp(d), where d's own rounding counts for
    more: 6e-8 |d| / 2 against 3e-9 |d|. The last step is one fused operation on 2**n, not an addition to the exponent
    field, which would destroy NaNs.

    Special values: exactly 1 at 0, exactly 0 below ``low`` (where 2**n is the first exponent that is 0), inf or NaN
    above about ln(largest number) (the callers ask only whether the result is finite), NaN for NaN.

    Accuracy: under 1 ulp, but for 2**-28.5 |d| of exp(d) in float32, wherever the result is a normal number
    (tests/test_vecmath.py).
    """
    mantissa_bits = 23 if dtype is np.float32 else 52
    bias = 127 if dtype is np.float32 else 1023
    integer = np.int32 if dtype is np.float32 else np.int64
    ln2_high, ln2_low = _split(_LN2, dtype)
    log2e = dtype(_LOG2E)
    shift = dtype(1.5 * 2.0**mantissa_bits + bias)
    lowest, highest = dtype(low), dtype(high)
    minus_high, minus_low = dtype(-ln2_high), dtype(-ln2_low)
    places = integer(mantissa_bits)
    p = polynomial(*[dtype(c) for c in coefficients])
    one_part = dtype is np.float32

    @inline
    def clamp_low(d):
        return where(d < splat(lowest), splat(lowest), d)

    @inline
    def clamp(d):
        d = clamp_low(d)
        return where(d > splat(highest), splat(highest), d)

    @inline
    def counted(low, d, clamped):
        # What a difference of huge numbers has lost can be huge, and of infinite ones NaN: times 0 it would be NaN.
        return where(d == clamped, low, negative_zeros_like(d))

    @inline
    def power_of_two(shifted):
        return from_bits(to_bits(shifted) << splat(places))

    @inline
    def scaled(f, shifted):
        power = power_of_two(shifted)
        return fma(fma(f * f, p(f), f), power, power)

    def make(clamp):
        @inline
        def exp(d):
            d = clamp(d)
            shifted = fma(d, splat(log2e), splat(shift))
            n = shifted - splat(shift)
            f = fma(n, splat(minus_high), d)
            return scaled(f if one_part else fma(n, splat(minus_low), f), shifted)

        @inline
        def exp_sum(d, low):
            clamped = clamp(d)
            shifted = fma(clamped, splat(log2e), splat(shift))
            n = shifted - splat(shift)
            low = counted(low, d, clamped)
            return scaled(fma(n, splat(minus_high), clamped) + fma(n, splat(minus_low), low), shifted)

        return exp, exp_sum

    @inline
    def exp_both(d, low):
        clamped = clamp(d)
        shifted = fma(clamped, splat(log2e), splat(shift))
        n = shifted - splat(shift)
        low = counted(low, d, clamped)
        f = fma(n, splat(minus_high), clamped)
        e = scaled(f if one_part else fma(n, splat(minus_low), f), shifted)
        return e, fma(e, fma(n, splat(minus_low), low) if one_part else low, e)

    @inline
    def exp_sum_in_parts(d, low):
        clamped = clamp(d)
        shifted = fma(clamped, splat(log2e), splat(shift))
        n = shifted - splat(shift)
        f = fma(n, splat(minus_high), clamped) + fma(n, splat(minus_low), counted(low, d, clamped))
        power, grown = power_of_two(shifted), fma(f * f, p(f), f)
        e = fma(grown, power, power)
        return e, fma(grown, power, power - e)

    return *make(clamp), exp_both, *make(clamp_low), exp_sum_in_parts


def _make_log1p(dtype, coefficients):
    """Make ``log1p`` for vectors of ``dtype``, for 0 <= s <= :data:`LOG1P_LIMIT` and NaN.

    Computes log(1 + s) = k * ln(2) + log1p(f), with (1 + s) / 2**k = 1 + f in [3/4, 3/2).

    Method: f = s * 2**-k + (2**-k - 1) in one fused operation, so 1 + s is never rounded on the way and a tiny s
    (where k = 0 and f = s) keeps all its digits. log1p(f) = f + f**2 * p(f).

    Accuracy: under 1 ulp, in relative terms, over the whole range (tests/test_vecmath.py).
    """
    mantissa_bits = 23 if dtype is np.float32 else 52
    integer = np.int32 if dtype is np.float32 else np.int64
    ln2_high, ln2_low = _split(_LN2, dtype)
    places = integer(mantissa_bits)
    three_quarters = dtype(0.75).view(integer)
    one_bits = dtype(1.0).view(integer)
    one = dtype(1.0)
    p = polynomial(*[dtype(c) for c in coefficients])

    @inline
    def log1p(s):
        k = (to_bits(s + splat(one)) - splat(three_quarters)) >> splat(places)
        scale = from_bits(splat(one_bits) - (k << splat(places)))
        f = fma(s, scale, scale - splat(one))
        n = to_float(k)
        rest = fma(f * f, p(f), n * splat(ln2_low))
        return fma(n, splat(ln2_high), f + rest)

    return log1p


def _make_log(dtype, coefficients):
    """Make ``log`` for vectors of ``dtype``: every real number, NaN below 0, -inf at 0, subnormal numbers included.

    Computes log(x) = k * ln(2) + log1p(f), with x / 2**k = 1 + f in [3/4, 3/2), where f is exact.

    Accuracy: under 1 ulp (tests/test_vecmath.py).
    """
    mantissa_bits = 23 if dtype is np.float32 else 52
    integer = np.int32 if dtype is np.float32 else np.int64
    ln2_high, ln2_low = _split(_LN2, dtype)
    places = integer(mantissa_bits)
    three_quarters = dtype(0.75).view(integer)
    one = dtype(1)
    smallest_normal = np.finfo(dtype).tiny
    lift = dtype(2.0 ** (mantissa_bits + 1))  # makes a subnormal number normal
    lift_exponent = dtype(mantissa_bits + 1)
    zero, infinity, minus_infinity, nan = dtype(0), dtype(np.inf), dtype(-np.inf), dtype(np.nan)
    p = polynomial(*[dtype(c) for c in coefficients])

    @inline
    def log(x):
        tiny = x < splat(smallest_normal)
        bits = to_bits(where(tiny, x * splat(lift), x))
        k = (bits - splat(three_quarters)) >> splat(places)
        f = from_bits(bits - (k << splat(places))) - splat(one)
        n = to_float(k) - where(tiny, splat(lift_exponent), splat(zero))
        rest = fma(f * f, p(f), n * splat(ln2_low))
        result = fma(n, splat(ln2_high), f + rest)
        result = where(x == splat(zero), splat(minus_infinity), result)
        result = where(x == splat(infinity), splat(infinity), result)
        return where(x >= splat(zero), result, splat(nan))

    return log


def _make_log_difference(coefficients):
    """Make log(y) - x for float32 vectors, with y a normal number or 0. (y = 0 gives a finite number for a finite x,
    for a product with y.)

    Computes (k * ln(2) - x) + f - f**2 / 2 + f**3 * p(f), with y / 2**k = 1 + f in [2/3, 4/3), where f is exact.

    Method: in float32 the rounding of log(y) would be all that is left where x is close to it, and float64 takes three
    times as long. But where x is close, nothing but f**2 is rounded before f**3 * p(f), below 1/70, is added: the high
    part of k * ln(2), f and x are multiples of 2**-15, 2**-24 and of x's last place, and their sums no larger than x.

    Accuracy: within 2**-21.7 of the result plus 6e-9 (tests/test_vecmath.py), where rounding log(y) costs 2.4e-7 at
    y = 0.01.
    """
    ln2_high = np.float32(float.fromhex("0x1.62e4p-1"))  # 15 bits: exact times any exponent
    ln2_low = np.float32((_LN2[0] - float(ln2_high)) + _LN2[1])
    # k is left where the exponent is, at 2**23 times its value, which ln(2) makes good.
    ln2_high, ln2_low = ln2_high * np.float32(2.0**-23), ln2_low * np.float32(2.0**-23)
    exponent_bits = np.int32(-1 << 23)
    two_thirds, one, half = np.float32(2 / 3).view(np.int32), np.float32(1), np.float32(-0.5)
    p = polynomial_by_pairs(*[np.float32(c) for c in coefficients])

    @inline
    def log_difference(y, x):
        bits = to_bits(y)
        k = (bits - splat(two_thirds)) & splat(exponent_bits)
        f = from_bits(bits - k) - splat(one)
        n, square = to_float(k), f * f
        total = fma(square, splat(half), fma(n, splat(ln2_high), -x) + f)
        return total + fma(f * square, p(f, square), n * splat(ln2_low))

    return log_difference


_EXP32 = (
    0.4999999403953552,
    0.1666651964187622,
    0.04166839271783829,
    0.008368778973817825,
    0.0013814469566568732,
)
_LOG1P32 = (
    -0.5,
    0.3333345353603363,
    -0.250000536441803,
    0.19990606606006622,
    -0.16647766530513763,
    0.14482060074806213,
    -0.1316223293542862,
    0.10448341816663742,
    -0.04490972310304642,
)
_EXP64 = (
    0.5,
    0.16666666666666682,
    0.04166666666666609,
    0.008333333333316921,
    0.0013888888889117175,
    0.0001984126989667196,
    2.480158692473679e-05,
    2.755723456779206e-06,
    2.7557582710525336e-07,
    2.5112141338917826e-08,
    2.082655584695661e-09,
)
_LOG32 = (
    0.3333316147327423,
    -0.24999584257602692,
    0.20013104379177094,
    -0.1668936312198639,
    0.1396678239107132,
    -0.12068697065114975,
    0.14159084856510162,
    -0.13370400667190552,
)
_LOG1P64 = (
    -0.4999999999999997,
    0.3333333333333395,
    -0.2500000000001957,
    0.1999999999981601,
    -0.16666666662761126,
    0.1428571430141229,
    -0.12500000349269022,
    0.11111110794801521,
    -0.0999998377658201,
    0.0909088978688279,
    -0.08333731824273481,
    0.07693477845928451,
    -0.0713842067005518,
    0.06642304742662151,
    -0.062491942618376164,
    0.06087227077405841,
    -0.059772022605802104,
    0.050743185544236714,
    -0.029353199601939505,
    0.008056504588206965,
)

# exp's clamps. Below: -126.96 * ln(2) and -1022.87 * ln(2), where n is -127 and -1023, and so 2**n is 0; the normal
# numbers end before (at -87.34 and -708.4). Above: past the largest exponent by less than one, so that n still fits its
# field.
_exps32 = _make_exp(np.float32, _EXP32, -88.0, 89.0)
_exps64 = _make_exp(np.float64, _EXP64, -709.0, 710.0)
_log1p32 = _make_log1p(np.float32, _LOG1P32)
_log1p64 = _make_log1p(np.float64, _LOG1P64)
_log_difference32 = _make_log_difference(_LOG32)
_log64 = _make_log(np.float64, _LOG1P64)


# Exponential of a vector: see _make_exp. Infinite results may be NaN; exp_of_any has no such limits.
exp, _exp_sum, _exp_both, exp_falling, _exp_sum_falling = map(by_dtype, _exps32[:5], _exps64[:5])
_exp_sum_in_parts64 = _exps64[5]


# Above 64 and 512 the square of exp is infinite as well.
_exp_root = by_dtype(_make_exp(np.float32, _EXP32, -88.0, 64.0)[0], _make_exp(np.float64, _EXP64, -709.0, 512.0)[0])


@inline
def exp_of_any(d):
    """exp(d) as exp(d / 2)**2, which reaches the subnormal numbers, and infinity where it is too large; NaN for NaN.

    Accuracy: twice the error of exp(d / 2), and the square's rounding.
    """
    root = _exp_root(d * splat(scalar(0.5, first_lane(d))))
    return root * root


@inline
def _difference(a, b):
    """The rounded difference, and its rounding error by two-sum (NaN where that is infinite)."""
    d = a - b
    back = d - a
    return d, (a - (d - back)) - (b + back)


@inline
def exp_difference(a, b):
    """exp(a - b) for finite b as if the difference were exact: its rounding error is taken into account.

    At a - b = -40 that error alone moves the exponential by 16 units in the last place.
    """
    d, low = _difference(a, b)
    return _exp_sum(d, low)


@inline
def exp_falling_difference(a, b):
    """:func:`exp_difference` where a is not larger than b."""
    d, low = _difference(a, b)
    return _exp_sum_falling(d, low)


@inline
def exp_difference_in_parts(a, b):
    """exp(a - b) of float64 vectors, finite b, as if the difference were exact, as a sum of two: within 2**-53.7 of
    it in relative terms (tests/test_vecmath.py).
    """
    d, low = _difference(a, b)
    return _exp_sum_in_parts64(d, low)


@inline
def exp_and_difference(a, b):
    """:func:`exp` of the rounded difference, bit for bit, and exp(a - b) as if the difference were exact.

    The latter is the former times 1 + low, within 2 ulp in float32 and float64 (tests/test_vecmath.py): one polynomial
    for both.
    """
    d, low = _difference(a, b)
    return _exp_both(d, low)


# log1p of a vector: see _make_log1p.
log1p = by_dtype(_log1p32, _log1p64)

# Log of a float64 vector: see _make_log.
log = _log64


@inline
def _log_difference64(y, x):
    return _log64(where(y == splat(0.0), splat(1.0), y)) - x


# log(y) - x of two vectors: see _make_log_difference. In float64 as it stands, for y >= 0 and any x (and finite for
# y = 0).
log_difference = by_dtype(_log_difference32, _log_difference64)
