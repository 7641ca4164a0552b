"""A queue mapping that changes while it runs, on virtual time."""

import asyncio
from dataclasses import replace

from poller.core.model import FunctionSpec
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
