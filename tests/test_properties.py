"""Invariants, for any data: shifts, permutations, ignored rows, exact sums, a row's bits in any company."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastloss import cross_entropy, kl_div, log_softmax, logsumexp, nll_loss, softmax

INF = math.inf
EPS = float(np.finfo(np.float32).eps)

# Few classes and many: both forms of the kernels, and what is left over behind a vector.
N_CLASSES = st.sampled_from([1, 2, 5, 16, 23, 25, 40])
N_ROWS = st.integers(1, 21)
SMALL = st.floats(-60, 60, width=32)
ANY = st.one_of(SMALL, st.sampled_from([-INF, INF, math.nan, -(2.0**100), 2.0**100, 0.0, 88.0, -88.0]))
# Differences of these, shifted or not, are exact in float32.
EIGHTHS = st.integers(-400, 400).map(lambda n: n / 8)


@st.composite
def problems(draw, logits=SMALL, n_rows=N_ROWS):
    """Logits, targets (some of them ignored with ignore_index=-100) and weights."""
    shape = draw(n_rows), draw(N_CLASSES)
    x = draw(arrays(np.float32, shape, elements=logits))
    t = draw(arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))
    t[draw(arrays(np.bool_, shape[0], elements=st.sampled_from([False, False, False, True])))] = -100
    weight = draw(st.none() | arrays(np.float32, shape[1], elements=st.floats(0, 4, width=32)))
    return x, t, weight


def same_bits(a, b):
    """Equality of every bit, but for the kind of NaN."""
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_array_equal(a, b, strict=True)
    np.testing.assert_array_equal(np.signbit(a) & ~np.isnan(a), np.signbit(b) & ~np.isnan(b))


class TestShift:
    @given(problems(logits=EIGHTHS), st.integers(-1000, 1000), st.sampled_from([0.0, 0.25]))
    def test_of_all_classes_changes_no_bit(self, problem, shift, label_smoothing):
        x, t, weight = problem
        options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": "none"}
        same_bits(cross_entropy(x + np.float32(shift), t, **options), cross_entropy(x, t, **options))
        same_bits(softmax(x + np.float32(shift)), softmax(x))
        same_bits(log_softmax(x + np.float32(shift)), log_softmax(x))

    @given(problems(logits=EIGHTHS), st.integers(-1000, 1000))
    def test_shifts_log_sum_exp(self, problem, shift):
        x, _, _ = problem
        expected = logsumexp(x, 1).astype(float) + shift
        # One rounding of each of the two.
        np.testing.assert_allclose(logsumexp(x + np.float32(shift), 1), expected, rtol=EPS, atol=70 * EPS)


class TestPermutation:
    @given(problems(logits=ANY), st.randoms(use_true_random=False))
    def test_of_rows_permutes_the_losses_and_leaves_sums(self, problem, random):
        x, t, weight = problem
        order = list(range(len(x)))
        random.shuffle(order)
        for function in (cross_entropy, nll_loss):
            losses = function(x, t, weight, reduction="none")
            same_bits(function(x[order], t[order], weight, reduction="none"), losses[order])
            for reduction in ("sum", "mean"):
                before = function(x, t, weight, reduction=reduction)
                same_bits(function(x[order], t[order], weight, reduction=reduction), before)
        same_bits(softmax(x[order]), softmax(x)[order])
        same_bits(logsumexp(x[order], 1), logsumexp(x, 1)[order])

    @given(problems(), st.randoms(use_true_random=False))
    def test_of_classes_leaves_the_loss(self, problem, random):
        x, t, weight = problem
        order = list(range(x.shape[1]))
        random.shuffle(order)
        places = np.argsort(order)
        moved = np.where(t < 0, t, places[np.maximum(t, 0)])
        options = {"reduction": "none"}
        before = cross_entropy(x, t, weight, **options)
        after = cross_entropy(x[:, order], moved, None if weight is None else weight[order], **options)
        # The order of addition changes: some roundings of sums of 40 terms at most.
        np.testing.assert_allclose(after, before, rtol=8 * EPS, atol=1e-37)
        same_bits(nll_loss(x[:, order], moved, **options), nll_loss(x, t, **options))


class TestIgnoredRows:
    @given(problems(logits=ANY), st.sampled_from([0.0, 0.25]))
    def test_an_ignored_row_is_a_deleted_row(self, problem, label_smoothing):
        x, t, weight = problem
        keep = t >= 0
        options = {"weight": weight, "label_smoothing": label_smoothing}
        for reduction in ("sum", "mean"):
            options["reduction"] = reduction
            same_bits(cross_entropy(x, t, **options), cross_entropy(x[keep], t[keep], **options))
        options["reduction"] = "none"
        losses = cross_entropy(x, t, **options)
        same_bits(losses[keep], cross_entropy(x[keep], t[keep], **options))
        assert losses[~keep].tobytes() == bytes(losses[~keep].nbytes)
        for reduction in ("sum", "mean"):
            whole = nll_loss(x, t, weight, reduction=reduction)
            same_bits(whole, nll_loss(x[keep], t[keep], weight, reduction=reduction))


class TestSums:
    """A sum is the exact sum of the losses, rounded once; a mean is one division away from the exact sum in float64."""

    @given(problems(), st.sampled_from([0.0, 0.25]))
    def test_cross_entropy(self, problem, label_smoothing):
        x, t, weight = problem
        options = {"weight": weight, "label_smoothing": label_smoothing}
        losses = cross_entropy(x, t, reduction="none", **options).astype(float)
        assert cross_entropy(x, t, reduction="sum", **options) == np.float32(math.fsum(losses))
        kept = t[t >= 0]
        denominator = float(len(kept)) if weight is None else math.fsum(weight[kept].astype(float))
        if denominator:
            assert cross_entropy(x, t, **options) == np.float32(math.fsum(losses) / denominator)

    @given(problems())
    def test_probabilities(self, problem):
        x, _, weight = problem
        y = softmax(x[::-1])
        losses = cross_entropy(x, y, weight, reduction="none").astype(float)
        assert cross_entropy(x, y, weight, reduction="sum") == np.float32(math.fsum(losses))
        assert cross_entropy(x, y, weight) == np.float32(math.fsum(losses) / len(x))

    @given(problems())
    def test_nll_loss(self, problem):
        x, t, weight = problem
        losses = nll_loss(x, t, weight, reduction="none").astype(float)
        assert nll_loss(x, t, weight, reduction="sum") == np.float32(math.fsum(losses))

    @given(problems(), st.booleans())
    def test_kl_div(self, problem, log_target):
        x, _, _ = problem
        y = -np.abs(x[::-1]) if log_target else np.abs(x[::-1])
        values = kl_div(x, y, reduction="none", log_target=log_target).astype(float)
        assert kl_div(x, y, reduction="sum", log_target=log_target) == np.float32(math.fsum(values.ravel()))
        batchmean = kl_div(x, y, reduction="batchmean", log_target=log_target)
        assert batchmean == np.float32(math.fsum(values.ravel()) / len(x))

    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
    def test_float64_of_any_size(self, values):
        """nll_loss of one class adds what it is given."""
        x = np.array(values)[:, None]
        expected = sum_exactly([-v for v in values])
        assert nll_loss(x, np.zeros(len(x), int), reduction="sum") == expected


def sum_exactly(values):
    total = sum(map(Fraction, values), Fraction(0))
    try:
        return float(total)
    except OverflowError:
        return INF if total > 0 else -INF


class TestDivergence:
    @given(problems())
    def test_of_a_distribution_from_itself_is_zero(self, problem):
        x, _, _ = problem
        log_p = log_softmax(x)
        assert not kl_div(log_p, log_p, reduction="none", log_target=True).any()

    @given(problems())
    def test_of_a_distribution_from_its_rounded_logarithm_is_that_rounding(self, problem):
        x, _, _ = problem
        p = softmax(x)
        p = np.where(p < 1e-35, np.float32(0.5), p)
        log_p = np.log(p.astype(float)).astype(np.float32)
        # |log p - x| is half a unit in the last place of x; the result is rounded once more.
        bound = p.astype(float) * np.abs(log_p.astype(float)) * EPS / 2 * 1.001
        assert (np.abs(kl_div(log_p, p, reduction="none")) <= bound + 1e-15).all()

    @given(problems(logits=st.floats(-8, 8, width=32)))
    def test_is_not_negative(self, problem):
        x, _, _ = problem
        a, b = log_softmax(x.astype(float)), log_softmax(x[::-1].astype(float))
        # Normalised to some 1e-16 each, so negative by no more than the classes' number of such errors.
        assert kl_div(a, np.exp(b), reduction="sum") >= -1e-14 * x.size
        assert kl_div(a, b, reduction="sum", log_target=True) >= -1e-14 * x.size


class TestRelations:
    @given(problems())
    def test_softmax_is_a_distribution(self, problem):
        x, _, _ = problem
        total = softmax(x).astype(float).sum(axis=1)
        # 4 ulp of each, so 4 of the sum.
        np.testing.assert_allclose(total, 1, rtol=4 * EPS)

    @given(problems())
    def test_cross_entropy_is_nll_loss_of_log_softmax(self, problem):
        x, t, weight = problem
        expected = nll_loss(log_softmax(x), t, weight, reduction="none")
        np.testing.assert_allclose(cross_entropy(x, t, weight, reduction="none"), expected, rtol=4e-6, atol=1e-37)

    @given(problems(), st.sampled_from([0.0, 0.25, 1.0]))
    def test_one_hot_probabilities_are_indices(self, problem, label_smoothing):
        x, t, weight = problem
        t = np.maximum(t, 0)
        one_hot = np.eye(x.shape[1], dtype=np.float32)[t]
        options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": "none"}
        expected = cross_entropy(x, t, **options)
        np.testing.assert_allclose(cross_entropy(x, one_hot, **options), expected, rtol=4e-6, atol=1e-37)

    @given(problems())
    def test_the_loss_is_log_sum_exp_minus_the_logit(self, problem):
        x, t, _ = problem
        t = np.maximum(t, 0)
        expected = logsumexp(x, 1).astype(float) - np.take_along_axis(x, t[:, None], 1)[:, 0]
        # logsumexp is rounded to half a unit of a number below 64.
        np.testing.assert_allclose(cross_entropy(x, t, reduction="none"), expected, rtol=4 * EPS, atol=64 * EPS)

    @given(problems())
    def test_losses_are_not_negative(self, problem):
        x, t, weight = problem
        assert (cross_entropy(x, t, weight, label_smoothing=0.1, reduction="none") >= 0).all()
        assert (log_softmax(x) <= 0).all()


def column(row, n_rows, where):
    """A batch with this row at one place, among others."""
    batch = np.tile(row[::-1], (n_rows, 1))
    batch[where] = row
    return batch


class TestBitsOfARow:
    """A row alone, in any batch, at any position, in any layout, has the same bits."""

    @given(problems(logits=ANY, n_rows=st.just(1)), st.integers(2, 40), st.data())
    def test_in_any_batch_at_any_position(self, problem, n_rows, data):
        (row,), (target,), weight = problem
        target = max(int(target), 0)
        where = data.draw(st.integers(0, n_rows - 1))
        x, t = column(row, n_rows, where), np.full(n_rows, target)
        for options in ({}, {"weight": weight}, {"label_smoothing": 0.25, "weight": weight}):
            alone = cross_entropy(row, target, reduction="none", **options)
            same_bits(cross_entropy(row[None], [target], reduction="none", **options)[0], alone)
            same_bits(cross_entropy(x, t, reduction="none", **options)[where], alone)
        y = softmax(np.clip(np.nan_to_num(row[::-1]), -60, 60))
        alone = cross_entropy(row, y, weight, reduction="none", label_smoothing=0.1)
        same_bits(
            cross_entropy(x, np.tile(y, (n_rows, 1)), weight, reduction="none", label_smoothing=0.1)[where], alone
        )
        same_bits(softmax(x)[where], softmax(row))
        same_bits(log_softmax(x)[where], log_softmax(row))
        same_bits(logsumexp(x, 1)[where], logsumexp(row))

    @given(problems(logits=ANY), st.data())
    def test_split_by_slices(self, problem, data):
        x, t, weight = problem
        cut = data.draw(st.integers(0, len(x)))
        for options in ({"weight": weight}, {"label_smoothing": 0.25}):
            whole = cross_entropy(x, t, reduction="none", **options)
            parts = [cross_entropy(x[s], t[s], reduction="none", **options) for s in (slice(cut), slice(cut, None))]
            same_bits(np.concatenate(parts), whole)
        same_bits(np.concatenate([logsumexp(x[:cut], 1), logsumexp(x[cut:], 1)]), logsumexp(x, 1))
        same_bits(np.concatenate([softmax(x[:cut]), softmax(x[cut:])]), softmax(x))

    @given(problems(logits=ANY))
    def test_in_any_layout(self, problem):
        x, t, weight = problem
        others = {
            "fortran": np.asfortranarray(x),
            "steps": np.repeat(np.repeat(x, 2, axis=0), 3, axis=1)[::2, ::3],
            "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
            "big_endian": x.astype(">f4"),
        }
        options = {"weight": weight, "label_smoothing": 0.25, "reduction": "none"}
        y = softmax(np.clip(np.nan_to_num(x[::-1]), -60, 60))
        for other in others.values():
            same_bits(cross_entropy(other, t, reduction="none"), cross_entropy(x, t, reduction="none"))
            same_bits(cross_entropy(other, t, **options), cross_entropy(x, t, **options))
            same_bits(cross_entropy(other, y, **options), cross_entropy(x, y, **options))
            same_bits(logsumexp(other, 1), logsumexp(x, 1))
            same_bits(log_softmax(other, 1), log_softmax(x, 1))

    @given(problems(logits=ANY), st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 2)]))
    def test_as_pixels_of_images(self, problem, size):
        """(N, C) as (1, C, N, 1) and the like, channels first and channels last."""
        x, t, weight = problem
        n_pixels = size[0] * size[1]
        x, t = np.tile(x, (n_pixels, 1)), np.tile(t, n_pixels)
        flat = cross_entropy(x, t, weight, reduction="none")
        channels_last = x.reshape(-1, *size, x.shape[1]).transpose(0, 3, 1, 2)
        channels_first = np.ascontiguousarray(channels_last)
        labels = t.reshape(-1, *size)
        for images in (channels_first, channels_last, np.asfortranarray(channels_first)):
            same_bits(cross_entropy(images, labels, weight, reduction="none").ravel(), flat)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", [256, 257, 271, 511, 513, 8191, 8192, 8193, 20_000])
def test_bits_of_long_rows(rng, serial, dtype, n_classes):
    """Around the borders of blocks (256 classes) and chunks (8192): alone, in a batch, with strided classes."""
    x = (rng.normal(size=(9, n_classes)) * 5).astype(dtype)
    t = rng.integers(0, n_classes, 9)
    strided = np.asfortranarray(x)
    for options in ({}, {"label_smoothing": 0.25}):
        losses = cross_entropy(x, t, reduction="none", **options)
        same_bits(cross_entropy(strided, t, reduction="none", **options), losses)
        same_bits(cross_entropy(x[:, ::-1], n_classes - 1 - t, reduction="none", **options),
                  cross_entropy(x[:, ::-1].copy(), n_classes - 1 - t, reduction="none", **options))  # fmt: skip
        for i in (0, 8):
            same_bits(cross_entropy(x[i], t[i], reduction="none", **options), losses[i])
    same_bits(logsumexp(strided, 1), logsumexp(x, 1))
    same_bits(softmax(strided, 1), softmax(x, 1))
    y = softmax(x)
    same_bits(cross_entropy(strided, y, reduction="none"), cross_entropy(x, y, reduction="none"))
