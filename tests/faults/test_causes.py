"""What the machine and its operator do to a daemon under load: each cause ends in a state that it shows, loses nothing,
and is over without help once the cause is. Clocks that jump: `tests/deploy/test_clock.py`.
"""

import asyncio
import json
import resource
import shutil
from pathlib import Path

import pytest
from aiohttp import web

from tests.faults.causes import (
    AGAIN,
    EIO,
    ENOSPC,
    EROFS,
    NO_NAME,
    Load,
    Machine,
    back_up,
    forget_logs,
    is_sound,
    positions,
    ready,
    shown,
    store_problem,
    works_again,
)
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import assert_within_promise, config, stream_of
from tests.integration.test_streams_on_fake import Stream, samples, until

pytestmark = pytest.mark.integration


@pytest.fixture
async def load(fake_aws, account, ledger) -> Load:
    """For a stream of two shards."""
    stream = Stream(fake_aws, account)
    await stream.create(2)
    return Load(stream, ledger)


@pytest.fixture
def daemon(fake_aws, ledger, daemons, load) -> Daemon:
    """Not started yet."""
    return daemons(config(fake_aws, ledger, stream_of(load.arn, BatchSize=10)))


@pytest.fixture
def machine(tmp_path, daemon) -> Machine:
    """The daemon's."""
    made = Machine(tmp_path)
    daemon.environment |= made.environment
    return made


async def stop_and_look(daemon: Daemon, load: Load, ledger: Ledger) -> None:
    """A clean stop after everything: the next start repeats nothing."""
    await load.arrive()
    assert is_sound(daemon), daemon.logs
    assert await daemon.stop() == 0
    attempts = sum(ledger.attempts.values())
    await daemon.start()
    await until(lambda: ready_at_tip(daemon), 15, "the tip of each shard")
    assert sum(ledger.attempts.values()) == attempts
    assert await daemon.stop() == 0


async def ready_at_tip(daemon: Daemon) -> bool:
    if await ready(daemon):
        return False
    [mapping] = await daemon.status()
    return [shard["lag_seconds"] for shard in mapping["shards"]] == [0, 0]


async def killed(daemon: Daemon) -> float:
    """When; whatever it had sent until then has arrived."""
    await daemon.kill()
    await asyncio.sleep(0.05)
    return asyncio.get_running_loop().time()


# --- the disk


@pytest.mark.deploy
async def test_a_disk_that_is_full_broken_or_read_only(load, ledger, daemon, machine) -> None:
    """Records go on, positions wait in memory, it says so everywhere; when it works again they are saved."""
    store = daemon.folder / "poller.db"
    await daemon.start()
    async with load.steady():
        await load.flow()
        for number, part, text in (
            (ENOSPC, "poller.db", "database or disk is full (SQLITE_FULL). Make room on its disk."),
            (EIO, "poller.db", "disk I/O error (SQLITE_IOERR_"),
            (EROFS, "poller.db", "Look at its disk: is it full, read-only or broken?"),
            (ENOSPC, "poller.db-wal", "(SQLITE_FULL)"),
        ):
            forget_logs(daemon)
            machine.disk(number, part)
            await shown(daemon, text)
            machine.disk(0)
            held = positions(store)
            machine.disk(number, part)
            await load.flow(100)
            assert positions(store) == held, "they cannot have been saved"
            machine.disk(0)
            await works_again(daemon)
            assert positions(store) != held
            assert is_sound(daemon), daemon.logs
    assert not ledger.redelivered()
    await stop_and_look(daemon, load, ledger)


@pytest.mark.deploy
async def test_a_crash_while_the_disk_is_full(load, ledger, daemon, machine) -> None:
    """What was done since the disk filled comes again and nothing else; a start on such a disk says what to do."""
    now = asyncio.get_running_loop().time
    await daemon.start()
    async with load.steady():
        await load.flow()
        full_at = now()
        machine.disk(ENOSPC)
        await shown(daemon, "SQLITE_FULL")
        await load.flow(100)
        killed_at = await killed(daemon)
        path = daemon.folder / "poller.db"
        for number, text in (
            (ENOSPC, "Make room on its disk."),
            (EROFS, "Make the file system writable, or name another file in `store`."),
        ):
            machine.disk(number)
            forget_logs(daemon)
            await daemon.start(wait=False)
            assert await daemon.ended() == 1
            [refusal] = daemon.events("not_started")
            assert f"The store {path} " in refusal["error"]
            assert text in refusal["error"]
            assert is_sound(daemon), daemon.logs
        machine.disk(0)
        await daemon.start()
        await load.flow()
    assert ledger.redelivered()
    await load.arrive()
    assert_within_promise(ledger, [killed_at], killed_at - full_at + 0.1)


# --- the store's file


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.soak)])
async def test_a_store_that_is_taken_away_under_the_daemon(load, ledger, daemon, tmp_path, workers) -> None:
    """It is written anew with all positions, within a second or so: a crash after that repeats no more than any other."""
    if workers > 1:
        daemon.arguments = ["--workers", str(workers)]
    folder = tmp_path / "var"
    daemon.write(daemon.config | {"store": f"sqlite:///{str(folder).lstrip('/')}/poller.db"})
    store = folder / "poller.db"
    await daemon.start()
    async with load.steady():
        for cause in ("removed", "replaced", "folder"):
            await load.flow()
            forget_logs(daemon)
            if cause == "removed":
                store.unlink()
            elif cause == "replaced":
                (folder / "other").write_text("another file")
                (folder / "other").replace(store)
            else:
                shutil.rmtree(folder)
            rewritten = await daemon.until_logged("store_rewritten")
            assert rewritten["kept"] == (f"{store}-replaced" if cause == "replaced" else None)
            await kept_up(store, load)
            await until(lambda: is_ready(daemon), 10, "a daemon that is ready")
            assert is_sound(daemon), daemon.logs
        kill = await killed(daemon)
        await daemon.start()
        await load.flow()
    assert not Path(f"{store}-replaced").exists(), "the folder that had it is gone"
    await load.arrive()
    assert_within_promise(ledger, [kill])


async def kept_up(store: Path, load: Load) -> None:
    """Positions move in the file that is at the path now."""
    held = positions(store)
    await load.flow()
    await until(lambda: positions(store) != held, 10, "positions in the new file")


async def is_ready(daemon: Daemon) -> bool:
    return not await ready(daemon)


DAMAGES = {
    "truncated": lambda _: b"",
    "head": lambda content: bytes(4096) + content[4096:],
    "middle": lambda content: content[:4096] + b"\xff" * (len(content) - 4096),
}


def overwrite(path: Path, damage: str) -> None:
    """In place, as a broken disk or a careless `cp` would; SQLite's log is not spared."""
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(DAMAGES[damage](content))
    if (log := Path(f"{path}-wal")).exists():
        log.write_bytes(b"")


async def test_a_store_that_is_damaged_under_the_daemon(load, ledger, daemon) -> None:
    """It is noticed within a second or so, and written anew from what is in memory: a crash repeats no more than any
    other. One that is damaged while nothing runs is refused at the start.
    """
    path = daemon.folder / "poller.db"
    await daemon.start()
    async with load.steady():
        for damage in DAMAGES:
            await load.flow()
            forget_logs(daemon)
            overwrite(path, damage)
            rewritten = await daemon.until_logged("store_rewritten")
            assert rewritten["kept"] == f"{path}-replaced"
            await kept_up(path, load)
            assert not await ready(daemon)
            assert is_sound(daemon), daemon.logs
        kill = await killed(daemon)
        back_up(path, daemon.folder / "backup")
        overwrite(path, "middle")
        forget_logs(daemon)
        await daemon.start(wait=False)
        assert await daemon.ended() == 1
        [refusal] = daemon.events("not_started")
        assert f"The store {path} is damaged, or no store: " in refusal["error"]
        assert f"Beside it lie {path}-replaced. " in refusal["error"]
        assert "`poller checkpoints import`" in refusal["error"]
        (daemon.folder / "backup").replace(path)
        await daemon.start()
        await load.flow()
    await load.arrive()
    assert_within_promise(ledger, [kill])


@pytest.mark.deploy
async def test_a_damaged_store_that_is_not_in_memory_either(load, ledger, daemon, machine) -> None:
    """Records go on and nothing crashes; it never begins anew on its own; a backup that is put there is taken, and what
    was done since it was made comes again, in order.
    """
    path, now = daemon.folder / "poller.db", asyncio.get_running_loop().time
    await daemon.start()
    async with load.steady():
        await load.flow()
        back_up(path, daemon.folder / "backup")
        backed_up_at = now()
        await load.flow()
        machine.disk(EIO)
        await shown(daemon, "disk I/O error")
        overwrite(path, "middle")
        machine.disk(0)
        await until(lambda: says(daemon, f"The store {path} is damaged, or no store: "), 15, "a store that is refused")
        await load.flow(100)
        assert is_sound(daemon), daemon.logs
        (daemon.folder / "backup").replace(path)
        await works_again(daemon)
        assert daemon.events("store_adopted")
        adopted_at = now()
        await load.flow()
    await load.arrive()
    for name, deliveries in ledger.redelivered().items():
        assert backed_up_at - 1 < deliveries[0].at < adopted_at, name


async def says(daemon: Daemon, text: str) -> bool:
    return text in (await store_problem(daemon) or "") and text in await ready(daemon)


async def test_a_store_that_is_gone_at_the_start(load, ledger, daemon) -> None:
    """A mapping at LATEST would pass over what is pending, so the daemon does not start; put back, it goes on."""
    path = daemon.folder / "poller.db"
    await daemon.start()
    await load.write(20)
    await load.arrive()
    assert await daemon.stop() == 0
    path.rename(daemon.folder / "moved")
    await load.write(20)
    await daemon.start(wait=False)
    assert await daemon.ended() == 1
    [refusal] = daemon.events("not_started")
    assert f"The store {path} is gone: {path}-lock says that there was one." in refusal["error"]
    assert not path.exists()
    (daemon.folder / "moved").rename(path)
    forget_logs(daemon)
    await daemon.start()
    await load.arrive()
    assert not ledger.redelivered()


# --- names


@pytest.mark.deploy
async def test_names_that_cannot_be_resolved(load, ledger, daemon, machine, fake_aws) -> None:
    """Sources and targets are unreachable, by name and reason; no attempt is counted; what is connected goes on; all is
    well within seconds of the names.
    """
    document = json.loads(json.dumps(daemon.config).replace("//127.0.0.1:", "//aws.test:"))
    document["functions"]["f"]["url"] = ledger.url.replace("127.0.0.1", "target.test")
    document["event_source_mappings"] = [stream_of(load.arn, BatchSize=10, MaximumRetryAttempts=0)]
    daemon.write(document)
    machine.dns(AGAIN)
    await daemon.start()
    async with load.steady():
        await until(lambda: reason(daemon), 10, "a mapping that says why")
        for text in (await ready(daemon), await reason(daemon)):
            assert "aws.test" in text
            assert "its name did not resolve" in text
        machine.dns(NO_NAME, "target.test")
        await until(lambda: unreachable(daemon), 15, "a target that is unreachable")
        assert not await ready(daemon)
        await until(lambda: last_error(daemon), 5, "an error of the shard")
        assert "its name did not resolve" in await last_error(daemon)
        machine.dns(0)
        await load.flow()
        machine.dns(AGAIN)
        await load.flow(200)
        machine.dns(0)
    await load.arrive()
    assert not any((await samples(daemon, "poller_dropped_events_total")).values())
    outcomes = await samples(daemon, "poller_invocations_total")
    assert {label for label, count in outcomes.items() if count} == {("success",), ("unreachable",)}
    assert not ledger.redelivered()
    assert is_sound(daemon), daemon.logs


async def reason(daemon: Daemon) -> str:
    [mapping] = await daemon.status()
    return mapping["reason"]


async def unreachable(daemon: Daemon) -> float:
    return (await samples(daemon, "poller_invocations_total")).get(("unreachable",), 0)


async def last_error(daemon: Daemon) -> str:
    [mapping] = await daemon.status()
    return next((shard["last_error"] for shard in mapping["shards"] if shard["last_error"]), "")


# --- the target


async def test_a_target_that_answers_too_late(load, ledger, daemon) -> None:
    """Its work was done, but nobody knows: the attempt counts as a timeout and the same batch comes again, with the same
    key, only after it was given up; the late answer is dropped, and the shard's order holds.
    """
    loop = asyncio.get_running_loop()
    seen: list[tuple[float, dict[str, str], bytes]] = []
    late: set[str] = set()

    async def answer(request: web.Request) -> web.StreamResponse:
        began, body, headers = loop.time(), await request.read(), dict(request.headers)
        records = json.loads(body)["Records"]
        shard = ledger.shard(records[0])
        seen.append((began, headers, body))
        if shard not in late and headers["X-Poller-Attempt"] == "1":
            late.add(shard)
            await asyncio.sleep(1.2)  # longer than the function's timeout; then the answer has nowhere to go
            return web.json_response({})
        return await ledger.handle(request)

    runner = web.AppRunner(web.Application(), access_log=None, shutdown_timeout=0.1)
    runner.app.router.add_post("/{path:.*}", answer)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    daemon.config["functions"]["f"] = {"url": f"http://127.0.0.1:{runner.addresses[0][1]}/f", "timeout_seconds": 1}
    daemon.config["event_source_mappings"] = [stream_of(load.arn, BatchSize=10, MaximumRetryAttempts=1)]
    daemon.write(daemon.config)
    await daemon.start()
    async with load.steady():
        await until(lambda: last_error(daemon), 10, "an error of the shard")
        assert "did not answer within 1 s" in await last_error(daemon)
        await load.flow(100)
    await load.arrive()
    failed = daemon.events("invocation_failed")
    assert {entry["shard"] for entry in failed} == late
    assert len(late) == len(failed) == 2
    assert (await samples(daemon, "poller_invocations_total"))["timeout",] == 2
    assert not any((await samples(daemon, "poller_dropped_events_total")).values())
    second = [each for each in seen if each[1]["X-Poller-Attempt"] == "2"]
    assert len(second) == 2
    for began, headers, body in second:
        [first] = [each for each in seen if each[2] == body and each[1]["X-Poller-Attempt"] == "1"]
        assert first[1]["Idempotency-Key"] == headers["Idempotency-Key"]
        assert first[1]["X-Poller-Request-Id"] != headers["X-Poller-Request-Id"]
        assert began >= first[0] + 0.95, "not before the first was given up"
    assert not ledger.redelivered()
    await runner.cleanup()


# --- descriptors


async def test_no_descriptors_left(load, ledger, daemon) -> None:
    """What is open goes on; a target that takes a new connection for each request is unreachable, no attempt is counted,
    and positions are saved; with descriptors everything goes on.
    """
    daemon.config["event_source_mappings"] = [stream_of(load.arn, BatchSize=10, MaximumRetryAttempts=0)]
    daemon.write(daemon.config)
    await daemon.start()
    assert daemon.process is not None
    limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    async with load.steady():
        await load.flow()
        forget_logs(daemon)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        await load.flow(100)
        ledger.closes = True
        waits = await daemon.until_logged("invocation_waits")
        assert "too many open files" in waits["error"]
        ledger.closes = False
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)
        await load.flow()
    await load.arrive()
    assert not any((await samples(daemon, "poller_dropped_events_total")).values())
    assert not ledger.redelivered()
    assert not daemon.events("store_failing")
    assert is_sound(daemon), daemon.logs
