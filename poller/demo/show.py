"""The demo from its first line to its summary: start, one failing record, one reshard, stop, count."""

import asyncio
import errno
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiobotocore.session import get_session
from aiohttp import web
from botocore.exceptions import BotoCoreError, ClientError

from poller.demo.processes import (
    GRACE_SECONDS,
    REGION,
    Child,
    DemoFailedError,
    child,
    free_ports,
    isolated,
    python_module,
    roto_server,
)
from poller.demo.traffic import SHARDS, SOURCES, Producer, Target, names, short
from poller.demo.view import View, view

_TO_SPLIT = "shardId-000000000002"  # both halves get orders
_DRAIN_SECONDS = 15.0
_STEPS, _ALL_STEPS = 4, 8  # without and with the reshard
_MINISTACK = {  # every listener on loopback: these two services would open ports on all addresses
    "BIND_HOST": "127.0.0.1",
    "MINISTACK_HOST": "127.0.0.1",
    "IOT_MTLS_ENABLED": "0",
    "SFTP_ENABLED": "0",
    "LOG_LEVEL": "WARNING",
}


def show(duration: float | None) -> int:
    """Run the demo; the exit code. What it leaves behind when something went wrong is the directory of logs."""
    home = Path(tempfile.mkdtemp(prefix="esm-poller-demo-"))
    problems: list[str] = []
    try:
        with isolated(home):
            problems = asyncio.run(_Demo(home, duration).run())
    except DemoFailedError as error:
        problems = [str(error)]
    except OSError as error:
        shutil.rmtree(home, ignore_errors=True)
        if error.errno == errno.EIO:  # the terminal is gone
            raise BrokenPipeError from None
        raise
    except asyncio.CancelledError:
        shutil.rmtree(home, ignore_errors=True)
        print("poller demo: ended at once", file=sys.stderr)
        return 1
    if not problems:
        shutil.rmtree(home)
        return 0
    for problem in problems:
        print(f"poller demo: {problem}", file=sys.stderr)
    print(f"The logs and the config file are kept in {home}", file=sys.stderr)
    return 1


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of the story: before the poison, for which the target refuses it, to read a result, of a slow batch.

    The last stays below the time that a function has for a batch.
    """

    quiet: float = 6.0
    broken: float = 8.0
    read: float = 6.0
    slow: float = 5.0

    def within(self, duration: float | None) -> "_Times":
        """Shortened so that all fits into `duration`, with what the daemon needs in between: about 5 s."""
        if duration is None:
            return self
        parts = zip((self.quiet, self.broken, self.read, self.slow), (0.08, 0.17, 0.04, 0.08), strict=True)
        return _Times(*(min(longest, duration * part) for longest, part in parts))


class _Demo:
    """One run. `run` once."""

    def __init__(self, home: Path, duration: float | None) -> None:
        self._home = home
        self._duration = duration
        self._stop = asyncio.Event()
        self._target = Target()
        self._has_reshard = False
        self._waited = 0  # orders that had to wait for the end of their shard's parents
        self._resharded: list[str] = []
        self._shards: dict[str, dict[str, Any]] = {}
        self._looked = asyncio.Event()
        self._started = 0.0
        self._main: asyncio.Task[Any] | None = None

    async def run(self) -> list[str]:
        """What went wrong, a sentence each. DemoFailedError, CancelledError after a second signal."""
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end)
        children: list[Child] = []
        try:
            with _first_of_group():
                async with AsyncExitStack() as stack:
                    await self._run(stack, children)
        except (DemoFailedError, BotoCoreError, ClientError) as error:
            lines = [str(error) if isinstance(error, DemoFailedError) else f"the local AWS failed: {error}"]
            for each in children:
                lines += [f"the last lines of {each.name}.log:", *(f"  {line}" for line in each.tail() or ["(none)"])]
            raise DemoFailedError("\n".join(lines)) from error
        return self._summary()

    def _end(self) -> None:
        """Stop in order; asked a second time, at once."""
        if self._stop.is_set() and self._main is not None:
            self._main.cancel()
        self._stop.set()

    async def _run(self, stack: AsyncExitStack, children: list[Child]) -> None:
        aws_port, kinesis_port, daemon_port = free_ports(3)
        aws_url, daemon_url = f"http://127.0.0.1:{aws_port}", f"http://127.0.0.1:{daemon_port}"
        print(f"local AWS    {aws_url} (MiniStack; your account is not used)")
        variables = {**_MINISTACK, "GATEWAY_PORT": str(aws_port)}
        command = python_module("ministack")
        ministack = await stack.enter_async_context(child("ministack", command, self._home, **variables))
        children.append(ministack)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)))
        await ministack.answers(session, f"{aws_url}/_ministack/health")
        urls = dict.fromkeys(SOURCES, aws_url)
        if (program := roto_server()) is None:
            print("Kinesis      from MiniStack too, which cannot reshard: without roto-aws the demo leaves that out")
        else:
            urls["kinesis"] = f"http://127.0.0.1:{kinesis_port}"
            print(f"Kinesis      {urls['kinesis']} (roto, which can reshard)")
            command = [program, "--ephemeral", "--host", "127.0.0.1", "--port", str(kinesis_port)]
            roto = await stack.enter_async_context(child("roto", command, self._home, NO_COLOR="1"))
            children.append(roto)
            await roto.answers(session, f"{urls['kinesis']}/", 400)  # all it says to what is no AWS call
            self._has_reshard = True
        aws = get_session()
        clients = {
            source: await stack.enter_async_context(aws.create_client(source, endpoint_url=url))
            for source, url in urls.items()
        }
        producer = Producer(clients, self._target, self._stop)
        arns = await producer.make_sources()
        print(f"sources      Kinesis stream ({SHARDS} shards), DynamoDB table, SQS queue: `orders`")

        target_url = await self._serve(stack)
        print(f"HTTP target  {target_url} (in this process)")
        config = self._home / "poller.yaml"
        document = _config(arns, urls, target_url, daemon_port, self._home)
        config.write_text(yaml.safe_dump(document, sort_keys=False))
        command = python_module("poller", "run", "-c", str(config))
        daemon = await stack.enter_async_context(child("daemon", command, self._home))
        children.append(daemon)
        print(f"daemon       poller run -c {config} (pid {daemon.pid})")
        print(f"status page  {daemon_url}/")
        print(f"to try       poller status --url {daemon_url}", flush=True)
        await daemon.answers(session, f"{daemon_url}/readyz")

        self._started = asyncio.get_running_loop().time()
        screen = view(self._target, daemon_url)
        stack.callback(screen.close)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(each)
                for each in (
                    *(each.died() for each in children),
                    self._follow(session, f"{daemon_url}/api/status"),
                    self._draw(screen),
                )
            ]
            work = [tasks.create_task(each) for each in (*producer.loops(), self._story(producer, screen))]
            await self._pause(self._duration)
            self._stop.set()
            screen.end()
            with suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    await asyncio.wait(work)
                    await self._target.everything_arrived()
            for task in (*work, *background):
                task.cancel()
        await daemon.stop()  # the local AWS has nothing to save and is just killed

    async def _serve(self, stack: AsyncExitStack) -> str:
        app = web.Application(client_max_size=8 * 1024 * 1024)
        app.router.add_post("/orders", self._target.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/orders"

    async def _follow(self, session: aiohttp.ClientSession, url: str) -> None:
        """Keeps the shards of the Kinesis mapping up to date."""
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):  # of a dead daemon somebody else tells
                async with session.get(url) as answer:
                    status = await answer.json()
                kinesis = next(mapping for mapping in status["mappings"] if mapping["source"] == "kinesis")
                self._shards = {shard["id"]: shard for shard in kinesis["shards"]}
                self._looked.set()
            await asyncio.sleep(0.2)

    async def _draw(self, screen: View) -> None:
        while True:
            self._draw_now(screen)
            await asyncio.sleep(screen.interval)

    def _draw_now(self, screen: View) -> None:
        screen.draw(self._shards, asyncio.get_running_loop().time() - self._started)

    def _tell(self, screen: View, number: int, text: str) -> None:
        """The next step, with the state that it speaks of."""
        screen.step(f"{number}/{_ALL_STEPS if self._has_reshard else _STEPS}  {text}")
        self._draw_now(screen)

    async def _story(self, producer: Producer, screen: View) -> None:
        """One record that fails for a while, then a reshard. A stop ends what is under way soon, in order."""
        times = _Times().within(self._duration)
        self._tell(
            screen,
            1,
            "Orders go into three sources; the daemon POSTs them to the target in batches. Delivered follows "
            "Produced, and each shard is read at its tip.",
        )
        await self._pause(times.quiet)
        if self._stop.is_set():
            return
        await producer.put_order(is_poison=True)
        poison = self._target.poison
        assert poison is not None
        await poison.refused.wait()
        await self._until([poison.shard], lambda status: bool(status["blocked_seconds"]))
        shard = short(poison.shard)
        self._tell(
            screen,
            2,
            f"The target answers 500 to any batch with order {poison.number} (key {poison.customer}, sequence "
            f"{poison.sequence}). Its shard {shard} is blocked: that batch is tried again and again, nothing behind it "
            "overtakes. The other three shards go on at the tip.",
        )
        await self._pause(times.broken)
        poison.repaired.set()
        self._tell(screen, 3, f"The target is repaired. Shard {shard} goes on with the same batch at its next attempt.")
        await poison.taken.wait()
        await self._until([poison.shard], lambda status: not status["blocked_seconds"])
        self._tell(
            screen,
            4,
            f"Order {poison.number} was taken at attempt {poison.attempts}; shard {shard} was blocked for "
            f"{poison.blocked:.1f} s and goes on behind it, in order. The other three shards delivered "
            f"{poison.others} orders in that time.",
        )
        if self._has_reshard:
            await self._reshard(producer, screen, times)

    async def _reshard(self, producer: Producer, screen: View, times: _Times) -> None:
        """One shard is split, then its children are merged, each time with a slow batch at the end of the parents."""
        await self._pause(times.read)
        if self._stop.is_set():
            return
        self._target.slow_down([_TO_SPLIT])
        halves = await producer.split(_TO_SPLIT)
        left, right = halves
        self._resharded.append(f"Shard {short(_TO_SPLIT)} was split into {names(halves)}")
        await self._until([_TO_SPLIT], _is_ending)
        self._tell(
            screen,
            5,
            f"Shard {short(_TO_SPLIT)} was split while orders flow. It is ending: read to its end, but the target is "
            f"slow with its last orders. New ones go into its children {names(halves)}, which wait for it: "
            "the keys stay in order.",
        )
        waited = await self._let_end(halves, times)
        self._tell(
            screen,
            6,
            f"Shard {short(_TO_SPLIT)} is done with its {self._target.shards[_TO_SPLIT].delivered} orders, and only "
            f"now its children {names(halves)} are read, from their start: {waited} orders had waited in them.",
        )
        await self._pause(times.read)
        if self._stop.is_set():
            return
        self._target.slow_down(halves)
        merged = await producer.merge(left, right)
        self._resharded.append(f"these merged into {names(merged)}")
        await self._until(halves, _is_ending)
        self._tell(
            screen,
            7,
            f"Shards {names(halves)} were merged into {names(merged)}. Both are ending; {names(merged)} waits until "
            "both are done. The other shards go on at the tip.",
        )
        waited = await self._let_end(merged, times)
        kinesis = self._target.tallies["kinesis"]
        self._tell(
            screen,
            8,
            f"Shards {names(halves)} are done and {names(merged)} is read: {waited} orders had waited in it. Four "
            f"shards are open again. Of {kinesis.delivered} orders so far {kinesis.disorders} came out of order within "
            f"their key or shard, {kinesis.duplicates} came twice.",
        )

    async def _let_end(self, children: tuple[str, ...], times: _Times) -> int:
        """The target is slow no more after a while, and the children start: with how many orders waiting in them."""
        await self._pause(times.slow)
        waited = self._target.on_the_way(children)
        self._waited += waited
        self._target.hurry()
        await self._until(children, lambda status: status["state"] == "running")
        return waited

    async def _until(self, shards: Iterable[str], is_so: Callable[[dict[str, Any]], bool]) -> None:
        """Waits until the daemon's status of each of the shards is so."""
        while not all(shard in self._shards and is_so(self._shards[shard]) for shard in shards):
            self._looked.clear()
            await self._looked.wait()

    async def _pause(self, seconds: float | None) -> None:
        """Until the stop, `seconds` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    def _summary(self) -> list[str]:
        """Prints what became of the records; answers what is not as promised."""
        print(f"\n{'source':<10}{'produced':>10}{'delivered':>11}{'twice':>7}{'out of order':>14}")
        problems = []
        for source, tally in self._target.tallies.items():
            disorders = "-" if source == "sqs" else str(tally.disorders)
            print(f"{source:<10}{tally.produced:>10}{tally.delivered:>11}{tally.duplicates:>7}{disorders:>14}")
            if tally.waiting:
                numbers = ", ".join(map(str, sorted(tally.waiting)[:10]))
                problems.append(f"{source}: {len(tally.waiting)} were not delivered, the first are orders {numbers}")
            if tally.disorders:
                problems.append(f"{source}: {tally.disorders} records arrived out of order")
        poison = self._target.poison
        if poison is not None and poison.taken.is_set():
            print(
                f"Shard {short(poison.shard)} was blocked for {poison.blocked:.1f} s by order {poison.number} "
                f"({poison.attempts} attempts); the other three delivered {poison.others} orders in that time."
            )
        if self._resharded:
            print(f"{', '.join(self._resharded)}; {self._waited} orders waited for the end of their shard's parents.")
        if self._target.early:
            problems.append(f"kinesis: {self._target.early} records came before the last of their shard's parents")
        if not problems:
            print("All that was produced was delivered, in order within each shard and key.")
        return problems


def _is_ending(status: dict[str, Any]) -> bool:
    return bool(status["state"] == "ending")


def _config(arns: dict[str, str], urls: dict[str, str], target_url: str, port: int, home: Path) -> dict[str, Any]:
    shared = {"FunctionName": "orders", "BatchSize": 10}
    return {
        "aws": {"region": REGION, "endpoint_url": urls["sqs"], "endpoint_urls": {"kinesis": urls["kinesis"]}},
        "functions": {"orders": {"url": target_url, "timeout_seconds": 10}},
        "event_source_mappings": [
            {"EventSourceArn": arns["kinesis"], **shared, "StartingPosition": "TRIM_HORIZON"},
            {"EventSourceArn": arns["dynamodb"], **shared, "StartingPosition": "TRIM_HORIZON"},
            {"EventSourceArn": arns["sqs"], **shared},
        ],
        "store": f"sqlite://{home}/poller.db",
        "server": {"host": "127.0.0.1", "port": port},
        "log": {"level": "info", "format": "json"},
        "retry": {"initial_backoff_seconds": 0.2, "maximum_backoff_seconds": 1},
        "shutdown_grace_seconds": GRACE_SECONDS,
    }


@contextmanager
def _first_of_group() -> Iterator[None]:
    """What ends the demo comes out of its task group as itself: a failed child or call, closed output."""
    try:
        yield
    except ExceptionGroup as group:
        for kind in (DemoFailedError, BotoCoreError, ClientError, OSError):
            if (found := group.subgroup(kind)) is not None:
                raise found.exceptions[0] from None
        raise
