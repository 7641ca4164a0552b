"""Positions of a KCL application, from its lease table: `poller checkpoints import --kcl TABLE`.

Such a table (KCL 1 to 3 in any language, the DynamoDB Streams Kinesis Adapter) has one item for each shard that the
application knows: `leaseKey`, `checkpoint`, `leaseCounter`, which its owner raises several times in a failover time,
`leaseOwner`, `parentShardId` (KCL's DynamoDBLeaseSerializer). A table of several streams has `streamName` and `shardId`
beside them. Finished leases are deleted, so what the table lacks is read from the shards' lineage, see `plan`.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from poller.aws.service import READING, Service
from poller.aws.session import COLD_TIMEOUT, AwsClients
from poller.checkpoints import FORMAT, VERSION, Shown, is_sequence
from poller.clock import SystemClock, wall_clock
from poller.core.model import (
    END,
    TRIM_HORIZON,
    Listing,
    Position,
    PositionKind,
    Shard,
    ShardId,
    SourceKind,
    SourceSpec,
)
from poller.core.model import Mapping as RunnableMapping
from poller.errors import PollerError, PositionTrimmed, SourceGone
from poller.ports import StreamSource
from poller.settings import AwsSettings, Settings
from poller.sources import Sources

WATCH = 12.0
"""Seconds that owned leases are watched for. A worker renews three times in a failover time, of 10 or 30 seconds."""
LOOK = 2.0
"""Seconds between two looks meanwhile."""

_SENTINELS = frozenset({"TRIM_HORIZON", "LATEST", "AT_TIMESTAMP", "SHARD_END"})
_STREAM = re.compile(r"([0-9]{12}):(.+):([0-9]+)")  # account, name, creation in epoch seconds
_PARALLEL = 16  # positions that are asked for at a time
_SHOWN = 3  # shards that a sentence names


@dataclass(frozen=True, slots=True)
class Options:
    """`mapping`: which one takes the positions over; "": the only one of a stream. `region`, `endpoint_url`: of the
    table; None: the stream's Region, the config's endpoint. `force`: of a running application too, without shards that
    the stream does not have, and without asking the stream for the positions.
    """

    table: str
    mapping: str = ""
    region: str | None = None
    endpoint_url: str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """One item. `stream`: `account:name:creation` in a table of several streams, else empty. `checkpoint`: a sequence
    number, all up to it is processed, or KCL's word. `sub`: above 0 the checkpoint lies inside an aggregated record.
    """

    shard: ShardId
    checkpoint: str
    sub: int = 0
    owner: str | None = None
    counter: int = 0
    parents: tuple[ShardId, ...] = ()
    stream: str = ""

    @property
    def is_done(self) -> bool:
        """Processed to the end of the shard."""
        return self.checkpoint == "SHARD_END"


@dataclass(frozen=True, slots=True)
class Taken:
    """`shards`: as the exported document has them. `notes`: sentences, what somebody should know of them. `strangers`:
    unfinished leases of shards that the stream neither lists nor names as a parent; they are left out.
    """

    shards: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    strangers: tuple[ShardId, ...]

    def positions(self) -> Iterator[tuple[ShardId, Position]]:
        """Where each shard goes on."""
        for shard in self.shards:
            place = shard["position"]
            yield shard["shard"], Position(PositionKind(place["kind"]), place["value"])


@dataclass(frozen=True, slots=True)
class Takeover:
    """`document`: for `Checkpoints.restore`. `notes`: as in `Taken`."""

    document: Mapping[str, Any]
    notes: tuple[str, ...]


# --- the table


def lease_of(item: Mapping[str, Any]) -> Lease | None:
    """The lease of an item; None for what KCL 3 keeps beside its leases. PollerError: this is no lease table of KCL."""
    if "scope" in item:
        raise PollerError("this is the store of a poller; use `poller checkpoints export` and `import`")
    try:
        key: str = item["leaseKey"]["S"]
    except (KeyError, TypeError):
        raise PollerError("this is no lease table of KCL: an item has no leaseKey") from None
    is_lease = item.get("entityType", {}).get("S", "LEASE") == "LEASE"
    if not is_lease or not item.keys() & {"checkpoint", "leaseCounter"}:
        return None
    try:
        checkpoint: str = item["checkpoint"]["S"]
        sub = int(item.get("checkpointSubSequenceNumber", {"N": "0"})["N"])
        counter = int(item.get("leaseCounter", {"N": "0"})["N"])
        parents = item.get("parentShardId", {})
        stream: str = item.get("streamName", {"S": ""})["S"]
        shard: str = item["shardId"]["S"] if stream else key
        owner: str | None = item.get("leaseOwner", {"S": None})["S"]
        found = tuple(sorted(parents.get("SS") or [parents["S"]])) if parents else ()
        if not all(map(str.isprintable, (key, shard, stream, owner or "", *found))):
            raise ValueError  # noqa: TRY301 - they stand in what a person reads
    except (KeyError, TypeError, ValueError):
        shown = key if key.isprintable() else ascii(key)
        raise PollerError(f"the lease {shown} is damaged or no lease of KCL") from None
    if checkpoint not in _SENTINELS and not is_sequence(checkpoint):
        raise PollerError(f"the lease {key} has the checkpoint {checkpoint!r}, which is no sequence number")
    return Lease(shard, checkpoint, sub, owner, counter, found, stream)


async def read_table(service: Service, table: str) -> list[Lease]:
    """Every lease, read consistently. PollerError: the table cannot be read, or it is another kind of table."""
    leases: list[Lease] = []
    more: dict[str, Any] = {}
    while True:
        async with service.calling("dynamodb:Scan") as client:
            answer = await client.scan(TableName=table, ConsistentRead=True, **more)
        try:
            leases += [lease for item in answer.get("Items", ()) if (lease := lease_of(item)) is not None]
        except PollerError as error:
            raise PollerError(f"{service.where}: {error}") from None
        if not (last := answer.get("LastEvaluatedKey")):
            break
        more = {"ExclusiveStartKey": last}
    if not leases:
        raise PollerError(f"{service.where}: it has no leases")
    return leases


async def at_rest(read: Callable[[], Awaitable[list[Lease]]]) -> list[Lease]:
    """The leases, once nobody has changed one for `WATCH` seconds; at once when none has an owner. PollerError: who
    still works.
    """
    leases = await read()
    if not any(lease.owner for lease in leases):
        return leases
    loop = asyncio.get_running_loop()
    end = loop.time() + WATCH
    first = _signs(leases)
    while (left := end - loop.time()) > 0:
        await asyncio.sleep(min(LOOK, left))
        leases = await read()
        now = _signs(leases)
        if now != first:
            changed = sorted(key[1] for key in first.keys() | now.keys() if first.get(key) != now.get(key))
            owners = sorted({lease.owner for lease in leases if lease.owner and lease.shard in changed})
            by = f" by {_some(owners)}" if owners else ""
            raise PollerError(
                f"the KCL application still runs: the leases of {_some(changed)} are being changed{by}; stop it first, "
                "or both deliver the same records. --force imports what the table says in this moment"
            )
    return leases


def _signs(leases: Iterable[Lease]) -> dict[tuple[str, ShardId], Lease]:
    return {(lease.stream, lease.shard): lease for lease in leases}


def of_stream(leases: Sequence[Lease], source: SourceSpec, incarnation: str) -> list[Lease]:
    """Those of the stream, in a table of several. PollerError: of which streams the table is."""
    several = [lease for lease in leases if lease.stream]
    if not several:
        return list(leases)
    name = source.name
    if source.kind is SourceKind.DYNAMODB:  # the adapter's name for it; the creation is in the label
        label = source.arn.rpartition("/stream/")[2].replace(":", "_")
        name, incarnation = f"{source.region}${source.account}${source.name}${label}", ""
    found = [lease for lease in several if _is_of(lease.stream, source.account, name, incarnation)]
    if not found:
        streams = sorted({lease.stream for lease in several})
        made = f", created at {incarnation}" if incarnation else ""
        raise PollerError(f"the table has no lease of {source.arn}{made}; it has those of {_some(streams)}")
    return found


def _is_of(stream: str, account: str, name: str, incarnation: str) -> bool:
    found = _STREAM.fullmatch(stream)
    if found is None:
        raise PollerError(f"the table has leases of {stream!r}, which is no stream of KCL")
    return found.group(1, 2) == (account, name) and incarnation in {"", found.group(3)}


# --- what the poller makes of it


def plan(leases: Sequence[Lease], listing: Listing, start: Position) -> Taken:
    """The rows of a mapping, `start` its StartingPosition, that go on where the application stands.

    listed, with a lease ----------------> the lease's position
    listed, without, ancestor of a lease
        one that the application began,
        no lease above it unfinished ----> SHARD_END: KCL deletes a finished lease once its children have begun, and
                                           never reads what is older than where it began (LeaseCleanupManager,
                                           HierarchicalShardSyncer)
    listed, without, any other ----------> no row: the poller finds it and reads it from TRIM_HORIZON
    not listed, ancestor of a listed one > the lease's position: it says whether something was lost
    not listed, finished ----------------> no row: nobody needs it any more
    not listed, any other ---------------> a stranger
    """
    shards = {shard.id: shard for shard in listing.shards}
    leased = {lease.shard: lease for lease in leases}

    def above(names: Iterable[ShardId]) -> set[ShardId]:
        """All their ancestors, as far as listing and leases know them."""
        found: set[ShardId] = set()
        left = list(names)
        while left:
            more = [name for name in _parents(left.pop(), shards, leased) if name not in found]
            found.update(more)
            left += more
        return found

    begun = above(lease.shard for lease in leases if lease.checkpoint != "TRIM_HORIZON")
    ended = {
        name
        for name in begun & shards.keys() - leased.keys()
        if all(leased[higher].is_done for higher in above([name]) & leased.keys())
    }
    needed = shards.keys() | above(shards)
    strangers = tuple(sorted(lease.shard for lease in leases if lease.shard not in needed and not lease.is_done))
    kept = [leased[name] for name in sorted(leased.keys() & needed)]
    rows = [_row(lease.shard, _position(lease, start), _parents(lease.shard, shards, leased)) for lease in kept]
    rows += [_row(name, END, shards[name].parents) for name in sorted(ended)]
    notes = list(_notes(kept, shards.keys(), start))
    if ended:
        notes.append(f"{_some(sorted(ended))}: KCL has deleted the lease; taken as read to the end")
    if fresh := sorted(shards.keys() - leased.keys() - ended):
        notes.append(f"{_some(fresh)}: KCL has no lease yet; to be read from TRIM_HORIZON")
    return Taken(tuple(rows), tuple(notes), strangers)


def _parents(name: ShardId, shards: Mapping[ShardId, Shard], leased: Mapping[ShardId, Lease]) -> tuple[ShardId, ...]:
    if name in shards:
        return shards[name].parents
    return leased[name].parents if name in leased else ()


def _row(shard: ShardId, position: Position, parents: Sequence[ShardId]) -> Mapping[str, Any]:
    """When KCL saved it is not known: as old as can be, so the first read looks for what was trimmed since."""
    place = {"kind": position.kind.value, "value": position.value}
    return {"shard": shard, "position": place, "parents": list(parents), "saved_at": 0.0}


def _position(lease: Lease, start: Position) -> Position:
    """Where the poller goes on. Without a checkpoint the stream's oldest record, for nothing says when the application
    began, unless the mapping itself names a moment.
    """
    match lease.checkpoint:
        case "SHARD_END":
            return END
        case "TRIM_HORIZON":
            return TRIM_HORIZON
        case "LATEST" | "AT_TIMESTAMP":
            return start if start.kind is PositionKind.AT_TIMESTAMP else TRIM_HORIZON
        case sequence:
            return Position(PositionKind.AT if lease.sub > 0 else PositionKind.AFTER, sequence)


def _notes(leases: Sequence[Lease], listed: Collection[ShardId], start: Position) -> Iterator[str]:
    if halves := [lease.shard for lease in leases if lease.sub > 0 and is_sequence(lease.checkpoint)]:
        yield f"{_some(halves)}: the checkpoint lies inside an aggregated record; all of that is delivered once more"
    if never := [lease.shard for lease in leases if lease.checkpoint in {"LATEST", "AT_TIMESTAMP"}]:
        place = f"{_position(Lease('', 'LATEST'), start).kind} {start.value}".strip()
        place = place if start.kind is PositionKind.AT_TIMESTAMP else "TRIM_HORIZON, so that nothing is missed"
        yield f"{_some(never)}: never checkpointed by KCL; to be read from {place}"
    if unread := [lease.shard for lease in leases if lease.shard not in listed and not lease.is_done]:
        yield f"{_some(unread)}: has left the stream before KCL was done with it; the poller counts that as lost"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# --- all of it


def choose(found: Sequence[Shown], name: str) -> RunnableMapping:
    """The mapping that takes the positions over: `found` by its name, or the only one of a stream. PollerError."""
    if name:
        [shown] = found
        if shown.mapping is None:
            raise PollerError(f"mapping {shown.id} is no longer configured")
        if shown.is_queue:
            raise PollerError(f"mapping {shown.id} reads a queue, {shown.source_arn}: a queue has no positions")
        return shown.mapping
    streams = [shown.mapping for shown in found if shown.mapping is not None and not shown.is_queue]
    if len(streams) == 1:
        return streams[0]
    there = ", ".join(f"{mapping.id} ({mapping.function.name}, {mapping.source.arn})" for mapping in streams)
    if not there:
        raise PollerError("the config has no mapping of a stream; make one, of the stream that the application reads")
    raise PollerError(f"which mapping? Give --mapping; there are {there}")


async def take_over(settings: Settings, mapping: RunnableMapping, options: Options) -> Takeover:
    """What the table says, for `Checkpoints.restore`; nothing is changed. PollerError: why it cannot be taken over."""
    region = options.region or mapping.source.region
    aws = AwsSettings(region, options.endpoint_url) if options.endpoint_url else settings.aws
    where = f"table {options.table} in {region}"
    async with AwsClients(settings.aws) as clients, AwsClients(aws) as others:
        table = Service("dynamodb", region, where, others, COLD_TIMEOUT, attempts=2, words=READING)

        async def read() -> list[Lease]:
            return await read_table(table, options.table)

        leases = await (read() if options.force else at_rest(read))
        clock = SystemClock(asyncio.get_running_loop())
        source = Sources(clients, clock).open_again(mapping.source, mapping.function.role)
        try:
            return await _take_over(leases, source, mapping, force=options.force)
        except PollerError as error:
            raise PollerError(f"{where}: {error}") from None
        finally:
            await source.close()


async def _take_over(
    leases: Sequence[Lease], source: StreamSource, mapping: RunnableMapping, *, force: bool
) -> Takeover:
    arn = mapping.source.arn
    facts = await source.facts()
    listing = await source.shards()
    taken = plan(of_stream(leases, mapping.source, facts.incarnation), listing, mapping.start)
    if not taken.shards:
        raise PollerError(f"none of its leases is of a shard that {arn} has; is mapping {mapping.id} the right one?")
    notes = list(taken.notes)
    if taken.strangers and not force:
        raise PollerError(
            f"{_some(taken.strangers)}: KCL is not done with it, and {arn} has no such shard (any more); is mapping "
            f"{mapping.id} the right one? --force leaves it out"
        )
    if taken.strangers:
        notes.append(f"{_some(taken.strangers)}: not a shard of the stream (any more), left out")
    if not force:
        await _probe(source, taken, {shard.id for shard in listing.shards}, arn)
    return Takeover(_document(mapping, facts.incarnation, taken), tuple(notes))


async def _probe(source: StreamSource, taken: Taken, listed: Collection[ShardId], arn: str) -> None:
    """PollerError: the stream does not have a position. Shards of all Kinesis streams have the same names, so this is
    what tells that the table belongs to another one.
    """
    missing: list[ShardId] = []
    troubles: list[PollerError] = []
    gate = asyncio.Semaphore(_PARALLEL)

    async def ask(shard: ShardId, at: Position) -> None:
        try:
            async with gate:
                await source.iterator(shard, at)
        except (PositionTrimmed, SourceGone):
            missing.append(shard)
        except PollerError as error:
            troubles.append(PollerError(f"{shard}, {at.value}: {error}"))

    async with asyncio.TaskGroup() as tasks:
        for shard, at in taken.positions():
            if shard in listed and at.kind in {PositionKind.AT, PositionKind.AFTER}:
                tasks.create_task(ask(shard, at))
    if missing:
        raise PollerError(
            f"{_some(sorted(missing))}: {arn} does not have the record that KCL stands at: it has left the stream, or "
            "the table is of another stream. --force imports the position; what is gone is counted as lost then"
        )
    if troubles:
        raise troubles[0]


def _document(mapping: RunnableMapping, incarnation: str, taken: Taken) -> Mapping[str, Any]:
    at = datetime.fromtimestamp(wall_clock(), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    exported = {
        "mapping": mapping.id,
        "function": mapping.function.name,
        "source_arn": mapping.source.arn,
        "stream": {"arn": mapping.source.arn, "incarnation": incarnation},
        "shards": list(taken.shards),
    }
    return {"format": FORMAT, "version": VERSION, "exported_at": at, "mappings": [exported]}
