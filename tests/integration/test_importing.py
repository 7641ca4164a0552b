"""`poller import` of an account, against MiniStack: what is printed loads, and is what was made."""

import argparse
import asyncio
import io
import zipfile
from pathlib import Path

import pytest

from poller import config
from poller.aws.session import AwsClients
from poller.errors import ConfigError
from poller.importing import account
from poller.settings import LambdaFunction
from poller.verbs import importing
from tests.integration.conftest import REGION

pytestmark = pytest.mark.integration


def verb(*arguments: str) -> int:
    """One call of the verb; it has a loop of its own."""
    parser = argparse.ArgumentParser()
    importing.add(parser.add_subparsers())
    given = parser.parse_args(["import", *arguments])
    return given.verb(given)


async def make_function(clients: AwsClients, name: str) -> str:
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("main.py", "def handler(event, context): pass")
    client = await clients.client("lambda", REGION)
    made = await client.create_function(
        FunctionName=name,
        Runtime="python3.11",
        Role="arn:aws:iam::000000000000:role/any",
        Handler="main.handler",
        Timeout=42,
        Code={"ZipFile": package.getvalue()},
    )
    return str(made["FunctionArn"])


async def test_an_account_becomes_a_config(ministack: str, connect, capsys, tmp_path: Path) -> None:
    """A stream, a table's stream and a queue with its filter, by UUID; the function with its own timeout."""
    clients = await connect(ministack)
    arn = await make_function(clients, "orders")
    kinesis, sqs = await clients.client("kinesis", REGION), await clients.client("sqs", REGION)
    dynamodb, client = await clients.client("dynamodb", REGION), await clients.client("lambda", REGION)
    await kinesis.create_stream(StreamName="clicks", ShardCount=1)
    stream = (await kinesis.describe_stream(StreamName="clicks"))["StreamDescription"]["StreamARN"]
    url = (await sqs.create_queue(QueueName="jobs"))["QueueUrl"]
    queue = (await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"]))["Attributes"]["QueueArn"]
    table = await dynamodb.create_table(
        TableName="customers",
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
        StreamSpecification={"StreamEnabled": True, "StreamViewType": "NEW_IMAGE"},
    )
    pattern = '{"body": {"kind": ["${a}"]}}'
    made = [
        await client.create_event_source_mapping(
            EventSourceArn=stream,
            FunctionName="orders",
            StartingPosition="LATEST",
            BatchSize=100,
            BisectBatchOnFunctionError=True,
            ParallelizationFactor=2,
            DestinationConfig={"OnFailure": {"Destination": queue}},
        ),
        await client.create_event_source_mapping(
            EventSourceArn=table["TableDescription"]["LatestStreamArn"],
            FunctionName=arn,
            StartingPosition="LATEST",
            Enabled=False,
        ),
        await client.create_event_source_mapping(
            EventSourceArn=queue, FunctionName="orders", FilterCriteria={"Filters": [{"Pattern": pattern}]}
        ),
    ]
    assert await asyncio.to_thread(verb, "--region", REGION, "--endpoint-url", ministack, "--overlap", "600") == 0
    said = capsys.readouterr()
    printed = tmp_path / "poller.yaml"
    printed.write_text(said.out)
    settings = config.load(str(printed))
    found = {item.uuid: item.document for item in settings.mappings}
    clicks, customers, jobs = (found[item["UUID"]] for item in made)
    assert (clicks["EventSourceArn"], clicks["ParallelizationFactor"], clicks["BatchSize"]) == (stream, 2, 100)
    assert clicks["StartingPosition"] == "AT_TIMESTAMP"
    assert clicks["DestinationConfig"] == {"OnFailure": {"Destination": queue}}
    assert (customers["StartingPosition"], customers["Enabled"]) == ("TRIM_HORIZON", False)
    assert jobs["FilterCriteria"] == {"Filters": [{"Pattern": pattern}]}
    assert settings.functions == {"orders": LambdaFunction("orders", arn, timeout=42.0)}
    assert settings.aws.endpoint_url == ministack
    assert "BisectBatchOnFunctionError was left out" in said.err
    assert f"--uuid {made[0]['UUID']} --no-enabled" in said.err
    assert made[1]["UUID"] not in said.err.partition("At the switch-over")[2]


async def test_an_empty_or_silent_account_is_a_mistake(
    ministack: str, connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 with what to check, no traceback."""
    monkeypatch.setattr(account, "_ATTEMPTS", 1)
    await connect(ministack)
    with pytest.raises(ConfigError, match="no event source mappings in eu-west-1"):
        await asyncio.to_thread(verb, "--region", REGION, "--endpoint-url", ministack)
    with pytest.raises(ConfigError, match="poller import: ListEventSourceMappings"):
        await asyncio.to_thread(verb, "--region", REGION, "--endpoint-url", "http://127.0.0.1:9")


async def test_a_region_is_needed(ministack: str, connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the option, AWS_REGION or AWS_DEFAULT_REGION; else a mistake."""
    await connect(ministack)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no AWS Region: give --region"):
        await asyncio.to_thread(verb, "--endpoint-url", ministack)
    for name, region in (("AWS_DEFAULT_REGION", "eu-north-1"), ("AWS_REGION", "eu-west-3")):
        monkeypatch.setenv(name, region)
        with pytest.raises(ConfigError, match=f"no event source mappings in {region}"):
            await asyncio.to_thread(verb, "--endpoint-url", ministack)
