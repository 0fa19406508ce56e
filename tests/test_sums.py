"""The exact accumulator: correctly rounded sums of anything, in any order."""

import math
from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloss._kernels.sums import MAX_BLOCK, STATE_SIZE, add_block, add_state, rounded

BIGGEST = float(np.finfo(np.float64).max)
SMALLEST = float(np.finfo(np.float64).smallest_subnormal)
INF, NAN = math.inf, math.nan


@numba.njit
def _sum_blocks(values, block, scratch, states):
    """Blocks in turn to each state, joined at the end; rounded twice, which must not change the state."""
    for i, begin in enumerate(range(0, len(values), block)):
        n = min(block, len(values) - begin)
        scratch[:n] = values[begin : begin + n]
        add_block(states[i % len(states)], scratch, n)
    for i in range(1, len(states)):
        add_state(states[0], states[i])
    return rounded(states[0]), rounded(states[0])


def exact_sum(values, block=1024, n_states=1, dtype=np.float64):
    values = np.asarray(values, dtype)
    states = np.zeros((n_states, STATE_SIZE), np.int64)
    first, second = _sum_blocks(values, block, np.zeros(block + 16, dtype), states)
    assert first == second or (math.isnan(first) and math.isnan(second))
    return first


def true_sum(values):
    """The exact sum, rounded once to nearest even, like math.fsum, but without overflow on the way."""
    total = sum((Fraction(v) for v in values), Fraction(0))
    try:
        return float(total)
    except OverflowError:
        return INF if total > 0 else -INF


finite = st.floats(allow_nan=False, allow_infinity=False)


class TestAgainstFractions:
    @given(st.lists(finite, max_size=40))
    def test_any_numbers(self, values):
        assert exact_sum(values) == true_sum(values)

    @given(st.lists(finite, min_size=1, max_size=40), st.integers(1, 16), st.integers(1, 3))
    def test_any_blocks_and_states(self, values, block, n_states):
        assert exact_sum(values, block, n_states) == exact_sum(values)

    @given(st.lists(finite, max_size=40), st.randoms(use_true_random=False))
    def test_any_order(self, values, random):
        shuffled = list(values)
        random.shuffle(shuffled)
        assert exact_sum(shuffled) == exact_sum(values)

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40))
    def test_float32(self, values):
        assert exact_sum(values, dtype=np.float32) == math.fsum(values)

    @given(st.lists(finite, min_size=1, max_size=20), finite)
    def test_what_cancels_is_gone(self, values, rest):
        assert exact_sum([*values, rest, *[-v for v in values]]) == rest


class TestAgainstFsum:
    @pytest.mark.parametrize("block", [1, 7, 8, 9, 256, MAX_BLOCK])
    @pytest.mark.parametrize(
        "exponents", [(0, 0), (-3, 3), (-30, 30), (-45, 5), (-300, 300), (-1070, -1000), (900, 1000)]
    )
    def test_ranges_of_exponents(self, rng, exponents, block):
        values = np.ldexp(rng.normal(size=5000), rng.integers(exponents[0], exponents[1] + 1, size=5000))
        assert exact_sum(values, block) == math.fsum(values)

    def test_a_block_of_the_largest_size_full_of_the_largest_values(self):
        """The integer sums of a block's fast method are at their limit."""
        for value in (np.nextafter(2.0, 0), 1.0, np.nextafter(1.0, 0), 2.0**-700, 2.0**900):
            assert exact_sum(np.full(MAX_BLOCK, value), MAX_BLOCK) == math.fsum([value] * MAX_BLOCK)
            assert exact_sum(np.full(MAX_BLOCK, -value), MAX_BLOCK) == -math.fsum([value] * MAX_BLOCK)

    def test_every_distance_between_two_numbers(self):
        for distance in range(130):
            for low in (1.0, -1.0, 1.0 + 2.0**-52, -(2.0 - 2.0**-52)):
                values = [1.5 * 2.0**distance, low, low, 2.0**distance]
                assert exact_sum(values) == math.fsum(values)

    def test_every_exponent(self):
        for exponent in range(-1074, 1024):
            values = [math.ldexp(1.0, exponent), math.ldexp(1.0, max(exponent - 53, -1074)), -SMALLEST]
            assert exact_sum(values) == math.fsum(values)

    def test_ties_go_to_even_and_a_sticky_bit_decides(self):
        half = 2.0**-53
        assert exact_sum([1.0, half]) == 1.0
        assert exact_sum([1.0 + 2 * half, half]) == 1.0 + 4 * half
        assert exact_sum([1.0, half, SMALLEST]) == 1.0 + 2 * half
        assert exact_sum([1.0, half, -SMALLEST]) == 1.0
        assert exact_sum([-1.0, -half, -SMALLEST]) == -1.0 - 2 * half

    def test_many_numbers(self, rng):
        values = rng.normal(size=300_000) ** 3
        assert exact_sum(values, 256, 4) == math.fsum(values)


class TestEnds:
    def test_nothing_and_zeros(self):
        assert exact_sum([]) == 0.0
        assert exact_sum([0.0, -0.0] * 9) == 0.0

    def test_subnormal_numbers(self):
        assert exact_sum([SMALLEST] * 3) == 3 * SMALLEST
        assert exact_sum([SMALLEST, -SMALLEST]) == 0.0
        assert exact_sum([2.0**-1022, -SMALLEST]) == 2.0**-1022 - SMALLEST

    def test_beyond_the_largest_number_and_back(self):
        assert exact_sum([BIGGEST, BIGGEST]) == INF
        assert exact_sum([-BIGGEST, -BIGGEST]) == -INF
        assert exact_sum([BIGGEST] * 4000 + [-BIGGEST] * 3999) == BIGGEST
        assert exact_sum([BIGGEST, 2.0**969]) == BIGGEST
        assert exact_sum([BIGGEST, 2.0**970]) == INF

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([INF], INF), ([-INF], -INF), ([INF, -INF], NAN), ([NAN], NAN), ([NAN, INF], NAN), ([1.0, INF, -2.0], INF),
            ([BIGGEST, BIGGEST, -INF], -INF), ([INF, INF], INF), ([-INF, -INF, 5.0], -INF), ([1e300, NAN, 1e-300], NAN),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("block", [1, 16])
    @pytest.mark.parametrize("n_states", [1, 2])
    def test_infinities_and_nan(self, values, expected, block, n_states):
        np.testing.assert_equal(exact_sum(values, block, n_states), expected)
