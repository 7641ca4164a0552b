"""The real daemon as a process, everything that it talks to, and proxies in between: a world that can be broken."""

import asyncio
import base64
import json
import os
import random
import re
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from tests.fakes.aws import FakeAws
from tests.fakes.aws.shards import Caller
from tests.faults.ledger import Ledger, Temper, serving
from tests.faults.oracle import Hit, Life, Report, Side, Source, Stall, Step, Story, Suspension, Written
from tests.faults.proxy import Proxy
from tests.integration.daemon import Daemon

REGION = "eu-west-1"
TIMEOUT = 1.0  # of the function
VISIBILITY = 3  # of the queue; AWS would ask for six times the function's timeout
LEASE = 4.0
INTERVALS = {"sqlite": 0.1, "dynamodb": 1.0}  # between checkpoints, interface.md
GRACE = 5.0
MAX_RECEIVES = 3  # then the queue's redrive takes a message
MOST_DESCRIPTORS = 64  # of a daemon at rest
STOP_SECONDS = 30.0
_STALL = 0.25  # seconds; what is shorter is no news
_PULSE = 0.05
_STORE_PULSE = 0.3
_COUNTER = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)

StoreName = Literal["sqlite", "dynamodb"]


def now() -> float:
    """The loop's time, in which everything is written down."""
    return asyncio.get_running_loop().time()


@dataclass(frozen=True, slots=True)
class Options:
    """The mapping. `retries` None: without end; else what is given up goes to a queue. `poison`: how many records
    always fail."""

    batch_size: int = 10
    factor: int = 1
    window: int = 0
    retries: int | None = None
    reports_items: bool = False
    poison: int = 0

    def fields(self, source: Source, destination: str) -> dict[str, Any]:
        """As a CreateEventSourceMapping request has them."""
        made: dict[str, Any] = {"BatchSize": self.batch_size}
        if source is not Source.FIFO:
            made["MaximumBatchingWindowInSeconds"] = self.window
        if self.reports_items:
            made["FunctionResponseTypes"] = ["ReportBatchItemFailures"]
        if source.is_stream:
            made |= {"StartingPosition": "TRIM_HORIZON", "ParallelizationFactor": self.factor}
            if self.retries is not None:
                made["MaximumRetryAttempts"] = self.retries
                made["DestinationConfig"] = {"OnFailure": {"Destination": destination}}
        return made


# --- what is read


class World(Protocol):
    """A source on the fake. `written` is everything that was put."""

    arn: str
    written: dict[str, Written]

    def put(self, key: str, *, is_poison: bool) -> str:
        """One more record; answers its name."""
        ...

    def reshape(self, dice: random.Random) -> None:
        """Split, merge or roll shards, where there are any."""
        ...


class KinesisWorld:
    """A stream."""

    def __init__(self, aws: FakeAws, account: str, shards: int, *, by_shard: bool) -> None:
        self._call = aws._kinesis.service.operations
        self._aws, self._caller, self._by_shard = aws, Caller(account, REGION), by_shard
        self._do("CreateStream", StreamName="s", ShardCount=shards)
        self.arn = f"arn:aws:kinesis:{REGION}:{account}:stream/s"
        self.written: dict[str, Written] = {}

    def _do(self, operation: str, **request: Any) -> Any:
        return self._call[operation][0](self._caller, request)

    def put(self, key: str, *, is_poison: bool) -> str:
        """See `World.put`."""
        data = base64.b64encode(b"poison" if is_poison else b"good").decode()
        answer = self._do("PutRecord", StreamName="s", PartitionKey=key, Data=data)
        name, shard = answer["SequenceNumber"], answer["ShardId"]
        keys = (key, shard) if self._by_shard else (key,)
        self.written[name] = Written(name, int(name), keys, shard)
        return str(name)

    def reshape(self, dice: random.Random) -> None:
        """Merge two neighbours, or split one in the middle."""
        shards = sorted(
            (shard for shard in self._aws._kinesis.stream(self.arn).shards.values() if not shard.is_closed),
            key=lambda shard: shard.keys,
        )
        if len(shards) > 1 and dice.random() < 0.5:
            at = dice.randrange(len(shards) - 1)
            self._do("MergeShards", StreamName="s", ShardToMerge=shards[at].id, AdjacentShardToMerge=shards[at + 1].id)
            return
        shard = dice.choice(shards)
        self._do("SplitShard", StreamName="s", ShardToSplit=shard.id, NewStartingHashKey=str(sum(shard.keys) // 2 + 1))


class TableWorld:
    """A table's stream."""

    def __init__(self, aws: FakeAws, account: str, shards: int, *, by_shard: bool) -> None:
        self._aws, self._by_shard = aws, by_shard
        self.arn = aws.stream("t", account, REGION, shards)
        self.written: dict[str, Written] = {}

    def put(self, key: str, *, is_poison: bool) -> str:
        """See `World.put`."""
        keys = {"id": {"S": key}}
        shard = self._aws._dynamodb.stream(self.arn).line_of(msgspec.json.encode(keys)).id
        [name] = self._aws.put(self.arn, [{"keys": keys, "new": {**keys, "poison": {"BOOL": is_poison}}}])
        self.written[name] = Written(name, int(name), (key, shard) if self._by_shard else (key,), shard)
        return name

    def reshape(self, dice: random.Random) -> None:
        """Roll one shard, or all."""
        shards = [name for name, about in self._aws.shards(self.arn).items() if about["is_open"]]
        self._aws.roll(self.arn, dice.choice([None, *shards]))


class QueueWorld:
    """A queue with a queue for dead letters."""

    def __init__(self, aws: FakeAws, account: str, *, fifo: bool) -> None:
        self._aws, self._fifo = aws, fifo
        tail = ".fifo" if fifo else ""
        attributes = {"FifoQueue": "true"} if fifo else {}
        self.dead = aws.queue(f"dead{tail}", account, REGION, attributes)
        policy = json.dumps({"deadLetterTargetArn": self.dead, "maxReceiveCount": str(MAX_RECEIVES)})
        self.arn = aws.queue(
            f"q{tail}", account, REGION, attributes | {"VisibilityTimeout": str(VISIBILITY), "RedrivePolicy": policy}
        )
        self.groups: dict[str, str] = {}
        self.written: dict[str, Written] = {}

    def put(self, key: str, *, is_poison: bool) -> str:
        """See `World.put`; the key is the message group."""
        place = len(self.written)
        body = f"{place} {'poison' if is_poison else 'good'}"
        [name] = self._aws.send(self.arn, [body], [key] if self._fifo else ())
        self.written[name] = Written(name, place, (key,) if self._fifo else ())
        if self._fifo:
            self.groups[name] = key
        return name

    def reshape(self, dice: random.Random) -> None:
        """A queue has no shards."""

    def is_over(self) -> bool:
        """Nothing is left to be received."""
        queue = self._aws.queue_of(self.arn)
        return queue.in_flight == 0 and queue.visible == 0


# --- the daemon and its world


class Wall:
    """The wall clock of a daemon under libfaketime; its monotonic clock is left alone."""

    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.seconds = 0.0
        self.set(0.0)
        self.environment = {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, seconds: float) -> None:
        """So far from the true time."""
        self.seconds = seconds
        self._file.write_text(f"{seconds:+.0f}s")


@dataclass(slots=True)
class Rig:
    """One world, open inside `Rig.open`. Of the daemon there is one life at a time; `daemons` has all, by life."""

    folder: Path
    account: str
    dice: random.Random
    options: Options
    aws: FakeAws
    world: World
    ledger: Ledger
    proxies: dict[Side, Proxy]
    story: Story
    wall: Wall | None
    destination: str
    config: dict[str, Any]
    daemons: list[Daemon] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        folder: Path,
        account: str,
        seed: int,
        source: Source,
        store: StoreName,
        options: Options,
        temper: Temper,
        *,
        sides: Collection[Side] = tuple(Side),
        shards: int = 2,
        store_url: str = "",
        has_wall: bool = False,
    ) -> AsyncIterator[Self]:
        """A world without a daemon. `sides`: where there is a proxy. `store_url`: of a DynamoDB, for that store."""
        dice = random.Random(seed)
        async with AsyncExitStack() as stack:
            aws = await stack.enter_async_context(FakeAws())
            world = _world(aws, account, source, options, shards)
            groups = world.groups if isinstance(world, QueueWorld) else {}
            ledger = Ledger(temper, random.Random(dice.random()), groups)
            await stack.enter_async_context(serving(ledger))
            upstreams = {Side.SOURCE: aws.url, Side.TARGET: ledger.url, Side.DESTINATION: aws.url}
            if store == "dynamodb":
                upstreams[Side.STORE] = store_url
            proxies = {
                side: await stack.enter_async_context(
                    Proxy(url, dice.randrange(2**32), "target" if side is Side.TARGET else "aws")
                )
                for side, url in upstreams.items()
                if side in sides
            }
            urls = {side: proxies[side].url if side in proxies else url for side, url in upstreams.items()}
            destination = aws.queue("failed", account, REGION)
            story = Story(
                source,
                INTERVALS[store],
                TIMEOUT,
                LEASE if store == "dynamodb" else 0.0,
                options.retries if source.is_stream else None,
                world.written,
                attempts=ledger.attempts,
            )
            rig = cls(
                folder=folder,
                account=account,
                dice=dice,
                options=options,
                aws=aws,
                world=world,
                ledger=ledger,
                proxies=proxies,
                story=story,
                wall=Wall(folder) if has_wall else None,
                destination=destination,
                config=_config(source, store, folder, urls),
            )
            async with asyncio.TaskGroup() as tasks:
                watchers = [tasks.create_task(rig._watch())]
                if store == "dynamodb":
                    watchers.append(tasks.create_task(rig._watch_store(store_url)))
                try:
                    yield rig
                finally:
                    for watcher in watchers:
                        watcher.cancel()
                    for daemon in rig.daemons:
                        await daemon.close()

    # --- records

    def put(self, count: int, keys: int, poison: Collection[int] = ()) -> None:
        """So many more records, under keys in turn; `poison` names those that always fail by their place in all."""
        for _ in range(count):
            place = len(self.world.written)
            is_poison = place in poison
            name = self.world.put(f"key-{place % keys}", is_poison=is_poison)
            if is_poison:
                self.ledger.poison.add(name)

    def reports(self) -> list[Report]:
        """The failure records that have arrived."""
        return [self._report(message) for message in self.aws.queue_of(self.destination).messages.values()]

    def _report(self, message: Any) -> Report:
        document = json.loads(message.body)
        [info] = [value for name, value in document.items() if name.endswith("BatchInfo")]
        context = document["requestContext"]
        return Report(
            at=message.sent - time.time() + now(),
            request_id=context["requestId"],
            condition=context["condition"],
            invocations=context["approximateInvokeCount"],
            shard=info["shardId"],
            first=int(info["startSequenceNumber"]),
            last=int(info["endSequenceNumber"]),
            count=info["batchSize"],
        )

    def is_over(self) -> bool:
        """Every record has succeeded or was given up, and no message is left in the queue."""
        if isinstance(self.world, QueueWorld):
            return self.world.is_over()
        left = self.world.written.keys() - self.ledger.done
        if not left or self.options.retries is None:
            return not left
        reports = self.reports()
        told = {attempt.request_id: attempt for attempt in self.ledger.attempts}
        for report in reports:
            attempt = told.get(report.request_id)
            names: Collection[str] = attempt.records if attempt else left
            left -= {
                name
                for name in names
                if name in self.world.written
                and self.world.written[name].shard == report.shard
                and report.first <= self.world.written[name].place <= report.last
            }
        return not left

    # --- the daemon

    @property
    def daemon(self) -> Daemon:
        return self.daemons[-1]

    @property
    def life(self) -> Life:
        return self.story.lives[-1]

    def spawn(self) -> Daemon:
        """The next life, not started."""
        number = len(self.story.lives) + 1
        url = f"{self.proxies[Side.TARGET].url if Side.TARGET in self.proxies else self.ledger.url}/{number}"
        mapping = {
            "EventSourceArn": self.world.arn,
            "FunctionName": "f",
            **self.options.fields(self.story.source, self.destination),
        }
        config = {
            **self.config,
            "functions": {"f": {"url": url, "timeout_seconds": TIMEOUT}},
            "event_source_mappings": [mapping],
        }
        daemon = Daemon(self.folder, config, self._environment())
        self.daemons.append(daemon)
        self.story.lives.append(Life(number, now(), logs=daemon.logs))
        return daemon

    async def start(self) -> None:
        """Another life, until it says that it has started."""
        await self.spawn().start()

    async def kill(self) -> None:
        """SIGKILL."""
        life, daemon = self.life, self.daemon
        life.ending, life.ended = "killed", now()
        await daemon.kill()

    async def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        life, daemon = self.life, self.daemon
        life.ending = "stopped"
        daemon.send(signal.SIGTERM)
        try:
            life.code = await daemon.ended(STOP_SECONDS)
        except TimeoutError:
            self.story.complaints.append(f"life {life.number} did not stop within {STOP_SECONDS:g} s")
            await daemon.kill()
        life.ended = now()

    async def suspend(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        daemon, life, begins = self.daemon, self.life, now()
        at = len(self.story.suspensions)
        self.story.suspensions.append(Suspension(life.number, begins, begins + seconds))
        daemon.send(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        daemon.send(signal.SIGCONT)
        self.story.suspensions[at] = Suspension(life.number, begins, now())

    def step(self, seconds: float) -> None:
        """The daemon's wall clock jumps."""
        assert self.wall is not None
        self.wall.set(self.wall.seconds + seconds)
        self.story.steps.append(Step(now(), seconds))

    # --- what the machine does

    async def _watch(self) -> None:
        """Note when this process, with all that the daemon talks to, or the daemon did not get the processor for half of
        a while, or this loop was late.
        """
        seen = now()
        looks: deque[tuple[float, dict[int, float]]] = deque()
        while True:
            await asyncio.sleep(_PULSE)
            late, seen = now() - seen - _PULSE, now()
            waited = {pid: _waited(pid) for pid in (os.getpid(), self._pid()) if pid is not None}
            looks.append((seen, waited))
            while looks[0][0] < seen - 2 * _STALL:
                looks.popleft()
            began, before = looks[0]
            if late >= _STALL or any(total - before.get(pid, total) >= _STALL for pid, total in waited.items()):
                self._stalled(min(began, seen - late))

    def _stalled(self, begins: float) -> None:
        stalls = self.story.stalls
        if stalls and begins <= stalls[-1].ends:
            begins = min(begins, stalls.pop().begins)
        stalls.append(Stall(begins, now()))

    async def _watch_store(self, url: str) -> None:
        """Note when the DynamoDB lets itself be waited for; it is another process."""
        host, port = urlsplit(url).hostname, urlsplit(url).port
        while True:
            await asyncio.sleep(_STORE_PULSE)
            begins = now()
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"GET /_ministack/health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                await reader.read()
                writer.close()
            if now() - begins >= _STALL:
                self._stalled(begins)

    def _pid(self) -> int | None:
        """Of a daemon that runs."""
        process = self.daemons[-1].process if self.daemons else None
        return process.pid if process is not None and process.returncode is None else None

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "POLLER_", "COVERAGE"))
        }
        ours = {
            "AWS_ACCESS_KEY_ID": self.account,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self.folder / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-credentials"),
            "NO_PROXY": "127.0.0.1",
        }
        return kept | ours | (self.wall.environment if self.wall else {})

    # --- what is seen

    async def is_at_rest(self) -> bool:
        """It answers, is healthy and ready, and nothing is in flight."""
        try:
            health, _ = await self.daemon.get("/healthz")
            ready, _ = await self.daemon.get("/readyz")
            mappings = await self.daemon.status()
        except (aiohttp.ClientError, OSError):
            return False
        is_idle = self.ledger.pending == 0 and all(mapping["in_flight"] == 0 for mapping in mappings)
        return (health, ready) == (200, 200) and is_idle

    async def counts(self) -> dict[str, float]:
        """The daemon's metrics, each summed over its labels."""
        _, text = await self.daemon.get("/metrics")
        found: dict[str, float] = {}
        for name, value in _COUNTER.findall(text):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def descriptors(self) -> int:
        """Open files and sockets of the daemon."""
        assert self.daemon.process is not None
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))  # noqa: PTH208

    def tell(self) -> Story:
        """The story, complete: hits, failure records, and what became of messages."""
        self.story.poison = frozenset(self.ledger.poison)
        self.story.reports = self.reports()
        for side, proxy in self.proxies.items():
            self.story.hits[side] = [Hit(*hit) for hit in proxy.last]
        if isinstance(self.world, QueueWorld):
            offset = now() - time.time()
            self.story.dead = frozenset(one["id"] for one in self.aws.messages(self.world.dead))
            self.story.messages = {
                one["id"]: [(what, at + offset) for what, at in one["history"]]
                for queue in (self.world.arn, self.world.dead)
                for one in self.aws.messages(queue)
            }
        return self.story


def _world(aws: FakeAws, account: str, source: Source, options: Options, shards: int) -> World:
    by_shard = options.factor == 1
    match source:
        case Source.KINESIS:
            return KinesisWorld(aws, account, shards, by_shard=by_shard)
        case Source.DYNAMODB:
            return TableWorld(aws, account, shards, by_shard=by_shard)
        case _:
            return QueueWorld(aws, account, fifo=source is Source.FIFO)


def _config(source: Source, store: StoreName, folder: Path, urls: Mapping[Side, str]) -> dict[str, Any]:
    """All but function and mapping. The queue of failure records has an endpoint of its own beside a stream."""
    queues = urls[Side.DESTINATION] if source.is_stream else urls[Side.SOURCE]
    path = str(folder / "poller.db").lstrip("/")
    stores = {
        "sqlite": f"sqlite:///{path}",
        "dynamodb": f"dynamodb://leases?region={REGION}&create=true&endpoint_url={urls.get(Side.STORE)}",
    }
    return {
        "aws": {
            "region": REGION,
            "endpoint_urls": {
                "kinesis": urls[Side.SOURCE],
                "dynamodbstreams": urls[Side.SOURCE],
                "sqs": queues,
            },
        },
        "store": stores[store],
        "server": {"port": 0},
        "log": {"format": "json"},
        "lease_seconds": LEASE,
        "retry": {"initial_backoff_seconds": 0.05, "maximum_backoff_seconds": 0.4},
        "shutdown_grace_seconds": GRACE,
    }


def _waited(pid: int) -> float:
    """Seconds for which the main thread of a process could have run and did not (Linux, `schedstat`)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, LookupError):  # it has ended, or the kernel does not count
        return 0.0
