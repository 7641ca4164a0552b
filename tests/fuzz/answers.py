"""What targets answer."""

import json
from math import isfinite
from types import SimpleNamespace
from typing import Any, NoReturn

from poller.aws.lean import LeanAnswer
from poller.core.model import (
    Delivered,
    Failed,
    Partial,
    Record,
    Reply,
    ReplyStatus,
    Throttled,
    Window,
)
from poller.core.replies import judge, payload, window_tail
from poller.settings import LambdaFunction
from poller.targets.answers import retry_after
from poller.targets.http import _rie_fault
from poller.targets.lambda_ import LambdaTarget
from tests.fuzz.kit import Target, silent
from tests.fuzz.queues import split
from tests.fuzz.streams import Clock

_RECORDS = tuple(Record(name, "", 0.0, b"{}") for name in ("1", "2", "3"))
_IDS = {record.id for record in _RECORDS}
_NOT_JSON: Any = object()


def _loaded(document: bytes) -> Any:
    try:
        return json.loads(document)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _check(outcome: Any, document: bytes, *, ordered: bool) -> None:
    """Only an answer that is sound from end to end is a success, of all or of a part."""
    found = _loaded(document)
    items = found.get("batchItemFailures") if isinstance(found, dict) else None
    match outcome:
        case Failed(error):
            silent(ValueError(error))
            assert document, "an empty answer is a success"
        case Delivered():
            assert not document or found is not _NOT_JSON, "what is not JSON counted as success"
            assert not items
            assert not (isinstance(found, list) and found)
        case Partial():
            assert isinstance(items, list)
            named = {item["itemIdentifier"] for item in items}
            assert named <= _IDS
            if ordered:
                assert _RECORDS[outcome.index].id == min(named)
            else:
                assert outcome.failed == named
                assert all(name in named and 0 <= delay <= 43_200 for name, delay in outcome.delays)
        case _:
            raise AssertionError(outcome)


def _judge(document: bytes, *, ordered: bool) -> None:
    reply = Reply(ReplyStatus.OK, document)
    _check(judge(reply, _RECORDS, report_failures=True, ordered=ordered), document, ordered=ordered)
    assert judge(reply, _RECORDS, report_failures=False, ordered=ordered) == Delivered()


def stream(document: bytes) -> None:
    """A batch response of a stream."""
    _judge(document, ordered=True)


def queue(document: bytes) -> None:
    """A batch response of a queue."""
    _judge(document, ordered=False)


def _not_json(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def window(document: bytes) -> None:
    """An answer within a tumbling window: its state comes back as it was, in an event that is JSON."""
    reply = Reply(ReplyStatus.OK, document)
    for is_final in (False, True):
        current = Window(0.0, 60.0, b"{}", is_final, False)
        for reports in (False, True):
            outcome = judge(reply, _RECORDS, report_failures=reports, ordered=True, window=current)
            if isinstance(outcome, Failed):
                silent(ValueError(outcome.error))
                continue
            if reports:
                _check(outcome, document, ordered=True)
            assert isinstance(outcome, Delivered | Partial)
            assert outcome.state is not None or is_final
            if outcome.state is not None:
                tail = window_tail(current._replace(state=outcome.state), "shard", "arn")
                event = json.loads(payload((), tail), parse_constant=_not_json)
                assert event["state"] == json.loads(document)["state"]


def rie(document: bytes) -> None:
    """The Runtime Interface Emulator's."""
    fault = _rie_fault(document)
    if not document:
        assert fault
    if fault:
        silent(ValueError(fault))


def retry(document: bytes) -> None:
    """`Retry-After`: a wait ahead, or nothing."""
    seconds = retry_after(document.decode("utf-8", "surrogateescape"), 1.78e9)
    assert seconds is None or (isfinite(seconds) and seconds >= 0)


def invoked(document: bytes) -> None:
    """What Lambda's Invoke answers: never an exception, and no words of the payload."""
    status, headers, body = split(document)
    headers = {name.title(): value for name, value in headers.items()}
    target = LambdaTarget(LambdaFunction("f", "f"), "eu-west-1", SimpleNamespace(), Clock())
    reply = target._judge(LeanAnswer(status, headers, body))
    outcome = judge(reply, _RECORDS, report_failures=True, ordered=True)
    if not 200 <= status < 300:
        assert isinstance(outcome, Failed | Throttled)
        silent(ValueError(reply.error))


TARGET = Target(
    "answers",
    {"stream": stream, "queue": queue, "window": window, "rie": rie, "retry": retry, "invoke": invoked},
)
