"""How the demo shows itself: a live picture on a terminal, lines elsewhere."""

from typing import Any, Protocol

from rich.console import Console
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from poller.demo.traffic import SOURCES, Target, names, short

_STEP_LINES = 4
_OTHER_LINES = 1 + (len(SOURCES) + 3) + (_STEP_LINES + 2)  # all but the shards and the arrivals
_WIDE = 100  # columns in which a whole sequence number has room
_SHORT = 6  # digits of it that are shown else


class View(Protocol):
    """Shows the demo. `interval`: seconds from one `draw` to the next."""

    interval: float

    def step(self, text: str) -> None:
        """Say what is to be seen from now on."""
        ...

    def draw(self, shards: dict[str, dict[str, Any]], seconds: float) -> None:
        """Show the state `seconds` after the start. `shards`: of the Kinesis mapping, from `/api/status`, by id."""
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

    def draw(self, shards: dict[str, dict[str, Any]], seconds: float) -> None:
        """`4 s  delivered/produced: kinesis 78/80  dynamodb 20/20  sqs 20/20  shards: #0 running  #1 BLOCKED ...`."""
        counts = "  ".join(
            f"{source} {tally.delivered}/{tally.produced}" for source, tally in self._target.tallies.items()
        )
        states = [f"{short(shard)} {_state(self._target, shard, shards)}" for shard in _not_done(self._target, shards)]
        if done := _done(shards):
            states.append(f"done {done}")
        print(f"{seconds:3.0f} s  delivered/produced: {counts}  shards: {'  '.join(states)}", flush=True)

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

    def draw(self, shards: dict[str, dict[str, Any]], seconds: float) -> None:
        """Implements View."""
        layout = Layout()
        lines = len(_not_done(self._target, shards)) + 3
        title = f"Kinesis shards, done: {done}" if (done := _done(shards)) else "Kinesis shards"
        layout.split_column(
            Layout(self._head(seconds), size=1),
            Layout(_panel(self._sources(), "Sources"), size=len(SOURCES) + 3),
            Layout(_panel(self._shards(shards), title), size=lines),
            Layout(self._story(), size=_STEP_LINES + 2),
            Layout(self._arrivals(lines)),
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

    def _shards(self, shards: dict[str, dict[str, Any]]) -> Table:
        is_wide = self._live.console.width >= _WIDE
        table = _table("Shard", ">Produced", ">Delivered", ">Age", "State")
        for column, width in zip(table.columns, (5, 9, 9, 7), strict=False):
            column.width = width
        table.columns[-1].ratio = 1
        for shard in _not_done(self._target, shards):
            counted = self._target.shards[shard]
            age = shards[shard]["iterator_age_seconds"] if shard in shards else None
            state = _state(self._target, shard, shards, is_wide=is_wide)
            style = "bold red" if state.startswith("BLOCKED") else "green" if state == "running" else "yellow"
            table.add_row(
                short(shard),
                str(counted.produced),
                str(counted.delivered),
                "-" if age is None else f"{age:.1f} s",
                Text(state, style),
            )
        return table

    def _arrivals(self, shard_lines: int) -> Text:
        """As many of the latest as fit the terminal, a line each."""
        room = max(1, self._live.console.height - _OTHER_LINES - shard_lines - 1)
        latest = list(self._target.arrivals)[-room:]
        text = Text(" Latest invocations: source, shard, answer, orders\n", "dim", overflow="ellipsis", no_wrap=True)
        for line in latest:
            text.append(f" {line}\n", "red" if " 500 " in line else "default")
        return text


def _is_done(shard: str, shards: dict[str, dict[str, Any]]) -> bool:
    return shard in shards and bool(shards[shard]["state"] == "done")


def _done(shards: dict[str, dict[str, Any]]) -> str:
    """`#2 #4`."""
    return " ".join(short(shard) for shard in sorted(shards) if _is_done(shard, shards))


def _not_done(target: Target, shards: dict[str, dict[str, Any]]) -> list[str]:
    """The shards that have a line of their own: six at most, while one is split or two are merged."""
    return [shard for shard in sorted(target.shards) if not _is_done(shard, shards)]


def _state(target: Target, shard: str, shards: dict[str, dict[str, Any]], *, is_wide: bool = False) -> str:
    """What a shard is doing, and what holds it: a batch that fails, by its first sequence number, or its parents."""
    if parents := [parent for parent in target.shards[shard].parents if not _is_done(parent, shards)]:
        return f"waits for {names(parents)}"
    if shard not in shards:
        return "starting"
    status = shards[shard]
    if status["blocked_seconds"]:
        first: str = status["first_sequence"]
        sequence = first if is_wide or len(first) <= _SHORT else f"…{first[-_SHORT:]}"
        return f"BLOCKED {status['blocked_seconds']:.1f} s, attempt {status['attempts']}, by {sequence}"
    if status["state"] == "ending":
        return f"ending, {target.on_the_way([shard])} to deliver"
    return str(status["state"])


def _table(*columns: str) -> Table:
    """`>` before a name: to the right."""
    table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def _panel(content: Table | Text, title: str, style: str = "none") -> Panel:
    return Panel(content, title=title, title_align="left", border_style=style)
