"""The shapes of documents: one description that values are checked against and that JSON Schema is made from.

`check` reports every fault at once and never fails, whatever the value is. A fault names a place by its path, such as
`functions.orders.headers` or `FilterCriteria.Filters[0].Pattern`, and its texts never hold the value itself, which may
be a secret: whoever shows a fault decides about that.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

Complaint: TypeAlias = tuple[str, str]  # what is wrong, what would be right

_LATEST_INSTANT = 253_402_300_799  # the end of the year 9999
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_$-]+")
_NUMERIC = re.compile(r"[0-9]{1,20}(\.[0-9]*)?")
_TRUE, _FALSE = frozenset({"true", "yes", "on"}), frozenset({"false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Text:
    """Text. `means` says what would be right; `rule` finds what a pattern cannot; lengths are in characters."""

    means: str = "text"
    least: int = 0
    most: int | None = None
    pattern: str | None = None
    rule: Callable[[str], Complaint | None] | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number; a boolean is none."""

    least: int
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Number:
    """A number, fractions allowed; never a boolean, infinite or NaN."""

    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Flag:
    """true or false."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts, in the order in which messages list them."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Instant:
    """Epoch seconds, or an ISO 8601 date or date-time; `epoch` makes seconds of both."""


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list. `single`: one item may stand for a list of one."""

    item: "Shape"
    most: int | None = None
    single: bool = False


@dataclass(frozen=True, slots=True)
class MapOf:
    """A mapping with free keys."""

    key: Text | Choice
    value: "Shape"
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Field:
    """One known key. Without `required`, a null means the same as leaving the key out."""

    name: str
    shape: "Shape"
    about: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Object:
    """A mapping with known keys; any other key is a fault that names the nearest known one."""

    fields: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class Tagged:
    """A mapping whose `type` says which other keys it has."""

    options: tuple[tuple[str, Object], ...]


Shape: TypeAlias = Text | Whole | Number | Flag | Choice | Instant | ListOf | MapOf | Object | Tagged

Rule: TypeAlias = Literal["type", "least", "most", "choice", "short", "long", "pattern", "rule", "missing", "unknown"]


class Fault(NamedTuple):
    """One thing wrong. `said` follows the value or the key ("is too small"); `limit` is what the rule compared with."""

    path: str
    rule: Rule
    said: str
    remedy: str
    value: Any = None
    limit: Any = None


def join(path: str, key: str) -> str:
    """The path of a key; a key that is no plain word stands in quotes."""
    shown = key if _PLAIN_KEY.fullmatch(key) else repr(key)
    return f"{path}.{shown}" if path else shown


@lru_cache(maxsize=1024)
def nearest(word: str, known: tuple[str, ...], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one, not counting case, `_` and `-`; None when none is like it."""
    folded = {_fold(name): name for name in reversed(known)}
    found = get_close_matches(_fold(word), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def _fold(word: str) -> str:
    return word.casefold().replace("_", "").replace("-", "")


def epoch(value: Any) -> float:
    """Epoch seconds of an `Instant`; a date-time without a zone is UTC. ValueError when it is none."""
    if isinstance(value, str):
        if _NUMERIC.fullmatch(value):
            return epoch(float(value))
        moment = datetime.fromisoformat(value)
        return epoch((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LATEST_INSTANT:
        raise ValueError("not an instant between 1970 and 9999")
    return float(value)


def expected(shape: Shape) -> str:
    """What a value of this shape is, to follow "give"."""
    match shape:
        case Text():
            return shape.means
        case Whole(least, None):
            return f"a whole number from {least} up"
        case Whole(least, most):
            return f"a whole number from {least} to {most}"
        case Number(least, most):
            return f"a number from {least:g} to {most:g}"
        case Flag():
            return "true or false"
        case Choice(values):
            return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
        case Instant():
            return "epoch seconds or an ISO 8601 date-time such as 2026-01-31T12:00:00Z"
        case ListOf(single=True):
            return f"{expected(shape.item)}, or a list of them"
        case ListOf(item):
            return f"a list; each item: {expected(item)}"
        case MapOf():
            return "a mapping of names to values"
        case Object(fields):
            return f"a mapping with the keys {', '.join(field.name for field in fields)}"
        case Tagged(options):
            return f"a mapping with type: {' or '.join(tag for tag, _ in options)}"


def check(shape: Shape, value: Any, path: str = "") -> Iterator[Fault]:
    """Every fault of the value, in the order of the shape's keys, then unknown keys."""
    match shape:
        case Text():
            yield from _check_text(shape, value, path)
        case Whole(least, most):
            if isinstance(value, bool) or not isinstance(value, int):
                yield _wrong_type(shape, value, path)
            elif value < least:
                yield Fault(path, "least", "is too small", f"give {expected(shape)}", value, least)
            elif most is not None and value > most:
                yield Fault(path, "most", "is too large", f"give {expected(shape)}", value, most)
        case Number(least, most):
            if isinstance(value, bool) or not isinstance(value, int | float):
                yield _wrong_type(shape, value, path)
            elif not value >= least:  # NaN too
                yield Fault(path, "least", "is too small", f"give {expected(shape)}", value, least)
            elif value > most:
                yield Fault(path, "most", "is too large", f"give {expected(shape)}", value, most)
        case Flag():
            if not isinstance(value, bool):
                yield _wrong_type(shape, value, path)
        case Choice(values):
            if not isinstance(value, str):
                yield _wrong_type(shape, value, path)
            elif value not in values:
                yield Fault(
                    path, "choice", "is not known", _meant(value, values, f"give {expected(shape)}"), value, values
                )
        case Instant():
            try:
                epoch(value)
            except (ValueError, OverflowError):
                yield Fault(path, "type", "is not an instant", f"give {expected(shape)}", value)
        case ListOf(item, most):
            if shape.single and not isinstance(value, list):
                yield from check(item, value, path)
            elif not isinstance(value, list):
                yield _wrong_type(shape, value, path)
            else:
                if most is not None and len(value) > most:
                    yield Fault(path, "long", "has too many items", f"give at most {most}", value, most)
                for index, entry in enumerate(value):
                    yield from check(item, entry, f"{path}[{index}]")
        case MapOf():
            yield from _check_map(shape, value, path)
        case Object():
            yield from _check_object(shape, value, path)
        case Tagged(options):
            yield from _check_tagged(options, shape, value, path)


def _check_text(shape: Text, value: Any, path: str) -> Iterator[Fault]:
    if not isinstance(value, str):
        yield _wrong_type(shape, value, path)
    elif len(value) < shape.least:
        said = "is empty" if not value else "is too short"
        yield Fault(path, "short", said, f"give {shape.means}", value, shape.least)
    elif shape.most is not None and len(value) > shape.most:
        yield Fault(path, "long", "is too long", f"give at most {shape.most} characters", value, shape.most)
    elif shape.pattern is not None and not re.fullmatch(shape.pattern, value):
        yield Fault(path, "pattern", "has the wrong form", f"give {shape.means}", value, shape.pattern)
    elif shape.rule is not None and (complaint := shape.rule(value)):
        yield Fault(path, "rule", *complaint, value)


def _check_map(shape: MapOf, value: Any, path: str) -> Iterator[Fault]:
    if not isinstance(value, dict):
        yield _wrong_type(shape, value, path)
        return
    if shape.most is not None and len(value) > shape.most:
        yield Fault(path, "long", "has too many entries", f"give at most {shape.most}", value, shape.most)
    for key, entry in value.items():
        place = join(path, key)
        for fault in check(shape.key, key, place):
            said = "is not a known key" if fault.rule == "choice" else f"the key {fault.said}"
            yield fault._replace(rule="unknown", said=said, value=None)
        yield from check(shape.value, entry, place)


def _check_object(shape: Object, value: Any, path: str) -> Iterator[Fault]:
    if not isinstance(value, dict):
        yield _wrong_type(shape, value, path)
        return
    known = tuple(field.name for field in shape.fields)
    for field in shape.fields:
        entry = value.get(field.name)
        if entry is not None:
            yield from check(field.shape, entry, join(path, field.name))
        elif field.required:
            yield Fault(join(path, field.name), "missing", "is missing", f"give {expected(field.shape)}")
    for key in value:
        if key not in known:
            remedy = _meant(key, known, f"the known keys are {', '.join(known)}")
            yield Fault(join(path, key), "unknown", "is not a known key", remedy)


def _check_tagged(options: tuple[tuple[str, Object], ...], shape: Tagged, value: Any, path: str) -> Iterator[Fault]:
    if not isinstance(value, dict):
        yield _wrong_type(shape, value, path)
        return
    tag = value.get("type")
    if isinstance(tag, str) and tag in dict(options):
        rest = {key: entry for key, entry in value.items() if key != "type"}
        yield from check(dict(options)[tag], rest, path)
    elif tag is None:
        yield Fault(join(path, "type"), "missing", "is missing", f"give {expected(shape)}")
    else:
        yield from check(Choice(tuple(dict(options))), tag, join(path, "type"))


def _meant(word: str, known: tuple[str, ...], otherwise: str) -> str:
    name = nearest(word, known)
    return f'did you mean "{name}"?' if name else otherwise


def _wrong_type(shape: Shape, value: Any, path: str) -> Fault:
    quoted = isinstance(shape, Text) and value is not None and not isinstance(value, dict | list)
    remedy = f"give {expected(shape)}" + (", in quotes" if quoted else "")
    return Fault(path, "type", f"is {_kind(value)}", remedy, value)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "a mapping"


def convert(shape: Shape, value: Any, filled: Collection[str], path: str = "") -> Any:
    """The value, where text at a `filled` path stands in a number's or boolean's place turned into that.

    Text that cannot be turned stays as it is, for `check` to refuse.
    """
    match shape, value:
        case ((Whole() | Number() | Flag()), str()) if path in filled:
            return _parse(shape, value.strip())
        case ListOf(item), list():
            return [convert(item, entry, filled, f"{path}[{index}]") for index, entry in enumerate(value)]
        case ListOf(item, single=True), _:
            return convert(item, value, filled, path)
        case MapOf(value=inner), dict():
            return {key: convert(inner, entry, filled, join(path, key)) for key, entry in value.items()}
        case Object(fields), dict():
            shapes = {field.name: field.shape for field in fields}
            return {
                key: convert(shapes[key], entry, filled, join(path, key)) if key in shapes else entry
                for key, entry in value.items()
            }
        case _:
            return value


def _parse(shape: Whole | Number | Flag, text: str) -> Any:
    if isinstance(shape, Flag):
        folded = text.casefold()
        return folded in _TRUE if folded in _TRUE | _FALSE else text
    try:
        return int(text) if isinstance(shape, Whole) else float(text)
    except ValueError:
        return text
