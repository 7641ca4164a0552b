"""Saves the positions of every shard of the process, coalesced: one commit an interval, only for what has moved."""

import asyncio
from collections import Counter
from typing import Protocol

import structlog

from poller.core.model import Checkpoint, Lease
from poller.core.retry import Backoff
from poller.errors import StoreUnavailable
from poller.ports import CheckpointStore, Clock, MappingObserver
from poller.runtime.waiting import sleep_until

_log = structlog.get_logger(__name__)


class Saved(Protocol):
    """A shard whose position is saved: its worker."""

    lease: Lease
    observer: MappingObserver
    saved: Checkpoint
    """The last checkpoint known to be in the store."""

    def checkpoint(self) -> Checkpoint | None:
        """Where a restart would go on, now."""
        ...

    def lose_lease(self) -> None:
        """Somebody else owns the shard: stop at once."""
        ...


def _position(shard: Saved) -> Checkpoint | None:
    """The checkpointer saves for everybody: a shard that cannot say its position must not end it."""
    try:
        return shard.checkpoint()
    except Exception as error:  # noqa: BLE001
        _log.error("position_unknown", mapping=shard.lease.mapping, shard=shard.lease.shard, exc_info=error)
        return None


class Checkpointer:
    """Saves the first change at once and further ones together, `interval` seconds apart.

    One task for the whole process: a thousand busy shards cost one commit an interval, idle ones cost nothing.
    """

    def __init__(self, store: CheckpointStore, clock: Clock, interval: float, backoff: Backoff) -> None:
        self._store = store
        self._clock = clock
        self._interval = interval
        self._backoff = backoff
        self._moved: dict[int, Saved] = {}
        self._dropped: set[int] = set()  # while a save is under way
        self._wake = asyncio.Event()

    def moved(self, shard: Saved) -> None:
        """The shard's position may have changed."""
        self._moved[id(shard)] = shard
        self._wake.set()

    def drop(self, shard: Saved) -> None:
        """The shard is being released: its last position is written by its runner, not here."""
        self._moved.pop(id(shard), None)
        self._dropped.add(id(shard))  # a save that fails now must not bring it back

    async def run(self) -> None:
        """Save until cancelled. A store that is away is asked again; what moved meanwhile is saved then."""
        failures = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            shards, self._moved = list(self._moved.values()), {}
            self._dropped.clear()
            changes = [
                (shard, checkpoint)
                for shard in shards
                if (checkpoint := _position(shard)) is not None and checkpoint != shard.saved
            ]
            if not changes:
                continue
            started = self._clock.now()
            try:
                lost = await self._store.save([(shard.lease, checkpoint) for shard, checkpoint in changes])
            except StoreUnavailable as error:
                failures += 1
                _log.error("checkpoint_failed", error=str(error), positions=len(changes), failures=failures)
                for shard, _ in changes:
                    if id(shard) not in self._dropped:
                        self.moved(shard)
                await sleep_until(self._clock, self._clock.now() + self._backoff.delay(failures))
                continue
            failures = 0
            self._settle(changes, set(lost), self._clock.now() - started)
            await sleep_until(self._clock, started + self._interval)

    def _settle(self, changes: list[tuple[Saved, Checkpoint]], lost: set[Lease], seconds: float) -> None:
        positions: Counter[MappingObserver] = Counter()
        for shard, checkpoint in changes:
            if shard.lease in lost:
                shard.lose_lease()
                continue
            shard.saved = checkpoint
            positions[shard.observer] += 1
        for observer, count in positions.items():
            observer.saved(count, seconds)
