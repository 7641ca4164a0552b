"""Python's collector of cycles and C's heap, for a process whose objects live for ever or die at once."""

import asyncio
import ctypes
import gc
from collections.abc import Callable

# New containers before the young are looked at, and how many of those looks before the older ones are, as by default.
# With Python's 700 a fifth of the CPU over a thousand idle shards went into looking at objects that were alive.
_THRESHOLDS = (10_000, 10, 10)

INTERVAL = 30.0
"""Seconds after which the young are looked at in any case. Connections that broke are cycles, with their buffers: a
process with little to do kept those of a quarter of an hour, and its memory grew with them.
"""
_YOUNG = 1  # the two younger generations


def _trimmer() -> Callable[[int], object]:
    """The malloc_trim(3) of glibc; nothing where there is another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


_trim = _trimmer()


def collect_rarely() -> None:
    """Leave what was imported alone for ever, and look at the rest less often. For the whole process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


async def collect_young() -> None:
    """From time to time, until cancelled: a millisecond or so each time.

    Free pages go back to the system. The C library keeps those between blocks that are in use: with bodies of all sizes
    that come and go, a quarter of a megabyte a minute more, while what is in use stayed the same.
    """
    while True:
        await asyncio.sleep(INTERVAL)
        gc.collect(_YOUNG)
        _trim(0)
