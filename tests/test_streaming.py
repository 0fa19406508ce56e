"""Streams: the bits of the one-shot functions for every way of cutting the rows and of merging, and what is refused.

The one-shot values themselves are tested elsewhere against formulas that know nothing of fastloss; here they are what
the issue of a stream is. Sums are also checked against ``math.fsum`` of the rows.
"""

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastloss
from fastloss import metrics, streaming
from fastloss._reduction import ExactSum
from fastloss.streaming import NLL, CrossEntropy, KLDivergence, LogLoss, Perplexity

pytestmark = pytest.mark.usefixtures("serial")

BIGGEST = float(np.finfo(np.float64).max)


def same(got, expected):
    """The same bits, or both NaN, and the same type."""
    assert type(got) is type(expected)
    assert np.asarray(got).tobytes() == np.asarray(expected).tobytes() or (np.isnan(got) and np.isnan(expected))


def cuts(draw, n_rows):
    """Borders of chunks, some of which are empty."""
    inner = draw(st.lists(st.integers(0, n_rows), max_size=6))
    return [0, *sorted(inner), n_rows]


def stream_in_pieces(draw, make, *arrays):
    """Streams over chunks, merged in any order and any tree, some of them pickled on the way."""
    borders = cuts(draw, len(arrays[0]))
    chunks = draw(st.permutations(list(itertools.pairwise(borders))))
    streams = [make() for _ in range(draw(st.integers(1, 3)))]
    for begin, end in chunks:
        stream = draw(st.sampled_from(streams))
        assert stream.update(*(a[begin:end] for a in arrays)) is stream
    streams = draw(st.permutations(streams))
    if draw(st.booleans()):
        streams = pickle.loads(pickle.dumps(streams))
    if draw(st.booleans()):
        return make().merge_state(streams)
    while len(streams) > 1:
        streams = [streams[0].merge_state(iter(streams[1:2])), *streams[2:]]
    return streams[0]


SPECIAL = [0.0, 3.0, -200.0, math.inf, -math.inf, math.nan, 1e30]


@st.composite
def index_problems(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    n_rows, n_classes = draw(st.integers(0, 60)), draw(st.sampled_from([1, 3, 40]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    logits = (rng.normal(size=(n_rows, n_classes)) * 10.0 ** draw(st.integers(-3, 2))).astype(dtype)
    targets = rng.integers(0, n_classes, n_rows)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
        if n_rows:
            logits[rng.integers(n_rows), rng.integers(n_classes)] = value
    targets[rng.random(n_rows) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    weight = draw(st.sampled_from([None, "positive", "with zero", "cancelling"]))
    if weight is not None:
        low = {"positive": 0.5, "with zero": 0.0, "cancelling": -1.0}[weight]
        weight = np.rint(rng.uniform(low, 2, n_classes) * 4) / 4
        if low <= 0:
            weight[0] = low
    return logits, targets, weight


class TestSameBits:
    @given(st.data(), index_problems(), st.sampled_from(["mean", "sum"]), st.sampled_from([0.0, 0.25, 1.0]))
    @settings(max_examples=150)
    def test_cross_entropy_of_class_indices(self, data, problem, reduction, label_smoothing):
        logits, targets, weight = problem
        options = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
        stream = stream_in_pieces(data.draw, lambda: CrossEntropy(**options), logits, targets)
        same(stream.compute(), fastloss.cross_entropy(logits, targets, **options))
        rows = fastloss.cross_entropy(logits, targets, weight, label_smoothing=label_smoothing, reduction="none")
        if reduction == "sum" and np.isfinite(rows).all():
            same(stream.compute(), logits.dtype.type(math.fsum(rows.tolist())))

    @given(st.data(), st.integers(0, 2**32 - 1), st.sampled_from(["mean", "sum"]), st.booleans())
    def test_cross_entropy_of_class_probabilities(self, data, seed, reduction, weighted):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(data.draw(st.integers(0, 40)), 5, 2)).astype(np.float32)
        targets = rng.dirichlet(np.ones(5), (len(logits), 2)).swapaxes(1, 2)
        options = {"weight": rng.uniform(size=5) if weighted else None, "reduction": reduction, "label_smoothing": 0.1}
        stream = stream_in_pieces(data.draw, lambda: CrossEntropy(**options), logits, targets)
        same(stream.compute(), fastloss.cross_entropy(logits, targets, **options))

    @given(st.data(), index_problems(), st.sampled_from(["mean", "sum"]))
    def test_nll(self, data, problem, reduction):
        logits, targets, weight = problem
        stream = stream_in_pieces(data.draw, lambda: NLL(weight, reduction=reduction), logits, targets)
        same(stream.compute(), fastloss.nll_loss(logits, targets, weight, reduction=reduction))

    @given(st.data(), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
    def test_kl_divergence(self, data, seed, log_target, shared):
        rng = np.random.default_rng(seed)
        log_q = np.log(rng.dirichlet(np.ones(4), data.draw(st.integers(0, 30)))).astype(np.float32)
        p = rng.dirichlet(np.ones(4), 1 if shared else len(log_q)).astype(np.float32)
        p = np.log(p) if log_target else p
        for reduction in ("batchmean", "sum", "mean"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                expected = fastloss.kl_div(log_q, p, reduction=reduction, log_target=log_target)
                make = lambda reduction=reduction: KLDivergence(reduction=reduction, log_target=log_target)
                if shared:
                    stream = make()
                    for chunk in np.array_split(log_q, 3):
                        stream.update(chunk, p)
                else:
                    stream = stream_in_pieces(data.draw, make, log_q, p)
                same(stream.compute(), expected)

    @given(
        st.data(), st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.sampled_from([np.float32, np.float64])
    )
    def test_log_loss(self, data, seed, weighted, normalize, dtype):
        rng = np.random.default_rng(seed)
        proba = rng.dirichlet(np.ones(3) * 0.1, data.draw(st.integers(1, 40))).astype(dtype)
        y = np.array(["a", "b", "c"])[rng.integers(0, 3, len(proba))]
        arrays = (proba, y, rng.random(len(proba))) if weighted else (proba, y)
        make = lambda: LogLoss(normalize=normalize, labels=["a", "b", "c"])
        expected = metrics.log_loss(
            y, proba, normalize=normalize, labels=["a", "b", "c"], sample_weight=arrays[2] if weighted else None
        )
        same(stream_in_pieces(data.draw, make, *arrays).compute(), expected)

    @given(st.data(), index_problems(), st.booleans())
    def test_perplexity(self, data, problem, weighted):
        logits, targets, _ = problem
        logits = np.where(np.isfinite(logits), logits, 0)
        weight = np.linspace(0.5, 1.5, len(logits))
        arrays = (logits, targets, weight) if weighted and len(logits) else (logits, targets)
        stream = stream_in_pieces(data.draw, Perplexity, *arrays)
        same(stream.compute(), metrics.perplexity(targets, logits, sample_weight=arrays[2] if arrays[2:] else None))

    def test_rows_of_images_and_single_rows(self, rng):
        logits, targets = rng.normal(size=(4, 5, 6, 3)).astype(np.float32), rng.integers(0, 5, (4, 6, 3))
        expected = fastloss.cross_entropy(logits, targets)
        stream = CrossEntropy()
        for piece in (slice(0, 1), slice(1, 6)):
            stream.update(logits[:, :, piece], targets[:, piece])
        same(stream.compute(), expected)
        stream.reset()
        for row in np.ndindex(4, 6, 3):
            stream.update(logits[row[0], :, row[1], row[2]], targets[row])
        same(stream.compute(), expected)

    def test_halves_and_float32_are_of_one_kind(self, rng):
        logits, targets = rng.normal(size=(40, 5)).astype(np.float16), rng.integers(0, 5, 40)
        stream = CrossEntropy().update(logits[:20], targets[:20]).update(logits[20:].astype(np.float32), targets[20:])
        same(stream.compute(), fastloss.cross_entropy(logits, targets))

    def test_indicator_matrices(self, rng):
        proba = rng.dirichlet(np.ones(3), 30)
        hot = (rng.random((30, 3)) < 0.5).astype(int)
        stream = LogLoss().update(proba[:11], hot[:11]).update(proba[11:], hot[11:])
        same(stream.compute(), metrics.log_loss(hot, proba))

    def test_any_number_of_threads(self, rng, monkeypatch):
        from fastloss import _runtime

        logits, targets = rng.normal(size=(3000, 5)).astype(np.float32), rng.integers(0, 5, 3000)
        expected = CrossEntropy().update(logits, targets)
        monkeypatch.setattr(_runtime, "PARALLEL_THRESHOLD", 1)
        stream = CrossEntropy()
        for chunk in np.array_split(np.arange(3000), 7):
            stream.update(logits[chunk], targets[chunk])
        same(stream.compute(), expected.compute())
        assert stream._state == expected._state


ONE_CHUNK = {
    "CrossEntropy": (lambda **o: CrossEntropy(**o), ([[0.0, 1.0], [1.0, 3.0]], [0, 1])),
    "probabilities": (lambda **o: CrossEntropy(**o), ([[0.0, 1.0]], [[0.5, 0.5]])),
    "NLL": (lambda **o: NLL(**o), ([[-1.0, -2.0]], [0])),
    "KLDivergence": (lambda **o: KLDivergence(**{"reduction": "sum", **o}), ([[-1.0, -2.0]], [[0.5, 0.5]])),
    "LogLoss": (lambda **o: LogLoss(**o), ([[0.25, 0.75]], [1])),
    "Perplexity": (lambda **o: Perplexity(**o), ([[0.0, 1.0]], [0])),
}


@pytest.fixture(params=ONE_CHUNK)
def one(request):
    """How to make a stream, and a chunk for it."""
    return ONE_CHUNK[request.param]


class TestState:
    def test_reset(self, one):
        make, chunk = one
        stream = make().update(*chunk)
        assert stream.reset() is stream
        assert repr(stream) == repr(make())
        same(stream.update(*chunk).compute(), make().update(*chunk).compute())

    def test_pickles_are_small_and_whole(self, one):
        make, chunk = one
        stream = make().update(*chunk)
        held = pickle.dumps(stream)
        assert len(held) < 2000
        twin = pickle.loads(held)
        assert repr(twin) == repr(stream)
        same(twin.update(*chunk).compute(), stream.update(*chunk).compute())

    def test_a_copy_goes_its_own_way(self, one):
        make, chunk = one
        stream = make().update(*chunk)
        twin = copy.copy(stream).update(*chunk)
        assert twin._state.rows == 2 * stream._state.rows

    def test_state_as_json(self, one):
        make, chunk = one
        state = make().update(*chunk)._state
        assert streaming.State.from_json(state.to_json()) == state

    def test_print_shows_options_and_state(self):
        stream = CrossEntropy(label_smoothing=0.5)
        assert repr(stream) == (
            "<CrossEntropy(weight=None, ignore_index=-100, reduction='mean', label_smoothing=0.5): "
            "rows 0, kept 0, sum 0.0>"
        )
        shown = repr(NLL(ignore_index=1).update(np.float32([[-1.5, -2], [-3, -4]]), [0, 1]))
        assert shown == (
            "<NLL(weight=None, ignore_index=1, reduction='mean'): "
            "classes 2, target class indices, dtype float32, rows 2, kept 1, sum 1.5>"
        )

    def test_merging_with_itself_doubles(self):
        stream = NLL().update([[-1.0, -2.0]], [1])
        for _ in range(200):
            stream.merge_state(stream)
        assert stream._state.kept == 2**200
        assert stream.compute() == 2.0

    def test_sums_beyond_the_largest_number_and_back(self):
        stream = NLL(reduction="sum")
        for _ in range(3):
            stream.update([[-BIGGEST]], [0])
        assert stream.compute() == math.inf
        stream.update([[BIGGEST]], [0]).update([[BIGGEST]], [0])
        assert stream.compute() == BIGGEST

    def test_merge_takes_one_or_many(self, one):
        make, chunk = one
        expected = make().update(*chunk).update(*chunk).update(*chunk).compute()
        streams = [make().update(*chunk) for _ in range(3)]
        same(make().merge_state(streams).compute(), expected)
        same(make().merge_state(streams[0]).merge_state(s for s in streams[1:]).compute(), expected)
        same(make().update(*chunk).merge_state([]).compute(), make().update(*chunk).compute())


class TestNothing:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_no_rows(self, reduction):
        empty = np.empty((0, 3), np.float32)
        options = {"reduction": reduction}
        targets = np.empty(0, int)
        for stream, target, function in (
            (CrossEntropy(**options), targets, fastloss.cross_entropy),
            (CrossEntropy(**options), empty, fastloss.cross_entropy),
            (NLL(**options), targets, fastloss.nll_loss),
        ):
            np.testing.assert_equal(stream.compute(), function(empty.astype(float), target, **options))
            same(stream.update(empty, target).compute(), function(empty, target, **options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            stream = KLDivergence(**options)
            np.testing.assert_equal(stream.compute(), fastloss.kl_div(empty.astype(float), empty, **options))
            same(stream.update(empty, empty).compute(), fastloss.kl_div(empty, empty, **options))

    def test_no_rows_of_metrics(self):
        assert math.isnan(Perplexity().compute())
        assert math.isnan(Perplexity().update(np.empty((0, 3)), np.empty(0, int)).compute())
        for stream in (LogLoss(), LogLoss().update(np.empty((0, 3)), np.empty(0, int))):
            with pytest.raises(ValueError, match=r"0 sample\(s\)"):
                stream.compute()

    def test_all_rows_ignored(self):
        stream = CrossEntropy().update([[0.0, 1.0]], [-100])
        assert math.isnan(stream.compute())
        assert CrossEntropy(reduction="sum").merge_state([]).update([[0.0, 1.0]], [-100]).compute() == 0


REFUSED = [
    ("CrossEntropy", ([[0.0, 1.0, 2.0]], [0]), ValueError, "got a chunk with classes 3, expected 2 as in the chunks"),
    ("CrossEntropy", ([[0.0, 1.0]], [[0.5, 0.5]]), ValueError, "target class probabilities, expected class indices"),
    ("CrossEntropy", (np.zeros((1, 2), np.float32), [0]), ValueError, "dtype float32, expected float64"),
    ("CrossEntropy", ([[0.0, 1.0]] * 300, [0] * 299 + [7]), IndexError, "target: got 7 at 299"),
    ("CrossEntropy", ([[0.0, 1.0]], [0, 1]), ValueError, r"target: got shape \(2,\)"),
    ("CrossEntropy", ([["a"]], [0]), TypeError, "input: got dtype"),
    ("probabilities", ([[0.0, 1.0]], [0]), ValueError, "target class indices, expected class probabilities"),
    ("NLL", ([[0.0, 1.0]], [2]), IndexError, "target: got 2 at 0"),
    ("NLL", ([[0.0, 1.0, 2.0]], [0]), ValueError, "classes 3, expected 2"),
    ("KLDivergence", ([[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]]), ValueError, r"row \(3,\), expected \(2,\)"),
    ("KLDivergence", ([[0.0, 1.0]], np.zeros((3, 2))), ValueError, "expected a chunk of rows"),
    ("KLDivergence", (0.0, 1.0), ValueError, "expected a chunk of rows"),
    ("LogLoss", ([[0.2, 0.2, 0.6]], [0]), ValueError, "classes 3, expected 2"),
    ("LogLoss", ([[0.2, 0.8]], [2]), ValueError, r"target contains values \{2\} not belonging"),
    ("LogLoss", ([[0.2, 0.8]], ["spam"]), ValueError, r"target contains values \{'spam'\}"),
    ("LogLoss", ([[0.2, 1.8]], [1]), ValueError, "greater than 1"),
    ("LogLoss", ([[0.2, 0.8]], [1], [1.0]), ValueError, "sample_weight given, expected None"),
    ("LogLoss", (np.float32([[0.2, 0.8]]), [1]), ValueError, "dtype float32, expected float64"),
    ("Perplexity", ([[0.2, math.nan]], [1]), ValueError, "input: got NaN"),
    ("Perplexity", ([[0.2, 0.8]], [2]), IndexError, "target: got 2"),
    ("Perplexity", ([[0.2, 0.8]], [1], [1.0]), ValueError, "sample_weight given, expected None"),
]  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(("name", "chunk", "error", "message"), REFUSED)
    def test_a_chunk_that_does_not_fit_leaves_the_stream_as_it_was(self, name, chunk, error, message):
        make, first = ONE_CHUNK[name]
        stream = make().update(*first)
        state = stream._state
        with pytest.raises(error, match=message):
            stream.update(*chunk)
        assert stream._state == state
        same(stream.compute(), make().update(*first).compute())

    def test_labels_of_other_dtypes(self):
        """Text has one meaning, however it is held; a label may be called as an argument is."""
        chunk, stream = ([[0.4, 0.6]], ["y_true"]), LogLoss(labels=["x", "y_true"])
        for labels in (np.array(["x", "y_true"]), np.array(["x", "y_true"], "<U20"), np.array(["x", "y_true"], object)):
            same(LogLoss(labels=labels).update(*chunk).merge_state(stream.update(*chunk)).compute(), -math.log(0.6))
            stream.reset()
        with pytest.raises(ValueError, match=r"^target contains values \{'y_prob'\} not .* labels \['x' 'y_true'\]"):
            stream.update([[0.4, 0.6]], ["y_prob"])

    def test_streams_that_do_not_fit(self):
        stream = CrossEntropy().update([[0.0, 1.0]], [0])
        before = repr(stream)
        fits = CrossEntropy().update([[0.0, 1.0]], [0])
        with pytest.raises(ValueError, match="classes 3, expected 2"):
            stream.merge_state([fits, CrossEntropy().update([[0.0, 1.0, 2.0]], [0])])
        with pytest.raises(ValueError, match=r"others: got <CrossEntropy\(.*'sum'.*expected the options of"):
            stream.merge_state([fits, CrossEntropy(reduction="sum")])
        with pytest.raises(ValueError, match="expected the options"):
            stream.merge_state(CrossEntropy(weight=[1.0, 2.0]))
        with pytest.raises(TypeError, match="others: got NLL, expected CrossEntropy"):
            stream.merge_state([fits, NLL()])
        with pytest.raises(TypeError, match="others: got int, expected CrossEntropy"):
            stream.merge_state(3)
        assert repr(stream) == before

    def test_no_stream_of_rows(self):
        for make in (CrossEntropy, NLL, KLDivergence):
            with pytest.raises(ValueError, match="reduction: got 'none', expected one of"):
                make(reduction="none")

    def test_deprecated_options_and_unsorted_labels_warn_where_they_are_used(self):
        for make, options, message in (
            (CrossEntropy, {"reduce": True}, "deprecated"),
            (KLDivergence, {"size_average": False}, "deprecated"),
            (LogLoss, {"labels": ["b", "a"]}, "ordered"),
        ):
            with pytest.warns(UserWarning, match=message) as caught:
                make(**options)
            assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match="batchmean") as caught:
            KLDivergence().compute()
        assert caught[0].filename == __file__

    def test_weights_of_a_stream_that_are_all_zero_or_cancel(self):
        chunk = ([[0.25, 0.75]], [1])
        for stream in (LogLoss(), Perplexity()):
            stream.update(*chunk, [0.0])
            with pytest.raises(ValueError, match="at least one non-zero"):
                stream.compute()
            stream.update(*chunk, [1.0]).update(*chunk, [-1.0])
            with pytest.raises(ZeroDivisionError):
                stream.compute()
            stream.update(*chunk, [2.0])
            assert math.isfinite(stream.compute())


class TestExactSum:
    numbers = st.lists(st.floats(), max_size=20)

    @given(numbers, st.integers(0, 20))
    def test_pieces_give_what_the_kernel_gives(self, values, cut):
        from fastloss._kernels import sums

        values = np.array(values)
        state = np.zeros(sums.STATE_SIZE, np.int64)
        expected = sums.add_values.serial(1, state, values)
        pieces = ExactSum.of(values[:cut]) + ExactSum.of(values[cut:])
        same(pieces.total, expected)
        assert pieces == ExactSum.of_state(state)
        assert ExactSum.from_json(pieces.to_json()) == pieces
