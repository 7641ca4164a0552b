"""The wire of Lambda's event-source-mapping operations (rest-json, 2015-03-31). What they decide is `Control`'s.

Shapes and texts: botocore's model of the service, and answers recorded from AWS.
"""

import asyncio
from typing import Any
from uuid import UUID

import msgspec
from aiohttp import web

from poller.errors import ApiError
from poller.ports import Control

PREFIX = "/2015-03-31/event-source-mappings"
TAGS_PREFIX = "/2017-03-31/tags/"
IDENTITY = web.RequestKey("identity", str)
"""Who sent the request: an access key id, `bearer`, or `local` where no credentials are asked for."""
REMOTE = web.RequestKey("remote", str)
"""The address that it came from."""
REQUEST_ID = web.RequestKey("request_id", str)
MAX_BODY_BYTES = 1024 * 1024
BODY_TIMEOUT = 10.0
_MAX_PAGE = 100
_MAX_ITEMS = 10_000
_CAPITAL_MESSAGE = frozenset({"ResourceNotFoundException", "ResourceInUseException", "ServiceException"})
_FRONT_END = frozenset(  # what AWS's generic front end answers has no type
    {
        "IncompleteSignatureException",
        "InvalidSignatureException",
        "MissingAuthenticationTokenException",
        "UnrecognizedClientException",
        "ValidationException",
    }
)


def routes(control: Control) -> list[web.RouteDef]:
    """The five operations and the three for tags, with and without a trailing slash."""
    api = _Api(control)
    mappings = [
        route
        for slash in ("", "/")
        for route in (
            web.get(f"{PREFIX}{slash}", api.list),
            web.post(f"{PREFIX}{slash}", api.create),
            web.get(f"{PREFIX}/{{uuid}}{slash}", api.get),
            web.put(f"{PREFIX}/{{uuid}}{slash}", api.update),
            web.delete(f"{PREFIX}/{{uuid}}{slash}", api.delete),
        )
    ]
    return [
        *mappings,
        web.get(f"{TAGS_PREFIX}{{arn:.+}}", api.tags),
        web.post(f"{TAGS_PREFIX}{{arn:.+}}", api.tag),
        web.delete(f"{TAGS_PREFIX}{{arn:.+}}", api.untag),
    ]


def refusal(error: ApiError) -> web.Response:
    """An error as AWS spells it: the code in a header, `Message` or `message` by the code."""
    body = {"Message" if error.code in _CAPITAL_MESSAGE else "message": error.message}
    if error.code not in _FRONT_END:
        body["Type"] = "User" if error.status < 500 else "Service"
    return web.json_response(body, status=error.status, headers={"x-amzn-ErrorType": error.code})


class _Api:
    def __init__(self, control: Control) -> None:
        self._control = control

    async def create(self, request: web.Request) -> web.Response:
        return web.json_response(await self._control.create(await read_document(request)), status=202)

    async def get(self, request: web.Request) -> web.Response:
        return web.json_response(self._control.get(request.match_info["uuid"]))

    async def update(self, request: web.Request) -> web.Response:
        changes = await read_document(request)
        return web.json_response(await self._control.update(request.match_info["uuid"], changes), status=202)

    async def delete(self, request: web.Request) -> web.Response:
        return web.json_response(await self._control.delete(request.match_info["uuid"]), status=202)

    async def list(self, request: web.Request) -> web.Response:
        """One page, in the order of UUIDs: the marker stays good when mappings come and go between pages."""
        query = request.query
        size = min(_max_items(query.get("MaxItems")), _MAX_PAGE)
        after = _marker(query.get("Marker"))
        source, function = query.get("EventSourceArn"), query.get("FunctionName")
        found = sorted(
            (
                mapping
                for mapping in self._control.list()
                if mapping["UUID"] > after
                and (not source or mapping.get("EventSourceArn") == source)
                and (not function or function in _names(mapping["FunctionArn"]))
            ),
            key=lambda mapping: str(mapping["UUID"]),
        )
        page: dict[str, Any] = {"EventSourceMappings": found[:size]}
        if len(found) > size:
            page["NextMarker"] = found[size - 1]["UUID"]
        return web.json_response(page)

    async def tags(self, request: web.Request) -> web.Response:
        return web.json_response({"Tags": self._control.tags(_arn(request))})

    async def tag(self, request: web.Request) -> web.Response:
        document = await read_document(request)
        await self._control.tag(_arn(request), document.get("Tags"))
        return web.Response(status=204)

    async def untag(self, request: web.Request) -> web.Response:
        await self._control.untag(_arn(request), request.query.getall("tagKeys", []))
        return web.Response(status=204)


def is_api(path: str) -> bool:
    """Is it a path of AWS's, where refusals look like AWS's too?"""
    return path.startswith((PREFIX, TAGS_PREFIX))


def _arn(request: web.Request) -> str:
    return request.match_info["arn"].removesuffix("/")


def _names(arn: str) -> tuple[str, ...]:
    """What FunctionName may say to mean this function: ARN, partial ARN or name, each with its qualifier."""
    parts = arn.split(":", 6)
    if len(parts) < 7:
        return (arn,)
    account, name = parts[4], parts[6]
    return (arn, f"{account}:function:{name}", name)


def _max_items(text: str | None) -> int:
    if not text:
        return _MAX_PAGE
    if not text.removeprefix("-").isdecimal() or len(text) > 10:
        raise ApiError("SerializationException", 400, "MaxItems can not be converted to an Integer")
    if int(text) < 1:
        bound = "greater than or equal to 1"
    elif int(text) > _MAX_ITEMS:
        bound = f"less than or equal to {_MAX_ITEMS}"
    else:
        return int(text)
    raise ApiError(
        "ValidationException",
        400,
        f"1 validation error detected: Value '{int(text)}' at 'maxItems' failed to satisfy constraint: "
        f"Member must have value {bound}",
    )


def _marker(text: str | None) -> str:
    if not text:
        return ""
    try:
        return str(UUID(text))
    except ValueError:
        raise ApiError("InvalidParameterValueException", 400, "Marker is not one that this API returned.") from None


async def read_body(request: web.Request) -> bytes:
    """The body, bounded in size and time; what was read stays for the next who asks. ApiError."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await request.read()
    except TimeoutError:
        raise ApiError(
            "RequestTimeoutException", 408, f"The request body did not arrive within {BODY_TIMEOUT:g} seconds."
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise ApiError(
            "RequestTooLargeException", 413, f"Request must be smaller than {MAX_BODY_BYTES} bytes"
        ) from None
    except web.RequestPayloadError:
        raise ApiError("SerializationException", 400, "The request body is not what its headers say.") from None


async def read_document(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty one. ApiError."""
    body = await read_body(request)
    try:
        document = msgspec.json.decode(body or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError("SerializationException", 400, f"Could not parse request body into json: {error}") from None
    if not isinstance(document, dict):
        raise ApiError("SerializationException", 400, "The request body must be a JSON object.")
    return document
