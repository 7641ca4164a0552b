"""Reading a document of `/api/status`: what is wrong, what is worst, and how it is said. For the page and the verb.

Works on documents of older daemons too: what they do not have is unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Any, TypeAlias

Document: TypeAlias = Mapping[str, Any]

LOW_HEADROOM = 7200.0
"""Seconds until data expires, below which somebody has to act now."""
_STATES = {"blocked": "waits for parent", "open": "waits for lease"}


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all mappings. `blocked`: shards with a failing batch. `lag` and `headroom` in seconds, of the worst shard;
    `least` is the mapping that has this headroom. Rates are records a second. None where nothing is known.
    """

    mappings: int
    disabled: int
    shards: int
    blocked: int
    lag: float | None
    headroom: float | None
    least: Document | None
    records: float | None
    failed: float | None


def totals(mappings: Sequence[Document]) -> Totals:
    """What the first line says."""
    headrooms = [(headroom, index) for index, one in enumerate(mappings) if (headroom := headroom_of(one)) is not None]
    least, which = min(headrooms, default=(None, 0))
    records = [one["records_per_second"] for one in mappings if one.get("records_per_second") is not None]
    failed = [one["failed_per_second"] for one in mappings if one.get("failed_per_second") is not None]
    return Totals(
        mappings=len(mappings),
        disabled=sum(one["state"] == "Disabled" for one in mappings),
        shards=sum(len(one["shards"]) for one in mappings),
        blocked=sum(is_blocked(shard) for one in mappings for shard in one["shards"]),
        lag=max((lag for one in mappings if (lag := mapping_lag(one)) is not None), default=None),
        headroom=least,
        least=mappings[which] if least is not None else None,
        records=sum(records) if records else None,
        failed=sum(failed) if failed else None,
    )


def is_blocked(shard: Document) -> bool:
    """A batch of it keeps failing."""
    return bool(shard.get("blocked_seconds"))


def is_low(headroom: float | None) -> bool:
    """Data expires soon, or may be expiring now."""
    return headroom is not None and headroom < LOW_HEADROOM


def is_troubled(shard: Document) -> bool:
    """Somebody should look at it: blocked, its data soon gone, or in trouble with its source."""
    return is_blocked(shard) or is_low(shard.get("headroom_seconds")) or bool(shard.get("last_error"))


def worst_first(shards: Sequence[Document]) -> list[Document]:
    """Troubled shards by how long until their data expires, then the others by how far they are behind."""

    def rank(shard: Document) -> tuple[Any, ...]:
        headroom = shard.get("headroom_seconds")
        lag = shard_lag(shard) or 0.0
        if not is_troubled(shard):
            return 2, shard["state"] == "done", -lag, shard["id"]
        expires = inf if headroom is None else headroom
        grave = is_blocked(shard) or is_low(headroom)
        return 0 if grave else 1, expires, -(shard.get("blocked_seconds") or 0.0), shard["id"]

    return sorted(shards, key=rank)


def is_open(mapping: Document) -> bool:
    """Its circuit is not closed: receiving is paused."""
    return bool(mapping["breaker"] != "closed")


def has_trouble(mapping: Document) -> bool:
    """Somebody should look at it or at one of its shards."""
    return bool(mapping["reason"]) or is_open(mapping) or any(map(is_troubled, mapping["shards"]))


def mappings_worst_first(mappings: Sequence[Document]) -> list[Document]:
    """Blocked or soon without their data, the shortest time first; then other troubles; then the rest as it came."""

    def rank(mapping: Document) -> tuple[float, float]:
        grave = [s for s in mapping["shards"] if is_blocked(s) or is_low(s.get("headroom_seconds"))]
        if grave:
            return 0, min(inf if s.get("headroom_seconds") is None else s["headroom_seconds"] for s in grave)
        return 1 if has_trouble(mapping) else 2, 0

    return sorted(mappings, key=rank)


def shard_lag(shard: Document) -> float | None:
    """The larger of how far reading is behind the tip and the age of the batch in work."""
    known = [lag for name in ("lag_seconds", "iterator_age_seconds") if (lag := shard.get(name)) is not None]
    return max(known, default=None)


def mapping_lag(mapping: Document) -> float | None:
    """The lag of its worst shard."""
    if mapping.get("lag_seconds") is not None:
        return float(mapping["lag_seconds"])
    return max((lag for shard in mapping["shards"] if (lag := shard_lag(shard)) is not None), default=None)


def headroom_of(mapping: Document) -> float | None:
    """The least headroom of its shards."""
    shards = mapping["shards"]
    return min((left for shard in shards if (left := shard.get("headroom_seconds")) is not None), default=None)


def shard_state(shard: Document) -> str:
    """In words. A shard whose state is `blocked` waits for its parent: not what an operator means by blocked."""
    state: str = shard["state"]
    return _STATES.get(state, state)


def source_name(mapping: Document) -> str:
    """`kinesis orders`: the kind, and the name in the ARN: a stream's, a table's or a queue's."""
    resource = mapping.get("source_arn", "").split(":", 5)[-1]
    parts = resource.split("/")
    name: str = parts[1] if len(parts) > 1 else resource
    return f"{mapping['source']} {name}".rstrip()


def duration(seconds: float | None, unknown: str = "-") -> str:
    """`0.4 s`, `52 s`, `4 min 10 s`, `43 min`, `1 h 12 min`, `24 h`, `2 d 3 h`. Rounded down: time left is never
    overstated.
    """
    if seconds is None:
        return unknown
    if seconds < 10:
        return f"{int(seconds * 10) / 10:g} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        parts = [(hours // 24, "d"), (hours % 24, "h")]
    elif hours:
        parts = [(hours, "h"), (minutes, "min")]
    else:
        parts = [(minutes, "min"), (rest if minutes < 10 else 0, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)


def per_second(rate: float | None, unknown: str = "-") -> str:
    """`0`, `0.25`, `12.5`, `1,234`."""
    if rate is None:
        return unknown
    if rate >= 99.95:
        return f"{rate:,.0f}"
    return f"{rate:.{1 if rate >= 1 else 2}f}".rstrip("0").rstrip(".")


def instant(at: float, now: float) -> str:
    """`14:03:11 UTC`, with its date when that is not today's."""
    moment = datetime.fromtimestamp(at, UTC)
    is_today = moment.date() == datetime.fromtimestamp(now, UTC).date()
    return moment.strftime("%H:%M:%S UTC" if is_today else "%Y-%m-%d %H:%M UTC")


def next_attempt(shard: Document, now: float) -> str:
    """When the failing batch is tried again."""
    at = shard.get("next_attempt")
    if at is None:
        return "running now" if shard.get("in_flight") else "not known"
    if at <= now:
        return "due now"
    return f"in {duration(at - now)}, at {instant(at, now)}"


def expiry(shard: Document, now: float) -> str:
    """When the shard's oldest record that is not done leaves the stream."""
    left = shard.get("headroom_seconds")
    if left is None:
        return "not known"
    if left <= 0:
        return "now: records may be lost already"
    return f"in {duration(left)}, at {instant(now + left, now)}"
