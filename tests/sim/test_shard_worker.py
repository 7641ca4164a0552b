"""One shard's worker on virtual time, with a scripted source: positions, losses, stops, room."""

import asyncio
import itertools
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    Checkpoint,
    Fetch,
    FunctionSpec,
    Lease,
    Mapping,
    Position,
    PositionKind,
    Record,
    Reply,
    ReplyStatus,
    RetryPolicy,
    Row,
    ShardState,
    SourceKind,
    SourceSpec,
    StreamTraits,
)
from poller.core.retry import Backoff
from poller.errors import (
    DestinationFailed,
    IteratorExpired,
    PositionTrimmed,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
)
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context, LastResult, Pipe
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.shard_worker import ShardWorker
from poller.stores.memory import MemoryStore
from tests.fakes.leases import alone
from tests.fakes.observer import CountingObserver
from tests.sim.loop import EPOCH, VirtualClock, VirtualLoop

AFTER, AT = PositionKind.AFTER, PositionKind.AT


def rec(n: int, arrival: float = EPOCH) -> Record:
    return Record(str(n), "k", arrival, b"{%d}" % n)


def page(*numbers: int, end: bool = False, lag: float | None = 0.0) -> Fetch:
    records = tuple(rec(n) for n in numbers)
    return Fetch(records, str(numbers[-1]) if numbers else "", None if end else "next", lag, 100, len(numbers))


class Source:
    """Answers reads from a script, then empty pages for ever; `asked` are the positions of its iterators."""

    def __init__(self, script: list[Any], iterators: list[Any] | None = None) -> None:
        self.script = script
        self.iterators = iterators or []
        self.asked: list[Position] = []
        self.reads: list[tuple[float, int]] = []

    async def iterator(self, shard: str, at: Position) -> str:
        self.asked.append(at)
        answer = self.iterators.pop(0) if self.iterators else None
        if isinstance(answer, Exception):
            raise answer
        return "first"

    async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
        self.reads.append((asyncio.get_running_loop().time(), limit))
        await asyncio.sleep(0.01)
        answer = self.script.pop(0) if self.script else page()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Target:
    capacity = None
    timeout = 30.0

    def __init__(self, seconds: float = 0.0, reply: Reply | None = None) -> None:
        self.seconds = seconds
        self.reply = reply or Reply(ReplyStatus.OK)
        self.calls: list[bytes] = []

    async def invoke(self, call) -> Reply:
        self.calls.append(call.payload)
        await asyncio.sleep(self.seconds)
        return self.reply


class Shard:
    """A worker with everything around it."""

    def __init__(self, source: Source, position: Position = TRIM_HORIZON, **more: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        clock = VirtualClock(loop)
        rng = random.Random(1)
        trouble = Backoff(0.5, 30.0, lambda: 1.0)
        self.observer = CountingObserver()
        self.target = more.get("target", Target())
        self.budget = ByteBudget(more.get("budget", 10_000_000))
        self.store = MemoryStore()
        self.checkpointer = Checkpointer(self.store, clock, 0.1, trouble)
        context = Context(
            clock, rng, self.store, self.checkpointer, self.budget, trouble, trouble, alone(self.store, clock)
        )
        mapping = Mapping(
            id="m",
            source=SourceSpec(SourceKind.KINESIS, "arn", "r", "1", "s"),
            function=FunctionSpec("f", "arn", "role"),
            batch=BatchPolicy(size=more.get("size", 10), buffer_records=more.get("buffer", 100)),
            retry=RetryPolicy(attempts=more.get("attempts", -1), max_age=more.get("max_age", -1)),
            start=TRIM_HORIZON,
        )
        pipe = Pipe(
            mapping=mapping,
            result=LastResult(),
            target=self.target,
            gate=more.get("gate", Gate(None)),
            observer=self.observer,
            traits=more.get("traits", StreamTraits(1000, 1.0, more.get("has_timestamps", True))),
            open_stream=None,
            open_queue=None,
            matches=more.get("matches"),
            destination=more.get("destination"),
        )
        row = Row("shard", Checkpoint(position))
        self.worker = ShardWorker(
            context,
            pipe,
            source,
            row,
            Lease("m", "shard", "me", 1),
            is_fresh=more.get("is_fresh", False),
            is_stale=more.get("is_stale", False),
        )


def run(main) -> Any:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


async def run_for(shard: Shard, seconds: float) -> None:
    """Run for a while, then stop in order."""
    task = asyncio.ensure_future(shard.worker.run())
    await asyncio.wait([task], timeout=seconds)
    if not task.done():
        shard.worker.stop()
    await task


def test_a_shard_is_read_to_its_end_and_settled() -> None:
    """No next iterator and no record left: the shard has ended."""

    async def main():
        shard = Shard(Source([page(1, 2), page(3, end=True)]))
        await asyncio.wait_for(shard.worker.run(), 100)
        assert shard.worker.has_ended
        assert shard.worker.checkpoint() == Checkpoint(Position(AFTER, "3"))
        assert len(shard.target.calls) == 2
        assert shard.budget.used == 0

    run(main)


def test_reads_are_paced() -> None:
    """At once while behind, at most five a second; once a second at the tip, at a moment of its own."""

    async def main():
        source = Source([page(1, lag=9.0), page(lag=9.0), page(2, lag=0.0)])
        await run_for(Shard(source), 5)
        times = [at for at, _ in source.reads]
        gaps = [round(later - earlier, 2) for earlier, later in itertools.pairwise(times)]
        assert (gaps[:2], gaps[3:5]) == ([0.2, 0.2], [1.0, 1.0])
        assert gaps[2] < 1.0, "shards that begin together would always poll together"

    run(main)


PUSHED = StreamTraits(1000, 0.0, True, min_interval=0.0, is_pushed=True, operations=("Subscribe", "Subscribe"))


def test_a_pushed_source_is_read_without_a_pause() -> None:
    """Its reads wait by themselves, at the tip and behind it; they have their own name."""

    async def main():
        source = Source([page(1, lag=9.0), page(2, lag=0.0), page(lag=0.0), page(3, lag=0.0, end=True)])
        shard = Shard(source, traits=PUSHED)
        calls = []
        shard.observer.polled = lambda operation, outcome, events: calls.append((operation, outcome, events))
        await asyncio.wait_for(shard.worker.run(), 100)
        times = [at for at, _ in source.reads]
        assert [round(later - earlier, 2) for earlier, later in itertools.pairwise(times)] == [0.01] * 3
        assert calls == [("Subscribe", "success", events) for events in (1, 1, 0, 1)]

    run(main)


def test_waiting_for_a_push_reserves_no_room() -> None:
    """Else idle shards would hold the bytes that others need, for as long as nothing comes."""

    async def main():
        source, release = Source([]), asyncio.Event()
        used: list[int] = []

        async def fetch(shard_id: str, iterator: str, limit: int) -> Fetch:
            used.append(shard.budget.used)
            await release.wait()
            return page(1, end=True)

        source.fetch = fetch
        shard = Shard(source, traits=PUSHED)
        task = asyncio.ensure_future(shard.worker.run())
        while not used:
            await asyncio.sleep(0.01)
        assert used == [0]
        release.set()
        await task
        assert shard.budget.used == 0

    run(main)


def test_an_expired_iterator_goes_on_after_what_is_in_memory() -> None:
    """Never again from the starting position."""

    async def main():
        source = Source([page(1, 2), IteratorExpired("old"), page(3)])
        await run_for(Shard(source), 5)
        assert source.asked == [TRIM_HORIZON, Position(AFTER, "2")]

    run(main)


@pytest.mark.parametrize(
    ("has_timestamps", "asked"),
    [(True, Position(PositionKind.AT_TIMESTAMP, repr(EPOCH))), (False, TRIM_HORIZON)],
)
def test_latest_is_resolved_once(has_timestamps, asked) -> None:
    """A second time it is the pinned moment: AT_TIMESTAMP, or TRIM_HORIZON without what is older (DynamoDB)."""

    async def main():
        pinned = Position(PositionKind.LATEST, repr(EPOCH))
        old, new = rec(1, EPOCH - 5), rec(2, EPOCH + 5)
        later = Fetch((old, new), "2", "next", 0.0, 10, 2)
        source = Source([IteratorExpired("old"), later])
        shard = Shard(source, pinned, is_fresh=True, has_timestamps=has_timestamps)
        await run_for(shard, 10)
        assert source.asked == [pinned, asked]
        delivered = b"".join(shard.target.calls)
        assert new.wire in delivered
        assert (old.wire in delivered) == has_timestamps
        restarted = Source([page(3)])
        await run_for(Shard(restarted, pinned, has_timestamps=has_timestamps), 5)
        assert restarted.asked == [asked], "a restart before any record was settled"

    run(main)


def test_a_trimmed_position_goes_on_at_the_horizon_and_is_counted() -> None:
    """Data that left retention is lost, said as an error, and the shard goes on."""

    async def main():
        source = Source([page(50)], iterators=[PositionTrimmed("too old")])
        shard = Shard(source, Position(AFTER, "7"))
        with structlog.testing.capture_logs() as logs:
            await run_for(shard, 5)
        assert source.asked == [Position(AFTER, "7"), TRIM_HORIZON]
        assert shard.observer.counts["lost"] == 1
        assert [entry["log_level"] for entry in logs if entry["event"] == "records_lost"] == ["error"]
        assert shard.worker.checkpoint() == Checkpoint(Position(AFTER, "50"))

    run(main)


def test_a_read_that_begins_after_its_position_is_a_loss_too() -> None:
    """AT may answer silently with what comes after a trimmed record."""

    async def main():
        shard = Shard(Source([page(9)]), Position(AT, "7"))
        await run_for(shard, 5)
        assert shard.observer.counts["lost"] == 1
        fine = Shard(Source([page(7)]), Position(AT, "7"))
        await run_for(fine, 5)
        assert fine.observer.counts["lost"] == 0

    run(main)


def test_a_stale_position_is_asked_for_with_its_own_record() -> None:
    """A source may pass over a trimmed position without a word: then the record is missing, and that is said."""

    async def main():
        source = Source([page(7, 8), IteratorExpired("old"), page(9)])
        shard = Shard(source, Position(AFTER, "7"), is_stale=True)
        await run_for(shard, 5)
        assert source.asked == [Position(AT, "7"), Position(AFTER, "8")]
        assert shard.target.calls == [b'{"Records":[{8}]}', b'{"Records":[{9}]}']
        assert shard.observer.counts["lost"] == 0
        shard = Shard(Source([page(), page(9)]), Position(AFTER, "7"), is_stale=True)
        await run_for(shard, 5)
        assert shard.target.calls == [b'{"Records":[{9}]}']
        assert shard.observer.counts["lost"] == 1

    run(main)


def test_trouble_is_waited_out_and_shown() -> None:
    """Throttles and unusable answers back off, keep the iterator, and show while they last."""

    async def main():
        source = Source([SourceThrottled("slow", 2.0), SourceUnavailable("a truncated answer"), page(1)])
        shard = Shard(source)
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(2.5)
        assert shard.worker.problem == "a truncated answer"
        await asyncio.sleep(5)
        assert shard.worker.problem == ""
        assert len(source.asked) == 1
        assert not shard.worker.has_ended
        assert shard.observer.counts["polled_throttled"] == shard.observer.counts["polled_error"] == 1
        shard.worker.stop()
        await task

    run(main)


def test_a_shard_that_is_gone_delivers_what_it_holds() -> None:
    """The source does not know it any more: no END, the runner decides."""

    async def main():
        shard = Shard(Source([page(1), SourceGone("no such shard")]), target=Target(seconds=5))
        await asyncio.wait_for(shard.worker.run(), 100)
        assert shard.worker.is_gone
        assert shard.worker.checkpoint() == Checkpoint(Position(AFTER, "1"))

    run(main)


@pytest.mark.parametrize("turns", range(12))
def test_a_stop_at_any_turn_of_the_loop_ends(turns: int) -> None:
    """Also between the creation of a lane's task and its first step."""

    async def main():
        shard = Shard(Source([page(1)]), target=Target(seconds=1))
        loop = asyncio.get_running_loop()

        def stop_in(left: int) -> None:
            shard.worker.stop() if left == 0 else loop.call_soon(stop_in, left - 1)

        original = shard.observer.polled

        def polled(*arguments) -> None:
            original(*arguments)
            stop_in(turns)

        shard.observer.polled = polled
        await asyncio.wait_for(shard.worker.run(), 60)
        assert shard.worker.state is ShardState.DRAINING
        position = shard.worker.checkpoint().position
        assert position == (Position(AFTER, "1") if shard.target.calls else Position(AT, "1"))

    run(main)


def test_waiting_for_a_slot_does_not_hold_up_a_stop() -> None:
    """A lane that waits for capacity has no work in hand."""

    async def main():
        gate = Gate(1)
        async with gate:
            shard = Shard(Source([page(1)]), gate=gate)
            await run_for(shard, 5)
        assert not shard.target.calls
        assert not gate.is_scarce

    run(main)


def test_a_rate_is_never_exceeded_and_nothing_is_attempted_while_it_waits(monkeypatch) -> None:
    """max_invocations_per_second: batches wait their turn with their first attempt before them, retries too."""
    read_clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr("asyncio_throttle.throttler.time", read_clock)

    class Timed(Target):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []
            self.attempts: list[int] = []

        async def invoke(self, call) -> Reply:
            self.times.append(asyncio.get_running_loop().time())
            self.attempts.append(call.attempt)
            return Reply(ReplyStatus.FUNCTION_ERROR if len(self.times) == 3 else ReplyStatus.OK)

    async def main():
        target = Timed()
        shard = Shard(Source([page(*range(1, 21))]), target=target, size=1, gate=Gate(None, 2.0))
        await run_for(shard, 5)
        windows = zip(target.times, target.times[2:], strict=False)
        assert all(later - earlier > 1.0 for earlier, later in windows)
        assert len(target.times) == 10
        assert target.attempts == [1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
        assert shard.worker.checkpoint() == Checkpoint(Position(AT, "10"))

    run(main)


class Desk:
    """A failure destination that refuses the first `refusals` reports."""

    limit = None

    def __init__(self, refusals: int = 0, seconds: float = 0.0) -> None:
        self.refusals = refusals
        self.seconds = seconds
        self.tries: list[str] = []
        self.taken: list[dict[str, Any]] = []

    async def send(self, notice, body: bytes) -> None:
        self.tries.append(notice.request_id)
        await asyncio.sleep(self.seconds)
        if len(self.tries) <= self.refusals:
            raise DestinationFailed("the desk is closed")
        self.taken.append(json.loads(body))


FAILING = Reply(ReplyStatus.FUNCTION_ERROR, error="no", status_code=500)


def test_a_batch_is_reported_before_it_is_settled() -> None:
    """While its destination refuses, the lane waits and shows why; then one report, and the shard goes on."""

    async def main():
        desk = Desk(refusals=4)
        shard = Shard(Source([page(1, 2), page(3)]), target=Target(reply=FAILING), attempts=0, destination=desk)
        task = asyncio.ensure_future(run_for(shard, 60))
        await asyncio.sleep(4)
        status = shard.worker.status()
        assert (status.last_error, status.attempts, status.first_sequence) == ("the desk is closed", 1, "1")
        assert status.blocked_since is not None
        assert status.next_attempt is not None
        assert shard.worker.checkpoint() == Checkpoint(Position(AT, "1"))
        await task
        first, second = desk.taken
        assert desk.tries == [first["requestContext"]["requestId"]] * 5 + [second["requestContext"]["requestId"]]
        assert first["responseContext"] == {
            "statusCode": 500,
            "executedVersion": "$LATEST",
            "functionError": "Unhandled",
        }
        assert first["KinesisBatchInfo"]["batchSize"] == 2
        assert first["payload"] == '{"Records":[{1},{2}]}'
        assert (shard.observer.counts["reported_error"], shard.observer.counts["reported_events"]) == (4, 3)
        assert shard.observer.counts["dropped"] == 0
        kept = await shard.store.documents("discarded/m/")
        assert [document["ids"] for document in kept.values()] == [["1", "2"], ["3"]]

    run(main)


def test_without_a_destination_what_is_dropped_is_known_to_the_store() -> None:
    """Nothing is discarded without a trace."""

    async def main():
        shard = Shard(Source([page(1)]), target=Target(reply=FAILING), attempts=0)
        await run_for(shard, 5)
        assert shard.observer.counts["dropped"] == 1
        [document] = (await shard.store.documents("discarded/m/")).values()
        assert document["ids"] == ["1"]
        assert document["record"]["requestContext"]["condition"] == "RetryAttemptsExhausted"

    run(main)


@pytest.mark.parametrize(("refusals", "settled"), [(0, True), (99, False)])
def test_a_stop_lets_a_report_arrive_but_does_not_wait_for_a_closed_desk(refusals: int, settled: bool) -> None:
    """What nobody has taken is given up again by the next owner."""

    async def main():
        desk = Desk(refusals, seconds=3)
        shard = Shard(Source([page(1)]), target=Target(reply=FAILING), attempts=0, destination=desk)
        await run_for(shard, 2)
        assert len(desk.tries) == 1
        assert shard.worker.checkpoint() == Checkpoint(Position(PositionKind.AFTER if settled else AT, "1"))

    run(main)


def test_what_no_filter_matches_moves_the_position() -> None:
    """Counted, never delivered."""

    async def main():
        shard = Shard(Source([page(1, 2, 3), page(4, 5)]), matches=lambda record: record.id == "2")
        await run_for(shard, 5)
        assert len(shard.target.calls) == 1
        assert shard.observer.counts["filtered"] == 4
        assert shard.worker.checkpoint() == Checkpoint(Position(PositionKind.AFTER, "5"))

    run(main)


def test_what_is_given_up_uses_no_permit(monkeypatch) -> None:
    """Else a slow rate would be halved by every record that is discarded."""
    read_clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr("asyncio_throttle.throttler.time", read_clock)

    async def main():
        target = Target(reply=Reply(ReplyStatus.FUNCTION_ERROR))
        shard = Shard(Source([page(*range(1, 21))]), target=target, size=1, attempts=0, gate=Gate(None, 0.1))
        await run_for(shard, 95)
        assert len(target.calls) == 10

    run(main)


def test_a_defect_in_reading_does_not_cut_off_what_is_in_flight() -> None:
    """The reader is tried again; the invocation ends and counts."""

    async def main():
        source = Source([page(1), KeyError("a defect"), page(2)])
        shard = Shard(source, target=Target(seconds=3))
        with structlog.testing.capture_logs() as logs:
            await run_for(shard, 10)
        assert "read_crashed" in {entry["event"] for entry in logs}
        assert shard.target.calls == [b'{"Records":[{1}]}', b'{"Records":[{2}]}']

    run(main)


def test_a_position_that_stays_trimmed_is_asked_for_slowly_and_counted_once() -> None:
    """It once made fifty calls a second."""

    async def main():
        source = Source([], iterators=[PositionTrimmed("gone")] * 1000)
        shard = Shard(source, Position(AFTER, "7"))
        await run_for(shard, 60)
        assert len(source.asked) < 15
        assert shard.observer.counts["lost"] == 1

    run(main)


def test_the_floor_of_latest_outlives_restarts() -> None:
    """DynamoDB: a page of older records must not move the stored position, which alone names the moment."""

    async def main():
        pinned = Position(PositionKind.LATEST, repr(EPOCH))
        old = Fetch((rec(1, EPOCH - 5),), "1", "next", None, 10, 1)
        new = Fetch((rec(2, EPOCH - 5), rec(3, EPOCH + 5)), "3", "next", None, 10, 2)
        shard = Shard(Source([old]), pinned, has_timestamps=False)
        await run_for(shard, 3)
        assert shard.worker.checkpoint() is None
        shard = Shard(Source([old, new]), pinned, has_timestamps=False)
        await run_for(shard, 3)
        assert shard.target.calls == [b'{"Records":[{3}]}']
        assert shard.worker.checkpoint() == Checkpoint(Position(AFTER, "3"))

    run(main)


def test_latest_is_not_asked_for_again_when_the_first_answer_failed() -> None:
    """Minutes may pass until it succeeds: what comes in between is ours."""

    async def main():
        source = Source([], iterators=[SourceUnavailable("away")])
        await run_for(Shard(source, Position(PositionKind.LATEST, repr(EPOCH)), is_fresh=True), 5)
        assert [position.kind for position in source.asked] == [PositionKind.LATEST, PositionKind.AT_TIMESTAMP]

    run(main)


def test_a_full_buffer_stops_reads_and_room_resumes_them() -> None:
    """A stuck lane holds at most its buffer; when it moves, reading goes on."""

    async def main():
        source = Source([page(*range(n, n + 10)) for n in range(1, 200, 10)])
        target = Target(seconds=10)
        shard = Shard(source, target=target, buffer=20, size=10)
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(9)
        assert len(source.reads) == 2
        await asyncio.sleep(3)
        assert len(source.reads) == 3
        shard.worker.stop()
        await task

    run(main)


def test_the_bytes_of_a_whole_read_are_waited_for() -> None:
    """A budget that others use up for a moment does not cut reads short; who gives back wakes whoever finds room."""

    async def main():
        source = Source([page(1), page(2), page(3, end=True)])
        shard = Shard(source, budget=1_000_000)
        shard.budget.take(1_000_000)
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(3)
        shard.budget.give(10_000)
        await asyncio.sleep(1)
        assert not source.reads
        shard.budget.give(990_000)
        await task
        assert [limit for _, limit in source.reads] == [100, 100, 100]
        assert source.reads[0][0] < 4.1
        assert shard.budget.used == 0

    run(main)


def test_a_read_that_hangs_holds_no_bytes_of_others() -> None:
    """They are reserved for a second, and never more than a whole read's."""

    async def main():
        source, release = Source([]), asyncio.Event()

        async def fetch(shard_id: str, iterator: str, limit: int) -> Fetch:
            await release.wait()
            return page(1, end=True)

        source.fetch = fetch
        shard = Shard(source, budget=1_000_000)
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(0.5)
        assert 0 < shard.budget.used <= 262_144
        await asyncio.sleep(1)
        assert shard.budget.used == 0
        release.set()
        await task
        assert shard.budget.used == 0

    run(main)


def test_latest_is_asked_for_at_once_whatever_others_hold() -> None:
    """A fresh shard waits for nobody's bytes: what came while it waited would be passed over."""

    async def main():
        source = Source([page(1, end=True)])
        shard = Shard(source, position=Position(PositionKind.LATEST, "1.0"), is_fresh=True, budget=1_000_000)
        shard.budget.take(1_000_000)
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(0.01)
        assert [at.kind for at in source.asked] == [PositionKind.LATEST]
        await task

    run(main)


def test_the_byte_budget_is_shared_and_never_starves() -> None:
    """Over the budget, and for long, only who holds nothing may read, a little; who gives back wakes the others."""

    async def main():
        source = Source([page(1), page(2), page(3)])
        shard = Shard(source, target=Target(seconds=10), budget=1_000_000)
        shard.budget.take(1_000_000)
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(8)
        assert [limit for _, limit in source.reads] == [1], "nobody knows yet how large its records are"
        shard.budget.give(1_000_000)
        await asyncio.sleep(1)
        assert len(source.reads) >= 2
        shard.worker.stop()
        await task
        assert shard.budget.used == 0

    run(main)


def test_a_read_that_was_under_way_when_memory_ran_short_is_not_taken_in() -> None:
    """What was dropped lies before it: it comes again, in order."""

    class Slow(Source):
        async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
            fetch = await super().fetch(shard, iterator, limit)
            if fetch.newest == "3":
                await asyncio.sleep(5)
            return fetch

    class Stuck(Target):
        async def invoke(self, call) -> Reply:
            self.calls.append(call.payload)
            await asyncio.sleep(2)
            return Reply(ReplyStatus.OK if len(self.calls) > 1 else ReplyStatus.FUNCTION_ERROR)

    async def main():
        source = Slow([page(1, 2), page(3), page(2, 3)])
        shard = Shard(source, target=Stuck(), size=1, budget=1_000_000)
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(1.5)
        shard.budget.take(1_000_000)
        await asyncio.sleep(3)
        shard.budget.give(1_000_000)
        await asyncio.sleep(30)
        assert source.asked == [TRIM_HORIZON, Position(AFTER, "1")]
        assert shard.target.calls == [b'{"Records":[{%d}]}' % n for n in (1, 1, 2, 3)]
        shard.worker.stop()
        await task

    run(main)


def test_what_is_dropped_when_memory_runs_short_is_gone() -> None:
    """Nobody holds on to it while the shard waits for room: the last read neither."""

    class Wire(bytes):
        alive = 0

        def __new__(cls, text: bytes):
            cls.alive += 1
            return super().__new__(cls, text)

        def __del__(self) -> None:
            type(self).alive -= 1

    def read(number: int) -> Fetch:
        records = tuple(Record(str(n), "k", EPOCH, Wire(b"{%d}" % n)) for n in range(number, number + 50))
        return Fetch(records, records[-1].id, "next", 0.0, 100, 50)

    async def main():
        shard = Shard(Source([read(1)]), target=Target(1, Reply(ReplyStatus.FUNCTION_ERROR)), size=1, budget=1_000_000)
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(0.5)
        assert Wire.alive == 50
        shard.budget.take(1_000_000)
        await asyncio.sleep(30)
        assert Wire.alive == 1, "the failing batch alone is kept"
        shard.worker.stop()
        await task

    run(main)


def test_a_lost_lease_cuts_off_what_is_in_flight() -> None:
    """Somebody else owns the shard: the worker ends at once and writes nothing."""

    async def main():
        shard = Shard(Source([page(1)]), target=Target(seconds=1000))
        task = asyncio.ensure_future(shard.worker.run())
        await asyncio.sleep(1)
        shard.worker.lose_lease()
        await asyncio.wait_for(task, 1)
        assert shard.worker.is_lost

    run(main)


def test_discards_are_counted_and_named() -> None:
    """Without a failure destination the log is the only trace."""

    async def main():
        shard = Shard(Source([page(1, 2)]), max_age=0.005)
        with structlog.testing.capture_logs() as logs:
            await run_for(shard, 5)
        assert shard.observer.counts["dropped"] == 2
        [entry] = [entry for entry in logs if entry["event"] == "records_discarded"]
        assert (entry["reason"], entry["first_sequence"], entry["last_sequence"]) == ("RecordAgeExceeded", "1", "2")

    run(main)
