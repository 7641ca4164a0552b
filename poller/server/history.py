"""The last hour of every mapping, for the status page: how far behind it was, how many records a second it took."""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan

from poller.core.model import MappingId
from poller.ports import Clock, Overview
from poller.runtime.waiting import sleep_until
from poller.telemetry import EventCounts, Metrics, worst_lag

STEP = 15.0
"""Seconds between samples."""
SLOTS = 240
_RECENT = 75.0  # seconds that "the last minute" may be: the newest sample may be 15 s old
_NOTHING = EventCounts(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Series:
    """The last hour, oldest first: `SLOTS` values that are `STEP` apart, the last one of `ends_at` (epoch seconds).

    NaN where there was no sample. `lag`: seconds, of the shard that is furthest behind. The others: records a second.
    """

    ends_at: float
    lag: Sequence[float]
    succeeded: Sequence[float]
    failed: Sequence[float]


@dataclass(frozen=True, slots=True)
class Recent:
    """One mapping. `succeeded` and `failed`: records a second over the last minute, None before there is a sample to
    compare with; `counts`: since its series began.
    """

    succeeded: float | None
    failed: float | None
    counts: EventCounts
    series: Series | None


class History:
    """Samples every mapping; bounded: 3 KB a mapping, none for one that is gone. Belongs to the loop's thread."""

    def __init__(self, control: Overview, metrics: Metrics, clock: Clock) -> None:
        self._control = control
        self._metrics = metrics
        self._clock = clock
        self._tracks: dict[MappingId, _Track] = {}
        self._sampled_at: float | None = None

    async def run(self) -> None:
        """Sample until cancelled, on multiples of `STEP`, so that a late sample delays no other."""
        while True:
            await sleep_until(self._clock, (self.sample() + 1) * STEP)

    def sample(self) -> int:
        """Take one sample now; answers the number of its slot, which is the nearest multiple of `STEP`."""
        now = self._clock.now()
        slot = round(now / STEP)
        counts = self._metrics.counts()
        tracks = {}
        for mapping in self._control.status():
            track = self._tracks.get(mapping.id)
            if track is None:  # one that is new since the last sample began to count after it
                track = _Track(slot)
                if self._sampled_at is not None:
                    track.marks.append((self._sampled_at, _NOTHING))
            tracks[mapping.id] = track
            track.add(slot, now, worst_lag(mapping.shards, now), counts.get(mapping.id, _NOTHING))
        self._tracks = tracks
        self._sampled_at = now
        return slot

    def read(self, *, with_series: bool = False) -> dict[MappingId, Recent]:
        """Every mapping that was sampled; copies, which may be handed to another thread."""
        now = self._clock.now()
        counts = self._metrics.counts()
        return {
            mapping: track.recent(now, counts.get(mapping, _NOTHING), with_series=with_series)
            for mapping, track in self._tracks.items()
        }


class _Track:
    """One mapping. Three rings, in which slot n stands at n modulo `SLOTS`; `slot` is the newest one.

    `marks`: the last samples' instants and counts, oldest first, at most `_RECENT` old but for the newest.
    """

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.marks: deque[tuple[float, EventCounts]] = deque()
        self._lag, self._succeeded, self._failed = (array("f", [nan]) * SLOTS for _ in range(3))

    def add(self, slot: int, now: float, lag: float | None, counts: EventCounts) -> None:
        for missed in range(max(self.slot + 1, slot - SLOTS + 1), slot):
            self._put(missed, nan, nan, nan)
        succeeded = failed = nan
        if self.marks:
            succeeded, failed = _rates(self.marks[-1], now, counts)
        self._put(slot, nan if lag is None else lag, succeeded, failed)
        self.slot = slot
        self.marks.append((now, counts))
        while now - self.marks[0][0] > _RECENT - STEP + 1:  # never the one just added
            self.marks.popleft()

    def recent(self, now: float, counts: EventCounts, *, with_series: bool) -> Recent:
        rates = _rates(self.marks[0], now, counts)
        succeeded, failed = (None if rate != rate else rate for rate in rates)  # noqa: PLR0124 - NaN
        series = None
        if with_series:
            unrolled = (self._unroll(ring) for ring in (self._lag, self._succeeded, self._failed))
            series = Series(self.slot * STEP, *unrolled)
        return Recent(succeeded, failed, counts, series)

    def _put(self, slot: int, *values: float) -> None:
        for ring, value in zip((self._lag, self._succeeded, self._failed), values, strict=True):
            ring[slot % SLOTS] = value

    def _unroll(self, ring: "array[float]") -> "array[float]":
        newest = self.slot % SLOTS + 1
        return ring[newest:] + ring[:newest]


def _rates(mark: tuple[float, EventCounts], now: float, counts: EventCounts) -> Iterable[float]:
    """Succeeded and failed records a second since a mark; NaN when no time has passed."""
    at, before = mark
    if now - at < 1.0:
        return nan, nan
    pairs = ((before.succeeded, counts.succeeded), (before.failed, counts.failed))
    # Counts that went down began again at 0: the mapping was given another function.
    return tuple((new - old if new >= old else new) / (now - at) for old, new in pairs)
