"""`Options.AssumeRoleArn`: sources that are read with another role's credentials, over sockets."""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from aiohttp import web

from poller import app
from poller.aws import role as roles
from poller.aws.probe import Probe
from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.config import load
from poller.core.model import SourceKind, SourceSpec
from poller.errors import AccessDenied, ApiError, SourceUnavailable
from poller.settings import AwsSettings
from poller.sources import Sources
from tests.contract.test_sources import mapping_of
from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import Aws, config, stream_of

pytestmark = pytest.mark.integration

OWNER = "222233334444"
ROLE = f"arn:aws:iam::{OWNER}:role/reader"
OTHER = f"arn:aws:iam::{OWNER}:role/other"
STREAM = SourceSpec(SourceKind.KINESIS, f"arn:aws:kinesis:{REGION}:{OWNER}:stream/orders", REGION, OWNER, "orders")
QUEUE = SourceSpec(SourceKind.SQS, f"arn:aws:sqs:{REGION}:{OWNER}:orders", REGION, OWNER, "orders")
CREDENTIALS = """<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult>
<AssumedRoleUser><AssumedRoleId>AROA:x</AssumedRoleId><Arn>arn:aws:sts::{owner}:assumed-role/reader/x</Arn></AssumedRoleUser>
<Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>hidden</SecretAccessKey>
<SessionToken>TOKEN{key}</SessionToken><Expiration>{ends}</Expiration></Credentials>
</AssumeRoleResult></AssumeRoleResponse>"""
REFUSAL = """<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code>
<Message>User: arn:aws:iam::111122223333:user/poller is not authorized to perform: sts:AssumeRole</Message></Error>
</ErrorResponse>"""


class Cloud:
    """STS, and a Kinesis and SQS that note who called: `(operation, access key, session token)`."""

    def __init__(self) -> None:
        self.url = ""
        self.calls: list[tuple[str, str, str]] = []
        self.assumed: list[dict[str, str]] = []
        self.lifetime = 3600.0
        self.is_denied = False
        self.is_away = False

    def keys(self, operation: str) -> list[str]:
        return [key for name, key, _ in self.calls if name == operation]

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.text()
        operation = request.headers.get("X-Amz-Target", "").rpartition(".")[2] or "AssumeRole"
        key = request.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
        self.calls.append((operation, key, request.headers.get("X-Amz-Security-Token", "")))
        if operation == "AssumeRole":
            return self._assume({name: values[0] for name, values in parse_qs(body).items()})
        answer: dict[str, Any] = {
            "ListShards": {"Shards": []},
            "GetQueueUrl": {"QueueUrl": f"{self.url}/{OWNER}/orders"},
            "GetQueueAttributes": {"Attributes": {"VisibilityTimeout": "30"}},
            "GetShardIterator": {"ShardIterator": "i"},
        }.get(operation, {})
        return web.Response(body=json.dumps(answer), content_type="application/x-amz-json-1.1")

    def _assume(self, asked: dict[str, str]) -> web.Response:
        self.assumed.append(asked)
        if self.is_away:
            return web.Response(status=503, text="<html>", content_type="text/html")
        if self.is_denied:
            return web.Response(status=403, text=REFUSAL, content_type="text/xml")
        ends = (datetime.now(UTC) + timedelta(seconds=self.lifetime)).isoformat()
        text = CREDENTIALS.format(owner=OWNER, key=f"ASIA{len(self.assumed)}", ends=ends)
        return web.Response(text=text, content_type="text/xml")


@pytest.fixture
async def cloud() -> AsyncIterator[Cloud]:
    made = Cloud()
    served = web.Application()
    served.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(served, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.fixture
async def clients(cloud: Cloud, account: str) -> AsyncIterator[AwsClients]:
    async with AwsClients(AwsSettings(region=REGION, endpoint_url=cloud.url)) as made:
        yield made


def reading(spec: SourceSpec, role: str | None = ROLE) -> SourceSpec:
    return SourceSpec(spec.kind, spec.arn, spec.region, spec.account, spec.name, role=role)


async def test_only_the_source_is_read_as_the_role(cloud, clients, account) -> None:
    """Cold and hot calls of sources alike; everything else, STS too, has our own credentials."""
    sources = Sources(clients, SystemClock(asyncio.get_running_loop()))
    stream = await sources.open_stream(mapping_of(reading(STREAM)))
    queue = await sources.open_queue(mapping_of(reading(QUEUE)))
    await stream.shards()
    await queue.visibility_timeout()
    await queue.receive(10, 0, 30)
    for operation in ("ListShards", "GetQueueUrl", "GetQueueAttributes", "ReceiveMessage"):
        assert cloud.keys(operation) == ["ASIA1"]
    assert {token for name, _, token in cloud.calls if name != "AssumeRole"} == {"TOKENASIA1"}
    assert cloud.keys("AssumeRole") == [account]
    await (await sources.open_stream(mapping_of(reading(STREAM, None)))).shards()
    await (await clients.client("sqs", REGION)).get_queue_url(QueueName="failed")
    assert cloud.keys("ListShards")[1:] == cloud.keys("GetQueueUrl")[1:] == [account]


async def test_a_role_is_assumed_once_for_all_its_mappings(cloud, clients) -> None:
    """However many read at once; its session says who we are; another role is another session."""
    sources = Sources(clients, SystemClock(asyncio.get_running_loop()))
    queues = [await sources.open_queue(mapping_of(reading(QUEUE))) for _ in range(20)]
    await asyncio.gather(*(queue.receive(10, 0, 30) for queue in queues for _ in range(5)))
    assert len(cloud.keys("ReceiveMessage")) == 100
    [asked] = cloud.assumed
    assert asked["RoleArn"] == ROLE
    name, _, number = asked["RoleSessionName"].rpartition("-")
    assert (name, len(number), int(number, 16) >= 0) == ("esm-poller", 8, True)
    await (await sources.open_queue(mapping_of(reading(QUEUE, OTHER)))).receive(10, 0, 30)
    assert [asked["RoleArn"] for asked in cloud.assumed] == [ROLE, OTHER]
    assert cloud.keys("ReceiveMessage")[-1] == "ASIA2"


async def test_credentials_are_renewed_before_they_end(cloud, clients, monkeypatch) -> None:
    """By hot and cold calls alike; STS is not asked for each of them, however short the credentials live."""
    cloud.lifetime = 500.0  # below the time that botocore keeps for a renewal
    queue = await Sources(clients, SystemClock(asyncio.get_running_loop())).open_queue(mapping_of(reading(QUEUE)))
    for _ in range(10):
        await queue.receive(10, 0, 30)
    assert len(cloud.assumed) == 1
    monkeypatch.setattr(roles, "_INTERVAL", 0.0)
    assumed = clients._roles[ROLE].clients._credentials._role
    assumed._next_at = 0.0
    await queue.receive(10, 0, 30)
    await queue.visibility_timeout()
    assert cloud.keys("ReceiveMessage")[-2:] == ["ASIA1", "ASIA2"]
    assert cloud.keys("GetQueueAttributes")[-1] > "ASIA2"


async def test_a_refusal_is_an_error_of_each_call_and_few_of_sts(cloud, clients, caplog) -> None:
    """A sentence with the role and what is needed, of cold and hot calls; it is not asked again for a while, and the
    library does not repeat itself in the log, nor with a traceback.
    """
    cloud.is_denied = True
    sources = Sources(clients, SystemClock(asyncio.get_running_loop()))
    stream = await sources.open_stream(mapping_of(reading(STREAM)))
    queue = await sources.open_queue(mapping_of(reading(QUEUE)))
    for _ in range(10):
        with pytest.raises(AccessDenied, match=f"AssumeRole of {ROLE}: AccessDenied: User: .*; the daemon's cred"):
            await stream.shards()
        with pytest.raises(AccessDenied, match=r"its trust policy must name them"):
            await queue.receive(10, 0, 30)
    assert len(cloud.assumed) == 1
    assert {name for name, _, _ in cloud.calls} == {"AssumeRole"}
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.exc_info for record in warned if record.name.startswith("aiobotocore")] == [None]


async def test_good_credentials_outlive_a_failed_renewal(cloud, clients) -> None:
    """While they last a trouble of STS disturbs nobody; when they have ended it does."""
    cloud.lifetime = 500.0
    queue = await Sources(clients, SystemClock(asyncio.get_running_loop())).open_queue(mapping_of(reading(QUEUE)))
    await queue.receive(10, 0, 30)
    assumed = clients._roles[ROLE].clients._credentials._role
    cloud.is_denied, assumed._next_at = True, 0.0
    await queue.receive(10, 0, 30)
    assert (len(cloud.assumed), cloud.keys("ReceiveMessage")) == (2, ["ASIA1", "ASIA1"])
    assumed._answer["expiry_time"] = datetime.now(UTC).isoformat()
    with pytest.raises(AccessDenied):
        await queue.receive(10, 0, 30)


async def test_an_sts_that_is_away_is_unavailable(clients, cloud) -> None:
    """A state that passes, with the role's name in it."""
    cloud.is_away = True
    queue = await Sources(clients, SystemClock(asyncio.get_running_loop())).open_queue(mapping_of(reading(QUEUE)))
    with pytest.raises(SourceUnavailable, match=f"AssumeRole of {ROLE}"):
        await queue.receive(10, 0, 30)


async def test_a_roles_clients_are_closed_with_the_last_who_holds_them(cloud, clients) -> None:
    """And opened anew for who comes later; the probe of a mapping that is then refused leaves nothing behind."""
    clients.hold(ROLE, REGION)
    clients.hold(ROLE, REGION)
    first = clients.acting_as(ROLE, REGION)
    await clients.release(ROLE)
    assert clients.acting_as(ROLE, REGION) is first
    await clients.release(ROLE)
    assert clients.acting_as(ROLE, REGION) is not first
    await Probe(clients).source(reading(STREAM, OTHER))
    assert clients._roles.keys() == {ROLE}
    cloud.is_denied = True
    with pytest.raises(ApiError, match="Cannot access stream"):
        await Probe(clients).source(reading(STREAM, OTHER))
    assert clients._roles.keys() == {ROLE}


async def test_a_seek_asks_as_the_role(cloud, clients) -> None:
    """Whether a position is in the shard."""
    await Probe(clients).position(reading(STREAM), "shardId-000000000000", "1")
    assert cloud.keys("GetShardIterator") == ["ASIA1"]


async def test_validate_connect_reads_as_the_role(cloud, account, tmp_path) -> None:
    """What is wrong with it is said with the line of the mapping."""
    cloud.is_denied = True
    path = tmp_path / "poller.yaml"
    path.write_text(
        f"aws: {{region: {REGION}, endpoint_url: '{cloud.url}'}}\nstore: sqlite:///{tmp_path}/poller.db\n"
        f"event_source_mappings:\n  - EventSourceArn: {QUEUE.arn}\n    FunctionName: f\n"
        f"    Options: {{AssumeRoleArn: '{ROLE}'}}\n"
    )
    problems = await app.check_connections(load(str(path)))
    assert any(problem.startswith(f"{path}:4: EventSourceArn: AssumeRole of {ROLE}: ") for problem in problems)


async def test_a_stream_of_another_account_is_delivered(ministack, account, ledger: Ledger, daemons) -> None:
    """The daemon has one account's keys, the stream is another's, and the role's credentials open it; not without."""
    owner = Aws(ministack, str(int(account) + 500_000))
    arn = owner.stream("orders", 1)
    assert owner.account in arn
    owner.put_stream("orders", 0, 20)
    options = {"Options": {"AssumeRoleArn": f"arn:aws:iam::{owner.account}:role/reader"}}
    aws = Aws(ministack, account)
    without: Daemon = daemons(config(aws, ledger, stream_of(arn)))
    assert any("EventSourceArn" in problem for problem in await app.check_connections(load(str(without.path))))
    daemon: Daemon = daemons(config(aws, ledger, stream_of(arn, **options)))
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 20, 20, "delivery")
    assert await daemon.stop() == 0


async def test_a_redrive_reads_the_stream_as_the_role(ministack, account, ledger: Ledger, daemons) -> None:
    """What was discarded is fetched again from the other account."""
    aws, owner = Aws(ministack, account), Aws(ministack, str(int(account) + 500_000))
    arn, failed = owner.stream("orders", 1), aws.queue("failed")
    owner.put_stream("orders", 0, 20)
    options = {"Options": {"AssumeRoleArn": f"arn:aws:iam::{owner.account}:role/reader"}, "MaximumRetryAttempts": 0}
    destination = {"DestinationConfig": {"OnFailure": {"Destination": failed}}}
    daemon: Daemon = daemons(config(aws, ledger, stream_of(arn, **options, **destination)))
    ledger.rule = lambda records: 500
    await daemon.start()
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(aws.depth, "failed"):
            await asyncio.sleep(0.1)
    assert await daemon.stop() == 0
    ledger.rule = None
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "poller", "redrive", failed, "-c", str(daemon.path),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=daemon.environment,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert (process.returncode, ledger.count("kinesis")) == (0, 20), out.decode()
