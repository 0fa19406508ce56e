"""The command line: what it prints, what it writes, what it refuses.

The main paths run in processes of their own; the rest calls :func:`fastloss.cli.main`, which is the same without the
seconds of a start. Expected values are a float64 NumPy formula, or those of the function that the command line streams.
"""

import importlib.util
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastloss
from fastloss import cli
from fastloss import files as scoring

ROOT = Path(__file__).resolve().parents[1]
ERROR = "fastloss: error: "


def expected_losses(logits, targets, weight=None, label_smoothing=0.0):
    """Cross-entropy of each row in float64; class indices may be out of range where the caller does not look."""
    x = np.moveaxis(logits.astype(np.float64), min(1, logits.ndim - 1), -1)
    shifted = x - x.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    n_classes = x.shape[-1]
    w = np.ones(n_classes) if weight is None else weight.astype(np.float64)
    if targets.shape == logits.shape:
        y = np.moveaxis(targets.astype(np.float64), min(1, logits.ndim - 1), -1)
    else:
        y = np.eye(n_classes)[np.clip(targets, 0, n_classes - 1)]
    y = y * (1 - label_smoothing) + label_smoothing / n_classes
    if targets.shape == logits.shape:
        return -(w * y * log_p).sum(-1)
    own = np.take_along_axis(log_p, np.clip(targets, 0, n_classes - 1)[..., np.newaxis], -1)[..., 0]
    smooth = -(w * log_p).sum(-1) * label_smoothing / n_classes
    return -(1 - label_smoothing) * w[np.clip(targets, 0, n_classes - 1)] * own + smooth


@pytest.fixture
def files(tmp_path, rng, monkeypatch):
    """A directory with logits (200, 7), targets and weights, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    np.save("logits.npy", rng.normal(0, 3, (200, 7)).astype(np.float32))
    np.save("targets.npy", rng.integers(0, 7, 200))
    np.save("weight.npy", rng.uniform(0.5, 2, 7))
    return tmp_path


@pytest.fixture
def run(capsys):
    """Call main and return the exit status and both streams."""

    def call(*arguments):
        status = cli.main([str(a) for a in arguments])
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return call


@pytest.fixture
def report(run):
    """Call main with --json and return the object."""

    def call(*arguments):
        status, out, err = run("score", *arguments, "--json")
        assert (status, err) == (0, "")
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    return call


@pytest.fixture
def refused(run):
    """Call main and return the one line that it says before exit status 2."""

    def call(*arguments):
        status, out, err = run("score", *arguments)
        assert (status, out) == (2, "")
        assert err.startswith(ERROR)
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err.removeprefix(ERROR).rstrip("\n")

    return call


def listing():
    return sorted(path.name for path in Path().iterdir())


def process(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "fastloss", *arguments], capture_output=True, text=True, **options)


# ------------------------------------------------------------------------------------------------- processes


def test_process_scores_the_sample():
    done = process("score")
    assert (done.returncode, done.stderr) == (0, "")
    table = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    table = {name: value.strip() for name, value in table.items()}
    with np.load(cli.SAMPLE) as sample:
        logits, targets = sample["logits"], sample["targets"]
    losses = expected_losses(logits, targets)
    loss, _, reduction = table["cross-entropy"].partition(" ")
    assert float(loss) == pytest.approx(losses.mean(), rel=2e-6)
    assert reduction == "(mean)"
    assert table["rows"] == "450"
    assert table["classes"] == "10"
    assert float(table["perplexity"]) == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    correct = (logits.argmax(1) == targets).sum()
    assert table["accuracy"] == f"{correct / 450:.4f} ({correct} of 450)"
    assert " s" in table["time"]
    worst = [line.split() for line in done.stdout.split("worst rows")[1].splitlines()[1:]]
    assert [int(line[0]) for line in worst] == np.argsort(-losses)[:5].tolist()
    for row, target, predicted, row_loss in worst:
        assert int(target) == targets[int(row)]
        assert int(predicted) == logits[int(row)].argmax()
        assert float(row_loss) == pytest.approx(losses[int(row)], rel=2e-6)


def test_process_writes_losses(files):
    done = process("score", "logits.npy", "targets.npy", "--json", "--reduction", "none", "--output", "out.npy")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["loss"] is None
    losses = np.load("out.npy")
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected_losses(np.load("logits.npy"), np.load("targets.npy")), rtol=2e-6)


def test_process_reports_errors_without_traceback(files):
    done = process("score", "logits.npy", "missing.npy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{ERROR}missing.npy: No such file or directory\n"


def test_process_help_does_not_import_numba():
    code = (
        "import sys; from fastloss.cli import main\ntry: main(['--help'])\nfinally: assert 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "score" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_process_interrupted(files):
    np.save("out.npy", np.arange(3))
    code = (
        "import sys, time; from fastloss import cli, files\n"
        "def wait(*_): print('scoring', flush=True); time.sleep(60)\n"
        "files._Run._score = wait\n"
        "sys.exit(cli.main(['score', 'logits.npy', 'targets.npy', '--output', 'out.npy']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "scoring\n"
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60) == ("", "")
    assert child.returncode == 130
    assert np.load("out.npy").tolist() == [0, 1, 2]
    assert listing() == ["logits.npy", "out.npy", "targets.npy", "weight.npy"]


@pytest.mark.skipif(os.name != "posix", reason="resource limits of POSIX")
def test_process_full_disk(files):
    np.save("out.npy", np.arange(3))
    code = (
        "import resource, sys; from fastloss.cli import main\n"
        "import fastloss; fastloss.cross_entropy([[0.0, 1.0]], [0])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "sys.exit(main(['score', 'logits.npy', 'targets.npy', '--output', 'out.npy']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{ERROR}out.npy: File too large\n")
    assert np.load("out.npy").tolist() == [0, 1, 2]
    assert listing() == ["logits.npy", "out.npy", "targets.npy", "weight.npy"]


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("buffering", ["", "1"])
def test_process_whose_reader_is_gone(buffering):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": buffering}
    done = subprocess.run(
        [sys.executable, "-m", "fastloss", "score"], stdout=writer, stderr=subprocess.PIPE, env=environment
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# ------------------------------------------------------------------------------------------------- the sample


def test_sample_is_small_and_reproducible():
    pytest.importorskip("sklearn")
    script = ROOT / "benchmarks" / "make_sample.py"
    spec = importlib.util.spec_from_file_location("make_sample", script)
    make_sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_sample)
    logits, targets = make_sample.held_out_predictions()
    assert make_sample.SAMPLE.name == cli.SAMPLE.name
    assert cli.SAMPLE.stat().st_size < 100_000
    with np.load(cli.SAMPLE) as sample:
        assert sample["logits"].dtype == np.float32
        np.testing.assert_array_equal(sample["targets"], targets)
        np.testing.assert_allclose(sample["logits"], logits, atol=1e-3)  # another BLAS, another last digit


def test_sample_takes_options(report):
    with np.load(cli.SAMPLE) as sample:
        logits, targets = sample["logits"], sample["targets"]
    found = report("--ignore-index", "3", "--reduction", "sum")
    assert found["loss"] == pytest.approx(expected_losses(logits, targets)[targets != 3].sum(), rel=2e-6)
    assert found["kept"] == (targets != 3).sum()


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_index_targets(files, report, reduction, label_smoothing, weighted, ignore_index):
    logits, targets, weight = np.load("logits.npy"), np.load("targets.npy"), np.load("weight.npy")
    arguments = ["logits.npy", "targets.npy", "--reduction", reduction, "--label-smoothing", label_smoothing]
    arguments += ["--ignore-index", ignore_index] + (["--weight", "weight.npy"] if weighted else [])
    found = report(*arguments, "--output", "out.npy")
    losses = expected_losses(logits, targets, weight if weighted else None, label_smoothing)
    kept = targets != ignore_index
    mean = losses[kept].sum() / (weight[targets[kept]].sum() if weighted else kept.sum())
    assert found["loss"] == pytest.approx(mean if reduction == "mean" else losses[kept].sum(), rel=2e-6)
    assert found["perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == targets)[kept].mean(), rel=1e-12)
    assert (found["rows"], found["kept"], found["classes"]) == (200, kept.sum(), 7)
    assert (found["function"], found["reduction"]) == ("cross_entropy", reduction)
    assert found["seconds"] > 0
    np.testing.assert_allclose(np.load("out.npy"), np.where(kept, losses, 0), rtol=2e-6)
    assert [row["position"] for row in found["worst"]] == [
        [i] for i in np.argsort(-np.where(kept, losses, -np.inf))[:5].tolist()
    ]


def test_probability_targets(files, rng, report):
    targets = rng.dirichlet(np.ones(7), 200).astype(np.float32)
    np.save("soft.npy", targets)
    logits = np.load("logits.npy")
    found = report("logits.npy", "soft.npy", "--label-smoothing", "0.1", "--weight", "weight.npy")
    losses = expected_losses(logits, targets, np.load("weight.npy"), 0.1)
    assert found["loss"] == pytest.approx(losses.mean(), rel=2e-6)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == targets.argmax(1)).mean(), rel=1e-12)
    worst = found["worst"][0]
    assert worst["position"] == [losses.argmax()]
    assert worst["target"] == targets[losses.argmax()].argmax()


def test_log_probabilities(files, rng, run, report):
    log_p = np.log(rng.dirichlet(np.ones(7), 200)).astype(np.float32)
    np.save("log_p.npy", log_p)
    targets = np.load("targets.npy")
    found = report("log_p.npy", "targets.npy", "--log-probs")
    assert found["function"] == "nll_loss"
    assert found["loss"] == pytest.approx(-log_p.astype(np.float64)[np.arange(200), targets].mean(), rel=1e-6)
    _, out, _ = run("score", "log_p.npy", "targets.npy", "--log-probs")
    assert "negative log-likelihood" in out


@pytest.mark.parametrize("shape", [(7,), (5, 7), (4, 7, 3), (4, 7, 3, 2), (0, 7), (2, 7, 0)])
def test_shapes(files, rng, report, run, shape):
    logits = rng.normal(size=shape).astype(np.float32)
    targets = np.asarray(rng.integers(0, 7, shape[:1] + shape[2:] if len(shape) > 1 else ()))
    np.save("x.npy", logits)
    np.save("t.npy", targets)
    found = report("x.npy", "t.npy", "--output", "out.npy")
    assert found["rows"] == targets.size
    assert np.load("out.npy").shape == targets.shape
    if not targets.size:
        assert (found["loss"], found["perplexity"], found["accuracy"], found["worst"]) == ("NaN", "NaN", "NaN", [])
        return
    losses = expected_losses(logits, targets)
    assert found["loss"] == pytest.approx(losses.mean(), rel=2e-6)
    np.testing.assert_allclose(np.load("out.npy"), losses, rtol=2e-6)
    position = tuple(int(i) for i in np.unravel_index(losses.argmax(), losses.shape))
    assert found["worst"][0]["position"] == list(position)
    _, out, _ = run("score", "x.npy", "t.npy")
    assert f"{position[0] if len(position) == 1 else position} " in out


def test_fortran_order(files, report):
    logits = np.load("logits.npy")
    np.save("fortran.npy", np.asfortranarray(logits))
    assert report("fortran.npy", "targets.npy")["loss"] == report("logits.npy", "targets.npy")["loss"]


# ------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("chunk", [1, 64, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chunks_give_what_the_function_gives(files, rng, monkeypatch, report, chunk, dtype):
    logits = rng.normal(0, 30, (150, 7, 2)).astype(dtype)
    targets = rng.integers(0, 7, (150, 2)).astype(np.uint8)
    np.save("x.npy", logits)
    np.save("t.npy", targets)
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 80 * chunk)
    options = {"weight": np.load("weight.npy"), "ignore_index": 3, "label_smoothing": 0.125}
    arguments = ["x.npy", "t.npy", "--weight", "weight.npy", "--ignore-index", "3", "--label-smoothing", "0.125"]
    for reduction in ("mean", "sum"):
        whole = fastloss.cross_entropy(logits, targets, reduction=reduction, **options)
        assert report(*arguments, "--reduction", reduction)["loss"] == float(whole)
    report(*arguments, "--output", "out.npy")
    np.testing.assert_array_equal(
        np.load("out.npy"), fastloss.cross_entropy(logits, targets, reduction="none", **options)
    )


@pytest.mark.parametrize("weight", [np.zeros(7), np.array([1.0, -1, 0, 0, 0, 0, 0])])
def test_weights_that_sum_to_nothing(files, report, weight):
    np.save("w.npy", weight)
    np.save("t.npy", np.arange(200) % 2)
    found = report("logits.npy", "t.npy", "--weight", "w.npy", "--label-smoothing", "0.5")["loss"]
    whole = fastloss.cross_entropy(np.load("logits.npy"), np.arange(200) % 2, weight, label_smoothing=0.5)
    np.testing.assert_equal(float(found), float(whole))


def test_memory_stays_small(files, rng, monkeypatch, report):
    tracemalloc = pytest.importorskip("tracemalloc")
    n = 20_000
    np.save("x.npy", rng.normal(size=(n, 100)).astype(np.float32))  # 8 MB
    np.save("t.npy", np.zeros(n, np.int8))
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 1 << 16)
    report("x.npy", "t.npy")
    tracemalloc.start()
    try:
        report("x.npy", "t.npy", "--output", "out.npy")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------- worst rows


def test_names_that_standard_output_cannot_write(files):
    """The report of shards names files, which may have any characters."""
    for name in ("é", "ü"):
        np.save(f"{name}.npy", np.load("logits.npy"))
        np.save(f"{name}.labels.npy", np.load("targets.npy"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "fastloss", "score", "[éü].npy", "[éü].labels.npy"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\xe9.npy: " in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
def test_no_standard_output(files):
    command = f"exec {sys.executable} -m fastloss score {'a' * 300} targets.npy >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"{ERROR}{'a' * 300}: File name too long\n")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize("errors", ["2>/dev/full", "2>&-"])
def test_no_standard_error(files, errors):
    command = f"exec {sys.executable} -m fastloss score nope.npy nope.npy {errors}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_worst_rows_order(files, report, monkeypatch):
    logits = np.zeros((12, 7), np.float32)
    logits[2, 0] = -np.inf  # infinite loss
    logits[[4, 9], 3] = np.nan
    logits[6, 1] = 5.0
    targets = np.zeros(12, np.int64)
    logits[0, 3] = np.nan
    targets[0] = -100  # ignored: NaN in it does not count
    np.save("x.npy", logits)
    np.save("t.npy", targets)
    for chunk in (1, 1 << 20):
        monkeypatch.setattr(scoring, "CHUNK_BYTES", 80 * chunk)
        found = report("x.npy", "t.npy")
        assert [row["position"][0] for row in found["worst"]] == [4, 9, 2, 6, 1]
        assert [row["loss"] for row in found["worst"]][:3] == ["NaN", "NaN", "Infinity"]
        assert found["loss"] == "NaN"


def test_the_weights_are_not_replaced(files, run):
    before = Path("weight.npy").read_bytes()
    for option in ("--output", "--resume"):
        status, out, err = run("score", "logits.npy", "targets.npy", "--weight", "weight.npy", option, "./weight.npy")
        assert (status, out) == (2, "")
        assert err == f"{ERROR}weight.npy: is read by this run, expected another file for --output or --resume\n"
    assert Path("weight.npy").read_bytes() == before


def test_perplexity_overflow_is_infinite(files, report):
    np.save("x.npy", np.array([[0.0, 1000.0]], np.float32))
    np.save("t.npy", np.array([0]))
    found = report("x.npy", "t.npy")
    assert (found["loss"], found["perplexity"]) == (1000.0, "Infinity")


def test_all_rows_ignored(files, run, report):
    np.save("t.npy", np.full(200, -100))
    found = report("logits.npy", "t.npy")
    assert (found["loss"], found["kept"], found["worst"]) == ("NaN", 0, [])
    _, out, _ = run("score", "logits.npy", "t.npy")
    assert "200 (200 ignored)" in out


# ------------------------------------------------------------------------------------------------- .npz files


def test_npz_members(files, report, refused):
    logits, targets = np.load("logits.npy"), np.load("targets.npy")
    loss = report("logits.npy", "targets.npy")["loss"]
    np.savez("both.npz", logits=logits, labels=targets, more=np.zeros(3))
    np.savez("odd.npz", a=logits, b=targets)
    np.savez_compressed("one.npz", x=logits)
    np.savez("weights.npz", weight=np.ones(7))
    for arguments in (
        ["both.npz"],
        ["both.npz:logits"],
        ["both.npz", "both.npz"],
        ["both.npz", "targets.npy"],
        ["logits.npy", "both.npz"],
        ["odd.npz:a", "odd.npz:b"],
        ["one.npz", "odd.npz:b"],
        ["one.npz:x", "targets.npy", "--weight", "weights.npz"],
    ):
        assert report(*arguments)["loss"] == loss
    assert refused("odd.npz") == "odd.npz: holds a, b; say which one are the logits, as odd.npz:NAME"
    assert refused("odd.npz:a") == "odd.npz: holds a, b; say which one are the targets, as odd.npz:NAME"
    assert refused("odd.npz:c", "targets.npy") == "odd.npz: no member c, holds a, b"
    both = "holds one array; expected TARGETS too, or one .npz file with logits and targets"
    assert refused("one.npz") == f"one.npz: {both}"
    assert refused("logits.npy") == f"logits.npy: {both}"


# ------------------------------------------------------------------------------------------------- damaged files


def _with_bytes(content):
    return lambda path: path.write_bytes(content)


def _npy_of(array, **options):
    return lambda path: np.save(path, array, **options)


def _truncated_npy(path):
    np.save(path, np.zeros((200, 7), np.float32))
    path.write_bytes(path.read_bytes()[:-1])


def _npz_bytes(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _corrupt_npz(path):
    content = bytearray(_npz_bytes(logits=np.zeros((200, 7), np.float32)))
    content[2000] ^= 0xFF
    path.write_bytes(content)


def _npz_without_arrays(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(_with_bytes(b""), "the file is empty", id="empty"),
        pytest.param(_with_bytes(b"1,2,3\n"), "neither a .npy nor a .npz file", id="text"),
        pytest.param(_with_bytes(pickle.dumps([1])), "neither a .npy nor a .npz file", id="pickle"),
        pytest.param(_with_bytes(b"\x93NUMPY"), "cannot be read, truncated or damaged (", id="magic alone"),
        pytest.param(_with_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'"), "cannot be read, truncated", id="half a header"),
        pytest.param(_truncated_npy, "cannot be read, truncated or damaged (", id="truncated"),
        pytest.param(
            _with_bytes(_npz_bytes(logits=np.zeros(9))[:150]), "cannot be read, truncated", id="truncated npz"
        ),
        pytest.param(_corrupt_npz, "cannot be read, truncated or damaged (Bad CRC-32", id="corrupt npz"),
        pytest.param(_with_bytes(_npz_bytes()), "holds nothing", id="npz of nothing"),
        pytest.param(_npz_without_arrays, "not an array", id="npz of text"),
        pytest.param(_npy_of(np.array([None, 1]), allow_pickle=True), "cannot be read", id="objects"),
        pytest.param(_npy_of(np.zeros((200, 7), "V2")), "dtype |V2, which is how bfloat16 is saved", id="bfloat16"),
        pytest.param(_npy_of(np.zeros((200, 7), complex)), "got dtype complex128, expected float16", id="complex"),
        pytest.param(_npy_of(np.zeros((200, 7), "U3")), "got dtype <U3, expected float16", id="strings"),
        pytest.param(_npy_of(np.zeros((200, 7), "f4,f4")), "got dtype [(", id="records"),
        pytest.param(_npy_of(np.float32(1)), "got a 0-d array, expected shape (C)", id="0-d"),
        pytest.param(_npy_of(np.zeros((200, 0))), "got shape (200, 0), expected at least one class", id="no class"),
    ],
)
def test_bad_logits(files, refused, make, message):
    make(files / "bad.npy")
    assert refused("bad.npy", "targets.npy").startswith(f"bad.npy: {message}")


def test_bfloat16_of_ml_dtypes(files, refused):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    np.save("bf16.npy", np.zeros((200, 7), ml_dtypes.bfloat16))
    assert "bfloat16" in refused("bf16.npy", "targets.npy")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.zeros(199, int), "got shape (199,) for input of shape (200, 7), expected (200,) (class indices)"),
        (np.zeros(200), "got dtype float64, expected an integer dtype or bool for class indices"),
        (np.zeros((200, 7), int), "got dtype int64 with the shape of input, which means class probabilities"),
        (np.arange(200), "got 7 at 7, expected a class in [0, 6] or ignore_index=-100"),
        (np.r_[np.zeros(150, int), -1, np.zeros(49, int)], "got -1 at 150, expected a class in [0, 6]"),
    ],
)
def test_bad_targets(files, monkeypatch, refused, targets, message):
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 10 * (7 * 4 + 8))
    np.save("bad.npy", targets)
    assert refused("logits.npy", "bad.npy").startswith(f"bad.npy: {message}")


def test_position_of_a_bad_target_in_several_dimensions(files, monkeypatch, refused):
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 1)
    np.save("x.npy", np.zeros((5, 7, 3, 2), np.float32))
    targets = np.zeros((5, 3, 2), np.int16)
    targets[3, 2, 1] = 300
    np.save("t.npy", targets)
    assert refused("x.npy", "t.npy").startswith("t.npy: got 300 at (3, 2, 1), expected")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(6), "got shape (6,), expected (7,): one weight per class"),
        (np.ones(7, complex), "got dtype complex128, expected a real dtype"),
    ],
)
def test_bad_weight(files, refused, weight, message):
    np.save("w.npy", weight)
    assert refused("logits.npy", "targets.npy", "--weight", "w.npy") == f"w.npy: {message}"


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
def test_files_that_are_none(files, refused):
    os.mkfifo("pipe")
    assert refused("pipe", "targets.npy") == "pipe: not a regular file"
    assert refused(".", "targets.npy").startswith(".: several files, expected one, as targets.npy is")
    Path("none").mkdir()
    assert refused("none", "none") == "none: a directory without files to score"
    assert refused("logits.npy/x", "targets.npy") == "logits.npy/x: Not a directory"
    assert refused("missing.npz:logits", "targets.npy") == "missing.npz: No such file or directory"
    assert refused("logits.npy", "targets.npy", "--weight", "none.npy") == "none.npy: No such file or directory"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(files, refused):
    Path("logits.npy").chmod(0)
    assert refused("logits.npy", "targets.npy") == "logits.npy: Permission denied"


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label-smoothing", "1.5"], "--label-smoothing: got 1.5, expected a number in [0, 1]"),
        (["--label-smoothing", "nan"], "--label-smoothing: got nan, expected a number in [0, 1]"),
        (
            ["--label-smoothing", "x"],
            "argument --label-smoothing: invalid float value: 'x' (see fastloss score --help)",
        ),
        (["--label-smoothing", "0.1", "--log-probs"], "--label-smoothing: not with --log-probs"),
        (["--ignore-index", "1.5"], "argument --ignore-index: invalid int value: '1.5'"),
        (["--reduction", "median"], "argument --reduction: invalid choice: 'median'"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (
            ["--max-memory", "9" * 400],
            "argument --max-memory: invalid size: '99999999999999999999'..., expected a smaller",
        ),
    ],
)
def test_bad_options(files, refused, arguments, message):
    assert refused("logits.npy", "targets.npy", *arguments).startswith(message)


def test_probabilities_have_no_ignore_index(files, refused):
    np.save("soft.npy", np.full((200, 7), 1 / 7, np.float32))
    message = refused("logits.npy", "soft.npy", "--ignore-index", "1")
    assert message.startswith("--ignore-index: got 1 with class probabilities")
    assert refused("logits.npy", "soft.npy", "--log-probs").startswith("soft.npy: got shape (200, 7)")


def test_no_command(run):
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err == f"{ERROR}the following arguments are required: COMMAND (see fastloss --help)\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--version"], f"fastloss {fastloss.__version__}\n"), (["score", "--help"], "usage: fastloss score")],
)
def test_version_and_help(run, capsys, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(expected)


def test_no_reduction_in_the_table(files, run):
    status, out, _ = run("score", "logits.npy", "targets.npy", "--reduction", "none")
    assert status == 0
    assert "cross-entropy  not reduced" in out


# ------------------------------------------------------------------------------------------------- --output


def test_output_is_replaced(files, report):
    Path("out.npy").write_text("old")
    report("logits.npy", "targets.npy", "--output", "out.npy")
    assert np.load("out.npy").shape == (200,)
    assert listing() == ["logits.npy", "out.npy", "targets.npy", "weight.npy"]


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_output_through_a_link(files, report):
    Path("real.npy").write_text("old")
    Path("link.npy").symlink_to("real.npy")
    report("logits.npy", "targets.npy", "--output", "link.npy")
    assert Path("link.npy").is_symlink()
    assert np.load("real.npy").shape == (200,)


def _out_of_memory(*_):
    raise MemoryError("Unable to allocate 1 TiB")


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("patch", "status", "message"),
    [
        (None, 2, f"{ERROR}bad.npy: got 99 at 180, expected a class in [0, 6] or ignore_index=-100\n"),
        (_out_of_memory, 2, f"{ERROR}logits.npy: out of memory (Unable to allocate 1 TiB)\n"),
        (_interrupted, 130, ""),
    ],
)
def test_output_survives_a_failure(files, monkeypatch, run, existing, patch, status, message):
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 10 * (7 * 4 + 8))
    targets = np.load("targets.npy")
    targets[180] = 99
    np.save("bad.npy", targets)
    if existing:
        Path("out.npy").write_text("old")
    if patch:
        monkeypatch.setattr(scoring._Run, "_find_worst", patch)
    before = listing()
    assert run("score", "logits.npy", "bad.npy", "--output", "out.npy") == (status, "", message)
    assert listing() == before
    assert not existing or Path("out.npy").read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
def test_output_that_cannot_be_written(files, refused):
    def message(output):
        return refused("logits.npy", "targets.npy", "--output", output)

    assert message("none/out.npy") == "none/out.npy: No such file or directory"
    assert message("logits.npy/out.npy") == "logits.npy/out.npy: Not a directory"
    assert message(".") == ".: not a regular file"
    assert message("/dev/null") == "/dev/null: not a regular file"
    assert message("x" * 300) == f"{'x' * 300}: File name too long"
    assert listing() == ["logits.npy", "targets.npy", "weight.npy"]


# ------------------------------------------------------------------------------------------------- progress


@pytest.fixture
def score_at_terminal(files, monkeypatch):
    """Score with standard error being a pseudo-terminal, and return what was written to it."""
    pty = pytest.importorskip("pty")
    pytest.importorskip("tqdm")
    termios = pytest.importorskip("termios")
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))  # tqdm shows nothing on a terminal of no rows
    os.set_blocking(reader, False)

    def score():
        with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            assert cli.main(["score", "logits.npy", "targets.npy"]) == 0
            stream.flush()
            try:
                return os.read(reader, 1 << 16).decode()
            except BlockingIOError:
                return ""

    yield score
    os.close(reader)


def slow_chunks(monkeypatch, seconds):
    """Make the rows come ten at a time, each ten taking some seconds of the clock that tqdm sees."""
    clock = [0.0]
    score = scoring._Run._score

    def slow_score(*arguments):
        clock[0] += seconds
        score(*arguments)

    monkeypatch.setattr(scoring._Run, "_score", slow_score)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 10 * (7 * 4 + 8))


def test_progress_bar_after_a_second(score_at_terminal, monkeypatch):
    slow_chunks(monkeypatch, 0.4)
    shown = score_at_terminal()
    assert "30.0/200" in shown
    assert "20.0/200" not in shown
    assert "row/s" in shown


def test_no_progress_bar_within_a_second(score_at_terminal, monkeypatch):
    slow_chunks(monkeypatch, 0.04)
    assert score_at_terminal().strip() == ""


def test_no_progress_bar_without_tqdm(score_at_terminal, monkeypatch):
    slow_chunks(monkeypatch, 0.4)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert score_at_terminal() == ""


def test_no_progress_bar_without_a_terminal(files, monkeypatch, run):
    pytest.importorskip("tqdm")
    slow_chunks(monkeypatch, 0.4)
    status, _, err = run("score", "logits.npy", "targets.npy")
    assert (status, err) == (0, "")
