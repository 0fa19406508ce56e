"""How long a process takes until it has its first loss, against PyTorch: ``python benchmarks/cold_start.py``.

Four programs, each in a fresh process, in turn, and again; the quickest run of each counts, as what the machine does
besides only ever adds time:

* ``import torch`` and one ``F.cross_entropy``, the measure of the others;
* ``import fastloss``;
* ``import fastloss`` and one ``cross_entropy``, the cache being warm;
* the same with an empty cache, so with the compilation.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

_DATA = "x = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32); t = np.arange(64) % 10; "
_LOSS = "import numpy as np; import fastloss; " + _DATA + "fastloss.cross_entropy(x, t)"
_TORCH = "import numpy as np; import torch; " + _DATA
_TORCH += "torch.nn.functional.cross_entropy(torch.from_numpy(x), torch.from_numpy(t))"

# The name, the program, and the share of PyTorch's time that it may take.
PROGRAMS = (
    ("import torch, F.cross_entropy", _TORCH, 1.0),
    ("import fastloss", "import fastloss", 0.25),
    ("import fastloss, cross_entropy", _LOSS, 0.5),
    ("the same, empty cache", _LOSS, 3.0),
)


def seconds(code, cache):
    """The time of one process."""
    environment = {**os.environ, "FASTLOSS_CACHE_DIR": cache}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return time.perf_counter() - started


def measure(n_rounds):
    """The quickest of some rounds, for each program."""
    times = [[] for _ in PROGRAMS]
    with tempfile.TemporaryDirectory() as warm:
        for _, code, _ in PROGRAMS[:3]:  # fill the cache, and the system's cache of files
            seconds(code, warm)
        for _ in range(n_rounds):
            for i, (_, code, _) in enumerate(PROGRAMS):
                with tempfile.TemporaryDirectory() as empty:
                    times[i].append(seconds(code, empty if i == 3 else warm))
    return [min(t) for t in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each program (default: 5)")
    best = measure(parser.parse_args().rounds)
    print(f"{'a fresh process':<32} {'seconds':>8} {'of torch':>9} {'goal':>6}")
    for (name, _, goal), time_ in zip(PROGRAMS, best, strict=True):
        print(f"{name:<32} {time_:8.2f} {time_ / best[0]:9.2f} {goal:6.2f}")


if __name__ == "__main__":
    main()
