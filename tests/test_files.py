"""Scoring files: shards, bounded memory, runs that are killed and go on, files that are missing or damaged.

The losses are compared with one call over all rows, and with float64 formulas in ``test_cli.py``. What happens to a
process (memory, SIGKILL) is tried in processes of their own.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastloss
from fastloss import cli, files
from fastloss.files import ScoreError

# 1.2 rows of 50 classes per KiB, whatever is counted besides.
N_CLASSES = 50


@pytest.fixture
def shards(tmp_path, rng, monkeypatch):
    """Ten pairs of shards of 20 rows, with numbers that do not sort as text, in the current directory; all their rows."""
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    Path("t").mkdir()
    logits, targets = rng.normal(0, 9, (200, 7)).astype(np.float32), rng.integers(0, 7, 200)
    targets[::9] = -100
    for i, rows in enumerate(np.split(np.arange(200), 10), start=1):
        np.save(f"x/part-{i}.npy", logits[rows])
        np.save(f"t/part-{i}.npy", targets[rows])
    return logits, targets


def chunks_of(monkeypatch, n_rows, row_bytes=7 * 4):
    monkeypatch.setattr(files, "CHUNK_BYTES", n_rows * (row_bytes + files._ROW_BYTES))


def same(got, expected):
    assert type(got) is type(expected)
    assert got.tobytes() == expected.tobytes()


class TestShards:
    @pytest.mark.parametrize(
        ("x", "t"),
        [
            ("x", "t"),
            ("x/*.npy", "t/*.npy"),
            ("x/part-*.npy", "t"),
            (Path("x"), "[t]/part-*.npy"),
            ([f"x/part-{i}.npy" for i in range(1, 11)], [Path(f"t/part-{i}.npy") for i in range(1, 11)]),
        ],
        ids=str,
    )
    def test_many_files_are_one(self, shards, monkeypatch, x, t):
        logits, targets = shards
        if t == "[t]/part-*.npy":
            x = "[x]/part-*.npy"  # (what the wildcards stand for has to be the same)
            t = "[t]/part-*.npy"
            os.rename("t", "x/t"), os.rename("x", "u"), os.rename("u/t", "t"), os.rename("u", "x")
            x, t = "?/part-*.npy", "t/part-*.npy"
            pytest.importorskip("numpy")
            x, t = "x/part-*.np[y]", "t/part-*.np?"
        chunks_of(monkeypatch, 7)
        found = fastloss.score_file(x, t, details=True, output="out.npy")
        same(found.loss, fastloss.cross_entropy(logits, targets))
        same(np.load("out.npy"), fastloss.cross_entropy(logits, targets, reduction="none"))
        assert (found.n_rows, found.n_kept, found.n_classes) == (200, (targets >= 0).sum(), 7)
        assert found.n_shards == found.n_scored_shards == 10
        assert found.n_correct == (logits.argmax(1) == targets).sum()
        losses = np.load("out.npy")
        assert [row.loss for row in found.worst] == sorted(losses.tolist(), reverse=True)[:5]
        for row in found.worst:
            number = int(row.file.removeprefix("x/part-").removesuffix(".npy"))
            assert losses[20 * (number - 1) + row.position[0]] == row.loss
