"""`poller checkpoints`: positions in the store of a stopped daemon, or of a mapping that is paused.

list, get, export --> look, whoever uses the store
set, reset, import -> store's lock --+-- free: no daemon runs, every owner in the rows is dead ---+
                                     +-- held: mapping disabled, and no shard of it has an owner -+-> leases -> change

A store in DynamoDB has no lock: it counts as free when no member beats for the duration of a lease.

The change is one step that asks for the leases: a daemon that took one meanwhile wins, and nothing is changed.
"""

import asyncio
import difflib
import os
import pwd
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from graphlib import CycleError, TopologicalSorter
from math import inf, isfinite
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import msgspec
import structlog

from poller.clock import SystemClock, wall_clock
from poller.control import known_mappings
from poller.core.model import Checkpoint, Lease, MappingId, Position, PositionKind, Row, ShardId, SourceKind
from poller.core.model import Mapping as RunnableMapping
from poller.errors import ConfigError, PollerError, StoreInUse
from poller.mappings import find_mapping
from poller.ports import CheckpointStore
from poller.runtime.stream_runner import seek_key, spelled, stream_key
from poller.settings import Settings, StoreSettings
from poller.stores import open_store
from poller.stores.memory import MemoryStore
from poller.telemetry import Metrics, configure_logging

_log = structlog.get_logger(__name__)

OWNER = "checkpoints"  # of the leases that a change takes, for as long as it lasts; a daemon is never called so
FORMAT, VERSION = "esm-poller checkpoints", 1
_UNKNOWN = "(no longer configured)"
_SEQUENCE = re.compile("[0-9]{1,128}")
_SHARD = re.compile("[a-zA-Z0-9_.-]{1,128}")
_MOST_LANES = 10  # ParallelizationFactor
_MOST_PARENTS = 2  # of a merge
_LOOK = 0.5  # seconds between two looks at who beats

_T = TypeVar("_T")


def is_sequence(text: str) -> bool:
    """A sequence number, as far as its form tells."""
    return _SEQUENCE.fullmatch(text) is not None


# --- the exported document ------------------------------------------------------------------------------------------


class _Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: PositionKind
    value: str = ""


class _Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`state`: the JSON text that the function gets back, byte for byte."""

    start: float
    state: str


class _Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row. Sequence numbers are texts everywhere: other programs' numbers do not have 56 digits."""

    shard: str
    position: _Place
    parents: tuple[str, ...] = ()
    resume: tuple[tuple[str, ...], ...] = ()
    window: _Window | None = None
    saved_at: float | None = None


class _Stream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which stream the positions are of; see `stream_key`."""

    arn: str
    incarnation: str


class _Exported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping. `function` and `source_arn` are empty when nothing knew the mapping any more."""

    mapping: str
    function: str
    source_arn: str
    stream: _Stream | None
    shards: tuple[_Shard, ...]


class _Head(msgspec.Struct, frozen=True):
    """What tells whether the rest can be read at all."""

    format: str = ""
    version: int = 0


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    exported_at: str
    mappings: tuple[_Exported, ...]


def _shard_of(row: Row) -> _Shard:
    checkpoint = row.checkpoint
    window = None
    if checkpoint.window:
        start, _, state = checkpoint.window.partition("\n")
        window = _Window(float(start), state)
    return _Shard(
        shard=row.shard,
        position=_Place(checkpoint.position.kind, checkpoint.position.value),
        parents=row.parents,
        resume=tuple(tuple(map(str, vector)) for vector in checkpoint.resume),
        window=window,
        saved_at=row.saved_at if isfinite(row.saved_at) else None,
    )


def _row_of(shard: _Shard, token: int) -> Row:
    """Only of a shard without mistakes. A moment that is still to come would hide what the stream has lost."""
    window = f"{shard.window.start!r}\n{shard.window.state}" if shard.window else ""
    resume = tuple(tuple(map(int, vector)) for vector in shard.resume)
    saved_at = inf if shard.saved_at is None else min(shard.saved_at, wall_clock())
    position = Position(shard.position.kind, shard.position.value)
    return Row(shard.shard, Checkpoint(position, resume, window), shard.parents, None, token, saved_at)


def _shard_mistakes(shard: _Shard, kind: SourceKind | None) -> Iterator[str]:
    """Each `key: what is wrong`. `kind` None: nobody knows the mapping."""
    if not _SHARD.fullmatch(shard.shard):
        yield f"shard: {shard.shard!r} is no shard id"
    place = shard.position
    match place.kind:
        case PositionKind.AT | PositionKind.AFTER if not is_sequence(place.value):
            yield f"position: {place.kind} needs a sequence number in digits, not {place.value!r}"
        case PositionKind.AT_TIMESTAMP | PositionKind.LATEST if not _is_moment(place.value):
            yield f"position: {place.kind} needs epoch seconds, not {place.value!r}"
        case PositionKind.AT_TIMESTAMP if kind is SourceKind.DYNAMODB:
            yield "position: DynamoDB Streams has no AT_TIMESTAMP"
        case PositionKind.TRIM_HORIZON | PositionKind.END if place.value:
            yield f"position: {place.kind} has no value"
        case _:
            pass
    for vector in shard.resume:
        if not 1 <= len(vector) <= _MOST_LANES or not all(map(is_sequence, vector)):
            yield f"resume: a list of lanes has 1 to {_MOST_LANES} sequence numbers in digits"
    if shard.window is not None and not (isfinite(shard.window.start) and _is_object(shard.window.state)):
        yield "window: it has a start in epoch seconds and a state, the text of a JSON object"
    if shard.saved_at is not None and not (isfinite(shard.saved_at) and shard.saved_at >= 0):
        yield f"saved_at: {shard.saved_at} is no moment in epoch seconds"
    if len(shard.parents) > _MOST_PARENTS or not all(map(_SHARD.fullmatch, shard.parents)):
        yield f"parents: a shard has at most {_MOST_PARENTS}, each a shard id"


def _is_moment(text: str) -> bool:
    try:
        at = float(text)
    except ValueError:
        return False
    return isfinite(at) and at >= 0


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def _read(text: str, place: str) -> _Document:
    """ConfigError: it is no document of ours, or of a version that this one cannot read."""
    try:
        head = msgspec.json.decode(text, type=_Head)
        if head.format != FORMAT:
            raise ConfigError(
                [f"{place}: this is not what `poller checkpoints export` wrote: format is not {FORMAT!r}"]
            )
        if head.version != VERSION:
            raise ConfigError([f"{place}: version: this poller reads version {VERSION}, not {head.version}"])
        return msgspec.json.decode(text, type=_Document)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError([f"{place}: this is not what `poller checkpoints export` wrote: {error}"]) from None


# --- what is shown and what has moved ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """One mapping with its rows. `mapping` None: neither the config file nor the API knows it any more.

    `stream`: the document that says which stream the rows are of. `is_sought`: a seek waits for the mapping to run.
    """

    id: MappingId
    mapping: RunnableMapping | None
    rows: Mapping[ShardId, Row]
    stream: Mapping[str, Any] | None
    is_sought: bool

    @property
    def function(self) -> str:
        """Its name; empty when it is not known."""
        return self.mapping.function.name if self.mapping else ""

    @property
    def is_queue(self) -> bool:
        """A queue has no positions."""
        return self.mapping is not None and not self.mapping.source.kind.is_stream

    @property
    def source_arn(self) -> str:
        """What it reads, or last read; empty when that is not known."""
        if self.mapping is not None:
            return self.mapping.source.arn
        return str(self.stream["arn"]) if self.stream else ""

    def describe(self) -> dict[str, Any]:
        """For programs: as it is exported, and who owns what."""
        document: dict[str, Any] = msgspec.to_builtins(self.export())
        document["shards"] = [describe(self.id, row) for row in self.rows.values()]
        state = None if self.mapping is None else self.mapping.enabled
        return {**document, "enabled": state, "seek_pending": self.is_sought}

    def export(self) -> _Exported:
        """PollerError: a row was edited into nonsense."""
        try:
            shards = tuple(map(_shard_of, self.rows.values()))
        except ValueError as error:
            raise PollerError(f"the rows of mapping {self.id} are damaged: {error}") from None
        stream = _Stream(self.stream["arn"], self.stream["incarnation"]) if self.stream else None
        return _Exported(self.id, self.function, self.source_arn, stream, shards)


def describe(mapping: MappingId, row: Row) -> dict[str, Any]:
    """A row for programs. PollerError: it was edited into nonsense."""
    try:
        shard = msgspec.to_builtins(_shard_of(row))
    except ValueError as error:
        raise PollerError(f"the row of mapping {mapping}, shard {row.shard} is damaged: {error}") from None
    return {"mapping": mapping, **shard, "owner": row.owner, "token": row.token}


@dataclass(frozen=True, slots=True)
class Move:
    """A position that has changed, or would. `was` None: there was none. `now` None: it is forgotten."""

    mapping: MappingId
    function: str
    shard: ShardId
    was: Checkpoint | None
    now: Checkpoint | None

    def texts(self) -> tuple[str, str]:
        """From where to where, for people."""
        return _text(self.was), _text(self.now)


def _text(checkpoint: Checkpoint | None) -> str:
    """A position, and what of its record of lanes and windows goes or comes with it."""
    if checkpoint is None:
        return "none"
    more = [name for name, held in (("lanes", checkpoint.resume), ("an open window", checkpoint.window)) if held]
    return spelled(checkpoint.position) + (f" with {' and '.join(more)}" if more else "")


def _user() -> str:
    """Who runs this, by the system's word and not by the environment's."""
    number = os.getuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"


# --- the store ------------------------------------------------------------------------------------------------------


class Checkpoints:
    """The positions in one store. `known`: the mappings of the config file and of the API. `has_daemon`: another
    process holds the store, so only what is paused may be changed.

    What is changed is told with an audit line for each shard, once it stands in the store.
    """

    def __init__(self, store: CheckpointStore, known: Iterable[RunnableMapping], *, has_daemon: bool) -> None:
        self._store = store
        self._known = {mapping.id: mapping for mapping in known}
        self._has_daemon = has_daemon

    # --- to look

    async def look(self, names: Sequence[str] = ()) -> list[Shown]:
        """These mappings, or all: of the file, of the API, then those that only have rows. PollerError: which are
        there.
        """
        ids = [*self._known, *(uuid for uuid in await self._store.mappings() if uuid not in self._known)]
        if names:
            there = [(uuid, self._known[uuid].function.name if uuid in self._known else _UNKNOWN) for uuid in ids]
            ids = list(dict.fromkeys(find_mapping(name, there) for name in names))
        return [await self._show(uuid) for uuid in ids]

    async def _show(self, uuid: MappingId) -> Shown:
        documents = await self._store.documents(stream_key(uuid))
        is_sought = bool(await self._store.document_keys(seek_key(uuid)))
        rows = await self._store.load(uuid)
        return Shown(uuid, self._known.get(uuid), rows, documents.get(stream_key(uuid)), is_sought)

    async def get(self, name: str, shard: ShardId) -> dict[str, Any]:
        """One row. PollerError: there is none."""
        shown = await self._stream(name)
        return describe(shown.id, _row(shown, shard))

    async def _stream(self, name: str) -> Shown:
        """One mapping that may have positions. PollerError."""
        [shown] = await self.look([name])
        if shown.is_queue:
            raise PollerError(f"mapping {shown.id} reads a queue, {shown.source_arn}: a queue has no positions")
        return shown

    async def export(self, names: Sequence[str] = ()) -> dict[str, Any]:
        """These mappings, or all that have rows, as a document for `restore`. PollerError: one of `names` has none."""
        if names:
            found = [await self._stream(name) for name in names]
            for shown in found:
                if not shown.rows:
                    raise PollerError(f"mapping {shown.id} has no positions yet")
        else:
            found = [shown for shown in await self.look() if shown.rows]
        mappings = tuple({shown.id: shown.export() for shown in found}.values())
        at = datetime.fromtimestamp(wall_clock(), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        document: dict[str, Any] = msgspec.to_builtins(_Document(FORMAT, VERSION, at, mappings))
        return document

    # --- to change

    async def move(self, name: str, shard: ShardId, to: Position, *, dry: bool = False) -> list[Move]:
        """Set one shard's position; what its lanes did ahead of it, and its tumbling window, are dropped. PollerError:
        why nothing was changed.
        """
        shown = await self._stream(name)
        row = _row(shown, shard)
        self._refuse_running(shown)
        if shown.is_sought:
            raise PollerError(
                f"a seek of mapping {shown.id} waits for it to run and would undo this; start it, so that the seek is "
                "carried out, or forget both with `poller checkpoints reset`"
            )
        now = Checkpoint(to)
        if not dry:
            [lease] = await self._acquire(shown.id, [row])
            if not await self._store.release(lease, now):
                raise _taken(shown.id)
        return self._moved([Move(shown.id, shown.function, shard, row.checkpoint, now)], dry=dry)

    async def reset(self, name: str, *, dry: bool = False) -> list[Move]:
        """Forget the rows of a mapping, which stream they are of, and the seeks that wait: it begins at its
        StartingPosition. PollerError: why nothing was changed.
        """
        shown = await self._stream(name)
        self._refuse_running(shown)
        if not dry:
            leases = await self._acquire(shown.id, shown.rows.values())
            orders = await self._store.document_keys(seek_key(shown.id))
            await self._put({shown.id: ()}, leases, dict.fromkeys([stream_key(shown.id), *orders]))
        moves = [Move(shown.id, shown.function, row.shard, row.checkpoint, None) for row in shown.rows.values()]
        return self._moved(moves, dry=dry)

    async def restore(
        self, text: str, place: str, *, overwrite: bool = False, force: bool = False, dry: bool = False
    ) -> list[Move]:
        """Put what `export` wrote into the store, all or nothing: a mapping has exactly its shards then.

        `overwrite`: positions that are there go. `force`: also of a mapping that nobody knows, or that reads something
        else now. `place` is what mistakes say of where the text comes from. ConfigError: every mistake. PollerError.
        """
        document = _read(text, place)
        shown = {each.mapping: await self._show(each.mapping) for each in document.mappings}
        mistakes = list(self._mistakes(document, shown, overwrite=overwrite, force=force))
        if mistakes:
            raise ConfigError([f"{place}: {mistake}" for mistake in mistakes])
        for each in shown.values():
            self._refuse_running(each)
        leases: list[Lease] = []
        if not dry:
            for each in shown.values():
                leases += await self._acquire(each.id, each.rows.values(), leases)
        tokens = {(lease.mapping, lease.shard): lease.token for lease in leases}
        rows: dict[MappingId, list[Row]] = {}
        documents: dict[str, Mapping[str, Any] | None] = {}
        for exported in document.mappings:
            uuid = exported.mapping
            rows[uuid] = [_row_of(shard, tokens.get((uuid, shard.shard), 0)) for shard in exported.shards]
            # They would move what was just put there.
            documents.update(dict.fromkeys(await self._store.document_keys(seek_key(uuid))))
            documents[stream_key(uuid)] = msgspec.to_builtins(exported.stream) if exported.stream else None
        if not dry:
            await self._put(rows, leases, documents)
        return self._moved([move for uuid in rows for move in _differences(shown[uuid], rows[uuid])], dry=dry)

    def _mistakes(
        self, document: _Document, there: Mapping[MappingId, Shown], *, overwrite: bool, force: bool
    ) -> Iterator[str]:
        """Each `where: what is wrong; what would be right`."""
        if not document.mappings:
            yield "mappings: there is none"
        seen: set[MappingId] = set()
        for number, exported in enumerate(document.mappings):
            where, uuid = f"mappings[{number}]", exported.mapping
            shown = there[uuid]
            if uuid in seen:
                yield f"{where}: mapping {uuid} stands here twice"
            seen.add(uuid)
            if not _is_uuid(uuid):
                yield f"{where}.mapping: {uuid!r} is no UUID in small letters"
            elif shown.is_queue:
                yield f"{where}: mapping {uuid} reads a queue, and a queue has no positions"
            elif shown.mapping is None and not force:
                yield f"{where}: neither the config file nor the API has a mapping {uuid}; --force imports it anyway"
            elif shown.mapping and exported.source_arn != shown.source_arn and not force:
                was = exported.source_arn or "an unknown source"
                text = f"these positions are of {was}, and mapping {uuid} reads {shown.source_arn}"
                yield f"{where}.source_arn: {text}; --force imports them anyway"
            if shown.rows and not overwrite:
                yield f"{where}: mapping {uuid} has {len(shown.rows)} positions already; --overwrite replaces them"
            yield from _shards_mistakes(where, exported.shards, shown.mapping.source.kind if shown.mapping else None)

    def _refuse_running(self, shown: Shown) -> None:
        """PollerError: a daemon works on the mapping, or may begin to at any moment."""
        if not self._has_daemon:
            return
        if shown.mapping is not None and shown.mapping.enabled:
            raise PollerError(
                f"a daemon uses the store, and mapping {shown.id} ({shown.function}) is not paused. Pause it first "
                f"(`poller pause {shown.id}`), stop the daemon, or use `poller seek`"
            )
        owned = [row.shard for row in shown.rows.values() if row.owner not in {None, OWNER}]
        if owned:
            raise PollerError(
                f"a daemon still works on {len(owned)} shards of mapping {shown.id}, such as {owned[0]}: wait until "
                "what is in flight has ended; `poller status` shows it"
            )

    async def _acquire(self, uuid: MappingId, rows: Iterable[Row], others: Sequence[Lease] = ()) -> list[Lease]:
        """The leases of all rows, else none, and `others` are given up too. PollerError: somebody was faster."""
        leases: list[Lease] = []
        for row in rows:
            lease = await self._store.acquire(uuid, row, OWNER)
            if lease is None:
                await self._give_up([*others, *leases])
                raise _taken(uuid)
            leases.append(lease)
        return leases

    async def _put(
        self,
        rows: Mapping[MappingId, Sequence[Row]],
        leases: Sequence[Lease],
        documents: Mapping[str, Mapping[str, Any] | None],
    ) -> None:
        if not await self._store.restore(rows, leases, documents):
            await self._give_up(leases)
            raise _taken(", ".join(rows))

    async def _give_up(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            await self._store.release(lease, None)

    def _moved(self, moves: list[Move], *, dry: bool) -> list[Move]:
        """The audit."""
        by = _user()
        for move in moves if not dry else ():
            was, now = move.texts()
            ids = {"mapping": move.mapping, "function": move.function, "shard": move.shard}
            _log.warning("position_moved", **ids, by=by, was=was, now=now)
        return moves


def _taken(uuid: MappingId) -> PollerError:
    return PollerError(f"a daemon took shards of mapping {uuid} in this moment; nothing was changed")


def _row(shown: Shown, shard: ShardId) -> Row:
    """PollerError: which shards there are."""
    if (row := shown.rows.get(shard)) is not None:
        return row
    if not shown.rows:
        raise PollerError(f"mapping {shown.id} has no positions yet: it has not found its shards")
    near = difflib.get_close_matches(shard, shown.rows, 3, 0.0)
    more = f", of {len(shown.rows)}" if len(shown.rows) > len(near) else ""
    raise PollerError(f"mapping {shown.id} has no shard {shard}; it has {', '.join(near)}{more}")


def _shards_mistakes(where: str, shards: Sequence[_Shard], kind: SourceKind | None) -> Iterator[str]:
    if not shards:
        yield f"{where}.shards: there is none; `poller checkpoints reset` forgets positions"
    for number, shard in enumerate(shards):
        for mistake in _shard_mistakes(shard, kind):
            yield f"{where}.shards[{number}].{mistake}"
    parents = {shard.shard: shard.parents for shard in shards}
    if len(parents) < len(shards):
        yield f"{where}.shards: a shard stands here twice"
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        yield f"{where}.shards: {' and '.join(dict.fromkeys(error.args[1]))} are parents of each other"


def _differences(was: Shown, rows: Sequence[Row]) -> Iterator[Move]:
    now = {row.shard: row.checkpoint for row in rows}
    before = {row.shard: row.checkpoint for row in was.rows.values()}
    for shard in sorted(before.keys() | now.keys()):
        if before.get(shard) != now.get(shard):
            yield Move(was.id, was.function, shard, before.get(shard), now.get(shard))


# --- how it is opened -----------------------------------------------------------------------------------------------


def run(
    settings: Settings, work: Callable[[Checkpoints], Awaitable[_T]], *, change: bool = False, make: bool | None = None
) -> _T:
    """What `work` answers, over the store of the config. `change`: take the store's lock, if nobody else has it.

    `make`: what to do when there is no store: None refuses, True makes it, False goes on as if it were empty.
    PollerError.
    """
    # Whatever level the config wants: the audit lines are seen, and what libraries have to say is not.
    configure_logging(replace(settings.log, level="warning"), settings.secrets())
    path = settings.store.path if isinstance(settings.store, StoreSettings) else ""
    is_there = not path or _is_there(path)
    if not is_there and make is None:
        raise PollerError(f"there is no store {path}; `poller run` makes it when it first starts")
    return asyncio.run(_run(settings, work, change=change, is_empty=not is_there and make is False))


def _is_there(path: str) -> bool:
    """Not to be seen is not absent: opening it says why."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


async def _run(settings: Settings, work: Callable[[Checkpoints], Awaitable[_T]], *, change: bool, is_empty: bool) -> _T:
    async with AsyncExitStack() as stack:
        has_daemon = False
        store: CheckpointStore = MemoryStore()
        if not is_empty:
            store, has_daemon = await _open(settings, stack, change=change)
        known = [mapping for mapping, _ in await known_mappings(settings, store)]
        return await work(Checkpoints(store, known, has_daemon=has_daemon))


async def _open(settings: Settings, stack: AsyncExitStack, *, change: bool) -> tuple[CheckpointStore, bool]:
    """The store, and whether another process may hold it. A look does not take the lock: a daemon that starts in that
    moment would find the store in use. A table is used by whoever is seen to beat.
    """
    observer = Metrics(SystemClock(asyncio.get_running_loop()), list).store_observer()
    if change and isinstance(settings.store, StoreSettings):
        with suppress(StoreInUse):
            return await open_store(settings, observer, stack), False
    store = await open_store(settings, observer, stack, exclusive=False)
    is_table = not isinstance(settings.store, StoreSettings)
    return store, not (change and is_table) or await _has_daemon(store, settings.lease_duration)


async def _has_daemon(store: CheckpointStore, duration: float) -> bool:
    """Does any member beat within the duration of a lease? A killed one stays in the table. One that starts right now
    is no danger: it, or the change, is too late for the leases.
    """
    before = {name: member.beat for name, member in (await store.members()).items()}
    end = asyncio.get_running_loop().time() + duration
    now = before
    while now and (left := end - asyncio.get_running_loop().time()) > 0:
        await asyncio.sleep(min(_LOOK, left))
        now = {name: member.beat for name, member in (await store.members()).items()}
        if any(before.get(name) != beat for name, beat in now.items()):
            return True
    return False
