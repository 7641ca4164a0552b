"""One queue mapping: a pool of receive loops that grows and shrinks, and what they share.

Loops come when there is more than those that are there can take, and go when somebody else receives anyway: one loop
polls an idle queue.
"""

import asyncio
from math import inf

import structlog

from poller.core.model import Failed, Mapping, Outcome, QueuePolicy, ShardStatus, Throttled
from poller.core.scaling import Scaling
from poller.errors import PollerError, SourceThrottled
from poller.ports import QueueSource
from poller.runtime.circuit import Circuit
from poller.runtime.context import Context, Pipe
from poller.runtime.deletes import Deletes
from poller.runtime.receive_loop import Phase, Queue, ReceiveLoop
from poller.runtime.runner import Stopping
from poller.runtime.visibility import VisibilityKeeper
from poller.runtime.waiting import sleep_until, wait_until

_log = structlog.get_logger(__name__)

STOP_POLL = 1.5  # how long a stop waits for polls to end by themselves; the idle long ones are then cut off
GIVE_BACK = 5.0  # how long a stop tries to return messages
VISIBILITY_RESERVE = 30.0  # AWS receives with window + timeout + 30 s when the queue's own timeout is shorter
_LEAST_VISIBILITY = 1.0  # a queue may have 0: then a message could be received again before it is invoked
_LOOK_AT_QUEUE = 300.0  # how often the queue's own visibility timeout is asked for
_MOST_SEEKING = 40  # loops that receive at once: more replies than that a process cannot read


def _shape(mapping: Mapping) -> tuple[object, ...]:
    return mapping.source, mapping.queue.circuit_breaker, mapping.batch.window > 0


class QueueRunner:
    """Implements `Runner` for SQS, and `Pool` for its loops."""

    retention: float | None = None
    is_settled = True  # it has no positions

    def __init__(self, context: Context, pipe: Pipe) -> None:
        self.is_reached = False
        self.problem = ""
        self.visibility = 0.0
        self.groups: set[str] = set()
        self.seeking = 0
        self._context = context
        self._clock = context.clock
        self._pipe = pipe
        self._mapping = pipe.mapping
        policy = pipe.mapping.queue
        self._leases = context.leases
        self._floor, ceiling = self._part(policy)
        self._scaling = Scaling(self._floor, ceiling, policy.growth)
        self._circuit = Circuit(context.clock, context.backoff) if policy.circuit_breaker else None
        self._source: QueueSource | None = None
        self._queue: Queue | None = None
        self._timeout = 0.0  # the queue's own visibility timeout
        self._deletes: Deletes | None = None
        self._keeper: VisibilityKeeper | None = None
        self._services: list[asyncio.Task[None]] = []
        self._stopping = Stopping(context.clock, pipe.mapping)
        self._loops: dict[ReceiveLoop, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._is_short = asyncio.Event()  # the limit forbade a loop
        self._left: list[ReceiveLoop] = []  # stopped ones, with what they hold

    # --- Runner

    def stop(self, grace: float = inf) -> None:
        """See `Runner.stop`."""
        self._stopping.ask(grace)

    def retune(self, pipe: Pipe) -> bool:
        """See `Runner.retune`. That there is a circuit, or a window, is for the whole life of a runner."""
        was, mapping = self._mapping, pipe.mapping
        is_repointed = pipe.target is not self._pipe.target
        if _shape(was) != _shape(mapping):
            return False
        now = self._clock.now()
        self._scaling.limit(now)  # growth until now was under the old bounds
        self._pipe, self._mapping = pipe, mapping
        self._divide()
        if self._queue is not None:
            self._queue.pipe = pipe
            self._plan_visibility(self._timeout)
        if is_repointed:
            for loop in self._loops:
                loop.repointed()
            if self._circuit and self._circuit.reset():
                _log.info("circuit_closed", mapping=mapping.id, function=mapping.function.name)
        return True

    def _part(self, policy: QueuePolicy) -> tuple[int, int]:
        """Loops that this member of the fleet keeps, and may have at most. What holds for the fleet is shared out."""
        if policy.shared is None or self._leases.is_alone:
            return policy.floor, policy.ceiling
        ceiling = min(policy.ceiling, self._leases.slots(policy.shared))
        return min(ceiling, max(1, self._leases.slots(policy.floor))), ceiling

    def _divide(self) -> None:
        policy = self._mapping.queue
        self._floor, ceiling = self._part(policy)
        self._scaling.retune(self._floor, ceiling, policy.growth)
        if self._queue is not None:
            for _ in range(self._floor):
                self._want(is_hot=False)

    async def _follow_members(self) -> None:
        """Members come and go: the sum of the parts is above the whole for as long as it takes to see that."""
        while True:
            await self._leases.watch().wait()
            self._scaling.limit(self._clock.now())
            self._divide()

    def seek(self) -> None:
        """It has no positions."""

    @property
    def may_overlap(self) -> bool:
        """Not where the number of invocations at once is bounded."""
        return self._mapping.queue.ceiling >= QueuePolicy().ceiling

    def shards(self) -> tuple[ShardStatus, ...]:
        """A queue has none."""
        return ()

    def in_flight(self) -> int:
        """Invocations that run now."""
        return sum([loop.phase is Phase.DELIVERING for loop in self._loops])

    @property
    def breaker(self) -> str:
        """See `Runner.breaker`."""
        return self._circuit.state if self._circuit else "closed"

    @property
    def receivers(self) -> int | None:
        """See `Runner.receivers`."""
        return len(self._loops)

    @property
    def receiver_limit(self) -> int | None:
        """See `Runner.receiver_limit`."""
        return self._scaling.limit(self._clock.now())

    async def run(self) -> None:
        """Work until `stop`. What was received and not invoked goes back to the queue at once."""
        try:
            await self._run()
        finally:
            if self._source is not None:
                await self._source.close()

    # --- life

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            opener = tasks.create_task(self._open(tasks))
            await self._stopping.asked.wait()
            opener.cancel()
            await self._end_loops()
            for service in self._services:
                service.cancel()

    async def _open(self, tasks: asyncio.TaskGroup) -> None:
        """Reach the queue, however long it takes, then start the first loops and what serves them."""
        failures = 0
        while True:
            try:
                if self._source is None:
                    self._source = await self._pipe.open_queue()
                timeout = await self._source.visibility_timeout()
                break
            except PollerError as error:
                failures += 1
                await self.wait_out(error, failures)
        self._set_problem("")
        self.is_reached = True
        self._plan_visibility(timeout)
        self._deletes = Deletes(self._source, tasks)
        self._queue = Queue(self._context, self._pipe, self._source, self._circuit, self._deletes, self._stopping)
        self._tasks = tasks
        self._keeper = VisibilityKeeper(
            self._mapping, self._clock, self._source, lambda: self.visibility, lambda: (*self._loops, *self._left)
        )
        self._services += [
            tasks.create_task(self._keeper.run()),
            tasks.create_task(self._grow()),
            tasks.create_task(self._look_at_queue(self._source)),
            tasks.create_task(self._follow_members()),
        ]
        self._divide()

    async def _end_loops(self) -> None:
        """Cut off what waits; let end what delivers. A receive that is under way may bring messages: wait a little for
        it, then cut the idle long polls off. What is held goes back when nobody receives any more, or it would go to a
        poll of ours, perhaps a dead one.

        Cut off at once, messages on the way would stay invisible until their timeout; waited for to the end, an idle
        queue would delay every stop by 20 seconds.
        """
        for task in self._tasks_in(Phase.WAITING):
            task.cancel()
        if receiving := self._tasks_in(Phase.RECEIVING):
            await asyncio.wait(receiving, timeout=STOP_POLL)
        if idle := self._tasks_in(Phase.RECEIVING):
            for task in idle:
                task.cancel()
            await asyncio.wait(idle)
        await self._return()
        await self._stopping.drain(self._loops.values())
        if self._deletes is not None:
            self._deletes.cut_off()
        await self._return()

    def _tasks_in(self, phase: Phase) -> list[asyncio.Task[None]]:
        return [task for loop, task in self._loops.items() if loop.phase is phase]

    async def _run_loop(self, loop: ReceiveLoop) -> None:
        try:
            await loop.run()
        finally:
            del self._loops[loop]
            # The others would pile up here, and loops come and go with every batch.
            if loop.held and loop.phase is not Phase.DELIVERING:
                self._left.append(loop)

    async def _return(self) -> None:
        """What stopped loops hold was received and is not invoked: visible again at once."""
        records = [record for loop in self._left for record in loop.held]
        if not records or self._source is None:
            return
        try:
            async with asyncio.timeout(GIVE_BACK):
                left = len(await self._source.extend(records, 0))
        except TimeoutError:
            left = len(records)
        self._left.clear()
        _log.info(
            "messages_returned",
            mapping=self._mapping.id,
            function=self._mapping.function.name,
            messages=len(records) - left,
        )
        if left:
            self._warn("messages_not_returned", messages=left, meaning="they come back when their visibility ends")

    # --- visibility

    async def _look_at_queue(self, source: QueueSource) -> None:
        """Follow the queue's own visibility timeout."""
        while True:
            await sleep_until(self._clock, self._clock.now() + _LOOK_AT_QUEUE)
            try:
                self._plan_visibility(await source.visibility_timeout())
            except PollerError as error:
                _log.debug("visibility_timeout_unknown", mapping=self._mapping.id, error=str(error))

    def _plan_visibility(self, timeout: float) -> None:
        self._timeout = timeout
        window, function_timeout = self._mapping.batch.window, self._pipe.target.timeout
        needed = window + function_timeout
        visibility = max(timeout, _LEAST_VISIBILITY)
        if window > 0 and needed > timeout:
            visibility = needed + VISIBILITY_RESERVE
        if needed > timeout and visibility != self.visibility:
            self._warn(
                "visibility_timeout_short",
                queue_visibility_timeout=timeout,
                function_timeout=function_timeout,
                batching_window=window,
                used_visibility_timeout=visibility,
                meaning="visibility is extended while a message is held; where that fails, or the daemon dies, the "
                "message is delivered again while the function may still work on it; give the queue 6 times the "
                "function's timeout plus the window",
            )
        self.visibility = visibility

    # --- Pool

    def needs(self, loop: ReceiveLoop) -> bool:
        """See `Pool.needs`."""
        if len(self._loops) > self._scaling.limit(self._clock.now()):
            return False
        return self.seeking < self._floor or (loop.is_hot and self.seeking < _MOST_SEEKING)

    def took(self, expires: float) -> None:
        """See `Pool.took`."""
        if self._keeper is not None:
            self._keeper.took(expires)

    def received(self, *, is_full: bool) -> None:
        """See `Pool.received`."""
        self._set_problem("")
        self._scaling.received(is_full=is_full, loops=len(self._loops), now=self._clock.now())
        if is_full and self._mapping.batch.window == 0:  # else it would only spread the messages over more windows
            self._want(is_hot=True)

    def emptied(self) -> None:
        """See `Pool.emptied`."""
        self._set_problem("")
        self._scaling.emptied(len(self._loops))

    def begins(self) -> None:
        """See `Pool.begins`."""
        self._want(is_hot=False)

    def settled(self, outcome: Outcome) -> None:
        """See `Pool.settled`."""
        match outcome:
            case Throttled(retry_after=retry_after, error=error):
                self._scaling.throttled(len(self._loops), self._clock.now())
                if self._circuit and self._circuit.refused(retry_after):
                    self._scaling.reset()
                    self._warn("circuit_opened", error=error, meaning="nothing is received until the target answers")
                return
            case Failed():
                if not self._mapping.retry.report_failures:  # documented: else a failure does not slow the mapping
                    self._scaling.failed()
            case _:
                self._scaling.succeeded()
        if self._circuit and self._circuit.ran():
            _log.info("circuit_closed", mapping=self._mapping.id, function=self._mapping.function.name)

    def expired(self) -> None:
        """See `Pool.expired`."""
        self._scaling.throttled(len(self._loops), self._clock.now())

    def is_holding(self) -> bool:
        """See `Pool.is_holding`."""
        return any(loop.held for loop in self._loops)

    def trouble(self, error: PollerError) -> None:
        """See `Pool.trouble`."""
        self._set_problem(str(error))

    async def wait_out(self, error: PollerError, failures: int) -> None:
        """See `Pool.wait_out`."""
        self.trouble(error)
        retry_after = error.retry_after if isinstance(error, SourceThrottled) else None
        delay = self._context.trouble.delay(failures, retry_after)
        await wait_until(self._stopping.asked, self._clock, self._clock.now() + delay)

    def _want(self, *, is_hot: bool) -> None:
        """One more loop, if nobody receives or, where replies are full, as long as a process can read them."""
        if self._stopping.asked.is_set() or self._tasks is None or self._queue is None:
            return
        if self.seeking >= (_MOST_SEEKING if is_hot else self._floor):
            return
        if len(self._loops) >= self._scaling.limit(self._clock.now()):
            self._is_short.set()
            return
        loop = ReceiveLoop(self._queue, self)
        self._loops[loop] = self._tasks.create_task(self._run_loop(loop))

    async def _grow(self) -> None:
        """Add loops when the limit grows although all loops are busy."""
        while True:
            await self._is_short.wait()
            self._is_short.clear()
            at = self._scaling.grows_at(self._clock.now())
            if at < inf:  # else somebody sets the event again when there is news
                await sleep_until(self._clock, at)
                self._want(is_hot=True)

    # --- trouble

    def _set_problem(self, problem: str) -> None:
        if problem and problem != self.problem:
            self._warn("mapping_problem", error=problem)
        self.problem = problem

    def _warn(self, event: str, **fields: object) -> None:
        _log.warning(event, mapping=self._mapping.id, function=self._mapping.function.name, **fields)
