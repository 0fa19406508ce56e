"""Compare value and gradient together with PyTorch (forward and backward), torch.compile and jax.value_and_grad.

    python benchmarks/gradients.py [--regimes NAME ...] [--rounds N] [--threads N] [--tiny] [--json FILE]

Every engine runs in a process of its own, over the same seeded data, and must agree on the value and on the gradient's
norm. Then they are asked in turn, round by round, after a pause in which worker threads stop spinning and one untimed
call; the ratio reported is the median over the rounds of (time of the peer / time of fastloss in that round). What an
engine returns is a new array each time.

Exits with 1 if an engine disagrees; missed bars are printed.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

PAUSE = 0.02  # seconds; GNU OpenMP's threads spin for some milliseconds
TOLERANCE = 1e-4  # float32 sums of peers


@dataclasses.dataclass(frozen=True)
class Regime:
    shape: tuple[int, ...]
    bar: float  # at least this many times the fastest peer
    smoothing: float = 0.0
    probabilities: bool = False


IMAGENET = (65_536, 1000)
REGIMES = {
    "ImageNet": Regime(IMAGENET, 2),
    "few classes": Regime((1_000_000, 10), 2),
    "vocabulary": Regime((1024, 128_256), 2),
    "segmentation": Regime((8, 21, 512, 512), 2),
    "label smoothing": Regime(IMAGENET, 1.5, smoothing=0.1),
    "probability targets": Regime(IMAGENET, 1.5, probabilities=True),
}


def make_inputs(regime, tiny):
    shape = tuple(min(n, 12) for n in regime.shape) if tiny else regime.shape
    rng = np.random.default_rng(2024)
    logits = rng.standard_normal(shape, np.float32)
    if not regime.probabilities:
        return logits, rng.integers(0, shape[1], (shape[0], *shape[2:]))
    target = rng.random(shape, np.float32)
    target /= target.sum(1, keepdims=True)
    return logits, target


# ------------------------------------------------------------------------------------------------- engines


def fastloss_call(regime, logits, target, n_threads):
    import numba

    import fastloss

    numba.set_num_threads(n_threads)
    function = fastloss.value_and_grad(fastloss.cross_entropy)
    return lambda: function(logits, target, label_smoothing=regime.smoothing)


def torch_call(regime, logits, target, n_threads, is_compiled=False):
    import torch

    torch.set_num_threads(n_threads)
    torch._dynamo.reset()
    x, y = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(target)
    loss = lambda x, y: torch.nn.functional.cross_entropy(x, y, label_smoothing=regime.smoothing)
    loss = torch.compile(loss, dynamic=False) if is_compiled else loss

    def call():
        x.grad = None
        value = loss(x, y)
        value.backward()
        return value.detach(), x.grad

    return call


def inductor_call(regime, logits, target, n_threads):
    return torch_call(regime, logits, target, n_threads, is_compiled=True)


def xla_call(regime, logits, target, n_threads):
    import jax
    from jax import numpy as jnp

    n_classes = logits.shape[1]

    def loss(x, y):
        if regime.probabilities:
            return -(y * jax.nn.log_softmax(x, axis=1)).sum(axis=1).mean()
        log_sum = jax.nn.logsumexp(x, axis=1)
        losses = log_sum - jnp.take_along_axis(x, y[:, None], axis=1).squeeze(1)
        if regime.smoothing:
            losses = (1 - regime.smoothing) * losses + regime.smoothing * (log_sum - x.sum(axis=1) / n_classes)
        return losses.mean()

    compiled = jax.jit(jax.value_and_grad(loss))
    arrays = [jax.device_put(a) for a in (logits, target if regime.probabilities else target.astype(np.int32))]
    return lambda: jax.block_until_ready(compiled(*arrays))


ENGINES = {"fastloss": fastloss_call, "torch": torch_call, "inductor": inductor_call, "xla": xla_call}


def serve(name, n_threads):
    """Answer commands, JSON by the line: prepare a regime (value, norm of the gradient), measure, free."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    call = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "prepare":
            regime = REGIMES[command["regime"]]
            call = None
            call = ENGINES[name](regime, *make_inputs(regime, command["tiny"]), n_threads)
            value, gradient = call()
            gradient = np.asarray(gradient).reshape(-1)
            norm = sum(float(np.dot(p, p)) for p in np.array_split(gradient, 1 + gradient.size // 65_536)) ** 0.5
            answer = {"value": float(value), "norm": norm}
            del value, gradient
        else:
            result = call()
            del result
            begin = time.perf_counter()
            result = call()
            answer = {"seconds": time.perf_counter() - begin}
            del result
        answers.write(json.dumps(answer) + "\n")


# ----------------------------------------------------------------------------------------------------- rounds


class Child:
    def __init__(self, name, n_threads):
        environment = dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="1", JAX_PLATFORMS="cpu", PYTHONWARNINGS="ignore")
        for variable in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
            environment[f"{variable}_NUM_THREADS"] = str(n_threads)
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--threads", str(n_threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def run_regime(name, names, n_threads, n_rounds, tiny):
    """Medians of the ratios round by round; engines that disagree."""
    children = {engine: Child(engine, n_threads) for engine in names}
    try:
        values = {engine: child.ask(do="prepare", regime=name, tiny=tiny) for engine, child in children.items()}
        own = values["fastloss"]
        wrong = [
            engine
            for engine, value in values.items()
            if any(abs(value[key] - own[key]) > TOLERANCE * abs(own[key]) for key in ("value", "norm"))
        ]
        seconds = {engine: [] for engine in children if engine not in wrong}
        for _ in range(n_rounds):
            for engine, times in seconds.items():
                time.sleep(0 if tiny else PAUSE)
                times.append(children[engine].ask(do="measure")["seconds"])
    finally:
        for child in children.values():
            child.stop()
    ratios = {
        engine: statistics.median(theirs / ours for theirs, ours in zip(times, seconds["fastloss"], strict=True))
        for engine, times in seconds.items()
        if engine != "fastloss"
    }
    return {
        "regime": name,
        "shape": REGIMES[name].shape,
        "milliseconds": 1e3 * statistics.median(seconds["fastloss"]),
        "ratios": ratios,
        "bar": REGIMES[name].bar,
        "wrong": wrong,
    }


def installed():
    """The engines whose packages can be imported."""
    import importlib.util

    packages = {"fastloss": "fastloss", "torch": "torch", "inductor": "torch", "xla": "jax"}
    return [engine for engine, package in packages.items() if importlib.util.find_spec(package)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: whether everything works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, arguments.threads)
        return 0
    if hasattr(os, "sched_setaffinity"):  # XLA takes one thread per CPU
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    names = installed()
    results = []
    print(f"{'regime':20} {'size':20} {'ms':>8} {' '.join(f'{n:>9}' for n in names[1:])}   fastest / bar", flush=True)
    for name in arguments.regimes:
        result = run_regime(name, names, arguments.threads, arguments.rounds, arguments.tiny)
        results.append(result)
        size = " x ".join(map(str, result["shape"]))
        cells = " ".join(f"{result['ratios'].get(n, float('nan')):9.2f}" for n in names[1:])
        fastest = min(result["ratios"].values(), default=float("nan"))
        verdict = "ok" if fastest >= result["bar"] else "MISS"
        print(
            f"{name:20} {size:20} {result['milliseconds']:8.1f} {cells}   {fastest:.2f} / {result['bar']:g} {verdict}"
        )
        for engine in result["wrong"]:
            print(f"  !!! {engine} DISAGREES")
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["wrong"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
