"""Hostile and damaged input: a result or one of the three documented exceptions, whatever comes.

Random bytes viewed as every dtype, in random shapes and strides (zero and negative ones included), with targets near
the borders of every integer type. A crash or a hang would end the run; the memory around each array is checked for
writes. With NUMBA_BOUNDSCHECK=1 (see .ci/run) reads outside an array raise, too.
"""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastloss
from fastloss import metrics

DOCUMENTED = (ValueError, TypeError, IndexError)

FLOATS = ("f2", "f4", "f8", ">f4", ">f8")
INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">u8", "?")
OTHERS = ("c8", "c16", "g", "S3", "U2", "M8[s]", "m8[s]", "V5", "O")

BORDERS = sorted(
    {
        border + step
        for border in (
            0,
            -100,
            100,
            2**7,
            2**8,
            2**15,
            2**16,
            2**31,
            2**32,
            2**63,
            2**64 - 100,
            2**64,
            -(2**31),
            -(2**63),
        )
        for step in (-2, -1, 0, 1, 2)
        if -(2**63) <= border + step < 2**64
    }
)


@pytest.fixture(autouse=True)
def _serial(serial):
    """Parallel kernels are for large inputs."""


@st.composite
def arrays(draw, dtypes, shape):
    """An array of a dtype over random bytes, in an odd place of a larger buffer, with random strides."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if dtype.hasobject:
        return np.array(draw(st.sampled_from((None, "a", 1.5, [1]))), object).repeat(max(1, int(np.prod(shape))))
    steps = [draw(st.sampled_from((1, 1, 1, 2, -1, 0))) for _ in shape]
    size = [max(1, n * max(1, abs(step))) for n, step in zip(shape, steps, strict=True)]
    offset = draw(st.sampled_from((0, 0, 0, 1, dtype.itemsize)))
    n_bytes = int(np.prod(size)) * dtype.itemsize
    buffer = rng.integers(0, 256, n_bytes + offset + 64, np.uint8)
    if dtype.kind == "b":
        buffer &= 1
    tame = draw(st.booleans())
    array = buffer[offset : offset + n_bytes].view(dtype).reshape(size)
    if tame and dtype.kind == "f":
        array[...] = rng.normal(size=size) * 3
    for axis, (n, step) in enumerate(zip(shape, steps, strict=True)):
        front = (slice(None),) * axis
        if step == 0:
            array = np.broadcast_to(array[(*front, slice(0, 1))], (*array.shape[:axis], n, *array.shape[axis + 1 :]))
        else:
            array = array[(*front, slice(None, None, step))][(*front, slice(0, n))]
    if draw(st.booleans()):
        array = array.view()
        array.flags.writeable = False
    return array


shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple) | st.sampled_from(((2, 300), (40, 3), (9, 33)))


def ask(function, *args, **options):
    """Call it; a documented exception is an answer."""
    held = [(a, a.tobytes()) for a in args if isinstance(a, np.ndarray) and not a.dtype.hasobject]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = function(*args, **options)
        except DOCUMENTED:
            result = None
    for array, before in held:
        assert array.tobytes() == before
    return result


@st.composite
def targets(draw, shape):
    """Class indices that fit, with one entry near a border of an integer type."""
    dtype = np.dtype(draw(st.sampled_from(INTEGERS)))
    limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    array = np.zeros(shape, dtype)
    if array.size:
        place = draw(st.integers(0, array.size - 1))
        array.flat[place] = draw(st.sampled_from([b for b in BORDERS if limits[0] <= b <= limits[1]]))
    return array


ignored = st.sampled_from((-100, 0, 1, -1, 2**63 - 1, 2**63, 2**64 - 100, -(2**63), 255, True, 1.0, "a"))
reductions = st.sampled_from(("none", "mean", "sum", "batchmean", "median", None, 3))


@given(st.data())
def test_losses_with_class_indices(data):
    shape = data.draw(shapes)
    x = data.draw(arrays(FLOATS, shape))
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = data.draw(targets(rows))
    options = {"ignore_index": data.draw(ignored), "reduction": data.draw(reductions)}
    if data.draw(st.booleans()):
        options["weight"] = data.draw(arrays((*FLOATS, "i4"), (shape[1 if len(shape) > 1 else 0] if shape else 1,)))
    for function in (fastloss.cross_entropy, fastloss.nll_loss):
        result = ask(function, x, target, **options)
        if result is not None:
            assert np.shape(result) == (rows if options["reduction"] == "none" else ())
            kept = np.array([int(t) for t in target.flat])
            kept = kept[kept != options["ignore_index"]] if kept.size else kept
            assert all(0 <= t < shape[1 if len(shape) > 1 else 0] for t in kept)


@given(st.data())
def test_losses_with_class_probabilities_and_divergence(data):
    shape = data.draw(shapes)
    # (Not every pair of dtypes: each is a kernel of its own to compile.)
    x_dtypes, y_dtypes = data.draw(st.sampled_from(((("f2", "f4"), ("f4", ">f4")), (("f8", *INTEGERS), ("f8", ">f8")))))
    x = data.draw(arrays(x_dtypes, shape))
    y = data.draw(arrays(y_dtypes, shape if data.draw(st.booleans()) else data.draw(shapes)))
    reduction = data.draw(reductions)
    smoothing = data.draw(st.sampled_from((0.0, 0.1, 1.0, -1.0, np.nan, "a", None)))
    ask(fastloss.cross_entropy, x, y, label_smoothing=smoothing, reduction=reduction)
    ask(fastloss.kl_div, x, y, reduction=reduction, log_target=data.draw(st.booleans()))


@given(st.data())
def test_softmax_and_logsumexp(data):
    shape = data.draw(shapes)
    x = data.draw(arrays((*FLOATS, *INTEGERS), shape))
    axis = data.draw(st.integers(-5, 5) | st.sampled_from((None, (0, 1), (0, 0), 1.5, "a", 2**70)))
    for function in (fastloss.softmax, fastloss.log_softmax):
        result = ask(function, x, axis)
        assert result is None or np.shape(result) == shape
    ask(fastloss.logsumexp, x, axis, data.draw(st.booleans()))


@given(st.data())
@settings(max_examples=40)
def test_anything_at_every_function(data):
    anything = ("f8", *INTEGERS, *OTHERS)
    first, second = data.draw(arrays(anything, data.draw(shapes))), data.draw(arrays(anything, data.draw(shapes)))
    for function in (fastloss.cross_entropy, fastloss.nll_loss, fastloss.kl_div):
        ask(function, first, second)
        ask(function, first, first)
    for function in (fastloss.softmax, fastloss.log_softmax, fastloss.logsumexp):
        ask(function, first)


@given(st.data())
@settings(max_examples=30)
def test_metrics(data):
    n_rows, n_classes = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 4))
    scores = data.draw(arrays(("f4", "f8", "f2", ">f8", "i2"), (n_rows, n_classes)))
    y = data.draw(targets((n_rows,)) | arrays((*INTEGERS, "f8", "U2", "S3", "M8[s]"), (n_rows,)))
    weights = data.draw(st.none() | arrays(("f4", "f8", "i8"), (n_rows,)))
    for function in (
        metrics.log_loss,
        metrics.log_loss_from_logits,
        metrics.brier_score_from_logits,
        metrics.top_k_accuracy_from_logits,
        metrics.perplexity,
    ):
        ask(function, y, scores, sample_weight=weights)
