"""A member of the fleet on virtual time: beats, fence, names, what it sees of the others."""

import asyncio

import pytest
import structlog

from poller.core.model import TRIM_HORIZON, Checkpoint, Member, Row
from poller.core.retry import Backoff
from poller.errors import StoreUnavailable
from poller.runtime.lease_keeper import LeaseKeeper
from poller.stores.memory import MemoryStore
from tests.sim.loop import VirtualClock, run_virtual

DURATION = 10.0


class Store(MemoryStore):
    """Away, or slow to answer."""

    is_away = False
    delay = 0.0

    async def beat(self, member: Member) -> None:
        await asyncio.sleep(self.delay)
        if self.is_away:
            raise StoreUnavailable("away")
        await super().beat(member)


class JumpingClock(VirtualClock):
    """Ahead of the loop by what it has jumped, as `SystemClock` is."""

    jumped = 0.0

    def now(self) -> float:
        return super().now() + self.jumped

    def loop(self, at: float) -> float:
        return super().loop(at - self.jumped)


class Setup:
    def __init__(self, *, alone: bool = False) -> None:
        self.clock = JumpingClock(asyncio.get_running_loop())
        self.store = Store()
        self.keeper = LeaseKeeper(self.store, self.clock, "me", DURATION, Backoff(0.5, 5.0, lambda: 1.0), alone=alone)
        self.lost: list[float] = []
        self.keeper.on_fence(lambda: self.lost.append(asyncio.get_running_loop().time()))

    async def run(self, main) -> None:
        task = asyncio.ensure_future(self.keeper.run())
        try:
            await main()
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def other(self, name: str, seconds: float) -> None:
        """Another member that beats for so long."""
        for beat in range(int(seconds)):
            await MemoryStore.beat(self.store, Member(name, beat + 1))
            await asyncio.sleep(1.0)


def keeping(work, **more) -> list[dict]:
    async def main() -> None:
        setup = Setup(**more)
        await setup.run(lambda: work(setup))

    with structlog.testing.capture_logs() as logs:
        run_virtual(main())
    return logs


def test_it_owns_nothing_before_its_first_beat() -> None:
    """Others cannot see it yet."""

    async def work(setup: Setup) -> None:
        assert setup.keeper.is_fenced
        row = Row("a", Checkpoint(TRIM_HORIZON))
        assert setup.keeper.plan("m", [row]).take == ()
        await asyncio.sleep(1)
        assert not setup.keeper.is_fenced
        assert setup.keeper.plan("m", [row]).take == ("a",)
        assert list(await setup.store.members()) == ["me"]

    keeping(work)


def test_a_store_that_comes_back_in_time_costs_nothing() -> None:
    """Beats are a third of the duration apart, so one may fail."""

    async def work(setup: Setup) -> None:
        await asyncio.sleep(4)
        setup.store.is_away = True
        await asyncio.sleep(5)
        setup.store.is_away = False
        await asyncio.sleep(60)
        assert setup.lost == []
        assert setup.keeper.me == "me"

    assert "leases_fenced" not in {entry["event"] for entry in keeping(work)}


def test_the_fence_passes_before_others_may_take() -> None:
    """Three quarters of the duration after the last beat that got through was sent; then another name."""

    async def work(setup: Setup) -> None:
        await asyncio.sleep(4)  # beats at 0 and 3.3
        setup.store.is_away = True
        await asyncio.sleep(60)
        [at] = setup.lost
        assert DURATION / 3 + 7.4 <= at <= DURATION / 3 + 7.6
        assert setup.keeper.is_fenced
        assert setup.keeper.me != "me"
        setup.store.is_away = False
        await asyncio.sleep(10)
        assert not setup.keeper.is_fenced
        assert not setup.keeper.is_live("me"), "what it had under the old name is free"
        assert setup.keeper.me in setup.keeper.live
        assert "me" not in setup.keeper.live

    assert "leases_fenced" in {entry["event"] for entry in keeping(work)}


def test_a_slow_answer_counts_from_when_the_beat_was_sent() -> None:
    """And an answer that takes a third of the duration is none."""

    async def work(setup: Setup) -> None:
        setup.store.delay = 3.0
        await asyncio.sleep(20)
        assert setup.lost == []
        setup.store.delay = 4.0
        await asyncio.sleep(20)
        assert len(setup.lost) == 1

    keeping(work)


def test_a_wall_clock_that_jumps_ahead_kills_nobody_else() -> None:
    """We may have been asleep and lose what we have; for how long the others are silent only counts while we look."""

    async def work(setup: Setup) -> None:
        async def other() -> None:
            for beat in range(6):  # slow: a look of ours now and then finds nothing new
                await MemoryStore.beat(setup.store, Member("you", beat + 1))
                await asyncio.sleep(7.0)

        beating = asyncio.ensure_future(other())
        await asyncio.sleep(12)
        assert list(setup.keeper.live) == ["me", "you"]
        setup.clock.jumped = 3600.0
        theirs = Row("a", Checkpoint(TRIM_HORIZON), owner="you", token=1)
        while not beating.done():
            assert setup.keeper.plan("m", [theirs]).take == ()
            assert setup.keeper.is_live("you")
            assert "you" in setup.keeper.live
            await asyncio.sleep(0.1)
        assert len(setup.lost) == 1

    keeping(work)


def test_it_sees_who_lives() -> None:
    """A member is dead a duration after its last beat; one that leaves has no share at once."""

    async def work(setup: Setup) -> None:
        other = asyncio.ensure_future(setup.other("you", 20))
        await asyncio.sleep(5)
        assert list(setup.keeper.live) == ["me", "you"]
        changed = setup.keeper.watch()
        await other
        await asyncio.sleep(8)
        assert list(setup.keeper.live) == ["me", "you"]
        await asyncio.sleep(8)
        assert list(setup.keeper.live) == ["me"]
        assert changed.is_set()
        await MemoryStore.beat(setup.store, Member("him", 1, {"leaving": True}))
        await asyncio.sleep(4)
        assert list(setup.keeper.live) == ["me"]
        assert setup.keeper.is_live("him"), "what it still has is respected"

    keeping(work)


def test_those_that_are_long_dead_are_forgotten() -> None:
    """A table of members that were killed must not grow for ever."""

    async def work(setup: Setup) -> None:
        await setup.other("killed", 2)
        await asyncio.sleep(100)
        assert "killed" in await setup.store.members()
        await asyncio.sleep(300)
        assert list(await setup.store.members()) == ["me"]

    keeping(work)


def test_a_stop_and_a_leave() -> None:
    """First it has no share any more, then it is gone."""

    async def work(setup: Setup) -> None:
        await asyncio.sleep(1)
        await setup.keeper.stop()
        assert (await setup.store.members())["me"].info["leaving"] is True
        await setup.keeper.leave()
        assert await setup.store.members() == {}

    keeping(work)


def test_alone_it_writes_nothing_and_owns_everything() -> None:
    """SQLite under one process: whoever owned a lease is dead, for its lock on the file is gone."""

    async def work(setup: Setup) -> None:
        assert not setup.keeper.is_fenced
        row = Row("a", Checkpoint(TRIM_HORIZON), (), "a process that was killed", 5)
        assert setup.keeper.plan("m", [row]).take == ("a",)
        await asyncio.sleep(60)
        assert await setup.store.members() == {}

    keeping(work, alone=True)


def test_what_is_at_work_here_is_not_taken_again() -> None:
    """A runner that ends may still have it; the one that begins is told when it has not."""

    async def work(setup: Setup) -> None:
        row = Row("a", Checkpoint(TRIM_HORIZON))
        told: list[int] = []
        setup.keeper.on_end("m", lambda: told.append(1))
        setup.keeper.begin("m", "a")
        assert setup.keeper.plan("m", [row]).take == ()
        setup.keeper.end("m", "a")
        assert told == [1]
        assert setup.keeper.plan("m", [row]).take == ("a",)

    keeping(work, alone=True)


@pytest.mark.parametrize("at", range(20, 30))
def test_a_member_that_was_suspended_is_another_one(at: int) -> None:
    """Its beat and its guard wake together; whichever is first, no beat moves a fence that has passed."""

    async def work(setup: Setup) -> None:
        await asyncio.sleep(at)
        asyncio.get_running_loop().virtual += 30  # SIGSTOP, SIGCONT: no timer ran in between
        await asyncio.sleep(1)
        assert len(setup.lost) == 1
        assert setup.keeper.me != "me"
        assert not setup.keeper.is_fenced, "it goes on as another"

    keeping(work)
