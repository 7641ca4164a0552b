"""Which mappings there should be: those that the config file declares and those made through the API.

config file --apply--+
                     +--> entries --> Supervisor.want / remove
mapping API ---------+        |
                              +--> store (API-made mappings; `Enabled` set through the API)
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import structlog

from poller.clock import system_random, wall_clock
from poller.core.model import Mapping as RunnableMapping
from poller.core.model import MappingId, MappingStatus, PositionKind, SourceKind
from poller.errors import ApiError, PollerError, StoreUnavailable
from poller.mappings import (
    MAX_TAGS,
    TOO_MANY_TAGS,
    check_create,
    check_tags,
    check_update,
    describe,
    find_mapping,
    merge_update,
    normalize,
    parse_source,
    resolve,
    resolve_function,
    source_of,
)
from poller.ports import CheckpointStore, Probe
from poller.runtime.stream_runner import SEEK, seek_key, stream_key
from poller.runtime.supervisor import Supervisor, Wanted
from poller.settings import Declared, FunctionSettings, LambdaFunction, Settings

_log = structlog.get_logger(__name__)

_MADE = "mapping/"  # store keys: API-made mappings
_DELETED = "deleted/"  # API-made mappings whose positions are still to be deleted
_DYNAMODB_READERS = 2  # at once of one shard (semantics 3.1)
CONFIG = "config/newest"
"""Document: what the config file of the fleet that was written last declares."""
_TOGGLED = "enabled/"  # and `Enabled` of declared ones, set through the API
_TAGGABLE = re.compile(
    r"arn:aws[a-zA-Z-]*:lambda:[a-z0-9-]+:[0-9]{12}:"
    r"(function:[a-zA-Z0-9-_]+(?::(?:\$LATEST|[a-zA-Z0-9-_]+))?|"
    r"event-source-mapping:([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}))"
)
_SEQUENCE = re.compile("[0-9]{1,128}")
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


async def made_mappings(store: CheckpointStore) -> dict[MappingId, dict[str, Any]]:
    """What was made through the API: `{document, modified}` of each. StoreUnavailable."""
    return {key.removeprefix(_MADE): kept for key, kept in (await store.documents(_MADE)).items()}


async def known_mappings(
    settings: Settings, store: CheckpointStore | None
) -> list[tuple[RunnableMapping, FunctionSettings]]:
    """The mappings of the config file, then those made through the API; `enabled` as either of them last said.

    For the verbs: the daemon has a ControlPlane. Without a store the file alone. StoreUnavailable.
    """
    toggled = await store.documents(_TOGGLED) if store else {}
    found = []
    for item in settings.mappings:
        document, toggle = item.document, toggled.get(_TOGGLED + item.uuid)
        if toggle and toggle["declared"] == document["Enabled"]:  # else the file has spoken since
            document = {**document, "Enabled": toggle["enabled"]}
        found.append(resolve(item.uuid, document, settings.functions, settings.path))
    made = await made_mappings(store) if store else {}
    for uuid, kept in made.items():
        with suppress(ValueError):  # its function was taken out of the config
            found.append(resolve(uuid, kept["document"], settings.functions, None))
    return found


class ControlPlane:
    """Implements `Control`. One for the process; `load` first."""

    def __init__(self, store: CheckpointStore, supervisor: Supervisor, probe: Probe, *, is_alone: bool = True) -> None:
        """`is_alone`: nobody else uses the store; else call `follow` now and then."""
        self._is_alone = is_alone
        self._adopted: dict[MappingId, dict[str, Any]] = {}  # declared otherwise by another member's newer file
        self._store = store
        self._probe = probe
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
        for key in await self._store.document_keys(_DELETED):  # a stop came before their positions were gone
            uuid = key.removeprefix(_DELETED)
            if any(row.owner for row in (await self._store.load(uuid)).values()) and not self._is_alone:
                continue  # other members still let go of it; another start finishes it
            await self._store.forget(uuid)
            await self._store.delete_document(_MADE + uuid)
            await self._store.delete_document(stream_key(uuid))
            for order in await self._store.document_keys(seek_key(uuid)):
                await self._store.delete_document(order)
            await self._store.delete_document(key)
        self._toggled = {
            key.removeprefix(_TOGGLED): toggle for key, toggle in (await self._store.documents(_TOGGLED)).items()
        }
        for uuid, kept in (await made_mappings(self._store)).items():
            self._entries[uuid] = _Entry(uuid, kept["document"], kept["modified"])
        await self.apply(settings)
        for key in await self._store.document_keys(SEEK):
            self._supervisor.seek(key.split("/")[1])

    async def follow(self) -> None:
        """What other members of the fleet were told: mappings made, changed and deleted there, switched on and off, and
        newer config files. StoreUnavailable.
        """
        async with self._lock:
            made, deleted = await made_mappings(self._store), await self._store.document_keys(_DELETED)
            toggled = await self._store.documents(_TOGGLED)
            self._toggled = {key.removeprefix(_TOGGLED): toggle for key, toggle in toggled.items()}
            for uuid, kept in made.items():
                known = self._entries.get(uuid)
                if _DELETED + uuid not in deleted and (known is None or known.document != kept["document"]):
                    self._entries[uuid] = _Entry(uuid, kept["document"], kept["modified"])
            for entry in [entry for entry in self._entries.values() if not entry.declared_in]:
                if entry.uuid not in made or _DELETED + entry.uuid in deleted:
                    del self._entries[entry.uuid]
                    self._supervisor.remove(entry.uuid, forget=False)  # whoever was told to delete it does that
            await self._agree()
            for entry in self._entries.values():
                self._want(entry)

    async def _agree(self) -> None:
        """Config files of a fleet differ while a new one is rolled out. The one that was written last counts: where it
        declares a mapping otherwise than ours, we run it as it says, as long as we know the function that it names.
        """
        mine = {item.uuid: item.document for item in self._settings.mappings}
        at = self._settings.stamp[0] if self._settings.stamp else 0
        ours: dict[str, Any] = {"at": at, "mappings": mine, "functions": sorted(self._settings.functions)}
        newest = (await self._store.documents(CONFIG)).get(CONFIG)
        if newest is None or newest["at"] < at:
            await self._store.put_document(CONFIG, ours)
            newest = ours
        adopted = {}
        if newest["at"] > at:
            named = set(newest["functions"]) - set(self._settings.functions)
            for uuid, document in newest["mappings"].items():
                if uuid in mine and document != mine[uuid]:
                    if self._identity(document)[1].split(":")[6] in named:
                        _log.error(
                            "config_differs", mapping=uuid, meaning="a newer file names a function not known here"
                        )
                    else:
                        adopted[uuid] = document
        if adopted.keys() != self._adopted.keys():
            _log.warning(
                "config_differs",
                config=self._settings.path,
                mappings=sorted(adopted),
                meaning="another member has a newer file; these mappings run as it says"
                if adopted
                else "it agrees again",
            )
        self._adopted = adopted

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
        document = self._adopted.get(entry.uuid, entry.document) if entry.declared_in else entry.document
        document = {**document, "Enabled": self._is_enabled(entry)}
        self._supervisor.want(Wanted(*resolve(entry.uuid, document, self._settings.functions, entry.declared_in)))

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
        """What has not been reached since the start, and a store that fails; empty when ready."""
        if self._is_stopping:
            return ["the daemon is stopping"]
        failing = [f"positions cannot be saved: {problem}"] if (problem := self._store.problem) else []
        return [*failing, *self._supervisor.unready()]

    def store_problem(self) -> str:
        """Why positions cannot be saved now; empty while they can."""
        return self._store.problem

    async def create(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """CreateEventSourceMapping. ApiError."""
        _refuse(check_create(document))
        normal = normalize(document)
        await self._check_function(normal)
        await self._probe.source(source_of(normal))
        async with self._lock:
            self._refuse_duplicate(normal, None)
            uuid = str(UUID(int=self._ids.getrandbits(128), version=4))
            entry = _Entry(uuid, normal, wall_clock())
            await self._keep(entry)
            answer = self._describe(entry)
            if not normal["Enabled"] and not parse_source(normal["EventSourceArn"]).kind.is_stream:
                answer["State"] = "Disabled"  # at once, as AWS answers; a stream's mapping is Creating first
            return answer

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
        shown, merged = self._merged(self._find_live(uuid), changes)
        if merged["FunctionName"] != shown["FunctionName"]:
            await self._check_function(merged)  # without the lock: AWS may take its time
        async with self._lock:
            entry = self._find_live(uuid)
            shown, merged = self._merged(entry, changes)
            if entry.declared_in:
                await self._toggle(entry, merged, shown)
            else:
                self._refuse_duplicate(merged, uuid)
                entry = replace(entry, document=merged, modified=wall_clock())
                await self._keep(entry)
            return self._describe(entry)

    def _merged(self, entry: _Entry, changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A mapping as it is and as it would be. ApiError."""
        shown = {**entry.document, "Enabled": self._is_enabled(entry)}
        _refuse(check_update(shown, changes))
        return shown, merge_update(shown, changes)

    async def delete(self, uuid: str) -> dict[str, Any]:
        """DeleteEventSourceMapping: the mapping stops, then its positions are forgotten. ApiError."""
        async with self._lock:
            entry = self._find_live(uuid)
            if entry.declared_in:
                raise _declared(entry)
            # The mark is the delete: the next start finishes what this one does not get to, the document first. With
            # positions gone and the document not, it would deliver everything again.
            await self._store.put_document(_DELETED + uuid, {})
            try:
                await self._store.delete_document(_MADE + uuid)
            except StoreUnavailable as error:
                _log.warning("delete_unfinished", mapping=uuid, error=str(error), meaning="the next start finishes it")
            del self._entries[uuid]
            self._deleting[uuid] = entry
            self._supervisor.remove(uuid, forget=True)
            return self._describe(entry)

    # --- tags: kept with the mapping's document, shown by ListTags only

    def tags(self, arn: str) -> dict[str, str]:
        """See `Control.tags`. Those of a declared mapping are the file's."""
        return dict(self._tagged(arn).document.get("Tags", {}))

    async def tag(self, arn: str, tags: Any) -> None:
        """See `Control.tag`."""
        _refuse(check_tags(tags))
        async with self._lock:
            merged = self.tags(arn) | tags
            if len(merged) > MAX_TAGS:
                raise _invalid(TOO_MANY_TAGS)
            await self._retag(arn, merged)

    async def untag(self, arn: str, keys: Sequence[str]) -> None:
        """See `Control.untag`."""
        if not keys:
            text = "Value null at 'tagKeys' failed to satisfy constraint: Member must not be null"
            raise ApiError("ValidationException", 400, f"1 validation error detected: {text}")
        async with self._lock:
            await self._retag(arn, {key: value for key, value in self.tags(arn).items() if key not in keys})

    async def _retag(self, arn: str, tags: dict[str, str]) -> None:
        entry = self._tagged(arn)
        if entry.declared_in:
            raise _declared(entry)
        entry = replace(entry, document=normalize({**entry.document, "Tags": tags}))
        await self._save(entry)
        self._entries[entry.uuid] = entry

    def _tagged(self, arn: str) -> _Entry:
        """The mapping that has this very ARN. ApiError, as AWS answers for what may have tags at all."""
        parts = _TAGGABLE.fullmatch(arn)
        if parts is None:
            text = f"Value '{arn}' at 'resource' failed to satisfy constraint: "
            pattern = f"Member must satisfy regular expression pattern: {_TAGGABLE.pattern}"
            raise ApiError("ValidationException", 400, f"1 validation error detected: {text}{pattern}")
        entry = self._entries.get(parts[2].lower()) if parts[2] else None
        if entry is None or self._describe(entry)["EventSourceMappingArn"].lower() != arn.lower():
            kind = "Event source mapping" if parts[2] else "Function"
            raise ApiError("ResourceNotFoundException", 404, f"{kind} not found: {arn}")
        return entry

    # --- what an operator asks

    async def pause(self, name: str, by: str) -> dict[str, Any]:
        """See `Control.pause`: the same as an update of `Enabled`, and kept like one."""
        return await self._switch(name, by, enabled=False)

    async def resume(self, name: str, by: str) -> dict[str, Any]:
        """See `Control.resume`."""
        return await self._switch(name, by, enabled=True)

    async def _switch(self, name: str, by: str, *, enabled: bool) -> dict[str, Any]:
        entry = self._named(name)
        answer = await self.update(entry.uuid, {"Enabled": enabled})
        _log.warning("mapping_resumed" if enabled else "mapping_paused", mapping=entry.uuid, by=by)
        return {"uuid": entry.uuid, "state": answer["State"]}

    async def seek(self, name: str, order: Mapping[str, Any], by: str) -> dict[str, Any]:
        """See `Control.seek`. The order stands in the store until the runner, started anew, has carried it out."""
        entry = self._named(name)
        source = source_of(entry.document)
        to = self._target_of(order, source.kind)
        if to["shard"] and to["shard"] not in await self._store.load(entry.uuid):
            raise _invalid(f"mapping {entry.uuid} has no shard {to['shard']}; see `poller status`")
        if to["shard"]:
            await self._probe.position(source, to["shard"], to["value"])
        async with self._lock:
            self._find_live(entry.uuid)
            await self._store.put_document(seek_key(entry.uuid, wall_clock()), {**to, "by": by})
            self._supervisor.seek(entry.uuid)
        _log.warning("seek_ordered", mapping=entry.uuid, by=by, **to)
        return {"uuid": entry.uuid, "state": self._supervisor.state(entry.uuid) or "Deleting"}

    def _target_of(self, order: Mapping[str, Any], kind: SourceKind) -> dict[str, str]:
        """An order as `{kind, value, shard}`. LATEST is the moment of the order, whenever it is carried out."""
        if not kind.is_stream:
            raise _invalid("a queue has no positions")
        unknown = sorted(order.keys() - {"position", "timestamp", "shard", "sequence"})
        if unknown:
            raise _invalid(f"unknown member {unknown[0]}; give position, position and timestamp, or shard and sequence")
        if "shard" in order or "sequence" in order:
            shard, sequence = order.get("shard"), order.get("sequence")
            if not isinstance(shard, str) or not isinstance(sequence, str) or not _SEQUENCE.fullmatch(sequence):
                raise _invalid("shard and sequence belong together: the shard's id and a sequence number in digits")
            if "position" in order or "timestamp" in order:
                raise _invalid("give either position or shard and sequence")
            return {"kind": PositionKind.AT, "value": sequence, "shard": shard}
        now = wall_clock()
        match order.get("position"), order.get("timestamp"):
            case "TRIM_HORIZON", None:
                return {"kind": PositionKind.TRIM_HORIZON, "value": "", "shard": ""}
            case "LATEST", None:
                is_exact = kind is SourceKind.KINESIS
                return {
                    "kind": PositionKind.AT_TIMESTAMP if is_exact else PositionKind.LATEST,
                    "value": repr(now),
                    "shard": "",
                }
            case "AT_TIMESTAMP", int() | float() as at if not isinstance(at, bool):
                if kind is not SourceKind.KINESIS:
                    raise _invalid("DynamoDB Streams has no AT_TIMESTAMP; give TRIM_HORIZON, LATEST or a sequence")
                if not 0 <= at <= now:
                    raise _invalid("timestamp is not a moment of the past, in epoch seconds")
                return {"kind": PositionKind.AT_TIMESTAMP, "value": repr(float(at)), "shard": ""}
        raise _invalid(
            'give {"position": "TRIM_HORIZON"}, {"position": "LATEST"}, {"position": "AT_TIMESTAMP", "timestamp": '
            'EPOCH_SECONDS} or {"shard": S, "sequence": N}'
        )

    def _function_name(self, entry: _Entry) -> str:
        source = parse_source(entry.document["EventSourceArn"])
        return resolve_function(entry.document["FunctionName"], self._settings.functions, source)[0].name

    def _named(self, name: str) -> _Entry:
        """The mapping that a person means. ApiError."""
        known = [(uuid, self._function_name(entry)) for uuid, entry in self._entries.items()]
        try:
            return self._entries[find_mapping(name, known)]
        except PollerError as error:
            raise ApiError("ResourceNotFoundException", 404, f"{error}.") from None

    # --- helpers

    async def _check_function(self, document: Mapping[str, Any]) -> None:
        """A function of ours is there; AWS is asked for any other, and for one of ours that means a Lambda function."""
        source = parse_source(document["EventSourceArn"])
        _, function = resolve_function(document["FunctionName"], self._settings.functions, source)
        if isinstance(function, LambdaFunction):
            await self._probe.function(function, source.region)

    async def _save(self, entry: _Entry) -> None:
        await self._store.put_document(_MADE + entry.uuid, {"document": entry.document, "modified": entry.modified})

    async def _keep(self, entry: _Entry) -> None:
        await self._save(entry)
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
        self._forget_deleted()
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


def _invalid(text: str) -> ApiError:
    return ApiError("InvalidParameterValueException", 400, text)


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
