"""Kinesis beyond the contract: pages, positions, errors, read limits and resharding."""

import asyncio
import gc
from typing import Any

import pytest
from aiohttp import web

from poller.clock import SystemClock
from poller.core.model import TRIM_HORIZON, Position, PositionKind, Shard, SourceKind, SourceSpec
from poller.errors import (
    AccessDenied,
    IteratorExpired,
    PositionTrimmed,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
)
from poller.sources import kinesis
from poller.sources.kinesis import KinesisSource, ReadLimits
from tests.integration.conftest import REGION, broken, error, html_error, truncated

pytestmark = pytest.mark.integration

ARN = f"arn:aws:kinesis:{REGION}:111122223333:stream/orders"
SPEC = SourceSpec(SourceKind.KINESIS, ARN, REGION, "111122223333", "orders")
SHARD = "shardId-000000000000"
RECORD = {
    "SequenceNumber": "49590338271490256608559692538361571095921575989136588898",
    "PartitionKey": "k",
    "Data": "eA==",
    "ApproximateArrivalTimestamp": 1545084650.987,
}


@pytest.fixture
async def source(stub, connect) -> KinesisSource:
    clock = SystemClock(asyncio.get_running_loop())
    return KinesisSource(SPEC, "role", await connect(stub.url), clock, ReadLimits())


async def test_every_page_is_listed(stub, source) -> None:
    """The next page is asked for by its token alone, as AWS wants; splits have one parent, merges two."""
    open_range, closed_range = (
        {"StartingSequenceNumber": "1"},
        {"StartingSequenceNumber": "1", "EndingSequenceNumber": "9"},
    )
    stub.script["ListShards"] = [
        {"Shards": [{"ShardId": "a", "SequenceNumberRange": closed_range}], "NextToken": "more"},
        {
            "Shards": [
                {"ShardId": "b", "ParentShardId": "a", "SequenceNumberRange": closed_range},
                {"ShardId": "c", "ParentShardId": "b", "AdjacentParentShardId": "x", "SequenceNumberRange": open_range},
            ]
        },
    ]
    listing = await source.shards()
    assert listing.shards == (
        Shard("a", closed=True),
        Shard("b", parents=("a",), closed=True),
        Shard("c", parents=("b", "x")),
    )
    first, second = stub.asked("ListShards")
    assert first["StreamARN"] == ARN
    assert second["NextToken"] == "more"
    assert not {"StreamARN", "StreamName"} & second.keys()


async def test_a_listing_has_the_servers_time(stub, source) -> None:
    """By the Date header of its first page; our own clock when there is none that can be read."""

    def dated(date: str) -> Any:
        async def answer(request: web.Request) -> web.Response:
            return web.json_response({"Shards": []}, headers={"Date": date})

        return answer

    stub.script["ListShards"] = [dated("Tue, 15 Nov 1994 08:12:31 GMT"), dated("soon")]
    assert (await source.shards()).at == 784887151
    assert (await source.shards()).at == pytest.approx(SystemClock(asyncio.get_running_loop()).now(), abs=5)


@pytest.mark.parametrize("operation", ["shards", "facts"])
async def test_a_truncated_description_is_no_answer(stub, source, operation) -> None:
    """botocore reads it as an empty one; an empty listing would look like a stream whose shards are all gone."""
    stub.script["ListShards"] = stub.script["DescribeStreamSummary"] = [truncated]
    with pytest.raises(SourceUnavailable, match="the answer has no"):
        await getattr(source, operation)()


async def test_a_cold_call_has_its_time(stub, source, monkeypatch) -> None:
    """A service that takes the call and never answers is SourceUnavailable in the end."""
    release = asyncio.Event()

    async def never(request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    monkeypatch.setattr(kinesis, "COLD_TIMEOUT", 0.1)
    stub.script["ListShards"] = [never]
    with pytest.raises(SourceUnavailable, match="TimeoutError"):
        await source.shards()
    release.set()


async def test_retention_is_in_seconds(stub, source) -> None:
    """RetentionPeriodHours of the stream."""
    stub.script["DescribeStreamSummary"] = [{"StreamDescriptionSummary": {"RetentionPeriodHours": 168}}]
    assert (await source.facts()).retention == 7 * 86_400


@pytest.mark.parametrize(
    ("position", "sent"),
    [
        (TRIM_HORIZON, {"ShardIteratorType": "TRIM_HORIZON"}),
        (Position(PositionKind.LATEST, "1545084650.5"), {"ShardIteratorType": "LATEST"}),
        (
            Position(PositionKind.AT_TIMESTAMP, "1545084650.987"),
            {"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": 1545084650.987},
        ),
        (
            Position(PositionKind.AT, "49"),
            {"ShardIteratorType": "AT_SEQUENCE_NUMBER", "StartingSequenceNumber": "49"},
        ),
        (
            Position(PositionKind.AFTER, "49"),
            {"ShardIteratorType": "AFTER_SEQUENCE_NUMBER", "StartingSequenceNumber": "49"},
        ),
    ],
)
async def test_positions_are_asked_for_exactly(stub, source, position, sent) -> None:
    """Milliseconds of a timestamp included; LATEST is the tip of now whatever its value."""
    stub.script["GetShardIterator"] = [{"ShardIterator": "token"}]
    assert await source.iterator(SHARD, position) == "token"
    assert stub.asked("GetShardIterator") == [{"StreamARN": ARN, "ShardId": SHARD, **sent}]


FROM = "used in GetShardIterator on shard shardId-000000000000 in stream orders under account 111122223333"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (f"StartingSequenceNumber 495 {FROM} is invalid because it did not come from this stream.", PositionTrimmed),
        (f"StartingSequenceNumber 495 {FROM} is invalid.", PositionTrimmed),
        (
            "Invalid StartingSequenceNumber. It encodes shardId-000000000007, while it was used in a call to shardId-0",
            SourceUnavailable,
        ),
        ("StartingSequenceNumber must be an integer", SourceUnavailable),
        ("The timestampInMillis parameter cannot be greater than the currentTimestampInMillis.", SourceUnavailable),
    ],
)
async def test_only_a_position_that_the_stream_lost_is_trimmed(stub, source, message, kind) -> None:
    """Other invalid arguments are somebody's mistake: repeating the whole stream would not mend them."""
    stub.script["GetShardIterator"] = [error("InvalidArgumentException", message)]
    with pytest.raises(kind):
        await source.iterator(SHARD, Position(PositionKind.AT, "495"))


async def test_a_read_says_how_far_behind_it_is(stub, source) -> None:
    """MillisBehindLatest in seconds; the request names its limit, at most AWS's."""
    stub.script["GetRecords"] = [
        {"Records": [RECORD], "NextShardIterator": "next", "MillisBehindLatest": 2500},
        {"Records": [], "NextShardIterator": "next"},
    ]
    fetch = await source.fetch(SHARD, "token", 20_000)
    assert (fetch.lag, fetch.next_iterator, fetch.newest) == (2.5, "next", RECORD["SequenceNumber"])
    assert fetch.records[0].id == RECORD["SequenceNumber"]
    assert stub.asked("GetRecords") == [{"ShardIterator": "token", "Limit": 10_000, "StreamARN": ARN}]
    assert (await source.fetch(SHARD, "token", 1)).lag is None


@pytest.mark.parametrize("last", [{"NextShardIterator": None}, {}])
async def test_no_next_iterator_is_the_end_of_the_shard(stub, source, last) -> None:
    """Null or absent, as long as the answer has its Records."""
    stub.script["GetRecords"] = [{"Records": [RECORD], "MillisBehindLatest": 0, "ChildShards": [], **last}]
    fetch = await source.fetch(SHARD, "token", 10)
    assert fetch.next_iterator is None
    assert fetch.read == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (truncated, SourceUnavailable),
        (broken, SourceUnavailable),
        (html_error, SourceUnavailable),
        ({}, SourceUnavailable),
        ({"Records": None}, SourceUnavailable),
        ({"Records": [{"PartitionKey": "k"}]}, SourceUnavailable),
        ([], SourceUnavailable),
        (error("InternalFailure", status=500), SourceUnavailable),
        (error("ExpiredTokenException"), SourceUnavailable),
        (error("ProvisionedThroughputExceededException"), SourceThrottled),
        (error("LimitExceededException"), SourceThrottled),
        (error("KMSThrottlingException"), SourceThrottled),
        (error("AccessDeniedException"), AccessDenied),
        (error("KMSAccessDeniedException"), AccessDenied),
        (error("KMSDisabledException"), AccessDenied),
        (error("ResourceNotFoundException"), SourceGone),
        (error("ExpiredIteratorException"), IteratorExpired),
        (error("InvalidArgumentException", "Invalid ShardIterator."), IteratorExpired),
    ],
)
async def test_what_a_read_may_answer(stub, source, answer, kind) -> None:
    """Each error says what to do; an answer without its Records never is the end of a shard."""
    stub.script["GetRecords"] = [answer]
    with pytest.raises(kind, match="GetRecords") as caught:
        await source.fetch(SHARD, "token", 10)
    assert type(caught.value) is kind


async def test_five_reads_a_second_of_a_shard_whoever_reads(stub, connect) -> None:
    """The sixth read waits, also when it is another mapping's; another shard and another operation do not."""
    clock = SystemClock(asyncio.get_running_loop())
    limits, clients = ReadLimits(), await connect(stub.url)
    one, other = (KinesisSource(SPEC, "role", clients, clock, limits) for _ in range(2))
    stub.script["GetRecords"] = [{"Records": [], "NextShardIterator": "next"}]
    stub.script["GetShardIterator"] = [{"ShardIterator": "token"}]
    async with asyncio.timeout(0.9):
        for source in (one, other, one, other, one):
            await source.fetch(SHARD, "token", 10)
        sixth = asyncio.ensure_future(other.fetch(SHARD, "token", 10))
        await one.fetch("shardId-000000000001", "token", 10)
        await other.iterator(SHARD, TRIM_HORIZON)
        assert not sixth.done()
        assert len(stub.asked("GetRecords")) == 6
    sixth.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sixth


async def test_limits_are_forgotten_with_their_shards(stub, source) -> None:
    """A shard that is no longer listed leaves nothing behind, else a resharding stream would fill the memory."""
    stub.script["GetRecords"] = [{"Records": [], "NextShardIterator": "next"}]
    stub.script["ListShards"] = [{"Shards": []}]
    await source.fetch(SHARD, "token", 10)
    assert source._shards
    await source.shards()
    gc.collect()
    assert not source._shards
    assert not source._limits._limits


async def test_a_split_is_followed(roto, connect, account) -> None:
    """The parent is listed as closed and reads to its end; the children name it and hold what came later."""
    clients = await connect(roto)
    client = await clients.client("kinesis", REGION)
    await client.create_stream(StreamName="orders", ShardCount=1)
    await client.get_waiter("stream_exists").wait(StreamName="orders", WaiterConfig={"Delay": 0.05, "MaxAttempts": 100})
    spec = SourceSpec(
        SourceKind.KINESIS, f"arn:aws:kinesis:{REGION}:{account}:stream/orders", REGION, account, "orders"
    )
    source = KinesisSource(spec, "role", clients, SystemClock(asyncio.get_running_loop()), ReadLimits())
    await client.put_record(StreamName="orders", PartitionKey="before", Data=b"x")
    [parent] = (await source.shards()).shards
    await client.split_shard(StreamName="orders", ShardToSplit=parent.id, NewStartingHashKey=str(2**127))
    async with asyncio.timeout(10):
        while len(shards := {shard.id: shard for shard in (await source.shards()).shards}) < 3:
            await asyncio.sleep(0.05)
    await client.put_record(StreamName="orders", PartitionKey="after", Data=b"x")
    assert shards.pop(parent.id) == Shard(parent.id, closed=True)
    assert [(child.parents, child.closed) for child in shards.values()] == [((parent.id,), False)] * 2

    async def keys(shard: str, reads: int) -> tuple[list[str], str | None]:
        iterator: str | None = await source.iterator(shard, TRIM_HORIZON)
        found = []
        for _ in range(reads):
            if iterator is None:
                break
            fetch = await source.fetch(shard, iterator, 10)
            found += [record.key for record in fetch.records]
            iterator = fetch.next_iterator
        return found, iterator

    assert await keys(parent.id, 3) == (["before"], None)
    children = [await keys(shard, 1) for shard in shards]
    assert sorted(key for found, _ in children for key in found) == ["after"]
    assert all(iterator for _, iterator in children)
