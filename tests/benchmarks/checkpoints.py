"""What a durable checkpoint costs: CPU microseconds per `save`, by how many callers wait at once.

    python -m tests.benchmarks.checkpoints [DIRECTORY]

DIRECTORY is where the store is made (default: the temporary directory): the disk under it decides the wall time.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from poller.core.model import TRIM_HORIZON, Checkpoint, Lease, Position, PositionKind, Row
from poller.stores.sqlite import SqliteStore

SAVES = 20_000


class Ignored:
    def requested(self, operation: str, outcome: str) -> None:
        pass


async def measure(directory: Path, callers: int, changes: int) -> None:
    """One line: `callers` tasks that each save `changes` shards again and again."""
    rounds = SAVES // changes // (10 if callers == changes == 1 else callers)
    store = await SqliteStore.open(str(directory / f"{callers}-{changes}.db"), Ignored())
    rows = [
        Row(f"shardId-{n:012}", Checkpoint(TRIM_HORIZON), (f"shardId-{n + 1:012}",)) for n in range(callers * changes)
    ]
    await store.create("mapping", rows)
    leases = [lease for row in rows if (lease := await store.acquire("mapping", row, "owner"))]

    async def work(mine: list[Lease]) -> None:
        for n in range(rounds):
            position = Position(PositionKind.AFTER, f"{49590338271490256608559692538361571095921575989136588898 + n}")
            await store.save([(lease, Checkpoint(position)) for lease in mine])

    wall, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for n in range(callers):
            group.create_task(work(leases[n * changes : (n + 1) * changes]))
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    await store.close()
    saved = callers * rounds * changes
    print(
        f"{callers:>4} callers, {changes:>4} shards a call: {saved:>6} checkpoints, "
        f"{cpu / saved * 1e6:7.1f} us CPU, {wall / saved * 1e6:7.1f} us wall each"
    )


async def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as directory:
        for callers, changes in ((1, 1), (10, 1), (100, 1), (1, 100), (1, 1000)):
            await measure(Path(directory), callers, changes)


if __name__ == "__main__":
    asyncio.run(main())
