"""The benchmark's stub finds out a client that loses, repeats or reorders records."""

import asyncio
import json
import os
from collections import Counter
from dataclasses import asdict
from typing import Any
from zlib import crc32

import pytest

from poller.core.filters import Filter
from poller.core.model import Record, SourceKind, Window
from poller.core.replies import payload, window_tail
from tests.benchmarks.filters import stream_filters
from tests.benchmarks.records import KEYS, LANES, Ledger, event_ids, stream_arn
from tests.benchmarks.rows import CASES, CLIENTS, GOALS, ROWS, needed
from tests.benchmarks.stub import Connection, Plan, Stub
from tests.benchmarks.table import lines, markdown, plain


class FakeTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.wrote = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        self.wrote.set()


class Client:
    """One keep-alive connection to a stub, without a socket."""

    def __init__(self, stub: Stub, scheme: str = "http") -> None:
        self.transport = FakeTransport()
        self.connection = Connection(stub, scheme)
        self.connection.connection_made(self.transport)

    def call(self, operation: str, **request: Any) -> dict[str, Any]:
        """An AWS call that is answered at once."""
        self.connection.data_received(request_bytes("/", json.dumps(request).encode(), operation))
        return self.answers()[-1]

    def post(self, path: str, document: Any) -> dict[str, Any]:
        self.connection.data_received(request_bytes(path, json.dumps(document).encode()))
        return self.answers()[-1]

    def answers(self) -> list[dict[str, Any]]:
        """Every body written since the last look."""
        rest = bytes(self.transport.written)
        self.transport.written.clear()
        found = []
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            found.append(json.loads(rest[:length]))
            rest = rest[length:]
        return found


def request_bytes(path: str, body: bytes, operation: str = "") -> bytes:
    target = f"X-Amz-Target: Service_2026.{operation}\r\n" if operation else ""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{target}Content-Length: {len(body)}\r\n\r\n".encode() + body


def offering(**plan: Any) -> tuple[Stub, Client]:
    stub = Stub()
    stub.configure(Plan(**plan))
    return stub, Client(stub)


def kinesis_event(client: Client, shard: int, at: int, limit: int) -> dict[str, Any]:
    records = client.call("GetRecords", ShardIterator=f"iterator/{shard}/{at}", Limit=limit)["Records"]
    return {
        "Records": [
            {
                "kinesis": {"data": one["Data"], "sequenceNumber": one["SequenceNumber"]},
                "eventID": f"shardId-{shard:012d}:{one['SequenceNumber']}",
            }
            for one in records
        ]
    }


def test_ledger_counts_each_record_once() -> None:
    """A second arrival is a duplicate, and not out of order."""
    ledger = Ledger(shards=2, records=3, keys=1)
    assert [ledger.note(0, 0), ledger.note(0, 1), ledger.note(0, 0), ledger.note(1, 0)] == [True, True, False, True]
    assert (ledger.distinct, ledger.duplicates, ledger.out_of_order, ledger.unknown) == (3, 1, 0, 0)


def test_ledger_notices_a_first_arrival_after_a_later_record() -> None:
    """Order counts within a shard or a key of it, and not in a queue."""
    for keys, expected in ((1, 1), (2, 0), (0, 0)):
        ledger = Ledger(shards=2, records=3, keys=keys)
        for shard, number in ((0, 0), (0, 2), (1, 0), (0, 1), (1, 1)):
            ledger.note(shard, number)
        assert (ledger.distinct, ledger.out_of_order) == (5, expected)
    ledger = Ledger(shards=1, records=4, keys=2)
    for number in (1, 2, 3, 0):
        ledger.note(0, number)
    assert ledger.out_of_order == 1


def test_ledger_knows_what_was_offered() -> None:
    """A shard or record that never was is unknown."""
    ledger = Ledger(shards=1, records=2, keys=1)
    ledger.note(0, 2)
    ledger.note(1, 0)
    assert (ledger.distinct, ledger.unknown) == (0, 2)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("reverse", [False, True])
def test_ids_are_found_in_any_layout(separators: tuple[str, str], reverse: bool) -> None:
    """White space and field order of the event do not matter, for all three sources."""

    def ids(source: str, records: list[dict[str, Any]]) -> list[tuple[int, int]]:
        ordered = [dict(reversed(one.items())) if reverse else one for one in records]
        return event_ids(source, json.dumps({"Records": ordered}, separators=separators).encode())

    _, client = offering(source="kinesis", shards=20, warm=9, records=9)
    assert ids("kinesis", kinesis_event(client, 17, 2, 5)["Records"]) == [(17, n) for n in range(2, 7)]
    _, client = offering(source="dynamodb", shards=20, warm=9, records=9)
    records = client.call("GetRecords", ShardIterator="iterator/17/2", Limit=5)["Records"]
    assert ids("dynamodb", records) == [(17, n) for n in range(2, 7)]
    _, client = offering(source="sqs", warm=30, records=30)
    client.call("ReceiveMessage", MaxNumberOfMessages=10)
    messages = client.call("ReceiveMessage", MaxNumberOfMessages=10)["Messages"]
    assert ids("sqs", [{"messageId": one["MessageId"], "body": one["Body"]} for one in messages]) == [
        (0, n) for n in range(10, 20)
    ]


def test_requests_may_come_in_any_pieces() -> None:
    """Byte by byte and two in one segment: each request gets its answer."""
    _, client = offering(source="kinesis", shards=2, warm=1, records=1)
    request = request_bytes("/", b'{"StreamName":"bench"}', "ListShards")
    for byte in request:
        client.connection.data_received(bytes([byte]))
    assert [len(one["Shards"]) for one in client.answers()] == [2]
    client.connection.data_received(request + request)
    assert [len(one["Shards"]) for one in client.answers()] == [2, 2]


def test_get_records_honours_limit_and_tells_the_tip() -> None:
    """MillisBehindLatest is 0 only when everything that can be read was; sequence numbers have 56 digits; no answer has
    more than a page.
    """
    _, client = offering(source="kinesis", shards=1, warm=5, records=5, page=3)
    iterator = client.call("GetShardIterator", ShardId="shardId-000000000000", ShardIteratorType="TRIM_HORIZON")
    assert len(client.call("GetRecords", ShardIterator=iterator["ShardIterator"], Limit=2)["Records"]) == 2
    first = client.call("GetRecords", ShardIterator=iterator["ShardIterator"], Limit=4)
    second = client.call("GetRecords", ShardIterator=first["NextShardIterator"])
    third = client.call("GetRecords", ShardIterator=second["NextShardIterator"], Limit=3)
    assert [len(one["Records"]) for one in (first, second, third)] == [3, 2, 0]
    assert [one["MillisBehindLatest"] > 0 for one in (first, second, third)] == [True, False, False]
    sequences = [one["SequenceNumber"] for one in first["Records"] + second["Records"]]
    assert {len(one) for one in sequences} == {56}
    assert sequences == sorted(set(sequences))
    after = client.call(
        "GetShardIterator",
        ShardId="shardId-000000000000",
        ShardIteratorType="AFTER_SEQUENCE_NUMBER",
        StartingSequenceNumber=sequences[2],
    )
    assert after["ShardIterator"] == first["NextShardIterator"]


def test_the_rest_is_released_when_the_warm_up_is_done() -> None:
    """The client's CPU time is noted when the target has the warm records, and when it has all of them."""
    stub, client = offering(source="kinesis", shards=1, warm=2, records=5)
    client.post("/target", kinesis_event(client, 0, 0, 10))
    assert stub.stats()["start"] is None  # nobody to note yet
    client.post("/_watch", {"pid": os.getpid()})
    assert stub.stats()["start"]["done"] == 2
    client.post("/target", kinesis_event(client, 0, 2, 2))
    assert stub.stats()["end"] is None
    client.post("/target", kinesis_event(client, 0, 4, 10))
    stats = stub.stats()
    assert (stats["end"]["done"], stats["delivered"], stats["expected"]) == (5, 5, 5)
    assert stats["end"]["client_cpu"] >= stats["start"]["client_cpu"] > 0


def test_a_configured_error_is_not_a_delivery() -> None:
    """Every N-th event is answered 500 and left out of the ledger."""
    stub, client = offering(source="kinesis", shards=1, warm=2, records=2, error_every=2)
    client.post("/target", kinesis_event(client, 0, 0, 1))
    client.post("/target", kinesis_event(client, 0, 1, 1))
    assert stub.stats()["delivered"] == 1
    client.post("/target", kinesis_event(client, 0, 1, 1))
    assert (stub.stats()["delivered"], stub.stats()["errors"]) == (2, 1)


async def test_a_waiting_receive_is_answered_on_release() -> None:
    """A long poll ends when messages become available, after the warm ones are delivered and deleted."""
    stub, client = offering(source="sqs", warm=1, records=2)
    client.post("/_watch", {"pid": os.getpid()})
    (first,) = client.call("ReceiveMessage", MaxNumberOfMessages=10)["Messages"]
    waiting = Client(stub)
    waiting.connection.data_received(
        request_bytes("/", b'{"MaxNumberOfMessages":10,"WaitTimeSeconds":20}', "ReceiveMessage")
    )
    client.post("/target", {"Records": [{"messageId": first["MessageId"]}]})
    assert waiting.answers() == []
    client.call("DeleteMessageBatch", Entries=[{"Id": "0", "ReceiptHandle": first["ReceiptHandle"]}])
    (answer,) = waiting.answers()
    assert [one["MessageId"][-1] for one in answer["Messages"]] == ["1"]


def test_a_message_returns_when_its_visibility_ends_and_not_once_deleted() -> None:
    """Visibility 0 returns a message at once; a deleted one never comes back."""
    _, client = offering(source="sqs", warm=2, records=2)
    one, other = client.call("ReceiveMessage", MaxNumberOfMessages=10)["Messages"]
    assert client.call("ReceiveMessage", MaxNumberOfMessages=10) == {}
    entries = [{"Id": "a", "ReceiptHandle": kept["ReceiptHandle"], "VisibilityTimeout": 0} for kept in (one, other)]
    client.call("ChangeMessageVisibilityBatch", Entries=entries)
    answer = client.call("DeleteMessageBatch", Entries=[{"Id": "b", "ReceiptHandle": one["ReceiptHandle"]}])
    assert answer == {"Successful": [{"Id": "b"}], "Failed": []}
    (again,) = client.call("ReceiveMessage", MaxNumberOfMessages=10)["Messages"]
    assert again == other


def test_what_the_stub_does_not_know_is_counted() -> None:
    """An unknown operation is an error and shows in the figures."""
    stub, client = offering()
    assert client.call("PutRecord")["__type"] == "UnknownOperationException"
    assert stub.stats()["unknown_operations"] == {"putrecord": 1}


def test_configure_forgets() -> None:
    """A new plan starts from nothing."""
    stub, client = offering(source="kinesis", shards=1, warm=2, records=2)
    client.post("/target", kinesis_event(client, 0, 0, 2))
    client.post("/_configure", asdict(Plan(source="sqs", records=4)))
    stats = stub.stats()
    assert (stats["expected"], stats["delivered"], stats["calls"]) == (4, 0, {})


def test_the_shard_that_a_window_names_is_no_record() -> None:
    """The event of a tumbling window has one id for each record, and its last invocation none."""
    _, client = offering(source="kinesis", shards=3, warm=2, records=2)
    records = [Record("", "", 0.0, json.dumps(one).encode()) for one in kinesis_event(client, 2, 0, 2)["Records"]]
    tail = window_tail(
        Window(0.0, 60.0, b"{}", is_final=False, is_early=False), "shardId-000000000002", stream_arn("kinesis", 0)
    )
    assert event_ids("kinesis", payload(records, tail)) == [(2, 0), (2, 1)]
    assert event_ids("kinesis", payload([], tail)) == []


def test_streams_have_shards_of_their_own() -> None:
    """Each stream lists its shards, page by page, and no shard is of two streams."""
    stub, client = offering(source="kinesis", streams=3, shards=2, warm=1, records=1)
    for stream in range(3):
        arn = stream_arn("kinesis", stream)
        listed = client.call("ListShards", StreamARN=arn, MaxResults=1)
        listed_next = client.call("ListShards", NextToken=listed["NextToken"], MaxResults=1)
        assert "NextToken" not in listed_next
        ids = [one["ShardId"] for one in listed["Shards"] + listed_next["Shards"]]
        assert ids == [f"shardId-{2 * stream + n:012d}" for n in range(2)]
        assert client.call("DescribeStreamSummary", StreamARN=arn)["StreamDescriptionSummary"]["StreamARN"] == arn
    assert stub.stats()["expected"] == 6


def test_keys_repeat_and_order_may_be_asked_for_within_them() -> None:
    """Record n has the same key as n plus the number of keys; a keyed plan lets keys overtake each other."""
    offered = {"source": "kinesis", "shards": 1, "warm": KEYS + 2, "records": KEYS + 2}
    for keyed, expected in ((False, 1), (True, 0)):
        stub, client = offering(**offered, keyed=keyed)
        client.post("/target", kinesis_event(client, 0, 2, 1))
        client.post("/target", kinesis_event(client, 0, 1, 1))
        assert stub.stats()["out_of_order"] == expected
    keys = [one["PartitionKey"] for one in client.call("GetRecords", ShardIterator="iterator/0/0")["Records"]]
    assert len(set(keys)) == KEYS
    assert keys[:2] == keys[KEYS:]
    lanes = Counter(crc32(key.encode()) % LANES for key in keys[:KEYS])
    assert set(lanes.values()) == {KEYS // LANES}  # so that each lane of ten fills its batches


def test_the_target_answers_as_planned() -> None:
    """What a feature of the mapping needs, such as a window's state."""
    _, client = offering(source="kinesis", shards=1, answer='{"state": {"n": 1}}')
    assert client.post("/target", {"Records": []}) == {"state": {"n": 1}}


async def test_the_services_take_as_long_as_planned() -> None:
    """An AWS call is answered after the latency, one to the target at once."""
    _, client = offering(source="kinesis", shards=1, aws_latency_ms=5)
    client.connection.data_received(request_bytes("/", b"{}", "ListShards"))
    assert client.answers() == []
    assert client.post("/target", {"Records": []}) == {}
    client.transport.wrote.clear()
    await client.transport.wrote.wait()
    assert len(client.answers()[0]["Shards"]) == 1


def test_the_moment_when_every_shard_was_read_is_noted() -> None:
    """Once each, whatever was read twice before."""
    stub, client = offering(source="kinesis", shards=2)
    for _ in range(2):
        client.call("GetRecords", ShardIterator="iterator/0/0")
    assert (stub.stats()["shards_read"], stub.stats()["all_read_at"]) == (1, None)
    client.call("GetRecords", ShardIterator="iterator/1/0")
    assert (stub.stats()["shards_read"], stub.stats()["all_read_at"] > 0) == (2, True)


@pytest.mark.parametrize("source", ["kinesis", "sqs"])
async def test_added_latency_is_from_the_answer_to_the_first_byte_of_the_request(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the records after the warm-up; neither the rest of the request nor what came before the answer counts."""
    now = 1.0
    monkeypatch.setattr("tests.benchmarks.stub.monotonic", lambda: now)
    stub, client = offering(source=source, shards=1, warm=1, records=3, trickle_ms=1_000, trickle=2)
    client.post("/_watch", {"pid": os.getpid()})

    def read(at: int) -> tuple[bytes, list[dict[str, str]]]:
        if source == "kinesis":
            event, entries = kinesis_event(client, 0, at, 10), []
        else:
            messages = client.call("ReceiveMessage", MaxNumberOfMessages=10)["Messages"]
            event = {"Records": [{"messageId": one["MessageId"], "body": one["Body"]} for one in messages]}
            entries = [{"Id": "a", "ReceiptHandle": one["ReceiptHandle"]} for one in messages]
        return request_bytes("/target", json.dumps(event).encode()), entries

    def settle(entries: list[dict[str, str]]) -> None:
        if entries:
            client.call("DeleteMessageBatch", Entries=entries)

    request, entries = read(0)
    now = 5.0
    client.connection.data_received(request)
    settle(entries)
    assert "added_ms" not in stub.stats()  # the warm one
    request, entries = read(1)
    now = 5.25
    client.connection.data_received(request[:1])
    now = 9.0
    client.connection.data_received(request[1:])
    settle(entries)
    assert stub.stats()["added_ms"] == {"p50": 250.0, "p99": 250.0, "max": 250.0}
    assert stub.stats()["end"]["done"] == 3


def test_a_queue_has_its_url_where_the_client_found_it() -> None:
    """With the scheme, name and port that the client used, so that a client over TLS stays there."""
    stub, _ = offering(source="sqs")
    for scheme in ("http", "https"):
        assert Client(stub, scheme).call("GetQueueUrl")["QueueUrl"].startswith(f"{scheme}://x/")


def test_the_filters_let_every_record_through_by_the_last() -> None:
    """Else the run with filters would skip work, or end by losing records."""
    _, client = offering(source="kinesis", shards=1, warm=1, records=1)
    wire = json.dumps(kinesis_event(client, 0, 0, 1)["Records"][0]).encode()
    patterns = [one["Pattern"] for one in stream_filters()]
    assert len(patterns) == 5
    assert Filter(patterns, SourceKind.KINESIS).matches(Record("1", "", 0.0, wire))
    assert not Filter(patterns[:-1], SourceKind.KINESIS).matches(Record("1", "", 0.0, wire))


def measured(value: float) -> dict[str, Any]:
    """As if every figure had this value."""
    return {"median": dict.fromkeys((goal.figure for goal in GOALS), value), "rounds": []}


def test_every_goal_has_a_line_and_is_judged_as_it_says() -> None:
    """At least: how many times better than the peer. At most: the share of the peer, the figure, or dearest to cheapest."""
    daemon = {name: {client: measured(1.0) for client in case.clients} for name, case in CASES.items()}
    table = {line.measure: line for line in lines(daemon, ROWS)}
    assert len(table) == len(GOALS)
    for goal in GOALS:
        line = table[goal.measure]
        if goal.at_least is None and goal.at_most is None:
            assert line.met is None
        elif goal.at_least is not None:
            assert (line.ratio, line.met) == (1.0, False)
        elif goal.peer or goal.spread:
            assert (line.ratio, line.met) == (1.0, goal.at_most >= 1)
        else:
            assert (line.ratio, line.met) == (None, goal.at_most >= 1)
    (better,) = lines({"sqs 10": {"daemon": measured(10.0), "plain": measured(40.0)}}, [1])
    assert (better.daemon, better.peer, better.ratio, better.met) == ("10.0", "plain 40.0", 4.0, True)
    (dearer,) = lines({"sqs 10": {"daemon": measured(18.0), "bare": measured(10.0)}}, [2])
    assert (dearer.ratio, dearer.met) == (1.8, False)
    shards = {"1": measured(8.0), "10": measured(6.0), "100": measured(7.0), "1000": measured(12.0)}
    (spread,) = lines({"growth shards": shards}, [11])
    assert (spread.daemon, spread.ratio, spread.met) == ("8.00 6.00 7.00 12.00", 2.0, False)


def test_what_was_not_measured_has_no_line() -> None:
    """A row without its peer, and another row than asked for, are left out; a case that failed says so."""
    alone = {"sqs 10": {"daemon": measured(1.0)}, "idle queues": {"daemon": measured(0.004)}}
    (line,) = lines(alone, ROWS)
    assert (line.row, line.daemon, line.met) == (6, "0.40%", True)
    assert lines(alone, [1]) == []
    (failed,) = lines({**alone, "start-up": {}}, [11])
    assert (failed.daemon, failed.met) == ("failed", None)
    assert [len(one.splitlines()) for one in (plain([line]), markdown([line]))] == [2, 3]


def test_a_row_measures_what_its_goals_need() -> None:
    """No other case, and no other client; variants of the daemon are not a matter of --clients."""
    assert needed([1], CLIENTS) == {"sqs 10": ("daemon", "plain", "boto3")}
    assert needed([2], ["daemon", "plain"]) == {"sqs 10": ("daemon",)}
    assert needed([7], ["daemon"]) == {"features": CASES["features"].clients}
    assert set(needed(ROWS, CLIENTS)) == set(CASES)
