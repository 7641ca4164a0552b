"""How many calls of a stream run at once, so that those of ten thousand shards do not wait for each other's connections."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from poller.clock import SystemClock
from poller.core.model import TRIM_HORIZON, SourceKind, SourceSpec
from poller.sources.dynamodb import DynamoSource
from poller.sources.kinesis import READS, STARTS, KinesisSource, ReadLimits


class Calls:
    """A `LeanClient` and its owner: calls that are held until they are let go."""

    def __init__(self, reads: int = 100_000) -> None:
        self.reads = asyncio.Semaphore(reads)
        self.count = 0
        self.done = asyncio.Event()

    async def lean(self, service: str, region: str) -> "Calls":
        return self

    async def call(self, target: str, body: bytes, timeout: float) -> bytes:
        self.count += 1
        await self.done.wait()
        return b'{"ShardIterator":"i","NextShardIterator":"n","Records":[]}'


def source_of(kind: SourceKind, calls: Calls) -> Any:
    spec = SourceSpec(kind, "arn:aws:x:eu-west-1:1:y", "eu-west-1", "1", "s")
    clock = SystemClock(asyncio.get_running_loop())
    if kind is SourceKind.KINESIS:
        return KinesisSource(spec, "role", calls, clock, ReadLimits())  # type: ignore[arg-type]
    return DynamoSource(spec, calls, clock)  # type: ignore[arg-type]


async def settle(calls: Calls) -> None:
    """Until no call begins any more."""
    count = -1
    while count != calls.count:
        count = calls.count
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.mark.parametrize("kind", [SourceKind.KINESIS, SourceKind.DYNAMODB])
async def test_a_stream_has_so_many_calls_at_once(kind: SourceKind) -> None:
    """Reads, and iterators; the others wait in their order, before their timeout runs."""
    for most, what in ((READS, "fetch"), (STARTS, "iterator")):
        calls = Calls()
        source = source_of(kind, calls)
        asks = SimpleNamespace(
            fetch=lambda shard, source=source: source.fetch(shard, "i", 10),
            iterator=lambda shard, source=source: source.iterator(shard, TRIM_HORIZON),
        )
        async with asyncio.TaskGroup() as tasks:
            for n in range(most + 50):
                tasks.create_task(getattr(asks, what)(f"shard-{n}"))
            await settle(calls)
            assert calls.count == most
            calls.done.set()
        assert calls.count == most + 50


@pytest.mark.parametrize("kind", [SourceKind.KINESIS, SourceKind.DYNAMODB])
async def test_streams_of_one_client_share_its_connections(kind: SourceKind) -> None:
    """However many mappings there are, no call waits for a connection of the pool."""
    calls = Calls(reads=10)
    sources = [source_of(kind, calls) for _ in range(5)]
    async with asyncio.TaskGroup() as tasks:
        for source in sources:
            for n in range(5):
                tasks.create_task(source.fetch(f"shard-{n}", "i", 10))
        await settle(calls)
        assert calls.count == 10
        calls.done.set()
    assert calls.count == 25
