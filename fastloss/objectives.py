"""Cross-entropy as a custom objective for gradient boosting: XGBoost and LightGBM, their native and scikit-learn APIs.

Both libraries fit each tree to the gradient and to a diagonal Hessian of the loss, of shape ``(n_samples, n_classes)``.
Neither library is imported here: what they pass and what they ask for is enough.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastloss import _reduction, _validation, functional, modules
from fastloss._validation import Array
from fastloss.gradients import value_and_grad

__all__ = ["LightGBMCrossEntropy", "XGBoostCrossEntropy"]

_gradient = value_and_grad(functional.cross_entropy)

# The smallest Hessian of XGBoost's own softmax objective (kRtEps of src/objective/multiclass_obj.cu).
_XGBOOST_SMALLEST = 1e-16
# LightGBM keeps labels as float32, which holds every whole number up to this one.
_LIGHTGBM_LARGEST = 1 << 24
# The smallest frequency of a class in LightGBM's starting scores (kEpsilon of include/LightGBM/meta.h).
_LIGHTGBM_SMALLEST = 1e-15


class _CrossEntropy(modules._Module):
    """What both have: the options, labels and weights from whatever the library passes, gradient and Hessian."""

    def __init__(
        self, weight: npt.ArrayLike | None = None, ignore_index: int = -100, label_smoothing: float = 0.0
    ) -> None:
        self.weight = _validation.held_weight(weight)
        self.ignore_index = _validation.check_ignore_index(ignore_index)
        self.label_smoothing = _validation.check_label_smoothing(label_smoothing)

    def _curvature(self, n_classes: int) -> float:
        """What multiplies p (1 - p) in the library's own softmax objective."""
        raise NotImplementedError

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Array, Array]:
        scores, labels, sample_weights = _unpack(y_true, y_pred, sample_weight)
        own, mass = self._masses(labels, scores.shape[1], sample_weights)
        _, gradient = _gradient(
            scores,
            labels,
            self.weight,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
            grad_output=np.ones(len(labels)) if sample_weights is None else sample_weights,
        )
        hessian: Array = functional.softmax(scores, axis=1)
        hessian *= 1 - hessian
        hessian *= (mass * self._curvature(scores.shape[1])).astype(hessian.dtype)[:, None]
        return gradient, self._bounded(hessian, own)

    def _bounded(self, hessian: Array, own: Array) -> Array:
        return hessian

    def _masses(self, labels: Array, n_classes: int, sample_weights: Array | None) -> tuple[Array, Array]:
        """Per row what a mean divides by, and what multiplies the Hessian p (1 - p) of -log(softmax)."""
        weights = np.ones(n_classes) if self.weight is None else self.weight.astype(np.float64)
        _validation.class_weight(weights, n_classes)
        kept = _validation.is_kept(labels, self.ignore_index)
        inside = (labels >= 0) & (labels < n_classes)
        if not (inside | ~kept).all():
            _validation.target_out_of_range(labels, n_classes, self.ignore_index)
        own = np.where(kept, weights[np.where(inside, labels, 0)], 0.0)
        smoothing = self.label_smoothing
        mass = np.where(kept, (1 - smoothing) * own + smoothing * weights.mean(), 0.0)
        return (own, mass) if sample_weights is None else (own * sample_weights, mass * sample_weights)

    def _loss(self, y_true: Any, y_pred: Any, sample_weight: Any) -> float:
        """The weighted mean of the loss, options included."""
        scores, labels, sample_weights = _unpack(y_true, y_pred, sample_weight)
        losses = functional.cross_entropy(
            scores,
            labels,
            self.weight,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        ).astype(np.float64)
        own, _ = self._masses(labels, scores.shape[1], sample_weights)
        if sample_weights is not None:
            losses *= sample_weights
        return _reduction.divide(float(losses.sum()), float(own.sum()))


class XGBoostCrossEntropy(_CrossEntropy):
    r"""Multiclass cross-entropy as a custom objective, and metric, of XGBoost.

    For ``xgboost.train(params, dtrain, obj=..., custom_metric=...)`` and for ``XGBClassifier(objective=...,
    eval_metric=...)``. Without options it is XGBoost's own ``multi:softprob`` objective and ``mlogloss`` metric, where
    both start from the same scores: with ``base_score=0.5`` among the parameters.

    Parameters
    ----------
    weight : array_like, optional
        One real weight per class.
    ignore_index : int
        A label whose rows have no gradient and no part in the metric.
    label_smoothing : float
        In [0, 1].

    Raises
    ------
    ValueError, TypeError
        For options that no call could have. When called: as :func:`fastloss.cross_entropy`, and a ValueError for
        labels that are no whole numbers, or predictions that are not of shape ``(n_samples, n_classes)``.

    See Also
    --------
    LightGBMCrossEntropy : The same for LightGBM.
    fastloss.cross_entropy : The loss and its options.

    Notes
    -----
    An instance is called with ``(preds, dtrain)`` or, by the scikit-learn API, ``(y_true, y_pred, sample_weight)``, and
    returns gradient and Hessian. With :math:`p` the softmax of a row, and :math:`m_c` what multiplies :math:`-\log p_c`
    in its loss, these are :math:`p_c \sum_k m_k - m_c` and :math:`\max(2\, p_c (1 - p_c) \sum_k m_k,\, 10^{-16})` times
    the sample weight: the factor 2 is XGBoost's own convention. `num_class` must be among the parameters of
    ``xgboost.train`` (XGBoost infers it for its own objectives only), and its predictions are raw scores.

    Unless `base_score` is among the parameters, XGBoost's own objective starts from the classes' frequencies (in newer
    versions), a custom one from 0.5 for every class.

    ``metric`` is for ``custom_metric=`` and ``eval_metric=``: the mean over the rows, weighted by sample and class
    weights, of the loss with the same options, under the name ``cross_entropy``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.objectives import XGBoostCrossEntropy
    >>> objective = XGBoostCrossEntropy(label_smoothing=0.1)
    >>> gradient, hessian = objective(np.array([0, 2]), np.zeros((2, 3)))
    >>> print(gradient.round(4))
    [[-0.6  0.3  0.3]
     [ 0.3  0.3 -0.6]]
    >>> print(hessian.round(4)[0], round(objective.metric([0, 2], np.zeros((2, 3))), 4))
    [0.4444 0.4444 0.4444] 1.0986
    """

    @property
    def metric(self) -> "_XGBoostMetric":
        """The loss as an evaluation metric."""
        return _XGBoostMetric(self)

    def _curvature(self, n_classes: int) -> float:
        return 2.0

    def _bounded(self, hessian: Array, own: Array) -> Array:
        smallest = np.where(own != 0, _XGBOOST_SMALLEST, 0).astype(hessian.dtype)
        np.maximum(hessian, smallest[:, None], out=hessian)
        return hessian


class LightGBMCrossEntropy(_CrossEntropy):
    r"""Multiclass cross-entropy as a custom objective, and metric, of LightGBM (4.0 or newer).

    For ``lightgbm.train({"objective": ..., "num_class": ...}, dataset, feval=...)`` and for
    ``LGBMClassifier(objective=...)`` with ``fit(eval_metric=...)``. Without options it is LightGBM's own ``multiclass``
    objective and ``multi_logloss`` metric.

    Parameters
    ----------
    weight : array_like, optional
        One real weight per class.
    ignore_index : int
        A label whose rows have no gradient and no part in the metric.
    label_smoothing : float
        In [0, 1].

    Raises
    ------
    ValueError, TypeError
        For options that no call could have. When called: as :func:`fastloss.cross_entropy`, and a ValueError for
        labels that are no whole numbers, or predictions that are not of shape ``(n_samples, n_classes)``.

    See Also
    --------
    XGBoostCrossEntropy : The same for XGBoost.
    fastloss.cross_entropy : The loss and its options.

    Notes
    -----
    An instance is called with ``(preds, dataset)`` or, by the scikit-learn API, ``(y_true, y_pred, weight)``, and
    returns gradient and Hessian. With :math:`p` the softmax of a row, :math:`m_c` what multiplies :math:`-\log p_c` in
    its loss and :math:`K` the number of classes, these are :math:`p_c \sum_k m_k - m_c` and
    :math:`\frac{K}{K-1}\, p_c (1 - p_c) \sum_k m_k` times the sample weight: the factor is LightGBM's own convention.
    Predictions are raw scores, those of LightGBM's classifier too.

    LightGBM's own objective starts from the logarithms of the classes' frequencies unless ``boost_from_average`` is
    false; a custom one starts from 0. :meth:`init_score` gives those logarithms.

    ``metric`` is for ``feval=`` and ``eval_metric=``: the mean over the rows, weighted by sample and class weights, of
    the loss with the same options, under the name ``cross_entropy``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.objectives import LightGBMCrossEntropy
    >>> objective = LightGBMCrossEntropy(weight=[1.0, 1.0, 4.0])
    >>> gradient, hessian = objective(np.array([0, 2]), np.zeros((2, 3)))
    >>> print(gradient.round(4))
    [[-0.6667  0.3333  0.3333]
     [ 1.3333  1.3333 -2.6667]]
    >>> print(hessian.round(4)[0], objective.init_score([0, 2, 2, 1]).round(4))
    [0.3333 0.3333 0.3333] [-1.3863 -1.3863 -0.6931]
    """

    @property
    def metric(self) -> "_LightGBMMetric":
        """The loss as an evaluation metric."""
        return _LightGBMMetric(self)

    def _curvature(self, n_classes: int) -> float:
        return n_classes / (n_classes - 1) if n_classes > 1 else 1.0

    def init_score(self, y_true: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None) -> Array:
        """The scores that LightGBM's own objective starts from, one per class.

        Parameters
        ----------
        y_true : array_like
            The labels, shape ``(n_samples,)``, where every class occurs; those that are `ignore_index` do not count.
        sample_weight : array_like, optional
            One weight per row, none of them negative.

        Returns
        -------
        numpy.ndarray
            The logarithm of each class's share of the (sample) weight: repeat it for every row and give it to the
            ``Dataset`` as ``init_score``, for training and validation, and add it to predictions.

        Raises
        ------
        ValueError
            For labels that are no class indices, or none that count; for weights of another shape, negative or not
            finite, or without a positive sum.
        TypeError
            For labels or weights that are no real numbers.
        """
        labels = _as_labels(y_true, "y_true")
        if labels.ndim != 1:
            raise ValueError(f"y_true: got shape {labels.shape}, expected (n_samples,): one label per row")
        weights = _as_weights(sample_weight, labels.shape)
        kept = _validation.is_kept(labels, self.ignore_index)
        labels = labels[kept]
        outside = (labels < 0) | (labels > _LIGHTGBM_LARGEST)
        if outside.any():
            raise ValueError(
                f"y_true: got {labels[outside][0]}, expected class indices in [0, {_LIGHTGBM_LARGEST}] "
                f"or ignore_index={self.ignore_index}"
            )
        if not labels.size:
            raise ValueError(f"y_true: got {len(kept)} labels of which none counts, expected one or more")
        if weights is not None:
            weights = weights[kept]
            odd = ~(weights >= 0) | np.isinf(weights)
            if odd.any():
                raise ValueError(f"sample_weight: got {weights[odd][0]}, expected finite numbers from 0 on")
        counts = np.bincount(labels.astype(np.int64), weights)
        with np.errstate(over="ignore"):
            total = counts.sum()
        if not 0 < total < np.inf:
            raise ValueError(f"sample_weight: got weights of sum {total}, expected a positive finite sum")
        return np.asarray(np.log(np.maximum(counts / total, _LIGHTGBM_SMALLEST)))


class _XGBoostMetric:
    """``(preds, dtrain) -> (name, value)`` and ``(y_true, y_score, sample_weight) -> value``, which XGBoost names by
    ``__name__``.
    """

    __name__ = "cross_entropy"

    def __init__(self, objective: XGBoostCrossEntropy) -> None:
        self.objective = objective

    def __call__(self, y_true: Any, y_score: Any, sample_weight: Any = None) -> Any:
        value = self.objective._loss(y_true, y_score, sample_weight)
        return (self.__name__, value) if hasattr(y_score, "get_label") else value


class _LightGBMMetric:
    """``(preds, dataset)`` or ``(y_true, y_pred, weight)`` to ``(name, value, is_higher_better)``."""

    __name__ = "cross_entropy"

    def __init__(self, objective: LightGBMCrossEntropy) -> None:
        self.objective = objective

    def __call__(self, y_true: Any, y_pred: Any, weight: Any = None) -> tuple[str, float, bool]:
        return self.__name__, self.objective._loss(y_true, y_pred, weight), False


def _as_labels(labels: Any, name: str = "labels") -> Array:
    """Labels as int64, or uint64 where they are that: both libraries keep them as float32."""
    array = _validation.as_real(labels, name)
    if _validation.is_integer(array.dtype):
        return array.astype(np.int64, copy=False) if np.can_cast(array.dtype, np.int64) else array
    values = array.astype(np.float64)
    is_whole = (values == np.rint(values)) & (values >= -(2.0**63)) & (values < 2.0**63)
    if not is_whole.all():
        raise ValueError(f"{name}: got {array[~is_whole][0]}, expected whole numbers of int64: class indices")
    return values.astype(np.int64)


def _as_weights(sample_weight: Any, shape: tuple[int, ...]) -> Array | None:
    """Weights in float64; None if there are none, which the libraries' data sets may say by an empty array."""
    if sample_weight is None or not np.size(sample_weight):
        return None
    weights = _validation.as_real(sample_weight, "sample_weight")
    if weights.shape != shape:
        raise ValueError(f"sample_weight: got shape {weights.shape}, expected {shape}: one weight per row")
    return weights.astype(np.float64)


def _unpack(first: Any, second: Any, sample_weight: Any) -> tuple[Array, Array, Array | None]:
    """Scores, labels and weights of ``(preds, dataset)`` or ``(y_true, y_pred, sample_weight)``."""
    if hasattr(second, "get_label"):
        scores, labels, sample_weight = first, second.get_label(), second.get_weight()
    else:
        labels, scores = first, second
    scores = _validation.as_real(scores, "predictions")
    labels = _as_labels(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"predictions: got shape {scores.shape} for labels of shape {labels.shape}, "
            "expected (n_samples, n_classes); is num_class among the parameters?"
        )
    return scores, labels, _as_weights(sample_weight, labels.shape)
