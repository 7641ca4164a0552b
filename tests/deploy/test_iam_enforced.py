"""The policies in deploy/iam, obeyed by an emulator: with them the daemon works, without one of them it says which."""

import asyncio
import json
import re
from pathlib import Path

import pytest

import poller
from poller.app import check_connections
from poller.config import load
from tests.integration import emulators
from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import Aws, config, queue_of, stream_of

FOLDER = Path(poller.__file__).parents[1] / "deploy" / "iam"


class User:
    """An IAM user with the policies that it is given."""

    def __init__(self, aws: Aws) -> None:
        self._iam = aws.client("iam")
        self.arn = self._iam.create_user(UserName="poller")["User"]["Arn"]
        key = self._iam.create_access_key(UserName="poller")["AccessKey"]
        self.environment = {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }

    def allow(self, *policies: str, **values: str) -> None:
        for name in policies:
            self._iam.put_user_policy(UserName="poller", PolicyName=name, PolicyDocument=filled(name, **values))

    def allow_batches(self) -> None:
        """In AWS the right to the one call is that to its batch; the emulator has rights of its own for batches."""
        actions = ["sqs:ChangeMessageVisibilityBatch", "sqs:DeleteMessageBatch"]
        document = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": actions, "Resource": "*"}}
        self._iam.put_user_policy(UserName="poller", PolicyName="batches", PolicyDocument=json.dumps(document))

    def forbid(self, policy: str) -> None:
        self._iam.delete_user_policy(UserName="poller", PolicyName=policy)


def filled(name: str, **values: str) -> str:
    """The longer words first: one is the end of another."""
    text = (FOLDER / f"{name}.json").read_text()
    for word in sorted(values, key=len, reverse=True):
        text = text.replace(word, values[word])
    assert not re.search(r"[A-Z]+_(NAME|ID)\b", text), text
    return text


@pytest.fixture
def iam_aws(account: str) -> Aws:
    return Aws(emulators.running("ministack-iam"), account)


def values(account: str) -> dict[str, str]:
    return {
        "REGION": REGION,
        "ACCOUNT_ID": account,
        "STREAM_NAME": "orders",
        "FAILURE_QUEUE_NAME": "failed",
        "QUEUE_NAME": "orders",
        "STORE_TABLE_NAME": "positions",
    }


async def test_the_daemon_lives_on_its_policies(iam_aws: Aws, account, ledger: Ledger, daemons, monkeypatch) -> None:
    """A stream, a queue, a failure destination and a store that it makes, from start to stop; nothing is denied.

    No table: the emulator does not look at the stream's ARN in calls of DynamoDB Streams, so it denies them all.
    """
    user = User(iam_aws)
    user.allow("kinesis", "sqs", "destination-sqs", "store-dynamodb", **values(account))
    user.allow_batches()
    stream, queue = iam_aws.stream("orders", 2), iam_aws.queue("orders")
    failed = iam_aws.queue("failed")
    more = {"MaximumRetryAttempts": 0, "DestinationConfig": {"OnFailure": {"Destination": failed}}}
    daemon: Daemon = daemons(
        config(
            iam_aws,
            ledger,
            stream_of(stream, **more),
            queue_of(queue),
            store="dynamodb://positions?create=true",
        )
    )
    daemon.environment |= user.environment
    ledger.rule = lambda records: 500 if "kinesis" in records[0] else None
    iam_aws.send("orders", 0, 20)
    iam_aws.put_stream("orders", 0, 20)
    await daemon.start()
    await ledger.until(lambda: ledger.count("sqs") == 20, 30, "delivery")
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(iam_aws.depth, "failed"):
            await asyncio.sleep(0.1)
    assert await daemon.stop() == 0
    assert not [line for line in daemon.logs if "denied" in json.dumps(line).lower()]
    for name, value in user.environment.items():
        monkeypatch.setenv(name, value)
    settings = load(str(daemon.path))
    assert [problem for problem in await check_connections(settings) if "FunctionName" not in problem] == []
    user.forbid("sqs")
    [problem] = [problem for problem in await check_connections(settings) if "FunctionName" not in problem]
    assert "EventSourceArn" in problem
    assert "sqs:GetQueueAttributes" in problem


async def test_a_reader_in_another_account(iam_aws: Aws, account, ledger: Ledger, daemons) -> None:
    """The role has the source's policy and trusts the daemon; the daemon has the right to assume it, and no other."""
    user, owner = User(iam_aws), Aws(iam_aws.url, str(int(account) + 500_000))
    user.allow("assume-role", SOURCE_ACCOUNT_ID=owner.account, READER_ROLE_NAME="reader")
    trust = filled("assume-role-trust", ACCOUNT_ID=account, POLLER_ROLE_NAME="poller")
    trust = trust.replace(f"arn:aws:iam::{account}:role/poller", user.arn)
    iam = owner.client("iam")
    role = iam.create_role(RoleName="reader", AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    document = filled("kinesis", **values(owner.account))
    iam.put_role_policy(RoleName="reader", PolicyName="kinesis", PolicyDocument=document)
    arn = owner.stream("orders", 1)
    owner.put_stream("orders", 0, 20)
    daemon: Daemon = daemons(config(iam_aws, ledger, stream_of(arn, Options={"AssumeRoleArn": role})))
    daemon.environment |= user.environment
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 20, 30, "delivery")
    assert await daemon.stop() == 0
    user.forbid("assume-role")
    await daemon.start()
    async with asyncio.timeout(30):
        while not (reason := (await daemon.status())[0]["reason"]):
            await asyncio.sleep(0.1)
    assert f"AssumeRole of {role}: AccessDenied" in reason
    assert await daemon.stop() == 0
