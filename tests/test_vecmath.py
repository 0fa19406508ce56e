"""exp, log1p and log of vectors against mpmath, in units in the last place.

The bounds are the worst errors that were measured, rounded up.
"""

import math

import mpmath
import numba
import numpy as np
import pytest
import references

from fastloss._kernels._simd import lanes, load, store
from fastloss._kernels._vecmath import (
    LOG1P_LIMIT,
    exp,
    exp_and_difference,
    exp_difference_in_parts,
    exp_of_any,
    log,
    log1p,
    log_difference,
)

INF, NAN = math.inf, math.nan


@numba.njit
def _exp(x, out):
    like = x[0]
    for i in range(0, len(x), lanes(like)):
        store(out, i, exp(load(x, i, like)))


@numba.njit
def _exp_of_any(x, out):
    like = x[0]
    for i in range(0, len(x), lanes(like)):
        store(out, i, exp_of_any(load(x, i, like)))


def _two_of_two(function):
    """A loop over a function of two vectors that gives two."""

    @numba.njit
    def loop(a, b, first, second):
        like = a[0]
        for i in range(0, len(a), lanes(like)):
            both = function(load(a, i, like), load(b, i, like))
            store(first, i, both[0])
            store(second, i, both[1])

    return loop


_exp_and_difference, _exp_difference_in_parts = map(_two_of_two, (exp_and_difference, exp_difference_in_parts))


@numba.njit
def _log1p(x, out):
    like = x[0]
    for i in range(0, len(x), lanes(like)):
        store(out, i, log1p(load(x, i, like)))


@numba.njit
def _log(x, out):
    like = x[0]
    for i in range(0, len(x), lanes(like)):
        store(out, i, log(load(x, i, like)))


def apply(loop, values, dtype):
    """A vector function on any number of values."""
    values = np.asarray(values, dtype)
    padded = np.zeros(-(-len(values) // 16) * 16, dtype)
    padded[: len(values)] = values
    out = np.full_like(padded, 7)
    loop(padded, out)
    return out[: len(values)]


def exp_bound(values, dtype):
    """What :func:`exp` says of its accuracy, in ulp: float32 takes ln(2) in one part."""
    return 1.0 + (np.abs(values) * 2.0**-28.5 / np.finfo(np.float32).epsneg if dtype is np.float32 else 0.0)


def errors(loop, exact, values, dtype):
    got = apply(loop, values, dtype)
    with mpmath.workdps(50):
        expected = [exact(mpmath.mpf(float(v))) for v in np.asarray(values, dtype)]
    return np.asarray(references.ulp_error(got, expected, dtype))


def worst_error(loop, exact, values, dtype):
    return errors(loop, exact, values, dtype).max()


LOWEST = {np.float32: -87.3, np.float64: -708.3}  # where exp's results end to be normal numbers
HIGHEST = {np.float32: 88.0, np.float64: 709.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestExp:
    @pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-6, 1e-12, 1e-30])
    def test_error(self, rng, dtype, scale):
        values = np.concatenate([rng.uniform(LOWEST[dtype], HIGHEST[dtype], 3000), rng.normal(size=1000)]) * scale
        assert np.all(errors(_exp, mpmath.exp, values, dtype) < exp_bound(values, dtype))

    def test_error_at_the_borders_of_the_reduction(self, dtype):
        """Around the odd multiples of ln(2) / 2, where the argument of the polynomial is largest."""
        middle = (np.arange(-120, 120) + 0.5) * math.log(2)
        values = np.concatenate([middle * (1 + k * np.finfo(dtype).eps) for k in range(-3, 4)])
        assert np.all(errors(_exp, mpmath.exp, values, dtype) < exp_bound(values, dtype))

    def test_exact_values(self, dtype):
        np.testing.assert_array_equal(apply(_exp, [0.0, -0.0, -INF, -1e30, -1e4], dtype), [1.0, 1.0, 0.0, 0.0, 0.0])

    def test_overflow_is_not_finite(self, dtype):
        got = apply(_exp, [INF, 1e30, 1e4], dtype)
        assert not np.isfinite(got).any()
        assert (np.isnan(got) | (got > 0)).all()

    def test_never_negative_and_never_above_the_truth_where_it_fades(self, dtype):
        values = np.linspace(LOWEST[dtype] - 30, LOWEST[dtype], 5000)
        got = apply(_exp, values, dtype)
        assert (got >= 0).all()
        assert (got <= 2.1 * float(np.finfo(dtype).tiny)).all()

    def test_nan_of_every_kind(self, dtype):
        kinds = {
            np.float32: np.array([0x7FC00000, 0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFC00000, 0xFFC12345], np.uint32),
            np.float64: np.array(
                [0x7FF8000000000000, 0x7FF8000000000001, 0xFFFFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFF8000000000000],
                np.uint64,
            ),
        }[dtype]
        values = np.zeros(16, kinds.dtype)
        values[: len(kinds)] = kinds
        out = np.zeros(16, dtype)
        for loop in (_exp, _exp_of_any, _log1p, _log) if dtype is np.float64 else (_exp, _exp_of_any, _log1p):
            loop(values.view(dtype), out)
            assert np.isnan(out[: len(kinds)]).all()
            assert not np.isnan(out[len(kinds) :]).any() or loop is _log


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestExpOfAny:
    def test_error(self, rng, dtype):
        largest = math.log(np.finfo(dtype).max)
        values = rng.uniform(LOWEST[dtype], largest - 1e-4, 3000)
        assert np.all(errors(_exp_of_any, mpmath.exp, values, dtype) < 2 * exp_bound(values / 2, dtype) + 0.5)

    def test_infinity(self, dtype):
        values = np.concatenate([math.log(np.finfo(dtype).max) * np.linspace(1.0001, 4, 5000), [1e30, INF]])
        np.testing.assert_array_equal(apply(_exp_of_any, values, dtype), INF)

    def test_subnormal_numbers(self, dtype):
        smallest = float(np.finfo(dtype).smallest_subnormal)
        values = np.linspace(math.log(smallest) + 0.1, LOWEST[dtype], 1000).astype(dtype)
        np.testing.assert_allclose(
            apply(_exp_of_any, values, dtype), [float(mpmath.exp(float(v))) for v in values], rtol=1e-6, atol=smallest
        )
        np.testing.assert_array_equal(apply(_exp_of_any, [2 * LOWEST[dtype], -1e30, -INF], dtype), 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestExpAndDifference:
    @staticmethod
    def both(a, b, dtype):
        plain, exact = np.empty(len(a), dtype), np.empty(len(a), dtype)
        _exp_and_difference(a, b, plain, exact)
        return plain, exact

    @pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3])
    def test_error(self, rng, dtype, scale):
        """As if the difference were exact, where its rounding alone moves the exponential by many units."""
        difference = rng.uniform(LOWEST[dtype], 20.0, 4096) * scale
        b = rng.normal(size=4096).astype(dtype)
        a = (b + difference).astype(dtype)
        plain, exact = self.both(a, b, dtype)
        with mpmath.workdps(50):
            expected = [mpmath.exp(mpmath.mpf(float(u)) - mpmath.mpf(float(v))) for u, v in zip(a, b, strict=True)]
        is_normal = np.array([float(e) for e in expected]) > 2 * np.finfo(dtype).tiny
        errors_of_both = np.asarray(references.ulp_error(exact, expected, dtype))
        assert errors_of_both[is_normal].max() < 2.0
        np.testing.assert_array_equal(plain, apply(_exp, a - b, dtype))

    def test_special_values(self, dtype):
        a = np.array([-INF, -1e38, 3.0, NAN, INF, -200.0 if dtype is np.float32 else -2000.0, 0.0, 1.0] * 2, dtype)
        b = np.array([1.0, 1e38, 3.0, 0.0, 0.0, 100.0, NAN, -INF] * 2, dtype)
        plain, exact = self.both(a, b, dtype)
        np.testing.assert_array_equal(exact[[0, 1, 2, 5]], [0.0, 0.0, 1.0, 0.0])
        assert not np.isfinite(exact[[3, 4, 6, 7]]).any()
        np.testing.assert_array_equal(np.isfinite(plain), np.isfinite(exact))

    def test_rounding_of_huge_numbers(self, dtype):
        """Half a unit in the last place of the largest numbers: its square alone is infinite."""
        largest = float(np.finfo(dtype).max)
        a = np.repeat([-largest, -largest / 3], 8).astype(dtype)
        b = np.tile(largest * np.finfo(dtype).eps / np.array([2.5, 3, 4, 5, 6, 1e10, 1e20, 1e30]), 2).astype(dtype)
        for got in self.both(a, b, dtype):
            np.testing.assert_array_equal(got, 0)


class TestExpDifferenceInParts:
    @staticmethod
    def parts(a, b):
        first, second = np.empty_like(a), np.empty_like(a)
        _exp_difference_in_parts(a, b, first, second)
        return first, second

    @pytest.mark.parametrize("scale", [40.0, 1.0, 1e-3, 1e-9])
    def test_error(self, rng, scale):
        b = rng.normal(size=2048)
        a = b + rng.uniform(-scale, scale, 2048)
        with mpmath.workdps(50):
            expected = [mpmath.exp(mpmath.mpf(u) - mpmath.mpf(v)) for u, v in zip(a, b, strict=True)]
            got = [mpmath.mpf(u) + mpmath.mpf(v) for u, v in zip(*self.parts(a, b), strict=True)]
            worst = max(abs(g / e - 1) for g, e in zip(got, expected, strict=True))
        assert worst < 2.0**-53.7

    def test_special_values(self):
        a = np.array([-INF, -1e308, 3.0, -2000.0, NAN, 0.0, -INF, 7.0])
        b = np.array([1.0, 1e308, 3.0, 100.0, 0.0, NAN, 0.0, 7.0])
        first, second = self.parts(a, b)
        np.testing.assert_array_equal(first, [0, 0, 1, 0, NAN, NAN, 0, 1])
        np.testing.assert_array_equal(second, [0, 0, 0, 0, NAN, NAN, 0, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestLog1p:
    BOUND = 0.8

    @pytest.mark.parametrize(
        "exponents",
        [(-40, -20), (-20, -4), (-4, 1), (-1, 1), (1, 10), (10, 125)],
        ids=lambda e: f"2**{e[0]}..2**{e[1]}",
    )
    def test_error(self, rng, dtype, exponents):
        values = np.exp2(rng.uniform(*exponents, 3000))
        assert worst_error(_log1p, mpmath.log1p, values, dtype) < self.BOUND

    def test_error_at_the_borders_of_the_reduction(self, dtype):
        """Around 1 + s = 3/4 * 2**k, where the argument of the polynomial is largest."""
        middle = 0.75 * np.exp2(np.arange(1, 40)) - 1
        values = np.concatenate([middle * (1 + k * np.finfo(dtype).eps) for k in range(-3, 4)])
        assert worst_error(_log1p, mpmath.log1p, values, dtype) < self.BOUND

    def test_tiny_arguments_are_their_own_logarithm(self, dtype):
        values = np.array([0.0, 1e-20, 1e-30, np.finfo(dtype).tiny], dtype)
        np.testing.assert_array_equal(apply(_log1p, values, dtype), values)

    def test_the_limit(self, dtype):
        values = [LOG1P_LIMIT, np.nextafter(dtype(LOG1P_LIMIT), dtype(0))]
        assert worst_error(_log1p, mpmath.log1p, values, dtype) < self.BOUND


class TestLog:
    BOUND = 0.8

    @pytest.mark.parametrize("exponents", [(-1, 1), (-10, 10), (-1022, 1023), (-0.01, 0.01)], ids=str)
    def test_error(self, rng, exponents):
        values = np.exp2(rng.uniform(*exponents, 3000))
        assert worst_error(_log, mpmath.log, values, np.float64) < self.BOUND

    def test_error_near_one(self):
        values = [1 + k * 2.0**-52 for k in range(-40, 40)]
        assert worst_error(_log, mpmath.log, values, np.float64) < self.BOUND

    def test_subnormal_numbers(self, rng):
        values = np.ldexp(rng.random(500), rng.integers(-1073, -1021, 500))
        assert worst_error(_log, mpmath.log, values[values > 0], np.float64) < self.BOUND

    def test_special_values(self):
        got = apply(_log, [1.0, 0.0, -0.0, INF, -1.0, -INF, NAN, -5e-324], np.float64)
        np.testing.assert_array_equal(got, [0.0, -INF, -INF, INF, NAN, NAN, NAN, NAN])


@numba.njit
def _log_difference(y, x, out):
    like = x[0]
    for i in range(0, len(x), lanes(like)):
        store(out, i, log_difference(load(y, i, like), load(x, i, like)))


class TestLogDifference:
    @pytest.mark.parametrize("closeness", [1e-6, 1e-3, 1e-2, 0.1, 3.0])
    def test_error(self, rng, closeness):
        """In float32, where the two nearly cancel too: 2**-21.7 of the result plus 6e-9."""
        y = np.exp(-40 * rng.random(4096)).astype(np.float32)
        x = (np.log(y.astype(float)) + closeness * rng.normal(size=y.size)).astype(np.float32)
        out = np.empty_like(x)
        _log_difference(y, x, out)
        with mpmath.workdps(40):
            exact = [mpmath.log(float(a)) - mpmath.mpf(float(b)) for a, b in zip(y, x, strict=True)]
            error = np.array([float(abs(mpmath.mpf(float(v)) - e)) for v, e in zip(out, exact, strict=True)])
        assert np.all(error <= 2.0**-21.7 * np.abs(np.array(exact, float)) + 6e-9)
