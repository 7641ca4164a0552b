"""YAML text as plain values that know their lines. Safe against hostile files: bounded depth, size and aliases.

JSON is YAML. Keys are always text, as written. Dates stay text. A mistake of the text itself is a ConfigError with the
line; duplicate keys are kept in the tree, so that they are reported with everything else.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml
from yaml.constructor import SafeConstructor
from yaml.reader import Reader
from yaml.resolver import Resolver

from poller.errors import ConfigError

MAX_DEPTH = 32
MAX_VALUES = 200_000  # aliases expanded
MAX_KEY = 256  # characters

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is not in every build of PyYAML
_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_SCALARS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"))

Content: TypeAlias = "dict[str, Entry] | list[Node] | str | int | float | bool | None"


@dataclass(slots=True)
class Node:
    """One value. `line` counts from 1; `size` is the number of values in it, aliases expanded."""

    line: int
    content: Content
    size: int = 1


@dataclass(slots=True)
class Entry:
    """One key of a mapping: the line of the key, its value, and the lines where the key was given again."""

    line: int
    node: Node
    again: list[int] = field(default_factory=list)


ShortForm: TypeAlias = Callable[[str, Node], Node]


def parse(text: str, path: str, short_form: ShortForm | None = None, max_depth: int = MAX_DEPTH) -> Node | None:
    """The one document in the text, None when there is none. ConfigError: `path:line: mistake`, for the first one.

    `short_form`: what a value with an application's tag, such as `!Ref`, stands for; scalars come to it as text.
    Without it such tags are mistakes.
    """
    if found := Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError([f"{path}:{line}: a character that YAML does not allow, {found[0]!a}; take it out"])
    return _Composer(text, path, short_form, max_depth).document()


def _line(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1


class _Composer:
    """Makes nodes of parser events. Holds the anchors that are complete; one inside itself is thereby unknown."""

    def __init__(self, text: str, path: str, short_form: ShortForm | None, max_depth: int) -> None:
        self._text = text
        self._path = path
        self._short_form = short_form
        self._max_depth = max_depth
        self._events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self._anchors: dict[str, Node] = {}
        self._resolver: Any = Resolver()
        self._constructor = SafeConstructor()

    def document(self) -> Node | None:
        root: Node | None = None
        try:
            for event in self._events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        raise self._mistake(event, "a second document starts here; give one document in a file")
                    root = self._node(next(self._events), 0)
        except yaml.MarkedYAMLError as error:
            raise self._syntax(error) from None
        return root

    def _syntax(self, error: yaml.MarkedYAMLError) -> ConfigError:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        said = " ".join(part for part in (error.context, error.problem) if part)
        lines = self._text.splitlines()
        near = lines[line - 1] if line <= len(lines) else ""
        remedy = 'put "${...}" in quotes' if "${" in near else "check indentation, colons, brackets and quotes"
        return ConfigError([f"{self._path}:{line}: not valid YAML: {said}; {remedy}"])

    def _mistake(self, event: Any, text: str) -> ConfigError:
        return ConfigError([f"{self._path}:{_line(event)}: {text}"])

    def _node(self, event: Any, depth: int) -> Node:
        if depth > self._max_depth:
            text = f"values are nested deeper than {self._max_depth} levels; make the file flatter"
            raise self._mistake(event, text)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._mistake(event, f"*{event.anchor} has no anchor before it; write &{event.anchor} first")
            return self._anchors[event.anchor]
        short = self._short_form if re.match("!.", event.tag or "") else None
        if isinstance(event, yaml.ScalarEvent):
            node = Node(_line(event), event.value if short else self._scalar(event))
        elif not short and event.tag not in {None, "!", _TAG + "map", _TAG + "seq"}:
            raise self._mistake(event, f"the tag {event.tag} is not supported; take it out")
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, depth)
        else:
            node = self._mapping(event, depth)
        if short:
            node = short(event.tag, node)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _sequence(self, start: Any, depth: int) -> Node:
        items: list[Node] = []
        node = Node(_line(start), items)
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
            self._grow(node, items[-1], event)
        return node

    def _mapping(self, start: Any, depth: int) -> Node:
        entries: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        node = Node(_line(start), entries)
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = _line(event)
            key, is_merge = self._key(event)
            value = self._node(next(self._events), depth + 1)
            self._grow(node, value, event)
            if is_merge:
                self._merge(event, value, merged)
            elif key in entries:
                entries[key].again.append(line)
            else:
                entries[key] = Entry(line, value)
        for key, entry in merged.items():
            entries.setdefault(key, entry)
        return node

    def _grow(self, node: Node, part: Node, event: Any) -> None:
        node.size += part.size
        if node.size > MAX_VALUES:
            raise self._mistake(event, f"the file has more than {MAX_VALUES} values, aliases expanded; use fewer")

    def _key(self, event: Any) -> tuple[str, bool]:
        if isinstance(event, yaml.AliasEvent):
            event_node = self._node(event, 0)
            if isinstance(event_node.content, str):
                return event_node.content, False
        if not isinstance(event, yaml.ScalarEvent):
            raise self._mistake(event, "a key must be text, not a list or mapping; write name: value")
        if len(event.value) > MAX_KEY:
            raise self._mistake(event, f"a key is longer than {MAX_KEY} characters; make it shorter")
        if event.anchor is not None:
            self._anchors[event.anchor] = Node(_line(event), event.value)
        return event.value, self._tag(event) == _MERGE

    def _merge(self, event: Any, value: Node, into: dict[str, Entry]) -> None:
        parts = value.content if isinstance(value.content, list) else [value]
        for part in parts:
            if not isinstance(part.content, dict):
                raise self._mistake(event, "<< needs a mapping or a list of mappings; give *ANCHOR of one")
            for key, entry in part.content.items():
                into.setdefault(key, entry)

    def _tag(self, event: Any) -> str:
        if event.tag is not None and event.tag != "!":
            if event.tag not in _SCALARS:
                raise self._mistake(event, f"the tag {event.tag} is not supported; take it out")
            return str(event.tag)
        if event.tag == "!":
            return _TAG + "str"
        tag: str = self._resolver.resolve(yaml.ScalarNode, event.value, event.implicit)
        return tag

    def _scalar(self, event: Any) -> str | float | bool | None:
        text: str = event.value
        node = yaml.ScalarNode(tag=self._tag(event), value=text)
        try:
            match node.tag.removeprefix(_TAG):
                case "null":
                    return None
                case "bool":
                    return self._constructor.bool_values[text.lower()]
                case "int":
                    return int(self._constructor.construct_yaml_int(node))
                case "float":
                    return float(self._constructor.construct_yaml_float(node))
                case _:
                    return text
        except (ValueError, KeyError, IndexError, OverflowError):
            return text  # such as 0x_ or 5,000 digits: no number after all
