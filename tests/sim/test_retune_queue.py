"""A queue mapping that changes while it runs, on virtual time."""

import asyncio
from dataclasses import replace

import pytest
import structlog

from poller.core.model import FunctionSpec, Reply
from poller.core.retry import Backoff
from poller.runtime.circuit import Circuit
from poller.runtime.gate import Gate
from tests.sim.test_queue_runner import OK, THROTTLED, Setup, Target, run


def retune(setup: Setup, target: Target, gate: Gate | None = None, **batch) -> bool:
    """Another target and function, and other limits of a batch."""
    pipe = setup.runner._pipe
    mapping = replace(
        pipe.mapping, batch=replace(pipe.mapping.batch, **batch), function=FunctionSpec("g", "arn:g", "role")
    )
    return setup.runner.retune(replace(pipe, mapping=mapping, target=target, gate=gate or Gate(None)))


def test_the_next_batch_goes_to_the_new_target() -> None:
    """A long poll under way is not cut off: what it brings is invoked over the new pipe. Nothing comes twice."""

    async def main():
        old, new = Target(), Target()
        setup = Setup(old)
        setup.queue.send("1")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(3)
        assert retune(setup, new)
        setup.queue.send("2")
        await asyncio.sleep(1)
        assert (old.ids(), new.ids()) == ([["m0"]], [["m1"]])
        assert [message.receives for message in setup.queue.messages] == [1, 1]
        setup.runner.stop()
        await task
        assert setup.queue.left() == []

    run(main)


def test_what_is_in_flight_is_settled_as_it_began() -> None:
    """An invocation of an hour does not hold up the change, and its messages are deleted at its end."""

    async def main():
        old, new = Target(seconds=3600.0, timeout=3600.0), Target()
        setup = Setup(old, visibility=60.0)
        setup.queue.send("1")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(3)
        pipe = setup.runner._pipe
        assert retune(setup, new)
        setup.queue.send("2", "3")
        await asyncio.sleep(5)
        assert new.ids() == [["m1", "m2"]]
        over = asyncio.ensure_future(pipe.calls.over())
        await asyncio.sleep(5)
        assert not over.done(), "the old target is still in use"
        await asyncio.sleep(3600)
        assert over.done()
        setup.runner.stop()
        await task
        assert setup.queue.left() == []
        assert [message.receives for message in setup.queue.messages] == [1, 1, 1]

    run(main)


def test_a_held_batch_that_was_throttled_goes_to_the_new_target() -> None:
    """Repointing a mapping away from a function that is down is what operators do at night."""

    async def main():
        old, new = Target(lambda ids: THROTTLED), Target()
        setup = Setup(old, breaker=False)
        setup.queue.send("1", "2")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(20)
        assert retune(setup, new)
        await asyncio.sleep(6)
        assert new.ids() == [["m0", "m1"]]
        assert {message.receives for message in setup.queue.messages} == {1}
        setup.runner.stop()
        await task

    run(main)


def test_a_smaller_batch_size_holds_for_what_is_held() -> None:
    """A window that filled under the old size is delivered in batches of the new one."""

    async def main():
        target = Target()
        setup = Setup(target, size=100, window=10.0)
        setup.queue.send(*map(str, range(40)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(5)
        assert retune(setup, target, size=25)
        await asyncio.sleep(10)
        assert sorted(map(len, target.ids())) == [15, 25]
        setup.runner.stop()
        await task
        assert setup.queue.left() == []

    run(main)


def test_slots_of_the_new_gate_count() -> None:
    """A slot of the old function is given back to it, not to the new one."""

    async def main():
        old_gate, new_gate = Gate(1), Gate(1)
        old, new = Target(), Target(seconds=5.0)
        setup = Setup(old, gate=old_gate)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(3)
        assert retune(setup, new, new_gate)
        setup.queue.send(*map(str, range(30)))
        await asyncio.sleep(60)
        assert new.most_running == 1
        assert len(new.batches) == 3
        setup.runner.stop()
        await task
        async with asyncio.timeout(1):
            await old_gate.acquire()
            await new_gate.acquire()

    run(main)


def test_nobody_stays_in_the_line_of_another_function() -> None:
    """An invocation of 15 minutes has the old function's only slot: those who wait behind it go on with the new one."""

    async def main():
        gate = Gate(1)
        old, new = Target(seconds=900.0, timeout=900.0), Target()
        setup = Setup(old, gate=gate, visibility=60.0)
        setup.queue.send("1")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(3)
        for steps in range(4):  # again and again, before those who wait have noticed
            assert retune(setup, Target(), Gate(None))
            assert retune(setup, new, Gate(1))
            for _ in range(steps):
                await asyncio.sleep(0)
        setup.queue.send("2", "3")
        await asyncio.sleep(25)
        assert new.ids() == [["m1", "m2"]]
        assert not gate.is_scarce
        await asyncio.sleep(900)
        assert gate.is_unused
        setup.runner.stop()
        await task
        assert setup.queue.left() == []
        assert {message.receives for message in setup.queue.messages} == {1}

    run(main)


def test_more_slots_for_the_same_function_are_used_at_once() -> None:
    """max_concurrency from 1 to 2 while an invocation of 15 minutes runs; then from 2 to 1, and nobody gets in."""

    async def main():
        gate = Gate(1)
        target = Target(seconds=900.0, timeout=900.0)
        setup = Setup(target, gate=gate, size=1, visibility=60.0)
        setup.queue.send("1", "2", "3")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(30)
        assert target.running == 1
        gate.resize(2, None)
        await asyncio.sleep(1)
        assert target.ids() == [["m0"], ["m1"]]
        gate.resize(1, None)
        await asyncio.sleep(875)
        assert target.running == 1, "the second one; the third waits for it"
        gate.resize(None, None)
        await asyncio.sleep(1)
        assert target.ids() == [["m0"], ["m1"], ["m2"]]
        assert target.running == 2
        setup.runner.stop()
        await task

    run(main)


def test_a_permit_of_another_function_is_no_permit() -> None:
    """Loops that wait for the old function's rate, one in 50 seconds, go on at once at the new one's, in its slots."""

    async def main():
        old_gate, new_gate = Gate(None, 0.02), Gate(1)
        old, new = Target(seconds=0.0), Target(seconds=5.0)
        setup = Setup(old, gate=old_gate, visibility=600.0)
        setup.queue.send(*map(str, range(60)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(10)
        assert retune(setup, new, new_gate)
        await asyncio.sleep(29)
        assert len(new.batches) >= 5
        await asyncio.sleep(60)
        assert new.most_running == 1
        setup.runner.stop()
        await task
        assert len(old.batches) == 1
        assert setup.queue.left() == []
        assert new_gate.is_unused

    run(main)


def test_a_gate_that_changes_with_the_permit_is_seen() -> None:
    """The permit of the old function comes in the moment of the change: it is given back, and the new one asked for."""

    async def main():
        old_gate, new_gate = Gate(None, 0.01), Gate(None, 0.01)
        old, new = Target(), Target()
        setup = Setup(old, gate=old_gate, visibility=600.0)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(25)  # after an empty reply it takes no permit before it receives
        stamp = await old_gate.permit()
        await new_gate.permit()
        setup.queue.send("1")
        await asyncio.sleep(5)
        assert old_gate.is_scarce
        old_gate.refund(stamp)
        assert retune(setup, new, new_gate)
        await asyncio.sleep(90)
        assert not old.batches
        assert not new.batches
        assert old_gate.is_unused
        await asyncio.sleep(10)
        assert new.ids() == [["m0"]]
        setup.runner.stop()
        await task

    run(main)


def slow_to_probe(setup: Setup) -> None:
    """Backoff up to a minute."""
    setup.runner._context = replace(setup.runner._context, backoff=Backoff(1.0, 60.0, lambda: 1.0))
    if setup.runner._circuit:
        setup.runner._circuit = Circuit(setup.clock, setup.runner._context.backoff)


@pytest.mark.parametrize("breaker", [True, False])
def test_a_function_that_is_down_is_left_at_once(breaker: bool) -> None:
    """Its next probe, or the next try of what it throttled, is a minute away: the new function is asked at once, and
    about what is held.
    """

    async def main():
        old, new = Target(lambda ids: THROTTLED), Target()
        setup = Setup(old, breaker=breaker, visibility=600.0)
        slow_to_probe(setup)
        setup.queue.send("1", "2")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(200)
        tries = len(old.batches)
        while len(old.batches) == tries:
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        assert setup.runner.breaker == ("open" if breaker else "closed")
        with structlog.testing.capture_logs() as logs:
            assert retune(setup, new)
        assert ("circuit_closed" in [entry["event"] for entry in logs]) == breaker
        await asyncio.sleep(0.1)
        assert new.ids() == [["m0", "m1"]]
        assert setup.runner.breaker == "closed"
        setup.runner.stop()
        await task
        assert setup.queue.left() == []
        assert {message.receives for message in setup.queue.messages} == {1}

    run(main)


def test_an_open_circuit_without_messages_receives_again_at_once() -> None:
    """The loop that waits to receive for a probe is woken too."""

    async def main():
        old, new = Target(lambda ids: THROTTLED), Target()
        setup = Setup(old, visibility=20.0)
        slow_to_probe(setup)
        setup.queue.send("1")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(100)
        for _ in range(5):
            setup.runner._circuit.refused(60.0)
        setup.queue.messages.clear()
        assert retune(setup, new)
        setup.queue.send("2")
        await asyncio.sleep(21)
        assert new.ids()
        setup.runner.stop()
        await task

    run(main)


class Held(Target):
    """Answers when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()

    async def invoke(self, call) -> Reply:
        await super().invoke(call)
        await self.let_go.wait()
        return THROTTLED


def test_late_refusals_of_the_old_function_say_nothing_about_the_new() -> None:
    """Five invocations or more are under way at the change and refused: the circuit stays closed and what they held is
    tried at once. Refusals of the new function count as ever.
    """

    async def main():
        old, new = Held(), Target(seconds=3.0)
        setup = Setup(old, size=1, visibility=600.0)
        slow_to_probe(setup)
        setup.queue.send(*map(str, range(10)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(20)
        began = len(old.batches)
        assert began >= 5
        assert retune(setup, new)
        await asyncio.sleep(60)
        old.let_go.set()
        await asyncio.sleep(1)
        assert setup.runner.breaker == "closed"
        assert new.running == began
        await asyncio.sleep(5)
        assert sorted(new.ids()) == [[f"m{number}"] for number in range(10)]
        new.answer = lambda ids: THROTTLED
        setup.queue.send(*map(str, range(10)))
        await asyncio.sleep(60)
        assert setup.runner.breaker == "open"
        setup.runner.stop()
        await task

    run(main)


def test_concurrency_rises_and_falls() -> None:
    """MaximumConcurrency holds from the change on, for the loops that are there too."""

    async def main():
        target = Target(seconds=1.0)
        setup = Setup(target, max_concurrency=1)
        setup.queue.send(*map(str, range(2000)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(5)
        assert target.most_running == 1
        pipe = setup.runner._pipe
        wide = replace(pipe.mapping, queue=replace(pipe.mapping.queue, ceiling=8))
        assert setup.runner.retune(replace(pipe, mapping=wide))
        await asyncio.sleep(15)
        assert target.most_running == 8
        narrow = replace(pipe.mapping, queue=replace(pipe.mapping.queue, ceiling=2))
        assert setup.runner.retune(replace(pipe, mapping=narrow))
        await asyncio.sleep(2)
        target.most_running = 0
        await asyncio.sleep(5)
        assert target.most_running == 2
        setup.runner.stop()
        await task

    run(main)


def test_what_takes_a_new_runner_changes_nothing() -> None:
    """A window that comes or goes, and the circuit, are for the life of a runner."""

    async def main():
        target = Target()
        setup = Setup(target)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(1)
        pipe = setup.runner._pipe
        assert not retune(setup, Target(lambda ids: OK), window=3.0)
        no_circuit = replace(pipe.mapping, queue=replace(pipe.mapping.queue, circuit_breaker=False))
        assert not setup.runner.retune(replace(pipe, mapping=no_circuit))
        assert setup.runner._pipe is pipe
        setup.queue.send("1")
        await asyncio.sleep(1)
        assert target.ids() == [["m0"]]
        setup.runner.stop()
        await task

    run(main)


# --- a fleet


class Leases:
    """What the fleet gives this member."""

    is_alone = False

    def __init__(self, part: int) -> None:
        self.part = part
        self.changed = asyncio.Event()

    def slots(self, limit: int) -> int:
        return min(limit, self.part)

    def watch(self) -> asyncio.Event:
        return self.changed

    def set(self, part: int) -> None:
        self.part, changed, self.changed = part, self.changed, asyncio.Event()
        changed.set()


def test_maximum_concurrency_is_the_fleets() -> None:
    """A member has its part of it, follows when members come and go, and receives nothing without a part."""

    async def main():
        target = Target(seconds=1.0)
        setup = Setup(target, max_concurrency=6)
        pipe = setup.runner._pipe
        shared = replace(pipe.mapping, queue=replace(pipe.mapping.queue, shared=6))
        leases = setup.runner._leases = Leases(3)
        setup.runner._pipe = replace(pipe, mapping=shared)
        setup.runner._mapping = shared
        setup.queue.send(*map(str, range(3000)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(10)
        assert target.most_running == 3
        leases.set(6)
        await asyncio.sleep(10)
        assert target.most_running == 6
        leases.set(1)
        await asyncio.sleep(3)
        target.most_running = 0
        await asyncio.sleep(5)
        assert target.most_running == 1
        leases.set(0)
        await asyncio.sleep(3)
        target.most_running, receives = 0, len(setup.queue.receives)
        await asyncio.sleep(60)
        assert target.most_running == 0
        assert len(setup.queue.receives) == receives
        leases.set(2)
        await asyncio.sleep(5)
        assert target.most_running == 2
        setup.runner.stop()
        await task

    run(main)
