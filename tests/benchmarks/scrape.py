"""What a scrape costs, by how many shards there are: time, size, and how long the event loop waits meanwhile at most.

    python -m tests.benchmarks --scrape

One process, no network: the exposition of 10 mappings with so many shards at work, of which a tenth is behind. The last
row has more shards than `limits.shard_series` lets through.
"""

import asyncio
import statistics
import time
from typing import Any

from poller.clock import SystemClock
from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    FunctionSpec,
    Mapping,
    MappingStatus,
    RetryPolicy,
    ShardState,
    ShardStatus,
    SourceKind,
    SourceSpec,
)
from poller.telemetry import Metrics

SHARDS = (100, 1_000, 10_000, 20_000)
LIMIT = 10_000
MAPPINGS = 10
RETENTION = 86_400.0
TICK = 0.001


def _mapping(number: int) -> Mapping:
    name = f"orders-{number}"
    source = SourceSpec(SourceKind.KINESIS, f"arn:aws:kinesis:eu-west-1:1:stream/{name}", "eu-west-1", "1", name)
    arn = f"arn:aws:lambda:eu-west-1:123456789012:function:{name}"
    identity = f"00000000-0000-4000-8000-{number:012}"
    return Mapping(identity, source, FunctionSpec(name, arn, ""), BatchPolicy(100), RetryPolicy(), TRIM_HORIZON)


def _status(mapping: Mapping, shards: int, now: float) -> MappingStatus:
    return MappingStatus(
        mapping.id,
        mapping.function.name,
        mapping.source.kind,
        mapping.source.arn,
        "Enabled",
        retention=RETENTION,
        shards=tuple(
            ShardStatus(
                f"shardId-{number:012}",
                ShardState.RUNNING,
                lag=number % 100 / 7,
                batch_arrival=now - number if number % 10 == 0 else None,
                oldest_arrival=now - number,
            )
            for number in range(shards)
        ),
    )


async def _measure(shards: int, rounds: int) -> dict[str, float]:
    clock = SystemClock(asyncio.get_running_loop())
    mappings = [_mapping(number) for number in range(MAPPINGS)]
    status = [_status(mapping, shards // MAPPINGS, clock.now()) for mapping in mappings]
    metrics = Metrics(clock, lambda: status, shard_series=LIMIT)
    for mapping in mappings:
        metrics.observer(mapping)
    taken, waits, text = [], [], b""
    for _ in range(rounds):
        waited = [0.0]
        begun = time.process_time()
        scrape = asyncio.ensure_future(metrics.exposition())
        last = time.perf_counter()
        while not scrape.done():
            await asyncio.sleep(TICK)
            waited.append(time.perf_counter() - last - TICK)
            last = time.perf_counter()
        text, _ = scrape.result()
        taken.append(time.process_time() - begun)
        waits.append(max(waited))
    return {
        "shards": shards,
        "ms": statistics.median(taken) * 1e3,
        "series": sum(not line.startswith(b"#") for line in text.splitlines()),
        "mb": len(text) / 1e6,
        "loop_ms": statistics.median(waits) * 1e3,
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """Prints a line for each number of shards, and answers the figures."""
    print(f"\nA scrape of {MAPPINGS} mappings, limits.shard_series {LIMIT:,}, one process, no network")
    print(f"{'shards':>8}{'CPU ms':>9}{'series':>9}{'MB':>8}{'loop waits, ms':>16}")
    answer = []
    for shards in SHARDS:
        figures = asyncio.run(_measure(shards, rounds))
        print(
            f"{shards:>8,}{figures['ms']:>9.1f}{figures['series']:>9,.0f}{figures['mb']:>8.2f}{figures['loop_ms']:>16.1f}",
            flush=True,
        )
        answer.append(figures)
    return answer
