"""The tumbling window of one shard (semantics 7): which records belong to it, when it ends, what state it carries.

closed --first record taken--> open --later record, shard end, quiet--> final invocation --settled--> closed
                                ^ |
                                | +-- state over 1 MiB --> early final invocation --settled--> open, state {}
                                +-------------------------------------------------------------------+
"""

from collections.abc import Iterable
from itertools import takewhile
from math import floor, inf

from poller.core.model import Record, Window

NO_STATE = b"{}"
LATENESS = 2.0  # seconds after its end in which a record of a window may still appear: clocks differ, AWS stamps early
MAX_STATE_BYTES = 1_048_576  # "1 MB per shard"; a returned state of 1,048,640 characters ended a window early


class TumblingWindow:
    """Owned by its flow. `start` is None while no window is open; `state` is what the last answer returned.

    Windows are aligned to multiples of their length since the epoch (unverified, fits AWS's sample). A record that
    arrives late, for a window that is closed already, joins the open one: windows never go back (unverified).
    """

    def __init__(self, length: float, saved: str = "") -> None:
        """`saved`: what `save` answered, of a checkpoint."""
        self.length = length
        self.start: float | None = None
        self.state = NO_STATE
        self._tip_at = -inf
        if saved:
            start, _, state = saved.partition("\n")
            self.start, self.state = float(start), state.encode()

    def save(self) -> str:
        """The window for a checkpoint: its start and its state; empty while none is open."""
        return "" if self.start is None else f"{self.start!r}\n{self.state.decode()}"

    @property
    def end(self) -> float:
        """When the open window ends; -inf while none is open. One that was opened under another length ends with the
        window of the new length that its start lies in: no two windows overlap.
        """
        return -inf if self.start is None else self._end_of(self.start)

    def _end_of(self, start: float) -> float:
        return (floor(start / self.length) + 1) * self.length

    @property
    def is_oversized(self) -> bool:
        """The state has grown past its limit: the window ends early."""
        return len(self.state) > MAX_STATE_BYTES

    def holds(self, record: Record) -> bool:
        """The record belongs to the open window; while none is open, to the one it would open."""
        return self.start is None or record.arrival < self.end

    def end_for(self, record: Record) -> float:
        """When the open window ends; while none is open, the one that the record would open."""
        start = self.start if self.start is not None else self._start_for(record)
        return self._end_of(start)

    def _start_for(self, record: Record) -> float:
        return floor(record.arrival / self.length) * self.length

    def open_with(self, record: Record) -> None:
        """Open the record's window, unless one is open."""
        if self.start is None:
            self.start = self._start_for(record)

    def count(self, records: Iterable[Record]) -> int:
        """How many of the first records belong to the open window."""
        return sum(1 for _ in takewhile(self.holds, records))

    def reached_tip(self, now: float) -> None:
        """Everything that was in the shard has been read."""
        self._tip_at = now

    def left_tip(self) -> None:
        """Something that was read was dropped and will be read again: the window is not complete any more."""
        self._tip_at = -inf

    def is_quiet(self, end: float) -> bool:
        """The shard was read to its tip a little after `end`: a window that ends there is complete although no later
        record came. No timer does that: a shard that cannot be read for a while would be cut into half windows.
        """
        return self._tip_at >= end + LATENESS

    def describe(self, *, is_final: bool) -> Window:
        """What an invocation is told."""
        assert self.start is not None
        return Window(self.start, self.end, self.state, is_final, is_final and self.is_oversized)

    def finish(self) -> None:
        """The final invocation is settled: drop the state; after an early end the same window goes on."""
        if not self.is_oversized:
            self.start = None
        self.state = NO_STATE
