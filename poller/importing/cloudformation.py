"""The mappings of a CloudFormation template, and those that SAM makes of a function's events."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from poller.core.model import SourceKind
from poller.importing.intrinsics import MISSING, Place, Resolver
from poller.importing.judge import Candidate, Function
from poller.importing.values import Holes, Joined, shown

# Of SAM's events: the kind of source, and the property with its ARN.
_POLLED = {
    "DynamoDB": (SourceKind.DYNAMODB, "Stream"),
    "Kinesis": (SourceKind.KINESIS, "Stream"),
    "SQS": (SourceKind.SQS, "Queue"),
}
_OTHER_POLLED = {
    "DocumentDB": "Amazon DocumentDB",
    "MQ": "Amazon MQ",
    "MSK": "Amazon MSK",
    "SelfManagedKafka": "self-managed Apache Kafka",
}
_STACKS = frozenset({"AWS::CloudFormation::Stack", "AWS::Serverless::Application"})


class CloudFormation:
    """Reads one template. `remarks`: what has no mapping of ours, after `candidates`."""

    def __init__(
        self,
        template: dict[str, Any],
        place: Place,
        parameters: Mapping[str, str],
        holes: Holes,
        line_of: Callable[[str], int | None],
    ) -> None:
        self.place = place
        self.remarks: list[str] = []
        self._resolver = Resolver(template, place, parameters, holes)
        self._declared = tuple(section(template, "Parameters"))
        self._globals = section(section(template, "Globals"), "Function")
        self._line_of = line_of
        resources = self._resolver.resources
        self.has_sam = any(self._resolver.type_of(name).startswith("AWS::Serverless::") for name in resources)
        for logical in resources:  # what SAM's Globals give, each function has
            if self._resolver.type_of(logical) == "AWS::Serverless::Function" and isinstance(resources[logical], dict):
                resources[logical] = {
                    **resources[logical],
                    "Properties": {**self._globals, **section(resources[logical], "Properties")},
                }

    def knows(self, parameter: str) -> bool:
        """Can it be given with --parameter?"""
        return parameter in self._declared or parameter.startswith("AWS::")

    def parameters(self) -> tuple[str, ...]:
        """What can be given with --parameter."""
        return self._declared

    def assumed(self) -> list[str]:
        """What was taken for granted."""
        used = self._resolver.used
        if not used:
            return []
        listed = ", ".join(f"{name}={value}" for name, value in used.items())
        return [f"Parameters with the template's defaults: {listed}. Give --parameter NAME=VALUE for others."]

    def candidates(self) -> Iterator[Candidate]:
        """Every mapping, in the template's order."""
        for logical, resource in self._resolver.resources.items():
            kind = self._resolver.type_of(logical)
            properties = section(resource, "Properties")
            if logical.startswith("Fn::"):
                self.remarks.append(
                    f"{self._where(logical)}: {logical.partition('::')[2]} is not read; import what it makes"
                )
            elif kind in _STACKS:
                self.remarks.append(f"{self._where(logical)}: is a stack of its own; import its template too")
            elif kind == "AWS::Lambda::EventSourceMapping":
                yield self._conditional(self._mapping(logical, properties), resource)
            elif kind == "AWS::Serverless::Function":
                for candidate in self._events(logical, properties):
                    yield self._conditional(candidate, resource)

    def resource(self, logical: str) -> dict[str, Any]:
        """The properties of a resource."""
        return section(self._resolver.resources.get(logical), "Properties")

    def _where(self, logical: str, event: str = "") -> str:
        line = self._line_of(logical)
        name = shown(f"{logical}.{event}" if event else logical, 120)
        return f"{name} (line {line})" if line else name

    def _conditional(self, candidate: Candidate, resource: Mapping[str, Any]) -> Candidate:
        name = resource.get("Condition")
        if isinstance(name, str):
            holds = self._resolver.condition(name)
            if holds is None:
                candidate.notes.append(f"only where the condition {shown(name, 80)} holds")
            elif not holds:
                candidate.refused.append(f"its condition {shown(name, 80)} does not hold with these parameters")
        return candidate

    def _mapping(self, logical: str, properties: dict[str, Any]) -> Candidate:
        members = self._resolver.members(properties, logical)
        members.pop("FunctionName", None)
        if "KmsKeyArn" in members:
            members["KMSKeyArn"] = members.pop("KmsKeyArn")
        tags = members.get("Tags")
        if isinstance(tags, list):
            members["Tags"] = {str(tag.get("Key")): tag.get("Value") for tag in tags if isinstance(tag, dict)}
        given = properties.get("FunctionName")
        self._resolver.where = f"{logical}_FunctionName"
        return Candidate(self._where(logical), members, self._function(given, logical))

    def _function(self, given: Any, otherwise: str) -> Function:
        """The function that a value names. `otherwise`: its name where the template has no other."""
        logical = self._resolver.function_resource(given)
        named = self._resolver.resolve(given) if given is not None else MISSING
        arn = named if isinstance(named, str | Joined) else ""
        timeout = None
        if logical:
            self._resolver.where = f"{logical}_Timeout"
            timeout = self._resolver.resolve(self.resource(logical).get("Timeout"))
        return Function(arn, logical or otherwise, None if timeout is MISSING else timeout)

    # --- SAM

    def _events(self, logical: str, properties: dict[str, Any]) -> Iterator[Candidate]:
        for name, event in section(properties, "Events").items():
            kind = str(event.get("Type", "")) if isinstance(event, dict) else ""
            given = section(event, "Properties")
            where = self._where(logical, name)
            if kind in _POLLED:
                yield self._event(logical, name, kind, given)
            elif kind == "SNS" and given.get("SqsSubscription"):
                yield self._subscription(logical, name, given["SqsSubscription"])
            elif kind in _OTHER_POLLED:
                reads = "esm-poller reads Kinesis, DynamoDB Streams and SQS"
                self.remarks.append(f"{where}: not carried over: its source is {_OTHER_POLLED[kind]}; {reads}")
            else:
                self.remarks.append(
                    f"{where}: {shown(kind or 'this event', 60)} invokes the function itself; nothing to poll"
                )

    def _event(self, logical: str, name: str, kind: str, given: dict[str, Any]) -> Candidate:
        source, stream = _POLLED[kind]
        members = self._resolver.members(given, f"{logical}_{name}")
        candidate = Candidate(self._where(logical, name), members, self._target(logical), source)
        if stream in members:
            members["EventSourceArn"] = members.pop(stream)
        if "KmsKeyArn" in members:
            members["KMSKeyArn"] = members.pop("KmsKeyArn")
        on_failure = section(members.get("DestinationConfig"), "OnFailure")
        if on_failure.pop("Type", None) and "Destination" not in on_failure:
            self._resolver.where = f"{logical}_{name}_destination"
            on_failure["Destination"] = self._made(logical, name, "the queue or topic that SAM makes for failures")
        return candidate

    def _subscription(self, logical: str, name: str, given: Any) -> Candidate:
        """A topic whose messages come through a queue, which SAM makes where none is named."""
        members = self._resolver.members(given, f"{logical}_{name}") if isinstance(given, dict) else {}
        members.pop("QueueUrl", None)
        members.pop("QueuePolicyLogicalId", None)
        self._resolver.where = f"{logical}_{name}_queue_arn"
        queue = members.pop("QueueArn", None) or self._made(logical, name, "the queue that SAM makes for the topic")
        members["EventSourceArn"] = queue
        return Candidate(self._where(logical, name), members, self._target(logical), SourceKind.SQS)

    def _made(self, logical: str, name: str, what: str) -> Joined:
        return self._resolver.holes.make(f"{what}, {logical}.{name}", self._resolver.where)

    def _target(self, logical: str) -> Function:
        """A SAM function, through its alias where it publishes one."""
        has_alias = self.resource(logical).get("AutoPublishAlias") is not None
        self._resolver.where = f"{logical}_alias"
        return self._function({"Ref": f"{logical}.Alias" if has_alias else logical}, logical)


def section(value: Any, name: str) -> dict[str, Any]:
    """A member that is a mapping; empty when it is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}
