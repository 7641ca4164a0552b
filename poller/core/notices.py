"""Discarded batches -> AWS's failure records; failure records, Lambda's own too, -> what they say (semantics 10)."""

import json
import re
import uuid
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from poller.core.flow import lane_of
from poller.core.model import (
    Checkpoint,
    DiscardReason,
    MappingId,
    Notice,
    Position,
    PositionKind,
    ShardId,
    SourceKind,
    Window,
)
from poller.core.replies import payload, window_tail
from poller.core.tumbling import NO_STATE, TumblingWindow

UNKNOWN_STATE = b""  # of a window whose failure record came without it

_BATCH_INFO = {SourceKind.KINESIS: "KinesisBatchInfo", SourceKind.DYNAMODB: "DDBStreamBatchInfo"}
_POINTER = "store:"
_IDENTITY = uuid.UUID("6f1d4c0e-3a52-5b0e-9a55-0d6a3f3ef1c7")  # of no meaning; it keeps our UUIDs apart from others'
_MOST_WRAPPERS = 3  # record in an EventBridge event in an SNS notification, and one to spare
_MOST_COUNT = 2**31  # of records and invocations: more is nonsense that nobody should have to print
_END_OF_TIME = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
_SEQUENCE = re.compile("[0-9]{1,128}")
_ALL_LANES = 2**32  # with so many, a lane is the hash that decides for every other number of them


class Report(NamedTuple):
    """A failure record as bytes. `is_kept_in_store`: it points there, so the payload must be there before it."""

    body: bytes
    is_kept_in_store: bool = False


def record(notice: Notice) -> dict[str, Any]:
    """The failure record, with AWS's members in AWS's order."""
    mapping = notice.mapping
    made: dict[str, Any] = {
        "requestContext": {
            "requestId": notice.request_id,
            "functionArn": mapping.function.arn,
            "condition": notice.reason.value,
            "approximateInvokeCount": max(1, notice.attempts),
        }
    }
    # In no recording does a record that has aged out say what the function answered, even after several invocations.
    if notice.response is not None and notice.reason is not DiscardReason.AGE:
        made["responseContext"] = {
            "statusCode": notice.response.status_code,
            "executedVersion": notice.response.executed_version,
            "functionError": notice.response.function_error,
        }
    made["version"] = "1.0"
    made["timestamp"] = _milliseconds(notice.at)
    made[_BATCH_INFO[mapping.source.kind]] = _batch_info(notice)
    if notice.window is not None:
        made["timeWindowInfo"] = {
            "window": {"start": _seconds(notice.window.start), "end": _seconds(notice.window.end)},
            "isFinalInvokeForWindow": notice.window.is_final,
            "isWindowTerminatedEarly": notice.window.is_early,
        }
    return made


def _batch_info(notice: Notice) -> dict[str, Any]:
    """`streamArn` is the consumer's with enhanced fan-out. A final invocation without records has no extent."""
    source, records = notice.mapping.source, notice.records
    extent: dict[str, Any] = {}
    if records:
        instant = _milliseconds if source.kind is SourceKind.KINESIS else _seconds
        extent = {
            "startSequenceNumber": records[0].id,
            "endSequenceNumber": records[-1].id,
            "approximateArrivalOfFirstRecord": instant(records[0].arrival),
            "approximateArrivalOfLastRecord": instant(records[-1].arrival),
            "batchSize": len(records),
        }
    return {"shardId": notice.shard, **extent, "streamArn": source.arn}


def body(notice: Notice) -> bytes:
    """The record as SQS and SNS get it: no data."""
    return _encode(record(notice))


def body_with_payload(notice: Notice) -> bytes:
    """The record as S3 gets it: `payload` is the whole event as a JSON string, not as an object."""
    return _encode({**record(notice), "payload": event(notice)})


def report(notice: Notice, limit: int | None) -> Report:
    """What a destination gets whose bodies have at most `limit` bytes; None: it takes any, and always the payload.

    With `Options.IncludePayload` the payload is there when it fits, else `payloadPointer` says where it is kept.
    """
    if limit is None:
        return Report(body_with_payload(notice))
    destination = notice.mapping.destination
    if destination is None or not destination.include_payload:
        return Report(body(notice))
    whole = body_with_payload(notice)
    if len(whole) <= limit:
        return Report(whole)
    return Report(_encode({**record(notice), "payloadPointer": _POINTER + notice.request_id}), is_kept_in_store=True)


def identity(notice: Notice) -> str:
    """A UUID: the same whenever this notice is sent again, never another notice's.

    Its request id alone is not enough: when the records of one failed invocation age out one after the other, each is
    a notice of its own with the request id of that invocation.
    """
    start, end = (notice.records[0].id, notice.records[-1].id) if notice.records else ("", "")
    return identity_of(notice.mapping.id, notice.shard, notice.request_id, notice.reason.value, start, end)


def identity_of(  # noqa: PLR0917
    mapping: MappingId, shard: ShardId, request_id: str, condition: str, start: str, end: str
) -> str:
    """The same, of a notice that is known by its failure record. Without records `start` and `end` are empty."""
    extent = (start, end) if start else ()
    return str(uuid.uuid5(_IDENTITY, "\n".join((mapping, shard, request_id, condition, *extent))))


def s3_key(notice: Notice, unique: str) -> str:
    """`aws/lambda/MAPPING/SHARD/YYYY/MM/DD/YYYY-MM-DDTHH.MM.SS-UNIQUE`, from the record's `timestamp`, in UTC."""
    at = datetime.fromtimestamp(notice.at, UTC)
    return f"aws/lambda/{notice.mapping.id}/{notice.shard}/{at:%Y/%m/%d/%Y-%m-%dT%H.%M.%S}-{unique}"


def event(notice: Notice) -> str:
    """The event as it was, or would have been, invoked. What is not UTF-8, which AWS never sends, is replaced."""
    window, source = notice.window, notice.mapping.source
    whole = (
        payload(notice.records, window_tail(window, notice.shard, source.arn)) if window else payload(notice.records)
    )
    return whole.decode(errors="replace")


def _encode(document: dict[str, Any]) -> bytes:
    """Compact UTF-8. Two characters that SQS takes in no message are escaped; they would hold a lane for ever."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff").encode()


def _milliseconds(at: float) -> str:
    return _moment(at).isoformat(timespec="milliseconds") + "Z"


def _seconds(at: float) -> str:
    return _moment(at).isoformat(timespec="seconds") + "Z"


def _moment(at: float) -> datetime:
    """In UTC. A source may say anything of a record: what no calendar has becomes the nearest moment that it has."""
    return datetime.fromtimestamp(min(max(at, 0.0), _END_OF_TIME), UTC).replace(tzinfo=None)


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """A failure record, read. `start` and `end` are sequence numbers, both included.

    `start`, `end` and `count` are empty and 0 for the final invocation of a tumbling window that had no records.
    `payload`: the whole event. `kept_as`: the request id under which a store has it. Both None: read the stream again.
    `window`: that of the invocation; its state is not known, unless it is in the payload.
    """

    request_id: str
    function_arn: str
    condition: str
    attempts: int
    at: float
    kind: SourceKind
    stream_arn: str
    shard: ShardId
    start: str
    end: str
    count: int
    payload: bytes | None = None
    kept_as: str | None = None
    window: Window | None = None


def parse(text: str | bytes) -> FailureRecord:
    """Read a failure record: ours or Lambda's own, with or without payload, also in the envelopes that an SQS queue
    gets from SNS and from EventBridge. ValueError: a sentence that says why it is none.
    """
    document = _unwrapped(text)
    if "requestContext" not in document:
        raise ValueError("it has no requestContext, so it is not a failure record")
    found = [(kind, name) for kind, name in _BATCH_INFO.items() if name in document]
    if not found:
        if "requestPayload" in document:
            raise ValueError("it is the record of an asynchronous invocation, not of an event source mapping")
        raise ValueError("it has neither KinesisBatchInfo nor DDBStreamBatchInfo")
    kind, name = found[0]
    context, info = _object(document, "requestContext"), _object(document, name)
    count = info.get("batchSize", 0)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < _MOST_COUNT:
        raise ValueError(f"{name}.batchSize is not a number of records")
    attempts = context.get("approximateInvokeCount", 1)
    if not isinstance(attempts, int) or isinstance(attempts, bool) or not 0 <= attempts < _MOST_COUNT:
        raise ValueError("requestContext.approximateInvokeCount is not a number")
    event = _payload(document)
    return FailureRecord(
        request_id=_text(context, "requestContext.requestId"),
        function_arn=_text(context, "requestContext.functionArn"),
        condition=_text(context, "requestContext.condition"),
        attempts=attempts,
        at=_instant(document, "timestamp"),
        kind=kind,
        stream_arn=_text(info, f"{name}.streamArn"),
        shard=_text(info, f"{name}.shardId"),
        start=_sequence(info, f"{name}.startSequenceNumber", count),
        end=_sequence(info, f"{name}.endSequenceNumber", count),
        count=count,
        payload=None if event is None else event[0],
        kept_as=_pointer(document),
        window=_window(document, None if event is None else event[1]),
    )


def _unwrapped(text: str | bytes) -> dict[str, Any]:
    inner: Any = text
    for _ in range(_MOST_WRAPPERS):
        document = _json(inner, "it") if isinstance(inner, str | bytes) else inner
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")  # noqa: TRY004
        if document.get("Type") == "Notification" and isinstance(document.get("Message"), str):
            inner = document["Message"]
        elif "detail-type" in document and "detail" in document:
            inner = document["detail"]
        else:
            return document
    raise ValueError(f"it is wrapped in more than {_MOST_WRAPPERS - 1} envelopes")


def _json(text: str | bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the parser's own text would quote the document
        raise ValueError(f"{name} is not JSON") from None


def _object(document: dict[str, Any], path: str) -> dict[str, Any]:
    value = document.get(path.rpartition(".")[2])
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")  # noqa: TRY004  # it is the text that is wrong
    return value


def _text(document: dict[str, Any], path: str) -> str:
    """Names and numbers as text. Half a character pair could not even be printed, a line break would forge a line."""
    value = document.get(path.rpartition(".")[2])
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path} is missing or not a string")
    if not value.isprintable():
        raise ValueError(f"{path} has characters that cannot be printed")
    return value


def _sequence(info: dict[str, Any], path: str, count: int) -> str:
    """A batch with records has both ends, one without has none."""
    if count == 0:
        return ""
    value = _text(info, path)
    if _SEQUENCE.fullmatch(value) is None:
        raise ValueError(f"{path} is not a sequence number")
    return value


def _instant(document: dict[str, Any], path: str) -> float:
    value = _text(document, path)
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{path} is not a time") from None
    if at.tzinfo is None:
        raise ValueError(f"{path} has no time zone")
    if not 0 <= at.timestamp() <= _END_OF_TIME:
        raise ValueError(f"{path} is not between 1970 and 9999")
    return at.timestamp()


def _payload(document: MappingABC[str, Any]) -> tuple[bytes, dict[str, Any]] | None:
    """The event's bytes, and the event."""
    if "payload" not in document:
        return None
    text = document["payload"]
    event = _json(text, "payload") if isinstance(text, str) else None
    if not isinstance(event, dict) or not isinstance(event.get("Records"), list):
        raise ValueError("payload is not an event in a JSON string")  # noqa: TRY004
    return str(text).encode(errors="replace"), event


def _pointer(document: dict[str, Any]) -> str | None:
    if "payloadPointer" not in document:
        return None
    pointer = _text(document, "payloadPointer")
    if not pointer.startswith(_POINTER) or pointer == _POINTER:
        raise ValueError(f"payloadPointer does not begin with {_POINTER}")
    return pointer.removeprefix(_POINTER)


def _window(document: dict[str, Any], event: dict[str, Any] | None) -> Window | None:
    if "timeWindowInfo" not in document:
        return None
    info = _object(document, "timeWindowInfo")
    window = _object(info, "timeWindowInfo.window")
    return Window(
        start=_instant(window, "timeWindowInfo.window.start"),
        end=_instant(window, "timeWindowInfo.window.end"),
        state=_state(event.get("state") if event else None),
        is_final=info.get("isFinalInvokeForWindow") is True,
        is_early=info.get("isWindowTerminatedEarly") is True,
    )


def _state(value: Any) -> bytes:
    """A window's state in the form in which the daemon has it: an Idempotency-Key is made of these bytes."""
    try:
        return json.dumps(value, separators=(",", ":")).encode() if isinstance(value, dict) else UNKNOWN_STATE
    except RecursionError:
        raise ValueError("the window's state is nested too deeply") from None


@dataclass(frozen=True, slots=True)
class Kept:
    """A discarded batch as the store remembers it. `ids`: the sequence numbers of its records. `hashes`: of their keys,
    which tell their lanes; empty when they are not known. `window`: that of the last invocation, with its state.
    """

    ids: tuple[str, ...] = ()
    hashes: tuple[int, ...] = ()
    payload: bytes | None = None
    window: Window | None = None

    def is_settled(self, checkpoint: Checkpoint) -> bool:
        """Does a daemon that starts from this checkpoint of the shard leave the batch alone? Else it delivers it again,
        or gives it up again, itself. Never true of what is not settled, but for a final invocation in the instant
        before its window is saved for the first time.
        """
        if checkpoint.position.kind is PositionKind.END:
            return True
        if not self.ids:
            return self.window is None or self._is_over(self.window, TumblingWindow(0.0, checkpoint.window))
        match checkpoint.position:
            case Position(PositionKind.AT, value):
                next_sequence = int(value)
            case Position(PositionKind.AFTER, value):
                next_sequence = int(value) + 1
            case _:
                return False
        hashes = self.hashes or (None,) * len(self.ids)
        return all(
            int(each) < next_sequence or any(_floor(vector, lane) > int(each) for vector in checkpoint.resume)
            for each, lane in zip(self.ids, hashes, strict=True)
        )

    @staticmethod
    def _is_over(window: Window, saved: TumblingWindow) -> bool:
        if saved.start is None or saved.start > window.start:
            return True
        return window.is_early and saved.start == window.start and saved.state == NO_STATE


def _floor(vector: tuple[int, ...], key_hash: int | None) -> int:
    """As `flow.lane_of` picks a lane; of a key that is not known the floor of all lanes."""
    return min(vector) if key_hash is None else vector[key_hash % len(vector)]


def kept(notice: Notice, *, has_payload: bool) -> dict[str, Any]:
    """What the store keeps of a discarded batch, as JSON; `parse_kept` reads it. `has_payload`: with the whole event.

    A window's state is kept always: without it neither its final invocation nor a batch of it means anything.
    """
    document: dict[str, Any] = {
        "record": record(notice),
        "ids": [one.id for one in notice.records],
        "hashes": [lane_of(one.key, _ALL_LANES) for one in notice.records],
    }
    if has_payload:
        document["payload"] = event(notice)
    if notice.window is not None:
        document["window"] = {**notice.window._asdict(), "state": notice.window.state.decode()}
    return document


def parse_kept(document: MappingABC[str, Any]) -> Kept:
    """Read it. ValueError: somebody has edited it, and what is wrong now."""
    ids, hashes, window = document.get("ids", []), document.get("hashes", []), document.get("window")
    if not isinstance(ids, list) or not all(isinstance(one, str) and _SEQUENCE.fullmatch(one) for one in ids):
        raise ValueError("the ids of its store entry are not sequence numbers")
    if not isinstance(hashes, list) or not all(isinstance(one, int) for one in hashes) or len(hashes) != len(ids):
        hashes = []
    whole = _payload(document)
    return Kept(tuple(ids), tuple(hashes), None if whole is None else whole[0], _kept_window(window))


def _kept_window(window: Any) -> Window | None:
    if window is None:
        return None
    try:
        start, end, state = float(window["start"]), float(window["end"]), _state(_json(window["state"], "state"))
        if not (0 <= start <= end <= _END_OF_TIME and state != UNKNOWN_STATE):
            raise ValueError  # noqa: TRY301
        return Window(start, end, state, window["is_final"] is True, window["is_early"] is True)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("the window of its store entry is not one") from None
