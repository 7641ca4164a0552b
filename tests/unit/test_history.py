"""The last hour: what is sampled, when, and that it stays bounded."""

import asyncio
import math

from poller.core.model import ShardState
from poller.server.history import SLOTS, STEP, History
from poller.telemetry import Metrics, worst_lag
from tests.fakes.statuses import NOW, SetClock, StatusControl, mapping, shard, spec, uuid
from tests.sim.loop import VirtualClock, VirtualLoop

START = 1_000 * STEP


class World:
    """One history of mappings 0 to n, whose observers count."""

    def __init__(self, mappings=1, shards=1):
        self.clock = SetClock(START)
        self.control = StatusControl(*(mapping(n, *(shard(i) for i in range(shards))) for n in range(mappings)))
        self.metrics = Metrics(self.clock, self.control.status)
        self.observers = [self.metrics.observer(spec(n)) for n in range(mappings)]
        self.history = History(self.control, self.metrics, self.clock)

    def after(self, seconds, succeeded=0, failed=0):
        self.clock.at += seconds
        self.observers[0].invoked("success", succeeded, 0.1)
        self.observers[0].invoked("partial", failed, 0.1)
        return self.history.sample()

    def read(self, **options):
        return self.history.read(**options)[uuid(0)]


def test_rates_are_of_the_last_minute() -> None:
    """Unknown before there is something to compare with; then records a second, up to the moment that asks."""
    world = World()
    world.after(0, succeeded=500)
    assert (world.read().succeeded, world.read().failed) == (None, None)
    world.clock.at += 5
    world.observers[0].invoked("success", 50, 0.1)
    assert world.read().succeeded == 10
    for _ in range(20):
        world.after(STEP, succeeded=30, failed=15)
    assert (world.read().succeeded, world.read().failed) == (2.0, 1.0)
    world.clock.at += 60
    assert world.read().succeeded < 2.0


def test_an_hour_is_kept_oldest_first() -> None:
    """240 values, the newest last; what is older falls out, what was not sampled is NaN."""
    world = World()
    world.after(0)
    world.after(STEP, succeeded=150)
    series = world.read(with_series=True).series
    assert (len(series.lag), series.ends_at) == (SLOTS, START + STEP)
    assert (series.succeeded[-1], series.lag[-1]) == (10, 0)
    assert all(map(math.isnan, series.succeeded[:-1]))
    for _ in range(SLOTS):
        world.after(STEP, succeeded=15)
    assert set(world.read(with_series=True).series.succeeded) == {1.0}
    assert world.read().series is None


def test_a_pause_leaves_a_gap() -> None:
    """A process that was stopped for a while did not sample: nothing is invented, an hour away leaves nothing old."""
    world = World()
    world.after(0)
    world.after(STEP, succeeded=15)
    world.after(4 * STEP, succeeded=60)
    series = world.read(with_series=True).series
    assert [str(value) for value in series.succeeded[-5:]] == ["1.0", "nan", "nan", "nan", "1.0"]
    world.after(10 * SLOTS * STEP)
    series = world.read(with_series=True).series
    assert sum(not math.isnan(value) for value in series.lag) == 1


def test_a_new_mapping_counts_from_the_sample_before_it() -> None:
    """What it delivered in its first seconds is in its first rate."""
    world = World()
    world.after(0)
    world.control.statuses.append(mapping(1, shard(0)))
    world.metrics.observer(spec(1)).invoked("success", 30, 0.1)
    world.after(STEP)
    found = world.history.read(with_series=True)[uuid(1)]
    assert (found.succeeded, found.series.succeeded[-1]) == (2.0, 2.0)


def test_counts_that_begin_again_are_no_negative_rate() -> None:
    """A mapping that was given another function counts from 0 again."""
    world = World()
    world.after(0, succeeded=1_000)
    world.after(STEP)
    world.observers[0] = world.metrics.observer(spec(0, name="other"))
    world.after(STEP, succeeded=30)
    series = world.read(with_series=True).series
    assert series.succeeded[-1] == 2.0


def test_the_past_of_a_deleted_mapping_goes() -> None:
    """Memory follows the mappings that there are."""
    world = World(mappings=3)
    world.after(0)
    del world.control.statuses[1]
    world.after(STEP)
    assert world.history.read().keys() == {uuid(0), uuid(2)}


def test_what_is_dropped_and_lost_is_counted() -> None:
    """Since the start, for the status."""
    world = World()
    world.after(0)
    world.observers[0].dropped(4)
    world.observers[0].lost("s", 7)
    counts = world.read().counts
    assert (counts.dropped, counts.lost) == (4, 7)


def test_the_lag_is_that_of_the_worst_shard() -> None:
    """Behind the tip or the age of the batch in work, whichever is more; unknown while nothing is read."""
    idle = shard(0, lag=None)
    assert worst_lag((idle,), NOW) == 0
    assert worst_lag((idle, shard(1, lag=3.0), shard(2, lag=1.0, batch_arrival=NOW - 9)), NOW) == 9
    assert worst_lag((shard(1, lag=3.0),), NOW) == 3
    assert worst_lag((), NOW) is None
    waits = mapping(0, shard(0)).shards[0]
    assert worst_lag((type(waits)("s", ShardState.BLOCKED),), NOW) is None


def test_samples_keep_to_their_beat() -> None:
    """On multiples of the step of a clock whose epoch is odd, one each, for hours; late ones delay no other."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    control = StatusControl(mapping(0, shard(0)))
    taken = []
    history = History(control, Metrics(clock, control.status), clock)
    sample = history.sample

    def record():
        slot = sample()
        taken.append((slot, clock.now()))
        loop.virtual += 0.4  # a busy loop
        return slot

    history.sample = record

    async def main():
        loop.virtual += 3.3
        task = loop.create_task(history.run())
        while len(taken) < 500:
            await asyncio.sleep(60)
        task.cancel()

    loop.run_until_complete(main())
    loop.close()
    slots = [slot for slot, _ in taken]
    assert slots == list(range(slots[0], slots[0] + len(slots)))
    assert all(abs(at - slot * STEP) < 0.5 for slot, at in taken[1:])
