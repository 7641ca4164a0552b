"""Mappings as an operator would see them, and an hour of their past, without a daemon."""

import math
from dataclasses import replace

from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    FunctionSpec,
    Mapping,
    MappingStatus,
    RetryPolicy,
    ShardState,
    ShardStatus,
    SourceKind,
    SourceSpec,
)
from poller.server.history import SLOTS, STEP, History
from poller.telemetry import Metrics

NOW = 1_795_438_033.0  # 2026-11-23 12:47:13 UTC
DAY = 86_400.0
NAMES = ("orders", "billing", "shipments", "inventory", "audit-trail", "clicks", "emails", "refunds", "search", "stock")


class SetClock:
    """A clock that stands until it is set."""

    def __init__(self, now=NOW):
        self.at = now

    def now(self):
        return self.at

    def loop(self, at):
        return at


class StatusControl:
    """As much of `Control` as the status needs."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)

    def status(self):
        return self.statuses

    def store_problem(self):
        return ""


def uuid(number):
    return f"{number * 2654435761 % 2**32:08x}-{number:04x}-4000-8000-{number:012x}"


def spec(number, name=None, kind=SourceKind.KINESIS):
    """The mapping that a status is of, for its observer."""
    name = name or NAMES[number % len(NAMES)]
    source = SourceSpec(kind, arn(kind, name), "eu-west-1", "123456789012", name)
    return Mapping(
        uuid(number), source, FunctionSpec(name, f"arn:f:{name}", "role"), BatchPolicy(100), RetryPolicy(), TRIM_HORIZON
    )


def arn(kind, name):
    if kind is SourceKind.SQS:
        return f"arn:aws:sqs:eu-west-1:123456789012:{name}"
    if kind is SourceKind.DYNAMODB:
        return f"arn:aws:dynamodb:eu-west-1:123456789012:table/{name}/stream/2026-01-01T00:00:00.000"
    return f"arn:aws:kinesis:eu-west-1:123456789012:stream/{name}"


def shard(number, **fields):
    """A healthy one, unless `fields` say otherwise."""
    return ShardStatus(f"shardId-{number:012d}", ShardState.RUNNING, **({"lag": 0.0, "in_flight": number % 2} | fields))


def blocked(number, seconds=9_720.0, **fields):
    """One whose batch has been failing; a day's retention leaves 72 minutes when it began 22.8 hours ago."""
    return shard(number) if seconds == 0 else replace(
        shard(number),
        lag=seconds,
        batch_arrival=NOW - 82_080,
        oldest_arrival=NOW - 82_080,
        blocked_since=NOW - seconds,
        in_flight=0,
        held=10_000,
        attempts=163,
        first_sequence="49590338271490256608559692538361571095921575989136588898",
        last_sequence="49590338271490256608559692540925702759324208523137515618",
        last_error="500 from 127.0.0.1:8080/orders: the answer was not a success",
        next_attempt=NOW + 42,
        **fields,
    )  # fmt: skip


def mapping(number, *shards, kind=SourceKind.KINESIS, name=None, **fields):
    name = name or NAMES[number % len(NAMES)]
    usual = {
        "state": "Enabled",
        "retention": None if kind is SourceKind.SQS else DAY,
        "in_flight": sum(item.in_flight for item in shards),
        "last_result": "OK",
        "declared_in": "/etc/poller/poller.yaml",
    }
    return MappingStatus(uuid(number), name, kind, arn(kind, name), shards=shards, **(usual | fields))


def fleet(mappings=50, shards=10):
    """Of every kind of trouble one, and the rest healthy; one shard is blocked."""
    found = []
    for number in range(mappings):
        kind = (SourceKind.KINESIS, SourceKind.KINESIS, SourceKind.DYNAMODB, SourceKind.KINESIS)[number % 4]
        name = f"{NAMES[number % len(NAMES)]}-{number // len(NAMES)}"
        healthy = [shard(index) for index in range(shards)]
        if number == 17:
            healthy[3] = blocked(3)
        found.append(mapping(number, *healthy, kind=kind, name=name))
    if mappings >= 50:
        found[4] = replace(
            found[4],
            state="Disabled",
            shards=tuple(replace(one, state=ShardState.OPEN, lag=None, in_flight=0) for one in found[4].shards),
            in_flight=0,
        )
        found[7] = replace(found[7], seek_pending=True, state="Updating", declared_in=None)
    return found


def queue(number, **fields):
    return mapping(number, kind=SourceKind.SQS, **({"receivers": 3, "receiver_limit": 20, "in_flight": 3} | fields))


def sampled(control, clock=None):
    """The hour before NOW: metrics that counted and a history that sampled, for whatever `control` shows."""
    clock = clock or SetClock()
    metrics = Metrics(clock, control.status)
    observers = []
    for number, status in enumerate(control.statuses):
        made = replace(spec(number, status.function, status.source), id=status.id)
        observers.append((number, status, metrics.observer(made)))
    history = History(control, metrics, clock)
    end = clock.at
    true = control.statuses
    for slot in range(SLOTS + 1):
        clock.at = end - (SLOTS - slot) * STEP
        for number, status, observer in observers:
            wave = 1 + math.sin(slot / (9 + number % 5))
            if status.state == "Enabled":
                observer.invoked("success", int(900 * wave * (1 + number % 7)), 0.1)
            if any(one.blocked_since for one in status.shards):
                observer.invoked("error", 100 * (slot % 4 == 0), 0.1)
        control.statuses = [_then(status, number, slot, clock.at) for number, status, _ in observers]
        history.sample()
    control.statuses, clock.at = true, end
    return metrics, history


def _then(status, number, slot, at):
    """A status of the past hour: small waves of lag, and what blocks now had begun when it had."""
    bump = max(0.0, math.sin(slot / (11 + number % 6)) - 0.6) * 30
    shards = []
    for one in status.shards:
        if one.blocked_since is not None:
            shards.append(replace(one, lag=max(0.0, at - one.blocked_since)))
        else:
            shards.append(replace(one, lag=None if one.lag is None else one.lag + bump))
    return replace(status, shards=tuple(shards))
