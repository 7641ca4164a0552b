"""The demo's two ends: what is put into the sources, and the HTTP target that counts what arrives."""

import asyncio
import base64
import hashlib
import json
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

STREAM = TABLE = QUEUE = "orders"
SHARDS = 4
SOURCES = ("kinesis", "dynamodb", "sqs")
_PER_SECOND = {"kinesis": 20.0, "dynamodb": 5.0, "sqs": 5.0}
_CUSTOMERS = (
    30  # partition keys; their MD5 puts 7 to 8 of them into each of the four shards, 3 or 4 into each half of #2
)
_ITEMS = 10


@dataclass(slots=True)
class Tally:
    """What one source got and what the target took of it. `waiting`: order number -> when it was put."""

    produced: int = 0
    delivered: int = 0
    duplicates: int = 0
    disorders: int = 0
    latest: int | None = None
    took: float | None = None
    waiting: dict[int, float] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

    def put(self, now: float) -> int:
        """A new order number; its record is on the way from `now` on."""
        self.produced += 1
        self.waiting[self.produced] = now
        return self.produced

    def take(self, record: "Arrival", now: float) -> bool:
        """The target took a record: true when for the first time."""
        since = self.waiting.pop(record.number, None)
        if since is None:
            self.duplicates += 1
            return False
        self.delivered += 1
        self.latest, self.took = record.number, now - since
        for line, place in record.places.items():
            self.disorders += place <= self.places.get(line, -1)
            self.places[line] = place
        return True


@dataclass(slots=True)
class Shard:
    """A Kinesis shard: the hash keys it takes, first and last, and how many orders went in and came out."""

    hash_keys: tuple[int, int]
    parents: tuple[str, ...]
    produced: int = 0
    delivered: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A record as the target reads it. `places`: its place in each line that promises order (shard, key)."""

    source: str
    number: int
    places: dict[str, int] = field(default_factory=dict)
    shard: str = ""
    sequence: str = ""
    is_poison: bool = False


@dataclass(slots=True)
class Poison:
    """The one record that the target cannot take until `repaired`. The shard is known once it was `refused`.

    `blocked`: seconds from the first refusal until it was `taken`; `others` the records of other shards in that time.
    """

    number: int
    customer: str
    shard: str = ""
    sequence: str = ""
    refused_at: float = 0.0
    blocked: float = 0.0
    others: int = 0
    attempts: int = 0
    refused: asyncio.Event = field(default_factory=asyncio.Event)
    repaired: asyncio.Event = field(default_factory=asyncio.Event)
    taken: asyncio.Event = field(default_factory=asyncio.Event)


class Target:
    """The user's function, as an aiohttp handler. Counts a record as delivered when it answers 200."""

    def __init__(self) -> None:
        self.tallies = {source: Tally() for source in SOURCES}
        self.shards: dict[str, Shard] = {}
        """The Kinesis shards, those that a reshard closed too."""
        self.early = 0
        """How many records of a shard came before the last one of its parents."""
        self.arrivals: deque[str] = deque(maxlen=100)
        self.poison: Poison | None = None
        self._slow: frozenset[str] = frozenset()
        self._hurry = asyncio.Event()
        self._moved = asyncio.Event()

    async def handle(self, request: web.Request) -> web.Response:
        """One invocation: 500 while the batch holds the poison and it is not repaired, else 200."""
        event = await request.json()
        records = [_read(record) for record in event["Records"]]
        if records[0].shard in self._slow:
            await self._hurry.wait()
        now = asyncio.get_running_loop().time()
        attempt = int(request.headers["X-Poller-Attempt"])
        poisons = [record for record in records if record.is_poison]
        refused = bool(poisons) and self._refuses(poisons[0], attempt, now)
        numbers = " ".join(str(record.number) for record in records)
        verdict = f"500 to attempt {attempt}" if refused else "200"
        self.arrivals.append(f"{records[0].source:<8} {short(records[0].shard):<3} {verdict}: {numbers}")
        if refused:
            return web.Response(status=500)
        for record in records:
            is_new = self.tallies[record.source].take(record, now)
            if is_new and record.shard:
                shard = self.shards[record.shard]
                shard.delivered += 1
                self.early += self.on_the_way(shard.parents) > 0
                self._count_other(record.shard)
        self._moved.set()
        return web.Response()

    def slow_down(self, shards: Iterable[str]) -> None:
        """From now on invocations with records of these shards are not answered before `hurry`."""
        self._slow, self._hurry = frozenset(shards), asyncio.Event()

    def hurry(self) -> None:
        """The end of `slow_down`."""
        self._slow = frozenset()
        self._hurry.set()

    def on_the_way(self, shards: Iterable[str]) -> int:
        """How many orders were put into these shards and are not delivered."""
        return sum(self.shards[shard].produced - self.shards[shard].delivered for shard in shards)

    def _count_other(self, shard: str) -> None:
        poison = self.poison
        if poison and poison.refused.is_set() and not poison.taken.is_set() and shard != poison.shard:
            poison.others += 1

    def _refuses(self, record: "Arrival", attempt: int, now: float) -> bool:
        poison = self.poison
        assert poison is not None
        poison.attempts = attempt
        if not poison.refused.is_set():
            poison.shard, poison.sequence, poison.refused_at = record.shard, record.sequence, now
            poison.refused.set()
        if poison.repaired.is_set() and not poison.taken.is_set():
            poison.blocked = now - poison.refused_at
            poison.taken.set()
        return not poison.repaired.is_set()

    async def everything_arrived(self) -> None:
        """Waits until no record is on the way."""
        while any(tally.waiting for tally in self.tallies.values()):
            self._moved.clear()
            await self._moved.wait()


def short(shard: str) -> str:
    """`#2` for `shardId-000000000002`, nothing for no shard."""
    return f"#{int(shard.rpartition('-')[2])}" if shard else ""


def names(shards: Iterable[str]) -> str:
    """`#4 and #5`."""
    return " and ".join(map(short, shards))


def _customer_in(hash_keys: tuple[int, int]) -> str:
    """One whose orders go there: Kinesis hashes partition keys with MD5."""
    first, last = hash_keys
    customers = (f"customer-{number}" for number in range(_CUSTOMERS))
    return next(
        customer
        for customer in customers
        if first <= int(hashlib.md5(customer.encode(), usedforsecurity=False).hexdigest(), 16) <= last
    )


def _read(record: dict[str, Any]) -> Arrival:
    match record["eventSource"]:
        case "aws:kinesis":
            order = json.loads(base64.b64decode(record["kinesis"]["data"]))
            shard, _, sequence = record["eventID"].partition(":")
            places = {shard: int(sequence), record["kinesis"]["partitionKey"]: order["number"]}
            return Arrival("kinesis", order["number"], places, shard, sequence, order["poison"])
        case "aws:dynamodb":
            item = record["dynamodb"]["NewImage"]
            number = int(item["number"]["N"])
            return Arrival("dynamodb", number, {item["id"]["S"]: number})
        case _:
            return Arrival("sqs", json.loads(record["body"])["number"])


class Producer:
    """Makes the three sources and puts orders into them until `stop` is set. `clients` by service: aiobotocore's.

    Errors of botocore pass through: a local AWS that does not take a record is the end of the demo.
    """

    def __init__(self, clients: dict[str, Any], target: Target, stop: asyncio.Event) -> None:
        self._clients = clients
        self._target = target
        self._stop = stop
        self._queue_url = ""
        self._one_at_a_time = asyncio.Lock()  # so that order numbers and sequence numbers of a key agree

    async def make_sources(self) -> dict[str, str]:
        """Creates stream, table and queue; answers the ARN that a mapping names, by source."""
        kinesis, dynamodb, sqs = (self._clients[source] for source in SOURCES)
        await kinesis.create_stream(StreamName=STREAM, ShardCount=SHARDS)
        await kinesis.get_waiter("stream_exists").wait(StreamName=STREAM, WaiterConfig={"Delay": 1})
        stream = await kinesis.describe_stream_summary(StreamName=STREAM)
        await self._find_shards()
        table = await dynamodb.create_table(
            TableName=TABLE,
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
            StreamSpecification={"StreamEnabled": True, "StreamViewType": "NEW_AND_OLD_IMAGES"},
        )
        self._queue_url = (await sqs.create_queue(QueueName=QUEUE))["QueueUrl"]
        queue = await sqs.get_queue_attributes(QueueUrl=self._queue_url, AttributeNames=["QueueArn"])
        return {
            "kinesis": stream["StreamDescriptionSummary"]["StreamARN"],
            "dynamodb": table["TableDescription"]["LatestStreamArn"],
            "sqs": queue["Attributes"]["QueueArn"],
        }

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """One for each source; each ends soon after the stop, with no put half done."""
        puts = {"kinesis": self.put_order, "dynamodb": self._put_item, "sqs": self._send}
        return [self._repeat(puts[source], 1 / _PER_SECOND[source]) for source in SOURCES]

    async def put_order(self, *, is_poison: bool = False) -> None:
        """One Kinesis record; `is_poison`: the one that the target will refuse."""
        async with self._one_at_a_time:
            await self._put(is_poison=is_poison)

    async def split(self, parent: str) -> tuple[str, ...]:
        """Splits a shard at the middle of its hash keys; the two children, which take what is put from now on."""
        first, last = self._target.shards[parent].hash_keys
        middle = str((first + last + 1) // 2)
        split = self._clients["kinesis"].split_shard
        return await self._reshard(
            [parent], lambda: split(StreamName=STREAM, ShardToSplit=parent, NewStartingHashKey=middle)
        )

    async def merge(self, left: str, right: str) -> tuple[str, ...]:
        """Merges two neighbours; their one child, which takes what is put from now on."""
        merge = self._clients["kinesis"].merge_shards
        return await self._reshard(
            [left, right], lambda: merge(StreamName=STREAM, ShardToMerge=left, AdjacentShardToMerge=right)
        )

    async def _reshard(self, parents: list[str], change: Callable[[], Awaitable[object]]) -> tuple[str, ...]:
        """The children. Nothing is put meanwhile, so the number of orders in the parents is final and known.

        The last order in each parent is put just before, so that each has something to deliver before its end.
        """
        async with self._one_at_a_time:
            for parent in parents:
                await self._put(_customer_in(self._target.shards[parent].hash_keys))
            await change()
            await (
                self._clients["kinesis"].get_waiter("stream_exists").wait(StreamName=STREAM, WaiterConfig={"Delay": 1})
            )
            return await self._find_shards()

    async def _find_shards(self) -> tuple[str, ...]:
        """Tells the target of the shards that are new; answers them."""
        listed = (await self._clients["kinesis"].list_shards(StreamName=STREAM))["Shards"]
        new = {}
        for shard in listed:
            keys = shard["HashKeyRange"]
            parents = (shard.get("ParentShardId"), shard.get("AdjacentParentShardId"))
            if shard["ShardId"] not in self._target.shards:
                new[shard["ShardId"]] = Shard(
                    (int(keys["StartingHashKey"]), int(keys["EndingHashKey"])), tuple(filter(None, parents))
                )
        self._target.shards.update(new)
        return tuple(sorted(new))

    async def _put(self, customer: str = "", *, is_poison: bool = False) -> None:
        """One Kinesis record, of the next customer in turn unless one is given."""
        number = self._number("kinesis")
        customer = customer or f"customer-{number % _CUSTOMERS}"
        data = json.dumps({"number": number, "customer": customer, "poison": is_poison}).encode()
        if is_poison:
            self._target.poison = Poison(number, customer)
        put = await self._clients["kinesis"].put_record(StreamName=STREAM, Data=data, PartitionKey=customer)
        self._target.shards[put["ShardId"]].produced += 1

    async def _put_item(self) -> None:
        number = self._number("dynamodb")
        item = {"id": {"S": f"item-{number % _ITEMS}"}, "number": {"N": str(number)}}
        await self._clients["dynamodb"].put_item(TableName=TABLE, Item=item)

    async def _send(self) -> None:
        body = json.dumps({"number": self._number("sqs")})
        await self._clients["sqs"].send_message(QueueUrl=self._queue_url, MessageBody=body)

    def _number(self, source: str) -> int:
        return self._target.tallies[source].put(asyncio.get_running_loop().time())

    async def _repeat(self, put: Callable[[], Awaitable[None]], every: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._stop.is_set():
            await put()
            due = max(due + every, loop.time())
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._stop.wait()
