"""The records that the stub offers, how they are found again in an event, and the ledger of what arrived."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple
from zlib import crc32

RECORD_BYTES = 1_024
KEYS = 1_000  # partition keys in a Kinesis shard; record n has the one at n modulo this
LANES = 10  # so many lanes have the same number of them
REGION = "eu-west-1"
ACCOUNT = "000000000000"
NAME = "bench"
ARNS = {
    "kinesis": f"arn:aws:kinesis:{REGION}:{ACCOUNT}:stream/{NAME}",
    "dynamodb": f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{NAME}/stream/2026-01-01T00:00:00.000",
    "sqs": f"arn:aws:sqs:{REGION}:{ACCOUNT}:{NAME}",
}
ORDER: dict[str, Any] = {
    "orderId": "o-17",
    "state": "shipped",
    "total": 301.8,
    "customer": {"country": "DE", "tier": "gold", "ip": "10.0.0.33"},
    "items": [{"sku": f"sku-{n}", "quantity": n, "path": f"dir/{n}/picture.png"} for n in range(8)],
}
"""What a body says; `filters` asks for it."""


def _balanced() -> tuple[int, ...]:
    """Numbers of keys, of which every lane has as many: a read of `KEYS` records is whole batches in each of them."""
    left, chosen = [KEYS // LANES] * LANES, []
    for number in count():
        lane = crc32(b"key-%08d" % number) % LANES  # as the daemon chooses it
        if left[lane]:
            left[lane] -= 1
            chosen.append(number)
            if len(chosen) == KEYS:
                return tuple(chosen)
    raise AssertionError


_KEY_NUMBERS = _balanced()
_STREAM = re.compile(rf"/{NAME}-(\d+)$")

# Templates are filled by `%`, so a literal percent sign may not stand in them. Every number has a fixed width, so the
# records of a stream are made once, in one buffer, and answers are slices of it. All shards share it: what must differ
# is put in for `SHARD`, four hexadecimal digits. A Kinesis record does not name its shard.
SHARD = "~~~~"


def stream_arn(source: str, number: int) -> str:
    """Of several streams or queues."""
    return ARNS[source] + (f"-{number}" if number else "")


def stream_number(arn: str) -> int:
    """The other way round."""
    found = _STREAM.search(arn)
    return int(found[1]) if found else 0


def order(length: int) -> dict[str, Any]:
    """The document of a body that is exactly so many characters of JSON, with quotes in it, as bodies have."""
    return {**ORDER, "note": "x" * (length - len(json.dumps({**ORDER, "note": ""})))}


def _body() -> str:
    return json.dumps(order(RECORD_BYTES))


def _kinesis_template(arrival: float) -> bytes:
    data = base64.b64encode(_body().encode()).decode()
    return (
        f'{{"SequenceNumber":"4959%(n)052d","ApproximateArrivalTimestamp":{arrival:.3f},'
        f'"Data":"{data}","PartitionKey":"key-%(key)08d"}}'
    ).encode()


def _dynamodb_template(arrival: float) -> bytes:
    def image(version: int) -> str:
        return json.dumps(
            {
                "id": {"S": f"item-{SHARD}-%(n)08d"},
                "version": {"N": str(version)},
                "customer": {"S": "C-20260101"},
                "paid": {"BOOL": True},
                "tags": {"SS": ["new", "web"]},
                "total": {"N": "123.45"},
                "address": {"M": {"street": {"S": "Main Street 1"}, "zip": {"S": "12345"}}},
                "lines": {"L": [{"N": "1"}, {"N": "2"}, {"N": "3"}]},
                "coupon": {"NULL": True},
                "note": {"S": "x" * 50},
            },
            separators=(",", ":"),
        )

    return (
        f'{{"awsRegion":"{REGION}","dynamodb":{{"ApproximateCreationDateTime":{int(arrival)},'
        f'"Keys":{{"id":{{"S":"item-{SHARD}-%(n)08d"}}}},"NewImage":{image(2)},"OldImage":{image(1)},'
        f'"SequenceNumber":"1%(n)020d","SizeBytes":700,"StreamViewType":"NEW_AND_OLD_IMAGES"}},'
        f'"eventID":"be9c4000{SHARD}%(n)020x","eventName":"MODIFY","eventSource":"aws:dynamodb","eventVersion":"1.1"}}'
    ).encode()


def _sqs_template(arrival: float) -> bytes:
    body = _body()
    digest = hashlib.md5(body.encode(), usedforsecurity=False).hexdigest()
    sent = int(arrival * 1_000)
    return (
        f'{{"MessageId":"be9c4000-0000-4000-8000-%(n)012x","ReceiptHandle":"handle%(n)012d{"h" * 160}",'
        f'"MD5OfBody":"{digest}","Body":{json.dumps(body)},"Attributes":{{"SenderId":"AIDAEXAMPLE",'
        f'"ApproximateFirstReceiveTimestamp":"{sent}","ApproximateReceiveCount":"1","SentTimestamp":"{sent}"}}}}'
    ).encode()


_TEMPLATES = {"kinesis": _kinesis_template, "dynamodb": _dynamodb_template, "sqs": _sqs_template}


class Records:
    """Records of a source that all arrived at one moment, as its wire has them; all of the same length."""

    def __init__(self, source: str, arrival: float) -> None:
        self._template = _TEMPLATES[source](arrival)
        self.width = len(self.join([0])) + 1
        """Bytes of one and the comma after it."""

    def join(self, numbers: Sequence[int]) -> bytes:
        """With commas between them."""
        template = self._template
        return b",".join([template % {b"n": n, b"key": _KEY_NUMBERS[n % KEYS]} for n in numbers])


class _Shape(NamedTuple):
    """How a source's ids are found in an event: after `marker`, which no other value starts with.

    `gap`: bytes that certainly lie between two ids, skipped when looking for the next. `lane` and `number` are where
    the shard and the record's number are, counted from the marker's end, with the number's base. `colon`: where one
    stands in an id; the event of a tumbling window names its shard without one.
    """

    marker: bytes
    gap: int
    lane: slice | None
    number: slice
    base: int
    colon: int | None = None


_SHAPES = {
    "kinesis": _Shape(b'"shardId-', RECORD_BYTES, slice(0, 12), slice(17, 69), 10, 12),
    "dynamodb": _Shape(b'"be9c4000', 700, slice(0, 4), slice(4, 24), 16),
    "sqs": _Shape(b'"be9c4000-0000-4000-8000-', RECORD_BYTES, None, slice(0, 12), 16),
}


def event_ids(source: str, event: bytes) -> list[tuple[int, int]]:
    """(shard, number) of every record of an event, in its order, whatever its field order and white space."""
    shape = _SHAPES[source]
    ids = []
    at = event.find(shape.marker)
    while at >= 0:
        at += len(shape.marker)
        if shape.colon is not None and event[at + shape.colon] != ord(":"):
            at = event.find(shape.marker, at)
            continue
        lane, number = shape.lane, shape.number
        shard = int(event[at + lane.start : at + lane.stop], shape.base) if lane else 0
        ids.append((shard, int(event[at + number.start : at + number.stop], shape.base)))
        at = event.find(shape.marker, at + shape.gap)
    return ids


class Ledger:
    """Which records arrived. A record out of order is one whose first arrival comes after a later one's of its key.

    `keys`: of a shard; 1 when the shard is one order, 0 when there is none, as in a queue.
    """

    def __init__(self, shards: int, records: int, keys: int) -> None:
        self.distinct = 0
        self.duplicates = 0
        self.out_of_order = 0
        self.unknown = 0
        self._keys = keys
        self._seen = [bytearray(records) for _ in range(shards)]
        self._newest = [[-1] * keys for _ in range(shards)]

    def note(self, shard: int, number: int) -> bool:
        """Enter one arrival; answers if it was the record's first."""
        if shard >= len(self._seen) or number >= len(self._seen[shard]):
            self.unknown += 1
            return False
        seen = self._seen[shard]
        if seen[number]:
            self.duplicates += 1
            return False
        seen[number] = 1
        self.distinct += 1
        if self._keys:
            newest, key = self._newest[shard], number % self._keys
            if number > newest[key]:
                newest[key] = number
            else:
                self.out_of_order += 1
        return True
