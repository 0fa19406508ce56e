"""none, mean, sum and batchmean: which one is meant; exact sums, and the division of a mean."""

import math
from typing import Any

import numpy as np

from fastloss import _forks
from fastloss._validation import Array, check_reduction, warn

REDUCTIONS = ("none", "mean", "sum")
KL_REDUCTIONS = ("none", "batchmean", "mean", "sum")
# Of streams, which keep no rows.
STREAM_REDUCTIONS = ("mean", "sum")
KL_STREAM_REDUCTIONS = ("batchmean", "mean", "sum")


def resolve(
    reduction: Any,
    size_average: Any = None,
    reduce: Any = None,
    allowed: tuple[str, ...] = REDUCTIONS,
) -> str:
    """The reduction meant: ``size_average`` and ``reduce``, where either is given, override it as in PyTorch."""
    if size_average is not None or reduce is not None:
        averaged = size_average is None or bool(size_average)
        reduced = reduce is None or bool(reduce)
        reduction = "none" if not reduced else ("mean" if averaged else "sum")
        warn(f"size_average and reduce are deprecated, use reduction={reduction!r} instead")
    return check_reduction(reduction, allowed)


def divide(total: float, denominator: float) -> float:
    """IEEE division of two Python floats: 0 / 0 is NaN and x / 0 an infinity, without a warning."""
    if denominator != 0:
        return total / denominator
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(total) / np.float64(denominator))


class ExactSum:
    """The sum of floating-point numbers, rounded once, whatever the pieces in which they come and are joined.

    An integer, in units of 2**LOWEST_BIT of :mod:`fastloss._kernels.sums`, holds the finite numbers (Python's integers
    have no bounds); a float holds the IEEE sum of the others.
    """

    __slots__ = ("_integer", "_special")

    def __init__(self, integer: int = 0, special: float = 0.0) -> None:
        self._integer = 0 if special else integer
        self._special = special

    def __add__(self, other: "ExactSum") -> "ExactSum":
        return ExactSum(self._integer + other._integer, self._special + other._special)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExactSum) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"ExactSum({self._integer:#x}, {self._special})"

    def to_json(self) -> list[str]:
        return [f"{self._integer:x}", str(self._special)]

    @classmethod
    def from_json(cls, pair: list[str]) -> "ExactSum":
        integer, special = pair
        return cls(int(integer, 16), float(special))

    @classmethod
    def of_state(cls, state: Array) -> "ExactSum":
        """The sum that a kernel has rounded, and so left with its digits carried."""
        from fastloss._kernels import sums

        if state[sums.N_LIMBS :].any():
            kinds = (sums.NANS, math.nan), (sums.INFINITIES, math.inf), (sums.MINUS_INFINITIES, -math.inf)
            return cls(special=sum(value for place, value in kinds if state[place]))
        last = sums.N_LIMBS - 1
        return cls(int.from_bytes(state[:last].astype("<u4").tobytes(), "little") + (int(state[last]) << 32 * last))

    @classmethod
    def of(cls, values: Array) -> "ExactSum":
        """The sum of an array of float32 or float64."""
        if not values.size:
            return cls()
        _forks.runtime()
        from fastloss._kernels import sums

        state = np.zeros(sums.STATE_SIZE, np.int64)
        sums.add_values.serial(1, state, np.array(values).reshape(-1))
        return cls.of_state(state)

    @property
    def total(self) -> float:
        """The sum as the nearest float64, ties to even (so that it is what a kernel would have rounded it to)."""
        if self._special or not self._integer:
            return self._special
        from fastloss._kernels import sums

        try:
            return self._integer / (1 << -sums.LOWEST_BIT)  # Python divides integers with one rounding
        except OverflowError:
            return math.inf if self._integer > 0 else -math.inf
