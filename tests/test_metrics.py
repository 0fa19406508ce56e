"""fastloss.metrics against scikit-learn, closed forms and mpmath: values, labels of every kind, errors, warnings."""

import doctest
import inspect
import math
import os
import re
import subprocess
import sys
import warnings

import mpmath
import numpy as np
import pandas as pd
import pytest
import scipy.special
import sklearn.metrics

from fastloss import _labels, metrics
from fastloss.metrics import (
    brier_score_from_logits,
    log_loss,
    log_loss_from_logits,
    perplexity,
    top_k_accuracy_from_logits,
)

FUNCTIONS = [log_loss, log_loss_from_logits, perplexity, brier_score_from_logits, top_k_accuracy_from_logits]
FROM_LOGITS = [log_loss_from_logits, brier_score_from_logits, top_k_accuracy_from_logits]
TOLERANCES = {np.float64: 1e-12, np.float32: 2e-5, np.float16: 5e-3}
INF, NAN = float("inf"), float("nan")

TWO = [[0.3, 0.7], [0.6, 0.4], [0.4, 0.6]]


def as_matrix(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # the class is what is tested
        return np.asmatrix(values)


THREE = [[0.2, 0.7, 0.1], [0.6, 0.2, 0.2], [0.6, 0.1, 0.3]]


def probabilities(rng, n_rows, n_classes, dtype=np.float64):
    p = rng.dirichlet(np.full(n_classes, 0.7), n_rows).astype(dtype)
    return np.clip(p, 0, 1)


def codes_of_every_class(rng, n_rows, n_classes):
    codes = rng.integers(0, n_classes, n_rows)
    codes[:n_classes] = np.arange(n_classes)[:n_rows]
    return rng.permutation(codes)


def softmax(logits):
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=1)


# -------------------------------------------------------------------------------------------------------------- values


class TestDocumentedExamples:
    """What scikit-learn's documentation and tests of log_loss state."""

    def test_of_the_documentation(self):
        loss = log_loss(["spam", "ham", "ham", "spam"], [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]])
        assert loss == pytest.approx(-np.log([0.9, 0.9, 0.8, 0.65]).mean(), rel=1e-14)

    def test_symbols(self):
        y = ["no", "no", "no", "yes", "yes", "yes"]
        p = np.array([[0.5, 0.5], [0.1, 0.9], [0.01, 0.99], [0.9, 0.1], [0.75, 0.25], [0.001, 0.999]])
        expected = -np.log([0.5, 0.1, 0.01, 0.1, 0.25, 0.999]).mean()
        assert log_loss(y, p) == pytest.approx(expected, rel=1e-14)

    def test_mean_and_sum(self):
        expected = -np.log([0.7, 0.6, 0.3]).mean()
        assert log_loss([1, 0, 2], THREE) == pytest.approx(expected, rel=1e-14)
        assert log_loss([1, 0, 2] * 2, THREE * 2, normalize=False) == pytest.approx(6 * expected, rel=1e-14)

    def test_labels_name_classes_that_do_not_occur(self):
        assert log_loss([2, 2], [[0.1, 0.9]] * 2, labels=[1, 2]) == pytest.approx(-np.log(0.9), rel=1e-14)
        p = [[0.7, 0.1, 0.2], [0.2, 0.7, 0.1], [0.1, 0.7, 0.2]]
        assert log_loss([1, 2, 2], p, labels=[1, 2, 3]) == pytest.approx(-np.log(0.7), rel=1e-14)

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    def test_clipping_by_the_epsilon_of_the_dtype(self, dtype):
        epsilon = float(np.finfo(dtype).eps)
        assert log_loss(np.array([0, 1], dtype), np.array([1, 0], dtype)) == pytest.approx(-np.log(epsilon), rel=1e-14)
        assert log_loss([0, 1], np.array([0, 1], dtype)) == pytest.approx(-np.log1p(-epsilon), rel=1e-14)

    @pytest.mark.parametrize("p", [[0, 1, 0], [[1, 0], [0, 1], [1, 0]]])
    def test_integers_become_float64(self, p):
        assert log_loss([0, 1, 0], p) == pytest.approx(np.finfo(float).eps, rel=1e-14)

    def test_one_dimension_is_the_greater_label(self):
        p = np.array([0.7, 0.2])
        for y in (["a", "b"], [0, 1], [-1, 1], [False, True], [3.0, 8.0]):
            for column in (p, p[:, None], p.tolist()):
                assert log_loss(y, column) == pytest.approx(-np.log([0.3, 0.2]).mean(), rel=1e-14)

    def test_a_single_row(self):
        assert log_loss([1], [0.4], labels=[0, 1]) == pytest.approx(-np.log(0.4), rel=1e-14)

    def test_the_result_is_a_python_float(self):
        for dtype in (np.float64, np.float32, np.float16):
            assert type(log_loss([0, 1, 0], np.array(TWO, dtype))) is float
        assert type(log_loss([0, 1, 0], TWO, normalize=np.bool_(False))) is float
        assert type(log_loss_from_logits([0, 1], np.zeros((2, 2), np.float32))) is float
        assert type(brier_score_from_logits([0, 1], np.zeros((2, 2), np.float32))) is float
        assert type(top_k_accuracy_from_logits([0, 1], np.zeros((2, 2), np.float32), k=1)) is float
        assert type(perplexity([0, 1], np.zeros((2, 2), np.float32))) is float


LABELS = {
    "0 to C-1": lambda codes: codes,
    "list": lambda codes: codes.tolist(),
    "int8": lambda codes: codes.astype(np.int8),
    "uint16": lambda codes: codes.astype(np.uint16),
    "big-endian": lambda codes: codes.astype(">i4"),
    "from 1 on": lambda codes: codes + 1,
    "negative": lambda codes: 2 * codes - 7,
    "spread": lambda codes: (codes - 3) * 10**15,
    "beyond int64": lambda codes: codes.astype(np.uint64) + np.uint64(2**63 - 2),
    "floats": lambda codes: codes.astype(np.float32) * 2,
    "strings": lambda codes: np.array([f"class {'x' * (i % 3)}{i}" for i in codes]),
    "big-endian strings": lambda codes: np.array([f"{i}" for i in codes]).astype(">U7"),
    "list of strings": lambda codes: [f"{i:03d}" for i in codes],
    "objects": lambda codes: np.array([f"ü{i}" for i in codes], object),
    "every other": lambda codes: np.repeat(np.array([f"{i}" for i in codes]), 2)[::2],
    "dates": lambda codes: np.datetime64("2020-01-01") + codes.astype("m8[D]"),
    "series": lambda codes: pd.Series(codes, index=codes + 5),
    "series of strings": lambda codes: pd.Series([f"s{i}" for i in codes], index=codes * 2),
    "series of categories": lambda codes: pd.Series([f"s{i}" for i in codes], dtype="category"),
    "nullable series": lambda codes: pd.Series(codes, dtype="Int64"),
    "categories in another order": lambda codes: pd.Series(
        pd.Categorical([f"s{i}" for i in codes], [f"s{i}" for i in range(20)][::-1], ordered=True)
    ),
    "index": lambda codes: pd.Index([f"s{i}" for i in codes]),
    "arrow strings": lambda codes: pd.Series([f"s{i}" for i in codes], dtype="string"),
    "range of floats": lambda codes: np.where(codes == 0, -0.0, codes),
    "half floats": lambda codes: codes.astype(np.float16),
    "tuple": lambda codes: tuple(codes.tolist()),
    "list of NumPy's": lambda codes: list(codes.astype(np.int8)),
    "empty string": lambda codes: np.array(["" if i == 0 else f"c{i}" for i in codes]),
    "column": lambda codes: codes[:, None],
    "frame": lambda codes: pd.DataFrame({"label": [f"{i}" for i in codes]}),
}


class OnlyAnArray:
    """What has a length, a shape and ``__array__``, and nothing else."""

    def __init__(self, array):
        self.shape, self._array = array.shape, array

    def __len__(self):
        return len(self._array)

    def __array__(self, dtype=None, copy=None):
        return self._array.astype(dtype or self._array.dtype)


def one_changed(value):
    def change(array):
        array = np.array(array, np.float64)
        array.reshape(-1)[len(array) // 2] = value
        return array

    return change


SCORES = {
    "float64": lambda p: p,
    "float32": lambda p: p.astype(np.float32),
    "big-endian": lambda p: p.astype(">f4"),
    "fortran": np.asfortranarray,
    "strided": lambda p: np.repeat(p, 2, axis=0)[::2],
    "list": lambda p: p.tolist(),
    "text": lambda p: p.astype(str),
    "objects": lambda p: p.astype(object),
    "integers": lambda p: np.rint(p).astype(int),
    "bool": lambda p: p > 0.5,
    "pandas": lambda p: pd.Series(p) if p.ndim == 1 else pd.DataFrame(p),
    "pandas, nullable": lambda p: pd.Series(p, dtype="Float64") if p.ndim == 1 else pd.DataFrame(p).astype("Float32"),
    "array": OnlyAnArray,
    "not normalised": lambda p: p * 0.9,
    "nearly normalised": lambda p: p * (1 - 1e-9),
    "a column more": lambda p: np.column_stack([p, np.zeros(len(p))]),
    "a row less": lambda p: p[:-1],
    "too large": one_changed(1.5),
    "negative": one_changed(-1e-9),
    "NaN": one_changed(NAN),
    "infinite": one_changed(INF),
    "complex": lambda p: p.astype(complex),
    "cube": lambda p: p.reshape(len(p), -1, 1),
}
WEIGHTS = {
    "float64": lambda w: w,
    "float32": lambda w: w.astype(np.float32),
    "integers": lambda w: np.rint(3 * w).astype(int),
    "bool": lambda w: w > 0.3,
    "list": lambda w: w.tolist(),
    "pandas": lambda w: pd.Series(w, index=np.arange(len(w))[::-1]),
    "nullable": lambda w: pd.Series(w, dtype="Float64"),
    "negative": lambda w: w - 0.4,
    "huge": lambda w: w * 1e300,
    "zero": lambda w: w * 0,
    "NaN": one_changed(NAN),
    "infinite": one_changed(INF),
    "a row less": lambda w: w[:-1],
    "column": lambda w: w[:, None],
    "scalar": lambda w: 2.0,
}


def drawn(rng, table, plain=0.0):
    """An entry of a table, the first one with a probability of its own."""
    names = list(table)
    return table[names[0] if rng.random() < plain else names[rng.integers(len(names))]]


def outcome(function, *arguments, **options):
    """The value, the exception, and the warnings as their classes and texts."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            value, error = function(*arguments, **options), None
        except Exception as raised:
            value, error = None, raised
    return value, error, sorted((w.category.__name__, str(w.message)) for w in record)


class TestEqualsScikitLearn:
    @pytest.mark.parametrize("kind", LABELS)
    @pytest.mark.parametrize(("n_rows", "n_classes"), [(2, 2), (9, 3), (30, 7), (100, 17)])
    def test_labels(self, rng, serial, kind, n_rows, n_classes):
        y = LABELS[kind](codes_of_every_class(rng, n_rows, n_classes))
        p = probabilities(rng, n_rows, n_classes)
        weights = rng.random(n_rows)
        assert log_loss(y, p) == pytest.approx(sklearn.metrics.log_loss(y, p), rel=1e-12)
        expected = sklearn.metrics.log_loss(y, p, sample_weight=weights, normalize=False)
        assert log_loss(y, p, sample_weight=weights, normalize=False) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: d.__name__)
    @pytest.mark.parametrize("n_classes", [2, 3, 7, 8, 17, 100, 1000])
    @pytest.mark.parametrize("n_rows", [1, 2, 17, 300])
    def test_shapes_and_dtypes(self, rng, n_rows, n_classes, dtype):
        p = probabilities(rng, n_rows, n_classes, dtype)
        y = rng.integers(0, n_classes, n_rows)
        names = np.array([f"{c:05d}" for c in range(n_classes)])
        for weights in (None, rng.random(n_rows), rng.integers(0, 3, n_rows) + (np.arange(n_rows) == 0)):
            for normalize in (True, False):
                options = {"sample_weight": weights, "normalize": normalize}
                expected = sklearn.metrics.log_loss(y, p, labels=np.arange(n_classes), **options)
                close = pytest.approx(expected, rel=TOLERANCES[dtype])
                assert log_loss(y, p, labels=np.arange(n_classes), **options) == close
                assert log_loss(names[y], p, labels=names, **options) == close

    @pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: d.__name__)
    def test_one_dimension(self, rng, dtype):
        p = np.concatenate([rng.random(50), 10.0 ** -rng.uniform(0, 9, 50), 1 - 10.0 ** -rng.uniform(0, 9, 50)])
        p = np.append(p, [0, 1, 0, 1]).astype(dtype)
        y = np.append(rng.integers(0, 2, 150), [0, 0, 1, 1])
        for i in range(len(p)):  # row by row, so that no loss hides behind a larger one
            expected = sklearn.metrics.log_loss(y[i : i + 1], p[i : i + 1], labels=[0, 1])
            assert log_loss(y[i : i + 1], p[i : i + 1], labels=[0, 1]) == pytest.approx(expected, rel=TOLERANCES[dtype])

    def test_layouts(self, rng, layout):
        for n_classes in (1, 2, 5, 20):
            p = probabilities(rng, 30, max(n_classes, 2))
            y = codes_of_every_class(rng, 30, p.shape[1])
            weights = rng.random(30)
            if n_classes == 1:
                p = p[:, :1].copy()
            expected = sklearn.metrics.log_loss(y, p, sample_weight=weights)
            found = log_loss(layout(y), layout(p), sample_weight=layout(weights))
            assert found == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("n_classes", [2, 10, 40])
    def test_many_rows(self, rng, n_classes):
        """In parallel; and exact sums have the same bits in every order of the rows."""
        p = probabilities(rng, 70_000, n_classes)
        y = codes_of_every_class(rng, 70_000, n_classes)
        weights = rng.random(70_000)
        names = np.array([f"{c:05d}" for c in range(n_classes)])
        found = log_loss(y, p, sample_weight=weights)
        assert found == pytest.approx(sklearn.metrics.log_loss(y, p, sample_weight=weights), rel=1e-12)
        order = rng.permutation(len(y))
        assert log_loss(names[y[order]], np.asfortranarray(p[order]), sample_weight=weights[order]) == found

    def test_frames(self, rng):
        p = probabilities(rng, 20, 3)
        y = codes_of_every_class(rng, 20, 3)
        weights = rng.random(20)
        expected = sklearn.metrics.log_loss(y, p, sample_weight=weights)
        index = rng.permutation(20) * 3
        frame = pd.DataFrame(p, index=index, columns=["a", "b", "c"])
        found = log_loss(pd.Series(y, index=index), frame, sample_weight=pd.Series(weights))
        assert found == pytest.approx(expected, rel=1e-12)
        assert log_loss(y, frame.astype("Float64"), sample_weight=weights) == pytest.approx(expected, rel=1e-12)
        assert log_loss(y.tolist(), p.tolist(), sample_weight=weights.tolist()) == pytest.approx(expected, rel=1e-12)

    def test_polars(self, rng):
        polars = pytest.importorskip("polars")
        p = probabilities(rng, 20, 3)
        y = codes_of_every_class(rng, 20, 3)
        names = [f"c{i}" for i in y]
        expected = sklearn.metrics.log_loss(y, p, sample_weight=y + 1)
        for labels in (y, names, polars.Series(names, dtype=polars.Categorical)):
            found = log_loss(polars.Series(labels), polars.DataFrame(p), sample_weight=polars.Series(y + 1))
            assert found == pytest.approx(expected, rel=1e-12)

    def test_any_combination(self, serial):
        """Labels, containers, weights and options drawn at random, right and wrong: value, warnings, or an error."""
        n_values = n_errors = 0
        for seed in range(600):
            rng = np.random.default_rng(seed)
            n_rows, n_classes = int(rng.choice([1, 2, 3, 9, 30])), int(rng.choice([2, 2, 3, 4, 9]))
            codes = rng.integers(0, n_classes, n_rows)
            codes[:n_classes] = np.arange(n_classes)[:n_rows]
            y, names = drawn(rng, LABELS)(codes), drawn(rng, LABELS)(np.arange(n_classes))
            one_column = n_classes == 2 and rng.random() < 0.5
            p = rng.random(n_rows) if one_column else probabilities(rng, n_rows, n_classes)
            p = drawn(rng, SCORES, 0.5)(p)
            options = {"normalize": bool(rng.random() < 0.7)}
            if rng.random() < 0.5:
                options["sample_weight"] = drawn(rng, WEIGHTS, 0.5)(rng.random(n_rows))
            if rng.random() < 0.3:
                options["labels"] = np.asarray(names).reshape(-1)
                if rng.random() < 0.3:
                    options["labels"] = rng.permutation(options["labels"])
            expected, error, expected_warnings = outcome(sklearn.metrics.log_loss, y, p, **options)
            found, our_error, found_warnings = outcome(log_loss, y, p, **options)
            assert (our_error is None) == (error is None), (seed, error, our_error)
            if error is not None:
                n_errors += 1
                assert isinstance(our_error, ValueError | ZeroDivisionError)
                continue
            n_values += 1
            tolerance = TOLERANCES.get(getattr(np.asarray(p), "dtype", np.dtype(float)).type, 1e-12)
            assert found == pytest.approx(expected, rel=tolerance, abs=tolerance * 1e-3), seed
            assert found_warnings == expected_warnings, seed
        assert n_values > 200
        assert n_errors > 50

    def test_the_precision_that_clips(self):
        """NumPy's native floats are kept, in arrays, series and frames; scikit-learn makes float64 of all else."""
        p = np.array([1, 0], np.float32)
        two = np.stack([1 - p, p], axis=1)
        kept = [p, p[::-1][::-1], pd.Series(p), two, np.asfortranarray(two), pd.DataFrame(two)]
        widened = [
            p.tolist(),
            list(p),
            p.astype(">f4"),
            pd.Series(p, dtype="Float32"),
            OnlyAnArray(p),
            two.astype(">f4"),
        ]
        widened += [pd.DataFrame(two).astype("Float32"), pd.DataFrame(two).astype({0: float}), OnlyAnArray(two)]
        for expected, containers in ((np.finfo(np.float32).eps, kept), (np.finfo(np.float64).eps, widened)):
            for proba in containers:
                for y in ([0, 1], np.eye(2, dtype=int)):
                    assert log_loss(y, proba) == pytest.approx(-np.log(float(expected)), rel=1e-14)
                    assert sklearn.metrics.log_loss(y, proba) == pytest.approx(-np.log(float(expected)), rel=1e-6)

    def test_the_precision_that_clips_polars(self):
        polars = pytest.importorskip("polars")
        p = np.array([[0, 1], [1, 0]], np.float32)
        for proba in (polars.DataFrame(p), polars.Series(p[:, 1])):
            expected = sklearn.metrics.log_loss([0, 1], proba)
            assert log_loss([0, 1], proba) == pytest.approx(expected, rel=1e-12)
            assert expected > 30

    def test_numbers_as_text(self):
        for dtype in ("U", "S", object):
            p = np.array(["0.3", "0.8"]).astype(dtype)
            assert log_loss([0, 1], p) == pytest.approx(sklearn.metrics.log_loss([0, 1], p), rel=1e-12)

    @pytest.mark.parametrize(
        "y",
        [
            [[1, 0, 0], [0, 0, 1], [1, 0, 0]],
            [[1, 1, 0], [0, 1, 1], [0, 0, 0]],
            [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
            [[2, 0, 0], [0, 2, 0], [0, 0, 2]],
            [[2, 1, 1], [1, 2, 1], [2, 1, 1]],
            [[-1, 1, -1], [1, -1, -1], [-1, -1, 1]],
            [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        ],
    )
    def test_indicators(self, rng, y):
        logits = rng.normal(size=(3, 3))
        weights = [0.5, 2, 1]
        for matrix in (y, np.array(y), np.asfortranarray(y)):
            expected = sklearn.metrics.log_loss(matrix, THREE, sample_weight=weights)
            assert log_loss(matrix, THREE, sample_weight=weights) == pytest.approx(expected, rel=1e-12)
            expected = sklearn.metrics.log_loss(matrix, softmax(logits), sample_weight=weights)
            assert log_loss_from_logits(matrix, logits, sample_weight=weights) == pytest.approx(expected, rel=1e-12)
            expected = sklearn.metrics.brier_score_loss(np.array(matrix), softmax(logits), sample_weight=weights)
            assert brier_score_from_logits(matrix, logits, sample_weight=weights) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        "dtype", ["Int64", "UInt8", "boolean", "Float32", "int64[pyarrow]", "bool[pyarrow]", "double[pyarrow]"]
    )
    def test_indicators_in_a_frame(self, rng, dtype):
        if "pyarrow" in dtype:
            pytest.importorskip("pyarrow")
        logits = rng.normal(size=(4, 3))
        p = softmax(logits)
        for rows in ([0, 1, 2, 2], [1, 1, 1, 1]):
            plain = pd.DataFrame(np.eye(3, dtype=int)[rows])
            frame = plain.astype(dtype)
            for y in (frame, plain.astype({0: dtype})):
                expected = sklearn.metrics.log_loss(y, p)
                assert expected == pytest.approx(-np.log(p[range(4), rows]).mean(), rel=1e-12)
                assert log_loss(y, p) == pytest.approx(expected, rel=1e-12)
                assert log_loss_from_logits(y, logits) == pytest.approx(expected, rel=1e-12)
        frame = pd.DataFrame([[1, 1, 0], [0, 1, 1], [0, 0, 0]]).astype(dtype)
        expected = -(np.log(p[0, :2]).sum() + np.log(p[1, 1:]).sum()) / 3
        assert log_loss(frame, p[:3]) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("y", [[[1, 0], [0, 1]], [[1, 1], [0, 1]]])
    def test_indicators_of_two_classes_with_one_column(self, y):
        expected = sklearn.metrics.log_loss(y, [0.3, 0.8])
        assert log_loss(y, [0.3, 0.8]) == pytest.approx(expected, rel=1e-12)
        logits = scipy.special.logit([0.3, 0.8])
        assert log_loss_from_logits(y, logits) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        ("y", "labels"),
        [
            ([0, 1, 0], [0.0, 1.0]),
            ([0.0, 1.0, 0.0], [0, 1]),
            ([True, False, True], [0, 1]),
            ([0, 1, 0], [False, True]),
            (np.array(["b", "a", "b"]), np.array(["a", "b"], object)),
            (pd.Series(["b", "a", "b"]), ["a", "b"]),
            (np.array([5, 3, 5], np.int8), np.array([3, 5])),
            (np.array([1, 0, 1]) + 2**60, np.array([0, 1], np.uint64) + 2**60),
            (np.array([1, 0, 1], np.uint64) + 2**63, [2**63, 2**63 + 1]),
            (np.array([1, 0, 1]), [0.0, 1.0]),
        ],
    )
    def test_labels_of_another_dtype(self, y, labels):
        assert log_loss(y, TWO, labels=labels) == pytest.approx(
            sklearn.metrics.log_loss(y, TWO, labels=labels), rel=1e-12
        )


# -------------------------------------------------------------------------------------------------------------- logits


class TestFromLogits:
    @pytest.mark.parametrize("n_classes", [2, 3, 8, 17, 1000])
    @pytest.mark.parametrize("n_rows", [1, 2, 33])
    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    def test_values_of_the_softmax(self, rng, n_rows, n_classes, dtype):
        logits = (2 * rng.normal(size=(n_rows, n_classes))).astype(dtype)
        p = softmax(logits)
        y = rng.integers(0, n_classes, n_rows)
        names = [f"{c:05d}" for c in range(n_classes)]
        text = [names[c] for c in y]
        tolerance = 1e-12 if dtype == np.float64 else 2e-6
        for weights in (None, rng.random(n_rows)):
            options = {"labels": names, "sample_weight": weights}
            for normalize in (True, False):
                expected = sklearn.metrics.log_loss(text, p, normalize=normalize, **options)
                found = log_loss_from_logits(text, logits, normalize=normalize, **options)
                assert found == pytest.approx(expected, rel=tolerance)
            expected = sklearn.metrics.brier_score_loss(text, p, **options)
            assert brier_score_from_logits(text, logits, **options) == pytest.approx(expected, rel=tolerance)
            log_loss_of_codes = sklearn.metrics.log_loss(y, p, labels=range(n_classes), sample_weight=weights)
            found = perplexity(y, logits, sample_weight=weights)
            assert found == pytest.approx(np.exp(log_loss_of_codes), rel=10 * tolerance)
            for k in range(1, min(n_classes, 4)) if n_classes > 2 else ():
                for normalize in (True, False):
                    expected = sklearn.metrics.top_k_accuracy_score(text, p, k=k, normalize=normalize, **options)
                    found = top_k_accuracy_from_logits(text, logits, k=k, normalize=normalize, **options)
                    assert found == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("n_rows", [2, 9, 200])
    def test_one_column(self, rng, n_rows):
        z = 3 * rng.normal(size=n_rows)
        p = scipy.special.expit(z)
        y = np.where(codes_of_every_class(rng, n_rows, 2), "yes", "no")
        weights = rng.random(n_rows)
        for logits in (z, z[:, None], z.tolist(), pd.Series(z)):
            expected = sklearn.metrics.log_loss(y, p, sample_weight=weights)
            assert log_loss_from_logits(y, logits, sample_weight=weights) == pytest.approx(expected, rel=1e-12)
            expected = sklearn.metrics.brier_score_loss(y, p, sample_weight=weights, pos_label="yes")
            assert brier_score_from_logits(y, logits, sample_weight=weights) == pytest.approx(expected, rel=1e-12)
            expected = sklearn.metrics.top_k_accuracy_score(y, p, k=1, sample_weight=weights)
            assert top_k_accuracy_from_logits(y, logits, k=1, sample_weight=weights) == pytest.approx(expected)

    def test_layouts(self, rng, layout):
        for n_classes in (1, 2, 5, 20):
            logits = rng.normal(size=(30, n_classes))
            both = np.concatenate([np.zeros_like(logits), logits], axis=1) if n_classes == 1 else logits
            y = codes_of_every_class(rng, 30, both.shape[1])
            found = log_loss_from_logits(layout(y), layout(logits))
            assert found == pytest.approx(sklearn.metrics.log_loss(y, softmax(both)), rel=1e-12)
            found = brier_score_from_logits(layout(y), layout(logits), scale_by_half=False)
            expected = sklearn.metrics.brier_score_loss(np.eye(both.shape[1], dtype=int)[y], softmax(both))
            assert found == pytest.approx(expected * (2 if both.shape[1] == 2 else 1), rel=1e-12)
            found = top_k_accuracy_from_logits(layout(y), layout(logits), k=1)
            assert found == pytest.approx((softmax(both).argmax(axis=1) == y).mean(), rel=1e-12)

    @pytest.mark.parametrize("n_classes", [1, 10])
    def test_many_rows(self, rng, n_classes):
        """In parallel and in pieces; the same bits in every order."""
        logits = rng.normal(size=(200_000, n_classes))
        both = np.concatenate([np.zeros_like(logits), logits], axis=1) if n_classes == 1 else logits
        y = codes_of_every_class(rng, len(logits), both.shape[1])
        p, order = softmax(both), rng.permutation(len(y))
        expected = {
            log_loss_from_logits: sklearn.metrics.log_loss(y, p),
            brier_score_from_logits: sklearn.metrics.brier_score_loss(np.eye(both.shape[1], dtype=int)[y], p),
            lambda y, x: top_k_accuracy_from_logits(y, x, k=1): (p.argmax(axis=1) == y).mean(),
        }
        for function, value in expected.items():
            found = function(y, logits)
            assert found == pytest.approx(value, rel=1e-12)
            assert function(y[order], np.asfortranarray(logits[order])) == found

    def test_integers_and_bfloat16(self):
        logits = np.array([[1, 2, 0], [0, 4, 1], [3, 1, 0]])
        y = [0, 1, 2]
        p = softmax(logits)
        for dtype in (np.int8, np.uint64, pytest.importorskip("ml_dtypes").bfloat16):
            x = logits.astype(dtype)
            assert log_loss_from_logits(y, x) == pytest.approx(sklearn.metrics.log_loss(y, p), rel=1e-6)
            tolerance = 1e-12 if dtype in (np.int8, np.uint64) else 2e-6
            assert brier_score_from_logits(y, x) == pytest.approx(sklearn.metrics.brier_score_loss(y, p), rel=tolerance)
            assert top_k_accuracy_from_logits(y, x, k=2) == pytest.approx(2 / 3)

    @pytest.mark.parametrize("gap", [1e-3, 1.0, 30.0, 45.0, 300.0, 700.0])
    def test_digits_where_clipping_would_cap_the_loss(self, gap):
        """Two classes, right by `gap` and wrong by `gap`: log(1 + exp(-gap)) and gap more."""
        with mpmath.workdps(60):
            small = mpmath.log1p(mpmath.exp(-mpmath.mpf(gap)))
            wrong = 1 / (1 + mpmath.exp(-mpmath.mpf(gap)))
            right, large, tiny, great = map(float, (small, small + gap, (1 - wrong) ** 2, wrong**2))
        for logits in ([[0.0, gap]], [gap]):
            assert log_loss_from_logits([1], logits, labels=[0, 1]) == pytest.approx(right, rel=1e-14)
            assert log_loss_from_logits([0], logits, labels=[0, 1]) == pytest.approx(large, rel=1e-14)
            # (exp(-gap) is off by its argument's rounding, gap * 2**-53)
            assert brier_score_from_logits([1], logits, labels=[0, 1]) == pytest.approx(tiny, rel=1e-13)
            assert brier_score_from_logits([0], logits, labels=[0, 1]) == pytest.approx(great, rel=1e-13)

    def test_float32_keeps_small_losses(self):
        logits = np.array([[0, 25], [0, 30]], np.float32)
        expected = np.log1p(np.exp([-25.0, -30.0])).mean()
        assert log_loss_from_logits([1, 1], logits, labels=[0, 1]) == pytest.approx(expected, rel=2e-6)

    @pytest.mark.parametrize("n_classes", [2, 5, 47, 48, 100, 3000])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_brier_scores_of_right_and_wrong_rows(self, rng, dtype, n_classes):
        """Row by row, from scores of 1e-300 to those of 2, against float64 arithmetic of the exact quotient."""
        x = (3 * rng.normal(size=(60, n_classes))).astype(dtype)
        y = rng.integers(0, n_classes, 60)
        x[np.arange(60), y] += np.linspace(-400, 345, 60).astype(dtype)
        names = np.arange(n_classes)
        wide = x.astype(np.longdouble)
        odds = np.exp(wide - wide[np.arange(60), y][:, None])
        odds[np.arange(60), y] = 0
        expected = (odds.sum(axis=1) ** 2 + (odds**2).sum(axis=1)) / (1 + odds.sum(axis=1)) ** 2
        bits = {}
        for order in "CF":
            for i in range(60):
                row = np.array(x[i : i + 1], order=order)
                found = brier_score_from_logits(y[i : i + 1], row, labels=names, scale_by_half=False)
                assert found == pytest.approx(float(expected[i]), rel=2e-6 if dtype == np.float32 else 1e-13), i
                bits.setdefault(i, found)
                assert found == bits[i]
            total = brier_score_from_logits(y, np.array(x, order=order), labels=names, scale_by_half=False)
            assert total == math.fsum(bits.values()) / 60

    def test_masked_classes(self):
        logits = [[0.0, 1.0, -INF], [2.0, -INF, 1.0]]
        p = softmax(logits)
        options = {"labels": [0, 1, 2]}
        assert log_loss_from_logits([0, 2], logits, **options) == pytest.approx(-np.log(p[[0, 1], [0, 2]]).mean())
        assert log_loss_from_logits([0, 1], logits, **options) == INF
        expected = sklearn.metrics.brier_score_loss([0, 1], p, **options)
        assert brier_score_from_logits([0, 1], logits, **options) == pytest.approx(expected, rel=1e-12)
        assert perplexity([0, 1], logits) == INF
        # the masked class comes last, after all others
        assert top_k_accuracy_from_logits([2, 1], logits, k=2, **options) == 0
        wide = np.full((1, 21), -INF)
        wide[0, 3] = 0.0
        assert top_k_accuracy_from_logits([20], wide, k=2, labels=range(21)) == 1  # the last of the equal ones
        assert top_k_accuracy_from_logits([19], wide, k=2, labels=range(21)) == 0

    def test_infinite_log_odds(self):
        for z, losses in ((INF, (INF, 0)), (-INF, (0, INF))):
            for y, loss in enumerate(losses):
                assert log_loss_from_logits([y], [z], labels=[0, 1]) == loss
                assert brier_score_from_logits([y], [z], labels=[0, 1]) == (1 if loss else 0)
                assert top_k_accuracy_from_logits([y], [z], k=1, labels=[0, 1]) == (0 if loss else 1)

    def test_a_row_of_weight_zero_counts_nothing(self):
        logits = [[0.0, -INF], [1.0, 1.0]]
        assert log_loss_from_logits([1, 0], logits, sample_weight=[0, 3]) == pytest.approx(np.log(2))
        assert perplexity([1, 0], logits, sample_weight=[0, 3]) == pytest.approx(2)

    def test_of_equal_logits_the_last_comes_first(self):
        logits = np.zeros((5, 5))
        for k in range(1, 5):
            expected = sklearn.metrics.top_k_accuracy_score(range(5), logits, k=k)
            assert top_k_accuracy_from_logits(range(5), logits, k=k) == expected == k / 5
        assert top_k_accuracy_from_logits([0, 1], [0.0, 0.0], k=1) == 0.5  # a logit of 0 is not positive

    @pytest.mark.parametrize("n_classes", [2, 3])
    def test_scale_by_half(self, rng, n_classes):
        logits = rng.normal(size=(12, n_classes))
        y = codes_of_every_class(rng, 12, n_classes)
        for scale in (True, False, "auto"):
            expected = sklearn.metrics.brier_score_loss(y, softmax(logits), scale_by_half=scale)
            assert brier_score_from_logits(y, logits, scale_by_half=scale) == pytest.approx(expected, rel=1e-12)

    def test_every_k_from_the_number_of_classes_on_is_a_hit(self):
        for logits in ([[1.0, 0.0], [1.0, 0.0]], [1.0, -1.0]):
            with pytest.warns(UserWarning, match=re.escape("'k' (2) greater than or equal to 'n_classes' (2)")):
                assert top_k_accuracy_from_logits([0, 1], logits) == 1


class TestPerplexity:
    def test_uniform(self):
        for n_classes in (1, 2, 50257):
            assert perplexity([0, 0], np.zeros((2, n_classes))) == pytest.approx(n_classes, rel=1e-12)

    def test_ignored_rows(self, rng):
        logits = rng.normal(size=(6, 4))
        y = np.array([0, -100, 3, 2, -100, 1])
        kept = y >= 0
        weights = rng.random(6)
        logits[1] = NAN
        for w in (None, weights):
            expected = np.exp(
                sklearn.metrics.log_loss(
                    y[kept], softmax(logits[kept]), labels=range(4), sample_weight=None if w is None else w[kept]
                )
            )
            assert perplexity(y, logits, sample_weight=w) == pytest.approx(expected, rel=1e-12)
        moved = np.where(kept, y, 7)
        assert perplexity(moved, logits, ignore_index=7) == pytest.approx(perplexity(y, logits), rel=1e-15)

    def test_every_shape_of_cross_entropy(self, rng):
        logits = rng.normal(size=(2, 5, 3))
        y, weights = rng.integers(0, 5, (2, 3)), rng.random((2, 3))
        flat = np.moveaxis(logits, 1, 2).reshape(6, 5)
        expected = perplexity(y.reshape(6), flat, sample_weight=weights.reshape(6))
        assert perplexity(y, logits, sample_weight=weights) == pytest.approx(expected, rel=1e-15)
        assert perplexity(1, [0.0, 0.0]) == pytest.approx(2)
        assert perplexity(1, [0.0, 0.0], sample_weight=3.0) == pytest.approx(2)

    def test_of_no_rows_it_is_nan(self):
        assert np.isnan(perplexity(np.zeros(0, int), np.zeros((0, 3))))
        assert np.isnan(perplexity([-100, -100], np.zeros((2, 3))))

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8])
    def test_any_combination(self, dtype):
        """The exponential of scikit-learn's log loss of the softmax of the rows that count, in any shape and layout."""
        n_values = 0
        for seed in range(150):
            rng = np.random.default_rng(seed)
            n_classes = int(rng.choice([2, 3, 8, 17, 60]))
            shape = [(n_classes,), (9, n_classes), (4, n_classes, 3), (2, n_classes, 3, 5)][rng.integers(4)]
            logits = (3 * rng.normal(size=shape)).astype(dtype)
            axis = min(1, len(shape) - 1)
            row_shape = shape[:axis] + shape[axis + 1 :]
            y = rng.integers(0, n_classes, row_shape)
            ignore_index = int(rng.choice([-100, -1, 0, 1, n_classes + 3]))
            y = np.where(rng.random(row_shape) < 0.3, ignore_index, y).astype(rng.choice([np.int64, np.int16, np.int8]))
            weights = None
            if rng.random() < 0.6:
                weights = rng.choice([0.0, 0.5, 1.0, 3.25], row_shape) if rng.random() < 0.5 else rng.random(row_shape)
            found, error, _ = outcome(perplexity, y, logits, sample_weight=weights, ignore_index=ignore_index)
            kept = (y != ignore_index).reshape(-1)
            rows = np.moveaxis(logits.astype(np.float64), axis, -1).reshape(-1, n_classes)[kept]
            kept_weights = None if weights is None else weights.reshape(-1)[kept]
            if weights is not None and not weights.any():
                assert isinstance(error, ValueError)
            elif not kept.any():
                assert np.isnan(found)
            elif weights is not None and not kept_weights.any():
                assert isinstance(error, ZeroDivisionError)
            else:
                expected = sklearn.metrics.log_loss(
                    y.reshape(-1)[kept], softmax(rows), labels=range(n_classes), sample_weight=kept_weights
                )
                assert found == pytest.approx(
                    np.exp(expected), rel=2e-5 if dtype in (np.float32, np.float16) else 1e-12
                )
                n_values += 1
                layouts = [logits[..., ::-1][..., ::-1], np.asfortranarray(logits), logits.tolist()]
                for other in layouts if dtype == np.float64 else layouts[:2]:
                    same = perplexity(y.tolist(), other, sample_weight=weights, ignore_index=ignore_index)
                    assert same == found
        assert n_values > 100

    @pytest.mark.parametrize("ignore_index", [2**63 - 1, 2**63, 2**64, 2**70, -(2**63), -(2**63) - 1, -(2**70)])
    @pytest.mark.parametrize("dtype", "?bBqQ")
    def test_an_ignore_index_that_no_label_can_be(self, dtype, ignore_index):
        logits = np.log([[0.5, 0.5], [0.2, 0.8]])
        found = perplexity(np.array([0, 1], dtype), logits, ignore_index=ignore_index)
        assert found == pytest.approx(1 / np.sqrt(0.5 * 0.8), rel=1e-14)

    def test_bool_that_is_ignored(self):
        logits = np.log([[0.5, 0.5], [0.2, 0.8], [0.75, 0.25]])
        y = np.array([[False, True, False], [True, True, True]])[0, ::-1]
        assert perplexity(y[::-1], logits, ignore_index=1) == pytest.approx(1 / np.sqrt(0.5 * 0.75), rel=1e-14)
        assert perplexity(y[::-1], logits, ignore_index=0) == pytest.approx(1 / 0.8, rel=1e-14)

    def test_overflow_is_inf(self):
        assert perplexity([0], [[0.0, 1000.0]]) == INF

    @pytest.mark.parametrize(
        ("error", "match", "arguments"),
        [
            (ValueError, "y_true: got shape", ([0, 1], [[0.0, 1.0]])),
            (TypeError, "y_true: got dtype float64", ([0.0], [[0.0, 1.0]])),
            (TypeError, "y_true", (["a"], [[0.0, 1.0]])),
            (IndexError, "y_true: got 2 at 1", ([0, 2], [[0.0, 1.0]] * 2)),
            (IndexError, "y_true: got -1 at 0", ([-1, 0], [[0.0, 1.0]] * 2)),
            (ValueError, "logits: got a 0-d array", (0, 1.0)),
            (TypeError, "logits", ([0], [["a", "b"]])),
            (ValueError, "logits: got NaN", ([0], [[NAN, 1.0]])),
            (ValueError, "logits: got NaN, inf", ([0], [[INF, 1.0]])),
        ],
    )
    def test_errors(self, error, match, arguments):
        with pytest.raises(error, match=match):
            perplexity(*arguments)

    def test_errors_of_options(self):
        with pytest.raises(TypeError, match="ignore_index"):
            perplexity([0], [[0.0, 1.0]], ignore_index=0.5)
        with pytest.raises(ValueError, match="sample_weight"):
            perplexity([0], [[0.0, 1.0]], sample_weight=[1, 2])
        with pytest.raises(ZeroDivisionError):
            perplexity([0, 1, -100], [[0.0, 1.0]] * 3, sample_weight=[1, -1, 1])


# ------------------------------------------------------------------------------------------------- errors and warnings


ERRORS = [
    ("one label", "y_true contains only one label (2). Please provide", ([2, 2], [[0.2, 0.8], [0.6, 0.4]]), {}),
    ("lengths", "Found input variables with inconsistent numbers of samples: [3, 2]", ([2, 2], TWO), {}),
    ("lengths of weights", "numbers of samples: [3, 3, 2]", ([0, 1, 0], TWO), {"sample_weight": [1, 2]}),
    ("fewer columns", "contain different number of classes: 3 vs 2", ([1, 0, 2], TWO), {}),
    ("more columns", "contain different number of classes: 2 vs 3", ([1, 0, 1], THREE), {}),
    ("three labels, one column", "different number of classes: 3 vs 2", ([1, 0, 2], [0.1, 0.2, 0.3]), {}),
    ("indicator", "different number of classes: 3 vs 2", (np.eye(3, dtype=int), TWO), {}),
    ("labels and columns", "The number of classes in labels is different", ([0, 1, 0], TWO), {"labels": [0, 1, 2]}),
    (
        "undeclared",
        "y_true contains values {'b'} not belonging to the passed labels ['a', 'c', 'd'].",
        (["a", "b", "c"], THREE),
        {"labels": ["a", "c", "d"]},
    ),
    ("undeclared number", "contains values {7} not belonging", ([0, 1, 7], TWO), {"labels": [0, 1]}),
    ("strings for numbers", "{0, 1} not belonging", ([0, 1, 0], TWO), {"labels": ["0", "1"]}),
    ("one of labels", "needs to contain at least two labels, got [1]", ([1, 1, 1], TWO), {"labels": [1]}),
    ("labels twice", "must be unique", ([0, 1, 0], TWO), {"labels": [0, 1, 1]}),
    ("no labels", "0 samples", ([0, 1, 0], TWO), {"labels": []}),
    ("continuous labels", "Unknown label type", ([0, 1, 0], TWO), {"labels": [0.5, 1]}),
    ("continuous", "Unknown label type", ([0.5, 1, 0], TWO), {}),
    ("NaN label", "contains NaN", ([0, NAN, 1], TWO), {}),
    ("infinite label", "contains infinity", ([0, INF, 1], TWO), {}),
    ("missing label", "contains NaN", (pd.Series([0, 1, None], dtype="Int64"), TWO), {}),
    ("missing bool", "Input y_true contains NaN", (pd.Series([False, True, None], dtype="boolean"), TWO), {}),
    ("missing string", "Unknown label type", (pd.Series(["a", "b", None]), TWO), {}),
    ("objects", "Unknown label type", (np.array([0, 1, 0], object), TWO), {}),
    ("mix", "Mix of label input types", (["a", 1, "a"], TWO), {}),
    ("mix, number first", "Mix of label input types (string and number) in y_true: got 1", ([1, "a", "a"], TWO), {}),
    ("bytes", "bytes is not supported", ([b"a", b"b", b"a"], TWO), {}),
    ("complex labels", "omplex data not supported", ([1j, 0, 1], TWO), {}),
    ("multioutput", "Multioutput target data", ([[1, 0, 2], [0, 1, 2], [1, 0, 2]], THREE), {}),
    ("fractions", "Multioutput target data", ([[0.5, 0.5], [0.5, 0], [0, 0.5]], TWO), {}),
    ("strings in columns", "Multioutput target data", ([["a", "b"]] * 3, TWO), {}),
    ("no columns of labels", "Multioutput target data", (np.zeros((3, 0)), TWO), {}),
    ("indicator and labels", "multilabel input", ([[1, 0], [0, 1], [0, 1]], TWO), {"labels": [0, 1]}),
    ("scalar labels", "array-like", (1, TWO), {}),
    ("string of labels", "array-like", ("abc", TWO), {}),
    ("deep labels", "dim <= 2", (np.zeros((3, 1, 1)), TWO), {}),
    ("no rows", "Found array with 0 sample(s) (shape=(0, 2))", ([], np.zeros((0, 2))), {}),
    ("no columns", "Found array with 0 feature(s) (shape=(3, 0))", ([0, 1, 0], np.zeros((3, 0))), {}),
    ("deep scores", "Found array with dim 3, while dim <= 2 is required", ([0, 1, 0], np.zeros((3, 2, 1))), {}),
    ("scalar scores", "array-like", ([0, 1, 0], 0.5), {}),
    ("ragged scores", "rectangular", ([0, 1, 0], [[0.1, 0.9], [0.1], [0.2, 0.8]]), {}),
    ("text scores", "expected real numbers", ([0, 1, 0], ["a", "b", "c"]), {}),
    ("complex scores", "Complex data not supported", ([0, 1, 0], [0.1j, 0.2, 0.9]), {}),
    ("matrix", "np.matrix is not supported", ([0, 1, 0], as_matrix(TWO)), {}),
    ("matrix of labels", "np.matrix is not supported", (as_matrix([0, 1, 0]), TWO), {}),
    ("NaN score", "Input contains NaN", ([0, 1, 0], [0.1, NAN, 0.2]), {}),
    ("NaN in a row", "Input contains NaN", ([0, 1, 0], [[0.1, 0.9], [0.1, 0.9], [0.5, NAN]]), {}),
    ("infinity in a row", "Input contains infinity", ([0, 1, 0], [[0.1, 0.9], [0.1, 0.9], [0.5, INF]]), {}),
    (
        "weights of two dimensions",
        "sample_weight.shape == (3, 1), expected (3,)",
        ([0, 1, 0], TWO),
        {"sample_weight": [[1], [2], [3]]},
    ),
    ("zero weights", "at least one non-zero number", ([0, 1, 0], TWO), {"sample_weight": [0, 0, 0]}),
    ("NaN weight", "Input sample_weight contains NaN", ([0, 1, 0], TWO), {"sample_weight": [1, NAN, 0]}),
    ("infinite weight", "Input sample_weight contains infinity", ([0, 1, 0], TWO), {"sample_weight": [1, INF, 0]}),
    ("scalar weight", "sample_weight: got 2.0", ([0, 1, 0], TWO), {"sample_weight": 2.0}),
    ("0-d weight", "sample_weight: got 2.0", ([0, 1, 0], TWO), {"sample_weight": np.array(2.0)}),
    ("text weights", "sample_weight: got dtype", ([0, 1, 0], TWO), {"sample_weight": ["1", "2", "3"]}),
    *(
        (
            f"text weights, {type(weights).__name__} of {weights.dtype}",
            "sample_weight: got dtype object, expected real numbers",
            ([0, 1, 0], TWO),
            {"sample_weight": weights},
        )
        for weights in (
            np.array(["1", "2", "3"], object),
            np.array([1, 2, b"3"], object),
            pd.Series(["1", "2", "3"], dtype="string"),
        )
    ),
    ("missing weight", "Input sample_weight contains NaN", ([0, 1, 0], TWO), {"sample_weight": [1, 2, None]}),
    ("object weights", "sample_weight: got dtype", ([0, 1, 0], TWO), {"sample_weight": [1, 2, "three"]}),
    ("dictionaries", "sample_weight: got dtype", ([0, 1, 0], TWO), {"sample_weight": [1, 2, {}]}),
]


class TestErrors:
    @pytest.mark.parametrize(("match", "arguments", "options"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
    def test_where_scikit_learn_raises(self, match, arguments, options):
        with pytest.raises(ValueError, match=re.escape(match)):
            log_loss(*arguments, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises((ValueError, TypeError)):
                sklearn.metrics.log_loss(*arguments, **options)
        with pytest.raises(ValueError, match=re.escape(match.replace("y_prob", "logits"))):
            log_loss_from_logits(*arguments, **options)
        with pytest.raises(ValueError, match=r"."):
            brier_score_from_logits(*arguments, **options)
        with pytest.raises(ValueError, match=r"."):
            top_k_accuracy_from_logits(*arguments, k=1, **options)

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    def test_values_that_are_no_probabilities(self, dtype):
        for bad, match in ((1.25, "y_prob contains values greater than 1: 1.25"), (-0.25, "lower than 0: -0.25")):
            for n_classes in (1, 2, 9, 30):
                for place in {0, n_classes - 1}:
                    for order in "CF":
                        p = np.full((40, n_classes), 0.5, dtype, order=order)
                        p[33, place] = bad
                        with pytest.raises(ValueError, match=match):
                            log_loss(np.arange(40) % 2, p, labels=range(max(n_classes, 2)))

    def test_weights_that_sum_to_zero(self):
        with pytest.raises(ZeroDivisionError, match="Weights sum to zero, can't be normalized"):
            log_loss([0, 1, 0], TWO, sample_weight=[1, -1, 0])
        expected = sklearn.metrics.log_loss([0, 1, 0], TWO, sample_weight=[1, -1, 0], normalize=False)
        assert log_loss([0, 1, 0], TWO, sample_weight=[1, -1, 0], normalize=False) == pytest.approx(expected)

    def test_flags_are_bool(self):
        for function in (log_loss, log_loss_from_logits, top_k_accuracy_from_logits):
            for value in (1, "yes", None):
                with pytest.raises(TypeError, match="normalize"):
                    function([0, 1, 0], TWO, normalize=value)
        with pytest.raises(ValueError, match="scale_by_half"):
            brier_score_from_logits([0, 1, 0], TWO, scale_by_half="half")

    def test_k(self):
        for k in (0, -1, 1.5, "1", None):
            for error in (ValueError, TypeError):  # scikit-learn's is both
                with pytest.raises(error, match=f"k: got {k!r}, expected an integer"):
                    top_k_accuracy_from_logits([0, 1, 0], TWO, k=k)
                with pytest.raises(error, match="'k' parameter"):
                    sklearn.metrics.top_k_accuracy_score([0, 1, 0], [0.1, 0.2, 0.3], k=k)
        with pytest.raises(ValueError, match="must be ordered"):
            top_k_accuracy_from_logits([0, 1, 2], THREE, labels=[0, 2, 1])
        with pytest.raises(ValueError, match="one label per row"):
            top_k_accuracy_from_logits(np.eye(3, dtype=int), THREE)

    @pytest.mark.parametrize("function", FROM_LOGITS)
    @pytest.mark.parametrize(("row", "what"), [((0, NAN, 1), "NaN"), ((0, INF, 1), "infinity"), ((-INF,) * 3, "-inf")])
    def test_rows_without_a_softmax(self, function, row, what):
        logits = np.zeros((30, 3))
        logits[17] = row
        for order in "CF":
            with pytest.raises(ValueError, match=f"Input contains .*{what}: row 17 of logits"):
                function(np.arange(30) % 3, np.array(logits, order=order))
        options = {"k": 1} if function is top_k_accuracy_from_logits else {}
        with pytest.raises(ValueError, match="Input contains NaN: row 1 of logits"):
            function([0, 1, 0], [0.0, NAN, 1.0], **options)

    @pytest.mark.parametrize(
        "dtype", ["Int64", "boolean", "Float64", "int64[pyarrow]", "bool[pyarrow]", "double[pyarrow]"]
    )
    def test_missing_values_of_pandas(self, dtype):
        if "pyarrow" in dtype:
            pytest.importorskip("pyarrow")
        missing = pd.Series([0, 1, None], dtype="object").astype(dtype)
        for function, scores in ((log_loss, "y_proba"), (log_loss_from_logits, "logits")):
            with pytest.raises(ValueError, match="Input y_true contains NaN"):
                function(missing, TWO)
            with pytest.raises(ValueError, match="Input labels contains NaN"):
                function([0, 1, 0], TWO, labels=missing)
            with pytest.raises(ValueError, match=rf"contains NaN.*{scores}|Input {scores} contains NaN"):
                function([0, 1, 0], missing)
            with pytest.raises(ValueError, match=r"Input y_true contains NaN|y_true: got shape"):
                function(pd.DataFrame({"no": missing, "yes": missing}), TWO)

    def test_a_masked_array(self):
        with pytest.raises(ValueError, match="masked"):
            log_loss(np.ma.array([0, 1, 0], mask=[0, 0, 1]), TWO)

    def test_neither_probabilities_nor_old_name(self):
        with pytest.raises(ValueError, match="y_proba"):
            log_loss([0, 1])


class TestWarnings:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_rows_that_do_not_sum_to_one(self, dtype, order):
        y = [0, 1, 1, 0]
        p = np.array([[0.2, 0.7], [0.6, 0.3], [0.4, 0.7], [0.8, 0.3]], dtype, order=order)
        with pytest.warns(UserWarning, match="The y_prob values do not sum to one.") as record:
            found = log_loss(y, p)
        assert record[0].filename == __file__
        with pytest.warns(UserWarning, match="The y_prob values do not sum to one."):
            expected = sklearn.metrics.log_loss(y, p)
        assert found == pytest.approx(expected, rel=TOLERANCES[dtype])

    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize("n_classes", [3, 20])
    def test_the_tolerance_is_that_of_scikit_learn(self, dtype, n_classes):
        epsilon = np.finfo(dtype).eps
        for excess, warns in ((0.9, False), (2.0, True), (-0.9, False), (-2.0, True)):
            p = np.full((5, n_classes), 1 / n_classes, dtype)
            p[3, 1] += excess * np.sqrt(epsilon)
            for function in (log_loss, sklearn.metrics.log_loss):
                with warnings.catch_warnings(record=True) as record:
                    warnings.simplefilter("always")
                    function(np.arange(5) % n_classes, p, labels=range(n_classes))
                assert bool(record) == warns

    def test_labels_out_of_order_are_sorted(self):
        y, labels = ["eggs", "spam", "ham"], ["spam", "eggs", "ham"]
        message = re.escape(
            "Labels passed were ['spam', 'eggs', 'ham']. But this function assumes labels are ordered "
            "lexicographically. Pass the ordered labels=['eggs', 'ham', 'spam'] and ensure that the columns of y_prob "
            "correspond to this ordering."
        )
        with pytest.warns(UserWarning, match=message) as record:
            found = log_loss(y, THREE, labels=labels)
        assert record[0].filename == __file__
        assert found == pytest.approx(-np.log([0.2, 0.2, 0.1]).mean())
        with pytest.warns(UserWarning, match=message):
            assert log_loss_from_logits(y, np.log(THREE), labels=labels) == pytest.approx(found)

    def test_the_old_name(self):
        with pytest.warns(FutureWarning, match="`y_pred` was renamed to `y_proba`"):
            assert log_loss([0, 1, 0], y_pred=TWO) == log_loss([0, 1, 0], TWO)
        with pytest.raises(ValueError, match="Cannot use both `y_pred` and `y_proba`"):
            log_loss([0, 1, 0], TWO, y_pred=TWO)


# -------------------------------------------------------------------------------------------------------------- labels


class TestEncoding:
    """Classes and codes are those of numpy.unique."""

    def check(self, labels, n_expected=0):
        classes, codes = _labels.encode(labels, "labels", n_expected)
        expected_classes, expected_codes = np.unique(labels, return_inverse=True)
        np.testing.assert_array_equal(classes, expected_classes)
        np.testing.assert_array_equal(codes, expected_codes)
        assert codes.dtype == np.int32

    @pytest.fixture(params=[None, 7], ids=["", "cut"], autouse=True)
    def cut(self, request, monkeypatch):
        """Long labels are encoded in pieces."""
        if request.param:
            for name in ("_CUT", "_CUT_OBJECTS", "_CUT_BYTES"):
                monkeypatch.setattr(_labels, name, request.param * (60 if name == "_CUT_BYTES" else 1))

    @pytest.mark.parametrize("dtype", "?bBhHiIlLqQ")
    @pytest.mark.parametrize("n_expected", [0, 1, 2, 10, 100])
    def test_integers(self, rng, serial, dtype, n_expected):
        self.check(rng.integers(0, 2 if dtype == "?" else 10, 50).astype(dtype), n_expected)
        self.check(rng.integers(0, 2, 1).astype(dtype), n_expected)

    def test_spans(self, rng, serial):
        for low, high in ((-5, 5), (10**6, 10**6 + 9), (0, 10**5), (-(2**63), 2**63), (2**62, 2**62 + 40), (-3, 10**9)):
            self.check(rng.integers(low, high, 300), 7)
        self.check(np.array([0, 2**64 - 1, 2**63], np.uint64), 3)
        self.check(np.array([2**63 - 1, -(2**63)]), 2)

    def test_in_parallel(self, rng, monkeypatch):
        monkeypatch.setattr(_labels, "_CUT", 150_001)
        monkeypatch.setattr(_labels, "_CUT_OBJECTS", 99_999)
        self.check(rng.integers(0, 50, 300_000), 50)
        self.check(rng.integers(-9, 50, 300_000), 50)
        labels = np.zeros(300_000, int)
        labels[-1] = 10**12
        self.check(labels, 50)

    @pytest.mark.parametrize("n_distinct", [1, 2, 127, 128, 129, 5000])
    def test_strings(self, rng, n_distinct):
        names = np.array([f"{i * 7919 % 100003}" + "é" * (i % 4) for i in range(n_distinct)])
        self.check(names[rng.integers(0, n_distinct, 8000)])

    def test_strings_that_differ_late_or_by_a_nul(self):
        self.check(np.array(["a" * 40 + c for c in "bacab"]))
        self.check(np.array(["a", "a\0b", "a\0c", "a", ""]))
        self.check(np.array(["", "", ""]))
        self.check(np.array(["x", "y"] * 10).reshape(10, 2)[::-1, 1])

    def test_objects(self, rng):
        labels = [f"{'ab' * int(i)}" for i in rng.integers(0, 30, 500)]
        self.check(np.array(labels, object))
        self.check(_labels.as_labels(labels, "labels"))

    def test_floats_and_dates(self, rng):
        self.check(rng.integers(-9, 9, 100).astype(np.float32))
        self.check(np.datetime64("2020-01-01") + rng.integers(0, 9, 100).astype("m8[D]"))
        self.check(rng.integers(0, 9, 100).astype("m8[s]"))

    @pytest.mark.parametrize(("labels", "match"), [([0, 1] * 20 + [NAN], "NaN"), ([0, 1] * 20 + [0.5], "continuous")])
    def test_the_last_label_is_wrong(self, labels, match):
        with pytest.raises(ValueError, match=match):
            _labels.encode(np.array(labels), "labels")

    @pytest.mark.parametrize("dtype", ["M8[D]", "m8[s]"])
    def test_missing_dates(self, dtype):
        with pytest.raises(ValueError, match="Input labels contains NaT"):
            _labels.encode(np.array([*range(20), "NaT"], dtype), "labels")

    def test_the_last_object_is_wrong(self):
        for odd in (3, None, ["a"]):
            labels = np.empty(30, object)
            labels[:] = ["a", "b"] * 15
            labels[29] = odd
            with pytest.raises((ValueError, TypeError), match="Unknown label type"):
                _labels.encode(labels, "labels")


# -------------------------------------------------------------------------------------------------------- the module


class TestModule:
    def test_signature_of_scikit_learn(self):
        expected = inspect.signature(sklearn.metrics.log_loss).parameters.values()
        found = inspect.signature(log_loss).parameters.values()
        assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in expected]

    def test_signatures(self):
        assert str(inspect.signature(log_loss_from_logits)).count("*, normalize")
        for function in FUNCTIONS:
            names = list(inspect.signature(function).parameters)
            assert names[:2] == ["y_true", "y_proba" if function is log_loss else "logits"]

    def test_all_is_what_the_module_defines(self):
        defined = {
            name
            for name, value in vars(metrics).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == metrics.__name__
        }
        assert defined == set(metrics.__all__)
        assert metrics.__all__ == sorted(metrics.__all__)

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_documentation(self, function):
        documentation = inspect.getdoc(function)
        for section in ("Parameters", "Returns", "Raises", "See Also", "Notes", "Examples"):
            assert f"\n{section}\n{'-' * len(section)}\n" in documentation
        section = documentation.partition("Parameters\n")[2].partition("\n\n")[0]
        headings = [line.partition(" : ")[0] for line in section.splitlines()[1:] if not line.startswith(" ")]
        described = [part for heading in headings for part in heading.split(", ")]
        assert sorted(described) == sorted(inspect.signature(function).parameters)
        assert doctest.DocTestFinder(recurse=False).find(function)[0].examples

    def test_examples_run(self):
        results = doctest.testmod(metrics)
        assert results.attempted > 5
        assert results.failed == 0

    def test_labels_of_text_uncompiled(self):
        """Without a warning of NumPy's where the hash wraps around; the mean of -log 0.9, -log 0.8, -log 0.65."""
        code = """
import numpy as np
from fastloss import metrics
y = np.array(["spam and more of it", "ham", "spam and more of it"])
print(round(metrics.log_loss(y, np.array([0.9, 0.2, 0.65])), 12))
"""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.stderr == ""
        assert float(done.stdout) == pytest.approx(-np.log([0.9, 0.8, 0.65]).mean(), abs=1e-11)

    def test_scikit_learn_is_not_imported(self):
        code = """
import sys
import fastloss
from fastloss import metrics
metrics.log_loss(["a", "b"], [[0.5, 0.5], [0.1, 0.9]], sample_weight=[1, 2], labels=["a", "b"])
class Estimator:
    classes_ = [0, 1]
    def predict_proba(self, X):
        return [[0.5, 0.5]] * len(X)
print(round(metrics.neg_log_loss_scorer(Estimator(), [[0]], [0]), 4))
print([m for m in ("sklearn", "pandas", "polars") if m in sys.modules])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
        assert done.stdout == "-0.6931\n[]\n", done.stderr
