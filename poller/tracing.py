"""OpenTelemetry traces: one span for each invocation, sent over OTLP/HTTP. Needs the extra `tracing`.

Names are those of OpenTelemetry's semantic conventions: the span is an outgoing FaaS invocation, whose kind must be
CLIENT; what it carries is described as a batch of messages; what they have no name for is `poller.*`. Spans are queued
(OTEL_BSP_MAX_QUEUE_SIZE) and sent by a thread of the SDK. When the queue is full the oldest are dropped: whatever the
receiver of traces does, delivery goes on.
"""

import asyncio
import contextvars
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import requests
import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracer,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import Tracer as OtelTracer

from poller import __version__
from poller.core.model import NO_TRACE, Batch, Mapping, Record, ShardId, SourceKind, Trace
from poller.errors import ConfigError
from poller.ports import Span, Tracer
from poller.settings import FunctionSettings, LambdaFunction, TracingSettings

MAX_LINKS: Final = 128  # of one span; the SDK's own default
FLUSH_SECONDS: Final = 2.0  # that a stop waits for the spans that are left

_ROOT: Final = Context()
_SYSTEMS: Final = {SourceKind.SQS: "aws_sqs", SourceKind.KINESIS: "aws_kinesis", SourceKind.DYNAMODB: "aws_dynamodb"}
_XRAY_ROOT: Final = re.compile(r"1-([0-9a-f]{8})-([0-9a-f]{24})")
_XRAY_PARENT: Final = re.compile(r"[0-9a-f]{16}")

_log = structlog.get_logger(__name__)


# --- spans ----------------------------------------------------------------------------------------------------------


class MappingTracer:
    """A `Tracer`. A batch of one record continues its trace; any other begins a trace, linked to those of its records.

    So does the sampling: with OpenTelemetry's default sampler a single record's producer has decided.
    """

    def __init__(self, tracer: OtelTracer, mapping: Mapping, function: FunctionSettings) -> None:
        self._tracer = tracer
        self._name = mapping.function.name
        self._constant: dict[str, Any] = {
            "poller.mapping": mapping.id,
            "poller.source": str(mapping.source.kind),
            "faas.invoked_name": mapping.function.name,
            "messaging.system": _SYSTEMS[mapping.source.kind],
            "messaging.operation.type": "process",
            "messaging.destination.name": mapping.source.name,
        }
        if isinstance(function, LambdaFunction):
            self._constant["faas.invoked_provider"] = "aws"
            self._constant["faas.invoked_region"] = mapping.function.arn.split(":")[3]

    def begin(self, batch: Batch, shard: ShardId, request_id: str) -> Span:
        """The span of one invocation, sampled or not."""
        records = batch.records
        links = _links(records)
        parent = _ROOT
        if len(records) == 1 and links:
            parent = set_span_in_context(NonRecordingSpan(links[0].context), _ROOT)
        attributes = {
            **self._constant,
            "poller.attempt": batch.attempt,
            "faas.invocation_id": request_id,
            "messaging.batch.message_count": len(records),
        }
        if shard:
            attributes["messaging.destination.partition.id"] = shard
        span = self._tracer.start_span(self._name, parent, SpanKind.CLIENT, attributes, links)
        return _InvocationSpan(span, records[0].trace if records else NO_TRACE)


class _InvocationSpan:
    """A `Span`. `came`: the trace that came with the first record. Its X-Ray header is passed on before ours: what a
    Lambda function does belongs to the X-Ray trace of its event.
    """

    __slots__ = ("_span", "trace")

    def __init__(self, span: OtelSpan, came: Trace) -> None:
        self._span = span
        trace, own, _, flags, state, _ = span.get_span_context()
        text, parent = f"{trace:032x}", f"{own:016x}"
        self.trace = Trace(
            came.xray or f"Root=1-{text[:8]}-{text[8:]};Parent={parent};Sampled={flags & TraceFlags.SAMPLED}",
            f"00-{text}-{parent}-{flags:02x}",
            state.to_header(),
        )

    def end(self, outcome: str, status_code: int | None = None, error: str = "") -> None:
        """Everything but a success is an error."""
        span = self._span
        if not span.is_recording():
            return
        span.set_attribute("poller.outcome", outcome)
        if status_code is not None:
            span.set_attribute("http.response.status_code", status_code)
        if outcome != "success":
            span.set_attribute("error.type", outcome)
            span.set_status(StatusCode.ERROR, error or None)
        span.end()


def _links(records: Sequence[Record]) -> list[Link]:
    """To each trace context that came with the records, the first ones if there are too many."""
    links: list[Link] = []
    for came in dict.fromkeys(record.trace for record in records):
        if came is NO_TRACE:
            continue
        w3c, xray = _w3c(came), _xray(came.xray)
        if w3c is not None:
            links.append(Link(w3c))
        if xray is not None and (w3c is None or xray[:2] != w3c[:2]):  # producers write one context in both forms
            links.append(Link(xray))
        if len(links) >= MAX_LINKS:
            return links[:MAX_LINKS]
    return links


def _w3c(came: Trace) -> SpanContext | None:
    if not came.parent:
        return None
    _, trace, span, flags = came.parent.split("-")
    state = TraceState.from_header([came.state]) if came.state else None
    return SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=_flags(flags), trace_state=state)


def _flags(text: str) -> TraceFlags:
    return TraceFlags(int(text, 16) & (TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID))


def _xray(header: str) -> SpanContext | None:
    """The span that the header names; None when it names none. Anybody may have written it."""
    if not header:
        return None
    parts = dict(part.strip().split("=", 1) for part in header.split(";") if "=" in part)
    root = _XRAY_ROOT.fullmatch(parts.get("Root", ""))
    parent = _XRAY_PARENT.fullmatch(parts.get("Parent", ""))
    if root is None or parent is None:
        return None
    flags = TraceFlags(TraceFlags.SAMPLED if parts.get("Sampled") == "1" else TraceFlags.DEFAULT)
    context = SpanContext(int(root[1] + root[2], 16), int(parent[0], 16), is_remote=True, trace_flags=flags)
    return context if context.is_valid else None


# --- sending them ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def tracing(
    settings: TracingSettings,
) -> AsyncIterator[Callable[[Mapping, FunctionSettings], Tracer] | None]:
    """Makes the tracer of each mapping while it is open; None when OTEL_SDK_DISABLED says so.

    OTEL_* variables are obeyed but for the endpoint, which is that of the settings. ConfigError when they are wrong.
    Leaving sends what is left, for `FLUSH_SECONDS` at most; with an exception what is left is dropped.
    """
    logging.getLogger("urllib3").setLevel(logging.INFO)  # its debug records carry the URL's query
    try:
        provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        sender = _Sender(settings.endpoint)
        provider.add_span_processor(BatchSpanProcessor(sender))
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError([f"tracing: the OTEL_ environment variables are wrong: {error}; correct them"]) from None
    sender.be_quiet()
    tracer = provider.get_tracer("esm-poller", __version__)
    seconds = 0.0
    try:
        yield None if isinstance(tracer, NoOpTracer) else partial(MappingTracer, tracer)
        seconds = FLUSH_SECONDS
    finally:
        await _shut_down(provider, sender, seconds)


def _resource() -> Resource:
    """What OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say of this process; for what they leave open, who we are."""
    found = Resource({SERVICE_VERSION: __version__}).merge(Resource.create())
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):  # what the SDK puts when nobody has said
        return found.merge(Resource({SERVICE_NAME: "esm-poller"}))
    return found


async def _shut_down(provider: TracerProvider, sender: "_Sender", seconds: float) -> None:
    """The SDK would wait for 30 s, and block. Its threads are daemons: one that hangs ends with the process."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def shut_down() -> None:
        provider.shutdown()
        sender.be_loud()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=shut_down, name="traces-flush", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            await done.wait()
    except TimeoutError:
        if seconds:
            _log.warning("traces_not_flushed", seconds=seconds, meaning="the spans of the last invocations are lost")
    finally:
        sender.shutdown()


class _Session(requests.Session):
    """Remembers why the last request failed, in words without a URL; empty when it did not.

    Proxies and CAs are those of the environment. ~/.netrc is not looked into: no other request of the daemon does, and
    what it holds for a host is not meant for whoever receives traces there.
    """

    reason = ""

    def __init__(self) -> None:
        super().__init__()
        self.auth = _as_it_is  # where there is none, requests takes that of ~/.netrc

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        try:
            response = super().send(request, **options)
        except OSError as error:
            self.reason = _why(error)
            raise
        status = response.status_code
        self.reason = "" if 200 <= status < 400 else f"it answered {status}"
        return response


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Authenticated by its headers, OTEL_EXPORTER_OTLP_HEADERS, or not at all."""
    return request


def _why(error: OSError) -> str:
    match error:
        case requests.Timeout():
            return "no answer in time"
        case requests.exceptions.SSLError():
            return "TLS failed"
        case requests.ConnectionError():
            return "no connection"
        case _:
            return f"the request failed: {type(error).__name__}"


class _Sender(SpanExporter):
    """The SDK's exporter, but it logs when it begins to fail and when it works again, not every failure."""

    def __init__(self, endpoint: str) -> None:
        """ValueError, RuntimeError, ImportError: OTEL_ variables are wrong."""
        parts = urlsplit(endpoint)
        self._where = f"{parts.scheme}://{parts.netloc}"
        self._session = _Session()
        # The logs of exports are in this one's context: the thread that exports has none, and a worker has its number.
        self._context = contextvars.copy_context()
        self._is_failing = False
        self._is_closed = False
        self._exporter = _exporter(_traces_url(parts), self._session)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called by the SDK's thread. Tries again for OTEL_EXPORTER_OTLP_TIMEOUT (10 s)."""
        if self._is_closed:
            return SpanExportResult.FAILURE
        result = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing != self._is_failing and not self._is_closed:
            self._is_failing = is_failing
            self._context.run(self._tell)
        return result

    def shutdown(self) -> None:
        """Ends the wait for another try. May be called again, and by any thread."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def be_quiet(self) -> None:
        """From now on the SDK does not log what this one does."""
        for name in _NOISY:
            logging.getLogger(name).addFilter(self._is_news)

    def be_loud(self) -> None:
        """It may again."""
        for name in _NOISY:
            logging.getLogger(name).removeFilter(self._is_news)

    def _tell(self) -> None:
        if self._is_failing:
            reason = self._session.reason or "see library_log"
            meaning = "spans are dropped until it takes them again; delivery is not disturbed"
            _log.warning("traces_not_exported", endpoint=self._where, reason=reason, meaning=meaning)
        else:
            _log.info("traces_exported_again", endpoint=self._where)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """What the SDK says about requests that fail, and about the queue that fills meanwhile, is told by `_tell`."""
        del record
        return not self._session.reason


_NOISY: Final = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")


def _exporter(url: str, session: requests.Session) -> OTLPSpanExporter:
    """The SDK shows OTEL_EXPORTER_OTLP_HEADERS when it is malformed, and a key is what it is for."""
    parser = logging.getLogger("opentelemetry.util.re")
    parser.addFilter(_without_header)
    try:
        return OTLPSpanExporter(endpoint=url, session=session)
    finally:
        parser.removeFilter(_without_header)


def _without_header(record: logging.LogRecord) -> bool:
    record.msg, record.args = "OTEL_EXPORTER_OTLP_HEADERS: an entry is malformed; give NAME=VALUE,NAME=VALUE", ()
    return True


def _traces_url(endpoint: SplitResult) -> str:
    path = endpoint.path.rstrip("/")
    return endpoint._replace(path=path if path.endswith("/v1/traces") else f"{path}/v1/traces").geturl()
