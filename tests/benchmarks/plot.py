"""The charts of the README, drawn from a file that `python -m tests.benchmarks --json FILE.json` wrote.

    python -m tests.benchmarks.plot FILE.json FOLDER

writes `cost.svg`, `goals.svg` and `growth.svg`; of the same file the same bytes. A chart that the file has no figures for
is left out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks.rows import CLIENTS
from tests.benchmarks.table import Line, Results, lines

_COLOURS = {"daemon": "#1b6ac9", "plain": "#e08214", "boto3": "#8c6bb1", "bare": "#8a8f98"}
_NAMES = {"daemon": "esm-poller", "plain": "aiobotocore loop", "boto3": "boto3, 4 threads", "bare": "bare aiohttp loop"}
_GOOD, _BAD = "#2a9d5c", "#c8413b"
_COMPARED = {
    "sqs 10": "SQS, BatchSize 10",
    "kinesis 100": "Kinesis, BatchSize 100",
    "kinesis 1000": "Kinesis, BatchSize 1,000",
    "dynamodb 100": "DynamoDB Streams",
    "tls sqs 10": "SQS over TLS",
    "tls kinesis 1000": "Kinesis 1,000 over TLS",
}


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def cost(results: Results) -> Figure | None:
    """CPU of a record, of each client; logarithmic."""
    cases = [case for case in _COMPARED if "daemon" in results.get(case, {})]
    if not cases:
        return None
    bars = [(case, [client for client in CLIENTS if client in results[case]]) for case in cases]
    figure, axes = _figure(0.8 + 0.3 * sum(len(clients) + 1 for _, clients in bars))
    at, ticks = 0.0, []
    labelled: set[str] = set()
    for case, clients in bars:
        ticks.append(at + (len(clients) - 1) / 2)
        for client in clients:
            value = results[case][client]["median"]["us_per_record"]
            label = None if client in labelled else _NAMES[client]
            labelled.add(client)
            axes.barh(at, value, height=0.9, color=_COLOURS[client], label=label)
            axes.annotate(f"{value:.3g}", (value, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
            at += 1
        at += 1
    axes.set_yticks(ticks, [_COMPARED[case] for case, _ in bars])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel("microseconds of CPU a record, logarithmic; less is better")
    axes.legend(frameon=False, loc="lower right")
    return figure


def goals(table: Sequence[Line]) -> Figure | None:
    """Every goal: how much of what it allows was used."""
    judged = [(line, line.used) for line in table if line.used is not None]
    if not judged:
        return None
    figure, axes = _figure(0.9 + 0.28 * len(judged))
    for place, (line, used) in enumerate(judged):
        axes.barh(place, used, height=0.7, color=_GOOD if line.met else _BAD)
        text = line.daemon if line.ratio is None else f"{line.ratio:.2f} x"
        axes.annotate(
            f"{text} ({line.goal})", (max(used, 1), place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(judged)), [f"{line.row}  {line.measure}" for line, _ in judged], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.25, *(used for _, used in judged)) * 1.35)
    axes.set_xlabel("share of what the goal allows; up to 1 it is met")
    return figure


def growth(results: Results) -> Figure | None:
    """CPU of a record over the number of shards, and of mappings."""
    drawn = [(case, results[case]) for case in ("growth shards", "growth mappings") if results.get(case)]
    if not drawn:
        return None
    figure, axes = _figure(3.6)
    most = 0.0
    for case, measured in drawn:
        counts = sorted(map(int, measured))
        values = [measured[str(count)]["median"]["us_per_record"] for count in counts]
        most = max(most, *values)
        axes.plot(counts, values, marker="o", label=case.removeprefix("growth "))
    axes.set_xscale("log")
    ticks = sorted({int(count) for _, measured in drawn for count in measured})
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, most * 1.15)
    axes.set_ylabel("microseconds of CPU a record")
    axes.set_xlabel("how many, the same records in all")
    axes.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plot", description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    document = json.loads(options.file.read_text())
    cases, table = document["cases"], lines(document["cases"], document["run"]["rows"])
    options.folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "esm-poller", "font.family": "sans-serif"}):
        for name, figure in (("cost", cost(cases)), ("goals", goals(table)), ("growth", growth(cases))):
            if figure:
                figure.savefig(options.folder / f"{name}.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
