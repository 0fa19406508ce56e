"""kl_div: values, broadcasting, dtypes, layouts, reductions, special values. (Malformed calls: test_errors.py.)"""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import references

from fastloss import kl_div
from fastloss.streaming import KLDivergence

INF, NAN = math.inf, math.nan
REDUCTIONS = ["none", "mean", "sum", "batchmean"]
BOTH = pytest.mark.parametrize("log_target", [False, True], ids=["target", "log_target"])


def kl(x, y, reduction="none", log_target=False):
    """kl_div without the warning that ``mean`` gives."""
    if reduction != "mean":
        return kl_div(x, y, reduction=reduction, log_target=log_target)
    with pytest.warns(UserWarning, match="batchmean"):
        return kl_div(x, y, reduction=reduction, log_target=log_target)


def make_problem(rng, shape, target_shape, dtype, log_target):
    x = np.asarray(-rng.random(shape) * 6, dtype)
    y = np.asarray(rng.random(target_shape), dtype)
    return x, (np.log(y) if log_target else y)


def assert_close(got, expected, dtype, log_target, x, y):
    """dtype, shape, kind, values.

    With log_target: a difference, an exponential and a product, under 2 + 1 ulp. Without: a difference of logarithms
    that keeps its rounding errors, or is taken in float64 where the terms cancel, a product and one rounding.
    """
    expected = np.asarray(expected)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert isinstance(got, np.generic if expected.ndim == 0 else np.ndarray)
    terms = 0.0 if log_target else np.abs(np.broadcast_arrays(x, y)[0].astype(float)).max(initial=1.0)
    count = max(1, x.size, y.size) if expected.ndim == 0 else 1
    np.testing.assert_allclose(got, expected, rtol=3 * np.finfo(dtype).eps, atol=count * terms * 4e-16)


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestValues:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize(
        ("shape", "target_shape"),
        [
            ((), ()), ((7,), (7,)), ((1, 1), (1, 1)), ((2, 17), (2, 17)), ((3, 5, 7), (3, 5, 7)),
            ((9, 7), (7,)), ((9, 1), (1, 7)), ((7,), (9, 7)), ((9, 7), ()), ((), (3,)), ((1, 1000), (3, 1)),
        ],
        ids=str,
    )  # fmt: skip
    def test_shapes_and_reductions(self, rng, frozen, dtype, log_target, shape, target_shape, reduction):
        x, y = make_problem(rng, shape, target_shape, dtype, log_target)
        got = kl(frozen(x), frozen(y), reduction, log_target)
        assert_close(got, references.kl_div(x, y, reduction, log_target), dtype, log_target, x, y)

    @pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, 2047, 2048, 2049, 2064, 4103])
    def test_sizes_around_the_vectors_and_tiles(self, rng, frozen, dtype, log_target, size):
        x, y = make_problem(rng, (size,), (size,), dtype, log_target)
        got = kl(frozen(x), frozen(y), "none", log_target)
        assert_close(got, references.kl_div(x, y, "none", log_target), dtype, log_target, x, y)

    def test_close_distributions(self, rng, frozen, dtype, log_target):
        """The terms cancel: what is left must have its digits, computed from the given numbers."""
        y = rng.random((20, 7)).astype(dtype)
        x = (np.log(y.astype(float)) + rng.normal(size=y.shape) * 1e-6).astype(dtype)
        y = np.log(y) if log_target else y
        got = kl(frozen(x), frozen(y), "none", log_target)
        assert_close(got, references.kl_div(x, y, "none", log_target), dtype, log_target, x, y)

    def test_empty(self, dtype, log_target):
        for shape, target_shape in (((0, 3), (0, 3)), ((3, 0), (3, 0)), ((3, 1), (3, 0)), ((0,), (1,))):
            x, y = np.zeros(shape, dtype), np.zeros(target_shape, dtype)
            assert kl(x, y, "none", log_target).shape == np.broadcast_shapes(shape, target_shape)
            assert kl(x, y, "sum", log_target) == 0
            assert np.isnan(kl(x, y, "mean", log_target))
            batchmean = kl(x, y, "batchmean", log_target)
            assert batchmean == 0 if shape[0] else np.isnan(batchmean)


@BOTH
def test_many_elements_take_the_parallel_kernel(rng, frozen, log_target):
    x, y = make_problem(rng, (300, 257), (300, 257), np.float32, log_target)
    pointwise = kl(frozen(x), frozen(y), "none", log_target)
    rows = [0, 150, 299]
    expected = references.kl_div(x[rows], y[rows], "none", log_target)
    assert_close(pointwise[rows], expected, np.float32, log_target, x, y)
    assert kl(x, y, "sum", log_target) == np.float32(math.fsum(pointwise.astype(float).ravel()))


@BOTH
class TestDtypes:
    @pytest.mark.parametrize(
        ("x_dtype", "y_dtype", "result"),
        [
            (np.float16, np.float16, np.float32),
            (np.float16, np.float32, np.float32),
            (np.float32, np.float64, np.float64),
            (np.float64, np.float32, np.float64),
            (np.float64, np.float16, np.float64),
            (np.float32, np.int8, np.float64),
            (np.int64, np.bool_, np.float64),
        ],
        ids=lambda d: np.dtype(d).name,
    )
    def test_promotion(self, rng, log_target, x_dtype, y_dtype, result):
        x = rng.integers(-9, 9, size=(5, 7)).astype(x_dtype)
        y = rng.integers(0, 2, size=(5, 7)).astype(y_dtype)
        got = kl(x, y, "none", log_target)
        assert_close(got, references.kl_div(x, y, "none", log_target), result, log_target, x, y)

    def test_bfloat16(self, rng, log_target):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        x, y = make_problem(rng, (9, 5), (9, 5), np.float32, log_target)
        x, y = x.astype(ml_dtypes.bfloat16), y.astype(ml_dtypes.bfloat16)
        got = kl(x, y, "none", log_target)
        assert_close(got, references.kl_div(x, y, "none", log_target), np.float32, log_target, x, y)

    def test_array_likes(self, log_target):
        x, y = [[-1.0, -0.5]], (0.25, 0.75)
        expected = references.kl_div(x, y, "none", log_target)
        assert_close(kl(x, y, "none", log_target), expected, np.float64, log_target, np.array(x), np.array(y))
        got = kl(np.ma.MaskedArray(x), memoryview(np.array(y)), "none", log_target)
        assert_close(got, expected, np.float64, log_target, np.array(x), np.array(y))


@BOTH
class TestLayouts:
    @pytest.mark.parametrize("shape", [(13,), (40, 50), (3, 5, 7)], ids=str)
    def test_layouts(self, rng, layout, log_target, shape):
        x, y = make_problem(rng, shape, shape, np.float32, log_target)
        expected = kl(x, y, "none", log_target)
        for a, b in ((layout(x), layout(y)), (layout(x), y), (x, layout(y))):
            np.testing.assert_array_equal(kl(a, b, "none", log_target), expected, strict=True)
            assert kl(a, b, "sum", log_target) == kl(x, y, "sum", log_target)

    def test_broadcasting_is_that_of_numpy(self, rng, layout, log_target):
        x, y = make_problem(rng, (4, 1, 6), (5, 1), np.float32, log_target)
        expected = kl(np.broadcast_to(x, (4, 5, 6)).copy(), np.broadcast_to(y, (4, 5, 6)).copy(), "none", log_target)
        np.testing.assert_array_equal(kl(layout(x), layout(y), "none", log_target), expected, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestSpecialValues:
    @pytest.mark.parametrize(
        ("x", "y", "expected"),
        [
            (-2.0, 0.0, 0.0), (-INF, 0.0, NAN), (INF, 0.0, NAN), (NAN, 0.0, NAN), (-INF, 0.5, INF), (INF, 0.5, -INF),
            (0.0, -0.5, NAN), (0.0, -1e-30, NAN), (0.0, INF, NAN), (-1.0, INF, INF), (INF, INF, NAN),
            (-INF, INF, INF), (0.0, NAN, NAN),
            (NAN, 0.5, NAN), (0.0, 1.0, 0.0), (-1.0, 1.0, 1.0), (-INF, -INF, NAN), (-1.0, -0.0, 0.0),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("size", [1, 20])
    def test_target(self, dtype, x, y, expected, size):
        got = kl(np.full(size, x, dtype), np.full(size, y, dtype))
        np.testing.assert_array_equal(got, np.full(size, expected, dtype))

    @pytest.mark.parametrize(
        ("x", "y", "expected"),
        [
            (0.0, -INF, NAN), (-INF, -INF, NAN), (-INF, 0.0, INF), (INF, 0.0, -INF), (0.0, INF, INF), (INF, INF, NAN),
            (NAN, 0.0, NAN), (0.0, NAN, NAN), (0.0, 0.0, 0.0), (-1.0, 0.0, 1.0), (INF, -INF, NAN),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("size", [1, 20])
    def test_log_target(self, dtype, x, y, expected, size):
        got = kl(np.full(size, x, dtype), np.full(size, y, dtype), log_target=True)
        np.testing.assert_array_equal(got, np.full(size, expected, dtype))

    def test_logarithms_of_what_is_too_large(self, dtype):
        """From the largest number's logarithm on, infinite: also where its half is close to that."""
        y = (np.log(np.finfo(dtype).max) * np.linspace(1.01, 4, 1999)).astype(dtype)
        x = np.full_like(y, -1)
        np.testing.assert_array_equal(kl(x, y, "none", log_target=True), INF)
        for i in range(0, len(y), 7):
            assert kl(x[i : i + 1], y[i : i + 1], "sum", log_target=True) == INF

    def test_tiny_targets(self, dtype):
        """Subnormal numbers are numbers: y log y of the smallest of all."""
        tiny = np.finfo(dtype).smallest_subnormal
        y = np.array([tiny, 8 * tiny, np.finfo(dtype).tiny], dtype)
        got = kl(np.zeros(3, dtype), y)
        expected = [references.kl_point(0.0, v) for v in y]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=float(tiny))

    def test_one_nan_makes_the_sum_nan(self, dtype):
        x, y = np.zeros(20, dtype), np.full(20, 0.5, dtype)
        y[13] = -1
        assert np.isnan(kl(x, y, "sum"))
        assert np.isnan(kl(x, y)).sum() == 1

    @pytest.mark.parametrize("place", [0, 17, 2047, 2048, 4098])
    @pytest.mark.parametrize("target", [-0.5, -1e-30, -INF, INF, NAN, -0.0])
    def test_one_odd_target_anywhere_in_a_tile(self, rng, dtype, place, target):
        x, y = (a[:4099] for a in tiles_of(rng, dtype, False, (1, 1, 1)))
        y[place] = 0
        without = kl(x, y, "sum")
        y[place] = target
        expected = references.kl_point(x[place], target)
        np.testing.assert_equal(kl(x, y)[place], dtype(expected))
        np.testing.assert_equal(kl(x, y, "sum"), without if target == 0 else dtype(expected))


TILE = 2048


def tiles_of(rng, dtype, log_target, scales):
    """x and y whose divergences are of the given magnitudes, a tile of each."""
    x, y = [], []
    for scale in map(float, scales):
        goal = rng.uniform(0.5, 1, TILE)
        if log_target:
            x.append(np.log(goal) + rng.choice([-1, 1], TILE) * scale * rng.random(TILE))
            y.append(np.log(goal))
        else:
            x.append(np.log(goal) - rng.uniform(1, 2, TILE) * max(scale, 1.0))
            y.append(goal * min(scale, 1.0))
    return np.concatenate(x).astype(dtype), np.concatenate(y).astype(dtype)


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestExactSums:
    """The sum is that of the values that 'none' gives, whatever a tile tells about the next.

    In float64 too, where one wrong bit of one value shows.
    """

    def check(self, x, y, log_target):
        values = kl(x, y, "none", log_target)
        exact = float(sum((Fraction(v) for v in values.tolist()), Fraction(0)))
        assert kl(x, y, "sum", log_target) == values.dtype.type(exact)
        assert KLDivergence(log_target=log_target).update(x, y)._state.total() == exact
        return values

    @pytest.mark.parametrize(
        "scales",
        [
            (1, 1, 1), (1, 2**-20, 1), (1, 2**-30, 2**-30, 2**-30), (2**-30, 1, 2**-10), (1, 2**20, 2**20, 1),
            (1, 0, 0, 1), (0, 1), (1, 2**-110, 1, 2**-110, 2**-110), (2**100, 2**-100, 2**100, 1),
            tuple(2.0**-k for k in range(0, 100, 12)),
        ],
        ids=str,
    )  # fmt: skip
    def test_tiles_of_other_magnitudes(self, rng, dtype, log_target, scales):
        x, y = tiles_of(rng, dtype, log_target, scales)
        self.check(x, y, log_target)
        self.check(x[:-5], y[:-5], log_target)

    def test_magnitudes_mixed_in_every_tile(self, rng, dtype, log_target):
        """Over more binades than grids reach."""
        x, y = tiles_of(rng, dtype, log_target, [2.0**-k for k in range(0, 110, 10)])
        order = rng.permutation(x.size)
        self.check(x[order], y[order], log_target)

    def test_a_tile_of_equal_distributions(self, rng, dtype, log_target):
        """All its differences cancel: in float32 they are all taken in float64."""
        y = rng.uniform(0.1, 1, 2 * TILE + 900)
        y = (np.log(y) if log_target else y).astype(dtype)
        x = y.copy() if log_target else np.log(y.astype(float)).astype(dtype)
        x[:TILE] -= 1
        assert not self.check(x, y, log_target)[TILE:].any() or not log_target

    def test_targets_of_zero_and_subnormal_targets(self, rng, dtype, log_target):
        if log_target:
            y = np.where(rng.random(9000) < 0.5, -rng.uniform(80, 800, 9000), -1).astype(dtype)
        else:
            tiny = np.finfo(dtype).smallest_subnormal
            y = np.where(rng.random(9000) < 0.5, rng.integers(0, 3, 9000) * tiny, 0.25).astype(dtype)
        self.check(-rng.uniform(0, 9, 9000).astype(dtype), y, log_target)

    @pytest.mark.parametrize("spread", [0.01, 0.3, 4, 8, 16, 40])
    def test_logits_of_any_spread(self, rng, dtype, log_target, spread):
        """From distributions that are nearly equal to those whose probabilities reach down to the smallest number."""
        logits = spread * rng.normal(size=(2, 40, 700))
        x, y = logits - np.log(np.exp(logits - logits.max()).sum(2, keepdims=True)) - logits.max()
        self.check(x.astype(dtype).ravel(), (y if log_target else np.exp(y)).astype(dtype).ravel(), log_target)

    def test_tiles_of_wide_and_narrow_spread_in_turn(self, rng, dtype, log_target):
        """More of the latter than go on wide grids before narrow ones are tried again."""
        exponents = np.where(np.arange(200) % 90 == 1, -90.0, -1.0)[:, None] * rng.random((200, TILE))
        y = exponents.ravel().astype(dtype)
        self.check((y + 1).astype(dtype), y if log_target else np.exp2(y), log_target)

    @pytest.mark.parametrize("special", [INF, -INF, NAN])
    @pytest.mark.parametrize("place", [0, 2047, 2048, 4098])
    def test_one_value_that_is_no_number(self, rng, dtype, log_target, special, place):
        x, y = tiles_of(rng, dtype, log_target, (1, 1, 1))
        x, y = x[:4099], y[:4099]
        x[place] = special
        np.testing.assert_equal(kl(x, y, "sum", log_target), dtype(-special))
        x[place] = -INF
        x[1] = INF
        np.testing.assert_equal(kl(x, y, "sum", log_target), dtype(NAN))

    def test_huge_values_that_cancel(self, rng, dtype, log_target):
        x, y = tiles_of(rng, dtype, log_target, (1, 1))
        big = 2.0**120 if dtype is np.float32 else 2.0**1000
        x[5], x[3000] = big, -big
        y[5] = y[3000] = 0.0 if log_target else 1.0
        self.check(x, y, log_target)


class TestReductions:
    X = np.log([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]])
    Y = np.array([[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]])

    def test_mean_warns_that_it_is_not_the_divergence(self):
        with pytest.warns(UserWarning, match="'batchmean' is") as caught:
            kl_div(self.X, self.Y)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for reduction in ("sum", "none", "batchmean"):
                kl_div(self.X, self.Y, reduction=reduction)

    def test_batchmean_divides_by_the_batch_of_the_input(self):
        total = kl(self.X, self.Y, "sum")
        assert kl(self.X, self.Y, "batchmean") == pytest.approx(total / 3, rel=1e-15)
        broadcast = kl(self.X[:1], self.Y, "sum")
        assert kl(self.X[:1], self.Y, "batchmean") == broadcast

    def test_batchmean_of_a_number_divides_by_nothing(self):
        got = kl(np.array(-1.0), np.array([0.5, 0.5]), "batchmean")
        assert got == kl(np.array(-1.0), np.array([0.5, 0.5]), "sum")
        assert isinstance(got, np.float64)

    def test_mean_divides_by_the_elements_after_broadcasting(self):
        x, y = np.zeros((4, 1)), np.full((1, 5), 0.5)
        assert kl(x, y, "mean") == pytest.approx(0.5 * math.log(0.5), rel=1e-15)

    @pytest.mark.parametrize("size_average", [None, True, False])
    @pytest.mark.parametrize("reduce", [None, True, False])
    def test_the_deprecated_pair(self, size_average, reduce):
        if size_average is None and reduce is None:
            return
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
        with pytest.warns(UserWarning, match=f"use reduction='{reduction}' instead") as caught:
            got = kl_div(self.X, self.Y, size_average=size_average, reduce=reduce, reduction="batchmean")
        assert len(caught) == 1
        np.testing.assert_array_equal(got, kl(self.X, self.Y, reduction))
