"""Every source keeps these rules, against two independent emulators each. Real sockets, real processes."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.core.model import (
    END,
    TRIM_HORIZON,
    BatchPolicy,
    FunctionSpec,
    Mapping,
    Position,
    PositionKind,
    Record,
    RetryPolicy,
    SourceKind,
    SourceSpec,
    Trace,
)
from poller.errors import IteratorExpired, SourceGone, SourceUnavailable
from poller.ports import QueueSource, StreamSource
from poller.sources import KINDS, Sources
from tests.integration import emulators
from tests.integration.conftest import REGION, account, connect  # noqa: F401

pytestmark = pytest.mark.integration

STREAMS = ("kinesis-ministack", "kinesis-roto", "dynamodb-ministack", "dynamodb-moto")
QUEUES = ("sqs-ministack", "sqs-roto")
LATEST = Position(PositionKind.LATEST)

Connect = Callable[[str], Awaitable[AwsClients]]


def mapping_of(source: SourceSpec) -> Mapping:
    function = FunctionSpec("f", f"arn:aws:lambda:{REGION}:1:function:f", "arn:aws:iam::1:role/f")
    return Mapping("m", source, function, BatchPolicy(10), RetryPolicy(), TRIM_HORIZON)


@dataclass
class StreamRig:
    """One fresh stream with one shard, and how to write to it."""

    source: StreamSource
    missing: StreamSource
    nowhere: StreamSource
    put: Callable[[str, str], Awaitable[None]]
    text: Callable[[Record], str]
    shard: str = ""
    is_exact: bool = True  # the emulator answers modelled errors


@pytest.fixture(params=STREAMS)
async def rig(request: pytest.FixtureRequest, account: str, connect: Connect) -> StreamRig:  # noqa: F811
    kind, emulator = request.param.split("-")
    clients = await connect(emulators.running(emulator))
    nowhere = await connect(f"http://127.0.0.1:{emulators.free_port()}")
    owner = "123456789012" if emulator == "moto" else account
    name = f"t{account}"
    clock = SystemClock(asyncio.get_running_loop())
    if kind == "kinesis":
        kinesis = await clients.client("kinesis", REGION)
        await kinesis.create_stream(StreamName=name, ShardCount=1)
        await kinesis.get_waiter("stream_exists").wait(
            StreamName=name, WaiterConfig={"Delay": 0.05, "MaxAttempts": 100}
        )
        arn = f"arn:aws:kinesis:{REGION}:{owner}:stream/{name}"
        gone = arn + "-gone"

        async def put(key: str, text: str) -> None:
            await kinesis.put_record(StreamName=name, PartitionKey=key, Data=text.encode())

        def text(record: Record) -> str:
            return base64.b64decode(json.loads(record.wire)["kinesis"]["data"]).decode()
    else:
        dynamodb = await clients.client("dynamodb", REGION)
        table = await dynamodb.create_table(
            TableName=name,
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            BillingMode="PAY_PER_REQUEST",
            StreamSpecification={"StreamEnabled": True, "StreamViewType": "NEW_AND_OLD_IMAGES"},
        )
        arn = table["TableDescription"]["LatestStreamArn"]
        gone = arn.replace(name, name + "-gone")

        async def put(key: str, text: str) -> None:
            await dynamodb.put_item(TableName=name, Item={"id": {"S": key}, "text": {"S": text}})

        def text(record: Record) -> str:
            return str(json.loads(record.wire)["dynamodb"]["NewImage"]["text"]["S"])

    async def opened(where: AwsClients, which: str) -> StreamSource:
        spec = SourceSpec(SourceKind(kind), which, REGION, owner, name)
        return await Sources(where, clock).open_stream(mapping_of(spec))

    rig = StreamRig(
        await opened(clients, arn),
        await opened(clients, gone),
        await opened(nowhere, arn),
        put,
        text,
        is_exact=emulator != "moto",
    )
    rig.shard = (await rig.source.shards()).shards[0].id
    return rig


async def read(rig: StreamRig, at: Position, count: int, limit: int = 100) -> list[Record]:
    """At least `count` records from a position on."""
    iterator: str | None = await rig.source.iterator(rig.shard, at)
    found: list[Record] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            assert iterator is not None
            fetch = await rig.source.fetch(rig.shard, iterator, limit)
            assert len(fetch.records) <= limit
            assert fetch.read == len(fetch.records)
            assert fetch.newest == (fetch.records[-1].id if fetch.records else "")
            assert fetch.nbytes == sum(len(record.wire) for record in fetch.records)
            found += fetch.records
            iterator = fetch.next_iterator
    return found


class TestStreams:
    async def test_listing_names_open_shards_and_the_servers_time(self, rig: StreamRig) -> None:
        """A new stream has one open shard without parents; `at` is the time by the server's clock."""
        listing = await rig.source.shards()
        assert [(shard.parents, shard.closed) for shard in listing.shards] == [((), False)]
        assert listing.at == pytest.approx(SystemClock(asyncio.get_running_loop()).now(), abs=5)

    async def test_retention_is_a_day(self, rig: StreamRig) -> None:
        """A stream keeps records for a day unless told otherwise."""
        assert (await rig.source.facts()).retention == 86_400

    async def test_records_come_in_order_and_once_over_pages(self, rig: StreamRig) -> None:
        """Reading page by page from TRIM_HORIZON gives each record once, in the order they were put."""
        for number in range(5):
            await rig.put("same", f"text {number}")
        records = await read(rig, TRIM_HORIZON, 5, limit=2)
        assert [rig.text(record) for record in records] == [f"text {number}" for number in range(5)]
        assert sorted(records, key=lambda record: int(record.id)) == records

    async def test_equal_keys_are_equal_and_others_are_not(self, rig: StreamRig) -> None:
        """The order key is what the user keeps order by: partition key or primary key."""
        for key, text in (("a", "1"), ("b", "2"), ("a", "3")):
            await rig.put(key, text)
        first, second, third = [record.key for record in await read(rig, TRIM_HORIZON, 3)]
        assert first == third != second

    async def test_arrival_is_now(self, rig: StreamRig) -> None:
        """A record's arrival is epoch seconds."""
        await rig.put("k", "x")
        [record] = await read(rig, TRIM_HORIZON, 1)
        assert record.arrival == pytest.approx(SystemClock(asyncio.get_running_loop()).now(), abs=5)

    async def test_at_includes_and_after_excludes(self, rig: StreamRig) -> None:
        """AT a sequence number starts with that record, AFTER with the next one."""
        for number in range(3):
            await rig.put("k", str(number))
        records = await read(rig, TRIM_HORIZON, 3)
        assert await read(rig, Position(PositionKind.AT, records[1].id), 2) == records[1:]
        assert await read(rig, Position(PositionKind.AFTER, records[1].id), 1) == records[2:]

    async def test_latest_sees_only_what_comes_later_and_its_iterator_may_be_used_again(self, rig: StreamRig) -> None:
        """A LATEST iterator fixes its place when it is made; a read that failed may be repeated with it."""
        await rig.put("k", "before")
        iterator = await rig.source.iterator(rig.shard, LATEST)
        await rig.put("k", "after")
        for _ in range(2):
            fetch = await rig.source.fetch(rig.shard, iterator, 10)
            assert [rig.text(record) for record in fetch.records] == ["after"]

    async def test_an_empty_read_at_the_tip_goes_on(self, rig: StreamRig) -> None:
        """No records is not the end: there is a next iterator and no newest record."""
        fetch = await rig.source.fetch(rig.shard, await rig.source.iterator(rig.shard, TRIM_HORIZON), 10)
        assert (fetch.records, fetch.newest, fetch.read, fetch.nbytes) == ((), "", 0, 0)
        assert fetch.next_iterator
        assert fetch.lag in (0, None)

    async def test_a_bad_iterator_is_asked_for_again(self, rig: StreamRig) -> None:
        """An iterator that the service does not know is IteratorExpired; moto only says 500."""
        with pytest.raises(IteratorExpired if rig.is_exact else SourceUnavailable):
            await rig.source.fetch(rig.shard, "garbage", 10)

    async def test_a_stream_that_does_not_exist_is_gone(self, rig: StreamRig) -> None:
        """Neither its shards nor an iterator can be had."""
        with pytest.raises(SourceGone if rig.is_exact else (SourceGone, SourceUnavailable)):
            await rig.missing.shards()
        with pytest.raises(SourceGone if rig.is_exact else (SourceGone, SourceUnavailable)):
            await rig.missing.iterator(rig.shard, TRIM_HORIZON)

    async def test_nobody_there_is_unavailable(self, rig: StreamRig) -> None:
        """A refused connection is SourceUnavailable, for cold and hot calls alike."""
        with pytest.raises(SourceUnavailable):
            await rig.nowhere.shards()
        with pytest.raises(SourceUnavailable, match="GetShardIterator"):
            await rig.nowhere.iterator(rig.shard, TRIM_HORIZON)
        with pytest.raises(SourceUnavailable, match="GetRecords"):
            await rig.nowhere.fetch(rig.shard, "iterator", 1)

    async def test_the_end_has_no_iterator(self, rig: StreamRig) -> None:
        """Asking for one at SHARD_END is the caller's mistake."""
        with pytest.raises(ValueError, match=r"."):
            await rig.source.iterator(rig.shard, END)


@dataclass
class QueueRig:
    """One fresh queue, and how to write to it."""

    source: QueueSource
    missing: QueueSource
    nowhere: QueueSource
    send: Callable[..., Awaitable[Any]]


@pytest.fixture(params=QUEUES)
def emulator(request: pytest.FixtureRequest) -> str:
    return str(request.param.split("-")[1])


@pytest.fixture
async def make_queue(emulator: str, account: str, connect: Connect) -> Callable[..., Awaitable[QueueRig]]:  # noqa: F811
    async def made(name: str, **attributes: str) -> QueueRig:
        clients = await connect(emulators.running(emulator))
        nowhere = await connect(f"http://127.0.0.1:{emulators.free_port()}")
        sqs = await clients.client("sqs", REGION)
        url = (await sqs.create_queue(QueueName=name, Attributes=attributes))["QueueUrl"]
        clock = SystemClock(asyncio.get_running_loop())

        async def send(body: str, **extra: Any) -> Any:
            return await sqs.send_message(QueueUrl=url, MessageBody=body, **extra)

        async def opened(where: AwsClients, which: str) -> QueueSource:
            arn = f"arn:aws:sqs:{REGION}:{account}:{which}"
            spec = SourceSpec(SourceKind.SQS, arn, REGION, account, which, fifo=which.endswith(".fifo"))
            return await Sources(where, clock).open_queue(mapping_of(spec))

        return QueueRig(
            await opened(clients, name), await opened(clients, "nobody-made-this"), await opened(nowhere, name), send
        )

    return made


@pytest.fixture
async def queue(make_queue: Callable[..., Awaitable[QueueRig]]) -> AsyncIterator[QueueRig]:
    rig = await make_queue("orders", VisibilityTimeout="77")
    yield rig
    await rig.source.close()


async def drain(source: QueueSource) -> list[Record]:
    """Everything that a queue gives without waiting for new messages."""
    found: list[Record] = []
    while records := await source.receive(10, 0, 30.0):
        found += records
    return found


class TestQueues:
    async def test_visibility_timeout_is_the_queues_own(self, queue: QueueRig) -> None:
        """As the queue was made."""
        assert await queue.source.visibility_timeout() == 77

    async def test_expiry_is_counted_from_before_the_call(self, queue: QueueRig) -> None:
        """`expires` is never too late, whatever the queue's own timeout is."""
        clock = SystemClock(asyncio.get_running_loop())
        for seconds in (33.0, 120.0):
            await queue.send("x")
            before = clock.now()
            [record] = await queue.source.receive(1, 0, seconds)
            assert before <= record.expires - seconds + 1e-3
            assert record.expires - seconds <= clock.now()
            assert record.arrival == pytest.approx(clock.now(), abs=5)

    async def test_an_asked_for_visibility_of_nothing_returns_at_once(self, queue: QueueRig) -> None:
        """Visibility 0 is sent as 0, not taken for unset."""
        await queue.send("x")
        first = await queue.source.receive(1, 0, 0.0)
        assert [record.id for record in await queue.source.receive(1, 1, 30.0)] == [record.id for record in first]

    async def test_the_limit_is_kept(self, queue: QueueRig) -> None:
        """Never more messages than asked for, never more than ten."""
        for number in range(12):
            await queue.send(str(number))
        assert len(await queue.source.receive(3, 0, 30.0)) <= 3
        assert len(await queue.source.receive(50, 0, 30.0)) <= 10

    async def test_an_empty_queue_answers_nothing(self, queue: QueueRig) -> None:
        """No messages is no error."""
        assert list(await queue.source.receive(10, 0, 30.0)) == []

    async def test_a_long_poll_waits_for_a_message(self, queue: QueueRig) -> None:
        """The call is still waiting when the message is sent, and then answers long before its wait is over."""
        await queue.source.visibility_timeout()
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            waiting = group.create_task(queue.source.receive(10, 20, 30.0))
            await asyncio.sleep(0.15)
            assert not waiting.done()
            await queue.send("late")
        assert [json.loads(record.wire)["body"] for record in waiting.result()] == ["late"]

    async def test_deletes_go_in_tens(self, queue: QueueRig) -> None:
        """More than ten messages are deleted by one call, and none is given again."""
        for number in range(23):
            await queue.send(str(number))
        records = await drain(queue.source)
        assert len(records) == 23
        assert list(await queue.source.delete(records)) == []
        await queue.source.extend(records, 0)
        assert await drain(queue.source) == []

    async def test_a_bad_receipt_is_answered_and_the_others_are_deleted(self, queue: QueueRig) -> None:
        """A partial failure names exactly the messages that are still there."""
        await queue.send("a")
        await queue.send("b")
        first, second = await drain(queue.source)
        bad = first._replace(handle="not-a-receipt")
        assert list(await queue.source.delete([bad, second])) == [bad]

    async def test_extending_to_nothing_returns_messages_at_once(self, queue: QueueRig) -> None:
        """Visibility 0 gives the message back, with a new receipt."""
        await queue.send("x")
        [record] = await queue.source.receive(1, 0, 30.0)
        assert list(await queue.source.receive(1, 0, 30.0)) == []
        assert list(await queue.source.extend([record], 0)) == []
        [again] = await queue.source.receive(1, 1, 30.0)
        assert (again.id, json.loads(again.wire)["attributes"]["ApproximateReceiveCount"]) == (record.id, "2")

    async def test_extending_answers_what_was_not_changed(self, queue: QueueRig) -> None:
        """A message with a bad receipt is answered, the other is extended."""
        await queue.send("x")
        [record] = await queue.source.receive(1, 0, 30.0)
        bad = record._replace(handle="not-a-receipt")
        assert list(await queue.source.extend([record, bad], 100.5)) == [bad]

    async def test_attributes_come_as_lambda_shows_them(self, queue: QueueRig) -> None:
        """Message attributes, binary ones included, and the digests, in the shape of AWS's recorded event."""
        await queue.send(
            'h\u00e4llo "x"\U0001f600',
            MessageAttributes={
                "WeeksOn": {"DataType": "Number", "StringValue": "6"},
                "Blob": {"DataType": "Binary", "BinaryValue": b"\x00\x01\x02"},
            },
        )
        [record] = await queue.source.receive(1, 0, 30.0)
        event = json.loads(record.wire)
        assert list(event) == [
            "messageId", "receiptHandle", "body", "attributes", "messageAttributes", "md5OfMessageAttributes",
            "md5OfBody", "eventSource", "eventSourceARN", "awsRegion",
        ]  # fmt: skip
        assert event["body"] == 'h\u00e4llo "x"\U0001f600'
        lists = {"stringListValues": [], "binaryListValues": []}
        assert event["messageAttributes"] == {
            "WeeksOn": {"stringValue": "6", **lists, "dataType": "Number"},
            "Blob": {"binaryValue": "AAEC", **lists, "dataType": "Binary"},
        }
        assert {"ApproximateReceiveCount", "SentTimestamp", "SenderId", "ApproximateFirstReceiveTimestamp"} <= set(
            event["attributes"]
        )
        assert all(isinstance(value, str) for value in event["attributes"].values())
        assert (event["messageId"], event["receiptHandle"]) == (record.id, record.handle)

    async def test_a_trace_header_is_taken_along(self, queue: QueueRig) -> None:
        """AWSTraceHeader becomes the record's trace."""
        trace = "Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=1"
        await queue.send("x", MessageSystemAttributes={"AWSTraceHeader": {"DataType": "String", "StringValue": trace}})
        [record] = await queue.source.receive(1, 0, 30.0)
        assert record.trace == Trace(trace)

    async def test_a_fifo_group_keeps_order_and_is_locked_while_in_flight(
        self, make_queue: Callable[..., Awaitable[QueueRig]]
    ) -> None:
        """The key is the group; nothing more of a group comes until its messages are deleted."""
        queue = await make_queue("orders.fifo", FifoQueue="true", ContentBasedDeduplication="true")
        for number in range(3):
            await queue.send(str(number), MessageGroupId="g")
        [first] = await queue.source.receive(1, 0, 30.0)
        assert (first.key, json.loads(first.wire)["body"]) == ("g", "0")
        assert list(await queue.source.receive(10, 0, 30.0)) == []
        assert list(await queue.source.delete([first])) == []
        rest = await queue.source.receive(10, 0, 30.0)
        assert [json.loads(record.wire)["body"] for record in rest] == ["1", "2"]

    async def test_a_queue_that_does_not_exist_is_gone(self, queue: QueueRig) -> None:
        """For its attributes and for its messages; changes answer that nothing was done."""
        with pytest.raises(SourceGone):
            await queue.missing.visibility_timeout()
        with pytest.raises(SourceGone):
            await queue.missing.receive(1, 0, 30.0)
        record = Record("id", "", 0.0, b"{}", handle="h")
        assert list(await queue.missing.delete([record])) == [record]

    async def test_nobody_there_is_unavailable(self, queue: QueueRig) -> None:
        """A refused connection is SourceUnavailable."""
        with pytest.raises(SourceUnavailable):
            await queue.nowhere.visibility_timeout()


def test_every_kind_has_its_line() -> None:
    """KINDS says for each source which service it is, and how a stream is read."""
    assert set(KINDS) == set(SourceKind)
    for kind, facts in KINDS.items():
        assert (facts.traits is not None) == kind.is_stream


async def test_a_queue_is_no_stream(account: str, connect: Connect) -> None:  # noqa: F811
    """Opening a source as what it is not is refused."""
    clients = await connect("http://127.0.0.1:1")
    sources = Sources(clients, SystemClock(asyncio.get_running_loop()))
    with pytest.raises(ValueError, match="queue"):
        await sources.open_stream(mapping_of(SourceSpec(SourceKind.SQS, "arn:q", REGION, account, "q")))
    with pytest.raises(ValueError, match="stream"):
        await sources.open_queue(mapping_of(SourceSpec(SourceKind.KINESIS, "arn:s", REGION, account, "s")))
