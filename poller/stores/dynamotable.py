"""One DynamoDB table: its calls, what goes wrong with them in words, and texts that are larger than an item may be.

Items are what DynamoDB's JSON has for them: `{"leaseCounter": {"N": "7"}}`. Every read is consistent.
"""

import asyncio
import base64
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

from poller.aws.errors import ErrorTable, translated
from poller.aws.lean import LeanClient
from poller.aws.session import AwsClients
from poller.clock import system_random
from poller.errors import (
    AccessDenied,
    ConfigError,
    PollerError,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
    StoreIncompatible,
    StoreUnavailable,
)
from poller.settings import DynamoStoreSettings

SCHEMA = 1
"""Of the items. An attribute more does not raise it: releases of one schema share a table."""
TRANSACTION_ITEMS = 100  # AWS's limit
TRANSACTION_BYTES = 3_500_000  # of 4 MB
PART_BYTES = 350 * 1024  # an item may have 400 KB

CALL_TIMEOUT = 3.0  # of one try
_TRIES_WITHIN = 1.5  # no try begins later than that
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0
_TABLE_TIMEOUT = 60.0  # until a new table is usable; AWS takes about ten seconds
_PLAIN_CHARS = 4096  # longer texts are compressed: a write is paid by the kilobyte
_THREAD_CHARS = 65_536  # longer texts are compressed beside the event loop
_KEYS = (("scope", "HASH", "S"), ("leaseKey", "RANGE", "S"))

Value: TypeAlias = dict[str, Any]
Item: TypeAlias = dict[str, Value]


class ConditionFailed(PollerError):  # noqa: N818
    """The item is not as the write's condition says: nothing was written."""


class Cancelled(PollerError):  # noqa: N818
    """A condition failed in a transaction, or another write was in its way: nothing was written. Look again."""


class _InUse(PollerError):  # noqa: N818
    """The table is there, or is being made by somebody else."""


class _Refused(PollerError):  # noqa: N818
    """AWS does not take the request: asked again it would not either."""


_ERRORS: ErrorTable = {
    "ConditionalCheckFailedException": ConditionFailed,
    "ReplicatedWriteConflictException": SourceThrottled,
    "ResourceInUseException": _InUse,
    "TransactionCanceledException": Cancelled,
    "TransactionConflictException": SourceThrottled,
    "TransactionInProgressException": SourceThrottled,
    "ValidationException": _Refused,
}


class Text(NamedTuple):
    """A text as it is stored. `value`: {"S": text}, {"B": zlib}, or {"M": ...} that names the items with its parts,
    which are written before whatever refers to them.
    """

    value: Value
    parts: tuple[bytes, ...] = ()


def key(scope: str, name: str) -> Item:
    """An item's key."""
    return {"scope": {"S": scope}, "leaseKey": {"S": name}}


def name_of(item: Item) -> str:
    """The sort key of an item."""
    name: str = item["leaseKey"]["S"]
    return name


def pack(text: str) -> Text:
    """Plain while it is short, compressed when it is longer, in parts when it fits no item."""
    if len(text) <= _PLAIN_CHARS:
        return Text({"S": text})
    data = zlib.compress(text.encode())
    if len(data) <= PART_BYTES:
        return Text(_binary(data))
    parts = tuple(data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES))
    return Text({"M": {"generation": {"S": uuid4().hex}, "parts": {"N": str(len(parts))}}}, parts)


def _binary(data: bytes) -> Value:
    return {"B": base64.b64encode(data).decode()}


class Table:
    """Calls to the table. Whatever goes wrong is StoreUnavailable, with a sentence that names table and Region.

    The table is looked at before the first call: it is made then, if `create` says so. Later a table that is missing
    is an error and not a fresh start. A throttled call, and one without an answer, is repeated for a second or two.
    """

    def __init__(self, clients: AwsClients, settings: DynamoStoreSettings) -> None:
        self.name = settings.table
        self.calls: Counter[str] = Counter()
        """Requests by DynamoDB operation, repeats included."""
        self._clients = clients
        self._settings = settings
        self._region = settings.region
        self._lean: LeanClient | None = None
        self._random = system_random()
        self._opening = asyncio.Lock()
        self._is_open = False

    # --- items

    async def get(self, item_key: Item) -> Item | None:
        """One item."""
        answer = await self.call("GetItem", {"Key": item_key, "ConsistentRead": True})
        item: Item | None = answer.get("Item")
        return item

    async def query(self, scope: str, prefix: str = "", *, only_names: bool = False) -> list[Item]:
        """Every item of a scope whose name begins with the prefix, every page of them."""
        names, values = {"#scope": "scope"}, {":scope": {"S": scope}}
        condition = "#scope = :scope"
        if prefix or only_names:
            names["#leaseKey"] = "leaseKey"
        if prefix:
            values[":prefix"] = {"S": prefix}
            condition += " AND begins_with(#leaseKey, :prefix)"
        request = {
            "KeyConditionExpression": condition,
            "ExpressionAttributeNames": names,
            "ExpressionAttributeValues": values,
        }
        if only_names:
            request["ProjectionExpression"] = "#leaseKey"
        return await self._pages("Query", request)

    async def scopes(self, prefix: str) -> set[str]:
        """Every scope that begins with the prefix. Reads the whole table."""
        found = await self._pages(
            "Scan",
            {
                "FilterExpression": "begins_with(#scope, :prefix)",
                "ProjectionExpression": "#scope",
                "ExpressionAttributeNames": {"#scope": "scope"},
                "ExpressionAttributeValues": {":prefix": {"S": prefix}},
            },
        )
        return {item["scope"]["S"] for item in found}

    async def put(self, item: Item, *, only_new: bool = False) -> Item:
        """Write an item whole; answers the one that it replaces, or an empty one. ConditionFailed: it is not new."""
        request: dict[str, Any] = {"Item": item, "ReturnValues": "ALL_OLD"}
        if only_new:
            request["ConditionExpression"] = "attribute_not_exists(leaseKey)"
        old: Item = (await self.call("PutItem", request)).get("Attributes", {})
        return old

    async def update(self, request: Mapping[str, Any]) -> Item:
        """Change an item; answers what the changed attributes were. ConditionFailed."""
        old: Item = (await self.call("UpdateItem", {**request, "ReturnValues": "UPDATED_OLD"})).get("Attributes", {})
        return old

    async def delete(self, item_key: Item) -> None:
        """Delete an item and the parts of its texts; absent is fine."""
        old: Item = (await self.call("DeleteItem", {"Key": item_key, "ReturnValues": "ALL_OLD"})).get("Attributes", {})
        for value in old.values():
            await self.drop(value)

    async def transact(self, actions: Sequence[Mapping[str, Any]]) -> None:
        """Do all of them or none: at most TRANSACTION_ITEMS. Cancelled."""
        named = [{kind: {"TableName": self.name, **body} for kind, body in action.items()} for action in actions]
        # By the token AWS knows a repeat: it is answered as the first was.
        await self._ready()
        await self._send("TransactWriteItems", {"TransactItems": named, "ClientRequestToken": str(uuid4())})

    # --- texts

    async def write(self, text: str, of: str) -> Text:
        """The text as it is to be stored; its parts are in the table by then. `of`: what it belongs to, for people."""
        packed = pack(text) if len(text) <= _THREAD_CHARS else await asyncio.to_thread(pack, text)
        for number, part in enumerate(packed.parts):
            await self.put({**_part_key(packed.value, number), "of": {"S": of}, "part": _binary(part)})
        return packed

    async def read(self, value: Value) -> str | None:
        """A stored text; None when its parts are gone, because what refers to them was written anew meanwhile."""
        try:
            if "S" in value:
                return str(value["S"])
            if "B" in value:
                data = base64.b64decode(value["B"])
            else:
                parts = await self.query(_part_scope(value))
                if len(parts) != int(value["M"]["parts"]["N"]):
                    return None
                data = b"".join(base64.b64decode(part["part"]["B"]) for part in parts)
            return await asyncio.to_thread(_decompress, data) if len(data) > _THREAD_CHARS else _decompress(data)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise StoreUnavailable(f"{self._where} holds a damaged text: {error}.") from error

    async def drop(self, value: Value | None) -> None:
        """Delete the parts of a stored text that nothing refers to any more."""
        if value is not None and "generation" in value.get("M", {}):
            for number in range(int(value["M"]["parts"]["N"])):
                await self.call("DeleteItem", {"Key": _part_key(value, number)})

    # --- calls

    async def call(self, operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request on this table. ConditionFailed, StoreUnavailable, StoreIncompatible."""
        await self._ready()
        return await self._send(operation, {"TableName": self.name, **request})

    async def pause(self, tries: int) -> None:
        """Before something is tried again; `tries` so far, from 1."""
        await asyncio.sleep(self._pause(tries))

    def _pause(self, tries: int) -> float:
        return self._random.uniform(0.0, min(_FIRST_PAUSE * 2**tries, _LAST_PAUSE))

    async def _pages(self, operation: str, request: Mapping[str, Any]) -> list[Item]:
        found: list[Item] = []
        page: dict[str, Any] = {}
        while True:
            answer = await self.call(operation, {**request, **page, "ConsistentRead": True})
            if not isinstance(answer.get("Items"), list):
                raise StoreUnavailable(f"{self._where}: the answer to {operation} cannot be read.")
            found += answer["Items"]
            if "LastEvaluatedKey" not in answer:
                return found
            page = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}

    async def _send(self, operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._in_words(operation):
            return await self._ask(operation, request)

    @contextmanager
    def _in_words(self, operation: str) -> Iterator[None]:
        """What a call raises, as a sentence for a person."""
        try:
            yield
        except (SourceThrottled, SourceUnavailable, _Refused) as error:
            raise StoreUnavailable(f"{self._where} cannot be used now ({error}).") from None
        except SourceGone as error:
            raise StoreUnavailable(f"{self._where} does not exist ({error}).") from None
        except AccessDenied as error:
            raise StoreUnavailable(
                f"{self._where}: access denied ({error}); the poller's credentials need dynamodb:{operation} on it."
            ) from None
        except ConfigError as error:
            raise StoreUnavailable(f"{self._where}: {error}.") from None

    async def _ask(self, operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request, repeated for a moment when it is throttled or has no answer."""
        body = json.dumps(request).encode()
        loop = asyncio.get_running_loop()
        last_at = loop.time() + _TRIES_WITHIN
        tries = 0
        while True:
            tries += 1
            pause = self._pause(tries)
            try:
                return await self._try(operation, body)
            except (SourceThrottled, SourceUnavailable):
                if loop.time() + pause > last_at:
                    raise
            await asyncio.sleep(pause)

    async def _try(self, operation: str, body: bytes) -> dict[str, Any]:
        with translated(operation, _ERRORS):
            if self._lean is None:
                client = await self._clients.client("dynamodb", self._settings.region)
                region: str = client.meta.region_name
                self._lean, self._region = await self._clients.lean("dynamodb", region), region
            self.calls[operation] += 1
            answer = await self._lean.call(f"DynamoDB_20120810.{operation}", body, CALL_TIMEOUT)
        try:
            parsed = json.loads(answer)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise SourceUnavailable(f"{operation}: the answer is cut off or not JSON")
        return parsed

    @property
    def _where(self) -> str:
        return f"The store's table {self.name} in {self._region or 'the default Region'}"

    # --- the table itself

    async def check(self) -> str | None:
        """Can it be used with these credentials? None, or the reason why not. Nothing is made."""
        try:
            self._judge(await self._describe())
        except (StoreIncompatible, StoreUnavailable) as error:
            return str(error)
        return None

    async def _ready(self) -> None:
        if self._is_open:
            return
        async with self._opening:
            if not self._is_open:
                await self._find()
                await self._agree()
                self._is_open = True

    async def _find(self) -> None:
        """Return when the table is there and is ours; make it if we may."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _TABLE_TIMEOUT
        pause = _FIRST_PAUSE
        while True:
            found = await self._describe()
            self._judge(found)
            status = await self._create() if found is None else found.get("TableStatus")
            if status in {"ACTIVE", "UPDATING"}:
                return
            if status not in {"CREATING", "DELETING"} or loop.time() > end:
                raise StoreUnavailable(f"{self._where} has the status {status}.")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    async def _describe(self) -> dict[str, Any] | None:
        """What DescribeTable says; None when there is no such table."""
        with self._in_words("DescribeTable"):
            try:
                answer = await self._ask("DescribeTable", {"TableName": self.name})
            except SourceGone:
                return None
        found = answer.get("Table")
        if not isinstance(found, dict):
            raise StoreUnavailable(f"{self._where}: the answer to DescribeTable cannot be read.")
        return found

    def _judge(self, found: Mapping[str, Any] | None) -> None:
        """StoreUnavailable: it is missing and we may not make it. StoreIncompatible: it is another program's."""
        if found is None:
            if not self._settings.create:
                raise StoreUnavailable(
                    f"{self._where} does not exist. Make it with the partition key scope and the sort key leaseKey, "
                    f"both strings, or let the poller make it: dynamodb://{self.name}?create=true."
                )
            return
        types = {each["AttributeName"]: each["AttributeType"] for each in found.get("AttributeDefinitions", [])}
        keys = {(each["AttributeName"], each["KeyType"]) for each in found.get("KeySchema", [])}
        if {(name, kind, types.get(name)) for name, kind in keys} != set(_KEYS):
            has = ", ".join(f"{name} ({kind}, {types.get(name)})" for name, kind in sorted(keys)) or "none"
            raise StoreIncompatible(
                f"{self._where} is of another program: its keys are {has}, and the poller's are scope (HASH, S), "
                "leaseKey (RANGE, S). Name another table in `store`."
            )

    async def _create(self) -> str:
        """Ask for the table; its status. Somebody else may have: then that one is it."""
        request = {
            "TableName": self.name,
            "KeySchema": [{"AttributeName": name, "KeyType": kind} for name, kind, _ in _KEYS],
            "AttributeDefinitions": [{"AttributeName": name, "AttributeType": letter} for name, _, letter in _KEYS],
            "BillingMode": "PAY_PER_REQUEST",
        }
        try:
            answer = await self._send("CreateTable", request)
        except _InUse:
            return "CREATING"
        return str(answer.get("TableDescription", {}).get("TableStatus", "CREATING"))

    async def _agree(self) -> None:
        """The schema that the table's items have. StoreIncompatible: a newer one than ours."""
        item = {**key("schema", "version"), "version": {"N": str(SCHEMA)}}
        request = {"TableName": self.name, "Key": key("schema", "version"), "ConsistentRead": True}
        found = (await self._send("GetItem", request)).get("Item")
        if found is None:
            condition = {"ConditionExpression": "attribute_not_exists(leaseKey)"}
            with suppress(ConditionFailed):  # somebody else was as fast, and of this very release or a newer one
                await self._send("PutItem", {"TableName": self.name, "Item": item, **condition})
                return
            found = (await self._send("GetItem", request)).get("Item") or item
        version = found.get("version", {}).get("N", "without a number")
        if version != str(SCHEMA):
            raise StoreIncompatible(
                f"{self._where} has version {version}, this poller reads version {SCHEMA}. "
                "Run a newer poller, or name another table in `store`."
            )


def _part_scope(value: Value) -> str:
    return f"part/{value['M']['generation']['S']}"


def _part_key(value: Value, number: int) -> Item:
    return key(_part_scope(value), f"{number:05}")


def _decompress(data: bytes) -> str:
    return zlib.decompress(data).decode()
