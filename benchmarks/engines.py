"""fastloss and its peers: per engine one small function for each operation of the regimes of `cases.py`.

An engine turns a regime and its NumPy arrays into a call without arguments. Whatever prepares the data (tensors, device
arrays) happens before; what compiles, compiles at the first call. As `compare.py --worker ENGINE` it answers one JSON
line per command: prepare (make the inputs, compute, tell some statistics of the value), calibrate, measure, free,
accuracy, or memory.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import sys
import time
import tracemalloc

import numpy as np
from cases import REGIMES, Regime
from common import IGNORED, Inputs

HALVES = ("float16", "bfloat16")
SMALLEST_MEASUREMENT = 4e-3  # seconds: shorter calls are repeated
LATENCY_CALLS = 2000
SLOW_CALL = 0.1  # seconds: longer calls are not preceded by untimed ones
# Seconds of untimed calls, where so many or more are timed: after a pause, two threads of GNU OpenMP may wake up on one
# CPU, where the one waits for the other, and take some 10 ms to part (in PyTorch, Numba and so fastloss alike). Longer
# calls are preceded by one, which leaves less of the inputs in the caches.
WARM_UP, SHORT_CALLS = 0.02, 8
SMALL_INPUT = 100_000  # scores up to which a call may take less memory than the process does besides

# Accuracy: rows whose losses spread from 1e-12 to 1e-6, the probability of the true class being nearly 1.
CONFIDENT_CLASSES = (10, 1000)
CONFIDENT_ROWS = 1000
ROWS_ONE_BY_ONE = 100  # where an engine has no losses per row


def _loss_options(regime, weight):
    """The keyword arguments that fastloss and PyTorch share: only those that are not the default."""
    options = {}
    if regime.reduction != "mean":
        options["reduction"] = regime.reduction
    if weight is not None:
        options["weight"] = weight
    if regime.smoothing:
        options["label_smoothing"] = regime.smoothing
    if regime.log_target:
        options["log_target"] = True
    return options


# ------------------------------------------------------------------------------------------------- engines


class Fastloss:
    packages = ("fastloss", "numba", "llvmlite")

    def __init__(self, n_threads):
        import numba

        import fastloss.metrics

        numba.set_num_threads(n_threads)
        self.library = fastloss

    def _loss(self, function, regime, logits, target, weight=None):
        return functools.partial(function, logits, target, **_loss_options(regime, weight))

    def cross_entropy(self, regime, **arrays):
        return self._loss(self.library.cross_entropy, regime, **arrays)

    probabilities = cross_entropy

    def nll(self, regime, **arrays):
        return self._loss(self.library.nll_loss, regime, **arrays)

    def kl(self, regime, **arrays):
        return self._loss(self.library.kl_div, regime, **arrays)

    def logsumexp(self, regime, logits):
        return functools.partial(self.library.logsumexp, logits, axis=regime.axis)

    def softmax(self, regime, logits):
        return functools.partial(self.library.softmax, logits, axis=regime.axis)

    def log_softmax(self, regime, logits):
        return functools.partial(self.library.log_softmax, logits, axis=regime.axis)

    def value_and_grad(self, regime, **arrays):
        return self._loss(self.library.value_and_grad(self.library.cross_entropy), regime, **arrays)

    def log_loss(self, regime, y, scores, **weights):
        return functools.partial(getattr(self.library.metrics, regime.operation), y, scores, **weights)

    log_loss_from_logits = brier_score_from_logits = top_k_accuracy_from_logits = log_loss

    def numpy(self, result):
        return np.asarray(result)

    def free(self):
        pass


class Torch:
    packages = ("torch",)

    def __init__(self, n_threads):
        import torch

        torch.set_num_threads(n_threads)
        self.torch = torch
        self.functions = torch.nn.functional
        self.enter()

    def enter(self):
        self.without_gradients = self.torch.inference_mode()
        self.without_gradients.__enter__()

    def tensor(self, array):
        if array is None:
            return None
        if array.dtype.name == "bfloat16":
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array) if array.ndim else self.torch.tensor(array)

    def call(self, function, *tensors, **options):
        return functools.partial(function, *tensors, **options)

    def _loss(self, function, regime, logits, target, weight=None):
        options = _loss_options(regime, self.tensor(weight))
        if regime.dtype in HALVES and regime.reduction == "mean":
            # the half-precision mean overflows over many rows: a float32 mean of the losses, as fastloss's result is
            narrow, options = function, options | {"reduction": "none"}
            function = lambda *tensors, **options: narrow(*tensors, **options).float().mean()
        return self.call(function, self.tensor(logits), self.tensor(target), **options)

    def cross_entropy(self, regime, **arrays):
        return self._loss(self.functions.cross_entropy, regime, **arrays)

    probabilities = cross_entropy

    def nll(self, regime, **arrays):
        return self._loss(self.functions.nll_loss, regime, **arrays)

    def kl(self, regime, **arrays):
        return self._loss(self.functions.kl_div, regime, **arrays)

    def logsumexp(self, regime, logits):
        return self.call(self.torch.logsumexp, self.tensor(logits), dim=regime.axis)

    def softmax(self, regime, logits):
        return self.call(self.functions.softmax, self.tensor(logits), dim=regime.axis)

    def log_softmax(self, regime, logits):
        return self.call(self.functions.log_softmax, self.tensor(logits), dim=regime.axis)

    def value_and_grad(self, regime, logits, target):
        torch = self.torch
        with torch.inference_mode(False):
            x, y = self.tensor(logits).requires_grad_(), self.tensor(target)
            loss = self.differentiable(regime)

        def call():
            with torch.inference_mode(False), torch.enable_grad():
                x.grad = None
                value = loss(x, y)
                value.backward()
                return value.detach(), x.grad

        return call

    def differentiable(self, regime):
        return functools.partial(self.functions.cross_entropy, **_loss_options(regime, None))

    def numpy(self, result):
        return result.double().numpy()

    def free(self):
        pass


class Inductor(Torch):
    """The same functions under torch.compile."""

    def enter(self):
        self.without_gradients = self.torch.no_grad()
        self.without_gradients.__enter__()

    def call(self, function, *tensors, **options):
        compiled = self.torch.compile(lambda *inputs: function(*inputs, **options), dynamic=False)
        return functools.partial(compiled, *tensors)

    def differentiable(self, regime):
        return self.torch.compile(super().differentiable(regime), dynamic=False)

    def free(self):
        self.torch._dynamo.reset()


class Xla:
    """jax.jit on the CPU; halves are computed in float32, as is customary and as the result of fastloss is."""

    packages = ("jax", "jaxlib")

    def __init__(self, n_threads):
        import jax

        self.jax = jax

    def call(self, regime, function, *arrays):
        jax = self.jax
        jax.config.update("jax_enable_x64", regime.dtype == "float64")
        compiled = jax.jit(function)
        inputs = [jax.device_put(array) for array in arrays]
        return lambda: jax.block_until_ready(compiled(*inputs))

    def _wide(self, x):
        return x if x.dtype.itemsize > 2 else x.astype(np.float32)

    def _in_memory(self, regime, logits):
        return np.moveaxis(logits, 1, -1) if regime.channels_last else logits

    def _picked(self, regime, losses, target, weight):
        """Reduce the losses of the rows with class indices."""
        jnp = self.jax.numpy
        if weight is None:
            return losses.mean() if regime.reduction == "mean" else losses
        kept = target != IGNORED
        weights = jnp.where(kept, weight[jnp.where(kept, target, 0)], 0)
        losses = jnp.where(kept, losses * weights, 0)
        return losses.sum() / weights.sum() if regime.reduction == "mean" else losses

    def _cross_entropy(self, regime):
        jax, axis = self.jax, regime.memory_axis

        def function(x, t, w=None):
            x = self._wide(x)
            places = self.jax.numpy.expand_dims(t if w is None else jax.numpy.where(t == IGNORED, 0, t), axis)
            log_sum = jax.nn.logsumexp(x, axis=axis)
            losses = log_sum - self.jax.numpy.take_along_axis(x, places, axis=axis).squeeze(axis)
            if regime.smoothing:
                losses = (1 - regime.smoothing) * losses + regime.smoothing * (log_sum - x.mean(axis))
            return self._picked(regime, losses, t, w)

        return function

    def cross_entropy(self, regime, logits, target, weight=None):
        inputs = [self._in_memory(regime, logits), target.astype(np.int32)] + [weight] * (weight is not None)
        return self.call(regime, self._cross_entropy(regime), *inputs)

    def _probabilities(self, x, y):
        return -(y * self.jax.nn.log_softmax(x, axis=1)).sum(axis=1).mean()

    def probabilities(self, regime, logits, target):
        return self.call(regime, self._probabilities, logits, target)

    def value_and_grad(self, regime, logits, target):
        if regime.probabilities:
            return self.call(regime, self.jax.value_and_grad(self._probabilities), logits, target)
        loss = self.jax.value_and_grad(self._cross_entropy(regime))
        return self.call(regime, loss, logits, target.astype(np.int32))

    def nll(self, regime, logits, target):
        def function(x, t):
            return -self.jax.numpy.take_along_axis(x, t[:, None], axis=1).mean()

        return self.call(regime, function, logits, target.astype(np.int32))

    def kl(self, regime, logits, target):
        jax = self.jax

        def function(x, y):
            if regime.log_target:
                return (jax.numpy.exp(y) * (y - x)).sum() / len(x)
            return (jax.scipy.special.xlogy(y, y) - y * x).sum() / len(x)

        return self.call(regime, function, logits, target)

    def logsumexp(self, regime, logits):
        return self.call(regime, lambda x: self.jax.nn.logsumexp(x, axis=regime.axis), logits)

    def softmax(self, regime, logits):
        return self.call(regime, lambda x: self.jax.nn.softmax(x, axis=regime.axis), logits)

    def log_softmax(self, regime, logits):
        return self.call(regime, lambda x: self.jax.nn.log_softmax(x, axis=regime.axis), logits)

    def numpy(self, result):
        return np.asarray(result)

    def free(self):
        self.jax.clear_caches()


class Scipy:
    """scipy.special, and NumPy for what it leaves over. Not for halves."""

    packages = ("scipy",)

    def __init__(self, n_threads):
        import scipy.special

        self.special = scipy.special

    def cross_entropy(self, regime, logits, target, weight=None):
        if logits.dtype.itemsize == 2 or regime.smoothing:
            return None
        axis = regime.memory_axis if logits.ndim == 1 else 1

        def call():
            places = target if weight is None else np.where(target == IGNORED, 0, target)
            log_probabilities = self.special.log_softmax(logits, axis=axis)
            losses = -np.take_along_axis(log_probabilities, np.expand_dims(places, axis), axis=axis).squeeze(axis)
            if weight is None:
                return losses.mean() if regime.reduction == "mean" else losses
            weights = np.where(target == IGNORED, np.float32(0), weight[places])
            losses *= weights
            return losses.sum() / weights.sum() if regime.reduction == "mean" else losses

        return call

    def probabilities(self, regime, logits, target):
        return lambda: -(target * self.special.log_softmax(logits, axis=1)).sum(axis=1).mean()

    def nll(self, regime, logits, target):
        return lambda: -np.take_along_axis(logits, target[:, None], axis=1).mean()

    def kl(self, regime, logits, target):
        def call():
            y = np.exp(target) if regime.log_target else target
            return self.special.rel_entr(y, np.exp(logits)).sum() / len(logits)

        return call

    def logsumexp(self, regime, logits):
        return lambda: self.special.logsumexp(logits, axis=regime.axis)

    def softmax(self, regime, logits):
        return lambda: self.special.softmax(logits, axis=regime.axis)

    def log_softmax(self, regime, logits):
        return lambda: self.special.log_softmax(logits, axis=regime.axis)

    def numpy(self, result):
        return np.asarray(result)

    def free(self):
        pass


class Sklearn(Scipy):
    """sklearn.metrics.log_loss of scipy.special.softmax, where that is the loss; and its metrics, which take softmax
    for logits (but for top-k accuracy, which only asks for their order).
    """

    packages = ("scikit-learn",)
    probabilities = nll = kl = logsumexp = softmax = log_softmax = None

    def __init__(self, n_threads):
        super().__init__(n_threads)
        import sklearn.metrics

        self.metrics = sklearn.metrics

    def cross_entropy(self, regime, logits, target, weight=None):
        if regime.reduction != "mean" or regime.smoothing or logits.ndim != 2 or logits.dtype.itemsize == 2:
            return None
        labels = np.arange(regime.n_classes)

        def call():
            weights = places = None
            if weight is not None:
                places = np.where(target == IGNORED, 0, target)
                weights = np.where(target == IGNORED, 0, weight[places])
            shares = self.special.softmax(logits, axis=1)
            return self.metrics.log_loss(
                target if places is None else places, shares, sample_weight=weights, labels=labels
            )

        return call

    def log_loss(self, regime, y, scores, **weights):
        return functools.partial(self.metrics.log_loss, y, scores, **weights)

    def log_loss_from_logits(self, regime, y, scores):
        return lambda: self.metrics.log_loss(y, self.special.softmax(scores, axis=1))

    def brier_score_from_logits(self, regime, y, scores):
        return lambda: self.metrics.brier_score_loss(y, self.special.softmax(scores, axis=1))

    def top_k_accuracy_from_logits(self, regime, y, scores):
        return functools.partial(self.metrics.top_k_accuracy_score, y, scores)


class Roofline:
    """A sum over the bytes of every input, the ignored rows included: nothing that reads them from memory is faster.

    The words are added as integers, whose order is the compiler's to choose: it takes wide vectors, several at a time.
    """

    packages = ("numba",)
    n_pieces = 64
    nll = None  # reads one entry of each row

    def __init__(self, n_threads):
        import numba

        numba.set_num_threads(n_threads)

        @numba.njit
        def add(words):
            total = np.uint64(0)
            for i in range(words.size):
                total += words[i]
            return total

        @numba.njit(parallel=True)
        def add_all(words, n_pieces):
            length = (words.size + n_pieces - 1) // n_pieces
            total = np.uint64(0)
            for k in numba.prange(n_pieces):
                total += add(words[k * length : (k + 1) * length])
            return total

        self.add_all = add_all

    @staticmethod
    def _words(array, axis_order):
        flat = np.moveaxis(array, 1, -1) if axis_order == "channels last" else array
        flat = flat.reshape(-1).view(np.uint8)
        return flat[: flat.size // 8 * 8].view(np.uint64)

    def cross_entropy(self, regime, logits, target=None, weight=None):
        if regime.latency:
            return None
        inputs = [self._words(logits, "channels last" if regime.channels_last else "")]
        if target is not None:
            inputs.append(self._words(target, ""))
        return lambda: [self.add_all(words, self.n_pieces) for words in inputs]

    probabilities = kl = logsumexp = softmax = log_softmax = cross_entropy

    def numpy(self, result):
        return None

    def free(self):
        pass


ENGINES = {
    "fastloss": Fastloss,
    "torch": Torch,
    "inductor": Inductor,
    "xla": Xla,
    "scipy": Scipy,
    "sklearn": Sklearn,
    "roofline": Roofline,
}


def versions(engine):
    """The versions of an engine's packages; None if one of them is missing."""
    try:
        return {name: importlib.metadata.version(name) for name in ENGINES[engine].packages}
    except importlib.metadata.PackageNotFoundError:
        return None


# -------------------------------------------------------------------------------------------------- worker


def _statistics(values):
    """What is compared of a result: its size, its sum in float64, its first and its last entry."""
    if values is None:
        return None
    values = np.asarray(values)
    flat = values.reshape(-1)
    total = flat.sum(dtype=np.float64)
    return {"size": flat.size, "sum": float(total), "first": float(flat[0]), "last": float(flat[-1])}


class Worker:
    """One engine and the data of one shape and dtype, which regimes in a row share."""

    def __init__(self, name, n_threads):
        self.engine = ENGINES[name](n_threads)
        self.function = None
        self.data = self.inputs = None

    def _arrays(self, regime):
        if self.data != regime.data:
            self.inputs = None  # (before the next are made)
            self.data, self.inputs = regime.data, Inputs(*regime.data)
        return regime.arrays(self.inputs)

    def _function(self, regime):
        """The call; None if the engine has none."""
        operation = getattr(self.engine, regime.operation, None)
        return operation and operation(regime, **self._arrays(regime))

    def _numpy(self, result):
        """The result as an array: of a value and its gradient, the value and the gradient's norm."""
        if not isinstance(result, tuple):
            return self.engine.numpy(result)
        value, gradient = map(self.engine.numpy, result)
        pieces = np.array_split(gradient.reshape(-1), 1 + gradient.size // 65_536)
        return np.array([value, sum(float(np.dot(p, p)) for p in pieces) ** 0.5])

    def prepare(self, regime, tiny):
        """Make the inputs and compute: the statistics of the value. (Other engines may be at it at the same time.)"""
        chosen = REGIMES[regime].tiny() if tiny else REGIMES[regime]
        self.function = self._function(chosen)
        if self.function is None:
            return {"unsupported": True}
        return {"value": _statistics(self._numpy(self.function()))}

    def calibrate(self, regime, tiny):
        """The time of one call, and how often it is to be repeated."""
        seconds = self.measure(1)["seconds"]
        if seconds < SLOW_CALL and not tiny:
            seconds = min(seconds, *(self.measure(1)["seconds"] for _ in range(3)))
        repeats = LATENCY_CALLS if REGIMES[regime].latency else max(1, round(SMALLEST_MEASUREMENT / seconds))
        return {"seconds": seconds, "repeats": 1 if tiny else repeats}

    def measure(self, repeats, warm=False):
        """Seconds per call; `warm` asks for untimed calls before."""
        function = self.function
        ready = time.perf_counter() + (WARM_UP if repeats >= SHORT_CALLS else 0)
        while warm:
            function()
            warm = time.perf_counter() < ready
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        return {"seconds": (time.perf_counter() - begin) / repeats}

    def memory(self, regime, tiny=False):
        """The peak in MiB of one call beyond its inputs, after a smaller one."""
        import memory

        if sys.platform != "linux":
            return {"unsupported": True}
        chosen = REGIMES[regime].tiny() if tiny else REGIMES[regime]
        rows, n_classes = chosen.shape
        smaller = dataclasses.replace(chosen, shape=(min(rows, max(rows // 10, 1000, n_classes)), n_classes))
        warm_up = self._function(smaller)
        if warm_up is None:
            return {"unsupported": True}
        for _ in range(3):
            warm_up()
        del warm_up
        call = self._function(chosen)
        if rows * n_classes > SMALL_INPUT:
            return {"peak_mib": memory.peak_growth(call)[1]}
        # A few pages, among which the process touches others: what NumPy and Numba asked for.
        tracemalloc.start()
        call()
        asked = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        return {"peak_mib": asked}

    def free(self):
        """Forget what was compiled and prepared; the inputs stay for the next regime."""
        self.function = None
        self.engine.free()
        gc.collect()
        return {}

    def accuracy(self, n_classes, tiny=False):
        """The worst error of the losses of confident float32 predictions, in ulp of the exact value."""
        import accuracy

        rng = np.random.default_rng([0, n_classes])
        logits, target = accuracy.rows(rng, 10 if tiny else CONFIDENT_ROWS, n_classes, "confident", "float32")
        exact = accuracy.exact_values(logits, target, n_checked=0)["loss"]
        losses = self._losses(logits, target)
        if losses is None:
            return {"unsupported": True}
        exact = exact[: len(losses)]
        seen = exact >= np.finfo(np.float32).tiny
        return {"ulp": float(accuracy.ulp_errors(losses[seen], exact[seen], "float32").max()), "rows": len(losses)}

    def _losses(self, logits, target):
        """One loss per row; row by row where the engine only has means; None where it has none."""
        operation = self.engine.cross_entropy
        regime = Regime("accuracy", "cross_entropy", logits.shape, reduction="none")
        function = operation(regime, logits=logits, target=target)
        if function is not None:
            return np.asarray(self.engine.numpy(function())).astype(np.float32)
        losses = []
        for k in range(min(len(logits), ROWS_ONE_BY_ONE)):
            row = Regime("accuracy", "cross_entropy", (1, logits.shape[1]))
            function = operation(row, logits=logits[k : k + 1], target=target[k : k + 1])
            if function is None:
                return None
            losses.append(float(np.asarray(self.engine.numpy(function()))))
        return np.array(losses, np.float32)


def serve(name, n_threads):
    """Answer commands on standard input until it ends. Whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(name, n_threads)
    gc.disable()  # Worker.free collects
    gc.freeze()
    for line in sys.stdin:
        command = json.loads(line)
        method = getattr(worker, command.pop("do"))
        answer = {}
        try:
            answer = method(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
            with contextlib.suppress(Exception):
                worker.free()
        answers.write(json.dumps(answer) + "\n")
