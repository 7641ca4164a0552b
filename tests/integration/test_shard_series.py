"""`limits.shard_series` of a real daemon, in one process and in several."""

import pytest

from tests.integration.daemon import Daemon
from tests.integration.test_daemon import config, stream_of
from tests.integration.test_streams_on_fake import Stream, samples, until

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_configured_limit_holds_for_the_daemon(fake_aws, account, ledger, daemons, workers) -> None:
    """However many processes: so many shards have series, the others are counted, all are in the states."""
    stream = Stream(fake_aws, account)
    await stream.create(5)
    daemon: Daemon = daemons(config(fake_aws, ledger, stream_of(stream.arn), limits={"shard_series": 2}))
    if workers > 1:
        daemon.arguments = ["--workers", str(workers)]
    await daemon.start()

    async def all_run() -> bool:
        return (await samples(daemon, "poller_shards")).get(("running",)) == 5

    await until(all_run, 30, "work at all shards")
    assert (await samples(daemon, "poller_shard_series_dropped")) == {(): 3}
    assert len(await samples(daemon, "poller_retention_headroom_seconds")) == 2
    assert len(await samples(daemon, "poller_records_lost_total")) == 2
    assert await daemon.stop() == 0
