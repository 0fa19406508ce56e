"""value_and_grad: PyTorch's autograd, central differences, digits, special values, layouts, the same bits."""

import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import warnings

import mpmath
import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastloss
from fastloss import value_and_grad

INF, NAN = float("inf"), float("nan")
REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [(7,), (1, 17), (9, 7), (12, 40), (0, 5), (3, 1), (4, 5, 3), (2, 33, 3, 2), (0, 3, 2), (9, 300)]

cross_entropy = value_and_grad(fastloss.cross_entropy)
nll_loss = value_and_grad(fastloss.nll_loss)
kl_div = value_and_grad(fastloss.kl_div)

pytestmark = [
    pytest.mark.usefixtures("serial"),
    pytest.mark.filterwarnings("ignore:reduction='mean' divides:UserWarning"),
]


def shape_id(shape):
    return "x".join(map(str, shape))


def rows_shape(shape):
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def class_count(shape):
    return shape[0] if len(shape) == 1 else shape[1]


def make_problem(rng, shape, dtype=np.float64):
    """Logits of ordinary size, targets with some ignored, weights, and an upstream gradient for the rows."""
    n_classes = class_count(shape)
    x = (rng.normal(size=shape) * 3).astype(dtype)
    t = np.asarray(rng.integers(0, n_classes, size=rows_shape(shape)))
    if t.size > 3:
        t.flat[1], t.flat[3] = -100, -100
    weight = rng.random(n_classes).astype(dtype) + dtype(0.1)
    return x, t, weight, np.asarray(rng.normal(size=t.shape), dtype)


def normalized(y):
    return y / np.maximum(y.sum(axis=0 if y.ndim == 1 else 1, keepdims=True), 0.1)


def upstream_for(reduction, grad_output):
    return {"grad_output": grad_output} if reduction == "none" else {}


# --------------------------------------------------------------------------------------------------- autograd


def autograd(name, x, *arrays, grad_output=None, **options):
    """PyTorch's value and gradient."""
    torch = pytest.importorskip("torch")
    tensor = lambda a: torch.from_numpy(np.array(a))
    options = {k: tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    tx = tensor(x).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = getattr(torch.nn.functional, name)(tx, *map(tensor, arrays), **options)
    value.backward(None if grad_output is None else tensor(grad_output))
    return value.detach().numpy(), tx.grad.numpy()


def assert_same(got, expected, dtype, mass=1.0):
    """The value and the gradient; the errors of both libraries are relative to a row's largest terms, ``mass``."""
    (value, gradient), (expected_value, expected_gradient) = got, expected
    relative, absolute = (1e-12, 1e-14) if dtype == np.float64 else (2e-5, 1e-6)
    np.testing.assert_allclose(value, expected_value, rtol=relative, atol=20 * absolute)
    assert gradient.dtype == dtype
    assert gradient.shape == expected_gradient.shape
    np.testing.assert_allclose(gradient, expected_gradient, rtol=relative, atol=absolute * mass)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
class TestAutograd:
    def test_cross_entropy_with_indices(self, rng, shape, reduction, dtype):
        x, t, w, upstream = make_problem(rng, shape, dtype)
        for weight, eps, ignore_index in itertools.product(
            [None, w], [0.0, 0.1, 1.0], [-100, 0, class_count(shape) + 5]
        ):
            labels = np.where(t == -100, ignore_index, t)
            options = {"label_smoothing": eps, "reduction": reduction, "ignore_index": ignore_index}
            options |= {} if weight is None else {"weight": weight}
            got = cross_entropy(x, labels, **options, **upstream_for(reduction, upstream))
            expected = autograd("cross_entropy", x, labels, **options, **upstream_for(reduction, upstream))
            assert_same(got, expected, dtype)
            np.testing.assert_array_equal(got[0], fastloss.cross_entropy(x, labels, **options))

    def test_cross_entropy_with_probabilities(self, rng, shape, reduction, dtype):
        x, _, w, upstream = make_problem(rng, shape, dtype)
        y = normalized(rng.random(shape).astype(dtype))
        for weight, eps in itertools.product([None, w], [0.0, 0.1, 1.0]):
            options = {"label_smoothing": eps, "reduction": reduction} | ({} if weight is None else {"weight": weight})
            got = cross_entropy(x, y, **options, **upstream_for(reduction, upstream))
            expected = autograd("cross_entropy", x, y, **options, **upstream_for(reduction, upstream))
            assert_same(got, expected, dtype)
            np.testing.assert_array_equal(got[0], fastloss.cross_entropy(x, y, **options))

    def test_nll_loss(self, rng, shape, reduction, dtype):
        x, t, w, upstream = make_problem(rng, shape, dtype)
        for weight, ignore_index in itertools.product([None, w], [-100, 0]):
            labels = np.where(t == -100, ignore_index, t)
            options = {"ignore_index": ignore_index, "reduction": reduction}
            options |= {} if weight is None else {"weight": weight}
            got = nll_loss(x, labels, **options, **upstream_for(reduction, upstream))
            assert_same(got, autograd("nll_loss", x, labels, **options, **upstream_for(reduction, upstream)), dtype)
            np.testing.assert_array_equal(got[0], fastloss.nll_loss(x, labels, **options))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [
        ((), ()), ((7,), (7,)), ((9, 7), (9, 7)), ((9, 7), (7,)), ((9, 1), (1, 7)), ((7,), (9, 7)), ((9, 7), ()),
        ((), (3,)), ((2, 33, 3), (2, 33, 3)), ((0, 3), (0, 3)), ((3, 0), (3, 0)), ((3, 1), (3, 0)),
        ((1, 4, 1), (3, 1, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_kl_div_as_autograd(rng, shape, target_shape, reduction, log_target, dtype):
    x, y = np.asarray(rng.normal(size=shape), dtype), np.asarray(rng.random(target_shape), dtype)
    y = np.log(y) if log_target else y
    upstream = np.asarray(rng.normal(size=np.broadcast_shapes(shape, target_shape)), dtype)
    options = {"reduction": reduction, "log_target": log_target}
    got = kl_div(x, y, **options, **upstream_for(reduction, upstream))
    assert_same(got, autograd("kl_div", x, y, **options, **upstream_for(reduction, upstream)), dtype)
    np.testing.assert_array_equal(got[0], fastloss.kl_div(x, y, **options))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n_classes", [3, 40], ids=["planes", "rows"])
class TestSpecialValuesAsAutograd:
    """All triples of special logits; with 40 classes the others are small but finite."""

    def rows(self, n_classes, dtype, values=(0.0, 1.5, -30.0, 200.0, -INF, INF, NAN)):
        triples = np.array(list(itertools.product(values, repeat=3)))
        x = np.full((len(triples), n_classes), -3.0)
        x[:, :3] = triples
        return x.astype(dtype)

    def compare(self, name, x, *arrays, dtype, **options):
        got = value_and_grad(getattr(fastloss, name))(x, *arrays, **options)
        expected = autograd(name, x, *arrays, **options)
        assert_same((0.0, got[1]), (0.0, expected[1]), dtype, mass=3)

    @pytest.mark.parametrize("eps", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize(
        "weight",
        [None, [0.0, 2.0, 1.0], [-1.0, 0.5, 0.0], [1.0, INF, 2.0], [NAN, 1.0, 2.0]],
        ids=["plain", "zero", "negative", "infinite", "nan"],
    )
    def test_cross_entropy_with_indices(self, dtype, n_classes, eps, weight):
        # A probability that is exactly 0 in PyTorch and all but 0 here (or the other way) times inf is NaN.
        values = (
            (0.0, 1.5, -3.0, -INF, INF, NAN) if weight and INF in weight else (0.0, 1.5, -30.0, 200.0, -INF, INF, NAN)
        )
        x = self.rows(n_classes, dtype, values)
        t = np.arange(len(x)) % 3
        options = {"label_smoothing": eps}
        if weight is not None:
            options["weight"] = np.array(weight + [1.0] * (n_classes - 3), dtype)
        upstream = np.linspace(0.5, 2, len(x)).astype(dtype)
        self.compare("cross_entropy", x, t, dtype=dtype, reduction="none", grad_output=upstream, **options)

    @pytest.mark.parametrize(
        "target",
        [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0], [NAN, 0.0, 1.0], [1.0, INF, 0.0], [1.0, 0.5, -0.25]],
        ids=["one_hot", "positive", "zero", "nan", "infinite", "negative"],
    )
    @pytest.mark.parametrize("eps", [0.0, 0.2])
    def test_cross_entropy_with_probabilities(self, dtype, n_classes, target, eps):
        values = (0.0, 1.5, -3.0, -INF, INF, NAN) if INF in target else (0.0, 1.5, -30.0, 200.0, -INF, INF, NAN)
        x = self.rows(n_classes, dtype, values)
        y = np.zeros_like(x)
        y[:, :3] = target
        self.compare("cross_entropy", x, y, dtype=dtype, reduction="sum", label_smoothing=eps)

    @pytest.mark.parametrize("eps", [0.0, 0.2])
    def test_upstream_gradients(self, dtype, n_classes, eps):
        x = self.rows(n_classes, dtype, (0.0, 1.0, -2.0))
        t = np.arange(len(x)) % 3
        upstream = np.resize(np.array([0.0, INF, -INF, NAN, 2.0], dtype), len(x))
        options = {"reduction": "none", "grad_output": upstream}
        self.compare("cross_entropy", x, t, dtype=dtype, label_smoothing=eps, **options)
        self.compare("cross_entropy", x, np.full_like(x, 0.25), dtype=dtype, label_smoothing=eps, **options)
        self.compare("nll_loss", x, t, dtype=dtype, **options)

    def test_nll_loss(self, dtype, n_classes):
        x = self.rows(n_classes, dtype)
        weight = np.array([0.0, -1.0, INF] + [1.0] * (n_classes - 3), dtype)
        self.compare("nll_loss", x, np.arange(len(x)) % 3, dtype=dtype, weight=weight, reduction="sum")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("log_target", [False, True])
def test_special_values_of_kl_div_as_autograd(dtype, log_target):
    values = np.array([0.0, 1e-3, 0.5, 1.0, -0.5, -2.0, 80.0, 177.0, 1419.0, -150.0, INF, -INF, NAN], dtype)
    x, y = np.repeat(values, len(values)), np.tile(values, len(values))
    upstream = np.resize(np.array([1.0, -2.0, 0.5, 0.0], dtype), len(x))
    options = {"reduction": "none", "log_target": log_target, "grad_output": upstream}
    expected = autograd("kl_div", x, y, **options)[1]
    np.testing.assert_allclose(kl_div(x, y, **options)[1], expected, rtol=2e-6 if dtype is np.float32 else 1e-14)


@pytest.mark.parametrize("eps", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "weight", [[0.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [1.0, -1.0, 3.0], [0.0, 0.0, 0.0]], ids=str
)
def test_means_over_no_weight_as_autograd(weight, eps):
    x, w = np.array([[0.0, 1.0, 2.0], [0.5, 0.0, -1.0]]), np.array(weight)
    for t in ([0, 0], [0, 1], [1, 0], [-100, -100], [0, -100]):
        labels = np.array(t)
        expected = autograd("cross_entropy", x, labels, weight=w, label_smoothing=eps)
        np.testing.assert_allclose(cross_entropy(x, labels, weight=w, label_smoothing=eps)[1], expected[1], rtol=1e-13)
        expected = autograd("nll_loss", x, labels, weight=w)
        np.testing.assert_allclose(nll_loss(x, labels, weight=w)[1], expected[1], rtol=1e-13)


# --------------------------------------------------------------------------------------- formulas and differences


def central_differences(function, x, step=1e-5):
    """The derivative of a scalar function by each element of a float64 array."""
    gradient = np.empty_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (9, 4), (2, 3, 2)], ids=shape_id)
def test_central_differences(rng, shape, reduction):
    """The loss that is differentiated is that of the references, which import nothing of fastloss."""
    x, t, w, _ = make_problem(rng, shape)
    y = normalized(rng.random(shape))
    for eps in (0.0, 0.2):
        options = {"weight": w, "reduction": reduction, "label_smoothing": eps}
        expected = central_differences(lambda v: references.cross_entropy(v, t, **options), x)  # noqa: B023
        np.testing.assert_allclose(cross_entropy(x, t, **options)[1], expected, rtol=1e-6, atol=1e-8)
        expected = central_differences(lambda v: references.cross_entropy_probabilities(v, y, **options), x)  # noqa: B023
        np.testing.assert_allclose(cross_entropy(x, y, **options)[1], expected, rtol=1e-6, atol=1e-8)
    expected = central_differences(lambda v: references.nll_loss(v, t, weight=w, reduction=reduction), x)
    np.testing.assert_allclose(nll_loss(x, t, weight=w, reduction=reduction)[1], expected, rtol=1e-6, atol=1e-8)
    for log_target in (False, True):
        expected = central_differences(lambda v: references.kl_div(v, y, reduction, log_target), x)  # noqa: B023
        got = kl_div(x, y, reduction=reduction, log_target=log_target)[1]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


def exact_gradient(row, masses):
    """sum(m) * softmax - m, with 60 digits."""
    with mpmath.workdps(60):
        terms = [mpmath.exp(mpmath.mpf(float(v))) for v in row]
        total, mass = mpmath.fsum(terms), mpmath.fsum(mpmath.mpf(float(m)) for m in masses)
        return [e / total * mass - mpmath.mpf(float(m)) for e, m in zip(terms, masses, strict=True)]


def worst_error(gradient, rows, masses):
    """The largest relative error of the entries that are normal numbers."""
    worst, tiny = 0.0, np.finfo(gradient.dtype).tiny
    for got, row, mass in zip(gradient, rows, masses, strict=True):
        for g, e in zip(got, exact_gradient(row, mass), strict=True):
            if abs(e) > tiny:
                worst = max(worst, float(abs((mpmath.mpf(float(g)) - e) / e)))
    return worst


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-6), (np.float64, 5e-15)])
@pytest.mark.parametrize("n_classes", [2, 10, 50])
def test_small_gradients_keep_their_digits(rng, n_classes, dtype, bound):
    """The target's entry of a confident row too, for which p - 1 is 0; and of a row that is sure of the wrong class."""
    x = rng.normal(size=(60, n_classes))
    t = rng.integers(0, n_classes, 60)
    margin = np.linspace(-100, 27, 60)
    x[np.arange(60), t] += margin
    x = x.astype(dtype)
    one_hot = np.eye(n_classes)[t]
    for target in (t, one_hot.astype(dtype)):
        gradient = cross_entropy(x, target, reduction="sum")[1]
        if target is t:
            assert worst_error(gradient, x, one_hot) < bound
        own = gradient[margin > 10][np.arange((margin > 10).sum()), t[margin > 10]]
        exact = [exact_gradient(r, m)[c] for r, m, c in zip(x, one_hot, t, strict=True)]
        exact = np.array([float(e) for e in exact])[margin > 10]
        np.testing.assert_allclose(own, exact, rtol=bound)
        assert (own < 0).all()


@pytest.mark.parametrize("layout_of", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("n_classes", [3, 40, 1100])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-6), (np.float64, 5e-15)])
def test_little_smoothing_keeps_its_digits(dtype, bound, n_classes, layout_of):
    """The target's entry of a confident row is about the little mass of all other classes."""
    x = np.zeros((20, n_classes), dtype)
    t = np.arange(20) * 7 % n_classes
    x[np.arange(20), t] = 60
    weight = np.linspace(1, 2, n_classes).astype(dtype)
    for smoothing in (1e-7, 1e-4, 0.3):
        gradient = cross_entropy(layout_of(x), t, weight, reduction="sum", label_smoothing=smoothing)[1]
        others = smoothing / n_classes * (weight.sum(dtype=float) - weight[t].astype(float))
        total = (1 - smoothing) * weight[t].astype(float) + smoothing / n_classes * weight.sum(dtype=float)
        expected = others - total * (n_classes - 1) * math.exp(-60)
        np.testing.assert_allclose(gradient[np.arange(20), t], expected, rtol=bound)


@pytest.mark.parametrize("layout_of", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("n_classes", [2, 1000, 50257])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-6), (np.float64, 5e-15)])
def test_flat_rows_keep_their_digits(dtype, bound, n_classes, layout_of):
    """Each class is a maximum, with little probability: softmax minus the target, 1/C - m."""
    n_rows = 17 if n_classes < 2000 else 2
    x, t = np.zeros((n_rows, n_classes), dtype), np.arange(n_rows) % n_classes
    one_hot = np.zeros((n_rows, n_classes), dtype)
    one_hot[np.arange(n_rows), t] = 1
    for target, smoothing in ((t, 0.0), (t, 0.1), (one_hot, 0.0)):
        gradient = cross_entropy(layout_of(x), target, reduction="sum", label_smoothing=smoothing)[1]
        expected = (1 - smoothing) * (1 / n_classes - one_hot.astype(float))
        np.testing.assert_allclose(gradient, expected, rtol=bound)


finite_rows = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-50, 50, width=32)
)


@pytest.mark.parametrize("layout_of", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.5}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_by_the_lowest_number(dtype, options, layout_of):
    """Softmax minus the target: what the difference of huge numbers loses in rounding has no part in it."""
    lowest = np.finfo(dtype).min
    x = np.full((20, 5), lowest / 4, dtype)
    x[:, 1] = lowest * np.finfo(dtype).eps / -5
    t = np.arange(20) % 5
    targets = np.eye(5)[t] * (1 - options.get("label_smoothing", 0)) + options.get("label_smoothing", 0) / 5
    expected = np.eye(5)[[1]] - targets
    for target in (t, targets):
        _, gradient = cross_entropy(layout_of(x), target, reduction="sum", **(options if target is t else {}))
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=4 * np.finfo(dtype).eps)


class TestProperties:
    @given(finite_rows, st.randoms(use_true_random=False))
    def test_a_row_sums_to_zero(self, x, random):
        t = np.array([random.randrange(x.shape[1]) for _ in x])
        gradient = cross_entropy(x, t, reduction="sum")[1]
        largest = np.abs(gradient).max(axis=1)
        assert (np.abs(gradient.sum(axis=1)) <= 1e-14 * largest).all()
        assert (gradient.min(axis=1) == gradient[np.arange(len(x)), t]).all()

    @given(finite_rows, st.randoms(use_true_random=False), st.integers(-1000, 1000))
    def test_shift_invariance(self, x, random, shift):
        """Exactly: adding an integer to multiples of 1/1024 is exact."""
        x = np.round(x * 1024) / 1024
        t = np.array([random.randrange(x.shape[1]) for _ in x])
        for eps in (0.0, 0.25):
            options = {"label_smoothing": eps, "reduction": "sum"}
            np.testing.assert_array_equal(cross_entropy(x, t, **options)[1], cross_entropy(x + shift, t, **options)[1])

    @given(finite_rows, st.randoms(use_true_random=False), st.floats(0, 1))
    def test_smoothed_targets_are_probabilities(self, x, random, eps):
        t = np.array([random.randrange(x.shape[1]) for _ in x])
        y = (1 - eps) * np.eye(x.shape[1])[t] + eps / x.shape[1]
        np.testing.assert_allclose(
            cross_entropy(x, t, label_smoothing=eps)[1], cross_entropy(x, y)[1], rtol=1e-12, atol=1e-14
        )


# ---------------------------------------------------------------------------------------- layouts, dtypes, bits


@pytest.mark.parametrize("shape", [(9, 7), (12, 40), (40, 16), (64, 32), (4, 5, 3), (3, 19, 4, 5)], ids=shape_id)
def test_every_layout(rng, shape, layout):
    """The bits of C order, the memory order of the input, nothing written to."""
    x, t, w, upstream = make_problem(rng, shape)
    y = normalized(rng.random(shape))
    options = {"weight": w, "reduction": "none", "grad_output": upstream}
    for function, target, extra in (
        (cross_entropy, t, {}),
        (cross_entropy, t, {"label_smoothing": 0.1}),
        (cross_entropy, y, {}),
        (nll_loss, t, {}),
    ):
        value, gradient = function(x, target, **options, **extra)
        moved = layout(x)
        got_value, got = function(moved, layout(target), **{**options, "grad_output": layout(upstream)}, **extra)
        np.testing.assert_array_equal(got_value, value)
        np.testing.assert_array_equal(got, gradient, strict=True)
        if layout.name not in ("sliced", "cropped", "reversed", "reversed_rows"):
            order = lambda a: sorted(range(a.ndim), key=lambda k: -abs(a.strides[k]))
            assert order(got) == order(moved)
        assert got.size * got.itemsize == got.nbytes
        assert got.flags.writeable
    options = {"reduction": "none", "grad_output": rng.normal(size=shape)}
    value, gradient = kl_div(x, y, **options)
    got_value, got = kl_div(layout(x), layout(y), **options)
    np.testing.assert_array_equal(got_value, value)
    np.testing.assert_array_equal(got, gradient, strict=True)


@pytest.mark.parametrize("shape", [(9, 7), (12, 40)], ids=shape_id)
def test_halves_and_integers(rng, shape):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, t, _, _ = make_problem(rng, shape)
    y = normalized(rng.random(shape))
    for narrow, wide in ((np.float16, np.float32), (ml_dtypes.bfloat16, np.float32), (np.int16, np.float64)):
        logits = x.astype(narrow)
        for target in (t, t.astype(np.int8)):
            value, gradient = cross_entropy(logits, target)
            expected_value, expected = cross_entropy(logits.astype(wide), target)
            assert value == expected_value
            np.testing.assert_array_equal(gradient, expected, strict=True)
            assert gradient.dtype == wide
    assert cross_entropy(x.astype(np.float32), y)[1].dtype == np.float64


def test_what_is_no_array(rng):
    x = [[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]]
    value, gradient = cross_entropy(x, [2, 1])
    assert value == fastloss.cross_entropy(x, [2, 1])
    np.testing.assert_array_equal(gradient, cross_entropy(np.array(x), np.array([2, 1]))[1])
    assert isinstance(value, np.float64)


@pytest.mark.parametrize("n_classes", [3, 7, 10, 40, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bits_of_a_row_alone(rng, n_classes, dtype):
    x, t, w, upstream = make_problem(rng, (70, n_classes), dtype)
    for target, eps in ((t, 0.0), (t, 0.1), (normalized(rng.random(x.shape)).astype(dtype), 0.0)):
        options = {"weight": w, "label_smoothing": eps, "reduction": "none"}
        gradient = cross_entropy(x, target, grad_output=upstream, **options)[1]
        assert gradient.any()
        for i in (0, 1, 20, 69):
            alone = cross_entropy(x[i], target[i], grad_output=upstream[i], **options)[1]
            np.testing.assert_array_equal(alone, gradient[i])
        few = cross_entropy(x[5:40], target[5:40], grad_output=upstream[5:40], **options)[1]
        np.testing.assert_array_equal(few, gradient[5:40])


@pytest.mark.parametrize("n_classes", [5, 40, 300, 600])
@pytest.mark.parametrize("n_rows", [9, 40])
@pytest.mark.parametrize("layout", ["planes", "skipping planes", "skipping classes"])
def test_the_bits_of_a_row_in_planes(rng, n_classes, n_rows, layout):
    """Beyond a block of classes the terms are kept in the gradient itself. Some targets lie far below the maximum."""
    x, t, w, _ = make_problem(rng, (n_rows, n_classes), np.float32)
    x[::4, :3] += 60
    shape = {"planes": (n_classes, n_rows), "skipping planes": (n_classes, 2 * n_rows)}
    room = np.full(shape.get(layout, (n_rows, 2 * n_classes)), NAN, np.float32)
    view = {"planes": room.T, "skipping planes": room.T[::2], "skipping classes": room[:, ::2]}[layout]
    view[:] = x
    gradient = cross_entropy(view, t, w, reduction="sum")[1]
    for i in range(n_rows):
        np.testing.assert_array_equal(cross_entropy(x[i], t[i], w, reduction="sum")[1], gradient[i])


@pytest.mark.parametrize("n_pixels", [1 << 19, (1 << 19) + 24])
def test_large_planes(rng, n_pixels):
    """The entries that are written past the caches, and those at the planes' ends, have the bits of small pieces."""
    x = rng.standard_normal((2, 5, n_pixels), np.float32)
    t = rng.integers(-1, 5, (2, n_pixels))
    gradient = cross_entropy(x, t, ignore_index=-1, reduction="sum")[1]
    assert gradient.shape == x.shape
    assert gradient.flags.c_contiguous
    for piece in np.array_split(np.arange(n_pixels), 4):
        alone = cross_entropy(x[..., piece], t[..., piece], ignore_index=-1, reduction="sum")[1]
        np.testing.assert_array_equal(gradient[..., piece], alone)


@pytest.mark.parametrize("shape", [(9, 7), (12, 40), (2, 33, 3, 4)], ids=shape_id)
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_ignored_rows_are_zero_whatever_they_hold(rng, shape, eps):
    x, t, w, _ = make_problem(rng, shape)
    rows = np.moveaxis(x, 1, -1)
    for bad in (NAN, INF, -INF):
        rows[t == -100] = bad
        for weight in (None, w):
            gradient = cross_entropy(x, t, weight, label_smoothing=eps)[1]
            assert (np.moveaxis(gradient, 1, -1)[t == -100] == 0).all()
            assert np.isfinite(gradient).all()


SCRIPT = """
import hashlib, json
import numpy as np, numba
import fastloss

rng = np.random.default_rng(7)
f, kl = fastloss.value_and_grad(fastloss.cross_entropy), fastloss.value_and_grad(fastloss.kl_div)
nll = fastloss.value_and_grad(fastloss.nll_loss)
rows = (rng.normal(size=(3001, 100)) * 5).astype(np.float32)
few = (rng.normal(size=(30011, 5)) * 5).astype(np.float32)
images = (rng.normal(size=(2, 19, 61, 67)) * 5).astype(np.float32)
t_rows, t_few = rng.integers(0, 100, len(rows)), rng.integers(0, 5, len(few))
t_images, weight = rng.integers(0, 19, (2, 61, 67)), rng.random(100)
t_rows[::7] = -100

def results():
    yield f(rows, t_rows, weight)
    yield f(few, t_few)
    yield f(images, t_images)
    yield nll(rows, t_rows, weight)
    yield kl(rows, np.abs(rows), reduction="batchmean")
    yield kl(rows[:1], np.abs(rows), reduction="batchmean")

def hashes():
    return [hashlib.sha256(np.asarray(r).tobytes()).hexdigest() for pair in results() for r in pair]

first = hashes()
assert hashes() == first, "another run, other bits"
print(json.dumps([numba.get_num_threads(), first]))
"""


def test_any_number_of_threads():
    found = []
    for n_threads in (1, 2, 4):
        environment = {**os.environ, "NUMBA_NUM_THREADS": str(n_threads)}
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=550, check=False
        )
        assert result.returncode == 0, result.stderr
        used, hashes = json.loads(result.stdout)
        assert used == n_threads
        found.append(hashes)
    assert len(found[0]) == 12
    assert found[0] == found[1] == found[2]


MEMORY = """
import ctypes
from pathlib import Path
import numpy as np
import fastloss

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) / 1024

f = fastloss.value_and_grad(fastloss.cross_entropy)
for view in (lambda a: a, lambda a: np.moveaxis(a, -1, 1), lambda a: a.astype(">f4")):
    large = view(np.ones((10, 300, 60, 200), np.float32))
    target = np.zeros((large.shape[0], *large.shape[2:]), np.int64)
    f(large, target)  # compiles every kernel that the second call takes
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _, gradient = f(large, target)
    print(status("VmHWM") - before - gradient.nbytes / 2**20)
    del large, target, gradient
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_nothing_beyond_the_gradient_is_allocated():
    """137 MiB of logits in three layouts, within what benchmarks/memory.py allows (8 MiB)."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=550, check=True)
    assert [float(line) < 8 for line in result.stdout.split()] == [True] * 3, result.stdout


# ---------------------------------------------------------------------------------------------------- interface


class TestInterface:
    @pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "kl_div"])
    def test_signature(self, name):
        loss = getattr(fastloss, name)
        parameters = list(inspect.signature(value_and_grad(loss)).parameters.values())
        assert parameters[:-1] == list(inspect.signature(loss).parameters.values())
        assert (parameters[-1].name, parameters[-1].kind) == ("grad_output", inspect.Parameter.KEYWORD_ONLY)

    @pytest.mark.parametrize(
        "module",
        [
            fastloss.CrossEntropyLoss([1.0, 2.0, 0.5], label_smoothing=0.1),
            fastloss.CrossEntropyLoss(ignore_index=1, reduction="sum"),
            fastloss.NLLLoss([1.0, 2.0, 0.5], ignore_index=0),
        ],
        ids=str,
    )
    def test_modules(self, rng, module):
        x, t = rng.normal(size=(9, 3)), np.arange(9) % 3
        value, gradient = value_and_grad(module)(x, t)
        assert value == module(x, t)
        function = cross_entropy if isinstance(module, fastloss.CrossEntropyLoss) else nll_loss
        np.testing.assert_array_equal(gradient, function(x, t, **vars(module))[1])

    def test_kl_module(self, rng):
        x, y = rng.normal(size=(9, 3)), rng.random((9, 3))
        module = fastloss.KLDivLoss(reduction="batchmean", log_target=True)
        value, gradient = value_and_grad(module)(x, y)
        assert value == module(x, y)
        np.testing.assert_allclose(gradient, -np.exp(y) / 9, rtol=1e-14)

    def test_kl_mean_warns(self):
        for function in (kl_div, value_and_grad(fastloss.KLDivLoss())):
            with pytest.warns(UserWarning, match="batchmean") as record:
                function(np.zeros(3), np.ones(3))
            assert record[0].filename == __file__

    def test_the_deprecated_pair(self):
        x, t = np.zeros((2, 3)), np.array([0, 2])
        with pytest.warns(UserWarning, match="deprecated"):
            _, gradient = cross_entropy(x, t, size_average=False)
        np.testing.assert_array_equal(gradient, cross_entropy(x, t, reduction="sum")[1])

    @pytest.mark.parametrize(
        "loss", [fastloss.softmax, fastloss.CrossEntropyLoss, fastloss.Softmax(), None, "nll_loss"]
    )
    def test_other_losses_are_refused(self, loss):
        with pytest.raises(TypeError, match="loss: got"):
            value_and_grad(loss)

    def test_grad_output(self):
        x, t = np.zeros((2, 3)), np.array([0, 2])
        with pytest.raises(ValueError, match=r"grad_output: got None for a loss of shape \(2,\)"):
            cross_entropy(x, t, reduction="none")
        with pytest.raises(ValueError, match=r"grad_output: got shape \(3,\), expected that of the loss, \(2,\)"):
            cross_entropy(x, t, reduction="none", grad_output=np.ones(3))
        with pytest.raises(ValueError, match=r"expected that of the loss, \(\)"):
            nll_loss(x, t, grad_output=np.ones(2))
        with pytest.raises(TypeError, match="grad_output: got dtype complex128"):
            kl_div(x, x, reduction="sum", grad_output=1j)
        for function, target in ((cross_entropy, t), (nll_loss, t), (kl_div, np.ones((2, 3)))):
            once, thrice = function(x, target)[1], function(x, target, grad_output=3)[1]
            np.testing.assert_allclose(thrice, 3 * once, rtol=1e-15)
        one = cross_entropy(x[:1], t[:1], reduction="none")[1]
        np.testing.assert_array_equal(one, cross_entropy(x[:1], t[:1], reduction="sum")[1])

    def test_errors_are_those_of_the_losses(self):
        x, t = np.zeros((2, 3)), np.array([0, 2])
        for reduction in REDUCTIONS:
            for function in (cross_entropy, nll_loss):
                with pytest.raises(IndexError, match=r"target: got 3 at 1, expected a class in \[0, 2\]"):
                    function(x, np.array([0, 3]), reduction=reduction, **upstream_for(reduction, np.ones(2)))
        with pytest.raises(ValueError, match="reduction: got 'max'"):
            cross_entropy(x, t, reduction="max")
        with pytest.raises(ValueError, match="target: got shape"):
            cross_entropy(x, t[:1])
        with pytest.raises(ValueError, match="ignore_index"):
            cross_entropy(x, x, ignore_index=1)
        with pytest.raises(ValueError, match="broadcasts"):
            kl_div(x, np.zeros(2))
