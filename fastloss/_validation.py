"""Every check of the losses' arguments, and every exception they raise. What comes back is canonical.

A message says which argument is wrong, what came, and what was expected. All checks but one precede the computation;
the exception is a target out of range, which the kernels find while they read the targets: :func:`check_targets`.
"""

import math
import operator
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_EXPECTED_REAL = "expected float16, bfloat16, float32, float64, an integer dtype or bool"
# NumPy's own: the chars of other packages' dtypes, whose kind is another, can be the same.
_FLOATS = frozenset("efd")
_INTEGERS = frozenset("?bBhHiIlLqQ")

# What is converted in cuts if it is long, and how many numbers in a cut: some hundredths of a second.
_SEQUENCES = (list, tuple, range)
_CUT_NUMBERS = 1 << 17
# What NumPy makes of Python's numbers, each of which holds the ones before it.
_PYTHON_DTYPES = (np.dtype(np.bool_), np.dtype(np.int64), np.dtype(np.float64))


_PACKAGE = f"{Path(__file__).parent}{os.sep}"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called into this package, however deep inside it the cause was found."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def option_key(value: Any) -> Any:
    """The value of an option, for comparison: an array's dtype (but how it holds text), shape and contents."""
    if not isinstance(value, np.ndarray):
        return value
    return "text" if value.dtype.kind in "UOT" else value.dtype.str, value.shape, pickle.dumps(value.tolist())


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is the bfloat16 of ``ml_dtypes`` (recognised by name: it need not be installed)."""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def is_floating(dtype: np.dtype[Any]) -> bool:
    return (dtype.kind == "f" and dtype.char in _FLOATS) or is_bfloat16(dtype)


def is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biu" and dtype.char in _INTEGERS


def as_array(value: Any, name: str) -> Array:
    """Anything with ``__array__``, the buffer protocol or a sequence of numbers, as an ndarray."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise ValueError(
                f"{name}: got a masked array with {int(value.mask.sum())} masked entries, expected an array without; "
                "fill them, or give their rows ignore_index as target"
            )
        value = value.data
    try:
        array = _sequence(value) if type(value) in _SEQUENCES else np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: got {_describe(value)}, expected a rectangular array of numbers ({error})") from None
    except Exception as error:
        raise TypeError(f"{name}: got {_describe(value)}, expected an array of numbers ({error})") from None
    return array


def _sequence(value: Any) -> Array:
    """What ``np.asarray`` makes of a list, tuple or range; a long one in cuts, between which Ctrl-C is answered."""
    n, first = 1, value
    while type(first) in _SEQUENCES and first:
        n, first = n * len(first), first[0]
    array = _in_cuts(value, n // len(value)) if n > _CUT_NUMBERS else None
    return np.asarray(value) if array is None else array


def _in_cuts(value: Any, n_inner: int) -> Array | None:
    """None where the cuts do not fit together as the whole would: ragged, other than numbers, of unlike dtypes."""
    n = len(value)
    step = max(1, _CUT_NUMBERS // n_inner)
    out = None
    for begin in range(0, n, step):
        cut = value[begin : begin + step]
        try:
            part = np.asarray(cut) if len(cut) * n_inner <= _CUT_NUMBERS else _sequence(cut[0])[np.newaxis]
        except Exception:
            return None
        if out is None:
            out = np.empty((n, *part.shape[1:]), part.dtype)
        if part.dtype.kind not in "biufc" or part.shape != (min(step, n - begin), *out.shape[1:]):
            return None
        if part.dtype != out.dtype:
            if not (part.dtype in _PYTHON_DTYPES and out.dtype in _PYTHON_DTYPES):
                return None
            out = out.astype(np.promote_types(out.dtype, part.dtype), copy=False)
        out[begin : begin + step] = part
    return out


def as_real(value: Any, name: str) -> Array:
    """An array of one of the dtypes that inputs may have."""
    array = as_array(value, name)
    if not (is_floating(array.dtype) or is_integer(array.dtype)):
        raise TypeError(f"{name}: got {_describe_dtype(value, array)}, {_EXPECTED_REAL}")
    return array


def _describe(value: Any) -> str:
    return f"an object of type {type(value).__name__}"


def _describe_dtype(value: Any, array: Array) -> str:
    if array.dtype == object and array.ndim == 0:
        return _describe(value)
    return f"dtype {array.dtype}"


def class_axis(logits: Array, name: str = "input") -> int:
    """The class axis of ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``."""
    if logits.ndim == 0:
        raise ValueError(f"{name}: got a 0-d array, expected shape (C), (N, C) or (N, C, d1, ..., dK)")
    axis = 0 if logits.ndim == 1 else 1
    if logits.shape[axis] == 0:
        raise ValueError(f"{name}: got shape {logits.shape}, expected at least one class along axis {axis}")
    return axis


def row_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def index_target(target: Array, logits: Array, axis: int, probabilities: bool = True) -> Array:
    """Class indices of the shape of ``input`` without its class axis."""
    expected = row_shape(logits.shape, axis)
    if target.shape != expected:
        raise ValueError(
            f"target: got shape {target.shape} for input of shape {logits.shape}, "
            f"expected {expected} (class indices)"
            + (f" or {logits.shape} (class probabilities)" if probabilities else "")
        )
    if not is_integer(target.dtype):
        raise TypeError(f"target: got dtype {target.dtype}, expected an integer dtype or bool for class indices")
    return target


def probability_target(target: Array, ignore_index: int) -> Array:
    """Class probabilities; the caller has seen that they have the shape of ``input``."""
    if not is_floating(target.dtype):
        raise TypeError(
            f"target: got dtype {target.dtype} with the shape of input, which means class probabilities: "
            "expected a floating dtype (or class indices, without the class axis)"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"ignore_index: got {ignore_index} with class probabilities, to which it does not apply; "
            "expected a negative number (the default is -100)"
        )
    return target


def class_weight(weight: Any, n_classes: int | None = None) -> Array | None:
    """One real weight per class (of any number of classes where that is not known yet), or None."""
    if weight is None:
        return None
    array = as_array(weight, "weight")
    if not (is_floating(array.dtype) or is_integer(array.dtype) or np.issubdtype(array.dtype, np.longdouble)):
        raise TypeError(f"weight: got {_describe_dtype(weight, array)}, expected a real dtype")
    if array.ndim != 1 or n_classes not in (None, len(array)):
        expected = "C" if n_classes is None else n_classes
        raise ValueError(f"weight: got shape {array.shape}, expected ({expected},): one weight per class")
    return array


def held_weight(weight: Any) -> Array | None:
    """:func:`class_weight` for an object to hold: a copy, which nobody else changes."""
    array = class_weight(weight)
    return None if array is None else array.copy()


def check_integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from None


def check_ignore_index(ignore_index: Any) -> int:
    return check_integer(ignore_index, "ignore_index")


def check_label_smoothing(label_smoothing: Any) -> float:
    try:
        if isinstance(label_smoothing, (str, bytes, bytearray)):  # float would read them
            raise TypeError
        value = float(label_smoothing)
    except (TypeError, ValueError):
        raise TypeError(f"label_smoothing: got {label_smoothing!r}, expected a number in [0, 1]") from None
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, expected a number in [0, 1]")
    return value


def check_reduction(reduction: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(reduction, str) or reduction not in allowed:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(map(repr, allowed))}")
    return reduction


class Unset:
    """The default of an argument that was not given, which is shown as what it means."""

    def __init__(self, meaning: str) -> None:
        self._meaning = meaning

    def __repr__(self) -> str:
        return self._meaning


def one_spelling(value: Any, other: Any, name: str, other_name: str) -> Any:
    """The value of an argument with two spellings: NumPy's ``name`` and PyTorch's ``other_name``."""
    if isinstance(other, Unset):
        return value
    if not isinstance(value, Unset):
        raise TypeError(f"{other_name}: got both {name} and {other_name}, which are one argument; expected one of them")
    return other


def grad_output(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The gradient of what is made of a loss with respect to it: of the loss's shape. None is 1, for one value only."""
    if value is None:
        if math.prod(shape) != 1:
            raise ValueError(f"grad_output: got None for a loss of shape {shape}, expected an array of that shape")
        return np.ones(shape, dtype)
    array = as_real(value, "grad_output")
    if array.shape != shape:
        raise ValueError(f"grad_output: got shape {array.shape}, expected that of the loss, {shape}")
    with np.errstate(over="ignore"):
        return np.asarray(array, dtype)


def check_axis(axis: Any, ndim: int) -> int:
    """One axis, counted from the front. A 0-d array has the axes 0 and -1."""
    index = check_integer(axis, "axis")
    n_axes = max(ndim, 1)
    if not -n_axes <= index < n_axes:
        raise np.exceptions.AxisError(
            f"axis: got {index} for input with {ndim} dimensions, expected an integer in [{-n_axes}, {n_axes - 1}]"
        )
    return index % n_axes


def check_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """An axis, several, or None for all, as a sorted tuple."""
    if axis is None:
        return tuple(range(ndim))
    if hasattr(axis, "__index__"):
        axes = [check_axis(axis, ndim)]
    elif isinstance(axis, tuple | list):
        axes = [check_axis(a, ndim) for a in axis]
    else:
        raise TypeError(f"axis: got {axis!r}, expected an integer, a tuple of integers or None")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis: got {axis!r}, expected no axis twice")
    return tuple(sorted(axes)) if ndim else ()


def broadcast_shape(logits: Array, target: Array) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(logits.shape, target.shape)
    except ValueError:
        raise ValueError(
            f"target: got shape {target.shape}, expected one that broadcasts with input of shape {logits.shape}"
        ) from None


def is_kept(target: Array, ignore_index: int) -> Array:
    """Which class indices are not ignored. NumPy compares bool with no integer beyond int64."""
    kept: Array = (target.view(np.uint8) if target.dtype == np.bool_ else target) != ignore_index
    return kept


def target_out_of_range(target: Array, n_classes: int, ignore_index: int) -> NoReturn:
    """Raise for the first target, in C order, that is neither a class nor ignored: a kernel has seen one."""
    flat = target.reshape(-1) if target.flags.c_contiguous else None
    size, step = target.size, 1 << 16
    for begin in range(0, size, step):
        piece = flat[begin : begin + step] if flat is not None else target.flat[begin : begin + step]
        for offset in np.flatnonzero((piece < 0) | (piece >= n_classes)):
            value = int(piece[offset])
            if value != ignore_index:
                position = tuple(int(i) for i in np.unravel_index(begin + int(offset), target.shape))
                where = f" at {position if len(position) > 1 else position[0]}" if position else ""
                raise IndexError(
                    f"target: got {value}{where}, expected a class in [0, {n_classes - 1}] "
                    f"or ignore_index={ignore_index}"
                )
    raise IndexError(f"target: a class outside [0, {n_classes - 1}] vanished while it was looked for")
