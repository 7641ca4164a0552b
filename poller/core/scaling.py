"""How many receive loops a queue may have at this moment."""

from math import floor, inf

INITIAL = 5  # AWS starts with five batches at once (semantics 8.1)
# AWS says only that errors lower concurrency gradually and throttles too; its curves are unpublished (semantics 15).
_FAILURE = 0.9  # what a failed batch leaves of the health
_RECOVERY = 0.05  # what a successful one gives back
_THROTTLE = 0.5  # what a throttle leaves of the loops
# Of a loop: or five times a fifth is less than one. Far more than the fastest growth (10,000 a minute) in a step of the
# clock (epoch seconds as floats are a quarter of a microsecond apart), or `grows_at` comes too early and then is "now".
_ROUNDING = 1e-3
_CUT_PAUSE = 1.0  # throttles of loops that ran at the same time are one piece of news
_LONGEST_STEP = 1.0  # seconds that growth is counted for without a look, unless the next loop takes longer


class Scaling:
    """The limit is a level times a health.

    The level begins at 5 loops, grows by `growth` loops a minute while replies are full and all loops are there, is
    halved by a throttle and by messages that expired in our hands, and falls back to 5 when the queue is empty. The
    health, 1 at most, falls with each failed batch and rises with each successful one: so it follows the share of
    failures, and a few of them in many batches cost nothing.
    The limit is never below 1 and `floor`, never above `ceiling`.
    A process that did not run for a while (SIGSTOP, a suspended machine) has not grown: nobody has looked at the limit,
    as is done at each reply and when `grows_at` says so. All that time at once would have been a thousand loops.
    """

    def __init__(self, lowest: int, ceiling: int, growth: float) -> None:
        self._level = float(max(lowest, min(INITIAL, ceiling)))
        self.retune(lowest, ceiling, growth)
        self._health = 1.0
        self._grown_to = inf  # until when growth is counted in; inf: there is no reason to grow
        self._cut_at = -inf

    def retune(self, lowest: int, ceiling: int, growth: float) -> None:
        """Other bounds from now on; what was learned about the target stays."""
        self._lowest, self._ceiling, self._growth = lowest, ceiling, growth / 60
        self._initial = float(max(lowest, min(INITIAL, ceiling)))
        self._level = max(float(lowest), min(self._level, float(ceiling)))

    def limit(self, now: float) -> int:
        """Loops that there may be."""
        self._grow(now)
        return self._bounded()

    def _bounded(self) -> int:
        return min(self._ceiling, max(self._lowest, floor(self._level * self._health + _ROUNDING)))

    def grows_at(self, now: float) -> float:
        """When the limit is higher by one, if nothing happens until then; inf: never."""
        self._grow(now)
        higher = self._higher()
        if self._grown_to == inf or higher > self._ceiling:
            return inf
        return now + (higher - self._level) / self._growth

    def _higher(self) -> float:
        """The level at which the limit is higher by one."""
        return (self._bounded() + 1) / self._health

    def _grow(self, now: float) -> None:
        if self._grown_to < now:
            most = max(_LONGEST_STEP * self._growth, self._higher() - self._level)
            grown = min(most, (now - self._grown_to) * self._growth)
            self._level = min(float(self._ceiling), self._level + grown)
            self._grown_to = now

    def received(self, *, is_full: bool, loops: int, now: float) -> None:
        """A reply with messages came, while so many loops were there. A limit that nobody reaches does not grow."""
        limit = self.limit(now)
        if not is_full or loops < limit - 1:  # one may just be on its way
            self._grown_to = inf
        elif self._grown_to == inf:
            self._grown_to = now

    def emptied(self, loops: int) -> None:
        """A reply without messages came, while so many loops were there."""
        self._grown_to = inf
        self._level = min(self._level, max(self._initial, float(loops)))

    def succeeded(self) -> None:
        """The function took a batch, perhaps not every message of it."""
        self._health = min(1.0, self._health + _RECOVERY)
        if self._level < self._initial:
            self._level = min(self._initial, self._level + 1)

    def failed(self) -> None:
        """A batch failed."""
        self._health = max(self._health * _FAILURE, 1 / max(1.0, self._level))

    def throttled(self, loops: int, now: float) -> None:
        """The target refused a batch, or was so slow that messages expired, while so many loops were there."""
        if now - self._cut_at >= _CUT_PAUSE:
            self._cut_at = now
            self._grow(now)
            self._level = max(1.0, min(self._level, float(loops)) * _THROTTLE)

    def reset(self) -> None:
        """Begin anew: what was known is not true any more."""
        self._level, self._grown_to = min(self._level, self._initial), inf
