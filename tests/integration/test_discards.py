"""Filters and failure destinations of the daemon, over sockets."""

import asyncio
import base64
import json
from typing import Any

import pytest
from aiohttp import web

from tests.integration.daemon import Ledger
from tests.integration.test_daemon import Aws, config, queue_of, stream_of

pytestmark = pytest.mark.integration


def filters(*patterns: Any) -> dict[str, Any]:
    return {"FilterCriteria": {"Filters": [{"Pattern": json.dumps(pattern)} for pattern in patterns]}}


def discarding(arn: str, destination: str, **more: Any) -> dict[str, Any]:
    failing = {"MaximumRetryAttempts": 0, "DestinationConfig": {"OnFailure": {"Destination": destination}}}
    return stream_of(arn, BatchSize=1, **failing, **more)


def bodies(aws: Aws, queue: str, count: int) -> list[dict[str, Any]]:
    """So many messages of a queue, as documents."""
    sqs = aws.client("sqs")
    url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
    found: list[dict[str, Any]] = []
    for _ in range(100):
        answer = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1)
        found += [json.loads(message["Body"]) for message in answer.get("Messages", [])]
        if len(found) >= count:
            return found
    raise AssertionError(f"{len(found)} of {count} messages came")


async def test_filters_decide_for_every_source(ministack, account, ledger: Ledger, daemons) -> None:
    """What matches is delivered as it was; filtered messages are deleted, and all is counted."""
    aws = Aws(ministack, account)
    stream, table = await asyncio.to_thread(aws.stream, "s", 1), await asyncio.to_thread(aws.table, "table")
    queue = await asyncio.to_thread(aws.queue, "q")
    kinesis, sqs = aws.client("kinesis"), aws.client("sqs")
    url = sqs.get_queue_url(QueueName="q")["QueueUrl"]
    texts = [json.dumps({"kind": kind, "n": n}, indent=1) for n, kind in enumerate(["a", "b", "c", "a"])]
    for text in [*texts, "no json"]:
        await asyncio.to_thread(kinesis.put_record, StreamName="s", Data=text.encode(), PartitionKey="k")
        await asyncio.to_thread(sqs.send_message, QueueUrl=url, MessageBody=text)
    await asyncio.to_thread(aws.put_table, "table", 0, 5)
    daemon = daemons(
        config(
            aws, ledger,
            stream_of(stream, **filters({"data": {"kind": ["a"]}}, {"data": {"n": [{"numeric": [">", 1]}]}})),
            stream_of(table, **filters({"dynamodb": {"NewImage": {"id": {"S": ["3"]}}}})),
            queue_of(queue, **filters({"body": {"kind": [{"anything-but": "a"}]}})),
        )
    )  # fmt: skip
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 6, 20, "every match")
    async with asyncio.timeout(20):
        while await asyncio.to_thread(aws.depth, "q"):
            await asyncio.sleep(0.1)
    assert [ledger.count(source) for source in ("kinesis", "dynamodb", "sqs")] == [3, 1, 2]
    kinesis_event = next(event for event in ledger.events if event["eventSource"] == "aws:kinesis")
    assert base64.b64decode(kinesis_event["kinesis"]["data"]).decode() == texts[0]
    _, metrics = await daemon.get("/metrics")
    counts = {
        line.split('source="')[1].split('"')[0]: float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("poller_filtered_out_events_total{")
    }
    assert counts == {"kinesis": 2, "dynamodb": 4, "sqs": 3}
    assert await daemon.stop() == 0


async def test_discarded_batches_are_reported_to_a_queue(ministack, account, ledger: Ledger, daemons) -> None:
    """AWS's own record, with the payload where the option asks for it; the mapping made known by the API as well."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 1)
    queue = await asyncio.to_thread(aws.queue, "failed")
    await asyncio.to_thread(aws.put_stream, "s", 0, 3)
    ledger.rule = lambda records: 500
    daemon = daemons(config(aws, ledger, discarding(stream, queue, Options={"IncludePayload": True})))
    await daemon.start()
    found = await asyncio.to_thread(bodies, aws, "failed", 3)
    first = found[0]
    assert list(first) == ["requestContext", "responseContext", "version", "timestamp", "KinesisBatchInfo", "payload"]
    assert first["requestContext"]["condition"] == "RetryAttemptsExhausted"
    assert first["responseContext"] == {"statusCode": 500, "executedVersion": "$LATEST", "functionError": "Unhandled"}
    assert first["KinesisBatchInfo"]["streamArn"] == stream
    [record] = json.loads(first["payload"])["Records"]
    assert record["kinesis"]["sequenceNumber"] == first["KinesisBatchInfo"]["startSequenceNumber"]
    numbers = [base64.b64decode(json.loads(one["payload"])["Records"][0]["kinesis"]["data"]) for one in found]
    assert sorted(numbers) == [b"0", b"1", b"2"]
    assert {request["X-Poller-Request-Id"] for request in ledger.requests} == {
        one["requestContext"]["requestId"] for one in found
    }
    _, metrics = await daemon.get("/metrics")
    assert 'poller_on_failure_destination_delivered_events_total{function="f"' in metrics
    assert await daemon.stop() == 0


@pytest.mark.parametrize("seconds", [3.0, pytest.param(30.0, marks=pytest.mark.soak)])
async def test_a_destination_that_is_down_loses_nothing(ministack, account, ledger: Ledger, daemons, seconds) -> None:
    """50 batches are discarded while it answers 503: none passes without its record, kill -9 included."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 2)
    await asyncio.to_thread(aws.put_stream, "s", 0, 50)
    ledger.rule = lambda records: 500
    loop = asyncio.get_running_loop()
    taken: dict[str, dict[str, Any]] = {}
    refused = asyncio.Event()
    changed = asyncio.Event()
    back_at = loop.time() + 3600.0

    async def desk(request: web.Request) -> web.Response:
        if loop.time() < back_at:
            refused.set()
            return web.Response(status=503)
        document = json.loads(await request.read())
        taken[document["KinesisBatchInfo"]["startSequenceNumber"]] = document
        changed.set()
        return web.Response()

    app = web.Application()
    app.router.add_post("/desk", desk)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    daemon = daemons(config(aws, ledger, discarding(stream, f"http://127.0.0.1:{port}/desk", ParallelizationFactor=5)))
    await daemon.start()
    async with asyncio.timeout(20):
        await refused.wait()
    back_at = loop.time() + seconds
    await daemon.until_logged("destination_waits")
    async with asyncio.timeout(20):
        while not any(shard["blocked_seconds"] for one in await daemon.status() for shard in one["shards"]):
            await asyncio.sleep(0.05)
    await daemon.kill()
    await daemon.start()
    try:
        async with asyncio.timeout(30 + seconds):
            while len(taken) < 50:
                changed.clear()
                await changed.wait()
    finally:
        await runner.cleanup()
    assert {name.split(":")[-1] for name in ledger.attempts} == set(taken)
    assert await daemon.stop() == 0


async def test_what_was_discarded_is_in_files(ministack, account, ledger: Ledger, daemons, tmp_path) -> None:
    """One file a batch, in the form that S3 gets."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.table, "table")
    await asyncio.to_thread(aws.put_table, "table", 0, 4)
    ledger.rule = lambda records: 500
    folder = tmp_path / "failed"
    daemon = daemons(config(aws, ledger, discarding(stream, f"file://{folder}")))
    await daemon.start()
    async with asyncio.timeout(20):
        while not folder.exists() or len(list(folder.glob("*.json"))) < 4:
            await asyncio.sleep(0.05)
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert {document["DDBStreamBatchInfo"]["batchSize"] for document in documents} == {1}
    keys = {json.loads(document["payload"])["Records"][0]["dynamodb"]["Keys"]["id"]["S"] for document in documents}
    assert keys == {"0", "1", "2", "3"}
    assert await daemon.stop() == 0
