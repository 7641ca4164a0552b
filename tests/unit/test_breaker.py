"""The circuit breaker's states, with time as an argument."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poller.core.breaker import REFUSALS, Breaker
from poller.core.retry import Backoff

LONGEST = Backoff(0.25, 60.0, lambda: 1.0)  # 4 s after five refusals, then 8, 16, 32, 60


def opened(now: float = 0.0, backoff: Backoff = LONGEST) -> Breaker:
    breaker = Breaker(backoff)
    for _ in range(REFUSALS):
        breaker.refused(now)
    assert breaker.state == "open"
    return breaker


def test_closed_anybody_may_begin() -> None:
    """At once, as many as want; beginning changes nothing."""
    breaker = Breaker(LONGEST)
    for _ in range(100):
        assert breaker.probe_at() == -inf
        breaker.probe()
        breaker.unprobe(7.0)
        assert breaker.state == "closed"


def test_five_refusals_in_a_row_open_it() -> None:
    """Said once, by the fifth; the first probe waits for the backoff of five tries."""
    breaker = Breaker(LONGEST)
    assert [breaker.refused(10.0) for _ in range(5)] == [False, False, False, False, True]
    assert breaker.state == "open"
    assert breaker.probe_at() == 14.0


def test_a_function_that_ran_starts_the_count_again() -> None:
    """Four refusals, an answer, four refusals: closed."""
    breaker = Breaker(LONGEST)
    for _ in range(3):
        assert not any(breaker.refused(0.0) for _ in range(4))
        assert breaker.ran() is False
    assert breaker.state == "closed"
    assert [breaker.refused(0.0) for _ in range(5)][-1] is True


def test_late_answers_of_an_open_circuit_change_nothing() -> None:
    """What was in flight when it opened neither delays the probe nor makes the next delay longer."""
    breaker = opened()
    for now in range(50):
        assert breaker.refused(now, retry_after=60.0) is False
    assert breaker.probe_at() == 4.0
    breaker.probe()
    breaker.refused(10.0)
    assert breaker.probe_at() == 18.0


def test_one_probe_and_nobody_else() -> None:
    """Until there is news of it."""
    breaker = opened()
    breaker.probe()
    assert breaker.state == "probing"
    assert breaker.probe_at() == inf


def test_each_refused_probe_waits_longer() -> None:
    """8, 16, 32, then the longest; and it is not said again that the circuit opens."""
    breaker, now, delays = opened(), 4.0, []
    for _ in range(6):
        breaker.probe()
        assert breaker.refused(now) is False
        assert breaker.state == "open"
        delays.append(breaker.probe_at() - now)
        now = breaker.probe_at()
    assert delays == [8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_it_survives_a_very_long_outage() -> None:
    """Thousands of probes: no overflow, the longest delay."""
    breaker, now = opened(), 4.0
    for _ in range(5000):
        breaker.probe()
        breaker.refused(now)
        now = breaker.probe_at()
    breaker.probe()
    breaker.refused(now)
    assert breaker.probe_at() == now + 60.0


def test_a_probe_that_ran_closes_it_and_forgets() -> None:
    """Said once; then it takes five refusals again, and the first delay."""
    breaker = opened()
    breaker.probe()
    assert breaker.ran() is True
    assert (breaker.state, breaker.probe_at()) == ("closed", -inf)
    assert breaker.ran() is False
    assert [breaker.refused(100.0) for _ in range(5)] == [False] * 4 + [True]
    assert breaker.probe_at() == 104.0


def test_a_late_success_closes_an_open_one() -> None:
    """The function runs: whoever heard that."""
    breaker = opened()
    assert breaker.ran() is True
    assert breaker.probe_at() == -inf


def test_a_probe_without_an_answer_makes_room_for_another_at_once() -> None:
    """It was cut off: that says nothing about the target."""
    breaker = opened()
    breaker.probe()
    breaker.unprobe(5.0)
    assert (breaker.state, breaker.probe_at()) == ("open", 5.0)
    breaker.probe()
    breaker.refused(6.0)
    assert breaker.probe_at() == 14.0  # the delay of six refusals, not of seven


def test_an_invocation_cut_off_while_it_is_open_does_not_bring_the_probe_forward() -> None:
    """Only a probe makes room."""
    breaker = opened()
    breaker.unprobe(1.0)
    assert (breaker.state, breaker.probe_at()) == ("open", 4.0)


@pytest.mark.parametrize(("wish", "delay"), [(None, 4.0), (1.0, 4.0), (30.0, 30.0), (3600.0, 60.0)])
def test_the_targets_wish_is_obeyed_up_to_the_longest_delay(wish: float | None, delay: float) -> None:
    """Retry-After of the refusal that opens it."""
    breaker = Breaker(LONGEST)
    for _ in range(4):
        breaker.refused(0.0, 50.0)  # of the others nothing is kept
    breaker.refused(0.0, wish)
    assert breaker.probe_at() == delay


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from(["begin", "ran", "refused", "cut_off"]), st.floats(0, 30)), max_size=80),
    st.floats(0, 0.999),
)
def test_whatever_comes_there_is_always_a_next_invocation(calls: list, jitter: float) -> None:
    """Closed: at once. Open: within the longest delay. Probing: only while somebody began and has not been heard of."""
    breaker, now, row = Breaker(Backoff(0.25, 60.0, lambda: jitter)), 0.0, 0
    for call, seconds in calls:
        now += seconds
        before = breaker.state
        if call == "begin" and breaker.probe_at() <= now:
            breaker.probe()
            assert breaker.state == ("closed" if before == "closed" else "probing")
        elif call == "ran":
            assert breaker.ran() is (before != "closed")
            row = 0
        elif call == "refused":
            row += 1
            assert breaker.refused(now) is (before == "closed" and row >= REFUSALS)
            assert breaker.state == ("open" if row >= REFUSALS else "closed")
        elif call == "cut_off":
            breaker.unprobe(now)
            assert breaker.state == ("open" if before == "probing" else before)
        match breaker.state:
            case "closed":
                assert breaker.probe_at() == -inf
            case "open":
                assert breaker.probe_at() <= now + 60.0
            case "probing":
                assert breaker.probe_at() == inf
