"""The config file as frozen `Settings`. Reports every mistake at once: `FILE:LINE: KEY: what is wrong; what is right`.

Values of headers and credentials, and whatever came through `${...}`, never stand in a text.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from ipaddress import ip_address
from json import dumps
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from poller.core.model import FunctionSpec, SourceSpec
from poller.errors import ConfigError
from poller.mappings import (
    FUNCTION_NAME,
    check_create,
    derived_uuid,
    item_shape,
    normalize,
    parse_source,
    resolve_function,
)
from poller.settings import (
    AccessKeys,
    Auth,
    AwsSettings,
    BasicAuth,
    BearerAuth,
    Declared,
    DynamoStoreSettings,
    FunctionSettings,
    HttpFunction,
    LambdaFunction,
    LimitSettings,
    LogSettings,
    RetrySettings,
    ServerSettings,
    ServerTls,
    Settings,
    SigV4Auth,
    StoreSettings,
    TlsSettings,
    TracingSettings,
    is_reserved_header,
)
from poller.shapes import (
    Choice,
    Complaint,
    Field,
    Flag,
    ListOf,
    MapOf,
    Number,
    Object,
    Tagged,
    Text,
    Whole,
    check,
    convert,
    join,
    nearest,
)
from poller.watch import stamp
from poller.yamldoc import Node, parse

PLACES = ("/etc/poller/poller.yaml", "config/poller.yaml")
MAX_FILE_BYTES = 10 * 1024 * 1024
_MAX_SECRET_BYTES = 1024 * 1024
_DYNAMO_INTERVAL = 1.0  # seconds between two saves of a shard: each is a write that is paid for
_SHOWN = 80  # characters of a value in a mistake
_TRACING_PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")  # of the extra `tracing`
_TYPO = 0.75  # how alike a FunctionName and a configured name are before we ask


# --- what may stand in the file -------------------------------------------------------------------------------------


def _url(text: str) -> Complaint | None:
    remedy = "give a URL such as http://127.0.0.1:8080/path"
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises when it is none
    except ValueError:
        return "is not a URL", remedy
    if parts.scheme not in {"http", "https"}:
        return "has no scheme http:// or https://", remedy
    if not parts.hostname or re.search(r"[\s\x00-\x1f\x7f]", text):
        return "is not a URL", remedy
    if "@" in parts.netloc:
        return "has a user name or password in it", "take it out; a function has auth: {type: basic} for it"
    if parts.fragment:
        return "has a #fragment", "take it out; it is never sent"
    return None


def _store(text: str) -> Complaint | None:
    remedy = "give sqlite:///ABSOLUTE/PATH, sqlite:./RELATIVE/PATH or dynamodb://TABLE"
    if text.startswith("dynamodb:"):
        try:
            parts = urlsplit(text)
        except ValueError:
            return "is not a store", remedy
        good = re.fullmatch(r"[a-zA-Z0-9_.-]{3,255}", parts.netloc) and parts.path in {"", "/"}
        return None if good and _dynamo_query(parts.query) is not None else ("is not a store", _DYNAMO_REMEDY)
    path = _store_path(text)
    if not path or path.endswith("/") or re.search(r"[?#\x00-\x1f\x7f]", path):
        return "is not a store", remedy
    return None


_DYNAMO_REMEDY = "give dynamodb://TABLE[?region=REGION&endpoint_url=URL&create=true]"


def _dynamo_query(query: str) -> dict[str, str] | None:
    """What follows the table's name; None when there is something in it that means nothing."""
    pairs = parse_qsl(query, keep_blank_values=True)
    found = dict(pairs)
    fine = (
        len(found) == len(pairs)
        and found.keys() <= {"region", "endpoint_url", "create"}
        and found.get("create", "true") in {"true", "false"}
        and re.fullmatch(r"[a-z]{2,}(-[a-z0-9]+)+", found.get("region", "eu-west-1"))
        and _url(found.get("endpoint_url", "http://x")) is None
    )
    return found if fine else None


def _store_settings(url: str) -> StoreSettings | DynamoStoreSettings:
    if not url.startswith("dynamodb:"):
        return StoreSettings(url, _store_path(url))
    parts = urlsplit(url)
    query = _dynamo_query(parts.query) or {}
    create = query.get("create") == "true"
    return DynamoStoreSettings(url, parts.netloc, query.get("region"), query.get("endpoint_url"), create)


def _store_path(url: str) -> str:
    """The file of a sqlite URL; empty when the URL has not one of the two forms."""
    if url.startswith("sqlite:///"):
        return url.removeprefix("sqlite://")
    path = url.removeprefix("sqlite:")
    return path if path != url and path.startswith(("./", "../")) else ""


def _header_name(name: str) -> Complaint | None:
    if is_reserved_header(name):
        return "is a header that esm-poller sets itself", "take it out"
    return None


def _header_value(value: str) -> Complaint | None:
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
        return "has a line break or control character", "give one line"
    return None


def _host(text: str) -> Complaint | None:
    remedy = "give a host name or an IP address alone, such as 127.0.0.1 or ::1"
    if ":" in text:
        try:
            ip_address(text)
        except ValueError:
            return "is not a host", remedy
        return None
    return None if re.fullmatch(r"[A-Za-z0-9._-]+", text) else ("is not a host", remedy)


_URL = Text("a URL such as http://127.0.0.1:8080/path", 1, 4096, rule=_url)
_SECRET = Text("text", 1, 65_536, rule=_header_value)
_FILE = Text("the path of a file", 1, 4096)
_BEARER = Object((Field("token", _SECRET, "The token.", required=True),))
_BASIC = Object(
    (
        Field("username", Text("a user name without a colon", 1, 1024, r"[^:\x00-\x1f\x7f]*"), "User.", required=True),
        Field("password", _SECRET, "Password.", required=True),
    )
)
_REGION = Text("a Region such as eu-west-1", pattern=r"[a-z0-9-]{1,64}")
_SERVICES = ("kinesis", "dynamodb", "dynamodbstreams", "sqs", "lambda", "sns", "s3", "events", "sts")

_FUNCTION = Object(
    (
        Field("url", _URL, "HTTP target: each batch is POSTed here. Give url or lambda."),
        Field("lambda", FUNCTION_NAME, "A real Lambda function: name, partial or full ARN. Give url or lambda."),
        Field("timeout_seconds", Number(1, 900), "Longest that an invocation takes. Default: 30, with lambda 900."),
        Field(
            "headers",
            MapOf(
                Text("a header name", 1, 256, r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", _header_name),
                Text("text", most=65_536, rule=_header_value),
            ),
            "More headers of every request.",
        ),
        Field(
            "auth",
            Tagged(
                (
                    ("bearer", _BEARER),
                    ("basic", _BASIC),
                    (
                        "sigv4",
                        Object(
                            (
                                Field(
                                    "service", Text("a service name", pattern=r"[a-z0-9-]{1,64}"), "Default: lambda."
                                ),
                                Field("region", _REGION, "Default: aws.region."),
                            )
                        ),
                    ),
                )
            ),
            "How requests authenticate.",
        ),
        Field("max_concurrency", Whole(1), "Most invocations at once; work waits before anything is received."),
        Field("max_invocations_per_second", Number(0.001, 1_000_000), "A rate; polling waits, nothing fails."),
        Field("protocol", Choice(("http", "rie")), "rie: the answers of the Lambda Runtime Interface Emulator."),
        Field(
            "tls",
            Object(
                (
                    Field("ca", _FILE, "CA bundle to trust instead of the system's."),
                    Field("cert", _FILE, "Client certificate."),
                    Field("key", _FILE, "Its key."),
                )
            ),
            "TLS of an https:// target.",
        ),
    )
)

CONFIG = Object(
    (
        Field(
            "aws",
            Object(
                (
                    Field("region", _REGION, "Region where nothing else says one."),
                    Field("endpoint_url", _URL, "Endpoint of every service, for emulators."),
                    Field("endpoint_urls", MapOf(Choice(_SERVICES), _URL), "Endpoints per service."),
                )
            ),
            "Where AWS is. What is absent comes from the standard chain (environment, profile, IRSA, IMDS, ECS).",
        ),
        Field(
            "functions",
            MapOf(
                Text("a function name of 1 to 64 letters, digits, - and _", pattern=r"[a-zA-Z0-9_-]{1,64}"), _FUNCTION
            ),
            "What a FunctionName can mean. A name that is not here is a real Lambda function.",
        ),
        Field("event_source_mappings", ListOf(item_shape()), "CreateEventSourceMapping requests."),
        Field(
            "store",
            Text("sqlite:///ABSOLUTE/PATH, sqlite:./RELATIVE/PATH or dynamodb://TABLE", 1, 4096, rule=_store),
            "Where positions are kept: sqlite:///PATH, sqlite:./PATH, or dynamodb://TABLE for a fleet. "
            "Default: sqlite:///var/lib/poller/poller.db.",
        ),
        Field(
            "server",
            Object(
                (
                    Field("host", Text("a host", 1, 255, rule=_host), "Default: 127.0.0.1."),
                    Field("port", Whole(0, 65_535), "Default: 9477. 0 takes a free one."),
                    Field(
                        "auth",
                        ListOf(
                            Tagged(
                                (
                                    ("bearer", _BEARER),
                                    (
                                        "sigv4",
                                        Object(
                                            (
                                                Field(
                                                    "access_keys",
                                                    MapOf(Text("an access key id", 1, 128, r"[A-Za-z0-9_]+"), _SECRET),
                                                    "Secrets by access key id.",
                                                    required=True,
                                                ),
                                            )
                                        ),
                                    ),
                                )
                            ),
                            single=True,
                        ),
                        "Who may use the mapping API and the status page.",
                    ),
                    Field(
                        "tls",
                        Object(
                            (
                                Field("cert", _FILE, "PEM: the certificate, then its issuers'.", required=True),
                                Field("key", _FILE, "PEM: its key, not encrypted.", required=True),
                            )
                        ),
                        "Serve https. Files that change are taken over without a restart.",
                    ),
                )
            ),
            "Metrics, health, the mapping API, the status page.",
        ),
        Field(
            "log",
            Object(
                (
                    Field("level", Choice(("debug", "info", "warning", "error")), "Default: info."),
                    Field("format", Choice(("json", "console")), "Default: console on a terminal, else json."),
                    Field("payloads", Flag(), "true: at level debug, payloads are logged. Default: false."),
                )
            ),
            "Logs, on standard error.",
        ),
        Field(
            "retry",
            Object(
                (
                    Field("initial_backoff_seconds", Number(0.01, 3600), "Default: 0.2."),
                    Field("maximum_backoff_seconds", Number(0.01, 3600), "Default: 60."),
                )
            ),
            "Backoff of a failing batch of a stream, full jitter.",
        ),
        Field(
            "limits",
            Object(
                (
                    Field(
                        "buffer_bytes", Whole(1_048_576), "Records in memory, all mappings together. Default: 64 MiB."
                    ),
                    Field(
                        "shard_series",
                        Whole(0),
                        "Shards with metric series of their own: the worst ones. 0: none. Default: 10000.",
                    ),
                )
            ),
            "Bounds of the whole process.",
        ),
        Field(
            "checkpoint_interval_seconds",
            Number(0.01, 60),
            "Longest time between saves. Default: 0.1, with DynamoDB 1.",
        ),
        Field("lease_seconds", Number(2, 3600), "How long a lease lasts. Default: 10."),
        Field("shutdown_grace_seconds", Number(0, 3600), "How long a stop waits for what is in flight. Default: 25."),
        Field(
            "tracing",
            Object((Field("endpoint", _URL, "OTLP over HTTP, such as http://127.0.0.1:4318.", required=True),)),
            "OpenTelemetry traces. Needs esm-poller[tracing].",
        ),
    )
)

# --- finding and loading --------------------------------------------------------------------------------------------


def find_path(option: str | None) -> str:
    """The config file to use: the option, `$POLLER_CONFIG`, else the first of `PLACES` that exists. ConfigError."""
    if given := option or os.environ.get("POLLER_CONFIG"):
        return given
    for place in PLACES:
        if Path(place).exists():
            return place
    tried = ", ".join(PLACES)
    raise ConfigError([f"no config file: $POLLER_CONFIG is not set and none of {tried} exists; give one with -c FILE"])


def load(path: str, *, now: float | None = None) -> Settings:
    """The settings in a file. ConfigError with every mistake; nothing else is raised, whatever the file holds.

    Reads the environment and the files that `${...}` name, so a reload sees their changes. `now`: epoch seconds that a
    StartingPositionTimestamp must not be after, the wall clock's when None.
    """
    before = stamp(path)
    root = parse(_read(path), path)
    if root is None or root.content is None:
        raise ConfigError([f"{path}:1: the file is empty; give at least functions and event_source_mappings"])
    return replace(_Loader(path, now).settings(root), stamp=before)


def _read(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise ConfigError([f"{path}: cannot be read: {reason}; give a readable file with -c FILE"]) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: the file is larger than {MAX_FILE_BYTES} bytes; split it up"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: the file is not UTF-8 text; save it as UTF-8"]) from None


class _Unfilled:
    """Stands for a value that `${...}` could not fill: given, but of no type; its faults are not reported again."""


_UNFILLED = _Unfilled()
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}|\$\{")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_SENSITIVE = re.compile(r"(^|\.)(headers|auth)(\.|\[|$)|token|password|secret|api_?key", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Place:
    line: int
    value: Any


class _Loader:
    """One load. `places`: every value by its path; `filled`: paths of values that came through `${...}`."""

    def __init__(self, path: str, now: float | None) -> None:
        self._path = path
        self._now = now
        self._mistakes: list[tuple[int, str]] = []
        self._warnings: list[str] = []
        self._places: dict[str, _Place] = {}
        self._filled: set[str] = set()
        self._secrets: set[str] = set()  # what came from the environment and from files
        self._file = cache(_secret_file)

    # --- mistakes

    def _mistake_at(self, line: int, text: str) -> None:
        self._mistakes.append((line, f"{self._path}:{line}: {text}"))

    def _mistake(self, path: str, said: str, remedy: str, *, value: Any = None) -> None:
        """One mistake at a path; `value` only where showing it helps and it is no secret."""
        place = self._places.get(path)
        if place is not None and place.value is _UNFILLED:
            return
        shown = "" if path in self._filled or _SENSITIVE.search(path) else _shown(value)
        text = f"{shown} {said}" if shown else said
        self._mistake_at(self._line(path), f"{_public(path) or 'the file'}: {text}" + (f"; {remedy}" if remedy else ""))

    def _warn(self, path: str, text: str) -> None:
        self._warnings.append(f"{self._path}:{self._line(path)}: {path}: {text}")

    def _line(self, path: str) -> int:
        """The line of the value at a path, or of the nearest mapping or list around it."""
        while path not in self._places:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self._places[path].line

    # --- values

    def settings(self, root: Node) -> Settings:
        values = self._walk(root, "", root.line)
        values = convert(CONFIG, values, self._filled)
        self._check(values)
        if self._mistakes:
            raise ConfigError([text for _, text in sorted(self._mistakes, key=lambda mistake: mistake[0])])
        return self._build(values)

    def _walk(self, node: Node, path: str, line: int) -> Any:
        """The plain value of a node, `${...}` filled in."""
        value: Any
        self._places[path] = _Place(line, None)
        match node.content:
            case dict() as entries:
                value = {}
                for key, entry in entries.items():
                    place = join(path, key)
                    value[key] = self._walk(entry.node, place, entry.line)
                    for line_again in entry.again:
                        said = f"the key is already given on line {entry.line}; take one of them out"
                        self._mistake_at(line_again, f"{_public(place)}: {said}")
            case list() as items:
                value = [self._walk(item, f"{path}[{index}]", item.line) for index, item in enumerate(items)]
            case str() as text if "${" in text:
                value = self._fill(text, path, line)
            case plain:
                value = plain
        self._places[path] = _Place(line, value)
        return value

    def _fill(self, text: str, path: str, line: int) -> Any:
        complaints: list[str] = []

        def replaced(found: re.Match[str]) -> str:
            if found[0] == "$${":
                return "${"
            self._filled.add(path)
            try:
                value = self._reference(found[1])
            except ValueError as error:
                complaints.append(str(error))
                return ""
            self._secrets.add(value)
            return value

        filled = _REFERENCE.sub(replaced, text)
        for complaint in complaints:
            self._mistake_at(line, f"{_public(path) or 'the file'}: {complaint}")
        return _UNFILLED if complaints else filled

    def _reference(self, inner: str | None) -> str:
        """What `${inner}` stands for. ValueError: why it cannot be filled."""
        if inner is None:
            raise ValueError("${ has no closing }; close it, or write $${ for the two characters")
        if inner.startswith("file:"):
            return self._file(inner.removeprefix("file:"))
        parts = _NAME.fullmatch(inner)
        if parts is None:
            raise ValueError(
                "${...} is malformed; write ${NAME}, ${NAME:-default} or ${file:PATH}, and $${ for ${ itself"
            )
        name, default = parts[1], parts[2]
        value = os.environ.get(name)
        if default is not None and not value:
            return default
        if value is None:
            raise ValueError(f"the variable {name} is not set; set it, or write ${{{name}:-default}}")
        if re.search("[\ud800-\udfff]", value):  # how Python shows bytes of the environment that are no text
            raise ValueError(f"the variable {name} is not UTF-8 text; set it to text")
        return value

    # --- checks

    def _check(self, values: Any) -> None:
        for fault in check(CONFIG, values):
            if not re.match(r"event_source_mappings\[\d+\]\.", fault.path):  # check_create knows more about these
                self._mistake(fault.path, fault.said, fault.remedy, value=fault.value)
        if not isinstance(values, dict):
            return
        functions = values.get("functions")
        if isinstance(functions, dict):
            for name, function in functions.items():
                if isinstance(function, dict):
                    self._check_function(join("functions", name), function)
            self._check_emulators(functions)
        match values.get("server"):
            case {"auth": dict() | list() as auth}:
                self._check_access_keys(auth)
        if isinstance(values.get("tracing"), dict) and (missing := _missing_package()):
            said = f"needs {missing}, which is not installed here"
            self._mistake("tracing", said, "run pip install 'esm-poller[tracing]' or take tracing out")
        items = values.get("event_source_mappings")
        if isinstance(items, list):
            self._check_mappings(items, list(functions) if isinstance(functions, dict) else [])
        match values.get("log"):
            case {"payloads": True, **rest} if rest.get("level") != "debug":
                self._warn("log.payloads", "has no effect unless log.level is debug")
        match values.get("retry"):
            case {"initial_backoff_seconds": (int() | float()) as initial, "maximum_backoff_seconds": maximum} if (
                isinstance(maximum, int | float) and initial > maximum
            ):
                remedy = "give one that is not above maximum_backoff_seconds"
                self._mistake("retry.initial_backoff_seconds", "is above the maximum", remedy, value=initial)

    def _check_function(self, path: str, function: dict[str, Any]) -> None:
        given = {key for key, value in function.items() if value is not None}
        if {"url", "lambda"} <= given:
            self._mistake(path, "has both url and lambda", "give one of them")
        elif not given & {"url", "lambda"}:
            self._mistake(path, "has neither url nor lambda", "give one of them")
        if "lambda" in given and "url" not in given:
            for key in sorted(given & {"auth", "headers", "protocol", "tls"}):
                self._mistake(f"{path}.{key}", "is only for a function with url", "take it out")
        headers = function.get("headers")
        if isinstance(headers, dict):
            names: dict[str, str] = {}
            for name in headers:
                if (first := names.setdefault(name.lower(), name)) != name:
                    self._mistake(join(f"{path}.headers", name), f"is the same header as {first}", "take one out")
            if "authorization" in names and "auth" in given:
                where = join(f"{path}.headers", names["authorization"])
                self._mistake(where, "is given beside auth, which sets the same header", "take one of them out")
        tls, url = function.get("tls"), function.get("url")
        if isinstance(tls, dict):
            if (tls.get("cert") is None) != (tls.get("key") is None):
                self._mistake(f"{path}.tls", "has only one of cert and key", "give both or none")
            if isinstance(url, str) and url.lower().startswith("http://"):
                self._mistake(f"{path}.tls", "has no effect on an http:// url", "take it out or use https://")

    def _check_access_keys(self, auth: dict[str, Any] | list[Any]) -> None:
        """No entry without a key, and no id with two secrets."""
        entries = [("server.auth", auth)]
        if isinstance(auth, list):
            entries = [(f"server.auth[{index}]", entry) for index, entry in enumerate(auth)]
        seen: dict[str, str] = {}
        for place, entry in entries:
            match entry:
                case {"type": "sigv4", "access_keys": dict() as keys}:
                    path = f"{place}.access_keys"
                    if not keys:
                        self._mistake(path, "has no keys", "give at least one ID: SECRET, or take the entry out")
                    for key in keys:
                        if (first := seen.setdefault(key, path)) != path:
                            said = f"has an access key id that is on line {self._line(join(first, key))} too"
                            self._mistake(join(path, key), said, "take one of them out")

    def _check_emulators(self, functions: dict[str, Any]) -> None:
        """All names of one emulator share its one place for an invocation, so they share the rate too."""
        rates: dict[str, tuple[Any, str]] = {}
        for name, function in functions.items():
            match function:
                case {"protocol": "rie", "url": str() as url}:
                    path, rate = join("functions", name), function.get("max_invocations_per_second")
                    expected, first = rates.setdefault(url, (rate, path))
                    if rate != expected:
                        said = f"is another one than that of {first}, which has the same url and takes one invocation"
                        self._mistake(f"{path}.max_invocations_per_second", f"{said} at a time", "give both the same")

    def _check_mappings(self, items: list[Any], functions: list[str]) -> None:
        uuids: dict[str, str] = {}
        pairs: dict[tuple[str, str], str] = {}
        for index, item in enumerate(items):
            path = f"event_source_mappings[{index}]"
            if not isinstance(item, dict):
                continue
            problems = check_create(item, declared=True, now=self._now)
            for problem in problems:
                where = f"{path}.{problem.path}"
                if problem.said:
                    place = self._places.get(where)
                    value = place.value if place and not problem.said.startswith("is not a known key") else None
                    self._mistake(where, problem.said, problem.hint, value=value)
                else:
                    self._mistake(where, self._masked(problem.message.rstrip("."), path), problem.hint)
            broken = {problem.path for problem in problems}
            if not broken & {"EventSourceArn", "FunctionName"}:
                source = parse_source(item["EventSourceArn"])
                function, _ = resolve_function(item["FunctionName"], {}, source)
                pair = (source.arn, function.arn)
                if self._is_new(pairs, pair, path, "source and function") and item.get("UUID") is None:
                    self._is_new(uuids, derived_uuid(*pair), path, "UUID")
                self._check_name(f"{path}.FunctionName", item["FunctionName"], function, functions, source)
            if isinstance(item.get("UUID"), str) and "UUID" not in broken:
                self._is_new(uuids, item["UUID"].lower(), f"{path}.UUID", "UUID")

    def _is_new(self, seen: dict[Any, str], key: Any, path: str, what: str) -> bool:
        """Is the key not in `seen`, where it is then put with its path? Else it is a mistake that names both lines."""
        first = seen.setdefault(key, path)
        if first != path:
            said = f"has the same {what} as the mapping on line {self._line(first)}"
            self._mistake(path, said, "take one of them out or change it")
        return first == path

    def _check_name(
        self, path: str, given: str, function: FunctionSpec, functions: list[str], source: SourceSpec
    ) -> None:
        """Warn where a FunctionName that means a real Lambda function was probably meant as a configured one."""
        shown = "the name" if path in self._filled else dumps(given)
        if function.name in functions:
            if function.arn.split(":")[3:5] != [source.region, source.account]:
                remedy = f'write "{function.name}" for the one under functions'
                self._warn(path, f"{shown} means a real Lambda function of another account than the source; {remedy}")
        elif near := nearest(function.name, tuple(functions), _TYPO):
            self._warn(path, f'{shown} is not under functions and means a real Lambda function; did you mean "{near}"?')

    def _masked(self, message: str, path: str) -> str:
        """A message about the mapping at a path, without the values in it that came through `${...}`."""
        for place in self._filled:
            value = self._places[place].value
            if place.startswith(path) and isinstance(value, str) and value:
                message = message.replace(value, "***")
        return message

    # --- settings

    def _build(self, values: dict[str, Any]) -> Settings:
        """The settings of values without mistakes; absent ones keep the defaults of `Settings`."""
        values = _given(values)
        aws = values.get("aws", {})
        server = _renamed(values.get("server", {}))
        if "auth" in server:
            entries = server["auth"] if isinstance(server["auth"], list) else [server["auth"]]
            server["auth"] = tuple(
                AccessKeys(tuple(entry["access_keys"].items()))
                if entry["type"] == "sigv4"
                else BearerAuth(entry["token"])
                for entry in entries
            )
        if "tls" in server:
            server["tls"] = ServerTls(**server["tls"], place=f"{self._path}:{self._line('server.tls')}")
        settings: dict[str, Any] = {
            "path": self._path,
            "aws": AwsSettings(**{**aws, "endpoint_urls": tuple(aws.get("endpoint_urls", {}).items())}),
            "functions": {name: _function(name, given) for name, given in values.get("functions", {}).items()},
            "mappings": tuple(self._declared(values.get("event_source_mappings", []))),
            "server": ServerSettings(**server),
            "log": LogSettings(**values.get("log", {})),
            "retry": RetrySettings(**_renamed(values.get("retry", {}))),
            "limits": LimitSettings(**values.get("limits", {})),
            "tracing": TracingSettings(**values["tracing"]) if "tracing" in values else None,
            "warnings": tuple(self._warnings),
            "filled": frozenset(self._secrets),
        }
        if "store" in values:
            settings["store"] = _store_settings(values["store"])
            if isinstance(settings["store"], DynamoStoreSettings):
                settings["checkpoint_interval"] = _DYNAMO_INTERVAL
        if "checkpoint_interval_seconds" in values:
            settings["checkpoint_interval"] = float(values["checkpoint_interval_seconds"])
        if "lease_seconds" in values:
            settings["lease_duration"] = float(values["lease_seconds"])
        if "shutdown_grace_seconds" in values:
            settings["shutdown_grace"] = float(values["shutdown_grace_seconds"])
        return Settings(**settings)

    def _declared(self, items: list[dict[str, Any]]) -> Iterator[Declared]:
        for index, item in enumerate(items):
            function, _ = resolve_function(item["FunctionName"], {}, parse_source(item["EventSourceArn"]))
            uuid = item.get("UUID") or derived_uuid(item["EventSourceArn"], function.arn)
            yield Declared(uuid.lower(), normalize(item), self._line(f"event_source_mappings[{index}]"))


def _missing_package() -> str | None:
    """The first package of the extra `tracing` that is not installed. Nothing is imported."""
    for package in _TRACING_PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return package
    return None


def _secret_file(name: str) -> str:
    """The text of a file that `${file:...}` names, without one trailing line break. ValueError: why there is none."""
    remedy = "give a readable text file"
    try:
        with Path(name).open("rb") as file:
            data = file.read(_MAX_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise ValueError(f"the file {name!r} cannot be read: {reason}; {remedy}") from None
    if len(data) > _MAX_SECRET_BYTES:
        raise ValueError(f"the file {name!r} is larger than {_MAX_SECRET_BYTES} bytes; {remedy}")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the file {name!r} is not UTF-8 text; {remedy}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _public(path: str) -> str:
    """A path as a mistake names it: without access key ids, where a secret stands if somebody swapped the two."""
    return re.sub(r"(\.access_keys)\..*", r"\1", path)


def _shown(value: Any) -> str:
    """A plain value as a mistake shows it; empty when it may hold a secret, as a URL with `@` or `?` may."""
    if value is None or isinstance(value, dict | list | _Unfilled):
        return ""
    text = dumps(value, ensure_ascii=False)
    if isinstance(value, str) and re.search(r"[@?]", value):
        return ""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _given(value: Any) -> Any:
    """The value without nulls, which mean the same as absent keys."""
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return value


def _renamed(section: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section without their unit: `Settings` knows only seconds."""
    return {key.removesuffix("_seconds"): value for key, value in section.items()}


def _function(name: str, given: dict[str, Any]) -> FunctionSettings:
    if "lambda" in given:
        rest = {key: value for key, value in _renamed(given).items() if key != "lambda"}
        return LambdaFunction(name, given["lambda"], **rest)
    fields = {**_renamed(given), "headers": tuple(given.get("headers", {}).items())}
    if "auth" in given:
        fields["auth"] = _auth(given["auth"])
    if "tls" in given:
        fields["tls"] = TlsSettings(**given["tls"])
    return HttpFunction(name, **fields)


def _auth(given: dict[str, Any]) -> Auth:
    match given:
        case {"type": "bearer"}:
            return BearerAuth(given["token"])
        case {"type": "basic"}:
            return BasicAuth(given["username"], given["password"])
        case _:
            return SigV4Auth(**{key: value for key, value in given.items() if key != "type"})


def resolved(settings: Settings) -> str:
    """What `validate` prints: a block for each declared mapping in the file's order, defaults in, no secrets."""
    blocks = []
    for declared in settings.mappings:
        source = parse_source(declared.document["EventSourceArn"])
        spec, function = resolve_function(declared.document["FunctionName"], settings.functions, source)
        target = _safe_url(function.url) if isinstance(function, HttpFunction) else f"Lambda function {function.arn}"
        lines = [
            f"mapping {declared.uuid}",
            f"  declared: {settings.path}:{declared.line}",
            f"  source: {source.kind} {source.arn}",
            f"  function: {spec.arn} -> {target}",
            *(
                f"  {name}: {value if isinstance(value, str) else dumps(value)}"
                for name, value in declared.document.items()
                if name not in {"EventSourceArn", "FunctionName"}
            ),
        ]
        blocks.append("\n".join(lines))
    text = "\n\n".join(blocks)
    for secret in settings.secrets():
        text = text.replace(secret, "***")
    return text or f"{settings.path} declares no event source mappings"


def _safe_url(url: str) -> str:
    """A URL without its query, which may carry a key."""
    parts = urlsplit(url)
    return SplitResult(parts.scheme, parts.netloc, parts.path, "***" if parts.query else "", "").geturl()
