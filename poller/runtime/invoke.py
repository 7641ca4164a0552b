"""One invocation, the same for streams and queues: payload, request id, metrics, judgement."""

import asyncio
import random
from typing import NamedTuple

from poller.core.model import (
    MAX_PAYLOAD_BYTES,
    NO_TRACE,
    Batch,
    Delivered,
    Failed,
    Invocation,
    Outcome,
    Partial,
    Reply,
    ReplyStatus,
    ResponseContext,
    ShardId,
    Throttled,
)
from poller.core.replies import idempotency_key, judge, payload, window_tail
from poller.ports import Clock
from poller.runtime.context import Pipe
from poller.runtime.payloads import payload_log


class Attempt(NamedTuple):
    """One invocation. `response`: what a failure record shows of the answer; None when there was none."""

    outcome: Outcome
    request_id: str
    response: ResponseContext | None = None


async def invoke(pipe: Pipe, clock: Clock, rng: random.Random, batch: Batch, shard: ShardId = "") -> Attempt:
    """Call the target once with a batch and say what became of it. Counts, times and traces the call."""
    mapping, records, window = pipe.mapping, batch.records, batch.window
    request_id = new_request_id(rng)
    span = pipe.tracer.begin(batch, shard, request_id) if pipe.tracer is not None else None
    body = payload(records, window_tail(window, shard, mapping.source.arn)) if window else payload(records)
    if len(body) > MAX_PAYLOAD_BYTES:
        # Lambda would answer 413 without running the function, and that spends an attempt (semantics 4.2).
        pipe.observer.invoked("error", len(records), 0.0)
        error = f"the event has {len(body)} bytes, more than the {MAX_PAYLOAD_BYTES} that an invocation may carry"
        if span is not None:
            span.end("error", error=error)
        return Attempt(Failed(error), request_id)
    call = Invocation(
        mapping=mapping.id,
        request_id=request_id,
        attempt=batch.attempt,
        key=idempotency_key(mapping.id, mapping.source.arn, records, shard, window),
        payload=body,
        trace=span.trace if span is not None else records[0].trace if records else NO_TRACE,
    )
    started = clock.now()
    pipe.observer.invoking(1)
    pipe.calls.begin()
    if payload_log.is_on:
        payload_log.sent(mapping, call)
    try:
        reply = await pipe.target.invoke(call)
    except asyncio.CancelledError:
        if span is not None:
            span.end("cancelled", error="cut off: the target's answer was not waited for")
        raise
    finally:
        pipe.calls.end()
        pipe.observer.invoking(-1)
    outcome = judge(
        reply,
        records,
        report_failures=mapping.retry.report_failures,
        ordered=mapping.source.kind.is_stream,
        window=window,
    )
    if payload_log.is_on:
        payload_log.answered(mapping, call, reply, outcome)
    label = _label(reply, outcome)
    pipe.observer.invoked(label, len(records), clock.now() - started)
    if span is not None:
        span.end(label, reply.status_code, outcome.error if isinstance(outcome, Failed | Throttled) else "")
    if isinstance(outcome, Failed):
        pipe.result.text = "PROBLEM: Function call failed"
    elif not isinstance(outcome, Throttled):
        pipe.result.text = "OK"
    return Attempt(outcome, request_id, _response(reply))


def new_request_id(rng: random.Random) -> str:
    """A random UUID (version 4) for one invocation."""
    digits = f"{rng.getrandbits(122):031x}"  # all but the version and the two bits of the variant
    variant = "89ab"[int(digits[0], 16)]
    return f"{digits[1:9]}-{digits[9:13]}-4{digits[13:16]}-{variant}{digits[16:19]}-{digits[19:31]}"


def _response(reply: Reply) -> ResponseContext | None:
    if reply.status_code is None or reply.status is ReplyStatus.TOO_LARGE:
        return None
    error = None if reply.status is ReplyStatus.OK else "Unhandled"
    return ResponseContext(reply.status_code, reply.executed_version, error)


def _label(reply: Reply, outcome: Outcome) -> str:
    match outcome:
        case Delivered():
            return "success"
        case Partial():
            return "partial"
        case Throttled(unreachable=unreachable):
            return "unreachable" if unreachable else "throttle"
        case Failed():
            return "timeout" if reply.status is ReplyStatus.TIMEOUT else "error"
