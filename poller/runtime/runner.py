"""What the supervisor knows of a running mapping, and how both kinds of runner stop."""

import asyncio
from collections.abc import Iterable
from math import inf
from typing import Protocol

import structlog

from poller.core.model import Mapping, ShardStatus
from poller.ports import Clock
from poller.runtime.context import Pipe

_log = structlog.get_logger(__name__)


class Runner(Protocol):
    """One mapping at work."""

    is_reached: bool
    """The source has answered at least once."""
    is_settled: bool
    """No order to move positions is left to be carried out."""

    @property
    def may_overlap(self) -> bool:
        """Another runner of the mapping may begin while this one ends."""
        ...

    @property
    def problem(self) -> str:
        """What is wrong with the source or the store, for people; empty when nothing is."""
        ...

    @property
    def retention(self) -> float | None:
        """Seconds that the source keeps a record; None when unknown, or a queue."""
        ...

    @property
    def breaker(self) -> str:
        """A queue's circuit breaker: closed, open or probing; always closed for a stream."""
        ...

    @property
    def receivers(self) -> int | None:
        """A queue's receive loops now; None for a stream."""
        ...

    @property
    def receiver_limit(self) -> int | None:
        """How many receive loops there may be now; None for a stream."""
        ...

    async def run(self) -> None:
        """Work until `stop`; everything that the source or the network does is waited out."""
        ...

    def stop(self, grace: float = inf) -> None:
        """Begin nothing new; what is in flight has `grace` seconds. May be called again with less."""
        ...

    def retune(self, pipe: Pipe) -> bool:
        """Go on over another pipe, whose mapping may differ in anything but its source: what is in flight ends over the
        old one, what begins uses the new one. False: that takes a new runner, and nothing was changed.
        """
        ...

    def seek(self) -> None:
        """The store has orders to move positions."""
        ...

    def shards(self) -> tuple[ShardStatus, ...]:
        """Every shard; empty for a queue."""
        ...

    def in_flight(self) -> int:
        """Invocations that run now."""
        ...


class Stopping:
    """A stop that was asked for. `deadline`: until when what is in flight may go on; inf: as long as it takes."""

    def __init__(self, clock: Clock, mapping: Mapping) -> None:
        self._clock = clock
        self._mapping = mapping
        self.deadline = inf
        self._changed = asyncio.Event()
        self.asked = asyncio.Event()

    def ask(self, grace: float) -> None:
        """Stop within `grace` seconds from now, or sooner if that was asked before."""
        self.deadline = min(self.deadline, self._clock.now() + grace)
        self.asked.set()
        self._changed.set()

    async def drain(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        """Wait until every task has ended; cut off those that have not at the deadline."""
        pending = {task for task in tasks if not task.done()}
        while pending and self._clock.now() < self.deadline:
            self._changed.clear()
            async with asyncio.TaskGroup() as group:
                changed = group.create_task(self._changed.wait())
                timeout = None if self.deadline == inf else max(0.0, self.deadline - self._clock.now())
                await asyncio.wait({*pending, changed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            pending = {task for task in pending if not task.done()}
        if not pending:
            return
        _log.warning(
            "stop_grace_exceeded",
            mapping=self._mapping.id,
            function=self._mapping.function.name,
            cut_off=len(pending),
            meaning="what was in flight will be delivered again",
        )
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)
