"""nll_loss: values, shapes, dtypes, layouts, options, special values. (Malformed calls: test_errors.py.)"""

import itertools
import math

import numpy as np
import pytest
import references

from fastloss import nll_loss

INF, NAN = math.inf, math.nan
SHAPES = [(5,), (0, 5), (1, 1), (2, 17), (300, 7), (3, 4097), (4, 5, 3), (2, 30, 3, 5), (1, 17, 9, 1, 2), (0, 3, 2)]
INTEGER_DTYPES = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
REDUCTIONS = ["none", "mean", "sum"]


def shape_id(shape):
    return "x".join(map(str, shape))


def make_problem(rng, shape, dtype):
    n_classes = shape[0] if len(shape) == 1 else shape[1]
    x = -(rng.random(shape) * 5).astype(dtype)
    return x, np.asarray(rng.integers(0, n_classes, size=() if len(shape) == 1 else (shape[0], *shape[2:])))


def assert_close(got, expected, dtype):
    """One product per row, and sums rounded once: half a unit in the last place each, whatever the size."""
    expected = np.asarray(expected)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert isinstance(got, np.generic if expected.ndim == 0 else np.ndarray)
    np.testing.assert_allclose(got, expected, rtol=2 * np.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestValues:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
    def test_without_options(self, rng, frozen, dtype, shape, reduction):
        x, t = make_problem(rng, shape, dtype)
        got = nll_loss(frozen(x), frozen(t), reduction=reduction)
        assert_close(got, references.nll_loss(x, t, reduction=reduction), dtype)

    @pytest.mark.parametrize(
        ("weighted", "ignore_index", "reduction"), list(itertools.product([False, True], [-100, 2, 99], REDUCTIONS))
    )
    @pytest.mark.parametrize("shape", [(7,), (9, 5), (4, 5, 3), (300, 30)], ids=shape_id)
    def test_options(self, rng, frozen, dtype, shape, weighted, ignore_index, reduction):
        x, t = make_problem(rng, shape, dtype)
        if t.size > 5:
            t.flat[[1, 4]] = ignore_index
        weight = frozen(rng.random(x.shape[x.ndim > 1]).astype(dtype)) if weighted else None
        options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
        assert_close(nll_loss(frozen(x), frozen(t), **options), references.nll_loss(x, t, **options), dtype)

    def test_nothing_is_normalised(self, frozen, dtype):
        x = frozen(np.array([[5.0, -7.0], [1e30, 2.0]], dtype))
        np.testing.assert_array_equal(nll_loss(x, [1, 0], reduction="none"), np.array([7.0, -1e30], dtype))


def test_many_rows_take_the_parallel_kernel(rng, frozen):
    x, t = make_problem(rng, (20_000, 3), np.float32)
    x, t = frozen(x), frozen(t)
    np.testing.assert_array_equal(nll_loss(x, t, reduction="none"), -x[np.arange(len(x)), t])
    assert nll_loss(x, t) == np.float32(math.fsum(-x[np.arange(len(x)), t].astype(float)) / len(x))


class TestDtypes:
    @pytest.mark.parametrize("n_rows", [3, 20])
    def test_halves(self, rng, n_rows):
        x, t = make_problem(rng, (n_rows, 6), np.float16)
        assert_close(nll_loss(x, t, reduction="none"), references.nll_loss(x, t, reduction="none"), np.float32)
        assert_close(nll_loss(x, t), references.nll_loss(x, t), np.float32)

    def test_bfloat16(self, rng):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        x, t = make_problem(rng, (20, 6), np.float32)
        x = x.astype(ml_dtypes.bfloat16)
        assert_close(nll_loss(x, t, reduction="none"), references.nll_loss(x, t, reduction="none"), np.float32)

    @pytest.mark.parametrize("dtype", [*INTEGER_DTYPES, np.bool_], ids=lambda d: np.dtype(d).name)
    def test_integer_input(self, rng, dtype):
        x = rng.integers(0, 2, size=(9, 4)).astype(dtype)
        t = rng.integers(0, 4, size=9)
        assert_close(nll_loss(x, t, reduction="none"), references.nll_loss(x, t, reduction="none"), np.float64)

    @pytest.mark.parametrize("byte_order", ["=", "S"], ids=["native", "swapped"])
    @pytest.mark.parametrize("dtype", [*INTEGER_DTYPES, np.bool_], ids=lambda d: np.dtype(d).name)
    def test_target_dtypes(self, rng, frozen, dtype, byte_order):
        n_classes = 2 if dtype is np.bool_ else 100
        x, t = make_problem(rng, (12, n_classes), np.float32)
        expected = references.nll_loss(x, t, reduction="none")
        t = frozen(t.astype(np.dtype(dtype).newbyteorder(byte_order)))
        assert_close(nll_loss(x, t, reduction="none"), expected, np.float32)
        assert_close(nll_loss(x[::-1], t[::-1], reduction="none"), expected[::-1], np.float32)

    def test_array_likes(self):
        got = nll_loss([[-0.5, -1.0], [-2.0, -0.25]], (0, 1), weight=[1, 3], reduction="none")
        assert_close(got, np.array([0.5, 0.75]), np.float64)


@pytest.mark.parametrize("shape", [(13,), (10, 13), (300, 5), (3, 5, 7)], ids=shape_id)
def test_layouts(rng, layout, shape):
    x, t = make_problem(rng, shape, np.float32)
    weight = rng.random(x.shape[x.ndim > 1]).astype(np.float32)
    expected = references.nll_loss(x, t, weight=weight, reduction="none")
    assert_close(nll_loss(layout(x), layout(t), weight=layout(weight), reduction="none"), expected, np.float32)
    assert nll_loss(layout(x), t, weight=weight) == nll_loss(x, t, weight=weight)


@pytest.mark.parametrize("shape", [(6, 1, 7), (1, 5, 7), (6, 5, 1)], ids=shape_id)
def test_zero_strides(rng, frozen, shape):
    x = np.broadcast_to(frozen(make_problem(rng, shape, np.float32)[0]), (6, 5, 7))
    t = np.broadcast_to(frozen(rng.integers(0, 5, size=7)), (6, 7))
    assert_close(nll_loss(x, t, reduction="none"), references.nll_loss(x, t, reduction="none"), np.float32)


class TestSpecialValues:
    @pytest.mark.parametrize("value", [INF, -INF, NAN, 0.0, 3e38])
    def test_only_the_target_is_read(self, value):
        x = np.array([[NAN, value, INF, -INF]] * 9, np.float32)
        np.testing.assert_array_equal(nll_loss(x, [1] * 9, reduction="none"), np.float32([-value] * 9))

    @pytest.mark.parametrize(("weight", "value", "expected"), [(0.0, -INF, NAN), (INF, 0.0, NAN), (-1.0, -INF, -INF)])
    def test_weights(self, weight, value, expected):
        got = nll_loss(np.array([[value, 0.0]]), [0], weight=[weight, 1.0], reduction="none")
        np.testing.assert_array_equal(got, [expected])

    @pytest.mark.parametrize("value", [INF, -INF, NAN])
    def test_ignored_rows_are_exactly_zero(self, value):
        x = np.full((12, 3), value, np.float32)
        got = nll_loss(x, np.full(12, 1), weight=[1.0, NAN, 1.0], ignore_index=1, reduction="none")
        assert got.tobytes() == bytes(48)

    @pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]], ids=["plain", "weighted"])
    @pytest.mark.parametrize("n_rows", [0, 1, 20])
    def test_mean_of_nothing_is_nan_and_sum_zero(self, n_rows, weight):
        x, t = np.ones((n_rows, 3)), np.full(n_rows, -100)
        mean = nll_loss(x, t, weight=weight)
        assert isinstance(mean, np.float64)
        assert np.isnan(mean)
        assert nll_loss(x, t, weight=weight, reduction="sum") == 0

    def test_zero_weight_sums(self):
        x = np.array([[-1.0, -2.0], [-3.0, -4.0]])
        assert np.isnan(nll_loss(x, [0, 0], weight=[0.0, 1.0]))
        assert nll_loss(x, [0, 1], weight=[1.0, -1.0]) == -INF
        assert nll_loss(x, [0, 1], weight=[-1.0, 1.0]) == INF

    def test_ignore_index_is_compared_as_a_number(self):
        x = np.arange(8.0).reshape(4, 2)
        t = np.array([0, 1, 2**63 + 5, 1], np.uint64)
        np.testing.assert_array_equal(nll_loss(x, t, ignore_index=2**63 + 5, reduction="none"), [0.0, -3.0, 0.0, -7.0])
        t = np.array([0, 1, 255, 1], np.uint8)
        np.testing.assert_array_equal(nll_loss(x, t, ignore_index=255, reduction="none"), [0.0, -3.0, 0.0, -7.0])
        t = np.array([0, 1, -100, 1], np.int8)
        np.testing.assert_array_equal(nll_loss(x, t, reduction="none"), [0.0, -3.0, 0.0, -7.0])
        with pytest.raises(IndexError, match="got 255 at 2"):
            nll_loss(x, np.array([0, 1, 255, 1], np.uint8), ignore_index=-1)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [True, False])
def test_the_deprecated_pair(size_average, reduce):
    x, t = np.array([[-1.0, -2.0], [-3.0, -4.0]]), [0, 1]
    reduction = "none" if not reduce else "sum" if size_average is False else "mean"
    with pytest.warns(UserWarning, match=f"use reduction='{reduction}' instead") as caught:
        got = nll_loss(x, t, None, size_average, -100, reduce)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(got, nll_loss(x, t, reduction=reduction))
