"""Functions behind a URL: one POST for each invocation, as interface.md "HTTP targets" has it."""

import asyncio
import base64
import json
import math
import re
import ssl
from contextlib import suppress
from typing import Any, Final

import aiohttp
from multidict import istr
from yarl import URL

from poller import __version__
from poller.aws.lean import EXPIRED_TOKEN_CODES, Body, Credentials, parse_error, tcp_socket
from poller.aws.signer import sign
from poller.core.model import MAX_PAYLOAD_BYTES, Invocation, Reply, ReplyStatus
from poller.errors import ConfigError, PollerError
from poller.ports import Clock
from poller.settings import BasicAuth, BearerAuth, HttpFunction, SigV4Auth, TlsSettings, is_reserved_header
from poller.targets.answers import notice_closed, retry_after, why_no_connection

MAX_ANSWER_BYTES: Final = MAX_PAYLOAD_BYTES

# Getting a connection may take this long, and never more than this share of the function's own timeout, so that
# "never sent" (not counted) and "no answer" (counted) are told apart by which of the two ends first.
_CONNECT_TIMEOUT: Final = 10.0
_CONNECT_SHARE: Final = 0.9

# A kept connection is not used again after this much idleness. It is below the shortest default of common servers
# (gunicorn 2 s; Node, uvicorn and Apache 5 s), because a request that meets their close cannot be told from one that
# was lost while it ran, and counts as a failed attempt.
_KEEP_ALIVE: Final = 1.5

_MAPPING: Final = istr("X-Poller-Mapping")
_REQUEST_ID: Final = istr("X-Poller-Request-Id")
_ATTEMPT: Final = istr("X-Poller-Attempt")
_KEY: Final = istr("Idempotency-Key")
_DEADLINE: Final = istr("X-Poller-Deadline-Ms")
_XRAY: Final = istr("X-Amzn-Trace-Id")
_TRACE_PARENT: Final = istr("traceparent")
_TRACE_STATE: Final = istr("tracestate")
_AUTHORIZATION: Final = istr("Authorization")
_FUNCTION_ERROR: Final = "X-Amz-Function-Error"

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 token
_EXACT_URL: Final = re.compile(r"[!#-;=?-\[\]_a-z~]+")  # printable ASCII that needs no quoting


class HttpTarget:
    """A `Target` that posts the payload to a URL. Must be made, used and closed inside one running event loop.

    It holds its own connection pool, so one slow function never takes another's connections.
    """

    def __init__(self, settings: HttpFunction, region: str, credentials: Credentials, clock: Clock) -> None:
        """ConfigError: the URL, a header or a TLS file is unusable. Region and credentials are for sigv4."""
        self.capacity = 1 if settings.protocol == "rie" else settings.max_concurrency
        self.timeout = settings.timeout
        self._clock = clock
        self._sigv4 = settings.auth if isinstance(settings.auth, SigV4Auth) else None
        self._region = region
        self._credentials = credentials
        self._is_rie = settings.protocol == "rie"
        place = f"functions.{settings.name}"
        self._url, userinfo = _parse(settings.url, place)
        # Without the path: webhooks carry their secret there.
        self._where = f"{self._url.scheme}://{self._url.host_subcomponent}:{self._url.port}"
        self._constant = _constant_headers(settings, userinfo, place)
        self._ssl = _ssl_context(settings.tls, place) if self._url.scheme == "https" else None
        self._connect_timeout = min(_CONNECT_TIMEOUT, settings.timeout * _CONNECT_SHARE)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self.capacity or 0,
                keepalive_timeout=_KEEP_ALIVE,
                ssl=self._ssl or True,
                socket_factory=tcp_socket,
            ),
            headers=self._constant,
            cookie_jar=aiohttp.DummyCookieJar(),
            # Never rounded up to whole seconds; the deadline of the answer is ours (see `invoke`).
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout, ceil_threshold=math.inf),
        )

    async def invoke(self, invocation: Invocation) -> Reply:
        """One POST. Never raises for what the network or the function does; a cancelled call closes its connection."""
        headers: dict[str, str] = {
            _MAPPING: invocation.mapping,
            _REQUEST_ID: invocation.request_id,
            _ATTEMPT: str(invocation.attempt),
            _KEY: invocation.key,
        }
        xray, parent, state = invocation.trace
        # It comes with a record, so from anybody: what would break the header is not passed on.
        if xray and xray.isascii() and xray.isprintable():
            headers[_XRAY] = xray
        if parent:
            headers[_TRACE_PARENT] = parent
            if state:
                headers[_TRACE_STATE] = state
        if self._sigv4 is not None:
            try:
                async with asyncio.timeout(self._connect_timeout):
                    keys = await self._credentials.frozen()
            except TimeoutError:
                return self._unreachable(f"no AWS credentials to sign with within {self._connect_timeout:g} s")
            except PollerError as error:
                return self._unreachable(f"cannot sign: {error}")
            headers = {**self._constant, **headers}
            region = self._sigv4.region or self._region
            sign(keys, self._sigv4.service, region, "POST", str(self._url), headers, invocation.payload)
        await notice_closed()
        deadline = self._clock.now() + self.timeout
        headers[_DEADLINE] = str(int(deadline * 1000))
        try:
            async with asyncio.timeout_at(self._clock.loop(deadline)):
                response = await self._session.post(
                    self._url, data=Body(invocation.payload), headers=headers, allow_redirects=False
                )
                try:
                    return await self._judge(response)
                finally:
                    response.close()  # nothing to do once the answer was read: then its connection is in the pool
        except aiohttp.ConnectionTimeoutError:
            return self._unreachable(f"no connection within {self._connect_timeout:g} s")
        except (aiohttp.ClientConnectorError, aiohttp.ClientConnectorCertificateError) as error:
            return self._unreachable(why_no_connection(error))
        except TimeoutError:
            return Reply(ReplyStatus.TIMEOUT, error=f"{self._where} did not answer within {self.timeout:g} s")
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            return Reply(ReplyStatus.FUNCTION_ERROR, error=f"{self._where} {_broken(error)}")

    async def check(self) -> str | None:
        """Connects, over TLS if the URL says so, and sends no request."""
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, writer = await asyncio.open_connection(self._url.host, self._url.port, ssl=self._ssl)
        except TimeoutError:
            return f"{self._where}: no connection within {self._connect_timeout:g} s"
        except OSError as error:
            return f"{self._where}: {why_no_connection(error)}"
        writer.transport.abort()  # nothing was said, so there is nothing to end in order
        with suppress(OSError):
            await writer.wait_closed()
        return None

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()

    async def _judge(self, response: aiohttp.ClientResponse) -> Reply:
        """The answer table of interface.md. Raises what the network does to the body."""
        status = response.status
        answered = f"{self._where} answered {status}"
        if status in {429, 503}:  # known before the body is, which may be slow or broken
            seconds = retry_after(response.headers.get("Retry-After"), self._clock.now())
            return Reply(ReplyStatus.THROTTLED, error=answered, status_code=status, retry_after=seconds)
        if status == 413:
            return Reply(ReplyStatus.TOO_LARGE, error=f"{answered}: the event is too large", status_code=status)
        body = await _read(response)
        if body is None:
            error = f"{answered} with more than {MAX_ANSWER_BYTES} bytes"
            return Reply(ReplyStatus.FUNCTION_ERROR, error=error, status_code=status)
        if (
            status in {401, 403}
            and self._sigv4 is not None
            and parse_error(status, response.headers, body).code in EXPIRED_TOKEN_CODES
        ):
            self._credentials.reject()
        if 200 <= status < 300:
            if _FUNCTION_ERROR in response.headers:
                fault: str | None = f"with {_FUNCTION_ERROR}"
            else:
                fault = _rie_fault(body) if self._is_rie else None
            if fault is None:
                return Reply(ReplyStatus.OK, body, status_code=status)
            error = f"{answered} {fault}"
        elif 300 <= status < 400:
            error = f"{answered}; redirects are not followed"
        else:
            error = answered
        return Reply(ReplyStatus.FUNCTION_ERROR, body, error, status)

    def _unreachable(self, reason: str) -> Reply:
        return Reply(ReplyStatus.UNREACHABLE, error=f"{self._where}: {reason}")


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """The whole body, None as soon as it is over the limit. What counts is its length after decompression."""
    if (response.content_length or 0) > MAX_ANSWER_BYTES:
        return None
    chunks = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def _rie_fault(body: bytes) -> str | None:
    """What the Runtime Interface Emulator's 200 hides (semantics 13.1); None when the function has answered."""
    if not body:
        return "with an empty body: the function has crashed"
    if b'"errorType"' not in body and b"Task timed out after" not in body:
        return None
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        # The emulator's own text, not JSON. In a JSON answer the same words are the function's.
        return "that the task timed out" if b"Task timed out after" in body else None
    if isinstance(answer, dict) and "errorType" in answer and "errorMessage" in answer:
        return "with an error object"
    return None


def _parse(text: str, place: str) -> tuple[URL, str | None]:
    """The URL without userinfo and fragment, and the userinfo as the value of a Basic Authorization header."""
    try:
        # What needs no quoting is sent exactly as it was written.
        url = URL(text, encoded=_EXACT_URL.fullmatch(text) is not None)
        port = url.port
    except ValueError:
        raise ConfigError([f"{place}.url: not a URL; http://HOST:PORT/PATH or https:// would be"]) from None
    if url.scheme not in {"http", "https"} or not url.host or port is None:
        raise ConfigError([f"{place}.url: not a URL; http://HOST:PORT/PATH or https:// would be"])
    userinfo = None
    if url.user is not None or url.password is not None:
        userinfo = _basic(url.user or "", url.password or "")
    return url.with_user(None).with_fragment(None), userinfo


def _constant_headers(settings: HttpFunction, userinfo: str | None, place: str) -> dict[str, str]:
    """What is the same in every request. `auth` outranks an Authorization header, which outranks the URL's userinfo."""
    headers: dict[str, str] = {
        istr("Content-Type"): "application/json",
        istr("User-Agent"): f"esm-poller/{__version__}",
        istr("Accept"): "*/*",
        istr("Accept-Encoding"): "identity",  # answers are small, and a compressed one may be a bomb
    }
    names = {name.lower(): name for name in headers}
    if userinfo is not None:
        headers[_AUTHORIZATION] = userinfo
    names["authorization"] = _AUTHORIZATION
    mistakes = []
    for name, value in settings.headers:
        if _HEADER_NAME.fullmatch(name) is None:
            mistakes.append(f"{place}.headers.{name!r}: not the name of an HTTP header")
        elif is_reserved_header(name):
            mistakes.append(f"{place}.headers.{name}: set by the poller itself; leave it out")
        elif not _is_header_value(value):
            mistakes.append(f"{place}.headers.{name}: its value has a line break or another control character")
        else:
            headers[names.setdefault(name.lower(), istr(name))] = value
    match settings.auth:
        case BearerAuth(token):
            headers[_AUTHORIZATION] = f"Bearer {token}"
            if not _is_header_value(token):
                mistakes.append(f"{place}.auth.token: it has a line break or another control character")
        case BasicAuth(username, password):
            headers[_AUTHORIZATION] = _basic(username, password)
        case SigV4Auth():
            headers.pop(_AUTHORIZATION, None)
        case None:
            pass
    if mistakes:
        raise ConfigError(mistakes)
    return headers


def _basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def _is_header_value(value: str) -> bool:
    return all(char == "\t" or (char >= " " and char != "\x7f") for char in value)


def _ssl_context(tls: TlsSettings | None, place: str) -> ssl.SSLContext:
    """Verifies certificate and host name. ConfigError names the file's key."""
    if tls is None:
        return ssl.create_default_context()
    try:
        context = ssl.create_default_context(cafile=tls.ca)
    except OSError as error:
        raise ConfigError([f"{place}.tls.ca: {tls.ca}: {why_no_connection(error)}"]) from None
    if tls.cert is not None:
        try:
            # Without a password callback OpenSSL would ask for one on the terminal.
            context.load_cert_chain(tls.cert, tls.key, password="")
        except OSError as error:
            raise ConfigError([f"{place}.tls.cert, key: {tls.cert}: {why_no_connection(error)}"]) from None
    return context


def _broken(error: Exception) -> str:
    match error:
        case aiohttp.ClientResponseError() | aiohttp.http.HttpProcessingError():
            return "did not answer in HTTP"
        case aiohttp.ClientPayloadError():
            return "broke off in the middle of its answer"
        case _:
            return "closed the connection instead of answering"
