"""Count the wrong digits: losses, softmax and log_softmax of fastloss, PyTorch and SciPy against exact values.

    python benchmarks/accuracy.py [--quick | --tiny]

The errors are in units in the last place (ulp) of the exact value of the given logits: the worst, and the 99th
percentile. The exact values are computed in the 64-bit mantissa of `longdouble` where the machine has it, and checked
against mpmath on a few rows of every kind; elsewhere mpmath computes them all. Exits with 1 if fastloss

* has a loss off by more than 2e-6 (float32) or 4e-15 (float64) of its value,
* has an entry of softmax or log_softmax off by more than 4 ulp, or
* has a larger worst error than one of the others on the same rows.
"""

import argparse
import importlib.metadata
import itertools
import sys

import numpy as np

BANDS = {"confident": (1e-12, 1e-6), "ordinary": (1e-2, 10.0), "wrong": (10.0, 1e4)}
CLASSES = (2, 10, 100, 1000, 4097, 128_256)
LOSS_BOUNDS = {"float32": 2e-6, "float64": 4e-15}
ENTRY_BOUND = 4.0  # ulp
DIGITS = 40
LONG = np.longdouble
HAS_LONG = np.finfo(LONG).nmant >= 63
LONG_ERROR = 1e-18  # of the longdouble formulas, against mpmath


# ---------------------------------------------------------------------------------------------------- engines


def _fastloss():
    import fastloss

    return {
        "loss": lambda x, t: fastloss.cross_entropy(x, t, reduction="none"),
        "mean": fastloss.cross_entropy,
        "softmax": fastloss.softmax,
        "log_softmax": fastloss.log_softmax,
    }


def _torch():
    import torch

    functions = torch.nn.functional
    tensor = torch.from_numpy
    return {
        "loss": lambda x, t: functions.cross_entropy(tensor(x), tensor(t), reduction="none").numpy(),
        "mean": lambda x, t: functions.cross_entropy(tensor(x), tensor(t)).numpy(),
        "softmax": lambda x: functions.softmax(tensor(x), dim=1).numpy(),
        "log_softmax": lambda x: functions.log_softmax(tensor(x), dim=1).numpy(),
    }


def _scipy():
    import scipy.special as special

    def loss(x, t):
        return -np.take_along_axis(special.log_softmax(x, axis=1), t[:, None], axis=1)[:, 0]

    return {
        "loss": loss,
        "mean": lambda x, t: loss(x, t).mean(),
        "softmax": lambda x: special.softmax(x, axis=1),
        "log_softmax": lambda x: special.log_softmax(x, axis=1),
    }


def engines():
    """Name -> functions, of what is installed."""
    found = {}
    for name, make in {"fastloss": _fastloss, "torch": _torch, "scipy": _scipy}.items():
        try:
            found[name] = make()
        except ImportError:
            print(f"{name} is not installed: left out")
    return found


# ----------------------------------------------------------------------------------------------- exact values


def exact_long(x, t):
    """Losses, softmax and log_softmax of rows, in longdouble."""
    x = x.astype(LONG)
    places = np.arange(len(x))
    top = x.argmax(axis=1)
    largest = x[places, top][:, None]
    # x - largest with its rounding error: the exponential of -700 shows every digit that is lost in its argument
    below = x - largest
    back = below - x
    lost = (x - (below - back)) - (largest + back)
    exponentials = np.exp(below) * (1 + lost)
    exponentials[places, top] = 0
    rest = exponentials.sum(axis=1)
    exponentials[places, top] = 1
    log_rest = np.log1p(rest)
    log_softmax = below - log_rest[:, None]
    return {
        "loss": -log_softmax[places, t],
        "softmax": exponentials / (1 + rest)[:, None],
        "log_softmax": log_softmax,
    }


def exact_mpmath(x, t):
    """The same, as lists of mpmath numbers."""
    import mpmath

    exact = {"loss": [], "softmax": [], "log_softmax": []}
    with mpmath.workdps(DIGITS):
        for row, target in zip(x, t, strict=True):
            top = int(row.argmax())
            below = [mpmath.mpf(float(v)) - mpmath.mpf(float(row[top])) for v in row]
            exponentials = [mpmath.exp(v) for v in below]
            rest = mpmath.fsum(e for c, e in enumerate(exponentials) if c != top)
            log_rest = mpmath.log1p(rest)
            exact["loss"].append(log_rest - below[target])
            exact["softmax"].append([e / (1 + rest) for e in exponentials])
            exact["log_softmax"].append([v - log_rest for v in below])
    return exact


def _long(number):
    """An mpmath number as a longdouble: the sum of its leading doubles."""
    total = LONG(0)
    for _ in range(3):
        part = float(number)
        total += LONG(part)
        number -= part
    return total


def _to_long(numbers):
    import mpmath

    with mpmath.workdps(DIGITS):
        return np.array([_to_long(n) if isinstance(n, list) else _long(n) for n in numbers])


def exact_values(x, t, n_checked):
    """The exact values in longdouble, of which the first rows were computed by mpmath too."""
    n_mpmath = min(n_checked, len(x)) if HAS_LONG else len(x)
    slow = {}
    if n_mpmath:
        slow = {what: _to_long(values) for what, values in exact_mpmath(x[:n_mpmath], t[:n_mpmath]).items()}
    if not HAS_LONG:
        return slow
    exact = exact_long(x, t)
    for what, values in slow.items():
        seen = values > np.finfo(np.float64).tiny if what == "softmax" else values != 0
        apart = np.abs(exact[what][:n_mpmath] - values)[seen] / np.abs(values[seen])
        if apart.size and apart.max() > LONG_ERROR:
            raise SystemExit(f"accuracy.py: the longdouble {what} is off by {apart.max():.1e}: no reference")
    return exact


# ---------------------------------------------------------------------------------------------------- rows


def rows(rng, n_rows, n_classes, band, dtype):
    """Logits and targets whose losses spread over a band, logarithmically."""
    x = rng.standard_normal((n_rows, n_classes)) * rng.choice([0.5, 2.0, 5.0], (n_rows, 1))
    t = rng.integers(0, n_classes, n_rows)
    places = np.arange(n_rows)
    losses = np.exp(rng.uniform(*np.log(BANDS[band]), n_rows))
    x[places, t] = -np.inf
    largest = x.max(axis=1)
    others = largest + np.log(np.exp(x - largest[:, None]).sum(axis=1))
    x[places, t] = others - losses - np.log(-np.expm1(-losses))
    return x.astype(dtype), t


def ulp_errors(got, exact, dtype):
    """Distances from the exact values in units in their last place."""
    info = np.finfo(dtype)
    _, exponent = np.frexp(exact)
    return np.abs(got.astype(LONG) - exact) / np.ldexp(LONG(1), exponent - 1 - info.nmant)


def _result(dtype, what, n_classes, n_rows, errors):
    """A line of the table, from the ulp errors of each engine."""
    return {
        "dtype": dtype,
        "what": what,
        "classes": n_classes,
        "rows": n_rows,
        "max": {name: float(values.max()) for name, values in errors.items()},
        "p99": {name: float(np.percentile(values.astype(np.float64), 99)) for name, values in errors.items()},
        "failures": [],
    }


def measure(found, dtype, band, n_classes, n_rows, n_checked=2, seed=0):
    """Lines for the losses and for the entries of softmax and log_softmax, on the same rows."""
    rng = np.random.default_rng([seed, n_classes, list(BANDS).index(band)])
    x, t = rows(rng, n_rows, n_classes, band, dtype)
    exact = exact_values(x, t, n_checked)
    results = []
    for what in ("loss", "softmax", "log_softmax"):
        # below the normal numbers there are no units in the last place to count
        seen = np.abs(exact[what]) >= np.finfo(dtype).tiny
        values = exact[what][seen]
        errors, relative = {}, {}
        for name, functions in found.items():
            got = np.asarray(functions[what](x, t) if what == "loss" else functions[what](x))[seen]
            errors[name] = ulp_errors(got, values, dtype)
            relative[name] = float((np.abs(got.astype(LONG) - values) / np.abs(values)).max())
        result = _result(dtype, f"{what}, {band}", n_classes, n_rows, errors)
        if what == "loss" and relative["fastloss"] > LOSS_BOUNDS[dtype]:
            result["failures"].append(f"relative error {relative['fastloss']:.2g} > {LOSS_BOUNDS[dtype]:g}")
        if what != "loss" and result["max"]["fastloss"] > ENTRY_BOUND:
            result["failures"].append(f"{result['max']['fastloss']:.2f} ulp > {ENTRY_BOUND:g}")
        results.append(_against_peers(result))
    return results


def measure_mean(found, n_rows, n_classes=4, seed=0):
    """A line for the mean loss of many rows in float32. The reference sums float64 losses, good to some 1e-16."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, n_classes), np.float32)
    t = rng.integers(0, n_classes, n_rows)
    total = LONG(0)
    for begin in range(0, n_rows, 1 << 20):
        piece = x[begin : begin + (1 << 20)].astype(np.float64)
        log_sum = np.log(np.exp(piece).sum(axis=1))  # the logits are small: nothing overflows
        losses = log_sum - np.take_along_axis(piece, t[begin : begin + (1 << 20), None], axis=1)[:, 0]
        total += losses.sum(dtype=LONG)
    exact = np.array([total / n_rows])
    errors = {
        name: ulp_errors(np.atleast_1d(np.asarray(functions["mean"](x, t))), exact, "float32")
        for name, functions in found.items()
    }
    return _against_peers(_result("float32", "mean", n_classes, n_rows, errors))


def _against_peers(result):
    own = result["max"]["fastloss"]
    for name, worst in result["max"].items():
        if worst < own:
            result["failures"].append(f"worst error {own:.4g} ulp, {name}'s is {worst:.4g}")
    return result


# ----------------------------------------------------------------------------------------------------- output


def _line(result, names):
    cells = [f"{result['dtype']:8} {result['what']:23} {result['classes']:>7} {result['rows']:>9}"]
    cells += [f"{result['max'][name]:11.4g} {result['p99'][name]:9.3g}" for name in names]
    return "  ".join([*cells, "; ".join(result["failures"]) or "ok"])


def _header(names):
    cells = [f"{'dtype':8} {'what':23} {'classes':>7} {'rows':>9}"]
    return "  ".join([*cells, *(f"{name + ' max':>11} {'99 %':>9}" for name in names), "verdict"])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and classes")
    parser.add_argument("--tiny", action="store_true", help="very few: whether everything works, not how exact")
    chosen = parser.parse_args(arguments)
    quick = chosen.quick or chosen.tiny
    found = engines()
    classes = CLASSES[:2] if chosen.tiny else CLASSES[:-2] if quick else CLASSES
    budget = 100 if chosen.tiny else 20_000 if quick else 2_000_000
    print("errors in units in the last place of the exact value\n" + _header(found))
    failed = 0
    for dtype, band, n_classes in itertools.product(LOSS_BOUNDS, BANDS, classes):
        n_rows = min(max(budget // n_classes, 8), 20_000)
        for result in measure(found, dtype, band, n_classes, n_rows, n_checked=1 if n_classes > 4096 else 4):
            failed += bool(result["failures"])
            print(_line(result, found), flush=True)
    result = measure_mean(found, 5 * budget)
    failed += bool(result["failures"])
    print(_line(result, found))
    packages = ("fastloss", "numpy", "torch", "scipy", "mpmath")
    print(
        ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages if p not in ("torch", "scipy") or p in found)
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
