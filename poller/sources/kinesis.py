"""Kinesis Data Streams, read by polling (semantics.md 2)."""

import asyncio
from collections.abc import MutableMapping
from dataclasses import replace
from datetime import datetime
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from asyncio_throttle.throttler import Throttler

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

TRAITS = StreamTraits(fetch_limit=10_000, tip_interval=1.0, has_timestamps=True)

READS = 256  # of one stream at once: one that hangs leaves connections to the others
STARTS = 64  # GetShardIterators likewise, which otherwise all come at once
_READS_PER_SECOND = 5  # GetRecords, and GetShardIterator, of one shard by all its consumers
_SHARDS_PER_PAGE = 10_000
_ITERATOR_TIMEOUT = 10.0
_FETCH_TIMEOUT = 30.0  # an answer may be 10 MiB
_ERRORS: ErrorTable = {"ExpiredIteratorException": IteratorExpired}
# Stream and limit are ours and valid, so the argument is the iterator.
_FETCH_ERRORS: ErrorTable = {**_ERRORS, "InvalidArgumentException": IteratorExpired}


class KinesisRecord(msgspec.Struct, gc=False):
    """A record of GetRecords. `Data` stays the base64 JSON string that came."""

    SequenceNumber: str
    PartitionKey: str
    Data: msgspec.Raw
    ApproximateArrivalTimestamp: float


class KinesisAnswer(msgspec.Struct):
    """A GetRecords answer. Without `Records` it is not one: a truncated body must not look like the end of a shard."""

    Records: list[KinesisRecord]
    NextShardIterator: str | None = None
    MillisBehindLatest: float | None = None


class _Iterator(msgspec.Struct):
    ShardIterator: str


_answers = msgspec.json.Decoder(KinesisAnswer)
_iterators = msgspec.json.Decoder(_Iterator)
_json = msgspec.json.Encoder().encode


class Encoder:
    """Records of one shard as Lambda shows them (semantics.md 2.5, key order included). The data is never decoded."""

    __slots__ = ("_id", "_tail")

    def __init__(self, spec: SourceSpec, shard: ShardId, role: str) -> None:
        # `_json` of a string, less its closing quote: the sequence number follows.
        self._id = b'},"eventSource":"aws:kinesis","eventVersion":"1.0","eventID":' + _json(shard)[:-1] + b":"
        self._tail = (
            b'","eventName":"aws:kinesis:record","invokeIdentityArn":%b,"awsRegion":%b,"eventSourceARN":%b}'
            % (
                _json(role),
                _json(spec.region),
                _json(spec.arn),
            )
        )

    def encode(self, record: KinesisRecord) -> Record:
        """The record with its wire bytes. SourceUnavailable: its sequence number is none."""
        sequence = record.SequenceNumber
        number = sequence.encode()
        # Positions are compared as numbers, and nothing may stand between these quotes.
        if not number.isdigit() or len(number) > MOST_DIGITS:
            raise SourceUnavailable("a record cannot be read (its sequence number is no number)")
        wire = b"".join(
            (
                b'{"kinesis":{"kinesisSchemaVersion":"1.0","partitionKey":',
                _json(record.PartitionKey),
                b',"sequenceNumber":"',
                number,
                b'","data":',
                record.Data,
                b',"approximateArrivalTimestamp":',
                _json(record.ApproximateArrivalTimestamp),  # never in exponent form, as AWS may send it
                self._id,
                number,
                self._tail,
            )
        )
        return Record(sequence, record.PartitionKey, record.ApproximateArrivalTimestamp, wire)


class ReadLimits:
    """The read limits of Kinesis, which hold for a shard whoever reads it: one for the whole process.

    Kept for as long as a source reads the shard.
    """

    def __init__(self) -> None:
        self._limits: MutableMapping[tuple[str, ShardId, str], Throttler] = WeakValueDictionary()

    def limit(self, stream_arn: str, shard: ShardId, operation: str) -> Throttler:
        """The limit of an operation on a shard, shared by everybody who asks for the same."""
        key = (stream_arn, shard, operation)
        throttler = self._limits.get(key)
        if throttler is None:
            throttler = self._limits[key] = Throttler(rate_limit=_READS_PER_SECOND, period=1.0, retry_interval=0.05)
        return throttler


class _ShardReader:
    """What is kept for one shard: its constant bytes and its limits."""

    __slots__ = ("encode", "iterators", "reads")

    def __init__(self, spec: SourceSpec, shown: SourceSpec, shard: ShardId, role: str, limits: ReadLimits) -> None:
        self.encode = Encoder(shown, shard, role).encode
        self.reads = limits.limit(spec.arn, shard, "GetRecords")
        self.iterators = limits.limit(spec.arn, shard, "GetShardIterator")


class KinesisSource:
    """A `StreamSource`. `role` is the function's, for `invokeIdentityArn`. The stream of a registered consumer is read
    without its subscription; its records name the consumer all the same.
    """

    def __init__(self, spec: SourceSpec, role: str, clients: AwsClients, clock: Clock, limits: ReadLimits) -> None:
        self._shown = spec
        self._spec = replace(spec, arn=spec.arn.partition("/consumer/")[0], fan_out=False) if spec.fan_out else spec
        self._role = role
        self._clients = clients
        self._clock = clock
        self._limits = limits
        self._shards: dict[ShardId, _ShardReader] = {}
        self._reads = asyncio.Semaphore(READS)
        self._starts = asyncio.Semaphore(STARTS)

    async def shards(self) -> Listing:
        """Every page, closed shards included."""
        client = await self._clients.client("kinesis", self._spec.region)
        shards: list[Shard] = []
        page: dict[str, Any] = {"StreamARN": self._spec.arn, "MaxResults": _SHARDS_PER_PAGE}
        at: float | None = None
        while True:
            with translated("ListShards", _ERRORS):
                async with asyncio.timeout(COLD_TIMEOUT):
                    answer = await client.list_shards(**page)
                # The first page's: a shard that is made while the pages are read came after it.
                at = at or answered_at(answer) or self._clock.now()
                try:
                    shards.extend(_shard(listed) for listed in answer["Shards"])
                except KeyError as missing:
                    raise SourceUnavailable(f"ListShards: the answer has no {missing.args[0]}") from None
            if not (token := answer.get("NextToken")):
                break
            page = {"NextToken": token, "MaxResults": _SHARDS_PER_PAGE}  # AWS refuses the stream's name beside a token
        listed_ids = {shard.id for shard in shards}
        for gone in self._shards.keys() - listed_ids:
            del self._shards[gone]
        return Listing(tuple(shards), at)

    async def facts(self) -> StreamFacts:
        """Its retention, and when it was created."""
        client = await self._clients.client("kinesis", self._spec.region)
        with translated("DescribeStreamSummary", _ERRORS):
            async with asyncio.timeout(COLD_TIMEOUT):
                answer = await client.describe_stream_summary(StreamARN=self._spec.arn)
            try:
                summary = answer["StreamDescriptionSummary"]
                retention = int(summary["RetentionPeriodHours"]) * 3600.0
            except KeyError:
                retention = 0.0
            if retention <= 0:
                raise SourceUnavailable("DescribeStreamSummary: the answer has no RetentionPeriodHours")
            created: datetime | None = summary.get("StreamCreationTimestamp")
            return StreamFacts(retention, str(int(created.timestamp())) if created else "")

    async def iterator(self, shard: ShardId, at: Position) -> str:
        """A read token, good for five minutes. LATEST is the tip of now, whatever its value."""
        request: dict[str, Any] = {
            "StreamARN": self._spec.arn,
            "ShardId": shard,
            "ShardIteratorType": str(at.kind),
        }
        match at.kind:
            case PositionKind.AT | PositionKind.AFTER:
                request["StartingSequenceNumber"] = at.value
            case PositionKind.AT_TIMESTAMP:
                request["Timestamp"] = float(at.value)
            case PositionKind.END:
                raise ValueError(f"shard {shard} is read to its end: there is no iterator")
        lean = await self._lean()
        async with self._reader(shard).iterators, self._starts, lean.reads:
            try:
                body = await lean.call("Kinesis_20131202.GetShardIterator", _json(request), _ITERATOR_TIMEOUT)
            except AwsError as error:
                if is_trimmed(error):
                    raise PositionTrimmed(f"GetShardIterator: {error}") from None
                raise translate(error, _ERRORS, "GetShardIterator") from None
        return parse(_iterators, body, "GetShardIterator").ShardIterator

    async def fetch(self, shard: ShardId, iterator: str, limit: int) -> Fetch:
        """One GetRecords of at most `limit` records, after this shard's turn under the limit of five a second."""
        lean = await self._lean()
        reader = self._reader(shard)
        request = {"ShardIterator": iterator, "Limit": min(limit, TRAITS.fetch_limit), "StreamARN": self._spec.arn}
        async with reader.reads, self._reads, lean.reads:
            try:
                body = await lean.call("Kinesis_20131202.GetRecords", _json(request), _FETCH_TIMEOUT)
            except AwsError as error:
                raise translate(error, _FETCH_ERRORS, "GetRecords") from None
        answer = parse(_answers, body, "GetRecords")
        encode = reader.encode
        records = tuple([encode(record) for record in answer.Records])
        behind = answer.MillisBehindLatest
        return Fetch(
            records=records,
            newest=records[-1].id if records else "",
            next_iterator=answer.NextShardIterator,
            lag=None if behind is None else behind / 1000,
            nbytes=sum([len(record.wire) for record in records]),
            read=len(records),
        )

    async def close(self) -> None:
        """Nothing to release: connections belong to the process."""
        self._shards.clear()

    async def _lean(self) -> LeanClient:
        return await self._clients.lean("kinesis", self._spec.region)

    def _reader(self, shard: ShardId) -> _ShardReader:
        reader = self._shards.get(shard)
        if reader is None:
            reader = self._shards[shard] = _ShardReader(self._spec, self._shown, shard, self._role, self._limits)
        return reader


def _shard(listed: dict[str, Any]) -> Shard:
    parents = (listed.get("ParentShardId"), listed.get("AdjacentParentShardId"))
    return Shard(
        id=named(listed["ShardId"]),
        parents=tuple(named(parent) for parent in parents if parent),
        closed="EndingSequenceNumber" in listed.get("SequenceNumberRange", {}),
    )


def named(value: Any) -> ShardId:
    """A shard's name in a cold answer; botocore passes on whatever stands there. TypeError: it is none."""
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def is_trimmed(error: AwsError) -> bool:
    """A sequence number that the stream does not have: older than its retention, or of a deleted stream of this name.

    Not so a number of another shard ("It encodes shardId-..."), a malformed one or a time in the future: going on at
    TRIM_HORIZON would repeat everything because of a mistake.
    """
    text = error.message.lower()
    return (
        error.code == "InvalidArgumentException"
        and "sequencenumber" in text
        and ("did not come from this stream" in text or "is invalid" in text or "trim" in text)
    )
