"""ShardFlow: everything that is decided about the records of one shard. No await, no clock, no I/O.

    admit -> lane queues -> take -> Batch   -> (invoked)  -> resolve -> settled, or again
                                 -> Discard -> (notified) -> confirm -> settled
                                                             checkpoint()

A lane is strictly serial: at most one piece of work of it is out, and what was not settled comes out again before
anything newer. So order holds per key, and a failing lane holds up nothing but itself.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf
from zlib import crc32

from poller.core.model import (
    NO_LIMIT,
    Batch,
    BatchPolicy,
    Checkpoint,
    Delivered,
    Discard,
    DiscardReason,
    Failed,
    Outcome,
    Partial,
    Position,
    PositionKind,
    Record,
    RetryPolicy,
    Throttled,
    Work,
)
from poller.core.replies import WINDOW_BYTES, payload_bytes
from poller.core.tumbling import TumblingWindow

Vector = tuple[int, ...]


def lane_of(key: str, lanes: int) -> int:
    """The lane of a key: stable between processes, which `hash()` is not."""
    return crc32(key.encode("utf-8", "surrogatepass")) % lanes


def _fitting(records: Iterable[Record], policy: BatchPolicy, max_bytes: int) -> int:
    """How many of the first records make one batch: BatchSize, or as many as the payload limit lets in; one that is
    over it goes alone.
    """
    length = total = 0
    for record in islice(records, policy.size):
        total += len(record.wire)
        if length and payload_bytes(length + 1, total) > max_bytes:
            break
        length += 1
    return length


def split(records: Sequence[Record], policy: BatchPolicy) -> tuple[Record, ...]:
    """The first batch of some messages of a queue."""
    return tuple(records[: _fitting(records, policy, policy.max_bytes)])


class _Lane:
    """One ordered queue of a shard. Owned by its flow.

    `queue` holds what no batch holds yet, `nbytes` their wire length; `since` is when the batching window started.
    `batch` holds the records that were taken and are not settled; empty when there are none. It is the oldest of the
    lane, so its first record is the lane's head. `is_final`: instead of a batch, the final invocation of a tumbling
    window was taken and is not settled. `attempts` spent of the retry budget, `tries` at exactly this batch.
    `out` is true while the caller has the work in hand; `is_unheard`: it is a discard whose notice was not taken.
    """

    __slots__ = (
        "attempts",
        "batch",
        "error",
        "failing_since",
        "is_final",
        "is_unheard",
        "nbytes",
        "not_before",
        "out",
        "queue",
        "since",
        "tries",
    )

    def __init__(self) -> None:
        self.queue: deque[Record] = deque()
        self.nbytes = 0
        self.since = -inf
        self.batch: tuple[Record, ...] = ()
        self.is_final = False
        self.attempts = 0
        self.tries = 0
        self.not_before = -inf
        self.out = False
        self.is_unheard = False
        self.failing_since: float | None = None
        self.error = ""

    def head(self) -> Record | None:
        """The oldest record that is not settled."""
        if self.batch:
            return self.batch[0]
        return self.queue[0] if self.queue else None

    def settle_batch(self, now: float) -> None:
        """The batch, or the final invocation, is done with; the next window starts now (semantics 4.1)."""
        self.batch = ()
        self.is_final = False
        self.attempts = self.tries = 0
        self.not_before = -inf
        self.since = now
        self.failing_since = None
        self.error = ""


@dataclass(frozen=True, slots=True)
class FlowStatus:
    """What an operator wants to know of a flow; the failing batch is the one that has been failing longest."""

    in_flight: int
    oldest_arrival: float | None
    batch_arrival: float | None
    blocked_since: float | None = None
    attempts: int = 0
    first_sequence: str | None = None
    last_sequence: str | None = None
    error: str | None = None
    next_attempt: float | None = None


class ShardFlow:
    """The records of one shard, from the read to the checkpoint.

    `backoff(tries, retry_after)` answers seconds. `loaded`: the checkpoint that this shard starts from.
    The caller hands every Batch back through `resolve` and every Discard through `confirm`, exactly once, or throws
    the flow away: what was not handed back counts as not delivered.
    """

    def __init__(
        self,
        batch: BatchPolicy,
        retry: RetryPolicy,
        backoff: Callable[[int, float | None], float],
        loaded: Checkpoint,
    ) -> None:
        self._policy = batch
        self._retry = retry
        self._backoff = backoff
        self._loaded = loaded
        self._floors = loaded.resume
        self._kept: Vector = ()  # after `shed`, per lane: what is below it is settled or still in memory
        self._lanes = [_Lane() for _ in range(batch.factor)]
        self._window = TumblingWindow(batch.tumbling, loaded.window) if batch.tumbling else None
        self._newest = ""
        self._held = 0
        self._held_bytes = 0
        self._sealed = False
        self._stopped = False

    def retune(self, batch: BatchPolicy, retry: RetryPolicy) -> None:
        """Other limits from now on; the number of lanes and tumbling windows must stay. A batch that was taken keeps
        its records and its attempts; the limits of retries and age hold for it too.
        """
        assert (batch.factor, batch.tumbling) == (self._policy.factor, self._policy.tumbling)
        self._policy = batch
        self._retry = retry

    # --- in

    @property
    def held(self) -> int:
        """Records in memory that are not settled."""
        return self._held

    @property
    def held_bytes(self) -> int:
        """Their wire length."""
        return self._held_bytes

    @property
    def newest(self) -> str:
        """Sequence number of the last record read; empty when none was."""
        return self._newest

    def room(self) -> int:
        """How many records may be fetched now; 0 until half of the buffer is free, so that reads stay large."""
        if self._held * 2 > self._policy.buffer_records:
            return 0
        return self._policy.buffer_records - self._held

    def admit(self, records: Sequence[Record], newest: str, now: float) -> None:
        """Take in one fetch, in the order of the shard. `newest` counts filtered records too: without them a shard of
        non-matching records would never advance. Empty `newest`: nothing was read.
        """
        if newest:
            self._newest = newest
        if self._floors or self._kept:
            records = [record for record in records if not self._is_known(record)]
            if self._kept and newest and int(newest) + 1 >= max(self._kept):
                self._kept = ()
        if not records:
            return
        lanes = self._lanes
        if len(lanes) == 1:
            self._enqueue(lanes[0], records, now)
            return
        shares: dict[int, list[Record]] = {}
        count = len(lanes)
        for record in records:
            shares.setdefault(lane_of(record.key, count), []).append(record)
        for index, share in shares.items():
            self._enqueue(lanes[index], share, now)

    def _enqueue(self, lane: _Lane, records: Sequence[Record], now: float) -> None:
        if not lane.queue and not lane.batch:
            lane.since = now
        lane.queue.extend(records)
        nbytes = sum([len(record.wire) for record in records])
        lane.nbytes += nbytes
        self._held += len(records)
        self._held_bytes += nbytes

    def _is_known(self, record: Record) -> bool:
        """Settled before, or in memory: not to be taken in again."""
        sequence = int(record.id)
        vectors = (*self._floors, self._kept) if self._kept else self._floors
        return any(sequence < vector[lane_of(record.key, len(vector))] for vector in vectors)

    def shed(self) -> str:
        """Drop what waits behind failing batches, for a process short of memory: a blocked lane keeps its batch.
        Answers the sequence number after which the shard must be read again, empty when nothing was dropped.

        What was dropped comes again; what other lanes hold, or have settled since, is not taken in a second time.
        """
        blocked = [lane for lane in self._lanes if lane.failing_since is not None and lane.batch and lane.queue]
        if self._sealed or not blocked:
            return ""
        behind_newest = int(self._newest) + 1
        kept = self._kept or (behind_newest,) * len(self._lanes)
        self._kept = tuple(
            int(lane.batch[-1].id) + 1 if lane in blocked else max(known, behind_newest)
            for lane, known in zip(self._lanes, kept, strict=True)
        )
        for lane in blocked:
            self._forget(lane.queue)
            lane.queue.clear()
            lane.nbytes = 0
        if self._window is not None:
            self._window.left_tip()
        # Not beyond what is being read again already for a lane that was shed before.
        self._newest = min((self._newest, *(lane.batch[-1].id for lane in blocked)), key=int)
        return self._newest

    def reached_tip(self, now: float) -> bool:
        """Everything in the shard has been read. True: that may have made a lane due."""
        if self._window is None or self._window.start is None:
            return False
        self._window.reached_tip(now)
        return True

    def seal(self) -> None:
        """No more input: the shard is read to its end. Windows do not wait any longer."""
        self._sealed = True

    def stop(self) -> None:
        """No more output. Windows are not flushed: that would change batch shapes at every deploy."""
        self._stopped = True

    # --- out

    def due_at(self) -> list[float]:
        """For each lane the instant from which `take` answers work: -inf when at once, inf when only input or an
        outcome can change it.
        """
        if self._stopped:
            return [inf] * len(self._lanes)
        return [inf if lane.out else self._due_at(lane) for lane in self._lanes]

    def _due_at(self, lane: _Lane) -> float:
        if lane.batch or lane.is_final:
            at = -inf if self._is_exhausted(lane) else lane.not_before
            if lane.is_final:
                return at
            head = lane.batch[0]
        elif self._final_at(lane) == -inf:
            return -inf
        elif lane.queue:
            head, at = lane.queue[0], self._full_at(lane)
        else:
            return self._final_at(lane)
        if self._retry.max_age != NO_LIMIT:
            at = min(at, head.arrival + self._retry.max_age)
        return at

    def _full_at(self, lane: _Lane) -> float:
        """When the pending records become a batch: BatchSize, payload limit, shard end, batching window, and at the
        end of their tumbling window.
        """
        policy = self._policy
        full = len(lane.queue) >= policy.size or payload_bytes(len(lane.queue), lane.nbytes) >= self._max_bytes()
        if full or self._sealed:
            return -inf
        at = lane.since + policy.window
        if self._window is None:
            return at
        end = self._window.end_for(lane.queue[0])
        # The last record tells whether later ones wait for this window's end; late ones in between do no harm.
        return -inf if lane.queue[-1].arrival >= end or self._window.is_quiet(end) else at

    def _final_at(self, lane: _Lane) -> float:
        """When the final invocation of the open tumbling window becomes due; inf while its records are pending."""
        window = self._window
        if window is None or window.start is None:
            return inf
        if window.is_oversized:
            return -inf
        if lane.queue:
            return inf if window.holds(lane.queue[0]) else -inf
        return -inf if self._sealed or window.is_quiet(window.end) else inf

    def _max_bytes(self) -> int:
        """What the records of one payload may take; a tumbling window's state travels with them."""
        return self._policy.max_bytes - (WINDOW_BYTES + len(self._window.state) if self._window is not None else 0)

    def _is_exhausted(self, lane: _Lane) -> bool:
        return self._retry.attempts != NO_LIMIT and lane.attempts > self._retry.attempts

    def take(self, index: int, now: float) -> Work | None:
        """The work of a lane, if any is due: first what is too old (also before its first invocation), then what has
        used up its attempts, then a batch.
        """
        lane = self._lanes[index]
        if self._stopped or lane.out or self._due_at(lane) > now:
            return None
        lane.out = True
        if not lane.batch and not lane.is_final:
            lane.is_final = self._final_at(lane) <= now
        if lane.is_final:
            return self._take_final(index, lane)
        if not lane.batch:
            expired = self._expired(islice(lane.queue, self._policy.size), now)
            lane.batch = self._dequeue(lane, expired or self._batch_length(lane))
        else:
            expired = self._expired(lane.batch, now)
        window = self._window.describe(is_final=False) if self._window and self._window.start is not None else None
        if expired:
            return Discard(index, lane.batch[:expired], DiscardReason.AGE, lane.attempts, window)
        if self._is_exhausted(lane):
            return Discard(index, lane.batch, DiscardReason.RETRIES, lane.attempts, window)
        lane.tries += 1
        return Batch(index, lane.batch, lane.tries, window)

    def _take_final(self, index: int, lane: _Lane) -> Work:
        assert self._window is not None
        window = self._window.describe(is_final=True)
        if self._is_exhausted(lane):
            return Discard(index, (), DiscardReason.RETRIES, lane.attempts, window)
        lane.tries += 1
        return Batch(index, (), lane.tries, window)

    def _expired(self, records: Iterable[Record], now: float) -> int:
        """Length of the prefix that is older than MaximumRecordAgeInSeconds; later old records are not dropped."""
        if self._retry.max_age == NO_LIMIT:
            return 0
        count = 0
        for record in records:
            if record.arrival + self._retry.max_age > now:
                break
            count += 1
        return count

    def _batch_length(self, lane: _Lane) -> int:
        max_bytes = self._max_bytes()
        if payload_bytes(len(lane.queue), lane.nbytes) <= max_bytes:
            length = min(self._policy.size, len(lane.queue))
        else:
            length = _fitting(lane.queue, self._policy, max_bytes)
        if self._window is None:
            return length
        self._window.open_with(lane.queue[0])
        return self._window.count(islice(lane.queue, length))

    def _dequeue(self, lane: _Lane, count: int) -> tuple[Record, ...]:
        popleft = lane.queue.popleft
        records = tuple([popleft() for _ in range(count)])
        lane.nbytes -= sum([len(record.wire) for record in records])
        return records

    # --- back

    def resolve(self, batch: Batch, outcome: Outcome, now: float) -> None:
        """What became of a batch. Its unsettled records stay, in order, and come out of `take` again."""
        lane = self._lanes[batch.lane]
        lane.out = False
        match outcome:
            case Delivered() if lane.is_final:
                self._finish_window(lane, now)
            case Delivered(state=state):
                self._keep_state(state)
                self._forget(lane.batch)
                lane.settle_batch(now)
            case Partial(index=index, state=state) if index > 0:
                # The suffix is a new batch with a fresh budget (semantics 6.4).
                self._keep_state(state)
                self._forget(lane.batch[:index])
                rest = lane.batch[index:]
                lane.settle_batch(now)
                lane.batch = rest
                self._fail(lane, "the function named a failed record", now, self._backoff(1, None))
            case Partial():  # the first record failed: without this rule a stuck head never exhausts its attempts
                lane.attempts += 1
                self._fail(lane, "the function named the first record as failed", now, self._backoff(lane.tries, None))
            case Failed(error=error):
                lane.attempts += 1
                self._fail(lane, error, now, self._backoff(lane.tries, None))
            case Throttled(error=error, retry_after=retry_after):
                self._fail(lane, error, now, self._backoff(lane.tries, retry_after))

    def _fail(self, lane: _Lane, error: str, now: float, delay: float) -> None:
        lane.not_before = now + delay
        lane.error = error
        if lane.failing_since is None:
            lane.failing_since = now

    def hold(self, discard: Discard, error: str, now: float, retry_at: float) -> None:
        """A discard could not be notified: its lane waits with it, and shows why."""
        lane = self._lanes[discard.lane]
        lane.is_unheard = True
        self._fail(lane, error, now, retry_at - now)

    def confirm(self, discard: Discard, now: float) -> None:
        """A discard was notified, or has nowhere to go: its records are settled.

        After an expired prefix the rest is another batch, but its spent attempts stay spent (semantics 6.6).
        """
        lane = self._lanes[discard.lane]
        lane.out = lane.is_unheard = False
        if lane.is_final:
            self._finish_window(lane, now)
            return
        self._forget(discard.records)
        rest = lane.batch[len(discard.records) :]
        if rest:
            lane.batch = rest
            lane.tries = 0
        else:
            lane.settle_batch(now)

    def _keep_state(self, state: bytes | None) -> None:
        """Only with records that are settled: kept with a failed head, its records would be counted twice."""
        if self._window is not None and state is not None:
            self._window.state = state

    def _finish_window(self, lane: _Lane, now: float) -> None:
        assert self._window is not None
        self._window.finish()
        lane.settle_batch(now)

    def _forget(self, records: Collection[Record]) -> None:
        self._held -= len(records)
        self._held_bytes -= sum([len(record.wire) for record in records])

    # --- progress

    @property
    def is_drained(self) -> bool:
        """Nothing is held and no tumbling window is open: with `seal`, the shard is done."""
        return self._held == 0 and (self._window is None or self._window.start is None)

    @property
    def in_flight(self) -> int:
        """Pieces of work that the caller has in hand."""
        return sum([lane.out for lane in self._lanes])

    def checkpoint(self) -> Checkpoint | None:
        """Where a restart goes on: AT the oldest unsettled record, else AFTER the newest read; None: nothing changed.

        Costs one comparison per lane, whatever the lanes hold: each lane settles in order, so its head says it all.
        """
        window = self._window.save() if self._window is not None else ""
        if not self._newest:
            return replace(self._loaded, window=window) if window != self._loaded.window else None
        heads = [lane.head() for lane in self._lanes]
        if len(heads) == 1 and not self._floors:
            return Checkpoint(self._position(heads[0]), window=window)
        behind_newest = int(self._newest) + 1
        kept = self._kept or (0,) * len(heads)
        sequences = [
            int(head.id) if head else max(behind_newest, known) for head, known in zip(heads, kept, strict=True)
        ]
        oldest = min(range(len(heads)), key=sequences.__getitem__)
        return Checkpoint(self._position(heads[oldest]), self._resume(sequences, sequences[oldest]), window)

    def _position(self, oldest: Record | None) -> Position:
        return Position(PositionKind.AT, oldest.id) if oldest else Position(PositionKind.AFTER, self._newest)

    def _resume(self, sequences: list[int], next_sequence: int) -> tuple[Vector, ...]:
        """Per lane the first sequence not known settled, never below what was loaded: after a restart `newest` starts
        below the old one. Vectors of another ParallelizationFactor are kept until the position has passed them.
        """
        vectors = []
        for floor in self._floors:
            if len(floor) == len(sequences):
                sequences = [max(pair) for pair in zip(sequences, floor, strict=True)]
            else:
                vectors.append(floor)
        vectors.append(tuple(sequences))
        return tuple(vector for vector in vectors if max(vector) > next_sequence)

    def status(self) -> FlowStatus:
        """A snapshot for operators."""
        heads = [head.arrival for lane in self._lanes if (head := lane.head()) is not None]
        batches = [lane.batch[-1].arrival for lane in self._lanes if lane.batch]
        failing = [lane for lane in self._lanes if lane.failing_since is not None]
        status = FlowStatus(self.in_flight, min(heads, default=None), min(batches, default=None))
        if not failing:
            return status
        worst = min(failing, key=lambda lane: lane.failing_since or inf)
        return FlowStatus(
            in_flight=status.in_flight,
            oldest_arrival=status.oldest_arrival,
            batch_arrival=status.batch_arrival,
            blocked_since=worst.failing_since,
            attempts=worst.tries,
            first_sequence=worst.batch[0].id if worst.batch else None,
            last_sequence=worst.batch[-1].id if worst.batch else None,
            error=worst.error,
            next_attempt=None if worst.out and not worst.is_unheard else worst.not_before,
        )
