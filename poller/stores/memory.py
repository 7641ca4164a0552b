"""A store that lives as long as its object: the same rules as the others, without a file.

For tests and the simulation: no thread, no clock, no wait, so a run repeats exactly.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from poller.core.model import Checkpoint, Lease, MappingId, Row, ShardId


class MemoryStore:
    """`CheckpointStore` in dictionaries. `close` keeps what it holds, so a simulated restart finds it again."""

    def __init__(self) -> None:
        self._rows: dict[tuple[MappingId, ShardId], Row] = {}
        self._documents: dict[str, str] = {}  # JSON text: what was put cannot change through a shared object

    async def create(self, mapping: MappingId, rows: Sequence[Row]) -> None:
        """Put each row that is absent; rows that exist stay as they are. All or none."""
        self._rows = {(mapping, row.shard): row for row in reversed(rows)} | self._rows

    async def load(self, mapping: MappingId) -> dict[ShardId, Row]:
        """Every row of a mapping, by shard id."""
        return {shard: row for (owner, shard), row in sorted(self._rows.items(), key=_key) if owner == mapping}

    async def acquire(self, mapping: MappingId, row: Row, owner: str) -> Lease | None:
        """Take the lease if the stored (owner, token) is still the row's; token + 1. None: somebody was faster."""
        key = (mapping, row.shard)
        stored = self._rows.get(key)
        if stored is None or (stored.owner, stored.token) != (row.owner, row.token):
            return None
        self._rows[key] = replace(stored, owner=owner, token=stored.token + 1)
        return Lease(mapping, row.shard, owner, stored.token + 1)

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

    async def release(self, lease: Lease, checkpoint: Checkpoint | None) -> bool:
        """Write the last checkpoint, if any, and give the lease up. False: it was no longer held."""
        row = self._held(lease)
        if row is None:
            return False
        self._rows[lease.mapping, lease.shard] = replace(row, owner=None, checkpoint=checkpoint or row.checkpoint)
        return True

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

    def _held(self, lease: Lease) -> Row | None:
        """The row, while the lease is the right to write it. The owner counts too: a released lease is none."""
        row = self._rows.get((lease.mapping, lease.shard))
        return row if row is not None and (row.owner, row.token) == (lease.owner, lease.token) else None


def _key(item: tuple[tuple[MappingId, ShardId], Row]) -> tuple[MappingId, ShardId]:
    return item[0]
