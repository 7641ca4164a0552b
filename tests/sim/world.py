"""A seeded world around the real runtime: a stream that reshards, a target, a store, faults, crashes and stops.

Invariants are checked where they can break, each with the time and the ids, so that a failing seed explains itself.
"""

import asyncio
import json
import random
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf
from typing import Any

from poller.core.flow import lane_of
from poller.core.model import (
    BatchPolicy,
    Checkpoint,
    Fetch,
    FunctionSpec,
    Invocation,
    Lease,
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
from poller.errors import (
    DestinationFailed,
    IteratorExpired,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
    StoreUnavailable,
)
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context, LastResult, Pipe
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.supervisor import Supervisor, Wanted
from poller.stores.memory import MemoryStore
from tests.fakes.leases import alone
from tests.fakes.observer import NullObserver
from tests.sim.loop import VirtualClock, VirtualLoop

FIRST_SEQUENCE = 10**24
CHECKPOINT_INTERVAL = 0.1
SLACK = 0.35  # a save that was under way, plus its latency


class Violation(BaseException):
    """An invariant does not hold. No Exception: the failure domains of the runtime must not catch it."""


@dataclass
class Plan:
    """What a seed does."""

    factor: int
    size: int
    window: float
    attempts: int
    max_age: float
    report_failures: bool
    keys: int
    records: int
    shards: int
    fault_rate: float
    store_faults: float
    poison_rate: float
    kills: int
    duration: float
    start: PositionKind
    max_concurrency: int | None
    is_dynamodb: bool = False  # no timestamps, no lag
    skew: float = 0.0  # of AWS's clock against ours
    tumbling: float = 0.0
    has_destination: bool = False
    is_filtered: bool = False
    retunes: int = 0  # changes of the mapping while it runs

    @classmethod
    def of(cls, rng: random.Random) -> "Plan":
        plan = cls(
            factor=rng.choice([1, 1, 2, 3, 5]),
            size=rng.choice([1, 3, 10, 100]),
            window=rng.choice([0.0, 0.0, 0.5, 3.0]),
            attempts=rng.choice([-1, -1, 0, 2]),
            max_age=rng.choice([-1, -1, -1, 60]),
            report_failures=rng.random() < 0.4,
            keys=rng.choice([1, 4, 12]),
            records=rng.choice([30, 120, 250]),
            shards=rng.choice([1, 2, 3]),
            fault_rate=rng.choice([0.0, 0.05, 0.2]),
            store_faults=rng.choice([0.0, 0.0, 0.1]),
            poison_rate=rng.choice([0.0, 0.02, 0.1]),
            kills=rng.choice([0, 1, 3, 6]),
            duration=rng.choice([10.0, 40.0]),
            start=rng.choice([PositionKind.TRIM_HORIZON, PositionKind.TRIM_HORIZON, PositionKind.LATEST]),
            max_concurrency=rng.choice([None, None, 1, 2]),
            is_dynamodb=rng.random() < 0.4,
            skew=rng.choice([0.0, 0.0, -1.5, 1.5]),
        )
        if rng.random() < 0.2:
            # Nothing is given up, so that a final state must count every record of its window.
            plan = replace(plan, tumbling=rng.choice([2.0, 7.0]), factor=1, attempts=-1, max_age=-1)
        is_filtered = rng.random() < 0.3 and not plan.tumbling  # AWS allows but one of them
        has_destination = rng.random() < 0.6
        retunes = rng.choice([0, 0, 1, 4])
        return replace(plan, has_destination=has_destination, is_filtered=is_filtered, retunes=retunes)


@dataclass
class SimShard:
    id: str
    parents: tuple[str, ...]
    low: int
    high: int
    records: list[Record] = field(default_factory=list)
    is_closed: bool = False


class World:
    """Everything outside of the poller, and the ledger."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        self.rng = random.Random(seed)
        self.plan = Plan.of(self.rng)
        self.clock = VirtualClock(loop)
        self.store = MemoryStore()
        self.mapping = mapping_of(self.plan)
        self.node: Node | None = None  # that lives now
        self.retuned = 0
        self.most = self.plan.size  # records of one batch, of any version of the mapping
        self.shards: dict[str, SimShard] = {}
        self.shard_of: dict[str, str] = {}
        self.key_of: dict[str, str] = {}
        self.record_of: dict[str, Record] = {}
        self.open_of: dict[str, list[int]] = {}  # per key: sequences as produced, without what is settled
        self.settled: dict[str, float] = {}  # first settlement, by success or discard
        self.seen: dict[str, float] = {}  # last settlement
        self.reported: set[str] = set()  # what the failure destination knows of
        self.calling: dict[str, str] = {}  # key -> request id
        self.frozen: set[str] = set()  # settled and safe: may never be delivered again
        self.invocations = 0
        self.redelivered = 0
        self.is_healed = False
        self.poison: dict[str, int] = {}
        # From when on the records of a shard must be delivered: 0 unless LATEST passes some over. Unknown: not decided.
        self.ours_from: dict[str, float] = {}
        self.is_created = False
        self.latest_asked: set[str] = set()
        self.finals: set[tuple[str, str]] = set()
        self.expired: set[str] = set()
        self._next = FIRST_SEQUENCE
        for n in range(self.plan.shards):
            width = 1000 // self.plan.shards
            self._add_shard((), n * width, 1000 if n == self.plan.shards - 1 else (n + 1) * width)

    # --- the stream

    def aws_now(self) -> float:
        """What AWS's clock says."""
        return self.clock.now() + self.plan.skew

    def _add_shard(self, parents: tuple[str, ...], low: int, high: int) -> None:
        shard = SimShard(f"shardId-{len(self.shards):012d}", parents, low, high)
        self.shards[shard.id] = shard

    def produce(self) -> None:
        key = f"key-{self.rng.randrange(self.plan.keys)}"
        place = lane_of("where-" + key, 1000)
        shard = next(s for s in self.shards.values() if not s.is_closed and s.low <= place < s.high)
        self._next += self.rng.randrange(1, 5)
        sequence = self._next
        wire = json.dumps({"id": str(sequence), "key": key, "pad": "x" * self.rng.randrange(0, 200)}).encode()
        record = self.record_of[str(sequence)] = Record(str(sequence), key, self.aws_now(), wire)
        shard.records.append(record)
        self.shard_of[str(sequence)] = shard.id
        self.key_of[str(sequence)] = key
        self.open_of.setdefault(key, []).append(sequence)
        if self.rng.random() < self.plan.poison_rate:
            self.poison[str(sequence)] = self.rng.choice([1, 3, 1000])

    def split(self) -> None:
        candidates = [s for s in self.shards.values() if not s.is_closed and s.high - s.low >= 2]
        if not candidates or len(self.shards) > 12:
            return
        shard = self.rng.choice(candidates)
        shard.is_closed = True
        middle = (shard.low + shard.high) // 2
        self._add_shard((shard.id,), shard.low, middle)
        self._add_shard((shard.id,), middle, shard.high)

    def merge(self) -> None:
        open_shards = sorted((s for s in self.shards.values() if not s.is_closed), key=lambda s: s.low)
        if len(open_shards) < 2 or len(self.shards) > 12:
            return
        at = self.rng.randrange(len(open_shards) - 1)
        left, right = open_shards[at : at + 2]
        left.is_closed = right.is_closed = True
        self._add_shard((left.id, right.id), left.low, right.high)

    async def expire(self) -> None:
        """Shards that were closed and done leave the listing, as they do a day later."""
        for name, row in (await self.store.load("m-1")).items():
            if row.checkpoint.position.kind is PositionKind.END and self.shards[name].is_closed:
                self.expired.add(name)

    def retune(self) -> None:
        """The mapping is changed: in what a worker takes over as it is, or in what takes new workers."""
        rng, batch, retry = self.rng, self.mapping.batch, self.mapping.retry
        batch = replace(batch, size=rng.choice([1, 3, 10, 100]), window=rng.choice([0.0, 0.5, 3.0]))
        function = self.mapping.function
        if not self.plan.tumbling:
            batch = replace(batch, factor=rng.choice([batch.factor, batch.factor, 1, 2, 4]))
            retry = replace(retry, attempts=rng.choice([retry.attempts, -1, 2]))
        if rng.random() < 0.3:
            function = replace(function, name=rng.choice("fg"))
        self.most = max(self.most, batch.size)
        self.mapping = replace(self.mapping, batch=batch, retry=retry, function=function)

    # --- the ledger

    def begin_call(self, call: Invocation, records: list[dict[str, str]]) -> None:
        self.invocations += 1
        for record in records:
            key, name = record["key"], record["id"]
            if not self.is_wanted(name):
                raise Violation(f"{name} is delivered, but no filter matches it")
            if name in self.frozen:
                raise Violation(f"{name} was settled and saved, and is delivered again at {self.clock.now()}")
            if name in self.settled:
                self.redelivered += 1
            if self.calling.setdefault(key, call.request_id) != call.request_id:
                raise Violation(f"two invocations hold {key} at {self.clock.now()}")
            shard = self.shards[self.shard_of[name]]
            for parent in shard.parents:
                open_ones = [r.id for r in self.shards[parent].records if r.id not in self.settled and self.is_ours(r)]
                if open_ones:
                    raise Violation(f"{name} of {shard.id} before {open_ones} of its parent {parent}")

    def end_call(self, call: Invocation) -> None:
        for key in [key for key, holder in self.calling.items() if holder == call.request_id]:
            del self.calling[key]

    def settle(self, name: str) -> None:
        self.seen[name] = self.clock.now()
        if name in self.settled:
            return
        key, sequence = self.key_of[name], int(name)
        still_open = self.open_of[key]
        earlier = [s for s in still_open if s < sequence and self.is_ours(self.record_of[str(s)])]
        if earlier:
            raise Violation(f"{name} of {key} settled before {earlier}")
        still_open.remove(sequence)
        self.settled[name] = self.clock.now()

    def discard(self, name: str) -> None:
        """A record is given up: the destination must know before."""
        if self.plan.has_destination and name not in self.reported:
            raise Violation(f"{name} is given up, and its destination never heard of it")
        self.settle(name)

    def is_wanted(self, name: str) -> bool:
        """Does a filter match it?"""
        return not self.plan.is_filtered or int(name) % 3 > 0

    def is_ours(self, record: Record) -> bool:
        """LATEST: what arrived before the mapping knew the stream need not be delivered; nor what no filter matches."""
        return self.is_wanted(record.id) and record.arrival >= self.ours_from.get(self.shard_of[record.id], 0.0)

    def check_checkpoint(self, shard: str, checkpoint: Checkpoint) -> None:
        """Nothing below a saved position, or a lane's floor, is unsettled."""
        position = checkpoint.position
        for record in self.shards[shard].records:
            if record.id in self.settled:
                continue
            sequence = int(record.id)
            match position.kind:
                case PositionKind.AT:
                    below = sequence < int(position.value)
                case PositionKind.AFTER:
                    below = sequence <= int(position.value)
                case PositionKind.END:
                    below = True
                case _:
                    below = False
            below = below or any(sequence < floor[lane_of(record.key, len(floor))] for floor in checkpoint.resume)
            if below and self.is_ours(record):
                raise Violation(f"{shard}: {checkpoint} passes {record.id}, which is not settled")

    def window_of(self, name: str) -> str:
        record = self.record_of[name]
        start = record.arrival // self.plan.tumbling * self.plan.tumbling
        return datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def check_final(self, shard: str, start: str, counted: int) -> None:
        """A final invocation has counted each record of its window exactly once, whatever crashed in between."""
        # Settled ones too: LATEST whose first call failed delivers more than must be.
        known = [r for r in self.shards[shard].records if self.is_ours(r) or r.id in self.settled]
        records = [r for r in known if self.window_of(r.id) == start]
        if counted != len(records):
            raise Violation(f"window {start} of {shard} counted {counted} of {[r.id for r in records]}")
        self.finals.add((shard, start))

    def unfinished_windows(self) -> list[tuple[str, str]]:
        if not self.plan.tumbling:
            return []
        windows = {(s.id, self.window_of(r.id)) for s in self.shards.values() for r in s.records if self.is_ours(r)}
        return sorted(windows - self.finals)

    def pending(self) -> list[str]:
        return [r.id for s in self.shards.values() for r in s.records if self.is_ours(r) and r.id not in self.settled]

    async def unsaved(self) -> list[str]:
        """Shards whose stored position is not yet behind their last record."""
        rows = await self.store.load("m-1")
        return [
            shard.id
            for shard in self.shards.values()
            if any(self.is_ours(record) for record in shard.records)
            and shard.id in rows  # tombstones go in time
            and (position := rows[shard.id].checkpoint.position).kind is not PositionKind.END
            and position != Position(PositionKind.AFTER, shard.records[-1].id)  # filtered ones count
        ]


class Node:
    """One life of a daemon. After `kill` nothing that it does reaches the world."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.is_dead = False
        self.supervisor: Supervisor | None = None
        self.task: asyncio.Task[None] | None = None

    async def live(self) -> None:
        """A dead node hangs at its next contact with the world, until it is cancelled."""
        if self.is_dead:
            await asyncio.Event().wait()

    def fails(self, rate: float) -> bool:
        return not self.world.is_healed and self.world.rng.random() < rate

    def start(self, tasks: asyncio.TaskGroup) -> None:
        world = self.world
        store = NodeStore(self)
        trouble = Backoff(0.5, 5.0, world.rng.random)
        checkpointer = Checkpointer(store, world.clock, CHECKPOINT_INTERVAL, trouble)
        context = Context(
            clock=world.clock,
            random=world.rng,
            store=store,
            checkpointer=checkpointer,
            budget=ByteBudget(world.rng.choice([10_000, 10_000_000])),
            backoff=Backoff(0.2, 5.0, world.rng.random),
            trouble=trouble,
            leases=alone(store, world.clock, self.name),
        )
        self.supervisor = Supervisor(context, NodePlumbing(self))
        self.supervisor.want(Wanted(world.mapping))
        self.task = tasks.create_task(self._run(self.supervisor, checkpointer))

    async def _run(self, supervisor: Supervisor, checkpointer: Checkpointer) -> None:
        async with asyncio.TaskGroup() as tasks:
            saver = tasks.create_task(checkpointer.run())
            await supervisor.run()
            saver.cancel()

    async def kill(self) -> None:
        self.is_dead = True
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])
        self.world.calling.clear()

    async def stop(self, grace: float) -> bool:
        """True: clean."""
        assert self.supervisor is not None
        assert self.task is not None
        started = self.world.clock.now()
        self.supervisor.stop(grace)
        await asyncio.wait([self.task])
        self.task.result()
        if not self.world.plan.store_faults or self.world.is_healed:
            owned = [row for row in (await self.world.store.load("m-1")).values() if row.owner == self.name]
            if owned:
                raise Violation(f"a stop left leases behind: {owned}")
        is_clean = not self.world.calling and self.world.clock.now() - started < grace
        self.is_dead = True
        self.world.calling.clear()
        return is_clean


def mapping_of(plan: Plan) -> Mapping:
    return Mapping(
        id="m-1",
        source=SourceSpec(SourceKind.KINESIS, "arn:aws:kinesis:eu-west-1:1:stream/s", "eu-west-1", "1", "s"),
        function=FunctionSpec("f", "arn:aws:lambda:eu-west-1:1:function:f", "arn:aws:iam::1:role/f"),
        batch=BatchPolicy(
            plan.size,
            plan.window,
            plan.factor,
            plan.tumbling,
            max_bytes=5000 if plan.tumbling else 3000,
            buffer_records=max(40, 2 * plan.size),
        ),
        retry=RetryPolicy(plan.attempts, plan.max_age, plan.report_failures),
        start=Position(plan.start),
    )


class NodePlumbing:
    def __init__(self, node: Node) -> None:
        self.node = node

    async def connect(self, wanted: Wanted, result: LastResult) -> Pipe:
        async def open_stream() -> "NodeSource":
            return NodeSource(self.node)

        return Pipe(
            mapping=wanted.mapping,
            result=result,
            target=NodeTarget(self.node),
            gate=Gate(self.node.world.plan.max_concurrency),
            observer=SimObserver(self.node),
            traits=self.traits(),
            open_stream=open_stream,
            open_queue=None,
            matches=(lambda record: self.node.world.is_wanted(record.id)) if self.node.world.plan.is_filtered else None,
            destination=NodeDestination(self.node) if self.node.world.plan.has_destination else None,
        )

    async def disconnect(self, pipe: Pipe) -> None:
        pass

    def traits(self) -> StreamTraits:
        is_dynamodb = self.node.world.plan.is_dynamodb
        return StreamTraits(50, tip_interval=0.25 if is_dynamodb else 1.0, has_timestamps=not is_dynamodb)


class NodeDestination:
    """Fails as everything else does, and for some time always."""

    limit = 100_000

    def __init__(self, node: Node) -> None:
        self.node = node

    async def send(self, notice, body: bytes) -> None:
        world = self.node.world
        await self.node.live()
        await asyncio.sleep(world.rng.choice([0.0, 0.05, 0.5]))
        await self.node.live()
        is_down = not world.is_healed and world.clock.now() % 20 < 6
        if is_down or self.node.fails(world.plan.fault_rate):
            raise DestinationFailed("down")
        batch = json.loads(body)["KinesisBatchInfo"]
        assert batch.get("batchSize", 0) == len(notice.records)
        world.reported.update(record.id for record in notice.records)

    async def check(self) -> str | None:
        return None

    async def close(self) -> None:
        pass


class SimObserver(NullObserver):
    def __init__(self, node: Node) -> None:
        self.node = node

    def lost(self, shard: str, events: int) -> None:
        raise Violation(f"records of {shard} reported lost, none was trimmed")


class NodeSource:
    def __init__(self, node: Node) -> None:
        self.node = node

    async def _call(self) -> None:
        await self.node.live()
        await asyncio.sleep(self.node.world.rng.uniform(0.001, 0.05))
        await self.node.live()
        if self.node.fails(self.node.world.plan.fault_rate):
            raise self.node.world.rng.choice([SourceThrottled("slow down", 0.3), SourceUnavailable("503")])

    async def shards(self) -> Listing:
        await self._call()
        world = self.node.world
        shards = [Shard(s.id, s.parents, s.is_closed) for s in world.shards.values() if s.id not in world.expired]
        self.node.world.rng.shuffle(shards)
        return Listing(tuple(shards), world.aws_now())

    async def facts(self) -> StreamFacts:
        await self._call()
        return StreamFacts(86400.0, "1")

    async def iterator(self, shard: str, at: Position) -> str:
        await self._call()
        if shard in self.node.world.expired:
            raise SourceGone(shard)
        records = self.node.world.shards[shard].records
        match at.kind:
            case PositionKind.TRIM_HORIZON:
                index = 0
            case PositionKind.LATEST:
                # The tip as of this call: asked a second time, it would pass over what came in between.
                if shard in self.node.world.latest_asked:
                    raise Violation(f"LATEST of {shard} was asked for twice")
                if self.node.world.aws_now() - self.node.world.ours_from[shard] > 2.0:
                    raise Violation(f"LATEST of {shard} was asked for long after it was pinned")
                self.node.world.latest_asked.add(shard)
                self.node.world.ours_from[shard] = self.node.world.aws_now()
                index = len(records)
            case PositionKind.AT_TIMESTAMP:
                assert not self.node.world.plan.is_dynamodb
                index = next((i for i, r in enumerate(records) if r.arrival >= float(at.value)), len(records))
            case PositionKind.AT:
                index = next(i for i, r in enumerate(records) if r.id == at.value)
            case PositionKind.AFTER:
                index = next((i for i, r in enumerate(records) if int(r.id) > int(at.value)), len(records))
            case _:
                raise AssertionError(at)
        return f"{index}@{self.node.world.clock.now()}"

    async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
        await self._call()
        world = self.node.world
        index, issued = iterator.split("@")
        if world.clock.now() - float(issued) > 300 or self.node.fails(world.plan.fault_rate / 3):
            raise IteratorExpired("too old")
        sim = world.shards[shard]
        start = int(index)
        # Sometimes an empty page although there is more, as AWS does.
        is_empty = self.node.fails(0.05) and not world.plan.is_dynamodb
        end = start if is_empty else min(len(sim.records), start + min(limit, world.rng.choice([3, 50])))
        records = tuple(sim.records[start:end])
        is_end = sim.is_closed and end == len(sim.records)
        lag = 0.0 if end == len(sim.records) else max(0.001, world.aws_now() - sim.records[end].arrival)
        if world.plan.is_dynamodb:
            lag = None
        return Fetch(
            records,
            records[-1].id if records else "",
            None if is_end else f"{end}@{world.clock.now()}",
            lag,
            sum(len(r.wire) for r in records),
            len(records),
        )

    async def close(self) -> None:
        pass


class NodeTarget:
    capacity = None
    timeout = 30.0

    def __init__(self, node: Node) -> None:
        self.node = node

    async def invoke(self, call: Invocation) -> Reply:
        await self.node.live()
        world = self.node.world
        event = json.loads(call.payload)
        records = event["Records"]
        if not records and not event.get("isFinalInvokeForWindow"):
            raise Violation("an invocation without records")
        assert len(records) <= world.most
        assert len(call.payload) <= (5000 if world.plan.tumbling else 3000) or len(records) == 1
        world.begin_call(call, records)
        await asyncio.sleep(0.01 if world.is_healed else world.rng.choice([0.0, 0.01, 0.3, 2.0]))
        await self.node.live()
        reply = self._answer(event, records)
        world.end_call(call)
        return reply

    def _answer(self, event: dict[str, Any], records: list[dict[str, str]]) -> Reply:
        world = self.node.world
        if self.node.fails(world.plan.fault_rate):
            kind = world.rng.choice([ReplyStatus.THROTTLED, ReplyStatus.UNREACHABLE, ReplyStatus.TIMEOUT])
            return Reply(kind, error=kind.value)
        if world.plan.tumbling:
            return self._answer_window(event, records)
        bad = next((i for i, r in enumerate(records) if self._is_poison(r["id"])), None)
        if bad is None:
            good, reply = records, Reply(ReplyStatus.OK, b"null")
        elif world.plan.report_failures:
            name = records[bad]["id"]
            body = json.dumps({"batchItemFailures": [{"itemIdentifier": name}]}).encode()
            good, reply = records[:bad], Reply(ReplyStatus.OK, body)
        else:
            good, reply = [], Reply(ReplyStatus.FUNCTION_ERROR, error="poison")
        for record in good:
            world.settle(record["id"])
        return reply

    def _answer_window(self, event: dict[str, Any], records: list[dict[str, str]]) -> Reply:
        world = self.node.world
        if any(self._is_poison(record["id"]) for record in records):
            return Reply(ReplyStatus.FUNCTION_ERROR, error="poison")
        shard, start, state = event["shardId"], event["window"]["start"], event["state"]
        if event["isFinalInvokeForWindow"]:
            world.check_final(shard, start, state.get("n", 0))
        for record in records:
            if world.window_of(record["id"]) != start:
                raise Violation(f"{record['id']} in window {start} of {shard}")
            world.settle(record["id"])
        return Reply(ReplyStatus.OK, json.dumps({"state": {"n": state.get("n", 0) + len(records)}}).encode())

    def _is_poison(self, name: str) -> bool:
        world = self.node.world
        left = world.poison.get(name, 0)
        if left <= 0 or world.is_healed:
            return False
        world.poison[name] = left - 1
        return True

    async def check(self) -> str | None:
        return None

    async def close(self) -> None:
        pass


class NodeStore:
    """The shared store as one node reaches it: late, sometimes not at all, and never after its death."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.inner = node.world.store

    async def _before(self) -> None:
        await self.node.live()
        await asyncio.sleep(self.node.world.rng.uniform(0.0, 0.02))
        await self.node.live()
        if self.node.fails(self.node.world.plan.store_faults):
            raise StoreUnavailable("the store is away")

    async def _after(self) -> None:
        await asyncio.sleep(self.node.world.rng.uniform(0.0, 0.02))
        await self.node.live()
        if self.node.fails(self.node.world.plan.store_faults / 2):
            raise StoreUnavailable("written, but the answer was lost")

    async def create(self, mapping: str, rows: list[Row]) -> None:
        await self._before()
        await self.inner.create(mapping, rows)
        world = self.node.world
        if not world.is_created and world.plan.start is PositionKind.LATEST:
            for row in rows:  # pinned: whatever arrives from that moment on is ours, whatever crashes
                position = row.checkpoint.position
                world.ours_from[row.shard] = inf if position.kind is PositionKind.END else float(position.value)
        world.is_created = True
        await self._after()

    async def load(self, mapping: str) -> dict[str, Row]:
        await self._before()
        return await self.inner.load(mapping)

    async def acquire(self, mapping: str, row: Row, owner: str) -> Lease | None:
        await self._before()
        lease = await self.inner.acquire(mapping, row, owner)
        await self._after()
        return lease

    async def save(self, changes: list[tuple[Lease, Checkpoint]]) -> list[Lease]:
        await self._before()
        for lease, checkpoint in changes:
            self.node.world.check_checkpoint(lease.shard, checkpoint)
        lost = await self.inner.save(changes)
        await self._after()
        return lost

    async def release(self, lease: Lease, checkpoint: Checkpoint | None, to: str | None = None) -> bool:
        await self._before()
        if checkpoint is not None:
            self.node.world.check_checkpoint(lease.shard, checkpoint)
        done = await self.inner.release(lease, checkpoint, to)
        await self._after()
        return done

    async def request(self, mapping: str, row: Row, member: str) -> bool:
        await self._before()
        done = await self.inner.request(mapping, row, member)
        await self._after()
        return done

    async def beat(self, member) -> None:
        await self._before()
        await self.inner.beat(member)
        await self._after()

    async def members(self) -> dict[str, Any]:
        await self._before()
        return await self.inner.members()

    async def leave(self, member: str) -> None:
        await self._before()
        await self.inner.leave(member)

    async def documents(self, prefix: str) -> dict[str, Any]:
        await self._before()
        return await self.inner.documents(prefix)

    async def document_keys(self, prefix: str) -> list[str]:
        await self._before()
        return await self.inner.document_keys(prefix)

    async def put_document(self, key: str, document: dict[str, Any]) -> None:
        await self._before()
        await self.inner.put_document(key, document)
        await self._after()

    async def prune_documents(self, prefix: str, keep: int) -> None:
        await self._before()
        await self.inner.prune_documents(prefix, keep)
        await self._after()

    async def forget(self, mapping: str, shards: list[str] | None = None) -> None:
        await self._before()
        await self.inner.forget(mapping, shards)

    async def mappings(self) -> list[str]:
        await self._before()
        return await self.inner.mappings()

    async def restore(self, rows: Any, leases: list[Lease], documents: dict[str, Any]) -> bool:
        await self._before()
        done = await self.inner.restore(rows, leases, documents)
        await self._after()
        return done
