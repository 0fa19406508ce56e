"""Make the polynomials of ``fastloss/_kernels/_vecmath.py``: Remez exchange in 60 digits, then rounding to the dtype.

    python benchmarks/minimax.py

prints, for each function and dtype, the coefficients (lowest degree first) and the worst relative error of the
rounded polynomial on its interval. Needs mpmath (the ``test`` extra).
"""

import numpy as np
from mpmath import expm1, log, log1p, lu_solve, matrix, mp, mpf

mp.dps = 60


def remez(target, weight, low, high, degree, iterations=20):
    """Coefficients p minimising max ``|weight(x) * (p(x) - target(x))|`` on [low, high], lowest degree first."""
    count = degree + 2
    low, high = mpf(low), mpf(high)
    nodes = [
        (low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (2 * i + 1) / (2 * count)) for i in reversed(range(count))
    ]
    grid = [low + (high - low) * i / mpf(1500) for i in range(1501)]
    for _ in range(iterations):
        system = matrix(count, count)
        right = matrix(count, 1)
        for row, x in enumerate(nodes):
            for power in range(degree + 1):
                system[row, power] = x**power
            system[row, degree + 1] = (-1) ** row / weight(x)
            right[row] = target(x)
        solution = lu_solve(system, right)
        coefficients = [solution[i] for i in range(degree + 1)]
        errors = [weight(x) * (mp.polyval(coefficients[::-1], x) - target(x)) for x in grid]
        extrema = []
        for x, error in zip(grid, errors, strict=True):
            if extrema and (extrema[-1][1] > 0) == (error > 0):
                if abs(error) > abs(extrema[-1][1]):
                    extrema[-1] = (x, error)
            else:
                extrema.append((x, error))
        while len(extrema) > count:
            extrema.pop(0 if abs(extrema[0][1]) < abs(extrema[-1][1]) else -1)
        if len(extrema) < count:
            break
        nodes = [x for x, _ in extrema]
    return coefficients


def rounded(coefficients, dtype):
    """The coefficients as numbers of ``dtype`` (exactly, as mpf)."""
    if dtype is np.float32:
        return [mpf(float(np.float32(float(c)))) for c in coefficients]
    return [mpf(float(c)) for c in coefficients]


def worst(approximation, exact, low, high):
    points = [mpf(low) + (mpf(high) - mpf(low)) * i / 4000 for i in range(4001)]
    return max(abs(approximation(x) / exact(x) - 1) for x in points if exact(x) != 0)


def _exp_rest(x):
    """(exp(x) - 1 - x) / x**2"""
    return (expm1(x) - x) / x**2 if abs(x) > mpf("1e-25") else mpf(1) / 2 + x / 6


def _log1p_rest(x):
    """(log1p(x) - x) / x**2"""
    return (log1p(x) - x) / x**2 if abs(x) > mpf("1e-25") else -mpf(1) / 2 + x / 3


def _log1p_last(x):
    """(log1p(x) - x + x**2 / 2) / x**3"""
    return (log1p(x) - x + x**2 / 2) / x**3 if abs(x) > mpf("1e-17") else mpf(1) / 3 - x / 4


def main():
    half = log(2) / 2
    for dtype, degrees in ((np.float32, (4, 8)), (np.float64, (10, 19))):
        name = np.dtype(dtype).name
        # exp(x) = 1 + x + x**2 * p(x); the weight makes the error relative to exp.
        degree = degrees[0]
        margin = half * (1 + mpf(2) ** -10)
        p = rounded(remez(_exp_rest, lambda x: x**2 / mp.exp(x) + mpf("1e-6"), -margin, margin, degree), dtype)
        error = worst(lambda x, p=p: 1 + x + x**2 * mp.polyval(p[::-1], x), mp.exp, -margin, margin)
        report(f"{name} exp", p, error)
        # log1p(x) = x + x**2 * p(x) on [-1/4, 1/2]; the error is relative to log1p.
        degree = degrees[1]
        p = rounded(
            remez(_log1p_rest, lambda x: x**2 / max(abs(log1p(x)), mpf("1e-6")) + mpf("1e-6"), "-0.25", "0.5", degree),
            dtype,
        )
        error = worst(lambda x, p=p: x + x**2 * mp.polyval(p[::-1], x), log1p, "-0.25", "0.5")
        report(f"{name} log1p", p, error)
    # log(1 + x) = x - x**2 / 2 + x**3 * p(x) on [-1/3, 1/3] for the divergence; the error is absolute.
    third = mpf(1) / 3
    low = -third * (1 + mpf(2) ** -10)
    p = rounded(remez(_log1p_last, lambda x: abs(x) ** 3 + mpf("1e-7"), low, third, 7), np.float32)
    points = [-third + third * i / 1000 for i in range(2001)]
    error = max(abs(x - x**2 / 2 + x**3 * mp.polyval(p[::-1], x) - log1p(x)) for x in points)
    report("float32 log", p, error, "absolute")


def report(title, coefficients, error, kind="relative"):
    print(f"{title}: degree {len(coefficients) - 1}, worst {kind} error {mp.nstr(error, 3)}")
    for c in coefficients:
        print(f"    {float(c)!r},")


if __name__ == "__main__":
    main()
