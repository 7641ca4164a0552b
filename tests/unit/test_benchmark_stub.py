"""The benchmark's stub finds out a client that loses, repeats or reorders records."""

import asyncio
import json
import os
from dataclasses import asdict
from typing import Any

import pytest

from tests.benchmarks.stub import Connection, Ledger, Plan, Stub, event_ids


class FakeTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data


class Client:
    """One keep-alive connection to a stub, without a socket."""

    def __init__(self, stub: Stub) -> None:
        self.transport = FakeTransport()
        self.connection = Connection(stub)
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
    ledger = Ledger(shards=2, records=3, ordered=True)
    assert [ledger.note(0, 0), ledger.note(0, 1), ledger.note(0, 0), ledger.note(1, 0)] == [True, True, False, True]
    assert (ledger.distinct, ledger.duplicates, ledger.out_of_order, ledger.unknown) == (3, 1, 0, 0)


def test_ledger_notices_a_first_arrival_after_a_later_record() -> None:
    """Order counts within a shard, and not in a queue."""
    for ordered, expected in ((True, 1), (False, 0)):
        ledger = Ledger(shards=2, records=3, ordered=ordered)
        for shard, number in ((0, 0), (0, 2), (1, 0), (0, 1), (1, 1)):
            ledger.note(shard, number)
        assert (ledger.distinct, ledger.out_of_order) == (5, expected)


def test_ledger_knows_what_was_offered() -> None:
    """A shard or record that never was is unknown."""
    ledger = Ledger(shards=1, records=2, ordered=True)
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
    """MillisBehindLatest is 0 only when everything that can be read was; sequence numbers have 56 digits."""
    _, client = offering(source="kinesis", shards=1, warm=5, records=5)
    iterator = client.call("GetShardIterator", ShardId="shardId-000000000000", ShardIteratorType="TRIM_HORIZON")
    first = client.call("GetRecords", ShardIterator=iterator["ShardIterator"], Limit=3)
    second = client.call("GetRecords", ShardIterator=first["NextShardIterator"], Limit=3)
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
