"""Every option against PyTorch: values, shapes, the pattern of NaN and infinities, warnings.

PyTorch computes float32 losses through ``x - log(sum(exp(x)))``, whose rounding is absolute: some 1e-7 of the size of
the logits. So its float64 results are the ones to agree with closely; its float32 ones within that absolute error.
"""

import inspect
import itertools
import warnings

import numpy as np
import pytest

import fastloss

torch = pytest.importorskip("torch")
functional = torch.nn.functional

INF, NAN = float("inf"), float("nan")
REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [(7,), (1, 17), (9, 7), (12, 40), (0, 5), (3, 1), (4, 5, 3), (2, 33, 3, 2), (0, 3, 2)]
BOOLEANS = [None, True, False]


def shape_id(shape):
    return "x".join(map(str, shape))


def rows_shape(shape):
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def make_problem(rng, shape, dtype):
    """Logits of ordinary size, targets with some ignored, weights."""
    n_classes = shape[0] if len(shape) == 1 else shape[1]
    x = (rng.normal(size=shape) * 3).astype(dtype)
    t = np.asarray(rng.integers(0, n_classes, size=rows_shape(shape)))
    return x, t, rng.random(n_classes).astype(dtype) + dtype(0.1)


def assert_same(got, expected, dtype):
    """The shape, the NaN and infinities, the values."""
    expected = expected.detach().numpy()
    assert got.shape == expected.shape
    assert got.dtype == dtype
    # float64: the references of both are good to a few ulp of the largest logit, some 10. float32: see above, times the
    # rows of a sum.
    absolute = 1e-14 if dtype == np.float64 else 4e-6
    relative = 1e-13 if dtype == np.float64 else 2e-6
    np.testing.assert_allclose(got, expected, rtol=relative, atol=absolute * max(1, expected.size == 1 and 50))


def as_tensors(*arrays):
    return [None if a is None else torch.from_numpy(np.array(a)) for a in arrays]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
class TestOptions:
    def test_cross_entropy_with_indices(self, rng, shape, reduction, dtype):
        x, t, w = make_problem(rng, shape, dtype)
        if t.size > 3:
            t.flat[1], t.flat[3] = -100, -100
        for weight, eps, ignore_index in itertools.product([None, w], [0.0, 0.1, 0.5, 1.0], [-100, 0, 2, 99]):
            labels = np.where(t == -100, ignore_index, t)
            options = {"ignore_index": ignore_index, "label_smoothing": eps, "reduction": reduction}
            got = fastloss.cross_entropy(x, labels, weight=weight, **options)
            tx, tt, tw = as_tensors(x, labels, weight)
            assert_same(got, functional.cross_entropy(tx, tt, weight=tw, **options), dtype)

    def test_cross_entropy_with_probabilities(self, rng, shape, reduction, dtype):
        x, _, w = make_problem(rng, shape, dtype)
        y = rng.random(shape).astype(dtype)
        y /= np.maximum(y.sum(axis=0 if len(shape) == 1 else 1, keepdims=True), 0.1)
        for weight, eps in itertools.product([None, w], [0.0, 0.1, 1.0]):
            options = {"label_smoothing": eps, "reduction": reduction}
            got = fastloss.cross_entropy(x, y, weight=weight, **options)
            tx, ty, tw = as_tensors(x, y, weight)
            assert_same(got, functional.cross_entropy(tx, ty, weight=tw, **options), dtype)

    def test_nll_loss(self, rng, shape, reduction, dtype):
        x, t, w = make_problem(rng, shape, dtype)
        if t.size > 3:
            t.flat[1], t.flat[3] = -100, -100
        for weight, ignore_index in itertools.product([None, w], [-100, 0, 2, 99]):
            labels = np.where(t == -100, ignore_index, t)
            options = {"ignore_index": ignore_index, "reduction": reduction}
            got = fastloss.nll_loss(x, labels, weight=weight, **options)
            tx, tt, tw = as_tensors(x, labels, weight)
            assert_same(got, functional.nll_loss(tx, tt, weight=tw, **options), dtype)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [
        ((), ()), ((7,), (7,)), ((9, 7), (9, 7)), ((9, 7), (7,)), ((9, 1), (1, 7)), ((7,), (9, 7)), ((9, 7), ()),
        ((), (3,)), ((2, 33, 3), (2, 33, 3)), ((0, 3), (0, 3)), ((3, 0), (3, 0)), ((3, 1), (3, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_kl_div(rng, shape, target_shape, reduction, log_target, dtype):
    x = np.asarray(rng.normal(size=shape), dtype)
    y = np.asarray(rng.random(target_shape), dtype)
    if log_target:
        y = np.log(y)
    got = fastloss.kl_div(x, y, reduction=reduction, log_target=log_target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = functional.kl_div(*as_tensors(x, y), reduction=reduction, log_target=log_target)
    assert_same(got, expected, dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(), (7,), (9, 7), (3, 40), (4, 5, 3), (2, 33, 3, 2), (0, 3), (3, 1)], ids=shape_id)
def test_softmax_log_softmax_and_logsumexp(rng, shape, dtype):
    x = np.asarray(rng.normal(size=shape) * 3, dtype)
    (tx,) = as_tensors(x)
    for dim in range(-max(len(shape), 1), max(len(shape), 1)):
        assert_same(fastloss.softmax(x, dim=dim), torch.softmax(tx, dim), dtype)
        assert_same(fastloss.log_softmax(x, dim=dim), torch.log_softmax(tx, dim), dtype)
        for keepdim in (False, True):
            got = fastloss.logsumexp(x, dim=dim, keepdim=keepdim)
            assert_same(got, torch.logsumexp(tx, dim, keepdim=keepdim), dtype)
    if len(shape) > 1:
        for dims in itertools.combinations(range(len(shape)), 2):
            for keepdim in (False, True):
                got = fastloss.logsumexp(x, dim=dims, keepdim=keepdim)
                assert_same(got, torch.logsumexp(tx, dims, keepdim=keepdim), dtype)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "bool"])
def test_integer_targets_are_the_int64_ones(rng, dtype):
    x, _, _ = make_problem(rng, (9, 2), np.float64)
    t = rng.integers(0, 2, 9).astype(dtype)
    expected = functional.cross_entropy(*as_tensors(x, t.astype(np.int64)), reduction="none")
    assert_same(fastloss.cross_entropy(x, t, reduction="none"), expected, np.float64)


def test_halves_are_the_float32_of_their_values(rng):
    """The values; the dtype differs, float32 here and half there."""
    x = rng.normal(size=(9, 5)).astype(np.float16)
    t = rng.integers(0, 5, 9)
    tx, tt = as_tensors(x, t)
    expected = functional.cross_entropy(tx.float(), tt, reduction="none")
    assert_same(fastloss.cross_entropy(x, t, reduction="none"), expected, np.float32)


# ----------------------------------------------------------------------------------------------- special values

SPECIAL = [0.0, 1.5, -30.0, 200.0, -INF, INF, NAN]
# Without classes of all but certain probability, whose logarithm is 0 in PyTorch and a small number here: an infinite
# weight makes NaN of the one and an infinity of the other.
MODERATE = [0.0, 1.5, -3.0, -INF, INF, NAN]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n_classes", [3, 30])
class TestSpecialValues:
    """All triples of special logits; with 30 classes the others are small but finite."""

    def rows(self, n_classes, dtype, values=SPECIAL):
        triples = np.array(list(itertools.product(values, repeat=3)))
        x = np.full((len(triples), n_classes), -3.0)
        x[:, :3] = triples
        return x.astype(dtype)

    @pytest.mark.parametrize("eps", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize(
        "weight",
        [None, [0.0, 2.0, 1.0], [-1.0, 0.5, 0.0], [1.0, INF, 2.0], [NAN, 1.0, 2.0]],
        ids=["plain", "zero", "negative", "infinite", "nan"],
    )
    def test_cross_entropy_with_indices(self, dtype, n_classes, eps, weight):
        x = self.rows(n_classes, dtype, MODERATE if weight and INF in weight else SPECIAL)
        t = np.arange(len(x)) % 3
        w = None if weight is None else np.array(weight + [1.0] * (n_classes - 3), dtype)
        options = {"label_smoothing": eps, "reduction": "none"}
        expected = functional.cross_entropy(*as_tensors(x, t), weight=as_tensors(w)[0], **options)
        got = fastloss.cross_entropy(x, t, weight=w, **options)
        # The huge logit of 200 is the size that PyTorch's absolute error is relative to.
        absolute = 2e-13 if dtype is np.float64 else 1e-4
        np.testing.assert_allclose(got, expected.numpy(), rtol=2e-6 if dtype is np.float32 else 1e-13, atol=absolute)

    @pytest.mark.parametrize(
        "target",
        [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0], [NAN, 0.0, 1.0], [1.0, INF, 0.0], [1.0, 0.5, -0.25]],
        ids=["one_hot", "positive", "zero", "nan", "infinite", "negative"],
    )
    @pytest.mark.parametrize("eps", [0.0, 0.2])
    def test_cross_entropy_with_probabilities(self, dtype, n_classes, target, eps):
        x = self.rows(n_classes, dtype, MODERATE if INF in target else SPECIAL)
        y = np.zeros_like(x)
        y[:, :3] = target
        options = {"label_smoothing": eps, "reduction": "none"}
        expected = functional.cross_entropy(*as_tensors(x, y), **options)
        got = fastloss.cross_entropy(x, y, **options)
        absolute = 2e-13 if dtype is np.float64 else 1e-4
        np.testing.assert_allclose(got, expected.numpy(), rtol=2e-6 if dtype is np.float32 else 1e-13, atol=absolute)

    def test_nll_loss(self, dtype, n_classes):
        x = self.rows(n_classes, dtype)
        t = np.arange(len(x)) % 3
        w = np.array([0.0, -1.0, INF] + [1.0] * (n_classes - 3), dtype)
        for weight in (None, w):
            expected = functional.nll_loss(*as_tensors(x, t), weight=as_tensors(weight)[0], reduction="none")
            np.testing.assert_array_equal(fastloss.nll_loss(x, t, weight=weight, reduction="none"), expected.numpy())

    def test_softmax_log_softmax_and_logsumexp(self, dtype, n_classes):
        x = self.rows(n_classes, dtype)
        (tx,) = as_tensors(x)
        precision = 2e-5 if dtype is np.float32 else 1e-13
        for ours, theirs in (
            (fastloss.softmax(x), torch.softmax(tx, 1)),
            (fastloss.log_softmax(x), torch.log_softmax(tx, 1)),
            (fastloss.logsumexp(x, 1), torch.logsumexp(tx, 1)),
        ):
            # Absolute because PyTorch loses small logarithms; subnormal probabilities may be flushed to 0.
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=precision, atol=precision)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("log_target", [False, True])
def test_special_values_of_kl_div(dtype, log_target):
    values = np.array([0.0, 1e-3, 0.5, 1.0, -0.5, -2.0, INF, -INF, NAN], dtype)
    x, y = np.repeat(values, len(values)), np.tile(values, len(values))
    expected = functional.kl_div(*as_tensors(x, y), reduction="none", log_target=log_target)
    got = fastloss.kl_div(x, y, reduction="none", log_target=log_target)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6 if dtype is np.float32 else 1e-14)


@pytest.mark.parametrize("eps", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "weight", [[0.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [1.0, -1.0, 3.0], [0.0, 0.0, 0.0]], ids=str
)
def test_zero_weight_sums(weight, eps):
    x = np.array([[0.0, 1.0, 2.0], [0.5, 0.0, -1.0]])
    w = np.array(weight)
    for t in ([0, 0], [0, 1], [1, 0]):
        expected = functional.cross_entropy(*as_tensors(x, t), weight=as_tensors(w)[0], label_smoothing=eps)
        np.testing.assert_allclose(fastloss.cross_entropy(x, t, weight=w, label_smoothing=eps), expected, rtol=1e-13)
        expected = functional.nll_loss(*as_tensors(x, t), weight=as_tensors(w)[0])
        np.testing.assert_allclose(fastloss.nll_loss(x, t, weight=w), expected, rtol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_all_ignored(reduction, eps):
    x, t = np.ones((3, 4)), np.full(3, -100)
    expected = functional.cross_entropy(*as_tensors(x, t), reduction=reduction, label_smoothing=eps)
    got = fastloss.cross_entropy(x, t, reduction=reduction, label_smoothing=eps)
    np.testing.assert_array_equal(got, expected.numpy(), strict=True)


# ------------------------------------------------------------------------- the deprecated pair, and the signatures


def pairs_of(name):
    """A function and a class of both libraries, and arguments for a call."""
    x, t = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])), np.array([0, 2])
    if "kl" in name.lower():
        return x, np.array([[0.2, 0.3, 0.5], [0.4, 0.4, 0.2]])
    return x, t


def warnings_and_result(call):
    """What a call returns, and whether it warned of the pair and of the mean."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    return result, {"pair": any("deprecated" in m for m in messages), "mean": any("batchmean" in m for m in messages)}


@pytest.mark.parametrize("size_average", BOOLEANS)
@pytest.mark.parametrize("reduce", BOOLEANS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
class TestTheDeprecatedPair:
    @pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "kl_div"])
    def test_functions(self, name, reduction, reduce, size_average):
        x, t = pairs_of(name)
        options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
        ours, our_warnings = warnings_and_result(lambda: getattr(fastloss, name)(x, t, **options))
        theirs, their_warnings = warnings_and_result(lambda: getattr(functional, name)(*as_tensors(x, t), **options))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-13)
        assert our_warnings == their_warnings

    @pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss", "KLDivLoss"])
    def test_classes(self, name, reduction, reduce, size_average):
        x, t = pairs_of(name)
        options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
        ours, our_warnings = warnings_and_result(lambda: getattr(fastloss, name)(**options))
        theirs, their_warnings = warnings_and_result(lambda: getattr(torch.nn, name)(**options))
        assert our_warnings == their_warnings
        assert ours.reduction == theirs.reduction
        ours, our_warnings = warnings_and_result(lambda: getattr(fastloss, name)(**options)(x, t))
        theirs, their_warnings = warnings_and_result(lambda: getattr(torch.nn, name)(**options)(*as_tensors(x, t)))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-13)
        assert our_warnings == their_warnings


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "kl_div"])
def test_signatures_of_functions(name):
    ours = inspect.signature(getattr(fastloss, name)).parameters.values()
    theirs = inspect.signature(getattr(functional, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss", "KLDivLoss"])
def test_signatures_of_classes(name):
    ours = inspect.signature(getattr(fastloss, name)).parameters.values()
    theirs = inspect.signature(getattr(torch.nn, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_signatures_of_softmax_classes(name):
    assert list(inspect.signature(getattr(fastloss, name)).parameters) == list(
        inspect.signature(getattr(torch.nn, name)).parameters
    )


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [3, -1, -101])
def test_both_refuse_a_target_out_of_range(value):
    x, t = np.zeros((2, 3)), np.array([0, value])
    with pytest.raises(IndexError, match=str(value)):
        fastloss.cross_entropy(x, t)
    with pytest.raises(IndexError, match=str(value)):
        functional.cross_entropy(*as_tensors(x, t))


def test_both_refuse_ignore_index_with_probabilities():
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match="ignore_index"):
        fastloss.cross_entropy(x, x, ignore_index=1)
    with pytest.raises(RuntimeError, match="ignore_index"):
        functional.cross_entropy(*as_tensors(x, x), ignore_index=1)
