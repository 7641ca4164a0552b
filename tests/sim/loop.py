"""An event loop whose time is virtual: waiting costs nothing, and a wait that nothing can end is an error."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

EPOCH = 1_800_000_000.0


class DeadlockError(Exception):
    """Every task waits and no timer is set."""


class _VirtualSelector(selectors.SelectSelector):
    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise DeadlockError("every task waits for something that nobody will do")
        self.loop.virtual += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs timers in order, at once. `asyncio.timeout`, `sleep` and TaskGroup work unchanged."""

    def __init__(self) -> None:
        selector = _VirtualSelector()
        super().__init__(selector)
        self.virtual = 0.0
        selector.loop = self

    def time(self) -> float:
        return self.virtual


class VirtualClock:
    """The `Clock` of a node; `rate` makes it run fast or slow against the world's."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return EPOCH + self._loop.time()

    def loop(self, at: float) -> float:
        return at - EPOCH


def run_virtual(main: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end on a fresh loop; tasks that are left over are an error."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        result = loop.run_until_complete(main)
        left = asyncio.all_tasks(loop)
        assert not left, f"tasks left over: {left}"
        return result
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        asyncio.set_event_loop(None)
        loop.close()
