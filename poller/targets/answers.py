"""What both kinds of target share: `Retry-After`, connections that were closed meanwhile, words for a failed one."""

import asyncio
import os
import socket
import ssl
from email.utils import parsedate_to_datetime

import aiohttp


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds of a `Retry-After` header, a number or an HTTP date; None when it says nothing that lies ahead."""
    if not value:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        # Ten digits are three hundred years; more would only overflow.
        return float(value[:10])
    try:
        seconds = parsedate_to_datetime(value).timestamp() - now
    except (ValueError, OverflowError):
        return None
    return seconds if seconds > 0 else None


async def notice_closed() -> None:
    """Let the loop read what idle connections have got, so that the pool does not hand out a closed one.

    A request that meets a close which already waits in the socket would be lost, and nobody could tell that from one
    that was lost while it ran. The first turn of the loop finds the close, the second comes after it was handled.
    """
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def why_no_connection(error: BaseException) -> str:
    """Why there is no connection, in words without an address, a URL or a traceback."""
    match error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=cause):
            return why_no_connection(cause)
        case aiohttp.ClientConnectorError(os_error=cause):
            return why_no_connection(cause)
        case ssl.SSLCertVerificationError(verify_message=str(message)):
            return f"TLS failed: {message}"
        case ssl.SSLError(reason=reason):
            return f"TLS failed: {(reason or 'handshake broken').replace('_', ' ').lower()}"
        case TimeoutError():
            return "timed out"
        case socket.gaierror():
            return "its name did not resolve"
        case OSError(errno=int(number)):
            return os.strerror(number).lower()
        case ConnectionError():
            return "closed while it was made"
        case _:
            return "no connection"
