"""The fake AWS keeps the rules of the services it stands for; where an emulator does too, both run the same test."""
# ruff: noqa: F811  # fixtures are imported by name and then named as arguments

import asyncio
import base64
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import ClientError

from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.core.model import (
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
)
from poller.errors import IteratorExpired, PositionTrimmed, SourceGone, SourceThrottled
from poller.ports import StreamSource
from poller.sources import Sources
from tests.contract import test_sources
from tests.fakes.aws import FakeAws
from tests.fakes.aws.shards import AwsFault
from tests.integration import emulators
from tests.integration.conftest import REGION, account, connect, fake_aws  # noqa: F401

pytestmark = pytest.mark.integration

Connect = Callable[[str], Awaitable[AwsClients]]


def opened(clients: AwsClients, arn: str, owner: str) -> Awaitable[StreamSource]:
    """Our own source over a stream."""
    kind = SourceKind.DYNAMODB if ":dynamodb:" in arn else SourceKind.KINESIS
    spec = SourceSpec(kind, arn, REGION, owner, arn.split("/")[1])
    function = FunctionSpec("f", f"arn:aws:lambda:{REGION}:1:function:f", "arn:aws:iam::1:role/f")
    mapping = Mapping("m", spec, function, BatchPolicy(10), RetryPolicy(), TRIM_HORIZON)
    return Sources(clients, SystemClock(asyncio.get_running_loop())).open_stream(mapping)


def text_of(record: Record) -> str:
    """What a test wrote."""
    event = json.loads(record.wire)
    if "kinesis" in event:
        return base64.b64decode(event["kinesis"]["data"]).decode()
    return str(event["dynamodb"]["NewImage"]["text"]["S"])


async def read(source: StreamSource, shard: str, at: Position = TRIM_HORIZON, reads: int = 3) -> tuple[list[str], bool]:
    """The texts of a shard, and whether it ended within so many reads."""
    iterator: str | None = await source.iterator(shard, at)
    found: list[str] = []
    for _ in range(reads):
        assert iterator is not None
        fetch = await source.fetch(shard, iterator, 10_000)
        found += [text_of(record) for record in fetch.records]
        if (iterator := fetch.next_iterator) is None:
            return found, True
    return found, False


class TestStreamsOnTheFake(test_sources.TestStreams):
    """Every rule that our sources keep with MiniStack, roto and moto."""

    @pytest.fixture(params=["kinesis", "dynamodb"])
    async def rig(
        self,
        request: pytest.FixtureRequest,
        account: str,
        connect: Connect,
        fake_aws: FakeAws,
    ) -> test_sources.StreamRig:
        clients = await connect(fake_aws.url)
        nowhere = await connect(f"http://127.0.0.1:{emulators.free_port()}")
        kinesis = await clients.client("kinesis", REGION)
        if request.param == "kinesis":
            await kinesis.create_stream(StreamName="t", ShardCount=1)
            arn = f"arn:aws:kinesis:{REGION}:{account}:stream/t"

            async def put(key: str, text: str) -> None:
                await kinesis.put_record(StreamName="t", PartitionKey=key, Data=text.encode())
        else:
            arn = fake_aws.stream("t", account, REGION)

            async def put(key: str, text: str) -> None:
                fake_aws.put(arn, [item(key, text)])

        rig = test_sources.StreamRig(
            await opened(clients, arn, account),
            await opened(clients, arn + "-gone", account),
            await opened(nowhere, arn, account),
            put,
            text_of,
        )
        rig.shard = (await rig.source.shards()).shards[0].id
        return rig


def item(key: str, text: str) -> dict[str, Any]:
    """A new item."""
    return {"keys": {"id": {"S": key}}, "new": {"id": {"S": key}, "text": {"S": text}}}


# --- Kinesis: the fake beside the emulators


@dataclass
class KinesisRig:
    """One fresh stream on a server."""

    client: Any
    source: StreamSource
    arn: str

    async def put(self, key: str, text: str, **extra: str) -> Any:
        return await self.client.put_record(StreamName="t", PartitionKey=key, Data=text.encode(), **extra)


@pytest.fixture
def start(
    request: pytest.FixtureRequest,
    account: str,
    connect: Connect,
    fake_aws: FakeAws,
) -> Callable[[int], Awaitable[KinesisRig]]:
    """Makes a stream with so many shards on the server that the test is run with; the fake without one."""

    async def made(shards: int) -> KinesisRig:
        name = getattr(request, "param", "fake")
        clients = await connect(fake_aws.url if name == "fake" else emulators.running(name))
        client = await clients.client("kinesis", REGION)
        await client.create_stream(StreamName="t", ShardCount=shards)
        await client.get_waiter("stream_exists").wait(StreamName="t", WaiterConfig={"Delay": 0.05, "MaxAttempts": 100})
        arn = f"arn:aws:kinesis:{REGION}:{account}:stream/t"
        return KinesisRig(client, await opened(clients, arn, account), arn)

    return made


reshards = pytest.mark.parametrize("start", ["fake", "roto"], indirect=True)
lags = pytest.mark.parametrize("start", ["fake", "ministack"], indirect=True)


async def listed(source: StreamSource, count: int) -> list[Any]:
    """The shards, once there are so many: an emulator reshards in the background."""
    async with asyncio.timeout(10):
        while len(shards := (await source.shards()).shards) < count:
            await asyncio.sleep(0.05)
    return list(shards)


class TestKinesis:
    @reshards
    async def test_a_split_has_one_closed_parent_and_two_children(self, start) -> None:
        """Records stay in the parent, which reads to its end; later ones go where their key's hash belongs."""
        rig = await start(1)
        await rig.put("k", "before")
        [parent] = await listed(rig.source, 1)
        await rig.client.split_shard(StreamName="t", ShardToSplit=parent.id, NewStartingHashKey=str(2**127))
        shards = await listed(rig.source, 3)
        await rig.put("k", "low", ExplicitHashKey="0")
        await rig.put("k", "high", ExplicitHashKey=str(2**128 - 1))
        assert [(shard.parents, shard.closed) for shard in shards] == [((), True), *[((parent.id,), False)] * 2]
        assert await read(rig.source, parent.id) == (["before"], True)
        assert [await read(rig.source, shard.id, reads=1) for shard in shards[1:]] == [
            (["low"], False),
            (["high"], False),
        ]

    @reshards
    async def test_a_merge_has_two_parents(self, start) -> None:
        """The child names both and takes the keys of both; a split of the child goes on."""
        rig = await start(2)
        one, two = await listed(rig.source, 2)
        await rig.client.merge_shards(StreamName="t", ShardToMerge=one.id, AdjacentShardToMerge=two.id)
        child = (await listed(rig.source, 3))[2]
        assert set(child.parents) == {one.id, two.id}
        for hash_key in (0, 2**128 - 1):
            await rig.put("k", str(hash_key), ExplicitHashKey=str(hash_key))
        assert await read(rig.source, child.id, reads=1) == (["0", str(2**128 - 1)], False)
        assert await read(rig.source, one.id) == ([], True)

    @reshards
    async def test_what_is_not_adjacent_or_not_open_does_not_merge(self, start) -> None:
        """AWS's code for it."""
        rig = await start(3)
        shards = await listed(rig.source, 3)
        with pytest.raises(ClientError, match="InvalidArgumentException"):
            await rig.client.merge_shards(StreamName="t", ShardToMerge=shards[0].id, AdjacentShardToMerge=shards[2].id)

    @reshards
    async def test_pages_are_followed_with_the_token_alone(self, start) -> None:
        """NextToken without the stream's name; every shard once."""
        rig = await start(5)
        page = await rig.client.list_shards(StreamName="t", MaxResults=2)
        ids = [shard["ShardId"] for shard in page["Shards"]]
        while token := page.get("NextToken"):
            page = await rig.client.list_shards(NextToken=token, MaxResults=2)
            ids += [shard["ShardId"] for shard in page["Shards"]]
        assert ids == [f"shardId-{n:012d}" for n in range(5)]

    @lags
    async def test_a_read_that_leaves_records_is_behind(self, start) -> None:
        """MillisBehindLatest is 0 with the newest record in hand, more before; the limit is kept."""
        rig = await start(1)
        await rig.put("k", "first")
        await asyncio.sleep(0.02)
        await rig.put("k", "second")
        iterator = await rig.source.iterator("shardId-000000000000", TRIM_HORIZON)
        first = await rig.source.fetch("shardId-000000000000", iterator, 1)
        second = await rig.source.fetch("shardId-000000000000", first.next_iterator or "", 1)
        assert [text_of(record) for record in first.records + second.records] == ["first", "second"]
        assert first.lag > 0
        assert second.lag == 0

    @lags
    async def test_a_time_is_a_position(self, start) -> None:
        """Records that came before are not read."""
        rig = await start(1)
        await rig.put("k", "before")
        [before] = (
            await rig.source.fetch("s", await rig.source.iterator("shardId-000000000000", TRIM_HORIZON), 1)
        ).records
        await asyncio.sleep(0.01)
        await rig.put("k", "after")
        at = Position(PositionKind.AT_TIMESTAMP, repr(before.arrival + 0.002))
        assert await read(rig.source, "shardId-000000000000", at, 1) == (["after"], False)

    async def test_sequence_numbers_are_as_long_as_awss_and_rise(self, start) -> None:
        """56 digits, rising over a reshard."""
        rig = await start(1)
        numbers = [(await rig.put("k", "x"))["SequenceNumber"] for _ in range(3)]
        await rig.client.split_shard(StreamName="t", ShardToSplit="shardId-000000000000", NewStartingHashKey="1")
        numbers.append((await rig.put("k", "x"))["SequenceNumber"])
        assert all(len(number) == 56 and number.startswith("49") for number in numbers)
        assert all(int(one) < int(two) for one, two in pairwise(numbers))

    async def test_the_last_answer_names_the_children(self, start) -> None:
        """Without an iterator, at the tip, with parents and hash ranges."""
        rig = await start(1)
        await rig.put("k", "x")
        parent = "shardId-000000000000"
        await rig.client.split_shard(StreamName="t", ShardToSplit=parent, NewStartingHashKey=str(2**127))
        made = await rig.client.get_shard_iterator(StreamName="t", ShardId=parent, ShardIteratorType="TRIM_HORIZON")
        answer = await rig.client.get_records(ShardIterator=made["ShardIterator"])
        assert len(answer["Records"]) == 1
        assert "NextShardIterator" not in answer
        assert answer["MillisBehindLatest"] == 0
        assert [child["ParentShards"] for child in answer["ChildShards"]] == [[parent], [parent]]
        assert answer["ChildShards"][1]["HashKeyRange"]["StartingHashKey"] == str(2**127)

    async def test_lag_is_measured_from_now(self, start, fake_aws) -> None:
        """The age of the oldest record that is left, whatever else arrived together with it."""
        rig = await start(1)
        for _ in range(3):
            await rig.put("k", "x")
        fake_aws.clock = lambda: time.time() + 60
        made = await rig.source.iterator("shardId-000000000000", TRIM_HORIZON)
        assert 60 <= (await rig.source.fetch("shardId-000000000000", made, 2)).lag < 70

    async def test_empty_pages_come_while_there_is_more(self, start, fake_aws) -> None:
        """As many as were asked for: an iterator, no records, behind; then the records, none of them lost."""
        rig = await start(1)
        await rig.put("k", "x")
        fake_aws.empty(rig.arn, pages=2)
        iterator = await rig.source.iterator("shardId-000000000000", TRIM_HORIZON)
        for _ in range(2):
            fetch = await rig.source.fetch("shardId-000000000000", iterator, 10)
            assert (fetch.read, fetch.lag > 0) == (0, True)
            iterator = fetch.next_iterator
        fetch = await rig.source.fetch("shardId-000000000000", iterator, 10)
        assert (fetch.read, fetch.lag) == (1, 0)

    async def test_an_answer_has_ten_mebibytes_at_most(self, start) -> None:
        """Then it ends early, and the next one goes on."""
        rig = await start(1)
        for _ in range(24):
            await rig.put("k", "x" * (2**19 - 1))
        iterator = await rig.source.iterator("shardId-000000000000", TRIM_HORIZON)
        fetch = await rig.source.fetch("shardId-000000000000", iterator, 10_000)
        assert fetch.read == 20
        assert (await rig.source.fetch("shardId-000000000000", fetch.next_iterator or "", 10_000)).read == 4

    async def test_reads_are_throttled_by_load(self, start, fake_aws) -> None:
        """Five GetRecords and five GetShardIterator a second and shard; not before it is switched on."""
        rig = await start(2)
        shard = "shardId-000000000000"
        now = time.time()
        fake_aws.clock = lambda: now
        iterators = [await plain_iterator(rig.client, shard) for _ in range(6)]
        fake_aws.throttle(True)
        for _ in range(5):
            await rig.client.get_records(ShardIterator=iterators[0])
            await plain_iterator(rig.client, shard)
        with pytest.raises(ClientError, match="ProvisionedThroughputExceededException"):
            await rig.client.get_records(ShardIterator=iterators[1])
        with pytest.raises(ClientError, match="ProvisionedThroughputExceededException"):
            await plain_iterator(rig.client, shard)
        await rig.client.get_records(ShardIterator=await plain_iterator(rig.client, "shardId-000000000001"))
        now += 1
        await rig.client.get_records(ShardIterator=iterators[0])

    async def test_a_large_answer_is_paid_for_with_silence(self, start, fake_aws) -> None:
        """Two reads of 1 MiB fill a second; 10 MiB fill five."""
        rig = await start(1)
        now = time.time()
        fake_aws.clock = lambda: now
        fake_aws.throttle(True)
        for _ in range(25):
            await rig.put("k", "x" * (2**19 - 1))
        iterator = await plain_iterator(rig.client, "shardId-000000000000")

        async def get(limit: int) -> str:
            answer = await rig.client.get_records(ShardIterator=iterator, Limit=limit)
            return str(answer["NextShardIterator"])

        iterator = await get(2)
        iterator = await get(2)
        with pytest.raises(ClientError, match="ProvisionedThroughputExceededException"):
            await get(1)
        now += 1
        iterator = await get(10_000)
        now += 4.9
        with pytest.raises(ClientError, match="ProvisionedThroughputExceededException"):
            await get(1)
        now += 0.2
        await get(1)

    async def test_some_entries_of_a_put_fail_on_demand(self, start, fake_aws) -> None:
        """Those that were named, once, with a code each; the others are there."""
        rig = await start(1)
        entries = [{"PartitionKey": "k", "Data": str(n).encode()} for n in range(3)]
        fake_aws.fail_puts(rig.arn, [1])
        answer = await rig.client.put_records(StreamName="t", Records=entries)
        assert answer["FailedRecordCount"] == 1
        assert answer["Records"][1]["ErrorCode"] == "ProvisionedThroughputExceededException"
        assert (await rig.client.put_records(StreamName="t", Records=entries[1:2]))["FailedRecordCount"] == 0
        assert await read(rig.source, "shardId-000000000000", reads=1) == (["0", "2", "1"], False)

    async def test_what_is_trimmed_is_passed_over_in_silence(self, start, fake_aws) -> None:
        """Unlike DynamoDB, positions and iterators before the horizon read from there."""
        rig = await start(1)
        shard = "shardId-000000000000"
        numbers = [(await rig.put("k", str(n)))["SequenceNumber"] for n in range(4)]
        old = await rig.source.iterator(shard, TRIM_HORIZON)
        assert fake_aws.trim(rig.arn, shard, 2) == {shard: 2}
        assert [text_of(record) for record in (await rig.source.fetch(shard, old, 10)).records] == ["2", "3"]
        for kind in (PositionKind.AT, PositionKind.AFTER):
            assert await read(rig.source, shard, Position(kind, numbers[0]), 1) == (["2", "3"], False)

    async def test_closed_shards_are_listed_until_they_vanish(self, start, fake_aws) -> None:
        """Even without records; then nothing can be asked of them. Open ones stay."""
        rig = await start(1)
        parent = "shardId-000000000000"
        await rig.client.split_shard(StreamName="t", ShardToSplit=parent, NewStartingHashKey="1")
        iterator = await rig.source.iterator(parent, TRIM_HORIZON)
        fake_aws.trim(rig.arn)
        assert len(await listed(rig.source, 3)) == 3
        assert fake_aws.vanish(rig.arn) == {parent: 0}
        assert [shard.parents for shard in (await rig.source.shards()).shards] == [(parent,), (parent,)]
        with pytest.raises(SourceGone):
            await rig.source.iterator(parent, TRIM_HORIZON)
        with pytest.raises(SourceGone):
            await rig.source.fetch(parent, iterator, 1)

    async def test_tokens_expire_on_demand_and_by_age(self, start, fake_aws) -> None:
        """Iterators and listing tokens, after five minutes or at once; new ones are good."""
        rig = await start(3)
        shard = "shardId-000000000000"
        for age in (
            lambda: fake_aws.expire(rig.arn),
            lambda: setattr(fake_aws, "clock", lambda: time.time() + 301),
        ):
            iterator = await rig.source.iterator(shard, TRIM_HORIZON)
            token = (await rig.client.list_shards(StreamName="t", MaxResults=1))["NextToken"]
            age()
            with pytest.raises(IteratorExpired):
                await rig.source.fetch(shard, iterator, 1)
            with pytest.raises(ClientError, match="ExpiredNextTokenException"):
                await rig.client.list_shards(NextToken=token)
            await rig.source.fetch(shard, await rig.source.iterator(shard, TRIM_HORIZON), 1)

    @pytest.mark.filterwarnings("ignore:Sending a large body")
    @pytest.mark.parametrize(
        ("operation", "request_", "code"),
        [
            ("list_shards", {"StreamName": "t", "NextToken": "x"}, "InvalidArgumentException"),
            ("list_shards", {"NextToken": "x"}, "InvalidArgumentException"),
            ("get_records", {"ShardIterator": "x"}, "InvalidArgumentException"),
            ("describe_stream_summary", {"StreamName": "other"}, "ResourceNotFoundException"),
            ("create_stream", {"StreamName": "t", "ShardCount": 1}, "ResourceInUseException"),
            ("put_record", {"StreamName": "t", "PartitionKey": "k", "Data": b"x" * (2**20 + 1)}, "ValidationException"),
            ("list_shards", {"StreamName": "t", "ShardFilter": {"Type": "AT_LATEST"}}, "ValidationException"),
            ("list_streams", {}, "UnknownOperationException"),
        ],
    )
    async def test_bad_requests_are_answered_as_aws_does(self, start, operation, request_, code) -> None:
        """With its codes; what the fake does not know is refused, never ignored."""
        rig = await start(1)
        with pytest.raises(ClientError, match=code):
            await getattr(rig.client, operation)(**request_)

    async def test_a_number_of_another_shard_is_refused(self, start) -> None:
        """In AWS's words, which our source tells from a trimmed one."""
        rig = await start(2)
        number = (await rig.put("k", "x", ExplicitHashKey="0"))["SequenceNumber"]
        with pytest.raises(ClientError, match="It encodes shardId-000000000000"):
            await rig.client.get_shard_iterator(
                StreamName="t",
                ShardId="shardId-000000000001",
                ShardIteratorType="AT_SEQUENCE_NUMBER",
                StartingSequenceNumber=number,
            )

    async def test_a_deleted_stream_is_gone(self, start) -> None:
        """For its readers too."""
        rig = await start(1)
        await rig.client.delete_stream(StreamName="t")
        with pytest.raises(SourceGone):
            await rig.source.shards()


async def plain_iterator(client: Any, shard: str) -> str:
    """Past our own source's limits."""
    answer = await client.get_shard_iterator(StreamName="t", ShardId=shard, ShardIteratorType="TRIM_HORIZON")
    return str(answer["ShardIterator"])


# --- DynamoDB Streams: what MiniStack does too is in TestStreams


@dataclass
class TableRig:
    """One fresh stream with `roots` roots."""

    aws: FakeAws
    arn: str
    source: StreamSource
    client: Any

    def put(self, *texts: str, key: str = "k") -> list[str]:
        return self.aws.put(self.arn, [item(key, text) for text in texts])


@pytest.fixture
def table(account, connect, fake_aws) -> Callable[[int], Awaitable[TableRig]]:
    async def made(roots: int) -> TableRig:
        clients = await connect(fake_aws.url)
        arn = fake_aws.stream("t", account, REGION, shards=roots)
        return TableRig(
            fake_aws, arn, await opened(clients, arn, account), await clients.client("dynamodbstreams", REGION)
        )

    return made


class TestDynamoStreams:
    async def test_a_record_is_what_ministack_makes_of_the_same_change(
        self,
        table,
        account,
        connect,
    ) -> None:
        """Names, images and members agree; numbers, ids and times are each server's own."""
        rig = await table(1)
        old, new = {"id": {"S": "k"}, "n": {"N": "1"}}, {"id": {"S": "k"}, "n": {"N": "2"}}
        keys = {"id": {"S": "k"}}
        rig.aws.put(
            rig.arn, [{"keys": keys, "new": old}, {"keys": keys, "new": new, "old": old}, {"keys": keys, "old": new}]
        )
        clients = await connect(emulators.running("ministack"))
        dynamodb = await clients.client("dynamodb", REGION)
        made = await dynamodb.create_table(
            TableName="orders",
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            BillingMode="PAY_PER_REQUEST",
            StreamSpecification={"StreamEnabled": True, "StreamViewType": "NEW_AND_OLD_IMAGES"},
        )
        await dynamodb.put_item(TableName="orders", Item=old)
        await dynamodb.put_item(TableName="orders", Item=new)
        await dynamodb.delete_item(TableName="orders", Key=keys)
        real = await opened(clients, made["TableDescription"]["LatestStreamArn"], account)

        async def seen(source: StreamSource) -> list[dict[str, Any]]:
            shard = (await source.shards()).shards[0].id
            events = []
            for record in (await source.fetch(shard, await source.iterator(shard, TRIM_HORIZON), 10)).records:
                event = json.loads(record.wire)
                for own in ("eventID", "eventSourceARN"):
                    assert event.pop(own)
                for own in ("SequenceNumber", "ApproximateCreationDateTime"):
                    assert event["dynamodb"].pop(own)
                assert event["dynamodb"].pop("SizeBytes") >= 0  # MiniStack always says 0
                events.append(event)
            return events

        ours = await seen(rig.source)
        assert [event["eventName"] for event in ours] == ["INSERT", "MODIFY", "REMOVE"]
        assert ours == await seen(real)

    async def test_a_roll_closes_each_shard_and_makes_one_child(self, table) -> None:
        """The child is visible, and takes the records, before anybody has read the parent to its end."""
        rig = await table(3)
        roots = {shard.id for shard in (await rig.source.shards()).shards}
        rig.put("before")
        children = rig.aws.roll(rig.arn)
        rig.put("after")
        shards = {shard.id: shard for shard in (await rig.source.shards()).shards}
        assert {child: shards[child].parents[0] in roots for child in children} == dict.fromkeys(children, True)
        assert {shard.id: shard.closed for shard in shards.values()} == {
            **dict.fromkeys(roots, True),
            **dict.fromkeys(children, False),
        }
        assert sum([(await read(rig.source, root))[0] for root in roots], []) == ["before"]  # noqa: RUF017
        assert [(await read(rig.source, root))[1] for root in roots] == [True] * 3
        assert sum([(await read(rig.source, child))[0] for child in children], []) == ["after"]  # noqa: RUF017
        only = {"Type": "CHILD_SHARDS", "ShardId": shards[children[0]].parents[0]}
        found = await rig.client.describe_stream(StreamArn=rig.arn, ShardFilter=only)
        assert [shard["ShardId"] for shard in found["StreamDescription"]["Shards"]] == children[:1]
        with pytest.raises(AwsFault, match="is closed"):
            rig.aws.roll(rig.arn, min(roots))

    async def test_a_listing_has_pages_of_a_hundred(self, table) -> None:
        """In no useful order; a page goes on after a shard that has vanished meanwhile."""
        rig = await table(70)
        rig.aws.roll(rig.arn)
        first = (await rig.client.describe_stream(StreamArn=rig.arn))["StreamDescription"]
        assert len(first["Shards"]) == 100
        assert len((await rig.source.shards()).shards) == 140
        children = [n for n, shard in enumerate(first["Shards"]) if "ParentShardId" in shard]
        assert 0 < len(children) < 100
        assert children != list(range(100 - len(children), 100)), "sorted by age"
        rig.aws.vanish(rig.arn)
        last = (
            await rig.client.describe_stream(StreamArn=rig.arn, ExclusiveStartShardId=first["LastEvaluatedShardId"])
        )["StreamDescription"]
        assert "LastEvaluatedShardId" not in last
        assert len(last["Shards"]) == 70 - len(children)
        assert not {shard["ShardId"] for shard in first["Shards"]} & {shard["ShardId"] for shard in last["Shards"]}

    async def test_numbers_grow_longer(self, table) -> None:
        """From 21 digits to 22: they must not be compared as text."""
        rig = await table(1)
        numbers = rig.put(*map(str, range(300)))
        assert (len(numbers[0]), len(numbers[-1])) == (21, 22)
        assert sorted(numbers, key=int) == numbers != sorted(numbers)
        assert await read(
            rig.source, (await rig.source.shards()).shards[0].id, Position(PositionKind.AFTER, numbers[-2]), 1
        ) == (["299"], False)

    async def test_what_is_trimmed_is_an_error(self, table) -> None:
        """A position before the trim point, and an iterator whose record has gone; TRIM_HORIZON moves."""
        rig = await table(1)
        [shard] = [shard.id for shard in (await rig.source.shards()).shards]
        numbers = rig.put("0", "1", "2")
        iterator = await rig.source.iterator(shard, TRIM_HORIZON)
        assert rig.aws.trim(rig.arn, records=2) == {shard: 2}
        for kind in (PositionKind.AT, PositionKind.AFTER):
            with pytest.raises(PositionTrimmed):
                await rig.source.iterator(shard, Position(kind, numbers[1]))
        with pytest.raises(PositionTrimmed):
            await rig.source.fetch(shard, iterator, 10)
        assert await read(rig.source, shard, reads=1) == (["2"], False)
        assert await read(rig.source, shard, Position(PositionKind.AT, numbers[2]), 1) == (["2"], False)

    async def test_a_shard_that_vanished_is_not_found(self, table) -> None:
        """Neither listed nor readable; its child still names it."""
        rig = await table(1)
        [parent] = [shard.id for shard in (await rig.source.shards()).shards]
        rig.put("x")
        iterator = await rig.source.iterator(parent, TRIM_HORIZON)
        [child] = rig.aws.roll(rig.arn)
        assert rig.aws.vanish(rig.arn) == {parent: 1}
        [listed] = (await rig.source.shards()).shards
        assert (listed.id, listed.parents) == (child, (parent,))
        with pytest.raises(SourceGone):
            await rig.source.fetch(parent, iterator, 10)
        with pytest.raises(SourceGone):
            await rig.source.iterator(parent, TRIM_HORIZON)

    async def test_iterators_expire_on_demand_and_by_age(self, table) -> None:
        """Of one shard or all, after a quarter of an hour or at once."""
        rig = await table(2)
        one, two = [shard.id for shard in (await rig.source.shards()).shards]
        iterators = {shard: await rig.source.iterator(shard, TRIM_HORIZON) for shard in (one, two)}
        rig.aws.expire(rig.arn, one)
        with pytest.raises(IteratorExpired):
            await rig.source.fetch(one, iterators[one], 1)
        await rig.source.fetch(two, iterators[two], 1)
        rig.aws.clock = lambda: time.time() + 901
        with pytest.raises(IteratorExpired):
            await rig.source.fetch(two, iterators[two], 1)

    async def test_the_third_reader_is_refused(self, table) -> None:
        """While two others read; a reader may go on with its iterators, and a pause makes room."""
        rig = await table(1)
        [shard] = [shard.id for shard in (await rig.source.shards()).shards]
        now = time.time()
        rig.aws.clock = lambda: now
        rig.aws.throttle(True)
        one, two, three = [await rig.source.iterator(shard, TRIM_HORIZON) for _ in range(3)]
        for _ in range(3):
            one = (await rig.source.fetch(shard, one, 1)).next_iterator
            two = (await rig.source.fetch(shard, two, 1)).next_iterator
            with pytest.raises(SourceThrottled):
                await rig.source.fetch(shard, three, 1)
        now += 1
        await rig.source.fetch(shard, three, 1)

    async def test_listings_are_throttled(self, table) -> None:
        """Ten DescribeStream a second."""
        rig = await table(1)
        now = time.time()
        rig.aws.clock = lambda: now
        rig.aws.throttle(True)
        for _ in range(10):
            await rig.client.describe_stream(StreamArn=rig.arn)
        with pytest.raises(ClientError, match="LimitExceededException"):
            await rig.client.describe_stream(StreamArn=rig.arn)

    async def test_an_answer_has_a_megabyte_or_a_thousand_records_at_most(self, table) -> None:
        """Then it ends early, and the next one goes on."""
        rig = await table(1)
        [shard] = [shard.id for shard in (await rig.source.shards()).shards]
        rig.put(*["x" * 300_000] * 4, *["small"] * 1500)
        iterator = await rig.source.iterator(shard, TRIM_HORIZON)
        counts = []
        for _ in range(4):
            fetch = await rig.source.fetch(shard, iterator, 10_000)
            counts.append(fetch.read)
            iterator = fetch.next_iterator
        assert counts[0] == 3
        assert counts[1] == 1000
        assert sum(counts) == 1504
        with pytest.raises(ClientError, match="ValidationException"):
            await rig.client.get_records(ShardIterator=iterator, Limit=1001)

    async def test_a_deletion_by_ttl_says_who_it_was(self, table) -> None:
        """As AWS spells it, and as Lambda's event does."""
        rig = await table(1)
        rig.aws.put(rig.arn, [{"keys": {"id": {"S": "k"}}, "old": {"id": {"S": "k"}}, "ttl": True}])
        [shard] = [shard.id for shard in (await rig.source.shards()).shards]
        iterator = await rig.source.iterator(shard, TRIM_HORIZON)
        [raw] = (await rig.client.get_records(ShardIterator=iterator))["Records"]
        assert raw["userIdentity"] == {"Type": "Service", "PrincipalId": "dynamodb.amazonaws.com"}
        [record] = (await rig.source.fetch(shard, iterator, 1)).records
        event = json.loads(record.wire)
        assert event["eventName"] == "REMOVE"
        assert event["userIdentity"] == {"type": "Service", "principalId": "dynamodb.amazonaws.com"}

    @pytest.mark.parametrize(
        ("view", "images"),
        [("KEYS_ONLY", set()), ("NEW_IMAGE", {"NewImage"}), ("OLD_IMAGE", {"OldImage"})],
    )
    async def test_a_view_shows_its_images(self, fake_aws, account, connect, view, images) -> None:
        """And no others."""
        arn = fake_aws.stream("t", account, REGION, view=view)
        fake_aws.put(arn, [{"keys": {"id": {"S": "k"}}, "new": {"id": {"S": "k"}}, "old": {"id": {"S": "k"}}}])
        source = await opened(await connect(fake_aws.url), arn, account)
        [shard] = [shard.id for shard in (await source.shards()).shards]
        [record] = (await source.fetch(shard, await source.iterator(shard, TRIM_HORIZON), 1)).records
        change = json.loads(record.wire)["dynamodb"]
        assert {name for name in change if name.endswith("Image")} == images
        assert change["StreamViewType"] == view

    async def test_streams_are_listed_by_account(self, table) -> None:
        """Those of the caller."""
        rig = await table(1)
        rig.aws.stream("t", "999999999999", REGION)
        assert [stream["StreamArn"] for stream in (await rig.client.list_streams())["Streams"]] == [rig.arn]


# --- the server


async def test_two_hundred_thousand_records_are_written_and_read(account, connect, fake_aws) -> None:
    """Page by page, every record once and in order."""
    arn = fake_aws.stream("t", account, REGION)
    numbers: list[str] = []
    for start in range(0, 200_000, 10_000):
        numbers += fake_aws.put(arn, [item(str(n), "x") for n in range(start, start + 10_000)])
    source = await opened(await connect(fake_aws.url), arn, account)
    [shard] = [shard.id for shard in (await source.shards()).shards]
    found: list[str] = []
    iterator = await source.iterator(shard, TRIM_HORIZON)
    while len(found) < 200_000:
        fetch = await source.fetch(shard, iterator or "", 1000)
        assert fetch.read
        found += [record.id for record in fetch.records]
        iterator = fetch.next_iterator
    assert found == numbers


@pytest.fixture
async def process() -> AsyncIterator[str]:
    """The fake as a process."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.aws", "--port", "0", stdout=asyncio.subprocess.PIPE
    )
    assert started.stdout is not None
    yield f"http://127.0.0.1:{json.loads(await started.stdout.readline())['port']}"
    started.send_signal(signal.SIGTERM)
    assert await started.wait() == 0


async def test_it_runs_as_a_process_with_commands_over_http(process, account, connect) -> None:
    """Prints its port; every command is a POST; a mistake is a sentence; the Date header is there."""
    async with aiohttp.ClientSession() as http:

        async def command(name: str, **arguments: Any) -> Any:
            async with http.post(f"{process}/_fake/{name}", json=arguments) as answer:
                return answer.status, await answer.json()

        _, arn = await command("stream", table="t", account=account, region=REGION, shards=2)
        status, numbers = await command("put", stream=arn, records=[item("k", "x"), item("l", "y")])
        assert (status, len(numbers)) == (200, 2)
        assert len((await command("roll", stream=arn))[1]) == 2
        assert sum((await command("trim", stream=arn))[1].values()) == 2
        assert len((await command("vanish", stream=arn))[1]) == 2
        for name, arguments in (("expire", {}), ("empty", {"pages": 1})):
            assert (await command(name, stream=arn, **arguments))[0] == 200
        assert (await command("throttle", on=True))[0] == 200
        kinesis = await (await connect(process)).client("kinesis", REGION)
        await kinesis.create_stream(StreamName="t", ShardCount=1)
        stream = f"arn:aws:kinesis:{REGION}:{account}:stream/t"
        assert (await command("fail_puts", stream=stream, entries=[0]))[0] == 200
        source = await opened(await connect(process), arn, account)
        listing = await source.shards()
        assert len(listing.shards) == 2
        assert listing.at == pytest.approx(time.time(), abs=5)
        assert len((await command("shards", stream=arn))[1]) == 2
        assert (await command("refuse", operation="ListStreams", code="InternalServerError"))[0] == 200
        streams = await (await connect(process)).client("dynamodbstreams", REGION)
        with pytest.raises(ClientError, match="InternalServerError"):
            await streams.list_streams()
        assert (await command("refuse", operation="ListStreams", code=None))[0] == 200
        assert len((await streams.list_streams())["Streams"]) == 1
        assert (await command("stats"))[1]["DescribeStream"] == {"ok": 1}
        for name, arguments, sentence in (
            ("rolls", {}, "rolls is none of"),
            ("roll", {}, "missing a required argument: 'stream'"),
            ("roll", {"stream": "x"}, "Stream: x not found"),
            ("put", {"stream": arn, "records": [{}]}, "keys is missing"),
        ):
            status, answer = await command(name, **arguments)
            assert status == 400
            assert sentence in answer["error"]


async def test_two_servers_know_nothing_of_each_other(fake_aws) -> None:
    """State belongs to the object."""
    async with FakeAws() as other:
        arn = other.stream("t")
        assert len(other.put(arn, [item("k", "x")])) == 1
        with pytest.raises(AwsFault, match="not found"):
            fake_aws.put(arn, [item("k", "x")])


async def test_the_date_header_is_the_clocks(account, connect, fake_aws) -> None:
    """A server whose clock is wrong is told from one whose clock is right."""
    arn = fake_aws.stream("t", account, REGION)
    fake_aws.clock = lambda: 1_800_000_000.9
    assert (await (await opened(await connect(fake_aws.url), arn, account)).shards()).at == 1_800_000_000
