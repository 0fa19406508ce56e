"""The kernels' bodies as plain Python: with NUMBA_DISABLE_JIT=1 every line can be stepped through, and is covered.

This file is also the script that a process without the compiler runs: every kernel on small inputs, against the
references.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import references

import fastloss
from fastloss import _runtime, metrics

INF, NAN = float("inf"), float("nan")


def close(got, expected, tolerance=2e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=1e-6 if tolerance > 1e-9 else 1e-13)


def every_case(check):
    """Call a check with logits and targets: rows and planes, every layout of a class axis, every dtype."""
    rng = np.random.default_rng(11)
    shapes = [(3, 5), (9, 5), (2, 40), (9, 33), (2, 19, 3), (17, 3), (9, 300), (1, 8200)]
    for dtype, tolerance in ((np.float32, 2e-6), (np.float64, 1e-13)):
        for shape in shapes:
            x = (rng.normal(size=shape) * 3).astype(dtype)
            t = rng.integers(0, min(shape[1], 100), size=(shape[0], *shape[2:]))
            check(x, t, tolerance)
        check(np.asfortranarray(x[:, :300]), np.minimum(t, 299), tolerance)
        x = (rng.normal(size=(10, 2, 30)) * 3).astype(dtype).transpose(0, 2, 1)
        check(x, rng.integers(0, 30, size=(10, 2)), tolerance)
        check(x[::-1, ::2], rng.integers(0, 15, size=(10, 2)), tolerance)
    x = (rng.normal(size=(9, 20)) * 3).astype(np.float16)
    check(x, rng.integers(0, 20, size=9), 2e-6)
    check((x * 4).astype(int), rng.integers(0, 20, size=9), 1e-13)
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return
    check(x.astype(bfloat16), rng.integers(0, 20, size=9), 2e-6)


def check_losses(x, t, tolerance):
    """cross_entropy and nll_loss with indices: options, targets of every width."""
    weight = np.linspace(0.5, 2, x.shape[1])
    for options in ({}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.2}):
        expected = references.cross_entropy(x, t, reduction="none", **options)
        close(fastloss.cross_entropy(x, t, reduction="none", **options), expected, tolerance)
    if x.shape[1] > 300:
        return
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64):
        labels = np.minimum(t, 100).astype(dtype)
        labels.flat[0] = 101
        for function, reference in (
            (fastloss.cross_entropy, references.cross_entropy),
            (fastloss.nll_loss, references.nll_loss),
        ):
            options = {"weight": weight, "ignore_index": 101}
            close(function(x, labels, **options), reference(x, labels, **options), tolerance)


def check_probabilities(x, t, tolerance):
    x = x[..., :300] if x.shape[1] > 300 else x
    y = np.random.default_rng(1).random(x.shape).astype(np.float32 if x.dtype.kind == "i" else x.dtype)
    weight = np.linspace(0.5, 2, x.shape[1])
    for options in ({}, {"weight": weight, "label_smoothing": 0.2}):
        expected = references.cross_entropy_probabilities(x, y, **options)
        close(fastloss.cross_entropy(x, y, **options), expected, tolerance)
        expected = references.cross_entropy_probabilities(x, y, reduction="none", **options)
        close(fastloss.cross_entropy(x, y, reduction="none", **options), expected, tolerance)


def check_outputs(x, t, tolerance):
    for axis in range(x.ndim):
        close(fastloss.softmax(x, axis), references.softmax(x, axis), tolerance)
        close(fastloss.log_softmax(x, axis), references.log_softmax(x, axis), tolerance)
        close(fastloss.logsumexp(x, axis), references.logsumexp(x, axis), tolerance)
    close(fastloss.logsumexp(x), references.logsumexp(x), tolerance)


def check_divergence(x, t, tolerance):
    x = x[:, :40]
    y = np.random.default_rng(2).random(x.shape).astype(np.float32 if x.dtype.kind == "i" else x.dtype)
    for log_target in (False, True):
        for reduction in ("none", "sum"):
            got = fastloss.kl_div(x, y, reduction=reduction, log_target=log_target)
            close(got, references.kl_div(x, y, reduction, log_target), tolerance)


def check_gradients(x, t, tolerance):
    """Cross-entropy with indices, smoothed and of probabilities; negative log-likelihood; Kullback-Leibler."""
    x, t = (x[:, :40], np.minimum(t, 39)) if x.shape[1] > 40 else (x, t.copy())
    p = references.softmax(x, 1)
    one_hot = np.moveaxis(np.eye(x.shape[1])[t], -1, 1)
    w = np.linspace(0.5, 2, x.shape[1]).reshape(-1, *[1] * (x.ndim - 2))
    y = p.astype(np.float32 if x.dtype.kind == "i" else x.dtype)[::-1]
    gradient_of = lambda name, *arrays, **options: fastloss.value_and_grad(getattr(fastloss, name))(*arrays, **options)
    for eps in (0.0, 0.2):
        for target, masses in ((t, one_hot), (y, y.astype(np.float64))):
            masses = w * (masses * (1 - eps) + eps / x.shape[1])
            expected = p * masses.sum(1, keepdims=True) - masses
            options = {"weight": w.ravel(), "label_smoothing": eps, "reduction": "sum"}
            close(gradient_of("cross_entropy", x, target, **options)[1], expected, tolerance)
    close(gradient_of("nll_loss", x, t)[1], -one_hot / t.size, tolerance)
    for log_target in (False, True):
        expected = -np.exp(y.astype(np.float64)) if log_target else -y.astype(np.float64)
        close(gradient_of("kl_div", x, y, reduction="sum", log_target=log_target)[1], expected, tolerance)
    rows = np.moveaxis(x.astype(np.float64), 1, -1).copy()
    rows[t == t.flat[0]] = NAN
    gradient = gradient_of("cross_entropy", np.moveaxis(rows, -1, 1), t, ignore_index=int(t.flat[0]))[1]
    assert np.isfinite(gradient).all()
    rows[t != t.flat[0]] = 0
    rows[..., 0] = 200
    gradient = gradient_of("cross_entropy", np.moveaxis(rows, -1, 1), t, ignore_index=int(t.flat[0]), reduction="sum")[
        1
    ]
    kept = np.moveaxis(gradient, 1, -1)[(t != t.flat[0]) & (t > 0)]
    if x.shape[1] > 1 and len(kept):
        close(kept[:, 0], np.ones(len(kept)))


def check_metrics():
    """Log loss in each layout, the metrics of logits, labels through both tables; closed forms."""
    rng = np.random.default_rng(3)
    for n_classes in (2, 3, 9, 20):
        logits = rng.normal(size=(30, n_classes))
        p = references.softmax(logits, 1)
        y = np.append(np.arange(n_classes), rng.integers(0, n_classes, 30 - n_classes))
        weights = rng.random(30)
        own, hot = p[np.arange(30), y], np.eye(n_classes)[y]
        names = np.array([f"class {'x' * c}" for c in range(n_classes)])[y]
        for labels in (y, y + 5, names):
            for view in (p, np.asfortranarray(p), np.repeat(p, 2, 1)[:, ::2]):
                expected = np.average(-np.log(own), weights=weights)
                close(metrics.log_loss(labels, view, sample_weight=weights), expected, 1e-13)
            expected = ((p - hot) ** 2).sum(1).mean() / (2 if n_classes == 2 else 1)
            close(metrics.brier_score_from_logits(labels, logits), expected, 1e-13)
            hits = (p > own[:, None]).sum(1) < 1
            close(metrics.top_k_accuracy_from_logits(labels, logits, k=1), hits.mean(), 1e-13)
    z = rng.normal(size=30)
    p = 1 / (1 + np.exp(-z))
    y = z > rng.normal(size=30)
    close(metrics.log_loss(y, p), -np.log(np.where(y, p, 1 - p)).mean(), 1e-13)
    close(metrics.brier_score_from_logits(y, z), ((y - p) ** 2).mean(), 1e-13)
    close(metrics.top_k_accuracy_from_logits(y, z, k=1), ((z > 0) == y).mean(), 1e-13)
    many = np.array([f"{i:03d}" for i in range(300)])
    close(metrics.log_loss(many, np.full((300, 300), 1 / 300)), np.log(300), 1e-13)
    for bad in ([[0.5, 1.5]] * 9, [[0.5, NAN]] * 9, np.full((9, 2), -0.5, order="F")):
        with pytest.raises(ValueError, match=r"y_prob contains values|Input contains NaN"):
            metrics.log_loss([0, 1, 0] * 3, bad)
    with pytest.raises(ValueError, match="infinity"):
        metrics.brier_score_from_logits([0, 1], [[INF, 0], [0, 1]])


def check_long_rows():
    """Rows in pieces, as threads share them: of contiguous classes, and of strided ones."""
    rng = np.random.default_rng(4)
    _runtime.SPLIT_THRESHOLD = _runtime.LARGE_TILE = 0
    for shape, order in (((2, 32_800), "C"), ((9, 8200), "F")):
        x = np.asarray((rng.normal(size=shape) * 3).astype(np.float32), order=order)
        t = rng.integers(0, 100, len(x))
        y = np.asarray(rng.random(shape).astype(np.float32), order=order)
        t[1] = shape[1] - 1
        close(fastloss.logsumexp(x, 1), references.logsumexp(x, 1))
        close(fastloss.cross_entropy(x, y), references.cross_entropy_probabilities(x, y))
        for options in ({}, {"ignore_index": int(t[1])}, {"label_smoothing": 0.1}):
            close(fastloss.cross_entropy(x, t, **options), references.cross_entropy(x, t, **options))
        close(fastloss.softmax(x, 1), references.softmax(x, 1))
        close(fastloss.log_softmax(x, 1), references.log_softmax(x, 1))


def check_special_values():
    rows = [[0, -INF, 1], [-INF] * 3, [0, INF, 1], [0, NAN, 1], [-200, 0, 1], [1e30, -1e30, 0], [0, -23, -INF]]
    for dtype in (np.float32, np.float64):
        for n_rows, n_classes in ((1, 3), (9, 3), (1, 30), (9, 30)):
            for row in rows:
                x = np.full((n_rows, n_classes), -INF, dtype)
                x[:, :3] = row
                for target in range(3):
                    t = np.full(n_rows, target)
                    expected = references.cross_entropy(x, t, reduction="none")
                    close(fastloss.cross_entropy(x, t, reduction="none"), expected)
                    t[:] = -100
                    assert not fastloss.cross_entropy(x, t, reduction="none").any()
                close(fastloss.logsumexp(x, 1), references.logsumexp(x, 1))
                close(fastloss.softmax(x, 1), references.softmax(x, 1))
                y = np.full(x.shape, 0.5, dtype)
                close(fastloss.cross_entropy(x, y), references.cross_entropy_probabilities(x, y))
        x, y = np.array([0, -INF, -1, 0, 1], dtype), np.array([0, 0, 1e-310, -1, INF], dtype)
        close(fastloss.kl_div(x, y, reduction="none"), references.kl_div(x, y, "none"))


def check_sums():
    """Values that leave the fast path of the exact sum: far apart, infinite, NaN, at the ends of float64."""
    for values in (
        [1e300, 1.0, -1e300], [1e-300, 1e-320, 5e-324], [INF, 1.0], [INF, -INF], [-INF, 2.0], [NAN, 1.0],
        [1.0, 2.0**-60, -1.0], [0.0, 0.0], [1.7e308, 1.7e308, -1.7e308], [-1.5, -2.5], [2.0**32, 0.5, -(2.0**32)],
    ):  # fmt: skip
        x = -np.array(values)[:, None]
        expected = 1.7e308 if values[0] == 1.7e308 else references.total(values)
        got = fastloss.nll_loss(x, np.zeros(len(x), int), reduction="sum")
        np.testing.assert_equal(float(got), expected)


def check_errors():
    for n_rows in (1, 9):
        for bad in (3, -1):
            t = np.zeros(n_rows, np.int64)
            t[-1] = bad
            for function in (fastloss.cross_entropy, fastloss.nll_loss):
                with pytest.raises(IndexError, match=f"got {bad} at {n_rows - 1},"):
                    function(np.zeros((n_rows, 3)), t)


def main():
    # In the kernels infinite and NaN operands are ordinary; NumPy's operators, standing in for vectors, warn of them.
    np.seterr(all="ignore")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "reduction='mean'")
    for check in (check_losses, check_probabilities, check_outputs, check_divergence, check_gradients):
        every_case(check)
    check_special_values()
    check_metrics()
    check_sums()
    check_errors()
    check_long_rows()
    print("all kernels agree")


def test_every_kernel_as_python():
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, str(Path(__file__))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all kernels agree\n"


if __name__ == "__main__":
    main()
