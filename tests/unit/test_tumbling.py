"""Tumbling windows (semantics 7): what belongs together, when a window ends, the state that travels."""

import json
from math import inf

import pytest

from poller.core.flow import ShardFlow
from poller.core.model import (
    TRIM_HORIZON,
    Batch,
    BatchPolicy,
    Checkpoint,
    Delivered,
    Discard,
    DiscardReason,
    Failed,
    Partial,
    Position,
    PositionKind,
    Record,
    Reply,
    ReplyStatus,
    RetryPolicy,
    Window,
)
from poller.core.replies import idempotency_key, judge, payload, window_tail
from poller.core.tumbling import LATENESS, MAX_STATE_BYTES

LENGTH = 60.0


def rec(n: int, arrival: float) -> Record:
    return Record(str(n), "k", arrival, b"{}")


def flow_of(*records: Record, size=10, attempts=-1, window=0.0, saved="", now=0.0, **more) -> ShardFlow:
    flow = ShardFlow(
        BatchPolicy(size, window, tumbling=LENGTH, **more), RetryPolicy(attempts), lambda tries, _: 1.0,
        Checkpoint(TRIM_HORIZON, window=saved),
    )  # fmt: skip
    if records:
        flow.admit(records, records[-1].id, now)
    return flow


def ids(work: Batch) -> list[int]:
    return [int(record.id) for record in work.records]


def test_a_batch_holds_records_of_one_window_only() -> None:
    """Windows are aligned to the epoch; a later record ends the open one with a final invocation."""
    flow = flow_of(rec(1, 61), rec(2, 119), rec(3, 120), rec(4, 130))
    first = flow.take(0, 200)
    assert (ids(first), first.window) == ([1, 2], Window(60, 120, b"{}", is_final=False, is_early=False))
    flow.resolve(first, Delivered(state=b'{"n":2}'), 200)
    final = flow.take(0, 200)
    assert (final.records, final.window) == ((), Window(60, 120, b'{"n":2}', is_final=True, is_early=False))
    flow.resolve(final, Delivered(), 200)
    second = flow.take(0, 200)
    assert (ids(second), second.window) == ([3, 4], Window(120, 180, b"{}", is_final=False, is_early=False))


def test_state_travels_through_the_batches_of_a_window() -> None:
    """Each gets what the last answer returned."""
    flow = flow_of(rec(1, 1), rec(2, 2), rec(3, 3), size=1)
    for n in range(1, 4):
        batch = flow.take(0, 100)
        assert batch.window.state == (json.dumps({"n": n - 1}, separators=(",", ":")).encode() if n > 1 else b"{}")
        flow.resolve(batch, Delivered(state=b'{"n":%d}' % n), 100)


def test_a_batching_window_does_not_outlast_the_tumbling_one() -> None:
    """Records that are complete for their window do not wait."""
    flow = flow_of(rec(1, 1), rec(2, 61), window=300)
    assert ids(flow.take(0, 0)) == [1]


def test_quiet_closes_a_window() -> None:
    """Once the shard was read to its tip after the window's end; time alone does not: reading may be in trouble.

    "After" leaves room for clocks that differ and for records that are stamped before they can be read.
    """
    flow = flow_of(rec(1, 1))
    flow.resolve(flow.take(0, 1), Delivered(state=b"{}"), 1)
    assert flow.due_at() == [inf]
    assert flow.take(0, 1000) is None
    assert flow.reached_tip(60 + LATENESS - 0.1), "a record of the window may still appear"
    assert flow.due_at() == [inf]
    assert flow.reached_tip(60 + LATENESS)
    assert flow.due_at() == [-inf]
    final = flow.take(0, 70)
    assert final.window.is_final
    flow.resolve(final, Delivered(), 70)
    assert not flow.reached_tip(71), "none is open"
    assert flow.due_at() == [inf]
    assert flow.checkpoint() == Checkpoint(Position(PositionKind.AFTER, "1"))


def test_the_end_of_a_shard_closes_its_window() -> None:
    """The shard is not done before the final invocation is."""
    flow = flow_of(rec(1, 1))
    flow.seal()
    flow.resolve(flow.take(0, 1), Delivered(state=b"{}"), 1)
    assert not flow.is_drained
    final = flow.take(0, 1)
    assert final.window.is_final
    flow.resolve(final, Delivered(), 1)
    assert flow.is_drained


def test_an_oversized_state_ends_the_window_early_and_the_window_goes_on() -> None:
    """An extra invocation without records carries the whole state; then the same window has fresh state."""
    huge = b'{"x":"' + b"x" * MAX_STATE_BYTES + b'"}'
    flow = flow_of(rec(1, 1), rec(2, 2), size=1)
    flow.resolve(flow.take(0, 1), Delivered(state=huge), 1)
    early = flow.take(0, 1)
    assert (early.records, early.window) == ((), Window(0, 60, huge, is_final=True, is_early=True))
    flow.resolve(early, Delivered(state=huge), 1)
    second = flow.take(0, 1)
    assert (ids(second), second.window) == ([2], Window(0, 60, b"{}", is_final=False, is_early=False))
    flow.resolve(second, Delivered(state=b'{"n":1}'), 1)
    flow.reached_tip(100)
    assert flow.take(0, 100).window == Window(0, 60, b'{"n":1}', is_final=True, is_early=False)


def test_a_late_record_joins_the_open_window() -> None:
    """Arrival times are not monotonic; windows never go back."""
    flow = flow_of(rec(1, 70), rec(2, 59), rec(3, 71))
    assert ids(flow.take(0, 100)) == [1, 2, 3]


def test_a_failing_final_suspends_the_shard() -> None:
    """Until it succeeds, or its attempts are used up; then the window is closed without records lost."""
    flow = flow_of(rec(1, 1), rec(2, 61), attempts=1)
    flow.resolve(flow.take(0, 100), Delivered(state=b"{}"), 100)
    final = flow.take(0, 100)
    flow.resolve(final, Failed("no"), 100)
    status = flow.status()
    assert (status.blocked_since, status.first_sequence, status.error) == (100, None, "no")
    again = flow.take(0, 101)
    assert (again.window, again.attempt) == (final.window, 2)
    flow.resolve(again, Failed("no"), 101)
    discard = flow.take(0, 101)
    assert discard == Discard(0, (), DiscardReason.RETRIES, 2, final.window)
    flow.confirm(discard, 101)
    assert ids(flow.take(0, 101)) == [2]


def test_state_and_position_are_one_checkpoint() -> None:
    """Saved apart, a crash would count records twice or not at all."""
    flow = flow_of(rec(1, 1), rec(2, 2), size=1)
    assert flow.checkpoint() == Checkpoint(Position(PositionKind.AT, "1"))
    flow.resolve(flow.take(0, 1), Delivered(state=b'{"n":1}'), 1)
    saved = flow.checkpoint()
    assert saved == Checkpoint(Position(PositionKind.AT, "2"), window='0.0\n{"n":1}')
    again = flow_of(rec(2, 2), saved=saved.window)
    assert again.take(0, 2).window.state == b'{"n":1}'


def test_a_window_that_a_restart_found_open_is_closed_and_saved_without_reading() -> None:
    """Nothing new need come for it."""
    flow = flow_of(saved='0.0\n{"n":1}')
    assert flow.checkpoint() is None
    flow.reached_tip(100)
    final = flow.take(0, 100)
    assert final.window == Window(0, 60, b'{"n":1}', is_final=True, is_early=False)
    flow.resolve(final, Delivered(), 100)
    assert flow.checkpoint() == Checkpoint(TRIM_HORIZON, window="")


def test_partial_answers_keep_state_with_what_they_settle() -> None:
    """With a failed head nothing is settled, and its state is not kept either."""
    flow = flow_of(rec(1, 1), rec(2, 2))
    flow.resolve(flow.take(0, 0), Partial(index=0, state=b'{"n":9}'), 0)
    assert flow.take(0, 10).window.state == b"{}"
    flow.resolve(Batch(0, (rec(1, 1), rec(2, 2)), 2), Partial(index=1, state=b'{"n":1}'), 10)
    assert flow.take(0, 20).window.state == b'{"n":1}'


def test_the_state_counts_against_the_payload() -> None:
    """Records and state travel together."""
    state = '{"x":"' + "x" * 3000 + '"}'
    flow = flow_of(*(Record(str(n), "k", 1.0, b"x" * 1000) for n in range(5)), saved=f"0.0\n{state}", max_bytes=8000)
    batch = flow.take(0, 1)
    assert len(batch.records) == 3
    assert len(payload(batch.records, window_tail(batch.window, "shardId-1", "arn"))) <= 8000


def test_the_event_is_awss() -> None:
    """Members and order of the documented sample."""
    window = Window(1607497440.0, 1607497560.0, b'{"1":282,"2":715}', is_final=False, is_early=False)
    arn = "arn:aws:kinesis:us-east-1:111111111111:stream/lambda-stream"
    event = payload([Record("1", "k", 0, b'{"a":1}')], window_tail(window, "shardId-000000000006", arn))
    assert json.loads(event) == {
        "Records": [{"a": 1}],
        "window": {"start": "2020-12-09T07:04:00Z", "end": "2020-12-09T07:06:00Z"},
        "state": {"1": 282, "2": 715},
        "shardId": "shardId-000000000006",
        "eventSourceARN": arn,
        "isFinalInvokeForWindow": False,
        "isWindowTerminatedEarly": False,
    }
    assert list(json.loads(event)) == [
        "Records", "window", "state", "shardId", "eventSourceARN", "isFinalInvokeForWindow", "isWindowTerminatedEarly",
    ]  # fmt: skip


OPEN = Window(0, 60, b"{}", is_final=False, is_early=False)
FINAL = Window(0, 60, b"{}", is_final=True, is_early=False)


@pytest.mark.parametrize(
    "body", [b"", b"null", b"{}", b"[]", b'{"state":null}', b'{"state":[1]}', b'{"state":"x"}', b"no"]
)
def test_an_answer_without_state_is_a_function_error(body: bytes) -> None:
    """But for the final one, whose state is dropped."""
    reply = Reply(ReplyStatus.OK, body)
    assert isinstance(judge(reply, (rec(1, 1),), report_failures=False, ordered=True, window=OPEN), Failed)
    assert judge(reply, (), report_failures=False, ordered=True, window=FINAL) == Delivered()


def test_state_and_failures_come_in_one_answer() -> None:
    """ReportBatchItemFailures is usable with windows."""
    body = {"state": {"é": 1}, "batchItemFailures": [{"itemIdentifier": "2"}]}
    reply = Reply(ReplyStatus.OK, json.dumps(body).encode())
    records = (rec(1, 1), rec(2, 1))
    outcome = judge(reply, records, report_failures=True, ordered=True, window=OPEN)
    assert outcome == Partial(index=1, state=b'{"\\u00e9":1}')
    assert judge(reply, records, report_failures=False, ordered=True, window=OPEN) == Delivered(state=b'{"\\u00e9":1}')


def test_finals_have_keys_of_their_own() -> None:
    """The same for each attempt, another for each window, state and shard."""
    key = idempotency_key("m", "arn", (), "s", FINAL)
    others = {
        idempotency_key("m", "arn", (), "s2", FINAL),
        idempotency_key("m", "arn", (), "s", FINAL._replace(start=60)),
        idempotency_key("m", "arn", (), "s", FINAL._replace(state=b'{"n":1}')),
    }
    assert len(others | {key}) == 4
    records = (rec(1, 1),)
    assert idempotency_key("m", "arn", records, "s", OPEN) == idempotency_key("m", "arn", records, "s")


def test_what_was_dropped_for_want_of_memory_keeps_its_window_open() -> None:
    """It comes again: the tip that was reached before does not count."""
    flow = flow_of(rec(1, 1), rec(2, 2), size=1)
    flow.resolve(flow.take(0, 1), Failed("no"), 1)
    flow.reached_tip(100)
    assert flow.shed() == "1"
    flow.resolve(flow.take(0, 100), Delivered(state=b'{"n":1}'), 100)
    assert flow.take(0, 200) is None
    flow.admit([rec(2, 2)], "2", 200)
    assert ids(flow.take(0, 200)) == [2]
