"""The HTTP server: which doors are open to whom, and the paths that are not the mapping API."""

import base64
import hmac
import ipaddress
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import structlog
from aiohttp import hdrs, web

from poller import __version__
from poller.core.model import MappingStatus
from poller.errors import ApiError, PollerError, StoreUnavailable
from poller.ports import Clock, Control
from poller.server import api, page
from poller.settings import ServerSettings
from poller.telemetry import Metrics, shard_ages

log = structlog.get_logger()

IDLE_TIMEOUT = 30.0
"""Seconds that a connection may be open without a complete request head: keep-alive and slow clients."""
SHUTDOWN_TIMEOUT = 2.0

_ALWAYS_OPEN = frozenset({"/metrics", "/healthz", "/readyz"})
_READING = frozenset({hdrs.METH_GET, hdrs.METH_HEAD})
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves one daemon. `start` once, `stop` once."""

    def __init__(
        self, settings: ServerSettings, control: Control, metrics: Metrics, clock: Clock, ids: random.Random
    ) -> None:
        """`ids` makes the request ids, which every log line of a request carries."""
        self._settings = settings
        self._control = control
        self._metrics = metrics
        self._clock = clock
        self._ids = ids
        self._is_local = _is_loopback(settings.host)
        app = web.Application(middlewares=[self._answer, self._guard], client_max_size=api.MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/metrics", self._get_metrics),
                web.get("/healthz", self._get_health),
                web.get("/readyz", self._get_ready),
                web.get("/api/status", self._get_status),
                web.get("/", self._get_page),
                *api.routes(control),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, keepalive_timeout=IDLE_TIMEOUT, shutdown_timeout=SHUTDOWN_TIMEOUT
        )

    async def start(self) -> int:
        """Listen; answers the port, a free one when the settings say 0. PollerError: the address cannot be had."""
        host, port = self._settings.host, self._settings.port
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise PollerError(
                f"server: cannot listen on {host} port {port}: {error.strerror or error}; "
                "set `server.host` to an address of this machine and `server.port` to a free port it may use"
            ) from error
        bound = int(self._runner.addresses[0][1])
        log.info("server_started", host=host, port=bound, auth=bool(self._settings.auth))
        if not self._is_local and not self._settings.auth:
            log.warning("server_doors_closed", host=host, reason=_CLOSED)
        return bound

    async def stop(self) -> None:
        """Stop listening; requests in progress get `SHUTDOWN_TIMEOUT` seconds to end."""
        await self._runner.cleanup()

    # --- every request ---

    @web.middleware
    async def _answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Every answer has a request id; every error has AWS's shape and tells nothing of the inside."""
        request_id = str(UUID(int=self._ids.getrandbits(128), version=4))
        try:
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                response = await handler(request)
        except ApiError as error:
            response = api.refusal(error)
            if error.status == web.HTTPRequestTimeout.status_code:
                response.force_close()
        except web.HTTPMethodNotAllowed as error:
            text = f"{error.method} is not allowed here; allowed: {', '.join(sorted(error.allowed_methods))}."
            response = api.refusal(ApiError("MethodNotAllowedException", 405, text))
            response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        except web.HTTPNotFound:
            response = api.refusal(ApiError("UnknownOperationException", 404, "There is nothing at this path."))
        except (web.HTTPException, ConnectionError):  # aiohttp's own, or nobody is there to be answered
            raise
        except StoreUnavailable:
            response = api.refusal(ApiError("ServiceException", 500, "The store did not answer. Try again."))
        except Exception:
            log.exception("request_failed", request_id=request_id, method=request.method, path=request.path)
            response = api.refusal(
                ApiError("ServiceException", 500, "Something went wrong; the log has it under this request's id.")
            )
        response.headers["x-amzn-RequestId"] = request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
        return response

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Lets through what the settings open: the three open paths for all, the rest for who may.

        The resource that matched decides, not the text of the path, so no spelling of a path gets around this.
        """
        resource = request.match_info.route.resource
        if resource is not None and resource.canonical in _ALWAYS_OPEN:
            return await handler(request)
        if not self._is_local and not self._settings.auth:
            raise ApiError("AccessDeniedException", 403, _CLOSED)
        self._refuse_foreign_pages(request)
        if self._settings.auth and not self._has_token(request):
            self._metrics.auth_failed()
            log.info("request_unauthorized", remote=request.remote, path=request.path)
            return _unauthorized(request)
        return await handler(request)

    def _refuse_foreign_pages(self, request: web.Request) -> None:
        """Another site's page in somebody's browser may reach a local port: it must not get through. ApiError.

        A page that got its own host name to resolve to us (DNS rebinding) sends that name as Host. Any other page
        sends its Origin, or, from a plain form, a content type that no API client uses.
        """
        host = request.headers.get(hdrs.HOST, "")
        if self._is_local and not _is_loopback(_host_name(host)):
            raise ApiError("AccessDeniedException", 403, "Use localhost or a loopback address to reach this server.")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and _netloc(origin) != host.lower():
            raise ApiError("AccessDeniedException", 403, "Requests from pages of other sites are refused.")
        if request.method not in _READING and request.content_type in _FORMS:
            raise ApiError("UnsupportedMediaTypeException", 415, "Send `Content-Type: application/json`.")

    def _has_token(self, request: web.Request) -> bool:
        """Compares with every token in constant time."""
        scheme, _, value = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() == "bearer":
            presented = value.strip().encode("utf-8", "surrogateescape")
        elif scheme.lower() == "basic":
            try:
                presented = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return False
        else:
            return False
        matches = [hmac.compare_digest(presented, auth.token.encode()) for auth in self._settings.auth]
        return bool(presented) and any(matches)

    # --- the paths ---

    async def _get_metrics(self, request: web.Request) -> web.Response:
        body, content_type = await self._metrics.exposition(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def _get_health(self, _request: web.Request) -> web.Response:
        """That this answers at all shows that the loop turns."""
        reason = self._control.health()
        return web.Response(text="ok\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    async def _get_ready(self, _request: web.Request) -> web.Response:
        missing = self._control.unready()
        if missing:
            return web.Response(status=503, text="".join(f"{reason}\n" for reason in missing))
        return web.Response(text="ready\n")

    async def _get_status(self, _request: web.Request) -> web.Response:
        return web.json_response(status_document(self._control.status(), self._clock.now()))

    async def _get_page(self, _request: web.Request) -> web.Response:
        text = page.render(status_document(self._control.status(), self._clock.now()))
        return web.Response(text=text, content_type="text/html", headers=page.HEADERS)


_CLOSED = "This path is closed: the server listens beyond loopback without `server.auth`; set it to open the path."


def status_document(status: Sequence[MappingStatus], now: float) -> dict[str, Any]:
    """`/api/status`. Ages in seconds, `next_attempt` in epoch seconds, null where unknown."""
    mappings = []
    for mapping in status:
        shards = []
        for shard in mapping.shards:
            ages = shard_ages(shard, mapping.retention, now)
            shards.append(
                {
                    "id": shard.id,
                    "state": shard.state,
                    "lag_seconds": ages.lag,
                    "iterator_age_seconds": ages.iterator_age,
                    "headroom_seconds": ages.headroom,
                    "blocked_seconds": ages.blocked,
                    "in_flight": shard.in_flight,
                    "held": shard.held,
                    "attempts": shard.attempts,
                    "first_sequence": shard.first_sequence,
                    "last_sequence": shard.last_sequence,
                    "last_error": shard.last_error,
                    "next_attempt": shard.next_attempt,
                }
            )
        mappings.append(
            {
                "uuid": mapping.id,
                "function": mapping.function,
                "source": mapping.source,
                "source_arn": mapping.source_arn,
                "state": mapping.state,
                "reason": mapping.reason,
                "in_flight": mapping.in_flight,
                "breaker": mapping.breaker,
                "receivers": mapping.receivers,
                "receiver_limit": mapping.receiver_limit,
                "shards": shards,
            }
        )
    return {"version": __version__, "mappings": mappings}


def _unauthorized(request: web.Request) -> web.Response:
    """The mapping API answers as AWS does, the rest so that a browser asks for the password."""
    if request.path.startswith(api.PREFIX):
        if hdrs.AUTHORIZATION not in request.headers:
            return api.refusal(
                ApiError("MissingAuthenticationTokenException", 403, f"Missing Authentication Token. {_HOW}")
            )
        return api.refusal(ApiError("UnrecognizedClientException", 403, f"The credentials are not valid here. {_HOW}"))
    challenge = 'Basic realm="esm-poller: the token is the password", charset="UTF-8"'
    return web.Response(status=401, text=f"{_HOW}\n", headers={hdrs.WWW_AUTHENTICATE: challenge})


_HOW = "Send `Authorization: Bearer TOKEN` with a token of `server.auth`."


def _host_name(header: str) -> str:
    """The name or address in a Host header, empty when it holds none."""
    match = _HOST.fullmatch(header)
    return match[1].strip("[]") if match else ""


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _netloc(origin: str) -> str | None:
    """The host and port of an Origin header, None when it has none (`null`)."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
