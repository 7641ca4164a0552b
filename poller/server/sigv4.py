"""AWS Signature Version 4, verified: who signed this request, or AWS's answer why nobody did.

botocore makes the canonical request, the string to sign and the signature; here is what a verifier has to ask besides.
Order and texts of the checks are those that AWS's services were observed to have (IAM user guide, "Troubleshoot signed
requests"). Where a client has a choice, this is what is taken:

* the signature stands in the Authorization header; a presigned URL is refused, it would leave a credential in logs;
* the hash of the body is always computed, so `UNSIGNED-PAYLOAD` or a wrong `X-Amz-Content-SHA256` does not match;
* any Region, but only the service `lambda`; `host` must be signed;
* no session token: the configured keys have none, and AWS too refuses a token that does not belong to the key.

As with AWS, a request that was overheard can be sent again for as long as its date is good.
"""

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.auth import SigV4Auth
from botocore.compat import HTTPHeaders
from botocore.credentials import ReadOnlyCredentials
from multidict import MultiMapping

from poller.errors import ApiError

ALGORITHM = "AWS4-HMAC-SHA256"
SERVICE = "lambda"
MAX_SKEW = timedelta(minutes=5)

_BASIC = "%Y%m%dT%H%M%SZ"
_BASIC_FORM = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_TERMINATOR = "aws4_request"
_NOBODY = "no secret of anybody"  # so an unknown id costs what a known one costs
INVALID_TOKEN = "The security token included in the request is invalid."  # noqa: S105 - AWS's text
_MISMATCH = (
    "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key "
    "and signing method. Consult the service documentation for details."
)


class Unauthorized(ApiError):  # noqa: N818
    """The request does not show that it comes from who may send it. Carries AWS's answer to that."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, 403, message)


@dataclass(frozen=True, slots=True)
class Signed:
    """A signed request whose date and scope are good; whether its signature is, `signer` says once the body is here."""

    access_key: str
    region: str
    at: str
    names: tuple[str, ...]
    signature: str
    has_token: bool


def read(headers: MultiMapping[str], now: float) -> Signed:
    """The claim in the headers, checked but for its signature. `now`: epoch seconds of the wall clock. Unauthorized."""
    algorithm, parts = _parse(headers.getall("Authorization"))
    dates = headers.getall("X-Amz-Date", []) or headers.getall("Date", [])
    missing = [f"Authorization header requires '{name}' parameter." for name in _PARTS if not parts.get(name)]
    if not dates:
        missing.append("Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header.")
    if missing:
        raise _incomplete(" ".join(missing))
    at = _moment(dates)
    _check_age(at, datetime.fromtimestamp(now, UTC))
    names = tuple(name.lower() for name in parts["SignedHeaders"].split(";"))
    if "host" not in names:
        raise _refused("'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization.")
    if algorithm != ALGORITHM:
        raise _incomplete(f"Unsupported AWS 'algorithm': '{algorithm}' (only {ALGORITHM} for now).")
    access_key, region = _scope(parts["Credential"], at)
    has_token = "X-Amz-Security-Token" in headers
    return Signed(access_key, region, at.strftime(_BASIC), names, parts["Signature"], has_token)


@dataclass(frozen=True, slots=True)
class Content:
    """What was signed. `path`: as on the wire, without the query. `query`: decoded, as the handlers read it, so that
    what is signed is what is done. `body`: as on the wire, and bounded by the caller.
    """

    method: str
    path: str
    query: MultiMapping[str]
    headers: MultiMapping[str]
    body: bytes


def signer(signed: Signed, content: Content, secrets: Mapping[str, str]) -> str:
    """The access key id whose secret signed exactly this. `secrets`: by access key id. Unauthorized."""
    secret = secrets.get(signed.access_key)
    credentials = ReadOnlyCredentials(signed.access_key, _NOBODY if secret is None else secret, None)
    verifier = _Verifier(credentials, signed, content.headers)
    params = [(_text(name), _text(value)) for name, value in content.query.items()]
    url = f"http://poller{_text(content.path)}"
    request = _Request(content.method, url, params, content.body, {"timestamp": signed.at})
    expected = verifier.signature(verifier.string_to_sign(request, verifier.canonical_request(request)), request)
    matches = hmac.compare_digest(expected.encode(), signed.signature.encode())
    if secret is None or signed.has_token:
        raise Unauthorized("UnrecognizedClientException", INVALID_TOKEN)
    if not matches:
        raise _refused(_MISMATCH)
    return signed.access_key


@dataclass(slots=True)
class _Request:
    """What `SigV4Auth` reads of a botocore AWSRequest. `headers` stays empty: the payload's hash is never believed."""

    method: str
    url: str
    params: list[tuple[str, str]]
    body: bytes
    context: dict[str, Any]
    headers: tuple[()] = ()


class _Verifier(SigV4Auth):  # type: ignore[misc]
    """botocore's signer, which signs the headers that the client named instead of those that botocore would choose."""

    def __init__(self, credentials: ReadOnlyCredentials, signed: Signed, headers: MultiMapping[str]) -> None:
        super().__init__(credentials, SERVICE, signed.region)
        self._signed = HTTPHeaders()
        for name in dict.fromkeys(signed.names):
            for value in headers.getall(name, [""]):
                self._signed[name] = _text(value)

    def headers_to_sign(self, request: _Request) -> HTTPHeaders:  # noqa: ARG002 - botocore's signature
        return self._signed


def _text(value: str) -> str:
    """The value; where it holds bytes that are no UTF-8, which no client signs, something that matches no signature."""
    return value.encode("utf-8", "replace").decode()


_PARTS = ("Credential", "Signature", "SignedHeaders")


def _parse(values: list[str]) -> tuple[str, dict[str, str]]:
    """The algorithm and the parts of the one Authorization header. Unauthorized."""
    if len(values) > 1:
        raise _incomplete("The request has more than one Authorization header.")
    if not values[0].isascii():
        raise _incomplete("The Authorization header is not ASCII text.")
    algorithm, _, rest = values[0].strip().partition(" ")
    parts: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in rest.split(","))):
        name, equals, value = item.partition("=")
        if not equals:
            raise _incomplete("Invalid key=value pair (missing equal-sign) in Authorization header.")
        if name in parts:
            raise _incomplete(f"Authorization header has the '{name}' parameter twice.")
        parts[name] = value
    return algorithm, parts


def _moment(dates: list[str]) -> datetime:
    """When the request was signed. Unauthorized."""
    text = dates[0].strip()
    try:
        if len(dates) == 1 and _BASIC_FORM.fullmatch(text):
            return datetime.strptime(text, _BASIC).replace(tzinfo=UTC)
        if len(dates) == 1 and text.endswith("GMT"):  # a Date header as HTTP writes it
            return parsedate_to_datetime(text).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise _incomplete(
        f"Date must be in ISO-8601 'basic format'. Got '{text}'. See http://en.wikipedia.org/wiki/ISO_8601"
    )


def _check_age(at: datetime, now: datetime) -> None:
    minutes = MAX_SKEW // timedelta(minutes=1)
    said, clock = at.strftime(_BASIC), now.strftime(_BASIC)
    earliest, latest = now - MAX_SKEW, now + MAX_SKEW
    if at < earliest.replace(microsecond=0):
        bound = earliest.strftime(_BASIC)
        raise _refused(f"Signature expired: {said} is now earlier than {bound} ({clock} - {minutes} min.)")
    if at > latest:
        bound = latest.strftime(_BASIC)
        raise _refused(f"Signature not yet current: {said} is still later than {bound} ({clock} + {minutes} min.)")


def _scope(credential: str, at: datetime) -> tuple[str, str]:
    """Access key id and Region of a scope that is ours and of that day. ApiError, naming everything at once."""
    parts = credential.rstrip("/").split("/")
    if len(parts) != 5 or not all(parts):
        raise _incomplete(
            "Credential must have exactly 5 slash-delimited elements, e.g. keyid/date/region/service/term, "
            f"got '{credential}'"
        )
    access_key, date, region, service, terminator = parts
    wrong = []
    if service != SERVICE:
        wrong.append(f"Credential should be scoped to correct service: '{SERVICE}'.")
    if terminator != _TERMINATOR:
        wrong.append(f"Credential should be scoped with a valid terminator: '{_TERMINATOR}', not '{terminator}'.")
    if date != at.strftime("%Y%m%d"):
        wrong.append(
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: "
            f"'{date}' != '{at:%Y%m%d}', from '{at.strftime(_BASIC)}'."
        )
    if wrong:
        raise _refused(" ".join(wrong))
    return access_key, region


def _incomplete(message: str) -> Unauthorized:
    return Unauthorized("IncompleteSignatureException", message)


def _refused(message: str) -> Unauthorized:
    return Unauthorized("InvalidSignatureException", message)
