"""The losses chunk by chunk: for data that does not fit in memory, or arrives over time, or lies on several machines.

A stream holds the options of its function and the exact sums of the losses so far: ``update`` adds a chunk,
``merge_state`` adds other streams, ``compute`` gives what the function would give for all rows together. It does so to
the last bit, for every way of cutting the rows into chunks, every order and every number of threads, because the sums
are kept without rounding error: within a chunk in a long accumulator (Kulisch, Computer Arithmetic and Validity, 2008),
filled block by block by pre-rounding (Demmel and Nguyen, Parallel reproducible summation, IEEE Trans. Computers 64,
2015; see :mod:`fastloss._kernels.sums`), and between chunks in an integer of any length. The functions' own ``'sum'``
and ``'mean'`` are taken from the same accumulator.

What a stream has in common with all its chunks (number of classes, kind of target, dtype of the losses) is set by the
first one. A chunk that does not fit is refused, and the stream stays as it was.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from fastloss import _forks, _labels, _reduction, _validation, _views, functional, metrics
from fastloss._reduction import ExactSum
from fastloss._validation import Array

__all__ = ["NLL", "CrossEntropy", "KLDivergence", "LogLoss", "Perplexity"]

_INDICES, _PROBABILITIES = "class indices", "class probabilities"


@dataclasses.dataclass(frozen=True)
class State:
    """What is known of the chunks so far: what they have in common, counts (without bounds), and exact sums.

    ``sums`` are those of the losses and of the weights; where a smoothed mean may need them, also those of the losses
    for a label smoothing of 0 and of 1.
    """

    common: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: int = 0
    kept: int = 0
    sums: tuple[ExactSum, ...] = ()

    def check(self, common: dict[str, str]) -> None:
        """Raise for a chunk that has something else in common."""
        for name, value in common.items():
            known = self.common.get(name, value)
            if value != known:
                raise ValueError(f"input: got a chunk with {name} {value}, expected {known} as in the chunks before")

    def __add__(self, other: "State") -> "State":
        self.check(other.common)
        if not (self.sums and other.sums):
            sums = self.sums or other.sums
        else:
            sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        return State(self.common | other.common, self.rows + other.rows, self.kept + other.kept, sums)

    def total(self, index: int = 0) -> float:
        """One of the sums, rounded; 0 if there was no chunk."""
        return self.sums[index].total if self.sums else 0.0

    def to_json(self) -> dict[str, Any]:
        """The state as what JSON has."""
        return {
            "common": self.common,
            "rows": str(self.rows),
            "kept": str(self.kept),
            "sums": [s.to_json() for s in self.sums],
        }

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> "State":
        """The state that was written."""
        sums = tuple(map(ExactSum.from_json, held["sums"]))
        return cls(dict(held["common"]), int(held["rows"]), int(held["kept"]), sums)


class _Stream:
    """What the classes share. The options are the attributes that ``_options`` names."""

    _options: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._state = State()

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)
        state = self._state
        found = {**state.common, "rows": state.rows, "kept": state.kept, "sum": state.total()}
        return f"<{type(self).__name__}({options}): {', '.join(f'{name} {value}' for name, value in found.items())}>"

    def _key(self) -> tuple[Any, ...]:
        """The options as values that compare."""
        return tuple(_validation.option_key(getattr(self, name)) for name in self._options)

    def reset(self) -> Self:
        """Forget all chunks.

        Returns
        -------
        self
        """
        self._state = State()
        return self

    def merge_state(self, others: Any) -> Self:
        """Add what other streams have seen: afterwards it is as if this one had seen their chunks too.

        Parameters
        ----------
        others : stream or iterable of streams
            Of the same class and options, with chunks that fit. They stay as they are.

        Returns
        -------
        self

        Raises
        ------
        TypeError
            For what is no stream of this class.
        ValueError
            For other options, or chunks that do not fit. Nothing is merged then.
        """
        state = self._state
        for other in [others] if isinstance(others, _Stream) or not isinstance(others, Iterable) else others:
            if type(other) is not type(self):
                raise TypeError(f"others: got {type(other).__name__}, expected {type(self).__name__}")
            if other._key() != self._key():
                raise ValueError(f"others: got {other!r}, expected the options of {self!r}")
            state = state + other._state
        self._state = state
        return self


def _sums_of(*states: Array) -> tuple[ExactSum, ...]:
    return tuple(map(ExactSum.of_state, states))


def _ledger_sums(ledger: Array) -> tuple[ExactSum, ...]:
    """The two sums of a ledger, see :mod:`fastloss._kernels.driver`."""
    from fastloss._kernels.driver import KEPT, SECOND_SUM

    return _sums_of(ledger[0, :SECOND_SUM], ledger[0, SECOND_SUM:KEPT])


def _count_correct(ledger: Array) -> int:
    from fastloss._kernels.driver import CORRECT

    return int(ledger[0, CORRECT])


def _new_ledger() -> Array:
    ledger: Array = _forks.runtime().new_ledger()
    return ledger


class _TargetStream(_Stream):
    """Cross-entropy and negative log-likelihood."""

    weight: Array | None
    ignore_index: int
    reduction: str
    label_smoothing = 0.0
    _is_nll: ClassVar[bool]

    def __init__(
        self, weight: npt.ArrayLike | None, size_average: Any, ignore_index: Any, reduce: Any, reduction: Any
    ) -> None:
        super().__init__()
        self.weight = _validation.held_weight(weight)
        self.ignore_index = _validation.check_ignore_index(ignore_index)
        self.reduction = _reduction.resolve(reduction, size_average, reduce, _reduction.STREAM_REDUCTIONS)

    def update(self, input: npt.ArrayLike, target: npt.ArrayLike) -> Self:
        """Add the rows of a chunk.

        Parameters
        ----------
        input, target : array_like
            As the function takes them, with as many classes, the kind of target and the dtype of the losses of the
            chunks before; everything but the class axis may be of any length, 0 included.

        Returns
        -------
        self

        Raises
        ------
        ValueError, IndexError, TypeError
            As the function, and a ValueError for a chunk that does not fit those before. The stream stays as it was.
        """
        self._update(input, target)
        return self

    def _update(
        self, input: npt.ArrayLike, target: npt.ArrayLike, out: Array | None = None, wants_correct: bool = False
    ) -> int:
        """Add a chunk, and write its losses to ``out`` if that is an array, of the shape of the rows. How many class
        indices are their rows' predictions, if they are to be counted.
        """
        logits, labels, axis, weights = functional._check(input, target, self.weight, self.ignore_index, self._is_nll)
        has_probabilities = labels.shape == logits.shape and not self._is_nll
        dtypes = (logits.dtype, labels.dtype) if has_probabilities else (logits.dtype,)
        common = {
            "classes": str(logits.shape[axis]),
            "target": _PROBABILITIES if has_probabilities else _INDICES,
            "dtype": _views.compute_dtype(*dtypes).name,
        }
        self._state.check(common)
        rows = math.prod(_validation.row_shape(logits.shape, axis))
        n_correct = 0
        if has_probabilities:
            ledger = _new_ledger()
            functional._add_probability_loss(ledger, logits, labels, axis, weights, self.label_smoothing, out)
            chunk = State(common, rows, rows, _ledger_sums(ledger))
        else:
            sums: tuple[ExactSum, ...] = ()
            kept = 0
            for epsilon in self._smoothings(weights, common["dtype"]):
                ledger = _new_ledger()
                *_, counted = functional._add_index_loss(
                    ledger,
                    logits,
                    labels,
                    axis,
                    weights,
                    self.ignore_index,
                    epsilon,
                    self._is_nll,
                    None if sums else out,
                    wants_correct and not sums,
                )
                if not sums:
                    kept, n_correct = counted, _count_correct(ledger)
                sums += _ledger_sums(ledger)[: 1 if sums else 2]
            chunk = State(common, rows, kept, sums)
        self._state = self._state + chunk
        return n_correct

    def _smoothings(self, weights: Array | None, dtype: str) -> tuple[float, ...]:
        """The label smoothing; and 0 and 1, whose sums decide the mean should the weights sum to 0, which they can."""
        if weights is None or not self.label_smoothing:
            return (self.label_smoothing,)
        counted = functional._padded_weights(weights, len(weights), np.dtype(dtype))[: len(weights)]
        return (self.label_smoothing,) if (counted > 0).all() else (self.label_smoothing, 0.0, 1.0)

    def compute(self) -> Any:
        """Reduce all chunks so far.

        Returns
        -------
        numpy scalar
            What the function gives for all rows together, to the last bit. Without any chunk that is the sum (0) or the
            mean (NaN) of no rows, in float64.
        """
        return self._reduced(self.reduction)

    def _reduced(self, reduction: str) -> Any:
        state = self._state
        dtype = np.dtype(state.common.get("dtype", "float64"))
        if state.common.get("target") == _PROBABILITIES:
            total = state.total()
            return functional._scalar(_reduction.divide(total, state.rows) if reduction == "mean" else total, dtype)
        return functional._reduce_index_loss(
            state.total(0),
            state.total(1),
            state.kept,
            self.weight is not None,
            self.label_smoothing,
            reduction,
            dtype,
            lambda: [functional._scalar(state.total(index), dtype) for index in (2, 3)],
        )


class CrossEntropy(_TargetStream):
    """Cross-entropy between logits and class indices or class probabilities, chunk by chunk.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As :func:`fastloss.cross_entropy`; `reduction` is ``'mean'`` or ``'sum'``.

    Raises
    ------
    ValueError, TypeError
        For options that no call could have.

    See Also
    --------
    fastloss.cross_entropy : What ``compute`` gives; shapes, special values and errors are described there.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.streaming import CrossEntropy
    >>> logits, targets = np.array([[2.0, 0.5], [0.1, 0.2], [1.0, -1.0]]), np.array([0, 1, 1])
    >>> loss = CrossEntropy(label_smoothing=0.1)
    >>> for rows in (slice(0, 2), slice(2, 3)):
    ...     loss = loss.update(logits[rows], targets[rows])
    >>> print(loss.compute().round(6))
    0.984246
    >>> loss  # doctest: +ELLIPSIS
    <CrossEntropy(weight=None, ..., label_smoothing=0.1): classes 2, ..., dtype float64, rows 3, kept 3, sum 2.95...>
    """

    _options = ("weight", "ignore_index", "reduction", "label_smoothing")
    _is_nll = False

    def __init__(
        self,
        weight: npt.ArrayLike | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction)
        self.label_smoothing = _validation.check_label_smoothing(label_smoothing)


class NLL(_TargetStream):
    """Negative log-likelihood of class indices under log-probabilities, chunk by chunk.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction
        As :func:`fastloss.nll_loss`; `reduction` is ``'mean'`` or ``'sum'``.

    Raises
    ------
    ValueError, TypeError
        For options that no call could have.

    See Also
    --------
    fastloss.nll_loss : What ``compute`` gives.

    Examples
    --------
    >>> from fastloss.streaming import NLL
    >>> first = NLL(reduction="sum").update([[-0.5, -1.0]], [0])
    >>> second = NLL(reduction="sum").update([[-2.0, -0.25]], [1])
    >>> print(first.merge_state(second).compute())
    0.75
    """

    _options = ("weight", "ignore_index", "reduction")
    _is_nll = True

    def __init__(
        self,
        weight: npt.ArrayLike | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction)


class KLDivergence(_Stream):
    """Kullback-Leibler divergence, chunk by chunk.

    Parameters
    ----------
    size_average, reduce, reduction, log_target
        As :func:`fastloss.kl_div`; `reduction` is ``'mean'`` (of all elements: that is not the divergence, and
        ``compute`` warns as the function does), ``'batchmean'`` or ``'sum'``.

    Raises
    ------
    ValueError
        For an unknown reduction.

    See Also
    --------
    fastloss.kl_div : What ``compute`` gives.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.streaming import KLDivergence
    >>> p, log_q = np.array([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    >>> print(KLDivergence(reduction="batchmean").update(log_q, p).update(log_q, p).compute().round(6))
    0.173287
    """

    _options = ("reduction", "log_target")

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__()
        self._is_deprecated = size_average is not None or reduce is not None
        self.reduction = _reduction.resolve(reduction, size_average, reduce, _reduction.KL_STREAM_REDUCTIONS)
        self.log_target = bool(log_target)

    def update(self, input: npt.ArrayLike, target: npt.ArrayLike) -> Self:
        """Add the rows of a chunk.

        Parameters
        ----------
        input, target : array_like
            As :func:`fastloss.kl_div` takes them, cut along the first axis: `input` has one row or more of its own for
            every row of the result, and all other axes are as long as in the chunks before, broadcast. `target` may
            broadcast.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            As the function, and a ValueError for a chunk that does not fit those before. The stream stays as it was.
        """
        log_probabilities = _validation.as_real(input, "input")
        goal = _validation.as_real(target, "target")
        shape = _validation.broadcast_shape(log_probabilities, goal)
        if not shape or log_probabilities.shape[:1] != shape[:1] or log_probabilities.ndim != len(shape):
            raise ValueError(
                f"input: got shape {log_probabilities.shape}, which broadcasts to {shape}, "
                "expected a chunk of rows: a first axis, as long as that of the result"
            )
        dtype = _views.compute_dtype(log_probabilities.dtype, goal.dtype)
        common = {"shape of a row": str(shape[1:]), "dtype": dtype.name}
        self._state.check(common)
        self._state = self._state + _kl_state(log_probabilities, goal, self.log_target, common)
        return self

    def compute(self) -> Any:
        """Reduce all chunks so far.

        Returns
        -------
        numpy scalar
            What the function gives for all rows together, to the last bit. Without any chunk that is the sum (0) or the
            mean (NaN) of no rows, in float64.
        """
        if self.reduction == "mean" and not self._is_deprecated:
            _validation.warn(functional.MEAN_IS_NOT_THE_DIVERGENCE)
        state = self._state
        total = state.total()
        if self.reduction != "sum":
            total = _reduction.divide(total, state.kept if self.reduction == "mean" else state.rows)
        return functional._scalar(total, np.dtype(state.common.get("dtype", "float64")))


def _kl_state(log_probabilities: Array, target: Array, log_target: bool, common: dict[str, str]) -> State:
    """The state of one chunk: its rows, how many elements they hold, and their sum."""
    shape = np.broadcast_shapes(log_probabilities.shape, target.shape)
    dtype = _views.compute_dtype(log_probabilities.dtype, target.dtype)
    ledger = _new_ledger()
    functional._add_kl(ledger, log_probabilities, target, shape, dtype, log_target, None)
    return State(common, shape[0] if shape else 1, math.prod(shape), _ledger_sums(ledger)[:1])


@contextlib.contextmanager
def _named(**names: str) -> Iterator[None]:
    """Errors that name the arguments of a function of :mod:`fastloss.metrics`, naming those of ``update`` instead."""
    try:
        yield
    except (ValueError, TypeError, IndexError) as error:
        message = str(error)
        for name, ours in names.items():  # which the data, in quotation marks, may be called as well
            message = re.sub(rf"(?<!['\"\w]){name}(?!['\"\w])", ours, message)
        raise type(error)(message) from None


class _MetricStream(_Stream):
    """Metrics of :mod:`fastloss.metrics`, whose rows may have weights."""

    def _common(self, n_classes: int, is_weighted: bool, dtype: str) -> dict[str, str]:
        common = {"classes": str(n_classes), "sample_weight": "given" if is_weighted else "None", "dtype": dtype}
        self._state.check(common)
        return common

    def _is_weighted(self) -> bool:
        return self._state.common.get("sample_weight") == "given"

    def _add(self, common: dict[str, str], rows: int, kept: int, totals: Array, weights: Array) -> Self:
        """Add a chunk. Its third sum counts the weights that are not 0: a stream without any is refused at the end."""
        some = ExactSum(int(np.count_nonzero(weights)))
        self._state = self._state + State(common, rows, kept, (*_sums_of(*totals), some))
        return self

    def _check_weights(self) -> None:
        if self._is_weighted() and self._state.rows:
            metrics._check_some_weight(self._state.sums[2] != ExactSum())


class LogLoss(_MetricStream):
    """Log loss of predicted probabilities in scikit-learn's conventions, chunk by chunk.

    Parameters
    ----------
    normalize : bool
        Whether to return the mean over the rows, or else their sum.
    labels : array_like, optional
        The classes, to whose sorted labels the columns of the probabilities belong; by default 0, 1, ..., C - 1, since
        a chunk may lack some.

    Raises
    ------
    ValueError, TypeError
        For options that no call could have.

    See Also
    --------
    fastloss.metrics.log_loss : What ``compute`` gives.

    Examples
    --------
    >>> from fastloss.streaming import LogLoss
    >>> loss = LogLoss(labels=["ham", "spam"]).update([[0.1, 0.9], [0.9, 0.1]], ["spam", "ham"])
    >>> print(round(loss.update([[0.8, 0.2], [0.35, 0.65]], ["ham", "spam"]).compute(), 5))
    0.21616
    """

    _options = ("normalize", "labels")

    def __init__(self, *, normalize: bool = True, labels: npt.ArrayLike | None = None) -> None:
        super().__init__()
        metrics._check_flag(normalize, "normalize")
        self.normalize = bool(normalize)
        self.labels = None if labels is None else _labels.as_classes(labels, must_be_sorted=False)

    def update(self, input: npt.ArrayLike, target: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None) -> Self:
        """Add the rows of a chunk.

        Parameters
        ----------
        input, target, sample_weight : array_like
            The arguments `y_proba`, `y_true` and `sample_weight` of :func:`fastloss.metrics.log_loss`, with as many
            classes and the dtype of the probabilities of the chunks before (on which the clipping depends), and weights
            if and only if those had them. A chunk may have no rows.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            As the function, and a ValueError for a chunk that does not fit those before. The stream stays as it was.
        """
        with _named(y_true="target", y_proba="input", y_prob="input"):
            return self._update(target, input, sample_weight)

    def _update(self, y_true: npt.ArrayLike, y_proba: npt.ArrayLike, sample_weight: npt.ArrayLike | None) -> Self:
        """:meth:`update`, whose errors name the arguments of :func:`fastloss.metrics.log_loss`."""
        proba = metrics._as_scores(y_proba, "y_proba", fewest_rows=0)
        y, weights = metrics._check_rows(y_true, proba, sample_weight, weights_may_be_zero=True)
        n_classes = metrics._n_classes(proba)
        dtype = metrics._probability_dtype(y_proba)
        common = self._common(n_classes, sample_weight is not None, dtype.name)
        totals = metrics._new_totals()
        if len(proba):
            listed = np.arange(n_classes) if self.labels is None and y.ndim == 1 else self.labels
            codes = _labels.as_target(y, listed, n_classes, "y_prob")
            metrics._add_log_loss(totals, proba, dtype, codes, weights)
        return self._add(common, len(proba), len(proba), totals, weights)

    def compute(self) -> float:
        """Reduce all chunks so far.

        Returns
        -------
        float
            What the function gives for all rows together, to the last bit.

        Raises
        ------
        ValueError
            Without any rows, or for weights that are all zero, as the function.
        ZeroDivisionError
            For weights whose sum is zero, unless ``normalize=False``.
        """
        state = self._state
        if not state.rows:
            raise ValueError("update: Found array with 0 sample(s) in all chunks while a minimum of 1 is required.")
        self._check_weights()
        return metrics._average(state.total(0), state.total(1), state.rows, self._is_weighted(), self.normalize)


class Perplexity(_MetricStream):
    r"""Perplexity of class indices (tokens) under logits, chunk by chunk.

    Parameters
    ----------
    ignore_index : int
        A class index whose rows count nothing, whatever they hold.

    Raises
    ------
    TypeError
        For an `ignore_index` that is no integer.

    See Also
    --------
    fastloss.metrics.perplexity : What ``compute`` gives.

    Examples
    --------
    >>> from fastloss.streaming import Perplexity
    >>> print(Perplexity().update([[1.0, 1.0], [2.0, 2.0]], [0, 1]).update([[3.0, 4.0]], [-100]).compute())
    2.0
    """

    _options = ("ignore_index",)

    def __init__(self, *, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = _validation.check_ignore_index(ignore_index)

    def update(self, input: npt.ArrayLike, target: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None) -> Self:
        """Add the rows of a chunk.

        Parameters
        ----------
        input, target, sample_weight : array_like
            The arguments `logits`, `y_true` and `sample_weight` of :func:`fastloss.metrics.perplexity`, with as many
            classes and the dtype of the losses of the chunks before, and weights if and only if those had them.

        Returns
        -------
        self

        Raises
        ------
        ValueError, IndexError, TypeError
            As the function, and a ValueError for a chunk that does not fit those before. The stream stays as it was.
        """
        with _named(y_true="target", logits="input"):
            scores, y = metrics._check_tokens(target, input)
            weights = metrics._as_weights(sample_weight, y.shape, may_be_zero=True)
            n_classes = scores.shape[_validation.class_axis(scores)]
            common = self._common(n_classes, sample_weight is not None, _views.compute_dtype(scores.dtype).name)
            totals = metrics._new_totals()
            *_, kept = metrics._add_token_losses(totals, scores, y, weights, self.ignore_index)
        return self._add(common, y.size, kept, totals, weights)

    def compute(self) -> float:
        """Reduce all chunks so far.

        Returns
        -------
        float
            What the function gives for all rows together, to the last bit: NaN if no row counts.

        Raises
        ------
        ValueError
            For weights that are all zero.
        ZeroDivisionError
            For weights whose sum is zero.
        """
        state = self._state
        self._check_weights()
        return metrics._perplexity(state.total(0), state.total(1), state.kept, self._is_weighted())
