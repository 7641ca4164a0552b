"""aiobotocore sessions, one for the process and one for each role that it assumes: credentials, endpoints, cold
clients, and the connections of hot calls.
"""

import asyncio
import logging
import ssl
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.credentials import AioCredentials, AioRefreshableCredentials
from aiobotocore.session import AioSession
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, NoRegionError
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from poller import __version__
from poller.aws.lean import EXPIRED_TOKEN_CODES, Credentials, LeanClient, safe_text, tcp_socket
from poller.aws.role import AssumedRole
from poller.clock import system_random
from poller.errors import AccessDenied, ConfigError, PollerError, SourceUnavailable
from poller.settings import AwsSettings

COLD_TIMEOUT = 60.0  # of one cold call with its repeat, whatever drips in

_RELOAD_INTERVAL = 10.0  # between two loads of credentials that AWS calls expired
_KEEPALIVE = 12.0  # idle seconds before a connection is closed; below what AWS's front ends keep, as aiobotocore does
_COLD_CONNECTIONS = 50  # per client


@dataclass(slots=True)
class _Role:
    """A role's clients. `holders`: of those who hold and release it."""

    clients: "AwsClients"
    holders: int = 0


def _without_traceback(record: logging.LogRecord) -> bool:
    """Credentials that cannot be had are the error of each call that needs them, in a sentence."""
    record.exc_info = None
    return True


def answered_at(answer: Mapping[str, Any]) -> float | None:
    """When the server made a cold client's answer, by its Date header (whole seconds); None when it sent none."""
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        return parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None


class _SessionCredentials:
    """The session's credentials, loaded through the standard chain at the first use."""

    def __init__(self, session: AioSession, role: AssumedRole | None = None) -> None:
        """`role`: what the session's provider is, in place of the chain."""
        self._session = session
        self._role = role
        self._lock = asyncio.Lock()
        self._current: AioCredentials | AioRefreshableCredentials | None = None
        self._rejected = False
        self._reload_at = 0.0

    async def frozen(self) -> ReadOnlyCredentials:
        """Keys that are good now. AccessDenied when there are none, SourceUnavailable when loading them failed."""
        if self._role is not None:
            self._role.check()
        try:
            current = self._current
            if current is None or self._rejected:
                current = await self._load()
            return await current.get_frozen_credentials()
        except PollerError:
            raise
        except Exception as error:  # noqa: BLE001
            # Providers run programs and read files of users, and let through whatever those bring up: a missing tool,
            # an answer that is no JSON, credentials that are expired already.
            raise SourceUnavailable(f"AWS credentials cannot be loaded: {type(error).__name__}") from None

    def reject(self) -> None:
        """Load them anew before the next use; for providers that do not refresh, such as a file that is rewritten."""
        self._rejected = True

    async def renew(self) -> None:
        """Load them anew if AWS called them expired, so that cold clients, which share them, sign with new ones.

        Those of a role are had before a client is: a cold call that begins without them would ask STS for itself.
        """
        if self._role is not None or (self._rejected and self._current is not None):
            await self.frozen()

    async def _load(self) -> AioCredentials | AioRefreshableCredentials:
        async with self._lock:
            now = asyncio.get_running_loop().time()
            if self._current is None:
                loaded = await self._session.get_credentials()
                if loaded is None:
                    raise AccessDenied(
                        "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
                        "or run with a role"
                    )
                self._current = loaded
            elif self._rejected and now >= self._reload_at:
                loaded = await self._session.get_component("credential_provider").load_credentials()
                self._replace(loaded)
                self._reload_at = now + _RELOAD_INTERVAL
            self._rejected = False
            return self._current

    def _replace(self, loaded: AioCredentials | AioRefreshableCredentials | None) -> None:
        """Clients that exist hold the old object: plain credentials are changed in place so that they follow."""
        current = self._current
        if isinstance(loaded, AioCredentials) and isinstance(current, AioCredentials):
            current.access_key, current.secret_key, current.token = loaded.access_key, loaded.secret_key, loaded.token
        elif loaded is not None:
            self._current = loaded


class AwsClients:
    """Async context manager. Clients are made once for each service and region, shared, and closed on exit.

    Entering raises ConfigError when the AWS profile or the CA bundle that is asked for cannot be used. Those of a role
    (`acting_as`) are not entered: they live within these.
    """

    def __init__(self, settings: AwsSettings, max_connections: int = 4096) -> None:
        self._settings = settings
        self._max_connections = max_connections
        self._session = AioSession()
        self._credentials = _SessionCredentials(self._session)
        self._name = f"esm-poller-{system_random().getrandbits(32):08x}"  # of sessions of roles, in CloudTrail
        self._roles: dict[str, _Role] = {}
        self._config = AioConfig(
            connect_timeout=5,
            read_timeout=20,
            max_pool_connections=_COLD_CONNECTIONS,
            tcp_keepalive=True,
            user_agent=f"esm-poller/{__version__}",
        )
        self._stack = AsyncExitStack()
        self._lock = asyncio.Lock()
        self._clients: dict[tuple[str, str | None, int], Any] = {}
        self._lean: dict[tuple[str, str], LeanClient] = {}
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        for name in ("aiobotocore", "botocore"):
            logger = logging.getLogger(name)
            if logger.getEffectiveLevel() < logging.INFO:
                logger.setLevel(logging.INFO)  # at DEBUG they log whole bodies and signatures
            logging.getLogger(f"{name}.credentials").addFilter(_without_traceback)
        context = await self._trust()
        self._http = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self._max_connections,
                    limit_per_host=0,
                    keepalive_timeout=_KEEPALIVE,
                    ssl=context,
                    socket_factory=tcp_socket,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": f"esm-poller/{__version__}", "Accept-Encoding": "identity"},
            )
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for role in self._roles.values():
            await role.clients._close()  # noqa: SLF001 - its own class
        await self._stack.aclose()

    def acting_as(self, role: str | None, region: str) -> "AwsClients":
        """Clients that have a role's credentials, the same for all that ask for the role; these with None.

        Nothing is called yet: what STS says comes out of the calls, as AccessDenied or SourceUnavailable. `region`:
        that of STS, unless the settings or the standard chain have one. They are closed with these; whoever may outlive
        the need of them holds and releases the role.
        """
        if role is None:
            return self
        if role not in self._roles:
            made = AwsClients(self._settings)
            made._http = self._http

            async def sts() -> Any:
                configured = self._settings.region or self._session.get_config_variable("region")
                return await self.client("sts", configured or region)

            assumed = AssumedRole(role, self._name, sts)
            made._session.register_component("credential_provider", assumed)
            made._credentials = _SessionCredentials(made._session, assumed)
            self._roles[role] = _Role(made)
        return self._roles[role].clients

    def hold(self, role: str | None, region: str) -> None:
        """Keep a role's clients open until `release`."""
        if role is not None:
            self.acting_as(role, region)
            self._roles[role].holders += 1

    async def release(self, role: str | None) -> None:
        """Close a role's clients with the last who holds them."""
        if role is not None:
            held = self._roles[role]
            held.holders -= 1
            if held.holders == 0:
                del self._roles[role]
                await held.clients._close()  # noqa: SLF001 - its own class

    async def _trust(self) -> ssl.SSLContext:
        """The same as the cold clients': AWS_CA_BUNDLE or `ca_bundle` of the profile, else botocore's own bundle."""
        try:
            bundle = self._session.get_config_variable("ca_bundle") or get_cert_path(True)
        except BotoCoreError as error:  # an AWS_PROFILE that does not exist, a config file that cannot be parsed
            raise ConfigError([f"aws: {safe_text(str(error))}"]) from None
        try:
            return await asyncio.to_thread(ssl.create_default_context, cafile=bundle)
        except OSError as error:  # ssl.SSLError too
            raise ConfigError(
                [f"aws: the CA bundle {bundle} cannot be read ({error.strerror}); set AWS_CA_BUNDLE to a PEM file"]
            ) from None

    @property
    def credentials(self) -> Credentials:
        """Where the daemon's signing keys come from; for signed requests to what is not an AWS endpoint."""
        return self._credentials

    async def client(self, service: str, region: str | None, attempts: int = 2) -> Any:
        """The aiobotocore client for cold calls. Its errors are botocore's; `poller.aws.errors.translated` reads them.

        `attempts`: 2 has one quick repeat for a hiccup, 1 is for what should not be done twice; every loop of ours
        backs off by itself. `region` None: the standard chain's; ConfigError when that has none either.
        SourceUnavailable, AccessDenied: there are no credentials to make it with.
        """
        await self._credentials.renew()
        key = (service, region, attempts)
        async with self._lock:
            if key not in self._clients:
                try:
                    client = await self._stack.enter_async_context(
                        self._session.create_client(
                            service,
                            region_name=region,
                            endpoint_url=self._settings.endpoint(service),
                            config=self._config.merge(
                                AioConfig(retries={"mode": "standard", "total_max_attempts": attempts})
                            ),
                        )
                    )
                except NoRegionError:
                    raise ConfigError(
                        ["aws.region: not set, and neither is AWS_DEFAULT_REGION; give one such as eu-west-1"]
                    ) from None
                except Exception as error:  # noqa: BLE001  # it loads credentials too, see `frozen`
                    raise SourceUnavailable(f"{service}: no client can be made: {type(error).__name__}") from None
                client.meta.events.register("after-call", self._after_call)
                self._clients[key] = client
            return self._clients[key]

    async def lean(self, service: str, region: str) -> LeanClient:
        """The client for hot calls. Errors as `client`."""
        key = (service, region)
        if key not in self._lean:
            client = await self.client(service, region)
            assert self._http is not None, "AwsClients is used outside of its `async with`"
            endpoint = client.meta.endpoint_url
            self._lean[key] = LeanClient(
                service=service,
                endpoint=endpoint,
                signing_name=client.meta.service_model.signing_name,
                signing_region=client.meta.region_name,
                credentials=self._credentials,
                http=self._http,
                # botocore's reading of the variables; aiohttp's own trust_env would also send ~/.netrc passwords.
                proxy=get_environ_proxies(endpoint).get(urlsplit(endpoint).scheme),
            )
        return self._lean[key]

    def _after_call(self, parsed: dict[str, Any], **_: Any) -> None:
        if parsed.get("Error", {}).get("Code") in EXPIRED_TOKEN_CODES:
            self._credentials.reject()
