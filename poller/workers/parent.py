"""The parent of the workers: it starts them and sees to it that each of them lives, and it is what the world sees."""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import structlog

from poller import __version__, app
from poller.app import ConfigFile, member_name, set_back
from poller.clock import SystemClock, system_random
from poller.control import CONFIG
from poller.core.model import Lease, Member
from poller.core.retry import Backoff
from poller.errors import PollerError, StoreUnavailable
from poller.notify import Notifier, for_children
from poller.ports import CheckpointStore
from poller.runtime.context import TROUBLE_INITIAL, TROUBLE_MAXIMUM
from poller.runtime.waiting import sleep_until, wait_until
from poller.server.app import Server
from poller.server.remote import Remote
from poller.settings import Settings
from poller.stores import open_store
from poller.stores.sqlite import SqliteStore
from poller.telemetry import Metrics
from poller.workers.channel import Back, Begin, Changed, Channel, Granted, Message, Ready, Stop, Take
from poller.workers.pool import Pool

_log = structlog.get_logger(__name__)

_LONGEST_FOLDER = 90  # bytes; the path of a Unix socket has 107
_LATE = 10.0  # seconds after the grace that a worker has for its last writes
_AT_ONCE = 5.0  # and after a second signal
_REFRESH_INTERVAL = 5.0  # what a worker counted since the last one is lost with it


class Parent:
    """`poller run --workers N`: everything that lives as long as the daemon and is no worker."""

    def __init__(self, settings: Settings, count: int) -> None:
        self.settings = settings  # as last read
        self._count = count
        self._channels: dict[int, Channel] = {}
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._owing: dict[int, int] = {}  # how often each worker will say that it is ready: for its start, each change
        self._are_started = asyncio.Event()  # all of them were up at once
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self.is_late = False  # as of `Daemon`
        self._is_ending = False  # workers have been told to stop
        self._fatal = ""
        self._pool = Pool(lambda loan: self._tell(loan[0], Granted(loan[1])))
        self._notifier = Notifier(os.environ, os.getpid())
        self.port = 0

    def stop(self) -> None:
        """Stop in order; asked a second time, at once."""
        if self.is_late:  # it is stopping already, to begin anew: that is left out
            self.is_late = False
            self._notifier.stopping()
            return
        if self._stop.is_set():
            _log.warning("stop_forced", meaning="what was in flight is cut off and will be delivered again")
            self._stop_now.set()
        self._stop.set()

    async def run(self) -> int:
        """Until `stop`, or until it `is_late`; the exit code. PollerError when it cannot start."""
        async with AsyncExitStack() as stack:
            return await self._run(stack, SystemClock(asyncio.get_running_loop()))

    async def _run(self, stack: AsyncExitStack, clock: SystemClock) -> int:
        settings, rng = self.settings, system_random()
        self._clock = clock
        self._trouble = Backoff(TROUBLE_INITIAL, TROUBLE_MAXIMUM, rng.random)
        self._name = member_name(rng)
        remote = self._remote = Remote(self._count, clock)
        metrics = Metrics(clock, remote.status, remote.counted, shard_series=settings.limits.shard_series)
        file = ConfigFile(settings, metrics, self._notifier)
        loop = asyncio.get_running_loop()
        for asked in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(asked, self.stop)
        store = self._store = await open_store(settings, metrics.store_observer(), stack)
        self._is_owner = isinstance(store, SqliteStore)
        if self._is_owner:  # whoever used it before us is dead, else it would have the lock
            await _bury(store, lambda _: True)
            await store.delete_document(CONFIG)  # of what was read at an hour that may be yet to come
        try:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esm-poller-")))
        except OSError as error:
            raise PollerError(f"no directory for sockets can be made: {error}; set TMPDIR to a folder") from error
        if len(os.fsencode(self._folder)) > _LONGEST_FOLDER:
            raise PollerError(
                f"the directory for sockets has too long a name: {self._folder}; set TMPDIR to a shorter one"
            )
        stack.push_async_callback(remote.close)
        await stack.enter_async_context(self._notifier.telling(remote, clock))
        server = self._server = Server(settings.server, remote, metrics, clock, rng)

        def reload() -> None:
            file.read_again()
            server.renew()

        loop.add_signal_handler(signal.SIGHUP, reload)
        stack.push_async_callback(server.stop)
        self.port = await server.start()
        for number in range(self._count):
            self._owes(number, 1)
            await self._announce(number, 1)
        async with asyncio.TaskGroup() as tasks:
            keepers = [tasks.create_task(self._keep(number)) for number in range(self._count)]
            helpers = [
                tasks.create_task(file.watch()),
                tasks.create_task(self._follow(file)),
                tasks.create_task(self._refresh()),
                tasks.create_task(server.run()),
                tasks.create_task(self._keep_time(clock)),
            ]
            await self._stop.wait()
            _log.info("stopping", grace=settings.shutdown_grace)
            if self.is_late:
                self._notifier.reloading()
            else:
                self._notifier.stopping()
            remote.stopping()
            await self._end(keepers, settings.shutdown_grace)
            for helper in helpers:
                helper.cancel()
        if self._fatal:
            raise PollerError(self._fatal)
        _log.info("stopped")
        codes = [keeper.result() for keeper in keepers]
        return 1 if any(codes) else 0

    async def _say_started(self, settings: Settings) -> None:
        await self._are_started.wait()
        await self._remote.refresh()
        _log.info(
            "started",
            version=__version__,
            config=settings.path,
            workers=self._count,
            mappings=len(self._remote.status()),
            port=self.port,
        )
        self._notifier.ready()

    async def _keep_time(self, clock: SystemClock) -> None:
        """As `Daemon` does, for the workers too: what we show is held against their instants."""
        await set_back(clock)
        self.is_late = not self._stop.is_set()
        self._stop.set()

    async def _refresh(self) -> None:
        while True:
            await sleep_until(self._clock, self._clock.now() + _REFRESH_INTERVAL)
            await self._remote.refresh()

    async def _follow(self, file: ConfigFile) -> None:
        """Once all workers are up: a reload that ends before they are would pass for the end of the start."""
        await self._say_started(self.settings)
        while True:
            self.settings = await file.changed()
            self._server.renew()
            for number in self._channels:
                self._tell(number, Changed(self._stamped()))
                self._owes(number, self._owing[number] + 1)
            _log.info("config_reloaded", config=self.settings.path, mappings=len(self.settings.mappings))
            self._notifier.ready()

    def _stamped(self) -> Settings:
        """Where members of a fleet differ, the file that was written last counts. On a store of our own it is the one
        that was read last, whatever its time: it may be an old one that was put back.
        """
        if not self._is_owner:
            return self.settings
        return replace(self.settings, stamp=(round(self._clock.now() * 1e9), 0, 0))

    def _owes(self, number: int, answers: int) -> None:
        """The service manager hears that we are ready when all workers are, under what they were told last."""
        self._owing[number] = answers
        is_behind = any(self._owing.values())
        if not is_behind:
            self._are_started.set()
        self._notifier.behind(is_behind=is_behind)

    def _tell(self, number: int, message: Message) -> None:
        if channel := self._channels.get(number):
            channel.send(message)

    async def _end(self, keepers: Sequence[asyncio.Task[int]], grace: float) -> None:
        """Every worker ends, in order if that can be."""
        self._is_ending = True
        for number in self._channels:
            self._tell(number, Stop())
        late = self._clock.now() + grace + _LATE
        async with asyncio.TaskGroup() as tasks:
            timer = tasks.create_task(wait_until(self._stop_now, self._clock, late))
            ended = tasks.create_task(_wait(keepers))
            await asyncio.wait({ended, timer}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                for number in self._channels:
                    self._tell(number, Stop())
                await asyncio.wait({ended}, timeout=_AT_ONCE)
            timer.cancel()
            ended.cancel()
        for number, process in self._processes.items():
            _log.error("worker_killed", worker=number, meaning="it did not stop in time")
            process.kill()

    # --- one worker

    async def _keep(self, number: int) -> int:
        """One worker, again whenever it dies; its last exit code."""
        life, failures = 0, 0
        while True:
            life += 1
            began = self._clock.now()
            if life > 1:
                await self._announce(number, life)
            try:
                code = await self._live(number, life)
                reason = _why(code)
            except OSError as error:  # no processes or descriptors are left
                code, reason = 1, f"it cannot be started: {error}"
            self._owes(number, 1)  # in its next life
            await self._remote.down(number, reason)
            self._pool.gone(number)
            if self._stop.is_set():
                return code
            if not self._are_started.is_set():
                self._fatal = self._fatal or f"worker {number} did not start: {reason}"
                self._stop.set()
                return code
            _log.error("worker_died", worker=number, reason=reason, meaning="it is started again")
            await self._free(number, life)
            failures = failures + 1 if self._clock.now() - began < TROUBLE_MAXIMUM else 1
            await wait_until(self._stop, self._clock, self._clock.now() + self._trouble.delay(failures))
            if self._stop.is_set():
                return code

    def _member(self, number: int, life: int) -> str:
        """In the order of the workers: the first one does what only one should do."""
        return f"{self._name}/{number:02d}-{life}"

    async def _announce(self, number: int, life: int) -> None:
        """Before it begins, so that the others leave it its share from the start."""
        with suppress(StoreUnavailable):
            await self._store.beat(Member(self._member(number, life), 0))

    async def _free(self, number: int, life: int) -> None:
        """It is dead for certain: nobody need wait until its leases expire."""
        name = self._member(number, life)
        try:
            await _bury(self._store, lambda owner: owner == name or owner.startswith(f"{name}."))
        except StoreUnavailable as error:
            _log.warning("leases_not_freed", worker=number, error=str(error), meaning="they expire")

    async def _live(self, number: int, life: int) -> int:
        """From the start of the process to its end; its exit code."""
        path = self._folder / f"{number}-{life}"
        ours, theirs = socket.socketpair()
        lock = self._store.lock if isinstance(self._store, SqliteStore) else None
        inherited = [theirs.fileno(), *([lock] if lock is not None else [])]
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "poller.workers",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=inherited,
                env=for_children(os.environ),  # systemd listens to one process
                process_group=0,  # a terminal signals the parent alone
            )
        self._processes[number] = process
        channel = self._channels[number] = await Channel.open(ours)
        channel.send(Begin(self._stamped(), number, self._count, self._member(number, life), str(path)))
        if self._is_ending:
            channel.send(Stop())
        try:
            async with asyncio.TaskGroup() as tasks:
                listener = tasks.create_task(self._listen(number, channel, str(path)))
                code = await process.wait()
                listener.cancel()
        finally:
            del self._channels[number], self._processes[number]
            channel.close()
            path.unlink(missing_ok=True)
        return code

    async def _listen(self, number: int, channel: Channel, path: str) -> None:
        is_up = False
        while (message := await channel.receive()) is not None:
            match message:
                case Ready():
                    if not is_up:
                        await self._remote.up(number, path)
                        is_up = True
                    self._owes(number, self._owing[number] - 1)
                case Take(loan=loan, function=function, limit=limit):
                    self._pool.take((number, loan), function, limit)
                case Back(loan=loan):
                    self._pool.back((number, loan))


def _why(code: int) -> str:
    return f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"


async def _wait(keepers: Sequence[asyncio.Task[int]]) -> None:
    await asyncio.wait(keepers)


async def _bury(store: CheckpointStore, is_dead: Callable[[str], bool]) -> None:
    """Free what dead members had, and forget them. StoreUnavailable."""
    for mapping in await store.mappings():
        for row in (await store.load(mapping)).values():
            if row.owner is not None and is_dead(row.owner):
                await store.release(Lease(mapping, row.shard, row.owner, row.token), None)
    for member in await store.members():
        if is_dead(member):
            await store.leave(member)


def run(settings: Settings, count: int) -> int:
    """Run the daemon with so many workers; the exit code of `poller run`."""
    return app.run(settings, lambda newest: Parent(newest, count))
