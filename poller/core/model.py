"""The nouns of the poller: plain immutable values. Standard library only, no clock, no I/O.

Durations are seconds, instants are epoch seconds, both float. Sequence numbers stay the decimal text that AWS sends
(21 to 56 digits) and are compared as integers, never as text.
"""

import json
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import Any, NamedTuple, TypeAlias

ShardId: TypeAlias = str
MappingId: TypeAlias = str

MAX_PAYLOAD_BYTES = 6_291_456  # of one invocation; AWS's 413 text
MOST_DIGITS = 128  # of a sequence number; AWS's have 21 to 56, and with more than 4,300 Python makes no integer
NO_LIMIT = -1  # MaximumRetryAttempts and MaximumRecordAgeInSeconds


class SourceKind(StrEnum):
    """What can be polled; the value is the `source` label of every metric."""

    KINESIS = "kinesis"
    DYNAMODB = "dynamodb"
    SQS = "sqs"

    @property
    def is_stream(self) -> bool:
        """Sharded and ordered, with positions; else a queue."""
        return self is not SourceKind.SQS


class Trace(NamedTuple):
    """The trace that something belongs to, as the headers that say so; empty where there is none."""

    xray: str = ""
    """`X-Amzn-Trace-Id`. That of a record is whatever its producer wrote."""
    parent: str = ""
    """`traceparent`, W3C Trace Context version 00, checked."""
    state: str = ""
    """`tracestate`: one line of printable ASCII; only with `parent`."""


NO_TRACE = Trace()


class Record(NamedTuple):
    """One record or message, encoded once to the JSON object that the Lambda event carries.

    A named tuple because it is the one value that is made per record: it is built three times faster than a frozen
    dataclass, and the garbage collector stops tracking it.
    """

    id: str
    """Sequence number or message id, as the source spells it."""
    key: str
    """What order is kept within: partition key, whole item key or message group; empty when unordered."""
    arrival: float
    """When the source got it."""
    wire: bytes
    """The record as one JSON object of the Lambda event's `Records` list."""
    handle: str = ""
    """SQS receipt handle."""
    expires: float = inf
    """When its visibility ends (queues)."""
    trace: Trace = NO_TRACE
    """That came with it."""


class PositionKind(StrEnum):
    """Where to read from. AT and AFTER carry a sequence number, AT_TIMESTAMP and LATEST epoch seconds."""

    TRIM_HORIZON = "TRIM_HORIZON"
    LATEST = "LATEST"
    AT_TIMESTAMP = "AT_TIMESTAMP"
    AT = "AT_SEQUENCE_NUMBER"
    AFTER = "AFTER_SEQUENCE_NUMBER"
    END = "SHARD_END"


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a shard. LATEST with a value means: the tip as it was at that moment of the server's clock."""

    kind: PositionKind
    value: str = ""


def position_of(kind: str, value: str) -> Position:
    """A position as a store keeps it. ValueError: it is none, for somebody edited it."""
    position = Position(PositionKind(kind), value)
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no value of {kind}")  # noqa: TRY004 - whatever type it has, it was edited
    match position.kind:
        case PositionKind.AT | PositionKind.AFTER:
            is_sound = value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS
        case PositionKind.AT_TIMESTAMP | PositionKind.LATEST:
            is_sound = 0 <= float(value) < inf if value else position.kind is PositionKind.LATEST
        case _:
            is_sound = value == ""
    if not is_sound:
        raise ValueError(f"{value!r} is no value of {kind}")
    return position


def resume_of(text: str) -> tuple[tuple[int, ...], ...]:
    """The vectors of a checkpoint from the JSON that a store keeps. ValueError, TypeError: somebody edited it."""
    try:
        vectors = json.loads(text)
    except RecursionError:
        vectors = None
    if not isinstance(vectors, list) or not all(
        isinstance(vector, list) and vector and all(type(floor) is int and floor >= 0 for floor in vector)
        for vector in vectors
    ):
        raise ValueError("its resume vectors are no lists of sequence numbers")
    return tuple(map(tuple, vectors))


TRIM_HORIZON = Position(PositionKind.TRIM_HORIZON)
END = Position(PositionKind.END)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a shard goes on after a restart: everything before `position` is settled.

    `resume`: vectors of per-lane floors. A record whose sequence is below `vector[crc32(key) % len(vector)]` of any
    vector is settled although it lies after the position, because its lane ran ahead of a blocked one.
    `window`: the open tumbling window and its state, empty when none is; saved in the same write as the position, or a
    crash would count records twice.
    """

    position: Position
    resume: tuple[tuple[int, ...], ...] = ()
    window: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """One listed shard. `parents` has none, one (split, DynamoDB roll) or two (Kinesis merge) ids."""

    id: ShardId
    parents: tuple[ShardId, ...] = ()
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """All pages of a shard listing, and the server's clock (its Date header) when it was made."""

    shards: tuple[Shard, ...]
    at: float


@dataclass(frozen=True, slots=True)
class Fetch:
    """One answer to a read.

    `newest`: sequence number of the last record read, filtered ones included; empty when none was read.
    `next_iterator`: None means the shard is closed and read to its end.
    `lag`: seconds behind the tip; 0 at the tip, None when the source does not say (DynamoDB).
    `read`: records in the answer before any of them was filtered or dropped.
    """

    records: tuple[Record, ...]
    newest: str
    next_iterator: str | None
    lag: float | None
    nbytes: int
    read: int


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """The event source of a mapping, taken apart. `name` is the stream's, table's or queue's.

    `fan_out`: `arn` is that of a stream's registered consumer (enhanced fan-out), not the stream's own. `role`: the ARN
    of the role that it is read with; None: with the daemon's own credentials.
    """

    kind: SourceKind
    arn: str
    region: str
    account: str
    name: str
    fifo: bool = False
    fan_out: bool = False
    role: str | None = None


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """What a mapping invokes. `name` is the key under `functions:`, or the name of a real Lambda function."""

    name: str
    arn: str
    """As the API echoes it, with a qualifier only if the mapping was made with one."""
    role: str
    """`invokeIdentityArn` of Kinesis events."""


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How records become batches. `buffer_records` bounds what a shard holds in memory. `tumbling`: seconds, 0 off."""

    size: int
    window: float = 0.0
    factor: int = 1
    tumbling: float = 0.0
    max_bytes: int = MAX_PAYLOAD_BYTES
    buffer_records: int = 10_000


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """What a failed batch may cost. `attempts` is MaximumRetryAttempts (N means N + 1 invocations); -1 no limit."""

    attempts: int = NO_LIMIT
    max_age: float = NO_LIMIT
    report_failures: bool = False


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How a queue is received from. A receive loop has one batch at a time, so loops are concurrent invocations too.

    `ceiling`: most loops, the least of MaximumConcurrency, MaximumPollers and `Options.MaximumReceivers`. `floor`:
    loops that receive even from an idle queue. `growth`: loops a minute that may be added while replies are full.
    `shared`: MaximumConcurrency or MaximumPollers, which hold for the whole fleet; None without them.
    """

    ceiling: int = 1250
    floor: int = 1
    growth: float = 300.0
    circuit_breaker: bool = True
    shared: int | None = None


@dataclass(frozen=True, slots=True)
class FailureDestination:
    """`DestinationConfig.OnFailure`: an ARN or URL, and `Options.IncludePayload`."""

    target: str
    include_payload: bool = False


@dataclass(frozen=True, slots=True)
class Mapping:
    """One configured pipe. Equal mappings run the same way, so a reload compares them.

    `filters`: the pattern texts of FilterCriteria; a record that matches any is delivered, all are when there is none.
    `declared_in`: the config file that declares it, or None when it was made through the API.
    """

    id: MappingId
    source: SourceSpec
    function: FunctionSpec
    batch: BatchPolicy
    retry: RetryPolicy
    start: Position
    enabled: bool = True
    queue: QueuePolicy = QueuePolicy()
    filters: tuple[str, ...] = ()
    destination: FailureDestination | None = None
    declared_in: str | None = None


class Window(NamedTuple):
    """The tumbling window that an invocation belongs to. `state`: JSON, as the last answer of the window had it."""

    start: float
    end: float
    state: bytes
    is_final: bool
    is_early: bool


class Batch(NamedTuple):
    """Work: records to invoke with, none in the final invocation of a tumbling window. `attempt` counts every try at
    this batch, from 1.
    """

    lane: int
    records: tuple[Record, ...]
    attempt: int
    window: Window | None = None


class DiscardReason(StrEnum):
    """`requestContext.condition` of a failure record."""

    RETRIES = "RetryAttemptsExhausted"
    AGE = "RecordAgeExceeded"


class Discard(NamedTuple):
    """Work: records that are given up, none for a tumbling window whose final invocation is. `attempts`: invocations
    that counted; a failure record shows at least 1. `window`: as the last invocation had it.
    """

    lane: int
    records: tuple[Record, ...]
    reason: DiscardReason
    attempts: int
    window: Window | None = None


Work: TypeAlias = Batch | Discard


class ResponseContext(NamedTuple):
    """What the function answered last, as a failure record shows it. `function_error`: Unhandled, or None when it
    answered but named failures or gave a malformed list.
    """

    status_code: int
    executed_version: str
    function_error: str | None


@dataclass(frozen=True, slots=True)
class Notice:
    """A discarded batch, for its failure destination.

    `request_id`: of its last invocation, a new one without any. `attempts`: invocations that counted, at least 1.
    `response`: None without an answer, and for RecordAgeExceeded. `at`: when it was given up. `window`: the tumbling
    window whose invocation failed; its final one has no records.
    """

    mapping: Mapping
    shard: ShardId
    records: tuple[Record, ...]
    reason: DiscardReason
    attempts: int
    request_id: str
    at: float
    response: ResponseContext | None = None
    window: Window | None = None


class Invocation(NamedTuple):
    """One call of a target. `key` is the Idempotency-Key: the same for every attempt at the same batch. `trace`: what
    the target is told.
    """

    mapping: MappingId
    request_id: str
    attempt: int
    key: str
    payload: bytes
    trace: Trace = NO_TRACE


class ReplyStatus(StrEnum):
    """What became of one invocation, as far as the transport can tell."""

    OK = "ok"
    FUNCTION_ERROR = "function_error"
    TIMEOUT = "timeout"  # it may have run: counted
    TOO_LARGE = "too_large"  # refused for its size: counted
    THROTTLED = "throttled"  # never ran: not counted
    UNREACHABLE = "unreachable"  # never ran: not counted


@dataclass(frozen=True, slots=True)
class Reply:
    """A target's answer. `error` is a sentence for a human, empty when OK; it never holds a secret or a payload.

    `status_code` and `executed_version` go into a failure record's responseContext; None when there was no answer.
    `retry_after`: seconds that a throttling target asked for.
    """

    status: ReplyStatus
    body: bytes = b""
    error: str = ""
    status_code: int | None = None
    executed_version: str = "$LATEST"
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Delivered:
    """Every record of the batch is settled. `state`: of the tumbling window, where the mapping has them."""

    state: bytes | None = None


@dataclass(frozen=True, slots=True)
class Partial:
    """A batch response named failures. Streams: `index` is the first failed record's place in the batch, all before
    it are settled. Queues: `failed` are the message ids that stay; all others are settled. `delays`: seconds until such
    a message may be received again, where the answer said so; the others' visibility is left alone.
    """

    index: int = 0
    failed: frozenset[str] = frozenset()
    delays: tuple[tuple[str, float], ...] = ()
    state: bytes | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that counts."""

    error: str


@dataclass(frozen=True, slots=True)
class Throttled:
    """The target never ran: wait and try again, not counted."""

    error: str
    retry_after: float | None = None
    unreachable: bool = False


Outcome: TypeAlias = Delivered | Partial | Failed | Throttled


@dataclass(frozen=True, slots=True)
class Row:
    """One shard in the store: its lease and its checkpoint. `token` rises with every change of owner. `wanted_by`: a
    member of the fleet that asks the owner to hand the shard over.

    `saved_at`: when the position was last written, by the store's clock: the shard was read until then at least; inf
    when the store does not say. It is no part of the row's identity.
    """

    shard: ShardId
    checkpoint: Checkpoint
    parents: tuple[ShardId, ...] = ()
    owner: str | None = None
    token: int = 0
    saved_at: float = field(default=inf, compare=False)
    wanted_by: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to read a shard and to write its row while the store's token is this one."""

    mapping: MappingId
    shard: ShardId
    owner: str
    token: int


@dataclass(frozen=True, slots=True)
class Member:
    """One daemon of a fleet. `beat` rises while it lives; `info`: what the others should know of it, as JSON."""

    id: str
    beat: int
    info: MappingABC[str, Any] = field(default_factory=dict)


class ShardState(StrEnum):
    """Where a shard's worker is; `poller_shards{state}` counts them."""

    BLOCKED = "blocked"  # a parent is not done
    OPEN = "open"  # may be read, nobody here has the lease
    STARTING = "starting"  # lease held, no iterator yet
    RUNNING = "running"
    ENDING = "ending"  # read to its end, lanes still hold records
    DRAINING = "draining"  # leaving: what is in flight ends
    DONE = "done"
    LOST = "lost"  # the lease was


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One shard as an operator sees it. Instants, not ages: whoever shows it subtracts.

    `batch_arrival`: arrival of the last record of the batch in work, None at the tip (iterator age 0).
    `oldest_arrival`: arrival of the oldest record not yet done, None when nothing is pending.
    `blocked_since`: when the oldest failing batch first failed. `attempts` and the sequences are that batch's.
    `lease`: owned (by this process), other, free or expired; empty where nobody needs one. `owner`: whose it is.
    """

    id: ShardId
    state: ShardState
    lag: float | None = None
    batch_arrival: float | None = None
    oldest_arrival: float | None = None
    blocked_since: float | None = None
    in_flight: int = 0
    held: int = 0
    attempts: int = 0
    first_sequence: str | None = None
    last_sequence: str | None = None
    last_error: str | None = None
    next_attempt: float | None = None
    lease: str = ""
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class MappingStatus:
    """One mapping as an operator sees it. `state` is the ESM API's; `reason` says what is wrong, empty when nothing is.

    `retention`: seconds that the source keeps a record, None when unknown or a queue. `breaker`: closed, open, probing.
    `receivers` and `receiver_limit`: a queue's receive loops now, and how many there may be now; None for streams.
    `seek_pending`: its positions are to be moved, once it runs. `last_result`: LastProcessingResult. `declared_in`: the
    config file that declares it, None when it was made through the API.
    """

    id: MappingId
    function: str
    source: SourceKind
    source_arn: str
    state: str
    reason: str = ""
    in_flight: int = 0
    breaker: str = "closed"
    retention: float | None = None
    receivers: int | None = None
    receiver_limit: int | None = None
    seek_pending: bool = False
    last_result: str = ""
    declared_in: str | None = None
    shards: tuple[ShardStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What a stream says of itself. `retention`: seconds that it keeps a record. `incarnation`: another one when the
    stream was deleted and made anew under its name; empty when that cannot be known.
    """

    retention: float
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class StreamTraits:
    """How a kind of stream is read.

    `fetch_limit`: records that one read may ask for. `tip_interval`: seconds between reads at the tip, `min_interval`
    while behind. `has_timestamps`: knows AT_TIMESTAMP iterators (Kinesis does, DynamoDB Streams does not).
    `is_pushed`: a read waits until the source sends something, so no room is reserved meanwhile.
    `operations`: what getting an iterator and reading are called in the metrics.
    """

    fetch_limit: int
    tip_interval: float
    has_timestamps: bool
    min_interval: float = 0.2  # 5 GetRecords a second a shard is AWS's limit
    is_pushed: bool = False
    operations: tuple[str, str] = ("GetShardIterator", "GetRecords")
