"""SQS queues, standard and FIFO (semantics.md 8)."""

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import structlog

from poller.aws.errors import ErrorTable, translate, translated
from poller.aws.lean import AwsError, LeanClient, parse
from poller.aws.queues import queue_url
from poller.aws.session import COLD_TIMEOUT, AwsClients
from poller.core.model import NO_TRACE, Record, SourceSpec, Trace
from poller.errors import PollerError, SourceThrottled, SourceUnavailable
from poller.ports import Clock

RECEIVE_LIMIT = 10  # messages of one ReceiveMessage, and of one batch call
MAX_WAIT = 20.0
MAX_VISIBILITY = 43_200.0

_TRAVEL = 1.0  # seconds that an answer may have been on its way
_CALL_TIMEOUT = 10.0  # beyond the wait of a long poll
_BATCH_TRIES = 6
_BATCH_PAUSE = 0.1  # before the second try; doubled for each further one
_BATCH_CALLS = 16  # at once
_IDS = tuple(str(index) for index in range(RECEIVE_LIMIT))
_HIDDEN_ATTRIBUTE = "SqsManagedSseEnabled"  # Lambda does not pass it on
_ERRORS: ErrorTable = {}

# W3C Trace Context 3.2 and 3.3. Anybody may write the attributes; what has not this form is not taken along.
_TRACE_PARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_TRACE_KEY = r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
_TRACE_ENTRY = rf"{_TRACE_KEY}=[ -+\--<>-~]{{0,255}}[!-+\--<>-~]"
_TRACE_STATE = re.compile(rf"(?=.{{1,512}}\Z){_TRACE_ENTRY}(?:[ \t]*,[ \t]*{_TRACE_ENTRY}){{0,31}}")

_MOST_DIGITS = 15  # of a SentTimestamp: thirty thousand years
_ABSENT = msgspec.Raw(b"")  # a default that no JSON value equals; `Raw | None` would not stay raw


class MessageAttribute(msgspec.Struct, rename="pascal"):
    """A message attribute. SQS has never sent lists; a value that is absent here is absent from the event."""

    data_type: msgspec.Raw
    string_value: msgspec.Raw = _ABSENT
    binary_value: msgspec.Raw = _ABSENT


class Message(msgspec.Struct):
    """A message of ReceiveMessage. Body and digests stay the JSON strings that came."""

    MessageId: str
    ReceiptHandle: str
    Body: msgspec.Raw
    MD5OfBody: msgspec.Raw
    Attributes: dict[str, str] | None = None
    MessageAttributes: dict[str, MessageAttribute] | None = None
    MD5OfMessageAttributes: msgspec.Raw = _ABSENT


class _Received(msgspec.Struct):
    Messages: list[Message] | None = None


class _Succeeded(msgspec.Struct):
    Id: str


class _Refused(msgspec.Struct):
    Id: str
    Code: str = ""
    SenderFault: bool = False


class _Changed(msgspec.Struct):
    Successful: list[_Succeeded] | None = None
    Failed: list[_Refused] | None = None


_receptions = msgspec.json.Decoder(_Received)
_text = msgspec.json.Decoder(str)
_changes = msgspec.json.Decoder(_Changed)
_json = msgspec.json.Encoder().encode
_log = structlog.get_logger()


class Encoder:
    """Messages of one queue as Lambda shows them (semantics.md 8.7, key order included).

    `windowed`: the mapping has a batching window; then the digest of absent message attributes is null, else absent.
    """

    __slots__ = ("_fifo", "_no_digest", "_tail")

    def __init__(self, spec: SourceSpec, *, windowed: bool) -> None:
        self._fifo = spec.fifo
        self._no_digest = b',"md5OfMessageAttributes":null' if windowed else b""
        self._tail = b',"eventSource":"aws:sqs","eventSourceARN":%b,"awsRegion":%b}' % (
            _json(spec.arn),
            _json(spec.region),
        )

    def encode(self, message: Message, now: float, expires: float) -> Record:
        """The message with its wire bytes. `now` stands in for a SentTimestamp that did not come."""
        attributes = message.Attributes or {}
        shown = attributes
        if _HIDDEN_ATTRIBUTE in attributes:
            shown = {name: value for name, value in attributes.items() if name != _HIDDEN_ATTRIBUTE}
        digest = message.MD5OfMessageAttributes
        wire = b"".join(
            (
                b'{"messageId":',
                _json(message.MessageId),
                b',"receiptHandle":',
                _json(message.ReceiptHandle),
                b',"body":',
                message.Body,
                b',"attributes":',
                _json(shown),
                b',"messageAttributes":',
                _message_attributes(message.MessageAttributes) if message.MessageAttributes else b"{}",
                self._no_digest if digest is _ABSENT else b',"md5OfMessageAttributes":%b' % digest,
                b',"md5OfBody":',
                message.MD5OfBody,
                self._tail,
            )
        )
        sent = attributes.get("SentTimestamp", "")
        return Record(
            message.MessageId,
            # A group of a standard queue is about fairness, not order.
            attributes.get("MessageGroupId", "") if self._fifo else "",
            int(sent) / 1000 if sent.isascii() and sent.isdigit() and len(sent) <= _MOST_DIGITS else now,
            wire,
            message.ReceiptHandle,
            expires,
            _trace(attributes.get("AWSTraceHeader", ""), message.MessageAttributes or {}),
        )


def _trace(xray: str, attributes: Mapping[str, MessageAttribute]) -> Trace:
    """Of the system attribute that X-Ray writes, and the message attributes that OpenTelemetry does."""
    parent = _trace_attribute(attributes, "traceparent", _TRACE_PARENT)
    if not parent:
        return Trace(xray) if xray else NO_TRACE
    return Trace(xray, parent, _trace_attribute(attributes, "tracestate", _TRACE_STATE))


def _trace_attribute(attributes: Mapping[str, MessageAttribute], name: str, form: re.Pattern[str]) -> str:
    if (attribute := attributes.get(name)) is None:
        return ""
    try:
        value = _text.decode(attribute.string_value)
    except msgspec.DecodeError:  # binary: there is no text
        return ""
    return value if form.fullmatch(value) else ""


def _message_attributes(attributes: Mapping[str, MessageAttribute]) -> bytes:
    items: list[bytes] = []
    for name, attribute in attributes.items():
        text, blob = attribute.string_value, attribute.binary_value
        items.append(
            b'%b:{%b%b"stringListValues":[],"binaryListValues":[],"dataType":%b}'
            % (
                _json(name),
                b"" if text is _ABSENT else b'"stringValue":%b,' % text,
                b"" if blob is _ABSENT else b'"binaryValue":%b,' % blob,
                attribute.data_type,
            )
        )
    return b"{" + b",".join(items) + b"}"


class SqsSource:
    """A `QueueSource`. Talks to the service's endpoint; a queue URL is a name here, never dialled."""

    def __init__(self, spec: SourceSpec, clients: AwsClients, clock: Clock, *, windowed: bool) -> None:
        self._spec = spec
        self._clients = clients
        self._clock = clock
        self._encode = Encoder(spec, windowed=windowed).encode
        self._url: str | None = None
        self._calls = asyncio.Semaphore(_BATCH_CALLS)

    async def visibility_timeout(self) -> float:
        """The queue's own, in seconds."""
        url = await self._queue_url()
        client = await self._clients.client("sqs", self._spec.region)
        with translated("GetQueueAttributes", _ERRORS):
            async with asyncio.timeout(COLD_TIMEOUT):
                answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["VisibilityTimeout"])
        try:
            seconds = float(answer["Attributes"]["VisibilityTimeout"])
        except (LookupError, OverflowError, TypeError, ValueError):
            seconds = -1.0
        if not 0 <= seconds <= MAX_VISIBILITY:
            raise SourceUnavailable("GetQueueAttributes: the answer has no VisibilityTimeout")
        return seconds

    async def receive(self, limit: int, wait: float, visibility: float) -> Sequence[Record]:
        """At most 10 messages after at most `wait` seconds, in whole seconds, rounded down; `visibility` rounded up."""
        seconds = math.ceil(min(visibility, MAX_VISIBILITY))
        whole_wait = int(min(wait, MAX_WAIT))
        request = {
            "QueueUrl": await self._queue_url(),
            "MaxNumberOfMessages": min(limit, RECEIVE_LIMIT),
            "WaitTimeSeconds": whole_wait,
            "VisibilityTimeout": seconds,
            "MessageSystemAttributeNames": ["All"],
            "MessageAttributeNames": ["All"],
        }
        lean = await self._lean()
        asked = self._clock.now()
        try:
            body = await lean.call("AmazonSQS.ReceiveMessage", _json(request), whole_wait + _CALL_TIMEOUT)
        except AwsError as error:
            raise translate(error, _ERRORS, "ReceiveMessage") from None
        messages = parse(_receptions, body, "ReceiveMessage").Messages
        if not messages:
            return ()
        now = self._clock.now()
        # The timeout runs from when SQS gave the messages away: at the end of a long poll, not at its start. How long
        # the answer then travelled, and waited here to be read, is not known.
        expires = max(asked, now - min(_TRAVEL, seconds / 4)) + seconds
        return [self._encode(message, now, expires) for message in messages]

    async def delete(self, records: Sequence[Record]) -> Sequence[Record]:
        """Delete in tens; answers those that were not deleted, after a few tries."""
        return await self._change("DeleteMessageBatch", records, {})

    async def extend(self, records: Sequence[Record], seconds: float) -> Sequence[Record]:
        """Set visibility, in whole seconds rounded up, in tens; answers those that were not changed."""
        timeout = math.ceil(min(max(seconds, 0.0), MAX_VISIBILITY))
        return await self._change("ChangeMessageVisibilityBatch", records, {"VisibilityTimeout": timeout})

    async def close(self) -> None:
        """Nothing to release: connections belong to the process."""

    async def _change(self, operation: str, records: Sequence[Record], extra: Mapping[str, Any]) -> list[Record]:
        chunks = [records[start : start + RECEIVE_LIMIT] for start in range(0, len(records), RECEIVE_LIMIT)]
        if len(chunks) == 1:
            return await self._change_ten(operation, chunks[0], extra)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._change_ten(operation, chunk, extra)) for chunk in chunks]
        return [record for task in tasks for record in task.result()]

    async def _change_ten(self, operation: str, records: Sequence[Record], extra: Mapping[str, Any]) -> list[Record]:
        """Those of ten that were not changed. Tries again what failed by SQS's fault or got no answer."""
        refused: list[Record] = []
        left = list(records)
        reason = ""
        for attempt in range(_BATCH_TRIES):
            if attempt:
                await asyncio.sleep(_BATCH_PAUSE * 2 ** (attempt - 1))
            try:
                answer = await self._send_change(operation, left, extra)
            except (SourceThrottled, SourceUnavailable) as error:
                reason = str(error)
                continue
            except PollerError as error:
                reason = str(error)
                break
            done = {entry.Id for entry in answer.Successful or ()}
            if done.issuperset(_IDS[: len(left)]):
                left = []
                break
            faults = {entry.Id for entry in answer.Failed or () if entry.SenderFault} - done
            reason = next((entry.Code for entry in answer.Failed or ()), "") or reason
            refused += [record for index, record in enumerate(left) if str(index) in faults]
            left = [record for index, record in enumerate(left) if str(index) not in done | faults]
            if not left:
                break  # not at the top of the loop: there everything that went well would wait for the pause
        refused += left
        if refused:
            _log.warning(
                "queue_change_failed", operation=operation, queue=self._spec.arn, messages=len(refused), reason=reason
            )
        return refused

    async def _send_change(self, operation: str, records: Sequence[Record], extra: Mapping[str, Any]) -> _Changed:
        entries = [
            {"Id": name, "ReceiptHandle": record.handle, **extra} for name, record in zip(_IDS, records, strict=False)
        ]
        body = _json({"QueueUrl": await self._queue_url(), "Entries": entries})
        lean = await self._lean()
        async with self._calls:
            try:
                answer = await lean.call(f"AmazonSQS.{operation}", body, _CALL_TIMEOUT)
            except AwsError as error:
                raise translate(error, _ERRORS, operation) from None
        return parse(_changes, answer, operation)

    async def _queue_url(self) -> str:
        if self._url is None:
            spec = self._spec
            self._url = await queue_url(self._clients, spec.region, spec.account, spec.name)
        return self._url

    async def _lean(self) -> LeanClient:
        return await self._clients.lean("sqs", self._spec.region)
