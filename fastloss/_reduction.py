"""none, mean, sum and batchmean: which one is meant, and what a mean divides by."""

import warnings
from typing import Any

import numpy as np

from fastloss._validation import check_reduction

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
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(total) / np.float64(denominator))
