"""One shard under one lease: reads it, invokes lane by lane, reports its position.

STARTING --iterator--> RUNNING --no next iterator--> ENDING --lanes empty--> (run returns)
    ^                     |
    +--iterator expired --+        stop() --> DRAINING --in flight ended--> (run returns)
"""

import asyncio
from collections.abc import Sequence
from math import inf

import structlog

from poller.core.flow import ShardFlow
from poller.core.model import (
    TRIM_HORIZON,
    Batch,
    Checkpoint,
    Delivered,
    Discard,
    Failed,
    Fetch,
    Lease,
    Outcome,
    Partial,
    Position,
    PositionKind,
    Record,
    Row,
    ShardState,
    ShardStatus,
    Throttled,
)
from poller.errors import (
    AccessDenied,
    IteratorExpired,
    PositionTrimmed,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
)
from poller.ports import StreamSource
from poller.runtime.context import Context, Pipe
from poller.runtime.discards import Discards, extent
from poller.runtime.invoke import Attempt, invoke
from poller.runtime.waiting import sleep_until, wait_until

_log = structlog.get_logger(__name__)

_GUESSED_RECORD_BYTES = 2048  # until the shard has shown its own
_FILTER_CHUNK = 500
_SMALL_READ_BYTES = 262_144  # what a shard may take although the byte budget is used up
_WHOLE_READ_SHARE = 4  # of the byte budget: more is not waited for
_RESERVATION = 1.0  # seconds that bytes are kept for an answer that has not come
_PATIENCE = 5.0  # seconds that a shard waits for the bytes of a whole read


class ShardWorker:
    """Runs one shard until it ends, is stopped, or its lease is lost.

    `is_fresh`: the row was created by this process just now, so a LATEST position may be taken by a LATEST iterator,
    once; later it is the moment that the row names. `is_stale`: so old that records after the position may have left
    retention.
    After `run` returned, `checkpoint()` is what to save; `has_ended` says that the shard is read and settled to its
    end, `is_gone` that the source does not know it any more, `is_lost` that the lease is another's: write nothing.
    """

    def __init__(
        self,
        context: Context,
        pipe: Pipe,
        source: StreamSource,
        row: Row,
        lease: Lease,
        *,
        is_fresh: bool,
        is_stale: bool = False,
    ) -> None:
        assert pipe.traits is not None
        self.lease = lease
        self.observer = pipe.observer
        self.saved = row.checkpoint
        self.state = ShardState.STARTING
        self.problem = ""
        self.is_gone = False
        self.is_lost = False
        self._context = context
        self._clock = context.clock
        self._pipe = pipe
        self._traits = pipe.traits
        self._source = source
        self._at = row.checkpoint.position  # where an iterator is asked for: after what is in memory
        self._is_fresh = is_fresh
        self._is_stale = is_stale
        self._is_inclusive = False  # the record that the next read must begin with is settled already
        self._floor = -inf  # records that arrived before it are not ours (LATEST on DynamoDB, after a restart)
        self._expected = ""  # the record that the next read must begin with, else something was trimmed
        self._flow = ShardFlow(pipe.mapping.batch, pipe.mapping.retry, context.backoff.delay, row.checkpoint)
        self._wake = asyncio.Event()  # lanes may be due, or the end may be reached
        self._room = asyncio.Event()  # somebody gave bytes back, perhaps this shard
        self._lanes: dict[int, asyncio.Task[None]] = {}
        self._calling: set[int] = set()
        self._failures: dict[int, Attempt] = {}  # per lane the last one, for the failure record
        self._discards = Discards(context, pipe, row.shard)
        self._is_sealed = False
        self._is_stopped = False
        self._lag: float | None = None
        self._record_bytes = _GUESSED_RECORD_BYTES
        # Of bytes, and for too long to wait for a whole read's. A fresh shard never waits: a LATEST iterator that is
        # asked for later passes over what came in between.
        self._is_short = is_fresh
        self._rereads = 0  # how often what was read was dropped: a read from before that must not be taken in
        self._reserved = 0  # bytes that the read under way may bring
        self._accounted = 0

    # --- for the runner and the checkpointer

    @property
    def has_ended(self) -> bool:
        """Read to its end and every record settled."""
        return self._is_sealed and self._flow.is_drained

    @property
    def in_flight(self) -> int:
        """Invocations that run now."""
        return len(self._calling)

    def checkpoint(self) -> Checkpoint | None:
        """Where a restart goes on; None when nothing was read yet."""
        return self._flow.checkpoint()

    def stop(self) -> None:
        """Begin nothing new; `run` returns when what is in flight has ended."""
        self._is_stopped = self._discards.is_stopped = True
        self.state = ShardState.DRAINING
        self._flow.stop()
        for lane, task in list(self._lanes.items()):
            if lane not in self._calling and lane not in self._discards.reporting:
                task.cancel()  # it waits for a slot and holds no work, or for its destination
                del self._lanes[lane]  # not left to the task: one that has not begun yet never gets to its `finally`
        self._wake.set()

    def retune(self, pipe: Pipe) -> None:
        """Go on with other limits, filters, target or destination; what is in flight ends as it began. One that was
        stopped, perhaps because it cannot take over another change, only lets it end.
        """
        if self._is_stopped:
            return
        self._pipe = self._discards.pipe = pipe
        self.observer = pipe.observer
        self._flow.retune(pipe.mapping.batch, pipe.mapping.retry)
        self._wake.set()
        self._room.set()

    def lose_lease(self) -> None:
        """Somebody else owns the shard: `run` cuts off what is in flight and returns; nothing more is written."""
        self.is_lost = True
        self.state = ShardState.LOST
        self._wake.set()

    def status(self) -> ShardStatus:
        """A snapshot for operators."""
        flow = self._flow.status()
        return ShardStatus(
            id=self.lease.shard,
            state=self.state,
            lag=self._lag,
            batch_arrival=flow.batch_arrival,
            oldest_arrival=flow.oldest_arrival,
            blocked_since=flow.blocked_since,
            in_flight=flow.in_flight,
            held=self._flow.held,
            attempts=flow.attempts,
            first_sequence=flow.first_sequence,
            last_sequence=flow.last_sequence,
            last_error=flow.error or self.problem or None,
            next_attempt=flow.next_attempt,
            lease="owned",
            owner=self.lease.owner,
        )

    # --- the shard

    async def run(self) -> None:
        """Cancelled: what is in flight is cut off and counts as not delivered."""
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read())
                await self._dispatch(tasks)
                reader.cancel()
                if self.is_lost:
                    for task in self._lanes.values():
                        task.cancel()
        finally:
            self._context.budget.give(self._accounted)
            self._accounted = 0

    async def _dispatch(self, tasks: asyncio.TaskGroup) -> None:
        """Start a task for each lane that is due; return at the end of the shard, when stopped and drained, or when the
        lease is lost. A lane that has a task is looked at again when the task ends.
        """
        while True:
            self._wake.clear()
            if self.is_lost or self.has_ended or (self._is_stopped and not self._lanes):
                return
            now, wake_at = self._clock.now(), inf
            for lane, due_at in enumerate(self._flow.due_at()):
                if lane in self._lanes:
                    continue
                if due_at <= now:
                    self._lanes[lane] = tasks.create_task(self._run_lane(lane))
                else:
                    wake_at = min(wake_at, due_at)
            await wait_until(self._wake, self._clock, wake_at)

    async def _run_lane(self, lane: int) -> None:
        """Work off a lane while it is due: a slot first, then the work."""
        try:
            while self._flow.due_at()[lane] <= self._clock.now():  # else it would queue for a slot in vain
                gate = self._pipe.gate
                async with gate as permit:
                    if gate is not self._pipe.gate:  # retuned meanwhile
                        gate.refund(permit)
                        continue
                    if self._context.leases.is_fenced:  # suspended, perhaps: others may have the shard by now
                        gate.refund(permit)
                        self.lose_lease()
                        return
                    work = self._flow.take(lane, self._clock.now())
                    if isinstance(work, Batch):
                        await self._invoke(work)
                    else:
                        gate.refund(permit)
                if isinstance(work, Discard):
                    await self._discards.give_up(self._flow, work, self._failures.pop(lane, None))
                    self._settled()
        finally:
            self._lanes.pop(lane, None)
            self._wake.set()

    async def _invoke(self, batch: Batch) -> None:
        self._calling.add(batch.lane)
        try:
            attempt = await invoke(self._pipe, self._clock, self._context.random, batch, self.lease.shard)
        finally:
            self._calling.discard(batch.lane)
        outcome = attempt.outcome
        if isinstance(outcome, Failed | Partial):
            self._failures[batch.lane] = attempt
        elif isinstance(outcome, Delivered):
            self._failures.pop(batch.lane, None)
        self._flow.resolve(batch, outcome, self._clock.now())
        self._log_outcome(batch, outcome)
        if self._context.budget.left() < _SMALL_READ_BYTES and not isinstance(outcome, Delivered):
            self._shed()
        self._settled()

    def _shed(self) -> None:
        """The process is short of memory and this shard is stuck: what waits behind the failing batch is read again
        when there is room.
        """
        if newest := self._flow.shed():
            self._at = Position(PositionKind.AFTER, newest)
            self._rereads += 1

    def _settled(self) -> None:
        self._account()
        self._context.checkpointer.moved(self)

    def _log_outcome(self, batch: Batch, outcome: Outcome) -> None:
        match outcome:
            case Failed(error=error) | Throttled(error=error):
                self._warn(
                    "invocation_failed" if isinstance(outcome, Failed) else "invocation_waits",
                    error=error,
                    attempt=batch.attempt,
                    **extent(batch.records),
                    retry_in=self._retry_in(),
                )
            case Partial(index=index):
                self._warn(
                    "batch_partly_failed",
                    attempt=batch.attempt,
                    records=len(batch.records),
                    settled=index,
                    first_failed=batch.records[index].id,
                    retry_in=self._retry_in(),
                )
            case _:
                pass

    def _retry_in(self) -> float | None:
        at = self._flow.status().next_attempt
        return None if at is None else round(max(0.0, at - self._clock.now()), 3)

    def _warn(self, event: str, **fields: object) -> None:
        mapping = self._pipe.mapping
        _log.warning(event, mapping=mapping.id, function=mapping.function.name, shard=self.lease.shard, **fields)

    # --- reading

    async def _read(self) -> None:
        """Read until the end of the shard. Trouble is waited out, whatever it is; lanes go on meanwhile."""
        iterator: str | None = None
        failures = rereads = 0
        asking, reading = self._traits.operations
        # Shards that began together would poll together, and wait for each other's answers, for ever.
        phase = self._context.random.random()
        while True:
            limit = await self._wait_for_room()
            started = self._clock.now()
            operation = reading
            # A source that hangs, or has more shards than turns, must not hold the bytes of others.
            reservation = asyncio.get_running_loop().call_later(_RESERVATION, self._let_go)
            if rereads != self._rereads:
                iterator, rereads = None, self._rereads
            try:
                if iterator is None:
                    operation = asking
                    iterator = await self._new_iterator()
                    operation = reading
                fetch = await self._source.fetch(self.lease.shard, iterator, limit)
            except IteratorExpired:
                # Normal for a shard that was blocked for longer than an iterator lives.
                self.observer.polled(operation, "expired", 0)
                iterator = None
                self.state = self.state if self._is_stopped else ShardState.STARTING
                failures += 1
                if failures > 1:  # a source that never accepts its own iterators must not be hammered
                    await self._pause(failures, None)
                continue
            except PositionTrimmed as error:
                self.observer.polled(operation, "error", 0)
                if self._at != TRIM_HORIZON:
                    self._report_loss(str(error))
                self._at = TRIM_HORIZON  # what lies between is lost
                iterator = None
                failures += 1
                if failures > 1:
                    await self._pause(failures, None)
                continue
            except SourceGone as error:
                self.observer.polled(operation, "error", 0)
                self._set_problem(str(error))
                self.is_gone = True
                self._seal()
                return
            except (SourceThrottled, SourceUnavailable, AccessDenied) as error:
                throttled = isinstance(error, SourceThrottled)
                self.observer.polled(operation, "throttled" if throttled else "error", 0)
                failures += 1
                if not throttled or failures > 1:
                    self._set_problem(str(error))
                await self._pause(failures, error.retry_after if isinstance(error, SourceThrottled) else None)
                continue
            except Exception as error:  # noqa: BLE001  # a defect in reading must not cut off what is in flight
                self.observer.polled(operation, "error", 0)
                failures += 1
                iterator = None
                self._set_problem(f"{type(error).__name__}: {error}")
                mapping = self._pipe.mapping
                _log.error("read_crashed", mapping=mapping.id, shard=self.lease.shard, exc_info=error)
                await self._pause(failures, None)
                continue
            finally:
                reservation.cancel()
                self._let_go()
            failures = 0
            self._set_problem("")
            unwanted = await self._unwanted(fetch.records)
            is_dropped = rereads != self._rereads
            if not is_dropped:
                self._take_in(fetch, unwanted)
            iterator = fetch.next_iterator
            is_behind = fetch.read >= limit or (fetch.lag > 0 if fetch.lag is not None else fetch.read > 0)
            del fetch, unwanted  # what the flow sheds would live on here while this waits for room
            if is_dropped:
                continue
            if iterator is None:
                self._seal()
                return
            interval = self._traits.min_interval
            if not is_behind:
                interval, phase = self._traits.tip_interval * phase, 1.0
            await sleep_until(self._clock, started + interval)

    async def _wait_for_room(self) -> int:
        """How many records to ask for: bounded by the shard's buffer and the bytes that the process may still take.

        Bytes for a whole read are waited for, because many small reads make many small batches. Not for long: what
        holds the bytes may be stuck. Then a shard takes little at a time, and at once, until there is room again.
        """
        budget, patient_until = self._context.budget, inf
        while True:
            self._room.clear()
            room = self._flow.room()
            if not room:
                await self._room.wait()
                continue
            most, left = min(room, self._traits.fetch_limit), budget.left()
            whole = min(most * self._record_bytes, budget.limit // _WHOLE_READ_SHARE)
            if left >= whole:
                self._is_short = False
            elif self._clock.now() >= patient_until:
                self._is_short = True
            holds_nothing = self._flow.held == 0
            if left >= whole or (self._is_short and (left >= _SMALL_READ_BYTES or holds_nothing)):
                if holds_nothing:
                    left = max(left, _SMALL_READ_BYTES)
                limit = min(most, max(1, min(left, max(whole, _SMALL_READ_BYTES)) // self._record_bytes))
                if not self._flow.newest and budget.left() < min(whole, _SMALL_READ_BYTES):
                    limit = 1  # nobody knows yet how large its records are
                if not self._traits.is_pushed:
                    self._reserved = limit * self._record_bytes
                self._account()
                return limit
            budget.notify(self._room, _SMALL_READ_BYTES if self._is_short else whole)
            if patient_until == inf and not self._is_short:
                patient_until = self._clock.now() + _PATIENCE
            try:
                await wait_until(self._room, self._clock, inf if self._is_short else patient_until)
            finally:
                budget.forget(self._room)

    def _account(self) -> None:
        """Tell the byte budget what this shard holds and reserves; what it gives back wakes those who wait for room."""
        change = self._flow.held_bytes + self._reserved - self._accounted
        self._accounted += change
        if change > 0:
            self._context.budget.take(change)
        elif change < 0:
            self._context.budget.give(-change)
            self._room.set()

    def _let_go(self) -> None:
        self._reserved = 0
        self._account()

    async def _new_iterator(self) -> str:
        position = self._position()
        self._is_fresh = False  # LATEST is asked for once, answered or not: what came in between would be lost
        iterator = await self._source.iterator(self.lease.shard, position)
        self._expected = position.value if position.kind is PositionKind.AT else ""
        self._is_inclusive = position is not self._at and bool(self._expected)
        if not self._is_stopped:
            self.state = ShardState.RUNNING
        return iterator

    def _position(self) -> Position:
        """After the last record that is in memory, else where the row says.

        A source may pass over a trimmed position without a word. So a stale one is asked for with the settled record
        itself: when it is not there, what followed may be gone too, and that is said.
        """
        if self._is_stale and self._at.kind is PositionKind.AFTER:
            return Position(PositionKind.AT, self._at.value)
        if self._at.kind is not PositionKind.LATEST or self._is_fresh:
            return self._at
        if self._traits.has_timestamps:
            return Position(PositionKind.AT_TIMESTAMP, self._at.value)
        self._floor = float(self._at.value)
        return TRIM_HORIZON

    async def _unwanted(self, records: Sequence[Record]) -> frozenset[str]:
        """Ids of the records that no filter matches. Thousands take a while: others get their turn in between."""
        matches = self._pipe.matches
        if matches is None:
            return frozenset()
        unwanted: list[str] = []
        for start in range(0, len(records), _FILTER_CHUNK):
            if start:
                await asyncio.sleep(0)
            unwanted += [record.id for record in records[start : start + _FILTER_CHUNK] if not matches(record)]
        return frozenset(unwanted)

    def _take_in(self, fetch: Fetch, unwanted: frozenset[str]) -> None:
        self.observer.polled(self._traits.operations[1], "success", fetch.read)
        self._lag = fetch.lag
        if fetch.read:
            self._admit(fetch, unwanted)
        is_at_tip = fetch.lag == 0 if fetch.lag is not None else fetch.read == 0
        if is_at_tip and self._flow.reached_tip(self._clock.now()):
            self._wake.set()

    def _admit(self, fetch: Fetch, unwanted: frozenset[str]) -> None:
        records = fetch.records
        self._at = Position(PositionKind.AFTER, fetch.newest)
        self._is_stale = False
        self._record_bytes = max(1, fetch.nbytes // fetch.read)
        if self._expected:
            if records and records[0].id != self._expected:
                self._report_loss(f"the shard now begins at {records[0].id}, after the position {self._expected}")
            elif self._is_inclusive:
                records = records[1:]
            self._expected = ""
        if self._floor > -inf:
            records = tuple([record for record in records if record.arrival >= self._floor])
            if not records:
                return  # the row stays at LATEST: a position would outlive the floor, which only it names
            self._floor = -inf
        if unwanted:
            count = len(records)
            records = tuple([record for record in records if record.id not in unwanted])
            self.observer.filtered(count - len(records))
        self._flow.admit(records, fetch.newest, self._clock.now())
        self._account()
        self._context.checkpointer.moved(self)
        self._wake.set()

    def _report_loss(self, reason: str) -> None:
        self.observer.lost(self.lease.shard, 1)
        mapping = self._pipe.mapping
        _log.error(
            "records_lost", mapping=mapping.id, function=mapping.function.name, shard=self.lease.shard, reason=reason
        )

    def _seal(self) -> None:
        self._is_sealed = True
        self._flow.seal()
        if not self._is_stopped:
            self.state = ShardState.ENDING
        self._wake.set()

    def _set_problem(self, problem: str) -> None:
        if problem and problem != self.problem:
            self._warn("source_problem", error=problem)
        self.problem = problem

    async def _pause(self, failures: int, retry_after: float | None) -> None:
        delay = self._context.trouble.delay(failures, retry_after)
        await sleep_until(self._clock, self._clock.now() + delay)
