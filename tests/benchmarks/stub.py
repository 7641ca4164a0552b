"""Kinesis, DynamoDB Streams, SQS and an HTTP target in one cheap process, for the benchmarks.

`python -m tests.benchmarks.stub --port 0` prints `{"port": N}` and serves until it is ended. It knows just enough of
each service for a well-behaved client: answers are canned or formatted from a template, nothing is checked, no signature
is read. What a client does is counted, and every record that reaches `POST /target` goes through a ledger, so that a
fast client that loses, repeats or reorders records is found out.

A measurement runs in two steps. First `warm` records of each shard can be read. When the target has all of them (and,
for SQS, they are deleted), the stub notes the client's CPU time and releases the rest; when those are done too, it
notes it again. So start-up, connections and first-time code are outside, and reading ahead cannot shift work out of
the measured stretch: at both its ends the client holds nothing.

    POST /_configure   a `Plan` as JSON; forgets everything before
    POST /_watch       {"pid": N}: the client whose CPU time is noted
    GET  /_stats       counts, ledger and the two notes
    POST /target       an event; answers {}
    POST /sink         anything; counts as one batch, without a ledger
"""

import argparse
import asyncio
import base64
import hashlib
import json
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, NamedTuple

RECORD_BYTES = 1_024
REGION = "eu-west-1"
ACCOUNT = "000000000000"
NAME = "bench"
ARNS = {
    "kinesis": f"arn:aws:kinesis:{REGION}:{ACCOUNT}:stream/{NAME}",
    "dynamodb": f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{NAME}/stream/2026-01-01T00:00:00.000",
    "sqs": f"arn:aws:sqs:{REGION}:{ACCOUNT}:{NAME}",
}
VISIBILITY_SECONDS = 30.0

_PAGE = 1_000  # shards of one ListShards answer, unless MaxResults says otherwise
_DYNAMODB_PAGE = 100  # shards of one DescribeStream answer
_KINESIS_LIMIT = 10_000
_DYNAMODB_LIMIT = 1_000
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
_OPERATION = re.compile(rb"\r\nx-amz-target: *[\w]+\.(\w+)")
_STATUS = {200: b"200 OK", 400: b"400 Bad Request", 500: b"500 Internal Server Error"}


def _text(length: int) -> str:
    """A JSON document of exactly this many characters, with some quotes in it, as bodies have."""
    document = {"order": 4711, "customer": "C-20260101", "state": "paid", "lines": ["a", "b", "c"], "note": ""}
    document["note"] = "x" * (length - len(json.dumps(document)))
    return json.dumps(document)


# Templates are filled by `%`, so a literal percent sign may not stand in them. Every number has a fixed width, so the
# records of a stream are made once, in one buffer, and answers are slices of it. All shards share it: what must differ
# is put in for `_SHARD`, four hexadecimal digits. A Kinesis record does not name its shard.
_SHARD = "~~~~"


def _kinesis_template(arrival: float) -> bytes:
    data = base64.b64encode(_text(RECORD_BYTES).encode()).decode()
    return (
        f'{{"SequenceNumber":"4959%(n)052d","ApproximateArrivalTimestamp":{arrival:.3f},'
        f'"Data":"{data}","PartitionKey":"key-%(n)08d"}}'
    ).encode()


def _dynamodb_template(arrival: float) -> bytes:
    def image(version: int) -> str:
        return json.dumps(
            {
                "id": {"S": f"item-{_SHARD}-%(n)08d"},
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
        f'"Keys":{{"id":{{"S":"item-{_SHARD}-%(n)08d"}}}},"NewImage":{image(2)},"OldImage":{image(1)},'
        f'"SequenceNumber":"1%(n)020d","SizeBytes":700,"StreamViewType":"NEW_AND_OLD_IMAGES"}},'
        f'"eventID":"be9c4000{_SHARD}%(n)020x","eventName":"MODIFY","eventSource":"aws:dynamodb","eventVersion":"1.1"}}'
    ).encode()


def _sqs_template(arrival: float) -> bytes:
    body = _text(RECORD_BYTES)
    digest = hashlib.md5(body.encode(), usedforsecurity=False).hexdigest()
    sent = int(arrival * 1_000)
    return (
        f'{{"MessageId":"be9c4000-0000-4000-8000-%(n)012x","ReceiptHandle":"handle%(n)012d{"h" * 160}",'
        f'"MD5OfBody":"{digest}","Body":{json.dumps(body)},"Attributes":{{"SenderId":"AIDAEXAMPLE",'
        f'"ApproximateFirstReceiveTimestamp":"{sent}","ApproximateReceiveCount":"1","SentTimestamp":"{sent}"}}}}'
    ).encode()


class _Shape(NamedTuple):
    """How a source's ids are found in an event: after `marker`, which no other value starts with.

    `gap`: bytes that certainly lie between two ids, skipped when looking for the next. `lane` and `number` are where
    the shard and the record's number are, counted from the marker's end, with the number's base.
    """

    marker: bytes
    gap: int
    lane: slice | None
    number: slice
    base: int


_SHAPES = {
    "kinesis": _Shape(b'"shardId-', RECORD_BYTES, slice(0, 12), slice(17, 69), 10),
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
        lane, number = shape.lane, shape.number
        shard = int(event[at + lane.start : at + lane.stop], shape.base) if lane else 0
        ids.append((shard, int(event[at + number.start : at + number.stop], shape.base)))
        at = event.find(shape.marker, at + shape.gap)
    return ids


class Ledger:
    """Which records arrived. A record out of order is one whose first arrival comes after a later one's."""

    def __init__(self, shards: int, records: int, ordered: bool) -> None:
        self.distinct = 0
        self.duplicates = 0
        self.out_of_order = 0
        self.unknown = 0
        self._ordered = ordered
        self._seen = [bytearray(records) for _ in range(shards)]
        self._newest = [-1] * shards

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
        if number > self._newest[shard]:
            self._newest[shard] = number
        elif self._ordered:
            self.out_of_order += 1
        return True


@dataclass(frozen=True, slots=True)
class Plan:
    """What the stub offers. `records` per shard, the `warm` ones included; a queue is one shard.

    `audit` False: deliveries are counted at `/sink`, `batch` each. `trickle_ms`: after the warm-up, one record of each
    shard every so often instead of all at once (queues). `error_every` N: the target answers 500 to every N-th event.
    """

    source: str = "kinesis"
    shards: int = 1
    warm: int = 0
    records: int = 0
    batch: int = 1
    audit: bool = True
    latency_ms: float = 0
    error_every: int = 0
    trickle_ms: float = 0


def process_cpu(pid: int) -> float:
    """CPU seconds, user and system, of all threads of a living process.

    It is the clock that clock_getcpuclockid(3) names on Linux: the same sum as /proc/PID/stat, in nanoseconds.
    """
    return time.clock_gettime((~pid << 3) | 2)


class Stub:
    """The state behind every connection. One plan at a time."""

    def __init__(self) -> None:
        self.port = 0
        operations: dict[str, Callable[[dict[str, Any], Connection], None]] = {
            "ListShards": self._list_shards,
            "DescribeStreamSummary": self._describe_stream_summary,
            "DescribeStream": self._describe_stream,
            "GetShardIterator": self._get_shard_iterator,
            "GetRecords": self._get_records,
            "GetQueueUrl": self._get_queue_url,
            "GetQueueAttributes": self._get_queue_attributes,
            "ReceiveMessage": self._receive_message,
            "DeleteMessageBatch": self._delete_message_batch,
            "ChangeMessageVisibilityBatch": self._change_message_visibility_batch,
        }
        self._operations = {name.lower().encode(): (name, answer) for name, answer in operations.items()}
        self._trickle: asyncio.TimerHandle | None = None
        self.configure(Plan())

    def configure(self, plan: Plan) -> None:
        """Forget everything and offer this."""
        if self._trickle:
            self._trickle.cancel()
        self._plan = plan
        self._pid = 0
        self._calls: Counter[str] = Counter()
        self._unknown_operations: Counter[str] = Counter()
        self._ledger = Ledger(plan.shards, plan.records, ordered=plan.source != "sqs")
        self._available = plan.warm
        self._sunk = 0
        self._events = 0
        self._errors = 0
        self._deleted = bytearray(plan.records)
        self._deletions = 0
        self._next_message = 0
        self._in_flight: dict[int, float] = {}
        self._waiting: deque[Callable[[], bool]] = deque()
        self._released_at: dict[int, float] = {}
        self._latencies: list[float] = []
        self._start: dict[str, float] | None = None
        self._end: dict[str, float] | None = None
        arrival = time.time()
        templates = {"kinesis": _kinesis_template, "dynamodb": _dynamodb_template, "sqs": _sqs_template}
        self._template = templates[plan.source](arrival)
        self._width = len(self._template % {b"n": 0}) + 1
        self._buffer = memoryview(self._format(range(plan.records if plan.source != "sqs" else 0)))

    def _format(self, numbers: Sequence[int]) -> bytes:
        template = self._template
        return b",".join([template % {b"n": n} for n in numbers])

    # -- requests -----------------------------------------------------------------------------------------------------

    def handle(self, head: bytes, body: bytes, connection: "Connection") -> None:
        """Answer one request; `head` is in lower case."""
        path = head[: head.find(b"\r\n")].split(b" ")[1]
        if path == b"/target":
            self._target(body, connection)
        elif path == b"/sink":
            self._events += 1
            self._sunk += self._plan.batch
            connection.reply(b"{}")
            self._progress()
        elif path == b"/_stats":
            connection.reply(json.dumps(self.stats()).encode())
        elif path == b"/_configure":
            self.configure(Plan(**json.loads(body)))
            connection.reply(b"{}")
        elif path == b"/_watch":
            self._pid = json.loads(body)["pid"]
            connection.reply(b"{}")
            self._progress()
        elif (found := _OPERATION.search(head)) and (operation := self._operations.get(found[1])):
            name, answer = operation
            self._calls[name] += 1
            answer(json.loads(body), connection)
        else:
            self._unknown_operations[found[1].decode() if found else path.decode()] += 1
            connection.reply(b'{"__type":"UnknownOperationException","message":"not in the stub"}', status=400)

    def stats(self) -> dict[str, Any]:
        """Everything counted since `configure`."""
        ledger = self._ledger
        answer = {
            "expected": self._plan.shards * self._plan.records,
            "delivered": ledger.distinct if self._plan.audit else self._sunk,
            "duplicates": ledger.duplicates,
            "out_of_order": ledger.out_of_order,
            "unknown_records": ledger.unknown,
            "deleted": self._deletions,
            "events": self._events,
            "errors": self._errors,
            "calls": dict(self._calls),
            "unknown_operations": dict(self._unknown_operations),
            "start": self._start,
            "end": self._end,
        }
        if self._latencies:
            ranked = sorted(self._latencies)
            answer["latency_ms"] = {
                "p50": ranked[len(ranked) // 2] * 1_000,
                "p99": ranked[int(len(ranked) * 0.99)] * 1_000,
                "max": ranked[-1] * 1_000,
            }
        return answer

    def _target(self, body: bytes, connection: "Connection") -> None:
        plan = self._plan
        self._events += 1
        if plan.error_every and self._events % plan.error_every == 0:
            self._errors += 1
            connection.reply(b'{"errorType":"Benchmark"}', status=500)
            return
        ledger = self._ledger
        for shard, number in event_ids(plan.source, body):
            if ledger.note(shard, number) and (released := self._released_at.pop(number, 0.0)):
                self._latencies.append(time.monotonic() - released)
        if plan.latency_ms:
            asyncio.get_running_loop().call_later(plan.latency_ms / 1_000, connection.reply, b"{}")
        else:
            connection.reply(b"{}")
        self._progress()

    # -- the two steps ------------------------------------------------------------------------------------------------

    def _progress(self) -> None:
        """Release the rest and note the CPU time, when a step is done."""
        plan = self._plan
        if self._end or not self._pid:
            return
        done = self._ledger.distinct if plan.audit else self._sunk
        if plan.source == "sqs":
            done = min(done, self._deletions)
        if self._start is None:
            if done >= plan.shards * plan.warm and plan.records > plan.warm:
                self._start = self._note(done)
                if plan.trickle_ms:
                    self._drip()
                else:
                    self._release(plan.records)
        elif done >= plan.shards * plan.records:
            self._end = self._note(done)

    def _note(self, done: int) -> dict[str, float]:
        return {
            "done": done,
            "client_cpu": process_cpu(self._pid),
            "stub_cpu": time.process_time(),
            "wall": time.monotonic(),
        }

    def _drip(self) -> None:
        self._released_at[self._available] = time.monotonic()
        self._release(self._available + 1)
        if self._available < self._plan.records:
            loop = asyncio.get_running_loop()
            self._trickle = loop.call_later(self._plan.trickle_ms / 1_000, self._drip)

    def _release(self, available: int) -> None:
        self._available = available
        while self._waiting and self._waiting[0]():
            self._waiting.popleft()

    # -- streams ------------------------------------------------------------------------------------------------------

    def _shard_id(self, number: int) -> str:
        return f"shardId-{number:012d}" if self._plan.source == "kinesis" else f"shardId-{number:020d}-bench"

    def _sequence(self, number: int) -> str:
        return f"4959{number:052d}" if self._plan.source == "kinesis" else f"1{number:020d}"

    def _list_shards(self, request: dict[str, Any], connection: "Connection") -> None:
        start = int(request.get("NextToken", 0))
        stop = min(start + request.get("MaxResults", _PAGE), self._plan.shards)
        width = 2**128 // self._plan.shards
        answer: dict[str, Any] = {
            "Shards": [
                {
                    "ShardId": self._shard_id(n),
                    "HashKeyRange": {"StartingHashKey": str(n * width), "EndingHashKey": str((n + 1) * width - 1)},
                    "SequenceNumberRange": {"StartingSequenceNumber": self._sequence(0)},
                }
                for n in range(start, stop)
            ]
        }
        if stop < self._plan.shards:
            answer["NextToken"] = str(stop)
        connection.reply(json.dumps(answer).encode())

    def _describe_stream_summary(self, _request: dict[str, Any], connection: "Connection") -> None:
        summary = {
            "StreamName": NAME,
            "StreamARN": ARNS["kinesis"],
            "StreamStatus": "ACTIVE",
            "StreamModeDetails": {"StreamMode": "PROVISIONED"},
            "RetentionPeriodHours": 24,
            "StreamCreationTimestamp": 1_767_225_600,
            "EnhancedMonitoring": [{"ShardLevelMetrics": []}],
            "EncryptionType": "NONE",
            "OpenShardCount": self._plan.shards,
            "ConsumerCount": 0,
        }
        connection.reply(json.dumps({"StreamDescriptionSummary": summary}).encode())

    def _describe_stream(self, request: dict[str, Any], connection: "Connection") -> None:
        """DynamoDB's: the shards, by pages."""
        last = request.get("ExclusiveStartShardId")
        start = int(last.split("-")[1]) + 1 if last else 0
        stop = min(start + _DYNAMODB_PAGE, self._plan.shards)
        description: dict[str, Any] = {
            "StreamArn": ARNS["dynamodb"],
            "StreamLabel": "2026-01-01T00:00:00.000",
            "StreamStatus": "ENABLED",
            "StreamViewType": "NEW_AND_OLD_IMAGES",
            "CreationRequestDateTime": 1_767_225_600,
            "TableName": NAME,
            "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
            "Shards": [
                {
                    "ShardId": self._shard_id(n),
                    "SequenceNumberRange": {"StartingSequenceNumber": self._sequence(0)},
                }
                for n in range(start, stop)
            ],
        }
        if stop < self._plan.shards:
            description["LastEvaluatedShardId"] = self._shard_id(stop - 1)
        connection.reply(json.dumps({"StreamDescription": description}).encode())

    def _get_shard_iterator(self, request: dict[str, Any], connection: "Connection") -> None:
        match request["ShardIteratorType"]:
            case "LATEST":
                at = self._available
            case "AT_SEQUENCE_NUMBER" | "AFTER_SEQUENCE_NUMBER" as kind:
                sequence = request.get("StartingSequenceNumber") or request["SequenceNumber"]  # Kinesis, DynamoDB
                at = int(sequence) % 10**20 + kind.startswith("AFTER")
            case _:
                at = 0
        shard = int(request["ShardId"].split("-")[1])
        connection.reply(b'{"ShardIterator":"iterator/%d/%d"}' % (shard, at))

    def _get_records(self, request: dict[str, Any], connection: "Connection") -> None:
        _, shard_text, at_text = request["ShardIterator"].split("/")
        shard, at = int(shard_text), int(at_text)
        kinesis = self._plan.source == "kinesis"
        limit = min(request.get("Limit", 10_000), _KINESIS_LIMIT if kinesis else _DYNAMODB_LIMIT)
        stop = max(at, min(at + limit, self._available))
        records: bytes | memoryview = self._buffer[at * self._width : stop * self._width - 1] if stop > at else b""
        if kinesis:
            lag = b'"MillisBehindLatest":%d,' % (self._available - stop)
        else:
            lag = b""
            records = bytes(records).replace(_SHARD.encode(), b"%04x" % shard)
        opening = b'{"NextShardIterator":"iterator/%d/%d",%s"Records":[' % (shard, stop, lag)
        connection.reply(opening, records, b"]}")

    # -- queue --------------------------------------------------------------------------------------------------------

    def _get_queue_url(self, _request: dict[str, Any], connection: "Connection") -> None:
        connection.reply(json.dumps({"QueueUrl": f"http://127.0.0.1:{self.port}/{ACCOUNT}/{NAME}"}).encode())

    def _get_queue_attributes(self, _request: dict[str, Any], connection: "Connection") -> None:
        attributes = {
            "QueueArn": ARNS["sqs"],
            "VisibilityTimeout": str(int(VISIBILITY_SECONDS)),
            "ReceiveMessageWaitTimeSeconds": "0",
            "ApproximateNumberOfMessages": str(self._available - self._next_message),
            "ApproximateNumberOfMessagesNotVisible": str(len(self._in_flight)),
            "MessageRetentionPeriod": "345600",
        }
        connection.reply(json.dumps({"Attributes": attributes}).encode())

    def _receive_message(self, request: dict[str, Any], connection: "Connection") -> None:
        limit = request.get("MaxNumberOfMessages", 1)
        visibility = request.get("VisibilityTimeout", VISIBILITY_SECONDS)
        wait = request.get("WaitTimeSeconds", 0)

        def messages() -> bool:
            """Answer if there is something, or nobody is waiting any more."""
            if connection.is_closed:
                return True
            taken = self._take(limit)
            if not taken:
                return False
            until = time.monotonic() + visibility
            self._in_flight.update(dict.fromkeys(taken, until))
            connection.reply(b'{"Messages":[', self._format(taken), b"]}")
            return True

        def waited() -> None:
            if messages in self._waiting:
                self._waiting.remove(messages)
                if not messages():
                    connection.reply(b"{}")

        if not messages():
            if wait:
                self._waiting.append(messages)
                asyncio.get_running_loop().call_later(wait, waited)
            else:
                connection.reply(b"{}")

    def _take(self, limit: int) -> Sequence[int]:
        """New messages, else ones whose visibility has ended."""
        start = self._next_message
        if start < self._available:
            self._next_message = min(start + limit, self._available)
            return range(start, self._next_message)
        now = time.monotonic()
        return [n for n, until in self._in_flight.items() if until <= now][:limit]

    def _delete_message_batch(self, request: dict[str, Any], connection: "Connection") -> None:
        entries = request["Entries"]
        for entry in entries:
            number = int(entry["ReceiptHandle"][6:18])
            self._in_flight.pop(number, None)
            if self._plan.audit:
                self._deletions += not self._deleted[number]
                self._deleted[number] = 1
            else:
                self._deletions += 1
        connection.reply(_batch_answer(entries))
        self._progress()

    def _change_message_visibility_batch(self, request: dict[str, Any], connection: "Connection") -> None:
        entries = request["Entries"]
        now = time.monotonic()
        for entry in entries:
            number = int(entry["ReceiptHandle"][6:18])
            if number in self._in_flight:
                self._in_flight[number] = now + entry["VisibilityTimeout"]
        connection.reply(_batch_answer(entries))


def _batch_answer(entries: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps({"Successful": [{"Id": entry["Id"]} for entry in entries], "Failed": []}).encode()


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive and Content-Length, which is what every client here sends. One request at a time."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._head = b""
        self._body_at = 0
        self._needed = 0
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True

    def data_received(self, data: bytes) -> None:
        self._received += data
        while self._received:
            if not self._needed:
                end = self._received.find(b"\r\n\r\n")
                if end < 0:
                    return
                self._head = bytes(self._received[:end]).lower()
                length = _CONTENT_LENGTH.search(self._head)
                self._body_at = end + 4
                self._needed = self._body_at + (int(length[1]) if length else 0)
            if len(self._received) < self._needed:
                return
            body = bytes(memoryview(self._received)[self._body_at : self._needed])
            del self._received[: self._needed]
            self._needed = 0
            self._stub.handle(self._head, body, self)

    def reply(self, *body: bytes | memoryview, status: int = 200) -> None:
        """Send an answer; its body is all the parts."""
        if self.is_closed:
            return
        head = (
            b"HTTP/1.1 %s\r\nContent-Type: application/x-amz-json-1.1\r\nDate: %s\r\n"
            b"x-amzn-RequestId: 00000000-0000-4000-8000-000000000000\r\nContent-Length: %d\r\n\r\n"
        ) % (_STATUS[status], _date(int(time.time())), sum(map(len, body)))
        self._transport.write(b"".join((head, *body)))


_dates: dict[int, bytes] = {}


def _date(now: int) -> bytes:
    """The Date header, made once a second."""
    date = _dates.get(now)
    if date is None:
        _dates.clear()
        date = _dates[now] = formatdate(now, usegmt=True).encode()
    return date


async def serve(port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT; the port goes to standard output as JSON."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stub = Stub()
    server = await loop.create_server(lambda: Connection(stub), "127.0.0.1", port, backlog=4_096)
    stub.port = server.sockets[0].getsockname()[1]
    print(json.dumps({"port": stub.port}), flush=True)
    await stop.wait()
    server.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stub", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    asyncio.run(serve(parser.parse_args(arguments).port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
