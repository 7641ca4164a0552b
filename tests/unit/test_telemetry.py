import io
import json
import logging
import pickle
import re
import threading
import warnings

import pytest
import structlog
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

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
from poller.settings import LogSettings
from poller.telemetry import (
    EventCounts,
    Metrics,
    ShardAges,
    configure_logging,
    lasting,
    shard_ages,
    summed,
    worst_shards,
)

NOW = 1_000_000.0


class FixedClock:
    def now(self):
        return NOW

    def loop(self, at):
        return at


def mapping(uuid="m1", function="orders", kind=SourceKind.KINESIS):
    source = SourceSpec(kind, f"arn:aws:{kind}:eu-west-1:123456789012:x", "eu-west-1", "123456789012", "x")
    spec = FunctionSpec(function, f"arn:aws:lambda:eu-west-1:123456789012:function:{function}", "role")
    return Mapping(uuid, source, spec, BatchPolicy(100), RetryPolicy(), TRIM_HORIZON)


def status(*shards, uuid="m1", kind=SourceKind.KINESIS, **fields):
    return MappingStatus(uuid, "orders", kind, "arn", "Enabled", retention=86_400.0, shards=shards, **fields)


async def scrape(metrics):
    """Every sample of the text form as {(name, sorted labels): value}."""
    text, _ = await metrics.exposition()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text.decode())
        for sample in family.samples
    }


def key(name, uuid="m1", function="orders", source="kinesis", **more):
    return name, tuple(sorted({"mapping": uuid, "function": function, "source": source, **more}.items()))


# --- metrics ---

M = {"mapping", "function", "source"}
TABLE = {  # the table of the public contract: name -> type, labels
    "poller_polled_events_total": ("counter", M),
    "poller_filtered_out_events_total": ("counter", M),
    "poller_invoked_events_total": ("counter", M),
    "poller_failed_invoke_events_total": ("counter", M),
    "poller_dropped_events_total": ("counter", M),
    "poller_deleted_events_total": ("counter", M),
    "poller_on_failure_destination_delivered_events_total": ("counter", M),
    "poller_destination_requests_total": ("counter", M | {"outcome"}),
    "poller_invocations_total": ("counter", M | {"outcome"}),
    "poller_invocation_duration_seconds": ("histogram", M),
    "poller_concurrent_invocations": ("gauge", M),
    "poller_batch_size_events": ("histogram", M),
    "poller_iterator_age_seconds": ("gauge", M | {"shard"}),
    "poller_behind_latest_seconds": ("gauge", M | {"shard"}),
    "poller_retention_headroom_seconds": ("gauge", M | {"shard"}),
    "poller_blocked_seconds": ("gauge", M | {"shard"}),
    "poller_poll_requests_total": ("counter", M | {"operation", "outcome"}),
    "poller_checkpoints_total": ("counter", M),
    "poller_checkpoint_duration_seconds": ("histogram", M),
    "poller_shards": ("gauge", M | {"state"}),
    "poller_leases": ("gauge", {"state"}),
    "poller_records_lost_total": ("counter", M | {"shard"}),
    "poller_store_requests_total": ("counter", {"operation", "outcome"}),
    "poller_circuit_open": ("gauge", M),
    "poller_mapping_problem": ("gauge", M),
    "poller_shard_series_dropped": ("gauge", set()),
    "poller_config_reloads_total": ("counter", {"outcome"}),
    "poller_config_last_reload_success": ("gauge", set()),
    "poller_auth_failures_total": ("counter", set()),
    "poller_lease_changes_total": ("counter", {"reason"}),
    "poller_build_info": ("gauge", {"version", "python"}),
}


@pytest.mark.parametrize(
    ("accept", "parse"), [("", parse_text), ("application/openmetrics-text; version=1.0.0", parse_openmetrics)]
)
async def test_names_types_and_labels_are_the_contract(accept, parse):
    """Before anything has happened every metric shows, with the type and labels that are promised, in both formats."""
    metrics = Metrics(FixedClock(), lambda: [status(ShardStatus("s1", ShardState.RUNNING, lag=0.0))])
    metrics.observer(mapping())
    metrics.store_observer()
    text, _ = await metrics.exposition(accept)
    found = {}
    for family in parse(text.decode()):
        if family.name.startswith("poller_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {frozenset(set(sample.labels) - {"le"}) for sample in family.samples}
            found[name] = (family.type, labels)
    assert found == {name: (kind, {frozenset(labels)}) for name, (kind, labels) in TABLE.items()}
    assert b"_created" not in text
    assert b"process_resident_memory_bytes" in text


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.4,*/*;q=0.1", True),
        ("application/openmetrics-text;q=0.1,text/plain", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x;;,,=", False),
    ],
)
async def test_format_is_what_the_scraper_prefers(accept, is_openmetrics):
    """OpenMetrics only for one who asks for it and does not prefer the text format; nonsense gets the text format."""
    text, content_type = await Metrics(FixedClock(), list).exposition(accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0") is is_openmetrics
    assert text.endswith(b"# EOF\n") is is_openmetrics


async def test_an_invocation_counts_everywhere_it_should():
    """Each invocation has one outcome and one observation; the events of all but successes are failed ones."""
    metrics = Metrics(FixedClock(), list)
    observer = metrics.observer(mapping())
    outcomes = ("success", "error", "throttle", "timeout", "partial", "unreachable")
    for outcome in outcomes:
        observer.invoking(1)
        observer.invoked(outcome, 10, 0.02)
        if outcome != "unreachable":
            observer.invoking(-1)
    found = await scrape(metrics)
    assert all(found[key("poller_invocations_total", outcome=outcome)] == 1 for outcome in outcomes)
    assert found[key("poller_invoked_events_total")] == 60
    assert found[key("poller_failed_invoke_events_total")] == 50
    assert found[key("poller_concurrent_invocations")] == 1
    assert found[key("poller_batch_size_events_count")] == 6
    assert found[key("poller_batch_size_events_sum")] == 60
    assert found[key("poller_invocation_duration_seconds_bucket", le="0.01")] == 0
    assert found[key("poller_invocation_duration_seconds_bucket", le="0.025")] == 6


async def test_every_report_reaches_its_metric():
    """Polls, filters, drops, deletes, losses and saves count where their names say."""
    shards = ShardStatus("s1", ShardState.RUNNING), ShardStatus("s2", ShardState.RUNNING)
    metrics = Metrics(FixedClock(), lambda: [status(*shards)])
    observer = metrics.observer(mapping())
    observer.polled("GetRecords", "success", 7)
    observer.polled("GetShardIterator", "throttled", 0)
    observer.filtered(2)
    observer.dropped(3)
    observer.deleted(4)
    observer.reported("success", 8)
    observer.reported("error", 8)
    observer.lost("s1", 5)
    observer.lost("gone", 1)
    observer.saved(6, 0.002)
    found = await scrape(metrics)
    assert found[key("poller_polled_events_total")] == 7
    assert found[key("poller_poll_requests_total", operation="GetRecords", outcome="success")] == 1
    assert found[key("poller_poll_requests_total", operation="GetRecords", outcome="expired")] == 0
    assert found[key("poller_poll_requests_total", operation="GetShardIterator", outcome="throttled")] == 1
    assert found[key("poller_filtered_out_events_total")] == 2
    assert found[key("poller_dropped_events_total")] == 3
    assert found[key("poller_deleted_events_total")] == 4
    assert found[key("poller_on_failure_destination_delivered_events_total")] == 8
    assert found[key("poller_destination_requests_total", outcome="success")] == 1
    assert found[key("poller_destination_requests_total", outcome="error")] == 1
    assert found[key("poller_records_lost_total", shard="s1")] == 5
    assert found[key("poller_records_lost_total", shard="s2")] == 0
    assert found[key("poller_records_lost_total", shard="gone")] == 1
    assert found[key("poller_checkpoints_total")] == 6
    assert found[key("poller_checkpoint_duration_seconds_count")] == 1


async def test_nothing_raises_on_the_hot_path():
    """Counts that make no sense and outcomes that nobody knows do not stop the caller."""
    metrics = Metrics(FixedClock(), list)
    observer = metrics.observer(mapping(kind=SourceKind.SQS))
    observer.polled("Unknown", "odd", -1)
    observer.invoked("odd", -1, -1.0)
    observer.filtered(-1)
    observer.dropped(0)
    observer.deleted(-1)
    observer.lost("s", -1)
    observer.saved(0, 0.0)
    metrics.store_observer().requested("odd", "odd")
    found = await scrape(metrics)
    assert found[key("poller_polled_events_total", source="sqs")] == 0
    assert found[key("poller_invocations_total", source="sqs", outcome="odd")] == 1


async def test_an_observer_goes_on_until_its_labels_change():
    """A reload that keeps the labels keeps the counts; a new function has new series and the old ones end."""
    metrics = Metrics(FixedClock(), list)
    metrics.observer(mapping()).filtered(1)
    metrics.observer(mapping()).filtered(1)
    assert (await scrape(metrics))[key("poller_filtered_out_events_total")] == 2
    metrics.observer(mapping(function="other")).filtered(1)
    found = await scrape(metrics)
    assert key("poller_filtered_out_events_total") not in found
    assert found[key("poller_filtered_out_events_total", function="other")] == 1


async def test_a_deleted_mapping_leaves_nothing_behind():
    """After `forget` no series has the mapping, not even when its last invocations still report; others stay."""
    metrics = Metrics(FixedClock(), list)
    observer = metrics.observer(mapping())
    metrics.observer(mapping("m2"))
    metrics.forget("m1")
    metrics.forget("never-there")
    observer.polled("New", "success", 1)
    observer.invoked("odd", 1, 0.1)
    observer.invoking(-1)
    observer.lost("s1", 1)
    text, _ = await metrics.exposition()
    assert b'"m1"' not in text
    assert b'"m2"' in text


async def test_ages_are_computed_at_scrape():
    """Gauges of a shard are its instants seen from now; the states of all shards are counted, zeros too."""
    metrics = Metrics(
        FixedClock(),
        lambda: [
            status(
                ShardStatus(
                    "behind",
                    ShardState.RUNNING,
                    lease="owned",
                    lag=12.5,
                    batch_arrival=NOW - 30,
                    oldest_arrival=NOW - 60,
                    blocked_since=NOW - 5,
                ),
                ShardStatus("tip", ShardState.RUNNING, lag=None, lease="owned"),
                ShardStatus("closed", ShardState.DONE),
                breaker="open",
            ),
            status(uuid="q1", kind=SourceKind.SQS),
        ],
    )
    found = await scrape(metrics)
    assert found[key("poller_iterator_age_seconds", shard="behind")] == 30
    assert found[key("poller_behind_latest_seconds", shard="behind")] == 12.5
    assert found[key("poller_retention_headroom_seconds", shard="behind")] == 86_340
    assert found[key("poller_blocked_seconds", shard="behind")] == 5
    assert found[key("poller_iterator_age_seconds", shard="tip")] == 0
    assert key("poller_behind_latest_seconds", shard="tip") not in found
    assert found[key("poller_retention_headroom_seconds", shard="tip")] == 86_400
    assert found[key("poller_blocked_seconds", shard="tip")] == 0
    assert key("poller_iterator_age_seconds", shard="closed") not in found
    states = {state: found[key("poller_shards", state=state)] for state in ShardState}
    assert states == {state: {ShardState.RUNNING: 2, ShardState.DONE: 1}.get(state, 0) for state in ShardState}
    assert found["poller_leases", (("state", "owned"),)] == 2
    assert found["poller_leases", (("state", "free"),)] == 0
    assert found[key("poller_circuit_open")] == 1
    assert found[key("poller_circuit_open", uuid="q1", source="sqs")] == 0
    assert key("poller_shards", uuid="q1", source="sqs", state="running") not in found


def test_a_shard_that_is_not_read_yet_does_not_claim_to_be_at_the_tip():
    """Without an iterator and without pending records neither age nor headroom is known."""
    ages = shard_ages(ShardStatus("s", ShardState.STARTING), 60.0, NOW)
    assert (ages.iterator_age, ages.headroom, ages.blocked) == (None, None, 0.0)


def test_headroom_ends_at_zero_and_needs_the_retention():
    """A record older than the retention has no headroom; without a retention there is nothing to say."""
    shard = ShardStatus("s", ShardState.RUNNING, oldest_arrival=NOW - 100)
    assert shard_ages(shard, 60.0, NOW).headroom == 0
    assert shard_ages(shard, None, NOW).headroom is None


@pytest.mark.parametrize(
    ("accept", "renderer"),
    [
        ("", "poller.telemetry.render_text"),
        ("application/openmetrics-text", "poller.telemetry.openmetrics.generate_latest"),
    ],
)
async def test_the_status_is_read_on_the_loop_and_rendered_off_it(accept, renderer, monkeypatch):
    """The status belongs to the loop's thread; the text of a large scrape must not stop the loop."""
    asked, rendered = [], []

    def ask():
        asked.append(threading.get_ident())
        return [status(ShardStatus("s", ShardState.RUNNING))]

    def render(_):
        rendered.append(threading.get_ident())
        return b""

    monkeypatch.setattr(renderer, render)
    await Metrics(FixedClock(), ask).exposition(accept)
    assert asked == [threading.get_ident()]
    assert len(rendered) == 1
    assert rendered != asked


async def test_process_wide_metrics():
    """Reloads, refused credentials and store requests count without mapping labels."""
    metrics = Metrics(FixedClock(), list)
    assert (await scrape(metrics))["poller_config_last_reload_success", ()] == 1
    metrics.config_reloaded(False)
    metrics.auth_failed()
    metrics.store_observer().requested("save", "error")
    found = await scrape(metrics)
    assert found["poller_config_last_reload_success", ()] == 0
    assert found["poller_config_reloads_total", (("outcome", "error"),)] == 1
    assert found["poller_auth_failures_total", ()] == 1
    assert found["poller_store_requests_total", (("operation", "save"), ("outcome", "error"))] == 1
    assert found["poller_store_requests_total", (("operation", "load"), ("outcome", "success"))] == 0


async def test_a_mapping_in_trouble_shows():
    """1 for a mapping that has a reason, 0 for one that has none, whatever its source."""
    found = await scrape(
        Metrics(FixedClock(), lambda: [status(reason="denied"), status(uuid="q1", kind=SourceKind.SQS)])
    )
    assert found[key("poller_mapping_problem")] == 1
    assert found[key("poller_mapping_problem", uuid="q1", source="sqs")] == 0


# --- the limit of shards with series of their own ---

DAY = 86_400.0


def ages(headroom=DAY, age=0.0, blocked=0.0, lag=None):
    return ShardAges(age, lag, headroom, blocked)


def chosen(by_name, most, shown=()):
    """Names of the shards that are kept; the order in which they are given must not matter."""
    given = {("m", name): value for name, value in by_name.items()}
    shown = {("m", name) for name in shown}
    found = worst_shards(given, most, shown)
    assert worst_shards(dict(reversed(given.items())), most, shown) == found
    return sorted(name for _, name in found)


def test_the_worst_shards_are_kept():
    """Blocked ones before those with little headroom, these before those far behind, then by name; most is a limit."""
    shards = {
        "calm-1": ages(),
        "calm-2": ages(headroom=7 * DAY),
        "unknown": ages(headroom=None, age=None),
        "late": ages(age=4 * 3600, headroom=20 * 3600),
        "behind": ages(lag=900),
        "soon": ages(headroom=3600, age=DAY),
        "sooner": ages(headroom=600, age=60),
        "gone": ages(headroom=0.0),
        "blocked": ages(blocked=0.1),
    }
    worst_first = ["blocked", "gone", "sooner", "soon", "late", "behind", "calm-1", "calm-2", "unknown"]
    for most in range(len(shards) + 2):
        assert chosen(shards, most) == sorted(worst_first[:most])


def test_a_shown_shard_stays_until_another_is_clearly_worse():
    """Neither equal shards nor slightly worse ones take its place; much worse ones do, and so does a blocked one."""
    calm = {"a": ages(), "z": ages(age=59)}
    assert chosen(calm, 1) == ["a"]
    assert chosen(calm, 1, ["z"]) == ["z"]
    assert chosen({**calm, "b": ages(age=50)}, 1, ["z"]) == ["z"]
    behind = {"a": ages(age=190), "z": ages(age=170)}  # a power of two between them
    assert chosen(behind, 1) == ["a"]
    assert chosen(behind, 1, ["z"]) == ["z"]
    assert chosen({**behind, "a": ages(age=600)}, 1, ["z"]) == ["a"]
    short = {"a": ages(headroom=5300), "z": ages(headroom=5500)}
    assert chosen(short, 1) == ["a"]
    assert chosen(short, 1, ["z"]) == ["z"]
    assert chosen({**short, "a": ages(headroom=1000)}, 1, ["z"]) == ["a"]
    assert chosen({**short, "b": ages(blocked=1)}, 1, ["z"]) == ["b"]


async def test_above_the_limit_only_the_worst_shards_have_series():
    """Losses are always there; what is left out is counted; states count all; a kept shard has all of its series."""
    running = {"lag": 1.0, "batch_arrival": NOW - 30}
    shards = [ShardStatus(f"s{n}", ShardState.RUNNING, **running) for n in range(4)]
    shards[2] = ShardStatus("s2", ShardState.RUNNING, blocked_since=NOW - 5, **running)
    view = [
        status(*shards),
        status(ShardStatus("s0", ShardState.RUNNING), ShardStatus("x", ShardState.DONE), uuid="m2"),
    ]
    metrics = Metrics(FixedClock(), lambda: view, shard_series=2)
    metrics.observer(mapping()).lost("s3", 7)
    names = {
        "poller_iterator_age_seconds",
        "poller_behind_latest_seconds",
        "poller_retention_headroom_seconds",
        "poller_blocked_seconds",
    }
    found = await scrape(metrics)
    for name in names:
        assert {labels for called, labels in found if called == name} == {
            key(name, shard="s0")[1],
            key(name, shard="s2")[1],
        }
    assert {dict(labels)["shard"]: value for (name, labels), value in found.items() if "lost" in name} == {
        "s0": 0,
        "s2": 0,
        "s3": 7,
    }
    assert found["poller_shard_series_dropped", ()] == 3
    assert found[key("poller_shards", state="running")] == 4
    view[0] = status(*shards[1:])  # s0 has gone: the next takes its place, and keeps it when s0 is back
    assert key("poller_blocked_seconds", shard="s1") in await scrape(metrics)
    view[0] = status(*shards)
    found = await scrape(metrics)
    assert key("poller_blocked_seconds", shard="s1") in found
    assert key("poller_blocked_seconds", shard="s0") not in found


async def test_a_limit_of_none_leaves_losses_only():
    """0 shows no shard by itself, but one that lost records."""
    metrics = Metrics(FixedClock(), lambda: [status(ShardStatus("s1", ShardState.RUNNING, lag=1.0))], shard_series=0)
    metrics.observer(mapping()).lost("s1", 2)
    found = await scrape(metrics)
    assert {name for name, labels in found if "shard" in dict(labels)} == {"poller_records_lost_total"}
    assert found["poller_shard_series_dropped", ()] == 1


async def test_the_limit_holds_for_all_processes_together():
    """What workers report adds no shard beyond it, but those that lost records."""
    reports = [await counted(lost=0), await counted(lost=2)]
    shards = [ShardStatus(f"s{n}", ShardState.RUNNING) for n in range(5)]
    metrics = Metrics(FixedClock(), lambda: [status(*shards)], lambda: reports, shard_series=1)
    found = await scrape(metrics)
    assert {dict(labels)["shard"] for name, labels in found if name == "poller_blocked_seconds"} == {"s0"}
    assert {dict(labels)["shard"] for name, labels in found if "lost" in name} == {"s0", "s1"}
    assert found["poller_shard_series_dropped", ()] == 4


# --- logs ---


@pytest.fixture
def stream():
    """A place for logs; the process's logging is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_time_level_event_and_ids(stream):
    """Timestamps are RFC 3339 in UTC with milliseconds; bound ids come along; levels below the set one do not."""
    configure_logging(LogSettings(), stream=stream)
    log = structlog.get_logger().bind(mapping="m1", shard="s1")
    log.debug("too_quiet")
    log.info("shard_started", records=3)
    (line,) = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {"level": "info", "event": "shard_started", "mapping": "m1", "shard": "s1", "records": 3}
    assert stream.getvalue().startswith('{"timestamp": ')


def test_logs_of_libraries_have_one_event(stream):
    """Records of the standard logging, with broken arguments too, become `library_log`; botocore's debug never shows."""
    configure_logging(LogSettings(level="debug"), stream=stream)
    logging.getLogger("asyncio").error("task %s failed", 7)
    logging.getLogger("aiohttp.server").debug("quiet %d", "not a number")
    logging.getLogger("botocore.auth").debug("signature")
    logging.getLogger("aiobotocore").debug("signature")
    logging.getLogger("botocore.credentials").info("found")
    logging.getLogger("custom").log(logging.WARNING + 5, "between")
    assert [(line["level"], line["event"], line["logger"], line["message"]) for line in lines(stream)] == [
        ("error", "library_log", "asyncio", "task 7 failed"),
        ("debug", "library_log", "aiohttp.server", "quiet %d"),
        ("info", "library_log", "botocore.credentials", "found"),
        ("warning", "library_log", "custom", "between"),
    ]


def test_python_warnings_are_lines_too(stream):
    """A warning of the interpreter does not break the JSON lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logging(LogSettings(), stream=stream)
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    (line,) = lines(stream)
    assert (line["level"], line["event"], line["logger"]) == ("warning", "library_log", "py.warnings")
    assert "old thing" in line["message"]


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("format_", ["json", "console"])
def test_exceptions_show_without_locals_and_secrets(stream, format_, library):
    """A traceback names its frames, never the values in them; a secret in an error's text is masked."""
    configure_logging(LogSettings(format=format_), secrets=["hunter22"], stream=stream)
    local_payload = "pay" + "load-in-a-local"
    try:
        raise ValueError("denied for hunter22 " + local_payload[:0])  # noqa: TRY301
    except ValueError:
        if library:
            logging.getLogger("lib").exception("crashed with hunter22")
        else:
            structlog.get_logger().exception("crashed")
    text = stream.getvalue()
    assert "hunter22" not in text
    assert "payload-in-a-local" not in text
    assert "ValueError" in text
    assert "denied for ***" in text
    if format_ == "json":
        (line,) = lines(stream)
        assert line["exception"][0]["exc_type"] == "ValueError"
        assert line["exception"][0]["frames"][0]["name"] == "test_exceptions_show_without_locals_and_secrets"


def test_secrets_are_masked_in_every_value(stream):
    """Nested, quoted, in a repr, in a URL: no value shows a secret; a longer one is not left half-masked."""

    class Odd:
        def __repr__(self):
            return "<Odd tok/en=1>"

    configure_logging(LogSettings(), secrets=["tok/en=1", "tok/en=1-long", 'quo"te', ""], stream=stream)
    structlog.get_logger().info(
        "leaky",
        plain="a tok/en=1 b",
        longer="tok/en=1-long",
        nested={"deep": [("tok/en=1",)]},
        quoted="https://x/?t=tok%2Fen%3D1",
        text=json.dumps({"p": 'quo"te'}),
        thing=Odd(),
        url="sqs at https://user:pass@host/path",
        error=ValueError("tok/en=1"),
        number=1.5,
        infinite=float("inf"),
    )
    (line,) = lines(stream)
    for name in ("timestamp", "level", "event"):
        line.pop(name)
    assert line == {
        "plain": "a *** b",
        "longer": "***",
        "nested": {"deep": [["***"]]},
        "quoted": "https://x/?t=***",
        "text": '{"p": "***"}',
        "thing": "<Odd ***>",
        "url": "sqs at https://***@host/path",
        "error": "ValueError: ***",
        "number": 1.5,
        "infinite": "inf",
    }


def test_a_terminal_gets_the_console_form(stream):
    """Without a format a terminal gets text for people, anything else JSON."""
    stream.isatty = lambda: True
    configure_logging(LogSettings(), stream=stream)
    structlog.get_logger().info("hello_there", mapping="m1")
    assert "hello_there" in stream.getvalue()
    assert "{" not in stream.getvalue()


def test_a_log_stream_that_is_gone_disturbs_nobody(stream):
    """Logging goes on without an error after the stream was closed."""
    configure_logging(LogSettings(), stream=stream)
    stream.close()
    structlog.get_logger().info("into_the_void")
    logging.getLogger("lib").error("too")


def test_logging_can_be_configured_again(stream):
    """A second call changes level and secrets and does not double the lines of libraries."""
    configure_logging(LogSettings(), stream=io.StringIO())
    configure_logging(LogSettings(level="error"), secrets=["new-secret"], stream=stream)
    structlog.get_logger().info("too_quiet")
    logging.getLogger("lib").error("new-secret")
    assert [line["message"] for line in lines(stream)] == ["***"]


# --- several processes, one exposition


async def counted(*, invoked=0, lost=0):
    """What a worker reports."""
    metrics = Metrics(FixedClock(), list)
    observer = metrics.observer(mapping())
    observer.invoking(1)
    for _ in range(invoked):
        observer.invoked("success", 3, 0.02)
    observer.lost("s1", lost)
    return await metrics.report()


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
async def test_several_processes_are_one_exposition(accept):
    """Counters, buckets and gauges are sums; what they have in common stands there once; both formats parse."""
    reports = [await counted(invoked=2, lost=1), await counted(invoked=3, lost=4)]
    running = status(ShardStatus("s1", ShardState.RUNNING))
    metrics = Metrics(FixedClock(), lambda: [running], lambda: reports)
    text, _ = await metrics.exposition(accept)
    parse = parse_openmetrics if accept else parse_text
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(text.decode())
        for sample in family.samples
    }
    assert found[key("poller_invoked_events_total")] == 15
    assert found[key("poller_invocations_total", outcome="success")] == 5
    assert found[key("poller_invocation_duration_seconds_count")] == 5
    assert found[key("poller_invocation_duration_seconds_bucket", le="0.025")] == 5
    assert found[key("poller_invocation_duration_seconds_bucket", le="0.01")] == 0
    assert found[key("poller_concurrent_invocations")] == 2
    assert found[key("poller_records_lost_total", shard="s1")] == 5
    assert found[key("poller_shards", state="running")] == 1
    assert [value for (name, _), value in found.items() if name == "poller_build_info"] == [1]
    assert found["poller_config_reloads_total", (("outcome", "success"),)] == 0
    assert metrics.counts() == {"m1": EventCounts(15, 0, 0, 5)}


async def test_what_a_dead_process_counted_stays_as_long_as_its_mapping():
    """Its counters and histograms, not its gauges; nothing of a mapping that is gone or changed its function."""
    report = lasting(await counted(invoked=2, lost=1), {("m1", "orders", "kinesis")})
    metrics = Metrics(FixedClock(), list, lambda: [report])
    found = await scrape(metrics)
    assert found[key("poller_invoked_events_total")] == 6
    assert found[key("poller_records_lost_total", shard="s1")] == 1
    assert key("poller_concurrent_invocations") not in found
    for gone in (set(), {("m1", "others", "kinesis")}):
        left = lasting(report, gone)
        found = await scrape(Metrics(FixedClock(), list, lambda left=left: [left]))
        assert not [name for name, labels in found if dict(labels).get("mapping")]


async def test_reports_can_be_handed_to_another_process():
    """Pickled and back they say the same."""
    report = await counted(invoked=1, lost=2)
    again = pickle.loads(pickle.dumps(report))
    assert summed([report, again]).counts == {"m1": EventCounts(6, 0, 0, 4)}
    assert {family.name for family in again.families} == {family.name for family in report.families}
