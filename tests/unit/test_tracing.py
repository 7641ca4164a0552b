"""Traces: what a span says, what it is linked to, what the target is told; and how spans leave, or do not."""

import asyncio
import json
import logging
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode

from poller import tracing as tracing_module
from poller.clock import SystemClock
from poller.core.model import (
    MAX_PAYLOAD_BYTES,
    NO_TRACE,
    TRIM_HORIZON,
    Batch,
    BatchPolicy,
    FunctionSpec,
    Mapping,
    Record,
    Reply,
    ReplyStatus,
    RetryPolicy,
    SourceKind,
    SourceSpec,
    Trace,
)
from poller.errors import ConfigError
from poller.runtime.context import LastResult, Pipe
from poller.runtime.gate import Gate
from poller.runtime.invoke import invoke
from poller.settings import HttpFunction, LambdaFunction, LogSettings, TracingSettings
from poller.telemetry import configure_logging
from poller.tracing import MAX_LINKS, MappingTracer, tracing
from tests.fakes.observer import CountingObserver

ARN = "arn:aws:lambda:eu-west-1:123456789012:function:orders"
HTTP = HttpFunction("orders", "http://127.0.0.1:8080/orders?key=s3cret")
XRAY = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"
XRAY_IDS = (0x5759E988BD862E3FE1BE46A994272793, 0x53995C3F42CD8AD8)
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PARENT_IDS = (0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7)


def mapping_of(kind: SourceKind) -> Mapping:
    source = SourceSpec(kind, f"arn:aws:{kind}:eu-west-1:123456789012:s", "eu-west-1", "123456789012", "s")
    function = FunctionSpec("orders", ARN, "role")
    return Mapping(
        id="m-1",
        source=source,
        function=function,
        batch=BatchPolicy(10),
        retry=RetryPolicy(report_failures=True),
        start=TRIM_HORIZON,
    )


class Traced:
    """The tracer of one mapping, and what it has exported."""

    def __init__(self, kind: SourceKind = SourceKind.SQS, function=HTTP, sampler=None) -> None:
        self._memory = InMemorySpanExporter()
        provider = TracerProvider(sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.mapping = mapping_of(kind)
        self.tracer = MappingTracer(provider.get_tracer("test"), self.mapping, function)

    def one(self, *traces: Trace, attempt: int = 1, shard: str = "", outcome=("success", 200)):
        """Trace one invocation with records of these traces; what was exported of it, and what the target was told."""
        span = self.tracer.begin(batch(*traces, attempt=attempt), shard, "r-1")
        span.end(*outcome)
        return self.exported(), span.trace

    def exported(self):
        spans = self._memory.get_finished_spans()
        self._memory.clear()
        return spans[0] if spans else None


def batch(*traces: Trace, attempt: int = 1, wire: bytes = b"{}") -> Batch:
    return Batch(0, tuple(Record(str(n), "", 0.0, wire, trace=trace) for n, trace in enumerate(traces)), attempt)


def ids(span) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


# --- what a span says


def test_a_span_describes_one_invocation() -> None:
    """Function, mapping, source, shard, batch, attempt, request and answer; nothing of URL, headers or payload."""
    span, _ = Traced(SourceKind.KINESIS).one(NO_TRACE, NO_TRACE, attempt=3, shard="shardId-0")
    assert (span.name, span.kind, span.status.status_code) == ("orders", SpanKind.CLIENT, StatusCode.UNSET)
    assert dict(span.attributes) == {
        "faas.invoked_name": "orders",
        "faas.invocation_id": "r-1",
        "messaging.system": "aws_kinesis",
        "messaging.operation.type": "process",
        "messaging.destination.name": "s",
        "messaging.destination.partition.id": "shardId-0",
        "messaging.batch.message_count": 2,
        "poller.mapping": "m-1",
        "poller.source": "kinesis",
        "poller.attempt": 3,
        "poller.outcome": "success",
        "http.response.status_code": 200,
    }


def test_a_lambda_function_is_named_with_its_provider() -> None:
    """Only a real Lambda function is one of AWS; a queue has no partition."""
    span, _ = Traced(function=LambdaFunction("orders", ARN)).one(NO_TRACE)
    assert (span.attributes["faas.invoked_provider"], span.attributes["faas.invoked_region"]) == ("aws", "eu-west-1")
    assert "messaging.destination.partition.id" not in span.attributes


@pytest.mark.parametrize("outcome", ["error", "throttle", "timeout", "partial", "unreachable", "cancelled"])
def test_what_is_no_success_is_an_error(outcome) -> None:
    """With the outcome as its type, and why; without an answer there is no status code."""
    span, _ = Traced().one(NO_TRACE, outcome=(outcome, None, "http://127.0.0.1:8080 answered 500"))
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "http://127.0.0.1:8080 answered 500"
    assert (span.attributes["poller.outcome"], span.attributes["error.type"]) == (outcome, outcome)
    assert "http.response.status_code" not in span.attributes


# --- what it belongs to


def test_a_batch_is_linked_to_the_traces_of_its_records() -> None:
    """Each context once, in the records' order, in both forms; the span itself begins a trace."""
    same = f"Root=1-{PARENT[3:11]}-{PARENT[11:35]};Parent={PARENT[36:52]};Sampled=1"
    span, _ = Traced().one(
        Trace(XRAY), NO_TRACE, Trace(XRAY), Trace(same, PARENT, "a=1"), Trace(f"Sampled=0; {XRAY[:-10]}", PARENT)
    )
    assert ids(span) == [XRAY_IDS, PARENT_IDS, PARENT_IDS, XRAY_IDS]
    assert [link.context.trace_flags for link in span.links] == [1, 1, 1, 0]
    assert span.links[1].context.trace_state == {"a": "1"}
    assert span.parent is None
    assert span.context.trace_id not in {trace for trace, _ in ids(span)}


def test_links_are_bounded() -> None:
    """The first 128 are kept, and no link more is made."""
    traces = [Trace(XRAY, f"00-{n:032x}-{n:016x}-01") for n in range(1, 10_000)]
    for given in (traces, [NO_TRACE, Trace(XRAY), *traces]):  # two links a record: the limit lies between them, or not
        span, _ = Traced().one(*given)
        assert len(ids(span)) == MAX_LINKS
        assert {ids(span)[0], ids(span)[1]} == {(1, 1), XRAY_IDS}
        assert span.dropped_links == 0


@pytest.mark.parametrize(
    "header",
    [
        "Root=1-5759e988-bd862e3fe1be46a994272793",  # no span to link to
        "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad",
        "Root=1-00000000-000000000000000000000000;Parent=53995c3f42cd8ad8",
        f"Root=1-5759e988-bd862e3fe1be46a994272793;Parent={'0' * 16}",
        "Root=2-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8",
        "Parent=53995c3f42cd8ad8;Sampled=1",
        "=;;=;Root",
        "Root=1\r\nX-Evil: 1",
        "\N{SNOWMAN}",
    ],
)
def test_a_header_that_names_no_span_is_no_link(header) -> None:
    """Anybody may have written it; the batch is traced all the same."""
    span, _ = Traced().one(Trace(header))
    assert (span.links, span.parent) == ((), None)


def test_one_record_continues_its_trace() -> None:
    """The span is a child of the record's, with its state, and linked to it; of both forms W3C's is the parent."""
    span, told = Traced().one(Trace(XRAY, PARENT, "a=1"))
    assert (span.parent.trace_id, span.parent.span_id) == PARENT_IDS
    assert ids(span) == [PARENT_IDS, XRAY_IDS]
    assert (span.context.trace_id, told.state) == (PARENT_IDS[0], "a=1")
    span, _ = Traced().one(Trace(XRAY))
    assert (span.parent.trace_id, span.parent.span_id) == XRAY_IDS


@pytest.mark.parametrize(("flags", "is_sampled"), [("00", False), ("01", True), ("03", True)])
def test_who_produced_a_single_record_has_sampled(flags, is_sampled) -> None:
    """A trace is sampled as a whole, and the target is told so."""
    span, told = Traced().one(Trace(parent=PARENT[:-2] + flags))
    assert (span is not None) == is_sampled
    assert told.parent.startswith(PARENT[:36])
    assert bool(int(told.parent[-2:], 16) & 1) == is_sampled
    assert told.xray.endswith(f"Sampled={int(is_sampled)}")


def test_an_unsampled_invocation_passes_on_that_it_is() -> None:
    """Its target must not begin a trace of its own."""
    span, told = Traced(sampler=ParentBased(TraceIdRatioBased(0))).one(NO_TRACE, NO_TRACE)
    assert span is None
    assert int(told.parent[-2:], 16) & 1 == 0


def test_the_target_is_told_the_span() -> None:
    """In both forms; an X-Ray header that came with the first record is passed on as it is."""
    traced = Traced()
    span, told = traced.one(NO_TRACE, Trace(XRAY))
    trace, own = f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"
    assert told == Trace(
        f"Root=1-{trace[:8]}-{trace[8:]};Parent={own};Sampled=1", f"00-{trace}-{own}-{span.context.trace_flags:02x}"
    )
    assert len(told.parent) == len(PARENT)
    span, told = traced.one(Trace(XRAY), NO_TRACE)
    assert told.xray == XRAY
    assert f"{span.context.span_id:016x}" in told.parent


def test_a_final_window_invocation_has_no_records() -> None:
    """It is traced like any other."""
    span, told = Traced(SourceKind.KINESIS).one(shard="shardId-0")
    assert span.attributes["messaging.batch.message_count"] == 0
    assert told.xray


# --- invocations


class FakeTarget:
    """Keeps what it was told; answers `reply`, or nothing for ever."""

    timeout = 30.0
    capacity = None

    def __init__(self, reply: Reply | None) -> None:
        self._reply = reply
        self.told: list[Trace] = []
        self.called = asyncio.Event()

    async def invoke(self, invocation) -> Reply:
        self.told.append(invocation.trace)
        self.called.set()
        if self._reply is None:
            await asyncio.Event().wait()
        return self._reply


def pipe_of(traced: Traced, target: FakeTarget, *, is_on: bool = True) -> Pipe:
    return Pipe(
        mapping=traced.mapping,
        result=LastResult(),
        target=target,
        gate=Gate(None),
        observer=CountingObserver(),
        traits=None,
        open_stream=None,
        open_queue=None,
        tracer=traced.tracer if is_on else None,
    )


async def invoke_once(pipe: Pipe, work: Batch):
    return await invoke(pipe, SystemClock(asyncio.get_running_loop()), random.Random(1), work)


@pytest.mark.parametrize(
    ("reply", "outcome", "code", "said"),
    [
        (Reply(ReplyStatus.OK, b"", status_code=202), "success", 202, None),
        (
            Reply(ReplyStatus.OK, b'{"batchItemFailures":[{"itemIdentifier":"0"}]}', status_code=200),
            "partial",
            200,
            None,
        ),
        (Reply(ReplyStatus.FUNCTION_ERROR, b"s3cret", "h answered 500", 500), "error", 500, "h answered 500"),
        (Reply(ReplyStatus.TIMEOUT, error="no answer"), "timeout", None, "no answer"),
        (Reply(ReplyStatus.THROTTLED, error="h answered 429", status_code=429), "throttle", 429, "h answered 429"),
        (Reply(ReplyStatus.UNREACHABLE, error="h: refused"), "unreachable", None, "h: refused"),
    ],
)
async def test_an_invocation_has_one_span(reply, outcome, code, said) -> None:
    """It ends with the outcome that the metrics count, and the target sees its id."""
    traced, target = Traced(), FakeTarget(reply)
    attempt = await invoke_once(pipe_of(traced, target), batch(NO_TRACE, NO_TRACE))
    span = traced.exported()
    assert span.attributes["poller.outcome"] == outcome
    assert span.attributes.get("http.response.status_code") == code
    assert span.attributes["faas.invocation_id"] == attempt.request_id
    assert span.status.description == said
    assert f"{span.context.span_id:016x}" in target.told[0].parent
    assert "s3cret" not in span.to_json()


async def test_without_tracing_the_first_trace_is_passed_on() -> None:
    """That of the first record, whatever the others have; none where it has none."""
    traced, target = Traced(), FakeTarget(Reply(ReplyStatus.OK))
    pipe = pipe_of(traced, target, is_on=False)
    await invoke_once(pipe, batch(Trace(XRAY, PARENT, "a=1"), Trace("Root=1")))
    await invoke_once(pipe, batch(NO_TRACE, Trace(XRAY)))
    await invoke_once(pipe, batch())
    assert target.told == [Trace(XRAY, PARENT, "a=1"), NO_TRACE, NO_TRACE]
    assert traced.exported() is None


async def test_an_invocation_that_is_cut_off_ends_its_span() -> None:
    """A stop that waited long enough; the span is not lost."""
    traced, target = Traced(), FakeTarget(None)
    task = asyncio.ensure_future(invoke_once(pipe_of(traced, target), batch(NO_TRACE)))
    await target.called.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert traced.exported().attributes["poller.outcome"] == "cancelled"


async def test_an_event_that_is_too_large_is_traced_too() -> None:
    """It counts as an invocation, so it has a span, though the target is not called."""
    traced, target = Traced(), FakeTarget(None)
    await invoke_once(pipe_of(traced, target), batch(NO_TRACE, wire=b" " * MAX_PAYLOAD_BYTES))
    span = traced.exported()
    assert (span.attributes["poller.outcome"], target.told) == ("error", [])
    assert "more than the 6291456" in span.status.description


# --- sending


class Receiver:
    """An OTLP/HTTP receiver in a thread: answers `status`, or nothing while `hold` is set."""

    def __init__(self) -> None:
        self.status = 200
        self.hold = threading.Event()
        self.hold.set()
        self.seen: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.hold.wait(20)
                receiver.seen.append((self.path, dict(self.headers), ExportTraceServiceRequest.FromString(body)))
                self.send_response(receiver.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def names(self) -> list[str]:
        return [
            span.name
            for _, _, request in self.seen
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def environment(monkeypatch):
    """A quick SDK: spans leave at once, and nothing is tried again."""
    for name, value in {
        "OTEL_BSP_SCHEDULE_DELAY": "10",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


class Logs:
    """The daemon's own log, in lines; `until` waits for an event."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._text = ""

    def write(self, text: str) -> None:
        with self._changed:
            self._text += text
            self._changed.notify_all()

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self._text.splitlines()]

    async def until(self, event: str, count: int = 1) -> list[dict]:
        def wait() -> None:
            with self._changed:
                found = self._changed.wait_for(lambda: len(self.of(event)) >= count, 10)
            assert found, self._text

        await asyncio.to_thread(wait)
        return self.of(event)

    def of(self, event: str) -> list[dict]:
        return [line for line in self.lines if line["event"] == event]


@pytest.fixture
def logs():
    made = Logs()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    configure_logging(LogSettings(level="debug", format="json"), stream=made)
    yield made
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.handlers[:] = before
    root.setLevel(level)


def end_one(tracer) -> None:
    tracer.begin(batch(NO_TRACE), "", "r").end("success", 200)


def attributes_of(receiver: Receiver) -> dict[str, str]:
    [_, _, request] = receiver.seen[0]
    return {a.key: a.value.string_value for a in request.resource_spans[0].resource.attributes}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "/v1/traces"),
        ("/", "/v1/traces"),
        ("/otlp/?key=s3cret", "/otlp/v1/traces?key=s3cret"),
        ("/otlp/v1/traces", "/otlp/v1/traces"),
    ],
)
async def test_what_is_left_is_sent_at_the_end(receiver, monkeypatch, logs, path, expected) -> None:
    """To the endpoint's path for traces, which outranks the environment's; who we are is said; the query never logged."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=k3y")
    async with tracing(TracingSettings(receiver.url + path)) as tracers:
        end_one(tracers(mapping_of(SourceKind.SQS), HTTP))
    [(sent_to, headers, _)] = receiver.seen
    assert (sent_to, headers["x-api-key"], receiver.names()) == (expected, "k3y", ["orders"])
    resource = attributes_of(receiver)
    assert (resource["service.name"], resource["telemetry.sdk.name"]) == ("esm-poller", "opentelemetry")
    assert resource["service.version"]
    assert resource["service.instance.id"]
    assert not [line for line in logs.lines if "s3cret" in str(line) or "k3y" in str(line)]


@pytest.mark.parametrize("given", ["", "authorization=Bearer t0ken"])
async def test_the_netrc_is_not_read(receiver, environment, tmp_path, given) -> None:
    """What it has for the host is not for whoever receives traces there; what was given for them is sent."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password s3cret\ndefault login b password s3cret\n")
    environment.setenv("HOME", str(tmp_path))
    environment.delenv("NETRC", raising=False)
    environment.setenv("OTEL_EXPORTER_OTLP_HEADERS", given)
    async with tracing(TracingSettings(receiver.url)) as tracers:
        end_one(tracers(mapping_of(SourceKind.SQS), HTTP))
    [(_, headers, _)] = receiver.seen
    sent = [value for name, value in headers.items() if name.lower() == "authorization"]
    assert sent == ([given.partition("=")[2]] if given else [])


async def test_the_proxy_of_the_environment_is_used(receiver, environment) -> None:
    """A receiver of traces may be beyond one."""
    environment.delenv("NO_PROXY")
    environment.setenv("http_proxy", receiver.url)
    async with tracing(TracingSettings("http://traces.example")) as tracers:
        end_one(tracers(mapping_of(SourceKind.SQS), HTTP))
    assert [path for path, _, _ in receiver.seen] == ["http://traces.example/v1/traces"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_SERVICE_NAME", "mine"), ("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,service.version=7")],
)
async def test_the_environment_says_who_we_are(receiver, environment, name, value) -> None:
    """Our own names are defaults."""
    environment.setenv(name, value)
    async with tracing(TracingSettings(receiver.url)) as tracers:
        end_one(tracers(mapping_of(SourceKind.SQS), HTTP))
    resource = attributes_of(receiver)
    assert resource["service.name"] == "mine"
    assert (resource["service.version"] == "7") == ("version" in value)


async def test_the_environment_samples(receiver, environment) -> None:
    """OTEL_TRACES_SAMPLER is obeyed."""
    environment.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with tracing(TracingSettings(receiver.url)) as tracers:
        end_one(tracers(mapping_of(SourceKind.SQS), HTTP))
    assert receiver.seen == []


async def test_a_disabled_sdk_is_no_tracing(receiver, environment) -> None:
    """Then the records' own traces are passed on."""
    environment.setenv("OTEL_SDK_DISABLED", "true")
    async with tracing(TracingSettings(receiver.url)) as tracers:
        assert tracers is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "999999"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "many"),
    ],
)
async def test_wrong_variables_are_an_error_in_words(environment, name, value) -> None:
    """Not a traceback; and nothing of the SDK stays behind."""
    environment.setenv(name, value)
    with pytest.raises(ConfigError, match=r"tracing: the OTEL_ environment variables are wrong: .*; correct them"):
        async with tracing(TracingSettings("http://127.0.0.1:9")):
            pass
    for noisy in tracing_module._NOISY:
        assert not [one for one in logging.getLogger(noisy).filters if getattr(one, "__self__", None)]


async def test_a_malformed_header_is_not_logged(receiver, environment, logs) -> None:
    """The SDK would show it, and it is where keys are given."""
    environment.setenv("OTEL_EXPORTER_OTLP_HEADERS", "s3cret key without a name")
    async with tracing(TracingSettings(receiver.url)):
        pass
    [line] = [line for line in logs.of("library_log") if line["logger"] == "opentelemetry.util.re"]
    assert line["message"].startswith("OTEL_EXPORTER_OTLP_HEADERS: an entry is malformed")
    assert "s3cret" not in str(logs.lines)


async def test_each_change_of_the_receiver_is_one_line(receiver, environment, logs) -> None:
    """Not one for each failure: it answers errors for a while, then takes spans, then errors again."""
    async with tracing(TracingSettings(f"{receiver.url}/?key=s3cret")) as tracers:
        tracer = tracers(mapping_of(SourceKind.SQS), HTTP)
        for status, event, count in ((400, "traces_not_exported", 1), (200, "traces_exported_again", 1),
                                     (503, "traces_not_exported", 2)):  # fmt: skip
            receiver.status = status
            for _ in range(3):
                before = len(receiver.seen)
                end_one(tracer)
                while len(receiver.seen) == before:
                    await asyncio.sleep(0.01)
            found = await logs.until(event, count)
            assert len(found) == count
    lines = [line for line in logs.lines if line["event"] != "library_log" or line["logger"].startswith("opentel")]
    assert [(line["event"], line["level"], line.get("reason")) for line in lines] == [
        ("traces_not_exported", "warning", "it answered 400"),
        ("traces_exported_again", "info", None),
        ("traces_not_exported", "warning", "it answered 503"),
    ]
    assert {line["endpoint"] for line in lines} == {receiver.url}
    assert "s3cret" not in str(logs.lines)


async def test_a_receiver_that_is_away_takes_no_memory(environment, logs) -> None:
    """The queue is bounded, full or not nothing waits for it, and one line tells of it."""
    environment.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    environment.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    async with tracing(TracingSettings("http://127.0.0.1:9")) as tracers:
        tracer = tracers(mapping_of(SourceKind.SQS), HTTP)
        end_one(tracer)
        [line] = await logs.until("traces_not_exported")
        for _ in range(1000):
            end_one(tracer)
    assert line["reason"] == "no connection"
    assert [line["event"] for line in logs.lines if "opentelemetry" in str(line)] == []
    assert len(logs.of("traces_not_exported")) == 1


async def test_a_stop_does_not_wait_for_a_receiver_that_hangs(receiver, environment, monkeypatch, logs) -> None:
    """For a bounded time only, and it says what that means."""
    environment.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "10")
    monkeypatch.setattr(tracing_module, "FLUSH_SECONDS", 0.05)
    receiver.hold.clear()
    async with asyncio.timeout(5):
        async with tracing(TracingSettings(receiver.url)) as tracers:
            end_one(tracers(mapping_of(SourceKind.SQS), HTTP))
    [line] = logs.of("traces_not_flushed")
    assert line["seconds"] == 0.05
    receiver.close()
    while any(one.name == "traces-flush" for one in threading.enumerate()):
        await asyncio.sleep(0.01)


async def test_a_stop_ends_the_wait_for_another_try(receiver, environment, monkeypatch) -> None:
    """The SDK waits for seconds between its tries; no thread of it outlives the stop by that."""
    environment.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    monkeypatch.setattr(tracing_module, "FLUSH_SECONDS", 0.05)
    receiver.status = 503
    async with tracing(TracingSettings(receiver.url)) as tracers:
        end_one(tracers(mapping_of(SourceKind.SQS), HTTP))
        while not receiver.seen:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(0.5):
        while any(one.name == "traces-flush" for one in threading.enumerate()):
            await asyncio.sleep(0.01)


async def test_a_stop_that_is_forced_does_not_wait_at_all(receiver, monkeypatch, logs) -> None:
    """What is left is dropped."""
    receiver.hold.clear()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(5), tracing(TracingSettings(receiver.url)) as tracers:
            end_one(tracers(mapping_of(SourceKind.SQS), HTTP))
            raise asyncio.CancelledError
    assert logs.of("traces_not_flushed") == []
    receiver.close()
    while any(one.name == "traces-flush" for one in threading.enumerate()):
        await asyncio.sleep(0.01)


def test_without_tracing_nothing_of_it_is_imported() -> None:
    """Neither the daemon nor its config loads OpenTelemetry; it is an extra."""
    code = "import sys, poller.app, poller.cli, poller.workers.child; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "poller.app" in loaded
    assert not [name for name in loaded.split() if name.startswith(("opentelemetry", "requests", "poller.tracing"))]
