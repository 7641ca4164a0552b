"""Who takes, hands over and asks for which shards."""

import random

import pytest

from poller.core.leasing import Sightings, Spread, plan, slots
from poller.core.model import TRIM_HORIZON, Checkpoint, Row


def row(shard: str, owner: str | None = None, wanted_by: str | None = None) -> Row:
    return Row(shard, Checkpoint(TRIM_HORIZON), (), owner, 1, wanted_by=wanted_by)


def moves(rows: list[Row], me: str, live: list[str], working: list[str] | None = None, others: int = 0):
    """`others`: shards of other mappings that me has, all of them its own."""
    spread = Spread()
    spread.look("m", rows, [each.shard for each in rows])
    if others:
        spread.held["other"], spread.wanted["other"] = {me: others}, others
    if working is None:
        working = [each.shard for each in rows if each.owner == me]
    return plan(rows, working, spread, live, me)


def test_one_member_takes_everything() -> None:
    """Free shards, and those of owners that are dead."""
    rows = [row("a"), row("b", "dead"), row("c", "me")]
    assert moves(rows, "me", ["me"]).take == ("a", "b")
    assert moves(rows, "me", []).take == ("a", "b"), "itself counts, whatever it has seen of itself"


def test_a_live_owner_keeps_its_shards() -> None:
    """However many they are: they are asked for, not taken."""
    found = moves([row(name, "you") for name in "abcd"], "me", ["me", "you"])
    assert found.take == ()
    assert found.ask == ("a", "b")


def test_a_share_is_not_exceeded() -> None:
    """Each takes its part of the free ones; the parts cover all of them."""
    rows = [row(name) for name in "abcde"]
    assert [len(moves(rows, me, ["x", "y"]).take) for me in ("x", "y")] == [3, 3]
    assert moves(rows, "x", ["x", "y"], others=9).take == (), "it has nine elsewhere"


def test_what_was_handed_over_is_taken() -> None:
    """It is ours in the store and nobody reads it, whatever the share says."""
    rows = [row("a", "me"), *(row(name, "me") for name in "bcd")]
    assert moves(rows, "me", ["me", "you"], working=["b", "c", "d"]).take == ("a",)


def test_the_owner_gives_what_a_live_member_asks_for() -> None:
    """Not to one that has died since, and not what somebody else owns."""
    rows = [row("a", "me", "you"), row("b", "me", "dead"), row("c", "you", "me"), row("d", "me", "me")]
    assert moves(rows, "me", ["me", "you"]).give == (("a", "you"),)


def test_a_balanced_fleet_rests() -> None:
    """A difference of one is balance."""
    rows = [row("a", "x"), row("b", "x"), row("c", "y")]
    for me in ("x", "y"):
        assert moves(rows, me, ["x", "y"]) == moves([], me, ["x", "y"])


def test_nothing_is_asked_for_while_something_is_free() -> None:
    """That comes first: it is read by nobody."""
    rows = [row("a"), *(row(name, "you") for name in "bcdef")]
    assert moves(rows, "me", ["me", "you"]).ask == ()


def test_a_wish_is_not_repeated() -> None:
    """What was asked for counts as on its way, and two members do not ask for the same shard."""
    rows = [
        row("a", "you", "me"),
        row("b", "you"),
        row("c", "you", "him"),
        row("d", "you"),
        row("e", "you"),
        row("f", "you"),
    ]
    found = moves(rows, "me", ["me", "you", "him"])
    assert found.ask == ("b",)


@pytest.mark.parametrize("seed", range(200))
def test_every_fleet_settles(seed: int) -> None:
    """From any start, members that look one after the other end with all shards owned and even, and then rest."""
    rng = random.Random(seed)
    members = [f"m{n}" for n in range(rng.randint(1, 5))]
    rows = {f"s{n}": row(f"s{n}", rng.choice([None, "dead", *members])) for n in range(rng.choice([0, 1, 3, 8, 33]))}
    working = {me: {name for name, each in rows.items() if each.owner == me and rng.random() < 0.8} for me in members}
    for _ in range(80):
        for me in rng.sample(members, len(members)):
            found = moves(list(rows.values()), me, members, list(working[me]))
            for name in found.take:
                assert rows[name].owner in {None, me} or rows[name].owner not in members
                rows[name] = row(name, me)
                working[me].add(name)
            for name, to in found.give:
                working[me].discard(name)
                rows[name] = row(name, to)
            for name in found.ask:
                rows[name] = row(name, rows[name].owner, me)
    counts = [sum(each.owner == me for each in rows.values()) for me in members]
    assert sum(counts) == len(rows)
    assert max(counts) - min(counts) <= 1
    for me in members:
        found = moves(list(rows.values()), me, members, list(working[me]))
        assert found == type(found)()


def test_a_member_is_dead_a_duration_after_its_last_beat() -> None:
    """By the clock of whoever looks; a beat that does not change is none."""
    sightings = Sightings(10.0)
    sightings.saw({"a": 1, "b": 1}, 100.0)
    sightings.saw({"a": 2, "b": 1}, 108.0)
    assert sightings.live(["b", "a"], 110.0) == ["a", "b"]
    assert sightings.live(["a", "b"], 110.1) == ["a"]
    sightings.saw({"a": 2, "b": 2}, 112.0)
    assert sightings.live(["a", "b"], 118.1) == ["b"], "it beats again"


def test_an_owner_that_nobody_has_heard_of_gets_a_duration() -> None:
    """It may have begun between two looks."""
    sightings = Sightings(10.0)
    assert sightings.is_live("new", 5.0)
    assert sightings.is_live("new", 15.0)
    assert not sightings.is_live("new", 15.1)


def test_one_that_left_stays_dead() -> None:
    """Rows may name it still, handed over as it went: forgotten at once it would be new, and alive, again and again."""
    sightings = Sightings(10.0)
    sightings.saw({"a": 1}, 0.0)
    for now in range(1, 11):
        sightings.saw({}, float(now))
        assert sightings.is_live("a", float(now))
    for now in range(11, 300):
        sightings.saw({}, float(now))
        assert not sightings.is_live("a", float(now))
    sightings.saw({}, 301.0)
    assert sightings._seen == {}, "nobody names it any more by then"


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 100])
def test_slots_add_up(limit: int) -> None:
    """Over the fleet exactly the limit, dealt by sorted id."""
    members = ["c", "a", "b"]
    dealt = [slots(limit, members, me) for me in sorted(members)]
    assert sum(dealt) == limit
    assert dealt == sorted(dealt, reverse=True)
    assert slots(limit, [], "me") == limit
