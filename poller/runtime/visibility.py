"""Keeps what a queue mapping holds invisible to everybody else."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from logging import DEBUG, WARNING
from math import inf
from typing import Protocol

import structlog

from poller.core.model import Mapping, Record
from poller.ports import Clock, QueueSource
from poller.runtime.waiting import sleep_until, wait_until

_log = structlog.get_logger(__name__)

# Seconds that a message may be invisible in all, from its receive: 12 hours (semantics 8.3), less the rounding to whole
# seconds on both sides.
LONGEST = 43_198.0
_RESERVE = 1 / 3  # of the visibility timeout is left when it is extended
_PAUSE = 1 / 12  # of it between two looks; at most a second


class Holder(Protocol):
    """Who holds messages. `began`: when the oldest was asked for. `extension`: set while what it holds is extended;
    messages are settled after that, or a late extension would undo it.
    """

    held: list[Record]
    began: float
    extension: asyncio.Event | None


class VisibilityKeeper:
    """Extends the visibility of held messages before it ends, by `timeout()` seconds each time, up to 12 hours."""

    def __init__(
        self,
        mapping: Mapping,
        clock: Clock,
        source: QueueSource,
        timeout: Callable[[], float],
        holders: Callable[[], Iterable[Holder]],
    ) -> None:
        self._mapping = mapping
        self._clock = clock
        self._source = source
        self._timeout = timeout
        self._holders = holders
        self._looks_at = -inf
        self._news = asyncio.Event()

    def took(self, expires: float) -> None:
        """Messages are held from now on; the visibility of one ends then.

        Must be told: after a long poll, or with a timeout that has changed, that may be before the next look.
        """
        if expires - self._timeout() * _RESERVE < self._looks_at:
            self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as calls:
            while True:
                self._news.clear()
                timeout, now = self._timeout(), self._clock.now()
                self._looks_at = now + timeout * (1 - _RESERVE)
                for seconds, holders in self._due(now, timeout).items():
                    calls.create_task(self._extend(holders, seconds))
                # What comes due meanwhile shares the next call, and what cannot be extended is not tried all the time.
                await sleep_until(self._clock, now + min(1.0, timeout * _PAUSE))
                await wait_until(self._news, self._clock, self._looks_at)

    def _due(self, now: float, timeout: float) -> dict[float, list[Holder]]:
        """Whom to extend, by the seconds to come: few are near their longest time."""
        due: dict[float, list[Holder]] = {}
        for holder in self._holders():
            ends = min([record.expires for record in holder.held if record.expires > now], default=inf)
            longest = holder.began + LONGEST
            if ends == inf or longest - ends < 1:
                continue
            due_at = ends - timeout * _RESERVE
            self._looks_at = min(self._looks_at, due_at)
            if due_at <= now and holder.extension is None:
                due.setdefault(min(timeout, longest - now), []).append(holder)
        return due

    async def _extend(self, holders: Sequence[Holder], seconds: float) -> None:
        done = asyncio.Event()
        asked = self._clock.now()
        reserve = self._timeout() * _RESERVE
        # Not what would gain little: one message that cannot be extended would take the others with it at each try.
        ends = asked + max(reserve, seconds - reserve)
        records = [record for holder in holders for record in holder.held if asked < record.expires <= ends]
        for holder in holders:
            holder.extension = done
        extended: set[str] = set()
        try:
            left = await self._source.extend(records, seconds)
            extended = {record.handle for record in records} - {record.handle for record in left}
        finally:
            done.set()
            for holder in holders:
                holder.extension = None
                holder.held[:] = [
                    record._replace(expires=asked + seconds) if record.handle in extended else record
                    for record in holder.held
                ]
        _log.log(
            WARNING if left else DEBUG,
            "visibility_extended",
            mapping=self._mapping.id,
            function=self._mapping.function.name,
            messages=len(extended),
            failed=len(left),
            seconds=seconds,
        )
