"""What several processes say of the same mappings, as one."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from poller.core.model import MappingId, MappingStatus, ShardId, ShardState, ShardStatus

# Of states that differ the first one holds: a mapping is paused, or enabled, when it is so everywhere.
_STATES = ("Deleting", "Creating", "Updating", "Disabling", "Enabling", "Enabled", "Disabled")
_BREAKERS = ("open", "probing", "closed")
# Whoever works at a shard knows best. The others read it in the store, at different moments: the later state holds.
_SHARD_STATES = (
    ShardState.RUNNING,
    ShardState.ENDING,
    ShardState.STARTING,
    ShardState.DRAINING,
    ShardState.LOST,
    ShardState.DONE,
    ShardState.OPEN,
    ShardState.BLOCKED,
)


def merged(statuses: Iterable[Sequence[MappingStatus]]) -> list[MappingStatus]:
    """Every mapping once, in the order in which they first appear. What can be added is added."""
    found: dict[MappingId, list[MappingStatus]] = {}
    for status in statuses:
        for mapping in status:
            found.setdefault(mapping.id, []).append(mapping)
    return [_mapping(views) for views in found.values()]


def _mapping(views: Sequence[MappingStatus]) -> MappingStatus:
    if len(views) == 1:
        return views[0]
    results = [view.last_result for view in views]
    return replace(
        views[0],
        state=min((view.state for view in views), key=_STATES.index),
        reason=next((view.reason for view in views if view.reason), ""),
        in_flight=sum(view.in_flight for view in views),
        breaker=min((view.breaker for view in views), key=_BREAKERS.index),
        retention=next((view.retention for view in views if view.retention is not None), None),
        receivers=_sum([view.receivers for view in views]),
        receiver_limit=_sum([view.receiver_limit for view in views]),
        seek_pending=any(view.seek_pending for view in views),
        last_result=min(results, key=_result),
        shards=_shards(views),
    )


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _result(text: str) -> int:
    """A problem before a success before nothing."""
    return 0 if text.startswith("PROBLEM") else 2 if text.startswith("No records") else 1


def _shards(views: Sequence[MappingStatus]) -> tuple[ShardStatus, ...]:
    found: dict[ShardId, ShardStatus] = {}
    for view in views:
        for shard in view.shards:
            known = found.get(shard.id)
            if known is None or _rank(shard) < _rank(known):
                found[shard.id] = shard
    return tuple(found.values())


def _rank(shard: ShardStatus) -> tuple[bool, int]:
    """Where something is in flight, there the shard is."""
    return not shard.in_flight, _SHARD_STATES.index(shard.state)
