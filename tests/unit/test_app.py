"""How mappings share what belongs to a function."""

import asyncio
from dataclasses import replace
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


async def pipes(*mappings: Wanted) -> list[Pipe]:
    """What each is connected to, one after the other, none of them disconnected in between."""
    clock = SystemClock(asyncio.get_running_loop())
    async with AwsClients(AwsSettings(region="eu-west-1")) as clients:
        connections = Connections(clients, clock, Metrics(clock, list), Probe(clients))
        try:
            return [await connections.connect(mapping, LastResult()) for mapping in mappings]
        finally:
            await connections.close()


async def test_mappings_of_a_function_share_its_slots_and_its_rate() -> None:
    """In every Region: the bounds are the function's in the whole daemon. Another function has its own."""
    other = replace(FUNCTION, name="g")
    one, two, far, alien = await pipes(
        wanted(FUNCTION), wanted(FUNCTION, "n"), wanted(FUNCTION, "o", "us-east-1"), wanted(other, "p")
    )
    assert one.gate is two.gate is far.gate
    assert one.gate.users == 3
    assert alien.gate is not one.gate


async def test_a_changed_rate_is_another_gate_and_another_revision() -> None:
    """So a reload that changes the rate replaces the runner, and the new one keeps to the new rate."""
    changed: Any = replace(FUNCTION, max_invocations_per_second=3.0)
    assert wanted(changed) != wanted(FUNCTION)
    old, new, none = await pipes(
        wanted(FUNCTION), wanted(changed, "n"), wanted(replace(FUNCTION, max_invocations_per_second=None), "o")
    )
    assert len({id(pipe.gate) for pipe in (old, new, none)}) == 3
    stamps = [await old.gate.permit() for _ in range(2)]
    assert all(stamps)
    waiter = asyncio.ensure_future(old.gate.permit())
    await asyncio.sleep(0)
    assert old.gate.is_scarce
    waiter.cancel()
    assert [await none.gate.permit() for _ in range(3)] == [0.0] * 3


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
