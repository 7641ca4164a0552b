"""DynamoDB Streams: a tree of shards that are rolled over, trimmed and expired on demand. There is no table engine."""

import hashlib
import itertools
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.fakes.aws.shards import (
    AwsFault,
    Caller,
    Rate,
    Readers,
    Service,
    Shard,
    Stream,
    encode,
    read_token,
)

ITERATOR_SECONDS = 900.0
MAX_RECORDS = 1_000
MAX_BYTES = 1_000_000
MAX_SHARDS = 100  # of one DescribeStream page

_READERS = 2
_DESCRIBES_PER_SECOND = 10
# Numbers grow from 21 digits to 22 after a hundred records and have gaps: who compares them as text is found out.
_FIRST_SEQUENCE = 10**21 - 1_000
_SEQUENCE_STEP = 7
_TTL = {"Type": "Service", "PrincipalId": "dynamodb.amazonaws.com"}


class TableStream(Stream):
    """One stream of a table. Every key belongs to one root; its records go to the open shard of that line."""

    def __init__(self, arn: str, name: str, caller: Caller, created: float, view: str) -> None:
        super().__init__(arn, name, caller, created)
        self.view = view
        self.lines: list[Shard] = []  # the open shard of each root
        self._numbers = itertools.count(_FIRST_SEQUENCE, _SEQUENCE_STEP)
        self._ordinals = itertools.count(1)
        self.readers: dict[str, Readers] = {}
        self.describes = Rate(_DESCRIBES_PER_SECOND)

    def add_shard(self, parents: tuple[str, ...]) -> Shard:
        """A new open shard. Its id says nothing about its place: listings are in the order of ids' second halves."""
        ordinal = next(self._ordinals)
        scrambled = zlib.crc32(b"%d %b" % (ordinal, self.arn.encode()))
        shard = Shard(
            f"shardId-{int(self.created * 1000) + ordinal:020d}-{scrambled:08x}", parents, next(self._numbers)
        )
        self.shards[shard.id] = shard
        return shard

    def listed(self) -> list[Shard]:
        """In the order of DescribeStream: none that is of use, a child may come before its parent."""
        return sorted(self.shards.values(), key=_listing_key)

    def roll(self, shard: Shard) -> Shard:
        """Close an open shard; its one child takes over at once, whether the parent is drained or not."""
        if shard.is_closed:
            raise AwsFault("ValidationException", f"Shard {shard.id} is closed")
        line = self.lines.index(shard)
        shard.ending = next(self._numbers)
        self.lines[line] = self.add_shard((shard.id,))
        return self.lines[line]

    def line_of(self, key: bytes) -> Shard:
        """Where records of an item go now."""
        return self.lines[zlib.crc32(key) % len(self.lines)]

    def write(
        self, keys: dict[str, Any], new: dict[str, Any] | None, old: dict[str, Any] | None, now: float, *, ttl: bool
    ) -> str:
        """One change of one item, as the stream's view shows it; answers its sequence number."""
        number = next(self._numbers)
        key = encode(keys)
        change: dict[str, Any] = {}
        if new is not None and self.view in {"NEW_IMAGE", "NEW_AND_OLD_IMAGES"}:
            change["NewImage"] = new
        if old is not None and self.view in {"OLD_IMAGE", "NEW_AND_OLD_IMAGES"}:
            change["OldImage"] = old
        images = encode(change)
        nbytes = len(key) + len(images)
        name = b"REMOVE" if new is None else b"INSERT" if old is None else b"MODIFY"
        wire = (
            (
                b'{"awsRegion":"%b","dynamodb":{"ApproximateCreationDateTime":%b,"Keys":%b,%b"SequenceNumber":"%d",'
                b'"SizeBytes":%d,"StreamViewType":"%b"},"eventID":"%b","eventName":"%b","eventSource":"aws:dynamodb",'
                b'"eventVersion":"1.1"%b}'
            )
            % (
                self.region.encode(),
                b"%.9fE9" % (int(now) / 1e9),  # whole seconds, and AWS does send exponents
                key,
                images[1:-1] + b"," if change else b"",
                number,
                nbytes,
                self.view.encode(),
                hashlib.md5(b"%d %b" % (number, self.arn.encode()), usedforsecurity=False).hexdigest().encode(),
                name,
                b',"userIdentity":' + encode(_TTL) if ttl else b"",
            )
        )
        self.line_of(key).append(number, wire, now, nbytes)
        return str(number)


class DynamoStreams:
    """DescribeStream, ListStreams, GetShardIterator and GetRecords."""

    def __init__(self, now: Callable[[], float], is_throttling: Callable[[], bool]) -> None:
        self._now = now
        self._is_throttling = is_throttling
        self.streams: dict[str, TableStream] = {}
        self.service = Service(
            target="DynamoDBStreams_20120810",
            content_type="application/x-amz-json-1.0",
            namespace="com.amazonaws.dynamodb.v20120810#",
            operations={
                "DescribeStream": (
                    self._describe_stream,
                    frozenset({"StreamArn", "Limit", "ExclusiveStartShardId", "ShardFilter"}),
                ),
                "ListStreams": (self._list_streams, frozenset({"TableName"})),
                "GetShardIterator": (
                    self._get_shard_iterator,
                    frozenset({"StreamArn", "ShardId", "ShardIteratorType", "SequenceNumber"}),
                ),
                "GetRecords": (self._get_records, frozenset({"ShardIterator", "Limit"})),
            },
        )

    def create(self, caller: Caller, table: str, shards: int, view: str) -> TableStream:
        """The stream of a table that need not exist, with so many roots."""
        now = self._now()
        label = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        arn = f"arn:aws:dynamodb:{caller.region}:{caller.account}:table/{table}/stream/{label}"
        if arn in self.streams:
            raise AwsFault("ResourceInUseException", f"Stream exists: {arn}")
        stream = self.streams[arn] = TableStream(arn, table, caller, now, view)
        stream.lines = [stream.add_shard(()) for _ in range(shards)]
        return stream

    def stream(self, arn: object) -> TableStream:
        """ResourceNotFoundException when there is none."""
        if (stream := self.streams.get(str(arn))) is None:
            raise AwsFault("ResourceNotFoundException", f"Requested resource not found: Stream: {arn} not found")
        return stream

    def _describe_stream(self, _: Caller, request: dict[str, Any]) -> dict[str, Any]:
        stream = self.stream(request.get("StreamArn"))
        if self._is_throttling() and not stream.describes.allows(self._now()):
            raise AwsFault("LimitExceededException", "Rate of DescribeStream exceeded")
        limit = _limit(request, MAX_SHARDS)
        listed = stream.listed()
        if "ExclusiveStartShardId" in request:  # it may have expired since the page before
            start = _listing_key_of(str(request["ExclusiveStartShardId"]))
            listed = [shard for shard in listed if _listing_key(shard) > start]
        if (wanted := request.get("ShardFilter")) is not None:
            if wanted.get("Type") != "CHILD_SHARDS":
                raise AwsFault("ValidationException", "ShardFilter.Type must be CHILD_SHARDS")
            listed = [shard for shard in listed if wanted.get("ShardId") in shard.parents]
        description: dict[str, Any] = {
            "StreamArn": stream.arn,
            "StreamLabel": stream.arn.rpartition("/")[2],
            "StreamStatus": "ENABLED",
            "StreamViewType": stream.view,
            "TableName": stream.name,
            "CreationRequestDateTime": stream.created,
            "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
            "Shards": [shard.described() for shard in listed[:limit]],
        }
        if len(listed) > limit:
            description["LastEvaluatedShardId"] = listed[limit - 1].id
        return {"StreamDescription": description}

    def _list_streams(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        return {
            "Streams": [
                {"StreamArn": stream.arn, "TableName": stream.name, "StreamLabel": stream.arn.rpartition("/")[2]}
                for stream in self.streams.values()
                if (stream.account, stream.region) == caller and request.get("TableName", stream.name) == stream.name
            ]
        }

    def _get_shard_iterator(self, _: Caller, request: dict[str, Any]) -> dict[str, Any]:
        stream = self.stream(request.get("StreamArn"))
        shard = stream.shard(str(request.get("ShardId")))
        match request.get("ShardIteratorType"):
            case "TRIM_HORIZON":
                index = shard.trimmed
            case "LATEST":
                index = shard.end
            case ("AT_SEQUENCE_NUMBER" | "AFTER_SEQUENCE_NUMBER") as kind:
                sequence = _sequence(request)
                if shard.is_trimmed(sequence):
                    raise _trimmed()
                index = shard.index_at(sequence + (kind == "AFTER_SEQUENCE_NUMBER"))
            case kind:
                raise AwsFault("ValidationException", f"ShardIteratorType {kind} does not exist")
        return {"ShardIterator": stream.token(shard, index, self._now())}

    def _get_records(self, _: Caller, request: dict[str, Any]) -> bytes:
        token = read_token(request.get("ShardIterator"))
        if token is None or token.stream not in self.streams:
            raise AwsFault("ValidationException", "Invalid ShardIterator")
        limit = _limit(request, MAX_RECORDS)
        now = self._now()
        stream = self.stream(token.stream)
        shard = stream.shard(token.shard)
        if token.epoch < shard.epoch or now - token.issued > ITERATOR_SECONDS:
            raise AwsFault("ExpiredIteratorException", "The shard iterator has expired: it is older than 15 minutes")
        readers = stream.readers.setdefault(shard.id, Readers(_READERS))
        if self._is_throttling() and not readers.allows(now, token.reader):
            raise AwsFault("LimitExceededException", "More than two processes read from the shard")
        if token.place < shard.trimmed:
            raise _trimmed()
        records, _bytes = shard.read(token.place, limit, MAX_BYTES)
        if shard.empty_pages and records:
            shard.empty_pages -= 1
            records = []
        index = token.place + len(records)
        if shard.is_closed and index == shard.end:
            tail = b"]}"
        else:
            tail = b'],"NextShardIterator":"%b"}' % stream.token(shard, index, now, token.reader).encode()
        return b"".join((b'{"Records":[', b",".join(records), tail))


def _listing_key(shard: Shard) -> tuple[str, str]:
    return _listing_key_of(shard.id)


def _listing_key_of(shard_id: str) -> tuple[str, str]:
    return shard_id.rpartition("-")[2], shard_id


def _limit(request: dict[str, Any], most: int) -> int:
    limit = request.get("Limit", most)
    if not isinstance(limit, int) or not 1 <= limit <= most:
        raise AwsFault("ValidationException", f"Limit must be between 1 and {most}")
    return limit


def _sequence(request: dict[str, Any]) -> int:
    text = request.get("SequenceNumber")
    if not isinstance(text, str) or not 21 <= len(text) <= 40 or not text.isdecimal():
        raise AwsFault("ValidationException", "SequenceNumber must be 21 to 40 digits")
    return int(text)


def _trimmed() -> AwsFault:
    return AwsFault(
        "TrimmedDataAccessException", "The operation attempted to read past the oldest stream record in a shard"
    )
