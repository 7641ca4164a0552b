"""A reverse proxy that breaks things: between the daemon and AWS, and between the daemon and its targets.

It speaks raw HTTP/1.1, so that it can stop, lie or hang up at any byte. Without a fault it passes every byte on as it
comes. What a fault does to a request that upstream has carried out is never worse than what a network does: an answer
may be lost, but a failure is never turned into a success, and nothing is sent upstream twice.
"""

import asyncio
import contextlib
import enum
import json
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple, Self
from urllib.parse import urlsplit

_BUFFER_BYTES = 2**20
_IDLE_SECONDS = 5.0  # an upstream connection that was idle for longer may be closed just now; a new one cannot be
_AT_ONCE = 64  # accepted connections and pieces of a slow answer: not more in one go
_SLOW_PIECES = 400
_RESET_WITHIN = 0.3  # seconds after a request was passed on


class Kind(enum.StrEnum):
    """What can go wrong. Each says whether upstream carries the request out."""

    LATENCY = "latency"  # it does, later
    RESET = "reset"  # by the dice; RST before or after the request was passed on, or in the middle of the answer
    HALF_OPEN = "half_open"  # by the dice; nothing is ever answered
    TRUNCATED = "truncated"  # it does; the body, or the JSON in it, ends early
    GARBAGE = "garbage"  # it does; the body is noise, or (by the dice carried out or not) the answer is no HTTP at all
    ERROR_500 = "error_500"  # by the dice
    ERROR_503 = "error_503"  # by the dice
    THROTTLE = "throttle"  # it does not
    CONTENT_TYPE = "content_type"  # it does; the right body as text/html
    SLOW_LORIS = "slow_loris"  # it does; the answer comes byte by byte
    EXPIRED = "expired"  # it does not
    REFUSED = "refused"  # no connection is taken, idle ones are closed; what is under way goes on
    LATE = "late"  # it does; the answer comes later


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `share` of the requests is hit (REFUSED: of the connections; from 1.0 on the port is closed).

    `seconds` is the delay of LATENCY and LATE, and how long SLOW_LORIS stretches an answer.
    """

    kind: Kind
    share: float = 1.0
    seconds: float = 0.0


class _Active:
    """A fault from `begin` to `end`."""

    def __init__(self, fault: Fault, began: float) -> None:
        self.fault = fault
        self.began = began
        self.held: set[_Client] = set()  # HALF_OPEN: who hangs until its end


class _Head(NamedTuple):
    """First line and fields of a message, as they came."""

    raw: bytes
    fields: dict[bytes, bytes]  # names in lower case

    @property
    def first(self) -> list[bytes]:
        return self.raw.partition(b"\r\n")[0].split(b" ", 2)

    @property
    def is_closing(self) -> bool:
        said = self.fields.get(b"connection", b"").lower()
        return said == b"close" or (b"HTTP/1.0" in self.first and said != b"keep-alive")

    def with_fields(self, *, without: frozenset[bytes], extra: bytes = b"") -> bytes:
        """The head with some of its lines left out and others added."""
        lines = self.raw[:-4].split(b"\r\n")
        kept = [line for line in lines[1:] if line.partition(b":")[0].strip().lower() not in without]
        return b"\r\n".join([lines[0], *kept, b""]) + extra + b"\r\n"


class _Piece(NamedTuple):
    """Part of a body: as it is framed, and what it holds."""

    raw: bytes
    data: bytes


class _Request(NamedTuple):
    head: _Head
    raw: bytes  # all of it, as it is passed on
    body: bytes

    @property
    def is_head(self) -> bool:
        return self.head.first[0] == b"HEAD"


class _Answer(NamedTuple):
    head: _Head
    raw: bytes  # the body as it is framed
    body: bytes


class _Client(asyncio.StreamReaderProtocol):
    """A connection to us. Who leaves, at whatever moment, cancels the task that serves it."""

    def __init__(self, task: "asyncio.Task[None] | None") -> None:
        assert task is not None
        self.reader = asyncio.StreamReader(limit=_BUFFER_BYTES)
        super().__init__(self.reader)
        self._served_by = task
        self.transport: asyncio.Transport
        self.is_idle = True
        self._drained = asyncio.Event()
        self._drained.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self.transport = transport

    def eof_received(self) -> bool:
        super().eof_received()
        return False  # closes our side too

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._served_by.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._drained.clear()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._drained.set()

    async def send(self, data: bytes) -> None:
        """Return when there is room for more."""
        self.transport.write(data)
        await self._drained.wait()

    def reset(self) -> None:
        """RST: nothing that is still on its way arrives for sure."""
        if (connected := self.transport.get_extra_info("socket")) is not None and connected.fileno() >= 0:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class _Upstream:
    """The connection behind one client's."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._used = 0.0

    async def pass_on(self, request: _Request) -> None:
        """Send a request, once."""
        now = asyncio.get_running_loop().time()
        if self._writer is None or self._reader.at_eof() or now - self._used > _IDLE_SECONDS:
            self.close()
            self._reader, self._writer = await asyncio.open_connection(*self._address, limit=_BUFFER_BYTES)
        self._writer.write(request.raw)
        await self._writer.drain()

    async def head(self) -> _Head:
        """The head of the answer."""
        return await _read_head(self._reader)

    def body(self, request: _Request, head: _Head) -> "_Body":
        """The body that follows."""
        is_empty = request.is_head or head.first[1] in {b"204", b"304"}
        return _Body(self._reader, head, is_empty=is_empty, until_closed=True)

    def answered(self, head: _Head) -> None:
        """The whole body was read: another request may follow."""
        self._used = asyncio.get_running_loop().time()
        if head.is_closing:
            self.close()

    async def answer(self, request: _Request) -> _Answer:
        """All of the answer."""
        head = await self.head()
        raw, data = await self.body(request, head).read_all()
        self.answered(head)
        return _Answer(head, raw, data)

    def close(self) -> None:
        """Hang up, in the middle of an answer too."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None


class Proxy:
    """An HTTP/1.1 reverse proxy for one upstream, on a free port of 127.0.0.1.

    Pipelined requests are not served. Several faults may be active: each request draws for them in the order in which
    they began and the first that hits wins; LATENCY comes on top of any other. A client that leaves ends what it asked
    for, upstream too. When upstream takes no connection or breaks one, so does the proxy.
    """

    def __init__(self, upstream: str, seed: int, what: Literal["aws", "target"]) -> None:
        parts = urlsplit(upstream)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{upstream} is no http:// URL")
        self._address = (parts.hostname, parts.port or 80)
        self._dice = Random(seed)
        self._is_aws = what == "aws"
        self._active: list[_Active] = []
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._stack = contextlib.AsyncExitStack()
        self.counts: Counter[Kind] = Counter()
        """Requests or connections hit; a closed port counts once."""
        self.last: list[tuple[float, float, Kind]] = []
        """When each hit began and ended, by the loop's clock; in the order of their ends."""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        # Bound and never listening: it keeps the port ours while no listener is open.
        self._holder = self._stack.enter_context(_bound(0))
        self._port: int = self._holder.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._group = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.clear()
        self._deafen()
        for task in self._tasks:
            task.cancel()
        await self._stack.aclose()
        await asyncio.sleep(0)  # aborted transports close their sockets in the loop's next turn

    def begin(self, fault: Fault) -> None:
        """From now on; any number at once, also equal ones."""
        active = _Active(fault, self._loop.time())
        self._active.append(active)
        if fault.kind is not Kind.REFUSED:
            return
        if fault.share >= 1.0:
            self.counts[Kind.REFUSED] += 1
            self._deafen()
        for client in [one for one in self._clients if one.is_idle]:
            if self._dice.random() < fault.share:
                if fault.share < 1.0:
                    self._note(Kind.REFUSED, active.began)
                client.transport.close()

    def end(self, fault: Fault) -> None:
        """No more; connections that hang because of it are aborted. Nothing when it is not active."""
        found = next((active for active in self._active if active.fault == fault), None)
        if found is None:
            return
        self._active.remove(found)
        for client in list(found.held):
            client.reset()
        if fault.kind is Kind.REFUSED and fault.share >= 1.0:
            self.last.append((found.began, self._loop.time(), Kind.REFUSED))
            if not self._is_deaf():
                self._listen()

    def clear(self) -> None:
        """End all of them."""
        for active in list(self._active):
            self.end(active.fault)

    # --- connections

    def _is_deaf(self) -> bool:
        return any(one.fault.kind is Kind.REFUSED and one.fault.share >= 1.0 for one in self._active)

    def _listen(self) -> None:
        self._listener = _bound(self._port)
        self._listener.listen(1024)
        self._loop.add_reader(self._listener, self._accept, self._listener)

    def _deafen(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, _address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            accepted.setblocking(False)
            if self._is_refused():
                self._note(Kind.REFUSED, self._loop.time())
                accepted.close()
                continue
            task = self._group.create_task(self._serve(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _is_refused(self) -> bool:
        shares = [one.fault.share for one in self._active if one.fault.kind is Kind.REFUSED]
        return any(self._dice.random() < share for share in shares)

    def _note(self, kind: Kind, began: float) -> None:
        self.counts[kind] += 1
        self.last.append((began, self._loop.time(), kind))

    @contextlib.contextmanager
    def _noted(self, kind: Kind) -> Iterator[None]:
        began = self._loop.time()
        self.counts[kind] += 1
        try:
            yield
        finally:
            self.last.append((began, self._loop.time(), kind))

    async def _serve(self, accepted: socket.socket) -> None:
        upstream = _Upstream(*self._address)
        client = _Client(asyncio.current_task())
        try:
            await self._loop.connect_accepted_socket(lambda: client, accepted)
        except BaseException:
            accepted.close()
            raise
        self._clients.add(client)
        try:
            is_open = True
            while is_open and not self._is_deaf():
                client.is_idle = True
                request = await _read_request(client)
                client.is_idle = False
                is_open = await self._answer(request, client, upstream)
            client.transport.close()
        except (OSError, EOFError, asyncio.LimitOverrunError, _MalformedError):
            client.transport.abort()
        finally:
            # No await in here: the task may end because it was cancelled.
            self._clients.discard(client)
            upstream.close()
            client.transport.close()

    # --- requests

    async def _answer(self, request: _Request, client: _Client, upstream: _Upstream) -> bool:
        """Answer one request, well or badly; whether the connection can take another."""
        with contextlib.ExitStack() as hits:
            hit, delay = None, 0.0
            for active in self._active:
                fault = active.fault
                if fault.kind is Kind.REFUSED or self._dice.random() >= fault.share:
                    continue
                hits.enter_context(self._noted(fault.kind))
                if fault.kind is Kind.LATENCY:
                    delay += fault.seconds
                    continue
                if fault.kind is Kind.HALF_OPEN:
                    active.held.add(client)
                    hits.callback(active.held.discard, client)
                hit = active
                break
            if delay:
                await asyncio.sleep(delay)
            if hit is None:
                await upstream.pass_on(request)
                return await self._relay(request, client, upstream)
            return await self._break(hit, request, client, upstream)

    async def _break(self, hit: _Active, request: _Request, client: _Client, upstream: _Upstream) -> bool:
        match hit.fault.kind:
            case Kind.RESET:
                return await self._reset(request, client, upstream)
            case Kind.HALF_OPEN:
                if self._dice.random() < 0.5:
                    await upstream.pass_on(request)
                    await upstream.answer(request)
                hung: asyncio.Future[bool] = self._loop.create_future()
                return await hung  # until the client leaves or `end` aborts its connection
            case Kind.TRUNCATED:
                return await self._truncate(request, client, upstream)
            case Kind.GARBAGE:
                return await self._garble(request, client, upstream)
            case Kind.CONTENT_TYPE:
                await upstream.pass_on(request)
                return await self._relay(request, client, upstream, content_type=b"text/html")
            case Kind.SLOW_LORIS:
                await upstream.pass_on(request)
                answer = await upstream.answer(request)
                await _trickle(client, answer.head.raw + answer.raw, hit.fault.seconds)
                return not (answer.head.is_closing or request.head.is_closing)
            case Kind.LATE:
                await upstream.pass_on(request)
                answer = await upstream.answer(request)
                await asyncio.sleep(hit.fault.seconds)
                await client.send(answer.head.raw + answer.raw)
                return not (answer.head.is_closing or request.head.is_closing)
        if hit.fault.kind in {Kind.ERROR_500, Kind.ERROR_503} and self._dice.random() < 0.5:
            await upstream.pass_on(request)
            await upstream.answer(request)
        await client.send(self._refusal(hit.fault.kind, request))
        return not request.head.is_closing

    async def _relay(
        self,
        request: _Request,
        client: _Client,
        upstream: _Upstream,
        *,
        content_type: bytes | None = None,
        most: int | None = None,
    ) -> bool:
        """Pass the answer on as it comes; `most`: at most so many bytes of its body, and never the last one."""
        head = await upstream.head()
        raw = head.raw
        if content_type is not None:
            extra = b"Content-Type: %b\r\n" % content_type
            raw = head.with_fields(without=frozenset({b"content-type"}), extra=extra)
        body = upstream.body(request, head)
        if most is not None:
            await client.send(raw[: len(raw) // 2] if body.is_done else raw)
            while most and not body.is_done:
                data = (await body.read()).raw
                data = data[: min(most, len(data) - body.is_done)]
                most -= len(data)
                await client.send(data)
            return False
        await client.send(raw)
        while not body.is_done:
            await client.send((await body.read()).raw)
        upstream.answered(head)
        is_delimited = request.is_head or _is_delimited(head)
        return is_delimited and not (head.is_closing or request.head.is_closing)

    async def _reset(self, request: _Request, client: _Client, upstream: _Upstream) -> bool:
        moment = self._dice.randrange(3)
        if moment > 0:
            await upstream.pass_on(request)
        if moment == 1:
            # Upstream may still be at work: a router that forgot the flow does not wait for it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._dice.uniform(0.0, _RESET_WITHIN)):
                    await upstream.answer(request)
        if moment == 2:
            await self._relay(request, client, upstream, most=self._dice.choice((0, 1, 100, 4_000)))
        client.reset()
        return False

    async def _truncate(self, request: _Request, client: _Client, upstream: _Upstream) -> bool:
        await upstream.pass_on(request)
        if self._dice.random() < 0.5:
            answer = await upstream.answer(request)
            if (cut := self._cut(answer.body)) is not None:
                await client.send(_reframed(answer.head, cut))
                return not (answer.head.is_closing or request.head.is_closing)
            framed = answer.head.raw + answer.raw
            await client.send(framed[: self._dice.randrange(1, len(framed))])
            return False
        await self._relay(request, client, upstream, most=self._dice.choice((0, 1, 100, 4_000)))
        return False

    def _cut(self, body: bytes) -> bytes | None:
        """The beginning of a JSON document; None when there is no part of it that is none itself."""
        if len(body) < 2:
            return None
        cut = body[: self._dice.randrange(1, len(body))]
        if not cut.strip():
            return None  # an empty answer means success
        try:
            json.loads(cut)
        except ValueError:
            return cut
        return None

    async def _garble(self, request: _Request, client: _Client, upstream: _Upstream) -> bool:
        noise = b"\xff" + self._dice.randbytes(self._dice.choice((1, 50, 5_000)))
        if self._dice.random() < 0.3:
            if self._dice.random() < 0.5:
                await upstream.pass_on(request)
                await upstream.answer(request)
            await client.send(noise)
            return False
        # A target's success is its status, whatever the body says: what failed must not become one.
        await upstream.pass_on(request)
        answer = await upstream.answer(request)
        await client.send(_reframed(answer.head, noise))
        return not (answer.head.is_closing or request.head.is_closing)

    def _refusal(self, kind: Kind, request: _Request) -> bytes:
        if not self._is_aws:
            status, text = _TARGET_REFUSALS[kind]
            extra = "Retry-After: 1\r\n" if kind is Kind.THROTTLE and self._dice.random() < 0.5 else ""
            return _message(status, "text/plain", text, extra)
        if kind in {Kind.ERROR_500, Kind.ERROR_503} and self._dice.random() < 0.3:
            return _message(int(kind[-3:]), "text/plain", "upstream connect error")
        return _aws_refusal(kind, request)


class _MalformedError(Exception):
    """What came is no HTTP/1.1 that the proxy speaks."""


# --- HTTP/1.1


def _bound(port: int) -> socket.socket:
    # With its protocol named: asyncio turns Nagle's algorithm off only for such, and accepted sockets inherit it.
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.setblocking(False)
    made.bind(("127.0.0.1", port))
    return made


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw[:-4].split(b"\r\n")
    if len(first.split(b" ", 2)) < 2:
        raise _MalformedError(repr(first[:100]))
    fields = {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    return _Head(raw, fields)


def _is_delimited(head: _Head) -> bool:
    """Whether the end of the body shows without the end of the connection."""
    if head.first[1] in {b"204", b"304"}:
        return True
    return b"content-length" in head.fields or b"chunked" in head.fields.get(b"transfer-encoding", b"").lower()


class _Body:
    """A body as it comes. `until_closed`: without a length it ends with the connection, else there is none."""

    def __init__(self, reader: asyncio.StreamReader, head: _Head, *, is_empty: bool, until_closed: bool) -> None:
        self._reader = reader
        self._is_chunked = b"chunked" in head.fields.get(b"transfer-encoding", b"").lower()
        length = head.fields.get(b"content-length")
        if length is not None and not length.isdigit():
            raise _MalformedError(repr(length[:100]))
        self._left = None if self._is_chunked or length is None else int(length)
        self.is_done = is_empty or self._left == 0 or not (self._is_chunked or length is not None or until_closed)
        """Nothing more follows."""

    async def read(self) -> _Piece:
        """The next piece of one that is not done."""
        if self._is_chunked:
            return await self._read_chunk()
        data = await self._reader.read(_BUFFER_BYTES if self._left is None else min(self._left, _BUFFER_BYTES))
        if self._left is None:
            self.is_done = not data
        elif data:
            self._left -= len(data)
            self.is_done = not self._left
        else:
            raise asyncio.IncompleteReadError(b"", self._left)
        return _Piece(data, data)

    async def read_all(self) -> _Piece:
        """All that is left, in one."""
        pieces = []
        while not self.is_done:
            pieces.append(await self.read())
        return _Piece(b"".join(piece.raw for piece in pieces), b"".join(piece.data for piece in pieces))

    async def _read_chunk(self) -> _Piece:
        line = await self._reader.readuntil(b"\r\n")
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            raise _MalformedError(repr(line[:100])) from None
        if size:
            data = await self._reader.readexactly(size + 2)
            return _Piece(line + data, data[:-2])
        trailer = b""
        while trailer != b"\r\n":
            trailer = await self._reader.readuntil(b"\r\n")
            line += trailer
        self.is_done = True
        return _Piece(line, b"")


async def _read_request(client: _Client) -> _Request:
    head = await _read_head(client.reader)
    client.is_idle = False
    raw = head.raw
    if head.fields.get(b"expect", b"").lower() == b"100-continue":
        await client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        raw = head.with_fields(without=frozenset({b"expect"}))
    framed, body = await _Body(client.reader, head, is_empty=False, until_closed=False).read_all()
    return _Request(head, raw + framed, body)


def _reframed(head: _Head, body: bytes) -> bytes:
    """An answer with another body."""
    framing = frozenset({b"content-length", b"transfer-encoding", b"content-encoding"})
    return head.with_fields(without=framing, extra=b"Content-Length: %d\r\n" % len(body)) + body


async def _trickle(client: _Client, data: bytes, seconds: float) -> None:
    """Send byte by byte, or in as many pieces as `seconds` have room for."""
    size = -(-len(data) // _SLOW_PIECES)
    pause = seconds * size / len(data)
    for start in range(0, len(data), size):
        await client.send(data[start : start + size])
        await asyncio.sleep(pause)


# --- refusals

_REASONS = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_TARGET_REFUSALS = {
    Kind.ERROR_500: (500, "broken"),
    Kind.ERROR_503: (503, "down"),
    Kind.THROTTLE: (429, "slower"),
    Kind.EXPIRED: (401, "who are you"),
}
_THROTTLES = {
    "Kinesis_20131202": (400, "ProvisionedThroughputExceededException"),
    "DynamoDBStreams_20120810": (400, "ThrottlingException"),
    "DynamoDB_20120810": (400, "ProvisionedThroughputExceededException"),
    "AmazonSQS": (400, "RequestThrottled"),
    "lambda": (429, "TooManyRequestsException"),
    "s3": (503, "SlowDown"),
    "query": (400, "Throttling"),
}
_EXPIRIES = {"AmazonSQS": 403, "lambda": 403, "query": 403}


def _service(request: _Request) -> str:
    """Which service a request is for: its target's prefix, or the protocol of those that send none."""
    if (target := request.head.fields.get(b"x-amz-target")) is not None:
        return target.decode("latin-1").partition(".")[0]
    if request.head.first[1].startswith(b"/2015-03-31/functions"):
        return "lambda"
    return "query" if b"Action=" in request.body else "s3"


def _aws_refusal(kind: Kind, request: _Request) -> bytes:
    service = _service(request)
    is_xml = service in {"query", "s3"}
    match kind:
        case Kind.THROTTLE:
            status, code = _THROTTLES.get(service, (400, "ThrottlingException"))
        case Kind.EXPIRED:
            status, code = _EXPIRIES.get(service, 400), "ExpiredToken" if is_xml else "ExpiredTokenException"
        case Kind.ERROR_500:
            status, code = 500, "InternalFailure"
        case _:
            status, code = 503, "ServiceUnavailable"
    said = f"{code} by the fault proxy"
    if is_xml:
        error = f"<Error><Code>{code}</Code><Message>{said}</Message></Error>"
        document = error if service == "s3" else f"<ErrorResponse>{error}<RequestId>0</RequestId></ErrorResponse>"
        return _message(status, "text/xml", document)
    extra = f"x-amzn-ErrorType: {code}\r\n" if service == "lambda" else ""
    if service == "AmazonSQS":
        extra = f"x-amzn-query-error: {code};{'Sender' if status < 500 else 'Receiver'}\r\n"
    return _message(status, "application/x-amz-json-1.0", json.dumps({"__type": code, "message": said}), extra)


def _message(status: int, content_type: str, text: str, extra: str = "") -> bytes:
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\nContent-Length: {len(text)}\r\n"
    return (head + extra + "\r\n" + text).encode()
