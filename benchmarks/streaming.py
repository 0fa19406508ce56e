"""Measure what streams, files and dask cost beside one call over an array in memory.

    python benchmarks/streaming.py [--rounds N] [--json FILE] [--tiny] [--only SECTION ...]

Four sections, each measured round by round, both sides in turn; a ratio is the median over the rounds of (time of one
call in memory / time of the other way), so 1 is as fast and 0.8 takes a quarter longer:

* ``accumulator``: what the exact sum adds to the kernels: the same kernel run with and without it, per row, and as a
  share of the time with it. The bar is 5 %.
* ``stream``: ``CrossEntropy`` fed chunks of some MiB.
* ``file``: ``score_file`` of a memory-mapped file in the page cache (the bar is 0.8), as ``np.save`` left it there, as
  a first scoring from the disk did, and as writing a memory map did; and with an output or details.
* ``dask``: the same array in blocks on the threaded scheduler, and its overhead per block.

Exits with 1 if a value disagrees with that of one call; missed bars are printed.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from compare import write_json

import fastloss
from fastloss import _runtime, _views, functional
from fastloss.streaming import CrossEntropy

SHAPES = {"1,000,000 x 10": (1_000_000, 10), "65,536 x 1000": (65_536, 1000), "1024 x 128,256": (1024, 128_256)}
TINY = {"300 x 10": (300, 10), "40 x 1000": (40, 1000)}
CHUNK_MIB = (4, 16, 64)
FILE_BAR, ACCUMULATOR_BAR = 0.8, 0.05


def median_time(call, n_calls):
    seconds = []
    for _ in range(n_calls):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def compare(calls, n_rounds):
    """Seconds per call of each, round by round, after a call to warm up."""
    for call in calls.values():
        call()
    first = next(iter(calls.values()))
    n_calls = max(1, min(30, round(0.03 / max(median_time(first, 1), 1e-6))))
    seconds = {name: [] for name in calls}
    for _ in range(n_rounds):
        for name, call in calls.items():
            seconds[name].append(median_time(call, n_calls))
    return seconds


def ratio(seconds, base, other):
    return statistics.median(a / b for a, b in zip(seconds[base], seconds[other], strict=True))


def make(shape):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, np.float32), rng.integers(0, shape[1], shape[0])


def kernel_call(logits, labels, is_nll, wants_sum):
    """The kernel of a loss with class indices, with or without its sum, and without writing rows."""
    flat, x_layout = _views.flatten(logits)
    flat_labels, labels_layout = _views.flatten(labels, is_index=True)
    kernel, n_elements, table = functional._index_plan(
        x_layout, labels_layout, None, 1, -100, False, False, is_nll, wants_sum
    )
    weight = functional._padded_weights(None, 0, logits.dtype)
    out = _views.one(logits.dtype)
    ledger = _runtime.new_ledger()
    return lambda: _runtime.run_tiles(kernel, n_elements, ledger, flat, flat_labels, weight, out, table)


def kl_call(log_q, p, wants_sum):
    from fastloss._kernels import pointwise

    options = _views.Options(wants_rows=False, wants_sum=wants_sum)
    arrays = ((log_q, None), (p, None), (None, None))
    (flat, flat_y, out), table = _views.lay_out(log_q.shape, 1, _views.ELEMENT_TILE, arrays, log_q.dtype, options)
    ledger = _runtime.new_ledger()
    return lambda: _runtime.run_tiles(pointwise.kl, log_q.size, ledger, flat, flat_y, out, out, table)


def accumulator(shapes, n_rounds):
    for name, shape in shapes.items():
        logits, labels = make(shape)
        pairs = {f"cross_entropy, {name}": [kernel_call(logits, labels, False, s) for s in (True, False)]}
        if shape[1] <= 1000:
            pairs[f"nll_loss, {name}"] = [kernel_call(logits, labels, True, s) for s in (True, False)]
            pairs[f"kl_div, {name}"] = [kl_call(-np.abs(logits), np.abs(logits), s) for s in (True, False)]
        for what, (with_sum, without) in pairs.items():
            seconds = compare({"with": with_sum, "without": without}, n_rounds)
            n_values = logits.size if what.startswith("kl") else len(logits)
            share = 1 - 1 / ratio(seconds, "with", "without")
            extra = statistics.median(seconds["with"]) - statistics.median(seconds["without"])
            yield {
                "section": "accumulator", "case": what, "seconds": seconds, "share": share,
                "ns_per_value": 1e9 * extra / n_values, "missed": share > ACCUMULATOR_BAR, "agrees": True,
            }  # fmt: skip


def stream(shapes, n_rounds):
    for name, shape in shapes.items():
        logits, labels = make(shape)
        for mib in CHUNK_MIB:
            step = max(1, (mib << 20) // (4 * shape[1]))

            def streamed(step=step, logits=logits, labels=labels):
                loss = CrossEntropy()
                for begin in range(0, len(logits), step):
                    loss.update(logits[begin : begin + step], labels[begin : begin + step])
                return loss.compute()

            calls = {"memory": lambda x=logits, t=labels: fastloss.cross_entropy(x, t), "stream": streamed}
            yield result("stream", f"{name}, chunks of {mib} MiB", calls, "stream", n_rounds)


def result(section, case, calls, other, n_rounds, bar=0.0):
    agrees = calls["memory"]() == calls[other]()
    seconds = compare(calls, n_rounds)
    speed = ratio(seconds, "memory", other)
    return {
        "section": section,
        "case": case,
        "seconds": seconds,
        "ratio": speed,
        "missed": speed < bar,
        "agrees": bool(agrees),
    }


def save_on_disk(path, array):
    """Leave nothing of the file in the page cache: who scores it first reads it from the disk."""
    with Path(path).open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def save_by_rows(path, array):
    """Write a memory-mapped file some rows (1 MiB) at a time, as who predicts by batches does."""
    saved = np.lib.format.open_memmap(path, "w+", array.dtype, array.shape)
    n_rows = max(1, (1 << 20) // array[:1].nbytes)
    for row in range(0, len(array), n_rows):
        saved[row : row + n_rows] = array[row : row + n_rows]
    saved.flush()


def file(shapes, n_rounds):
    for name, shape in shapes.items():
        logits, labels = make(shape)
        for what, write, options in (
            ("", np.save, {}),
            (", from the disk", save_on_disk, {}),
            (", by rows", save_by_rows, {}),
            (", output", np.save, {"output": "out.npy"}),
            (", details", np.save, {"details": True}),
        ):
            if write is save_on_disk and not hasattr(os, "posix_fadvise"):
                continue  # macOS
            with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
                write("logits.npy", logits)
                write("labels.npy", labels)
                calls = {
                    "memory": lambda x=logits, t=labels: fastloss.cross_entropy(x, t),
                    "file": lambda o=options: fastloss.score_file("logits.npy", "labels.npy", **o).loss,
                }
                yield result("file", name + what, calls, "file", n_rounds, 0.0 if options else FILE_BAR)


def dask(shapes, n_rounds):
    import dask as dask_itself
    import dask.array as da

    import fastloss.dask

    for name, shape in shapes.items():
        logits, labels = make(shape)
        for n_blocks in (1, 16, 256):
            rows = max(1, -(-shape[0] // n_blocks))
            x, t = da.from_array(logits, chunks=(rows, -1), name=False), da.from_array(labels, chunks=rows, name=False)

            def computed(x=x, t=t):
                with dask_itself.config.set(scheduler="threads"):
                    return fastloss.dask.cross_entropy(x, t).compute()

            calls = {"memory": lambda x=logits, t=labels: fastloss.cross_entropy(x, t), "dask": computed}
            found = result("dask", f"{name}, {x.numblocks[0]} blocks", calls, "dask", n_rounds)
            extra = statistics.median(found["seconds"]["dask"]) - statistics.median(found["seconds"]["memory"])
            yield found | {"us_per_block": 1e6 * extra / x.numblocks[0]}


SECTIONS = {"accumulator": accumulator, "stream": stream, "file": file, "dask": dask}


def line(found):
    seconds = {name: 1e3 * statistics.median(s) for name, s in found["seconds"].items()}
    text = f"{found['section']:12} {found['case']:40}" + "".join(f" {n} {ms:9.3f} ms" for n, ms in seconds.items())
    if "share" in found:
        text += f"   {100 * found['share']:5.1f} %  {found['ns_per_value']:6.3f} ns each"
    else:
        text += f"   {found['ratio']:5.2f}"
    if "us_per_block" in found:
        text += f"  {found['us_per_block']:7.1f} us per block"
    return text + "  MISSED" * found["missed"] + "  DISAGREES" * (not found["agrees"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that the program works")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    results = []
    for section in arguments.only:
        for found in SECTIONS[section](TINY if arguments.tiny else SHAPES, arguments.rounds):
            results.append(found)
            print(line(found), flush=True)
    if arguments.json:
        write_json(arguments.json, results)
    return int(not all(found["agrees"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
