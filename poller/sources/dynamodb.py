"""DynamoDB Streams (semantics.md 3)."""

import asyncio
from typing import Any

import msgspec

from poller.aws.errors import ErrorTable, translate, translated
from poller.aws.lean import AwsError, LeanClient, parse
from poller.aws.session import COLD_TIMEOUT, AwsClients, answered_at
from poller.core.model import (
    MOST_DIGITS,
    Fetch,
    Listing,
    Position,
    PositionKind,
    Record,
    Shard,
    ShardId,
    SourceSpec,
    StreamFacts,
    StreamTraits,
)
from poller.errors import IteratorExpired, PositionTrimmed, SourceUnavailable
from poller.ports import Clock
from poller.sources.kinesis import READS, STARTS, named

TRAITS = StreamTraits(fetch_limit=1000, tip_interval=0.25, has_timestamps=False)
RETENTION = 86_400.0  # fixed by AWS

_ITERATOR_TIMEOUT = 10.0
_FETCH_TIMEOUT = 30.0
_ERRORS: ErrorTable = {
    "ExpiredIteratorException": IteratorExpired,
    "TrimmedDataAccessException": PositionTrimmed,
}
# The limit is ours and valid, so what is not valid is the iterator.
_FETCH_ERRORS: ErrorTable = {**_ERRORS, "ValidationException": IteratorExpired}


_RECORD_NAMES = {
    "event_id": "eventID",
    "event_name": "eventName",
    "event_version": "eventVersion",
    "event_source": "eventSource",
    "aws_region": "awsRegion",
    "user_identity": "userIdentity",
}


class Identity(msgspec.Struct, rename="pascal"):
    """Who made a change that no user made: the TTL service. Lambda spells the names in lower case."""

    type: msgspec.Raw
    principal_id: msgspec.Raw


class Change(msgspec.Struct, gc=False):
    """What is needed of a record's `dynamodb` member; the member itself is passed on as it came."""

    Keys: dict[str, dict[str, str]]
    SequenceNumber: str
    ApproximateCreationDateTime: float


class DynamoRecord(msgspec.Struct, gc=False, rename=_RECORD_NAMES.get):
    """A record of GetRecords. Members that the event carries unchanged stay the JSON that came."""

    event_id: msgspec.Raw
    event_name: msgspec.Raw
    event_version: msgspec.Raw
    event_source: msgspec.Raw
    aws_region: msgspec.Raw
    dynamodb: msgspec.Raw
    user_identity: Identity | None = None


class DynamoAnswer(msgspec.Struct):
    """A GetRecords answer. Without `Records` it is not one: a truncated body must not look like the end of a shard."""

    Records: list[DynamoRecord]
    NextShardIterator: str | None = None


class _Iterator(msgspec.Struct):
    ShardIterator: str


_answers = msgspec.json.Decoder(DynamoAnswer)
_changes = msgspec.json.Decoder(Change)
_iterators = msgspec.json.Decoder(_Iterator)
_json = msgspec.json.Encoder().encode
# The same item has the same key whatever the order in which its attributes come.
_sorted_json = msgspec.json.Encoder(order="sorted").encode


class Encoder:
    """Records of one stream as Lambda shows them (semantics.md 3.2, key order included)."""

    __slots__ = ("_tail",)

    def __init__(self, spec: SourceSpec) -> None:
        self._tail = b',"eventSourceARN":%b}' % _json(spec.arn)

    def encode(self, record: DynamoRecord) -> Record:
        """The record with its wire bytes. msgspec's errors when its `dynamodb` member is malformed, SourceUnavailable
        when its sequence number is.
        """
        change = _changes.decode(record.dynamodb)
        number = change.SequenceNumber.encode()
        if not number.isdigit() or len(number) > MOST_DIGITS:
            raise SourceUnavailable("a record cannot be read (its sequence number is no number)")
        identity = record.user_identity
        wire = b"".join(
            (
                b'{"eventID":',
                record.event_id,
                b',"eventName":',
                record.event_name,
                b',"eventVersion":',
                record.event_version,
                b',"eventSource":',
                record.event_source,
                b',"awsRegion":',
                record.aws_region,
                b',"dynamodb":',
                record.dynamodb,
                b""
                if identity is None
                else b',"userIdentity":{"type":%b,"principalId":%b}' % (identity.type, identity.principal_id),
                self._tail,
            )
        )
        key = _sorted_json(change.Keys).decode()
        return Record(change.SequenceNumber, key, change.ApproximateCreationDateTime, wire)


class DynamoSource:
    """A `StreamSource` over one stream of a table."""

    def __init__(self, spec: SourceSpec, clients: AwsClients, clock: Clock) -> None:
        self._spec = spec
        self._clients = clients
        self._clock = clock
        self._encode = Encoder(spec).encode
        self._reads = asyncio.Semaphore(READS)
        self._starts = asyncio.Semaphore(STARTS)

    async def shards(self) -> Listing:
        """Every page, closed shards included."""
        client = await self._clients.client("dynamodbstreams", self._spec.region)
        shards: list[Shard] = []
        page: dict[str, Any] = {"StreamArn": self._spec.arn}
        at: float | None = None
        while True:
            with translated("DescribeStream", _ERRORS):
                async with asyncio.timeout(COLD_TIMEOUT):
                    answer = await client.describe_stream(**page)
                # The first page's: a shard that is made while the pages are read came after it.
                at = at or answered_at(answer) or self._clock.now()
                try:
                    description = answer["StreamDescription"]
                    shards.extend(_shard(listed) for listed in description["Shards"])
                except KeyError as missing:
                    raise SourceUnavailable(f"DescribeStream: the answer has no {missing.args[0]}") from None
            if not (last := description.get("LastEvaluatedShardId")):
                return Listing(tuple(shards), at)
            page["ExclusiveStartShardId"] = last

    async def facts(self) -> StreamFacts:
        """It keeps a record for a day, always; made anew it has another ARN."""
        return StreamFacts(RETENTION)

    async def iterator(self, shard: ShardId, at: Position) -> str:
        """A read token, good for fifteen minutes. LATEST is the tip of now, whatever its value."""
        request: dict[str, Any] = {
            "StreamArn": self._spec.arn,
            "ShardId": shard,
            "ShardIteratorType": str(at.kind),
        }
        match at.kind:
            case PositionKind.AT | PositionKind.AFTER:
                request["SequenceNumber"] = at.value
            case PositionKind.END | PositionKind.AT_TIMESTAMP:
                raise ValueError(f"DynamoDB Streams has no iterator for {at.kind}")
        lean = await self._lean()
        async with self._starts, lean.reads:
            with translated("GetShardIterator", _ERRORS):
                body = await lean.call("DynamoDBStreams_20120810.GetShardIterator", _json(request), _ITERATOR_TIMEOUT)
        return parse(_iterators, body, "GetShardIterator").ShardIterator

    async def fetch(self, shard: ShardId, iterator: str, limit: int) -> Fetch:  # noqa: ARG002
        """One GetRecords of at most `limit` records; the iterator names the shard."""
        lean = await self._lean()
        request = {"ShardIterator": iterator, "Limit": min(limit, TRAITS.fetch_limit)}
        async with self._reads, lean.reads:
            try:
                body = await lean.call("DynamoDBStreams_20120810.GetRecords", _json(request), _FETCH_TIMEOUT)
            except AwsError as error:
                raise translate(error, _FETCH_ERRORS, "GetRecords") from None
        answer = parse(_answers, body, "GetRecords")
        encode = self._encode
        try:
            records = tuple([encode(record) for record in answer.Records])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise SourceUnavailable(f"GetRecords: a record cannot be read ({error})") from None
        return Fetch(
            records=records,
            newest=records[-1].id if records else "",
            next_iterator=answer.NextShardIterator,
            lag=None,
            nbytes=sum([len(record.wire) for record in records]),
            read=len(records),
        )

    async def close(self) -> None:
        """Nothing to release: connections belong to the process."""

    async def _lean(self) -> LeanClient:
        return await self._clients.lean("dynamodbstreams", self._spec.region)


def _shard(listed: dict[str, Any]) -> Shard:
    parent = listed.get("ParentShardId")
    return Shard(
        id=named(listed["ShardId"]),
        parents=(named(parent),) if parent else (),
        closed="EndingSequenceNumber" in listed.get("SequenceNumberRange", {}),
    )
