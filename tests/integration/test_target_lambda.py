"""The Lambda target against MiniStack, which really runs the function."""

import asyncio
import io
import json
import zipfile
from collections.abc import Awaitable, Callable

import pytest

from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.core.model import Invocation, Reply, ReplyStatus, Trace
from poller.ports import Target
from poller.settings import LambdaFunction
from poller.targets import open_target
from tests.integration.conftest import REGION

pytestmark = pytest.mark.integration

CODE = """
import os, time

def handler(event, context):
    record = event["Records"][0]
    if record == "fail":
        raise ValueError("on purpose")
    if record == "crash":
        os._exit(3)
    if record == "sleep":
        time.sleep(30)
    return {"batchItemFailures": [], "echo": event}
"""

Connect = Callable[[str], Awaitable[AwsClients]]


async def make_function(clients: AwsClients, name: str) -> str:
    """A Python function with a timeout of 1 s; answers its ARN."""
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("main.py", CODE)
    client = await clients.client("lambda", REGION)
    made = await client.create_function(
        FunctionName=name,
        Runtime="python3.11",
        Role="arn:aws:iam::000000000000:role/any",
        Handler="main.handler",
        Timeout=1,
        Code={"ZipFile": package.getvalue()},
    )
    return str(made["FunctionArn"])


def target_of(clients: AwsClients, arn: str) -> Target:
    clock = SystemClock(asyncio.get_running_loop())
    return open_target(LambdaFunction("orders", arn, timeout=30.0), REGION, clients, clock)


async def invoke(target: Target, record: str) -> Reply:
    payload = json.dumps({"Records": [record]}).encode()
    return await target.invoke(
        Invocation("mapping", "request", 1, "key", payload, Trace("Root=1-5759e988-bd862e3fe1be46a9"))
    )


async def test_a_function_runs_and_its_answer_comes_back(ministack: str, connect: Connect) -> None:
    """By name, by ARN and by ARN with a qualifier; `check` runs nothing and finds it."""
    clients = await connect(ministack)
    arn = await make_function(clients, "orders")
    for spelling in ("orders", arn, f"{arn}:$LATEST"):
        target = target_of(clients, spelling)
        assert await target.check() is None
        reply = await invoke(target, "ok")
        assert (reply.status, reply.status_code, reply.executed_version) == (ReplyStatus.OK, 200, "$LATEST")
        assert json.loads(reply.body) == {"batchItemFailures": [], "echo": {"Records": ["ok"]}}


@pytest.mark.parametrize("how", ["fail", "crash", "sleep"])
async def test_a_function_that_fails_is_a_function_error(ministack: str, connect: Connect, how: str) -> None:
    """An exception, an exit of the process and Lambda's own timeout are all a 200 with X-Amz-Function-Error."""
    clients = await connect(ministack)
    target = target_of(clients, await make_function(clients, "orders"))
    reply = await invoke(target, how)
    assert (reply.status, reply.status_code) == (ReplyStatus.FUNCTION_ERROR, 200)
    assert "on purpose" not in reply.error
    assert (await invoke(target, "ok")).status is ReplyStatus.OK


async def test_a_function_that_is_not_there_is_unreachable(ministack: str, connect: Connect) -> None:
    """It never ran, and the text says what AWS says."""
    target = target_of(await connect(ministack), "nobody")
    reply = await invoke(target, "ok")
    assert (reply.status, reply.status_code) == (ReplyStatus.UNREACHABLE, 404)
    assert "ResourceNotFoundException" in reply.error
    assert "ResourceNotFoundException" in (await target.check() or "")


async def test_reserved_concurrency_throttles(ministack: str, connect: Connect) -> None:
    """A function that may not run is a throttle, which counts nothing."""
    clients = await connect(ministack)
    target = target_of(clients, await make_function(clients, "orders"))
    client = await clients.client("lambda", REGION)
    await client.put_function_concurrency(FunctionName="orders", ReservedConcurrentExecutions=0)
    reply = await invoke(target, "ok")
    assert (reply.status, reply.status_code) == (ReplyStatus.THROTTLED, 429)
    assert "TooManyRequestsException" in reply.error
