"""The integers, loops and branches of the kernels' helpers, which are lowered by fastloss, against Python and NumPy."""

import itertools

import numba
import numpy as np
import pytest

from fastloss._kernels._jit import inline, subroutine

LOWEST, HIGHEST = -(2**63), 2**63 - 1
NUMBERS = (LOWEST, LOWEST + 1, -7, -2, -1, 0, 1, 2, 3, 7, 64, HIGHEST - 1, HIGHEST)


@inline
def _divided(a, b):
    return a // b, a % b


@subroutine
def _divided_in_place(a, b):
    quotient, remainder = a, a
    quotient //= b
    remainder %= b
    return quotient, remainder


@subroutine
def _extremes(a, b, c):
    return min(a, b), max(a, b), min(a, b, c), max(a, b, c)


@subroutine
def _collect(begin, end, step, found):
    n = 0
    for i in range(begin, end, step):
        if i == 5:
            continue
        if i > 100:
            break
        found[n] = i
        n += 1
    return n


@subroutine
def _count(n):
    total = 0
    for i in range(n):
        for j in range(i, n):
            total += i * j
    return total


@subroutine
def _chosen(n):
    """A variable that is assigned in several blocks, and in a loop."""
    value, last = 1, 0
    while n > 0:
        last = value
        if n % 2 == 0:
            value = value + n
        elif n % 3 == 0:
            value = last - 1
        n -= 1
    return value, last


@numba.njit
def divided(a, b):
    return _divided(a, b), _divided_in_place(a, b)


@numba.njit
def extremes(a, b, c):
    return _extremes(a, b, c)


@numba.njit
def collect(begin, end, step, found):
    return _collect(begin, end, step, found)


@numba.njit
def count(n):
    return _count(n)


@numba.njit
def chosen(n):
    return _chosen(n)


@pytest.mark.parametrize(("a", "b"), list(itertools.product(NUMBERS, NUMBERS)))
def test_division_is_numpys(a, b):
    """The floor, as in Python; 0 for a division by 0, and no trap where the quotient overflows."""
    with np.errstate(all="ignore"):
        expected = int(np.int64(a) // np.int64(b)), int(np.int64(a) % np.int64(b))
    if b != 0 and not (a == LOWEST and b == -1):
        assert expected == (a // b, a % b)
    assert divided(a, b) == (expected, expected)


@pytest.mark.parametrize("numbers", list(itertools.product((LOWEST, -3, 0, 2, HIGHEST), repeat=3)))
def test_minimum_and_maximum(numbers):
    a, b, c = numbers
    assert extremes(a, b, c) == (min(a, b), max(a, b), min(a, b, c), max(a, b, c))


@pytest.mark.parametrize(("begin", "end"), list(itertools.product((-9, -1, 0, 1, 4, 9, 120), repeat=2)))
@pytest.mark.parametrize("step", [1, 2, 7, 1000, -1, -3])
def test_ranges(begin, end, step):
    expected = []
    for i in range(begin, end, step):
        if i == 5:
            continue
        if i > 100:
            break
        expected.append(i)
    found = np.zeros(300, np.int64)
    n = collect(begin, end, step, found)
    assert found[:n].tolist() == expected


@pytest.mark.parametrize("n", [-1, 0, 1, 2, 17])
def test_nested_loops(n):
    assert count(n) == sum(i * j for i in range(n) for j in range(i, n))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 31])
def test_variables_of_several_blocks(n):
    assert chosen(n) == _chosen(n)
