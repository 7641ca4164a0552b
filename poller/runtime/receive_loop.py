"""One receive loop of a queue mapping: it has one batch at a time.

receive (long poll) -> [window: receive more] -> invoke -> delete what succeeded
       ^                                           |
       +------------ failed ones wait for visibility, or their own delay; throttled: again while they are ours
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from typing import Protocol

import structlog

from poller.core.flow import split
from poller.core.model import Batch, Delivered, Failed, Mapping, Outcome, Partial, Record, Throttled
from poller.errors import PollerError, SourceThrottled
from poller.ports import QueueSource
from poller.runtime.circuit import Circuit
from poller.runtime.context import Context, Pipe
from poller.runtime.deletes import Deletes
from poller.runtime.invoke import invoke
from poller.runtime.runner import Stopping
from poller.runtime.visibility import LONGEST
from poller.runtime.waiting import wait_until

_log = structlog.get_logger(__name__)

LONG_POLL = 20.0
# While messages are held in a window, so that a stop need not cut a poll off: SQS would hand the messages that go back
# to the dead poll. And where others may want the slot that a poll holds.
SHORT_POLL = 1.0
_MESSAGES_PER_RECEIVE = 10
_MOST_CALLS = 10  # receives at once for one window
_PERMIT_LIFE = 0.1  # seconds that a permit is good for after it was taken: the rate holds for invocations, not receives


class Phase(Enum):
    """What a stop does with a loop: it waits for the last two."""

    WAITING = auto()
    RECEIVING = auto()
    DELIVERING = auto()  # from the call of the target until its messages are settled


class Pool(Protocol):
    """The loops of one queue, as one of them sees it."""

    visibility: float
    """What receives ask for."""
    groups: set[str]
    """FIFO: the message groups that are being delivered."""
    seeking: int
    """Loops that look for messages: they wait to receive, receive or fill a window."""

    def needs(self, loop: "ReceiveLoop") -> bool:
        """May this loop receive (again)? Else it ends."""
        ...

    def took(self, expires: float) -> None:
        """Messages are held from now on; the visibility of one ends then."""
        ...

    def received(self, *, is_full: bool) -> None:
        """A receive brought messages, as many as were asked for or less."""
        ...

    def emptied(self) -> None:
        """A receive brought none."""
        ...

    def begins(self) -> None:
        """A loop delivers and receives no more: another one may."""
        ...

    def settled(self, outcome: Outcome) -> None:
        """An invocation ended."""
        ...

    def expired(self) -> None:
        """Messages could not be kept until they were done: more is in flight than the machine or the target bears."""
        ...

    def is_holding(self) -> bool:
        """Does any loop hold messages?"""
        ...

    def trouble(self, error: PollerError) -> None:
        """The queue does not answer."""
        ...

    async def wait_out(self, error: PollerError, failures: int) -> None:
        """The queue has not answered so many times in a row: wait before the next receive."""
        ...


@dataclass(slots=True)
class Queue:
    """What the loops of one queue share. `pipe` may be replaced: the next batch goes over it."""

    context: Context
    pipe: Pipe
    source: QueueSource
    circuit: Circuit | None
    deletes: Deletes
    stopping: Stopping


class _Turn:
    """The right to call the function once: one of its slots and, where it has a rate, a permit.

    Another function has another gate: what is held of the old one goes back, and nobody stays in its line.
    """

    __slots__ = ("_clock", "_gate", "_has_slot", "_line", "_queue", "_stamp", "_taken_at")

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._gate = queue.pipe.gate
        self._clock = queue.context.clock
        self._has_slot = False
        self._stamp: float | None = None
        self._taken_at = -inf
        self._line: asyncio.Timeout | None = None  # while waiting in the gate's line

    async def slot(self) -> None:
        """Take a slot, of the gate that counts now."""
        self._follow()
        while not self._has_slot:
            if self._gate.acquire_free():
                self._has_slot = True
                return
            await self._wait(self._acquire())
            self._follow()

    async def whole(self) -> None:
        """Take slot and permit; one that is held already is kept, a permit only while it is fresh."""
        while True:
            await self.slot()
            if self._stamp is not None and self._clock.now() - self._taken_at > _PERMIT_LIFE:
                self._refund()
            if self._stamp is not None or not self._gate.is_rated:
                return
            await self._wait(self._permit())

    def repointed(self) -> None:
        """The queue has another pipe: leave a line that counts no more."""
        if self._line is not None and not self._line.expired() and self._gate is not self._queue.pipe.gate:
            self._line.reschedule(-inf)

    def used(self) -> None:
        """The function was called."""
        self._stamp = None

    def end(self) -> None:
        """Give everything back that was not used."""
        self._refund()
        if self._has_slot:
            self._has_slot = False
            self._gate.release()

    def _refund(self) -> None:
        if self._stamp is not None:
            self._gate.refund(self._stamp)
            self._stamp = None

    def _follow(self) -> None:
        if self._gate is not self._queue.pipe.gate:
            self.end()
            self._gate = self._queue.pipe.gate

    async def _wait(self, step: Coroutine[None, None, None]) -> None:
        """Do it, or give up when it is for the wrong function."""
        try:
            async with asyncio.timeout(None) as self._line:
                await step
        except TimeoutError:
            pass
        finally:
            self._line = None

    async def _acquire(self) -> None:
        await self._gate.acquire()
        self._has_slot = True

    async def _permit(self) -> None:
        self._stamp = await self._gate.permit()
        self._taken_at = self._clock.now()


class ReceiveLoop:
    """Runs while the pool needs it.

    `held`: messages received and not yet done with; unless the phase is DELIVERING, whoever ends this loop returns them
    to the queue. `began`: when the oldest of them was asked for.
    """

    def __init__(self, queue: Queue, pool: Pool) -> None:
        self.held: list[Record] = []
        self.began = 0.0
        self.extension: asyncio.Event | None = None
        self.phase = Phase.WAITING
        self.is_hot = True  # its last receive brought as many messages as were asked for, or it is new
        self._queue = queue
        self._pool = pool
        self._clock = queue.context.clock
        self._stopped = queue.stopping.asked
        self._turn = _Turn(queue)
        self._repointed = asyncio.Event()  # since the last invocation began
        self._counted = 0  # bytes of `held` in the budget
        self._failures = 0

    async def run(self) -> None:
        """Receive and deliver until the pool does not need this loop, or a stop. Never raises: the failure domain."""
        try:
            while not self._stopped.is_set() and self._pool.needs(self):
                try:
                    await self._round()
                    self._failures = 0
                except PollerError as error:
                    self._failures += 1
                    self.is_hot = False
                    self._turn.end()
                    await self._pool.wait_out(error, self._failures)
                except Exception as error:  # noqa: BLE001  # one bad batch never stops the other loops
                    self._failures += 1
                    self.phase = Phase.WAITING
                    _log.error("receive_loop_crashed", exc_info=error, **self._names)
                    self._cut_off()
                    self._turn.end()
                    self._drop(len(self.held))  # they come back when their visibility ends
                    delay = self._queue.context.trouble.delay(self._failures)
                    await self._sleep(delay)
        finally:
            self._turn.end()
            self._queue.context.budget.give(self._counted)
            self._counted = 0

    def repointed(self) -> None:
        """The queue has another target: wait no more for the old one, whose late answers say nothing about the new."""
        self._turn.repointed()
        self._repointed.set()

    async def _round(self) -> None:
        """One batch, or one receive that brings nothing."""
        self._pool.seeking += 1
        try:
            await self._room()
            await self._collect()
        finally:
            self._pool.seeking -= 1
        if self.held:
            await self._deliver()
        self._turn.end()

    async def _room(self) -> None:
        """Wait while the process is short of memory; one loop of a queue may always go on."""
        budget = self._queue.context.budget
        while budget.left() == 0 and self._pool.is_holding():
            given = asyncio.Event()
            budget.notify(given, 0)  # by any: what is given back may be the last that this queue held
            try:
                await given.wait()
            finally:
                budget.forget(given)

    # --- receiving

    async def _collect(self) -> None:
        """Fill `held` with one batch: what one receive brings, or what comes within the batching window.

        The window starts with the first message; an empty one does not run. A long poll never outlasts it.
        """
        policy, circuit = self._mapping.batch, self._queue.circuit
        while True:
            if circuit:
                await circuit.wait_to_receive()
            await self._turn.slot()
            if self.is_hot and policy.window == 0:
                await self._turn.whole()  # a limited function pauses receiving
            if circuit is None or circuit.receive():
                break
            self._turn.end()
        try:
            await self._receive(policy.size, SHORT_POLL if self._queue.pipe.gate.is_scarce else LONG_POLL)
        finally:
            if circuit:
                circuit.received()
        if self.held and policy.window > 0:
            self._turn.end()  # a window may last minutes, and others may want the slot
            await self._fill(self._clock.now() + policy.window)

    async def _fill(self, ends_at: float) -> None:
        """Receive more until the window ends or the batch is full; by several calls at once while replies are full."""
        policy, circuit, budget = self._mapping.batch, self._queue.circuit, self._queue.context.budget
        calls = 1
        while len(self.held) < policy.size and self._counted < policy.max_bytes and not self._stopped.is_set():
            left = ends_at - self._clock.now()
            wait = SHORT_POLL if left >= SHORT_POLL else 0.0
            may_receive = budget.left() > 0 and (circuit is None or circuit.state == "closed")
            # In the last second only what is there already, as long as there is more of it.
            if left <= 0 or not may_receive or (wait == 0 and not self.is_hot):
                await wait_until(self._stopped, self._clock, ends_at)
                return
            room = policy.size - len(self.held)
            calls = min(2 * calls if self.is_hot else 1, _MOST_CALLS, -(-room // _MESSAGES_PER_RECEIVE))
            try:
                await self._receive(room, wait, calls)
            except PollerError as error:
                self._pool.trouble(error)
                await self._sleep(SHORT_POLL)

    async def _receive(self, room: int, wait: float, calls: int = 1) -> None:
        """Add to `held` what so many receives at once bring, `room` messages at most."""
        asked = self._clock.now()
        limits = [min(_MESSAGES_PER_RECEIVE, room - _MESSAGES_PER_RECEIVE * call) for call in range(calls)]
        self.phase = Phase.RECEIVING
        try:
            if calls == 1:
                answers: Sequence[Sequence[Record] | BaseException] = [await self._call_queue(limits[0], wait)]
            else:
                receives = [self._call_queue(limit, wait) for limit in limits]
                answers = await asyncio.gather(*receives, return_exceptions=True)
        except BaseException:
            self.phase = Phase.WAITING
            raise
        records = [record for answer in answers if not isinstance(answer, BaseException) for record in answer]
        self.is_hot = len(records) == sum(limits)
        if records:
            await self._take_in(records, asked)
        self.phase = Phase.WAITING
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        if not records:
            self._pool.emptied()

    async def _call_queue(self, limit: int, wait: float) -> Sequence[Record]:
        observer = self._queue.pipe.observer
        try:
            records = await self._queue.source.receive(limit, wait, self._pool.visibility)
        except PollerError as error:
            throttled = isinstance(error, SourceThrottled)
            observer.polled("ReceiveMessage", "throttled" if throttled else "error", 0)
            raise
        observer.polled("ReceiveMessage", "success", len(records))
        return records

    async def _take_in(self, records: Sequence[Record], asked: float) -> None:
        """Hold what is to be delivered; delete what no filter matches."""
        unwanted: list[Record] = []
        if self._mapping.source.fifo:
            # A group that is still being delivered was received again because its visibility ended under our hands. It
            # waits for its visibility once more: two attempts at once would reorder it.
            records = [record for record in records if record.key not in self._pool.groups]
        if matches := self._queue.pipe.matches:
            wanted: list[Record] = []
            for record in records:
                (wanted if matches(record) else unwanted).append(record)
            records = wanted
        if not self.held:
            self.began = asked
        self._keep(records)
        if records:
            self._pool.took(min([record.expires for record in records]))
        self._pool.received(is_full=self.is_hot)
        if unwanted:
            self._queue.pipe.observer.filtered(len(unwanted))
            await self._delete(unwanted)

    def _keep(self, records: Sequence[Record]) -> None:
        nbytes = sum([len(record.wire) for record in records])
        self.held += records
        self._counted += nbytes
        self._queue.context.budget.take(nbytes)

    def _drop(self, count: int) -> None:
        """Done with the first `count` messages."""
        nbytes = sum([len(record.wire) for record in self.held[:count]])
        del self.held[:count]
        self._counted -= nbytes
        self._queue.context.budget.give(nbytes)

    # --- delivering

    async def _deliver(self) -> None:
        """Invoke with what is held, one payload after the other."""
        while not self._stopped.is_set():
            outcome, records = await self._invoke()
            if outcome is None:
                return
            if self.extension is not None:
                await self.extension.wait()
            self._drop(len(records))
            # Before the queue hears of it: it gives out what follows in a group the moment that it has, and another
            # loop may be told so before this one.
            self._pool.groups.difference_update([record.key for record in records])
            match outcome:
                case Delivered():
                    await self._delete(records)
                case Partial(failed=failed, delays=delays):
                    await self._delete([record for record in records if record.id not in failed])
                    await self._delay(records, dict(delays))
                case _:
                    pass  # nothing is deleted and visibility is left alone: they come back by themselves
            if self.held and self._mapping.source.fifo and not isinstance(outcome, Delivered):
                # What follows in a group must not overtake what failed; the queue keeps the group locked.
                await self._return()
            self.phase = Phase.WAITING
            if not self.held:
                return

    async def _invoke(self) -> tuple[Outcome | None, tuple[Record, ...]]:
        """The outcome of the next batch of what is held; throttled ones are tried again while they are ours. None: a
        stop was asked, or nothing is ours any more.
        """
        tries = 0
        records: tuple[Record, ...] = ()
        while True:
            await self._wait_for_turn()
            tries = tries + 1 if not await self._drop_expired() else 1
            records = tuple(self.held[: len(records)]) if tries > 1 else split(self.held, self._mapping.batch)
            if not records:
                self._cut_off()
                return None, ()
            self._repointed.clear()
            outcome = await self._call(Batch(0, records, tries))
            if not self._repointed.is_set():
                self._pool.settled(outcome)
            match outcome:
                case Throttled(error=error, retry_after=retry_after):
                    delay = self._queue.context.backoff.delay(tries, retry_after)
                    self._warn("invocation_waits", error=error, records=len(records), attempt=tries, retry_in=delay)
                case Failed(error=error):
                    self._warn("invocation_failed", error=error, records=len(records), attempt=tries)
                    return outcome, records
                case Partial(failed=failed):
                    self._warn("batch_partly_failed", records=len(records), failed=len(failed), attempt=tries)
                    return outcome, records
                case Delivered():
                    return outcome, records
            self._pool.groups.difference_update([record.key for record in records])
            self.phase = Phase.WAITING
            if self._stopped.is_set():
                return None, ()
            if self._queue.circuit is None or self._queue.circuit.state == "closed":
                await wait_until(self._repointed, self._clock, self._clock.now() + delay)

    async def _wait_for_turn(self) -> None:
        """Until the function may be called, by its slots, its rate and the circuit."""
        circuit = self._queue.circuit
        if circuit is None:
            await self._turn.whole()
            return
        circuit.hold()
        try:
            while True:
                await circuit.wait_to_invoke()
                await self._turn.whole()
                if circuit.invoke():
                    return
                self._turn.end()
        finally:
            circuit.let_go()

    async def _drop_expired(self) -> bool:
        """Let go of what is not ours any more: somebody else may have it by now. True: there was something."""
        now = self._clock.now()
        kept = [record for record in self.held if record.expires > now]
        expired = len(self.held) - len(kept)
        if not expired:
            return False
        self._warn("messages_expired", messages=expired, meaning="their visibility ended before they were delivered")
        self._pool.expired()
        if self._mapping.source.fifo:
            await self._return()  # they must not overtake what expired
            return True
        self._drop(len(self.held))
        self._keep(kept)
        return True

    async def _call(self, batch: Batch) -> Outcome:
        self.phase = Phase.DELIVERING
        if self._mapping.source.fifo:
            self._pool.groups.update([record.key for record in batch.records])
        self._turn.used()
        self._pool.begins()
        try:
            return (await invoke(self._queue.pipe, self._clock, self._queue.context.random, batch)).outcome
        except BaseException:
            self._cut_off()
            self._pool.groups.difference_update([record.key for record in batch.records])
            raise
        finally:
            self._turn.end()  # while messages are settled somebody else may use the function

    def _cut_off(self) -> None:
        if self._queue.circuit:
            self._queue.circuit.cut_off()

    # --- settling

    async def _delete(self, records: Sequence[Record]) -> None:
        if not records:
            return
        left = await self._queue.deletes.delete(records)
        self._queue.pipe.observer.deleted(len(records) - left)
        if left:  # as a rule somebody else has received them meanwhile
            self._pool.expired()
            self._warn("delete_failed", messages=left, meaning="they will be delivered again")

    async def _delay(self, records: Sequence[Record], delays: dict[str, float]) -> None:
        """Failed messages whose answer said when they may come again."""
        longest = self.began + LONGEST - self._clock.now()
        by_seconds: dict[float, list[Record]] = {}
        for record in records:
            if record.id in delays:
                by_seconds.setdefault(min(delays[record.id], longest), []).append(record)
        for seconds, delayed in by_seconds.items():
            await self._queue.source.extend(delayed, seconds)

    async def _return(self) -> None:
        """Give back everything that is held."""
        if self.extension is not None:
            await self.extension.wait()
        held = list(self.held)
        self._drop(len(held))
        await self._give_back(held)

    async def _give_back(self, records: Sequence[Record]) -> None:
        """Received, not invoked: visible again at once."""
        if records:
            left = await self._queue.source.extend(records, 0)
            _log.info("messages_returned", messages=len(records) - len(left), **self._names)

    async def _sleep(self, seconds: float) -> None:
        """Until a stop at the longest."""
        await wait_until(self._stopped, self._clock, self._clock.now() + seconds)

    @property
    def _mapping(self) -> Mapping:
        return self._queue.pipe.mapping

    @property
    def _names(self) -> dict[str, str]:
        return {"mapping": self._mapping.id, "function": self._mapping.function.name}

    def _warn(self, event: str, **fields: object) -> None:
        _log.warning(event, **self._names, **fields)
