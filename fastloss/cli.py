"""The command line: ``python -m fastloss score``, ``warmup`` or ``info``, or ``fastloss score`` and so on.

The rows of a file are scored chunk after chunk, so that memory-mapped logits may be larger than the memory, and the
losses are added without rounding, so that the mean is that of :func:`fastloss.cross_entropy` over the whole file. What
a user got wrong is a :class:`CommandError`: one line on standard error and exit status 2.
"""

import argparse
import contextlib
import importlib
import json
import math
import mmap
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

import fastloss
from fastloss import _info, _reduction, _validation, _views, _warmup
from fastloss._validation import Array

__all__ = ["main"]

# The logits of one chunk: 16 MB of float32.
CHUNK_ELEMENTS = 1 << 22

N_WORST = 5

SAMPLE = Path(__file__).parent / "sample" / "digits.npz"
_SAMPLE_TITLE = "Sample: scikit-learn's handwritten digits, held-out predictions of a logistic regression"

# What an array is called inside an .npz file.
_LOGITS_MEMBERS = ("logits", "log_probs", "input")
_TARGETS_MEMBERS = ("targets", "target", "labels")
_WEIGHT_MEMBERS = ("weight", "weights")
_NO_TARGETS = "holds one array; expected TARGETS too, or one .npz file with logits and targets"

_USER_ERROR = 2
_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE


class CommandError(Exception):
    """A mistake of the user, or of the machine: its one line says what is wrong, and in which file."""


# ---------------------------------------------------------------------------------------------------------- reading


def _split_member(name: str) -> tuple[Path, str | None]:
    """``FILE.npz:MEMBER`` as the file and the member."""
    head, separator, member = name.rpartition(".npz:")
    return (Path(head + ".npz"), member) if separator else (Path(name), None)


def _read(name: str, members: Sequence[str], beside_logits: bool = False) -> Array:
    """The array of a file: that of a ``.npy``, memory-mapped, or a member of a ``.npz``, see :func:`_choose_member`.

    With `beside_logits` the file holds the logits too, so a single array does not do.
    """
    path, member = _split_member(name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CommandError(f"{path}: not a regular file")
        with path.open("rb") as file:
            magic = file.read(6)
            if not magic:
                raise CommandError(f"{path}: the file is empty")
            if magic == b"\x93NUMPY":
                if beside_logits:
                    raise CommandError(f"{path}: {_NO_TARGETS}")
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            elif magic.startswith(b"PK"):
                file.seek(0)
                with np.load(file, allow_pickle=False) as archive:
                    array = archive[_choose_member(path, archive.files, member, members, beside_logits)]
            else:
                raise CommandError(f"{path}: neither a .npy nor a .npz file")
    except CommandError:
        raise
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    except MemoryError as error:
        raise CommandError(f"{path}: out of memory ({error})") from None
    except Exception as error:  # whatever damaged bytes lead the readers of zip, zlib and npy to
        raise CommandError(f"{path}: cannot be read, truncated or damaged ({error})") from None
    if not isinstance(array, np.ndarray):
        raise CommandError(f"{name}: not an array")
    if array.dtype == np.dtype("V2"):
        raise CommandError(
            f"{name}: dtype |V2, which is how bfloat16 is saved (.npy files cannot name it); save it as float32"
        )
    return np.asarray(array)


def _choose_member(
    path: Path, held: Sequence[str], member: str | None, members: Sequence[str], beside_logits: bool
) -> str:
    """The member asked for, else the one with a name among `members`, else the only one."""
    listed = ", ".join(held) or "nothing"
    if member is not None:
        if member not in held:
            raise CommandError(f"{path}: no member {member}, holds {listed}")
        return member
    known = [name for name in held if name in members]
    if len(known) == 1:
        return known[0]
    if len(held) == 1 and beside_logits:
        raise CommandError(f"{path}: {_NO_TARGETS}")
    if len(held) == 1:
        return held[0]
    raise CommandError(f"{path}: holds {listed}; say which one are the {members[0]}, as {path}:NAME")


# ---------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Problem:
    """The arrays to score and the options of the loss.

    Making one checks, as :func:`fastloss.cross_entropy` does, everything but the range of the class indices.
    """

    logits: Array
    targets: Array
    weight: Array | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    is_nll: bool = False

    def __post_init__(self) -> None:
        _validation.check_label_smoothing(self.label_smoothing)
        _validation.as_real(self.logits, "input")
        _validation.as_real(self.targets, "target")
        _validation.class_weight(self.weight, self.n_classes)
        if self.has_probabilities:
            _validation.probability_target(self.targets, self.ignore_index)
        else:
            _validation.index_target(self.targets, self.logits, self.class_axis, probabilities=not self.is_nll)

    @property
    def class_axis(self) -> int:
        return _validation.class_axis(self.logits)

    @property
    def n_classes(self) -> int:
        n_classes: int = self.logits.shape[self.class_axis]
        return n_classes

    @property
    def row_shape(self) -> tuple[int, ...]:
        return _validation.row_shape(self.logits.shape, self.class_axis)

    @property
    def has_probabilities(self) -> bool:
        return not self.is_nll and self.targets.shape == self.logits.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the losses."""
        if self.has_probabilities:
            return _views.compute_dtype(self.logits.dtype, self.targets.dtype)
        return _views.compute_dtype(self.logits.dtype)

    def loss(self, logits: Array, targets: Array, reduction: str) -> Any:
        """The loss of some rows."""
        if self.is_nll:
            return fastloss.nll_loss(logits, targets, self.weight, ignore_index=self.ignore_index, reduction=reduction)
        return fastloss.cross_entropy(
            logits,
            targets,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
        )


class ScoredRow(NamedTuple):
    """One row among the worst; its class indices are the target's and the prediction's."""

    position: tuple[int, ...]
    target: int
    predicted: int
    loss: float

    @property
    def badness(self) -> tuple[bool, float]:
        """What sorts rows by how badly they score: NaN first, then the largest loss."""
        return (False, 0.0) if math.isnan(self.loss) else (True, -self.loss)


@dataclass
class Scores:
    """What scoring chunk after chunk has found so far."""

    problem: Problem
    n_kept: int = 0
    n_correct: int = 0
    worst: list[ScoredRow] = field(default_factory=list)
    _losses: _reduction.ExactSum = field(default_factory=_reduction.ExactSum)
    _weights: _reduction.ExactSum = field(default_factory=_reduction.ExactSum)

    def add(self, begin: int, logits: Array, targets: Array, losses: Array) -> None:
        """Take in the rows of a chunk; `begin` counts the rows of the chunks before."""
        problem = self.problem
        predicted = logits.argmax(axis=1).reshape(-1)
        losses = losses.reshape(-1)
        if problem.has_probabilities:
            labels = targets.argmax(axis=1).reshape(-1)
            kept = np.arange(losses.size)
        else:
            labels = targets.reshape(-1)
            kept = np.flatnonzero(labels != problem.ignore_index)
        if kept.size < losses.size:
            predicted, losses, labels = predicted[kept], losses[kept], labels[kept]
        self.n_kept += kept.size
        self.n_correct += int(np.count_nonzero(predicted == labels))
        self._losses.add(losses)
        if problem.weight is not None and not problem.has_probabilities:
            self._weights.add(self._class_weights()[labels.astype(np.intp)])
        for i in worst_first(losses, N_WORST):
            position = np.unravel_index(begin + int(kept[i]), problem.row_shape)
            row = ScoredRow(tuple(map(int, position)), int(labels[i]), int(predicted[i]), float(losses[i]))
            self.worst.append(row)
        self.worst = sorted(self.worst, key=lambda row: row.badness)[:N_WORST]

    def _class_weights(self) -> Array:
        """The weights in the dtype in which the losses count them."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(self.problem.weight).astype(self.problem.dtype)

    def reduced(self, reduction: str) -> Any:
        """The sum or the mean: the scalar that the loss gives for the whole."""
        problem = self.problem
        total = self._losses.total
        if reduction == "mean":
            weighted = problem.weight is not None and not problem.has_probabilities
            denominator = self._weights.total if weighted else float(self.n_kept)
            if problem.label_smoothing and self.n_kept and denominator == 0:
                # The terms of the loss are divided one by one then, and only their sum is known here.
                return problem.loss(problem.logits, problem.targets, "mean")
            total = _reduction.divide(total, denominator)
        with np.errstate(over="ignore"):
            return problem.dtype.type(total)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.float64(self.reduced("mean"))))

    @property
    def accuracy(self) -> float:
        return _reduction.divide(self.n_correct, self.n_kept)


def worst_first(losses: Array, count: int) -> Array:
    """Where the worst losses are: NaN first, then the largest; of equals the first ones."""
    candidates = np.arange(losses.size)
    if losses.size > count:
        threshold = np.partition(losses, -count)[-count]  # NaN counts as the largest
        candidates = np.flatnonzero(np.isnan(losses) | (losses >= threshold))
    values = losses[candidates]
    return candidates[np.lexsort((-values, ~np.isnan(values)))[:count]]


def score(problem: Problem, write: Callable[[Array], object]) -> Scores:
    """Score all rows, chunk by chunk, and hand the losses of each chunk to `write`.

    The IndexError for a class index out of range names the position in the whole array.
    """
    scores = Scores(problem)
    logits, targets = problem.logits, problem.targets
    if logits.ndim == 1:
        logits, targets = logits[np.newaxis], targets[np.newaxis]
    n_samples = len(logits)
    rows_per_sample = math.prod(logits.shape[2:])
    step = max(1, CHUNK_ELEMENTS // max(1, problem.n_classes * rows_per_sample))
    with _progress(n_samples) as advance:
        for begin in range(0, n_samples, step):
            chunk, labels = logits[begin : begin + step], targets[begin : begin + step]
            try:
                losses = problem.loss(chunk, labels, "none")
            except IndexError:
                _validation.target_out_of_range(problem.targets, problem.n_classes, problem.ignore_index)
            write(losses)
            scores.add(begin * rows_per_sample, chunk, labels, losses)
            advance(len(chunk))
            _release_pages(logits)
            _release_pages(targets)
    return scores


def _release_pages(array: Array) -> None:
    """Unmap what was read of a memory-mapped file: it stays in the system's cache, but counts no more as ours."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if sys.platform != "win32" and isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def _progress(n_samples: int) -> Iterator[Callable[[int], object]]:
    """A progress bar for work longer than a second, where tqdm is installed and somebody sees standard error."""
    if sys.stderr is not None and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            # By name, since tqdm is no dependency and has no types.
            tqdm = importlib.import_module("tqdm").tqdm
            with tqdm(total=n_samples, unit="row", unit_scale=True, delay=1.0, leave=False) as bar:
                yield bar.update
            return
    yield lambda n: None


# ---------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def _npy_writer(name: str | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Callable[[Array], object]]:
    """Write a ``.npy`` file piece by piece, under another name until it is complete; None writes nothing.

    Not through a memory map: a full disk would end the process, where writing raises.
    """
    if name is None:
        yield lambda piece: None
        return
    path = Path(os.path.realpath(name))  # replace what a link points to, not the link
    temporary = path.with_name(f".fastloss-{secrets.token_hex(8)}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise CommandError(f"{name}: not a regular file")
        with temporary.open("xb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            yield lambda piece: file.write(np.ascontiguousarray(piece).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise CommandError(f"{name}: {error.strerror or error}") from None
        raise


def _json_number(value: float) -> float | str:
    """NaN and infinities, which JSON lacks, as strings that Python's ``float`` and JavaScript's ``Number`` read."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _as_json(scores: Scores, reduction: str, seconds: float) -> str:
    problem = scores.problem
    worst = [
        {
            "position": list(row.position),
            "target": row.target,
            "predicted": row.predicted,
            "loss": _json_number(row.loss),
        }
        for row in scores.worst
    ]
    report = {
        "rows": math.prod(problem.row_shape),
        "kept": scores.n_kept,
        "classes": problem.n_classes,
        "function": "nll_loss" if problem.is_nll else "cross_entropy",
        "reduction": reduction,
        "loss": None if reduction == "none" else _json_number(float(scores.reduced(reduction))),
        "perplexity": _json_number(scores.perplexity),
        "accuracy": _json_number(scores.accuracy),
        "worst": worst,
        "seconds": seconds,
    }
    return json.dumps(report, allow_nan=False)


def _as_table(scores: Scores, reduction: str, seconds: float) -> str:
    problem = scores.problem
    n_rows = math.prod(problem.row_shape)
    n_ignored = n_rows - scores.n_kept
    if reduction == "none":
        loss = "not reduced (--output FILE writes one loss per row)"
    else:
        loss = f"{scores.reduced(reduction)!s} ({reduction})"
    lines = [
        ("rows", f"{n_rows}" + (f" ({n_ignored} ignored)" if n_ignored else "")),
        ("classes", f"{problem.n_classes}"),
        ("negative log-likelihood" if problem.is_nll else "cross-entropy", loss),
        ("perplexity", f"{scores.perplexity:.6g}"),
        ("accuracy", f"{scores.accuracy:.4f} ({scores.n_correct} of {scores.n_kept})"),
        ("time", f"{seconds:.3g} s, compilation included"),
    ]
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    return f"{text}\n\n{_worst_table(scores)}" if scores.worst else text


def _worst_table(scores: Scores) -> str:
    cells = [("worst rows", "target", "predicted", "loss")]
    for row in scores.worst:
        position = str(row.position[0] if len(row.position) == 1 else row.position)
        cells.append((position, str(row.target), str(row.predicted), str(scores.problem.dtype.type(row.loss))))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in cells)


# ---------------------------------------------------------------------------------------------------------- commands


def _score_command(arguments: argparse.Namespace) -> None:
    """``score``: read, score, report."""
    start = time.perf_counter()
    logits_name = str(SAMPLE) if arguments.logits is None else arguments.logits
    targets_name = str(_split_member(logits_name)[0]) if arguments.targets is None else arguments.targets
    # What the messages of fastloss start with, and what the user calls it.
    names = {
        "input": logits_name,
        "target": targets_name,
        "weight": arguments.weight,
        "label_smoothing": "--label-smoothing",
        "ignore_index": "--ignore-index",
    }
    if arguments.log_probs and arguments.label_smoothing:
        raise CommandError("--label-smoothing: not with --log-probs, which takes the target's log-probability alone")
    try:
        problem = Problem(
            _read(logits_name, _LOGITS_MEMBERS),
            _read(targets_name, _TARGETS_MEMBERS, beside_logits=arguments.targets is None),
            None if arguments.weight is None else _read(arguments.weight, _WEIGHT_MEMBERS),
            arguments.ignore_index,
            arguments.label_smoothing,
            arguments.log_probs,
        )
        with _npy_writer(arguments.output, problem.row_shape, problem.dtype) as write:
            scores = score(problem, write)
    except (ValueError, TypeError, IndexError) as error:
        name, _, message = str(error).partition(": ")
        if name not in names:
            raise
        raise CommandError(f"{names[name]}: {message}") from None
    except MemoryError as error:
        raise CommandError(f"{logits_name}: out of memory ({error})") from None
    seconds = time.perf_counter() - start
    if arguments.json:
        print(_as_json(scores, arguments.reduction, seconds))
        return
    if arguments.logits is None:
        print(f"{_SAMPLE_TITLE}\n")
    print(_as_table(scores, arguments.reduction, seconds))


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, like any other."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastloss", description=fastloss.__doc__)
    parser.add_argument("--version", action="version", version=f"fastloss {fastloss.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_score(commands)
    _add_warmup(commands)
    _add_info(commands)
    return parser


def _add_warmup(commands: Any) -> None:
    parser = commands.add_parser(
        "warmup",
        help="compile ahead of the first call",
        description="Compile every function of fastloss, for contiguous and for strided or few classes, serially and "
        "in parallel, into the cache that `fastloss info` names: for a container image or a deployment. What is "
        "there already is not compiled again.",
    )
    parser.add_argument(
        "--dtype",
        dest="dtypes",
        metavar="DTYPE",
        action="append",
        choices=_warmup.DTYPES,
        help="float16, bfloat16, float32 (default) or float64; may be given several times",
    )
    parser.set_defaults(run=_warmup_command)


def _warmup_command(arguments: argparse.Namespace) -> None:
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    try:
        n_kernels = _warmup.compile_all(arguments.dtypes or ["float32"], is_terminal)
    except ImportError as error:
        raise CommandError(str(error)) from None
    if not n_kernels:
        raise CommandError("the cache takes no files: `fastloss info` names its place, FASTLOSS_CACHE_DIR sets it")
    print(f"{n_kernels} kernels in the cache")


def _add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, CPU, threads, cache",
        description="Print what a bug report needs: versions, CPU, vector width, threading layer, threads, and where "
        "the cache is and how large.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=lambda arguments: _info.show(arguments.json))


def _add_score(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="score saved predictions",
        description="Score predictions against targets: cross-entropy, perplexity, accuracy and the worst rows. "
        "Without LOGITS, score a sample that comes with fastloss.",
        epilog="""\
A file is .npy, which is memory-mapped and read in chunks, or .npz, which is read into memory. Of an .npz with several
members FILE.npz:NAME takes one; members named logits, targets (or labels) and weight are found by themselves.

With --json the report is one JSON object, in which NaN and infinities are the strings "NaN", "Infinity", "-Infinity".

The exit status is 0, 2 after an error, which standard error tells in one line, or 130 after Ctrl-C.

examples:
  fastloss score
  fastloss score logits.npy targets.npy --ignore-index 0 --output losses.npy
  fastloss score predictions.npz:logits predictions.npz:labels --json
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "logits", metavar="LOGITS", nargs="?", help="logits, of shape (C), (N, C) or (N, C, d1, ..., dK)"
    )
    parser.add_argument(
        "targets",
        metavar="TARGETS",
        nargs="?",
        help="class indices, of the shape of LOGITS without its class axis, or class probabilities, of the shape of "
        "LOGITS; may be left out where LOGITS is an .npz that holds both",
    )
    parser.add_argument("--weight", metavar="FILE", help="one weight per class")
    parser.add_argument(
        "--ignore-index",
        metavar="N",
        type=int,
        default=-100,
        help="the class index of rows to leave out (default: -100)",
    )
    parser.add_argument(
        "--label-smoothing", metavar="X", type=float, default=0.0, help="label smoothing in [0, 1] (default: 0)"
    )
    parser.add_argument(
        "--reduction",
        choices=("mean", "sum", "none"),
        default="mean",
        help="the loss to report: the mean (default), the sum, or none, for --output alone",
    )
    parser.add_argument("--log-probs", action="store_true", help="LOGITS holds log-probabilities: score with nll_loss")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the loss of every row to FILE (.npy), which is replaced when all is done",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=_score_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        The exit status: 0, 2 after an error, 130 after Ctrl-C, 141 where nobody reads standard output any more.

    """
    try:
        try:
            arguments = _parser().parse_args(argv)
            arguments.run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except CommandError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return _BROKEN_PIPE
    except OSError as error:
        _abandon_stdout()
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}")
    return 0


def _fail(message: str) -> int:
    print("fastloss: error:", " ".join(message.splitlines()), file=sys.stderr)
    return _USER_ERROR


def _abandon_stdout() -> None:
    """Let what is left in the buffer go nowhere: the interpreter would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
