"""What a fuzz target is, and what holds for every one."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from poller.errors import ConfigError

CORPUS = Path(__file__).parent / "corpus"
MARKER = "zq8fuzzmarker5x"
"""Stands in documents of the corpus where a secret or a payload would: it must not come back in an error's text."""
MOST_SECONDS = 5.0  # of processor time that one input may take; none of the corpus takes a hundredth

_T = TypeVar("_T")


class TooSlow(AssertionError):  # noqa: N818 - what it says is what it is
    """An input took more than `MOST_SECONDS`."""


@dataclass(frozen=True, slots=True)
class Target:
    """A group of parsers. `kinds`: each takes one document; it returns, or the parser is wrong.

    Called with bytes: the first one chooses the kind, the others are the document.
    """

    name: str
    kinds: Mapping[str, Callable[[bytes], None]]

    def __call__(self, data: bytes) -> None:
        if data:
            self.feed(tuple(self.kinds)[data[0] % len(self.kinds)], data[1:])

    def feed(self, kind: str, document: bytes) -> None:
        """One document to one parser. AssertionError, or what the parser should not have raised."""
        with bounded(MOST_SECONDS):
            self.kinds[kind](document)

    def seeds(self, kind: str) -> list[bytes]:
        """The documents of the corpus: `corpus/TARGET/KIND-whatever`."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).glob(f"{kind}-*"))]

    def inputs(self) -> list[bytes]:
        """The corpus as bytes to call the target with."""
        return [bytes([at]) + seed for at, kind in enumerate(self.kinds) for seed in self.seeds(kind)]


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """TooSlow, when what is done here takes more of the processor's time."""

    def end(_signal: int, _frame: Any) -> None:
        raise TooSlow(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


_runner: asyncio.Runner | None = None


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """What a coroutine answers, on a loop that is kept: a new one for each input would cost more than the parser."""
    global _runner  # noqa: PLW0603
    if _runner is None:
        _runner = asyncio.Runner()
    return _runner.run(work)


def end() -> None:
    """Close the loop."""
    global _runner  # noqa: PLW0603
    if _runner is not None:
        _runner.close()
        _runner = None


def quiet() -> None:
    """No log lines; but one that tells of an error that nobody expected fails the input."""

    def refuse(_logger: Any, _name: str, entry: Any) -> Any:
        if entry["event"] == "request_failed":
            raise AssertionError("an error that nobody expected")
        raise structlog.DropEvent

    structlog.configure(processors=[refuse], cache_logger_on_first_use=False)


def refused(error: ConfigError, place: str, document: bytes = b"") -> None:
    """Every mistake says where it is. `document`: see `silent`."""
    silent(error, document)
    assert error.mistakes
    assert all(mistake.startswith(place) for mistake in error.mistakes)


def silent(error: BaseException, document: bytes = b"") -> None:
    """The text of an error is text, and holds no secret that was not given to it as something else."""
    text = f"{error}"
    text.encode()
    if MARKER.encode() not in document:
        assert MARKER not in text, text
