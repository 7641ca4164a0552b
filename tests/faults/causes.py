"""What the tests of causes share: a machine in trouble, steady load, and what a daemon shows of itself meanwhile."""

import asyncio
import contextlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_streams_on_fake import Stream, samples, until

ENOSPC, EIO, EROFS = 28, 5, 30
AGAIN, NO_NAME = -3, -2  # of getaddrinfo


class Machine:
    """What fails on the daemon's machine, by `shim.c`. Needs gcc."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "faults"
        self._folder.mkdir()
        library = folder / "shim.so"
        source = Path(__file__).with_name("shim.c")
        compiler = shutil.which("gcc") or "gcc"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(library), "FAULTS": str(self._folder)}

    def disk(self, number: int, part: str = "poller.db") -> None:
        """Changes of files with this in their path fail with an error number; 0: none do."""
        self._set("disk", number, part)

    def dns(self, number: int, part: str = ".test") -> None:
        """Names with this in them are not resolved; 0: they are again."""
        self._set("dns", number, part)

    def _set(self, kind: str, number: int, part: str) -> None:
        new = self._folder / f"{kind}.new"
        new.write_text(f"{number} {part}\n" if number else "")
        new.replace(self._folder / kind)


class Load:
    """Records that keep coming, and the oracle: what of them arrived, in which order, and how often."""

    def __init__(self, stream: Stream, ledger: Ledger) -> None:
        self.arn = stream.arn
        self._stream = stream
        self._ledger = ledger
        self.names: list[str] = []

    @asynccontextmanager
    async def steady(self) -> AsyncIterator[None]:
        """20 records every 50 ms while the block runs."""
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(ended))
            yield
            ended.set()  # not cancelled: what is being written counts

    async def _write(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            await self.write(20)
            await asyncio.sleep(0.05)

    async def write(self, count: int) -> None:
        """So many at once."""
        self.names += await self._stream.write(count)

    async def flow(self, count: int = 60, seconds: float = 20) -> None:
        """So many more records arrive."""
        wanted = len(self._ledger.deliveries) + count
        await self._ledger.until(lambda: len(self._ledger.deliveries) >= wanted, seconds, f"{count} more records")

    async def arrive(self, seconds: float = 30) -> None:
        """All that was written does, each shard in its order, and nothing else."""
        names = set(self.names)
        await self._ledger.until(lambda: names <= self._ledger.deliveries.keys(), seconds, "delivery of everything")
        assert self._ledger.deliveries.keys() == names
        for shard, order in self._ledger.order.items():
            numbers = [int(name.rpartition(":")[2]) for name in order]
            assert numbers == sorted(numbers), shard


async def ready(daemon: Daemon) -> str:
    """Empty when it is, else why not."""
    status, text = await daemon.get("/readyz")
    assert (status == 200) == (text == "ready\n")
    return "" if status == 200 else text


async def store_problem(daemon: Daemon) -> str | None:
    """As the status document has it."""
    _, text = await daemon.get("/api/status")
    return json.loads(text)["store"]["problem"]


async def store_errors(daemon: Daemon) -> float:
    """What the alert PollerStoreFailing looks at."""
    found = await samples(daemon, "poller_store_requests_total")
    return sum(value for labels, value in found.items() if "error" in labels)


async def shown(daemon: Daemon, text: str) -> None:
    """That the store fails is to be seen everywhere an operator looks, with the reason."""
    failing = await daemon.until_logged("store_failing")
    assert text in failing["error"], failing
    assert text in (await store_problem(daemon) or "")
    assert text in await ready(daemon)
    assert await store_errors(daemon) > 0
    assert (await daemon.get("/healthz"))[0] == 200, "it lives: nobody shall restart it"


async def works_again(daemon: Daemon) -> None:
    """Without help, and positions move."""
    await until(lambda: daemon.events("store_works_again"), 15, "a store that works again")
    assert not await ready(daemon)
    assert await store_problem(daemon) is None
    before = await saved(daemon)
    await until(lambda: moved(daemon, before), 10, "a position that is saved")


async def saved(daemon: Daemon) -> float:
    """How many positions were."""
    return sum((await samples(daemon, "poller_checkpoints_total")).values())


async def moved(daemon: Daemon, before: float) -> bool:
    return await saved(daemon) > before


def is_sound(daemon: Daemon) -> bool:
    """Nothing crashed and nothing was lost."""
    bad = {"shard_crashed", "mapping_crashed", "read_crashed", "records_lost", "position_unknown", "not_json"}
    return bad.isdisjoint(entry["event"] for entry in daemon.logs)


def positions(path: Path) -> dict[str, str]:
    """What a restart would begin with."""
    with contextlib.closing(sqlite3.connect(path)) as store:
        return dict(store.execute("SELECT shard, position_value FROM shards").fetchall())


def back_up(path: Path, to: Path) -> None:
    """As the README says: while the daemon runs."""
    with contextlib.closing(sqlite3.connect(path)) as store, contextlib.closing(sqlite3.connect(to)) as copy:
        store.backup(copy)


def forget_logs(daemon: Daemon) -> None:
    """What is awaited next is to be new."""
    daemon.logs.clear()
