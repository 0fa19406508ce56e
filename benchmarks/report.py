"""Turn the committed comparison into the chart and the README's tables.

    python benchmarks/report.py

reads `benchmarks/results/*.json`, as `compare.py --publish` wrote them, and writes the chart beside them and the tables
into the README, each between two comments that mark its place. Needs matplotlib (the `bench` extra).
"""

import importlib
import json
import math
import re
from pathlib import Path

import cases

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SVG = RESULTS / "comparison.svg"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- {}: written by benchmarks/report.py -->", "<!-- end of {} -->"

PEERS = {
    "torch": "PyTorch",
    "inductor": "PyTorch, compiled",
    "xla": "XLA",
    "scipy": "SciPy",
    "sklearn": "scikit-learn",
}
# Colours of middle lightness, legible on white and on black, and apart for the colour-blind by their markers too.
STYLES = {
    "torch": ("#e05d44", "o"),
    "inductor": ("#d98e04", "D"),
    "xla": ("#2f8fd6", "s"),
    "scipy": ("#2e9e6b", "^"),
    "sklearn": ("#a06cd5", "v"),
}
INK = "#808890"
FOLD_ALL = "<details>\n<summary>Every regime, and how it was measured</summary>"
FOLD = "<details>\n<summary>How it was measured</summary>"


def number(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(value):
    """Three significant digits at most."""
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ulp(value):
    return (
        "-"
        if value is None
        else f"{value:.2f}"
        if value < 100
        else f"{value:.2g}".replace("e+0", "e").replace("e+", "e")
    )


def _time(milliseconds):
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.1 else f"{1e3 * milliseconds:.3g} µs"


def size(result):
    return " x ".join(str(n) for n in result["shape"]) + f" {result['dtype']}"


def _mib(value):
    return "-" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _peers(found):
    """The peers that were measured at all."""
    seen = {name for result in found["regimes"] for name in result["ratios"]}
    return [name for name in PEERS if name in seen]


def _table(head, rows):
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(found):
    peers = _peers(found)
    has_roofline = any(result["roofline"] is not None for result in found["regimes"])
    rows = [
        [
            result["name"],
            size(result),
            _time(result["milliseconds"]),
            *(_ratio(result["ratios"].get(peer)) for peer in peers),
            *(["-" if result["roofline"] is None else f"{100 * result['roofline']:.0f} %"] if has_roofline else []),
        ]
        for result in found["regimes"]
    ]
    columns = ["regime", "logits", "fastloss", *(PEERS[peer] for peer in peers)]
    return _table([*columns, "of the roofline"] if has_roofline else columns, rows)


def _what(result):
    """What is measured of a metric, without the size."""
    return result["name"].rpartition(",")[0]


def metrics_table(found):
    """Times and peak memory against scikit-learn."""
    rows = [
        [
            _what(result),
            size(result),
            _time(result["milliseconds"]),
            _ratio(result["ratios"].get("sklearn")),
            *(_mib(result["peak_mib"].get(name)) for name in ("fastloss", "sklearn")),
        ]
        for result in found["regimes"]
    ]
    return _table(["", "scores", "fastloss", "scikit-learn", "MiB", "MiB, scikit-learn"], rows)


def metrics_summary(found):
    """For each kind of call the range of the ratios, of times and of memory."""
    kinds = {}
    for result in found["regimes"]:
        if "sklearn" in result["ratios"]:
            kinds.setdefault(_what(result).removesuffix(", weights"), []).append(result)
    lines = []
    for kind, results in kinds.items():
        times = [result["ratios"]["sklearn"] for result in results]
        line = f"* `{kind.partition(',')[0]}`{''.join(kind.partition(',')[1:])}: scikit-learn takes "
        line += f"{_ratio(min(times))} to {_ratio(max(times))} times as long"
        peaks = [result["peak_mib"] for result in results if len(result["peak_mib"]) == 2 and result["shape"][0] > 1000]
        if peaks:
            line += (
                f", and {_ratio(min(peak['sklearn'] / peak['fastloss'] for peak in peaks))} times the memory or more"
            )
            line += " for large input"
        lines.append(line)
    return "\n".join(lines)


def accuracy_table(found):
    engines = ["fastloss", *_peers(found)]
    rows = [
        ["confident predictions", f"{line['classes']} classes", *(_ulp(line["ulp"].get(name)) for name in engines)]
        for line in found["accuracy"]
    ]
    return _table(["worst error in ulp", "", "fastloss", *(PEERS[name] for name in engines[1:])], rows)


def summary(found):
    """One sentence per peer: in how many regimes fastloss is the faster, and where it is not."""
    lines = []
    for peer in _peers(found):
        ratios = {result["name"]: result["ratios"][peer] for result in found["regimes"] if peer in result["ratios"]}
        middle = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        slower = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio < 1]
        line = f"* **{PEERS[peer]}** takes {_ratio(middle)} times as long (geometric mean over {len(ratios)} regimes)"
        lines.append(line + (f"; faster than fastloss: {', '.join(slower)}" if slower else "; never faster"))
    return "\n".join(lines)


def footer(found):
    facts = found["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    slow = facts["slow"]
    absent = [PEERS.get(name, name) for name in facts["not_installed"]]
    return "\n".join(
        [
            "Peers: how many times as long as fastloss they take, the median of the ratios round by round.",
            f"{facts['cpu']}; {facts['threads']} threads for every engine; {facts['platform']}.",
            f"{facts['rounds']} rounds ({slow['rounds']} for an engine that takes over {slow['factor']} times as long);"
            " each engine in a process of its own, in turn; OMP_WAIT_POLICY"
            f" {facts['omp_wait_policy'] or 'not set'}; load average at the start {facts['load']:.2f}.",
            f"{packages}." + (f" Not installed: {', '.join(absent)}." if absent else ""),
            f"{facts['date']}: `{facts['command']}`",
        ]
    )


def markdown(found):
    """What the README shows of a table: what it comes to, and how it was measured, folded."""
    if found["table"] == "losses":
        parts = [summary(found), accuracy_table(found), FOLD_ALL, speed_table(found)]
    elif found["table"] == "gradients":
        parts = [speed_table(found), FOLD]
    else:
        parts = [metrics_summary(found), FOLD_ALL, metrics_table(found)]
    return "\n\n".join([*parts, footer(found), "</details>"])


def chart(tables, path):
    """Speed against each peer per regime, on a logarithmic axis: right of 1 fastloss is the faster."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    results = [result for found in tables for result in found["regimes"] if result["ratios"]]
    ratios = [ratio for result in results for ratio in result["ratios"].values()]
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fastloss",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(8.2, 0.9 + 0.235 * len(results)), layout="constrained")
        axes = figure.add_subplot()
        for place, result in enumerate(results):
            values = list(result["ratios"].values())
            axes.plot([min(values), max(values)], [place, place], color=INK, alpha=0.35, linewidth=1, zorder=1)
        for peer in dict.fromkeys(peer for found in tables for peer in _peers(found)):
            points = [(r["ratios"][peer], place) for place, r in enumerate(results) if peer in r["ratios"]]
            colour, marker = STYLES[peer]
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=PEERS[peer], zorder=2)
        axes.axvline(1, color=INK, linewidth=1.2)
        lowest = min(0.8, 0.8 * min(ratios, default=1))
        axes.axvspan(lowest, 1, color=INK, alpha=0.12, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlim(lowest, 1.3 * max(ratios, default=1))
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="both", length=0)
        axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
        axes.set_yticks(range(len(results)), [result["name"] for result in results])
        axes.set_ylim(len(results) - 0.4, -0.6)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("time of the peer / time of fastloss (shaded: the peer is faster)")
        figure.legend(loc="outside upper center", ncols=len(PEERS), frameon=False, handletextpad=0.2, columnspacing=1.2)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def committed():
    """The tables that were measured, in their order."""
    paths = [RESULTS / f"{table}.json" for table in cases.TABLES]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def charted(tables):
    """The metrics are not in the chart: they have one peer and many rows."""
    return [found for found in tables if found["table"] != "metrics"]


def _check_places(readme):
    for table in cases.TABLES:
        for mark in (BEGIN.format(table), END.format(table)):
            if readme.count(mark) != 1:
                raise ValueError(f"the README should hold {mark!r} once")


def with_tables(readme, tables):
    """A README whose marked places hold the tables."""
    _check_places(readme)
    for found in tables:
        begin, end = BEGIN.format(found["table"]), END.format(found["table"])
        readme = re.sub(
            re.escape(begin) + ".*" + re.escape(end),
            lambda match, found=found, begin=begin, end=end: f"{begin}\n\n{markdown(found)}\n\n{end}",
            readme,
            flags=re.DOTALL,
        )
    return readme


def check():
    """Whether there is what `publish` needs; raises ImportError or ValueError."""
    importlib.import_module("matplotlib")
    _check_places(README.read_text(encoding="utf-8"))


def publish():
    """Chart and tables from the committed JSON."""
    tables = committed()
    chart(charted(tables), SVG)
    README.write_text(with_tables(README.read_text(encoding="utf-8"), tables), encoding="utf-8")
    print(f"wrote {SVG} and the tables of {README}")


if __name__ == "__main__":
    publish()
