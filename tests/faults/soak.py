"""`python -m tests.faults.soak --minutes 120`: one daemon, three sources, a steady load, and a fault every ten seconds.

Shards are split, merged and rolled every minute; now and then the daemon is killed, stopped or suspended. The run is
made of chapters. At the end of each the load pauses until nothing is pending, the oracle judges all of the chapter, and
what is done is forgotten here and in the fake, so that memory does not grow with the time. From half of the time on the
daemon is neither killed nor stopped: that life shows whether its memory and descriptors are flat.
"""

import argparse
import asyncio
import inspect
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.fakes.aws import FakeAws
from tests.faults.ledger import Ledger, Temper, serving
from tests.faults.oracle import SLACK, Life, Side, Source, Story, Suspension, judge
from tests.faults.proxy import Fault, Kind, Proxy
from tests.faults.rig import (
    INTERVALS,
    LEASE,
    REGION,
    KinesisWorld,
    Options,
    QueueWorld,
    Rig,
    _config,
    _world,
    now,
)
from tests.integration.daemon import Daemon

FAULT_EVERY = 10.0
RESHARD_EVERY = 60.0
CHAPTER_SECONDS = 300.0  # shorter ones when all of the soak is short; the two above follow
SETTLE_SECONDS = 90.0  # after the last fault: until nothing is pending
FLAT_SECONDS = 60.0  # a shorter life is still growing into its work
TIMEOUT = 4.0  # of the functions; longer than this process, which is the world, may be held up on a busy machine
VISIBILITY = 5  # of the queue
KEYS = 50
_ACCOUNT = "210000000000"
_TICK = 0.05
_SERVICES = {Source.KINESIS: "kinesis", Source.DYNAMODB: "dynamodbstreams", Source.SQS: "sqs"}
_OPTIONS = {
    Source.KINESIS: Options(batch_size=25, factor=4, reports_items=True),
    Source.DYNAMODB: Options(batch_size=50),
    Source.SQS: Options(reports_items=True),
}
_TEMPER = {source: Temper(0.01, 0.01, reports_items=options.reports_items) for source, options in _OPTIONS.items()}
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Plan:
    """A soak. `rate`: records a second and source. Instants are seconds from its start."""

    seconds: float
    rate: float
    seed: int

    @property
    def chapter(self) -> float:
        """How long a chapter lasts, its pause not counted."""
        return min(CHAPTER_SECONDS, max(4.0, self.seconds / 4))

    @property
    def fault_every(self) -> float:
        """From the beginning of a fault to that of the next."""
        return min(FAULT_EVERY, self.chapter / 2)

    @property
    def reshard_every(self) -> float:
        """From one change of the shards to the next."""
        return min(RESHARD_EVERY, self.chapter / 2)

    @property
    def gap(self) -> float:
        """Between two things that are done to the daemon, of the same kind."""
        return min(180.0, max(2.0, self.seconds / 10))

    @property
    def deeds(self) -> list[tuple[float, str]]:
        """When the daemon is killed or stopped, in turn, in the first 45 % of the time, and suspended, in all of it."""
        gap = self.gap
        count = int(self.seconds / gap)
        ends = [(gap * turn, "kill" if turn % 2 else "stop") for turn in range(1, count)]
        pauses = [(gap * (turn + 0.5), "suspend") for turn in range(count)]
        return sorted([end for end in ends if end[0] <= 0.45 * self.seconds] + pauses)


class Sample(NamedTuple):
    """What the system says of the daemon."""

    life: int
    at: float
    resident_bytes: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class Flatness:
    """Of one life: medians of its second and of its last fifth. The first is left out: it fills pools and caches."""

    life: int
    seconds: float
    early_mb: float
    late_mb: float
    early_descriptors: float
    late_descriptors: float

    @property
    def is_flat(self) -> bool:
        """At most 3 % and 1 MB more memory, and at most 16 more descriptors: loops of a queue come and go with what is
        in it, and a fault may hold connections just then.
        """
        return self.late_mb <= self.early_mb * 1.03 + 1.0 and self.late_descriptors <= self.early_descriptors + 16


def flatness(samples: list[Sample], least_seconds: float) -> list[Flatness]:
    """Of every life that lasted long enough to say something."""
    found = []
    for number in sorted({sample.life for sample in samples}):
        life = [sample for sample in samples if sample.life == number]
        began, seconds = life[0].at, life[-1].at - life[0].at
        if seconds < least_seconds:
            continue
        fifths = [int(5 * (sample.at - began) / seconds) for sample in life]
        early = [sample for sample, fifth in zip(life, fifths, strict=True) if fifth == 1]
        late = [sample for sample, fifth in zip(life, fifths, strict=True) if fifth >= 4]
        megabytes = [statistics.median(one.resident_bytes for one in part) / 1e6 for part in (early, late)]
        descriptors = [statistics.median(one.descriptors for one in part) for part in (early, late)]
        found.append(Flatness(number, round(seconds, 1), *(round(one, 1) for one in megabytes), *descriptors))
    return found


@dataclass(slots=True)
class Totals:
    """What the chapters that were judged add up to. Counters are by source, by cause and by kind."""

    records: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    dead: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    deeds: Counter[str] = field(default_factory=Counter)
    reshards: int = 0
    problems: list[str] = field(default_factory=list)


class Soak:
    """One run: three rigs, one per source, that share the fake, the daemon and its lives."""

    def __init__(self, plan: Plan, folder: Path, aws: FakeAws, rigs: list[Rig]) -> None:
        self.plan = plan
        self.folder = folder
        self.aws = aws
        self.rigs = rigs
        self.totals = Totals()
        self.samples: list[Sample] = []
        self._first = rigs[0]  # kills and suspensions are said to one, and known to all
        self._dice = random.Random(plan.seed)
        self._is_ending = asyncio.Event()  # of the chapter
        self._closed: dict[str, set[str]] = {}  # shards that were closed a chapter ago, by stream
        self._began = 0.0
        self._deeds = plan.deeds

    @classmethod
    @asynccontextmanager
    async def open(cls, plan: Plan, folder: Path) -> AsyncIterator[Self]:
        """A world without a daemon."""
        dice = random.Random(plan.seed)
        lives: list[Life] = []
        suspensions: list[Suspension] = []
        daemons: list[Daemon] = []
        async with AsyncExitStack() as stack:
            aws = await stack.enter_async_context(FakeAws())
            rigs = []
            for source, options in _OPTIONS.items():
                world = _world(aws, _ACCOUNT, source, options, 3)
                if isinstance(world, QueueWorld):
                    aws.queue_of(world.arn).attributes["VisibilityTimeout"] = str(VISIBILITY)
                ledger = await stack.enter_async_context(serving(Ledger(_TEMPER[source], random.Random(dice.random()))))
                upstreams = {Side.SOURCE: aws.url, Side.TARGET: ledger.url}
                proxies = {}
                for side, url in upstreams.items():
                    proxy = Proxy(url, dice.randrange(2**32), "target" if side is Side.TARGET else "aws")
                    proxies[side] = await stack.enter_async_context(proxy)
                story = Story(
                    source,
                    INTERVALS["sqlite"],
                    TIMEOUT,
                    LEASE,
                    written=world.written,
                    attempts=ledger.attempts,
                    lives=lives,
                    suspensions=suspensions,
                )
                rigs.append(
                    Rig(
                        folder=folder,
                        account=_ACCOUNT,
                        dice=dice,
                        options=options,
                        aws=aws,
                        world=world,
                        ledger=ledger,
                        proxies=proxies,
                        story=story,
                        wall=None,
                        destination=aws.queue(f"failed-{source}", _ACCOUNT),
                        config=_config(source, "sqlite", folder, {Side.DESTINATION: aws.url, Side.SOURCE: aws.url}),
                        daemons=daemons,
                    )
                )
            try:
                yield cls(plan, folder, aws, rigs)
            finally:
                for daemon in daemons:
                    await daemon.close()

    async def run(self) -> None:
        """All chapters. It ends early when a chapter does not come to rest."""
        await self._start()
        self._began = now()
        async with asyncio.TaskGroup() as tasks:
            watchers = [tasks.create_task(self._sample()), tasks.create_task(self._tell())]
            while now() - self._began < self.plan.seconds:
                if not await self._chapter():
                    break
            for watcher in watchers:
                watcher.cancel()

    def summary(self) -> dict[str, Any]:
        """The run in figures."""
        totals = self.totals
        flat = flatness(self.samples, max(FLAT_SECONDS, self.plan.seconds / 4))
        return {
            "seconds": round(now() - self._began, 1),
            "seed": self.plan.seed,
            "records": dict(totals.records) | {"all": totals.records.total()},
            "attempts": totals.attempts,
            "redelivered": dict(totals.causes) | {"all": totals.causes.total()},
            "dead_letters": totals.dead,
            "faults": dict(totals.faults) | {"all": totals.faults.total()},
            "hits": dict(totals.hits) | {"all": totals.hits.total()},
            "deeds": dict(totals.deeds),
            "reshards": totals.reshards,
            "lives": len(self._first.story.lives),
            "flatness": [{name: getattr(one, name) for name in (*Flatness.__slots__, "is_flat")} for one in flat],
            "by_minute": [
                {"life": one.life, "mb": round(one.resident_bytes / 1e6, 1), "descriptors": one.descriptors}
                for one in self.samples[::60]
            ],
            "problems": self.totals.problems + [f"not flat: {one}" for one in flat if not one.is_flat],
        }

    # --- a chapter

    async def _chapter(self) -> bool:
        """Load and trouble, then peace and judgement; whether the next one may begin."""
        self._is_ending.clear()
        async with asyncio.TaskGroup() as tasks:
            for work in (self._produce(), self._reshard(), self._trouble(), self._do()):
                tasks.create_task(work)
            left = self.plan.seconds - (now() - self._began)
            await _comes(self._has_died, min(self.plan.chapter, left))
            self._is_ending.set()
        is_quiet = await _comes(self._is_quiet, SETTLE_SECONDS)
        if is_quiet:
            # Longer than a checkpoint may take: from here on nothing that was done may come again, whatever happens.
            await asyncio.sleep(INTERVALS["sqlite"] + SLACK)
            self._first.life.counts = await self._first.counts()
            if now() - self._began >= self.plan.seconds:
                await self._first.stop()
        else:
            what = (
                "the daemon is gone"
                if self._has_died()
                else f"work is pending {SETTLE_SECONDS:g} s after the last fault"
            )
            self.totals.problems.append(what)
        self._judge()
        self._forget()
        return is_quiet

    def _has_died(self) -> bool:
        life, process = self._first.life, self._first.daemon.process
        if not life.ending and process is not None:
            life.code = process.returncode
        return life.code is not None and not life.ending

    async def _is_quiet(self) -> bool:
        return all(rig.is_over() for rig in self.rigs) and all([await rig.is_at_rest() for rig in self.rigs])

    def _judge(self) -> None:
        for rig in self.rigs:
            story = rig.tell()
            verdict = judge(story)
            self.totals.problems += [f"{story.source}: {problem}" for problem in verdict.problems]
            self.totals.causes.update(verdict.causes)
            self.totals.records[story.source] += len(story.written)
            self.totals.attempts += len(story.attempts)
            self.totals.dead += len(story.dead)
            for side, proxy in rig.proxies.items():
                self.totals.hits.update({f"{side} {kind}": count for kind, count in proxy.counts.items()})
            if verdict.problems:
                path = self.folder / f"{story.source}-{now() - self._began:.0f}.json"
                path.write_text(json.dumps(_dumped(story), indent=1))

    def _forget(self) -> None:
        """Everything is settled and judged: only what the next chapter needs is kept, as a source does after retention."""
        for rig in self.rigs:
            rig.ledger.attempts.clear()
            rig.ledger.done.clear()
            rig.world.written.clear()
            for proxy in rig.proxies.values():
                proxy.last.clear()
                proxy.counts.clear()
            if isinstance(rig.world, QueueWorld):
                for arn in (rig.world.arn, rig.world.dead):
                    queue = self.aws.queue_of(arn)
                    for held in (queue.messages, queue.asked, queue._visible, queue._due):
                        held.clear()
                continue
            arn = rig.world.arn
            for name in self._closed.get(arn, ()):
                self.aws.vanish(arn, name)
            shards = self.aws._any(arn).shards
            self._closed[arn] = {name for name, shard in shards.items() if shard.is_closed}
            for shard in shards.values():
                shard.trim(max(0, len(shard.sequences) - 1))  # the last one stays: positions are after it
        self._first.story.suspensions.clear()
        for life in self._first.story.lives:
            life.logs.clear()

    # --- what happens in it

    async def _pause(self, seconds: float) -> bool:
        """Wait; False when the chapter ends before that."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._is_ending.wait()
        except TimeoutError:
            return True
        return False

    async def _produce(self) -> None:
        began, put = now(), 0
        while await self._pause(_TICK):
            due = int((now() - began) * self.plan.rate) - put
            for rig in self.rigs:
                rig.put(due, KEYS)
            put += due

    async def _reshard(self) -> None:
        while await self._pause(self.plan.reshard_every):
            for rig in self.rigs:
                if isinstance(rig.world, KinesisWorld):
                    _split_and_merge(rig.world, self._dice)
                else:
                    rig.world.reshape(self._dice)
            self.totals.reshards += 1

    async def _trouble(self) -> None:
        lasts = 0.0
        while await self._pause(self.plan.fault_every - lasts):
            kind = self._dice.choice(list(Kind))
            longest = {Kind.LATENCY: 0.2, Kind.LATE: 0.8, Kind.SLOW_LORIS: 0.8}.get(kind, 0.0) * self.plan.fault_every
            fault = Fault(kind, self._dice.choice((1.0, 0.5, 0.2)), self._dice.uniform(0.1, 1.0) * longest)
            side = self._dice.choice((Side.SOURCE, Side.TARGET))
            rigs = self.rigs if self._dice.random() < 0.2 else [self._dice.choice(self.rigs)]
            lasts = self.plan.fault_every * self._dice.uniform(0.2, 0.6)
            for rig in rigs:
                rig.proxies[side].begin(fault)
            await self._pause(lasts)
            for rig in rigs:
                rig.proxies[side].end(fault)
            self.totals.faults[f"{side} {kind}"] += 1

    async def _do(self) -> None:
        while self._deeds and await self._pause(self._deeds[0][0] - (now() - self._began)):
            deed = self._deeds.pop(0)[1]
            match deed:
                case "kill":
                    await self._first.kill()
                    await asyncio.sleep(self._dice.uniform(0.0, 1.0))
                    await self._start()
                case "stop":
                    await self._first.stop()
                    await self._start()
                case _:
                    await self._first.suspend(self._dice.uniform(0.3, min(4.0, self.plan.gap / 2)))
            self.totals.deeds[deed] += 1

    async def _start(self) -> None:
        """The next life, with a mapping for each rig."""
        lives, daemons = self._first.story.lives, self._first.daemons
        number = len(lives) + 1
        config = {
            **self._first.config,
            "aws": {
                "region": REGION,
                "endpoint_urls": {_SERVICES[rig.story.source]: rig.proxies[Side.SOURCE].url for rig in self.rigs},
            },
            "functions": {
                str(rig.story.source): {"url": f"{rig.proxies[Side.TARGET].url}/{number}", "timeout_seconds": TIMEOUT}
                for rig in self.rigs
            },
            "event_source_mappings": [
                {
                    "EventSourceArn": rig.world.arn,
                    "FunctionName": str(rig.story.source),
                    **rig.options.fields(rig.story.source, rig.destination),
                }
                for rig in self.rigs
            ],
        }
        daemon = Daemon(self.folder, config, self._first._environment())
        daemons.append(daemon)
        lives.append(Life(number, now(), logs=daemon.logs))
        await daemon.start()

    # --- what is seen of it

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            life, process = self._first.life, self._first.daemon.process
            if process is None or life.ending:
                continue
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                self.samples.append(Sample(life.number, now(), pages * _PAGE_BYTES, self._first.descriptors()))
            except OSError:
                continue  # it is ending just now

    async def _tell(self) -> None:
        """A line a minute."""
        for minute in itertools.count(1):
            await asyncio.sleep(self._began + 60.0 * minute - now())
            written = done = again = dead = 0
            for rig in self.rigs:
                written += len(rig.world.written)
                done += len(rig.ledger.done)
                again += sum(len(attempt.done) for attempt in rig.ledger.attempts) - len(rig.ledger.done)
                if isinstance(rig.world, QueueWorld):
                    dead += len(self.aws.messages(rig.world.dead))
            totals, last = self.totals, self.samples[-1]
            print(
                f"{minute:4} min: {totals.records.total() + written} sent, "
                f"{totals.records.total() + done} settled, {max(0, written - done - dead)} pending, "
                f"{totals.causes.total() + again} redelivered, {totals.dead + dead} dead letters, "
                f"{totals.faults.total()} faults, life {last.life}, {last.resident_bytes / 1e6:.1f} MB, "
                f"{last.descriptors} descriptors, {len(totals.problems)} problems",
                flush=True,
            )


def _split_and_merge(world: KinesisWorld, dice: random.Random) -> None:
    """One more shard and one less."""
    shards = [shard for shard in world._aws._kinesis.stream(world.arn).shards.values() if not shard.is_closed]
    split = dice.choice(shards)
    world._do("SplitShard", StreamName="s", ShardToSplit=split.id, NewStartingHashKey=str(sum(split.keys) // 2 + 1))
    shards = [shard for shard in world._aws._kinesis.stream(world.arn).shards.values() if not shard.is_closed]
    shards.sort(key=lambda shard: shard.keys)
    at = dice.randrange(len(shards) - 1)
    world._do("MergeShards", StreamName="s", ShardToMerge=shards[at].id, AdjacentShardToMerge=shards[at + 1].id)


async def _comes(condition: Callable[[], bool | Awaitable[bool]], seconds: float) -> bool:
    """Whether it becomes true in time."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            while not (await found if inspect.isawaitable(found := condition()) else found):
                await asyncio.sleep(0.1)
    except TimeoutError:
        return False
    return True


def _dumped(story: Story) -> dict[str, Any]:
    """A chapter that went wrong, for people."""
    return {
        "lives": [(life.number, life.began, life.ended, life.ending, life.code) for life in story.lives],
        "logs": [{"life": life.number, **entry} for life in story.lives for entry in life.logs],
        "suspensions": story.suspensions,
        "hits": {str(side): hits for side, hits in story.hits.items()},
        "attempts": [
            {name: getattr(one, name) for name in one.__slots__} | {"done": sorted(one.done)} for one in story.attempts
        ],
        "messages": story.messages,
    }


async def soak(plan: Plan, folder: Path) -> dict[str, Any]:
    """Run a plan; answers its figures. `problems` is empty when every promise was kept."""
    async with Soak.open(plan, folder) as made:
        await made.run()
        return made.summary()


def main() -> int:
    """Exit 1 when a promise was broken, or the daemon grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--rate", type=float, default=40.0, help="records a second and source")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemon ends with it
    folder = tempfile.mkdtemp(prefix="poller-soak-")
    figures = asyncio.run(soak(Plan(options.minutes * 60, options.rate, options.seed), Path(folder)))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if figures["problems"]:
        print(f"what it left behind is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
