"""Order and completeness across splits, merges, kills and a stop, seen by the target alone.

Each record says its key and its number within the key, so what arrived is judged without trusting sequence numbers.
"""

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from tests.integration.daemon import Daemon
from tests.integration.test_daemon import SLACK, Aws, config, stream_of

pytestmark = pytest.mark.integration

KEYS = 200
SHARDS = range(3, 9)  # how many are open at a time
FAILING = 0.01  # share of the requests that are answered 500
CHECKPOINT_INTERVAL = 0.1


@dataclass
class Life:
    """One process of the daemon, from its start to its kill or stop."""

    number: int
    end: str = ""
    ended_at: float = 0.0
    next: dict[str, int] = field(default_factory=dict)  # per key, the number that must come next
    busy: set[str] = field(default_factory=set)  # keys of the requests that are not answered yet
    delivered: int = 0
    failed: int = 0  # records of the requests that were answered 500
    repeated: int = 0  # delivered by this process, and again by a later one
    oldest_repeated: float = 0.0  # seconds before the end


class Target:
    """Answers each request after some milliseconds, with 500 at random; holds every attempt against the promises."""

    def __init__(self, dice: random.Random) -> None:
        self.url = ""
        self.lives: list[Life] = []
        self.requests = 0
        self.delivered = 0  # records, each counted once
        self.violations: list[str] = []
        self.seen: dict[str, list[tuple[Life, float]]] = {}  # per key, by number: the last delivery
        self.first_attempt: dict[str, float] = {}  # per shard
        self.last_delivery: dict[str, float] = {}
        self.changed = asyncio.Event()
        self._dice = dice
        self._fates = random.Random(dice.random())  # drawn as requests arrive: the same ones fail in every run

    def begin(self) -> tuple[Life, str]:
        """A new process and its URL: a request that a killed one has sent is still known for that one's."""
        self.lives.append(Life(len(self.lives)))
        return self.lives[-1], f"{self.url}{len(self.lives) - 1}"

    async def handle(self, request: web.Request) -> web.Response:
        life = self.lives[int(request.match_info["life"])]
        records = json.loads(await request.read())["Records"]
        shard = records[0]["eventID"].split(":")[0]
        arrived = asyncio.get_running_loop().time()
        self.first_attempt.setdefault(shard, arrived)
        self.requests += 1
        fails = self._fates.random() < FAILING
        after = self._judge(life, records)
        life.busy |= after.keys()
        self.changed.set()
        await asyncio.sleep(self._dice.uniform(0, 0.05))
        life.busy -= after.keys()
        if fails:
            life.failed += len(records)
            self.changed.set()
            return web.Response(status=500)
        now = self.last_delivery[shard] = asyncio.get_running_loop().time()
        for key, (first, end) in after.items():
            for number in range(first, end):
                self._deliver(life, key, number, now)
            life.next[key] = end
        life.delivered += len(records)
        self.changed.set()
        return web.json_response({})

    def _judge(self, life: Life, records: list[dict]) -> dict[str, tuple[int, int]]:
        """The keys of an attempt with their first number and the one after the last.

        A key is in one request at a time; its numbers have no gap and no repetition while the process lives.
        """
        after: dict[str, tuple[int, int]] = {}
        for record in records:
            key, text = base64.b64decode(record["kinesis"]["data"]).decode().split()
            number = int(text)
            if key not in after:
                if key in life.busy:
                    self._violation(f"{key} {number} is sent while an earlier attempt of the key is not answered")
                expected = life.next.get(key, min(number, len(self.seen.get(key, ()))))
                after[key] = (number, number)
            else:
                expected = after[key][1]
            if number != expected or key != record["kinesis"]["partitionKey"]:
                self._violation(f"process {life.number} sent {key} {number} when {expected} was next")
            after[key] = (after[key][0], number + 1)
        return after

    def _deliver(self, life: Life, key: str, number: int, now: float) -> None:
        seen = self.seen.setdefault(key, [])
        if number >= len(seen):
            seen.append((life, now))
            self.delivered += 1
            return
        before, at = seen[number]
        seen[number] = (life, now)
        age = before.ended_at - at
        before.repeated += 1
        before.oldest_repeated = max(before.oldest_repeated, age)
        if before.end != "kill":
            self._violation(f"{key} {number} was done by process {before.number}, which was not killed, and came again")
        elif age >= CHECKPOINT_INTERVAL + SLACK:
            self._violation(f"{key} {number} was delivered {age:.1f} s before the kill and came again")

    def _violation(self, text: str) -> None:
        if len(self.violations) < 20:  # the first ones tell
            self.violations.append(text)
        self.changed.set()

    async def until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition holds; a broken promise ends the wait."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    assert not self.violations, self.violations
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(f"{self.delivered} records were delivered, and no more in {seconds} s") from None


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    """The judging target on a loopback port."""
    made = Target(random.Random(1))
    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.router.add_post(r"/{life:\d+}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    yield made
    await runner.cleanup()


class Stream:
    """A stream that is written to and resharded at the same time. Calls of boto3 run in threads."""

    def __init__(self, aws: Aws, name: str) -> None:
        self.name = name
        self.arn = aws.stream(name, 4)
        self.written: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self._kinesis = aws.client("kinesis")

    def put(self, keys: list[str]) -> None:
        """One PutRecords: records of one key keep their order in it."""
        entries = []
        for key in keys:
            entries.append({"Data": f"{key} {self.written[key]}".encode(), "PartitionKey": key})
            self.written[key] += 1
        assert self._kinesis.put_records(StreamName=self.name, Records=entries)["FailedRecordCount"] == 0

    def shards(self) -> list[dict]:
        return self._kinesis.list_shards(StreamName=self.name)["Shards"]

    def reshard(self, dice: random.Random) -> None:
        """Split an open shard somewhere, or merge two neighbours."""
        listed = [shard for shard in self.shards() if "EndingSequenceNumber" not in shard["SequenceNumberRange"]]
        opened = sorted(listed, key=lambda shard: int(shard["HashKeyRange"]["StartingHashKey"]))
        at = dice.randrange(len(opened) - 1)
        if len(opened) == SHARDS[0] or (len(opened) < SHARDS[-1] and dice.random() < 0.5):
            first, last = (int(opened[at]["HashKeyRange"][f"{end}HashKey"]) for end in ("Starting", "Ending"))
            middle = str(first + int((last - first) * dice.uniform(0.3, 0.7)))
            self._kinesis.split_shard(
                StreamName=self.name, ShardToSplit=opened[at]["ShardId"], NewStartingHashKey=middle
            )
            self.changes["splits"] += 1
        else:
            pair = [shard["ShardId"] for shard in opened[at : at + 2]]
            self._kinesis.merge_shards(StreamName=self.name, ShardToMerge=pair[0], AdjacentShardToMerge=pair[1])
            self.changes["merges"] += 1


@pytest.mark.parametrize(
    ("records", "reshards", "seconds"), [(20_000, 12, 120), pytest.param(200_000, 40, 900, marks=pytest.mark.soak)]
)
async def test_every_key_keeps_its_order_across_reshards_and_kills(
    roto, account, target, daemons, records, reshards, seconds
) -> None:
    """No record missing, keys in order, parents before children, repeats only of what a kill cut off (promises 1-4)."""
    clock = asyncio.get_running_loop().time
    began = clock()
    dice = random.Random(records)
    aws = Aws(roto, account)
    stream = await asyncio.to_thread(Stream, aws, "resharded")
    keys = [f"key-{number}" for number in range(KEYS)]

    async def produce() -> None:
        """Never far ahead of the deliveries, so that kills and reshards meet records on their way."""
        chosen = random.Random(records + 1)
        for start in range(0, records, 500):
            await target.until(lambda start=start: start - target.delivered < records // 25, seconds)
            await asyncio.to_thread(stream.put, chosen.choices(keys, k=500))
            target.changed.set()

    async def reshard(goals: list[int], dice: random.Random) -> None:
        for goal in goals:
            await target.until(lambda goal=goal: stream.written.total() >= goal, seconds)
            await asyncio.to_thread(stream.reshard, dice)

    async def live(end: str, goal: int, wait: float) -> None:
        """One process: runs until so many records are delivered and a moment more, then ends, requests under way."""
        life, url = target.begin()
        life.end = end
        mapping = stream_of(stream.arn, ParallelizationFactor=10, BatchSize=100)
        daemon: Daemon = daemons(config(aws, target, mapping, functions={"f": {"url": url}}))
        await daemon.start()
        await target.until(lambda: target.delivered >= goal, seconds)
        await asyncio.sleep(wait)
        await target.until(lambda: bool(life.busy) or target.delivered == records, seconds)
        life.ended_at = clock()
        if end == "kill":
            await daemon.kill()
        else:
            assert await daemon.stop() == 0
            assert not daemon.events("stop_grace_exceeded")
        assert not daemon.clean_logs()

    sixth = records // 6  # at least so much for each process: seconds, so that late checkpoints show
    goals = [sixth * (1 + n) + more for n, more in enumerate(sorted(dice.sample(range(sixth), 4)))]
    ends = ["kill", "kill", "kill", "stop"]
    dice.shuffle(ends)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(produce())
        tasks.create_task(reshard(sorted(dice.sample(range(500, records), reshards)), random.Random(records + 2)))
        for end, goal in zip(ends, goals, strict=True):
            await live(end, goal, dice.uniform(0, 0.15))
        await live("stop", records, 0)
    assert not target.violations
    assert any(life.failed for life in target.lives)
    assert {key: len(seen) for key, seen in target.seen.items()} == stream.written
    assert stream.written.total() == target.delivered == records
    shards = await asyncio.to_thread(stream.shards)
    assert len(shards) > 4 + reshards
    for shard in shards:
        for parent in filter(None, (shard.get("ParentShardId"), shard.get("AdjacentParentShardId"))):
            if parent in target.last_delivery and shard["ShardId"] in target.first_attempt:
                assert target.last_delivery[parent] <= target.first_attempt[shard["ShardId"]], "parents come first"
    print(
        f"\n{records} records, {KEYS} keys, {len(shards)} shards ({dict(stream.changes)}), {target.requests} requests"
    )
    for life in target.lives:
        print(
            f"  process {life.number}, {life.end}: {life.delivered} delivered, {life.failed} in failed requests,"
            f" {life.repeated} again later, the oldest {life.oldest_repeated:.2f} s before the end"
        )
    again = sum(life.repeated for life in target.lives)
    failed = sum(life.failed for life in target.lives)
    print(f"  delivered again: {again} ({again / records:.2%}) after kills, 0 after stops or failures")
    print(f"  retried after a failure: {failed} ({failed / records:.2%}); {clock() - began:.0f} s")
