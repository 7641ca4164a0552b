"""What the verbs share: exit codes, arguments, and talking to a running daemon."""

import argparse
import http.client
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from poller.errors import ConfigError, PollerError

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - argparse has no public name for it

OK, FATAL, BAD_CONFIG = 0, 1, 2
DEFAULT_URL = "http://127.0.0.1:9477"


def add_verb(
    verbs: Verbs, name: str, text: str, verb: Callable[[argparse.Namespace], int], **more: Any
) -> argparse.ArgumentParser:
    """A verb with its line in --help. `more`: for the parser; a `description` that is given is shown as it is."""
    if "description" in more:
        more["formatter_class"] = argparse.RawDescriptionHelpFormatter
    made = verbs.add_parser(name, help=text, **{"description": text[0].upper() + text[1:] + ".", **more})
    made.set_defaults(verb=verb)
    return made


def add_config(made: argparse.ArgumentParser) -> None:
    """`-c`."""
    made.add_argument(
        "-c",
        dest="config",
        metavar="FILE",
        help="config file (default: $POLLER_CONFIG, /etc/poller/poller.yaml, ./config/poller.yaml)",
    )


def add_url(made: argparse.ArgumentParser) -> None:
    """`--url` and `--ca`."""
    made.add_argument("--url", default=DEFAULT_URL, help=f"of the daemon (default: {DEFAULT_URL})")
    made.add_argument(
        "--ca", metavar="FILE", help="PEM file of the CA to trust for https (default: $POLLER_CA, else the system's)"
    )


def seconds(text: str) -> float:
    """An argument: seconds above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return found


def count(text: str) -> int:
    """An argument: a whole number from 1."""
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 100_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def read_text(what: str, path: str) -> str:
    """The text of a file, or of standard input for `-`."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{what}: cannot read {path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{what}: {path} is not UTF-8 text"]) from None


def ask(url: str, document: Any = None, *, ca: str | None = None) -> dict[str, Any]:
    """One request to a running daemon: GET, or POST of a JSON document. PollerError says what to check.

    `ca`: the file of `--ca`.
    """
    if not url.startswith(("http://", "https://")):
        raise PollerError(f"--url {url} is not a URL; give one such as {DEFAULT_URL}")
    body = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 - checked above
    if token := os.environ.get("POLLER_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10, context=_trust(url, ca)) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise PollerError(f"{url} answered {error.code} {error.reason}{_why(error)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise PollerError(_unanswered(url, getattr(error, "reason", error))) from None


def _trust(url: str, ca: str | None) -> ssl.SSLContext | None:
    """Whom to believe that it is the daemon. PollerError: the CA's file cannot be used."""
    if not url.startswith("https://"):
        return None
    file = ca or os.environ.get("POLLER_CA") or None
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl.SSLError too
        reason = "it is no PEM file with certificates" if isinstance(error, ssl.SSLError) else error.strerror
        raise PollerError(f"the CA file {file} cannot be used: {reason}; see --ca and POLLER_CA") from None


def _unanswered(url: str, reason: object) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        hint = "give the file of its CA with --ca or POLLER_CA, and a host name that the certificate has"
        return f"{url}: the certificate is not trusted: {reason.verify_message}; {hint}"
    if isinstance(reason, ssl.SSLError):
        return f"{url} does not answer with TLS: {reason.reason or reason}; is it http:// there?"
    if isinstance(reason, http.client.BadStatusLine | ConnectionResetError) and url.startswith("http://"):
        return f"{url} broke the connection off; is it https:// there (`server.tls`)?"
    return f"no daemon answers at {url}: {reason}; is `poller run` up, and on this port?"


def _why(error: urllib.error.HTTPError) -> str:
    """What a refusal says of itself, and the remedy where there is one."""
    hint = "; set POLLER_TOKEN to a token of `server.auth`" if error.code in {401, 403} else ""
    try:
        document = json.loads(error.read(65_536))
        text = document.get("message") or document.get("Message")
    except (OSError, ValueError, AttributeError):
        text = None
    return (f": {text}" if isinstance(text, str) else "") + hint
