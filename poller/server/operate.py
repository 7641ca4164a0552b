"""`/api/mappings/MAPPING/pause|resume|seek`: what an operator does with a mapping while the daemon runs.

MAPPING is a UUID, the beginning of one, or the name of a function that one mapping has.
"""

from aiohttp import web

from poller.ports import Control
from poller.server.api import IDENTITY, REMOTE, read_document

PREFIX = "/api/mappings"


def routes(control: Control) -> list[web.RouteDef]:
    """The three verbs. The answer says what the mapping does now: `{uuid, state, ...}`."""

    async def pause(request: web.Request) -> web.Response:
        return web.json_response(await control.pause(request.match_info["mapping"], _who(request)))

    async def resume(request: web.Request) -> web.Response:
        return web.json_response(await control.resume(request.match_info["mapping"], _who(request)))

    async def seek(request: web.Request) -> web.Response:
        document = await read_document(request)
        return web.json_response(await control.seek(request.match_info["mapping"], document, _who(request)))

    return [
        web.post(f"{PREFIX}/{{mapping}}/pause", pause),
        web.post(f"{PREFIX}/{{mapping}}/resume", resume),
        web.post(f"{PREFIX}/{{mapping}}/seek", seek),
    ]


def _who(request: web.Request) -> str:
    """For the audit line: with which credentials, and from where."""
    return f"{request[IDENTITY]} from {request[REMOTE]}"
