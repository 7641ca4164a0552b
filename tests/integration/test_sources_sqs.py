"""SQS beyond the contract: the queue's URL, empty and broken answers, partial failures of the batch calls."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from poller.clock import SystemClock
from poller.core.model import Record, SourceKind, SourceSpec
from poller.errors import AccessDenied, SourceGone, SourceThrottled, SourceUnavailable
from poller.sources.sqs import SqsSource
from tests.integration.conftest import REGION, broken, error, html_error, truncated

pytestmark = pytest.mark.integration

ACCOUNT = "111122223333"
SPEC = SourceSpec(SourceKind.SQS, f"arn:aws:sqs:{REGION}:{ACCOUNT}:orders", REGION, ACCOUNT, "orders")
URL = f"https://queue.invalid/{ACCOUNT}/orders"  # whoever dials it fails
MESSAGE = {
    "MessageId": "m",
    "ReceiptHandle": "h",
    "Body": "b",
    "MD5OfBody": "5",
    "Attributes": {"SentTimestamp": "1545082649183"},
}


@pytest.fixture
async def source(stub, connect) -> SqsSource:
    stub.script["GetQueueUrl"] = [{"QueueUrl": URL}]
    stub.script["GetQueueAttributes"] = [{"Attributes": {"VisibilityTimeout": "30"}}]
    return SqsSource(SPEC, await connect(stub.url), SystemClock(asyncio.get_running_loop()), windowed=False)


def records(count: int, expires: float = 1e12) -> list[Record]:
    return [Record(f"m{number}", "", 0.0, b"{}", handle=f"h{number}", expires=expires) for number in range(count)]


def done(*ids: str) -> dict[str, Any]:
    return {"Successful": [{"Id": one} for one in ids]}


async def everything(request: web.Request) -> web.Response:
    """Success for each entry of the request."""
    entries = json.loads(await request.read())["Entries"]
    return web.json_response(done(*[entry["Id"] for entry in entries]))


async def test_the_queue_is_named_by_its_own_url(stub, source) -> None:
    """GetQueueUrl for the ARN's account, once; the URL is sent, never dialled."""
    stub.script["ReceiveMessage"] = [{"Messages": [MESSAGE]}]
    for _ in range(2):
        await source.receive(10, 3.9, 30.0)
    assert stub.asked("GetQueueUrl") == [{"QueueName": "orders", "QueueOwnerAWSAccountId": ACCOUNT}]
    assert (
        stub.asked("ReceiveMessage")
        == [
            {
                "QueueUrl": URL,
                "MaxNumberOfMessages": 10,
                "WaitTimeSeconds": 3,
                "VisibilityTimeout": 30,
                "MessageSystemAttributeNames": ["All"],
                "MessageAttributeNames": ["All"],
            }
        ]
        * 2
    )


async def test_without_permission_to_ask_the_url_is_built(stub, source) -> None:
    """AWS's own policy for SQS mappings has no GetQueueUrl: the URL is endpoint, account and name."""
    stub.script["GetQueueUrl"] = [error("AccessDenied", status=403)]
    assert await source.visibility_timeout() == 30
    assert stub.asked("GetQueueAttributes")[0]["QueueUrl"] == f"{stub.url}/{ACCOUNT}/orders"


@pytest.mark.parametrize("operation", ["GetQueueUrl", "GetQueueAttributes"])
async def test_a_truncated_description_is_no_answer(stub, source, operation) -> None:
    """botocore reads it as an empty one."""
    stub.script[operation] = [truncated]
    with pytest.raises(SourceUnavailable, match=operation):
        await source.visibility_timeout()


@pytest.mark.parametrize("answer", [{}, {"Messages": None}, {"Messages": []}])
async def test_all_forms_of_nothing(stub, source, answer) -> None:
    """An empty receive is absent, null or empty `Messages`."""
    stub.script["ReceiveMessage"] = [answer]
    assert list(await source.receive(10, 0, 30.0)) == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (truncated, SourceUnavailable),
        (broken, SourceUnavailable),
        (html_error, SourceUnavailable),
        ([], SourceUnavailable),
        ({"Messages": [{"MessageId": "m"}]}, SourceUnavailable),
        (error("com.amazonaws.sqs#OverLimit", status=403), SourceThrottled),
        (error("RequestThrottled", status=403), SourceThrottled),
        (error("KmsThrottled"), SourceThrottled),
        (error("KmsAccessDenied"), AccessDenied),
        (error("AccessDeniedException"), AccessDenied),
        (error("com.amazonaws.sqs#QueueDoesNotExist"), SourceGone),
    ],
)
async def test_what_a_receive_may_answer(stub, source, answer, kind) -> None:
    """Each error says what to do; a truncated answer is not an empty queue, its messages are in flight."""
    stub.script["ReceiveMessage"] = [answer]
    with pytest.raises(kind, match="ReceiveMessage") as caught:
        await source.receive(10, 0, 30.0)
    assert type(caught.value) is kind


async def test_visibility_is_rounded_up_and_bounded(stub, source) -> None:
    """Whole seconds, never fewer than asked for, at most AWS's twelve hours."""
    stub.script["ReceiveMessage"] = [{}]
    stub.script["ChangeMessageVisibilityBatch"] = [everything]
    for asked, sent in ((30.2, 31), (0.0, 0), (1e6, 43_200)):
        await source.receive(1, 0, asked)
        await source.extend(records(1), asked)
        assert stub.asked("ReceiveMessage")[-1]["VisibilityTimeout"] == sent
        entries = [{"Id": "0", "ReceiptHandle": "h0", "VisibilityTimeout": sent}]
        assert stub.asked("ChangeMessageVisibilityBatch")[-1] == {"QueueUrl": URL, "Entries": entries}


async def test_expiry_is_counted_from_before_the_call(stub, source) -> None:
    """An answer that took its time does not make a receipt last longer."""
    clock, arrived = source._clock, []

    async def slow(request: web.Request) -> web.Response:
        arrived.append(clock.now())
        await asyncio.sleep(0.05)
        return web.json_response({"Messages": [MESSAGE]})

    stub.script["ReceiveMessage"] = [slow]
    [record] = await source.receive(1, 0, 30.0)
    assert record.expires <= arrived[0] + 30


async def test_batches_have_ten_entries_and_run_at_once(stub, source) -> None:
    """25 messages are three calls, all under way before the first is answered."""
    arrived = asyncio.Barrier(3)

    async def together(request: web.Request) -> web.Response:
        await arrived.wait()
        return await everything(request)

    stub.script["DeleteMessageBatch"] = [together]
    async with asyncio.timeout(5):
        assert list(await source.delete(records(25))) == []
    assert sorted(len(call["Entries"]) for call in stub.asked("DeleteMessageBatch")) == [5, 10, 10]
    assert list(await source.delete([])) == []
    assert len(stub.asked("DeleteMessageBatch")) == 3


async def test_what_sqs_failed_is_tried_again(stub, source) -> None:
    """Only the entries that failed, and those that the answer does not mention."""
    stub.script["DeleteMessageBatch"] = [
        {**done("0"), "Failed": [{"Id": "1", "Code": "InternalError", "SenderFault": False}]},
        done("0", "1"),
    ]
    three = records(3)
    assert list(await source.delete(three)) == []
    assert [[entry["ReceiptHandle"] for entry in call["Entries"]] for call in stub.asked("DeleteMessageBatch")] == [
        ["h0", "h1", "h2"],
        ["h1", "h2"],
    ]


@pytest.mark.parametrize("first", [truncated, html_error, error("RequestThrottled", status=403)])
async def test_a_call_without_an_answer_is_tried_again(stub, source, first) -> None:
    """A throttle, a 5xx or a truncated answer is not the end: deletes may be repeated."""
    stub.script["DeleteMessageBatch"] = [first, everything]
    assert list(await source.delete(records(2))) == []
    assert len(stub.asked("DeleteMessageBatch")) == 2


async def test_what_we_did_wrong_is_not_tried_again(stub, source) -> None:
    """A bad receipt stays bad: it is answered, and logged without its receipt."""
    stub.script["DeleteMessageBatch"] = [
        {**done("0"), "Failed": [{"Id": "1", "Code": "ReceiptHandleIsInvalid", "SenderFault": True}]}
    ]
    two = records(2)
    with capture_logs() as logs:
        assert list(await source.delete(two)) == two[1:]
    assert len(stub.asked("DeleteMessageBatch")) == 1
    assert logs == [
        {
            "event": "queue_change_failed",
            "log_level": "warning",
            "operation": "DeleteMessageBatch",
            "queue": SPEC.arn,
            "messages": 1,
            "reason": "ReceiptHandleIsInvalid",
        }
    ]


async def test_a_refused_call_is_answered_at_once(stub, source) -> None:
    """AccessDenied is no exception here: nothing was deleted, which is what the caller is told."""
    stub.script["DeleteMessageBatch"] = [error("AccessDenied", "not authorized", 403)]
    two = records(2)
    with capture_logs() as logs:
        assert list(await source.delete(two)) == two
    assert len(stub.asked("DeleteMessageBatch")) == 1
    assert logs[0]["reason"] == "DeleteMessageBatch: AccessDenied: not authorized"


async def test_a_partial_failure_of_one_call_leaves_the_others_alone(stub, source) -> None:
    """The answer names the failed messages of all calls, in order."""

    async def first_fails(request: web.Request) -> web.Response:
        ids = [entry["Id"] for entry in json.loads(await request.read())["Entries"]]
        failed = [{"Id": ids[0], "Code": "InvalidParameterValue", "SenderFault": True}]
        return web.json_response({**done(*ids[1:]), "Failed": failed})

    stub.script["ChangeMessageVisibilityBatch"] = [first_fails]
    many = records(12)
    assert list(await source.extend(many, 60)) == [many[0], many[10]]


async def test_a_delete_that_succeeds_waits_for_nothing(stub, source, monkeypatch) -> None:
    """One call; the pause between tries is only for what failed. It once cost every batch 0.1 s."""

    async def never(_: float) -> None:
        raise AssertionError("a pause without a failure")

    stub.script["GetQueueUrl"] = [{"QueueUrl": f"{stub.url}/1/q"}]
    stub.script["DeleteMessageBatch"] = [{"Successful": [{"Id": "0"}]}]
    monkeypatch.setattr("poller.sources.sqs.asyncio.sleep", never)
    assert await source.delete([Record("m", "", 0.0, b"{}", handle="h")]) == []
    assert len(stub.asked("DeleteMessageBatch")) == 1
