"""The daemon on a machine whose wall clock jumps. Needs Debian's `faketime`."""

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
        event = "worker_started" if workers > 1 else "started"
        await until(lambda: len(daemon.events(event)) == times * workers, 20, f"start number {times}")

    await daemon.start()
    await deliver()
    wall.set(3600)
    await deliver()
    ages = (await samples(daemon, "poller_iterator_age_seconds")).values()
    assert len(ages) == 4
    assert not daemon.events("clock_set_back")
    for times, seconds in enumerate((-3600, -90_000), 2):
        wall.set(seconds)
        await daemon.until_logged("clock_set_back")
        await begun(times)
        await deliver()
    assert {"stop_grace_exceeded", "worker_killed"}.isdisjoint(entry["event"] for entry in daemon.logs)
    await assert_nothing_lost(daemon)
    assert await daemon.stop() == 0
    assert_order(ledger)
    assert not ledger.redelivered()
