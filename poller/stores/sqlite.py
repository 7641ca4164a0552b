"""Positions, leases and API-made mappings in one SQLite file.

How a request goes:

    caller (event loop)           writer (one thread)
    future, put in the queue ---> takes all that is queued: BEGIN, a savepoint per request, COMMIT with fsync
                             <--- one callback for the whole group, after the commit: futures are resolved

While a commit runs the next requests gather, so the cost of a commit (an fsync) is shared by all who wait for it.

The file must be on a local file system: SQLite's write-ahead log needs memory shared between processes, and over NFS
neither its locks nor ours (flock) can be trusted. Never give it two names by hard links.
"""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from math import isfinite
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, Self, TypeVar, TypeVarTuple

import structlog

from poller.core.model import Checkpoint, Lease, MappingId, Member, Row, ShardId, position_of, resume_of
from poller.errors import PollerError, StoreIncompatible, StoreInUse, StoreUnavailable
from poller.ports import StoreObserver
from poller.stores.sqlite_file import StoreFile, is_damage

_log = structlog.get_logger(__name__)

_LOOK_INTERVAL: Final = 1.0
"""Seconds without a request after which the file is looked at: is it still there, and does it work again?"""

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class SqliteStore:
    """`CheckpointStore` in a SQLite file. Made by `open`; used from one event loop; `close` when done.

    What a method has returned from survives `kill -9` and a loss of power (WAL, synchronous=FULL).
    A caller that is cancelled stops waiting; what it asked for is still done.
    After StoreUnavailable a change is there whole or not at all; `load` tells. The store works again by itself once
    the cause is gone, such as a full disk. A file that is removed or replaced is written anew (`sqlite_file`).
    """

    problem = ""
    """Why nothing can be written, from the first commit that failed to the next one that wrote something."""

    def __init__(self, file: StoreFile, observer: StoreObserver, loop: asyncio.AbstractEventLoop) -> None:
        """Use `open`."""
        self._file = file
        self._observer = observer
        self._loop = loop
        self._queue: SimpleQueue[_Request | None] = SimpleQueue()  # None: close; always the last
        self._ended: asyncio.Future[None] | None = None  # set by the first `close`
        # A daemon thread: a process that dies of an error must not wait for a store that nobody closes.
        self._thread = threading.Thread(target=self._write, name="sqlite-store", daemon=True)

    @classmethod
    async def open(cls, path: str, observer: StoreObserver, *, exclusive: bool = True) -> Self:
        """The store in this file, made or brought to our version if need be.

        `exclusive`: hold a lock beside the file (`PATH-lock`) until `close` or the end of the process, however it
        ends. Without it nothing is made or changed in version: for a look at the store of a running daemon.
        StoreInUse: another process holds that lock. StoreIncompatible: not a store that this version reads.
        StoreUnavailable: the file cannot be reached or written; the text says why.
        """
        loop = asyncio.get_running_loop()
        store = cls(StoreFile(path, exclusive=exclusive), observer, loop)
        opened: asyncio.Future[None] = loop.create_future()
        store._queue.put(_Request("open", _nothing, (), opened))
        store._thread.start()
        try:
            await opened
        except BaseException:
            # Refused, or cancelled while the thread was at it: either way it lets go of the file.
            await store.close()
            raise
        return store

    @property
    def lock(self) -> int | None:
        """The descriptor of the lock, None without one. A process that inherits it holds the lock too until it ends."""
        return self._file.lock

    async def create(self, mapping: MappingId, rows: Sequence[Row]) -> None:
        """Put each row that is absent; rows that exist stay as they are. All or none."""
        await self._ask("create", _create, mapping, tuple(rows))

    async def load(self, mapping: MappingId) -> dict[ShardId, Row]:
        """Every row of a mapping, by shard id. StoreUnavailable also names a row that was edited into nonsense."""
        return await self._ask("load", _load, mapping)

    async def acquire(self, mapping: MappingId, row: Row, owner: str) -> Lease | None:
        """Take the lease if the stored (owner, token) is still the row's; token + 1. None: somebody was faster."""
        return await self._ask("acquire", _acquire, mapping, row, owner)

    async def save(self, changes: Sequence[tuple[Lease, Checkpoint]]) -> Sequence[Lease]:
        """Write checkpoints in one commit; answers the leases that are no longer held (not written)."""
        return await self._ask("save", _save, tuple(changes))

    async def release(self, lease: Lease, checkpoint: Checkpoint | None, to: str | None = None) -> bool:
        """Write the last checkpoint, if any, and give the lease up, or hand it over, in one step. False: it was no
        longer held.
        """
        return await self._ask("release", _release, lease, checkpoint, to)

    async def request(self, mapping: MappingId, row: Row, member: str) -> bool:
        """Ask the owner to hand the shard over to `member`. False: (owner, token) is no longer the row's."""
        return await self._ask("request", _request, mapping, row, member)

    async def beat(self, member: Member) -> None:
        """Write what a member says of itself. TypeError, ValueError: its `info` is not JSON."""
        info = json.dumps(dict(member.info), allow_nan=False)
        await self._ask("beat", _beat, member.id, member.beat, info)

    async def members(self) -> dict[str, Member]:
        """Every member that has not left, by id."""
        return await self._ask("members", _members)

    async def leave(self, member: str) -> None:
        """Forget a member; absent is fine."""
        await self._ask("leave", _leave, member)

    async def forget(self, mapping: MappingId, shards: Sequence[ShardId] | None = None) -> None:
        """Delete the rows of a mapping, or of some of its shards."""
        await self._ask("forget", _forget, mapping, None if shards is None else tuple(shards))

    async def mappings(self) -> Sequence[MappingId]:
        """Every mapping that has rows, in order."""
        return await self._ask("mappings", _mappings)

    async def restore(
        self,
        rows: Mapping[MappingId, Sequence[Row]],
        leases: Sequence[Lease],
        documents: Mapping[str, Mapping[str, Any] | None],
    ) -> bool:
        """Put these rows in place of all that these mappings have, and documents (None: deleted), all or none; a row's
        `saved_at` is kept, inf means now. False, nothing done: `leases` are not all their rows, or one is lost.
        """
        texts = {
            key: None if document is None else json.dumps(document, allow_nan=False)
            for key, document in documents.items()
        }
        put = {mapping: tuple(found) for mapping, found in rows.items()}
        return await self._ask("restore", _restore, put, tuple(leases), texts)

    async def put_document(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep a JSON document under a key. TypeError, ValueError: it is not JSON."""
        await self._ask("put_document", _put_document, key, json.dumps(document, allow_nan=False))

    async def delete_document(self, key: str) -> None:
        """Forget a document; absent is fine."""
        await self._ask("delete_document", _delete_document, key)

    async def documents(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Every document whose key starts with the prefix, by key."""
        return await self._ask("documents", _documents, prefix)

    async def document_keys(self, prefix: str) -> Sequence[str]:
        """Every key that starts with the prefix, in order."""
        return await self._ask("document_keys", _document_keys, prefix)

    async def prune_documents(self, prefix: str, keep: int) -> None:
        """Delete all but the last `keep` documents, in the order of their keys, whose key starts with the prefix."""
        await self._ask("prune_documents", _prune_documents, prefix, keep)

    async def close(self) -> None:
        """Finish what was asked, close the file, free the lock. Again is fine. Later requests: StoreUnavailable."""
        if self._ended is None:
            self._ended = self._loop.create_future()
            self._queue.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()  # at its last line by now

    async def _ask(self, operation: str, run: Callable[[sqlite3.Connection, *_Ts], _T], *arguments: *_Ts) -> _T:
        """What `run` answers in the writer, once it is committed."""
        if self._ended is not None:
            self._observer.requested(operation, "error")
            raise StoreUnavailable(f"The store {self._file.path} is closed.")
        answer: asyncio.Future[_T] = self._loop.create_future()
        self._queue.put(_Request(operation, run, arguments, answer))
        return await answer

    def _write(self) -> None:
        """The writer thread."""
        last = False
        while not last:
            try:
                group = [self._queue.get(timeout=_LOOK_INTERVAL)]
            except Empty:
                if self.problem or self._file.has_changed():
                    self._call(self._answer, self._commit([_Request("probe", _probe, (), None)]))
                continue
            with suppress(Empty):
                while True:
                    group.append(self._queue.get_nowait())
            requests = [request for request in group if request is not None]
            last = len(requests) < len(group)
            # What was done goes along as an argument. A closure over a name of this loop would see the next group's,
            # and the callers of this one would wait for ever.
            if requests:
                self._call(self._answer, self._commit(requests))
        self._file.close()
        self._call(self._end)

    def _commit(self, requests: "Sequence[_Request]") -> "_Group":
        """Run them in one transaction; the answers stand once this returns.

        A request that fails by itself is undone alone. What fails the transaction (disk, lock) fails them all.
        """
        is_new = self._file.is_new
        try:
            connection = self._file.begin()
            before = connection.total_changes
            answers = [self._run(connection, request) for request in requests]
            has_written = connection.total_changes != before or requests[0].run is _probe
            connection.execute("COMMIT")
        except (sqlite3.Error, OSError, MemoryError, StoreInUse, StoreIncompatible, StoreUnavailable) as error:
            self._file.give_up(error)
            kind = type(error) if isinstance(error, PollerError) and is_new else StoreUnavailable
            text = self._file.sentence(error)
            return _Group([_Answer(request, None, kind(text)) for request in requests], None if is_new else text)
        return _Group(answers, "" if has_written else None)

    def _run(self, connection: sqlite3.Connection, request: "_Request") -> "_Answer":
        """One request of a group, undone alone when it fails. What ended the whole transaction is raised."""
        connection.execute("SAVEPOINT request")
        try:
            answer = _Answer(request, request.run(connection, *request.arguments), None)
        except Exception as error:
            # Not handled here: raised where it was asked for. A thread that died of it would leave all callers waiting.
            if not connection.in_transaction or is_damage(error):
                raise  # SQLite has undone the whole group, as it does when a disk is full; or nothing can be trusted
            connection.execute("ROLLBACK TO request")
            is_ours = isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
            answer = _Answer(request, None, StoreUnavailable(self._file.sentence(error)) if is_ours else error)
        connection.execute("RELEASE request")
        return answer

    def _call(self, function: Callable[[*_Ts], None], *arguments: *_Ts) -> None:
        """Run it on the event loop, if that still runs: without it nobody waits for an answer."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _answer(self, group: "_Group") -> None:
        for request, result, error in group.answers:
            if request.answer is not None and not request.answer.done():  # else its caller was cancelled
                if error is None:
                    request.answer.set_result(result)
                else:
                    request.answer.set_exception(error)
            self._observer.requested(request.operation, "success" if error is None else "error")
        if group.problem and not self.problem:
            _log.error("store_failing", error=group.problem, meaning="positions stay in memory until it works again")
        elif group.problem == "" and self.problem:
            _log.warning("store_works_again", path=self._file.path)
        if group.problem is not None:
            self.problem = group.problem

    def _end(self) -> None:
        assert self._ended is not None
        self._ended.set_result(None)


class _Request(NamedTuple):
    """One call: `run(connection, *arguments)` inside the group's transaction, its result to `answer`, if any."""

    operation: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    answer: asyncio.Future[Any] | None


class _Answer(NamedTuple):
    """What became of a request: its result, or the error to raise where it was asked."""

    request: _Request
    result: Any
    error: Exception | None


class _Group(NamedTuple):
    """What became of a transaction. `problem`: why nothing can be written; empty: something was; None: nobody knows."""

    answers: Sequence[_Answer]
    problem: str | None


def _nothing(_: sqlite3.Connection) -> None:
    """To open the file is all that is asked."""


def _probe(connection: sqlite3.Connection) -> None:
    """A write that changes nothing."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.execute(f"PRAGMA user_version = {version}")


def _create(connection: sqlite3.Connection, mapping: MappingId, rows: Sequence[Row]) -> None:
    connection.executemany(
        """
        INSERT INTO shards (
            position_kind, position_value, resume, tumbling, mapping, shard, owner, token, parents, wanted_by,
            updated_at
        ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, CURRENT_TIMESTAMP) ON CONFLICT (mapping, shard) DO NOTHING
        """,
        [_values(mapping, row) for row in rows],
    )


def _load(connection: sqlite3.Connection, mapping: MappingId) -> dict[ShardId, Row]:
    found = connection.execute(
        """
        SELECT shard, position_kind, position_value, resume, tumbling, owner, token, parents,
            CAST(strftime('%s', updated_at) AS REAL), wanted_by FROM shards
        WHERE mapping = ? ORDER BY shard
        """,
        (mapping,),
    )
    rows = {}
    for shard, kind, value, resume, tumbling, owner, token, parents, saved_at, wanted_by in found:
        try:
            checkpoint = Checkpoint(position_of(kind, value), resume_of(resume), tumbling)
            rows[shard] = Row(shard, checkpoint, _parents(parents), owner, token, saved_at or 0.0, wanted_by)
        except (TypeError, ValueError) as error:
            raise StoreUnavailable(
                f"The store's row of mapping {mapping}, shard {shard} is damaged: {error}."
            ) from error
    return rows


def _parents(text: str) -> tuple[ShardId, ...]:
    """ValueError, TypeError: somebody edited it."""
    try:
        parents = json.loads(text)
    except RecursionError:
        parents = None
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError("its parents are no list of shards")
    return tuple(parents)


def _acquire(connection: sqlite3.Connection, mapping: MappingId, row: Row, owner: str) -> Lease | None:
    taken = connection.execute(
        """
        UPDATE shards SET owner = ?, token = token + 1, wanted_by = NULL  -- updated_at: when the position was written
        WHERE mapping = ? AND shard = ? AND owner IS ? AND token = ?
        """,
        (owner, mapping, row.shard, row.owner, row.token),
    )
    lease = Lease(mapping, row.shard, owner, row.token + 1)
    return lease if taken.rowcount or _is_held(connection, lease) else None  # held already when this is a repeat


def _save(connection: sqlite3.Connection, changes: Sequence[tuple[Lease, Checkpoint]]) -> Sequence[Lease]:
    # The owner counts too: release keeps the token, and a released lease may not write.
    saved = connection.executemany(
        """
        UPDATE shards
        SET position_kind = ?, position_value = ?, resume = ?, tumbling = ?, updated_at = CURRENT_TIMESTAMP
        WHERE mapping = ? AND shard = ? AND owner = ? AND token = ?
        """,
        [
            (*_columns(checkpoint), lease.mapping, lease.shard, lease.owner, lease.token)
            for lease, checkpoint in changes
        ],
    )
    if saved.rowcount == len(changes):
        return ()
    return tuple(lease for lease, _ in changes if not _is_held(connection, lease))


def _is_held(connection: sqlite3.Connection, lease: Lease) -> bool:
    found = connection.execute(
        "SELECT 1 FROM shards WHERE mapping = ? AND shard = ? AND owner = ? AND token = ?",
        (lease.mapping, lease.shard, lease.owner, lease.token),
    )
    return found.fetchone() is not None


def _release(connection: sqlite3.Connection, lease: Lease, checkpoint: Checkpoint | None, to: str | None) -> bool:
    key = (lease.mapping, lease.shard)
    token = lease.token + (to is not None)
    columns = (None, None, None, None) if checkpoint is None else _columns(checkpoint)
    released = connection.execute(
        """
        UPDATE shards SET position_kind = COALESCE(?1, position_kind), position_value = COALESCE(?2, position_value),
            resume = COALESCE(?3, resume), tumbling = COALESCE(?4, tumbling), owner = ?5, token = ?6, wanted_by = NULL,
            updated_at = CASE WHEN ?1 IS NULL THEN updated_at ELSE CURRENT_TIMESTAMP END
        WHERE mapping = ?7 AND shard = ?8 AND owner = ?9 AND token = ?10
        """,
        (*columns, to, token, *key, lease.owner, lease.token),
    )
    if released.rowcount:
        return True
    done = connection.execute(  # when this is a repeat
        """
        SELECT 1 FROM shards WHERE position_kind = COALESCE(?1, position_kind)
            AND position_value = COALESCE(?2, position_value) AND resume = COALESCE(?3, resume)
            AND tumbling = COALESCE(?4, tumbling) AND owner IS ?5 AND token = ?6 AND mapping = ?7 AND shard = ?8
        """,
        (*columns, to, token, *key),
    )
    return done.fetchone() is not None


def _request(connection: sqlite3.Connection, mapping: MappingId, row: Row, member: str) -> bool:
    asked = connection.execute(
        "UPDATE shards SET wanted_by = ? WHERE mapping = ? AND shard = ? AND owner IS ? AND token = ?",
        (member, mapping, row.shard, row.owner, row.token),
    )
    return asked.rowcount > 0


def _beat(connection: sqlite3.Connection, member_id: str, beat: int, info: str) -> None:
    connection.execute(
        """
        INSERT INTO members (id, beat, info, updated_at) VALUES (?, ?, ?, CURRENT_TIMESTAMP)
        ON CONFLICT (id) DO UPDATE SET beat = excluded.beat, info = excluded.info, updated_at = excluded.updated_at
        """,
        (member_id, beat, info),
    )


def _members(connection: sqlite3.Connection) -> dict[str, Member]:
    found = connection.execute("SELECT id, beat, info FROM members ORDER BY id")
    return {name: Member(name, beat, _parsed("member", name, info)) for name, beat, info in found}


def _leave(connection: sqlite3.Connection, member_id: str) -> None:
    connection.execute("DELETE FROM members WHERE id = ?", (member_id,))


def _forget(connection: sqlite3.Connection, mapping: MappingId, shards: Sequence[ShardId] | None) -> None:
    if shards is None:
        connection.execute("DELETE FROM shards WHERE mapping = ?", (mapping,))
    else:
        connection.executemany(
            "DELETE FROM shards WHERE mapping = ? AND shard = ?", [(mapping, shard) for shard in shards]
        )


def _mappings(connection: sqlite3.Connection) -> list[MappingId]:
    return [mapping for (mapping,) in connection.execute("SELECT DISTINCT mapping FROM shards ORDER BY mapping")]


def _restore(
    connection: sqlite3.Connection,
    rows: Mapping[MappingId, Sequence[Row]],
    leases: Sequence[Lease],
    texts: Mapping[str, str | None],
) -> bool:
    found = {
        Lease(mapping, *held)
        for mapping in rows
        for held in connection.execute("SELECT shard, owner, token FROM shards WHERE mapping = ?", (mapping,))
    }
    if found != set(leases):
        return False
    for mapping, put in rows.items():
        _forget(connection, mapping, None)
        connection.executemany(
            """
            INSERT INTO shards (
                position_kind, position_value, resume, tumbling, mapping, shard, owner, token, parents, wanted_by,
                updated_at
            ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, COALESCE(datetime(?, 'unixepoch'), CURRENT_TIMESTAMP))
            """,
            [(*_values(mapping, row), row.saved_at if isfinite(row.saved_at) else None) for row in put],
        )
    for key, text in texts.items():
        if text is None:
            _delete_document(connection, key)
        else:
            _put_document(connection, key, text)
    return True


def _put_document(connection: sqlite3.Connection, key: str, text: str) -> None:
    connection.execute(
        """
        INSERT INTO documents (key, document, updated_at) VALUES (?, ?, CURRENT_TIMESTAMP)
        ON CONFLICT (key) DO UPDATE SET document = excluded.document, updated_at = excluded.updated_at
        """,
        (key, text),
    )


def _delete_document(connection: sqlite3.Connection, key: str) -> None:
    connection.execute("DELETE FROM documents WHERE key = ?", (key,))


def _documents(connection: sqlite3.Connection, prefix: str) -> dict[str, dict[str, Any]]:
    # SQLite orders text as Python does, so the keys with a prefix are one run that begins at it: no LIKE, whose
    # wildcards may stand in a key.
    found = {}
    for key, text in connection.execute("SELECT key, document FROM documents WHERE key >= ? ORDER BY key", (prefix,)):
        if not key.startswith(prefix):
            break
        found[key] = _parsed("document", key, text)
    return found


def _parsed(what: str, name: str, text: str) -> dict[str, Any]:
    """StoreUnavailable: somebody edited it into something else than a JSON object."""
    try:
        document = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreUnavailable(f"The store's {what} {name} is damaged: {error}.") from error
    if not isinstance(document, dict):
        raise StoreUnavailable(f"The store's {what} {name} is damaged: it is no JSON object.")
    return document


def _document_keys(connection: sqlite3.Connection, prefix: str) -> list[str]:
    rows = connection.execute("SELECT key FROM documents WHERE key >= ? ORDER BY key", (prefix,))
    return [key for (key,) in takewhile(lambda row: row[0].startswith(prefix), rows)]


def _prune_documents(connection: sqlite3.Connection, prefix: str, keep: int) -> None:
    found = _document_keys(connection, prefix)
    connection.executemany(
        "DELETE FROM documents WHERE key = ?", [(key,) for key in found[: max(0, len(found) - keep)]]
    )


def _values(mapping: MappingId, row: Row) -> tuple[Any, ...]:
    """A row's columns, but for `updated_at`, in the order of the INSERT statements."""
    parents = json.dumps(row.parents)
    return (*_columns(row.checkpoint), mapping, row.shard, row.owner, row.token, parents, row.wanted_by)


def _columns(checkpoint: Checkpoint) -> tuple[str, str, str, str]:
    """position_kind, position_value, resume and tumbling."""
    position = checkpoint.position
    resume = json.dumps(checkpoint.resume) if checkpoint.resume else "[]"
    return position.kind.value, position.value, resume, checkpoint.window
