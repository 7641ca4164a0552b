"""Which shards a member of the fleet takes, hands over and asks for. No clock is compared between hosts.

A member beats: it writes a number that rises. Whoever looks notes, on its own clock, when the number last changed. A
lease lives as long as its owner is seen to beat. The owner itself stops before anybody may call it dead: its fence is
the moment before the last successful beat was sent, plus the duration less a margin (KCL's rule, Kleppmann's fence).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from poller.core.model import MappingId, Row, ShardId

_LONG_DEAD = 30  # durations
MARGIN = 0.25  # of the duration: clocks that run apart, and the time that a beat takes to be seen


class Sightings:
    """When this process last saw each member beat. `now` is any clock that does not step."""

    def __init__(self, duration: float) -> None:
        self._duration = duration
        self._seen: dict[str, tuple[int, float]] = {}

    def saw(self, beats: Mapping[str, int], now: float) -> None:
        """All members that there are now."""
        for member, beat in beats.items():
            known = self._seen.get(member)
            if known is None or known[0] != beat:
                self._seen[member] = (beat, now)
        # One that left may still be named in rows: forgotten too soon, it would be new, and so alive, once more.
        for member in self.silent([member for member in self._seen if member not in beats], now):
            del self._seen[member]

    def is_live(self, member: str, now: float) -> bool:
        """Has it beaten within the duration, or was it first heard of then?"""
        if member not in self._seen:
            self._seen[member] = (-1, now)
        return now - self._seen[member][1] <= self._duration

    def silent(self, beats: Iterable[str], now: float) -> list[str]:
        """Those that have not beaten for so long that nothing of theirs is left to be respected."""
        return [
            name for name in beats if name in self._seen and now - self._seen[name][1] > _LONG_DEAD * self._duration
        ]

    def live(self, beats: Iterable[str], now: float) -> list[str]:
        """Those of the members that are alive, in order: the same on every host."""
        return sorted(member for member in beats if self.is_live(member, now))


@dataclass(frozen=True, slots=True)
class Moves:
    """What a member does with the shards of one mapping. `take`: acquire and read. `give`: let what is in flight end,
    then hand over to that member. `ask`: say in the row that we want the shard.
    """

    take: tuple[ShardId, ...] = ()
    give: tuple[tuple[ShardId, str], ...] = ()
    ask: tuple[ShardId, ...] = ()


@dataclass(slots=True)
class Spread:
    """The leases of all mappings, as this member sees them: how many each has, and how many there are to have."""

    held: dict[MappingId, dict[str, int]] = field(default_factory=dict)
    wanted: dict[MappingId, int] = field(default_factory=dict)

    def look(self, mapping: MappingId, rows: Iterable[Row], ready: Iterable[ShardId]) -> None:
        """The rows of a mapping, and those of its shards that may be read."""
        open_ones = set(ready)
        counts: dict[str, int] = {}
        for row in rows:
            if row.shard in open_ones and row.owner is not None:
                counts[row.owner] = counts.get(row.owner, 0) + 1
        self.held[mapping] = counts
        self.wanted[mapping] = len(open_ones)

    def forget(self, mapping: MappingId) -> None:
        """The mapping does not run here any more."""
        self.held.pop(mapping, None)
        self.wanted.pop(mapping, None)

    def of(self, member: str) -> int:
        """Leases of a member."""
        return sum(counts.get(member, 0) for counts in self.held.values())

    def total(self) -> int:
        """Shards that may be read, of all mappings."""
        return sum(self.wanted.values())


def plan(  # noqa: PLR0917
    rows: Sequence[Row],
    working: Iterable[ShardId],
    spread: Spread,
    live: Sequence[str],
    me: str,
    leaving: Collection[str] = (),
) -> Moves:
    """Decide for the readable shards of one mapping. `working`: those that this member reads now. `leaving`: members
    that are alive and hand back what they have; they have no share any more.

    Free are shards without an owner, with a dead one, and those that were handed to us. Nobody takes more than its
    share of all shards; every free shard is somebody's, because the shares cover them all. A member with less than its
    floor asks the richest, who hands over after what is in flight has ended.
    """
    at_work = set(working)
    members = set(live) | {me}
    count, total = len(members), spread.total()
    share, floor = ceil(total / count), total // count
    mine = spread.of(me)
    handed = [row.shard for row in rows if row.owner == me and row.shard not in at_work]
    alive = members.union(leaving)
    free = [row.shard for row in rows if row.shard not in at_work and (row.owner is None or row.owner not in alive)]
    take = [*handed, *free[: max(0, share - mine)]]
    give = [
        (row.shard, row.wanted_by)
        for row in rows
        if row.owner == me and row.wanted_by in members and row.wanted_by not in {None, me}
    ]
    ask: list[ShardId] = []
    if not free:
        coming = mine + sum(row.wanted_by == me and row.owner != me for row in rows)
        ask = _wishes(rows, max(1, floor - coming), coming, spread, members, me)
    return Moves(tuple(take), tuple((shard, to) for shard, to in give if to is not None), tuple(ask))


def _wishes(  # noqa: PLR0917
    rows: Sequence[Row], count: int, coming: int, spread: Spread, members: set[str], me: str
) -> list[ShardId]:
    """So many shards of the richest, as long as they have two more than the `coming` ones of ours."""
    rich = {member: spread.of(member) for member in members - {me}}
    asked: list[ShardId] = []
    for row in sorted(rows, key=lambda row: row.shard):
        if len(asked) >= count:
            break
        owner = row.owner
        if owner not in rich or row.wanted_by in members:
            continue
        if rich[owner] < max(rich.values()) or rich[owner] - (coming + len(asked)) < 2:
            continue
        asked.append(row.shard)
        rich[owner] -= 1
    return asked


def slots(limit: int, live: Sequence[str], me: str) -> int:
    """What this member has of a number that holds for the fleet; a member beyond it gets none."""
    members = sorted(set(live) | {me})
    each, rest = divmod(limit, len(members))
    return each + (members.index(me) < rest)
