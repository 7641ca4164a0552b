"""What clients send to the HTTP server: mapping API, tags, verbs, status, credentials.

A document is a whole HTTP request. aiohttp takes it apart, as it does on a socket; from there on everything is ours: the
doors, the signature, the handlers, the control plane over a store in memory.
"""

import asyncio
import base64
import json
import random
import re
from contextlib import suppress
from functools import cache
from typing import Any
from unittest.mock import Mock

import msgspec
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser

from poller.control import ControlPlane
from poller.errors import ApiError
from poller.mappings import normalize
from poller.server import Server
from poller.server.api import MAX_BODY_BYTES
from poller.settings import AccessKeys, BearerAuth, Declared, ServerSettings
from poller.stores.memory import MemoryStore
from poller.telemetry import Metrics
from tests.fuzz.kit import MARKER, Target, run, silent
from tests.fuzz.streams import Clock
from tests.unit.test_control import DECLARED, Probe, Supervisor, settings

NOW = 1_780_000_000.0  # when the signed requests of the corpus were signed
SIGNATURES = (
    "ff42c3abae9fa70f5ca9ce0900c11808a17a2cbdd24eeae764047ae283741ccd",
    "f69d26f752cccff16393d8bff477bf847531660d1221689e884a16bde886c383",
)
TOKEN = "bearer-" + MARKER
SECRET = "secret-" + MARKER
KEY = "AKFUZZ"
_UUID = "0b0e8a54-7a53-4b9e-9d1c-2f7a8c3c5d11"
_CONNECTION = Mock(transport=None, ssl_context=None, peername=("127.0.0.1", 1), sockname=None)
_MADE = {"EventSourceArn": "arn:aws:sqs:eu-west-1:123456789012:made", "FunctionName": "f"}


class _Supervised(Supervisor):
    def status(self) -> list[Any]:
        return []

    def dead(self) -> list[str]:
        return []

    def unready(self) -> list[str]:
        return []


class _Control:
    """The control plane of the input in work."""

    plane: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plane, name)


class _Daemon:
    """A server without sockets."""

    def __init__(self, auth: tuple[Any, ...]) -> None:
        self._control = _Control()
        clock = Clock()
        self._server = Server(
            ServerSettings(auth=auth),
            self._control,
            Metrics(clock, list),
            clock,
            random.Random(1),
            wall=lambda: NOW,
        )
        self._is_set_up = False

    async def answer(self, head: Any, payload: Any) -> web.Response:
        if not self._is_set_up:
            await self._server._runner.setup()
            self._is_set_up = True
        store = MemoryStore()
        await store.put_document(f"mapping/{_UUID}", {"document": normalize(_MADE), "modified": NOW})
        plane = self._control.plane = ControlPlane(store, _Supervised(), Probe())
        await plane.load(settings(Declared("0a1b2c3d-0000-4000-8000-000000000001", DECLARED, 3)))
        app = self._server._runner.app
        loop = asyncio.get_running_loop()
        request = web.Request(
            head, payload, _CONNECTION, _CONNECTION, _CONNECTION, loop, client_max_size=MAX_BODY_BYTES
        )
        return await app._handle(request)  # type: ignore[no-any-return]


@cache
def _daemon(is_locked: bool) -> _Daemon:
    return _Daemon((BearerAuth(TOKEN), AccessKeys(((KEY, SECRET),))) if is_locked else ())


async def _ask(document: bytes, *, is_locked: bool) -> web.Response | None:
    """None: it is no HTTP request, and aiohttp's to answer."""
    loop = asyncio.get_running_loop()
    protocol = BaseProtocol(loop)
    parser = HttpRequestParser(protocol, loop, 2**16)
    try:
        messages, _, _ = parser.feed_data(document)
    except (HttpProcessingError, ValueError):
        return None
    if not messages:
        return None
    head, payload = messages[0]
    with suppress(HttpProcessingError, ValueError):
        parser.feed_eof()  # a body that has not ended is cut off
    if not payload.is_eof() and payload.exception() is None:
        payload.set_exception(web.RequestPayloadError("cut off"))
    try:
        return await _daemon(is_locked).answer(head, payload)
    except web.HTTPException as answer:
        return answer


def _check(response: web.Response, document: bytes) -> None:
    """An answer of ours, with no secret in it but what came in anew; what is refused is refused in AWS's form."""
    assert response.status < 500, response.text
    response.headers["x-amzn-RequestId"]
    text = response.text or ""
    text.encode()
    lines = document.split(b"\n")
    given = b"\n".join(line for line in lines if not line.lower().startswith(b"authorization:"))
    if not any(word in given for word in (MARKER.encode(), b"%", b"\\u")):
        assert MARKER not in text
        assert all(MARKER not in value for value in response.headers.values())
    if "x-amzn-ErrorType" in response.headers:
        body = json.loads(text)
        assert isinstance(body.get("message", body.get("Message")), str)


def unlocked(document: bytes) -> None:
    """A server on loopback without credentials."""
    if (response := run(_ask(document, is_locked=False))) is not None:
        _check(response, document)


def _is_somebody(document: bytes) -> bool:
    """Does it hold a token, a signature of the corpus, or a password that is a token, whoever the user is?"""
    known = [word.encode() for word in (TOKEN, *SIGNATURES)]
    for encoded in re.findall(rb"(?i:basic)\s+([A-Za-z0-9+/]+=*)", document):
        with suppress(ValueError):
            document += base64.b64decode(encoded)
    return any(word in document for word in known)


def locked(document: bytes) -> None:
    """A server with tokens and access keys: what is closed stays closed."""
    response = run(_ask(document, is_locked=True))
    if response is None:
        return
    _check(response, document)
    first = document.lstrip().partition(b"\n")[0]
    is_open = any(name in first for name in (b"metrics", b"healthz", b"readyz", b"%"))
    if response.status < 400 and not is_open:
        assert _is_somebody(document), f"{response.status} for nobody"


def _refused(error: ApiError, document: bytes) -> None:
    assert 400 <= error.status < 500
    silent(error, document)


def create(document: bytes) -> None:
    """A CreateEventSourceMapping or UpdateEventSourceMapping document alone, twice in one control plane."""
    try:
        found = msgspec.json.decode(document)  # as the server does: no half pairs of surrogates, no NaN
    except (ValueError, RecursionError):
        return
    if not isinstance(found, dict):
        return

    async def both() -> None:
        plane = ControlPlane(MemoryStore(), _Supervised(), Probe())
        await plane.load(settings())
        try:
            made = await plane.create(found)
        except ApiError as error:
            _refused(error, document)
            made = await plane.create(_MADE)
        uuid = made["UUID"]
        json.dumps(made, allow_nan=False)
        try:
            changed = await plane.update(uuid, found)
            json.dumps(changed, allow_nan=False)
        except ApiError as error:
            _refused(error, document)
        try:
            await plane.seek(uuid, found, "x")
        except ApiError as error:
            _refused(error, document)
        for listed in plane.list():
            json.dumps(listed, allow_nan=False)

    run(both())


TARGET = Target("requests", {"open": unlocked, "locked": locked, "document": create})
