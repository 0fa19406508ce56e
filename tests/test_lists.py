"""Long lists are converted in cuts: to the same arrays, with the same errors, and Ctrl-C is answered meanwhile."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastloss
from fastloss import _cache, _validation

BEYOND = 2**53 + 1  # no float64
LISTS = {
    "ints": [3, 1, 2] * 9,
    "floats": [0.5, 1.5, -2.0] * 9,
    "bools": [True, False, True] * 9,
    "a float at the end": [BEYOND] * 20 + [0.5],
    "a float at the beginning": [0.5] + [BEYOND] * 20,
    "bools, then ints, then floats": [True] * 11 + [2] * 11 + [0.25] * 11,
    "floats, then bools": [0.25] * 11 + [True] * 11,
    "beyond int64": [2**63] * 20,
    "beyond int64 at the end": [-1] * 20 + [2**63],
    "beyond uint64 at the end": [1] * 20 + [2**70],
    "complex at the end": [1.0] * 20 + [1j],
    "NaN and infinity": [np.nan, np.inf, -np.inf, -0.0] * 5,
    "scalars of NumPy": [np.float32(0.1), np.float32(0.2)] * 9,
    "scalars of one dtype, then another": [np.float32(0.1)] * 11 + [np.float64(0.1)] * 11,
    "scalars whose promotion is not associative": [np.int16(1)] * 9 + [np.uint16(1)] * 9 + [np.float16(1)] * 9,
    "numbers, then a string": [1] * 20 + ["1"],
    "numbers, then None": [1] * 20 + [None],
    "None alone": [None] * 20,
    "strings": ["a", "bb"] * 10,
    "dates": [np.datetime64("2020-01-01")] * 20,
    "a tuple": (1, 2) * 10,
    "a range": range(-5, 40, 3),
    "rows": [[1.0, 2.0, 3.0]] * 9,
    "rows of ints, then floats": [[1, 2, 3]] * 9 + [[0.5, 1, 2]] * 9,
    "rows longer than a cut": [list(range(20)), list(range(20, 40)), [0.5] * 20],
    "rows of rows": [[[1, 2], [3, 4]]] * 5,
    "rows that are tuples": [(1, 2)] * 9,
    "rows that are arrays": [np.arange(3.0)] * 9,
    "rows that are arrays and lists": [[0.0, 1.0, 2.0]] * 9 + [np.arange(3.0)] * 9,
    "one row": [list(range(30))],
    "empty rows": [[]] * 20,
    "an empty row at the beginning": [[]] + [[1]] * 20,
    "ragged": [[1, 2]] * 20 + [[3]],
    "ragged in the first cut": [[1, 2], [3]] * 20,
    "ragged, longer than a cut": [list(range(20)), list(range(19))],
    "rows, then a number": [[1, 2]] * 20 + [3],
    "numbers, then a row": [3] * 20 + [[1, 2]],
    "deeper at the end": [[1, 2]] * 20 + [[[1], [2]]],
}


def outcome(convert, value):
    """The array as dtype, shape and bytes, or the message of the error."""
    try:
        array = convert(value)
    except ValueError as error:
        return str(error)
    content = array.tolist() if array.dtype.hasobject else array.tobytes()
    return array.dtype.str, array.shape, content


@pytest.fixture
def short_cuts(monkeypatch):
    monkeypatch.setattr(_validation, "_CUT_NUMBERS", 8)


@pytest.mark.usefixtures("short_cuts")
@pytest.mark.parametrize("value", LISTS.values(), ids=LISTS)
def test_cuts_change_nothing(value):
    assert outcome(_validation._sequence, value) == outcome(np.asarray, value)


NUMBERS = st.one_of(st.booleans(), st.integers(-(2**66), 2**66), st.floats(width=64), st.complex_numbers(), st.none())


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=4), max_size=6), st.integers(1, 9))
def test_cuts_of_any_numbers_change_nothing(runs, n_times):
    value = [number for run in runs for number in run * n_times]
    before = _validation._CUT_NUMBERS
    _validation._CUT_NUMBERS = 4
    try:
        assert outcome(_validation._sequence, value) == outcome(np.asarray, value)
    finally:
        _validation._CUT_NUMBERS = before


@pytest.mark.usefixtures("short_cuts")
def test_a_list_that_becomes_shorter_meanwhile():
    class Number:
        def __float__(self):
            return 0.5

        def __array__(self, dtype=None, copy=None):
            del value[20:]
            return np.array(0.5)

    value = [Number()] * 30
    np.testing.assert_array_equal(_validation._sequence(value), [0.5] * 20)


@pytest.mark.usefixtures("short_cuts")
def test_losses_of_long_lists():
    logits, targets = [[0.0, 1.0, 2.0], [3.0, 0.0, 1.0]] * 20, [2, 0] * 20
    own = np.log([1 + np.exp(-1) + np.exp(-2), 1 + np.exp(-3) + np.exp(-2)])
    np.testing.assert_allclose(fastloss.cross_entropy(logits, targets), own.mean(), rtol=1e-14)
    targets[-1] = 0.5
    with pytest.raises(TypeError, match="target: got dtype float64"):
        fastloss.cross_entropy(logits, targets)
    logits[-1] = [0.0]
    with pytest.raises(ValueError, match="input: got an object of type list, expected a rectangular array"):
        fastloss.cross_entropy(logits, targets)


# Calls that take many seconds, each interrupted 0.3 s after it began. What is measured is processor time: the machine
# may be busy, and one that waits for the processor is not at work.
INTERRUPTED = """
import time
import numpy as np
import fastloss
from fastloss import metrics

N = 40_000_000
logits = np.broadcast_to(np.float32([0.5, 0.5]), (N, 2))
calls = {
    "rows": lambda: fastloss.logsumexp([[1.0] * 1000] * 100_000, 1),
    "targets": lambda: fastloss.nll_loss(logits, zeros),
    "labels": lambda: metrics.log_loss(zeros, logits),
    "strings": lambda: metrics.log_loss(strings, logits),
}
zeros, strings = [0] * N, ["a", "b"] * (N // 2)
metrics.log_loss([0, 1], logits[:2]), metrics.log_loss(["a", "b"], logits[:2]), fastloss.nll_loss(logits[:2], [0, 1])
for name, call in calls.items():
    started = time.process_time()
    try:
        print("begins", flush=True)
        call()
        print(name, "was not interrupted", flush=True)
    except KeyboardInterrupt:
        took = time.process_time() - started
        print("answered" if took < 1.3 else f"{name}: answered after {took} s", flush=True)
assert fastloss.nll_loss(logits[:2], [0, 1]) == -0.5
"""


def test_ctrl_c_while_lists_are_converted():
    environment = {
        **os.environ,
        "FASTLOSS_CACHE_DIR": str(_cache.directory().parent),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        answers = []
        while child.stdout.readline() == "begins\n":
            time.sleep(0.3)
            child.send_signal(signal.SIGINT)
            answers.append(child.stdout.readline())
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors, answers) == (0, "", ["answered\n"] * 4)
