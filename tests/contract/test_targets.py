"""Every target keeps these rules, whatever the network and the function do. Real sockets, one scripted server."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate

import pytest
from aiohttp import web

from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.core.model import MAX_PAYLOAD_BYTES, Invocation, Reply, ReplyStatus, Trace
from poller.ports import Target
from poller.settings import AwsSettings, HttpFunction, LambdaFunction
from poller.targets import open_target
from tests.fakes.scripted_http import Request, Script, answering, closing, serving

EVENT = b'{"Records":[{"a":  "not \\u00e9ncoded again"}]}'
ARN = "arn:aws:lambda:eu-west-1:123456789012:function:orders:live"
KINDS = ("http", "lambda")


@asynccontextmanager
async def target_of(kind: str, url: str, wait: float = 5.0, **settings: object) -> AsyncIterator[Target]:
    """A target of each kind at this address, which answers within `wait` seconds or never."""
    clock = SystemClock(asyncio.get_running_loop())
    async with AwsClients(AwsSettings(region="us-east-1", endpoint_url=url)) as clients:
        target = open_target(
            HttpFunction("orders", f"{url}/orders", timeout=wait, **settings)  # type: ignore[arg-type]
            if kind == "http"
            else LambdaFunction("orders", ARN, timeout=wait - 5),  # it waits 5 s longer than the function may take
            "us-east-1",
            clients,
            clock,
        )
        try:
            yield target
        finally:
            await target.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def invocation(payload: bytes = EVENT, trace: str = "") -> Invocation:
    return Invocation("3f0e-mapping", "5b1c-request", 3, "k" * 32, payload, Trace(trace))


async def invoke(kind: str, script: Script, wait: float = 5.0, early: bool = False) -> Reply:
    async with serving(script, early) as server, target_of(kind, server.url, wait) as target:
        return await target.invoke(invocation())


pytestmark = pytest.mark.parametrize("kind", KINDS)


async def test_the_payload_is_posted_byte_for_byte(kind: str) -> None:
    """The function gets the event as it was encoded, in one POST of JSON."""
    async with serving(answering()) as server, target_of(kind, server.url) as target:
        await target.invoke(invocation())
    (request,) = server.requests
    assert (request.method, request.body, request.headers["content-type"]) == ("POST", EVENT, "application/json")
    assert request.headers["user-agent"].startswith("esm-poller/")


async def test_the_largest_payload_passes(kind: str) -> None:
    """An event may have the full 6 MiB; nothing warns or splits it."""
    payload = b'"' + b"x" * (MAX_PAYLOAD_BYTES - 2) + b'"'
    async with serving(answering()) as server, target_of(kind, server.url) as target:
        reply = await target.invoke(invocation(payload))
    assert reply.status is ReplyStatus.OK
    assert server.requests[0].body == payload


async def test_success_carries_status_and_body(kind: str) -> None:
    """2xx is success, and the body is the function's answer."""
    reply = await invoke(kind, answering(200, b'{"batchItemFailures":[]}'))
    assert reply == Reply(ReplyStatus.OK, b'{"batchItemFailures":[]}', status_code=200)


async def test_a_chunked_answer_of_a_real_server_is_read(kind: str) -> None:
    """The framing of the answer does not matter."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse()
        await response.prepare(request)
        for part in (b'{"batch', b'ItemFailures"', b":null}"):
            await response.write(part)
        return response

    app = web.Application()
    app.router.add_post("/{tail:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with target_of(kind, f"http://127.0.0.1:{runner.addresses[0][1]}") as target:
            reply = await target.invoke(invocation())
    finally:
        await runner.cleanup()
    assert (reply.status, reply.body) == (ReplyStatus.OK, b'{"batchItemFailures":null}')


@pytest.mark.parametrize("value", ["Unhandled", "Handled", "", "anything"])
async def test_a_function_error_header_counts_by_presence(kind: str, value: str) -> None:
    """X-Amz-Function-Error makes a 200 a function error, whatever its value; the text has neither value nor body."""
    reply = await invoke(kind, answering(200, b'{"errorMessage":"of order s3cret"}', f"X-Amz-Function-Error: {value}"))
    assert (reply.status, reply.status_code) == (ReplyStatus.FUNCTION_ERROR, 200)
    assert "s3cret" not in reply.error
    assert "anything" not in reply.error


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("0", 0.0), ("-3", None), ("soon", None), ("", None), ("1.5", None), ("inf", None), ("nan", None)],
)
async def test_a_throttle_says_how_long(kind: str, value: str, seconds: float | None) -> None:
    """429 is a throttle; Retry-After is passed on in seconds, and left out when it makes no sense."""
    reply = await invoke(kind, answering(429, b"{}", f"Retry-After: {value}"))
    assert (reply.status, reply.status_code, reply.retry_after) == (ReplyStatus.THROTTLED, 429, seconds)


async def test_a_throttle_may_name_a_date(kind: str) -> None:
    """Retry-After as an HTTP date is the seconds until then; a date that has passed is left out."""
    ahead = await invoke(kind, answering(429, b"", f"Retry-After: {formatdate(time.time() + 60, usegmt=True)}"))
    past = await invoke(kind, answering(429, b"", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"))
    assert ahead.retry_after is not None
    assert 50 < ahead.retry_after <= 60
    assert past.retry_after is None


async def test_413_is_too_large(kind: str) -> None:
    """413 counts as a failed attempt of its own kind."""
    reply = await invoke(kind, answering(413, b"{}"))
    assert (reply.status, reply.status_code) == (ReplyStatus.TOO_LARGE, 413)


async def test_a_refused_connection_is_unreachable(kind: str) -> None:
    """Nobody listens: the function never ran."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with target_of(kind, f"http://127.0.0.1:{port}") as target:
        reply = await target.invoke(invocation())
        problem = await target.check()
    assert (reply.status, reply.status_code) == (ReplyStatus.UNREACHABLE, None)
    assert "refused" in reply.error.lower()
    assert problem is not None
    assert "refused" in problem.lower()


async def test_a_name_that_does_not_resolve_is_unreachable(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DNS failure: the function never ran."""

    async def no_such_name(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_name)
    async with target_of(kind, "http://nowhere.invalid:80") as target:
        reply = await target.invoke(invocation())
        problem = await target.check()
    assert reply.status is ReplyStatus.UNREACHABLE
    assert problem is not None


async def test_no_answer_is_a_timeout(kind: str) -> None:
    """The request was sent and no answer came: it may have run, so it counts, and there is no status."""

    async def silence(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    reply = await invoke(kind, silence, wait=0.1)
    assert (reply.status, reply.status_code) == (ReplyStatus.TIMEOUT, None)
    assert "0.1 s" in reply.error


async def test_an_answer_that_trickles_past_the_deadline_is_a_timeout(kind: str) -> None:
    """The deadline is for the whole answer; bytes that keep coming do not move it."""

    async def trickle(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"1\r\nx\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    started = time.monotonic()
    reply = await invoke(kind, trickle, wait=0.1)
    assert reply.status is ReplyStatus.TIMEOUT
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
)
async def test_a_connection_that_breaks_after_the_request_is_a_failure(kind: str, sent: bytes, reset: bool) -> None:
    """The function may have run: it counts. No answer was had, so there is no status."""
    reply = await invoke(kind, closing(sent, reset))
    assert (reply.status, reply.status_code) == (ReplyStatus.FUNCTION_ERROR, None)
    assert reply.error


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\nnot gzip!",
    ],
)
async def test_an_answer_that_is_not_http_is_a_failure(kind: str, sent: bytes) -> None:
    """What cannot be understood was sent by something that got the request: it counts."""
    reply = await invoke(kind, closing(sent, reset=False))
    assert reply.status is ReplyStatus.FUNCTION_ERROR
    assert reply.error


async def test_connections_are_kept_alive(kind: str) -> None:
    """Calls one after the other use one connection."""
    async with serving(answering()) as server, target_of(kind, server.url) as target:
        for _ in range(3):
            assert (await target.invoke(invocation())).status is ReplyStatus.OK
    assert server.connections == 1


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"])
async def test_cancelling_a_call_closes_its_connection(kind: str, sent: bytes) -> None:
    """Nothing stays open behind a cancelled invocation, before its answer or inside it, and the next one works."""
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def half(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        arrived.set()
        await request.hung_up()
        gone.set()

    async with serving(half) as server, target_of(kind, server.url) as target, asyncio.timeout(5):
        async with asyncio.TaskGroup() as group:
            call = group.create_task(target.invoke(invocation()))
            await arrived.wait()
            await asyncio.sleep(0.01)  # time for what was sent to arrive
            call.cancel()
        assert call.cancelled()
        await gone.wait()
        server.script = answering()
        assert (await target.invoke(invocation())).status is ReplyStatus.OK
        assert server.connections == 2


async def test_an_answer_before_the_request_was_read_is_taken(kind: str) -> None:
    """A server that refuses a large event by its headers and reads no further is judged at once."""
    payload = b"x" * MAX_PAYLOAD_BYTES
    async with (
        serving(answering(413, b"{}"), early=True) as server,
        target_of(kind, server.url) as target,
        asyncio.timeout(5),
    ):
        for _ in range(2):
            reply = await target.invoke(invocation(payload))
            assert reply.status is ReplyStatus.TOO_LARGE
        assert server.connections == 2


async def test_a_close_that_is_not_read_yet_costs_no_attempt(kind: str) -> None:
    """A server that restarts closes its idle connections: the next call goes out on a new one, whatever kept the loop busy."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull"
    close, closed = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    data = b""
                    while not data.endswith(EVENT):
                        data += connection.recv(65536)
                    connection.sendall(answer)
                    close.wait(5)
                closed.set()

        thread = threading.Thread(target=serve)
        thread.start()
        async with target_of(kind, f"http://127.0.0.1:{listener.getsockname()[1]}") as target:
            first = await target.invoke(invocation())
            close.set()
            assert closed.wait(5)  # blocks the loop, as parsing a large answer does
            second = await target.invoke(invocation())
        thread.join(5)
    assert (first.status, second.status) == (ReplyStatus.OK, ReplyStatus.OK)


@pytest.mark.parametrize(
    ("trace", "sent"),
    [
        ("Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=1", True),
        ("", False),
        ("Root=1\r\nX-Evil: 1", False),
        ("Root=é", False),
    ],
)
async def test_a_trace_is_passed_on_if_it_is_one_line_of_text(kind: str, trace: str, sent: bool) -> None:
    """X-Amzn-Trace-Id comes from a record; what could break the header is left out, the call is made all the same."""
    async with serving(answering()) as server, target_of(kind, server.url) as target:
        reply = await target.invoke(invocation(trace=trace))
    assert reply.status is ReplyStatus.OK
    assert server.requests[0].headers.get("x-amzn-trace-id") == (trace if sent else None)
    assert "x-evil" not in server.requests[0].headers


async def test_calls_run_side_by_side(kind: str) -> None:
    """Without a limit of its own a target holds no call back."""
    everyone = asyncio.Barrier(20)

    async def together(request: Request, writer: asyncio.StreamWriter) -> None:
        await everyone.wait()
        await answering()(request, writer)

    async with serving(together) as server, target_of(kind, server.url) as target:
        assert target.capacity is None
        replies = await asyncio.gather(*(target.invoke(invocation()) for _ in range(20)))
    assert {reply.status for reply in replies} == {ReplyStatus.OK}


async def test_error_texts_are_one_line(kind: str) -> None:
    """Status, log and failure records show them as they are."""
    reply = await invoke(kind, answering(500, json.dumps({"message": "line\nline"}).encode()))
    assert "\n" not in reply.error
    assert "500" in reply.error
