"""FilterCriteria: which records a mapping delivers (semantics 9), in the pattern grammar of EventBridge.

A pattern is compiled once into a tree of field names; its leaves are lists of rules. An event is walked along that tree
only, so a match costs at most its size times the pattern's, whatever both hold:

    pattern {"body": {"state": ["open", {"prefix": "wait"}], "$or": [{"a": [1]}, {"b": [2]}]}}

    root --body--> node --state--> leaf "open" | prefix "wait"         all children and all $or of a node: and
                     $or [node --a--> leaf 1, node --b--> leaf 2]      alternatives of one $or, rules of one leaf: or

Recursion follows the pattern, whose depth is bounded; arrays in arrays of an event are walked without it. Sources of
the rules: the EventBridge user guide, and aws/event-ruler, the library that AWS publishes of it.
"""

import binascii
import ipaddress
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import reduce
from itertools import product
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypedDict

import msgspec

from poller.core.filtercode import ABSENT, NO, NOTHING, PAYLOADS, UNUSUAL, YES, Decider, decider
from poller.core.model import Record, SourceKind

MAX_PATTERNS = 10  # of one mapping
MAX_PATTERN_CHARACTERS = 4096
MAX_COMBINATIONS = 1_000  # of $or alternatives in one pattern; EventBridge's own limit
MAX_DEPTH = 100  # objects, $or and dotted names below one another in a pattern
MAX_NUMBER = 5e9  # what EventBridge's numeric operators can compare, from its negative on

INVALID_PATTERN = "Invalid filter pattern definition."  # AWS's whole answer to any bad pattern


class PatternError(ValueError):
    """A pattern is refused. To API callers it is `INVALID_PATTERN`; people get `place` and `reason`.

    `place`: where in the pattern, as `body.state[0].numeric`, or the character where it stops being JSON; empty for the
    pattern as a whole. `reason`: a sentence without a full stop that follows the place.
    """

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"at {place}: {reason}" if place else reason)
        self.place = place
        self.reason = reason


class Leaf(NamedTuple):
    """One list of rules against one event. `rule`: the rule that matched, else all of them, as JSON.

    `found`: the value that decided, as JSON, or `absent`; what stands in its place is said in brackets.
    """

    path: str
    rule: str
    found: str
    matched: bool


class Decision(NamedTuple):
    """What a pattern says to an event. `leaves`: of a match every leaf that took part; else those that prevented it,
    more than one only under $or, where each alternative has its own.
    """

    matched: bool
    leaves: tuple[Leaf, ...]


# --- rules ----------------------------------------------------------------------------------------------------------


class Test(NamedTuple):
    """One rule. `accepts`: of a value that is neither object nor array. `on_text`, `on_number`: the same as source, for
    `filtercode`: a condition on `v`, of that type, with `{0}`, `{1}` for the operands; without one `accepts` is called.
    """

    accepts: Callable[[Any], bool]
    on_text: str = "{accepts}(v)"
    on_number: str = "{accepts}(v)"
    operands: tuple[Any, ...] = ()


_Rule: TypeAlias = tuple[str, Test | None]  # its JSON; None for "exists": false, which no value passes

_OPERATORS = (
    "anything-but",
    "cidr",
    "equals-ignore-case",
    "exists",
    "numeric",
    "prefix",
    "suffix",
    "wildcard",
)
_COMPARISONS = ("=", "<", "<=", ">", ">=")
_RESERVED_IN_OR = frozenset(_OPERATORS + _COMPARISONS)
_LARGEST = sys.float_info.max  # an integer in JSON may be larger, and is no float then
_MOST_DIGITS = 640  # of an integer that Python reads under any setting
_LONGEST_ADDRESS = 45  # characters of an IPv6 address that ends in an IPv4 one


class _Object(tuple[tuple[str, Any], ...]):
    """A JSON object of a pattern with every key that was written, repeated ones too."""

    __slots__ = ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _constant(value: Any) -> Callable[[Any], bool]:
    """Equal in type and value; numbers by value, so 300 is 300.0."""
    if isinstance(value, bool) or value is None:
        return lambda found: found is value
    if isinstance(value, str):
        return lambda found: type(found) is str and found == value
    return lambda found: type(found) is not bool and found == value


def _plain(value: Any) -> Test:
    return Test(_constant(value), "v == {0}", "v == {0}", (value,))


def _prefix(text: str) -> Test:
    return Test(lambda found: type(found) is str and found.startswith(text), "v.startswith({0})", "False", (text,))


def _suffix(text: str) -> Test:
    return Test(lambda found: type(found) is str and found.endswith(text), "v.endswith({0})", "False", (text,))


def _folded(text: str) -> Test:
    wanted = text.casefold()
    return Test(
        lambda found: type(found) is str and found.casefold() == wanted, "v.casefold() == {0}", "False", (wanted,)
    )


def _folded_prefix(text: str) -> Test:
    wanted = text.casefold()
    return Test(
        lambda found: type(found) is str and found.casefold().startswith(wanted),
        "v.casefold().startswith({0})",
        "False",
        (wanted,),
    )


def _folded_suffix(text: str) -> Test:
    wanted = text.casefold()
    return Test(
        lambda found: type(found) is str and found.casefold().endswith(wanted),
        "v.casefold().endswith({0})",
        "False",
        (wanted,),
    )


def _none_of(tests: Sequence[Test]) -> Test:
    """`tests`: all on texts, or all on numbers."""
    accepts = [test.accepts for test in tests]
    return Test(lambda found: not any(test(found) for test in accepts))


def _no_constant(values: Sequence[Any]) -> Test:
    tests = list(map(_constant, values))
    return Test(
        lambda found: not any(test(found) for test in tests), "v not in {0}", "v not in {0}", (frozenset(values),)
    )


def _wildcard(parts: Sequence[str]) -> Test:
    """`parts`: the texts between the asterisks. Each is looked for once, from where the one before it ended."""
    if len(parts) == 1:
        return _plain(parts[0])
    first, *middle, last = parts

    def test(found: Any) -> bool:
        if type(found) is not str or not found.startswith(first):
            return False
        at, end = len(first), len(found) - len(last)
        for part in middle:
            at = found.find(part, at)
            if at < 0:
                return False
            at += len(part)
        return at <= end and found.endswith(last)

    return Test(test, "{1} in v and v.startswith({0}) and {accepts}(v)", "False", (first, last))


def _in_range(low: float, low_open: bool, high: float, high_open: bool) -> Test:
    def test(found: Any) -> bool:
        if type(found) is not int and type(found) is not float:
            return False
        above = found > low if low_open else found >= low
        return above and (found < high if high_open else found <= high)

    within = f"{{0}} {'<' if low_open else '<='} v {'<' if high_open else '<='} {{1}}"
    return Test(test, "False", within, (low, high))


def _in_network(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Test:
    def test(found: Any) -> bool:
        if type(found) is not str or len(found) > _LONGEST_ADDRESS or "%" in found:
            return False
        try:
            return ipaddress.ip_address(found) in network
        except ValueError:
            return False

    return Test(test, on_number="False")


def _refuse(place: str, reason: str) -> NoReturn:
    raise PatternError(place, reason)


def _operand(value: _Object, place: str) -> tuple[str, Any]:
    """The operator and the operand of a rule object."""
    if len(value) != 1:
        keys = f"has {len(value)} keys" if value else "is empty"
        _refuse(place, f"a rule object {keys}; give exactly one operator, and each other one in an object of its own")
    ((name, operand),) = value
    return name, operand


def _unknown(name: str, known: Sequence[str], place: str) -> NoReturn:
    near = get_close_matches(name.casefold().replace("_", "-"), known, n=1, cutoff=0.6)
    hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(known)}"
    _refuse(place, f"{json.dumps(name)} is no operator here; {hint}")


def _text(value: Any, place: str, *, empty: bool = True) -> str:
    if not isinstance(value, str):
        _refuse(place, f"the value is {_kind(value)}; give one text")
    if not value and not empty:
        _refuse(place, "the text is empty, which every text begins and ends with; give at least one character")
    return value


def _rule(value: Any, place: str) -> _Rule:
    """One item of a rule list."""
    if isinstance(value, list):
        _refuse(place, "a list stands in a list of rules; give values or rule objects")
    if not isinstance(value, _Object):
        if _is_number(value) and not -_LARGEST <= value <= _LARGEST:
            _refuse(place, "the number is too large")
        return _shown(value), _plain(value)
    name, operand = _operand(value, place)
    if name not in _OPERATORS:
        _unknown(name, _OPERATORS, place)
    test = _operator(name, operand, f"{place}.{name}")  # first: what it takes is not nested deep
    return _shown(value), test


def _operator(name: str, operand: Any, place: str) -> Test | None:
    match name:
        case "prefix" | "suffix":
            plain, folded = (_prefix, _folded_prefix) if name == "prefix" else (_suffix, _folded_suffix)
            if not isinstance(operand, _Object):
                return plain(_text(operand, place))
            inner, text = _operand(operand, place)
            if inner != "equals-ignore-case":
                _unknown(inner, ("equals-ignore-case",), place)
            return folded(_text(text, f"{place}.{inner}"))
        case "equals-ignore-case":
            return _folded(_text(operand, place))
        case "wildcard":
            return _wildcard(_wildcard_parts(operand, place))
        case "cidr":
            return _in_network(_network(operand, place))
        case "numeric":
            return _numeric(operand, place)
        case "exists":
            if not isinstance(operand, bool):
                _refuse(place, f"the value is {_kind(operand)}; give true or false")
            return Test(lambda _: True, "True", "True") if operand else None
        case _:
            return _excluded(operand, place)


def _excluded(operand: Any, place: str) -> Test:
    """Anything but that."""
    if isinstance(operand, _Object):
        name, inner = _operand(operand, place)
        inner_place = f"{place}.{name}"
        items = inner if isinstance(inner, list) else [inner]
        if not items:
            _refuse(inner_place, "the list is empty; give at least one text")
        match name:
            case "prefix":
                return _none_of([_prefix(_text(item, inner_place, empty=False)) for item in items])
            case "suffix":
                return _none_of([_suffix(_text(item, inner_place, empty=False)) for item in items])
            case "equals-ignore-case":
                return _none_of([_folded(_text(item, inner_place)) for item in items])
            case "wildcard":
                return _none_of([_wildcard(_wildcard_parts(item, inner_place)) for item in items])
            case _:
                _unknown(name, ("equals-ignore-case", "prefix", "suffix", "wildcard"), place)
    items = operand if isinstance(operand, list) else [operand]
    if not items:
        _refuse(place, "the list is empty; give at least one text or number")
    for item in items:
        if not isinstance(item, str) and not _is_number(item):
            _refuse(place, f"it holds {_kind(item)}; only texts, or only numbers, can be excluded")
    if len({isinstance(item, str) for item in items}) > 1:
        _refuse(place, "it mixes texts and numbers; give only texts or only numbers")
    return _no_constant(items)


def _wildcard_parts(operand: Any, place: str) -> list[str]:
    """The literal texts around the asterisks, escapes taken out."""
    text = _text(operand, place)
    parts, at = [""], 0
    while at < len(text):
        one, after = text[at], text[at + 1 : at + 2]
        if one == "*":
            if after == "*":
                _refuse(place, f"two asterisks in a row, at character {at + 1} of the text; give one")
            parts.append("")
        elif one == "\\":
            if after not in ("*", "\\"):
                _refuse(place, f'a backslash before neither "*" nor "\\", at character {at + 1} of the text')
            parts[-1] += after
            at += 1
        else:
            parts[-1] += one
        at += 1
    return parts


def _network(operand: Any, place: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    text = _text(operand, place)
    address, slash, bits = text.partition("/")
    if slash and bits.isascii() and bits.isdigit() and "%" not in address:
        try:
            return ipaddress.ip_network(f"{address}/{bits}", strict=False)
        except ValueError:
            pass  # said below
    _refuse(place, "it is no address range; give one such as 10.0.0.0/24 or 2001:db8::/32")


def _numeric(operand: Any, place: str) -> Test:
    if not isinstance(operand, list) or len(operand) not in (2, 4):
        _refuse(place, 'give a list such as ["=", 5], [">", 0] or [">", 0, "<=", 5]')
    for at, item in enumerate(operand):
        if at % 2 == 0 and item not in _COMPARISONS:
            _refuse(f"{place}[{at}]", f"give one of {', '.join(_COMPARISONS)} as text")
        if at % 2 == 1 and (not _is_number(item) or not -MAX_NUMBER <= item <= MAX_NUMBER):
            _refuse(f"{place}[{at}]", "give a number from -5e9 to 5e9")
    operator, bound = operand[:2]
    if len(operand) == 4:
        upper_operator, upper = operand[2:]
        if operator not in (">", ">=") or upper_operator not in ("<", "<="):
            _refuse(place, 'a range gives its lower bound first, then the upper one: [">", 0, "<=", 5]')
        if bound >= upper:
            _refuse(place, "the lower bound is not below the upper one")
        return _in_range(bound, operator == ">", upper, upper_operator == "<")
    match operator:
        case "=":
            return _in_range(bound, False, bound, False)
        case ">" | ">=":
            return _in_range(bound, operator == ">", MAX_NUMBER, False)
        case _:
            return _in_range(-MAX_NUMBER, False, bound, operator == "<")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case _Object() | dict():
            return "an object"
        case _:
            return "a list"


def _shown(value: Any) -> str:
    """A part of a pattern as JSON."""
    if isinstance(value, _Object):
        return "{" + ", ".join(f"{json.dumps(key)}: {_shown(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


# --- compiling ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    """A node while the pattern is read: rule lists of the field itself, fields below it, alternatives of each $or."""

    rules: list["Rules"] = field(default_factory=list)
    children: dict[str, "_Draft"] = field(default_factory=dict)
    ors: list[list["_Draft"]] = field(default_factory=list)

    @property
    def has_fields(self) -> bool:
        return bool(self.children or self.ors)


class Rules:
    """A rule list. Plain values are looked up, operators tried one after the other."""

    __slots__ = ("accepts_absence", "numbers", "path", "rules", "same", "strings", "tests")

    def __init__(self, path: str, values: list[Any], place: str) -> None:
        rules = [_rule(value, f"{place}[{at}]") for at, value in enumerate(values)]
        plain = [value for value in values if not isinstance(value, _Object)]
        self.path = path
        self.rules = rules
        self.strings = frozenset(value for value in plain if isinstance(value, str))
        self.numbers = frozenset(value for value in plain if _is_number(value))
        self.same = tuple(value for value in plain if value is None or isinstance(value, bool))
        self.tests = tuple(
            test for value, (_, test) in zip(values, rules, strict=True) if test and isinstance(value, _Object)
        )
        self.accepts_absence = any(test is None for _, test in rules)

    def accepts(self, value: Any) -> bool:
        """Whether any rule takes this value, which is neither object nor array."""
        kind = type(value)
        if kind is str:
            if value in self.strings:
                return True
        elif kind is int or kind is float:
            if value in self.numbers:
                return True
        elif self.same and any(value is one for one in self.same):
            return True
        for test in self.tests:  # noqa: SIM110 - any() costs twice as much
            if test.accepts(value):
                return True
        return False

    def verdict(self, value: Any) -> "_Verdict":
        """Of any value at its place, `NOTHING` too."""
        kind = type(value)
        if value is NOTHING:
            return ABSENT if self.accepts_absence else NO
        if kind is not list and kind is not dict:
            return YES if self.accepts(value) else NO
        is_present = False
        if kind is list:
            for one in _flat(value):
                if type(one) is not dict:
                    if self.accepts(one):
                        return YES
                    is_present = True
        return ABSENT if self.accepts_absence and not is_present else NO


# How a node stands to an event. ABSENT: it matches, but only because nothing is there. An array of objects matches when
# one element does so by a value that is there; by absence only when every element does.
_Verdict: TypeAlias = int
_NO_FIELDS: dict[str, Any] = {}


class Node:
    """What a pattern asks of one place in an event.

    `names`: all fields below, under $or too, each by its name from here, with dots. `dotted`: those of them below the
    children. EventBridge joins names by dots, so an event's key `a.b` is the field `b` of `a`. `is_payload`: SQS
    `body`, Kinesis `data`: rules see it only as text, fields only as a JSON object or array (9.4). `if_absent`: the
    verdict where the event has nothing here. `only`: its rules when they are all that it has, as most nodes do.
    """

    __slots__ = ("children", "dotted", "has_fields", "if_absent", "is_payload", "names", "only", "ors", "rules")
    children: tuple[tuple[str, "Node"], ...]
    names: frozenset[str]
    if_absent: "_Verdict"

    def __init__(self, draft: _Draft, payload: str | None, path: tuple[str, ...] = ()) -> None:
        """`path`: the fields from the root to here."""
        clashing, apart = _clashing(draft)
        if clashing:
            merged = [reduce(_merged, chosen, _Draft(children=draft.children)) for chosen in product(*clashing)]
            draft = _Draft(draft.rules, {}, [merged, *apart])
        self.rules = tuple(draft.rules)
        self.children = tuple((name, Node(child, payload, (*path, name))) for name, child in draft.children.items())
        self.ors = tuple(tuple(Node(one, payload, path) for one in alternatives) for alternatives in draft.ors)
        self.has_fields = draft.has_fields
        self.is_payload = path == (payload,)
        self.only = draft.rules[0] if len(draft.rules) == 1 and not draft.has_fields else None
        self.dotted = frozenset(f"{name}.{rest}" for name, child in self.children for rest in child.names)
        below = [one.names for alternatives in self.ors for one in alternatives]
        self.names = self.dotted.union((name for name, _ in self.children), *below)
        is_absent = (
            all(leaf.accepts_absence for leaf in self.rules)
            and all(child.if_absent for _, child in self.children)
            and all(any(one.if_absent for one in alternatives) for alternatives in self.ors)
        )
        self.if_absent = ABSENT if is_absent else NO


def _names(draft: _Draft) -> set[str]:
    """Fields of a draft below which there are further fields: where arrays of objects may stand."""
    found = {name for name, child in draft.children.items() if child.has_fields}
    for alternatives in draft.ors:
        found.update(*map(_names, alternatives))
    return found


def _clashing(draft: _Draft) -> tuple[list[list[_Draft]], list[list[_Draft]]]:
    """The $or that reach into an object which something beside them reaches into too, and the others.

    The former have to be multiplied out, as EventBridge does with all: what they ask must hold in the same element of
    an array as what stands beside them.
    """
    if not draft.ors:
        return [], []
    reach = [_names(_Draft(children=draft.children)), *(set().union(*map(_names, one)) for one in draft.ors)]
    clashing: list[list[_Draft]] = []
    apart: list[list[_Draft]] = []
    for at, alternatives in enumerate(draft.ors, 1):
        others = set().union(*reach[:at], *reach[at + 1 :])
        (clashing if reach[at] & others else apart).append(alternatives)
    return clashing, apart


def _merged(one: _Draft, other: _Draft) -> _Draft:
    """Both at once."""
    children = dict(one.children)
    for name, child in other.children.items():
        children[name] = _merged(children[name], child) if name in children else child
    return _Draft([*one.rules, *other.rules], children, [*one.ors, *other.ors])


def _combinations(draft: _Draft) -> int:
    """Rules that this becomes when every $or is multiplied out."""
    count = 1
    for child in draft.children.values():
        count *= _combinations(child)
    for alternatives in draft.ors:
        count *= sum(map(_combinations, alternatives))
    return count


def _join(place: str, name: str) -> str:
    shown = name if name and name.replace("-", "a").replace("_", "a").replace("$", "a").isalnum() else json.dumps(name)
    return f"{place}.{shown}" if place else shown


def _read_object(  # noqa: PLR0917 - where in the field names, where in the text
    value: _Object, draft: _Draft, path: str, place: str, depth: int, in_or: bool
) -> None:
    """Add an object of the pattern to its draft. `path`: of the field, `place`: in the pattern, with $or in it."""
    if not value:
        _refuse(place, "an empty object asks for nothing; give at least one field")
    seen: set[str] = set()
    for name, item in value:
        here = _join(place, name)
        if name in seen:
            _refuse(here, "the key stands twice in one object, and only the last would count; merge the two")
        seen.add(name)
        below = depth + 1 + name.count(".")
        if below > MAX_DEPTH:
            _refuse(here, f"the pattern is nested more than {MAX_DEPTH} deep")
        if name == "$or":
            draft.ors.append(_read_or(item, path, here, depth + 1))
            continue
        if in_or and name in _RESERVED_IN_OR:
            _refuse(here, "an operator cannot be the name of a field inside $or; give the field first")
        target, field_path = draft, path
        for step in name.split("."):
            target = target.children.setdefault(step, _Draft())
            field_path = f"{field_path}.{step}" if field_path else step
        if isinstance(item, _Object):
            _read_object(item, target, field_path, here, below, in_or)
        elif not isinstance(item, list):
            _refuse(here, f"it is {_kind(item)}; give a list of rules, in [ ], or an object of further fields")
        elif not item:
            _refuse(here, "the list of rules is empty; give at least one")
        elif target.rules:
            shown = field_path if field_path.isprintable() else json.dumps(field_path)
            _refuse(here, f"the field {shown} is given twice, with dots and as objects; merge the two")
        else:
            target.rules.append(Rules(field_path, item, here))


def _read_or(value: Any, path: str, place: str, depth: int) -> list[_Draft]:
    if not isinstance(value, list) or len(value) < 2:
        _refuse(place, "give a list of at least two objects")
    drafts = []
    for at, item in enumerate(value):
        here = f"{place}[{at}]"
        if not isinstance(item, _Object):
            _refuse(here, f"it is {_kind(item)}; each alternative is an object")
        draft = _Draft()
        _read_object(item, draft, path, here, depth, in_or=True)
        drafts.append(draft)
    return drafts


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_pattern(text: str) -> _Object:
    if len(text) > MAX_PATTERN_CHARACTERS:
        _refuse("", f"the pattern has {len(text)} characters; give at most {MAX_PATTERN_CHARACTERS}")
    try:
        value = json.loads(text, object_pairs_hook=_Object, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        _refuse(f"{line}character {error.colno}", f"the pattern is not JSON: {error.msg}")
    except RecursionError:
        _refuse("", f"the pattern is nested more than {MAX_DEPTH} deep")
    except ValueError as error:
        _refuse("", f"the pattern is not JSON: {error}")
    if not isinstance(value, _Object):
        _refuse("", f"the pattern is {_kind(value)}; give a JSON object")
    return value


# --- matching -------------------------------------------------------------------------------------------------------


def _elements(values: list[Any]) -> Iterator[Any]:
    """What an array holds, with arrays in it opened: EventBridge flattens them."""
    stack = [iter(values)]
    while stack:
        for value in stack[-1]:
            if type(value) is list:
                stack.append(iter(value))
                break
            yield value
        else:
            stack.pop()


def _flat(values: list[Any]) -> list[Any]:
    """The same as a list; the array itself where it holds no array, which is found out without a loop in Python."""
    return list(_elements(values)) if list in map(type, values) else values


def _match(node: Node, value: Any) -> _Verdict:
    """Whether the value at a node's place is what it asks for."""
    kind = type(value)
    is_json = kind is dict or kind is list
    if node.is_payload and (node.rules if is_json else node.has_fields):
        return NO
    verdict = ABSENT
    for leaf in node.rules:
        found = leaf.verdict(value)
        if found == NO:
            return NO
        verdict = max(verdict, found)
    if node.has_fields:
        if kind is dict:
            found = _match_fields(node, value)
        elif kind is list:
            found = _match_elements(node, value)
        else:
            found = node.if_absent
        if found == NO:
            return NO
        verdict = max(verdict, found)
    return verdict


def _match_elements(node: Node, values: list[Any]) -> _Verdict:
    """All fields of a node are looked for in the same element."""
    is_absent, is_empty = True, True
    for value in _flat(values):
        if type(value) is dict:
            found = _match_fields(node, value)
            if found == YES:
                return YES
            is_empty = False
            is_absent = is_absent and found == ABSENT
    if is_empty:
        return node.if_absent
    return ABSENT if is_absent else NO


def _match_fields(node: Node, event: dict[str, Any]) -> _Verdict:
    if node.dotted and not event.keys().isdisjoint(node.dotted):
        event = _undotted(node, event)
    verdict = ABSENT
    for name, child in node.children:
        value = event.get(name, NOTHING)
        if value is NOTHING:
            found = child.if_absent
        elif child.only is not None and (kind := type(value)) is not list and kind is not dict:
            found = YES if child.only.accepts(value) else NO
        else:
            found = _match(child, value)
        if found == NO:
            return NO
        if found == YES:
            verdict = YES
    for alternatives in node.ors:
        best = NO
        for one in alternatives:
            best = max(best, _match_fields(one, event))
            if best == YES:
                break
        if best == NO:
            return NO
        verdict = max(verdict, best)
    return verdict


def _undotted(node: Node, event: Mapping[str, Any]) -> dict[str, Any]:
    """The event with the dotted keys that the node asks for as objects too."""
    fields: dict[str, dict[str, Any]] = {}
    for name in node.dotted & event.keys():
        head, _, rest = name.partition(".")
        fields.setdefault(head, {})[rest] = event[name]
    return {
        **event,
        **{head: _joined(event[head], below) if head in event else below for head, below in fields.items()},
    }


def _joined(value: Any, below: dict[str, Any]) -> Any:
    """A value and the fields that stand at its place under dotted keys. What stands twice is as in an array."""
    if type(value) is dict:
        return {**value, **{name: [value[name], item] if name in value else item for name, item in below.items()}}
    return [value, below]


# --- explaining -----------------------------------------------------------------------------------------------------


class _Trace(NamedTuple):
    """A verdict with its leaves: when it is NO only those that failed, and how many before them had not."""

    verdict: _Verdict
    leaves: tuple[Leaf, ...]
    passed: int


def _explain(node: Node, value: Any) -> _Trace:
    """`_match`, and which leaves decided."""
    is_json = isinstance(value, dict | list)
    if node.is_payload and is_json and node.rules:
        return _Trace(NO, tuple(_failed(rules, "JSON (not plain text)") for rules in node.rules), 0)
    if node.is_payload and not is_json and value is not NOTHING and node.has_fields:
        return _Trace(NO, tuple(_failed(rules, "absent (the payload is not JSON)") for rules in _first_leaves(node)), 0)
    parts = [_explain_leaf(leaf, value) for leaf in node.rules]
    if node.has_fields:
        objects = [one for one in _elements([value]) if type(one) is dict]
        traces = [_explain_fields(node, one) for one in objects or [_NO_FIELDS]]
        parts.append(_best_element(traces))
    return _all(parts)


def _first_leaves(node: Node) -> tuple[Rules, ...]:
    """The leaves at which a node without anything below it fails first."""
    if node.rules:
        return node.rules
    if node.children:
        return _first_leaves(node.children[0][1])
    return tuple(leaf for one in node.ors[0] for leaf in _first_leaves(one))


def _failed(leaf: Rules, found: str) -> Leaf:
    return Leaf(leaf.path, "[" + ", ".join(text for text, _ in leaf.rules) + "]", found, False)


def _explain_leaf(leaf: Rules, value: Any) -> _Trace:
    values = [] if value is NOTHING else list(_elements([value]))
    scalars = [one for one in values if type(one) is not dict]
    for one in scalars:
        for text, test in leaf.rules:
            if test and test.accepts(one):
                return _Trace(YES, (Leaf(leaf.path, text, _value(one), True),), 1)
    if scalars:
        found = _value(scalars[0]) if len(scalars) == 1 else _value(scalars)
        return _Trace(NO, (_failed(leaf, found),), 0)
    found = "absent"
    if value is not NOTHING:
        found += " (an object, not a value)" if values else " (an empty array)"
    if leaf.accepts_absence:
        text = next(text for text, test in leaf.rules if test is None)
        return _Trace(ABSENT, (Leaf(leaf.path, text, found, True),), 1)
    return _Trace(NO, (_failed(leaf, found),), 0)


def _explain_fields(node: Node, event: dict[str, Any]) -> _Trace:
    event = _undotted(node, event)
    parts = [_explain(child, event.get(name, NOTHING)) for name, child in node.children]
    for alternatives in node.ors:
        traces = [_explain_fields(one, event) for one in alternatives]
        best = max(traces, key=lambda trace: trace.verdict)
        if best.verdict == NO:
            leaves = tuple(leaf for trace in traces for leaf in trace.leaves)
            best = _Trace(NO, leaves, max(trace.passed for trace in traces))
        parts.append(best)
    return _all(parts)


def _best_element(traces: list[_Trace]) -> _Trace:
    """Of the elements of an array the one that matched, else the one that came nearest to it."""
    best = max(traces, key=lambda trace: trace.verdict)
    if best.verdict == YES:
        return best
    failed = [trace for trace in traces if trace.verdict == NO]
    return max(failed, key=lambda trace: trace.passed) if failed else best


def _all(parts: list[_Trace]) -> _Trace:
    passed = sum(part.passed for part in parts)
    for part in parts:
        if part.verdict == NO:
            return _Trace(NO, part.leaves, passed)
    verdict = max((part.verdict for part in parts), default=ABSENT)
    return _Trace(verdict, tuple(leaf for part in parts for leaf in part.leaves), passed)


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- records --------------------------------------------------------------------------------------------------------

_JSON_ONLY = {SourceKind.KINESIS: "data", SourceKind.DYNAMODB: "dynamodb"}
_decode = msgspec.json.Decoder().decode


def _parse(text: bytes | str, decode: Callable[[bytes | str], Any] = _decode) -> Any:
    """A JSON value, `NOTHING` when it is none or is nested deeper than can be read. Never fails."""
    try:
        return decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass  # msgspec is stricter than JSON: lone surrogates, numbers of any size
    try:
        return json.loads(text, parse_constant=_not_json, parse_int=_integer)
    except (ValueError, RecursionError):
        return NOTHING


def _integer(digits: str) -> int | float:
    """With more digits than Python takes it is infinite, as numbers with a fraction or an exponent are."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _parse_payload(text: Any) -> Any:
    """An object or an array as such, all else as it is: a text that only looks like a number is a text (9.4)."""
    if isinstance(text, str) and text.lstrip(" \t\r\n")[:1] in ("{", "["):
        value = _parse(text)
        return text if value is NOTHING else value
    return text


def _parse_data(data: Any) -> Any:
    """Kinesis `data`. What is not JSON stays as it is, for no pattern to match."""
    if not isinstance(data, str):
        return data
    try:
        raw = binascii.a2b_base64(data)
    except ValueError:
        return data
    value = _parse(raw)
    return value if type(value) is dict or type(value) is list else data


class Filter:
    """The patterns of one mapping, compiled. A record passes when any of them matches it.

    Patterns see (9.3): SQS the whole record, `body` parsed where it is a JSON object or array; Kinesis the members of
    `kinesis` beside those of the record itself, `data` decoded and parsed; DynamoDB the whole record. Without a kind
    they see any JSON document as it is. Raises `PatternError` for the first bad pattern.
    """

    __slots__ = ("_decide", "_decode", "_kind", "_opens", "_roots")

    def __init__(self, patterns: Sequence[str], kind: SourceKind | None = None) -> None:
        self._kind = kind
        self._roots = tuple(_compile(pattern, kind) for pattern in patterns)
        names: set[str] = set().union(*(root.names for root in self._roots))
        self._opens = kind in PAYLOADS and PAYLOADS[kind] in names
        self._decode = _decoder(names | {"kinesis"} if kind is SourceKind.KINESIS else names)
        self._decide: Decider = self._prepare

    def matches(self, record: Record) -> bool:
        """Whether to deliver the record. Reads `wire` only and never fails."""
        try:
            return self._decide(record.wire)
        except UNUSUAL:
            return self._walk(record.wire)

    def _prepare(self, wire: bytes) -> bool:
        """The first record makes the function for the others: it costs milliseconds, and few filters see a record."""
        self._decide = decider(self._roots, self._kind) or self._walk
        return self._decide(wire)

    def _walk(self, wire: bytes) -> bool:
        event = _parse(wire, self._decode)
        if type(event) is not dict:
            return False
        event = self._open(event)
        return any(_match_fields(root, event) for root in self._roots)

    def explain(self, event: Mapping[str, Any]) -> tuple[Decision, ...]:
        """What each pattern says to a record of a Lambda event, or without a kind to any object, and why."""
        opened = self._open(dict(event))
        traces = [_explain_fields(root, opened) for root in self._roots]
        return tuple(Decision(trace.verdict != NO, trace.leaves) for trace in traces)

    def _open(self, event: dict[str, Any]) -> dict[str, Any]:
        if self._kind is SourceKind.SQS and self._opens and "body" in event:
            return {**event, "body": _parse_payload(event["body"])}
        if self._kind is SourceKind.KINESIS and type(inner := event.get("kinesis")) is dict:
            opened = {**event, **inner}
            if self._opens and "data" in inner:
                opened["data"] = _parse_data(inner["data"])
            return opened
        return event


def _decoder(names: set[str]) -> Callable[[bytes | str], Any]:
    """Decodes these members of an object only and skips the rest. msgspec does not find names beyond ASCII this way."""
    if not all(map(str.isascii, names)):
        return _decode
    wanted: Any = TypedDict("wanted", dict.fromkeys(sorted(names), Any), total=False)  # type: ignore[misc]
    return msgspec.json.Decoder(wanted).decode


def compile_filter(patterns: Sequence[str], kind: SourceKind) -> Filter | None:
    """The filter of a mapping, None without patterns: then every record passes and nothing is to be decoded."""
    return Filter(patterns, kind) if patterns else None


def _compile(text: str, kind: SourceKind | None) -> Node:
    draft = _Draft()
    _read_object(_parse_pattern(text), draft, "", "", 0, in_or=False)
    if (count := _combinations(draft)) > MAX_COMBINATIONS:
        _refuse("", f"its $or make {count} combinations; give at most {MAX_COMBINATIONS}, or several filters")
    if kind in _JSON_ONLY:
        _check_json_only(draft, _JSON_ONLY[kind])
    return Node(draft, PAYLOADS.get(kind) if kind else None)


def _check_json_only(draft: _Draft, name: str) -> None:
    """Kinesis `data` and DynamoDB `dynamodb` are never matched as text: AWS refuses such a pattern (9.4)."""
    if name in draft.children and draft.children[name].rules:
        _refuse(name, "it is always matched as JSON; give an object of its fields, not a list of rules")
    for alternatives in draft.ors:
        for one in alternatives:
            _check_json_only(one, name)
