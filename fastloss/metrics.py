"""Evaluation in scikit-learn's style: its ``log_loss``, the same for logits, and scorers for its model selection.

The arguments, their order, the classes and the errors are scikit-learn's: ``y_true`` comes first, labels may be
strings, integers or bool, and the columns of the scores belong to the sorted labels. scikit-learn itself is imported by
the scorers' methods for metadata routing alone, which only scikit-learn and its users call.

The checks of labels are in :mod:`fastloss._labels`, the arithmetic in :mod:`fastloss._kernels.scores`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fastloss import _forks, _labels, _validation, _views, functional
from fastloss._labels import ParameterError, Target
from fastloss._validation import Array

if TYPE_CHECKING:
    from fastloss._kernels._jit import Kernel

__all__ = [
    "brier_score_from_logits",
    "log_loss",
    "log_loss_from_logits",
    "neg_log_loss_from_logits_scorer",
    "neg_log_loss_scorer",
    "perplexity",
    "top_k_accuracy_from_logits",
]

# Rows per tile of the kernels: what fits into the first-level cache, within bounds.
_TILE_BYTES = 1 << 15
_FEWEST_ROWS, _MOST_ROWS = 16, 512
# Scores per call of a kernel, some tenths of a second: Ctrl-C is answered between the calls.
_CUT = 1 << 26
# Where the class axis is strided, rows enough for long runs of memory.
_STRIDED_ROWS = 512


def log_loss(
    y_true: npt.ArrayLike,
    y_proba: npt.ArrayLike | None = None,
    *,
    normalize: bool = True,
    sample_weight: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
    y_pred: Any = "deprecated",
) -> float:
    r"""Log loss of predicted probabilities: ``sklearn.metrics.log_loss`` in every respect but time and memory.

    With :math:`p` the probability that a row gives to its true class, clipped to :math:`[\epsilon, 1 - \epsilon]` where
    :math:`\epsilon` is the machine precision of the dtype of `y_proba`, the loss of the row is :math:`-\log p`.

    Parameters
    ----------
    y_true : array_like
        The true labels, shape ``(n_samples,)``: strings, integers, integral floats or bool; or an indicator matrix of
        shape ``(n_samples, n_classes)``.
    y_proba : array_like
        Probabilities, shape ``(n_samples, n_classes)``, whose columns belong to the sorted labels; or shape
        ``(n_samples,)`` or ``(n_samples, 1)``, the probabilities of the greater of two labels. float16, float32 and
        float64 of NumPy and pandas are what they are; everything else (integers, lists, polars, nullable and
        byte-swapped data) becomes float64, whose precision then clips.
    normalize : bool
        Whether to return the mean over the rows, or else their sum.
    sample_weight : array_like, optional
        One weight per row, shape ``(n_samples,)``.
    labels : array_like, optional
        The classes, where `y_true` may not hold them all. They are sorted, with a warning, if they are not.
    y_pred : array_like
        The old name of `y_proba`, deprecated in scikit-learn 1.9.

    Returns
    -------
    float
        The weighted mean, or the weighted sum, of the losses, in float64 for every dtype.

    Raises
    ------
    ValueError
        For probabilities outside [0, 1] or NaN, inputs of different lengths or of none, fewer than two classes, labels
        that are not among `labels`, numbers of classes that differ, continuous or multioutput labels, or weights that
        are all zero or not finite. What is no array-like, or holds labels of mixed or unknown types, raises an error
        that is a TypeError as well.
    ZeroDivisionError
        For weights whose sum is zero, unless ``normalize=False``.

    See Also
    --------
    log_loss_from_logits : Without clipping, for decision values.
    neg_log_loss_scorer : For ``scoring=``.

    Notes
    -----
    Where the probabilities of a row do not sum to one, within the square root of the machine precision, there is a
    UserWarning; they are taken as they are.

    The losses are the logarithms of the clipped probabilities to float64's precision and their sum is exact, rounded
    once, so it depends on no order and no number of threads.

    Examples
    --------
    >>> from fastloss.metrics import log_loss
    >>> loss = log_loss(["spam", "ham", "ham", "spam"], [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]])
    >>> print(round(loss, 5))
    0.21616
    """
    if not (isinstance(y_pred, str) and y_pred == "deprecated"):
        if y_proba is not None:
            raise ValueError("Cannot use both `y_pred` and `y_proba`. `y_pred` is deprecated, use `y_proba` instead.")
        _validation.warn(
            "`y_pred` was renamed to `y_proba` in version 1.9 and will be removed in 1.11. Use `y_proba` instead.",
            FutureWarning,
        )
        y_proba = y_pred
    _check_flag(normalize, "normalize")
    proba = _as_scores(y_proba, "y_proba")
    y, weights = _check_rows(y_true, proba, sample_weight)
    target = _labels.as_target(y, labels, _n_classes(proba), "y_prob")
    total, weight_sum = _add_log_loss(_new_totals(), proba, _probability_dtype(y_proba), target, weights)
    return _average(total, weight_sum, len(proba), weights.size > 0, normalize)


def log_loss_from_logits(
    y_true: npt.ArrayLike,
    logits: npt.ArrayLike,
    *,
    normalize: bool = True,
    sample_weight: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
) -> float:
    r"""Log loss of logits (decision values), without forming probabilities.

    The loss of a row is :math:`-\log \mathrm{softmax}(x)_t`, that of :func:`fastloss.cross_entropy`. Nothing is
    clipped: a loss keeps its digits where the probability of the true class is nearly 1, and is right where it is
    nearly 0.

    Parameters
    ----------
    y_true : array_like
        As in :func:`log_loss`.
    logits : array_like
        Shape ``(n_samples, n_classes)``, whose columns belong to the sorted labels; or shape ``(n_samples,)`` or
        ``(n_samples, 1)``, the log-odds of the greater of two labels, as ``decision_function`` gives them. Any dtype of
        :func:`fastloss.cross_entropy`; -inf masks a class. Log-odds of -inf and inf are probabilities of 0 and 1.
    normalize, sample_weight, labels
        As in :func:`log_loss`.

    Returns
    -------
    float
        The weighted mean, or the weighted sum, of the losses: inf where a true class has a logit of -inf, or
        infinite log-odds against it.

    Raises
    ------
    ValueError
        For NaN, for rows of two or more logits without a softmax (with inf, or of -inf alone), and as :func:`log_loss`
        for everything else.
    ZeroDivisionError
        For weights whose sum is zero, unless ``normalize=False``.

    See Also
    --------
    log_loss : For probabilities.
    fastloss.cross_entropy : With the options of PyTorch.
    neg_log_loss_from_logits_scorer : For ``scoring=``.

    Notes
    -----
    A row of weight 0 counts nothing, even where its loss is inf. The losses are those of float32 for float32 logits;
    their sum is exact.

    Examples
    --------
    >>> from fastloss.metrics import log_loss, log_loss_from_logits
    >>> print(f"{log_loss_from_logits(['ham', 'spam'], [-50.0, 800.0]):.3g}")
    9.64e-23
    >>> print(log_loss(["ham", "spam"], [0.0, 1.0]))  # the probabilities of these logits, clipped
    2.220446049250313e-16
    """
    _check_flag(normalize, "normalize")
    scores = _as_scores(logits, "logits")
    y, weights = _check_rows(y_true, scores, sample_weight)
    target = _labels.as_target(y, labels, _n_classes(scores), "logits")
    values = _row_losses(scores, target)
    _check_logits(scores, bool(np.isnan(values).any()))
    return _average_values(values, weights, normalize)


def perplexity(
    y_true: npt.ArrayLike,
    logits: npt.ArrayLike,
    *,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
) -> float:
    r"""Perplexity :math:`\exp(\mathrm{mean}(-\log \mathrm{softmax}(x)_t))` of class indices under logits.

    Parameters
    ----------
    y_true : array_like
        Class indices in ``[0, C)`` (tokens), of an integer dtype or bool and the shape of `logits` without its class
        axis.
    logits : array_like
        Shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``, as for :func:`fastloss.cross_entropy`; -inf masks a class.
    sample_weight : array_like, optional
        One weight per class index, of the shape of `y_true`.
    ignore_index : int
        A class index whose rows count nothing, whatever they hold.

    Returns
    -------
    float
        At least 1, if no weight is negative; inf where a class of logit -inf is true; NaN where no row counts.

    Raises
    ------
    ValueError
        For shapes that do not fit, NaN or rows without a softmax (with inf, or of -inf alone) that are not ignored, or
        weights that are all zero or not finite.
    IndexError
        For a class index outside ``[0, C)`` that is not `ignore_index`.
    TypeError
        For class indices or an `ignore_index` that are no integers.
    ZeroDivisionError
        For weights whose sum is zero.

    See Also
    --------
    log_loss_from_logits : Its logarithm, for labels of any kind.

    Notes
    -----
    It is the exponential of scikit-learn's ``log_loss`` of the softmax, where that is not clipped.

    Examples
    --------
    >>> from fastloss.metrics import perplexity
    >>> print(perplexity([0, 1, -100], [[1.0, 1.0], [2.0, 2.0], [3.0, 4.0]]))
    2.0
    """
    scores, y = _check_tokens(y_true, logits)
    weights = _as_weights(sample_weight, y.shape)
    total, weight_sum, kept = _add_token_losses(_new_totals(), scores, y, weights, ignore_index)
    return _perplexity(total, weight_sum, kept, weights.size > 0)


def brier_score_from_logits(
    y_true: npt.ArrayLike,
    logits: npt.ArrayLike,
    *,
    sample_weight: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
    scale_by_half: bool | Literal["auto"] = "auto",
) -> float:
    r"""Brier score of logits: ``sklearn.metrics.brier_score_loss`` of their softmax, without forming it.

    The score of a row is :math:`\sum_c (\mathrm{softmax}(x)_c - y_c)^2`, with :math:`y` the one-hot true class.

    Parameters
    ----------
    y_true : array_like
        As in :func:`log_loss`.
    logits : array_like
        As in :func:`log_loss_from_logits`.
    sample_weight, labels
        As in :func:`log_loss`.
    scale_by_half : bool or 'auto'
        Whether to halve the score, so that it lies in [0, 1]; ``'auto'`` does so for two classes.

    Returns
    -------
    float
        The weighted mean of the scores.

    Raises
    ------
    ValueError, ZeroDivisionError
        As :func:`log_loss_from_logits`.

    See Also
    --------
    log_loss_from_logits : The other strictly proper score.

    Notes
    -----
    The score of a row is the quotient of two sums of positive numbers, so a small score keeps its digits, where
    ``softmax(x) - 1`` has none left: for float32 logits it is within 2e-6 of the exact value, in relative terms.

    *Difference from scikit-learn.* There is no `pos_label`: one column of logits belongs to the greater label, and
    `labels` has to list both where `y_true` holds one alone.

    Examples
    --------
    >>> from fastloss.metrics import brier_score_from_logits
    >>> print(brier_score_from_logits(["ham", "spam"], [0.0, 0.0]))
    0.25
    """
    if scale_by_half != "auto" or not isinstance(scale_by_half, str):
        _check_flag(scale_by_half, "scale_by_half", " or 'auto'")
    scores = _as_scores(logits, "logits")
    y, weights = _check_rows(y_true, scores, sample_weight)
    n_classes = _n_classes(scores)
    target = _labels.as_target(y, labels, n_classes, "logits")
    if target.indicator is not None:
        values = _indicator_values(
            _two_columns(scores), target.indicator, lambda x, hot: ((functional.softmax(x) - hot) ** 2).sum(axis=1)
        )
        _check_logits(scores, bool(np.isnan(values).any()))
        score = _average_values(values, weights, normalize=True)
    else:
        from fastloss._kernels.scores import brier

        total, weight_sum, invalid, _ = _run(brier, _new_totals(), scores, target.codes, weights, (0.0, 0.0))
        _check_logits(scores, invalid > 0)
        score = _average(total, weight_sum, len(y), weights.size > 0, normalize=True)
    is_halved = n_classes == 2 if isinstance(scale_by_half, str) else scale_by_half
    return score / 2 if is_halved else score


def top_k_accuracy_from_logits(
    y_true: npt.ArrayLike,
    logits: npt.ArrayLike,
    *,
    k: int = 2,
    normalize: bool = True,
    sample_weight: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
) -> float:
    r"""How often the true class is among the `k` of the largest logits: ``sklearn.metrics.top_k_accuracy_score``.

    Parameters
    ----------
    y_true : array_like
        The true labels, shape ``(n_samples,)``.
    logits : array_like
        As in :func:`log_loss_from_logits`.
    k : int
        At least 1; from the number of classes on everything is a hit, with a UserWarning.
    normalize : bool
        Whether to return the share of the rows, or else their number.
    sample_weight : array_like, optional
        One weight per row, shape ``(n_samples,)``.
    labels : array_like, optional
        The classes, in ascending order, where `y_true` may not hold them all.

    Returns
    -------
    float
        The weighted share, or the weighted number, of the hits.

    Raises
    ------
    ValueError, ZeroDivisionError
        As :func:`log_loss_from_logits`; for `labels` that are not in ascending order, and for a `k` below 1.

    See Also
    --------
    log_loss_from_logits, brier_score_from_logits : What the probabilities are worth, beyond their order.

    Notes
    -----
    Of equal logits the last one comes first. One column of logits counts as 1-D: its second class is predicted where
    the logit is positive.

    Examples
    --------
    >>> from fastloss.metrics import top_k_accuracy_from_logits
    >>> logits = [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]
    >>> print(top_k_accuracy_from_logits([1, 1, 0], logits, labels=[0, 1, 2]))
    0.6666666666666666
    """
    from fastloss._kernels.scores import top_k

    _check_flag(normalize, "normalize")
    try:
        k = _validation.check_integer(k, "k")
    except TypeError as error:
        raise ParameterError(str(error)) from None
    if k < 1:
        raise ParameterError(f"k: got {k}, expected an integer of at least 1")
    scores = _as_scores(logits, "logits")
    y, weights = _check_rows(y_true, scores, sample_weight)
    n_classes = _n_classes(scores)
    if y.ndim > 1:
        raise ParameterError(f"y_true: got shape {y.shape}, expected one label per row, binary or multiclass")
    target = _labels.as_target(y, labels, n_classes, "logits", must_be_sorted=True)
    if k >= n_classes:
        _validation.warn(
            f"'k' ({k}) greater than or equal to 'n_classes' ({n_classes}) will result in a perfect score and is "
            "therefore meaningless."
        )
    total, weight_sum, invalid, _ = _run(top_k, _new_totals(), scores, target.codes, weights, (float(k), 0.0))
    _check_logits(scores, invalid > 0)
    return _average(total, weight_sum, len(y), weights.size > 0, normalize)


# ------------------------------------------------------------------------------------------------------------ scorers


class _Scorer:
    """A scorer for ``scoring=``: the negative loss of what a method of the estimator returns, with its ``classes_``.

    It is called as ``scorer(estimator, X, y_true, sample_weight=None)``, and goes wherever scikit-learn takes
    ``scoring=``. Because the estimator's classes are the ``labels`` of the loss, the data to score may lack some.

    Parameters
    ----------
    estimator : object
        A fitted classifier: with ``predict_proba`` for ``neg_log_loss_scorer``, with ``decision_function`` for
        ``neg_log_loss_from_logits_scorer``, and best with ``classes_``.
    X : array_like
        What that method takes.
    y_true : array_like
        The true labels, as :func:`log_loss` takes them.
    sample_weight : array_like, optional
        One weight per row.

    Returns
    -------
    float
        The negative weighted mean of the losses: greater is better.

    Raises
    ------
    AttributeError
        If the estimator has no such method.
    ValueError, ZeroDivisionError
        As :func:`log_loss` and :func:`log_loss_from_logits`; for labels that are not among the estimator's classes.

    See Also
    --------
    log_loss, log_loss_from_logits : The losses.

    Notes
    -----
    ``decision_function`` has to give logits, as that of linear models of the log loss and of gradient boosting does;
    that of a support vector machine does not.

    With scikit-learn's metadata routing, ``scorer.set_score_request(sample_weight=True)`` is a scorer that takes
    weights.

    Examples
    --------
    >>> from fastloss.metrics import neg_log_loss_scorer
    >>> class Coin:
    ...     classes_ = ["heads", "tails"]
    ...
    ...     def predict_proba(self, X):
    ...         return [[0.5, 0.5]] * len(X)
    >>> print(round(neg_log_loss_scorer(Coin(), [[1], [2]], ["heads", "heads"]), 4))
    -0.6931
    """

    # It holds no object of scikit-learn, so that it pickles and is imported without it; the methods that speak of
    # metadata follow scikit-learn's protocol for consumers.

    def __init__(self, name: str, loss: Callable[..., float], response_method: str) -> None:
        self._name = name
        self._loss = loss
        self._response_method = response_method
        self._request: bool | str | None = None

    def __repr__(self) -> str:
        asked = "" if self._request is None else f".set_score_request(sample_weight={self._request!r})"
        return f"{__name__}.{self._name}{asked}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scorer) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self._name, self._request))

    def __call__(self, estimator: Any, X: Any, y_true: Any, sample_weight: Any = None) -> float:  # noqa: N803
        labels = getattr(estimator, "classes_", None)
        scores = getattr(estimator, self._response_method)(X)
        shape = getattr(y_true, "shape", None) or np.shape(y_true[:1])
        if len(shape) > 1 and shape[1] > 1:
            labels = None  # an indicator matrix has a column for each class
            if isinstance(scores, list):  # forests: the probabilities of "no" and "yes" for each
                scores = np.column_stack([columns[:, -1] for columns in scores])
        scores = np.asarray(scores)
        if self._response_method == "predict_proba" and labels is not None and len(labels) == scores.shape[-1] == 2:
            scores = scores[:, 1]  # as scikit-learn's scorers do: the other probability is 1 minus this one
        return -self._loss(y_true, scores, sample_weight=sample_weight, labels=labels)

    def set_score_request(self, *, sample_weight: bool | str | None = "$UNCHANGED$") -> "_Scorer":
        """A scorer that asks scikit-learn's metadata routing for weights: True, False, None, or under which name.

        The scorer itself, which everybody shares, stays as it is. (The default is scikit-learn's own.)
        """
        from sklearn import get_config

        if not get_config()["enable_metadata_routing"]:
            raise RuntimeError(
                "This method is only available when metadata routing is enabled. You can enable it using "
                "sklearn.set_config(enable_metadata_routing=True)."
            )
        scorer = copy.copy(self)
        if not (isinstance(sample_weight, str) and sample_weight == "$UNCHANGED$"):
            scorer._request = sample_weight
            scorer.get_metadata_routing()  # where scikit-learn raises for what is no request
        return scorer

    def get_metadata_routing(self) -> Any:
        """What scikit-learn's routing is told: that ``score`` takes ``sample_weight``."""
        from sklearn.utils.metadata_routing import MetadataRequest

        request = MetadataRequest(owner=self)
        request.score.add_request(param="sample_weight", alias=self._request)
        return request

    def _routing_repr(self) -> str:
        """What the messages of scikit-learn's routing call the scorer."""
        return repr(self)

    def _accept_sample_weight(self) -> bool:
        """Asked by scikit-learn's searches and multimetric scorers where metadata routing is off."""
        return True


neg_log_loss_scorer = _Scorer("neg_log_loss_scorer", log_loss, "predict_proba")
neg_log_loss_from_logits_scorer = _Scorer("neg_log_loss_from_logits_scorer", log_loss_from_logits, "decision_function")


# ------------------------------------------------------------------------------------------------------------- checks


def _check_flag(value: Any, name: str, otherwise: str = "") -> None:
    if not isinstance(value, bool | np.bool_):
        raise ParameterError(f"{name}: got {value!r}, expected a bool (an instance of 'bool'){otherwise}")


def _as_scores(value: Any, name: str, fewest_rows: int = 1) -> Array:
    """Probabilities or logits with one column or more, of a dtype with numbers in it."""
    scores = _labels.as_array(value, name)
    if scores.dtype.kind in "OSUT" or scores.dtype.char == "g":
        try:
            scores = scores.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ParameterError(f"{name}: got dtype {scores.dtype}, expected real numbers ({error})") from None
    if not (_validation.is_floating(scores.dtype) or _validation.is_integer(scores.dtype)):
        raise ParameterError(f"{name}: got dtype {scores.dtype}, expected real numbers (Complex data not supported)")
    for axis, what in enumerate(("sample", "feature")[: scores.ndim]):
        if scores.shape[axis] < (1 if axis else fewest_rows):
            raise ValueError(
                f"{name}: Found array with 0 {what}(s) (shape={scores.shape}) while a minimum of 1 is required."
            )
    return scores[:, None] if scores.ndim == 1 else scores


def _probability_dtype(value: Any) -> np.dtype[Any]:
    """The dtype whose precision clips: scikit-learn keeps NumPy's native floats, and makes float64 of everything else.

    (It does not ask what array a list, a polars frame or a tensor would become.)
    """
    dtype = getattr(value, "dtype", None)
    if dtype is None and hasattr(value, "iloc"):
        columns = list(value.dtypes)
        dtype = np.result_type(*columns) if all(isinstance(column, np.dtype) for column in columns) else None
    if isinstance(dtype, np.dtype) and dtype.isnative and dtype.char in "efd":
        return dtype
    return np.dtype(np.float64)


def _n_classes(scores: Array) -> int:
    return 2 if scores.shape[1] == 1 else scores.shape[1]


def _as_weights(sample_weight: Any, shape: tuple[int, ...], may_be_zero: bool = False) -> Array:
    """The weights in float64; empty if there are none."""
    if sample_weight is None:
        return np.empty(0)
    array = _validation.as_array(sample_weight, "sample_weight")
    if array.ndim == 0 and shape:
        raise ParameterError(f"sample_weight: got {array}, expected an array-like or None")
    is_text = array.dtype == object and any(isinstance(weight, str | bytes) for weight in array.flat)
    if is_text or array.dtype.kind not in "biufO":
        raise ParameterError(f"sample_weight: got dtype {array.dtype}, expected real numbers")
    if array.shape != shape:
        raise ValueError(f"sample_weight.shape == {array.shape}, expected {shape}: one weight per row")
    try:
        weights = np.ascontiguousarray(array, np.float64)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"sample_weight: got dtype {array.dtype}, expected real numbers ({error})") from None
    if not np.isfinite(weights).all():
        raise ValueError(f"Input sample_weight contains {'NaN' if np.isnan(weights).any() else 'infinity'}.")
    if weights.size and not may_be_zero:
        _check_some_weight(bool(weights.any()))
    return weights


def _check_some_weight(is_some: bool) -> None:
    if not is_some:
        raise ValueError("Sample weights must contain at least one non-zero number.")


def _check_rows(
    y_true: Any, scores: Array, sample_weight: Any, weights_may_be_zero: bool = False
) -> tuple[Array, Array]:
    """The labels and the weights, as many as there are rows of scores."""
    y = _labels.as_labels(y_true, "y_true")
    lengths = [len(scores), len(y)]
    if sample_weight is not None:
        sample_weight = _validation.as_array(sample_weight, "sample_weight")
        lengths += sample_weight.shape[:1]
    if len(set(lengths)) > 1:
        raise ValueError(f"Found input variables with inconsistent numbers of samples: {lengths}")
    return y, _as_weights(sample_weight, (len(scores),), weights_may_be_zero)


def _check_tokens(y_true: Any, logits: Any) -> tuple[Array, Array]:
    """Logits, and class indices of their shape without its class axis."""
    scores = _validation.as_real(logits, "logits")
    axis = _validation.class_axis(scores, "logits")
    y = _validation.as_real(y_true, "y_true")
    expected = _validation.row_shape(scores.shape, axis)
    if y.shape != expected:
        raise ValueError(f"y_true: got shape {y.shape} for logits of shape {scores.shape}, expected {expected}")
    if not _validation.is_integer(y.dtype):
        raise TypeError(f"y_true: got dtype {y.dtype}, expected class indices of an integer dtype or bool")
    return scores, y


def _check_probabilities(proba: Array, is_invalid: bool) -> None:
    """Raise for the first probability that the kernel found to be none."""
    if not is_invalid:
        return
    for what, is_it in (("NaN", np.isnan), ("infinity", np.isinf)):
        for rows in _labels.row_pieces(proba.shape):
            if is_it(proba[rows].astype(np.float64)).any():
                raise ValueError(f"Input contains {what}. (y_proba: expected probabilities)")
    if proba.max() > 1:
        raise ValueError(f"y_prob contains values greater than 1: {proba.max()}")
    raise ValueError(f"y_prob contains values lower than 0: {proba.min()}")


def _check_logits(logits: Array, is_invalid: bool) -> None:
    """Raise for the first row without a softmax, of which the kernel found one."""
    if not is_invalid:
        return
    for rows in _labels.row_pieces(logits.shape):
        largest = logits[rows].astype(np.float64).max(axis=1)
        is_bad = np.isnan(largest) if logits.shape[1] == 1 else ~np.isfinite(largest)
        for i in np.flatnonzero(is_bad):
            what = "NaN" if np.isnan(largest[i]) else "infinity" if largest[i] > 0 else "only -inf"
            raise ValueError(
                f"Input contains {what}: row {rows.start + i} of logits, expected finite numbers (or -inf for masked "
                "classes)"
            )


# ---------------------------------------------------------------------------------------------------------- arithmetic


def _average(total: float, weight_sum: float, n_rows: int, is_weighted: bool, normalize: bool) -> float:
    """The mean or the sum, from the sums of the weighted values and of the weights."""
    if not normalize:
        return total
    denominator = weight_sum if is_weighted else float(n_rows)
    if denominator == 0:
        raise ZeroDivisionError("Weights sum to zero, can't be normalized")
    return total / denominator


def _perplexity(total: float, weight_sum: float, n_rows: int, is_weighted: bool) -> float:
    """The exponential of the mean; NaN for no rows."""
    if not n_rows:
        return math.nan
    with np.errstate(over="ignore"):
        return float(np.exp(_average(total, weight_sum, n_rows, is_weighted, normalize=True)))


def _new_totals() -> Array:
    """The exact sums of weighted values and of weights, to which the functions called _add_... add; they return both,
    rounded.
    """
    from fastloss._kernels.sums import STATE_SIZE

    return np.zeros((2, STATE_SIZE), np.int64)


def _add_values(totals: Array, values: Array, weights: Array) -> tuple[float, float]:
    """Add values that are there already. A weight of 0 counts nothing, even of inf."""
    from fastloss._kernels.sums import add_values

    total, weight_sum = 0.0, 0.0
    for rows in _labels.row_pieces(values.shape):
        piece = values[rows].astype(np.float64)
        if weights.size:
            piece = np.multiply(piece, weights[rows], out=np.zeros_like(piece), where=weights[rows] != 0)
            weight_sum = add_values.serial(1, totals[1], weights[rows])
        total = add_values.serial(1, totals[0], piece)
    return total, weight_sum


def _average_values(values: Array, weights: Array, normalize: bool) -> float:
    """The weighted average of values that are there already."""
    return _average(*_add_values(_new_totals(), values, weights), len(values), weights.size > 0, normalize)


def _add_token_losses(
    totals: Array, logits: Array, y: Array, weights: Array, ignore_index: int
) -> tuple[float, float, int]:
    """Add the cross-entropies of the class indices that count; also how many these are."""
    try:
        losses = functional.cross_entropy(logits, y, ignore_index=ignore_index, reduction="none")
    except IndexError as error:
        raise IndexError(str(error).replace("target", "y_true", 1)) from None
    is_kept = np.reshape(_validation.is_kept(y, ignore_index), -1)
    values = np.reshape(losses, -1)[is_kept]
    if np.isnan(values).any():
        raise ValueError("logits: got NaN, inf, or only -inf in a row that counts, expected a softmax in each of them")
    return *_add_values(totals, values, weights.reshape(-1)[is_kept] if weights.size else weights), len(values)


def _readable_pieces(scores: Array, dtype: np.dtype[Any]) -> Iterator[tuple[slice, Array]]:
    """The scores in float32 or float64: as they lie where they are that already, else converted in pieces."""
    if scores.dtype == dtype and _views.lies_well(scores):
        step = max(1, _CUT // scores.shape[1])
        for begin in range(0, len(scores), step):
            rows = slice(begin, min(begin + step, len(scores)))
            yield rows, scores[rows]
        return
    for rows in _labels.row_pieces(scores.shape):
        yield rows, scores[rows].astype(dtype)


def _run(
    kernel: "Kernel",
    totals: Array,
    scores: Array,
    codes: Array,
    weights: Array,
    parameters: tuple[float, float],
    dtype: np.dtype[Any] | None = None,
) -> tuple[float, float, int, int]:
    """Add to the sums of the weighted values and of the weights; both, and how often the kernel met each fault.

    The kernel reads float32 for scores of ``dtype`` (their own, if None) float32 or narrower, else float64.
    """
    from fastloss._kernels.scores import N_TILES

    options = np.array(parameters, np.float64)
    total, weight_sum, invalid, not_normalised = 0.0, 0.0, 0, 0
    flat_weights = _views.flatten(weights)[0] if weights.size else weights
    for rows, x in _readable_pieces(scores, _views.compute_dtype(dtype or scores.dtype)):
        flat, (*_, origin) = _views.flatten(x)
        table = _geometry(x, origin // x.itemsize)
        total, weight_sum, *faults = _forks.runtime().run(
            kernel, x.size, int(table[N_TILES]), totals, flat, codes[rows], flat_weights[rows], table, options
        )
        invalid += faults[0]
        not_normalised += faults[1]
    return total, weight_sum, invalid, not_normalised


def _geometry(x: Array, origin: int) -> Array:
    """The table of :mod:`fastloss._kernels.scores`."""
    n_rows, n_classes = x.shape
    row_stride, class_stride = (stride // x.itemsize for stride in x.strides)
    size = _STRIDED_ROWS if row_stride == 1 < class_stride else _TILE_BYTES // (n_classes * x.itemsize)
    size = max(_FEWEST_ROWS, min(size, _MOST_ROWS, n_rows) // _FEWEST_ROWS * _FEWEST_ROWS)
    return np.array(
        [n_rows, n_classes, size, -(-n_rows // size), origin, row_stride, class_stride],
        np.int64,
    )


def _add_log_loss(
    totals: Array, proba: Array, dtype: np.dtype[Any], target: Target, weights: Array
) -> tuple[float, float]:
    """Add the weighted log losses, and the weights; the precision of ``dtype`` clips."""
    from fastloss._kernels.scores import log_loss as kernel

    if proba.shape[1] == 1 and (dtype.char == "e" or target.indicator is not None):
        _check_probabilities(proba, not ((proba >= 0) & (proba <= 1)).all())
        proba = proba.astype(dtype)
        proba = np.concatenate([1 - proba, proba], axis=1)  # (float16's complements are rounded to float16)
    epsilon = float(np.finfo(dtype).eps)
    # numpy.isclose(sum, 1, rtol=sqrt(eps)), whose atol is 1e-8 by default
    tolerance = math.sqrt(epsilon) + 1e-8
    # What an indicator matrix makes of the probabilities is not what the kernel adds; it checks them all the same.
    scratch = totals if target.indicator is None else _new_totals()
    total, weight_sum, invalid, not_normalised = _run(
        kernel, scratch, proba, target.codes, weights, (epsilon, tolerance), dtype
    )
    _check_probabilities(proba, invalid > 0)
    if not_normalised:
        _validation.warn("The y_prob values do not sum to one. Make sure to pass probabilities.")
    if target.indicator is None:
        return total, weight_sum
    values = _indicator_values(
        proba, target.indicator, lambda p, hot: -(hot * np.log(np.clip(p, epsilon, 1 - epsilon))).sum(axis=1)
    )
    return _add_values(totals, values, weights)


def _row_losses(logits: Array, target: Target) -> Array:
    """The cross-entropy of each row."""
    if target.indicator is not None:
        return _indicator_values(_two_columns(logits), target.indicator, _indicator_cross_entropy)
    if logits.shape[1] > 1:
        losses: Array = functional.cross_entropy(logits, target.codes, reduction="none")
        return losses
    losses = np.empty(len(logits), _views.compute_dtype(logits.dtype))
    for rows in _labels.row_pieces(logits.shape):
        losses[rows] = functional.cross_entropy(_two_columns(logits[rows]), target.codes[rows], reduction="none")
    return losses


def _two_columns(scores: Array) -> Array:
    """Logits with a column per class. Log-odds z of the second of two become -z and 0, or 0 and z: none is positive."""
    if scores.shape[1] > 1:
        return scores
    z = scores.astype(_views.compute_dtype(scores.dtype))
    return np.concatenate([-np.maximum(z, 0), np.minimum(z, 0)], axis=1)


def _indicator_values(scores: Array, indicator: Array, row_values: Callable[[Array, Array], Array]) -> Array:
    """A value for each row of scores and of an indicator matrix, piece by piece."""
    values = np.empty(len(scores))
    for rows in _labels.row_pieces(indicator.shape):
        values[rows] = row_values(scores[rows].astype(np.float64), indicator[rows].astype(np.float64))
    return values


def _indicator_cross_entropy(logits: Array, hot: Array) -> Array:
    terms = np.zeros_like(hot)
    np.multiply(hot, functional.log_softmax(logits), out=terms, where=hot != 0)
    losses: Array = -terms.sum(axis=1)
    return losses
