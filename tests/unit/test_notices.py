"""Failure records, byte for byte as semantics 10 has them, and reading them back."""

import contextlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.core.flow import lane_of
from poller.core.model import (
    END,
    TRIM_HORIZON,
    BatchPolicy,
    Checkpoint,
    DiscardReason,
    FailureDestination,
    FunctionSpec,
    Mapping,
    Notice,
    Position,
    PositionKind,
    Record,
    ResponseContext,
    RetryPolicy,
    SourceKind,
    SourceSpec,
    Window,
)
from poller.core.notices import (
    UNKNOWN_STATE,
    FailureRecord,
    Kept,
    Report,
    body,
    body_with_payload,
    identity,
    kept,
    parse,
    parse_kept,
    record,
    report,
    s3_key,
)

REQUEST = "c9b8fa9f-5a7f-4f0d-af9c-0c604cde93a5"
FUNCTION = "arn:aws:lambda:us-east-2:111111111111:function:myfunction"
STREAM = "arn:aws:kinesis:us-east-2:111111111111:stream/mystream"
TABLE = "arn:aws:dynamodb:us-east-2:111111111111:table/mytable/stream/2019-11-14T00:04:06.388"
QUEUE = "arn:aws:sqs:us-east-2:111111111111:failed"
FIRST = "49601189658422359378836298521827638475320189012309704722"
LAST = "49601189658422359378836298522902373528957594348623495186"

# As semantics 10.2 shows them, without the line breaks and blanks.
KINESIS_SAMPLE = (
    '{"requestContext":{"requestId":"c9b8fa9f-5a7f-4f0d-af9c-0c604cde93a5",'
    '"functionArn":"arn:aws:lambda:us-east-2:111111111111:function:myfunction",'
    '"condition":"RetryAttemptsExhausted","approximateInvokeCount":1},'
    '"responseContext":{"statusCode":200,"executedVersion":"$LATEST","functionError":"Unhandled"},'
    '"version":"1.0",'
    '"timestamp":"2019-11-14T00:38:06.021Z",'
    '"KinesisBatchInfo":{"shardId":"shardId-000000000001",'
    '"startSequenceNumber":"49601189658422359378836298521827638475320189012309704722",'
    '"endSequenceNumber":"49601189658422359378836298522902373528957594348623495186",'
    '"approximateArrivalOfFirstRecord":"2019-11-14T00:38:04.835Z",'
    '"approximateArrivalOfLastRecord":"2019-11-14T00:38:05.580Z",'
    '"batchSize":500,'
    '"streamArn":"arn:aws:kinesis:us-east-2:111111111111:stream/mystream"}}'
)
DYNAMODB_SAMPLE = (
    '{"requestContext":{"requestId":"c9b8fa9f-5a7f-4f0d-af9c-0c604cde93a5",'
    '"functionArn":"arn:aws:lambda:us-east-2:111111111111:function:myfunction",'
    '"condition":"RetryAttemptsExhausted","approximateInvokeCount":1},'
    '"responseContext":{"statusCode":200,"executedVersion":"$LATEST","functionError":"Unhandled"},'
    '"version":"1.0",'
    '"timestamp":"2019-11-14T00:13:49.717Z",'
    '"DDBStreamBatchInfo":{"shardId":"shardId-00000001573689847184-864758bb",'
    '"startSequenceNumber":"800000000003126276362","endSequenceNumber":"800000000003126276362",'
    '"approximateArrivalOfFirstRecord":"2019-11-14T00:13:19Z",'
    '"approximateArrivalOfLastRecord":"2019-11-14T00:13:19Z",'
    '"batchSize":1,'
    '"streamArn":"arn:aws:dynamodb:us-east-2:111111111111:table/mytable/stream/2019-11-14T00:04:06.388"}}'
)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def mapping(kind: SourceKind = SourceKind.KINESIS, arn: str = STREAM, include_payload: bool = False) -> Mapping:
    return Mapping(
        id="6d9bce8e-836b-442c-8070-74e77903c815",
        source=SourceSpec(kind, arn, "us-east-2", "111111111111", "mystream"),
        function=FunctionSpec("myfunction", FUNCTION, ""),
        batch=BatchPolicy(100),
        retry=RetryPolicy(),
        start=Position(PositionKind.TRIM_HORIZON),
        destination=FailureDestination(QUEUE, include_payload),
    )


def kinesis(**changes: object) -> Notice:
    between = [Record(str(int(FIRST) + n), "", at("2019-11-14T00:38:05"), b'{"n":1}') for n in range(1, 499)]
    notice = Notice(
        mapping=mapping(),
        shard="shardId-000000000001",
        records=(
            Record(FIRST, "", at("2019-11-14T00:38:04.835"), b'{"n":0}'),
            *between,
            Record(LAST, "", at("2019-11-14T00:38:05.580"), b'{"n":2}'),
        ),
        reason=DiscardReason.RETRIES,
        attempts=1,
        request_id=REQUEST,
        at=at("2019-11-14T00:38:06.021"),
        response=ResponseContext(200, "$LATEST", "Unhandled"),
    )
    return replace(notice, **changes)  # type: ignore[arg-type]


def dynamodb(**changes: object) -> Notice:
    notice = Notice(
        mapping=mapping(SourceKind.DYNAMODB, TABLE),
        shard="shardId-00000001573689847184-864758bb",
        records=(Record("800000000003126276362", "", at("2019-11-14T00:13:19"), b'{"eventID":"\xc3\xa9 \\"x\\""}'),),
        reason=DiscardReason.RETRIES,
        attempts=1,
        request_id=REQUEST,
        at=at("2019-11-14T00:13:49.717"),
        response=ResponseContext(200, "$LATEST", "Unhandled"),
    )
    return replace(notice, **changes)  # type: ignore[arg-type]


def window(is_final: bool = True) -> Window:
    return Window(at("2020-12-09T07:04:00"), at("2020-12-09T07:06:00"), b'{"1":282}', is_final, is_early=False)


def test_kinesis_record_is_aws_own() -> None:
    """Byte for byte as AWS documents it for Kinesis: order of keys, three digits in each time."""
    assert body(kinesis()) == KINESIS_SAMPLE.encode()


def test_dynamodb_record_is_aws_own() -> None:
    """Byte for byte as AWS documents it for DynamoDB: its own member name, arrivals in whole seconds."""
    assert body(dynamodb()) == DYNAMODB_SAMPLE.encode()


@pytest.mark.parametrize("arrival", ["2019-11-14T00:13:51", "2019-11-14T00:13:51.0004"])
def test_kinesis_times_always_have_three_digits(arrival: str) -> None:
    """A whole second is written with .000, and digits beyond are cut off, not rounded."""
    info = record(kinesis(records=(Record(FIRST, "", at(arrival), b"{}"),)))["KinesisBatchInfo"]
    assert info["approximateArrivalOfFirstRecord"] == "2019-11-14T00:13:51.000Z"


def test_dynamodb_times_have_no_fraction() -> None:
    """A fraction is cut off, also just before the next second."""
    info = record(dynamodb(records=(Record("1", "", at("2019-11-14T00:13:51.999"), b"{}"),)))["DDBStreamBatchInfo"]
    assert info["approximateArrivalOfFirstRecord"] == "2019-11-14T00:13:51Z"


def test_function_error_is_null_when_it_named_failures() -> None:
    """The key stays: null, not absent."""
    text = body(kinesis(response=ResponseContext(200, "$LATEST", None))).decode()
    assert '"responseContext":{"statusCode":200,"executedVersion":"$LATEST","functionError":null},"version"' in text


def test_no_answer_no_response_context() -> None:
    """A timeout, a broken connection and an oversize event have no responseContext at all."""
    assert list(record(kinesis(response=None))) == ["requestContext", "version", "timestamp", "KinesisBatchInfo"]


def test_too_old_has_no_response_context_even_after_invocations() -> None:
    """RecordAgeExceeded never says what the function answered."""
    made = record(kinesis(reason=DiscardReason.AGE, attempts=8))
    assert "responseContext" not in made
    assert made["requestContext"]["condition"] == "RecordAgeExceeded"
    assert made["requestContext"]["approximateInvokeCount"] == 8


def test_never_invoked_counts_one() -> None:
    """approximateInvokeCount is at least 1."""
    made = record(kinesis(reason=DiscardReason.AGE, attempts=0, response=None))
    assert made["requestContext"]["approximateInvokeCount"] == 1


def test_qualifier_only_if_mapped_with_one() -> None:
    """functionArn is the mapping's own, unchanged."""
    qualified = replace(mapping(), function=FunctionSpec("myfunction", f"{FUNCTION}:live", ""))
    assert record(kinesis(mapping=qualified))["requestContext"]["functionArn"] == f"{FUNCTION}:live"
    assert record(kinesis())["requestContext"]["functionArn"] == FUNCTION


def test_enhanced_fan_out_names_the_consumer() -> None:
    """streamArn is the consumer's ARN."""
    consumer = f"{STREAM}/consumer/me:1573689847"
    made = record(kinesis(mapping=mapping(arn=consumer)))
    assert made["KinesisBatchInfo"]["streamArn"] == consumer


def test_window_is_told_after_the_batch() -> None:
    """timeWindowInfo has the window and both flags, and no state."""
    text = body(kinesis(window=window(is_final=False))).decode()
    assert text.endswith(
        f'"streamArn":"{STREAM}"}},"timeWindowInfo":{{"window":{{"start":"2020-12-09T07:04:00Z",'
        '"end":"2020-12-09T07:06:00Z"},"isFinalInvokeForWindow":false,"isWindowTerminatedEarly":false}}'
    )


@pytest.mark.parametrize(("make", "name"), [(kinesis, "KinesisBatchInfo"), (dynamodb, "DDBStreamBatchInfo")])
def test_failed_final_without_records_has_no_extent(make: object, name: str) -> None:
    """Only shardId and streamArn are left of the batch."""
    notice = make(records=(), window=window())  # type: ignore[operator]
    made = record(notice)
    assert made[name] == {"shardId": notice.shard, "streamArn": notice.mapping.source.arn}
    assert made["timeWindowInfo"]["isFinalInvokeForWindow"] is True


def test_s3_form_carries_the_event_as_a_string() -> None:
    """The same record, then payload: the whole event as an escaped JSON string, not as an object."""
    text = body_with_payload(dynamodb()).decode()
    assert text == DYNAMODB_SAMPLE[:-1] + r',"payload":"{\"Records\":[{\"eventID\":\"é \\\"x\\\"\"}]}"}'


def test_s3_form_has_the_members_of_a_window() -> None:
    """The payload is the event that was invoked: window, state and flags too."""
    event = json.loads(json.loads(body_with_payload(kinesis(records=(), window=window())))["payload"])
    assert event == {
        "Records": [],
        "window": {"start": "2020-12-09T07:04:00Z", "end": "2020-12-09T07:06:00Z"},
        "state": {"1": 282},
        "shardId": "shardId-000000000001",
        "eventSourceARN": STREAM,
        "isFinalInvokeForWindow": True,
        "isWindowTerminatedEarly": False,
    }


def test_bytes_that_are_no_text_do_not_stop_a_record() -> None:
    """A batch that cannot be shown exactly is still reported."""
    notice = dynamodb(records=(Record("1", "", 0.0, b'{"a":"\xff"}'),))
    assert json.loads(json.loads(body_with_payload(notice))["payload"]) == {"Records": [{"a": "\ufffd"}]}


def test_body_has_no_character_that_sqs_refuses() -> None:
    """U+FFFE and U+FFFF are escaped: refused for ever, such a record would hold its lane for ever."""
    notice = dynamodb(records=(Record("1", "", 0.0, '{"a":"\ufffe\uffff\U0001f600"}'.encode()),))
    made = body_with_payload(notice)
    assert all(char not in made.decode() for char in "\ufffe\uffff")
    assert json.loads(json.loads(made)["payload"]) == {"Records": [{"a": "\ufffe\uffff\U0001f600"}]}


def test_without_the_option_queues_get_no_data() -> None:
    """SQS and SNS records hold metadata only, whatever would fit."""
    assert report(kinesis(), 1_048_576) == Report(KINESIS_SAMPLE.encode())


def test_s3_always_gets_the_payload() -> None:
    """Without a limit the option does not matter."""
    assert report(kinesis(), None) == Report(body_with_payload(kinesis()))


def test_include_payload_up_to_the_last_byte() -> None:
    """The payload is there when the whole body fits the limit exactly, else a pointer to the store."""
    notice = dynamodb(mapping=mapping(SourceKind.DYNAMODB, TABLE, include_payload=True))
    whole = body_with_payload(notice)
    assert "é".encode() in whole  # bytes are counted, not characters
    assert report(notice, len(whole)) == Report(whole)
    pointing = DYNAMODB_SAMPLE[:-1] + f',"payloadPointer":"store:{REQUEST}"}}'
    assert report(notice, len(whole) - 1) == Report(pointing.encode(), is_kept_in_store=True)


def test_s3_key_is_in_utc_with_dots() -> None:
    """aws/lambda/MAPPING/SHARD/date/time-UUID, from the record's timestamp."""
    assert s3_key(kinesis(), "a17f8cd7-3a9d-4c6c-8d0e-0c9ad1d8ef2a") == (
        "aws/lambda/6d9bce8e-836b-442c-8070-74e77903c815/shardId-000000000001/2019/11/14/"
        "2019-11-14T00.38.06-a17f8cd7-3a9d-4c6c-8d0e-0c9ad1d8ef2a"
    )


def test_identity_is_the_same_for_a_repeat_and_for_no_other() -> None:
    """Records of one invocation that age out one after the other have its request id, but are notices of their own."""
    notice = kinesis()
    others = [
        kinesis(records=notice.records[:1]),
        kinesis(records=notice.records[1:]),
        kinesis(reason=DiscardReason.AGE),
        kinesis(shard="shardId-000000000002"),
        kinesis(request_id="other"),
        kinesis(records=()),
        kinesis(mapping=replace(mapping(), id="other")),
    ]
    assert len({identity(each) for each in (notice, *others)}) == len(others) + 1
    assert identity(kinesis()) == identity(notice) == str(UUID(identity(notice)))


def parsed(**changes: object) -> FailureRecord:
    expected = FailureRecord(
        request_id=REQUEST,
        function_arn=FUNCTION,
        condition="RetryAttemptsExhausted",
        attempts=1,
        at=at("2019-11-14T00:38:06.021"),
        kind=SourceKind.KINESIS,
        stream_arn=STREAM,
        shard="shardId-000000000001",
        start=FIRST,
        end=LAST,
        count=500,
    )
    return replace(expected, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", [KINESIS_SAMPLE, KINESIS_SAMPLE.encode(), json.dumps(json.loads(KINESIS_SAMPLE), indent=1)]
)
def test_lambdas_own_kinesis_record_is_read(text: str | bytes) -> None:
    """From a real account, as text or bytes, whatever its blanks."""
    assert parse(text) == parsed()


def test_lambdas_own_dynamodb_record_is_read() -> None:
    """The same for DynamoDB; other members are passed over."""
    found = parse(DYNAMODB_SAMPLE[:-1] + ',"new":[1]}')
    assert (found.kind, found.stream_arn, found.start, found.end, found.count) == (
        SourceKind.DYNAMODB,
        TABLE,
        "800000000003126276362",
        "800000000003126276362",
        1,
    )


def test_s3_form_is_read_with_its_payload() -> None:
    """The payload is the event's bytes."""
    assert parse(body_with_payload(dynamodb())).payload == '{"Records":[{"eventID":"é \\"x\\""}]}'.encode()


def test_pointer_is_read() -> None:
    """kept_as is the request id under which the store has it."""
    assert parse(KINESIS_SAMPLE[:-1] + ',"payloadPointer":"store:abc"}') == parsed(kept_as="abc")


SNS = {
    "Type": "Notification",
    "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
    "TopicArn": "arn:aws:sns:us-east-2:111111111111:failed",
    "Message": KINESIS_SAMPLE,
    "Timestamp": "2019-11-14T00:38:07.000Z",
    "SignatureVersion": "1",
    "Signature": "x",
    "SigningCertURL": "https://sns.us-east-2.amazonaws.com/x.pem",
    "UnsubscribeURL": "https://sns.us-east-2.amazonaws.com/?Action=Unsubscribe",
}
EVENT = {
    "version": "0",
    "id": "6a7e8feb-b491-4cf7-a9f1-bf3703467718",
    "detail-type": "RetryAttemptsExhausted",
    "source": "esm-poller",
    "account": "111111111111",
    "time": "2019-11-14T00:38:07Z",
    "region": "us-east-2",
    "resources": [FUNCTION, STREAM],
    "detail": json.loads(KINESIS_SAMPLE),
}


@pytest.mark.parametrize("envelope", [SNS, EVENT, {**SNS, "Message": json.dumps(EVENT)}], ids=["sns", "events", "both"])
def test_envelopes_are_taken_off(envelope: dict[str, object]) -> None:
    """As a queue gets it that is subscribed to the topic, or the target of a rule of the bus, or of both."""
    assert parse(json.dumps(envelope)) == parsed()


@pytest.mark.parametrize("make", [kinesis, dynamodb])
def test_what_we_write_we_read(make: object) -> None:
    """Every form of ours, with a window and without records; a window's state is in the payload only."""
    for notice in (make(), make(window=window()), make(records=(), window=window())):  # type: ignore[operator]
        for text in (body(notice), body_with_payload(notice)):
            found = parse(text)
            assert found.count == len(notice.records)
            assert (found.start, found.end) == (
                (notice.records[0].id, notice.records[-1].id) if notice.records else ("", "")
            )
            unknown = notice.window and notice.window._replace(state=UNKNOWN_STATE)
            assert found.window == (notice.window if found.payload else unknown)


def without(*path: str) -> str:
    document = json.loads(KINESIS_SAMPLE)
    place = document
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return json.dumps(document)


def changed(value: object, *path: str) -> str:
    document = json.loads(KINESIS_SAMPLE)
    place = document
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (KINESIS_SAMPLE[:-3], "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it is not a JSON object"),
        (json.dumps({**SNS, "Message": "hello"}), "it is not JSON"),
        ("{}", "it has no requestContext, so it is not a failure record"),
        (
            json.dumps({"requestContext": {}, "requestPayload": {}}),
            "it is the record of an asynchronous invocation, not of an event source mapping",
        ),
        (without("KinesisBatchInfo"), "it has neither KinesisBatchInfo nor DDBStreamBatchInfo"),
        (changed([], "requestContext"), "requestContext is not a JSON object"),
        (without("requestContext", "requestId"), "requestContext.requestId is missing or not a string"),
        (
            changed("many", "requestContext", "approximateInvokeCount"),
            "requestContext.approximateInvokeCount is not a number",
        ),
        (without("timestamp"), "timestamp is missing or not a string"),
        (changed("yesterday", "timestamp"), "timestamp is not a time"),
        (changed("2019-11-14T00:38:06", "timestamp"), "timestamp has no time zone"),
        (changed("0001-01-01T00:00:00+23:59", "timestamp"), "timestamp is not between 1970 and 9999"),
        (changed("9999-12-31T23:59:59-23:59", "timestamp"), "timestamp is not between 1970 and 9999"),
        (changed(2**31, "KinesisBatchInfo", "batchSize"), "KinesisBatchInfo.batchSize is not a number of records"),
        (
            changed("\ud800", "requestContext", "requestId"),
            "requestContext.requestId has characters that cannot be printed",
        ),
        (
            changed("a\nleft: b", "KinesisBatchInfo", "shardId"),
            "KinesisBatchInfo.shardId has characters that cannot be printed",
        ),
        (changed("five", "KinesisBatchInfo", "batchSize"), "KinesisBatchInfo.batchSize is not a number of records"),
        (changed(True, "KinesisBatchInfo", "batchSize"), "KinesisBatchInfo.batchSize is not a number of records"),
        (without("KinesisBatchInfo", "shardId"), "KinesisBatchInfo.shardId is missing or not a string"),
        (
            without("KinesisBatchInfo", "endSequenceNumber"),
            "KinesisBatchInfo.endSequenceNumber is missing or not a string",
        ),
        (
            changed("4x", "KinesisBatchInfo", "startSequenceNumber"),
            "KinesisBatchInfo.startSequenceNumber is not a sequence number",
        ),
        (changed({"Records": []}, "payload"), "payload is not an event in a JSON string"),
        (changed("{", "payload"), "payload is not JSON"),
        (changed("[]", "payload"), "payload is not an event in a JSON string"),
        (changed("s3:abc", "payloadPointer"), "payloadPointer does not begin with store:"),
        (changed({}, "timeWindowInfo"), "timeWindowInfo.window is not a JSON object"),
    ],
)
def test_what_is_no_record_is_refused_in_a_sentence(text: str | bytes, why: str) -> None:
    """The sentence says what is wrong and quotes nothing of the document."""
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert str(caught.value) == why


def test_envelopes_without_end_are_refused() -> None:
    """Nobody sends them, so they are not followed."""
    text = KINESIS_SAMPLE
    for _ in range(3):
        text = json.dumps({**SNS, "Message": text})
    with pytest.raises(ValueError, match="wrapped in more than 2 envelopes"):
        parse(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "requestContext",
                        "KinesisBatchInfo",
                        "detail",
                        "detail-type",
                        "Type",
                        "Message",
                        "payload",
                        "timestamp",
                    ]
                ),
                inner,
            )
        ),
    )
)
def test_any_json_is_read_or_refused(document: object) -> None:
    """ValueError is the only error, whatever a queue holds."""
    with contextlib.suppress(ValueError):
        parse(json.dumps(document))


def test_what_the_store_keeps_is_read_again() -> None:
    """Ids, lanes, the payload where it is asked for, and a window with the state that its failure record has not."""
    keys = ["", "a", "k\u00e9", "\ud800"]
    records = tuple(Record(str(n), key, 0.0, b"{}") for n, key in enumerate(keys, 1))
    notice = dynamodb(records=records, window=window(is_final=False)._replace(state=b'{"n":[1,2.5]}'))
    found = parse_kept(json.loads(json.dumps(kept(notice, has_payload=True))))
    assert found.ids == ("1", "2", "3", "4")
    assert found.window == notice.window
    assert found.payload is not None
    assert json.loads(found.payload)["state"] == {"n": [1, 2.5]}
    for lanes in (1, 3, 10):
        assert [one % lanes for one in found.hashes] == [lane_of(key, lanes) for key in keys]
    assert parse_kept(kept(dynamodb(), has_payload=False)).window is None
    assert parse_kept({"record": {}}) == Kept()


@pytest.mark.parametrize(
    "document",
    [
        {"ids": 1},
        {"ids": ["x"]},
        {"ids": [1]},
        {"payload": "[]"},
        {"payload": 1},
        {"window": 1},
        {"window": {}},
        {"window": {"start": 10**400, "end": 1, "state": "{}", "is_final": True, "is_early": False}},
        {"window": {"start": 0, "end": float("nan"), "state": "{}", "is_final": True, "is_early": False}},
        {"window": {"start": 0, "end": 1, "state": "[]", "is_final": True, "is_early": False}},
        {"window": {"start": 0, "end": 1, "state": 5, "is_final": True, "is_early": False}},
    ],
)
def test_an_entry_that_was_edited_is_refused(document: dict[str, object]) -> None:
    """A sentence, whatever it says now."""
    with pytest.raises(ValueError, match=r"store entry|payload"):
        parse_kept(document)


def at_position(kind: PositionKind, value: str = "", *resume: tuple[int, ...]) -> Checkpoint:
    return Checkpoint(Position(kind, value), resume)


A_IN_2, B_IN_2 = lane_of("a", 2), lane_of("b", 2)


def floors(lane: int, floor: int) -> tuple[int, ...]:
    """Of two lanes, the one has come so far, the other nowhere."""
    return tuple(floor if index == lane else 0 for index in range(2))


@pytest.mark.parametrize(
    ("checkpoint", "is_settled"),
    [
        (Checkpoint(END), True),
        (Checkpoint(TRIM_HORIZON), False),
        (at_position(PositionKind.LATEST, "1.0"), False),
        (at_position(PositionKind.AT, "13"), True),
        (at_position(PositionKind.AT, "12"), False),
        (at_position(PositionKind.AT, "9"), False),
        (at_position(PositionKind.AFTER, "12"), True),
        (at_position(PositionKind.AFTER, "11"), False),
        (at_position(PositionKind.AT, "9", floors(A_IN_2, 13)), True),
        (at_position(PositionKind.AT, "9", floors(A_IN_2, 12)), False),
        (at_position(PositionKind.AT, "9", floors(1 - A_IN_2, 99)), False),
        (at_position(PositionKind.AT, "9", (0, 0, 0), floors(A_IN_2, 13)), True),
    ],
)
def test_a_batch_is_settled_once_the_position_has_passed_all_of_it(checkpoint: Checkpoint, is_settled: bool) -> None:
    """Or its lane has; until then a daemon that starts from there delivers it again, or gives it up again."""
    batch = Kept(("10", "12"), (lane_of("a", 2**32),) * 2)
    assert batch.is_settled(checkpoint) is is_settled


def test_of_keys_that_are_not_known_all_lanes_must_have_passed() -> None:
    """An entry without them is rather left."""
    assert Kept(("10",)).is_settled(at_position(PositionKind.AT, "9", (11, 11)))
    assert not Kept(("10",)).is_settled(at_position(PositionKind.AT, "9", (11, 0)))


@pytest.mark.parametrize(
    ("saved", "is_early", "is_settled"),
    [
        ("", False, True),
        ("100.0\n{}", False, False),
        ('100.0\n{"n":1}', True, False),
        ("100.0\n{}", True, True),
        ("40.0\n{}", False, False),
        ("160.0\n{}", False, True),
    ],
)
def test_a_final_invocation_is_settled_once_its_window_is_over(saved: str, is_early: bool, is_settled: bool) -> None:
    """It has no records; after an early one the same window goes on without state."""
    final = Kept(window=Window(100.0, 160.0, b'{"n":1}', True, is_early))
    assert final.is_settled(Checkpoint(Position(PositionKind.AFTER, "9"), window=saved)) is is_settled
