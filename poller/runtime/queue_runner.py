"""One queue mapping: receive loops that each take a slot, receive, invoke, delete.

slot -> receive (long poll) -> [window: receive more] -> invoke -> delete what succeeded
          ^                                                 |
          +------------- failed ones wait for visibility ---+   throttled: again while the receipts live
"""

import asyncio
from collections.abc import Sequence
from math import inf

import structlog

from poller.core.flow import split
from poller.core.model import Batch, Delivered, Failed, Outcome, Partial, Record, ShardStatus, Throttled
from poller.errors import PollerError, SourceThrottled
from poller.ports import QueueSource
from poller.runtime.context import Context, Pipe
from poller.runtime.invoke import invoke
from poller.runtime.runner import Stopping
from poller.runtime.waiting import sleep_until, wait_until

_log = structlog.get_logger(__name__)

RECEIVE_LOOPS = 5  # AWS starts with five batches at once
LONG_POLL = 20.0
# While messages are held in a window, so that a stop need not cut a poll off: SQS would hand the messages that go back
# to the dead poll. And where others may want the slot that a poll holds.
SHORT_POLL = 1.0
STOP_POLL = 1.5  # how long a stop waits for polls to end by themselves; the idle long ones are then cut off
GIVE_BACK = 5.0  # how long a stop tries to return messages
VISIBILITY_RESERVE = 30.0  # AWS receives with window + timeout + 30 s when the queue's own timeout is shorter
_MESSAGES_PER_RECEIVE = 10


class _Loop:
    """One receive loop. `held`: messages received and not yet done with. Unless `is_delivering`, that is from the call
    of the target to the last delete, a stop returns them to the queue.
    """

    __slots__ = ("held", "is_delivering", "is_receiving", "task")

    def __init__(self) -> None:
        self.held: list[Record] = []
        self.is_delivering = False
        self.is_receiving = False
        self.task: asyncio.Task[None] | None = None


class QueueRunner:
    """Implements `Runner` for SQS."""

    retention: float | None = None

    def __init__(self, context: Context, pipe: Pipe) -> None:
        self.is_reached = False
        self._context = context
        self._clock = context.clock
        self._pipe = pipe
        self._mapping = pipe.mapping
        self._problem = ""
        self._source: QueueSource | None = None
        self._visibility: float | None = None  # what receives ask for; None: the queue's own
        self._stopping = Stopping(context.clock, pipe.mapping)
        self._loops: list[_Loop] = []
        self._wanted = asyncio.Semaphore(0)  # one permit at most: a further loop may poll

    @property
    def problem(self) -> str:
        """See `Runner.problem`."""
        return self._problem

    def stop(self, grace: float = inf) -> None:
        """See `Runner.stop`."""
        self._stopping.ask(grace)

    def shards(self) -> tuple[ShardStatus, ...]:
        """A queue has none."""
        return ()

    def in_flight(self) -> int:
        """Invocations that run now."""
        return sum([loop.is_delivering for loop in self._loops])

    async def run(self) -> None:
        """Work until `stop`. What was received and not invoked goes back to the queue at once."""
        try:
            await self._run()
        finally:
            if self._source is not None:
                await self._source.close()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            opener = tasks.create_task(self._open(tasks))
            await self._stopping.asked.wait()
            opener.cancel()
            for loop in self._loops:
                if loop.task and not (loop.is_delivering or loop.is_receiving or loop.held):
                    loop.task.cancel()  # it waits for a slot, or out of trouble
            await self._end_receives()
            await self._stopping.drain([loop.task for loop in self._loops if loop.task])
        held = [record for loop in self._loops if not loop.is_delivering for record in loop.held]
        try:
            async with asyncio.timeout(GIVE_BACK):
                await self._give_back(held)
        except TimeoutError:
            self._warn("messages_not_returned", messages=len(held), meaning="they come back when their visibility ends")

    async def _end_receives(self) -> None:
        """A receive that is under way may bring messages: wait a little for it, then cut the idle long polls off.

        Cut off at once, messages on the way would stay invisible until their timeout; waited for to the end, an idle
        queue would delay every stop by 20 seconds.
        """
        receiving = [loop.task for loop in self._loops if loop.task and loop.is_receiving]
        if not receiving:
            return
        await asyncio.wait(receiving, timeout=STOP_POLL)
        for loop in self._loops:
            if loop.task and loop.is_receiving:
                loop.task.cancel()

    async def _open(self, tasks: asyncio.TaskGroup) -> None:
        """Reach the queue, however long it takes, then start the receive loops."""
        failures = 0
        while True:
            try:
                if self._source is None:
                    self._source = await self._pipe.open_queue()
                timeout = await self._source.visibility_timeout()
                break
            except PollerError as error:
                failures += 1
                await self._wait_out(error, failures)
        self._set_problem("")
        self.is_reached = True
        self._plan_visibility(timeout)
        count = min(RECEIVE_LOOPS, self._mapping.max_concurrency or RECEIVE_LOOPS)
        self._loops = [_Loop() for _ in range(count)]
        for loop in self._loops:
            loop.task = tasks.create_task(self._run_loop(self._source, loop, is_first=loop is self._loops[0]))

    def _plan_visibility(self, timeout: float) -> None:
        needed = self._mapping.batch.window + self._pipe.target.timeout
        if self._mapping.batch.window > 0 and needed > timeout:
            self._visibility = needed + VISIBILITY_RESERVE
        elif needed > timeout:
            _log.warning(
                "visibility_timeout_short",
                mapping=self._mapping.id,
                function=self._mapping.function.name,
                queue_visibility_timeout=timeout,
                function_timeout=self._pipe.target.timeout,
                meaning="a message may be delivered again while the function still works on it; "
                "raise the queue's visibility timeout to 6 times the function's timeout",
            )

    # --- one loop: the failure domain

    async def _run_loop(self, source: QueueSource, loop: _Loop, is_first: bool) -> None:
        """The first loop always polls. Another one is woken when a loop begins to deliver, and rests after an empty
        receive: so somebody polls at every moment, and an idle queue costs three requests a minute.
        """
        failures = 0
        while not self._stopping.asked.is_set():
            if not is_first and any(other.is_receiving for other in self._loops):
                await self._wanted.acquire()
            try:
                async with self._pipe.gate:
                    await self._collect(source, loop)
                    self._set_problem("")
                    if loop.held and self._wanted.locked():
                        self._wanted.release()  # somebody else polls while this loop delivers
                    await self._deliver(source, loop)
                failures = 0
            except PollerError as error:
                failures += 1
                await self._wait_out(error, failures)
            except Exception as error:  # noqa: BLE001  # one bad batch never stops the other loops
                failures += 1
                _log.error(
                    "receive_loop_crashed",
                    mapping=self._mapping.id,
                    function=self._mapping.function.name,
                    exc_info=error,
                )
                loop.held, loop.is_delivering = [], False  # they come back when their visibility ends
                await sleep_until(self._clock, self._clock.now() + self._context.trouble.delay(failures))

    async def _collect(self, source: QueueSource, loop: _Loop) -> None:
        """Fill `loop.held` with one batch: what one receive brings, or what comes within the batching window.

        The window starts with the first message; an empty one does not run. A long poll never outlasts it.
        """
        policy = self._mapping.batch
        wait = SHORT_POLL if self._pipe.gate.is_scarce else LONG_POLL
        await self._receive(source, loop, policy.size, wait)
        if not loop.held or policy.window == 0:
            return
        ends_at = self._clock.now() + policy.window
        nbytes = sum([len(record.wire) for record in loop.held])
        while len(loop.held) < policy.size and nbytes < policy.max_bytes and not self._stopping.asked.is_set():
            if ends_at - self._clock.now() < SHORT_POLL:
                await wait_until(self._stopping.asked, self._clock, ends_at)
                return
            before = len(loop.held)
            await self._receive(source, loop, policy.size - before, SHORT_POLL)
            nbytes += sum([len(record.wire) for record in loop.held[before:]])

    async def _receive(self, source: QueueSource, loop: _Loop, room: int, wait: float) -> None:
        loop.is_receiving = True
        try:
            records = await source.receive(min(_MESSAGES_PER_RECEIVE, room), wait, self._visibility)
        except PollerError as error:
            throttled = isinstance(error, SourceThrottled)
            self._pipe.observer.polled("ReceiveMessage", "throttled" if throttled else "error", 0)
            raise
        finally:
            loop.is_receiving = False
        loop.held.extend(records)
        self._pipe.observer.polled("ReceiveMessage", "success", len(records))

    async def _deliver(self, source: QueueSource, loop: _Loop) -> None:
        """Invoke with what is held, one payload after the other, while it is ours: an expired receipt is never invoked,
        and what is left goes back when the next invocation might outlive it.
        """
        is_further = False
        while loop.held and not self._stopping.asked.is_set():
            now = self._clock.now()
            loop.held = [record for record in loop.held if record.expires > now]
            if is_further and any(record.expires <= now + self._pipe.target.timeout for record in loop.held):
                await self._give_back(loop.held)
                loop.held = []
            if not loop.held:
                return
            is_further = True
            records = split(loop.held, self._mapping.batch)
            loop.is_delivering = True
            outcome = await self._invoke(loop, records)
            if outcome is None:
                return
            del loop.held[: len(records)]
            match outcome:
                case Delivered():
                    await self._delete(source, records)
                case Partial(failed=failed):
                    await self._delete(source, [record for record in records if record.id not in failed])
                case _:
                    pass  # nothing is deleted and visibility is left alone: they come back by themselves
            loop.is_delivering = False
            if loop.held and self._mapping.source.fifo and not isinstance(outcome, Delivered):
                # What follows in a group must not overtake what failed; the queue keeps the group locked.
                await self._give_back(loop.held)
                loop.held = []

    async def _invoke(self, loop: _Loop, records: tuple[Record, ...]) -> Outcome | None:
        """The outcome of a batch; throttled ones are tried again while every receipt lives. None: a stop was asked."""
        tries = 0
        while True:
            tries += 1
            outcome = await invoke(self._pipe, self._clock, self._context.random, Batch(0, records, tries))
            match outcome:
                case Throttled(error=error, retry_after=retry_after):
                    delay = self._context.backoff.delay(tries, retry_after)
                    self._warn("invocation_waits", error=error, records=len(records), attempt=tries, retry_in=delay)
                case Failed(error=error):
                    self._warn("invocation_failed", error=error, records=len(records), attempt=tries)
                    return outcome
                case Partial(failed=failed):
                    self._warn("batch_partly_failed", records=len(records), failed=len(failed), attempt=tries)
                    return outcome
                case Delivered():
                    return outcome
            at = self._clock.now() + delay
            if at >= min([record.expires for record in records]):
                return outcome  # forgotten, not deleted: they are received anew
            loop.is_delivering = False
            if await wait_until(self._stopping.asked, self._clock, at):
                return None
            loop.is_delivering = True

    async def _delete(self, source: QueueSource, records: Sequence[Record]) -> None:
        if not records:
            return
        left = await source.delete(records)
        self._pipe.observer.deleted(len(records) - len(left))
        if left:
            self._warn("delete_failed", messages=len(left), meaning="they will be delivered again")

    async def _give_back(self, records: Sequence[Record]) -> None:
        """Received, not invoked: visible again at once."""
        if not records or self._source is None:
            return
        left = await self._source.extend(records, 0)
        _log.info(
            "messages_returned",
            mapping=self._mapping.id,
            function=self._mapping.function.name,
            messages=len(records) - len(left),
        )

    # --- trouble

    async def _wait_out(self, error: PollerError, failures: int) -> None:
        self._set_problem(str(error))
        retry_after = error.retry_after if isinstance(error, SourceThrottled) else None
        delay = self._context.trouble.delay(failures, retry_after)
        await wait_until(self._stopping.asked, self._clock, self._clock.now() + delay)

    def _set_problem(self, problem: str) -> None:
        if problem and problem != self._problem:
            self._warn("mapping_problem", error=problem)
        self._problem = problem

    def _warn(self, event: str, **fields: object) -> None:
        _log.warning(event, mapping=self._mapping.id, function=self._mapping.function.name, **fields)
