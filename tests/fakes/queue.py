"""A queue on virtual time: visibility, receive counts, message groups."""

import asyncio
import json
from dataclasses import dataclass

from poller.core.model import Record
from poller.errors import PollerError


@dataclass
class Message:
    id: str
    group: str
    body: str
    visible_at: float = 0.0
    receives: int = 0
    handle: str = ""
    is_deleted: bool = False
    is_dead: bool = False


class FakeQueue:
    """`QueueSource`. `trouble()` may raise before each call; messages of a group are given in order, one batch at a time.

    `limit`: maxReceiveCount; a message that was received so often is dead at the next receive. `deaf`: extensions fail.
    `answering`: seconds that the answer to a change travels after the change was made.
    """

    def __init__(self, clock, visibility: float = 30.0, *, fifo: bool = False, limit: int | None = None) -> None:
        self.limit = limit
        self.deaf = lambda: False
        self.answering = 0.0
        self.extensions: list[tuple[float, int, float]] = []
        self.deletes: list[tuple[float, int]] = []
        self.clock = clock
        self.visibility = visibility
        self.fifo = fifo
        self.messages: list[Message] = []
        self.receives: list[tuple[float, int, float]] = []
        self.returned: list[str] = []
        self.polls = 0
        self.most_polls = 0
        self.trouble = lambda: None
        self._changed = asyncio.Event()

    def send(self, *bodies: str, group: str = "") -> None:
        for body in bodies:
            self.messages.append(Message(f"m{len(self.messages)}", group, body))
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def left(self) -> list[Message]:
        return [message for message in self.messages if not (message.is_deleted or message.is_dead)]

    async def visibility_timeout(self) -> float:
        self.trouble()
        return self.visibility

    async def receive(self, limit: int, wait: float, visibility: float) -> list[Record]:
        self.trouble()
        assert 1 <= limit <= 10
        assert 0 <= wait <= 20
        asked = self.clock.now()
        self.receives.append((asked, limit, wait))
        self.polls += 1
        self.most_polls = max(self.most_polls, self.polls)
        ends = self.clock.now() + wait
        try:
            while True:
                await asyncio.sleep(0.01)
                found = self._take(limit, visibility, asked)
                if found or self.clock.now() >= ends:
                    return found
                soonest = min([m.visible_at for m in self.left() if m.visible_at > self.clock.now()], default=ends)
                try:
                    async with asyncio.timeout_at(self.clock.loop(min(ends, soonest))):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            self.polls -= 1

    def _take(self, limit: int, visibility: float, asked: float) -> list[Record]:
        now = self.clock.now()
        expires = max(asked, now - min(1.0, visibility / 4)) + visibility  # as the real source has it
        locked = {m.group for m in self.left() if m.visible_at > now} if self.fifo else set()
        found = []
        for message in self.left():
            if message.visible_at > now or (self.fifo and message.group in locked):
                continue
            if self.limit is not None and message.receives >= self.limit:
                message.is_dead = True
                continue
            message.receives += 1
            message.visible_at = now + visibility
            message.handle = f"{message.id}/{message.receives}"
            wire = json.dumps({"id": message.id, "body": message.body, "group": message.group}).encode()
            found.append(Record(message.id, message.group, now, wire, message.handle, expires))
            if len(found) == limit:
                break
        return found

    async def delete(self, records) -> list[Record]:
        self.deletes.append((self.clock.now(), len(records)))
        await asyncio.sleep(0.01)
        try:
            self.trouble()
        except PollerError:
            return list(records)
        left = []
        for record in records:
            message = next(m for m in self.messages if m.id == record.id)
            if message.handle == record.handle and message.visible_at > self.clock.now():
                message.is_deleted = True
            else:
                left.append(record)
        self._tell()
        await asyncio.sleep(self.answering)
        return left

    async def extend(self, records, seconds: float) -> list[Record]:
        self.extensions.append((self.clock.now(), len(records), seconds))
        await asyncio.sleep(0.01)
        if self.deaf():
            return list(records)
        left = []
        for record in records:
            message = next(m for m in self.messages if m.id == record.id)
            if message.handle == record.handle and not message.is_deleted:
                message.visible_at = self.clock.now() + seconds
                if seconds == 0:
                    self.returned.append(message.id)
            else:
                left.append(record)
        self._tell()
        await asyncio.sleep(self.answering)
        return left

    async def close(self) -> None:
        pass
