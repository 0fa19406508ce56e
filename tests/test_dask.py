"""The losses over dask arrays: the bits of one call, lazily, on threads and on worker processes, one of which dies."""

import doctest
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastloss
from fastloss import metrics

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")
import fastloss.dask  # noqa: E402


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


def same(got, expected):
    assert type(got) is type(expected)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    np.testing.assert_equal(got, expected)


SHAPES = {
    (60, 7): [(60, 7), (13, 7), (13, 3), (1, 7)],
    (6, 7, 5, 4): [(2, 7, 5, 4), (2, 7, 2, 3), (1, 4, 2, 3)],
    (7,): [(7,), (2,)],
    (0, 7): [(5, 7)],
}
CASES = [(shape, chunks) for shape, cuts in SHAPES.items() for chunks in cuts]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("shape", "chunks"), CASES)
class TestSameBits:
    def test_cross_entropy_of_class_indices(self, rng, shape, chunks, reduction):
        logits = (9 * rng.normal(size=shape)).astype(np.float32)
        targets = np.asarray(rng.integers(0, 7, shape[:1] + shape[2:] if shape[1:] else ()))
        if targets.ndim:
            targets[:1] = -100
        options = {"weight": rng.uniform(size=7), "label_smoothing": 0.1, "reduction": reduction}
        x = da.from_array(logits, chunks)
        t = da.from_array(targets)
        lazy = fastloss.dask.cross_entropy(x, t, **options)
        expected = fastloss.cross_entropy(logits, targets, **options)
        assert isinstance(lazy, da.Array)
        assert (lazy.dtype, lazy.shape) == (expected.dtype, expected.shape)
        same(lazy.compute(), expected)

    def test_cross_entropy_of_class_probabilities(self, rng, shape, chunks, reduction):
        logits = rng.normal(size=shape).astype(np.float32)
        targets = rng.uniform(size=shape)
        x, t = da.from_array(logits, chunks), da.from_array(targets, chunks[::-1] if len(chunks) < 2 else -1)
        lazy = fastloss.dask.cross_entropy(x, t, reduction=reduction)
        same(lazy.compute(), fastloss.cross_entropy(logits, targets, reduction=reduction))

    def test_nll_loss(self, rng, shape, chunks, reduction):
        log_p = -rng.uniform(size=shape)
        targets = np.asarray(rng.integers(0, 7, shape[:1] + shape[2:] if shape[1:] else ()))
        lazy = fastloss.dask.nll_loss(da.from_array(log_p, chunks), targets, reduction=reduction)
        same(lazy.compute(), fastloss.nll_loss(log_p, targets, reduction=reduction))

    @pytest.mark.filterwarnings("ignore:reduction='mean' divides:UserWarning")
    def test_kl_div(self, rng, shape, chunks, reduction):
        log_q, p = -rng.uniform(size=shape), rng.uniform(size=shape[-1:])
        lazy = fastloss.dask.kl_div(da.from_array(log_q, chunks), p, reduction=reduction)
        same(lazy.compute(), fastloss.kl_div(log_q, p, reduction=reduction))


class TestOthers:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("chunks", [(100, 3), (17, 1)])
    def test_log_loss(self, rng, chunks, weighted, normalize):
        proba = rng.dirichlet(np.ones(3), 100)
        y = np.array(["a", "b", "c"])[rng.integers(0, 3, 100)]
        weight = rng.uniform(size=100) if weighted else None
        options = {"labels": ["a", "b", "c"], "normalize": normalize}
        expected = metrics.log_loss(y, proba, sample_weight=weight, **options)
        lazy = fastloss.dask.log_loss(
            da.from_array(y, chunks=30),
            da.from_array(proba, chunks),
            sample_weight=None if weight is None else da.from_array(weight, chunks=40),
            **options,
        )
        got = lazy.compute()
        assert got == expected
        assert lazy.dtype == got.dtype == np.float64
        assert fastloss.dask.log_loss(list(y), proba, sample_weight=weight, **options).compute() == expected

    def test_log_loss_of_two_classes_and_of_an_indicator_matrix(self, rng):
        p, y = rng.uniform(size=50), rng.integers(0, 2, 50)
        assert fastloss.dask.log_loss(y, da.from_array(p, chunks=7)).compute() == metrics.log_loss(y, p)
        proba, hot = rng.dirichlet(np.ones(3), 50), np.eye(3, dtype=int)[rng.integers(0, 3, 50)]
        lazy = fastloss.dask.log_loss(da.from_array(hot, chunks=(9, 2)), da.from_array(proba, chunks=(7, 2)))
        assert lazy.compute() == metrics.log_loss(hot, proba)

    def test_batchmean_and_deprecated_options(self, rng):
        log_q, p = -rng.uniform(size=(20, 3)), rng.uniform(size=(20, 3))
        x = da.from_array(log_q, chunks=(7, 2))
        lazy = fastloss.dask.kl_div(x, p, reduction="batchmean", log_target=True)
        same(lazy.compute(), fastloss.kl_div(log_q, p, reduction="batchmean", log_target=True))
        with pytest.warns(UserWarning, match="batchmean"):
            fastloss.dask.kl_div(x, p)
        with pytest.warns(UserWarning, match="deprecated") as caught:
            lazy = fastloss.dask.cross_entropy(x, np.zeros(20, int), size_average=False)
        assert caught[0].filename == __file__
        same(lazy.compute(), fastloss.cross_entropy(log_q, np.zeros(20, int), reduction="sum"))

    def test_weights_that_cancel(self, rng):
        logits, targets = rng.normal(size=(20, 3)), np.arange(20) % 2
        options = {"weight": [1.0, -1.0, 2.0], "label_smoothing": 0.2}
        lazy = fastloss.dask.cross_entropy(da.from_array(logits, chunks=(3, 3)), targets, **options)
        same(lazy.compute(), fastloss.cross_entropy(logits, targets, **options))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_chunks_of_unknown_length(self, rng, reduction):
        logits, targets = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
        x, t = da.from_array(logits, chunks=(7, 3)), da.from_array(targets, chunks=7)
        keep = targets != 1
        lazy = fastloss.dask.cross_entropy(x[t != 1], t[t != 1], reduction=reduction)
        same(lazy.compute(), fastloss.cross_entropy(logits[keep], targets[keep], reduction=reduction))

    def test_many_blocks_become_a_tree(self):
        x = da.zeros((1000, 2), chunks=(1, 2))
        lazy = fastloss.dask.cross_entropy(x, da.zeros(1000, dtype=int, chunks=1))
        graph = lazy.__dask_graph__()
        assert max(len(parents) for parents in graph.dependents.values()) < 10
        widest = max(len(list(parents)) for key, parents in dask.core.get_deps(dict(graph))[0].items())
        assert widest <= 16
        same(lazy.compute(), np.log(2.0))

    def test_nothing_is_computed_before_it_is_asked_for(self):
        def fail(block):
            raise AssertionError("computed")

        x = da.zeros((10, 3), chunks=(5, 3)).map_blocks(fail, dtype=float, meta=np.empty((0, 0)))
        for reduction in ("mean", "none"):
            fastloss.dask.cross_entropy(x, np.zeros(10, int), reduction=reduction)


class TestErrors:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("function", [fastloss.dask.cross_entropy, fastloss.dask.nll_loss])
    def test_a_target_out_of_range_is_named_when_it_is_computed(self, function, reduction):
        targets = np.zeros((10, 4), int)
        targets[7, 2] = 3
        x = da.zeros((10, 3, 4), chunks=(3, 3, 2))
        lazy = function(x, targets, reduction=reduction)
        with pytest.raises(IndexError, match=r"^target: got 3 at \(7, 2\), expected a class in \[0, 2\] or ignore"):
            lazy.compute()
        lazy = function(x[:, :, 0], targets[:, 2], reduction=reduction)
        with pytest.raises(IndexError, match=r"^target: got 3 at 7, expected"):
            lazy.compute()

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((np.zeros((4, 3)), np.zeros(5, int)), {}, ValueError, r"target: got shape \(5,\)"),
            ((np.zeros((4, 3)), np.zeros(4)), {}, TypeError, "target: got dtype float64"),
            ((np.zeros((4, 3)), np.zeros((4, 3), int)), {}, TypeError, "which means class probabilities"),
            ((np.zeros((4, 3), complex), np.zeros(4, int)), {}, TypeError, "input: got dtype complex128"),
            ((np.zeros((4, 3)), np.zeros(4, int)), {"weight": [1.0]}, ValueError, r"weight: got shape \(1,\)"),
            ((np.zeros((4, 3)), np.zeros(4, int)), {"reduction": "max"}, ValueError, "reduction: got 'max'"),
            ((np.zeros((4, 3)), np.zeros(4, int)), {"label_smoothing": 2}, ValueError, "label_smoothing: got 2"),
            ((np.zeros((4, 0)), np.zeros(4, int)), {}, ValueError, "expected at least one class"),
        ],
    )
    def test_what_is_wrong_is_said_at_once(self, arguments, options, error, message):
        with pytest.raises(error, match=message):
            fastloss.dask.cross_entropy(*map(da.from_array, arguments), **options)

    def test_other_functions(self):
        with pytest.raises(ValueError, match=r"target: got shape \(2,\), expected one that broadcasts"):
            fastloss.dask.kl_div(da.zeros((4, 3)), da.zeros(2), reduction="sum")
        keep = np.arange(20) % 3 > 0
        some_rows = da.zeros((20, 3), chunks=(5, 3))[da.from_array(keep, chunks=5)]
        with pytest.raises(ValueError, match=r"^target: got 2 chunks along axis 0, expected 4.*compute_chunk_sizes"):
            fastloss.dask.cross_entropy(some_rows, da.zeros(20, dtype=int, chunks=10)[da.from_array(keep, chunks=10)])
        with pytest.raises(ValueError, match=r"y_true: got shape \(3,\)"):
            fastloss.dask.log_loss(da.zeros(3, dtype=int), da.zeros((4, 3)))
        lazy = fastloss.dask.log_loss(da.full(4, 7), da.full((4, 2), 0.5))
        with pytest.raises(ValueError, match=r"y_true contains values \{7\}"):
            lazy.compute()


def test_examples_run():
    results = doctest.testmod(fastloss.dask)
    assert results.failed == 0
    assert results.attempted > 0


def test_dask_is_imported_by_its_users_alone():
    code = "import sys, fastloss, fastloss.streaming, fastloss.cli; print('dask' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def _die_once(block, flag):
    """Kill the process that computes the block whose first element is 1, the first time."""
    if block.flat[0] == 1 and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return block


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_cluster_one_of_whose_two_workers_dies(rng, tmp_path):
    distributed = pytest.importorskip("distributed")
    logits, targets = rng.normal(size=(400, 30)).astype(np.float32), rng.integers(0, 30, 400)
    logits[::40, 0] = np.arange(10)
    flag = tmp_path / "died"
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "60s", "scheduler": None}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path), silence_logs=50
        ) as cluster,
        distributed.Client(cluster, timeout=60) as client,
    ):
        pids = set(client.run(os.getpid).values())
        x = da.from_array(logits, chunks=(40, 15)).rechunk((40, 30))
        x = x.map_blocks(_die_once, flag=str(flag), dtype=np.float32, meta=np.empty((0, 0), np.float32))
        t = da.from_array(targets, chunks=40)
        mean = fastloss.dask.cross_entropy(x, t)
        rows = fastloss.dask.cross_entropy(x, t, reduction="none")
        got, losses = (future.result(timeout=90) for future in client.compute([mean, rows]))
        assert flag.exists()
        assert len(pids) == 2
        assert set(client.run(os.getpid).values()) != pids
    same(got, fastloss.cross_entropy(logits, targets))
    same(losses, fastloss.cross_entropy(logits, targets, reduction="none"))
