"""Measure what a call allocates: the peak of the process's memory during the call beyond what it held before.

    python benchmarks/memory.py [--json]

Each case runs in a process of its own, over inputs of some 200 MB that were touched before; kernels and threads were
started by a smaller call, large enough to run in parallel. Exits with 1 if a case takes more than its bound: 8 MiB, or,
for softmax and log_softmax, its result and 8 MiB. Linux only: the peak is VmHWM of /proc/self/status, reset through
/proc/self/clear_refs.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

BOUND_MIB = 8.0


def _logits(shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


def _labels(shape, n_classes):
    return np.random.default_rng(1).integers(0, n_classes, shape)


def _cases():
    """Case name -> (large shape, small shape, how to see the logits, call). Shapes are those of the array in memory."""
    import fastloss

    def score(logits, axis=1, **options):
        rows = logits.shape[:axis] + logits.shape[axis + 1 :]
        labels = _labels(rows, logits.shape[axis])
        return lambda: fastloss.cross_entropy(logits, labels, **options)

    def weighted(logits):
        return score(logits, weight=np.linspace(0.5, 2.0, logits.shape[1]), ignore_index=3)

    def probabilities(logits):
        return lambda: fastloss.cross_entropy(logits, logits)

    def nll(logits):
        labels = _labels(len(logits), logits.shape[1])
        return lambda: fastloss.nll_loss(logits, labels)

    def same(logits):
        return logits

    def channels_last(array):
        return np.moveaxis(array, -1, 1)

    rows, small = (50_000, 1000), (600, 1000)
    images, small_image = (8, 21, 512, 576), (1, 21, 64, 64)
    return {
        "(N, C)": (rows, small, same, score),
        "(N, C), few classes": ((5_000_000, 10), (7000, 10), same, score),
        "(N, C), vocabulary": ((400, 128_256), (3, 128_256), same, score),
        "(N, C), weight and ignore_index": (rows, small, same, weighted),
        "(N, C), label smoothing": (rows, small, same, lambda x: score(x, label_smoothing=0.1)),
        "(N, C), probabilities": (rows, small, same, probabilities),
        "(N, C) transposed": (rows[::-1], small[::-1], np.transpose, score),
        "(N, C) sliced": ((50_000, 2000), (600, 2000), lambda x: x[:, ::2], score),
        "(N, C, H, W)": (images, small_image, same, score),
        "(N, C, H, W), channels last": ((8, 512, 576, 21), (1, 64, 64, 21), channels_last, score),
        "(N, C) float16": (rows, small, lambda x: x.astype(np.float16), score),
        "(N, C) big-endian": (rows, small, lambda x: x.astype(">f4"), score),
        "(N, C) integers": (rows, small, lambda x: x.astype(np.int32), score),
        "nll_loss": (rows, small, same, nll),
        "kl_div": (rows, small, same, lambda x: lambda: fastloss.kl_div(x, x, reduction="batchmean", log_target=True)),
        "logsumexp, last axis": (rows, small, same, lambda x: lambda: fastloss.logsumexp(x, axis=1)),
        "logsumexp, first axis": (rows, small, same, lambda x: lambda: fastloss.logsumexp(x, axis=0)),
        "softmax": (rows, small, same, lambda x: lambda: fastloss.softmax(x)),
        "log_softmax": (rows, small, same, lambda x: lambda: fastloss.log_softmax(x)),
    }


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field} in /proc/self/status")


def peak_growth(call):
    """What a call returns, and the peak of the process's memory in MiB during it beyond what it held before."""
    ctypes.CDLL(None).malloc_trim(0)  # (what was freed before would hide what is allocated now)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    return result, _status("VmHWM") - before


def measure(name):
    """Peak memory in MiB beyond the inputs, of one case, in this process."""
    large, small, view, make = _cases()[name]
    make(view(_logits(small)))()
    logits = view(_logits(large))
    call = make(logits)
    result, growth = peak_growth(call)
    is_result = getattr(result, "shape", ()) == logits.shape
    return {
        "case": name,
        "input_mib": round(logits.nbytes / 2**20, 1),
        "peak_mib": round(growth, 2),
        "bound_mib": BOUND_MIB + (result.nbytes / 2**20 if is_result else 0.0),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return 0
    results = []
    for name in _cases():
        command = [sys.executable, __file__, "--case", name]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        print(f"{'case':34} {'input MiB':>10} {'peak MiB':>9} {'bound MiB':>10}")
        for r in results:
            print(f"{r['case']:34} {r['input_mib']:10.1f} {r['peak_mib']:9.2f} {r['bound_mib']:10.1f}")
    return int(any(r["peak_mib"] > r["bound_mib"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
