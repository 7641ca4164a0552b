"""Logs and metrics: the structlog set-up, and the only place that knows metric names.

Metrics live in a registry of their own. Labels of a mapping are resolved once, when its observer is made: `labels()`
costs ten times what `inc()` does. What only an instant makes true (ages, shard states) is computed at scrape.
"""

import asyncio
import heapq
import json
import logging
import math
import platform
import re
import sys
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeAlias, TypeVar
from urllib.parse import quote

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, Sample
from prometheus_client.exposition import generate_latest as render_text
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from poller import __version__
from poller.core.model import Mapping, MappingId, MappingStatus, ShardId, ShardState, ShardStatus, SourceKind
from poller.ports import Clock, MappingObserver, StoreObserver
from poller.runtime.payloads import ANSWERED, SENT, payload_log
from poller.settings import LimitSettings, LogSettings

MASK = "***"
PAYLOAD_CHARACTERS = 4096
"""Of each payload that is logged."""

# --- logs ---------------------------------------------------------------------------------------------------------

_USERINFO = r"(?<=://)[^/\s@]+(?=@)"
_SECRETIVE = ("botocore", "aiobotocore")  # their debug records carry signed headers and credentials


def configure_logging(settings: LogSettings, secrets: Collection[str] = (), stream: TextIO | None = None) -> None:
    """Send every log of the process, libraries' and Python warnings included, to `stream` (default: stderr).

    One JSON object a line, or the console form on a terminal. `secrets` are masked wherever they stand in a value.
    A stream that is gone or full loses lines and disturbs nobody. May be called again, for new settings.
    """
    out = stream or sys.stderr
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    console = settings.format == "console" or (settings.format is None and out.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _to_milliseconds,
    ]
    payload_log.is_on = settings.payloads and settings.level == "debug"
    mask = _Masker(secrets)
    if console:
        # The traceback becomes text before the mask, not after it in the renderer.
        plain = structlog.dev.ConsoleRenderer(
            colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback, sort_keys=False
        )
        shared += [structlog.processors.format_exc_info, mask, _cut_payload, plain]
    else:
        # Frames without their locals: those hold payloads and secrets.
        exceptions = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
        shared += [exceptions, mask, _cut_payload, _to_json]
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=_Lossy(out)),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,  # a reload may change the level
    )
    logging.basicConfig(level=level, handlers=[_LibraryHandler()], force=True)
    logging.captureWarnings(True)
    for name in _SECRETIVE:
        logging.getLogger(name).setLevel(max(logging.INFO, level))


class _Lossy:
    """A text stream whose failures are nobody's business: a closed pipe must not fail the code that logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # gone, full, closed
            return

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


class _LibraryHandler(logging.Handler):
    """Turns the records of libraries into the event `library_log`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError, LookupError):  # arguments that do not fit the text: the library's bug
            message = str(record.msg)
        level = max((n for n in (10, 20, 30, 40, 50) if n <= record.levelno), default=logging.DEBUG)
        fields: dict[str, Any] = {"logger": record.name, "message": message}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        structlog.get_logger().log(level, "library_log", **fields)


class _Masker:
    """The last defence: masks secrets in every value of an event, and makes the values plain JSON on the way."""

    def __init__(self, secrets: Collection[str]) -> None:
        # As it is, and as it looks inside a URL, a JSON text or a repr. The longest first, else a prefix wins.
        forms = {f for s in secrets if s for f in (s, quote(s, safe=""), json.dumps(s)[1:-1], repr(s)[1:-1])}
        self._secret = re.compile("|".join([*map(re.escape, sorted(forms, key=len, reverse=True)), _USERINFO]))

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {
            key: value if key in ("timestamp", "level") else self._plain(value)
            for key, value in event.items()
        }  # fmt: skip

    def _plain(self, value: object) -> Any:
        match value:
            case str():
                return self._secret.sub(MASK, value)
            case None | bool() | int():
                return value
            case float():
                return value if math.isfinite(value) else str(value)  # JSON has no infinity
            case dict():
                return {str(key): self._plain(item) for key, item in value.items()}
            case list() | tuple() | set() | frozenset():
                return [self._plain(item) for item in value]
            case BaseException():
                return self._secret.sub(MASK, f"{type(value).__name__}: {value}")
            case _:
                return self._secret.sub(MASK, repr(value))


def _cut_payload(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The beginning of a payload, once it was masked: half a secret at the cut would not be known as one."""
    if event["event"] in (SENT, ANSWERED):
        event["payload"] = event["payload"][:PAYLOAD_CHARACTERS]
    return event


def _to_milliseconds(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["timestamp"] = f"{event['timestamp'][:23]}Z"  # of 2026-01-31T12:00:00.123456Z
    return event


def _to_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    head = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return json.dumps({**head, **event})


# --- metrics ------------------------------------------------------------------------------------------------------

Labels: TypeAlias = tuple[str, str, str]
_Family = TypeVar("_Family", Counter, Gauge, Histogram)
_LABELS = ("mapping", "function", "source")
_OUTCOMES = ("success", "error", "throttle", "timeout", "partial", "unreachable")
_READS = {  # operation -> outcomes that show as 0 from the start; others appear once they happen
    SourceKind.KINESIS: ("GetRecords", ("success", "throttled", "expired", "error")),
    SourceKind.DYNAMODB: ("GetRecords", ("success", "throttled", "expired", "error")),
    SourceKind.SQS: ("ReceiveMessage", ("success", "throttled", "error")),
}
_STORE_OPERATIONS = (
    "create", "load", "acquire", "save", "release", "forget", "mappings", "restore", "put_document",
    "delete_document", "documents", "document_keys", "prune_documents", "request", "beat", "members", "leave",
)  # fmt: skip
_INVOCATION_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)
_BATCH_EVENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_SAVE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SHARD_SERIES = LimitSettings().shard_series
_READ = frozenset({ShardState.RUNNING, ShardState.ENDING, ShardState.DRAINING})
_WORKED = _READ | {ShardState.STARTING}


@dataclass(frozen=True, slots=True)
class ShardAges:
    """What a shard's instants mean now, in seconds; None where it cannot be known.

    `iterator_age`: 0 at the tip. `headroom`: 0 when the oldest pending record may be gone already. `blocked`: 0 when
    no batch is failing.
    """

    iterator_age: float | None
    lag: float | None
    headroom: float | None
    blocked: float


def shard_ages(shard: ShardStatus, retention: float | None, now: float) -> ShardAges:
    """The ages of one shard. One that is not being read has no iterator age: that it is not behind is not known."""
    reading = shard.state in _READ
    age: float | None = 0.0 if reading else None
    if shard.batch_arrival is not None:
        age = max(0.0, now - shard.batch_arrival)
    headroom = retention if reading else None
    if retention is not None and shard.oldest_arrival is not None:
        headroom = max(0.0, retention - (now - shard.oldest_arrival))
    blocked = 0.0 if shard.blocked_since is None else max(0.0, now - shard.blocked_since)
    return ShardAges(age, shard.lag, headroom, blocked)


_SHARD_GAUGES: tuple[tuple[str, str, Callable[[ShardAges], float | None]], ...] = (
    (
        "poller_iterator_age_seconds",
        "Age of the last record of the batch in work; 0 at the tip.",
        lambda ages: ages.iterator_age,
    ),
    ("poller_behind_latest_seconds", "How far reading is behind the tip.", lambda ages: ages.lag),
    (
        "poller_retention_headroom_seconds",
        "Until the oldest record not yet done leaves the stream.",
        lambda ages: ages.headroom,
    ),
    ("poller_blocked_seconds", "How long the oldest failing batch has been blocking.", lambda ages: ages.blocked),
)

ShardKey: TypeAlias = tuple[MappingId, ShardId]
"""A shard among those of all mappings."""

_CALM_HEADROOM = 43_200.0  # half of the least retention that there is
_CALM_AGE = 60.0
_MARGIN = 1.5  # how much worse a shard that is shown counts


def worst_shards(
    ages: MappingABC[ShardKey, ShardAges], most: int, shown: Collection[ShardKey] = ()
) -> frozenset[ShardKey]:
    """At most so many of the shards: blocked ones first, then those with the least headroom, then the furthest behind.

    Headroom and age count by their powers of two; all headroom above 12 hours is alike, and all age below a minute: a
    healthy shard is no worse than one of a stream that keeps its records longer. Those that were `shown` the last time
    stay until others are clearly worse, so that series do not come and go with every scrape.
    """
    if len(ages) <= most:
        return frozenset(ages)

    def rank(key: ShardKey) -> tuple[bool, int, int, bool, ShardKey]:
        of, was_shown = ages[key], key in shown
        margin = _MARGIN if was_shown else 1.0
        headroom = _CALM_HEADROOM if of.headroom is None else max(1.0, of.headroom / margin)
        age = max(of.iterator_age or 0.0, of.lag or 0.0) * margin
        urgency = max(0, math.ceil(math.log2(_CALM_HEADROOM / headroom)))
        return not of.blocked, -urgency, -int(math.log2(1.0 + age / _CALM_AGE)), not was_shown, key

    return frozenset(heapq.nsmallest(most, ages, key=rank))


def worst_lag(shards: Sequence[ShardStatus], now: float) -> float | None:
    """How many seconds the shard that is furthest behind is behind; None when that is known of none.

    The larger of how far reading is behind the tip (which a blocked shard stops to ask for, and DynamoDB does not say)
    and the iterator age.
    """
    worst = -1.0
    for shard in shards:
        if shard.batch_arrival is not None:
            worst = max(worst, now - shard.batch_arrival, 0.0)
        elif shard.state in _READ:
            worst = max(worst, 0.0)
        if shard.lag is not None:
            worst = max(worst, shard.lag)
    return None if worst < 0 else worst


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Records of one mapping since its series began. `succeeded`: of successful invocations; `failed`: of all others,
    a partial success among them, each time; `dropped`: given up by a retry or age limit; `lost`: left retention first.
    """

    succeeded: int
    failed: int
    dropped: int
    lost: int

    def __add__(self, other: "EventCounts") -> "EventCounts":
        return EventCounts(
            self.succeeded + other.succeeded,
            self.failed + other.failed,
            self.dropped + other.dropped,
            self.lost + other.lost,
        )


_NO_EVENTS = EventCounts(0, 0, 0, 0)


_LEASE_REASONS = ("taken", "handed_over", "expired", "given", "released", "lost")


@dataclass(frozen=True, slots=True)
class MetricsReport:
    """What one process has counted, for another one that shows it. Plain values: it may be pickled.

    `losses`: records lost, by mapping and shard. `counts`: see `Metrics.counts`.
    """

    families: tuple[Metric, ...] = ()
    losses: MappingABC[Labels, MappingABC[ShardId, int]] = field(default_factory=dict)
    counts: MappingABC[MappingId, EventCounts] = field(default_factory=dict)


def summed(reports: Iterable[MetricsReport]) -> MetricsReport:
    """Everything added up, sample by sample: counters, buckets and gauges alike."""
    families: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    losses: dict[Labels, dict[ShardId, int]] = {}
    counts: dict[MappingId, EventCounts] = {}
    for report in reports:
        for family in report.families:
            _, values = families.setdefault(family.name, (family, {}))
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                values[key] = values.get(key, 0.0) + sample.value
        for names, by_shard in report.losses.items():
            found = losses.setdefault(names, {})
            for shard, count in by_shard.items():
                found[shard] = found.get(shard, 0) + count
        for mapping, count_of in report.counts.items():
            counts[mapping] = counts.get(mapping, _NO_EVENTS) + count_of
    return MetricsReport(tuple(_family(metric, values) for metric, values in families.values()), losses, counts)


def _family(like: Metric, values: MappingABC[tuple[str, tuple[tuple[str, str], ...]], float]) -> Metric:
    made = Metric(like.name, like.documentation, like.type, like.unit)
    made.samples = [Sample(name, dict(labels), value) for (name, labels), value in values.items()]
    return made


def lasting(report: MetricsReport, alive: Collection[Labels]) -> MetricsReport:
    """What outlives the process that counted it, counters and histograms, of the mappings that are still there."""
    mappings = {names[0] for names in alive}

    def stays(sample: Sample) -> bool:
        return "mapping" not in sample.labels or tuple(sample.labels[name] for name in _LABELS) in alive

    return MetricsReport(
        tuple(
            _family(family, {(s.name, tuple(s.labels.items())): s.value for s in family.samples if stays(s)})
            for family in report.families
            if family.type in {"counter", "histogram"}
        ),
        {names: by_shard for names, by_shard in report.losses.items() if names in alive},
        {mapping: count for mapping, count in report.counts.items() if mapping in mappings},
    )


# What several processes have in common, so that a sum of it would mean nothing.
_COMMON = frozenset(
    {
        "poller_build_info",
        "poller_config_reloads",
        "poller_config_last_reload_success",
        "process_start_time_seconds",
        "process_max_fds",
    }
)


class Metrics:
    """Every metric of the process. Belongs to the event loop's thread."""

    def __init__(
        self,
        clock: Clock,
        status: Callable[[], Sequence[MappingStatus]],
        others: Callable[[], Sequence[MetricsReport]] = tuple,
        *,
        shard_series: int = _SHARD_SERIES,
    ) -> None:
        """`status` is asked at each scrape, never before. `others`: what other processes have counted that are shown
        together with this one; asked at each scrape too. `shard_series`: how many shards have series of their own.
        """
        # Doubles the series for an instant that nobody queries. Process-wide: the library has no other switch.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = CollectorRegistry()
        self._families = _MappingFamilies(registry)
        self._observers: dict[MappingId, _MappingSeries] = {}
        self._store_requests = Counter(
            "poller_store_requests_total", "Requests to the store.", ("operation", "outcome"), registry=registry
        )
        self._reloads = Counter(
            "poller_config_reloads_total", "Reloads of the config file.", ("outcome",), registry=registry
        )
        for outcome in ("success", "error"):
            self._reloads.labels(outcome)
        self._reload_success = Gauge(
            "poller_config_last_reload_success", "1 if the config file last read is the one in use.", registry=registry
        )
        self._reload_success.set(1)
        self._lease_changes = Counter(
            "poller_lease_changes", "Leases that changed here, by reason.", ("reason",), registry=registry
        )
        for reason in _LEASE_REASONS:
            self._lease_changes.labels(reason)
        self._auth_failures = Counter(
            "poller_auth_failures_total", "Requests refused for want of valid credentials.", registry=registry
        )
        build = Gauge("poller_build_info", "Always 1.", ("version", "python"), registry=registry)
        build.labels(__version__, platform.python_version()).set(1)
        ProcessCollector(registry=registry)
        self._clock = clock
        self._status = status
        self._others = others
        self._shard_series = shard_series
        self._shown: frozenset[ShardKey] = frozenset()  # in the last exposition

    def observer(self, mapping: Mapping) -> MappingObserver:
        """The observer of a mapping; the same one, still counting, until the mapping's labels change."""
        labels = (mapping.id, mapping.function.name, str(mapping.source.kind))
        known = self._observers.get(mapping.id)
        if known is not None and known.names == labels:
            return known
        self.forget(mapping.id)
        made = self._observers[mapping.id] = _MappingSeries(self._families, labels)
        return made

    def forget(self, mapping: MappingId) -> None:
        """Drop the series of a deleted mapping. Its observer may still be called and counts nothing."""
        known = self._observers.pop(mapping, None)
        if known is not None:
            known.close()

    def counts(self) -> dict[MappingId, EventCounts]:
        """What each mapping has counted up to now. A mapping whose labels change begins again at 0."""
        counts = {mapping: series.counts() for mapping, series in self._observers.items()}
        for report in self._others():
            for mapping, count in report.counts.items():
                counts[mapping] = counts.get(mapping, _NO_EVENTS) + count
        return counts

    async def report(self) -> MetricsReport:
        """What this process has counted, but for what it has in common with the one that asks."""
        losses, counts = self._losses(), self.counts()
        families = await asyncio.to_thread(lambda: tuple(self._registry.collect()))
        return MetricsReport(tuple(f for f in families if f.name not in _COMMON), losses, counts)

    def _losses(self) -> dict[Labels, dict[ShardId, int]]:
        return {series.names: dict(series.losses) for series in self._observers.values()}

    def store_observer(self) -> StoreObserver:
        """The observer of the store."""
        return _StoreSeries(self._store_requests)

    def config_reloaded(self, success: bool) -> None:
        """The config file was read again; False: it was refused and the old one goes on."""
        self._reloads.labels("success" if success else "error").inc()
        self._reload_success.set(success)

    def lease_changed(self, reason: str) -> None:
        """A lease was taken, handed_over, expired (and taken), given, released or lost here."""
        self._lease_changes.labels(reason).inc()

    def auth_failed(self) -> None:
        """A request was refused for want of valid credentials."""
        self._auth_failures.inc()

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type: OpenMetrics where `accept` prefers it, else the Prometheus text.

        The status is read here; its text is made in a thread, because a thousand shards are 60 ms of it.
        """
        scrape = _Scrape(
            self._registry,
            tuple(self._status()),
            self._losses(),
            tuple(self._others()),
            now=self._clock.now(),
            shard_series=self._shard_series,
            shown=self._shown,
        )
        if _prefers_openmetrics(accept):
            content_type = openmetrics.CONTENT_TYPE_LATEST
            text = await asyncio.to_thread(openmetrics.generate_latest, scrape)
        else:
            content_type = "text/plain; version=0.0.4; charset=utf-8"
            text = await asyncio.to_thread(render_text, scrape)
        self._shown = scrape.shown
        return text, content_type


def _prefers_openmetrics(accept: str) -> bool:
    """Whether `application/openmetrics-text` stands in the header with the highest quality of what we can send."""
    quality = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for item in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        if kind in quality:
            asked = next((p[2:] for p in parameters if p.startswith("q=")), "1")
            try:
                quality[kind] = max(quality[kind], float(asked))
            except ValueError:
                continue
    return quality["application/openmetrics-text"] > 0 and (
        quality["application/openmetrics-text"] >= quality["text/plain"]
    )


class _MappingFamilies:
    """The metrics that every mapping has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*_LABELS, *more), registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, _LABELS, buckets=buckets, registry=registry)

        self.polled = counter("poller_polled_events_total", "Events read from the source.")
        self.filtered = counter("poller_filtered_out_events_total", "Events that no filter matched.")
        self.invoked = counter("poller_invoked_events_total", "Events sent to the function, again for each retry.")
        self.failed = counter("poller_failed_invoke_events_total", "Events of invocations that did not succeed.")
        self.dropped = counter("poller_dropped_events_total", "Events given up that no failure destination has.")
        self.reported = counter(
            "poller_on_failure_destination_delivered_events_total",
            "Events given up whose failure record was delivered.",
        )
        self.reports = counter(
            "poller_destination_requests_total", "Requests to the failure destination.", "outcome"
        )  # fmt: skip
        self.deleted = counter("poller_deleted_events_total", "Messages deleted from the queue.")
        self.invocations = counter("poller_invocations_total", "Invocations by outcome.", "outcome")
        self.duration = histogram("poller_invocation_duration_seconds", "Time of an invocation.", _INVOCATION_SECONDS)
        self.concurrent = Gauge(
            "poller_concurrent_invocations", "Invocations in flight.", _LABELS, registry=registry
        )  # fmt: skip
        self.batch = histogram("poller_batch_size_events", "Events of an invocation.", _BATCH_EVENTS)
        self.polls = counter("poller_poll_requests_total", "Read calls to AWS.", "operation", "outcome")
        self.checkpoints = counter("poller_checkpoints_total", "Positions saved.")
        self.save = histogram("poller_checkpoint_duration_seconds", "Time of a save of positions.", _SAVE_SECONDS)


class _MappingSeries:
    """One mapping's children of the families; a MappingObserver. `losses` are records lost, by shard."""

    def __init__(self, families: _MappingFamilies, names: Labels) -> None:
        self.names = names
        self.losses: Tally[ShardId] = Tally()
        self._succeeded_events = self._failed_events = self._dropped_events = 0
        self._families = families
        self._closed = False
        self._made: list[tuple[Counter | Gauge | Histogram, tuple[str, ...]]] = []
        self._polled = self._child(families.polled)
        self._filtered = self._child(families.filtered)
        self._invoked = self._child(families.invoked)
        self._failed = self._child(families.failed)
        self._dropped = self._child(families.dropped)
        self._reported = self._child(families.reported)
        self._reports = {outcome: self._child(families.reports, outcome) for outcome in ("success", "error")}
        self._deleted = self._child(families.deleted)
        self._duration = self._child(families.duration)
        self._concurrent = self._child(families.concurrent)
        self._batch = self._child(families.batch)
        self._checkpoints = self._child(families.checkpoints)
        self._save = self._child(families.save)
        operation, outcomes = _READS[SourceKind(names[2])]
        self._polls = {(operation, outcome): self._child(families.polls, operation, outcome) for outcome in outcomes}
        self._invocations = {outcome: self._child(families.invocations, outcome) for outcome in _OUTCOMES}

    def _child(self, family: _Family, *more: str) -> _Family:
        if self._closed:  # a late call must not bring a deleted mapping back
            return type(family)("unused", "", registry=None)
        names = (*self.names, *more)
        self._made.append((family, names))
        return family.labels(*names)

    def counts(self) -> EventCounts:
        """Up to now; the library's counters cannot be read back."""
        lost = self.losses.total()
        return EventCounts(self._succeeded_events, self._failed_events, self._dropped_events, lost)

    def close(self) -> None:
        """Take the series out of the exposition; what is still counted goes nowhere."""
        self._closed = True
        for family, names in self._made:
            family.remove(*names)

    def polled(self, operation: str, outcome: str, events: int) -> None:
        child = self._polls.get((operation, outcome))
        if child is None:
            child = self._polls[operation, outcome] = self._child(self._families.polls, operation, outcome)
        child.inc()
        _add(self._polled, events)

    def filtered(self, events: int) -> None:
        _add(self._filtered, events)

    def invoking(self, change: int) -> None:
        self._concurrent.inc(change)

    def invoked(self, outcome: str, events: int, seconds: float) -> None:
        child = self._invocations.get(outcome)
        if child is None:
            child = self._invocations[outcome] = self._child(self._families.invocations, outcome)
        child.inc()
        _add(self._invoked, events)
        if outcome == "success":
            self._succeeded_events += events
        else:
            self._failed_events += events
            _add(self._failed, events)
        self._duration.observe(seconds)
        self._batch.observe(events)

    def dropped(self, events: int) -> None:
        self._dropped_events += events
        _add(self._dropped, events)

    def reported(self, outcome: str, events: int) -> None:
        self._reports[outcome].inc()
        if outcome == "success":
            _add(self._reported, events)

    def deleted(self, events: int) -> None:
        _add(self._deleted, events)

    def lost(self, shard: ShardId, events: int) -> None:
        self.losses[shard] += max(0, events)

    def saved(self, positions: int, seconds: float) -> None:
        _add(self._checkpoints, positions)
        self._save.observe(seconds)


class _StoreSeries:
    """A StoreObserver."""

    def __init__(self, requests: Counter) -> None:
        self._requests = requests
        self._children = {
            (operation, outcome): requests.labels(operation, outcome)
            for operation in _STORE_OPERATIONS
            for outcome in ("success", "error")
        }

    def requested(self, operation: str, outcome: str) -> None:
        child = self._children.get((operation, outcome))
        if child is None:
            child = self._children[operation, outcome] = self._requests.labels(operation, outcome)
        child.inc()


def _add(counter: Counter, events: int) -> None:
    """Count without ever raising: a counter refuses to go down. Nothing to count is the usual case."""
    if events > 0:
        counter.inc(events)


class _Scrape(Collector):
    """The registry, and what is true at the moment of a scrape: ages, states, the records lost by shard.

    `shown`: the shards that had series of their own the last time; after `collect` those that have them now.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        status: tuple[MappingStatus, ...],
        losses: MappingABC[Labels, MappingABC[ShardId, int]],
        others: tuple[MetricsReport, ...],
        *,
        now: float,
        shard_series: int,
        shown: frozenset[ShardKey],
    ) -> None:
        self._registry = registry
        self._status = status
        self._own_losses = losses
        self._others = others
        self._now = now
        self._shard_series = shard_series
        self.shown = shown

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, *more: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, text, labels=(*_LABELS, *more))

        states = gauge("poller_shards", "Shards by state.", "state")
        circuit = gauge("poller_circuit_open", "1 while receiving is paused because the target fails.")
        problem = gauge("poller_mapping_problem", "1 while the mapping cannot do its work; its status says why.")
        dropped = GaugeMetricFamily(
            "poller_shard_series_dropped", "Shards left out of the metrics of shards: more than limits.shard_series."
        )
        lost = CounterMetricFamily(
            "poller_records_lost_total",
            "Records that left retention before they were done.",
            labels=(*_LABELS, "shard"),
        )
        leases = GaugeMetricFamily("poller_leases", "Leases of shards, as this process sees them.", labels=("state",))
        held: Tally[str] = Tally()
        report = MetricsReport(tuple(self._registry.collect()), self._own_losses)
        if self._others:
            report = summed((report, *self._others))
        lost_by_shard = {names: dict(by_shard) for names, by_shard in report.losses.items()}
        ages_by_shard = {
            (mapping.id, shard.id): shard_ages(shard, mapping.retention, self._now)
            for mapping in self._status
            for shard in mapping.shards
            if shard.state in _WORKED
        }
        self.shown = worst_shards(ages_by_shard, self._shard_series, self.shown)
        shown: list[tuple[tuple[str, ...], ShardAges]] = []
        dropped.add_metric((), len(ages_by_shard) - len(self.shown))
        for mapping in self._status:
            names: Labels = (mapping.id, mapping.function, str(mapping.source))
            circuit.add_metric(names, mapping.breaker != "closed")
            problem.add_metric(names, bool(mapping.reason))
            if not mapping.source.is_stream:
                continue
            counts = Tally(shard.state for shard in mapping.shards)
            held.update(shard.lease for shard in mapping.shards if shard.lease)
            for state in ShardState:
                states.add_metric((*names, state), counts[state])
            losses = lost_by_shard.setdefault(names, {})
            for shard in mapping.shards:
                if (mapping.id, shard.id) in self.shown:
                    losses.setdefault(shard.id, 0)
                    shown.append(((*names, shard.id), ages_by_shard[mapping.id, shard.id]))
        for names, by_shard in lost_by_shard.items():
            for shard_id, count in by_shard.items():
                lost.add_metric((*names, shard_id), count)
        for lease in ("owned", "other", "free", "expired"):
            leases.add_metric((lease,), held[lease])
        yield from report.families
        yield from (states, leases, circuit, problem, dropped, lost)
        for name, text, age_of in _SHARD_GAUGES:  # one after the other: together they are much to collect as garbage
            family = gauge(name, text, "shard")
            for shard_names, ages in shown:
                if (value := age_of(ages)) is not None:
                    family.add_metric(shard_names, value)
            yield family
