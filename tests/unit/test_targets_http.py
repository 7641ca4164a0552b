"""Functions behind a URL: headers, authentication, TLS, the answer table, and a configuration that cannot work."""

import asyncio
import base64
import datetime as dt
import gzip
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import SigV4Auth as Oracle
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from poller import __version__
from poller.clock import SystemClock
from poller.core.model import MAX_PAYLOAD_BYTES, Invocation, Reply, ReplyStatus, Trace
from poller.errors import AccessDenied, ConfigError
from poller.settings import BasicAuth, BearerAuth, HttpFunction, SigV4Auth, TlsSettings, is_reserved_header
from poller.targets.http import HttpTarget
from tests.fakes.scripted_http import Request, Script, answering, serving

CALL = Invocation("3f0e-mapping", "5b1c-request", 3, "k" * 32, b'{"Records":[]}')
KEYS = ReadOnlyCredentials("AKIDEXAMPLE", "wJalrXUtnFEMI", "SESSIONTOKEN", None)


class Keys:
    """Credentials that are there, missing, or never come."""

    def __init__(self, error: Exception | None = None, hang: bool = False) -> None:
        self.error = error
        self.hang = hang
        self.rejected = 0

    async def frozen(self) -> ReadOnlyCredentials:
        if self.hang:
            await asyncio.Event().wait()
        if self.error:
            raise self.error
        return KEYS

    def reject(self) -> None:
        self.rejected += 1


@asynccontextmanager
async def target_at(url: str, keys: Keys | None = None, **settings: Any) -> AsyncIterator[HttpTarget]:
    clock = SystemClock(asyncio.get_running_loop())
    function = HttpFunction("orders", url, **{"timeout": 5.0, **settings})
    target = HttpTarget(function, "eu-west-1", keys or Keys(), clock)
    try:
        yield target
    finally:
        await target.close()


async def exchange(script: Script, path: str = "/orders", **settings: Any) -> tuple[Reply, Request]:
    async with serving(script) as server, target_at(server.url + path, **settings) as target:
        reply = await target.invoke(CALL)
    return reply, server.requests[0]


async def sent(path: str = "/orders", **settings: Any) -> Request:
    reply, request = await exchange(answering(), path, **settings)
    assert reply.status is ReplyStatus.OK
    return request


# Requests


async def test_the_headers_are_those_of_the_interface() -> None:
    """Exactly the table of interface.md, and what HTTP itself needs."""
    before = SystemClock(asyncio.get_running_loop()).now()
    headers = (await sent(timeout=30.0)).headers
    deadline = int(headers.pop("x-poller-deadline-ms")) / 1000
    assert before + 29.9 < deadline < before + 35
    assert headers.pop("host").startswith("127.0.0.1:")
    assert headers == {
        "content-type": "application/json",
        "user-agent": f"esm-poller/{__version__}",
        "accept": "*/*",
        "accept-encoding": "identity",
        "content-length": str(len(CALL.payload)),
        "x-poller-mapping": CALL.mapping,
        "x-poller-request-id": CALL.request_id,
        "x-poller-attempt": "3",
        "idempotency-key": CALL.key,
    }


async def test_configured_headers_are_added_and_outrank_the_defaults() -> None:
    """A header that the user set is sent once, with the user's value."""
    headers = (await sent(headers=(("X-Api-Key", "s3cret"), ("accept", "application/json")))).headers
    assert (headers["x-api-key"], headers["accept"]) == ("s3cret", "application/json")


async def test_what_the_target_sets_itself_is_reserved() -> None:
    """Every header of a signed request with a trace; only Accept, Host and Authorization may be configured."""
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    call = CALL._replace(trace=Trace("Root=1-5759e988-bd862e3fe1be46a994272793", parent, "a=1"))
    async with serving(answering()) as server:
        async with target_at(f"http://127.0.0.1:{server.port}/", auth=SigV4Auth()) as target:
            await target.invoke(call)
        names = set(server.requests[0].headers)
    assert {"x-amzn-trace-id", "traceparent", "tracestate", "x-amz-date", "x-amz-security-token"} < names
    assert {name for name in names if not is_reserved_header(name)} == {"accept", "host", "authorization"}


async def test_a_trace_context_is_passed_on() -> None:
    """traceparent as it is, tracestate only where there is one."""
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with serving(answering()) as server, target_at(f"http://127.0.0.1:{server.port}/") as target:
        for trace in (Trace(parent=parent, state="a=1,b=2"), Trace(parent=parent), Trace()):
            await target.invoke(CALL._replace(trace=trace))
    seen = [[request.headers.get(name) for name in ("traceparent", "tracestate")] for request in server.requests]
    assert seen == [[parent, "a=1,b=2"], [parent, None], [None, None]]


@pytest.mark.parametrize(
    "path", ["/", "/a%2Fb/%41?q=a%20b+c&empty=", "/2015-03-31/functions/function/invocations", "/a;b=c/~x/(1)"]
)
async def test_the_url_is_sent_as_written(path: str) -> None:
    """No escape is decoded, added or reordered in a URL that needs none."""
    assert (await sent(path)).target == path


async def test_a_url_that_needs_quoting_is_quoted() -> None:
    """Blanks and other letters are percent-encoded; the fragment stays here."""
    assert (await sent("/a b/é#part")).target == "/a%20b/%C3%A9"


@pytest.mark.parametrize(
    ("auth", "value"),
    [
        (BearerAuth("t0k"), "Bearer t0k"),
        (BasicAuth("u", "pä:s"), "Basic " + base64.b64encode("u:pä:s".encode()).decode()),
        (None, "mine"),
    ],
)
async def test_auth_outranks_a_header_which_outranks_the_url(auth: Any, value: str) -> None:
    """One Authorization header, from the most explicit place."""
    async with serving(answering()) as server:
        url = f"http://user:pass@127.0.0.1:{server.port}/"
        async with target_at(url, auth=auth, headers=(("authorization", "mine"),)) as target:
            await target.invoke(CALL)
        async with target_at(url) as target:
            await target.invoke(CALL)
    first, second = (request.headers["authorization"] for request in server.requests)
    assert first == value
    assert second == "Basic " + base64.b64encode(b"user:pass").decode()


async def test_sigv4_signs_what_is_sent() -> None:
    """The signature is botocore's over method, URL, query, body and every header that is there."""
    request = await sent("/run?b=2&a=1", auth=SigV4Auth(), headers=(("X-Api-Key", "k"),))
    got = request.headers.pop("authorization")
    assert "/eu-west-1/lambda/aws4_request" in got
    assert request.headers["x-amz-security-token"] == "SESSIONTOKEN"
    signed = got.partition("SignedHeaders=")[2].partition(",")[0].split(";")
    assert {"host", "x-amz-date", "x-amz-security-token", "x-api-key", "idempotency-key"} <= set(signed)
    again = {
        name: request.headers[name] for name in signed if name not in ("x-amz-date", "host", "x-amz-security-token")
    }
    url = f"http://{request.headers['host']}{request.target}"
    when = dt.datetime.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    check = AWSRequest("POST", url, again, request.body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.auth.get_current_datetime", lambda *args, **kwargs: when.replace(tzinfo=None))
        Oracle(KEYS, "lambda", "eu-west-1").add_auth(check)
    assert check.headers["Authorization"] == got


async def test_sigv4_without_credentials_is_unreachable() -> None:
    """Nothing could be sent, so nothing counts."""
    async with serving(answering()) as server:
        async with target_at(server.url, Keys(AccessDenied("no AWS credentials found")), auth=SigV4Auth()) as target:
            missing = await target.invoke(CALL)
        async with target_at(server.url, Keys(hang=True), auth=SigV4Auth(), timeout=0.1) as target:
            slow = await target.invoke(CALL)
    assert (missing.status, slow.status) == (ReplyStatus.UNREACHABLE, ReplyStatus.UNREACHABLE)
    assert "no AWS credentials found" in missing.error
    assert not server.requests


async def test_sigv4_credentials_called_expired_are_loaded_anew() -> None:
    """A 403 that says so is a failure all the same, but the next call asks for new keys."""
    keys = Keys()
    script = answering(403, b'{"message":"expired"}', "x-amzn-ErrorType: ExpiredTokenException")
    async with (
        serving(script) as server,
        target_at(server.url, keys, auth=SigV4Auth("execute-api", "us-east-1")) as target,
    ):
        reply = await target.invoke(CALL)
    assert (reply.status, keys.rejected) == (ReplyStatus.FUNCTION_ERROR, 1)
    assert "/us-east-1/execute-api/" in server.requests[0].headers["authorization"]


# Answers


@pytest.mark.parametrize(
    ("status", "means"),
    [
        *((status, ReplyStatus.OK) for status in (200, 201, 202, 207, 299)),
        *((status, ReplyStatus.FUNCTION_ERROR) for status in (300, 301, 302, 304, 307, 308)),
        *((status, ReplyStatus.FUNCTION_ERROR) for status in (400, 401, 403, 404, 408, 409, 422)),
        *((status, ReplyStatus.FUNCTION_ERROR) for status in (500, 501, 502, 504, 599)),
        (413, ReplyStatus.TOO_LARGE),
        (429, ReplyStatus.THROTTLED),
        (503, ReplyStatus.THROTTLED),
    ],
)
async def test_every_status_means_what_the_table_says(status: int, means: ReplyStatus) -> None:
    """The answer table of interface.md; the status is reported, redirects are not followed."""
    script = answering(status, b"", "Location: /elsewhere", "Retry-After: 2")
    async with serving(script) as server, target_at(f"{server.url}/orders") as target:
        reply = await target.invoke(CALL)
    assert (reply.status, reply.status_code, len(server.requests)) == (means, status, 1)
    assert reply.retry_after == (2.0 if means is ReplyStatus.THROTTLED else None)
    assert (str(status) in reply.error) is (means is not ReplyStatus.OK)


async def test_no_content_is_success() -> None:
    """204 has no body."""

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    reply, _ = await exchange(script)
    assert reply == Reply(ReplyStatus.OK, status_code=204)


async def test_a_throttle_is_known_before_its_body() -> None:
    """A 503 whose body never ends is a throttle, not a timeout."""

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nbusy")
        await request.hung_up()

    reply, _ = await exchange(script)
    assert reply.status is ReplyStatus.THROTTLED


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("extra", "means"), [(0, ReplyStatus.OK), (1, ReplyStatus.FUNCTION_ERROR)])
async def test_an_answer_may_have_six_mebibytes(chunked: bool, extra: int, means: ReplyStatus) -> None:
    """One byte more is a failure with its status; reading stops there, and the next call works."""
    body = b"x" * (MAX_PAYLOAD_BYTES + extra)

    async def script(request: Request, writer: asyncio.StreamWriter) -> None:
        if chunked:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body))
            writer.write(body)
            writer.write(b"\r\n0\r\n\r\n")
        else:
            await answering(200, body)(request, writer)

    async with serving(script) as server, target_at(server.url) as target:
        reply = await target.invoke(CALL)
        assert (reply.status, reply.status_code, reply.body) == (means, 200, b"" if extra else body)
        server.script = answering()
        assert (await target.invoke(CALL)).status is ReplyStatus.OK
        assert server.connections <= 1 + extra


async def test_a_compressed_answer_counts_decompressed() -> None:
    """It is understood although we did not ask for it, and a bomb is stopped at the limit."""
    small, _ = await exchange(answering(200, gzip.compress(b'{"a":1}'), "Content-Encoding: gzip"))
    bomb, _ = await exchange(answering(200, gzip.compress(b"\0" * 50_000_000), "Content-Encoding: gzip"))
    assert (small.status, small.body) == (ReplyStatus.OK, b'{"a":1}')
    assert (bomb.status, bomb.status_code, bomb.body) == (ReplyStatus.FUNCTION_ERROR, 200, b"")


@pytest.mark.parametrize(
    ("body", "is_error"),
    [
        (b'{"errorType":"ValueError","errorMessage":"of order s3cret","stackTrace":[]}', True),
        (b'{ "errorMessage" : null, "errorType" : "X" }', True),
        (b"Task timed out after 3.00 seconds", True),
        (b"2026-01-01T00:00:00Z 5b1c Task timed out after 3.00 seconds\n\n", True),
        (b"", True),
        (b"null", False),
        (b'"Task timed out after 3.00 seconds"', False),
        (b'{"errorType":"ValueError"}', False),
        (b'[{"errorType":"x","errorMessage":"y"}]', False),
        (b'{"result":{"errorType":"x","errorMessage":"y"}}', False),
        (b'{"errorType":' + b"[" * 200_000, False),
        (b'{"batchItemFailures":[]}', False),
    ],
)
async def test_the_runtime_interface_emulator_hides_errors_in_200(body: bytes, is_error: bool) -> None:
    """Protocol rie: an error object, the timeout text and an empty body are function errors; http takes them as answers."""
    rie, _ = await exchange(answering(200, body), protocol="rie")
    http, _ = await exchange(answering(200, body))
    assert rie.status is (ReplyStatus.FUNCTION_ERROR if is_error else ReplyStatus.OK)
    assert (rie.status_code, rie.body, http.status) == (200, body, ReplyStatus.OK)
    assert "s3cret" not in rie.error


async def test_the_emulator_takes_one_call_at_a_time() -> None:
    """Its capacity is 1 whatever is configured; otherwise it is max_concurrency."""
    async with target_at("http://127.0.0.1:9", protocol="rie", max_concurrency=5) as target:
        assert (target.capacity, target.timeout) == (1, 5.0)
    async with target_at("http://127.0.0.1:9", max_concurrency=5) as target:
        assert target.capacity == 5


async def test_error_texts_name_the_place_and_no_secret() -> None:
    """Host and port; no userinfo, path (webhooks have their secret there), query, header value, token or body."""
    secrets = ("u5er", "p4th", "p4ss", "qu3ry", "h3ader", "t0ken", "b0dy", "l0cation")
    settings: dict[str, Any] = {"auth": BearerAuth("t0ken"), "headers": (("X-Key", "h3ader"),)}
    replies = []
    for status in (302, 404, 429, 413, 500):
        script = answering(status, b"b0dy", "Location: http://l0cation/")
        async with serving(script) as server:
            url = f"http://u5er:p4ss@127.0.0.1:{server.port}/p4th?key=qu3ry"
            async with target_at(url, **settings) as target:
                replies.append(await target.invoke(CALL))
        async with target_at(url, **settings) as target:  # the server is gone now
            replies.append(await target.invoke(CALL))
            problem = await target.check()
        where = f"http://127.0.0.1:{server.port}"
        assert all(where in text for text in (replies[-1].error, replies[-2].error, problem or ""))
    assert not [word for word in secrets for reply in replies if word in reply.error]


# TLS


@dataclass(frozen=True)
class Authority:
    folder: Path
    ca: str

    def context(self, name: str, client_ca: bool = False) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        if client_ca:
            made.verify_mode = ssl.CERT_REQUIRED
            made.load_verify_locations(self.ca)
        return made


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA of our own, and certificates: good (for 127.0.0.1), other (another host), old (expired), client."""
    folder = tmp_path_factory.mktemp("tls")
    now = dt.datetime.now(dt.UTC)
    day = dt.timedelta(days=1)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])

    def write(name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> str:
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        path = folder / f"{name}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)

    def builder(name: x509.Name, key: ec.EllipticCurvePrivateKey, until: dt.datetime) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * day)
            .not_valid_after(until)
        )

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    certificate = (
        builder(ca_name, ca_key, now + day)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    ca = write("ca", ca_key, certificate)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    for name, san, until in (
        ("good", address, now + day),
        ("other", x509.DNSName("other.example"), now + day),
        ("old", address, now - day),
        ("client", x509.DNSName("client"), now + day),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        leaf = builder(subject, key, until).add_extension(x509.SubjectAlternativeName([san]), critical=False)
        write(name, key, leaf.sign(ca_key, hashes.SHA256()))
    return Authority(folder, ca)


async def over_tls(server_tls: ssl.SSLContext, tls: TlsSettings | None) -> tuple[Reply, str | None, int]:
    async with (
        serving(answering(), tls=server_tls) as server,
        target_at(f"https://127.0.0.1:{server.port}/orders", tls=tls) as target,
    ):
        return await target.invoke(CALL), await target.check(), len(server.requests)


async def test_tls_with_an_own_authority(authority: Authority) -> None:
    """A certificate of the configured CA is accepted, and `check` sends no request."""
    reply, problem, requests = await over_tls(authority.context("good"), TlsSettings(ca=authority.ca))
    assert (reply.status, problem, requests) == (ReplyStatus.OK, None, 1)


@pytest.mark.parametrize(
    ("name", "trusted", "words"),
    [("good", False, "unable to get local issuer"), ("other", True, "mismatch"), ("old", True, "expired")],
)
async def test_a_certificate_that_does_not_verify_is_unreachable(
    authority: Authority, name: str, trusted: bool, words: str
) -> None:
    """Unknown issuer, another host's name, expired: nothing is sent, and the reason is named."""
    tls = TlsSettings(ca=authority.ca) if trusted else None
    reply, problem, requests = await over_tls(authority.context(name), tls)
    assert (reply.status, requests) == (ReplyStatus.UNREACHABLE, 0)
    assert words in reply.error
    assert words in (problem or "")


async def test_a_client_certificate_is_shown(authority: Authority) -> None:
    """A server that wants one gets it; without it the handshake fails and nothing counts."""
    folder = authority.folder
    tls = TlsSettings(authority.ca, str(folder / "client.pem"), str(folder / "client.key"))
    reply, _, _ = await over_tls(authority.context("good", client_ca=True), tls)
    assert reply.status is ReplyStatus.OK
    strict = authority.context("good", client_ca=True)
    strict.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 a server refuses after the handshake, as it breaks off
    reply, problem, requests = await over_tls(strict, TlsSettings(ca=authority.ca))
    assert (reply.status, requests) == (ReplyStatus.UNREACHABLE, 0)
    assert problem


async def test_https_to_a_plain_server_is_unreachable() -> None:
    """The handshake fails, nothing is sent."""

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener, target_at(f"https://127.0.0.1:{port}/") as target:
        reply = await target.invoke(CALL)
        problem = await target.check()
    assert reply.status is ReplyStatus.UNREACHABLE
    assert "TLS failed" in reply.error
    assert "TLS failed" in (problem or "")


async def test_a_handshake_that_hangs_is_unreachable() -> None:
    """The connection was accepted but never became one: the connect time limit ends it before the function's own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody speaks
        async with target_at(f"https://127.0.0.1:{silent.getsockname()[1]}/", timeout=1.0) as target:
            reply = await target.invoke(CALL)
            problem = await target.check()
    assert (reply.status, reply.status_code) == (ReplyStatus.UNREACHABLE, None)
    assert "no connection within 0.9 s" in reply.error
    assert "no connection within 0.9 s" in (problem or "")


# Configuration


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "127.0.0.1:8080/orders"}, ["functions.orders.url"]),
        ({"url": "ftp://host/"}, ["functions.orders.url"]),
        ({"url": "http:///orders"}, ["functions.orders.url"]),
        ({"url": "http://host:99999/"}, ["functions.orders.url"]),
        (
            {"headers": (("X Y", "s3cret"), ("Content-Type", "text/x"), ("X-Poller-Try", "1"), ("X-A", "s3cret\n"))},
            ["'X Y'", "headers.Content-Type", "headers.X-Poller-Try", "headers.X-A: its value has a line break"],
        ),
        ({"auth": BearerAuth("s3cret\n")}, ["functions.orders.auth.token"]),
        ({"url": "https://h/", "tls": TlsSettings(ca="/nonexistent/ca")}, ["functions.orders.tls.ca: /nonexistent/ca"]),
        ({"url": "https://h/", "tls": TlsSettings(cert="/nonexistent/c")}, ["functions.orders.tls.cert"]),
    ],
)
async def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    """ConfigError with the key of every mistake, without the secret."""
    function = HttpFunction(**{"name": "orders", "url": "http://127.0.0.1/", **settings})
    with pytest.raises(ConfigError) as refused:
        HttpTarget(function, "eu-west-1", Keys(), SystemClock(asyncio.get_running_loop()))
    assert len(refused.value.mistakes) == len(words)
    assert all(word in mistake for word, mistake in zip(words, refused.value.mistakes, strict=True))
    assert "s3cret" not in str(refused.value)
