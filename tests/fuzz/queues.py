"""What SQS answers, and every service's errors."""

import asyncio
import json

from poller.aws.errors import translate
from poller.aws.lean import AwsError, parse_error, safe_text
from poller.core import replies
from poller.core.model import Record, SourceKind, SourceSpec
from poller.errors import AccessDenied, PollerError, SourceGone, SourceThrottled, SourceUnavailable
from poller.sources import sqs
from tests.fuzz.kit import Target, run, silent
from tests.fuzz.streams import ACCOUNT, REGION, Clients, Clock

FIFO = SourceSpec(SourceKind.SQS, f"arn:aws:sqs:{REGION}:{ACCOUNT}:jobs.fifo", REGION, ACCOUNT, "jobs.fifo", True)
_URL = f"https://sqs.{REGION}.amazonaws.com/{ACCOUNT}/jobs.fifo"


def _open(body: bytes) -> sqs.SqsSource:
    source = sqs.SqsSource(FIFO, Clients(body), Clock(), windowed=True)
    source._url = _URL
    return source


def received(document: bytes) -> None:
    """ReceiveMessage: messages that are one JSON object each, or none."""
    try:
        records = run(_open(document).receive(10, 20.0, 30.0))
    except SourceUnavailable as error:
        silent(error)
        return
    event = json.loads(replies.payload(records).decode(errors="replace"))
    assert len(event["Records"]) == len(records)
    for record, shown in zip(records, event["Records"], strict=True):
        assert shown["eventSourceARN"] == FIFO.arn
        assert shown["messageId"] == record.id
        assert shown["receiptHandle"] == record.handle
        assert record.expires > record.arrival - 1e12
    if not records:
        found = json.loads(document.decode(errors="replace"))
        assert isinstance(found, dict)
        assert not found.get("Messages"), "messages are lost"


def changed(document: bytes) -> None:
    """DeleteMessageBatch and ChangeMessageVisibilityBatch: what the answer does not name as done is not done."""
    source = _open(document)
    asked = [Record(name, "", 0.0, b"{}", f"receipt-{name}") for name in "abc"]

    async def change() -> list[Record]:
        return [*await source.delete(asked)]

    async def no_pause(_seconds: float) -> None:
        """The tries follow one another at once."""

    pause, asyncio.sleep = asyncio.sleep, no_pause  # type: ignore[assignment]
    try:
        left = run(change())
    finally:
        asyncio.sleep = pause
    assert all(record in asked for record in left)
    assert len(left) == len(set(left))
    done = [record for record in asked if record not in left]
    if done:
        assert json.loads(document.decode(errors="replace"))["Successful"], "a damaged answer counted as done"


def visibility(document: bytes) -> None:
    """GetQueueAttributes."""
    try:
        seconds = run(_open(document).visibility_timeout())
    except (SourceUnavailable, SourceThrottled, SourceGone, AccessDenied) as error:
        silent(error)
    else:
        assert 0 <= seconds < 1e9


def split(document: bytes) -> tuple[int, dict[str, str], bytes]:
    """A status line, header lines, an empty line, a body."""
    head, _, body = document.partition(b"\n\n")
    first, *lines = head.decode("latin-1").split("\n")
    pairs = (line.partition(":") for line in lines)
    status = int(first) if first.isascii() and first.isdigit() and len(first) == 3 else 400
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}, body


def errors(document: bytes) -> None:
    """An answer that is no success becomes one line, short, without access keys and passwords."""
    status, headers, body = split(document)
    error = parse_error(status, headers, body)
    assert isinstance(error, AwsError)
    assert error.code
    kind = translate(error, {}, "Operation")
    assert isinstance(kind, PollerError)
    assert len(str(kind)) < 700
    secret_free(error.message)


def secret_free(text: str) -> None:
    """What `safe_text` promises, once more: nothing is left for it to take out."""
    assert "\n" not in text
    assert safe_text(text) == text.strip()
    text.encode()


def texts(document: bytes) -> None:
    """A password or an access key in a text of any length is not shown, nor the beginning of one."""
    text = document.decode(errors="replace").partition("\n")[0]
    shown = safe_text(f"{text} http://user:sEcretPa55w0rd@proxy AKIAQQQQQQQQQQQQQQQQ")
    for secret in ("sEcr", "AKIAQ"):
        assert secret in text or secret not in shown, shown


TARGET = Target(
    "queues",
    {"receive": received, "change": changed, "visibility": visibility, "error": errors, "text": texts},
)
