"""``python -m fastloss warmup``: compile ahead what a deployment is going to call.

What is compiled: the functions of PyTorch (``cross_entropy`` with indices, with label smoothing and with
probabilities, ``nll_loss``, ``kl_div``, ``softmax``, ``log_softmax``, ``logsumexp``) for float32, and for other dtypes
if asked, for contiguous classes and for the strided or few ones, serially and in parallel, and for long rows of
contiguous classes, which threads share; whatever threads the machine has that compiles.
"""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

import fastloss
from fastloss import _forks

DTYPES = ("float16", "bfloat16", "float32", "float64")

# No call has as many elements, so each runs serially; every row that can be shared is.
_SETTINGS = {"compiles_both_forms": True, "PARALLEL_THRESHOLD": 1 << 62, "SPLIT_THRESHOLD": 0, "LARGE_TILE": 0}

# Rows and classes: contiguous classes, and few, with rows enough for several tiles, that is for threads; one long row.
_SHAPES = {
    "contiguous classes": (4096, 64),
    "few or strided classes": (4096, 8),
    "a long row": (1, 1 << 18),
}


def calls(dtype: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name for each piece of work, and the call that compiles it."""
    for kind, (n_rows, n_classes) in _SHAPES.items():
        logits = np.zeros((n_rows, n_classes), np.float32)
        if dtype == "bfloat16":
            x = logits.astype(importlib.import_module("ml_dtypes").bfloat16)
        else:
            x = logits.astype(dtype)
        classes = np.zeros(n_rows, np.int64)
        where = f"{dtype}, {kind}"
        loss, smoothed = fastloss.cross_entropy, partial(fastloss.cross_entropy, label_smoothing=0.1)
        yield f"cross_entropy, {where}", partial(loss, x, classes)
        yield f"cross_entropy with smoothing, {where}", partial(smoothed, x, classes)
        yield f"cross_entropy with probabilities, {where}", partial(loss, x, x)
        yield f"softmax and log_softmax, {where}", partial(fastloss.softmax, x)
        yield f"logsumexp, {where}", partial(fastloss.logsumexp, x, 1)
        if kind == "contiguous classes":
            yield f"nll_loss, {dtype}", partial(fastloss.nll_loss, x, classes)
            yield f"kl_div, {dtype}", partial(fastloss.kl_div, x, x, reduction="sum")


def compile_all(dtypes: Sequence[str], show_progress: bool) -> int:
    """Make every call, and compile what it would run with threads; how many kernels the cache then holds."""
    runtime = _forks.runtime()
    work = [item for dtype in dtypes for item in calls(dtype)]
    bar = _Bar(len(work), show_progress)
    before = {name: getattr(runtime, name) for name in _SETTINGS}
    vars(runtime).update(_SETTINGS)
    try:
        for name, call in work:
            bar.step(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
    finally:
        vars(runtime).update(before)
        bar.close()
    from fastloss import _cache

    return _cache.contents()[0]


class _Bar:
    """A progress bar on standard error, where that is a terminal: tqdm's if it is installed, else a plain one."""

    def __init__(self, total: int, is_shown: bool) -> None:
        self.total, self.done, self.is_shown = total, 0, is_shown
        self.bar: Any = None
        if is_shown:
            with contextlib.suppress(ImportError):
                # By name, since tqdm is no dependency and has no types.
                self.bar = importlib.import_module("tqdm").tqdm(total=total, unit="call", leave=False)

    def step(self, name: str) -> None:
        if self.bar is not None:
            self.bar.set_description(name)
            self.bar.update(self.done > 0)
        elif self.is_shown:
            filled = 30 * self.done // self.total
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r[{bar}] {self.done}/{self.total} {name:<70.70}", end="", file=sys.stderr, flush=True)
        self.done += 1

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.is_shown:
            print("\r" + " " * 115 + "\r", end="", file=sys.stderr, flush=True)
