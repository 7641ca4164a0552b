"""Payloads in the log: only when they are asked for, masked, and only their beginning."""

import pytest

from poller.core.model import NO_TRACE, Delivered, Failed, Invocation, Reply, ReplyStatus, Throttled
from poller.mappings import build, normalize, parse_source, resolve_function
from poller.runtime.payloads import payload_log
from poller.settings import LogSettings
from poller.telemetry import PAYLOAD_CHARACTERS, configure_logging
from tests.unit.test_telemetry import lines, stream

__all__ = ["stream"]

SECRET = "correct horse battery"
DOCUMENT = {"EventSourceArn": "arn:aws:sqs:eu-west-1:123456789012:q", "FunctionName": "f"}
FUNCTION, _ = resolve_function("f", {}, parse_source(DOCUMENT["EventSourceArn"]))
MAPPING = build("m", normalize(DOCUMENT), FUNCTION, None)
FAILED = Failed("answered 500")


@pytest.fixture(autouse=True)
def off():
    """As it was, afterwards."""
    yield
    payload_log.is_on = False


@pytest.fixture
def log(stream):
    """Lines of a log that shows payloads."""
    configure_logging(LogSettings("debug", "json", payloads=True), {SECRET}, stream)
    return lambda: lines(stream)


def call(body):
    return Invocation("m", "request-1", 2, "k", body, NO_TRACE)


def test_a_payload_is_logged_with_its_request(log):
    """The event's ids are those of every other line of the invocation."""
    payload_log.sent(MAPPING, call(b'{"Records":[1]}'))
    [entry] = log()
    assert {key: value for key, value in entry.items() if key != "timestamp"} == {
        "level": "debug",
        "event": "invocation_payload",
        "mapping": "m",
        "function": "f",
        "request_id": "request-1",
        "attempt": 2,
        "bytes": 15,
        "payload": '{"Records":[1]}',
    }


@pytest.mark.parametrize("outcome", [FAILED, Throttled("answered 429", None)])
def test_a_failure_shows_the_answer(log, outcome):
    """What the function said, bytes that are no text included."""
    reply = Reply(ReplyStatus.FUNCTION_ERROR, b"boom \xff", status_code=500)
    payload_log.answered(MAPPING, call(b""), reply, outcome)
    [entry] = log()
    assert (entry["event"], entry["request_id"], entry["status"]) == ("invocation_answer", "request-1", 500)
    assert entry["payload"] == "boom \ufffd"


def test_a_success_does_not(log):
    """There is nothing to look for."""
    payload_log.answered(MAPPING, call(b""), Reply(ReplyStatus.OK, b"fine"), Delivered())
    assert log() == []


def test_secrets_are_masked_in_it_and_at_its_end(log):
    """One that begins just before the cut too."""
    body = "x" * (PAYLOAD_CHARACTERS - 10) + SECRET + "y" * 100
    payload_log.sent(MAPPING, call(body.encode()))
    [entry] = log()
    assert len(entry["payload"]) == PAYLOAD_CHARACTERS
    assert entry["bytes"] == len(body)
    assert "correct" not in entry["payload"]


@pytest.mark.parametrize(
    ("level", "payloads", "is_on"), [("debug", True, True), ("debug", False, False), ("info", True, False)]
)
def test_a_reload_switches_it(stream, level, payloads, is_on):
    """It needs both, the level and the key."""
    configure_logging(LogSettings(level, "json", payloads=payloads), (), stream)
    assert payload_log.is_on is is_on
    configure_logging(LogSettings(), (), stream)
    assert not payload_log.is_on
