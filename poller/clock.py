"""The only place that reads time or randomness."""

import asyncio
import random
import time

STEP = 2.0
"""Seconds that the wall clock must be ahead to be followed: less is slewed by NTP and matters to nobody."""
SET_BACK = 5.0
"""Seconds that the wall clock must be behind to count as set back."""


class SystemClock:
    """Epoch seconds that never go back: `loop.time()` from where the wall clock was at the start.

    Where the wall clock has jumped ahead (the machine slept, or NTP came late) so does this one. Whoever reads it
    cannot tell that from having been suspended for so long: waits that were due are due, leases have expired.
    Set back, it is not followed, for every wait would last longer by as much: see `behind`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._offset = time.time() - loop.time()
        self._jumped = 0.0

    def now(self) -> float:
        """Epoch seconds."""
        now = self._loop.time() + self._offset
        ahead = time.time() - now
        if ahead > STEP:
            self._offset += ahead
            self._jumped += ahead
            now += ahead
        return now

    def loop(self, at: float) -> float:
        """The same instant on `loop.time()`."""
        return at - self._offset

    def jumped(self) -> float:
        """By how many seconds it has followed the wall clock ahead since it was last asked."""
        jumped, self._jumped = self._jumped, 0.0
        return jumped

    def behind(self) -> float:
        """By how many seconds the wall clock has been set back since; 0 while that is less than `SET_BACK`. Until a
        restart records look older than they are by as much, so that an age limit takes them too early.
        """
        behind = self.now() - time.time()
        return behind if behind > SET_BACK else 0.0


def wall_clock() -> float:
    """Epoch seconds of the wall clock, which may step: for comparing with what a person wrote, never for durations."""
    return time.time()


def stopwatch() -> float:
    """Seconds that never step, from any moment on: for durations where there is no event loop."""
    return time.monotonic()


def system_random() -> random.Random:
    """The source of jitter and request ids."""
    return random.Random()
