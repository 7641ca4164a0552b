"""How many receive loops: growth, throttles, failures, recovery; with figures worked out by hand."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poller.core.scaling import INITIAL, Scaling

EPOCH = 1_800_000_000.0  # floats are a quarter of a microsecond apart there


def after(scaling: Scaling, seconds: float, now: float) -> int:
    """The limit so much later, looked at as often as loops do that are busy."""
    for tenth in range(int(seconds * 10)):
        scaling.limit(now + tenth / 10)
    return scaling.limit(now + seconds)


def grown(level: int, *, ceiling: int = 1250) -> tuple[Scaling, float]:
    """A scaling that has grown to a level at 5 loops a second and grows no more, and the time."""
    scaling = Scaling(1, ceiling, 300)
    now = EPOCH + (level - INITIAL) / 5
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    assert after(scaling, now - EPOCH, EPOCH) == level
    scaling.received(is_full=False, loops=10_000, now=now)
    return scaling, now


@pytest.mark.parametrize(
    ("floor", "ceiling", "limit"), [(1, 1250, 5), (1, 1, 1), (1, 3, 3), (2, 5, 5), (8, 1250, 8), (20, 20, 20)]
)
def test_it_begins_with_five_within_floor_and_ceiling(floor: int, ceiling: int, limit: int) -> None:
    """AWS starts with five batches at once."""
    scaling = Scaling(floor, ceiling, 300)
    assert scaling.limit(EPOCH) == limit
    assert scaling.limit(EPOCH + 3600) == limit
    assert scaling.grows_at(EPOCH) == inf


def test_it_grows_by_the_rate_while_replies_are_full() -> None:
    """300 a minute are 5 a second, counted from the first full reply; a further full one changes nothing."""
    scaling = Scaling(1, 1250, 300)
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    assert scaling.limit(EPOCH) == 5
    scaling.received(is_full=True, loops=10_000, now=EPOCH + 0.1)
    assert scaling.limit(EPOCH + 0.19) == 5
    assert scaling.limit(EPOCH + 0.2) == 6
    scaling.received(is_full=True, loops=10_000, now=EPOCH + 0.9)
    assert scaling.limit(EPOCH + 1) == 10
    assert after(scaling, 59, EPOCH + 1) == 305


def test_it_stops_growing_with_a_reply_that_is_not_full_and_keeps_what_it_has() -> None:
    """What grew until that reply stays; growth starts again with the next full one, not with the time between."""
    scaling, now = grown(50)
    assert scaling.limit(now + 600) == 50
    assert scaling.grows_at(now + 600) == inf
    scaling.received(is_full=True, loops=10_000, now=now + 600)
    assert scaling.limit(now + 601) == 55


def test_the_ceiling_ends_growth() -> None:
    """Nothing is saved up above it, and nobody is told to wait for more."""
    scaling = Scaling(1, 7, 300)
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    assert scaling.grows_at(EPOCH) == pytest.approx(EPOCH + 0.2)
    assert scaling.limit(EPOCH + 1000) == 7
    assert scaling.grows_at(EPOCH + 1000) == inf
    scaling.throttled(7, EPOCH + 1000)
    assert scaling.limit(EPOCH + 1000) == 3


def test_an_empty_queue_takes_it_back_to_five() -> None:
    """Not below the loops that are there: they still work; as they end it falls further."""
    scaling, now = grown(100)
    scaling.emptied(60)
    assert scaling.limit(now) == 60
    scaling.emptied(80)
    assert scaling.limit(now) == 60
    scaling.emptied(2)
    assert scaling.limit(now) == 5


def test_an_empty_reply_ends_growth() -> None:
    """Until the next full one."""
    scaling = Scaling(1, 1250, 300)
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    scaling.emptied(5)
    assert scaling.limit(EPOCH + 60) == 5
    assert scaling.grows_at(EPOCH + 60) == inf


def test_an_empty_queue_does_not_undo_a_cut() -> None:
    """A level below five comes back with successes only."""
    scaling = Scaling(1, 1250, 300)
    scaling.throttled(5, EPOCH)
    scaling.emptied(5)
    assert scaling.limit(EPOCH) == 2


def test_a_throttle_halves_at_once() -> None:
    """The level, or what was there if that is less; down to one."""
    scaling, now = grown(100)
    scaling.throttled(100, now)
    assert scaling.limit(now) == 50
    scaling.throttled(20, now + 1)
    assert scaling.limit(now + 1) == 10
    for second in range(2, 10):
        scaling.throttled(20, now + second)
    assert scaling.limit(now + 10) == 1


def test_throttles_within_a_second_are_one() -> None:
    """Fifty loops that are refused together do not halve fifty times."""
    scaling, now = grown(100)
    for n in range(50):
        scaling.throttled(100, now + n / 51)
    assert scaling.limit(now + 0.999) == 50
    scaling.throttled(50, now + 1)
    assert scaling.limit(now + 1) == 25


def test_a_throttle_cuts_what_has_grown_until_then() -> None:
    """Growth since the last look counts first."""
    scaling = Scaling(1, 1250, 300)
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    scaling.throttled(10, EPOCH + 1)
    assert scaling.limit(EPOCH + 1) == 5


def test_successes_bring_the_first_five_back() -> None:
    """One loop a success, without full replies; beyond five only growth helps."""
    scaling, now = grown(8)
    scaling.throttled(2, now)
    limits = []
    for _ in range(6):
        scaling.succeeded()
        limits.append(scaling.limit(now))
    assert limits == [2, 3, 4, 5, 5, 5]


def test_failures_lower_it_gradually() -> None:
    """Each leaves nine tenths: 100, 90, 81, 72.9, 65.6; never below one."""
    scaling, now = grown(100)
    limits = []
    for _ in range(4):
        scaling.failed()
        limits.append(scaling.limit(now))
    assert limits == [90, 81, 72, 65]
    for _ in range(100):
        scaling.failed()
    assert scaling.limit(now) == 1


def test_the_former_level_comes_back_after_failures() -> None:
    """Twenty successes repair everything: failures left the level alone."""
    scaling, now = grown(100)
    for _ in range(1000):
        scaling.failed()
    scaling.succeeded()
    assert scaling.limit(now) == 6  # a hundredth and a twentieth
    for _ in range(19):
        scaling.succeeded()
    assert scaling.limit(now) == 100


def test_a_few_failures_among_many_batches_cost_little() -> None:
    """One in ten: the successes between two failures restore what a failure took, never more."""
    scaling, now = grown(100)
    for _ in range(50):
        scaling.failed()
        assert scaling.limit(now) == 90
        for _ in range(9):
            scaling.succeeded()
        assert scaling.limit(now) == 100


def test_constant_failures_settle_where_their_share_says() -> None:
    """Three of four batches fail: the limit stays low, but the target goes on being tried."""
    scaling, now = grown(100)
    for _ in range(200):
        for _ in range(3):
            scaling.failed()
        scaling.succeeded()
    assert 10 <= scaling.limit(now) <= 25


def test_the_health_survives_a_cut() -> None:
    """A throttle on top of failures: both count, and the limit stays at least one."""
    scaling, now = grown(100)
    for _ in range(100):
        scaling.failed()
    scaling.throttled(100, now)
    assert scaling.limit(now) == 1
    for _ in range(20):
        scaling.succeeded()
    assert scaling.limit(now) == 50


def test_a_new_beginning() -> None:
    """Five loops and no growth, as at the start; a level that is lower stays."""
    scaling = Scaling(1, 1250, 300)
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    assert after(scaling, 10, EPOCH) == 55
    scaling.reset()
    assert scaling.limit(EPOCH + 20) == 5
    scaling.throttled(5, EPOCH + 20)
    scaling.reset()
    assert scaling.limit(EPOCH + 20) == 2


def test_the_floor_holds_through_throttles_and_failures() -> None:
    """Provisioned pollers stay."""
    scaling = Scaling(10, 50, 300)
    for second in range(20):
        scaling.throttled(10, EPOCH + second)
        scaling.failed()
    assert scaling.limit(EPOCH + 20) == 10


def test_it_says_when_it_grows_with_less_than_full_health() -> None:
    """Four fifths of health: five loops of level are four, the next one is a loop and a quarter away."""
    scaling = Scaling(1, 1250, 60)
    scaling.failed()
    scaling.failed()  # 0.81 of 5 are 4.05; five loops are 6.17 of level
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    assert scaling.limit(EPOCH) == 4
    assert scaling.grows_at(EPOCH) == pytest.approx(EPOCH + 5 / 0.81 - 5, abs=1e-4)


def test_a_ceiling_out_of_reach_is_no_time_to_wait_for() -> None:
    """Health that keeps the limit below the ceiling: only successes help, not time."""
    scaling = Scaling(1, 5, 60)
    scaling.failed()
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    assert scaling.limit(EPOCH) == 4
    assert scaling.grows_at(EPOCH) == inf


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["full", "short", "emptied", "succeeded", "failed", "throttled", "reset", "look"]),
        st.floats(0, 100) | st.just(0.0) | st.floats(0, 1e-5),
        st.integers(0, 12_000),
    ),
    max_size=60,
)
BOUNDS = st.tuples(st.integers(1, 10_000), st.integers(1, 200)).map(lambda pair: (min(pair), pair[0]))
GROWTH = st.integers(1, 10_000)  # what the config takes


def act(scaling: Scaling, call: str, now: float, loops: int) -> None:
    match call:
        case "full" | "short":
            scaling.received(is_full=call == "full", loops=10_000, now=now)
        case "emptied":
            scaling.emptied(loops)
        case "succeeded" | "failed":
            getattr(scaling, call)()
        case "throttled":
            scaling.throttled(loops, now)
        case "reset":
            scaling.reset()


@settings(max_examples=300)
@given(BOUNDS, GROWTH, CALLS)
def test_the_limit_is_always_within_its_bounds(bounds: tuple[int, int], growth: int, calls: list) -> None:
    """Whatever happens in whatever order; failures, throttles and empty replies never raise it, successes never lower it."""
    floor, ceiling = bounds
    scaling, now = Scaling(floor, ceiling, growth), EPOCH
    for call, seconds, loops in calls:
        now += seconds
        before = scaling.limit(now)
        act(scaling, call, now, loops)
        after = scaling.limit(now)
        assert max(1, floor) <= after <= ceiling
        if call in {"failed", "throttled", "emptied", "short", "full", "reset"}:
            assert after <= before
        if call == "succeeded":
            assert after >= before


@settings(max_examples=300)
@given(BOUNDS, GROWTH, CALLS)
def test_replies_alone_never_grow_it_faster_than_the_rate(bounds: tuple[int, int], growth: int, calls: list) -> None:
    """From any moment to any later one."""
    scaling, now = Scaling(*bounds, growth), EPOCH
    seen = [(now, scaling.limit(now))]
    for call, seconds, loops in calls:
        now += seconds
        if call not in {"succeeded", "reset"}:
            act(scaling, call, now, loops)
        seen.append((now, scaling.limit(now)))
    for index, (start, low) in enumerate(seen):
        for later, high in seen[index:]:
            # Health only falls here; the first of the new loops may have grown before `start`, all but whole.
            assert high - low <= (later - start) * growth / 60 + 1.01


@settings(max_examples=500)
@given(BOUNDS, GROWTH, CALLS)
def test_who_sleeps_until_it_grows_never_spins(bounds: tuple[int, int], growth: int, calls: list) -> None:
    """The time is in the future, and then the limit is higher: by one, at any rate and health."""
    scaling, now = Scaling(*bounds, growth), EPOCH
    for call, seconds, loops in calls:
        now += seconds
        act(scaling, call, now, loops)
        before, at = scaling.limit(now), scaling.grows_at(now)
        assert at > now
    scaling.received(is_full=True, loops=10_000, now=now)
    for _ in range(20):
        before, at = scaling.limit(now), scaling.grows_at(now)
        if at == inf:
            break
        assert at > now
        now = at
        assert scaling.limit(now) == before + 1


@settings(max_examples=200)
@given(BOUNDS, GROWTH, st.integers(0, 300), st.floats(0, 300))
def test_after_failures_the_former_limit_comes_back(
    bounds: tuple[int, int], growth: int, failures: int, seconds: float
) -> None:
    """However many there were, twenty successes are enough."""
    scaling = Scaling(*bounds, growth)
    scaling.received(is_full=True, loops=10_000, now=EPOCH)
    now = EPOCH + seconds
    scaling.received(is_full=False, loops=10_000, now=now)
    before = scaling.limit(now)
    for _ in range(failures):
        scaling.failed()
    for _ in range(20):
        scaling.succeeded()
    assert scaling.limit(now) == before


def test_a_limit_that_nobody_reaches_does_not_grow() -> None:
    """A fast function is served by few loops; when it turns slow they grow at the rate, not by a jump."""
    scaling = Scaling(1, 1250, 300)
    scaling.received(is_full=True, loops=3, now=EPOCH)
    assert scaling.limit(EPOCH + 60) == 5
    scaling.received(is_full=True, loops=4, now=EPOCH + 60)  # the fifth is on its way
    assert after(scaling, 10, EPOCH + 60) == 55
    scaling.received(is_full=True, loops=20, now=EPOCH + 70)
    assert scaling.limit(EPOCH + 600) == 55


@pytest.mark.parametrize(("growth", "most"), [(300, 10), (1, 6), (10_000, 171)])
def test_time_that_passed_while_nobody_looked_is_no_growth(growth: int, most: int) -> None:
    """After a SIGSTOP or a suspended machine: a second's growth or one loop, not up to the ceiling; then on as before."""
    scaling = Scaling(1, 20_000, growth)
    scaling.received(is_full=True, loops=5, now=EPOCH)
    woken = EPOCH + 8 * 3600
    assert scaling.limit(woken) == most
    assert scaling.limit(woken) == most
    assert after(scaling, 60, woken) == pytest.approx(most + growth, abs=1)


def test_a_loop_that_takes_long_to_come_does_come() -> None:
    """With one loop a minute nobody looks for a minute; it is there when it was said to be."""
    scaling = Scaling(1, 100, 1)
    scaling.received(is_full=True, loops=5, now=EPOCH)
    assert scaling.grows_at(EPOCH) == pytest.approx(EPOCH + 60)
    assert scaling.limit(EPOCH + 59) == 5
    assert scaling.limit(EPOCH + 60) == 6
