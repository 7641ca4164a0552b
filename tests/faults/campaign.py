"""Many short lives of the daemon in a world that breaks, each drawn from a seed and judged by the oracle."""

import asyncio
import json
import multiprocessing
import random
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.faults.ledger import Temper
from tests.faults.oracle import Side, Source, Verdict, judge
from tests.faults.proxy import Fault, Kind
from tests.faults.rig import MOST_DESCRIPTORS, Options, Rig, StoreName, Wall, now
from tests.integration import emulators

OVER_SECONDS = 90.0  # after the last fault: until nothing is pending
REST_SECONDS = 20.0  # and then until the daemon is at rest
RUN_SECONDS = 240.0  # a run that hangs
_TRAFFIC = 2.0  # seconds over which records are put
_TICKS = 20
_MOST_MORE = 60  # records that are put for faults that are not over then
_MORE_SECONDS = 4.0  # that such a fault waits for something to hit
_FIRST_ACCOUNT = 200_000_000_000

Deed = Literal["nothing", "kill", "kills", "suspend", "stop", "step"]
DEEDS: tuple[Deed, ...] = ("kill", "nothing", "suspend", "kills", "stop", "kill", "step")
STORES: tuple[StoreName, ...] = ("sqlite", "dynamodb")


@dataclass(frozen=True, slots=True)
class Trouble:
    """A fault on one side: from `begins` seconds after the first record that the daemon can see, for `lasts` seconds.
    One that `is_early` begins before the daemon does.
    """

    side: Side
    fault: Fault
    begins: float
    lasts: float
    is_early: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a seed decides. `moments`: for each deed the share of the records that have succeeded by then, and
    a pause in seconds after that.
    """

    seed: int
    source: Source
    store: StoreName
    options: Options
    temper: Temper
    troubles: tuple[Trouble, ...]
    deed: Deed
    moments: tuple[tuple[float, float], ...]
    seconds: float  # of a suspension, or by how much the clock steps
    records: int
    keys: int
    shards: int
    reshapes: int
    begins_again: bool
    is_clock_left_out: bool

    def described(self) -> str:
        """One line for people."""
        options = f"size {self.options.batch_size}, factor {self.options.factor}, window {self.options.window}"
        options += f", retries {self.options.retries}, poison {self.options.poison}"
        options += ", reports items" if self.options.reports_items else ""
        troubles = " + ".join(
            f"{one.fault.kind} x {one.fault.share:g} {one.fault.seconds:.2f} s on {one.side} "
            f"{'early' if one.is_early else f'at {one.begins:.2f}'} for {one.lasts:.2f}"
            for one in self.troubles
        )
        return (
            f"{self.source} / {self.store}, {self.records} records, {self.keys} keys, {self.reshapes} reshards, "
            f"{options}; {troubles or 'no fault'}; {self.deed} {self.seconds:.1f}"
        )


def places() -> list[tuple[Source, StoreName, Side]]:
    """Everywhere that a fault can be. A queue has no failure destination, an SQLite file no wire."""
    found = [
        (source, store, side)
        for side in (Side.SOURCE, Side.TARGET, Side.STORE, Side.DESTINATION)
        for store in STORES
        for source in Source
        if (side is not Side.STORE or store == "dynamodb") and (side is not Side.DESTINATION or source.is_stream)
    ]
    assert len(found) == 24  # and 13 kinds: without a common divisor, so that `scenario` meets every pair of the two
    return found


def scenario(seed: int) -> Scenario:
    """Even seeds have one fault: each 312 of them in a row every kind at every place. Odd ones have two, and every
    twentieth seed none.
    """
    dice = random.Random(seed)
    kinds, where = list(Kind), places()
    turn = seed // 2
    source, store, side = where[turn % len(where)]
    chosen: list[tuple[Side, Kind]] = [] if seed % 20 == 19 else [(side, kinds[turn % len(kinds)])]
    if chosen and seed % 2:
        sides = [one for one in where if one[:2] == (source, store)]
        other = kinds[(turn // len(kinds) + turn) % len(kinds)]
        chosen.append((dice.choice(sides)[2], other))
    options, temper = _options(dice, source, has_destination=any(one is Side.DESTINATION for one, _ in chosen))
    deed = DEEDS[turn % len(DEEDS)]
    is_clock_left_out = deed == "step" and Wall.library is None
    if is_clock_left_out:
        deed = "nothing"
    moments = tuple(
        (dice.uniform(0.05, 0.9), dice.choice([0.0, dice.uniform(0.0, 0.3), dice.uniform(0.5, 2.0)])) for _ in range(3)
    )
    first = dice.uniform(0.0, 1.0)
    return Scenario(
        seed=seed,
        source=source,
        store=store,
        options=options,
        temper=temper,
        troubles=tuple(
            _trouble(dice, side, kind, first + at * dice.uniform(-0.3, 0.7)) for at, (side, kind) in enumerate(chosen)
        ),
        deed=deed,
        moments=moments[: {"kills": dice.choice([2, 3]), "nothing": 0}.get(deed, 1)],
        seconds=dice.choice([60.0, 3600.0, -60.0, -3600.0]) if deed == "step" else dice.choice([0.3, 1.0, 2.5, 5.0]),
        records=dice.randrange(100, 301),
        keys=dice.choice([5, 20, 60]),
        shards=dice.choice([1, 2, 3]),
        reshapes=dice.choice([0, 1, 1, 2]) if source.is_stream else 0,
        begins_again=dice.random() < 0.2,
        is_clock_left_out=is_clock_left_out,
    )


def _options(dice: random.Random, source: Source, *, has_destination: bool) -> tuple[Options, Temper]:
    is_finite = source.is_stream and (has_destination or dice.random() < 0.3)
    can_poison = is_finite or not source.is_stream
    reports_items = dice.random() < 0.4
    poison = dice.choice([0, 2, 5] if source.is_stream else [0, 1, 2]) if can_poison else 0
    window = dice.choice([0, 0, 1]) if source is not Source.FIFO else 0
    sizes = [5, 10, 25, 100] if source.is_stream or window else [3, 5, 10]
    options = Options(
        batch_size=dice.choice(sizes),
        factor=dice.choice([1, 4]) if source.is_stream else 1,
        window=window,
        retries=2 if is_finite else None,
        reports_items=reports_items,
        poison=max(poison, 3) if has_destination else poison,
    )
    share = dice.choice([0.0, 0.0, 0.02, 0.05])
    return options, Temper(failures=share, throttles=share / 2, reports_items=reports_items)


def _trouble(dice: random.Random, side: Side, kind: Kind, begins: float) -> Trouble:
    seconds = {
        Kind.LATENCY: dice.uniform(0.05, 0.6),
        Kind.LATE: dice.uniform(0.3, 2.0),
        Kind.SLOW_LORIS: dice.uniform(0.3, 2.0),
    }.get(kind, 0.0)
    is_early = dice.random() < 0.2
    share, lasts = dice.choice([1.0, 1.0, 0.6, 0.3]), dice.uniform(0.6, 1.8)
    if side is Side.DESTINATION:  # where little comes by
        share, begins, lasts = max(share, 0.6), begins / 2, lasts + 1.0
    return Trouble(side, Fault(kind, share, seconds), max(0.0, begins), lasts, is_early)


# --- one run


@dataclass(slots=True)
class Result:
    """What is kept of a run. `oldest`: how long before a kill the oldest record had succeeded that came again after it."""

    seed: int
    problems: list[str]
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    met: list[tuple[str, str]] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)
    oldest: float = 0.0
    seconds: float = 0.0
    folder: str = ""


async def run(seed: int, store_url: str, folder: Path) -> Result:
    """The scenario of a seed, in an empty folder. Whatever goes wrong is in the answer."""
    made = scenario(seed)
    began = now()
    result = Result(seed, [])
    wanted = {trouble.side for trouble in made.troubles} | ({Side.DESTINATION} if made.options.retries else set())
    try:
        async with (
            asyncio.timeout(RUN_SECONDS),
            Rig.open(
                folder,
                str(_FIRST_ACCOUNT + seed),
                seed,
                made.source,
                made.store,
                made.options,
                made.temper,
                sides=wanted,
                shards=made.shards,
                store_url=store_url,
                has_wall=made.deed == "step",
            ) as rig,
        ):
            try:
                await _Run(rig, made).play()
            finally:
                _sum_up(result, made, rig, judge(rig.tell()))
    except TimeoutError:
        result.problems.append(f"the run did not end within {RUN_SECONDS:g} s")
    except Exception:  # noqa: BLE001  # one run must not end the campaign
        result.problems.append(traceback.format_exc())
    result.seconds = now() - began
    return result


class _Run:
    """Plays a scenario on a rig."""

    def __init__(self, rig: Rig, made: Scenario) -> None:
        self.rig = rig
        self.made = made
        self.dice = random.Random(f"{made.seed} run")
        self._troubles = len(made.troubles)  # that are not over

    async def play(self) -> None:
        """Trouble, and then peace: nothing may be left pending then."""
        rig, made = self.rig, self.made
        poison = set(self.dice.sample(range(made.records), made.options.poison))
        if any(trouble.side is Side.DESTINATION for trouble in made.troubles):
            poison |= set(range(made.records, made.records + _MOST_MORE, 3))  # for the fault to have something to hit
        rig.put(made.records // 4, made.keys, poison)
        async with asyncio.TaskGroup() as tasks:
            for trouble in made.troubles:
                if trouble.is_early:
                    self._begin(trouble)
                    if trouble.side is Side.STORE:  # without it there is no start
                        tasks.create_task(self._end_later(trouble, 1.0 + trouble.lasts))
            await rig.start()
            for trouble in made.troubles:
                if not trouble.is_early:
                    tasks.create_task(self._trouble(trouble))
                elif trouble.side is not Side.STORE:
                    tasks.create_task(self._end_later(trouble, trouble.lasts))
            tasks.create_task(self._produce(poison))
            tasks.create_task(self._do())
        for proxy in rig.proxies.values():
            proxy.clear()
        if not await self._comes(rig.is_over, OVER_SECONDS):
            rig.story.complaints.append(f"work is pending {OVER_SECONDS:g} s after the last fault")
        if not await self._comes(rig.is_at_rest, REST_SECONDS):
            health, ready = await rig.daemon.get("/healthz"), await rig.daemon.get("/readyz")
            rig.story.complaints.append(f"the daemon does not come to rest: {health}, {ready}")
        await self._end()
        if made.begins_again:
            attempts = len(rig.ledger.attempts)
            await rig.start()
            await self._comes(rig.is_at_rest, REST_SECONDS)
            await self._end()
            if len(rig.ledger.attempts) > attempts and rig.story.source.is_stream:
                rig.story.complaints.append("a start after everything was done delivered something")

    async def _end(self) -> None:
        """Look once more, and stop."""
        rig = self.rig
        rig.life.counts = await rig.counts()
        if (count := rig.descriptors()) > MOST_DESCRIPTORS:
            rig.story.complaints.append(f"the daemon at rest has {count} descriptors")
        await rig.stop()

    # --- what happens to it

    def _begin(self, trouble: Trouble) -> None:
        self.rig.proxies[trouble.side].begin(trouble.fault)

    async def _trouble(self, trouble: Trouble) -> None:
        await asyncio.sleep(trouble.begins)
        self._begin(trouble)
        await self._end_later(trouble, trouble.lasts)

    async def _end_later(self, trouble: Trouble, seconds: float) -> None:
        """After a time, or when it has hit something at last."""
        proxy, kind = self.rig.proxies[trouble.side], trouble.fault.kind
        before = proxy.counts[kind]
        await asyncio.sleep(seconds)
        await self._comes(lambda: proxy.counts[kind] > before, _MORE_SECONDS)
        proxy.end(trouble.fault)
        self._troubles -= 1

    async def _produce(self, poison: Collection[int]) -> None:
        made = self.made
        left = made.records - made.records // 4
        at = sorted(self.dice.sample(range(_TICKS), made.reshapes))
        for tick in range(_TICKS):
            await asyncio.sleep(_TRAFFIC / _TICKS)
            if tick in at:
                self.rig.world.reshape(self.dice)
            count = left * (tick + 1) // _TICKS - left * tick // _TICKS
            self.rig.put(count, made.keys, poison)
        for _ in range(_MOST_MORE):
            if not self._troubles:
                break
            await asyncio.sleep(_TRAFFIC / _TICKS)
            self.rig.put(1, made.keys, poison)

    async def _do(self) -> None:
        """What is done to the daemon, each time when a share of the records has succeeded, or after a while."""
        rig, made = self.rig, self.made
        for share, pause in made.moments:
            await self._comes(lambda share=share: len(rig.ledger.done) >= share * made.records, 3.0, 0.004)
            await asyncio.sleep(pause)
            match made.deed:
                case "kill" | "kills":
                    await rig.kill()
                    await asyncio.sleep(self.dice.choice([0.0, self.dice.uniform(0, 0.5)]))
                    await rig.start()
                case "suspend":
                    await rig.suspend(made.seconds)
                case "stop":
                    await rig.stop()
                    await rig.start()
                case "step":
                    rig.step(made.seconds)

    @staticmethod
    async def _comes(condition: Any, seconds: float, pause: float = 0.05) -> bool:
        """Whether it becomes true in time; the condition may be a coroutine function."""
        try:
            async with asyncio.timeout(seconds):
                while not (await found if asyncio.iscoroutine(found := condition()) else found):
                    await asyncio.sleep(pause)
        except TimeoutError:
            return False
        return True


def _sum_up(result: Result, made: Scenario, rig: Rig, verdict: Verdict) -> None:
    story = rig.story
    result.problems += verdict.problems
    result.causes, result.oldest = verdict.causes, max(verdict.ages, default=0.0)
    result.counts.update(
        {
            "records": len(story.written),
            "attempts": len(story.attempts),
            "discarded": verdict.discarded,
            "dead letters": len(story.dead),
            "lives": len(story.lives),
            "kills": sum(life.ending == "killed" for life in story.lives),
            "stops": sum(life.ending == "stopped" for life in story.lives),
            "suspensions": len(story.suspensions),
            "clock steps": len(story.steps),
            "stalls": len(story.stalls),
            "reshards": made.reshapes,
            "redelivered": verdict.causes.total(),
            "lost": sum(" are lost: " in problem for problem in verdict.problems),
        }
    )
    for side, proxy in rig.proxies.items():
        result.kinds.update({str(kind): count for kind, count in proxy.counts.items()})
        result.met += [(str(side), str(kind)) for kind in proxy.counts]
    with (rig.folder / "logs.jsonl").open("w") as file:
        for life in story.lives:
            file.writelines(json.dumps({"life": life.number, **entry}) + "\n" for entry in life.logs)
    with (rig.folder / "ledger.jsonl").open("w") as file:
        file.writelines(
            json.dumps(
                {
                    "life": one.life,
                    "began": round(one.began, 3),
                    "ended": round(one.ended, 3),
                    "number": one.number,
                    "outcome": one.outcome,
                    "request_id": one.request_id,
                    "records": one.records,
                    "done": len(one.done),
                }
            )
            + "\n"
            for one in story.attempts
        )
    about = {
        "scenario": made.described(),
        "problems": verdict.problems,
        "lives": [(life.number, life.began, life.ended, life.ending, life.code) for life in story.lives],
        "suspensions": story.suspensions,
        "steps": story.steps,
        "stalls": story.stalls,
        "hits": {str(side): hits for side, hits in story.hits.items()},
        "messages": story.messages,
        "reports": story.reports,
    }
    (rig.folder / "run.json").write_text(json.dumps(about, indent=1))


def run_in_folder(seed: int, store_url: str, folder: str, *, keep: bool = False) -> Result:
    """`run` on a loop of its own, in a new folder below `folder`, which is kept when something was wrong."""
    made = Path(tempfile.mkdtemp(prefix=f"seed-{seed}-", dir=folder))
    result = asyncio.run(run(seed, store_url, made))
    if result.problems or keep:
        result.folder = str(made)
    else:
        shutil.rmtree(made)
    return result


# --- many runs


def run_all(seeds: Collection[int], folder: str, parallel: int, *, keep: bool = False) -> Iterator[Result]:
    """The results as they come, of so many runs at a time, each in a process of its own kind: a busy loop there would
    look like a slow daemon here.
    """
    store_url = emulators.running("ministack")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(parallel, len(seeds)), mp_context=context) as pool:
        futures = [pool.submit(run_in_folder, seed, store_url, folder, keep=keep) for seed in seeds]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(slots=True)
class Totals:
    """Of a campaign."""

    runs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    oldest: float = 0.0
    seconds: float = 0.0
    failed: dict[int, list[str]] = field(default_factory=dict)
    slowest: list[tuple[float, int]] = field(default_factory=list)
    _met: Counter[tuple[str, ...]] = field(default_factory=Counter)
    _pairs: Counter[tuple[str, ...]] = field(default_factory=Counter)
    _deeds: Counter[str] = field(default_factory=Counter)
    _left_out: int = 0

    def add(self, result: Result) -> None:
        """One more run."""
        made = scenario(result.seed)
        self.runs += 1
        self.counts.update(result.counts)
        self.kinds.update(result.kinds)
        self.causes.update(result.causes)
        self.oldest = max(self.oldest, result.oldest)
        self.seconds += result.seconds
        self._deeds[made.deed] += 1
        self.slowest = sorted([*self.slowest, (round(result.seconds, 1), result.seed)], reverse=True)[:10]
        self._left_out += made.is_clock_left_out
        if result.problems:
            self.failed[result.seed] = result.problems
        self._met.update((made.source, made.store, side, kind) for side, kind in result.met)
        if len(made.troubles) > 1:
            self._pairs[tuple(sorted(trouble.fault.kind for trouble in made.troubles))] += 1

    def document(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return {
            "runs": self.runs,
            "failed": {str(seed): problems for seed, problems in sorted(self.failed.items())},
            "counts": dict(self.counts),
            "hits": dict(self.kinds),
            "redelivered": dict(self.causes),
            "oldest_redelivered_before_kill_seconds": round(self.oldest, 3),
            "deeds": dict(self._deeds),
            "clock_steps_left_out": self._left_out,
            "coverage": {
                "places_and_kinds": [len(self._met), len(places()) * len(Kind)],
                "pairs_of_kinds": [len(self._pairs), len(Kind) * (len(Kind) + 1) // 2],
            },
            "seconds_of_runs": round(self.seconds, 1),
            "slowest_seconds_and_seeds": self.slowest,
        }

    def table(self) -> str:
        """For people."""

        def listed(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count:,}" for name, count in counter.most_common() if count) or "none"

        counts = Counter({name: count for name, count in self.counts.items() if name != "lost"})
        left_out = f" ({self._left_out} clock steps left out: there is no faketime)" if self._left_out else ""
        return "\n".join(
            (
                f"runs         {self.runs:,}, {len(self.failed)} failed, {self.seconds / max(1, self.runs):.1f} s each",
                f"lost         {self.counts['lost']}",
                f"counts       {listed(counts)}",
                f"faults       {self.kinds.total():,} requests or connections hit: {listed(self.kinds)}",
                f"deeds        {listed(self._deeds)}{left_out}",
                f"redelivered  {listed(self.causes)}",
                f"             the oldest of them had succeeded {self.oldest:.2f} s before its kill",
                f"coverage     {len(self._met)} of {len(places()) * len(Kind)} (source, store, side, fault)",
                f"             {len(self._pairs)} of {len(Kind) * (len(Kind) + 1) // 2} pairs of faults",
            )
        )
