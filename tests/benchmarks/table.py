"""The table of results: what each goal's figures came to.

    python -m tests.benchmarks.table FILE.json

prints it from a file that `python -m tests.benchmarks --json FILE.json` wrote, as Markdown.
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import GOALS, Goal

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Of each case, of each client, its `median` figures and the `rounds` that they are of. A case that failed has none."""


@dataclass(frozen=True, slots=True)
class Line:
    """A goal and what was measured. `ratio`: as the goal means it, None where it is about a figure. `used`: the share of
    what the goal allows, None without a goal.
    """

    row: int
    measure: str
    daemon: str
    peer: str
    ratio: float | None
    goal: str
    used: float | None

    @property
    def met(self) -> bool | None:
        """None without a goal."""
        return None if self.used is None else self.used <= 1

    @property
    def cells(self) -> tuple[str, ...]:
        """As text, below `HEAD`."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        met = "" if self.met is None else "yes" if self.met else "NO"
        return str(self.row), self.measure, self.daemon, self.peer, ratio, self.goal, met


HEAD = ("row", "measure", "daemon", "peer", "ratio", "goal", "met?")


def lines(results: Results, rows: Collection[int]) -> list[Line]:
    """A line for each goal of these rows whose figures are there, or whose case failed."""
    goals = [goal for goal in GOALS if goal.row in rows and goal.case in results]
    return [line for goal in goals if (line := _line(goal, results[goal.case]))]


def _line(goal: Goal, case: Mapping[str, Mapping[str, Any]]) -> Line | None:
    if not case:
        return Line(goal.row, goal.measure, "failed", "", None, "", None)
    if not case.keys() >= set(goal.needs):
        return None
    values = [case[client]["median"][goal.figure] for client in goal.needs]
    daemon, peer, ratio = " ".join(format(value, goal.form) for value in values), "", None
    if goal.spread:
        ratio = max(values) / min(values)
    elif goal.peer:
        value, other = values
        daemon, peer = format(value, goal.form), f"{goal.peer} {other:{goal.form}}"
        ratio = value / other if goal.at_least is None else other / value
    bound, used = "", None
    if goal.at_least is not None:
        assert ratio is not None
        bound, used = f"at least {goal.at_least:g} x", goal.at_least / ratio
    elif goal.at_most is not None:
        bound = f"at most {goal.at_most:{goal.form}}" if ratio is None else f"at most {goal.at_most:g} x"
        used = (values[0] if ratio is None else ratio) / goal.at_most
    return Line(goal.row, goal.measure, daemon, peer, ratio, bound, used)


def plain(table: Sequence[Line]) -> str:
    """In columns."""
    cells = [HEAD, *(line.cells for line in table)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def markdown(table: Sequence[Line]) -> str:
    """For the README."""
    cells = [HEAD, ("---",) * len(HEAD), *(line.cells for line in table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    if len(arguments) != 1:
        print("usage: python -m tests.benchmarks.table FILE.json", file=sys.stderr)
        return 2
    document = json.loads(Path(arguments[0]).read_text())
    print(markdown(lines(document["cases"], document["run"]["rows"])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
