"""What stores hold and other programs' tables: exported positions, KCL leases, rows that somebody edited."""

import json
import sqlite3
from functools import partial
from typing import Any

from poller import kcl
from poller.checkpoints import Checkpoints
from poller.core.model import BatchPolicy, Listing, Mapping, Position, PositionKind, RetryPolicy, Row, Shard
from poller.errors import ConfigError, PollerError, StoreUnavailable
from poller.stores import dynamolayout, sqlite, sqlite_file
from poller.stores.memory import MemoryStore
from tests.fuzz.kit import Target, refused, run, silent
from tests.fuzz.streams import FUNCTION, KINESIS

_UUID = "0b0e8a54-7a53-4b9e-9d1c-2f7a8c3c5d11"
_MAPPING = Mapping(
    _UUID, KINESIS, FUNCTION, BatchPolicy(100), RetryPolicy(), Position(PositionKind.TRIM_HORIZON), enabled=False
)
_COLUMNS = "shard, position_kind, position_value, resume, tumbling, owner, token, parents, updated_at, wanted_by"


def _check(row: Row) -> None:
    """A row that the runtime can work with."""
    checkpoint = row.checkpoint
    match checkpoint.position:
        case Position(PositionKind.AT | PositionKind.AFTER, value):
            assert int(value) >= 0
        case Position(PositionKind.AT_TIMESTAMP, value):
            assert float(value) >= 0
        case Position(PositionKind.LATEST, value):
            assert not value or float(value) >= 0
        case Position(_, value):
            assert value == ""
    assert all(isinstance(floor, int) for vector in checkpoint.resume for floor in vector)
    assert all(vector for vector in checkpoint.resume)
    assert all(isinstance(parent, str) for parent in row.parents)


def exported(document: bytes) -> None:
    """What `poller checkpoints import` reads: refused with words, or put in as it is."""
    text = document.decode(errors="replace")

    async def work() -> None:
        store = MemoryStore()
        checkpoints = Checkpoints(store, [_MAPPING], has_daemon=False)
        try:
            await checkpoints.restore(text, "FILE", force=True)
        except ConfigError as error:
            refused(error, "FILE: ")
            return
        for uuid in await store.mappings():
            for row in (await store.load(uuid)).values():
                _check(row)
        again = MemoryStore()
        whole = json.dumps(await checkpoints.export())
        await Checkpoints(again, [_MAPPING], has_daemon=False).restore(whole, "FILE", force=True)
        for uuid in await store.mappings():
            assert await again.load(uuid) == await store.load(uuid)

    run(work())


def leases(document: bytes) -> None:
    """The items of a KCL lease table, one a line."""
    try:
        items = [json.loads(line) for line in document.splitlines()]
        if not all(map(_is_item, items)):
            return
    except (ValueError, RecursionError):
        return
    try:
        found = [lease for item in items if (lease := kcl.lease_of(item)) is not None]
        found = kcl.of_stream(found, KINESIS, "1780000000")
        listing = Listing((Shard("shardId-0", (), True), Shard("shardId-1", ("shardId-0",), False)), 1.78e9)
        taken = kcl.plan(found, listing, Position(PositionKind.TRIM_HORIZON))
    except PollerError as error:
        silent(error)
        return
    for _, position in taken.positions():
        if position.kind in {PositionKind.AT, PositionKind.AFTER}:
            assert int(position.value) >= 0


def _is_item(item: Any) -> bool:
    """DynamoDB gives names with values, each of one type."""
    return isinstance(item, dict) and all(map(_is_value, item.values()))


def _is_value(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    [(kind, inner)] = value.items()
    match kind:
        case "S":
            return _is_text(inner)
        case "N":
            return isinstance(inner, str) and _is_number(inner)
        case "SS":
            return isinstance(inner, list) and bool(inner) and all(map(_is_text, inner))
        case "L":
            return isinstance(inner, list) and all(map(_is_value, inner))
        case "M":
            return _is_item(inner)
        case _:
            return False


def _is_text(value: Any) -> bool:
    """DynamoDB's are UTF-8."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _is_number(text: str) -> bool:
    """As DynamoDB has them."""
    try:
        json.loads(text)
        return len(text) <= 45 and abs(float(text)) < 1e126 and text.isascii()
    except ValueError:
        return False


def item(document: bytes) -> None:
    """An item of our DynamoDB table, perhaps edited."""
    try:
        found = json.loads(document)
    except (ValueError, RecursionError):
        return
    if not _is_item(found) or "S" not in found.get("leaseKey", {}):
        return
    try:
        _check(dynamolayout.row_of("m", found, ""))
    except StoreUnavailable as error:
        silent(error)
    try:
        dynamolayout.member_of(found)
    except StoreUnavailable as error:
        silent(error)
    try:
        assert isinstance(dynamolayout.parsed("name", found.get("info", {}).get("S", "{}")), dict)
    except StoreUnavailable as error:
        silent(error)


def row(document: bytes) -> None:
    """A row of our SQLite file, perhaps edited: its columns as a JSON list; the last two lines a document and info."""
    try:
        columns = json.loads(document.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return
    if not isinstance(columns, list) or len(columns) != _COLUMNS.count(",") + 1:
        return
    more = document.decode(errors="replace").split("\n")[1:3]
    connection = sqlite3.connect(":memory:")
    try:
        for statements in sqlite_file.MIGRATIONS:
            for statement in statements:
                connection.execute(statement)
        try:
            holes = ", ".join("?" * len(columns))
            connection.execute(f"INSERT INTO shards (mapping, {_COLUMNS}) VALUES ('m', {holes})", columns)
            for name, text in zip(("documents", "members"), more, strict=False):
                values = ("d", text) if name == "documents" else ("m", 1, text)
                connection.execute(f"INSERT INTO {name} VALUES ({'?, ' * len(values)}'2026-06-01')", values)
        except (sqlite3.Error, OverflowError, UnicodeEncodeError):
            return
        for read in (
            partial(sqlite._load, connection, "m"),
            partial(sqlite._documents, connection, ""),
            partial(sqlite._members, connection),
        ):
            try:
                found = read()
            except StoreUnavailable as error:
                silent(error)
                continue
            for each in found.values():
                if isinstance(each, Row):
                    _check(each)
                elif read.func is sqlite._documents:
                    assert isinstance(each, dict)
    finally:
        connection.close()


TARGET = Target("documents", {"exported": exported, "lease": leases, "item": item, "row": row})
