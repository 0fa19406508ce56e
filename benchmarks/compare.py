"""Compare fastloss with its peers, and with the rate at which the inputs can be read, on the regimes of `cases.py`.

    python benchmarks/compare.py [--tables losses gradients metrics] [--regimes NAME ...] [--engines NAME ...]
                                 [--rounds N] [--json DIRECTORY] [--list] ...
    python benchmarks/compare.py --publish [--tables ...]

Three tables: the losses; value and gradient together (against forward and backward); and the metrics in scikit-learn's
style (against scikit-learn, whose metrics of logits are those of `scipy.special.softmax`), with the peak memory of a
call beyond its inputs.

Every engine runs in a process of its own, over the same seeded data. Before anything is timed, all engines must agree
on the value. Then they are asked in turn, round by round, and the ratio reported is the median over the rounds of (time
of the peer / time of fastloss in that round). While one engine works the others wait on a pipe. Each turn begins with a
pause, in which worker threads stop spinning, so that every library can keep its own waiting policy (or that of
OMP_WAIT_POLICY), and with untimed calls (some 20 ms of short ones). "roofline" is a parallel sum over the bytes of the
inputs; the fraction is its time / that of fastloss. After the losses comes the worst error of each engine on confident
predictions.

`--publish` measures everything (or whole tables) and then writes `benchmarks/results/TABLE.json`, the chart beside them
and the README's tables (see `report.py`). An engine that is not installed, fails or disagrees is named and left out.

Exits with 1 if a value disagrees (that engine is then not timed) or fastloss itself fails; missed bars are printed.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cases
import engines
import numpy as np
import report

PAUSE = 0.02  # seconds before each measurement: GNU OpenMP's threads spin for some milliseconds
SLOW_FACTOR, SLOW_ROUNDS = 10, 3  # an engine that takes this many times as long as fastloss is asked less often
OTHER_CPUS = 0.1  # what other processes may use of the CPUs before the times are called in question
PATIENCE = 180  # seconds for one answer

# How far results may be apart, in relative terms. XLA and PyTorch reduce in the result's precision.
TOLERANCES = {"float16": 5e-3, "bfloat16": 3e-2, "float32": 1e-4, "float64": 1e-10}


# ------------------------------------------------------------------------------------------- is the machine ours?

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _read_stat(path):
    try:
        return Path(path).read_text()
    except OSError:  # not Linux, or the process is gone
        return ""


def _cpu_seconds_of_others(children):
    """CPU time that all but this program have used since the machine started, stolen time included."""
    line = _read_stat("/proc/stat").partition("\n")[0].split()[1:9]
    busy = sum(int(ticks) for field, ticks in enumerate(line) if field not in (3, 4)) / TICKS  # not idle, iowait
    return busy - sum(child.cpu_seconds() for child in children.values()) - time.process_time()


# --------------------------------------------------------------------------------------------------- children


class DiedError(Exception):
    pass


class Child:
    """A process that runs one engine. It is started when it is first asked, and again after it died."""

    def __init__(self, name, n_threads):
        self.name = name
        self.n_threads = n_threads
        self.process = None

    def _start(self):
        environment = dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="1", JAX_PLATFORMS="cpu", PYTHONWARNINGS="ignore")
        for variable in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
            environment[f"{variable}_NUM_THREADS"] = str(self.n_threads)
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            self.name,
            "--threads",
            str(self.n_threads),
        ]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the child is
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def ask(self, **command):
        self.send(**command)
        return self.answer()

    def send(self, **command):
        if self.process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # (there will be no answer)
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()

    def answer(self):
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.process.kill()
            self.errors.seek(0)
            last = [text.strip() for text in self.errors.read().splitlines() if text.strip()][-1:]
            self.stop()
            raise DiedError(f"its process ended or did not answer: {' '.join(last)[:200]}")
        return json.loads(line)

    def cpu_seconds(self):
        """What the process has used of the CPUs."""
        if self.process is None:
            return 0.0
        return sum(map(int, _read_stat(f"/proc/{self.process.pid}/stat").rpartition(")")[2].split()[11:13])) / TICKS

    def free(self):
        """Drop the regime's data."""
        if self.process is not None:
            with contextlib.suppress(DiedError):
                self.ask(do="free")

    def stop(self):
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.errors.close()
            self.process = None


# ---------------------------------------------------------------------------------------------------- regimes


def _disagreement(value, reference, tolerance):
    """What two results differ in, or None."""
    if value["size"] != reference["size"]:
        return f"{value['size']} values, where there should be {reference['size']}"
    for key in ("sum", "first", "last"):
        if not math.isclose(value[key], reference[key], rel_tol=tolerance):
            return f"{key} {value[key]!r}, where fastloss has {reference[key]!r}"
    return None


def _answer(ask, **command):
    """What a child answers; an error if it dies."""
    try:
        return ask(**command)
    except DiedError as death:
        return {"error": str(death)}


def _prepare(regime, children, tiny, problems):
    """Ask every engine for its value, all at once; those that agree, with the answer of each."""
    ready = {}
    for child in children.values():
        child.send(do="prepare", regime=regime.name, tiny=tiny)
    for name, child in children.items():
        answer = _answer(child.answer)
        if "error" in answer:
            problems.append({"engine": name, "what": "failed", "message": answer["error"]})
        elif "unsupported" not in answer:
            ready[name] = answer
    reference = ready.get("fastloss", {"value": None})["value"]
    for name in list(ready):
        value = ready[name]["value"]
        wrong = value and reference and _disagreement(value, reference, TOLERANCES[regime.dtype])
        if wrong:
            problems.append({"engine": name, "what": "DISAGREES", "message": wrong})
        else:
            ready[name] |= _answer(children[name].ask, do="calibrate", regime=regime.name, tiny=tiny)
            if "error" not in ready[name]:
                continue
            problems.append({"engine": name, "what": "failed", "message": ready[name]["error"]})
        del ready[name]
    return ready


def run_regime(regime, children, n_rounds, tiny=False):
    """Values, then times, of all engines on one regime."""
    if regime.latency:
        children = {name: child for name, child in children.items() if name in ("fastloss", "torch")}
    problems = []
    ready = _prepare(regime, children, tiny, problems)
    seconds = {name: [] for name in ready}
    base = ready.get("fastloss", {"seconds": math.inf})["seconds"]
    begin, others = time.perf_counter(), _cpu_seconds_of_others(children)
    for k in range(n_rounds):
        for name in list(ready):
            is_slow = ready[name]["seconds"] > SLOW_FACTOR * base
            if is_slow and k >= SLOW_ROUNDS:
                continue
            time.sleep(0 if tiny else PAUSE)
            warm = ready[name]["seconds"] < engines.SLOW_CALL
            answer = _answer(children[name].ask, do="measure", repeats=ready[name]["repeats"], warm=warm)
            if "error" in answer:
                problems.append({"engine": name, "what": "failed", "message": answer["error"]})
                del ready[name], seconds[name]
            else:
                seconds[name].append(answer["seconds"])
    others = (_cpu_seconds_of_others(children) - others) / (time.perf_counter() - begin)
    for child in children.values():
        child.free()
    return {
        "name": regime.name,
        "shape": regime.tiny().shape if tiny else regime.shape,
        "dtype": regime.dtype,
        "values": {name: answer["value"] for name, answer in ready.items()},
        "repeats": {name: answer["repeats"] for name, answer in ready.items()},
        "seconds": seconds,
        "peak_mib": {},
        "other_cpus": round(others, 3),
        "problems": problems,
        **_summary(regime, seconds),
    }


def run_accuracy(n_classes, children, tiny=False):
    """The worst error of each engine on confident predictions, in ulp."""
    errors, problems = {}, []
    for name, child in children.items():
        if name == "roofline":
            continue
        answer = _answer(child.ask, do="accuracy", n_classes=n_classes, tiny=tiny)
        if "error" in answer:
            problems.append({"engine": name, "what": "failed", "message": answer["error"]})
        elif "ulp" in answer:
            errors[name] = answer["ulp"]
    return {"classes": n_classes, "ulp": errors, "problems": problems}


def run_memory(results, names, n_threads, tiny=False):
    """Add the peak memory of each engine that was timed, in a fresh process, which calls nothing else."""
    for name in names:
        child = Child(name, n_threads)
        for result in results:
            if name in result["seconds"]:
                answer = _answer(child.ask, do="memory", regime=result["name"], tiny=tiny)
                if "error" in answer:
                    result["problems"].append({"engine": name, "what": "failed", "message": answer["error"]})
                elif "peak_mib" in answer:
                    result["peak_mib"][name] = answer["peak_mib"]
        child.stop()


def _summary(regime, seconds):
    """Medians of the ratios round by round, and how they stand to the bars."""
    own = seconds.get("fastloss", [])
    ratios = {
        name: statistics.median(theirs / ours for theirs, ours in zip(times, own, strict=False))
        for name, times in seconds.items()
        if name != "fastloss" and times and own
    }
    roofline = ratios.pop("roofline", None)
    fastest = min(ratios, key=ratios.get, default=None)
    return {
        "milliseconds": 1e3 * statistics.median(own) if own else None,
        "ratios": ratios,
        "fastest_peer": fastest,
        "bar": regime.bar,
        "meets_bar": None if fastest is None or regime.bar is None else ratios[fastest] >= regime.bar,
        "roofline": roofline,
        "roofline_bar": regime.roofline_bar,
        "meets_roofline_bar": None
        if roofline is None or regime.roofline_bar is None
        else roofline >= regime.roofline_bar,
    }


# ----------------------------------------------------------------------------------------------------- output


def _verdict(value, bar, meets):
    if bar is None:
        return report.number(value)
    return f"{report.number(value)} / {bar:g} {'-' if meets is None else 'ok' if meets else 'MISS'}"


def header(peers):
    return ["regime", "size", "fastloss ms", *peers, "fastest peer", "ratio / bar", "roofline / bar"]


def row(result, peers):
    ratios = result["ratios"]
    fastest = result["fastest_peer"]
    milliseconds = result["milliseconds"]
    return [
        result["name"],
        report.size(result),
        "-" if milliseconds is None else f"{milliseconds:.4g}",
        *(report.number(ratios.get(peer)) for peer in peers),
        fastest or "-",
        _verdict(ratios.get(fastest), result["bar"], result["meets_bar"]),
        _verdict(result["roofline"], result["roofline_bar"], result["meets_roofline_bar"]),
    ]


def plain_line(cells, peers):
    widths = [max(25, len(cells[0])), 30, 11, *(max(8, len(peer)) for peer in peers), 12, 16, 16]
    return "  ".join(
        cell.ljust(width) if k < 2 else cell.rjust(width)
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()


def _cpu():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(arguments, names):
    """How it was measured, and with what."""
    packages = {"python": platform.python_version(), "numpy": np.__version__}
    for engine in names:
        packages.update(engines.versions(engine))
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{_cpu()}, {os.cpu_count()} CPUs",
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "slow": {"factor": SLOW_FACTOR, "rounds": SLOW_ROUNDS},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,
        "packages": packages,
        "not_installed": [name for name in arguments.engines if engines.versions(name) is None],
    }


def write_json(path, content):
    """Under another name, then renamed: what lies there is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


# ------------------------------------------------------------------------------------------------------- main


def _chosen(tables, names):
    """The regimes of each of these tables whose names begin with one of these (all without names)."""
    found = {}
    for name in names or [""]:
        matching = {k: r for k, r in cases.REGIMES.items() if r.table in tables and k.lower().startswith(name.lower())}
        if not matching:
            raise SystemExit(f"compare.py: no regime begins with {name!r}; --list names them")
        found.update(matching)
    chosen = {table: [regime for regime in found.values() if regime.table == table] for table in tables}
    return {table: regimes for table, regimes in chosen.items() if regimes}


def _restrict_to(n_threads):
    """Keep this process and its children to as many CPUs as threads: XLA takes one thread per CPU."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        if len(available) > n_threads:
            os.sched_setaffinity(0, available[:n_threads])


def _parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=cases.TABLES, default=list(cases.TABLES))
    parser.add_argument("--regimes", nargs="+", metavar="NAME", help="those that begin with a NAME (default: all)")
    parser.add_argument("--engines", nargs="+", choices=engines.ENGINES, default=list(engines.ENGINES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="DIRECTORY", help="write all that was measured there, by table")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown, too")
    parser.add_argument("--publish", action="store_true", help="measure whole tables; write results/ and the README")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: whether everything works, not how fast")
    parser.add_argument("--list", action="store_true", help="name the regimes and exit")
    parser.add_argument("--worker", choices=engines.ENGINES, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.publish:
        if chosen.regimes or chosen.tiny or chosen.json or chosen.engines != list(engines.ENGINES):
            parser.error("--publish measures every regime of a table in its size with every engine, for the README")
        report.check()  # before minutes are spent
        chosen.json = report.RESULTS
    return chosen


def _list():
    for regime in cases.REGIMES.values():
        shape = " x ".join(map(str, regime.shape))
        bars = f"bar {regime.bar or '-'}, roofline {regime.roofline_bar or '-'}"
        print(f"{regime.name:58}{regime.operation:28}{shape:22}{regime.dtype:10}{bars}")


def _installed(names):
    installed = [name for name in names if engines.versions(name) is not None]
    for name in names:
        if name not in installed:
            print(f"{name} is left out: {', '.join(engines.ENGINES[name].packages)} not installed")
    return installed


def _print_problems(result):
    for problem in result["problems"]:
        print(f"  !!! {problem['engine']} {problem['what']}: {problem['message']}", flush=True)


def measure(arguments, table, regimes, names):
    """A table, printed as it is found, and the content of its JSON file."""
    peers = [name for name in names if name not in ("fastloss", "roofline")]
    children = {name: Child(name, arguments.threads) for name in names}
    found = {"table": table, "environment": environment(arguments, names), "regimes": [], "accuracy": []}
    begin = time.monotonic()
    try:
        print(plain_line(header(peers), peers), flush=True)
        for regime in cases.in_running_order(regimes):
            result = run_regime(regime, children, arguments.rounds, arguments.tiny)
            found["regimes"].append(result)
            print(plain_line(row(result, peers), peers), flush=True)
            _print_problems(result)
            if result["other_cpus"] > OTHER_CPUS and not arguments.tiny:
                print(f"  !!! other processes used {result['other_cpus']:.2f} CPUs meanwhile: measure again")
        order = [regime.name for regime in regimes]
        found["regimes"].sort(key=lambda result: order.index(result["name"]))
        for n_classes in engines.CONFIDENT_CLASSES if table == "losses" else ():
            found["accuracy"].append(run_accuracy(n_classes, children, arguments.tiny))
            errors = ", ".join(f"{name} {value:.3g}" for name, value in found["accuracy"][-1]["ulp"].items())
            print(f"worst error, confident predictions of {n_classes} classes, in ulp: {errors}", flush=True)
    finally:
        for child in children.values():
            child.stop()
    if table == "metrics":
        run_memory(found["regimes"], names, arguments.threads, arguments.tiny)
        for result in found["regimes"]:
            peaks = ", ".join(f"{name} {mib:.3g}" for name, mib in result["peak_mib"].items())
            print(f"peak memory in MiB, {result['name']}: {peaks}", flush=True)
            _print_problems(result)
    found["seconds"] = round(time.monotonic() - begin, 1)
    return found


def main(arguments=None):
    arguments = _parse(arguments)
    if arguments.worker:
        engines.serve(arguments.worker, arguments.threads)
        return 0
    if arguments.list:
        _list()
        return 0
    _restrict_to(arguments.threads)
    chosen, names = _chosen(arguments.tables, arguments.regimes), _installed(arguments.engines)
    problems = []
    for table, regimes in chosen.items():
        timed = [name for name in names if any(hasattr(engines.ENGINES[name], r.operation) for r in regimes)]
        found = measure(arguments, table, regimes, timed)
        problems += [problem for result in found["regimes"] for problem in result["problems"]]
        if arguments.json:
            arguments.json.mkdir(exist_ok=True)
            write_json(arguments.json / f"{table}.json", found)
        if arguments.markdown:
            print("\n" + report.markdown(found))
        print("\n" + report.footer(found), flush=True)
    if arguments.publish:
        report.publish()
    return int(any(problem["what"] == "DISAGREES" or problem["engine"] == "fastloss" for problem in problems))


if __name__ == "__main__":
    sys.exit(main())
