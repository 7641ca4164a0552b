"""The only place that reads time or randomness."""

import asyncio
import random
import time


class SystemClock:
    """Epoch seconds that never step: the wall clock is read once and then moves with `loop.time()`.

    So windows, backoff and record age compare, and a wall clock that is set does not expire records or end waits.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._offset = time.time() - loop.time()

    def now(self) -> float:
        """Epoch seconds."""
        return self._loop.time() + self._offset

    def loop(self, at: float) -> float:
        """The same instant on `loop.time()`."""
        return at - self._offset


def wall_clock() -> float:
    """Epoch seconds of the wall clock, which may step: for comparing with what a person wrote, never for durations."""
    return time.time()


def system_random() -> random.Random:
    """The source of jitter and request ids."""
    return random.Random()
