"""Rows so long that threads share them: the same bits as in one thread, the values of the references, Ctrl-C."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import references
import scipy.special

import fastloss
from fastloss import _runtime

INF, NAN = float("inf"), float("nan")

# What is shared: pieces of four chunks of 8192 classes each, of a row; of a tile of strided rows, single chunks.
LENGTHS = (8192, 8193, 20_000, 128_256, 1_000_003)
PLANES = ((9, 8193), (20, 20_000), (300, 8200))


def layouts(x, is_plain):
    """The same rows contiguous, in Fortran order, and those of a plain problem between others, with a stride along the
    classes, and upside down.
    """
    yield "contiguous", np.ascontiguousarray(x)
    yield "Fortran", np.asfortranarray(x)
    if not is_plain:
        return
    wide = np.zeros((2 * len(x), x.shape[1]), x.dtype)
    wide[::2] = x
    yield "every other row", wide[::2]
    wide = np.zeros((len(x), 2 * x.shape[1]), x.dtype)
    wide[:, ::2] = x
    yield "every other class", wide[:, ::2]
    yield "backwards", np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]


def problems():
    """A name, rows that have what is unusual in one chunk alone, and targets in the first and the last chunk."""
    rng = np.random.default_rng(17)
    shapes = [(n_rows, n_classes) for n_classes in LENGTHS for n_rows in (1, 2, 3)]
    for n_rows, n_classes in (*shapes, *PLANES):
        x = (rng.normal(size=(n_rows, n_classes)) * 3).astype(np.float32)
        t = rng.integers(0, n_classes, n_rows)
        t[0] = n_classes - 1
        yield f"{x.shape}", x, t
        if (n_classes < 20_000 and n_rows < 9) or n_rows == 2 or n_classes == LENGTHS[-1]:
            continue
        late = n_classes // 8192 * 8192  # the last chunk
        for name, value, where in (
            ("masked, but for the last chunk", -INF, np.s_[:late]),
            ("the last chunk masked", -INF, np.s_[late:]),
            ("masked in places", -INF, np.s_[5::3]),
            ("NaN in the last chunk", NAN, np.s_[-1]),
            ("NaN in the first chunk", NAN, np.s_[5]),
            ("inf in the last chunk", INF, np.s_[-1]),
            ("far above the rest", 500.0, np.s_[-1]),
            ("ties", 20.0, np.s_[::1000]),
        ):
            odd = x.copy()
            odd[0, where] = value
            t = rng.integers(0, n_classes, n_rows)
            t[0] = 0 if name != "masked, but for the last chunk" else late
            yield f"{x.shape}, {name}", odd, t
            t[-1] = -100
            yield f"{x.shape}, {name}, a row ignored", odd, t
        yield f"{x.shape}, all masked", np.full_like(x, -INF), t


def results(x, t, reductions=("none", "sum", "mean")):
    yield fastloss.logsumexp(x, 1)
    for reduction in reductions:
        yield fastloss.cross_entropy(x, t, reduction=reduction)


def more_results(x, t):
    """Of the functions that share the same code."""
    weight = np.linspace(0.5, 2, x.shape[1])
    yield fastloss.cross_entropy(x, t, weight)
    yield fastloss.cross_entropy(x, t, weight, label_smoothing=0.1, reduction="none")
    yield fastloss.cross_entropy(x, np.abs(np.sin(np.nan_to_num(x))), weight, reduction="none")
    yield fastloss.softmax(x, 1)
    yield fastloss.log_softmax(x, 1)


def hashed(array):
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def bits():
    """The bits of all results, by name, and how many calls had their rows shared."""
    run_split, n_split = _runtime._run_split, 0

    def counted(*args):
        nonlocal n_split
        n_split += 1
        return run_split(*args)

    _runtime._run_split = counted
    _runtime.SPLIT_THRESHOLD = _runtime.PARALLEL_THRESHOLD = 0
    found = {}
    for name, x, t in problems():
        is_plain = name.endswith(")")
        for dtype in (np.float32, np.float64, np.float16):
            if dtype != np.float32 and not (is_plain and len(x) < 9):
                continue
            values = x.astype(dtype)
            for layout, view in layouts(values, is_plain):
                if layout != "contiguous" and (dtype == np.float16 or x.shape[1] == LENGTHS[-1]):
                    continue
                got = [hashed(result) for result in results(view, t)]
                assert found.setdefault(f"{name}, {np.dtype(dtype)}", got) == got, (name, dtype, layout)
        if is_plain and x.shape[1] != LENGTHS[-1]:
            for view in (x, np.asfortranarray(x)):
                got = [hashed(result) for result in more_results(view, t)]
                assert found.setdefault(f"{name}, more", got) == got, name
    return found, n_split


def bits_with(n_threads):
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(n_threads)}
    command = [sys.executable, str(Path(__file__))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_any_number_of_threads():
    expected, n_split = bits_with(1)
    assert not n_split
    for n_threads in (2, 4):
        found, n_split = bits_with(n_threads)
        assert n_split > 500
        assert found == expected, n_threads


@pytest.fixture
def shared(monkeypatch):
    """Rows are shared, by as many workers as a call likes, whatever the machine has."""
    monkeypatch.setattr(_runtime, "SPLIT_THRESHOLD", 0)
    monkeypatch.setattr(_runtime, "LARGE_TILE", 0)


def relative_error(got, expected):
    expected = np.asarray(expected, np.float64)
    return np.max(np.abs(np.asarray(got, np.float64) - expected) / np.abs(expected))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float64, 1e-13)])
@pytest.mark.parametrize("shape", [(1, 33_000), (8, 8200)])
def test_values(shape, dtype, tolerance, rng, shared):
    x = (rng.normal(size=shape) * 4).astype(dtype)
    x[0, :8192] = -INF
    t = rng.integers(8192, x.shape[1], len(x))
    y = rng.random(x.shape).astype(dtype)
    y[0], weight = np.where(x[0] == -INF, 1e-9, y[0]), np.linspace(0.5, 2, x.shape[1])
    finite, smoothed = np.maximum(x, -20), {"weight": weight, "label_smoothing": 0.1}
    for function, reference, logits, target, options in (
        (fastloss.logsumexp, references.logsumexp, x, 1, {}),
        (fastloss.cross_entropy, references.cross_entropy, x, t, {"weight": weight, "reduction": "sum"}),
        (fastloss.cross_entropy, references.cross_entropy, x, t, {"reduction": "none"}),
        (fastloss.cross_entropy, references.cross_entropy, finite, t, smoothed),
        (fastloss.cross_entropy, references.cross_entropy_probabilities, finite, y, smoothed),
        (fastloss.softmax, references.softmax, finite, 1, {}),
        (fastloss.log_softmax, references.log_softmax, finite, 1, {}),
    ):
        expected = reference(logits, target, **options)
        for order in "CF":
            got = function(np.asarray(logits, order=order), target, **options)
            assert relative_error(got, expected) < tolerance


@pytest.mark.parametrize("value", [-INF, INF, NAN, 200.0])
@pytest.mark.parametrize(("n_rows", "n_classes"), [(1, 40_000), (9, 8200)])
def test_special_values(rng, shared, n_rows, n_classes, value):
    """In the first or the last chunk; the expected values in float64, whose own error is far below the tolerance."""
    for at in (0, n_classes - 1):
        x = rng.normal(size=(n_rows, n_classes)).astype(np.float32)
        x[0, at] = value
        log_sums = scipy.special.logsumexp(x.astype(float), axis=1)
        np.testing.assert_allclose(fastloss.logsumexp(x, 1), log_sums, rtol=2e-6)
        for target in (0, n_classes - 1):
            if value == 200 and target == at:  # the loss is no float32
                continue
            expected = np.where(log_sums < INF, log_sums, NAN) - x[:, target]
            got = fastloss.cross_entropy(x, np.full(n_rows, target), reduction="none")
            np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_targets_out_of_range(shared):
    x = np.zeros((9, 40_000), np.float32)
    t = np.zeros(9, int)
    t[5] = 40_000
    for view in (x, np.asfortranarray(x)):
        with pytest.raises(IndexError, match="got 40000 at 5"):
            fastloss.cross_entropy(view, t)
        with pytest.raises(IndexError, match="got 40000 at 0"):
            fastloss.cross_entropy(view[5:6], t[5:6])


INTERRUPTED = """
import _thread, threading, time
import numpy as np
from fastloss import logsumexp
x = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (1, 1 << 34), (0, 0))
logsumexp(x[:, : 1 << 26], 1)
started = time.perf_counter()
threading.Timer(0.3, _thread.interrupt_main).start()
try:
    logsumexp(x, 1)
except KeyboardInterrupt:
    print(time.perf_counter() - started < 3)
"""


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_long_row_can_be_interrupted(n_threads):
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(n_threads)}
    command = [sys.executable, "-c", INTERRUPTED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout == "True\n", result.stderr


if __name__ == "__main__":
    json.dump(bits(), sys.stdout)
