"""Waiting for an instant or an event, whichever comes first."""

import asyncio
from math import inf

from poller.ports import Clock


async def wait_until(event: asyncio.Event, clock: Clock, at: float) -> bool:
    """Wait for the event until the instant (epoch seconds, may be inf). True: the event is set."""
    if event.is_set():
        return True
    if at == inf:
        return await event.wait()
    try:
        async with asyncio.timeout_at(clock.loop(at)):
            return await event.wait()
    except TimeoutError:
        return False


async def sleep_until(clock: Clock, at: float) -> None:
    """Wait until the instant (epoch seconds); returns at once when it has passed."""
    await asyncio.sleep(clock.loop(at) - asyncio.get_running_loop().time())
