"""Look at a kernel: the instructions of its innermost loops, and what fraction of the roofline it reaches.

    python benchmarks/inspect_kernel.py "ImageNet, mean" [--loops N] [--show K] [--asm FILE]

REGIME is the start of a name that `compare.py --list` prints. The kernel is compiled anew, in its serial form, whose
loops are those of the threads too. For each innermost loop that uses vectors, those with the most of them first: its
instructions, how many of them use zmm, ymm and xmm registers, gather, touch the stack (spilled registers), call a
function, or compute with scalars. `--show K` prints the K-th of them. x86-64 alone.

The roofline is the time of a parallel sum over the same bytes, the fraction that time / the time of the call, both in
turn in this process.
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cases
import common
import engines

_LABEL = re.compile(r"^(\.L\w+):")
_FUNCTION = re.compile(r"^([A-Za-z_][\w.$]*):")
_JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
_INSTRUCTION = re.compile(r"^\s+[a-z]")
_COUNTED = {
    "zmm": re.compile(r"%?zmm\d"),
    "ymm": re.compile(r"%?ymm\d"),
    "xmm": re.compile(r"%?xmm\d"),
    "gather": re.compile(r"^\s+v?p?gather"),
    "stack": re.compile(r"\(%[re](sp|bp)\b|\[[re](sp|bp)\b"),
    "call": re.compile(r"^\s+call"),
    "scalar": re.compile(r"^\s+v?(add|sub|mul|div|max|min|fn?m(add|sub)\d+|cvt\w+)s[sd]\b"),
}


def innermost_loops(assembly):
    """The innermost loops, each the lines from a label to the last jump back to it, with the function's name."""
    lines = assembly.splitlines()
    function, labels, spans = "", {}, {}
    for number, line in enumerate(lines):
        if match := _LABEL.match(line):
            labels[match[1]] = number
        elif match := _FUNCTION.match(line):
            function, labels = match[1], {}
        elif (match := _JUMP.match(line)) and match[1] in labels:
            spans[labels[match[1]]] = (number, function)
    return [
        (spans[begin][1], lines[begin : spans[begin][0] + 1])
        for begin in spans
        if not any(begin < other <= spans[begin][0] for other in spans)
    ]


def counts(loop):
    """What a loop consists of."""
    instructions = [line for line in loop if _INSTRUCTION.match(line)]
    found = {what: sum(bool(pattern.search(line)) for line in instructions) for what, pattern in _COUNTED.items()}
    return {"instructions": len(instructions)} | found


def serial_kernels(call):
    """Kernel name -> assembly, of what a call compiles where nothing is parallel and nothing is in the cache."""
    from fastloss import _runtime
    from fastloss._kernels._jit import Kernel

    threshold, _runtime.PARALLEL_THRESHOLD = _runtime.PARALLEL_THRESHOLD, 1 << 62
    try:
        call()
    finally:
        _runtime.PARALLEL_THRESHOLD = threshold
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("fastloss._kernels.")]
    kernels = {id(v): v for module in modules for v in vars(module).values() if isinstance(v, Kernel)}.values()
    return {
        kernel.name: "\n".join(kernel.serial.inspect_asm().values()) for kernel in kernels if kernel.serial.signatures
    }


def roofline(regime, inputs, n_threads, n_rounds=9):
    """Seconds of the call and of the read of its inputs, in turn; None where nothing like it can be read."""
    operation = getattr(engines.Roofline(n_threads), regime.operation)
    reading = operation and operation(regime, **regime.arrays(inputs))
    ours = getattr(engines.Fastloss(n_threads), regime.operation)(regime, **regime.arrays(inputs))
    calls = [ours, reading] if reading else [ours]
    seconds = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(n_rounds):
        for call, times in zip(calls, seconds, strict=True):
            call()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    own = statistics.median(seconds[0])
    fraction = statistics.median(read / mine for mine, read in zip(*seconds, strict=True)) if reading else None
    return own, fraction


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("regime", help="the start of a name of compare.py --list")
    parser.add_argument("--loops", type=int, default=8, help="how many loops to list")
    parser.add_argument("--show", type=int, metavar="K", help="print the K-th loop")
    parser.add_argument("--asm", type=Path, metavar="FILE", help="write all the assembly there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny size: whether it works, not how fast")
    chosen = parser.parse_args(arguments)
    found = [regime for name, regime in cases.REGIMES.items() if name.lower().startswith(chosen.regime.lower())]
    if not found:
        parser.error(f"no regime begins with {chosen.regime!r}; compare.py --list names them")
    regime = found[0].tiny() if chosen.tiny else found[0]
    inputs = common.Inputs(*regime.data)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["FASTLOSS_CACHE_DIR"] = empty  # code from the cache has no assembly any more
        engine = engines.Fastloss(chosen.threads)
        kernels = serial_kernels(getattr(engine, regime.operation)(regime, **regime.arrays(inputs)))
        own, fraction = roofline(regime, inputs, chosen.threads)
    loops = [
        (kernel, loop, counts(loop)) for kernel, assembly in kernels.items() for _, loop in innermost_loops(assembly)
    ]
    loops = [entry for entry in loops if entry[2]["zmm"] or entry[2]["ymm"] or entry[2]["xmm"]]
    loops.sort(key=lambda entry: (entry[2]["zmm"] + entry[2]["ymm"], entry[2]["xmm"]), reverse=True)
    columns = ["instructions", *_COUNTED]
    print(f"{'':3} {'kernel':24}" + "".join(f"{name:>{max(7, len(name) + 1)}}" for name in columns))
    for place, (kernel, _, found_counts) in enumerate(loops[: chosen.loops], 1):
        cells = "".join(f"{found_counts[name]:>{max(7, len(name) + 1)}}" for name in columns)
        print(f"{place:3} {kernel:24}{cells}")
    if chosen.show:
        print("\n" + "\n".join(loops[chosen.show - 1][1]))
    if chosen.asm:
        chosen.asm.write_text("\n".join(kernels.values()))
    reached = "no roofline" if fraction is None else f"{100 * fraction:.0f} % of the roofline"
    print(f"\n{regime.name}, {' x '.join(map(str, regime.shape))} {regime.dtype}: {1e3 * own:.4g} ms, {reached}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
