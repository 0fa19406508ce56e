"""Compare fastloss.metrics with scikit-learn: times in one run as ratios, and the peak memory beyond the inputs.

    python benchmarks/metrics.py [--rounds N] [--shapes ROWSxCLASSES ...] [--json FILE] [--no-memory] [--tiny]

Both engines are called in turn, round by round, on the same seeded data; the ratio is the median over the rounds of
(time of scikit-learn / time of fastloss in that round), each time being the median of a few calls in a row. The metrics
of logits are compared with scikit-learn's of ``scipy.special.softmax``.

Memory is measured in a process of its own for each case and engine, after a smaller call: the peak of VmHWM (Linux), or
for a small input what tracemalloc sees of NumPy's allocations.

Exits with 1 if a value disagrees; missed bars are printed.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import memory
import numpy as np
from compare import write_json

SHAPES = ("1000000x10", "100000x100", "1000x10")
SMALL = 100_000  # entries up to which memory is measured by tracemalloc
MEMORY_BAR = 10
TOLERANCES = {"float32": 1e-4, "float64": 1e-11}


def bar(case):
    """How many times faster than scikit-learn log_loss has to be."""
    if case["metric"] != "log_loss":
        return 1
    if case["labels"] == "strings":
        return 3
    return 15 if case["rows"] * case["classes"] > SMALL else 5


def cases(shapes):
    for shape in shapes:
        rows, classes = map(int, shape.split("x"))
        for labels in ("integers", "strings"):
            for dtype in ("float32", "float64"):
                for weighted in (False, True):
                    yield {
                        "metric": "log_loss",
                        "rows": rows,
                        "classes": classes,
                        "labels": labels,
                        "dtype": dtype,
                        "weighted": weighted,
                    }
        for metric in ("log_loss_from_logits", "brier_score_from_logits", "top_k_accuracy_from_logits"):
            yield {
                "metric": metric,
                "rows": rows,
                "classes": classes,
                "labels": "integers",
                "dtype": "float32",
                "weighted": False,
            }


def make_inputs(case, rows):
    """Labels, logits or probabilities, weights."""
    rng = np.random.default_rng(0)
    n_classes, dtype = case["classes"], case["dtype"]
    scores = rng.standard_normal((rows, n_classes), np.float32).astype(dtype)
    if case["metric"] == "log_loss":
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
    codes = rng.integers(0, n_classes, rows)
    codes[:n_classes] = np.arange(n_classes)
    names = np.array([f"class_{c:03d}" for c in range(n_classes)])
    y = names[codes] if case["labels"] == "strings" else codes
    return y, scores, {"sample_weight": rng.random(rows)} if case["weighted"] else {}


def _fastloss(metric):
    import fastloss.metrics

    return getattr(fastloss.metrics, metric)


def _sklearn(metric):
    import scipy.special
    import sklearn.metrics

    def of_softmax(function):
        return lambda y, logits, **options: function(y, scipy.special.softmax(logits, axis=1), **options)

    return {
        "log_loss": sklearn.metrics.log_loss,
        "log_loss_from_logits": of_softmax(sklearn.metrics.log_loss),
        "brier_score_from_logits": of_softmax(sklearn.metrics.brier_score_loss),
        "top_k_accuracy_from_logits": sklearn.metrics.top_k_accuracy_score,
    }[metric]


ENGINES = {"fastloss": _fastloss, "sklearn": _sklearn}


def measure_memory(engine, case):
    """Peak memory of one call beyond the inputs, in MiB, in this process, which has called nothing larger before."""
    function = ENGINES[engine](case["metric"])
    is_small = case["rows"] * case["classes"] <= SMALL
    y, scores, options = make_inputs(case, case["rows"] if is_small else max(case["rows"] // 10, case["classes"]))
    function(y, scores, **options)
    if not is_small:
        y, scores, options = make_inputs(case, case["rows"])
        return memory.peak_growth(lambda: function(y, scores, **options))[1]
    tracemalloc.start()
    function(y, scores, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def _time(call, n_calls):
    seconds = []
    for _ in range(n_calls):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure_times(case, n_rounds):
    """Values, and seconds per call of both engines, round by round."""
    y, scores, options = make_inputs(case, case["rows"])
    calls = {}
    for name, engine in ENGINES.items():
        function = engine(case["metric"])
        calls[name] = lambda function=function: function(y, scores, **options)
    values = {name: call() for name, call in calls.items()}
    n_calls = {name: max(1, min(50, round(0.02 / _time(call, 1)))) for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    for _ in range(n_rounds):
        for name, call in calls.items():
            seconds[name].append(_time(call, n_calls[name]))
    return values, seconds


def run(case, n_rounds, wants_memory):
    values, seconds = measure_times(case, n_rounds)
    ratio = statistics.median(b / a for a, b in zip(seconds["fastloss"], seconds["sklearn"], strict=True))
    peaks = {}
    if wants_memory:
        for engine in ENGINES:
            command = [sys.executable, __file__, "--memory", json.dumps([[engine, case]])]
            (peaks[engine],) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    agrees = math.isclose(values["fastloss"], values["sklearn"], rel_tol=TOLERANCES[case["dtype"]])
    return {**case, "values": values, "agrees": agrees, "seconds": seconds, "ratio": ratio, "peak_mib": peaks}


def _line(result):
    name = f"{result['rows']:,} x {result['classes']}, {result['metric']}, {result['labels']}, {result['dtype']}"
    name += ", weights" * result["weighted"]
    milliseconds = {engine: 1e3 * statistics.median(s) for engine, s in result["seconds"].items()}
    line = f"{name:66} {milliseconds['fastloss']:9.3f} {milliseconds['sklearn']:9.2f} {result['ratio']:7.1f}x"
    peaks = result["peak_mib"]
    if peaks:
        line += f" {peaks['fastloss']:8.2f} {peaks['sklearn']:8.2f}"
    if not result["agrees"]:
        line += f"  DISAGREES: {result['values']}"
    if result["ratio"] < bar(result):
        line += f"  misses {bar(result)} times"
    if peaks and result["metric"] == "log_loss" and peaks["fastloss"] * MEMORY_BAR > peaks["sklearn"]:
        line += f"  misses 1/{MEMORY_BAR} of the memory"
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCLASSES")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument("--no-memory", action="store_true", help="measure times alone")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape, to see that the program works")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    if arguments.memory:
        print(json.dumps([measure_memory(engine, case) for engine, case in json.loads(arguments.memory)]))
        return 0
    print(f"{'':66} {'fastloss':>9} {'sklearn':>9} {'ratio':>8} {'memory':>8} {'memory':>8}")
    print(f"{'':66} {'ms':>9} {'ms':>9} {'':>8} {'MiB':>8} {'MiB':>8}")
    results = []
    for case in cases(["50x4"] if arguments.tiny else arguments.shapes):
        results.append(run(case, arguments.rounds, sys.platform == "linux" and not arguments.no_memory))
        print(_line(results[-1]), flush=True)
    if arguments.json:
        write_json(arguments.json, results)
    return int(not all(result["agrees"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
