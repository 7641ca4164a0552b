"""`poller checkpoints`: what may be changed and when, what is refused, and that nothing is half-done."""

import argparse
import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from poller.checkpoints import OWNER, Checkpoints, run
from poller.config import load
from poller.control import known_mappings
from poller.core.model import END, TRIM_HORIZON, Checkpoint, Lease, Mapping, Position, PositionKind, Row
from poller.errors import ConfigError, PollerError, StoreInUse
from poller.mappings import normalize, resolve
from poller.runtime.stream_runner import seek_key, stream_key
from poller.settings import Declared, HttpFunction, Settings
from poller.stores.memory import MemoryStore
from poller.stores.sqlite import SqliteStore
from poller.verbs import checkpoints as verbs

STREAM = "arn:aws:kinesis:eu-west-1:123456789012:stream/orders"
TABLE = "arn:aws:dynamodb:eu-west-1:123456789012:table/orders/stream/2026-01-01T00:00:00.000"
QUEUE = "arn:aws:sqs:eu-west-1:123456789012:orders"
M = "0a3c4e6f-0000-4000-8000-00000000000a"
T = "1b3c4e6f-0000-4000-8000-00000000000b"
Q = "2c3c4e6f-0000-4000-8000-00000000000c"
GONE = "3d3c4e6f-0000-4000-8000-00000000000d"
BIG = "49590338271490256608559692538361571095921575989136588898"  # more digits than other programs' numbers have
FUNCTIONS = {name: HttpFunction(name, f"http://127.0.0.1:1/{name}") for name in "fgh"}


def at(value: str, **more: Any) -> Checkpoint:
    return Checkpoint(Position(PositionKind.AT, value), **more)


def after(value: str, **more: Any) -> Checkpoint:
    return Checkpoint(Position(PositionKind.AFTER, value), **more)


BUSY = at("7", resume=((8, int(BIG)), (9,)), window='1700000000.5\n{"sum": 1.50}')


def mapping(uuid: str, arn: str, function: str, **more: Any) -> Mapping:
    start = {} if arn == QUEUE else {"StartingPosition": "LATEST"}
    return resolve(uuid, normalize({"EventSourceArn": arn, "FunctionName": function, **start, **more}), FUNCTIONS, "p")[
        0
    ]


KNOWN = (mapping(M, STREAM, "f"), mapping(T, TABLE, "g"), mapping(Q, QUEUE, "h"))
PAUSED = tuple(replace(each, enabled=False) for each in KNOWN)


async def filled(*rows: Row) -> MemoryStore:
    """A store with these rows of M, a tombstone and a busy row unless said."""
    store = MemoryStore()
    await store.create(M, rows or (Row("s0", Checkpoint(END)), Row("s1", BUSY, ("s0",), "host/1/a", 4)))
    await store.put_document(stream_key(M), {"arn": STREAM, "incarnation": "1"})
    return store


def stopped(store: MemoryStore) -> Checkpoints:
    return Checkpoints(store, KNOWN, has_daemon=False)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


# --- set


async def test_a_position_is_set_and_what_hung_on_the_old_one_goes(logs) -> None:
    """Lanes and window are dropped, parents stay, the dead owner is gone, one line says who moved what from where."""
    store = await filled()
    [move] = await stopped(store).move("f", "s1", Position(PositionKind.AFTER, BIG))
    assert (move.was, move.now) == (BUSY, after(BIG))
    row = (await store.load(M))["s1"]
    assert row == Row("s1", after(BIG), ("s0",), None, 5)
    [line] = logs
    assert line["by"]
    assert {**line, "by": ""} == {
        "event": "position_moved", "log_level": "warning", "mapping": M, "function": "f", "shard": "s1", "by": "",
        "was": "AT_SEQUENCE_NUMBER 7 with lanes and an open window", "now": f"AFTER_SEQUENCE_NUMBER {BIG}",
    }  # fmt: skip


async def test_a_dry_run_changes_nothing(logs) -> None:
    """It answers what would be; store and log stay as they are."""
    store = await filled()
    before = await store.load(M)
    desk = stopped(store)
    document = json.dumps(await desk.export())
    assert len(await desk.move("f", "s1", END, dry=True)) == 1
    assert len(await desk.reset("f", dry=True)) == 2
    changed = document.replace('"7"', '"6"')
    assert len(await desk.restore(changed, "x", overwrite=True, dry=True)) == 1
    assert await store.load(M) == before
    assert set(await store.documents("")) == {stream_key(M)}
    assert not logs


class Overtaken(MemoryStore):
    """A daemon takes a shard just before, or just after, it is acquired here."""

    def __init__(self, *, is_before: bool, shard: str) -> None:
        super().__init__()
        self.is_before = is_before
        self.shard = shard

    async def acquire(self, mapping: str, row: Row, owner: str) -> Lease | None:
        if owner != OWNER or row.shard != self.shard:
            return await super().acquire(mapping, row, owner)
        if self.is_before:
            await super().acquire(mapping, row, "daemon")
        lease = await super().acquire(mapping, row, owner)
        if not self.is_before:
            await super().acquire(mapping, (await self.load(mapping))[row.shard], "daemon")
        return lease


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("change", ["set", "reset", "import"])
async def test_a_daemon_that_takes_a_shard_meanwhile_wins(change: str, is_before: bool, logs) -> None:
    """Nothing is half-done, no other shard stays taken, and the person is told."""
    store = Overtaken(is_before=is_before, shard="s2")
    checkpoints = {f"s{n}": after(str(n)) for n in (1, 2, 3)}
    await store.create(M, [Row(shard, each) for shard, each in checkpoints.items()])
    await store.put_document(stream_key(M), {"arn": STREAM, "incarnation": "1"})
    desk = Checkpoints(store, PAUSED, has_daemon=True)
    document = json.dumps(await desk.export()).replace('"3"', '"2"')
    work = {
        "set": lambda: desk.move("f", "s2", TRIM_HORIZON),
        "reset": lambda: desk.reset("f"),
        "import": lambda: desk.restore(document, "x", overwrite=True),
    }
    with pytest.raises(PollerError, match=r"a daemon took shards of mapping .*; nothing was changed"):
        await work[change]()
    rows = await store.load(M)
    assert {shard: row.checkpoint for shard, row in rows.items()} == checkpoints
    assert {shard: row.owner for shard, row in rows.items()} == {"s1": None, "s2": "daemon", "s3": None}
    assert set(await store.documents("")) == {stream_key(M)}
    assert not logs


async def test_beside_a_daemon_only_what_is_paused_and_free_may_change() -> None:
    """Disabled, and no shard has an owner; what an earlier change that was killed left behind counts as free."""
    store = await filled()
    document = json.dumps(await stopped(store).export())

    async def refused(desk: Checkpoints, match: str) -> None:
        for work in (
            lambda: desk.move("f", "s1", END),
            lambda: desk.reset("f"),
            lambda: desk.restore(document, "x", overwrite=True),
        ):
            with pytest.raises(PollerError, match=match):
                await work()

    before = await store.load(M)
    await refused(Checkpoints(store, KNOWN, has_daemon=True), f"`poller pause {M}`.*`poller seek`")
    await refused(Checkpoints(store, PAUSED, has_daemon=True), "still works on 1 shards of mapping .*, such as s1")
    assert await store.load(M) == before
    lease = await store.acquire(M, before["s1"], OWNER)
    assert lease
    await refused(Checkpoints(store, KNOWN, has_daemon=True), "is not paused")  # its shards are free for a moment
    await Checkpoints(store, PAUSED, has_daemon=True).move("f", "s1", TRIM_HORIZON)
    assert (await store.load(M))["s1"].checkpoint == Checkpoint(TRIM_HORIZON)


async def test_a_seek_that_waits_is_not_undone_by_a_set() -> None:
    """It would undo the set when the mapping runs; a reset and an import drop it."""
    store = await filled()
    order = {"orders": [{"kind": "TRIM_HORIZON", "value": "", "shard": "", "by": "me"}]}
    desk = stopped(store)
    for drop in ("reset", "import"):
        document = json.dumps(await desk.export())
        await store.put_document(seek_key(M), order)
        with pytest.raises(PollerError, match="a seek of mapping"):
            await desk.move("f", "s1", END)
        assert (await desk.look(["f"]))[0].is_sought
        await (desk.reset("f") if drop == "reset" else desk.restore(document, "x", overwrite=True))
        assert not await store.documents(seek_key(M))
        await store.create(M, [Row("s1", BUSY)])


# --- who is meant


async def test_mistakes_of_names_are_sentences() -> None:
    """What there is, near names first; queues have no positions."""
    desk = stopped(await filled())
    with pytest.raises(PollerError, match=f"there is no mapping x; .*{M} \\(f\\)"):
        await desk.reset("x")
    with pytest.raises(PollerError, match="has no shard s01; it has s1, s0"):
        await desk.move("f", "s01", END)
    with pytest.raises(PollerError, match="has no positions yet"):
        await desk.get("g", "s0")
    with pytest.raises(PollerError, match="has no positions yet"):
        await desk.export(["g"])
    for work in (desk.get("h", "s"), desk.move("h", "s", END), desk.reset("h"), desk.export(["h"])):
        with pytest.raises(PollerError, match="a queue has no positions"):
            await work


async def test_a_mapping_that_nobody_knows_is_found_by_its_uuid(logs) -> None:
    """Taken out of the file it keeps its positions until reset, beside a daemon too."""
    store = await filled()
    await store.create(GONE, [Row("s0", after("3"))])
    await store.put_document(stream_key(GONE), {"arn": STREAM, "incarnation": "1"})
    desk = Checkpoints(store, KNOWN, has_daemon=True)
    shown = await desk.look()
    assert [each.id for each in shown] == [M, T, Q, GONE]
    assert (shown[-1].function, shown[-1].source_arn, shown[-1].is_queue) == ("", STREAM, False)
    assert (await desk.get(GONE[:6], "s0"))["mapping"] == GONE
    assert len(await desk.reset(GONE)) == 1
    assert list(await store.mappings()) == [M]
    assert set(await store.documents("")) == {stream_key(M)}
    assert [(line["shard"], line["was"], line["now"]) for line in logs] == [
        ("s0", "AFTER_SEQUENCE_NUMBER 3", "none")
    ]  # fmt: skip


async def test_what_is_enabled_is_what_was_said_last() -> None:
    """A pause through the API holds until the file's own Enabled changes; API-made mappings are known too."""
    store = MemoryStore()
    made = normalize({"EventSourceArn": TABLE, "FunctionName": "g", "StartingPosition": "LATEST", "Enabled": False})
    await store.put_document(f"mapping/{T}", {"document": made, "modified": 1.0})
    await store.put_document(f"mapping/{GONE}", {"document": {**made, "FunctionName": "not:a:name"}, "modified": 1.0})
    declared = normalize({"EventSourceArn": STREAM, "FunctionName": "f", "StartingPosition": "LATEST"})

    async def states(enabled: bool) -> dict[str, bool]:
        settings = Settings("p", functions=FUNCTIONS, mappings=(Declared(M, {**declared, "Enabled": enabled}, 1),))
        return {each.id: each.enabled for each, _ in await known_mappings(settings, store)}

    assert await states(True) == {M: True, T: False}
    await store.put_document(f"enabled/{M}", {"enabled": False, "declared": True})
    assert await states(True) == {M: False, T: False}
    assert await states(False) == {M: False, T: False}
    await store.put_document(f"enabled/{M}", {"enabled": True, "declared": True})
    assert await states(False) == {M: False, T: False}
    settings = Settings("p", functions=FUNCTIONS, mappings=(Declared(M, declared, 1),))
    assert [each.id for each, _ in await known_mappings(settings, None)] == [M]


# --- export and import


async def sqlite(path: Path) -> SqliteStore:
    class Ignored:
        def requested(self, operation: str, outcome: str) -> None:
            pass

    return await SqliteStore.open(str(path), Ignored())


async def test_what_was_exported_comes_back_whole(tmp_path: Path, logs) -> None:
    """Positions, lanes beyond 64 bits, windows to the byte, parents, the stream, and when it was saved: a position as
    old as it is must look so, or a loss is not seen.
    """
    rows = (
        Row("s0", Checkpoint(END), saved_at=1_700_000_000.0),
        Row("s1", BUSY, ("s0",), "host/1/a", 4, 1_700_000_100.0),
        Row("s2", Checkpoint(Position(PositionKind.LATEST, "1700000000.25")), ("s0",), saved_at=1_700_000_000.0),
        Row("s3", Checkpoint(Position(PositionKind.AT_TIMESTAMP, "1.5")), ("s0", "sX"), saved_at=1_700_000_000.0),
        Row("s4", Checkpoint(TRIM_HORIZON), saved_at=4_000_000_000.0),
    )
    document = json.dumps(await stopped(await filled(*rows)).export())
    assert f'"{BIG}"' in document
    store = await sqlite(tmp_path / "p.db")
    desk = Checkpoints(store, KNOWN, has_daemon=False)
    moves = await desk.restore(document, "x")
    assert [(move.shard, move.was) for move in moves] == [(f"s{n}", None) for n in range(5)]
    found = await store.load(M)
    assert found == {row.shard: replace(row, owner=None, token=0) for row in rows}
    assert [row.saved_at for row in found.values()][:4] == [row.saved_at for row in rows][:4]
    assert found["s4"].saved_at < 3_000_000_000.0, "a moment that is still to come"
    assert await store.documents("") == {stream_key(M): {"arn": STREAM, "incarnation": "1"}}
    again = json.loads(json.dumps(await desk.export()))
    assert again["mappings"][0]["shards"][:4] == json.loads(document)["mappings"][0]["shards"][:4]
    await store.close()


async def test_an_import_replaces_only_when_told_so(logs) -> None:
    """A mapping has exactly the document's shards then; rows that stay keep a rising token; others are left alone."""
    store = await filled()
    await store.create(T, [Row("t0", after("1"), token=2)])
    desk = stopped(store)
    document = json.dumps(await desk.export(["f"]))
    await store.forget(M, ["s0"])
    await store.create(M, [Row("s9", after("9"))])
    await desk.move("f", "s1", TRIM_HORIZON)
    logs.clear()
    before = await store.load(M)
    with pytest.raises(ConfigError, match=r"^x: mappings\[0\]: mapping .* has 2 positions already; --overwrite"):
        await desk.restore(document, "x")
    assert await store.load(M) == before
    assert {(move.shard, move.was, move.now) for move in await desk.restore(document, "x", overwrite=True)} == {
        ("s0", None, Checkpoint(END)), ("s1", Checkpoint(TRIM_HORIZON), BUSY), ("s9", after("9"), None),
    }  # fmt: skip
    rows = await store.load(M)
    assert {shard: row.checkpoint for shard, row in rows.items()} == {"s0": Checkpoint(END), "s1": BUSY}
    assert rows["s1"].token > before["s1"].token
    assert rows["s1"].owner is None
    assert (await store.load(T))["t0"] == Row("t0", after("1"), token=2)
    assert len(logs) == 3
    assert not await desk.restore(document, "x", overwrite=True), "nothing differs"


def document(*shards: dict[str, Any], **more: Any) -> dict[str, Any]:
    exported = {"mapping": M, "function": "f", "source_arn": STREAM, "stream": None, "shards": list(shards), **more}
    return {"format": "esm-poller checkpoints", "version": 1, "exported_at": "", "mappings": [exported]}


def shard(name: str = "s", kind: str = "TRIM_HORIZON", value: str = "", **more: Any) -> dict[str, Any]:
    return {"shard": name, "position": {"kind": kind, "value": value}, **more}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "truncated"),
        ("[" * 100_000, "not what"),
        ("{}", "format is not 'esm-poller checkpoints'"),
        ({**document(shard()), "version": 2}, "version: this poller reads version 1, not 2"),
        ({**document(shard()), "mappings": []}, "mappings: there is none"),
        ({**document(shard()), "more": 1}, "unknown field `more`"),
        (document(), "shards: there is none"),
        (document(shard(kind="NOWHERE")), r"Invalid enum value 'NOWHERE' - at `\$.mappings\[0\].shards\[0\].position"),
        (document(shard(kind="AT_SEQUENCE_NUMBER", value="x")), r"shards\[0\].position: .* in digits, not 'x'"),
        (document(shard(kind="AFTER_SEQUENCE_NUMBER", value="\u0663")), "in digits"),
        (document(shard(kind="AT_SEQUENCE_NUMBER", value=7)), "Expected `str`, got `int`"),
        (document(shard(kind="LATEST")), "LATEST needs epoch seconds"),
        (document(shard(kind="AT_TIMESTAMP", value="nan")), "AT_TIMESTAMP needs epoch seconds"),
        (document(shard(kind="SHARD_END", value="1")), "SHARD_END has no value"),
        (document(shard(resume=[[]])), "resume: "),
        (document(shard(resume=[["1", "-1"]])), "resume: "),
        (document(shard(resume=[["1"] * 11])), "resume: "),
        (document(shard(window={"start": 1, "state": "[]"})), "window: "),
        (document(shard(window={"start": 1, "state": "{"})), "window: "),
        (document(shard(window={"start": 1})), "missing required field `state`"),
        (document(shard(saved_at=-1)), "saved_at: "),
        (document(shard("")), "shard: '' is no shard id"),
        (document(shard("a\nb")), "is no shard id"),
        (document(shard(parents=["a", "b", "c"])), "parents: "),
        (document(shard(parents=["a b"])), "parents: "),
        (document(shard("a", parents=["b"]), shard("b", parents=["a"])), "are parents of each other"),
        (document(shard(), shard()), "a shard stands here twice"),
        (document(shard(), mapping=M.upper()), "no UUID in small letters"),
        (document(shard(), mapping=GONE), "neither the config file nor the API has a mapping"),
        (document(shard(), mapping=Q, source_arn=QUEUE), "a queue has no positions"),
        (document(shard(), mapping=T), f"source_arn: these positions are of {STREAM}, and mapping {T} reads {TABLE}"),
        (document(shard(kind="AT_TIMESTAMP", value="1"), mapping=T, source_arn=TABLE), "has no AT_TIMESTAMP"),
    ],
)
async def test_a_document_with_a_mistake_is_refused_whole(text: Any, match: str, logs) -> None:
    """A sentence that says where; the store is as it was."""
    store = MemoryStore()
    with pytest.raises(ConfigError, match=match) as refused:
        await stopped(store).restore(text if isinstance(text, str) else json.dumps(text), "x.json")
    assert all(mistake.startswith("x.json: ") for mistake in refused.value.mistakes)
    assert not await store.mappings()
    assert not await store.documents("")
    assert not logs


async def test_all_mistakes_are_told_at_once() -> None:
    """One good mapping beside bad ones is not imported either."""
    good, bad = document(shard()), document(shard(kind="LATEST"), shard("a\nb"), mapping=T, source_arn=TABLE)
    good["mappings"] += bad["mappings"] * 2
    store = MemoryStore()
    with pytest.raises(ConfigError) as refused:
        await stopped(store).restore(json.dumps(good), "x")
    assert len(refused.value.mistakes) == 5
    assert not await store.mappings()


async def test_force_imports_what_nobody_knows_or_what_reads_something_else() -> None:
    """For a host whose config comes later."""
    store = MemoryStore()
    both = document(shard(), mapping=GONE)
    both["mappings"] += document(shard(), mapping=T)["mappings"]
    assert len(await stopped(store).restore(json.dumps(both), "x", force=True)) == 2
    assert list(await store.mappings()) == [T, GONE]


# --- the verbs


class Shell:
    """The verb over a config file and a SQLite store."""

    def __init__(self, folder: Path, capsys, monkeypatch) -> None:
        self.folder = folder
        self.store = folder / "poller.db"
        self.capsys = capsys
        self.config = folder / "poller.yaml"
        monkeypatch.setattr("poller.checkpoints.configure_logging", lambda *_: None)
        self.config.write_text(
            f"store: sqlite://{self.store}\n"
            "functions: {f: {url: 'http://127.0.0.1:1/'}}\n"
            "event_source_mappings:\n"
            f"  - {{EventSourceArn: '{STREAM}', FunctionName: f, StartingPosition: LATEST, UUID: {M}}}\n"
            f"  - {{EventSourceArn: '{QUEUE}', FunctionName: f, UUID: {Q}}}\n"
        )

    def __call__(self, *arguments: str) -> str:
        """What it prints. ConfigError, or SystemExit for a usage error."""
        parser = argparse.ArgumentParser()
        verbs.add(parser.add_subparsers())
        given = parser.parse_args(["checkpoints", *arguments, "-c", str(self.config)])
        assert given.verb(given) == 0
        return self.capsys.readouterr().out

    def fill(self, *rows: Row) -> None:
        async def fill() -> None:
            store = await sqlite(self.store)
            await store.create(M, rows)
            await store.close()

        asyncio.run(fill())


@pytest.fixture
def shell(tmp_path: Path, capsys, monkeypatch, logs) -> Shell:
    return Shell(tmp_path, capsys, monkeypatch)


def test_list_says_what_there_is(shell: Shell) -> None:
    """A line for each mapping and shard: position, age, owner, parents, lanes, window; queues have none."""
    shell.fill(Row("s0", Checkpoint(END)), Row("s1", BUSY, ("s0",), "host/1/a", 4))
    more = "owner host/1/a  parents s0  2 + 1 lanes ahead  window open since 2023-11-14T22:13:20.500000Z"
    assert re.sub(r"saved \d s ago", "saved now", shell("list")).splitlines() == [
        f"{M}  kinesis   f  enabled  {STREAM}",
        "  s0  SHARD_END  saved now",
        f"  s1  AT_SEQUENCE_NUMBER 7  saved now  {more}",
        f"{Q}  sqs       f  enabled  {QUEUE}",
        "  a queue has no positions",
    ]
    [found] = json.loads(shell("list", M[:8], "--json"))
    assert (found["mapping"], found["enabled"], found["seek_pending"]) == (M, True, False)
    assert found["shards"][1] == json.loads(shell("get", M, "s1"))
    assert {**found["shards"][1], "saved_at": 0} == {
        "mapping": M, "shard": "s1", "position": {"kind": "AT_SEQUENCE_NUMBER", "value": "7"}, "parents": ["s0"],
        "resume": [["8", BIG], ["9"]], "window": {"start": 1700000000.5, "state": '{"sum": 1.50}'}, "saved_at": 0,
        "owner": "host/1/a", "token": 4,
    }  # fmt: skip
    shell("reset", M)
    assert "  no positions yet; it begins at LATEST" in shell("list").splitlines()


def test_set_takes_each_kind_of_position(shell: Shell) -> None:
    """AT, AFTER, TRIM_HORIZON and the end; exactly one of them, in digits."""
    shell.fill(Row("s1", BUSY))
    was = "AT_SEQUENCE_NUMBER 7 with lanes and an open window"
    for arguments, now in (
        (["--sequence", BIG], f"AT_SEQUENCE_NUMBER {BIG}"),
        (["--after", "0"], "AFTER_SEQUENCE_NUMBER 0"),
        (["--trim-horizon"], "TRIM_HORIZON"),
        (["--end"], "SHARD_END"),
    ):
        line = f"{M}  s1  {was} -> {now}\n1 position"
        assert shell("set", M, "s1", *arguments, "--dry-run") == f"{line} would be changed\n"
        assert shell("set", M, "s1", *arguments) == f"{line} changed\n"
        was = now
    for bad in ([], ["--end", "--after", "1"], ["--after", "-1"], ["--after", "1e3"], ["--sequence", "1" * 129]):
        with pytest.raises(SystemExit) as usage:
            shell("set", M, "s1", *bad)
        assert usage.value.code == 2


def test_a_host_that_has_no_store_yet_may_import(shell: Shell) -> None:
    """The store is made, but not by a dry run or for a bad document; every other verb says that there is none."""
    shell.fill(Row("s1", BUSY))
    exported = shell.folder / "positions.json"
    exported.write_text(shell("export"))
    for path in shell.folder.glob("poller.db*"):
        path.unlink()
    for arguments in (["list"], ["get", M, "s1"], ["set", M, "s1", "--end"], ["reset", M], ["export"]):
        with pytest.raises(ConfigError, match=f"there is no store {shell.store}; `poller run` makes it"):
            shell(*arguments)
    line = f"{M}  s1  none -> AT_SEQUENCE_NUMBER 7 with lanes and an open window\n1 position"
    assert shell("import", str(exported), "--dry-run") == f"{line} would be changed\n"
    refused = shell.folder / "refused.json"
    refused.write_text(exported.read_text().replace('"7"', '"x"'))
    with pytest.raises(ConfigError, match=f"{refused}: .* in digits, not 'x'"):
        shell("import", str(refused))
    assert not shell.store.exists()
    assert shell("import", str(exported)) == f"{line} changed\n"
    assert json.loads(shell("get", M, "s1"))["resume"] == [["8", BIG], ["9"]]
    with pytest.raises(ConfigError, match="cannot read"):
        shell("import", str(shell.folder / "nothing.json"))


def test_an_import_that_cannot_be_written_leaves_all_as_it_was(shell: Shell) -> None:
    """Rows of two mappings and two documents go in one commit, or not at all."""

    async def work() -> None:
        store = await sqlite(shell.store)
        await store.create(M, [Row("s1", BUSY)])
        lease = await store.acquire(M, (await store.load(M))["s1"], OWNER)
        assert lease
        broken: Any = {M: [Row("s2", after("1"))], T: [Row("t", after("1")), None]}
        with pytest.raises(AttributeError):
            await store.restore(broken, [lease], {"stream/x": {}})
        assert list(await store.load(M)) == ["s1"]
        assert not await store.load(T)
        assert not await store.documents("")
        await store.close()

    asyncio.run(work())


def test_looking_does_not_take_the_lock(shell: Shell) -> None:
    """A daemon that starts at that moment must not find its store in use; during a change it does."""
    shell.fill(Row("s1", BUSY))
    settings = load(str(shell.config))

    async def start(_: Checkpoints) -> None:
        await (await sqlite(shell.store)).close()

    run(settings, start)
    with pytest.raises(StoreInUse):
        run(settings, start, change=True)


def test_beside_a_daemon_the_verbs_look_and_refuse(shell: Shell) -> None:
    """Whatever it runs may be seen, and not changed."""
    shell.fill(Row("s1", BUSY))

    async def work() -> None:
        store = await sqlite(shell.store)  # as a daemon holds it
        await asyncio.to_thread(shell, "list")
        await asyncio.to_thread(shell, "export")
        for arguments in (["set", M, "s1", "--end"], ["reset", M]):
            with pytest.raises(ConfigError, match=r"poller checkpoints: a daemon uses the store, and mapping .*pause"):
                await asyncio.to_thread(shell, *arguments)
        assert (await store.load(M))["s1"].checkpoint == BUSY
        await store.close()

    asyncio.run(work())
