"""Malformed calls: the exception's type, and a message that names the argument, what came and what was expected."""

import datetime
import re

import numpy as np
import pytest

import fastloss
from fastloss import cross_entropy, kl_div, log_softmax, logsumexp, nll_loss, softmax

X = np.zeros((4, 3), np.float32)
T = np.array([0, 1, 2, 0])
X1 = np.zeros(3)

LOSSES = pytest.mark.parametrize("loss", [cross_entropy, nll_loss], ids=["cross_entropy", "nll_loss"])

# One call per function with the array under test as input, and where there is one as target.
INPUT_CALLS = {
    "cross_entropy": lambda a: cross_entropy(a, T),
    "nll_loss": lambda a: nll_loss(a, T),
    "kl_div": lambda a: kl_div(a, X, reduction="sum"),
    "softmax": softmax,
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
}
TARGET_CALLS = {
    "cross_entropy": lambda a: cross_entropy(X, a),
    "nll_loss": lambda a: nll_loss(X, a),
    "kl_div": lambda a: kl_div(X, a, reduction="sum"),
}
CALLS = [
    pytest.param(call, name, id=f"{function}-{name}")
    for name, calls in (("input", INPUT_CALLS), ("target", TARGET_CALLS))
    for function, call in calls.items()
]
EVERY_CALL = pytest.mark.parametrize(("call", "name"), CALLS)


class NotAnArray:
    pass


class Broken:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no data today")


@EVERY_CALL
class TestData:
    @pytest.mark.parametrize(
        ("value", "came"),
        [
            (np.zeros((4, 3), np.complex64), "dtype complex64"),
            (np.zeros((4, 3), complex), "dtype complex128"),
            (1j, "dtype complex128"),
            (np.zeros((4, 3), object), "dtype object"),
            (np.zeros((4, 3), "datetime64[s]"), "dtype datetime64"),
            (np.zeros((4, 3), "timedelta64[s]"), "dtype timedelta64"),
            (np.zeros((4, 3), "U5"), "dtype <U5"),
            (np.zeros((4, 3), "S5"), "dtype |S5"),
            (np.zeros((4, 3), [("a", "f4"), ("b", "f4")]), "dtype ["),
            (np.zeros((4, 3), "V4"), "dtype |V4"),
            (np.zeros((4, 3), np.longdouble), "dtype "),
            ("abc", "dtype <U3"),
            ([["a", "b"], ["c", "d"]], "dtype <U1"),
            (b"abc", "dtype |S3"),
            (None, "an object of type NoneType"),
            (NotAnArray(), "an object of type NotAnArray"),
            ({1, 2}, "an object of type set"),
            ([None, 1.0], "dtype object"),
            ([datetime.datetime(2020, 1, 1)], "dtype object"),
        ],
        ids=lambda v: v if isinstance(v, str) else type(v).__name__,
    )
    def test_dtypes_that_are_no_real_numbers(self, call, name, value, came):
        expected = "expected float16, bfloat16, float32, float64, an integer dtype or bool"
        with pytest.raises(TypeError, match=f"^{name}: got {re.escape(came)}.*{expected}"):
            call(value)

    @pytest.mark.parametrize("dtype", ["float8_e4m3b11fnuz", "float8_e5m2", "int4", "int1"])
    def test_dtypes_of_ml_dtypes(self, call, name, dtype):
        """Two of them have the characters of uint64 and float16."""
        dtype = getattr(pytest.importorskip("ml_dtypes"), dtype, "V1")
        with pytest.raises(TypeError, match=f"^{name}: got dtype .*expected float16, bfloat16, float32, float64"):
            call(np.zeros((4, 3), dtype))

    def test_ragged_lists(self, call, name):
        with pytest.raises(ValueError, match=f"^{name}: got an object of type list, expected a rectangular array"):
            call([[1.0, 2.0], [3.0]])

    def test_what_an_object_raises_is_reported(self, call, name):
        message = f"^{name}: got an object of type Broken, expected an array of numbers .*no data today"
        with pytest.raises(TypeError, match=message):
            call(Broken())

    def test_masked_entries(self, call, name):
        masked = np.ma.MaskedArray(np.zeros((4, 3)), mask=False)
        masked[1, 2] = np.ma.masked
        masked[0, 0] = np.ma.masked
        with pytest.raises(ValueError, match=f"^{name}: got a masked array with 2 masked entries, expected an array"):
            call(masked)

    def test_the_masked_constant(self, call, name):
        with pytest.raises(ValueError, match=f"^{name}: got a masked array with 1 masked entries"):
            call(np.ma.masked)

    def test_sparse_matrices(self, call, name):
        sparse = pytest.importorskip("scipy.sparse")
        for matrix in (sparse.csr_matrix(np.eye(4, 3)), sparse.coo_array(np.eye(4, 3))):
            with pytest.raises(TypeError, match=f"^{name}: got an object of type {type(matrix).__name__}, expected"):
                call(matrix)

    def test_tensors_that_need_gradients(self, call, name):
        torch = pytest.importorskip("torch")
        with pytest.raises(TypeError, match=f"^{name}: got an object of type Tensor, expected an array of numbers"):
            call(torch.zeros(4, 3, requires_grad=True))


class TestTargets:
    @LOSSES
    @pytest.mark.parametrize(
        ("shape", "target_shape"),
        [
            ((4, 3), (3,)),
            ((4, 3), (4, 1)),
            ((4, 3), ()),
            ((3,), (1,)),
            ((4, 3, 2), (4, 3)),
            ((4, 3, 2), (2, 4)),
            ((4, 3), (0,)),
        ],
    )
    def test_shapes_that_do_not_fit(self, loss, shape, target_shape):
        expected = shape[:1] * (len(shape) > 1) + shape[2:]
        message = f"target: got shape {target_shape} for input of shape {shape}, expected {expected} (class indices)"
        with pytest.raises(ValueError, match=r"^" + re.escape(message)):
            loss(np.zeros(shape), np.zeros(target_shape, int))

    def test_the_message_offers_probabilities_where_they_are_allowed(self):
        with pytest.raises(ValueError, match=re.escape("(class indices) or (4, 3) (class probabilities)")):
            cross_entropy(X, [0, 1])
        with pytest.raises(ValueError, match=re.escape("expected (4,) (class indices)") + "$"):
            nll_loss(X, [0, 1])

    @LOSSES
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
    def test_floats_where_indices_belong(self, loss, dtype):
        message = f"^target: got dtype {dtype}, expected an integer dtype or bool for class indices"
        with pytest.raises(TypeError, match=message):
            loss(X, T.astype(dtype))

    @LOSSES
    def test_an_empty_list_is_of_floats(self, loss):
        with pytest.raises(TypeError, match=r"^target: got dtype float64, expected an integer dtype"):
            loss(np.zeros((0, 3)), [])

    @pytest.mark.parametrize("dtype", ["int8", "int64", "uint64", "bool"])
    @pytest.mark.parametrize("shape", [(4, 3), (3,), (2, 3, 2), (1,), (0, 3)])
    def test_integers_of_the_shape_of_input(self, dtype, shape):
        message = f"^target: got dtype {dtype} with the shape of input.*expected a floating dtype"
        with pytest.raises(TypeError, match=message):
            cross_entropy(np.zeros(shape), np.zeros(shape, dtype))

    def test_probabilities_are_not_for_nll_loss(self):
        with pytest.raises(
            ValueError, match=r"^target: got shape \(4, 3\) for input of shape \(4, 3\), expected \(4,\)"
        ):
            nll_loss(X, X)

    @pytest.mark.parametrize("ignore_index", [0, 1, 255, 2**64])
    def test_ignore_index_with_probabilities(self, ignore_index):
        message = f"^ignore_index: got {ignore_index} with class probabilities.*expected a negative number"
        with pytest.raises(ValueError, match=message):
            cross_entropy(X, X, ignore_index=ignore_index)
        assert np.isfinite(cross_entropy(X, X + 1, ignore_index=-1))


@LOSSES
class TestTargetsOutOfRange:
    def message(self, value, where, last, ignore_index=-100):
        place = f" at {where}" if where is not None else ""
        return (
            re.escape(f"target: got {value}{place}, expected a class in [0, {last}] or ignore_index={ignore_index}")
            + "$"
        )

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("value", [3, -1, -101, 2**40, -(2**63), 2**63 - 1, 2**32, -(2**32) + 1])
    @pytest.mark.parametrize("n_rows", [4, 12])
    def test_value_and_position(self, loss, value, n_rows, reduction):
        t = np.zeros(n_rows, np.int64)
        t[2] = value
        t[3] = 77
        with pytest.raises(IndexError, match=self.message(value, 2, 2)):
            loss(np.zeros((n_rows, 3), np.float32), t, reduction=reduction)

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            ("int8", 127), ("int8", -128), ("int16", -(2**15)), ("uint8", 255), ("uint16", 65436), ("int32", 2**31 - 1),
            ("uint32", 2**32 - 100), ("uint64", 2**64 - 100), ("uint64", 2**63), ("uint64", 2**64 - 1),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("byte_order", ["=", "S"], ids=["native", "swapped"])
    def test_every_dtype(self, loss, dtype, value, byte_order):
        """Among them the numbers whose bits are those of -100 and -1 in a signed dtype."""
        t = np.array([0, 1, value, 2], np.dtype(dtype).newbyteorder(byte_order))
        with pytest.raises(IndexError, match=self.message(value, 2, 2)):
            loss(X, t)
        with pytest.raises(IndexError, match=self.message(value, 2, 2)):
            loss(X, np.repeat(t, 2)[::2])

    def test_bool(self, loss):
        with pytest.raises(IndexError, match=self.message(1, 1, 0)):
            loss(np.zeros((3, 1)), np.array([False, True, True]))

    def test_a_scalar_target_has_no_position(self, loss):
        with pytest.raises(IndexError, match=self.message(3, None, 2)):
            loss(X1, 3)
        with pytest.raises(IndexError, match=self.message(-1, None, 2)):
            loss(X1, np.int8(-1))

    def test_ignored_targets_are_passed_over(self, loss):
        t = np.array([-100, 5, 9, 0])
        with pytest.raises(IndexError, match=self.message(9, 2, 2, ignore_index=5)):
            loss(X, np.where(t == -100, 0, t), ignore_index=5)
        with pytest.raises(IndexError, match=self.message(-100, 0, 2, ignore_index=5)):
            loss(X, t, ignore_index=5)

    @pytest.mark.parametrize("memory_order", ["C", "F", "channels_last", "reversed", "swapped", "unaligned"])
    def test_the_first_in_c_order_whatever_the_memory_order(self, loss, memory_order):
        x = np.zeros((3, 4, 5, 7), np.float32)
        t = np.zeros((3, 5, 7), np.int32)
        t[2, 0, 0], t[1, 4, 2], t[1, 3, 6] = 6, 5, 4
        if memory_order == "F":
            x, t = np.asfortranarray(x), np.asfortranarray(t)
        elif memory_order == "channels_last":
            x = np.zeros((3, 5, 7, 4), np.float32).transpose(0, 3, 1, 2)
        elif memory_order == "reversed":
            x, t = x[::-1, :, ::-1, ::-1], t[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1]
        elif memory_order == "swapped":
            x, t = x.astype(">f4"), t.astype(">i4")
        elif memory_order == "unaligned":
            records = np.zeros(t.shape, [("flag", "u1"), ("value", "i4")])
            records["value"] = t
            t = records["value"]
        with pytest.raises(IndexError, match=self.message(4, "(1, 3, 6)", 3)):
            loss(x, t)

    def test_far_into_a_large_target(self, loss):
        x, t = np.zeros((300_000, 2), np.float32), np.zeros(300_000, np.int8)
        t[[200_001, 299_999]] = 2, 3
        with pytest.raises(IndexError, match=self.message(2, 200001, 1)):
            loss(x, t)
        with pytest.raises(IndexError, match=self.message(2, 200001, 1)):
            loss(x, np.repeat(t, 2)[::2])

    def test_in_a_later_piece_of_unaligned_data(self, loss):
        x, t = np.zeros((90_000, 3), ">f4"), np.zeros(90_000, np.int16)
        t[[80_000, 89_000]] = -7, 3
        with pytest.raises(IndexError, match=self.message(-7, 80000, 2)):
            loss(x, t)


class TestClasses:
    @LOSSES
    def test_no_class_axis(self, loss):
        with pytest.raises(ValueError, match=r"^input: got a 0-d array, expected shape \(C\), \(N, C\) or"):
            loss(1.0, 0)

    @LOSSES
    @pytest.mark.parametrize(("shape", "axis"), [((0,), 0), ((4, 0), 1), ((0, 0), 1), ((2, 0, 3), 1)])
    def test_no_class(self, loss, shape, axis):
        message = f"input: got shape {shape}, expected at least one class along axis {axis}"
        with pytest.raises(ValueError, match=r"^" + re.escape(message)):
            loss(np.zeros(shape), np.zeros(shape[:1] * (len(shape) > 1) + shape[2:], int))

    def test_no_class_of_probabilities(self):
        with pytest.raises(ValueError, match=r"^input: got shape .*expected at least one class"):
            cross_entropy(np.zeros((2, 0)), np.zeros((2, 0)))


@LOSSES
class TestWeight:
    @pytest.mark.parametrize("shape", [(), (2,), (4,), (3, 1), (1, 3), (0,)])
    def test_shape(self, loss, shape):
        message = f"weight: got shape {shape}, expected (3,): one weight per class"
        with pytest.raises(ValueError, match=r"^" + re.escape(message)):
            loss(X, T, weight=np.ones(shape))

    @pytest.mark.parametrize(
        ("weight", "came"),
        [
            (np.ones(3, complex), "dtype complex128"),
            (np.ones(3, object), "dtype object"),
            (["a", "b", "c"], "dtype <U1"),
            (np.zeros(3, "datetime64[s]"), "dtype datetime64"),
            (NotAnArray(), "an object of type NotAnArray"),
        ],
        ids=["complex", "object", "strings", "datetime", "instance"],
    )
    def test_dtype(self, loss, weight, came):
        with pytest.raises(TypeError, match=f"^weight: got {re.escape(came)}.*, expected a real dtype"):
            loss(X, T, weight=weight)

    def test_ragged_and_masked(self, loss):
        with pytest.raises(ValueError, match=r"^weight: got an object of type list, expected a rectangular array"):
            loss(X, T, weight=[[1.0], [1.0, 2.0], [1.0]])
        with pytest.raises(ValueError, match=r"^weight: got a masked array with 1 masked entries"):
            loss(X, T, weight=np.ma.MaskedArray([1.0, 2.0, 3.0], mask=[0, 0, 1]))


class TestOptions:
    @pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1, -1e-300, float("inf"), np.float64(1.0000001), 2])
    def test_label_smoothing_outside_its_range(self, value):
        message = f"^label_smoothing: got {re.escape(repr(value))}, expected a number in " + re.escape("[0, 1]")
        for target in (T, X):
            with pytest.raises(ValueError, match=message):
                cross_entropy(X, target, label_smoothing=value)

    @pytest.mark.parametrize("value", ["x", "0.1", b"0.1", None, [0.1, 0.2], 1j])
    def test_label_smoothing_that_is_no_number(self, value):
        with pytest.raises(TypeError, match=f"^label_smoothing: got {re.escape(repr(value))}, expected a number in"):
            cross_entropy(X, T, label_smoothing=value)

    @LOSSES
    @pytest.mark.parametrize("value", [1.5, None, "a", 2.0, np.float32(1), [1, 2], np.array([1, 2])])
    def test_ignore_index(self, loss, value):
        with pytest.raises(TypeError, match=f"^ignore_index: got {re.escape(repr(value))}, expected an integer"):
            loss(X, T, ignore_index=value)

    @pytest.mark.parametrize("value", [None, "max", "Mean", "", ["mean"], 0, True, np.array(["mean", "sum"])])
    @pytest.mark.parametrize(
        ("call", "choices"),
        [
            (lambda r: cross_entropy(X, T, reduction=r), "'none', 'mean', 'sum'"),
            (lambda r: nll_loss(X, T, reduction=r), "'none', 'mean', 'sum'"),
            (lambda r: kl_div(X, X, reduction=r), "'none', 'batchmean', 'mean', 'sum'"),
        ],
        ids=["cross_entropy", "nll_loss", "kl_div"],
    )
    def test_reduction(self, call, choices, value):
        with pytest.raises(ValueError, match=f"^reduction: got {re.escape(repr(value))}, expected one of {choices}$"):
            call(value)

    @LOSSES
    def test_batchmean_is_for_kl_div(self, loss):
        with pytest.raises(ValueError, match=r"^reduction: got 'batchmean', expected one of 'none', 'mean', 'sum'$"):
            loss(X, T, reduction="batchmean")

    def test_shapes_that_do_not_broadcast(self):
        message = "target: got shape (3, 4), expected one that broadcasts with input of shape (4, 3)"
        with pytest.raises(ValueError, match=r"^" + re.escape(message)):
            kl_div(X, np.zeros((3, 4)), reduction="sum")


class TestAxes:
    ONE_AXIS = pytest.mark.parametrize("function", [softmax, log_softmax], ids=["softmax", "log_softmax"])
    ALL = pytest.mark.parametrize("function", [softmax, log_softmax, logsumexp], ids=["softmax", "log_softmax", "lse"])

    @ALL
    @pytest.mark.parametrize("axis", [2, -3, 100, -(2**70)])
    def test_out_of_range(self, function, axis):
        message = f"^axis: got {axis} for input with 2 dimensions, expected an integer in " + re.escape("[-2, 1]")
        with pytest.raises(np.exceptions.AxisError, match=message):
            function(X, axis=axis)

    @ALL
    @pytest.mark.parametrize("axis", [1, -2])
    def test_out_of_range_of_a_number(self, function, axis):
        message = f"^axis: got {axis} for input with 0 dimensions, expected an integer in " + re.escape("[-1, 0]")
        with pytest.raises(np.exceptions.AxisError, match=message):
            function(1.0, axis=axis)

    @ALL
    @pytest.mark.parametrize("axis", [1.0, "1", 0.5])
    def test_no_integer(self, function, axis):
        with pytest.raises(TypeError, match=f"^axis: got {re.escape(repr(axis))}, expected an integer"):
            function(X, axis=axis)

    @ONE_AXIS
    @pytest.mark.parametrize("axis", [None, (0, 1), [0]])
    def test_one_axis_is_expected(self, function, axis):
        with pytest.raises(TypeError, match=f"^axis: got {re.escape(repr(axis))}, expected an integer"):
            function(X, axis=axis)

    @ALL
    def test_both_spellings(self, function):
        with pytest.raises(
            TypeError, match=r"^dim: got both axis and dim, which are one argument; expected one of them"
        ):
            function(X, axis=0, dim=0)

    def test_both_spellings_of_keepdims(self):
        with pytest.raises(TypeError, match=r"^keepdim: got both keepdims and keepdim, which are one argument"):
            logsumexp(X, keepdims=True, keepdim=True)

    @pytest.mark.parametrize("axis", [(0, 0), (1, -1), [0, 1, 0]])
    def test_an_axis_twice(self, axis):
        with pytest.raises(ValueError, match=f"^axis: got {re.escape(repr(axis))}, expected no axis twice"):
            logsumexp(X, axis=axis)

    @pytest.mark.parametrize("axis", [{0}, "01", np.array([0, 1])], ids=["set", "string", "array"])
    def test_no_tuple(self, axis):
        with pytest.raises(TypeError, match=r"^axis: got .*expected an integer"):
            logsumexp(X, axis=axis)

    def test_one_wrong_axis_of_several(self):
        with pytest.raises(np.exceptions.AxisError, match=r"^axis: got 2 for input with 2 dimensions"):
            logsumexp(X, axis=(0, 2))
        with pytest.raises(TypeError, match=r"^axis: got 0.5, expected an integer"):
            logsumexp(X, axis=(0, 0.5))


class TestModules:
    @pytest.mark.parametrize("cls", [fastloss.CrossEntropyLoss, fastloss.NLLLoss])
    def test_options_are_checked_when_the_object_is_made(self, cls):
        with pytest.raises(TypeError, match=r"^ignore_index: got 1\.5, expected an integer"):
            cls(ignore_index=1.5)
        with pytest.raises(ValueError, match=r"^reduction: got 'max', expected one of 'none', 'mean', 'sum'"):
            cls(reduction="max")
        with pytest.raises(ValueError, match=r"^weight: got an object of type list, expected a rectangular array"):
            cls(weight=[[1.0], [1.0, 2.0]])
        with pytest.raises(ValueError, match=r"^weight: got shape \(2,\), expected \(3,\)"):
            cls(weight=[1.0, 2.0])(X, T)

    def test_the_others(self):
        with pytest.raises(ValueError, match=r"^label_smoothing: got 2, expected a number in \[0, 1\]"):
            fastloss.CrossEntropyLoss(label_smoothing=2)
        with pytest.raises(
            ValueError, match=r"^reduction: got 'max', expected one of 'none', 'batchmean', 'mean', 'sum'"
        ):
            fastloss.KLDivLoss(reduction="max")
        for cls in (fastloss.Softmax, fastloss.LogSoftmax):
            for dim in (None, 1.0, (0, 1)):
                with pytest.raises(TypeError, match=f"^dim: got {re.escape(repr(dim))}, expected an integer"):
                    cls(dim=dim)


def test_no_result_and_nothing_lost_after_an_error():
    """An error in one call leaves the next one as it was."""
    before = cross_entropy(X, T, reduction="none")
    with pytest.raises(IndexError, match=r"^target: got 9 at 3"):
        cross_entropy(X, [0, 1, 2, 9], reduction="none")
    np.testing.assert_array_equal(cross_entropy(X, T, reduction="none"), before)
