"""Whatever lies in a queue or a directory: read and shown, or refused in a sentence."""

import contextlib
import copy
import io
import json
import uuid
import zlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from poller.core.model import SourceKind
from poller.core.notices import identity_of, parse, parse_kept
from poller.core.replies import idempotency_key
from poller.redrive.model import Found
from poller.redrive.refetch import records_of
from poller.redrive.run import read
from poller.redrive.show import Teller
from tests.unit.test_notices import DYNAMODB_SAMPLE, KINESIS_SAMPLE

PAYLOAD = json.dumps({"Records": [{"kinesis": {"sequenceNumber": "12"}}], "state": {"n": 1}})
WINDOW = {
    "window": {"start": "2020-12-09T07:04:00Z", "end": "2020-12-09T07:06:00Z"},
    "isFinalInvokeForWindow": True,
    "isWindowTerminatedEarly": False,
}
WHOLE = [
    {**json.loads(KINESIS_SAMPLE), "payload": PAYLOAD, "timeWindowInfo": WINDOW},
    {**json.loads(DYNAMODB_SAMPLE), "payloadPointer": "store:x"},
]
ODD = [
    "arn:aws:sqs:us-east-2:111111111111:failed",
    "arn:aws:dynamodb:us-east-2:111111111111:table/t",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59.999999-23:59",
    "1969-12-31T23:59:59Z",
    "2019-W46-4T00Z",
    "\ud800",
    "\x1b[2J",
    "a\nb",
    "9" * 129,
    "\u0661",
    '{"Records":[{"kinesis":{"sequenceNumber":"\\ud800"}}]}',
    '{"Records":[],"state":' + '{"a":' * 900 + "1" + "}" * 901,
    "{}",
]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 10**400, 1e308])
    | st.text()
    | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(document: Any) -> list[tuple[str, ...]]:
    """Every member, by its path."""
    if not isinstance(document, dict):
        return []
    return [path for name, value in document.items() for path in ((name,), *((name, *one) for one in places(value)))]


def changed(whole: dict[str, Any], value: Any, *path: str) -> dict[str, Any]:
    """The same with another value at a place."""
    document = inner = copy.deepcopy(whole)
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return document


@st.composite
def nearly(draw: st.DrawFn) -> dict[str, Any]:
    """A failure record with up to three members changed or gone."""
    document = copy.deepcopy(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 3))):
        *way, name = draw(st.sampled_from(places(document) or [("x",)]))
        inner = document
        for part in way:
            inner = inner[part]
        if draw(st.booleans()):
            inner[name] = draw(values)
        else:
            inner.pop(name, None)
    return document


@given(document=nearly())
@example(document=changed(WHOLE[1], "\ud800", "requestContext", "requestId"))
@example(document=changed(WHOLE[0], "\ud800", "KinesisBatchInfo", "shardId"))
@example(document=changed(WHOLE[0], ODD[11], "payload"))
@example(document=changed(WHOLE[0], ODD[12], "payload"))
def test_what_is_near_a_failure_record_is_worked_with_or_refused(document: dict[str, Any]) -> None:
    """One bad record must not end a run: ValueError is the only error, and what passes can be listed and named."""
    screen = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        with contextlib.suppress(ValueError):
            parse_kept(document)
        try:
            record, source = read(Found("x", json.dumps(document).encode()))
        except ValueError as error:
            why = str(error)
        else:
            why = ""
        if why:
            assert why.isprintable()
            return
        for as_json in (False, True):
            teller = Teller(None, as_json=as_json, has_bar=False)
            teller.listed("x", record, None, "range")
            teller.would("x", record, "f", record.count)
            teller.left("x", record, "why")
            teller.close()
    assert source.kind is record.kind
    f"{record.stream_arn}\n{record.shard}".encode()
    uuid.UUID(identity_of("m", record.shard, record.request_id, record.condition, record.start, record.end))
    if record.payload is not None:
        try:
            records = records_of(record.payload, record.kind)
        except ValueError:
            return
        assert idempotency_key("m", record.stream_arn, records, record.shard, record.window)
    assert zlib.crc32(record.shard.encode()) >= 0


@pytest.mark.parametrize(("text", "kind"), [(KINESIS_SAMPLE, "kinesis"), (DYNAMODB_SAMPLE, "dynamodb")])
def test_a_record_is_of_the_stream_that_it_names(text: str, kind: str) -> None:
    """A queue's ARN, another kind of stream's or a table's is refused before anything is read from it."""
    record, source = read(Found("x", text.encode()))
    assert (record, source.kind) == (parse(text), SourceKind(kind))
    info = "KinesisBatchInfo" if kind == "kinesis" else "DDBStreamBatchInfo"
    other = json.loads(DYNAMODB_SAMPLE if kind == "kinesis" else KINESIS_SAMPLE)
    [wrong] = [each["streamArn"] for name, each in other.items() if name.endswith("BatchInfo")]
    table = "arn:aws:dynamodb:us-east-2:111111111111:table/t"
    for arn in ("arn:aws:sqs:us-east-2:111111111111:failed", wrong, "x", table):
        document = json.loads(text)
        document[info]["streamArn"] = arn
        with pytest.raises(ValueError, match="its streamArn is"):
            read(Found("x", json.dumps(document).encode()))
