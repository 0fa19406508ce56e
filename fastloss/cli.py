"""The command line: ``python -m fastloss score``, ``warmup`` or ``info``, or ``fastloss score`` and so on.

The work is that of :func:`fastloss.score_file`; here are the options and the report. What a user got wrong is a
:class:`CommandError` or a :class:`fastloss.files.ScoreError`: one line on standard error and exit status 2.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import fastloss
from fastloss import _info, _warmup
from fastloss.files import WEIGHT_MEMBERS, FileScores, ScoredRow, ScoreError, read_array, score_file, split_member
from fastloss.functional import _scalar

__all__ = ["main"]

SAMPLE = Path(__file__).parent / "sample" / "digits.npz"
_SAMPLE_TITLE = "Sample: scikit-learn's handwritten digits, held-out predictions of a logistic regression"

_USER_ERROR = 2
_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE


class CommandError(Exception):
    """A mistake of the user: its one line says what is wrong."""


# ------------------------------------------------------------------------------------------------------------ report


def _json_number(value: float) -> float | str:
    """NaN and infinities, which JSON lacks, as strings that Python's ``float`` and JavaScript's ``Number`` read."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _as_json(scores: FileScores, is_nll: bool, reduction: str, seconds: float) -> str:
    worst = [
        {
            "position": list(row.position),
            "target": row.target,
            "predicted": row.predicted,
            "loss": _json_number(row.loss),
        }
        | ({"file": row.file} if scores.n_shards > 1 else {})
        for row in scores.worst
    ]
    report = {
        "rows": scores.n_rows,
        "kept": scores.n_kept,
        "classes": scores.n_classes,
        "shards": scores.n_shards,
        "function": "nll_loss" if is_nll else "cross_entropy",
        "reduction": reduction,
        "loss": None if reduction == "none" else _json_number(float(scores.loss)),
        "perplexity": _json_number(scores.perplexity),
        "accuracy": _json_number(scores.accuracy),
        "worst": worst,
        "seconds": seconds,
    }
    return json.dumps(report, allow_nan=False)


def _as_table(scores: FileScores, is_nll: bool, reduction: str, seconds: float) -> str:
    n_ignored = scores.n_rows - scores.n_kept
    if reduction == "none":
        loss = "not reduced (--output FILE writes one loss per row)"
    else:
        loss = f"{scores.loss!s} ({reduction})"
    lines = [
        ("rows", f"{scores.n_rows}" + (f" ({n_ignored} ignored)" if n_ignored else "")),
        ("classes", f"{scores.n_classes}"),
        ("negative log-likelihood" if is_nll else "cross-entropy", loss),
        ("perplexity", f"{scores.perplexity:.6g}"),
        ("accuracy", f"{scores.accuracy:.4f} ({scores.n_correct} of {scores.n_kept})"),
        ("time", f"{seconds:.3g} s, compilation included"),
    ]
    if scores.n_shards > 1:
        lines.insert(0, ("shards", f"{scores.n_shards}"))
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    return f"{text}\n\n{_worst_table(scores)}" if scores.worst else text


def _place(row: ScoredRow, scores: FileScores) -> str:
    position = str(row.position[0] if len(row.position) == 1 else row.position)
    return f"{row.file}: {position}" if scores.n_shards > 1 else position


def _worst_table(scores: FileScores) -> str:
    cells = [("worst rows", "target", "predicted", "loss")]
    for row in scores.worst:
        loss = _scalar(row.loss, scores.dtype)
        cells.append((_place(row, scores), str(row.target), str(row.predicted), str(loss)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in cells)


# ---------------------------------------------------------------------------------------------------------- commands

# What the messages of fastloss start with, and what the user calls it.
_OPTION_NAMES = {
    "label_smoothing": "--label-smoothing",
    "ignore_index": "--ignore-index",
    "max_memory": "--max-memory",
}


def _score_command(arguments: argparse.Namespace) -> None:
    """``score``: read, score, report."""
    start = time.perf_counter()
    if arguments.log_probs and arguments.label_smoothing:
        raise CommandError("--label-smoothing: not with --log-probs, which takes the target's log-probability alone")
    written = [os.path.realpath(path) for path in (arguments.output, arguments.resume) if path is not None]
    if arguments.weight is not None and os.path.realpath(split_member(arguments.weight)[0]) in written:
        raise CommandError(f"{arguments.weight}: is read by this run, expected another file for --output or --resume")
    try:
        scores = score_file(
            str(SAMPLE) if arguments.logits is None else arguments.logits,
            arguments.targets,
            weight=None if arguments.weight is None else read_array(arguments.weight, WEIGHT_MEMBERS),
            ignore_index=arguments.ignore_index,
            label_smoothing=arguments.label_smoothing,
            reduction="mean" if arguments.reduction == "none" else arguments.reduction,
            log_probs=arguments.log_probs,
            details=True,
            output=arguments.output,
            max_memory=arguments.max_memory,
            resume=arguments.resume,
            progress=True,
        )
    except ScoreError as error:
        raise CommandError(f"{error}{_scored_before(error.scores)}") from None
    except (ValueError, TypeError) as error:
        name, _, message = str(error).partition(": ")
        names = {**_OPTION_NAMES, "weight": arguments.weight}
        if name not in names:
            raise
        raise CommandError(f"{names[name]}: {message}") from None
    seconds = time.perf_counter() - start
    if arguments.json:
        print(_as_json(scores, arguments.log_probs, arguments.reduction, seconds))
        return
    if arguments.logits is None:
        print(f"{_SAMPLE_TITLE}\n")
    # The names of files can have characters that standard output has not.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    table = _as_table(scores, arguments.log_probs, arguments.reduction, seconds)
    print(table.encode(encoding, "backslashreplace").decode(encoding))


def _scored_before(scores: FileScores | None) -> str:
    """What to say of the shards before the one that failed."""
    if scores is None or scores.n_shards < 2:
        return ""
    return f" (before it: {scores.n_scored_shards} shards, {scores.n_rows} rows, mean loss {scores.mean})"


def _size(text: str) -> int:
    """Bytes, with or without a unit."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"invalid size: {text!r}, expected a number of bytes, such as 256MiB")
    number, unit, _ = match.groups()
    size = float(number) * 1024 ** " KMGT".index(unit.upper() or " ")
    if math.isinf(size):
        raise argparse.ArgumentTypeError(f"invalid size: {text[:20]!r}..., expected a smaller number of bytes")
    return int(size)


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
        description="Compile the losses, softmax and logsumexp, for contiguous and for strided or few classes, "
        "serially and in parallel, into the cache that `fastloss info` names: for a container image or a deployment. "
        "What is there already is not compiled again.",
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
    except ModuleNotFoundError as error:
        if error.name != "ml_dtypes":
            raise
        raise CommandError("--dtype bfloat16: expected the package ml_dtypes, which is not installed") from None
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
A file is .npy, which is memory-mapped and read in chunks, or .npz, which is read into memory, or, with pyarrow, Parquet
or Arrow (.arrow, .feather), whose columns are read into memory. Of several members or columns FILE.npz:NAME and
FILE.parquet:NAME take one; those named logits, targets (or labels) and weight are found by themselves.

Directories, and patterns (quoted), stand for shards: files that follow one another in the order of their names, in
which numbers count by their value (9 before 10). Those of LOGITS and TARGETS are paired by name: patterns by what the
wildcards stand for, directories by the name without suffix.

With --resume the state of the run is saved every few seconds, at the end, and when something fails, and a run with the
same files and options goes on from there, even after kill -9.

With --json the report is one JSON object, in which NaN and infinities are the strings "NaN", "Infinity", "-Infinity".

The exit status is 0, 2 after an error, which standard error tells in one line, 130 after Ctrl-C, or 141 where nobody
reads the output.

examples:
  fastloss score
  fastloss score logits.npy targets.npy --ignore-index 0 --output losses.npy
  fastloss score predictions.npz:logits predictions.npz:labels --json
  fastloss score 'logits-*.npy' 'labels-*.npy' --resume score.state
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
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        type=_size,
        default=256 * 2**20,
        help="memory to use for data, beyond the system's cache of the files, such as 1GiB (default: 256MiB)",
    )
    parser.add_argument("--resume", metavar="FILE", help="keep the state of the run in FILE, and go on from it")
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
    except (CommandError, ScoreError) as error:
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
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # the status says it as well
            print("fastloss: error:", " ".join(message.splitlines()), file=sys.stderr)
    return _USER_ERROR


def _abandon_stdout() -> None:
    """Let what is left in the buffer go nowhere: the interpreter would fail on it once more when it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
