"""What the real daemon says to a service manager, which is the test."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon
from tests.integration.test_daemon import Aws, config, stream_of

pytestmark = pytest.mark.integration

WATCHDOG = 0.2
"""Seconds; a beat at half of it."""
SABOTAGE = """
import asyncio, gc, os, signal, sys, time

while "poller.workers" in sys.orig_argv and os.path.exists(HOLD):
    time.sleep(0.01)

def hang(*_):
    time.sleep(3600)

def kill_mappings(*_):
    from poller.runtime.supervisor import Supervisor
    for one in gc.get_objects():
        if isinstance(one, Supervisor):
            for kept in one._kept.values():
                kept.task.get_loop().call_soon_threadsafe(kept.task.cancel)

signal.signal(signal.SIGUSR1, hang)
signal.signal(signal.SIGUSR2, kill_mappings)
"""


class Manager(asyncio.DatagramProtocol):
    """The end of NOTIFY_SOCKET where systemd would be. What it has heard is a list of fields."""

    def __init__(self) -> None:
        self.fields: list[str] = []
        self.changed = asyncio.Event()

    def datagram_received(self, data: bytes, _: object) -> None:
        self.fields += data.decode().split("\n")
        self.changed.set()

    async def until(self, start: str, seconds: float = 20.0) -> str:
        """The next field that starts so; those before it are gone."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    while self.fields:
                        if (one := self.fields.pop(0)).startswith(start):
                            return one
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(f"{start} was not said in {seconds} s") from None

    async def has_beat(self) -> bool:
        """A beat comes before systemd would miss one."""
        try:
            await self.until("WATCHDOG=1", WATCHDOG * 0.9)
        except AssertionError:
            return False
        return True


def hold_of(daemon: Daemon) -> Path:
    """While this file is there workers do not start."""
    return daemon.folder / "hold"


@asynccontextmanager
async def listening(daemon: Daemon, name: str) -> AsyncIterator[Manager]:
    """A manager of this daemon, which can be sabotaged."""
    (daemon.folder / "sitecustomize.py").write_text(f"HOLD = {str(hold_of(daemon))!r}\n{SABOTAGE}")
    kernel_name = f"\0{name[1:]}" if name.startswith("@") else name
    transport, manager = await asyncio.get_running_loop().create_datagram_endpoint(
        Manager, local_addr=kernel_name, family=socket.AF_UNIX
    )
    daemon.environment |= {
        "NOTIFY_SOCKET": name,
        "WATCHDOG_USEC": str(int(WATCHDOG * 1_000_000)),
        "PYTHONPATH": str(daemon.folder),
    }
    try:
        yield manager
    finally:
        transport.close()


@pytest.fixture
def daemon(account, ledger, daemons) -> Daemon:
    """With one mapping, whose source cannot be reached."""
    arn = f"arn:aws:kinesis:{REGION}:{account}:stream/nowhere"
    return daemons(config(Aws("http://127.0.0.1:9", account), ledger, stream_of(arn)))


@pytest.mark.parametrize("is_abstract", [False, True])
async def test_a_life_as_systemd_hears_it(daemon, tmp_path, is_abstract) -> None:
    """Ready without a network and said what is missing; beats; reloads that are taken and refused; a stop."""
    name = f"@{tmp_path}" if is_abstract else str(tmp_path / "notify")
    async with listening(daemon, name) as manager:
        await daemon.start()
        await manager.until("READY=1")
        assert (await daemon.get("/healthz"))[0] == 200, "it listens when it says so"
        line = await manager.until("STATUS=Running: 1 mapping, 1 not ready: mapping ")
        assert "stream/nowhere" in line
        for _ in range(3):
            await manager.until("WATCHDOG=1")
        daemon.send(signal.SIGHUP)
        await manager.until("RELOADING=1")
        moment = int((await manager.until("MONOTONIC_USEC=")).partition("=")[2])
        assert abs(asyncio.get_running_loop().time() - moment / 1_000_000) < 60, "of the clock that systemd compares"
        await manager.until("READY=1")
        daemon.path.write_text("not: a config\n")
        await manager.until("RELOADING=1")  # nobody sent a signal: the file has changed
        await manager.until("READY=1")
        assert "the changed config file is refused" in await manager.until("STATUS=Running")
        daemon.send(signal.SIGTERM)
        await manager.until("STOPPING=1")
        assert await daemon.ended() == 0
        assert not {"READY=1", "RELOADING=1"} & set(manager.fields)


async def test_no_beats_once_a_mapping_task_has_died(daemon, tmp_path) -> None:
    """As /healthz says 503; the line says why."""
    async with listening(daemon, str(tmp_path / "notify")) as manager:
        await daemon.start()
        await daemon.until_logged("mapping_problem")  # its task is at work
        await manager.until("WATCHDOG=1")
        daemon.send(signal.SIGUSR2)
        line = await manager.until("STATUS=Running: unhealthy: ")
        assert "has died" in line
        assert (await daemon.get("/healthz"))[0] == 503
        assert not await manager.has_beat()


async def test_no_beats_while_the_loop_hangs(daemon, tmp_path) -> None:
    """Whatever other threads do. Then systemd aborts it, and each thread says where it was."""
    daemon.environment |= {"PYTHONFAULTHANDLER": "1"}
    async with listening(daemon, str(tmp_path / "notify")) as manager:
        await daemon.start()
        await manager.until("WATCHDOG=1")
        daemon.send(signal.SIGUSR1)
        async with asyncio.timeout(20):
            while await manager.has_beat():  # until the signal has arrived
                pass
        daemon.send(signal.SIGABRT)
        assert await daemon.ended() == -signal.SIGABRT
        lines = [entry["line"] for entry in daemon.events("not_json")]
        assert any("in hang" in line for line in lines)


async def test_the_parent_speaks_for_its_workers(daemon, tmp_path) -> None:
    """Ready when all of them are, under the config that there is then; no beats when a worker's mapping has died; they
    cannot speak themselves.
    """
    daemon.arguments = ["--workers", "2"]
    hold_of(daemon).touch()
    async with listening(daemon, str(tmp_path / "notify")) as manager:
        await daemon.start(wait=False)
        await daemon.until_logged("server_started")
        await manager.until("EXTEND_TIMEOUT_USEC=")
        daemon.send(signal.SIGHUP)
        await manager.until("EXTEND_TIMEOUT_USEC=")
        assert not {"READY=1", "RELOADING=1"} & set(manager.fields)
        hold_of(daemon).unlink()
        await manager.until("READY=1")
        await manager.until("RELOADING=1")
        await manager.until("READY=1")
        pids = [entry["pid"] for entry in daemon.events("worker_started")]
        assert len(pids) == 2
        for pid in pids:
            names = {entry.partition(b"=")[0] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
            assert b"PATH" in names
            assert not names & {b"NOTIFY_SOCKET", b"WATCHDOG_USEC", b"WATCHDOG_PID"}
        await manager.until("WATCHDOG=1")
        os.kill(pids[0], signal.SIGSTOP)
        daemon.send(signal.SIGHUP)
        await manager.until("RELOADING=1")
        async with asyncio.timeout(20):
            while sum("worker" not in entry for entry in daemon.events("config_reloaded")) < 2:
                daemon.log_changed.clear()
                await daemon.log_changed.wait()
        manager.fields.clear()
        await manager.until("EXTEND_TIMEOUT_USEC=", 2.0)  # it still reloads
        assert "READY=1" not in manager.fields
        os.kill(pids[0], signal.SIGCONT)
        await manager.until("READY=1")
        worker = (await daemon.until_logged("mapping_problem"))["worker"]  # its task is at work
        [pid] = [entry["pid"] for entry in daemon.events("worker_started") if entry["worker"] == worker]
        os.kill(pid, signal.SIGUSR2)
        assert "has died" in await manager.until("STATUS=Running: unhealthy: ")
        assert not await manager.has_beat()
        daemon.send(signal.SIGTERM)
        await manager.until("STOPPING=1")
        assert await daemon.ended() == 0


async def test_a_watchdog_of_another_process_is_left_alone(daemon, tmp_path) -> None:
    """WATCHDOG_PID is another's: no beats; the rest is said."""
    async with listening(daemon, str(tmp_path / "notify")) as manager:
        daemon.environment |= {"WATCHDOG_PID": "1"}
        await daemon.start()
        await manager.until("STATUS=Running")
        assert not await manager.has_beat()
        assert await daemon.stop() == 0


async def test_a_store_that_is_away_is_waited_for(account, ledger, daemons, tmp_path) -> None:
    """Beyond a network: not ready, the line says why, and systemd is asked for more time at each look."""
    daemon: Daemon = daemons(config(Aws("http://127.0.0.1:9", account), ledger, store="dynamodb://positions"))
    async with listening(daemon, str(tmp_path / "notify")) as manager:
        await daemon.start(wait=False)
        assert "table positions" in await manager.until("STATUS=Starting: ")
        for _ in range(3):
            await manager.until("EXTEND_TIMEOUT_USEC=")
        assert "READY=1" not in manager.fields
        daemon.send(signal.SIGTERM)
        assert await daemon.ended() == 1
