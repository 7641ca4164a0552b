"""The fleet as one member sees it: it beats, looks who else does, and shares the shards out. One for the process.

          beat written                 fence passed: no beat got through in time
STARTING -------------> BEATING --------------------------------------> FENCED
                           ^                                              | everything held is given up as lost
                               |                                              | and the name: whoever may be called dead
                               +------- beat written under a new name --------+ never comes back to life
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import inf

import structlog

from poller.core import leasing
from poller.core.leasing import Moves, Sightings, Spread
from poller.core.model import MappingId, Member, Row, ShardId
from poller.core.retry import Backoff
from poller.errors import StoreUnavailable
from poller.ports import CheckpointStore, Clock
from poller.runtime.waiting import sleep_until

_log = structlog.get_logger(__name__)

_BEATS = 3  # in a duration
_LOOKS = 5  # in a duration, at the rows of each mapping


class LeaseKeeper:
    """`me` is the name of this member, another one after it was fenced. `alone`: nobody else can use the store (SQLite
    under one process): no beats, and whoever owned a lease is dead.

    `live`: members that are seen to beat, this one included, in order.
    """

    def __init__(
        self,
        store: CheckpointStore,
        clock: Clock,
        me: str,
        duration: float,
        backoff: Backoff,
        *,
        alone: bool = False,
        info: Mapping[str, object] | None = None,
        count: Callable[[str], None] = lambda reason: None,  # noqa: ARG005
    ) -> None:
        """`count` is called with the reason of each change of a lease here: taken, handed_over, expired, given,
        released, lost.
        """
        self.count = count
        self.me = me
        self._name, self._lives = me, 1
        self._dead: set[str] = set()  # names that this member had
        self.live: Sequence[str] = (me,)
        self.members: Mapping[str, Member] = {}
        self.look_interval = inf if alone else duration / _LOOKS
        self.is_alone = alone
        self._store = store
        self._clock = clock
        self._duration = duration
        self._backoff = backoff
        self._info = {**(info or {}), "leaving": False}
        self._sightings = Sightings(duration)
        self._spread = Spread()
        self._fence = inf if alone else -inf
        self._beat = 0
        self._lost: set[Callable[[], None]] = set()
        self._at_work: dict[MappingId, set[ShardId]] = {}
        self._told: dict[MappingId, list[Callable[[], None]]] = {}
        self._changed = asyncio.Event()

    # --- the fence

    @property
    def is_fenced(self) -> bool:
        """Others may take what we hold: begin nothing."""
        return self._clock.now() >= self._fence

    def on_fence(self, lose: Callable[[], None]) -> None:
        """Call it when the fence has passed."""
        self._lost.add(lose)

    def off_fence(self, lose: Callable[[], None]) -> None:
        """Do not call it any more."""
        self._lost.discard(lose)

    async def run(self) -> None:
        """Beat until cancelled."""
        if self.is_alone:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._guard())
            await self._beat_on()

    async def _beat_on(self) -> None:
        failures = 0
        while True:
            sent = self._clock.now()
            try:
                # A reply that is slow is no reply: the fence counts from before the call was sent.
                async with asyncio.timeout_at(self._clock.loop(sent + self._duration / _BEATS)):
                    self._look_at_fence()  # suspended until now, perhaps, and woken before the guard
                    me = self.me
                    await self._store.beat(Member(me, self._beat + 1, self._info))
                    self._beat += 1
                    self._look_at_fence()
                    if me != self.me:
                        continue  # fenced meanwhile: the old name has beaten
                    self._fence = sent + self._duration * (1 - leasing.MARGIN)
                    await self._look()
            except (StoreUnavailable, TimeoutError) as error:
                failures += 1
                _log.error("beat_failed", error=str(error) or "no answer in time", failures=failures)
                delay = min(self._duration / _BEATS, self._backoff.delay(failures))
                await sleep_until(self._clock, self._clock.now() + delay)
                continue
            failures = 0
            await sleep_until(self._clock, sent + self._duration / _BEATS)

    async def _look(self) -> None:
        self.members = await self._store.members()
        now = self._awake()
        self._sightings.saw({name: member.beat for name, member in self.members.items()}, now)
        alive = [name for name in self._sightings.live(self.members, now) if name not in self._dead]
        live = sorted({*(name for name in alive if not self.members[name].info.get("leaving")), self.me})
        if live != list(self.live):
            _log.info("members_changed", members=len(live), live=live, was=list(self.live))
            self.live = live
            self._tell()
        for name in self._sightings.silent(self.members, now):
            await self._store.leave(name)  # killed, or a name of ours from before a fence

    async def _guard(self) -> None:
        """Give everything up when the fence passes."""
        while True:
            await sleep_until(self._clock, max(self._fence, self._clock.now() + 0.05))
            self._look_at_fence()

    def _look_at_fence(self) -> None:
        """Give everything up if the fence has passed; no beat may move a fence that has."""
        if self._fence == -inf or not self.is_fenced:
            return
        _log.error("leases_fenced", meaning="no beat got through in time: others may take what was held here")
        self._fence = -inf
        for lose in list(self._lost):
            lose()
        # The others may call the old name dead until they see its next beat. Under it they would take what was
        # handed to us in between.
        self._dead.add(self.me)
        self._lives += 1
        self.me = f"{self._name}.{self._lives}"

    async def leave(self) -> None:
        """Everything was released: the others need not wait for our death."""
        if self.is_alone:
            return
        try:
            await self._store.leave(self.me)
        except StoreUnavailable as error:
            _log.warning("not_left", error=str(error), meaning="the others count this member until its beat is old")

    async def stop(self) -> None:
        """Say that this member hands back what it has: the others need not leave it a share."""
        self._info["leaving"] = True
        if not self.is_alone:
            with suppress(StoreUnavailable):
                await self._store.beat(Member(self.me, self._beat + 1, self._info))

    # --- this process: a mapping may have a runner that ends and one that begins

    def at_work(self, mapping: MappingId) -> frozenset[ShardId]:
        """Shards that a worker of this process has, of whatever runner."""
        return frozenset(self._at_work.get(mapping, ()))

    def begin(self, mapping: MappingId, shard: ShardId) -> None:
        """A worker has the shard."""
        self._at_work.setdefault(mapping, set()).add(shard)

    def end(self, mapping: MappingId, shard: ShardId) -> None:
        """No worker has it any more: another may."""
        self._at_work[mapping].discard(shard)
        for told in self._told.get(mapping, ()):
            told()

    def on_end(self, mapping: MappingId, told: Callable[[], None]) -> None:
        """Call it whenever a worker of the mapping has ended."""
        self._told.setdefault(mapping, []).append(told)

    def off_end(self, mapping: MappingId, told: Callable[[], None]) -> None:
        """Do not call it any more; the runner has ended."""
        self._told[mapping].remove(told)
        if not self._told[mapping]:
            del self._told[mapping]
            self._spread.forget(mapping)

    # --- who does what

    def watch(self) -> asyncio.Event:
        """Set when `live` changes next."""
        return self._changed

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def plan(self, mapping: MappingId, rows: Sequence[Row]) -> Moves:
        """What to do with the shards of a mapping that may be read. What is at work here is never taken."""
        self._spread.look(mapping, rows, [row.shard for row in rows])
        if self.is_fenced:
            return Moves()
        # Owners that do not beat yet, or have left, are alive until a duration has passed.
        others = {row.owner for row in rows if self.is_live(row.owner)} - set(self.live)
        leaving = [owner for owner in others if owner is not None]
        working = self.at_work(mapping)
        moves = leasing.plan(rows, working, self._spread, self.live, self.me, leaving)
        held = self._spread.held[mapping]
        held[self.me] = held.get(self.me, 0) + len(moves.take)
        return moves

    def is_live(self, member: str | None) -> bool:
        """Is it another member that is alive?"""
        if member is None or member == self.me or member in self._dead or self.is_alone:
            return False
        return self._sightings.is_live(member, self._awake())

    def _awake(self) -> float:
        """For how long the others are silent counts in the loop's time, which does not jump: a wall clock that was set
        ahead says nothing about them.
        """
        return self._clock.loop(self._clock.now())

    @property
    def is_first(self) -> bool:
        """What only one member should do, this one does."""
        return self.me == self.live[0]

    def slots(self, limit: int) -> int:
        """What this member has of a number that holds for the fleet."""
        return leasing.slots(limit, self.live, self.me)
