"""The circuit as something to wait for, on virtual time: who may begin, in which order, and who is woken."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from poller.core.retry import Backoff
from poller.runtime.circuit import Circuit
from tests.sim.loop import EPOCH, VirtualClock, run_virtual

LONGEST = Backoff(0.25, 60.0, lambda: 1.0)  # the first probe 4 s after the circuit opened, then 8, 16, 32, 60


def new() -> Circuit:
    return Circuit(VirtualClock(asyncio.get_running_loop()), LONGEST)


def opened() -> Circuit:
    circuit = new()
    assert [circuit.refused(None) for _ in range(5)][-1] is True
    assert circuit.state == "open"
    return circuit


def now() -> float:
    return asyncio.get_running_loop().time()


async def invoke(circuit: Circuit) -> float:
    """As a receive loop does it: hold, wait, ask, wait again. When it began."""
    circuit.hold()
    try:
        while True:
            await circuit.wait_to_invoke()
            if circuit.invoke():
                return now()
    finally:
        circuit.let_go()


async def receive(circuit: Circuit) -> float:
    while True:
        await circuit.wait_to_receive()
        if circuit.receive():
            return now()


def start(*waits: Awaitable[float]) -> list["asyncio.Task[float]"]:
    return [asyncio.ensure_future(wait) for wait in waits]


async def end(*tasks: "asyncio.Task[float]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def began(tasks: list["asyncio.Task[float]"]) -> list[float]:
    return [task.result() for task in tasks if task.done()]


def test_closed_nobody_waits() -> None:
    """Any number of invocations and receives at once, and ends of them change nothing."""

    async def main():
        circuit = new()
        assert await asyncio.gather(*(invoke(circuit) for _ in range(50))) == [0.0] * 50
        assert await asyncio.gather(*(receive(circuit) for _ in range(50))) == [0.0] * 50
        for _ in range(50):
            circuit.received()
            assert circuit.ran() is False
        circuit.cut_off()
        assert circuit.state == "closed"
        assert await receive(circuit) == 0.0

    run_virtual(main())


def test_one_probe_at_a_time_after_the_delay() -> None:
    """Of many holders one begins, the others wait for what it hears; each refusal makes the wait longer."""

    async def main():
        circuit = opened()
        holders = start(*(invoke(circuit) for _ in range(20)))
        await asyncio.sleep(3.999)
        assert began(holders) == []
        await asyncio.sleep(1)
        assert began(holders) == [4.0]
        assert circuit.state == "probing"
        await asyncio.sleep(100)
        assert began(holders) == [4.0]
        assert circuit.refused(None) is False
        await asyncio.sleep(100)
        assert began(holders) == [4.0, pytest.approx(104.999 + 8)]
        assert circuit.ran() is True
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(began(holders)) == 20

    run_virtual(main())


def test_a_delay_that_gets_longer_while_somebody_waits_holds_for_him() -> None:
    """Who has not been the probe waits for the new time, not for the one that he was told."""

    async def main():
        circuit = opened()
        holders = start(invoke(circuit), invoke(circuit))
        await asyncio.wait(holders, return_when=asyncio.FIRST_COMPLETED)
        circuit.refused(30.0)
        await asyncio.wait(holders)
        assert sorted(began(holders)) == [4.0, 34.0]

    run_virtual(main())


def test_closing_wakes_everybody_at_once() -> None:
    """Holders and receivers; nobody sleeps on to the old time."""

    async def main():
        circuit = opened()
        waiting = start(*(invoke(circuit) for _ in range(5)), *(receive(circuit) for _ in range(5)))
        await asyncio.sleep(1)
        assert circuit.ran() is True
        await asyncio.wait(waiting)
        assert began(waiting) == [1.0] * 10

    run_virtual(main())


def test_holders_come_before_receivers() -> None:
    """While anybody waits with messages in hand, nothing is received to probe with."""

    async def main():
        circuit = opened()
        receivers = start(*(receive(circuit) for _ in range(3)))
        await asyncio.sleep(1)
        holders = start(invoke(circuit), invoke(circuit))
        await asyncio.wait(holders, return_when=asyncio.FIRST_COMPLETED)
        assert circuit.refused(None) is False
        await asyncio.sleep(1000)
        assert sorted(began(holders)) == [4.0, 12.0]
        assert began(receivers) == []
        circuit.refused(None)  # nobody holds anything any more
        await asyncio.sleep(16.1)
        assert began(receivers) == [pytest.approx(1020.0)]
        await end(*receivers)

    run_virtual(main())


def test_one_scout_where_nobody_holds_anything() -> None:
    """One receive at the time of the probe; the next one when it has brought nothing."""

    async def main():
        circuit = opened()
        receivers = start(*(receive(circuit) for _ in range(3)))
        await asyncio.sleep(30)
        assert began(receivers) == [4.0]
        circuit.received()
        await asyncio.sleep(30)
        assert began(receivers) == [4.0, 30.0]
        circuit.received()
        await asyncio.sleep(0.1)
        assert began(receivers) == [4.0, 30.0, 60.0]

    run_virtual(main())


def test_what_a_scout_brought_is_the_probe() -> None:
    """Its holder begins at once and nobody receives meanwhile; not even when its receive is over."""

    async def main():
        circuit = opened()
        assert await receive(circuit) == 4.0
        [other] = start(receive(circuit))
        await asyncio.sleep(1)
        circuit.received()
        assert await invoke(circuit) == 5.0
        await asyncio.sleep(30)
        assert not other.done()
        circuit.ran()
        assert await other == 35.0

    run_virtual(main())


def test_receives_that_were_under_way_when_it_opened_are_the_scouts() -> None:
    """Long polls may last 20 s more: no other one begins beside them, nor one for each that ends."""

    async def main():
        circuit = new()
        for _ in range(3):
            await receive(circuit)
        for _ in range(5):
            circuit.refused(None)
        receivers = start(*(receive(circuit) for _ in range(3)))
        await asyncio.sleep(10)
        circuit.received()
        circuit.received()
        await asyncio.sleep(10)
        assert began(receivers) == []
        circuit.received()
        await asyncio.sleep(10)
        assert began(receivers) == [20.0]
        await end(*receivers)

    run_virtual(main())


def test_a_scout_of_an_earlier_outage_still_counts() -> None:
    """It closed and opened again while the scout polled and others began and ended: still one at a time."""

    async def main():
        circuit = opened()
        await receive(circuit)  # the scout
        circuit.ran()
        await receive(circuit)
        circuit.received()
        for _ in range(5):
            circuit.refused(None)
        [other] = start(receive(circuit))
        await asyncio.sleep(30)
        assert not other.done()
        circuit.received()
        assert await other == 34.0

    run_virtual(main())


def test_a_receive_that_must_not_begin_leaves_no_trace() -> None:
    """Refused while open, and while somebody holds; `received` then ends nothing that was not begun."""

    async def main():
        circuit = opened()
        assert circuit.receive() is False
        assert circuit.invoke() is False
        [holder] = start(invoke(circuit))
        await asyncio.sleep(3)
        assert circuit.receive() is False
        await holder
        assert circuit.receive() is False
        circuit.ran()
        assert circuit.receive() is True

    run_virtual(main())


def test_a_holder_that_waits_for_the_function_still_holds() -> None:
    """Between the circuit and the call there may be a slot to wait for: nobody receives in that gap."""

    async def main():
        circuit = opened()
        circuit.hold()
        await circuit.wait_to_invoke()
        assert now() == 4.0
        assert circuit.receive() is False
        assert circuit.invoke() is True
        circuit.let_go()

    run_virtual(main())


def test_a_cancelled_holder_makes_room_for_a_scout() -> None:
    """Its messages are gone: others must find some to probe with."""

    async def main():
        circuit = opened()
        [holder] = start(invoke(circuit))
        await asyncio.sleep(1)
        [receiver] = start(receive(circuit))  # has no time to wake at while somebody holds
        await asyncio.sleep(1)
        await end(holder)
        assert await receiver == 4.0

    run_virtual(main())


def test_cancelled_waiters_wake_nobody_wrongly() -> None:
    """The others keep waiting for the right time."""

    async def main():
        circuit = opened()
        holders = start(*(invoke(circuit) for _ in range(6)))
        await asyncio.sleep(1)
        await end(*holders[::2])
        await asyncio.sleep(2.999)
        assert began(holders[1::2]) == []
        await asyncio.sleep(1)
        assert began(holders[1::2]) == [4.0]
        await end(*holders[1::2])

    run_virtual(main())


def test_a_probe_cut_off_lets_another_begin_at_once() -> None:
    """Without it everybody would wait for ever for its answer."""

    async def main():
        circuit = opened()
        holders = start(*(invoke(circuit) for _ in range(3)))
        await asyncio.sleep(10)
        assert began(holders) == [4.0]
        circuit.cut_off()
        await asyncio.sleep(10)
        assert began(holders) == [4.0, 10.0]
        assert circuit.state == "probing"
        await end(*holders)

    run_virtual(main())


def test_cut_off_while_open_changes_nothing() -> None:
    """An invocation of before the outage; the probe waits for its time."""

    async def main():
        circuit = opened()
        [holder] = start(invoke(circuit))
        await asyncio.sleep(1)
        circuit.cut_off()
        assert await holder == 4.0

    run_virtual(main())


@pytest.mark.parametrize("wait", [invoke, receive])
def test_waiting_looks_only_when_there_is_news(wait: Callable[[Circuit], Awaitable[float]]) -> None:
    """An outage of an hour with a probe that hangs: nobody polls the breaker."""

    async def main():
        circuit = opened()
        assert await invoke(circuit) == 4.0  # hangs
        looks = 0
        probe_at = circuit._breaker.probe_at

        def counted() -> float:
            nonlocal looks
            looks += 1
            return probe_at()

        circuit._breaker.probe_at = counted  # type: ignore[method-assign]
        waiting = start(*(wait(circuit) for _ in range(10)))
        await asyncio.sleep(3600)
        assert looks <= 30
        circuit.ran()
        await asyncio.wait(waiting)
        assert began(waiting) == [3604.0] * 10
        assert looks <= 100

    run_virtual(main())


def test_a_probe_time_that_floats_cannot_hit_is_waited_out() -> None:
    """Odd delays end: nobody wakes a moment before the time and asks for ever."""

    async def main():
        for delay in (1 / 3, 0.1, 1e-7, 7e-8, 1 / 7, 59.999_999_9):
            circuit = Circuit(
                VirtualClock(asyncio.get_running_loop()), Backoff(0.25, 60.0, lambda delay=delay: delay / 4)
            )
            for _ in range(5):
                circuit.refused(None)
            at = circuit._breaker.probe_at() - EPOCH
            assert await invoke(circuit) == pytest.approx(at, abs=1e-6)

    run_virtual(main())
