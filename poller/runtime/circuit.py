"""The circuit breaker of a queue mapping, as something to wait for."""

import asyncio
from math import inf

from poller.core.breaker import Breaker
from poller.core.retry import Backoff
from poller.ports import Clock
from poller.runtime.waiting import wait_until


class Circuit:
    """While it is not closed one invocation at a time may begin, a probe, and nothing is received: but for one receive
    at a time where nobody holds a message to probe with.
    """

    def __init__(self, clock: Clock, backoff: Backoff) -> None:
        self._clock = clock
        self._breaker = Breaker(backoff)
        self._holding = 0
        self._receiving = 0  # receives under way, whatever the state was when they began
        self._changed = asyncio.Event()

    @property
    def state(self) -> str:
        """closed, open or probing."""
        return self._breaker.state

    # --- invoking

    def hold(self) -> None:
        """Somebody has messages in hand and waits to invoke, until `let_go`: nobody need receive any to probe with."""
        self._holding += 1

    def let_go(self) -> None:
        """See `hold`."""
        self._holding -= 1
        if self._breaker.state != "closed":
            self._tell()

    async def wait_to_invoke(self) -> None:
        """Wait until an invocation may begin. Ask `invoke` next: others wait too."""
        while self._breaker.probe_at() > self._clock.now():
            await wait_until(self._changed, self._clock, self._breaker.probe_at())

    def invoke(self) -> bool:
        """An invocation begins. False: it must not; wait again."""
        if self._breaker.probe_at() > self._clock.now():
            return False
        self._breaker.probe()
        return True

    def ran(self) -> bool:
        """The function ran. True: that closed the circuit."""
        has_closed = self._breaker.ran()
        if has_closed:
            self._tell()
        return has_closed

    def refused(self, retry_after: float | None) -> bool:
        """The function never ran. True: that opened the circuit."""
        was = self._breaker.state
        has_opened = self._breaker.refused(self._clock.now(), retry_after)
        if self._breaker.state != was:
            self._tell()
        return has_opened

    def cut_off(self) -> None:
        """An invocation ended without an answer; if it was the probe, another may begin."""
        self._breaker.unprobe(self._clock.now())
        self._tell()

    def reset(self) -> bool:
        """Another function is behind it: nothing is known of that. True: that closed the circuit."""
        return self.ran()

    # --- receiving

    async def wait_to_receive(self) -> None:
        """Wait until a receive may begin. Ask `receive` next: others wait too."""
        while (at := self._receive_at()) > self._clock.now():
            await wait_until(self._changed, self._clock, at)

    def receive(self) -> bool:
        """A receive begins; `received` ends it. False: it must not; wait again."""
        if self._receive_at() > self._clock.now():
            return False
        self._receiving += 1
        return True

    def received(self) -> None:
        """A receive has ended."""
        self._receiving -= 1
        if self._breaker.state != "closed":
            self._tell()

    def _receive_at(self) -> float:
        if self._breaker.state != "closed" and (self._holding or self._receiving):
            return inf
        return self._breaker.probe_at()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
