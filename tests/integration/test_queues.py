"""Queues end to end, over sockets: what SQS counts, hides and locks, against what one HTTP target sees.

The fake SQS keeps the history of every message, so a receive that led to no invocation shows. What MiniStack does as
well runs on both.
"""

import asyncio
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from tests.fakes.aws import FakeAws
from tests.fakes.aws.sqs import Message, digest
from tests.integration import emulators
from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon
from tests.integration.test_daemon import Aws, config, queue_of
from tests.integration.test_streams_on_fake import samples, until

pytestmark = pytest.mark.integration

INTERVAL = 0.1  # what finished so long before a kill may be done again (promise 4)
SLACK = 0.4  # on top: a busy machine, a delete under way


@dataclass(slots=True)
class Try:
    """One request that carried a message. `status` 0: not answered yet."""

    began: float
    receives: int
    ended: float = 0.0
    status: int = 0


@dataclass
class Target:
    """Answers each request as `rule` says, and keeps every try of every message.

    The rule gets the records and answers a status, a document, or None for 200; it may take its time.
    """

    rule: Callable[[list[dict[str, Any]]], Any] = lambda _: None
    url: str = ""
    requests: list[tuple[float, dict[str, str], list[dict[str, Any]]]] = field(default_factory=list)
    tries: dict[str, list[Try]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # the first of each message
    done: dict[str, None] = field(default_factory=dict)  # messages that succeeded, in order of their first success
    in_flight: int = 0
    peak: int = 0
    busy: set[str] = field(default_factory=set)  # message groups
    violations: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    keeps_requests: bool = True

    async def handle(self, request: web.Request) -> web.Response:
        records = json.loads(await request.read())["Records"]
        began = clock()
        if self.keeps_requests:
            self.requests.append((began, dict(request.headers), records))
        attempts = {}
        for record in records:
            one = Try(began, int(record["attributes"]["ApproximateReceiveCount"]))
            self.tries.setdefault(record["messageId"], []).append(one)
            self.records.setdefault(record["messageId"], record)
            attempts[record["messageId"]] = one
        groups = {record["attributes"].get("MessageGroupId", "") for record in records} - {""}
        if self.busy & groups:
            self.violations.append(f"{self.busy & groups} came twice at once")
        self.busy |= groups
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        self.changed.set()
        answer = self.rule(records)
        if isinstance(answer, Awaitable):
            answer = await answer
        self.in_flight -= 1
        self.busy -= groups
        status = answer if isinstance(answer, int) else 200
        document = answer if isinstance(answer, dict) else {}
        failed = {failure["itemIdentifier"] for failure in document.get("batchItemFailures", ())}
        for message, one in attempts.items():
            one.ended = clock()
            one.status = 500 if message in failed else status
            if one.status == 200:
                self.done.setdefault(message)
        self.changed.set()
        return web.json_response(document, status=status)

    async def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until the condition holds; it is looked at after each request."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"{what} has not happened in {seconds} s: {len(self.done)} of {len(self.tries)} done"
            ) from None

    def counted(self, message: str) -> int:
        """Tries in which the function ran; throttles are none."""
        return len([one for one in self.tries.get(message, ()) if one.status != 429])

    def successes(self, message: str) -> list[Try]:
        return [one for one in self.tries[message] if one.status == 200]

    def most_receives(self) -> int:
        """Of any message, as the last event that carried it said."""
        return max(one.receives for tries in self.tries.values() for one in tries)

    def assert_each_done_once(self, count: int) -> None:
        """So many messages, each received, tried and done once."""
        assert len(self.done) == count
        again = {message: len(tries) for message, tries in self.tries.items() if len(tries) > 1}
        assert not again
        assert self.most_receives() == 1


def clock() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def served(target: Target, port: int = 0) -> AsyncIterator[None]:
    app = web.Application(client_max_size=16 * 2**20)
    app.router.add_post("/{path:.*}", target.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    target.url = f"http://127.0.0.1:{runner.addresses[0][1]}/f"
    try:
        yield
    finally:
        await runner.cleanup()


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    """A target that answers 200."""
    made = Target()
    async with served(made):
        yield made


@pytest.fixture
def fake(fake_aws: FakeAws, account: str) -> Aws:
    """The fake as a test's AWS; for what makes and fills queues inside this process, use `fake_aws`."""
    return Aws(fake_aws.url, account)


@pytest.fixture(params=["fake", "ministack"])
def aws(request: pytest.FixtureRequest, fake_aws: FakeAws, account: str) -> Aws:
    """The fake and MiniStack."""
    return Aws(fake_aws.url if request.param == "fake" else emulators.running("ministack"), account)


def settings(aws: Aws, target: Target, *mappings: dict[str, Any], **function: Any) -> dict[str, Any]:
    return config(aws, target, *mappings, functions={"f": {"url": target.url, **function}})


def url_of(aws: Aws, arn: str) -> str:
    return aws.client("sqs").get_queue_url(QueueName=arn.rpartition(":")[2])["QueueUrl"]


async def state_of(daemon: Daemon, arn: str) -> dict[str, Any]:
    [mapping] = [mapping for mapping in await daemon.status() if mapping["source_arn"] == arn]
    return mapping


async def until_reached(daemon: Daemon) -> None:
    async def is_ready() -> bool:
        return (await daemon.get("/readyz"))[0] == 200

    await until(is_ready, 20, "readiness")


# --- 1


@dataclass(slots=True)
class End:
    """A kill or a stop of the daemon: when it was sent, and when the process was gone."""

    sent: float
    gone: float
    is_kill: bool


def hits(message: Message, ends: list[End]) -> int:
    """Ends of the daemon that met the message in flight."""
    spans: list[tuple[float, float]] = []
    for what, at in message.history:
        if what == "received":
            spans.append((at, float("inf")))
        elif spans and what in {"visible", "changed 0", "deleted"} and spans[-1][1] == float("inf"):
            spans[-1] = (spans[-1][0], at)
    return len([end for end in ends if any(first <= end.gone and last >= end.sent for first, last in spans)])


def explained(earlier: Try, later: Try, ends: list[End]) -> float | None:
    """How long before a kill the earlier success ended; None when no kill lies between the two."""
    for end in ends:
        if end.is_kill and earlier.began <= end.gone and end.sent <= later.began:
            return end.sent - earlier.ended
    return None


@pytest.mark.parametrize("total", [20_000, pytest.param(100_000, marks=pytest.mark.soak)])
async def test_messages_survive_failures_throttles_kills_and_a_stop(
    total, fake_aws, fake, account, target, daemons
) -> None:
    """Each succeeds or is a dead letter after its attempts; again only what a kill met; nothing after the stop."""
    most, visibility, dice = 8, 2, random.Random(total)
    began = clock()
    fake_aws.clock = clock  # so that histories compare with tries
    dead = fake_aws.queue("dead", account, REGION)
    redrive = json.dumps({"deadLetterTargetArn": dead, "maxReceiveCount": most})
    attributes = {"VisibilityTimeout": str(visibility), "RedrivePolicy": redrive}
    arn = fake_aws.queue("q", account, REGION, attributes)
    queue, letters = fake_aws.queue_of(arn), fake_aws.queue_of(dead)
    ids = fake_aws.send(arn, [str(n) for n in range(total)])
    poison = set(ids[total // 100 : total // 100 + 50 : 10])

    async def rule(records):
        await asyncio.sleep(dice.uniform(0, 0.01))
        if poison & {record["messageId"] for record in records}:
            return 500
        luck = dice.random()
        return 500 if luck < 0.1 else 429 if luck < 0.15 else None

    target.rule, target.keeps_requests = rule, False
    mapping = queue_of(arn, Options={"ScaleUpPerMinute": 1000})
    daemon: Daemon = daemons(settings(fake, target, mapping, timeout_seconds=2))
    ends: list[End] = []
    seconds = 60 + total / 500
    for share, is_kill in ((0.2, True), (0.4, True), (0.6, False), (0.8, True)):
        await daemon.start()
        await target.until(lambda share=share: len(target.done) >= share * total, seconds, f"{share:.0%}")
        sent = clock()
        if is_kill:
            await daemon.kill()
        else:
            assert await daemon.stop() == 0
        ends.append(End(sent, clock(), is_kill))
    await daemon.start()
    await until(lambda: len(target.done.keys() | letters.messages.keys()) == total, seconds, "the last message")
    assert await daemon.stop() == 0
    took = clock() - began
    assert not daemon.clean_logs()
    assert not daemon.events("stop_grace_exceeded")

    assert len(letters.messages) >= len(poison)
    assert poison <= letters.messages.keys()
    messages = {**queue.messages, **letters.messages}
    assert messages.keys() == set(ids)
    for message in messages.values():
        met = hits(message, ends)
        counted = target.counted(message.id)
        assert message.receives <= counted + met, (
            f"{message.receives} receives, {counted} attempts: {message.history} {target.tries.get(message.id)}"
        )
        if message.id in letters.messages:
            assert message.receives == most
            assert counted >= most - met
    lateness = []
    for message in target.done:
        for earlier, later in pairwise(target.successes(message)):
            before = explained(earlier, later, ends)
            assert before is not None, f"done twice without a kill: {messages[message].history} {target.tries[message]}"
            assert before < INTERVAL + SLACK, f"done {before:.2f} s before the kill, and again"
            lateness.append(before)
    assert queue.in_flight == 0
    assert all(message.is_gone for message in queue.messages.values())
    receives = sum(message.receives for message in messages.values())
    tries = sum(len(tries) for tries in target.tries.values())
    print(f"\n{total} messages in {took:.1f} s, three kills, one stop: {tries} tries, {receives} receives")
    print(
        f"  done again: {len(lateness)} ({len(lateness) / total:.2%}),"
        f" at most {max(lateness, default=0):.2f} s before a kill; dead letters: {len(letters.messages)}"
        f" ({len(poison)} always failed); at once: {target.peak}"
    )


async def test_flaky_queue_calls_lose_nothing(fake_aws, fake, account, target, daemons) -> None:
    """One call in ten answers 503 and one entry of a few batches fails: all is delivered and deleted in the end."""
    arn = fake_aws.queue("q", account, REGION, {"VisibilityTimeout": "2"})
    ids = fake_aws.send(arn, [str(n) for n in range(1000)])
    for operation in ("ReceiveMessage", "DeleteMessageBatch", "ChangeMessageVisibilityBatch"):
        fake_aws.flake(operation, 0.1)
    for entry in range(10):
        fake_aws.fail_entries(arn, "DeleteMessageBatch", [entry])
    queue = fake_aws.queue_of(arn)
    daemon: Daemon = daemons(settings(fake, target, queue_of(arn)))
    await daemon.start()
    await target.until(lambda: len(target.done) == len(ids), 30, "the last message")
    await until(lambda: all(message.is_gone for message in queue.messages.values()), 20, "the last delete")
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()
    again = [message for message in target.done if len(target.successes(message)) > 1]
    print(f"\n1000 messages, {len(again)} delivered again because their deletes failed")
    assert len(again) <= 50, "a delete is tried more than once"


# --- 2


@pytest.mark.parametrize("is_named", [False, True], ids=["whole batches fail", "failures are named"])
@pytest.mark.parametrize(("aws", "groups"), [("fake", 1000), ("ministack", 60)], indirect=["aws"])
async def test_message_groups_keep_their_order(aws, groups, is_named, fake_aws, target, daemons) -> None:
    """One batch of a group at a time, first successes in order, fifty at once; a failing group holds only its mates."""
    each, failing, most = 5, groups // 50, 50
    arn = await asyncio.to_thread(aws.queue, "q.fifo", FifoQueue="true", VisibilityTimeout="1")
    bodies = [(f"g{g}", f"g{g} {n}") for n in range(each) for g in range(groups)]
    if aws.url == fake_aws.url:
        fake_aws.send(arn, [body for _, body in bodies], [group for group, _ in bodies])
    else:
        await asyncio.to_thread(send_groups, aws, arn, bodies)
    bad = {f"g{g}" for g in range(0, groups, groups // failing)}
    mates: set[str] = set(bad)  # groups that were in a failing batch, or received before it failed no more
    done: dict[str, list[str]] = defaultdict(list)
    failures: Counter[str] = Counter()

    def is_free() -> bool:
        """Every group that shares nothing with a failing one is through."""
        return all(len(done[f"g{g}"]) == each for g in range(groups) if f"g{g}" not in mates)

    async def rule(records):
        await asyncio.sleep(0.08)
        named = {record["attributes"]["MessageGroupId"] for record in records}
        if is_named:
            failed = [
                record
                for record in records
                if (group := record["attributes"]["MessageGroupId"]) in bad
                and len(done[group]) <= 2
                and int(record["body"].split()[1]) >= 2
                and (failures[group] < 3 or not is_free())
            ]
        else:
            fails = any(group in bad and (failures[group] < 3 or not is_free()) for group in named)
            failed = records if fails else []
        for group in {record["attributes"]["MessageGroupId"] for record in failed}:
            failures[group] += 1
        if failed and not is_named:
            mates.update(named)
        keys = {record["messageId"] for record in failed}
        for record in records:
            if record["messageId"] not in keys:
                done[record["attributes"]["MessageGroupId"]].append(record["body"])
        if is_named:
            return {"batchItemFailures": [{"itemIdentifier": record["messageId"]} for record in failed]}
        return 500 if failed else None

    target.rule = rule
    more = {"FunctionResponseTypes": ["ReportBatchItemFailures"]} if is_named else {}
    mapping = queue_of(
        arn,
        BatchSize=each + 1,  # a batch has two groups
        ScalingConfig={"MaximumConcurrency": most},
        Options={"ScaleUpPerMinute": 6000},
        **more,
    )
    daemon: Daemon = daemons(settings(aws, target, mapping))
    began = clock()
    await daemon.start()
    await target.until(lambda: len(target.done) == groups * each, 60, "the last message")
    took = clock() - began
    assert await daemon.stop() == 0
    assert not target.violations
    for group, seen in done.items():
        assert seen == [f"{group} {n}" for n in range(each)], "in order, each once"
    assert len(done) == groups
    assert all(failures[group] >= 3 for group in bad)
    assert target.peak <= most
    if groups >= 10 * most:
        assert target.peak >= 30
    print(
        f"\n{groups} groups of {each} in {took:.1f} s, {len(bad)} failed {failures.total()} times,"
        f" {len(mates - bad)} mates, at most {target.peak} at once"
    )


def send_groups(aws: Aws, arn: str, bodies: list[tuple[str, str]]) -> None:
    sqs, url = aws.client("sqs"), url_of(aws, arn)
    for start in range(0, len(bodies), 10):
        entries = [
            {"Id": str(n), "MessageBody": body, "MessageGroupId": group, "MessageDeduplicationId": body}
            for n, (group, body) in enumerate(bodies[start : start + 10])
        ]
        assert not sqs.send_message_batch(QueueUrl=url, Entries=entries).get("Failed")


# --- 3


@pytest.mark.parametrize(
    ("down", "visibility"), [(8.0, 2), pytest.param(120.0, 5, marks=pytest.mark.soak)], ids=["short", "long"]
)
async def test_a_target_that_is_down_costs_no_receives(down, visibility, fake_aws, fake, account, daemons) -> None:
    """Receiving pauses and says so; no message is received more than twice; all are delivered when it is back."""
    count, target, port = 200, Target(), emulators.free_port()
    target.url = f"http://127.0.0.1:{port}/f"
    arn = fake_aws.queue("q", account, REGION, {"VisibilityTimeout": str(visibility)})
    fake_aws.send(arn, [str(n) for n in range(count)])
    messages = fake_aws.queue_of(arn).messages.values()
    daemon: Daemon = daemons(settings(fake, target, queue_of(arn)))

    async def circuit() -> tuple[bool, bool]:
        gauge = await samples(daemon, "poller_circuit_open")
        return gauge[()] == 1, (await state_of(daemon, arn))["breaker"] != "closed"

    async def is_open() -> bool:
        return await circuit() == (True, True)

    async def is_closed() -> bool:
        return await circuit() == (False, False)

    await daemon.start()
    await until(lambda: any(message.receives for message in messages), 20, "a receive")
    up_at = clock() + down
    await until(is_open, 6, "the opening of the circuit")
    await until(lambda: clock() >= up_at, down + 1, "the end of the outage")
    assert await is_open(), "and it stays open"
    receives = Counter(message.receives for message in messages)
    async with served(target, port):
        began = clock()
        await target.until(lambda: len(target.done) == count, 60 + visibility, "the last message")
        took = clock() - began
        await until(is_closed, 10, "the closing of the circuit")
        assert await daemon.stop() == 0
    final = Counter(message.receives for message in messages)
    print(f"\ndown for {down:.0f} s: receives {dict(receives)}; then all in {took:.1f} s: {dict(final)}")
    assert max(receives) <= 2
    assert max(final) <= 3
    assert all(len(tries) == 1 for tries in target.tries.values())


async def test_a_target_that_throttles_costs_no_receives(fake_aws, fake, account, target, daemons) -> None:
    """Nothing but 429 for four visibility timeouts: receiving pauses, one request at a time asks, then all is well."""
    arn = fake_aws.queue("q", account, REGION, {"VisibilityTimeout": "1"})
    fake_aws.send(arn, [str(n) for n in range(200)])
    messages = fake_aws.queue_of(arn).messages.values()
    target.rule = lambda _: 429
    daemon: Daemon = daemons(settings(fake, target, queue_of(arn)))
    await daemon.start()

    async def is_open() -> bool:
        return (await state_of(daemon, arn))["breaker"] != "closed"

    await until(is_open, 10, "the opening of the circuit")
    opened, requests = clock(), len(target.requests)
    await until(lambda: clock() > opened + 4, 6, "four visibility timeouts")
    assert target.in_flight <= 1
    asked = len(target.requests) - requests
    assert asked <= 4 / 0.1 * 2, "probes back off"
    assert max(message.receives for message in messages) <= 2
    target.rule = lambda _: None
    await target.until(lambda: len(target.done) == 200, 30, "the last message")
    assert await daemon.stop() == 0
    assert max(message.receives for message in messages) <= 3
    print(f"\n{asked} requests in 4 s of throttling; receives {dict(Counter(m.receives for m in messages))}")


# --- 4, 5


async def test_a_slow_function_gets_each_message_once(aws, target, daemons) -> None:
    """What is held stays invisible: three seconds are longer than the queue's visibility timeout."""
    arn = await asyncio.to_thread(aws.queue, "q", VisibilityTimeout="1")
    await asyncio.to_thread(aws.send, "q", 0, 20)

    async def rule(records):
        ends = clock() + 3
        await until(lambda: clock() >= ends, 4, "the end of a slow function")

    target.rule = rule
    daemon: Daemon = daemons(settings(aws, target, queue_of(arn)))
    await daemon.start()
    await target.until(lambda: len(target.done) == 20, 30, "the last message")
    assert await daemon.stop() == 0
    target.assert_each_done_once(20)
    assert await asyncio.to_thread(aws.depth, "q") == 0


async def test_one_at_a_time_takes_no_more_than_it_needs(fake_aws, fake, account, target, daemons) -> None:
    """MaximumConcurrency 1: never two invocations, and never more in flight than the batch in the function's hands."""
    arn = fake_aws.queue("q", account, REGION, {"VisibilityTimeout": "1"})
    queue, held = fake_aws.queue_of(arn), []
    fake_aws.send(arn, [str(n) for n in range(100)])

    async def rule(records):
        await asyncio.sleep(0.05)
        held.append(queue.in_flight - len(records))

    target.rule = rule
    mapping = queue_of(arn, BatchSize=2, ScalingConfig={"MaximumConcurrency": 1})
    daemon: Daemon = daemons(settings(fake, target, mapping))
    await daemon.start()
    await target.until(lambda: len(target.done) == 100, 30, "the last message")
    assert await daemon.stop() == 0
    assert target.peak == 1
    assert max(held) <= 0
    target.assert_each_done_once(100)
    assert all(message.receives == 1 for message in queue.messages.values())


async def test_a_message_at_the_end_of_a_long_poll_is_tried_at_its_first_receive(aws, target, daemons) -> None:
    """Visibility begins when SQS gives the message out, not when it was asked for, which may be long before."""
    arn = await asyncio.to_thread(aws.queue, "q", VisibilityTimeout="1")
    daemon: Daemon = daemons(settings(aws, target, queue_of(arn)))
    await daemon.start()
    await until_reached(daemon)
    began = clock()
    await until(lambda: clock() > began + 1.5, 2, "more than the visibility timeout")
    await asyncio.to_thread(aws.send, "q", 0, 1)
    await target.until(lambda: len(target.done) == 1, 10, "delivery")
    assert await daemon.stop() == 0
    assert not daemon.events("messages_expired")
    target.assert_each_done_once(1)


# --- 6


@pytest.mark.parametrize("delay", [0, 1])
async def test_a_failure_says_when_its_message_comes_again(delay, aws, target, daemons) -> None:
    """`delaySeconds` of a batch item failure, not the visibility timeout of thirty seconds."""
    arn = await asyncio.to_thread(aws.queue, "q", VisibilityTimeout="30")
    await asyncio.to_thread(aws.send, "q", 0, 3)
    failed: set[str] = set()

    def rule(records):
        chosen = [record["messageId"] for record in records if record["body"] == "1"]
        first = [message for message in chosen if message not in failed]
        failed.update(first)
        return {"batchItemFailures": [{"itemIdentifier": message, "delaySeconds": delay} for message in first]}

    target.rule = rule
    mapping = queue_of(arn, FunctionResponseTypes=["ReportBatchItemFailures"])
    daemon: Daemon = daemons(settings(aws, target, mapping))
    await daemon.start()
    await target.until(lambda: len(target.done) == 3, 15, "the last message")
    assert await daemon.stop() == 0
    [again] = failed
    first, second = target.tries[again]
    assert delay - 0.05 <= second.began - first.ended < delay + 3
    assert [len(target.tries[message]) for message in target.tries if message != again] == [1, 1]
    assert await asyncio.to_thread(aws.depth, "q") == 0


async def test_a_failure_without_a_delay_keeps_its_visibility(fake_aws, fake, account, target, daemons) -> None:
    """A function error and a named failure leave the message as it was received: the queue's timeout decides."""
    arn = fake_aws.queue("q", account, REGION, {"VisibilityTimeout": "30"})
    fake_aws.send(arn, ["whole", "named"])
    target.rule = lambda records: (
        500
        if records[0]["body"] == "whole"
        else {"batchItemFailures": [{"itemIdentifier": record["messageId"]} for record in records]}
    )
    mapping = queue_of(arn, BatchSize=1, FunctionResponseTypes=["ReportBatchItemFailures"])
    daemon: Daemon = daemons(settings(fake, target, mapping))
    await daemon.start()
    await target.until(lambda: len([t for tries in target.tries.values() for t in tries if t.ended]) == 2, 20, "both")
    assert await daemon.stop() == 0
    for message in fake_aws.queue_of(arn).messages.values():
        assert [what for what, _ in message.history] == ["sent", "received"]
        assert message.due == pytest.approx(message.received + 30, abs=0.01)


# --- 7


TRACE = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"


async def test_the_event_shows_all_that_the_message_has(aws, account, target, daemons) -> None:
    """Attributes of all types, digests, the trace header on the request too; another account's queue, by its ARN."""
    other = Aws(aws.url, emulators.new_account())
    arn = await asyncio.to_thread(other.queue, "q")
    attributes = {
        "text": {"DataType": "String", "StringValue": "ü"},
        "number": {"DataType": "Number.int", "StringValue": "42"},
        "blob": {"DataType": "Binary", "BinaryValue": b"\0\1\2"},
    }

    def send() -> dict[str, Any]:
        sqs = other.client("sqs")
        trace = {"AWSTraceHeader": {"DataType": "String", "StringValue": TRACE}}
        return sqs.send_message(
            QueueUrl=url_of(other, arn), MessageBody="hé", MessageAttributes=attributes, MessageSystemAttributes=trace
        )

    sent = await asyncio.to_thread(send)
    daemon: Daemon = daemons(settings(aws, target, queue_of(arn)))
    await daemon.start()
    await target.until(lambda: len(target.done) == 1, 20, "delivery")
    [(_, headers, [event])] = target.requests
    assert await daemon.stop() == 0
    system = event.pop("attributes")
    assert system.keys() == {
        "ApproximateReceiveCount", "SentTimestamp", "SenderId", "ApproximateFirstReceiveTimestamp", "AWSTraceHeader",
    }  # fmt: skip
    assert all(isinstance(value, str) for value in system.values())
    assert system["AWSTraceHeader"] == headers["X-Amzn-Trace-Id"] == TRACE
    assert event.pop("receiptHandle")
    empty: dict[str, Any] = {"stringListValues": [], "binaryListValues": []}
    on_the_wire = {
        "text": {"DataType": "String", "StringValue": "ü"},
        "number": {"DataType": "Number.int", "StringValue": "42"},
        "blob": {"DataType": "Binary", "BinaryValue": "AAEC"},
    }
    assert event == {
        "messageId": sent["MessageId"],
        "body": "hé",
        "messageAttributes": {
            "text": {"stringValue": "ü", **empty, "dataType": "String"},
            "number": {"stringValue": "42", **empty, "dataType": "Number.int"},
            "blob": {"binaryValue": "AAEC", **empty, "dataType": "Binary"},
        },
        "md5OfMessageAttributes": digest(on_the_wire),
        "md5OfBody": hashlib.md5("hé".encode(), usedforsecurity=False).hexdigest(),
        "eventSource": "aws:sqs",
        "eventSourceARN": arn,
        "awsRegion": REGION,
    }
    assert account not in arn
    assert await asyncio.to_thread(other.depth, "q") == 0


async def test_a_dead_letter_queue_is_a_source(aws, target, daemons) -> None:
    """Its events name the queue that gave the message up."""
    dead = await asyncio.to_thread(aws.queue, "dead")
    redrive = json.dumps({"deadLetterTargetArn": dead, "maxReceiveCount": 1})
    arn = await asyncio.to_thread(aws.queue, "q", VisibilityTimeout="0", RedrivePolicy=redrive)
    await asyncio.to_thread(aws.send, "q", 0, 1)

    def receive() -> list[Any]:
        return aws.client("sqs").receive_message(QueueUrl=url_of(aws, arn)).get("Messages", [])

    daemon: Daemon = daemons(settings(aws, target, queue_of(dead)))
    await daemon.start()
    assert len(await asyncio.to_thread(receive)) == 1
    assert await asyncio.to_thread(receive) == []
    await target.until(lambda: len(target.done) == 1, 20, "delivery")
    assert await daemon.stop() == 0
    [(_, _, [event])] = target.requests
    assert event["attributes"]["DeadLetterQueueSourceArn"] == arn
    assert event["eventSourceARN"] == dead


# --- 8


async def test_a_queue_that_is_deleted_is_waited_for(fake_aws, fake, account, target, daemons) -> None:
    """The mapping says what is wrong, the other one goes on, and delivery goes on when the queue is back."""
    arn, other = (fake_aws.queue(name, account, REGION) for name in ("q", "other"))
    daemon: Daemon = daemons(settings(fake, target, queue_of(arn), queue_of(other)))
    await daemon.start()
    fake_aws.send(arn, ["before"])
    await target.until(lambda: len(target.done) == 1, 20, "the first delivery")
    fake_aws.delete_queue(arn)

    async def says_so() -> bool:
        return "QueueDoesNotExist" in ((await state_of(daemon, arn))["reason"] or "")

    await until(says_so, 10, "a reason in the status")
    fake_aws.send(other, ["meanwhile"])
    await target.until(lambda: len(target.done) == 2, 10, "delivery by the other mapping")
    assert not (await state_of(daemon, other))["reason"]
    assert fake_aws.queue("q", account, REGION) == arn
    fake_aws.send(arn, ["after"])
    await target.until(lambda: len(target.done) == 3, 30, "delivery by the mapping whose queue is back")

    async def is_well() -> bool:
        return not (await state_of(daemon, arn))["reason"]

    await until(is_well, 10, "the end of the trouble")
    assert await daemon.stop() == 0
    assert [record["body"] for record in target.records.values()] == ["before", "meanwhile", "after"]
    assert not daemon.clean_logs()


@pytest.mark.parametrize("fault", ["OverLimit", "truncated"])
async def test_receives_that_fail_are_survived(fault, fake_aws, fake, account, target, daemons) -> None:
    """The state is visible; what a truncated answer held comes back with its visibility timeout."""
    arn = fake_aws.queue("q", account, REGION, {"VisibilityTimeout": "1"})
    if fault == "truncated":
        fake_aws.truncate("ReceiveMessage", on=True)
    else:
        fake_aws.refuse("ReceiveMessage", fault)
    fake_aws.send(arn, [str(n) for n in range(30)])
    daemon: Daemon = daemons(settings(fake, target, queue_of(arn)))
    await daemon.start()

    async def says_so() -> bool:
        reason = (await state_of(daemon, arn))["reason"] or ""
        return "ReceiveMessage" in reason and (fault in reason or fault == "truncated")

    await until(says_so, 10, "a reason in the status")
    asked = len(fake_aws.queue_of(arn).asked) + sum(
        n for (name, _), n in fake_aws.calls.items() if name.startswith("Rec")
    )
    assert asked < 50, "it backs off"
    fake_aws.truncate("ReceiveMessage", on=False)
    fake_aws.refuse("ReceiveMessage", None)
    await target.until(lambda: len(target.done) == 30, 30, "the last message")
    assert await daemon.stop() == 0
    assert all(len(tries) == 1 for tries in target.tries.values())
    assert not daemon.clean_logs()


# --- 9


async def test_a_stop_ends_an_idle_long_poll(fake_aws, fake, account, target, daemons) -> None:
    """In less than five seconds, exit 0."""
    arn = fake_aws.queue("q", account, REGION)
    daemon: Daemon = daemons(settings(fake, target, queue_of(arn)))
    await daemon.start()
    await until(lambda: fake_aws.queue_of(arn).polls > 0, 20, "a long poll")
    began = clock()
    assert await daemon.stop() == 0
    took = clock() - began
    print(f"\nan idle daemon stops in {took:.1f} s")
    assert took < 5
    assert not daemon.events("stop_grace_exceeded")


@pytest.mark.parametrize(
    ("aws", "is_haunted"), [("fake", False), ("fake", True), ("ministack", False)], indirect=["aws"]
)
async def test_a_stop_returns_what_a_window_holds(aws, is_haunted, fake_aws, target, daemons) -> None:
    """Visible at once, also where SQS hands messages to polls that were cut off: received next for the second time."""
    fake_aws.haunt(is_haunted)
    arn = await asyncio.to_thread(aws.queue, "q", VisibilityTimeout="600")
    mapping = queue_of(arn, BatchSize=100, MaximumBatchingWindowInSeconds=300)
    daemon: Daemon = daemons(settings(aws, target, mapping, timeout_seconds=5))
    await daemon.start()
    await until_reached(daemon)
    await asyncio.to_thread(aws.send, "q", 0, 5)
    names = ["ApproximateNumberOfMessagesNotVisible"]

    async def is_held() -> bool:
        sqs, url = aws.client("sqs"), await asyncio.to_thread(url_of, aws, arn)
        answer = await asyncio.to_thread(lambda: sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names))
        return answer["Attributes"][names[0]] == "5"

    await until(is_held, 20, "the receive of all five")
    began = clock()
    assert await daemon.stop() == 0
    assert clock() - began < 5

    def receive() -> list[Any]:
        answer = aws.client("sqs").receive_message(
            QueueUrl=url_of(aws, arn), MaxNumberOfMessages=10, MessageSystemAttributeNames=["All"]
        )
        return [message["Attributes"]["ApproximateReceiveCount"] for message in answer.get("Messages", [])]

    assert await asyncio.to_thread(receive) == ["2"] * 5
    assert not target.requests


# --- 10


async def test_a_rate_is_never_exceeded(fake_aws, fake, account, target, daemons) -> None:
    """Ten a second with a backlog, give or take a tenth; polling waits, so nothing received has to come back."""
    arn = fake_aws.queue("q", account, REGION, {"VisibilityTimeout": "1"})
    fake_aws.send(arn, [str(n) for n in range(40)])
    daemon: Daemon = daemons(settings(fake, target, queue_of(arn, BatchSize=1), max_invocations_per_second=10))
    await daemon.start()
    await target.until(lambda: len(target.done) == 40, 30, "the last message")
    assert await daemon.stop() == 0
    times = [at for at, _, _ in target.requests]
    took = times[-1] - times[0]

    def most(seconds: float) -> int:
        return max(len([other for other in times if at <= other < at + seconds]) for at in times)

    print(f"\n40 in {took:.2f} s, at most {most(0.9)} in 0.9 s, {most(1.0)} in a second")
    assert most(0.9) <= 10, "a request may be late by a tenth"
    assert 2.8 < took < 8
    target.assert_each_done_once(40)
    assert all(message.receives == 1 for message in fake_aws.queue_of(arn).messages.values())


# --- 11


async def test_an_idle_mapping_has_one_long_poll(fake_aws, fake, account, target, daemons) -> None:
    """Three requests a minute: nothing else is asked while the queue is empty."""
    arn = fake_aws.queue("q", account, REGION)
    queue = fake_aws.queue_of(arn)
    daemon: Daemon = daemons(settings(fake, target, queue_of(arn)))
    await daemon.start()
    await until(lambda: queue.polls > 0, 20, "a long poll")
    began, asked = clock(), len(queue.asked)
    calls = fake_aws.calls.total()
    most = 0
    while clock() < began + 2:
        most = max(most, queue.polls)
        await asyncio.sleep(0.02)
    assert [wait for _, wait, _ in queue.asked] == [20] * asked
    assert (len(queue.asked), most) == (asked, 1)
    assert fake_aws.calls.total() == calls
    fake_aws.send(arn, ["a"])
    await target.until(lambda: len(target.done) == 1, 2, "delivery by the waiting poll")
    assert await daemon.stop() == 0
    print(f"\n{most} long poll of 20 s at a time: {60 / 20 * most:.0f} requests a minute")
