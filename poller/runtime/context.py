"""What all runners of a process share."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from poller.core.model import Mapping, Record, StreamTraits
from poller.core.retry import Backoff
from poller.ports import CheckpointStore, Clock, Destination, MappingObserver, QueueSource, StreamSource, Target, Tracer
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.lease_keeper import LeaseKeeper

# Sources, stores and mappings in trouble are asked again for ever, this slowly at most.
TROUBLE_INITIAL, TROUBLE_MAXIMUM = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Context:
    """The services of one process. `backoff` is the retry curve of failing batches, `trouble` that of failing reads,
    stores and mappings.
    """

    clock: Clock
    random: random.Random
    store: CheckpointStore
    checkpointer: Checkpointer
    budget: ByteBudget
    backoff: Backoff
    trouble: Backoff
    leases: LeaseKeeper


class LastResult:
    """LastProcessingResult of the mapping API (semantics 1.6). Outlives restarts of the mapping's tasks."""

    __slots__ = ("text",)

    def __init__(self) -> None:
        self.text = "No records processed"


class Calls:
    """Invocations that run over a pipe: its target may be closed when there are none."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def begin(self) -> None:
        """One starts."""
        self._count += 1
        self._none.clear()

    def end(self) -> None:
        """One has ended."""
        self._count -= 1
        if self._count == 0:
            self._none.set()

    async def over(self) -> None:
        """Wait until none runs."""
        await self._none.wait()


@dataclass(frozen=True, slots=True)
class Pipe:
    """One mapping with what it is connected to. The sources are opened anew at each start of the mapping.

    `matches`: is a record to be delivered? None: all are. `destination` None: discarded batches are dropped. `tracer`
    None: nothing is traced.
    """

    mapping: Mapping
    result: LastResult
    target: Target
    gate: Gate
    observer: MappingObserver
    traits: StreamTraits | None
    open_stream: Callable[[], Awaitable[StreamSource]]
    open_queue: Callable[[], Awaitable[QueueSource]]
    matches: Callable[[Record], bool] | None = None
    destination: Destination | None = None
    tracer: Tracer | None = None
    calls: Calls = field(default_factory=Calls, compare=False)
