"""Changes of a mapping that runs, and orders to move its positions, on virtual time."""

import asyncio
import json
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
from poller.errors import AccessDenied, ConfigError, StoreUnavailable
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context, Pipe
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.stream_runner import seek_key
from poller.runtime.supervisor import Supervisor, Wanted
from poller.stores.memory import MemoryStore
from tests.fakes.leases import alone
from tests.fakes.observer import NullObserver
from tests.sim.loop import EPOCH, VirtualClock, VirtualLoop

FAST = Backoff(0.5, 30.0, lambda: 1.0)
MAPPING = Mapping(
    "m", SourceSpec(SourceKind.KINESIS, "arn:1", "r", "1", "s"), FunctionSpec("f", "arn", "role"),
    BatchPolicy(2), RetryPolicy(), TRIM_HORIZON,
)  # fmt: skip


class Stream:
    """Shards with records that have the numbers 1, 2, ...; arrival is EPOCH + number."""

    def __init__(self, **shards: int) -> None:
        self.shards = {name: list(range(1, count + 1)) for name, count in shards.items()}
        self.parents: dict[str, tuple[str, ...]] = {}
        self.closed: set[str] = set()
        self.sources: list[Source] = []

    def add(self, shard: str, count: int) -> None:
        last = max(self.shards[shard], default=0)
        self.shards[shard] += range(last + 1, last + count + 1)


class Source:
    """One opening of the stream. `role`: what its records show."""

    def __init__(self, stream: Stream, role: str) -> None:
        self.stream, self.role = stream, role
        self.is_closed = False
        stream.sources.append(self)

    async def shards(self) -> Listing:
        listed = [
            Shard(name, self.stream.parents.get(name, ()), name in self.stream.closed) for name in self.stream.shards
        ]
        return Listing(tuple(listed), EPOCH + 1000)

    async def facts(self) -> StreamFacts:
        return StreamFacts(86400.0, "1")

    async def iterator(self, shard: str, at: Position) -> str:
        numbers = self.stream.shards[shard]
        match at.kind:
            case PositionKind.TRIM_HORIZON:
                index = 0
            case PositionKind.AT:
                index = numbers.index(int(at.value))
            case PositionKind.AFTER:
                index = next((i for i, n in enumerate(numbers) if n > int(at.value)), len(numbers))
            case PositionKind.AT_TIMESTAMP:
                index = next((i for i, n in enumerate(numbers) if EPOCH + n >= float(at.value)), len(numbers))
            case _:
                raise AssertionError(at)
        return str(index)

    async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
        await asyncio.sleep(0.01)
        numbers = self.stream.shards[shard][int(iterator) : int(iterator) + limit]
        records = tuple(
            Record(str(n), f"k{n}", EPOCH + n, json.dumps({"n": n, "shard": shard, "role": self.role}).encode())
            for n in numbers
        )
        end = int(iterator) + len(numbers)
        is_end = shard in self.stream.closed and end == len(self.stream.shards[shard])
        return Fetch(records, records[-1].id if records else "", None if is_end else str(end), 0.0, 9, len(records))

    async def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


class Target:
    """Notes every call; `answer` may be a status, or an event to wait for."""

    capacity = None
    timeout = 1.0

    def __init__(self, name: str, daemon: "Daemon") -> None:
        self.name, self.daemon = name, daemon
        self.is_closed = False

    async def invoke(self, call) -> Reply:
        assert not self.is_closed, "a call over a target that was closed"
        records = json.loads(call.payload)["Records"]
        shard, numbers = records[0]["shard"], [record["n"] for record in records]
        self.daemon.calls.append((self.name, shard, numbers, call.attempt, records[0]["role"]))
        answer = self.daemon.rule(self.name, shard, numbers)
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            answer = None
        assert not self.is_closed, "closed under a call"
        if answer is not None:
            return Reply(answer, error="no")
        self.daemon.done += [(shard, n) for n in numbers]
        return Reply(ReplyStatus.OK)


class Daemon:
    """A supervisor and its plumbing; a target for each revision that is wanted."""

    def __init__(self, stream: Stream, store: MemoryStore | None = None) -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        self.store, self.stream = store or MemoryStore(), stream
        self.calls: list[tuple] = []
        self.done: list[tuple[str, int]] = []
        self.targets: list[Target] = []
        self.rule = lambda name, shard, numbers: None
        self.connect_error: Exception | None = None
        self.gate = Gate(None)
        self.checkpointer = Checkpointer(self.store, clock, 0.1, FAST)
        context = Context(
            clock,
            random.Random(1),
            self.store,
            self.checkpointer,
            ByteBudget(10**6),
            FAST,
            FAST,
            alone(self.store, clock),
        )
        self.supervisor = Supervisor(context, self)

    async def connect(self, wanted: Wanted, result) -> Pipe:
        if self.connect_error:
            raise self.connect_error
        target = Target(str(wanted.revision), self)
        self.targets.append(target)

        async def open_stream() -> Source:
            return Source(self.stream, wanted.mapping.function.role)

        traits = StreamTraits(100, 1.0, True)
        return Pipe(wanted.mapping, result, target, self.gate, NullObserver(), traits, open_stream, None)

    async def disconnect(self, pipe: Pipe) -> None:
        assert not pipe.target.is_closed
        pipe.target.is_closed = True

    def forgotten(self, mapping: str) -> None:
        pass

    def start(self, mapping: Mapping = MAPPING) -> None:
        self.supervisor.want(Wanted(mapping, 1))
        self.tasks = [asyncio.ensure_future(self.checkpointer.run()), asyncio.ensure_future(self.supervisor.run())]

    async def stop(self) -> None:
        self.supervisor.stop(5.0)
        await self.tasks[1]
        self.tasks[0].cancel()
        await asyncio.wait([self.tasks[0]])
        assert all(target.is_closed for target in self.targets)
        assert all(source.is_closed for source in self.stream.sources)

    def status(self):
        (status,) = self.supervisor.status()
        return status

    async def positions(self) -> dict[str, Position]:
        return {name: row.checkpoint.position for name, row in (await self.store.load("m")).items()}

    async def order(self, *orders: dict) -> None:
        for number, order in enumerate(orders):
            await self.store.put_document(seek_key("m", number), {"value": "", "shard": "", "by": "alice", **order})
        self.supervisor.seek("m")


def run(main):
    loop = VirtualLoop()
    try:
        with structlog.testing.capture_logs() as logs:
            loop.run_until_complete(main())
        assert not asyncio.all_tasks(loop)
        assert not [entry for entry in logs if entry["event"] in {"mapping_crashed", "shard_crashed", "lease_lost"}]
        return logs
    finally:
        for task in (left := asyncio.all_tasks(loop)):
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


def with_batch(**changes) -> Mapping:
    return replace(MAPPING, batch=replace(MAPPING.batch, **changes))


# --- what a worker takes over as it is


def test_limits_change_under_a_failing_batch() -> None:
    """It keeps its records and its attempts; the next batch has the new size, and nothing is read again."""

    async def main():
        daemon = Daemon(Stream(a=6))
        daemon.rule = lambda name, shard, numbers: ReplyStatus.FUNCTION_ERROR if name == "1" else None
        daemon.start()
        await asyncio.sleep(4)
        tries = len(daemon.calls)
        assert tries > 2
        daemon.supervisor.want(Wanted(with_batch(size=3), 2))
        assert daemon.status().state == "Updating"
        await asyncio.sleep(30)
        assert daemon.status().state == "Enabled"
        assert [call[:4] for call in daemon.calls[tries:]] == [
            ("2", "a", [1, 2], tries + 1),
            ("2", "a", [3, 4, 5], 1),
            ("2", "a", [6], 1),
        ]
        assert len(daemon.stream.sources) == 1
        await daemon.stop()

    run(main)


def test_a_lowered_retry_limit_gives_up_what_fails_already() -> None:
    """An operator's way out of a blocked shard, without a restart."""

    async def main():
        daemon = Daemon(Stream(a=3))
        daemon.rule = lambda name, shard, numbers: ReplyStatus.FUNCTION_ERROR if 1 in numbers else None
        daemon.start()
        await asyncio.sleep(20)
        assert daemon.done == []
        daemon.supervisor.want(Wanted(replace(MAPPING, retry=RetryPolicy(attempts=0)), 1))
        await asyncio.sleep(1)
        assert daemon.done == [("a", 3)]
        await daemon.stop()

    assert "records_discarded" in {entry["event"] for entry in run(main)}


def test_what_is_in_flight_ends_over_the_old_target() -> None:
    """It is closed then, not before; other shards use the new one at once."""

    async def main():
        daemon = Daemon(Stream(a=2, b=2))
        hangs = asyncio.Event()
        daemon.rule = lambda name, shard, numbers: hangs if (name, shard) == ("1", "a") else None
        daemon.start()
        await asyncio.sleep(1)
        daemon.supervisor.want(Wanted(MAPPING, 2))
        daemon.stream.add("a", 1)
        daemon.stream.add("b", 1)
        await asyncio.sleep(5)
        assert [call[:3] for call in daemon.calls[2:]] == [("2", "b", [3])]
        assert not daemon.targets[0].is_closed
        hangs.set()
        await asyncio.sleep(1)
        assert daemon.targets[0].is_closed
        assert daemon.calls[-1][:3] == ("2", "a", [3])
        assert sorted(daemon.done) == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]
        await daemon.stop()

    run(main)


def test_a_change_that_cannot_be_connected_leaves_the_old_one_at_work() -> None:
    """It says what is wrong, tries again, and takes over when it can."""

    async def main():
        daemon = Daemon(Stream(a=2))
        daemon.start()
        await asyncio.sleep(1)
        daemon.connect_error = ConfigError(["functions.f.tls.ca: no such file"])
        daemon.supervisor.want(Wanted(with_batch(size=1), 2))
        daemon.stream.add("a", 2)
        await asyncio.sleep(5)
        assert daemon.calls[-1][:3] == ("1", "a", [3, 4])
        assert (daemon.status().state, daemon.status().reason) == ("Updating", "functions.f.tls.ca: no such file")
        daemon.connect_error = None
        await asyncio.sleep(60)
        daemon.stream.add("a", 2)
        await asyncio.sleep(5)
        assert [call[:3] for call in daemon.calls[-2:]] == [("2", "a", [5]), ("2", "a", [6])]
        assert (daemon.status().state, daemon.status().reason) == ("Enabled", "")
        await daemon.stop()

    run(main)


# --- what takes new workers


def test_other_lanes_come_shard_by_shard() -> None:
    """A shard with an invocation that hangs changes over later; the others do not wait for it. Nothing comes twice."""

    async def main():
        daemon = Daemon(Stream(a=4, b=4))
        hangs = asyncio.Event()
        daemon.rule = lambda name, shard, numbers: hangs if (name, shard) == ("1", "a") else None
        daemon.start()
        await asyncio.sleep(1)
        daemon.supervisor.want(Wanted(with_batch(factor=4, size=1), 2))
        daemon.stream.add("a", 4)
        daemon.stream.add("b", 4)
        await asyncio.sleep(5)
        assert sorted(daemon.done) == [("b", n) for n in range(1, 9)]
        assert not daemon.targets[0].is_closed
        assert not daemon.stream.sources[0].is_closed, "the hanging shard still has it"
        hangs.set()
        await asyncio.sleep(5)
        assert sorted(daemon.done) == sorted((shard, n) for shard in "ab" for n in range(1, 9))
        assert daemon.stream.sources[0].is_closed
        await daemon.stop()

    run(main)


def test_another_function_shows_its_own_role() -> None:
    """Records of Kinesis carry it; those that were read before the change are read again."""

    async def main():
        daemon = Daemon(Stream(a=4))
        daemon.rule = lambda name, shard, numbers: ReplyStatus.FUNCTION_ERROR if name == "1" else None
        daemon.start()
        await asyncio.sleep(1)
        daemon.supervisor.want(Wanted(replace(MAPPING, function=FunctionSpec("g", "arn:g", "role-g")), 2))
        await asyncio.sleep(5)
        assert {call[4] for call in daemon.calls if call[0] == "2"} == {"role-g"}
        assert sorted(daemon.done) == [("a", n) for n in range(1, 5)]
        await daemon.stop()

    run(main)


def test_a_second_change_while_workers_leave() -> None:
    """A worker that was told to stop is not touched by what comes after."""

    async def main():
        daemon = Daemon(Stream(a=4, b=4))
        hangs = asyncio.Event()
        daemon.rule = lambda name, shard, numbers: hangs if (name, shard) == ("1", "a") else None
        daemon.start()
        await asyncio.sleep(1)
        daemon.supervisor.want(Wanted(with_batch(factor=3), 2))
        await asyncio.sleep(1)
        daemon.supervisor.want(Wanted(with_batch(factor=3, size=5), 3))
        await asyncio.sleep(1)
        daemon.supervisor.want(Wanted(MAPPING, 4))
        await asyncio.sleep(1)
        hangs.set()
        await asyncio.sleep(5)
        assert sorted(daemon.done) == sorted((shard, n) for shard in "ab" for n in range(1, 5))
        assert len(daemon.done) == 8
        await daemon.stop()

    run(main)


# --- seek


def test_seek_moves_every_shard() -> None:
    """To the oldest record: everything comes again; each move is logged with who ordered it."""

    async def main():
        daemon = Daemon(Stream(a=2, b=1))
        daemon.start()
        await asyncio.sleep(2)
        assert len(daemon.done) == 3
        await daemon.order({"kind": "TRIM_HORIZON"})
        assert daemon.status().seek_pending
        await asyncio.sleep(5)
        assert not daemon.status().seek_pending
        assert sorted(daemon.done) == [("a", 1), ("a", 1), ("a", 2), ("a", 2), ("b", 1), ("b", 1)]
        assert not await daemon.store.documents("seek/")
        await daemon.stop()

    moves = [entry for entry in run(main) if entry["event"] == "position_moved"]
    assert [(move["shard"], move["by"], move["was"], move["now"]) for move in moves] == [
        ("a", "alice", "AFTER_SEQUENCE_NUMBER 2", "TRIM_HORIZON"),
        ("b", "alice", "AFTER_SEQUENCE_NUMBER 1", "TRIM_HORIZON"),
    ]


def test_seek_moves_one_shard_and_in_flight_work_ends_first() -> None:
    """The batch that is out is settled before; then its shard begins at the record that was named."""

    async def main():
        daemon = Daemon(Stream(a=5, b=5))
        hangs = asyncio.Event()
        daemon.rule = lambda name, shard, numbers: hangs if shard == "a" and 5 in numbers else None
        daemon.start()
        await asyncio.sleep(2)
        await daemon.order({"kind": "AT_SEQUENCE_NUMBER", "value": "4", "shard": "a"})
        await asyncio.sleep(5)
        assert daemon.status().seek_pending
        assert ("a", 5) not in daemon.done
        hangs.set()
        await asyncio.sleep(5)
        assert daemon.done.count(("a", 5)) == daemon.done.count(("a", 4)) == 2
        assert daemon.done.count(("a", 3)) == 1
        assert all(daemon.done.count(("b", n)) == 1 for n in range(1, 6))
        await daemon.stop()

    run(main)


def test_seek_forward_and_to_a_moment() -> None:
    """What lies between is passed over."""

    async def main():
        daemon = Daemon(Stream(a=9))
        daemon.rule = lambda name, shard, numbers: ReplyStatus.FUNCTION_ERROR if 1 in numbers else None
        daemon.start()
        await asyncio.sleep(2)
        await daemon.order({"kind": "AT_TIMESTAMP", "value": repr(EPOCH + 6.5)})
        await asyncio.sleep(5)
        assert daemon.done == [("a", 7), ("a", 8), ("a", 9)]
        await daemon.stop()

    run(main)


def test_an_order_waits_for_a_paused_mapping() -> None:
    """It is carried out when the mapping is resumed, by another process too."""

    async def main():
        daemon = Daemon(Stream(a=2))
        daemon.start()
        await asyncio.sleep(2)
        daemon.supervisor.want(Wanted(replace(MAPPING, enabled=False), 1))
        await asyncio.sleep(1)
        await daemon.order({"kind": "TRIM_HORIZON"})
        await asyncio.sleep(1)
        assert (daemon.status().state, daemon.status().seek_pending) == ("Disabled", True)
        await daemon.stop()
        other = Daemon(Stream(a=2), daemon.store)
        other.start()
        await asyncio.sleep(2)
        assert other.done == [("a", 1), ("a", 2)]
        await other.stop()

    run(main)


def test_orders_follow_each_other() -> None:
    """All shards, then one of them: the second does not undo the first."""

    async def main():
        daemon = Daemon(Stream(a=3, b=3))
        daemon.start()
        await asyncio.sleep(2)
        daemon.done.clear()
        await daemon.order(
            {"kind": "TRIM_HORIZON"}, {"kind": "AT_SEQUENCE_NUMBER", "value": "3", "shard": "b"},
            {"kind": "AT_SEQUENCE_NUMBER", "value": "3", "shard": "gone"},
        )  # fmt: skip
        await asyncio.sleep(5)
        assert sorted(daemon.done) == [("a", 1), ("a", 2), ("a", 3), ("b", 3)]
        await daemon.stop()

    [dropped] = [entry for entry in run(main) if entry["event"] == "seek_dropped"]
    assert dropped["shard"] == "gone"


class Once(MemoryStore):
    """Fails at one call, before or after it took effect."""

    def __init__(self, call: str, *, after: bool) -> None:
        super().__init__()
        self.call, self.after, self.is_armed = call, after, False

    async def _maybe(self, call: str, work):
        fails = self.is_armed and call == self.call
        if fails:
            self.is_armed = False
            if self.after:
                await work
            else:
                work.close()
            raise StoreUnavailable("away")
        return await work

    async def forget(self, mapping, shards=None):
        return await self._maybe("forget", super().forget(mapping, shards))

    async def create(self, mapping, rows):
        return await self._maybe("create", super().create(mapping, rows))

    async def delete_document(self, key):
        return await self._maybe("delete_document", super().delete_document(key))


def test_an_order_survives_a_failure_at_each_step() -> None:
    """Positions forgotten and not yet made anew must not become those of StartingPosition: that may be LATEST."""
    for call in ("forget", "create", "delete_document"):
        for after in (False, True):

            async def main(call: str = call, after: bool = after):
                store = Once(call, after=after)
                daemon = Daemon(Stream(a=4), store)
                daemon.start(replace(MAPPING, start=Position(PositionKind.AT_TIMESTAMP, repr(EPOCH + 4))))
                await asyncio.sleep(2)
                assert daemon.done == [("a", 4)]
                store.is_armed = True
                await daemon.order({"kind": "AT_TIMESTAMP", "value": repr(EPOCH + 2)})
                await asyncio.sleep(60)
                assert not store.is_armed
                assert daemon.done == [("a", 4), ("a", 2), ("a", 3), ("a", 4)], (call, after)
                await daemon.stop()

            run(main)


def test_children_wait_for_a_parent_that_is_read_again() -> None:
    """Else a key's old records would be delivered beside its new ones."""

    async def main():
        stream = Stream(p=2, c=2)
        stream.parents["c"], stream.closed = ("p",), {"p"}
        daemon = Daemon(stream)
        daemon.start()
        await asyncio.sleep(5)
        assert daemon.done == [("p", 1), ("p", 2), ("c", 1), ("c", 2)]
        daemon.rule = lambda name, shard, numbers: ReplyStatus.FUNCTION_ERROR if shard == "p" else None
        stream.add("c", 1)
        await daemon.order({"kind": "AT_SEQUENCE_NUMBER", "value": "2", "shard": "p"})
        await asyncio.sleep(60)
        assert ("c", 3) not in daemon.done
        daemon.rule = lambda name, shard, numbers: None
        await asyncio.sleep(90)
        assert daemon.done[4:] == [("p", 2), ("c", 3)]
        await daemon.stop()

    run(main)


def test_latest_of_a_moment_reads_shards_that_were_closed_since() -> None:
    """DynamoDB: the order was given before the mapping ran; what came in between is read, whatever rolled."""

    async def main():
        stream = Stream(p=3, c=1)
        stream.parents["c"], stream.closed = ("p",), {"p"}
        store = MemoryStore()
        await store.create("m", [Row("p", Checkpoint(Position(PositionKind.AFTER, "3")))])
        daemon = Daemon(stream, store)
        await store.put_document(
            seek_key("m", 1.0), {"kind": "LATEST", "value": repr(EPOCH + 2), "shard": "", "by": "bob"}
        )
        daemon.start()
        await asyncio.sleep(5)
        assert daemon.done == [("p", 2), ("p", 3)], "of the child nothing came since"
        await daemon.stop()

    run(main)


# --- found by an attack on these changes


def test_a_resumed_mapping_does_not_wait_for_what_the_paused_one_has_in_flight() -> None:
    """Only the shard of the invocation that hangs does."""

    async def main():
        daemon = Daemon(Stream(a=2, b=2))
        hangs = asyncio.Event()
        daemon.rule = lambda name, shard, numbers: hangs if shard == "a" else None
        daemon.start()
        await asyncio.sleep(2)
        daemon.supervisor.want(Wanted(replace(MAPPING, enabled=False), 1))
        await asyncio.sleep(1)
        assert daemon.status().state == "Disabling"
        assert daemon.status().in_flight == 1
        daemon.supervisor.want(Wanted(MAPPING, 1))
        daemon.stream.add("b", 2)
        await asyncio.sleep(5)
        assert daemon.done == [("b", 1), ("b", 2), ("b", 3), ("b", 4)]
        assert {shard.id for shard in daemon.status().shards} == {"a", "b"}
        hangs.set()
        await asyncio.sleep(5)
        assert sorted(daemon.done) == [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("b", 4)]
        await daemon.stop()

    run(main)


def test_seek_of_one_shard_does_not_wait_for_anothers_invocation() -> None:
    """Nor does any shard stop for it but the one that is moved."""

    async def main():
        daemon = Daemon(Stream(a=2, b=2))
        hangs = asyncio.Event()
        daemon.rule = lambda name, shard, numbers: hangs if shard == "a" else None
        daemon.start()
        await asyncio.sleep(2)
        await daemon.order({"kind": "AT_SEQUENCE_NUMBER", "value": "1", "shard": "b"})
        await asyncio.sleep(5)
        assert daemon.done == [("b", 1), ("b", 2), ("b", 1), ("b", 2)]
        assert daemon.status().in_flight == 1
        hangs.set()
        await daemon.stop()

    run(main)


def test_no_descendant_goes_on_beside_a_shard_that_is_read_again() -> None:
    """Grandchildren neither, though their own parent is done."""

    async def main():
        stream = Stream(p=2, c=2, g=2)
        stream.parents, stream.closed = {"c": ("p",), "g": ("c",)}, {"p", "c"}
        daemon = Daemon(stream)
        daemon.start()
        await asyncio.sleep(5)
        daemon.rule = lambda name, shard, numbers: ReplyStatus.FUNCTION_ERROR if shard == "p" else None
        await daemon.order({"kind": "AT_SEQUENCE_NUMBER", "value": "1", "shard": "p"})
        stream.add("g", 1)
        await asyncio.sleep(60)
        assert ("g", 3) not in daemon.done
        daemon.rule = lambda name, shard, numbers: None
        await asyncio.sleep(90)
        assert daemon.done[6:] == [("p", 1), ("p", 2), ("g", 3)]
        await daemon.stop()

    run(main)


def test_a_seek_that_nobody_watched_is_not_pending_after_a_pause() -> None:
    """What is pending is noted when it happens, not when somebody asks."""

    async def main():
        daemon = Daemon(Stream(a=2))
        daemon.start()
        await asyncio.sleep(2)
        await daemon.order({"kind": "TRIM_HORIZON"})
        await asyncio.sleep(10)
        daemon.supervisor.want(Wanted(replace(MAPPING, enabled=False), 1))
        await asyncio.sleep(5)
        assert not daemon.status().seek_pending
        await daemon.stop()

    run(main)


def test_an_order_waits_while_the_listing_is_empty() -> None:
    """Carried out on nothing it would become StartingPosition."""

    async def main():
        stream = Stream(a=3)
        daemon = Daemon(stream)
        daemon.start(replace(MAPPING, start=Position(PositionKind.AT_TIMESTAMP, repr(EPOCH + 3))))
        await asyncio.sleep(2)
        shards, stream.shards = stream.shards, {}
        await daemon.order({"kind": "TRIM_HORIZON"})
        await asyncio.sleep(5)
        stream.shards = shards
        await asyncio.sleep(60)
        assert daemon.done == [("a", 3), ("a", 1), ("a", 2), ("a", 3)]
        await daemon.stop()

    run(main)


class Away(MemoryStore):
    """Reachable or not."""

    is_away = False

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable("away")

    async def save(self, changes):
        self._check()
        return await super().save(changes)

    async def release(self, lease, checkpoint, to=None):
        self._check()
        return await super().release(lease, checkpoint, to)

    async def load(self, mapping):
        self._check()
        return await super().load(mapping)

    async def create(self, mapping, rows):
        self._check()
        await super().create(mapping, rows)

    async def forget(self, mapping, shards=None):
        self._check()
        await super().forget(mapping, shards)


def test_new_lanes_while_the_store_is_away_repeat_nothing() -> None:
    """The position of a worker that leaves is written when the store is back, however long that takes."""

    async def main():
        store = Away()
        daemon = Daemon(Stream(a=2), store)
        daemon.start()
        await asyncio.sleep(2)
        store.is_away = True
        daemon.stream.add("a", 40)
        await asyncio.sleep(5)
        daemon.supervisor.want(Wanted(with_batch(factor=3), 2))
        await asyncio.sleep(120)
        store.is_away = False
        daemon.stream.add("a", 1)
        await asyncio.sleep(90)
        assert len(daemon.done) == 43
        await daemon.stop()

    run(main)


class SlowSave(MemoryStore):
    """The next save hangs until the event is set, then fails."""

    hangs: asyncio.Event | None = None

    async def save(self, changes):
        if self.hangs is not None:
            hangs, self.hangs = self.hangs, None
            await hangs.wait()
            raise StoreUnavailable("no answer")
        return await super().save(changes)


def test_a_late_save_does_not_undo_a_seek() -> None:
    """A worker that was dropped while a save was under way is not saved again when that save fails."""

    async def main():
        store = SlowSave()
        daemon = Daemon(Stream(a=4), store)
        daemon.start()
        await asyncio.sleep(2)
        hangs = store.hangs = asyncio.Event()
        daemon.stream.add("a", 2)
        await asyncio.sleep(3)
        daemon.rule = lambda name, shard, numbers: ReplyStatus.FUNCTION_ERROR
        await daemon.order({"kind": "TRIM_HORIZON"})
        await asyncio.sleep(0.05)
        hangs.set()
        await asyncio.sleep(60)
        assert (await daemon.positions())["a"].kind is not PositionKind.AFTER
        await daemon.stop()

    run(main)


def test_a_source_that_was_opened_for_the_old_function_is_not_kept() -> None:
    """Asking for a function's role takes a while; the mapping may be repointed meanwhile."""

    class Slow(Daemon):
        async def connect(self, wanted: Wanted, result) -> Pipe:
            pipe = await super().connect(wanted, result)

            async def open_stream() -> Source:
                await asyncio.sleep(5 if wanted.revision == 1 else 0)
                return await pipe.open_stream()

            return replace(pipe, open_stream=open_stream)

    async def main():
        daemon = Slow(Stream(a=4))
        daemon.start()
        await asyncio.sleep(1)
        daemon.supervisor.want(Wanted(replace(MAPPING, function=FunctionSpec("g", "arn:g", "role-g")), 2))
        await asyncio.sleep(60)
        assert {call[4] for call in daemon.calls} == {"role-g"}
        await daemon.stop()

    run(main)


def test_a_mapping_that_is_wanted_again_while_it_is_forgotten() -> None:
    """It comes back once its positions are gone; it once stayed away until a restart."""

    async def main():
        store = Away()
        daemon = Daemon(Stream(a=2), store)
        daemon.start()
        await asyncio.sleep(2)
        daemon.supervisor.remove("m", forget=True)
        store.is_away = True
        await asyncio.sleep(10)
        daemon.supervisor.want(Wanted(MAPPING, 1))
        await asyncio.sleep(1)
        store.is_away = False
        await asyncio.sleep(60)
        assert daemon.status().state == "Enabled"
        await daemon.stop()

    run(main)


def test_a_replaced_stream_is_read_from_its_start_after_a_crash_too() -> None:
    """Its name is stored once its rows are: stored before, the next start would begin at StartingPosition."""

    async def main():
        store = Away()
        await store.put_document("stream/m", {"arn": "arn:1", "incarnation": "0"})
        await store.create("m", [Row("a", Checkpoint(Position(PositionKind.AFTER, "99")))])
        late = replace(MAPPING, start=Position(PositionKind.AT_TIMESTAMP, repr(EPOCH + 4)))

        class Dies(Away):
            async def create(self, mapping, rows):
                raise StoreUnavailable("away")

        dying = Dies()
        dying._rows, dying._documents = store._rows, store._documents
        first = Daemon(Stream(a=4), dying)
        first.start(late)
        await asyncio.sleep(3)
        await first.stop()
        store._rows, store._documents = dying._rows, dying._documents
        second = Daemon(Stream(a=4), store)
        second.start(late)
        await asyncio.sleep(5)
        assert [n for _, n in second.done] == [1, 2, 3, 4]
        await second.stop()

    run(main)


def test_shards_that_are_known_go_on_although_they_cannot_be_listed(monkeypatch) -> None:
    """A change of lanes under a right that was taken away once stopped them all."""

    async def main():
        daemon = Daemon(Stream(a=2, b=2))
        daemon.start()
        await asyncio.sleep(2)

        async def refuse(self) -> Listing:
            raise AccessDenied("ListShards")

        with monkeypatch.context() as patched:
            patched.setattr(Source, "shards", refuse)
            daemon.supervisor.want(Wanted(with_batch(factor=3), 1))
            await asyncio.sleep(5)
            daemon.stream.add("a", 2)
            await asyncio.sleep(60)
            assert ("a", 4) in daemon.done
            assert "ListShards" in daemon.status().reason
        await daemon.stop()

    run(main)


def test_a_window_that_was_switched_off_is_said() -> None:
    """What the function had counted is dropped, and that is no secret."""

    async def main():
        store = MemoryStore()
        await store.create("m", [Row("a", Checkpoint(TRIM_HORIZON, (), f"{EPOCH}\n{{}}"))])
        daemon = Daemon(Stream(a=1), store)
        daemon.start()
        await asyncio.sleep(2)
        await daemon.stop()

    [dropped] = [entry for entry in run(main) if entry["event"] == "window_dropped"]
    assert (dropped["shard"], float(dropped["window"])) == ("a", EPOCH)
