"""Several daemons share one stream through one store, on virtual time: crashes, stops, pauses, cuts, clocks that differ."""

import asyncio
import json
import random
import traceback
from dataclasses import replace

import pytest
import structlog

from poller.core.flow import ShardFlow
from poller.core.retry import Backoff
from poller.runtime import shard_worker
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context
from poller.runtime.gate import ByteBudget
from poller.runtime.lease_keeper import LeaseKeeper
from poller.runtime.supervisor import Supervisor, Wanted
from tests.sim.loop import EPOCH, VirtualLoop
from tests.sim.world import CHECKPOINT_INTERVAL, Node, NodePlumbing, NodeStore, NodeTarget, Violation, World

SEEDS = 300
PARTS = 4  # so that several processes share them
DURATION = 10.0  # of a lease
NEVER = {"shard_crashed", "mapping_crashed"}


class NodeClock:
    """A host's clock: a little fast or slow."""

    def __init__(self, loop: VirtualLoop, rate: float) -> None:
        self._loop, self._rate = loop, rate

    def now(self) -> float:
        return EPOCH + self._loop.time() * self._rate

    def loop(self, at: float) -> float:
        return (at - EPOCH) / self._rate


class Fleet(World):
    """A world in which several nodes may invoke; each shard only one of them at a time."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        super().__init__(seed, loop)
        self.virtual = loop
        self.plan = replace(self.plan, tumbling=0.0, skew=0.0, retunes=0, store_faults=self.rng.choice([0.0, 0.05]))
        self.mapping = replace(self.mapping, batch=replace(self.mapping.batch, tumbling=0.0))
        self.holders: dict[str, dict[str, Member]] = {}  # shard -> request -> who
        self.nodes: list[Member] = []
        self.takeovers: list[float] = []

    def begins(self, member: "Member", request: str, shard: str) -> None:
        others = {other.name for other in self.holders.get(shard, {}).values()} - {member.name}
        if others:
            raise Violation(f"{member.name} invokes for {shard} beside {others} at {self.clock.now()}")
        self.holders.setdefault(shard, {})[request] = member

    def ends(self, request: str) -> None:
        for holders in self.holders.values():
            holders.pop(request, None)

    def gone(self, member: "Member") -> None:
        """Its connections are broken: what it had in flight is given up."""
        for holders in self.holders.values():
            for request in [request for request, holder in holders.items() if holder is member]:
                del holders[request]
                self.calling = {key: held for key, held in self.calling.items() if held != request}


class Member(Node):
    """One daemon of the fleet. `pause` is SIGSTOP: it does nothing, and its clock goes on."""

    world: Fleet

    def __init__(self, world: Fleet, name: str) -> None:
        super().__init__(world, name)
        self._awake = asyncio.Event()
        self._awake.set()
        self.leases: LeaseKeeper | None = None

    async def live(self) -> None:
        await super().live()
        await self._awake.wait()
        await super().live()

    @property
    def is_paused(self) -> bool:
        return not self._awake.is_set()

    def pause(self) -> None:
        self._awake.clear()

    def resume(self) -> None:
        self._awake.set()

    def start(self, tasks: asyncio.TaskGroup) -> None:
        world = self.world
        clock = NodeClock(world.virtual, world.rng.uniform(0.99, 1.01))
        store = NodeStore(self)
        trouble = Backoff(0.5, 5.0, world.rng.random)
        checkpointer = Checkpointer(store, clock, CHECKPOINT_INTERVAL, trouble)
        self.leases = LeaseKeeper(store, clock, self.name, DURATION, trouble)
        context = Context(
            clock=clock,
            random=world.rng,
            store=store,
            checkpointer=checkpointer,
            budget=ByteBudget(10_000_000),
            backoff=Backoff(0.2, 5.0, world.rng.random),
            trouble=trouble,
            leases=self.leases,
        )
        self.supervisor = Supervisor(context, Plumbing(self))
        self.supervisor.want(Wanted(world.mapping))
        self.task = tasks.create_task(self._run(self.supervisor, checkpointer))
        world.nodes.append(self)

    async def _run(self, supervisor: Supervisor, checkpointer: Checkpointer) -> None:
        assert self.leases is not None
        async with asyncio.TaskGroup() as tasks:
            saver = tasks.create_task(checkpointer.run())
            keeper = tasks.create_task(self.leases.run())
            await supervisor.run()
            await self.leases.leave()
            keeper.cancel()
            saver.cancel()

    async def kill(self) -> None:
        self.is_dead = True
        self.world.nodes.remove(self)
        self.world.gone(self)
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])

    async def stop(self, grace: float) -> bool:
        assert self.supervisor is not None
        assert self.task is not None
        assert self.leases is not None
        self.world.nodes.remove(self)
        await self.leases.stop()
        self.supervisor.stop(grace)
        await asyncio.wait([self.task])
        self.task.result()
        self.is_dead = True
        self.world.gone(self)
        return True


class Plumbing(NodePlumbing):
    async def connect(self, wanted, result):
        return replace(await super().connect(wanted, result), target=Target(self.node))


class Target(NodeTarget):
    """Knows who calls. A call that was sent ends whatever becomes of the caller; its answer waits for it."""

    node: Member

    async def invoke(self, call):
        node, world = self.node, self.node.world
        await node.live()
        assert node.leases is not None
        if node.leases.is_fenced:  # it was paused before it looked: the call is never made
            await asyncio.Event().wait()
        event = json.loads(call.payload)
        records = event["Records"]
        for record in records:
            world.begins(node, call.request_id, world.shard_of[record["id"]])
        world.begin_call(call, records)
        try:
            await asyncio.sleep(0.01 if world.is_healed else world.rng.choice([0.0, 0.01, 0.3, 2.0]))
            if node.is_dead:
                await asyncio.Event().wait()
            reply = self._answer(event, records)
        finally:  # answered, or the connection is broken
            world.end_call(call)
            world.ends(call.request_id)
        await node.live()
        return reply


async def run_fleet(world: Fleet) -> None:
    class LedgerFlow(ShardFlow):
        def confirm(self, discard, now):
            for record in discard.records:
                world.discard(record.id)
            super().confirm(discard, now)

    rng, plan = world.rng, world.plan
    shard_worker.ShardFlow, original = LedgerFlow, shard_worker.ShardFlow
    try:
        async with asyncio.TaskGroup() as tasks:
            producer = tasks.create_task(produce(world))
            names = iter(range(10_000))

            def start() -> None:
                Member(world, f"node-{next(names)}").start(tasks)

            for _ in range(rng.randint(1, 4)):
                start()
            for _ in range(plan.kills * 2):
                await asyncio.sleep(rng.uniform(0.0, 15.0))
                what = rng.choice(["kill", "stop", "pause", "start"])
                if what == "start" or not world.nodes:
                    if len(world.nodes) < 4:
                        start()
                    continue
                member = rng.choice(world.nodes)
                if what == "kill":
                    await member.kill()
                elif what == "stop" and not member.is_paused:
                    await member.stop(30.0)
                elif what == "pause":
                    member.pause()
                    asyncio.get_running_loop().call_later(rng.choice([1.0, 8.0, 25.0]), member.resume)
            await producer
            world.is_healed = True
            await asyncio.sleep(30.0)
            if not world.nodes:
                start()
            await settle(world)
            before = world.redelivered
            for member in list(world.nodes):
                await member.stop(60.0)
            assert world.redelivered == before
    finally:
        shard_worker.ShardFlow = original


async def produce(world: Fleet) -> None:
    plan, rng = world.plan, world.rng
    for _ in range(plan.records):
        await asyncio.sleep(rng.expovariate(plan.records / (plan.duration * 2)))
        for _ in range(rng.choice([1, 1, 1, 8])):
            world.produce()
        if rng.random() < 4 / plan.records:
            rng.choice([world.split, world.merge])()


async def settle(world: Fleet) -> None:
    """Everything is delivered and saved, and the shards are spread evenly."""
    deadline = world.clock.now() + 300
    while True:
        rows = (await world.store.load("m-1")).values()
        open_ones = [row for row in rows if row.checkpoint.position.kind.value != "SHARD_END"]
        counts = [sum(row.owner == member.leases.me for row in open_ones) for member in world.nodes]
        is_even = sum(counts) == len(open_ones) and max(counts) - min(counts) <= 1
        if world.is_created and is_even and not world.pending() and not await world.unsaved():
            return
        for member in world.nodes:
            if member.task.done():
                member.task.result()
        assert world.clock.now() < deadline, f"pending: {world.pending()}, owners: {[row.owner for row in open_ones]}"
        await asyncio.sleep(0.5)


def run_seed(seed: int) -> Fleet:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    world = Fleet(seed, loop)
    with structlog.testing.capture_logs() as logs:
        try:
            loop.run_until_complete(run_fleet(world))
            assert not asyncio.all_tasks(loop)
            bad = [entry for entry in logs if entry["event"] in NEVER]
            assert not bad, "".join(traceback.format_exception(bad[0].get("exc_info") or Exception(bad[0])))
        except BaseException as error:
            error.add_note(f"seed {seed}: {world.plan}")
            raise
        finally:
            asyncio.set_event_loop(None)
            loop.close()
    return world


@pytest.mark.parametrize("part", range(PARTS))
def test_fleets_keep_every_promise(request: pytest.FixtureRequest, part: int) -> None:
    """Nothing lost or reordered, never two members at one shard, parents first across owners, an even spread."""
    count = request.config.getoption("--seeds") or SEEDS
    first = request.config.getoption("--first-seed")
    invocations = redelivered = records = 0
    seeds = range(first + part, first + count, PARTS)
    for seed in seeds:
        world = run_seed(seed)
        invocations += world.invocations
        redelivered += world.redelivered
        records += len(world.settled)
    print(f"\n{len(seeds)} fleets, {records} records, {invocations} invocations, {redelivered} redelivered")
    assert records > 0 or not seeds


def test_fleets_differ() -> None:
    """Seeds cover fleets of one to four members."""
    assert {random.Random(seed).randint(1, 4) for seed in range(40)} == {1, 2, 3, 4}
