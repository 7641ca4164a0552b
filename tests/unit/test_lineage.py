"""What may be read when shards split, merge, expire."""

from poller.core.lineage import plan
from poller.core.model import END, TRIM_HORIZON, Checkpoint, Listing, Position, PositionKind, Row, Shard

LATEST = Position(PositionKind.LATEST)
DONE = Checkpoint(END)
GOING = Checkpoint(Position(PositionKind.AFTER, "5"))


def listing(*shards: Shard) -> Listing:
    return Listing(shards, at=1000.5)


def rows(*given: Row) -> dict[str, Row]:
    return {row.shard: row for row in given}


def test_first_sight_at_trim_horizon_reads_closed_shards_first() -> None:
    """Closed shards are read like open ones, and before their children."""
    found = plan(listing(Shard("child", ("parent",)), Shard("parent", closed=True)), {}, TRIM_HORIZON)
    assert [row.checkpoint.position for row in found.create] == [TRIM_HORIZON, TRIM_HORIZON]
    assert (found.ready, found.blocked) == (("parent",), ("child",))


def test_first_sight_at_latest_pins_the_moment_for_all_open_shards() -> None:
    """Open shards start at the listing's moment, closed ones are done: a reshard during start-up loses nothing."""
    found = plan(listing(Shard("a"), Shard("b", closed=True), Shard("c", ("b",))), {}, LATEST)
    pinned = Position(PositionKind.LATEST, "1000.5")
    assert {row.shard: row.checkpoint.position for row in found.create} == {"a": pinned, "b": END, "c": pinned}
    assert found.ready == ("a", "c")


def test_at_timestamp_is_kept_for_every_shard() -> None:
    """Shards without data from then on end at once by themselves."""
    at = Position(PositionKind.AT_TIMESTAMP, "900.0")
    found = plan(listing(Shard("a", closed=True), Shard("b", ("a",))), {}, at)
    assert {row.checkpoint.position for row in found.create} == {at}


def test_a_later_shard_starts_at_trim_horizon_whatever_the_start_says() -> None:
    """Nothing in a child is older than what the mapping knows."""
    known = rows(Row("a", GOING))
    found = plan(listing(Shard("a", closed=True), Shard("b", ("a",))), known, LATEST)
    assert found.create == (Row("b", Checkpoint(TRIM_HORIZON), ("a",)),)
    assert (found.ready, found.blocked) == (("a",), ("b",))


def test_a_merge_waits_for_both_parents() -> None:
    """One parent done is not enough."""
    shards = listing(Shard("p", closed=True), Shard("q", closed=True), Shard("c", ("p", "q")))
    half = rows(Row("p", DONE), Row("q", GOING), Row("c", Checkpoint(TRIM_HORIZON), ("p", "q")))
    assert plan(shards, half, TRIM_HORIZON).blocked == ("c",)
    whole = {**half, "q": Row("q", DONE)}
    assert plan(shards, whole, TRIM_HORIZON).ready == ("c",)


def test_an_expired_parent_counts_as_done() -> None:
    """A parent that was never seen cannot be waited for."""
    known = rows(Row("c", GOING, ("gone",)))
    assert plan(listing(Shard("c", ("gone",))), known, TRIM_HORIZON).ready == ("c",)


def test_an_unlisted_parent_that_is_not_done_is_waited_for() -> None:
    """Its records may be in flight: a listing that omits it for a moment must not let the child overtake them."""
    known = rows(Row("p", GOING), Row("c", Checkpoint(TRIM_HORIZON), ("p",)))
    found = plan(listing(Shard("c", ("p",))), known, TRIM_HORIZON)
    assert (found.ready, found.blocked) == (("p",), ("c",))


def test_a_shard_that_vanished_is_still_tried() -> None:
    """A listing may be incomplete: only the source can say that a shard is gone."""
    assert plan(listing(Shard("b")), rows(Row("a", GOING), Row("b", GOING)), TRIM_HORIZON).ready == ("a", "b")


def test_a_generation_that_nobody_saw_is_an_orphans_loss() -> None:
    """Its parent came and expired unread. At first sight, or with a parent that is known or listed, nothing is lost."""
    known = rows(Row("a", DONE))
    assert plan(listing(Shard("c", ("b",))), known, TRIM_HORIZON).orphans == ("c",)
    assert plan(listing(Shard("c", ("b",))), {}, TRIM_HORIZON).orphans == ()
    assert plan(listing(Shard("b", ("a",))), known, TRIM_HORIZON).orphans == ()
    assert plan(listing(Shard("b", ("a",)), Shard("c", ("b",))), known, TRIM_HORIZON).orphans == ()


def test_tombstones_stay_until_nobody_needs_them() -> None:
    """Deleted too early, a shard that is listed again would be delivered again from its start."""
    known = rows(Row("a", DONE), Row("b", DONE, ("a",)), Row("c", GOING, ("b",)))
    assert plan(listing(Shard("b", ("a",)), Shard("c", ("b",))), known, TRIM_HORIZON).delete == ()
    assert plan(listing(Shard("c", ("b",))), known, TRIM_HORIZON).delete == ("a",)
    assert plan(listing(), rows(Row("a", DONE)), TRIM_HORIZON).delete == (), "the last one says where we are"


def test_a_known_stream_without_rows_to_create_changes_nothing() -> None:
    """Planning twice plans nothing new."""
    first = plan(listing(Shard("a")), {}, LATEST)
    again = plan(listing(Shard("a")), rows(*first.create), LATEST)
    assert again.create == ()
    assert again.ready == ("a",)
