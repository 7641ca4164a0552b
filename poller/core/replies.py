"""Records -> the payload of an invocation; a target's reply -> what became of the batch."""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from poller.core.model import (
    Delivered,
    Failed,
    MappingId,
    Outcome,
    Partial,
    Record,
    Reply,
    ReplyStatus,
    ShardId,
    Throttled,
    Window,
)

_HEAD, _TAIL = b'{"Records":[', b"]}"
ENVELOPE_BYTES = len(_HEAD) + len(_TAIL)
_MAX_DELAY = 43_200  # seconds; SQS's longest visibility timeout
WINDOW_BYTES = 1024  # more than the members of a tumbling window take, its state apart

# Answers of a function that has nothing to report. Anything else is parsed.
_NOTHING = frozenset((b"", b"null", b'""', b"[]", b"{}", b'{"batchItemFailures":[]}', b'{"batchItemFailures": []}'))


def payload(records: Sequence[Record], tail: bytes = _TAIL) -> bytes:
    """The Lambda event of a batch, as bytes. Records are joined as they are, never encoded again. `tail`: what comes
    after them, with a tumbling window that of `window_tail`.
    """
    return _HEAD + b",".join([record.wire for record in records]) + tail


def window_tail(window: Window, shard: ShardId, source_arn: str) -> bytes:
    """The members that a tumbling window adds to an event (semantics 7), in AWS's order."""
    flags = {"isFinalInvokeForWindow": window.is_final, "isWindowTerminatedEarly": window.is_early}
    return b"".join(
        (
            b'],"window":',
            _compact({"start": _instant(window.start), "end": _instant(window.end)}),
            b',"state":',
            window.state,
            b",",
            _compact({"shardId": shard, "eventSourceARN": source_arn, **flags})[1:],
        )
    )


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _instant(at: float) -> str:
    """ISO 8601 in UTC, whole seconds."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def payload_bytes(count: int, wire_bytes: int) -> int:
    """Length of the event of `count` records with `wire_bytes` in all."""
    return ENVELOPE_BYTES + wire_bytes + max(0, count - 1)


def idempotency_key(
    mapping: MappingId, source_arn: str, records: Sequence[Record], shard: ShardId = "", window: Window | None = None
) -> str:
    """The same for every attempt at these records, also after a restart; never the same for other records.

    `shard` because sequence numbers are unique in a shard only. A final invocation of a tumbling window has no records:
    its window and state stand for them.
    """
    digest = hashlib.sha256(f"{mapping}\n{source_arn}\n{shard}\n".encode())
    digest.update("\n".join([record.id for record in records]).encode())
    if window is not None and not records:
        digest.update(f"\n{window.start}\n{window.is_early}\n".encode() + window.state)
    return digest.hexdigest()[:32]


def judge(
    reply: Reply, records: Sequence[Record], *, report_failures: bool, ordered: bool, window: Window | None = None
) -> Outcome:
    """What a reply means for its batch.

    `report_failures`: FunctionResponseTypes has ReportBatchItemFailures; otherwise a successful body is not read.
    `ordered`: streams, where the first failed record is what matters; else queues, where each named message stays.
    `window`: the batch belongs to a tumbling window, so the answer must carry its state, but for the final one.
    """
    match reply.status:
        case ReplyStatus.OK:
            if window is not None:
                return _judge_window(reply.body, records, window, report_failures=report_failures)
            if not report_failures or reply.body in _NOTHING:
                return Delivered()
            return _judge_batch_response(_parsed(reply.body), records, ordered=ordered)
        case ReplyStatus.THROTTLED:
            return Throttled(reply.error, reply.retry_after)
        case ReplyStatus.UNREACHABLE:
            return Throttled(reply.error, reply.retry_after, unreachable=True)
        case ReplyStatus.FUNCTION_ERROR | ReplyStatus.TIMEOUT | ReplyStatus.TOO_LARGE:
            return Failed(reply.error)


class _NotJson:
    """An answer that cannot be read. A class, because every JSON value is an answer."""


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return _NotJson


def _judge_window(body: bytes, records: Sequence[Record], window: Window, *, report_failures: bool) -> Outcome:
    """An answer without state is a function error (semantics 7); the final one's state is dropped anyway."""
    answer = _parsed(body) if body else None
    state = answer.get("state") if isinstance(answer, dict) else None
    if not isinstance(state, dict) and not window.is_final:
        return Failed("the function's answer has no state, but the mapping has TumblingWindowInSeconds")
    try:
        kept = _compact(state) if isinstance(state, dict) else None
    except (ValueError, RecursionError):
        return Failed("the function's state is no JSON: it is nested too deeply, or has NaN or a number beyond any")
    outcome = _judge_batch_response(answer, records, ordered=True) if report_failures else Delivered()
    match outcome:
        case Delivered():
            return Delivered(state=kept)
        case Partial(index=index):
            return Partial(index=index, state=kept)
        case _:
            return outcome


def _judge_batch_response(answer: Any, records: Sequence[Record], *, ordered: bool) -> Outcome:
    """As semantics 6.4 (streams) and 8.5 (SQS) have it: one malformed member fails the whole batch.

    Beyond AWS, an item of a queue may have `delaySeconds`; for streams it means nothing. A message that is named more
    than once waits as its last `delaySeconds` says.
    """
    if answer is _NotJson:
        return Failed("the function's answer is not JSON, but the mapping has ReportBatchItemFailures")
    if isinstance(answer, list) and answer:
        return Failed("the function's answer is a list, not an object with batchItemFailures")
    if not isinstance(answer, dict):
        return Delivered()  # null, "", [], and other scalars, which nobody has recorded (semantics 6.4, unverified)
    items = answer.get("batchItemFailures")
    if items is None:
        return Delivered()
    if not isinstance(items, list):
        return Failed("batchItemFailures is not a list")
    places: dict[str, int] = {}
    for index, record in enumerate(records if items else ()):
        places.setdefault(record.id, index)  # of equal ids the first, so that no record is skipped
    failed: list[int] = []
    delays: dict[str, float] = {}
    for item in items:
        name = item.get("itemIdentifier") if isinstance(item, dict) else None
        place = places.get(name) if isinstance(name, str) else None
        if place is None:
            return Failed("batchItemFailures has an item without an itemIdentifier of this batch")
        failed.append(place)
        delay = None if ordered else item.get("delaySeconds")
        if delay is None:
            continue
        if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay <= _MAX_DELAY:
            return Failed(f"batchItemFailures has a delaySeconds that is no number from 0 to {_MAX_DELAY}")
        delays[records[place].id] = float(delay)
    if not failed:
        return Delivered()
    if ordered:
        return Partial(index=min(failed))
    return Partial(failed=frozenset(records[place].id for place in failed), delays=tuple(delays.items()))
