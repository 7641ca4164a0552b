"""The fault proxy: without a fault it is not there; with one it does what the fault says and nothing else."""

import asyncio
import json
import random
import time
from collections.abc import Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import NamedTuple

import pytest

from tests.fakes.scripted_http import Request, answering, closing, serving
from tests.faults.proxy import Fault, Kind, Proxy

DOCUMENT = json.dumps({"Records": [{"n": number} for number in range(50)]}).encode()
AWS_CODES = {
    "Kinesis_20131202.GetRecords": (400, "ProvisionedThroughputExceededException", 400, "ExpiredTokenException"),
    "DynamoDBStreams_20120810.GetRecords": (400, "ThrottlingException", 400, "ExpiredTokenException"),
    "DynamoDB_20120810.UpdateItem": (400, "ProvisionedThroughputExceededException", 400, "ExpiredTokenException"),
    "AmazonSQS.ReceiveMessage": (400, "RequestThrottled", 403, "ExpiredTokenException"),
}


class Answer(NamedTuple):
    """What a client saw of its answer, and how that ended: `complete`, `closed`, `reset`, `refused` or `nothing`."""

    end: str
    status: int = 0
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""
    raw: bytes = b""


class Client:
    """One keep-alive connection that looks at each byte."""

    def __init__(self, url: str) -> None:
        self.port = int(url.rpartition(":")[2])
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, body: bytes = b"{}", *headers: str, method: str = "POST", wait: float = 1.0) -> Answer:
        lines = (f"{method} /path HTTP/1.1", "Host: h", f"Content-Length: {len(body)}", *headers, "", "")
        return await self.ask_raw("\r\n".join(lines).encode() + body, wait=wait)

    async def ask_raw(self, request: bytes, wait: float = 1.0) -> Answer:
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
            self.writer.write(request)
            await self.writer.drain()
        except ConnectionRefusedError:
            return Answer("refused")
        except OSError:
            return self.ended(Answer("reset"))
        raw = b""
        try:
            async with asyncio.timeout(wait):
                while b"\r\n\r\n" not in raw:
                    if not (part := await self.reader.read(65536)):
                        return self.ended(Answer("closed", raw=raw))
                    raw += part
                head, _, body = raw.partition(b"\r\n\r\n")
                first, *lines = head.decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                answer = Answer("complete", int(first.split(" ")[1]), headers)
                while True:
                    if "transfer-encoding" in headers:
                        is_complete = raw.endswith(b"0\r\n\r\n")
                    else:
                        is_complete = len(body) >= int(headers["content-length"])
                    if is_complete:
                        return answer._replace(body=body, raw=raw)
                    if not (part := await self.reader.read(65536)):
                        return self.ended(answer._replace(end="closed", body=body, raw=raw))
                    raw += part
                    body += part
        except TimeoutError:
            return Answer("nothing", raw=raw)
        except OSError:
            return self.ended(Answer("reset", raw=raw))

    def ended(self, answer: Answer) -> Answer:
        self.close()
        return answer

    def close(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
            self.writer = None


@asynccontextmanager
async def proxied(script=None, what="target", seed=1, **options):
    """An upstream, the proxy before it, and a client; after it nothing is left."""
    async with serving(script or answering(200, DOCUMENT, "Content-Type: application/json"), **options) as server:
        async with Proxy(server.url, seed, what) as proxy:
            client = Client(proxy.url)
            yield server, proxy, client
            client.close()
        assert not [task for task in asyncio.all_tasks() if task.get_coro().__qualname__.startswith("Proxy.")]
        await until(lambda: not server.tasks)


async def until(condition) -> None:
    async with asyncio.timeout(2.0):
        while not condition():
            await asyncio.sleep(0.001)


async def many(proxy: Proxy, times: int, *headers: str, wait: float = 1.0) -> list[Answer]:
    """So many requests, each on a connection of its own."""
    answers = []
    for _ in range(times):
        client = Client(proxy.url)
        answers.append(await client.ask(b"{}", *headers, wait=wait))
        client.close()
    return answers


# --- no fault


async def test_bytes_pass_unchanged() -> None:
    """Without a fault request and answer arrive byte for byte, over one connection, 6 MB and more too."""
    big = random.Random(1).randbytes(7_000_000)
    raws = []

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        raws.append((request.method, request.target, request.headers, request.body))
        head = f"HTTP/1.1 418 Tea  pot\r\nx-ODD:  {len(raws)} \r\ncontent-LENGTH: {len(request.body)}\r\n\r\n"
        writer.write(head.encode() + request.body)

    async with proxied(script) as (server, proxy, client):
        for number, body in enumerate((b"", b"{}", big, b"x"), 1):
            answer = await client.ask(body, "X-Amz-Target: Kinesis_20131202.GetRecords", wait=5.0)
            head = f"HTTP/1.1 418 Tea  pot\r\nx-ODD:  {number} \r\ncontent-LENGTH: {len(body)}\r\n\r\n".encode()
            assert answer.raw == head + body
            headers = {
                "host": "h",
                "content-length": str(len(body)),
                "x-amz-target": "Kinesis_20131202.GetRecords",
            }
            assert raws[-1] == ("POST", "/path", headers, body)
        assert server.connections == 1
        assert not proxy.counts
        assert not proxy.last


async def test_chunked_answers_pass_as_they_come() -> None:
    """A chunk is passed on before the next one is there, and its framing stays as it is."""
    go_on = asyncio.Event()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nfirst\r\n")
        await go_on.wait()
        writer.write(b"6\r\nsecond\r\n0\r\n\r\n")

    async with proxied(script) as (_, _proxy, client):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        begun = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nfirst\r\n"
        assert await reader.readexactly(len(begun)) == begun
        go_on.set()
        assert await reader.readexactly(16) == b"6\r\nsecond\r\n0\r\n\r\n"
        writer.close()


async def test_chunked_requests_pass() -> None:
    """A request without a length is read to its last chunk and passed on as it is."""
    seen = []

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"0\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await reader.read()
        writer.close()

    request = b"PUT /k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    async with (
        await asyncio.start_server(upstream, "127.0.0.1", 0) as listener,
        Proxy(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", 1, "aws") as proxy,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
        writer.write(request)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 204 No Content\r\n\r\n"
        writer.close()
    assert seen == [request]


async def test_expect_is_answered_by_the_proxy() -> None:
    """A client that waits for `100 Continue` gets it, and upstream never hears of it."""
    async with proxied() as (server, _proxy, client):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(b"PUT /k HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        assert [(one.body, one.headers) for one in server.requests] == [(b"{}", {"content-length": "2"})]


async def test_a_client_that_leaves_ends_its_long_poll() -> None:
    """Upstream sees the connection go when the client does; nothing waits for the answer."""
    left = asyncio.Event()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        await request.hung_up()
        left.set()

    async with proxied(script) as (server, _proxy, client):
        assert (await client.ask(wait=0.03)).end == "nothing"
        assert len(server.requests) == 1
        client.close()
        async with asyncio.timeout(2.0):
            await left.wait()


async def test_an_upstream_that_breaks_breaks_the_client() -> None:
    """A connection that upstream closes, and an upstream that is not there, end the client's connection: no invented answer."""
    async with proxied(closing(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1234", reset=False)) as (
        _,
        _proxy,
        client,
    ):
        answer = await client.ask()
        assert (answer.end, answer.body) in {("closed", b"1234"), ("reset", b"")}
    async with Proxy("http://127.0.0.1:1", 1, "aws") as proxy:
        assert (await Client(proxy.url).ask()).end in {"closed", "reset"}


async def test_an_idle_upstream_connection_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while a request gets a new upstream connection: the old one may be closed just then, and the request lost."""
    async with proxied() as (server, _proxy, client):
        await client.ask()
        await client.ask()
        assert server.connections == 1
        monkeypatch.setattr("tests.faults.proxy._IDLE_SECONDS", 0.0)
        await client.ask()
        assert server.connections == 2


# --- faults


async def test_latency_comes_on_top_of_another_fault() -> None:
    """LATENCY delays the request by its seconds; what else hits, hits too; both are counted and timed."""
    async with proxied() as (server, proxy, client):
        proxy.begin(Fault(Kind.LATENCY, seconds=0.05))
        proxy.begin(Fault(Kind.THROTTLE))
        started = time.monotonic()
        assert (await client.ask()).status == 429
        assert time.monotonic() - started >= 0.05
        assert not server.requests
        assert proxy.counts == {Kind.LATENCY: 1, Kind.THROTTLE: 1}
        assert all(0.05 <= ended - began < 1.0 for began, ended, _ in proxy.last)
        assert {kind for _, _, kind in proxy.last} == {Kind.LATENCY, Kind.THROTTLE}


async def test_reset_strikes_before_after_and_in_between() -> None:
    """RESET is a real RST, sometimes before upstream heard of the request, sometimes in the middle of the answer."""
    async with proxied() as (server, proxy, _client):
        proxy.begin(Fault(Kind.RESET))
        answers = await many(proxy, 30)
        assert all(answer.end in {"reset", "closed"} for answer in answers)
        assert any(answer.end == "reset" for answer in answers)
        assert 0 < len(server.requests) < 30
        assert proxy.counts == {Kind.RESET: 30}


async def test_half_open_hangs_until_it_ends() -> None:
    """HALF_OPEN answers nothing, whether upstream did the work or not, and lets go when the fault ends."""
    async with proxied(seed=3) as (server, proxy, _client):
        fault = Fault(Kind.HALF_OPEN)
        proxy.begin(fault)
        clients = [Client(proxy.url) for _ in range(12)]
        asked = [asyncio.ensure_future(client.ask(wait=2.0)) for client in clients]
        await until(lambda: proxy.counts[Kind.HALF_OPEN] == 12)
        done, _ = await asyncio.wait(asked, timeout=0.03)
        assert not done
        assert 0 < len(server.requests) < 12
        proxy.end(fault)
        assert {answer.end for answer in await asyncio.gather(*asked)} == {"reset"}
        assert (await clients[0].ask()).body == DOCUMENT
        for client in clients:
            client.close()


async def test_half_open_lets_go_of_clients_that_leave() -> None:
    """A client that gives up leaves nothing behind, though the fault goes on."""
    async with proxied() as (_, proxy, client):
        proxy.begin(Fault(Kind.HALF_OPEN))
        assert (await client.ask(wait=0.03)).end == "nothing"
        client.close()
        await until(lambda: len(proxy.last) == 1)


async def test_truncated_is_cut_and_done() -> None:
    """TRUNCATED ends the body or its JSON early; upstream did the work each time, and a cut is never an empty success."""
    async with proxied() as (server, proxy, _client):
        proxy.begin(Fault(Kind.TRUNCATED))
        answers = await many(proxy, 30)
        assert len(server.requests) == 30
        assert {answer.end for answer in answers} == {"closed", "complete"}
        for answer in answers:
            assert DOCUMENT.startswith(answer.body)
            assert len(answer.body) < len(DOCUMENT)
            assert answer.end == "closed" or answer.body


@pytest.mark.parametrize("body", [b"", b"1", b"12", b"  {}"])
async def test_truncated_never_makes_another_document(body: bytes) -> None:
    """What cannot be cut without becoming another answer is broken off instead."""
    async with proxied(answering(200, body)) as (_, proxy, _client):
        proxy.begin(Fault(Kind.TRUNCATED))
        for answer in await many(proxy, 10):
            assert answer.end == "closed" or answer.body == b"  {"


async def test_truncated_chunks_have_no_end() -> None:
    """An answer in chunks never gets its last one."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked)

    async with proxied(script) as (_, proxy, _client):
        proxy.begin(Fault(Kind.TRUNCATED))
        for answer in await many(proxy, 12):
            assert answer.end == "closed" or answer.body == b"{"


async def test_garbage_is_noise_and_done() -> None:
    """GARBAGE is no JSON in a good frame, after the work was done, or no HTTP at all."""
    async with proxied() as (server, proxy, _client):
        proxy.begin(Fault(Kind.GARBAGE))
        answers = await many(proxy, 40)
        framed = [answer for answer in answers if answer.end == "complete"]
        broken = [answer for answer in answers if answer.end != "complete"]
        assert framed
        assert broken
        assert len(framed) <= len(server.requests) < 40
        for answer in framed:
            assert answer.status == 200
            with pytest.raises(ValueError):
                json.loads(answer.body)
        assert not any(answer.raw.startswith(b"HTTP") for answer in broken)


async def test_garbage_keeps_a_failure_a_failure() -> None:
    """What upstream refused is not turned into a success by the noise."""
    async with proxied(answering(500, b"no", "X-Amz-Function-Error: Unhandled")) as (_, proxy, _client):
        proxy.begin(Fault(Kind.GARBAGE))
        framed = [answer for answer in await many(proxy, 10) if answer.end == "complete"]
        assert framed
        assert {(one.status, one.headers["x-amz-function-error"]) for one in framed} == {(500, "Unhandled")}


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [(Kind.ERROR_500, 500, "InternalFailure"), (Kind.ERROR_503, 503, "ServiceUnavailable")],
)
async def test_server_errors_of_aws(kind: Kind, status: int, code: str) -> None:
    """AWS's error document, or a proxy's plain text; upstream has done the work some of the time."""
    async with proxied(what="aws") as (server, proxy, _client):
        proxy.begin(Fault(kind))
        answers = await many(proxy, 30, "X-Amz-Target: AmazonSQS.ReceiveMessage")
        assert {answer.status for answer in answers} == {status}
        modelled = [answer for answer in answers if "json" in answer.headers["content-type"]]
        assert 0 < len(modelled) < 30
        assert {json.loads(answer.body)["__type"] for answer in modelled} == {code}
        assert {answer.headers["x-amzn-query-error"] for answer in modelled} == {f"{code};Receiver"}
        assert 0 < len(server.requests) < 30


@pytest.mark.parametrize(("kind", "status"), [(Kind.ERROR_500, 500), (Kind.ERROR_503, 503), (Kind.EXPIRED, 401)])
async def test_errors_of_a_target(kind: Kind, status: int) -> None:
    """A target's 500 and 503 come before or after the work, its 401 before."""
    async with proxied() as (server, proxy, client):
        proxy.begin(Fault(kind))
        assert {(await client.ask()).status for _ in range(20)} == {status}
        assert len(server.requests) == 0 if kind is Kind.EXPIRED else 0 < len(server.requests) < 20


async def test_throttles_of_a_target() -> None:
    """429 without the work, with Retry-After by the dice, over one connection."""
    async with proxied() as (server, proxy, client):
        proxy.begin(Fault(Kind.THROTTLE))
        answers = [await client.ask() for _ in range(20)]
        assert {(answer.status, answer.headers.get("retry-after")) for answer in answers} == {(429, None), (429, "1")}
        assert not server.requests


@pytest.mark.parametrize("target", AWS_CODES)
async def test_refusals_of_aws(target: str) -> None:
    """Throttles and expired credentials have the code and status of the service that was asked; no work is done."""
    throttle_status, throttle, expired_status, expired = AWS_CODES[target]
    async with proxied(what="aws") as (server, proxy, client):
        seen = []
        for kind in (Kind.THROTTLE, Kind.EXPIRED):
            proxy.begin(Fault(kind))
            answer = await client.ask(b"{}", f"X-Amz-Target: {target}")
            seen.append((answer.status, json.loads(answer.body)["__type"]))
            assert ("x-amzn-query-error" in answer.headers) == target.startswith("AmazonSQS")
            proxy.clear()
        assert seen == [(throttle_status, throttle), (expired_status, expired)]
        assert not server.requests


@pytest.mark.parametrize(
    ("request_line", "body", "status", "text"),
    [
        ("POST / HTTP/1.1", b"Action=AssumeRole&Version=1", 403, b"<ErrorResponse><Error><Code>ExpiredToken</Code>"),
        ("PUT /bucket/key HTTP/1.1", b"{}", 400, b"<Error><Code>ExpiredToken</Code>"),
        ("POST /2015-03-31/functions/f/invocations HTTP/1.1", b"{}", 403, b'{"__type": "ExpiredTokenException"'),
    ],
)
async def test_refusals_of_other_protocols(request_line: str, body: bytes, status: int, text: bytes) -> None:
    """STS and SNS, S3 and Lambda are answered in their own documents."""
    async with proxied(what="aws") as (_, proxy, client):
        proxy.begin(Fault(Kind.EXPIRED))
        head = f"{request_line}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        answer = await client.ask_raw(head + body)
        assert answer.status == status
        assert answer.body.startswith(text)


async def test_content_type_is_all_that_changes() -> None:
    """CONTENT_TYPE passes the right body as text/html."""
    async with proxied() as (server, proxy, client):
        proxy.begin(Fault(Kind.CONTENT_TYPE))
        answer = await client.ask()
        assert (answer.status, answer.body, answer.headers["content-type"]) == (200, DOCUMENT, "text/html")
        assert answer.raw.lower().count(b"content-type") == 1
        assert len(server.requests) == 1


async def test_slow_loris_takes_its_time() -> None:
    """SLOW_LORIS sends all of the answer, in so many seconds, a few bytes at a time."""
    async with proxied(answering(200, b"null")) as (_, proxy, client):
        proxy.begin(Fault(Kind.SLOW_LORIS, seconds=0.1))
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        pieces = []
        while not b"".join(pieces).endswith(b"\r\n\r\nnull"):
            pieces.append(await reader.read(65536))
        assert time.monotonic() - started >= 0.1
        assert len(pieces) > 10
        writer.close()


async def test_late_is_done_at_once_and_answered_later() -> None:
    """LATE: upstream has the request long before the client has its answer."""
    async with proxied() as (server, proxy, client):
        proxy.begin(Fault(Kind.LATE, seconds=0.1))
        started = time.monotonic()
        asked = asyncio.ensure_future(client.ask())
        await until(lambda: server.requests)
        assert time.monotonic() - started < 0.1
        assert (await asked).body == DOCUMENT
        assert time.monotonic() - started >= 0.1


async def test_refused_closes_the_port_and_opens_it_again() -> None:
    """REFUSED of all connections: no listener, idle connections closed, what is under way answered; then the same port."""
    go_on = asyncio.Event()

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.body == b"wait":
            await go_on.wait()
        await answering(200, DOCUMENT)(request, writer)

    async with proxied(script) as (server, proxy, client):
        assert (await client.ask()).body == DOCUMENT
        busy = Client(proxy.url)
        asked = asyncio.ensure_future(busy.ask(b"wait"))
        await until(lambda: len(server.requests) == 2)
        fault = Fault(Kind.REFUSED)
        proxy.begin(fault)
        proxy.begin(fault)
        assert (await Client(proxy.url).ask()).end == "refused"
        assert (await client.ask()).end in {"closed", "reset"}
        go_on.set()
        assert (await asked).body == DOCUMENT
        assert (await busy.ask()).end in {"closed", "reset"}
        proxy.end(fault)
        assert (await Client(proxy.url).ask()).end == "refused"
        proxy.end(fault)
        assert (await client.ask()).body == DOCUMENT
        assert proxy.counts == {Kind.REFUSED: 2}
        assert [kind for _, _, kind in proxy.last] == [Kind.REFUSED] * 2


async def test_refused_in_part_drops_some_connections() -> None:
    """REFUSED of a share accepts and closes that share at once, and no request of theirs is carried out."""
    async with proxied() as (server, proxy, _client):
        proxy.begin(Fault(Kind.REFUSED, share=0.5))
        answers = await many(proxy, 30)
        served = [answer for answer in answers if answer.end == "complete"]
        assert 0 < len(served) < 30
        assert len(server.requests) == len(served)
        assert proxy.counts == {Kind.REFUSED: 30 - len(served)}


async def test_shares_are_drawn_by_the_seed_and_the_first_hit_wins() -> None:
    """The same seed hits the same requests; a later fault only gets what the earlier ones left."""
    runs = []
    for _ in range(2):
        async with proxied(seed=7) as (_, proxy, client):
            proxy.begin(Fault(Kind.THROTTLE, share=0.5))
            proxy.begin(Fault(Kind.EXPIRED, share=0.5))
            runs.append([(await client.ask()).status for _ in range(40)])
            statuses = {status: runs[-1].count(status) for status in (200, 401, 429)}
            assert all(statuses.values())
            assert proxy.counts == {Kind.THROTTLE: statuses[429], Kind.EXPIRED: statuses[401]}
    assert runs[0] == runs[1]


async def test_end_of_what_is_not_active_is_nothing() -> None:
    """A fault may be ended twice, and after `clear`; then everything passes again."""
    async with proxied() as (_, proxy, client):
        fault = Fault(Kind.THROTTLE)
        proxy.begin(fault)
        proxy.clear()
        proxy.end(fault)
        assert (await client.ask()).body == DOCUMENT


@pytest.mark.parametrize("kind", Kind)
async def test_leaving_the_proxy_ends_everything(kind: Kind) -> None:
    """Whatever is under way when the proxy is closed, no task and no connection stays."""
    async with proxied() as (_, proxy, _client):
        proxy.begin(Fault(kind, share=0.99, seconds=30.0))
        clients = [Client(proxy.url) for _ in range(5)]
        asked = [asyncio.ensure_future(client.ask(wait=2.0)) for client in clients]
        await until(lambda: proxy.counts[kind])
    for answer in await asyncio.gather(*asked):
        assert answer.end != "nothing"
    for client in clients:
        client.close()


async def test_malformed_requests_are_hung_up_on() -> None:
    """What is no HTTP never reaches upstream."""
    async with proxied() as (server, _proxy, client):
        for raw in (b"\xff\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
            assert (await client.ask_raw(raw)).end in {"closed", "reset"}
        assert not server.requests


def test_only_http_upstreams() -> None:
    """The proxy breaks bytes; it cannot do that inside TLS."""
    with pytest.raises(ValueError, match="no http"):
        Proxy("https://127.0.0.1:1", 1, "aws")
