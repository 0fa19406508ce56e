"""none, mean, sum and batchmean: which one is meant, and what a mean divides by."""

import warnings
from typing import Any

import numpy as np

from fastloss._validation import Array, check_reduction

REDUCTIONS = ("none", "mean", "sum")
KL_REDUCTIONS = ("none", "batchmean", "mean", "sum")


def resolve(
    reduction: Any,
    size_average: Any = None,
    reduce: Any = None,
    allowed: tuple[str, ...] = REDUCTIONS,
    stacklevel: int = 3,
) -> str:
    """The reduction meant: ``size_average`` and ``reduce``, where either is given, override it as in PyTorch."""
    if size_average is not None or reduce is not None:
        averaged = size_average is None or bool(size_average)
        reduced = reduce is None or bool(reduce)
        reduction = "none" if not reduced else ("mean" if averaged else "sum")
        warnings.warn(
            f"size_average and reduce are deprecated, use reduction={reduction!r} instead",
            UserWarning,
            stacklevel=stacklevel,
        )
    return check_reduction(reduction, allowed)


def divide(total: float, denominator: float) -> float:
    """IEEE division of two Python floats: 0 / 0 is NaN and x / 0 an infinity, without a warning."""
    if denominator != 0:
        return total / denominator
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(total) / np.float64(denominator))


class ExactSum:
    """The sum of floating-point numbers, rounded once, whatever the pieces in which they come.

    It is the sum that the losses' own reductions take; see :mod:`fastloss._kernels.sums`.
    """

    def __init__(self) -> None:
        self._state: Array | None = None
        self.total = 0.0

    def add(self, values: Array) -> None:
        """Add an array of float32 or float64."""
        from fastloss._kernels import sums

        if self._state is None:
            self._state = np.zeros(sums.STATE_SIZE, np.int64)
        if values.size:
            self.total = sums.add_values.serial(1, self._state, np.array(values).reshape(-1))
