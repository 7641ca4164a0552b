"""The HTTP server: which doors are open to whom, and the paths that are not the mapping API."""

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import random
import re
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import structlog
from aiohttp import hdrs, web
from aiohttp.http import HttpProcessingError
from aiohttp.log import server_logger

from poller.clock import wall_clock
from poller.errors import ApiError, PollerError, StoreUnavailable
from poller.ports import Clock, Control
from poller.server import api, operate, page, sigv4
from poller.server.certificate import Certificate
from poller.server.history import History
from poller.server.remote import IDENTITY, REMOTE, REQUEST_ID, Private, Remote
from poller.server.sigv4 import Unauthorized
from poller.server.status import status_document
from poller.settings import AccessKeys, BearerAuth, ServerSettings
from poller.telemetry import Metrics

log = structlog.get_logger()

IDLE_TIMEOUT = 30.0
"""Seconds that a connection may be open without a complete request head: keep-alive and slow clients."""
SHUTDOWN_TIMEOUT = 2.0
REPORT_INTERVAL = 10.0
"""Seconds between log lines about what strangers send: whoever guesses shall not fill the disk."""

_ALWAYS_OPEN = frozenset({"/metrics", "/healthz", "/readyz"})
_READING = frozenset({hdrs.METH_GET, hdrs.METH_HEAD})
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves one daemon. `start` once, `stop` once."""

    def __init__(
        self,
        settings: ServerSettings,
        control: Control | Remote,
        metrics: Metrics,
        clock: Clock,
        ids: random.Random,
        *,
        wall: Callable[[], float] = wall_clock,
        private: Private | None = None,
    ) -> None:
        """`control`: `Remote` where workers do what is asked for. `private`: this is one of them, and serves the one
        that asks the others' questions; then `settings` do not matter.

        `ids` makes the request ids, which every log line of a request carries.

        `wall`: epoch seconds to hold the date of a signature against. Not `clock`, which does not follow when the wall
        clock is set or the machine was suspended; then it would refuse every signature until a restart.
        """
        self._settings = settings
        self._control = control
        self._metrics = metrics
        self._clock = clock
        self._ids = ids
        self._wall = wall
        self._tokens = [entry.token.encode() for entry in settings.auth if isinstance(entry, BearerAuth)]
        self._secrets = {
            key: secret for entry in settings.auth if isinstance(entry, AccessKeys) for key, secret in entry.secrets
        }
        self._unauthorized = _Rare("request_unauthorized", clock)
        self._private = private
        self._certificate: Certificate | None = None
        self._is_local = _is_loopback(settings.host)
        self.history = History(control, metrics, clock)
        app = web.Application(middlewares=[self._answer, self._guard], client_max_size=api.MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/metrics", self._get_metrics),
                web.get("/healthz", self._get_health),
                web.get("/readyz", self._get_ready),
                web.get("/api/status", self._get_status),
                web.get("/", self._get_page),
                *(
                    control.routes()
                    if isinstance(control, Remote)
                    else (*api.routes(control), *operate.routes(control))
                ),
            ]
        )
        if private is not None:
            app.add_routes([web.get("/report", self._get_report)])
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_WireLog(_Rare("request_malformed", clock)),
            keepalive_timeout=IDLE_TIMEOUT,
            shutdown_timeout=SHUTDOWN_TIMEOUT,
        )

    async def start(self) -> int:
        """Listen; answers the port, a free one when the settings say 0. PollerError: the address cannot be had.
        ConfigError: its certificate cannot be used.
        """
        if self._private is not None:
            await self._runner.setup()
            await web.UnixSite(self._runner, self._private.path).start()
            return 0
        host, port, tls = self._settings.host, self._settings.port, self._settings.tls
        if tls is not None:
            self._certificate = await asyncio.to_thread(Certificate, tls)
        await self._runner.setup()
        context = self._certificate.context if self._certificate else None
        try:
            await web.TCPSite(self._runner, host, port, ssl_context=context).start()
        except OSError as error:
            await self._runner.cleanup()
            raise PollerError(
                f"server: cannot listen on {host} port {port}: {error.strerror or error}; "
                "set `server.host` to an address of this machine and `server.port` to a free port it may use"
            ) from error
        bound = int(self._runner.addresses[0][1])
        log.info("server_started", host=host, port=bound, auth=bool(self._settings.auth), tls=tls is not None)
        if not self._is_local and not self._settings.auth:
            log.warning("server_doors_closed", host=host, reason=_CLOSED)
        return bound

    def renew(self) -> None:
        """Look at the certificate's files now: they may have changed."""
        if self._certificate is not None:
            self._certificate.look_now()

    async def run(self) -> None:
        """What whoever starts the server runs beside it: the history, and changes of the certificate. For ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.history.run())
            if self._certificate is not None:
                tasks.create_task(self._certificate.watch())

    async def stop(self) -> None:
        """Stop listening; requests in progress get `SHUTDOWN_TIMEOUT` seconds to end."""
        await self._runner.cleanup()

    # --- every request ---

    @web.middleware
    async def _answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Every answer has a request id; every error has AWS's shape and tells nothing of the inside."""
        request_id = str(UUID(int=self._ids.getrandbits(128), version=4))
        if self._private is not None:
            request_id = request.headers.get(REQUEST_ID, request_id)
        request[api.REQUEST_ID] = request_id
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
        if self._private is not None:
            request[api.IDENTITY] = request.headers.get(IDENTITY, "local")
            request[api.REMOTE] = request.headers.get(REMOTE, "")
            return await handler(request)
        request[api.REMOTE] = request.remote or ""
        resource = request.match_info.route.resource
        if resource is not None and resource.canonical in _ALWAYS_OPEN:
            return await handler(request)
        if not self._is_local and not self._settings.auth:
            raise ApiError("AccessDeniedException", 403, _CLOSED)
        self._refuse_foreign_pages(request)
        try:
            request[api.IDENTITY] = await self._identify(request)
        except Unauthorized as error:
            self._metrics.auth_failed()
            self._unauthorized.tell(remote=request.remote, path=request.path, reason=error.code)
            return _unauthorized(request, error)
        return await handler(request)

    async def _identify(self, request: web.Request) -> str:
        """Who sent the request, as `api.IDENTITY`. Unauthorized; ApiError when its body cannot be had."""
        if not self._settings.auth:
            return "local"
        authorization = request.headers.get(hdrs.AUTHORIZATION)
        if authorization is None:
            if "X-Amz-Signature" in request.query:
                raise Unauthorized("IncompleteSignatureException", "Presigned URLs are not taken; sign the headers.")
            raise Unauthorized("MissingAuthenticationTokenException", "Missing Authentication Token")
        if not authorization.lstrip().startswith("AWS4-"):
            if not self._has_token(authorization):
                raise Unauthorized("UnrecognizedClientException", f"The credentials are not valid here. {_HOW}")
            return "bearer"
        if not self._secrets:
            raise Unauthorized("UnrecognizedClientException", f"{sigv4.INVALID_TOKEN} {_NO_KEYS}")
        signed = sigv4.read(request.headers, self._wall())
        body = await api.read_body(request)
        content = sigv4.Content(request.method, request.rel_url.raw_path, request.query, request.headers, body)
        return sigv4.signer(signed, content, self._secrets)

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

    def _has_token(self, authorization: str) -> bool:
        """Compares with every token in constant time."""
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            presented = value.strip().encode("utf-8", "surrogateescape")
        elif scheme.lower() == "basic":
            try:
                presented = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return False
        else:
            return False
        matches = [hmac.compare_digest(presented, token) for token in self._tokens]
        return bool(presented) and any(matches)

    # --- the paths ---

    async def _refresh(self) -> None:
        if isinstance(self._control, Remote):
            await self._control.refresh()

    async def _get_report(self, _request: web.Request) -> web.Response:
        assert self._private is not None
        return web.Response(body=await self._private.report())

    async def _get_metrics(self, request: web.Request) -> web.Response:
        await self._refresh()
        body, content_type = await self._metrics.exposition(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def _get_health(self, _request: web.Request) -> web.Response:
        """That this answers at all shows that the loop turns."""
        await self._refresh()
        reason = self._control.health()
        return web.Response(text="ok\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    async def _get_ready(self, _request: web.Request) -> web.Response:
        await self._refresh()
        missing = self._control.unready()
        if missing:
            return web.Response(status=503, text="".join(f"{reason}\n" for reason in missing))
        return web.Response(text="ready\n")

    async def _get_status(self, request: web.Request) -> web.Response:
        """With `?history=1` each mapping has its last hour too."""
        await self._refresh()
        make = self._snapshot(with_series=request.query.get("history") == "1")
        return web.Response(
            text=await asyncio.to_thread(lambda: json.dumps(make())), content_type="application/json", charset="utf-8"
        )

    async def _get_page(self, request: web.Request) -> web.Response:
        await self._refresh()
        make, view = self._snapshot(with_series=True), page.View.of(request.query)
        text = await asyncio.to_thread(lambda: page.render(make(), view))
        return web.Response(text=text, content_type="text/html", headers=page.HEADERS)

    def _snapshot(self, *, with_series: bool) -> Callable[[], dict[str, Any]]:
        """What is true now, to be made a document of in a thread: ten thousand shards take a while."""
        status, now = tuple(self._control.status()), self._clock.now()
        recent = self.history.read(with_series=with_series)
        return partial(status_document, status, now, recent, self._control.store_problem())


class _Rare:
    """A log line, at most one in `REPORT_INTERVAL`; the next one says how many there were without."""

    def __init__(self, event: str, clock: Clock) -> None:
        self._event = event
        self._clock = clock
        self._next = -inf
        self._unreported = 0

    def tell(self, **fields: Any) -> None:
        now = self._clock.now()
        if now < self._next:
            self._unreported += 1
            return
        log.info(self._event, **fields, unreported=self._unreported)
        self._next, self._unreported = now + REPORT_INTERVAL, 0


class _WireLog(logging.Logger):
    """aiohttp's logger. It logs a client's malformed request as an error of ours, with a traceback and the bytes, in
    which there may be a token: of those only the kind is told.
    """

    def __init__(self, malformed: _Rare) -> None:
        super().__init__(server_logger.name)
        self._malformed = malformed

    def handle(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | web.RequestPayloadError):
            remote = record.args[0] if isinstance(record.args, tuple) and record.args else None
            self._malformed.tell(remote=remote, reason=type(error).__name__)
        elif server_logger.isEnabledFor(record.levelno):
            server_logger.handle(record)


_CLOSED = "This path is closed: the server listens beyond loopback without `server.auth`; set it to open the path."


def _unauthorized(request: web.Request, error: ApiError) -> web.Response:
    """The mapping API answers as AWS does, the rest so that a browser asks for the password."""
    if api.is_api(request.path):
        return api.refusal(error)
    challenge = 'Basic realm="esm-poller: the token is the password", charset="UTF-8"'
    return web.Response(status=401, text=f"{_HOW}\n", headers={hdrs.WWW_AUTHENTICATE: challenge})


_HOW = "Send `Authorization: Bearer TOKEN` with a token of `server.auth`, or sign with one of its access keys."
_NO_KEYS = (
    "This server has no access keys: add `{type: sigv4, access_keys: {ID: SECRET}}` to `server.auth`, or send "
    "`Authorization: Bearer TOKEN`."
)


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
