"""The daemon end to end, over sockets: three sources, one HTTP target, kills, stops, blocks, reloads."""

import asyncio
import itertools
import json
import signal

import boto3
import pytest

from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger

pytestmark = pytest.mark.integration

SLACK = 1.5  # on top of the checkpoint interval: a busy machine, a commit under way
VISIBILITY = (
    20  # long enough for a starved machine to extend in time: an expired message is delivered twice without a crash
)


class Aws:
    """Makes sources on an emulator and fills them."""

    def __init__(self, url: str, account: str) -> None:
        self.url, self.account = url, account
        self._keys = {"aws_access_key_id": account, "aws_secret_access_key": "secret"}

    def client(self, service: str):
        return boto3.client(service, region_name=REGION, endpoint_url=self.url, **self._keys)

    def stream(self, name: str, shards: int) -> str:
        kinesis = self.client("kinesis")
        kinesis.create_stream(StreamName=name, ShardCount=shards)
        kinesis.get_waiter("stream_exists").wait(StreamName=name, WaiterConfig={"Delay": 1})
        return kinesis.describe_stream_summary(StreamName=name)["StreamDescriptionSummary"]["StreamARN"]

    def table(self, name: str) -> str:
        table = self.client("dynamodb").create_table(
            TableName=name,
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
            StreamSpecification={"StreamEnabled": True, "StreamViewType": "NEW_AND_OLD_IMAGES"},
        )
        return table["TableDescription"]["LatestStreamArn"]

    def queue(self, name: str, **attributes: str) -> str:
        sqs = self.client("sqs")
        url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
        return sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]

    def put_stream(self, name: str, first: int, count: int) -> None:
        kinesis = self.client("kinesis")
        for start in range(first, first + count, 500):
            entries = [
                {"Data": str(n).encode(), "PartitionKey": f"key-{n % 97}"}
                for n in range(start, min(start + 500, first + count))
            ]
            assert kinesis.put_records(StreamName=name, Records=entries)["FailedRecordCount"] == 0

    def put_table(self, name: str, first: int, count: int) -> None:
        dynamodb = self.client("dynamodb")
        for start in range(first, first + count, 25):
            items = [{"id": {"S": str(n)}, "n": {"N": str(n)}} for n in range(start, min(start + 25, first + count))]
            dynamodb.batch_write_item(RequestItems={name: [{"PutRequest": {"Item": item}} for item in items]})

    def send(self, name: str, first: int, count: int) -> None:
        sqs = self.client("sqs")
        url = sqs.get_queue_url(QueueName=name)["QueueUrl"]
        for start in range(first, first + count, 10):
            entries = [{"Id": str(n), "MessageBody": str(n)} for n in range(start, min(start + 10, first + count))]
            assert not sqs.send_message_batch(QueueUrl=url, Entries=entries).get("Failed")

    def depth(self, name: str) -> int:
        sqs = self.client("sqs")
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        url = sqs.get_queue_url(QueueName=name)["QueueUrl"]
        return sum(map(int, sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"].values()))


def config(aws: Aws, ledger: Ledger, *mappings: dict, **more) -> dict:
    return {
        "aws": {"region": REGION, "endpoint_url": aws.url},
        "functions": {"f": {"url": ledger.url}},
        "event_source_mappings": list(mappings),
        "retry": {"initial_backoff_seconds": 0.1, "maximum_backoff_seconds": 0.5},
        **more,
    }


def stream_of(arn: str, **more) -> dict:
    return {"EventSourceArn": arn, "FunctionName": "f", "StartingPosition": "TRIM_HORIZON", **more}


def queue_of(arn: str, **more) -> dict:
    return {"EventSourceArn": arn, "FunctionName": "f", **more}


def assert_within_promise(ledger: Ledger, kills: list[float], interval: float = 0.1) -> int:
    """After a crash only what was in flight or finished within the last interval is delivered again (promise 4)."""
    again = ledger.redelivered()
    for name, deliveries in again.items():
        for earlier, later in itertools.pairwise(deliveries):
            crash = next((kill for kill in kills if earlier.at <= kill <= later.at), None)
            assert crash is not None, f"{name} was delivered twice without a crash"
            assert crash - earlier.at < interval + SLACK, (
                f"{name} was delivered {crash - earlier.at:.1f} s before the crash"
            )
    return len(again)


def assert_order(ledger: Ledger) -> None:
    """First deliveries of each shard are in sequence order (promise 2)."""
    for shard, names in ledger.order.items():
        if shard != "aws:sqs":
            numbers = [int(name.replace(":", " ").split()[-1]) for name in names]
            assert numbers == sorted(numbers), shard


async def test_ten_thousand_of_each_survive_five_kills(ministack, account, ledger, daemons) -> None:
    """All delivered, order kept per shard, nothing lost, redeliveries within promise 4."""
    aws, each = Aws(ministack, account), 10_000
    stream, table = await asyncio.to_thread(aws.stream, "s", 4), await asyncio.to_thread(aws.table, "table")
    queue = await asyncio.to_thread(aws.queue, "q", VisibilityTimeout=str(VISIBILITY))
    mappings = [stream_of(stream), stream_of(table), queue_of(queue)]
    daemon: Daemon = daemons(config(aws, ledger, *mappings, functions={"f": {"url": ledger.url, "timeout_seconds": 3}}))
    kills: list[float] = []
    async with asyncio.TaskGroup() as tasks:
        producers = [
            tasks.create_task(asyncio.to_thread(aws.put_stream, "s", 0, each)),
            tasks.create_task(asyncio.to_thread(aws.put_table, "table", 0, each)),
            tasks.create_task(asyncio.to_thread(aws.send, "q", 0, each)),
        ]
        for kill in range(1, 6):
            await daemon.start()
            goal = kill * each // 3
            await ledger.until(lambda goal=goal: len(ledger.deliveries) >= goal, 90, f"delivery number {goal}")
            await daemon.kill()
            kills.append(asyncio.get_running_loop().time())
        await asyncio.gather(*producers)
    await daemon.start()
    try:
        await ledger.until(lambda: len(ledger.deliveries) >= 3 * each, 120, "the last delivery")
    except AssertionError as error:
        attributes = await asyncio.to_thread(
            aws.client("sqs").get_queue_attributes, QueueUrl=f"{aws.url}/{account}/q", AttributeNames=["All"]
        )
        error.add_note(f"{await daemon.status()} {attributes['Attributes']} {daemon.logs[-20:]}")
        raise
    assert await daemon.stop() == 0
    assert [ledger.count(source) for source in ("kinesis", "dynamodb", "sqs")] == [each] * 3
    assert_order(ledger)
    again = assert_within_promise(ledger, kills)
    assert await asyncio.to_thread(aws.depth, "q") == 0, "what was delivered is deleted"
    assert not daemon.clean_logs()
    print(f"\n{3 * each} records, {len(kills)} kills, {again} delivered again ({again / (3 * each):.2%})")


async def test_a_second_implementation_agrees(roto, account, ledger, daemons) -> None:
    """Kinesis and SQS of an independent emulator: all delivered in order, a clean stop repeats nothing."""
    aws, each = Aws(roto, account), 1000
    stream = await asyncio.to_thread(aws.stream, "s2", 4)
    queue = await asyncio.to_thread(aws.queue, "q2", VisibilityTimeout="30")
    daemon: Daemon = daemons(config(aws, ledger, stream_of(stream, ParallelizationFactor=3), queue_of(queue)))
    await daemon.start()
    await asyncio.to_thread(aws.put_stream, "s2", 0, each)
    await asyncio.to_thread(aws.send, "q2", 0, each)
    await ledger.until(lambda: len(ledger.deliveries) >= each, 60, "half of the deliveries")
    assert await daemon.stop() == 0
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) >= 2 * each, 60, "the last delivery")
    assert await daemon.stop() == 0
    assert not ledger.redelivered()
    assert [ledger.count(source) for source in ("kinesis", "sqs")] == [each] * 2


async def test_one_failing_record_blocks_one_shard(ministack, account, ledger, daemons) -> None:
    """That shard waits and says why, the others stay at the tip; then it goes on with that same record."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 4)
    poison: list[str] = []
    is_repaired = asyncio.Event()

    def rule(records):
        names = [Ledger.name(record) for record in records]
        if not poison:
            poison.append(names[0])
        return 500 if poison[0] in names and not is_repaired.is_set() else None

    ledger.rule = rule
    daemon: Daemon = daemons(config(aws, ledger, stream_of(stream, BatchSize=10)))
    await daemon.start()
    await asyncio.to_thread(aws.put_stream, "s", 0, 400)
    await ledger.until(lambda: poison and ledger.attempts[poison[0]] >= 4, 30, "the fourth attempt")
    shard = poison[0].split()[1].split(":")[0]
    first_sequence = poison[0].split(":")[1]
    behind = {s for s in (f"shardId-{n:012d}" for n in range(4)) if s != shard}
    await ledger.until(lambda: behind <= set(ledger.order), 30, "delivery by the other shards")
    await asyncio.to_thread(aws.put_stream, "s", 400, 400)
    while True:
        [mapping] = await daemon.status()
        shards = {entry["id"]: entry for entry in mapping["shards"]}
        if all(shards[name]["iterator_age_seconds"] == 0 for name in behind) and shards[shard]["attempts"] >= 4:
            break
        await asyncio.sleep(0.05)
    blocked = shards[shard]
    assert (blocked["state"], blocked["first_sequence"]) == ("running", first_sequence)
    assert "500" in blocked["last_error"]
    assert blocked["blocked_seconds"] > 0
    assert not any(shards[name]["blocked_seconds"] for name in behind)
    _, metrics = await daemon.get("/metrics")
    assert f'shard="{shard}"' in metrics
    is_repaired.set()
    await ledger.until(lambda: ledger.count("kinesis") == 800, 30, "the rest")
    assert ledger.order[shard][0] == poison[0], "the shard went on with that same record"
    assert_order(ledger)
    keys = {request["Idempotency-Key"] for request in ledger.requests if request["X-Poller-Attempt"] == "4"}
    assert len(keys) == 1
    assert await daemon.stop() == 0
    assert not ledger.redelivered()


async def test_a_stop_ends_what_is_in_flight_and_returns_what_is_not(ministack, account, ledger, daemons) -> None:
    """SIGTERM: the running invocation ends and counts, held messages are visible at once, exit 0, nothing again."""
    aws = Aws(ministack, account)
    queue = await asyncio.to_thread(aws.queue, "q", VisibilityTimeout="600")
    stream = await asyncio.to_thread(aws.stream, "s", 1)
    daemon: Daemon = daemons(
        config(
            aws,
            ledger,
            stream_of(stream),
            queue_of(queue, BatchSize=100, MaximumBatchingWindowInSeconds=300),
        )
    )
    await daemon.start()
    await asyncio.to_thread(aws.send, "q", 0, 5)
    await asyncio.to_thread(aws.put_stream, "s", 0, 50)
    await ledger.until(lambda: ledger.count("kinesis") == 50, 30, "delivery of the stream")
    sqs = aws.client("sqs")
    url = sqs.get_queue_url(QueueName="q")["QueueUrl"]

    def visible() -> int:
        names = ["ApproximateNumberOfMessages"]
        return int(sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"][names[0]])

    while await asyncio.to_thread(visible):
        await asyncio.sleep(0.05)
    assert await daemon.stop() == 0
    assert await asyncio.to_thread(visible) == 5, "held in a window, back in the queue at once"
    await daemon.start()
    while (await daemon.get("/readyz"))[0] != 200:
        await asyncio.sleep(0.05)
    assert await daemon.stop() == 0
    assert not ledger.redelivered()
    assert ledger.count("sqs") == 0


async def test_reload_follows_the_file_and_refuses_a_bad_one(ministack, account, ledger, daemons) -> None:
    """SIGHUP or a change: a new mapping starts, the others are not disturbed; a bad file is refused, the old one goes on."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 1)
    queue = await asyncio.to_thread(aws.queue, "q")
    daemon: Daemon = daemons(config(aws, ledger, stream_of(stream)))
    await daemon.start()
    await asyncio.to_thread(aws.put_stream, "s", 0, 10)
    await ledger.until(lambda: ledger.count("kinesis") == 10, 30, "delivery")
    good = daemon.path.read_text()
    daemon.path.write_text(good.replace("TRIM_HORIZON", "TRIM_HORIZONTAL"))
    daemon.send(signal.SIGHUP)
    refused = await daemon.until_logged("config_refused")
    assert "StartingPosition" in refused["mistakes"][0]
    full = config(aws, ledger, stream_of(stream), queue_of(queue))
    daemon.write({"store": "sqlite:///" + str(daemon.folder).lstrip("/") + "/poller.db", "server": {"port": 0}, **full})
    daemon.send(signal.SIGHUP)
    await daemon.until_logged("config_reloaded")
    await asyncio.to_thread(aws.send, "q", 0, 10)
    await asyncio.to_thread(aws.put_stream, "s", 10, 10)
    await ledger.until(lambda: len(ledger.deliveries) == 30, 30, "delivery after the reload")
    assert len(await daemon.status()) == 2
    reloads = len(daemon.events("config_reloaded"))
    daemon.write(
        {
            "store": "sqlite:///" + str(daemon.folder).lstrip("/") + "/poller.db",
            "server": {"port": 0},
            **config(aws, ledger, stream_of(stream)),
        }
    )
    while len(daemon.events("config_reloaded")) == reloads:  # nobody sent a signal: the file has changed
        daemon.log_changed.clear()
        await asyncio.wait_for(daemon.log_changed.wait(), 20)
    while len(await daemon.status()) != 1:
        await asyncio.sleep(0.05)
    assert await daemon.stop() == 0
    assert not ledger.redelivered()


async def test_a_mapping_made_with_boto3_survives_a_restart(ministack, account, ledger, daemons) -> None:
    """Create, get, list, update, delete over the wire; kept in the store; a declared one is the file's."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 1)
    queue = await asyncio.to_thread(aws.queue, "q")
    daemon: Daemon = daemons(config(aws, ledger, stream_of(stream)))
    await daemon.start()

    def api():
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y"}
        return boto3.client("lambda", region_name=REGION, endpoint_url=f"http://127.0.0.1:{daemon.port}", **keys)

    made = await asyncio.to_thread(lambda: api().create_event_source_mapping(EventSourceArn=queue, FunctionName="f"))
    assert made["State"] == "Creating"
    await asyncio.to_thread(aws.send, "q", 0, 10)
    await ledger.until(lambda: ledger.count("sqs") == 10, 30, "delivery by the new mapping")
    assert (await asyncio.to_thread(lambda: api().get_event_source_mapping(UUID=made["UUID"])))["State"] == "Enabled"
    assert await daemon.stop() == 0
    await daemon.start()
    listed = await asyncio.to_thread(lambda: api().list_event_source_mappings()["EventSourceMappings"])
    assert {entry["EventSourceArn"] for entry in listed} == {stream, queue}
    await asyncio.to_thread(lambda: api().update_event_source_mapping(UUID=made["UUID"], Enabled=False))
    while (await asyncio.to_thread(lambda: api().get_event_source_mapping(UUID=made["UUID"])))["State"] != "Disabled":
        await asyncio.sleep(0.05)
    declared = next(entry["UUID"] for entry in listed if entry["EventSourceArn"] == stream)
    with pytest.raises(Exception, match="is declared in") as refused:
        await asyncio.to_thread(lambda: api().delete_event_source_mapping(UUID=declared))
    assert type(refused.value).__name__ == "ResourceConflictException"
    with pytest.raises(Exception, match="already exists"):
        await asyncio.to_thread(lambda: api().create_event_source_mapping(EventSourceArn=queue, FunctionName="f"))
    await asyncio.to_thread(lambda: api().delete_event_source_mapping(UUID=made["UUID"]))
    while len(await daemon.status()) != 1:
        await asyncio.sleep(0.05)
    with pytest.raises(Exception, match="does not exist"):
        await asyncio.to_thread(lambda: api().get_event_source_mapping(UUID=made["UUID"]))
    assert await daemon.stop() == 0


async def test_run_needs_no_network_and_says_what_is_missing(account, ledger, daemons) -> None:
    """An unreachable source is a state in /readyz and status, not an exit; the daemon is healthy all the while."""
    arn = f"arn:aws:kinesis:{REGION}:{account}:stream/nowhere"
    aws = Aws("http://127.0.0.1:9", account)
    daemon: Daemon = daemons(config(aws, ledger, stream_of(arn)))
    await daemon.start()
    await daemon.until_logged("mapping_problem")
    status, text = await daemon.get("/readyz")
    assert status == 503
    assert arn in text
    assert (await daemon.get("/healthz"))[0] == 200
    [mapping] = await daemon.status()
    assert "127.0.0.1:9" in mapping["reason"]
    assert await daemon.stop() == 0


async def test_a_second_daemon_on_the_store_refuses(ministack, account, ledger, daemons) -> None:
    """It names the file and the holder; after a kill -9 the store is free at once."""
    aws = Aws(ministack, account)
    queue = await asyncio.to_thread(aws.queue, "q")
    first: Daemon = daemons(config(aws, ledger, queue_of(queue)))
    await first.start()
    second: Daemon = daemons(config(aws, ledger, queue_of(queue)))
    await second.start(wait=False)
    assert await second.ended() == 1
    [refusal] = second.events("not_started")
    assert str(first.folder / "poller.db") in refusal["error"]
    assert str(first.process.pid) in refusal["error"]
    await first.kill()
    await second.start()
    assert await second.stop() == 0


async def test_the_grace_bounds_a_stop_and_a_second_signal_ends_it(ministack, account, ledger, daemons) -> None:
    """A target that hangs is cut off after the grace, said, exit 0; a second signal cuts at once, exit 1."""
    aws = Aws(ministack, account)
    stream = await asyncio.to_thread(aws.stream, "s", 1)
    hanging = asyncio.Event()

    async def hang(reader, writer):
        await reader.read(100)
        hanging.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    made = config(aws, ledger, stream_of(stream), functions={"f": {"url": url}}, shutdown_grace_seconds=1)
    daemon: Daemon = daemons(made)
    await asyncio.to_thread(aws.put_stream, "s", 0, 1)
    await daemon.start()
    await asyncio.wait_for(hanging.wait(), 20)
    assert await daemon.stop() == 0
    assert daemon.events("stop_grace_exceeded")
    hanging.clear()
    daemon.logs.clear()
    daemon.write({**json.loads(json.dumps(made)), "shutdown_grace_seconds": 300, "server": {"port": 0},
                  "store": "sqlite:///" + str(daemon.folder).lstrip("/") + "/poller.db"})  # fmt: skip
    await daemon.start()
    await asyncio.wait_for(hanging.wait(), 20)
    daemon.send(signal.SIGTERM)
    await daemon.until_logged("stopping")
    daemon.send(signal.SIGTERM)
    assert await daemon.ended() == 1, daemon.logs
    server.close()
    await server.wait_closed()
