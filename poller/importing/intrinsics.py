"""CloudFormation's intrinsic functions, as far as a template itself can tell; all else is a hole.

Bounded for hostile templates: depth of nesting and of references, lengths of texts. A circle of references is a hole.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poller.importing.values import ACCOUNT, REGION, Holes, Joined, Text, holes_of, shown

_MAX_DEPTH = 50  # of nested functions and references
_DYNAMIC = re.compile(r"\{\{resolve:([^{}]*)\}\}")
_SUB = re.compile(r"\$\{(!?)([^${}]*)\}")
_SAMPLE_REGION, _SAMPLE_ACCOUNT = "eu-west-1", "123456789012"
FUNCTION_TYPES = ("AWS::Lambda::Function", "AWS::Serverless::Function")


class Missing:
    """`AWS::NoValue`: the member is not there."""


MISSING = Missing()


@dataclass(frozen=True, slots=True)
class Place:
    """Where the stack is. None: not known."""

    region: str | None = None
    account: str | None = None

    @property
    def partition(self) -> str:
        """The partition that the Region belongs to; AWS's main one where the Region is not known."""
        region = self.region or ""
        return "aws-cn" if region.startswith("cn-") else "aws-us-gov" if region.startswith("us-gov-") else "aws"


@dataclass(frozen=True, slots=True)
class _Named:
    """A type of resource. `ref`: the attribute that Ref means, "" for the name, None for what cannot be known.

    `arns`: attributes that are ARNs: their service and what stands before the name; with `@` before the service the ARN
    has no Region and account. `names`: attributes that are the name.
    """

    name: str
    arns: Mapping[str, tuple[str, str]]
    names: tuple[str, ...] = ()
    ref: str | None = ""


_TYPES = {
    "AWS::DynamoDB::GlobalTable": _Named("TableName", {"Arn": ("dynamodb", "table/")}),
    "AWS::DynamoDB::Table": _Named("TableName", {"Arn": ("dynamodb", "table/")}),
    "AWS::Kinesis::Stream": _Named("Name", {"Arn": ("kinesis", "stream/")}),
    "AWS::Lambda::Function": _Named("FunctionName", {"Arn": ("lambda", "function:")}),
    "AWS::S3::Bucket": _Named("BucketName", {"Arn": ("@s3", "")}),
    "AWS::SNS::Topic": _Named("TopicName", {"TopicArn": ("sns", "")}, ("TopicName",), "TopicArn"),
    "AWS::SQS::Queue": _Named("QueueName", {"Arn": ("sqs", "")}, ("QueueName",), None),
    "AWS::Serverless::Function": _Named("FunctionName", {"Arn": ("lambda", "function:")}),
    "AWS::Serverless::SimpleTable": _Named("TableName", {"Arn": ("dynamodb", "table/")}),
}
# Attributes that only the deployed stack knows: service, what stands before the name and after it.
_OPAQUE = {
    ("AWS::DynamoDB::Table", "StreamArn"): ("dynamodb", "table/", "/stream/2026-01-01T00:00:00.000"),
    ("AWS::DynamoDB::GlobalTable", "StreamArn"): ("dynamodb", "table/", "/stream/2026-01-01T00:00:00.000"),
    ("AWS::Kinesis::StreamConsumer", "ConsumerARN"): ("kinesis", "stream/sample/consumer/", ":1700000000"),
    ("AWS::Kinesis::StreamConsumer", ""): ("kinesis", "stream/sample/consumer/", ":1700000000"),
}


class Resolver:
    """Resolves the values of one template. `where` names the value in work, for the variables of its holes."""

    def __init__(
        self, template: Mapping[str, Any], place: Place, parameters: Mapping[str, str], holes: Holes, tag: str = "PARAM"
    ) -> None:
        self.where = "value"
        self.place = place
        self.holes = holes
        self.used: dict[str, str] = {}  # parameters that took the template's default
        self.resources = _section(template, "Resources")
        self._declared = _section(template, "Parameters")
        self._mappings = _section(template, "Mappings")
        self._conditions = _section(template, "Conditions")
        self._given = parameters
        self._tag = tag
        self._depth = 0
        self._kept: dict[str, Any] = {}
        self._functions: dict[str, Callable[[Any], Any]] = {
            "Ref": self._ref,
            "Fn::GetAtt": self._get_att,
            "Fn::Sub": self._sub,
            "Fn::Join": self._join,
            "Fn::Select": self._select,
            "Fn::Split": self._split,
            "Fn::FindInMap": self._find_in_map,
            "Fn::If": self._if,
            "Fn::ToJsonString": self._to_json,
        }

    # --- what callers ask

    def resolve(self, value: Any) -> Any:
        """The value as far as it is known: plain values, `Joined` texts, MISSING."""
        if self._depth >= _MAX_DEPTH:
            return self._hole(value)
        self._depth += 1
        try:
            return self._resolve(value)
        finally:
            self._depth -= 1

    def members(self, value: Any, where: str) -> dict[str, Any]:
        """The members of an object, each resolved with a name of its own; those without a value left out."""
        found = value if isinstance(value, dict) and _function(value) is None else self.resolve(value)
        members = {}
        for name, item in (found if isinstance(found, dict) else {}).items():
            self.where = f"{where}_{name}"
            if (known := self.resolve(item)) is not MISSING:
                members[name] = known
        return members

    def condition(self, name: str) -> bool | None:
        """Does the condition hold? None where the template alone does not say."""
        found: bool | None = self._once(f"condition {name}", lambda: self._holds(self._conditions.get(name)))
        return found

    def physical(self, logical: str) -> Text | None:
        """The name of a resource where the template gives one."""

        def find() -> Text | None:
            named = _TYPES.get(self.type_of(logical))
            properties = _section(self.resources[logical], "Properties") if named else {}
            name = self.resolve(properties.get(named.name)) if named else None
            return name if isinstance(name, str | Joined) and name else None

        found: Text | None = self._once(f"name {logical}", find)
        return found

    def type_of(self, logical: str) -> str:
        """The type of a resource; "" when there is none of this name."""
        return str(_section(self.resources, logical).get("Type", ""))

    def attribute(self, logical: str, name: str) -> Any:
        """`GetAtt`, or with the name "" `Ref`, of a resource."""
        kind = self.type_of(logical)
        if kind == "AWS::Lambda::Alias" and name in {"", "AliasArn"}:
            alias = _section(self.resources[logical], "Properties")

            def find() -> Text:
                return self.join(self.resolve(alias.get("FunctionName")), ":", self.resolve(alias.get("Name")))

            return self._once(f"alias {logical}", find)
        if named := _TYPES.get(kind):
            name = name or named.ref or ""
            known = self.physical(logical)
            if name in named.arns:
                service, before = named.arns[name]
                if known is not None:
                    return self.arn(service, before, known)
                return self._opaque(logical, name, self._sample(service, before, logical))
            if known is not None and (name in named.names or (not name and named.ref is not None)):
                return known
        parts = _OPAQUE.get((kind, name))
        return self._opaque(logical, name, self._sample(parts[0], parts[1], logical) + parts[2] if parts else "")

    def arn(self, service: str, before: str, name: Text) -> Text:
        """The ARN of something in the stack's Region and account."""
        start = f"arn:{self.place.partition}:"
        if service.startswith("@"):
            return self.join(start, service[1:], ":::", before, name)
        return self.join(
            start, service, ":", self.pseudo("AWS::Region"), ":", self.pseudo("AWS::AccountId"), ":", before, name
        )

    def pseudo(self, name: str) -> Any:
        """A pseudo parameter."""
        if name in self._given:
            return self._given[name]
        match name:
            case "AWS::NoValue":
                return MISSING
            case "AWS::Region":
                return self.place.region or self.holes.make(name, REGION, _SAMPLE_REGION)
            case "AWS::AccountId":
                return self.place.account or self.holes.make(name, ACCOUNT, _SAMPLE_ACCOUNT)
            case "AWS::Partition":
                return self.place.partition
            case "AWS::URLSuffix":
                return "amazonaws.com.cn" if self.place.partition == "aws-cn" else "amazonaws.com"
            case _:
                return self.holes.make(name, "CFN_" + name.removeprefix("AWS::"))

    def join(self, *parts: Any) -> Text:
        """Texts, numbers and flags one after the other; another value makes a hole of all."""
        try:
            return self._joined(parts)
        except _Unknown:
            return self._hole(list(parts))

    def function_resource(self, value: Any) -> str | None:
        """The logical id of the function in this template that an expression names, through an alias too."""
        for logical in _references(value):
            base = logical.partition(".")[0]
            kind = self.type_of(base)
            if kind in FUNCTION_TYPES:
                return base
            if kind == "AWS::Lambda::Alias":
                target = _section(self.resources[base], "Properties").get("FunctionName")
                named = [name.partition(".")[0] for name in _references(target)]
                return next((name for name in named if self.type_of(name) in FUNCTION_TYPES), None)
        return None

    # --- functions

    def _resolve(self, value: Any) -> Any:
        match value:
            case str():
                return self._dynamic(value)
            case list():
                return [item for item in map(self.resolve, value) if item is not MISSING]
            case dict():
                name = _function(value)
                if name is None:
                    members = {key: self.resolve(item) for key, item in value.items()}
                    return {key: item for key, item in members.items() if item is not MISSING}
                apply = self._functions.get(name)
                try:
                    return apply(value[name]) if apply else self._hole(value)
                except _Unknown:
                    return self._hole(value)
            case _:
                return value

    def _dynamic(self, text: str) -> Text:
        """`{{resolve:ssm:NAME}}` is filled in by CloudFormation."""
        parts: list[Text] = []
        end = 0
        for found in _DYNAMIC.finditer(text):
            parts += [text[end : found.start()], self.holes.make(found[0], found[1])]
            end = found.end()
        return self.holes.join([*parts, text[end:]]) if parts else text

    def _ref(self, name: Any) -> Any:
        if not isinstance(name, str):
            raise _Unknown
        if name.startswith("AWS::"):
            return self.pseudo(name)
        if name in self._declared:
            return self._parameter(name)
        if name in self.resources:
            return self.attribute(name, "")
        base, _, attribute = name.partition(".")  # of a SAM function: its alias or version
        if self.type_of(base) == "AWS::Serverless::Function" and attribute == "Alias":
            return self._sam_alias(base)
        return self.holes.make(f"!Ref {name}", f"Ref_{name}")

    def _sam_alias(self, logical: str) -> Text:
        given = _section(self.resources[logical], "Properties").get("AutoPublishAlias")
        alias = self._once(f"alias {logical}", lambda: self.resolve(given))
        if not isinstance(alias, str | Joined):
            raise _Unknown
        return self.join(self.attribute(logical, ""), ":", alias)

    def _parameter(self, name: str) -> Any:
        declared = _section(self._declared, name)
        kind = str(declared.get("Type", "String"))
        if name in self._given:
            value: Any = self._given[name]
        elif "Default" in declared and not kind.startswith("AWS::SSM::"):  # there the default is the name of the value
            value = declared["Default"]
            self.used[name] = shown(value, 60)
        else:
            return self.holes.make(f"!Ref {name}", f"{self._tag}_{name}")
        if kind == "CommaDelimitedList" or kind.startswith("List<"):
            return [part.strip() for part in str(value).split(",")]
        return value

    def _get_att(self, given: Any) -> Any:
        if isinstance(given, str):
            given = given.split(".", 1)
        match given:
            case [str() as logical, str() as name]:
                return self.attribute(logical, name)
        raise _Unknown

    def _sub(self, given: Any) -> Any:
        variables: dict[str, Any] = {}
        match given:
            case [text, dict() as named]:
                variables = {key: self.resolve(item) for key, item in named.items()}
            case text:
                pass
        if not isinstance(text, str | Joined):
            raise _Unknown
        pieces = text.parts if isinstance(text, Joined) else (text,)
        parts: list[Any] = []
        for piece in pieces:
            if not isinstance(piece, str):
                parts.append(Joined((piece,)))
                continue
            end = 0
            for found in _SUB.finditer(piece):
                name = found[2].strip()
                parts.append(self._dynamic(piece[end : found.start()]))
                end = found.end()
                if found[1]:
                    parts.append(f"${{{found[2]}}}")
                elif name in variables:
                    parts.append(variables[name])
                elif "." in name and name.partition(".")[0] in self.resources:
                    base, _, attribute = name.partition(".")
                    is_alias = self.type_of(base) == "AWS::Serverless::Function" and attribute == "Alias"
                    parts.append(self._ref(name) if is_alias else self.attribute(base, attribute))
                else:
                    parts.append(self._ref(name))
            parts.append(self._dynamic(piece[end:]))
        return self._joined(parts)

    def _joined(self, parts: Sequence[Any]) -> Text:
        texts = []
        for part in parts:
            if (text := _text(part)) is None:
                raise _Unknown
            texts.append(text)
        return self.holes.join(texts)

    def _join(self, given: Any) -> Any:
        match given:
            case [str() as between, items]:
                found = self.resolve(items)
                if isinstance(found, list):
                    parts = [part for item in found for part in (between, item)][1:]
                    return self._joined(parts)
        raise _Unknown

    def _select(self, given: Any) -> Any:
        match given:
            case [index, items]:
                number, found = self.resolve(index), self.resolve(items)
                if isinstance(found, list) and re.fullmatch(r"[0-9]{1,6}", str(number)) and int(number) < len(found):
                    return found[int(number)]
        raise _Unknown

    def _split(self, given: Any) -> Any:
        match given:
            case [str() as between, text] if between:
                found = self.resolve(text)
                if isinstance(found, str):
                    return found.split(between)
        raise _Unknown

    def _find_in_map(self, given: Any) -> Any:
        match given:
            case [name, first, second, *rest]:
                keys = [self.resolve(key) for key in (name, first, second)]
                if all(isinstance(key, str | int) for key in keys):
                    found: Any = self._mappings
                    for key in keys:
                        found = found.get(str(key)) if isinstance(found, dict) else None
                    if found is not None:  # never with functions in it
                        return self._dynamic(found) if isinstance(found, str) else found
                    if rest and isinstance(rest[0], dict) and "DefaultValue" in rest[0]:
                        return self.resolve(rest[0]["DefaultValue"])
        raise _Unknown

    def _if(self, given: Any) -> Any:
        match given:
            case [str() as name, yes, no]:
                holds = self.condition(name)
                if holds is not None:
                    return self.resolve(yes if holds else no)
        raise _Unknown

    def _to_json(self, given: Any) -> Any:
        found = self.resolve(given)
        if found is MISSING or any(True for _ in holes_of(found)):
            raise _Unknown
        return json.dumps(found)

    def _holds(self, condition: Any) -> bool | None:
        """Three-valued logic: None is not known."""
        if self._depth >= _MAX_DEPTH:
            return None
        self._depth += 1
        try:
            return self._judge(condition)
        finally:
            self._depth -= 1

    def _judge(self, condition: Any) -> bool | None:
        match condition:
            case {"Fn::Equals": [left, right]}:
                first, second = _text(self.resolve(left)), _text(self.resolve(right))
                return first == second if isinstance(first, str) and isinstance(second, str) else None
            case {"Fn::Not": [inner]}:
                found = self._holds(inner)
                return None if found is None else not found
            case {"Fn::And": [*inner]}:
                every = [self._holds(item) for item in inner]
                return False if False in every else None if None in every else True
            case {"Fn::Or": [*inner]}:
                every = [self._holds(item) for item in inner]
                return True if True in every else None if None in every else False
            case {"Condition": str() as name}:
                return self.condition(name)
        return None

    # --- helpers

    def _opaque(self, logical: str, name: str, likely: str) -> Joined:
        text = f"!GetAtt {logical}.{name}" if name else f"!Ref {logical}"
        return self.holes.make(text, f"{logical}_{name or 'name'}", likely)

    def _sample(self, service: str, before: str, logical: str) -> str:
        """An ARN that the resource might have."""
        region, account = self.place.region or _SAMPLE_REGION, self.place.account or _SAMPLE_ACCOUNT
        where = f"{service[1:]}::" if service.startswith("@") else f"{service}:{region}:{account}"
        properties = _section(_section(self.resources, logical), "Properties")
        fifo = ".fifo" if service == "sqs" and str(properties.get("FifoQueue")).casefold() == "true" else ""
        return f"arn:{self.place.partition}:{where}:{before}{re.sub(r'[^A-Za-z0-9-]', '-', logical)[:60]}{fifo}"

    def _hole(self, value: Any) -> Joined:
        return self.holes.make(expression(value), self.where)

    def _once(self, key: str, find: Callable[[], Any]) -> Any:
        """The finding, made once. So references that double at each step cost nothing, and the depth ends a circle."""
        if key not in self._kept:
            self._kept[key] = find()
        return self._kept[key]


class _Unknown(Exception):  # noqa: N818
    """The function cannot be resolved."""


def _section(value: Any, name: str) -> dict[str, Any]:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _function(value: dict[str, Any]) -> str | None:
    """The intrinsic function that a mapping with one key is."""
    if len(value) == 1:
        name = next(iter(value))
        if name == "Ref" or name.startswith("Fn::"):
            return name
    return None


def _text(value: Any) -> Text | None:
    """A scalar as CloudFormation puts it into a text; None for what is no scalar."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case str() | Joined():
            return value
        case _:
            return None


def _references(value: Any) -> Iterator[str]:
    """The names that an expression refers to, attributes of SAM functions included."""
    match value:
        case {"Ref": str() as name, **rest} if not rest:
            yield name
        case {"Fn::GetAtt": given, **rest} if not rest:
            yield str(given[0]) if isinstance(given, list) and given else str(given)
        case {"Fn::Sub": given, **rest} if not rest:
            text, variables = (given[0], given[1:]) if isinstance(given, list) and given else (given, [])
            for found in _SUB.finditer(str(text)):
                yield found[2].strip()
            yield from _references(variables)
        case dict():
            for item in value.values():
                yield from _references(item)
        case list():
            for item in value:
                yield from _references(item)


def expression(value: Any) -> str:
    """The template's own words for a value, short forms as in YAML. Different values give different texts."""
    if isinstance(value, dict) and (name := _function(value)):
        given = value[name]
        short = name.removeprefix("Fn::")
        if isinstance(given, str):
            return f"!{short} {given}"
        if short == "GetAtt" and isinstance(given, list) and all(isinstance(part, str) for part in given):
            return f"!GetAtt {'.'.join(given)}"
        return f"!{short} {_json(given)}"
    return _json(value)


def _json(value: Any) -> str:
    def odd(item: Any) -> str:
        if isinstance(item, Joined):
            return "".join(part if isinstance(part, str) else f"<{part.name}>" for part in item.parts)
        return str(item)

    return json.dumps(value, ensure_ascii=False, default=odd)
