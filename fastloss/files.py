"""Scoring files: memory-mapped, shard by shard and chunk by chunk, in bounded memory, from where it stopped before.

The losses go through :mod:`fastloss.streaming`, so the result has the bits of one call over all rows, however they are
cut into shards and chunks. What has been scored is one immutable :class:`_Done`, replaced after each chunk: what is
saved is always the state between two chunks.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import glob
import hashlib
import importlib
import io
import json
import math
import mmap
import os
import re
import secrets
import stat
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from fastloss import _reduction, _validation, _views, functional, streaming
from fastloss._validation import Array

__all__ = ["FileScores", "ScoreError", "ScoredRow", "score_file"]

# The bytes of the files that are mapped at a time: as many as max_memory, so that not even what is mapped of the
# system's cache takes more; and no more than these, for a disk to be heard of every few seconds.
CHUNK_BYTES = 1 << 28
# Rows whose losses are wanted one by one take memory: the loss of each, where it is, and copies of them without the
# ignored ones and sorted, in 8 bytes each. They may take this share of max_memory.
_ROW_BYTES = 64
_SHARE_OF_MEMORY = 4

# How often the state is saved for a later run to go on from, in seconds.
SAVE_SECONDS = 5.0

N_WORST = 5

# Losses of which the largest is found, for the worst of all to be looked for among few (1,000,000 take 1.1 ms; 2.6 ms
# where all of them are partitioned).
_RUN = 1024

# What an array is called inside an .npz file.
LOGITS_MEMBERS = ("logits", "log_probs", "input")
TARGETS_MEMBERS = ("targets", "target", "labels")
WEIGHT_MEMBERS = ("weight", "weights")
_SUFFIXES = (".npy", ".npz", ".parquet", ".arrow", ".feather")
_MEMBER = re.compile(r"(.*\.(?:npz|parquet|arrow|feather)):(.*)", re.DOTALL)
_NO_TARGETS = "holds one array; expected TARGETS too, or one .npz file with logits and targets"

_FORMAT = "fastloss score, state 2"

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class ScoreError(ValueError):
    """A file that cannot be scored: the message begins with its name.

    Attributes
    ----------
    scores : FileScores or None
        What was scored before it.
    """

    scores: "FileScores | None" = None


# ---------------------------------------------------------------------------------------------------------- reading


def split_member(name: str) -> tuple[str, str | None]:
    """``FILE.npz:MEMBER``, or ``FILE.parquet:COLUMN``, as the file and the member."""
    match = _MEMBER.fullmatch(name)
    return match.groups() if match else (name, None)  # type: ignore[return-value]


@contextlib.contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turn whatever a missing or damaged file leads to into an error that names it."""
    try:
        yield
    except ScoreError:
        raise
    except OSError as error:
        raise ScoreError(f"{path}: {error.strerror or error}") from None
    except MemoryError as error:
        raise ScoreError(f"{path}: out of memory ({error})") from None
    except Exception as error:  # whatever damaged bytes lead the readers of zip, zlib and npy to
        raise ScoreError(f"{path}: cannot be read, truncated or damaged ({error})") from None


def read_array(name: str, members: Sequence[str], beside_logits: bool = False, max_memory: float = math.inf) -> Array:
    """The array of a file: that of a ``.npy``, memory-mapped, or a member of a ``.npz``, see :func:`_choose_member`.

    With `beside_logits` the file holds the logits too, so a single array does not do.
    """
    file_name, member = split_member(name)
    path = Path(file_name)
    with _reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ScoreError(f"{path}: not a regular file")
        if not status.st_size:
            raise ScoreError(f"{path}: the file is empty")
        memory = _map(path)
        magic = memory[: np.lib.format.MAGIC_LEN]
        if magic.startswith(np.lib.format.MAGIC_PREFIX):
            if beside_logits:
                raise ScoreError(f"{path}: {_NO_TARGETS}")
            array = _mapped_array(memory)
        elif magic.startswith(b"PK"):
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                chosen = _choose_member(path, archive.files, member, members, beside_logits)
                _check_size(path, archive.zip, chosen, max_memory)
                array = archive[chosen]
        elif magic.startswith((b"ARROW1", b"PAR1")):
            array = _read_column(path, magic.startswith(b"PAR1"), member, members, beside_logits, max_memory)
        else:
            raise ScoreError(f"{path}: neither a .npy nor a .npz file, nor Parquet or Arrow")
    if not isinstance(array, np.ndarray):
        raise ScoreError(f"{name}: not an array")
    if array.dtype == np.dtype("V2"):
        raise ScoreError(
            f"{name}: dtype |V2, which is how bfloat16 is saved (.npy files cannot name it); save it as float32"
        )
    return np.asarray(array)


def _map(path: Path) -> mmap.mmap:
    """A file, mapped into memory before anything is read of it.

    Where the system keeps a file in large pieces, as ext4 of Linux 6.18 does, mapping it costs a few percent of scoring
    it. Where it keeps single pages, each costs more than to score it; but so it does to read it into a buffer, copied
    besides: slower in every case measured. What the map itself reads from the disk comes in single pages, unless huge
    ones are asked for: 65,536 x 1000 took 0.20 s from the disk and 1.1 times a call in memory ever after, instead of
    0.27 s and 1.45 times. Had the header been read from the file first, what follows it would be kept in single pages:
    all of 8 MB of labels.
    """
    with path.open("rb", buffering=0) as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a Linux built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


# The headers of .npy files, by version: how long what says their length is, and who reads them. (Of the third version
# are those of records alone.)
_HEADERS = {(1, 0): (2, np.lib.format.read_array_header_1_0), (2, 0): (4, np.lib.format.read_array_header_2_0)}


@functools.lru_cache
def _parse_header(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype of a header, from its length on. It is Python source, whose parsing takes a tenth of
    scoring a small file, and shards have one header.
    """
    return _HEADERS[version][1](io.BytesIO(header))


def _mapped_array(memory: mmap.mmap) -> Array:
    """The array of a ``.npy`` file. (``np.load`` would open it three times more.)"""
    begin = np.lib.format.MAGIC_LEN
    version = np.lib.format.read_magic(io.BytesIO(memory[:begin]))
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format, expected one of {', '.join(map(str, _HEADERS))}")
    end = begin + _HEADERS[version][0]
    end += int.from_bytes(memory[begin:end], "little")
    shape, is_fortran, dtype = _parse_header(version, memory[begin:end])
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    return np.ndarray(shape, dtype, memory, end, order="F" if is_fortran else "C")


def _choose_member(
    path: Path, held: Sequence[str], member: str | None, members: Sequence[str], beside_logits: bool
) -> str:
    """The member asked for, else the one with a name among `members`, else the only one."""
    listed = ", ".join(held) or "nothing"
    if member is not None:
        if member not in held:
            raise ScoreError(f"{path}: no member {member}, holds {listed}")
        return member
    known = [name for name in held if name in members]
    if len(known) == 1:
        return known[0]
    if len(held) == 1 and beside_logits:
        raise ScoreError(f"{path}: {_NO_TARGETS}")
    if len(held) == 1:
        return held[0]
    raise ScoreError(f"{path}: holds {listed}; say which one are the {members[0]}, as {path}:NAME")


def _read_column(
    path: Path, is_parquet: bool, member: str | None, members: Sequence[str], beside_logits: bool, max_memory: float
) -> Array:
    """A column of a Parquet or Arrow file: of numbers, or of lists of one length, which are the rows of a matrix."""
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ScoreError(
            f"{path}: Parquet and Arrow files are read by pyarrow, which is not installed (the extra arrow)"
        ) from None
    source = parquet.ParquetFile(path) if is_parquet else arrow.ipc.open_file(arrow.memory_map(str(path)))
    schema = source.schema_arrow if is_parquet else source.schema
    chosen = _choose_member(path, schema.names, member, members, beside_logits)
    kind = schema.field(schema.names.index(chosen)).type
    is_fixed = arrow.types.is_fixed_size_list(kind)
    is_lists = is_fixed or arrow.types.is_list(kind) or arrow.types.is_large_list(kind)
    if arrow.types.is_nested(kind.value_type if is_lists else kind):
        raise ScoreError(f"{path}: {chosen} holds {kind}, expected numbers or lists of numbers")
    # (There are two of a column while its pieces are put together.)
    if is_parquet:
        groups = [source.metadata.row_group(i) for i in range(source.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        sizes = [_decoded_size(c) for c in columns if c.path_in_schema.split(".")[0] == chosen]
        _check_memory(path, chosen, 2 * sum(sizes), max_memory)
        column = source.read(columns=[chosen]).column(0)
    else:
        options = arrow.ipc.IpcReadOptions(included_fields=[schema.names.index(chosen)])
        source = arrow.ipc.open_file(arrow.memory_map(str(path)), options=options)
        pieces, size = [], 0
        for i in range(source.num_record_batches):
            pieces.append(source.get_batch(i).column(0))
            size += 2 * pieces[-1].nbytes
            _check_memory(path, chosen, size, max_memory)
        column = arrow.chunked_array(pieces, type=kind)
    column = column.combine_chunks()
    values = column.flatten() if is_lists and not column.null_count else column
    if values.null_count:
        raise ScoreError(f"{path}: {chosen} has missing values")
    array: Array = values.to_numpy(zero_copy_only=False)
    if not is_lists:
        return array
    if is_fixed:
        return array.reshape(-1, kind.list_size)
    lengths = arrow.compute.unique(arrow.compute.list_value_length(column))
    if len(lengths) != 1:
        found = "lists of several lengths" if len(lengths) else "no lists, whose length would be the number of classes"
        raise ScoreError(f"{path}: {chosen} has {found}, expected lists of one length")
    return array.reshape(-1, lengths[0].as_py())


# Bytes of a number by its type in a Parquet file; in memory a bool takes one as well.
_PARQUET_BYTES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4}


def _decoded_size(column: Any) -> int:
    """The bytes of a piece of a Parquet column in memory: its encoding can take less."""
    decoded = column.num_values * _PARQUET_BYTES.get(column.physical_type, 8)
    return int(max(column.total_uncompressed_size, decoded))


def _check_memory(path: Path, member: str, size: int, max_memory: float) -> None:
    if size > max_memory:
        raise ScoreError(
            f"{path}: {member} takes {size} bytes of memory, into which this kind of file is read whole, more than the "
            f"{max_memory} allowed; save it as .npy, or in shards"
        )


def _check_size(path: Path, archive: zipfile.ZipFile, member: str, max_memory: float) -> None:
    names = archive.namelist()
    size = archive.getinfo(f"{member}.npy" if f"{member}.npy" in names else member).file_size
    _check_memory(path, member, size, max_memory)


# ----------------------------------------------------------------------------------------------------------- shards


def _is_directory(paths: Paths | None) -> TypeGuard[str | os.PathLike[str]]:
    name = os.fspath(paths) if isinstance(paths, str | os.PathLike) else ""
    return bool(name) and Path(split_member(name)[0]).is_dir()


def _is_shard(path: Path) -> bool:
    """Whether a file of a directory is scored: its name says so, and is not hidden."""
    return path.suffix in _SUFFIXES and not path.name.startswith(".")


def _as_paths(paths: Any, name: str) -> Paths:
    """A path, or a list of them."""
    if isinstance(paths, str | os.PathLike):
        return paths
    try:
        listed = [] if isinstance(paths, bytes) else list(paths)
    except TypeError:
        listed = []
    if not listed or not all(isinstance(path, str | os.PathLike) for path in listed):
        what = "nothing" if isinstance(paths, list | tuple) and not paths else type(paths).__name__
        raise TypeError(f"{name}: got {what}, expected a path or a sequence of paths")
    return listed


def _list_files(paths: Paths, is_directory: bool, by_stem: bool) -> tuple[dict[str, str], bool]:
    """The files of a path, a directory, a pattern or a list, each under the name by which it is paired; and whether it
    is one file. The name is where it is in a list, what the wildcards of a pattern stand for, or if so wished the stem.
    """
    if not isinstance(paths, str | os.PathLike):
        return {str(i): os.fspath(path) for i, path in enumerate(paths)}, False
    name = os.fspath(paths)
    place, member = split_member(name)
    suffix = "" if member is None else f":{member}"
    if is_directory:
        found = [(p.stem, str(p)) for p in sorted(Path(place).iterdir()) if _is_shard(p)]
        if not found:
            raise ScoreError(f"{name}: a directory without files to score")
        return _by_key(found), False
    if not glob.has_magic(place) or Path(place).exists():
        return {"": name}, True
    place = re.sub("//+", "/", place)
    matcher = re.compile(_with_groups(place), re.DOTALL)
    matched = [(matcher.fullmatch(path), path) for path in _glob(place)]
    found = [(Path(p).stem if by_stem else "\0".join(m.groups()), p + suffix) for m, p in matched if m]
    if not found:
        raise ScoreError(f"{name}: no file of that pattern")
    return _by_key(found), False


def _by_key(found: list[tuple[str, str]]) -> dict[str, str]:
    """Files under the names by which they are paired, of which each must have its own."""
    files: dict[str, str] = {}
    for key, path in found:
        if key in files:
            raise ScoreError(
                f"{path}: has the name of {files[key]}, by which its targets are found; rename one of them"
            )
        files[key] = path
    return files


def _glob(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)


_WILDCARDS = re.compile(r"(\*\*/?|\*|\?|\[!?\]?[^\]]*\])")


def _with_groups(pattern: str) -> str:
    """A regular expression for a shell pattern, whose groups are what the wildcards stand for."""
    parts = _WILDCARDS.split(pattern)
    wild = {"**": "(.*)", "**/": "(.*/|)", "*": "([^/]*)", "?": "([^/])"}
    texts = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            texts.append(re.escape(part))
        else:
            texts.append(wild.get(part) or f"({fnmatch.translate(part)[:-2]})")
    return "".join(texts)


def _natural(key: str, paths: Paths) -> tuple[list[str | int], str]:
    """What sorts files of a name by the numbers in it, 9 before 10: the name in a directory, where it is in a list, or
    the pattern with what its wildcards stand for.
    """
    name = key
    if "\0" in key and isinstance(paths, str | os.PathLike):
        texts = iter(key.split("\0"))
        parts = _WILDCARDS.split(split_member(os.fspath(paths))[0])
        name = "".join(next(texts, "") if i % 2 else part for i, part in enumerate(parts))
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))], key


class _Pair(NamedTuple):
    """The files of a shard: without targets the logits' file holds them, or something is ``missing``, which it says."""

    logits: str
    targets: str | None
    missing: str = ""

    @property
    def names(self) -> list[str]:
        return [self.logits, self.targets or self.logits]


def _none(kind: str, paths: Paths) -> str:
    if isinstance(paths, str | os.PathLike):
        return f"no {kind} of that name in {paths}"
    return f"no {kind} at its place in a list of {len(paths)}"


def _pair_files(logits: Paths, targets: Paths | None) -> list[_Pair]:
    """The shards, in the order of their names."""
    is_directory, has_directory = _is_directory(logits), _is_directory(targets)
    by_stem = is_directory or has_directory
    inputs, is_one = _list_files(logits, is_directory, by_stem)
    if targets is None:
        return [_Pair(inputs[key], None) for key in sorted(inputs, key=lambda key: _natural(key, logits))]
    goals, is_one_goal = _list_files(targets, has_directory, by_stem)
    if is_one != is_one_goal:
        many, one = (targets, logits) if is_one else (logits, targets)
        raise ScoreError(f"{many}: several files, expected one, as {one} is, or two directories or patterns")
    pairs = []
    for key in sorted(inputs.keys() | goals.keys(), key=lambda key: _natural(key, logits)):
        if key not in inputs:
            pairs.append(_Pair(goals[key], None, f"{goals[key]}: {_none('logits', logits)}"))
        elif key not in goals:
            pairs.append(_Pair(inputs[key], None, f"{inputs[key]}: {_none('targets', targets)}"))
        else:
            pairs.append(_Pair(inputs[key], goals[key]))
    return pairs


def _check_place(path: str, name: str, pairs: list[_Pair], sources: Iterable[Paths | None]) -> None:
    """What is written must not take the place of what is read, nor be a shard of the next run."""
    place = os.path.realpath(path)
    for source in (file for pair in pairs for file in pair.names):
        if place == os.path.realpath(split_member(source)[0]):
            raise ScoreError(f"{path}: is read by this run, expected another file for {name}")
    for directory in sources:
        is_inside = _is_directory(directory) and str(Path(place).parent) == os.path.realpath(directory)
        if is_inside and _is_shard(Path(place)):
            raise ScoreError(f"{path}: would be a shard of {directory}, expected another directory for {name}")


class _Shard(NamedTuple):
    """The arrays of a shard, with a first axis, and the shape of its rows as they are counted."""

    logits: Array
    targets: Array
    row_shape: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        return math.prod(self.row_shape)


def _cuts(shape: tuple[int, ...], first_row: int, chunk_rows: int) -> Iterator[tuple[tuple[slice, ...], int]]:
    """Cut the rows of ``(N, C, d1, ..., dK)`` in C order from some row on, into chunks of about so many: where each
    lies in ``(N, d1, ...)``, and how many rows it has. Samples that are longer are cut along their first axis.
    """
    per_sample = math.prod(shape[2:])
    n_rows = shape[0] * per_sample
    row = first_row
    while row < n_rows:
        sample, within = divmod(row, per_sample)
        if within or (per_sample > chunk_rows and len(shape) > 2):
            per_line = math.prod(shape[3:])
            begin = within // per_line
            end = min(shape[2], begin + max(1, chunk_rows // per_line))
            yield (slice(sample, sample + 1), slice(begin, end)), (end - begin) * per_line
            row += (end - begin) * per_line
        else:
            end = min(shape[0], sample + max(1, chunk_rows // per_sample))
            yield (slice(sample, end),), (end - sample) * per_sample
            row = end * per_sample


def _owner(array: Array) -> mmap.mmap | None:
    """The memory map in which an array lies."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, mmap.mmap) else None


def _check_length(array: Array, name: str) -> None:
    """Raise for a file that became shorter than its map: reading what is gone would end the process."""
    owner = _owner(array)
    if owner is not None and owner.size() < len(owner):
        raise ScoreError(f"{name}: truncated while it was read")


def _release_pages(array: Array) -> None:
    """Unmap what was read of a memory-mapped file: it stays in the system's cache, but counts no more as ours."""
    owner = _owner(array)
    if owner is not None and array.size and hasattr(mmap, "MADV_DONTNEED"):
        address = array.__array_interface__["data"][0] - np.frombuffer(owner, np.uint8).__array_interface__["data"][0]
        end = address + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
        begin = address - address % mmap.PAGESIZE
        owner.madvise(mmap.MADV_DONTNEED, begin, end + array.itemsize - begin)


# ---------------------------------------------------------------------------------------------------------- results


class ScoredRow(NamedTuple):
    """One row among the worst: where it is, the class indices of its target and of the prediction, and its loss."""

    file: str
    position: tuple[int, ...]
    target: int
    predicted: int
    loss: float

    @property
    def badness(self) -> tuple[bool, float]:
        """What sorts rows by how badly they score: NaN first, then the largest loss."""
        return (False, 0.0) if math.isnan(self.loss) else (True, -self.loss)


class _Done(NamedTuple):
    """What has been scored: whole shards, rows of the next one, and what came out."""

    shards: int = 0
    rows: int = 0
    written: int = 0
    state: streaming.State = streaming.State()
    n_correct: int = 0
    worst: tuple[ScoredRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        held = self._asdict()
        worst = [[*row[:-1], str(row.loss)] for row in self.worst]
        return held | {"state": self.state.to_json(), "worst": worst}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "_Done":
        worst = tuple(ScoredRow(f, tuple(at), t, p, float(loss)) for f, at, t, p, loss in held["worst"])
        return cls(**{**held, "state": streaming.State.from_json(held["state"]), "worst": worst})


@dataclasses.dataclass(frozen=True)
class FileScores:
    """What :func:`score_file` has found.

    Attributes
    ----------
    loss, mean : numpy scalar
        What the function of the loss gives for all rows together, to the last bit: with the `reduction` asked for, and
        with ``'mean'``.
    perplexity : float
        The exponential of the mean loss.
    n_rows, n_kept : int
        How many rows there are, and how many that are not ignored.
    n_classes : int
        The number of classes; 0 if nothing was scored.
    n_shards, n_scored_shards : int
        How many files of logits there are, and how many of them were scored whole.
    n_correct : int or None
        How many of the rows kept have their target as the class of the largest logit (the first of equal ones); None
        without `details`.
    worst : tuple of ScoredRow
        The rows with the largest losses; empty without `details`.
    dtype : numpy.dtype
        The dtype of the losses.
    """

    loss: Any
    mean: Any
    n_rows: int
    n_kept: int
    n_classes: int
    n_shards: int
    n_scored_shards: int
    n_correct: int | None
    worst: tuple[ScoredRow, ...]
    dtype: np.dtype[Any]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.float64(self.mean)))

    @property
    def accuracy(self) -> float:
        """The share of the rows kept whose prediction is right; NaN without any, or without `details`."""
        return math.nan if self.n_correct is None else _reduction.divide(self.n_correct, self.n_kept)


# ---------------------------------------------------------------------------------------------------------- writing


class _Output:
    """A ``.npy`` file of losses, written piece by piece under another name until it is complete.

    Not through a memory map: a full disk would end the process, where writing raises. The header has room for any
    number of rows, so it can be written again.
    """

    def __init__(self, name: str, resume: str | None) -> None:
        self.name = name
        self.path = Path(os.path.realpath(name))  # replace what a link points to, not the link
        self._is_kept = resume is not None
        unfinished = f"{secrets.token_hex(8)}.tmp"
        if resume is not None:  # each state has a file of its own
            unfinished = hashlib.sha256(os.path.realpath(resume).encode(errors="surrogateescape")).hexdigest()[:16]
            unfinished = f"{self.path.name}-{unfinished}.partial"
        self.unfinished = self.path.with_name(f".fastloss-{unfinished}")
        self._file: IO[bytes] | None = None
        self._start = 0
        try:
            if self.path.exists() and not self.path.is_file():
                raise ScoreError(f"{name}: not a regular file")
        except OSError as error:
            raise ScoreError(f"{name}: {error.strerror or error}") from None

    def open(self, shape: tuple[int, ...], dtype: np.dtype[Any], rows_written: int) -> None:
        """Begin, or go on behind some rows."""
        if rows_written and not self.unfinished.exists():
            raise ScoreError(
                f"{self.unfinished}: the losses scored before are not there; delete the state to start anew"
            )
        mode = "r+b" if rows_written else "w+b" if self._is_kept else "x+b"
        self._file = self.unfinished.open(mode)
        self._write_header(shape, dtype)
        self._start = self._file.tell()
        end = self._start + rows_written * dtype.itemsize
        if self._file.seek(0, os.SEEK_END) < end:
            raise ScoreError(f"{self.unfinished}: lacks losses scored before; delete the state to start anew")
        self._file.truncate(end)
        self._file.seek(end)

    def _write_header(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        assert self._file is not None
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, piece: Array) -> None:
        if self._file is not None:
            self._file.write(np.ascontiguousarray(piece).data)

    def sync(self) -> None:
        """Have what was written on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def identity(self) -> list[int] | None:
        """What tells the file from another, before it is put in its place and after that."""
        for path in (self.unfinished, self.path):
            with contextlib.suppress(OSError):
                status = path.stat()
                return [status.st_size, status.st_mtime_ns]
        return None

    def is_finished(self) -> bool:
        """Whether an earlier run has put the file in its place."""
        return self.path.exists() and not self.unfinished.exists()

    def finish(self) -> None:
        """Put the whole file in its place."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self.unfinished.replace(self.path)

    def abandon(self) -> None:
        """Leave nothing behind, or what a later run goes on with."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        if not self._is_kept:
            with contextlib.suppress(OSError):
                self.unfinished.unlink()


def _digest(held: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


class _Saved:
    """The state of a run, in a file that is replaced whole, so that there always is one."""

    def __init__(self, name: str, options: dict[str, Any], pairs: list[_Pair]) -> None:
        self.name = name
        self._options = options
        self._pairs = pairs
        self._read: dict[int, list[list[Any]]] = {}  # the files of each shard as they were when it was opened
        self.output: list[int] | None = None  # what was written, when the state was saved

    def load(self) -> tuple[_Done, _Done]:
        """What was scored before, if that was the same (less the shard that was begun, if that has been mended since),
        and what was before the shard that was begun.
        """
        try:
            held = json.loads(Path(self.name).read_text(encoding="utf-8"))
            if held["format"] != _FORMAT:
                raise ValueError(f"format {held['format']!r}")
            if held.pop("digest") != _digest(held):
                raise ValueError("it is not as it was written")
            self.output = held["output"]
            options, files, done = held["options"], held["files"], _Done.from_json(held["done"])
            shard_begin = _Done.from_json(held["shard_begin"])
            if len(files) != done.shards + bool(done.rows):
                raise ValueError(f"{len(files)} files")
        except FileNotFoundError as error:
            if not Path(os.path.realpath(self.name)).parent.is_dir():  # (else it would be told when much is done)
                raise ScoreError(f"{self.name}: {error.strerror}") from None
            return _Done(), _Done()
        except OSError as error:
            raise ScoreError(f"{self.name}: {error.strerror or error}") from None
        except Exception as error:
            raise ScoreError(f"{self.name}: not the state of a run, or damaged ({error})") from None
        for what, value in self._options.items():
            if options.get(what) != value:
                self._refuse(f"{what} {options.get(what)}, where this one has {value}")
        for i, before in enumerate(files):
            self._read[i] = before
            now = self._identity(i) if i < len(self._pairs) else None
            if now is not None and i == done.shards and [name for name, *_ in now] == [name for name, *_ in before]:
                return done if now == before else shard_begin, shard_begin
            if now != before:
                names = " and ".join(dict.fromkeys(name for name, *_ in before))
                self._refuse(f"{names}, where this one has other files, or which have changed")
        return done, shard_begin

    def _refuse(self, what: str) -> None:
        raise ScoreError(f"{self.name}: the state of a run with {what}; delete it to start anew")

    def _identity(self, shard: int) -> list[list[Any]]:
        """What tells the arrays of a shard from others: path and member, size, time of the last change."""
        found = []
        for name in self._pairs[shard].names:
            path, member = split_member(name)
            with contextlib.suppress(OSError):
                status = Path(path).stat()
                place = str(Path(path).resolve()) + ("" if member is None else f":{member}")
                found.append([place, status.st_size, status.st_mtime_ns])
        return found

    def begin(self, shard: int, done: _Done) -> None:
        """Note which files are read from now on. (Those that replace them meanwhile are others.)"""
        now = self._identity(shard)
        if done.rows and now != self._read[shard]:
            self._refuse(f"{self._pairs[shard].logits}, which has changed")
        self._read[shard] = now

    def save(self, done: _Done, shard_begin: _Done) -> None:
        files = [self._read[i] for i in range(done.shards + bool(done.rows))]
        held = {"format": _FORMAT, "options": self._options, "files": files, "output": self.output}
        held |= {"done": done.to_json(), "shard_begin": shard_begin.to_json()}
        held["digest"] = _digest(held)
        path = Path(os.path.realpath(self.name))
        temporary = path.with_name(f".fastloss-{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("x", encoding="utf-8") as file:
                json.dump(held, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            if os.name == "posix":
                directory = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise ScoreError(f"{self.name}: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------------- scoring


def worst_first(losses: Array, count: int) -> Array:
    """Where the worst losses are: NaN first, then the largest; of equals the first ones."""
    if losses.size > count:
        # As many runs have a larger maximum, or a NaN, as there are worst losses: no worst one is less than the least.
        run = max(1, min(_RUN, losses.size // count))
        maxima = np.maximum.reduceat(losses, np.arange(0, losses.size, run))
        threshold = np.partition(maxima, -count)[-count]  # NaN counts as the largest
        candidates = np.flatnonzero(np.isnan(losses) | (losses >= threshold))
    else:
        candidates = np.arange(losses.size)
    values = losses[candidates]
    return candidates[np.lexsort((-values, ~np.isnan(values)))[:count]]


def _predictions(logits: Array) -> Array:
    """The class of the largest logit (the first of equal ones) of every row, in C order. What NumPy copies to find it,
    it copies in pieces.
    """
    found = np.empty(_validation.row_shape(logits.shape, 1), np.intp)
    for cut in _views.pieces(logits.shape, (1,)):
        found[_views.without(cut, 1)] = logits[cut].argmax(axis=1)
    return found.reshape(-1)


class _Run:
    """One run over the shards."""

    def __init__(
        self,
        pairs: list[_Pair],
        stream: "streaming.CrossEntropy | streaming.NLL",
        max_memory: int,
        details: bool,
        output: _Output | None,
        saved: _Saved | None,
    ) -> None:
        self._pairs = pairs
        self._stream = stream
        self._max_memory = max_memory
        self._details = details
        self._output = output
        self._saved = saved
        self.done, self._shard_begin = (_Done(), _Done()) if saved is None else saved.load()
        stream._state = self.done.state
        self._last_save = time.monotonic()
        self._bytes = 0

    def open(self, pair: _Pair) -> _Shard:
        """The arrays of a shard, which fit together."""
        if pair.missing:
            raise ScoreError(pair.missing)
        logits = read_array(pair.logits, LOGITS_MEMBERS, max_memory=self._max_memory)
        targets_name = split_member(pair.logits)[0] if pair.targets is None else pair.targets
        targets = read_array(targets_name, TARGETS_MEMBERS, pair.targets is None, self._max_memory)
        with self._naming(pair):
            functional._check(logits, targets, self._stream.weight, self._stream.ignore_index, self._stream._is_nll)
            row_shape = _validation.row_shape(logits.shape, _validation.class_axis(logits))
        if logits.ndim == 1:
            logits, targets = logits[np.newaxis], targets[np.newaxis]
        return _Shard(logits, targets, row_shape)

    @contextlib.contextmanager
    def _naming(self, pair: _Pair) -> Iterator[None]:
        """Errors that name the files instead of arguments."""
        names = {"input": pair.logits, "target": pair.targets or pair.logits}
        try:
            yield
        except ScoreError:
            raise
        except (ValueError, TypeError, IndexError) as error:
            name, separator, message = str(error).partition(": ")
            if separator and name in ("weight", "ignore_index") and len(self._pairs) > 1:
                raise ScoreError(f"{pair.logits}: {error}") from None
            if not separator or name not in names:
                raise
            raise ScoreError(f"{names[name]}: {message}") from None
        except MemoryError as error:
            raise ScoreError(f"{pair.logits}: out of memory ({error})") from None

    def run(self, show: Callable[[int, int, "_Run"], object]) -> None:
        """Score what is left."""
        if self._output is not None:
            with self._writing():
                self._begin_output()
        for index in range(self.done.shards, len(self._pairs)):
            pair = self._pairs[index]
            if self._saved is not None:
                self._saved.begin(index, self.done)
            shard = self.open(pair)
            if not self.done.rows:
                self._shard_begin = self.done
            for where, n_rows in _cuts(shard.logits.shape, self.done.rows, self._chunk_rows(shard)):
                with self._naming(pair):
                    self._score(pair, shard, where, n_rows)
                show(n_rows, self._bytes, self)
                self._save(SAVE_SECONDS)
            self._take_in_empty(pair, shard)
            self.done = self.done._replace(shards=index + 1, rows=0)
        self._save(0.0)
        if self._output is not None:
            with self._writing():
                self._output.finish()

    def _take_in_empty(self, pair: _Pair, shard: _Shard) -> None:
        """A shard without rows fits or not, like any other."""
        if not shard.n_rows:
            with self._naming(pair):
                self._stream.update(shard.logits, shard.targets)
            self.done = self.done._replace(state=self._stream._state)

    def save_after_failure(self) -> None:
        """Keep what was scored, if it is to be kept."""
        if self._output is not None:
            self._output.abandon()
        if self._saved is not None and self.done.state.rows:
            self._saved.save(self.done, self._shard_begin)

    def _save(self, seconds: float) -> None:
        if self._saved is not None and time.monotonic() - self._last_save >= seconds:
            if self._output is not None:
                with self._writing():
                    self._output.sync()
                    self._saved.output = self._output.identity()
            self._saved.save(self.done, self._shard_begin)
            self._last_save = time.monotonic()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            assert self._output is not None
            raise ScoreError(f"{self._output.name}: {error.strerror or error}") from None

    def _chunk_rows(self, shard: _Shard) -> int:
        row_bytes = max(1.0, (shard.logits.nbytes + shard.targets.nbytes) / max(1, shard.n_rows))
        rows = min(CHUNK_BYTES, self._max_memory) / row_bytes
        if self._wants_rows:
            rows = min(rows, self._max_memory / _SHARE_OF_MEMORY / _ROW_BYTES)
        return max(1, int(rows))

    @property
    def _wants_rows(self) -> bool:
        return self._details or self._output is not None

    def _begin_output(self) -> None:
        """The output's shape is that of all shards, one after the other. (What cannot be read stops the run later.)"""
        assert self._output is not None
        if self.done.shards == len(self._pairs) and self._output.is_finished():
            if self._saved is not None and self._saved.output != self._output.identity():
                raise ScoreError(f"{self._output.name}: not the losses of this run; delete its state to start anew")
            return
        shapes, dtype = [], None
        for pair in self._pairs:
            with contextlib.suppress(ScoreError):
                shard = self.open(pair)
                shapes.append(shard.row_shape)
                dtype = dtype or self._dtype(shard)
                if shard.row_shape[1:] != shapes[0][1:]:
                    break
        if not shapes:
            return
        if len(self._pairs) > 1:
            shapes = [shape or (1,) for shape in shapes]
        odd = [shape for shape in shapes if shape[1:] != shapes[0][1:]]
        if odd:
            raise ScoreError(f"{self._output.name}: rows of shape {odd[0]} cannot follow those of shape {shapes[0]}")
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
        self._output.open(shape, dtype or np.dtype(np.float64), self.done.written)

    def _dtype(self, shard: _Shard) -> np.dtype[Any]:
        if shard.logits.shape == shard.targets.shape and not self._stream._is_nll:
            return _views.compute_dtype(shard.logits.dtype, shard.targets.dtype)
        return _views.compute_dtype(shard.logits.dtype)

    def _score(self, pair: _Pair, shard: _Shard, where: tuple[slice, ...], n_rows: int) -> None:
        """Take in a chunk."""
        at_classes = (where[0], slice(None), *where[1:])
        logits = shard.logits[at_classes]
        has_probabilities = shard.targets.shape == shard.logits.shape and not self._stream._is_nll
        targets = shard.targets[at_classes if has_probabilities else where]
        _check_length(shard.logits, pair.logits)
        _check_length(shard.targets, pair.targets or pair.logits)
        losses = np.empty(_validation.row_shape(logits.shape, 1), self._dtype(shard)) if self._wants_rows else None
        try:
            n_correct = self._stream._update(logits, targets, losses, self._details)
        except IndexError:
            whole = shard.targets if shard.row_shape else shard.targets[0]
            _validation.target_out_of_range(whole, logits.shape[1], self._stream.ignore_index)
        done = self.done._replace(rows=self.done.rows + n_rows, state=self._stream._state)
        if self._details and losses is not None:
            if has_probabilities:
                n_correct = int(np.count_nonzero(_predictions(logits) == _predictions(targets)))
            worst = self._find_worst(pair, shard, logits, targets, losses, has_probabilities)
            done = done._replace(n_correct=done.n_correct + n_correct, worst=worst)
        if self._output is not None and losses is not None:
            with self._writing():
                self._output.write(losses)
            done = done._replace(written=done.written + n_rows)
        self._bytes += logits.nbytes + targets.nbytes
        self.done = done
        if done.rows < shard.n_rows:  # (else the whole file will be unmapped)
            _release_pages(logits)
            _release_pages(targets)

    def _find_worst(
        self, pair: _Pair, shard: _Shard, logits: Array, targets: Array, losses: Array, has_probabilities: bool
    ) -> tuple[ScoredRow, ...]:
        """The worst rows so far, with those of a chunk."""
        losses = losses.reshape(-1)
        if not has_probabilities and not (is_kept := _validation.is_kept(targets, self._stream.ignore_index)).all():
            kept = np.flatnonzero(is_kept)
            places = kept[worst_first(losses[kept], N_WORST)]
        else:
            places = worst_first(losses, N_WORST)
        row_shape = _validation.row_shape(logits.shape, 1)
        by_class, worst = np.moveaxis(logits, 1, -1), list(self.done.worst)
        for place in map(int, places):
            row = tuple(map(int, np.unravel_index(place, row_shape)))
            at = tuple(map(int, np.unravel_index(self.done.rows + place, shard.row_shape)))
            target = np.moveaxis(targets, 1, -1)[row].argmax() if has_probabilities else targets[row]
            worst.append(ScoredRow(pair.logits, at, int(target), int(by_class[row].argmax()), float(losses[place])))
        worst.sort(key=lambda row: row.badness)
        return tuple(worst[:N_WORST])

    def scores(self) -> FileScores:
        """What has been scored."""
        done, stream = self.done, self._stream
        state = done.state
        stream._state = state
        return FileScores(
            loss=stream.compute(),
            mean=stream._reduced("mean"),
            n_rows=state.rows,
            n_kept=state.kept,
            n_classes=int(state.common.get("classes", 0)),
            n_shards=len(self._pairs),
            n_scored_shards=done.shards,
            n_correct=done.n_correct if self._details else None,
            worst=done.worst,
            dtype=np.dtype(state.common.get("dtype", "float64")),
        )

    def count_rows(self) -> int:
        """All rows there are to score, as far as the files can be read."""
        n_rows = 0
        for pair in self._pairs:
            with contextlib.suppress(ScoreError):
                n_rows += self.open(pair).n_rows
        return n_rows


@contextlib.contextmanager
def _progress(run: _Run, is_wanted: bool) -> Iterator[Callable[[int, int, _Run], object]]:
    """A progress bar for work longer than a second, where tqdm is installed and somebody sees standard error."""
    if is_wanted and sys.stderr is not None and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            # By name, since tqdm is no dependency and has no types.
            tqdm = importlib.import_module("tqdm").tqdm
            total, before = run.count_rows(), run.done.state.rows
            with tqdm(
                total=total, initial=before, unit="row", unit_scale=True, delay=1.0, leave=False, file=sys.stderr
            ) as bar:

                def show(n_rows: int, n_bytes: int, run: _Run) -> None:
                    speed = n_bytes / max(bar.format_dict["elapsed"], 1e-9)
                    loss = run._stream._reduced("mean")
                    bar.set_postfix_str(f"{tqdm.format_sizeof(speed, 'B')}/s, loss {loss:.6g}", refresh=False)
                    bar.update(n_rows)

                yield show
            return
    yield lambda n_rows, n_bytes, run: None


def score_file(
    logits: Paths,
    targets: Paths | None = None,
    *,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    log_probs: bool = False,
    details: bool = False,
    output: str | os.PathLike[str] | None = None,
    max_memory: int = 256 * 2**20,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> FileScores:
    """Cross-entropy of logits in files, which may be larger than the memory.

    Parameters
    ----------
    logits : path, or sequence of paths
        A ``.npy`` file, which is memory-mapped and read in chunks; a member of an ``.npz`` file (``FILE.npz:NAME``, or
        the one called logits) or, with `pyarrow`, a column of lists of a Parquet or Arrow file
        (``FILE.parquet:NAME``), which are read into memory; or many of them, *shards* that follow one another: a list,
        in its order, or a directory or a pattern such as ``"logits-*.npy"``, in the order of their names, in which
        numbers count by their value (9 before 10). Of a directory the files whose names end in .npy, .npz, .parquet,
        .arrow or .feather, but for hidden ones. Each holds an array of shape ``(C)``, ``(N, C)`` or
        ``(N, C, d1, ..., dK)``.
    targets : path, or sequence of paths, optional
        Class indices or class probabilities, as :func:`fastloss.cross_entropy` takes them, in as many files. Those of
        directories are paired by their names without suffix, those of patterns by what the wildcards stand for, those
        of lists by their order. Without it the files of `logits` are ``.npz`` files that hold both.
    weight, ignore_index, label_smoothing
        As in :func:`fastloss.cross_entropy`.
    reduction : {'mean', 'sum'}
        Which loss to report.
    log_probs : bool
        Whether `logits` holds log-probabilities, to be scored by :func:`fastloss.nll_loss`.
    details : bool
        Whether to find the accuracy and the worst rows as well, for which each chunk is read once more.
    output : path, optional
        A ``.npy`` file for the loss of every row, none of those that are read. It is put in place when it is complete.
    max_memory : int
        How many bytes to use for data, beyond the system's cache of the files.
    resume : path, optional
        A file for the state of the run, which is saved every few seconds, at the end, and when something fails. A run
        with the same files and options goes on from there, and ends in the same bits.
    progress : bool
        Whether to show a progress bar on standard error: if that is a terminal, and `tqdm` is installed.

    Returns
    -------
    FileScores
        The loss, the perplexity, counts, and what `details` asks for.

    Raises
    ------
    ScoreError
        (A ValueError) for a file that is missing, damaged or does not fit, which it names; it holds what was scored
        before. Also for a state of other files or options.
    ValueError, TypeError
        For options that no call could have, and what is no path.

    See Also
    --------
    fastloss.cross_entropy : The loss.
    fastloss.streaming.CrossEntropy : The same for chunks that come from elsewhere.

    Notes
    -----
    The loss has the bits that one call over all rows gives, for every size of chunks and shards, and for a run that was
    interrupted, killed included.

    No more than `max_memory` is mapped of a file at a time (of one in Fortran order all of it), and what was read is
    unmapped, so that it stays in the system's cache alone. The state is written to
    another file that then takes its place, and only after the losses that it speaks of have reached the disk.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> import fastloss
    >>> logits, labels = np.array([[2.0, 0.5], [0.1, 0.2], [1.0, -1.0]]), np.array([0, 1, 1])
    >>> with tempfile.TemporaryDirectory() as place:
    ...     for i, rows in enumerate((slice(0, 2), slice(2, 3))):
    ...         np.save(Path(place, f"logits-{i}.npy"), logits[rows])
    ...         np.save(Path(place, f"labels-{i}.npy"), labels[rows])
    ...     found = fastloss.score_file(f"{place}/logits-*.npy", f"{place}/labels-*.npy")
    >>> print(found.loss.round(6), found.n_rows)
    0.990913 3
    """
    stream: streaming.CrossEntropy | streaming.NLL
    if log_probs:
        if label_smoothing:
            raise ValueError(
                f"label_smoothing: got {label_smoothing} with log_probs, which takes the target's log-probability alone"
            )
        stream = streaming.NLL(weight, ignore_index=ignore_index, reduction=reduction)
    else:
        stream = streaming.CrossEntropy(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    memory = _validation.check_integer(max_memory, "max_memory")
    if memory < 1:
        raise ValueError(f"max_memory: got {memory}, expected a number of bytes")
    memory = min(memory, 1 << 62)
    logits, targets = _as_paths(logits, "logits"), None if targets is None else _as_paths(targets, "targets")
    places = {}
    for name, place in (("output", output), ("resume", resume)):
        if place is not None and not isinstance(place, str | os.PathLike):
            raise TypeError(f"{name}: got {type(place).__name__}, expected a path")
        if place is not None:
            places[name] = os.fspath(place)
    try:
        pairs = _pair_files(logits, targets)
        for name, path in places.items():
            _check_place(path, name, pairs, (logits, targets))
    except OSError as error:
        raise ScoreError(f"{error.filename or logits}: {error.strerror or error}") from None
    if len(places) == 2 and len({os.path.realpath(path) for path in places.values()}) == 1:
        raise ScoreError(f"{output}: got for output and for resume, expected two files")
    writer = _Output(places["output"], places.get("resume")) if output is not None else None
    saved = None
    if resume is not None:
        held_weight = None if stream.weight is None else stream.weight.astype(np.float64)
        options = {
            "function": "nll_loss" if log_probs else "cross_entropy",
            "weight": None if held_weight is None else hashlib.sha256(held_weight.tobytes()).hexdigest(),
            "ignore_index": str(stream.ignore_index),
            "label_smoothing": repr(stream.label_smoothing),
            "details": details,
            "output": None if writer is None else str(writer.path),
        }
        saved = _Saved(places["resume"], options, pairs)
    run = _Run(pairs, stream, memory, details, writer, saved)
    try:
        with _progress(run, progress) as show:
            run.run(show)
    except BaseException as error:
        if isinstance(error, ScoreError):
            error.scores = run.scores()
        try:
            run.save_after_failure()
        except ScoreError as unsaved:  # what came first counts
            if isinstance(error, ScoreError) and str(unsaved) not in str(error):
                error.args = (f"{error} (and the state could not be saved: {unsaved})",)
        raise
    return run.scores()
