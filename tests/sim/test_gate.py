"""Slots and permits of a function on virtual time: how many, in which order, and what a cancelled waiter leaves."""

import asyncio
import random
from contextlib import suppress
from math import inf

import pytest

from poller.runtime.gate import Gate
from tests.sim.loop import run_virtual


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


def test_a_thousand_waiters_cost_as_little_as_one() -> None:
    """Only the first in the line looks at the clock, and once for each permit."""

    async def main():
        gate, loop, looks = Gate(None, 1.0), asyncio.get_running_loop(), 0
        waiting = [asyncio.ensure_future(gate.permit()) for _ in range(1000)]
        await asyncio.sleep(0.5)
        time = loop.time

        def count() -> float:
            nonlocal looks
            looks += 1
            return time()

        loop.time = count
        await asyncio.sleep(10.0)
        assert sum(task.done() for task in waiting) == 11
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert looks < 200  # the loop's own looks included

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


def test_without_bounds_nothing_waits() -> None:
    """No suspension; what comes back of a refund is harmless, though the first stamp of a loop may be 0."""

    async def main():
        gate = Gate(None)
        for step in (gate.acquire(), gate.permit(), gate.__aenter__()):
            with pytest.raises(StopIteration):
                step.send(None)
        free = await gate.permit()
        gate.release()
        gate.release()
        assert not gate.is_scarce
        assert gate.is_unused
        gate.resize(None, 0.1)
        assert await gate.permit() == now() == 0.0
        gate.refund(free)
        assert not gate.is_unused
        await gate.permit()
        assert now() > 10.0

    run_virtual(main())


# --- bounds that change


class Use:
    """Who has slots of a gate and who waits for one, by number."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.inside: set[int] = set()
        self.order: list[int] = []
        self.waiting: set[int] = set()
        self.ends: dict[int, asyncio.Event] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def one(self, number: int) -> None:
        self.waiting.add(number)
        try:
            await self.gate.acquire()
        finally:
            self.waiting.remove(number)
        self.inside.add(number)
        self.order.append(number)
        try:
            await self.ends.setdefault(number, asyncio.Event()).wait()
        finally:
            self.inside.remove(number)
            self.gate.release()

    async def start(self, *numbers: int) -> None:
        self.tasks += [asyncio.ensure_future(self.one(number)) for number in numbers]
        await asyncio.sleep(0.001)

    async def end(self, *numbers: int) -> None:
        for number in numbers:
            self.ends[number].set()
        await asyncio.sleep(0.001)

    async def resize(self, limit: int | None, rate: float | None = None) -> None:
        self.gate.resize(limit, rate)
        await asyncio.sleep(0.001)

    async def end_all(self) -> None:
        while self.inside:
            await self.end(*self.inside)
        await asyncio.gather(*self.tasks)


def test_a_raised_limit_wakes_those_who_wait() -> None:
    """As many as there is room for, in order; those behind them go on waiting."""

    async def main():
        use = Use(Gate(1))
        await use.start(0, 1, 2, 3, 4, 5)
        assert use.inside == {0}
        await use.resize(3)
        assert use.inside == {0, 1, 2}
        await use.end(1)
        assert use.inside == {0, 2, 3}
        await use.resize(None)
        assert use.inside == {0, 2, 3, 4, 5}
        assert not use.gate.is_scarce
        await use.end_all()
        assert use.order == [0, 1, 2, 3, 4, 5]

    run_virtual(main())


@pytest.mark.parametrize("limit", [None, 5])
def test_a_lowered_limit_lets_what_runs_end_and_admits_nobody_before(limit: int | None) -> None:
    """What began without any limit counts too."""

    async def main():
        use = Use(Gate(limit))
        await use.start(0, 1, 2, 3, 4)
        await use.resize(2)
        assert use.inside == {0, 1, 2, 3, 4}
        await use.start(5, 6)
        await use.end(0, 1)
        assert use.inside == {2, 3, 4}
        await use.end(2)
        assert use.inside == {3, 4}, "two are not below two"
        await use.end(3)
        assert use.inside == {4, 5}
        await use.end_all()
        assert use.gate.is_unused

    run_virtual(main())


def test_who_is_cancelled_while_a_slot_is_handed_over_passes_it_on() -> None:
    """Whatever comes first, in one step of the loop: the slot or the cancellation."""

    async def main():
        for is_first in (True, False):
            use = Use(Gate(1))
            await use.start(0, 1, 2)
            if is_first:
                use.tasks[1].cancel()
            use.gate.resize(2, None)
            if not is_first:
                use.tasks[1].cancel()
            await asyncio.sleep(0.001)
            assert use.inside == {0, 2}
            await use.start(3)
            assert use.inside == {0, 2}
            await use.end(0)
            assert use.inside == {2, 3}
            with suppress(asyncio.CancelledError):
                await use.end_all()
            await asyncio.wait(use.tasks)
            assert use.gate.is_unused

    run_virtual(main())


def test_another_rate_holds_at_once_for_those_who_wait() -> None:
    """A permit in 1000 seconds becomes one a second, or free; what was used counts on."""

    async def main():
        gate = Gate(None, 0.001)
        await gate.permit()
        waiting = [asyncio.ensure_future(gate.permit()) for _ in range(6)]
        await asyncio.sleep(0.4)
        gate.resize(None, 1.0)
        await waiting[0]
        assert 1.0 < now() < 1.01
        gate.resize(None, 3.0)
        await asyncio.wait(waiting[1:3])
        assert now() < 1.01
        assert not waiting[3].done(), "three in a second"
        gate.resize(None, None)
        await asyncio.gather(*waiting)
        assert now() < 1.01
        gate.resize(None, 0.1)
        await gate.permit()
        assert 11.0 < now() < 11.02

    run_virtual(main())


def test_a_lower_rate_counts_what_was_used_under_the_higher() -> None:
    """10 a second, then 2: not until all but one of the ten are a second old."""

    async def main():
        gate = Gate(None, 10.0)
        for _ in range(10):
            await gate.permit()
            await asyncio.sleep(0.05)
        gate.resize(None, 2.0)
        await gate.permit()
        assert 1.4 < now() < 1.41
        await gate.permit()
        assert 1.45 < now() < 1.46
        await gate.permit()
        assert 2.4 < now() < 2.41

    run_virtual(main())


def test_a_gate_that_remembers_is_not_unused() -> None:
    """Forgotten too early, a mapping that starts again would have its permits twice, or its slots."""

    async def main():
        gate = Gate(1, 0.1)
        assert gate.is_unused
        gate.users = 1
        assert not gate.is_unused
        gate.users = 0
        await gate.permit()
        assert not gate.is_unused
        await asyncio.sleep(10.1)
        assert gate.is_unused
        await gate.acquire()
        assert not gate.is_unused

    run_virtual(main())


@pytest.mark.parametrize("seed", range(30))
def test_slots_hold_whatever_changes(seed: int) -> None:
    """Callers, cancellations and limits at any moment: nobody gets a slot over the limit of that moment, nobody waits
    while one is free, and nobody overtakes.
    """

    async def main():
        rng = random.Random(seed)
        limit = rng.choice((None, 1, 2, 5))
        gate, running, numbers, waiting, served, lost = Gate(limit), 0, 0, 0, [], 0

        async def use() -> None:
            nonlocal running, numbers, waiting
            await asyncio.sleep(rng.uniform(0, 50))
            number, numbers, waiting = numbers, numbers + 1, waiting + 1
            try:
                await gate.acquire()
            finally:
                waiting -= 1
            running += 1
            assert running <= (limit or inf)
            served.append(number)
            try:
                await asyncio.sleep(rng.uniform(0, 3))
            finally:
                running -= 1
                gate.release()

        async def use_or_give_up() -> None:
            nonlocal lost
            try:
                async with asyncio.timeout(rng.choice((None, None, rng.uniform(0, 60)))):
                    await use()
            except TimeoutError:
                lost += 1

        async def change() -> None:
            nonlocal limit
            for _ in range(40):
                await asyncio.sleep(rng.uniform(0, 2.5))
                limit = rng.choice((None, 1, 2, 3, 5, 8))
                gate.resize(limit, None)

        async def look() -> None:
            for _ in range(500):
                await asyncio.sleep(rng.uniform(0, 0.2))
                assert waiting == 0 or running >= (limit or inf)
                assert gate.is_scarce == (waiting > 0)

        async with asyncio.TaskGroup() as tasks:
            for step in (change(), look(), *(use_or_give_up() for _ in range(200))):
                tasks.create_task(step)
        assert served == sorted(served)
        assert lost
        assert gate.is_unused

    run_virtual(main())


@pytest.mark.parametrize("seed", range(30))
def test_permits_hold_whatever_changes(seed: int) -> None:
    """As with slots: each permit keeps to the rate of its moment, and counts what was used within the shortest period
    that has held since; nobody waits while there is a permit.
    """

    async def main():
        rng = random.Random(seed)
        rate = rng.choice((None, 0.5, 3.0))
        gate, used, since, waiting, numbers, served = Gate(None, rate), [], [(0.0, rate)], 0, 0, []

        def bounds(value: float) -> tuple[int, float]:
            limit = max(1, int(value))
            return limit, limit / value

        def period_since(stamp: float) -> float:
            ends = [*(at for at, _ in since[1:]), inf]
            held = [value for (_, value), end in zip(since, ends, strict=True) if end >= stamp]
            return min(bounds(value)[1] for value in held if value)

        async def use() -> None:
            nonlocal waiting, numbers
            await asyncio.sleep(rng.uniform(0, 50))
            number, numbers, waiting = numbers, numbers + 1, waiting + 1
            try:
                stamp = await gate.permit()
            finally:
                waiting -= 1
            served.append(number)
            if rate is None:
                assert stamp == -inf
                return
            assert stamp == now()
            assert sum(stamp - earlier <= period_since(earlier) for earlier in used) < bounds(rate)[0]
            used.append(stamp)
            if rng.random() < 0.2:
                await asyncio.sleep(rng.uniform(0, 2))
                gate.refund(stamp)
                used.remove(stamp)

        async def use_or_give_up() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(rng.choice((None, None, rng.uniform(0, 80)))):
                    await use()

        async def change() -> None:
            nonlocal rate
            for _ in range(20):
                await asyncio.sleep(rng.uniform(0, 5))
                rate = rng.choice((None, 0.2, 0.5, 1.5, 2.0, 3.9, 10.0))
                since.append((now(), rate))
                gate.resize(None, rate)
            await asyncio.sleep(60)
            rate = None
            gate.resize(None, None)

        async def look() -> None:
            for _ in range(500):
                await asyncio.sleep(rng.uniform(0, 0.2))
                assert gate.is_scarce == (waiting > 0)
                if waiting:
                    assert rate is not None
                    limit, period = bounds(rate)
                    assert sum(now() - earlier <= 1.0011 * period for earlier in used) >= limit

        async with asyncio.TaskGroup() as tasks:
            for step in (change(), look(), *(use_or_give_up() for _ in range(120))):
                tasks.create_task(step)
        assert served == sorted(served)

    run_virtual(main())


# --- slots that are lent


class Shared:
    """A lender of so many slots; another process's for all that the gates know."""

    def __init__(self) -> None:
        self.taken = 0
        self.most = 0
        self._slots = Gate(0)

    async def take(self, limit: int) -> None:
        self._slots.resize(limit, None)
        await self._slots.acquire()
        self.taken += 1
        self.most = max(self.most, self.taken)

    def give_back(self) -> None:
        self.taken -= 1
        self._slots.release()


def test_gates_with_one_lender_share_its_slots() -> None:
    """Never more than the limit of them all together; each is given back, by whoever gives up waiting too."""

    async def main():
        lender, rng, done = Shared(), random.Random(1), 0
        gates = [Gate(2, None, lender) for _ in range(3)]

        async def use(gate: Gate) -> None:
            nonlocal done
            with suppress(TimeoutError):
                async with asyncio.timeout(rng.choice((None, 0.5))), gate:
                    await asyncio.sleep(rng.uniform(0, 0.3))
                    done += 1

        await asyncio.gather(*(use(rng.choice(gates)) for _ in range(200)))
        assert lender.most == 2
        assert lender.taken == 0
        assert done > 100
        assert all(gate.is_unused for gate in gates)

    run_virtual(main())


def test_a_loan_goes_back_to_its_lender_after_the_gate_has_changed() -> None:
    """More slots than workers now, or another lender: what was lent is returned where it came from."""

    async def main():
        lender = Shared()
        gate = Gate(1, None, lender)
        await gate.acquire()
        gate.resize(5, None)
        await gate.acquire()
        gate.release()
        gate.release()
        assert lender.taken == 0
        assert gate.is_unused

    run_virtual(main())
