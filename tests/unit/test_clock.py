"""The one timeline: it follows the wall clock ahead, never back."""

import asyncio
import time

import pytest

from poller.clock import SET_BACK, STEP, SystemClock


class Loop:
    """As much of an event loop as a clock reads."""

    def __init__(self) -> None:
        self.at = 100.0

    def time(self) -> float:
        return self.at


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """A loop, and `set_wall` to say what the wall clock shows."""
    loop, wall = Loop(), [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])

    def move(seconds: float, wall_seconds: float | None = None) -> None:
        loop.at += seconds
        wall[0] += seconds if wall_seconds is None else wall_seconds

    return loop, move


def test_it_moves_with_the_loop(world) -> None:
    """Differences are durations, and an instant is the same on the loop's clock."""
    loop, move = world
    clock = SystemClock(loop)
    assert clock.now() == 1_000_000.0
    move(7.5)
    assert clock.now() == 1_000_007.5
    assert clock.loop(clock.now() + 3) == loop.at + 3
    assert not clock.behind()


def test_small_steps_are_not_followed(world) -> None:
    """NTP slews, and nobody can tell."""
    _, move = world
    clock = SystemClock(world[0])
    move(10, 10 + STEP)
    assert clock.now() == 1_000_010.0
    move(10, 10 - STEP - SET_BACK)
    assert clock.now() == 1_000_020.0
    assert not clock.behind()


def test_a_machine_that_slept_was_suspended(world) -> None:
    """The wall clock went on, the loop's did not: what was due meanwhile is due."""
    loop, move = world
    clock = SystemClock(loop)
    due = clock.now() + 60
    move(1, 3600)
    assert not clock.jumped()
    assert clock.now() == 1_003_600.0
    assert clock.jumped() == 3599.0
    assert not clock.jumped(), "it is told once"
    assert clock.now() > due
    assert clock.loop(clock.now()) == loop.at
    assert not clock.behind()


def test_a_clock_that_was_set_back_is_noticed_and_not_followed(world) -> None:
    """Ages would be too large for as long as this clock goes on, waits too long if it followed."""
    loop, move = world
    clock = SystemClock(loop)
    move(10, 10 - 3600)
    assert clock.now() == 1_000_010.0
    assert clock.behind() == 3600.0
    assert SystemClock(loop).now() == 1_000_010.0 - 3600
    move(1, 3601)  # and set right again
    assert not clock.behind()


async def test_it_reads_the_real_ones() -> None:
    """Epoch seconds, in a running loop."""
    assert SystemClock(asyncio.get_running_loop()).now() == pytest.approx(time.time(), abs=1)
