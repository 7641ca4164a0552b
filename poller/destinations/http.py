"""Failure records to a URL: one POST of the S3 form for each."""

import asyncio
import base64
import math
import ssl
from contextlib import suppress

import aiohttp
from yarl import URL

from poller import __version__
from poller.aws.lean import Body, describe, tcp_socket
from poller.core.model import Notice
from poller.core.notices import identity
from poller.errors import ConfigError, DestinationFailed

_CONNECT_TIMEOUT = 10.0
_KEEP_ALIVE = 1.5  # idle seconds; below the shortest default of common servers
_MISTAKE = "DestinationConfig.OnFailure.Destination: not a URL; http://HOST:PORT/PATH or https:// would be"


class HttpDestination:
    """A `Destination` behind `https://` or `http://`. Errors name scheme, host and port, never the rest of the URL."""

    limit: int | None = None

    def __init__(self, target: str, timeout: float) -> None:
        """`timeout`: seconds for all of one POST. ConfigError: not such a URL."""
        try:
            url = URL(target)
            port = url.port
            (url.host or "").encode("idna")  # asyncio does so too, and what it raises is no OSError
        except ValueError:
            raise ConfigError([_MISTAKE]) from None
        if url.scheme not in {"http", "https"} or not url.host or port is None:
            raise ConfigError([_MISTAKE])
        self._timeout = timeout
        self._url = url.with_user(None).with_fragment(None)
        self._where = f"{url.scheme}://{url.host_subcomponent}:{port}"
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": f"esm-poller/{__version__}",
            "Accept-Encoding": "identity",
        }
        if url.user is not None or url.password is not None:
            userinfo = base64.b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()
            self._headers["Authorization"] = f"Basic {userinfo}"
        self._session: aiohttp.ClientSession | None = None

    async def send(self, notice: Notice, body: bytes) -> None:
        """One POST. 2xx is taken, by its status alone: what the answer says is not read."""
        headers = {
            "Idempotency-Key": identity(notice),
            "X-Poller-Mapping": notice.mapping.id,
            "X-Poller-Request-Id": notice.request_id,
        }
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._connected().post(
                    self._url, data=Body(body), headers=headers, allow_redirects=False
                )
                response.release()  # a connection whose answer is not all there is closed, any other kept
        except TimeoutError:
            raise DestinationFailed(f"{self._where} did not take the record within {self._timeout:g} s") from None
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            raise DestinationFailed(f"{self._where}: {_why(error)}") from None
        status = response.status
        if 200 <= status < 300:
            return
        redirect = "; redirects are not followed, give the final URL" if 300 <= status < 400 else ""
        raise DestinationFailed(f"{self._where} answered {status}{redirect}", _retry_after(response))

    async def check(self) -> str | None:
        """Connects, over TLS if the URL says so, and sends no request."""
        try:
            async with asyncio.timeout(min(_CONNECT_TIMEOUT, self._timeout)):
                context = ssl.create_default_context() if self._url.scheme == "https" else None
                _, writer = await asyncio.open_connection(self._url.host, self._url.port, ssl=context)
        except (OSError, ssl.CertificateError) as error:
            return f"{self._where}: {_why(error)}"
        writer.transport.abort()  # nothing was said, so there is nothing to end in order
        with suppress(OSError):
            await writer.wait_closed()
        return None

    async def close(self) -> None:
        """Close every connection; a later `send` opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,
                    keepalive_timeout=_KEEP_ALIVE,
                    ssl=ssl.create_default_context() if self._url.scheme == "https" else True,
                    socket_factory=tcp_socket,
                ),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                # The time limit of the whole is ours.
                timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT, ceil_threshold=math.inf),
            )
        return self._session


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds; a date, which few send, is passed over: the caller backs off anyway."""
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isascii() and value.isdigit() and len(value) <= 9 else None


def _why(error: Exception) -> str:
    """What the network did, without a URL."""
    match error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as cause):
            return f"TLS failed: {cause.verify_message}"
        case ssl.SSLCertVerificationError():
            return f"TLS failed: {error.verify_message}"
        case aiohttp.ClientConnectorError(os_error=cause):
            return f"no connection: {describe(cause)}"
        case aiohttp.ServerDisconnectedError():
            return "closed the connection instead of answering"
        case aiohttp.ClientResponseError() | aiohttp.http.HttpProcessingError():
            return "did not answer in HTTP"
        case _:
            return describe(error)
