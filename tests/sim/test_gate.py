"""Slots and permits of a function on virtual time: how many, in which order, and what a cancelled waiter leaves."""

import asyncio
import random
from types import SimpleNamespace

import pytest

from poller.runtime.gate import Gate
from tests.sim.loop import run_virtual


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """asyncio-throttle reads virtual time; counts how often it looks."""
    looks = SimpleNamespace(count=0)

    def monotonic() -> float:
        looks.count += 1
        return asyncio.get_running_loop().time()

    monkeypatch.setattr("asyncio_throttle.throttler.time", SimpleNamespace(monotonic=monotonic))
    return looks


def now() -> float:
    return asyncio.get_running_loop().time()


def assert_kept(times: list[float], limit: int, period: float) -> None:
    """Any permit and the `limit`-th after it are more than a period apart, so no window of a period has more."""
    assert all(later - earlier > period for earlier, later in zip(times, times[limit:], strict=False))


@pytest.mark.parametrize(
    ("rate", "limit", "period"),
    [(50, 50, 1.0), (2.5, 2, 0.8), (1, 1, 1.0), (1.5, 1, 1 / 1.5), (0.1, 1, 10.0), (0.001, 1, 1000.0), (1999.9, 1999, 1999 / 1999.9)],
)  # fmt: skip
def test_a_rate_is_kept_in_every_window_and_used_up(rate: float, limit: int, period: float) -> None:
    """Fractions too: never more than `limit` in any `period`, and under load hardly less."""

    async def main():
        gate, times = Gate(None, rate), []

        async def use():
            await gate.permit()
            times.append(now())

        await asyncio.gather(*(use() for _ in range(3 * limit + 1)))
        assert times[:limit] == [0.0] * limit
        assert_kept(times, limit, period)
        assert times[-1] <= 3 * period * 1.03

    run_virtual(main())


@pytest.mark.parametrize("seed", range(20))
def test_a_rate_holds_whatever_comes_and_goes(seed: int) -> None:
    """Callers at any moment, permits given back, waiters cancelled: what was used keeps to the rate."""

    async def main():
        rng = random.Random(seed)
        limit = rng.choice((1, 2, 5))
        gate, times, cancelled = Gate(rng.choice((None, 3)), float(limit)), [], []

        async def use():
            await asyncio.sleep(rng.uniform(0, 20))
            async with asyncio.timeout(rng.choice((None, 0.5, 3.0))):
                if rng.random() < 0.5:
                    async with gate:
                        times.append(now())
                        await asyncio.sleep(rng.uniform(0, 0.5))
                    return
                await gate.acquire()
                try:
                    stamp = await gate.permit()
                    if rng.random() < 0.3:
                        await asyncio.sleep(rng.uniform(0, 3))
                        gate.refund(stamp)
                    else:
                        times.append(now())
                finally:
                    gate.release()

        async def use_or_give_up():
            try:
                await use()
            except TimeoutError:
                cancelled.append(now())

        await asyncio.gather(*(use_or_give_up() for _ in range(100)))
        assert_kept(times, limit, 1.0)
        assert times
        assert not gate.is_scarce
        async with asyncio.timeout(4.2):  # neither slot nor permit is lost
            for _ in range(limit + 3):
                async with gate:
                    pass

    run_virtual(main())


def test_waiters_are_served_in_order() -> None:
    """First come, first served, for permits as for slots."""

    async def main():
        for gate in (Gate(None, 2.0), Gate(1), Gate(1, 2.0)):
            served = []

            async def use(number: int, gate: Gate = gate, served: list[int] = served) -> None:
                async with gate:
                    served.append(number)

            await asyncio.gather(*map(use, range(9)))
            assert served == list(range(9))

    run_virtual(main())


def test_a_thousand_waiters_look_at_the_clock_as_seldom_as_one(clock) -> None:
    """Only the first in the line polls: a hundred looks a period, not a hundred thousand."""

    async def main():
        gate = Gate(None, 1.0)
        waiting = [asyncio.ensure_future(gate.permit()) for _ in range(1000)]
        await asyncio.sleep(10.05)
        assert sum(task.done() for task in waiting) == 10
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert clock.count < 1100

    run_virtual(main())


def test_a_permit_given_back_is_there_at_once() -> None:
    """A receive that brought nothing costs no invocation; a waiter gets it without waiting for the period."""

    async def main():
        gate = Gate(None, 0.1)
        gate.refund(await gate.permit())
        stamp = await gate.permit()
        assert now() == 0.0
        waiter = asyncio.ensure_future(gate.permit())
        await asyncio.sleep(5)
        gate.refund(stamp)
        await waiter
        assert now() <= 5.1

    run_virtual(main())


def test_a_permit_given_back_late_is_none() -> None:
    """Its period is over: it allows nothing that the rate does not allow anyway."""

    async def main():
        gate = Gate(None, 2.0)
        stamp = await gate.permit()
        await asyncio.sleep(5)
        await gate.permit()
        gate.refund(stamp)
        await gate.permit()
        assert now() == 5.0
        await gate.permit()
        assert now() > 6.0

    run_virtual(main())


def test_a_cancelled_waiter_takes_nothing_with_it() -> None:
    """Neither the one who polls nor one who waits behind it; the slots are free again."""

    async def main():
        gate = Gate(3, 0.1)

        async def use() -> float:
            async with gate:
                return now()

        assert await use() == 0.0
        first, second, third = (asyncio.ensure_future(use()) for _ in range(3))
        await asyncio.sleep(1)
        first.cancel()
        second.cancel()
        await asyncio.wait((first, second))
        slots = [asyncio.ensure_future(gate.acquire()) for _ in range(2)]
        await asyncio.wait(slots, timeout=1)
        assert all(slot.done() for slot in slots)
        assert 10 < await third <= 10.2
        await asyncio.wait_for(gate.acquire(), 1)
        assert not gate.is_scarce

    run_virtual(main())


def test_who_waits_for_a_permit_makes_it_scarce() -> None:
    """So that a long poll ends soon; a rate that nobody waits for does not, nor does another mapping alone."""

    async def main():
        gate = Gate(None, 1.0)
        gate.users = 2
        await gate.permit()
        assert not gate.is_scarce
        waiter = asyncio.ensure_future(gate.permit())
        await asyncio.sleep(0.5)
        assert gate.is_scarce
        await waiter
        assert not gate.is_scarce

    run_virtual(main())


def test_without_bounds_nothing_waits(clock) -> None:
    """No suspension, no look at the clock; refund and release are harmless."""

    async def main():
        gate = Gate(None)
        for step in (gate.acquire(), gate.permit(), gate.__aenter__()):
            with pytest.raises(StopIteration):
                step.send(None)
        assert await gate.permit() == 0.0
        gate.refund(0.0)
        gate.release()
        assert not gate.is_scarce

    run_virtual(main())
    assert clock.count == 0
