"""The daemon on a machine whose wall clock jumps. Needs Debian's `faketime`."""

import asyncio
import contextlib
import json
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon
from tests.integration.test_daemon import assert_order, config, stream_of
from tests.integration.test_streams_on_fake import Stream, assert_nothing_lost, samples, until


class Wall:
    """What the daemon's wall clock shows, as seconds beside the real one; its monotonic clock is left alone."""

    def __init__(self, folder: Path) -> None:
        [library] = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
        self._file = folder / "offset"
        self.set(0)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, seconds: int) -> None:
        self._file.write_text(f"{seconds:+d}s")


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_wall_clock_that_jumps_loses_and_repeats_nothing(fake_aws, account, ledger, daemons, tmp_path, workers):
    """Ahead by an hour it is followed; set back by two the daemon begins anew in order, on its own; so it does twice."""
    wall, stream = Wall(tmp_path), Stream(fake_aws, account)
    await stream.create(4)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn)))
    daemon.environment |= wall.environment
    if workers > 1:
        daemon.arguments = ["--workers", str(workers)]
    written = []

    async def deliver() -> None:
        written.extend(await stream.write(100))
        await ledger.until(lambda: len(ledger.deliveries) == len(written), 20, "delivery")

    async def begun(times: int) -> None:
        await until(lambda: len(daemon.events("started")) == times, 20, f"start number {times}")

    await daemon.start()
    await deliver()
    wall.set(3600)
    await deliver()
    ages = (await samples(daemon, "poller_iterator_age_seconds")).values()
    assert len(ages) == 4
    await daemon.until_logged("clock_jumped_ahead")
    assert not daemon.events("clock_set_back")
    for times, seconds in enumerate((-3600, -90_000), 2):
        wall.set(seconds)
        await daemon.until_logged("clock_set_back")
        await begun(times)
        _, text = await daemon.get("/api/status")
        assert abs(json.loads(text)["at"] - (time.time() + seconds)) < 10
        await deliver()
    assert {"stop_grace_exceeded", "worker_killed"}.isdisjoint(entry["event"] for entry in daemon.logs)
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0
    assert_order(ledger)
    assert not ledger.redelivered()


async def test_workers_follow_a_config_that_changes_after_the_clock_was_set_back(
    fake_aws, account, ledger, daemons, tmp_path
):
    """They agree on the file that was read last, not on the one that was read at the latest hour."""
    wall, stream = Wall(tmp_path), Stream(fake_aws, account)
    await stream.create(1)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn), lease_seconds=2))
    daemon.environment |= wall.environment
    daemon.arguments = ["--workers", "2"]

    def agreed_size() -> int | None:
        with contextlib.closing(sqlite3.connect(f"file:{daemon.folder}/poller.db?mode=ro", uri=True)) as store:
            found = store.execute("SELECT document FROM documents WHERE key = 'config/newest'").fetchall()
        return next(iter(json.loads(found[0][0])["mappings"].values()))["BatchSize"] if found else None

    await daemon.start()
    await until(lambda: agreed_size() == 100, 20, "agreement")
    wall.set(-3600)
    await until(lambda: len(daemon.events("started")) == 2, 20, "a new beginning")
    daemon.write(daemon.config | {"event_source_mappings": [stream_of(stream.arn, BatchSize=7)]})
    await until(lambda: agreed_size() == 7, 10, "agreement on the new file")
    assert not daemon.events("config_differs")
    assert await daemon.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_daemon_that_stops_does_not_begin_anew(fake_aws, account, ledger, daemons, tmp_path, workers):
    """Not when the wall clock is set back while it waits for what is in flight, as NTP may do on the way down."""
    wall, stream = Wall(tmp_path), Stream(fake_aws, account)
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await may_answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as target:
        await stream.create(1)
        made = config(fake_aws, ledger, stream_of(stream.arn))
        made["functions"]["f"]["url"] = f"http://127.0.0.1:{target.sockets[0].getsockname()[1]}/"
        daemon: Daemon = daemons(made)
        daemon.environment |= wall.environment
        if workers > 1:
            daemon.arguments = ["--workers", str(workers)]
        await daemon.start()
        await stream.write(1)
        await asked.wait()
        daemon.send(signal.SIGTERM)
        await daemon.until_logged("stopping")
        wall.set(-3600)
        await daemon.until_logged("clock_set_back")
        may_answer.set()
        assert await daemon.ended() == 0
    assert len(daemon.events("started")) == 1
    assert not daemon.events("worker_died")
