"""Capacity, taken before anything is read: slots and permits for invocations, and the bytes that may be held."""

import asyncio
from collections import deque
from contextlib import suppress
from math import inf
from types import TracebackType
from typing import Protocol


class _Slots:
    """A semaphore whose limit may change while slots are taken and waited for.

    A slot is handed to the first in the line before it wakes up, so whoever comes in between cannot overtake it. Where
    a slot is free nobody waits.
    """

    def __init__(self) -> None:
        self.limit = inf
        self._taken = 0  # more than the limit after it was lowered
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def is_awaited(self) -> bool:
        return bool(self._line)

    @property
    def is_idle(self) -> bool:
        return self._taken == 0

    def resize(self, limit: float) -> None:
        self.limit = limit
        self._admit()

    def take_free(self) -> bool:
        """Take one that is free: where one is, nobody waits."""
        if self._taken < self.limit:
            self._taken += 1
            return True
        return False

    async def take(self) -> None:
        if self.take_free():
            return
        place = asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                with suppress(ValueError):  # the line has moved past it already
                    self._line.remove(place)
            else:
                self.give_back()  # it was handed over in the same moment
            raise

    def give_back(self) -> None:
        self._taken -= 1
        self._admit()

    def _admit(self) -> None:
        while self._line and self._taken < self.limit:
            place = self._line.popleft()
            if not place.done():  # else its owner was cancelled and has not run yet
                self._taken += 1
                place.set_result(None)


class _Permits:
    """At most so many permits in any period, by a rate that may change: what was used before counts on.

    A rate is whole permits in a period: 50 a second is 50 in 1 s, 2.5 is 2 in 0.8 s, 0.1 is 1 in 10 s.
    """

    def __init__(self) -> None:
        self._limit = 0  # 0: there is no rate
        self._period = 0.0
        self._used: deque[float] = deque()  # stamps, the oldest first: no more than can count
        self._turn = asyncio.Lock()  # only the first in the line looks at the clock; the others cost nothing
        self._changed = asyncio.Event()  # the first should look again
        self._waiting = 0

    @property
    def is_awaited(self) -> bool:
        return self._waiting > 0

    @property
    def is_fresh(self) -> bool:
        """Nothing that was used counts any more: this is like a new one."""
        return not self._used or asyncio.get_running_loop().time() - self._used[-1] > self._period

    def resize(self, rate: float | None) -> None:
        if rate is None:
            self._limit = 0
        else:
            self._limit = max(1, int(rate))
            self._period = self._limit / rate
        self._changed.set()

    @property
    def is_on(self) -> bool:
        return self._limit > 0

    async def take(self) -> float:
        if not self._limit:
            return -inf
        self._waiting += 1
        try:
            async with self._turn:
                return await self._take()
        finally:
            self._waiting -= 1

    async def _take(self) -> float:
        loop = asyncio.get_running_loop()
        while self._limit and len(self._used) >= self._limit:
            age = loop.time() - self._used[-self._limit]
            if age > self._period:
                break
            self._changed.clear()
            # A permit exactly a period after another would be too early.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._period * 1.001 - age):
                    await self._changed.wait()
        if not self._limit:
            return -inf
        self._used.append(loop.time())
        while len(self._used) > self._limit:
            self._used.popleft()
        return self._used[-1]

    def give_back(self, stamp: float) -> None:
        with suppress(ValueError):
            self._used.remove(stamp)
            self._changed.set()


class Lender(Protocol):
    """Slots of one function that several processes share."""

    async def take(self, limit: int) -> None:
        """Wait until fewer than `limit` are taken by all of them, and take one."""
        ...

    def give_back(self) -> None:
        """One that was taken here."""
        ...


class Gate:
    """What a function may be asked to do: slots for invocations at once, and permits for invocations a second. Both are
    first come first served, and both may change at any time.

    `limit`: slots, None for as many as are asked for; with a `lender` they are its, and this process may use up to all
    of them. `rate`: invocations a second, from 0.001, None for no bound; then
    no window of `rate`'s period ever has more permits than it allows. `users`: mappings that share the gate.

    A stream enters with `async with`: a slot, then a permit. A queue takes them apart, because it may give an unused
    permit back.
    """

    def __init__(self, limit: int | None, rate: float | None = None, lender: Lender | None = None) -> None:
        self.users = 0
        self._slots = _Slots()
        self._permits = _Permits()
        self._limit = limit
        self._loans: list[Lender] = []
        self.resize(limit, rate, lender)

    def resize(self, limit: int | None, rate: float | None, lender: Lender | None = None) -> None:
        """Other bounds from now on, for those too who wait. Slots that are taken stay taken and permits that were used
        stay used: under a smaller limit nobody gets a slot before fewer than that are taken.
        """
        self._limit, self._lender = limit, lender
        self._slots.resize(inf if limit is None else limit)
        self._permits.resize(rate)

    @property
    def is_scarce(self) -> bool:
        """Somebody waits for a slot or a permit, or another mapping may want a slot at any moment."""
        is_awaited = self._slots.is_awaited or self._permits.is_awaited
        return is_awaited or (self._slots.limit < inf and self.users > 1)

    @property
    def is_unused(self) -> bool:
        """No mapping has it and it remembers nothing: a new one would do the same."""
        return self.users == 0 and self._slots.is_idle and self._permits.is_fresh

    def acquire_free(self) -> bool:
        """Take a slot that is free, without a wait. False too when others lend them."""
        return self._lender is None and self._slots.take_free()

    async def acquire(self) -> None:
        """Wait for a slot and take it."""
        await self._slots.take()
        lender, limit = self._lender, self._limit
        if lender is None or limit is None:
            return
        try:
            await lender.take(limit)
        except BaseException:
            self._slots.give_back()
            raise
        self._loans.append(lender)

    def release(self) -> None:
        """Give a slot back."""
        if self._loans:
            self._loans.pop().give_back()
        self._slots.give_back()

    @property
    def is_rated(self) -> bool:
        """There is a rate, so permits may have to be waited for."""
        return self._permits.is_on

    async def permit(self) -> float:
        """Wait for a permit and use it up. Its stamp, for `refund`; at once and -inf without a rate."""
        return await self._permits.take()

    def refund(self, stamp: float) -> None:
        """Give a permit back that was not used. Harmless when its period is over or there was no rate."""
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
        self.limit = limit
        self._used = 0
        self._waiting: dict[asyncio.Event, int] = {}  # a dict keeps their order

    @property
    def used(self) -> int:
        """Bytes taken now, reservations for reads in progress included."""
        return self._used

    def left(self) -> int:
        """Bytes that may be taken now; never negative."""
        return max(0, self.limit - self._used)

    def take(self, nbytes: int) -> None:
        """Count bytes as taken, over the limit too."""
        self._used += nbytes

    def give(self, nbytes: int) -> None:
        """Give bytes back."""
        self._used -= nbytes
        if not self._waiting:
            return
        left, fitting = self.left(), []
        for event, need in self._waiting.items():
            if need <= left:
                left -= need
                fitting.append(event)
        for event in fitting:
            del self._waiting[event]
            event.set()

    def notify(self, event: asyncio.Event, need: int) -> None:
        """Set the event once, when something is given back and so many bytes may be taken; those who asked first come
        first, and who needs too much keeps nobody waiting.
        """
        self._waiting[event] = need

    def forget(self, event: asyncio.Event) -> None:
        """It is waited for no more."""
        self._waiting.pop(event, None)
