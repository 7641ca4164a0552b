"""Deletes of one queue: those of several small batches share a call when there are many."""

import asyncio
from collections.abc import Sequence

from poller.core.model import Record
from poller.ports import QueueSource

_FULL = 10  # of DeleteMessageBatch
# How long a call waits for more messages while others are under way; far below the interval in which deletes are
# promised to be sent.
_LINGER = 0.02


class _Shared:
    """One call that several batches fill."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.is_full = asyncio.Event()
        self.task: asyncio.Task[Sequence[Record]] | None = None


class Deletes:
    """Deletes messages; calls run in `tasks`, so a caller that is cancelled takes nobody's deletes with it."""

    def __init__(self, source: QueueSource, tasks: asyncio.TaskGroup) -> None:
        self._source = source
        self._tasks = tasks
        self._filling: _Shared | None = None
        self._calls = 0
        self._running: set[asyncio.Task[Sequence[Record]]] = set()

    def cut_off(self) -> None:
        """End the calls that nobody waits for any more."""
        for task in self._running:
            task.cancel()

    async def delete(self, records: Sequence[Record]) -> int:
        """Delete messages; answers how many were not. Alone at once; under load together with others'."""
        odd = len(records) % _FULL
        if odd == 0 or (len(records) > _FULL and self._calls == 0):
            return len(await self._send(records))
        shared = self._share(records[-odd:])  # first: it must not wait for the end of the others
        missed = 0
        if len(records) > _FULL:
            missed = len(await self._send(records[:-odd]))
        left = await asyncio.shield(shared)
        mine = {record.handle for record in records[-odd:]}
        return missed + sum([record.handle in mine for record in left])

    def _share(self, records: Sequence[Record]) -> asyncio.Task[Sequence[Record]]:
        shared = self._filling
        if shared is None or len(shared.records) + len(records) > _FULL:
            if shared is not None:
                shared.is_full.set()
            shared = self._filling = _Shared()
            shared.task = self._tasks.create_task(self._run(shared))
            self._running.add(shared.task)
            shared.task.add_done_callback(self._running.discard)
        shared.records += records
        if len(shared.records) == _FULL:
            shared.is_full.set()
            self._filling = None
        assert shared.task is not None
        return shared.task

    async def _run(self, shared: _Shared) -> Sequence[Record]:
        if self._calls:
            try:
                async with asyncio.timeout(_LINGER):
                    await shared.is_full.wait()
            except TimeoutError:
                pass
        if self._filling is shared:
            self._filling = None
        return await self._send(shared.records)

    async def _send(self, records: Sequence[Record]) -> Sequence[Record]:
        self._calls += 1
        try:
            return await self._source.delete(records)
        finally:
            self._calls -= 1
