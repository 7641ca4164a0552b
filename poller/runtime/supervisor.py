"""Desired mappings -> running mappings. One keeper task per mapping, so that none waits for another.

desired ----> Enabled:  a runner works --+--- changed, and the runner can take it: goes on over another pipe
   ^  |                                  |
   |  +-----> Disabled: nothing runs     +--- else it stops, what is in flight ends, the keeper looks again --+
   +----------------------------------------------------------------------------------------------------------+
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

import structlog

from poller.core.model import Mapping, MappingId, MappingStatus, ShardStatus
from poller.errors import PollerError, StoreUnavailable
from poller.runtime.context import TROUBLE_MAXIMUM, Context, LastResult, Pipe
from poller.runtime.queue_runner import QueueRunner
from poller.runtime.runner import Runner
from poller.runtime.stream_runner import StreamRunner, seek_key, stream_key
from poller.runtime.waiting import wait_until

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A mapping as it should run. `revision` stands for everything outside of the mapping that makes it run otherwise,
    such as its function's settings: a runner is replaced when either differs.
    """

    mapping: Mapping
    revision: object = None


class Plumbing(Protocol):
    """Connects mappings: `app` has it."""

    async def connect(self, wanted: Wanted, result: LastResult) -> Pipe:
        """Open the target, or share an open one. A PollerError is waited out."""
        ...

    async def disconnect(self, pipe: Pipe) -> None:
        """The mapping does not use the pipe any more."""
        ...

    def forgotten(self, mapping: MappingId) -> None:
        """The mapping is gone."""
        ...


def _shards(runner: Runner | None, lives: Iterable[Runner]) -> tuple[ShardStatus, ...]:
    """Every shard once: as the runner that works has it, or one that ends and has something in flight there."""
    found = {status.id: status for status in runner.shards()} if runner else {}
    for other in lives:
        if other is not runner:
            found |= {status.id: status for status in other.shards() if status.in_flight or status.id not in found}
    return tuple(found.values())


def _leaf(error: BaseException) -> str:
    """What went wrong at the bottom of a task group, for people."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


class _Kept:
    """One mapping under a keeper. `wanted` None: stop for good; `forget`: and delete its positions.

    `mapping` is the last one wanted, for status; `problem` what keeps a runner from being made.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted: Wanted | None = wanted
        self.mapping = wanted.mapping
        self.forget = False
        self.is_sought = False  # its positions are to be moved, and are not yet
        self.state = "Creating"
        self.problem = ""
        self.is_reached = False  # by any runner of this mapping since the start
        self.result = LastResult()
        self.runner: Runner | None = None  # the one that works
        self.lives: dict[Runner, asyncio.Task[Exception | None]] = {}  # that one, and those that end
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Life:
    """What a runner is connected to now."""

    pipe: Pipe


class Supervisor:
    """Runs what is wanted until `stop`. Its methods may be called at any time while `run` runs."""

    def __init__(self, context: Context, plumbing: Plumbing) -> None:
        self._context = context
        self._plumbing = plumbing
        self._kept: dict[MappingId, _Kept] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._grace: float | None = None
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Work until `stop` and until every mapping has stopped."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for kept in self._kept.values():
                kept.task = tasks.create_task(self._keep(kept))
            await self._stop.wait()

    def stop(self, grace: float) -> None:
        """Begin nothing new; what is in flight has `grace` seconds. Positions are saved and stay."""
        self._grace = grace
        for kept in self._kept.values():
            kept.wanted = None
            self._interrupt(kept, grace)
        self._stop.set()

    # --- desired

    def want(self, wanted: Wanted) -> None:
        """Start a mapping, or change it. One that does not change is not disturbed."""
        if self._grace is not None:
            return
        kept = self._kept.get(wanted.mapping.id)
        if kept is None:
            kept = self._kept[wanted.mapping.id] = _Kept(wanted)
            if self._tasks is not None:
                kept.task = self._tasks.create_task(self._keep(kept))
            return
        if kept.wanted == wanted:
            return
        kept.forget = False
        was_enabled = kept.mapping.enabled
        kept.wanted, kept.mapping = wanted, wanted.mapping
        if wanted.mapping.enabled == was_enabled:
            kept.state = "Updating"
        else:
            kept.state = "Enabling" if wanted.mapping.enabled else "Disabling"
        kept.changed.set()

    def seek(self, mapping: MappingId) -> None:
        """The store has an order to move its positions: to be carried out now, or when it runs."""
        kept = self._kept.get(mapping)
        if kept is None:
            return
        kept.is_sought = True
        if kept.runner is not None:
            kept.runner.seek()

    def remove(self, mapping: MappingId, *, forget: bool) -> None:
        """Stop a mapping for good; it is gone when its `state` is None. `forget` deletes its positions too."""
        kept = self._kept.get(mapping)
        if kept is None or self._grace is not None:
            return
        kept.wanted, kept.forget, kept.state = None, forget, "Deleting"
        self._interrupt(kept, inf)

    def _interrupt(self, kept: _Kept, grace: float) -> None:
        kept.changed.set()
        for runner in kept.lives:
            runner.stop(grace)

    async def _keep(self, kept: _Kept) -> None:
        """Make what runs follow what is wanted, until it is wanted no more."""
        failures = 0
        clock = self._context.clock
        while True:
            while (wanted := kept.wanted) is not None:
                kept.changed.clear()
                if not wanted.mapping.enabled:
                    kept.state = "Disabling" if kept.lives else "Disabled"
                    await kept.changed.wait()
                    continue
                started = clock.now()
                try:
                    await self._run(kept, wanted)
                except Exception as error:  # noqa: BLE001  # one bad mapping never stops another
                    failures = failures + 1 if clock.now() - started < TROUBLE_MAXIMUM else 1
                    kept.problem = _leaf(error)
                    self._log_crash(kept, error)
                    if kept.wanted is wanted:
                        kept.changed.clear()  # the end of the runner set it
                    await wait_until(kept.changed, clock, clock.now() + self._context.trouble.delay(failures))
            if kept.lives:
                await kept.changed.wait()
                kept.changed.clear()
                continue
            if self._grace is None:
                await self._finish(kept)
            if kept.wanted is None:
                break
        if self._grace is None:
            del self._kept[kept.mapping.id]
            self._plumbing.forgotten(kept.mapping.id)

    async def _run(self, kept: _Kept, wanted: Wanted) -> None:
        """One runner, until another one is to follow it. Its pipe changes under it as long as it can take that.

        It ends by itself when it was told to: its successor need not wait for what it has in flight.
        """
        if not all(runner.may_overlap for runner in kept.lives):
            await kept.changed.wait()
            return
        assert self._tasks is not None
        life = _Life(await self._connected(wanted, kept))
        if kept.wanted is not wanted:
            await self._plumbing.disconnect(life.pipe)
            return
        is_stream = wanted.mapping.source.kind.is_stream
        make: type[StreamRunner | QueueRunner] = StreamRunner if is_stream else QueueRunner
        runner = make(self._context, life.pipe)
        task = self._tasks.create_task(self._live(kept, runner, life))
        kept.runner, kept.lives[runner] = runner, task
        kept.problem, kept.state = "", "Enabled"
        failures, delay = 0, inf
        while await self._changes(kept, task, delay):
            kept.changed.clear()
            changed, delay = kept.wanted, inf
            if changed is None or not changed.mapping.enabled:
                break
            if changed != wanted:
                try:
                    other = await self._connected(changed, kept)
                except PollerError as error:  # the old one goes on meanwhile
                    failures += 1
                    delay = self._context.trouble.delay(failures)
                    kept.problem = str(error)
                    self._log_crash(kept, error)
                    continue
                if task.done() or not runner.retune(other):
                    await self._plumbing.disconnect(other)
                    break
                self._tasks.create_task(self._retire(life.pipe))
                life.pipe, wanted = other, changed
            failures, kept.problem = 0, ""
            if kept.wanted is wanted:
                kept.state = "Enabled"
        runner.stop()
        self._note_seek(kept, runner)
        kept.runner = None
        if task.done() and (problem := task.result()) is not None:
            raise problem

    async def _connected(self, wanted: Wanted, kept: _Kept) -> Pipe:
        return await self._plumbing.connect(wanted, kept.result)

    async def _live(self, kept: _Kept, runner: Runner, life: _Life) -> Exception | None:
        """A runner from its start to the end of what it has in flight; answers what it died of."""
        problem = None
        try:
            await runner.run()
        except Exception as error:  # noqa: BLE001  # one bad mapping never stops another
            problem = error
        finally:
            kept.is_reached = kept.is_reached or runner.is_reached
            del kept.lives[runner]
            kept.changed.set()
            await self._plumbing.disconnect(life.pipe)
        return problem

    @staticmethod
    def _note_seek(kept: _Kept, runner: Runner) -> None:
        if runner is kept.runner and runner.is_settled:
            kept.is_sought = False

    @staticmethod
    async def _changes(kept: _Kept, task: asyncio.Task[Exception | None], delay: float) -> bool:
        """Wait until something else is wanted, or for so many seconds. False: the runner has ended."""
        async with asyncio.TaskGroup() as tasks:
            changed = tasks.create_task(kept.changed.wait())
            timeout = None if delay == inf else delay
            await asyncio.wait({task, changed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        return not task.done()

    async def _retire(self, pipe: Pipe) -> None:
        """Give a pipe up when the last invocation over it has ended, or is cut off."""
        try:
            await pipe.calls.over()
        finally:
            await self._plumbing.disconnect(pipe)

    def _log_crash(self, kept: _Kept, error: Exception) -> None:
        ids = {"mapping": kept.mapping.id, "function": kept.mapping.function.name}
        if isinstance(error, PollerError):
            _log.error("mapping_not_started", error=str(error), **ids)
        else:
            _log.error("mapping_crashed", exc_info=error, **ids)

    async def _finish(self, kept: _Kept) -> None:
        """The mapping is gone; a store that is away keeps it in state Deleting until its positions are deleted, or the
        daemon stops: then the next start deletes them.
        """
        failures, store, clock = 0, self._context.store, self._context.clock
        while kept.forget and self._grace is None:
            try:
                if any(self._context.leases.is_live(row.owner) for row in (await store.load(kept.mapping.id)).values()):
                    # Other members still let go of it: one that runs it would make its rows anew, from the start.
                    await wait_until(self._stop, clock, clock.now() + self._context.leases.look_interval)
                    continue
                await store.forget(kept.mapping.id)
                await store.delete_document(stream_key(kept.mapping.id))
                for order in await store.document_keys(seek_key(kept.mapping.id)):
                    await store.delete_document(order)
                break
            except StoreUnavailable as error:
                failures += 1
                _log.error("forget_failed", mapping=kept.mapping.id, error=str(error))
                await wait_until(self._stop, clock, clock.now() + self._context.trouble.delay(failures))

    # --- what is seen

    def state(self, mapping: MappingId) -> str | None:
        """The mapping API's state; None when it does not exist (any more)."""
        kept = self._kept.get(mapping)
        return kept.state if kept else None

    def last_result(self, mapping: MappingId) -> str:
        """LastProcessingResult."""
        kept = self._kept.get(mapping)
        return kept.result.text if kept else LastResult().text

    def status(self) -> Sequence[MappingStatus]:
        """Every mapping, now."""
        return [self._status_of(kept) for kept in self._kept.values()]

    def _status_of(self, kept: _Kept) -> MappingStatus:
        runner, mapping = kept.runner, kept.mapping
        if runner is not None:
            self._note_seek(kept, runner)
        return MappingStatus(
            id=mapping.id,
            function=mapping.function.name,
            source=mapping.source.kind,
            source_arn=mapping.source.arn,
            state=kept.state,
            reason=kept.problem or (runner.problem if runner else ""),
            in_flight=sum(each.in_flight() for each in kept.lives),
            breaker=runner.breaker if runner else "closed",
            retention=runner.retention if runner else None,
            receivers=runner.receivers if runner else None,
            receiver_limit=runner.receiver_limit if runner else None,
            seek_pending=kept.is_sought,
            last_result=kept.result.text,
            declared_in=mapping.declared_in,
            shards=_shards(runner, kept.lives),
        )

    def dead(self) -> Sequence[MappingId]:
        """Mappings that are there but whose keeper is not; never any, unless we have a bug."""
        if self._grace is not None:
            return []
        return [kept.mapping.id for kept in self._kept.values() if kept.task is not None and kept.task.done()]

    def unready(self) -> Sequence[str]:
        """Enabled mappings whose source has not answered since the start of the daemon."""
        return [
            f"mapping {kept.mapping.id} ({kept.mapping.source.arn}) has not reached its source"
            + (f": {problem}" if (problem := kept.problem or (kept.runner.problem if kept.runner else "")) else "")
            for kept in self._kept.values()
            if kept.mapping.enabled and kept.wanted is not None
            if not (kept.is_reached or (kept.runner and kept.runner.is_reached))
        ]
