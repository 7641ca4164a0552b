"""One queue's runner on virtual time: outcomes, windows, capacity, stops; then seeded worlds."""

import asyncio
import gc
import json
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from asyncio_throttle import throttler

from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    FunctionSpec,
    Mapping,
    QueuePolicy,
    Reply,
    ReplyStatus,
    RetryPolicy,
    SourceKind,
    SourceSpec,
)
from poller.core.retry import Backoff
from poller.core.scaling import INITIAL
from poller.errors import SourceGone, SourceThrottled, SourceUnavailable
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context, LastResult, Pipe
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.queue_runner import QueueRunner
from poller.runtime.receive_loop import ReceiveLoop
from poller.stores.memory import MemoryStore
from tests.fakes.leases import alone
from tests.fakes.observer import CountingObserver
from tests.fakes.queue import FakeQueue, Message
from tests.sim.loop import VirtualClock, VirtualLoop

OK = Reply(ReplyStatus.OK)
ERROR = Reply(ReplyStatus.FUNCTION_ERROR, error="500")
UNREACHABLE = Reply(ReplyStatus.UNREACHABLE, error="refused")
THROTTLED = Reply(ReplyStatus.THROTTLED, error="429")


def failures(*names: str) -> Reply:
    items = [{"itemIdentifier": name} for name in names]
    return Reply(ReplyStatus.OK, json.dumps({"batchItemFailures": items}).encode())


class Target:
    """`answer(ids)` decides; `batches` are the ids of each call with the time it began."""

    capacity = None

    def __init__(self, answer=lambda ids: OK, seconds: float = 0.05, timeout: float = 10.0) -> None:
        self.answer = answer
        self.seconds = seconds
        self.timeout = timeout
        self.batches: list[tuple[float, list[str]]] = []
        self.running = 0
        self.most_running = 0

    async def invoke(self, call) -> Reply:
        ids = [record["id"] for record in json.loads(call.payload)["Records"]]
        self.batches.append((asyncio.get_running_loop().time(), ids))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
            return self.answer(ids)
        finally:
            self.running -= 1

    def ids(self) -> list[list[str]]:
        return [ids for _, ids in self.batches]


class Setup:
    """A queue, a target and the runner between them."""

    def __init__(self, target: Target, **more: Any) -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        rng = more.get("rng", random.Random(1))
        trouble = Backoff(0.5, 5.0, lambda: 1.0)
        self.clock = clock
        self.target = target
        self.queue = more.get("queue") or FakeQueue(clock, more.get("visibility", 30.0), fifo=more.get("fifo", False))
        self.observer = CountingObserver()
        store = MemoryStore()
        self.budget = ByteBudget(more.get("budget", 10**9))
        context = Context(
            clock, rng, store, Checkpointer(store, clock, 0.1, trouble), self.budget,
            Backoff(1.0, 5.0, lambda: 1.0), trouble, alone(store, clock),
        )  # fmt: skip
        mapping = Mapping(
            id="m",
            source=SourceSpec(SourceKind.SQS, "arn", "r", "1", "q", more.get("fifo", False)),
            function=FunctionSpec("f", "arn", "role"),
            batch=BatchPolicy(more.get("size", 10), more.get("window", 0.0), max_bytes=more.get("max_bytes", 10**6)),
            retry=RetryPolicy(report_failures=more.get("report", False)),
            start=TRIM_HORIZON,
            queue=QueuePolicy(
                more.get("max_concurrency") or 1250,
                more.get("floor", 1),
                more.get("growth", 300.0),
                more.get("breaker", True),
            ),
        )

        async def open_queue() -> FakeQueue:
            return self.queue

        self.result = LastResult()
        self.runner = QueueRunner(
            context,
            Pipe(
                mapping,
                self.result,
                target,
                more.get("gate", Gate(None)),
                self.observer,
                None,
                None,
                open_queue,
                matches=more.get("matches"),
            ),
        )

    async def run_for(self, seconds: float, grace: float = 60.0) -> float:
        """Run, then stop; answers how long the stop took."""
        task = asyncio.ensure_future(self.runner.run())
        await asyncio.sleep(seconds)
        assert not task.done()
        asked = self.clock.now()
        self.runner.stop(grace)
        await task
        return self.clock.now() - asked


def run(main) -> Any:
    loop = VirtualLoop()
    try:
        result = loop.run_until_complete(main())
        assert not asyncio.all_tasks(loop)
        return result
    finally:
        loop.close()


def test_success_deletes_all() -> None:
    """Every message of a successful batch is deleted, once."""

    async def main():
        setup = Setup(Target())
        setup.queue.send(*"abcdefghijkl")
        await setup.run_for(5)
        assert not setup.queue.left()
        assert sorted(len(ids) for ids in setup.target.ids()) == [2, 10]
        assert setup.observer.counts["deleted"] == 12

    run(main)


def test_an_error_deletes_nothing_and_leaves_visibility_alone() -> None:
    """The messages come back when their visibility runs out, not before."""

    async def main():
        setup = Setup(Target(lambda ids: ERROR))
        setup.queue.send("a")
        await setup.run_for(40)
        first, second = [at for at, _ in setup.target.batches]
        assert second - first >= 30
        assert not setup.queue.returned
        assert setup.result.text == "PROBLEM: Function call failed"

    run(main)


def test_a_partial_answer_deletes_exactly_what_was_not_named() -> None:
    """No order is inferred."""

    async def main():
        setup = Setup(Target(lambda ids: failures("m1") if "m1" in ids else OK), report=True)
        setup.queue.send("a", "b", "c")
        await setup.run_for(5)
        assert [message.id for message in setup.queue.left()] == ["m1"]

    run(main)


def test_a_throttled_batch_is_held_and_stays_ours() -> None:
    """Tried again in memory for hours with its visibility kept alive: no receive is spent on it."""

    async def main():
        healed_at = 3 * 3600.0
        setup = Setup(Target(lambda ids: OK if asyncio.get_running_loop().time() > healed_at else THROTTLED))
        setup.queue.send("a")
        await setup.run_for(healed_at + 30)
        assert not setup.queue.left()
        assert setup.queue.messages[0].receives == 1
        assert len(setup.target.batches) > 1000

    run(main)


def test_a_held_message_is_let_go_after_twelve_hours() -> None:
    """SQS ends a message's invisibility then, whatever is asked for; it is forgotten and received anew."""

    async def main():
        setup = Setup(Target(lambda ids: THROTTLED))
        setup.queue.send("a")
        await setup.run_for(43_150)
        assert setup.queue.messages[0].receives == 1
        again = Setup(Target(lambda ids: THROTTLED))
        again.queue.send("a")
        await again.run_for(43_300)
        assert again.queue.messages[0].receives == 2

    run(main)


@pytest.mark.parametrize("fifo", [False, True])
def test_an_expired_receipt_is_never_invoked(fifo: bool) -> None:
    """Where visibility cannot be extended a message is not ours any more: neither it nor, in its group, what follows."""

    async def main():
        queue = FakeQueue(VirtualClock(asyncio.get_running_loop()), 8.0, fifo=fifo)
        queue.deaf = lambda: True

        def answer(ids):
            for message in queue.messages:
                if message.id in ids:
                    assert message.visible_at > queue.clock.now(), "somebody else may have it"
            return THROTTLED

        setup = Setup(Target(answer, seconds=0.0), queue=queue, fifo=fifo)
        queue.send("a", "b", group="g" if fifo else "")
        await setup.run_for(60)
        assert {message.receives for message in queue.messages} == {7}

    run(main)


def test_a_group_whose_visibility_ended_under_our_hands_is_not_run_twice_at_once() -> None:
    """FIFO, after a suspend for example: the group is received again while its first attempt still runs."""

    async def main():
        queue = FakeQueue(VirtualClock(asyncio.get_running_loop()), 8.0, fifo=True)
        queue.deaf = lambda: True
        setup = Setup(Target(seconds=20, timeout=25.0), queue=queue, fifo=True, size=1)
        queue.send("a", "b", group="g")
        await setup.run_for(200)
        assert setup.target.most_running == 1

    run(main)


@pytest.mark.parametrize(
    "shape", [{}, {"fifo": True}, {"size": 100, "window": 60.0}, {"max_concurrency": 1, "size": 1}]
)
def test_visibility_is_kept_while_a_message_is_held(shape: dict) -> None:
    """In a window, in flight, whatever takes longer than the queue's own timeout: each message runs once."""

    async def main():
        setup = Setup(Target(seconds=100, timeout=900.0), visibility=5.0, **shape)
        setup.queue.send("a", "b", group="g" if setup.queue.fifo else "")
        await setup.run_for(300)
        assert sorted(name for ids in setup.target.ids() for name in ids) == ["m0", "m1"]
        assert [message.receives for message in setup.queue.messages] == [1, 1]
        assert not setup.queue.left()

    run(main)


def test_visibility_is_kept_while_the_function_is_busy_with_others() -> None:
    """A window ends and another mapping has the only slot: what was gathered waits, and stays ours."""

    async def main():
        gate = Gate(1)
        setup = Setup(Target(timeout=5.0), visibility=6.0, size=100, window=2.0, gate=gate)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(1)
        setup.queue.send("a")
        await asyncio.sleep(1)
        async with gate:
            await asyncio.sleep(120)
            assert not setup.target.batches
        await asyncio.sleep(1)
        assert setup.queue.messages[0].receives == 1
        assert not setup.queue.left()
        setup.runner.stop()
        await task

    run(main)


def test_a_window_does_not_hold_the_function() -> None:
    """It may last five minutes, and another mapping may want the slot."""

    async def main():
        gate = Gate(1)
        gate.users = 2
        setup = Setup(Target(), size=100, window=300.0, gate=gate)
        setup.queue.send("a")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(5)
        began = asyncio.get_running_loop().time()
        async with gate:
            assert asyncio.get_running_loop().time() - began < 2
        setup.runner.stop()
        await task

    run(main)


def test_a_window_outlasts_a_receive_that_fails() -> None:
    """What was gathered is delivered at the window's end; it was received once."""

    async def main():
        setup = Setup(Target(timeout=1.0), size=25, window=5.0, visibility=40.0)

        def trouble():
            if setup.queue.receives and asyncio.get_running_loop().time() < 4:
                raise SourceThrottled("slow")

        setup.queue.trouble = trouble
        setup.queue.send("a")
        await setup.run_for(60)
        [(at, ids)] = setup.target.batches
        assert ids == ["m0"]
        assert 5 <= at < 5.5
        assert setup.queue.messages[0].receives == 1

    run(main)


def test_a_target_that_is_down_raises_no_receive_counts() -> None:
    """Two minutes of refusals: the circuit opens, one batch at a time probes, and nothing else is received."""

    async def main():
        down = (20.0, 140.0)
        time = asyncio.get_running_loop().time

        def answer(ids):
            return UNREACHABLE if down[0] < time() < down[1] else OK

        setup = Setup(Target(answer), visibility=5.0)
        task = asyncio.ensure_future(setup.runner.run())
        for _ in range(20):
            setup.queue.send(*map(str, range(50)))
            await asyncio.sleep(1.3)
        await asyncio.sleep(60)
        assert setup.runner.breaker != "closed"
        received = len(setup.queue.receives)
        setup.queue.send(*map(str, range(500)))
        called = len(setup.target.batches)
        await asyncio.sleep(40)
        assert len(setup.queue.receives) == received
        assert len(setup.target.batches) - called < 20
        await asyncio.sleep(60)
        assert not setup.queue.left()
        assert setup.runner.breaker == "closed"
        assert max(message.receives for message in setup.queue.messages) == 1
        setup.runner.stop()
        await task

    run(main)


def test_without_a_breaker_receiving_goes_on() -> None:
    """`CircuitBreaker: false`: the loops fill with batches that wait, and stay theirs."""

    async def main():
        setup = Setup(Target(lambda ids: THROTTLED), breaker=False, visibility=5.0)
        setup.queue.send(*map(str, range(100)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(60)
        assert setup.runner.breaker == "closed"
        setup.target.answer = lambda ids: OK
        await asyncio.sleep(60)
        assert not setup.queue.left()
        assert max(message.receives for message in setup.queue.messages) == 1
        setup.runner.stop()
        await task

    run(main)


def test_an_open_circuit_without_a_message_is_probed_with_the_next() -> None:
    """The batch that opened it expired; else nobody would ever look again."""

    async def main():
        setup = Setup(Target(lambda ids: THROTTLED), visibility=2.0, max_concurrency=1)
        setup.queue.deaf = lambda: True
        setup.queue.send("a")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(100)
        assert setup.runner.breaker != "closed"
        setup.target.answer = lambda ids: OK
        await asyncio.sleep(30)
        assert not setup.queue.left()
        assert setup.runner.breaker == "closed"
        setup.runner.stop()
        await task

    run(main)


def test_loops_grow_while_replies_are_full_and_fall_when_the_queue_is_empty() -> None:
    """Five at first, 300 more a minute; after the backlog one is left."""

    async def main():
        setup = Setup(Target(seconds=10), visibility=60.0)
        setup.queue.send(*map(str, range(6000)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(1)
        assert setup.target.most_running <= 10
        await asyncio.sleep(29)
        assert 140 <= setup.target.most_running <= 156
        assert setup.runner.receivers == setup.runner.receiver_limit
        await asyncio.sleep(120)
        assert not setup.queue.left()
        assert (setup.runner.receivers, setup.runner.receiver_limit) == (1, INITIAL)
        setup.runner.stop()
        await task

    run(main)


def test_growth_ends_at_the_ceiling_and_begins_at_the_floor() -> None:
    """ProvisionedPollerConfig: so many poll an idle queue, so many run at most."""

    async def main():
        setup = Setup(Target(seconds=5), max_concurrency=20, floor=3)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(60)
        assert setup.queue.most_polls == 3
        assert len(setup.queue.receives) == 9
        setup.queue.send(*map(str, range(1000)))
        await asyncio.sleep(60)
        assert setup.target.most_running == 20
        setup.runner.stop()
        await task

    run(main)


@pytest.mark.parametrize(("report", "is_slowed"), [(False, True), (True, False)])
def test_errors_lower_concurrency_gradually_unless_failures_are_reported(report: bool, is_slowed: bool) -> None:
    """Success restores it."""

    async def main():
        setup = Setup(Target(lambda ids: ERROR, seconds=1), visibility=10.0, report=report)
        setup.queue.send(*map(str, range(1000)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(60)
        assert (setup.runner.receiver_limit < 5) == is_slowed
        assert (setup.runner.receiver_limit > 50) != is_slowed
        setup.target.answer = lambda ids: OK
        await asyncio.sleep(60)
        assert setup.runner.receiver_limit >= INITIAL
        assert not setup.queue.left()
        setup.runner.stop()
        await task

    run(main)


def test_throttles_lower_concurrency_at_once() -> None:
    """A function that takes 20 calls at a time is found to do so: few calls are refused."""

    async def main():
        target = Target(seconds=1)
        refused = 0

        def answer(ids):
            nonlocal refused
            refused += target.running > 20
            return THROTTLED if target.running > 20 else OK

        target.answer = answer
        setup = Setup(target, visibility=30.0)
        setup.queue.send(*map(str, range(8000)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(100)
        assert not setup.queue.left()
        assert max(message.receives for message in setup.queue.messages) == 1
        assert refused < 0.1 * len(target.batches)
        setup.runner.stop()
        await task

    run(main)


def test_a_target_that_slows_down_under_load_is_not_given_more_than_it_bears() -> None:
    """It does ten batches a second, however many it is given. Where messages cannot be kept for longer, what is in flight
    beyond that would all expire, be delivered again, and expire again.
    """

    class Busy(Target):
        async def invoke(self, call) -> Reply:
            self.seconds = (self.running + 1) / 10
            return await super().invoke(call)

    async def main():
        queue = FakeQueue(VirtualClock(asyncio.get_running_loop()), 4.0)
        queue.deaf = lambda: True
        setup = Setup(Busy(timeout=60), queue=queue)
        queue.send(*map(str, range(12_000)))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(240)
        assert not queue.left()
        assert sum(message.receives for message in queue.messages) < 2 * len(queue.messages)
        setup.runner.stop()
        await task

    run(main)


def test_a_message_may_come_back_when_its_answer_says() -> None:
    """`delaySeconds` sets the visibility of that message alone."""

    async def main():
        def answer(ids):
            if len(ids) < 3:
                return OK
            items = [{"itemIdentifier": "m0", "delaySeconds": 3}, {"itemIdentifier": "m1"}]
            return Reply(ReplyStatus.OK, json.dumps({"batchItemFailures": items}).encode())

        setup = Setup(Target(answer), report=True)
        setup.queue.send("a", "b", "c")
        await setup.run_for(60)
        assert setup.target.ids() == [["m0", "m1", "m2"], ["m0"], ["m1"]]
        first, second, third = [at for at, _ in setup.target.batches]
        assert 3 <= second - first < 4
        assert 30 <= third - first < 31

    run(main)


def test_a_limited_function_pauses_receiving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two invocations a second, whatever waits; no message is held for it."""

    async def main():
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(throttler, "time", SimpleNamespace(monotonic=loop.time))
        setup = Setup(Target(), gate=Gate(None, 2.0), size=1, visibility=5.0)
        setup.queue.send(*map(str, range(60)))
        task = asyncio.ensure_future(setup.runner.run())
        most = 0
        for _ in range(280):
            await asyncio.sleep(0.1)
            hidden = [m for m in setup.queue.left() if m.visible_at > setup.clock.now()]
            most = max(most, len(hidden))
        times = [at for at, _ in setup.target.batches]
        assert all(later - earlier > 0.99 for earlier, later in zip(times, times[2:], strict=False))
        assert len(times) >= 50
        assert most <= 2 + 2  # permits, and what was just received
        assert max(message.receives for message in setup.queue.messages) == 1
        setup.runner.stop()
        await task

    run(main)


def test_memory_is_bounded() -> None:
    """`limits.buffer_bytes` counts messages; one loop of each queue goes on."""

    async def main():
        setup = Setup(Target(seconds=100), budget=50_000, visibility=500.0)
        setup.queue.send(*["x" * 1000] * 2000)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(90)
        assert setup.budget.used < 70_000
        assert setup.target.most_running <= 7
        setup.runner.stop(0.0)
        await task
        assert setup.budget.used == 0

    run(main)


def test_memory_that_others_hold_stops_no_queue() -> None:
    """One loop of a queue may always go on, also the one that waited while another of the queue held messages."""

    async def main():
        setup = Setup(Target(seconds=5.0), visibility=60.0, budget=50_000)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(1)
        setup.budget.take(60_000)  # another mapping's
        setup.queue.send("a", "b")
        await asyncio.sleep(30)
        setup.queue.send("c", "d")
        await asyncio.sleep(60)
        assert not setup.queue.left()
        setup.runner.stop()
        await task

    run(main)


def test_ended_loops_leave_nothing_behind() -> None:
    """Loops come and go with every batch; one that has ended, and holds nothing, is forgotten."""

    async def main():
        setup = Setup(Target(seconds=0.3), size=1)
        before = sum(isinstance(one, ReceiveLoop) for one in gc.get_objects())
        task = asyncio.ensure_future(setup.runner.run())
        for _ in range(200):
            setup.queue.send("a", "b")
            await asyncio.sleep(1)
        assert len(setup.target.batches) == 400
        await asyncio.sleep(60)  # the last long polls end
        gc.collect()
        assert sum(isinstance(one, ReceiveLoop) for one in gc.get_objects()) - before < 10
        setup.runner.stop()
        await task

    run(main)


def test_small_batches_share_their_deletes() -> None:
    """Ten loops with one message each need far fewer calls than messages."""

    async def main():
        setup = Setup(Target(), size=1)
        setup.queue.send(*map(str, range(1000)))
        await setup.run_for(60)
        assert not setup.queue.left()
        assert len(setup.queue.deletes) < 500
        assert max(count for _, count in setup.queue.deletes) == 10

    run(main)


def test_a_window_gathers_and_ends_on_time() -> None:
    """BatchSize or the window, whichever is first; an empty window does not run."""

    async def main():
        setup = Setup(Target(), size=25, window=10.0)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(7)
        start = asyncio.get_running_loop().time()
        setup.queue.send("a", "b")
        await asyncio.sleep(5.5)  # the polls that follow do not end with the window by themselves
        setup.queue.send("c")
        await asyncio.sleep(30)
        [(at, ids)] = setup.target.batches
        assert ids == ["m0", "m1", "m2"]
        assert abs(at - start - 10) < 0.2
        setup.queue.send(*map(str, range(60)))
        await asyncio.sleep(3)
        assert [len(ids) for ids in setup.target.ids()[1:]] == [25, 25]
        setup.runner.stop()
        await task

    run(main)


def test_what_no_filter_matches_is_deleted_at_once() -> None:
    """Without an invocation, counted, and without holding up the others."""

    async def main():
        setup = Setup(Target(), matches=lambda record: record.id in {"m1", "m4"})
        setup.queue.send(*"abcdef")
        await setup.run_for(5)
        assert setup.target.ids() == [["m1", "m4"]]
        assert not setup.queue.left()
        assert (setup.observer.counts["filtered"], setup.observer.counts["deleted"]) == (4, 6)

    run(main)


def test_the_shortest_window_fills_a_batch_from_a_backlog() -> None:
    """One second is too short for a poll that waits, not for taking what is there."""

    async def main():
        setup = Setup(Target(seconds=0.1), size=100, window=1.0, max_concurrency=1)
        setup.queue.send(*map(str, range(1000)))
        await setup.run_for(5)
        assert [len(ids) for ids in setup.target.ids()] == [100] * 10
        assert not setup.queue.left()

    run(main)


def test_receives_ask_for_enough_visibility_for_a_window() -> None:
    """Window plus timeout beyond the queue's own: window + timeout + 30 s is asked for."""

    async def main():
        setup = Setup(Target(timeout=25.0), size=25, window=10.0, visibility=30.0)
        setup.queue.send("a")
        await setup.run_for(2, grace=60)
        message = setup.queue.messages[0]
        assert message.receives == 1

    run(main)


def test_the_payload_limit_splits_what_was_received() -> None:
    """Ten messages of 1 MiB do not fit into one invocation."""

    async def main():
        setup = Setup(Target(), max_bytes=3000)
        setup.queue.send(*["x" * 1000] * 5)
        await setup.run_for(5)
        assert sorted(len(ids) for ids in setup.target.ids()) == [1, 2, 2]
        assert not setup.queue.left()

    run(main)


def test_fifo_gives_the_rest_back_after_a_failure() -> None:
    """What follows in a group must not overtake what failed, even when the payload limit split the receive."""

    async def main():
        failing = {"m0"}
        setup = Setup(
            Target(lambda ids: ERROR if failing & set(ids) else OK), max_bytes=2500, fifo=True, visibility=12.0
        )
        setup.queue.send(*["x" * 1000] * 3, group="g")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(5)
        assert setup.target.ids() == [["m0", "m1"]]
        failing.clear()
        await asyncio.sleep(30)
        assert setup.target.ids()[1:] == [["m0", "m1"], ["m2"]]
        setup.runner.stop()
        await task

    run(main)


@pytest.mark.parametrize("trouble", ["none", "item", "rest"])
def test_the_next_of_a_group_is_not_left_alone_because_an_answer_of_the_queue_is_on_its_way(trouble: str) -> None:
    """The queue gives it out the moment it has deleted, delayed or taken back what came before it: another loop may have
    it before that answer is here. Left to wait for its visibility, the group would stand still, at each message.
    """

    async def main():
        failing = {"m1"} - ({"m1"} if trouble == "none" else set())
        queue = FakeQueue(VirtualClock(asyncio.get_running_loop()), 600.0, fifo=True)
        queue.answering = 0.05
        delays = {"batchItemFailures": [{"itemIdentifier": "m1", "delaySeconds": 0}]}

        def answer(ids):
            if not failing & set(ids):
                return OK
            failing.clear()
            return Reply(ReplyStatus.OK, json.dumps(delays).encode())

        more = {"max_bytes": 2500} if trouble == "rest" else {"size": 1}
        setup = Setup(Target(answer, seconds=0.0), queue=queue, fifo=True, report=True, **more)
        queue.send(*["x" * 1000] * 5, group="g")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(5)
        setup.runner.stop()
        await task
        assert not queue.left(), queue.left()
        assert [m.id for m in queue.messages if m.receives > (1 if trouble == "none" else 2)] == []

    run(main)


@pytest.mark.parametrize("limit", [1, 2])
def test_max_concurrency_holds_exactly(limit: int) -> None:
    """No message is received that cannot be invoked now."""

    async def main():
        setup = Setup(Target(seconds=1), max_concurrency=limit, size=1)
        setup.queue.send(*map(str, range(20)))
        await setup.run_for(5)
        assert setup.target.most_running == limit
        held = [message for message in setup.queue.left() if message.visible_at > setup.clock.now()]
        assert not held

    run(main)


def test_a_function_slot_is_taken_before_receiving() -> None:
    """While the function is busy nothing is received."""

    async def main():
        gate = Gate(1)
        setup = Setup(Target(), gate=gate)
        setup.queue.send("a")
        async with gate:
            task = asyncio.ensure_future(setup.runner.run())
            await asyncio.sleep(5)
            assert not setup.queue.receives
        await asyncio.sleep(5)
        assert not setup.queue.left()
        setup.runner.stop()
        await task

    run(main)


def test_an_idle_queue_costs_three_requests_a_minute() -> None:
    """One long poll at a time; under load all loops work; idle again, one."""

    async def main():
        setup = Setup(Target(seconds=0.5))
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(600)
        assert len(setup.queue.receives) == 30
        assert setup.queue.most_polls == 1
        setup.queue.send(*map(str, range(500)))
        await asyncio.sleep(20)
        assert not setup.queue.left()
        assert INITIAL <= setup.target.most_running <= 3 * INITIAL
        await asyncio.sleep(60)
        before = len(setup.queue.receives)
        await asyncio.sleep(600)
        assert len(setup.queue.receives) - before == 30
        setup.runner.stop()
        await task

    run(main)


def test_somebody_polls_while_an_invocation_runs_for_minutes() -> None:
    """Loops that rested after an empty poll once left a queue unread for as long as one call took."""

    async def main():
        setup = Setup(Target(seconds=600), visibility=2000.0)
        setup.queue.send("a")
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(61)
        setup.queue.send("b")
        await asyncio.sleep(5)
        assert setup.target.ids() == [["m0"], ["m1"]]
        setup.runner.stop(1.0)
        await task

    run(main)


def test_a_scarce_function_is_not_held_by_an_idle_poll() -> None:
    """Where another mapping shares the slots, polls are short."""

    async def main():
        gate = Gate(1)
        gate.users = 2
        setup = Setup(Target(), gate=gate)
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(10)
        started = asyncio.get_running_loop().time()
        async with gate:
            assert asyncio.get_running_loop().time() - started <= 1.1
        setup.runner.stop()
        await task

    run(main)


def test_what_does_not_fit_goes_back_before_it_expires() -> None:
    """FIFO: a further payload that might outlive its receipts would run beside its own redelivery."""

    async def main():
        setup = Setup(Target(seconds=15, timeout=17.0), fifo=True, max_bytes=1500, visibility=18.0)
        setup.queue.send(*["x" * 1000] * 3, group="g")
        await setup.run_for(120)
        ends: dict[str, float] = {}
        for at, ids in setup.target.batches:
            for name in ids:
                assert at >= ends.get(name, 0.0), f"{name} runs twice at once"
                ends[name] = at + 15
        assert [ids for _, ids in setup.target.batches] == [["m0"], ["m1"], ["m2"]]

    run(main)


def test_a_stop_of_an_idle_queue_is_quick() -> None:
    """It neither waits 20 s for a long poll nor cuts one off that may have messages on the way."""

    async def main():
        setup = Setup(Target())
        assert 1 <= await setup.run_for(3) <= 2

    run(main)


def test_a_stop_ends_what_runs_and_returns_the_rest() -> None:
    """In flight ends and is deleted; what was received and not invoked is visible at once."""

    async def main():
        setup = Setup(Target(seconds=5), max_concurrency=1, max_bytes=2500)
        setup.queue.send(*["x" * 1000] * 5)
        await setup.run_for(1)
        assert setup.target.ids() == [["m0", "m1"]]
        assert [message.id for message in setup.queue.left()] == ["m2", "m3", "m4"]
        assert setup.queue.returned == ["m2", "m3", "m4"]

    run(main)


def test_a_stop_returns_a_window_and_a_throttled_batch() -> None:
    """Both are held without being invoked at that moment."""

    async def main():
        window = Setup(Target(), size=100, window=300.0)
        window.queue.send("a", "b")
        await window.run_for(10)
        assert window.queue.returned == ["m0", "m1"]
        assert not window.target.batches
        throttled = Setup(Target(lambda ids: THROTTLED))
        throttled.queue.send("a")
        await throttled.run_for(2)
        assert throttled.queue.returned == ["m0"]

    run(main)


def test_the_grace_cuts_off_and_says_so() -> None:
    """What is cut off is not returned: nobody knows if it ran."""

    async def main():
        setup = Setup(Target(seconds=1000))
        setup.queue.send("a")
        with structlog.testing.capture_logs() as logs:
            assert await setup.run_for(1, grace=3) <= 5
        assert "stop_grace_exceeded" in {entry["event"] for entry in logs}
        assert not setup.queue.returned

    run(main)


def test_trouble_is_waited_out_and_shown() -> None:
    """A queue that is gone or throttles is asked again, slower and slower, and the mapping says why."""

    async def main():
        setup = Setup(Target())
        problems = [SourceGone("no queue"), SourceThrottled("slow", 3.0)]

        def trouble():
            if problems:
                raise problems.pop(0)

        setup.queue.trouble = trouble
        task = asyncio.ensure_future(setup.runner.run())
        await asyncio.sleep(0.1)
        assert (setup.runner.problem, setup.runner.is_reached) == ("no queue", False)
        await asyncio.sleep(20)
        assert (setup.runner.problem, setup.runner.is_reached) == ("", True)
        setup.runner.stop()
        await task

    run(main)


def test_a_visibility_timeout_that_is_too_short_is_warned_about() -> None:
    """With both numbers."""

    async def main():
        with structlog.testing.capture_logs() as logs:
            await Setup(Target(timeout=40.0), visibility=30.0).run_for(1)
        [entry] = [entry for entry in logs if entry["event"] == "visibility_timeout_short"]
        assert (entry["queue_visibility_timeout"], entry["function_timeout"]) == (30.0, 40.0)

    run(main)


def test_queues_keep_every_promise(request: pytest.FixtureRequest) -> None:
    """Seeded worlds with failures, throttles, kills and stops: each message succeeds, groups in order, limits hold."""
    count = request.config.getoption("--seeds") or 200
    first = request.config.getoption("--first-seed")
    total = 0
    for seed in range(first, first + count):
        loop = VirtualLoop()
        try:
            total += loop.run_until_complete(queue_world(seed))
            assert not asyncio.all_tasks(loop)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        finally:
            loop.close()
    print(f"\n{count} queue worlds, {total} messages")


async def queue_world(seed: int) -> int:
    rng = random.Random(seed)
    clock = VirtualClock(asyncio.get_running_loop())
    fifo = rng.random() < 0.5
    limit = rng.choice([None, None, 4])
    queue = FakeQueue(clock, visibility=rng.choice([2.0, 5.0, 30.0]), fifo=fifo, limit=limit)
    queue.answering = random.Random(f"{seed} answering").choice([0.0, 0.03])
    rates = rng.choice([(0.0, 0.0, 0.0), (0.1, 0.05, 0.0), (0.3, 0.2, 0.0), (0.1, 0.1, 0.2)])
    is_healed = False
    succeeded: dict[str, float] = {}
    attempts: Counter[str] = Counter()
    interruptions: Counter[str] = Counter()
    ceiling = rng.choice([None, 1, 3])
    size, window = (10, 0.0) if fifo else rng.choice([(10, 0.0), (1, 0.0), (30, 2.0)])
    down = (rng.uniform(5, 30), rng.uniform(5, 60)) if rng.random() < 0.3 else (0.0, 0.0)

    def answer(ids: list[str]) -> Reply:
        if not is_healed and down[0] < clock.now() - began < down[0] + down[1]:
            return UNREACHABLE
        if not is_healed and rng.random() < rates[1]:
            return THROTTLED
        attempts.update(ids)
        if not is_healed and rng.random() < rates[0]:
            return rng.choice([ERROR, Reply(ReplyStatus.TIMEOUT, error="t")])
        for name in ids:
            message = messages[name]
            assert message.visible_at > clock.now(), f"{name} ended when it was not ours any more"
            if fifo and name not in succeeded:
                earlier = [m.id for m in groups[message.group] if int(m.id[1:]) < int(name[1:]) and not m.is_dead]
                assert all(m in succeeded for m in earlier), f"{name} overtook {earlier} in its group"
            succeeded.setdefault(name, clock.now())
        return OK

    def trouble() -> None:
        if not is_healed and rng.random() < rates[1] / 2:
            raise rng.choice([SourceThrottled("slow", 1.0), SourceUnavailable("503")])

    began = clock.now()
    messages: dict[str, Message] = {}
    groups: dict[str, list[Message]] = {}
    queue.trouble = trouble
    # What cannot be extended is let go of; while it is in flight that would break the assertion in `answer`.
    seconds = rng.choice([0.0, 0.2, 1.0, 7.0])
    queue.deaf = lambda: not is_healed and seconds < 1 and rng.random() < rates[2]
    target = Target(answer, seconds=seconds, timeout=10.0)
    lives = rng.choice([1, 2, 4])
    for life in range(lives):
        made = Setup(
            target, queue=queue, size=size, window=window, fifo=fifo, max_concurrency=ceiling, rng=rng,
            breaker=rng.random() < 0.7, budget=rng.choice([10**9, 2000]),
        )  # fmt: skip
        task = asyncio.ensure_future(made.runner.run())
        for _ in range(rng.randrange(1, 30)):
            known = len(queue.messages)
            queue.send(
                *(str(rng.random()) for _ in range(rng.randrange(1, 6))), group=f"g{rng.randrange(3)}" if fifo else ""
            )
            for message in queue.messages[known:]:
                messages[message.id] = message
                groups.setdefault(message.group, []).append(message)
            await asyncio.sleep(rng.uniform(0.0, 1.0))
        if life == lives - 1:
            is_healed = True
            deadline = clock.now() + 5000
            while queue.left():
                assert clock.now() < deadline, f"still there: {queue.left()}"
                await asyncio.sleep(1)
        interruptions.update(message.id for message in queue.left() if message.visible_at > clock.now())
        if life < lives - 1 and rng.random() < 0.5:
            task.cancel()
            await asyncio.wait([task])
            continue
        made.runner.stop(60.0)
        await task
        assert made.budget.used == 0
    dead = {message.id for message in queue.messages if message.is_dead}
    assert succeeded.keys() | dead == messages.keys()
    for name in dead:
        assert limit is not None
        refused = 0 if not rates[2] else limit  # what cannot be extended comes back untried
        assert attempts[name] >= limit - interruptions[name] - refused, f"{name} is dead and was hardly tried"
    if rates == (0.0, 0.0, 0.0) and lives == 1:
        assert all(message.receives == 1 for message in queue.messages), "received again without need"
    if ceiling:
        assert target.most_running <= ceiling
    return len(queue.messages)
