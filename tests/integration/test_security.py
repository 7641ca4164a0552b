"""TLS of the server, payloads in the log and warnings about files, with the real daemon."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.test_server_tls import Files, cli, serial
from tests.fakes.certificates import Authority
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import Aws, config, queue_of

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_daemon_serves_https_and_follows_its_certificate(
    ministack, account, ledger: Ledger, daemons: Callable[..., Daemon], tmp_path, workers
) -> None:
    """With workers the parent does; SIGHUP takes over a new certificate, and a bad one leaves the old."""
    authority = Authority(tmp_path)
    files = Files(authority)
    files.put(*authority.issue())
    tls = {"cert": files.settings.cert, "key": files.settings.key}
    server = {"host": "localhost", "port": 0, "tls": tls}
    daemon = daemons(config(Aws(ministack, account), ledger, server=server))
    daemon.arguments = ["--workers", str(workers)]
    await daemon.start()
    assert (await cli(files, daemon.port, "status", "--ca", files.ca))[:2] == (0, "no mappings\n")
    files.put(*authority.issue(serial=3))
    daemon.send(signal.SIGHUP)
    await daemon.until_logged("certificate_loaded")
    assert await serial(daemon.port, files.ca) == 3
    files.put(authority.issue(serial=4)[0], authority.issue()[1])
    daemon.send(signal.SIGHUP)
    await daemon.until_logged("certificate_refused")
    assert await serial(daemon.port, files.ca) == 3
    assert await daemon.stop() == 0


async def test_a_daemon_says_what_others_may_read_and_shows_payloads_when_told(
    ministack, account, ledger: Ledger, daemons: Callable[..., Daemon], tmp_path: Path
) -> None:
    """Payloads begin with a reload that asks for them, and end with the next."""
    aws = Aws(ministack, account)
    arn = aws.queue("q")
    headers = {"functions": {"f": {"url": ledger.url, "headers": {"X-Key": "a very secret key"}}}}
    wanted = {**config(aws, ledger, queue_of(arn)), **headers}
    daemon = daemons(wanted)
    daemon.path.chmod(0o644)
    await daemon.start()
    [warning] = daemon.events("file_mode_warning")
    assert (warning["path"], warning["mode"]) == (str(daemon.path), "0644")
    assert warning["remedy"] == f"chmod go-rwx {daemon.path}"

    async def deliver(number: int) -> None:
        aws.send("q", number, 1)
        await ledger.until(lambda: len(ledger.deliveries) > number, 20, "delivery")

    await deliver(0)
    assert not daemon.events("invocation_payload")
    daemon.write({**daemon.config, "log": {"level": "debug", "payloads": True}})
    await daemon.until_logged("config_reloaded")
    await deliver(1)
    [entry] = daemon.events("invocation_payload")
    assert '"body":"1"' in entry["payload"]
    assert entry["request_id"] == ledger.requests[-1]["X-Poller-Request-Id"]
    assert await daemon.stop() == 0
    assert not any("a very secret key" in str(line) for line in daemon.logs)
