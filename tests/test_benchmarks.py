"""The measuring programs work: every regime in a tiny size on what is installed, and the accuracy table on few rows.

Times are not looked at, nor are errors held to their bounds: that is for the programs themselves.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest

TOOLS = Path(__file__).parents[1] / "benchmarks"
ENGINES = ["fastloss", "torch", "xla", "scipy", "sklearn", "roofline"]  # not Inductor, which compiles for minutes


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("accuracy", TOOLS / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(*arguments):
    command = [sys.executable, str(TOOLS / "compare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compare_runs_every_regime_and_all_engines_agree(tmp_path):
    path = tmp_path / "times.json"
    done = compare("--tiny", "--rounds", "1", "--engines", *ENGINES, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert len(found["regimes"]) == len(compare("--list").stdout.splitlines())
    for regime in found["regimes"]:
        assert not regime["problems"], regime
        assert len(regime["seconds"]["fastloss"]) == 1
        assert regime["name"] in done.stdout
    assert {"command", "cpu", "threads", "packages"} <= set(found["environment"])
    assert not list(tmp_path.glob("*.partial"))


def test_compare_prints_markdown_of_the_regimes_asked_for():
    done = compare("--tiny", "--rounds", "1", "--engines", "fastloss", "--markdown", "--regimes", "kl", "binary")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert names == ["regime", "---", "KL", "KL, log target", "binary"]


def test_compare_refuses_an_unknown_regime():
    done = compare("--regimes", "no such")
    assert done.returncode == 1
    assert "no regime begins with 'no such'" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("band", ["confident", "ordinary", "wrong"])
def test_accuracy_measures_losses_within_their_bounds(accuracy, dtype, band):
    loss, *entries = accuracy.measure({"fastloss": accuracy._fastloss()}, dtype, band, 10, 20)
    assert not loss["failures"]
    assert loss["max"]["fastloss"] >= loss["p99"]["fastloss"] >= 0
    assert [line["what"] for line in entries] == [f"softmax, {band}", f"log_softmax, {band}"]


def test_accuracy_measures_the_mean(accuracy):
    assert accuracy.measure_mean({"fastloss": accuracy._fastloss()}, 5000)["max"]["fastloss"] <= 1


def test_accuracy_tells_what_is_wrong(accuracy):
    off = dict.fromkeys(("loss", "softmax", "log_softmax"))
    for what, function in accuracy._fastloss().items():
        off[what] = lambda *inputs, function=function: function(*inputs) * np.float32(1.001)
    engines = {"fastloss": off, "scipy": accuracy._fastloss()}
    for line in accuracy.measure(engines, "float32", "ordinary", 7, 20):
        assert len(line["failures"]) == 2
        assert "scipy's is" in line["failures"][1]


def test_the_exact_values_of_accuracy_are_those_of_mpmath(accuracy, rng):
    x, t = accuracy.rows(rng, 3, 5, "confident", "float64")
    exact = accuracy.exact_values(x, t, n_checked=3)["loss"]
    with mpmath.workdps(50):
        for row, target, value in zip(x, t, exact, strict=True):
            others = mpmath.fsum(mpmath.exp(mpmath.mpf(float(v)) - float(row[target])) for v in np.delete(row, target))
            assert abs(float(mpmath.log1p(others)) / float(value) - 1) < 1e-15


def test_metrics_agree_with_scikit_learn(tmp_path):
    path = tmp_path / "metrics.json"
    command = [sys.executable, str(TOOLS / "metrics.py"), "--tiny", "--no-memory", "--rounds", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    assert (
        len(results) == len({json.dumps([r["metric"], r["labels"], r["dtype"], r["weighted"]]) for r in results}) == 11
    )
    assert all(result["agrees"] and result["ratio"] > 0 for result in results)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("rows", "classes"), [(1000, 10), (300_000, 10)])
def test_log_loss_takes_a_tenth_of_the_memory_of_scikit_learn(rows, classes):
    case = {"metric": "log_loss", "rows": rows, "classes": classes, "dtype": "float32", "weighted": True}
    peaks = {}
    for labels in ("integers", "strings"):
        for engine in ("fastloss", "sklearn"):
            case_json = json.dumps([engine, {**case, "labels": labels}])
            command = [sys.executable, str(TOOLS / "metrics.py"), "--memory", case_json]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[engine] = float(done.stdout)
        assert peaks["fastloss"] < peaks["sklearn"] / 10


def test_streams_files_and_dask_agree_with_one_call(tmp_path):
    path = tmp_path / "streaming.json"
    sections = ["accumulator", "stream", "file", *(["dask"] if importlib.util.find_spec("dask") else [])]
    command = [sys.executable, str(TOOLS / "streaming.py"), "--tiny", "--rounds", "1", "--json", str(path)]
    done = subprocess.run([*command, "--only", *sections], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    assert list(dict.fromkeys(result["section"] for result in results)) == sections
    assert all(result["agrees"] for result in results)
