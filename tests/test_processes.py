"""Threads, forks, pools, neighbours and Ctrl-C: real processes, under every threading layer and number of threads."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastloss import _cache, _runtime

SITUATIONS = Path(__file__).with_name("situations.py")


def _place_of_tbb():
    """The directory of a TBB that Numba can use; the package of that name puts it where no linker looks by itself."""
    path = Path(sys.prefix, "lib", "libtbb.so.12")
    try:
        library = ctypes.CDLL(str(path) if path.exists() else path.name)
    except OSError:
        return None
    return str(path.parent) if library.TBB_runtime_interface_version() >= 12060 else None


TBB = _place_of_tbb()
LAYERS = ["workqueue", "omp", *(["tbb"] if TBB else [])]
# Numba's lines when another thread forks than the one that started TBB, and when one that used TBB has not quite ended.
FORKED = (
    "Numba: Attempted to fork from a non-main thread, the TBB library may be in an invalid state in the child process."
)
UNJOINED = "Unable to join threads to shut down before fork(). This can break multithreading in child processes."


@pytest.mark.parametrize("n_threads", [1, 2, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_situations(layer, n_threads):
    environment = {
        **os.environ,
        "NUMBA_THREADING_LAYER": layer,
        "NUMBA_NUM_THREADS": str(n_threads),
        "FASTLOSS_CACHE_DIR": str(_cache.directory().parent),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if layer == "tbb":
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (TBB, os.environ.get("LD_LIBRARY_PATH"))))
    # (Python 3.12 and later warn of any fork of a process with threads.)
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", str(SITUATIONS)]
    command.append("all" if n_threads == 2 else "few")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    errors, printed = result.stderr, result.stdout
    if layer == "tbb":
        errors, printed = errors.replace(f"{FORKED}\n", ""), printed.replace(f"{UNJOINED}\n\n", "")
    assert (result.returncode, errors, printed) == (0, "", f"{layer} done\n")


class _Kernel:
    """Stands for a kernel, and sees who is in it."""

    def __init__(self):
        self.inside = self.most_inside = 0
        self.serial_threads, self.parallel_threads = set(), set()

    def serial(self, n_workers, caller):
        assert n_workers == 1
        assert threading.get_ident() == caller
        self.serial_threads.add(caller)

    def parallel(self, n_workers, caller):
        assert n_workers == 2
        self.parallel_threads.add(caller)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        time.sleep(0.02)
        self.inside -= 1


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(_runtime, "num_threads", lambda: 2)
    monkeypatch.setattr(_runtime, "_layer", "omp")


def _sixteen(kernel):
    start = threading.Barrier(16)

    def call():
        start.wait()
        _runtime.run(kernel, 1 << 30, 8, threading.get_ident())

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("two_threads")
def test_a_parallel_region_is_never_entered_twice():
    kernel = _Kernel()
    _sixteen(kernel)
    assert kernel.most_inside == 1
    assert kernel.serial_threads
    assert len(kernel.serial_threads | kernel.parallel_threads) == 16


@pytest.mark.usefixtures("two_threads")
def test_workqueue_is_left_alone_while_there_are_other_threads(monkeypatch):
    monkeypatch.setattr(_runtime, "_layer", "workqueue")
    kernel = _Kernel()
    _sixteen(kernel)
    assert not kernel.parallel_threads


@pytest.mark.usefixtures("two_threads")
def test_the_region_is_left_after_an_exception_and_an_interrupt():
    class Interrupted(_Kernel):
        def parallel(self, n_workers, caller):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _runtime.run(Interrupted(), 1 << 30, 8, None)
    _runtime._region.acquire()  # an interrupt between taking the region and leaving it
    kernel = _Kernel()
    _runtime.run(kernel, 1 << 30, 8, threading.get_ident())
    assert kernel.parallel_threads == {threading.get_ident()}
    _sixteen(kernel)
    assert len(kernel.parallel_threads) > 1


def test_a_layer_that_cannot_be_loaded_means_no_threads():
    code = "import fastloss, numpy as np; print(fastloss.logsumexp(np.zeros((2000, 100), np.float32)))\n"
    code += "from fastloss import _runtime; print(_runtime.layer())"
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "nonsense", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "12.206073\nnone\n")


# A fork while another thread imports Numba, which calls LLVM meanwhile.
FORK_BESIDE_AN_IMPORT_OF_NUMBA = """
import fastloss, os, sys, threading, time
thread = threading.Thread(target=__import__, args=("numba",))
thread.start()
while not hasattr(sys.modules.get("llvmlite.binding.ffi"), "lib"):
    time.sleep(0.0005)
pid = os.fork()
if pid == 0:
    import numba
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
thread.join()
"""

# A fork while another thread imports a module that is still being looked for.
FORK_BESIDE_A_SEARCH_FOR_A_MODULE = """
import fastloss, numpy, os, sys, threading, time
searching = threading.Event()
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "numpy.no_such_module":
            searching.set()
            time.sleep(0.2)
sys.meta_path.insert(0, Finder())
def search():
    try:
        import numpy.no_such_module
    except ModuleNotFoundError:
        return
    raise AssertionError
thread = threading.Thread(target=search)
thread.start()
searching.wait()
pid = os.fork()
if pid == 0:
    search()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
thread.join()
"""

# A fork by a thread that is importing a module for which the importing thread waits: neither can wait for the other.
FORK_INSIDE_AN_IMPORT = """
import fastloss, importlib.util, os, sys, threading, time
importing = threading.Event()
class Loader:
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        if module.__name__ == "numba":
            other.start()
            importing.wait()
            time.sleep(0.1)
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        else:
            importing.set()
            import numba
class Finder:
    def find_spec(self, name, path, target=None):
        if name in ("numba", "llvmlite"):
            return importlib.util.spec_from_loader(name, Loader())
sys.meta_path.insert(0, Finder())
other = threading.Thread(target=__import__, args=("llvmlite",))
import numba
other.join()
"""


# A child killed while it holds the lock that Numba, when it starts its threads, shares with all forks of the process.
FORK_KILLED_IN_NUMBA = """
import fastloss, numba, numpy, os, signal
from numba.np.ufunc import parallel
fastloss.logsumexp(numpy.zeros((2000, 100), numpy.float32), 1)
pid = os.fork()
if pid == 0:
    parallel._backend_init_process_lock.__enter__()
    os.kill(os.getpid(), signal.SIGKILL)
assert os.waitpid(pid, 0)[1] == signal.SIGKILL
numba.get_num_threads()
"""

FORKS = {
    "beside an import of Numba": FORK_BESIDE_AN_IMPORT_OF_NUMBA,
    "beside a search for a module": FORK_BESIDE_A_SEARCH_FOR_A_MODULE,
    "inside an import": FORK_INSIDE_AN_IMPORT,
    "killed in Numba": FORK_KILLED_IN_NUMBA,
}


@pytest.mark.parametrize("code", FORKS.values(), ids=FORKS)
def test_forks(code):
    code = "import faulthandler; faulthandler.dump_traceback_later(50, exit=True)\n" + code
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        output = process.communicate(timeout=100)
    assert (process.returncode, *output) == (0, "", "")
