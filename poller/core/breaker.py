"""A circuit breaker: while a target refuses everything, nothing is received for it."""

from math import inf
from typing import Literal

from poller.core.retry import Backoff

REFUSALS = 5  # in a row open the circuit


class Breaker:
    """When receiving and invoking must wait for the target.

        closed --5 refusals in a row--> open --delay--> probing --the function ran--> closed
                                          ^                |
                                          +----refused-----+   a longer delay

    A refusal is a throttle or an unreachable target: the function never ran. A function that fails runs.
    """

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._refusals = 0
        self._probe_at = -inf
        self.state: Literal["closed", "open", "probing"] = "closed"

    def probe_at(self) -> float:
        """When the next invocation may begin: -inf at once, inf not before news."""
        return self._probe_at

    def probe(self) -> None:
        """An invocation begins. Where the circuit is open, it is the probe and nobody else may begin."""
        if self.state != "closed":
            self.state, self._probe_at = "probing", inf

    def unprobe(self, now: float) -> None:
        """The probe ended without an answer."""
        if self.state == "probing":
            self.state, self._probe_at = "open", now

    def ran(self) -> bool:
        """The function ran, whatever it said. True: that closed the circuit."""
        was_closed = self.state == "closed"
        self.state, self._probe_at, self._refusals = "closed", -inf, 0
        return not was_closed

    def refused(self, now: float, retry_after: float | None = None) -> bool:
        """The function never ran. True: that opened the circuit. Late answers of an open one change nothing."""
        if self.state == "open":
            return False
        self._refusals += 1
        if self._refusals < REFUSALS:
            return False
        was_closed = self.state == "closed"
        self.state = "open"
        self._probe_at = now + self._backoff.delay(self._refusals, retry_after)
        return was_closed
