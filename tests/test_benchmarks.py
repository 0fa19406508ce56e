"""The measuring programs work: every regime in a tiny size on what is installed, every benchmark body once.

Times are not looked at, nor are errors held to their bounds: that is for the programs themselves. What is held is that
every public function has a benchmark, and that the README shows what was measured.
"""

import dataclasses
import importlib
import inspect
import itertools
import json
import pkgutil
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest

import fastloss

TOOLS = Path(__file__).parents[1] / "benchmarks"
ENGINES = ["fastloss", "torch", "xla", "scipy", "sklearn", "roofline"]  # not Inductor, which compiles for minutes

sys.path.append(str(TOOLS))
accuracy = importlib.import_module("accuracy")
cases = importlib.import_module("cases")
common = importlib.import_module("common")
compare = importlib.import_module("compare")
inspect_kernel = importlib.import_module("inspect_kernel")
report = importlib.import_module("report")

# --------------------------------------------------------------------------------------------- the comparison


def run_compare(*arguments):
    command = [sys.executable, str(TOOLS / "compare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def regimes_of(table):
    return [name for name, regime in cases.REGIMES.items() if regime.table == table]


@pytest.fixture(scope="module")
def tiny_comparison(tmp_path_factory):
    """The tables of a comparison in tiny sizes, and what was printed."""
    directory = tmp_path_factory.mktemp("comparison")
    done = run_compare("--tiny", "--rounds", "1", "--engines", *ENGINES, "--json", str(directory), "--markdown")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in directory.iterdir()) == sorted(f"{table}.json" for table in cases.TABLES)
    return [json.loads((directory / f"{table}.json").read_text()) for table in cases.TABLES], done.stdout


def test_compare_runs_every_regime_and_all_engines_agree(tiny_comparison):
    tables, printed = tiny_comparison
    assert [found["table"] for found in tables] == list(cases.TABLES)
    for found in tables:
        assert [regime["name"] for regime in found["regimes"]] == regimes_of(found["table"])
        for regime in found["regimes"]:
            assert not regime["problems"], regime
            assert len(regime["seconds"]["fastloss"]) == 1
            assert regime["name"] in printed
        assert {"command", "cpu", "threads", "packages", "date"} <= set(found["environment"])


def test_compare_asks_every_peer_for_what_it_can(tiny_comparison):
    """On the sizes that matter all answer alike, so that a peer that vanished from a table is noticed."""
    asked = {"losses": {"torch", "xla", "scipy", "sklearn"}, "gradients": {"torch", "xla"}, "metrics": {"sklearn"}}
    for found in tiny_comparison[0]:
        expected = {name for name in asked[found["table"]] if name not in found["environment"]["not_installed"]}
        assert {name for regime in found["regimes"] for name in regime["ratios"]} == expected
        if found["table"] != "losses":
            assert all(set(regime["ratios"]) == expected for regime in found["regimes"])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_compare_measures_the_memory_of_metrics(tiny_comparison):
    for found in tiny_comparison[0]:
        for regime in found["regimes"]:
            measured = set(regime["seconds"]) if found["table"] == "metrics" else set()
            assert set(regime["peak_mib"]) == measured


def test_compare_counts_wrong_digits_beside_the_times(tiny_comparison):
    (found, *others), printed = tiny_comparison
    assert found["accuracy"]
    assert not any(other["accuracy"] for other in others)
    for line in found["accuracy"]:
        assert not line["problems"]
        # 2e-6 in relative terms is at most 34 ulp; a loss of 1e-7 lost to rounding is off by millions
        assert line["ulp"]["fastloss"] < 34
        assert all(ulp > 1e6 for name, ulp in line["ulp"].items() if name != "fastloss")
    assert "worst error, confident predictions of 1000 classes" in printed


def test_compare_leaves_out_an_engine_that_dies(monkeypatch):
    regime = cases.REGIMES["few classes"]
    children = {name: compare.Child(name, 2) for name in ("fastloss", "scipy")}
    monkeypatch.setattr(children["scipy"], "_start", lambda: pretend_to_start(children["scipy"]))
    try:
        result = compare.run_regime(regime, children, 1, tiny=True)
    finally:
        for child in children.values():
            child.stop()
    assert [(problem["engine"], problem["what"]) for problem in result["problems"]] == [("scipy", "failed")]
    assert list(result["seconds"]) == ["fastloss"]


def pretend_to_start(child):
    child.errors = (TOOLS / "compare.py").open()
    child.process = subprocess.Popen(
        [sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child.process.wait()


def test_compare_names_a_disagreement():
    value = {"size": 1, "sum": 1.0, "first": 1.0, "last": 1.0}
    assert compare._disagreement(value, value, 1e-9) is None
    assert "sum 1.5" in compare._disagreement({**value, "sum": 1.5}, value, 1e-9)
    assert "2 values" in compare._disagreement({**value, "size": 2}, value, 1e-9)


def test_regimes_of_the_same_data_run_one_after_the_other():
    order = cases.in_running_order(cases.REGIMES.values())
    assert {regime.name for regime in order} == set(cases.REGIMES)
    assert {regime.table for regime in order} == set(cases.TABLES)
    changes = sum(a.data != b.data for a, b in itertools.pairwise(order))
    assert changes + 1 == len({regime.data for regime in order})


def test_compare_measures_the_regimes_asked_for():
    done = run_compare("--tiny", "--rounds", "1", "--engines", "fastloss", "--markdown", "--regimes", "kl", "binary")
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("| regime |")[2]
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert names == ["---", "KL", "KL, log target", "binary"]


def test_compare_publishes_nothing_but_the_whole():
    done = run_compare("--publish", "--tiny")
    assert done.returncode == 2
    assert "--publish measures every regime" in done.stderr


def test_compare_refuses_an_unknown_regime():
    done = run_compare("--regimes", "no such")
    assert done.returncode == 1
    assert "no regime begins with 'no such'" in done.stderr


# ------------------------------------------------------------------------------------- the README and the chart


@pytest.fixture(scope="module")
def committed():
    return report.committed()


def test_the_readme_shows_the_committed_comparison(committed):
    readme = report.README.read_text(encoding="utf-8")
    assert report.with_tables(readme, committed) == readme
    assert f"({report.SVG.relative_to(report.README.parent).as_posix()})" in readme


def test_the_numbers_of_the_readme_are_generated():
    """Outside of the places that the report writes, nothing is said to take so long, or so many times as long."""
    readme = report.README.read_text(encoding="utf-8")
    for table in cases.TABLES:
        begin, _, rest = readme.partition(report.BEGIN.format(table))
        readme = begin + rest.partition(report.END.format(table))[2]
    readme = re.sub(r"```.*?```", "", readme, flags=re.DOTALL)
    assert not re.findall(r"\d(?:\.\d+)? ?(?:ms|µs|us|GB/s|MiB/s|times as|times faster|x faster)\b", readme)


def test_the_committed_ratios_are_those_of_the_committed_times(committed):
    assert [found["table"] for found in committed] == list(cases.TABLES)
    for found in committed:
        assert [regime["name"] for regime in found["regimes"]] == regimes_of(found["table"])
        for regime in found["regimes"]:
            ours = regime["seconds"]["fastloss"]
            for name, ratio in regime["ratios"].items():
                pairs = zip(regime["seconds"][name], ours, strict=False)
                assert ratio == statistics.median(theirs / own for theirs, own in pairs)


def _shows_every_regime_and_peer(path, tables):
    shown = set(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8")))
    for found in report.charted(tables):
        assert {regime["name"] for regime in found["regimes"]} <= shown
        assert {report.PEERS[name] for regime in found["regimes"] for name in regime["ratios"]} <= shown


def test_the_committed_chart_shows_every_regime_and_peer(committed):
    _shows_every_regime_and_peer(report.SVG, committed)


def test_a_chart_of_the_same_comparison_is_the_same(committed, tmp_path):
    pytest.importorskip("matplotlib")
    path, again = tmp_path / "chart.svg", tmp_path / "again.svg"
    for place in (path, again):
        report.chart(report.charted(committed), place)
    _shows_every_regime_and_peer(path, committed)
    assert path.read_bytes() == again.read_bytes()


def test_the_tables_are_made_of_what_was_measured(tiny_comparison):
    tables, printed = tiny_comparison
    places = [(report.BEGIN.format(found["table"]), report.END.format(found["table"])) for found in tables]
    expected = "# Title\n"
    for found, (begin, end) in zip(tables, places, strict=True):
        assert report.markdown(found) in printed
        expected += f"{begin}\n\n{report.markdown(found)}\n\n{end}\n"
    assert report.with_tables("# Title\n" + "".join(f"{b}\nold\n{e}\n" for b, e in places), tables) == expected
    with pytest.raises(ValueError, match="once"):
        report.with_tables("# Title\n", tables)


# ---------------------------------------------------------------------------------------------- the asv suite


def importable(name):
    """A module, or None where a package is missing that it needs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def is_timed(value):
    """Whether a public name is a function or a class that computes, not an exception or a record of results."""
    is_record = inspect.isclass(value) and (
        issubclass(value, (BaseException, tuple)) or dataclasses.is_dataclass(value)
    )
    return callable(value) and not is_record


def uncovered(table):
    """The public functions and classes that no case calls."""
    names = [info.name for info in pkgutil.iter_modules(fastloss.__path__) if not info.name.startswith("_")]
    modules = [fastloss, *filter(None, (importable(f"fastloss.{name}") for name in names))]
    called = []
    for case in table:
        try:
            called.append(common.public(case.function))
        except NotImplementedError:  # of a module that needs a package that is missing
            assert importable(f"fastloss.{case.function}".rpartition(".")[0]) is None, case.function
    return [
        f"{module.__name__}.{name}"
        for module in modules
        for name in getattr(module, "__all__", ())
        if is_timed(getattr(module, name)) and not any(getattr(module, name) is function for function in called)
    ]


def test_every_public_function_has_a_benchmark():
    assert uncovered(cases.CASES) == []
    without = [case for case in cases.CASES if case.function != "softmax"]
    assert set(uncovered(without)) == {"fastloss.softmax", "fastloss.functional.softmax"}


def test_every_regime_has_a_class_and_every_case_a_regime():
    module = importlib.import_module("suite.bench_functions")
    classes = [value for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
    assert sorted(value.regime for value in classes) == sorted(cases.SIZES)
    assert {regime for case in cases.CASES for regime in case.regimes} == set(cases.SIZES)
    for value in classes:
        assert value.params == cases.grid(value.regime)
    timed = [(case.name, regime, dtype) for case in cases.CASES for regime in case.regimes for dtype in case.dtypes]
    assert len(timed) == len(set(timed))


def combinations(benchmark):
    """The combinations of its parameters."""
    params = getattr(benchmark, "params", ())
    if params and not isinstance(params[0], (list, tuple)):
        params = (params,)
    return itertools.product(*params)


def bodies():
    """Every benchmark with every combination of its parameters, found as asv finds them."""
    for info in pkgutil.iter_modules([str(TOOLS / "suite")]):
        module = importlib.import_module(f"suite.{info.name}")
        for class_name, value in vars(module).items():
            if inspect.isclass(value) and not class_name.startswith("_"):
                for method in [name for name in dir(value) if name.startswith(("time_", "track_", "peakmem_"))]:
                    for combination in combinations(value):
                        name = "-".join([class_name, method, *map(str, combination)])
                        yield pytest.param(value, method, combination, id=name)


@pytest.mark.parametrize(("benchmark", "method", "combination"), list(bodies()))
def test_benchmark_bodies_run(benchmark, method, combination, monkeypatch):
    monkeypatch.setattr(benchmark, "tiny", True, raising=False)
    instance = benchmark()
    try:
        if hasattr(instance, "setup"):
            instance.setup(*combination)
    except NotImplementedError as error:  # by which asv skips what this machine cannot do
        pytest.skip(str(error))
    result = getattr(instance, method)(*combination)
    if method.startswith("track_"):
        assert np.isfinite(result)
        assert isinstance(getattr(instance, method).unit, str)


def test_the_suite_needs_no_peer():
    code = """
import sys
sys.path.insert(0, "benchmarks")
import pkgutil, importlib, suite
for info in pkgutil.iter_modules(suite.__path__):
    importlib.import_module("suite." + info.name)
print(sorted({"torch", "jax", "sklearn", "mpmath", "matplotlib", "ml_dtypes"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOOLS.parent, check=True)
    assert done.stdout.strip() == "[]"


def test_asv_finds_its_files():
    configuration = json.loads((TOOLS.parent / "asv.conf.json").read_text())
    assert (TOOLS.parent / configuration["benchmark_dir"]).is_dir()
    assert configuration["branches"] == ["main"]


# ------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("band", ["confident", "ordinary", "wrong"])
def test_accuracy_measures_losses_within_their_bounds(dtype, band):
    loss, *entries = accuracy.measure({"fastloss": accuracy._fastloss()}, dtype, band, 10, 20)
    assert not loss["failures"]
    assert loss["max"]["fastloss"] >= loss["p99"]["fastloss"] >= 0
    assert [line["what"] for line in entries] == [f"softmax, {band}", f"log_softmax, {band}"]


def test_accuracy_measures_the_mean():
    assert accuracy.measure_mean({"fastloss": accuracy._fastloss()}, 5000)["max"]["fastloss"] <= 1


def test_accuracy_prints_a_line_for_everything(capsys):
    assert accuracy.main(["--tiny"]) in (0, 1)  # (on so few rows another engine may be luckier)
    lines = capsys.readouterr().out.splitlines()
    for dtype, band, what in itertools.product(accuracy.LOSS_BOUNDS, accuracy.BANDS, ("loss", "log_softmax")):
        assert sum(line.startswith(f"{dtype:8} {what}, {band} ") for line in lines) == 2
    assert sum(" mean " in line for line in lines) == 1


def test_accuracy_tells_what_is_wrong():
    off = dict.fromkeys(("loss", "softmax", "log_softmax"))
    for what, function in accuracy._fastloss().items():
        off[what] = lambda *inputs, function=function: function(*inputs) * np.float32(1.001)
    engines = {"fastloss": off, "scipy": accuracy._fastloss()}
    for line in accuracy.measure(engines, "float32", "ordinary", 7, 20):
        assert len(line["failures"]) == 2
        assert "scipy's is" in line["failures"][1]


def test_the_exact_values_of_accuracy_are_those_of_mpmath(rng):
    x, t = accuracy.rows(rng, 3, 5, "confident", "float64")
    exact = accuracy.exact_values(x, t, n_checked=3)["loss"]
    with mpmath.workdps(50):
        for row, target, value in zip(x, t, exact, strict=True):
            others = mpmath.fsum(mpmath.exp(mpmath.mpf(float(v)) - float(row[target])) for v in np.delete(row, target))
            assert abs(float(mpmath.log1p(others)) / float(value) - 1) < 1e-15


# ----------------------------------------------------------------------------------------------- the assembly

ASSEMBLY = """
kernel:
.LBB0_1:
	vaddps	(%rsi,%rax), %zmm0, %zmm0
.LBB0_2:
	vgatherdps	(%rsi,%zmm1,4), %zmm2 {%k1}
	vmovups	%ymm3, 32(%rsp)
	vaddss	%xmm1, %xmm2, %xmm2
	jne	.LBB0_2
	callq	*%rcx
	jmp	.LBB0_1
other:
.LBB1_1:
	addq	$1, %rax
	jne	.LBB1_1
	retq
"""


def test_the_innermost_loops_are_found_and_counted():
    loops = inspect_kernel.innermost_loops(ASSEMBLY)
    assert [(function, len(lines)) for function, lines in loops] == [("kernel", 5), ("other", 3)]
    assert inspect_kernel.counts(loops[0][1]) == {
        "instructions": 4,
        "zmm": 1,
        "ymm": 1,
        "xmm": 1,
        "gather": 1,
        "stack": 1,
        "call": 0,
        "scalar": 1,
    }


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")
def test_inspect_kernel_shows_the_loops_of_a_regime(tmp_path):
    path = tmp_path / "nll.s"
    command = [sys.executable, str(TOOLS / "inspect_kernel.py"), "NLL", "--tiny", "--show", "1", "--asm", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  1 nll +\d+", done.stdout, re.MULTILINE)
    assert "NLL, 12 x 12 float32" in done.stdout
    assert "retq" in path.read_text()


# ------------------------------------------------------------------------------------------- memory and streams


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_log_loss_takes_a_tenth_of_the_memory_of_scikit_learn():
    names = [
        f"log_loss, {labels}, weights, {size} float32"
        for size in ("1000 x 10", "1000000 x 10")
        for labels in ("integers", "strings")
    ]
    peaks = {}
    for engine in ("fastloss", "sklearn"):
        child = compare.Child(engine, 2)
        try:
            peaks[engine] = [child.ask(do="memory", regime=name)["peak_mib"] for name in names]
        finally:
            child.stop()
    for name, ours, theirs in zip(names, peaks["fastloss"], peaks["sklearn"], strict=True):
        assert ours < theirs / 10, name


def test_cold_start_measures_every_program(capsys, monkeypatch):
    pytest.importorskip("torch")
    cold_start = importlib.import_module("cold_start")
    monkeypatch.setattr(sys, "argv", ["cold_start.py", "--rounds", "1"])
    assert not cold_start.main()
    lines = capsys.readouterr().out.splitlines()
    for name, *_ in cold_start.PROGRAMS:
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert float(re.search(r"\d+\.\d+", line[len(name) :]).group()) > 0


def test_streams_files_and_dask_agree_with_one_call(tmp_path):
    path = tmp_path / "streaming.json"
    sections = ["accumulator", "stream", "file", *(["dask"] if importlib.util.find_spec("dask") else [])]
    command = [sys.executable, str(TOOLS / "streaming.py"), "--tiny", "--rounds", "1", "--json", str(path)]
    done = subprocess.run([*command, "--only", *sections], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    assert list(dict.fromkeys(result["section"] for result in results)) == sections
    assert all(result["agrees"] for result in results)
