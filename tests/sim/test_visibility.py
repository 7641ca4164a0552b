"""Visibility kept alive, on virtual time: before it ends, not sooner than needed, as long as SQS allows."""

import asyncio
import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import pytest
from structlog.testing import capture_logs

from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    FunctionSpec,
    Mapping,
    Record,
    RetryPolicy,
    SourceKind,
    SourceSpec,
)
from poller.runtime.visibility import LONGEST, VisibilityKeeper
from tests.sim.loop import EPOCH, VirtualClock, run_virtual

HOUR = 3600.0
MAPPING = Mapping(
    "m",
    SourceSpec(SourceKind.SQS, "arn", "r", "1", "q"),
    FunctionSpec("f", "arn", "role"),
    BatchPolicy(10, 0.0, max_bytes=10**6),
    RetryPolicy(),
    TRIM_HORIZON,
)


@dataclass(eq=False)
class Loop:
    """A holder."""

    held: list[Record] = field(default_factory=list)
    began: float = EPOCH
    extension: asyncio.Event | None = None


class Queue:
    """Knows when each message is visible again, and sees when that was too late. A call takes `seconds`."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds
        self.calls: list[tuple[float, list[str], float]] = []
        self.ends: dict[str, float] = {}
        self.stuck: set[str] = set()
        self.slow: dict[str, float] = {}

    async def extend(self, records, seconds):
        asked, ids = now(), [record.id for record in records]
        assert 0 < seconds <= 43_200
        self.calls.append((asked, ids, seconds))
        await asyncio.sleep(max([self.slow.get(id_, self.seconds) for id_ in ids]))
        left = [record for record in records if record.id in self.stuck or self.ends[record.id] <= now()]
        for record in records:
            if record not in left:
                self.ends[record.id] = now() + seconds
        return left

    def times(self) -> list[float]:
        return [at for at, _, _ in self.calls]


def now() -> float:
    return asyncio.get_running_loop().time()


class Setup:
    """A keeper that runs, its holders and their queue."""

    def __init__(self, timeout: float, **more: float) -> None:
        self.timeout = timeout
        self.queue = Queue(**more)
        self.loops: list[Loop] = []
        clock = VirtualClock(asyncio.get_running_loop())
        self.keeper = VisibilityKeeper(
            MAPPING, clock, self.queue, lambda: self.timeout, lambda: tuple(self.loops)  # type: ignore[arg-type]
        )  # fmt: skip
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.task = asyncio.ensure_future(self.keeper.run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        assert not self.task.done()
        self.task.cancel()
        await asyncio.wait([self.task])

    def take(self, *names: str, age: float = 0.0, timeout: float | None = None, loop: Loop | None = None) -> Loop:
        """A holder gets messages that were asked for so long ago."""
        if loop is None:
            loop = Loop(began=EPOCH + now() - age)
            self.loops.append(loop)
        ends = now() - age + (timeout or self.timeout)
        for name in names:
            loop.held.append(Record(name, "", 0.0, b"{}", f"handle of {name}", EPOCH + ends))
            self.queue.ends[name] = ends
        self.keeper.took(EPOCH + ends)
        return loop

    def are_kept(self) -> bool:
        """Nothing has become visible, and nothing is believed to last longer than it does."""
        held = [record for loop in self.loops for record in loop.held]
        return all(now() < self.queue.ends[record.id] >= record.expires - EPOCH - 1e-6 for record in held)


@pytest.mark.parametrize("timeout", [1.0, 2.0, 5.0, 30.0, 360.0, 5400.0])
def test_it_is_extended_at_two_thirds_by_the_whole_timeout(timeout: float) -> None:
    """Before it ends and not sooner: one call in two thirds of the timeout."""

    async def main():
        async with Setup(timeout, seconds=0.01) as setup:
            setup.take("a", "b")
            for _ in range(19):
                await asyncio.sleep(timeout / 3)
                assert setup.are_kept()
        assert setup.queue.times() == pytest.approx([timeout * 2 / 3 * n for n in range(1, 10)], rel=0.02)
        assert all((ids, seconds) == (["a", "b"], timeout) for _, ids, seconds in setup.queue.calls)

    run_virtual(main())


def test_what_is_done_with_in_time_costs_no_call() -> None:
    """Nothing held, nothing asked; a message that lasts a third of its timeout neither."""

    async def main():
        async with Setup(30.0) as setup:
            for n in range(100):
                loop = setup.take(f"m{n}")
                await asyncio.sleep(10)
                setup.loops.remove(loop)
        assert setup.queue.calls == []

    run_virtual(main())


def test_it_looks_only_when_something_may_be_due() -> None:
    """Twice in a timeout at most, also after it was woken once."""

    async def main():
        async with Setup(900.0) as setup:
            looks = 0
            tell = setup.keeper._holders

            def holders():
                nonlocal looks
                looks += 1
                return tell()

            setup.keeper._holders = holders
            await asyncio.sleep(10)
            setup.take("a", timeout=300.5)
            await asyncio.sleep(9000)
            assert setup.are_kept()
        assert len(setup.queue.calls) == pytest.approx(15, abs=1)
        assert looks <= 2 * len(setup.queue.calls) + 4

    run_virtual(main())


def test_a_message_that_comes_just_after_a_look_is_extended_in_time() -> None:
    """At any moment between two looks."""

    async def main():
        async with Setup(30.0) as setup:
            for n in range(300):
                setup.take(f"m{n}")
                await asyncio.sleep(0.37)
                assert setup.are_kept()
            await asyncio.sleep(100)
            assert setup.are_kept()
            assert all(at - before >= 0.999 for before, at in pairwise(setup.queue.times()))

    run_virtual(main())


@pytest.mark.parametrize("timeout", [15.0, 25.0, 30.0, 45.0])
def test_a_message_that_has_aged_in_its_poll_is_extended_in_time(timeout: float) -> None:
    """Its visibility is counted from the call that asked for it, up to 20 s ago: less than a look away."""

    async def main():
        async with Setup(timeout) as setup:
            for n in range(50):
                setup.take(f"m{n}", age=min(20.0, timeout - 2) * (n % 11) / 10)
                await asyncio.sleep(1.7)
                assert setup.are_kept()

    run_virtual(main())


def test_twelve_hours_are_the_end() -> None:
    """The last extension reaches just them; then it is left alone."""

    async def main():
        async with Setup(30.0) as setup:
            loop = setup.take("a")
            await asyncio.sleep(LONGEST - 1)
            assert setup.are_kept()
            assert loop.held[0].expires == pytest.approx(EPOCH + LONGEST, abs=1.1)
            assert loop.held[0].expires <= EPOCH + LONGEST
            calls = len(setup.queue.calls)
            assert calls == pytest.approx(LONGEST / 20, abs=3)
            await asyncio.sleep(HOUR)
            assert len(setup.queue.calls) == calls
        assert max(at + seconds for at, _, seconds in setup.queue.calls) <= LONGEST + 1e-6

    run_virtual(main())


@pytest.mark.parametrize("timeout", [43_200.0, 43_198.0, 43_000.0, 30_000.0])
def test_the_longest_timeouts(timeout: float) -> None:
    """Nothing to gain where a timeout is as long as SQS allows; else one call up to the limit."""

    async def main():
        async with Setup(timeout) as setup:
            setup.take("a")
            await asyncio.sleep(LONGEST + HOUR)
        gain = LONGEST - timeout
        assert len(setup.queue.calls) == (gain >= 1)
        assert all(at + seconds == pytest.approx(LONGEST) for at, _, seconds in setup.queue.calls)

    run_virtual(main())


def test_a_queue_of_five_hours_then_one_of_half_a_minute() -> None:
    """A timeout that becomes shorter does not find the keeper asleep for hours; what lasts long is left alone."""

    async def main():
        async with Setup(5 * HOUR) as setup:
            setup.take("long")
            await asyncio.sleep(60)
            setup.timeout = 30.0
            setup.take("short")
            for _ in range(600):
                await asyncio.sleep(1)
                assert setup.are_kept()
            assert {id_ for _, ids, _ in setup.queue.calls for id_ in ids} == {"short"}
            assert len(setup.queue.calls) == pytest.approx(30, abs=1)
            await asyncio.sleep(5 * HOUR)
            assert setup.are_kept()

    run_virtual(main())


def test_a_timeout_that_becomes_longer() -> None:
    """What is held with the old one is extended by the new one; what is still received with the old one too."""

    async def main():
        async with Setup(30.0) as setup:
            setup.take("old")
            await asyncio.sleep(5)
            setup.timeout = 900.0
            await asyncio.sleep(20)
            assert setup.are_kept()
            setup.take("late", timeout=30.0, age=20.0)
            for _ in range(200):
                await asyncio.sleep(5)
                assert setup.are_kept()
        assert [seconds for _, _, seconds in setup.queue.calls] == [900.0] * len(setup.queue.calls)
        assert len(setup.queue.calls) <= 4

    run_virtual(main())


def test_many_holders_share_calls() -> None:
    """200 loops that received within ten seconds: what comes due within a second goes together."""

    async def main():
        async with Setup(30.0) as setup:
            for n in range(200):
                setup.take(f"m{n}")
                await asyncio.sleep(0.05)
            await asyncio.sleep(50)
            assert setup.are_kept()
        assert 10 <= len([at for at in setup.queue.times() if at < 35]) <= 12
        assert sum(len(ids) for at, ids, _ in setup.queue.calls if at < 35) == 200
        assert max(len(ids) for _, ids, _ in setup.queue.calls) >= 15

    run_virtual(main())


def test_holders_of_one_moment_are_one_call() -> None:
    """The source makes tens of it."""

    async def main():
        async with Setup(30.0) as setup:
            for n in range(50):
                setup.take(*(f"m{n}.{index}" for index in range(10)))
            await asyncio.sleep(21)
        assert [(at, len(ids)) for at, ids, _ in setup.queue.calls] == [(pytest.approx(20.0), 500)]

    run_virtual(main())


def test_a_window_that_fills_is_kept_together() -> None:
    """One holder, messages of many receives: the first calls take along what gains enough by it."""

    async def main():
        async with Setup(360.0) as setup:
            loop = setup.take("m0")
            for n in range(1, 300):
                await asyncio.sleep(1)
                setup.take(f"m{n}", loop=loop)
                assert setup.are_kept()
            for _ in range(36):
                await asyncio.sleep(100)
                assert setup.are_kept()
        assert len(setup.queue.calls) <= 40

    run_virtual(main())


def test_what_cannot_be_extended_is_tried_again_at_most_once_a_second() -> None:
    """Until it is not ours any more; other holders that come due meanwhile do not make it more."""

    async def main():
        async with Setup(30.0) as setup:
            with capture_logs() as logs:
                setup.take("bad")
                setup.queue.stuck = {"bad"}
                for n in range(300):
                    setup.take(f"m{n}")
                    await asyncio.sleep(0.1)
                await asyncio.sleep(60)
            tries = [at for at, ids, _ in setup.queue.calls if "bad" in ids]
        assert tries[0] == pytest.approx(20.0)
        assert tries[-1] < 30.0
        assert 5 <= len(tries) <= 11
        warnings = [entry for entry in logs if entry["log_level"] == "warning"]
        assert len(warnings) == len(tries)
        assert (warnings[0]["event"], warnings[0]["failed"], warnings[0]["mapping"]) == ("visibility_extended", 1, "m")

    run_virtual(main())


def test_an_extension_that_fails_for_a_while_is_made_up_for() -> None:
    """The reserve is there for it."""

    async def main():
        async with Setup(30.0) as setup:
            loop = setup.take("a", "b")
            setup.queue.stuck = {"a"}
            await asyncio.sleep(26)
            assert [record.expires - EPOCH for record in loop.held] == pytest.approx([30.0, 50.0])
            setup.queue.stuck = set()
            await asyncio.sleep(2)
            assert loop.held[0].expires - EPOCH >= 56
            await asyncio.sleep(100)
            assert setup.are_kept()

    run_virtual(main())


def test_one_message_that_fails_does_not_take_the_others_with_it() -> None:
    """A function may delete a message itself: the other 9,999 of the batch are not extended each second for it."""

    async def main():
        async with Setup(30.0) as setup:
            setup.take(*(f"m{n}" for n in range(1000)))
            setup.queue.stuck = {"m500"}
            await asyncio.sleep(29)
            assert sum(ids == ["m500"] for _, ids, _ in setup.queue.calls) >= 4
            assert [len(ids) for _, ids, _ in setup.queue.calls if ids != ["m500"]] == [1000]

    run_virtual(main())


def test_what_has_expired_is_left_alone() -> None:
    """Somebody else may have it: neither extended nor a reason to look all the time."""

    async def main():
        async with Setup(30.0) as setup:
            setup.take("gone", age=40.0)
            loop = setup.take("gone too", age=31.0)
            setup.take("ours", loop=loop)
            before = loop.held[0]
            await asyncio.sleep(200)
            assert loop.held[0] == before
        assert {id_ for _, ids, _ in setup.queue.calls for id_ in ids} == {"ours"}
        assert len(setup.queue.calls) == 9  # the first after 20 s, then every 20 s

    run_virtual(main())


def test_messages_are_settled_after_an_extension_under_way() -> None:
    """`extension` is there from before the call until what is held is right; then there is none."""

    async def main():
        async with Setup(30.0, seconds=3.0) as setup:
            loop, other = setup.take("a"), setup.take("b", age=-5.0)
            assert loop.extension is None
            await asyncio.sleep(20.5)
            assert loop.extension is not None
            assert other.extension is None
            await loop.extension.wait()
            assert now() == pytest.approx(23.0)
            assert loop.extension is None
            assert loop.held[0].expires == pytest.approx(EPOCH + 50)

    run_virtual(main())


def test_what_is_let_go_or_comes_during_an_extension() -> None:
    """The first does not come back, the second keeps its own time."""

    async def main():
        async with Setup(30.0, seconds=1.0) as setup:
            loop = setup.take("a", "b")
            await asyncio.sleep(20.5)
            del loop.held[0]
            setup.take("c", loop=loop)
            await asyncio.sleep(1)
            assert [record.id for record in loop.held] == ["b", "c"]
            assert [record.expires - EPOCH for record in loop.held] == pytest.approx([50.0, 50.5])

    run_virtual(main())


def test_a_call_that_hangs_does_not_hold_up_the_others() -> None:
    """Each group of holders has its own; and nobody is extended twice at once."""

    async def main():
        async with Setup(30.0) as setup:
            setup.take("slow")
            setup.queue.slow = {"slow": 9.5}
            for n in range(10):
                await asyncio.sleep(1.5)
                setup.take(f"m{n}")
            for _ in range(40):
                await asyncio.sleep(2)
                assert setup.are_kept()
            slow = [at for at, ids, _ in setup.queue.calls if "slow" in ids]
            assert all(later - at >= 19 for at, later in pairwise(slow))

    run_virtual(main())


def test_cancelled_in_the_middle_of_a_call_it_lets_the_loops_go_on() -> None:
    """Who waits for the extension is woken; the call ends with the keeper."""

    async def main():
        async with Setup(30.0, seconds=60.0) as setup:
            loop = setup.take("a")
            await asyncio.sleep(25)
            waiting = loop.extension
            assert waiting is not None
            expires = loop.held[0].expires
        assert waiting.is_set()
        assert loop.extension is None
        assert loop.held[0].expires == expires
        assert now() == 25

    run_virtual(main())


@pytest.mark.parametrize("seed", range(15))
def test_nothing_that_is_held_becomes_visible(seed: int) -> None:
    """Any timeout that changes now and then, any ages, slow and failing calls: kept, with few calls."""
    rng = random.Random(seed)

    async def main():
        timeout = rng.choice((2.0, 12.0, 30.0, 90.0, 900.0))
        async with Setup(timeout, seconds=timeout / 50) as setup:
            looks = 600
            for n in range(looks):
                if rng.random() < 0.02:
                    setup.timeout = timeout * rng.choice((0.5, 1.0, 3.0))
                if rng.random() < 0.3:
                    setup.take(f"m{n}", age=rng.random() * setup.timeout * 0.6)
                if setup.loops and rng.random() < 0.3:
                    setup.loops.pop(rng.randrange(len(setup.loops)))
                if rng.random() < 0.05:
                    held = [record.id for loop in setup.loops for record in loop.held]
                    setup.queue.slow = {id_: timeout / 10 for id_ in held if rng.random() < 0.2}
                await asyncio.sleep(rng.random() * timeout / 5)
                assert setup.are_kept()
            gaps = [later - at for at, later in pairwise(setup.queue.times())]
            assert all(gap >= min(1.0, timeout / 24) * 0.99 or gap == 0 for gap in gaps)

    run_virtual(main())
