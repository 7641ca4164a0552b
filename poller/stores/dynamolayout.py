"""What a DynamoDB store keeps and asks for: rows, members and documents as items, changes as requests. No I/O."""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from poller.clock import wall_clock
from poller.core.model import Checkpoint, MappingId, Member, PositionKind, Row, ShardId, position_of, resume_of
from poller.errors import StoreUnavailable
from poller.stores.dynamotable import TRANSACTION_BYTES, TRANSACTION_ITEMS, Item, Value, key, name_of


def scope(mapping: MappingId) -> str:
    """Where the rows of a mapping are; of no mapping: how all these begin."""
    return f"mapping/{mapping}"


def to_json(document: Mapping[str, Any]) -> str:
    """TypeError, ValueError: it is not JSON."""
    return json.dumps(dict(document), allow_nan=False)


def number(value: float) -> Value:
    """A number of at most 38 digits."""
    return {"N": str(value)}


def moment(row: Row) -> float:
    """When a row that is restored was saved; now, when it does not say."""
    return row.saved_at if isfinite(row.saved_at) else wall_clock()


def is_at(item: Item, owner: str | None, token: int) -> bool:
    """Are the owner and the token of a row these?"""
    return (item.get("leaseOwner", {}).get("S"), item["leaseCounter"]["N"]) == (owner, str(token))


def holdings(mapping: MappingId, items: Mapping[ShardId, Item]) -> Iterator[tuple[MappingId, ShardId, str | None, int]]:
    """Who holds each row: its owner, its token."""
    for shard, item in items.items():
        yield mapping, shard, item.get("leaseOwner", {}).get("S"), int(item["leaseCounter"]["N"])


def lease_fields(row: Row) -> Item:
    """The attributes of a row but for its key and its checkpoint."""
    fields: Item = {"leaseCounter": number(row.token)}
    if row.parents:
        fields["parentShardId"] = {"L": [{"S": parent} for parent in row.parents]}
    if row.owner is not None:
        fields["leaseOwner"] = {"S": row.owner}
    if row.wanted_by is not None:
        fields["wantedBy"] = {"S": row.wanted_by}
    return fields


def position_fields(checkpoint: Checkpoint, saved_at: float) -> Item:
    """The attributes of a checkpoint but for its window. `checkpoint` is for tools that know KCL's tables, and cannot
    say that the record itself is still to be read (AT); `position` is what we go by.
    """
    position = checkpoint.position
    has_number = position.kind in {PositionKind.AT, PositionKind.AFTER}
    fields: Item = {
        "checkpoint": {"S": position.value if has_number else position.kind.value},
        "position": {"S": f"{position.kind} {position.value}" if position.value else position.kind.value},
        "savedAt": number(saved_at),
        "ownerSwitchesSinceCheckpoint": number(0),
    }
    if checkpoint.resume:
        fields["resume"] = {"S": json.dumps(checkpoint.resume)}  # DynamoDB's numbers have 38 digits
    return fields


def row_of(mapping: MappingId, item: Item, window: str) -> Row:
    """The row of an item; `window` as it was read. StoreUnavailable: somebody edited it into nonsense."""
    shard = name_of(item)
    try:
        kind, _, value = item["position"]["S"].partition(" ")
        return Row(
            shard,
            Checkpoint(position_of(kind, value), resume_of(item.get("resume", {"S": "[]"})["S"]), window),
            tuple(parent["S"] for parent in item.get("parentShardId", {"L": []})["L"]),
            item.get("leaseOwner", {"S": None})["S"],
            int(item["leaseCounter"]["N"]),
            float(item["savedAt"]["N"]),
            item.get("wantedBy", {"S": None})["S"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreUnavailable(f"The store's row of mapping {mapping}, shard {shard} is damaged: {error}.") from error


def member_of(item: Item) -> Member:
    """The member of an item. StoreUnavailable as for a row."""
    name = name_of(item)
    try:
        return Member(name, int(item["beat"]["N"]), parsed(name, item["info"]["S"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreUnavailable(f"The store's member {name} is damaged: {error}.") from error


def parsed(name: str, text: str) -> dict[str, Any]:
    """A document. StoreUnavailable as for a row."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreUnavailable(f"The store's document {name} is damaged: {error}.") from error
    if not isinstance(document, dict):
        raise StoreUnavailable(f"The store's document {name} is damaged: it is no JSON object.")
    return document


# --- what DynamoDB is asked for


def held(owner: str | None, token: int) -> dict[str, Any]:
    """The condition that a row's owner and token are these."""
    names = {"#leaseCounter": "leaseCounter", "#leaseOwner": "leaseOwner"}
    values = {":isCounter": number(token)}
    if owner is None:
        expression = "#leaseCounter = :isCounter AND attribute_not_exists(#leaseOwner)"
    else:
        expression = "#leaseCounter = :isCounter AND #leaseOwner = :isOwner"
        values[":isOwner"] = {"S": owner}
    return {
        "ConditionExpression": expression,
        "ExpressionAttributeNames": names,
        "ExpressionAttributeValues": values,
    }


def update(  # noqa: PLR0917
    mapping: MappingId,
    shard: ShardId,
    owner: str | None,
    token: int,
    sets: Mapping[str, Value],
    removes: Sequence[str],
    *,
    switches: bool = False,
) -> dict[str, Any]:
    """Change a row if its owner and token are these. `switches`: it changes hands and its checkpoint is not saved."""
    request = {"Key": key(scope(mapping), shard), **held(owner, token)}
    names, values = request["ExpressionAttributeNames"], request["ExpressionAttributeValues"]
    for name in [*sets, *removes]:
        names[f"#{name}"] = name
    values |= {f":{name}": value for name, value in sets.items()}
    expression = "SET " + ", ".join(f"#{name} = :{name}" for name in sets)
    if removes:
        expression += " REMOVE " + ", ".join(f"#{name}" for name in removes)
    if switches:
        names["#ownerSwitchesSinceCheckpoint"] = "ownerSwitchesSinceCheckpoint"
        values[":one"] = number(1)
        expression += " ADD #ownerSwitchesSinceCheckpoint :one"
    return {**request, "UpdateExpression": expression}


def put(item: Item, *, only_new: bool = False) -> dict[str, Any]:
    """An action of a transaction: write an item whole."""
    condition = {"ConditionExpression": "attribute_not_exists(leaseKey)"} if only_new else {}
    return {"Put": {"Item": item, **condition}}


def delete(item: Item) -> dict[str, Any]:
    """An action of a transaction: delete an item."""
    return {"Delete": {"Key": key(item["scope"]["S"], name_of(item))}}


def exchange(there: Mapping[ShardId, Item], wanted: Mapping[ShardId, Item]) -> Iterator[dict[str, Any]]:
    """Put the wanted rows in place of those that are there, as long as those are as they were."""
    for shard, item in there.items():
        condition = held(item.get("leaseOwner", {}).get("S"), int(item["leaseCounter"]["N"]))
        action = put(wanted[shard]) if shard in wanted else delete(item)
        yield {kind: {**body, **condition} for kind, body in action.items()}
    for shard, item in wanted.items():
        if shard not in there:
            yield put(item, only_new=True)


def chunks(actions: Sequence[dict[str, Any]], most: int = TRANSACTION_ITEMS) -> list[list[dict[str, Any]]]:
    """The actions in their order, as few transactions as they fit in."""
    chunks: list[list[dict[str, Any]]] = []
    size = 0
    for action in actions:
        size += (length := len(json.dumps(action)))
        if not chunks or len(chunks[-1]) >= most or size > TRANSACTION_BYTES:
            chunks.append([])
            size = length
        chunks[-1].append(action)
    return chunks
