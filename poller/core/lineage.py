"""Shard lineage: what is listed and what is stored -> which shards may be read, which wait, which rows may go.

Parents are processed completely before their children start; that keeps order across a reshard, and DynamoDB rolls its
shards every few hours, so this is daily traffic.
"""

from collections.abc import Mapping as MappingABC
from dataclasses import dataclass

from poller.core.model import END, TRIM_HORIZON, Checkpoint, Listing, Position, PositionKind, Row, ShardId


@dataclass(frozen=True, slots=True)
class Plan:
    """`create`: rows to write before anything is read. `ready`: shards that may be read, in the order of the listing.
    `blocked`: shards that wait for a parent. `delete`: tombstones that nobody needs any more. `orphans`: new shards
    with a parent that was never seen: it came and expired while nobody looked, and what it held is lost.
    """

    create: tuple[Row, ...]
    ready: tuple[ShardId, ...]
    blocked: tuple[ShardId, ...]
    delete: tuple[ShardId, ...]
    orphans: tuple[ShardId, ...] = ()


def plan(listing: Listing, rows: MappingABC[ShardId, Row], start: Position) -> Plan:
    """Decide from a complete listing and every stored row of the mapping.

    Without any row this is the first sight of the stream and `start` applies; all its rows are written at once, so that
    a restart agrees on what "latest" meant. Later a shard without a row is a child and starts at TRIM_HORIZON whatever
    `start` says: nothing in it is older than the mapping's knowledge.
    """
    is_first_sight = not rows
    create = tuple(
        Row(
            shard.id,
            Checkpoint(_first_position(start, shard.closed, listing.at) if is_first_sight else TRIM_HORIZON),
            shard.parents,
        )
        for shard in listing.shards
        if shard.id not in rows
    )
    known = {**rows, **{row.shard: row for row in create}}
    listed = {shard.id for shard in listing.shards}
    ready: list[ShardId] = []
    blocked: list[ShardId] = []
    for row in known.values():
        if is_done(row):
            continue
        # A parent that is not listed any more is waited for too while its row says that we are not done with it: its
        # records may be in flight. Expired unread, its reader finds out that it is gone and ends it. Done parents may
        # have parents that are read again.
        (blocked if _waits(row, known) else ready).append(row.shard)
    orphans = () if is_first_sight else tuple(row.shard for row in create if any(p not in known for p in row.parents))
    return Plan(create, tuple(ready), tuple(blocked), _forgettable(known, listed), orphans)


def _waits(row: Row, known: MappingABC[ShardId, Row]) -> bool:
    """Is any ancestor not done?"""
    seen: set[ShardId] = set()
    left = list(row.parents)
    while left:
        name = left.pop()
        parent = known.get(name)
        if parent is None or name in seen:
            continue
        if not is_done(parent):
            return True
        seen.add(name)
        left += parent.parents
    return False


def with_descendants(shard: ShardId, known: MappingABC[ShardId, Row]) -> set[ShardId]:
    """The shard, if it is known, and all that came from it."""
    found = {shard} & known.keys()
    while more := {row.shard for row in known.values() if row.shard not in found and found.intersection(row.parents)}:
        found |= more
    return found


def is_done(row: Row) -> bool:
    """Read to its end, every record settled."""
    return row.checkpoint.position == END


def _first_position(start: Position, closed: bool, at: float) -> Position:
    """TRIM_HORIZON and AT_TIMESTAMP read closed shards too; LATEST means the tip of the open ones at `at`. LATEST with
    a moment of its own may lie before the end of shards that are closed by now.
    """
    if start.kind is not PositionKind.LATEST or start.value:
        return start
    return END if closed else Position(PositionKind.LATEST, repr(at))


def _forgettable(known: MappingABC[ShardId, Row], listed: set[ShardId]) -> tuple[ShardId, ...]:
    """A tombstone goes when its shard has expired and its children are done as well.

    Not earlier: a listing that briefly omits a shard would bring it back as an unknown child, read from TRIM_HORIZON,
    and everything in it would be delivered again.
    """
    children: dict[ShardId, list[Row]] = {}
    for row in known.values():
        for parent in row.parents:
            children.setdefault(parent, []).append(row)
    return tuple(
        row.shard
        for row in known.values()
        if is_done(row)
        and row.shard not in listed
        and row.shard in children
        and all(is_done(child) and child.shard not in listed for child in children[row.shard])
    )
