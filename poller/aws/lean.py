"""The hot AWS calls without botocore's serializers and parsers: signed as botocore does, sent by aiohttp.

Endpoint, signing name and credentials come from an aiobotocore client and session, so FIPS, dual-stack, partitions,
custom endpoints and every credential provider work as they do for cold calls. Only what a poller calls all the time
goes through here: GetRecords, GetShardIterator, SubscribeToShard, ReceiveMessage, DeleteMessageBatch,
ChangeMessageVisibilityBatch and Invoke.
"""

import asyncio
import errno
import re
import socket
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import aiohttp
import msgspec
from aiohttp.abc import AbstractStreamWriter
from botocore.credentials import ReadOnlyCredentials
from multidict import istr
from yarl import URL

from poller.aws.signer import sign
from poller.errors import PollerError, SourceUnavailable

MAX_ANSWER_BYTES = 64 * 1024 * 1024  # six times the largest answer that AWS documents
CONNECT_TIMEOUT = 10.0
EXPIRED_TOKEN_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})

_JSON_VERSIONS = {"kinesis": "1.1", "dynamodb": "1.0", "dynamodbstreams": "1.0", "sqs": "1.0"}
_READ_BUFFER_BYTES = 256 * 1024
_WRITE_BYTES = 256 * 1024
_READS = 1_024  # at once
_ACCESS_KEY = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")
_CONTENT_TYPE, _TARGET = istr("Content-Type"), istr("X-Amz-Target")  # aiohttp is spared reading their case
_CLOSED = (errno.ECONNRESET, errno.EPIPE)
_USERINFO = re.compile(r"//[^/@\s]*@")

T = TypeVar("T")


class AwsError(PollerError):
    """A modelled error answer. `code` is AWS's without a namespace, or `HTTP<status>` when the answer named none."""

    def __init__(self, code: str, status: int, message: str) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.code = code
        self.status = status
        self.message = message


class LeanAnswer(NamedTuple):
    """What came back, whatever the status. Header names are looked up without regard to case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Credentials(Protocol):
    """Where signing keys come from."""

    async def frozen(self) -> ReadOnlyCredentials:
        """Keys that are good now, refreshed when due. AccessDenied when there are none, SourceUnavailable."""
        ...

    def reject(self) -> None:
        """AWS calls them expired: load them anew before the next call."""
        ...


class Body(aiohttp.Payload):
    """Bytes, sent as they are. aiohttp's own class warns above 1 MiB; an event may have 6."""

    _autoclose = True

    def __init__(self, value: bytes) -> None:
        super().__init__(value)
        self._size = len(value)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The bytes as text."""
        return str(self._value, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """After the headers; a large body in pieces, for the transport copies what the socket does not take at once."""
        size = len(self._value)
        if size <= _WRITE_BYTES:
            await writer.write(self._value)
            return
        view = memoryview(self._value)
        for start in range(0, size, _WRITE_BYTES):
            await writer.write(view[start : start + _WRITE_BYTES])


def tcp_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket with TCP keep-alive: a function may think for 15 minutes, middleboxes forget a silent flow sooner."""
    family, kind, protocol = address[:3]
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 45)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    return made


def safe_text(text: str) -> str:
    """The first line of a foreign text, short, without access keys and URL userinfo.

    Only the first line, because AWS's SignatureDoesNotMatch goes on with the canonical request, session token included.
    """
    line = text.strip().partition("\n")[0]
    # Cut off last: half a key or password is not recognised.
    return _USERINFO.sub("//", _ACCESS_KEY.sub("***", line))[:300]


def parse_error(status: int, headers: Mapping[str, str], body: bytes) -> AwsError:
    """An AwsError of any answer that is no success. Understands what AWS, its proxies and the emulators send."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        document = None
    members: dict[str, Any] = document if isinstance(document, dict) else {}
    # In this order: the JSON protocols, the REST protocols, SQS's name from the days of XML, API Gateway style.
    candidates = (
        members.get("__type"),
        headers.get("x-amzn-errortype"),
        (headers.get("x-amzn-query-error") or "").partition(";")[0],
        members.get("code"),
        members.get("Code"),
    )
    raw = next((text for text in candidates if isinstance(text, str) and text), "")
    # `com.amazonaws.sqs#QueueDoesNotExist`, `ResourceNotFoundException:http://internal.amazon.com/...`
    code = raw.rpartition("#")[2].partition(":")[0].strip() or f"HTTP{status}"
    message = next((text for name in ("message", "Message") if isinstance(text := members.get(name), str)), "")
    return AwsError(safe_text(code), status, safe_text(message))


def parse(decoder: "msgspec.json.Decoder[T]", body: bytes, what: str) -> T:
    """The typed answer. A body that is cut off or of another shape is SourceUnavailable, never an empty answer."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SourceUnavailable(f"{what}: the answer cannot be read ({safe_text(str(error))})") from None


def describe(error: Exception) -> str:
    """Why a request got no answer, in words that hold no URL and no credentials."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError):
        return safe_text(error.strerror or type(error).__name__)
    return type(error).__name__


class LeanClient:
    """One service in one region. May be used by any number of tasks; `AwsClients` owns the connections.

    `reads`: whoever polls by the thousand takes it around a call, first come first served. Without it every call would
    wait for one of the pool's connections instead, where its timeout runs already.
    """

    def __init__(
        self,
        *,
        service: str,
        endpoint: str,
        signing_name: str,
        signing_region: str,
        credentials: Credentials,
        http: aiohttp.ClientSession,
        proxy: str | None = None,
    ) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._root = self._endpoint + "/", URL(self._endpoint + "/", encoded=True)
        self._signing_name = signing_name
        self._signing_region = signing_region
        self._credentials = credentials
        self._http = http
        self._proxy = proxy
        self._content_type = f"application/x-amz-json-{_JSON_VERSIONS.get(service, '1.0')}"
        self.reads = asyncio.Semaphore(_READS)

    async def call(self, target: str, body: bytes, timeout: float) -> bytes:  # noqa: ASYNC109
        """The body of a 200 answer to `target`, e.g. `Kinesis_20131202.GetRecords`; the caller parses it.

        AwsError for any other answer. SourceUnavailable when none came within `timeout` seconds or it was broken.
        AccessDenied when there are no credentials. A call whose connection broke before an answer began is repeated
        once at once, because the server may just have closed an idle one; what goes through here may be repeated.
        """
        headers: dict[str, str] = {_CONTENT_TYPE: self._content_type, _TARGET: target}
        limits = _limits(timeout)
        try:
            try:
                answer = await self._take(await self._open("POST", *self._root, headers, body, limits))
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as error:
                if not _was_idle(error):
                    raise
                answer = await self._take(await self._open("POST", *self._root, headers, body, limits))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise SourceUnavailable(f"{target.rpartition('.')[2]}: {describe(error)}") from None
        if answer.status != 200:
            raise parse_error(answer.status, answer.headers, answer.body)
        return answer.body

    async def request(  # noqa: PLR0917
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        timeout: float,  # noqa: ASYNC109
        connect_timeout: float,
    ) -> LeanAnswer:
        """Any answer to a signed request. `path` is percent-encoded and may have a query.

        aiohttp's errors and TimeoutError pass through: ClientConnectorError and ConnectionTimeoutError mean that
        nothing was sent. SourceUnavailable and AccessDenied mean that there are no credentials
        and nothing was sent either.
        """
        limits = aiohttp.ClientTimeout(total=timeout, connect=connect_timeout)
        url = self._endpoint + path
        return await self._take(await self._open(method, url, URL(url, encoded=True), dict(headers), body, limits))

    async def stream(self, target: str, body: bytes, timeout: float) -> aiohttp.ClientResponse:  # noqa: ASYNC109
        """A 200 answer to `target` whose body goes on for as long as the service likes; the caller closes it.

        `timeout`: seconds until it begins. Errors and the one repeat as in `call`.
        """
        headers: dict[str, str] = {_CONTENT_TYPE: self._content_type, _TARGET: target}
        limits = aiohttp.ClientTimeout(total=None, connect=min(timeout, CONNECT_TIMEOUT))
        try:
            async with asyncio.timeout(timeout):
                try:
                    response = await self._open("POST", *self._root, headers, body, limits)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as error:
                    if not _was_idle(error):
                        raise
                    response = await self._open("POST", *self._root, headers, body, limits)
                if response.status == 200:
                    return response
                answer = await self._take(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise SourceUnavailable(f"{target.rpartition('.')[2]}: {describe(error)}") from None
        raise parse_error(answer.status, answer.headers, answer.body)

    async def _open(  # noqa: PLR0917
        self, method: str, url: str, parsed: URL, headers: dict[str, str], body: bytes, limits: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        """The head of an answer; its body is still to come. `parsed` is the URL too; `headers` take the signature."""
        keys = await self._credentials.frozen()
        sign(keys, self._signing_name, self._signing_region, method, url, headers, body)
        return await self._http.request(
            method,
            parsed,
            data=Body(body),
            headers=headers,
            allow_redirects=False,
            proxy=self._proxy,
            timeout=limits,
            read_bufsize=_READ_BUFFER_BYTES,
        )

    async def _take(self, response: aiohttp.ClientResponse) -> LeanAnswer:
        """The whole answer; its connection goes back, or is closed when the body cannot be read to its end."""
        async with response:
            answer = LeanAnswer(response.status, response.headers, await _read(response))
        if answer.status in (400, 401, 403) and parse_error(*answer).code in EXPIRED_TOKEN_CODES:
            self._credentials.reject()
        return answer


@lru_cache(maxsize=64)
def _limits(timeout: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=timeout, connect=min(timeout, CONNECT_TIMEOUT))


def _was_idle(error: Exception) -> bool:
    """How a request on a kept-alive connection ends that the server had closed: no byte of an answer came."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return False
    return not isinstance(error, OSError) or error.errno in _CLOSED or isinstance(error, ConnectionError)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, at most MAX_ANSWER_BYTES of it; a longer one is a ClientPayloadError and closes the connection."""
    chunks: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            response.close()
            raise aiohttp.ClientPayloadError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
