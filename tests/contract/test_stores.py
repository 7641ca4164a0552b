"""The rules of `CheckpointStore`, run against every implementation. Another one joins by a line in STORES."""

import asyncio
import base64
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from botocore.loaders import Loader

from poller.aws.session import AwsClients
from poller.core.model import END, TRIM_HORIZON, Checkpoint, Lease, Member, Position, PositionKind, Row
from poller.ports import CheckpointStore
from poller.settings import DynamoStoreSettings
from poller.stores.dynamodb import DynamoStore
from poller.stores.memory import MemoryStore
from poller.stores.sqlite import SqliteStore
from tests.integration import emulators
from tests.integration.conftest import account, connect  # noqa: F401  # fixtures

Open = Callable[[], Awaitable[CheckpointStore]]
Connect = Callable[[str], Awaitable[AwsClients]]


class Ignored:
    """A StoreObserver that keeps nothing."""

    def requested(self, operation: str, outcome: str) -> None:
        pass


LOADER = Loader(include_default_search_paths=True)  # parses the service's model once, not for each test


class Shop:
    """Where a test keeps its stores: a directory, and clients of the emulator's account that is the test's own."""

    def __init__(self, directory: Path, connected: Connect) -> None:
        self.directory = directory
        self.connect = connected
        self.memory = MemoryStore()
        self.clients: AwsClients | None = None

    async def open_memory(self) -> CheckpointStore:
        return self.memory

    async def open_sqlite(self) -> CheckpointStore:
        return await SqliteStore.open(str(self.directory / "poller.db"), Ignored())

    async def open_ministack(self) -> CheckpointStore:
        return await self._open_dynamo("ministack")

    async def open_roto(self) -> CheckpointStore:
        return await self._open_dynamo("roto")

    async def _open_dynamo(self, emulator: str) -> CheckpointStore:
        if self.clients is None:
            self.clients = await self.connect(emulators.running(emulator))
            self.clients._session.register_component("data_loader", LOADER)
        url = "dynamodb://leases?create=true"
        return DynamoStore(self.clients, DynamoStoreSettings(url, "leases", "eu-west-1", create=True), Ignored())


STORES = {
    "memory": Shop.open_memory,
    "sqlite": Shop.open_sqlite,
    "dynamodb": Shop.open_ministack,
    "dynamodb-roto": Shop.open_roto,
}


ON_ROTO = (  # a second opinion on what two processes do to each other, and on steps of many rows
    "test_create_leaves_rows_that_exist",
    "test_two_acquirers_one_wins",
    "test_acquire_compares_owner_and_token",
    "test_fifty_acquirers_in_two_processes",
    "test_stale_leases_are_answered_and_the_others_written",
    "test_release_hands_the_shard_over",
    "test_a_wish_is_about_a_lease",
    "test_a_repeat_is_answered_as_the_first",
    "test_many_rows_are_created_together",
    "test_rows_are_restored_by_who_holds_them_all",
    "test_big_documents",
    "test_a_window_of_any_size_is_kept",
    "test_a_prefix_is_text",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test on every store."""
    if "open_store" in metafunc.fixturenames:
        stores = [name for name in STORES if name != "dynamodb-roto" or metafunc.function.__name__ in ON_ROTO]
        metafunc.parametrize("open_store", stores, indirect=True)


@pytest.fixture
def open_store(request: pytest.FixtureRequest, tmp_path: Path, connect: Connect) -> Open:  # noqa: F811
    """Opens a store on the same data each time."""
    shop = Shop(tmp_path, connect)
    return lambda: STORES[request.param](shop)


@pytest.fixture
async def store(open_store: Open) -> AsyncIterator[CheckpointStore]:
    opened = await open_store()
    yield opened
    async with asyncio.timeout(10):
        await opened.close()


M = "0a3c4e6f-0000-4000-8000-00000000000a"
OTHER = "0a3c4e6f-0000-4000-8000-00000000000b"
SEQUENCE = "49590338271490256608559692538361571095921575989136588898"  # 56 digits
HUGE = int(SEQUENCE)
NO_ROW = cast("Row", None)  # a request that no store can carry out


def after(value: int | str) -> Checkpoint:
    return Checkpoint(Position(PositionKind.AFTER, str(value)))


def row(shard: str = "s1", **fields: Any) -> Row:
    return Row(shard, **{"checkpoint": Checkpoint(TRIM_HORIZON), **fields})


async def leased(store: CheckpointStore, *shards: str, owner: str = "me") -> list[Lease]:
    await store.create(M, [row(shard) for shard in shards])
    rows = await store.load(M)
    leases = [await store.acquire(M, rows[shard], owner) for shard in shards]
    assert all(leases)
    return [lease for lease in leases if lease]


async def test_a_store_is_empty_at_first(store: CheckpointStore) -> None:
    """A mapping that was never stored has no rows, and there are no documents."""
    assert await store.load(M) == {}
    assert await store.documents("") == {}


async def test_create_puts_a_row_with_all_it_has(store: CheckpointStore) -> None:
    """Every field of a row comes back equal."""
    rows = [
        row("s1"),
        row("s2", checkpoint=Checkpoint(Position(PositionKind.AT, SEQUENCE), ((1, HUGE),)), parents=("s1", "s0")),
        row("s3", owner="somebody", token=7, parents=("s2",)),
    ]
    await store.create(M, rows)
    assert await store.load(M) == {each.shard: each for each in rows}


async def test_create_leaves_rows_that_exist(store: CheckpointStore) -> None:
    """Create puts what is absent only: a second daemon must not turn positions back."""
    (lease,) = await leased(store, "s1")
    await store.save([(lease, after(5))])
    await store.create(M, [row("s1", parents=("x",)), row("s2")])
    rows = await store.load(M)
    assert rows["s1"] == row("s1", checkpoint=after(5), owner="me", token=1)
    assert rows["s2"] == row("s2")


async def test_create_of_nothing_is_fine(store: CheckpointStore) -> None:
    """No rows, no change."""
    await store.create(M, [])
    assert await store.load(M) == {}


async def test_create_is_all_or_none(store: CheckpointStore) -> None:
    """When one row cannot be kept none is: the start positions of a mapping belong together."""
    with pytest.raises(AttributeError):
        await store.create(M, [row("s1"), NO_ROW])
    assert await store.load(M) == {}


async def test_the_first_of_two_rows_of_a_shard_counts(store: CheckpointStore) -> None:
    """The second finds the row there."""
    await store.create(M, [row("s1", token=1), row("s1", token=2)])
    assert (await store.load(M))["s1"].token == 1


async def test_load_is_by_shard_id(store: CheckpointStore) -> None:
    """The order of rows is the same in every store and run."""
    await store.create(M, [row(shard) for shard in ("shardId-2", "é", "shardId-10", "\U0001f600", "\uffee", "Z", "a")])
    expected = ["Z", "a", "shardId-10", "shardId-2", "é", "\uffee", "\U0001f600"]
    assert list(await store.load(M)) == expected


async def test_mappings_are_apart(store: CheckpointStore) -> None:
    """The same shard id in two mappings is two rows."""
    (mine,) = await leased(store, "s1")
    await store.create(OTHER, [row("s1")])
    await store.save([(mine, after(1))])
    assert (await store.load(OTHER)) == {"s1": row("s1")}
    await store.forget(OTHER)
    assert (await store.load(M))["s1"].checkpoint == after(1)


@pytest.mark.parametrize(
    "position",
    [
        TRIM_HORIZON,
        END,
        Position(PositionKind.LATEST),
        Position(PositionKind.LATEST, "1767225600.125"),
        Position(PositionKind.AT_TIMESTAMP, "1767225600"),
        Position(PositionKind.AT, SEQUENCE),
        Position(PositionKind.AFTER, "000000000000000000001"),
    ],
)
async def test_every_position_comes_back(store: CheckpointStore, position: Position) -> None:
    """Each kind, its value kept as text: leading zeros and 56 digits stay."""
    await store.create(M, [row("created", checkpoint=Checkpoint(position))])
    (lease,) = await leased(store, "s1")
    await store.save([(lease, Checkpoint(position))])
    rows = await store.load(M)
    assert rows["created"].checkpoint.position == rows["s1"].checkpoint.position == position


@pytest.mark.parametrize(
    "resume",
    [(), ((HUGE,),), ((0,), (1, 2, 3), (HUGE, HUGE + 1)), tuple((n, HUGE * n) for n in range(40))],
)
async def test_resume_vectors_come_back(store: CheckpointStore, resume: tuple[tuple[int, ...], ...]) -> None:
    """Numbers of any size, exactly, in their order; and a later checkpoint without them clears them."""
    (lease,) = await leased(store, "s1")
    window = '1700000000.0\n{"n":1,"text":"zwölf\\n"}'
    await store.save([(lease, Checkpoint(END, resume, window))])
    assert (await store.load(M))["s1"].checkpoint == Checkpoint(END, resume, window)
    await store.save([(lease, Checkpoint(END))])
    assert (await store.load(M))["s1"].checkpoint == Checkpoint(END)


async def test_ids_of_any_script(store: CheckpointStore) -> None:
    """Ids are text: quotes, wildcards and emoji mean nothing."""
    name = "o'Hara \"%_\\ ключ 鍵 \U0001f511; DROP TABLE shards --"
    await store.create(name, [row(name, parents=(name, "p"))])
    rows = await store.load(name)
    lease = await store.acquire(name, rows[name], name)
    assert lease == Lease(name, name, name, 1)
    assert list(await store.save([(lease, after(1))])) == []
    assert await store.load(name) == {name: row(name, checkpoint=after(1), parents=(name, "p"), owner=name, token=1)}


async def test_acquire_takes_the_lease(store: CheckpointStore) -> None:
    """The winner gets the next token, and the row says so; checkpoint and parents stay."""
    await store.create(M, [row("s1", checkpoint=after(3), parents=("p",), token=4)])
    lease = await store.acquire(M, (await store.load(M))["s1"], "me")
    assert lease == Lease(M, "s1", "me", 5)
    assert (await store.load(M))["s1"] == row("s1", checkpoint=after(3), parents=("p",), owner="me", token=5)


async def test_two_acquirers_one_wins(store: CheckpointStore) -> None:
    """Of many who saw the same row exactly one gets the lease."""
    await store.create(M, [row("s1")])
    seen = (await store.load(M))["s1"]
    leases = await asyncio.gather(*(store.acquire(M, seen, f"node-{n}") for n in range(10)))
    (winner,) = [lease for lease in leases if lease]
    stored = (await store.load(M))["s1"]
    assert (stored.owner, stored.token) == (winner.owner, winner.token) == (winner.owner, 1)


@pytest.mark.parametrize("seen", [{"owner": None, "token": 1}, {"owner": "a", "token": 0}, {"owner": "b", "token": 1}])
async def test_acquire_compares_owner_and_token(store: CheckpointStore, seen: dict[str, Any]) -> None:
    """A row whose owner or token has changed since is not taken."""
    await leased(store, "s1", owner="a")
    assert await store.acquire(M, row("s1", **seen), "me") is None
    stored = (await store.load(M))["s1"]
    assert (stored.owner, stored.token) == ("a", 1)


async def test_acquire_of_no_row(store: CheckpointStore) -> None:
    """A row that is gone cannot be taken, and none is made."""
    assert await store.acquire(M, row("s1"), "me") is None
    assert await store.load(M) == {}


async def test_taking_over_raises_the_token_and_fences_the_old_owner(store: CheckpointStore) -> None:
    """Every change of owner counts the token up; the old lease writes nothing any more, its own name included."""
    (old,) = await leased(store, "s1")
    new = await store.acquire(M, (await store.load(M))["s1"], "me")
    assert new == Lease(M, "s1", "me", 2)
    assert list(await store.save([(old, after(9))])) == [old]
    assert await store.release(old, after(9)) is False
    assert (await store.load(M))["s1"] == row("s1", owner="me", token=2)


async def test_save_writes_positions_and_nothing_else(store: CheckpointStore) -> None:
    """Owner, token and parents stay."""
    await store.create(M, [row("s1", parents=("p", "q"))])
    (lease,) = await leased(store, "s1")
    assert list(await store.save([(lease, after(1))])) == []
    assert (await store.load(M))["s1"] == row("s1", checkpoint=after(1), parents=("p", "q"), owner="me", token=1)


async def test_save_of_nothing(store: CheckpointStore) -> None:
    """No changes, no stale leases."""
    assert list(await store.save([])) == []


async def test_save_of_a_thousand(store: CheckpointStore) -> None:
    """A daemon's whole set of shards goes in one call."""
    leases = await leased(store, *(f"s{n:04}" for n in range(1000)))
    assert list(await store.save([(lease, after(n)) for n, lease in enumerate(leases)])) == []
    rows = await store.load(M)
    assert [rows[lease.shard].checkpoint for lease in leases] == [after(n) for n in range(1000)]


async def test_stale_leases_are_answered_and_the_others_written(store: CheckpointStore) -> None:
    """One lost lease does not cost the positions of the shards that are still ours."""
    first, lost, gone, last = await leased(store, "s1", "s2", "s3", "s4")
    taken = await store.acquire(M, (await store.load(M))["s2"], "thief")
    await store.forget(M, ["s3"])
    never = Lease(M, "s9", "me", 1)
    changes = [(lease, after(7)) for lease in (first, lost, gone, never, last)]
    assert list(await store.save(changes)) == [lost, gone, never]
    rows = await store.load(M)
    assert taken is not None
    assert {shard: each.checkpoint for shard, each in rows.items()} == {
        "s1": after(7),
        "s2": Checkpoint(TRIM_HORIZON),
        "s4": after(7),
    }


async def test_the_last_of_two_changes_of_a_shard_counts(store: CheckpointStore) -> None:
    """Changes are written in their order."""
    (lease,) = await leased(store, "s1")
    assert list(await store.save([(lease, after(1)), (lease, after(2))])) == []
    assert (await store.load(M))["s1"].checkpoint == after(2)


async def test_save_takes_what_the_list_held_when_it_was_called(store: CheckpointStore) -> None:
    """The caller may use its list for the next round while the store still writes."""
    (lease,) = await leased(store, "s1")
    changes = [(lease, after(1))]
    saving = asyncio.create_task(store.save(changes))
    await asyncio.sleep(0)
    changes.clear()
    assert list(await saving) == []
    assert (await store.load(M))["s1"].checkpoint == after(1)


async def test_release_gives_the_lease_up_with_the_last_checkpoint(store: CheckpointStore) -> None:
    """Checkpoint and owner change together; the token stays, so the next owner's is higher."""
    (lease,) = await leased(store, "s1")
    assert await store.release(lease, Checkpoint(Position(PositionKind.AT, SEQUENCE), ((HUGE,),))) is True
    stored = (await store.load(M))["s1"]
    assert stored == row("s1", checkpoint=Checkpoint(Position(PositionKind.AT, SEQUENCE), ((HUGE,),)), token=1)
    again = await store.acquire(M, stored, "next")
    assert again == Lease(M, "s1", "next", 2)


async def test_release_without_a_checkpoint_keeps_the_stored_one(store: CheckpointStore) -> None:
    """None means: nothing new was settled."""
    (lease,) = await leased(store, "s1")
    await store.save([(lease, Checkpoint(Position(PositionKind.AT, "5"), ((1, 2),)))])
    assert await store.release(lease, None) is True
    assert (await store.load(M))["s1"] == row(
        "s1", checkpoint=Checkpoint(Position(PositionKind.AT, "5"), ((1, 2),)), token=1
    )


async def test_a_released_lease_writes_nothing(store: CheckpointStore) -> None:
    """Nobody writes a row that nobody owns."""
    (lease,) = await leased(store, "s1")
    assert await store.release(lease, after(1)) is True
    assert list(await store.save([(lease, after(2))])) == [lease]
    assert await store.release(lease, after(2)) is False
    assert (await store.load(M))["s1"].checkpoint == after(1)


async def test_release_hands_the_shard_over(store: CheckpointStore) -> None:
    """Position, owner and token change together: the old owner writes nothing more, the new one acquires it from itself."""
    (lease,) = await leased(store, "s1")
    assert await store.request(M, (await store.load(M))["s1"], "you") is True
    assert await store.release(lease, after(1), "you") is True
    handed = (await store.load(M))["s1"]
    assert handed == row("s1", checkpoint=after(1), owner="you", token=2)
    assert list(await store.save([(lease, after(2))])) == [lease]
    assert await store.release(lease, after(2), "me") is False
    assert await store.acquire(M, handed, "you") == Lease(M, "s1", "you", 3)
    assert (await store.load(M))["s1"] == row("s1", checkpoint=after(1), owner="you", token=3)


async def test_a_lost_shard_is_not_handed_over(store: CheckpointStore) -> None:
    """Only who holds the lease may say whose it is next."""
    (lease,) = await leased(store, "s1")
    thief = await store.acquire(M, (await store.load(M))["s1"], "thief")
    assert await store.release(lease, after(1), "friend") is False
    assert (await store.load(M))["s1"] == row("s1", owner="thief", token=2)
    assert thief
    assert list(await store.save([(thief, after(3))])) == []


async def test_a_hand_over_without_a_checkpoint_keeps_the_stored_one(store: CheckpointStore) -> None:
    """Nothing was settled since."""
    (lease,) = await leased(store, "s1")
    await store.save([(lease, Checkpoint(Position(PositionKind.AT, "5"), ((1, 2),), "1.0\n{}"))])
    assert await store.release(lease, None, "you") is True
    stored = (await store.load(M))["s1"]
    assert (stored.owner, stored.token) == ("you", 2)
    assert stored.checkpoint == Checkpoint(Position(PositionKind.AT, "5"), ((1, 2),), "1.0\n{}")


async def test_a_wish_is_seen_until_the_lease_ends(store: CheckpointStore) -> None:
    """The last who asks is the one; a save leaves the wish, whoever acquires or releases ends it."""
    (lease,) = await leased(store, "s1")
    seen = (await store.load(M))["s1"]
    assert await store.request(M, seen, "a") is True
    assert await store.request(M, seen, "b") is True
    await store.save([(lease, after(1))])
    stored = (await store.load(M))["s1"]
    assert stored == row("s1", checkpoint=after(1), owner="me", token=1, wanted_by="b")
    assert await store.acquire(M, stored, "b")
    stored = (await store.load(M))["s1"]
    assert stored.wanted_by is None
    assert await store.request(M, stored, "c") is True
    assert await store.release(Lease(M, "s1", "b", 2), None) is True
    assert (await store.load(M))["s1"] == row("s1", checkpoint=after(1), token=2)


@pytest.mark.parametrize("seen", [{"owner": None, "token": 1}, {"owner": "a", "token": 0}, {"owner": "b", "token": 1}])
async def test_a_wish_is_about_a_lease(store: CheckpointStore, seen: dict[str, Any]) -> None:
    """A wish about a lease that has ended is none; neither is one about no shard."""
    await leased(store, "s1", owner="a")
    assert await store.request(M, row("s1", **seen), "me") is False
    assert await store.request(M, row("absent"), "me") is False
    assert await store.load(M) == {"s1": row("s1", owner="a", token=1)}


async def test_a_repeat_is_answered_as_the_first(store: CheckpointStore) -> None:
    """Whoever did not hear the answer asks again, and must not take its own lease for another's."""
    await store.create(M, [row("s1")])
    seen = (await store.load(M))["s1"]
    lease = await store.acquire(M, seen, "me")
    assert lease == await store.acquire(M, seen, "me") == Lease(M, "s1", "me", 1)
    assert await store.acquire(M, seen, "you") is None
    assert await store.release(lease, after(1)) is True
    assert await store.release(lease, after(1)) is True
    assert await store.release(lease, None) is True
    assert await store.release(lease, after(2)) is False
    assert await store.release(lease, after(1), "you") is False
    lease = await store.acquire(M, (await store.load(M))["s1"], "me")
    assert lease
    assert await store.release(lease, after(3), "you") is True
    assert await store.release(lease, after(3), "you") is True
    assert await store.release(lease, after(3), "they") is False
    assert await store.release(lease, after(3)) is False
    assert await store.acquire(M, (await store.load(M))["s1"], "you")
    assert await store.release(lease, after(3), "you") is False, "taken since"


async def test_what_settles_nothing_says_nothing_about_when(store: CheckpointStore) -> None:
    """`saved_at` is when the position was written: taking, asking for and giving back a lease do not count."""
    old = 1_600_000_000.0
    assert await store.restore({M: [row("s1", saved_at=old), row("s2", saved_at=old)]}, [], {})
    first, second = await leased(store, "s1", "s2")
    await store.request(M, (await store.load(M))["s1"], "you")
    await store.release(first, None)
    await store.release(second, after(1))
    rows = await store.load(M)
    assert rows["s1"].saved_at == old
    assert isinstance(store, MemoryStore) or rows["s2"].saved_at > old


async def test_fifty_acquirers_in_two_processes(open_store: Open, store: CheckpointStore) -> None:
    """Two stores on one table race for each shard: one of fifty wins it, and it alone may write."""
    other = store if isinstance(store, MemoryStore | SqliteStore) else await open_store()
    shards = [f"s{n}" for n in range(4)]
    await store.create(M, [row(shard) for shard in shards])
    rows = await store.load(M)
    tries = [(shard, n) for n in range(50) for shard in shards]
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task((store, other)[n % 2].acquire(M, rows[shard], f"node-{n}")) for shard, n in tries]
    winners = {lease.shard: lease for task in asked if (lease := task.result())}
    assert sum(task.result() is not None for task in asked) == len(winners) == len(shards)
    pretenders = [Lease(M, shard, f"node-{n}", 1) for shard, n in tries]
    stale = await other.save([(lease, after(1)) for lease in pretenders])
    assert set(stale) == set(pretenders) - set(winners.values())
    await other.close()


async def test_members_beat_until_they_leave(store: CheckpointStore) -> None:
    """Each writes what it says of itself over what it said before; they come by id."""
    assert await store.members() == {}
    await store.beat(Member("b", 1, {"version": "1.0"}))
    await store.beat(Member("host/é/1", 7, {}))
    await store.beat(Member("b", 2, {"slots": {"x": [1, None, "ü"]}}))
    found = await store.members()
    assert list(found) == ["b", "host/é/1"]
    assert found == {"b": Member("b", 2, {"slots": {"x": [1, None, "ü"]}}), "host/é/1": Member("host/é/1", 7, {})}
    await store.leave("b")
    await store.leave("b")
    assert list(await store.members()) == ["host/é/1"]


async def test_members_are_apart_from_everything_else(open_store: Open, store: CheckpointStore) -> None:
    """They are no mappings and no documents, their leases stay when they leave, and a restart finds them."""
    await store.beat(Member("me", 1, {"n": HUGE}))
    await leased(store, "s1")
    assert await store.mappings() == [M]
    assert await store.documents("") == {}
    await store.close()
    again = await open_store()
    assert await again.members() == {"me": Member("me", 1, {"n": HUGE})}
    await again.leave("me")
    assert (await again.load(M))["s1"].owner == "me"
    await again.close()


@pytest.mark.parametrize("info", [{"x": float("nan")}, {"x": {1, 2}}])
async def test_what_is_not_json_is_not_said(store: CheckpointStore, info: dict[str, Any]) -> None:
    """It is refused when it is written, not found out by the others."""
    with pytest.raises((TypeError, ValueError)):
        await store.beat(Member("me", 1, info))
    assert await store.members() == {}


async def test_many_rows_are_created_together(store: CheckpointStore) -> None:
    """More than any store writes in one step; the ones that exist stay, and all can be put back."""
    (lease,) = await leased(store, "s100")
    await store.save([(lease, after(1))])
    rows = [row(f"s{n:03}", parents=(f"p{n}",)) for n in range(250)]
    await asyncio.gather(*(store.create(M, rows) for _ in range(3)))
    found = await store.load(M)
    assert list(found) == [each.shard for each in rows]
    assert found.pop("s100") == row("s100", checkpoint=after(1), owner="me", token=1)
    assert found == {each.shard: each for each in rows if each.shard != "s100"}
    leases = [lease, *[got for each in found.values() if (got := await store.acquire(M, each, "me"))]]
    put = [row(f"t{n:03}", checkpoint=after(n)) for n in range(150)] + [row("s007", token=1)]
    assert await store.restore({M: put}, leases[1:], {"a": {}}) is False
    assert len(await store.load(M)) == 250
    assert await store.restore({M: put, OTHER: [row("s1")]}, leases, {"a": {}}) is True
    assert await store.load(M) == {each.shard: each for each in put}
    assert await store.load(OTHER) == {"s1": row("s1")}
    assert await store.documents("") == {"a": {}}
    await store.forget(M)
    assert await store.load(M) == {}


def noise(length: int, seed: int = 1) -> str:
    """Text that does not compress."""
    return base64.b64encode(random.Random(seed).randbytes(length * 3 // 4)).decode()


async def test_big_documents(open_store: Open, store: CheckpointStore) -> None:
    """A document may be larger than any item of any store, and shrink and grow again."""
    big, long = {"text": noise(1_500_000)}, {"text": "x" * 3_000_000}
    await store.put_document("d/1", big)
    await store.put_document("d/2", long)
    assert list(await store.document_keys("d/")) == ["d/1", "d/2"]
    assert await store.documents("d/") == {"d/1": big, "d/2": long}
    other = {"text": noise(600_000, 2)}
    await store.put_document("d/1", other)
    await store.put_document("d/2", {"small": 1})
    await store.close()
    again = await open_store()
    assert await again.documents("d/") == {"d/1": other, "d/2": {"small": 1}}
    await again.put_document("d/1", {"n": 1})
    await again.put_document("d/2", big)
    assert await again.documents("d/") == {"d/1": {"n": 1}, "d/2": big}
    await again.prune_documents("d/", 0)
    assert await again.documents("") == {}
    await again.close()


async def test_more_documents_than_a_page(store: CheckpointStore) -> None:
    """However many there are and however long, all are read."""
    documents = {f"d/{n:02}": {"text": noise(100_000, n)} for n in range(25)}
    for name, document in documents.items():
        await store.put_document(name, document)
    assert await store.documents("d/") == documents
    assert list(await store.document_keys("")) == list(documents)


async def test_a_window_of_any_size_is_kept(store: CheckpointStore) -> None:
    """A tumbling window's state may have a megabyte: saved, replaced, released and read like any other."""
    (lease,) = await leased(store, "s1")
    for size in (1_000_000, 900_000, 10, 500_000):
        checkpoint = Checkpoint(Position(PositionKind.AFTER, str(size)), (), f"1.0\n{noise(size)}")
        assert list(await store.save([(lease, checkpoint)])) == []
        assert (await store.load(M))["s1"].checkpoint == checkpoint
    stale = Lease(M, "s1", "stranger", 1)
    assert list(await store.save([(stale, Checkpoint(END, (), noise(600_000, 5)))])) == [stale]
    assert (await store.load(M))["s1"].checkpoint == checkpoint
    assert await store.release(lease, checkpoint) is True
    assert await store.release(lease, checkpoint) is True
    assert (await store.load(M))["s1"] == row("s1", checkpoint=checkpoint, token=1)


async def test_forget_some_or_all(store: CheckpointStore) -> None:
    """The named shards go, an empty list names none, None names all; absent ones are fine."""
    await store.create(M, [row("s1"), row("s2"), row("s3")])
    await store.create(OTHER, [row("s2")])
    await store.forget(M, ["s2", "absent"])
    assert list(await store.load(M)) == ["s1", "s3"]
    await store.forget(M, [])
    assert list(await store.load(M)) == ["s1", "s3"]
    await store.forget(M)
    assert await store.load(M) == {}
    assert list(await store.load(OTHER)) == ["s2"]


async def test_a_forgotten_lease_does_not_come_back(store: CheckpointStore) -> None:
    """A save that comes after its mapping was deleted makes no row."""
    (lease,) = await leased(store, "s1")
    await store.forget(M)
    assert list(await store.save([(lease, after(1))])) == [lease]
    assert await store.release(lease, after(1)) is False
    assert await store.load(M) == {}


async def test_documents_are_put_replaced_and_deleted(store: CheckpointStore) -> None:
    """A document is JSON, kept as it was when it was put."""
    document = {"UUID": "a", "n": HUGE, "text": 'é "\U0001f600', "deep": [{"x": None, "y": [True, 1.5]}]}
    await store.put_document("mapping/a", document)
    document["UUID"] = "changed later"
    assert (await store.documents("mapping/"))["mapping/a"]["UUID"] == "a"
    await store.put_document("mapping/a", {"UUID": "b"})
    assert await store.documents("mapping/") == {"mapping/a": {"UUID": "b"}}
    await store.delete_document("mapping/a")
    await store.delete_document("mapping/a")
    assert await store.documents("") == {}


async def test_a_document_read_is_the_readers_own(store: CheckpointStore) -> None:
    """Changing what was read changes nothing in the store."""
    await store.put_document("k", {"list": [1]})
    (await store.documents("k"))["k"]["list"].append(2)
    assert await store.documents("k") == {"k": {"list": [1]}}


@pytest.mark.parametrize("document", [{"x": float("nan")}, {"x": {1, 2}}])
async def test_what_is_not_json_is_no_document(store: CheckpointStore, document: dict[str, Any]) -> None:
    """It is refused when it is put, not found out when it is read."""
    with pytest.raises((TypeError, ValueError)):
        await store.put_document("k", document)
    assert await store.documents("") == {}


async def test_a_prefix_is_text(store: CheckpointStore) -> None:
    """% and _ are no wildcards, case counts, keys come sorted, the empty prefix is all."""
    keys = ["A%B", "A%b", "A_b", "Axb", "a%b", "b", "é", "\U0001f600", "mapping/", "mapping/1", "mapping0"]
    for key in keys:
        await store.put_document(key, {"key": key})
    for prefix in ["", "A", "A%", "A_", "a", "mapping/", "%", "_", "é", "\U0001f600", "zzz"]:
        expected = {key: {"key": key} for key in sorted(keys) if key.startswith(prefix)}
        found = await store.documents(prefix)
        assert found == expected
        assert list(found) == list(expected)


async def test_what_was_stored_is_there_after_a_restart(open_store: Open) -> None:
    """Close and open: rows, leases and documents are the same."""
    store = await open_store()
    first, _ = await leased(store, "s1", "s2")
    await store.save([(first, Checkpoint(Position(PositionKind.AT, SEQUENCE), ((HUGE,),)))])
    await store.put_document("mapping/x", {"a": 1})
    rows = await store.load(M)
    await store.close()
    store = await open_store()
    assert await store.load(M) == rows
    assert await store.documents("mapping/") == {"mapping/x": {"a": 1}}
    assert list(await store.save([(first, after(HUGE + 1))])) == []
    await store.close()


async def test_close_finishes_what_was_asked(open_store: Open) -> None:
    """A position that was handed over before close is not lost; closing again is fine."""
    store = await open_store()
    leases = await leased(store, *(f"s{n:02}" for n in range(20)))
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        saves = [group.create_task(store.save([(lease, after(1))])) for lease in leases]
        await asyncio.sleep(0)  # each has been called
        await store.close()
    assert [list(save.result()) for save in saves] == [[]] * 20
    await store.close()
    store = await open_store()
    assert {each.checkpoint for each in (await store.load(M)).values()} == {after(1)}
    await store.close()


async def test_a_hundred_callers_all_get_their_answers(store: CheckpointStore) -> None:
    """No call hangs and none gets another's answer, however many wait at once (performance.md 5: a lost wake-up)."""
    leases = await leased(store, *(f"s{n:03}" for n in range(100)))

    async def work(lease: Lease) -> None:
        for n in range(20):
            if n % 7 == 3:  # some are stale: only they may learn so
                stale = Lease(lease.mapping, lease.shard, "stranger", lease.token)
                assert list(await store.save([(stale, after(999))])) == [stale]
            assert list(await store.save([(lease, after(n))])) == []

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for lease in leases:
            group.create_task(work(lease))
    assert {each.checkpoint for each in (await store.load(M)).values()} == {after(19)}


async def test_a_cancelled_caller_disturbs_nobody(store: CheckpointStore) -> None:
    """What the others asked for is done and answered; what the cancelled one handed over may be done too."""
    leases = await leased(store, *(f"s{n:02}" for n in range(20)))
    tasks = [asyncio.create_task(store.save([(lease, after(1))])) for lease in leases]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    async with asyncio.timeout(10):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [list(result) for result in results[1::2] if not isinstance(result, BaseException)] == [[]] * 10
    rows = await store.load(M)
    assert {rows[lease.shard].checkpoint for lease in leases[1::2]} == {after(1)}
    assert list(await store.save([(leases[0], after(2))])) == []


async def test_one_bad_request_fails_alone(store: CheckpointStore) -> None:
    """A request that cannot be kept is its caller's error; those beside it are kept."""
    leases = await leased(store, *(f"s{n:02}" for n in range(10)))
    async with asyncio.timeout(10):
        results = await asyncio.gather(
            *(store.save([(lease, after(1))]) for lease in leases[:5]),
            store.create(OTHER, [row("good"), NO_ROW]),
            *(store.save([(lease, after(1))]) for lease in leases[5:]),
            return_exceptions=True,
        )
    assert isinstance(results.pop(5), AttributeError)
    assert [list(result) for result in results if not isinstance(result, BaseException)] == [[]] * 10
    assert {each.checkpoint for each in (await store.load(M)).values()} == {after(1)}
    assert await store.load(OTHER) == {}


async def test_keys_are_listed_in_order(store: CheckpointStore) -> None:
    """Those that begin with the prefix, wildcards of SQL and neighbours in the order being nothing special."""
    for key in ("d/b/2", "d/a/1", "d/%/1", "d/a_1", "d0", "c/z"):
        await store.put_document(key, {"n": "x" * 100})
    assert list(await store.document_keys("d/")) == ["d/%/1", "d/a/1", "d/a_1", "d/b/2"]
    assert list(await store.document_keys("d/a/1")) == ["d/a/1"]
    assert list(await store.document_keys("d/%")) == ["d/%/1"]
    assert list(await store.document_keys("e")) == []
    assert len(await store.document_keys("")) == 6


async def test_the_oldest_documents_are_pruned(store: CheckpointStore) -> None:
    """By the order of their keys, those of other prefixes left alone."""
    for number in range(5):
        await store.put_document(f"discarded/a/{number}", {"n": number})
    await store.put_document("discarded/b/0", {})
    await store.prune_documents("discarded/a/", 2)
    assert list(await store.documents("")) == ["discarded/a/3", "discarded/a/4", "discarded/b/0"]
    await store.prune_documents("discarded/a/", 9)
    await store.prune_documents("nothing", 0)
    assert len(await store.documents("")) == 3


async def test_mappings_with_rows_are_listed(store: CheckpointStore) -> None:
    """In order, each once, as long as one row is left; documents do not count."""
    assert list(await store.mappings()) == []
    await store.create(OTHER, [row("s1"), row("s2")])
    await store.create(M, [row("s1")])
    await store.put_document("stream/third", {})
    assert list(await store.mappings()) == [M, OTHER]
    await store.forget(OTHER, ["s1"])
    assert list(await store.mappings()) == [M, OTHER]
    await store.forget(OTHER)
    assert list(await store.mappings()) == [M]


async def test_rows_are_restored_in_one_step(open_store: Open, store: CheckpointStore) -> None:
    """All that a mapping has is replaced, documents are put and deleted, and an old position stays old."""
    leases = await leased(store, "s1", "s2")
    await store.create(OTHER, [row("s1")])
    await store.put_document("a", {})
    await store.put_document("b", {})
    checkpoint = Checkpoint(Position(PositionKind.AT, SEQUENCE), ((HUGE, 7),), "5.0\n{}")
    put = [row("s2", checkpoint=checkpoint, parents=("s0",), token=9, saved_at=1_600_000_000.0), row("s3")]
    third = "0a3c4e6f-0000-4000-8000-00000000000c"
    assert await store.restore({M: put, third: [row("s1")]}, leases, {"a": None, "c": {"n": 1}, "b": {"n": {}}})
    await store.close()
    again = await open_store()
    found = await again.load(M)
    assert found == {"s2": put[0], "s3": put[1]}
    assert found["s2"].saved_at == 1_600_000_000.0
    assert found["s3"].saved_at > 1_600_000_000.0
    assert await again.load(third) == {"s1": row("s1")}
    assert await again.load(OTHER) == {"s1": row("s1")}
    assert await again.documents("") == {"b": {"n": {}}, "c": {"n": 1}}
    assert await again.restore({third: []}, [], {}) is False, "it has a row that nobody holds"
    lease = await again.acquire(third, row("s1"), "me")
    assert lease
    assert await again.restore({third: []}, [lease], {})
    assert list(await again.mappings()) == [M, OTHER]
    await again.close()


@pytest.mark.parametrize("what", ["lost", "released", "gone", "not held", "of nothing"])
async def test_rows_are_restored_by_who_holds_them_all(store: CheckpointStore, what: str) -> None:
    """Else nothing is changed, neither rows nor documents."""
    leases = await leased(store, "s1", "s2")
    match what:
        case "lost":
            assert await store.acquire(M, (await store.load(M))["s2"], "other")
        case "released":
            await store.release(leases[1], None)
        case "gone":
            await store.forget(M, ["s2"])
        case "not held":
            await store.create(M, [row("s3")])
        case _:
            leases.append(Lease(M, "s3", "me", 1))
    before = await store.load(M)
    assert await store.restore({M: [row("s9")], OTHER: [row("s1")]}, leases, {"a": {}}) is False
    assert await store.load(M) == before
    assert await store.load(OTHER) == {}
    assert await store.documents("") == {}
