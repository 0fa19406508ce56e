"""The cache of compiled kernels: each hazard by real processes. The answer comes, right, and nothing is on stderr."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastloss
from fastloss import _cache

# The mean of -log 0.7 and -log 0.8, then how often the kernel was found in the cache, and how often not.
VALUE = "0.28991"
CODE = """
import numpy as np
import fastloss
x = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32))
print(round(float(fastloss.nll_loss(x, [0, 2])), 5))
from fastloss._kernels.gather import nll
print(sum(nll.serial.stats.cache_hits.values()), sum(nll.serial.stats.cache_misses.values()))
"""
HIT, MISS = f"{VALUE}\n1 0\n", f"{VALUE}\n0 1\n"
PACKAGE = Path(fastloss.__file__).parent


def _start(cache, before="", path=None, code=CODE, **environment):
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path)] * (path is not None) + sys.path)}
    if cache is not None:
        # (Without optimisation, what the other tests have no use for is compiled in half the time.)
        variables.update(FASTLOSS_CACHE_DIR=str(cache), NUMBA_OPT="0")
    variables.update(environment)
    command = [sys.executable, "-c", before + code]
    # (Python puts the current directory in front of PYTHONPATH.)
    return subprocess.Popen(command, env=variables, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _output(process):
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    return out


def run(cache, *args, **options):
    return _output(_start(cache, *args, **options))


def kernels(cache):
    return sorted(Path(cache).rglob("*.kernel"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A directory into which six processes have compiled at once."""
    place = tmp_path_factory.mktemp("warm")
    processes = [_start(place) for _ in range(6)]
    for process in processes:
        assert _output(process) in (MISS, HIT)  # the last to start may find what the first has written
    return place


@pytest.fixture
def cache(warm, tmp_path):
    return Path(shutil.copytree(warm, tmp_path / "cache"))


def test_six_processes_fill_one_directory(warm):
    assert len(kernels(warm)) == 1
    assert [path for path in warm.rglob("*") if path.is_file()] == kernels(warm)
    assert run(warm) == HIT


# log 0.7; and 0.25 log(0.25 / 0.7) + 0.25 log(0.25 / 0.2) + 0.5 log(0.5 / 0.1).
PREAMBLE = """
import numpy as np
import fastloss
x = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
"""
LOG_SOFTMAX = ("print(round(float(fastloss.log_softmax(x)[0, 0]), 5))\n", "-0.35667\n")
DIVERGENCE = (
    "print(round(float(fastloss.kl_div(x[0], np.float32([0.25, 0.25, 0.5]), reduction='sum')), 5))\n",
    "0.6031\n",
)


def test_kernels_that_two_processes_have_compiled_keep_their_own_functions(tmp_path):
    """Their closures have the same names and signatures, and once had the same symbols: one called the other's."""
    for calls in ([LOG_SOFTMAX], [DIVERGENCE], [LOG_SOFTMAX, DIVERGENCE]):
        code = PREAMBLE + "".join(call for call, _ in calls)
        assert run(tmp_path, code=code) == "".join(value for _, value in calls)


def _empty(path):
    path.write_bytes(b"")


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _belong_to_another_user(path):
    path.chmod(0o666)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        path.chmod(0o644)


def _be_writable_by_the_group(path):
    path.chmod(0o664)


def _be_writable_by_all(path):
    path.chmod(0o646)


@pytest.mark.parametrize(
    "damage",
    [_empty, _truncate, _flip, _belong_to_another_user, _be_writable_by_the_group, _be_writable_by_all],
)
def test_a_damaged_or_foreign_file_is_compiled_again(cache, damage):
    (path,) = kernels(cache)
    damage(path)
    assert run(cache) == MISS
    assert run(cache) == HIT
    assert kernels(cache) == [path]


def test_where_the_group_may_write_nothing_is_loaded_nor_kept(cache):
    """Another user could have put a file of this one's there, under whatever name."""
    (path,) = kernels(cache)
    data = path.read_bytes()
    path.parent.chmod(0o775)
    assert run(cache) == MISS
    path.unlink()
    assert run(cache) == MISS
    assert kernels(cache) == []
    path.parent.chmod(0o755)
    path.write_bytes(data)
    assert run(cache) == HIT


def test_a_file_under_the_name_of_another_is_not_loaded(cache):
    (path,) = kernels(cache)
    name = path.name.replace(path.stem[-4:], "0000")
    path.rename(path.with_name(name))
    shutil.copy(path.with_name(name), path)  # whole, but one that was renamed is not
    assert run(cache) == HIT
    _cache_of = _cache.DiskCache("nll-serial")
    data = path.read_bytes()
    assert data[:32] == _cache_of._digest(path, data[32:]) != _cache_of._digest(path.with_name(name), data[32:])


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null"])
def test_no_place_to_write(place):
    assert run(place) == MISS


def test_no_home_directory(tmp_path):
    before = "import os, os.path; os.path.expanduser = lambda path: path\n"
    before += f"os.chdir({str(tmp_path)!r})\n"
    variables = {"FASTLOSS_CACHE_DIR": "", "NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": ""}
    assert run(None, before, **variables) == MISS
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path):
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
    assert run(tmp_path, before) == MISS
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_read_only_installation(cache, tmp_path):
    """In a zip file, which nobody can write into; its kernels are the same, and so the cache serves it."""
    archive = tmp_path / "installed.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in PACKAGE.rglob("*.py"):
            file.write(path, path.relative_to(PACKAGE.parent))
    before = "import fastloss; assert 'installed.zip' in fastloss.__file__\n"
    assert run(cache, before, archive) == HIT


def test_a_changed_kernel_file_is_compiled_again(cache, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "changed" / "fastloss", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "changed/fastloss/_kernels/tiles.py").open("a") as file:
        file.write("# changed\n")
    assert run(cache, path=tmp_path / "changed") == MISS
    assert len(kernels(cache)) == 2
    assert run(cache) == HIT


def test_another_cpu_has_its_own_code_and_right_values(cache):
    code = CODE.replace("np.float32))", "np.float16))").replace(", 5))\n", ", 3))\n")
    before = "import numba; assert numba.config.CPU_NAME == 'generic'\n"
    got = run(cache, before, code=code, NUMBA_CPU_NAME="generic")
    assert got == "0.29\n0 1\n"
    assert run(cache, NUMBA_CPU_NAME="generic") == MISS
    assert len(kernels(cache)) == 3


@pytest.mark.parametrize("what", ["fastloss.__version__", "numpy.__version__", "numba.__version__"])
def test_versions_are_part_of_the_stamp(monkeypatch, what):
    before = _cache.stamp.__wrapped__()
    monkeypatch.setattr(what, "0.0.1")
    assert _cache.stamp.__wrapped__() != before


def test_the_place_is_what_was_set(tmp_path):
    code = "from fastloss import _forks; _forks.runtime(); from fastloss import _cache; print(_cache.directory())"
    given, numbas, xdg = tmp_path / "given", tmp_path / "numba", tmp_path / "xdg"
    variables = {"FASTLOSS_CACHE_DIR": str(given), "NUMBA_CACHE_DIR": str(numbas), "XDG_CACHE_HOME": str(xdg)}
    for expected in (given / "fastloss", numbas / "fastloss", xdg / "fastloss"):
        assert run(None, code=code, **variables) == f"{expected}\n"
        variables[next(name for name, value in variables.items() if value)] = ""


# --------------------------------------------------------------------------------------------- warmup and info


def _command(*arguments, cache=None, **environment):
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    if cache is not None:
        variables.update(FASTLOSS_CACHE_DIR=str(cache), NUMBA_OPT="0")
    command = [sys.executable, "-m", "fastloss", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=500, check=False)


def test_warmup_compiles_every_loss_once():
    """Into the cache of this test run, which needs these kernels anyway; where there are threads and where not."""
    first, second = _command("warmup", NUMBA_NUM_THREADS="1"), _command("warmup")
    assert (first.returncode, first.stderr) == (second.returncode, second.stderr) == (0, "")
    assert re.fullmatch(r"\d+ kernels in the cache\n", second.stdout)
    code = """
import numpy as np
import fastloss
from numba.core import event
x, t = np.ones((5000, 50), np.float32), np.zeros(5000, int)
with event.install_recorder("numba:compile") as compiled:
    for n in (10, 5000):
        fastloss.cross_entropy(x[:n], t[:n])
        fastloss.cross_entropy(x[:n, :5], t[:n], np.ones(5))
        fastloss.cross_entropy(x[:n], t[:n], label_smoothing=0.5)
        fastloss.cross_entropy(x[:n], x[:n])
        fastloss.nll_loss(x[:n], t[:n])
        fastloss.kl_div(x[:n], x[:n], reduction="none")
        fastloss.softmax(x[:n]), fastloss.log_softmax(x[:n], 0), fastloss.logsumexp(x[:n])
    row, t = np.ones((1, 400_000), np.float32), t[:1]
    fastloss.cross_entropy(row, t)
    fastloss.cross_entropy(row, t, label_smoothing=0.5)
    fastloss.cross_entropy(row, row)
    fastloss.softmax(row), fastloss.log_softmax(row), fastloss.logsumexp(row)
print(len(compiled.buffer))
"""
    assert run(None, code=code) == "0\n"


def test_warmup_without_a_place():
    result = _command("warmup", "--dtype", "float99")
    assert result.returncode == 2


def test_info(cache):
    result = _command("info", cache=cache)
    assert (result.returncode, result.stderr) == (0, "")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines())
    assert lines["fastloss"] == fastloss.__version__
    assert lines["NumPy"] == np.__version__
    assert lines["cache"] == str(cache / "fastloss")
    size = kernels(cache)[0].stat().st_size
    assert lines["cached"] == f"1 kernels of this version, {size / 1e6:.1f} MB in all"
    assert set(lines) >= {"Numba", "llvmlite", "Python", "CPU", "vector width", "threading layer", "threads", "system"}
