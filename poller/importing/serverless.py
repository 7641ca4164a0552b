"""The mappings that the Serverless Framework makes of a serverless.yml.

Its variables `${...}` are filled in where the file and the command line tell them; all else is a hole. Defaults are the
framework's own: 10 records for streams too, TRIM_HORIZON, the stage dev, the Region us-east-1.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from poller.core.model import SourceKind
from poller.errors import ConfigError
from poller.importing.cloudformation import section
from poller.importing.intrinsics import MISSING, Place, Resolver
from poller.importing.judge import Candidate, Function
from poller.importing.values import Holes, Joined, Text, holes_of, shown

_MOST_VARIABLES = 50_000
_MAX_DEPTH = 40
_STREAM = {
    "batchSize": "BatchSize",
    "batchWindow": "MaximumBatchingWindowInSeconds",
    "bisectBatchOnFunctionError": "BisectBatchOnFunctionError",
    "enabled": "Enabled",
    "maximumRecordAgeInSeconds": "MaximumRecordAgeInSeconds",
    "maximumRetryAttempts": "MaximumRetryAttempts",
    "parallelizationFactor": "ParallelizationFactor",
    "startingPosition": "StartingPosition",
    "startingPositionTimestamp": "StartingPositionTimestamp",
    "tumblingWindowInSeconds": "TumblingWindowInSeconds",
}
_QUEUE = {
    "batchSize": "BatchSize",
    "enabled": "Enabled",
    "maximumBatchingWindow": "MaximumBatchingWindowInSeconds",
}
_OTHER_POLLED = {
    "activemq": "Amazon MQ",
    "kafka": "self-managed Apache Kafka",
    "msk": "Amazon MSK",
    "rabbitmq": "Amazon MQ",
}
_HANDLED = frozenset(
    {"arn", "type", "consumer", "destinations", "filterPatterns", "functionResponseType", "maximumConcurrency"}
)
_FAMILY = {"kinesis": SourceKind.KINESIS, "dynamodb": SourceKind.DYNAMODB}
_VARIABLE = re.compile(r"([a-zA-Z][a-zA-Z0-9_]*)(?:\([^)]*\))?:(.*)", re.DOTALL)


class Serverless:
    """Reads one file. `remarks`: what has no mapping of ours, after `candidates`."""

    def __init__(
        self,
        document: dict[str, Any],
        place: Place,
        parameters: Mapping[str, str],
        stage: str | None,
        *,
        holes: Holes,
        line_of: Callable[[str], int | None],
    ) -> None:
        self.remarks: list[str] = []
        self._holes = holes
        self._line_of = line_of
        self._options = {"stage": stage, "region": place.region}
        self._variables = _Variables(document, parameters, self._options, place, holes)
        expand = self._variables.expand
        provider = section(document, "provider")
        own = expand(provider.get("stage"))
        self._stage: Text = stage or (own if isinstance(own, str | Joined) and own else "dev")
        self._variables.stage = self._stage
        own = expand(provider.get("region"))
        region = place.region or (
            own if isinstance(own, str) and own else None if isinstance(own, Joined) else "us-east-1"
        )
        self.place = self._variables.place = Place(region, place.account)
        service = document.get("service")
        self._service = expand(service.get("name") if isinstance(service, dict) else service)
        self._timeout = provider.get("timeout")
        self._functions = document["functions"]
        given = document.get("resources")
        resources: dict[str, Any] = {}
        for part in given if isinstance(given, list) else [given]:
            found = expand(part)
            resources |= section(found, "Resources")
        self._resolver = Resolver({"Resources": resources}, self.place, parameters, holes)
        self._variables.pseudo = self._resolver.pseudo

    def knows(self, parameter: str) -> bool:
        """Can it be given with --parameter? Any: variables may name them anywhere."""
        return bool(parameter)

    def parameters(self) -> tuple[str, ...]:
        """What can be given with --parameter, as far as it is known."""
        return ()

    def assumed(self) -> list[str]:
        """What was taken for granted."""
        stage = self._stage if isinstance(self._stage, str) else "that of the variables"
        return [f"The stage is {shown(stage, 60)}, the Region {self.place.region or 'not known'} (--stage, --region)."]

    def candidates(self) -> Iterator[Candidate]:
        """Every mapping, in the file's order."""
        parts = self._functions if isinstance(self._functions, list) else [self._functions]
        for part in parts:
            if not isinstance(part, dict):
                self.remarks.append(f"functions: {shown(part)} is not read; import that file's functions by themselves")
                continue
            for name, given in part.items():
                if not isinstance(given, dict):
                    self.remarks.append(f"{shown(name, 120)}{self._line(name)}: {shown(given)} is not read")
                    continue
                events = self._variables.expand(given.get("events"))
                for number, event in enumerate(events if isinstance(events, list) else []):
                    yield from self._event(name, given, event, f"{shown(name, 120)}.events[{number}]{self._line(name)}")

    def _line(self, name: str) -> str:
        line = self._line_of(name)
        return f" (line {line})" if line else ""

    def _event(self, name: str, function: dict[str, Any], event: Any, where: str) -> Iterator[Candidate]:
        kind, given = next(iter(event.items()), ("", None)) if isinstance(event, dict) else (str(event), None)
        if kind in _OTHER_POLLED:
            reads = "esm-poller reads Kinesis, DynamoDB Streams and SQS"
            self.remarks.append(f"{where}: {kind}: not carried over: its source is {_OTHER_POLLED[kind]}; {reads}")
        elif kind not in {"stream", "sqs"}:
            self.remarks.append(f"{where}: {shown(kind, 40)} invokes the function itself; nothing to poll")
        else:
            options = given if isinstance(given, dict) and "arn" in given else {"arn": given}
            candidate = Candidate(where, {}, self._function(name, function))
            self._carry(candidate, name, kind, options)
            yield candidate

    def _carry(self, candidate: Candidate, name: str, kind: str, options: dict[str, Any]) -> None:
        resolver = self._resolver
        names = _STREAM if kind == "stream" else _QUEUE
        candidate.kind = SourceKind.SQS if kind == "sqs" else _FAMILY.get(str(options.get("type")))
        members = candidate.members
        members["BatchSize"] = 10
        if kind == "stream":
            members["StartingPosition"] = "TRIM_HORIZON"
        for option, value in options.items():
            resolver.where = f"{name}_{kind}_{option}"
            known = resolver.resolve(value)
            if known is MISSING:
                continue
            if option in names:
                members[names[option]] = known
            elif option not in _HANDLED:
                members[option] = known  # noted by the judge as what we do not have
        resolver.where = f"{name}_{kind}_arn"
        if (source := self._source(options, candidate.where, kind)) is not MISSING:
            members["EventSourceArn"] = source
        if response := options.get("functionResponseType"):
            members["FunctionResponseTypes"] = [response]
        if concurrency := options.get("maximumConcurrency"):
            members["ScalingConfig"] = {"MaximumConcurrency": concurrency}
        if patterns := options.get("filterPatterns"):
            self._filter(patterns, candidate)
        if failed := section(options, "destinations").get("onFailure"):
            resolver.where = f"{name}_{kind}_on_failure_arn"
            arn = failed.get("arn") if isinstance(failed, dict) and "arn" in failed else failed
            if (destination := resolver.resolve(arn)) is not MISSING:
                members["DestinationConfig"] = {"OnFailure": {"Destination": destination}}

    def _source(self, options: dict[str, Any], where: str, kind: str) -> Any:
        consumer = options.get("consumer")
        if kind != "stream" or not consumer or options.get("type") == "dynamodb":
            return self._resolver.resolve(options["arn"])
        if consumer is True:
            likely = "arn:aws:kinesis:eu-west-1:123456789012:stream/sample/consumer/sample:1700000000"
            expression = f"the consumer that the framework registers for {where}"
            return self._holes.make(expression, f"{where.partition('.')[0]}_consumer_arn", likely)
        return self._resolver.resolve(consumer)

    def _filter(self, patterns: Any, candidate: Candidate) -> None:
        filters = []
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            known = self._resolver.resolve(pattern)
            if known is MISSING or any(True for _ in holes_of(known)):
                candidate.refused.append("its filterPatterns are not known by the file alone")
                return
            filters.append({"Pattern": json.dumps(known, ensure_ascii=False, separators=(",", ":"))})
        candidate.members["FilterCriteria"] = {"Filters": filters}

    def _function(self, name: str, function: dict[str, Any]) -> Function:
        """Its deployed name is SERVICE-STAGE-KEY unless it has one of its own."""
        own = self._variables.expand(function.get("name"))
        if not isinstance(own, str | Joined) or not own:
            own = self._resolver.join(self._service, "-", self._stage, "-", name)
        if function.get("provisionedConcurrency"):
            own = self._resolver.join(own, ":provisioned")  # the alias that the framework makes and maps to
        timeout = function.get("timeout", self._timeout)
        return Function(own, name, self._variables.expand(timeout))


class _Variables:
    """The framework's variables in one file."""

    def __init__(
        self,
        document: dict[str, Any],
        parameters: Mapping[str, str],
        options: Mapping[str, str | None],
        place: Place,
        holes: Holes,
    ) -> None:
        self.stage: Text = options.get("stage") or "dev"
        self.place = place
        self.pseudo: Callable[[str], Any] = lambda name: holes.make(name, "CFN_" + name.removeprefix("AWS::"))
        self._document = document
        self._parameters = parameters
        self._options = options
        self._holes = holes
        self._count = 0
        self._depth = 0

    def expand(self, value: Any) -> Any:
        """The value with its variables filled in."""
        match value:
            case str():
                return self._text(value) if "${" in value else value
            case list():
                return [self.expand(item) for item in value]
            case dict():
                return {key: self.expand(item) for key, item in value.items()}
            case _:
                return value

    def _text(self, text: str) -> Any:
        self._count += 1
        if self._count > _MOST_VARIABLES:
            raise ConfigError([f"the file refers to more than {_MOST_VARIABLES} variables; do they go in a circle?"])
        if self._depth >= _MAX_DEPTH:
            return self._holes.make(text, "variable")
        self._depth += 1
        try:
            return self._filled(text)
        finally:
            self._depth -= 1

    def _filled(self, text: str) -> Any:
        parts: list[Any] = []
        end = 0
        while (start := text.find("${", end)) >= 0:
            stop = _closing(text, start)
            if stop is None:
                break
            if start > end:
                parts.append(text[end:start])
            parts.append(self._variable(text[start + 2 : stop], text[start : stop + 1]))
            end = stop + 1
        if end < len(text):
            parts.append(text[end:])
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, dict | list) for part in parts):
            return self._holes.make(text, "variable")
        return self._holes.join([part if isinstance(part, Joined) else _plain(part) for part in parts])

    def _variable(self, inner: str, whole: str) -> Any:
        """The value of `${inner}`; a `${...}` that is CloudFormation's stays as it is."""
        if inner.startswith("AWS::"):
            return self.pseudo(inner)
        if ":" not in inner and "," not in inner:
            return whole
        for choice in _choices(inner):
            filled = self._text(choice) if "${" in choice else choice
            if isinstance(filled, Joined | dict | list):
                return filled if choice.startswith("${") else self._hole(whole, choice)
            found = self._one(_plain(filled), whole)
            if found is not MISSING:
                return found
        return self._hole(whole, inner)

    def _one(self, choice: str, whole: str) -> Any:
        """One of the choices of a variable; MISSING lets the next one speak."""
        text = choice.strip()
        if text[:1] in {"'", '"'} and text[-1:] == text[:1] and len(text) > 1:
            return text[1:-1]
        if re.fullmatch(r"-?[0-9]+", text):
            return int(text)
        if text in {"true", "false", "null"}:
            return {"true": True, "false": False, "null": None}[text]
        found = _VARIABLE.fullmatch(text)
        if found is None:
            return text if "${" not in text else MISSING
        source, address = found[1], found[2].strip()
        match source:
            case "self":
                value = _at(self._document, address)
                return MISSING if value is None else self.expand(value)
            case "opt":
                value = self._options.get(address) or self._parameters.get(address)
                return MISSING if value is None else value
            case "param":
                return self._param(address)
            case "sls" if address == "stage":
                return self.stage
            case "aws" if address == "region":
                return self.pseudo("AWS::Region")
            case "aws" if address == "accountId":
                return self.pseudo("AWS::AccountId")
            case "env" if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", address):
                return self._holes.make(whole, address)
        return self._hole(whole, text)

    def _param(self, name: str) -> Any:
        if name in self._parameters:
            return self._parameters[name]
        given = section(self._document, "params")
        for stage in (self.stage, "default"):
            value = section(given, stage).get(name) if isinstance(stage, str) else None
            if value is not None:
                return self.expand(value)
        return MISSING

    def _hole(self, whole: str, name: str) -> Joined:
        return self._holes.make(whole, name.partition(",")[0].replace("${", ""))


def _closing(text: str, start: int) -> int | None:
    """Where the `${` at `start` ends."""
    depth = 0
    for found in re.compile(r"\$\{|\}").finditer(text, start):
        depth += 1 if found[0] == "${" else -1
        if depth == 0:
            return found.start()
    return None


def _choices(inner: str) -> Iterator[str]:
    """The choices of a variable: split at commas outside of quotes and of variables within."""
    depth, quote, start = 0, "", 0
    for index, letter in enumerate(inner):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "{(":
            depth += 1
        elif letter in "})":
            depth -= 1
        elif letter == "," and depth == 0:
            yield inner[start:index].strip()
            start = index + 1
    yield inner[start:].strip()


def _at(document: Any, address: str) -> Any:
    """The value at an address such as `custom.queues.0`; None when there is none."""
    value = document
    for key in address.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key[:9]) < len(value):
            value = value[int(key[:9])]
        else:
            return None
    return value


def _plain(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else "" if value is None else str(value)
