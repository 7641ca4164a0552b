"""The mapping API of the real daemon behind access keys, as boto3, the AWS CLI and Terraform's AWS provider use it."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config

from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon
from tests.integration.test_daemon import Aws

pytestmark = pytest.mark.integration

ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
UNKNOWN = "6d9bce8e-836b-442c-8070-74e77903c815"
INVALID, VALIDATION = "InvalidParameterValueException", "ValidationException"


class Site:
    """A locked daemon on an emulator, with a queue, a FIFO queue, a stream and a table's stream."""

    def __init__(self, aws: Aws, daemon: Daemon) -> None:
        self.aws = aws
        self.daemon = daemon
        self.queue = aws.queue("orders")
        self.fifo = aws.queue("orders.fifo", FifoQueue="true")
        self.stream = aws.stream("orders", 1)
        self.table = aws.table("orders")

    async def drive(self, run: Callable[[Any], Any], **options: Any) -> Any:
        """What `run(client)` answers; the client runs in a thread."""
        return await asyncio.to_thread(run, self.client(**options))

    def client(self, secret: str = SECRET, *, checks: bool = True) -> Any:
        """`checks`: botocore refuses by itself what its model does not allow."""
        return boto3.client(
            "lambda",
            region_name=REGION,
            endpoint_url=f"http://127.0.0.1:{self.daemon.port}",
            aws_access_key_id=ID,
            aws_secret_access_key=secret,
            config=Config(retries={"total_max_attempts": 1}, parameter_validation=checks),
        )


@pytest.fixture
async def site(ministack: str, account: str, tmp_path) -> AsyncIterator[Site]:
    daemon = Daemon(
        tmp_path,
        {
            "aws": {"region": REGION, "endpoint_url": ministack},
            "functions": {"orders": {"url": "http://127.0.0.1:9/"}},
            "server": {"port": 0, "auth": {"type": "sigv4", "access_keys": {ID: SECRET}}},
            "shutdown_grace_seconds": 1,
        },
    )
    made = await asyncio.to_thread(Site, Aws(ministack, account), daemon)
    await daemon.start()
    yield made
    await daemon.close()


def until(look: Callable[[], Any], wanted: Callable[[Any], bool], seconds: float = 20.0) -> Any:
    """What `look` answers once it is what is wanted."""
    end = time.monotonic() + seconds
    while not wanted(found := look()):
        assert time.monotonic() < end, f"still {found}"
        time.sleep(0.02)
    return found


def refusal(call: Callable[[], Any]) -> tuple[str, int, str]:
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call()
    response = caught.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Message"]


async def test_boto3_makes_pages_updates_and_deletes_250_mappings(site: Site) -> None:
    """Only the endpoint and the keys are changed."""

    def run(client: Any) -> None:
        names = [f"orders:v{number}" for number in range(250)]
        more = {"EventSourceArn": site.queue, "Enabled": False, "BatchSize": 3}
        made = {name: client.create_event_source_mapping(FunctionName=name, **more)["UUID"] for name in names}
        pages = list(client.get_paginator("list_event_source_mappings").paginate())
        assert [len(page["EventSourceMappings"]) for page in pages] == [100, 100, 50]
        listed = {item["UUID"]: item for page in pages for item in page["EventSourceMappings"]}
        assert {uuid: item["FunctionArn"].partition("function:")[2] for uuid, item in listed.items()} == {
            uuid: name for name, uuid in made.items()
        }
        some = client.list_event_source_mappings(EventSourceArn=site.queue, MaxItems=7)
        assert len(some["EventSourceMappings"]) == 7
        (one,) = client.list_event_source_mappings(FunctionName="orders:v7")["EventSourceMappings"]
        assert one == listed[made["orders:v7"]]
        assert client.list_event_source_mappings(FunctionName="orders")["EventSourceMappings"] == []
        for uuid in made.values():
            assert client.update_event_source_mapping(UUID=uuid, BatchSize=9)["BatchSize"] == 9
        pages = list(client.get_paginator("list_event_source_mappings").paginate())
        assert {item["BatchSize"] for page in pages for item in page["EventSourceMappings"]} == {9}
        for uuid in made.values():
            assert client.delete_event_source_mapping(UUID=uuid)["State"] == "Deleting"
        until(lambda: client.list_event_source_mappings()["EventSourceMappings"], lambda left: left == [])

    await site.drive(run)
    assert site.daemon.clean_logs() == []


async def test_every_refusal_of_the_message_table_reaches_boto3(site: Site) -> None:
    """Code, status and text of each row, word for word; nothing is made."""

    def run(client: Any) -> None:
        queue = {"EventSourceArn": site.queue, "FunctionName": "orders"}
        stream = {"EventSourceArn": site.stream, "FunctionName": "orders", "StartingPosition": "TRIM_HORIZON"}
        table = stream | {"EventSourceArn": site.table}
        fifo = queue | {"EventSourceArn": site.fifo}
        window = "Maximum batch window in seconds must be greater than 0 if maximum batch size is greater than 10"
        unsupported = "Unsupported DestinationConfig parameter for given event source mapping type."
        validation = "1 validation error detected: Value {} failed to satisfy constraint: Member must "
        enum = validation.format("'invalid' at 'startingPosition'") + "satisfy enum value set: "
        no_queue = (
            "Error occurred while ReceiveMessage. SQS Error Code: AWS.SimpleQueueService.NonExistentQueue. "
            "SQS Error Message: The specified queue does not exist."
        )
        bounds = (
            "MinimumPollers should be between [2, 200] and MaximumPollers should be between [MinimumPollers, 10000]"
        )
        provisioned = (
            "Provisioned mode for SQS ESM does not support maximum concurrency feature. "
            "Use MaximumPollers as the control mechanism and remove maximum concurrency."
        )
        rows: list[tuple[dict[str, Any], str, str]] = [
            ({"FunctionName": "orders"}, INVALID, "Unrecognized event source."),
            (queue | {"FunctionName": "nobody"}, INVALID, "Function does not exist"),
            (
                {"EventSourceArn": site.queue + "-none", "FunctionName": "nobody"},
                INVALID,
                "Function does not exist",
            ),
            (queue | {"DestinationConfig": {"OnFailure": {"Destination": site.fifo}}}, INVALID, unsupported),
            (stream | {"DestinationConfig": {"OnSuccess": {"Destination": site.queue}}}, INVALID, unsupported),
            (
                {name: value for name, value in stream.items() if name != "StartingPosition"},
                INVALID,
                validation.format("null at 'startingPosition'") + "not be null.",
            ),
            (
                stream | {"StartingPosition": "invalid"},
                VALIDATION,
                enum + "[LATEST, AT_TIMESTAMP, TRIM_HORIZON]",
            ),
            (
                table | {"StartingPosition": "AT_TIMESTAMP", "StartingPositionTimestamp": 1},
                INVALID,
                f"Unsupported starting position for arn type: {site.table}",
            ),
            (stream | {"StartingPosition": "AT_TIMESTAMP"}, INVALID, "Need to specify a timestamp"),
            (
                queue | {"StartingPosition": "LATEST"},
                INVALID,
                "StartingPosition is not valid for SQS event sources.",
            ),
            (stream | {"EventSourceArn": site.stream + "-no"}, INVALID, f"Stream not found: {site.stream}-no"),
            (table | {"EventSourceArn": site.table + "1"}, INVALID, f"Stream not found: {site.table}1"),
            (queue | {"EventSourceArn": site.queue + "-no"}, INVALID, no_queue),
            (queue | {"BatchSize": 11}, INVALID, window),
            (
                fifo | {"MaximumBatchingWindowInSeconds": 1},
                INVALID,
                "Batching window is not supported for FIFO queues",
            ),
            (fifo | {"BatchSize": 11}, INVALID, "Batch size must not exceed 10 for FIFO queues"),
            *(
                (
                    queue | {"FilterCriteria": {"Filters": [{"Pattern": text}]}},
                    INVALID,
                    "Invalid filter pattern definition.",
                )
                for text in ("null", "text", "{", '{"eventSource":"aws:sqs"}', '{"eventSource":[]}')
            ),
            (
                queue | {"ProvisionedPollerConfig": {}},
                INVALID,
                "Either MinimumPollers or MaximumPollers are required if ProvisionedPollerConfig is provided.",
            ),
            (queue | {"ProvisionedPollerConfig": {"MinimumPollers": 1}}, INVALID, bounds),
            (
                queue | {"ProvisionedPollerConfig": {"MinimumPollers": 2}, "ScalingConfig": {"MaximumConcurrency": 2}},
                INVALID,
                provisioned,
            ),
            (
                queue | {"MetricsConfig": {"Metrics": ["ErrorCount"]}},
                INVALID,
                "Only EventCount metrics are supported for event source mappings.",
            ),
            (
                queue | {"BatchSize": 10_001},
                VALIDATION,
                validation.format("'10001' at 'batchSize'") + "have value less than or equal to 10000",
            ),
            (
                stream | {"MaximumRetryAttempts": -2},
                VALIDATION,
                validation.format("'-2' at 'maximumRetryAttempts'") + "have value greater than or equal to -1",
            ),
        ]
        for request, code, message in rows:
            assert refusal(lambda request=request: client.create_event_source_mapping(**request)) == (
                code,
                400,
                message,
            ), request
        gone = ("ResourceNotFoundException", 404, "The resource you requested does not exist.")
        for call in (
            lambda: client.get_event_source_mapping(UUID=UNKNOWN),
            lambda: client.update_event_source_mapping(UUID=UNKNOWN, BatchSize=1),
            lambda: client.delete_event_source_mapping(UUID=UNKNOWN),
        ):
            assert refusal(call) == gone
        arn = f"arn:aws:lambda:{REGION}:{site.aws.account}:event-source-mapping:{UNKNOWN}"
        for call in (
            lambda: client.list_tags(Resource=arn),
            lambda: client.tag_resource(Resource=arn, Tags={"a": "b"}),
            lambda: client.untag_resource(Resource=arn, TagKeys=["a"]),
        ):
            assert refusal(call) == ("ResourceNotFoundException", 404, f"Event source mapping not found: {arn}")
        assert client.list_event_source_mappings()["EventSourceMappings"] == []

        made = client.create_event_source_mapping(**stream, Enabled=False)
        assert refusal(lambda: client.create_event_source_mapping(**stream)) == (
            "ResourceConflictException",
            409,
            (
                f'The event source arn (" {site.stream} ") and function (" orders ") provided mapping already exists. '
                f"Please update or delete the existing mapping with UUID {made['UUID']}"
            ),
        )
        made = client.create_event_source_mapping(**queue, Enabled=False)
        assert refusal(lambda: client.create_event_source_mapping(**queue)) == (
            "ResourceConflictException",
            409,
            (
                f'An event source mapping with SQS arn (" {site.queue} ") and function (" orders ") already exists. '
                f"Please update or delete the existing mapping with UUID {made['UUID']}"
            ),
        )
        found = refusal(lambda: client.update_event_source_mapping(UUID=made["UUID"], BatchSize=11))
        assert found == (INVALID, 400, window)
        found = refusal(lambda: client.update_event_source_mapping(UUID=made["UUID"], FunctionName="nobody"))
        assert found == (INVALID, 400, "Function does not exist")

    await site.drive(run, checks=False)


async def test_what_clears_a_field_on_aws_clears_it_here(site: Site) -> None:
    """semantics.md 1.7, and the defaults of 1.5 come back."""

    def run(client: Any) -> None:
        destination = {"OnFailure": {"Destination": site.queue}}
        filters = {"Filters": [{"Pattern": '{"a": [1]}'}]}
        stream = client.create_event_source_mapping(
            EventSourceArn=site.stream,
            FunctionName="orders",
            StartingPosition="LATEST",
            Enabled=False,
            FilterCriteria=filters,
            DestinationConfig=destination,
            FunctionResponseTypes=["ReportBatchItemFailures"],
            MetricsConfig={"Metrics": ["EventCount"]},
        )
        queue = client.create_event_source_mapping(
            EventSourceArn=site.queue, FunctionName="orders", Enabled=False, ScalingConfig={"MaximumConcurrency": 5}
        )
        assert (stream["FilterCriteria"], stream["DestinationConfig"]) == (filters, destination)
        assert (stream["State"], queue["State"]) == ("Creating", "Disabled"), "as AWS answers a create that is disabled"
        for made, changes, left in (
            (stream, {"FilterCriteria": {}}, None),
            (stream, {"FilterCriteria": {"Filters": []}}, None),
            (stream, {"DestinationConfig": {"OnFailure": {"Destination": ""}}}, {"OnFailure": {}}),
            (stream, {"DestinationConfig": {"OnFailure": {}}}, {"OnFailure": {}}),
            (stream, {"FunctionResponseTypes": []}, []),
            (stream, {"MetricsConfig": {}}, None),
            (queue, {"ScalingConfig": {}}, None),
        ):
            ((name, _),) = changes.items()
            assert client.update_event_source_mapping(UUID=made["UUID"], **changes).get(name) == left
            assert client.get_event_source_mapping(UUID=made["UUID"]).get(name) == left
            if left != []:
                client.update_event_source_mapping(UUID=made["UUID"], **{name: made[name]})
        assert client.get_event_source_mapping(UUID=stream["UUID"])["MaximumRetryAttempts"] == -1

    await site.drive(run)


async def test_the_aws_cli_does_it_all(site: Site) -> None:
    """The program itself, as a person calls it; it pages by itself."""

    async def aws(*words: str) -> Any:
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "awscli", "--endpoint-url", f"http://127.0.0.1:{site.daemon.port}", "--output", "json",
            "lambda", *words, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, errors = await process.communicate()
        return json.loads(out or b"null") if process.returncode == 0 else errors.decode().strip()

    made = await aws(
        "create-event-source-mapping", "--event-source-arn", site.queue, "--function-name", "orders", "--no-enabled",
        "--filter-criteria", '{"Filters": [{"Pattern": "{\\"body\\": {\\"a\\": [1]}}"}]}', "--tags", "team=a b",
    )  # fmt: skip
    assert isinstance(made, dict), made
    uuid, arn = made["UUID"], made["EventSourceMappingArn"]
    assert made["FilterCriteria"] == {"Filters": [{"Pattern": '{"body": {"a": [1]}}'}]}
    assert (await aws("get-event-source-mapping", "--uuid", uuid))["State"] == "Disabled"
    assert (await aws("list-tags", "--resource", arn)) == {"Tags": {"team": "a b"}}
    assert (await aws("tag-resource", "--resource", arn, "--tags", "k=v")) is None
    assert (await aws("untag-resource", "--resource", arn, "--tag-keys", "team", "x")) is None
    assert (await aws("list-tags", "--resource", arn)) == {"Tags": {"k": "v"}}
    assert (await aws("update-event-source-mapping", "--uuid", uuid, "--batch-size", "9"))["BatchSize"] == 9

    def more(client: Any) -> None:
        for number in range(249):
            client.create_event_source_mapping(
                EventSourceArn=site.queue, FunctionName=f"orders:v{number}", Enabled=False
            )

    await site.drive(more)
    listed = await aws("list-event-source-mappings", "--event-source-arn", site.queue, "--page-size", "60")
    assert len({item["UUID"] for item in listed["EventSourceMappings"]}) == 250
    assert (await aws("delete-event-source-mapping", "--uuid", uuid))["State"] == "Deleting"
    refused = await aws("get-event-source-mapping", "--uuid", UNKNOWN)
    assert "(ResourceNotFoundException) when calling the GetEventSourceMapping operation: The resource you" in refused


async def test_terraforms_sequence_of_requests(site: Site) -> None:
    """`aws_lambda_event_source_mapping`: create, wait, read, tags; change tags, update, wait, read; delete, wait.

    In its waits Terraform gives up at any state that it does not expect there.
    """
    pending = {
        "create": {"Creating", "Disabling", "Enabling"},
        "update": {"Disabling", "Enabling", "Updating"},
        "delete": {"Deleting"},
    }

    def settled(client: Any, uuid: str, step: str, state: str = "Enabled") -> dict[str, Any]:
        def wanted(found: dict[str, Any]) -> bool:
            assert found["State"] in pending[step] | {"Enabled", "Disabled"}, found["State"]
            return found["State"] == state

        until(lambda: client.get_event_source_mapping(UUID=uuid), wanted)
        return read(client, uuid)

    def read(client: Any, uuid: str) -> dict[str, Any]:
        found = client.get_event_source_mapping(UUID=uuid)
        found["Tags"] = client.list_tags(Resource=found["EventSourceMappingArn"])["Tags"]
        return {name: value for name, value in found.items() if name != "ResponseMetadata"}

    def run(client: Any) -> None:
        made = client.create_event_source_mapping(
            EventSourceArn=site.stream,
            FunctionName="orders",
            Enabled=True,
            StartingPosition="LATEST",
            MaximumRetryAttempts=0,
            Tags={"team": "a", "stage": "test"},
        )
        state = settled(client, made["UUID"], "create")
        assert (state["Tags"], state["MaximumRetryAttempts"]) == ({"team": "a", "stage": "test"}, 0)
        same = {name: value for name, value in state.items() if name not in {"State", "Tags"}}
        assert same == {name: value for name, value in made.items() if name in same}, "nothing differs in the next plan"

        client.untag_resource(Resource=state["EventSourceMappingArn"], TagKeys=["stage"])
        client.tag_resource(Resource=state["EventSourceMappingArn"], Tags={"team": "b"})
        client.update_event_source_mapping(UUID=made["UUID"], BatchSize=7, FunctionName=state["FunctionArn"])
        state = settled(client, made["UUID"], "update")
        assert (state["Tags"], state["BatchSize"]) == ({"team": "b"}, 7)
        client.update_event_source_mapping(UUID=made["UUID"], Enabled=False)
        settled(client, made["UUID"], "update", "Disabled")
        client.update_event_source_mapping(UUID=made["UUID"], Enabled=True)
        settled(client, made["UUID"], "update")

        client.delete_event_source_mapping(UUID=made["UUID"])
        end = time.monotonic() + 20
        while True:
            try:
                state = client.get_event_source_mapping(UUID=made["UUID"])
            except client.exceptions.ResourceNotFoundException:
                break
            assert state["State"] in pending["delete"]
            assert time.monotonic() < end
            time.sleep(0.02)

    await site.drive(run)
    assert site.daemon.clean_logs() == []


async def test_a_wrong_key_does_nothing(site: Site) -> None:
    """The daemon's own door; the open paths stay open, and the secret is in no log."""

    def run(client: Any) -> None:
        found = refusal(lambda: client.create_event_source_mapping(EventSourceArn=site.queue, FunctionName="orders"))
        assert found[:2] == ("InvalidSignatureException", 403)

    await site.drive(run, secret="wrong")
    assert (await site.daemon.get("/api/status"))[0] == 401
    assert (await site.daemon.get("/healthz"))[0] == 200
    assert "poller_auth_failures_total 2.0" in (await site.daemon.get("/metrics"))[1]
    await site.daemon.stop()
    assert SECRET not in repr(site.daemon.logs)
