"""What an operator does with a running daemon: change, pause, resume, move. Over sockets, through boto3 and the command."""

import asyncio
import re
import sys
from typing import Any

import boto3
import pytest

from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import Aws, assert_order, config, queue_of, stream_of

pytestmark = pytest.mark.integration


def lambda_api(daemon: Daemon) -> Any:
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y"}
    return boto3.client("lambda", region_name=REGION, endpoint_url=f"http://127.0.0.1:{daemon.port}", **keys)


async def poller(daemon: Daemon, *arguments: str) -> tuple[int, str, str]:
    """One verb against the daemon: exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "poller", *arguments, "--url", f"http://127.0.0.1:{daemon.port}",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert b"Traceback" not in err
    return process.returncode or 0, out.decode().strip(), err.decode().strip()


def by_key(record: dict[str, Any]) -> str:
    """What order is kept within when lanes come and go."""
    if "kinesis" in record:
        return record["kinesis"]["partitionKey"]
    return str(record["dynamodb"]["Keys"]) if "dynamodb" in record else record["eventSource"]


async def test_changes_under_load_lose_and_repeat_nothing(ministack, account, ledger: Ledger, daemons) -> None:
    """Repointed, retuned and relaned every moment while records flow; every key in order, everything once."""
    aws, each = Aws(ministack, account), 4000
    stream, table = await asyncio.to_thread(aws.stream, "s", 2), await asyncio.to_thread(aws.table, "table")
    queue = await asyncio.to_thread(aws.queue, "q", VisibilityTimeout="60")
    ledger.shard = by_key
    functions = {name: {"url": ledger.url} for name in ("f", "g")}
    daemon: Daemon = daemons(config(aws, ledger, functions=functions))
    await daemon.start()
    api = await asyncio.to_thread(lambda_api, daemon)
    made = [
        await asyncio.to_thread(lambda item=item: api.create_event_source_mapping(**item)["UUID"])
        for item in (stream_of(stream), stream_of(table), queue_of(queue))
    ]
    sizes = [{"BatchSize": 7}, {"BatchSize": 200, "MaximumBatchingWindowInSeconds": 1}, {"BatchSize": 50}]
    lanes = [{"ParallelizationFactor": factor} for factor in (4, 1, 10)]
    limits = [{"MaximumRetryAttempts": 5}, {"FunctionResponseTypes": ["ReportBatchItemFailures"]}]
    pointed = [{"FunctionName": "g"}, {"FunctionName": "f"}]
    changes = [*sizes, *lanes, *limits, *pointed]
    of_queue = [{"BatchSize": 3}, {"ScalingConfig": {"MaximumConcurrency": 2}}, {"ScalingConfig": {}}, *pointed]

    async def tune() -> int:
        count = 0
        while True:
            for uuid in made:
                item = (of_queue if uuid == made[2] else changes)[count % (5 if uuid == made[2] else len(changes))]
                await asyncio.to_thread(lambda: api.update_event_source_mapping(UUID=uuid, **item))  # noqa: B023
            count += 1
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as tasks:
        tuner = tasks.create_task(tune())
        for start in range(0, each, 500):
            await asyncio.gather(
                asyncio.to_thread(aws.put_stream, "s", start, 500),
                asyncio.to_thread(aws.put_table, "table", start, 500),
                asyncio.to_thread(aws.send, "q", start, 500),
            )
        await ledger.until(lambda: len(ledger.deliveries) >= 2 * each, 60, "most of it")
        tuner.cancel()  # a change every moment would hold up a window of one second for ever
    await ledger.until(lambda: len(ledger.deliveries) >= 3 * each, 60, "the last delivery")
    assert not ledger.redelivered()
    assert_order(ledger)
    assert not daemon.clean_logs()
    assert await daemon.stop() == 0


async def test_a_mapping_is_repointed_away_from_a_function_that_hangs(ministack, account, ledger, daemons) -> None:
    """The batch that hangs keeps its shard; every other shard delivers to the new function at once."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 2)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the daemon is gone
        writer.close()

    hangs = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = hangs.sockets[0].getsockname()[1]
    functions = {"f": {"url": f"http://127.0.0.1:{port}/", "timeout_seconds": 900}, "g": {"url": ledger.url}}
    daemon: Daemon = daemons(config(aws, ledger, functions=functions))
    await daemon.start()
    api = await asyncio.to_thread(lambda_api, daemon)
    kinesis = aws.client("kinesis")
    await asyncio.to_thread(kinesis.put_record, StreamName="s", Data=b"x", PartitionKey="key-1")
    uuid = (await asyncio.to_thread(lambda: api.create_event_source_mapping(**stream_of(stream))))["UUID"]
    async with asyncio.timeout(20):
        while not (await daemon.status())[0]["in_flight"]:
            await asyncio.sleep(0.05)
    await asyncio.to_thread(lambda: api.update_event_source_mapping(UUID=uuid, FunctionName="g"))
    await asyncio.to_thread(aws.put_stream, "s", 0, 97)
    await ledger.until(lambda: ledger.count("kinesis") >= 20, 20, "delivery of the other shard")
    assert len(ledger.order) == 1
    assert (await daemon.status())[0]["in_flight"] == 1
    await daemon.kill()
    hangs.close()
    await hangs.wait_closed()


async def test_pause_seek_and_resume(ministack, account, ledger: Ledger, daemons) -> None:
    """By the command: nothing is delivered while paused; a mapping that was moved goes on from there, and says who."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 1)
    daemon: Daemon = daemons(config(aws, ledger, stream_of(stream)))
    await daemon.start()
    await asyncio.to_thread(aws.put_stream, "s", 0, 20)
    await ledger.until(lambda: ledger.count("kinesis") == 20, 30, "delivery")
    [uuid] = [one["uuid"] for one in await daemon.status()]
    assert await poller(daemon, "pause", "f") == (0, f"{uuid} paused", "")
    await asyncio.to_thread(aws.put_stream, "s", 20, 5)
    sequence = sorted(name.split(":")[-1] for name in ledger.deliveries)[17]
    shard = next(iter(ledger.order))
    seek = await poller(daemon, "seek", uuid[:8], "--shard", shard, "--sequence", sequence)
    assert seek == (0, f"{uuid} is paused; it goes on from there when it is resumed", "")
    assert (await daemon.status())[0]["seek_pending"]
    assert ledger.count("kinesis") == 20
    assert await poller(daemon, "resume", uuid) == (0, f"{uuid} resumed", "")
    await ledger.until(lambda: ledger.count("kinesis") == 25, 30, "what came meanwhile")
    again = ledger.redelivered()
    assert sorted(name.split(":")[-1] for name in again) == sorted(
        name.split(":")[-1] for name in list(ledger.deliveries)[17:20]
    )
    [moved] = daemon.events("position_moved")
    assert (moved["shard"], moved["now"]) == (shard, f"AT_SEQUENCE_NUMBER {sequence}")
    assert moved["by"].startswith("local from 127.0.0.1")
    assert await poller(daemon, "seek", "f", "--trim-horizon") == (0, f"{uuid} moved", "")
    await ledger.until(lambda: len(ledger.redelivered()) == 25, 30, "all of it again")
    assert await poller(daemon, "seek", "f", "--latest") == (0, f"{uuid} moved", "")
    await asyncio.to_thread(aws.put_stream, "s", 100, 1)
    await ledger.until(lambda: ledger.count("kinesis") == 26, 30, "what comes after")
    assert await daemon.stop() == 0


async def test_mistakes_of_an_operator_are_sentences(ministack, account, ledger, daemons) -> None:
    """Exit 1, what is wrong and what would be right."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 1)
    queue = await asyncio.to_thread(aws.queue, "q")
    daemon: Daemon = daemons(config(aws, ledger, stream_of(stream), queue_of(queue)))
    await daemon.start()
    for arguments, text in (
        (("pause", "nobody"), r"404 .*there is no mapping nobody; give a UUID"),
        (("pause", "f"), r"404 .*f may be any of the mappings"),
        (("seek", "nobody", "--latest"), r"there is no mapping nobody"),
        (("seek", "nobody", "--at", "noon"), r"--at noon is neither"),
        (("seek", "nobody", "--at", "2026-01-01T00:00:00"), r"no time zone"),
        (("seek", "nobody", "--sequence", "5"), r"--shard and --sequence belong together"),
    ):
        code, out, err = await poller(daemon, *arguments)
        assert (code, out) == (1, ""), arguments
        assert re.search(text, err), err
    uuids = {one["source"]: one["uuid"] for one in await daemon.status()}
    code, _, err = await poller(daemon, "seek", uuids["sqs"], "--latest")
    assert (code, "a queue has no positions" in err) == (1, True)
    code, _, err = await poller(daemon, "seek", uuids["kinesis"], "--shard", "shardId-9", "--sequence", "5")
    assert (code, "has no shard shardId-9" in err) == (1, True)
    assert await daemon.stop() == 0


async def test_a_new_mapping_names_what_is_there(ministack, account, ledger, daemons) -> None:
    """AWS's own texts for a stream, a queue and a function that do not exist; a real function's role is asked for."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 1)
    daemon: Daemon = daemons(config(aws, ledger))
    await daemon.start()
    api = await asyncio.to_thread(lambda_api, daemon)

    def create(**request: Any) -> str:
        try:
            api.create_event_source_mapping(**request)
        except api.exceptions.InvalidParameterValueException as error:
            return str(error.response["Error"]["Message"])
        return ""

    gone = stream.replace("stream/s", "stream/gone")
    queue = f"arn:aws:sqs:{REGION}:{account}:gone"
    assert await asyncio.to_thread(create, **stream_of(gone)) == f"Stream not found: {gone}"
    assert (await asyncio.to_thread(create, **queue_of(queue))).startswith(
        "Error occurred while ReceiveMessage. SQS Error Code: AWS.SimpleQueueService.NonExistentQueue."
    )
    missing = {**stream_of(stream), "FunctionName": "gone"}
    assert await asyncio.to_thread(create, **missing) == "Function does not exist"
    assert await asyncio.to_thread(create, **stream_of(stream)) == ""
    assert await daemon.stop() == 0
