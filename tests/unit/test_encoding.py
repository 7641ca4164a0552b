"""Each source's records are, key for key, what AWS's own event source mappings deliver."""

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.core.model import NO_TRACE, Record, SourceKind, SourceSpec, Trace
from poller.sources import dynamodb, kinesis, sqs

STREAM = SourceSpec(
    SourceKind.KINESIS, "arn:aws:kinesis:us-east-2:111111111111:stream/lambda-stream", "us-east-2", "111111111111", "s"
)
TABLE = SourceSpec(
    SourceKind.DYNAMODB,
    "arn:aws:dynamodb:us-east-1:111111111111:table/t/stream/2025-11-25T15:47:11.111",
    "us-east-1",
    "111111111111",
    "t",
)
QUEUE = SourceSpec(
    SourceKind.SQS, "arn:aws:sqs:us-east-2:111111111111:my-queue", "us-east-2", "111111111111", "my-queue"
)
FIFO = SourceSpec(
    SourceKind.SQS, "arn:aws:sqs:us-east-2:111111111111:q.fifo", "us-east-2", "111111111111", "q.fifo", fifo=True
)
SEQUENCE = "49590338271490256608559692538361571095921575989136588898"
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_kinesis = msgspec.json.Decoder(kinesis.KinesisAnswer)
_dynamodb = msgspec.json.Decoder(dynamodb.DynamoRecord)
_sqs = msgspec.json.Decoder(sqs.Message)


def kinesis_record(**changes: Any) -> Record:
    members = {
        "SequenceNumber": SEQUENCE,
        "ApproximateArrivalTimestamp": 1545084650.987,
        "Data": "c3RyZWFtLWRhdGEtMQ==",
        "PartitionKey": "test",
        "EncryptionType": "KMS",
    }
    return encode_kinesis(json.dumps({"Records": [members | changes]}))


def encode_kinesis(answer: str) -> Record:
    [record] = _kinesis.decode(answer).Records
    return kinesis.Encoder(STREAM, "shardId-000000000006", "arn:aws:iam::111111111111:role/lambda-role").encode(record)


def kinesis_event(key: str, data: str, arrival: float) -> dict[str, Any]:
    return {
        "kinesis": {
            "kinesisSchemaVersion": "1.0",
            "partitionKey": key,
            "sequenceNumber": SEQUENCE,
            "data": data,
            "approximateArrivalTimestamp": arrival,
        },
        "eventSource": "aws:kinesis",
        "eventVersion": "1.0",
        "eventID": f"shardId-000000000006:{SEQUENCE}",
        "eventName": "aws:kinesis:record",
        "invokeIdentityArn": "arn:aws:iam::111111111111:role/lambda-role",
        "awsRegion": "us-east-2",
        "eventSourceARN": STREAM.arn,
    }


def in_order(wire: bytes) -> str:
    """JSON with its key order, so that order is compared too."""
    return json.dumps(json.loads(wire))


def test_a_kinesis_record_is_the_recorded_one() -> None:
    """AWS's recorded event, its key order and types; encryptionType is not passed on."""
    record = kinesis_record()
    assert in_order(record.wire) == json.dumps(kinesis_event("test", "c3RyZWFtLWRhdGEtMQ==", 1545084650.987))
    assert record == Record(SEQUENCE, "test", 1545084650.987, record.wire)


def test_kinesis_arrival_has_a_fraction_and_no_exponent() -> None:
    """AWS may send 1.545084650987E9; the event has a plain number in seconds with a fraction."""
    answer = '{"Records":[{"SequenceNumber":"%s","ApproximateArrivalTimestamp":%s,"Data":"","PartitionKey":"k"}]}'
    for sent, shown in (("1.545084650987E9", b"1545084650.987"), ("1545084650", b"1545084650.0")):
        record = encode_kinesis(answer % (SEQUENCE, sent))
        assert b'"approximateArrivalTimestamp":' + shown + b"}" in record.wire
        assert record.arrival == float(shown)


@given(key=TEXT, data=st.binary(), is_ascii=st.booleans(), arrival=st.integers(10**12, 10**13))
def test_any_kinesis_record_survives(key: str, data: bytes, is_ascii: bool, arrival: int) -> None:
    """Whatever key and data, escaped or not in the answer: the event says the same."""
    blob = base64.b64encode(data).decode()
    members = {
        "SequenceNumber": SEQUENCE,
        "PartitionKey": key,
        "Data": blob,
        "ApproximateArrivalTimestamp": arrival / 1000,
    }
    record = encode_kinesis(json.dumps({"Records": [members]}, ensure_ascii=is_ascii))
    assert in_order(record.wire) == json.dumps(kinesis_event(key, blob, arrival / 1000))
    assert record.key == key


DYNAMODB = {
    "eventID": "c4ca4238a0b923820dcc509a6f75849b",
    "eventName": "INSERT",
    "eventVersion": "1.1",
    "eventSource": "aws:dynamodb",
    "awsRegion": "us-east-1",
    "dynamodb": {
        "ApproximateCreationDateTime": 1731681234.0,
        "Keys": {"id": {"S": "id_value_1"}},
        "NewImage": {"id": {"S": "id_value_1"}, "n": {"N": "42"}, "b": {"B": "aGVsbG8="}},
        "SequenceNumber": "12345600000000001234567890",
        "SizeBytes": 54,
        "StreamViewType": "NEW_AND_OLD_IMAGES",
    },
}


def dynamodb_record(document: dict[str, Any], **dumps: Any) -> Record:
    return dynamodb.Encoder(TABLE).encode(_dynamodb.decode(json.dumps(document, **dumps)))


def test_a_dynamodb_record_is_the_recorded_one() -> None:
    """AWS's recorded event: the record as it came, and the stream's ARN."""
    record = dynamodb_record(DYNAMODB)
    assert in_order(record.wire) == json.dumps({**DYNAMODB, "eventSourceARN": TABLE.arn})
    assert record == Record("12345600000000001234567890", '{"id":{"S":"id_value_1"}}', 1731681234.0, record.wire)


def test_a_ttl_deletion_names_its_service_in_lower_case() -> None:
    """`Type` and `PrincipalId` of the API are `type` and `principalId` in the event."""
    sent = {**DYNAMODB, "userIdentity": {"PrincipalId": "dynamodb.amazonaws.com", "Type": "Service"}}
    event = json.loads(dynamodb_record(sent).wire)
    assert event["userIdentity"] == {"type": "Service", "principalId": "dynamodb.amazonaws.com"}
    assert event["dynamodb"] == DYNAMODB["dynamodb"]


def test_a_change_without_a_user_has_no_identity() -> None:
    """A null identity is as good as none."""
    assert b"userIdentity" not in dynamodb_record({**DYNAMODB, "userIdentity": None}).wire


@given(
    first=TEXT,
    second=TEXT,
    image=st.dictionaries(TEXT, st.recursive(st.fixed_dictionaries({"S": TEXT}), lambda inner: st.fixed_dictionaries({"M": st.dictionaries(TEXT, inner, max_size=3)}), max_leaves=5), max_size=4),
    is_ascii=st.booleans(),
)  # fmt: skip
def test_any_dynamodb_record_survives(first: str, second: str, image: dict[str, Any], is_ascii: bool) -> None:
    """Images are passed on as they came; the order of key attributes and escapes in the answer do not matter."""
    keys = {"pk": {"S": first}, "sk": {"S": second}}
    change = {**DYNAMODB["dynamodb"], "NewImage": image}
    one = dynamodb_record({**DYNAMODB, "dynamodb": {**change, "Keys": keys}}, ensure_ascii=is_ascii)
    backwards = dict(reversed(keys.items()))
    other = dynamodb_record({**DYNAMODB, "dynamodb": {**change, "Keys": backwards}}, ensure_ascii=not is_ascii)
    assert json.loads(one.wire)["dynamodb"] == {**change, "Keys": keys}
    assert one.key == other.key
    assert json.loads(one.key) == keys


def test_different_items_have_different_keys() -> None:
    """Type and both attributes count, and no value can imitate another's key."""
    keys = [
        {"pk": {"S": "1"}, "sk": {"S": "2"}},
        {"pk": {"N": "1"}, "sk": {"S": "2"}},
        {"pk": {"S": "2"}, "sk": {"S": "1"}},
        {"pk": {"S": '1"},"sk":{"S":"2'}},
        {"pk": {"S": "1"}},
    ]
    found = {dynamodb_record({**DYNAMODB, "dynamodb": {**DYNAMODB["dynamodb"], "Keys": key}}).key for key in keys}
    assert len(found) == len(keys)


MESSAGE = {
    "MessageId": "059f36b4-87a3-44ab-83d2-661975830a7d",
    "ReceiptHandle": "AQEBwJnKyrHigUMZj6rYigCgxlaS3SLy0a+/=",
    "MD5OfBody": "e4e68fb7bd0e697a0ae8f1bb342846b3",
    "Body": '{"k": 1}',
    "Attributes": {
        "ApproximateReceiveCount": "1",
        "SentTimestamp": "1545082649183",
        "SenderId": "AIDAIENQZJOLO23YVJ4VO",
        "ApproximateFirstReceiveTimestamp": "1545082649185",
    },
}
EVENT = {
    "messageId": MESSAGE["MessageId"],
    "receiptHandle": MESSAGE["ReceiptHandle"],
    "body": MESSAGE["Body"],
    "attributes": MESSAGE["Attributes"],
    "messageAttributes": {},
    "md5OfBody": MESSAGE["MD5OfBody"],
    "eventSource": "aws:sqs",
    "eventSourceARN": QUEUE.arn,
    "awsRegion": "us-east-2",
}


def message(spec: SourceSpec = QUEUE, *, windowed: bool = False, ensure_ascii: bool = True, **changes: Any) -> Record:
    raw = _sqs.decode(json.dumps(MESSAGE | changes, ensure_ascii=ensure_ascii))
    return sqs.Encoder(spec, windowed=windowed).encode(raw, 5.0, 30.0)


def test_a_message_without_attributes_is_the_recorded_one() -> None:
    """Lower camel case, `messageAttributes` empty; their digest is absent without a window."""
    record = message()
    assert in_order(record.wire) == json.dumps(EVENT)
    assert record == Record(
        EVENT["messageId"], "", 1545082649.183, record.wire, handle=EVENT["receiptHandle"], expires=30.0
    )


def test_with_a_window_the_digest_of_no_attributes_is_null() -> None:
    """As recorded on mappings with a batching window."""
    event = json.loads(message(windowed=True).wire)
    assert list(event)[4:7] == ["messageAttributes", "md5OfMessageAttributes", "md5OfBody"]
    assert event["md5OfMessageAttributes"] is None


def test_message_attributes_are_the_recorded_ones() -> None:
    """Empty lists always, binary values as base64 text, the digest before the body's; with and without a window."""
    attributes = {
        "WeeksOn": {"StringValue": "6", "DataType": "Number"},
        "Blob": {"DataType": "Binary", "BinaryValue": "AAEC"},
        "Custom": {"DataType": "String.x", "StringValue": "a", "StringListValues": [], "BinaryListValues": []},
    }
    lists: dict[str, Any] = {"stringListValues": [], "binaryListValues": []}
    expected: dict[str, Any] = {}
    for name, value in EVENT.items():
        expected[name] = value
        if name == "messageAttributes":
            expected[name] = {
                "WeeksOn": {"stringValue": "6", **lists, "dataType": "Number"},
                "Blob": {"binaryValue": "AAEC", **lists, "dataType": "Binary"},
                "Custom": {"stringValue": "a", **lists, "dataType": "String.x"},
            }
            expected["md5OfMessageAttributes"] = "d25a6aea97eb8f585bfa92d314504a92"
    for windowed in (False, True):
        record = message(
            windowed=windowed, MessageAttributes=attributes, MD5OfMessageAttributes="d25a6aea97eb8f585bfa92d314504a92"
        )
        assert in_order(record.wire) == json.dumps(expected)


def test_a_fifo_message_has_its_group_as_key() -> None:
    """Group, trace header and sequence number are passed on; SqsManagedSseEnabled is not."""
    more = {"MessageGroupId": "g", "SequenceNumber": "18849496460467696128", "AWSTraceHeader": "Root=1-2-3"}
    attributes = {**MESSAGE["Attributes"], **more, "SqsManagedSseEnabled": "true"}
    record = message(FIFO, Attributes=attributes)
    assert json.loads(record.wire)["attributes"] == {**MESSAGE["Attributes"], **more}
    assert (record.key, record.trace) == ("g", Trace("Root=1-2-3"))


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("parent", "state", "expected"),
    [
        ({"StringValue": PARENT}, {"StringValue": "a=1, b@c=x y"}, Trace("Root=1", PARENT, "a=1, b@c=x y")),
        ({"StringValue": PARENT}, None, Trace("Root=1", PARENT)),
        ({"StringValue": PARENT}, {"StringValue": "a=1\r\nX-Evil: 1"}, Trace("Root=1", PARENT)),
        (
            {"StringValue": PARENT},
            {"StringValue": ",".join(f"{key}={250 * 'x'}" for key in "abc")},
            Trace("Root=1", PARENT),
        ),
        ({"StringValue": PARENT}, {"StringValue": ",".join(f"a{n}=1" for n in range(33))}, Trace("Root=1", PARENT)),
        ({"StringValue": PARENT}, {"BinaryValue": "YT0x"}, Trace("Root=1", PARENT)),
        ({"StringValue": PARENT + "\n"}, {"StringValue": "a=1"}, Trace("Root=1")),
        ({"StringValue": PARENT.replace("00-", "01-")}, None, Trace("Root=1")),
        ({"StringValue": PARENT.replace("00f067aa0ba902b7", "0" * 16)}, None, Trace("Root=1")),
        ({"StringValue": PARENT.upper()}, None, Trace("Root=1")),
        ({"BinaryValue": "YT0x"}, None, Trace("Root=1")),
        (None, {"StringValue": "a=1"}, Trace("Root=1")),
    ],
)
def test_a_trace_context_is_taken_from_message_attributes(parent, state, expected) -> None:
    """traceparent and tracestate as W3C writes them; anybody may send a message, so anything else is not a trace."""
    given = {"traceparent": parent, "tracestate": state}
    attributes = {name: {"DataType": "String", **value} for name, value in given.items() if value is not None}
    record = message(Attributes={**MESSAGE["Attributes"], "AWSTraceHeader": "Root=1"}, MessageAttributes=attributes)
    assert record.trace == expected


def test_a_message_without_a_trace_costs_no_object() -> None:
    """All of them share one value."""
    assert message().trace is NO_TRACE


def test_a_group_of_a_standard_queue_is_no_order() -> None:
    """Fair queues have groups too; their messages stay unordered."""
    assert message(Attributes={**MESSAGE["Attributes"], "MessageGroupId": "g"}).key == ""


def test_a_message_without_a_time_arrived_now() -> None:
    """Some emulators send no SentTimestamp, or null attributes."""
    assert message(Attributes={}).arrival == 5.0
    assert message(Attributes={"SentTimestamp": "soon"}).arrival == 5.0
    record = message(Attributes=None)
    assert (record.arrival, json.loads(record.wire)["attributes"]) == (5.0, {})


@given(body=TEXT, name=TEXT, value=TEXT, is_ascii=st.booleans())
def test_any_message_survives(body: str, name: str, value: str, is_ascii: bool) -> None:
    """Whatever text, escaped or not in the answer: the event says the same."""
    record = message(
        ensure_ascii=is_ascii,
        Body=body,
        Attributes={name: value} if name != "SqsManagedSseEnabled" else {},
        MessageAttributes={name: {"DataType": "String", "StringValue": value}},
        MD5OfMessageAttributes="x",
    )
    event = json.loads(record.wire)
    assert event["body"] == body
    assert event["attributes"].get(name, value) == value
    assert event["messageAttributes"][name]["stringValue"] == value
