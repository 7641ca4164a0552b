"""How the demo shows itself: a live picture on a terminal, lines elsewhere."""

from typing import Any, Protocol

from rich.console import Console
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from poller.demo.traffic import SHARDS, SOURCES, Target, short

_STEP_LINES = 4
_WIDE = 100  # columns in which a whole sequence number has room


class View(Protocol):
    """Shows the demo. `interval`: seconds from one `draw` to the next."""

    interval: float

    def step(self, text: str) -> None:
        """Say what is to be seen from now on."""
        ...

    def draw(self, shards: list[dict[str, Any]], seconds: float) -> None:
        """Show the state `seconds` after the start. `shards`: of the Kinesis mapping, from `/api/status`."""
        ...

    def end(self) -> None:
        """Say that the demo ends as soon as everything has arrived."""
        ...

    def close(self) -> None:
        """Give the terminal back."""
        ...


def view(target: Target, daemon_url: str) -> View:
    """The picture where standard output is a terminal, else lines."""
    console = Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return Screen(target, daemon_url, console)
    return Lines(target)


class Lines:
    """A line a second, and the steps."""

    interval = 1.0

    def __init__(self, target: Target) -> None:
        self._target = target

    def step(self, text: str) -> None:
        """Implements View."""
        print(f"\n>> {text}\n", flush=True)

    def draw(self, shards: list[dict[str, Any]], seconds: float) -> None:
        """`4 s  delivered/produced: kinesis 78/80  dynamodb 20/20  sqs 20/20  shards: #0 running  #1 BLOCKED ...`."""
        counts = "  ".join(
            f"{source} {tally.delivered}/{tally.produced}" for source, tally in self._target.tallies.items()
        )
        states = "  ".join(f"{short(shard['id'])} {_held_by(shard) or shard['state']}" for shard in shards)
        print(f"{seconds:3.0f} s  delivered/produced: {counts}  shards: {states}", flush=True)

    def end(self) -> None:
        """Implements View."""
        self.step("The end: nothing more is produced. Waiting until all that is on the way has arrived.")

    def close(self) -> None:
        """Implements View."""


class Screen:
    """The whole terminal, 80x24 or larger; what stood there before comes back at the end."""

    interval = 0.2

    def __init__(self, target: Target, daemon_url: str, console: Console) -> None:
        self._target = target
        self._url = daemon_url
        self._step = ""
        self._hint = "Ctrl-C ends it."
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._live.start()

    def step(self, text: str) -> None:
        """Implements View."""
        self._step = text

    def draw(self, shards: list[dict[str, Any]], seconds: float) -> None:
        """Implements View."""
        layout = Layout()
        layout.split_column(
            Layout(self._head(seconds), size=1),
            Layout(_panel(self._sources(), "Sources"), size=len(SOURCES) + 3),
            Layout(_panel(self._shards(shards), "Kinesis shards"), size=SHARDS + 3),
            Layout(self._story(), size=_STEP_LINES + 2),
            Layout(self._arrivals()),
        )
        self._live.update(layout, refresh=True)

    def end(self) -> None:
        """Implements View."""
        self._hint = "Ending. Again: at once"

    def close(self) -> None:
        """Implements View."""
        self._live.stop()

    def _head(self, seconds: float) -> Text:
        minutes, rest = divmod(int(seconds), 60)
        return Text.assemble(
            (f" esm-poller demo  {minutes}:{rest:02}", "bold"), f"  Status: {self._url}/  {self._hint}"
        )

    def _story(self) -> Panel:
        shown = _panel(Text(self._step), "What is to be seen", "cyan")
        shown.subtitle = f"In another terminal: poller status --url {self._url}"
        return shown

    def _sources(self) -> Table:
        table = _table("Source", ">Produced", ">Delivered", ">On the way", ">Latest record", ">Source to target")
        for source, tally in self._target.tallies.items():
            took = "-" if tally.took is None else f"{tally.took:.2f} s"
            waiting = Text(str(len(tally.waiting)), "" if len(tally.waiting) < tally.produced / 10 + 25 else "yellow")
            table.add_row(source, str(tally.produced), str(tally.delivered), waiting, str(tally.latest or "-"), took)
        return table

    def _shards(self, shards: list[dict[str, Any]]) -> Table:
        is_wide = self._live.console.width >= _WIDE
        table = _table("Shard", ">Delivered", ">Latest", ">Age", "State")
        for column, width in zip(table.columns, (5, 9, 7, 7), strict=False):
            column.width = width
        table.columns[-1].ratio = 1
        for shard in shards:
            count, latest = self._target.shards.get(shard["id"], (0, 0))
            held_by = _held_by(shard, is_wide=is_wide)
            age = shard["iterator_age_seconds"]
            table.add_row(
                short(shard["id"]),
                str(count),
                str(latest or "-"),
                "-" if age is None else f"{age:.1f} s",
                Text(held_by, "bold red") if held_by else Text(shard["state"], "green"),
            )
        return table

    def _arrivals(self) -> Text:
        """As many of the latest as fit the terminal, a line each."""
        console = self._live.console
        room = max(1, console.height - 1 - (len(SOURCES) + 3) - (SHARDS + 3) - (_STEP_LINES + 2) - 1)
        latest = list(self._target.arrivals)[-room:]
        text = Text(" Latest invocations: source, shard, answer, orders\n", "dim", overflow="ellipsis", no_wrap=True)
        for line in latest:
            text.append(f" {line}\n", "red" if " 500 " in line else "default")
        return text


def _held_by(shard: dict[str, Any], *, is_wide: bool = False) -> str:
    """What blocks a shard: the failing batch, by its first sequence number; empty when nothing does."""
    if not shard["blocked_seconds"]:
        return ""
    first: str = shard["first_sequence"]
    sequence = first if is_wide else f"…{first[-6:]}"
    return f"BLOCKED {shard['blocked_seconds']:.1f} s, attempt {shard['attempts']}, by {sequence}"


def _table(*columns: str) -> Table:
    """`>` before a name: to the right."""
    table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def _panel(content: Table | Text, title: str, style: str = "none") -> Panel:
    return Panel(content, title=title, title_align="left", border_style=style)
