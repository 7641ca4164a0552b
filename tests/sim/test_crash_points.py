"""A daemon is killed at every await of the shard, queue, checkpoint, lease and reload paths, and nothing is lost by it.

What a crash point is, and what the worlds promise, is in `tests/sim/crash.py`.
"""

import pytest

from tests.sim.crash import SCENARIOS, Run, all_sites, campaign, kill, survey

# Awaits that no scenario reaches, by file, function and text, and why that is right.
NOT_KILLED = {
    ("control.py", "known_mappings"): "for the verbs: reads only, and there is no daemon to be killed",
}


def test_every_await_is_a_crash_point_of_some_scenario() -> None:
    """A new await needs a scenario, or a reason above; a reason that is not needed any more goes."""
    reached = {site for make in SCENARIOS for point in survey(make) for site in point.sites}
    missing = all_sites() - reached
    names = {(site.file, site.function) for site in missing}
    unexpected = sorted(site for site in missing if (site.file, site.function) not in NOT_KILLED)
    assert not unexpected, "".join(f"\nthis await is killed by no scenario: {site}" for site in unexpected)
    assert NOT_KILLED.keys() <= names, f"killed after all: {NOT_KILLED.keys() - names}"
    print(f"\n{len(reached)} awaits in the paths and below, {len(missing)} not killed, with a reason")


@pytest.mark.parametrize("make", SCENARIOS, ids=lambda make: make.__name__)
def test_a_kill_at_any_await_breaks_no_promise(make: type[Run]) -> None:
    """Nothing lost or reordered, nothing repeated that was saved, discards reported, one owner, answers of the API kept."""
    print(f"\n{make.__name__}: {campaign([make])}")


@pytest.mark.soak
@pytest.mark.parametrize("make", SCENARIOS, ids=lambda make: make.__name__)
def test_kills_at_many_occasions_break_no_promise(make: type[Run]) -> None:
    """The same with several seeds and occasions, calls on their way both lost and landed."""
    print(f"\n{make.__name__}: {campaign([make], seeds=range(1, 3), times=3)}")


def test_a_run_repeats_exactly() -> None:
    """The same scenario and seed is at the same points as often, so that a failure can be looked at."""
    make = SCENARIOS[0]
    assert survey(make) == survey(make)


def test_a_point_that_is_not_reached_is_said() -> None:
    """A kill that does not happen proves nothing."""
    make = SCENARIOS[0]
    point, count = next(iter(survey(make).items()))
    with pytest.raises(AssertionError, match="no daemon was at"):
        kill(make, point, count + 1)
