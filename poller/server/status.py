"""`/api/status`: the document that the page and `poller status` show."""

from collections.abc import Mapping, Sequence
from math import isfinite, isnan
from typing import Any

from poller import __version__
from poller.core.model import MappingId, MappingStatus, ShardStatus
from poller.server.history import STEP, Recent, Series
from poller.telemetry import shard_ages, worst_lag


def status_document(
    status: Sequence[MappingStatus],
    now: float,
    recent: Mapping[MappingId, Recent] | None = None,
    store_problem: str = "",
) -> dict[str, Any]:
    """The document. Ages in seconds, instants (`at`, `next_attempt`) in epoch seconds, null where unknown.

    A mapping's `lag_seconds` is that of its worst shard, and the larger of the shard's lag and iterator age;
    `headroom_seconds` the least of its shards. `records_per_second` and `failed_per_second` are of the last minute,
    totals since the daemon started. `history` is there where `recent` has series. `store.problem`: why positions cannot
    be saved, null while they can.
    """
    recent = recent or {}
    return {
        "version": __version__,
        "at": now,
        "store": {"problem": store_problem or None},
        "mappings": [_mapping(mapping, now, recent.get(mapping.id)) for mapping in status],
    }


def _mapping(mapping: MappingStatus, now: float, recent: Recent | None) -> dict[str, Any]:
    shards = [_shard(shard, mapping.retention, now) for shard in mapping.shards]
    document = {
        "uuid": mapping.id,
        "function": mapping.function,
        "source": mapping.source,
        "source_arn": mapping.source_arn,
        "declared_in": mapping.declared_in,
        "state": mapping.state,
        "reason": mapping.reason,
        "last_result": mapping.last_result,
        "in_flight": mapping.in_flight,
        "breaker": mapping.breaker,
        "receivers": mapping.receivers,
        "receiver_limit": mapping.receiver_limit,
        "seek_pending": mapping.seek_pending,
        "retention_seconds": mapping.retention,
        "lag_seconds": worst_lag(mapping.shards, now),
        "headroom_seconds": min((left for s in shards if (left := s["headroom_seconds"]) is not None), default=None),
        "blocked_shards": sum(shard["blocked_seconds"] > 0 for shard in shards),
        "records_per_second": recent.succeeded if recent else None,
        "failed_per_second": recent.failed if recent else None,
        "records_dropped": recent.counts.dropped if recent else None,
        "records_lost": recent.counts.lost if recent else None,
    }
    if recent and recent.series:
        document["history"] = _history(recent.series)
    return {**document, "shards": shards}


def _shard(shard: ShardStatus, retention: float | None, now: float) -> dict[str, Any]:
    ages = shard_ages(shard, retention, now)
    return {
        "id": shard.id,
        "state": shard.state,
        "lag_seconds": ages.lag,
        "iterator_age_seconds": ages.iterator_age,
        "headroom_seconds": ages.headroom,
        "blocked_seconds": ages.blocked,
        "in_flight": shard.in_flight,
        "held": shard.held,
        "attempts": shard.attempts,
        "first_sequence": shard.first_sequence,
        "last_sequence": shard.last_sequence,
        "last_error": shard.last_error,
        "next_attempt": _due(shard.next_attempt, now),
        "lease": shard.lease or None,
        "owner": shard.owner,
    }


def _due(at: float | None, now: float) -> float | None:
    """An instant that JSON can say: a batch that waits for nothing has none of its own."""
    return at if at is None or isfinite(at) else now


def _history(series: Series) -> dict[str, Any]:
    return {
        "step_seconds": STEP,
        "ends_at": series.ends_at,
        "lag_seconds": _numbers(series.lag),
        "records_per_second": _numbers(series.succeeded),
        "failed_per_second": _numbers(series.failed),
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if isnan(value) else round(value, 3) for value in values]
