"""`poller checkpoints import --kcl`: what a lease table says, and that its rule neither loses nor redelivers."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller import kcl
from poller.checkpoints import Checkpoints
from poller.core.model import END, TRIM_HORIZON, Listing, Position, PositionKind, Shard, StreamFacts
from poller.errors import PollerError, PositionTrimmed, SourceUnavailable
from poller.kcl import Lease, Taken, at_rest, choose, lease_of, of_stream, plan
from poller.stores.memory import MemoryStore
from tests.unit.test_checkpoints import BIG, KNOWN, M, T, mapping

LATEST = Position(PositionKind.LATEST)
[STREAM_SPEC, TABLE_SPEC, _] = [each.source for each in KNOWN]
HERE = "123456789012:orders:1700000000"


def listed(*shards: Shard) -> Listing:
    return Listing(shards, 1.0)


def positions(taken: Taken) -> dict[str, Position]:
    return dict(taken.positions())


def after(value: str) -> Position:
    return Position(PositionKind.AFTER, value)


def item(**more: Any) -> dict[str, Any]:
    """As KCL 2 writes it."""
    return {
        "leaseKey": {"S": "shardId-000000000001"},
        "leaseCounter": {"N": "41"},
        "ownerSwitchesSinceCheckpoint": {"N": "2"},
        "checkpoint": {"S": BIG},
        "checkpointSubSequenceNumber": {"N": "0"},
        "startingHashKey": {"S": "0"},
        "endingHashKey": {"S": "170141183460469231731687303715884105727"},
        **more,
    }


# --- items


def test_a_lease_is_read() -> None:
    """Owner, counter, place inside an aggregate, parents; what is only prepared does not count."""
    more = {
        "leaseOwner": {"S": "w"},
        "parentShardId": {"SS": ["b", "a"]},
        "childShardIds": {"SS": ["c"]},
        "checkpointSubSequenceNumber": {"N": "3"},
        "pendingCheckpoint": {"S": "SHARD_END"},
        "throughputKBps": {"N": "1.5"},
    }
    assert lease_of(item(**more)) == Lease("shardId-000000000001", BIG, 3, "w", 41, ("a", "b"))
    assert lease_of(item(parentShardId={"S": "a"})) == Lease("shardId-000000000001", BIG, 0, None, 41, ("a",))
    key = f"{HERE}:s1"
    assert lease_of(item(leaseKey={"S": key}, streamName={"S": HERE}, shardId={"S": "s1"})) == Lease(
        "s1", BIG, counter=41, stream=HERE
    )


@pytest.mark.parametrize(
    "more",
    [
        {"entityType": {"S": "WORKER_METRIC_STATS"}},
        {"entityType": {"S": "LEADER"}, "leaseCounter": {"N": "1"}},
        {"ownerName": {"S": "w"}, "recordVersionNumber": {"S": "x"}},
    ],
)
def test_what_kcl_3_keeps_beside_its_leases_is_passed_over(more: dict[str, Any]) -> None:
    """Leader locks, worker metrics, stream names."""
    assert lease_of({"leaseKey": {"S": "leader"}, **more}) is None
    assert lease_of(item(entityType={"S": "LEASE"})) is not None


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"id": {"S": "1"}}, "no lease table of KCL: an item has no leaseKey"),
        ({"leaseKey": {"N": "1"}}, "no lease table of KCL"),
        (item(scope={"S": "mapping/1"}), "the store of a poller; use `poller checkpoints export`"),
        (item(checkpoint={"S": "17-x"}), "checkpoint '17-x', which is no sequence number"),
        (item(checkpointSubSequenceNumber={"S": "x"}), "the lease shardId-000000000001 is damaged"),
        (item(streamName={"S": HERE}), "the lease shardId-000000000001 is damaged"),
        ({"leaseKey": {"S": "s"}, "leaseCounter": {"N": "1"}}, "the lease s is damaged"),
    ],
)
def test_another_table_is_refused(wrong: dict[str, Any], text: str) -> None:
    """Each with its reason; a lease that cannot be read is never passed over."""
    with pytest.raises(PollerError, match=text):
        lease_of(wrong)


def test_of_several_streams_only_the_mappings_own() -> None:
    """By account, name and creation; the adapter's own spelling for a table's stream."""
    other, older = "123456789012:bills:1700000000", "123456789012:orders:1600000000"
    label = TABLE_SPEC.arn.rpartition("/")[2].replace(":", "_")
    table = f"123456789012:eu-west-1$123456789012$orders${label}:1"
    leases = [Lease("s", "7", stream=stream) for stream in (HERE, other, older, table)]
    assert of_stream(leases, STREAM_SPEC, "1700000000") == leases[:1]
    assert of_stream(leases, TABLE_SPEC, "") == leases[3:]
    with pytest.raises(PollerError, match=f"no lease of {STREAM_SPEC.arn}, created at 1800000000; it has those of "):
        of_stream(leases, STREAM_SPEC, "1800000000")
    alone = [Lease("s", "7")]
    assert of_stream(alone, STREAM_SPEC, "1800000000") == alone
    with pytest.raises(PollerError, match="'orders', which is no stream of KCL"):
        of_stream([Lease("s", "7", stream="orders")], STREAM_SPEC, "")


# --- positions


@pytest.mark.parametrize(
    ("lease", "expected"),
    [
        (Lease("s", BIG), after(BIG)),
        (Lease("s", BIG, 1), Position(PositionKind.AT, BIG)),
        (Lease("s", "SHARD_END"), END),
        (Lease("s", "TRIM_HORIZON"), TRIM_HORIZON),
        (Lease("s", "LATEST"), TRIM_HORIZON),
        (Lease("s", "AT_TIMESTAMP"), TRIM_HORIZON),
    ],
)
def test_where_a_shard_goes_on(lease: Lease, expected: Position) -> None:
    """Behind the checkpoint; with the aggregate that it lies in; without one where nothing is missed."""
    taken = plan([lease], listed(Shard("s")), LATEST)
    assert positions(taken) == {"s": expected}
    assert bool(taken.notes) == (lease.sub > 0 or lease.checkpoint in {"LATEST", "AT_TIMESTAMP"})


def test_a_moment_of_the_mapping_is_obeyed() -> None:
    """It stands in for the one that only the application's own configuration has; a child is read whole all the same."""
    start = Position(PositionKind.AT_TIMESTAMP, "1700000000.0")
    leases = [Lease("a", "LATEST"), Lease("b", "AT_TIMESTAMP"), Lease("c", "TRIM_HORIZON")]
    taken = plan(leases, listed(Shard("a"), Shard("b"), Shard("c")), start)
    assert positions(taken) == {"a": start, "b": start, "c": TRIM_HORIZON}
    assert taken.notes == ("a, b: never checkpointed by KCL; to be read from AT_TIMESTAMP 1700000000.0",)


# --- lineage

LINE = [Shard("a", (), True), Shard("b", ("a",), True), Shard("c", ("b",))]


def test_a_finished_shard_whose_lease_is_deleted_is_not_read_again() -> None:
    """All above a lease that was begun is done; parents are kept."""
    taken = plan([Lease("c", "9")], listed(*LINE), LATEST)
    assert positions(taken) == {"a": END, "b": END, "c": after("9")}
    assert {shard["shard"]: shard["parents"] for shard in taken.shards} == {"a": [], "b": ["a"], "c": ["b"]}
    assert taken.notes == ("a, b: KCL has deleted the lease; taken as read to the end",)


@pytest.mark.parametrize("checkpoint", ["9", "SHARD_END"])
def test_a_child_without_a_lease_is_left_to_discovery(checkpoint: str) -> None:
    """KCL has not seen it: it gets no row, so it is read from TRIM_HORIZON."""
    taken = plan([Lease("b", checkpoint)], listed(*LINE), LATEST)
    assert positions(taken).keys() == {"a", "b"}
    assert "c: KCL has no lease yet; to be read from TRIM_HORIZON" in taken.notes


def test_above_a_lease_that_was_not_begun_nothing_is_taken_as_read() -> None:
    """KCL deletes no lease before its children have begun: this table was tampered with, and nothing may be lost."""
    assert positions(plan([Lease("c", "TRIM_HORIZON")], listed(*LINE), LATEST)) == {"c": TRIM_HORIZON}


def test_below_an_unfinished_lease_nothing_is_taken_as_read() -> None:
    """KCL reads no child before its parents are done, so it cannot have finished the one between."""
    assert positions(plan([Lease("a", "3"), Lease("c", "9")], listed(*LINE), LATEST)) == {
        "a": after("3"),
        "c": after("9"),
    }


def test_shards_that_are_not_listed() -> None:
    """A parent of a listed shard keeps its position; finished ones go; the rest is somebody else's."""
    leases = [Lease("old", "SHARD_END"), Lease("x", "5"), Lease("p", "4"), Lease("g", "SHARD_END", parents=("x",))]
    taken = plan([*leases, Lease("q", "3")], listed(Shard("c", ("p", "g"))), LATEST)
    assert positions(taken) == {"p": after("4"), "g": END, "x": after("5")}
    assert taken.strangers == ("q",)
    assert "p, x: has left the stream before KCL was done with it; the poller counts that as lost" in taken.notes


class Application:
    """A stream that reshards and trims, and KCL's workers on it: what was processed is known shard by shard."""

    def __init__(self) -> None:
        self.shards: dict[str, tuple[str, ...]] = {"s0": (), "s1": ()}
        self.trimmed: set[str] = set()
        self.truth = {"s0": "TRIM_HORIZON", "s1": "TRIM_HORIZON"}
        self.leases = {"s0", "s1"}

    def children(self, name: str) -> list[str]:
        return [shard for shard, parents in self.shards.items() if name in parents]

    def leaves(self) -> list[str]:
        return [name for name in self.shards if not self.children(name)]

    def step(self, what: str, which: int) -> None:
        names = sorted(self.shards)
        name = names[which % len(names)]
        match what:
            case "split" if name in self.leaves():
                for _ in range(2):
                    self._add((name,))
            case "merge" if len(self.leaves()) > 1:
                first = which % (len(self.leaves()) - 1)
                self._add(tuple(self.leaves()[first : first + 2]))
            case "read" if self._is_open(name):
                self.truth[name] = "7"
            case "end" if self._is_open(name) and self.children(name):
                self.truth[name] = "SHARD_END"
                for child in self.children(name):
                    self.leases.add(child)
            case "clean" if self._is_finished(name):
                self.leases.discard(name)
            case "trim" if self.truth[name] == "SHARD_END" and self.trimmed.issuperset(self.shards[name]):
                self.trimmed.add(name)

    def _add(self, parents: tuple[str, ...]) -> None:
        name = f"s{len(self.shards)}"
        self.shards[name] = parents
        self.truth[name] = "TRIM_HORIZON"

    def _is_open(self, name: str) -> bool:
        """KCL reads it: it has the lease, and the parents are done."""
        done = all(self.truth[parent] == "SHARD_END" for parent in self.shards[name])
        return name in self.leases and done and self.truth[name] != "SHARD_END"

    def _is_finished(self, name: str) -> bool:
        """LeaseCleanupManager's conditions."""
        children = self.children(name)
        begun = all(child in self.leases and self.truth[child] != "TRIM_HORIZON" for child in children)
        return self.truth[name] == "SHARD_END" and begun and not self.leases.intersection(self.shards[name])


STEPS = st.tuples(
    st.sampled_from(["split", "merge", "read", "end", "end", "clean", "clean", "trim"]), st.integers(0, 30)
)


@given(st.lists(STEPS, max_size=120))
def test_whatever_kcl_has_cleaned_up_nothing_is_lost_or_repeated(steps: Sequence[tuple[str, int]]) -> None:
    """Each listed shard goes on exactly where it was; without a row is the same as TRIM_HORIZON."""
    application = Application()
    for step in steps:
        application.step(*step)
    leases = [Lease(name, application.truth[name], parents=application.shards[name]) for name in application.leases]
    shards = [
        Shard(name, parents, bool(application.children(name)))
        for name, parents in application.shards.items()
        if name not in application.trimmed
    ]
    taken = plan(leases, listed(*shards), LATEST)
    found = positions(taken)
    expected = {"TRIM_HORIZON": TRIM_HORIZON, "7": after("7"), "SHARD_END": END}
    for shard in shards:
        assert found.get(shard.id, TRIM_HORIZON) == expected[application.truth[shard.id]], shard
    assert not taken.strangers


# --- a running application


class Reads:
    """A table that is read again and again."""

    def __init__(self, *answers: list[Lease]) -> None:
        self.answers = list(answers)
        self.count = 0

    async def __call__(self) -> list[Lease]:
        self.count += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kcl, "WATCH", 0.05)
    monkeypatch.setattr(kcl, "LOOK", 0.01)


@pytest.mark.usefixtures("quick")
async def test_a_running_application_is_seen() -> None:
    """By a counter that rises, a checkpoint, or a lease that comes, with the worker's name."""
    one, two = Lease("a", "5", owner="w", counter=1), Lease("b", "5")
    for other in ([Lease("a", "5", owner="w", counter=2), two], [one, Lease("b", "6")], [one, two, Lease("c", "5")]):
        with pytest.raises(PollerError, match=r"still runs: the leases of . are being changed.*stop it first.*--force"):
            await at_rest(Reads([one, two], [one, two], other))
    with pytest.raises(PollerError, match="by w;"):
        await at_rest(Reads([one], [Lease("a", "5", owner="w", counter=2)]))


@pytest.mark.usefixtures("quick")
async def test_an_application_at_rest_is_read_until_it_is_believed() -> None:
    """Owners that a stopped application left are watched; without any there is nothing to watch."""
    reads = Reads([Lease("a", "5", owner="dead", counter=1)])
    assert await at_rest(reads) == reads.answers[0]
    assert reads.count > 2
    reads = Reads([Lease("a", "5", counter=1)])
    assert await asyncio.wait_for(at_rest(reads), 1) == reads.answers[0]
    assert reads.count == 1


# --- into the store


class Source:
    """A stream that lists shards, and has every position unless it was told otherwise."""

    def __init__(self, *shards: Shard, trouble: type[PollerError] | None = None) -> None:
        self.listing = listed(*shards)
        self.trouble = trouble
        self.asked: list[tuple[str, Position]] = []

    async def facts(self) -> StreamFacts:
        return StreamFacts(86_400.0, "1700000000")

    async def shards(self) -> Listing:
        return self.listing

    async def iterator(self, shard: str, at: Position) -> str:
        self.asked.append((shard, at))
        if self.trouble:
            raise self.trouble("it says why")
        return "iterator"


async def taken_over(source: Source, leases: list[Lease], *, force: bool = False) -> kcl.Takeover:
    return await kcl._take_over(leases, source, KNOWN[0], force=force)  # type: ignore[arg-type]


async def test_the_document_is_one_that_import_takes() -> None:
    """With the stream's own identity, so that the daemon does not take it for another stream."""
    takeover = await taken_over(Source(*LINE), [Lease("c", BIG)])
    store = MemoryStore()
    desk = Checkpoints(store, KNOWN, has_daemon=False)
    assert len(await desk.restore(json.dumps(takeover.document), "table x")) == 3
    rows = await store.load(M)
    assert {name: (row.checkpoint.position, row.parents) for name, row in rows.items()} == {
        "a": (END, ()), "b": (END, ("a",)), "c": (after(BIG), ("b",)),
    }  # fmt: skip
    assert {row.saved_at for row in rows.values()} == {0.0}, "the first read must look for what was trimmed"
    [document] = (await store.documents("stream/")).values()
    assert document == {"arn": STREAM_SPEC.arn, "incarnation": "1700000000"}


async def test_positions_are_asked_for() -> None:
    """Shards of all Kinesis streams are called alike: what the stream does not have is of another one, or gone."""
    source = Source(*LINE)
    await taken_over(source, [Lease("c", "9")])
    assert source.asked == [("c", after("9"))]
    with pytest.raises(PollerError, match=r"c: .* does not have the record that KCL stands at.*--force"):
        await taken_over(Source(*LINE, trouble=PositionTrimmed), [Lease("c", "9")])
    with pytest.raises(PollerError, match="c, 9: it says why"):
        await taken_over(Source(*LINE, trouble=SourceUnavailable), [Lease("c", "9")])
    assert await taken_over(Source(*LINE, trouble=PositionTrimmed), [Lease("c", "9")], force=True)


async def test_strangers_are_refused_or_left_out() -> None:
    """Never imported: a table of another stream must not be half taken."""
    leases = [Lease("c", "9"), Lease("z", "9")]
    with pytest.raises(PollerError, match=r"z: KCL is not done with it.*no such shard.*--force leaves it out"):
        await taken_over(Source(*LINE), leases)
    takeover = await taken_over(Source(*LINE), leases, force=True)
    assert "z: not a shard of the stream (any more), left out" in takeover.notes
    assert "z" not in {shard["shard"] for shard in takeover.document["mappings"][0]["shards"]}
    for more in ([Lease("z", "9")], [Lease("z", "SHARD_END")]):
        with pytest.raises(PollerError, match=f"none of its leases .* is mapping {M} the right one"):
            await taken_over(Source(*LINE), more, force=True)


@pytest.fixture
def desk() -> Checkpoints:
    return Checkpoints(MemoryStore(), KNOWN, has_daemon=False)


async def test_the_mapping_is_chosen(desk: Checkpoints) -> None:
    """By its name, else the only one of a stream; which there are, when it is not clear."""
    assert choose(await desk.look(["g"]), "g").id == T
    with pytest.raises(PollerError, match=f"Give --mapping; there are {M} .*{T}"):
        choose(await desk.look(), "")
    with pytest.raises(PollerError, match="reads a queue"):
        choose(await desk.look(["h"]), "h")
    only = Checkpoints(MemoryStore(), [KNOWN[0], KNOWN[2]], has_daemon=False)
    assert choose(await only.look(), "").id == M
    none = Checkpoints(MemoryStore(), [mapping(M, KNOWN[2].source.arn, "f")], has_daemon=False)
    with pytest.raises(PollerError, match="no mapping of a stream"):
        choose(await none.look(), "")
