"""The control plane: file, API and store, and operations that meet."""

import asyncio

import pytest
import structlog

from poller.control import ControlPlane
from poller.errors import ApiError
from poller.mappings import normalize
from poller.settings import Declared, HttpFunction, Settings
from poller.stores.memory import MemoryStore

QUEUE = "arn:aws:sqs:eu-west-1:123456789012:orders"
STREAM = "arn:aws:kinesis:eu-west-1:123456789012:stream/orders"
MAKE = {"EventSourceArn": QUEUE, "FunctionName": "f"}
DECLARED = normalize({"EventSourceArn": STREAM, "FunctionName": "f", "StartingPosition": "LATEST"})


class Supervisor:
    """Remembers what is wanted; a removed mapping is gone when `finish` says so."""

    def __init__(self) -> None:
        self.wanted = {}
        self.removed: list[tuple[str, bool]] = []
        self.gone: set[str] = set()

    def want(self, wanted) -> None:
        self.wanted[wanted.mapping.id] = wanted

    def remove(self, mapping: str, *, forget: bool) -> None:
        self.wanted.pop(mapping)
        self.removed.append((mapping, forget))

    def state(self, mapping: str) -> str | None:
        if mapping in self.wanted:
            return "Enabled" if self.wanted[mapping].mapping.enabled else "Disabled"
        return None if mapping in self.gone else "Deleting"

    def last_result(self, _: str) -> str:
        return "OK"


class SlowStore(MemoryStore):
    """Every write takes a few turns of the loop, so that operations can meet."""

    async def put_document(self, key, document) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        await super().put_document(key, document)

    async def delete_document(self, key) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        await super().delete_document(key)


def settings(*declared: Declared, **functions) -> Settings:
    known = {"f": HttpFunction("f", "http://127.0.0.1:1/")}
    return Settings("poller.yaml", functions={**known, **functions}, mappings=declared)


@pytest.fixture
async def control() -> ControlPlane:
    made = ControlPlane(SlowStore(), Supervisor())
    await made.load(settings(Declared("u-1", DECLARED, 3)))
    return made


async def test_concurrent_creates_make_one_mapping(control) -> None:
    """The others are told that it exists: two would deliver everything twice."""
    results = await asyncio.gather(*(control.create(MAKE) for _ in range(3)), return_exceptions=True)
    assert len([result for result in results if isinstance(result, dict)]) == 1
    refused = [result for result in results if isinstance(result, ApiError)]
    assert [(error.code, error.status) for error in refused] == [("ResourceConflictException", 409)] * 2
    assert f'An event source mapping with SQS arn (" {QUEUE} ") and function (" f ") already exists' in str(refused[0])


async def test_concurrent_updates_both_apply(control) -> None:
    """Neither overwrites what it did not name."""
    uuid = (await control.create(MAKE))["UUID"]
    await asyncio.gather(
        control.update(uuid, {"BatchSize": 5}), control.update(uuid, {"MaximumBatchingWindowInSeconds": 3})
    )
    made = control.get(uuid)
    assert (made["BatchSize"], made["MaximumBatchingWindowInSeconds"]) == (5, 3)


async def test_an_update_cannot_revive_what_is_being_deleted(control) -> None:
    """It is in use, then gone; nothing of it is kept."""
    uuid = (await control.create(MAKE))["UUID"]
    deleted, updated = await asyncio.gather(
        control.delete(uuid), control.update(uuid, {"BatchSize": 5}), return_exceptions=True
    )
    assert deleted["State"] == "Deleting"
    assert updated.code == "ResourceInUseException"
    assert [entry["UUID"] for entry in control.list()].count(uuid) == 1
    control._supervisor.gone.add(uuid)
    with pytest.raises(ApiError, match="does not exist"):
        control.get(uuid)
    assert not await control._store.documents("mapping/")


async def test_a_restart_finishes_a_delete(control) -> None:
    """A stop before the positions were gone: the next start deletes them, and only then forgets about it."""
    uuid = (await control.create(MAKE))["UUID"]
    await control.delete(uuid)
    store = control._store
    await store.put_document(f"stream/{uuid}", {})
    again = ControlPlane(store, Supervisor())
    await again.load(settings())
    assert not await store.documents("")


async def test_api_made_mappings_come_back(control) -> None:
    """They are kept in the store, with everything that was set."""
    uuid = (await control.create({**MAKE, "BatchSize": 3}))["UUID"]
    again = ControlPlane(control._store, Supervisor())
    await again.load(settings(Declared("u-1", DECLARED, 3)))
    assert again.get(uuid)["BatchSize"] == 3
    assert [entry["UUID"] for entry in again.list()] == ["u-1", uuid]


async def test_a_declared_mapping_is_the_files(control) -> None:
    """Delete and update are refused, naming the file; `Enabled` may be toggled, until the file's own changes."""
    for operation in (control.delete("u-1"), control.update("u-1", {"BatchSize": 5})):
        with pytest.raises(ApiError, match=r"declared in poller\.yaml"):
            await operation
    await control.update("u-1", {"Enabled": False, "BatchSize": 100})
    assert control.get("u-1")["State"] == "Disabled"
    await control.apply(settings(Declared("u-1", DECLARED, 3)))
    assert control.get("u-1")["State"] == "Disabled", "a reload of the same file keeps it"
    again = ControlPlane(control._store, Supervisor())
    await again.load(settings(Declared("u-1", DECLARED, 3)))
    assert again.get("u-1")["State"] == "Disabled", "a restart too"
    await control.apply(settings(Declared("u-1", {**DECLARED, "Enabled": False}, 3)))
    await control.apply(settings(Declared("u-1", DECLARED, 3)))
    assert control.get("u-1")["State"] == "Enabled", "the file's own Enabled has changed since"
    again = ControlPlane(control._store, Supervisor())
    await again.load(settings(Declared("u-1", DECLARED, 3)))
    assert again.get("u-1")["State"] == "Enabled"


async def test_a_mapping_that_left_the_file_stops_and_keeps_its_positions(control) -> None:
    """They stay until `poller checkpoints reset`."""
    await control.apply(settings())
    assert control._supervisor.removed == [("u-1", False)]
    with pytest.raises(ApiError):
        control.get("u-1")


async def test_a_changed_function_reaches_its_mappings(control) -> None:
    """Only they are wanted in another way."""
    before = control._supervisor.wanted["u-1"]
    await control.apply(settings(Declared("u-1", DECLARED, 3)))
    assert control._supervisor.wanted["u-1"] == before
    await control.apply(settings(Declared("u-1", DECLARED, 3), f=HttpFunction("f", "http://127.0.0.1:2/")))
    assert control._supervisor.wanted["u-1"] != before


async def test_a_third_reader_of_a_dynamodb_stream_is_warned_about(control) -> None:
    """It would be throttled, and so would the other two."""
    arn = "arn:aws:dynamodb:eu-west-1:123456789012:table/t/stream/2026-01-01T00:00:00.000"
    items = [
        Declared(f"u-{n}", normalize({"EventSourceArn": arn, "FunctionName": f"f{n}", "StartingPosition": "LATEST"}), n)
        for n in range(3)
    ]
    with structlog.testing.capture_logs() as logs:
        await control.apply(settings(*items[:2]))
    assert "stream_crowded" not in {entry["event"] for entry in logs}
    with structlog.testing.capture_logs() as logs:
        await control.apply(settings(*items))
    assert [entry["readers"] for entry in logs if entry["event"] == "stream_crowded"] == [3]
