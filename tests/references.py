"""Slow references for every function of the library: Python floats row by row, and mpmath where digits are counted.

Nothing of fastloss is imported here, nor torch. The float64 formulas are written so that nothing cancels (the maximum's
own term is taken out of the sum and enters through log1p): they are good to some 1e-15 for float32 data. Where float64
itself is tested, or the last digits are, the ``exact_*`` functions compute with 60 digits.
"""

import itertools
import math

import mpmath
import numpy as np

DIGITS = 60


def total(values):
    """The sum as IEEE arithmetic has it for infinities and NaN, correctly rounded otherwise."""
    values = [float(v) for v in values]
    if any(math.isnan(v) for v in values) or {math.inf, -math.inf} <= set(values):
        return math.nan
    if math.inf in values or -math.inf in values:
        return math.inf if math.inf in values else -math.inf
    return math.fsum(values)


def quotient(a, b):
    """IEEE division."""
    if b:
        return a / b
    return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)


def as_float64(array):
    return np.asarray(array).astype(np.float64)


# ---------------------------------------------------------------------------------------------------- one row


def log_sum_exp_row(row):
    row = [float(v) for v in row]
    if any(math.isnan(v) for v in row):
        return math.nan
    largest = max(row, default=-math.inf)
    if math.isinf(largest):
        return largest
    rest = list(row)
    rest.remove(largest)
    return largest + math.log1p(math.fsum(math.exp(v - largest) for v in rest))


def log_softmax_row(row):
    row = [float(v) for v in row]
    largest = max(row)
    if any(math.isnan(v) for v in row) or math.isinf(largest):
        return [math.nan] * len(row)
    rest = list(row)
    rest.remove(largest)
    log_rest = math.log1p(math.fsum(math.exp(v - largest) for v in rest))
    return [(v - largest) - log_rest for v in row]


def softmax_row(row):
    row = [float(v) for v in row]
    largest = max(row)
    if any(math.isnan(v) for v in row) or math.isinf(largest):
        return [math.nan] * len(row)
    terms = [math.exp(v - largest) for v in row]
    denominator = math.fsum(terms)
    return [term / denominator for term in terms]


def along(function, array, axis):
    """Apply a row function that gives a row along one axis."""
    array = as_float64(array)
    if array.ndim == 0:
        return np.float64(function([float(array)])[0])
    if array.size == 0:
        return array.copy()
    return np.apply_along_axis(lambda row: np.array(function(row)), axis, array)


def softmax(x, axis=-1):
    return along(softmax_row, x, axis)


def log_softmax(x, axis=-1):
    return along(log_softmax_row, x, axis)


def logsumexp(x, axis=None, keepdims=False):
    x = as_float64(x)
    if axis is None:
        axes = tuple(range(x.ndim))
    else:
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        axes = tuple(sorted(a % x.ndim for a in axes)) if x.ndim else ()
    kept = [a for a in range(x.ndim) if a not in axes]
    shape = tuple(x.shape[a] for a in kept)
    rows = np.moveaxis(x, kept, range(len(kept))).reshape(*shape, math.prod(x.shape[a] for a in axes))
    result = np.empty(shape)
    for place in np.ndindex(shape):
        result[place] = log_sum_exp_row(rows[place])
    return np.expand_dims(result, axes) if keepdims else result


# ------------------------------------------------------------------------------------------------------ losses


def _rows(x):
    """Logits with the class axis last."""
    x = as_float64(x)
    return x if x.ndim == 1 else np.moveaxis(x, 1, -1)


def _weights(weight, n_classes):
    return [1.0] * n_classes if weight is None else [float(w) for w in as_float64(weight)]


def _index_reduction(plain, uniform, kept_weights, shape, reduction, label_smoothing):
    """none, sum or mean of (1 - eps) * plain + eps * uniform; the mean divides each of the two, as PyTorch does."""

    def blend(a, b):
        return (1.0 - label_smoothing) * a + label_smoothing * b if label_smoothing else a

    if reduction == "none":
        return np.array([blend(a, b) for a, b in zip(plain, uniform, strict=True)]).reshape(shape)
    if reduction == "sum":
        return total(blend(a, b) for a, b in zip(plain, uniform, strict=True))
    denominator = total(kept_weights)
    if denominator:
        return quotient(total(blend(a, b) for a, b in zip(plain, uniform, strict=True)), denominator)
    return blend(quotient(total(plain), denominator), quotient(total(uniform), denominator))


def cross_entropy(x, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """Cross-entropy with class indices (a list or array of Python-comparable integers)."""
    rows = _rows(x)
    n_classes = rows.shape[-1]
    w = _weights(weight, n_classes)
    target = np.asarray(target)
    plain, uniform, kept_weights = [], [], []
    for place in np.ndindex(target.shape):
        t = int(target[place])
        if t == ignore_index:
            plain.append(0.0)
            uniform.append(0.0)
            continue
        log_p = log_softmax_row(rows[place])
        plain.append(w[t] * -log_p[t])
        if label_smoothing:
            uniform.append(total(w[c] * -log_p[c] for c in range(n_classes)) / n_classes)
        else:
            uniform.append(0.0)
        kept_weights.append(w[t])
    return _index_reduction(plain, uniform, kept_weights, target.shape, reduction, label_smoothing)


def cross_entropy_probabilities(x, y, weight=None, reduction="mean", label_smoothing=0.0):
    """Cross-entropy with class probabilities."""
    rows, goals = _rows(x), _rows(y)
    n_classes = rows.shape[-1]
    w = _weights(weight, n_classes)
    losses = []
    for place in np.ndindex(rows.shape[:-1]):
        log_p = log_softmax_row(rows[place])
        smooth = [float(v) * (1.0 - label_smoothing) + label_smoothing / n_classes for v in goals[place]]
        losses.append(total(-w[c] * smooth[c] * log_p[c] for c in range(n_classes)))
    if reduction == "none":
        return np.array(losses).reshape(rows.shape[:-1])
    return total(losses) if reduction == "sum" else quotient(total(losses), len(losses))


def nll_loss(x, target, weight=None, ignore_index=-100, reduction="mean"):
    rows = _rows(x)
    w = _weights(weight, rows.shape[-1])
    target = np.asarray(target)
    losses, kept_weights = [], []
    for place in np.ndindex(target.shape):
        t = int(target[place])
        if t == ignore_index:
            losses.append(0.0)
        else:
            losses.append(-w[t] * float(rows[place][t]))
            kept_weights.append(w[t])
    if reduction == "none":
        return np.array(losses).reshape(target.shape)
    return total(losses) if reduction == "sum" else quotient(total(losses), total(kept_weights))


def kl_point(x, y, log_target=False):
    """One element of the divergence, with 60 digits where both are finite: the terms may cancel."""
    x, y = float(x), float(y)
    if math.isnan(x) or math.isnan(y):
        return math.nan
    if log_target:
        p = math.exp(y) if y < 700 else math.inf
        if math.isinf(x) or math.isinf(y):
            return p * (y - x)
        with mpmath.workdps(DIGITS):
            return float(mpmath.exp(y) * (mpmath.mpf(y) - mpmath.mpf(x)))
    if y < 0:
        return math.nan
    if y == 0:
        return 0.0 - y * x
    if math.isinf(x) or math.isinf(y):
        return y * math.log(y) - y * x
    with mpmath.workdps(DIGITS):
        return float(mpmath.mpf(y) * (mpmath.log(y) - mpmath.mpf(x)))


def kl_div(x, y, reduction="mean", log_target=False):
    x, y = as_float64(x), as_float64(y)
    shape = np.broadcast_shapes(x.shape, y.shape)
    a, b = np.broadcast_to(x, shape), np.broadcast_to(y, shape)
    values = [kl_point(a[place], b[place], log_target) for place in np.ndindex(shape)]
    if reduction == "none":
        return np.array(values).reshape(shape)
    if reduction == "sum":
        return total(values)
    if reduction == "mean":
        return quotient(total(values), len(values))
    return quotient(total(values), x.shape[0]) if x.ndim else total(values)


# --------------------------------------------------------------------------------------------- with 60 digits


def _exact_exponentials(row):
    values = [mpmath.mpf(float(v)) for v in row]
    largest = max(values)
    return values, largest, [mpmath.exp(v - largest) for v in values]


def exact_losses(rows, targets):
    """-log_softmax(row)[t] of each row as mpmath numbers; finite logits (and -inf, not at the target)."""
    losses = []
    with mpmath.workdps(DIGITS):
        for row, t in zip(rows, targets, strict=True):
            pivot = mpmath.mpf(float(row[t]))
            others = itertools.chain(row[:t], row[t + 1 :])
            rest = mpmath.fsum(mpmath.exp(mpmath.mpf(float(v)) - pivot) for v in others)
            losses.append(mpmath.log1p(rest))
    return losses


def exact_log_softmax(row):
    with mpmath.workdps(DIGITS):
        values, largest, exponentials = _exact_exponentials(row)
        rest = mpmath.fsum(exponentials) - 1
        return [(v - largest) - mpmath.log1p(rest) for v in values]


def exact_softmax(row):
    with mpmath.workdps(DIGITS):
        _, _, exponentials = _exact_exponentials(row)
        denominator = mpmath.fsum(exponentials)
        return [e / denominator for e in exponentials]


def exact_logsumexp(row):
    with mpmath.workdps(DIGITS):
        _, largest, exponentials = _exact_exponentials(row)
        return largest + mpmath.log1p(mpmath.fsum(exponentials) - 1)


# ------------------------------------------------------------------------------------------------------- errors


def relative_error(got, exact):
    """|got - exact| / |exact| of two sequences (exact ones of mpmath numbers), as floats."""
    with mpmath.workdps(DIGITS):
        return [float(abs(mpmath.mpf(float(g)) - e) / abs(e)) for g, e in zip(got, exact, strict=True)]


def ulp_error(got, exact, dtype):
    """|got - exact| in units in the last place of the exact value, in ``dtype``."""
    info = np.finfo(dtype)
    errors = []
    with mpmath.workdps(DIGITS):
        for g, e in zip(got, exact, strict=True):
            if e == 0:
                errors.append(0.0 if float(g) == 0.0 else math.inf)
                continue
            _, exponent = mpmath.frexp(e)
            ulp = mpmath.ldexp(1, max(int(exponent) - 1, int(info.minexp)) - info.nmant)
            errors.append(float(abs(mpmath.mpf(float(g)) - e) / ulp))
    return errors
