"""ShardFlow: every rule about the records of a shard, without a loop or a clock."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poller.core.flow import ShardFlow, lane_of, split
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
    RetryPolicy,
    Throttled,
)
from poller.core.replies import payload, payload_bytes

AT, AFTER = PositionKind.AT, PositionKind.AFTER


def rec(n: int, key: str = "k", arrival: float = 0.0, size: int = 10) -> Record:
    return Record(str(n), key, arrival, b"x" * size)


def recs(*numbers: int, **more) -> list[Record]:
    return [rec(n, **more) for n in numbers]


def flow_of(
    size=10, window=0.0, factor=1, attempts=-1, max_age=-1, resume=(), window_state="", delay=1.0, **more
) -> ShardFlow:
    return ShardFlow(
        BatchPolicy(size, window, factor, **more),
        RetryPolicy(attempts, max_age),
        lambda tries, retry_after: retry_after if retry_after is not None else delay * tries,
        Checkpoint(TRIM_HORIZON, resume, window_state),
    )


def ids(work) -> list[int]:
    return [int(record.id) for record in work.records]


def keys_of_lanes(factor: int) -> list[str]:
    """One key for each lane."""
    found: dict[int, str] = {}
    n = 0
    while len(found) < factor:
        found.setdefault(lane_of(f"key-{n}", factor), f"key-{n}")
        n += 1
    return [found[lane] for lane in range(factor)]


# --- batches


def test_window_0_takes_what_is_there() -> None:
    """Without a window a batch is whatever the read returned, at most BatchSize."""
    flow = flow_of(size=3)
    flow.admit(recs(1, 2, 3, 4), "4", 0)
    batch = flow.take(0, 0)
    assert ids(batch) == [1, 2, 3]
    assert batch.attempt == 1
    assert flow.take(0, 0) is None, "a lane has one piece of work out at a time"
    flow.resolve(batch, Delivered(), 0)
    assert ids(flow.take(0, 0)) == [4]


def test_a_window_fills_or_expires() -> None:
    """A batch closes at BatchSize or at the end of its window, whichever is first."""
    flow = flow_of(size=3, window=5)
    flow.admit(recs(1), "1", 100)
    assert flow.due_at() == [105]
    assert flow.take(0, 104.9) is None
    assert ids(flow.take(0, 105)) == [1]
    full = flow_of(size=3, window=5)
    full.admit(recs(1, 2, 3), "3", 100)
    assert full.due_at() == [-inf]


def test_the_next_window_starts_when_the_invocation_ended() -> None:
    """The window starts at the later of the previous invocation's end and the first held record's arrival."""
    flow = flow_of(size=3, window=5)
    flow.admit(recs(1, 2, 3, 4), "4", 0)
    batch = flow.take(0, 0)
    flow.resolve(batch, Delivered(), 20)
    assert flow.due_at() == [25]
    late = flow_of(size=3, window=5)
    late.admit(recs(1, 2, 3), "3", 0)
    late.resolve(late.take(0, 0), Delivered(), 20)
    assert late.due_at() == [inf], "an empty window does not run"
    late.admit(recs(5), "5", 30)
    assert late.due_at() == [35]


def test_the_payload_limit_closes_a_batch() -> None:
    """The encoded event, commas and envelope included, never passes the limit; one record over it goes alone."""
    limit = payload_bytes(3, 30)
    flow = flow_of(size=10, max_bytes=limit)
    flow.admit(recs(1, 2, 3, 4), "4", 0)
    batch = flow.take(0, 0)
    assert ids(batch) == [1, 2, 3]
    assert len(payload(batch.records)) == limit
    flow.resolve(batch, Delivered(), 0)
    flow.resolve(flow.take(0, 0), Delivered(), 0)
    flow.admit([rec(5, size=limit), rec(6)], "6", 0)
    assert ids(flow.take(0, 0)) == [5]


def test_bytes_close_a_window_early() -> None:
    """A window does not wait once the payload is full."""
    flow = flow_of(size=10, window=60, max_bytes=payload_bytes(2, 20))
    flow.admit(recs(1), "1", 0)
    assert flow.due_at() == [60]
    flow.admit(recs(2), "2", 1)
    assert flow.due_at() == [-inf]


def test_seal_flushes_windows_and_stop_does_not() -> None:
    """A shard's end does not wait for a window; a stop takes nothing more out."""
    sealed = flow_of(window=60)
    sealed.admit(recs(1), "1", 0)
    sealed.seal()
    assert ids(sealed.take(0, 0)) == [1]
    stopped = flow_of(window=0)
    stopped.admit(recs(1), "1", 0)
    stopped.stop()
    assert stopped.due_at() == [inf]
    assert stopped.take(0, 0) is None
    assert stopped.checkpoint() == Checkpoint(Position(AT, "1"))


def test_split_cuts_messages_of_a_queue_like_a_lane() -> None:
    """Queues use the same limits: BatchSize, payload bytes, a too large one alone."""
    policy = BatchPolicy(size=3, max_bytes=payload_bytes(2, 20))
    assert [r.id for r in split(recs(1, 2, 3), policy)] == ["1", "2"]
    assert [r.id for r in split([rec(1, size=99), rec(2)], policy)] == ["1"]
    assert len(split(recs(1, 2, 3, 4), BatchPolicy(size=3))) == 3


# --- retries


def test_a_failed_batch_stays_whole_and_blocks() -> None:
    """Bisect-free: the same records come again after the backoff, and nothing newer before."""
    flow = flow_of(size=2)
    flow.admit(recs(1, 2, 3), "3", 0)
    batch = flow.take(0, 0)
    flow.resolve(batch, Failed("500"), 10)
    assert flow.due_at() == [11]
    again = flow.take(0, 11)
    assert (ids(again), again.attempt) == ([1, 2], 2)
    assert flow.checkpoint() == Checkpoint(Position(AT, "1"))


@pytest.mark.parametrize(("limit", "invocations"), [(0, 1), (1, 2), (3, 4)])
def test_n_retries_are_n_plus_1_invocations(limit: int, invocations: int) -> None:
    """MaximumRetryAttempts N means N + 1 invocations, then a discard that says so."""
    flow = flow_of(attempts=limit)
    flow.admit(recs(1, 2), "2", 0)
    now = 0.0
    for attempt in range(1, invocations + 1):
        work = flow.take(0, now)
        assert isinstance(work, Batch)
        assert work.attempt == attempt
        flow.resolve(work, Failed("no"), now)
        now += 100
    discard = flow.take(0, now)
    assert discard == Discard(0, tuple(recs(1, 2)), DiscardReason.RETRIES, invocations)
    assert flow.checkpoint() == Checkpoint(Position(AT, "1")), "not settled before it is confirmed"
    flow.confirm(discard, now)
    assert flow.checkpoint() == Checkpoint(Position(AFTER, "2"))
    assert flow.is_drained


def test_a_discard_does_not_wait_for_the_backoff() -> None:
    """What has used up its attempts is due at once."""
    flow = flow_of(attempts=0)
    flow.admit(recs(1), "1", 0)
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    assert flow.due_at() == [-inf]


def test_throttles_are_not_counted_but_tried() -> None:
    """A throttle spends no attempt; X-Poller-Attempt counts it; the wish to wait is obeyed."""
    flow = flow_of(attempts=0)
    flow.admit(recs(1), "1", 0)
    for attempt in range(1, 6):
        work = flow.take(0, attempt * 100)
        assert work.attempt == attempt
        flow.resolve(work, Throttled("429", retry_after=7), attempt * 100)
        assert flow.due_at() == [attempt * 100 + 7]
    flow.resolve(flow.take(0, 1000), Failed("no"), 1000)
    assert flow.take(0, 1000).attempts == 1


def test_a_partial_answer_settles_the_prefix_and_renews_the_budget() -> None:
    """The suffix is a new batch with a fresh budget."""
    flow = flow_of(size=3, attempts=1)
    flow.admit(recs(1, 2, 3), "3", 0)
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    flow.resolve(flow.take(0, 100), Partial(index=2), 100)
    assert flow.checkpoint() == Checkpoint(Position(AT, "3"))
    again = flow.take(0, 200)
    assert (ids(again), again.attempt) == ([3], 1)
    flow.resolve(again, Failed("no"), 200)
    assert isinstance(flow.take(0, 300), Batch), "one retry of the new budget is left"


def test_a_partial_answer_at_the_first_record_counts() -> None:
    """Without this a stuck head record would never exhaust its attempts."""
    flow = flow_of(attempts=0)
    flow.admit(recs(1, 2), "2", 0)
    flow.resolve(flow.take(0, 0), Partial(index=0), 0)
    discard = flow.take(0, 0)
    assert isinstance(discard, Discard)
    assert (ids(discard), discard.attempts) == ([1, 2], 1)


def test_success_resets_the_backoff() -> None:
    """The next batch starts from its own first attempt."""
    flow = flow_of(size=1)
    flow.admit(recs(1, 2), "2", 0)
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    flow.resolve(flow.take(0, 50), Delivered(), 50)
    assert flow.take(0, 50).attempt == 1


# --- age


def test_only_the_expired_prefix_is_dropped_before_any_attempt() -> None:
    """Age is checked before the first invocation too; later old records stay."""
    flow = flow_of(max_age=60)
    flow.admit([rec(1, arrival=0), rec(2, arrival=100), rec(3, arrival=0)], "3", 100)
    discard = flow.take(0, 100)
    assert discard == Discard(0, (rec(1, arrival=0),), DiscardReason.AGE, 0)
    flow.confirm(discard, 100)
    assert ids(flow.take(0, 100)) == [2, 3]


def test_a_window_wakes_for_age() -> None:
    """An under-filled batch is judged when its oldest record gets too old, even if the window is longer."""
    flow = flow_of(window=300, max_age=60)
    flow.admit([rec(1, arrival=0)], "1", 0)
    assert flow.due_at() == [60]
    assert isinstance(flow.take(0, 60), Discard)


def test_age_ends_a_retry_and_keeps_spent_attempts() -> None:
    """While retrying only the prefix goes; what is left is another batch with what is left of the budget."""
    flow = flow_of(max_age=60, attempts=1, delay=1000)
    flow.admit([rec(1, arrival=0), rec(2, arrival=50)], "2", 0)
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    assert flow.due_at() == [60], "it wakes before its backoff ends"
    discard = flow.take(0, 60)
    assert (ids(discard), discard.attempts) == ([1], 1)
    flow.confirm(discard, 60)
    assert flow.due_at() == [110]
    flow.resolve(Batch(0, (rec(2, arrival=50),), 1), Failed("no"), 105)
    assert flow.take(0, 105).reason is DiscardReason.RETRIES


# --- lanes


def test_a_failing_lane_blocks_only_itself() -> None:
    """Records of other lanes go on, in order."""
    a, b = keys_of_lanes(2)
    flow = flow_of(factor=2)
    flow.admit([rec(1, a), rec(2, b), rec(3, a), rec(4, b)], "4", 0)
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    assert ids(flow.take(1, 0)) == [2, 4]
    assert flow.due_at() == [1, inf]


def test_the_checkpoint_is_the_lowest_head_and_remembers_faster_lanes() -> None:
    """`resume` keeps a restart from repeating what faster lanes had finished."""
    a, b = keys_of_lanes(2)
    flow = flow_of(factor=2)
    flow.admit([rec(1, a), rec(2, b), rec(3, b)], "3", 0)
    flow.resolve(flow.take(1, 0), Delivered(), 0)
    assert flow.checkpoint() == Checkpoint(Position(AT, "1"), ((1, 4),))
    again = flow_of(factor=2, resume=((1, 4),))
    again.admit([rec(1, a), rec(2, b), rec(3, b), rec(4, b)], "4", 0)
    assert ids(again.take(0, 0)) == [1]
    assert ids(again.take(1, 0)) == [4]


def test_resume_has_a_floor() -> None:
    """After a restart `newest` starts below the old one: without its floor `resume` would go backwards."""
    a, b = keys_of_lanes(2)
    flow = flow_of(factor=2, resume=((1, 9),))
    flow.admit([rec(1, a), rec(2, b)], "2", 0)
    assert flow.checkpoint() == Checkpoint(Position(AT, "1"), ((1, 9),))


def test_a_changed_factor_repeats_nothing() -> None:
    """A vector is read with its own length and kept until the position has passed it."""
    a, b = keys_of_lanes(2)
    flow = flow_of(factor=1, resume=((1, 4),))
    flow.admit([rec(1, a), rec(2, b), rec(3, b), rec(5, a)], "5", 0)
    batch = flow.take(0, 0)
    assert ids(batch) == [1, 5]
    assert flow.checkpoint() == Checkpoint(Position(AT, "1"), ((1, 4),))
    flow.resolve(batch, Delivered(), 0)
    assert flow.checkpoint() == Checkpoint(Position(AFTER, "5"))


def test_filtered_records_move_the_checkpoint() -> None:
    """`newest` counts filtered records too, or a shard of non-matching records never advances."""
    flow = flow_of()
    flow.admit([], "77", 0)
    assert flow.checkpoint() == Checkpoint(Position(AFTER, "77"))
    assert flow_of().checkpoint() is None, "nothing was read"


def test_sequences_compare_as_numbers() -> None:
    """DynamoDB's have 21 to 40 digits: text order would be wrong."""
    a, b = keys_of_lanes(2)
    flow = flow_of(factor=2)
    flow.admit([rec(9, a), rec(10, b)], "10", 0)
    assert flow.checkpoint().position == Position(AT, "9")


def test_lanes_are_the_same_in_every_process() -> None:
    """`hash()` differs per process; these values are stored in `resume`."""
    assert [lane_of(key, 10) for key in ("", "a", "orders-17", "schlüssel")] == [0, 7, 4, 8]


# --- room and status


def test_room_is_bounded_and_comes_in_large_pieces() -> None:
    """A stuck lane stops the reads; half of the buffer must be free before the next."""
    flow = flow_of(size=1, buffer_records=10)
    assert flow.room() == 10
    flow.admit(recs(1, 2, 3, 4, 5), "5", 0)
    assert flow.room() == 5
    flow.admit(recs(6), "6", 0)
    assert flow.room() == 0
    flow.resolve(flow.take(0, 0), Delivered(), 0)
    assert flow.room() == 5
    assert (flow.held, flow.held_bytes) == (5, 50)


def test_status_names_the_batch_that_fails_longest() -> None:
    """An operator sees first and last sequence, attempts, error and next attempt."""
    a, b = keys_of_lanes(2)
    flow = flow_of(factor=2)
    assert flow.status().oldest_arrival is None
    flow.admit([rec(1, a, 5), rec(2, b, 6), rec(3, b, 7)], "3", 10)
    flow.resolve(flow.take(1, 10), Failed("boom"), 10)
    flow.resolve(flow.take(0, 11), Failed("later"), 11)
    status = flow.status()
    assert (status.first_sequence, status.last_sequence, status.error) == ("2", "3", "boom")
    assert (status.blocked_since, status.attempts, status.next_attempt) == (10, 1, 11)
    assert (status.oldest_arrival, status.batch_arrival, status.in_flight) == (5, 5, 0)
    work = flow.take(1, 20)
    assert flow.status().next_attempt is None
    assert flow.status().in_flight == 1
    flow.resolve(work, Delivered(), 20)
    assert flow.status().error == "later"


# --- all together

outcomes = st.sampled_from(["ok", "fail", "throttle", "partial", "stop"])


@settings(max_examples=150)
@given(
    factor=st.integers(1, 4),
    size=st.integers(1, 5),
    attempts=st.sampled_from([-1, 0, 2]),
    keys=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40),
    script=st.lists(st.tuples(st.integers(0, 3), outcomes), max_size=120),
)
def test_order_and_checkpoint_hold_whatever_happens(factor, size, attempts, keys, script) -> None:
    """Per key strictly in order, nothing twice, and a restart from the checkpoint delivers exactly the rest."""
    everything = [rec(n, key) for n, key in enumerate(keys, start=1)]
    flow = flow_of(size=size, factor=factor, attempts=attempts)
    flow.admit(everything, everything[-1].id, 0)
    settled: list[Record] = []
    now = 0.0
    for lane, outcome in script:
        now += 1000
        work = flow.take(lane % factor, now)
        if work is None:
            continue
        if isinstance(work, Discard):
            settled += work.records
            flow.confirm(work, now)
        elif outcome == "ok":
            settled += work.records
            flow.resolve(work, Delivered(), now)
        elif outcome == "partial":
            index = len(work.records) // 2
            settled += work.records[:index]
            flow.resolve(work, Partial(index=index), now)
        else:
            flow.resolve(work, Failed("x") if outcome == "fail" else Throttled("x"), now)
    for key in set(keys):
        mine = [int(record.id) for record in settled if record.key == key]
        assert mine == sorted(set(mine))
    assert flow.held == len(everything) - len(settled)
    checkpoint = flow.checkpoint()
    start = int(checkpoint.position.value) + (checkpoint.position.kind is AFTER)
    again = flow_of(size=100, factor=factor, resume=checkpoint.resume)
    again.admit([record for record in everything if int(record.id) >= start], everything[-1].id, 0)
    rest = [record for lane in range(factor) if (work := again.take(lane, 0)) for record in work.records]
    assert {record.id for record in rest} == {record.id for record in everything} - {record.id for record in settled}
    assert len(rest) == again.held


# --- shedding


def test_a_blocked_lane_can_give_back_what_waits_behind_its_batch() -> None:
    """It is read again later; what other lanes hold or have settled is not taken in a second time."""
    a, b = keys_of_lanes(2)
    everything = [rec(n, a if n % 2 else b) for n in range(1, 9)]
    flow = flow_of(size=1, factor=2)
    flow.admit(everything, "8", 0)
    assert flow.shed() == "", "nothing is blocked"
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    flow.resolve(flow.take(1, 0), Delivered(), 0)
    assert flow.shed() == "1"
    assert flow.held == 1 + 3
    assert flow.checkpoint() == Checkpoint(Position(AT, "1"), ((1, 4),))
    flow.admit(everything[1:4], "4", 1)
    assert flow.held == 1 + 1 + 3, "3 came again; 2 and 4 are known"
    flow.resolve(flow.take(1, 1), Delivered(), 1)
    flow.admit(everything[4:], "8", 2)
    delivered = []
    for lane in (0, 1):
        while work := flow.take(lane, 100):
            delivered += ids(work)
            flow.resolve(work, Delivered(), 100)
    assert delivered == [1, 3, 5, 7, 6, 8]
    assert flow.checkpoint() == Checkpoint(Position(AFTER, "8"))


def test_a_lane_that_outran_a_shed_one_is_not_forgotten() -> None:
    """Its progress stays in the checkpoint although the position has gone back behind it."""
    a, b = keys_of_lanes(2)
    flow = flow_of(size=10, factor=2)
    flow.admit([rec(1, a), rec(2, b), rec(3, b)], "3", 0)
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    flow.admit([rec(4, a)], "4", 0)
    assert flow.shed() == "1"
    flow.resolve(flow.take(1, 0), Delivered(), 0)
    assert flow.checkpoint() == Checkpoint(Position(AT, "1"), ((1, 5),))
    flow.resolve(flow.take(0, 100), Delivered(), 100)
    assert flow.checkpoint() == Checkpoint(Position(AFTER, "1"), ((2, 5),))


def test_shedding_twice_goes_back_to_the_first_gap() -> None:
    """A second blocked lane must not make the reader jump over what the first one gave back."""
    a, b = keys_of_lanes(2)
    flow = flow_of(size=1, factor=2)
    flow.admit([rec(1, a), rec(2, b), rec(3, a), rec(4, b), rec(5, b)], "5", 0)
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    assert flow.shed() == "1"
    flow.resolve(flow.take(1, 0), Delivered(), 0)
    flow.resolve(flow.take(1, 0), Failed("no"), 0)
    assert flow.shed() == "1"
    flow.admit([rec(2, b), rec(3, a), rec(4, b), rec(5, b)], "5", 0)
    assert flow.held == 4


def test_a_shard_that_was_read_to_its_end_is_not_shed() -> None:
    """Nobody would read it again."""
    flow = flow_of(size=1)
    flow.admit(recs(1, 2), "2", 0)
    flow.seal()
    flow.resolve(flow.take(0, 0), Failed("no"), 0)
    assert flow.shed() == ""
