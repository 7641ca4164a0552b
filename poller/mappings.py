"""Event source mapping documents: AWS's CreateEventSourceMapping request, its rules, its texts and its answers.

One table, `FIELDS`, says which fields there are; the config file, the mapping API and the JSON Schema all use it.
Documents are plain JSON values with AWS's names. Sources of the rules: the Lambda API reference and service model, and
the answers of the real service where they differ.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple
from uuid import UUID, uuid5

from poller.clock import wall_clock
from poller.core.filters import INVALID_PATTERN, MAX_PATTERN_CHARACTERS, MAX_PATTERNS, Filter, PatternError
from poller.core.model import (
    MAX_PAYLOAD_BYTES,
    NO_LIMIT,
    TRIM_HORIZON,
    BatchPolicy,
    FailureDestination,
    FunctionSpec,
    MappingId,
    Position,
    PositionKind,
    QueuePolicy,
    RetryPolicy,
    SourceKind,
    SourceSpec,
)
from poller.core.model import Mapping as RunnableMapping
from poller.errors import PollerError
from poller.settings import FunctionSettings, LambdaFunction
from poller.shapes import (
    Choice,
    Fault,
    Field,
    Flag,
    Instant,
    ListOf,
    MapOf,
    Object,
    Shape,
    Text,
    Whole,
    check,
    epoch,
    expected,
    join,
    nearest,
)

LEAST_BUFFER_RECORDS = 2_000
MOST_BUFFER_RECORDS = (
    100_000  # the largest BatchSize times the largest ParallelizationFactor: some lane can always fill
)
_MAX_BARE_NAME = 64
_MIN_RECORD_AGE = 60
_FIFO_BATCH = 10
_NAMESPACE = UUID("5d1c3f43-2f0b-5f3e-9c53-8a1f8d7f6f0e")  # of derived UUIDs; changing it would orphan positions

_STREAMS = frozenset({SourceKind.KINESIS, SourceKind.DYNAMODB})
_QUEUES = frozenset({SourceKind.SQS})
_ALL = _STREAMS | _QUEUES

_INVALID = "InvalidParameterValueException"
_VALIDATION = "ValidationException"
MAX_TAGS = 50
TOO_MANY_TAGS = "Number of tags exceeds resource tag limit."
_UNRECOGNIZED = "Unrecognized event source."

_ARN = r"arn:(?P<partition>aws[a-zA-Z0-9-]*)"
# A name, a partial ARN (account:function:name) or a full ARN, each with an optional qualifier.
_FUNCTION = re.compile(
    rf"(?:{_ARN}:lambda:(?P<region>[a-z0-9-]+):(?P<owner>[0-9]{{12}}):function:|(?P<account>[0-9]{{12}}):function:)?"
    r"(?P<name>[a-zA-Z0-9_-]+)(?::(?P<qualifier>\$LATEST|[a-zA-Z0-9_-]+))?"
)
_PLACE = r":(?P<region>[a-z0-9-]+):(?P<account>[0-9]{12}):"
_SOURCES = {
    SourceKind.KINESIS: re.compile(
        _ARN
        + ":kinesis"
        + _PLACE
        + r"stream/(?P<name>[a-zA-Z0-9_.-]{1,128})(?P<consumer>/consumer/[a-zA-Z0-9_.-]{1,128}:[0-9]{1,20})?"
    ),
    SourceKind.DYNAMODB: re.compile(
        _ARN + ":dynamodb" + _PLACE + r"table/(?P<name>[a-zA-Z0-9_.-]{1,255})/stream/[a-zA-Z0-9:._-]{1,64}"
    ),
    SourceKind.SQS: re.compile(_ARN + ":sqs" + _PLACE + r"(?P<name>[a-zA-Z0-9_-]{1,80}|[a-zA-Z0-9_-]{1,75}\.fifo)"),
}
_DESTINATION = re.compile(
    r"arn:aws[a-zA-Z0-9-]*:(sqs|sns|events):[a-z0-9-]+:[0-9]{12}:.+|arn:aws[a-zA-Z0-9-]*:s3:::.+|https?://.+|file:///.+"
)
_ROLE = r"arn:aws[a-zA-Z0-9-]*:iam::[0-9]{12}:role/[a-zA-Z0-9_+=,.@/-]{1,576}"
_UUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"


class Problem(NamedTuple):
    """One thing wrong with a mapping document.

    `path`: the field, as `BatchSize` or `FilterCriteria.Filters[0].Pattern`. `code` and `message`: as AWS answers; the
    message may hold the value. `hint`: what would be right, never with a value, may be empty. `said`: for people with a
    config file what is wrong in few words, to stand behind the value; empty when only the message says it.
    """

    path: str
    code: str
    message: str
    hint: str = ""
    said: str = ""


class Uses(Enum):
    """Which documents may have a field."""

    CREATE = "create"
    BOTH = "create and update"
    FILE = "config file"


@dataclass(frozen=True, slots=True)
class MappingField:
    """One field of the request. `queue_default`: the default of queues where it is another one than of streams."""

    name: str
    shape: Shape
    about: str
    sources: frozenset[SourceKind] = _ALL
    uses: Uses = Uses.BOTH
    default: Any = None
    queue_default: Any = None


def _function_name(name: str) -> tuple[str, str] | None:
    parts = _FUNCTION.fullmatch(name)
    if parts and not (parts["owner"] or parts["account"]) and len(parts["name"]) > _MAX_BARE_NAME:
        return "is too long", f"give a function name of at most {_MAX_BARE_NAME} characters"
    return None


def _tag_text(text: str) -> tuple[str, str] | None:
    if all(character in "_.:/=+-@" or unicodedata.category(character)[0] in "LNZ" for character in text):
        return None
    return "has a character that tags do not have", "use letters, digits, blanks and _ . : / = + - @"


def _tag_key(key: str) -> tuple[str, str] | None:
    if key.lower().startswith("aws:"):
        return "begins with aws:, which is AWS's own", "give another key"
    return _tag_text(key)


FUNCTION_NAME = Text(
    "a function name, name:qualifier, partial ARN or full ARN",
    1,
    256,
    re.sub(r"\?P<\w+>", "", _FUNCTION.pattern),
    _function_name,
)
_PATTERN = Text("a JSON pattern as text", most=MAX_PATTERN_CHARACTERS)
_DESTINATION_OBJECT = Object((Field("Destination", Text("an ARN or URL", most=350), "Where to send."),))

FIELDS: tuple[MappingField, ...] = (
    MappingField(
        "UUID",
        Text("a UUID such as 6d9bce8e-836b-442c-8070-74e77903c815", pattern=_UUID),
        "The mapping's UUID. Without it, it is derived from source and function.",
        uses=Uses.FILE,
    ),
    MappingField(
        "EventSourceArn",
        Text("the ARN of a Kinesis stream, a DynamoDB stream or an SQS queue", most=10_000),
        "ARN of the Kinesis stream, of a consumer registered with it (enhanced fan-out), of the DynamoDB stream (not "
        "the table) or of the SQS queue.",
        uses=Uses.CREATE,
    ),
    MappingField(
        "FunctionName",
        FUNCTION_NAME,
        "What to invoke: a name under `functions`, else a real Lambda function; name, partial or full ARN.",
    ),
    MappingField("Enabled", Flag(), "false: do not poll; the position is kept.", default=True),
    MappingField(
        "BatchSize",
        Whole(1, 10_000),
        "Most records in one invocation. FIFO queues: 10. Other queues above 10: needs a batching window.",
        default=100,
        queue_default=10,
    ),
    MappingField(
        "MaximumBatchingWindowInSeconds",
        Whole(0, 300),
        "Longest wait for more records before an invocation. Not for FIFO queues.",
        default=0,
    ),
    MappingField(
        "StartingPosition",
        Choice(("LATEST", "AT_TIMESTAMP", "TRIM_HORIZON")),
        "Where a stream mapping starts to read. AT_TIMESTAMP: Kinesis only.",
        _STREAMS,
        Uses.CREATE,
    ),
    MappingField(
        "StartingPositionTimestamp",
        Instant(),
        "With AT_TIMESTAMP: epoch seconds or an ISO 8601 date-time, not in the future.",
        _STREAMS,
        Uses.CREATE,
    ),
    MappingField(
        "ParallelizationFactor",
        Whole(1, 10),
        "How many batches of one shard run at once; order holds per partition key.",
        _STREAMS,
        default=1,
    ),
    MappingField(
        "MaximumRecordAgeInSeconds",
        Whole(-1, 604_800),
        "Older records are discarded. -1: no limit; else at least 60.",
        _STREAMS,
        default=NO_LIMIT,
    ),
    MappingField(
        "MaximumRetryAttempts",
        Whole(-1, 10_000),
        "Retries before a batch is discarded. -1: no limit; 0: one invocation.",
        _STREAMS,
        default=NO_LIMIT,
    ),
    MappingField(
        "BisectBatchOnFunctionError",
        Flag(),
        "Only false: failed batches are never split. See FunctionResponseTypes.",
        _STREAMS,
        default=False,
    ),
    MappingField(
        "FunctionResponseTypes",
        ListOf(Choice(("ReportBatchItemFailures",)), most=1),
        "[ReportBatchItemFailures]: the function's answer names the records that failed.",
        default=[],
    ),
    MappingField(
        "DestinationConfig",
        Object(
            (
                Field("OnFailure", _DESTINATION_OBJECT, "Gets a record about each discarded batch."),
                Field("OnSuccess", _DESTINATION_OBJECT, "Not for event source mappings."),
            )
        ),
        "Where discarded batches are reported.",
        _STREAMS,
        default={"OnFailure": {}},
    ),
    MappingField("TumblingWindowInSeconds", Whole(0, 900), "Tumbling window; 0: off.", _STREAMS, default=0),
    MappingField(
        "FilterCriteria",
        Object(
            (
                Field(
                    "Filters",
                    ListOf(
                        Object((Field("Pattern", _PATTERN, "An EventBridge event pattern."),)),
                        most=MAX_PATTERNS,
                    ),
                    "A record that matches any of them is delivered.",
                ),
            )
        ),
        "Which records are delivered.",
    ),
    MappingField(
        "ScalingConfig",
        Object((Field("MaximumConcurrency", Whole(1, 1000), "Most invocations at once."),)),
        "Bounds of a queue mapping's concurrency.",
        _QUEUES,
    ),
    MappingField(
        "ProvisionedPollerConfig",
        Object(
            (
                Field("MinimumPollers", Whole(1, 200), "Fewest receive loops, from 2. Default: 2."),
                Field("MaximumPollers", Whole(1, 10_000), "Most receive loops. Default: 200."),
            )
        ),
        "Bounds of a queue mapping's receive loops; not together with ScalingConfig.",
        _QUEUES,
    ),
    MappingField(
        "MetricsConfig",
        Object(
            (
                Field(
                    "Metrics",
                    ListOf(Choice(("EventCount", "ErrorCount", "KafkaMetrics")), most=3),
                    "Only EventCount.",
                ),
            )
        ),
        "Echoed; the poller's metrics are always on.",
    ),
    MappingField("KMSKeyArn", Text("an empty text", most=10_000), "Refused: filter criteria are not encrypted."),
    MappingField(
        "Tags",
        MapOf(
            Text("a tag key of 1 to 128 characters", 1, 128, rule=_tag_key),
            Text("text", most=256, rule=_tag_text),
            most=MAX_TAGS,
        ),
        "Up to 50 tags; shown by ListTags.",
        uses=Uses.CREATE,
    ),
    MappingField(
        "Options",
        Object(
            (
                Field("IncludePayload", Flag(), "Failure records to SQS and SNS carry the payload where it fits."),
                Field(
                    "CircuitBreaker",
                    Flag(),
                    "false: a queue is read even while its target throttles or does not answer. Default: true.",
                ),
                Field(
                    "AssumeRoleArn",
                    Text("the ARN of a role such as arn:aws:iam::123456789012:role/NAME", 20, 2048, _ROLE),
                    "The role that the source is read with, for another account's. Default: the daemon's credentials.",
                ),
                Field("ScaleUpPerMinute", Whole(1, 10_000), "Receive loops of a queue added a minute. Default: 300."),
                Field("MaximumReceivers", Whole(1, 10_000), "Most receive loops of a queue. Default: 1250."),
            )
        ),
        "What AWS does not have.",
    ),
)
_FIELD = {field.name: field for field in FIELDS}
_OTHER_SOURCES = frozenset(
    {
        "AmazonManagedKafkaEventSourceConfig",
        "DocumentDBEventSourceConfig",
        "LoggingConfig",
        "Queues",
        "SelfManagedEventSource",
        "SelfManagedKafkaEventSourceConfig",
        "SourceAccessConfigurations",
        "Topics",
    }
)

_DESTINATION_PATH = "DestinationConfig.OnFailure.Destination"


def item_shape() -> Object:
    """A mapping document as one shape, for the config file and the JSON Schema."""
    required = {"EventSourceArn", "FunctionName"}
    return Object(tuple(Field(field.name, field.shape, field.about, field.name in required) for field in FIELDS))


# --- checks ---------------------------------------------------------------------------------------------------------


def check_create(document: Mapping[str, Any], *, declared: bool = False, now: float | None = None) -> list[Problem]:
    """Every problem of a new mapping, in AWS's order: shape, source, then the rules between fields.

    `declared`: the document stands in a config file, where it may have a `UUID`. `now`: epoch seconds, the wall clock's
    when None. Whether the function and the source exist, and duplicates, are not looked at.
    """
    uses = {Uses.CREATE, Uses.BOTH, Uses.FILE} if declared else {Uses.CREATE, Uses.BOTH}
    problems = _check_shape(document, uses)
    if document.get("FunctionName") is None:
        problems.append(
            Problem(
                "FunctionName",
                _VALIDATION,
                _constraint("functionName", "null", "Member must not be null"),
                f"give {expected(FUNCTION_NAME)}",
                "is missing",
            )
        )
    sound = _sound(document, problems)
    source, problem = _check_source(document, sound)
    if problem:
        problems.append(problem)
    if source:
        if sound.get("ProvisionedPollerConfig") == {}:  # an update clears with it
            message = "Either MinimumPollers or MaximumPollers are required if ProvisionedPollerConfig is provided."
            hint = "give one of them, or take ProvisionedPollerConfig out"
            if source.kind is SourceKind.SQS:
                problems.append(Problem("ProvisionedPollerConfig", _INVALID, message, hint))
        problems += _check_rules(sound, document, source, wall_clock() if now is None else now)
    return problems


def check_update(current: Mapping[str, Any], changes: Mapping[str, Any]) -> list[Problem]:
    """Every problem of changing a mapping: `current` is its normalized document, `changes` the request's body."""
    problems = _check_shape(changes, {Uses.BOTH})
    sound = _sound(changes, problems)
    source = parse_source(current["EventSourceArn"])
    merged = _merged(current, sound)
    # A timestamp that was in the past when the mapping was made still is.
    return problems + list(_check_rules(merged, changes, source, float("inf")))


def check_tags(tags: Any) -> list[Problem]:
    """Every problem of the tags in a TagResource request; how many a mapping has together is not looked at."""
    if tags is None:
        return [Problem("Tags", _VALIDATION, _constraint("tags", "null", "Member must not be null"))]
    if tags == {}:
        return [Problem("Tags", _INVALID, "An error occurred and the request cannot be processed.")]
    return [_from_fault(fault) for fault in check(_FIELD["Tags"].shape, tags, "Tags")]


def _check_shape(document: Mapping[str, Any], uses: set[Uses]) -> list[Problem]:
    problems: list[Problem] = []
    known = tuple(field.name for field in FIELDS if field.uses in uses)
    for name in known:
        if document.get(name) is not None:
            problems += [_from_fault(fault) for fault in check(_FIELD[name].shape, document[name], name)]
    problems += [_unknown(name, known) for name in document if name not in known]
    return problems


def _unknown(name: str, known: tuple[str, ...]) -> Problem:
    if name in _OTHER_SOURCES:
        sentence = f"{name} is for another kind of event source"
        return Problem(name, _INVALID, f"{sentence}.", "esm-poller reads Kinesis, DynamoDB Streams and SQS", sentence)
    if name in _FIELD and _FIELD[name].uses is Uses.CREATE:
        message = f"{name} cannot be changed by an update; delete the mapping and create a new one."
        return Problem(name, _INVALID, message)
    near = nearest(name, known)
    hint = f'did you mean "{near}"?' if near else f"the known keys are {', '.join(known)}"
    return Problem(join("", name), _VALIDATION, f"Unknown parameter {name!r}; {hint}", hint, "is not a known key")


def _sound(document: Mapping[str, Any], problems: Sequence[Problem]) -> dict[str, Any]:
    """The fields without a problem, nulls left out."""
    broken = {re.split(r"[.\[]", problem.path, maxsplit=1)[0] for problem in problems}
    return {
        name: _without_nulls(value)
        for name, value in document.items()
        if value is not None and name in _FIELD and name not in broken
    }


def _check_source(document: Mapping[str, Any], sound: Mapping[str, Any]) -> tuple[SourceSpec | None, Problem | None]:
    arn = sound.get("EventSourceArn")
    if arn is None:
        if document.get("EventSourceArn") is not None:
            return None, None  # its shape is wrong, which is reported already
        hint = f"give {expected(_FIELD['EventSourceArn'].shape)}"
        return None, Problem("EventSourceArn", _INVALID, _UNRECOGNIZED, hint, "is missing")
    try:
        return parse_source(arn), None
    except UnsupportedSource as error:
        said, _, hint = str(error).partition("; ")
        return error.near, Problem("EventSourceArn", _INVALID, f"EventSourceArn {error}", hint, said)
    except ValueError as error:
        said, _, hint = str(error).partition("; ")
        return None, Problem("EventSourceArn", _INVALID, _UNRECOGNIZED, hint, said)


def _check_rules(
    document: Mapping[str, Any], given: Mapping[str, Any], source: SourceSpec, now: float
) -> Iterator[Problem]:
    """Problems between the sound fields of the whole document. `given`: the request, broken fields included."""
    for name in given:
        if name in document and name in _FIELD and source.kind not in _FIELD[name].sources:
            yield _unsuitable(name, source)
    broken = {name for name, value in given.items() if value is not None and name not in document}
    fitting = {name: value for name, value in document.items() if source.kind in _FIELD[name].sources}
    document = {**_defaults(source), **fitting}
    if source.kind is SourceKind.SQS:
        own = _check_queue(document, source, broken)
    else:
        own = _check_stream(document, source, broken, now)
    yield from own
    yield from _check_common(document, source)


def _unsuitable(name: str, source: SourceSpec) -> Problem:
    hint = f"take it out; {name} is not for {_SOURCE_NAMES[source.kind]}"
    if name == "StartingPosition":
        return Problem(name, _INVALID, "StartingPosition is not valid for SQS event sources.", hint)
    return Problem(name, _INVALID, f"Unsupported {name} parameter for given event source mapping type.", hint)


def _check_queue(document: Mapping[str, Any], source: SourceSpec, broken: set[str]) -> Iterator[Problem]:
    size, window = document["BatchSize"], document["MaximumBatchingWindowInSeconds"]
    if source.fifo and window > 0:
        message = "Batching window is not supported for FIFO queues"
        yield Problem("MaximumBatchingWindowInSeconds", _INVALID, message, "take it out or give 0")
    if source.fifo and size > _FIFO_BATCH:
        message = "Batch size must not exceed 10 for FIFO queues"
        yield Problem("BatchSize", _INVALID, message, "give a whole number from 1 to 10")
    if not source.fifo and size > _FIFO_BATCH and window == 0 and "MaximumBatchingWindowInSeconds" not in broken:
        message = "Maximum batch window in seconds must be greater than 0 if maximum batch size is greater than 10"
        hint = "give MaximumBatchingWindowInSeconds 1 or more, or a BatchSize of at most 10"
        yield Problem("BatchSize", _INVALID, message, hint)
    if not document.get("ProvisionedPollerConfig"):
        return
    pollers = _PROVISIONED | document["ProvisionedPollerConfig"]
    if not _PROVISIONED["MinimumPollers"] <= pollers["MinimumPollers"] <= pollers["MaximumPollers"]:
        message = (
            "MinimumPollers should be between [2, 200] and MaximumPollers should be between [MinimumPollers, 10000]"
        )
        yield Problem("ProvisionedPollerConfig", _INVALID, message)
    if document.get("ScalingConfig"):
        message = (
            "Provisioned mode for SQS ESM does not support maximum concurrency feature. "
            "Use MaximumPollers as the control mechanism and remove maximum concurrency."
        )
        yield Problem("ScalingConfig", _INVALID, message)


def _check_stream(document: Mapping[str, Any], source: SourceSpec, broken: set[str], now: float) -> Iterator[Problem]:
    start, moment = document.get("StartingPosition"), document.get("StartingPositionTimestamp")
    if start is None and "StartingPosition" not in broken:
        message = _constraint("startingPosition", "null", "Member must not be null") + "."
        yield Problem("StartingPosition", _INVALID, message, _START_HINT, "is missing")
    elif start == "AT_TIMESTAMP" and source.kind is SourceKind.DYNAMODB:
        message = f"Unsupported starting position for arn type: {source.arn}"
        yield Problem("StartingPosition", _INVALID, message, "give TRIM_HORIZON or LATEST")
    elif start == "AT_TIMESTAMP" and moment is None and "StartingPositionTimestamp" not in broken:
        hint = f"give StartingPositionTimestamp: {expected(Instant())}"
        yield Problem("StartingPositionTimestamp", _INVALID, "Need to specify a timestamp", hint, "is missing")
    if moment is not None and start is not None and start != "AT_TIMESTAMP":
        message = "StartingPositionTimestamp needs StartingPosition AT_TIMESTAMP"
        yield Problem("StartingPositionTimestamp", _INVALID, message, "take it out or give AT_TIMESTAMP")
    elif moment is not None and epoch(moment) > now:
        message = "StartingPositionTimestamp must not be in the future"
        hint = "give a past moment in epoch seconds (not milliseconds) or as an ISO 8601 date-time"
        yield Problem("StartingPositionTimestamp", _INVALID, message, hint, "is in the future")
    if 0 <= document["MaximumRecordAgeInSeconds"] < _MIN_RECORD_AGE:
        message = "MaximumRecordAgeInSeconds must be -1 or from 60 to 604800"
        yield Problem(
            "MaximumRecordAgeInSeconds", _INVALID, message, "give -1 (no limit) or 60 to 604800", "is too small"
        )
    if document["BisectBatchOnFunctionError"]:
        message = (
            "BisectBatchOnFunctionError is not supported: esm-poller never splits a failed batch. "
            "Use FunctionResponseTypes [ReportBatchItemFailures] to name the records that failed."
        )
        hint = "use FunctionResponseTypes: [ReportBatchItemFailures]"
        yield Problem(
            "BisectBatchOnFunctionError", _INVALID, message, hint, "is not supported: batches are never split"
        )
    for name in document.get("Options", {}):
        if name in _QUEUE_OPTIONS:
            hint = f"take it out; {name} is not for {_SOURCE_NAMES[source.kind]}"
            yield Problem(f"Options.{name}", _INVALID, f"Options.{name} is only for SQS queues.", hint)
    if document["TumblingWindowInSeconds"] > 0:
        if document["ParallelizationFactor"] > 1:
            message = "TumblingWindowInSeconds cannot be used with a ParallelizationFactor above 1"
            yield Problem("TumblingWindowInSeconds", _INVALID, message, "give a ParallelizationFactor of 1")
        if document.get("FilterCriteria", {}).get("Filters"):
            message = "TumblingWindowInSeconds cannot be used with FilterCriteria"
            yield Problem("TumblingWindowInSeconds", _INVALID, message, "take one of them out")
    if document["DestinationConfig"].get("OnSuccess"):
        message = "Unsupported DestinationConfig parameter for given event source mapping type."
        yield Problem("DestinationConfig.OnSuccess", _INVALID, message, "use OnFailure; there is no other one")
    destination = _destination(document["DestinationConfig"])
    if destination and not _DESTINATION.fullmatch(destination):
        message = "The destination must be an SQS queue, SNS topic, S3 bucket or event bus ARN, or a URL."
        yield Problem(_DESTINATION_PATH, _INVALID, message, "give an ARN, https://, http:// or file:/// URL")
    elif destination.startswith("arn:") and destination.endswith(".fifo"):
        message = "The destination must not be a FIFO queue or FIFO topic."
        yield Problem(_DESTINATION_PATH, _INVALID, message, "give a standard queue or topic")


def _check_common(document: Mapping[str, Any], source: SourceSpec) -> Iterator[Problem]:
    if set(document.get("MetricsConfig", {}).get("Metrics", ())) - {"EventCount"}:
        message = "Only EventCount metrics are supported for event source mappings."
        yield Problem("MetricsConfig.Metrics", _INVALID, message, "give [EventCount]")
    if document.get("KMSKeyArn"):
        message = "KMSKeyArn is not supported: esm-poller does not encrypt filter criteria."
        yield Problem(
            "KMSKeyArn", _INVALID, message, "take it out", "is not supported: filter criteria are not encrypted"
        )
    if source.kind is SourceKind.SQS and document.get("Options", {}).get("IncludePayload"):
        hint = "take it out; a queue has its redrive policy"
        yield Problem(
            "Options.IncludePayload", _INVALID, "Options.IncludePayload is only for streams with a destination.", hint
        )
    for index, item in enumerate(document.get("FilterCriteria", {}).get("Filters", ())):
        yield from _check_pattern(item.get("Pattern"), f"FilterCriteria.Filters[{index}].Pattern", source)
    parts = _FUNCTION.fullmatch(document.get("FunctionName", ""))
    if parts and parts["region"] and parts["region"] != source.region:
        message = "The function and the event source must be in the same Region."
        yield Problem("FunctionName", _INVALID, message, "give a function of the source's Region")


def _check_pattern(pattern: str | None, path: str, source: SourceSpec) -> Iterator[Problem]:
    """AWS answers the same to every bad pattern; people are told where in it and why."""
    if pattern is None:
        yield Problem(path, _INVALID, INVALID_PATTERN, f"give {_PATTERN.means}", "is missing")
        return
    try:
        Filter([pattern], source.kind)
    except PatternError as error:
        reason, _, hint = error.reason.partition("; ")
        place = f"at {error.place}: " if error.place else ""
        yield Problem(path, _INVALID, INVALID_PATTERN, hint, f"is not a filter pattern: {place}{reason}")


_SOURCE_NAMES = {
    SourceKind.KINESIS: "Kinesis streams",
    SourceKind.DYNAMODB: "DynamoDB streams",
    SourceKind.SQS: "SQS queues",
}
_QUEUE_OPTIONS = frozenset({"CircuitBreaker", "MaximumReceivers", "ScaleUpPerMinute"})
_PROVISIONED = {"MinimumPollers": 2, "MaximumPollers": 200}  # the bounds that are not given
_START_HINT = "give TRIM_HORIZON (all that is retained), LATEST, or for Kinesis AT_TIMESTAMP"


def _destination(config: Mapping[str, Any]) -> str:
    destination: str = config.get("OnFailure", {}).get("Destination", "")
    return destination


def _from_fault(fault: Fault) -> Problem:
    """A fault of the document's shape in the words of AWS's front end."""
    path = _camel(fault.path)
    try:
        shown = _shown(fault.value)
    except RecursionError:  # lists in lists, as deep as the parser goes
        shown = "[...]"
    match fault.rule:
        case "least":
            constraint = f"Member must have value greater than or equal to {fault.limit}"
        case "most":
            constraint = f"Member must have value less than or equal to {fault.limit}"
        case "choice" if fault.path.endswith("]"):
            path, shown = path.partition(".member")[0].rpartition(".")[0], f"[{shown}]"
            constraint = f"Member must satisfy constraint: [Member must satisfy enum value set: {_shown(fault.limit)}]"
        case "choice":
            constraint = f"Member must satisfy enum value set: {_shown(fault.limit)}"
        case "long" if fault.path == "Tags":
            return Problem("Tags", _INVALID, TOO_MANY_TAGS, fault.remedy, fault.said)
        case "short":
            constraint = f"Member must have length greater than or equal to {fault.limit}"
        case "long":
            constraint = f"Member must have length less than or equal to {fault.limit}"
        case "pattern":
            constraint = f"Member must satisfy regular expression pattern: {fault.limit}"
        case _:
            return Problem(
                fault.path, _VALIDATION, f"{fault.path} {fault.said}; {fault.remedy}", fault.remedy, fault.said
            )
    return Problem(fault.path, _VALIDATION, _constraint(path, shown, constraint), fault.remedy, fault.said)


def _constraint(path: str, shown: str, constraint: str) -> str:
    value = shown if shown == "null" else f"'{shown}'"
    return f"1 validation error detected: Value {value} at '{path}' failed to satisfy constraint: {constraint}"


def _camel(path: str) -> str:
    """`Filters[0].Pattern` as AWS writes it: `filters.1.member.pattern`."""
    numbered = re.sub(r"\[(\d+)\]", lambda found: f".{int(found[1]) + 1}.member", path)
    return ".".join(part[:1].lower() + part[1:] for part in numbered.split("."))


def _shown(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return f"[{', '.join(map(_shown, value))}]"
        case _:
            return str(value)


# --- documents ------------------------------------------------------------------------------------------------------


def normalize(document: Mapping[str, Any]) -> dict[str, Any]:
    """The canonical form of a document without problems: defaults of its source in; nulls, UUID and what is empty out.

    `StartingPositionTimestamp` becomes epoch seconds.
    """
    source = parse_source(document["EventSourceArn"])
    given = {name: _without_nulls(value) for name, value in document.items() if value is not None and name != "UUID"}
    if destination := _destination(given.pop("DestinationConfig", {})):
        given["DestinationConfig"] = {"OnFailure": {"Destination": destination}}
    for name in _EMPTY_IS_UNSET & given.keys():
        if given[name] in ("", {}, {"Filters": []}, {"Metrics": []}):
            del given[name]
    if "ProvisionedPollerConfig" in given:
        given["ProvisionedPollerConfig"] = _PROVISIONED | given["ProvisionedPollerConfig"]
    if "StartingPositionTimestamp" in given:
        given["StartingPositionTimestamp"] = epoch(given["StartingPositionTimestamp"])
    filled = {**_defaults(source), **given}
    return {field.name: filled[field.name] for field in FIELDS if field.name in filled}


_EMPTY_IS_UNSET = frozenset(
    {"FilterCriteria", "KMSKeyArn", "MetricsConfig", "Options", "ProvisionedPollerConfig", "ScalingConfig", "Tags"}
)


def merge_update(current: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The normalized document after an update without problems. Absent and null fields keep their value.

    AWS's ways to clear hold: `FilterCriteria` `{}` or `{"Filters": []}`, `ScalingConfig`, `MetricsConfig` and
    `ProvisionedPollerConfig` `{}`, `DestinationConfig` without a destination, `FunctionResponseTypes` `[]`.
    """
    return normalize(_merged(current, {name: value for name, value in changes.items() if value is not None}))


def _merged(current: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A change takes a field's place as a whole, but one bound of provisioned mode leaves the other as it is."""
    merged = {**current, **changes}
    if pollers := _without_nulls(changes.get("ProvisionedPollerConfig")):
        merged["ProvisionedPollerConfig"] = {**current.get("ProvisionedPollerConfig", {}), **pollers}
    return merged


def _defaults(source: SourceSpec) -> dict[str, Any]:
    defaults = {}
    for field in FIELDS:
        if field.default is not None and source.kind in field.sources:
            is_queue = source.kind is SourceKind.SQS and field.queue_default is not None
            defaults[field.name] = deepcopy(field.queue_default if is_queue else field.default)
    return defaults


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {name: _without_nulls(item) for name, item in value.items() if item is not None}
        case list():
            return [_without_nulls(item) for item in value]
        case _:
            return value


class UnsupportedSource(ValueError):  # noqa: N818
    """The ARN names something near a source that cannot be read; `near` is that source."""

    def __init__(self, message: str, near: SourceSpec) -> None:
        super().__init__(message)
        self.near = near


def parse_source(arn: str) -> SourceSpec:
    """The event source that an ARN names. ValueError: what is wrong, to follow the ARN; after a `;` what is right."""
    for kind, pattern in _SOURCES.items():
        if parts := pattern.fullmatch(arn):
            name = parts["name"]
            fan_out = parts.groupdict().get("consumer") is not None
            return SourceSpec(kind, arn, parts["region"], parts["account"], name, name.endswith(".fifo"), fan_out)
    if parts := re.fullmatch(_ARN + ":kinesis" + _PLACE + r"stream/(?P<name>[^/]+)/consumer(/.*)?", arn):
        message = (
            "is not the whole ARN of a consumer; give ConsumerARN of DescribeStreamConsumer, "
            "stream/NAME/consumer/CONSUMER:CREATION_TIME, or the stream's ARN"
        )
        near = SourceSpec(SourceKind.KINESIS, arn, parts["region"], parts["account"], parts["name"])
        raise UnsupportedSource(message, near)
    if parts := re.fullmatch(_ARN + ":dynamodb" + _PLACE + r"table/(?P<name>[^/]+)", arn):
        message = "is a table's ARN; give the ARN of its stream, LatestStreamArn of DescribeTable"
        near = SourceSpec(SourceKind.DYNAMODB, arn, parts["region"], parts["account"], parts["name"])
        raise UnsupportedSource(message, near)
    raise ValueError(
        "is not the ARN of a Kinesis stream, a DynamoDB stream or an SQS queue; give one such as "
        "arn:aws:kinesis:eu-west-1:123456789012:stream/NAME, "
        "arn:aws:dynamodb:eu-west-1:123456789012:table/NAME/stream/LABEL or arn:aws:sqs:eu-west-1:123456789012:NAME"
    )


def source_of(document: Mapping[str, Any]) -> SourceSpec:
    """The event source of a normalized document, with the role that it is read with."""
    role = document.get("Options", {}).get("AssumeRoleArn")
    return replace(parse_source(document["EventSourceArn"]), role=role)


def resolve_function(
    name: str, functions: Mapping[str, FunctionSettings], source: SourceSpec
) -> tuple[FunctionSpec, FunctionSettings]:
    """What a FunctionName means. ValueError when it has not the form of one.

    A configured function is found by its name, or by an ARN of the source's Region and account, with any qualifier; a
    configured Lambda function is then invoked with that qualifier. Everything else is a real Lambda function.
    """
    parts = _FUNCTION.fullmatch(name)
    if parts is None:
        raise ValueError(f"is not {expected(FUNCTION_NAME)}")
    partition = parts["partition"] or source.arn.split(":")[1]
    region, account = parts["region"] or source.region, parts["owner"] or parts["account"] or source.account
    short, qualifier = parts["name"], parts["qualifier"]
    arn = f"arn:{partition}:lambda:{region}:{account}:function:{short}" + (f":{qualifier}" if qualifier else "")
    spec = FunctionSpec(short, arn, f"arn:{partition}:iam::{account}:role/{short}")
    settings = functions.get(short) if (region, account) == (source.region, source.account) else None
    if settings is None:
        return spec, LambdaFunction(short, name, is_configured=False)
    if isinstance(settings, LambdaFunction) and qualifier:
        return spec, replace(settings, arn=f"{_unqualified(settings.arn)}:{qualifier}")
    return spec, settings


def _unqualified(name: str) -> str:
    parts = _FUNCTION.fullmatch(name)
    return name[: -len(parts["qualifier"]) - 1] if parts and parts["qualifier"] else name


def derived_uuid(source_arn: str, function_arn: str) -> MappingId:
    """The UUID of a mapping that was given none: the same for the same source and function, for ever."""
    return str(uuid5(_NAMESPACE, f"{source_arn}\n{function_arn}"))


def build(
    uuid: MappingId, document: Mapping[str, Any], function: FunctionSpec, declared_in: str | None
) -> RunnableMapping:
    """The mapping that a normalized document describes."""
    size, factor = document["BatchSize"], document.get("ParallelizationFactor", 1)
    return RunnableMapping(
        id=uuid,
        source=source_of(document),
        function=function,
        batch=BatchPolicy(
            size=size,
            window=float(document["MaximumBatchingWindowInSeconds"]),
            factor=factor,
            tumbling=float(document.get("TumblingWindowInSeconds", 0)),
            max_bytes=MAX_PAYLOAD_BYTES,
            buffer_records=min(max(LEAST_BUFFER_RECORDS, 2 * size * factor), MOST_BUFFER_RECORDS),
        ),
        retry=RetryPolicy(
            attempts=document.get("MaximumRetryAttempts", NO_LIMIT),
            max_age=float(document.get("MaximumRecordAgeInSeconds", NO_LIMIT)),
            report_failures="ReportBatchItemFailures" in document["FunctionResponseTypes"],
        ),
        start=_start(document),
        enabled=document["Enabled"],
        queue=_queue(document),
        filters=tuple(item["Pattern"] for item in document.get("FilterCriteria", {}).get("Filters", ())),
        destination=_failure_destination(document),
        declared_in=declared_in,
    )


def resolve(
    uuid: MappingId, document: Mapping[str, Any], functions: Mapping[str, FunctionSettings], declared_in: str | None
) -> tuple[RunnableMapping, FunctionSettings]:
    """The mapping that a normalized document describes, and what its FunctionName means."""
    spec, function = resolve_function(document["FunctionName"], functions, parse_source(document["EventSourceArn"]))
    return build(uuid, document, spec, declared_in), function


def find_mapping(name: str, known: Iterable[tuple[MappingId, str]]) -> MappingId:
    """The mapping that a person means: by UUID, the beginning of one, or the name of a function that one mapping has.

    `known`: UUID and function name of each. PollerError: none, or which ones.
    """
    mappings = list(known)
    exact = [uuid for uuid, _ in mappings if uuid == name.lower()]
    found = exact or [uuid for uuid, function in mappings if function == name]
    if not found and name:
        found = [uuid for uuid, _ in mappings if uuid.startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        raise PollerError(f"{name} may be any of the mappings {', '.join(sorted(found))}; give more of the UUID")
    there = ", ".join(f"{uuid} ({function})" for uuid, function in mappings[:10]) or "none"
    raise PollerError(f"there is no mapping {name}; give a UUID, the beginning of one or a function's name: {there}")


def _queue(document: Mapping[str, Any]) -> QueuePolicy:
    """What is not given keeps the default of `QueuePolicy`. MaximumPollers may raise the ceiling over it."""
    pollers, options = document.get("ProvisionedPollerConfig", {}), document.get("Options", {})
    bounds = (
        document.get("ScalingConfig", {}).get("MaximumConcurrency"),
        pollers.get("MaximumPollers"),
        options.get("MaximumReceivers"),
    )
    default = QueuePolicy()
    shared = min((bound for bound in bounds[:2] if bound is not None), default=None)
    ceiling = min((bound for bound in bounds if bound is not None), default=default.ceiling)
    return QueuePolicy(
        ceiling=ceiling,
        floor=min(pollers.get("MinimumPollers", default.floor), ceiling),
        growth=float(options.get("ScaleUpPerMinute", default.growth)),
        circuit_breaker=options.get("CircuitBreaker", default.circuit_breaker),
        shared=shared,
    )


def _failure_destination(document: Mapping[str, Any]) -> FailureDestination | None:
    target = _destination(document.get("DestinationConfig", {}))
    if not target:
        return None
    return FailureDestination(target, document.get("Options", {}).get("IncludePayload", False))


def _start(document: Mapping[str, Any]) -> Position:
    match document.get("StartingPosition"):
        case "AT_TIMESTAMP":
            return Position(PositionKind.AT_TIMESTAMP, str(document["StartingPositionTimestamp"]))
        case "LATEST":
            return Position(PositionKind.LATEST)
        case _:
            return TRIM_HORIZON


def describe(  # noqa: PLR0917 - the answer's own members
    document: Mapping[str, Any],
    uuid: MappingId,
    function_arn: str,
    state: str,
    state_reason: str,
    last_modified: float,
    last_result: str | None,
) -> dict[str, Any]:
    """The EventSourceMappingConfiguration of a normalized document, key for key as AWS answers for its source."""
    source = parse_source(document["EventSourceArn"])
    _, partition, _, region, account = function_arn.split(":")[:5]
    answer = {name: deepcopy(value) for name, value in document.items() if name not in _NOT_ECHOED}
    answer |= {
        "EventSourceMappingArn": f"arn:{partition}:lambda:{region}:{account}:event-source-mapping:{uuid}",
        "FunctionArn": function_arn,
        "LastModified": last_modified,
        "State": state,
        "StateTransitionReason": state_reason,
        "UUID": uuid,
    }
    if source.kind is not SourceKind.SQS:
        answer["LastProcessingResult"] = last_result or "No records processed"
    return dict(sorted(answer.items()))


_NOT_ECHOED = frozenset({"Enabled", "FunctionName", "Options", "Tags"})
