"""Kinesis with enhanced fan-out, over HTTP on 127.0.0.1: subscriptions that end, reshards, and every misbehaviour.

What AWS documents: a subscription lives for 5 minutes; a call within 5 s of a successful one is refused, a later one
takes over; an idle subscription gets empty events; the last event of a closed shard has ChildShards and no
ContinuationSequenceNumber. All times can be shortened.
"""

import asyncio
import base64
import json
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

CONTENT_TYPE = "application/vnd.amazon.eventstream"
FIRST_ARRIVAL = 1_545_084_650.987


def message(headers: bytes, payload: bytes = b"") -> bytes:
    """One event-stream message: prelude with its CRC, headers, payload, CRC of all."""
    lengths = (16 + len(headers) + len(payload)).to_bytes(4, "big") + len(headers).to_bytes(4, "big")
    body = lengths + zlib.crc32(lengths).to_bytes(4, "big") + headers + payload
    return body + zlib.crc32(body).to_bytes(4, "big")


def frame(headers: dict[str, str], payload: bytes = b"") -> bytes:
    """A message with string headers."""
    raw = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + len(value.encode()).to_bytes(2, "big") + value.encode()
        for name, value in headers.items()
    )
    return message(raw, payload)


def event(document: dict[str, Any], kind: str = "SubscribeToShardEvent") -> bytes:
    headers = {":message-type": "event", ":event-type": kind, ":content-type": "application/json"}
    return frame(headers, json.dumps(document).encode())


def exception(code: str, message: str = "") -> bytes:
    headers = {":message-type": "exception", ":exception-type": code, ":content-type": "application/json"}
    return frame(headers, json.dumps({"message": message}).encode())


@dataclass
class FakeShard:
    """`records` as GetRecords shows them; `children` of a closed one."""

    records: list[dict[str, Any]] = field(default_factory=list)
    parents: tuple[str, ...] = ()
    children: tuple[str, ...] = ()


class Connection:
    """One answer to SubscribeToShard, for the misbehaviours."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._response = response
        self.taken_over = asyncio.Event()

    async def send(self, data: bytes) -> None:
        await self._response.write(data)

    def abort(self) -> None:
        """As a proxy does that dies."""
        assert self._request.transport is not None
        self._request.transport.abort()


Fault = Callable[[Connection], Awaitable[None]]


async def silence(connection: Connection) -> None:
    """Nothing ever comes, and the connection stays open."""
    await connection.taken_over.wait()


async def nothing(connection: Connection) -> None:
    """The subscription ends at once, in good order."""


def sends(*frames: bytes) -> Fault:
    """These bytes come, then the subscription ends in good order."""

    async def fault(connection: Connection) -> None:
        for data in frames:
            await connection.send(data)

    return fault


def breaks_after(*frames: bytes) -> Fault:
    """These bytes come, then the connection breaks."""

    async def fault(connection: Connection) -> None:
        for data in frames:
            await connection.send(data)
        await asyncio.sleep(0.01)  # else the kernel may drop what it has not sent yet
        connection.abort()

    return fault


class FanOut:
    """A stream with one consumer.

    `life`: seconds of a subscription; `guard`: seconds after a success in which a call is refused; `heartbeat`: between
    empty events; `per_event`: most records in one. `faults`: what the next subscriptions do instead, in order;
    `answers`: what the next calls are answered instead, before the guard is looked at: (status, document).
    """

    def __init__(self, life: float = 300.0, guard: float = 5.0, heartbeat: float = 5.0, per_event: int = 100) -> None:
        self.url = ""
        self.life, self.guard, self.heartbeat, self.per_event = life, guard, heartbeat, per_event
        self.shards: dict[str, FakeShard] = {"shardId-000000000000": FakeShard()}
        self.faults: deque[Fault] = deque()
        self.answers: deque[tuple[int, dict[str, Any]]] = deque()
        self.calls: list[tuple[float, dict[str, Any]]] = []
        self.subscribed: list[dict[str, Any]] = []  # the calls that succeeded
        self.open: list[str] = []  # shards of the subscriptions that are open now
        self.changed = asyncio.Condition()
        self._sequence = 100
        self._holders: dict[str, tuple[float, Connection]] = {}

    async def put(self, *texts: str, shard: str = "shardId-000000000000", key: str = "k") -> list[str]:
        """Write records; their sequence numbers."""
        made = []
        for text in texts:
            self._sequence += 10
            made.append(
                {
                    "SequenceNumber": str(self._sequence),
                    "PartitionKey": key,
                    "Data": base64.b64encode(text.encode()).decode(),
                    "ApproximateArrivalTimestamp": round(FIRST_ARRIVAL + self._sequence, 3),
                    "EncryptionType": "NONE",
                }
            )
        self.shards[shard].records += made
        await self._notify()
        return [record["SequenceNumber"] for record in made]

    async def split(self, shard: str = "shardId-000000000000") -> tuple[str, str]:
        """Close a shard; its children."""
        first, second = (f"shardId-{len(self.shards) + n:012d}" for n in range(2))
        self.shards[shard].children = (first, second)
        for child in (first, second):
            self.shards[child] = FakeShard(parents=(shard,))
        await self._notify()
        return first, second

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds."""
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(condition)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        match request.headers["X-Amz-Target"]:
            case "Kinesis_20131202.ListShards":
                return web.json_response({"Shards": [self._listed(shard) for shard in self.shards]})
            case "Kinesis_20131202.DescribeStreamSummary":
                return web.json_response({"StreamDescriptionSummary": {"RetentionPeriodHours": 24}})
            case "Kinesis_20131202.SubscribeToShard":
                return await self._subscribe(request, body)
            case target:
                raise AssertionError(target)

    def _listed(self, name: str) -> dict[str, Any]:
        shard = self.shards[name]
        numbers = {"StartingSequenceNumber": "1", **({"EndingSequenceNumber": "9"} if shard.children else {})}
        parents = dict(zip(("ParentShardId", "AdjacentParentShardId"), shard.parents, strict=False))
        return {"ShardId": name, "SequenceNumberRange": numbers, **parents}

    async def _subscribe(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        now = asyncio.get_running_loop().time()
        name = body["ShardId"]
        self.calls.append((now, body))
        if self.answers:
            status, document = self.answers.popleft()
            return web.json_response(document, status=status)
        if name not in self.shards:
            return self._refuse("ResourceNotFoundException", f"Shard {name} is not there")
        last, holder = self._holders.get(name, (-self.guard, None))
        if now - last < self.guard:
            return self._refuse("ResourceInUseException", "Another active subscription exists for this consumer")
        if holder is not None:
            holder.taken_over.set()
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE})
        await response.prepare(request)
        connection = Connection(request, response)
        self._holders[name] = (now, connection)
        self.subscribed.append(body)
        self.open.append(name)
        await self._notify()
        try:
            await connection.send(event({}, "initial-response"))
            if self.faults:
                await self.faults.popleft()(connection)
            else:
                await self._serve(connection, self.shards[name], body["StartingPosition"], now + self.life)
            await response.write_eof()
        except ConnectionError:
            pass  # broken, by a fault or by the client; a client that hangs up while nothing is sent cancels us
        finally:
            self.open.remove(name)
            await self._notify()
        return response

    @staticmethod
    def _refuse(code: str, message: str) -> web.Response:
        return web.json_response({"__type": code, "message": message}, status=400)

    async def _serve(self, connection: Connection, shard: FakeShard, start: dict[str, Any], until: float) -> None:
        loop = asyncio.get_running_loop()
        at = self._place(shard, start)
        continuation = shard.records[at - 1]["SequenceNumber"] if at else "1"
        heartbeat_at = 0.0
        while loop.time() < until:
            if connection.taken_over.is_set():
                await connection.send(exception("ResourceInUseException", "Another subscription took over"))
                return
            batch = shard.records[at : at + self.per_event]
            at += len(batch)
            continuation = batch[-1]["SequenceNumber"] if batch else continuation
            behind = 1000 * (len(shard.records) - at)
            document = {"Records": batch, "MillisBehindLatest": behind, "ContinuationSequenceNumber": continuation}
            if shard.children and at == len(shard.records):
                del document["ContinuationSequenceNumber"]
                document["ChildShards"] = [
                    {
                        "ShardId": child,
                        "ParentShards": [],
                        "HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": "1"},
                    }
                    for child in shard.children
                ]
            if batch or "ChildShards" in document or loop.time() >= heartbeat_at:
                heartbeat_at = loop.time() + self.heartbeat
                await connection.send(event(document))
            if "ChildShards" in document:
                return
            if at == len(shard.records):
                await self._news(connection, shard, at, min(until, heartbeat_at))

    async def _news(self, connection: Connection, shard: FakeShard, at: int, until: float) -> None:
        """Wait for records, the shard's end or another subscriber."""

        def is_news() -> bool:
            return len(shard.records) > at or bool(shard.children) or connection.taken_over.is_set()

        with suppress(TimeoutError):
            async with asyncio.timeout_at(until), self.changed:
                await self.changed.wait_for(is_news)

    @staticmethod
    def _place(shard: FakeShard, start: dict[str, Any]) -> int:
        """Index of the first record from a position on."""
        match start["Type"]:
            case "TRIM_HORIZON":
                return 0
            case "LATEST":
                return len(shard.records)
            case "AT_TIMESTAMP":
                moment = start["Timestamp"]
                return sum(record["ApproximateArrivalTimestamp"] < moment for record in shard.records)
            case "AT_SEQUENCE_NUMBER":
                return sum(int(record["SequenceNumber"]) < int(start["SequenceNumber"]) for record in shard.records)
            case "AFTER_SEQUENCE_NUMBER":
                return sum(int(record["SequenceNumber"]) <= int(start["SequenceNumber"]) for record in shard.records)
        raise AssertionError(start)


@asynccontextmanager
async def running(**times: Any) -> AsyncIterator[FanOut]:
    """A fake on a free port; what is open when it ends is cut off."""
    fake = FanOut(**times)
    app = web.Application()
    app.router.add_post("/", fake.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield fake
    finally:
        await runner.cleanup()
