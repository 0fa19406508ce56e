"""The digits, against mpmath on the given logits, and against PyTorch and SciPy on the same rows."""

import math

import numpy as np
import pytest
import references

from fastloss import cross_entropy, log_softmax, logsumexp, softmax, value_and_grad

# The contract's bound for float32. For float64 it is the same chain of roundings with 29 more bits: the difference of
# two logits, at most 32 for losses from 1e-12, is rounded by half a unit, 3.6e-15 relative to its exponential.
BOUND = {np.float32: 2e-6, np.float64: 4e-15}
CLASS_COUNTS = [2, 3, 10, 33, 100, 1000, 4097]
LOSSES = np.logspace(-12, 4, 15)


def rows_with_losses(rng, n_classes, dtype, losses=LOSSES):
    """Random rows whose target's logit is set so that the loss is about the one asked for."""
    x = rng.normal(size=(len(losses), n_classes)) * 2
    t = rng.integers(0, n_classes, len(losses))
    others = np.ones_like(x, bool)
    others[np.arange(len(x)), t] = False
    for i, loss in enumerate(losses):
        log_sum = math.log(math.fsum(np.exp(x[i, others[i]])))
        # loss = log1p(exp(log_sum - x[t]))
        x[i, t[i]] = log_sum - (loss if loss > 30 else math.log(math.expm1(loss)))
    return x.astype(dtype), t


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", CLASS_COUNTS)
class TestLosses:
    def test_relative_error(self, rng, n_classes, dtype):
        x, t = rows_with_losses(rng, n_classes, dtype)
        exact = references.exact_losses(x, t)
        assert float(min(exact)) < 2e-12
        assert float(max(exact)) > 9e3
        for got in (
            cross_entropy(x, t, reduction="none"),
            cross_entropy(np.asfortranarray(x), t, reduction="none"),
            [cross_entropy(x[i], t[i], reduction="none") for i in range(len(x))],
        ):
            assert max(references.relative_error(got, exact)) <= BOUND[dtype]

    def test_no_worse_than_torch(self, rng, n_classes, dtype):
        torch = pytest.importorskip("torch")
        x, t = rows_with_losses(rng, n_classes, dtype)
        exact = references.exact_losses(x, t)
        theirs = torch.nn.functional.cross_entropy(torch.from_numpy(x), torch.from_numpy(t), reduction="none").numpy()
        ours = cross_entropy(x, t, reduction="none")
        assert max(references.relative_error(ours, exact)) <= max(references.relative_error(theirs, exact))

    def test_no_worse_than_scipy(self, rng, n_classes, dtype):
        special = pytest.importorskip("scipy.special")
        x, t = rows_with_losses(rng, n_classes, dtype)
        exact = references.exact_losses(x, t)
        theirs = -special.log_softmax(x, axis=1)[np.arange(len(x)), t]
        ours = cross_entropy(x, t, reduction="none")
        assert max(references.relative_error(ours, exact)) <= max(references.relative_error(theirs, exact))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_language_models_row(rng, dtype):
    x, t = rows_with_losses(rng, 128_256, dtype, [1e-6, 3.0])
    exact = references.exact_losses(x, t)
    got = [cross_entropy(row, target, reduction="none") for row, target in zip(x, t, strict=True)]
    assert max(references.relative_error(got, exact)) <= BOUND[dtype]


@pytest.mark.parametrize("n_classes", [3, 100])
def test_smoothed_losses(rng, n_classes):
    """The smoothed loss is a sum of logarithms of the same distribution, each with all its digits."""
    x, t = rows_with_losses(rng, n_classes, np.float32, np.logspace(-12, 2, 15))
    weight = rng.random(n_classes).astype(np.float32)
    for eps in (1e-6, 0.1):
        exact = []
        for row, target in zip(x, t, strict=True):
            losses = [-v for v in references.exact_log_softmax(row)]
            uniform = sum(float(w) * v for w, v in zip(weight, losses, strict=True)) / n_classes
            exact.append((1 - eps) * float(weight[target]) * losses[target] + eps * uniform)
        got = cross_entropy(x, t, weight, label_smoothing=eps, reduction="none")
        assert max(references.relative_error(got, exact)) <= BOUND[np.float32]


@pytest.mark.parametrize("n_rows", [1, 9], ids=["in_rows", "in_planes"])
@pytest.mark.parametrize("n_classes", [2, 30])
def test_smoothed_losses_of_targets_without_weight(n_rows, n_classes):
    """What is left is the tiny loss of the likeliest class: nothing of the size of the unlikely target may enter."""
    x = np.full((n_rows, n_classes), -15.347022, np.float32)
    x[:, 0] = 0
    weight = np.zeros(n_classes, np.float32)
    weight[0] = 0.6875
    exact = 0.1 / n_classes * 0.6875 * math.log1p((n_classes - 1) * math.exp(float(x[0, 1])))
    got = cross_entropy(x, np.ones(n_rows, int), weight, label_smoothing=0.1, reduction="none")
    np.testing.assert_allclose(got, exact, rtol=BOUND[np.float32])


@pytest.mark.parametrize("n_classes", [90, 257, 1000, 20_000])
def test_many_classes_far_below_the_target(rng, n_classes):
    """All are equal, and so are the roundings of their differences: of up to 1.9e-6, if they were not counted."""
    own = rng.uniform(32, math.log((n_classes - 1) / 1.01e-12), 64).astype(np.float32)
    others = (2.0**-19 * rng.uniform(0.9, 1.1, 64)).astype(np.float32)
    x = np.repeat(others[:, None], n_classes, axis=1)
    x[:, 1] = own
    exact = np.log1p((n_classes - 1) * np.exp(others.astype(np.float64) - own))
    assert exact.min() >= 1e-12
    for array in (x, np.asfortranarray(x)):
        losses = cross_entropy(array, np.ones(64, int), reduction="none")
        np.testing.assert_allclose(losses, exact, rtol=5e-7)
    with_gradient = value_and_grad(cross_entropy)(x, np.ones(64, int), reduction="none", grad_output=np.ones(64))
    np.testing.assert_array_equal(with_gradient[0], losses)
    np.testing.assert_array_equal([cross_entropy(row, 1) for row in x], losses)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_of_long_rows_that_rise(dtype):
    """Each group of classes is scaled to a maximum that comes later; where they rise evenly, by one factor every time.
    (Of the first row, in float64, half of the entries were off by more than 4 ulp.)
    """
    in_order = np.sort(np.random.default_rng(4).normal(size=8200)) * 0.2
    for row in np.array([np.linspace(0, 0.38, 8200), in_order], dtype):
        got, exact = softmax(row), references.exact_softmax(row)
        assert max(references.ulp_error(got[::7], exact[::7], dtype)) <= 4


@pytest.mark.parametrize("seed", [7, 89, 197])
def test_softmax_of_rows_whose_roundings_add_up(seed):
    """One entry in fifty million was off by more than 4 ulp where a lane's terms went to one float32 sum, up to 4.35 in
    these rows.
    """
    x = (np.random.default_rng(seed).normal(size=(4000, 257)) * 4).astype(np.float32)
    terms = np.exp(x - x.max(axis=1, keepdims=True).astype(np.float64))
    exact = terms / terms.sum(axis=1, keepdims=True)
    errors = np.abs(softmax(x) - exact) / np.spacing(exact.astype(np.float32))
    assert errors.max() <= 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", [2, 10, 100, 1000, 2600])
class TestOutputs:
    """softmax and log_softmax within 4 units in the last place (softmax wherever the result is a normal number)."""

    def rows(self, rng, n_classes, dtype):
        """Nearly uniform, ordinary, confident, with entries at the end of the normal numbers, and rows that rise: each
        group of classes then has a new maximum, a little or much larger.
        """
        spread = 80 if dtype is np.float32 else 700
        scales = np.array([0.01, 1, 4, 20, spread])
        x = rng.normal(size=(len(scales), n_classes)) * scales[:, None]
        x[-1] = rng.uniform(-spread, 0, n_classes)
        x[-2, 0] = x[-2].max() + 30
        rising = np.linspace(0, [1, 5, 60], n_classes, axis=1)
        return np.concatenate([x, rising]).astype(dtype)

    def test_softmax(self, rng, n_classes, dtype):
        for row, got in zip(x := self.rows(rng, n_classes, dtype), softmax(x), strict=True):
            exact = references.exact_softmax(row)
            normal = [i for i, e in enumerate(exact) if e >= float(np.finfo(dtype).tiny)]
            errors = references.ulp_error(got[normal], [exact[i] for i in normal], dtype)
            assert max(errors) <= 4
        np.testing.assert_array_equal(softmax(x.T.copy(), 0).T, softmax(x))

    def test_log_softmax(self, rng, n_classes, dtype):
        for row, got in zip(x := self.rows(rng, n_classes, dtype), log_softmax(x), strict=True):
            assert max(references.ulp_error(got, references.exact_log_softmax(row), dtype)) <= 4

    def test_logsumexp(self, rng, n_classes, dtype):
        """Within the rounding of the maximum and of the logarithm: units of the larger of the two."""
        x = self.rows(rng, n_classes, dtype)
        for row, got in zip(x, logsumexp(x, 1), strict=True):
            unit = max(abs(float(row.max())), math.log(n_classes)) * np.finfo(dtype).eps
            assert abs(float(got) - float(references.exact_logsumexp(row))) <= 2 * unit


def test_logsumexp_keeps_a_small_remainder():
    assert logsumexp([0.0, -40.0]) == pytest.approx(4.248354255291589e-18, rel=4e-16)
    got = logsumexp(np.float32([0.0, -40.0]))
    assert float(got) == pytest.approx(4.248354255291589e-18, rel=4 * float(np.finfo(np.float32).eps))


class TestMeans:
    N_ROWS = 300_000

    def problem(self, rng):
        x = (rng.normal(size=(self.N_ROWS, 10)) * 3).astype(np.float32)
        t = rng.integers(0, 10, self.N_ROWS)
        # In float64 with every digit that matters to a mean of float32: absolute errors of 1e-15 per row.
        wide = x.astype(np.float64)
        largest = wide.max(axis=1)
        exact = np.log(np.exp(wide - largest[:, None]).sum(axis=1)) + largest - wide[np.arange(self.N_ROWS), t]
        return x, t, exact

    def test_mean_and_sum_of_many_rows(self, rng):
        """The float32 nearest to the exact mean, or its neighbour: the row's own roundings average out."""
        x, t, exact = self.problem(rng)
        total = math.fsum(exact)
        eps = float(np.finfo(np.float32).eps)
        assert float(cross_entropy(x, t)) == pytest.approx(total / self.N_ROWS, rel=eps)
        assert float(cross_entropy(x, t, reduction="sum")) == pytest.approx(total, rel=eps)

    def test_a_large_loss_does_not_drown_the_small_ones(self):
        """Added in float32, one loss of 1e4 and 300,000 of 1e-4 would lose nearly all of the latter."""
        x = np.zeros((self.N_ROWS + 1, 2), np.float32)
        x[:, 0] = -math.log(math.expm1(1e-4))
        x[0] = [0.0, 1e4]
        row = math.log1p(math.exp(-float(x[1, 0])))
        total = cross_entropy(x, np.zeros(len(x), np.int8), reduction="sum")
        assert float(total) == pytest.approx(1e4 + self.N_ROWS * row, rel=1e-7)
