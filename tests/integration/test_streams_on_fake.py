"""The daemon over streams that roll, trim, expire, throttle, merge and answer empty pages, which no emulator does."""

import asyncio
import inspect
import random
import sqlite3
from collections import defaultdict
from contextlib import closing

import boto3
import pytest
from botocore.config import Config
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.aws import FakeAws
from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import assert_within_promise, config, stream_of

pytestmark = pytest.mark.integration


def client_of(aws: FakeAws, account: str, service: str, attempts: int = 3):
    """A boto3 client of the test's own."""
    return boto3.client(
        service,
        region_name=REGION,
        endpoint_url=aws.url,
        aws_access_key_id=account,
        aws_secret_access_key="secret",
        config=Config(retries={"total_max_attempts": attempts}),
    )


class Table:
    """A DynamoDB stream on the fake, and what was written to it."""

    def __init__(self, aws: FakeAws, account: str, roots: int = 1) -> None:
        self.aws = aws
        self.arn = aws.stream("orders", account, REGION, shards=roots)
        self.names: list[str] = []  # as the ledger names records, in the order of writing
        self.by_key: dict[str, list[str]] = defaultdict(list)

    def write(self, count: int, keys: int = 97) -> list[str]:
        """So many more records, key after key; answers their names."""
        first = len(self.names)
        named = [f"key-{n % keys}" for n in range(first, first + count)]
        items = [
            {"keys": {"id": {"S": key}}, "new": {"id": {"S": key}, "n": {"N": str(n)}}}
            for n, key in enumerate(named, first)
        ]
        written = [f"dynamodb {number}" for number in self.aws.put(self.arn, items)]
        self.names += written
        for key, name in zip(named, written, strict=True):
            self.by_key[key].append(name)
        return written

    def open_shards(self) -> list[str]:
        """Those that take records now."""
        return [shard for shard, about in self.aws.shards(self.arn).items() if about["is_open"]]

    def names_in(self, shard: str) -> set[str]:
        """The records that a shard holds."""
        return {f"dynamodb {number}" for number in self.aws.shards(self.arn)[shard]["held"]}

    def assert_order(self, ledger: Ledger) -> None:
        """Every record came, and the first deliveries of each key are in the order of writing."""
        order = {name: place for place, name in enumerate(ledger.order["aws:dynamodb"])}
        assert order.keys() == set(self.names)
        for key, names in self.by_key.items():
            assert sorted(names, key=order.__getitem__) == names, key


class Stream:
    """A Kinesis stream on the fake."""

    def __init__(self, aws: FakeAws, account: str) -> None:
        self.client = client_of(aws, account, "kinesis")
        self.arn = f"arn:aws:kinesis:{REGION}:{account}:stream/orders"

    async def create(self, shards: int) -> None:
        await asyncio.to_thread(lambda: self.client.create_stream(StreamName="orders", ShardCount=shards))

    async def write(self, count: int, hash_key: int | None = None) -> list[str]:
        """So many records for all shards, or for the one with a hash key; answers their names."""
        extra = {} if hash_key is None else {"ExplicitHashKey": str(hash_key)}
        entries = [{"Data": b"x", "PartitionKey": f"key-{n}", **extra} for n in range(count)]
        answer = await asyncio.to_thread(lambda: self.client.put_records(StreamName="orders", Records=entries))
        return [f"kinesis {record['ShardId']}:{record['SequenceNumber']}" for record in answer["Records"]]


async def samples(daemon: Daemon, name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric, by those of its labels that are not of the mapping."""
    _, text = await daemon.get("/metrics")
    return {
        tuple(value for label, value in sample.labels.items() if label not in {"mapping", "function", "source"}):
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }  # fmt: skip


async def until(condition, seconds: float, what: str) -> None:
    """Look until an answer is true; the condition may be a coroutine function."""
    try:
        async with asyncio.timeout(seconds):
            while not (await found if inspect.isawaitable(found := condition()) else found):
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{what} has not happened in {seconds} s") from None


async def assert_nothing_lost(daemon: Daemon) -> None:
    assert not daemon.events("records_lost")
    assert not any((await samples(daemon, "poller_records_lost_total")).values())


async def unfinished(daemon: Daemon) -> str:
    """What a daemon that does not get on is doing."""
    if daemon.process.returncode is not None:
        return f"the daemon ended with {daemon.process.returncode}: {daemon.logs[-3:]}"
    [mapping] = await daemon.status()
    return f"{mapping['reason']} {[shard for shard in mapping['shards'] if shard['state'] != 'done']}"


def calls(aws: FakeAws, operation: str, outcome: str = "ok") -> int:
    return aws.calls[operation, outcome]


# --- (a)


async def test_twenty_thousand_records_over_rolling_shards_survive_three_kills(
    fake_aws, account, ledger, daemons
) -> None:
    """Each key in order, none missing, redeliveries within promise 4, although shards live for a second at most.

    The target fails one time in ten.
    """
    table, total, kills = Table(fake_aws, account, roots=8), 20_000, []
    rng = random.Random(20_000)
    ledger.rule = lambda _: 500 if rng.random() < 0.1 else None  # so that a kill finds lanes at different places
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(table.arn, ParallelizationFactor=4)))
    loop = asyncio.get_running_loop()

    async def produce() -> None:
        lines = table.open_shards()
        next_rolls = [loop.time() + rng.uniform(0.2, 1.0) for _ in lines]
        while len(table.names) < total:
            table.write(min(50, total - len(table.names)))
            for line, at in enumerate(next_rolls):
                if loop.time() >= at:
                    [lines[line]] = fake_aws.roll(table.arn, lines[line])
                    next_rolls[line] = loop.time() + rng.uniform(0.2, 1.0)
            await asyncio.sleep(0.03)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(produce())
        for goal in (total // 5, total // 2, 4 * total // 5):
            await daemon.start()
            await ledger.until(lambda goal=goal: len(ledger.deliveries) >= goal, 90, f"delivery number {goal}")
            await daemon.kill()
            kills.append(loop.time())
        await daemon.start()
    try:
        await ledger.until(lambda: len(ledger.deliveries) >= total, 60, "the last delivery")
    except AssertionError as error:
        raise AssertionError(f"{error}; {await unfinished(daemon)}") from None
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0
    table.assert_order(ledger)
    again = assert_within_promise(ledger, kills)
    assert not daemon.clean_logs()
    shards = len(fake_aws.shards(table.arn))
    assert shards > 100, "a listing of several pages"
    print(f"\n{total} records, {shards} shards, {len(kills)} kills, {again} delivered again ({again / total:.2%})")


# --- (b)


async def test_a_third_reader_and_expired_iterators_lose_nothing(fake_aws, account, ledger, daemons) -> None:
    """The daemon waits while two others read, asks for new iterators where it is, and delivers each record once."""
    table = Table(fake_aws, account)
    [shard] = table.open_shards()
    reader = client_of(fake_aws, account, "dynamodbstreams")
    ended = asyncio.Event()

    async def read() -> None:
        made = await asyncio.to_thread(
            lambda: reader.get_shard_iterator(StreamArn=table.arn, ShardId=shard, ShardIteratorType="TRIM_HORIZON")
        )
        iterator = made["ShardIterator"]
        while not ended.is_set():
            await asyncio.to_thread(lambda: reader.get_records(ShardIterator=iterator, Limit=1))
            await asyncio.sleep(0.1)

    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(table.arn, BatchSize=100)))
    async with asyncio.TaskGroup() as tasks:
        fake_aws.throttle(True)
        for _ in range(2):
            tasks.create_task(read())
        await until(lambda: calls(fake_aws, "GetRecords") > 2, 10, "reading by the others")
        table.write(1000)
        await daemon.start()
        await until(lambda: calls(fake_aws, "GetRecords", "LimitExceededException"), 20, "a throttle")
        assert not ledger.deliveries
        ended.set()
    await ledger.until(lambda: len(ledger.deliveries) == 1000, 30, "delivery after the throttles")
    for _ in range(3):
        before = calls(fake_aws, "GetRecords", "ExpiredIteratorException")
        fake_aws.expire(table.arn)
        table.write(500)
        await ledger.until(lambda: len(ledger.deliveries) == len(table.names), 30, "delivery after the expiry")
        assert calls(fake_aws, "GetRecords", "ExpiredIteratorException") == before + 1
    requests = await samples(daemon, "poller_poll_requests_total")
    assert requests["GetRecords", "throttled"] >= 1
    assert requests["GetRecords", "expired"] == 3
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0
    table.assert_order(ledger)
    assert not ledger.redelivered()


async def test_a_busy_kinesis_shard_is_shared(fake_aws, account, ledger, daemons) -> None:
    """Another consumer uses up the shard's five reads a second: throttles are waited out, nothing is lost or repeated."""
    stream = Stream(fake_aws, account)
    await stream.create(1)
    shard = "shardId-000000000000"
    made = await asyncio.to_thread(
        lambda: stream.client.get_shard_iterator(StreamName="orders", ShardId=shard, ShardIteratorType="TRIM_HORIZON")
    )
    greedy = client_of(fake_aws, account, "kinesis", attempts=1)
    ended = asyncio.Event()

    async def consume() -> None:
        while not ended.is_set():
            try:
                await asyncio.to_thread(lambda: greedy.get_records(ShardIterator=made["ShardIterator"], Limit=1))
            except greedy.exceptions.ProvisionedThroughputExceededException:
                await asyncio.sleep(0.01)

    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn)))
    fake_aws.throttle(True)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(consume())
        await daemon.start()
        names = await stream.write(400)
        await until(lambda: throttles(daemon), 30, "a throttle of the daemon")
        ended.set()
    await ledger.until(lambda: len(ledger.deliveries) == 400, 30, "delivery")
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0
    assert ledger.order[shard] == names
    assert not ledger.redelivered()


async def throttles(daemon: Daemon) -> float:
    """Reads of the daemon that were refused."""
    return (await samples(daemon, "poller_poll_requests_total")).get(("GetRecords", "throttled"), 0)


async def lost_by_shard(daemon: Daemon) -> dict[str, float]:
    return {shard: value for (shard,), value in (await samples(daemon, "poller_records_lost_total")).items() if value}


async def test_a_trim_that_overtakes_a_stopped_daemon_is_said(fake_aws, account, ledger, daemons) -> None:
    """DynamoDB: the position has left retention. Counted, an error names the shard, the rest is delivered."""
    table = Table(fake_aws, account)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(table.arn)))
    await daemon.start()
    done = table.write(50)
    await ledger.until(lambda: len(ledger.deliveries) == 50, 30, "the first delivery")
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0
    table.write(40)
    rest = table.write(10)
    [shard] = table.open_shards()
    fake_aws.trim(table.arn, records=90)
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 60, 30, "delivery of what is left")
    assert ledger.deliveries.keys() == {*done, *rest}
    assert await lost_by_shard(daemon) == {shard: 1}
    assert [(entry["level"], entry["shard"]) for entry in daemon.events("records_lost")] == [("error", shard)]
    assert await daemon.stop() == 0
    assert not ledger.redelivered()


async def test_a_trim_that_overtakes_a_blocked_batch_is_said(fake_aws, account, ledger, daemons) -> None:
    """Kinesis: the record that a restart should begin with has gone; AWS passes over it in silence, we do not."""
    stream = Stream(fake_aws, account)
    await stream.create(2)
    names = await stream.write(10, hash_key=0)
    ledger.rule = lambda _: 500
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn, BatchSize=5)))
    await daemon.start()
    await ledger.until(lambda: ledger.attempts[names[0]] >= 2, 30, "the second attempt")
    assert await daemon.stop() == 0
    ledger.rule = None
    shard = "shardId-000000000000"
    fake_aws.trim(stream.arn, shard, 3)
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 7, 30, "delivery of what is left")
    assert ledger.order[shard] == names[3:]
    assert await lost_by_shard(daemon) == {shard: 1}
    assert [(entry["level"], entry["shard"]) for entry in daemon.events("records_lost")] == [("error", shard)]
    assert await daemon.stop() == 0


async def test_a_kinesis_trim_that_overtakes_a_stopped_daemon_at_the_tip_is_said(
    fake_aws, account, ledger, daemons
) -> None:
    """All was done when it stopped; what was written and trimmed meanwhile is lost, and that is said."""
    stream = Stream(fake_aws, account)
    await stream.create(1)
    done = await stream.write(10)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn)))
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 10, 30, "the first delivery")
    assert await daemon.stop() == 0
    await stream.write(10)
    rest = await stream.write(10)
    shard = "shardId-000000000000"
    fake_aws.trim(stream.arn, shard, 20)
    with closing(sqlite3.connect(daemon.folder / "poller.db")) as store, store:
        store.execute("UPDATE shards SET updated_at = '2020-01-01 00:00:00'")  # stopped for longer than retention
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 20, 30, "delivery of what is left")
    assert ledger.order[shard] == done + rest
    assert await lost_by_shard(daemon) == {shard: 1}
    assert [(entry["level"], entry["shard"]) for entry in daemon.events("records_lost")] == [("error", shard)]


async def test_a_shard_that_expires_unread_is_said(fake_aws, account, ledger, daemons) -> None:
    """Its rest is lost and its child is read; a shard that was done and expires is nobody's loss."""
    table = Table(fake_aws, account, roots=2)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(table.arn)))
    await daemon.start()
    table.write(50)
    fake_aws.roll(table.arn)
    table.write(50)
    await ledger.until(lambda: len(ledger.deliveries) == 100, 30, "the first delivery")
    one, other = table.open_shards()
    assert await daemon.stop() == 0
    lost = table.write(50)
    fake_aws.roll(table.arn, one)
    in_other = set(lost) & table.names_in(other)
    table.write(50)
    fake_aws.vanish(table.arn)  # both first parents, which are done, and `one`, which is not
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) == 150 + len(in_other), 30, "delivery of what is left")
    await until(lambda: lost_by_shard(daemon), 20, "the loss")
    assert set(table.names) - ledger.deliveries.keys() == set(lost) - in_other
    assert await lost_by_shard(daemon) == {one: 1}
    assert [(entry["level"], entry["shard"]) for entry in daemon.events("records_lost")] == [("error", one)]
    assert await daemon.stop() == 0
    assert not ledger.redelivered()


async def test_a_generation_that_nobody_saw_is_said(fake_aws, account, ledger, daemons) -> None:
    """A shard that was made and expired while the daemon was away: its child's parent is neither listed nor stored."""
    table = Table(fake_aws, account)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(table.arn)))
    await daemon.start()
    table.write(10)
    await ledger.until(lambda: len(ledger.deliveries) == 10, 30, "the first delivery")
    fake_aws.refuse("DescribeStream", "LimitExceededException")
    fake_aws.roll(table.arn)
    await daemon.until_logged("shard_ended")
    await daemon.kill()  # the end is stored, the child is not: it could not be listed
    fake_aws.refuse("DescribeStream", None)
    table.write(10)
    fake_aws.roll(table.arn)
    rest = table.write(10)
    fake_aws.vanish(table.arn)
    await daemon.start()
    await ledger.until(lambda: set(rest) <= ledger.deliveries.keys(), 30, "delivery of what is left")
    assert len(ledger.deliveries) == 20
    assert sum((await lost_by_shard(daemon)).values()) == 1


async def test_no_loss_is_said_when_nothing_is_lost(fake_aws, account, ledger, daemons) -> None:
    """Restarts, a kill, rolls, expired iterators, expired shards that are done, and trims of what is done."""
    table = Table(fake_aws, account, roots=2)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(table.arn, ParallelizationFactor=2)))

    async def deliver() -> None:
        table.write(100)
        await ledger.until(lambda: len(ledger.deliveries) == len(table.names), 30, "delivery")

    for ending in (daemon.stop, daemon.kill, daemon.stop):
        await daemon.start()
        await deliver()
        fake_aws.trim(table.arn)
        await deliver()
        fake_aws.expire(table.arn)
        fake_aws.roll(table.arn)
        await deliver()
        fake_aws.vanish(table.arn)
        await assert_nothing_lost(daemon)
        await ending()
    await daemon.start()
    await deliver()
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0
    table.assert_order(ledger)


# --- (c)


async def test_latest_survives_a_restart_before_the_first_record(fake_aws, account, ledger, daemons) -> None:
    """What was there before the mapping never comes; what came while the daemon was dead does, over a roll too."""
    clock = fake_aws.clock
    table = Table(fake_aws, account, roots=2)
    fake_aws.clock = lambda: clock() - 60
    table.write(20)
    fake_aws.clock = clock
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(table.arn, StartingPosition="LATEST")))
    await daemon.start()
    await until(lambda: calls(fake_aws, "GetRecords") >= 2, 20, "the first reads")
    await daemon.kill()
    wanted = table.write(20)
    fake_aws.roll(table.arn)
    wanted += table.write(20)
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) >= 40, 30, "delivery of what came meanwhile")
    assert ledger.deliveries.keys() == set(wanted)
    await daemon.kill()
    wanted += table.write(20)
    await daemon.start()
    await ledger.until(lambda: ledger.deliveries.keys() >= set(wanted), 30, "delivery after the second kill")
    assert ledger.deliveries.keys() == set(wanted)
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0


# --- (d)


async def test_empty_pages_while_behind_are_read_on(fake_aws, account, ledger, daemons) -> None:
    """The lag is shown meanwhile, and every record comes."""
    stream = Stream(fake_aws, account)
    await stream.create(2)
    names = await stream.write(300)
    fake_aws.empty(stream.arn, pages=10)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn)))
    await daemon.start()

    async def lags() -> bool:
        return any(value > 0 for value in (await samples(daemon, "poller_behind_latest_seconds")).values())

    await until(lags, 20, "a lag")
    await ledger.until(lambda: len(ledger.deliveries) == 300, 30, "delivery")
    assert ledger.deliveries.keys() == set(names)
    assert calls(fake_aws, "GetRecords") >= 22
    await until(lambda: caught_up(daemon), 20, "the tip")
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0


async def caught_up(daemon: Daemon) -> bool:
    return not any((await samples(daemon, "poller_behind_latest_seconds")).values())


# --- (e)


async def test_a_merged_shard_waits_for_both_parents(fake_aws, account, ledger, daemons) -> None:
    """One parent is done, the other is blocked by its target: no record of the child until that one is done too."""
    stream = Stream(fake_aws, account)
    await stream.create(2)
    good, bad = await stream.write(20, hash_key=0), await stream.write(20, hash_key=2**128 - 1)
    one, two, child = (f"shardId-{n:012d}" for n in range(3))
    merge = {"StreamName": "orders", "ShardToMerge": one, "AdjacentShardToMerge": two}
    await asyncio.to_thread(lambda: stream.client.merge_shards(**merge))
    late = await stream.write(20)
    is_repaired = asyncio.Event()
    ledger.rule = lambda records: (
        500 if any(Ledger.shard(record) == two for record in records) and not is_repaired.is_set() else None
    )
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn)))
    await daemon.start()
    await daemon.until_logged("shard_ended")
    await ledger.until(lambda: ledger.attempts[bad[0]] >= 4, 30, "the fourth attempt")
    states = {entry["id"]: entry["state"] for [mapping] in [await daemon.status()] for entry in mapping["shards"]}
    assert states == {one: "done", two: "ending", child: "blocked"}
    assert ledger.deliveries.keys() == set(good)
    is_repaired.set()
    await ledger.until(lambda: len(ledger.deliveries) == 60, 30, "delivery of the child")
    assert ledger.order == {one: good, two: bad, child: late}
    parents_done = max(ledger.deliveries[name][0].at for name in good + bad)
    assert parents_done < min(ledger.deliveries[name][0].at for name in late)
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0
    assert not ledger.redelivered()
