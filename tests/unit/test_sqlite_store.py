"""What the SQLite store promises beyond `CheckpointStore`: the file, its lock, group commit, errors, `kill -9`."""

import asyncio
import errno
import itertools
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from poller.core.model import TRIM_HORIZON, Checkpoint, Lease, Member, Position, PositionKind, Row
from poller.errors import StoreIncompatible, StoreInUse, StoreUnavailable
from poller.stores import sqlite_file
from poller.stores.sqlite import SqliteStore

M = "mapping"
NOBODY = 65534


class Requests:
    """A StoreObserver that counts."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def requested(self, operation: str, outcome: str) -> None:
        self.counts[operation, outcome] += 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "poller.db"


@pytest.fixture
def requests() -> Requests:
    return Requests()


@pytest.fixture
async def store(path: Path, requests: Requests) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(str(path), requests)
    yield opened
    async with asyncio.timeout(10):
        await opened.close()


def after(value: int) -> Checkpoint:
    return Checkpoint(Position(PositionKind.AFTER, str(value)))


async def leased(store: SqliteStore, *shards: str) -> list[Lease]:
    """Makes the rows, or takes them over."""
    await store.create(M, [Row(shard, Checkpoint(TRIM_HORIZON)) for shard in shards])
    rows = await store.load(M)
    leases = [await store.acquire(M, rows[shard], "me") for shard in shards]
    return [lease for lease in leases if lease]


async def values(store: SqliteStore) -> dict[str, str]:
    return {shard: row.checkpoint.position.value for shard, row in (await store.load(M)).items()}


async def refused(path: Path | str, kind: type[Exception], **options: Any) -> str:
    """The text with which `open` refuses."""
    with pytest.raises(kind) as caught:
        await SqliteStore.open(str(path), Requests(), **options)
    assert type(caught.value) is kind
    return str(caught.value)


class Gate:
    """Holds the writer before its commits, so that a test decides what makes up a group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        self.groups: list[list[str]] = []
        commit = SqliteStore._commit

        def held(file: Any, requests: Sequence[Any]) -> Any:
            self.groups.append([request.operation for request in requests])
            self.reached.release()
            assert self.open.wait(10)
            try:
                return commit(file, requests)
            finally:
                self.done.release()

        monkeypatch.setattr(SqliteStore, "_commit", held)

    def reset(self) -> None:
        self.groups.clear()
        self.reached = threading.Semaphore(0)
        self.done = threading.Semaphore(0)

    def close(self) -> None:
        self.reset()
        self.open.clear()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


async def behind(gate: Gate, store: SqliteStore, *calls: Any) -> list[Any]:
    """Answers of calls that all wait while another commit runs, so that they are one group."""
    gate.close()
    first = asyncio.create_task(store.load("nothing"))
    await asyncio.sleep(0)
    assert gate.reached.acquire(timeout=10)
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    gate.open.set()
    async with asyncio.timeout(10):
        await first
        return await asyncio.gather(*tasks, return_exceptions=True)


# The file

ALLOW = "Let this user read and write the file and its folder, or name another file in `store`."


async def test_the_file_is_private_and_its_directory_made(tmp_path: Path) -> None:
    """Directory 0700, every file 0600: positions and API-made mappings are nobody else's business."""
    path = tmp_path / "new" / "deep" / "poller.db"
    store = await SqliteStore.open(str(path), Requests())
    await leased(store, "s1")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    assert modes == dict.fromkeys(["poller.db", "poller.db-lock", "poller.db-shm", "poller.db-wal"], 0o600)
    await store.close()
    assert sorted(each.name for each in path.parent.iterdir()) == ["poller.db", "poller.db-lock"]


async def test_an_operator_can_read_it_while_it_runs(store: SqliteStore, path: Path) -> None:
    """Plain columns for the sqlite3 shell; numbers that SQLite cannot hold are JSON text."""
    await store.create(M, [Row("s1", Checkpoint(TRIM_HORIZON), ("p1", "p2"))])
    lease = await store.acquire(M, (await store.load(M))["s1"], "me")
    assert lease
    await store.save([(lease, Checkpoint(Position(PositionKind.AT, "007"), ((10**55, 2), (3,))))])
    await store.put_document("mapping/x", {"UUID": "x"})
    with closing(sqlite3.connect(path)) as shell:
        shell.row_factory = sqlite3.Row
        row = dict(shell.execute("SELECT * FROM shards").fetchone())
        updated = datetime.fromisoformat(row.pop("updated_at"))
        document = shell.execute("SELECT key, document FROM documents").fetchone()
    assert row == {
        "mapping": M,
        "shard": "s1",
        "position_kind": "AT_SEQUENCE_NUMBER",
        "position_value": "007",
        "resume": f"[[{10**55}, 2], [3]]",
        "tumbling": "",
        "owner": "me",
        "token": 1,
        "parents": '["p1", "p2"]',
        "wanted_by": None,
    }
    assert updated.year >= 2024
    assert tuple(document) == ("mapping/x", '{"UUID": "x"}')


async def test_a_commit_is_durable(store: SqliteStore) -> None:
    """The log is synced at every commit (FULL, 2) and the journal is a write-ahead log."""

    def settings(connection: sqlite3.Connection) -> list[Any]:
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]

    assert await store._ask("settings", settings) == [2, "wal"]


async def test_what_is_answered_is_committed(store: SqliteStore, path: Path) -> None:
    """As soon as a call returns another connection sees what it wrote."""
    (lease,) = await leased(store, "s1")
    with closing(sqlite3.connect(path)) as other:
        for n in range(50):
            await store.save([(lease, after(n))])
            assert other.execute("SELECT position_value FROM shards").fetchone() == (str(n),)


# What is refused at the start


@pytest.fixture
def common() -> Iterator[Path]:
    """A directory that every user can reach."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom file modes bind, also where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


async def test_a_directory_that_may_not_be_written(common: Path) -> None:
    """The path and the reason."""
    (common / "closed").mkdir(mode=0o555)
    (common / "closed").chmod(0o555)
    path = common / "closed" / "poller.db"
    with unprivileged():
        text = await refused(path, StoreUnavailable)
    assert text == f"The store {path} cannot be opened: Permission denied: {path}-lock. {ALLOW}"


async def test_a_directory_that_may_not_be_made(common: Path) -> None:
    """The path and the reason."""
    (common / "closed").mkdir(mode=0o555)
    (common / "closed").chmod(0o555)
    path = common / "closed" / "more" / "poller.db"
    with unprivileged():
        text = await refused(path, StoreUnavailable)
    assert text == f"The store {path} cannot be opened: Permission denied: {path.parent}. {ALLOW}"


async def test_a_file_that_may_not_be_written(common: Path) -> None:
    """It is refused at the start, not at the first save."""
    path = common / "poller.db"
    with unprivileged():
        await (await SqliteStore.open(str(path), Requests())).close()
        path.chmod(0o444)
        text = await refused(path, StoreUnavailable)
    assert text == f"The store {path} cannot be opened: Permission denied: {path}. {ALLOW}"


async def test_a_path_that_is_a_directory(tmp_path: Path) -> None:
    """The path and the reason."""
    text = await refused(tmp_path, StoreUnavailable)
    assert text == f"The store {tmp_path} cannot be opened: Is a directory: {tmp_path}."


async def test_a_path_below_a_file(tmp_path: Path) -> None:
    """The path and the reason."""
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "poller.db"
    text = await refused(path, StoreUnavailable)
    assert text == f"The store {path} cannot be opened: Not a directory: {path}-lock."


async def test_a_file_that_is_no_database(path: Path) -> None:
    """The text says what to do; the file stays as it is and its lock is let go."""
    path.write_text("important notes\n" * 100)
    for _ in range(2):
        text = await refused(path, StoreIncompatible)
        assert text.startswith(f"The store {path} is damaged, or no store: file is not a database (SQLITE_NOTADB). ")
        assert f"move it and {path}-lock away to start without positions" in text
    assert path.read_text() == "important notes\n" * 100


@pytest.mark.parametrize("mark", ["CREATE TABLE t (x)", "PRAGMA user_version = 1", "PRAGMA application_id = 7"])
async def test_the_database_of_another_program(path: Path, mark: str) -> None:
    """It is refused without a change to it."""
    with closing(sqlite3.connect(path)) as other:
        other.execute(mark)
        other.commit()
    before = path.read_bytes()
    text = await refused(path, StoreIncompatible)
    assert text == f"{path} is a SQLite database of another program. Name another file in `store`."
    assert path.read_bytes() == before


async def test_a_damaged_file(path: Path) -> None:
    """A store whose inside is overwritten is no traceback."""
    await (await SqliteStore.open(str(path), Requests())).close()
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    assert "damaged" in await refused(path, StoreIncompatible)


async def test_an_empty_file_becomes_a_store(path: Path) -> None:
    """It is what a process leaves that is killed while it makes one."""
    path.write_bytes(b"")
    store = await SqliteStore.open(str(path), Requests())
    assert await leased(store, "s1")
    await store.close()


async def test_an_older_store_is_migrated_and_a_newer_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing steps run in order and keep the rows; the way back is a copy that is left, and a refusal names it."""
    store = await SqliteStore.open(str(path), Requests())
    (lease,) = await leased(store, "s1")
    await store.save([(lease, after(5))])
    await store.close()
    shipped = sqlite_file.MIGRATIONS
    steps = (("ALTER TABLE shards ADD COLUMN b TEXT",), ("UPDATE shards SET b = 'x'", "CREATE TABLE c (x)"))
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", shipped + steps)
    store = await SqliteStore.open(str(path), Requests())
    assert await values(store) == {"s1": "5"}
    await store.close()
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("SELECT b FROM shards").fetchone() == ("x",)
        assert shell.execute("PRAGMA user_version").fetchone() == (len(shipped) + 2,)
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", shipped)
    assert await refused(path, StoreIncompatible) == (
        f"The store {path} has version {len(shipped) + 2}, this poller reads versions up to {len(shipped)}. "
        f"Run a newer poller, or put back the copy that the upgrade left beside it, {path}-version-N."
    )
    copy = Path(f"{path}-version-{len(shipped)}")
    assert copy.stat().st_mode & 0o777 == 0o600
    copy.replace(path)
    store = await SqliteStore.open(str(path), Requests())
    assert await values(store) == {"s1": "5"}
    await store.close()


async def test_the_copy_of_an_upgrade_is_whole_or_absent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new store leaves none; one whose copy cannot be made is not touched; what an earlier try left is no obstacle."""
    await (await SqliteStore.open(str(path), Requests())).close()
    version = len(sqlite_file.MIGRATIONS)
    assert not list(path.parent.glob(f"{path.name}-version-*"))
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*sqlite_file.MIGRATIONS, ("CREATE TABLE more (x)",)))
    obstacle = Path(f"{path}-version-{version}.new")
    obstacle.mkdir()
    assert "cannot be opened" in await refused(path, StoreUnavailable)
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("PRAGMA user_version").fetchone() == (version,)
    obstacle.rmdir()
    obstacle.write_text("half a copy")
    await (await SqliteStore.open(str(path), Requests())).close()
    assert [found.name for found in path.parent.glob("*-version-*")] == [f"{path.name}-version-{version}"]


async def test_the_copy_of_an_upgrade_is_on_the_disk_before_it_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power after the upgrade must not leave a copy without content: SQLite does not wait for the disk."""
    await (await SqliteStore.open(str(path), Requests())).close()
    copy = Path(f"{path}-version-{len(sqlite_file.MIGRATIONS)}")
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*sqlite_file.MIGRATIONS, ("CREATE TABLE more (x)",)))
    synced: list[tuple[str, int, bool]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((str(name), name.stat().st_size, copy.exists()))

    monkeypatch.setattr(os, "fsync", watched)
    await (await SqliteStore.open(str(path), Requests())).close()
    assert synced[:1] == [(f"{copy}.new", copy.stat().st_size, False)]
    assert [(name, exists) for name, _, exists in synced[1:]] == [(str(path.parent), True)]


async def test_the_first_release_left_stores_without_members(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows stay as they were, nobody wants them, and members can be kept."""
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file, "MIGRATIONS", sqlite_file.MIGRATIONS[:1])
        await (await SqliteStore.open(str(path), Requests())).close()
    with closing(sqlite3.connect(path)) as shell:
        shell.execute(
            "INSERT INTO shards VALUES (?, 's1', 'AFTER_SEQUENCE_NUMBER', '5', '[]', '', 'me', 3, '[]', '2024-01-01')",
            (M,),
        )
        shell.commit()
    store = await SqliteStore.open(str(path), Requests())
    assert await store.load(M) == {"s1": Row("s1", after(5), owner="me", token=3)}
    assert await store.request(M, (await store.load(M))["s1"], "you")
    await store.beat(Member("you", 1, {}))
    assert (await store.load(M))["s1"].wanted_by == "you"
    assert await store.members() == {"you": Member("you", 1, {})}
    await store.close()


async def test_a_migration_is_all_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails leaves the store at its old version, usable by the old release."""
    await (await SqliteStore.open(str(path), Requests())).close()
    with monkeypatch.context() as patch:
        steps = (("CREATE TABLE new (x)",), ("INSERT INTO absent VALUES (1)",))
        patch.setattr(sqlite_file, "MIGRATIONS", sqlite_file.MIGRATIONS + steps)
        assert "no such table: absent" in await refused(path, StoreUnavailable)
    store = await SqliteStore.open(str(path), Requests())
    await store.close()
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("SELECT count(*) FROM sqlite_master WHERE name = 'new'").fetchone() == (0,)


# The lock


async def test_a_second_opening_is_refused(store: SqliteStore, path: Path) -> None:
    """It names the file, the holder's process, host and command, at once and without waiting."""
    text = await refused(path, StoreInUse)
    assert text.startswith(f"The store {path} is in use by process {os.getpid()} on host {os.uname().nodename} (")
    assert Path(sys.argv[0]).name in text
    assert text.endswith("Stop that one first, or name another file in `store`.")
    assert await leased(store, "s1")


async def test_every_name_of_a_file_is_the_same_lock(
    store: SqliteStore, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths and symbolic links lead to one lock beside the real file."""
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.db"
    link.symlink_to("../poller.db")
    (tmp_path / "directory").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ["../poller.db", "./link.db", str(tmp_path / "directory" / "poller.db"), f"{tmp_path}//./poller.db"]:
        assert name in await refused(name, StoreInUse)
    assert sorted(each.name for each in (tmp_path / "elsewhere").iterdir()) == ["link.db"]


async def test_a_link_to_a_file_that_is_not_there_yet(path: Path, tmp_path: Path) -> None:
    """The file is made where the link points."""
    link = tmp_path / "link.db"
    link.symlink_to(path)
    store = await SqliteStore.open(str(link), Requests())
    await refused(path, StoreInUse)
    await store.close()
    assert path.is_file()
    assert link.is_symlink()


async def test_a_look_beside_a_running_daemon(store: SqliteStore, path: Path) -> None:
    """Without `exclusive` the lock is neither asked for nor taken, and what the holder saved is seen."""
    (lease,) = await leased(store, "s1")
    beside = await SqliteStore.open(str(path), Requests(), exclusive=False)
    await store.save([(lease, after(3))])
    assert await values(beside) == {"s1": "3"}
    await beside.close()
    await refused(path, StoreInUse)
    assert list(await store.save([(lease, after(4))])) == []


async def test_a_look_makes_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `exclusive` no file is made and no version changed."""
    assert await refused(path, StoreUnavailable, exclusive=False) == (
        f"The store {path} cannot be opened: No such file or directory: {path}. Put it there again, or a backup of it."
    )
    assert list(tmp_path.iterdir()) == []
    await (await SqliteStore.open(str(path), Requests())).close()
    newest = len(sqlite_file.MIGRATIONS) + 1
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*sqlite_file.MIGRATIONS, ("CREATE TABLE t (x)",)))
    assert await refused(path, StoreIncompatible, exclusive=False) == (
        f"The store {path} has version {newest - 1}, this poller needs version {newest}. "
        "`poller run` brings it up to date."
    )


async def test_a_cancelled_open_lets_go(path: Path) -> None:
    """Whenever it is cancelled, the next open succeeds at once."""
    for turns in range(3):
        opening = asyncio.create_task(SqliteStore.open(str(path), Requests()))
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await (await SqliteStore.open(str(path), Requests())).close()


# Group commit


async def test_requests_that_wait_are_one_commit(gate: Gate, store: SqliteStore) -> None:
    """All that arrive while a commit runs share the next one."""
    leases = await leased(store, *(f"s{n}" for n in range(50)))
    answers = await behind(gate, store, *(store.save([(lease, after(1))]) for lease in leases))
    assert [list(answer) for answer in answers] == [[]] * 50
    assert gate.groups == [["load"], ["save"] * 50]


async def test_a_busy_loop_loses_no_answer(gate: Gate, store: SqliteStore) -> None:
    """Groups that are committed before the event loop turns again are all answered, each with its own answers.

    The first prototype handed its answers over in a closure, which then saw the next group's.
    """
    leases = await leased(store, "s1", "s2", "s3")
    gate.reset()

    async def loop_is_busy() -> None:
        assert gate.done.acquire(timeout=10)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for lease in leases:
            group.create_task(store.save([(lease, after(1))]))
            group.create_task(loop_is_busy())
    assert gate.groups == [["save"]] * 3


async def test_a_group_sees_its_requests_in_order(gate: Gate, store: SqliteStore) -> None:
    """A later request of a group sees what an earlier one wrote."""
    (lease,) = await leased(store, "s1")
    released, rows, stale = await behind(
        gate, store, store.release(lease, after(8)), store.load(M), store.save([(lease, after(9))])
    )
    assert released is True
    assert rows == {"s1": Row("s1", after(8), token=1)}
    assert list(stale) == [lease]
    assert gate.groups[1:] == [["release", "load", "save"]]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Row("bad", Checkpoint(TRIM_HORIZON), token=None), sqlite3.IntegrityError),  # type: ignore[arg-type]
        (Row("bad", Checkpoint(TRIM_HORIZON), token=2**64), OverflowError),
        (Row("\udc00", Checkpoint(TRIM_HORIZON)), UnicodeEncodeError),
        (Row(b"bad", Checkpoint(object())), AttributeError),  # type: ignore[arg-type]
    ],
)
async def test_a_bad_request_is_undone_alone(gate: Gate, store: SqliteStore, bad: Row, error: type) -> None:
    """It gets its own error, what it had written goes, and its group's other requests are kept."""
    first, second = await leased(store, "s1", "s2")
    before, failed, behind_it = await behind(
        gate,
        store,
        store.save([(first, after(1))]),
        store.create("other", [Row("good", Checkpoint(TRIM_HORIZON)), bad]),
        store.save([(second, after(2))]),
    )
    assert gate.groups[1:] == [["save", "create", "save"]]
    assert isinstance(failed, error)
    assert [list(before), list(behind_it)] == [[], []]
    assert await values(store) == {"s1": "1", "s2": "2"}
    assert await store.load("other") == {}


async def test_cancelled_callers_of_a_group(gate: Gate, store: SqliteStore, requests: Requests) -> None:
    """What a cancelled caller handed over is done and counted; the others of its group get their answers."""
    leases = await leased(store, *(f"s{n}" for n in range(10)))
    gate.close()
    saves = [asyncio.create_task(store.save([(lease, after(1))])) for lease in leases]
    await asyncio.sleep(0)
    for save in saves[::2]:
        save.cancel()
    await asyncio.sleep(0)
    gate.open.set()
    async with asyncio.timeout(10):
        results = await asyncio.gather(*saves, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False] * 5
    assert await values(store) == dict.fromkeys((lease.shard for lease in leases), "1")
    assert requests.counts["save", "success"] == 10


async def test_a_cancelled_close_still_closes(gate: Gate, path: Path) -> None:
    """The store is closed and its lock freed although nobody waited for it."""
    store = await SqliteStore.open(str(path), Requests())
    (lease,) = await leased(store, "s1")
    gate.close()
    save = asyncio.create_task(store.save([(lease, after(1))]))
    closing_ = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    closing_.cancel()
    await asyncio.sleep(0)
    gate.open.set()
    async with asyncio.timeout(10):
        assert list(await save) == []
        await store.close()
    store = await SqliteStore.open(str(path), Requests())
    assert await values(store) == {"s1": "1"}
    await store.close()


def test_a_loop_that_is_gone_does_not_stop_the_writer(path: Path, gate: Gate) -> None:
    """What was handed over is committed although the event loop was closed meanwhile; the thread does not crash."""

    async def start() -> tuple[SqliteStore, list[Lease]]:
        store = await SqliteStore.open(str(path), Requests())
        return store, await leased(store, "s1")

    async def hand_over(store: SqliteStore, lease: Lease) -> None:
        gate.close()
        save = asyncio.create_task(store.save([(lease, after(7))]))
        await asyncio.sleep(0)
        save.cancel()

    with asyncio.Runner() as runner:
        store, (lease,) = runner.run(start())
        runner.run(hand_over(store, lease))
    gate.open.set()
    store._queue.put(None)  # nobody can call close any more
    store._thread.join(10)
    assert not store._thread.is_alive()

    async def look() -> dict[str, str]:
        store = await SqliteStore.open(str(path), Requests())
        try:
            return await values(store)
        finally:
            await store.close()

    assert asyncio.run(look()) == {"s1": "7"}


async def test_a_closed_store_says_so(path: Path, requests: Requests) -> None:
    """A request after close is refused, also while close still waits."""
    store = await SqliteStore.open(str(path), requests)
    await store.close()
    with pytest.raises(StoreUnavailable, match=f"^The store {path} is closed.$"):
        await store.load(M)
    assert requests.counts == {("open", "success"): 1, ("load", "error"): 1}


async def test_each_request_is_reported_once(store: SqliteStore, requests: Requests) -> None:
    """By operation and outcome. A lease that was lost is an answer, not an error."""
    (lease,) = await leased(store, "s1")
    await store.save([(lease, after(1))])
    await store.save([(Lease(M, "s1", "other", 1), after(1))])
    await store.release(lease, None)
    await store.forget(M)
    await store.put_document("k", {})
    await store.documents("")
    await store.delete_document("k")
    with pytest.raises(sqlite3.IntegrityError):
        await store.create(M, [Row("s", Checkpoint(TRIM_HORIZON), token=None)])  # type: ignore[arg-type]
    operations = ["open", "create", "load", "acquire", "release", "forget", "put_document", "documents"]
    expected = {(operation, "success"): 1 for operation in (*operations, "delete_document")}
    assert requests.counts == {**expected, ("save", "success"): 2, ("create", "error"): 1}


# Errors at run time


async def test_a_full_disk_and_room_again(store: SqliteStore, requests: Requests) -> None:
    """A commit that cannot be written fails with a plain text and is undone; once there is room it goes on."""
    (lease,) = await leased(store, "s1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        for n in range(3):
            with pytest.raises(
                StoreUnavailable, match=r"failed: .* \(SQLITE_(IOERR_WRITE|FULL)\)\. [^.?]*disk[^.?]*[.?]$"
            ):
                await store.put_document(f"big/{n}", {"text": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert requests.counts["put_document", "error"] == 3
    assert await store.documents("") == {}
    assert list(await store.save([(lease, after(1))])) == []
    await store.put_document("big", {"text": "x" * 200_000})
    assert list(await store.documents("big")) == ["big"]


async def test_a_full_disk_fails_the_whole_group(gate: Gate, store: SqliteStore) -> None:
    """Nobody is told that something is durable which was undone with the transaction."""
    (lease,) = await leased(store, "s1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        answers = await behind(
            gate, store, store.save([(lease, after(1))]), store.put_document("big", {"text": "x" * 200_000})
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert gate.groups[1:] == [["save", "put_document"]]
    assert [type(answer) for answer in answers] == [StoreUnavailable] * 2
    assert answers[0] is not answers[1]
    assert await values(store) == {"s1": ""}


async def test_an_error_that_ends_the_transaction(gate: Gate, store: SqliteStore) -> None:
    """SQLite undoes the whole group at some errors: each of it learns the cause, none is told success."""
    first, second = await leased(store, "s1", "s2")
    await store._ask("limit", lambda connection: connection.execute("PRAGMA max_page_count = 20").fetchone())
    answers = await behind(
        gate,
        store,
        store.save([(first, after(1))]),
        store.put_document("big", {"text": "x" * 200_000}),
        store.save([(second, after(2))]),
    )
    assert gate.groups[1:] == [["save", "put_document", "save"]]
    assert [type(answer) for answer in answers] == [StoreUnavailable] * 3
    assert str(answers[0]).endswith(" failed: database or disk is full (SQLITE_FULL). Make room on its disk.")
    assert await values(store) == {"s1": "", "s2": ""}
    assert list(await store.save([(first, after(1))])) == []


async def test_an_error_of_one_request_only(gate: Gate, store: SqliteStore) -> None:
    """What SQLite refuses to one request is StoreUnavailable for that one; the others are kept."""
    first, second = await leased(store, "s1", "s2")
    await store._ask("break", lambda connection: connection.execute("DROP TABLE documents").fetchone())
    before, failed, behind_it = await behind(
        gate, store, store.save([(first, after(1))]), store.documents(""), store.save([(second, after(2))])
    )
    assert type(failed) is StoreUnavailable
    assert str(failed).endswith(" failed: no such table: documents (SQLITE_ERROR).")
    assert [list(before), list(behind_it)] == [[], []]
    assert await values(store) == {"s1": "1", "s2": "2"}


async def test_a_broken_connection_is_replaced(store: SqliteStore, path: Path) -> None:
    """Whatever became of the connection, the request after the one that failed has a new one."""
    (lease,) = await leased(store, "s1")
    with pytest.raises(StoreUnavailable, match=f"^The store {path} failed: "):
        await store._ask("break", lambda connection: connection.close())
    assert list(await store.save([(lease, after(1))])) == []
    assert await values(store) == {"s1": "1"}


async def test_a_lock_of_another_program(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch, requests: Requests
) -> None:
    """While somebody writes with the sqlite3 shell for too long the store is unavailable, then it goes on."""
    (lease,) = await leased(store, "s1")
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT", 0.02)
    await store._ask("shorten", lambda connection: connection.execute("PRAGMA busy_timeout = 20"))
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match=r": database is locked \(SQLITE_BUSY\)\.$"):
                await store.save([(lease, after(1))])
        shell.execute("ROLLBACK")
    assert list(await store.save([(lease, after(2))])) == []
    assert requests.counts["save", "error"] == 3


@pytest.mark.parametrize(
    ("column", "value"), [("position_kind", "NONSENSE"), ("resume", "[["), ("resume", "[1]"), ("parents", "5")]
)
async def test_a_row_edited_into_nonsense(store: SqliteStore, path: Path, column: str, value: str) -> None:
    """The mapping and shard are named, and the mapping's neighbour is not disturbed."""
    await leased(store, "s1")
    await store.create("other", [Row("s2", Checkpoint(TRIM_HORIZON))])
    with closing(sqlite3.connect(path)) as shell:
        shell.execute(f"UPDATE shards SET {column} = ? WHERE shard = 's1'", (value,))
        shell.commit()
    with pytest.raises(StoreUnavailable, match=r"^The store's row of mapping mapping, shard s1 is damaged: "):
        await store.load(M)
    assert list(await store.load("other")) == ["s2"]


async def test_a_document_edited_into_nonsense(store: SqliteStore, path: Path) -> None:
    """Its key is named."""
    await store.put_document("mapping/x", {})
    with closing(sqlite3.connect(path)) as shell:
        shell.execute("UPDATE documents SET document = '{'")
        shell.commit()
    with pytest.raises(StoreUnavailable, match=r"^The store's document mapping/x is damaged: "):
        await store.documents("mapping/")


# kill -9

CHILD = """
import asyncio, sys
from tests.unit.test_sqlite_store import Requests, after, leased
from poller.stores.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(sys.argv[1], Requests())
    shards = [f"{caller}-{n}" for caller in range(5) for n in range(3)]
    leases = await leased(store, *shards)
    start = max(int(row.checkpoint.position.value or 0) for row in (await store.load("mapping")).values())

    async def work(caller):
        n = start
        while True:
            n += 1
            stale = await store.save([(lease, after(n)) for lease in leases[caller * 3 : caller * 3 + 3]])
            assert not stale
            print(caller, n, flush=True)

    async with asyncio.TaskGroup() as group:
        for caller in range(5):
            group.create_task(work(caller))

asyncio.run(main())
"""


@contextmanager
def child(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that saves and says what was saved, until it is killed."""
    command = [sys.executable, "-c", CHILD, str(path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        watchdog = threading.Timer(20, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def test_kill_9_loses_nothing_that_save_returned_from(path: Path) -> None:
    """At any moment: the lock is free at once, every answered save is there, and each save is whole."""
    moments = random.Random(9)
    for _ in range(6):
        answered: dict[str, int] = {}
        with child(path) as process:
            assert process.stdout
            for line in itertools.islice(process.stdout, moments.randrange(1, 400)):
                caller, n = line.split()
                answered[caller] = int(n)
            process.send_signal(signal.SIGKILL)
            for line in process.stdout:
                if line.endswith("\n"):
                    caller, n = line.split()
                    answered[caller] = int(n)
            assert process.wait(10) == -signal.SIGKILL
        assert answered

        async def look() -> dict[str, str]:
            store = await SqliteStore.open(str(path), Requests())
            try:
                return await values(store)
            finally:
                await store.close()

        found = asyncio.run(look())
        for caller in range(5):
            stored = {int(found[f"{caller}-{n}"] or 0) for n in range(3)}
            assert len(stored) == 1, "a part of one save is there and a part is not"
            assert stored.pop() >= answered.get(str(caller), 0)
        with closing(sqlite3.connect(path)) as shell:
            assert shell.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_another_process_holds_the_lock_until_it_is_killed(path: Path) -> None:
    """A second daemon is refused naming the first's process id; after kill -9 it gets in at once."""
    with child(path) as process:
        assert process.stdout
        assert process.stdout.readline()
        assert f"in use by process {process.pid} on host" in await refused(path, StoreInUse)
        process.kill()
        process.wait(10)
        store = await SqliteStore.open(str(path), Requests())
        assert len(await values(store)) == 15
        await store.close()


async def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none: refused, for two daemons would write the same rows."""

    def none(_: int, __: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(sqlite_file.fcntl, "flock", none)
    text = await refused(path, StoreUnavailable)
    assert text.endswith(f"its file system has no locks: No locks available: {path}-lock.")
