"""Hot AWS calls over a socket: what comes back, what does not, and with which credentials they are signed."""

import asyncio
import datetime as dt
import gzip
import ipaddress
import logging
import ssl
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from poller.aws import lean as lean_module
from poller.aws.lean import AwsError
from poller.aws.session import AwsClients
from poller.errors import AccessDenied, ConfigError, SourceUnavailable
from poller.settings import AwsSettings
from tests.integration import emulators
from tests.integration.conftest import REGION, broken, error, html_error, truncated

pytestmark = pytest.mark.integration

GET = "Kinesis_20131202.GetRecords"


async def test_a_call_is_a_signed_json_post(stub, connect, account) -> None:
    """The service's own JSON version, the target, our name, a signature that AWS would compute; nothing compressed."""
    stub.script["GetRecords"] = [{}]
    clients = await connect(stub.url)
    for service, version in (("kinesis", "1.1"), ("dynamodbstreams", "1.0"), ("sqs", "1.0")):
        lean = await clients.lean(service, REGION)
        assert await lean.call(GET, b'{"a":1}', 5) == b"{}"
        headers = stub.requests[-1].headers
        assert headers["Content-Type"] == f"application/x-amz-json-{version}"
        assert headers["User-Agent"].startswith("esm-poller/")
        assert headers["Accept-Encoding"] == "identity"
        names = {"dynamodbstreams": "dynamodb"}
        assert f"/{REGION}/{names.get(service, service)}/aws4_request" in headers["Authorization"]


async def test_the_server_would_accept_the_signature(stub, connect, account, monkeypatch) -> None:
    """Signed again by botocore from what arrived, path and query included, the signature is the same."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    stub.script[""] = [{}]
    clients = await connect(stub.url)
    lean = await clients.lean("lambda", REGION)
    path = "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aeu-west-1%3A1%3Afunction%3Af/invocations?Qualifier=live"
    answer = await lean.request("POST", path, {"Content-Type": "application/json"}, b'{"x":1}', 5, 5)
    assert answer.status == 200
    got = stub.requests[-1]
    assert got.raw_path == path
    signed = got.headers["Authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
    sent = {name: got.headers[name] for name in signed}
    assert sent["x-amz-security-token"] == "token"
    oracle = AWSRequest(method="POST", url=f"{stub.url}{path}", headers=sent, data=b'{"x":1}')
    oracle.context["timestamp"] = got.headers["X-Amz-Date"]
    signer = SigV4Auth(ReadOnlyCredentials(account, "secret", "token", None), "lambda", REGION)
    signature = signer.signature(signer.string_to_sign(oracle, signer.canonical_request(oracle)), oracle)
    assert got.headers["Authorization"].endswith(f"Signature={signature}")


async def redirect(request: web.Request) -> web.Response:
    return web.Response(status=307, headers={"Location": "/elsewhere"})


@pytest.mark.parametrize(
    ("answer", "code", "status"),
    [
        (error("com.amazonaws#ExpiredIteratorException", "old"), "ExpiredIteratorException", 400),
        (redirect, "HTTP307", 307),
        ((201, {}), "HTTP201", 201),
        (html_error, "HTTP503", 503),
    ],
)
async def test_only_200_is_success(stub, connect, answer, code, status) -> None:
    """Every other answer is an AwsError; a redirect is not followed."""
    stub.script["GetRecords"] = [answer]
    lean = await (await connect(stub.url)).lean("kinesis", REGION)
    with pytest.raises(AwsError) as caught:
        await lean.call(GET, b"{}", 5)
    assert (caught.value.code, caught.value.status) == (code, status)
    assert len(stub.calls) == 1


async def test_a_request_answers_any_status(stub, connect) -> None:
    """Status, headers without regard to case, and body."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=429, text="slow", headers={"X-Amz-Function-Error": "Unhandled"})

    stub.script[""] = [answer]
    lean = await (await connect(stub.url)).lean("lambda", REGION)
    got = await lean.request("POST", "/x", {}, b"", 5, 5)
    assert (got.status, got.headers["x-amz-function-error"], got.body) == (429, "Unhandled", b"slow")


async def test_a_silent_server_times_out(stub, connect) -> None:
    """No answer within the time that the caller gave is SourceUnavailable; `request` leaves it to the caller."""
    release = asyncio.Event()

    async def never(request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    stub.script["GetRecords"] = stub.script[""] = [never]
    lean = await (await connect(stub.url)).lean("kinesis", REGION)
    with pytest.raises(SourceUnavailable, match=r"^GetRecords: timed out$"):
        await lean.call(GET, b"{}", 0.05)
    with pytest.raises(TimeoutError):
        await lean.request("POST", "/", {}, b"", 0.05, 0.05)
    release.set()


async def test_a_refused_connection_is_told_apart(connect) -> None:
    """`call` says SourceUnavailable; `request` passes aiohttp's error on, so that its caller knows nothing was sent."""
    lean = await (await connect(f"http://127.0.0.1:{emulators.free_port()}")).lean("kinesis", REGION)
    with pytest.raises(SourceUnavailable, match=r"refused|Connect"):
        await lean.call(GET, b"{}", 5)
    with pytest.raises(aiohttp.ClientConnectorError):
        await lean.request("POST", "/", {}, b"", 5, 5)


async def test_a_body_that_breaks_off_is_no_answer(stub, connect) -> None:
    """SourceUnavailable, and not sent again: the answer had begun."""
    stub.script["GetRecords"] = [broken]
    lean = await (await connect(stub.url)).lean("kinesis", REGION)
    with pytest.raises(SourceUnavailable):
        await lean.call(GET, b"{}", 5)
    assert len(stub.calls) == 1


async def test_an_idle_connection_that_the_server_closed_costs_no_error(stub, connect) -> None:
    """The call is repeated once when the connection broke before an answer began; twice is SourceUnavailable."""

    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    lean = await (await connect(stub.url)).lean("kinesis", REGION)
    stub.script["GetRecords"] = [hang_up, {"fine": 1}]
    assert await lean.call(GET, b"{}", 5) == b'{"fine": 1}'
    stub.script["GetRecords"] = [hang_up]
    stub.calls.clear()
    with pytest.raises(SourceUnavailable):
        await lean.call(GET, b"{}", 5)
    assert len(stub.calls) == 2


@pytest.mark.parametrize("is_compressed", [False, True])
async def test_an_endless_answer_is_cut_off(stub, connect, monkeypatch, is_compressed) -> None:
    """The bound holds for what is unpacked, so a small compressed body cannot fill the memory."""

    async def endless(request: web.Request) -> web.Response:
        body = b" " * 3_000_000
        if is_compressed:
            return web.Response(body=gzip.compress(body), headers={"Content-Encoding": "gzip"})
        return web.Response(body=body)

    monkeypatch.setattr(lean_module, "MAX_ANSWER_BYTES", 1_000_000)
    stub.script["GetRecords"] = [endless]
    lean = await (await connect(stub.url)).lean("kinesis", REGION)
    with pytest.raises(SourceUnavailable):
        await lean.call(GET, b"{}", 5)


async def test_a_large_request_is_sent_whole(stub, connect) -> None:
    """Six megabytes, the largest event, without a warning."""
    stub.script["GetRecords"] = [{}]
    lean = await (await connect(stub.url)).lean("kinesis", REGION)
    await lean.call(GET, b'{"x":"' + b"y" * 6_000_000 + b'"}', 5)
    assert len(stub.calls[-1][1]["x"]) == 6_000_000


async def test_no_credentials_says_what_to_do(stub, connect, monkeypatch) -> None:
    """AccessDenied names the ways to give them, before anything is sent."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    lean = await (await connect(stub.url)).lean("kinesis", REGION)
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
        await lean.call(GET, b"{}", 5)
    assert stub.calls == []


@pytest.mark.parametrize("kind", ["hot", "cold"])
async def test_expired_credentials_are_loaded_again(stub, connect, monkeypatch, tmp_path, kind) -> None:
    """A credentials file that was rewritten is read again after ExpiredToken, for hot and cold calls alike."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "no-credentials"
    file.write_text("[default]\naws_access_key_id=OLDKEY\naws_secret_access_key=s\naws_session_token=t\n")
    clients = await connect(stub.url)
    stub.script["GetRecords"] = [{}]
    stub.script["ListShards"] = [error("ExpiredTokenException"), {"Shards": []}]
    lean = await clients.lean("kinesis", REGION)
    client = await clients.client("kinesis", REGION)
    await lean.call(GET, b"{}", 5)
    file.write_text("[default]\naws_access_key_id=NEWKEY\naws_secret_access_key=s\naws_session_token=t\n")
    if kind == "hot":
        stub.script["GetRecords"] = [error("ExpiredTokenException"), {}]
        with pytest.raises(AwsError):
            await lean.call(GET, b"{}", 5)
    else:
        with pytest.raises(client.exceptions.ClientError):
            await client.list_shards(StreamName="s")
    stub.script["ListShards"] = [{"Shards": []}]
    stub.script["GetRecords"] = [{}]
    assert await clients.client("kinesis", REGION) is client
    await client.list_shards(StreamName="s")
    await lean.call(GET, b"{}", 5)
    used = [request.headers["Authorization"].split("Credential=")[1].split("/")[0] for request in stub.requests]
    assert used == ["OLDKEY", "OLDKEY", "NEWKEY", "NEWKEY"]


async def test_clients_are_shared_and_follow_their_own_endpoint(account, stub) -> None:
    """One client for each service and region; `endpoint_urls` goes before `endpoint_url`."""
    settings = AwsSettings(endpoint_url="http://127.0.0.1:1", endpoint_urls=(("kinesis", stub.url),))
    stub.script["GetRecords"] = [{}]
    async with AwsClients(settings) as clients:
        first, second = await asyncio.gather(clients.client("kinesis", REGION), clients.client("kinesis", REGION))
        assert first is second
        assert await clients.lean("kinesis", REGION) is await clients.lean("kinesis", REGION)
        assert await clients.client("kinesis", "us-east-1") is not first
        assert await (await clients.lean("kinesis", REGION)).call(GET, b"{}", 5) == b"{}"
        assert (await clients.client("sqs", REGION)).meta.endpoint_url == "http://127.0.0.1:1"


async def test_botocore_never_logs_bodies(account) -> None:
    """At DEBUG it logs answers and signatures: it is kept at INFO whatever our own level is."""
    logger = logging.getLogger("botocore")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        async with AwsClients(AwsSettings()):
            assert logger.getEffectiveLevel() == logging.INFO
    finally:
        logger.setLevel(level)


async def test_a_truncated_200_is_handed_over_as_it_is(stub, connect) -> None:
    """`call` does not parse: its callers do, with a type that a truncated body cannot be."""
    stub.script["GetRecords"] = [truncated]
    lean = await (await connect(stub.url)).lean("kinesis", REGION)
    assert (await lean.call(GET, b"{}", 5)).startswith(b'{"Records"')


@pytest.fixture
def certificate(tmp_path) -> Path:
    """A self-signed certificate for 127.0.0.1 and its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return file


async def test_certificates_are_verified(connect, monkeypatch, certificate) -> None:
    """An unknown authority is refused before anything is sent; AWS_CA_BUNDLE makes it known."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({})

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    url = f"https://127.0.0.1:{runner.addresses[0][1]}"
    try:
        lean = await (await connect(url)).lean("kinesis", REGION)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await lean.request("POST", "/", {}, b"{}", 5, 5)
        with pytest.raises(SourceUnavailable, match="GetRecords"):
            await lean.call(GET, b"{}", 5)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        lean = await (await connect(url)).lean("kinesis", REGION)
        assert await lean.call(GET, b"{}", 5) == b"{}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("AWS_CA_BUNDLE", "/nonexistent.pem", "AWS_CA_BUNDLE"), ("AWS_PROFILE", "nobody", "nobody")],
)
async def test_settings_that_cannot_be_used_are_a_config_error(account, monkeypatch, name, value, text) -> None:
    """A user's mistake in the environment is told in words."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=text):
        async with AwsClients(AwsSettings()):
            pass


async def test_the_proxy_of_the_environment_is_used(stub, connect, monkeypatch) -> None:
    """As botocore reads it: HTTP_PROXY unless NO_PROXY excepts the host."""
    stub.script["GetRecords"] = [{}]
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", stub.url)
    lean = await (await connect("http://kinesis.invalid")).lean("kinesis", REGION)
    assert await lean.call(GET, b"{}", 5) == b"{}"
    assert stub.requests[-1].headers["Host"] == "kinesis.invalid"
