"""What Kinesis and DynamoDB Streams answer."""

import asyncio
import json
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import botocore.session
from botocore.parsers import create_parser

from poller.core import notices, replies
from poller.core.model import (
    BatchPolicy,
    DiscardReason,
    Fetch,
    FunctionSpec,
    Mapping,
    Notice,
    Position,
    PositionKind,
    RetryPolicy,
    SourceKind,
    SourceSpec,
)
from poller.errors import (
    AccessDenied,
    IteratorExpired,
    PositionTrimmed,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
)
from poller.sources import dynamodb, fanout, kinesis
from tests.fakes.fanout import frame, message
from tests.fuzz.kit import Target, run, silent

REGION, ACCOUNT = "eu-west-1", "123456789012"
KINESIS = SourceSpec(SourceKind.KINESIS, f"arn:aws:kinesis:{REGION}:{ACCOUNT}:stream/orders", REGION, ACCOUNT, "orders")
DYNAMODB = SourceSpec(
    SourceKind.DYNAMODB,
    f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/t/stream/2026-01-01T00:00:00.000",
    REGION,
    ACCOUNT,
    "t",
)
FUNCTION = FunctionSpec("f", f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:f", f"arn:aws:iam::{ACCOUNT}:role/f")
DOCUMENTED = (SourceThrottled, SourceUnavailable, SourceGone, AccessDenied, IteratorExpired, PositionTrimmed)
_SHARD = "shardId-000000000000"


class Clock:
    """Ten seconds pass whenever somebody looks."""

    def __init__(self) -> None:
        self._now = 1_780_000_000.0

    def now(self) -> float:
        self._now += 10
        return self._now

    def loop(self, at: float) -> float:
        return at


class Clients:
    """AWS, whose one answer is these bytes, to hot calls and to cold ones."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def lean(self, _service: str, _region: str) -> Any:
        async def call(_target: str, _request: bytes, _timeout: float) -> bytes:
            return self._body

        return SimpleNamespace(call=call, reads=asyncio.Semaphore(1_000))

    async def client(self, service: str, _region: str) -> Any:
        return _Cold(service, self._body)


class _Cold:
    """A cold client as botocore makes it: its own parser over these bytes, and nothing after the first page."""

    meta = SimpleNamespace(endpoint_url="http://127.0.0.1:1")

    def __init__(self, service: str, body: bytes) -> None:
        self._service = service
        self._body = body
        self._pages = 0

    def __getattr__(self, operation: str) -> Any:
        async def call(**_request: Any) -> Any:
            self._pages += 1
            if self._pages > 3:
                raise SourceThrottled("enough pages")
            name = "".join(word.capitalize() for word in operation.split("_"))
            answer = {"status_code": 200, "headers": {"date": "Mon, 01 Jun 2026 00:00:00 GMT"}, "body": self._body}
            return create_parser("json").parse(answer, _model(self._service).operation_model(name).output_shape)

        return call


@cache
def _model(service: str) -> Any:
    return botocore.session.get_session().get_service_model(service)


class _NoLimits:
    def limit(self, *_: str) -> Any:
        return nullcontext()


def open_kinesis(body: bytes) -> kinesis.KinesisSource:
    return kinesis.KinesisSource(KINESIS, FUNCTION.role, Clients(body), Clock(), _NoLimits())


def open_dynamodb(body: bytes) -> dynamodb.DynamoSource:
    return dynamodb.DynamoSource(DYNAMODB, Clients(body), Clock())


def says_end(document: bytes) -> bool:
    """Is it a whole answer that has no next iterator?"""
    found = json.loads(document.decode(errors="replace"))
    return isinstance(found, dict) and isinstance(found["Records"], list) and found.get("NextShardIterator") is None


def check_fetch(fetch: Fetch, source: SourceSpec) -> None:
    """What the flow relies on: records that are one JSON object each, with sequence numbers that are numbers."""
    event = json.loads(replies.payload(fetch.records).decode(errors="replace"))
    assert len(event["Records"]) == len(fetch.records) == fetch.read
    for record, shown in zip(fetch.records, event["Records"], strict=True):
        assert shown["eventSourceARN"] == source.arn
        assert int(record.id) >= 0
        if source.kind is SourceKind.KINESIS:
            assert shown["kinesis"]["sequenceNumber"] == record.id
            assert shown["eventID"] == f"{_SHARD}:{record.id}"
    assert fetch.newest == (fetch.records[-1].id if fetch.records else "")
    assert fetch.nbytes == sum(len(record.wire) for record in fetch.records)
    mapping = Mapping("m", source, FUNCTION, BatchPolicy(100), RetryPolicy(), Position(PositionKind.TRIM_HORIZON))
    for extent in (fetch.records, fetch.records[:1]):
        if extent:
            notices.body_with_payload(Notice(mapping, _SHARD, extent, DiscardReason.RETRIES, 1, "r", 1.78e9))


def _fetch(source: Any, spec: SourceSpec, document: bytes) -> None:
    try:
        fetch = run(source.fetch(_SHARD, "iterator", 10_000))
    except SourceUnavailable as error:
        silent(error)
        return
    assert fetch.next_iterator is not None or says_end(document), "a damaged answer ended the shard"
    check_fetch(fetch, spec)


def kinesis_records(document: bytes) -> None:
    """GetRecords."""
    _fetch(open_kinesis(document), KINESIS, document)


def dynamodb_records(document: bytes) -> None:
    """GetRecords of DynamoDB Streams."""
    _fetch(open_dynamodb(document), DYNAMODB, document)


def _listing(source: Any) -> None:
    try:
        listing = run(source.shards())
    except DOCUMENTED as error:
        silent(error)
        return
    assert listing.at > 0
    for shard in listing.shards:
        assert isinstance(shard.id, str)
        assert shard.id
        assert all(isinstance(parent, str) and parent for parent in shard.parents)


def kinesis_shards(document: bytes) -> None:
    """ListShards."""
    _listing(open_kinesis(document))


def dynamodb_shards(document: bytes) -> None:
    """DescribeStream."""
    _listing(open_dynamodb(document))


def kinesis_summary(document: bytes) -> None:
    """DescribeStreamSummary."""
    try:
        facts = run(open_kinesis(document).facts())
    except DOCUMENTED as error:
        silent(error)
        return
    assert facts.retention >= 0


def iterators(document: bytes) -> None:
    """GetShardIterator of both."""
    for source in (open_kinesis(document), open_dynamodb(document)):
        try:
            token = run(source.iterator(_SHARD, Position(PositionKind.TRIM_HORIZON)))
        except SourceUnavailable as error:
            silent(error)
        else:
            assert isinstance(token, str)


class _Answer:
    """An open answer whose bytes come in pieces of one size, then end."""

    def __init__(self, data: bytes, size: int) -> None:
        self._pieces = [data[start : start + size] for start in range(0, len(data), size)]
        self.content = self

    async def readany(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    def close(self) -> None:
        self._pieces.clear()


def _subscribed(data: bytes, size: int, document: bytes) -> None:
    """A shard that is read through one subscription, until that ends or breaks."""
    answers = [_Answer(data, size)]

    async def subscribe(_start: fanout.Start) -> fanout.Subscription:
        if not answers:
            raise SourceThrottled("one is enough")
        return fanout.Subscription(answers.pop())

    async def read() -> None:
        feed = fanout._Feed(subscribe, kinesis.Encoder(KINESIS, _SHARD, FUNCTION.role), Clock())
        token: str | None = fanout._token(fanout.Start("TRIM_HORIZON"))
        try:
            while token is not None:
                fetch = await feed.fetch(token, 3)
                check_fetch(fetch, KINESIS)
                token = fetch.next_iterator
                assert token is None or json.loads(token)["SequenceNumber"], "nowhere to go on"
        except DOCUMENTED as error:
            silent(error)
        else:
            assert b"hildShards" in document or b"\\u" in document, "a damaged event ended the shard"
        finally:
            feed.close()

    run(read())


def fanout_frames(document: bytes) -> None:
    """SubscribeToShard as it comes from the network. The first byte: how it is cut into pieces."""
    if document:
        _subscribed(document[1:], document[0] + 1, document)


def fanout_events(document: bytes) -> None:
    """The payloads of SubscribeToShardEvent, one a line, in sound frames."""
    headers = {":message-type": "event", ":event-type": "SubscribeToShardEvent", ":content-type": "application/json"}
    _subscribed(b"".join(frame(headers, line) for line in document.split(b"\n")), 4096, document)


def fanout_messages(document: bytes) -> None:
    """A message with any headers, in a sound frame: their length in two bytes, they themselves, the payload."""
    length = int.from_bytes(document[:2], "big")
    _subscribed(message(document[2 : 2 + length], document[2 + length :]), 4096, document)


TARGET = Target(
    "streams",
    {
        "kinesis": kinesis_records,
        "dynamodb": dynamodb_records,
        "shards": kinesis_shards,
        "stream": dynamodb_shards,
        "summary": kinesis_summary,
        "iterator": iterators,
        "frames": fanout_frames,
        "events": fanout_events,
        "messages": fanout_messages,
    },
)
