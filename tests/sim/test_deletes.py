"""Deletes on virtual time: when calls are sent, how full they are, and who hears of which misses."""

import asyncio
import random
from collections import Counter

import pytest

from poller.core.model import Record
from poller.runtime.deletes import Deletes
from tests.sim.loop import run_virtual

LINGER = 0.02


class Queue:
    """Records calls: when, and the ids. A call takes `seconds`; what is in `stuck` is not deleted."""

    def __init__(self, seconds: float = 0.1) -> None:
        self.seconds = seconds
        self.calls: list[tuple[float, list[str]]] = []
        self.ended = 0
        self.stuck: set[str] = set()
        self.slow: dict[str, float] = {}

    async def delete(self, records):
        ids = [record.id for record in records]
        self.calls.append((now(), ids))
        await asyncio.sleep(max([self.slow.get(id_, self.seconds) for id_ in ids], default=self.seconds))
        self.ended += 1
        return [record for record in records if record.id in self.stuck]

    def sizes(self) -> list[int]:
        return [len(ids) for _, ids in self.calls]

    def ids(self) -> list[str]:
        return [id_ for _, ids in self.calls for id_ in ids]


def now() -> float:
    return asyncio.get_running_loop().time()


def records(*names: str) -> list[Record]:
    return [Record(name, "", 0.0, b"{}", f"handle of {name}") for name in names]


def many(prefix: str, count: int) -> list[Record]:
    return records(*(f"{prefix}{n}" for n in range(count)))


def run(scenario, queue: Queue) -> None:
    async def main():
        async with asyncio.TaskGroup() as tasks:
            await scenario(Deletes(queue, tasks))

    run_virtual(main())


@pytest.mark.parametrize("count", [1, 9, 10, 11, 20, 25, 10_000])
def test_alone_at_once_in_one_call(count: int) -> None:
    """Nobody else deletes: nothing is waited for. The source makes tens of it."""
    queue = Queue()

    async def scenario(deletes):
        assert await deletes.delete(many("m", count)) == 0
        assert now() == pytest.approx(0.1)

    run(scenario, queue)
    assert queue.calls == [(0.0, [f"m{n}" for n in range(count)])]


def test_one_after_the_other_never_waits() -> None:
    """The load of one loop: each delete is alone."""
    queue = Queue()

    async def scenario(deletes):
        for n in range(5):
            await deletes.delete(records(str(n)))

    run(scenario, queue)
    assert [at for at, _ in queue.calls] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_under_load_small_batches_share_calls_of_ten() -> None:
    """A hundred loops that delete one message each: eleven calls, not a hundred."""
    queue = Queue()

    async def scenario(deletes):
        first = asyncio.ensure_future(deletes.delete(records("first")))
        await asyncio.sleep(0.01)
        assert await asyncio.gather(*(deletes.delete(records(str(n))) for n in range(100))) == [0] * 100
        await first

    run(scenario, queue)
    assert queue.sizes() == [1] + [10] * 10
    assert {at for at, _ in queue.calls} == {0.0, 0.01}  # a full call lingers no more


def test_what_begins_at_the_same_moment_shares_without_waiting() -> None:
    """The first one has not been sent yet."""
    queue = Queue()

    async def scenario(deletes):
        await asyncio.gather(*(deletes.delete(records(str(n))) for n in range(4)))

    run(scenario, queue)
    assert queue.calls == [(0.0, ["0", "1", "2", "3"])]


def test_a_call_that_does_not_fill_goes_after_the_linger() -> None:
    """Counted from its first message; late ones ride along."""
    queue = Queue()

    async def scenario(deletes):
        async with asyncio.TaskGroup() as group:
            group.create_task(deletes.delete(records("busy")))
            await asyncio.sleep(0.05)
            group.create_task(deletes.delete(records("a")))
            await asyncio.sleep(0.015)
            group.create_task(deletes.delete(records("b", "c")))

    run(scenario, queue)
    assert queue.calls == [(0.0, ["busy"]), (pytest.approx(0.07), ["a", "b", "c"])]


def test_what_does_not_fit_sends_the_waiting_call_at_once() -> None:
    """Six and six: two calls, the first without waiting for more."""
    queue = Queue()

    async def scenario(deletes):
        async with asyncio.TaskGroup() as group:
            group.create_task(deletes.delete(records("busy")))
            await asyncio.sleep(0.05)
            group.create_task(deletes.delete(many("a", 6)))
            await asyncio.sleep(0.01)
            group.create_task(deletes.delete(many("b", 6)))
            await asyncio.sleep(0.005)
            group.create_task(deletes.delete(many("c", 4)))

    run(scenario, queue)
    assert queue.sizes() == [1, 6, 10]
    assert [at for at, _ in queue.calls] == pytest.approx([0.0, 0.06, 0.065])


def test_full_tens_wait_for_nobody_and_the_rest_shares() -> None:
    """25 under load: 20 at once, 5 within the linger, and not after the end of a slow first call."""
    queue = Queue()
    queue.slow = {"m0": 30.0}

    async def scenario(deletes):
        async with asyncio.TaskGroup() as group:
            group.create_task(deletes.delete(records("busy")))
            await asyncio.sleep(0.01)
            group.create_task(deletes.delete(many("m", 25)))
            await asyncio.sleep(0.01)
            group.create_task(deletes.delete(many("n", 5)))

    run(scenario, queue)
    assert queue.sizes() == [1, 20, 10]
    assert [at for at, _ in queue.calls] == pytest.approx([0.0, 0.01, 0.02])


def test_each_caller_hears_of_its_own_misses() -> None:
    """Of a shared call, of full tens, of both."""
    queue = Queue()
    queue.stuck = {"b1", "b2", "c0", "d3", "d21", "d22"}

    async def scenario(deletes):
        busy = asyncio.ensure_future(deletes.delete(records("busy")))
        await asyncio.sleep(0.01)
        parts = [many("a", 2), many("b", 3), many("c", 1), many("d", 24), many("e", 10)]
        assert await asyncio.gather(*(deletes.delete(part) for part in parts)) == [0, 2, 1, 3, 0]
        assert await busy == 0

    run(scenario, queue)


def test_a_cancelled_caller_takes_nobodys_delete_with_it() -> None:
    """Neither while the call fills nor while it is under way; its own messages are deleted too."""
    queue = Queue()

    async def scenario(deletes):
        busy = asyncio.ensure_future(deletes.delete(records("busy")))
        await asyncio.sleep(0.01)
        one, two, three = (asyncio.ensure_future(deletes.delete(records(name))) for name in ("1", "2", "3"))
        await asyncio.sleep(0.01)
        one.cancel()
        await asyncio.sleep(0.03)
        assert queue.sizes() == [1, 3]
        two.cancel()
        assert await three == 0
        assert one.cancelled()
        assert two.cancelled()
        await busy

    run(scenario, queue)
    assert sorted(queue.ids()) == ["1", "2", "3", "busy"]
    assert queue.ended == 2


def test_a_cancelled_caller_of_many_leaves_the_shared_rest_to_the_others() -> None:
    """Its full tens end with it, what it shares does not."""
    queue = Queue()

    async def scenario(deletes):
        busy = asyncio.ensure_future(deletes.delete(records("busy")))
        await asyncio.sleep(0.01)
        big = asyncio.ensure_future(deletes.delete(many("m", 12)))
        other = asyncio.ensure_future(deletes.delete(records("other")))
        await asyncio.sleep(0.005)
        big.cancel()
        assert await other == 0
        await busy

    run(scenario, queue)
    assert queue.sizes() == [1, 10, 3]
    assert queue.ended == 2


def test_cut_off_ends_calls_that_nobody_waits_for() -> None:
    """A stop whose grace is over does not wait for a queue that hangs; the task group ends."""
    queue = Queue(seconds=3600)

    async def scenario(deletes):
        callers = [asyncio.ensure_future(deletes.delete(records(name))) for name in ("1", "2")]
        await asyncio.sleep(0.01)
        callers.append(asyncio.ensure_future(deletes.delete(records("3"))))
        await asyncio.sleep(0.01)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        deletes.cut_off()

    async def main():
        async with asyncio.TaskGroup() as tasks:
            await scenario(Deletes(queue, tasks))
        assert now() == pytest.approx(0.02)

    run_virtual(main())
    assert queue.sizes() == [2]
    assert queue.ended == 0


def test_cut_off_of_nothing_is_nothing() -> None:
    """Ended calls are forgotten."""
    queue = Queue()

    async def scenario(deletes):
        deletes.cut_off()
        await deletes.delete(records("1"))
        assert not deletes._running
        deletes.cut_off()

    run(scenario, queue)


@pytest.mark.parametrize("seed", range(30))
def test_every_message_is_sent_once_and_soon(seed: int) -> None:
    """Any sizes at any moment, callers cancelled, misses: one call each, at most ten in a shared one, within the linger."""
    rng = random.Random(seed)
    queue = Queue(seconds=0.05)
    asked: dict[str, float] = {}

    async def scenario(deletes):
        async def caller(name: str, size: int) -> None:
            await asyncio.sleep(rng.random())
            batch = many(f"{name}.", size)
            asked.update({record.id: now() for record in batch})
            queue.stuck.update(record.id for record in batch if rng.random() < 0.1)
            missed = await deletes.delete(batch)
            assert missed == sum(record.id in queue.stuck for record in batch)

        sizes = [rng.choice((1, 1, 2, 3, 7, 9, 10, 11, 35)) for _ in range(200)]
        callers = [asyncio.ensure_future(caller(str(n), size)) for n, size in enumerate(sizes)]
        for victim in rng.sample(callers, 20):
            asyncio.get_running_loop().call_later(rng.random() * 1.2, victim.cancel)
        await asyncio.wait(callers)
        assert all(task.cancelled() or task.exception() is None for task in callers)

    run(scenario, queue)
    assert Counter(queue.ids()) == Counter(asked.keys())
    for at, ids in queue.calls:
        assert len(ids) <= 10 or len({id_.split(".")[0] for id_ in ids}) == 1
        assert all(asked[id_] <= at <= asked[id_] + LINGER + 1e-9 for id_ in ids)
