"""softmax and log_softmax: values, axes, dtypes, layouts, special values. (Malformed calls: test_errors.py.)"""

import itertools
import math

import numpy as np
import pytest
import references

from fastloss import log_softmax, softmax

INF, NAN = math.inf, math.nan
CLASS_COUNTS = [1, 2, 7, 16, 17, 24, 25, 33, 257, 1000, 4097]
FUNCTIONS = [(softmax, references.softmax), (log_softmax, references.log_softmax)]
BOTH = pytest.mark.parametrize(("function", "reference"), FUNCTIONS, ids=["softmax", "log_softmax"])


def assert_close(got, expected, dtype):
    """dtype, shape, kind; values within 4 ulp for float32, for float64 as closely as the float64 reference allows.

    The last digits of float64 are counted in test_accuracy.py.
    """
    expected = np.asarray(expected)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert isinstance(got, np.generic if expected.ndim == 0 else np.ndarray)
    tiny = 2 * float(np.finfo(dtype).tiny)  # subnormal results may be 0
    np.testing.assert_allclose(got, expected, rtol=4 * 2.0**-23 if np.dtype(dtype) == np.float32 else 1e-14, atol=tiny)


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestValues:
    @pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 8, 17])
    @pytest.mark.parametrize("n_classes", CLASS_COUNTS)
    def test_rows_by_classes(self, rng, frozen, function, reference, dtype, n_rows, n_classes):
        x = frozen((rng.normal(size=(n_rows, n_classes)) * 4).astype(dtype))
        assert_close(function(x), reference(x), dtype)

    @pytest.mark.parametrize("shape", [(5,), (9, 40), (4, 5, 3), (2, 30, 3, 5), (3, 0, 2), (0,)], ids=str)
    def test_every_axis(self, rng, frozen, function, reference, dtype, shape):
        x = frozen((rng.normal(size=shape) * 4).astype(dtype))
        for axis in range(-len(shape), len(shape)):
            got = function(x, axis)
            assert_close(got, reference(x, axis), dtype)
            np.testing.assert_array_equal(function(x, dim=axis), got)
            np.testing.assert_array_equal(function(x, axis=axis), got)

    def test_a_number(self, function, reference, dtype):
        for axis in (0, -1):
            got = function(dtype(3.0), axis)
            assert got == (1.0 if function is softmax else 0.0)
            assert isinstance(got, dtype)

    @pytest.mark.parametrize("offset", [1e4, -1e4, 3e38])
    def test_far_from_zero(self, function, reference, dtype, offset):
        x = np.array([[0.0, 1.0, -2.0, 0.5]] * 9, dtype) + dtype(offset)
        assert_close(function(x), reference(x), dtype)


@BOTH
def test_many_rows_take_the_parallel_kernel(rng, frozen, function, reference):
    x = frozen((rng.normal(size=(7001, 11)) * 4).astype(np.float32))
    assert_close(function(x), reference(x), np.float32)


@BOTH
class TestDtypes:
    @pytest.mark.parametrize("shape", [(9, 5), (9, 40)], ids=str)
    def test_halves(self, rng, function, reference, shape):
        x = rng.normal(size=shape).astype(np.float16)
        assert_close(function(x), reference(x), np.float32)
        np.testing.assert_array_equal(function(x), function(x.astype(np.float32)))

    def test_bfloat16(self, rng, function, reference):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        x = rng.normal(size=(9, 5)).astype(ml_dtypes.bfloat16)
        assert_close(function(x), reference(x), np.float32)

    @pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.bool_, np.int32], ids=lambda d: np.dtype(d).name)
    def test_integers(self, rng, function, reference, dtype):
        x = rng.integers(0, 2 if dtype is np.bool_ else 50, size=(9, 5)).astype(dtype)
        for axis in (0, 1):
            assert_close(function(x, axis), reference(x, axis), np.float64)

    def test_array_likes(self, function, reference):
        assert_close(function([[0.0, 1.0], [2.0, -1.0]]), reference(np.array([[0.0, 1.0], [2.0, -1.0]])), np.float64)
        assert type(function(np.ma.MaskedArray([0.0, 1.0]))) is np.ndarray


@BOTH
class TestLayouts:
    @pytest.mark.parametrize("shape", [(13,), (10, 13), (9, 40), (3, 5, 7)], ids=str)
    def test_same_bits(self, rng, layout, function, reference, shape):
        x = (rng.normal(size=shape) * 4).astype(np.float32)
        for axis in range(len(shape)):
            expected = function(x, axis)
            np.testing.assert_array_equal(function(layout(x), axis), expected, strict=True)

    @pytest.mark.parametrize("n_rows", [17, 300])
    @pytest.mark.parametrize("n_classes", [1025, 1040, 1537, 8193, 8720])
    def test_columns_of_many_groups(self, rng, function, reference, n_rows, n_classes):
        """A group is copied while the one before is summed; maxima anywhere, masked classes, columns of no number."""
        x = (10 * rng.normal(size=(n_classes, n_rows))).astype(np.float32)
        x[rng.integers(0, n_classes, 9)] = -INF
        x[rng.integers(0, n_classes, n_rows), np.arange(n_rows)] = 50
        x[n_classes // 2, 2], x[-1, 3], x[:, 4] = NAN, INF, -INF
        got = function(x, 0)
        assert_close(got, reference(x, 0), np.float32)
        np.testing.assert_array_equal(got.T, function(np.ascontiguousarray(x.T), 1))

    @pytest.mark.parametrize("n_classes", [1, 2, 8, 9, 16, 17, 31, 32, 33])
    def test_few_classes(self, rng, layout, function, reference, n_classes):
        """Some rows at a time, a vector of them at a time, the last ones twice; odd ones among them."""
        for n_rows, dtype in itertools.product((9, 17, 64, 81), (np.float32, np.float64)):
            x = (4 * rng.normal(size=(n_rows, n_classes))).astype(dtype)
            x[rng.integers(0, n_rows, 3), rng.integers(0, n_classes, 3)] = -INF
            x[2, n_classes // 2], x[-1, -1], x[n_rows // 2] = NAN, INF, -INF
            got = function(layout(x))
            assert_close(got, reference(x), dtype)
            np.testing.assert_array_equal(function(layout(np.ascontiguousarray(x.T)), 0).T, got)
            np.testing.assert_array_equal(function(x[5:6])[0], got[5])

    def test_zero_strides(self, rng, frozen, function, reference):
        x = np.broadcast_to(frozen(rng.normal(size=(6, 1, 7)).astype(np.float32)), (6, 5, 7))
        for axis in range(3):
            np.testing.assert_array_equal(function(x, axis), function(x.copy(), axis))

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)], ids=str)
    def test_the_result_has_the_memory_order_of_the_input(self, rng, function, reference, order):
        x = rng.normal(size=(3, 5, 7)).astype(np.float32).transpose(order)
        assert function(x, 1).strides == x.strides

    def test_the_result_is_new_writeable_memory(self, frozen, function, reference):
        x = frozen(np.zeros((3, 4), np.float32))
        got = function(x)
        assert got.flags.writeable
        assert not np.shares_memory(got, x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_rows", [1, 9], ids=["in_rows", "in_planes"])
class TestSpecialValues:
    @pytest.mark.parametrize(
        ("row", "probabilities"),
        [
            ([0.0, -INF, 0.0], [0.5, 0.0, 0.5]),
            ([-INF, 5.0, -INF], [0.0, 1.0, 0.0]),
            ([-INF, -INF, -INF], [NAN, NAN, NAN]),
            ([0.0, INF, 0.0], [NAN, NAN, NAN]),
            ([0.0, INF, INF], [NAN, NAN, NAN]),
            ([0.0, NAN, 0.0], [NAN, NAN, NAN]),
            ([NAN, NAN, NAN], [NAN, NAN, NAN]),
            ([NAN, -INF, INF], [NAN, NAN, NAN]),
            ([-INF, -INF, NAN], [NAN, NAN, NAN]),
            ([1e30, -1e30, 0.0], [1.0, 0.0, 0.0]),
        ],
    )
    @pytest.mark.parametrize("n_classes", [3, 30, 300])
    def test_rows(self, dtype, n_rows, row, probabilities, n_classes):
        padding = [-INF] * (n_classes - 3)
        x = np.array([padding + row] * n_rows, dtype)
        is_nan = math.isnan(probabilities[0])
        expected = np.array([(NAN if is_nan else 0.0)] * len(padding) + probabilities)
        np.testing.assert_array_equal(softmax(x), np.tile(expected, (n_rows, 1)))
        logarithms = log_softmax(x)
        np.testing.assert_array_equal(np.isnan(logarithms), np.isnan(x) | is_nan)
        if not is_nan:
            masked = np.isneginf(x)
            assert np.isneginf(logarithms[masked]).all()
            assert np.isfinite(logarithms[~masked]).all()

    @pytest.mark.parametrize("n_classes", [2, 30, 300])
    @pytest.mark.parametrize("fraction", [2.0**-1, 2.0**-23, 1.7 * 2.0**-25, 2.0**-60, 0.0])
    def test_masked_by_the_lowest_number(self, dtype, n_rows, n_classes, fraction):
        """What rounding takes off such a difference can itself be beyond what an exponential survives."""
        lowest = np.finfo(dtype).min
        x = np.full((n_rows, n_classes), lowest / 4, dtype)
        x[:, 0] = lowest / -4 * fraction
        expected = np.eye(1, n_classes).repeat(n_rows, axis=0)
        np.testing.assert_array_equal(softmax(x), expected)
        np.testing.assert_array_equal(log_softmax(x), np.where(expected, 0, x - x[:, :1]))

    def test_a_confident_class_keeps_its_digits(self, dtype, n_rows):
        x = np.array([[0.0, -40.0, -INF]] * n_rows, dtype)
        expected = -math.log1p(math.exp(-40))
        np.testing.assert_allclose(log_softmax(x)[:, 0], expected, rtol=4 * np.finfo(dtype).eps)

    def test_nan_stays_in_its_row(self, dtype, n_rows):
        x = np.zeros((n_rows + 1, 4), dtype)
        x[0, 2] = NAN
        got = softmax(x)
        assert np.isnan(got[0]).all()
        np.testing.assert_array_equal(got[1:], 0.25)
