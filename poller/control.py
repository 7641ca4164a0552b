"""Which mappings there should be: those that the config file declares and those made through the API.

config file --apply--+
                     +--> entries --> Supervisor.want / remove
mapping API ---------+        |
                              +--> store (API-made mappings; `Enabled` set through the API)
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import structlog

from poller.clock import system_random, wall_clock
from poller.core.model import MappingId, MappingStatus, SourceKind
from poller.errors import ApiError, StoreUnavailable
from poller.mappings import (
    build,
    check_create,
    check_update,
    describe,
    merge_update,
    normalize,
    parse_source,
    resolve_function,
)
from poller.ports import CheckpointStore
from poller.runtime.stream_runner import stream_key
from poller.runtime.supervisor import Supervisor, Wanted
from poller.settings import Declared, Settings

_log = structlog.get_logger(__name__)

_MADE = "mapping/"  # store keys: API-made mappings
_DELETED = "deleted/"  # API-made mappings whose positions are still to be deleted
_DYNAMODB_READERS = 2  # at once of one shard (semantics 3.1)
_TOGGLED = "enabled/"  # and `Enabled` of declared ones, set through the API
_GONE = ApiError("ResourceNotFoundException", 404, "The resource you requested does not exist.")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One mapping. `document` is normalized; `declared_in` the config file, None when made through the API.

    `modified`: epoch seconds of the wall clock, which is what AWS's LastModified is.
    """

    uuid: MappingId
    document: dict[str, Any]
    modified: float
    declared_in: str | None = None


class ControlPlane:
    """Implements `Control`. One for the process; `load` first."""

    def __init__(self, store: CheckpointStore, supervisor: Supervisor) -> None:
        self._store = store
        self._supervisor = supervisor
        self._settings = Settings(path="")
        self._entries: dict[MappingId, _Entry] = {}
        self._deleting: dict[MappingId, _Entry] = {}
        self._toggled: dict[MappingId, dict[str, bool]] = {}
        self._ids = system_random()
        self._is_stopping = False
        self._lock = asyncio.Lock()  # an operation checks, stores and applies as one; between them it awaits the store

    async def load(self, settings: Settings) -> None:
        """Start what the file declares and what the store keeps. StoreUnavailable."""
        for key in await self._store.documents(_DELETED):  # a stop came before their positions were gone
            uuid = key.removeprefix(_DELETED)
            await self._store.forget(uuid)
            await self._store.delete_document(stream_key(uuid))
            await self._store.delete_document(key)
        made = await self._store.documents(_MADE)
        self._toggled = {
            key.removeprefix(_TOGGLED): toggle for key, toggle in (await self._store.documents(_TOGGLED)).items()
        }
        for key, kept in made.items():
            uuid = key.removeprefix(_MADE)
            self._entries[uuid] = _Entry(uuid, kept["document"], kept["modified"])
        await self.apply(settings)

    async def apply(self, settings: Settings) -> None:
        """Follow a config file: only mappings that it changes are touched; one that it dropped keeps its positions."""
        async with self._lock:
            await self._apply(settings)

    async def _apply(self, settings: Settings) -> None:
        self._settings = settings
        declared = {item.uuid: item for item in settings.mappings}
        for entry in list(self._entries.values()):
            if entry.declared_in and entry.uuid not in declared:
                del self._entries[entry.uuid]
                self._supervisor.remove(entry.uuid, forget=False)
        for item in declared.values():
            self._declare(item, settings.path)
            toggle = self._toggled.get(item.uuid)
            if toggle and toggle["declared"] != item.document["Enabled"]:
                del self._toggled[item.uuid]  # the file has spoken since
                await self._untoggle(item.uuid)
        for entry in self._entries.values():
            self._want(entry)
        for uuid, twin in self._twins():
            _log.warning("mapping_duplicated", mapping=uuid, twin=twin, meaning="both read the same source")
        for arn, readers in self._crowded():
            _log.warning(
                "stream_crowded",
                source_arn=arn,
                readers=readers,
                meaning=f"DynamoDB throttles more than {_DYNAMODB_READERS} readers of a shard; read once and fan out",
            )

    def _declare(self, item: Declared, path: str) -> None:
        known = self._entries.get(item.uuid)
        entry = _Entry(item.uuid, item.document, known.modified if known else wall_clock(), path)
        if known and known.document != item.document:
            entry = replace(entry, modified=wall_clock())
            for name in ("StartingPosition", "StartingPositionTimestamp"):
                if known.document.get(name) != item.document.get(name):
                    _log.warning(
                        "starting_position_ignored",
                        mapping=item.uuid,
                        key=name,
                        meaning="the mapping has positions and goes on from them",
                    )
        self._entries[item.uuid] = entry

    def _want(self, entry: _Entry) -> None:
        document = {**entry.document, "Enabled": self._is_enabled(entry)}
        source = parse_source(document["EventSourceArn"])
        spec, function = resolve_function(document["FunctionName"], self._settings.functions, source)
        self._supervisor.want(Wanted(build(entry.uuid, document, spec, entry.declared_in), function))

    def _is_enabled(self, entry: _Entry) -> bool:
        """A toggle through the API lasts until the file's own `Enabled` changes."""
        toggle = self._toggled.get(entry.uuid) if entry.declared_in else None
        enabled: bool = toggle["enabled"] if toggle else entry.document["Enabled"]
        return enabled

    async def _untoggle(self, uuid: MappingId) -> None:
        try:
            await self._store.delete_document(_TOGGLED + uuid)
        except StoreUnavailable as error:  # the file is followed all the same; the next start may find the toggle
            _log.error("toggle_not_forgotten", mapping=uuid, error=str(error))

    def _twins(self) -> Iterator[tuple[MappingId, MappingId]]:
        seen: dict[tuple[str, str], MappingId] = {}
        for entry in self._entries.values():
            twin = seen.setdefault(self._identity(entry.document), entry.uuid)
            if twin != entry.uuid:
                yield entry.uuid, twin

    def _crowded(self) -> Iterator[tuple[str, int]]:
        """DynamoDB streams with more enabled mappings than its shards take readers."""
        readers = Counter(
            entry.document["EventSourceArn"] for entry in self._entries.values() if self._is_enabled(entry)
        )
        for arn, count in readers.items():
            if count > _DYNAMODB_READERS and parse_source(arn).kind is SourceKind.DYNAMODB:
                yield arn, count

    def _identity(self, document: Mapping[str, Any]) -> tuple[str, str]:
        """What there may be one mapping for: source ARN and function ARN with its qualifier."""
        source = parse_source(document["EventSourceArn"])
        spec, _ = resolve_function(document["FunctionName"], self._settings.functions, source)
        return source.arn, spec.arn

    # --- what the server asks

    def stopping(self) -> None:
        """From now on not ready: load balancers look elsewhere while in-flight work ends."""
        self._is_stopping = True

    def status(self) -> Sequence[MappingStatus]:
        """Every mapping, now."""
        return self._supervisor.status()

    def health(self) -> str | None:
        """None while every mapping has a living keeper, else the reason."""
        dead = self._supervisor.dead()
        return f"the task of mapping {', '.join(dead)} has died" if dead else None

    def unready(self) -> Sequence[str]:
        """What has not been reached since the start; empty when ready."""
        return ["the daemon is stopping"] if self._is_stopping else self._supervisor.unready()

    async def create(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """CreateEventSourceMapping. ApiError."""
        _refuse(check_create(document))
        normal = normalize(document)
        async with self._lock:
            self._refuse_duplicate(normal, None)
            uuid = str(UUID(int=self._ids.getrandbits(128), version=4))
            entry = _Entry(uuid, normal, wall_clock())
            await self._keep(entry)
            return self._describe(entry)

    def get(self, uuid: str) -> dict[str, Any]:
        """GetEventSourceMapping. ApiError."""
        return self._describe(self._find(uuid))

    def list(self) -> Sequence[dict[str, Any]]:
        """Every mapping: the file's in its order, then the API's as they were made."""
        self._forget_deleted()
        entries = [*self._entries.values(), *self._deleting.values()]
        return [self._describe(entry) for entry in sorted(entries, key=lambda entry: entry.declared_in is None)]

    async def update(self, uuid: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """UpdateEventSourceMapping. ApiError; a declared mapping may only be enabled and disabled."""
        async with self._lock:
            entry = self._find_live(uuid)
            shown = {**entry.document, "Enabled": self._is_enabled(entry)}
            _refuse(check_update(shown, changes))
            merged = merge_update(shown, changes)
            if entry.declared_in:
                await self._toggle(entry, merged, shown)
            else:
                self._refuse_duplicate(merged, uuid)
                entry = replace(entry, document=merged, modified=wall_clock())
                await self._keep(entry)
            return self._describe(entry)

    async def delete(self, uuid: str) -> dict[str, Any]:
        """DeleteEventSourceMapping: the mapping stops, then its positions are forgotten. ApiError."""
        async with self._lock:
            entry = self._find_live(uuid)
            if entry.declared_in:
                raise _declared(entry)
            # The document before the positions: with positions gone and the document not, a restart would deliver
            # everything again. The mark first of all: the next start finishes what this one does not get to.
            await self._store.put_document(_DELETED + uuid, {})
            await self._store.delete_document(_MADE + uuid)
            del self._entries[uuid]
            self._deleting[uuid] = entry
            self._supervisor.remove(uuid, forget=True)
            return self._describe(entry)

    # --- helpers

    async def _keep(self, entry: _Entry) -> None:
        await self._store.put_document(_MADE + entry.uuid, {"document": entry.document, "modified": entry.modified})
        self._entries[entry.uuid] = entry
        self._want(entry)

    async def _toggle(self, entry: _Entry, merged: dict[str, Any], shown: dict[str, Any]) -> None:
        if {**merged, "Enabled": None} != {**shown, "Enabled": None}:
            raise _declared(entry)
        toggle = {"enabled": merged["Enabled"], "declared": entry.document["Enabled"]}
        await self._store.put_document(_TOGGLED + entry.uuid, toggle)
        self._toggled[entry.uuid] = toggle
        self._want(entry)

    def _find(self, uuid: str) -> _Entry:
        self._forget_deleted()
        entry = self._entries.get(uuid) or self._deleting.get(uuid)
        if entry is None:
            raise _GONE
        return entry

    def _find_live(self, uuid: str) -> _Entry:
        entry = self._find(uuid)
        if uuid in self._deleting:
            text = "Cannot update the event source mapping because it is in use."
            raise ApiError("ResourceInUseException", 400, text)
        return entry

    def _forget_deleted(self) -> None:
        for uuid in list(self._deleting):
            if self._supervisor.state(uuid) is None:
                del self._deleting[uuid]

    def _refuse_duplicate(self, document: dict[str, Any], uuid: MappingId | None) -> None:
        """AWS's two texts (semantics 1.4), with the blanks inside the quotes that they have."""
        identity = self._identity(document)
        for entry in [*self._entries.values(), *self._deleting.values()]:
            if entry.uuid == uuid or self._identity(entry.document) != identity:
                continue
            names = f'(" {identity[0]} ") and function (" {document["FunctionName"]} ")'
            advice = f"already exists. Please update or delete the existing mapping with UUID {entry.uuid}"
            is_queue = parse_source(identity[0]).kind is SourceKind.SQS
            text = (
                f"An event source mapping with SQS arn {names} {advice}"
                if is_queue
                else f"The event source arn {names} provided mapping {advice}"
            )
            raise ApiError("ResourceConflictException", 409, text)

    def _describe(self, entry: _Entry) -> dict[str, Any]:
        source_arn, function_arn = self._identity(entry.document)
        is_queue = parse_source(source_arn).kind is SourceKind.SQS
        return describe(
            entry.document,
            entry.uuid,
            function_arn,
            self._supervisor.state(entry.uuid) or "Deleting",
            "USER_INITIATED" if is_queue else "User action",
            round(entry.modified, 3),
            None if is_queue else self._supervisor.last_result(entry.uuid),
        )


def _refuse(problems: Sequence[Any]) -> None:
    """AWS answers with the first problem."""
    for problem in problems:
        raise ApiError(problem.code, 400, problem.message)


def _declared(entry: _Entry) -> ApiError:
    text = (
        f"The event source mapping {entry.uuid} is declared in {entry.declared_in}. Change or remove it there; "
        "only Enabled can be changed through the API."
    )
    return ApiError("ResourceConflictException", 409, text)
