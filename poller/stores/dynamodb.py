"""Positions, leases, members and documents in one DynamoDB table, shared by the processes of a fleet.

    scope           leaseKey    what
    mapping/UUID    shard id    a row: KCL's names where the meaning is KCL's, see `_fields`
    mapping/UUID    ~change     rows that are to be put, written down whole before the first of them is (see below)
    member          member id   beat, info
    document        key         body
    part/ID         00000...    the parts of one text that no item holds; whatever refers to them is written after them
    schema          version     version

A write of a row has the condition that owner and token are as they were: two processes cannot both have a lease, and
one that lost it writes nothing. No time of any host is compared.

DynamoDB changes at most 100 items in one step. More rows are put like this: the list of them is written as one item,
`~change`, and that is the moment when it is done, because whoever loads the mapping carries the list out first. The
item goes with the last of the rows, in one step, and the steps before have the condition that it is there, so that one
who is late puts nothing back.

What a crash or a lost answer can leave behind is parts that nothing refers to: never read, some kilobytes each. Their
attribute `of` says what they were for.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from poller.aws.session import AwsClients
from poller.clock import wall_clock
from poller.core.model import Checkpoint, Lease, MappingId, Member, Row, ShardId
from poller.errors import PollerError, StoreUnavailable
from poller.ports import StoreObserver
from poller.settings import DynamoStoreSettings
from poller.stores import dynamolayout as layout
from poller.stores.dynamotable import TRANSACTION_ITEMS, Cancelled, ConditionFailed, Item, Table, Value, key, name_of

_CHANGE = "~change"  # no shard id of AWS has this letter
_PARALLEL = 32  # writes at a time of one call
_TRIES = 10  # of what another process can get in the way of
_OPTIONAL = ("resume", "window")
_WRITES = frozenset({"create", "acquire", "save", "release", "request", "beat", "put_document", "restore"})

_T = TypeVar("_T")


class DynamoStore:
    """`CheckpointStore` in a DynamoDB table. Makes no call before it is asked something; `close` before the clients.

    Methods may raise StoreIncompatible too: the table is another program's, or a newer release's.
    Not one step: `load` may see a part of what another process puts at this moment (`create`, `restore`), and of
    `restore` see there.
    """

    def __init__(self, clients: AwsClients, settings: DynamoStoreSettings, observer: StoreObserver) -> None:
        self._table = Table(clients, settings)
        self._observer = observer
        self.problem = ""
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_closed = False

    @property
    def calls(self) -> Mapping[str, int]:
        """Requests sent so far, by DynamoDB operation. A write of a row or a member is one unit a kilobyte."""
        return self._table.calls

    async def check(self) -> str | None:
        """Can the table be used with these credentials? None, or the reason why not. Nothing is made."""
        return await self._table.check()

    # --- rows

    async def create(self, mapping: MappingId, rows: Sequence[Row]) -> None:
        """Put each row that is absent; rows that exist stay as they are. All or none."""
        async with self._doing("create"):
            items = {row.shard: await self._new_item(mapping, row, wall_clock()) for row in reversed(rows)}
            for tries in range(1, _TRIES + 1):
                there = await self._settled(mapping) if items else {}
                absent = [item for shard, item in items.items() if shard not in there]
                if not absent:
                    return
                puts = [layout.put(item, only_new=True) for item in absent]
                try:
                    if len(layout.chunks(puts)) == 1:
                        await self._table.transact(puts)
                        return
                    await self._announce(mapping, absent)
                except (Cancelled, ConditionFailed):
                    await self._table.pause(tries)  # somebody else puts rows too
            raise self._busy(mapping)

    async def load(self, mapping: MappingId) -> dict[ShardId, Row]:
        """Every row of a mapping, by shard id. StoreUnavailable also names a row that was edited into nonsense."""
        async with self._doing("load"):
            items = await self._settled(mapping)
            rows = {shard: await self._row(mapping, items[shard]) for shard in sorted(items)}
            return {shard: row for shard, row in rows.items() if row is not None}

    async def acquire(self, mapping: MappingId, row: Row, owner: str) -> Lease | None:
        """Take the lease if the stored (owner, token) is still the row's; token + 1. None: somebody was faster."""
        async with self._doing("acquire"):
            lease = Lease(mapping, row.shard, owner, row.token + 1)
            sets = {"leaseOwner": {"S": owner}, "leaseCounter": layout.number(lease.token)}
            switches = row.owner not in {None, owner}
            request = layout.update(mapping, row.shard, row.owner, row.token, sets, ["wantedBy"], switches=switches)
            try:
                await self._table.update(request)
            except ConditionFailed:
                # Ours already, when the answer to an earlier try was lost.
                item = await self._table.get(key(layout.scope(mapping), row.shard))
                return lease if item is not None and layout.is_at(item, owner, lease.token) else None
            return lease

    async def save(self, changes: Sequence[tuple[Lease, Checkpoint]]) -> Sequence[Lease]:
        """Write checkpoints, each in one step; answers the leases that are no longer held (not written).

        After StoreUnavailable some are written; to do it again is fine. One that comes late, after a newer one of the
        same lease, turns the position back, never over anything that is not settled.
        """
        asked = tuple(changes)
        async with self._doing("save"):
            newest = dict(asked)

            async def save(lease: Lease) -> bool:
                return await self._write(lease, newest[lease], {}, [])

            leases = list(newest)
            written = await _each(leases, save)
            stale = {lease for lease, done in zip(leases, written, strict=True) if not done}
            return tuple(lease for lease, _ in asked if lease in stale)

    async def release(self, lease: Lease, checkpoint: Checkpoint | None, to: str | None = None) -> bool:
        """Write the last checkpoint, if any, and give the lease up, or hand it over, in one step. False: it was no
        longer held.
        """
        async with self._doing("release"):
            token = lease.token + (to is not None)
            sets, removes = {"leaseCounter": layout.number(token)}, ["wantedBy"]
            if to is None:
                removes.append("leaseOwner")
            else:
                sets["leaseOwner"] = {"S": to}
            if await self._write(lease, checkpoint, sets, removes):
                return True
            item = await self._table.get(key(layout.scope(lease.mapping), lease.shard))
            if item is None or not layout.is_at(item, to, token):
                return False
            row = await self._row(lease.mapping, item)  # done already, when the answer to an earlier try was lost
            return row is not None and checkpoint in {None, row.checkpoint}

    async def request(self, mapping: MappingId, row: Row, member: str) -> bool:
        """Ask the owner to hand the shard over to `member`. False: (owner, token) is no longer the row's."""
        async with self._doing("request"):
            request = layout.update(mapping, row.shard, row.owner, row.token, {"wantedBy": {"S": member}}, [])
            try:
                await self._table.update(request)
            except ConditionFailed:
                return False
            return True

    async def forget(self, mapping: MappingId, shards: Sequence[ShardId] | None = None) -> None:
        """Delete the rows of a mapping, or of some of its shards."""
        named = None if shards is None else tuple(shards)
        async with self._doing("forget"):
            scope = layout.scope(mapping)
            if named is None:
                await self._table.delete(key(scope, _CHANGE))  # first, or it would put rows back
                named = tuple(name_of(item) for item in await self._table.query(scope, only_names=True))
            elif named:
                await self._settled(mapping)
            await _each(named, lambda shard: self._table.delete(key(scope, shard)))

    async def mappings(self) -> Sequence[MappingId]:
        """Every mapping that has rows, in order. Reads the whole table."""
        async with self._doing("mappings"):
            return sorted(scope.removeprefix(layout.scope("")) for scope in await self._table.scopes(layout.scope("")))

    async def restore(
        self,
        rows: Mapping[MappingId, Sequence[Row]],
        leases: Sequence[Lease],
        documents: Mapping[str, Mapping[str, Any] | None],
    ) -> bool:
        """Put these rows in place of all that these mappings have, and documents (None: deleted), all or none; a row's
        `saved_at` is kept, inf means now. False, nothing done: `leases` are not all their rows, or one is lost.

        With more than 100 rows and documents the leases are looked at first and not once more: one that is lost in
        that moment is overruled. With more than 100 mappings and documents it is several steps, and StoreUnavailable
        may leave some of them done: do it again.
        """
        texts = {name: None if document is None else layout.to_json(document) for name, document in documents.items()}
        put = {mapping: tuple(found) for mapping, found in rows.items()}
        async with self._doing("restore"):
            items: dict[MappingId, dict[ShardId, Item]] = {}
            for mapping, found in put.items():
                items[mapping] = {row.shard: await self._new_item(mapping, row, layout.moment(row)) for row in found}
            bodies = {name: None if text is None else await self._document(name, text) for name, text in texts.items()}
            for tries in range(1, _TRIES + 1):
                there = {mapping: await self._settled(mapping) for mapping in items}
                held = {holding for mapping in there for holding in layout.holdings(mapping, there[mapping])}
                if held != {(lease.mapping, lease.shard, lease.owner, lease.token) for lease in leases}:
                    await self._drop(item for found in items.values() for item in found.values())
                    await self._drop(body for body in bodies.values() if body is not None)
                    return False
                try:
                    await self._replace(there, items, bodies)
                except Cancelled:
                    await self._table.pause(tries)
                else:
                    return True
            raise self._busy(", ".join(put))

    async def _replace(
        self,
        there: Mapping[MappingId, Mapping[ShardId, Item]],
        items: Mapping[MappingId, Mapping[ShardId, Item]],
        bodies: Mapping[str, Item | None],
    ) -> None:
        """The write of `restore`. Cancelled: nothing was done, a row or another item was just written by others."""
        old = [item for found in there.values() for item in found.values()]
        old += [item for name in bodies if (item := await self._table.get(key("document", name))) is not None]
        rest = [
            layout.put(item) if item is not None else {"Delete": {"Key": key("document", name)}}
            for name, item in bodies.items()
        ]
        actions = [action for mapping in items for action in layout.exchange(there[mapping], items[mapping])]
        if len(layout.chunks([*actions, *rest])) > 1:
            actions = []
            for mapping, wanted in items.items():
                change = await self._change(mapping, wanted.values(), replaces=True)
                actions.append(layout.put(change, only_new=True))
        first, *others = layout.chunks([*actions, *rest]) or [[]]
        if first:
            await self._table.transact(first)
        for chunk in others:
            await self._insist(chunk)
        for mapping in items:
            await self._settled(mapping)
        await self._drop(old)

    async def _drop(self, items: Iterable[Item]) -> None:
        """Delete the parts of items that were replaced, or never written."""
        for item in items:
            for value in item.values():
                await self._table.drop(value)

    async def _insist(self, actions: Sequence[Mapping[str, Any]]) -> None:
        """A transaction after one that was done: there is no way back."""
        for tries in range(1, _TRIES + 1):
            try:
                return await self._table.transact(actions)
            except Cancelled:
                await self._table.pause(tries)
        raise StoreUnavailable("The store is restored in part, others write to it. Do it again.")

    async def _write(
        self, lease: Lease, checkpoint: Checkpoint | None, sets: Mapping[str, Value], removes: Sequence[str]
    ) -> bool:
        """Change a row that the lease is for. False: it is no longer held."""
        fields: Mapping[str, Value] = {}
        if checkpoint is not None:
            fields = await self._fields(lease.mapping, lease.shard, checkpoint, wall_clock())
            removes = [*removes, *(name for name in _OPTIONAL if name not in fields)]
        switches = checkpoint is None and "leaseOwner" in sets
        request = layout.update(
            *(lease.mapping, lease.shard, lease.owner, lease.token), {**fields, **sets}, removes, switches=switches
        )
        window = fields.get("window")
        try:
            old = await self._table.update(request)
        except ConditionFailed:
            # The row may have these very parts: it was written, and given up by that, when an answer was lost.
            if not await self._has(key(layout.scope(lease.mapping), lease.shard), "window", window):
                await self._table.drop(window)
            return False
        if old.get("window") != window and checkpoint is not None:  # else it is a repeat, and these are ours
            await self._table.drop(old.get("window"))
        return True

    async def _has(self, item_key: Item, attribute: str, value: Value | None) -> bool:
        """Does an item refer to the parts of this very text?"""
        if value is None or "M" not in value:
            return False
        item = await self._table.get(item_key)
        return item is not None and item.get(attribute) == value

    async def _settled(self, mapping: MappingId) -> dict[ShardId, Item]:
        """The items of a mapping's rows. A change that was written down is carried out first."""
        scope = layout.scope(mapping)
        for tries in range(1, _TRIES + 1):
            items = {name_of(item): item for item in await self._table.query(scope)}
            change = items.pop(_CHANGE, None)
            if change is None:
                return items
            try:
                await self._carry_out(change, items)
            except Cancelled:
                await self._table.pause(tries)  # somebody else does it too, and is done or ahead
        raise self._busy(mapping)

    async def _carry_out(self, change: Item, there: Mapping[ShardId, Item]) -> None:
        """Put the rows that a change lists, and remove it. Cancelled: it was removed, or a row is there by now."""
        text = await self._table.read(change["rows"])
        if text is None:
            return
        wanted: dict[ShardId, Item] = {name_of(item): item for item in json.loads(text)}
        if change["replaces"]["BOOL"]:
            actions = [layout.delete(there[shard]) for shard in there if shard not in wanted]
            actions += [layout.put(item) for shard, item in wanted.items() if item != there.get(shard)]
        else:
            actions = [layout.put(item, only_new=True) for shard, item in wanted.items() if shard not in there]
        same: dict[str, Any] = {
            "Key": key(change["scope"]["S"], _CHANGE),
            "ConditionExpression": "#rows = :rows AND #madeAt = :madeAt",
            "ExpressionAttributeNames": {"#rows": "rows", "#madeAt": "madeAt"},
            "ExpressionAttributeValues": {":rows": change["rows"], ":madeAt": change["madeAt"]},
        }
        *chunks, last = layout.chunks(actions, most=TRANSACTION_ITEMS - 1) or [[]]
        for chunk in chunks:
            await self._table.transact([{"ConditionCheck": same}, *chunk])
        await self._table.transact([*last, {"Delete": same}])
        await self._table.drop(change["rows"])

    async def _announce(self, mapping: MappingId, absent: Sequence[Item]) -> None:
        """Write down the rows that `create` puts. ConditionFailed: somebody else has written down others."""
        change = await self._change(mapping, absent, replaces=False)
        try:
            await self._table.put(change, only_new=True)
        except ConditionFailed:
            if not await self._has(key(layout.scope(mapping), _CHANGE), "rows", change["rows"]):  # else it is a repeat
                await self._table.drop(change["rows"])
                raise

    async def _change(self, mapping: MappingId, items: Iterable[Item], *, replaces: bool) -> Item:
        """Rows to be put, as one item."""
        scope = layout.scope(mapping)
        rows = await self._table.write(json.dumps(list(items)), f"{scope}/{_CHANGE}")
        made_at = layout.number(wall_clock())
        return {**key(scope, _CHANGE), "rows": rows.value, "replaces": {"BOOL": replaces}, "madeAt": made_at}

    async def _new_item(self, mapping: MappingId, row: Row, saved_at: float) -> Item:
        fields = await self._fields(mapping, row.shard, row.checkpoint, saved_at)
        return {**key(layout.scope(mapping), row.shard), **fields, **layout.lease_fields(row)}

    async def _fields(
        self, mapping: MappingId, shard: ShardId, checkpoint: Checkpoint, saved_at: float
    ) -> dict[str, Value]:
        """The attributes of a checkpoint; the parts of its window, where it has some, are in the table by then."""
        fields = layout.position_fields(checkpoint, saved_at)
        if checkpoint.window:
            fields["window"] = (await self._table.write(checkpoint.window, f"{layout.scope(mapping)}/{shard}")).value
        return fields

    async def _row(self, mapping: MappingId, item: Item) -> Row | None:
        """The row of an item; None when it is gone meanwhile."""
        found = item
        for _ in range(_TRIES):
            window = "" if "window" not in found else await self._table.read(found["window"])
            if window is not None:
                return layout.row_of(mapping, found, window)
            now = await self._table.get(key(layout.scope(mapping), name_of(item)))  # it was saved while we read
            if now is None:
                return None
            found = now
        raise StoreUnavailable(f"The store's row of mapping {mapping}, shard {name_of(item)} has lost its window.")

    def _busy(self, mapping: MappingId) -> StoreUnavailable:
        return StoreUnavailable(f"The rows of mapping {mapping} cannot be written, others write to them too.")

    # --- members

    async def beat(self, member: Member) -> None:
        """Write what a member says of itself. TypeError, ValueError: its `info` is not JSON."""
        info = layout.to_json(member.info)
        async with self._doing("beat"):
            await self._table.put({**key("member", member.id), "beat": layout.number(member.beat), "info": {"S": info}})

    async def members(self) -> dict[str, Member]:
        """Every member that has not left, by id."""
        async with self._doing("members"):
            found = [layout.member_of(item) for item in await self._table.query("member")]
            return {member.id: member for member in sorted(found, key=lambda member: member.id)}

    async def leave(self, member: str) -> None:
        """Forget a member; absent is fine."""
        async with self._doing("leave"):
            await self._table.delete(key("member", member))

    # --- documents

    async def put_document(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep a JSON document under a key. TypeError, ValueError: it is not JSON."""
        text = layout.to_json(document)
        async with self._doing("put_document"):
            item = await self._document(key, text)
            old = await self._table.put(item)
            if old.get("body") != item["body"]:  # else it is a repeat, and these parts are ours
                await self._table.drop(old.get("body"))

    async def delete_document(self, key: str) -> None:
        """Forget a document; absent is fine."""
        async with self._doing("delete_document"):
            await self._delete_document(key)

    async def documents(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Every document whose key starts with the prefix, by key."""
        async with self._doing("documents"):
            found = {}
            for item in sorted(await self._table.query("document", prefix), key=name_of):
                text = await self._body(item)
                if text is not None:
                    found[name_of(item)] = layout.parsed(name_of(item), text)
            return found

    async def document_keys(self, prefix: str) -> Sequence[str]:
        """Every key that starts with the prefix, in order."""
        async with self._doing("document_keys"):
            return await self._keys(prefix)

    async def prune_documents(self, prefix: str, keep: int) -> None:
        """Delete all but the last `keep` documents, in the order of their keys, whose key starts with the prefix."""
        async with self._doing("prune_documents"):
            found = await self._keys(prefix)
            await _each(found[: max(0, len(found) - keep)], self._delete_document)

    async def _keys(self, prefix: str) -> list[str]:
        return sorted(name_of(item) for item in await self._table.query("document", prefix, only_names=True))

    async def _document(self, name: str, text: str) -> Item:
        body = await self._table.write(text, f"document/{name}")
        return {**key("document", name), "body": body.value}

    async def _delete_document(self, name: str) -> None:
        await self._table.delete(key("document", name))

    async def _body(self, item: Item) -> str | None:
        """The text of a document; None when it is gone meanwhile."""
        found = item
        for _ in range(_TRIES):
            text = await self._table.read(found.get("body", {}))
            if text is not None:
                return text
            now = await self._table.get(key("document", name_of(item)))  # it was put anew while we read
            if now is None:
                return None
            found = now
        raise StoreUnavailable(f"The store's document {name_of(item)} has lost a part.")

    # --- the end

    async def close(self) -> None:
        """Let what was asked end. Again is fine. Later requests: StoreUnavailable."""
        self._is_closed = True
        await self._idle.wait()

    @asynccontextmanager
    async def _doing(self, operation: str) -> AsyncIterator[None]:
        """Around every request: counted, and waited for by `close`."""
        if self._is_closed:
            self._observer.requested(operation, "error")
            raise StoreUnavailable(f"The store's table {self._table.name} is closed.")
        self._active += 1
        self._idle.clear()
        try:
            yield
        except Exception as error:
            if isinstance(error, StoreUnavailable):
                self.problem = str(error)
            self._observer.requested(operation, "error")
            raise
        else:
            if operation in _WRITES:  # each member beats; that reads go on says nothing about writes
                self.problem = ""
            self._observer.requested(operation, "success")
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()


async def _each(jobs: Sequence[_T], run: Callable[[_T], Awaitable[Any]]) -> list[Any]:
    """The results in the order of the jobs, several run at a time. After the first error none is begun, and it is
    raised once those that were have ended.
    """
    results: list[Any] = [None] * len(jobs)
    failed: list[PollerError] = []
    waiting = iter(enumerate(jobs))

    async def work() -> None:
        for index, job in waiting:
            if failed:
                return
            try:
                results[index] = await run(job)
            except PollerError as error:
                failed.append(error)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(_PARALLEL, len(jobs))):
            group.create_task(work())
    if failed:
        raise failed[0]
    return results
