"""One queue's runner on virtual time: outcomes, windows, capacity, stops; then seeded worlds."""

import asyncio
import json
import random
from typing import Any

import pytest
import structlog

from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    FunctionSpec,
    Mapping,
    Reply,
    ReplyStatus,
    RetryPolicy,
    SourceKind,
    SourceSpec,
)
from poller.core.retry import Backoff
from poller.errors import SourceGone, SourceThrottled, SourceUnavailable
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context, LastResult, Pipe
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.queue_runner import RECEIVE_LOOPS, QueueRunner
from poller.stores.memory import MemoryStore
from tests.fakes.observer import CountingObserver
from tests.fakes.queue import FakeQueue
from tests.sim.loop import VirtualClock, VirtualLoop

OK = Reply(ReplyStatus.OK)
ERROR = Reply(ReplyStatus.FUNCTION_ERROR, error="500")
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
        context = Context(
            clock, rng, store, Checkpointer(store, clock, 0.1, trouble), ByteBudget(10**9),
            Backoff(1.0, 5.0, lambda: 1.0), trouble, "me",
        )  # fmt: skip
        mapping = Mapping(
            id="m",
            source=SourceSpec(SourceKind.SQS, "arn", "r", "1", "q", more.get("fifo", False)),
            function=FunctionSpec("f", "arn", "role"),
            batch=BatchPolicy(more.get("size", 10), more.get("window", 0.0), max_bytes=more.get("max_bytes", 10**6)),
            retry=RetryPolicy(report_failures=more.get("report", False)),
            start=TRIM_HORIZON,
            max_concurrency=more.get("max_concurrency"),
        )

        async def open_queue() -> FakeQueue:
            return self.queue

        self.result = LastResult()
        self.runner = QueueRunner(
            context,
            Pipe(mapping, self.result, target, more.get("gate", Gate(None)), self.observer, None, None, open_queue),
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


def test_a_throttled_batch_is_kept_while_its_receipts_live() -> None:
    """Tried again in memory; then forgotten, not deleted, and received anew."""

    async def main():
        setup = Setup(Target(lambda ids: THROTTLED), visibility=20.0)
        setup.queue.send("a")
        await setup.run_for(25)
        times = [at for at, _ in setup.target.batches]
        assert len([at for at in times if at < 20]) >= 4
        assert setup.queue.messages[0].receives == 2
        assert setup.queue.left()

    run(main)


def test_an_expired_receipt_is_never_invoked() -> None:
    """Between a throttle and the next try the visibility may end: then the message is not ours any more."""

    async def main():
        queue = FakeQueue(VirtualClock(asyncio.get_running_loop()), 8.0)

        def answer(ids):
            message = queue.messages[0]
            assert message.visible_at > queue.clock.now(), "invoked with a message that somebody else may have"
            return THROTTLED

        setup = Setup(Target(answer, seconds=0.0), queue=queue)
        queue.send("a")
        await setup.run_for(60)

    run(main)


def test_what_expired_while_receiving_was_in_trouble_is_not_invoked() -> None:
    """A window that could not go on holds messages that somebody else may have by now."""

    async def main():
        setup = Setup(Target(timeout=1.0), size=25, window=5.0, visibility=40.0)
        failures = [SourceThrottled("slow")] * 12

        def trouble():
            if setup.queue.receives and failures:
                raise failures.pop()

        setup.queue.trouble = trouble
        setup.queue.send("a")
        await setup.run_for(120)
        [(at, ids)] = setup.target.batches
        assert ids == ["m0"]
        assert setup.queue.messages[0].receives == 2
        assert at > 40

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
        assert setup.target.most_running == RECEIVE_LOOPS
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
    queue = FakeQueue(clock, visibility=rng.choice([5.0, 30.0]), fifo=fifo)
    rates = rng.choice([(0.0, 0.0), (0.1, 0.05), (0.3, 0.2)])
    is_healed = False
    succeeded: dict[str, float] = {}
    limit = rng.choice([None, 1, 3])
    size, window = (10, 0.0) if fifo else rng.choice([(10, 0.0), (1, 0.0), (30, 2.0)])

    def answer(ids: list[str]) -> Reply:
        if not is_healed and rng.random() < rates[0]:
            return rng.choice([ERROR, Reply(ReplyStatus.TIMEOUT, error="t")])
        if not is_healed and rng.random() < rates[1]:
            return THROTTLED
        for name in ids:
            message = next(m for m in queue.messages if m.id == name)
            if fifo and name not in succeeded:
                earlier = [m.id for m in queue.messages if m.group == message.group and int(m.id[1:]) < int(name[1:])]
                assert all(m in succeeded for m in earlier), f"{name} overtook {earlier} in its group"
            succeeded.setdefault(name, clock.now())
        return OK

    def trouble() -> None:
        if not is_healed and rng.random() < rates[1] / 2:
            raise rng.choice([SourceThrottled("slow", 1.0), SourceUnavailable("503")])

    queue.trouble = trouble
    target = Target(answer, seconds=rng.choice([0.0, 0.2, 1.0]), timeout=4.0)
    lives = rng.choice([1, 2, 4])
    for life in range(lives):
        made = Setup(target, queue=queue, size=size, window=window, fifo=fifo, max_concurrency=limit, rng=rng)
        task = asyncio.ensure_future(made.runner.run())
        for _ in range(rng.randrange(1, 30)):
            queue.send(
                *(str(rng.random()) for _ in range(rng.randrange(1, 6))), group=f"g{rng.randrange(3)}" if fifo else ""
            )
            await asyncio.sleep(rng.uniform(0.0, 1.0))
        if life < lives - 1 and rng.random() < 0.5:
            task.cancel()
            await asyncio.wait([task])
            continue
        if life == lives - 1:
            is_healed = True
            deadline = clock.now() + 900
            while queue.left():
                assert clock.now() < deadline, f"still there: {queue.left()}"
                await asyncio.sleep(1)
        made.runner.stop(60.0)
        await task
        now = clock.now()
        hidden = [m for m in queue.left() if m.visible_at > now and m.id in queue.returned and m.receives == 0]
        assert not hidden
    assert len(succeeded) == len(queue.messages)
    if limit:
        assert target.most_running <= limit
    return len(queue.messages)
