"""A store that lives as long as its object: the same rules as the others, without a file.

For tests and the simulation: no thread, no clock, no wait, so a run repeats exactly.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from poller.core.model import Checkpoint, Lease, MappingId, Member, Row, ShardId


class MemoryStore:
    """`CheckpointStore` in dictionaries. `close` keeps what it holds, so a simulated restart finds it again."""

    problem = ""

    def __init__(self) -> None:
        self._rows: dict[tuple[MappingId, ShardId], Row] = {}
        self._documents: dict[str, str] = {}  # JSON text: what was put cannot change through a shared object
        self._members: dict[str, tuple[int, str]] = {}  # beat and JSON

    async def create(self, mapping: MappingId, rows: Sequence[Row]) -> None:
        """Put each row that is absent; rows that exist stay as they are. All or none."""
        self._rows = {(mapping, row.shard): row for row in reversed(rows)} | self._rows

    async def load(self, mapping: MappingId) -> dict[ShardId, Row]:
        """Every row of a mapping, by shard id."""
        return {shard: row for (owner, shard), row in sorted(self._rows.items(), key=_key) if owner == mapping}

    async def acquire(self, mapping: MappingId, row: Row, owner: str) -> Lease | None:
        """Take the lease if the stored (owner, token) is still the row's; token + 1. None: somebody was faster."""
        lease = Lease(mapping, row.shard, owner, row.token + 1)
        if (stored := self._seen(mapping, row)) is not None:
            self._rows[mapping, row.shard] = replace(stored, owner=owner, token=lease.token, wanted_by=None)
            return lease
        return lease if self._held(lease) is not None else None  # it is when this is a repeat

    async def save(self, changes: Sequence[tuple[Lease, Checkpoint]]) -> Sequence[Lease]:
        """Write checkpoints, all at once; answers the leases that are no longer held (not written)."""
        stale = []
        saved = {}
        for lease, checkpoint in changes:
            row = self._held(lease)
            if row is None:
                stale.append(lease)
            else:
                saved[lease.mapping, lease.shard] = replace(row, checkpoint=checkpoint)
        self._rows.update(saved)
        return stale

    async def release(self, lease: Lease, checkpoint: Checkpoint | None, to: str | None = None) -> bool:
        """Write the last checkpoint, if any, and give the lease up, or hand it over. False: it was no longer held."""
        key = (lease.mapping, lease.shard)
        token = lease.token + (to is not None)
        row = self._held(lease)
        if row is not None:
            now = checkpoint or row.checkpoint
            self._rows[key] = replace(row, owner=to, token=token, checkpoint=now, wanted_by=None)
            return True
        row = self._rows.get(key)  # done already when this is a repeat
        return row is not None and (row.owner, row.token) == (to, token) and checkpoint in {None, row.checkpoint}

    async def request(self, mapping: MappingId, row: Row, member: str) -> bool:
        """Ask the owner to hand the shard over to `member`. False: (owner, token) is no longer the row's."""
        if (stored := self._seen(mapping, row)) is None:
            return False
        self._rows[mapping, row.shard] = replace(stored, wanted_by=member)
        return True

    async def beat(self, member: Member) -> None:
        """Write what a member says of itself. TypeError, ValueError: its `info` is not JSON."""
        self._members[member.id] = (member.beat, json.dumps(dict(member.info), allow_nan=False))

    async def members(self) -> dict[str, Member]:
        """Every member that has not left, by id."""
        return {name: Member(name, beat, json.loads(info)) for name, (beat, info) in sorted(self._members.items())}

    async def leave(self, member: str) -> None:
        """Forget a member; absent is fine."""
        self._members.pop(member, None)

    async def forget(self, mapping: MappingId, shards: Sequence[ShardId] | None = None) -> None:
        """Delete the rows of a mapping, or of some of its shards."""
        if shards is None:
            shards = [shard for owner, shard in self._rows if owner == mapping]
        for shard in shards:
            self._rows.pop((mapping, shard), None)

    async def mappings(self) -> Sequence[MappingId]:
        """Every mapping that has rows, in order."""
        return sorted({mapping for mapping, _ in self._rows})

    async def restore(
        self,
        rows: Mapping[MappingId, Sequence[Row]],
        leases: Sequence[Lease],
        documents: Mapping[str, Mapping[str, Any] | None],
    ) -> bool:
        """Put these rows in place of all that these mappings have, and documents (None: deleted), all or none. False:
        `leases` are not all their rows, or one is lost.
        """
        texts = {
            key: json.dumps(document, allow_nan=False) for key, document in documents.items() if document is not None
        }
        held = {(lease.mapping, lease.shard) for lease in leases if self._held(lease) is not None}
        if len(held) < len(leases) or held != {key for key in self._rows if key[0] in rows}:
            return False
        kept = {key: row for key, row in self._rows.items() if key[0] not in rows}
        self._rows = kept | {(mapping, row.shard): row for mapping, put in rows.items() for row in put}
        self._documents = {key: text for key, text in self._documents.items() if key not in documents} | texts
        return True

    async def put_document(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep a JSON document under a key. TypeError, ValueError: it is not JSON."""
        self._documents[key] = json.dumps(document, allow_nan=False)

    async def delete_document(self, key: str) -> None:
        """Forget a document; absent is fine."""
        self._documents.pop(key, None)

    async def documents(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Every document whose key starts with the prefix, by key."""
        return {key: json.loads(text) for key, text in sorted(self._documents.items()) if key.startswith(prefix)}

    async def document_keys(self, prefix: str) -> Sequence[str]:
        """Every key that starts with the prefix, in order."""
        return sorted(key for key in self._documents if key.startswith(prefix))

    async def prune_documents(self, prefix: str, keep: int) -> None:
        """Delete all but the last `keep` documents, in the order of their keys, whose key starts with the prefix."""
        found = await self.document_keys(prefix)
        for key in found[: max(0, len(found) - keep)]:
            del self._documents[key]

    async def close(self) -> None:
        """Nothing is open."""

    def _seen(self, mapping: MappingId, row: Row) -> Row | None:
        """The row as it is stored, if its owner and token are still those."""
        stored = self._rows.get((mapping, row.shard))
        return stored if stored is not None and (stored.owner, stored.token) == (row.owner, row.token) else None

    def _held(self, lease: Lease) -> Row | None:
        """The row, while the lease is the right to write it. The owner counts too: a released lease is none."""
        row = self._rows.get((lease.mapping, lease.shard))
        return row if row is not None and (row.owner, row.token) == (lease.owner, lease.token) else None


def _key(item: tuple[tuple[MappingId, ShardId], Row]) -> tuple[MappingId, ShardId]:
    return item[0]
