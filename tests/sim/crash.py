"""Crash points: a daemon is killed at each await of the runtime, once, and another one goes on from what it left.

A kill can only matter between two effects on the outside, and a daemon has such a moment wherever one of its tasks waits.
So every suspension is a crash point: the awaits of `poller/` that the task is in, from the innermost to the task's own,
and whether the outside call that it waits for has had its effect yet (`before`: on its way; `after`: done, and the answer
is not seen). `survey` plays a scenario and collects its points. `kill` plays it again up to the n-th time at one of them:
from that instant nothing that the daemon does reaches the world. Calls that are on their way are lost or, in the other
half of the runs, still arrive: the store writes, the target does the work, the answer is seen by nobody. Then a new daemon
starts on the same store and the same world, and what the worlds promise must hold to the end.

`python -m tests.sim.crash --seeds N --times N` is the long version.
"""

import argparse
import ast
import asyncio
import json
import random
import sys
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import inf
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import structlog

import poller
from poller import control as control_module
from poller.control import ControlPlane
from poller.core.flow import ShardFlow
from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    Checkpoint,
    Fetch,
    FunctionSpec,
    Invocation,
    Lease,
    Listing,
    Mapping,
    Member,
    Position,
    PositionKind,
    QueuePolicy,
    Record,
    Reply,
    ReplyStatus,
    RetryPolicy,
    Row,
    Shard,
    SourceKind,
    SourceSpec,
    StreamFacts,
    StreamTraits,
)
from poller.core.retry import Backoff
from poller.errors import (
    ApiError,
    DestinationFailed,
    IteratorExpired,
    PositionTrimmed,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
    StoreUnavailable,
)
from poller.mappings import normalize
from poller.runtime import discards, queue_runner, shard_worker
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import Context, LastResult, Pipe
from poller.runtime.gate import ByteBudget, Gate
from poller.runtime.lease_keeper import LeaseKeeper
from poller.runtime.stream_runner import seek_key
from poller.runtime.supervisor import Supervisor, Wanted
from poller.settings import Declared, HttpFunction, LambdaFunction, Settings
from poller.stores.memory import MemoryStore
from tests.fakes.observer import NullObserver
from tests.fakes.queue import FakeQueue
from tests.sim.loop import EPOCH, VirtualClock, VirtualLoop
from tests.sim.test_fleet import Fleet
from tests.sim.world import CHECKPOINT_INTERVAL, SLACK, Node, NodeSource, NodeTarget, Plan, Violation, mapping_of

ROOT = Path(poller.__file__).parent
# The shard, queue, checkpoint, lease and reload paths.
PATHS = (
    *(f"runtime/{path.name}" for path in sorted((ROOT / "runtime").glob("*.py"))),
    "control.py",
)
DURATION = 10.0  # of a lease
STEP = 0.01  # of an outside call, half of it before the effect
RESTART = 0.4  # from a death to the next start

# --- sites: the awaits that there are

# Of these an `async with` waits on the way in, out, or never.
_WAITS = {
    "asyncio.TaskGroup": {"exit"},
    "asyncio.timeout": set(),
    "gate": {"enter"},  # `Gate`: it gives back at once
    "self._turn": {"enter"},  # a lock
    "self._lock": {"enter"},
}


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One await in the source. `kind`: await, enter or exit."""

    file: str
    line: int
    column: int
    kind: str
    text: str = field(compare=False)
    function: str = field(compare=False)

    def __str__(self) -> str:
        """As messages name it."""
        place = "" if self.kind == "await" else f" ({self.kind})"
        return f"{self.file}:{self.line} {self.function}: {self.text}{place}"


_Span = tuple[int | None, int | None, int | None, int | None]


@cache
def _spans(file: str) -> dict[_Span, dict[str, Site]]:
    """The sites of a file by what they span in it, as code objects say it too."""
    source = (ROOT / file).read_text()
    found: dict[_Span, dict[str, Site]] = {}

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        kinds: set[str] = set()
        if isinstance(node, ast.Await):
            kinds = {"await"}
        elif isinstance(node, ast.AsyncFor):
            kinds = {"enter"}
        elif isinstance(node, ast.AsyncWith):
            for item in node.items:
                name = ast.unparse(item.context_expr)
                kinds |= next((waits for known, waits in _WAITS.items() if name.startswith(known)), {"enter", "exit"})
        if kinds:
            text = (ast.get_source_segment(source, node) or "").splitlines()[0].strip()
            span = (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)
            found[span] = {kind: Site(file, span[0], span[2], kind, text, function) for kind in kinds}
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


@cache
def all_sites() -> frozenset[Site]:
    """Every await of `PATHS` at which a task may wait."""
    return frozenset(site for file in PATHS for kinds in _spans(file).values() for site in kinds.values())


@cache
def _site(code: CodeType, instruction: int, kind: str) -> Site | None:
    """The site that an instruction of a suspended frame belongs to; None outside of the poller."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT):
        return None
    span = list(code.co_positions())[instruction // 2]
    kinds = _spans(str(path.relative_to(ROOT)))[span]
    return kinds.get(kind) or next(iter(kinds.values()))


# --- points: where a task is


@dataclass(frozen=True, slots=True)
class Point:
    """Where a task waits: its sites from the innermost on, and what has become of the outside call there, if any."""

    sites: tuple[Site, ...]
    phase: str

    def __str__(self) -> str:
        """As messages name it."""
        return f"{self.phase or 'at'} {' < '.join(map(str, self.sites))}"


async def _before_effect(seconds: float) -> None:
    """A call is on its way."""
    await asyncio.sleep(seconds)


async def _after_effect(seconds: float) -> None:
    """A call had its effect, and its answer is on its way."""
    await asyncio.sleep(seconds)


_PHASES = {_before_effect.__code__: "before", _after_effect.__code__: "after"}


def _point(coro: Any) -> Point | None:
    """Where a suspended coroutine is; None: not in the poller's code."""
    frames: list[FrameType] = []
    while coro is not None:
        if (frame := getattr(coro, "cr_frame", None)) is not None:
            frames.append(frame)
            coro = coro.cr_await
        elif (frame := getattr(coro, "gi_frame", None)) is not None:
            frames.append(frame)
            coro = coro.gi_yieldfrom
        else:
            break
    sites: list[Site] = []
    phase = ""
    for place, frame in enumerate(frames):
        phase = _PHASES.get(frame.f_code, phase)
        inner = frames[place + 1].f_code.co_name if place + 1 < len(frames) else ""
        kind = {"__aenter__": "enter", "__aexit__": "exit"}.get(inner, "await")
        if (site := _site(frame.f_code, frame.f_lasti, kind)) is not None:
            sites.append(site)
    return Point(tuple(reversed(sites)), phase) if sites else None


_LIFE: ContextVar["Daemon | None"] = ContextVar("life", default=None)


class _Watched(Coroutine[Any, Any, Any]):
    """A task's coroutine; the stage hears of each of its suspensions."""

    def __init__(self, coro: Any, daemon: "Daemon") -> None:
        self._coro = coro
        self._daemon = daemon

    def send(self, value: Any) -> Any:
        result = self._coro.send(value)
        self._daemon.stage.suspended(self._daemon, self._coro)
        return result

    def throw(self, *error: Any) -> Any:
        result = self._coro.throw(*error)
        self._daemon.stage.suspended(self._daemon, self._coro)
        return result

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Any:
        return self._coro.__await__()


def _task(loop: asyncio.AbstractEventLoop, coro: Any, **more: Any) -> asyncio.Task[Any]:
    daemon = _LIFE.get()
    if daemon is None:
        return asyncio.Task(coro, loop=loop, **more)
    task: asyncio.Task[Any] = asyncio.Task(_Watched(coro, daemon), loop=loop, **more)
    daemon.tasks.add(task)
    return task


@dataclass(frozen=True)
class Unanswered:
    """A fault: the call has its effect, and its answer is lost."""

    error: Exception


class Stage:
    """One run of a scenario: what fails in it, and who is killed when.

    `faults`: per operation, or `ROLE:OPERATION`, what becomes of its next calls: an exception before the effect,
    `Unanswered`, a value that is answered without one, None for nothing, or a function that says so when it is time.
    They end with the kill: what follows is the oracle's.
    """

    def __init__(self, seed: int, loop: VirtualLoop, target: Point | None = None, nth: int = 1, *, lands: bool) -> None:
        self.rng = random.Random(seed)
        self.clock = VirtualClock(loop)
        self.lands = lands
        self.faults: dict[str, list[Any]] = {}
        self.seen: Counter[Point] = Counter()
        self.victim: Daemon | None = None
        self.killed_at = inf
        self.died = asyncio.Event()
        self._target = target
        self._nth = nth

    def suspended(self, daemon: "Daemon", coro: Any) -> None:
        """A task of a daemon waits now."""
        if self.victim is not None or daemon.is_dead or (point := _point(coro)) is None:
            return
        self.seen[point] += 1
        if point == self._target and self.seen[point] == self._nth:
            daemon.is_dead = True
            self.victim = daemon
            self.killed_at = self.clock.now()
            self.died.set()

    def fault(self, daemon: "Daemon", operation: str) -> Any:
        """What becomes of this call; None: it is well."""
        queue = self.faults.get(f"{daemon.role}:{operation}") or self.faults.get(operation)
        fault = queue.pop(0) if queue and self.victim is None else None
        return fault() if callable(fault) else fault


class Edge:
    """An adapter as one daemon reaches it: late, perhaps in vain, and never after its death."""

    def __init__(self, daemon: "Daemon", inner: Any) -> None:
        self._daemon = daemon
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._call, name, found) if asyncio.iscoroutinefunction(found) else found

    async def _call(self, name: str, method: Callable[..., Awaitable[Any]], *args: Any, **named: Any) -> Any:
        seconds = self._daemon.run.slow.get(name, STEP)
        return await self._daemon.reach(name, lambda: method(*args, **named), seconds)


class Daemon(Node):
    """One life of a daemon: what `app` builds, as far as it is in `PATHS`."""

    def __init__(self, run: "Run", name: str, *, is_alone: bool) -> None:
        super().__init__(run.world, name)
        self.run = run
        self.role = name.rpartition("-")[0]
        self.stage = run.stage
        self.born = run.stage.clock.now()
        self.group: asyncio.TaskGroup | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        stage = self.stage
        self.store = Edge(self, run.store)
        trouble = Backoff(0.5, 2.0, stage.rng.random)
        self.checkpointer = Checkpointer(self.store, stage.clock, CHECKPOINT_INTERVAL, trouble)
        self.leases = LeaseKeeper(self.store, stage.clock, name, DURATION, trouble, alone=is_alone)
        context = Context(
            clock=stage.clock,
            random=stage.rng,
            store=self.store,
            checkpointer=self.checkpointer,
            budget=ByteBudget(run.budget),
            backoff=Backoff(0.2, 2.0, stage.rng.random),
            trouble=trouble,
            leases=self.leases,
        )
        self.supervisor = Supervisor(context, run.plumbing(self))
        self.control = ControlPlane(self.store, self.supervisor, Edge(self, Probe()), is_alone=is_alone)

    async def reach(self, operation: str, effect: Callable[[], Awaitable[Any]], seconds: float = STEP) -> Any:
        """One outside call of this daemon."""
        await self.live()
        try:
            await _before_effect(seconds * self.stage.rng.uniform(0.2, 0.8))
        except asyncio.CancelledError:
            if self.is_dead and self.stage.lands:
                await effect()
            raise
        if self.is_dead:  # this very instant
            if self.stage.lands:
                await effect()
            await self.live()
        fault = self.stage.fault(self, operation)
        if isinstance(fault, Exception):
            raise fault
        result = await effect() if fault is None or isinstance(fault, Unanswered) else fault
        await self.live()
        await _after_effect(STEP * self.stage.rng.uniform(0.2, 0.8))
        await self.live()
        if isinstance(fault, Unanswered):
            raise fault.error
        return result

    def start(self, tasks: asyncio.TaskGroup) -> None:
        before = _LIFE.set(self)
        self.task = tasks.create_task(self._work())
        _LIFE.reset(before)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self.group = tasks
            saver = tasks.create_task(self.checkpointer.run())
            keeper = tasks.create_task(self.leases.run())
            await self.run.prepare(self)
            await self.supervisor.run()
            await self.leases.leave()
            keeper.cancel()
            saver.cancel()

    async def ask(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        """Somebody asks the daemon for something; `Unanswered` when it dies meanwhile."""

        async def serve() -> Any:
            try:
                return await operation()
            except (ApiError, StoreUnavailable) as error:
                return error

        if self.is_dead:
            return Unanswered(ConnectionError())
        while self.group is None:
            await asyncio.sleep(0)
        before = _LIFE.set(self)
        task = self.group.create_task(serve())
        _LIFE.reset(before)
        await asyncio.wait([task])
        if self.is_dead:
            return Unanswered(ConnectionError())
        if isinstance(task.result(), BaseException):
            raise task.result()
        return task.result()

    async def bury(self) -> None:
        """After the death: its memory goes. Whoever cleans up meets a world that does not answer any more."""
        while left := {task for task in self.tasks if not task.done()}:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.1)

    async def end(self, grace: float = 30.0) -> bool:
        """SIGTERM. True: a clean stop; False: it was killed meanwhile, or something was cut off."""
        if self.is_dead:
            return False
        assert self.task is not None
        ends_by = self.stage.clock.now() + grace
        await self.ask(self.leases.stop)
        self.supervisor.stop(grace)
        await asyncio.wait([self.task])
        if self.is_dead:
            return False
        self.task.result()
        self.is_dead = True
        return self.stage.clock.now() < ends_by


class Probe:
    """Everything is there."""

    async def source(self, source: SourceSpec) -> None:
        pass

    async def position(self, source: SourceSpec, shard: str, sequence: str) -> None:
        pass

    async def function(self, function: LambdaFunction, region: str) -> None:
        pass


class Lender:
    """Slots that several processes share: there are always some."""

    async def take(self, limit: int) -> None:
        pass

    def give_back(self) -> None:
        pass


class Run:
    """One run of a scenario: a script, and always somebody who starts the daemon anew.

    A scenario says what is outside (`world`, `store`), how a daemon is wired (`plumbing`, `prepare`), what happens
    (`play`), when all is done (`is_done`), and what a death means (`safe`: what was done until then is never done again).
    """

    focus: Collection[str] = PATHS  # files; points elsewhere are other scenarios'
    names: tuple[str, ...] = ("d",)  # of the daemons that live at a time
    is_alone = True
    budget = 10_000_000
    slow: dict[str, float] = {}  # of outside calls that take longer than others  # noqa: RUF012
    world: Any
    store: Any
    never = frozenset({"shard_crashed", "mapping_crashed", "read_crashed", "receive_loop_crashed", "records_lost"})

    def __init__(self, stage: Stage, loop: VirtualLoop) -> None:
        self.stage = stage
        self.daemons: dict[str, Daemon] = {}
        self.lives: Counter[str] = Counter()
        self.cuts: list[float] = []
        self.stopped: set[str] = set()  # names of daemons that had a clean stop
        self.tasks: asyncio.TaskGroup | None = None
        self.set_up(loop)

    def set_up(self, loop: VirtualLoop) -> None:
        raise NotImplementedError

    def plumbing(self, daemon: Daemon) -> Any:
        raise NotImplementedError

    async def prepare(self, daemon: Daemon) -> None:
        """Before the daemon works: it is told what to run."""

    async def play(self) -> None:
        raise NotImplementedError

    async def is_done(self) -> str:
        """Empty, or what is left to be done."""
        raise NotImplementedError

    async def check(self) -> None:
        """At the end."""

    def safe(self, daemon: Daemon, until: float) -> None:
        """The daemon is gone; what was done until then, and is not `in_doubt`, must not be done again."""

    def in_doubt(self, at: float) -> bool:
        """It was done just before a daemon was killed or cut off, and perhaps not saved."""
        return any(ended - SLACK < at <= ended for ended in (self.stage.killed_at, *self.cuts))

    def buried(self, daemon: Daemon) -> None:
        """Its connections are broken."""

    # --- daemons

    def start(self, name: str = "d") -> None:
        self.lives[name] += 1
        daemon = self.daemons[name] = Daemon(self, f"{name}-{self.lives[name]}", is_alone=self.is_alone)
        assert self.tasks is not None
        daemon.start(self.tasks)

    async def alive(self, name: str = "d") -> Daemon:
        """The daemon of that name, when it lives (again)."""
        asked = self.stage.clock.now()
        while self.daemons[name].is_dead:
            assert self.stage.clock.now() < asked + 30, f"{name} does not come back"
            await asyncio.sleep(0.05)
        return self.daemons[name]

    async def down(self, name: str = "d") -> None:
        """A clean stop; after a death in it another one, of the next life."""
        while True:
            daemon = await self.alive(name)
            if await daemon.end():
                break
        self.stopped.add(daemon.leases.me)
        self.safe(daemon, self.stage.clock.now())
        self.buried(daemon)

    async def restart(self, name: str = "d") -> None:
        """A clean stop, and a new start."""
        await self.down(name)
        self.start(name)

    async def cut_off(self, grace: float, name: str = "d") -> None:
        """A stop that is too short for what is in flight, and a new start."""
        daemon = await self.alive(name)
        await daemon.end(grace)
        if self.stage.victim is not daemon:
            self.cuts.append(self.stage.clock.now())
            self.buried(daemon)
            self.start(name)

    async def until_done(self) -> None:
        """Everything that is there is worked off."""
        deadline = self.stage.clock.now() + 200
        while left := await self.is_done():
            for daemon in self.daemons.values():
                if daemon.task is not None and daemon.task.done() and not daemon.is_dead:
                    daemon.task.result()
            assert self.stage.clock.now() < deadline, left
            await asyncio.sleep(0.5)

    async def _revive(self) -> None:
        await self.stage.died.wait()
        daemon = self.stage.victim
        assert daemon is not None
        await daemon.bury()
        self.safe(daemon, self.stage.killed_at - SLACK)
        self.buried(daemon)
        await asyncio.sleep(RESTART)
        self.start(daemon.role)

    async def main(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self.tasks = tasks
            reviver = tasks.create_task(self._revive())
            for name in self.names:
                self.start(name)
            await self.play()
            self.stage.faults.clear()
            await self.until_done()
            for name in self.daemons:
                await self.down(name)
            await self.check()
            reviver.cancel()


def _play(make: type[Run], seed: int, target: Point | None = None, nth: int = 1, *, lands: bool = False) -> Run:
    all_sites()  # the sources are read now, not when somebody has changed them
    loop = VirtualLoop()
    loop.set_task_factory(_task)
    asyncio.set_event_loop(loop)
    stage = Stage(seed, loop, target, nth, lands=lands)
    run = make(stage, loop)
    with structlog.testing.capture_logs() as logs, _patches(stage.rng):
        try:
            loop.run_until_complete(run.main())
            assert not asyncio.all_tasks(loop)
            bad = [entry for entry in logs if entry["event"] in run.never]
            assert not bad, "".join(traceback.format_exception(bad[0].get("exc_info") or Exception(bad[0])))
        except BaseException as error:
            how = "" if target is None else f", killed {target} (time {nth}, calls {'land' if lands else 'are lost'})"
            error.add_note(f"scenario {make.__name__}, seed {seed}{how}")
            raise
        finally:
            asyncio.set_event_loop(None)
            loop.close()
    return run


@contextmanager
def _patches(rng: random.Random) -> Iterator[None]:
    """A discard is a settlement too: the world hears of it where it happens, unless its daemon is dead. And what happens
    rarely happens early.
    """

    class LedgerFlow(ShardFlow):
        def confirm(self, discard: Any, now: float) -> None:
            daemon = _LIFE.get()
            if daemon is not None and not daemon.is_dead:
                for record in discard.records:
                    daemon.world.discard(record.id)
            super().confirm(discard, now)

    with ExitStack() as stack:
        for module, name, value in (
            (shard_worker, "ShardFlow", LedgerFlow),
            (shard_worker, "_FILTER_CHUNK", 2),
            (discards, "_PRUNE_EVERY", 2),
            (queue_runner, "_LOOK_AT_QUEUE", 1.0),
            (control_module, "system_random", lambda: rng),
        ):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


# --- streams

PLAN = Plan(
    factor=2, size=3, window=0.0, attempts=-1, max_age=-1, report_failures=True, keys=4, records=0, shards=2,
    fault_rate=0.0, store_faults=0.0, poison_rate=0.0, kills=0, duration=0.0, start=PositionKind.TRIM_HORIZON,
    max_concurrency=None,
)  # fmt: skip


class StreamWorld(Fleet):
    """The ledger of one stream and its mapping, without chance but that of the seed's delays."""

    def __init__(self, stage: Stage, loop: VirtualLoop, plan: Plan) -> None:
        super().__init__(0, loop)
        self.rng = stage.rng
        self.plan = plan
        self.mapping = mapping_of(plan)
        self.most = 1000
        self.store = LedgerStore(self)
        self.incarnation = "1"
        self.lost: set[str] = set()  # left the stream before they were done
        self.losing: set[str] = set()  # shards of which that must be said
        self.told: set[str] = set()  # shards of which a loss was reported
        self.awaited: set[str] = set()  # an order said that they are to be delivered again
        self.shards.clear()
        for n in range(plan.shards):
            width = 1000 // plan.shards
            self._add_shard((), n * width, 1000 if n == plan.shards - 1 else (n + 1) * width)

    def fill(self, count: int) -> None:
        for _ in range(count):
            self.produce()

    def begin_call(self, call: Invocation, records: list[dict[str, str]]) -> None:
        super().begin_call(call, records)
        self.awaited.difference_update(record["id"] for record in records)

    def check_checkpoint(self, shard: str, checkpoint: Checkpoint) -> None:
        if not self.lost or checkpoint.position.kind is not PositionKind.END:
            super().check_checkpoint(shard, checkpoint)

    def is_ours(self, record: Record) -> bool:
        return record.id not in self.lost and super().is_ours(record)


class LedgerStore(MemoryStore):
    """Holds every position that is written against what was settled."""

    def __init__(self, world: StreamWorld) -> None:
        super().__init__()
        self._world = world

    async def create(self, mapping: str, rows: Sequence[Row]) -> None:
        await super().create(mapping, rows)
        world = self._world
        if not world.is_created and world.plan.start is PositionKind.LATEST:
            for row in rows:
                position = row.checkpoint.position
                world.ours_from[row.shard] = inf if position.kind is PositionKind.END else float(position.value)
        world.is_created = True

    async def save(self, changes: Sequence[tuple[Lease, Checkpoint]]) -> Sequence[Lease]:
        for lease, checkpoint in changes:
            self._world.check_checkpoint(lease.shard, checkpoint)
        return await super().save(changes)

    async def release(self, lease: Lease, checkpoint: Checkpoint | None, to: str | None = None) -> bool:
        if checkpoint is not None:
            self._world.check_checkpoint(lease.shard, checkpoint)
        return await super().release(lease, checkpoint, to)


class StreamAnswers(NodeSource):
    """The stream itself; `Edge` is the way to it."""

    async def _call(self) -> None:
        pass

    async def facts(self) -> StreamFacts:
        return StreamFacts(86400.0, self.node.world.incarnation)

    async def iterator(self, shard: str, at: Position) -> str:
        if (
            at.kind is PositionKind.AT_TIMESTAMP
            or at.kind is PositionKind.LATEST
            or self.node.world.shards[shard].records
        ):
            return await super().iterator(shard, at)
        return f"0@{self.node.world.clock.now()}"

    async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
        world = self.node.world
        sim, start = world.shards[shard], int(iterator.partition("@")[0])
        records = tuple(sim.records[start : start + min(limit, 6)])
        end = start + len(records)
        is_tip = end == len(sim.records)
        lag = 0.0 if is_tip else 0.001
        return Fetch(
            records,
            records[-1].id if records else "",
            None if sim.is_closed and is_tip else f"{end}@{world.clock.now()}",
            None if world.plan.is_dynamodb else lag,
            sum(len(record.wire) for record in records),
            len(records),
        )


class StreamTarget(NodeTarget):
    """Does the work of the ledger's target."""

    node: Daemon

    async def invoke(self, call: Invocation) -> Reply:
        await self.node.live()
        world, node = self.node.world, self.node
        event = json.loads(call.payload)
        records = event["Records"]
        for record in records:
            world.begins(node, call.request_id, world.shard_of[record["id"]])
        world.begin_call(call, records)

        async def answer() -> Reply:
            return self._answer(event, records)

        try:
            return await node.reach("invoke", answer, node.run.call_seconds)
        finally:
            if not node.is_dead:  # else its connections break when it is buried
                world.end_call(call)
                world.ends(call.request_id)


class StreamDestination:
    limit = 100_000

    def __init__(self, world: StreamWorld) -> None:
        self._world = world

    async def send(self, notice: Any, body: bytes) -> None:
        assert json.loads(body)["KinesisBatchInfo"].get("batchSize", 0) == len(notice.records)
        self._world.reported.update(record.id for record in notice.records)


class StreamObserver(NullObserver):
    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def lost(self, shard: str, events: int) -> None:
        if self._daemon.is_dead:
            return
        if not self._daemon.world.lost:
            raise Violation(f"records of {shard} reported lost, none was trimmed")
        self._daemon.world.told.add(shard)


class StreamPlumbing:
    """Connects the one mapping of a stream world."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def connect(self, wanted: Wanted, result: LastResult) -> Pipe:
        daemon, world, run = self._daemon, self._daemon.world, self._daemon.run

        async def open_stream() -> Any:
            async def made() -> Any:
                return Edge(daemon, StreamAnswers(daemon))

            return await daemon.reach("open_stream", made, run.slow.get("open_stream", STEP))

        async def made() -> Pipe:
            return Pipe(
                mapping=wanted.mapping,
                result=result,
                target=StreamTarget(daemon),
                gate=run.gate(daemon),
                observer=StreamObserver(daemon),
                traits=StreamTraits(
                    1000, tip_interval=run.tip_interval, has_timestamps=not world.plan.is_dynamodb, min_interval=0.05
                ),
                open_stream=open_stream,
                open_queue=None,  # type: ignore[arg-type]
                matches=run.matches if world.plan.is_filtered else None,
                destination=Edge(daemon, StreamDestination(world)) if world.plan.has_destination else None,
            )

        pipe: Pipe = await daemon.reach("connect", made)
        return pipe

    async def disconnect(self, pipe: Pipe) -> None:
        async def done() -> None:
            pass

        await self._daemon.reach("disconnect", done)

    def forgotten(self, mapping: str) -> None:
        pass


class Stream(Run):
    """A stream that reshards, under two changes of its mapping, with records that fail and are given up."""

    plan = replace(PLAN, attempts=1, has_destination=True, is_filtered=True)
    call_seconds = 0.05
    tip_interval = 0.3
    world: StreamWorld

    def set_up(self, loop: VirtualLoop) -> None:
        self.world = StreamWorld(self.stage, loop, self.plan)
        self.store = self.world.store
        self._gates: dict[Daemon, Gate] = {}

    def plumbing(self, daemon: Daemon) -> StreamPlumbing:
        return StreamPlumbing(daemon)

    def gate(self, daemon: Daemon) -> Gate:
        return self._gates.setdefault(daemon, Gate(None))

    def matches(self, record: Record) -> bool:
        return self.world.is_wanted(record.id)

    async def prepare(self, daemon: Daemon) -> None:
        daemon.supervisor.want(Wanted(self.world.mapping))

    async def change(self, mapping: Mapping, name: str = "d") -> None:
        """The mapping is another one from now on."""
        self.world.mapping = mapping
        (await self.alive(name)).supervisor.want(Wanted(mapping))

    def safe(self, daemon: Daemon, until: float) -> None:
        self.world.frozen.update(name for name, at in self.world.seen.items() if at <= until and not self.in_doubt(at))

    def buried(self, daemon: Daemon) -> None:
        self.world.gone(daemon)
        if self.is_alone:
            self.world.calling.clear()
        # A crash may leave an entry without a report, never the reverse.
        kept = {
            name
            for key, text in self.store._documents.items()
            if key.startswith("discarded/")
            for name in json.loads(text)["ids"]
        }
        if not self.world.reported <= kept:
            raise Violation(f"reported, and not in the store: {self.world.reported - kept}")

    async def is_done(self) -> str:
        world = self.world
        if not world.is_created:
            return "no rows yet"
        left = {
            "pending": world.pending(),
            "unsaved": await world.unsaved(),
            "windows": world.unfinished_windows(),
            "to be delivered again": sorted(world.awaited),
            "orders": list(await self.store.document_keys(seek_key("m-1"))),
        }
        return str(left) if any(left.values()) else ""

    async def check(self) -> None:
        owned = [row for row in (await self.store.load("m-1")).values() if row.owner in self.stopped]
        if owned:
            raise Violation(f"the stops left leases behind: {owned}")

    async def play(self) -> None:
        world = self.world
        world.fill(16)
        for name in [name for name in world.record_of if world.is_wanted(name)][1:8:4]:
            world.poison[name] = 5
        await asyncio.sleep(0.6)
        world.split()
        world.fill(8)
        batch = world.mapping.batch
        await self.change(replace(world.mapping, batch=replace(batch, window=0.2)))
        await asyncio.sleep(0.5)
        await self.change(replace(world.mapping, batch=replace(batch, factor=3)))
        world.fill(4)
        await asyncio.sleep(0.5)
        world.merge()
        world.fill(4)
        await asyncio.sleep(0.9)
        world.merge()  # into one: the children of the shard that was split are done, and it can be forgotten
        world.fill(2)
        await asyncio.sleep(0.9)
        await world.expire()
        await self.restart()
        world.fill(3)
        await asyncio.sleep(0.3)


class Latest(Stream):
    """From LATEST: what came after the rows were made is delivered, before the first settlement too. With a retune that
    the workers take over, and one that takes new workers while they start.
    """

    plan = replace(PLAN, start=PositionKind.LATEST, factor=1)

    slow = {"open_stream": 0.2, "acquire": 0.2}  # noqa: RUF012

    async def relane(self, factor: int) -> None:
        await self.change(replace(self.world.mapping, batch=replace(self.world.mapping.batch, factor=factor)))

    async def play(self) -> None:
        world = self.world
        world.fill(4)
        await asyncio.sleep(0.03)
        await self.relane(2)
        while not world.is_created:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.06)
        await self.relane(1)
        for _ in range(12):
            await asyncio.sleep(0.05)
            world.produce()
        await self.relane(3)
        await asyncio.sleep(1.0)


class LatestDynamo(Latest):
    """The same where no iterator has a moment: the rows' moment is a floor."""

    plan = replace(Latest.plan, is_dynamodb=True)


class Windows(Stream):
    """Tumbling windows: each record counts once in the final state of its window."""

    plan = replace(PLAN, tumbling=1.0, factor=1, report_failures=False, shards=1)

    async def play(self) -> None:
        for count in range(12):
            self.world.produce()
            await asyncio.sleep(0.2)
            if count == 6:
                self.world.split()
        await self.restart()
        self.world.fill(3)
        await asyncio.sleep(1.5)


class Reading(Stream):
    """The source refuses in each way that is no loss; a filter of ours breaks once; records wait for room."""

    plan = replace(PLAN, is_filtered=True, size=10)
    budget = 1000
    call_seconds = 0.3
    never = frozenset({"mapping_crashed", "records_lost"})

    def __init__(self, stage: Stage, loop: VirtualLoop) -> None:
        super().__init__(stage, loop)
        self._breaks = 1

    def matches(self, record: Record) -> bool:
        if self._breaks and self.stage.victim is None and len(self.world.settled) > 2:
            self._breaks = 0
            raise ValueError("a defect of ours")
        return super().matches(record)

    async def play(self) -> None:
        faults = self.stage.faults
        faults["iterator"] = [PositionTrimmed("gone")] * 3 + [None, None] + [IteratorExpired("no")] * 2
        faults["fetch"] = [None, IteratorExpired("old"), SourceThrottled("slow", 0.1), KeyError("a defect"), None] * 2
        faults["fetch"] += [SourceGone("deleted")]
        faults["shards"] = [SourceUnavailable("503"), SourceThrottled("slow", 0.1)]
        faults["connect"] = [SourceUnavailable("no such function")]
        self.world.fill(90)
        await asyncio.sleep(1.0)
        self.stage.faults["connect"] = [SourceUnavailable("no such function")]
        await self.change(replace(self.world.mapping, batch=replace(self.world.mapping.batch, size=20)))
        await asyncio.sleep(4.0)


class Storing(Stream):
    """The store fails before and after each of its effects."""

    plan = replace(PLAN, attempts=0, has_destination=True)

    def safe(self, daemon: Daemon, until: float) -> None:
        """Only while the store answers."""

    async def play(self) -> None:
        world = self.world
        away, unanswered = StoreUnavailable("away"), Unanswered(StoreUnavailable("no answer"))
        for operation in ("create", "acquire", "save", "release", "put_document", "forget", "load", "documents"):
            self.stage.faults[operation] = [away, unanswered, None, away]
        world.fill(12)
        world.poison[next(iter(world.record_of))] = 5
        await asyncio.sleep(3.0)
        world.split()
        world.fill(6)
        await asyncio.sleep(2.0)
        self.stage.faults["release"] = [away, unanswered]
        await self.change(replace(world.mapping, batch=replace(world.mapping.batch, factor=3)))
        await asyncio.sleep(2.0)
        await world.expire()
        self.stage.faults["forget"] = [away, unanswered]
        self.stage.faults["release"] = [away, unanswered]
        await self.restart()
        await asyncio.sleep(0.5)


class Discarding(Stream):
    """Records are given up while their destination and the store are down, with a stop in between."""

    plan = replace(PLAN, attempts=0, has_destination=True, keys=2, shards=1, report_failures=False)

    async def play(self) -> None:
        world = self.world
        self.stage.faults["send"] = [DestinationFailed("down", 0.1), Unanswered(DestinationFailed("no answer"))] * 2
        self.stage.faults["put_document"] = [None, StoreUnavailable("away")]
        world.fill(10)
        for name in world.record_of:
            world.poison[name] = 9
        await asyncio.sleep(1.0)
        self.stage.faults["send"] = [DestinationFailed("down", 0.1)] * 4
        world.fill(4)
        for name in world.record_of:
            world.poison[name] = 9
        await asyncio.sleep(0.3)
        await self.restart()
        await asyncio.sleep(0.5)


class Slots(Stream):
    """Few slots, lent ones, and a rate: lanes wait for their turn, and reads for lanes. A stop that is too short cuts
    off.
    """

    plan = replace(PLAN, factor=4, keys=12, size=1)
    call_seconds = 0.5

    def set_up(self, loop: VirtualLoop) -> None:
        super().set_up(loop)
        mapping = self.world.mapping
        self.world.mapping = replace(mapping, batch=replace(mapping.batch, buffer_records=10))

    def gate(self, daemon: Daemon) -> Gate:
        return self._gates.setdefault(daemon, Gate(2, 8.0, Edge(daemon, Lender())))

    async def play(self) -> None:
        self.stage.faults["invoke"] = [None] * 3 + [Reply(ReplyStatus.THROTTLED, error="429")]
        self.world.fill(30)
        await asyncio.sleep(0.7)
        await self.change(replace(self.world.mapping, batch=replace(self.world.mapping.batch, size=2)))
        await asyncio.sleep(0.8)
        await self.cut_off(0.05)
        await asyncio.sleep(1.0)


class Seeking(Stream):
    """An operator moves positions: one shard's, with its descendants, then all of them."""

    plan = replace(PLAN, shards=1, factor=1)
    call_seconds = 0.2

    def safe(self, daemon: Daemon, until: float) -> None:
        if not self.lives["orders"]:
            super().safe(daemon, until)

    async def order(self, number: int, shard: str, position: Position) -> None:
        world = self.world
        world.frozen.clear()
        self.lives["orders"] += 1
        names = [shard] if shard else world.shards
        records = [record for name in names for record in world.shards[name].records]
        world.awaited.update(record.id for record in records if record.id >= position.value)
        order = {"kind": position.kind, "value": position.value, "shard": shard, "by": "alice"}
        await self.store.put_document(seek_key("m-1", number), order)
        (await self.alive()).supervisor.seek("m-1")

    async def play(self) -> None:
        world = self.world
        world.fill(8)
        await asyncio.sleep(0.5)
        world.split()
        world.fill(8)
        await asyncio.sleep(1.0)
        first = next(iter(world.shards.values()))
        await self.order(1, first.id, Position(PositionKind.AT, first.records[3].id))
        await asyncio.sleep(1.2)
        await self.until_done()
        await self.order(2, "", TRIM_HORIZON)
        world.fill(4)
        await asyncio.sleep(3.0)


class Replaced(Stream):
    """The stream is deleted and made anew with the same shards and lower numbers: all of it is delivered."""

    plan = replace(PLAN, shards=1)

    async def play(self) -> None:
        world = self.world
        world.fill(6)
        await asyncio.sleep(0.5)
        await self.until_done()
        await self.down()
        world.incarnation = "2"
        for shard in world.shards.values():
            shard.records.clear()
        world._next //= 2
        world.fill(6)
        self.start()
        await asyncio.sleep(0.5)


class Losing(Stream):
    """A shard leaves the stream before it was read to its end, and a whole generation while nobody looks: that is said,
    and what came from them is read.
    """

    plan = replace(PLAN, shards=1)
    never = Stream.never - {"records_lost"}

    async def play(self) -> None:
        world = self.world
        world.fill(40)
        await asyncio.sleep(0.25)
        first = next(iter(world.shards.values()))
        world.split()
        world.fill(4)
        world.expired.add(first.id)
        world.lost = {record.id for record in first.records if record.id not in world.settled}
        if first.id in await self.store.load("m-1"):
            world.losing.add(first.id)
        self.stage.faults["fetch"] = [SourceGone("expired")]
        await asyncio.sleep(1.0)
        await self.until_done()
        await self.down()
        missed = [shard for shard in world.shards.values() if not shard.is_closed]
        for _ in range(2):
            for shard in [shard for shard in world.shards.values() if not shard.is_closed]:
                shard.is_closed = True
                world._add_shard((shard.id,), shard.low, shard.high)
            world.fill(4)
        for shard in world.shards.values():
            if shard.parents and shard.parents[0] in {parent.id for parent in missed}:
                world.expired.add(shard.id)
                world.lost.update(record.id for record in shard.records)
                world.losing.update(child.id for child in world.shards.values() if shard.id in child.parents)
        self.start()
        await asyncio.sleep(1.0)

    async def check(self) -> None:
        await super().check()
        if silent := self.world.losing - self.world.told:
            raise Violation(f"records were lost, and nobody was told: {silent}")


class Members(Stream):
    """A fleet of two: the shards are shared out, handed over, and given back; one shard has one owner."""

    plan = replace(PLAN, shards=4, keys=12)
    names = ("a",)
    is_alone = False
    tip_interval = 1.0

    async def prepare(self, daemon: Daemon) -> None:
        daemon.supervisor.want(Wanted(self.world.mapping))

    async def play(self) -> None:
        world = self.world
        world.fill(8)
        await asyncio.sleep(3.0)
        self.start("b")
        for _ in range(12):
            world.fill(2)
            await asyncio.sleep(0.5)
        world.split()
        await self.restart("a")
        for _ in range(8):
            world.fill(2)
            await asyncio.sleep(0.5)
        await self.pause("b")
        await asyncio.sleep(2.0)

    async def pause(self, name: str) -> None:
        """Switched off and on at one member; the others go on."""
        mapping = self.world.mapping
        (await self.alive(name)).supervisor.want(Wanted(replace(mapping, enabled=False)))
        await asyncio.sleep(0.5)
        (await self.alive(name)).supervisor.want(Wanted(mapping))


class Fenced(Members):
    """No beat of a member gets through: it gives all up before the others may take it, and comes back renamed."""

    call_seconds = 0.3

    def safe(self, daemon: Daemon, until: float) -> None:
        """What a fence cuts off is delivered again."""

    async def play(self) -> None:
        world = self.world
        self.start("b")
        for count in range(30):
            world.fill(1)
            await asyncio.sleep(0.7)
            if count == 6:
                self.stage.faults["a:beat"] = [StoreUnavailable("away")] * 9


class Passing(Members):
    """Each member stops while shards are on their way to it."""

    call_seconds = 1.0

    async def play(self) -> None:
        world = self.world
        world.fill(8)
        await asyncio.sleep(0.5)
        self.start("b")
        for _ in range(100):
            await asyncio.sleep(0.05)
            at_work = (await self.alive("b")).leases.at_work("m-1")
            rows = await self.store.load("m-1")
            if any(row.owner == self.daemons["b"].leases.me and row.shard not in at_work for row in rows.values()):
                break
        await self.down("b")
        world.fill(8)
        await asyncio.sleep(1.0)
        self.start("b")


class Removing(Members):
    """A mapping is deleted in a fleet: its positions go when no member runs it any more."""

    is_removed = False

    async def prepare(self, daemon: Daemon) -> None:
        if not self.is_removed:  # the mark of the delete is in the store
            await super().prepare(daemon)

    async def is_done(self) -> str:
        if not self.is_removed:
            return await super().is_done()
        states = {daemon.role: daemon.supervisor.state("m-1") for daemon in self.daemons.values()}
        return f"still there: {states}" if any(states.values()) else ""

    async def check(self) -> None:
        await super().check()
        if self.stage.victim is None and await self.store.load("m-1"):
            raise Violation("the mapping was deleted and its positions were not")

    async def play(self) -> None:
        self.start("b")
        await self.store.beat(Member("ghost", 1, {}))
        self.world.fill(12)
        await asyncio.sleep(4.0)
        await self.until_done()
        self.is_removed = True
        (await self.alive("a")).supervisor.remove("m-1", forget=True)
        await asyncio.sleep(0.5)
        (await self.alive("b")).supervisor.remove("m-1", forget=False)
        await asyncio.sleep(DURATION * 31)  # until a member that only beat once is forgotten


# --- queues


class LedgerQueue(FakeQueue):
    """Deletes only what is done."""

    def __init__(self, run: "Queue", **more: Any) -> None:
        super().__init__(run.stage.clock, **more)
        self._run = run

    async def delete(self, records: Sequence[Record]) -> list[Record]:
        for record in records:
            if record.id not in self._run.done and self._run.is_wanted(record.id):
                raise Violation(f"{record.id} is deleted before it succeeded")
        return await super().delete(records)


class QueueTarget:
    capacity = None

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.timeout = daemon.run.timeout

    async def invoke(self, call: Invocation) -> Reply:
        run, daemon = self._daemon.run, self._daemon
        await daemon.live()
        names = [record["id"] for record in json.loads(call.payload)["Records"]]
        run.begins(daemon, names)

        async def answer() -> Reply:
            return run.answer(names)

        try:
            return await daemon.reach("invoke", answer, run.call_seconds)
        finally:
            if not daemon.is_dead:
                run.ends(names)


class QueuePlumbing:
    """Connects the one mapping of a queue."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def connect(self, wanted: Wanted, result: LastResult) -> Pipe:
        daemon, run = self._daemon, self._daemon.run

        async def open_queue() -> Any:
            async def made() -> Any:
                return Edge(daemon, run.queue)

            return await daemon.reach("open_queue", made)

        async def made() -> Pipe:
            return Pipe(
                mapping=wanted.mapping,
                result=result,
                target=QueueTarget(daemon),
                gate=run.gate(daemon),
                observer=NullObserver(),
                traits=None,
                open_stream=None,  # type: ignore[arg-type]
                open_queue=open_queue,
                matches=(lambda record: run.is_wanted(record.id)) if run.is_filtered else None,
            )

        pipe: Pipe = await daemon.reach("connect", made)
        return pipe

    disconnect = StreamPlumbing.disconnect

    def forgotten(self, mapping: str) -> None:
        pass


class Queue(Run):
    """A queue and its mapping: each message succeeds or stays, what was deleted was done, groups keep their order."""

    is_fifo = False
    is_filtered = False
    is_ordered = False
    call_seconds = 0.05
    timeout = 2.0
    visibility = 3.0
    batch = BatchPolicy(10)
    retry = RetryPolicy(report_failures=True)
    policy = QueuePolicy()

    def set_up(self, loop: VirtualLoop) -> None:
        self.world = None
        self.store = MemoryStore()
        self.queue = LedgerQueue(self, visibility=self.visibility, fifo=self.is_fifo)
        self.done: dict[str, float] = {}  # the last success of a message
        self.frozen: set[str] = set()
        self.failing: dict[str, int] = {}  # messages that fail so often
        self.delays: dict[str, float] = {}
        self.running: Counter[str] = Counter()
        source = SourceSpec(SourceKind.SQS, "arn:aws:sqs:eu-west-1:1:q", "eu-west-1", "1", "q", self.is_fifo)
        function = FunctionSpec("f", "arn:aws:lambda:eu-west-1:1:function:f", "arn:aws:iam::1:role/f")
        self.mapping = Mapping("m-1", source, function, self.batch, self.retry, TRIM_HORIZON, queue=self.policy)
        self._gates: dict[Daemon, Gate] = {}

    def plumbing(self, daemon: Daemon) -> QueuePlumbing:
        return QueuePlumbing(daemon)

    def gate(self, daemon: Daemon) -> Gate:
        return self._gates.setdefault(daemon, Gate(None))

    async def prepare(self, daemon: Daemon) -> None:
        daemon.supervisor.want(Wanted(self.mapping))

    async def change(self, mapping: Mapping) -> None:
        self.mapping = mapping
        (await self.alive()).supervisor.want(Wanted(mapping))

    def is_wanted(self, name: str) -> bool:
        return not self.is_filtered or int(name[1:]) % 3 > 0

    def group_of(self, name: str) -> str:
        return self.queue.messages[int(name[1:])].group

    def begins(self, daemon: Daemon, names: list[str]) -> None:
        for name in names:
            if not self.is_wanted(name):
                raise Violation(f"{name} is delivered, but no filter matches it")
            if name in self.frozen:
                raise Violation(f"{name} was done and deleted, and is delivered again")
            if self.is_fifo and self.running[self.group_of(name)]:
                raise Violation(f"two invocations hold the group of {name}")
        self.running.update({self.group_of(name) for name in names})

    def ends(self, names: list[str]) -> None:
        self.running.subtract({self.group_of(name) for name in names})

    def answer(self, names: list[str]) -> Reply:
        bad = [name for name in names if self.failing.get(name, 0) > 0 and self.stage.victim is None]
        for name in bad:
            self.failing[name] -= 1
        if bad and self.is_fifo:
            bad = names[names.index(bad[0]) :]
        for name in names:
            if name in bad:
                continue
            if self.is_fifo and name not in self.done:
                earlier = [m.id for m in self.queue.messages[: int(name[1:])] if m.group == self.group_of(name)]
                if open_ones := [m for m in earlier if m not in self.done]:
                    raise Violation(f"{name} overtook {open_ones} of its group")
            self.done[name] = self.stage.clock.now()
        if bad and not self.retry.report_failures:
            return Reply(ReplyStatus.FUNCTION_ERROR, error="no")
        items = [
            {"itemIdentifier": name, **({"delaySeconds": self.delays[name]} if name in self.delays else {})}
            for name in bad
        ]
        return Reply(ReplyStatus.OK, json.dumps({"batchItemFailures": items}).encode())

    def safe(self, daemon: Daemon, until: float) -> None:
        self.frozen.update(name for name, at in self.done.items() if at <= until and not self.in_doubt(at))

    def buried(self, daemon: Daemon) -> None:
        self.running.clear()

    async def is_done(self) -> str:
        left = self.queue.left()
        return f"still there: {left}" if left else ""

    async def check(self) -> None:
        missing = [m.id for m in self.queue.messages if self.is_wanted(m.id) and m.id not in self.done]
        if missing:
            raise Violation(f"deleted and never done: {missing}")

    async def play(self) -> None:
        queue, faults = self.queue, self.stage.faults
        faults["open_queue"] = [SourceUnavailable("503")]
        faults["visibility_timeout"] = [SourceUnavailable("503"), None, SourceUnavailable("503")]
        faults["receive"] = [SourceThrottled("slow", 0.2), None]
        self.failing.update({"m2": 1, "m5": 2, "m13": 1})
        self.delays.update({"m2": 1.0})
        queue.send(*map(str, range(34)))
        await asyncio.sleep(1.5)
        queue.send(*map(str, range(7)))
        await asyncio.sleep(2.0)
        await self.restart()
        await asyncio.sleep(0.5)


class Filtering(Queue):
    """Many small batches of which some messages match no filter: deletes are shared. A defect of ours in between."""

    is_filtered = True
    batch = BatchPolicy(1)
    never = frozenset({"mapping_crashed"})

    async def play(self) -> None:
        self.stage.faults["receive"] = [None, None, KeyError("a defect")]
        self.queue.send(*map(str, range(24)))
        await asyncio.sleep(1.0)
        self.queue.send(*map(str, range(24)))
        await asyncio.sleep(1.0)
        await self.restart()


class Gathering(Queue):
    """A batching window, filled by several receives at a time, slow enough that its messages are extended."""

    batch = BatchPolicy(30, 2.0)
    call_seconds = 4.0
    timeout = 5.0

    async def play(self) -> None:
        self.queue.send(*map(str, range(26)))
        self.stage.faults["receive"] = [None] * 2 + [SourceThrottled("slow", 0.2)]
        await asyncio.sleep(4.0)
        self.queue.send(*map(str, range(40)))
        await asyncio.sleep(3.0)
        self.queue.send("x", "y")
        await asyncio.sleep(5.0)
        self.queue.send("z")
        await asyncio.sleep(0.5)
        await self.restart()
        await asyncio.sleep(0.5)


class Groups(Queue):
    """FIFO: failures send the rest of their group back; a throttle outlasts a visibility that cannot be extended."""

    is_fifo = True
    batch = BatchPolicy(10, max_bytes=150)
    retry = RetryPolicy()
    visibility = 1.5
    timeout = 1.0

    def send(self, count: int) -> None:
        for n in range(count):
            self.queue.send("x" * 20, group=f"g{n % 2}")

    async def play(self) -> None:
        self.failing.update({"m0": 1, "m3": 2})
        self.send(10)
        await asyncio.sleep(1.0)
        await self.until_done()
        self.queue.deaf = lambda: self.stage.victim is None
        self.stage.faults["invoke"] = [Reply(ReplyStatus.THROTTLED, error="429")] * 12
        self.send(6)
        await asyncio.sleep(4.0)
        self.queue.deaf = lambda: False
        self.stage.faults.clear()
        await asyncio.sleep(2.0)
        await self.restart()


class Refusing(Queue):
    """The target is down: the circuit opens, and what is held waits. Then another target; then a stop with held ones."""

    call_seconds = 0.1

    async def play(self) -> None:
        refusal = Reply(ReplyStatus.UNREACHABLE, error="refused")
        self.stage.faults["invoke"] = [refusal] * 8
        self.queue.send(*map(str, range(12)))
        await asyncio.sleep(2.0)
        await self.change(replace(self.mapping, function=replace(self.mapping.function, name="g")))
        await asyncio.sleep(3.0)
        await self.change(replace(self.mapping, batch=BatchPolicy(10, 1.0)))
        self.stage.faults["invoke"] = [refusal] * 30
        self.queue.send(*map(str, range(12)))
        await asyncio.sleep(2.5)
        await self.restart()
        await asyncio.sleep(0.5)


class Limited(Queue):
    """Few loops, few slots that are lent, a rate, little memory, no circuit; then other bounds, which a runner whose
    calls still run does not share.
    """

    batch = BatchPolicy(2)
    policy = QueuePolicy(3, 1, 300.0, circuit_breaker=False)
    budget = 100
    call_seconds = 0.4

    def gate(self, daemon: Daemon) -> Gate:
        gate = self._gates.setdefault(daemon, Gate(2, 4.0, Edge(daemon, Lender())))
        gate.users = 2
        return gate

    async def play(self) -> None:
        self.queue.send(*map(str, range(18)))
        self.stage.faults["invoke"] = [None, Reply(ReplyStatus.THROTTLED, error="429"), None]
        await asyncio.sleep(2.0)
        await self.change(replace(self.mapping, queue=replace(self.policy, circuit_breaker=True)))
        await asyncio.sleep(0.5)
        gate = Gate(5)
        for daemon in self._gates:
            self._gates[daemon] = gate
        await self.change(replace(self.mapping, batch=BatchPolicy(3)))
        await asyncio.sleep(1.0)
        await self.cut_off(0.1)
        await asyncio.sleep(0.5)


class Sharing(Queue):
    """Batches of a part of a receive more than one, whose deletes meet."""

    batch = BatchPolicy(15, 0.3)
    slow = {"delete": 0.1}  # noqa: RUF012

    async def play(self) -> None:
        self.queue.send(*map(str, range(100)))
        await asyncio.sleep(0.3)
        self.queue.send(*map(str, range(33)))
        await asyncio.sleep(0.7)
        await self.restart()


class Splitting(Queue):
    """A stop while the first of several payloads of a receive is delivered: the others go back."""

    batch = BatchPolicy(10, max_bytes=150)
    call_seconds = 4.0
    timeout = 6.0
    visibility = 9.0

    async def play(self) -> None:
        self.queue.send(*map(str, range(12)))
        await asyncio.sleep(0.3)
        await self.restart()
        await asyncio.sleep(0.5)


class Extending(Groups):
    """Invocations and returns that meet an extension of visibility."""

    slow = {"extend": 2.0}  # noqa: RUF012
    visibility = 3.0
    call_seconds = 3.0
    timeout = 5.0

    def safe(self, daemon: Daemon, until: float) -> None:
        """Only while the queue answers: deletes wait for an extension that is on its way."""

    async def play(self) -> None:
        self.failing.update({"m0": 1})
        self.send(10)
        await asyncio.sleep(8.0)
        await self.restart()


class Refused(Groups):
    """Throttled for longer than a slow extension leaves: what expired goes back with its group, a stop returns the rest."""

    slow = {"extend": 8.0}  # noqa: RUF012
    visibility = 6.0
    call_seconds = 0.02

    async def play(self) -> None:
        self.send(8)
        for seconds in (4.2, 4.4, 9.0, 4.3):
            self.stage.faults["invoke"] = [Reply(ReplyStatus.THROTTLED, error="429")] * 40
            await asyncio.sleep(seconds)
            await self.restart()
        self.stage.faults.clear()


class Circling(Queue):
    """Loops that would receive while the circuit is open; a probe that waits for a permit."""

    batch = BatchPolicy(1)
    call_seconds = 0.1

    def gate(self, daemon: Daemon) -> Gate:
        return self._gates.setdefault(daemon, Gate(None, 3.0))

    async def play(self) -> None:
        self.stage.faults["invoke"] = [Reply(ReplyStatus.UNREACHABLE, error="refused")] * 9
        self.queue.send(*map(str, range(20)))
        await asyncio.sleep(4.0)
        self.queue.send(*map(str, range(6)))
        await asyncio.sleep(3.0)


# --- the control plane: reload and the mapping API

_ARN = "arn:aws:kinesis:eu-west-1:123456789012:stream/"
_FUNCTION = "arn:aws:lambda:eu-west-1:123456789012:function:real"


class ShortStream:
    """One shard of numbered records."""

    def __init__(self, count: int) -> None:
        self.count = count

    async def shards(self) -> Listing:
        return Listing((Shard("s"),), EPOCH)

    async def facts(self) -> StreamFacts:
        return StreamFacts(86400.0, "1")

    async def iterator(self, shard: str, at: Position) -> str:
        return at.value if at.kind is PositionKind.AFTER else str(max(0, int(at.value) - 1)) if at.value else "0"

    async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
        numbers = range(int(iterator) + 1, min(self.count, int(iterator) + limit) + 1)
        records = tuple(Record(str(n), "k", EPOCH, json.dumps({"n": n}).encode()) for n in numbers)
        return Fetch(
            records, str(numbers[-1]) if numbers else "", str(int(iterator) + len(numbers)), 0.0, 9, len(numbers)
        )

    async def close(self) -> None:
        pass


class ControlTarget:
    capacity = None
    timeout = 2.0

    def __init__(self, daemon: Daemon, mapping: str) -> None:
        self._daemon = daemon
        self._mapping = mapping

    async def invoke(self, call: Invocation) -> Reply:
        run = self._daemon.run
        await self._daemon.live()
        names = [(self._mapping, record["n"]) for record in json.loads(call.payload)["Records"]]
        if again := sorted(run.frozen.intersection(names)):
            raise Violation(f"done and saved, and delivered again: {again}")

        async def answer() -> Reply:
            run.done.update(dict.fromkeys(names, self._daemon.stage.clock.now()))
            run.awaited.difference_update(names)
            return Reply(ReplyStatus.OK)

        return await self._daemon.reach("invoke", answer)


class ControlPlumbing:
    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def connect(self, wanted: Wanted, result: LastResult) -> Pipe:
        daemon = self._daemon
        stream = daemon.run.streams[wanted.mapping.source.arn]

        async def open_stream() -> Any:
            return Edge(daemon, stream)

        async def made() -> Pipe:
            return Pipe(
                mapping=wanted.mapping,
                result=result,
                target=ControlTarget(daemon, wanted.mapping.id),
                gate=Gate(None),
                observer=NullObserver(),
                traits=StreamTraits(100, 1.0, has_timestamps=True, min_interval=0.05),
                open_stream=open_stream,
                open_queue=None,  # type: ignore[arg-type]
            )

        pipe: Pipe = await daemon.reach("connect", made)
        return pipe

    disconnect = StreamPlumbing.disconnect

    def forgotten(self, mapping: str) -> None:
        pass


class Control(Run):
    """The config file and an operator with the API, who asks again when he got no answer. What was answered stays; what
    was deleted is gone with all that the store had of it; a mapping that goes on has its positions.
    """

    focus = ("control.py", "runtime/supervisor.py")

    def set_up(self, loop: VirtualLoop) -> None:
        self.world = None
        self.store = MemoryStore()
        self.streams = {_ARN + name: ShortStream(6) for name in ("file", "more", "made", "kept", "real")}
        self.done: dict[tuple[str, int], float] = {}
        self.frozen: set[tuple[str, int]] = set()
        self.awaited: set[tuple[str, int]] = set()  # sought
        self.settings = self.declared("file", "more")
        self.ready: dict[Daemon, asyncio.Event] = {}
        self.deleted: set[str] = set()
        self.expected: dict[str, dict[str, Any]] = {}  # by UUID, as the API should show it

    def declared(self, *names: str, **changes: Any) -> Settings:
        """A config file that declares mappings of these streams."""
        items = [
            Declared(f"m-{name}", normalize({**self.request(name), **changes}), line) for line, name in enumerate(names)
        ]
        return Settings("poller.yaml", functions={"f": HttpFunction("f", "http://127.0.0.1:1/")}, mappings=tuple(items))

    @staticmethod
    def request(name: str, function: str = "f") -> dict[str, Any]:
        return {"EventSourceArn": _ARN + name, "FunctionName": function, "StartingPosition": "TRIM_HORIZON"}

    def plumbing(self, daemon: Daemon) -> ControlPlumbing:
        self.ready[daemon] = asyncio.Event()
        return ControlPlumbing(daemon)

    async def prepare(self, daemon: Daemon) -> None:
        await daemon.control.load(self.settings)
        self.ready[daemon].set()

    def safe(self, daemon: Daemon, until: float) -> None:
        self.frozen.update(
            name
            for name, at in self.done.items()
            if at <= until and not self.in_doubt(at) and name[0] not in self.sought
        )

    @property
    def sought(self) -> set[str]:
        """Mappings that an order is out for: what they deliver again is wanted."""
        return {name for name, _ in self.awaited}

    async def ask(self, operation: Callable[[ControlPlane], Awaitable[Any]], done: str = "") -> Any:
        """Ask until there is an answer. `done`: the error that says that the unanswered one was carried out."""
        is_again = False
        while True:
            daemon = await self.alive()
            while not (self.ready[daemon].is_set() or daemon.is_dead):
                await asyncio.sleep(0.02)
            try:
                answer = await daemon.ask(lambda daemon=daemon: operation(daemon.control))
            except ApiError as error:
                if is_again and error.code in done.split():
                    return None
                raise
            if not isinstance(answer, Unanswered):
                return answer
            is_again = True

    async def create(self, name: str, function: str = "f") -> str:
        """Answers the UUID."""
        arn = _ARN + name
        document = {**self.request(name, function), "Tags": {"a": "1"}}
        await self.ask(lambda control: control.create(document), "ResourceConflictException")
        uuids = [shown["UUID"] for shown in (await self.shown()) if shown["EventSourceArn"] == arn]
        assert len(uuids) == 1, f"{len(uuids)} mappings of {arn}"
        return uuids[0]

    async def shown(self) -> list[dict[str, Any]]:
        async def read(control: ControlPlane) -> Any:
            return control.list()

        return await self.ask(read)

    async def delete(self, uuid: str) -> None:
        await self.ask(lambda control: control.delete(uuid), "ResourceNotFoundException ResourceInUseException")
        self.deleted.add(uuid)

    async def update(self, uuid: str, **changes: Any) -> None:
        await self.ask(lambda control: control.update(uuid, changes))
        self.expected.setdefault(uuid, {}).update(changes)

    async def seek(self, uuid: str, order: dict[str, Any], first: int = 1) -> None:
        for _ in range(40):
            if await self.store.load(uuid):
                break
            await asyncio.sleep(0.05)
        else:
            return  # it was paused before it had read anything
        names = {(uuid, n) for n in range(first, 7)}
        self.frozen -= names
        self.awaited |= names
        await self.ask(lambda control: control.seek(uuid, order, "alice"))

    async def reload(self, settings: Settings) -> None:
        """The file is changed; a daemon that dies over it reads it at its start."""
        self.settings = settings
        daemon = await self.alive()
        while not (self.ready[daemon].is_set() or daemon.is_dead):
            await asyncio.sleep(0.02)
        await daemon.ask(lambda: daemon.control.apply(settings))

    async def is_done(self) -> str:
        shown = {entry["UUID"]: entry for entry in await self.shown()}
        for uuid, expected in self.expected.items():
            if uuid not in self.deleted:
                entry = shown[uuid]
                if differing := {key: entry.get(key) for key, value in expected.items() if entry.get(key) != value}:
                    raise Violation(f"{uuid} was answered to have {expected}, and has {differing}")
        enabled = [uuid for uuid, entry in shown.items() if entry["State"] not in {"Disabled", "Deleting"}]
        left = {(uuid, n) for uuid in enabled for n in range(1, 7) if (uuid, n) not in self.done}
        left |= {name for name in self.awaited if name[0] in enabled}
        if self.deleted & shown.keys():
            return f"still deleting: {self.deleted & shown.keys()}"
        return f"not delivered: {sorted(left)}" if left else ""

    async def check(self) -> None:
        for uuid in self.deleted:
            documents = [key for key in await self.store.document_keys("") if uuid in key]
            if documents or await self.store.load(uuid):
                raise Violation(f"{uuid} was deleted, and the store still has {documents}")
        if "m-more" not in await self.store.mappings():
            raise Violation("a mapping that was taken out of the file lost its positions")

    async def play(self) -> None:
        made, kept, real = await asyncio.gather(
            self.create("made"), self.create("kept"), self.create("real", _FUNCTION)
        )
        await self.update(made, BatchSize=5)
        await self.ask(lambda control: control.update(real, {"FunctionName": _FUNCTION + "ly"}))
        await asyncio.sleep(0.5)
        arn = f"arn:aws:lambda:eu-west-1:123456789012:event-source-mapping:{kept}"
        await asyncio.gather(
            self.update(kept, BatchSize=7),
            self.ask(lambda control: control.tag(arn, {"b": "2"})),
            self.ask(lambda control: control.untag(arn, ["a"])),
            self.ask(lambda control: control.follow()),
            self.ask(lambda control: control.pause(made, "alice")),
            self.ask(lambda control: control.pause("m-file", "alice")),
            self.seek(kept, {"shard": "s", "sequence": "3"}, 3),
            self.reload(self.declared("file", "more", BatchSize=50)),
            self.delete(real),
        )
        await asyncio.sleep(1.0)
        await self.seek(made, {"position": "TRIM_HORIZON"})  # stands while it is paused
        await self.reload(self.declared("file"))
        await self.ask(lambda control: control.resume("m-file", "alice"))
        await self.ask(lambda control: control.pause("m-file", "alice"))
        await self.reload(self.declared("file", Enabled=False))
        await self.delete(made)
        self.awaited = {name for name in self.awaited if name[0] != made}
        await asyncio.sleep(0.5)
        again = await self.create("made")
        await asyncio.sleep(0.5)
        await self.ask(lambda control: control.pause(again, "alice"))
        await asyncio.sleep(0.5)
        await self.seek(again, {"position": "TRIM_HORIZON"})
        self.stage.faults["forget"] = [StoreUnavailable("away")] * 9
        await self.delete(again)
        self.awaited = {name for name in self.awaited if name[0] != again}
        await asyncio.sleep(0.5)
        await self.ask(lambda control: control.resume("m-file", "alice"))
        await self.down()
        self.stage.faults.clear()
        self.settings = self.declared("file")  # it speaks while nobody is there
        await self.store.put_document(
            seek_key("m-file", 1), {"kind": "TRIM_HORIZON", "value": "", "shard": "", "by": "a"}
        )
        self.frozen = {name for name in self.frozen if name[0] != "m-file"}
        self.awaited |= {("m-file", n) for n in range(1, 7)}
        self.start()
        await asyncio.sleep(0.5)
        tags = await self.ask(lambda control: _answer(control.tags(arn)))
        if tags != {"b": "2"}:
            raise Violation(f"{kept} has the tags {tags}")


async def _answer(value: Any) -> Any:
    return value


SCENARIOS: list[type[Run]] = [
    Stream, Latest, LatestDynamo, Windows, Reading, Storing, Discarding, Slots, Seeking, Replaced, Losing,
    Members, Fenced, Passing, Removing,
    Queue, Filtering, Gathering, Groups, Refusing, Limited, Sharing, Splitting, Extending, Refused, Circling,
    Control,
]  # fmt: skip


# --- the runs


def survey(make: type[Run], seed: int = 0) -> Counter[Point]:
    """The crash points of a scenario, as far as they are in its `focus`, and how often it is at each. Nobody is killed."""
    seen = _play(make, seed).stage.seen
    return Counter({point: count for point, count in seen.items() if any(s.file in make.focus for s in point.sites)})


def kill(make: type[Run], point: Point, nth: int = 1, seed: int = 0, *, lands: bool = False) -> None:
    """Kill a daemon when it is at a point the n-th time. Raises what does not hold, or if it never came there."""
    if _play(make, seed, point, nth, lands=lands).stage.victim is None:
        raise AssertionError(f"{make.__name__}, seed {seed}: no daemon was at {point} {nth} times")


@dataclass(frozen=True, slots=True)
class Totals:
    """What was done: scenarios, runs with a kill, the points that somebody was killed at, and the sites in those."""

    scenarios: int
    kills: int
    points: frozenset[Point]

    @property
    def sites(self) -> frozenset[Site]:
        """Every await that was in the stack of a kill."""
        return frozenset(site for point in self.points for site in point.sites)

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.scenarios} scenarios, {len(self.points)} crash points in {len(self.sites)} awaits, "
            f"{self.kills} kills"
        )


def _occasions(point: Point, count: int, times: int | None) -> list[tuple[int, bool]]:
    """When to kill at a point where a run is so often, and whether calls land. By default once; twice where a call is on
    its way: the first is lost, the last one lands.
    """
    if times is not None:
        spread = {1 + (count - 1) * step // max(1, times - 1) for step in range(times)}
        return [(nth, lands) for nth in sorted(spread) for lands in (False, True)]
    return [(1, False), (count, True)] if point.phase == "before" else [(count, count % 2 == 0)]


def campaign(scenarios: Sequence[type[Run]], seeds: Sequence[int] = (0,), times: int | None = None) -> Totals:
    """Kill at every point of the scenarios. Raises what does not hold.

    `times`: at so many of the occasions that a run is at a point, from the first to the last, each with calls that are
    lost and with calls that land. None: once or twice.
    """
    kills, points = 0, set()
    for make in scenarios:
        for seed in seeds:
            for point, count in survey(make, seed).items():
                points.add(point)
                for nth, lands in _occasions(point, count, times):
                    kill(make, point, nth, seed, lands=lands)
                    kills += 1
    return Totals(len(scenarios), kills, frozenset(points))


def main(arguments: Sequence[str] | None = None) -> int:
    """The long version: more seeds, more occasions, and every call both lost and landed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.crash", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each scenario")
    parser.add_argument("--first-seed", type=int, default=0, help="where the seeds begin")
    parser.add_argument("--times", type=int, default=3, help="occasions at each point that somebody is killed at")
    parser.add_argument("--only", nargs="*", default=[], help="scenarios, by name")
    asked = parser.parse_args(arguments)
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    everything: set[Point] = set()
    kills = 0
    chosen = [make for make in SCENARIOS if not asked.only or make.__name__ in asked.only]
    for make in chosen:
        totals = campaign([make], seeds, asked.times)
        print(f"{make.__name__}: {totals}", flush=True)
        everything |= totals.points
        kills += totals.kills
    print(f"all: {Totals(len(chosen), kills, frozenset(everything))}, all promises kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
