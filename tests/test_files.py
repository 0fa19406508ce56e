"""Scoring files: shards, bounded memory, runs that are killed and go on, files that are missing or damaged.

The losses are compared with one call over all rows, and with float64 formulas in ``test_cli.py``. What happens to a
process (memory, SIGKILL) is tried in processes of their own.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastloss
from fastloss import cli, files
from fastloss.files import ScoreError

ERROR = "fastloss: error: "


@pytest.fixture
def shards(tmp_path, rng, monkeypatch):
    """Ten pairs of shards of 20 rows, numbered so that they do not sort as text; all their rows."""
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    Path("t").mkdir()
    logits, targets = rng.normal(0, 9, (200, 7)).astype(np.float32), rng.integers(0, 7, 200)
    targets[::9] = -100
    for i, rows in enumerate(np.split(np.arange(200), 10), start=1):
        np.save(f"x/part-{i}.npy", logits[rows])
        np.save(f"t/part-{i}.npy", targets[rows])
    return logits, targets


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven rows of seven float32 at a time."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 7 * (7 * 4 + 8))


def same(got, expected):
    assert type(got) is type(expected)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.tobytes() == expected.tobytes()


def listing():
    return sorted(path.name for path in Path().iterdir())


class TestShards:
    @pytest.mark.parametrize(
        ("x", "t"),
        [
            ("x", "t"),
            ("x/*.npy", "t/*.npy"),
            ("x/part-*.npy", "t"),
            (Path("x"), "[!x]/part-*.np?"),
            ("x/part-[1-9]*.npy", "t/part-[1-9]*.npy"),
            ("**/x/part-*.npy", "**/t/part-*.npy"),
            ([f"x/part-{i}.npy" for i in range(1, 11)], [Path(f"t/part-{i}.npy") for i in range(1, 11)]),
        ],
        ids=str,
    )
    def test_many_files_are_one(self, shards, x, t):
        logits, targets = shards
        found = fastloss.score_file(x, t, details=True, output="out.npy")
        same(found.loss, fastloss.cross_entropy(logits, targets))
        losses = np.load("out.npy")
        same(losses, fastloss.cross_entropy(logits, targets, reduction="none"))
        assert (found.n_rows, found.n_kept, found.n_classes) == (200, (targets >= 0).sum(), 7)
        assert found.n_shards == found.n_scored_shards == 10
        assert found.n_correct == (logits.argmax(1) == targets).sum()
        assert [row.loss for row in found.worst] == sorted(losses.tolist(), reverse=True)[:5]
        for row in found.worst:
            number = int(row.file.removeprefix("x/part-").removesuffix(".npy"))
            assert losses[20 * (number - 1) + row.position[0]] == row.loss

    def test_the_members_of_archives(self, shards):
        logits, targets = shards
        Path("both").mkdir()
        for i, rows in enumerate(np.split(np.arange(200), 4)):
            np.savez(f"both/{i}.npz", logits=logits[rows], labels=targets[rows], other=targets[rows])
        expected = fastloss.cross_entropy(logits, targets)
        same(fastloss.score_file("both").loss, expected)
        same(fastloss.score_file("both/*.npz:logits", "both/*.npz:other").loss, expected)
        with pytest.raises(ScoreError, match=r"both/0.npz: logits takes \d+ bytes .* more than the 1000 allowed"):
            fastloss.score_file("both", max_memory=1000)

    def test_the_columns_of_parquet_and_arrow_files(self, shards):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        logits, targets = shards
        for place in ("p", "a"):
            Path(place).mkdir()
        for i, rows in enumerate(np.split(np.arange(200), 4)):
            matrix = arrow.FixedSizeListArray.from_arrays(logits[rows].reshape(-1), 7)
            table = arrow.table({"id": rows, "logits": matrix, "labels": targets[rows]})
            parquet.write_table(table, f"p/{i}.parquet", row_group_size=30)
            with arrow.OSFile(f"a/{i}.arrow", "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=30)
            lists = arrow.table({"logits": matrix.cast(arrow.list_(arrow.float32()))})
            parquet.write_table(lists, f"p/lists-{i}.parquet")
        expected = fastloss.cross_entropy(logits, targets)
        same(fastloss.score_file("p/?.parquet").loss, expected)
        same(fastloss.score_file("a").loss, expected)
        same(fastloss.score_file("p/?.parquet:logits", "a/?.arrow:labels").loss, expected)
        same(fastloss.score_file("p/lists-?.parquet", "a/?.arrow:labels").loss, expected)
        for name in ("p/0.parquet", "a/0.arrow"):
            with pytest.raises(ScoreError, match=rf"{name}: logits takes \d+ bytes of memory"):
                fastloss.score_file(name, max_memory=1000)
        ragged = arrow.table({"logits": arrow.array([[1.0, 2.0], [3.0]]), "labels": arrow.array([0, None])})
        parquet.write_table(ragged, "ragged.parquet")
        with pytest.raises(ScoreError, match=r"ragged.parquet: logits has lists of several lengths"):
            fastloss.score_file("ragged.parquet")
        with pytest.raises(ScoreError, match=r"ragged.parquet: labels has missing values"):
            fastloss.score_file("ragged.parquet:labels", "x/part-1.npy")
        truncate("p/0.parquet")
        with pytest.raises(ScoreError, match=r"p/0.parquet: cannot be read, truncated or damaged"):
            fastloss.score_file("p/0.parquet")

    def test_columns_that_are_no_matrix(self, shards):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        lists = arrow.list_(arrow.float32())
        rows = arrow.array([[[1.0, 2.0], [3.0]], [[1.0], [2.0, 3.0]]], arrow.list_(lists))
        nested = arrow.table({"logits": rows, "labels": arrow.array([0, 1])})
        parquet.write_table(nested, "nested.parquet")
        with pytest.raises(
            ScoreError, match=r"nested.parquet: logits holds list<.*>, expected numbers or lists of num"
        ):
            fastloss.score_file("nested.parquet")
        labels = arrow.array([], arrow.int64())
        parquet.write_table(arrow.table({"logits": arrow.array([], lists), "labels": labels}), "empty.parquet")
        with pytest.raises(
            ScoreError, match=r"empty.parquet: logits has no lists, whose length would be the number of"
        ):
            fastloss.score_file("empty.parquet")
        fixed = arrow.array([], arrow.list_(arrow.float32(), 7))
        parquet.write_table(arrow.table({"logits": fixed, "labels": labels}), "x/part-11.parquet")
        np.save("t/part-11.npy", np.zeros(0, int))
        found = fastloss.score_file("x", "t")
        assert (found.n_scored_shards, found.n_rows) == (11, 200)

    @pytest.mark.parametrize("compression", ["none", "zstd"])
    def test_the_memory_of_a_column_is_what_it_takes_decoded(self, tmp_path, monkeypatch, compression):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        monkeypatch.chdir(tmp_path)
        matrix = arrow.FixedSizeListArray.from_arrays(np.zeros(80_000), 8)
        table = arrow.table({"logits": matrix, "labels": np.zeros(10_000, int)})
        parquet.write_table(table, "x.parquet", compression=compression)
        options = arrow.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
        with arrow.OSFile("x.arrow", "wb") as sink, arrow.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=1000)
        assert Path("x.parquet").stat().st_size < 20_000
        for name in ("x.parquet", "x.arrow"):
            with pytest.raises(ScoreError, match=rf"{name}: logits takes \d+ bytes of memory"):
                fastloss.score_file(name, max_memory=1_000_000)
            assert fastloss.score_file(name, max_memory=1_500_000).loss == np.log(8.0)

    def test_shards_of_one_name(self, shards):
        np.savez("x/part-3.npz", np.zeros((20, 7)))
        with pytest.raises(
            ScoreError, match=r"x/part-3.npz: has the name of x/part-3.npy, by which its targets are found"
        ):
            fastloss.score_file("x", "t")
        with pytest.raises(ScoreError, match=r"has the name of x/part-3.npy"):
            fastloss.score_file("x/part-*", "t")

    def test_shards_follow_one_another_in_the_order_of_their_numbers(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        names = ["1-2", "1-10", "2-1", "11-0", "011-0"]
        for i, name in enumerate(names):
            np.save(f"x-{name}.npy", np.array([[0.0, i]]))
            np.save(f"t-{name}.npy", np.array([0]))
        fastloss.score_file("x-*-*.npy", "t-*-*.npy", output="out.npy")
        order = [0, 1, 2, 4, 3]  # equal numbers by their digits
        np.testing.assert_allclose(np.load("out.npy"), np.log1p(np.exp(order)))

    @pytest.mark.parametrize("pattern", ["{}[^1].npy", ".//{}[12].npy", "{}[!0].npy", ".//.//{}?.npy"])
    def test_patterns_are_those_of_the_shell(self, tmp_path, monkeypatch, pattern):
        monkeypatch.chdir(tmp_path)
        for name in ("x", "t"):
            for i in "12^":
                np.save(f"{name}{i}.npy", np.zeros((1, 2)) if name == "x" else np.zeros(1, int))
        expected = len(list(Path().glob(pattern.format("x").rpartition("/")[2])))
        assert fastloss.score_file(pattern.format("x"), pattern.format("t")).n_scored_shards == expected > 1

    @pytest.mark.parametrize("pattern", ["x[z-a].npy", "x[a--b].npy"])
    def test_patterns_that_nothing_matches(self, shards, pattern):
        with pytest.raises(ScoreError, match=r"no file of that pattern"):
            fastloss.score_file(pattern, pattern)

    def test_shards_of_one_row_without_an_axis(self, tmp_path, rng, monkeypatch):
        monkeypatch.chdir(tmp_path)
        logits = rng.normal(size=(5, 4))
        for i, rows in enumerate((0, 1, slice(2, 4), 4)):
            np.save(f"x{i}.npy", logits[rows])
            np.save(f"t{i}.npy", np.zeros(logits[rows].shape[:-1], int))
        fastloss.score_file("x*.npy", "t*.npy", output="out.npy")
        same(np.load("out.npy"), fastloss.cross_entropy(logits, [0] * 5, reduction="none"))

    @pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64])
    def test_ignore_index_beyond_the_dtype_of_the_targets(self, tmp_path, monkeypatch, dtype):
        monkeypatch.chdir(tmp_path)
        np.save("x.npy", np.zeros((3, 2)))
        np.save("t.npy", np.array([0, 1, 1], dtype))
        found = fastloss.score_file("x.npy", "t.npy", ignore_index=1 << 63, details=True)
        assert (found.n_kept, found.n_correct) == (3, 1)

    def test_parquet_without_pyarrow(self, shards, monkeypatch):
        Path("x.parquet").write_bytes(b"PAR1" * 9)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ScoreError, match=r"x.parquet: Parquet and Arrow files are read by pyarrow"):
            fastloss.score_file("x.parquet")

    @pytest.mark.parametrize("chunk", [1, 100, 1000, 1 << 20])
    @pytest.mark.parametrize("shape", [(5, 7, 6, 4, 2), (3, 7, 40), (2, 7, 0), (0, 7), (7,)])
    def test_chunks_of_any_shape(self, tmp_path, rng, monkeypatch, shape, chunk):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
        logits = rng.normal(size=shape)
        targets = np.asarray(rng.integers(0, 7, shape[:1] + shape[2:] if len(shape) > 1 else ()))
        np.save("x.npy", logits)
        np.save("t.npy", targets)
        found = fastloss.score_file("x.npy", "t.npy", output="out.npy", details=True, reduction="sum")
        same(found.loss, fastloss.cross_entropy(logits, targets, reduction="sum"))
        same(np.load("out.npy"), np.asarray(fastloss.cross_entropy(logits, targets, reduction="none")))
        losses = np.load("out.npy")
        assert [losses[row.position] for row in found.worst] == sorted(losses.reshape(-1), reverse=True)[:5]

    def test_options(self, shards):
        logits, targets = shards
        weight = np.linspace(0, 2, 7)
        options = {"weight": weight, "label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum"}
        for i in range(1, 11):
            np.save(f"t/part-{i}.npy", np.maximum(np.load(f"t/part-{i}.npy"), 0))
        found = fastloss.score_file("x", "t", **options)
        same(found.loss, fastloss.cross_entropy(logits, np.maximum(targets, 0), **options))
        assert found.n_correct is None
        assert found.worst == ()
        assert np.isnan(found.accuracy)
        options.pop("label_smoothing")
        same(
            fastloss.score_file("x", "t", log_probs=True, **options).loss,
            fastloss.nll_loss(logits, np.maximum(targets, 0), **options),
        )

    def test_class_probabilities(self, shards, rng):
        logits, _ = shards
        soft = rng.dirichlet(np.ones(7), 200)
        for i, rows in enumerate(np.split(np.arange(200), 10), start=1):
            np.save(f"t/part-{i}.npy", soft[rows])
        found = fastloss.score_file("x", "t", details=True, output="out.npy")
        same(found.loss, fastloss.cross_entropy(logits, soft))
        same(np.load("out.npy"), fastloss.cross_entropy(logits, soft, reduction="none"))
        assert found.n_correct == (logits.argmax(1) == soft.argmax(1)).sum()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"log_probs": True, "label_smoothing": 0.1}, ValueError, "label_smoothing: got 0.1 with log_probs"),
            ({"reduction": "none"}, ValueError, "reduction: got 'none', expected one of 'mean', 'sum'"),
            ({"max_memory": 0}, ValueError, "max_memory: got 0"),
            ({"max_memory": 1.5}, TypeError, "max_memory: got 1.5, expected an integer"),
            ({"weight": np.ones(6)}, ValueError, r"weight: got shape \(6,\)"),
        ],
    )
    def test_bad_options(self, shards, options, error, message):
        with pytest.raises(error, match=message):
            fastloss.score_file("x", "t", **options)

    @pytest.mark.parametrize(
        ("x", "t", "message"),
        [
            ("x", "t/part-1.npy", "x: several files, expected one, as t/part-1.npy is"),
            ("y*", "t", "y*: no file of that pattern"),
            ("none.npy", "t/part-1.npy", "none.npy: No such file or directory"),
            ("a" * 300, "t/part-1.npy", f"{'a' * 300}: File name too long"),
            ("", "t/part-1.npy", ".: not a regular file"),
        ],
    )
    def test_bad_paths(self, shards, x, t, message):
        with pytest.raises(ScoreError) as caught:
            fastloss.score_file(x, t)
        assert str(caught.value).startswith(message)


class TestPlaces:
    """What is written takes the place of nothing that is read."""

    @pytest.mark.parametrize("option", ["output", "resume"])
    @pytest.mark.parametrize("place", ["x/part-3.npy", "./x/../t/part-9.npy", "link.npy"])
    def test_a_file_that_is_read(self, shards, option, place):
        Path("link.npy").symlink_to("x/part-3.npy")
        before = {path: path.read_bytes() for path in Path().rglob("*.npy")}
        with pytest.raises(ScoreError, match=f"^{re.escape(place)}: is read by this run, expected another file for"):
            fastloss.score_file("x", "t", **{option: place})
        assert {path: path.read_bytes() for path in Path().rglob("*.npy")} == before

    def test_a_shard_of_the_next_run(self, shards):
        for place in ("x/losses.npy", "t/losses.npy"):
            with pytest.raises(ScoreError, match=rf"^{place}: would be a shard of {place[0]}, expected another direct"):
                fastloss.score_file("x", "t", output=place)
        fastloss.score_file("x", "t", output="x/.losses.npy", resume="x/state")
        fastloss.score_file("x/part-*.npy", "t/part-*.npy", output="x/losses.npy")

    def test_one_file_for_both(self, shards):
        with pytest.raises(ScoreError, match=r"^both: got for output and for resume, expected two files"):
            fastloss.score_file("x", "t", output="both", resume="./both")

    def test_hidden_files_are_no_shards(self, shards):
        Path("x/.part-11.npy").write_bytes(b"not scored")
        assert fastloss.score_file("x", "t").n_shards == 10

    @pytest.mark.parametrize("paths", [3, b"x", [], [3], np.zeros((2, 3)), {"a": 1}.values()])
    def test_no_paths(self, shards, paths):
        for name, arguments in (("logits", (paths, "t")), ("targets", ("x", paths))):
            with pytest.raises(TypeError, match=f"^{name}: got .*, expected a path or a sequence of paths"):
                fastloss.score_file(*arguments)
        for name in ("output", "resume"):
            with pytest.raises(TypeError, match=f"^{name}: got .*, expected a path$"):
                fastloss.score_file("x", "t", **{name: paths})

    def test_lists_of_two_lengths(self, shards):
        with pytest.raises(ScoreError, match=r"^x/part-2.npy: no targets at its place in a list of 1"):
            fastloss.score_file(["x/part-1.npy", "x/part-2.npy"], ["t/part-1.npy"])


def save_as(version):
    def save(path, array):
        with Path(path).open("wb") as file:
            np.lib.format.write_array(file, array, version)

    return save


class TestFormats:
    """What a ``.npy`` file may hold, and how."""

    LAYOUTS = (
        np.asfortranarray,
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: np.asfortranarray(x.astype(x.dtype.newbyteorder())),
    )

    @pytest.mark.parametrize("lay_out", LAYOUTS, ids=["fortran", "big_endian", "big_endian_fortran"])
    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "u1", "?"])
    @pytest.mark.parametrize("shape", [(90, 7), (4, 7, 3, 11)])
    def test_layouts_and_dtypes(self, tmp_path, rng, monkeypatch, shape, dtype, lay_out):
        monkeypatch.chdir(tmp_path)
        logits = (abs(rng.normal(0, 3, shape))).astype(dtype)
        targets = rng.integers(0, 7, shape[:1] + shape[2:])
        np.save("x.npy", lay_out(logits))
        np.save("t.npy", lay_out(targets))
        found = fastloss.score_file("x.npy", "t.npy", output="out.npy", details=True)
        same(found.loss, fastloss.cross_entropy(logits, targets))
        same(np.load("out.npy"), fastloss.cross_entropy(logits, targets, reduction="none"))
        assert found.n_correct == (logits.argmax(1) == targets).sum()
        for row in found.worst:
            assert (row.target, row.predicted) == (
                targets[row.position],
                np.moveaxis(logits, 1, -1)[row.position].argmax(),
            )

    @pytest.mark.parametrize("version", [(1, 0), (2, 0)])
    def test_versions_of_the_format(self, shards, version):
        logits, targets = shards
        save_as(version)("x.npy", logits)
        save_as(version)("t.npy", targets)
        with Path("x.npy").open("ab") as file:
            file.write(b"more")
        same(fastloss.score_file("x.npy", "t.npy").loss, fastloss.cross_entropy(logits, targets))

    @pytest.mark.parametrize(
        ("save", "array", "message"),
        [
            (save_as((3, 0)), np.zeros((3, 2)), "version (3, 0) of the format, expected one of (1, 0), (2, 0)"),
            (save_as((1, 0)), np.array([[None]]), "an array of Python objects"),
        ],
        ids=["version", "objects"],
    )
    def test_what_is_refused(self, shards, save, array, message):
        save("x.npy", array)
        with pytest.raises(ScoreError) as caught:
            fastloss.score_file("x.npy", "t/part-1.npy")
        assert str(caught.value) == f"x.npy: cannot be read, truncated or damaged ({message})"

    @pytest.mark.parametrize("size", [1, 5, 6, 9, 60, 127, 128, 687])
    def test_a_file_cut_anywhere(self, shards, size):
        os.truncate("x/part-1.npy", size)
        with pytest.raises(ScoreError, match=r"^x/part-1.npy: (cannot be read, truncated or damaged|neither a .npy)"):
            fastloss.score_file("x", "t")


@pytest.mark.parametrize("n_threads", [1, 2])
def test_threads_leave_the_bits(tmp_path, rng, monkeypatch, n_threads):
    numba = pytest.importorskip("numba")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 20)  # parallel ones
    logits, targets = rng.normal(0, 9, (3000, 257)).astype(np.float32), rng.integers(0, 257, 3000)
    np.save("x.npy", logits)
    np.save("t.npy", targets)
    expected = fastloss.cross_entropy(logits, targets)
    before = numba.get_num_threads()
    numba.set_num_threads(min(n_threads, before))
    try:
        found = fastloss.score_file("x.npy", "t.npy", details=True).loss
        assert numba.get_num_threads() == min(n_threads, before)
    finally:
        numba.set_num_threads(before)
    same(found, expected)
    assert float(found) == pytest.approx(reference_mean(logits, targets), rel=2e-6)


def reference_mean(logits, targets):
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), targets])


def truncate(path):
    Path(path).write_bytes(Path(path).read_bytes()[:-1])


def remove(path):
    Path(path).unlink()


def exceed(path):
    targets = np.load(path)
    targets[17] = 7
    np.save(path, targets)


DAMAGE = [
    (lambda: truncate("x/part-4.npy"), "x/part-4.npy: cannot be read, truncated or damaged ("),
    (lambda: Path("t/part-4.npy").write_text("hello"), "t/part-4.npy: neither a .npy nor a .npz file"),
    (lambda: remove("x/part-4.npy"), "t/part-4.npy: no logits of that name in x"),
    (lambda: remove("t/part-4.npy"), "x/part-4.npy: no targets of that name in t"),
    (lambda: np.save("x/part-4.npy", np.zeros((20, 6), np.float32)), "x/part-4.npy: got a chunk with classes 6"),
    (lambda: np.save("x/part-4.npy", np.zeros((0, 6), np.float32)), "t/part-4.npy: got shape (20,) for input"),
    (lambda: np.save("x/part-4.npy", np.zeros((20, 7))), "x/part-4.npy: got a chunk with dtype float64, expected"),
    (lambda: exceed("t/part-4.npy"), "t/part-4.npy: got 7 at 17, expected a class in [0, 6]"),
    (lambda: np.save("t/part-4.npy", np.zeros(19, int)), "t/part-4.npy: got shape (19,) for input of shape (20, 7)"),
]


class TestDamage:
    @pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
    def test_what_was_scored_before_a_bad_shard_is_not_lost(self, shards, capsys, damage, message):
        logits, targets = shards
        held = {name: Path(name).read_bytes() for name in ("x/part-4.npy", "t/part-4.npy")}
        damage()
        before = listing()
        with pytest.raises(ScoreError) as caught:
            fastloss.score_file("x", "t", output="lost.npy")
        assert str(caught.value).startswith(message)
        assert listing() == before
        scores = caught.value.scores
        n_scored = scores.n_rows
        assert scores.n_scored_shards == 3
        same(scores.loss, fastloss.cross_entropy(logits[:n_scored], targets[:n_scored]))

        command = ["score", "x", "t", "--resume", "state", "--output", "out.npy"]
        assert cli.main(command) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"{ERROR}{message}")
        assert err.endswith(f"(before it: 3 shards, {n_scored} rows, mean loss {scores.mean})\n")
        assert err.count("\n") == 1
        assert not Path("out.npy").exists()

        for name, content in held.items():
            Path(name).write_bytes(content)
        for name in (f"{kind}/part-{i}.npy" for i in range(1, 4) for kind in "xt"):  # they are not read again
            status = Path(name).stat()
            with Path(name).open("r+b") as file:
                file.seek(128)
                file.write(b"\7" * (status.st_size - 128))
            os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert cli.main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == float(fastloss.cross_entropy(logits, targets))
        same(np.load("out.npy"), fastloss.cross_entropy(logits, targets, reduction="none"))

    def test_a_file_that_is_truncated_while_it_is_read(self, shards, monkeypatch):
        score = files._Run._score

        def score_and_truncate(run, pair, *arguments):
            if pair.logits == "x/part-4.npy":
                os.truncate(pair.logits, 200)
            score(run, pair, *arguments)

        monkeypatch.setattr(files._Run, "_score", score_and_truncate)
        with pytest.raises(ScoreError, match=r"x/part-4.npy: truncated while it was read"):
            fastloss.score_file("x", "t")

    def test_a_shard_that_does_not_fit_an_option_is_named(self, shards):
        np.save("x/part-4.npy", np.zeros((20, 9)))
        with pytest.raises(ScoreError, match=r"x/part-4.npy: weight: got shape \(7,\), expected \(9,\)") as caught:
            fastloss.score_file("x", "t", weight=np.ones(7))
        assert caught.value.scores.n_scored_shards == 3
        np.save("x/part-4.npy", np.zeros((20, 7)))
        for i in range(1, 11):
            np.save(f"t/part-{i}.npy", np.ones((20, 7)) if i == 4 else np.ones(20, int))
        with pytest.raises(ScoreError, match=r"x/part-4.npy: ignore_index: got 0 with class probabilities") as caught:
            fastloss.score_file("x", "t", ignore_index=0)
        assert caught.value.scores.n_scored_shards == 3

    def test_rows_that_cannot_follow_each_other(self, shards):
        np.save("x/part-4.npy", np.zeros((20, 7, 2), np.float32))
        np.save("t/part-4.npy", np.zeros((20, 2), int))
        assert fastloss.score_file("x", "t").n_rows == 220
        with pytest.raises(ScoreError, match=r"out.npy: rows of shape \(20, 2\) cannot follow those of shape \(20,\)"):
            fastloss.score_file("x", "t", output="out.npy")


def stop_after(monkeypatch, n_chunks, error=KeyboardInterrupt):
    """Interrupt the scoring of a chunk."""
    score = files._Run._score
    count = iter(range(n_chunks))

    def score_or_stop(*arguments):
        if next(count, None) is None:
            raise error
        score(*arguments)

    monkeypatch.setattr(files._Run, "_score", score_or_stop)


class TestResume:
    @pytest.mark.parametrize("n_chunks", [1, 3, 4, 29])
    def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(self, shards, monkeypatch, n_chunks):
        logits, targets = shards
        options = {"output": "out.npy", "resume": "state", "details": True}
        with monkeypatch.context() as patch:
            stop_after(patch, n_chunks)
            with pytest.raises(KeyboardInterrupt):
                fastloss.score_file("x", "t", **options)
        assert not Path("out.npy").exists()
        monkeypatch.setattr(files, "CHUNK_BYTES", 400)  # (the bits do not depend on it)
        count = iter(range(1000))
        score = files._Run._score
        monkeypatch.setattr(files._Run, "_score", lambda *a: (next(count), score(*a)))
        found = fastloss.score_file("x", "t", **options)
        assert found == fastloss.score_file("x", "t", details=True)
        same(found.loss, fastloss.cross_entropy(logits, targets))
        same(np.load("out.npy"), fastloss.cross_entropy(logits, targets, reduction="none"))
        assert listing() == ["out.npy", "state", "t", "x"]
        assert Path("state").stat().st_size < 5000

    def test_a_finished_run_is_not_scored_again(self, shards, monkeypatch):
        options = {"output": "out.npy", "resume": "state"}
        found = fastloss.score_file("x", "t", **options)
        stop_after(monkeypatch, 0)
        assert fastloss.score_file("x", "t", **options) == found

    def test_more_shards_may_follow(self, shards, rng):
        logits, targets = shards
        fastloss.score_file("x", "t", resume="state")
        np.save("x/part-11.npy", logits[:9])
        np.save("t/part-11.npy", targets[:9])
        expected = fastloss.cross_entropy(np.r_[logits, logits[:9]], np.r_[targets, targets[:9]])
        same(fastloss.score_file("x", "t", resume="state").loss, expected)

    def test_rows_of_images(self, tmp_path, rng, monkeypatch):
        monkeypatch.chdir(tmp_path)
        logits, targets = rng.normal(size=(3, 7, 5, 4)), rng.integers(0, 7, (3, 5, 4))
        np.save("x.npy", logits)
        np.save("t.npy", targets)
        for n_chunks in range(1, 8):
            with monkeypatch.context() as patch:
                patch.setattr(files, "CHUNK_BYTES", 8 * (7 * 8 + 8))
                stop_after(patch, n_chunks)
                with pytest.raises(KeyboardInterrupt):
                    fastloss.score_file("x.npy", "t.npy", output="out.npy", resume="state")
            monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 20)
            found = fastloss.score_file("x.npy", "t.npy", output="out.npy", resume="state")
            same(found.loss, fastloss.cross_entropy(logits, targets))
            same(np.load("out.npy"), fastloss.cross_entropy(logits, targets, reduction="none"))
            Path("state").unlink()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ignore_index": 1}, "ignore_index -100, where this one has 1"),
            ({"label_smoothing": 0.5}, "label_smoothing 0.0, where this one has 0.5"),
            ({"weight": np.ones(7)}, "weight None, where this one has"),
            ({"log_probs": True}, "function cross_entropy, where this one has nll_loss"),
            ({"output": "out.npy"}, "output None, where this one has"),
            ({"logits": "y"}, "x/part-1.npy and .*t/part-1.npy, where this one has other files"),
            (
                {"targets": [f"t/part-{i}.npy" for i in (1, 2, 4, 3, 5, 6, 7, 8, 9, 10)]},
                "where this one has other files",
            ),
            ({"logits": "x/part-1.npy", "targets": "t/part-1.npy"}, "where this one has other files"),
        ],
    )
    def test_a_state_of_other_inputs_or_options_is_refused(self, shards, change, message):
        fastloss.score_file("x", "t", resume="state")
        Path("y").mkdir()
        for path in Path("x").iterdir():
            Path("y", path.name).write_bytes(path.read_bytes())
        arguments = {"logits": "x", "targets": "t", "resume": "state", **change}
        if isinstance(arguments["targets"], list):
            arguments["logits"] = [f"x/part-{i}.npy" for i in range(1, 11)]
        held = Path("state").read_bytes()
        with pytest.raises(
            ScoreError, match=rf"(?s)state: the state of a run with .*{message}.*delete it to start anew"
        ):
            fastloss.score_file(**arguments)
        assert Path("state").read_bytes() == held

    def test_a_changed_shard_is_refused(self, shards):
        fastloss.score_file("x", "t", resume="state")
        np.save("x/part-2.npy", np.load("x/part-2.npy") + 1)
        with pytest.raises(ScoreError, match=r"x/part-2.npy and .* which have changed"):
            fastloss.score_file("x", "t", resume="state")

    @pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "fastloss score, state 0"}', "\0" * 100])
    def test_what_is_no_state_is_refused(self, shards, content):
        Path("state").write_text(content)
        with pytest.raises(ScoreError, match="state: not the state of a run, or damaged"):
            fastloss.score_file("x", "t", resume="state")
        assert Path("state").read_text() == content

    def test_losses_that_are_gone_are_missed(self, shards, monkeypatch):
        with monkeypatch.context() as patch:
            stop_after(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                fastloss.score_file("x", "t", output="out.npy", resume="state")
        (partial,) = Path().glob(".fastloss-out.npy-*.partial")
        os.truncate(partial, 140)
        with pytest.raises(ScoreError, match="lacks losses scored before"):
            fastloss.score_file("x", "t", output="out.npy", resume="state")
        partial.unlink()
        with pytest.raises(ScoreError, match="losses scored before are not there"):
            fastloss.score_file("x", "t", output="out.npy", resume="state")

    def test_members_are_told_apart(self, shards):
        logits, targets = shards
        np.savez("both.npz", a=logits, b=logits[::-1], t=targets, u=targets)
        for name, x in (("a", logits), ("b", logits[::-1])):
            same(
                fastloss.score_file(f"both.npz:{name}", "both.npz:t", resume=name).loss,
                fastloss.cross_entropy(x, targets),
            )
        for other in (("both.npz:b", "both.npz:t"), ("both.npz:a", "both.npz:u")):
            with pytest.raises(ScoreError, match=r"a: the state of a run with .*both.npz:a"):
                fastloss.score_file(*other, resume="a")

    @pytest.mark.parametrize("n_chunks", [2, 4])
    def test_a_file_that_is_replaced_after_it_was_read(self, shards, monkeypatch, n_chunks):
        """In the first shard, and in the second: the state speaks of what was read, not of what took its place."""
        np.save("other.npy", np.zeros((20, 7), np.float32))
        with monkeypatch.context() as patch:
            stop_after(patch, n_chunks)
            score = files._Run._score

            def replacing(run, *args):
                Path("other.npy").exists() and Path("other.npy").replace("x/part-1.npy")
                score(run, *args)

            patch.setattr(files._Run, "_score", replacing)
            with pytest.raises(KeyboardInterrupt):
                fastloss.score_file("x", "t", resume="state")
        if n_chunks == 2:  # the shard that was begun is scored anew
            logits = np.concatenate([np.zeros((20, 7), np.float32), shards[0][20:]])
            same(fastloss.score_file("x", "t", resume="state").loss, fastloss.cross_entropy(logits, shards[1]))
        else:
            with pytest.raises(ScoreError, match=r"x/part-1.npy and .* which have changed"):
                fastloss.score_file("x", "t", resume="state")

    def test_losses_of_another_run_are_not_taken_for_its_own(self, shards):
        fastloss.score_file("x", "t", output="out.npy", resume="state")
        fastloss.score_file("x/part-1.npy", "t/part-1.npy", output="out.npy")
        with pytest.raises(ScoreError, match=r"out.npy: not the losses of this run"):
            fastloss.score_file("x", "t", output="out.npy", resume="state")

    def test_runs_with_other_states_write_to_files_of_their_own(self, shards, monkeypatch):
        logits, targets = shards
        for i in range(1, 11):
            np.save(f"t/part-{i}.npy", np.maximum(targets, 0)[20 * (i - 1) : 20 * i])
        for state, weight in (("one", None), ("two", np.arange(7.0))):
            with monkeypatch.context() as patch:
                stop_after(patch, 5)
                with pytest.raises(KeyboardInterrupt):
                    fastloss.score_file("x", "t", weight=weight, output="out.npy", resume=state)
        fastloss.score_file("x", "t", output="out.npy", resume="one")
        same(np.load("out.npy"), fastloss.cross_entropy(logits, np.maximum(targets, 0), reduction="none"))

    def test_a_state_altered_by_hand(self, shards):
        fastloss.score_file("x", "t", resume="state")
        held = json.loads(Path("state").read_text())
        for key, value in (("options", []), ("files", [1, 2, 3]), ("output", 3)):
            Path("state").write_text(json.dumps(held | {key: value}))
            with pytest.raises(ScoreError, match="state: not the state of a run, or damaged"):
                fastloss.score_file("x", "t", resume="state")

    def test_what_failed_counts_where_the_state_cannot_be_saved_either(self, shards, monkeypatch):
        np.save("x/part-3.npy", np.zeros((20, 6)))

        def fail(*_):
            raise ScoreError("state: No space left on device")

        monkeypatch.setattr(files._Saved, "save", fail)
        monkeypatch.setattr(files, "SAVE_SECONDS", 1e9)
        with pytest.raises(
            ScoreError, match=r"x/part-3.npy: .* \(and the state could not be saved: state: No s"
        ) as caught:
            fastloss.score_file("x", "t", resume="state")
        assert caught.value.scores.n_scored_shards == 2

    def test_a_state_that_cannot_be_written(self, shards):
        with pytest.raises(ScoreError, match="none/state: No such file or directory"):
            fastloss.score_file("x", "t", resume="none/state")
        with pytest.raises(ScoreError, match="x: Is a directory"):
            fastloss.score_file("x", "t", resume="x")


# Score slowly, saving after each chunk, and say so.
SLOWLY = """
import sys, time
from fastloss import cli, files
files.CHUNK_BYTES, files.SAVE_SECONDS = 400, 0.0
score = files._Run._score
def slowly(*arguments):
    score(*arguments)
    print("chunk", flush=True)
    time.sleep(0.02)
files._Run._score = slowly
sys.exit(cli.main(["score", "x", "t", "--resume", "state", "--output", "out.npy", "--json"]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_again_and_again(shards, capfd):
    logits, targets = shards
    expected = fastloss.cross_entropy(logits, targets)
    for n_chunks in (5, 9):
        with subprocess.Popen([sys.executable, "-c", SLOWLY], stdout=subprocess.PIPE, text=True) as child:
            for _ in range(n_chunks):
                assert child.stdout.readline() == "chunk\n"
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert not Path("out.npy").exists()
    done = json.loads(Path("state").read_text())["done"]
    assert 40 <= 20 * done["shards"] + done["rows"] < 200
    assert cli.main(["score", "x", "t", "--resume", "state", "--output", "out.npy", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["loss"] == float(expected)
    assert found["rows"] == 200
    same(np.load("out.npy"), fastloss.cross_entropy(logits, targets, reduction="none"))
    assert listing() == ["out.npy", "state", "t", "x"]


# Score something small, then what was asked for; report the most memory of the process, how much more of it was mapped
# from files than before, both in KiB.
MEASURED = """
import sys, threading, time
from pathlib import Path
from fastloss import cli
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    held = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return int(held["RssAnon"]), int(held["RssFile"])
assert cli.main(["score", "small-x.npy", "small-t.npy", "--output", "small-out.npy"]) == 0
before, peaks, stop = resident(), [], threading.Event()
def watch():
    while not stop.wait(0.0005):
        peaks.append(resident())
watcher = threading.Thread(target=watch)
watcher.start()
status = cli.main(sys.argv[1:])
stop.set()
watcher.join()
print(max(anonymous for anonymous, _ in peaks), max(mapped for _, mapped in peaks) - before[1])
sys.exit(status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_shards_larger_than_the_memory_allowed(tmp_path, rng, monkeypatch):
    """320 MB in two shards with the whole process, interpreter and compiler included, under 256 MiB; and of the
    shards no more is mapped at a time than is allowed.
    """
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    Path("t").mkdir()
    block = rng.normal(size=(1000, 1000)).astype(np.float32)
    targets = rng.integers(0, 1000, 80_000)
    borders = 0, 60_000, 80_000
    for i, (begin, end) in enumerate(itertools.pairwise(borders)):
        shard = np.lib.format.open_memmap(f"x/{i}.npy", "w+", np.float32, (end - begin, 1000))
        for j in range(0, end - begin, 1000):
            np.add(block, i + j / 1000, out=shard[j : j + 1000])
        np.save(f"t/{i}.npy", targets[begin:end])
    np.save("small-x.npy", block[:200])
    np.save("small-t.npy", targets[:200])
    fastloss.score_file("small-x.npy", "small-t.npy", output="small-out.npy")  # compiled, and in the cache
    allowed = 48
    options = ["--output", "out.npy", "--max-memory", f"{allowed}MiB", "--json"]
    command = [sys.executable, "-c", MEASURED, "score", "x", "t", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    *_, report, peaks = done.stdout.splitlines()
    anonymous, mapped = (int(peak) / 1024 for peak in peaks.split())
    assert sum(path.stat().st_size for path in Path("x").iterdir()) > 300 * 2**20
    assert anonymous < 256
    # (Code that is run for the first time is mapped too.)
    assert mapped < allowed + 16
    maps = [np.load(f"x/{i}.npy", mmap_mode="r") for i in range(2)]
    pairs = list(zip(maps, np.split(targets, borders[1:2]), strict=True))
    losses = np.concatenate([fastloss.cross_entropy(x, t, reduction="none") for x, t in pairs])
    same(np.load("out.npy"), losses)
    total = fastloss.streaming.CrossEntropy()
    for i in (1, 0):
        total.update(*pairs[i])
    assert json.loads(report)["loss"] == float(total.compute())


@pytest.mark.parametrize("n_losses", [1, 5, 7, 1000, 5120, 9001])
@pytest.mark.parametrize("levels", [2, 10, 100_000])
@pytest.mark.parametrize("share_of_nan", [0.0, 0.001, 1.0])
def test_worst_first(rng, n_losses, levels, share_of_nan):
    losses = rng.integers(0, levels, n_losses).astype(np.float32)
    losses[rng.random(n_losses) < 0.01] = np.inf
    losses[rng.random(n_losses) < share_of_nan] = np.nan

    def badness(i):
        return (0, 0.0, i) if np.isnan(losses[i]) else (1, -losses[i], i)

    in_order = sorted(range(n_losses), key=badness)
    assert files.worst_first(losses, 5).tolist() == in_order[:5]


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("n_ignored", [0, 40, 200])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": [1, 2, 3, 1, 2, 3, 0]}], ids=list)
@pytest.mark.parametrize("n_close", [0, 10, 60, 190, 200])
def test_correct_rows_whatever_the_losses_tell(tmp_path, rng, monkeypatch, n_close, options, n_ignored):
    """Of rows far apart the loss tells whether they are right; rows of close or equal logits are looked through."""
    monkeypatch.chdir(tmp_path)
    logits = rng.integers(0, 3, (200, 7)) * np.where(np.arange(200) < n_close, 0.01, 30.0)[:, np.newaxis]
    targets = np.where(rng.random(200) < 0.5, logits.argmax(1), rng.integers(0, 7, 200))
    targets[rng.permutation(200)[:n_ignored]] = -100
    np.save("x.npy", logits)
    np.save("t.npy", targets)
    found = fastloss.score_file("x.npy", "t.npy", details=True, **options)
    assert (found.n_correct, found.n_kept) == ((logits.argmax(1) == targets).sum(), 200 - n_ignored)


def _count_correct(logits, targets):
    """By numpy.argmax, of the rows kept."""
    return int((logits.argmax(1) == targets).sum())


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("f2", {}),
        ("f4", {}),
        ("f8", {}),
        ("f4", {"log_probs": True}),
        ("f4", {"label_smoothing": 0.1}),
        ("f4", {"weight": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [(5,), (60, 1), (61, 2), (300, 7), (70, 16), (70, 17), (3, 20), (65, 33), (50, 257), (3, 4097), (4, 21, 9, 7)]
    + [(2, 130, 43), (1, 9000), (0, 3), (2, 3, 0)],
    ids=str,
)
def test_correct_rows_of_every_kind(tmp_path, rng, monkeypatch, shape, dtype, options, order):
    """Rows with ties, masked classes, NaN and infinities, ignored ones, at every place of the largest logit."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 28)
    monkeypatch.chdir(tmp_path)
    n_classes = shape[0] if len(shape) == 1 else shape[1]
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    for levels in (2, 50):
        logits = rng.integers(0, levels, shape).astype(dtype)
        odd = rng.choice([0.0, np.nan, np.inf, -np.inf], shape, p=[0.94, 0.02, 0.02, 0.02])
        logits = np.where(rng.random((*rows[:1], 1, *rows[1:])[-len(shape) :]) < 0.5, logits, logits + odd)
        logits[..., :1] = -np.inf
        logits = logits.astype(dtype)
        by_class = logits if len(shape) > 1 else logits[np.newaxis]
        targets = np.where(rng.random(rows) < 0.6, by_class.argmax(1).reshape(rows), rng.integers(0, n_classes, rows))
        targets = np.where(rng.random(rows) < 0.2, -100, targets)
        np.save("x.npy", np.asarray(logits, order=order))
        np.save("t.npy", targets)
        weight = rng.random(n_classes) if "weight" in options else None
        found = fastloss.score_file("x.npy", "t.npy", details=True, **{**options, "weight": weight})
        assert found.n_correct == _count_correct(by_class, np.reshape(targets, (len(by_class), *rows[1:])))


@pytest.mark.parametrize("shape", [(1, 100_000), (3, 70_000), (200_000, 9), (2, 5, 300, 300)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=list)
def test_correct_rows_over_threads(tmp_path, rng, monkeypatch, shape, options):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 28)
    monkeypatch.chdir(tmp_path)
    logits = rng.integers(0, 5, shape).astype(np.float32)
    targets = np.where(rng.random((shape[0], *shape[2:])) < 0.6, logits.argmax(1), 0)
    np.save("x.npy", logits)
    np.save("t.npy", targets)
    found = fastloss.score_file("x.npy", "t.npy", details=True, **options)
    assert found.n_correct == _count_correct(logits, targets)


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_what_is_looked_through_for_details_is_not_copied_whole(tmp_path, rng, monkeypatch, order, kind):
    tracemalloc = pytest.importorskip("tracemalloc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 28)
    logits = rng.normal(size=(10_000, 300)).astype(np.float32)  # 12 MB
    targets = rng.integers(0, 300, 10_000) if kind == "indices" else fastloss.softmax(logits)
    np.save("x.npy", np.asarray(logits, order=order))
    np.save("t.npy", np.asarray(targets, order=order))
    expected = (logits.argmax(1) == (targets if kind == "indices" else logits.argmax(1))).sum()
    assert fastloss.score_file("x.npy", "t.npy", details=True).n_correct == expected
    tracemalloc.start()
    try:
        fastloss.score_file("x.npy", "t.npy", details=True)
        assert tracemalloc.get_traced_memory()[1] < 2_500_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("1000", 1000), ("1k", 1024), ("1.5 KiB", 1536), ("256MiB", 2**28), ("2GB", 2**31), ("1t", 2**40)],
)
def test_sizes(text, n_bytes):
    assert cli._size(text) == n_bytes


def test_command_line_of_shards(shards, capsys):
    logits, targets = shards
    assert cli.main(["score", "x", "t", "--max-memory", "1MiB"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "shards         10\n" in out
    assert f"cross-entropy  {fastloss.cross_entropy(logits, targets)!s} (mean)\n" in out
    worst = int(fastloss.cross_entropy(logits, targets, reduction="none").argmax())
    assert f"x/part-{worst // 20 + 1}.npy: {worst % 20} " in out
    assert cli.main(["score", "x", "t", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shards"] == 10
    assert found["worst"][0]["file"] == f"x/part-{worst // 20 + 1}.npy"
    assert cli.main(["score", "x", "t", "--max-memory", "much"]) == 2
    assert "argument --max-memory: invalid size: 'much'" in capsys.readouterr().err


def test_progress_of_shards(shards, monkeypatch):
    """Rows of all shards, bytes per second and the running loss, on a terminal of our own."""
    pty = pytest.importorskip("pty")
    pytest.importorskip("tqdm")
    termios = pytest.importorskip("termios")
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    clock = [0.0]
    score = files._Run._score

    def slow_score(*arguments):
        clock[0] += 0.5
        score(*arguments)

    monkeypatch.setattr(files._Run, "_score", slow_score)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        loss = fastloss.score_file("x", "t", progress=True).loss
        stream.flush()
        os.set_blocking(reader, False)
        shown = ""
        with contextlib.suppress(BlockingIOError):
            while True:
                shown += os.read(reader, 1 << 16).decode(errors="replace")
    os.close(reader)
    assert "/200" in shown
    assert "row/s" in shown
    assert "B/s, loss " in shown
    assert f"loss {loss:.6g}" in shown
