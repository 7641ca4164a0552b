"""Capacity, taken before anything is read: slots for invocations, and the bytes that may be held."""

import asyncio
from types import TracebackType


class Gate:
    """Slots of one function, first come first served. `limit` None: as many as are asked for.

    `users`: mappings that share it.
    """

    def __init__(self, limit: int | None) -> None:
        self.users = 0
        self._slots = asyncio.Semaphore(limit) if limit is not None else None
        self._waiting = 0

    @property
    def is_scarce(self) -> bool:
        """Somebody waits for a slot, or another mapping may want one at any moment."""
        return self._waiting > 0 or (self._slots is not None and self.users > 1)

    async def __aenter__(self) -> None:
        if self._slots is None:
            return
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._slots is not None:
            self._slots.release()


class ByteBudget:
    """Bytes of records held by the whole process. A soft bound: whoever holds nothing may always take a little, so that
    a blocked shard never starves another.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: dict[asyncio.Event, None] = {}  # a dict keeps their order

    @property
    def used(self) -> int:
        """Bytes taken now, reservations for reads in progress included."""
        return self._used

    def left(self) -> int:
        """Bytes that may be taken now; never negative."""
        return max(0, self._limit - self._used)

    def take(self, nbytes: int) -> None:
        """Count bytes as taken, over the limit too."""
        self._used += nbytes

    def give(self, nbytes: int) -> None:
        """Give bytes back."""
        self._used -= nbytes
        waiting, self._waiting = self._waiting, {}
        for event in waiting:
            event.set()

    def notify(self, event: asyncio.Event) -> None:
        """Set the event once, when somebody gives something back."""
        self._waiting[event] = None
