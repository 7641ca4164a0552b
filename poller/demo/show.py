"""The demo from its first line to its summary: start, one failing record, stop, count."""

import asyncio
import errno
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiobotocore.session import get_session
from aiohttp import web
from botocore.exceptions import BotoCoreError, ClientError

from poller.demo.processes import GRACE_SECONDS, REGION, Child, DemoFailedError, child, free_ports, isolated
from poller.demo.traffic import SHARDS, SOURCES, Producer, Target, short
from poller.demo.view import View, view

_QUIET_SECONDS = 6.0  # before the poison
_BROKEN_SECONDS = 8.0  # for which the target refuses it
_DRAIN_SECONDS = 15.0
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


class _Demo:
    """One run. `run` once."""

    def __init__(self, home: Path, duration: float | None) -> None:
        self._home = home
        self._duration = duration
        self._stop = asyncio.Event()
        self._target = Target()
        self._shards: list[dict[str, Any]] = []
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
        aws_port, daemon_port = free_ports(2)
        aws_url, daemon_url = f"http://127.0.0.1:{aws_port}", f"http://127.0.0.1:{daemon_port}"
        print(f"local AWS    {aws_url} (MiniStack; your account is not used)")
        variables = {**_MINISTACK, "GATEWAY_PORT": str(aws_port)}
        ministack = await stack.enter_async_context(child("ministack", ["ministack"], self._home, **variables))
        children.append(ministack)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)))
        await ministack.answers(session, f"{aws_url}/_ministack/health")
        aws = get_session()
        clients = {
            source: await stack.enter_async_context(aws.create_client(source, endpoint_url=aws_url))
            for source in SOURCES
        }
        producer = Producer(clients, self._target, self._stop)
        arns = await producer.make_sources()
        print(f"sources      Kinesis stream ({SHARDS} shards), DynamoDB table, SQS queue: `orders`")

        target_url = await self._serve(stack)
        print(f"HTTP target  {target_url} (in this process)")
        config = self._home / "poller.yaml"
        document = _config(arns, aws_url, target_url, daemon_port, self._home)
        config.write_text(yaml.safe_dump(document, sort_keys=False))
        arguments = ["poller", "run", "-c", str(config)]
        daemon = await stack.enter_async_context(child("daemon", arguments, self._home))
        children.append(daemon)
        print(f"daemon       poller run -c {config} (pid {daemon.pid})")
        print(f"status page  {daemon_url}/")
        print(f"to try       poller status --url {daemon_url}", flush=True)
        await daemon.answers(session, f"{daemon_url}/readyz")

        screen = view(self._target, daemon_url)
        stack.callback(screen.close)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(each)
                for each in (
                    ministack.died(),
                    daemon.died(),
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
        await daemon.stop()  # MiniStack has nothing to save and is just killed

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
                self._shards = sorted(kinesis["shards"], key=lambda shard: str(shard["id"]))
            await asyncio.sleep(0.25)

    async def _draw(self, screen: View) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        while True:
            screen.draw(self._shards, loop.time() - start)
            await asyncio.sleep(screen.interval)

    async def _story(self, producer: Producer, screen: View) -> None:
        """One record that fails for a while; when the demo ends before, the target is repaired at once."""
        screen.step(
            "1/4  Orders go into three sources; the daemon POSTs them to the target in batches. Delivered follows "
            "Produced, and each shard is read at its tip."
        )
        quiet, broken = _QUIET_SECONDS, _BROKEN_SECONDS
        if self._duration is not None:
            quiet, broken = min(quiet, self._duration * 0.25), min(broken, self._duration * 0.35)
        await self._pause(quiet)
        if self._stop.is_set():
            return
        await producer.put_order(is_poison=True)
        poison = self._target.poison
        assert poison is not None
        await poison.refused.wait()
        shard = short(poison.shard)
        screen.step(
            f"2/4  The target answers 500 to any batch with order {poison.number} (key {poison.customer}, sequence "
            f"{poison.sequence}). Its shard {shard} is blocked: that batch is tried again and again, nothing behind it "
            "overtakes. The other three shards go on at the tip."
        )
        await self._pause(broken)
        poison.repaired.set()
        screen.step(f"3/4  The target is repaired. Shard {shard} goes on with the same batch at its next attempt.")
        await poison.taken.wait()
        screen.step(
            f"4/4  Order {poison.number} was taken at attempt {poison.attempts}; shard {shard} was blocked for "
            f"{poison.blocked:.1f} s and goes on behind it, in order. The other three shards delivered "
            f"{poison.others} orders in that time."
        )

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
        if not problems:
            print("All that was produced was delivered, in order within each shard and key.")
        return problems


def _config(arns: dict[str, str], aws_url: str, target_url: str, port: int, home: Path) -> dict[str, Any]:
    shared = {"FunctionName": "orders", "BatchSize": 10}
    return {
        "aws": {"region": REGION, "endpoint_url": aws_url},
        "functions": {"orders": {"url": target_url, "timeout_seconds": 10}},
        "event_source_mappings": [
            {"EventSourceArn": arns["kinesis"], **shared, "StartingPosition": "TRIM_HORIZON"},
            {"EventSourceArn": arns["dynamodb"], **shared, "StartingPosition": "TRIM_HORIZON"},
            {"EventSourceArn": arns["sqs"], **shared},
        ],
        "store": f"sqlite://{home}/poller.db",
        "server": {"host": "127.0.0.1", "port": port},
        "log": {"level": "info", "format": "json"},
        "retry": {"initial_backoff_seconds": 0.2, "maximum_backoff_seconds": 2},
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
