"""The losses over dask arrays: lazily, block by block, on threads or on a cluster.

Each block gives a state of :mod:`fastloss.streaming`, a few hundred bytes; the states are merged in a tree. As they are
exact, the result has the bits of the function over the whole array, for every way of cutting it into blocks and every
number of machines, and a block whose worker is lost is simply computed again. Arrays may be cut along all axes but that
of the classes, which is rechunked.

dask is imported by this module, which nothing else of fastloss imports.
"""

import copy
import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import dask.array as da
except ImportError as error:
    raise ImportError("fastloss.dask: dask is not installed (the extra dask)") from error

from fastloss import _labels, _reduction, _validation, _views, functional, metrics, streaming
from fastloss._validation import Array

__all__ = ["cross_entropy", "kl_div", "log_loss", "nll_loss"]

# States merged at a time.
_SPLIT_EVERY = 16

_Stream = streaming.CrossEntropy | streaming.NLL


def cross_entropy(
    input: Any,
    target: Any,
    weight: npt.ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Cross-entropy between logits and class indices or class probabilities, over dask arrays.

    Parameters
    ----------
    input, target : dask array or array_like
        As in :func:`fastloss.cross_entropy`. Where they are cut differently, the target is cut as the input is.
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As in :func:`fastloss.cross_entropy`.

    Returns
    -------
    dask.array.Array
        With ``'none'`` one loss per row, in blocks as the rows of `input`; else 0-d. Nothing is computed yet.

    Raises
    ------
    ValueError, TypeError
        As the function, for what shapes, dtypes and options tell.
    IndexError
        When the result is computed, for a class index out of range: names the first one of a block.

    See Also
    --------
    fastloss.cross_entropy : The loss.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastloss.dask
    >>> logits = da.random.default_rng(0).normal(size=(1000, 10), chunks=(100, 5))
    >>> labels = da.zeros(1000, dtype=int, chunks=100)
    >>> loss = fastloss.dask.cross_entropy(logits, labels)
    >>> print(bool(loss.compute() == fastloss.cross_entropy(logits.compute(), labels.compute())))
    True
    """
    reduction = _reduction.resolve(reduction, size_average, reduce)
    is_rows = reduction == "none"
    stream = streaming.CrossEntropy(
        weight,
        ignore_index=ignore_index,
        reduction="mean" if is_rows else reduction,
        label_smoothing=label_smoothing,
    )
    return _target_loss(stream, input, target, is_rows)


def nll_loss(
    input: Any,
    target: Any,
    weight: npt.ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    """Negative log-likelihood of class indices under log-probabilities, over dask arrays.

    Parameters
    ----------
    input, target : dask array or array_like
        As in :func:`fastloss.nll_loss`. Where they are cut differently, the target is cut as the input is.
    weight, size_average, ignore_index, reduce, reduction
        As in :func:`fastloss.nll_loss`.

    Returns
    -------
    dask.array.Array
        As :func:`cross_entropy`.

    Raises
    ------
    ValueError, TypeError, IndexError
        As :func:`cross_entropy`.

    See Also
    --------
    fastloss.nll_loss : The loss.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastloss.dask
    >>> log_p = da.log(da.full((6, 4), 0.25, chunks=(2, 4)))
    >>> print(fastloss.dask.nll_loss(log_p, [0, 1, 2, 3, 0, 1]).compute().round(4))
    1.3863
    """
    reduction = _reduction.resolve(reduction, size_average, reduce)
    is_rows = reduction == "none"
    stream = streaming.NLL(weight, ignore_index=ignore_index, reduction="mean" if is_rows else reduction)
    return _target_loss(stream, input, target, is_rows)


def kl_div(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """Kullback-Leibler divergence, element by element, over dask arrays.

    Parameters
    ----------
    input, target : dask array or array_like
        As in :func:`fastloss.kl_div`; they broadcast.
    size_average, reduce, reduction, log_target
        As in :func:`fastloss.kl_div`.

    Returns
    -------
    dask.array.Array
        With ``'none'`` of the broadcast shape; else 0-d. Nothing is computed yet.

    Raises
    ------
    ValueError, TypeError
        As the function.

    See Also
    --------
    fastloss.kl_div : The loss.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import fastloss.dask
    >>> p = da.from_array(np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]), chunks=1)
    >>> print(fastloss.dask.kl_div(da.log(p[::-1]), p, reduction="batchmean").compute().round(6))
    0.173287
    """
    is_deprecated = size_average is not None or reduce is not None
    reduction = _reduction.resolve(reduction, size_average, reduce, _reduction.KL_REDUCTIONS)
    if reduction == "mean" and not is_deprecated:
        _validation.warn(functional.MEAN_IS_NOT_THE_DIVERGENCE)
    x, y = _as_dask(input, "input"), _as_dask(target, "target")
    _validation.as_real(_like(x), "input")
    _validation.as_real(_like(y), "target")
    shape = _validation.broadcast_shape(_like(x), _like(y))
    dtype = _views.compute_dtype(x.dtype, y.dtype)
    n_samples = x.shape[0] if x.ndim else 1
    if reduction == "batchmean" and math.isnan(n_samples):
        raise ValueError("input: got an array of unknown length, by which 'batchmean' divides; expected known chunks")
    x, y = da.broadcast_arrays(x, y)
    axes = tuple(range(len(shape)))
    options: dict[str, Any] = {"log_target": bool(log_target)}
    if reduction == "none":
        return da.blockwise(
            functional.kl_div,
            axes,
            x,
            axes,
            y,
            axes,
            reduction="none",
            **options,
            dtype=dtype,
            meta=np.empty((), dtype),
        )
    states = _states(_kl_block, axes, [(x, axes), (y, axes)], options)
    return _merged(states, functools.partial(_finish_kl, reduction, n_samples, dtype), dtype)


def log_loss(
    y_true: Any,
    y_proba: Any,
    *,
    normalize: bool = True,
    sample_weight: Any = None,
    labels: npt.ArrayLike | None = None,
) -> Any:
    """Log loss of predicted probabilities in scikit-learn's conventions, over dask arrays.

    Parameters
    ----------
    y_true, y_proba, sample_weight : dask array or array_like
        As in :func:`fastloss.metrics.log_loss`. What is cut otherwise than the rows of `y_proba` is cut as they are.
    normalize : bool
        Whether to return the mean over the rows, or else their sum.
    labels : array_like, optional
        The classes; by default 0, 1, ..., C - 1, since a block may lack some.

    Returns
    -------
    dask.array.Array
        0-d, of float64. Nothing is computed yet.

    Raises
    ------
    ValueError, TypeError, ZeroDivisionError
        As the function; for what depends on the values, when the result is computed.

    See Also
    --------
    fastloss.metrics.log_loss : The metric.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastloss.dask
    >>> proba = da.full((6, 4), 0.25, chunks=(2, 2))
    >>> print(fastloss.dask.log_loss([0, 1, 2, 3, 0, 1], proba).compute().round(4))
    1.3863
    """
    stream = streaming.LogLoss(normalize=normalize, labels=labels)
    proba = _as_dask(y_proba, "y_proba")
    labels_of_rows = _as_dask(y_true if hasattr(y_true, "dask") else _labels.as_labels(y_true, "y_true"), "y_true")
    rows = [("y_true", labels_of_rows)]
    if sample_weight is not None:
        rows.append(("sample_weight", _as_dask(sample_weight, "sample_weight")))
    metrics._as_scores(_like(proba), "y_proba")
    for name, array in rows:
        if array.ndim not in (1, 2) or _differ(array.shape[0], proba.shape[0]):
            raise ValueError(
                f"{name}: got shape {array.shape} for y_proba of shape {proba.shape}, expected as many rows"
            )
    proba = proba.rechunk({1: -1}) if proba.ndim > 1 else proba
    pairs = [(proba, (0, 1)[: proba.ndim])]
    for name, array in rows:
        array = array.rechunk({1: -1}) if array.ndim > 1 else array
        pairs.append((_cut_alike(array, {0: proba.chunks[0]}, name), (0, 2)[: array.ndim]))
    states = _states(_log_loss_block, (0,), pairs, {"stream": stream})
    return _merged(states, functools.partial(_finish, stream), np.dtype(np.float64))


# ------------------------------------------------------------------------------------------------------------ arrays


def _as_dask(value: Any, name: str) -> Any:
    """A dask array, or anything that NumPy reads, in one block or cut by dask."""
    if isinstance(value, da.Array):
        return value
    array = _validation.as_array(value, name)
    return da.from_array(array, chunks=-1 if array.dtype.hasobject else "auto")


def _like(array: Any, known: bool = True) -> Array:
    """An array of the shape (lengths that are not known are 1; with ``known`` false all but the second are) and dtype,
    for the checks: it takes no memory.
    """
    shape = tuple(1 if math.isnan(n) or not (known or axis == 1) else n for axis, n in enumerate(array.shape))
    return np.broadcast_to(np.zeros((), array.dtype), shape)


def _differ(a: float, b: float) -> bool:
    """Whether two lengths, which may not be known (NaN), are known to differ."""
    return a != b and not (math.isnan(a) or math.isnan(b))


def _cut_alike(array: Any, chunks: dict[int, tuple[float, ...]], name: str) -> Any:
    """The array with these chunks, unless they are not known, where it must have as many."""
    known = {axis: c for axis, c in chunks.items() if not any(map(math.isnan, (*c, *array.chunks[axis])))}
    for axis, expected in chunks.items():
        if axis not in known and len(array.chunks[axis]) != len(expected):
            raise ValueError(
                f"{name}: got {len(array.chunks[axis])} chunks along axis {axis}, expected {len(expected)}, as the "
                "scores have, since the sizes of some are not known; compute_chunk_sizes() finds them"
            )
    return array.rechunk(known) if any(array.chunks[axis] != c for axis, c in known.items()) else array


def _starts(chunks: tuple[float, ...]) -> Any:
    """Where the blocks along an axis begin, one in each block; -1 where that is not known."""
    known = not any(map(math.isnan, chunks))
    starts = np.cumsum([0, *chunks[:-1]]).astype(np.int64) if known else np.full(len(chunks), -1)
    return da.from_array(starts, chunks=1)


# ------------------------------------------------------------------------------------------------------------ graphs


def _target_loss(stream: _Stream, input: Any, target: Any, is_rows: bool) -> Any:
    x, t = _as_dask(input, "input"), _as_dask(target, "target")
    has_probabilities = x.ndim == t.ndim and not stream._is_nll
    if any(map(math.isnan, x.shape[:1] + x.shape[2:] + t.shape)):
        # The blocks are checked once more when they are there.
        like = _like(x, known=False)
        goal = _like(t, known=False) if has_probabilities else np.broadcast_to(np.zeros((), t.dtype), (1,) * t.ndim)
    else:
        like, goal = _like(x), _like(t)
    _, _, axis, _ = functional._check(like, goal, stream.weight, stream.ignore_index, stream._is_nll)
    dtype = _views.compute_dtype(x.dtype, t.dtype) if has_probabilities else _views.compute_dtype(x.dtype)
    x = x.rechunk({axis: -1})
    axes = tuple(range(x.ndim))
    rows = _views.without(axes, axis)
    if has_probabilities:
        t = _cut_alike(t.rechunk({axis: -1}), {a: x.chunks[a] for a in rows}, "target")
        t_axes = axes
    else:
        t = _cut_alike(t, {i: x.chunks[a] for i, a in enumerate(rows)}, "target")
        t_axes = rows
    pairs = [(x, axes), (t, t_axes), *((_starts(x.chunks[a]), (a,)) for a in rows)]
    if is_rows:
        arguments = [part for pair in pairs for part in pair]
        return da.blockwise(
            _rows_block, rows, *arguments, stream=stream, dtype=dtype, align_arrays=False, meta=np.empty((), dtype)
        )
    return _merged(_states(_target_block, rows, pairs, {"stream": stream}), functools.partial(_finish, stream), dtype)


def _states(
    block: Callable[..., Any], axes: tuple[int, ...], pairs: list[tuple[Any, tuple[int, ...]]], options: dict[str, Any]
) -> Any:
    """An array of objects: the state of each block."""
    arguments = [part for pair in pairs for part in pair]
    return da.blockwise(
        block,
        axes,
        *arguments,
        **options,
        dtype=object,
        adjust_chunks={axis: lambda n: 1 for axis in axes},
        align_arrays=False,
        meta=np.empty((), object),
    )


def _merged(states: Any, finish: Callable[..., Any], dtype: np.dtype[Any]) -> Any:
    """The states merged in a tree, and what is made of the last one."""
    if not states.ndim:
        return states.map_blocks(_finish_one, finish=finish, dtype=dtype, meta=np.empty((), dtype))
    return da.reduction(
        states,
        chunk=_as_it_is,
        combine=_merge,
        aggregate=functools.partial(_merge_and_finish, finish),
        split_every=max(2, round(_SPLIT_EVERY ** (1 / states.ndim))),
        concatenate=True,
        dtype=dtype,
        meta=np.empty((), dtype),
    )


def _whole(block: Any) -> Any:
    """The one block along the axes that the result lacks: dask hands over a list of them, for each axis."""
    while isinstance(block, list):
        (block,) = block
    return block


def _boxed(state: streaming.State, ndim: int) -> Array:
    box = np.empty((1,) * ndim, object)
    box[(0,) * ndim] = state
    return box


def _as_it_is(states: Array, axis: Any, keepdims: bool) -> Array:
    return states


def _sum(states: Array) -> streaming.State:
    total: streaming.State = functools.reduce(operator.add, states.reshape(-1).tolist())
    return total


def _merge(states: Array, axis: Any, keepdims: bool) -> Array:
    return _boxed(_sum(states), states.ndim)


def _merge_and_finish(finish: Callable[[streaming.State], Any], states: Array, axis: Any, keepdims: bool) -> Any:
    return finish(_sum(states))


def _finish_one(states: Array, finish: Callable[[streaming.State], Any]) -> Any:
    return finish(_sum(states))


# ------------------------------------------------------------------------------------------------------------ blocks


def _finish(stream: Any, state: streaming.State) -> Any:
    fresh = copy.copy(stream)  # the stream itself is shared by all tasks of a process
    fresh._state = state
    return np.float64(result) if type(result := fresh.compute()) is float else result


def _place_first(error: IndexError, starts: tuple[Array, ...]) -> IndexError:
    """The error for a target out of range, with its place in the whole array instead of the block."""
    match = re.search(r"^(target: got -?[0-9]+ at )(\([0-9, ]+\)|[0-9]+)(,.*)$", str(error), re.DOTALL)
    offsets = [int(start[0]) for start in starts]
    if match is None or min(offsets, default=-1) < 0:
        return error
    before, place, behind = match.groups()
    position = [int(n) + offset for n, offset in zip(re.findall("[0-9]+", place), offsets, strict=True)]
    return IndexError(f"{before}{tuple(position) if len(position) > 1 else position[0]}{behind}")


def _target_block(x: Any, t: Any, *starts: Array, stream: _Stream) -> Array:
    try:
        state = copy.copy(stream).reset().update(_whole(x), _whole(t))._state
    except IndexError as error:
        raise _place_first(error, starts) from None
    return _boxed(state, len(starts))


def _rows_block(x: Any, t: Any, *starts: Array, stream: _Stream) -> Any:
    logits, target = _whole(x), _whole(t)
    options: dict[str, Any] = {"weight": stream.weight, "ignore_index": stream.ignore_index, "reduction": "none"}
    try:
        if isinstance(stream, streaming.NLL):
            return functional.nll_loss(logits, target, **options)
        return functional.cross_entropy(logits, target, label_smoothing=stream.label_smoothing, **options)
    except IndexError as error:
        raise _place_first(error, starts) from None


def _log_loss_block(*blocks: Any, stream: streaming.LogLoss) -> Array:
    proba, y, *weights = map(_whole, blocks)
    return _boxed(copy.copy(stream).reset()._update(y, proba, *weights or [None])._state, 1)


def _kl_block(x: Array, y: Array, log_target: bool) -> Array:
    return _boxed(streaming._kl_state(x, y, log_target, {}), x.ndim)


def _finish_kl(reduction: str, n_samples: int, dtype: np.dtype[Any], state: streaming.State) -> Any:
    total = state.total()
    if reduction != "sum":
        total = _reduction.divide(total, state.kept if reduction == "mean" else n_samples)
    return functional._scalar(total, dtype)
