"""The checkpointer, and the last writes of a runner, on virtual time."""

import asyncio
from collections.abc import Sequence

from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    Checkpoint,
    FunctionSpec,
    Lease,
    Listing,
    Mapping,
    Position,
    PositionKind,
    RetryPolicy,
    Row,
    Shard,
    SourceKind,
    SourceSpec,
    StreamFacts,
    StreamTraits,
)
from poller.core.retry import Backoff
from poller.errors import StoreUnavailable
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context, LastResult, Pipe
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.stream_runner import StreamRunner
from poller.stores.memory import MemoryStore
from tests.fakes.leases import alone
from tests.fakes.observer import NullObserver
from tests.sim.loop import VirtualClock, VirtualLoop

TROUBLE = Backoff(0.5, 5.0, lambda: 1.0)


def run(main):
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(VirtualClock(loop)))
    finally:
        loop.close()


def at(n: int) -> Checkpoint:
    return Checkpoint(Position(PositionKind.AFTER, str(n)))


class Shard1:
    """Something that has a position."""

    def __init__(self, name: str) -> None:
        self.lease = Lease("m", name, "me", 1)
        self.observer = NullObserver()
        self.saved = Checkpoint(TRIM_HORIZON)
        self.now: Checkpoint | None = None
        self.is_lost = False

    def checkpoint(self) -> Checkpoint | None:
        return self.now

    def lose_lease(self) -> None:
        self.is_lost = True


class Recorder(MemoryStore):
    """Records saves; fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures = failures
        self.saves: list[tuple[float, list[str]]] = []

    async def save(self, changes: Sequence[tuple[Lease, Checkpoint]]) -> Sequence[Lease]:
        self.saves.append((asyncio.get_running_loop().time(), [c.position.value for _, c in changes]))
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("away")
        return [lease for lease, _ in changes if lease.shard == "stale"]


async def saving(clock, store, scenario) -> None:
    checkpointer = Checkpointer(store, clock, 0.1, TROUBLE)
    task = asyncio.ensure_future(checkpointer.run())
    await scenario(checkpointer)
    task.cancel()
    await asyncio.wait([task])


def test_saves_are_coalesced_and_only_for_what_moved() -> None:
    """The first change at once, further ones together an interval later; no change, no save."""

    async def main(clock):
        store, one, two = Recorder(), Shard1("one"), Shard1("two")

        async def scenario(checkpointer):
            for n in range(1, 5):
                one.now = two.now = at(n)
                checkpointer.moved(one)
                checkpointer.moved(two)
                await asyncio.sleep(0.02)
            await asyncio.sleep(1)
            checkpointer.moved(one)
            await asyncio.sleep(1)

        await saving(clock, store, scenario)
        assert [values for _, values in store.saves] == [["1", "1"], ["4", "4"]]
        assert one.saved == at(4)

    run(main)


def test_a_failed_save_is_made_up_for_without_a_new_change() -> None:
    """What moved while the store was away is saved when it is back."""

    async def main(clock):
        store, shard = Recorder(failures=3), Shard1("one")

        async def scenario(checkpointer):
            shard.now = at(7)
            checkpointer.moved(shard)
            await asyncio.sleep(30)

        await saving(clock, store, scenario)
        assert len(store.saves) == 4
        assert shard.saved == at(7)

    run(main)


def test_a_stale_lease_is_told_and_the_others_are_saved() -> None:
    """Fencing: the worker of a lost lease stops."""

    async def main(clock):
        store, good, stale = Recorder(), Shard1("good"), Shard1("stale")

        async def scenario(checkpointer):
            good.now = stale.now = at(1)
            checkpointer.moved(good)
            checkpointer.moved(stale)
            await asyncio.sleep(1)

        await saving(clock, store, scenario)
        assert (good.is_lost, stale.is_lost) == (False, True)
        assert (good.saved, stale.saved) == (at(1), Checkpoint(TRIM_HORIZON))

    run(main)


def test_a_lease_that_is_taken_during_a_stop_is_given_back() -> None:
    """Cut off, the acquire would leave a lease behind that nobody holds."""

    class Slow(MemoryStore):
        async def acquire(self, mapping: str, row: Row, owner: str) -> Lease | None:
            lease = await super().acquire(mapping, row, owner)
            await asyncio.sleep(5)
            return lease

    class Source:
        async def shards(self) -> Listing:
            return Listing((Shard("a"),), clock_now())

        async def facts(self) -> StreamFacts:
            return StreamFacts(1.0)

        async def close(self) -> None:
            pass

    def clock_now() -> float:
        return asyncio.get_running_loop().time()

    async def main(clock):
        store = Slow()
        context = Context(
            clock,
            None,
            store,
            Checkpointer(store, clock, 0.1, TROUBLE),
            ByteBudget(1),
            TROUBLE,
            TROUBLE,
            alone(store, clock),
        )
        mapping = Mapping(
            "m", SourceSpec(SourceKind.KINESIS, "arn", "r", "1", "s"), FunctionSpec("f", "arn", "role"),
            BatchPolicy(1), RetryPolicy(), TRIM_HORIZON,
        )  # fmt: skip

        async def open_stream() -> Source:
            return Source()

        pipe = Pipe(
            mapping, LastResult(), None, Gate(None), NullObserver(), StreamTraits(1, 1.0, True), open_stream, None
        )
        runner = StreamRunner(context, pipe)
        task = asyncio.ensure_future(runner.run())
        await asyncio.sleep(1)
        runner.stop(60.0)
        await task
        [row] = (await store.load("m")).values()
        assert (row.owner, row.token) == (None, 1)

    run(main)
