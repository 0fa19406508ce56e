"""The losses as objects that hold their options: called, shown, compared and pickled by them."""

from typing import Any

import numpy.typing as npt

from fastloss import _reduction, _validation, functional

__all__ = ["CrossEntropyLoss", "KLDivLoss", "LogSoftmax", "NLLLoss", "Softmax"]


class _Module:
    """What the classes share. An instance's options are its attributes, in the order of the constructor's arguments."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))

    def _key(self) -> tuple[Any, ...]:
        """The options as values that compare and hash."""
        return tuple(map(_validation.option_key, vars(self).values()))


class CrossEntropyLoss(_Module):
    """Cross-entropy between logits and class indices or class probabilities, with the options held by an object.

    The definition is that of ``torch.nn.CrossEntropyLoss``.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As :func:`fastloss.cross_entropy`. `size_average` and `reduce` are turned into `reduction` here, with a
        UserWarning.

    Raises
    ------
    ValueError, TypeError
        For options that no call could have.

    See Also
    --------
    fastloss.cross_entropy : What an instance calls; shapes, dtypes, special values and errors are described there.

    Examples
    --------
    >>> import fastloss
    >>> loss = fastloss.CrossEntropyLoss(label_smoothing=0.1)
    >>> loss
    CrossEntropyLoss(weight=None, ignore_index=-100, reduction='mean', label_smoothing=0.1)
    >>> print(loss([[2.0, 0.5], [0.1, 0.2]], [0, 1]).round(6))
    0.462905
    """

    def __init__(
        self,
        weight: npt.ArrayLike | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        self.weight = _validation.held_weight(weight)
        self.ignore_index = _validation.check_ignore_index(ignore_index)
        self.reduction = _reduction.resolve(reduction, size_average, reduce)
        self.label_smoothing = _validation.check_label_smoothing(label_smoothing)

    def __call__(self, input: npt.ArrayLike, target: npt.ArrayLike) -> Any:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(_Module):
    """Negative log-likelihood of class indices under log-probabilities, with the options held by an object.

    The definition is that of ``torch.nn.NLLLoss``.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction
        As :func:`fastloss.nll_loss`. `size_average` and `reduce` are turned into `reduction` here, with a UserWarning.

    Raises
    ------
    ValueError, TypeError
        For options that no call could have.

    See Also
    --------
    fastloss.nll_loss : What an instance calls; shapes, dtypes, special values and errors are described there.

    Examples
    --------
    >>> import fastloss
    >>> loss = fastloss.NLLLoss(reduction="sum")
    >>> loss
    NLLLoss(weight=None, ignore_index=-100, reduction='sum')
    >>> print(loss([[-0.5, -1.0], [-2.0, -0.25]], [0, 1]))
    0.75
    """

    def __init__(
        self,
        weight: npt.ArrayLike | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        self.weight = _validation.held_weight(weight)
        self.ignore_index = _validation.check_ignore_index(ignore_index)
        self.reduction = _reduction.resolve(reduction, size_average, reduce)

    def __call__(self, input: npt.ArrayLike, target: npt.ArrayLike) -> Any:
        return functional.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class KLDivLoss(_Module):
    """Kullback-Leibler divergence, with the options held by an object.

    The definition is that of ``torch.nn.KLDivLoss``.

    Parameters
    ----------
    size_average, reduce, reduction, log_target
        As :func:`fastloss.kl_div`. `size_average` and `reduce` are turned into `reduction` here, with a UserWarning.

    Raises
    ------
    ValueError
        For an unknown reduction.

    See Also
    --------
    fastloss.kl_div : What an instance calls; shapes, dtypes, special values and errors are described there.

    Examples
    --------
    >>> import numpy as np
    >>> import fastloss
    >>> loss = fastloss.KLDivLoss(reduction="batchmean", log_target=True)
    >>> loss
    KLDivLoss(reduction='batchmean', log_target=True)
    >>> p = np.log([[0.5, 0.5], [0.9, 0.1]])
    >>> print(loss(p, p))
    0.0
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        self.reduction = _reduction.resolve(reduction, size_average, reduce, _reduction.KL_REDUCTIONS)
        self.log_target = bool(log_target)

    def __call__(self, input: npt.ArrayLike, target: npt.ArrayLike) -> Any:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class Softmax(_Module):
    """Softmax along one axis, with the axis held by an object.

    Parameters
    ----------
    dim : int
        The class axis; by default the last (``torch.nn.Softmax`` has None, which is deprecated there).

    Raises
    ------
    TypeError
        For a `dim` that is no integer.

    See Also
    --------
    fastloss.softmax : What an instance calls.

    Examples
    --------
    >>> import fastloss
    >>> fastloss.Softmax(dim=1)
    Softmax(dim=1)
    >>> print(fastloss.Softmax()([0.0, 0.0]))
    [0.5 0.5]
    """

    def __init__(self, dim: int = -1) -> None:
        self.dim = _validation.check_integer(dim, "dim")

    def __call__(self, input: npt.ArrayLike) -> Any:
        return functional.softmax(input, self.dim)


class LogSoftmax(_Module):
    """Logarithm of the softmax along one axis, with the axis held by an object.

    Parameters
    ----------
    dim : int
        The class axis; by default the last (``torch.nn.LogSoftmax`` has None, which is deprecated there).

    Raises
    ------
    TypeError
        For a `dim` that is no integer.

    See Also
    --------
    fastloss.log_softmax : What an instance calls.

    Examples
    --------
    >>> import fastloss
    >>> fastloss.LogSoftmax()
    LogSoftmax(dim=-1)
    >>> print(fastloss.LogSoftmax()([0.0, 0.0]).round(6))
    [-0.693147 -0.693147]
    """

    def __init__(self, dim: int = -1) -> None:
        self.dim = _validation.check_integer(dim, "dim")

    def __call__(self, input: npt.ArrayLike) -> Any:
        return functional.log_softmax(input, self.dim)
