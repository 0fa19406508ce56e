"""The same bits for any number of threads, on every run and on every CPU."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fastloss import cross_entropy, kl_div, logsumexp, nll_loss

# Every call has more elements than PARALLEL_THRESHOLD, from where on kernels may run in parallel.
SCRIPT = """
import hashlib, json, sys
import numpy as np
import numba
import fastloss

rng = np.random.default_rng(7)
rows = (rng.normal(size=(3001, 100)) * 5).astype(np.float32)
few = (rng.normal(size=(30011, 5)) * 5).astype(np.float32)
images = (rng.normal(size=(2, 19, 61, 67)) * 5).astype(np.float32)
long = (rng.normal(size=(9, 20_011)) * 5).astype(np.float32)
t_rows, t_few = rng.integers(0, 100, len(rows)), rng.integers(0, 5, len(few))
t_images, t_long = rng.integers(0, 19, (2, 61, 67)), rng.integers(0, 20_011, len(long))
t_rows[::7] = -100
weight = rng.random(100)
values = -np.abs(rows)

def results():
    for reduction in ("none", "sum", "mean"):
        yield fastloss.cross_entropy(rows, t_rows, reduction=reduction)
        yield fastloss.cross_entropy(rows, t_rows, weight, label_smoothing=0.1, reduction=reduction)
        yield fastloss.cross_entropy(few, t_few, reduction=reduction)
        yield fastloss.cross_entropy(images, t_images, reduction=reduction)
        yield fastloss.cross_entropy(images.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2), t_images,
                                     reduction=reduction)
        yield fastloss.cross_entropy(long, t_long, reduction=reduction)
        yield fastloss.nll_loss(values, t_rows, weight, reduction=reduction)
        yield fastloss.cross_entropy(rows, np.abs(rows), reduction=reduction)
    for reduction in ("none", "sum", "batchmean"):
        yield fastloss.kl_div(values, -values, reduction=reduction)
    yield fastloss.softmax(rows)
    yield fastloss.log_softmax(few)
    yield fastloss.softmax(images, 1)
    yield fastloss.logsumexp(rows, 1)
    yield fastloss.logsumexp(images, 1)
    yield fastloss.logsumexp(rows)

def hashes():
    return [hashlib.sha256(np.asarray(r).tobytes()).hexdigest() for r in results()]

first = hashes()
assert hashes() == first, "another run, other bits"
n_threads = numba.get_num_threads()
if n_threads > 2:
    numba.set_num_threads(3)
    assert hashes() == first, "three of the threads, other bits"
    assert numba.get_num_threads() == 3, "the setting of threads was changed"
print(json.dumps([n_threads, first]))
"""


def hashes_with(n_threads, before="", **settings):
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(n_threads), **settings}
    environment.pop("NUMBA_DISABLE_JIT", None)
    command = [sys.executable, "-c", before + SCRIPT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert result.returncode == 0, result.stderr
    used, hashes = json.loads(result.stdout)
    assert used == n_threads
    return hashes


def test_any_number_of_threads():
    one, two, four = (hashes_with(n) for n in (1, 2, 4))
    assert len(one) == 33
    assert one == two
    assert one == four


def test_code_for_any_cpu():
    """Without this CPU's vectors and fused operations.

    In one thread, which takes less to compile; that threads change nothing is tested above.
    """
    assert hashes_with(1, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == hashes_with(1)


def test_memory_is_asked_for_in_either_way(tmp_path):
    """As on AMD's Zen where this is another CPU, and the other way round."""
    before = "from fastloss._kernels import _memory\n_memory.IS_ZEN = not _memory.IS_ZEN\n"
    assert hashes_with(1, before, FASTLOSS_CACHE_DIR=str(tmp_path)) == hashes_with(1)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(20_001, 7)) * 5).astype(np.float32)
    return x, rng.integers(0, 7, len(x))


def test_a_parallel_result_is_that_of_its_pieces(problem):
    """Large enough for threads, against pieces that are not."""
    x, t = problem
    pieces = np.array_split(np.arange(len(x)), 13)
    whole = cross_entropy(x, t, reduction="none")
    np.testing.assert_array_equal(np.concatenate([cross_entropy(x[p], t[p], reduction="none") for p in pieces]), whole)
    np.testing.assert_array_equal(np.concatenate([logsumexp(x[p], 1) for p in pieces]), logsumexp(x, 1))


def test_sums_do_not_depend_on_the_order_of_many_rows(problem):
    x, t = problem
    order = np.random.default_rng(5).permutation(len(x))
    for reduction in ("sum", "mean"):
        expected = cross_entropy(x, t, reduction=reduction)
        assert cross_entropy(x[order], t[order], reduction=reduction) == expected
        assert cross_entropy(np.asfortranarray(x), t, reduction=reduction) == expected
        assert nll_loss(x[order], t[order], reduction=reduction) == nll_loss(x, t, reduction=reduction)
    y = np.abs(x)
    assert kl_div(x[order], y[order], reduction="sum") == kl_div(x, y, reduction="sum")
