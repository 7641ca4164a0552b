"""How mappings share what belongs to a function."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from math import inf
from typing import Any

from poller.app import Connections
from poller.aws.probe import Probe
from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.core.model import MappingId
from poller.mappings import build, normalize, parse_source, resolve_function
from poller.runtime.context import LastResult, Pipe
from poller.runtime.supervisor import Wanted
from poller.settings import AwsSettings, FunctionSettings, HttpFunction
from poller.telemetry import Metrics

FUNCTION = HttpFunction("f", "http://127.0.0.1:9/", max_concurrency=5, max_invocations_per_second=2.0)


def wanted(function: FunctionSettings, uuid: MappingId = "m", region: str = "eu-west-1") -> Wanted:
    document = normalize({"EventSourceArn": f"arn:aws:sqs:{region}:123456789012:q", "FunctionName": function.name})
    spec, _ = resolve_function(function.name, {}, parse_source(document["EventSourceArn"]))
    return Wanted(build(uuid, document, spec, None), function)


@asynccontextmanager
async def opened() -> AsyncIterator[Connections]:
    clock = SystemClock(asyncio.get_running_loop())
    async with AwsClients(AwsSettings(region="eu-west-1")) as clients:
        connections = Connections(clients, clock, Metrics(clock, list), Probe(clients))
        try:
            yield connections
        finally:
            await connections.close()


async def pipes(*mappings: Wanted) -> list[Pipe]:
    """What each is connected to, one after the other, none of them disconnected in between."""
    async with opened() as connections:
        return [await connections.connect(mapping, LastResult()) for mapping in mappings]


async def admitted(pipe: Pipe, count: int) -> list[asyncio.Task[None]]:
    """Those of so many callers that have a slot at once; the others have given up."""
    tasks = [asyncio.ensure_future(pipe.gate.acquire()) for _ in range(count)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return [task for task in tasks if not task.cancelled()]


async def test_mappings_of_a_function_share_its_slots_and_its_rate() -> None:
    """In every Region: the bounds are the function's in the whole daemon. Another function has its own."""
    other = replace(FUNCTION, name="g")
    one, two, far, alien = await pipes(
        wanted(FUNCTION), wanted(FUNCTION, "n"), wanted(FUNCTION, "o", "us-east-1"), wanted(other, "p")
    )
    assert one.gate is two.gate is far.gate
    assert one.gate.users == 3
    assert alien.gate is not one.gate


async def test_changed_bounds_hold_at_once_for_all_that_share_the_function() -> None:
    """10 slots become 5 while 10 calls run: none begins before fewer than 5 run, whichever settings it began under."""
    ten = replace(FUNCTION, max_concurrency=10, max_invocations_per_second=None)
    five = replace(ten, max_concurrency=5)
    async with opened() as connections:
        old = await connections.connect(wanted(ten), LastResult())
        other = await connections.connect(wanted(ten, "n"), LastResult())
        assert len(await admitted(old, 12)) == 10
        new = await connections.connect(wanted(five), LastResult())
        assert new.gate is old.gate is other.gate
        assert new.target is not old.target
        for _ in range(5):
            old.gate.release()
        assert await admitted(new, 1) == []
        await connections.disconnect(old)
        new.gate.release()
        assert len(await admitted(other, 3)) == 1
        again = await connections.connect(wanted(ten), LastResult())
        assert again.target is other.target
        assert len(await admitted(new, 7)) == 5, "the settings that were connected last"


async def test_a_changed_rate_counts_what_was_used() -> None:
    """It is another revision, so the mapping changes, and does not get its permits a second time."""
    changed: Any = replace(FUNCTION, max_invocations_per_second=3.0)
    assert wanted(changed) != wanted(FUNCTION)
    async with opened() as connections:
        old = await connections.connect(wanted(FUNCTION), LastResult())
        for _ in range(2):
            await old.gate.permit()
        waiter = asyncio.ensure_future(old.gate.permit())
        await asyncio.sleep(0.01)
        new = await connections.connect(wanted(changed), LastResult())
        await waiter
        last = asyncio.ensure_future(new.gate.permit())
        await asyncio.sleep(0.01)
        assert not last.done()
        await connections.connect(wanted(replace(FUNCTION, max_invocations_per_second=None)), LastResult())
        await last


async def test_a_gate_lives_as_long_as_it_knows_something() -> None:
    """A mapping that ends and starts again has no second helping; a function that nobody uses is forgotten."""
    async with opened() as connections:
        first = await connections.connect(wanted(replace(FUNCTION, max_invocations_per_second=0.001)), LastResult())
        await first.gate.permit()
        await connections.disconnect(first)
        second = await connections.connect(wanted(replace(FUNCTION, max_invocations_per_second=1000.0)), LastResult())
        assert second.gate is first.gate
        await asyncio.sleep(0.01)
        idle = await connections.connect(wanted(replace(FUNCTION, name="g"), "n"), LastResult())
        await connections.disconnect(idle)
        assert (await connections.connect(wanted(replace(FUNCTION, name="g"), "n"), LastResult())).gate is not idle.gate
        assert (await connections.connect(wanted(FUNCTION, "o"), LastResult())).gate is second.gate


async def test_the_names_of_one_emulator_share_its_one_place() -> None:
    """The Runtime Interface Emulator takes one call at a time per URL, whatever names it has."""
    one, two = (HttpFunction(name, "http://127.0.0.1:9/", protocol="rie") for name in ("f", "g"))
    first, second = await pipes(wanted(one), wanted(two, "n"))
    assert first.gate is second.gate
    async with first.gate:
        waiter = asyncio.ensure_future(second.gate.acquire())
        await asyncio.sleep(0)
        assert second.gate.is_scarce
    await waiter


async def test_an_emulator_takes_one_call_whatever_changes() -> None:
    """Another rate is no second place; the lowest rate of its names holds for all, as long as it has the name."""
    function = HttpFunction("f", "http://127.0.0.1:9/", protocol="rie")
    slow = replace(function, name="g", max_invocations_per_second=0.001)
    async with opened() as connections:
        old = await connections.connect(wanted(function), LastResult())
        await old.gate.acquire()
        named = await connections.connect(wanted(slow, "n"), LastResult())
        fast = replace(function, max_invocations_per_second=1000.0)
        new = await connections.connect(wanted(fast), LastResult())
        assert new.gate is old.gate is named.gate
        assert await admitted(new, 1) == []
        old.gate.release()
        assert len(await admitted(new, 2)) == 1
        await new.gate.permit()
        waiter = asyncio.ensure_future(new.gate.permit())
        await asyncio.sleep(0.05)
        assert not waiter.done(), "one in a thousand seconds, for g"
        await connections.disconnect(named)
        async with asyncio.timeout(1):
            await waiter
        again = await connections.connect(wanted(function), LastResult())
        assert again.target is old.target
        assert await again.gate.permit() == -inf, "f has no rate now"
