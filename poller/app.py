"""The composition root: settings -> store, clients, targets, runners, server; signals; start and stop in order.

Stopping: not ready -> mappings (shards, then leases) -> checkpointer -> server -> targets -> clients -> store.
"""

import asyncio
import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import structlog

from poller import __version__
from poller.aws.probe import Probe
from poller.aws.session import AwsClients
from poller.clock import SystemClock, system_random
from poller.config import load
from poller.control import ControlPlane
from poller.core.filters import compile_filter
from poller.core.model import Mapping, MappingId, SourceKind
from poller.core.retry import Backoff
from poller.destinations import Destinations
from poller.errors import ConfigError, PollerError, StoreUnavailable
from poller.filemodes import loose_modes
from poller.garbage import collect_rarely, collect_young
from poller.mappings import resolve
from poller.notify import Notifier
from poller.ports import Clock, QueueSource, StreamSource, Target, Tracer
from poller.runtime.checkpointer import Checkpointer
from poller.runtime.context import TROUBLE_INITIAL, TROUBLE_MAXIMUM, Context, LastResult, Pipe
from poller.runtime.gate import ByteBudget, Gate, Lender
from poller.runtime.lease_keeper import LeaseKeeper
from poller.runtime.supervisor import Supervisor, Wanted
from poller.runtime.waiting import sleep_until, wait_until
from poller.server.app import Server
from poller.server.remote import Private
from poller.settings import DynamoStoreSettings, FunctionSettings, HttpFunction, LambdaFunction, Settings, StoreSettings
from poller.sources import Sources, traits
from poller.stores import open_store
from poller.targets import open_target
from poller.telemetry import Metrics, configure_logging
from poller.watch import stamp, watch

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Shared:
    """One function's target, shared by its mappings in a Region; closed with the last of them."""

    target: Target
    users: int = 0


def _emulator(settings: FunctionSettings) -> str | None:
    """The URL of a Runtime Interface Emulator."""
    return settings.url if isinstance(settings, HttpFunction) and settings.protocol == "rie" else None


_Bounds: TypeAlias = tuple[int | None, float | None, Lender | None]  # of a Gate


@dataclass(frozen=True, slots=True)
class Worker:
    """Which of the processes of a daemon this one is: `number` from 0, of `count`. `name`: as a member of the fleet.

    `socket`: the path where its parent asks it things. `lend`: the slots that a function has in the whole daemon, by
    its name. `settings`: the next ones, when the config file has changed. `ready`: to be called once it listens, and
    once it runs what `settings` has answered.
    """

    number: int
    count: int
    name: str
    socket: str
    lend: Callable[[str], Lender]
    settings: Callable[[], Awaitable[Settings]]
    ready: Callable[[], None]

    def bounds(self, name: str, limit: int | None, rate: float | None) -> _Bounds:
        """What this worker has of a function's limits. Where there are fewer slots than workers, each one is lent to
        whoever needs it.
        """
        if rate is not None:
            rate /= self.count
        if limit is None or limit < self.count:
            return limit, rate, None if limit is None else self.lend(name)
        each, rest = divmod(limit, self.count)
        return each + (self.number < rest), rate, None


class Connections:
    """Implements `Plumbing`: a target is opened once for each function and Region, a source for each start. The gate of
    a function outlives changes of its settings, for what is in flight under the old ones counts under the new.
    """

    def __init__(
        self,
        clients: AwsClients,
        clock: Clock,
        metrics: Metrics,
        probe: Probe,
        worker: Worker | None = None,
        *,
        tracer: Callable[[Mapping, FunctionSettings], Tracer] | None = None,
    ) -> None:
        """`tracer`: that of a mapping and what its function is; None: nothing is traced."""
        self._worker = worker
        self._tracer = tracer
        self._clients = clients
        self._probe = probe
        self._clock = clock
        self._metrics = metrics
        self._sources = Sources(clients, clock)
        self._destinations = Destinations(clients)
        self._functions: dict[tuple[FunctionSettings, str], _Shared] = {}
        self._gates: dict[str, Gate] = {}  # by function name, or by URL of an emulator

    async def connect(self, wanted: Wanted, result: LastResult) -> Pipe:
        """The pipe of a mapping. ConfigError when its target's files (CA, certificate) cannot be read."""
        mapping, settings = wanted.mapping, wanted.revision
        assert isinstance(settings, HttpFunction | LambdaFunction)
        reported_to = mapping.destination
        destination = self._destinations.open(reported_to.target, mapping.source.region) if reported_to else None
        wanted_records = compile_filter(mapping.filters, mapping.source.kind)
        key = (settings, mapping.source.region)
        shared = self._functions.pop(key, None)
        if shared is None:
            shared = _Shared(open_target(settings, mapping.source.region, self._clients, self._clock))
        self._functions[key] = shared  # the newest settings of a function last
        gate = self._gate(settings, shared.target)
        shared.users += 1
        gate.users += 1
        self._clients.hold(mapping.source.role, mapping.source.region)

        async def open_stream() -> StreamSource:
            return await self._sources.open_stream(await self._with_role(mapping, settings))

        async def open_queue() -> QueueSource:
            return await self._sources.open_queue(mapping)

        return Pipe(
            mapping=mapping,
            result=result,
            target=shared.target,
            gate=gate,
            observer=self._metrics.observer(mapping),
            traits=traits(mapping.source),
            open_stream=open_stream,
            open_queue=open_queue,
            matches=wanted_records.matches if wanted_records else None,
            destination=destination,
            tracer=self._tracer(mapping, settings) if self._tracer is not None else None,
        )

    async def _with_role(self, mapping: Mapping, settings: FunctionSettings) -> Mapping:
        """Records of Kinesis show the function's role. That of a function that only AWS knows is asked for."""
        is_shown = mapping.source.kind is SourceKind.KINESIS
        if not is_shown or not isinstance(settings, LambdaFunction) or settings.is_configured:
            return mapping
        if (role := await self._probe.role(settings, mapping.source.region)) is None:
            _log.warning(
                "function_role_unknown",
                mapping=mapping.id,
                function=mapping.function.name,
                meaning=f"records show {mapping.function.role}; the poller's credentials need lambda:GetFunction",
            )
            return mapping
        return replace(mapping, function=replace(mapping.function, role=role))

    def _gate(self, settings: FunctionSettings, target: Target) -> Gate:
        """`max_concurrency` and `max_invocations_per_second` hold for the function in the whole daemon; the Runtime
        Interface Emulator takes one call at a time per URL, whatever names it has. The newest settings hold at once,
        for mappings too that have not changed yet.
        """
        limits = [limit for limit in (settings.max_concurrency, target.capacity) if limit is not None]
        limit, rate = min(limits, default=None), settings.max_invocations_per_second
        name = settings.name
        if url := _emulator(settings):
            name, rate = url, self._emulator_rate(url)
        bounds = self._bounds(name, limit, rate)
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = Gate(*bounds)
        else:
            gate.resize(*bounds)
        return gate

    def _bounds(self, name: str, limit: int | None, rate: float | None) -> _Bounds:
        """Of what holds for the daemon, what holds here."""
        return self._worker.bounds(name, limit, rate) if self._worker else (limit, rate, None)

    def _emulator_rate(self, url: str) -> float | None:
        """The lowest rate of the functions that share the emulator."""
        newest = {settings.name: settings for settings, _ in self._functions if _emulator(settings) == url}
        rates = [settings.max_invocations_per_second for settings in newest.values()]
        return min([rate for rate in rates if rate is not None], default=None)

    async def disconnect(self, pipe: Pipe) -> None:
        """Close the target with its last mapping, and the clients of a role with the last that reads as it."""
        await self._clients.release(pipe.mapping.source.role)
        pipe.gate.users -= 1
        self._gates = {name: gate for name, gate in self._gates.items() if not gate.is_unused}
        for key, shared in list(self._functions.items()):
            if shared.target is pipe.target:
                shared.users -= 1
                if shared.users == 0:
                    del self._functions[key]
                    if (url := _emulator(key[0])) and pipe.gate.users:
                        pipe.gate.resize(*self._bounds(url, 1, self._emulator_rate(url)))
                    await shared.target.close()

    def forgotten(self, mapping: MappingId) -> None:
        """Drop the mapping's series: a deleted mapping must not look alive."""
        self._metrics.forget(mapping)

    async def close(self) -> None:
        """Close what is left: destinations, and targets after a stop that was cut short."""
        await self._destinations.close()
        for shared in self._functions.values():
            await shared.target.close()
        self._functions.clear()


class ConfigFile:
    """The config file of a running daemon: read again when it has changed. A bad one is refused: the old goes on."""

    def __init__(self, settings: Settings, metrics: Metrics, notifier: Notifier) -> None:
        """`notifier` hears of each reading; when it is done with, but for a bad file, from whoever asked for it."""
        self._settings = settings
        self._metrics = metrics
        self._notifier = notifier
        self._seen = settings.stamp
        self._look = asyncio.Event()  # it may have changed
        self._is_asked = False  # somebody wants it read whether it has or not

    def read_again(self) -> None:
        """Whether it has changed or not."""
        self._is_asked = True
        self._look.set()

    async def watch(self) -> None:
        """Notice changes; for ever."""
        await watch(self._settings.path, self._look)

    async def changed(self) -> Settings:
        """The next good ones. What cannot change while the daemon runs is as it was."""
        old = self._settings
        while True:
            await self._look.wait()
            self._look.clear()
            now = stamp(old.path)
            if not self._is_asked and (now == self._seen or now is None):
                continue
            self._seen, self._is_asked = now, False
            self._notifier.reloading()
            try:
                settings = await asyncio.to_thread(load, old.path)
            except ConfigError as error:
                self._metrics.config_reloaded(success=False)
                _log.error("config_refused", config=old.path, mistakes=list(error.mistakes))
                self._notifier.ready(refused=True)
                continue
            self._metrics.config_reloaded(success=True)
            kept = {name: getattr(old, name) for name in _FIXED if getattr(settings, name) != getattr(old, name)}
            if kept:
                _log.warning("restart_needed", keys=list(kept), meaning="these keys are read at the start only")
            self._settings = replace(settings, **kept)
            configure_logging(settings.log, settings.secrets() | self._settings.secrets())
            for warning in settings.warnings:
                _log.warning("config_warning", warning=warning)
            return self._settings


class Daemon:
    """`poller run`: everything that lives as long as the process. With `worker` it is one of several."""

    def __init__(self, settings: Settings, worker: Worker | None = None) -> None:
        self.settings = settings  # as last read
        self._worker = worker
        self._grace = settings.shutdown_grace
        self.is_late = False  # the wall clock was set back: after `run` somebody should begin anew, with `settings`
        self._stop = asyncio.Event()
        self._file: ConfigFile | None = None
        self._server: Server | None = None
        self._main: asyncio.Task[None] | None = None
        self._notifier = Notifier({} if worker else os.environ, os.getpid())
        self.port = 0

    def stop(self) -> None:
        """Stop in order; asked a second time, at once."""
        if self.is_late:  # it is stopping already, to begin anew: that is left out
            self.is_late = False
            self._notifier.stopping()
            return
        if self._stop.is_set() and self._main is not None:
            _log.warning("stop_forced", meaning="what was in flight is cut off and will be delivered again")
            self._main.cancel()
        self._stop.set()

    def hurry(self, grace: float) -> None:
        """Stop in order, and sooner than the settings say."""
        self._grace = min(self._grace, grace)
        self._stop.set()

    def reload(self) -> None:
        """Read the config file again, and what the server's certificate is."""
        if self._file is not None:
            self._file.read_again()
        if self._server is not None:
            self._server.renew()

    async def run(self) -> int:
        """Until `stop`, or until it `is_late`; 0. PollerError: it cannot start. CancelledError: after a second stop."""
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        if self._worker is None:  # a worker is told by its parent
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            loop.add_signal_handler(signal.SIGHUP, self.reload)
        async with AsyncExitStack() as stack:
            await self._run(stack, SystemClock(loop))
        return 0

    async def _run(self, stack: AsyncExitStack, clock: SystemClock) -> None:
        settings, worker = self.settings, self._worker
        rng = system_random()
        metrics = Metrics(
            clock,
            lambda: supervisor.status(),  # noqa: PLW0108  # made below: it needs the store
            shard_series=settings.limits.shard_series,
        )
        store = await open_store(settings, metrics.store_observer(), stack, exclusive=worker is None)
        clients = await stack.enter_async_context(AwsClients(settings.aws))
        probe = Probe(clients)
        tracer = await stack.enter_async_context(_tracing(settings))
        connections = Connections(clients, clock, metrics, probe, worker, tracer=tracer)
        stack.push_async_callback(connections.close)
        trouble = Backoff(TROUBLE_INITIAL, TROUBLE_MAXIMUM, rng.random)
        checkpointer = Checkpointer(store, clock, settings.checkpoint_interval, trouble)
        me = worker.name if worker else member_name(rng)
        is_fleet = isinstance(settings.store, DynamoStoreSettings) or worker is not None
        leases = LeaseKeeper(
            store, clock, me, settings.lease_duration, trouble, alone=not is_fleet, count=metrics.lease_changed
        )
        context = Context(
            clock=clock,
            random=rng,
            store=store,
            checkpointer=checkpointer,
            budget=ByteBudget(settings.limits.buffer_bytes // (worker.count if worker else 1)),
            backoff=Backoff(settings.retry.initial_backoff, settings.retry.maximum_backoff, rng.random),
            trouble=trouble,
            leases=leases,
        )
        supervisor = Supervisor(context, connections)
        control = ControlPlane(store, supervisor, probe, is_alone=leases.is_alone)
        private = Private(worker.socket, control, metrics) if worker else None
        server = self._server = Server(settings.server, control, metrics, clock, rng, private=private)
        file = self._file = ConfigFile(settings, metrics, self._notifier)
        await stack.enter_async_context(self._notifier.telling(control, clock))
        await self._load(control, settings, clock, trouble, is_fleet=is_fleet)
        stack.push_async_callback(server.stop)
        self.port = await server.start()
        if worker is None:
            _log.info(
                "started", version=__version__, config=settings.path, mappings=len(supervisor.status()), port=self.port
            )
        else:
            _log.info("worker_started", name=worker.name, pid=os.getpid())
        self._say_ready()
        async with asyncio.TaskGroup() as tasks:
            saver = tasks.create_task(checkpointer.run())
            keeper = tasks.create_task(leases.run())
            collector = tasks.create_task(collect_young())
            reloader = tasks.create_task(self._follow(control, worker.settings if worker else file.changed))
            watchers = [] if worker else [tasks.create_task(file.watch()), tasks.create_task(server.run())]
            follower = tasks.create_task(self._follow_members(control, clock, is_fleet=is_fleet))
            if worker is None:
                watchers.append(tasks.create_task(self._keep_time(clock)))
            work = tasks.create_task(supervisor.run())
            await self._stop.wait()
            _log.info("stopping", grace=self._grace)
            if self.is_late:
                self._notifier.reloading()
            else:
                self._notifier.stopping()
            control.stopping()
            await leases.stop()
            supervisor.stop(self._grace)
            await work
            await leases.leave()
            keeper.cancel()
            saver.cancel()
            collector.cancel()
            reloader.cancel()
            follower.cancel()
            for watcher in watchers:
                watcher.cancel()
        _log.info("stopped")

    async def _load(
        self, control: ControlPlane, settings: Settings, clock: Clock, trouble: Backoff, *, is_fleet: bool
    ) -> None:
        """A store that is a file is there or not; one beyond a network is waited for, until a stop."""
        failures = 0
        while True:
            try:
                await control.load(settings)
                break
            except StoreUnavailable as error:
                failures += 1
                if not is_fleet or self._stop.is_set():
                    raise
                _log.error("store_unavailable", error=str(error), attempt=failures)
                self._notifier.waiting(str(error))
                await wait_until(self._stop, clock, clock.now() + trouble.delay(failures))

    async def _follow_members(self, control: ControlPlane, clock: Clock, *, is_fleet: bool) -> None:
        """What another member was told holds here within seconds."""
        while is_fleet:
            await sleep_until(clock, clock.now() + _FOLLOW_INTERVAL)
            try:
                await control.follow()
            except StoreUnavailable as error:
                _log.error("members_not_followed", error=str(error))

    async def _keep_time(self, clock: SystemClock) -> None:
        """A wall clock that was set back is followed by beginning anew: nothing that waits would end in time. A daemon
        that stops already just stops.
        """
        await set_back(clock)
        self.is_late = not self._stop.is_set()
        self._stop.set()

    async def _follow(self, control: ControlPlane, changed: Callable[[], Awaitable[Settings]]) -> None:
        """Run what the config file says, whenever it has changed."""
        while True:
            self.settings = settings = await changed()
            await control.apply(settings)
            if self._server is not None:
                self._server.renew()
            _log.info("config_reloaded", config=settings.path, mappings=len(settings.mappings))
            self._say_ready()

    def _say_ready(self) -> None:
        self._notifier.ready()
        if self._worker is not None:
            self._worker.ready()


def _tracing(settings: Settings) -> AbstractAsyncContextManager[Callable[[Mapping, FunctionSettings], Tracer] | None]:
    """What traces mappings while it is open; None where tracing is off. ConfigError: OTEL_ variables are wrong."""
    if settings.tracing is None:
        return nullcontext()
    from poller.tracing import tracing  # noqa: PLC0415  # its packages are an extra

    return tracing(settings.tracing)


async def set_back(clock: SystemClock) -> None:
    """Wait until the wall clock was set back, and say so; say too when it has jumped ahead."""
    while not (behind := clock.behind()):
        if ahead := clock.jumped():
            meaning = "the machine slept, or its clock was set: ages, limits of age and waits follow"
            _log.warning("clock_jumped_ahead", seconds=round(ahead, 1), meaning=meaning)
        await sleep_until(clock, clock.now() + _CLOCK_INTERVAL)
    _log.error("clock_set_back", seconds=round(behind, 1), meaning="everything stops in order and begins anew")


def member_name(rng: random.Random) -> str:
    """Of this process in the fleet; another one each time."""
    return f"{socket.gethostname()}/{os.getpid()}/{rng.getrandbits(32):08x}"


_FOLLOW_INTERVAL = 2.0
_CLOCK_INTERVAL = 1.0
_FIXED = (
    *("aws", "store", "server", "retry", "limits", "tracing"),
    *("checkpoint_interval", "lease_duration", "shutdown_grace"),
)


async def check_connections(settings: Settings) -> list[str]:
    """What `validate --connect` finds: a sentence for each source, target, destination and store out of reach."""
    clock = SystemClock(asyncio.get_running_loop())
    found: list[str] = []
    async with AwsClients(settings.aws) as clients:
        sources = Sources(clients, clock)
        if problem := await _check_store(settings, Metrics(clock, list)):
            found.append(f"{settings.path}: store: {problem}")
        checked: set[tuple[FunctionSettings, str]] = set()
        for item in settings.mappings:
            mapping, function = resolve(item.uuid, item.document, settings.functions, settings.path)
            source, spec = mapping.source, mapping.function
            place = f"{settings.path}:{item.line}"
            try:
                await _reach(sources, mapping)
            except PollerError as error:
                found.append(f"{place}: EventSourceArn: {error}")
            if mapping.destination and (reason := await _check_destination(clients, mapping)):
                found.append(f"{place}: DestinationConfig: {reason}")
            if (function, source.region) in checked:
                continue
            checked.add((function, source.region))
            try:
                target = open_target(function, source.region, clients, clock)
            except PollerError as error:
                found.append(f"{place}: FunctionName {spec.name}: {error}")
                continue
            try:
                reason = await target.check()
            finally:
                await target.close()
            if reason is not None:
                found.append(f"{place}: FunctionName {spec.name}: {reason}")
    return found


async def _check_destination(clients: AwsClients, mapping: Mapping) -> str | None:
    assert mapping.destination is not None
    destinations = Destinations(clients)
    try:
        return await destinations.open(mapping.destination.target, mapping.source.region).check()
    except PollerError as error:
        return str(error)
    finally:
        await destinations.close()


async def _check_store(settings: Settings, metrics: Metrics) -> str | None:
    """Can it be used? Looks only: it makes nothing, and a daemon that runs on it, or starts now, is not disturbed."""
    where = settings.store
    if isinstance(where, StoreSettings) and not await asyncio.to_thread(Path(where.path).exists):
        return await asyncio.to_thread(_why_unmakeable, where.path)
    async with AsyncExitStack() as stack:
        try:
            store = await open_store(settings, metrics.store_observer(), stack, exclusive=False)
            await store.members()
        except PollerError as error:
            return str(error)
    return None


def _why_unmakeable(path: str) -> str | None:
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return f"{path} cannot be made: {folder} is not a directory that this user may write to"
    return None


async def _reach(sources: Sources, mapping: Mapping) -> None:
    if mapping.source.kind is SourceKind.SQS:
        queue = await sources.open_queue(mapping)
        try:
            await queue.visibility_timeout()
        finally:
            await queue.close()
        return
    stream = await sources.open_stream(mapping)
    try:
        await stream.shards()
    finally:
        await stream.close()


class Life(Protocol):
    """One life of `poller run`: a daemon, or the parent of workers."""

    settings: Settings
    """As last read."""
    is_late: bool
    """After `run`: the wall clock was set back, and another one should begin anew, with `settings`."""

    async def run(self) -> int:
        """Until it is stopped, or `is_late`; the exit code. PollerError when it cannot start; CancelledError when it is
        cut off.
        """
        ...


def run(settings: Settings, begin: Callable[[Settings], Life] = Daemon) -> int:
    """Live one life after the other until one ends for good; the exit code of `poller run`."""
    collect_rarely()
    configure_logging(settings.log, settings.secrets())
    for warning in settings.warnings:
        _log.warning("config_warning", warning=warning)
    for loose in loose_modes(settings):
        _log.warning("file_mode_warning", **asdict(loose))
    try:
        while True:
            life = begin(settings)
            code = asyncio.run(life.run())
            if not life.is_late:
                return code
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nobody hears it until the next one does
            settings = life.settings
    except asyncio.CancelledError:
        return 1
    except PollerError as error:
        _log.critical("not_started", error=str(error))
        return 1
