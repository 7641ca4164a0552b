"""A fleet: daemons that share one store and one stream, a target that knows who calls, a wire to the store to cut."""

import asyncio
import json
import os
import random
import re
import signal
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon
from tests.integration.test_daemon import Aws, stream_of
from tests.integration.test_streams_on_fake import until

SHARDS = 32
KEYS = 4 * SHARDS
INTERVAL = 1.0  # between checkpoints on DynamoDB
SLACK = 1.5  # on top: a busy machine, a save under way
SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
WORKING = {"starting", "running", "ending", "draining"}
NEVER = {"shard_crashed", "mapping_crashed", "read_crashed", "position_unknown", "records_lost", "not_json"}
WRITES = ("UpdateItem", "PutItem", "DeleteItem")  # one unit each: no item of these tests has more than a kilobyte


def clock() -> float:
    return asyncio.get_running_loop().time()


class Wire:
    """TCP to the store. While it is held nothing gets through; then what was sent arrives, however old it is."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._is_open = asyncio.Event()
        self._is_open.set()
        self.calls: Counter[str] = Counter()  # by DynamoDB operation, those of killed daemons too
        self.url = ""
        self._tasks: set[asyncio.Task[Any]] = set()

    def hold(self) -> None:
        self._is_open.clear()

    def let_go(self) -> None:
        self._is_open.set()

    def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            ahead = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, ahead[1], is_counted=True))
                tasks.create_task(self._pump(ahead[0], writer))
        finally:
            ahead[1].transport.abort()
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_counted=False) -> None:
        rest = b""
        try:
            while data := await reader.read(65_536):
                if is_counted:
                    seen = rest + data
                    found = list(re.finditer(rb"DynamoDB_20120810\.(\w+)\r", seen))
                    self.calls.update(match[1].decode() for match in found)
                    rest = seen[found[-1].end() if found else 0 :][-60:]
                await self._is_open.wait()
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            writer.transport.abort()


@asynccontextmanager
async def wire_to(url: str) -> AsyncIterator[Wire]:
    made = Wire(url)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = "http://{}:{}".format(*server.sockets[0].getsockname()[:2])
    try:
        yield made
    finally:
        server.close()
        await made.close()


@dataclass(slots=True)
class Delivery:
    """One request that carried a record. `is_done`: it succeeded, whether or not the caller lived to hear that."""

    member: str
    began: float
    ended: float = 0.0
    is_done: bool = False


@dataclass(slots=True)
class Call:
    """A request that is not answered yet."""

    member: str
    request: web.Request
    began: float

    @property
    def is_given_up(self) -> bool:
        return self.request.transport is None or self.request.transport.is_closing()


@dataclass(slots=True)
class Span:
    """What was done to a member, or, with `*`, to all: a kill, a stop, a pause, an outage of the store."""

    kind: str
    member: str
    begins: float
    ends: float = inf


class Target:
    """Takes a little time, fails now and then, and writes down who brought what, and who was there at the same time."""

    def __init__(self, seed: int = 0) -> None:
        self.url = ""
        self.dice = random.Random(seed)
        self.slowness = 0.04
        self.records: dict[str, list[Delivery]] = defaultdict(list)  # every try of every record
        self.done: dict[str, None] = {}  # in the order of their first success
        self.order: dict[str, list[int]] = defaultdict(list)  # of each key, as first successes came
        self.shards: dict[str, list[tuple[float, str]]] = defaultdict(list)  # when a request came, and from whom
        self.together: list[str] = []  # two at once that there must not be
        self.beside_paused = 0  # requests that came while one of a suspended daemon was open: nobody can know that
        self.paused: set[str] = set()
        self.peak = 0
        self._open: dict[str, list[Call]] = defaultdict(list)
        self._calls = 0

    async def handle(self, request: web.Request) -> web.Response:
        records = json.loads(await request.read())["Records"]
        call = Call(request.path.rpartition("/")[2], request, clock())
        if "kinesis" not in records[0]:
            return await self._handle_messages(records)
        keys = {record["kinesis"]["partitionKey"] for record in records}
        self._compare(call, keys)
        tries = [Delivery(call.member, call.began) for _ in records]
        for record, delivery in zip(records, tries, strict=True):
            self.records[record["eventID"]].append(delivery)
        self.shards[records[0]["eventID"].split(":")[0]].append((call.began, call.member))
        for key in keys:
            self._open[key].append(call)
        await asyncio.sleep(self.dice.uniform(0, self.slowness))
        for key in keys:
            self._open[key].remove(call)
        luck = self.dice.random()
        status = 500 if luck < 0.02 else 429 if luck < 0.03 else 200
        for record, delivery in zip(records, tries, strict=True):
            delivery.ended, delivery.is_done = clock(), status == 200
            if status == 200 and record["eventID"] not in self.done:
                self.done[record["eventID"]] = None
                self.order[record["kinesis"]["partitionKey"]].append(int(record["kinesis"]["sequenceNumber"]))
        return web.json_response({}, status=status)

    def _compare(self, call: Call, keys: Collection[str]) -> None:
        others = {id(other): other for key in keys for other in self._open[key] if not other.is_given_up}
        for other in others.values():
            if other.member in self.paused:
                self.beside_paused += 1
            else:
                self.together.append(f"{call.member} at {call.began:.3f} beside {other.member} since {other.began:.3f}")

    async def _handle_messages(self, records: list[dict[str, Any]]) -> web.Response:
        self._calls += 1
        self.peak = max(self.peak, self._calls)
        await asyncio.sleep(self.slowness)
        self._calls -= 1
        self.done.update(dict.fromkeys(record["messageId"] for record in records))
        return web.json_response({})


@asynccontextmanager
async def target_of(seed: int = 0) -> AsyncIterator[Target]:
    made = Target(seed)
    app = web.Application(client_max_size=16 * 2**20)
    app.router.add_post("/{path:.*}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()


class Producer:
    """Puts a record under every fourth key at a time, in turn, so that all shards have work at every moment."""

    def __init__(self, aws: Aws, name: str) -> None:
        self._kinesis, self._name = aws.client("kinesis"), name
        self.ids: list[str] = []
        self._at = 0

    def put(self) -> None:
        width = 2**128 // SHARDS
        entries = []
        for key in range(self._at, KEYS, 4):
            place = str(key % SHARDS * width + width // 2)
            entries.append({"Data": b"x" * 100, "PartitionKey": f"key-{key}", "ExplicitHashKey": place})
        self._at = (self._at + 1) % 4
        answer = self._kinesis.put_records(StreamName=self._name, Records=entries)
        assert answer["FailedRecordCount"] == 0
        self.ids += [f"{put['ShardId']}:{put['SequenceNumber']}" for put in answer["Records"]]

    async def run(self, pause: float) -> None:
        while True:
            await asyncio.to_thread(self.put)
            await asyncio.sleep(pause)


class Fleet:
    """Each daemon has a name of its own, and a successor has another one."""

    def __init__(self, folder: Path, aws: Aws, wire: Wire, target: Target, lease: float) -> None:
        self.folder, self.aws, self.wire, self.target, self.lease = folder, aws, wire, target, lease
        self.mappings: list[dict[str, Any]] = []
        self.running: dict[str, Daemon] = {}
        self.all: dict[str, Daemon] = {}
        self.spans: list[Span] = []
        self.unexplained: list[str] = []  # what `redelivered` counts as `other`
        self.producer: Producer | None = None

    async def stream(self) -> None:
        arn = await asyncio.to_thread(self.aws.stream, "s", SHARDS)
        self.mappings.append(stream_of(arn, ParallelizationFactor=2, BatchSize=50))
        self.producer = Producer(self.aws, "s")

    async def start(self, count: int = 1) -> list[str]:
        names = [f"m{len(self.all) + n}" for n in range(1, count + 1)]
        for name in names:
            (self.folder / name).mkdir()
            self.all[name] = Daemon(self.folder / name, self._config(name))
        await asyncio.gather(*(self.all[name].start() for name in names))
        self.running.update((name, self.all[name]) for name in names)
        return names

    def _config(self, name: str) -> dict[str, Any]:
        return {
            "aws": {"region": REGION, "endpoint_url": self.aws.url},
            "store": f"dynamodb://leases?region={REGION}&endpoint_url={self.wire.url}&create=true",
            "lease_seconds": self.lease,
            "functions": {"f": {"url": f"{self.target.url}/{name}", "timeout_seconds": 20}},
            "event_source_mappings": self.mappings,
            "retry": {"initial_backoff_seconds": 0.1, "maximum_backoff_seconds": 0.5},
        }

    async def close(self) -> None:
        for daemon in self.all.values():
            await daemon.close()

    # --- what happens to members

    async def kill(self, name: str) -> Span:
        span = self._span("kill", name)
        self.target.paused.discard(name)
        await self.running.pop(name).kill()
        span.ends = clock()
        return span

    async def stop(self, name: str) -> Span:
        span = self._span("stop", name)
        daemon = self.running.pop(name)
        assert await daemon.stop() == 0, daemon.logs[-5:]
        span.ends = clock()
        assert not daemon.events("stop_grace_exceeded")
        return span

    def pause(self, name: str) -> Span:
        self.running[name].send(signal.SIGSTOP)
        self.target.paused.add(name)
        return self._span("pause", name)

    def resume(self, span: Span) -> None:
        if span.member in self.running:
            self.running[span.member].send(signal.SIGCONT)
            self.target.paused.discard(span.member)
        span.ends = clock()

    def _span(self, kind: str, name: str) -> Span:
        self.spans.append(Span(kind, name, clock()))
        return self.spans[-1]

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[Span]:
        span = self._span("outage", "*")
        self.wire.hold()
        yield span
        self.wire.let_go()
        span.ends = clock()

    # --- what is seen

    async def spread(self) -> dict[str, set[str]]:
        """The shards that each member works at."""
        names = [name for name in self.running if name not in self.target.paused]
        documents = await asyncio.gather(*(self.running[name].status() for name in names))
        return {
            name: {shard["id"] for shard in document[0]["shards"] if shard["state"] in WORKING}
            for name, document in zip(names, documents, strict=True)
        }

    async def is_even(self) -> bool:
        counts = [len(shards) for shards in (await self.spread()).values()]
        return sum(counts) == SHARDS and max(counts) - min(counts) <= 1

    async def settled(self, seconds: float = 20.0) -> float:
        """Seconds until the shards are spread evenly."""
        began = clock()
        try:
            await until(self.is_even, seconds, "an even spread")
        except AssertionError as error:
            error.add_note(await self.described())
            raise
        return clock() - began

    async def described(self) -> str:
        """What a fleet that does not settle looks like: shards by state, leases, members, last lines of the logs."""
        lines = [f"at {clock():.1f}, paused {self.target.paused}, members as they are called: {sorted(self.running)}"]
        for name, daemon in self.running.items():
            [mapping, *_] = await daemon.status()
            states = Counter(shard["state"] for shard in mapping["shards"])
            lines.append(f"{name} (pid {daemon.process.pid}): {mapping['state']} {mapping['reason']} {dict(states)}")
            last = [entry for entry in daemon.logs if not entry["event"].startswith(("invocation", "library"))][-12:]
            lines += [
                f"    { ({k: v for k, v in entry.items() if k not in {'mapping', 'function'}}) }" for entry in last
            ]
        items = await asyncio.to_thread(self._items)
        for item in items:
            if item["scope"]["S"].startswith("m"):
                wanted = {"leaseKey", "leaseOwner", "leaseCounter", "wantedBy", "beat", "info", "savedAt"} & item.keys()
                lines.append(" ".join(f"{name}={next(iter(item[name].values()))}" for name in sorted(wanted)))
        return "\n".join(lines)

    def _items(self) -> list[dict[str, Any]]:
        store = Aws(self.wire.url, self.aws.account).client("dynamodb")
        return store.get_paginator("scan").paginate(TableName="leases").build_full_result()["Items"]

    async def works(self, count: int = 200, seconds: float = 20.0) -> None:
        """So many more records have succeeded."""
        goal = len(self.target.done) + count
        await until(lambda: len(self.target.done) >= goal, seconds, f"record number {goal}")

    async def delivered(self, seconds: float = 20.0) -> None:
        """Every record that was put has succeeded."""
        assert self.producer is not None
        ids = self.producer.ids
        try:
            await until(lambda: len(self.target.done) >= len(ids), seconds, "the last record")
        except AssertionError as error:
            missing = Counter(name.split(":")[0] for name in set(ids) - self.target.done.keys())
            error.add_note(f"missing: {dict(missing)}, {await self.spread()}")
            raise

    def shards_of(self, name: str) -> list[str]:
        """Those whose last request came from it."""
        return [shard for shard, calls in self.target.shards.items() if calls[-1][1] == name]

    def failovers(self, span: Span, shards: Collection[str], *, is_undisturbed: bool = False) -> list[float]:
        """Seconds from the event until another member brought records of each shard. `is_undisturbed`: only where
        nothing else happened to anybody in between.
        """
        firsts = (
            next((at for at, who in self.target.shards[shard] if at > span.begins and who != span.member), None)
            for shard in shards
        )
        next_at = min([other.begins for other in self.spans if other.begins > span.begins], default=inf)
        return [
            first - span.begins for first in firsts if first is not None and (first < next_at or not is_undisturbed)
        ]

    def gaps(self, begins: float, ends: float) -> list[float]:
        """The longest time without a request of each shard."""
        found = []
        for calls in self.target.shards.values():
            times = [begins, *(at for at, _ in calls if begins < at < ends), ends]
            found.append(max(later - earlier for earlier, later in pairwise(times)))
        return found

    # --- judgement

    def assert_kept(self) -> None:
        """Nothing lost, no key out of order, never two at one key, no defect in any log."""
        assert self.producer is not None
        assert self.target.done.keys() == set(self.producer.ids)
        for key, numbers in self.target.order.items():
            assert numbers == sorted(numbers), key
        assert not self.target.together, self.target.together[:5]
        for name, daemon in self.all.items():
            bad = [entry for entry in daemon.logs if entry["event"] in NEVER or entry.get("level") == "critical"]
            assert not bad, (name, bad[:3])

    def redelivered(self) -> Counter[str]:
        """How often a record succeeded once more, by cause. What no kill, pause or outage explains is `other`."""
        causes: Counter[str] = Counter()
        self.unexplained.clear()
        for name, tries in self.target.records.items():
            for earlier, later in pairwise([one for one in tries if one.is_done]):
                cause = self._cause(earlier, later)
                causes[cause] += 1
                if cause == "other":
                    self.unexplained.append(f"{name}: {earlier} {later}")
        return causes

    def _cause(self, earlier: Delivery, later: Delivery) -> str:
        fences = [
            Span("fence", earlier.member, at := self._at(entry), at)
            for entry in self.all[earlier.member].events("leases_fenced")
        ]
        for span in [*self.spans, *fences]:
            if span.kind == "stop" or span.member not in {"*", earlier.member} or later.began < span.begins:
                continue
            # A member that goes on notices at once that its fence has passed; a fence that came later has its own span.
            until_at = span.ends + (0.5 if span.kind in {"pause", "outage"} else 0.0)
            unsaved = self.lease if span.kind == "fence" else 0.0  # for so long the store may not have answered
            if span.begins - unsaved - INTERVAL - SLACK <= earlier.ended and earlier.began <= until_at:
                return span.kind
        return "other"

    @staticmethod
    def _at(entry: dict[str, Any]) -> float:
        """A log line's moment on this process's clock."""
        return datetime.fromisoformat(entry["timestamp"]).timestamp() - time.time() + clock()

    def logged(self, event: str) -> int:
        return sum(len(daemon.events(event)) for daemon in self.all.values())


@asynccontextmanager
async def under_load(fleet: Fleet, pause: float = 0.2) -> AsyncIterator[None]:
    assert fleet.producer is not None
    task = asyncio.create_task(fleet.producer.run(pause))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


async def campaign(fleet: Fleet, seconds: float, seed: int) -> dict[str, list[tuple[Span, list[str]]]]:
    """Random kills, stops and pauses every few seconds, each dead member followed by another. Answers what took shards
    from a member, and which.
    """
    dice = random.Random(seed)
    taken: dict[str, list[tuple[Span, list[str]]]] = defaultdict(list)
    ends = clock() + seconds
    pauses: set[asyncio.Task[None]] = set()

    async def later(span: Span, length: float) -> None:
        await asyncio.sleep(length)
        fleet.resume(span)

    try:
        while clock() < ends:
            await asyncio.sleep(dice.uniform(1.0, 5.0))
            free = [name for name in fleet.running if name not in fleet.target.paused]
            what = dice.choice(["kill", "kill", "pause", "pause", "stop"])
            name = dice.choice(list(fleet.running) if what == "kill" else free or [""])
            if not name:
                continue
            shards = fleet.shards_of(name)
            if what == "kill":
                taken["kill"].append((await fleet.kill(name), shards))
            elif what == "stop":
                taken["stop"].append((await fleet.stop(name), shards))
            else:
                length = dice.choice([0.3, 0.7, 1.5, 3.0]) * fleet.lease
                span = fleet.pause(name)
                if length > fleet.lease:
                    taken["pause"].append((span, shards))
                pauses.add(asyncio.create_task(later(span, length)))
            while len(fleet.running) < 3:
                await fleet.start()
        await asyncio.gather(*pauses)
    finally:
        for task in pauses:
            task.cancel()
    return taken


def spoken(times: Collection[float]) -> str:
    """Median and maximum."""
    return f"median {statistics.median(times):.2f} s, at most {max(times):.2f} s" if times else "none"
