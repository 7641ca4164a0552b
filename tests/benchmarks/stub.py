"""Kinesis, DynamoDB Streams, SQS and an HTTP target in one cheap process, for the benchmarks.

`python -m tests.benchmarks.stub --port 0` prints `{"port": N, "tls_port": N}` and serves until it is ended; over TLS
with `--cert` and `--key` only. It knows just enough of each service for a well-behaved client: answers are canned or
formatted from a template, nothing is checked, no signature is read. What a client does is counted, and every record that
reaches `POST /target` goes through a ledger, so that a fast client that loses, repeats or reorders records is found out.

A measurement runs in two steps. First `warm` records of each shard can be read. When the target has all of them (and,
for SQS, they are deleted), the stub notes the client's CPU time and releases the rest; when those are done too, it
notes it again. So start-up, connections and first-time code are outside, and reading ahead cannot shift work out of
the measured stretch: at both its ends the client holds nothing.

    POST /_configure   a `Plan` as JSON; forgets everything before
    POST /_watch       {"pid": N}: the client whose CPU time is noted
    GET  /_stats       counts, ledger and the two notes
    POST /target       an event; answers as the plan says
    POST /sink         anything; counts as one batch, without a ledger
"""

import argparse
import asyncio
import json
import re
import signal
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from time import monotonic
from typing import Any

from tests.benchmarks.records import (
    ACCOUNT,
    ARNS,
    KEYS,
    NAME,
    SHARD,
    Ledger,
    Records,
    event_ids,
    stream_arn,
    stream_number,
)

VISIBILITY_SECONDS = 30.0

_PAGE = 1_000  # shards of one ListShards answer, unless MaxResults says otherwise
_DYNAMODB_PAGE = 100  # shards of one DescribeStream answer
_DYNAMODB_LIMIT = 1_000  # records of one GetRecords answer
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
_OPERATION = re.compile(rb"\r\nx-amz-target: *[\w]+\.(\w+)")
_HOST = re.compile(rb"\r\nhost: *([\w.:-]+)")
_STATUS = {200: b"200 OK", 400: b"400 Bad Request", 500: b"500 Internal Server Error"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What the stub offers. `shards` of each of so many `streams`, `records` of each shard, the `warm` ones included; a
    queue is one shard, and queues are all the same one.

    `page`: the most records of one GetRecords answer. `audit` False: deliveries are counted at `/sink`, `batch` each. `keyed`: order holds within a partition key only.
    `answer`: the target's, JSON. `latency_ms` of the target, `aws_latency_ms` of the services. `error_every` N: the
    target answers 500 to every N-th event. `trickle_ms`: after the warm-up, `trickle` records of each shard every so
    often instead of all at once, and how long a client takes from an answer to the target is noted.
    """

    source: str = "kinesis"
    streams: int = 1
    shards: int = 1
    warm: int = 0
    records: int = 0
    batch: int = 1
    page: int = 10_000
    audit: bool = True
    keyed: bool = False
    answer: str = "{}"
    latency_ms: float = 0
    aws_latency_ms: float = 0
    error_every: int = 0
    trickle_ms: float = 0
    trickle: int = 1


def process_cpu(pid: int) -> float:
    """CPU seconds, user and system, of all threads of a living process.

    It is the clock that clock_getcpuclockid(3) names on Linux: the same sum as /proc/PID/stat, in nanoseconds.
    """
    return time.clock_gettime((~pid << 3) | 2)


class Stub:
    """The state behind every connection. One plan at a time."""

    def __init__(self) -> None:
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
        self._drip_timer: asyncio.TimerHandle | None = None
        self.configure(Plan())

    def configure(self, plan: Plan) -> None:
        """Forget everything and offer this."""
        if self._drip_timer:
            self._drip_timer.cancel()
        self._plan = plan
        self._answer = plan.answer.encode()
        self._shards = plan.streams * plan.shards
        self._pid = 0
        self._calls: Counter[str] = Counter()
        self._unknown_operations: Counter[str] = Counter()
        keys = 0 if plan.source == "sqs" else KEYS if plan.keyed else 1
        self._ledger = Ledger(self._shards, plan.records, keys)
        self._read = bytearray(self._shards)
        self._shards_read = 0
        self._all_read_at: float | None = None
        self._available = plan.warm
        self._sunk = 0
        self._events = 0
        self._errors = 0
        self._deleted = bytearray(plan.records)
        self._deletions = 0
        self._next_message = 0
        self._in_flight: dict[int, float] = {}
        self._waiting: deque[Callable[[], bool]] = deque()
        self._drip_at = 0.0
        self._answered_at: dict[tuple[int, int], float] = {}
        self._added: list[float] = []
        self._start: dict[str, float] | None = None
        self._end: dict[str, float] | None = None
        self._records = Records(plan.source, time.time())
        self._buffer = memoryview(self._records.join(range(plan.records if plan.source != "sqs" else 0)))

    # -- requests -----------------------------------------------------------------------------------------------------

    def handle(self, head: bytes, body: bytes, connection: "Connection") -> None:
        """Answer one request, whose first byte came when `connection.began`; `head` is in lower case."""
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
            if self._plan.aws_latency_ms:
                wait = self._plan.aws_latency_ms / 1_000
                asyncio.get_running_loop().call_later(wait, answer, json.loads(body), connection)
            else:
                answer(json.loads(body), connection)
        else:
            self._unknown_operations[(found[1] if found else path).decode()] += 1
            connection.reply(b'{"__type":"UnknownOperationException","message":"not in the stub"}', status=400)

    def stats(self) -> dict[str, Any]:
        """Everything counted since `configure`."""
        ledger = self._ledger
        answer = {
            "expected": self._shards * self._plan.records,
            "delivered": ledger.distinct if self._plan.audit else self._sunk,
            "duplicates": ledger.duplicates,
            "out_of_order": ledger.out_of_order,
            "unknown_records": ledger.unknown,
            "deleted": self._deletions,
            "events": self._events,
            "errors": self._errors,
            "calls": dict(self._calls),
            "shards_read": self._shards_read,
            "all_read_at": self._all_read_at,
            "unknown_operations": dict(self._unknown_operations),
            "start": self._start,
            "end": self._end,
        }
        if self._added:
            ranked = sorted(self._added)
            answer["added_ms"] = {
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
            if ledger.note(shard, number) and (answered := self._answered_at.pop((shard, number), None)):
                self._added.append(connection.began - answered)
        if plan.latency_ms:
            asyncio.get_running_loop().call_later(plan.latency_ms / 1_000, connection.reply, self._answer)
        else:
            connection.reply(self._answer)
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
            if done >= self._shards * plan.warm and plan.records > plan.warm:
                self._start = self._note(done)
                if plan.trickle_ms:
                    self._drip_at = asyncio.get_running_loop().time()
                    self._drip()
                else:
                    self._release(plan.records)
        elif done >= self._shards * plan.records:
            self._end = self._note(done)

    def _note(self, done: int) -> dict[str, float]:
        return {
            "done": done,
            "events": self._events,
            "reads": self._calls["GetRecords"] + self._calls["ReceiveMessage"],
            "client_cpu": process_cpu(self._pid),
            "stub_cpu": time.process_time(),
            "wall": monotonic(),
        }

    def _drip(self) -> None:
        """At the times of a fixed rate: one that is late does not make the next ones late."""
        self._release(min(self._available + self._plan.trickle, self._plan.records))
        if self._available < self._plan.records:
            self._drip_at += self._plan.trickle_ms / 1_000
            self._drip_timer = asyncio.get_running_loop().call_at(self._drip_at, self._drip)

    def _release(self, available: int) -> None:
        self._available = available
        while self._waiting and self._waiting[0]():
            self._waiting.popleft()

    def _answered(self, shard: int, numbers: Sequence[int]) -> None:
        """An answer with these records was handed to the transport, its last byte too."""
        if self._plan.trickle_ms and self._start:
            now = monotonic()
            self._answered_at.update(((shard, number), now) for number in numbers)

    # -- streams ------------------------------------------------------------------------------------------------------

    def _shard_id(self, number: int) -> str:
        return f"shardId-{number:012d}" if self._plan.source == "kinesis" else f"shardId-{number:020d}-bench"

    def _sequence(self, number: int) -> str:
        return f"4959{number:052d}" if self._plan.source == "kinesis" else f"1{number:020d}"

    def _list_shards(self, request: dict[str, Any], connection: "Connection") -> None:
        """A shard's number says which stream it is of: they all have as many."""
        of = self._plan.shards
        first = stream_number(request.get("StreamARN", "")) * of
        start, end = map(int, request["NextToken"].split("/")) if "NextToken" in request else (first, first + of)
        stop = min(start + request.get("MaxResults", _PAGE), end)
        width = 2**128 // of
        answer: dict[str, Any] = {
            "Shards": [
                {
                    "ShardId": self._shard_id(n),
                    "HashKeyRange": {
                        "StartingHashKey": str(n % of * width),
                        "EndingHashKey": str((n % of + 1) * width - 1),
                    },
                    "SequenceNumberRange": {"StartingSequenceNumber": self._sequence(0)},
                }
                for n in range(start, stop)
            ]
        }
        if stop < end:
            answer["NextToken"] = f"{stop}/{end}"
        connection.reply(json.dumps(answer).encode())

    def _describe_stream_summary(self, request: dict[str, Any], connection: "Connection") -> None:
        summary = {
            "StreamName": NAME,
            "StreamARN": stream_arn("kinesis", stream_number(request.get("StreamARN", ""))),
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
        limit = min(request.get("Limit", self._plan.page), self._plan.page if kinesis else _DYNAMODB_LIMIT)
        stop = max(at, min(at + limit, self._available))
        if not self._read[shard]:
            self._read[shard] = 1
            self._shards_read += 1
            if self._shards_read == self._shards:
                self._all_read_at = monotonic()
        width = self._records.width
        records: bytes | memoryview = self._buffer[at * width : stop * width - 1] if stop > at else b""
        if kinesis:
            lag = b'"MillisBehindLatest":%d,' % (self._available - stop)
        else:
            lag = b""
            records = bytes(records).replace(SHARD.encode(), b"%04x" % shard)
        opening = b'{"NextShardIterator":"iterator/%d/%d",%s"Records":[' % (shard, stop, lag)
        connection.reply(opening, records, b"]}")
        self._answered(shard, range(at, stop))

    # -- queue --------------------------------------------------------------------------------------------------------

    def _get_queue_url(self, _request: dict[str, Any], connection: "Connection") -> None:
        connection.reply(json.dumps({"QueueUrl": f"{connection.origin}/{ACCOUNT}/{NAME}"}).encode())

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
            until = monotonic() + visibility
            self._in_flight.update(dict.fromkeys(taken, until))
            connection.reply(b'{"Messages":[', self._records.join(taken), b"]}")
            self._answered(0, taken)
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
        now = monotonic()
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
        now = monotonic()
        for entry in entries:
            number = int(entry["ReceiptHandle"][6:18])
            if number in self._in_flight:
                self._in_flight[number] = now + entry["VisibilityTimeout"]
        connection.reply(_batch_answer(entries))


def _batch_answer(entries: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps({"Successful": [{"Id": entry["Id"]} for entry in entries], "Failed": []}).encode()


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive and Content-Length, which is what every client here sends. One request at a time."""

    def __init__(self, stub: Stub, scheme: str = "http") -> None:
        self._stub = stub
        self._scheme = scheme
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._head = b""
        self._body_at = 0
        self._needed = 0
        self.is_closed = False
        self.began = 0.0
        """When the first byte of the request came that is answered now."""

    @property
    def origin(self) -> str:
        """Of the URL that the client uses for this server."""
        host = _HOST.search(self._head)
        return f"{self._scheme}://{host[1].decode() if host else ''}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True

    def data_received(self, data: bytes) -> None:
        if not self._received:
            self.began = monotonic()
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


async def serve(port: int, context: ssl.SSLContext | None) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT; the ports go to standard output as JSON. With a context also TLS, on
    another port, always a free one.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stub = Stub()
    servers = [await loop.create_server(partial(Connection, stub), "127.0.0.1", port, backlog=4_096)]
    if context:
        made = partial(Connection, stub, "https")
        servers.append(await loop.create_server(made, "127.0.0.1", 0, backlog=4_096, ssl=context))
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    print(json.dumps(dict(zip(("port", "tls_port"), ports, strict=False))), flush=True)
    await stop.wait()
    for server in servers:
        server.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stub", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--cert", help="PEM file; serves TLS too")
    parser.add_argument("--key", help="PEM file of its key")
    options = parser.parse_args(arguments)
    context = None
    if options.cert:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(options.cert, options.key)
    asyncio.run(serve(options.port, context))
    return 0


if __name__ == "__main__":
    sys.exit(main())
