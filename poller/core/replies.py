"""Records -> the payload of an invocation; a target's reply -> what became of the batch."""

import hashlib
import json
from collections.abc import Sequence
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
    Throttled,
)

_HEAD, _TAIL = b'{"Records":[', b"]}"
ENVELOPE_BYTES = len(_HEAD) + len(_TAIL)

# Answers of a function that has nothing to report. Anything else is parsed.
_NOTHING = frozenset((b"", b"null", b'""', b"[]", b"{}", b'{"batchItemFailures":[]}', b'{"batchItemFailures": []}'))


def payload(records: Sequence[Record]) -> bytes:
    """The Lambda event of a batch, as bytes. Records are joined as they are, never encoded again."""
    return _HEAD + b",".join([record.wire for record in records]) + _TAIL


def payload_bytes(count: int, wire_bytes: int) -> int:
    """Length of the event of `count` records with `wire_bytes` in all."""
    return ENVELOPE_BYTES + wire_bytes + max(0, count - 1)


def idempotency_key(mapping: MappingId, source_arn: str, records: Sequence[Record]) -> str:
    """The same for every attempt at these records, also after a restart; never the same for other records."""
    digest = hashlib.sha256(f"{mapping}\n{source_arn}\n".encode())
    digest.update("\n".join([record.id for record in records]).encode())
    return digest.hexdigest()[:32]


def judge(reply: Reply, records: Sequence[Record], *, report_failures: bool, ordered: bool) -> Outcome:
    """What a reply means for its batch.

    `report_failures`: FunctionResponseTypes has ReportBatchItemFailures; otherwise a successful body is not read.
    `ordered`: streams, where the first failed record is what matters; else queues, where each named message stays.
    """
    match reply.status:
        case ReplyStatus.OK:
            if not report_failures or reply.body in _NOTHING:
                return Delivered()
            return _judge_batch_response(reply.body, records, ordered=ordered)
        case ReplyStatus.THROTTLED:
            return Throttled(reply.error, reply.retry_after)
        case ReplyStatus.UNREACHABLE:
            return Throttled(reply.error, reply.retry_after, unreachable=True)
        case ReplyStatus.FUNCTION_ERROR | ReplyStatus.TIMEOUT | ReplyStatus.TOO_LARGE:
            return Failed(reply.error)


def _judge_batch_response(body: bytes, records: Sequence[Record], *, ordered: bool) -> Outcome:
    """As semantics 6.4 (streams) and 8.5 (SQS) have it: one malformed member fails the whole batch."""
    try:
        answer: Any = json.loads(body)
    except ValueError:  # RecursionError is handled below: it is no ValueError
        return Failed("the function's answer is not JSON, but the mapping has ReportBatchItemFailures")
    except RecursionError:
        return Failed("the function's answer is nested too deeply to be a batch response")
    if isinstance(answer, list) and answer:
        return Failed("the function's answer is a list, not an object with batchItemFailures")
    if not isinstance(answer, dict):
        return Delivered()  # null, "", [], and other scalars, which nobody has recorded (semantics 6.4, unverified)
    items = answer.get("batchItemFailures")
    if items is None:
        return Delivered()
    if not isinstance(items, list):
        return Failed("batchItemFailures is not a list")
    places = {record.id: place for place, record in enumerate(records)} if items else {}
    failed: list[int] = []
    for item in items:
        name = item.get("itemIdentifier") if isinstance(item, dict) else None
        place = places.get(name) if isinstance(name, str) else None
        if place is None:
            return Failed("batchItemFailures has an item without an itemIdentifier of this batch")
        failed.append(place)
    if not failed:
        return Delivered()
    if ordered:
        return Partial(index=min(failed))
    return Partial(failed=frozenset(records[place].id for place in failed))
