"""Workers of one daemon: what they say, as one; slots that are lent to them; their parts of a function's limits."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from poller.app import Worker
from poller.core.model import MappingStatus, ShardState, ShardStatus, SourceKind
from poller.server.merge import merged
from poller.workers.pool import Pool

# --- status


def status(*shards: ShardStatus, **fields: object) -> MappingStatus:
    stream = MappingStatus("m", "f", SourceKind.KINESIS, "arn", "Enabled", shards=shards)
    return replace(stream, **fields)


def shard(name: str, state: ShardState, **fields: object) -> ShardStatus:
    return ShardStatus(name, state, **fields)


def test_each_shard_is_shown_as_its_worker_has_it() -> None:
    """Not as another worker saw it in the store, whichever comes first."""
    running, other = shard("a", ShardState.RUNNING, lag=1.0), shard("a", ShardState.OPEN, lease="other")
    for views in ([running, other], [other, running]):
        [mapping] = merged([[status(view)] for view in views])
        assert mapping.shards == (running,)


def test_a_shard_that_changes_hands_is_where_something_is_in_flight() -> None:
    """The one that lets go still works; the one that waits to begin does not."""
    leaving, coming = shard("a", ShardState.DRAINING, in_flight=1), shard("a", ShardState.STARTING)
    [mapping] = merged([[status(coming)], [status(leaving)]])
    assert mapping.shards == (leaving,)


@pytest.mark.parametrize(
    ("states", "shown"),
    [
        (("Disabled", "Disabling"), "Disabling"),
        (("Disabled", "Enabled"), "Enabled"),
        (("Enabled", "Creating"), "Creating"),
        (("Enabled", "Enabled"), "Enabled"),
        (("Enabled", "Deleting"), "Deleting"),
    ],
)
def test_a_state_is_reached_when_all_have_reached_it(states: tuple[str, ...], shown: str) -> None:
    """A mapping that one worker still drains is not paused."""
    for order in (states, states[::-1]):
        [mapping] = merged([[status(state=state)] for state in order])
        assert mapping.state == shown


def test_numbers_are_added_and_trouble_is_shown() -> None:
    """In flight and receivers are sums; one open circuit, one problem, one failure is the mapping's."""
    calm = status(in_flight=2, receivers=3, receiver_limit=10, last_result="OK")
    rough = replace(
        calm, breaker="open", reason="no route", receivers=None, last_result="PROBLEM: Function call failed",
        seek_pending=True, retention=60.0,
    )  # fmt: skip
    [mapping] = merged([[calm], [rough], [status(last_result="No records processed")]])
    assert (mapping.in_flight, mapping.receivers, mapping.receiver_limit) == (4, 3, 20)
    assert (mapping.breaker, mapping.reason, mapping.last_result) == ("open", "no route", rough.last_result)
    assert mapping.seek_pending
    assert mapping.retention == 60.0


def test_a_mapping_that_one_worker_does_not_know_yet_is_shown() -> None:
    """In the order in which they first appear."""
    first, second = status(), status(id="n")
    assert merged([[first], [second, first]]) == [first, second]
    assert merged([]) == []


# --- slots


def test_a_slot_is_lent_to_the_first_who_asks() -> None:
    """And to the next once it is back; whoever asked no more is passed over."""
    granted: list[tuple[int, int]] = []
    pool = Pool(granted.append)
    for loan in ((0, 1), (1, 1), (2, 1)):
        pool.take(loan, "f", 1)
    pool.take((3, 1), "g", 1)
    assert granted == [(0, 1), (3, 1)]
    pool.back((1, 1))
    pool.back((0, 1))
    assert granted[2:] == [(2, 1)]
    pool.back((2, 1))
    pool.back((2, 1))
    pool.take((0, 2), "f", 1)
    pool.take((1, 2), "f", 1)
    assert granted[3:] == [(0, 2)]


def test_a_dead_worker_gives_back_what_it_had_and_is_granted_nothing() -> None:
    """Its place in the line is gone before its slot is free."""
    granted: list[tuple[int, int]] = []
    pool = Pool(granted.append)
    for loan in ((0, 1), (0, 2), (1, 1)):
        pool.take(loan, "f", 1)
    pool.gone(0)
    assert granted == [(0, 1), (1, 1)]


def test_a_limit_that_changes_holds_from_the_next_who_asks() -> None:
    """More slots are lent at once; fewer as they come back."""
    granted: list[tuple[int, int]] = []
    pool = Pool(granted.append)
    pool.take((0, 1), "f", 1)
    pool.take((0, 2), "f", 1)
    pool.take((0, 3), "f", 3)
    assert len(granted) == 3
    pool.take((0, 4), "f", 1)
    pool.back((0, 1))
    pool.back((0, 2))
    assert len(granted) == 3
    pool.back((0, 3))
    assert granted[3:] == [(0, 4)]


@pytest.mark.parametrize("seed", range(20))
def test_never_more_slots_are_lent_than_there_are(seed: int) -> None:
    """Whatever is asked, given back, given up and dies; and none is left over while somebody waits."""
    rng, held = random.Random(seed), set()
    limit = rng.choice((1, 2, 3))
    waiting: list[tuple[int, int]] = []
    numbers: Counter[int] = Counter()

    def grant(loan: tuple[int, int]) -> None:
        assert loan == waiting.pop(0)
        held.add(loan)

    pool = Pool(grant)
    for _ in range(500):
        match rng.choice(("take", "take", "back", "back", "give up", "die" if rng.random() < 0.1 else "back")):
            case "take":
                worker = rng.randrange(4)
                numbers[worker] += 1
                waiting.append((worker, numbers[worker]))
                pool.take(waiting[-1], "f", limit)
            case "back" if held:
                loan = rng.choice(sorted(held))
                held.remove(loan)
                pool.back(loan)
            case "give up" if waiting:
                loan = waiting.pop(rng.randrange(len(waiting)))
                pool.back(loan)
            case "die":
                worker = rng.randrange(4)
                waiting[:] = [loan for loan in waiting if loan[0] != worker]
                held -= {loan for loan in held if loan[0] == worker}
                pool.gone(worker)
        assert len(held) == limit or (len(held) < limit and not waiting)


# --- parts


def worker(number: int, count: int) -> Worker:
    return Worker(number, count, "", "", lambda name: name, None, lambda: None)


@pytest.mark.parametrize(("limit", "count"), [(20, 4), (7, 4), (4, 4), (100, 3)])
def test_a_limit_is_shared_out_evenly_and_whole(limit: int, count: int) -> None:
    """The parts differ by one at most and their sum is the limit; nothing is lent."""
    parts = [worker(number, count).bounds("f", limit, None) for number in range(count)]
    slots = [part[0] for part in parts]
    assert sum(slots) == limit
    assert max(slots) - min(slots) <= 1
    assert all(part[1:] == (None, None) for part in parts)


def test_fewer_slots_than_workers_are_lent_and_a_rate_is_divided() -> None:
    """No worker is without: whoever has the shard may have the slot."""
    assert worker(3, 4).bounds("f", 2, 10.0) == (2, 2.5, "f")
    assert worker(3, 4).bounds("f", None, None) == (None, None, None)
