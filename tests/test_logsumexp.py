"""logsumexp: values, axes, keepdims, dtypes, layouts, special values. (Malformed calls: test_errors.py.)"""

import itertools
import math

import numpy as np
import pytest
import references

from fastloss import logsumexp

INF, NAN = math.inf, math.nan
CLASS_COUNTS = [1, 2, 7, 16, 17, 24, 25, 33, 257, 1000, 4097]


def assert_close(got, expected, dtype):
    """dtype, shape, kind, values.

    Near 0 the maximum and the logarithm of the sum may cancel: the error is then that of rounding each, 1 ulp of
    numbers as large as the logits.
    """
    expected = np.asarray(expected)
    eps = np.finfo(dtype).eps
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert isinstance(got, np.generic if expected.ndim == 0 else np.ndarray)
    np.testing.assert_allclose(got, expected, rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestValues:
    @pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 8, 17])
    @pytest.mark.parametrize("n_classes", CLASS_COUNTS)
    def test_rows_by_classes(self, rng, frozen, dtype, n_rows, n_classes):
        x = frozen((rng.normal(size=(n_rows, n_classes)) * 4).astype(dtype))
        assert_close(logsumexp(x, 1), references.logsumexp(x, 1), dtype)
        assert_close(logsumexp(x.T, 0), references.logsumexp(x, 1), dtype)

    @pytest.mark.parametrize("keepdims", [False, True])
    @pytest.mark.parametrize("shape", [(5,), (9, 40), (4, 5, 3), (2, 30, 3, 5)], ids=str)
    def test_axes(self, rng, frozen, dtype, shape, keepdims):
        x = frozen((rng.normal(size=shape) * 4).astype(dtype))
        n = len(shape)
        subsets = [c for k in range(n + 1) for c in itertools.combinations(range(n), k)]
        for axis in [None, *range(-n, n), *subsets]:
            expected = references.logsumexp(x, axis, keepdims)
            got = logsumexp(x, axis, keepdims)
            if axis == ():
                np.testing.assert_array_equal(got, x)
            assert_close(got, expected, dtype)
            np.testing.assert_array_equal(logsumexp(x, dim=axis, keepdim=keepdims), got)

    def test_the_order_and_the_sign_of_axes_do_not_matter(self, rng, dtype):
        x = rng.normal(size=(4, 5, 3)).astype(dtype)
        expected = logsumexp(x, (0, 2))
        for axis in ((2, 0), (-1, 0), [0, 2], (-3, -1), (np.int64(0), np.int8(2))):
            np.testing.assert_array_equal(logsumexp(x, axis), expected)

    def test_everything_is_the_default(self, rng, dtype):
        x = rng.normal(size=(4, 5, 3)).astype(dtype)
        assert logsumexp(x) == logsumexp(x, None) == logsumexp(x.ravel(), 0)
        assert isinstance(logsumexp(x), dtype)
        assert logsumexp(x, keepdims=True).shape == (1, 1, 1)

    @pytest.mark.parametrize("axis", [None, 0, -1, (), (0,), (-1,)])
    @pytest.mark.parametrize("keepdims", [False, True])
    def test_a_number(self, dtype, axis, keepdims):
        got = logsumexp(dtype(3.5), axis, keepdims)
        assert got == 3.5
        assert isinstance(got, dtype)

    def test_many_axes_that_are_one_stride_apart_are_one_axis(self, rng, dtype):
        x = rng.normal(size=(6, 4, 50)).astype(dtype)
        np.testing.assert_array_equal(logsumexp(x, (1, 2)), logsumexp(x.reshape(6, 200), 1))

    @pytest.mark.parametrize("n_rows", [1, 9])
    def test_small_remainders_keep_their_digits(self, dtype, n_rows):
        x = np.array([[0.0, -40.0]] * n_rows, dtype)
        np.testing.assert_allclose(logsumexp(x, 1), math.log1p(math.exp(-40)), rtol=4 * np.finfo(dtype).eps)
        assert logsumexp([0.0, -40.0]) == pytest.approx(4.248354255291589e-18, rel=1e-15)

    @pytest.mark.parametrize("offset", [1e4, -1e4, 3e38, -3e38])
    def test_far_from_zero(self, dtype, offset):
        x = np.full((9, 7), offset, dtype)
        np.testing.assert_allclose(logsumexp(x, 1), float(dtype(offset)) + math.log(7), rtol=np.finfo(dtype).eps)


def test_many_rows_take_the_parallel_kernel(rng, frozen):
    x = frozen((rng.normal(size=(7001, 11)) * 4).astype(np.float32))
    assert_close(logsumexp(x, -1), references.logsumexp(x, -1), np.float32)


class TestDtypes:
    @pytest.mark.parametrize("shape", [(9, 5), (9, 40)], ids=str)
    def test_halves(self, rng, shape):
        x = rng.normal(size=shape).astype(np.float16)
        assert_close(logsumexp(x, 1), references.logsumexp(x, 1), np.float32)
        np.testing.assert_array_equal(logsumexp(x, 1), logsumexp(x.astype(np.float32), 1))

    def test_bfloat16(self, rng):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        x = rng.normal(size=(9, 5)).astype(ml_dtypes.bfloat16)
        assert_close(logsumexp(x, 1), references.logsumexp(x, 1), np.float32)

    @pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.bool_, np.int32], ids=lambda d: np.dtype(d).name)
    def test_integers(self, rng, dtype):
        x = rng.integers(0, 2, size=(9, 5)).astype(dtype)
        for axis in (None, 0, 1):
            assert_close(logsumexp(x, axis), references.logsumexp(x, axis), np.float64)

    def test_array_likes(self):
        pandas = pytest.importorskip("pandas")
        x = np.array([[0.0, 1.0], [2.0, -1.0]])
        for like in (x.tolist(), pandas.DataFrame(x), memoryview(x), np.ma.MaskedArray(x)):
            assert_close(logsumexp(like, 1), references.logsumexp(x, 1), np.float64)


class TestLayouts:
    @pytest.mark.parametrize("shape", [(13,), (10, 13), (9, 40), (3, 5, 7)], ids=str)
    def test_same_bits(self, rng, layout, shape):
        x = (rng.normal(size=shape) * 4).astype(np.float32)
        for axis in range(len(shape)):
            np.testing.assert_array_equal(logsumexp(layout(x), axis), logsumexp(x, axis), strict=True)

    @pytest.mark.parametrize("axis", [None, (0, 1), (0, 2), (1, 2)], ids=str)
    def test_several_axes(self, rng, layout, axis):
        x = (rng.normal(size=(3, 5, 7)) * 4).astype(np.float32)
        assert_close(logsumexp(layout(x), axis), references.logsumexp(x, axis), np.float32)

    @pytest.mark.parametrize("n_rows", [7, 17, 300, 1100])
    @pytest.mark.parametrize("n_classes", [1023, 1024, 1025, 1040, 1536, 1537, 2049, 8193, 8720])
    def test_columns_of_many_groups(self, rng, n_rows, n_classes):
        """Maxima anywhere, masked classes, columns of no number."""
        x = (10 * rng.normal(size=(n_classes, n_rows))).astype(np.float32)
        x[rng.integers(0, n_classes, 9)] = -INF
        x[rng.integers(0, n_classes, n_rows), np.arange(n_rows)] = 50
        x[n_classes // 2, 2], x[-1, 3], x[:, 4] = NAN, INF, -INF
        x[[3, -2], 5], x[[1, 1000], 6] = INF, [NAN, INF]
        got = logsumexp(x, 0)
        assert_close(got, references.logsumexp(x.T, 1), np.float32)
        np.testing.assert_array_equal(got, logsumexp(np.ascontiguousarray(x.T), 1))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("n_classes", [1025, 1296, 1303, 8200, 9000])
    def test_columns_whose_maximum_comes_late(self, rng, dtype, n_classes):
        """A block of 256 classes is summed relative to the largest of the first of its chunk of 8192, as long as its
        own largest is no more than 2 above.
        """
        x = rng.normal(size=(n_classes, 40))
        rising = np.linspace(0, 1, n_classes)
        for i, height in enumerate((0.5, 2, 3, 50, 500, 60_000)):
            x[:, i] = x[:, i + 6] = rising * height
            x[::-1, i + 6] = x[:, i]
        for i, step in enumerate((1.99, 2, 2.01, 39, 41, 200)):
            x[:, 12 + i] = np.where(np.arange(n_classes) < 300, -step, 0.25)
            x[:, 18 + i] = np.where(np.arange(n_classes) // 256 % 2 == 0, -step, 0)
        x[:256, 24] = x[:-1, 25] = x[:8192, 26] = -INF
        x[256:, 27] = -INF
        x[:, 28:30], x[0, 28], x[-1, 29] = -30, 0, 0  # the remainder's digits
        x[:, 30], x[700, 30], x[701, 31] = -INF, NAN, NAN
        x = x.astype(dtype)
        got = logsumexp(x, 0)
        assert_close(got, references.logsumexp(x.T, 1), np.result_type(dtype, np.float32))
        for rows in (np.ascontiguousarray(x.T), np.repeat(x.T, 2, 1)[:, ::2]):
            np.testing.assert_array_equal(logsumexp(rows, 1), got)
            np.testing.assert_array_equal([logsumexp(row, 0) for row in rows], got)
        remainder = (n_classes - 1) * math.exp(-30)
        eps = np.finfo(got.dtype).eps
        np.testing.assert_allclose(got[28:30], math.log1p(remainder), rtol=8 * eps)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_fewer_columns_than_a_vector_has_lanes(self, rng, dtype):
        """What the lanes without a row hold, here the infinities of the call before, is not looked at."""
        for n_classes in (1025, 8193):
            logsumexp(np.full((n_classes, 32), INF, dtype)[:, ::2], 0)
            x = rng.normal(size=(n_classes, 9)).astype(dtype)
            np.testing.assert_array_equal(logsumexp(x, 0), logsumexp(np.ascontiguousarray(x.T), 1))

    def test_zero_strides(self, rng, frozen):
        x = np.broadcast_to(frozen(rng.normal(size=(6, 1, 7)).astype(np.float32)), (6, 5, 7))
        for axis in (None, 0, 1, 2, (0, 1), (1, 2)):
            assert_close(logsumexp(x, axis), references.logsumexp(x, axis), np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestSpecialValues:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ([-INF, -INF, -INF], -INF),
            ([0.0, INF, 0.0], INF),
            ([INF, INF, INF], INF),
            ([-INF, INF, 0.0], INF),
            ([0.0, -INF, -INF], 0.0),
            ([7.0, -INF, -INF], 7.0),
            ([NAN, 0.0, 0.0], NAN),
            ([NAN, INF, 0.0], NAN),
            ([INF, NAN, 0.0], NAN),
            ([NAN, -INF, -INF], NAN),
            ([NAN, NAN, NAN], NAN),
            ([-INF, INF, NAN], NAN),
        ],
    )
    @pytest.mark.parametrize("n_classes", [3, 30, 300])
    @pytest.mark.parametrize("n_rows", [1, 9], ids=["in_rows", "in_planes"])
    def test_rows(self, dtype, row, expected, n_rows, n_classes):
        x = np.array([[-INF] * (n_classes - 3) + row] * n_rows, dtype)
        np.testing.assert_array_equal(logsumexp(x, 1), np.full(n_rows, expected, dtype))
        back = np.ascontiguousarray(x[:, ::-1])
        np.testing.assert_array_equal(logsumexp(back, 1), np.full(n_rows, expected, dtype))

    def test_several_axes(self, dtype):
        x = np.full((4, 3, 2), -INF, dtype)
        x[1, 2, 0], x[2, 1, 1], x[3, 0, 1], x[3, 2, 0] = INF, NAN, NAN, INF
        for axis in ((1, 2), (2, 1)):
            np.testing.assert_array_equal(logsumexp(x, axis), [-INF, INF, NAN, NAN])
        np.testing.assert_array_equal(logsumexp(x.transpose(0, 2, 1).copy(), (1, 2)), [-INF, INF, NAN, NAN])
        np.testing.assert_array_equal(logsumexp(x.transpose(1, 0, 2).copy(), (0, 2)), [-INF, INF, NAN, NAN])

    @pytest.mark.parametrize(
        ("shape", "axis", "result_shape"),
        [
            ((0,), None, ()),
            ((0,), 0, ()),
            ((3, 0), 1, (3,)),
            ((3, 0), None, ()),
            ((3, 0), (0, 1), ()),
            ((2, 0, 4), 1, (2, 4)),
        ],
        ids=str,
    )
    def test_of_nothing(self, dtype, shape, axis, result_shape):
        got = logsumexp(np.zeros(shape, dtype), axis)
        np.testing.assert_array_equal(got, np.full(result_shape, -INF, dtype))
        assert isinstance(got, np.ndarray if result_shape else dtype)

    @pytest.mark.parametrize(("axis", "result_shape"), [(0, (0,)), (1, (3,)), ((), (3, 0))])
    def test_rows_of_nothing(self, dtype, axis, result_shape):
        assert logsumexp(np.zeros((3, 0), dtype), axis).shape == result_shape
        assert logsumexp(np.zeros((3, 0), dtype), 0, keepdims=True).shape == (1, 0)
