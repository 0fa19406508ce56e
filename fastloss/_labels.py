"""Labels as scikit-learn takes them, and the codes of their classes as the kernels take them.

The classes are the distinct labels in ascending order, as ``sklearn.preprocessing.LabelBinarizer`` has them, and a code
is an index into them. The errors and the warning are those of scikit-learn, down to the wording that its users match.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastloss import _forks, _validation, _views
from fastloss._validation import Array

# The span of integer labels for which a table of its length is made, whatever the number of rows.
_SMALL_SPAN = 1 << 16
# Slots of the table of distinct strings, to begin with: a power of two.
_SMALLEST_TABLE = 256
# Labels, and bytes of strings, between which Ctrl-C is answered: a tenth of a second or two. (What runs in one call of
# NumPy or of a kernel cannot be stopped.)
_CUT, _CUT_OBJECTS, _CUT_BYTES = 1 << 26, 1 << 20, 1 << 28


class ParameterError(ValueError, TypeError):
    """What scikit-learn raises for an argument of the wrong kind is both."""


class Target(NamedTuple):
    """The true classes: a code per row; or an indicator matrix whose rows do not all hold a single 1, which counts."""

    codes: Array
    indicator: Array | None
    classes: Array


# ------------------------------------------------------------------------------------------------------------- arrays


def as_array(value: Any, name: str) -> Array:
    """An array-like of one or two dimensions: arrays, sequences, series and data frames, nullable ones included."""
    if isinstance(value, np.matrix):
        raise ParameterError(f"{name}: np.matrix is not supported, expected an array (np.asarray makes one)")
    dtype = _plain_dtype(value)
    if dtype is not None:
        try:
            value = value.to_numpy(dtype=dtype)
        except (TypeError, ValueError) as error:  # the former of pandas' Arrow dtypes
            raise ParameterError(f"Input {name} contains NaN: expected no missing values ({error})") from None
    array = _validation.as_array(value, name)
    if array.ndim == 0:
        raise ParameterError(f"{name}: got {value!r}, expected an array-like")
    if array.ndim > 2:
        raise ParameterError(f"{name}: Found array with dim {array.ndim}, while dim <= 2 is required.")
    return array


def _plain_dtype(value: Any) -> np.dtype[Any] | None:
    """NumPy's dtype for numbers of pandas' nullable and Arrow's dtypes, in a series or a frame; None for all else."""
    is_frame = hasattr(value, "iloc") and value.ndim == 2
    dtypes = list(value.dtypes) if is_frame else [getattr(value, "dtype", None)]
    if not any(hasattr(dtype, "numpy_dtype") for dtype in dtypes):
        return None
    plain = [getattr(dtype, "numpy_dtype", dtype) for dtype in dtypes]
    if not all(isinstance(dtype, np.dtype) and dtype.kind in "biuf" for dtype in plain):
        return None
    return np.result_type(*plain)


def as_labels(value: Any, name: str) -> Array:
    """Labels as an array, a list of strings as one of objects.

    1,000,000 strings of nine characters are coded in 63 ms so, in 111 ms by way of an array of fixed width.
    """
    if isinstance(value, list | tuple) and value and isinstance(value[0], str):
        labels = np.empty(len(value), object)
        for part in _cuts(len(value), _CUT_OBJECTS):
            labels[part] = np.fromiter(value[part], object, part.stop - part.start)
        return labels
    array = as_array(value, name)
    if isinstance(value, list | tuple) and array.ndim == 1 and array.dtype.kind == "U":
        raise ParameterError(
            f"Mix of label input types (string and number) in {name}: got {value[0]!r} before a string"
        )
    return array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array


# -------------------------------------------------------------------------------------------------------------- codes


def encode(labels: Array, name: str, n_expected: int = 0) -> tuple[Array, Array]:
    """The sorted distinct labels, and for each label (int32) where it stands among them.

    ``n_expected`` classes are tried first: integers from 0 on are their own codes.
    """
    kind = labels.dtype.kind
    if kind in "biu":
        return _encode_integers(labels, n_expected)
    if kind == "f":
        return _encode_floats(labels, name, n_expected)
    if kind == "U":
        return _encode_strings(labels)
    if kind in "OT":
        return _encode_objects(labels, name)
    if kind in "Mm":
        if any(np.isnat(labels[part]).any() for part in _cuts(len(labels), _CUT_OBJECTS)):
            raise ValueError(f"Input {name} contains NaT, expected no missing values.")
        return _encode_by_sorting(labels)
    raise ParameterError(
        f"{name}: got labels of dtype {labels.dtype}, expected integers, bool or strings "
        "(Support for labels represented as bytes is not supported; complex data not supported)"
    )


def _encode_integers(labels: Array, n_expected: int) -> tuple[Array, Array]:
    """Through a table over the span of the labels, where that is not much longer than the labels."""
    if not labels.dtype.isnative or not labels.flags.aligned or labels.strides[0] % labels.itemsize:
        labels = np.array(labels, labels.dtype.newbyteorder("="))
    codes: Array = np.empty(len(labels), np.int32)
    low, span = 0, n_expected
    seen = _mark_codes(labels, low, span, codes)
    if seen is None:
        low, high = int(labels.min()), int(labels.max())
        span = high - low + 1
        if span <= max(_SMALL_SPAN, 2 * len(labels)) and high < 2**63:
            seen = _mark_codes(labels, low, span, codes)
    if seen is None:
        return _encode_by_sorting(labels)
    places = np.flatnonzero(seen)
    if places[-1] != len(places) - 1:
        ranks = np.cumsum(seen, dtype=np.int32)
        ranks -= 1
        _replace(codes, ranks)
    return (places + low).astype(labels.dtype), codes


def _encode_by_sorting(labels: Array) -> tuple[Array, Array]:
    """Piece by piece: the distinct labels of each, then where its labels stand among all of them."""
    parts = list(_cuts(len(labels), _CUT_OBJECTS))
    classes = np.unique(np.concatenate([np.unique(labels[part]) for part in parts]))
    codes = np.empty(len(labels), np.int32)
    for part in parts:
        codes[part] = np.searchsorted(classes, labels[part])
    return classes, codes


def _replace(codes: Array, ranks: Array) -> None:
    """Put the rank of each code in its place."""
    for part in _cuts(len(codes), _CUT_OBJECTS):
        codes[part] = ranks[codes[part]]


def _cuts(n: int, step: int) -> Iterator[slice]:
    for begin in range(0, n, step):
        yield slice(begin, min(begin + step, n))


def _mark_codes(labels: Array, low: int, span: int, codes: Array) -> Array | None:
    """Write the labels less ``low`` to the codes; which of ``span`` codes occur, or None if a label lies outside."""
    from fastloss._kernels.labels import integer_codes

    flat, (*_, origin) = _views.flatten(labels.view(np.uint8) if labels.dtype == bool else labels)
    seen = np.zeros(span, np.uint8)
    n_tasks = len(codes) // max(span, 1)  # each worker has a table of its own to clear and to add
    stride, origin = labels.strides[0] // labels.itemsize, origin // labels.itemsize
    for part in _cuts(len(codes), _CUT):
        begin = origin + part.start * stride
        if not _forks.runtime().run(
            integer_codes, part.stop - part.start, n_tasks, flat, begin, stride, low, codes[part], seen
        ):
            return None
    return seen


def _encode_floats(labels: Array, name: str, n_expected: int) -> tuple[Array, Array]:
    for what, is_it in (("NaN", np.isnan), ("infinity", np.isinf)):
        if any(is_it(labels[part]).any() for part in _cuts(len(labels), _CUT_OBJECTS)):
            raise ValueError(f"Input {name} contains {what}.")
    integers = np.empty(len(labels), np.int64)
    for part in _cuts(len(labels), _CUT_OBJECTS):
        with np.errstate(invalid="ignore"):
            integers[part] = labels[part].astype(np.int64)
        if (integers[part] != labels[part]).any():
            raise ValueError(f"Unknown label type: {name} is continuous, expected classes")
    classes, codes = _encode_integers(integers, n_expected)
    return classes.astype(labels.dtype), codes


def _encode_strings(labels: Array) -> tuple[Array, Array]:
    from fastloss._kernels.labels import string_codes

    flat, (*_, origin) = _views.flatten(labels, is_index=True)
    codes = np.empty(len(labels), np.int32)
    step = max(1, _CUT_BYTES // max(1, labels.itemsize))
    # The kernel returns where the cut ends, or before where the table is half full: then it is doubled and filled anew.
    first, row, n_known, n_found = np.empty(_SMALLEST_TABLE // 2, np.int64), 0, 0, 0
    table = np.full(_SMALLEST_TABLE, -1, np.int32)
    while row < len(codes):
        with np.errstate(over="ignore"):  # (uncompiled, NumPy's multiplication warns where the hash wraps around)
            row, n_found = string_codes.serial(
                1,
                flat,
                origin,
                labels.strides[0],
                labels.itemsize,
                row,
                codes[: row + step],
                table,
                first,
                n_known,
                n_found,
            )
        n_known = 0
        if n_found == len(first):
            n_known = n_found
            first = np.concatenate([first, np.empty_like(first)])
            table = np.full(2 * len(table), -1, np.int32)
    classes = labels[first[:n_found]]
    order = np.argsort(classes)
    _replace(codes, _inverse(order))
    return classes[order], codes


def _encode_objects(labels: Array, name: str) -> tuple[Array, Array]:
    parts = list(_cuts(len(labels), _CUT_OBJECTS))
    distinct: set[Any] = set()
    try:
        for part in parts:
            distinct.update(labels[part])
    except TypeError as error:
        raise ParameterError(f"Unknown label type: {name} holds an {error}, expected strings") from None
    for odd in (label for label in distinct if not isinstance(label, str)):
        raise ParameterError(
            f"Unknown label type: {name} holds {odd!r} of type {type(odd).__name__} in an array of objects, "
            "expected strings alone (Mix of label input types), or an array of integers"
        )
    classes = np.empty(len(distinct), object)
    classes[:] = sorted(distinct)
    places = {label: code for code, label in enumerate(classes)}
    codes = np.empty(len(labels), np.int32)
    for part in parts:
        codes[part] = np.fromiter(map(places.__getitem__, labels[part]), np.int32, part.stop - part.start)
    return classes, codes


def _inverse(order: Array) -> Array:
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order), dtype=np.int32)
    return ranks


# ------------------------------------------------------------------------------------------------------------ classes


def _family(labels: Array) -> str:
    """What kinds of labels may be equal to each other: strings, numbers, dates, durations."""
    return {"U": "text", "O": "text", "T": "text", "M": "M", "m": "m"}.get(labels.dtype.kind, "number")


def _places(labels: Array, classes: Array) -> Array:
    """Where each of some distinct labels stands among the sorted classes, -1 if it is none of them."""
    family = _family(labels)
    if family != _family(classes):
        return np.full(len(labels), -1, np.int32)
    if family in ("M", "m"):  # of different units, perhaps
        places = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
        return np.where(classes[places] == labels, places, -1).astype(np.int32)
    # As Python's numbers and strings: NumPy compares int64 with uint64 in float64.
    known = {label: place for place, label in enumerate(classes.tolist())}
    return np.array([known.get(label, -1) for label in labels.tolist()], np.int32)


def as_classes(labels: Any, must_be_sorted: bool) -> Array:
    """The classes that the argument ``labels`` lists; unsorted ones are sorted, with a warning."""
    array = as_labels(labels, "labels")
    if array.ndim != 1:
        raise ParameterError(f"labels: got shape {array.shape}, expected (n_classes,): a list of the classes")
    if not array.size:
        raise ValueError("labels: y has 0 samples, expected at least two classes")
    classes, codes = encode(array, "labels")
    if len(classes) == 1:
        raise ValueError(f"The labels array needs to contain at least two labels, got {classes}.")
    if len(classes) < len(array):
        raise ValueError(f"Parameter 'labels' must be unique: got {labels}.")
    if (codes != np.arange(len(codes))).any():
        if must_be_sorted:
            raise ValueError(f"Parameter 'labels' must be ordered: got {labels}, expected {classes.tolist()}.")
        _validation.warn(
            f"Labels passed were {labels}. But this function assumes labels are ordered lexicographically. "
            f"Pass the ordered labels={classes.tolist()} and ensure that the columns of y_prob correspond to this "
            "ordering."
        )
    return classes


# ------------------------------------------------------------------------------------------------------------- target


def row_pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the rows of an array of one or two dimensions into pieces of about :data:`fastloss._views.PIECE` elements."""
    step = max(1, _views.PIECE // max(1, math.prod(shape[1:])))
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def as_target(labels: Array, listed: Any, n_classes: int, scores_name: str, must_be_sorted: bool = False) -> Target:
    """The true classes from ``y_true``, the argument ``labels`` and the number of classes of the scores."""
    classes = None if listed is None else as_classes(listed, must_be_sorted)
    if labels.ndim == 2:
        if classes is not None:
            raise ParameterError(
                f"y_true: got shape {labels.shape} together with labels, expected one label per row "
                "(The object was not fitted with multilabel input.)"
            )
        target = _indicator_target(labels)
    else:
        target = _label_target(labels, classes, listed, n_classes)
    if len(target.classes) == n_classes:
        return target
    if classes is not None:
        raise ValueError(
            f"The number of classes in labels is different from that in {scores_name}. "
            f"Classes found in labels: {target.classes}"
        )
    raise ValueError(
        f"y_true and {scores_name} contain different number of classes: {len(target.classes)} vs {n_classes}. Please "
        f"provide the true labels explicitly through the labels argument. Classes found in y_true: {target.classes}"
    )


def _label_target(labels: Array, classes: Array | None, listed: Any, n_classes: int) -> Target:
    """One label per row."""
    found, codes = encode(labels, "y_true", n_classes)
    if classes is None:
        if len(found) == 1:
            raise ValueError(
                f"y_true contains only one label ({found[0]}). Please provide the list of all expected class labels "
                "explicitly through the labels argument."
            )
        return Target(codes, None, found)
    places = _places(found, classes)
    if (places < 0).any():
        undeclared = ", ".join(map(repr, found[places < 0].tolist()))
        raise ValueError(f"y_true contains values {{{undeclared}}} not belonging to the passed labels {listed}.")
    if (places != np.arange(len(places))).any():
        _replace(codes, places)
    return Target(codes, None, classes)


def _indicator_target(labels: Array) -> Target:
    """A column per class, of at most two values. Rows with a single 1 are the codes of classes."""
    codes = np.empty(len(labels), np.int32)
    has_values = labels.dtype.kind in "biuf" and labels.size
    low, high = (labels.min(), labels.max()) if has_values else (np.nan, np.nan)
    is_indicator = bool(low == np.rint(low) and high == np.rint(high))
    is_one_hot = bool(high == 1)
    for rows in row_pieces(labels.shape):
        piece = labels[rows]
        is_indicator = is_indicator and bool(((piece == low) | (piece == high)).all())
        if not is_indicator:
            raise ParameterError(
                f"y_true: got shape {labels.shape}, expected one label per row or an indicator matrix of two integers "
                "(Multioutput target data is not supported with label binarization)"
            )
        is_one_hot = is_one_hot and bool((np.count_nonzero(piece, axis=1) == 1).all())
        codes[rows] = piece.argmax(axis=1)
    classes = np.arange(labels.shape[1])
    return Target(codes, None if is_one_hot else labels, classes)
