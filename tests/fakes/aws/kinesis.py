"""Kinesis Data Streams: resharding, lag, empty pages and limits by load."""

import base64
import binascii
import hashlib
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from tests.fakes.aws.shards import (
    AwsFault,
    Bandwidth,
    Caller,
    Rate,
    Service,
    Shard,
    Stream,
    encode,
    read_token,
    required,
)

ITERATOR_SECONDS = 300.0
LISTING_SECONDS = 300.0
MAX_RECORDS = 10_000
MAX_BYTES = 10 * 2**20
MAX_HASH = 2**128 - 1

_READS_PER_SECOND = 5
_READ_BYTES_PER_SECOND = 2 * 2**20
_DESCRIBES_PER_SECOND = {"DescribeStream": 10, "DescribeStreamSummary": 20, "ListShards": 1000}
_MAX_RECORD_BYTES = 2**20
_MAX_ENTRIES = 500
_RETENTION_HOURS = 24
_SHARDS_PER_PAGE = {"ListShards": 1000, "DescribeStream": 100}


class _ListingToken(NamedTuple):
    stream: str
    after: str
    most: int
    epoch: int
    issued: float


_listing_tokens = msgspec.json.Decoder(_ListingToken)


class KinesisShard(Shard):
    """A shard with its share of the keys and its limits. `number` is the one in its id and in its sequence numbers."""

    def __init__(self, number: int, keys: tuple[int, int], parents: tuple[str, ...], starting: int) -> None:
        super().__init__(f"shardId-{number:012d}", parents, starting)
        self.number = number
        self.keys = keys
        self.reads = Rate(_READS_PER_SECOND)
        self.iterators = Rate(_READS_PER_SECOND)
        self.bandwidth = Bandwidth(_READ_BYTES_PER_SECOND)

    def hash_range(self) -> dict[str, str]:
        """As listings show it."""
        return {"StartingHashKey": str(self.keys[0]), "EndingHashKey": str(self.keys[1])}

    def described(self) -> dict[str, Any]:
        """As listings show it."""
        return {**super().described(), "HashKeyRange": self.hash_range()}


class KinesisStream(Stream):
    """One stream and its shards, in the order of their numbers."""

    shards: dict[str, KinesisShard]  # type: ignore[assignment]

    def __init__(self, arn: str, name: str, caller: Caller, created: float) -> None:
        super().__init__(arn, name, caller, created)
        self.failing: deque[frozenset[int]] = deque()  # entries of the next PutRecords calls that fail
        self.rates = {operation: Rate(limit) for operation, limit in _DESCRIBES_PER_SECOND.items()}
        self._numbers = itertools.count()
        self._records = itertools.count(1)

    def shard(self, shard_id: str) -> KinesisShard:
        """ResourceNotFoundException when it has expired or never was."""
        if (shard := self.shards.get(shard_id)) is None:
            where = f"in stream {self.name} under account {self.account}"
            raise AwsFault("ResourceNotFoundException", f"Shard {shard_id} {where} does not exist")
        return shard

    def add_shard(self, keys: tuple[int, int], parents: tuple[str, ...] = ()) -> None:
        """A new open shard."""
        number = next(self._numbers)
        shard = KinesisShard(number, keys, parents, self.next_sequence(number))
        self.shards[shard.id] = shard

    def next_sequence(self, shard_number: int) -> int:
        """56 digits that begin with 49, rise over the whole stream and end with the shard's number."""
        return int(f"49{int(self.created):014d}{next(self._records):028d}{shard_number:012d}")

    def open_shard(self, hash_key: int) -> KinesisShard:
        """Where a key goes now."""
        return next(s for s in self.shards.values() if not s.is_closed and s.keys[0] <= hash_key <= s.keys[1])

    def close(self, shard: KinesisShard) -> None:
        """No more records for it."""
        shard.ending = self.next_sequence(shard.number)

    def must_be_open(self, shard_id: object) -> KinesisShard:
        """A shard that may be split or merged."""
        shard = self.shard(str(shard_id))
        if shard.is_closed:
            raise _invalid(f"Shard {shard.id} in stream {self.name} under account {self.account} is closed")
        return shard


class Kinesis:
    """What boto3 and a polling consumer call."""

    def __init__(self, now: Callable[[], float], is_throttling: Callable[[], bool]) -> None:
        self._now = now
        self._is_throttling = is_throttling
        self.streams: dict[str, KinesisStream] = {}
        stream = {"StreamName", "StreamARN"}
        self.service = Service(
            target="Kinesis_20131202",
            content_type="application/x-amz-json-1.1",
            namespace="",
            operations={
                "CreateStream": (self._create_stream, frozenset({"StreamName", "ShardCount"})),
                "DeleteStream": (self._delete_stream, frozenset(stream)),
                "DescribeStreamSummary": (self._describe_stream_summary, frozenset(stream)),
                "DescribeStream": (self._describe_stream, frozenset({*stream, "Limit", "ExclusiveStartShardId"})),
                "ListShards": (
                    self._list_shards,
                    frozenset({*stream, "NextToken", "MaxResults", "ExclusiveStartShardId", "StreamCreationTimestamp"}),
                ),
                "SplitShard": (self._split_shard, frozenset({*stream, "ShardToSplit", "NewStartingHashKey"})),
                "MergeShards": (self._merge_shards, frozenset({*stream, "ShardToMerge", "AdjacentShardToMerge"})),
                "PutRecord": (
                    self._put_record,
                    frozenset({*stream, "Data", "PartitionKey", "ExplicitHashKey", "SequenceNumberForOrdering"}),
                ),
                "PutRecords": (self._put_records, frozenset({*stream, "Records"})),
                "GetShardIterator": (
                    self._get_shard_iterator,
                    frozenset({*stream, "ShardId", "ShardIteratorType", "StartingSequenceNumber", "Timestamp"}),
                ),
                "GetRecords": (self._get_records, frozenset({"ShardIterator", "Limit", "StreamARN"})),
            },
        )

    def stream(self, arn: object) -> KinesisStream:
        """ResourceNotFoundException when there is none."""
        if (stream := self.streams.get(str(arn))) is None:
            raise AwsFault("ResourceNotFoundException", f"Stream {arn} not found.")
        return stream

    # --- streams

    def _create_stream(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        name, count = str(required(request, "StreamName")), int(request.get("ShardCount", 1))
        arn = _arn(caller, name)
        if arn in self.streams:
            raise AwsFault("ResourceInUseException", f"Stream {name} under account {caller.account} already exists.")
        stream = self.streams[arn] = KinesisStream(arn, name, caller, self._now())
        size = 2**128 // count
        for number in range(count):
            last = MAX_HASH if number == count - 1 else (number + 1) * size - 1
            stream.add_shard((number * size, last))
        return {}

    def _delete_stream(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        del self.streams[self._named(caller, request).arn]
        return {}

    def _describe_stream_summary(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        stream = self._named(caller, request)
        self._check_rate(stream, "DescribeStreamSummary")
        summary = self._describe(stream)
        summary["OpenShardCount"] = sum(not shard.is_closed for shard in stream.shards.values())
        return {"StreamDescriptionSummary": summary}

    def _describe_stream(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        stream = self._named(caller, request)
        self._check_rate(stream, "DescribeStream")
        most = int(request.get("Limit", _SHARDS_PER_PAGE["DescribeStream"]))
        shards = _after(stream, request.get("ExclusiveStartShardId"))
        page = {"Shards": [shard.described() for shard in shards[:most]], "HasMoreShards": len(shards) > most}
        return {"StreamDescription": {**self._describe(stream), **page}}

    def _list_shards(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        most = int(request.get("MaxResults", _SHARDS_PER_PAGE["ListShards"]))
        start: object
        if "NextToken" in request:
            if beside := {"StreamName", "StreamCreationTimestamp", "ExclusiveStartShardId"} & request.keys():
                raise _invalid(f"NextToken and {min(beside)} cannot be provided together.")
            token = self._listing_token(request["NextToken"])
            stream, start = self.stream(token.stream), token.after
            if "MaxResults" not in request:
                most = token.most
        else:
            stream, start = self._named(caller, request), request.get("ExclusiveStartShardId")
        self._check_rate(stream, "ListShards")
        shards = _after(stream, start)
        answer: dict[str, Any] = {"Shards": [shard.described() for shard in shards[:most]]}
        if len(shards) > most:
            made = _ListingToken(stream.arn, shards[most - 1].id, most, stream.epoch, self._now())
            answer["NextToken"] = base64.b64encode(encode(made)).decode()
        return answer

    def _split_shard(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        stream = self._named(caller, request)
        shard = stream.must_be_open(request.get("ShardToSplit"))
        (first, last), middle = shard.keys, _hash_key(request.get("NewStartingHashKey"))
        if not first < middle <= last:
            raise _invalid(f"NewStartingHashKey {middle} is not inside {shard.id}.")
        stream.close(shard)
        stream.add_shard((first, middle - 1), (shard.id,))
        stream.add_shard((middle, last), (shard.id,))
        return {}

    def _merge_shards(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        stream = self._named(caller, request)
        one = stream.must_be_open(request.get("ShardToMerge"))
        other = stream.must_be_open(request.get("AdjacentShardToMerge"))
        lower, upper = sorted((one, other), key=lambda shard: shard.keys)
        if lower.keys[1] + 1 != upper.keys[0]:
            raise _invalid(f"Shards {one.id} and {other.id} in stream {stream.name} are not an adjacent pair.")
        for parent in (one, other):
            stream.close(parent)
        stream.add_shard((lower.keys[0], upper.keys[1]), (one.id, other.id))
        return {}

    # --- records

    def _put_record(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        return self._put(self._named(caller, request), request)

    def _put_records(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        stream = self._named(caller, request)
        entries = required(request, "Records")
        if not 1 <= len(entries) <= _MAX_ENTRIES:
            raise _invalid(f"1 to {_MAX_ENTRIES} entries, not {len(entries)}")
        failing = stream.failing.popleft() if stream.failing else frozenset[int]()
        message = f"Rate exceeded for shard in stream {stream.name} under account {stream.account}."
        failure = {"ErrorCode": "ProvisionedThroughputExceededException", "ErrorMessage": message}
        results = [failure if n in failing else self._put(stream, entry) for n, entry in enumerate(entries)]
        return {"FailedRecordCount": sum(result is failure for result in results), "Records": results}

    def _get_shard_iterator(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        stream = self._named(caller, request)
        shard = stream.shard(str(request.get("ShardId")))
        now = self._now()
        if self._is_throttling() and not shard.iterators.allows(now):
            raise _rate_exceeded(stream, shard)
        match request.get("ShardIteratorType"):
            case "TRIM_HORIZON":
                index = shard.trimmed
            case "LATEST":
                index = shard.end
            case ("AT_SEQUENCE_NUMBER" | "AFTER_SEQUENCE_NUMBER") as kind:
                # What was trimmed is no error here: reading begins at the horizon.
                index = shard.index_at(_sequence(stream, shard, request) + (kind == "AFTER_SEQUENCE_NUMBER"))
            case "AT_TIMESTAMP":
                if not isinstance(at := request.get("Timestamp"), int | float) or at > now:
                    raise _invalid(f"The timestamp {at} of AT_TIMESTAMP is missing or in the future.")
                index = shard.index_since(at)
            case kind:
                raise AwsFault("ValidationException", f"ShardIteratorType {kind} does not exist")
        return {"ShardIterator": stream.token(shard, index, now)}

    def _get_records(self, _: Caller, request: dict[str, Any]) -> bytes:
        token = read_token(request.get("ShardIterator"))
        if token is None or token.stream not in self.streams:
            raise _invalid("Invalid ShardIterator.")
        limit = request.get("Limit", MAX_RECORDS)
        if not isinstance(limit, int) or not 1 <= limit <= MAX_RECORDS:
            raise _invalid(f"Limit {limit} is not between 1 and {MAX_RECORDS}.")
        now = self._now()
        stream = self.stream(token.stream)
        shard = stream.shard(token.shard)
        if token.epoch < shard.epoch or now - token.issued > ITERATOR_SECONDS:
            raise AwsFault("ExpiredIteratorException", "Iterator expired. It was created more than 5 minutes ago.")
        if self._is_throttling() and not (shard.bandwidth.allows(now) and shard.reads.allows(now)):
            raise _rate_exceeded(stream, shard)
        index = max(token.place, shard.trimmed)
        records, nbytes = shard.read(index, limit, MAX_BYTES)
        if shard.empty_pages and records:
            shard.empty_pages -= 1
            records, nbytes = [], 0
        shard.bandwidth.answered(now, nbytes)
        index += len(records)
        left = index - shard.trimmed
        # Of the oldest record that this answer does not hold; never 0 while there is one.
        behind = 0 if index == shard.end else max(1, int((now - shard.arrivals[left]) * 1000))
        if shard.is_closed and index == shard.end:
            tail = b',"ChildShards":' + encode(_children(stream, shard))
        else:
            tail = b',"NextShardIterator":"%b"' % stream.token(shard, index, now, token.reader).encode()
        return b'{"Records":[%b],"MillisBehindLatest":%d%b}' % (b",".join(records), behind, tail)

    # --- inside

    def _named(self, caller: Caller, request: dict[str, Any]) -> KinesisStream:
        return self.stream(request.get("StreamARN") or _arn(caller, str(request.get("StreamName"))))

    def _describe(self, stream: KinesisStream) -> dict[str, Any]:
        return {
            "StreamName": stream.name,
            "StreamARN": stream.arn,
            "StreamStatus": "ACTIVE",
            "RetentionPeriodHours": _RETENTION_HOURS,
            "StreamCreationTimestamp": stream.created,
            "EnhancedMonitoring": [],
            "EncryptionType": "NONE",
        }

    def _check_rate(self, stream: KinesisStream, operation: str) -> None:
        if self._is_throttling() and not stream.rates[operation].allows(self._now()):
            raise AwsFault("LimitExceededException", f"Rate of {operation} exceeded for stream {stream.name}.")

    def _listing_token(self, text: object) -> _ListingToken:
        try:
            token = _listing_tokens.decode(base64.b64decode(str(text), validate=True))
        except (ValueError, msgspec.MsgspecError):
            raise _invalid("NextToken is invalid.") from None
        if token.epoch < self.stream(token.stream).epoch or self._now() - token.issued > LISTING_SECONDS:
            raise AwsFault("ExpiredNextTokenException", "NextToken has expired.")
        return token

    def _put(self, stream: KinesisStream, entry: dict[str, Any]) -> dict[str, Any]:
        key, data = str(required(entry, "PartitionKey")), str(required(entry, "Data"))
        try:
            nbytes = len(base64.b64decode(data, validate=True))
        except binascii.Error:
            raise AwsFault("SerializationException", "Data is not base64") from None
        if nbytes > _MAX_RECORD_BYTES or not key:
            raise AwsFault("ValidationException", "a record is larger than 1 MiB or has no partition key")
        if "ExplicitHashKey" in entry:
            hash_key = _hash_key(entry["ExplicitHashKey"])
        else:
            hash_key = int.from_bytes(hashlib.md5(key.encode(), usedforsecurity=False).digest(), "big")
        shard = stream.open_shard(hash_key)
        now = self._now()
        number = stream.next_sequence(shard.number)
        wire = b'{"SequenceNumber":"%d","ApproximateArrivalTimestamp":%b,"Data":"%b","PartitionKey":%b}' % (
            number,
            b"%.12fE9" % (now / 1e9),  # milliseconds, and AWS does send exponents
            data.encode(),
            encode(key),
        )
        shard.append(number, wire, now, nbytes + len(key.encode()))
        return {"SequenceNumber": str(number), "ShardId": shard.id}


def _arn(caller: Caller, name: str) -> str:
    return f"arn:aws:kinesis:{caller.region}:{caller.account}:stream/{name}"


def _after(stream: KinesisStream, shard_id: object) -> list[KinesisShard]:
    """Shards in the order of their ids, those after one, which may have expired."""
    return [shard for shard in stream.shards.values() if shard_id is None or shard.id > str(shard_id)]


def _children(stream: KinesisStream, parent: KinesisShard) -> list[dict[str, Any]]:
    return [
        {"ShardId": shard.id, "ParentShards": list(shard.parents), "HashKeyRange": shard.hash_range()}
        for shard in stream.shards.values()
        if parent.id in shard.parents
    ]


def _sequence(stream: KinesisStream, shard: KinesisShard, request: dict[str, Any]) -> int:
    text = request.get("StartingSequenceNumber")
    if not isinstance(text, str) or not text.isdecimal():
        raise _invalid(f"StartingSequenceNumber {text} used in GetShardIterator is invalid.")
    sequence = int(text)
    if len(text) != len(str(shard.starting)) or not text.startswith(str(shard.starting)[:16]):
        raise _invalid(
            f"StartingSequenceNumber {text} used in GetShardIterator on shard {shard.id} in stream {stream.name} under "
            f"account {stream.account} is invalid because it did not come from this stream."
        )
    if sequence % 10**12 != shard.number:
        raise _invalid(
            f"Invalid StartingSequenceNumber. It encodes shardId-{sequence % 10**12:012d}, while it was used in a call "
            f"to a shard with {shard.id}"
        )
    return sequence


def _hash_key(text: object) -> int:
    if not isinstance(text, str) or not text.isdecimal() or int(text) > MAX_HASH:
        raise _invalid(f"Invalid hash key {text}: it must be a number below 2^128.")
    return int(text)


def _invalid(message: str) -> AwsFault:
    return AwsFault("InvalidArgumentException", message)


def _rate_exceeded(stream: KinesisStream, shard: KinesisShard) -> AwsFault:
    return AwsFault(
        "ProvisionedThroughputExceededException",
        f"Rate exceeded for shard {shard.id} in stream {stream.name} under account {stream.account}.",
    )
