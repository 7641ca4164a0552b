"""What parent and worker tell each other, over a socket pair that nobody else has."""

import asyncio
import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Self, TypeAlias

from poller.settings import Settings

_HEAD = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Begin:
    """To the worker, first. `name`: as a member of the fleet; `socket`: the path to listen at."""

    settings: Settings
    number: int
    count: int
    name: str
    socket: str


@dataclass(frozen=True, slots=True)
class Changed:
    """To the worker: the config file has changed."""

    settings: Settings


@dataclass(frozen=True, slots=True)
class Stop:
    """To the worker: stop in order; the second time at once."""


@dataclass(frozen=True, slots=True)
class Ready:
    """To the parent: the worker listens; and again for each `Changed`, once it runs what that says."""


@dataclass(frozen=True, slots=True)
class Take:
    """To the parent: a slot of a function that has `limit` in the whole daemon, as soon as one is free.

    `loan`: a number that is new for each.
    """

    loan: int
    function: str
    limit: int


@dataclass(frozen=True, slots=True)
class Granted:
    """To the worker: it has the slot."""

    loan: int


@dataclass(frozen=True, slots=True)
class Back:
    """To the parent: the slot is not needed any more, or its worker does not wait for it any more."""

    loan: int


Message: TypeAlias = Begin | Changed | Stop | Ready | Take | Granted | Back


class Channel:
    """One end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use `open`."""
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> Self:
        """Over one end of a socket pair, which it takes over."""
        end.setblocking(False)
        return cls(*await asyncio.open_connection(sock=end))

    def send(self, message: Message) -> None:
        """In the order of calls; lost when the other side is gone."""
        if self._writer.is_closing():
            return
        data = pickle.dumps(message)
        self._writer.write(_HEAD.pack(len(data)) + data)

    async def receive(self) -> Message | None:
        """The next one; None: the other side is gone."""
        try:
            (size,) = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
            message: Message = pickle.loads(await self._reader.readexactly(size))  # noqa: S301 - our own process's
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message

    def close(self) -> None:
        """The other side sees its end."""
        self._writer.close()
