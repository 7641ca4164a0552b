"""Compiled patterns as one Python function, made for them: what decides nearly every record, several times faster.

Walking the patterns (`filters`) costs a handful of calls for each field and each element of an array. Here the records
are decoded into classes that have just the fields that the patterns name, and the patterns become conditions on their
attributes, written as source and compiled, as `dataclasses` makes its methods:

    {"items": {"sku": ["a"], "n": [{"numeric": [">", 7]}]}}

    def n1(v):
        for o0 in v if type(v) is list else (v,) if type(v) is k2 else ():
            if (v == k3 if type(v := o0.f0) is str else ...) and (k4 < v ... if type(v := o0.f1) is int ...):
                return 2
        return 0

No text of a pattern or of a record stands in that source: constants are bound to the names k1, k2, ..., fields to f0,
f1, ... What the classes cannot hold (arrays of anything but objects where fields are asked for, an event with dots in
its names) and what the JSON parser refuses is left to the caller, who walks.
"""

from collections.abc import Callable, Sequence
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import msgspec

from poller.core.model import SourceKind

if TYPE_CHECKING:
    from poller.core.filters import Node, Rules

UNUSUAL = (msgspec.MsgspecError, UnicodeError, RecursionError)
"""What a `Decider` raises for a record that it cannot decide."""

Decider: TypeAlias = Callable[[bytes], bool]

PAYLOADS = {SourceKind.SQS: "body", SourceKind.KINESIS: "data"}
"""The member of a record whose text is parsed; in Kinesis one of its `kinesis`."""

NO, ABSENT, YES = 0, 1, 2
"""Verdicts. ABSENT: it matches, but only because nothing is there."""

NOTHING: Any = object()  # the value of a field that is not there

_INLINED = 8  # levels of objects in one condition, far below what Python's parser takes
_COMPARED = 4  # values are compared with one after the other
_MOST_NODES = 500  # of all patterns, dotted names counted too; more are walked: classes and code have a price as well
_Never: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=0)]  # no value: the field may not be there
_SCALARS: Final[Any] = str | int | float | bool | None


class _Place:
    """A place in the event, by the names that lead to it, and what any of the patterns asks for there."""

    __slots__ = ("attribute", "children", "dotted", "has_rules", "struct")

    def __init__(self, attribute: str = "") -> None:
        self.attribute = attribute  # that it has in the class of the object around it
        self.children: dict[str, _Place] = {}
        self.dotted: set[str] = set()
        self.has_rules = False
        self.struct: Any = None  # the class of objects here, when fields are asked for

    def add(self, node: "Node") -> int:
        """What a node asks for, and all below it. Answers how much that is."""
        self.dotted |= node.dotted
        size = 1 + len(node.dotted)
        for name, child in node.children:
            place = self.children.setdefault(name, _Place(f"f{len(self.children)}"))
            place.has_rules |= bool(child.rules)
            size += place.add(child)
        return size + sum(self.add(one) for alternatives in node.ors for one in alternatives)

    def is_simple(self) -> bool:
        """Whether classes can be made: nowhere both values and fields are asked for, and all names can be decoded."""
        return not (self.has_rules and self.children) and all(
            _is_plain(name) and child.is_simple() for name, child in self.children.items()
        )

    def build(self, payload: tuple[str, type] | None = None) -> Any:
        """The class of objects here. `payload`: a member that has to be there, and as what."""
        members: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        names: dict[str, str] = {}
        for name, child in self.children.items():
            names[child.attribute] = name
            if child.children:
                child.build()
            if payload and name == payload[0]:
                members.append((child.attribute, payload[1]))
            else:
                members.append((child.attribute, child.objects() | _SCALARS if child.children else Any, NOTHING))
        for number, name in enumerate(sorted(self.dotted)):
            names[f"d{number}"] = name
            members.append((f"d{number}", _Never, NOTHING))
        self.struct = msgspec.defstruct("Event", members, rename=names, gc=False, kw_only=True)
        return self.struct

    def objects(self) -> Any:
        """The type of an object here, or of an array of objects only."""
        return self.struct | GenericAlias(list, (self.struct,))


def _is_plain(name: str) -> bool:
    """Names beyond ASCII are not found by msgspec this way, and it takes none that JSON would escape."""
    return name.isascii() and name.isprintable() and not {'"', "\\"} & set(name)


class _Source:
    """Python source that grows, and the values of the names in it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"NOTHING": NOTHING}
        self.lines: list[str] = []
        self._functions = 0

    def bind(self, value: Any) -> str:
        """A name for a value."""
        name = f"k{len(self.values)}"
        self.values[name] = value
        return name

    def define(self, parameter: str, *body: str) -> str:
        """A function; answers its name."""
        self._functions += 1
        name = f"n{self._functions}"
        self.lines += [f"def {name}({parameter}):", *(f"    {line}" for line in body)]
        return name

    def leaf(self, rules: "Rules", value: str) -> str:
        """A condition on a value: texts and numbers at once, the rest by a call."""
        accepts = self.bind(rules.verdict)
        text = self._any(rules.strings, [(test.on_text, test) for test in rules.tests])
        number = self._any(rules.numbers, [(test.on_number, test) for test in rules.tests])
        branches = [(text, "type({}) is str"), (number, "(type({}) is int or type(v) is float)")]
        if text == "False":
            branches.reverse()
        (first, is_first), (second, is_second) = branches
        return (
            f"({first} if {is_first.format(f'v := {value}')} else {second} if {is_second.format('v')} "
            f"else {rules.accepts_absence} if v is NOTHING else {accepts}(v))"
        )

    def _any(self, plain: frozenset[Any], tests: list[tuple[str, Any]]) -> str:
        """Whether `v`, of one type, is one of the values or passes one of the tests."""
        if len(plain) == 1:
            conditions = [f"v == {self.bind(*plain)}"]
        else:  # a text just decoded has to be hashed first
            some = tuple(plain) if len(plain) <= _COMPARED else plain
            conditions = [f"v in {self.bind(some)}"] if plain else []
        conditions += [
            condition.format(*map(self.bind, test.operands), accepts=self.bind(test.accepts))
            for condition, test in tests
            if condition != "False"
        ]
        return f"({' or '.join(conditions)})" if conditions else "False"

    def fields(self, node: "Node", place: _Place, depth: int) -> str:
        """A condition on the object `o` with its depth: of a node that is never ABSENT. Cheap ones first.

        Objects in it are looked into on the spot, arrays by a call.
        """
        source = f"o{depth}"
        leaves = [
            self.leaf(rules, f"{source}.{place.children[name].attribute}")
            for name, child in node.children
            for rules in child.rules
        ]
        alternatives = [
            f"({' or '.join(self.alternative(one, place, depth) for one in alternatives)})" for alternatives in node.ors
        ]
        deeper = [
            self._below(child, place.children[name], f"{source}.{place.children[name].attribute}", depth + 1)
            for name, child in node.children
            if child.has_fields
        ]
        return " and ".join(leaves + alternatives + deeper)

    def _below(self, node: "Node", place: _Place, value: str, depth: int) -> str:
        if node.if_absent or depth % _INLINED == 0:
            return f"{self.values_at(node, place)}({value})"
        condition = self.fields(node, place, depth)
        one, struct = f"o{depth}", self.bind(place.struct)
        call = self._any_element(struct, condition, one)
        return f"({condition} if type({one} := {value}) is {struct} else {call}({one}))"

    def alternative(self, node: "Node", place: _Place, depth: int = 0) -> str:
        """The same of any node, by a call where conditions would nest as deep as $or may."""
        if node.ors or node.if_absent:
            return f"{self.verdict(node, place)}(o{depth})"
        return f"({self.fields(node, place, depth)})"

    def verdict(self, node: "Node", place: _Place) -> str:
        """A function of an object: the verdict of a node, or for one that is never ABSENT whether it matches."""
        if not node.if_absent:
            return self.define("o0", f"return {self.fields(node, place, 0)}")
        body = [f"best = {ABSENT}"]
        judge = ["if not found:", f"    return {NO}", f"if found == {YES}:", f"    best = {YES}"]
        for name, child in node.children:
            value = f"o.{place.children[name].attribute}"
            for rules in child.rules:
                body += [f"found = {self.bind(rules.verdict)}({value})", *judge]
            if child.has_fields:
                body += [f"found = {self.values_at(child, place.children[name])}({value})", *judge]
        for alternatives in node.ors:
            found = [self._verdict_of(one, place) for one in alternatives]
            body += [f"found = max({', '.join(found)})", *judge]
        return self.define("o", *body, "return best")

    def _verdict_of(self, node: "Node", place: _Place) -> str:
        call = f"{self.verdict(node, place)}(o)"
        return call if node.if_absent else f"({YES} if {call} else {NO})"

    def values_at(self, node: "Node", place: _Place) -> str:
        """A function of any value at a node's place: the verdict. In an array one element must have all fields."""
        struct = self.bind(place.struct)
        if not node.if_absent:
            return self._any_element(struct, self.fields(node, place, 0), "o0")
        return self.define(
            "v",
            f"worst = {ABSENT}",
            f"for o in {_each(struct)}:",
            f"    found = {self.verdict(node, place)}(o)",
            f"    if found == {YES}:",
            f"        return {YES}",
            f"    if found == {NO}:",
            f"        worst = {NO}",
            "return worst",
        )

    def _any_element(self, struct: str, condition: str, one: str) -> str:
        loop = [f"for {one} in {_each(struct)}:", f"    if {condition}:", f"        return {YES}"]
        return self.define("v", *loop, f"return {NO}")


def _each(struct: str) -> str:
    """The objects at a place."""
    return f"v if type(v) is list else (v,) if type(v) is {struct} else ()"


def decider(roots: Sequence["Node"], kind: SourceKind | None) -> Decider | None:
    """Whether any of the patterns matches a record, from its `wire`; it raises `UNUSUAL` where it cannot tell.

    None where the patterns do not allow it: they are too many, ask for values and for fields at one place, or ask
    Kinesis for more than `data`.
    """
    place = _Place()
    if sum(map(place.add, roots)) > _MOST_NODES or not place.is_simple():
        return None
    payload = PAYLOADS.get(kind) if kind else None
    text = place.children.get(payload) if payload else None
    if text and not text.children:
        return None  # the payload as text
    if kind is SourceKind.KINESIS and set(place.children) != {payload}:
        return None
    source = _Source()
    body = _opening(source, place, payload if text else None, kind)
    conditions = [source.alternative(root, place) for root in roots]
    name = source.define("wire", *body, f"return bool({' or '.join(conditions)})")
    exec("\n".join(source.lines), source.values)  # noqa: S102 - our own text; see the top of this file
    decide: Decider = source.values[name]
    return decide


def _opening(source: _Source, place: _Place, payload: str | None, kind: SourceKind | None) -> list[str]:
    """Lines that make `o0`, the event, of `wire`. Decoding skips a member that nobody asks for without a look at its
    UTF-8, so that is checked here.
    """

    def decoder(shape: Any) -> str:
        return source.bind(msgspec.json.Decoder(shape).decode)

    def check(text: str) -> list[str]:
        return [f"if not {text}.isascii():", f"    {text}.decode()"]

    if payload is None:
        return [*check("wire"), f"o0 = {decoder(place.build())}(wire)"]
    is_kinesis = kind is SourceKind.KINESIS
    event = place.build((payload, bytes if is_kinesis else str))
    opened = decoder(place.children[payload].objects())
    member = f"o0.{place.children[payload].attribute}"
    if not is_kinesis:
        return [*check("wire"), f"o0 = {decoder(event)}(wire)", f"{member} = {opened}({member})"]
    # Members of the record itself count where `kinesis` has none of that name.
    names = {f"d{number}": name for number, name in enumerate([payload, *sorted(place.dotted)])}
    members: list[tuple[str, Any] | tuple[str, Any, Any]] = [("kinesis", event)]
    members += [(attribute, _Never, NOTHING) for attribute in names]
    record = msgspec.defstruct("Record", members, rename=names, gc=False)
    return [  # all text around the data was encoded by the source
        f"o0 = {decoder(record)}(wire).kinesis",
        f"data = {member}",
        *check("data"),
        f"{member} = {opened}(data)",
    ]
