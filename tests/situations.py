"""What a process that uses fastloss goes through, as a script: ``situations.py all`` or ``situations.py few``.

tests/test_processes.py runs it under every threading layer and number of threads. It prints the layer and "done".
"""

import asyncio
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback

import numpy as np

ROWS, CLASSES = 1500, 100
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(ROWS, CLASSES)).astype(np.float32)
TARGETS = RNG.integers(0, CLASSES, ROWS)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def check(which=None):
    """Losses of enough elements for a parallel region, against float64 formulas of NumPy."""
    import fastloss

    reference = log_softmax(LOGITS)
    own = -reference[np.arange(ROWS), TARGETS]
    checks = (
        lambda: (fastloss.cross_entropy(LOGITS, TARGETS), own.mean()),
        lambda: (fastloss.cross_entropy(LOGITS, TARGETS, reduction="none"), own),
        lambda: (fastloss.nll_loss(np.repeat(reference, 4, 0), np.repeat(TARGETS, 4), reduction="sum"), 4 * own.sum()),
        lambda: (fastloss.logsumexp(LOGITS, 1), (LOGITS - reference)[:, 0]),
    )
    for i in range(len(checks)) if which is None else (which % len(checks),):
        got, expected = checks[i]()
        np.testing.assert_allclose(got, expected, rtol=2e-5)
    return os.getpid()


def fork(function):
    """Run a function in a forked child."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status


def fork_before_import_of_fastloss(other):
    """Another library has started the threads; the child is the first to import fastloss."""
    other(np.ones(1000))
    assert "fastloss" not in sys.modules
    fork(check)


def threads_from_the_first_call_on():
    """Sixteen threads at once, and forks meanwhile: during the import of Numba, the loading of code and the losses."""
    import fastloss  # noqa: F401 (without Numba)

    failures = []

    def work(i):
        try:
            check(i)
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        fork(check)
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def forks():
    """After use, in a forked child, and from a thread that is not the main one."""
    check()
    fork(check)
    fork(lambda: (check(), fork(check)))
    thread = threading.Thread(target=fork, args=(check,))
    thread.start()
    check()
    thread.join()


def executors():
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(check, range(8))) == {os.getpid()}
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert os.getpid() not in set(pool.map(check, range(4)))

    async def gather():
        return await asyncio.gather(*(asyncio.to_thread(check, i) for i in range(4)))

    assert set(asyncio.run(gather())) == {os.getpid()}


def process_pools():
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert os.getpid() not in pool.map(check, range(2))


def joblib_pools():
    try:
        import joblib
    except ImportError:
        return
    for backend in ("threading", "loky"):
        joblib.Parallel(n_jobs=2, backend=backend)(joblib.delayed(check)(i) for i in range(4))


def beside_torch():
    try:
        import torch
    except ImportError:
        return
    n_threads = torch.get_num_threads()
    x, t = torch.tensor(LOGITS), torch.tensor(TARGETS)
    for _ in range(2):
        torch.nn.functional.cross_entropy(x, t)
        check()
    fork(check)
    assert torch.get_num_threads() == n_threads


def beside_another_numba_library(other):
    """Its parallel loops in one thread, ours in others."""
    values, ends = np.ones(100_000), time.monotonic() + 0.5
    wrong = []

    def work():
        while time.monotonic() < ends:
            if other(values) != len(values):
                wrong.append("theirs")

    def ours():
        while time.monotonic() < ends:
            check(0)

    threads = [threading.Thread(target=f) for f in (work, ours, ours)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def threads_as_the_user_set_them():
    import numba

    most = numba.get_num_threads()
    for n in {1, most}:
        numba.set_num_threads(n)
        check()
        assert numba.get_num_threads() == n
    numba.set_num_threads(most)


def interrupt():
    """Ctrl-C during a call that takes many seconds, measured in processor time: the machine may be busy."""
    import fastloss
    from fastloss import _runtime

    n_rows = 1 << 27
    logits = np.broadcast_to(LOGITS[0], (n_rows, CLASSES))
    targets = np.broadcast_to(TARGETS[0], n_rows)
    fastloss.cross_entropy(logits[:10000], targets[:10000])
    before = signal.signal(signal.SIGPROF, signal.default_int_handler)
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 0.3)
    try:
        fastloss.cross_entropy(logits, targets)
    except KeyboardInterrupt:
        took = time.process_time() - started
    else:
        raise AssertionError("not interrupted")
    signal.signal(signal.SIGPROF, before)
    assert took < 0.3 + _runtime.num_threads(), took
    check()
    free = []

    def enter():
        free.append(_runtime._region.acquire(blocking=False))
        _runtime._region.release()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert free == [True]


def start_method_still_open():
    """Numba settles multiprocessing's start method when it starts its threads; through fastloss it does not."""
    assert multiprocessing.get_start_method(allow_none=True) is None
    check()
    assert multiprocessing.get_start_method(allow_none=True) is None


def main(everything):
    fork(start_method_still_open)
    fork(threads_from_the_first_call_on)
    import numba

    @numba.njit(parallel=True)
    def other(values):
        total = 0.0
        for i in numba.prange(len(values)):
            total += values[i]
        return total

    fork(lambda: fork_before_import_of_fastloss(other))
    threads_from_the_first_call_on()
    forks()
    interrupt()
    fork(interrupt)
    threads_as_the_user_set_them()
    beside_another_numba_library(other)
    executors()
    if everything:
        process_pools()
        joblib_pools()
        beside_torch()
        forks()
    from fastloss import _runtime

    print(_runtime.layer(), "done")


if __name__ == "__main__":
    main(sys.argv[1] == "all")
