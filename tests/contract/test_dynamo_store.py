"""The DynamoDB store in trouble: answers lost, throttles, no table, no rights, crashes in the middle, others ahead."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from botocore.loaders import Loader

from poller.aws.session import AwsClients
from poller.core.model import END, TRIM_HORIZON, Checkpoint, Lease, Member, Position, PositionKind, Row
from poller.errors import SourceUnavailable, StoreIncompatible, StoreUnavailable
from poller.settings import DynamoStoreSettings
from poller.stores import dynamotable
from poller.stores.dynamodb import DynamoStore
from tests.contract.test_stores import SEQUENCE, M, after, leased, noise, row
from tests.integration import emulators
from tests.integration.conftest import Stub, account, connect, error, html_error, stub, truncated  # noqa: F401

Connect = Callable[[str], Awaitable[AwsClients]]
LOADER = Loader(include_default_search_paths=True)
REGION = "eu-west-1"
WHERE = f"The store's table leases in {REGION}"
TABLE = {
    "TableStatus": "ACTIVE",
    "KeySchema": [{"AttributeName": "scope", "KeyType": "HASH"}, {"AttributeName": "leaseKey", "KeyType": "RANGE"}],
    "AttributeDefinitions": [
        {"AttributeName": "leaseKey", "AttributeType": "S"},
        {"AttributeName": "scope", "AttributeType": "S"},
    ],
}
READY = {
    "DescribeTable": [{"Table": TABLE}],
    "GetItem": [{"Item": {"version": {"N": "1"}}}, {}],
    "Query": [{"Items": []}],
}


class Requests(list[tuple[str, str]]):
    """A StoreObserver that keeps what it is told."""

    def requested(self, operation: str, outcome: str) -> None:
        self.append((operation, outcome))


class Lossy:
    """A LeanClient whose calls the test cuts off: before they are sent, or after they were carried out."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.lose: list[str] = []
        """Operations whose next answer is lost."""
        self.stop_at: str | None = None
        """The operation from which on nothing is sent: the process is dead."""
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        """What happens right before the next call of an operation."""
        self.calls: list[tuple[str, dict[str, Any]]] = []

    async def call(self, target: str, body: bytes, timeout: float) -> bytes:
        operation = target.rpartition(".")[2]
        if operation in self.before:
            await self.before.pop(operation)()
        if self.stop_at in {operation, "*"}:
            self.stop_at = "*"
            raise asyncio.CancelledError
        self.calls.append((operation, json.loads(body)))
        answer: bytes = await self.inner.call(target, body, timeout)
        if operation in self.lose:
            self.lose.remove(operation)
            raise SourceUnavailable("the answer was lost")
        return answer


def settings(**changes: Any) -> DynamoStoreSettings:
    return DynamoStoreSettings("dynamodb://leases", "leases", REGION, **changes)


async def clients_of(connected: Connect, url: str) -> AwsClients:
    clients = await connected(url)
    clients._session.register_component("data_loader", LOADER)
    return clients


@pytest.fixture
async def clients(connect: Connect) -> AwsClients:  # noqa: F811
    return await clients_of(connect, emulators.running("ministack"))


@pytest.fixture
async def store(clients: AwsClients) -> AsyncIterator[DynamoStore]:
    opened = DynamoStore(clients, settings(create=True), Requests())
    assert await opened.members() == {}
    yield opened
    await opened.close()


@pytest.fixture
async def lossy(store: DynamoStore) -> Lossy:
    made = Lossy(store._table._lean)
    store._table._lean = made  # type: ignore[assignment]
    return made


@pytest.fixture
async def beside(store: DynamoStore, clients: AwsClients) -> DynamoStore:
    """The store of another process."""
    return DynamoStore(clients, settings(), Requests())


async def items(store: DynamoStore, scope: str) -> list[dict[str, Any]]:
    return await store._table.query(scope)


async def scopes(store: DynamoStore) -> set[str]:
    return {scope.partition("/")[0] for scope in await store._table.scopes("")}


# Layout


async def test_a_row_reads_like_kcls(store: DynamoStore) -> None:
    """KCL's attribute names where the meaning is KCL's; the exact position, which KCL cannot spell, beside them."""
    await store.create(M, [row("s1", parents=("p2", "p1"), owner="a", token=4)])
    lease = await store.acquire(M, (await store.load(M))["s1"], "me")
    (item,) = await items(store, f"mapping/{M}")
    assert float(item.pop("savedAt")["N"]) > 1_600_000_000
    assert item == {
        "scope": {"S": f"mapping/{M}"},
        "leaseKey": {"S": "s1"},
        "leaseOwner": {"S": "me"},
        "leaseCounter": {"N": "5"},
        "checkpoint": {"S": "TRIM_HORIZON"},
        "position": {"S": "TRIM_HORIZON"},
        "ownerSwitchesSinceCheckpoint": {"N": "1"},
        "parentShardId": {"L": [{"S": "p2"}, {"S": "p1"}]},
    }
    assert lease
    await store.save([(lease, Checkpoint(Position(PositionKind.AT, SEQUENCE), ((1, 2),), "5.0\n{}"))])
    (item,) = await items(store, f"mapping/{M}")
    assert {name: item[name] for name in ("checkpoint", "position", "resume", "window")} == {
        "checkpoint": {"S": SEQUENCE},
        "position": {"S": f"AT_SEQUENCE_NUMBER {SEQUENCE}"},
        "resume": {"S": "[[1, 2]]"},
        "window": {"S": "5.0\n{}"},
    }
    assert item["ownerSwitchesSinceCheckpoint"] == {"N": "0"}
    await store.release(lease, Checkpoint(END))
    (item,) = await items(store, f"mapping/{M}")
    assert item["checkpoint"] == {"S": "SHARD_END"}
    assert not {"leaseOwner", "resume", "window", "wantedBy"} & item.keys()


async def test_ownership_that_comes_back_is_counted(store: DynamoStore) -> None:
    """ownerSwitchesSinceCheckpoint: takings from another owner and hand-overs without a position, 0 after a save."""

    async def switches() -> int:
        (item,) = await items(store, f"mapping/{M}")
        return int(item["ownerSwitchesSinceCheckpoint"]["N"])

    await leased(store, "s1")
    assert await switches() == 0
    taken = await store.acquire(M, (await store.load(M))["s1"], "b")
    assert taken
    assert await store.release(taken, None, "c")
    assert await switches() == 2
    again = await store.acquire(M, (await store.load(M))["s1"], "c")
    assert again
    assert await switches() == 2
    await store.save([(again, after(1))])
    assert await switches() == 0


async def test_nothing_is_left_of_what_was_split(store: DynamoStore) -> None:
    """The parts of a document, of a window and of a list of rows go when nothing refers to them any more."""
    await store.put_document("d", {"text": noise(900_000)})
    (lease,) = await leased(store, "s1")
    await store.save([(lease, Checkpoint(TRIM_HORIZON, (), noise(900_000)))])
    assert "part" in await scopes(store)
    await store.put_document("d", {"text": noise(900_000, 2)})
    await store.save([(lease, Checkpoint(TRIM_HORIZON, (), noise(900_000, 2)))])
    await store.save([(Lease(M, "s1", "x", 1), Checkpoint(TRIM_HORIZON, (), noise(900_000, 3)))])
    await store.restore({M: [row("s1", checkpoint=Checkpoint(TRIM_HORIZON, (), noise(900_000, 4)))]}, [], {})
    assert len(await store._table.scopes("part/")) == 2
    await store.forget(M)
    await store.delete_document("d")
    await store.create(M, [row(f"s{n}", checkpoint=Checkpoint(TRIM_HORIZON, (), noise(3000, n))) for n in range(200)])
    assert len(await store.load(M)) == 200
    assert await scopes(store) == {"schema", "mapping"}


async def test_the_cost_is_known(store: DynamoStore) -> None:
    """One write a save and shard, one a beat whatever the number of shards, counted by DynamoDB's operations."""
    leases = await leased(store, "s1", "s2", "s3")
    before = dict(store.calls)
    await store.save([(lease, after(1)) for lease in leases])
    await store.save([(leases[0], after(2)), (leases[0], after(3))])
    await store.beat(Member("me", 1, {}))
    await store.members()
    spent = {name: count - before.get(name, 0) for name, count in store.calls.items() if count != before.get(name)}
    assert spent == {"UpdateItem": 4, "PutItem": 1, "Query": 1}


# Answers that are lost


async def test_a_lost_answer_is_no_lost_lease(store: DynamoStore, lossy: Lossy) -> None:
    """What was done and not heard of is done again, and judged by what stands in the table."""
    await store.create(M, [row("s1")])
    seen = (await store.load(M))["s1"]
    lossy.lose = ["UpdateItem"]
    lease = await store.acquire(M, seen, "me")
    assert lease == Lease(M, "s1", "me", 1)
    lossy.lose = ["UpdateItem"]
    assert await store.request(M, (await store.load(M))["s1"], "you") is True
    lossy.lose = ["UpdateItem"]
    assert list(await store.save([(lease, Checkpoint(TRIM_HORIZON, (), noise(800_000)))])) == []
    assert (await store.load(M))["s1"].checkpoint.window == noise(800_000)
    lossy.lose = ["UpdateItem"]
    assert await store.release(lease, Checkpoint(END, (), noise(800_000, 2)), "you") is True
    stored = (await store.load(M))["s1"]
    assert (stored.owner, stored.token, stored.checkpoint.window) == ("you", 2, noise(800_000, 2))
    lossy.lose = ["UpdateItem"]
    again = await store.acquire(M, stored, "you")
    assert again
    lossy.lose = ["UpdateItem"]
    assert await store.release(again, after(3)) is True
    assert (await store.load(M))["s1"] == row("s1", checkpoint=after(3), token=3)
    assert not lossy.lose


async def test_a_lost_answer_to_many(store: DynamoStore, lossy: Lossy) -> None:
    """Rows and documents that were put, and whose answer was lost, are not taken for another's."""
    lossy.lose = ["TransactWriteItems"]
    await store.create(M, [row("s1"), row("s2")])
    lossy.lose = ["PutItem", "TransactWriteItems"]
    await store.create(M, [row(f"s{n}") for n in range(120)])
    leases = [await store.acquire(M, each, "me") for each in (await store.load(M)).values()]
    assert len(leases) == 120
    for put in ([row(f"t{n}") for n in range(110)], [row("u")]):
        held = [lease for each in (await store.load(M)).values() if (lease := await store.acquire(M, each, "me"))]
        lossy.lose = ["TransactWriteItems"]
        assert await store.restore({M: put}, held, {"d": {"n": len(put)}}) is True
        assert await store.load(M) == {each.shard: each for each in put}
    document = {"text": noise(800_000)}
    lossy.lose = ["PutItem", "PutItem"]
    await store.put_document("d", document)
    assert await store.documents("") == {"d": document}
    lossy.lose = ["PutItem"]
    await store.put_document("d", {})
    lossy.lose = ["DeleteItem"]
    await store.delete_document("d")
    assert await store.documents("") == {}
    assert not lossy.lose


async def test_a_lost_answer_to_a_long_list(store: DynamoStore, lossy: Lossy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts are not taken for those of a list that was refused."""
    monkeypatch.setattr(dynamotable, "PART_BYTES", 300)
    rows = [row(f"s{n:03}", parents=(noise(40, n),)) for n in range(150)]
    puts = 0

    async def lose_the_list() -> None:
        nonlocal puts
        puts += 1
        lossy.before["PutItem"] = lose_the_list
        if json.loads(bodies[-1])["Item"]["leaseKey"]["S"] == "~change":
            lossy.lose.append("PutItem")
            del lossy.before["PutItem"]

    bodies: list[bytes] = []
    call = lossy.call

    async def watched(target: str, body: bytes, timeout: float) -> bytes:
        bodies.append(body)
        return await call(target, body, timeout)

    monkeypatch.setattr(lossy, "call", watched)
    lossy.before["PutItem"] = lose_the_list
    await store.create(M, rows)
    assert puts > 2
    assert not lossy.lose
    assert await store.load(M) == {each.shard: each for each in rows}
    assert await scopes(store) == {"schema", "mapping"}


# Crashes in the middle


async def killed(call: Awaitable[object]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_rows_are_created_whole_or_not_at_all(store: DynamoStore, lossy: Lossy, beside: DynamoStore) -> None:
    """Killed before the list of rows is written nothing was created; killed after it, the next load creates the rest."""
    rows = [row(f"s{n:03}") for n in range(250)]
    lossy.stop_at = "PutItem"
    await killed(store.create(M, rows))
    assert await beside.load(M) == {}
    for chunks in range(3):
        lossy.stop_at = None
        lossy.before["TransactWriteItems"] = partial(stop_after, lossy, chunks)
        await killed(store.create(M, rows))
        assert len(await items(beside, f"mapping/{M}")) == 99 * chunks + 1
        assert await beside.load(M) == {each.shard: each for each in rows}
        assert "~change" not in {item["leaseKey"]["S"] for item in await items(beside, f"mapping/{M}")}
        await beside.forget(M)


async def stop_after(lossy: Lossy, calls: int) -> None:
    if calls:
        lossy.before["TransactWriteItems"] = lambda: stop_after(lossy, calls - 1)
    else:
        lossy.stop_at = "TransactWriteItems"


async def test_what_is_forgotten_does_not_come_back(store: DynamoStore, lossy: Lossy, beside: DynamoStore) -> None:
    """Rows that were still to be put are not put after the mapping was forgotten, by whoever is late."""
    rows = [row(f"s{n:03}") for n in range(250)]
    lossy.before["TransactWriteItems"] = lambda: beside.forget(M)
    await store.create(M, rows[:150])
    assert len(await beside.load(M)) == 150, "created again, whole"
    await beside.forget(M)
    for chunks in range(3):
        lossy.before["TransactWriteItems"] = partial(stop_after, lossy, chunks)
        await killed(store.create(M, rows))
        lossy.stop_at = None
        lossy.before["TransactWriteItems"] = lambda: beside.forget(M)
        assert await store.load(M) == {}
        assert await scopes(store) == {"schema"}
    lossy.before["TransactWriteItems"] = partial(stop_after, lossy, 1)
    await killed(store.create(M, rows))
    lossy.stop_at = None
    lossy.before["DeleteItem"] = lambda: beside.load(M)
    await store.forget(M)
    assert await scopes(store) == {"schema"}, "nor by whoever is in time"


async def test_rows_are_restored_whole(store: DynamoStore, lossy: Lossy, beside: DynamoStore) -> None:
    """More rows than a transaction has: killed in between, whoever loads the mapping finishes it."""
    leases = await leased(store, *(f"s{n:03}" for n in range(120)))
    put = [row(f"s{n:03}", checkpoint=after(n), token=1) for n in range(60, 200)]
    lossy.before["TransactWriteItems"] = lambda: stop_after(lossy, 2)
    await killed(store.restore({M: put}, leases, {"d": {}}))
    assert await beside.documents("") == {"d": {}}
    assert await beside.load(M) == {each.shard: each for each in put}


async def test_a_restore_that_is_overtaken_changes_nothing(
    store: DynamoStore, lossy: Lossy, beside: DynamoStore
) -> None:
    """A lease that goes in the moment between the look and the write."""
    leases = await leased(store, "s1", "s2")
    rows = await store.load(M)
    lossy.before["TransactWriteItems"] = lambda: beside.acquire(M, rows["s2"], "thief")
    assert await store.restore({M: [row("s9")]}, leases, {"d": {}}) is False
    assert {each.shard: each.owner for each in (await store.load(M)).values()} == {"s1": "me", "s2": "thief"}
    assert await store.documents("") == {}


async def test_a_document_is_the_old_one_until_it_is_the_new_one(
    store: DynamoStore, lossy: Lossy, beside: DynamoStore
) -> None:
    """Its parts are written before what refers to them; who reads while it is put anew reads the new one."""
    old, new = {"text": noise(900_000)}, {"text": noise(900_000, 2)}
    await store.put_document("d", old)
    puts = 0

    async def count() -> None:
        nonlocal puts
        puts += 1
        lossy.before["PutItem"] = count
        if puts == 3:  # two parts, then the head
            lossy.stop_at = "PutItem"

    lossy.before["PutItem"] = count
    await killed(store.put_document("d", new))
    lossy.stop_at = None
    lossy.before.clear()
    assert await store.documents("") == {"d": old}

    async def replace_between() -> None:
        lossy.before["Query"] = lambda: beside.put_document("d", new)

    lossy.before["Query"] = replace_between
    assert await store.documents("") == {"d": new}


# Trouble


async def scripted(connected: Connect, stub: Stub, **script: list[Any]) -> DynamoStore:  # noqa: F811
    stub.script = {**{name: list(answers) for name, answers in READY.items()}, **script}
    return DynamoStore(await clients_of(connected, stub.url), settings(), Requests())


async def failing(call: Awaitable[object], kind: type[Exception] = StoreUnavailable) -> str:
    with pytest.raises(kind) as caught:
        await call
    return str(caught.value)


@pytest.mark.parametrize(
    "trouble",
    [
        error("ProvisionedThroughputExceededException"),
        error("ThrottlingException"),
        error("RequestLimitExceeded"),
        error("TransactionConflictException"),
        error("InternalServerError", status=500),
        html_error,
        truncated,
    ],
)
async def test_a_moment_of_trouble_is_waited_out(connect: Connect, stub: Stub, trouble: Any) -> None:  # noqa: F811
    """Throttles, errors of the service and answers that were cut off are not the caller's business at first."""
    store = await scripted(connect, stub, UpdateItem=[trouble, trouble, {}])
    assert list(await store.save([(Lease(M, "s1", "me", 1), after(1))])) == []
    assert len(stub.asked("UpdateItem")) == 3


async def test_long_trouble_is(connect: Connect, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """After a moment the caller hears of it; what was begun has ended, the rest is not begun."""
    monkeypatch.setattr(dynamotable, "_TRIES_WITHIN", 0.1)
    store = await scripted(connect, stub, UpdateItem=[error("ThrottlingException", "slow down")])
    changes = [(Lease(M, f"s{n}", "me", 1), after(1)) for n in range(100)]
    text = await failing(store.save(changes))
    assert text == f"{WHERE} cannot be used now (UpdateItem: ThrottlingException: slow down)."
    assert len({body["Key"]["leaseKey"]["S"] for body in stub.asked("UpdateItem")}) == 32
    assert store._observer == [("save", "error")]


async def test_of_many_saves_the_failed_one_is_told(connect: Connect, stub: Stub) -> None:  # noqa: F811
    """An answer that is neither yes nor no fails the call."""
    answers = [{}, error("ValidationException", "no such thing"), {}]
    store = await scripted(connect, stub, UpdateItem=answers)
    stub.script["UpdateItem"] = [*answers[:2], *answers[1:2] * 50]
    assert "ValidationException: no such thing" in await failing(
        store.save([(Lease(M, f"s{n}", "me", 1), after(1)) for n in range(2)])
    )


async def test_every_page_is_read(connect: Connect, stub: Stub) -> None:  # noqa: F811
    """A query goes on where the answer ended, and asks for what is true now."""
    last = {"scope": {"S": "member"}, "leaseKey": {"S": "a"}}
    beat = {"beat": {"N": "1"}, "info": {"S": "{}"}}
    pages = [
        {"Items": [{"leaseKey": {"S": "a"}, **beat}], "LastEvaluatedKey": last},
        {"Items": [], "LastEvaluatedKey": last},
        {"Items": [{"leaseKey": {"S": "b"}, **beat}]},
    ]
    store = await scripted(connect, stub, Query=pages)
    assert list(await store.members()) == ["a", "b"]
    assert [body.get("ExclusiveStartKey") for body in stub.asked("Query")] == [None, last, last]
    assert all(body["ConsistentRead"] for body in [*stub.asked("Query"), *stub.asked("GetItem")])


@pytest.mark.parametrize("answer", [{}, {"Items": None}])
async def test_an_answer_without_items_is_no_empty_one(connect: Connect, stub: Stub, answer: Any) -> None:  # noqa: F811
    """Positions that cannot be read are not positions that are not there."""
    store = await scripted(connect, stub, Query=[answer])
    assert await failing(store.load(M)) == f"{WHERE}: the answer to Query cannot be read."


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ({}, "'position'"),
        ({"position": {"S": "NOWHERE"}}, "'NOWHERE' is not a valid PositionKind"),
        ({"position": {"S": "TRIM_HORIZON"}, "leaseCounter": {"N": "1"}, "savedAt": {"S": "x"}}, "'N'"),
    ],
)
async def test_a_damaged_row_is_named(connect: Connect, stub: Stub, item: Any, what: str) -> None:  # noqa: F811
    """Not taken for an empty one."""
    store = await scripted(connect, stub, Query=[{"Items": [{"leaseKey": {"S": "s1"}, **item}]}])
    assert await failing(store.load(M)) == f"The store's row of mapping {M}, shard s1 is damaged: {what}."


async def test_damaged_texts_and_members_are_named(connect: Connect, stub: Stub) -> None:  # noqa: F811
    """What somebody edited into nonsense is said to be that."""
    store = await scripted(connect, stub, Query=[{"Items": [{"leaseKey": {"S": "d"}, "body": {"B": "eHg="}}]}])
    assert (await failing(store.documents(""))).startswith(f"{WHERE} holds a damaged text: Error -3")
    stub.script["Query"] = [{"Items": [{"leaseKey": {"S": "d"}, "body": {"S": "{"}}]}]
    assert (await failing(store.documents(""))).startswith("The store's document d is damaged: Expecting property name")
    stub.script["Query"] = [{"Items": [{"leaseKey": {"S": "m"}, "beat": {"N": "1"}}]}]
    assert await failing(store.members()) == "The store's member m is damaged: 'info'."


# The table


async def test_a_missing_table_is_said(clients: AwsClients) -> None:
    """What is missing, where, and the two ways out; as soon as it is there the same store works."""
    store = DynamoStore(clients, settings(), Requests())
    sentence = (
        f"{WHERE} does not exist. Make it with the partition key scope and the sort key leaseKey, both strings, "
        "or let the poller make it: dynamodb://leases?create=true."
    )
    assert await failing(store.load(M)) == await store.check() == sentence
    other = DynamoStore(clients, settings(create=True), Requests())
    assert await other.check() is None, "it may be made"
    assert await failing(store.load(M)) == sentence, "to check makes nothing"
    assert await other.load(M) == {}
    assert await store.load(M) == {}
    assert await store.check() is None


async def test_many_make_the_table_at_once(clients: AwsClients) -> None:
    """One of them does, the others use it."""
    stores = [DynamoStore(clients, settings(create=True), Requests()) for _ in range(10)]
    await asyncio.gather(*(store.create(M, [row("s1")]) for store in stores))
    assert {tuple(await store.load(M)) for store in stores} == {("s1",)}
    client = await clients.client("dynamodb", REGION)
    table = (await client.describe_table(TableName="leases"))["Table"]
    assert table["BillingModeSummary"]["BillingMode"] == "PAY_PER_REQUEST"


async def test_a_new_table_is_waited_for(connect: Connect, stub: Stub) -> None:  # noqa: F811
    """Somebody else makes it at this moment: it is used once it is active."""
    creating = {"Table": {**TABLE, "TableStatus": "CREATING"}}
    missing = error("ResourceNotFoundException")
    stub.script = {
        **{name: list(answers) for name, answers in READY.items()},
        "DescribeTable": [missing, creating, {"Table": TABLE}],
        "CreateTable": [error("ResourceInUseException")],
    }
    store = DynamoStore(await clients_of(connect, stub.url), settings(create=True), Requests())
    assert await store.load(M) == {}
    assert [name for name, _ in stub.calls] == [
        "DescribeTable", "CreateTable", "DescribeTable", "DescribeTable", "GetItem", "Query",
    ]  # fmt: skip


async def test_a_table_that_goes_is_no_fresh_start(store: DynamoStore, clients: AwsClients) -> None:
    """Once it was used, a table that is missing is an error, `create` or not."""
    await store.create(M, [row("s1")])
    client = await clients.client("dynamodb", REGION)
    await client.delete_table(TableName="leases")
    assert (await failing(store.load(M))).startswith(f"{WHERE} does not exist (Query: ResourceNotFoundException")


async def test_a_table_of_another_program_is_refused(clients: AwsClients) -> None:
    """Its keys say so, and it is left alone."""
    client = await clients.client("dynamodb", REGION)
    await client.create_table(
        TableName="leases",
        KeySchema=[{"AttributeName": "leaseKey", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "leaseKey", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    store = DynamoStore(clients, settings(create=True), Requests())
    sentence = (
        f"{WHERE} is of another program: its keys are leaseKey (HASH, S), and the poller's are scope (HASH, S), "
        "leaseKey (RANGE, S). Name another table in `store`."
    )
    assert await failing(store.load(M), StoreIncompatible) == await store.check() == sentence
    assert await failing(store.save([(Lease(M, "s1", "me", 1), after(1))]), StoreIncompatible) == sentence


async def test_a_newer_schema_is_refused(store: DynamoStore, clients: AwsClients, monkeypatch: Any) -> None:
    """Both versions are named."""
    await store._table.put({**dynamotable.key("schema", "version"), "version": {"N": "2"}})
    again = DynamoStore(clients, settings(), Requests())
    assert await failing(again.load(M), StoreIncompatible) == (
        f"{WHERE} has version 2, this poller reads version 1. Run a newer poller, or name another table in `store`."
    )


@pytest.mark.parametrize("operation", ["DescribeTable", "CreateTable", "PutItem", "Query"])
async def test_a_missing_right_is_named(connect: Connect, stub: Stub, operation: str) -> None:  # noqa: F811
    """The sentence has the right that the policy lacks."""
    stub.script = {
        **{name: list(answers) for name, answers in READY.items()},
        "DescribeTable": [error("ResourceNotFoundException"), {"Table": TABLE}],
        "CreateTable": [{}],
        "GetItem": [{}],
        "PutItem": [{}],
        operation: [error("AccessDeniedException", "User x is not authorized")],
    }
    store = DynamoStore(await clients_of(connect, stub.url), settings(create=True), Requests())
    assert await failing(store.load(M)) == (
        f"{WHERE}: access denied ({operation}: AccessDeniedException: User x is not authorized); "
        f"the poller's credentials need dynamodb:{operation} on it."
    )


async def test_no_network_is_needed_to_begin(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A store that is away is an error of the first call, and not of making it."""
    monkeypatch.setattr(dynamotable, "_TRIES_WITHIN", 0.1)
    clients = await clients_of(connect, f"http://127.0.0.1:{emulators.free_port()}")
    store = DynamoStore(clients, settings(), Requests())
    assert (await failing(store.load(M))).startswith(f"{WHERE} cannot be used now (DescribeTable: ")
    await store.close()
    assert await failing(store.load(M)) == "The store's table leases is closed."


async def test_no_region_is_said(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Neither in the URL nor in the environment."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    clients = await clients_of(connect, "http://127.0.0.1:1")
    store = DynamoStore(clients, DynamoStoreSettings("dynamodb://leases", "leases"), Requests())
    assert "aws.region: not set" in await failing(store.load(M))


async def test_rows_are_those_of_the_contract() -> None:
    """The helper makes what the contract suite compares with."""
    assert row() == Row("s1", Checkpoint(TRIM_HORIZON))
