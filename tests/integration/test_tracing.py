"""The daemon with tracing on, over sockets: a queue, an HTTP target and a receiver of traces."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon
from tests.integration.emulators import free_port
from tests.integration.test_daemon import Aws, config, queue_of, stream_of

pytestmark = pytest.mark.integration

XRAY = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@dataclass
class Receiver:
    """Takes OTLP over HTTP, as protobuf."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    instances: set[str] = field(default_factory=set)  # of the service
    services: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        for of_resource in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            resource = attributes_of(of_resource.resource)
            self.services.add(resource["service.name"])
            self.instances.add(resource["service.instance.id"])
            self.spans += [span for of_scope in of_resource.scope_spans for span in of_scope.spans]
        self.changed.set()
        return web.Response()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.spans) < count:
                self.changed.clear()
                await self.changed.wait()


def attributes_of(described: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in described.attributes}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans leave after 50 ms."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def fake(fake_aws, account: str) -> Aws:
    return Aws(fake_aws.url, account)


def send(aws: Aws, body: str, xray: str = "", **attributes: str) -> None:
    sqs = aws.client("sqs")
    system = {"AWSTraceHeader": {"DataType": "String", "StringValue": xray}} if xray else {}
    sqs.send_message(
        QueueUrl=sqs.get_queue_url(QueueName="q")["QueueUrl"],
        MessageBody=body,
        MessageSystemAttributes=system,
        MessageAttributes={name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()},
    )


async def test_an_invocation_joins_producer_and_target(fake_aws, fake, account, ledger, receiver, daemons) -> None:
    """A span of each invocation arrives, linked to the messages' traces; the target sees it as its parent."""
    arn = fake_aws.queue("q", account, REGION)
    await asyncio.to_thread(send, fake, "first", XRAY)
    await asyncio.to_thread(send, fake, "second", "", traceparent=PARENT)
    tracing = {"endpoint": receiver.url}
    mapping = queue_of(arn, BatchSize=10, MaximumBatchingWindowInSeconds=1)
    daemon: Daemon = daemons(config(fake, ledger, mapping, tracing=tracing))
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 2, 20, "delivery")
    await receiver.until(1)
    assert await daemon.stop() == 0

    [span], [request] = receiver.spans, ledger.requests
    assert receiver.services == {"esm-poller"}
    assert (span.name, span.kind) == ("f", Span.SPAN_KIND_CLIENT)
    trace, own = span.trace_id.hex(), span.span_id.hex()
    assert request["traceparent"][:53] == f"00-{trace}-{own}-"
    assert request.get("X-Amzn-Trace-Id") in {XRAY, f"Root=1-{trace[:8]}-{trace[8:]};Parent={own};Sampled=1"}
    assert {(link.trace_id.hex(), link.span_id.hex()) for link in span.links} == {
        ("5759e988bd862e3fe1be46a994272793", "53995c3f42cd8ad8"),
        ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"),
    }
    found = attributes_of(span)
    assert found["poller.mapping"] == request["X-Poller-Mapping"]
    assert found["faas.invocation_id"] == request["X-Poller-Request-Id"]
    assert (found["poller.attempt"], found["messaging.batch.message_count"]) == (1, 2)
    assert (found["poller.outcome"], found["http.response.status_code"]) == ("success", 200)
    assert not daemon.clean_logs()


async def test_one_message_continues_its_trace(fake_aws, fake, account, ledger, receiver, daemons) -> None:
    """Producer, daemon and target are one trace; a failed attempt is a span of its own, with an error."""
    arn = fake_aws.queue("q", account, REGION, {"VisibilityTimeout": "1"})
    await asyncio.to_thread(send, fake, "x", "", traceparent=PARENT)
    statuses = iter([500])
    ledger.rule = lambda _: next(statuses, None)
    daemon: Daemon = daemons(config(fake, ledger, queue_of(arn, BatchSize=1), tracing={"endpoint": receiver.url}))
    await daemon.start()
    await receiver.until(2)
    assert await daemon.stop() == 0
    assert {span.trace_id.hex() for span in receiver.spans} == {PARENT[3:35]}
    assert {span.parent_span_id.hex() for span in receiver.spans} == {PARENT[36:52]}
    assert [request["traceparent"][3:52] for request in ledger.requests] == [
        f"{span.trace_id.hex()}-{span.span_id.hex()}" for span in receiver.spans
    ]
    failed, done = receiver.spans
    assert (failed.status.code, done.status.code) == (Status.STATUS_CODE_ERROR, Status.STATUS_CODE_UNSET)
    assert failed.status.message == f"{ledger.url.removesuffix('/f')} answered 500"
    assert attributes_of(failed)["error.type"] == "error"


async def test_the_last_spans_arrive_before_the_end(
    fake_aws, fake, account, ledger, receiver, daemons, monkeypatch
) -> None:
    """A stop sends what is left, though the next export would be a minute away."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    arn = fake_aws.queue("q", account, REGION)
    fake_aws.send(arn, ["x"])
    daemon: Daemon = daemons(config(fake, ledger, queue_of(arn), tracing={"endpoint": receiver.url}))
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 1, 20, "delivery")
    assert receiver.spans == []
    assert await daemon.stop() == 0
    assert [span.name for span in receiver.spans] == ["f"]


async def test_a_receiver_that_is_down_disturbs_nobody(fake_aws, fake, account, ledger, daemons, monkeypatch) -> None:
    """All is delivered once, the target still sees a trace, the log tells of it in one line, and a stop is a stop."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    arn = fake_aws.queue("q", account, REGION)
    fake_aws.send(arn, [str(n) for n in range(200)])
    endpoint = f"http://127.0.0.1:{free_port()}/?key=s3cret-key"
    daemon: Daemon = daemons(config(fake, ledger, queue_of(arn, BatchSize=1), tracing={"endpoint": endpoint}))
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 200, 30, "delivery")
    await daemon.until_logged("traces_not_exported")
    assert await daemon.stop() == 0
    assert not ledger.redelivered()
    assert all("traceparent" in request for request in ledger.requests)
    [line] = daemon.events("traces_not_exported")
    assert (line["level"], line["reason"]) == ("warning", "no connection")
    assert not daemon.clean_logs()
    assert not [entry for entry in daemon.events("library_log") if entry["logger"].startswith("opentelemetry")]
    assert "s3cret" not in str(daemon.logs)


async def test_each_worker_exports_its_own(fake_aws, fake, account, ledger, receiver, daemons) -> None:
    """One service, an instance for each worker that has invoked."""
    arn = await asyncio.to_thread(fake.stream, "s", 4)
    daemon: Daemon = daemons(config(fake, ledger, stream_of(arn, BatchSize=10), tracing={"endpoint": receiver.url}))
    daemon.arguments = ["--workers", "2"]
    await daemon.start()
    count = 0
    async with asyncio.timeout(40):
        while len(receiver.instances) < 2:  # until both have shards
            await asyncio.to_thread(fake.put_stream, "s", count, 100)
            count += 100
            await receiver.until(len(receiver.spans) + 1)
    await ledger.until(lambda: ledger.count("kinesis") == count, 20, "delivery")
    assert await daemon.stop() == 0
    assert receiver.services == {"esm-poller"}
    assert len(receiver.instances) == 2
    assert {attributes_of(span)["poller.source"] for span in receiver.spans} == {"kinesis"}
    assert len(receiver.spans) == len(ledger.requests)


async def test_wrong_variables_end_the_start(fake_aws, fake, account, ledger, receiver, daemons, monkeypatch) -> None:
    """With a sentence, not a traceback."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    arn = fake_aws.queue("q", account, REGION)
    daemon: Daemon = daemons(config(fake, ledger, queue_of(arn), tracing={"endpoint": receiver.url}))
    await daemon.start(wait=False)
    assert await daemon.ended() == 1
    [line] = daemon.events("not_started")
    assert line["error"].startswith("tracing: the OTEL_ environment variables are wrong: ")
