"""AWS Signature Version 4, as botocore's `SigV4Auth` makes it and at a fifth of its cost: hot calls sign all the time.

What repeats is kept: the signing key of a day, the text of a second, the host and path of a URL.
"""

import hmac
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from urllib.parse import quote, urlsplit

from botocore.auth import SIGNED_HEADERS_BLACKLIST
from botocore.credentials import ReadOnlyCredentials
from botocore.utils import normalize_url_path
from multidict import istr

from poller.clock import wall_clock

_UNSIGNED = frozenset({*SIGNED_HEADERS_BLACKLIST, "authorization"})  # that of a first try, too
_DEFAULT_PORTS = {"http": 80, "https": 443}
_DATE, _TOKEN, _AUTHORIZATION = istr("X-Amz-Date"), istr("X-Amz-Security-Token"), istr("Authorization")
_EMPTY = sha256(b"").hexdigest()


def sign(  # noqa: PLR0917
    credentials: ReadOnlyCredentials,
    service: str,
    region: str,
    method: str,
    url: str,
    headers: dict[str, str],
    body: bytes,
) -> None:
    """Add X-Amz-Date, X-Amz-Security-Token and Authorization to the headers of a request.

    `url` is percent-encoded as it is sent. Every header that is there is signed, but for those that proxies change.
    """
    stamp = _stamp(int(wall_clock()))
    headers[_DATE] = stamp
    if credentials.token:
        headers[_TOKEN] = credentials.token
    else:
        headers.pop(_TOKEN, None)
    host, path, query = _parts(url)
    canonical = {"host": host}
    for name, value in headers.items():
        lower = name.lower()
        if lower not in _UNSIGNED:
            canonical[lower] = " ".join(value.split())
    names = sorted(canonical)
    signed = ";".join(names)
    lines = "\n".join([f"{name}:{canonical[name]}" for name in names])
    digest = sha256(body).hexdigest() if body else _EMPTY
    request = f"{method}\n{path}\n{query}\n{lines}\n\n{signed}\n{digest}"
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{sha256(request.encode()).hexdigest()}"
    signature = hmac.digest(_key(credentials.secret_key, stamp[:8], region, service), text.encode(), "sha256").hex()
    headers[_AUTHORIZATION] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
    )


@lru_cache(maxsize=1)
def _stamp(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y%m%dT%H%M%SZ")


@lru_cache(maxsize=256)
def _key(secret: str, day: str, region: str, service: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for step in (day, region, service, "aws4_request"):
        key = hmac.digest(key, step.encode(), "sha256")
    return key


@lru_cache(maxsize=1_024)
def _parts(url: str) -> tuple[str, str, str]:
    """Host, path and query in canonical form."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if ":" in host:
        host = f"[{host}]"
    if parts.port is not None and parts.port != _DEFAULT_PORTS.get(parts.scheme):
        host = f"{host}:{parts.port}"
    pairs = sorted((name, value) for name, _, value in (pair.partition("=") for pair in parts.query.split("&")))
    query = "&".join([f"{name}={value}" for name, value in pairs]) if parts.query else ""
    return host, quote(normalize_url_path(parts.path), safe="/~"), query
