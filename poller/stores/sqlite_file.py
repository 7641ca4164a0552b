"""The file of a SQLite store: who may use it, which version it has, and what becomes of it when somebody else takes it
away, replaces or damages it under the daemon.

    SOUND ------- every transaction asks, with the write lock held: does the path still lead to the file that we
      |           have open, and has anybody written to it since? Then all of it is read and checked.
      |  gone, replaced or damaged, and what we have open is whole: everything is written anew to the path
      |  gone or replaced, and we do not have it open: refused until a store is there, which is then used
      |  damaged, and so is what we have open: let go of, and refused until a sound store is there
    SOUND

The last file that was in the way of one that is written anew is kept as `PATH-replaced`. Only the holder of the lock
writes anew; others that have the file open see in the lock file which one is the right one, and follow.
"""

import errno
import fcntl
import os
import shlex
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from poller.clock import stopwatch
from poller.errors import PollerError, StoreIncompatible, StoreInUse, StoreUnavailable

_log = structlog.get_logger(__name__)

APPLICATION_ID = 0x45534D50  # "ESMP": `file` and we tell our files from other SQLite databases
BUSY_TIMEOUT = 5.0  # seconds that a commit waits for a lock that another program holds, such as the sqlite3 shell

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE shards (
            mapping TEXT NOT NULL,
            shard TEXT NOT NULL,
            position_kind TEXT NOT NULL,
            position_value TEXT NOT NULL,
            resume TEXT NOT NULL,       -- JSON: vectors of integers too big for SQLite's
            tumbling TEXT NOT NULL,     -- open tumbling window: its start, a line break, its state; or empty
            owner TEXT,                 -- NULL: nobody holds the lease
            token INTEGER NOT NULL,
            parents TEXT NOT NULL,      -- JSON
            updated_at TEXT NOT NULL,   -- UTC
            PRIMARY KEY (mapping, shard)
        ) WITHOUT ROWID
        """,
        "CREATE TABLE documents (key TEXT PRIMARY KEY, document TEXT NOT NULL, updated_at TEXT NOT NULL) WITHOUT ROWID",
    ),
    (
        "ALTER TABLE shards ADD COLUMN wanted_by TEXT",  # a member that asks the owner for the shard
        """
        CREATE TABLE members (
            id TEXT PRIMARY KEY, beat INTEGER NOT NULL, info TEXT NOT NULL, updated_at TEXT NOT NULL
        ) WITHOUT ROWID
        """,
    ),
)
"""Statement lists: the one at index N brings a store from version N to N + 1. A shipped one never changes."""

_DAMAGES: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_LOOK = "Look at its disk: is it full, read-only or broken?"
_REMEDIES: Final = {  # by SQLite's primary error code
    sqlite3.SQLITE_FULL: "Make room on its disk.",
    sqlite3.SQLITE_READONLY: "Let this user write to the file and its folder, on a file system that is not read-only.",
    sqlite3.SQLITE_IOERR: _LOOK,
    sqlite3.SQLITE_CANTOPEN: "Let this user read and write the file and its folder; look whether descriptors are left.",
}
_OPENINGS: Final = {
    errno.EIO: _LOOK,
    errno.EMFILE: "Allow this process more descriptors (LimitNOFILE, ulimit -n).",
    errno.ENOSPC: "Make room on its disk.",
    errno.EDQUOT: "Make room on its disk, or raise the quota.",
    errno.EROFS: "Make the file system writable, or name another file in `store`.",
    errno.ENOENT: "Put it there again, or a backup of it.",
    errno.EACCES: "Let this user read and write the file and its folder, or name another file in `store`.",
}


_EMPTY: Final = "it is empty, though it was not"
_CHECK_SHARE: Final = 200
"""A check that took a second is not followed by another one for so many: half a percent of the time."""
_CHECK_PAUSE: Final = 1.0


class _Identity(NamedTuple):
    """Which file it is, whatever its name."""

    device: int
    inode: int


class _Found(NamedTuple):
    """The file at the path. `written`: when, in nanoseconds; only checkpoints of SQLite's log write to it."""

    identity: _Identity
    written: int
    size: int


def is_damage(error: BaseException) -> bool:
    """Does SQLite say that the file is no sound database?"""
    if not isinstance(error, sqlite3.Error):
        return False
    is_cut = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHORT_READ
    return is_cut or _primary(error) in _DAMAGES


def _damage_of(connection: sqlite3.Connection) -> str:
    """What is wrong with the database, as this connection sees it; empty: nothing. sqlite3.Error: nobody can tell."""
    try:
        found: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        return f"{error} ({error.sqlite_errorname})"
    return "" if found == "ok" else found.replace("\n", " ")


def _primary(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


class StoreFile:
    """The lock and the connection. Used by the writer thread alone, but for `path` and `lock`."""

    def __init__(self, path: str, *, exclusive: bool) -> None:
        self.path = path
        self.lock: int | None = None  # file descriptor
        self._exclusive = exclusive
        self._real = os.path.realpath(path)  # so that every name of the file leads to the same lock
        self._connection: sqlite3.Connection | None = None
        self._identity: _Identity | None = None  # of the file that we use; None until it was open once
        self._log_identity: _Identity | None = None  # of its write-ahead log
        self._was_made = False  # the lock file says that a store was here
        self._seen: _Found | None = None  # as it was when it was last checked
        self._check_at = 0.0  # of the monotonic clock: not again before
        self._is_damaged = False  # the connection before this one found it so

    def begin(self) -> sqlite3.Connection:
        """A connection with a transaction begun, in the file that the path leads to.

        sqlite3.Error, OSError; StoreInUse, StoreIncompatible, StoreUnavailable. After any error, of it or of the
        transaction: `give_up`.
        """
        connection = self._connection or self._connect()
        connection.execute("BEGIN IMMEDIATE")
        if self._log_identity is None:
            self._log_identity = _identity(f"{self._real}-wal")  # it is there from the first transaction on
        # Asked with the write lock: whoever writes the file anew has it too, so that nothing is written to the old one
        # that is not in the new one.
        found = self._found()
        has_log = self._has_log()
        if found == self._seen and has_log:
            return connection
        if found is not None and found.identity == self._identity and not has_log:
            if not self._exclusive:
                raise self._away(None)
            reason = "somebody removed its log"
        elif found is not None and found.identity == self._identity:
            reason = self._check(found)
            if not reason:
                return connection
            if not self._exclusive or _damage_of(connection):
                raise StoreIncompatible(self._damage(reason))
        else:
            reason = "somebody removed it" if found is None else "somebody put another file in its place"
        if self._exclusive:
            self._write_anew(connection, found, reason)
        elif found is not None and found.identity == self._named():
            connection.execute("ROLLBACK")
            self._identity = found.identity
        else:
            raise self._away(found)
        self._disconnect()
        return self.begin()

    def _check(self, found: _Found) -> str:
        """What is wrong with the file that somebody has written to; empty: nothing. Most often it was SQLite itself.

        Not as the connection sees it, which may have it in memory.
        """
        if not found.size:
            return _EMPTY
        started = stopwatch()
        if started < self._check_at and self._seen is not None and found.size >= self._seen.size:
            return ""  # the next look does it
        try:
            with closing(self._connection_to(self._real)) as fresh:
                reason = _damage_of(fresh)
        except sqlite3.Error:  # no descriptor is left, perhaps; what we have open works
            self._check_at = started + _CHECK_PAUSE
            return ""
        now = stopwatch()
        self._check_at = now + _CHECK_SHARE * (now - started)
        if not reason:
            self._seen = found
        return reason

    def give_up(self, error: BaseException) -> None:
        """The transaction has failed: what is left of it ends, the next one gets a new connection.

        But one to a file that is not at the path any more is kept while it works: it is all that is left of the store.
        """
        if is_damage(error) or isinstance(error, StoreIncompatible):
            self._is_damaged = True
        elif self._connection is not None and (self.is_moved() or not self._has_log()):
            with suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                return
        self._disconnect()

    def is_moved(self) -> bool:
        """Does the path lead elsewhere than to the file that we use?"""
        found = self._found()
        return found is None or found.identity != self._identity

    def _has_log(self) -> bool:
        """Is the log that we write to still at its path? What is not yet in the file itself is nowhere else."""
        try:
            return self._log_identity is None or _identity(f"{self._real}-wal") == self._log_identity
        except OSError:
            return False

    def has_changed(self) -> bool:
        """Is the file to be looked at? It is not the one that we use, its log is not, or somebody has written to it."""
        if not self._has_log():
            return True
        return self._found() != self._seen and stopwatch() >= self._check_at

    @property
    def is_new(self) -> bool:
        """It was not open yet."""
        return self._identity is None

    def close(self) -> None:
        """Close the file, free the lock."""
        self._disconnect()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def sentence(self, error: Exception) -> str:
        """What went wrong, and what to do about it."""
        if isinstance(error, PollerError):
            return str(error)
        if isinstance(error, OSError):
            remedy = f" {_OPENINGS[error.errno]}" if error.errno in _OPENINGS else ""
            return f"The store {self.path} cannot be opened: {error.strerror}: {error.filename}.{remedy}"
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if is_damage(error):
            return self._damage(f"{error} ({name})")
        remedy = (
            f" {_REMEDIES[code]}" if isinstance(error, sqlite3.Error) and (code := _primary(error)) in _REMEDIES else ""
        )
        return f"The store {self.path} failed: {error} ({name}).{remedy}"

    def _damage(self, reason: str) -> str:
        near: list[str] = []
        with suppress(OSError):  # the folder is gone too, or no descriptor is left
            near = [str(each) for each in Path(self._real).parent.iterdir()]
        copies = sorted(each for each in near if each == self._kept or each.startswith(f"{self._real}-version-"))
        there = f" Beside it lie {', '.join(copies)}." if copies else ""
        return (
            f"The store {self.path} is damaged, or no store: {reason}. Put a backup in its place with `mv`.{there} "
            f"Without one move it and {self._real}-lock away to start without positions, and give it some with "
            "`poller checkpoints import` or `poller seek`. Or name another file in `store`."
        )

    # --- the file at the path

    def _found(self) -> _Found | None:
        """The file at the path; None: there is none, or none that we could reach."""
        try:
            found = os.stat(self._real)  # noqa: PTH116 - 1 us less per commit than pathlib's
        except OSError:
            return None
        return _Found(_Identity(found.st_dev, found.st_ino), found.st_mtime_ns, found.st_size)

    def _away(self, found: _Found | None) -> StoreUnavailable:
        what = "is gone" if found is None else "was replaced"
        return StoreUnavailable(f"The store {self.path} {what}, and the daemon that owns it has not written it anew.")

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):  # what was committed is safe in the log; nothing else is left to lose
                self._connection.close()
            self._connection = None

    def _connect(self) -> sqlite3.Connection:
        if self._exclusive and self.is_new:
            self._make()
        self._look_at_path()
        found = self._found()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._real)
        if (self._was_made or not self.is_new) and found.size == 0:
            raise StoreIncompatible(self._damage(_EMPTY))  # before SQLite sees it: it would remove the log
        is_other = not self.is_new and found.identity != self._identity
        if is_other:
            self._take_in_place(found)
        connection = self._connection_to(self._real)
        try:
            self._prepare(connection, has_changed=found != self._seen or self._is_damaged)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._identity, self._seen = found.identity, self._found()
        self._log_identity = None
        if self._exclusive and self._identity != self._named():
            self._name(self._identity)
        if is_other and self._exclusive:
            _log.error("store_adopted", path=self.path, meaning="what was done since it was saved is delivered again")
        self._is_damaged = False
        return connection

    @staticmethod
    def _connection_to(path: str) -> sqlite3.Connection:
        return sqlite3.connect(f"{Path(path).as_uri()}?mode=rw", uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)

    def _make(self) -> None:
        """Lock and make the file. OSError, StoreInUse; StoreIncompatible: there was one, and it is gone."""
        if self.lock is None:
            with suppress(FileExistsError):  # should it be no directory, the next line says so
                Path(self._real).parent.mkdir(mode=0o700, parents=True)
            self.lock = _lock(self._lock_path, self.path)
            self._was_made = self._named() is not None
        if self._was_made and self._found() is None:
            raise StoreIncompatible(
                f"The store {self.path} is gone: {self._lock_path} says that there was one. Put it or a backup of it "
                "there; or remove that file too, to start without positions: streams then begin at StartingPosition."
            )
        # Only a file that is absent is opened here: closing one that SQLite has open elsewhere in this process
        # would drop SQLite's own locks on it (POSIX).
        with suppress(FileExistsError):
            os.close(os.open(self._real, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def _look_at_path(self) -> None:
        """OSError: there is something that SQLite would open read-only, and fail at the first write; or not at all."""
        if Path(self._real).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._real)
        if not os.access(self._real, os.R_OK | os.W_OK, effective_ids=True):
            code = errno.ENOENT
            if Path(self._real).exists():
                is_read_only = os.statvfs(self._real).f_flag & os.ST_RDONLY
                code = errno.EROFS if is_read_only else errno.EACCES
            raise OSError(code, os.strerror(code), self._real)

    def _take_in_place(self, found: _Found) -> None:
        """Use another file than so far: somebody put a backup there, and what we had is not open any more."""
        if self._exclusive:
            self._keep_lock()
            self._clear_log(ours=f"{self._real}-old-wal", theirs=None)
        elif found.identity != self._named():
            raise self._away(found)

    def _clear_log(self, *, ours: str | None, theirs: str | None) -> None:
        """Another file is to be used, and SQLite would play a log at the path into it. The old file's goes to `ours`;
        one that came with a file that somebody put there to `theirs`. None: ours is removed, theirs stays.
        """
        log = Path(f"{self._real}-wal")
        identity = _identity(str(log))
        if identity is not None and identity == self._log_identity:
            log.unlink() if ours is None else log.replace(ours)
        elif identity is not None and theirs is not None:
            log.replace(theirs)
        Path(f"{self._real}-shm").unlink(missing_ok=True)

    def _write_anew(self, connection: sqlite3.Connection, found: _Found | None, reason: str) -> None:
        """Put all that the open file holds into a new one at the path. `connection` has the write lock.

        Whole or not at all; a kill in between leaves what was at the path, or nothing, which the next start refuses.
        """
        real = Path(self._real)
        with suppress(FileExistsError):
            real.parent.mkdir(mode=0o700, parents=True)
        self._keep_lock()
        made = Path(f"{self._real}-new")
        made.unlink(missing_ok=True)
        try:
            _copy(connection, made)
            at = made.stat()
            identity = _Identity(at.st_dev, at.st_ino)
            kept = None
            self._clear_log(ours=None, theirs=f"{self._kept}-wal")
            if found is not None:
                kept = self._kept
                real.replace(kept)
            made.replace(real)
            _sync_folder(real.parent)
        except BaseException:
            made.unlink(missing_ok=True)  # the disk is full, perhaps
            raise
        self._identity = identity
        self._name(identity)
        _log.error("store_rewritten", path=self.path, reason=reason, kept=kept, meaning="nothing is lost")

    # --- the lock file: who holds the lock, and which file it is for

    @property
    def _kept(self) -> str:
        """Where the last file is that was in the way of one that was written anew."""
        return f"{self._real}-replaced"

    @property
    def _lock_path(self) -> str:
        return f"{self._real}-lock"

    def _keep_lock(self) -> None:
        """Hold the lock at the path, should the lock file have gone with the store. StoreInUse: another has it."""
        assert self.lock is not None
        held = os.fstat(self.lock)
        if _identity(self._lock_path) != (held.st_dev, held.st_ino):
            lock = _lock(self._lock_path, self.path)
            os.close(self.lock)
            self.lock = lock

    def _named(self) -> _Identity | None:
        """The file that the holder of the lock uses, or used; None: it does not say."""
        try:
            lines = Path(self._lock_path).read_bytes().split(b"\n")
            device, inode = map(int, lines[_HOLDER_LINES].split())
        except (OSError, ValueError, IndexError):
            return None
        return _Identity(device, inode)

    def _name(self, identity: _Identity) -> None:
        assert self.lock is not None
        _write_lock(self.lock, f"{identity.device} {identity.inode}\n")

    # --- what is in it

    def _prepare(self, connection: sqlite3.Connection, *, has_changed: bool) -> None:
        """See that it is ours and sound, set it up, bring it to our version. StoreIncompatible, sqlite3.Error."""
        newest = len(MIGRATIONS)
        try:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            raise StoreIncompatible(self.sentence(error)) from error
        if not (application or version or tables) and (self._was_made or not self.is_new):
            raise StoreIncompatible(self._damage(_EMPTY))  # its log is gone, and nothing was in the file itself yet
        if application != APPLICATION_ID and (application or version or tables):
            raise StoreIncompatible(
                f"{self.path} is a SQLite database of another program. Name another file in `store`."
            )
        if version > newest:
            raise StoreIncompatible(
                f"The store {self.path} has version {version}, this poller reads versions up to {newest}. "
                f"Run a newer poller, or put back the copy that the upgrade left beside it, {self.path}-version-N."
            )
        if version < newest and not self._exclusive:
            raise StoreIncompatible(
                f"The store {self.path} has version {version}, this poller needs version {newest}. "
                f"`poller run` brings it up to date."
            )
        connection.execute("PRAGMA synchronous = FULL")  # a commit is an fsync of the log: it survives a loss of power
        connection.execute("PRAGMA temp_store = MEMORY")  # savepoints need no temporary file
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise StoreUnavailable(
                f"The store {self.path} is on a file system without shared memory, which SQLite's write-ahead log "
                "needs. Name a file on a local disk in `store`."
            )
        # In the log's mode, for a change of mode forgets what was read: from what this reads it can be written anew.
        if has_changed and (reason := _damage_of(connection)):
            raise StoreIncompatible(self._damage(reason))
        if version < newest:
            if version:
                self._keep_copy(connection, version)
            connection.execute("BEGIN IMMEDIATE")
            _migrate(connection, version)
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the file is a store, whatever becomes of its log

    def _keep_copy(self, connection: sqlite3.Connection, version: int) -> None:
        """For a way back to the release that wrote it: whole or not at all, in place of an older one."""
        kept = f"{self._real}-version-{version}"
        made = f"{kept}.new"
        with suppress(FileNotFoundError):
            Path(made).unlink()
        copy = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)  # SQLite takes an empty file
        try:
            connection.execute("VACUUM INTO ?", (made,))
            os.fsync(copy)  # which SQLite leaves out here
            Path(made).replace(kept)
            _sync_folder(Path(made).parent)
        except BaseException:
            Path(made).unlink(missing_ok=True)  # the disk is full, perhaps
            raise
        finally:
            os.close(copy)


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """From this version to ours, inside a transaction."""
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _copy(source: sqlite3.Connection, path: Path) -> None:
    """A store with the same content in a new file, on the disk when this returns.

    Row by row: SQLite's own ways to copy a database do not run inside a transaction, which keeps other writers out.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    with closing(sqlite3.connect(path, isolation_level=None)) as made:
        made.execute("PRAGMA journal_mode = OFF")  # what fails is thrown away
        made.execute("BEGIN IMMEDIATE")
        _migrate(made, 0)
        for (table,) in made.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            rows = source.execute(f"SELECT * FROM {table}")  # noqa: S608 - one of our own names
            marks = ", ".join("?" * len(rows.description))
            made.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)  # noqa: S608
        made.execute("COMMIT")
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(path: str) -> _Identity | None:
    """None: there is no such file."""
    try:
        found = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _Identity(found.st_dev, found.st_ino)


_HOLDER_LINES: Final = 3


def _lock(lock_path: str, path: str) -> int:
    """The descriptor that holds the lock; closing it, or the end of the process, frees it. StoreInUse, OSError.

    The file stays when the lock goes: removing it would let two processes lock two files of one name. It says who
    holds the lock, a line each: process id, host, command; then which file the store is: device and inode.
    """
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, host, command = (_read_lock(descriptor) + "\n\n").split("\n")[:_HOLDER_LINES]
            raise StoreInUse(
                f"The store {path} is in use by process {pid or 'unknown'} on host {host or 'unknown'} "
                f"({command or 'command unknown'}). Stop that one first, or name another file in `store`."
            ) from None
        except OSError as error:
            raise OSError(error.errno, f"its file system has no locks: {error.strerror}", lock_path) from error
        _write_lock(descriptor, "\n".join(_read_lock(descriptor).split("\n")[_HOLDER_LINES:]))
    except OSError as error:
        os.close(descriptor)
        if error.filename is None:
            raise OSError(error.errno, error.strerror, lock_path) from error
        raise
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read_lock(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace")


def _write_lock(descriptor: int, store: str) -> None:
    """Say that this process holds it. In one write over what was there: no moment says that there was no store."""
    holder = (str(os.getpid()), os.uname().nodename, shlex.join(sys.argv).replace("\n", " ")[:200])
    content = "\n".join((*holder, store)).encode(errors="replace")
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
