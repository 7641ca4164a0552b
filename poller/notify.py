"""What systemd is told of the daemon: that it is up, reloads or stops, how it does in a line, and that it lives.

    STARTING --ready--> RUNNING <--ready, reloading--> RELOADING
        |                  |                               |
        +------------------+---------- stopping -----------+--> STOPPING

The rules are those of sd_notify(3) and sd_watchdog_enabled(3). Own code, for it is one datagram: of the libraries
`sdnotify` was last released in 2017 and knows no watchdog, `systemd-watchdog` knows neither reloads nor longer
timeouts, and `cysystemd` brings a whole libsystemd. All of them send in a way that may block the event loop.
"""

import asyncio
import socket
from collections.abc import Mapping
from enum import StrEnum
from math import inf
from types import TracebackType

import structlog

from poller.ports import Clock, Overview
from poller.runtime.waiting import wait_until
from poller.statusview import instant

_log = structlog.get_logger(__name__)

INTERVAL = 5.0
"""Seconds between looks at how the daemon does."""
EXTENSION = 60.0
"""Seconds that systemd is asked for while the daemon starts, reloads or stops: a store may be waited for, and a stop
takes as long as the config file says, which systemd does not know.
"""
_VARIABLES = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})
_LONGEST_LINE = 500
_MICROSECONDS = 1_000_000


def for_children(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of processes that shall not speak for this one."""
    return {name: value for name, value in variables.items() if name not in _VARIABLES}


class _Phase(StrEnum):
    STARTING = "Starting"
    RUNNING = "Running"
    RELOADING = "Reloading"
    STOPPING = "Stopping"


class Notifier:
    """Tells the service manager that `variables` (the environment) name. Without one nothing happens.

    It never waits for the manager and never fails: what could not be said is logged once, and said again later.
    """

    def __init__(self, variables: Mapping[str, str], pid: int) -> None:
        """`pid`: of this process; a watchdog that is meant for another one is left alone."""
        self._address = _address(variables.get("NOTIFY_SOCKET", ""))
        self._watchdog = _watchdog(variables, pid) if self._address else None
        self._phase = _Phase.STARTING
        self._changed = asyncio.Event()  # the phase did
        self._awaited = ""  # what the start waits for
        self._is_refused = False  # the config file was, when it was last read
        self._is_behind = False  # workers are
        self._is_due = False  # READY is to be said, once they are not
        self._owed = ""  # the newest phase, while the manager has not taken it
        self._line = ""  # the last one that it has taken
        self._is_heard = True

    # --- where the daemon is

    def waiting(self, reason: str) -> None:
        """The start waits for something."""
        self._awaited = reason
        self._changed.set()

    def ready(self, *, refused: bool = False) -> None:
        """It is up, or has reloaded; `refused`: the config file is bad, the old one goes on."""
        self._is_refused, self._is_due = refused, True
        self._say_due()

    def behind(self, *, is_behind: bool) -> None:
        """Workers are not ready yet, or all are. Ready is said when they are, however early `ready` was called."""
        self._is_behind = is_behind
        self._say_due()

    def _say_due(self) -> None:
        if self._is_due and not self._is_behind:
            self._is_due = False
            self._enter(_Phase.RUNNING, "READY=1")

    def reloading(self) -> None:
        """It reads its config file, or begins anew; `ready` follows."""
        self._is_due = False
        # Type=notify-reload compares the moment with that of its signal: CLOCK_MONOTONIC, which asyncio's clock is.
        moment = int(asyncio.get_running_loop().time() * _MICROSECONDS)
        self._enter(_Phase.RELOADING, f"RELOADING=1\nMONOTONIC_USEC={moment}")

    def stopping(self) -> None:
        """It stops. What ends in the meantime is not told: systemd would take the daemon for running again."""
        self._enter(_Phase.STOPPING, "STOPPING=1")

    def telling(self, overview: Overview, clock: Clock) -> "_Telling":
        """Inside of it the status line is kept up to date and the watchdog is told that the event loop turns."""
        return _Telling(self, overview, clock)

    def _enter(self, phase: _Phase, message: str) -> None:
        if self._address is None or self._phase is _Phase.STOPPING:
            return
        self._phase, self._owed = phase, message
        self._changed.set()
        self._pay()

    # --- how it does

    async def tell(self, overview: Overview, clock: Clock) -> None:
        """For ever; returns at once where nobody is to be told."""
        if self._address is None:
            return
        half = self._watchdog / 2 if self._watchdog else inf
        interval = min(INTERVAL, half)
        beat = clock.now() if self._watchdog else inf  # when the watchdog is told next
        while True:
            self._changed.clear()
            now, health = clock.now(), overview.health()
            is_alive = now >= beat and health is None
            if self._say(self._describe(overview, health, now), is_alive=is_alive) and is_alive:
                beat = now + half
            next_look = now + interval
            await wait_until(self._changed, clock, min(beat, next_look) if beat > now else next_look)

    def _say(self, line: str, *, is_alive: bool) -> bool:
        """What is new, in one datagram; False: the manager does not take it."""
        fields = [f"STATUS={line}"] if line != self._line else []
        if self._phase is not _Phase.RUNNING:
            fields.append(f"EXTEND_TIMEOUT_USEC={int(EXTENSION * _MICROSECONDS)}")
        if is_alive:
            fields.append("WATCHDOG=1")
        if not self._pay() or (fields and not self._send("\n".join(fields))):
            return False
        self._line = line
        return True

    def _describe(self, overview: Overview, health: str | None, now: float) -> str:
        """One line for people. Nothing in it can pass for a field of its own."""
        mappings, parts = overview.status(), []
        if self._phase is _Phase.STOPPING:
            parts.append(f"{sum(mapping.in_flight for mapping in mappings)} in flight")
        elif self._phase is _Phase.STARTING:
            parts += [self._awaited] if self._awaited else []
        else:
            shards = [shard for mapping in mappings for shard in mapping.shards]
            blocked = [shard.blocked_since for shard in shards if shard.blocked_since is not None]
            disabled = sum(mapping.state == "Disabled" for mapping in mappings)
            if health is not None:
                parts.append(f"unhealthy: {health}")
            parts.append(_counted(len(mappings), "mapping") + (f" ({disabled} disabled)" if disabled else ""))
            if shards:
                parts.append(_counted(len(shards), "shard"))
            if blocked:
                parts.append(f"{len(blocked)} blocked, the first since {instant(min(blocked), now)}")
            if self._is_refused:
                parts.append("the changed config file is refused")
            if missing := overview.unready():
                first = "" if len(missing) == 1 else ", the first"
                parts.append(f"{len(missing)} not ready{first}: {missing[0]}")
        text = " ".join(f"{self._phase}: {', '.join(parts)}".removesuffix(": ").split())
        return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 3]}..."

    # --- the socket

    def _pay(self) -> bool:
        """Say the phase that the manager has not taken yet; later news would be of another one. True: it has."""
        if self._owed and self._send(self._owed):
            self._owed = ""
        return not self._owed

    def _send(self, message: str) -> bool:
        assert self._address is not None
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(message.encode(errors="replace"), self._address)
        except OSError as error:
            if self._is_heard:
                _log.warning("service_manager_not_told", error=str(error), meaning="it is tried again")
            self._is_heard = False
            return False
        self._is_heard = True
        return True


class _Telling:
    """A task that ends with the block. An error of the block leaves it as it is, not in a group."""

    def __init__(self, notifier: Notifier, overview: Overview, clock: Clock) -> None:
        self._notifier = notifier
        self._overview = overview
        self._clock = clock
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> None:
        await self._tasks.__aenter__()
        self._task = self._tasks.create_task(self._notifier.tell(self._overview, self._clock))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await self._tasks.__aexit__(None, None, None)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _address(name: str) -> str | None:
    """What a datagram is sent to: a path, or a name in the abstract namespace, which begins with a zero byte."""
    if not name:
        return None
    if name[0] not in "/@" or len(name) == 1:
        _log.warning("notify_socket_unknown", meaning="NOTIFY_SOCKET is neither a path nor an abstract name")
        return None
    return f"\0{name[1:]}" if name[0] == "@" else name


def _watchdog(variables: Mapping[str, str], pid: int) -> float | None:
    """Seconds after which systemd takes a silent process for dead; None when it does not watch this one."""
    if variables.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    given = variables.get("WATCHDOG_USEC", "")
    if not given:
        return None
    if not given.isascii() or not given.isdecimal() or not int(given):
        _log.warning("watchdog_unknown", meaning="WATCHDOG_USEC is not a number of microseconds above 0")
        return None
    return int(given) / _MICROSECONDS
