"""Ranges of a stream that are read again, in virtual time."""

import asyncio
import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Coroutine
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.core.model import Fetch, Position, PositionKind, Record, SourceKind, StreamTraits
from poller.core.replies import payload
from poller.core.retry import Backoff
from poller.errors import (
    AccessDenied,
    IteratorExpired,
    PollerError,
    PositionTrimmed,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
)
from poller.redrive import refetch
from poller.redrive.refetch import RangeTrimmed, Refetcher, pieces, records_of
from tests.sim.loop import run_virtual

SHARD = "shardId-000000000000"
TRAITS = StreamTraits(fetch_limit=100, tip_interval=1.0, has_timestamps=True)


def name(number: int) -> str:
    """Sequence numbers of growing length, as DynamoDB's are: texts would compare wrong."""
    return str(number)


def wanted_all(_: Record) -> bool:
    return True


class ScriptedStream:
    """A `StreamSource` over shards of numbered records. `faults[call]` are raised first, None being an answer.

    `empties`: answers without records before each one that has some. `is_strict`: a trimmed position is an error, else
    it is passed over. `lag`: what an answer that reaches the tip says.
    """

    def __init__(self, *, wire: bytes = b"{}", lag: float | None = 0.0, is_closed: bool = False) -> None:
        self.shards: dict[str, list[int]] = defaultdict(list)
        self.wire = wire
        self.lag = lag
        self.is_closed = is_closed
        self.is_strict = False
        self.empties = 0
        self.horizon = 0
        self.faults: dict[str, list[PollerError | None]] = {"iterator": [], "fetch": []}
        self.reads: list[tuple[str, int]] = []
        self.positions: list[Position] = []
        self._empty = 0

    def fill(self, first: int, last: int, shard: str = SHARD) -> None:
        self.shards[shard] += range(first, last + 1)

    def _fail(self, call: str) -> None:
        if self.faults[call] and (fault := self.faults[call].pop(0)) is not None:
            raise fault

    async def iterator(self, shard: str, at: Position) -> str:
        await asyncio.sleep(0)
        self.positions.append(at)
        self._fail("iterator")
        match at.kind:
            case PositionKind.TRIM_HORIZON:
                return str(self.horizon)
            case PositionKind.AT | PositionKind.AFTER:
                first = int(at.value) + (at.kind is PositionKind.AFTER)
                if self.is_strict and first < self.horizon:
                    raise PositionTrimmed("it was trimmed")
                return str(max(first, self.horizon))
            case _:
                raise AssertionError(at)

    async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
        await asyncio.sleep(0)
        self.reads.append((shard, int(iterator)))
        self._fail("fetch")
        numbers = self.shards[shard]
        place = bisect_left(numbers, max(int(iterator), self.horizon))
        page = numbers[place : place + limit]
        if page and self._empty < self.empties:
            self._empty += 1
            return Fetch((), "", iterator, None if self.lag is None else 5.0, 0, 0)
        self._empty = 0
        is_last = place + len(page) == len(numbers)
        records = tuple(Record(name(number), "", 0.0, self.wire) for number in page)
        following = str(page[-1] + 1) if page else iterator
        lag = self.lag if is_last or self.lag is None else 5.0
        return Fetch(
            records,
            records[-1].id if page else "",
            None if is_last and self.is_closed else following,
            lag,
            0,
            len(page),
        )

    async def close(self) -> None:
        raise AssertionError("it is not the refetcher's to close")


def refetcher(stream: ScriptedStream) -> Refetcher:
    return Refetcher(stream, TRAITS, Backoff(0.2, 60.0, lambda: 0.5))  # type: ignore[arg-type]


def numbers(records: Any) -> list[int]:
    return [int(record.id) for record in records]


def in_time(main: Coroutine[Any, Any, Any]) -> tuple[Any, float]:
    """The answer, and the virtual seconds that it took."""

    async def timed() -> tuple[Any, float]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        return await main, loop.time() - started

    return run_virtual(timed())


def fetched(stream: ScriptedStream, start: int, end: int, needed: Any = None) -> list[int]:
    ids = frozenset(map(name, needed or ()))
    read = refetcher(stream).fetch(
        SHARD, name(start), name(end), (lambda one: one.id in ids) if ids else wanted_all, ids
    )
    return numbers(run_virtual(read))


def refused(stream: ScriptedStream, start: int, end: int, needed: Any = None) -> RangeTrimmed:
    with pytest.raises(RangeTrimmed) as caught:
        fetched(stream, start, end, needed)
    return caught.value


def test_a_range_has_both_ends_and_nothing_beside_it() -> None:
    """The first and the last record belong to it; sequence numbers compare as numbers."""
    stream = ScriptedStream()
    stream.fill(1, 50)
    assert fetched(stream, 8, 12) == [8, 9, 10, 11, 12]
    assert stream.positions == [Position(PositionKind.AT, "8")]


def test_one_record_is_a_range() -> None:
    """A batch of one begins and ends with it."""
    stream = ScriptedStream()
    stream.fill(1, 5)
    assert fetched(stream, 5, 5) == [5]


def test_a_range_is_read_over_pages_and_gaps() -> None:
    """Several pages, with empty answers that are behind the tip in between, and numbers that nobody used."""
    stream = ScriptedStream()
    stream.shards[SHARD] = list(range(10, 1000, 3))
    stream.empties = 3
    expected = list(range(10, 911, 3))
    assert fetched(stream, 10, 910) == expected
    assert len(stream.reads) == 4 * (1 + len(expected) // TRAITS.fetch_limit)


def test_only_the_ids_that_are_wanted_are_answered() -> None:
    """Other lanes' records of the range stay out."""
    stream = ScriptedStream()
    stream.fill(1, 30)
    assert fetched(stream, 5, 25, [5, 7, 25]) == [5, 7, 25]


@pytest.mark.parametrize("is_strict", [False, True], ids=["silently", "with an error"])
@pytest.mark.parametrize(
    ("horizon", "left", "text"),
    [(12, list(range(12, 21)), "its first records have been"), (21, [], "all its records have been")],
)
def test_a_trimmed_start_is_said_with_what_is_left(horizon: int, left: list[int], text: str, is_strict: bool) -> None:
    """Whether the source passes over the position or refuses it."""
    stream = ScriptedStream()
    stream.fill(1, 40)
    stream.horizon, stream.is_strict = horizon, is_strict
    error = refused(stream, 10, 20)
    assert text in str(error)
    assert numbers(error.left) == left


@pytest.mark.parametrize("is_strict", [False, True], ids=["silently", "with an error"])
def test_a_trimmed_record_that_is_not_needed_is_no_loss(is_strict: bool) -> None:
    """Which ids were in the batch is known: only those count."""
    stream = ScriptedStream()
    stream.fill(1, 40)
    stream.horizon, stream.is_strict = 12, is_strict
    assert fetched(stream, 10, 20, [12, 20]) == [12, 20]


@pytest.mark.parametrize(
    ("horizon", "left", "text"), [(12, [20], "2 of its 3 records"), (21, [], "all its records have been trimmed")]
)
def test_needed_records_that_are_missing_are_counted(horizon: int, left: list[int], text: str) -> None:
    """How many are gone; the others are handed over with the error."""
    stream = ScriptedStream()
    stream.fill(1, 40)
    stream.horizon = horizon
    error = refused(stream, 10, 20, [10, 11, 20])
    assert text in str(error)
    assert numbers(error.left) == left


@pytest.mark.parametrize("call", ["iterator", "fetch"])
def test_a_shard_that_is_gone_has_nothing_left(call: str) -> None:
    """It left the stream with all its records."""
    stream = ScriptedStream()
    stream.fill(1, 40)
    stream.faults[call] = [SourceGone("shard s does not exist")]
    error = refused(stream, 10, 20)
    assert "the shard has left the stream" in str(error)
    assert "shard s does not exist" in str(error)
    assert error.left == ()


def test_a_shard_that_goes_while_its_rest_is_looked_for_has_nothing_left() -> None:
    """A trimmed position and then no shard: trimmed, not a crash."""
    stream = ScriptedStream()
    stream.fill(1, 40)
    stream.faults["iterator"] = [PositionTrimmed("trimmed"), SourceGone("gone")]
    assert refused(stream, 10, 20).left == ()


def test_records_trimmed_between_two_reads_are_missed() -> None:
    """The source reads on at the horizon without a word: a batch with a hole is not whole."""
    stream = ScriptedStream()
    stream.fill(1, 400)
    reader = refetcher(stream)

    async def main() -> None:
        reading = asyncio.create_task(reader.fetch(SHARD, "1", "300", lambda one: int(one.id) in needed, ids))
        while not stream.reads:
            await asyncio.sleep(0)
        stream.horizon = 250
        with pytest.raises(RangeTrimmed) as caught:
            await reading
        assert numbers(caught.value.left) == [1, 300]

    needed = {1, 150, 300}
    ids = frozenset(map(name, needed))
    run_virtual(main())


def test_a_range_with_a_hole_is_not_whole() -> None:
    """Both ends are there, but fewer records than the batch had: never taken for all of it."""
    stream = ScriptedStream()
    stream.shards[SHARD] = [10, 11, 15, 16]
    reader = refetcher(stream)

    async def main() -> None:
        assert len(await reader.fetch(SHARD, "10", "16", wanted_all, least=4)) == 4
        with pytest.raises(RangeTrimmed, match="some of its records are not in the stream") as caught:
            await reader.fetch(SHARD, "10", "16", lambda one: one.id != "11", least=5)
        assert numbers(caught.value.left) == [10, 15, 16]

    run_virtual(main())


@pytest.mark.parametrize("lag", [0.0, None], ids=["tip", "no lag"])
@pytest.mark.parametrize("is_closed", [False, True], ids=["open", "closed"])
def test_a_range_whose_end_never_comes_is_not_whole(lag: float | None, is_closed: bool) -> None:
    """The end of the shard, its tip, or very many empty answers: reading ends, and the batch is not taken for whole."""
    stream = ScriptedStream(lag=lag, is_closed=is_closed)
    stream.fill(1, 15)
    error, seconds = in_time(_refusal(stream, 10, 20))
    assert numbers(error.left) == [10, 11, 12, 13, 14, 15]
    assert "its last records" in str(error)
    # 100 empty answers, a second apart, before an end that nobody speaks of is believed
    assert (seconds, len(stream.reads)) == (
        (100.0, 101) if lag is None and not is_closed else (0.0, 1 + (not is_closed))
    )


async def _refusal(stream: ScriptedStream, start: int, end: int) -> RangeTrimmed:
    with pytest.raises(RangeTrimmed) as caught:
        await refetcher(stream).fetch(SHARD, name(start), name(end), wanted_all)
    return caught.value


def test_many_empty_answers_of_a_source_without_lag_are_read_through() -> None:
    """DynamoDB answers without records for long, and what comes then counts."""
    stream = ScriptedStream(lag=None)
    stream.fill(1, 30)
    stream.empties = 99
    assert fetched(stream, 10, 20) == list(range(10, 21))


def test_an_expired_iterator_is_renewed_where_it_was() -> None:
    """After the last record that came, and none is repeated; before the first one at the start."""
    stream = ScriptedStream()
    stream.fill(1, 400)
    expired = IteratorExpired("too old")
    stream.faults["fetch"] = [expired, None, expired]
    assert fetched(stream, 10, 250) == list(range(10, 251))
    assert stream.positions == [
        Position(PositionKind.AT, "10"),
        Position(PositionKind.AT, "10"),
        Position(PositionKind.AFTER, "109"),
    ]


def test_an_iterator_that_always_expires_is_no_endless_loop() -> None:
    """It ends like an end that never comes."""
    stream = ScriptedStream()
    stream.fill(1, 40)
    stream.faults["fetch"] = [IteratorExpired("too old")] * 1000
    refused(stream, 10, 20)
    assert len(stream.reads) <= 100


def test_throttles_and_lost_answers_are_waited_out() -> None:
    """Seven in a row, with backoff that grows and what the source asks for."""
    stream = ScriptedStream()
    stream.fill(1, 40)
    stream.faults["iterator"] = [SourceThrottled("slow down", 10.0)]
    stream.faults["fetch"] = [SourceUnavailable("503")] * 7
    found, seconds = in_time(refetcher(stream).fetch(SHARD, "10", "20", wanted_all))
    assert numbers(found) == list(range(10, 21))
    assert seconds == pytest.approx(10.0 + 0.1 * (2**7 - 1))


@pytest.mark.parametrize("call", ["iterator", "fetch"])
@pytest.mark.parametrize("error", [SourceThrottled("slow down"), SourceUnavailable("503")])
def test_the_eighth_failure_of_a_read_is_the_last(call: str, error: PollerError) -> None:
    """The error itself says why; each read has tries of its own."""
    stream = ScriptedStream()
    stream.fill(1, 400)
    stream.faults[call] = [error] * 8
    with pytest.raises(type(error), match=str(error)):
        fetched(stream, 10, 20)
    stream.faults = {"iterator": [error] * 7, "fetch": [*[error] * 7, None, *[error] * 7]}
    assert fetched(stream, 10, 150) == list(range(10, 151))


def test_a_refusal_is_not_tried_again() -> None:
    """Access that is denied stays denied."""
    stream = ScriptedStream()
    stream.faults["iterator"] = [AccessDenied("kinesis:GetShardIterator")]
    with pytest.raises(AccessDenied):
        fetched(stream, 10, 20)
    assert len(stream.positions) == 1


def test_a_failed_read_does_not_spoil_the_next_batch() -> None:
    """The next one starts anew and is whole."""
    stream = ScriptedStream()
    stream.fill(1, 400)
    reader = refetcher(stream)

    async def main() -> list[int]:
        await reader.fetch(SHARD, "10", "20", wanted_all)
        stream.faults["fetch"] = [SourceUnavailable("503")] * 8
        with pytest.raises(SourceUnavailable):
            await reader.fetch(SHARD, "21", "300", wanted_all)
        return numbers(await reader.fetch(SHARD, "21", "300", wanted_all))

    assert run_virtual(main()) == list(range(21, 301))


def test_batches_side_by_side_share_their_reads() -> None:
    """1,000 batches of 10 in a shard: a read for each page, not for each batch."""
    stream = ScriptedStream()
    stream.fill(1, 10_000)
    reader = refetcher(stream)

    async def main() -> None:
        for first in range(1, 10_001, 10):
            found = await reader.fetch(SHARD, name(first), name(first + 9), wanted_all)
            assert numbers(found) == list(range(first, first + 10))

    run_virtual(main())
    assert len(stream.reads) == 10_000 // TRAITS.fetch_limit


def test_shards_are_read_apart_from_each_other() -> None:
    """What is kept of one shard is never answered for another, also when more than are kept take turns."""
    stream = ScriptedStream()
    shards = [f"shard-{n}" for n in range(12)]
    for shift, shard in enumerate(shards):
        stream.fill(1 + shift, 200, shard)
    reader = refetcher(stream)

    async def main() -> None:
        for first in range(20, 180, 10):
            for shard in shards:
                found = await reader.fetch(shard, name(first), name(first + 9), wanted_all)
                assert numbers(found) == list(range(first, first + 10))

    run_virtual(main())
    assert len(reader._runs) <= 8  # what bounds the memory is not seen otherwise


def test_overlapping_ranges_share_their_reads() -> None:
    """Two lanes' batches: ranges that lie over each other, each with its own ids."""
    stream = ScriptedStream()
    stream.fill(1, 1000)
    reader = refetcher(stream)

    async def main() -> None:
        for first in range(1, 901, 20):
            for lane in (0, 1):
                ids = frozenset(name(n) for n in range(first + lane, first + 20, 2))
                start, end = min(map(int, ids)), max(map(int, ids))
                found = await reader.fetch(SHARD, name(start), name(end), lambda one, ids=ids: one.id in ids, ids)
                assert numbers(found) == list(range(start, end + 1, 2))

    run_virtual(main())
    assert len(stream.reads) == 9


def test_a_batch_before_what_is_kept_is_read_anew() -> None:
    """Batches need not come in order."""
    stream = ScriptedStream()
    stream.fill(1, 1000)
    reader = refetcher(stream)

    async def main() -> None:
        for first in (500, 100, 300, 900, 1):
            assert numbers(await reader.fetch(SHARD, name(first), name(first + 99), wanted_all)) == list(
                range(first, first + 100)
            )

    run_virtual(main())


def test_a_tip_that_has_moved_is_read_again() -> None:
    """That nothing more was there for one batch says nothing about the next."""
    stream = ScriptedStream()
    stream.fill(1, 15)
    reader = refetcher(stream)

    async def main() -> None:
        with pytest.raises(RangeTrimmed):
            await reader.fetch(SHARD, "10", "20", wanted_all)
        stream.fill(16, 30)
        assert numbers(await reader.fetch(SHARD, "10", "20", wanted_all)) == list(range(10, 21))

    run_virtual(main())


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shard not much more than a batch and a read's worth, however many batches were read."""
    monkeypatch.setattr(refetch, "_RUN_BYTES", 20_000)
    stream = ScriptedStream(wire=b"x" * 100)
    stream.fill(1, 5_000)
    reader = refetcher(stream)

    async def main() -> None:
        for first in range(1, 4_981, 30):  # no page ends where a batch does, so what is kept grows
            found = await reader.fetch(SHARD, name(first), name(first + 29), wanted_all)
            assert numbers(found) == list(range(first, first + 30))
            [run] = reader._runs.values()
            assert sum(len(record.wire) for record in run.records) <= 20_000 + 30 * 100

    run_virtual(main())
    assert len(stream.reads) == 50


@pytest.mark.parametrize("ids", [["1", "2500", "5000"], []], ids=["ids", "filter"])
def test_of_a_long_range_only_what_is_wanted_is_kept(monkeypatch: pytest.MonkeyPatch, ids: list[str]) -> None:
    """The other records of a range, of other lanes or filtered out, may be a stream's whole day."""
    monkeypatch.setattr(refetch, "_RUN_BYTES", 20_000)
    stream = ScriptedStream(wire=b"x" * 100)
    stream.fill(1, 5_000)
    reader = refetcher(stream)
    most = 0
    plain = refetch._Run.take_in

    def measured(run: Any, fetch: Fetch, start: int) -> None:
        nonlocal most
        plain(run, fetch, start)
        assert run.nbytes == sum(len(record.wire) for record in run.records)
        most = max(most, run.nbytes)

    monkeypatch.setattr(refetch._Run, "take_in", measured)
    wanted = {"1", "2500", "5000"}
    read = reader.fetch(SHARD, "1", "5000", lambda one: one.id in wanted, ids, least=5_000)
    assert numbers(run_virtual(read)) == [1, 2500, 5000]
    assert 0 < most <= 20_000
    assert len(stream.reads) == 50


records = st.lists(st.integers(0, 60).map(lambda size: Record("1", "", 0.0, b"x" * size)), max_size=40)


@given(records=records, most=st.integers(1, 12), most_bytes=st.integers(12, 200))
def test_pieces_are_the_records_within_the_limits(records: list[Record], most: int, most_bytes: int) -> None:
    """Nothing lost, nothing moved; as many as fit; what fits nowhere goes alone."""
    parts = list(pieces(records, most, most_bytes))
    assert [one for part in parts for one in part] == records
    assert all(parts)
    for part, following in zip_longest(parts, parts[1:]):
        assert len(part) == 1 or (len(part) <= most and len(payload(part)) <= most_bytes)
        if following is not None:
            more = [*part, following[0]]
            assert len(more) > most or len(payload(more)) > most_bytes


def test_no_records_are_no_pieces() -> None:
    """The caller decides what an empty batch is."""
    assert not list(pieces([], 10, 100))


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        (SourceKind.KINESIS, lambda n: {"kinesis": {"sequenceNumber": n}, "eventID": "s:1"}),
        (SourceKind.DYNAMODB, lambda n: {"dynamodb": {"SequenceNumber": n}, "eventID": "1"}),
    ],
)
def test_the_records_of_an_event_are_known_by_their_sequence_numbers(kind: SourceKind, item: Any) -> None:
    """In their order; another source's event is refused without being quoted."""
    event = json.dumps({"Records": [item("12"), item("7")]}).encode()
    assert [record.id for record in records_of(event, kind)] == ["12", "7"]
    assert records_of(b'{"Records":[]}', kind) == []
    other = SourceKind.DYNAMODB if kind is SourceKind.KINESIS else SourceKind.KINESIS
    with pytest.raises(ValueError, match="its payload has a record without") as caught:
        records_of(event, other)
    assert "12" not in str(caught.value)


@pytest.mark.parametrize("item", ["x", None, [], {}, {"kinesis": 1}, {"kinesis": {"sequenceNumber": 7}}])
def test_what_is_no_record_is_refused(item: Any) -> None:
    """Whatever stands in the list."""
    with pytest.raises(ValueError, match=r"its payload has a record without kinesis\.sequenceNumber"):
        records_of(json.dumps({"Records": [item]}).encode(), SourceKind.KINESIS)
