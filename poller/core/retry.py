"""When to try again."""

from collections.abc import Callable
from dataclasses import dataclass

_MAX_DOUBLINGS = 32  # beyond it every maximum is reached; keeps 2**n small


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter: uniform between 0 and `initial * 2^(tries - 1)`, at most `maximum`.

    AWS does not publish its curve for streams (semantics 6.2); this is the AWS Architecture Blog's "full jitter".
    `random` answers a number in [0, 1).
    """

    initial: float
    maximum: float
    random: Callable[[], float]

    def delay(self, tries: int, retry_after: float | None = None) -> float:
        """Seconds to wait after `tries` failures in a row. A wish of the other side is obeyed up to `maximum`."""
        ceiling: float = min(self.maximum, self.initial * 2.0 ** min(tries - 1, _MAX_DOUBLINGS))
        jittered = ceiling * self.random()
        if retry_after is None:
            return jittered
        return min(self.maximum, max(jittered, retry_after))
