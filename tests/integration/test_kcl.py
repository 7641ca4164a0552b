"""Positions out of a KCL lease table, and in a store in DynamoDB: what is delivered after them, and nothing else."""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from tests.fakes.aws import FakeAws
from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_checkpoints import SECONDS, SHARDS, Ended, World, checkpoints, order
from tests.integration.test_daemon import config, stream_of
from tests.integration.test_streams_on_fake import Stream, Table, until

pytestmark = pytest.mark.integration

LOW, HIGH = 0, 2**128 - 1


class Leases:
    """A lease table on MiniStack, as KCL makes it."""

    def __init__(self, url: str, account: str) -> None:
        self.url = url
        self.client = boto3.client(
            "dynamodb", region_name=REGION, endpoint_url=url, aws_access_key_id=account, aws_secret_access_key="secret"
        )
        self.client.create_table(
            TableName="app",
            KeySchema=[{"AttributeName": "leaseKey", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "leaseKey", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )

    def put(self, shard: str, checkpoint: str, sub: int = 0, **more: Any) -> None:
        """One lease."""
        item = {
            "leaseKey": {"S": shard},
            "leaseCounter": {"N": "7"},
            "checkpoint": {"S": checkpoint},
            "checkpointSubSequenceNumber": {"N": str(sub)},
            **more,
        }
        self.client.put_item(TableName="app", Item=item)

    def items(self) -> list[dict[str, Any]]:
        return sorted(self.client.scan(TableName="app")["Items"], key=lambda item: item["leaseKey"]["S"])


@pytest.fixture
def leases(ministack: str, account: str) -> Leases:
    return Leases(ministack, account)


def sequence(name: str) -> str:
    return name.rpartition(":")[2].rpartition(" ")[2]


async def import_kcl(path: Path, leases: Leases, *more: str) -> Ended:
    return await checkpoints(path, "import", "--kcl", "app", "--endpoint-url", leases.url, *more)


Daemons = Callable[[dict[str, Any]], Daemon]


async def exactly(ledger: Ledger, expected: set[str]) -> None:
    """These were delivered, once each, and nothing else."""
    await ledger.until(lambda: expected <= ledger.deliveries.keys(), SECONDS, "delivery")
    assert {name: len(found) for name, found in ledger.deliveries.items()} == dict.fromkeys(expected, 1)


async def test_a_kinesis_application_is_taken_over(
    fake_aws: FakeAws, account: str, ledger: Ledger, daemons: Daemons, leases: Leases
) -> None:
    """Across a split whose parent's lease KCL has deleted: only what it had not processed comes, and half an aggregate."""
    stream = Stream(fake_aws, account)
    await stream.create(2)
    daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn)))
    await stream.write(5, LOW)  # processed: the lease is gone
    high = await stream.write(6, HIGH)
    split = {"StreamName": "orders", "ShardToSplit": SHARDS[0], "NewStartingHashKey": str(2**126)}
    await asyncio.to_thread(lambda: stream.client.split_shard(**split))
    left, right = await stream.write(4, LOW), await stream.write(4, 2**126)
    leases.put(left[0].split()[1].split(":")[0], sequence(left[1]))
    leases.put(right[0].split()[1].split(":")[0], sequence(right[2]), 3)
    leases.put(SHARDS[1], sequence(high[-1]))
    leases.client.put_item(TableName="app", Item={"leaseKey": {"S": "x"}, "entityType": {"S": "STREAM"}})
    before = leases.items()
    dry = await import_kcl(daemon.path, leases, "--dry-run")
    assert (dry.code, dry.out.splitlines()[-1], dry.audit) == (0, "4 positions would be changed", []), dry.err
    assert not list(daemon.folder.glob("poller.db*"))
    done = await import_kcl(daemon.path, leases)
    assert (done.code, done.out.splitlines()[-1]) == (0, "4 positions changed"), done.err
    assert {line["was"] for line in done.audit} == {"none"}
    assert {line["shard"]: line["now"] for line in done.audit}[SHARDS[0]] == "SHARD_END"
    assert f"{SHARDS[0]}: KCL has deleted the lease; taken as read to the end" in done.err
    assert "inside an aggregated record" in done.err
    assert leases.items() == before, "the table is only read"
    again = await import_kcl(daemon.path, leases)
    assert (again.code, "--overwrite" in again.err) == (2, True)
    assert (await import_kcl(daemon.path, leases, "--overwrite")).out.splitlines()[-1] == "0 positions changed"
    await daemon.start()
    more = [*await stream.write(2, LOW), *await stream.write(2, HIGH)]
    await exactly(ledger, {*left[2:], *right[2:], *more})
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()
    assert not daemon.events("records_lost")
    assert not daemon.events("stream_replaced")


async def test_an_application_on_a_tables_stream_is_taken_over(
    fake_aws: FakeAws, account: str, ledger: Ledger, daemons: Daemons, leases: Leases
) -> None:
    """The adapter's leases: what is finished and deleted stays done, a shard it never saw is read whole."""
    table = Table(fake_aws, account)
    table.write(5)
    fake_aws.roll(table.arn)
    middle = table.write(6)
    [current] = table.open_shards()
    leases.put(current, sequence(middle[1]))
    fake_aws.roll(table.arn)
    last = table.write(3)
    daemon = daemons(config(fake_aws, ledger, stream_of(table.arn, StartingPosition="LATEST")))
    done = await import_kcl(daemon.path, leases)
    assert (done.code, done.out.splitlines()[-1]) == (0, "2 positions changed"), done.err
    assert "KCL has no lease yet; to be read from TRIM_HORIZON" in done.err
    await daemon.start()
    await exactly(ledger, {*middle[2:], *last})
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()
    assert not daemon.events("records_lost")


async def test_what_cannot_be_taken_over_is_refused(
    fake_aws: FakeAws, account: str, ledger: Ledger, daemons: Daemons, leases: Leases, tmp_path: Path
) -> None:
    """Exit 2, a sentence with the table's name, and no store comes to be."""
    stream = Stream(fake_aws, account)
    await stream.create(2)
    daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn)))

    async def refused(text: str, *more: str) -> None:
        ended = await import_kcl(daemon.path, leases, *more)
        assert (ended.code, ended.out, ended.audit) == (2, "", []), ended.err
        assert text in ended.err
        assert "app" in ended.err

    await refused("it has no leases")
    leases.put(SHARDS[0], "123")
    await refused("does not have the record that KCL stands at")
    leases.put(SHARDS[0], "TRIM_HORIZON")
    leases.put("shardId-000000000077", "TRIM_HORIZON")
    await refused("shardId-000000000077: KCL is not done with it")
    await refused("there is no mapping nobody", "--mapping", "nobody")
    leases.client.put_item(TableName="app", Item={"leaseKey": {"S": "y"}, "scope": {"S": "mapping/1"}})
    await refused("the store of a poller")
    leases.client.delete_table(TableName="app")
    await refused("it does not exist")
    misplaced = await checkpoints(daemon.path, "import", "x.json", "--region", REGION)
    assert (misplaced.code, "--region: belongs to --kcl" in misplaced.err) == (2, True)
    assert not list(tmp_path.glob("poller.db*"))


async def test_a_running_application_is_refused(
    fake_aws: FakeAws, account: str, ledger: Ledger, daemons: Daemons, leases: Leases
) -> None:
    """Its leases are renewed; with --force they are taken as they stand."""
    stream = Stream(fake_aws, account)
    await stream.create(1)
    daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn)))
    leases.put(SHARDS[0], "TRIM_HORIZON", leaseOwner={"S": "worker-1"})
    is_over = asyncio.Event()

    async def renew() -> None:
        for counter in range(8, 10_000):
            leases.put(SHARDS[0], "TRIM_HORIZON", leaseOwner={"S": "worker-1"}, leaseCounter={"N": str(counter)})
            try:
                async with asyncio.timeout(0.1):
                    await is_over.wait()
            except TimeoutError:
                continue
            return

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(renew())
        ended = await import_kcl(daemon.path, leases)
        forced = await import_kcl(daemon.path, leases, "--force")
        is_over.set()
    assert (ended.code, "being changed by worker-1; stop it first" in ended.err) == (2, True), ended.err
    assert (forced.code, forced.out.splitlines()[-1]) == (0, "1 position changed"), forced.err


# --- a store in DynamoDB


@pytest.fixture
def shared(fake_aws: FakeAws, account: str, ledger: Ledger, daemons: Daemons, ministack: str) -> World:
    store = f"dynamodb://positions?create=true&endpoint_url={ministack}"
    return World(fake_aws, account, ledger, lambda document: daemons({**document, "store": store, "lease_seconds": 2}))


async def test_positions_in_dynamodb_are_looked_at_and_moved(shared: World, tmp_path: Path) -> None:
    """list, get, set, export, import and reset beside a daemon that pauses; while it runs they only look."""
    daemon, path = shared.daemon, shared.daemon.path
    await shared.delivered(10)
    await until(shared.is_stored, SECONDS, "the last checkpoint")
    refused = await checkpoints(path, "set", "f", SHARDS[0], "--trim-horizon")
    assert (refused.code, "poller pause" in refused.err) == (2, True), refused.err
    await order(daemon, "pause", "Disabled")
    names, sequences = shared.names[SHARDS[0]], shared.sequences(SHARDS[0])
    assert (await checkpoints(path, "set", "f", SHARDS[0], "--sequence", sequences[6])).code == 0
    row = json.loads((await checkpoints(path, "get", "f", SHARDS[0])).out)
    assert row["position"] == {"kind": "AT_SEQUENCE_NUMBER", "value": sequences[6]}
    exported = tmp_path / "exported.json"
    exported.write_text((await checkpoints(path, "export", "f")).out)
    gone = await checkpoints(path, "reset", "f")
    assert (gone.code, gone.out.splitlines()[-1]) == (0, "2 positions changed"), gone.err
    assert "no positions yet" in (await checkpoints(path, "list")).out
    back = await checkpoints(path, "import", str(exported))
    assert (back.code, back.out.splitlines()[-1]) == (0, "2 positions changed"), back.err
    await order(daemon, "resume", "Enabled")
    expected = shared.once
    expected.update(names[6:])
    await shared.times(expected)
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()
    assert not daemon.events("records_lost")


@pytest.mark.parametrize("is_killed", [False, True], ids=["stopped", "killed"])
async def test_positions_in_dynamodb_of_a_daemon_that_is_gone(shared: World, is_killed: bool) -> None:
    """Nobody beats any more: an enabled mapping is moved, whoever stands in the rows as its owner."""
    daemon, path = shared.daemon, shared.daemon.path
    await shared.delivered(10)
    await until(shared.is_stored, SECONDS, "the last checkpoint")
    if is_killed:
        await daemon.kill()
    else:
        assert await daemon.stop() == 0
    done = await checkpoints(path, "set", "f", SHARDS[1], "--sequence", shared.sequences(SHARDS[1])[8])
    assert done.code == 0, done.err
    await daemon.start()
    expected = shared.once
    expected.update(shared.names[SHARDS[1]][8:])
    await shared.times(expected)
    assert await daemon.stop() == 0


async def test_a_batch_kept_in_dynamodb_is_redriven(shared: World) -> None:
    """`poller redrive` finds it in the daemon's own store, beside the daemon, and takes it out when it is delivered."""
    daemon, ledger = shared.daemon, shared.ledger
    document = stream_of(shared.stream.arn, BatchSize=5, MaximumRetryAttempts=0)
    daemon.write({**_read(daemon.path), "event_source_mappings": [document]})
    is_down = True
    ledger.rule = lambda _: 500 if is_down else None
    await shared.stream.create(2)
    await shared.write(5)
    await daemon.start()
    await daemon.until_logged("records_discarded")
    await until(lambda: _lists(daemon.path, 10), SECONDS, "both shards' batches")
    is_down = False
    code, out = await _redrive(daemon.path)
    assert code == 0, out
    assert ledger.deliveries.keys() == shared.once.keys()
    assert await _lists(daemon.path, 0)
    assert await daemon.stop() == 0


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


async def _redrive(path: Path, *arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "poller", "redrive", *arguments, "-c", str(path),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(SECONDS):
        out, _ = await process.communicate()
    return process.returncode, out.decode()


async def _lists(path: Path, records: int) -> bool:
    """The store keeps so many records in its batches."""
    _, out = await _redrive(path, "--list", "--json")
    return sum(json.loads(line)["records"] for line in out.splitlines() if line.startswith("{")) == records
