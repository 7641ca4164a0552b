"""Mappings under the supervisor, on virtual time: replaced streams, stores that fail at a stop, crashes of ours."""

import asyncio
import random
from dataclasses import replace

import structlog

from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    Checkpoint,
    Fetch,
    FunctionSpec,
    Listing,
    Mapping,
    Position,
    PositionKind,
    Record,
    Reply,
    ReplyStatus,
    RetryPolicy,
    Row,
    Shard,
    SourceKind,
    SourceSpec,
    StreamFacts,
    StreamTraits,
)
from poller.core.retry import Backoff
from poller.errors import AccessDenied, StoreUnavailable
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context, Pipe
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.supervisor import Supervisor, Wanted
from poller.stores.memory import MemoryStore
from tests.fakes.leases import alone
from tests.fakes.observer import NullObserver
from tests.sim.loop import VirtualClock, VirtualLoop

TROUBLE = Backoff(0.5, 30.0, lambda: 1.0)
MAPPING = Mapping(
    "m", SourceSpec(SourceKind.KINESIS, "arn:1", "r", "1", "s"), FunctionSpec("f", "arn", "role"),
    BatchPolicy(10), RetryPolicy(), TRIM_HORIZON,
)  # fmt: skip


class Source:
    """One open shard with two records."""

    def __init__(self) -> None:
        self.incarnation = "1"
        self.is_closed = False
        self.facts_error: Exception | None = None

    async def shards(self) -> Listing:
        return Listing((Shard("a"),), 0.0)

    async def facts(self) -> StreamFacts:
        if self.facts_error:
            raise self.facts_error
        return StreamFacts(86400.0, self.incarnation)

    async def iterator(self, shard: str, at: Position) -> str:
        return "0" if at.kind is PositionKind.TRIM_HORIZON else "end"

    async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
        await asyncio.sleep(0.01)
        records = tuple(Record(str(n), "k", 0.0, b"{%d}" % n) for n in (1, 2)) if iterator == "0" else ()
        return Fetch(records, "2" if records else "", "end", 0.0, 10, len(records))

    async def close(self) -> None:
        self.is_closed = True


class Target:
    capacity = None
    timeout = 1.0

    def __init__(self) -> None:
        self.calls = 0

    async def invoke(self, call) -> Reply:
        self.calls += 1
        return Reply(ReplyStatus.OK)


class Failing(MemoryStore):
    """Fails from a moment on."""

    is_away = False

    async def save(self, changes):
        self._check()
        return await super().save(changes)

    async def release(self, lease, checkpoint, to=None):
        self._check()
        return await super().release(lease, checkpoint, to)

    async def forget(self, mapping, shards=None):
        self._check()
        await super().forget(mapping, shards)

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable("away")


class Daemon:
    """A supervisor with everything around it; also its own plumbing."""

    def __init__(self, store: MemoryStore | None = None, source: Source | None = None) -> None:
        loop = asyncio.get_running_loop()
        clock = VirtualClock(loop)
        self.store = store or MemoryStore()
        self.source = source or Source()
        self.target = Target()
        self.connected = self.disconnected = 0
        self.gone: list[str] = []
        self.checkpointer = Checkpointer(self.store, clock, 0.1, TROUBLE)
        context = Context(
            clock,
            random.Random(1),
            self.store,
            self.checkpointer,
            ByteBudget(10**6),
            TROUBLE,
            TROUBLE,
            alone(self.store, clock),
        )
        self.supervisor = Supervisor(context, self)
        self.pipe_error: Exception | None = None

    async def connect(self, wanted: Wanted, result) -> Pipe:
        self.connected += 1

        async def open_stream() -> Source:
            if self.pipe_error:
                raise self.pipe_error
            return self.source

        return Pipe(
            wanted.mapping,
            result,
            self.target,
            Gate(None),
            NullObserver(),
            StreamTraits(100, 1.0, True),
            open_stream,
            None,
        )

    async def disconnect(self, pipe: Pipe) -> None:
        self.disconnected += 1

    def forgotten(self, mapping: str) -> None:
        self.gone.append(mapping)

    async def run_for(self, seconds: float, *, grace: float = 5.0, before_stop=lambda: None) -> float:
        saver = asyncio.ensure_future(self.checkpointer.run())
        task = asyncio.ensure_future(self.supervisor.run())
        await asyncio.sleep(seconds)
        before_stop()
        asked = asyncio.get_running_loop().time()
        self.supervisor.stop(grace)
        await task
        saver.cancel()
        await asyncio.wait([saver])
        return asyncio.get_running_loop().time() - asked


def run(main):
    loop = VirtualLoop()
    try:
        result = loop.run_until_complete(main())
        assert not asyncio.all_tasks(loop)
        return result
    finally:
        loop.close()


async def life(store: MemoryStore, source: Source, mapping: Mapping = MAPPING) -> tuple[int, list[str]]:
    daemon = Daemon(store, source)
    daemon.supervisor.want(Wanted(mapping))
    with structlog.testing.capture_logs() as logs:
        await daemon.run_for(5)
    return daemon.target.calls, [entry["event"] for entry in logs]


def test_a_stream_that_was_made_anew_is_read_from_its_start() -> None:
    """Positions of its predecessor would hide its records for ever: said as an error, then dropped."""

    async def main():
        store, source = MemoryStore(), Source()
        assert (await life(store, source))[0] == 1
        assert (await life(store, source))[0] == 0, "positions are kept"
        source.incarnation = "2"
        calls, events = await life(store, source)
        assert calls == 1
        assert "stream_replaced" in events
        assert (await life(store, source))[0] == 0

    run(main)


def test_positions_belong_to_a_source() -> None:
    """A mapping with a UUID of its own whose EventSourceArn was edited begins anew."""

    async def main():
        store = MemoryStore()
        await life(store, Source())
        other = replace(MAPPING, source=replace(MAPPING.source, arn="arn:2"))
        calls, events = await life(store, Source(), other)
        assert calls == 1
        assert "stream_replaced" in events

    run(main)


def test_a_stream_whose_age_may_not_be_asked_is_read_all_the_same() -> None:
    """Reading does not need that right; and an unknown incarnation replaces nothing."""

    async def main():
        store, source = MemoryStore(), Source()
        await life(store, source)
        source.facts_error = AccessDenied("no")
        calls, events = await life(store, source)
        assert calls == 0
        assert "stream_replaced" not in events

    run(main)


def test_a_stop_stays_within_the_grace_when_the_store_fails() -> None:
    """Positions that cannot be saved are said and given up; the next start repeats what they would have saved."""

    async def main():
        store = Failing()
        daemon = Daemon(store)
        daemon.supervisor.want(Wanted(MAPPING))

        def fail() -> None:
            store.is_away = True

        assert await daemon.run_for(5, grace=5.0, before_stop=fail) <= 6

    run(main)


def test_a_stop_does_not_wait_for_a_delete_that_the_store_refuses() -> None:
    """It once hung for ever; the next start finishes the delete."""

    async def main():
        store = Failing()
        daemon = Daemon(store)
        daemon.supervisor.want(Wanted(MAPPING))

        def delete() -> None:
            store.is_away = True
            daemon.supervisor.remove("m", forget=True)

        asyncio.get_running_loop().call_later(5, delete)
        assert await daemon.run_for(60) <= 6

    run(main)


def test_a_deleted_mapping_is_forgotten_everywhere() -> None:
    """Its positions, its stream's name, its metrics."""

    async def main():
        daemon = Daemon()
        daemon.supervisor.want(Wanted(MAPPING))
        task = asyncio.ensure_future(daemon.supervisor.run())
        await asyncio.sleep(5)
        daemon.supervisor.remove("m", forget=True)
        assert daemon.supervisor.state("m") == "Deleting"
        await asyncio.sleep(5)
        assert daemon.supervisor.state("m") is None
        assert daemon.gone == ["m"]
        assert not await daemon.store.load("m")
        assert not await daemon.store.documents("")
        daemon.supervisor.stop(1.0)
        await task

    run(main)


def test_status_is_what_the_runner_says() -> None:
    """A stream has no receive loops and its breaker is closed; a queue's come from its runner, none without one."""

    async def main():
        daemon = Daemon()
        daemon.supervisor.want(Wanted(MAPPING))
        (status,) = daemon.supervisor.status()
        assert (status.breaker, status.receivers, status.receiver_limit) == ("closed", None, None)
        task = asyncio.ensure_future(daemon.supervisor.run())
        await asyncio.sleep(1)
        kept = daemon.supervisor._kept["m"]
        (status,) = daemon.supervisor.status()
        assert kept.runner is not None
        assert (status.breaker, status.receivers, status.receiver_limit) == ("closed", None, None)
        kept.runner.breaker, kept.runner.receivers, kept.runner.receiver_limit = "open", 3, 20
        (status,) = daemon.supervisor.status()
        assert (status.breaker, status.receivers, status.receiver_limit) == ("open", 3, 20)
        daemon.supervisor.stop(1.0)
        await task

    run(main)


def test_a_crash_of_ours_is_tried_again_and_leaks_nothing() -> None:
    """Each try connects and disconnects; the mapping says what is wrong and recovers."""

    async def main():
        daemon = Daemon()
        daemon.pipe_error = KeyError("a defect")
        daemon.supervisor.want(Wanted(MAPPING))
        task = asyncio.ensure_future(daemon.supervisor.run())
        with structlog.testing.capture_logs() as logs:
            await asyncio.sleep(20)
        assert "mapping_crashed" in {entry["event"] for entry in logs}
        assert "defect" in daemon.supervisor.status()[0].reason
        assert daemon.supervisor.unready()
        assert 2 < daemon.connected < 12
        assert daemon.connected - daemon.disconnected <= 1
        daemon.pipe_error = None
        await asyncio.sleep(60)
        assert daemon.target.calls == 1
        assert not daemon.supervisor.unready()
        daemon.supervisor.stop(1.0)
        await task
        assert daemon.source.is_closed

    run(main)


def test_only_what_changed_is_disturbed() -> None:
    """The same mapping again is nothing; another batch size stops the runner in order and starts it anew."""

    async def main():
        daemon = Daemon()
        daemon.supervisor.want(Wanted(MAPPING))
        task = asyncio.ensure_future(daemon.supervisor.run())
        await asyncio.sleep(5)
        daemon.supervisor.want(Wanted(MAPPING))
        await asyncio.sleep(1)
        assert daemon.connected == 1
        daemon.supervisor.want(Wanted(replace(MAPPING, batch=BatchPolicy(5))))
        assert daemon.supervisor.state("m") == "Updating"
        assert not daemon.supervisor.unready(), "it has reached its source since the start"
        await asyncio.sleep(5)
        assert (daemon.connected, daemon.supervisor.state("m"), daemon.target.calls) == (2, "Enabled", 1)
        daemon.supervisor.want(Wanted(replace(MAPPING, enabled=False)))
        assert daemon.supervisor.state("m") == "Disabling"
        await asyncio.sleep(5)
        assert daemon.supervisor.state("m") == "Disabled"
        [row] = (await daemon.store.load("m")).values()
        assert row == Row("a", Checkpoint(Position(PositionKind.AFTER, "2")), (), None, row.token)
        daemon.supervisor.stop(1.0)
        await task

    run(main)
