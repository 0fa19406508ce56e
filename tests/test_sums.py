"""The exact accumulator: correctly rounded sums of anything, in any order."""

import math
from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloss._kernels._simd import lanes, load, splat
from fastloss._kernels.sums import (
    FIRST_GUESS,
    MAX_BLOCK,
    NARROW,
    NARROWEST,
    NO_GUESS,
    STATE_SIZE,
    WIDE,
    add_block,
    add_state,
    rounded,
)

BIGGEST = float(np.finfo(np.float64).max)
SMALLEST = float(np.finfo(np.float64).smallest_subnormal)
INF, NAN = math.inf, math.nan


@numba.njit
def _sum_blocks(values, block, scratch, states, guess):
    """Blocks in turn to each state, joined at the end; rounded twice, which must not change the state.

    The first block has a guess, each further one that of the block before.
    """
    for i, begin in enumerate(range(0, len(values), block)):
        n = min(block, len(values) - begin)
        scratch[:n] = values[begin : begin + n]
        guess = add_block(states[i % len(states)], scratch, n, guess)
    for i in range(1, len(states)):
        add_state(states[0], states[i])
    return rounded(states[0]), rounded(states[0])


def exact_sum(values, block=1024, n_states=1, dtype=np.float64):
    values = np.asarray(values, dtype)
    sums = set()
    for guess in (NO_GUESS, FIRST_GUESS, -30):
        states = np.zeros((n_states, STATE_SIZE), np.int64)
        sums.update(_sum_blocks(values, block, np.zeros(block + 16, dtype), states, guess))
    first = sums.pop()
    assert not sums or (math.isnan(first) and all(map(math.isnan, sums)))
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


def _make_sum(kind):
    grids, no_sums, add_vector, add_large, add_sums, _ = kind

    @numba.njit
    def sum_on_grids(large, others, exponent, state):
        like = large[0] if len(large) else others[0]
        vector = splat(like)
        constants, sums = grids(vector, exponent), no_sums(vector)
        for i in range(0, len(large), lanes(like)):
            sums = add_large(load(large, i, like), sums, constants)
        for i in range(0, len(others), lanes(like)):
            sums = add_vector(load(others, i, like), sums, constants)
        n_vectors = (len(large) + len(others)) // lanes(like)
        return add_sums(vector, state, sums, exponent, n_vectors, True), rounded(state)

    return sum_on_grids


_KINDS = {"narrowest": NARROWEST, "narrow": NARROW, "wide": WIDE}
_sum_on = {kind: _make_sum(kind) for kind in _KINDS.values()}
EVERY_KIND = pytest.mark.parametrize("kind", _KINDS.values(), ids=_KINDS)


@numba.njit
def _guess_of(values):
    scratch = np.zeros(len(values) + 16, values.dtype)
    scratch[: len(values)] = values
    return add_block(np.zeros(STATE_SIZE, np.int64), scratch, len(values), NO_GUESS)


def guessed_sum(values, exponent, dtype, kind=NARROW):
    """The sum on grids for values below 2**(exponent + 1), or None where these will not do."""
    padded = np.zeros(-(-len(values) // 16) * 16, dtype)
    padded[: len(values)] = values
    state = np.zeros(STATE_SIZE, np.int64)
    was_exact, total = _sum_on[kind](padded[:0], padded, exponent, state)
    assert was_exact or not state.any()
    return total if was_exact else None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@EVERY_KIND
class TestGuesses:
    """Grids laid for an exponent that is not the values'."""

    def depth(self, dtype, kind):
        """How far below 2**exponent the finest grid lies."""
        return 202 if kind is WIDE else 67 if dtype is np.float32 else 100

    def test_every_exponent_gives_the_exact_sum_or_none(self, rng, dtype, kind):
        """Which, is known: the largest value must fit, and all be multiples of the finest grid's step."""
        values = (rng.normal(size=1000) * np.exp2(rng.integers(-9, 1, 1000))).astype(dtype)
        largest = int(np.frexp(np.abs(values).max())[1])
        lowest_bit = min(int(np.frexp(v)[1]) for v in values) - (24 if dtype is np.float32 else 53)
        n_exact = 0
        for exponent in range(-30, 60):
            got = guessed_sum(values, exponent, dtype, kind)
            if exponent < largest - 2 or exponent > lowest_bit + 24 + 53 + self.depth(dtype, kind):
                assert got is None
            elif largest <= exponent <= lowest_bit + self.depth(dtype, kind):
                assert got is not None
            if got is not None:
                n_exact += 1
                assert got == math.fsum(values.tolist())
        assert n_exact >= 15

    def test_too_large_by_a_little(self, dtype, kind):
        """Half of the grid's numbers may be reached, and no more."""
        for sign in (1, -1):
            for values in ([1.0, sign * 4.5], [sign * 5.0] * MAX_BLOCK, [sign * 2.0**90], [sign * 2.0**30, 1.0]):
                assert guessed_sum(values, 0, dtype, kind) is None
            for value in (2.0, np.nextafter(dtype(2), dtype(0)), 1.0, 2.0**-30):
                assert guessed_sum([sign * value] * 7, 0, dtype, kind) in (None, 7.0 * sign * float(value))
            assert guessed_sum([sign * 1.75] * MAX_BLOCK, 0, dtype, kind) == sign * 1.75 * MAX_BLOCK

    def test_a_block_of_the_largest_size_at_the_limit_of_the_integers(self, dtype, kind):
        """Values that just fit, above what the exponent says, all of one sign."""
        for value in (3.75, 3.9990234375, np.nextafter(dtype(4), dtype(0)), 2.0, 1.0):
            for sign in (1, -1):
                got = guessed_sum([sign * value] * MAX_BLOCK, 0, dtype, kind)
                assert got in (None, sign * float(value) * MAX_BLOCK)

    @pytest.mark.parametrize("special", [INF, -INF, NAN])
    def test_no_numbers(self, dtype, kind, special):
        for exponent in (-40, 0, 40):
            assert guessed_sum([1.0, special, 0.5], exponent, dtype, kind) is None

    def test_zeros_of_either_sign(self, dtype, kind):
        assert guessed_sum([0.0, -0.0] * 20, 0, dtype, kind) == 0.0
        assert guessed_sum([1.5, -0.0] * 20, 0, dtype, kind) == 30.0

    def test_what_is_below_the_finest_grid(self, dtype, kind):
        top = 60 if kind is WIDE and dtype is np.float32 else 0  # (no number of float32 is 2**-202)
        one, finest = 2.0**top, 2.0 ** (top - self.depth(dtype, kind))
        assert guessed_sum([one, finest, -one], top, dtype, kind) == finest
        assert guessed_sum([one, 1.5 * finest, -one], top, dtype, kind) is None
        assert guessed_sum([one, finest / 2], top, dtype, kind) is None
        assert guessed_sum([one, float(np.finfo(dtype).smallest_subnormal)], top, dtype, kind) is None

    def test_a_block_gives_a_guess_that_does_for_blocks_like_it(self, rng, dtype, kind):
        largest = 60 if dtype is np.float32 else 400
        for exponent in range(-largest, largest, 7):
            values = np.ldexp(rng.normal(size=200), exponent).astype(dtype)
            guess = _guess_of(values)
            for scale in (1, 8, 2.0**-6):
                scaled = values * dtype(scale)
                assert guessed_sum(scaled, guess, dtype, kind) == math.fsum(scaled.tolist())

    def test_a_block_of_many_binades_gives_a_guess_for_wide_grids(self, dtype, kind):
        values = [1.0, 2.0**-100 if dtype is np.float32 else 2.0**-140]
        guess = _guess_of(np.array(values, dtype))
        assert guessed_sum(values, guess, dtype, kind) == (1.0 if kind is WIDE else None)

    def test_a_block_that_no_grids_take_gives_none(self, dtype, kind):
        smallest = float(np.finfo(dtype).smallest_subnormal)
        for values in ([1.0, INF], [NAN], [2.0**120 if dtype is np.float32 else 1.0, smallest]):
            assert _guess_of(np.array(values, dtype)) == NO_GUESS

    def test_guesses_at_the_ends(self, dtype, kind):
        """Of zeros, of the smallest and of the largest numbers that grids take."""
        smallest = float(np.finfo(dtype).smallest_subnormal)
        top = 2.0**125 if dtype is np.float32 else 2.0**959
        for values in ([0.0, 0.0], [smallest] * 3, [top, top / 2]):
            array = np.array(values, dtype)
            guess = _guess_of(array)
            assert guessed_sum(values, guess, dtype, kind) in (None, math.fsum(values)) if guess != NO_GUESS else True
            assert exact_sum(values, dtype=dtype) == math.fsum(values)


@EVERY_KIND
class TestLargeValues:
    """Those of float32 that reach no lower than a kind says, whose bits are not looked for below."""

    def check(self, kind, large, others, exponent):
        state = np.zeros(STATE_SIZE, np.int64)
        arrays = (np.array(values, np.float32) for values in (large, others))
        was_exact, total = _sum_on[kind](*arrays, exponent, state)
        assert was_exact
        assert total == math.fsum([*map(float, large), *map(float, others)])

    def lowest(self, kind, exponent):
        return max(exponent - kind.reach, -126)

    @pytest.mark.parametrize("exponent", [-50, 0, 30])
    def test_from_the_lowest_to_the_highest(self, rng, kind, exponent):
        exponents = rng.integers(self.lowest(kind, exponent), exponent + 1, 2048)
        large = np.ldexp(rng.uniform(1, 2, 2048) * rng.choice([-1, 1], 2048), exponents).astype(np.float32)
        large[rng.random(2048) < 0.1] = rng.choice([0.0, -0.0])
        self.check(kind, large, [], exponent)
        others = np.ldexp(rng.uniform(1, 2, 48), rng.integers(max(exponent - 44, -126), exponent + 1, 48))
        self.check(kind, large, others.astype(np.float32), exponent)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_every_bit_at_the_limits(self, kind, sign):
        lowest = np.ldexp(np.float32(1), self.lowest(kind, 0))
        for value in (lowest, np.nextafter(lowest, np.float32(1)), np.float32(2 - 2.0**-20)):
            self.check(kind, [sign * value] * MAX_BLOCK, [], 0)
            self.check(kind, [sign * value] * 2048, [sign * value] * 2048, 0)

    @pytest.mark.parametrize("special", [INF, -INF, NAN, 4.5, -5.0, 2.0**30])
    def test_what_does_not_fit_is_told(self, kind, special):
        for large, others in (([special] + [1.0] * 15, [1.0] * 16), ([1.0] * 16, [special] + [1.0] * 15)):
            state = np.zeros(STATE_SIZE, np.int64)
            arrays = (np.array(values, np.float32) for values in (large, others))
            assert not _sum_on[kind](*arrays, 0, state)[0]
            assert not state.any()


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
