"""Which reduction is meant, what a mean divides by, and sums without rounding."""

import math
from fractions import Fraction

import numpy as np
import pytest

from fastloss import _reduction


@pytest.mark.parametrize(
    ("size_average", "reduce", "expected"),
    [
        (None, None, "none"),
        (None, True, "mean"),
        (None, False, "none"),
        (True, None, "mean"),
        (True, True, "mean"),
        (True, False, "none"),
        (False, None, "sum"),
        (False, True, "sum"),
        (False, False, "none"),
    ],
)
def test_the_deprecated_pair_overrides_the_reduction(size_average, reduce, expected):
    if size_average is None and reduce is None:
        assert _reduction.resolve("none") == expected
        return
    with pytest.warns(UserWarning, match=f"reduction='{expected}'"):
        assert _reduction.resolve("none", size_average, reduce) == expected


@pytest.mark.parametrize(
    ("total", "denominator", "expected"),
    [(3.0, 2.0, 1.5), (0.0, 0.0, math.nan), (1.0, 0.0, math.inf), (-1.0, 0.0, -math.inf), (math.inf, 2.0, math.inf)],
)
def test_division_is_ieee_division(total, denominator, expected):
    np.testing.assert_equal(_reduction.divide(total, denominator), expected)


def exact_sum(pieces):
    total = _reduction.ExactSum()
    for piece in pieces:
        total += _reduction.ExactSum.of(piece)
    return total.total


def test_exact_sum(rng):
    values = np.concatenate([rng.normal(size=300) * 10.0 ** rng.integers(-300, 300, 300), [5e-324, 1e308, -1e308, 0.0]])
    assert exact_sum(np.array_split(np.concatenate([values, [2.0**-30], -values]), 7)) == 2.0**-30
    for piece in (values, values[np.abs(values) < 1e38].astype(np.float32)):
        assert exact_sum([piece]) == float(sum(map(Fraction, piece.tolist())))


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([], 0.0),
        ([1.0, math.inf], math.inf),
        ([-math.inf], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, math.inf], math.nan),
        ([1.7e308, 1.7e308], math.inf),
        ([-1.7e308, -1.7e308], -math.inf),
        ([1.7e308, 1.7e308, -math.inf], -math.inf),
        ([1.7e308, 1.7e308, -1.7e308], 1.7e308),
    ],
)
def test_exact_sum_of_special_values(values, total):
    np.testing.assert_equal(exact_sum([np.array(values)]), total)
    np.testing.assert_equal(exact_sum(np.array(values).reshape(-1, 1)), total)
