"""What systemd is told, over a real datagram socket, on virtual time."""

import asyncio
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

from poller.core.model import MappingStatus, ShardState, ShardStatus, SourceKind
from poller.notify import EXTENSION, INTERVAL, Notifier, for_children
from tests.sim.loop import EPOCH, VirtualClock, VirtualLoop, run_virtual

PID = 4711
EXTEND = f"EXTEND_TIMEOUT_USEC={int(EXTENSION * 1_000_000)}"


@dataclass
class World:
    """How the daemon does."""

    mappings: list[MappingStatus] = field(default_factory=list)
    problem: str | None = None
    missing: list[str] = field(default_factory=list)

    def status(self) -> list[MappingStatus]:
        return self.mappings

    def health(self) -> str | None:
        return self.problem

    def unready(self) -> list[str]:
        return self.missing


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket: socket.socket | None = None
        self.listen()

    def listen(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(f"\0{self.name[1:]}" if self.name.startswith("@") else self.name)

    def close(self) -> None:
        assert self._socket is not None
        self._socket.close()

    def heard(self) -> list[list[str]]:
        """The datagrams since the last call, each as its fields."""
        assert self._socket is not None
        found = []
        while True:
            try:
                found.append(self._socket.recv(65536).decode().split("\n"))
            except BlockingIOError:
                return found

    def fields(self) -> list[str]:
        return [one for datagram in self.heard() for one in datagram]


@pytest.fixture
def manager(tmp_path):
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


def notifier(manager: Manager, **variables: str) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": manager.name, **variables}, PID)


@asynccontextmanager
async def telling(teller: Notifier, world: World):
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    async with teller.telling(world, VirtualClock(loop)):
        yield


def shard(blocked_since: float | None = None) -> ShardStatus:
    return ShardStatus("s", ShardState.RUNNING, blocked_since=blocked_since)


def mapping(*shards: ShardStatus, **more: Any) -> MappingStatus:
    return MappingStatus("m", "f", SourceKind.KINESIS, "arn", **{"state": "Enabled", **more}, shards=shards)


def status(fields: list[str]) -> str:
    [line] = [one.removeprefix("STATUS=") for one in fields if one.startswith("STATUS=")]
    return line


def test_ready_is_said_once_the_workers_are(manager) -> None:
    """Those that come up again later are no news; a reload ends with the last of them, a refused one too."""

    async def live() -> None:
        teller = notifier(manager)
        teller.behind(is_behind=True)
        teller.ready()
        assert manager.heard() == []
        teller.behind(is_behind=False)
        assert manager.heard() == [["READY=1"]]
        teller.behind(is_behind=True)
        teller.behind(is_behind=False)
        assert manager.heard() == []
        for refused in (False, True):
            teller.behind(is_behind=True)
            teller.reloading()
            teller.ready(refused=refused)
            assert [fields[0] for fields in manager.heard()] == ["RELOADING=1"]
            teller.behind(is_behind=False)
            assert manager.heard() == [["READY=1"]]
        teller.behind(is_behind=True)
        teller.ready()
        teller.reloading()
        teller.behind(is_behind=False)
        assert "READY=1" not in manager.fields()

    run_virtual(live())


def test_a_life(manager) -> None:
    """Each phase is told at once, with the line that belongs to it; only while it runs is no more time asked for."""

    async def live() -> None:
        teller, world = notifier(manager), World()
        async with telling(teller, world):
            await asyncio.sleep(INTERVAL * 1.5)
            assert manager.heard() == [["STATUS=Starting", EXTEND], [EXTEND]]
            teller.waiting("the store\ndoes not answer")
            await asyncio.sleep(1)
            assert manager.heard() == [["STATUS=Starting: the store does not answer", EXTEND]]
            world.mappings = [mapping(shard()), mapping(state="Disabled")]
            teller.ready()
            assert manager.heard() == [["READY=1"]]
            await asyncio.sleep(INTERVAL * 2)
            assert manager.heard() == [["STATUS=Running: 2 mappings (1 disabled), 1 shard"]]
            moment = asyncio.get_running_loop().time()
            teller.reloading()
            assert manager.heard() == [["RELOADING=1", f"MONOTONIC_USEC={int(moment * 1_000_000)}"]]
            await asyncio.sleep(1)
            assert EXTEND in manager.fields()
            teller.ready()
            assert manager.heard() == [["READY=1"]]
            world.mappings = [mapping(in_flight=3)]
            teller.stopping()
            assert manager.heard() == [["STOPPING=1"]]
            await asyncio.sleep(1)
            assert manager.heard() == [["STATUS=Stopping: 3 in flight", EXTEND]]

    run_virtual(live())


def test_a_stop_is_the_end(manager) -> None:
    """A reload that ends while it stops is not told: systemd would take the daemon for running."""

    async def live() -> None:
        teller = notifier(manager)
        teller.ready()
        teller.reloading()
        teller.stopping()
        manager.heard()
        teller.ready()
        teller.reloading()
        assert manager.heard() == []

    run_virtual(live())


def test_the_line_says_what_is_wrong(manager) -> None:
    """A dead task first, blocked shards with the first one's moment, the first missing source, a refused file."""

    async def live() -> None:
        teller = notifier(manager)
        world = World(
            [mapping(shard(), shard(EPOCH + 30), shard(EPOCH + 20))],
            "the task of mapping m has died",
            ["a\tb", "c", "d"],
        )
        async with telling(teller, world):
            teller.ready(refused=True)
            await asyncio.sleep(60)
            assert status(manager.fields()) == (
                "Running: unhealthy: the task of mapping m has died, 1 mapping, 3 shards, 2 blocked, the first since "
                "08:00:20 UTC, the changed config file is refused, 3 not ready, the first: a b"
            )
            world.problem, world.missing, world.mappings = None, [], [mapping()]
            teller.ready()
            await asyncio.sleep(1)
            assert status(manager.fields()) == "Running: 1 mapping"

    run_virtual(live())


def test_a_line_is_one_line_and_short(manager) -> None:
    """What an error says cannot pass for a field of its own, nor fill the journal."""

    async def live() -> None:
        teller, world = notifier(manager), World([], None, [f"x\nSTOPPING=1\r\n{'y' * 5000}"])
        async with telling(teller, world):
            teller.ready()
            await asyncio.sleep(1)
            fields = manager.fields()
            assert "STOPPING=1" not in fields
            assert len(status(fields)) == 500
            assert status(fields).endswith("...")

    run_virtual(live())


def test_the_watchdog_is_told_at_half_its_time(manager) -> None:
    """From the start on, and not more often."""

    async def live() -> None:
        teller, beats = notifier(manager, WATCHDOG_USEC="60000000", WATCHDOG_PID=str(PID)), []
        async with telling(teller, World()):
            teller.ready()
            for second in range(121):
                await asyncio.sleep(1 if second else 0)
                beats += [second for one in manager.fields() if one == "WATCHDOG=1"]
        assert beats == [0, 30, 60, 90, 120]

    run_virtual(live())


def test_the_watchdog_hears_nothing_while_a_task_is_dead(manager) -> None:
    """As /healthz; told again at the next look once it is well."""

    async def live() -> None:
        teller, world = notifier(manager, WATCHDOG_USEC="20000000"), World()
        async with telling(teller, world):
            teller.ready()
            await asyncio.sleep(1)
            assert "WATCHDOG=1" in manager.fields()
            world.problem = "dead"
            await asyncio.sleep(30)
            assert "WATCHDOG=1" not in manager.fields()
            world.problem = None
            await asyncio.sleep(INTERVAL)
            assert manager.fields().count("WATCHDOG=1") == 1

    run_virtual(live())


def test_the_watchdog_hears_nothing_while_the_loop_hangs(manager) -> None:
    """The beat is the loop's own: nothing else sends it."""

    async def live() -> None:
        teller = notifier(manager, WATCHDOG_USEC="20000000")
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with telling(teller, World()):
            teller.ready()
            await asyncio.sleep(1)
            manager.heard()
            loop.virtual += 3600  # and nobody was let run
            assert manager.heard() == []
            await asyncio.sleep(0.1)
            assert "WATCHDOG=1" in manager.fields()

    run_virtual(live())


@pytest.mark.parametrize(
    "variables",
    [{}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}],
)
def test_no_watchdog_of_ours(manager, variables) -> None:
    """It is off, watches another process, or its time is no time; the rest goes on."""

    async def live() -> None:
        teller = notifier(manager, **variables)
        async with telling(teller, World()):
            teller.ready()
            await asyncio.sleep(60)
            fields = manager.fields()
            assert "READY=1" in fields
            assert "WATCHDOG=1" not in fields

    run_virtual(live())


def test_an_abstract_socket() -> None:
    """Its name begins with @ in the variable and with a zero byte in the kernel."""
    manager = Manager(f"@esm-poller-test-{uuid4()}")
    notifier(manager).ready()
    assert manager.heard() == [["READY=1"]]
    manager.close()


@pytest.mark.parametrize("name", ["", "relative", "vsock:2:9999", "@"])
def test_no_manager(name) -> None:
    """Nothing is sent and no task stays; an address that is unknown is no reason not to run."""

    async def live() -> None:
        teller = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000"}, PID)
        async with telling(teller, World()):
            teller.ready()
            teller.reloading()
            teller.stopping()
            await asyncio.sleep(0.1)
            assert len(asyncio.all_tasks()) == 1

    run_virtual(live())


def test_a_manager_that_is_away_is_told_later(manager) -> None:
    """The newest phase is said as soon as it listens again, before anything else; older ones are not."""

    async def live() -> None:
        teller = notifier(manager, WATCHDOG_USEC="60000000")
        manager.close()
        async with telling(teller, World([mapping()])):
            teller.ready()
            teller.reloading()
            teller.ready()
            await asyncio.sleep(100)
            manager.name += "2"
            manager.listen()
            teller._address = manager.name
            await asyncio.sleep(INTERVAL)
            assert manager.heard() == [["READY=1"], ["STATUS=Running: 1 mapping", "WATCHDOG=1"]]

    run_virtual(live())


def test_a_manager_that_does_not_read_holds_nobody_up(manager) -> None:
    """Its full queue costs a try at each look, not the event loop; what is current is said when it reads again."""

    async def live() -> None:
        teller, world = notifier(manager), World()
        async with telling(teller, world):
            teller.ready()
            for number in range(2000):
                world.mappings = [mapping()] * (number % 2 + 1)
                await asyncio.sleep(INTERVAL)
            world.mappings = [mapping()] * 3
            await asyncio.sleep(INTERVAL)
            assert len(manager.heard()) < 2000
            await asyncio.sleep(INTERVAL)
            assert status(manager.fields()) == "Running: 3 mappings"

    run_virtual(live())


def test_an_error_inside_stays_what_it_is(manager) -> None:
    """Whoever starts the daemon catches its own errors, not groups of them; the task has ended."""

    async def live() -> None:
        with pytest.raises(ValueError, match="inside"):
            async with telling(notifier(manager), World()):
                raise ValueError("inside")

    run_virtual(live())


def test_children_inherit_no_way_to_speak() -> None:
    """systemd would take their word, or wait for their beats."""
    given = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "/bin"}
    assert for_children(given) == {"PATH": "/bin"}
