"""The certificate of our own server: checked before it is used, taken over anew when its files change."""

import asyncio
import ssl
from functools import partial
from pathlib import Path
from typing import NoReturn

import structlog

from poller.clock import wall_clock
from poller.errors import ConfigError
from poller.settings import ServerTls
from poller.watch import stamp

_log = structlog.get_logger(__name__)

LOOK_INTERVAL = 3600.0
"""Seconds between two looks at the files: whoever renews certificates swaps them weeks before the old ones end."""
_SOON = 7 * 86_400.0  # before its end a certificate is warned about
_NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_*, openssl/x509_vfy.h
_PEM_END = "-----END CERTIFICATE-----"


class Certificate:
    """One server's. `context` serves whatever was loaded last to new connections; those that are open stay."""

    def __init__(self, settings: ServerTls) -> None:
        """ConfigError: see `load`."""
        self._settings = settings
        self._look = asyncio.Event()
        self._seen = self._stamps()
        self._newest, self._ends_at = load(settings)
        self.context = load(settings)[0]
        # Not by loading into the live context: should that fail between certificate and key, it would serve neither.
        self.context.sni_callback = self._choose

    def _choose(self, tls: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        tls.context = self._newest

    def _stamps(self) -> tuple[object, object]:
        return stamp(self._settings.cert), stamp(self._settings.key)

    def look_now(self) -> None:
        """The files may have changed."""
        self._look.set()

    async def watch(self, interval: float = LOOK_INTERVAL) -> None:
        """Take over what changes; for ever."""
        while True:
            await self._refresh()
            self._look.clear()
            try:
                async with asyncio.timeout(interval):
                    await self._look.wait()
            except TimeoutError:
                continue

    async def _refresh(self) -> None:
        """A bad pair is refused: the old one goes on, and the next look tries again when the files have changed."""
        stamps = await asyncio.to_thread(self._stamps)
        if stamps != self._seen:
            self._seen = stamps
            try:
                self._newest, self._ends_at = await asyncio.to_thread(load, self._settings)
            except ConfigError as error:
                _log.error("certificate_refused", mistakes=list(error.mistakes), meaning="the old one is served")
            else:
                _log.info("certificate_loaded", cert=self._settings.cert, days=self._days())
        if self._ends_at - wall_clock() < _SOON:
            _log.warning("certificate_ends_soon", cert=self._settings.cert, days=self._days())

    def _days(self) -> float:
        return round((self._ends_at - wall_clock()) / 86_400, 1)


def load(settings: ServerTls) -> tuple[ssl.SSLContext, float]:
    """Python's context for servers (TLS 1.2 and newer) with the certificate, and when that ends, in epoch seconds.

    ConfigError, naming file and key: a file cannot be read or is no PEM, the key is encrypted or another certificate's,
    the certificate is not valid now or not for servers.
    """
    chain = _read(settings, "cert", settings.cert)
    _read(settings, "key", settings.key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if _PEM_END not in chain:
        _refuse(settings, "cert", f"{settings.cert} holds no certificate; give a PEM file")
    try:
        # An encrypted key asks for a password, else on the terminal.
        context.load_cert_chain(settings.cert, settings.key, partial(_refuse_password, settings))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            _refuse(settings, "key", f"{settings.key} is not the key of the certificate in {settings.cert}")
        _refuse(settings, "key", f"{settings.cert} and {settings.key} cannot be used: {error.reason or 'not PEM'}")
    except OSError as error:  # swapped a moment ago
        _refuse(settings, "cert", f"{settings.cert} or {settings.key} cannot be read: {error.strerror}")
    return context, _ends_at(settings, context, chain.partition(_PEM_END)[0] + _PEM_END)


def _refuse(settings: ServerTls, key: str, text: str) -> NoReturn:
    raise ConfigError([f"{settings.place}: server.tls.{key}: {text}"])


def _refuse_password(settings: ServerTls) -> str:
    _refuse(settings, "key", f"{settings.key} is encrypted; give a key without a password, readable by this user only")


def _read(settings: ServerTls, key: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="ignore")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        _refuse(settings, key, f"{path} cannot be read: {reason}; give a PEM file that this user may read")


def _ends_at(settings: ServerTls, context: ssl.SSLContext, certificate: str) -> float:
    """When the certificate ends, by a handshake in memory with a client that trusts it: Python has no other reader."""
    trusting = ssl.create_default_context(cadata=certificate)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    try:
        while not _step(client):
            _step(server)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            _refuse(settings, "cert", f"the certificate in {settings.cert} has expired; renew it")
        if error.verify_code == _NOT_YET_VALID:
            _refuse(settings, "cert", f"the certificate in {settings.cert} is not valid yet; is the clock right?")
        _refuse(settings, "cert", f"the certificate in {settings.cert} is not one for a server: {error.verify_message}")
    except ssl.SSLError as error:
        _refuse(settings, "cert", f"the certificate in {settings.cert} cannot be served: {error.reason}")
    shown = client.getpeercert()
    assert shown is not None
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def _step(side: ssl.SSLObject) -> bool:
    """Is its handshake done?"""
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
