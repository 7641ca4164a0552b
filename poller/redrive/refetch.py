"""The records of a discarded batch: from its payload, or read from the stream again."""

import asyncio
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from poller.core.model import TRIM_HORIZON, Fetch, Position, PositionKind, Record, ShardId, SourceKind, StreamTraits
from poller.core.replies import payload_bytes
from poller.core.retry import Backoff
from poller.errors import (
    IteratorExpired,
    PollerError,
    PositionTrimmed,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
)
from poller.ports import StreamSource

_READ_TRIES = 8  # of one read that is throttled or not answered
_MOST_EMPTY = 100  # empty reads in a row before an open shard's end is believed; DynamoDB has many, and knows no lag
_RUN_BYTES = 16 * 1024 * 1024  # of one shard that are kept for the next batch
_RUNS = 8  # shards of which something is kept
_SEQUENCE = re.compile("[0-9]{1,128}")
_MEMBERS = {SourceKind.KINESIS: ("kinesis", "sequenceNumber"), SourceKind.DYNAMODB: ("dynamodb", "SequenceNumber")}

T = TypeVar("T")


class RangeTrimmed(PollerError):  # noqa: N818
    """The stream does not have the whole batch any more. `left`: what it still has, in order."""

    def __init__(self, message: str, left: Sequence[Record]) -> None:
        super().__init__(message)
        self.left = tuple(left)


@dataclass(slots=True)
class _Run:
    """The last records of a shard that were read, without a gap, and where reading goes on. `next`: None at the end."""

    next: str | None
    records: list[Record] = field(default_factory=list)
    last: str = ""  # of all that were read
    is_over: bool = False  # nothing came any more: the tip, or the end of the shard
    nbytes: int = 0

    def take_in(self, fetch: Fetch, start: int) -> None:
        """Beyond `_RUN_BYTES` the oldest go, those before `start` first and all at once."""
        self.records += fetch.records
        self.nbytes += sum(len(record.wire) for record in fetch.records)
        self.next = fetch.next_iterator
        if fetch.records:
            self.last = fetch.records[-1].id
        if self.nbytes > _RUN_BYTES:
            self._drop(_place(self.records, start))
            count, left = 0, self.nbytes
            while left > _RUN_BYTES:
                left -= len(self.records[count].wire)
                count += 1
            self._drop(count)

    def _drop(self, count: int) -> None:
        self.nbytes -= sum(len(record.wire) for record in self.records[:count])
        del self.records[:count]


@dataclass(slots=True)
class _Range:
    """What was read of a range: the records that are wanted, and of all of them the ends and how many."""

    wanted: Callable[[Record], bool]
    found: list[Record] = field(default_factory=list)
    count: int = 0
    first: str = ""
    last: str = ""

    def take_in(self, records: Sequence[Record]) -> None:
        if records:
            self.first = self.first or records[0].id
            self.last = records[-1].id
            self.count += len(records)
            self.found += filter(self.wanted, records)


class Refetcher:
    """Reads ranges of one stream. `source` is open and is not closed here. One range of a shard at a time.

    Discarded batches mostly lie side by side, and a shard takes five reads a second: what a read brought beyond its
    batch is kept for the next.
    """

    def __init__(self, source: StreamSource, traits: StreamTraits, backoff: Backoff) -> None:
        self._source = source
        self._traits = traits
        self._backoff = backoff
        self._runs: dict[ShardId, _Run] = {}

    async def fetch(
        self,
        shard: ShardId,
        start: str,
        end: str,
        wanted: Callable[[Record], bool],
        needed: Collection[str] = (),
        *,
        least: int = 0,
    ) -> list[Record]:
        """The records from `start` to `end`, both included, that are wanted. `needed`: those that must be among them.
        `least`: how many there must be where none is needed by name, wanted or not.

        RangeTrimmed: the first or the last record, or one that is needed, is not in the stream. A source may pass over
        a trimmed position without a word, so that is looked at. AccessDenied, SourceThrottled, SourceUnavailable: not
        for now.
        """
        try:
            read = await self._range(shard, Position(PositionKind.AT, start), int(start), int(end), wanted)
        except SourceGone as error:
            raise RangeTrimmed(f"the shard has left the stream, and all of the batch with it ({error})", ()) from None
        except PositionTrimmed:
            try:
                read = await self._range(shard, TRIM_HORIZON, int(start), int(end), wanted)
            except (SourceGone, PositionTrimmed):
                read = _Range(wanted)
        found = read.found
        if missing := len(set(needed) - {record.id for record in found}):
            which = "all its records" if missing == len(needed) else f"{missing} of its {len(needed)} records"
            raise RangeTrimmed(f"{which} have been trimmed from the stream", found)
        if not needed and read.first != start:
            which = "its first records" if read.count else "all its records"
            raise RangeTrimmed(f"{which} have been trimmed from the stream", found)
        if not needed and (read.last != end or read.count < least):
            which = "some of its records" if read.last == end else "its last records"
            raise RangeTrimmed(f"{which} are not in the stream", found)
        return found

    async def _range(
        self, shard: ShardId, at: Position, start: int, end: int, wanted: Callable[[Record], bool]
    ) -> _Range:
        """Only what is wanted is kept of it: a range may be much longer than its batch."""
        run = self._runs.pop(shard, None)
        if run is None or at == TRIM_HORIZON or not _has(run.records, start):
            run = _Run(await self._tried(lambda: self._source.iterator(shard, at)))
        found = _Range(wanted)
        found.take_in(_between(run.records, start, end))
        while not run.is_over and not (run.last and int(run.last) >= end):
            found.take_in(_between(await self._extend(shard, run, at, start), start, end))
        run.is_over = run.next is None  # a tip may have moved when the next batch is asked for
        self._runs[shard] = run
        if len(self._runs) > _RUNS:
            del self._runs[next(iter(self._runs))]
        return found

    async def _extend(self, shard: ShardId, run: _Run, at: Position, start: int) -> Sequence[Record]:
        """Read on until something comes, which is answered, or nothing will."""
        for _ in range(_MOST_EMPTY):
            if run.next is None:
                break
            token = run.next
            try:
                fetch = await self._tried(lambda: self._source.fetch(shard, token, self._traits.fetch_limit))  # noqa: B023
            except IteratorExpired:
                last = Position(PositionKind.AFTER, run.last) if run.last else at
                run.next = await self._tried(lambda: self._source.iterator(shard, last))  # noqa: B023
                continue
            run.take_in(fetch, start)
            if fetch.read:
                return fetch.records
            if fetch.lag == 0:
                break
            await asyncio.sleep(self._traits.tip_interval)
        run.is_over = True
        return ()

    async def _tried(self, call: Callable[[], Awaitable[T]]) -> T:
        """Throttles and lost answers are waited out, for a while."""
        tries = 0
        while True:
            try:
                return await call()
            except (SourceThrottled, SourceUnavailable) as error:
                tries += 1
                if tries == _READ_TRIES:
                    raise
                retry_after = error.retry_after if isinstance(error, SourceThrottled) else None
                await asyncio.sleep(self._backoff.delay(tries, retry_after))


def _number(record: Record) -> int:
    return int(record.id)


def _place(records: Sequence[Record], sequence: int) -> int:
    return bisect_left(records, sequence, key=_number)


def _between(records: Sequence[Record], start: int, end: int) -> Sequence[Record]:
    return records[_place(records, start) : bisect_right(records, end, key=_number)]


def _has(records: Sequence[Record], sequence: int) -> bool:
    place = _place(records, sequence)
    return place < len(records) and int(records[place].id) == sequence


def records_of(event: bytes, kind: SourceKind) -> list[Record]:
    """The records of a whole event, by their sequence numbers only: they name the batch and its failed items.

    ValueError: the event is of another source, or of none.
    """
    member, name = _MEMBERS[kind]
    records = []
    try:
        items = json.loads(event)["Records"]
    except RecursionError:
        raise ValueError("its payload is nested too deeply") from None
    for item in items:
        part = item.get(member) if isinstance(item, dict) else None
        sequence = part.get(name) if isinstance(part, dict) else None
        if not isinstance(sequence, str) or _SEQUENCE.fullmatch(sequence) is None:
            raise ValueError(f"its payload has a record without {member}.{name}")
        records.append(Record(sequence, "", 0.0, b""))
    return records


def pieces(records: Sequence[Record], most: int, most_bytes: int) -> Iterator[Sequence[Record]]:
    """Runs of at most `most` records whose event has at most `most_bytes`; a record that is larger goes alone."""
    start = wire = 0
    for index, record in enumerate(records):
        count = index - start
        if count and (count == most or payload_bytes(count + 1, wire + len(record.wire)) > most_bytes):
            yield records[start:index]
            start, wire = index, 0
        wire += len(record.wire)
    if start < len(records):
        yield records[start:]
