"""The config file as frozen values, after `config.py` has read, filled and checked it. Secrets stay out of reprs."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class AwsSettings:
    """Where AWS is. What is None comes from the standard chain (environment, profile, IRSA, IMDS, ECS)."""

    region: str | None = None
    endpoint_url: str | None = None
    endpoint_urls: tuple[tuple[str, str], ...] = ()

    def endpoint(self, service: str) -> str | None:
        """The endpoint of a service id as botocore spells it (`dynamodbstreams`), None for AWS's own."""
        return dict(self.endpoint_urls).get(service, self.endpoint_url)


@dataclass(frozen=True, slots=True)
class BearerAuth:
    """`Authorization: Bearer TOKEN`."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class BasicAuth:
    """`Authorization: Basic`."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SigV4Auth:
    """AWS Signature Version 4 with the daemon's credentials. `region` None: that of `aws.region`."""

    service: str = "lambda"
    region: str | None = None


@dataclass(frozen=True, slots=True)
class AccessKeys:
    """Who may sign requests to our own server with AWS Signature Version 4: secrets by access key id."""

    secrets: tuple[tuple[str, str], ...] = field(repr=False)


_SHORTEST_SECRET = 8

Auth: TypeAlias = BearerAuth | BasicAuth | SigV4Auth


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Files: a CA bundle to trust instead of the system's, and a client certificate with its key."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class HttpFunction:
    """`functions.NAME` with `url`. `protocol` rie: the Lambda Runtime Interface Emulator's answers."""

    name: str
    url: str = field(repr=False)  # its query may carry a key
    timeout: float = 30.0
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    auth: Auth | None = None
    max_concurrency: int | None = None
    max_invocations_per_second: float | None = None
    protocol: Literal["http", "rie"] = "http"
    tls: TlsSettings | None = None


@dataclass(frozen=True, slots=True)
class LambdaFunction:
    """`functions.NAME` with `lambda`, or one that only AWS knows. `arn`: name, partial or full ARN, qualifier kept."""

    name: str
    arn: str
    timeout: float = 900.0
    max_concurrency: int | None = None
    max_invocations_per_second: float | None = None
    is_configured: bool = True


FunctionSettings: TypeAlias = HttpFunction | LambdaFunction

# What an HTTP target's client or the poller decides for each request; a configured value would break the framing or the
# contract. `Accept` and `Host` may be configured.
_RESERVED_HEADERS = frozenset(
    (
        *("accept-encoding", "connection", "content-length", "content-type", "expect", "keep-alive", "te", "trailer"),
        *("transfer-encoding", "upgrade", "user-agent"),
        *("idempotency-key", "traceparent", "tracestate", "x-amzn-trace-id"),
        *("x-amz-date", "x-amz-security-token"),  # of a signature
    )
)


def is_reserved_header(name: str) -> bool:
    """Is it a header that the poller sets itself, so that `functions.NAME.headers` must not have it? In any case."""
    return name.lower() in _RESERVED_HEADERS or name.lower().startswith("x-poller-")


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """`sqlite:///PATH` (absolute) or `sqlite:./PATH` (relative to the working directory)."""

    url: str
    path: str


_DEFAULT_STORE = StoreSettings("sqlite:///var/lib/poller/poller.db", "/var/lib/poller/poller.db")


@dataclass(frozen=True, slots=True)
class DynamoStoreSettings:
    """`dynamodb://TABLE[?region=REGION&endpoint_url=URL&create=true]`; what is absent comes from `aws`."""

    url: str
    table: str
    region: str | None = None
    endpoint_url: str | None = None
    create: bool = False


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files of our own server, PEM: its certificate with what it is issued by, and the key. `place`: FILE:LINE of
    `server.tls` in the config.
    """

    cert: str
    key: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`port` 0 takes a free one. `auth`: any of the tokens and keys opens the mapping API and the status page. `tls`
    None: plain http.
    """

    host: str = "127.0.0.1"
    port: int = 9477
    auth: tuple[BearerAuth | AccessKeys, ...] = ()
    tls: ServerTls | None = None


@dataclass(frozen=True, slots=True)
class LogSettings:
    """`format` None: console on a terminal, else json. `payloads`: of each invocation, at level debug."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] | None = None
    payloads: bool = False


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """Backoff of a failing batch: full jitter between 0 and `initial * 2^n`, at most `maximum`."""

    initial_backoff: float = 0.2
    maximum_backoff: float = 60.0


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """`buffer_bytes`: records held in memory by the whole process, all shards and queues together. `shard_series`:
    shards that have series of their own in the metrics; the worst ones, when there are more.
    """

    buffer_bytes: int = 64 * 1024 * 1024
    shard_series: int = 10_000


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """`endpoint`: of an OTLP/HTTP receiver; `/v1/traces` follows unless the path ends with it."""

    endpoint: str = field(repr=False)  # its query may carry a key


@dataclass(frozen=True, slots=True)
class Declared:
    """One item of `event_source_mappings`: AWS's own request, with every default filled in, and where it stands."""

    uuid: str
    document: dict[str, Any]
    line: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole file."""

    path: str
    aws: AwsSettings = AwsSettings()
    functions: dict[str, FunctionSettings] = field(default_factory=dict)
    mappings: tuple[Declared, ...] = ()
    store: StoreSettings | DynamoStoreSettings = _DEFAULT_STORE
    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    retry: RetrySettings = RetrySettings()
    limits: LimitSettings = LimitSettings()
    tracing: TracingSettings | None = None
    checkpoint_interval: float = 0.1
    lease_duration: float = 10.0
    shutdown_grace: float = 25.0
    stamp: tuple[int, int, int] | None = field(default=None, compare=False)
    """Of the file, before it was read: it may have changed since."""
    filled: frozenset[str] = field(default=frozenset(), repr=False)
    """What came through `${...}`: perhaps secrets."""
    warnings: tuple[str, ...] = ()
    """What is legal but looks wrong, each `FILE:LINE: place: sentence`, for the log and `validate`."""

    def secrets(self) -> frozenset[str]:
        """Every value that must not be shown: tokens, passwords, header values, and what came through `${...}`.

        Header values and filled values of less than 8 characters are no secrets: masked, a port or a region would black
        out half of every log line.
        """
        found = {value for value in self.filled if len(value) >= _SHORTEST_SECRET}
        for entry in self.server.auth:
            found |= {entry.token} if isinstance(entry, BearerAuth) else {secret for _, secret in entry.secrets}
        for function in self.functions.values():
            if isinstance(function, HttpFunction):
                found.update(value for _, value in function.headers if len(value) >= _SHORTEST_SECRET)
                match function.auth:
                    case BearerAuth(token=token):
                        found.add(token)
                    case BasicAuth(password=password):
                        found.add(password)
                    case _:
                        pass
        query = self.tracing.endpoint.partition("?")[2] if self.tracing else ""
        if len(query) >= _SHORTEST_SECRET:
            found.add(query)
        return frozenset(found)
