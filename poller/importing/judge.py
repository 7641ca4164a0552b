"""What was found -> what can be printed: `mappings.py` decides, with a sample in the place of each hole."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from poller.config import CONFIG
from poller.core.model import SourceKind
from poller.importing.values import ACCOUNT, REGION, Hole, Joined, Text, filled, holes_of, shown
from poller.mappings import FIELDS, UnsupportedSource, check_create, item_shape, normalize, parse_source
from poller.shapes import Choice, Flag, Instant, ListOf, MapOf, Number, Object, Shape, Whole, check, convert, join

_FIELD = {field.name: field for field in FIELDS}
_FUNCTIONS = next(field.shape for field in CONFIG.fields if field.name == "functions")
_LONGEST_KEY = 64  # of `functions`
_FUNCTION_TAIL = re.compile(
    r"(?P<head>(?:.*:)?function:)?(?P<name>[a-zA-Z0-9_-]*)(?P<qualifier>:(?:\$LATEST|[a-zA-Z0-9_-]+))?", re.DOTALL
)
_REPORT = "ReportBatchItemFailures"
_FOREIGN_MEMBERS = {
    "AmazonManagedKafkaEventSourceConfig": "Amazon MSK",
    "DocumentDBEventSourceConfig": "Amazon DocumentDB",
    "SelfManagedEventSource": "self-managed Apache Kafka",
    "SelfManagedKafkaEventSourceConfig": "self-managed Apache Kafka",
    "Topics": "Apache Kafka",
    "Queues": "Amazon MQ",
    "SourceAccessConfigurations": "Kafka, Amazon MQ or DocumentDB",
}
_FOREIGN_SERVICES = {
    "kafka": "Amazon MSK",
    "mq": "Amazon MQ",
    "rds": "Amazon DocumentDB",
    "docdb-elastic": "Amazon DocumentDB",
}
_LIKELY = {
    SourceKind.KINESIS: "arn:aws:kinesis:eu-west-1:123456789012:stream/{}",
    SourceKind.DYNAMODB: "arn:aws:dynamodb:eu-west-1:123456789012:table/{}/stream/2026-01-01T00:00:00.000",
    SourceKind.SQS: "arn:aws:sqs:eu-west-1:123456789012:{}",
}


@dataclass(frozen=True, slots=True)
class Function:
    """What a mapping invokes. `arn`: name or ARN, qualifier included. `label`: its name in the template.

    `timeout`: the function's own, in seconds; None where nothing says one.
    """

    arn: Text
    label: str
    timeout: Any = None


@dataclass(slots=True)
class Candidate:
    """One mapping that was found. `where`: how people find it. `members`: AWS's, without FunctionName.

    `kind`: of the source, where the template says it. `notes`: what to know about it. `refused`: why it cannot be used.
    """

    where: str
    members: dict[str, Any]
    function: Function
    kind: SourceKind | None = None
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Item:
    """One mapping that was judged. `document`: without defaults, holes unfilled. With `refused` it is only shown."""

    where: str
    document: dict[str, Any]
    notes: list[str]
    refused: list[str]


@dataclass(frozen=True, slots=True)
class Judged:
    """What is to be printed. `functions`: the entries of the config file. `foreign`: what is not ours to poll, a line
    each. `samples`: a value for each variable with which the printed config loads.
    """

    functions: dict[str, dict[str, Any]]
    items: list[Item]
    foreign: list[str]
    samples: dict[str, str]

    def holes(self) -> list[Hole]:
        """The holes of what is printed as valid, each once, in order."""
        found = [*holes_of(self.functions), *holes_of([item.document for item in self.items if not item.refused])]
        return list(dict.fromkeys(found))


class Judge:
    """Judges the candidates of one import, one after the other. `now`: epoch seconds."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._functions: dict[str, dict[str, Any]] = {}
        self._samples: dict[str, str] = {}
        self._pairs: dict[tuple[str, str], str] = {}
        self._uuids: dict[str, str] = {}

    def judge(self, candidates: Sequence[Candidate]) -> Judged:
        """All of them."""
        items: list[Item] = []
        foreign: list[str] = []
        for candidate in candidates:
            if source := _foreign(candidate.members):
                said = f"not carried over: its source is {source}; esm-poller reads Kinesis, DynamoDB Streams and SQS"
                foreign.append(f"{candidate.where}: {said}")
            else:
                items.append(self._judge(candidate))
        return Judged(self._functions, items, foreign, self._samples)

    def _judge(self, candidate: Candidate) -> Item:
        notes, refused = list(candidate.notes), list(candidate.refused)
        members = _carried(candidate.members, notes)
        kind = candidate.kind or _kind(members)
        members = _fitting(members, kind, notes)
        key, entry, qualifier = self._function(candidate.function, notes)
        members["FunctionName"] = key + qualifier
        shape = item_shape()
        document = {name: members[name] for name in _FIELD if name in members}
        document = convert(shape, document, set(_text_paths(document)))
        refused += self._sample(shape, document, "", kind)
        refused += self._sample(_FUNCTIONS, {key: entry}, "functions", kind)
        for hole in holes_of(document):  # in what has no shape, which is refused
            self._samples.setdefault(hole.name, _word(hole))
        sample: dict[str, Any] = {}
        if not refused:
            sample = filled(document, self._samples)
            sample = convert(shape, sample, set(_text_paths(sample)))
            refused += [
                f"{problem.path}: {problem.message}" for problem in check_create(sample, declared=True, now=self._now)
            ]
            functions = filled({key: entry}, self._samples)
            functions = convert(_FUNCTIONS, functions, set(_text_paths(functions, "functions")), "functions")
            refused += [f"{fault.path} {fault.said}" for fault in check(_FUNCTIONS, functions, "functions")]
        if not refused:
            refused += self._twins(candidate.where, sample)
        if refused:
            return Item(candidate.where, document, notes, refused)
        self._functions[key] = {**self._functions.get(key, {}), **entry}
        return Item(candidate.where, _without_defaults(document, sample), notes, refused)

    def _twins(self, where: str, sample: dict[str, Any]) -> Iterator[str]:
        """A config file has one mapping for a source and function, and for a UUID."""
        pair, uuid = (sample["EventSourceArn"], sample["FunctionName"]), str(sample.get("UUID") or "").lower()
        first = self._pairs.get(pair) or self._uuids.get(uuid)
        if first is not None:
            yield f"it has the same source and function as {first}"
            return
        self._pairs[pair] = where
        if uuid:
            self._uuids[uuid] = where

    def _function(self, function: Function, notes: list[str]) -> tuple[str, dict[str, Any], str]:
        """Its name under `functions`, its entry there, and the qualifier that the mapping's FunctionName has."""
        base, name, qualifier = _split(function.arn)
        entry: dict[str, Any] = {"lambda": base}
        match function.timeout:
            case Joined():
                entry["timeout_seconds"] = function.timeout
            case int() | float() | str() as timeout if re.fullmatch(r"[0-9]{1,3}", str(timeout)):
                entry["timeout_seconds"] = min(max(int(timeout), 1), 900)
            case None:
                pass
            case odd:
                notes.append(f"the function's timeout {shown(odd, 20)} is no number of seconds and was left out")
        wanted = re.sub(r"[^A-Za-z0-9_-]+", "-", name or function.label).strip("-")[:_LONGEST_KEY] or "function"
        number, key = 2, wanted
        while key in self._functions and self._functions[key]["lambda"] != base:
            number, key = number + 1, f"{wanted[: _LONGEST_KEY - 5]}-{number}"
        return key, entry, qualifier

    def _sample(self, shape: Shape, value: Any, path: str, kind: SourceKind | None) -> Iterator[str]:
        """Give each hole a sample. Yields what cannot be a hole: only text, numbers and flags can."""
        match shape, value:
            case _, Joined(parts) if value.whole is None:
                before = ""
                for part in parts:
                    if isinstance(part, Hole):
                        before += self._samples.setdefault(part.name, part.likely or _word(part, before))
                    else:
                        before += part
            case ((ListOf() | Object() | MapOf()), Joined(parts)):
                yield f"{path}: {value.whole.means if value.whole else ''} is not decided by the template alone"
            case _, Joined():
                hole = value.whole
                assert hole is not None
                self._samples.setdefault(hole.name, _likely(shape, hole, path.rpartition(".")[2], kind))
            case Object(fields), dict():
                for inner in fields:
                    if inner.name in value:
                        yield from self._sample(inner.shape, value[inner.name], join(path, inner.name), kind)
            case MapOf(value=item), dict():
                for name, entry in value.items():
                    yield from self._sample(item, entry, join(path, name), kind)
            case ListOf(item), list():
                for index, entry in enumerate(value):
                    yield from self._sample(item, entry, f"{path}[{index}]", kind)


def _likely(shape: Shape, hole: Hole, name: str, kind: SourceKind | None) -> str:
    """A value that is right at this place."""
    word = _word(hole)
    match shape:
        case Choice(values):
            return values[-1]  # TRIM_HORIZON, which every stream takes
        case Flag():
            return "true"
        case Instant():
            return "0"
        case Whole(least):
            # Above the least where the rules between fields want that.
            return str(
                {"MinimumPollers": 2, "MaximumPollers": 200, "MaximumBatchingWindowInSeconds": 1}.get(name, least)
            )
        case Number(least):
            return f"{least:g}"
        case _ if name == "EventSourceArn":
            return hole.likely or _LIKELY[kind or SourceKind.SQS].format(word)
        case _ if name == "Destination":
            return hole.likely or _LIKELY[SourceKind.SQS].format(word)
        case _ if name == "Pattern":
            return '{"sample": [1]}'
        case _:
            return hole.likely or word


def _word(hole: Hole, before: str = "") -> str:
    """A word for a place in a text; `before` is what stands before it."""
    if before == "arn:":
        return "aws"
    if re.fullmatch(r"arn:[^:]*:[^:]*:[^:]*:", before):
        return "123456789012"
    return hole.name.lower().replace("_", "-")


def _foreign(members: dict[str, Any]) -> str | None:
    """What the source is where it is none that esm-poller reads."""
    arn = members.get("EventSourceArn")
    if isinstance(arn, str) and (service := [*arn.split(":"), "", ""][2]) in _FOREIGN_SERVICES:
        return _FOREIGN_SERVICES[service]
    for name, source in _FOREIGN_MEMBERS.items():
        if members.get(name):
            return source
    return None


def _carried(members: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The members that the config file has. What is left out and not empty is noted."""
    carried = {}
    for name, value in members.items():
        if value in (None, "", [], {}) and not isinstance(value, bool):
            continue
        if name == "BisectBatchOnFunctionError":
            if value not in (False, "false"):
                notes.append(_bisect(members))
        elif name == "KMSKeyArn":
            notes.append("KMSKeyArn was left out: esm-poller does not encrypt filter criteria")
        elif name in _FIELD:
            carried[name] = value
        else:
            notes.append(f"{shown(name, 60)} was left out: esm-poller does not have it")
    return carried


def _bisect(members: dict[str, Any]) -> str:
    said = "BisectBatchOnFunctionError was left out: esm-poller never splits a failed batch"
    types = members.get("FunctionResponseTypes")
    if isinstance(types, list) and _REPORT in types:
        return f"{said}; {_REPORT}, which the mapping has, names the records that failed"
    return f"{said}; let the function name the records that failed and give FunctionResponseTypes: [{_REPORT}]"


def _kind(members: dict[str, Any]) -> SourceKind | None:
    """The kind of source that its ARN names, else that its members fit to."""
    arn = members.get("EventSourceArn")
    if isinstance(arn, Joined):
        if arn.whole and not arn.whole.likely:
            return SourceKind.KINESIS if "StartingPosition" in members else SourceKind.SQS
        arn = "".join(part.likely or "x" if isinstance(part, Hole) else part for part in arn.parts)
    try:
        return parse_source(str(arn)).kind
    except UnsupportedSource as error:
        return error.near.kind
    except ValueError:
        return None


def _fitting(members: dict[str, Any], kind: SourceKind | None, notes: list[str]) -> dict[str, Any]:
    """Without what the kind of source does not have; AWS itself has no use for that."""
    fitting = {}
    for name, value in members.items():
        if kind is None or kind in _FIELD[name].sources:
            fitting[name] = value
        elif value not in (_FIELD[name].default, {"OnFailure": {}}):
            notes.append(f"{name} was left out: it is not for {kind} sources")
    return fitting


def _split(arn: Text) -> tuple[Text, str, str]:
    """A function's name or ARN as what is before its qualifier, the name if it can be seen, and `:QUALIFIER` or ""."""
    parts = arn.parts if isinstance(arn, Joined) else (arn,)
    tail = parts[-1]
    found = _FUNCTION_TAIL.fullmatch(tail) if isinstance(tail, str) else None
    if found is None or not isinstance(tail, str):
        return arn, "", ""
    qualifier = found["qualifier"] or ""
    rest = tail[: len(tail) - len(qualifier)]
    if len(parts) == 1:
        return rest, found["name"], qualifier
    if found["head"] and found["name"]:
        if all(part.name in {REGION, ACCOUNT} for part in holes_of(arn)):
            return found["name"], found["name"], qualifier  # its own Region and account are what a bare name means
        return Joined((*parts[:-1], rest)), found["name"], qualifier
    return Joined((*parts[:-1], rest) if rest else parts[:-1]), "", qualifier


def _text_paths(value: Any, path: str = "") -> Iterator[str]:
    """The path of each text: templates write numbers and flags as text too."""
    match value:
        case str():
            yield path
        case dict():
            for key, item in value.items():
                yield from _text_paths(item, join(path, key))
        case list():
            for index, item in enumerate(value):
                yield from _text_paths(item, f"{path}[{index}]")


def _without_defaults(document: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    """The document as short as it can be with the same meaning."""
    normal = normalize(sample)
    defaults = normalize({name: sample[name] for name in ("EventSourceArn", "FunctionName")})
    kept = {}
    for name, value in document.items():
        is_open = any(True for _ in holes_of(value))
        if name in {"UUID", "EventSourceArn", "FunctionName", "StartingPositionTimestamp"} or is_open:
            kept[name] = value
        elif name in normal and normal[name] != defaults.get(name):
            kept[name] = normal[name]
    return kept
