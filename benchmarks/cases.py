"""The tables: what the comparison measures, and what the asv suite and the tests call.

`REGIMES` are the rows of `compare.py`, each on the data of a size that matters, with the bars it has to pass. They make
up three tables: the losses, their gradients, and the metrics in scikit-learn's style.
`SIZES` are the regimes of the asv suite, small enough to be run for every commit, and `CASES` what is timed in them:
every public name of fastloss has a row, or tests/test_benchmarks.py fails.
"""

import contextlib
import dataclasses
import functools
import io
import shutil
import tempfile
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

# ---------------------------------------------------------------------------------------------- the comparison


@dataclasses.dataclass(frozen=True)
class Regime:
    """One line of the comparison. `shape` is that of the logits as they are passed."""

    name: str
    operation: str  # the name of a method of the engines
    shape: tuple[int, ...]
    bar: float | None = None  # at least this many times the fastest peer
    roofline_bar: float | None = None  # at least this fraction of the rate at which the inputs can be read
    dtype: str = "float32"
    reduction: str = "mean"
    weighted: bool = False  # class weights, and a fifth of the targets ignored; of metrics: a weight per row
    smoothing: float = 0.0
    log_target: bool = False
    axis: int = 1
    channels_last: bool = False  # the class axis is innermost in memory
    latency: bool = False  # the time of a call itself: against PyTorch eager alone
    probabilities: bool = False  # of gradients: class probabilities, not class indices
    strings: bool = False  # of metrics: labels that are strings, not integers
    table: str = "losses"

    @property
    def n_classes(self):
        return self.shape[min(1, len(self.shape) - 1)]

    @property
    def memory_axis(self):
        """The axis of the classes in the array as it lies in memory."""
        return -1 if self.channels_last else self.axis if len(self.shape) > 1 else 0

    @property
    def data(self):
        """What regimes share that are made from the same arrays: the arguments of `common.Inputs`."""
        return self.shape, self.dtype, self.channels_last

    def arrays(self, inputs):
        """The arguments, as a caller would pass them."""
        if self.operation in ("cross_entropy", "nll"):
            arrays = {"logits": inputs.logits, "target": inputs.labels}
            if self.weighted:
                arrays |= {"target": inputs.labels_with_ignored, "weight": inputs.weight}
            return arrays
        if self.table == "metrics":
            weights = {"sample_weight": inputs.sample_weight} if self.weighted else {}
            scores = inputs.probabilities if self.operation == "log_loss" else inputs.logits
            return {"y": inputs.names if self.strings else inputs.labels, "scores": scores, **weights}
        if self.operation == "probabilities" or self.probabilities:
            return {"logits": inputs.logits, "target": inputs.probabilities}
        if self.operation == "value_and_grad":
            return {"logits": inputs.logits, "target": inputs.labels}
        if self.operation == "kl":
            target = inputs.log_targets if self.log_target else inputs.probabilities
            return {"logits": inputs.log_probabilities, "target": target}
        return {"logits": inputs.logits}

    def tiny(self):
        return dataclasses.replace(self, shape=tiny_shape(self.shape))


def tiny_shape(shape):
    return tuple(min(n, 12) for n in shape)


def _regimes():
    score = functools.partial(Regime, operation="cross_entropy")
    imagenet, medium = (65_536, 1000), (65_536, 500)
    regimes = [
        score("few classes", shape=(1_000_000, 10), bar=2.5),
        score("binary", shape=(5_000_000, 2), bar=4),
        score("a hundred", shape=(200_000, 100), bar=1.5),
        score("ImageNet, mean", shape=imagenet, bar=2, roofline_bar=0.7),
        score("ImageNet, none", shape=imagenet, bar=2, roofline_bar=0.7, reduction="none"),
        score("ImageNet, mean, weighted", shape=imagenet, bar=2, roofline_bar=0.7, weighted=True),
        score("ImageNet, none, weighted", shape=imagenet, bar=2, roofline_bar=0.7, reduction="none", weighted=True),
        score("vocabulary", shape=(1024, 128_256), bar=2, roofline_bar=0.85),
        score("one token, 1", shape=(1, 128_256), bar=1.8),
        score("one token, 8", shape=(8, 50_257), bar=1.8),
        score("label smoothing", shape=imagenet, bar=1.8, roofline_bar=0.6, smoothing=0.1),
        Regime("probability targets", "probabilities", imagenet, bar=1.5, roofline_bar=0.6),
        score("segmentation, 21", shape=(8, 21, 512, 512), bar=2, roofline_bar=0.4),
        score("segmentation, 150", shape=(4, 150, 128, 128), bar=2, roofline_bar=0.4),
        score("volume", shape=(2, 5, 96, 128, 128), bar=5),
        score("channels last", shape=(8, 21, 512, 512), bar=2, channels_last=True),
        score("float16, 1000", shape=imagenet, bar=2, dtype="float16"),
        score("float16, vocabulary", shape=(1024, 128_256), bar=2, dtype="float16"),
        score("bfloat16, 1000", shape=imagenet, bar=2, dtype="bfloat16"),
        score("bfloat16, vocabulary", shape=(1024, 128_256), bar=2, dtype="bfloat16"),
        score("float64", shape=medium, bar=1.8, dtype="float64"),
        Regime("NLL", "nll", (400_000, 100), bar=1.2),
        Regime("KL", "kl", medium, bar=1.4, roofline_bar=0.6, reduction="batchmean"),
        Regime("KL, log target", "kl", medium, bar=1.0, roofline_bar=0.75, reduction="batchmean", log_target=True),
        Regime("log-sum-exp, last axis", "logsumexp", imagenet, bar=2, roofline_bar=0.7),
        Regime("log-sum-exp, axis 0", "logsumexp", imagenet, bar=2, roofline_bar=0.7, axis=0),
        Regime("softmax", "softmax", medium, bar=2),
        Regime("log_softmax", "log_softmax", medium, bar=2),
        score("latency, 1 row", shape=(10,), bar=1.5, latency=True),
        score("latency, 32 rows", shape=(32, 10), bar=2.5, latency=True),
        score("latency, 64 rows", shape=(64, 1000), bar=1.5, latency=True),
        score("between, 7 classes", shape=(1_000_000, 7)),
        score("between, 33 classes", shape=(500_000, 33)),
        score("between, 257 classes", shape=(65_537, 257)),
        score("between, 4097 classes", shape=(8191, 4097)),
        score("between, 3 rows", shape=(3, 100_003)),
        score("between, odd pixels", shape=(3, 21, 383, 511)),
    ]
    return [*regimes, *_gradients(), *_metrics()]


def _gradients():
    gradient = functools.partial(Regime, operation="value_and_grad", table="gradients")
    imagenet = (65_536, 1000)
    return [
        gradient("gradient, ImageNet", shape=imagenet, bar=2),
        gradient("gradient, few classes", shape=(1_000_000, 10), bar=2),
        gradient("gradient, vocabulary", shape=(1024, 128_256), bar=2),
        gradient("gradient, segmentation", shape=(8, 21, 512, 512), bar=2),
        gradient("gradient, label smoothing", shape=imagenet, bar=1.5, smoothing=0.1),
        gradient("gradient, probabilities", shape=imagenet, bar=1.5, probabilities=True),
    ]


def _metrics():
    for shape in ((1_000_000, 10), (100_000, 100), (1000, 10)):
        size = f"{shape[0]} x {shape[1]}"
        bar = 5 if shape[0] == 1000 else 15
        for dtype in ("float32", "float64"):
            for strings in (False, True):
                for weighted in (False, True):
                    name = f"log_loss, {'strings' if strings else 'integers'}{', weights' * weighted}, {size} {dtype}"
                    yield Regime(
                        name, "log_loss", shape, 3 if strings else bar, None, dtype,
                        weighted=weighted, strings=strings, table="metrics",
                    )  # fmt: skip
        for metric in ("log_loss_from_logits", "brier_score_from_logits", "top_k_accuracy_from_logits"):
            yield Regime(f"{metric}, {size} float32", metric, shape, bar, table="metrics")


TABLES = ("losses", "gradients", "metrics")
REGIMES = {regime.name: regime for regime in _regimes()}


def in_running_order(regimes):
    """Regimes of the same data one after the other, so that each engine makes it once."""
    first = {}
    for place, regime in enumerate(regimes):
        first.setdefault(regime.data, place)
    return sorted(regimes, key=lambda regime: first[regime.data])


# ----------------------------------------------------------------------------------------------- the asv suite

SIZES = {
    "few classes": (200_000, 10),
    "ImageNet": (8192, 1000),
    "vocabulary": (64, 128_256),
    "one row": (1, 128_256),
    "segmentation": (1, 21, 512, 512),
    "latency": (32, 10),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed of one public name.

    `function` is the name below `fastloss`. `prepare(function, inputs)`, with `inputs` a `common.Inputs`, returns the
    call without arguments that is timed: what is not to be timed happens in `prepare`.
    """

    name: str
    function: str
    prepare: Callable[[Any, common.Inputs], Callable[[], Any]]
    regimes: tuple[str, ...] = ("few classes",)
    dtypes: tuple[str, ...] = ("float32",)


def passing(*arrays, **options):
    """`prepare` of a plain function: these attributes of the inputs, in order, and these options."""

    def prepare(function, inputs):
        return functools.partial(function, *(getattr(inputs, name) for name in arrays), **options)

    return prepare


def weighted(function, inputs):
    return functools.partial(function, inputs.logits, inputs.labels_with_ignored, weight=inputs.weight)


def instance(*arrays, **options):
    """`prepare` of a class: an instance with these options is called with these attributes of the inputs."""

    def prepare(function, inputs):
        return passing(*arrays)(function(**options), inputs)

    return prepare


def scorer(method, output):
    """`prepare` of a scorer: a fitted estimator whose `method` gives an array of the inputs."""

    def prepare(function, inputs):
        scores = getattr(inputs, output)
        estimator = types.SimpleNamespace(classes_=np.arange(inputs.n_classes), **{method: lambda X: scores})  # noqa: N803
        return functools.partial(function, estimator, scores, inputs.labels)

    return prepare


def gradient(function, inputs):
    """`prepare` of `value_and_grad`."""
    return passing("logits", "labels")(function(common.public("cross_entropy")), inputs)


def in_pieces(*arrays, **options):
    """`prepare` of a stream: these attributes of the inputs, some rows at a time."""

    def prepare(function, inputs):
        pieces = list(zip(*(np.array_split(getattr(inputs, name), 8) for name in arrays), strict=True))

        def call():
            stream = function(**options)
            for piece in pieces:
                stream.update(*piece)
            return stream.compute()

        return call

    return prepare


def from_files(function, inputs):
    """`prepare` of `score_file`: the files are deleted with the call."""
    directory = tempfile.mkdtemp()
    paths = [Path(directory) / f"{name}.npy" for name in ("logits", "labels")]
    np.save(paths[0], inputs.logits)
    np.save(paths[1], inputs.labels)

    def call():
        return function(*paths)

    weakref.finalize(call, shutil.rmtree, directory)
    return call


def over_dask(*arrays, **options):
    """`prepare` of a function over dask arrays: these attributes of the inputs, in four chunks of rows."""

    def prepare(function, inputs):
        import dask.array

        values = [getattr(inputs, name) for name in arrays]
        chunked = [dask.array.from_array(v, chunks=(-(-len(v) // 4), *v.shape[1:])) for v in values]
        return lambda: function(*chunked, **options).compute()

    return prepare


def silent(function, inputs):
    """`prepare` of the command line, with the sample that ships with fastloss."""

    def call():
        with contextlib.redirect_stdout(io.StringIO()):
            function(["score"])

    return call


_TABLES = ("few classes", "ImageNet", "vocabulary", "one row", "latency")
_EVERYWHERE = tuple(SIZES)
_FLOATS = ("float32", "float64")
_HALVES = ("float16", "bfloat16")

CASES = (
    Case("cross_entropy", "cross_entropy", passing("logits", "labels"), _EVERYWHERE),
    Case("cross_entropy", "cross_entropy", passing("logits", "labels"), ("few classes", "ImageNet"), ("float64",)),
    Case("cross_entropy", "cross_entropy", passing("logits", "labels"), ("ImageNet", "vocabulary"), _HALVES),
    Case("cross_entropy, weighted", "cross_entropy", weighted, ("ImageNet", "segmentation")),
    Case(
        "cross_entropy, smoothed",
        "cross_entropy",
        passing("logits", "labels", label_smoothing=0.1),
        ("ImageNet", "segmentation"),
    ),
    Case("cross_entropy, probabilities", "cross_entropy", passing("logits", "probabilities"), ("ImageNet",), _FLOATS),
    Case(
        "cross_entropy, none",
        "cross_entropy",
        passing("logits", "labels", reduction="none"),
        ("ImageNet", "segmentation"),
    ),
    Case("nll_loss", "nll_loss", passing("log_probabilities", "labels"), _EVERYWHERE),
    Case(
        "kl_div", "kl_div", passing("log_probabilities", "probabilities", reduction="batchmean"), ("ImageNet",), _FLOATS
    ),
    Case(
        "kl_div, log target",
        "kl_div",
        passing("log_probabilities", "log_targets", reduction="batchmean", log_target=True),
        ("ImageNet",),
        _FLOATS,
    ),
    Case("logsumexp", "logsumexp", passing("logits", axis=-1), _TABLES),
    Case("logsumexp", "logsumexp", passing("logits", axis=1), ("segmentation",)),
    Case("logsumexp", "logsumexp", passing("logits", axis=-1), ("ImageNet",), ("float64",)),
    Case("softmax", "softmax", passing("logits", axis=-1), _TABLES),
    Case("softmax", "softmax", passing("logits", axis=1), ("segmentation",)),
    Case("softmax", "softmax", passing("logits", axis=-1), ("ImageNet",), ("float64",)),
    Case("log_softmax", "log_softmax", passing("logits", axis=-1), _TABLES),
    Case("log_softmax", "log_softmax", passing("logits", axis=1), ("segmentation",)),
    Case("log_softmax", "log_softmax", passing("logits", axis=-1), ("ImageNet",), ("float64",)),
    # What a class adds to the function that it calls is the time of a small call.
    Case("CrossEntropyLoss", "CrossEntropyLoss", instance("logits", "labels"), ("latency",)),
    Case("NLLLoss", "NLLLoss", instance("log_probabilities", "labels"), ("latency",)),
    Case("KLDivLoss", "KLDivLoss", instance("log_probabilities", "probabilities", reduction="sum"), ("latency",)),
    Case("Softmax", "Softmax", instance("logits"), ("latency",)),
    Case("LogSoftmax", "LogSoftmax", instance("logits"), ("latency",)),
    # In scikit-learn's style
    Case("log_loss", "metrics.log_loss", passing("labels", "probabilities"), ("few classes", "latency")),
    Case("log_loss, strings", "metrics.log_loss", passing("names", "probabilities")),
    Case("log_loss_from_logits", "metrics.log_loss_from_logits", passing("labels", "logits")),
    Case("brier_score_from_logits", "metrics.brier_score_from_logits", passing("labels", "logits")),
    Case("top_k_accuracy_from_logits", "metrics.top_k_accuracy_from_logits", passing("labels", "logits")),
    Case("perplexity", "metrics.perplexity", passing("labels", "logits")),
    Case("neg_log_loss_scorer", "metrics.neg_log_loss_scorer", scorer("predict_proba", "probabilities")),
    Case(
        "neg_log_loss_from_logits_scorer",
        "metrics.neg_log_loss_from_logits_scorer",
        scorer("decision_function", "logits"),
    ),
    Case("value_and_grad", "value_and_grad", gradient, ("few classes", "ImageNet", "segmentation")),
    # Chunk by chunk
    Case("streaming.CrossEntropy", "streaming.CrossEntropy", in_pieces("logits", "labels")),
    Case("streaming.NLL", "streaming.NLL", in_pieces("log_probabilities", "labels")),
    Case(
        "streaming.KLDivergence",
        "streaming.KLDivergence",
        in_pieces("log_probabilities", "probabilities", reduction="batchmean"),
    ),
    Case("streaming.LogLoss", "streaming.LogLoss", in_pieces("probabilities", "labels", labels=range(10))),
    Case("streaming.Perplexity", "streaming.Perplexity", in_pieces("logits", "labels")),
    Case("score_file", "score_file", from_files),
    Case("dask.cross_entropy", "dask.cross_entropy", over_dask("logits", "labels")),
    Case("dask.nll_loss", "dask.nll_loss", over_dask("log_probabilities", "labels")),
    Case("dask.kl_div", "dask.kl_div", over_dask("log_probabilities", "probabilities", reduction="batchmean")),
    Case("dask.log_loss", "dask.log_loss", over_dask("labels", "probabilities", labels=range(10))),
    # Boosting
    Case("XGBoostCrossEntropy", "objectives.XGBoostCrossEntropy", instance("labels", "logits")),
    Case("LightGBMCrossEntropy", "objectives.LightGBMCrossEntropy", instance("labels", "logits")),
    Case("python -m fastloss score", "cli.main", silent, ("latency",)),
)


def grid(regime):
    """The cases of a regime, each with its dtypes, as names: the one parameter of its asv class.

    One parameter, not two: asv starts a process for every combination, those that no row asks for as well.
    """
    return [f"{case.name}, {dtype}" for case in CASES if regime in case.regimes for dtype in case.dtypes]


def ready(name, regime, tiny=False):
    """The call of a case by its name in the grid, its inputs made and its kernels compiled."""
    name, _, dtype = name.rpartition(", ")
    (case,) = [c for c in CASES if c.name == name and regime in c.regimes and dtype in c.dtypes]
    function = common.public(case.function)
    call = case.prepare(function, common.Inputs(tiny_shape(SIZES[regime]) if tiny else SIZES[regime], dtype))
    call()
    return call
