"""What fuzzing has found, each as a rule of its own."""

import json

import pytest
import structlog

from poller.aws.errors import translated
from poller.aws.lean import safe_text
from poller.core import notices
from poller.core.filters import Filter, PatternError
from poller.core.model import (
    DiscardReason,
    Failed,
    Notice,
    Position,
    PositionKind,
    Record,
    Reply,
    ReplyStatus,
    Window,
    position_of,
    resume_of,
)
from poller.core.replies import judge
from poller.errors import PollerError, SourceUnavailable, StoreUnavailable
from poller.filtertest import judge as verb
from poller.kcl import lease_of
from poller.mappings import check_create
from poller.stores import dynamolayout
from tests.fuzz import documents, kit, queues, streams
from tests.fuzz.kit import run

RECORD = {"SequenceNumber": "7", "ApproximateArrivalTimestamp": 1.5, "Data": "eA==", "PartitionKey": "k"}
CHANGE = {"Keys": {"id": {"S": "1"}}, "SequenceNumber": "7", "ApproximateCreationDateTime": 1.5}
NAMES = dict.fromkeys(("eventID", "eventName", "eventVersion", "eventSource", "awsRegion"), "x")


@pytest.fixture(autouse=True)
def _no_loop_is_left():
    yield
    kit.end()


@pytest.mark.parametrize("number", ["", "x", "7" * 129, '7","a":"', "-7", "\u0663", "7 "])
def test_a_record_whose_sequence_number_is_none_is_not_read(number):
    """It would have ended the shard's flow, or stood unescaped in the event; the answer is asked for again."""
    kinesis = json.dumps({"Records": [{**RECORD, "SequenceNumber": number}], "NextShardIterator": "i"}).encode()
    change = {**NAMES, "dynamodb": {**CHANGE, "SequenceNumber": number}}
    for source in (
        streams.open_kinesis(kinesis),
        streams.open_dynamodb(json.dumps({"Records": [change], "NextShardIterator": "i"}).encode()),
    ):
        with pytest.raises(SourceUnavailable, match="sequence number is no number"):
            run(source.fetch("shardId-000000000000", "i", 10))


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b'{"Shards": 5}',
        b'{"Shards": [1]}',
        b'{"Shards": [{"ShardId": 5}]}',
        b'{"Shards": [{"ShardId": ""}]}',
        b"{}",
    ],
)
def test_a_list_of_shards_of_another_form_is_unavailable(body):
    """botocore fails on it in many ways, or passes it on; none of them ended the mapping's discovery in words."""
    with pytest.raises(SourceUnavailable, match="ListShards"):
        run(streams.open_kinesis(body).shards())
    for whole in (body, b'{"StreamDescription": %b}' % body):
        with pytest.raises(SourceUnavailable, match="DescribeStream"):
            run(streams.open_dynamodb(whole).shards())


def test_our_own_errors_pass_through_the_translation():
    """Only what an answer of another form raises is called that."""
    with pytest.raises(SourceUnavailable, match="X: the answer cannot be read"), translated("X", {}):
        raise TypeError
    with pytest.raises(AssertionError), translated("X", {}):
        raise AssertionError


@pytest.mark.parametrize("hours", [b"1e999", b'"x"', b"[]", b"0", b"-1"])
def test_a_retention_that_is_no_number_is_unavailable(hours):
    """An endless one would have made the headroom endless."""
    body = b'{"StreamDescriptionSummary": {"RetentionPeriodHours": %b}}' % hours
    with pytest.raises(SourceUnavailable):
        run(streams.open_kinesis(body).facts())


@pytest.mark.parametrize("sent", ["9" * 16, "9" * 400, "9" * 5000, "\u0663", "-1"])
def test_a_message_that_was_sent_at_no_time_is_received(sent):
    """The moment of the receive stands in; the message was lost to its visibility timeout before."""
    message = {
        "MessageId": "1",
        "ReceiptHandle": "r",
        "Body": "",
        "MD5OfBody": "",
        "Attributes": {"SentTimestamp": sent},
    }
    [record] = run(queues._open(json.dumps({"Messages": [message]}).encode()).receive(10, 20.0, 30.0))
    assert 1.7e9 < record.arrival < 1.8e9


@pytest.mark.parametrize("text", ['"inf"', '"nan"', '"-1"', '"1e9"', "1" + "0" * 400, "[]"])
def test_a_visibility_timeout_that_no_queue_has_is_unavailable(text):
    """All waits of the queue are made from it."""
    with pytest.raises(SourceUnavailable, match="no VisibilityTimeout"):
        run(queues._open(b'{"Attributes": {"VisibilityTimeout": %b}}' % text.encode()).visibility_timeout())


@pytest.mark.parametrize("filler", range(250, 310, 3))
def test_a_secret_at_the_cut_of_a_long_text_is_not_shown(filler):
    """Cut off first, half a password or key was no longer recognised, and shown."""
    shown = safe_text("x" * filler + " http://user:sEcret@proxy AKIAQQQQQQQQQQQQQQQQ")
    assert "sEc" not in shown
    assert "AKIAQ" not in shown


@pytest.mark.parametrize("number", [10**309, -(10**400)])
def test_a_number_beyond_any_in_a_pattern_is_refused(number):
    """It is an integer in JSON, and was an OverflowError."""
    with pytest.raises(PatternError, match="too large"):
        Filter([json.dumps({"a": [number]})])


@pytest.mark.parametrize("operator", ["prefix", "wildcard", "numeric", "cidr", "exists", "anything-but"])
def test_a_deep_operand_of_a_pattern_is_refused(operator):
    """It was shown before it was looked at, by a function that calls itself."""
    with pytest.raises(PatternError):
        Filter([f'{{"a": [{{"{operator}": {"[" * 940}{"]" * 940}}}]}}'])


@pytest.mark.parametrize(
    "state", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": %s}' % ("[" * 985 + "]" * 985)]
)
def test_a_window_state_that_is_no_json_fails_the_invocation(state):
    """It would have stood in the next event, which then no target could read."""
    window = Window(0.0, 60.0, b"{}", False, False)
    reply = Reply(ReplyStatus.OK, b'{"state": %b}' % state.encode())
    outcome = judge(reply, (), report_failures=False, ordered=True, window=window)
    assert isinstance(outcome, Failed)


@pytest.mark.parametrize("arrival", [-1e300, -1.0, 1e13, 1e300])
def test_a_record_that_arrived_at_no_time_can_be_discarded(arrival):
    """Its failure record names the nearest moment that a calendar has; without one its lane was held for ever."""
    record = Record("7", "k", arrival, b"{}")
    for spec in (streams.KINESIS, streams.DYNAMODB):
        mapping = documents._MAPPING.__class__("m", spec, streams.FUNCTION, *_policies())
        notice = Notice(mapping, "s", (record,), DiscardReason.RETRIES, 1, "r", 1.78e9)
        assert notices.parse(notices.body(notice)).start == "7"


def test_half_a_pair_of_surrogates_can_be_printed():
    """In what `poller filter test` says, and in what is wrong with a pattern."""
    _, lines = verb('{"a\\ud800": ["x"]}', '{"a": "\\ud800"}')
    "\n".join(lines).encode()
    with pytest.raises(PatternError) as refused:
        Filter(['{"\\ud800.b": ["x"], "\\ud800": {"b": ["x"]}}'])
    str(refused.value).encode()


@pytest.mark.parametrize("wrong", ["leaseKey", "shardId", "streamName", "leaseOwner", "parentShardId"])
def test_a_lease_with_a_name_that_cannot_be_printed_is_refused(wrong):
    """It would have stood in what is printed: as an error of its own, or as a line that nobody wrote."""
    item = {"leaseKey": {"S": "k"}, "checkpoint": {"S": "7"}, "shardId": {"S": "s"}, "streamName": {"S": "x"}}
    for text in ("a\nb", "\ud800"):
        with pytest.raises(PollerError, match="is damaged") as refused:
            lease_of({**item, wrong: {"S": text}})
        assert str(refused.value).isprintable()


def _policies():
    mapping = documents._MAPPING
    return mapping.batch, mapping.retry, mapping.start


def test_a_deep_value_in_a_request_is_refused():
    """In AWS's words, which show the value; it was an error 500."""
    deep = json.loads("[" * 900 + "]" * 900)
    [problem] = check_create({"EventSourceArn": queues.FIFO.arn, "FunctionName": "f", "FunctionResponseTypes": deep})
    assert "FunctionResponseTypes" in problem.message
    [problem, *_] = check_create({"EventSourceArn": queues.FIFO.arn, "FunctionName": "f", "BatchSize": deep})
    assert "BatchSize" in problem.message


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("AT_SEQUENCE_NUMBER", ""),
        ("AT_SEQUENCE_NUMBER", "7" * 129),
        ("AFTER_SEQUENCE_NUMBER", "x"),
        ("AT_TIMESTAMP", ""),
        ("AT_TIMESTAMP", "nan"),
        ("LATEST", "inf"),
        ("LATEST", "-1"),
        ("TRIM_HORIZON", "7"),
        ("NOWHERE", ""),
        ("AT_SEQUENCE_NUMBER", None),
    ],
)
def test_a_position_that_was_edited_is_refused(kind, value):
    """The store names the row; before, the shard's flow met the value later and could not say where it came from."""
    with pytest.raises(ValueError):
        position_of(kind, value)
    item = {"leaseKey": {"S": "s"}, "leaseCounter": {"N": "1"}, "savedAt": {"N": "1"}}
    with pytest.raises(StoreUnavailable, match="row of mapping m, shard s is damaged"):
        dynamolayout.row_of("m", {**item, "position": {"S": f"{kind} {value or ''}"}}, "")


def test_a_position_comes_back():
    """Whatever a checkpoint has."""
    assert position_of("LATEST", "") == Position(PositionKind.LATEST)
    assert position_of("AT_TIMESTAMP", "1.5") == Position(PositionKind.AT_TIMESTAMP, "1.5")
    assert resume_of("[[7, 8], [9]]") == ((7, 8), (9,))


@pytest.mark.parametrize(
    "text", ["{}", "[7]", "[[]]", '[["7"]]', "[[-1]]", "[[1.5]]", "[[true]]", "[[1e999]]", "[" * 2000]
)
def test_resume_vectors_that_were_edited_are_refused(text):
    """As a position: an empty vector was a division by zero."""
    with pytest.raises(ValueError):
        resume_of(text)


@pytest.mark.parametrize("text", ["[]", "5", "[" * 2000, "{"])
def test_a_document_that_was_edited_is_refused(text):
    """By both stores, whichever part reads it."""
    with pytest.raises(StoreUnavailable):
        dynamolayout.parsed("d", text)
    with pytest.raises(StoreUnavailable):
        dynamolayout.member_of({"leaseKey": {"S": "m"}, "beat": {"N": "1"}, "info": {"S": text}})
    documents.row(b'["s", "SHARD_END", "", "[]", "", null, 0, "[1]", "", null]')
    row = b'["s", "SHARD_END", "", "[]", "", null, 0, "[]", "", null]\n' + text.encode() + b"\n" + text.encode()
    documents.row(row)


def test_an_unexpected_error_is_found():
    """The request target fails where the server would have answered 500."""
    before = structlog.get_config()
    kit.quiet()
    try:
        with pytest.raises(AssertionError):
            structlog.get_logger().error("request_failed")
        structlog.get_logger().error("anything_else")
    finally:
        structlog.configure(**before)
