"""`poller checkpoints` as a process beside the real daemon: what is moved is what is delivered again, and no more."""

import asyncio
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fakes.aws import FakeAws
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import config, stream_of
from tests.integration.test_streams_on_fake import Stream, until

pytestmark = pytest.mark.integration

SECONDS = 40.0
SHARDS = [f"shardId-{n:012}" for n in range(2)]


@dataclass
class Ended:
    """What the command left behind."""

    code: int
    out: str
    err: str

    @property
    def audit(self) -> list[dict[str, Any]]:
        """The lines that say who moved what."""
        return [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]


async def checkpoints(path: Path, *arguments: str) -> Ended:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "poller", "checkpoints", *arguments, "-c", str(path),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )  # fmt: skip
    async with asyncio.timeout(SECONDS):
        out, err = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return Ended(process.returncode, out.decode(), err.decode())


async def order(daemon: Daemon, verb: str, state: str) -> None:
    """Pause or resume the only mapping, and wait until it is."""
    url = f"http://127.0.0.1:{daemon.port}/api/mappings/f/{verb}"
    async with aiohttp.ClientSession() as http, http.post(url, json={}) as answer:
        assert answer.status == 200, await answer.text()

    async def is_there() -> bool:
        [mapping] = await daemon.status()
        return mapping["state"] == state

    await until(is_there, SECONDS, state)


class World:
    """A stream of two shards on the fake, a daemon, and its target's ledger."""

    def __init__(self, aws: FakeAws, account: str, ledger: Ledger, daemons: Any, **more: Any) -> None:
        self.stream = Stream(aws, account)
        self.ledger = ledger
        self.daemon: Daemon = daemons(config(aws, ledger, stream_of(self.stream.arn, BatchSize=5, **more)))
        self.names: dict[str, list[str]] = {shard: [] for shard in SHARDS}

    async def write(self, count: int) -> None:
        """So many more in each shard."""
        for shard, key in zip(SHARDS, ("0", str(2**128 - 1)), strict=True):
            names = await self.stream.write(count, int(key))
            assert all(f" {shard}:" in name for name in names)
            self.names[shard] += names

    def sequences(self, shard: str) -> list[str]:
        return [name.rpartition(":")[2] for name in self.names[shard]]

    async def times(self, expected: Counter[str]) -> None:
        """Every record was delivered exactly so often: a last one in each shard shows that nothing else is to come."""
        await self.write(1)
        expected = expected + Counter(names[-1] for names in self.names.values())
        found = self.ledger.deliveries
        await self.ledger.until(lambda: len(found) == len(expected), SECONDS, "the last delivery")
        assert Counter({name: len(deliveries) for name, deliveries in found.items()}) == expected

    async def is_stored(self) -> bool:
        """Every shard stands behind its last record in the store."""
        [mapping] = json.loads((await checkpoints(self.daemon.path, "list", "f", "--json")).out)
        return {shard["shard"]: shard["position"]["value"] for shard in mapping["shards"]} == {
            shard: self.sequences(shard)[-1] for shard in SHARDS
        }

    @property
    def once(self) -> Counter[str]:
        return Counter(name for names in self.names.values() for name in names)

    async def delivered(self, count: int) -> None:
        """That many in each shard, written and delivered."""
        await self.stream.create(2)
        await self.write(count)
        await self.daemon.start()
        await self.ledger.until(lambda: self.ledger.deliveries.keys() == self.once.keys(), SECONDS, "delivery")


@pytest.fixture
def world(fake_aws: FakeAws, account: str, ledger: Ledger, daemons) -> World:
    return World(fake_aws, account, ledger, daemons)


async def test_a_paused_shard_set_back_delivers_exactly_those_again(world: World) -> None:
    """By some records, or behind one, beside the running daemon; the other shard repeats nothing."""
    daemon, path = world.daemon, world.daemon.path
    await world.delivered(20)
    await order(daemon, "pause", "Disabled")
    sequences = world.sequences(SHARDS[0])
    done = await checkpoints(path, "set", "f", SHARDS[0], "--sequence", sequences[13])
    assert done.code == 0, done.err
    assert done.out.endswith("1 position changed\n")
    [line] = done.audit
    assert (line["event"], line["shard"], line["function"]) == ("position_moved", SHARDS[0], "f")
    assert line["was"] == f"AFTER_SEQUENCE_NUMBER {sequences[-1]}"
    assert line["now"] == f"AT_SEQUENCE_NUMBER {sequences[13]}"
    assert line["by"]
    assert line["timestamp"].endswith("Z")
    await order(daemon, "resume", "Enabled")
    expected = world.once + Counter(world.names[SHARDS[0]][13:])
    await world.times(expected)
    expected += Counter(names[-1] for names in world.names.values())
    await order(daemon, "pause", "Disabled")
    assert (await checkpoints(path, "set", "f", SHARDS[1], "--after", world.sequences(SHARDS[1])[17])).code == 0
    await order(daemon, "resume", "Enabled")
    await world.times(expected + Counter(world.names[SHARDS[1]][18:]))
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()
    assert not daemon.events("records_lost")


async def test_a_running_mapping_is_looked_at_but_not_touched(world: World, tmp_path: Path) -> None:
    """Exit 2 and what to do instead; nothing is disturbed."""
    daemon, path = world.daemon, world.daemon.path
    await world.delivered(10)
    await until(world.is_stored, SECONDS, "the last checkpoint")
    listed = await checkpoints(path, "list")
    assert listed.code == 0
    assert all(f"  {shard}  AFTER_SEQUENCE_NUMBER " in listed.out for shard in SHARDS)
    assert "owner " in listed.out
    row = await checkpoints(path, "get", "f", SHARDS[0])
    assert json.loads(row.out)["position"]["value"] == world.sequences(SHARDS[0])[-1]
    exported = tmp_path / "exported.json"
    exported.write_text((await checkpoints(path, "export")).out)
    for arguments in (
        ["set", "f", SHARDS[0], "--trim-horizon"],
        ["reset", "f"],
        ["import", str(exported), "--overwrite"],
    ):
        refused = await checkpoints(path, *arguments)
        assert (refused.code, refused.out, refused.audit) == (2, "", [])
        assert "poller pause" in refused.err
        assert "poller seek" in refused.err
    await world.times(world.once)
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()


async def test_exported_positions_move_to_another_store(world: World, tmp_path: Path) -> None:
    """No loss and no repeat: what came while nothing ran is delivered, what was delivered is not."""
    daemon, path = world.daemon, world.daemon.path
    await world.delivered(12)
    assert await daemon.stop() == 0
    exported = tmp_path / "exported.json"
    exported.write_text((await checkpoints(path, "export", "f")).out)
    for file in tmp_path.glob("poller.db*"):
        file.unlink()
    await world.write(8)
    done = await checkpoints(path, "import", str(exported))
    assert done.code == 0, done.err
    assert done.out.endswith("2 positions changed\n")
    assert {line["shard"] for line in done.audit} == set(SHARDS)
    assert {line["was"] for line in done.audit} == {"none"}
    again = await checkpoints(path, "import", str(exported))
    assert again.code == 2
    assert "--overwrite" in again.err
    await daemon.start()
    await world.times(world.once)
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()
    assert not daemon.events("stream_replaced")


async def test_the_owner_of_a_killed_daemon_is_no_obstacle(world: World) -> None:
    """Its leases stand in the rows for ever; nobody holds the store, so a position is moved, to the end too."""
    daemon, path = world.daemon, world.daemon.path
    await world.delivered(10)
    await until(world.is_stored, SECONDS, "the last checkpoint")
    await daemon.kill()
    assert "owner " in (await checkpoints(path, "list")).out
    sequences = world.sequences(SHARDS[0])
    done = await checkpoints(path, "set", "f", SHARDS[0], "--sequence", sequences[4])
    assert done.code == 0, done.err
    assert json.loads((await checkpoints(path, "get", "f", SHARDS[0])).out)["owner"] is None
    await daemon.start()
    await world.times(world.once + Counter(world.names[SHARDS[0]][4:]))
    await daemon.kill()
    assert (await checkpoints(path, "set", "f", SHARDS[1], "--end")).code == 0
    await daemon.start()
    before = len(world.ledger.deliveries)
    await world.write(1)
    await world.ledger.until(lambda: len(world.ledger.deliveries) == before + 1, SECONDS, "one more")
    [mapping] = await daemon.status()
    assert {shard["id"]: shard["state"] for shard in mapping["shards"]} == {SHARDS[0]: "running", SHARDS[1]: "done"}
    assert await daemon.stop() == 0


@pytest.mark.parametrize("is_running", [True, False], ids=["paused", "stopped"])
async def test_a_reset_mapping_begins_at_its_starting_position(world: World, is_running: bool) -> None:
    """All is delivered once more, whether the daemon runs meanwhile or not; it did not notice anything."""
    daemon, path = world.daemon, world.daemon.path
    await world.delivered(10)
    if is_running:
        await order(daemon, "pause", "Disabled")
    else:
        assert await daemon.stop() == 0
    done = await checkpoints(path, "reset", "f")
    assert (done.code, done.out.splitlines()[-1]) == (0, "2 positions changed"), done.err
    assert {line["now"] for line in done.audit} == {"none"}
    assert "no positions yet; it begins at TRIM_HORIZON" in (await checkpoints(path, "list")).out
    if is_running:
        await order(daemon, "resume", "Enabled")
    else:
        await daemon.start()
    await world.times(world.once + world.once)
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()
    assert not daemon.events("lease_lost")


async def test_a_mapping_taken_out_of_the_file_is_reset_beside_the_daemon(world: World) -> None:
    """Its positions are kept until then, and found by its UUID."""
    daemon, path = world.daemon, world.daemon.path
    await world.delivered(5)
    [mapping] = await daemon.status()
    text = path.read_text()
    path.write_text(text.replace("FunctionName: f", "FunctionName: g").replace("f:\n", "g:\n"))
    await daemon.until_logged("config_reloaded")

    async def is_released() -> bool:
        found = json.loads((await checkpoints(path, "list", mapping["uuid"], "--json")).out)
        return found[0]["enabled"] is None and not any(shard["owner"] for shard in found[0]["shards"])

    await until(is_released, SECONDS, "the old mapping's end")
    done = await checkpoints(path, "reset", mapping["uuid"])
    assert (done.code, done.out.splitlines()[-1]) == (0, "2 positions changed"), done.err
    gone = await checkpoints(path, "list", mapping["uuid"])
    assert gone.code == 2
    assert f"there is no mapping {mapping['uuid']}" in gone.err
    assert await daemon.stop() == 0
