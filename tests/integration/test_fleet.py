"""Three daemons, 32 shards, one shared store: real processes that are killed, suspended, stopped and cut off."""

import asyncio
import functools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tests.integration import emulators
from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon
from tests.integration.fleet import (
    INTERVAL,
    NEVER,
    SHARDS,
    SLACK,
    SOAK_SECONDS,
    WRITES,
    Fleet,
    campaign,
    clock,
    spoken,
    target_of,
    under_load,
    wire_to,
)
from tests.integration.test_daemon import Aws, assert_within_promise, config, queue_of, stream_of
from tests.integration.test_streams_on_fake import Table, until

pytestmark = pytest.mark.integration

PRICE = 1.25e-6  # USD for a write unit on demand (us-east-1, long the list price; half of it since November 2024)
Open = Callable[[float], Awaitable[Fleet]]


@functools.cache
def store_at(emulator: str) -> str:
    """An emulator that holds nothing but stores: one that also serves 32 shards is now and then late for a beat."""
    return emulators.running.__wrapped__(emulator)


def on(emulator: str) -> pytest.MarkDecorator:
    """A test whose fleet has its store there, and with --soak on the other one too: that the stores are alike is for
    `tests/contract` to say.
    """
    other = {"ministack": "roto", "roto": "ministack"}[emulator]
    return pytest.mark.parametrize("open_fleet", [emulator, pytest.param(other, marks=pytest.mark.soak)], indirect=True)


@pytest.fixture
async def open_fleet(request, account, tmp_path) -> AsyncIterator[Open]:
    """Makes a fleet over MiniStack's Kinesis and the store of the test's emulator; nobody is started."""
    async with AsyncExitStack() as stack:
        aws = Aws(emulators.running("ministack"), account)

        async def made(lease: float) -> Fleet:
            target = await stack.enter_async_context(target_of())
            wire = await stack.enter_async_context(wire_to(store_at(request.param)))
            fleet = Fleet(tmp_path, aws, wire, target, lease)
            stack.push_async_callback(fleet.close)
            return fleet

        yield made


async def running(open_fleet: Open, lease: float, count: int = 3) -> Fleet:
    """A fleet that has settled, over a stream."""
    fleet = await open_fleet(lease)
    await fleet.stream()
    await fleet.start(count)
    took = await fleet.settled()
    print(f"\n{count} daemons spread evenly over {SHARDS} shards after {took:.1f} s", end="")
    return fleet


async def stopped(fleet: Fleet) -> Counter[str]:
    """Everything arrives, all stop, and every promise was kept; what came again, by cause."""
    await fleet.delivered()
    for name in list(fleet.running):
        await fleet.stop(name)
    fleet.assert_kept()
    again = fleet.redelivered()
    assert not again["other"], fleet.unexplained[:5]
    print(f"; {len(fleet.target.done)} records, again: {dict(again) or 'none'}", end="")
    return again


def has_moved(fleet: Fleet, name: str, shards: list[str]) -> Callable[[], bool]:
    return lambda: not any(fleet.target.shards[shard][-1][1] == name for shard in shards)


@on("ministack")
async def test_a_rolling_restart_redelivers_nothing(open_fleet) -> None:
    """All three follow one another under load: each record once, in order, no shard without work for long."""
    fleet = await running(open_fleet, 5.0)
    async with under_load(fleet):
        await fleet.works()
        began = clock()
        for name in list(fleet.running):
            await fleet.stop(name)
            await fleet.start()
        await fleet.settled()
        ended = clock()
        await fleet.works()
    again = await stopped(fleet)
    assert not again
    print(f"; three restarts in {ended - began:.1f} s, longest time without work of a shard:", end=" ")
    print(spoken(fleet.gaps(began, ended)))


@on("roto")
async def test_a_daemon_more_takes_its_share_and_nothing_comes_again(open_fleet) -> None:
    """From one to two and to three: the owner lets what is in flight end, then hands over."""
    fleet = await running(open_fleet, 5.0, 1)
    async with under_load(fleet):
        await fleet.works()
        times = []
        for _ in range(2):
            await fleet.start()
            times.append(await fleet.settled())
        await fleet.works()
    again = await stopped(fleet)
    assert not again
    print(f"; even again after {spoken(times)}")


@on("ministack")
async def test_what_a_killed_daemon_had_is_taken(open_fleet) -> None:
    """Within two durations; again comes only what was in flight or newer than the last checkpoint."""
    lease = 2.0
    fleet = await running(open_fleet, lease)
    async with under_load(fleet):
        await fleet.works(300)
        [name, *_] = fleet.running
        shards = fleet.shards_of(name)
        span = await fleet.kill(name)
        await until(has_moved(fleet, name, shards), 3 * lease + 5, "the failover")
        await fleet.settled()
    await stopped(fleet)
    times = fleet.failovers(span, shards)
    assert len(times) == len(shards) >= SHARDS // 3
    assert max(times) <= 2 * lease + SLACK + 1.0  # the tip is read once a second
    print(f"; failover {spoken(times)}")


@on("roto")
async def test_a_suspended_daemon_comes_back_as_another(open_fleet) -> None:
    """Its shards are taken, it does nothing under its old leases, and it takes a share again."""
    lease = 2.0
    fleet = await running(open_fleet, lease)
    async with under_load(fleet):
        await fleet.works(300)
        [name, *_] = fleet.running
        shards = fleet.shards_of(name)
        span = fleet.pause(name)
        await until(has_moved(fleet, name, shards), 3 * lease + 5, "the failover")
        fleet.resume(span)
        await fleet.running[name].until_logged("leases_fenced")
        await until(lambda: fleet.shards_of(name), 20, "a share of its own again")
        await fleet.settled()
        await fleet.works()
    again = await stopped(fleet)
    assert not again["fence"]
    print(f"; failover {spoken(fleet.failovers(span, shards))}, {fleet.target.beside_paused} beside its open requests")


@on("ministack")
async def test_a_store_that_is_away_stops_the_fleet_and_it_goes_on(open_fleet) -> None:
    """Longer than a lease: all give up what they hold, late writes change nothing, and every process lives on."""
    lease = 2.0
    fleet = await running(open_fleet, lease)
    async with under_load(fleet):
        await fleet.works(300)
        async with fleet.outage() as span:
            await asyncio.gather(*(daemon.until_logged("leases_fenced") for daemon in fleet.running.values()))
            fenced_at = clock()
            assert fenced_at - span.begins <= lease + SLACK
            quiet_from = clock() + fleet.target.slowness
            await until(lambda: clock() > quiet_from + lease, 2 * lease, "time for what must not happen")
            late = [at for calls in fleet.target.shards.values() for at, _ in calls if at > quiet_from]
            assert not late, "a fenced member delivers nothing"
            for daemon in fleet.running.values():
                assert (await daemon.get("/healthz"))[0] == 200
        await fleet.settled(30)
        await fleet.works()
        ended = clock()
    again = await stopped(fleet)
    assert set(again) <= {"outage", "fence"}
    print(f"; away for {span.ends - span.begins:.1f} s, shards without work {spoken(fleet.gaps(span.begins, ended))}")


@on("roto")
async def test_a_queue_has_its_limit_in_the_whole_fleet(open_fleet) -> None:
    """MaximumConcurrency holds for all daemons together, and each message is delivered once."""
    fleet = await open_fleet(3.0)
    arn = await asyncio.to_thread(fleet.aws.queue, "q", VisibilityTimeout="60")
    fleet.mappings.append(queue_of(arn, ScalingConfig={"MaximumConcurrency": 3}, BatchSize=1))
    await fleet.start(3)

    async def is_shared() -> bool:
        daemons: list[Daemon] = list(fleet.running.values())
        return all([(await daemon.status())[0]["receiver_limit"] == 1 for daemon in daemons])

    await until(is_shared, 10, "a third of the limit for each")
    await asyncio.to_thread(fleet.aws.send, "q", 0, 300)
    await until(lambda: len(fleet.target.done) == 300, 20, "the last message")
    print(f"\n300 messages, at most {fleet.target.peak} at once")
    assert fleet.target.peak <= 3
    for name in list(fleet.running):
        await fleet.stop(name)


async def test_children_follow_their_parents_across_daemons(fake_aws, account, ledger, tmp_path) -> None:
    """A DynamoDB stream whose shards live for a second, three daemons, kills and stops: each key in order, none missing."""
    table, total, kills, dice = Table(fake_aws, account, roots=8), 6_000, list[float](), random.Random(3)
    daemons: list[Daemon] = []
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(wire_to(store_at("ministack")))

        async def start() -> None:
            (folder := tmp_path / f"m{len(daemons)}").mkdir()
            shared = f"dynamodb://leases?region={REGION}&endpoint_url={store.url}&create=true"
            mapping = stream_of(table.arn, ParallelizationFactor=2)
            daemon = Daemon(folder, config(fake_aws, ledger, mapping, store=shared, lease_seconds=2.0))
            daemons.append(daemon)
            stack.push_async_callback(daemon.close)
            await daemon.start()

        async def produce() -> None:
            lines = table.open_shards()
            rolls = [clock() + dice.uniform(0.5, 1.5) for _ in lines]
            while len(table.names) < total:
                table.write(20)
                for line, at in enumerate(rolls):
                    if clock() >= at:
                        [lines[line]] = fake_aws.roll(table.arn, lines[line])
                        rolls[line] = clock() + dice.uniform(0.5, 1.5)
                await asyncio.sleep(0.03)

        await asyncio.gather(start(), start(), start())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(produce())
            for victim, goal in enumerate((total // 4, total // 2, 3 * total // 4)):
                await ledger.until(lambda goal=goal: len(ledger.deliveries) >= goal, 60, f"delivery number {goal}")
                if victim == 1:
                    assert await daemons[victim].stop() == 0
                else:
                    await daemons[victim].kill()
                    kills.append(clock())
                await start()
        await ledger.until(lambda: len(ledger.deliveries) >= total, 60, "the last delivery")
        for daemon in daemons[3:]:
            assert await daemon.stop() == 0
    table.assert_order(ledger)
    again = assert_within_promise(ledger, kills, INTERVAL)
    defects = [entry for daemon in daemons for entry in daemon.logs if entry["event"] in NEVER]
    assert not defects, defects[:3]
    ended = {entry["shard"]: name for name, daemon in enumerate(daemons) for entry in daemon.events("shard_ended")}
    assert len(set(ended.values())) >= 4, "several daemons read shards to their ends"
    print(f"\n{total} records, {len(fake_aws.shards(table.arn))} shards, {again} delivered again")


@on("ministack")
@pytest.mark.soak
async def test_ten_minutes_of_kills_pauses_and_stops(open_fleet, request) -> None:
    """Nothing lost, no key out of order, each redelivery has its cause, an even spread in the end."""
    lease = 4.0
    fleet = await running(open_fleet, lease)
    began, writes = clock(), Counter(fleet.wire.calls)
    async with under_load(fleet):
        taken = await campaign(fleet, SOAK_SECONDS, seed=7)
        spread_after = await fleet.settled(60)
        hours = (clock() - began) / 3600
        during = Counter(fleet.wire.calls) - writes
        began, writes = clock(), Counter(fleet.wire.calls)
        await asyncio.sleep(30)
        steady, steady_hours = Counter(fleet.wire.calls) - writes, (clock() - began) / 3600
    await fleet.delivered(60)
    began, writes = clock(), Counter(fleet.wire.calls)
    await asyncio.sleep(20)
    idle, idle_hours = Counter(fleet.wire.calls) - writes, (clock() - began) / 3600
    spread = [len(shards) for shards in (await fleet.spread()).values()]
    counts = Counter(span.kind for span in fleet.spans)
    again = fleet.redelivered()
    total = len(fleet.target.done)
    print(f"\n{request.node.callspec.id}: {total} records, {dict(counts)}, lease {lease} s")
    share = {cause: f"{count} ({count / total:.3%})" for cause, count in again.items()}
    print(f"  redelivered: {share}, beside an open request of a suspended daemon: {fleet.target.beside_paused}")
    fenced, failed, lost = (fleet.logged(event) for event in ("leases_fenced", "beat_failed", "lease_lost"))
    print(f"  fenced {fenced} times, {failed} beats failed, {lost} leases lost")
    print(f"  spread in the end: {spread}, even {spread_after:.1f} s after the last event")
    for kind, events in taken.items():
        for is_undisturbed in (False, True):
            times = [
                at for span, shards in events for at in fleet.failovers(span, shards, is_undisturbed=is_undisturbed)
            ]
            what = "with nothing else in between" if is_undisturbed else "all"
            print(f"  failover after a {kind}, {what}: {spoken(times)} of {len(times)} shards")
    for what, calls, length in (
        ("campaign", during, hours),
        ("steady load", steady, steady_hours),
        ("idle", idle, idle_hours),
    ):
        rate = sum(calls[name] for name in WRITES) / length / SHARDS
        print(f"  {what}: {rate:.0f} writes per shard and hour, {rate * PRICE:.5f} USD; calls {dict(calls)}")
    print(await fleet.described() if sum(spread) < SHARDS else "")
    await stopped(fleet)
    assert max(spread) - min(spread) <= 1
