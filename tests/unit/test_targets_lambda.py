"""Lambda functions: the Invoke request, its status table, and what error texts may say."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote

import pytest

from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.core.model import Invocation, Reply, ReplyStatus
from poller.ports import Target
from poller.settings import AwsSettings, LambdaFunction
from poller.targets import open_target
from tests.fakes.scripted_http import Request, Script, answering, serving

CALL = Invocation("3f0e-mapping", "5b1c-request", 3, "k" * 32, b'{"Records":[]}')
ARN = "arn:aws:lambda:eu-west-1:123456789012:function:orders:live"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@asynccontextmanager
async def target_at(url: str, arn: str = ARN) -> AsyncIterator[Target]:
    clock = SystemClock(asyncio.get_running_loop())
    async with AwsClients(AwsSettings(endpoint_url=url)) as clients:
        target = open_target(LambdaFunction("orders", arn, max_concurrency=7), "us-east-1", clients, clock)
        yield target
        await target.close()


async def exchange(script: Script, arn: str = ARN) -> tuple[Reply, Request]:
    async with serving(script) as server, target_at(server.url, arn) as target:
        reply = await target.invoke(CALL)
    return reply, server.requests[0]


@pytest.mark.parametrize(
    ("arn", "region"),
    [
        ("orders", "us-east-1"),
        ("orders:live", "us-east-1"),
        ("123456789012:function:orders", "us-east-1"),
        (ARN, "eu-west-1"),
        ("arn:aws-cn:lambda:cn-north-1:123456789012:function:orders", "cn-north-1"),
    ],
)
async def test_the_request_is_a_synchronous_invoke(arn: str, region: str) -> None:
    """Name or ARN with its qualifier stands percent-encoded in the path; an ARN's region outranks the default."""
    _, request = await exchange(answering(), arn)
    assert request.target == f"/2015-03-31/functions/{quote(arn, safe='')}/invocations"
    assert request.headers["x-amz-invocation-type"] == "RequestResponse"
    assert f"/{region}/lambda/aws4_request" in request.headers["authorization"]


async def test_capacity_and_timeout_are_the_functions() -> None:
    """It waits 5 s longer than Lambda's limit of 900 s, after which no answer can come."""
    async with target_at("http://127.0.0.1:9") as target:
        assert (target.capacity, target.timeout) == (7, 905.0)


@pytest.mark.parametrize(("header", "version"), [("42", "42"), ("", "$LATEST")])
async def test_the_executed_version_is_reported(header: str, version: str) -> None:
    """responseContext.executedVersion, of successes and function errors alike."""
    good, _ = await exchange(answering(200, b"{}", f"X-Amz-Executed-Version: {header}"))
    bad, _ = await exchange(
        answering(200, b"{}", f"X-Amz-Executed-Version: {header}", "X-Amz-Function-Error: Unhandled")
    )
    assert (good.executed_version, bad.executed_version) == (version, version)


@pytest.mark.parametrize(
    ("status", "code", "means"),
    [
        (429, "TooManyRequestsException", ReplyStatus.THROTTLED),
        (413, "RequestTooLargeException", ReplyStatus.TOO_LARGE),
        (400, "InvalidRequestContentException", ReplyStatus.UNREACHABLE),
        (400, "RecursiveInvocationException", ReplyStatus.UNREACHABLE),
        (403, "AccessDeniedException", ReplyStatus.UNREACHABLE),
        (404, "ResourceNotFoundException", ReplyStatus.UNREACHABLE),
        (409, "ResourceConflictException", ReplyStatus.UNREACHABLE),
        (415, "UnsupportedMediaTypeException", ReplyStatus.UNREACHABLE),
        (502, "ENILimitReachedException", ReplyStatus.UNREACHABLE),
        (500, "ServiceException", ReplyStatus.UNREACHABLE),
        (503, "ServiceUnavailable", ReplyStatus.UNREACHABLE),
        (307, "", ReplyStatus.UNREACHABLE),
    ],
)
async def test_every_refusal_means_what_the_table_says(status: int, code: str, means: ReplyStatus) -> None:
    """Only 413 counts: everything else never ran. The text names AWS's code and the function."""
    reply, _ = await exchange(answering(status, b'{"Type":"User"}', f"x-amzn-ErrorType: {code}", "Location: /x"))
    assert (reply.status, reply.status_code) == (means, status)
    assert code in reply.error
    assert ARN in reply.error


async def test_messages_that_may_quote_the_request_are_left_out() -> None:
    """AWS says who may not do what, which helps; but it quotes the payload or the signed request in other errors."""
    denied, _ = await exchange(
        answering(
            403,
            json.dumps({"Message": "User: U is not authorized"}).encode(),
            "x-amzn-ErrorType: AccessDeniedException",
        )
    )
    others = [
        (await exchange(answering(400, b'{"message":"could not parse S3CRET"}', f"x-amzn-ErrorType: {code}")))[0]
        for code in ("InvalidRequestContentException", "InvalidSignatureException")
    ]
    assert "User: U is not authorized" in denied.error
    assert not [reply for reply in others if "S3CRET" in reply.error]


async def test_missing_credentials_are_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing could be sent, so nothing counts."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with serving(answering()) as server, target_at(server.url) as target:
        reply = await target.invoke(CALL)
        problem = await target.check()
    assert (reply.status, len(server.requests)) == (ReplyStatus.UNREACHABLE, 0)
    assert "credentials" in reply.error
    assert "credentials" in (problem or "")


async def test_check_is_a_dry_run() -> None:
    """It runs nothing; 204 is well, anything else is the reason."""
    async with serving(answering(204, b"")) as server, target_at(server.url) as target:
        assert await target.check() is None
        assert server.requests[0].headers["x-amz-invocation-type"] == "DryRun"
        server.script = answering(
            404, b'{"Message":"Function not found: x"}', "x-amzn-ErrorType: ResourceNotFoundException"
        )
        problem = await target.check()
        assert problem is not None
        assert "ResourceNotFoundException (404): Function not found: x" in problem


async def test_check_ends() -> None:
    """A server that breaks off is a reason too."""

    async def broken(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with serving(broken) as server, target_at(server.url) as target:
        assert await target.check()


async def test_credentials_that_never_come_are_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metadata service that hangs holds a call for the connect time at most, and nothing counts."""
    clock = SystemClock(asyncio.get_running_loop())
    async with serving(answering()) as server, AwsClients(AwsSettings(endpoint_url=server.url)) as clients:
        target = open_target(LambdaFunction("orders", ARN, timeout=-4.8), "us-east-1", clients, clock)
        assert (await target.invoke(CALL)).status is ReplyStatus.OK
        monkeypatch.setattr(clients.credentials, "frozen", asyncio.Event().wait)
        reply = await target.invoke(CALL)
    assert (reply.status, len(server.requests)) == (ReplyStatus.UNREACHABLE, 1)
    assert "no AWS credentials" in reply.error
