"""A member of a fleet of one."""

from typing import Any

from poller.core.retry import Backoff
from poller.runtime.lease_keeper import LeaseKeeper


def alone(store: Any, clock: Any, me: str = "me") -> LeaseKeeper:
    """Owns whatever there is: nobody else uses the store."""
    return LeaseKeeper(store, clock, me, 10.0, Backoff(0.5, 5.0, lambda: 1.0), alone=True)
