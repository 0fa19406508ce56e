"""cross_entropy: values, shapes, dtypes, layouts, options, special values. (Malformed calls: test_errors.py.)"""

import array as array_module
import itertools
import math

import numpy as np
import pytest
import references

from fastloss import _views, cross_entropy

INF, NAN = math.inf, math.nan

# The contract's bound for float32; what float64 needs is set by the references' own few ulp.
TOLERANCE = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 1e-13}

# Around the kernels' borders: a vector (8, 16), few classes (24), a block (256); one class; odd ones.
CLASS_COUNTS = [1, 2, 7, 16, 17, 24, 25, 33, 257, 1000, 4097]
SHAPES = [(5,), (3, 5), (19, 7), (9, 40), (4, 5, 3), (2, 30, 3, 5), (1, 17, 9, 1, 2), (2, 3, 1)]
INTEGER_DTYPES = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
REDUCTIONS = ["none", "mean", "sum"]


def shape_id(shape):
    return "x".join(map(str, shape))


def rows_shape(shape):
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def make_logits(rng, shape, dtype, scale=3.0):
    return (rng.normal(size=shape) * scale).astype(dtype)


def make_targets(rng, shape, dtype=np.int64):
    n_classes = shape[0] if len(shape) == 1 else shape[1]
    return np.asarray(
        rng.integers(0, min(n_classes, 100), size=shape[2:] if len(shape) == 1 else rows_shape(shape)), dtype
    )


def make_probabilities(rng, shape, dtype):
    y = rng.random(size=shape)
    return (y / y.sum(axis=0 if len(shape) == 1 else 1, keepdims=True)).astype(dtype)


def assert_close(got, expected, dtype):
    """dtype, shape, kind and values; the tolerance is the contract's."""
    dtype = np.dtype(dtype)
    expected = np.asarray(expected)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert isinstance(got, np.generic if expected.ndim == 0 else np.ndarray), "0-d results are NumPy scalars"
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestShapes:
    @pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 8, 17])
    @pytest.mark.parametrize("n_classes", CLASS_COUNTS)
    def test_rows_by_classes(self, rng, frozen, dtype, n_rows, n_classes):
        x = frozen(make_logits(rng, (n_rows, n_classes), dtype))
        t = frozen(make_targets(rng, x.shape))
        assert_close(cross_entropy(x, t, reduction="none"), references.cross_entropy(x, t, reduction="none"), dtype)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
    def test_dimensions_and_reductions(self, rng, frozen, dtype, shape, reduction):
        x, t = frozen(make_logits(rng, shape, dtype)), frozen(make_targets(rng, shape))
        assert_close(
            cross_entropy(x, t, reduction=reduction), references.cross_entropy(x, t, reduction=reduction), dtype
        )

    @pytest.mark.parametrize("n_classes", [257, 8193])
    def test_a_lone_row_of_many_classes(self, rng, frozen, dtype, n_classes):
        x = frozen(make_logits(rng, (n_classes,), dtype))
        for t in (0, n_classes - 1):
            assert_close(cross_entropy(x, t, reduction="none"), references.cross_entropy(x, t, reduction="none"), dtype)

    def test_one_class_is_certain(self, frozen, dtype):
        x = frozen(np.array([[5.0], [-1e30], [0.0]], dtype))
        got = cross_entropy(x, [0, 0, 0], reduction="none")
        assert got.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("n_classes", [11, 40])
def test_many_rows_take_the_parallel_kernel(rng, frozen, n_classes):
    x = frozen(make_logits(rng, (77_000 // n_classes, n_classes), np.float32))
    t = frozen(make_targets(rng, x.shape))
    expected = references.cross_entropy(x, t, reduction="none")
    assert_close(cross_entropy(x, t, reduction="none"), expected, np.float32)
    assert_close(cross_entropy(x, t), references.total(expected) / len(x), np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestProbabilityTargets:
    @pytest.mark.parametrize("n_rows", [0, 1, 2, 9])
    @pytest.mark.parametrize("n_classes", CLASS_COUNTS)
    def test_rows_by_classes(self, rng, frozen, dtype, n_rows, n_classes):
        x = frozen(make_logits(rng, (n_rows, n_classes), dtype))
        y = frozen(make_probabilities(rng, x.shape, dtype))
        expected = references.cross_entropy_probabilities(x, y, reduction="none")
        assert_close(cross_entropy(x, y, reduction="none"), expected, dtype)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
    def test_options(self, rng, frozen, dtype, shape, reduction, label_smoothing):
        x, y = frozen(make_logits(rng, shape, dtype)), frozen(make_probabilities(rng, shape, dtype))
        weight = frozen(rng.random(shape[0] if len(shape) == 1 else shape[1]).astype(dtype))
        options = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
        assert_close(cross_entropy(x, y, **options), references.cross_entropy_probabilities(x, y, **options), dtype)

    def test_mean_divides_by_rows_and_not_by_weights(self, frozen, dtype):
        x = frozen(np.zeros((3, 2, 5), dtype))
        y = frozen(np.full((3, 2, 5), 0.5, dtype))
        assert float(cross_entropy(x, y, weight=[10.0, 10.0])) == pytest.approx(10 * math.log(2), rel=1e-7)

    def test_one_hot_is_the_index(self, rng, frozen, dtype):
        x = frozen(make_logits(rng, (9, 6), dtype))
        t = make_targets(rng, x.shape)
        one_hot = np.eye(6, dtype=dtype)[t]
        expected = cross_entropy(x, t, reduction="none")
        np.testing.assert_allclose(
            cross_entropy(x, one_hot, reduction="none"), expected, rtol=TOLERANCE[np.dtype(dtype)]
        )

    def test_a_batch_without_rows(self, dtype):
        x = np.zeros((0, 4), dtype)
        assert cross_entropy(x, x, reduction="none").shape == (0,)
        assert cross_entropy(x, x, reduction="sum") == 0
        assert np.isnan(cross_entropy(x, x))

    def test_probability_zero_on_a_masked_class_is_nan(self, frozen, dtype):
        x = frozen(np.array([[0.0, -INF, 1.0], [0.0, 2.0, 1.0]], dtype))
        y = frozen(np.array([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5]], dtype))
        got = cross_entropy(x, y, reduction="none")
        assert np.isnan(got[0])
        assert got[1] == pytest.approx(references.cross_entropy_probabilities(x, y, reduction="none")[1], rel=2e-6)

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ([0.0, -INF, 1.0], INF),
            ([-INF, -INF, -INF], NAN),
            ([0.0, INF, 1.0], NAN),
            ([0.0, NAN, 1.0], NAN),
        ],
        ids=["masked", "all_masked", "infinite", "nan"],
    )
    @pytest.mark.parametrize("n_rows", [1, 9])
    def test_special_logits(self, frozen, dtype, row, expected, n_rows):
        x = frozen(np.array([row] * n_rows, dtype))
        y = frozen(np.full((n_rows, 3), 1 / 3, dtype))
        np.testing.assert_array_equal(cross_entropy(x, y, reduction="none"), [expected] * n_rows)

    def test_probabilities_need_not_sum_to_one_and_may_be_negative(self, rng, frozen, dtype):
        x = frozen(make_logits(rng, (9, 5), dtype))
        y = frozen(rng.normal(size=(9, 5)).astype(dtype))
        expected = references.cross_entropy_probabilities(x, y, reduction="none")
        # Terms of both signs cancel: the error is relative to the sum of their sizes, some 30 for each of 5 classes.
        tolerance = 100 * np.finfo(dtype).eps
        np.testing.assert_allclose(cross_entropy(x, y, reduction="none"), expected, rtol=0, atol=tolerance)


class TestLayouts:
    """The same bits wherever the data lies; the contiguous result is compared with the reference above."""

    @pytest.mark.parametrize("shape", [(13,), (10, 13), (9, 40), (3, 5, 7), (2, 30, 3, 4)], ids=shape_id)
    def test_index_targets(self, rng, layout, shape):
        x, t = make_logits(rng, shape, np.float32), make_targets(rng, shape)
        expected = cross_entropy(x, t, reduction="none")
        np.testing.assert_array_equal(cross_entropy(layout(x), layout(t), reduction="none"), expected, strict=True)
        np.testing.assert_array_equal(cross_entropy(layout(x), t, reduction="none"), expected)
        np.testing.assert_array_equal(cross_entropy(x, layout(t), reduction="none"), expected)
        assert cross_entropy(layout(x), layout(t)) == cross_entropy(x, t)

    @pytest.mark.parametrize("shape", [(10, 13), (9, 40), (3, 5, 7)], ids=shape_id)
    def test_probability_targets(self, rng, layout, shape):
        x, y = make_logits(rng, shape, np.float32), make_probabilities(rng, shape, np.float32)
        expected = cross_entropy(x, y, reduction="none")
        np.testing.assert_array_equal(cross_entropy(layout(x), layout(y), reduction="none"), expected, strict=True)
        np.testing.assert_array_equal(cross_entropy(x, layout(y), reduction="none"), expected)
        np.testing.assert_array_equal(cross_entropy(layout(x), y, reduction="none"), expected)

    @pytest.mark.parametrize("n_rows", [17, 300])
    @pytest.mark.parametrize("n_classes", [1025, 1040, 1537, 8193])
    def test_columns_of_many_groups(self, rng, n_rows, n_classes):
        """A group is copied while the one before is summed."""
        x = make_logits(rng, (n_classes, n_rows), np.float32, 10)
        x[rng.integers(0, n_classes, n_rows), np.arange(n_rows)] = 50
        t, y = make_targets(rng, x.T.shape), make_probabilities(rng, x.T.shape, np.float32)
        weight = np.linspace(0.5, 2, n_classes)
        for target, reference in ((t, references.cross_entropy), (y, references.cross_entropy_probabilities)):
            options = {"weight": weight, "label_smoothing": 0.1, "reduction": "none"}
            got = cross_entropy(x.T, target, **options)
            assert_close(got, reference(x.T, target, **options), np.float32)
            np.testing.assert_array_equal(got, cross_entropy(np.ascontiguousarray(x.T), target, **options))

    def test_weights(self, rng, layout):
        x, t = make_logits(rng, (10, 13), np.float32), make_targets(rng, (10, 13))
        weight = rng.random(13).astype(np.float32)
        assert cross_entropy(x, t, weight=layout(weight)) == cross_entropy(x, t, weight=weight)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_zero_strides(self, rng, frozen, axis):
        shape = [6, 5, 7]
        shape[axis] = 1
        x = np.broadcast_to(frozen(make_logits(rng, shape, np.float32)), (6, 5, 7))
        t = np.broadcast_to(frozen(make_targets(rng, (1, 5, 7))), (6, 7))
        expected = cross_entropy(np.ascontiguousarray(x), np.ascontiguousarray(t), reduction="none")
        np.testing.assert_array_equal(cross_entropy(x, t, reduction="none"), expected)

    def test_lone_rows_that_are_copied(self, layout):
        """One row and another, so that what an earlier result left in the memory of the next is noticed."""
        for k in range(4):
            x = np.arange(5, dtype=np.float32) * k
            for target in (0, 4):
                expected = references.cross_entropy(x, target, reduction="none")
                assert_close(cross_entropy(layout(x), target, reduction="none"), expected, np.float32)
                assert_close(cross_entropy(x.astype(int), target, reduction="none"), expected, np.float64)

    def test_one_number_for_everything(self):
        x = np.broadcast_to(np.float32(3.0), (20, 30))
        t = np.broadcast_to(np.int64(4), (20,))
        np.testing.assert_allclose(cross_entropy(x, t, reduction="none"), [math.log(30)] * 20, rtol=1e-7)


class TestDtypes:
    def test_halves_give_float32_of_their_exact_values(self, rng, frozen):
        x = frozen(make_logits(rng, (9, 33), np.float16))
        t = make_targets(rng, x.shape)
        assert_close(
            cross_entropy(x, t, reduction="none"), references.cross_entropy(x, t, reduction="none"), np.float32
        )
        np.testing.assert_array_equal(
            cross_entropy(x, t, reduction="none"), cross_entropy(x.astype(np.float32), t, reduction="none")
        )

    @pytest.mark.parametrize("n_classes", [5, 33])
    def test_every_float16(self, serial, n_classes):
        """All bit patterns, subnormal numbers, infinities and NaN included, are read as NumPy reads them."""
        x = np.zeros((1 << 16, n_classes), np.float16)
        x[:, 1] = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        t = np.zeros(1 << 16, np.int8)
        got = cross_entropy(x, t, reduction="none")
        np.testing.assert_array_equal(got, cross_entropy(x.astype(np.float32), t, reduction="none"))

    def test_every_bfloat16(self, serial):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        x = np.zeros((1 << 16, 5), ml_dtypes.bfloat16)
        x[:, 1] = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
        t = np.ones(1 << 16, np.int8)
        got = cross_entropy(x, t, reduction="none")
        assert got.dtype == np.float32
        with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
            wide = x.astype(np.float32)
        np.testing.assert_array_equal(got, cross_entropy(wide, t, reduction="none"))

    @pytest.mark.parametrize("layout_name", ["fortran", "sliced", "packed"])
    def test_bfloat16_layouts(self, rng, layout_name):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        x = make_logits(rng, (9, 5), np.float32).astype(ml_dtypes.bfloat16)
        t = make_targets(rng, x.shape)
        expected = cross_entropy(x.astype(np.float32), t, reduction="none")
        if layout_name == "fortran":
            x = np.asfortranarray(x)
        elif layout_name == "sliced":
            x = np.repeat(x, 2, axis=0)[::2]
        else:
            records = np.zeros(x.shape, [("flag", np.uint8), ("value", x.dtype)])
            records["value"] = x
            x = records["value"]
        np.testing.assert_array_equal(cross_entropy(x, t, reduction="none"), expected)

    def test_half_probabilities(self, rng):
        x = make_logits(rng, (9, 5), np.float16)
        y = make_probabilities(rng, x.shape, np.float16)
        expected = references.cross_entropy_probabilities(x, y, reduction="none")
        assert_close(cross_entropy(x, y, reduction="none"), expected, np.float32)

    @pytest.mark.parametrize(
        ("x_dtype", "y_dtype", "result"),
        [
            (np.float32, np.float64, np.float64),
            (np.float64, np.float32, np.float64),
            (np.float16, np.float32, np.float32),
            (np.int32, np.float32, np.float64),
        ],
        ids=lambda d: np.dtype(d).name,
    )
    def test_two_dtypes_promote(self, rng, x_dtype, y_dtype, result):
        x = make_logits(rng, (3, 5), x_dtype)
        y = make_probabilities(rng, x.shape, y_dtype)
        expected = references.cross_entropy_probabilities(x, y, reduction="none")
        assert_close(cross_entropy(x, y, reduction="none"), expected, result)

    @pytest.mark.parametrize("dtype", [*INTEGER_DTYPES, np.bool_], ids=lambda d: np.dtype(d).name)
    def test_integer_logits_count_as_float64(self, rng, dtype):
        x = rng.integers(0, 2 if dtype is np.bool_ else 100, size=(9, 5)).astype(dtype)
        t = make_targets(rng, x.shape)
        assert_close(
            cross_entropy(x, t, reduction="none"), references.cross_entropy(x, t, reduction="none"), np.float64
        )

    def test_integer_logits_in_many_pieces(self, rng, monkeypatch):
        monkeypatch.setattr(_views, "PIECE", 1000)
        x = rng.integers(-50, 50, size=(20, 5, 101)).astype(np.int16)
        t = make_targets(rng, x.shape)
        expected = cross_entropy(x.astype(np.float64), t, reduction="none")
        np.testing.assert_array_equal(cross_entropy(x, t, reduction="none"), expected, strict=True)
        assert cross_entropy(x, t) == cross_entropy(x.astype(np.float64), t)

    @pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=lambda d: np.dtype(d).name)
    @pytest.mark.parametrize("n_classes", [5, 100])
    def test_target_dtypes(self, rng, frozen, dtype, n_classes):
        x = frozen(make_logits(rng, (9, n_classes), np.float32))
        t = frozen(make_targets(rng, x.shape, dtype))
        expected = references.cross_entropy(x, t, reduction="none")
        assert_close(cross_entropy(x, t, reduction="none"), expected, np.float32)
        assert_close(cross_entropy(x, t.astype(t.dtype.newbyteorder()), reduction="none"), expected, np.float32)
        assert_close(cross_entropy(x, np.repeat(t, 3)[::3], reduction="none"), expected, np.float32)

    def test_bool_targets(self, rng, frozen):
        x = frozen(make_logits(rng, (9, 2), np.float32))
        t = frozen(rng.random(9) < 0.5)
        expected = references.cross_entropy(x, t, reduction="none")
        assert_close(cross_entropy(x, t, reduction="none"), expected, np.float32)

    @pytest.mark.parametrize(
        "dtype",
        [np.float16, np.float64, np.longdouble, np.int8, np.uint64, np.bool_, ">f8"],
        ids=lambda d: np.dtype(d).name,
    )
    def test_weight_dtypes_do_not_widen(self, rng, dtype):
        x, t = make_logits(rng, (9, 5), np.float32), make_targets(rng, (9, 5))
        weight = np.array([1, 0, 3, 2, 1]).astype(dtype)
        expected = references.cross_entropy(x, t, weight=weight.astype(float))
        assert_close(cross_entropy(x, t, weight=weight), expected, np.float32)


class TestArrayLikes:
    X = ((1.5, -2.0, 0.25), (0.0, 3.0, 1.0))
    T = (2, 1)

    def expected(self):
        return references.cross_entropy(np.array(self.X), np.array(self.T), reduction="none")

    def test_lists(self):
        got = cross_entropy([list(row) for row in self.X], list(self.T), reduction="none")
        assert_close(got, self.expected(), np.float64)

    def test_list_of_arrays(self):
        got = cross_entropy([np.array(row, np.float32) for row in self.X], self.T, reduction="none")
        assert_close(got, self.expected(), np.float32)

    def test_pandas(self):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(self.X, columns=list("abc"), dtype=np.float32)
        labels = pandas.Series(self.T, index=[7, 8])
        weight = pandas.Series([1.0, 1.0, 1.0], index=list("abc"))
        assert_close(cross_entropy(frame, labels, weight=weight, reduction="none"), self.expected(), np.float32)

    def test_torch_tensors(self):
        torch = pytest.importorskip("torch")
        got = cross_entropy(torch.tensor(self.X), torch.tensor(self.T), reduction="none")
        assert_close(got, self.expected(), np.float32)

    def test_buffers(self):
        buffer = memoryview(np.array(self.X))
        labels = array_module.array("i", self.T)
        assert_close(cross_entropy(buffer, labels, reduction="none"), self.expected(), np.float64)

    def test_objects_with_an_array_method(self):
        class Wrapped:
            def __init__(self, values):
                self.values = np.array(values)

            def __array__(self, dtype=None, copy=None):
                return self.values if dtype is None else self.values.astype(dtype)

        got = cross_entropy(Wrapped(self.X), Wrapped(self.T), reduction="none")
        assert_close(got, self.expected(), np.float64)

    def test_subclasses_and_masked_arrays_without_masked_entries(self):
        x = np.ma.MaskedArray(np.array(self.X), mask=False)
        got = cross_entropy(x, np.ma.MaskedArray(self.T), reduction="none")
        assert type(got) is np.ndarray
        assert_close(got, self.expected(), np.float64)

    def test_a_scalar_target_for_a_lone_row(self):
        for target in (2, np.int8(2), np.array(2), True * 2):
            assert_close(cross_entropy(self.X[0], target, reduction="none"), self.expected()[0], np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
class TestOptions:
    @pytest.mark.parametrize("n_classes", [5, 40])
    @pytest.mark.parametrize(
        ("weighted", "label_smoothing", "ignore_index", "reduction"),
        list(itertools.product([False, True], [0.0, 0.1, 1.0], [-100, 2], REDUCTIONS)),
    )
    def test_grid(self, rng, frozen, dtype, weighted, label_smoothing, ignore_index, reduction, n_classes):
        shape = (9, n_classes, 3)
        x, t = frozen(make_logits(rng, shape, dtype)), make_targets(rng, shape)
        t[0, 0], t[3, 1] = ignore_index, ignore_index
        weight = frozen(rng.random(n_classes).astype(dtype)) if weighted else None
        options = {
            "weight": weight,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "reduction": reduction,
        }
        assert_close(cross_entropy(x, frozen(t), **options), references.cross_entropy(x, t, **options), dtype)

    def test_a_lone_row_is_divided_by_its_weight_too(self, rng, dtype):
        x = make_logits(rng, (5,), dtype)
        weight = np.array([1.0, 2.0, 3.0, 4.0, 5.0], dtype)
        for label_smoothing in (0.0, 0.25):
            options = {"weight": weight, "label_smoothing": label_smoothing}
            assert_close(cross_entropy(x, 3, **options), references.cross_entropy(x, 3, **options), dtype)

    def test_smoothing_of_an_outlying_target(self, frozen, dtype):
        """The loss of the target and its distance to the mean of the classes are large and cancel."""
        for n_classes in (3, 30, 300):
            x = np.zeros((9, n_classes), dtype)
            x[:, 0] = -np.linspace(60, 87, 9)
            x[:, 1:] += np.linspace(-0.5, 0.5, n_classes - 1)
            t = np.zeros(9, np.int64)
            options = {"label_smoothing": 1.0, "reduction": "none"}
            assert_close(cross_entropy(frozen(x), t, **options), references.cross_entropy(x, t, **options), dtype)

    def test_negative_weights(self, rng, frozen, dtype):
        x, t = frozen(make_logits(rng, (9, 5), dtype)), make_targets(rng, (9, 5))
        weight = np.array([1.0, -2.0, 3.0, -0.5, 1.0], dtype)
        options = {"weight": weight, "reduction": "none"}
        assert_close(cross_entropy(x, t, **options), references.cross_entropy(x, t, **options), dtype)


class TestIgnoreIndex:
    BAD_ROWS = ([NAN, NAN, NAN], [INF, 0.0, 0.0], [-INF, -INF, -INF], [NAN, -INF, INF])

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
    @pytest.mark.parametrize("n_rows", [2, 12])
    @pytest.mark.parametrize("row", BAD_ROWS, ids=["nan", "inf", "minus_inf", "mixed"])
    def test_an_ignored_row_is_exactly_zero_whatever_it_holds(self, row, n_rows, label_smoothing):
        x = np.array([row] * n_rows, np.float32)
        x[1] = [0.0, 1.0, 2.0]
        t = np.full(n_rows, -100)
        t[1] = 2
        got = cross_entropy(x, t, label_smoothing=label_smoothing, reduction="none")
        assert np.delete(got, 1).tobytes() == bytes(4 * (n_rows - 1)), "+0.0, not -0.0"
        kept = references.cross_entropy(x[1], 2, label_smoothing=label_smoothing)
        for reduction in ("sum", "mean"):
            value = cross_entropy(x, t, label_smoothing=label_smoothing, reduction=reduction)
            assert float(value) == pytest.approx(kept, rel=2e-6)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
    @pytest.mark.parametrize("n_rows", [2, 12])
    def test_weights_that_are_no_numbers_do_not_reach_ignored_rows(self, n_rows, label_smoothing):
        x = np.ones((n_rows, 3), np.float32)
        options = {"weight": [INF, NAN, 1.0], "label_smoothing": label_smoothing, "reduction": "none"}
        assert cross_entropy(x, np.full(n_rows, -100), **options).tobytes() == bytes(4 * n_rows)

    @pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]], ids=["plain", "weighted"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("n_rows", [0, 1, 4, 20])
    def test_mean_of_nothing_is_nan_and_sum_zero(self, n_rows, label_smoothing, weight):
        x, t = np.ones((n_rows, 3), np.float32), np.full(n_rows, -100)
        mean = cross_entropy(x, t, weight=weight, label_smoothing=label_smoothing)
        assert isinstance(mean, np.float32)
        assert np.isnan(mean)
        total = cross_entropy(x, t, weight=weight, label_smoothing=label_smoothing, reduction="sum")
        assert isinstance(total, np.float32)
        assert total == 0
        assert cross_entropy(x, t, reduction="none").tolist() == [0.0] * n_rows

    @pytest.mark.parametrize(
        ("dtype", "ignore_index"),
        [
            (np.int8, -100),
            (np.int8, 127),
            (np.uint8, 255),
            (np.uint16, 65535),
            (np.uint32, 2**32 - 1),
            (np.uint64, 2**63 + 5),
            (np.uint64, 2**64 - 1),
            (np.int64, -(2**63)),
            (np.int64, 2**63 - 1),
            (np.int16, 0),
            (np.uint64, 1),
        ],
    )
    def test_borders_of_the_dtype(self, rng, dtype, ignore_index):
        x = make_logits(rng, (9, 4), np.float32)
        t = np.array([2, 3, 2, 2, 3, 3, 2, 3, 2], dtype)
        expected = cross_entropy(x, t, reduction="none")
        expected[[1, 8]] = 0
        t[[1, 8]] = ignore_index
        np.testing.assert_array_equal(cross_entropy(x, t, ignore_index=ignore_index, reduction="none"), expected)
        np.testing.assert_array_equal(
            cross_entropy(x, t.astype(t.dtype.newbyteorder()), ignore_index=ignore_index, reduction="none"), expected
        )

    @pytest.mark.parametrize("ignore_index", [-1, 256, 2**70, -(2**70), -256, 2**64, 2**32])
    def test_outside_the_dtype_of_the_target_nothing_is_ignored(self, rng, ignore_index):
        """Compared as numbers: 256 is not the 0 that its low byte would be."""
        x, t = make_logits(rng, (9, 4), np.float32), np.array([0, 1, 2, 3, 0, 1, 2, 3, 0], np.uint8)
        expected = cross_entropy(x, t, reduction="none")
        assert expected.min() > 0
        np.testing.assert_array_equal(cross_entropy(x, t, ignore_index=ignore_index, reduction="none"), expected)

    def test_bool_targets(self, rng):
        x, t = make_logits(rng, (4, 2), np.float32), np.array([True, False, True, False])
        expected = cross_entropy(x, t, reduction="none")
        expected[[0, 2]] = 0
        np.testing.assert_array_equal(cross_entropy(x, t, ignore_index=1, reduction="none"), expected)
        np.testing.assert_array_equal(cross_entropy(x, t, ignore_index=True, reduction="none"), expected)
        assert (cross_entropy(x, t, ignore_index=2, reduction="none") > 0).all()

    def test_numpy_integers_and_bools_are_integers(self, rng):
        x, t = make_logits(rng, (4, 3), np.float32), np.array([0, 1, 2, 1])
        expected = cross_entropy(x, t, ignore_index=1)
        assert cross_entropy(x, t, ignore_index=np.uint8(1)) == expected
        assert cross_entropy(x, t, ignore_index=np.array(1)) == expected

    def test_a_class_ignored_as_target_stays_in_the_denominator(self):
        x = np.zeros((2, 3), np.float32)
        got = cross_entropy(x, [0, 1], ignore_index=1, reduction="none")
        np.testing.assert_allclose(got, [math.log(3), 0.0], rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_rows", [1, 9], ids=["in_rows", "in_planes"])
@pytest.mark.parametrize("n_classes", [3, 30])
class TestSpecialValues:
    """Each row alone and among equals, with few classes and many: four different paths through the kernels."""

    def losses(self, dtype, n_rows, n_classes, row, target, **options):
        padding = [-INF] * (n_classes - 3) if options.pop("padded", True) else []
        x = np.array([[*row, *padding]] * n_rows, dtype)
        return cross_entropy(x, np.full(n_rows, target), reduction="none", **options).astype(float)

    @pytest.mark.parametrize(
        ("row", "target", "expected"),
        [
            ([0.0, -INF, 0.0], 0, math.log(2)),
            ([0.0, -INF, -INF], 0, 0.0),
            ([0.0, -INF, 0.0], 1, INF),
            ([-INF, -INF, -INF], 0, NAN),
            ([INF, 0.0, 0.0], 0, NAN),
            ([INF, 0.0, 0.0], 1, NAN),
            ([INF, -INF, 0.0], 1, NAN),
            ([NAN, 0.0, 0.0], 0, NAN),
            ([NAN, 0.0, 0.0], 1, NAN),
            ([NAN, 0.0, -INF], 2, NAN),
            ([-1e4, 1e4, 0.0], 0, 2e4),
            ([1e30, -1e30, 0.0], 1, 2e30),
            ([1e30, -1e30, 0.0], 0, 0.0),
            ([0.0, -23.0, -INF], 0, math.log1p(math.exp(-23))),
            ([0.0, -80.0, -INF], 0, math.exp(-80)),
            ([0.0, 88.0, -INF], 0, 88.0),
            ([0.0, 89.5, -INF], 0, 89.5),
        ],
    )
    def test_without_smoothing(self, dtype, n_rows, n_classes, row, target, expected):
        got = self.losses(dtype, n_rows, n_classes, row, target)
        np.testing.assert_allclose(got, [expected] * n_rows, rtol=1e-6 if dtype is np.float32 else 1e-14)

    @pytest.mark.parametrize(
        ("row", "target", "weight", "eps", "expected"),
        [
            ([0.0, -INF, 0.0], 0, None, 0.1, INF),
            ([0.0, -INF, 0.0], 0, [1.0, 0.0, 1.0], 0.1, NAN),
            ([0.0, -INF, 0.0], 0, [1.0, -1.0, 1.0], 0.1, -INF),
            ([0.0, -INF, 0.0], 1, None, 0.1, INF),
            ([0.0, -INF, 0.0], 1, None, 1.0, NAN),
            ([0.0, -INF, 0.0], 0, None, 1.0, INF),
            ([0.0, NAN, 0.0], 0, None, 0.1, NAN),
            ([0.0, INF, 0.0], 0, None, 0.1, NAN),
            ([-INF, -INF, -INF], 0, None, 0.1, NAN),
        ],
    )
    def test_with_smoothing(self, dtype, n_rows, n_classes, row, target, weight, eps, expected):
        if n_classes > 3:
            row = [*row, *[0.0] * (n_classes - 3)]
            if row[:3] == [-INF] * 3:
                row = [-INF] * n_classes
            weight = None if weight is None else [*weight, *[1.0] * (n_classes - 3)]
        got = self.losses(dtype, n_rows, n_classes, row, target, weight=weight, label_smoothing=eps, padded=False)
        np.testing.assert_array_equal(got, [expected] * n_rows)

    @pytest.mark.parametrize(
        ("row", "target", "weight", "expected"),
        [
            ([0.0, -INF, 0.0], 1, [1.0, 0.0, 1.0], NAN),
            ([0.0, 0.0, 0.0], 1, [1.0, INF, 1.0], INF),
            ([0.0, 0.0, 0.0], 1, [1.0, NAN, 1.0], NAN),
            ([0.0, 1.0, 0.0], 1, [NAN, 0.0, INF], 0.0),
            ([0.0, -INF, -INF], 0, [2.0, 1.0, 1.0], 0.0),
        ],
    )
    def test_with_weights(self, dtype, n_rows, n_classes, row, target, weight, expected):
        weight = [*weight, *[1.0] * (n_classes - 3)]
        got = self.losses(dtype, n_rows, n_classes, row, target, weight=weight)
        np.testing.assert_array_equal(got, [expected] * n_rows)

    def test_nan_among_many_rows_stays_in_its_row(self, dtype, n_rows, n_classes):
        x = np.zeros((n_rows + 2, n_classes), dtype)
        x[0, 1] = NAN
        got = cross_entropy(x, np.zeros(n_rows + 2, int), reduction="none")
        assert np.isnan(got[0])
        np.testing.assert_allclose(got[1:], math.log(n_classes), rtol=2e-7)


class TestZeroWeightSums:
    X = np.array([[0.0, 1.0, 2.0], [0.5, 0.0, -1.0]], np.float32)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
    def test_zero_by_zero_is_nan(self, label_smoothing):
        got = cross_entropy(self.X, [0, 0], weight=[0.0, 1.0, 1.0], label_smoothing=label_smoothing)
        assert np.isnan(got)

    def test_smoothing_of_one_has_its_own_quotient(self):
        """(1 - eps) * NaN is NaN even with eps = 1."""
        assert np.isnan(cross_entropy(self.X, [0, 0], weight=[0.0, 1.0, 1.0], label_smoothing=1.0))

    @pytest.mark.parametrize(("weight", "sign"), [([1.0, -1.0, 0.0], 1), ([-1.0, 1.0, 0.0], -1)])
    def test_weights_that_cancel_give_an_infinity(self, weight, sign):
        got = cross_entropy(self.X, [0, 1], weight=weight)
        total = references.cross_entropy(self.X, [0, 1], weight=weight, reduction="sum")
        assert math.copysign(1, total) == sign
        assert got == sign * INF

    def test_the_sum_is_as_ever(self):
        got = cross_entropy(self.X, [0, 0], weight=[0.0, 1.0, 1.0], label_smoothing=0.3, reduction="sum")
        expected = references.cross_entropy(
            self.X, [0, 0], weight=[0.0, 1.0, 1.0], label_smoothing=0.3, reduction="sum"
        )
        assert got == pytest.approx(expected, rel=2e-6)


class TestReductions:
    def test_sum_and_mean_are_rounded_once(self, rng):
        x, t = make_logits(rng, (5000, 12), np.float32), make_targets(rng, (5000, 12))
        losses = cross_entropy(x, t, reduction="none").astype(float)
        assert cross_entropy(x, t, reduction="sum") == np.float32(math.fsum(losses))
        assert cross_entropy(x, t) == np.float32(math.fsum(losses) / 5000)

    def test_a_sum_beyond_float32_is_infinite_and_its_mean_is_not(self):
        x = np.array([[3e38, 0.0]] * 4, np.float32)
        t = np.ones(4, int)
        assert cross_entropy(x, t, reduction="sum") == INF
        assert cross_entropy(x, t) == np.float32(3e38)

    def test_the_result_is_new_memory(self):
        x, t = np.zeros((3, 2)), np.zeros(3, int)
        first = cross_entropy(x, t, reduction="none")
        first[:] = -1
        assert (cross_entropy(x, t, reduction="none") > 0).all()

    @pytest.mark.parametrize("size_average", [None, True, False])
    @pytest.mark.parametrize("reduce", [None, True, False])
    def test_the_deprecated_pair(self, size_average, reduce):
        x, t = np.array([[0.0, 1.0], [2.0, 0.0]]), [0, 1]
        if size_average is None and reduce is None:
            reduction = "sum"
            got = cross_entropy(x, t, None, size_average, -100, reduce, "sum")
        else:
            reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
            with pytest.warns(UserWarning, match=f"use reduction='{reduction}' instead") as caught:
                got = cross_entropy(x, t, size_average=size_average, reduce=reduce, reduction="sum")
            assert caught[0].filename == __file__
        np.testing.assert_array_equal(got, cross_entropy(x, t, reduction=reduction))
