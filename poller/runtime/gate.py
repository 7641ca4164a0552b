"""Capacity, taken before anything is read: slots and permits for invocations, and the bytes that may be held."""

import asyncio
from contextlib import suppress
from types import TracebackType

from asyncio_throttle.throttler import Throttler


class _Permits(Throttler):
    """At most `rate_limit` permits in any `period`. asyncio-throttle knows no giving back, so this adds it."""

    async def take(self) -> float:
        """Wait for a permit and use it up; answers its stamp."""
        await self.acquire()  # type: ignore[no-untyped-call]  # the library has no annotations
        return self._task_logs[-1]  # ours: acquire does not wait after it was put there

    def give_back(self, stamp: float) -> None:
        """As if the permit had never been used; nothing happens when its period is over."""
        with suppress(ValueError):
            self._task_logs.remove(stamp)


def _permits(rate: float) -> _Permits:
    """A rate as whole permits in a period: 50 a second is 50 in 1 s, 2.5 is 2 in 0.8 s, 0.1 is 1 in 10 s.

    Looked at a hundred times a period, once a second at least, so the rate is kept to within a hundredth.
    """
    limit = max(1, int(rate))
    period = limit / rate
    return _Permits(rate_limit=limit, period=period, retry_interval=min(1.0, period / 100))


class Gate:
    """What a function may be asked to do: slots for invocations at once, and permits for invocations a second. Both are
    first come first served.

    `limit`: slots, None for as many as are asked for. `rate`: invocations a second, from 0.001, None for no bound; then
    no window of `rate`'s period ever has more permits than it allows. `users`: mappings that share the gate.

    A stream enters with `async with`: a slot, then a permit. A queue takes them apart, because it may give an unused
    permit back.
    """

    def __init__(self, limit: int | None, rate: float | None = None) -> None:
        self.users = 0
        self._slots = asyncio.Semaphore(limit) if limit is not None else None
        self._permits = _permits(rate) if rate is not None else None
        self._turn = asyncio.Lock()  # only the first in the line looks at the clock; the others cost nothing
        self._waiting = 0

    @property
    def is_scarce(self) -> bool:
        """Somebody waits for a slot or a permit, or another mapping may want a slot at any moment."""
        return self._waiting > 0 or (self._slots is not None and self.users > 1)

    async def acquire(self) -> None:
        """Wait for a slot and take it."""
        if self._slots is None:
            return
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1

    def release(self) -> None:
        """Give a slot back."""
        if self._slots is not None:
            self._slots.release()

    async def permit(self) -> float:
        """Wait for a permit and use it up. Its stamp, for `refund`; at once and 0.0 without a rate."""
        if self._permits is None:
            return 0.0
        self._waiting += 1
        try:
            async with self._turn:
                return await self._permits.take()
        finally:
            self._waiting -= 1

    def refund(self, stamp: float) -> None:
        """Give a permit back that was not used. Harmless when its period is over or there is no rate."""
        if self._permits is not None:
            self._permits.give_back(stamp)

    async def __aenter__(self) -> float:
        """A slot, then a permit: its stamp."""
        await self.acquire()
        try:
            return await self.permit()
        except BaseException:
            self.release()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.release()


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
