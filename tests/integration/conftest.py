"""Fixtures of the tests that talk to an emulator."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from poller.aws.session import AwsClients
from poller.settings import AwsSettings
from tests.fakes.aws import FakeAws
from tests.integration import emulators
from tests.integration.daemon import Daemon, Ledger

REGION = "eu-west-1"


@pytest.fixture(scope="session")
def ministack() -> str:
    """URL of MiniStack: Kinesis, DynamoDB with streams, SQS, Lambda, SNS, S3, STS."""
    return emulators.running("ministack")


@pytest.fixture(scope="session")
def roto() -> str:
    """URL of roto: Kinesis with resharding, SQS."""
    return emulators.running("roto")


@pytest.fixture(scope="session")
def moto() -> str:
    """URL of moto: DynamoDB Streams. Its account is always 123456789012."""
    return emulators.running("moto")


@pytest.fixture
async def fake_aws() -> AsyncIterator[FakeAws]:
    """Kinesis and DynamoDB Streams that roll, trim, expire and throttle on demand; in this process, one for the test."""
    async with FakeAws() as aws:
        yield aws


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path) -> str:
    """A fresh account whose credentials are the only ones that botocore can find, and no proxy."""
    number = emulators.new_account()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", number)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return number


@pytest.fixture
async def connect(account: str) -> AsyncIterator[Callable[[str], Awaitable[AwsClients]]]:
    """Opens AwsClients at an endpoint with the test's account; closed after the test."""
    async with AsyncExitStack() as stack:

        async def opened(endpoint: str) -> AwsClients:
            return await stack.enter_async_context(AwsClients(AwsSettings(region=REGION, endpoint_url=endpoint)))

        yield opened


class Stub:
    """A scripted AWS. `script[operation]` answers each call of that operation with its next answer, the last one again.

    An answer is a JSON object (200), a pair of status and object, or a function of the request that makes a response.
    """

    def __init__(self) -> None:
        self.url = ""
        self.script: dict[str, list[Any]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.requests: list[web.Request] = []

    def asked(self, operation: str) -> list[dict[str, Any]]:
        """The bodies of all calls of an operation."""
        return [body for name, body in self.calls if name == operation]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        operation = request.headers.get("X-Amz-Target", "").rpartition(".")[2]
        self.requests.append(request)
        self.calls.append((operation, json.loads(await request.read() or b"{}")))
        answers = self.script[operation]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            return await answer(request)
        status, document = answer if isinstance(answer, tuple) else (200, answer)
        return web.Response(status=status, body=json.dumps(document), content_type="application/x-amz-json-1.1")


@pytest.fixture
async def stub() -> AsyncIterator[Stub]:
    """A scripted AWS on a loopback port."""
    made = Stub()
    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    made.url = f"http://{host}:{port}"
    yield made
    await runner.cleanup()


def error(code: str, message: str = "", status: int = 400) -> tuple[int, dict[str, str]]:
    """An error answer as the JSON services send it."""
    return status, {"__type": code, "message": message}


async def truncated(request: web.Request) -> web.StreamResponse:
    """200 with half a JSON document, and a Content-Length that fits: what botocore takes for an empty answer."""
    return web.Response(body=b'{"Records":[{"SequenceNumber":"49', content_type="application/x-amz-json-1.1")


async def broken(request: web.Request) -> web.StreamResponse:
    """The connection breaks in the middle of the body."""
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/x-amz-json-1.1"})
    await response.prepare(request)
    await response.write(b'{"Records":[')
    assert request.transport is not None
    request.transport.abort()
    return response


async def html_error(request: web.Request) -> web.StreamResponse:
    """What a load balancer in front says."""
    return web.Response(status=503, text="<html><body>Service Unavailable</body></html>", content_type="text/html")


@pytest.fixture
async def ledger() -> AsyncIterator[Ledger]:
    """An HTTP target that keeps a ledger."""
    made = Ledger()
    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.router.add_post("/{path:.*}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/f"
    yield made
    await runner.cleanup()


@pytest.fixture
async def daemons(account: str, tmp_path: Path) -> AsyncIterator[Callable[[dict[str, Any]], Daemon]]:
    """Makes daemons; what still runs is killed after the test."""
    made: list[Daemon] = []

    def make(config: dict[str, Any]) -> Daemon:
        made.append(Daemon(tmp_path, config))
        return made[-1]

    yield make
    for daemon in made:
        await daemon.close()
