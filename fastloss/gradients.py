"""Gradients of the losses with respect to their input, in the pass that computes the loss: no autograd engine.

As in :mod:`fastloss.functional` a call is checked, viewed, run and reduced; the arithmetic is in
:mod:`fastloss._kernels.gradients`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastloss import _forks, _reduction, _validation, _views, functional, modules
from fastloss._validation import Array

__all__ = ["value_and_grad"]

_AnyLayout = _views.Layout | None

# From as many elements on the alignment of a gradient counts, and what it counts in; see the kernels.
_LARGE, _VECTOR_BYTES = 1 << 22, 64


def value_and_grad(loss: Any) -> Callable[..., tuple[Any, Any]]:
    r"""A function that computes a loss and its gradient with respect to `input`.

    Parameters
    ----------
    loss : callable
        :func:`cross_entropy`, :func:`nll_loss` or :func:`kl_div`, or an instance of :class:`CrossEntropyLoss`,
        :class:`NLLLoss` or :class:`KLDivLoss`.

    Returns
    -------
    callable
        A function with the arguments of `loss` and one more keyword, `grad_output`, that returns ``(value, gradient)``.
        The value is that of `loss`, bit for bit. The gradient has the shape and the memory order of `input`; float32
        for float16, bfloat16 and float32 `input`, else float64 (for ``kl_div`` and probabilities of a wider dtype the
        value's dtype).

        `grad_output` is what PyTorch's ``.backward(gradient)`` takes: the gradient, with respect to this loss, of what
        is made of it. It has the shape of the value, and by default is 1; with ``reduction='none'`` it must be given
        unless the value has one element.

    Raises
    ------
    TypeError
        For any other `loss`. The function returned raises what `loss` does, and
    ValueError
        for a `grad_output` of another shape than the value's.

    See Also
    --------
    cross_entropy, nll_loss, kl_div : The losses; shapes, dtypes, special values and errors are described there.

    Notes
    -----
    With :math:`p` the softmax of the logits, the gradient of a row's cross-entropy is :math:`w_t\,(p_c - [c = t])` for
    class indices, and :math:`p_c \sum_k m_k - m_c` for class probabilities and with label smoothing, where :math:`m_c`
    is what multiplies :math:`-\log p_c` in the loss.

    *Accuracy.* With class indices every entry keeps its digits however small it is: the target's entry is the negative
    sum of the others, never formed as :math:`p_t - 1`, which for a confident row would be 0. With label smoothing too;
    with class probabilities an entry is as good as the sum of the masses :math:`m_k` in the dtype of the gradient.
    An entry depends on its row and on the reduction's denominator alone, so its bits are those of any layout and any
    number of threads.

    *Memory.* The logits are read once; the gradient is formed while a row is in the cache, and nothing but the gradient
    is allocated. (Where `input` is broadcast in ``kl_div``, the sums over the broadcast axes in float64 besides.)

    *Special values.* Those of PyTorch's autograd: NaN throughout a row that holds NaN or inf, or nothing but -inf;
    exactly 0 for a masked class of the other rows. Ignored rows are exactly 0, whatever they hold.

    *Differences from PyTorch.* An ignored row that holds NaN has the gradient 0 (PyTorch: NaN). Integers, for which
    PyTorch has no gradient, count as float64.

    Examples
    --------
    >>> import numpy as np
    >>> import fastloss
    >>> logits = np.array([[2.0, 0.5, -1.0], [50.0, 0.0, 0.0]])
    >>> value, gradient = fastloss.value_and_grad(fastloss.cross_entropy)(logits, [1, 0])
    >>> print(value.round(6))
    0.870656
    >>> print(gradient)
    [[ 3.92798517e-01 -4.12354804e-01  1.95562866e-02]
     [-1.92874985e-22  9.64374924e-23  9.64374924e-23]]
    >>> smoothed = fastloss.value_and_grad(fastloss.CrossEntropyLoss(label_smoothing=0.1))
    >>> print(smoothed(logits, [1, 0])[1][0].round(4))
    [ 0.3761 -0.379   0.0029]
    """
    for function, gradient_function in _FUNCTIONS.items():
        if loss is function:
            return gradient_function
    for module, gradient_function in _MODULES.items():
        if type(loss) is module:
            return _with_options(gradient_function, vars(loss))
    raise TypeError(
        f"loss: got {loss!r}, expected cross_entropy, nll_loss, kl_div, "
        "or an instance of CrossEntropyLoss, NLLLoss or KLDivLoss"
    )


def _with_options(function: Callable[..., tuple[Any, Any]], options: dict[str, Any]) -> Callable[..., tuple[Any, Any]]:
    """A function of a loss's arrays alone, with a module's options."""

    def value_and_grad_of_module(
        input: npt.ArrayLike, target: npt.ArrayLike, *, grad_output: npt.ArrayLike | None = None
    ) -> tuple[Any, Any]:
        return function(input, target, grad_output=grad_output, **options)

    return value_and_grad_of_module


# ------------------------------------------------------------------------------------------------- the three losses


def _cross_entropy(
    input: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    grad_output: npt.ArrayLike | None = None,
) -> tuple[Any, Any]:
    """Cross-entropy and its gradient with respect to `input`; see :func:`value_and_grad`."""
    reduction = _reduction.resolve(reduction, size_average, reduce)
    ignore_index = _validation.check_ignore_index(ignore_index)
    label_smoothing = _validation.check_label_smoothing(label_smoothing)
    logits = _validation.as_real(input, "input")
    axis = _validation.class_axis(logits)
    labels = _validation.as_real(target, "target")
    weights = _validation.class_weight(weight, logits.shape[axis])
    if labels.shape == logits.shape:
        _validation.probability_target(labels, ignore_index)
        return _probability_loss(logits, labels, axis, weights, reduction, label_smoothing, grad_output)
    _validation.index_target(labels, logits, axis)
    kind = "smoothed" if label_smoothing else "plain"
    return _index_loss(kind, logits, labels, axis, weights, ignore_index, reduction, label_smoothing, grad_output)


def _nll_loss(
    input: npt.ArrayLike,
    target: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    grad_output: npt.ArrayLike | None = None,
) -> tuple[Any, Any]:
    """Negative log-likelihood and its gradient with respect to `input`; see :func:`value_and_grad`."""
    reduction = _reduction.resolve(reduction, size_average, reduce)
    ignore_index = _validation.check_ignore_index(ignore_index)
    log_probabilities = _validation.as_real(input, "input")
    axis = _validation.class_axis(log_probabilities)
    labels = _validation.as_real(target, "target")
    weights = _validation.class_weight(weight, log_probabilities.shape[axis])
    _validation.index_target(labels, log_probabilities, axis, probabilities=False)
    return _index_loss("nll", log_probabilities, labels, axis, weights, ignore_index, reduction, 0.0, grad_output)


def _kl_div(
    input: npt.ArrayLike,
    target: npt.ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    grad_output: npt.ArrayLike | None = None,
) -> tuple[Any, Any]:
    """Kullback-Leibler divergence and its gradient with respect to `input`; see :func:`value_and_grad`."""
    is_deprecated = size_average is not None or reduce is not None
    reduction = _reduction.resolve(reduction, size_average, reduce, _reduction.KL_REDUCTIONS)
    if reduction == "mean" and not is_deprecated:
        _validation.warn(functional.MEAN_IS_NOT_THE_DIVERGENCE)
    x = _validation.as_real(input, "input")
    y = _validation.as_real(target, "target")
    shape = _validation.broadcast_shape(x, y)
    dtype = _views.compute_dtype(x.dtype, y.dtype)
    upstream = _validation.grad_output(grad_output, shape if reduction == "none" else (), dtype)
    denominator = 1.0
    if reduction == "mean":
        denominator = math.prod(shape)
    elif reduction == "batchmean" and x.ndim:
        denominator = x.shape[0]
    upstream = _divided(upstream, denominator)
    if x.shape == shape:
        gradient = np.empty_like(x, dtype, subok=False)
        total, values = _kl_pointwise(x, y, gradient, upstream, bool(log_target), reduction == "none")
    else:
        values = np.empty(shape, dtype) if reduction == "none" else None
        ledger = None if values is not None else _forks.runtime().new_ledger()
        total = functional._add_kl(ledger, x, y, shape, dtype, bool(log_target), values)
        gradient = _kl_broadcast(x, y, shape, dtype, np.broadcast_to(upstream, shape), bool(log_target))
    if values is not None:
        return values[()], gradient
    return functional._scalar(_reduction.divide(total, denominator), dtype), gradient


_FUNCTIONS: dict[Any, Callable[..., tuple[Any, Any]]] = {
    functional.cross_entropy: _cross_entropy,
    functional.nll_loss: _nll_loss,
    functional.kl_div: _kl_div,
}
_MODULES: dict[type, Callable[..., tuple[Any, Any]]] = {
    modules.CrossEntropyLoss: _cross_entropy,
    modules.NLLLoss: _nll_loss,
    modules.KLDivLoss: _kl_div,
}


# ------------------------------------------------------------------------------------------------------------ helpers


def _divided(upstream: Array, denominator: float) -> Array:
    """What multiplies the gradient of each row's loss. IEEE division, without a warning."""
    if denominator == 1:
        return upstream
    with np.errstate(all="ignore"):
        return np.asarray(upstream.astype(np.float64) / np.float64(denominator)).astype(upstream.dtype)


def _in_order_of(array: Array, dtype: np.dtype[Any], make: Callable[[list[int]], Array]) -> Array:
    """An array of the shape and the memory order of another one, of C-contiguous memory."""
    prototype = np.empty_like(array, dtype, subok=False)  # (never touched)
    order = sorted(range(array.ndim), key=lambda a: -abs(prototype.strides[a]))
    return make([array.shape[a] for a in order]).transpose(np.argsort(order))


def _zeros_like(array: Array, dtype: np.dtype[Any]) -> Array:
    """``numpy.zeros_like`` in memory that the system hands out as zeros: what is not written costs nothing."""
    return _in_order_of(array, dtype, lambda shape: np.zeros(shape, dtype))


def _empty_like(array: Array, axis: int, dtype: np.dtype[Any]) -> Array:
    """``numpy.empty_like``; of large planes on a border of the vectors that the kernels write past the caches."""
    if array.size < _LARGE or array.strides[axis] == array.itemsize:
        return np.empty_like(array, dtype, subok=False)

    def make(shape: list[int]) -> Array:
        memory = np.empty(array.size + _VECTOR_BYTES // dtype.itemsize, dtype)
        start = -memory.__array_interface__["data"][0] % _VECTOR_BYTES // dtype.itemsize
        return memory[start : start + array.size].reshape(shape)

    return _in_order_of(array, dtype, make)


@functools.lru_cache(maxsize=512)
def _plan(
    kind: str, layouts: tuple[_AnyLayout, ...], axis: int, target_axis: int | None, options: _views.Options
) -> tuple[Any, int, Array]:
    """The kernel for arrays that lie as told (logits, target, values, gradient, upstream), what its work amounts to in
    elements, and its geometry.
    """
    _forks.runtime()
    from fastloss._kernels import gradients

    logits, gradient = layouts[0], layouts[3]
    assert logits is not None
    assert gradient is not None
    dtype, shape, strides, _ = logits
    n_classes, rows = shape[axis], _views.without(shape, axis)
    n_rows = math.prod(rows)
    is_contiguous = strides[axis] == dtype.itemsize
    in_rows = kind != "nll" and _views.is_in_rows(n_rows, n_classes, gradient[0], is_contiguous)
    kernel = {
        "plain": (gradients.cross_entropy_planes, gradients.cross_entropy_rows),
        "smoothed": (gradients.smoothed_planes, gradients.smoothed_rows),
        "probabilities": (gradients.probabilities_planes, gradients.probabilities_rows),
        "nll": (gradients.nll, gradients.nll),
    }[kind][in_rows]
    tile = _views.tile_rows(n_rows, n_classes, in_rows)
    axes = (axis, target_axis, None, axis, None)
    table = _views.geometry(rows, n_classes, tile, tuple(zip(layouts, axes, strict=True)), options)
    return kernel, (functional._GATHER_COST if kind == "nll" else n_classes) * n_rows, table


def _weigh_targets(
    target: Array, n_classes: int, weight: Array, dtype: np.dtype[Any], options: _views.Options, ignore_index: int
) -> float:
    """What a mean divides by: the number of the targets kept, or the exact sum of their weights."""
    runtime = _forks.runtime()
    from fastloss._kernels import gradients

    ledger = runtime.new_ledger()
    weight_sum, kept, bad = 0.0, 0, 0
    if target.size:
        out = _views.one(dtype)
        for labels, _ in _views.readable_pieces(((target, None, True),), (None, None), dtype):
            flat, layout = _views.flatten(labels, is_index=True)
            tile = _views.tile_rows(labels.size, 1, False)
            places = ((layout, None), (layout, None))
            table = _views.geometry(labels.shape, n_classes, tile, places, options)
            _, weight_sum, kept, bad = runtime.run_tiles(
                gradients.weigh, labels.size, ledger, flat, flat, weight, out, table
            )
    if bad:
        _validation.target_out_of_range(target, n_classes, ignore_index)
    return weight_sum if options.is_weighted else float(kept)


def _index_loss(
    kind: str,
    logits: Array,
    target: Array,
    axis: int,
    weights: Array | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    grad_output: Any,
) -> tuple[Any, Any]:
    """Cross-entropy or negative log-likelihood with class indices, and the gradient."""
    n_classes = logits.shape[axis]
    dtype = _views.compute_dtype(logits.dtype)
    wants_rows = reduction == "none"
    weighted = weights is not None
    upstream = _validation.grad_output(grad_output, target.shape if wants_rows else (), dtype)
    options = functional._index_options(target.dtype, ignore_index, weighted, wants_rows, not wants_rows)
    counts_classes = weighted or (label_smoothing and target.size)
    weight = functional._padded_weights(weights, n_classes if counts_classes else 0, dtype)
    denominator = 1.0
    if reduction == "mean":
        denominator = _weigh_targets(target, n_classes, weight, dtype, options, ignore_index)
        upstream = _divided(upstream, denominator)
    out = np.empty(target.shape, dtype) if wants_rows else None
    gradient = _zeros_like(logits, dtype) if kind == "nll" else _empty_like(logits, axis, dtype)
    total = 0.0
    if target.size:
        total, bad = _run_rows(
            kind, logits, target, axis, None, weight, upstream, out, gradient, options, label_smoothing
        )
        if bad:
            _validation.target_out_of_range(target, n_classes, ignore_index)
    if out is not None:
        return out[()], gradient
    if reduction == "mean":
        if label_smoothing and denominator == 0 and target.size and weighted:
            value = functional._index_loss(
                logits, target, axis, weights, ignore_index, reduction, label_smoothing, is_nll=False
            )
            return value, gradient
        total = _reduction.divide(total, denominator)
    return functional._scalar(total, dtype), gradient


def _probability_loss(
    logits: Array,
    target: Array,
    axis: int,
    weights: Array | None,
    reduction: str,
    label_smoothing: float,
    grad_output: Any,
) -> tuple[Any, Any]:
    """Cross-entropy with class probabilities, and the gradient."""
    n_classes = logits.shape[axis]
    shape = _validation.row_shape(logits.shape, axis)
    dtype = _views.compute_dtype(logits.dtype, target.dtype)
    wants_rows = reduction == "none"
    upstream = _validation.grad_output(grad_output, shape if wants_rows else (), dtype)
    denominator = math.prod(shape) if reduction == "mean" else 1
    upstream = _divided(upstream, denominator)
    out = np.empty(shape, dtype) if wants_rows else None
    gradient = np.empty_like(logits, dtype, subok=False)
    total = 0.0
    if logits.size:
        weight = functional._padded_weights(weights, n_classes, dtype)
        options = _views.Options(wants_rows=wants_rows, wants_sum=not wants_rows)
        total, _ = _run_rows(
            "probabilities", logits, target, axis, axis, weight, upstream, out, gradient, options, label_smoothing
        )
    if out is not None:
        return out[()], gradient
    return functional._scalar(_reduction.divide(total, denominator), dtype), gradient


def _run_rows(
    kind: str,
    logits: Array,
    target: Array,
    axis: int,
    target_axis: int | None,
    weight: Array,
    upstream: Array,
    out: Array | None,
    gradient: Array,
    options: _views.Options,
    label_smoothing: float,
) -> tuple[float, int]:
    """Write the gradient, and the losses to ``out`` or add them: their sum, and how many targets are out of range."""
    runtime = _forks.runtime()
    ledger = runtime.new_ledger()
    dtype = gradient.dtype
    is_index = target_axis is None
    n_classes = logits.shape[axis]
    keep, spread = 1.0 - label_smoothing, label_smoothing / n_classes
    rows = np.broadcast_to(upstream, _validation.row_shape(logits.shape, axis))
    inputs = ((logits, axis, False), (target, target_axis, is_index), (rows, None, False))
    total, bad = 0.0, 0
    for x, y, scales, result, slopes in _views.readable_pieces(inputs, (out, None), dtype, (gradient, axis)):
        flat, x_layout = _views.flatten(x)
        flat_y, y_layout = _views.flatten(y, is_index=is_index)
        flat_scales, scales_layout = _views.flatten(scales)
        flat_gradient, gradient_layout = _views.flatten(slopes)
        flat_out, out_layout = (_views.one(dtype), None) if result is None else _views.flatten(result)
        layouts = (x_layout, y_layout, out_layout, gradient_layout, scales_layout)
        kernel, n_elements, table = _plan(kind, layouts, axis, target_axis, options)
        arrays = (weight, flat_scales, flat_gradient)
        total, _, _, bad = runtime.run_tiles(
            kernel, n_elements, ledger, flat, flat_y, arrays, flat_out, table, keep, spread
        )
    return total, bad


def _kl_pointwise(
    x: Array, y: Array, gradient: Array, upstream: Array, log_target: bool, wants_rows: bool
) -> tuple[float, Array | None]:
    """Write the gradient; the sum of the pointwise divergence, or (else 0 and None) the pointwise divergence."""
    runtime = _forks.runtime()
    from fastloss._kernels import gradients

    dtype = gradient.dtype
    out = np.empty(x.shape, dtype) if wants_rows else None
    total = 0.0
    if x.size:
        ledger = runtime.new_ledger()
        options = _views.Options(wants_rows=wants_rows, wants_sum=not wants_rows, is_log=log_target)
        inputs = tuple((np.broadcast_to(a, x.shape), None, False) for a in (x, y, upstream))
        for a, b, scales, result, slopes in _views.readable_pieces(inputs, (out, None), dtype, (gradient, None)):
            places = ((a, None), (b, None), (result, None), (slopes, None), (scales, None))
            flats, table = _views.lay_out(a.shape, 1, _views.ELEMENT_TILE, places, dtype, options)
            flat, flat_y, flat_out, flat_gradient, flat_scales = flats
            arrays = (flat_out, flat_scales, flat_gradient)
            total, _, _, _ = runtime.run_tiles(gradients.kl, a.size, ledger, flat, flat_y, arrays, flat_out, table)
    return total, out


def _kl_broadcast(
    x: Array, y: Array, shape: tuple[int, ...], dtype: np.dtype[Any], upstream: Array, log_target: bool
) -> Array:
    """The gradient where the input is broadcast: that of each of its elements is summed over the axes along which it
    is, piece by piece in C order, in float64.
    """
    padded = (1,) * (len(shape) - x.ndim) + x.shape
    summed = tuple(a for a in range(len(shape)) if padded[a] != shape[a])
    total = np.zeros(padded, np.float64)
    goal = np.broadcast_to(y, shape)
    for cut in _views.pieces(shape):
        with np.errstate(all="ignore"):
            piece = np.array(goal[cut], np.float64, order="C")
            piece = -(np.exp(piece, out=piece) if log_target else piece) * upstream[cut]
            place = tuple(slice(0, 1) if a in summed else cut[a] for a in range(len(shape)))
            total[place] += piece.sum(axis=summed, keepdims=True)
    gradient = np.empty_like(x, dtype, subok=False)
    with np.errstate(all="ignore"):
        gradient[...] = total.reshape(x.shape)
    return gradient
