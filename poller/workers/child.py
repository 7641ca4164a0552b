"""One worker: a daemon that its parent tells what to do."""

import asyncio
import socket
from itertools import count
from pathlib import Path
from shutil import rmtree

import structlog

from poller.app import Daemon, Worker
from poller.errors import PollerError
from poller.garbage import collect_rarely
from poller.runtime.gate import Lender
from poller.settings import Settings
from poller.telemetry import configure_logging
from poller.workers.channel import Back, Begin, Changed, Channel, Granted, Ready, Stop, Take

_log = structlog.get_logger(__name__)

ORPHAN_GRACE = 2.0
"""Seconds for what is in flight when the parent has died: whoever restarts the daemon waits for it."""


class _Loans:
    """Slots that the parent lends."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = count(1)
        self._awaited: dict[int, asyncio.Future[None]] = {}

    async def take(self, function: str, limit: int) -> int:
        """The loan's number, once there is a slot."""
        loan = next(self._numbers)
        granted = self._awaited[loan] = asyncio.get_running_loop().create_future()
        self._channel.send(Take(loan, function, limit))
        try:
            await granted
        except asyncio.CancelledError:
            self.give_back(loan)  # granted or not
            raise
        finally:
            del self._awaited[loan]
        return loan

    def granted(self, loan: int) -> None:
        """The parent has one for us."""
        if (waiting := self._awaited.get(loan)) and not waiting.done():
            waiting.set_result(None)

    def give_back(self, loan: int) -> None:
        """It is not needed any more."""
        self._channel.send(Back(loan))


class _Borrower:
    """Implements `Lender`: the slots of one function."""

    def __init__(self, loans: _Loans, function: str) -> None:
        self._loans = loans
        self._function = function
        self._held: list[int] = []

    async def take(self, limit: int) -> None:
        self._held.append(await self._loans.take(self._function, limit))

    def give_back(self) -> None:
        self._loans.give_back(self._held.pop())


class _Ordered:
    """What the parent says, as the daemon needs it."""

    def __init__(self, channel: Channel, loans: _Loans, folder: Path) -> None:
        self._channel = channel
        self._loans = loans
        self._folder = folder
        self._settings: asyncio.Queue[Settings] = asyncio.Queue()

    async def settings(self) -> Settings:
        """The next ones."""
        settings = await self._settings.get()
        configure_logging(settings.log, settings.secrets())
        return settings

    async def obey(self, daemon: Daemon) -> None:
        """Until the parent is gone, and then end too."""
        while True:
            match await self._channel.receive():
                case Granted(loan=loan):
                    self._loans.granted(loan)
                case Changed(settings=settings):
                    self._settings.put_nowait(settings)
                case Stop():
                    daemon.stop()
                case None:
                    _log.error("parent_died", meaning="this worker stops", grace=ORPHAN_GRACE)
                    daemon.hurry(ORPHAN_GRACE)
                    rmtree(self._folder, ignore_errors=True)  # which the parent would have done
                    return


async def _work(descriptor: int) -> int:
    channel = await Channel.open(socket.socket(fileno=descriptor))
    begin = await channel.receive()
    if not isinstance(begin, Begin):
        return 1  # the parent is gone already
    structlog.contextvars.bind_contextvars(worker=begin.number)
    configure_logging(begin.settings.log, begin.settings.secrets())
    loans = _Loans(channel)
    ordered = _Ordered(channel, loans, Path(begin.socket).parent)

    def lend(function: str) -> Lender:
        return _Borrower(loans, function)

    worker = Worker(
        begin.number,
        begin.count,
        begin.name,
        begin.socket,
        lend,
        ordered.settings,
        lambda: channel.send(Ready()),
    )
    daemon = Daemon(begin.settings, worker)
    async with asyncio.TaskGroup() as tasks:
        obeying = tasks.create_task(ordered.obey(daemon))
        try:
            await daemon.run()
        except PollerError as error:
            _log.critical("worker_not_started", error=str(error))
            return 1
        finally:
            obeying.cancel()
            channel.close()
    return 0


def work(descriptor: int) -> int:
    """Be a worker over one end of a socket pair; the exit code of the process."""
    collect_rarely()
    try:
        return asyncio.run(_work(descriptor))
    except asyncio.CancelledError:
        return 1
