"""A target that writes down every attempt, and fails as often as it is told to."""

import asyncio
import enum
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

LONGEST_WORK = 0.02


class Outcome(enum.StrEnum):
    """What became of an attempt, as the target saw it."""

    SUCCESS = "success"
    FAILURE = "failure"
    PARTIAL = "partial"  # some items failed: those that did not are in `done`
    THROTTLED = "throttled"
    GONE = "gone"  # the caller left before the answer


@dataclass(slots=True)
class Attempt:
    """One request. Times are the loop's. `done`: the records that succeeded; empty unless it was answered."""

    request_id: str
    number: int
    key: str
    life: int
    began: float
    records: tuple[str, ...]
    ended: float = 0.0
    outcome: Outcome = Outcome.GONE
    done: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Temper:
    """How the target behaves: shares of the requests (and, when it reports items, of the items) that fail."""

    failures: float = 0.0
    throttles: float = 0.0
    reports_items: bool = False


@dataclass(slots=True)
class Ledger:
    """`poison` are the records that always fail. `groups`: of FIFO messages, what fails takes the rest of its group
    along, as AWS asks of a function. `/LIFE` is the path: which daemon calls. `pending` counts open requests.
    """

    temper: Temper
    dice: random.Random
    groups: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    poison: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    pending: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        """One invocation."""
        names = tuple(name_of(record) for record in json.loads(await request.read())["Records"])
        attempt = Attempt(
            request_id=request.headers["X-Poller-Request-Id"],
            number=int(request.headers["X-Poller-Attempt"]),
            key=request.headers["Idempotency-Key"],
            life=int(request.path.rpartition("/")[2]),
            began=asyncio.get_running_loop().time(),
            records=names,
        )
        self.attempts.append(attempt)
        self.pending += 1
        try:
            await asyncio.sleep(self.dice.uniform(0, LONGEST_WORK))
            status, document = self._judge(attempt)
        finally:
            self.pending -= 1
            attempt.ended = asyncio.get_running_loop().time()
        self.done |= attempt.done
        return web.json_response(document, status=status)

    def _judge(self, attempt: Attempt) -> tuple[int, dict[str, Any]]:
        luck = self.dice.random()
        if luck < self.temper.throttles:
            attempt.outcome = Outcome.THROTTLED
            return 429, {}
        if luck < self.temper.throttles + self.temper.failures:
            attempt.outcome = Outcome.FAILURE
            return 500, {}
        failing = [name for name in attempt.records if name in self.poison]
        if not self.temper.reports_items:
            attempt.outcome = Outcome.FAILURE if failing else Outcome.SUCCESS
            attempt.done = frozenset() if failing else frozenset(attempt.records)
            return (500 if failing else 200), {}
        failing += [name for name in attempt.records if self.dice.random() < self.temper.failures]
        failed = self._with_followers(attempt.records, set(failing))
        attempt.outcome = Outcome.PARTIAL if failed else Outcome.SUCCESS
        attempt.done = frozenset(self._kept(attempt.records, failed))
        return 200, {"batchItemFailures": [{"itemIdentifier": name} for name in attempt.records if name in failed]}

    def _with_followers(self, records: tuple[str, ...], failing: set[str]) -> set[str]:
        failed: set[str] = set()
        groups: set[str] = set()
        for name in records:
            group = self.groups.get(name, "")
            if name in failing or (group and group in groups):
                failed.add(name)
                groups.add(group)
        return failed

    def _kept(self, records: tuple[str, ...], failed: set[str]) -> tuple[str, ...]:
        """Of a stream everything from the first failure on comes again (semantics 7); of a queue what failed does."""
        if not failed or not _is_number(records[0]):
            return tuple(name for name in records if name not in failed)
        return records[: min(records.index(name) for name in failed)]


def name_of(record: Mapping[str, Any]) -> str:
    """What identifies a record: the sequence number of a stream's, the id of a message."""
    match record["eventSource"]:
        case "aws:kinesis":
            return str(record["kinesis"]["sequenceNumber"])
        case "aws:dynamodb":
            return str(record["dynamodb"]["SequenceNumber"])
        case _:
            return str(record["messageId"])


def _is_number(name: str) -> bool:
    return name.isdecimal()


@asynccontextmanager
async def serving(ledger: Ledger) -> AsyncIterator[Ledger]:
    """The ledger on a free port. Requests end with their callers."""
    app = web.Application(client_max_size=16 * 2**20)
    app.router.add_post("/{path:.*}", ledger.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ledger.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield ledger
    finally:
        await runner.cleanup()
