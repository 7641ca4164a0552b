"""The soak: ten minutes of it (SOAK_SECONDS) with --soak; always the rules that it goes by."""

import itertools
import os
from pathlib import Path

import pytest

from tests.faults.soak import FAULT_EVERY, RESHARD_EVERY, Plan, Sample, flatness, soak

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
HOURS = Plan(7_200.0, 40.0, 1)


@pytest.mark.soak
async def test_nothing_is_lost_and_nothing_grows(tmp_path: Path) -> None:
    """Through faults, kills, stops, suspensions and reshards every promise is kept, and memory and descriptors stay flat."""
    figures = await soak(Plan(SOAK_SECONDS, 40.0, 1), tmp_path)
    assert figures["problems"] == []
    assert figures["records"]["all"] > SOAK_SECONDS * 40.0
    assert all(figures["deeds"][deed] for deed in ("kill", "stop", "suspend"))


async def test_a_short_soak_keeps_every_promise(tmp_path: Path) -> None:
    """Two chapters of a few seconds, with a kill, suspensions, faults and a change of the shards."""
    figures = await soak(Plan(5.0, 40.0, 1), tmp_path)
    assert figures["problems"] == []
    assert figures["lives"] == 2
    assert figures["reshards"]
    assert figures["faults"]["all"]


def test_one_life_lasts_more_than_half_of_the_time() -> None:
    """Kills and stops end before the half, in turn and minutes apart; suspensions go on."""
    deeds = HOURS.deeds
    ends = [at for at, deed in deeds if deed != "suspend"]
    assert max(ends) < HOURS.seconds / 2 < max(at for at, _ in deeds)
    assert {later - earlier for earlier, later in itertools.pairwise(ends)} == {180.0}
    assert {deed for _, deed in deeds} == {"kill", "stop", "suspend"}
    assert (HOURS.fault_every, HOURS.reshard_every) == (FAULT_EVERY, RESHARD_EVERY)


def test_a_short_soak_has_everything_too() -> None:
    """Whatever its length, a chapter has room for faults and for a change of the shards."""
    short = Plan(8.0, 40.0, 1)
    assert {deed for _, deed in short.deeds} == {"kill", "suspend"}
    assert short.fault_every < short.chapter
    assert short.reshard_every < short.chapter < short.seconds


def life(number: int, seconds: int, grown_bytes: float = 0.0, grown_descriptors: float = 0.0) -> list[Sample]:
    """One that starts small, jumps within its first fifth, and then grows by so much a second."""
    return [
        Sample(number, at, 50_000_000 + (at > seconds / 10) * 20_000_000 + int(at * grown_bytes), 30 + int(at * grown_descriptors))
        for at in range(seconds + 1)
    ]  # fmt: skip


def test_growth_after_the_first_fifth_is_seen() -> None:
    """A life that fills its pools and then stays as it is, is flat; one that goes on growing is not."""
    assert [one.is_flat for one in flatness(life(1, 600), 60.0)] == [True]
    assert [one.is_flat for one in flatness(life(1, 600, grown_bytes=20_000), 60.0)] == [False]
    assert [one.is_flat for one in flatness(life(1, 600, grown_descriptors=0.05), 60.0)] == [False]


def test_short_lives_say_nothing() -> None:
    """Each life is judged for itself, and one that was killed early is not."""
    found = flatness([*life(1, 30), *life(2, 300)], 60.0)
    assert [(one.life, one.seconds, one.early_mb, one.late_mb) for one in found] == [(2, 300.0, 70.0, 70.0)]
