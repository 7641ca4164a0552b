"""`poller run --workers N`: several processes, one store, one port, one config file; killed one by one and all at once."""

import asyncio
import fcntl
import os
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import boto3
import pytest
from aiohttp import web

from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import assert_order, assert_within_promise, config, stream_of
from tests.integration.test_streams_on_fake import Stream, samples, until

pytestmark = pytest.mark.integration

SHARDS = 8
WORKING = {"starting", "running", "ending", "draining"}


class World:
    """A stream of eight shards and a daemon of some workers."""

    def __init__(self, aws: Any, account: str, ledger: Ledger, daemons: Any, workers: int = 2, **more: Any) -> None:
        self.stream = Stream(aws, account)
        self.ledger = ledger
        mappings = more.pop("mappings", [stream_of(self.stream.arn)])
        self.daemon: Daemon = daemons({**config(aws, ledger, *mappings), **more})
        self.daemon.arguments = ["--workers", str(workers)]
        self.written: set[str] = set()
        self.workers = workers

    async def start(self) -> None:
        await self.stream.create(SHARDS)
        await self.daemon.start()

    async def write(self, count: int) -> None:
        self.written |= set(await self.stream.write(count))

    async def delivered(self) -> None:
        await self.ledger.until(lambda: self.written <= self.ledger.deliveries.keys(), 30, "everything delivered")

    async def status(self) -> dict[str, Any]:
        [mapping] = await self.daemon.status()
        return mapping

    async def spread(self) -> Counter[str]:
        """How many shards each worker reads."""
        mapping = await self.status()
        return Counter(shard["owner"] for shard in mapping["shards"] if shard["state"] in WORKING)

    async def is_even(self) -> bool:
        return sorted((await self.spread()).values()) == [SHARDS // self.workers] * self.workers

    def pids(self) -> dict[int, int]:
        """The processes that are the daemon's children, by worker."""
        return {entry["worker"]: entry["pid"] for entry in self.daemon.events("worker_started")}


@asynccontextmanager
async def target(handle: Any) -> AsyncIterator[str]:
    """The URL of a function of the test's own."""
    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


@pytest.fixture
def world(fake_aws, account, ledger, daemons):
    def make(**more: Any) -> World:
        return World(fake_aws, account, ledger, daemons, **more)

    return make


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_two_workers_share_a_stream_and_look_like_one_daemon(world) -> None:
    """Four shards each, every record once and in order; metrics are sums, status one document, a stop repeats nothing."""
    made: World = world()
    await made.start()
    await until(made.is_even, 15, "an even share")
    for _ in range(4):
        await made.write(500)
        await made.delivered()
    assert not made.ledger.redelivered()
    assert_order(made.ledger)
    daemon, total = made.daemon, float(len(made.written))

    async def all_counted() -> bool:
        return sum((await samples(daemon, "poller_invoked_events_total")).values()) == total

    await until(all_counted, 10, "everything counted")  # the target has a record before its answer is read
    assert sum((await samples(daemon, "poller_invocations_total")).values()) == sum(
        (await samples(daemon, "poller_batch_size_events_count")).values()
    )
    assert (await samples(daemon, "poller_shards"))["running",] == SHARDS
    assert (await samples(daemon, "poller_leases")) == {
        ("owned",): SHARDS, ("other",): 0.0, ("free",): 0.0, ("expired",): 0.0
    }  # fmt: skip
    assert len(await samples(daemon, "poller_build_info")) == 1
    assert (await samples(daemon, "poller_iterator_age_seconds")).keys() == {
        (s["id"],) for s in (await made.status())["shards"]
    }
    assert await daemon.get("/healthz") == (200, "ok\n")
    assert await daemon.get("/readyz") == (200, "ready\n")
    assert (await daemon.get("/"))[0] == 200
    mapping = await made.status()
    assert len(mapping["shards"]) == SHARDS
    assert mapping["last_result"] == "OK"
    await until(lambda: _settled(made), 10, "all positions saved")
    assert await daemon.stop() == 0
    assert not daemon.clean_logs()
    daemon.logs.clear()
    await daemon.start()
    await made.write(100)
    await made.delivered()
    assert not made.ledger.redelivered()
    assert await daemon.stop() == 0


async def _settled(made: World) -> bool:
    return (await made.status())["in_flight"] == 0


async def test_what_the_api_is_told_holds_for_all_workers(world) -> None:
    """Created, resumed and deleted through boto3, paused: every worker follows, errors are AWS's, logs say who it was."""
    made: World = world(mappings=[])
    await made.start()
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y"}
    url = f"http://127.0.0.1:{made.daemon.port}"
    api = await asyncio.to_thread(lambda: boto3.client("lambda", region_name=REGION, endpoint_url=url, **keys))
    uuid = (await asyncio.to_thread(lambda: api.create_event_source_mapping(**stream_of(made.stream.arn))))["UUID"]
    await until(made.is_even, 20, "an even share")
    await made.write(400)
    await made.delivered()
    with pytest.raises(api.exceptions.ResourceConflictException, match="already exists"):
        await asyncio.to_thread(lambda: api.create_event_source_mapping(**stream_of(made.stream.arn)))
    found = await asyncio.to_thread(lambda: api.list_event_source_mappings(FunctionName="f")["EventSourceMappings"])
    assert [mapping["UUID"] for mapping in found] == [uuid]
    await asyncio.to_thread(lambda: api.tag_resource(Resource=found[0]["EventSourceMappingArn"], Tags={"a": "b c"}))
    tags = await asyncio.to_thread(lambda: api.list_tags(Resource=found[0]["EventSourceMappingArn"]))
    assert tags["Tags"] == {"a": "b c"}
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{url}/api/mappings/f/pause") as answer:
            assert (answer.status, (await answer.json())["uuid"]) == (200, uuid)
            request_id = answer.headers["x-amzn-RequestId"]
        async with http.put(f"{url}/2015-03-31/event-source-mappings") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD,POST")
    [paused] = made.daemon.events("mapping_paused")
    assert (paused["by"], paused["request_id"]) == ("local from 127.0.0.1", request_id)
    await until(lambda: _has_state(made, "Disabled"), 10, "a pause of all")
    await made.write(200)
    seen = len(made.ledger.deliveries)
    await asyncio.to_thread(lambda: api.update_event_source_mapping(UUID=uuid, Enabled=True))
    assert len(made.ledger.deliveries) == seen
    await made.delivered()
    assert not made.ledger.redelivered()
    await asyncio.to_thread(lambda: api.delete_event_source_mapping(UUID=uuid))
    await until(lambda: _is_gone(made), 20, "the end of the mapping")
    assert await made.daemon.stop() == 0
    assert not made.daemon.clean_logs()


async def _has_state(made: World, state: str) -> bool:
    return (await made.status())["state"] == state


async def _is_gone(made: World) -> bool:
    return not await made.daemon.status()


async def test_a_worker_that_is_killed_is_replaced_and_missed_by_nobody(world) -> None:
    """Its shards go on within seconds, far sooner than a lease expires; counters do not fall."""
    made: World = world(lease_seconds=60)
    await made.start()
    await until(made.is_even, 15, "an even share")
    await made.write(500)
    await made.delivered()
    before = sum((await samples(made.daemon, "poller_invoked_events_total")).values())
    kills = [asyncio.get_running_loop().time()]
    os.kill(made.pids()[1], signal.SIGKILL)
    await made.write(400)
    await made.ledger.until(lambda: made.written <= made.ledger.deliveries.keys(), 8, "a take-over")
    [died] = made.daemon.events("worker_died")
    assert died["worker"] == 1
    assert "signal 9" in died["reason"]
    await until(lambda: _is_up(made, 3), 10, "another worker")
    assert sum((await samples(made.daemon, "poller_invoked_events_total")).values()) >= before + 400 - 100
    assert_within_promise(made.ledger, kills)
    assert_order(made.ledger)
    await until(made.is_even, 100, "an even share again")
    assert await made.daemon.stop() == 0


async def _is_up(made: World, started: int) -> bool:
    return len(made.daemon.events("worker_started")) == started and (await made.daemon.get("/healthz"))[0] == 200


async def test_the_daemon_that_is_killed_takes_its_workers_along(world) -> None:
    """They end within seconds, and hold the store until then; the next daemon goes on at once where they stopped."""
    before = folders()
    made: World = world(lease_seconds=60)
    await made.start()
    await until(made.is_even, 15, "an even share")
    await made.write(500)
    await made.delivered()
    pids = list(made.pids().values())
    with (made.daemon.folder / "poller.db-lock").open() as file:
        made.daemon.send(signal.SIGKILL)
        await until(lambda: is_free(file.fileno()), 5, "the end of the workers")
        assert not any(is_alive(pid) for pid in pids)
    assert await made.daemon.ended() == -signal.SIGKILL
    assert len(made.daemon.events("parent_died")) == 2
    assert not folders() - before
    made.daemon.logs.clear()
    await made.daemon.start()
    began = asyncio.get_running_loop().time()
    await made.write(400)
    await made.delivered()
    assert asyncio.get_running_loop().time() - began < 10
    assert not made.ledger.redelivered()
    assert await made.daemon.stop() == 0


def folders() -> set[Path]:
    """Those with sockets of daemons."""
    return set(Path(tempfile.gettempdir()).glob("esm-poller-*"))


def is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def test_workers_of_several_hosts_share_a_store_in_dynamodb(
    fake_aws, account, ledger, daemons, ministack
) -> None:
    """Two daemons of two workers: two shards each; a worker that is killed is missed for seconds, not for a lease."""
    store = f"dynamodb://poller?create=true&endpoint_url={ministack}"
    made = World(fake_aws, account, ledger, daemons, store=store, lease_seconds=30)
    await made.start()
    (made.daemon.folder / "other").mkdir()
    other = Daemon(made.daemon.folder / "other", made.daemon.config)
    other.arguments = made.daemon.arguments
    try:
        await other.start()
        await until(lambda: _is_shared(made, other), 60, "an even share of four")
        await made.write(500)
        await made.delivered()
        os.kill(made.pids()[1], signal.SIGKILL)
        await made.write(400)
        await made.ledger.until(lambda: made.written <= made.ledger.deliveries.keys(), 20, "a take-over")
        assert await other.stop() == 0
        assert await made.daemon.stop() == 0
    finally:
        await other.close()
    assert_order(made.ledger)


async def _is_shared(made: World, other: Daemon) -> bool:
    """Each daemon shows the shards that its own workers read."""
    [elsewhere] = await other.status()
    there = Counter(shard["owner"] for shard in elsewhere["shards"] if shard["state"] in WORKING)
    return sorted((await made.spread() + there).values()) == [2, 2, 2, 2]


async def test_limits_hold_for_all_workers_together(world, ledger) -> None:
    """A function that one invocation at a time is allowed gets one, whichever of four workers has the shard."""
    running = most = 0

    async def counted(request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(0.005)
            return await ledger.handle(request)
        finally:
            running -= 1

    async with target(counted) as url:
        made: World = world(workers=4, functions={"f": {"url": url, "max_concurrency": 1}})
        await made.start()
        await until(made.is_even, 20, "an even share")
        for _ in range(5):
            await made.write(200)
        await made.delivered()
        os.kill(made.pids()[2], signal.SIGKILL)
        await made.write(200)
        await made.delivered()
        assert most == 1
        assert await made.daemon.stop() == 0


async def test_a_second_signal_ends_all_at_once(world) -> None:
    """Exit 1, and no process is left."""
    hanging = asyncio.Event()
    never = asyncio.Event()

    async def hang(_):
        hanging.set()
        await never.wait()

    async with target(hang) as url:
        made: World = world(shutdown_grace_seconds=300, functions={"f": {"url": url}})
        await made.start()
        await made.write(100)
        await asyncio.wait_for(hanging.wait(), 20)
        pids = list(made.pids().values())
        made.daemon.send(signal.SIGTERM)
        await made.daemon.until_logged("stopping")
        made.daemon.send(signal.SIGTERM)
        assert await made.daemon.ended(15) == 1
        assert not any(is_alive(pid) for pid in pids)
        never.set()


async def test_mistakes_end_it_before_a_worker_begins(world) -> None:
    """A bad config is exit 2, a port that is taken exit 1."""
    made: World = world()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        made.daemon.write({**made.daemon.config, "server": {"port": taken.getsockname()[1]}})
        await made.daemon.start(wait=False)
        assert await made.daemon.ended() == 1
        assert "cannot listen" in made.daemon.events("not_started")[0]["error"]
    made.daemon.write({"stores": 1})
    await made.daemon.start(wait=False)
    assert await made.daemon.ended() == 2
    assert not made.daemon.events("worker_started")


async def test_a_reload_reaches_every_worker_and_a_bad_file_none(world) -> None:
    """A bad file is refused once; a worker that starts meanwhile starts with the good one."""
    made: World = world()
    await made.start()
    await until(made.is_even, 15, "an even share")
    good = made.daemon.config
    made.daemon.write({**good, "nonsense": 1})
    made.daemon.send(signal.SIGHUP)
    await made.daemon.until_logged("config_refused")
    os.kill(made.pids()[0], signal.SIGKILL)
    await until(lambda: _is_up(made, 3), 10, "another worker")
    assert len(made.daemon.events("config_refused")) == 1
    made.daemon.write({**good, "event_source_mappings": [stream_of(made.stream.arn, Enabled=False)]})
    os.utime(made.daemon.path, (1, 1))  # an old file that was put back
    made.daemon.send(signal.SIGHUP)
    await until(lambda: _has_state(made, "Disabled"), 10, "a mapping that the file disables")
    assert (await samples(made.daemon, "poller_config_reloads_total")) == {("success",): 1.0, ("error",): 1.0}
    assert await made.daemon.stop() == 0
