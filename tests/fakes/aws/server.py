"""The fake as an HTTP server: AWS's JSON protocol at `/`, control at `/_fake/COMMAND`.

Everything that AWS does by itself over hours happens here on demand and at once:

    stream    {table, account?, region?, shards?, view?}   a DynamoDB stream; answers its arn
    put       {stream, records: [{keys, new?, old?, ttl?}]}  changes of items; answers their sequence numbers
    roll      {stream, shard?}             DynamoDB: close the open shards, or one; answers the children
    trim      {stream, shard?, records?}   the oldest records, or all, leave retention
    vanish    {stream, shard?}             closed shards expire: no listing shows them any more
    expire    {stream, shard?}             every iterator and NextToken given out so far is too old
    empty     {stream, shard?, pages}      the next answers with records are empty instead, and behind
    fail_puts {stream, entries}            these entries of the next PutRecords fail
    refuse    {operation, code}            every call is answered with this error; code null: no more
    throttle  {on}                         AWS's limits by load: calls, bytes, readers
    flake     {operation, share}           this share of the calls, at random, is answered 503 and does nothing
    truncate  {operation, on}              calls are done and answered 200 with half of the document
    haunt     {on}                         a poll whose client is gone still takes the next messages, as SQS may
    shards    {stream}                     answers what is there: parents, is_open, held sequence numbers
    queue     {name, account?, region?, attributes?}      answers its arn
    send      {queue, bodies, groups?}     answers message ids
    messages  {queue}                      answers all that ever were there: receives, is_gone, history
    fail_entries {queue, operation, entries}  these entries of the next such batch call fail
    stats     {}                           answers calls by operation and outcome

Shard is an id; stream and queue are ARNs. A mistake in a command is answered 400 with a sentence.
"""

import asyncio
import inspect
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from email.utils import formatdate
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import msgspec
from aiohttp import web

from tests.fakes.aws import dynamodb, kinesis, sqs
from tests.fakes.aws.shards import AwsFault, Caller, Service, Stream, encode, required

_MAX_REQUEST_BYTES = 256 * 2**20


class FakeAws:
    """One AWS with a state of its own, serving inside the `async with`. Commands are methods as well as requests.

    `clock` tells the time of everything: arrivals, ages, limits and the Date header. It may be replaced at any moment.
    Any access key is right; one of 12 digits is the account. Limits are off unless asked for.
    """

    def __init__(self, *, port: int = 0, is_throttling: bool = False, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.port = port
        self.is_throttling = is_throttling
        self.calls: Counter[tuple[str, str]] = Counter()  # (operation, "ok" or AWS's error code)
        self._kinesis = kinesis.Kinesis(self._now, lambda: self.is_throttling)
        self._dynamodb = dynamodb.DynamoStreams(self._now, lambda: self.is_throttling)
        self._refused: dict[str, str] = {}
        self._flaky: dict[str, float] = {}
        self._truncated: set[str] = set()
        self._dice = random.Random(1)
        self._is_haunted = False
        self._sqs = sqs.Sqs(self._now)
        self._services = {each.service.target: each.service for each in (self._kinesis, self._dynamodb, self._sqs)}
        self._commands: dict[str, Callable[..., Any]] = {
            "stream": self.stream,
            "put": self.put,
            "roll": self.roll,
            "trim": self.trim,
            "vanish": self.vanish,
            "expire": self.expire,
            "empty": self.empty,
            "fail_puts": self.fail_puts,
            "refuse": self.refuse,
            "throttle": self.throttle,
            "flake": self.flake,
            "truncate": self.truncate,
            "haunt": self.haunt,
            "queue": self.queue,
            "send": self.send,
            "messages": self.messages,
            "fail_entries": self.fail_entries,
            "shards": self.shards,
            "stats": self.stats,
        }
        app = web.Application(client_max_size=_MAX_REQUEST_BYTES)
        app.router.add_post("/", self._serve)
        app.router.add_post("/_fake/{command}", self._command)
        # Handlers are cancelled, so that a long poll ends with its client.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = int(self._runner.addresses[0][1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sqs.close()
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """Where it listens: loopback only."""
        return f"http://127.0.0.1:{self.port}"

    # --- commands

    def stream(
        self,
        table: str,
        account: str = "111122223333",
        region: str = "eu-west-1",
        shards: int = 1,
        view: str = "NEW_AND_OLD_IMAGES",
    ) -> str:
        """A DynamoDB stream with so many roots; answers its ARN."""
        return self._dynamodb.create(Caller(account, region), table, shards, view).arn

    def put(self, stream: str, records: Sequence[dict[str, Any]]) -> list[str]:
        """Changes of items, in order: `keys`, `new` and `old` images, `ttl` for a deletion that the service made."""
        found, now = self._dynamodb.stream(stream), self._now()
        return [
            found.write(
                required(record, "keys"), record.get("new"), record.get("old"), now, ttl=record.get("ttl", False)
            )
            for record in records
        ]

    def roll(self, stream: str, shard: str | None = None) -> list[str]:
        """Close the open shards of a table's stream, or one; answers their children."""
        found = self._dynamodb.stream(stream)
        rolled = list(found.lines) if shard is None else [found.shard(shard)]
        return [found.roll(one).id for one in rolled]

    def trim(self, stream: str, shard: str | None = None, records: int | None = None) -> dict[str, int]:
        """The oldest records of each shard, or all, leave retention; answers how many did."""
        found = self._any(stream)
        return found.trim(found.chosen(shard), records)

    def vanish(self, stream: str, shard: str | None = None) -> dict[str, int]:
        """Closed shards expire with what they hold; answers how many records did by shard."""
        found = self._any(stream)
        return found.expire_shards([one for one in found.chosen(shard) if one.is_closed])

    def expire(self, stream: str, shard: str | None = None) -> None:
        """Iterators of these shards and every NextToken are too old, however new they are."""
        found = self._any(stream)
        found.expire_iterators(found.chosen(shard))

    def empty(self, stream: str, pages: int, shard: str | None = None) -> None:
        """The next `pages` answers of each shard that would hold records are empty, with an iterator and a lag."""
        for one in self._any(stream).chosen(shard):
            one.empty_pages = pages

    def fail_puts(self, stream: str, entries: Sequence[int]) -> None:
        """These entries of the next PutRecords fail, the others do not; may be said for several calls in advance."""
        self._kinesis.stream(stream).failing.append(frozenset(entries))

    def refuse(self, operation: str, code: str | None) -> None:
        """Every call of an operation is answered with an error; None: no more."""
        if code is None:
            self._refused.pop(operation, None)
        else:
            self._refused[operation] = code

    def throttle(self, on: bool) -> None:
        """Whether limits by load are kept."""
        self.is_throttling = on

    def flake(self, operation: str, share: float) -> None:
        """So many of the calls, at random, are answered 503 and do nothing; 0: none any more."""
        self._flaky[operation] = share

    def truncate(self, operation: str, on: bool) -> None:
        """Whether calls are done and answered with the first half of their document."""
        (self._truncated.add if on else self._truncated.discard)(operation)

    def haunt(self, on: bool) -> None:
        """Whether a poll outlives its client, so that what it takes is in flight and in nobody's hands."""
        self._is_haunted = on

    def queue(
        self,
        name: str,
        account: str = "111122223333",
        region: str = "eu-west-1",
        attributes: dict[str, str] | None = None,
    ) -> str:
        """A queue; answers its ARN."""
        return self._sqs.create(Caller(account, region), name, attributes or {}).arn

    def send(self, queue: str, bodies: Sequence[str], groups: Sequence[str] = ()) -> list[str]:
        """Messages, in order, each with its group if there are groups; answers their ids."""
        found = self._sqs.queue(queue)
        return [
            found.send(body, group, f"{group} {body}" if group else "").id
            for body, group in zip(bodies, groups or [""] * len(bodies), strict=True)
        ]

    def messages(self, queue: str) -> list[dict[str, Any]]:
        """All that ever were in a queue and were not moved away."""
        return [
            {
                "id": one.id,
                "body": one.body,
                "group": one.group,
                "receives": one.receives,
                "is_gone": one.is_gone,
                "history": one.history,
            }
            for one in self._sqs.queue(queue).messages.values()
        ]

    def fail_entries(self, queue: str, operation: str, entries: Sequence[int]) -> None:
        """These entries of the queue's next batch call of that operation fail; may be said for several in advance."""
        self._sqs.queue(queue).failing.setdefault(operation, deque()).append(frozenset(entries))

    def queue_of(self, arn: str) -> sqs.Queue:
        """The queue itself, for a test in this process."""
        return self._sqs.queue(arn)

    def delete_queue(self, arn: str) -> None:
        """The queue and all that is in it are gone; whoever polls is told so."""
        self._sqs.delete(arn)

    def shards(self, stream: str) -> dict[str, dict[str, Any]]:
        """What has not expired, parents before children: `parents`, `is_open`, `held` sequence numbers."""
        return {
            one.id: {"parents": one.parents, "is_open": not one.is_closed, "held": [str(n) for n in one.sequences]}
            for one in self._any(stream).shards.values()
        }

    def stats(self) -> dict[str, dict[str, int]]:
        """How many calls there were, by operation and outcome: `ok` or AWS's error code."""
        answer: dict[str, dict[str, int]] = {}
        for (operation, outcome), count in self.calls.items():
            answer.setdefault(operation, {})[outcome] = count
        return answer

    # --- HTTP

    def _now(self) -> float:
        return self.clock()

    def _any(self, arn: str) -> Stream:
        return self._dynamodb.stream(arn) if ":dynamodb:" in arn else self._kinesis.stream(arn)

    async def _serve(self, request: web.Request) -> web.Response:
        target, _, operation = request.headers.get("X-Amz-Target", "").partition(".")
        service = self._services.get(target)
        try:
            answer = self._called(service, operation, request, await request.read())
            if inspect.isawaitable(answer):
                answer = await (asyncio.shield(answer) if self._is_haunted else answer)
            status, outcome = 200, "ok"
        except AwsFault as fault:
            status, outcome = fault.status, fault.code
            answer = {"__type": (service.namespace if service else "") + fault.code, "message": fault.message}
        self.calls[operation, outcome] += 1
        headers = {
            "Date": formatdate(self._now(), usegmt=True),
            "Content-Type": service.content_type if service else "application/json",
            "x-amzn-RequestId": str(uuid4()),
        }
        if service is self._sqs.service and status != 200:
            side = "Sender" if status < 500 else "Receiver"
            headers["x-amzn-query-error"] = f"{sqs.QUERY_CODES.get(outcome, outcome)};{side}"
        body = answer if isinstance(answer, bytes) else encode(answer)
        if operation in self._truncated:
            body = body[: len(body) // 2]
        return web.Response(status=status, body=body, headers=headers)

    def _called(self, service: Service | None, operation: str, request: web.Request, body: bytes) -> Any:
        if service is None or operation not in service.operations:
            raise AwsFault("UnknownOperationException", f"{request.headers.get('X-Amz-Target')} is not known here")
        if code := self._refused.get(operation):
            raise AwsFault(code, f"{operation} is refused")
        if self._dice.random() < self._flaky.get(operation, 0.0):
            raise AwsFault("ServiceUnavailable", f"{operation} failed at random", 503)
        call, members = service.operations[operation]
        document = _object(body)
        if unknown := document.keys() - members:
            raise AwsFault("ValidationException", f"{operation} with {min(unknown)} is not known here")
        return call(_caller(request), document)

    async def _command(self, request: web.Request) -> web.Response:
        try:
            answer = self._commanded(request.match_info["command"], await request.read())
        except AwsFault as fault:
            return web.json_response({"error": str(fault)}, status=400)
        return web.json_response(answer)

    def _commanded(self, name: str, body: bytes) -> Any:
        if (command := self._commands.get(name)) is None:
            raise AwsFault("UnknownCommand", f"{name} is none of {', '.join(self._commands)}")
        arguments = _object(body)
        try:
            inspect.signature(command).bind(**arguments)
        except TypeError as error:
            raise AwsFault("BadArguments", f"{name}: {error}") from None
        return command(**arguments)


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body or b"{}")
    except msgspec.MsgspecError as error:
        raise AwsFault("SerializationException", f"the body is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise AwsFault("SerializationException", "the body is no JSON object")
    return document


def _caller(request: web.Request) -> Caller:
    """From `Authorization: AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/...`; the signature is not looked at."""
    scope = request.headers.get("Authorization", "").partition("Credential=")[2].split("/")
    if len(scope) < 5:
        raise AwsFault("MissingAuthenticationTokenException", "Missing Authentication Token", 403)
    account = scope[0] if len(scope[0]) == 12 and scope[0].isdecimal() else "123456789012"
    return Caller(account, scope[2])
