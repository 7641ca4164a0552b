"""The control plane: file, API and store, and operations that meet."""

import asyncio
from dataclasses import replace

import pytest
import structlog

from poller.clock import wall_clock
from poller.control import ControlPlane
from poller.core.model import TRIM_HORIZON, Checkpoint, Row
from poller.errors import ApiError, StoreUnavailable
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
        self.begun: list[str] = []

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

    def seek(self, mapping: str) -> None:
        self.begun.append(mapping)


class Probe:
    """Knows what is not there."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.asked: list[str] = []

    async def source(self, source) -> None:
        self.asked.append(source.arn)
        if source.arn in self.missing:
            raise ApiError("InvalidParameterValueException", 400, f"Stream not found: {source.arn}")

    async def position(self, source, shard: str, sequence: str) -> None:
        self.asked.append(sequence)
        if sequence in self.missing:
            raise ApiError("InvalidParameterValueException", 400, f"sequence {sequence} is not in shard {shard}")

    async def function(self, function, region: str) -> None:
        self.asked.append(function.arn)
        if function.arn in self.missing:
            raise ApiError("InvalidParameterValueException", 400, "Function does not exist")


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
    made = ControlPlane(SlowStore(), Supervisor(), Probe())
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
    again = ControlPlane(store, Supervisor(), Probe())
    await again.load(settings())
    assert not await store.documents("")


async def test_api_made_mappings_come_back(control) -> None:
    """They are kept in the store, with everything that was set."""
    uuid = (await control.create({**MAKE, "BatchSize": 3}))["UUID"]
    again = ControlPlane(control._store, Supervisor(), Probe())
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
    again = ControlPlane(control._store, Supervisor(), Probe())
    await again.load(settings(Declared("u-1", DECLARED, 3)))
    assert again.get("u-1")["State"] == "Disabled", "a restart too"
    await control.apply(settings(Declared("u-1", {**DECLARED, "Enabled": False}, 3)))
    await control.apply(settings(Declared("u-1", DECLARED, 3)))
    assert control.get("u-1")["State"] == "Enabled", "the file's own Enabled has changed since"
    again = ControlPlane(control._store, Supervisor(), Probe())
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


# --- what an operator asks


async def test_create_asks_whether_function_and_source_are_there(control) -> None:
    """In AWS's order: the function first; nothing is asked about a request that is wrong in itself, or ours."""
    probe = control._probe
    probe.missing = {"gone", STREAM.replace("orders", "none")}
    with pytest.raises(ApiError, match="Function does not exist"):
        await control.create({**MAKE, "FunctionName": "gone", "EventSourceArn": QUEUE})
    stream = {"EventSourceArn": STREAM.replace("orders", "none"), "StartingPosition": "LATEST"}
    with pytest.raises(ApiError, match="Stream not found"):
        await control.create({**stream, "FunctionName": "f"})
    with pytest.raises(ApiError, match="Function does not exist"):
        await control.create({**stream, "FunctionName": "gone"})
    probe.asked.clear()
    with pytest.raises(ApiError):
        await control.create({**MAKE, "FunctionName": "gone", "BatchSize": 0})
    assert probe.asked == []
    await control.create(MAKE)
    assert probe.asked == [QUEUE], "a function of the file is there"


async def test_update_asks_for_another_function_only(control) -> None:
    """And a refused update changes nothing."""
    probe = control._probe
    uuid = (await control.create({**MAKE, "FunctionName": "real"}))["UUID"]
    probe.asked.clear()
    await control.update(uuid, {"BatchSize": 5})
    assert probe.asked == []
    probe.missing = {"gone"}
    with pytest.raises(ApiError, match="Function does not exist"):
        await control.update(uuid, {"FunctionName": "gone"})
    assert control.get(uuid)["FunctionArn"].endswith(":real")


async def test_pause_and_resume_by_name(control) -> None:
    """The same as Enabled through the API, for what the file declares too; kept over a restart."""
    with structlog.testing.capture_logs() as logs:
        assert await control.pause("f", "alice") == {"uuid": "u-1", "state": "Disabled"}
    assert [(entry["event"], entry["by"]) for entry in logs] == [("mapping_paused", "alice")]
    again = ControlPlane(control._store, Supervisor(), Probe())
    await again.load(settings(Declared("u-1", DECLARED, 3)))
    assert again.get("u-1")["State"] == "Disabled"
    assert (await control.resume("u-", "bob"))["state"] == "Enabled"
    with pytest.raises(ApiError, match="there is no mapping x") as caught:
        await control.pause("x", "alice")
    assert caught.value.status == 404
    await control.create(MAKE)
    with pytest.raises(ApiError, match="may be any of the mappings"):
        await control.pause("f", "alice")


@pytest.mark.parametrize(
    ("order", "kept"),
    [
        ({"position": "TRIM_HORIZON"}, ("TRIM_HORIZON", "", "")),
        ({"position": "AT_TIMESTAMP", "timestamp": 1000}, ("AT_TIMESTAMP", "1000.0", "")),
        ({"shard": "s-1", "sequence": "77"}, ("AT_SEQUENCE_NUMBER", "77", "s-1")),
    ],
)
async def test_seek_leaves_an_order_in_the_store(control, order, kept) -> None:
    """Durable before anything stops, with who gave it."""
    await control._store.create("u-1", [Row("s-1", Checkpoint(TRIM_HORIZON))])
    assert (await control.seek("u-1", order, "alice"))["uuid"] == "u-1"
    [found] = (await control._store.documents("seek/")).values()
    assert (found["kind"], found["value"], found["shard"], found["by"]) == (*kept, "alice")
    assert control._supervisor.begun == ["u-1"]


async def test_seek_to_latest_is_the_moment_of_the_order(control) -> None:
    """Carried out an hour later it must not pass over that hour."""
    await control.seek("u-1", {"position": "LATEST"}, "alice")
    [order] = (await control._store.documents("seek/u-1/")).values()
    assert order["kind"] == "AT_TIMESTAMP"
    assert abs(float(order["value"]) - wall_clock()) < 60


async def test_orders_are_kept_one_by_one_in_their_order(control) -> None:
    """Each is carried out, and forgotten, by itself: one that comes while another is carried out is not lost."""
    await control._store.create("u-1", [Row(name, Checkpoint(TRIM_HORIZON)) for name in "ab"])
    for order in ({"shard": "b", "sequence": "5"}, {"shard": "a", "sequence": "5"}, {"position": "TRIM_HORIZON"}):
        await control.seek("u-1", order, "alice")
    assert [order["shard"] for order in (await control._store.documents("seek/u-1/")).values()] == ["b", "a", ""]


async def test_a_record_that_is_not_there_is_no_position(control) -> None:
    """A mistyped number would begin anywhere: it is asked for when the order is given."""
    await control._store.create("u-1", [Row("a", Checkpoint(TRIM_HORIZON))])
    control._probe.missing = {"55"}
    with pytest.raises(ApiError, match="sequence 55 is not in shard a"):
        await control.seek("u-1", {"shard": "a", "sequence": "55"}, "alice")
    assert not await control._store.documents("seek/")


async def test_a_delete_that_the_store_cuts_short_is_finished_by_the_next_start(control) -> None:
    """The mapping is gone all the same: with its document and without its positions it would deliver everything again."""
    uuid = (await control.create(MAKE))["UUID"]
    delete = control._store.delete_document

    async def fail(key: str) -> None:
        raise StoreUnavailable("away")

    control._store.delete_document = fail
    await control.delete(uuid)
    control._store.delete_document = delete
    again = ControlPlane(control._store, Supervisor(), Probe())
    await again.load(settings(Declared("u-1", DECLARED, 3)))
    assert [one["UUID"] for one in again.list()] == ["u-1"]
    assert not await control._store.documents("mapping/")


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ({}, "give "),
        ({"position": "MIDDLE"}, "give "),
        ({"position": "TRIM_HORIZON", "timestamp": 5}, "give "),
        ({"position": "AT_TIMESTAMP"}, "give "),
        ({"position": "AT_TIMESTAMP", "timestamp": True}, "give "),
        ({"position": "AT_TIMESTAMP", "timestamp": 9e12}, "not a moment of the past"),
        ({"position": "AT_TIMESTAMP", "timestamp": float("nan")}, "not a moment of the past"),
        ({"shard": "s-1"}, "belong together"),
        ({"sequence": "5"}, "belong together"),
        ({"shard": "s-1", "sequence": 5}, "belong together"),
        ({"shard": "s-1", "sequence": "5x"}, "belong together"),
        ({"shard": "s-1", "sequence": "5", "position": "LATEST"}, "either"),
        ({"shard": "none", "sequence": "5"}, "has no shard none"),
        ({"positon": "LATEST"}, "unknown member positon"),
    ],
)
async def test_an_order_that_makes_no_sense_is_refused(control, order, text) -> None:
    """With a sentence, and nothing is stored."""
    with pytest.raises(ApiError, match=text) as caught:
        await control.seek("u-1", order, "alice")
    assert caught.value.status == 400
    assert not await control._store.documents("seek/")


async def test_a_queue_has_no_positions(control) -> None:
    """Said, whatever the order."""
    uuid = (await control.create(MAKE))["UUID"]
    with pytest.raises(ApiError, match="a queue has no positions"):
        await control.seek(uuid, {"position": "TRIM_HORIZON"}, "alice")


async def test_a_start_knows_what_is_still_to_be_moved(control) -> None:
    """A paused mapping shows it, and a deleted one leaves no order behind."""
    await control.seek("u-1", {"position": "TRIM_HORIZON"}, "alice")
    again = ControlPlane(control._store, Supervisor(), Probe())
    await again.load(settings(Declared("u-1", DECLARED, 3)))
    assert again._supervisor.begun == ["u-1"]


# --- a fleet


async def member(store, **changes) -> ControlPlane:
    """Another daemon with the same store and, unless said otherwise, the same file."""
    made = ControlPlane(store, Supervisor(), Probe(), is_alone=False)
    await made.load(replace(settings(Declared("u-1", DECLARED, 3)), **changes))
    return made


async def test_what_one_member_was_told_the_others_follow() -> None:
    """Made, changed, switched off and deleted through one of them."""
    store = SlowStore()
    one, two = await member(store), await member(store)
    uuid = (await one.create(MAKE))["UUID"]
    await two.follow()
    assert two.get(uuid)["BatchSize"] == 10
    await one.update(uuid, {"BatchSize": 3})
    await one.pause("u-1", "alice")
    await two.follow()
    assert two.get(uuid)["BatchSize"] == 3
    assert two._supervisor.wanted[uuid].mapping.batch.size == 3
    assert two.get("u-1")["State"] == "Disabled"
    await one.delete(uuid)
    await two.follow()
    assert two._supervisor.removed == [(uuid, False)], "the one that was told to forgets the positions"
    assert [one_["UUID"] for one_ in two.list()] == ["u-1"]
    await two.follow()
    assert [one_["UUID"] for one_ in two.list()] == ["u-1"], "it does not come back"


async def test_the_file_that_was_written_last_counts() -> None:
    """While a new one is rolled out a mapping runs everywhere as it says; that is logged once, and its end too."""
    store = SlowStore()
    newer = {**DECLARED, "BatchSize": 7}
    old = await member(store, stamp=(10, 0, 0))
    new = await member(store, stamp=(20, 0, 0), mappings=(Declared("u-1", newer, 3),))
    await old.follow()
    assert old._supervisor.wanted["u-1"].mapping.batch.size == 100
    await new.follow()
    with structlog.testing.capture_logs() as logs:
        await old.follow()
        await old.follow()
    assert old._supervisor.wanted["u-1"].mapping.batch.size == 7
    assert [entry["event"] for entry in logs] == ["config_differs"]
    await old.apply(replace(settings(Declared("u-1", newer, 3)), stamp=(30, 0, 0)))
    with structlog.testing.capture_logs() as logs:
        await old.follow()
        await new.follow()
    assert [(entry["event"], entry["mappings"]) for entry in logs] == [("config_differs", [])]
    assert old._supervisor.wanted["u-1"].mapping.batch.size == 7


async def test_a_newer_file_with_a_function_that_is_not_known_here_is_not_followed() -> None:
    """A name that is not configured means a real Lambda function: not what was meant."""
    store = SlowStore()
    elsewhere = {**DECLARED, "FunctionName": "g"}
    old = await member(store, stamp=(10, 0, 0))
    known = {"f": HttpFunction("f", "http://127.0.0.1:1/"), "g": HttpFunction("g", "http://127.0.0.1:1/")}
    new = await member(store, stamp=(20, 0, 0), functions=known, mappings=(Declared("u-1", elsewhere, 3),))
    await new.follow()
    with structlog.testing.capture_logs() as logs:
        await old.follow()
    assert logs[0]["event"] == "config_differs"
    assert old._supervisor.wanted["u-1"].mapping.function.name == "f"


async def test_a_start_leaves_a_delete_alone_that_others_are_at() -> None:
    """Their shards have owners: forgotten now, they would be made anew, from the start."""
    store = SlowStore()
    await store.put_document("deleted/gone", {})
    await store.create("gone", [Row("a", Checkpoint(TRIM_HORIZON))])
    [row] = (await store.load("gone")).values()
    lease = await store.acquire("gone", row, "other")
    await member(store)
    assert await store.load("gone")
    await store.release(lease, None)
    await member(store)
    assert not await store.load("gone")
    assert not await store.document_keys("deleted/")
