"""DynamoDB Streams beyond the contract: pages, errors, the end of a shard."""

import asyncio
import json
from typing import Any

import pytest

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
from poller.sources.dynamodb import DynamoSource
from tests.integration.conftest import REGION, broken, error, truncated

pytestmark = pytest.mark.integration

ARN = f"arn:aws:dynamodb:{REGION}:111122223333:table/orders/stream/2026-01-01T00:00:00.000"
SPEC = SourceSpec(SourceKind.DYNAMODB, ARN, REGION, "111122223333", "orders")
RECORD: dict[str, Any] = {
    "eventID": "e",
    "eventName": "REMOVE",
    "eventVersion": "1.1",
    "eventSource": "aws:dynamodb",
    "awsRegion": REGION,
    "dynamodb": {
        "ApproximateCreationDateTime": 1.731681234e9,
        "Keys": {"id": {"S": "a"}},
        "SequenceNumber": "100000000000000000001",
    },
}


@pytest.fixture
async def source(stub, connect) -> DynamoSource:
    return DynamoSource(SPEC, await connect(stub.url), SystemClock(asyncio.get_running_loop()))


async def test_every_page_is_described(stub, source) -> None:
    """Each page goes on after the last shard of the one before; a shard with an ending number is closed."""
    first, second = "shardId-00000001541626099285-f35f62ef", "shardId-00000001541626099286-f35f62ef"
    one = {"ShardId": first, "SequenceNumberRange": {"StartingSequenceNumber": "1", "EndingSequenceNumber": "2"}}
    two = {"ShardId": second, "ParentShardId": first, "SequenceNumberRange": {"StartingSequenceNumber": "3"}}
    stub.script["DescribeStream"] = [
        {"StreamDescription": {"Shards": [one], "LastEvaluatedShardId": first}},
        {"StreamDescription": {"Shards": [two]}},
    ]
    listing = await source.shards()
    assert listing.shards == (Shard(first, closed=True), Shard(second, parents=(first,)))
    assert stub.asked("DescribeStream") == [{"StreamArn": ARN}, {"StreamArn": ARN, "ExclusiveStartShardId": first}]


async def test_a_truncated_description_is_no_answer(stub, source) -> None:
    """botocore reads it as an empty one; an empty listing would look like a stream whose shards are all gone."""
    stub.script["DescribeStream"] = [truncated]
    with pytest.raises(SourceUnavailable, match="the answer has no StreamDescription"):
        await source.shards()


@pytest.mark.parametrize(
    ("position", "sent"),
    [
        (TRIM_HORIZON, {"ShardIteratorType": "TRIM_HORIZON"}),
        (Position(PositionKind.LATEST, "1545084650.5"), {"ShardIteratorType": "LATEST"}),
        (Position(PositionKind.AT, "49"), {"ShardIteratorType": "AT_SEQUENCE_NUMBER", "SequenceNumber": "49"}),
        (Position(PositionKind.AFTER, "49"), {"ShardIteratorType": "AFTER_SEQUENCE_NUMBER", "SequenceNumber": "49"}),
    ],
)
async def test_positions_are_asked_for_exactly(stub, source, position, sent) -> None:
    """As the API spells them."""
    stub.script["GetShardIterator"] = [{"ShardIterator": "token"}]
    assert await source.iterator("s", position) == "token"
    assert stub.asked("GetShardIterator") == [{"StreamArn": ARN, "ShardId": "s", **sent}]


async def test_there_is_no_reading_from_a_time(source) -> None:
    """DynamoDB Streams has no such iterator: asking is the caller's mistake."""
    with pytest.raises(ValueError, match="AT_TIMESTAMP"):
        await source.iterator("s", Position(PositionKind.AT_TIMESTAMP, "1.0"))


async def test_a_trimmed_position_is_told(stub, source) -> None:
    """When the iterator is made."""
    stub.script["GetShardIterator"] = [error("TrimmedDataAccessException")]
    with pytest.raises(PositionTrimmed):
        await source.iterator("s", Position(PositionKind.AT, "49"))


async def test_a_read_has_no_lag(stub, source) -> None:
    """The service does not say; the request names its limit, at most AWS's; exponents in a time are read."""
    stub.script["GetRecords"] = [{"Records": [RECORD], "NextShardIterator": "next"}]
    fetch = await source.fetch("s", "token", 5000)
    assert (fetch.lag, fetch.next_iterator, fetch.newest) == (None, "next", "100000000000000000001")
    assert fetch.records[0].arrival == 1731681234.0
    assert json.loads(fetch.records[0].wire) == {**RECORD, "eventSourceARN": ARN}
    assert stub.asked("GetRecords") == [{"ShardIterator": "token", "Limit": 1000}]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (truncated, SourceUnavailable),
        (broken, SourceUnavailable),
        ({}, SourceUnavailable),
        ({"Records": [{**RECORD, "dynamodb": {"Keys": {}}}]}, SourceUnavailable),
        ({"Records": [{**RECORD, "dynamodb": None}]}, SourceUnavailable),
        (error("InternalServerError", status=500), SourceUnavailable),
        (error("LimitExceededException"), SourceThrottled),
        (error("AccessDeniedException"), AccessDenied),
        (error("ResourceNotFoundException"), SourceGone),
        (error("ExpiredIteratorException"), IteratorExpired),
        (error("com.amazon.coral.validate#ValidationException", "Invalid ShardIterator"), IteratorExpired),
        (error("com.amazonaws.dynamodb.v20120810#TrimmedDataAccessException"), PositionTrimmed),
    ],
)
async def test_what_a_read_may_answer(stub, source, answer, kind) -> None:
    """Each error says what to do; an answer without its Records never is the end of a shard."""
    stub.script["GetRecords"] = [answer]
    with pytest.raises(kind, match="GetRecords") as caught:
        await source.fetch("s", "token", 10)
    assert type(caught.value) is kind


async def test_a_disabled_stream_ends(ministack, connect, account) -> None:
    """Its shard is closed and reads to a null iterator; what it held is still delivered."""
    clients = await connect(ministack)
    client = await clients.client("dynamodb", REGION)
    made = await client.create_table(
        TableName="orders",
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        BillingMode="PAY_PER_REQUEST",
        StreamSpecification={"StreamEnabled": True, "StreamViewType": "KEYS_ONLY"},
    )
    await client.put_item(TableName="orders", Item={"id": {"S": "a"}})
    await client.update_table(TableName="orders", StreamSpecification={"StreamEnabled": False})
    spec = SourceSpec(SourceKind.DYNAMODB, made["TableDescription"]["LatestStreamArn"], REGION, account, "orders")
    source = DynamoSource(spec, clients, SystemClock(asyncio.get_running_loop()))
    [shard] = (await source.shards()).shards
    assert shard.closed
    found, iterator = [], await source.iterator(shard.id, TRIM_HORIZON)
    for _ in range(3):
        fetch = await source.fetch(shard.id, iterator, 10)
        found += [record.key for record in fetch.records]
        if fetch.next_iterator is None:
            break
        iterator = fetch.next_iterator
    assert fetch.next_iterator is None
    assert found == ['{"id":{"S":"a"}}']
