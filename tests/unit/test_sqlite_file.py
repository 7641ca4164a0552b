"""A SQLite store whose file is taken away, replaced or damaged under it, or is not what it was at the next start."""

import asyncio
import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from poller.core.model import TRIM_HORIZON, Checkpoint, Lease, Member, Row
from poller.errors import StoreIncompatible, StoreUnavailable
from poller.stores import sqlite, sqlite_file
from poller.stores.sqlite import SqliteStore
from tests.unit.test_sqlite_store import M, Requests, after, leased, refused, values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """In a folder of its own, for some tests remove it whole."""
    return tmp_path / "store" / "poller.db"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store looks at each second when nothing is asked, it looks at at once."""
    monkeypatch.setattr(sqlite, "_LOOK_INTERVAL", 0.01)


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    """With two rows, a document and a member."""
    opened = await SqliteStore.open(str(path), Requests())
    yield opened
    await opened.close()


async def filled(store: SqliteStore) -> list[Lease]:
    leases = await leased(store, "s1", "s2")
    await store.save([(leases[0], after(1)), (leases[1], Checkpoint(after(2).position, ((5, 2**70),)))])
    await store.put_document("mapping/x", {"a": [1, "\N{SNOWMAN}"]})
    await store.beat(Member("m", 7, {"n": 1}))
    return leases


async def content(store: SqliteStore) -> tuple[object, ...]:
    return await store.load(M), await store.documents(""), await store.members()


async def until(condition: Callable[[], object]) -> None:
    """At most 5 s."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        await sqlite.asyncio.sleep(0.005)


async def failed(call: Awaitable[object]) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        await call
    return str(caught.value)


# Gone or replaced under us


@pytest.mark.parametrize("gone", ["file", "with log", "renamed", "folder"])
async def test_a_file_that_is_taken_away_is_written_anew_at_once(
    store: SqliteStore, path: Path, tmp_path: Path, gone: str
) -> None:
    """Without anybody asking for anything; whole, as private as it was, and it is what the next start finds."""
    (lease, _) = await filled(store)
    before = await content(store)
    match gone:
        case "file":
            path.unlink()
        case "with log":
            for each in path.parent.glob("poller.db*"):
                each.unlink()
        case "renamed":
            path.rename(tmp_path / "moved")
        case "folder":
            shutil.rmtree(path.parent)
    await until(path.exists)
    assert await content(store) == before
    assert await store.save([(lease, after(3))]) == ()
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "in use" in await refused(path, sqlite_file.StoreInUse)
    expected = (await content(store))[0]
    await store.close()
    names = sorted(each.name for each in path.parent.iterdir())
    assert names == ["poller.db", "poller.db-lock"]
    again = await SqliteStore.open(str(path), Requests())
    assert await again.load(M) == expected
    await again.close()


async def test_a_log_that_is_taken_away_is_written_anew(store: SqliteStore, path: Path) -> None:
    """What was answered is in the file at the path, whoever opens it: the log that we went on writing to had no name."""
    await filled(store)
    before = await content(store)
    Path(f"{path}-wal").unlink()
    await until(lambda: Path(f"{path}-replaced").exists())
    await store.put_document("mapping/y", {"b": 2})
    with closing(sqlite3.connect(path)) as other:
        names = {name for (name,) in other.execute("SELECT key FROM documents")}
    assert {"mapping/x", "mapping/y"} <= names
    assert (await content(store))[::2] == before[::2]
    assert not store.problem


async def test_whoever_shares_the_file_waits_for_a_log_that_is_gone(store: SqliteStore, path: Path) -> None:
    """Connected anew before the owner has written the file, it would begin a log of its own and see an old store."""
    await filled(store)
    sharer = await SqliteStore.open(str(path), Requests(), exclusive=False)
    try:
        wal = Path(f"{path}-wal")
        with closing(sqlite3.connect(path)) as reader:  # it holds the owner up: both see the loss, the sharer first
            reader.execute("BEGIN IMMEDIATE")
            wal.rename(f"{path}-gone")
            reader.rollback()
        await until(lambda: Path(f"{path}-replaced").exists())
        assert await content(sharer) == await content(store)
    finally:
        await sharer.close()


async def test_trouble_upon_trouble_ends_no_thread(store: SqliteStore, path: Path) -> None:
    """The file damaged, its folder gone: a sentence about it, not a store that never answers again."""
    await filled(store)
    for n in range(50):
        await store.put_document(f"k{n}", {"v": "x" * 3000})
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"\xff" * path.stat().st_size)
    shutil.rmtree(path.parent)
    for _ in range(3):
        with suppress(StoreUnavailable, StoreIncompatible):
            await asyncio.wait_for(store.documents(""), 5)


async def test_a_save_under_way_when_the_file_goes_is_in_the_new_one(store: SqliteStore, path: Path) -> None:
    """Each answered save is at the path, whenever somebody removes the file."""
    (lease, _) = await filled(store)
    for n in range(30):
        if n % 3 == 1:
            path.unlink(missing_ok=True)
        await store.save([(lease, after(n))])
        with closing(sqlite3.connect(path)) as shell:
            rows = shell.execute("SELECT position_value FROM shards WHERE shard = 's1'").fetchall()
        if n % 3 != 1:
            assert rows == [(str(n),)]
    assert (await values(store))["s1"] == "29"


@pytest.mark.parametrize("has_log", [False, True])
async def test_a_file_in_its_place_is_kept_and_ours_put_back(
    store: SqliteStore, path: Path, tmp_path: Path, has_log: bool
) -> None:
    """What somebody put there is beside it, unchanged, with its own log; what we had is where it was."""
    await filled(store)
    before = await content(store)
    if has_log:
        with closing(sqlite3.connect(tmp_path / "other")) as other:
            other.execute("PRAGMA journal_mode = WAL")
            other.execute("CREATE TABLE t (x)")
            other.execute("INSERT INTO t VALUES (5)")
            other.commit()
            for end in ("", "-wal"):
                shutil.copy(f"{tmp_path}/other{end}", f"{tmp_path}/new{end}")
        (tmp_path / "new-wal").replace(f"{path}-wal")
    else:
        (tmp_path / "new").write_text("another file")
    (tmp_path / "new").replace(path)
    await until(lambda: Path(f"{path}-replaced").exists() and not store._file.is_moved())
    assert await content(store) == before
    if has_log:
        with closing(sqlite3.connect(f"{path}-replaced")) as kept:
            assert kept.execute("SELECT x FROM t").fetchall() == [(5,)]
        return
    assert not Path(f"{path}-replaced-wal").exists()
    (tmp_path / "new").write_text("one more")
    (tmp_path / "new").replace(path)
    await until(lambda: Path(f"{path}-replaced").read_text() == "one more" and not store._file.is_moved())
    assert await content(store) == before
    assert not Path(f"{path}-replaced-wal").exists(), "the log of ours would be played into it"


OTHER = """
import asyncio, sys
from tests.unit.test_sqlite_store import Requests
from poller.stores.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(sys.argv[1], Requests())
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await store.close()

asyncio.run(main())
"""


async def test_a_store_of_another_daemon_is_left_alone(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody removed the folder and started a second daemon: the first one names it and writes nothing there; when
    the other one ends it takes its place back.
    """
    await filled(store)
    monkeypatch.setattr(sqlite, "_LOOK_INTERVAL", 60)
    before = await content(store)
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", OTHER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        assert f"in use by process {other.pid} " in await failed(store.load(M))
        assert f"in use by process {other.pid} " in store.problem
        other.stdin.close()
        other.wait(10)
    assert await content(store) == before
    assert Path(f"{path}-replaced").exists()


async def test_no_room_to_write_it_anew(store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still open is kept until there is room; nothing is left half written."""
    (lease, _) = await filled(store)
    copy = sqlite_file._copy

    def full(source: sqlite3.Connection, made: Path) -> None:
        copy(source, made)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(made))

    monkeypatch.setattr(sqlite_file, "_copy", full)
    path.unlink()
    text = f"The store {path} cannot be opened: No space left on device: {path}-new. Make room on its disk."
    for _ in range(3):
        assert await failed(store.save([(lease, after(4))])) == text
    assert store.problem == text
    assert not Path(f"{path}-new").exists()
    monkeypatch.setattr(sqlite_file, "_copy", copy)
    await until(lambda: not store.problem)
    assert await values(store) == {"s1": "1", "s2": "2"}


async def test_whoever_shares_the_file_follows(store: SqliteStore, path: Path) -> None:
    """Workers wait for the one that holds the lock, and then go on with the new file, whoever asks first."""
    (lease, _) = await filled(store)
    worker = await SqliteStore.open(str(path), Requests(), exclusive=False)
    for n in range(10, 13):
        assert await worker.save([(lease, after(n))]) == ()
        path.unlink()
        await until(lambda: not worker.problem and not worker._file.is_moved())
        assert (await values(worker))["s1"] == str(n)
        assert await content(worker) == await content(store)
    await worker.close()


async def test_a_file_that_nobody_named_is_not_followed(store: SqliteStore, path: Path, tmp_path: Path) -> None:
    """Somebody else's file at the path is not written to by a worker either."""
    await filled(store)
    worker = await SqliteStore.open(str(path), Requests(), exclusive=False)
    await store.close()
    (tmp_path / "new").write_text("another file")
    (tmp_path / "new").replace(path)
    assert await failed(worker.load(M)) == (
        f"The store {path} was replaced, and the daemon that owns it has not written it anew."
    )
    assert path.read_text() == "another file"
    await worker.close()


# Damaged under us

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda _: b"",
    "head": lambda content: bytes(4096) + content[4096:],
    "middle": lambda content: content[:4096] + b"\xff" * (len(content) - 4096),
    "half": lambda content: content[: len(content) // 2],
}


def overwrite(path: Path, damage: str) -> None:
    """In place, and its log is gone: what SQLite still holds is of no use to it."""
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(DAMAGES[damage](content))
    log = Path(f"{path}-wal")
    if log.exists():
        os.truncate(log, 0)


async def grown(store: SqliteStore) -> list[Lease]:
    """So that its pages do not all stay in memory or in one place."""
    leases = await filled(store)
    for n in range(20):
        await store.put_document(f"big/{n}", {"text": "x" * 50_000})
    return leases


@pytest.mark.parametrize("damage", ["truncated", "head", "middle"])
async def test_a_damaged_file_is_written_anew_from_what_is_in_memory(
    store: SqliteStore, path: Path, damage: str
) -> None:
    """Within a look, without anybody asking; the damaged one is kept beside it."""
    (lease, _) = await filled(store)
    before = await content(store)
    with closing(sqlite3.connect(path)) as shell:
        shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    await content(store)
    overwrite(path, damage)
    await until(lambda: Path(f"{path}-replaced").exists())
    assert await content(store) == before
    assert await store.save([(lease, after(10))]) == ()
    await store.close()
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_file_that_is_not_in_memory_is_refused_until_a_backup_is_in_its_place(
    store: SqliteStore, path: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never becomes an empty store, whose positions would begin anew; the text says what to do, and is steady."""
    monkeypatch.setattr(sqlite, "_LOOK_INTERVAL", 60)
    (lease, _) = await grown(store)
    with closing(sqlite3.connect(path)) as shell:
        shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shell.execute("VACUUM INTO ?", (str(tmp_path / "backup"),))
    await store.save([(lease, after(9))])
    with pytest.raises(StoreUnavailable):
        await store._ask("break", lambda connection: connection.close())
    overwrite(path, damage)
    for _ in range(3):
        text = await failed(store.load(M))
        assert text.startswith(f"The store {path} is damaged, or no store: ")
        assert await failed(store.save([(lease, after(10))])) == text == store.problem
    (tmp_path / "backup").replace(path)
    assert await values(store) == {"s1": "1", "s2": "2"}
    assert await store.save([(lease, after(10))]) == ()
    assert not store.problem
    await store.close()
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_damage_that_one_request_finds_is_everybodys(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of its group is kept, and the whole file is read before anything is written to it again."""
    monkeypatch.setattr(sqlite, "_LOOK_INTERVAL", 60)
    await filled(store)

    def corrupt(_: sqlite3.Connection) -> None:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_CORRUPT, "SQLITE_CORRUPT"
        raise error

    text = await failed(store._ask("corrupt", corrupt))
    assert text.startswith(f"The store {path} is damaged, or no store: database disk image is malformed (SQLITE_CORR")
    assert store.problem == text
    checks: list[object] = []
    check = sqlite_file._damage_of
    monkeypatch.setattr(sqlite_file, "_damage_of", lambda connection: checks.append(connection) or check(connection))
    assert await values(store) == {"s1": "1", "s2": "2"}
    assert len(checks) == 1


async def test_sqlite_writing_to_its_file_is_no_damage(store: SqliteStore, path: Path) -> None:
    """Each checkpoint of the log has the file checked, and nothing is written anew."""
    (lease, _) = await filled(store)
    for n in range(5):
        await store.put_document("big", {"text": "x" * 200_000})
        with closing(sqlite3.connect(path)) as shell:
            shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        await until(lambda: not store._file.has_changed())
        assert await store.save([(lease, after(n))]) == ()
    assert not Path(f"{path}-replaced").exists()
    assert store._file._check_at


# At the start


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_file_is_refused_at_the_start(path: Path, damage: str) -> None:
    """Naming it and the copies beside it, and leaving both as they are; it never starts as new on its own."""
    store = await SqliteStore.open(str(path), Requests())
    await grown(store)
    await store.close()
    copy = Path(f"{path}-version-1")
    shutil.copy(path, copy)
    overwrite(path, damage)
    left = path.read_bytes()
    if damage == "truncated":
        Path(f"{path}-wal").write_text("what may be saved by hand")
    for _ in range(2):
        text = await refused(path, StoreIncompatible)
        assert text.startswith(f"The store {path} is damaged, or no store: ")
        assert f" Beside it lie {copy}. " in text
        assert "poller checkpoints" in text
    assert path.read_bytes() == left
    if damage == "truncated":
        assert Path(f"{path}-wal").read_text() == "what may be saved by hand", "SQLite would remove it"
        Path(f"{path}-wal").unlink()
    copy.replace(path)
    store = await SqliteStore.open(str(path), Requests())
    assert await values(store) == {"s1": "1", "s2": "2"}
    await store.close()


async def test_a_store_that_is_gone_is_not_begun_anew(path: Path) -> None:
    """Mappings at LATEST would pass over what is pending: only who removes the lock file too wants that."""
    store = await SqliteStore.open(str(path), Requests())
    await filled(store)
    await store.close()
    path.rename(path.parent / "moved")
    for _ in range(2):
        text = await refused(path, StoreIncompatible)
        assert text.startswith(f"The store {path} is gone: {path}-lock says that there was one. ")
    assert not path.exists()
    (path.parent / "moved").rename(path)
    store = await SqliteStore.open(str(path), Requests())
    assert await values(store) == {"s1": "1", "s2": "2"}
    await store.close()
    path.unlink()
    Path(f"{path}-lock").unlink()
    store = await SqliteStore.open(str(path), Requests())
    assert await values(store) == {}
    await store.close()


async def test_a_start_that_fails_is_no_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves does not count as one that is gone or empty: the next start makes it."""
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file, "MIGRATIONS", (*sqlite_file.MIGRATIONS, ("NONSENSE",)))
        await refused(path, StoreUnavailable)
    path.unlink()
    store = await SqliteStore.open(str(path), Requests())
    assert await leased(store, "s1")
    await store.close()


async def test_the_lock_of_an_older_release(path: Path) -> None:
    """It does not say that there was a store: an absent one is made, as it was then."""
    path.parent.mkdir()
    Path(f"{path}-lock").write_text("1\nhost\npoller run\n")
    store = await SqliteStore.open(str(path), Requests())
    await store.create(M, [Row("s1", Checkpoint(TRIM_HORIZON))])
    lines = Path(f"{path}-lock").read_text().split("\n")
    assert lines[0] == str(os.getpid())
    assert lines[3:] == [f"{path.stat().st_dev} {path.stat().st_ino}", ""]
    await store.close()


# In trouble, and out of it


async def test_trouble_is_said_once_and_ends_with_a_write(
    store: SqliteStore, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at again and again without anybody asking, and counted; a write of the store's own ends it."""
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT", 0.01)
    await filled(store)
    requests = store._observer
    assert isinstance(requests, Requests)

    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        await store._ask("impatient", lambda connection: connection.execute("PRAGMA busy_timeout = 10"))
        shell.execute("BEGIN IMMEDIATE")
        assert "database is locked" in await failed(store.put_document("x", {}))
        assert "database is locked" in store.problem
        await until(lambda: requests.counts["probe", "error"] >= 1)
        assert store.problem
        shell.execute("ROLLBACK")
    await until(lambda: not store.problem)
    assert requests.counts["probe", "success"] == 1
    log = capsys.readouterr().out
    assert log.count("store_failing") == log.count("store_works_again") == 1


async def test_reading_does_not_end_trouble(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk reads succeed all the time: only a commit that wrote something shows that there is room."""
    (lease, _) = await filled(store)
    monkeypatch.setattr(sqlite, "_LOOK_INTERVAL", 60)
    await store.load(M)  # the look that was under way is over
    store.problem = "full"
    await store.load(M)
    assert store.problem == "full"
    await store.save([(lease, after(5))])
    assert not store.problem


async def test_a_store_whose_log_is_gone_is_not_begun_anew(path: Path) -> None:
    """SQLite takes a file whose log somebody removed for one without tables, if all was still in the log."""
    store = await SqliteStore.open(str(path), Requests())
    await filled(store)
    shutil.copy(path, path.parent / "copy")
    await store.close()
    assert path.stat().st_size > 4096
    (path.parent / "copy").replace(path)
    store = await SqliteStore.open(str(path), Requests())
    assert await store.load(M) == {}, "a sound copy of an older time"
    await store.close()
    with closing(sqlite3.connect(path.parent / "bare")) as bare:
        bare.execute("PRAGMA journal_mode = WAL")
    (path.parent / "bare").replace(path)
    text = await refused(path, StoreIncompatible)
    assert text.startswith(f"The store {path} is damaged, or no store: it is empty, though it was not. ")
