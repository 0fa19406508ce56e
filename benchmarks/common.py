"""What the measuring programs and the asv suite share: seeded inputs, threads, names that old commits may lack."""

import functools
import importlib
import zlib

import numpy as np

IGNORED = -100
SEED = 2024


def public(name):
    """A public function or class by its name below `fastloss`.

    Raises NotImplementedError, by which asv skips a benchmark, where the installed fastloss has none: asv runs the
    suite of today over the commits of then.
    """
    module, _, attribute = f"fastloss.{name}".rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"no fastloss.{name} here") from error


def use_threads(n_threads):
    """Let Numba run this many threads; NotImplementedError where there are fewer."""
    import numba

    if n_threads > numba.config.NUMBA_NUM_THREADS:
        raise NotImplementedError(f"{numba.config.NUMBA_NUM_THREADS} threads, not {n_threads}")
    numba.set_num_threads(n_threads)


def as_dtype(values, name):
    if name == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(name, copy=False)


def _normalise(values):
    """Logits to log-probabilities, in place."""
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


class Inputs:
    """Arrays of one shape and dtype, the same in every process. Each is made, and so touched, when first asked for.

    `shape` is that of the logits as they are passed; `channels_last` has the class axis innermost in memory.
    """

    def __init__(self, shape, dtype="float32", channels_last=False):
        self.shape = shape
        self.dtype = dtype
        self.channels_last = channels_last
        self.n_classes = shape[min(1, len(shape) - 1)]
        self.row_shape = shape[:-1] if len(shape) == 1 else shape[:1] + shape[2:]

    @staticmethod
    def _rng(what):
        return np.random.default_rng([SEED, zlib.crc32(what.encode())])

    def _normal(self, what, shape):
        return self._rng(what).standard_normal(shape, np.float64 if self.dtype == "float64" else np.float32)

    @functools.cached_property
    def logits(self):
        if self.channels_last:
            normal = np.moveaxis(self._normal("logits", (*self.row_shape, self.n_classes)), -1, 1)
        else:
            normal = self._normal("logits", self.shape)
        return as_dtype(normal, self.dtype)

    @functools.cached_property
    def labels(self):
        labels = np.asarray(self._rng("labels").integers(0, self.n_classes, self.row_shape))
        if labels.size >= self.n_classes:  # every class occurs, as metrics want it
            labels.reshape(-1)[: self.n_classes] = np.arange(self.n_classes)
        return labels

    @functools.cached_property
    def labels_with_ignored(self):
        """A fifth of them ignored."""
        ignored = self._rng("ignored").random(self.row_shape) < 0.2
        return np.where(ignored, IGNORED, self.labels)

    @functools.cached_property
    def weight(self):
        """One per class."""
        return np.linspace(0.5, 2.0, self.n_classes, dtype=np.float32)

    @functools.cached_property
    def sample_weight(self):
        """One per row."""
        return self._rng("sample_weight").random(self.row_shape)

    @functools.cached_property
    def log_probabilities(self):
        return as_dtype(_normalise(self._normal("log_probabilities", self.shape)), self.dtype)

    @functools.cached_property
    def log_targets(self):
        return as_dtype(_normalise(self._normal("targets", self.shape)), self.dtype)

    @functools.cached_property
    def probabilities(self):
        targets = _normalise(self._normal("targets", self.shape))
        return as_dtype(np.exp(targets, out=targets), self.dtype)

    @functools.cached_property
    def names(self):
        """The labels as strings."""
        return np.array([f"class_{c:06d}" for c in range(self.n_classes)])[self.labels]
