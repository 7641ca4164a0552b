"""The real daemon as a process, and an HTTP target that keeps a ledger of every attempt."""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

START_SECONDS = 30.0


@dataclass
class Delivery:
    """One successful delivery of one record."""

    at: float
    shard: str
    attempt: int


@dataclass
class Ledger:
    """What arrived. `rule` may answer a status for a request's records; None: 200."""

    url: str = ""
    deliveries: dict[str, list[Delivery]] = field(default_factory=dict)
    order: dict[str, list[str]] = field(default_factory=dict)  # per shard or queue, first deliveries
    attempts: Counter[str] = field(default_factory=Counter)
    requests: list[dict[str, str]] = field(default_factory=list)
    rule: Any = None
    closes: bool = False  # each connection after its answer
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    events: list[dict[str, Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        records = json.loads(await request.read())["Records"]
        self.requests.append(dict(request.headers))
        names = [self.name(record) for record in records]
        self.attempts.update(names)
        status = self.rule(records) if self.rule else None
        if status is not None:
            self.changed.set()
            return web.Response(status=status)
        now = asyncio.get_running_loop().time()
        for name, record in zip(names, records, strict=True):
            shard = self.shard(record)
            if name not in self.deliveries:
                self.order.setdefault(shard, []).append(name)
            self.deliveries.setdefault(name, []).append(Delivery(now, shard, int(request.headers["X-Poller-Attempt"])))
        if len(self.events) < 50:
            self.events += records[:1]
        self.changed.set()
        return web.json_response({}, headers={"Connection": "close"} if self.closes else None)

    @staticmethod
    def name(record: dict[str, Any]) -> str:
        match record["eventSource"]:
            case "aws:kinesis":
                return f"kinesis {record['eventID']}"
            case "aws:dynamodb":
                return f"dynamodb {record['dynamodb']['SequenceNumber']}"
            case _:
                return f"sqs {record['messageId']}"

    @staticmethod
    def shard(record: dict[str, Any]) -> str:
        if record["eventSource"] == "aws:kinesis":
            return record["eventID"].split(":")[0]
        return record["eventSource"]

    def count(self, source: str) -> int:
        return sum(name.startswith(source) for name in self.deliveries)

    def redelivered(self) -> dict[str, list[Delivery]]:
        return {name: times for name, times in self.deliveries.items() if len(times) > 1}

    async def until(self, condition: Any, seconds: float, what: str) -> None:
        """Wait until the condition holds; it is looked at after each request."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"{what} has not happened in {seconds} s: {Counter(n.split()[0] for n in self.deliveries)}"
            ) from None


class Daemon:
    """`poller run` with one config file and one store; may be killed and started again."""

    def __init__(self, folder: Path, config: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.path = folder / "poller.yaml"
        self.arguments: list[str] = []  # of `run`, beside `-c`
        self.environment = {**os.environ, **(environment or {})}
        store = f"sqlite:///{str(folder).lstrip('/')}/poller.db"
        self.config = {"store": store, "server": {"port": 0}, **config}
        self.write(self.config)
        self.process: asyncio.subprocess.Process | None = None
        self.port = 0
        self.logs: list[dict[str, Any]] = []
        self._reading: asyncio.Task[None] | None = None
        self._started = asyncio.Event()
        self.log_changed = asyncio.Event()

    def write(self, config: dict[str, Any]) -> None:
        self.path.write_text(yaml.safe_dump(config))

    async def start(self, *, wait: bool = True) -> None:
        self._started.clear()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "poller", "run", "-c", str(self.path), *self.arguments,
            stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL, env=self.environment, limit=2**22,
        )  # fmt: skip
        self._reading = asyncio.create_task(self._read(self.process))
        if wait:
            started = asyncio.create_task(self._started.wait())
            await asyncio.wait({started, self._reading}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            started.cancel()
            assert self._started.is_set(), f"the daemon does not start: {self.logs[-5:]}"

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": "not_json", "line": line.decode(errors="replace")}
            self.logs.append(entry)
            if entry["event"] == "started":
                self.port = entry["port"]
                self._started.set()
            self.log_changed.set()

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self, seconds: float = 40.0) -> int:
        assert self.process is not None
        assert self._reading is not None
        async with asyncio.timeout(seconds):
            code = await self.process.wait()
            await self._reading
        return code

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        await self.ended()

    async def stop(self) -> int:
        self.send(signal.SIGTERM)
        return await self.ended()

    async def close(self) -> None:
        if self.process is not None and self.process.returncode is None:
            await self.kill()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.logs if entry["event"] == name]

    async def until_logged(self, name: str, seconds: float = 20.0) -> dict[str, Any]:
        try:
            async with asyncio.timeout(seconds):
                while not self.events(name):
                    self.log_changed.clear()
                    await self.log_changed.wait()
        except TimeoutError:
            raise AssertionError(f"{name} was not logged in {seconds} s: {self.logs[-5:]}") from None
        return self.events(name)[-1]

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{self.port}{path}") as answer:
            return answer.status, await answer.text()

    async def status(self) -> list[dict[str, Any]]:
        _, text = await self.get("/api/status")
        return json.loads(text)["mappings"]

    def clean_logs(self) -> list[dict[str, Any]]:
        """Everything that should never be logged in a run without faults of the world."""
        return [e for e in self.logs if e.get("level") in {"error", "critical"} or e["event"] == "not_json"]
