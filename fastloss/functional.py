"""The losses as functions: documentation, then check, view, run, reduce.

The checks are in :mod:`fastloss._validation`, the geometry of the arrays in :mod:`fastloss._views`, the choice between
one thread and several in :mod:`fastloss._runtime`, the arithmetic in :mod:`fastloss._kernels`, which is imported when
the first result is asked for: ``import fastloss`` alone does not import Numba.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastloss import _forks, _reduction, _validation, _views
from fastloss._validation import Array

__all__ = ["cross_entropy", "kl_div", "log_softmax", "logsumexp", "nll_loss", "softmax"]

_LAST: Any = _validation.Unset("-1")
_ALL: Any = _validation.Unset("None")
_NO: Any = _validation.Unset("False")
_NONE_GIVEN: Any = _validation.Unset("<not given>")

# A vector of padding behind the weights: rows shorter than a vector read past them.
_PADDING = 16

MEAN_IS_NOT_THE_DIVERGENCE = (
    "reduction='mean' divides by the number of elements, so it is not the Kullback-Leibler divergence: "
    "reduction='batchmean' is"
)

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

# What gathering one entry costs, in entries read one after the other (a cache line of float32).
_GATHER_COST = 16


def cross_entropy(
    input: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    r"""Cross-entropy between logits and class indices or class probabilities.

    For class indices :math:`t`, with :math:`p = \mathrm{softmax}(x)` over the classes, :math:`w` the class weights (1
    without them) and :math:`\epsilon` the label smoothing, the loss of a row is

    .. math:: (1-\epsilon)\, w_t\, (-\log p_t) + \frac{\epsilon}{C} \sum_c w_c\, (-\log p_c)

    and for class probabilities :math:`y`, with :math:`y' = y\,(1-\epsilon) + \epsilon / C`, it is
    :math:`-\sum_c w_c\, y'_c \log p_c`. The definition is that of ``torch.nn.functional.cross_entropy``.

    Parameters
    ----------
    input : array_like
        Logits (unnormalised), of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``, in any memory layout. float16,
        bfloat16, float32 or float64; integers and bool count as float64.
    target : array_like
        Class indices in ``[0, C)``, of an integer dtype or bool and the shape of `input` without its class axis; or
        class probabilities, of a floating dtype and the shape of `input`.
    weight : array_like, optional
        One real weight per class, shape ``(C)``.
    size_average, reduce : bool, optional
        Deprecated, as in PyTorch: where either is given they override `reduction` (``reduce=False`` is ``'none'``, else
        ``size_average=False`` is ``'sum'``, else ``'mean'``), with a UserWarning.
    ignore_index : int
        A class index whose rows count nothing: exactly 0 with ``'none'``, whatever the row holds. It may lie outside
        ``[0, C)``. Not for class probabilities.
    reduction : {'mean', 'none', 'sum'}
        ``'mean'`` divides the sum by the summed weights of the targets kept (class indices) or by the number of rows
        (class probabilities).
    label_smoothing : float
        In [0, 1].

    Returns
    -------
    numpy.ndarray or numpy scalar
        With ``'none'`` one loss per row, of the shape of `input` without its class axis; else a scalar. float32 for
        float16, bfloat16 and float32 `input`, else float64; probabilities of a wider dtype widen it.

    Raises
    ------
    ValueError
        For shapes that do not fit, a wrong number of weights, an unknown reduction, a `label_smoothing` outside [0, 1],
        no class at all, `ignore_index` >= 0 with class probabilities, or a masked array with masked entries.
    IndexError
        For a class index outside ``[0, C)`` that is not `ignore_index`; names the first one.
    TypeError
        For complex, object, string or datetime data, class indices that are no integers, integer targets of the shape
        of `input`, or an `ignore_index` that is no integer.

    See Also
    --------
    CrossEntropyLoss : The same with the options held by an object.
    nll_loss : For log-probabilities.

    Notes
    -----
    *Special values.* A logit of -inf is a masked class, of probability 0. -inf at the target gives inf; a row of only
    -inf, or with +inf or NaN, gives NaN. No rows, or all ignored: ``'mean'`` is NaN and ``'sum'`` 0. With label
    smoothing a masked class makes the loss inf (NaN if its weight is 0). A probability of 0 on a logit of -inf gives
    NaN.

    *Accuracy.* float32 losses are within 2e-6 of the exact value of the given logits in relative terms down to 1e-12,
    and within 5e-6 below, as long as the exponentials relative to the target's logit are normal numbers. ``'sum'`` and
    ``'mean'`` are made of the exact sum of the row losses, rounded to float64, so they depend on no order and no number
    of threads. A row's loss has the same bits in any batch and layout.

    *Differences from PyTorch.* Any integer dtype for targets and any real one for weights; integer logits become
    float64; halves give float32; a negative or NaN `label_smoothing` is refused.

    Examples
    --------
    >>> import numpy as np
    >>> import fastloss
    >>> logits = np.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]], dtype=np.float32)
    >>> print(fastloss.cross_entropy(logits, [0, 2]))
    0.17545639
    >>> print(fastloss.cross_entropy(logits, [0, 1], reduction="none"))
    [0.24131131 2.9096012 ]
    """
    key = None
    if (
        weight is None
        and size_average is None
        and reduce is None
        and type(input) is type(target) is np.ndarray
        and type(ignore_index) is int
        and type(reduction) is str
        and type(label_smoothing) is float
    ):
        key = input.dtype, input.shape, target.dtype, target.shape, ignore_index, reduction, label_smoothing
        call = _short_calls.get(key)
        if call is not None and (value := call(input, target)) is not None:
            return value
    reduction = _reduction.resolve(reduction, size_average, reduce)
    ignore_index = _validation.check_ignore_index(ignore_index)
    label_smoothing = _validation.check_label_smoothing(label_smoothing)
    logits, labels, axis, weights = _check(input, target, weight, ignore_index, is_nll=False)
    if labels.shape == logits.shape:
        return _probability_loss(logits, labels, axis, weights, reduction, label_smoothing)
    loss = _index_loss(logits, labels, axis, weights, ignore_index, reduction, label_smoothing, is_nll=False)
    _remember_index_loss(key, logits, labels, axis, ignore_index, reduction, label_smoothing, is_nll=False)
    return loss


def nll_loss(
    input: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    r"""Negative log-likelihood of class indices under log-probabilities.

    The loss of a row with log-probabilities :math:`x`, target :math:`t` and class weights :math:`w` is :math:`-w_t\,
    x_t`. The definition is that of ``torch.nn.functional.nll_loss``.

    Parameters
    ----------
    input : array_like
        Log-probabilities, of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``, in any memory layout and any dtype
        of
        :func:`cross_entropy`. They are taken as they are: nothing checks that they are normalised.
    target : array_like
        Class indices in ``[0, C)``, of an integer dtype or bool and the shape of `input` without its class axis.
    weight : array_like, optional
        One real weight per class, shape ``(C)``.
    size_average, reduce : bool, optional
        Deprecated; see :func:`cross_entropy`.
    ignore_index : int
        A class index whose rows count nothing.
    reduction : {'mean', 'none', 'sum'}
        ``'mean'`` divides the sum by the summed weights of the targets kept.

    Returns
    -------
    numpy.ndarray or numpy scalar
        With ``'none'`` one loss per row, of the shape of `target`; else a scalar. float32 for float16, bfloat16 and
        float32 `input`, else float64.

    Raises
    ------
    ValueError, IndexError, TypeError
        As :func:`cross_entropy` for class indices.

    See Also
    --------
    NLLLoss : The same with the options held by an object.
    cross_entropy : For logits.

    Notes
    -----
    *Special values.* Only the target's entry is read: NaN and infinities elsewhere in a row do not matter. No rows, or
    all ignored: ``'mean'`` is NaN and ``'sum'`` 0.

    *Differences from PyTorch.* As :func:`cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastloss
    >>> log_probabilities = np.log([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    >>> print(fastloss.nll_loss(log_probabilities, [0, 2], reduction="none").round(6))
    [0.356675 0.223144]
    """
    key = None
    if (
        weight is None
        and size_average is None
        and reduce is None
        and type(input) is type(target) is np.ndarray
        and type(ignore_index) is int
        and type(reduction) is str
    ):
        key = "nll_loss", input.dtype, input.shape, target.dtype, target.shape, ignore_index, reduction
        call = _short_calls.get(key)
        if call is not None and (value := call(input, target)) is not None:
            return value
    reduction = _reduction.resolve(reduction, size_average, reduce)
    ignore_index = _validation.check_ignore_index(ignore_index)
    log_probabilities, labels, axis, weights = _check(input, target, weight, ignore_index, is_nll=True)
    loss = _index_loss(log_probabilities, labels, axis, weights, ignore_index, reduction, 0.0, is_nll=True)
    _remember_index_loss(key, log_probabilities, labels, axis, ignore_index, reduction, 0.0, is_nll=True)
    return loss


def kl_div(
    input: npt.ArrayLike,
    target: npt.ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    r"""Kullback-Leibler divergence from `input` (log-probabilities) to `target` (probabilities), element by element.

    With input :math:`x` and target :math:`y` the pointwise value is :math:`y\,(\log y - x)`, taken as
    ``xlogy(y, y) - y * x`` so that :math:`0 \log 0 = 0`; with `log_target`, :math:`e^y (y - x)`. Note the order of the
    arguments: in the textbook's notation this is :math:`D(\mathrm{target} \| \mathrm{input})`. The definition is that
    of ``torch.nn.functional.kl_div``.

    Parameters
    ----------
    input : array_like
        Log-probabilities, of any shape and any dtype of :func:`cross_entropy`.
    target : array_like
        Probabilities, or with `log_target` log-probabilities, of a shape that broadcasts with `input`.
    size_average, reduce : bool, optional
        Deprecated; see :func:`cross_entropy`.
    reduction : {'mean', 'batchmean', 'none', 'sum'}
        ``'batchmean'`` divides the sum by ``input.shape[0]`` and is the divergence per row; ``'mean'`` divides by the
        number of elements, which is not the divergence, and warns.
    log_target : bool
        Whether `target` holds logarithms.

    Returns
    -------
    numpy.ndarray or numpy scalar
        With ``'none'`` an array of the broadcast shape; else a scalar. The dtype follows NumPy's promotion of the two,
        halves counting as float32.

    Raises
    ------
    ValueError
        For shapes that do not broadcast, an unknown reduction, or a masked array with masked entries.
    TypeError
        For complex, object, string or datetime data.

    See Also
    --------
    KLDivLoss : The same with the options held by an object.

    Notes
    -----
    *Special values.* A target of 0 counts 0, but NaN where the input is -inf, inf or NaN; a negative target gives NaN.

    *Accuracy.* Where the distributions are close the two terms cancel: float32 adds their large parts without rounding,
    and takes the values in float64 where the logarithms differ by less than 1/64.
    ``'sum'`` and the means are made of the exact sum of the pointwise values, rounded to float64.

    *Differences from PyTorch.* Integers become float64; halves give float32.

    Examples
    --------
    >>> import numpy as np
    >>> import fastloss
    >>> p = np.array([[0.5, 0.25, 0.25]])
    >>> q = np.array([[0.25, 0.25, 0.5]])
    >>> print(round(float(fastloss.kl_div(np.log(q), p, reduction="batchmean")), 6))
    0.173287
    """
    is_deprecated = size_average is not None or reduce is not None
    key = None
    if (
        not is_deprecated
        and type(input) is type(target) is np.ndarray
        and type(reduction) is str
        and type(log_target) is bool
    ):
        key = "kl_div", input.dtype, input.shape, target.dtype, target.shape, reduction, log_target
        call = _short_calls.get(key)
        if call is not None and (value := call(input, target)) is not None:
            return value
    reduction = _reduction.resolve(reduction, size_average, reduce, _reduction.KL_REDUCTIONS)
    if reduction == "mean" and not is_deprecated:
        _validation.warn(MEAN_IS_NOT_THE_DIVERGENCE)
    log_probabilities = _validation.as_real(input, "input")
    goal = _validation.as_real(target, "target")
    shape = _validation.broadcast_shape(log_probabilities, goal)
    dtype = _views.compute_dtype(log_probabilities.dtype, goal.dtype)
    out = np.empty(shape, dtype) if reduction == "none" else None
    ledger = None if out is not None else _forks.runtime().new_ledger()
    total = _add_kl(ledger, log_probabilities, goal, shape, dtype, bool(log_target), out)
    if reduction != "mean":  # (which warns at every call)
        _remember_kl(key, log_probabilities, goal, dtype, reduction, bool(log_target))
    if out is not None:
        return out[()]
    if reduction == "mean":
        total = _reduction.divide(total, math.prod(shape))
    elif reduction == "batchmean" and log_probabilities.ndim:
        total = _reduction.divide(total, log_probabilities.shape[0])
    return _scalar(total, dtype)


def softmax(input: npt.ArrayLike, axis: int = _LAST, *, dim: int = _NONE_GIVEN) -> Any:
    r"""Softmax :math:`e^{x_c} / \sum_k e^{x_k}` along one axis.

    Parameters
    ----------
    input : array_like
        Logits of any shape, in any memory layout and any dtype of :func:`cross_entropy`.
    axis : int
        The class axis; by default the last. A 0-d `input` has the axes 0 and -1.
    dim : int, optional
        PyTorch's name of `axis`.

    Returns
    -------
    numpy.ndarray or numpy scalar
        Probabilities of the shape and memory order of `input`. float32 for float16, bfloat16 and float32 `input`, else
        float64.

    Raises
    ------
    numpy.exceptions.AxisError
        (A ValueError and an IndexError) for an axis that `input` does not have.
    ValueError
        For a masked array with masked entries.
    TypeError
        For complex, object, string or datetime data, an axis that is no integer, or both `axis` and `dim`.

    See Also
    --------
    log_softmax : Its logarithm, computed directly.

    Notes
    -----
    *Special values.* A logit of -inf gives exactly 0; a row of only -inf, or with +inf or NaN, gives NaN throughout.

    *Accuracy.* Within 4 units in the last place, mostly 2, wherever the result is a normal number.

    *Differences from PyTorch.* `axis` defaults to the last; halves give float32; integers become float64.

    Examples
    --------
    >>> import numpy as np
    >>> import fastloss
    >>> print(fastloss.softmax(np.array([0.0, np.log(3.0), -np.inf])))
    [0.25 0.75 0.  ]
    """
    return _softmax(input, _validation.one_spelling(axis, dim, "axis", "dim"), is_log=False)


def log_softmax(input: npt.ArrayLike, axis: int = _LAST, *, dim: int = _NONE_GIVEN) -> Any:
    r"""Logarithm of the softmax, :math:`x_c - \log \sum_k e^{x_k}`, along one axis.

    Parameters
    ----------
    input : array_like
        Logits of any shape, in any memory layout and any dtype of :func:`cross_entropy`.
    axis : int
        The class axis; by default the last. A 0-d `input` has the axes 0 and -1.
    dim : int, optional
        PyTorch's name of `axis`.

    Returns
    -------
    numpy.ndarray or numpy scalar
        Log-probabilities of the shape and memory order of `input`. float32 for float16, bfloat16 and float32 `input`,
        else float64.

    Raises
    ------
    ValueError, TypeError
        As :func:`softmax`.

    See Also
    --------
    softmax : The probabilities.
    logsumexp : The term that is subtracted.

    Notes
    -----
    *Special values.* A logit of -inf gives -inf; a row of only -inf, or with +inf or NaN, gives NaN throughout.

    *Accuracy.* Within 4 units in the last place, mostly 2, the entry of a confident class included, as long as the
    exponentials that it is made of are normal numbers.

    *Differences from PyTorch.* As :func:`softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastloss
    >>> print(fastloss.log_softmax(np.array([0.0, -40.0])))
    [-4.24835426e-18 -4.00000000e+01]
    """
    return _softmax(input, _validation.one_spelling(axis, dim, "axis", "dim"), is_log=True)


def logsumexp(
    input: npt.ArrayLike,
    axis: int | tuple[int, ...] | None = _ALL,
    keepdims: bool = _NO,
    *,
    dim: int | tuple[int, ...] | None = _NONE_GIVEN,
    keepdim: bool = _NONE_GIVEN,
) -> Any:
    r"""Logarithm of the sum of exponentials, :math:`\log \sum_c e^{x_c}`, along some or all axes.

    Parameters
    ----------
    input : array_like
        Numbers of any shape, in any memory layout and any dtype of :func:`cross_entropy`.
    axis : int, tuple of ints, or None
        What to sum over; by default (None) everything. A 0-d `input` has the axes 0 and -1.
    keepdims : bool
        Whether the axes summed over stay, with length 1; by default not.
    dim, keepdim : optional
        PyTorch's names of `axis` and `keepdims`.

    Returns
    -------
    numpy.ndarray or numpy scalar
        float32 for float16, bfloat16 and float32 `input`, else float64.

    Raises
    ------
    numpy.exceptions.AxisError
        (A ValueError and an IndexError) for an axis that `input` does not have.
    ValueError
        For an axis given twice, or a masked array with masked entries.
    TypeError
        For complex, object, string or datetime data, an axis that is no integer, or both spellings of an argument.

    See Also
    --------
    log_softmax : The input minus its log-sum-exp.

    Notes
    -----
    *Special values.* -inf over nothing but -inf, or over an empty axis; inf where there is an inf; NaN where there is a
    NaN.

    *Accuracy.* The sum leaves out the maximum's own term, which enters through log1p: a small remainder keeps its
    digits. Over one axis the bits are those of any layout; over several the elements are taken in the order in which
    they lie in memory, on which the last bit may depend.

    *Differences from PyTorch.* `axis` may be None; halves give float32; integers become float64.

    Examples
    --------
    >>> import fastloss
    >>> print(fastloss.logsumexp([0.0, -40.0]))
    4.248354255291589e-18
    >>> print(fastloss.logsumexp([[0.0, 0.0], [1.0, 1.0]], axis=1).round(4))
    [0.6931 1.6931]
    """
    axis = _validation.one_spelling(axis, dim, "axis", "dim")
    keepdims = _validation.one_spelling(keepdims, keepdim, "keepdims", "keepdim")
    key = None
    if (
        type(input) is np.ndarray
        and (axis is None or axis is _ALL or type(axis) is int)
        and (keepdims is _NO or type(keepdims) is bool)
    ):
        key = "logsumexp", input.dtype, input.shape, axis, keepdims
        call = _short_calls.get(key)
        if call is not None and (value := call(input, input)) is not None:
            return value
    values = _validation.as_real(input, "input")
    axes = _validation.check_axes(None if axis is _ALL else axis, values.ndim)
    is_kept = keepdims is not _NO and bool(keepdims)
    kept = tuple(1 if a in axes else n for a, n in enumerate(values.shape) if is_kept or a not in axes)
    return _logsumexp(values, axes, _views.compute_dtype(values.dtype), key, kept).reshape(kept)[()]


# ------------------------------------------------------------------------------------------------------------ helpers
#
# _add_index_loss, _add_probability_loss and _add_kl add losses to a ledger (None: no sum is wanted) and write them to
# `out` (None: no rows are wanted); they return the sums in the ledger. fastloss.streaming calls them chunk by chunk.


def _check(
    input: npt.ArrayLike, target: npt.ArrayLike, weight: npt.ArrayLike | None, ignore_index: int, is_nll: bool
) -> tuple[Array, Array, int, Array | None]:
    """Logits, targets (probabilities, if they have the shape of the logits), the class axis and the weights."""
    logits = _validation.as_real(input, "input")
    axis = _validation.class_axis(logits)
    labels = _validation.as_real(target, "target")
    weights = _validation.class_weight(weight, logits.shape[axis])
    if labels.shape == logits.shape and not is_nll:
        _validation.probability_target(labels, ignore_index)
    else:
        _validation.index_target(labels, logits, axis, probabilities=not is_nll)
    return logits, labels, axis, weights


# Short calls of the commonest form, without weights: by all that the checks look at (function, dtypes, shapes, options;
# those of options that are equal mean the same), what is left to do once such a call has passed them. It takes arrays
# in any layout, and gives None where its result is not that simple: the arrays are not C-contiguous, a target is out of
# range. With 32 rows of 10 classes the checks would take two thirds of the time, with a row of 128,256 a third.
_MOST_SHORT_CALLS = 512
_short_calls: dict[Any, Callable[[Any, Any], Any]] = {}


def _is_plain(array: Array, is_index: bool = False) -> bool:
    """Whether a kernel can take the array itself."""
    flags, dtype = array.flags, array.dtype
    return flags.c_contiguous and flags.aligned and dtype.isnative and (is_index or _validation.is_floating(dtype))


def _remember(
    key: Any,
    kernel: Any,
    n_elements: int,
    dtypes: tuple[np.dtype[Any], np.dtype[Any]],
    weight: Array,
    shape: tuple[int, ...] | None,
    dtype: np.dtype[Any],
    table: Array,
    divisor: int = 1,
    keep: float = 1.0,
    spread: float = 0.0,
) -> None:
    """Keep what the call of a kernel comes down to, if it is a short one.

    Its arrays are seen as ``dtypes``. The result is an array of a shape; without a shape it is the sum over ``divisor``
    (0: the number of targets kept).
    """
    runtime = _forks.runtime()
    if key is None or n_elements > runtime.FIRST_CUT:
        return
    seen = *dtypes, weight.dtype, dtype
    # (The product is exact, and made in a fifth of the time that the type takes. Before NumPy 2 it is a float64.)
    scalar = dtype.type(1).__mul__ if type(dtype.type(1) * 1.0) is dtype.type else dtype.type
    ledger, one = runtime.NO_LEDGER, _views.one(dtype)
    # What is too small for threads needs nothing of the runtime.
    entry = kernel.entry(False, *seen) if n_elements < runtime.PARALLEL_THRESHOLD else None

    def scalar_call(input: Array, target: Array) -> Any:
        try:
            if entry is not None and n_elements < runtime.PARALLEL_THRESHOLD:
                total, _, kept, bad = entry(1, ledger, input, target, weight, one, table, keep, spread)
            else:
                total, _, kept, bad = runtime.run_typed(
                    kernel, seen, n_elements, ledger, (input, target, weight, one), table, (keep, spread)
                )
        except BufferError:
            return None
        count = divisor or kept
        if bad or not count:
            return None
        value = total / count
        return scalar(value) if -_LARGEST_FLOAT32 < value < _LARGEST_FLOAT32 else _scalar(value, dtype)

    def array_call(input: Array, target: Array) -> Any:
        out = np.empty(shape or (), dtype)
        try:
            if entry is not None and n_elements < runtime.PARALLEL_THRESHOLD:
                _, _, _, bad = entry(1, ledger, input, target, weight, out, table, keep, spread)
            else:
                _, _, _, bad = runtime.run_typed(
                    kernel, seen, n_elements, ledger, (input, target, weight, out), table, (keep, spread)
                )
        except BufferError:
            return None
        return None if bad else out[()]

    if len(_short_calls) >= _MOST_SHORT_CALLS:
        _short_calls.clear()
    _short_calls[key] = scalar_call if shape is None else array_call


def _remember_index_loss(
    key: Any,
    logits: Array,
    labels: Array,
    axis: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    is_nll: bool,
) -> None:
    """Keep a call of :func:`cross_entropy` or :func:`nll_loss` with class indices, if it is a short one."""
    if key is None or not (labels.size and _is_plain(logits) and _is_plain(labels, is_index=True)):
        return
    dtype, n_classes = _views.compute_dtype(logits.dtype), logits.shape[axis]
    smoothed, wants_rows = label_smoothing > 0, reduction == "none"
    shape = labels.shape if wants_rows else None
    out_layout = (dtype, labels.shape, np.empty(labels.shape, dtype).strides, 0) if wants_rows else None
    kernel, n_elements, table = _index_plan(
        _views.layout(logits),
        _views.layout(labels),
        out_layout,
        axis,
        ignore_index,
        False,
        smoothed,
        is_nll,
        not wants_rows,
    )
    weight = _padded_weights(None, n_classes if smoothed else 0, dtype)
    dtypes = _views.storage_dtype(logits.dtype), np.dtype(np.uint8)
    keep, spread = 1.0 - label_smoothing, label_smoothing / n_classes
    divisor = 0 if reduction == "mean" else 1
    _remember(key, kernel, n_elements, dtypes, weight, shape, dtype, table, divisor, keep, spread)


def _remember_kl(
    key: Any, log_probabilities: Array, target: Array, dtype: np.dtype[Any], reduction: str, log_target: bool
) -> None:
    """Keep a call of :func:`kl_div`, if it is a short one of two arrays of one shape."""
    shape = log_probabilities.shape
    is_plain = target.shape == shape and _is_plain(log_probabilities) and _is_plain(target)
    if key is None or not (is_plain and target.size):
        return
    from fastloss._kernels import pointwise

    wants_rows = reduction == "none"
    options = _views.Options(wants_rows=wants_rows, wants_sum=not wants_rows, is_log=log_target)
    out = np.empty(shape, dtype) if wants_rows else None
    arrays = ((log_probabilities, None), (target, None), (out, None))
    (flat, flat_target, _), table = _views.lay_out(shape, 1, _views.ELEMENT_TILE, arrays, dtype, options)
    divisor = shape[0] if reduction == "batchmean" and shape else 1

    dtypes, kept = (flat.dtype, flat_target.dtype), shape if wants_rows else None
    _remember(key, pointwise.kl, target.size, dtypes, _views.one(dtype), kept, dtype, table, divisor)


def _scalar(value: float, dtype: np.dtype[Any]) -> Any:
    if -_LARGEST_FLOAT32 < value < _LARGEST_FLOAT32:
        return dtype.type(value)
    with np.errstate(over="ignore"):
        return dtype.type(value)


@functools.lru_cache(maxsize=8)
def _unit_weights(n_classes: int, dtype: np.dtype[Any]) -> Array:
    return np.ones(n_classes + _PADDING, dtype)


def _padded_weights(weights: Array | None, n_classes: int, dtype: np.dtype[Any]) -> Array:
    """The weights in the compute dtype, padded."""
    if weights is None:
        return _unit_weights(n_classes, dtype)
    padded = np.zeros(n_classes + _PADDING, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        padded[:n_classes] = weights
    return padded


def _index_options(
    dtype: np.dtype[Any],
    ignore_index: int,
    weighted: bool,
    wants_rows: bool,
    wants_sum: bool,
    wants_correct: bool = False,
) -> _views.Options:
    """The options of a kernel with index targets of this dtype."""
    from fastloss._kernels.tiles import TARGET_KINDS

    is_bool = dtype.kind == "b"
    integer = np.dtype(np.uint8) if is_bool else dtype
    limits = np.iinfo(integer)
    low, high = (0, 1) if is_bool else (int(limits.min), int(limits.max))
    has_ignore = low <= ignore_index <= high
    bits = (ignore_index + 2**63) % 2**64 - 2**63 if has_ignore else 0
    kind = TARGET_KINDS.index(f"{'u' if integer.kind == 'u' else ''}int{8 * integer.itemsize}")
    return _views.Options(kind, has_ignore, bits, weighted, wants_rows, wants_sum, wants_correct=wants_correct)


@functools.lru_cache(maxsize=512)
def _index_plan(
    logits: _views.Layout,
    target: _views.Layout,
    result: _views.Layout | None,
    axis: int,
    ignore_index: int,
    weighted: bool,
    smoothed: bool,
    is_nll: bool,
    wants_sum: bool,
    wants_correct: bool = False,
) -> tuple[Any, int, Array]:
    """The kernel for arrays that lie as told, what its work amounts to (in elements), and its geometry."""
    from fastloss._kernels import gather, losses

    dtype, shape, strides, _ = logits
    target_dtype, rows, _, _ = target
    n_classes, n_rows = shape[axis], math.prod(rows)
    in_rows = _views.is_in_rows(n_rows, n_classes, _views.compute_dtype(dtype), strides[axis] == dtype.itemsize)
    if is_nll:
        kernel = gather.nll
    elif smoothed:
        kernel = losses.smoothed_rows if in_rows else losses.smoothed_planes
    else:
        kernel = losses.cross_entropy_rows if in_rows else losses.cross_entropy_planes
    tile = _views.entry_tile_rows(n_rows) if is_nll else _views.tile_rows(n_rows, n_classes, in_rows)
    options = _index_options(target_dtype, ignore_index, weighted, result is not None, wants_sum, wants_correct)
    table = _views.geometry(rows, n_classes, tile, ((logits, axis), (target, None), (result, None)), options)
    return kernel, (_GATHER_COST if is_nll else n_classes) * n_rows, table


def _index_loss(
    logits: Array,
    target: Array,
    axis: int,
    weights: Array | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    is_nll: bool,
) -> Any:
    """Cross-entropy or negative log-likelihood with class indices."""
    dtype = _views.compute_dtype(logits.dtype)
    out = np.empty(target.shape, dtype) if reduction == "none" else None
    ledger = None if out is not None else _forks.runtime().new_ledger()
    sums = _add_index_loss(ledger, logits, target, axis, weights, ignore_index, label_smoothing, is_nll, out)
    if out is not None:
        return out[()]

    def ends() -> list[Any]:
        return [_index_loss(logits, target, axis, weights, ignore_index, "sum", eps, is_nll) for eps in (0.0, 1.0)]

    return _reduce_index_loss(*sums, weights is not None, label_smoothing, reduction, dtype, ends)


def _add_index_loss(
    ledger: Array | None,
    logits: Array,
    target: Array,
    axis: int,
    weights: Array | None,
    ignore_index: int,
    label_smoothing: float,
    is_nll: bool,
    out: Array | None,
    wants_correct: bool = False,
) -> tuple[float, float, int]:
    """The sums of the losses and of the weights of the targets kept, and how many those are.

    With ``wants_correct``, the ledger counts the targets that are their rows' predictions, too.
    """
    n_classes = logits.shape[axis]
    dtype = _views.compute_dtype(logits.dtype)
    weighted, wants_sum = weights is not None, ledger is not None
    total, weight_sum, kept = 0.0, 0.0, 0
    if target.size:
        runtime = _forks.runtime()
        ledger = runtime.new_ledger() if ledger is None else ledger
        weight = _padded_weights(weights, n_classes if weighted or label_smoothing else 0, dtype)
        keep, spread = 1.0 - label_smoothing, label_smoothing / n_classes
        inputs = ((logits, axis, False), (target, None, True))
        for x, labels, result in _views.readable_pieces(inputs, (out, None), dtype):
            flat, x_layout = _views.flatten(x)
            flat_labels, labels_layout = _views.flatten(labels, is_index=True)
            flat_out, out_layout = (_views.one(dtype), None) if result is None else _views.flatten(result)
            kernel, n_elements, table = _index_plan(
                x_layout,
                labels_layout,
                out_layout,
                axis,
                ignore_index,
                weighted,
                label_smoothing > 0,
                is_nll,
                wants_sum,
                wants_correct,
            )
            total, weight_sum, kept, bad = runtime.run_tiles(
                kernel, n_elements, ledger, flat, flat_labels, weight, flat_out, table, keep, spread
            )
            if bad:
                _validation.target_out_of_range(target, n_classes, ignore_index)
    return total, weight_sum, kept


def _reduce_index_loss(
    total: float,
    weight_sum: float,
    kept: int,
    weighted: bool,
    label_smoothing: float,
    reduction: str,
    dtype: np.dtype[Any],
    ends: Callable[[], Sequence[Any]],
) -> Any:
    """The sum or the mean; ``ends`` are the sums for a label smoothing of 0 and of 1."""
    if reduction == "mean":
        denominator = weight_sum if weighted else float(kept)
        if label_smoothing and kept and denominator == 0:
            # Kept weights that sum to 0: PyTorch divides the two terms of the loss one by one.
            plain, uniform = (_reduction.divide(float(end), 0.0) for end in ends())
            total = (1.0 - label_smoothing) * plain + label_smoothing * uniform
        else:
            total = _reduction.divide(total, denominator)
    return _scalar(total, dtype)


def _probability_loss(
    logits: Array, target: Array, axis: int, weights: Array | None, reduction: str, label_smoothing: float
) -> Any:
    """Cross-entropy with class probabilities."""
    shape = _validation.row_shape(logits.shape, axis)
    dtype = _views.compute_dtype(logits.dtype, target.dtype)
    out = np.empty(shape, dtype) if reduction == "none" else None
    ledger = None if out is not None else _forks.runtime().new_ledger()
    total = _add_probability_loss(ledger, logits, target, axis, weights, label_smoothing, out)
    if out is not None:
        return out[()]
    if reduction == "mean":
        total = _reduction.divide(total, math.prod(shape))
    return _scalar(total, dtype)


def _add_probability_loss(
    ledger: Array | None,
    logits: Array,
    target: Array,
    axis: int,
    weights: Array | None,
    label_smoothing: float,
    out: Array | None,
) -> float:
    """The sum of the losses."""
    runtime = _forks.runtime()
    from fastloss._kernels import losses

    n_classes = logits.shape[axis]
    dtype = _views.compute_dtype(logits.dtype, target.dtype)
    total = 0.0
    if logits.size:
        weight = _padded_weights(weights, n_classes, dtype)
        options = _views.Options(wants_rows=out is not None, wants_sum=ledger is not None)
        ledger = runtime.new_ledger() if ledger is None else ledger
        keep, spread = 1.0 - label_smoothing, label_smoothing / n_classes
        for x, y, result in _views.readable_pieces(((logits, axis, False), (target, axis, False)), (out, None), dtype):
            rows = _validation.row_shape(x.shape, axis)
            n_rows = math.prod(rows)
            in_rows = _views.is_in_rows(n_rows, n_classes, dtype, x.strides[axis] == x.itemsize)
            tile = _views.tile_rows(n_rows, n_classes, in_rows)
            arrays = ((x, axis), (y, axis), (result, None))
            (flat, flat_y, flat_out), table = _views.lay_out(rows, n_classes, tile, arrays, dtype, options)
            kernel = losses.probabilities_rows if in_rows else losses.probabilities_planes
            total, _, _, _ = runtime.run_tiles(
                kernel, x.size, ledger, flat, flat_y, weight, flat_out, table, keep, spread
            )
    return total


def _add_kl(
    ledger: Array | None,
    log_probabilities: Array,
    target: Array,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    log_target: bool,
    out: Array | None,
) -> float:
    """The sum of the pointwise divergence."""
    runtime = _forks.runtime()
    from fastloss._kernels import pointwise

    total = 0.0
    if math.prod(shape):
        options = _views.Options(wants_rows=out is not None, wants_sum=ledger is not None, is_log=log_target)
        ledger = runtime.new_ledger() if ledger is None else ledger
        inputs = tuple((np.broadcast_to(a, shape), None, False) for a in (log_probabilities, target))
        for x, y, result in _views.readable_pieces(inputs, (out, None), dtype):
            arrays = ((x, None), (y, None), (result, None))
            (flat, flat_y, flat_out), table = _views.lay_out(x.shape, 1, _views.ELEMENT_TILE, arrays, dtype, options)
            total, _, _, _ = runtime.run_tiles(pointwise.kl, x.size, ledger, flat, flat_y, flat_out, flat_out, table)
    return total


def _logsumexp(
    values: Array, axes: tuple[int, ...], dtype: np.dtype[Any], key: Any = None, kept: tuple[int, ...] = ()
) -> Array:
    """Log-sum-exp over some axes, which are gone from the result (``kept`` is its shape if the call is remembered)."""
    runtime = _forks.runtime()
    from fastloss._kernels import driver, losses

    shape = tuple(n for a, n in enumerate(values.shape) if a not in axes)
    n_classes = math.prod(values.shape[a] for a in axes)
    out = np.empty(shape, dtype)
    if not out.size or not n_classes:
        out.fill(-np.inf)
        return out
    if len(axes) > 1 and not (_views.lies_well(values) and _views.follows_on(values, axes)):
        # log-sum-exp of log-sum-exps, the longest axis first, in float64
        longest = max(axes, key=lambda a: values.shape[a])
        partial = _logsumexp(values, (longest,), np.dtype(np.float64))
        others = tuple(a - (a > longest) for a in axes if a != longest)
        with np.errstate(over="ignore"):
            return _logsumexp(partial, others, np.dtype(np.float64)).astype(dtype)
    classes_last = np.moveaxis(values, axes, range(len(shape), values.ndim)).reshape(*shape, n_classes)
    inputs = ((classes_last, len(shape), False),)
    for x, result in _views.readable_pieces(inputs, (out, None), _views.compute_dtype(values.dtype)):
        n_rows = x.size // n_classes
        in_rows = _views.is_in_rows(n_rows, n_classes, dtype, x.strides[-1] == x.itemsize)
        tile = _views.tile_rows(n_rows, n_classes, in_rows)
        if not in_rows and n_classes > driver.GROUP:
            tile = _views.wide_tile_rows(n_rows, -(-n_classes // driver.CHUNK), runtime.num_threads())
        arrays = ((x, len(shape)), (result, None))
        (flat, flat_out), table = _views.lay_out(x.shape[:-1], n_classes, tile, arrays, dtype, _views.Options())
        kernel = losses.logsumexp_rows if in_rows else losses.logsumexp_planes
        runtime.run_tiles(kernel, x.size, runtime.NO_LEDGER, flat, flat, flat_out, flat_out, table)
    if key is not None and _is_plain(values):
        dtypes = (flat.dtype, flat.dtype)
        _remember(key, kernel, values.size, dtypes, _views.one(dtype), kept, dtype, table)
    return out


def _softmax(input: npt.ArrayLike, axis: Any, is_log: bool) -> Any:
    """Both of :func:`softmax` and :func:`log_softmax`."""
    runtime = _forks.runtime()
    from fastloss._kernels import outputs

    key = None
    if type(input) is np.ndarray and (axis is _LAST or type(axis) is int):
        key = "log_softmax" if is_log else "softmax", input.dtype, input.shape, axis
        call = _short_calls.get(key)
        if call is not None and (value := call(input, input)) is not None:
            return value
    values = _validation.as_real(input, "input")
    axis = _validation.check_axis(-1 if axis is _LAST else axis, values.ndim)
    dtype = _views.compute_dtype(values.dtype)
    out = np.empty_like(values, dtype, subok=False)
    if out.size:
        logits, probabilities = (values.reshape(1), out.reshape(1)) if values.ndim == 0 else (values, out)
        n_classes = logits.shape[axis]
        for x, result in _views.readable_pieces(((logits, axis, False),), (probabilities, axis), dtype):
            rows = _validation.row_shape(x.shape, axis)
            n_rows = math.prod(rows)
            in_rows = _views.is_in_rows(n_rows, n_classes, dtype, x.strides[axis] == x.itemsize)
            tile = _views.tile_rows(n_rows, n_classes, in_rows)
            options = _views.Options(is_log=is_log)
            arrays = ((x, axis), (result, axis))
            (flat, flat_out), table = _views.lay_out(rows, n_classes, tile, arrays, dtype, options)
            kernel = outputs.softmax_rows if in_rows else outputs.softmax_planes
            runtime.run_tiles(kernel, x.size, runtime.NO_LEDGER, flat, flat, flat_out, flat_out, table)
        if key is not None and _is_plain(values):
            dtypes = (flat.dtype, flat.dtype)
            _remember(key, kernel, values.size, dtypes, _views.one(dtype), values.shape, dtype, table)
    return out[()]
