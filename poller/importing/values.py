"""Values of a template that may have holes: what only the deployed stack knows."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

REGION, ACCOUNT = "AWS_REGION", "AWS_ACCOUNT_ID"  # the variables of where the stack is
MAX_TEXT = 10_000  # characters of one value; references that double at each step end here
_SHOWN = 160


@dataclass(frozen=True, slots=True)
class Hole:
    """What the template does not tell. `name`: the variable that the config file has in its place; `means`: the
    template's own expression, in one line; `likely`: a value of the right form, "" when only the place of use says it.
    """

    name: str
    means: str
    likely: str = ""


@dataclass(frozen=True, slots=True)
class Joined:
    """Text with holes, at least one. No two texts stand side by side."""

    parts: tuple[str | Hole, ...]

    @property
    def whole(self) -> Hole | None:
        """The hole that is all of it."""
        part = self.parts[0]
        return part if len(self.parts) == 1 and isinstance(part, Hole) else None


Text: TypeAlias = str | Joined


class Holes:
    """Every hole of one import; the same expression is the same hole, another one never has its name."""

    def __init__(self) -> None:
        self._by_expression: dict[str, Hole] = {}
        self._names: set[str] = set()

    def make(self, expression: str, name: str, likely: str = "") -> Joined:
        """The value that is this hole. `name`: what the variable might be called, in any form."""
        hole = self._by_expression.get(expression)
        if hole is None:
            hole = Hole(self._free(variable(name)), shown(expression), likely)
            self._by_expression[expression] = hole
            self._names.add(hole.name)
        return Joined((hole,))

    def join(self, parts: Iterable[Text]) -> Text:
        """The texts one after the other. Too long a text is a hole."""
        joined: list[str | Hole] = []
        length = 0
        for part in flat(parts):
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            elif part:
                joined.append(part)
            length += len(part) if isinstance(part, str) else 1
            if length > MAX_TEXT:
                return self.make(f"a text of more than {MAX_TEXT} characters", "long_text")
        for before, after in pairwise(joined):
            if isinstance(after, Hole) and isinstance(before, str) and before.endswith("$"):
                # "$" before "${NAME}" would read as the escape of "${".
                expression = "".join(part if isinstance(part, str) else f"<{part.means}>" for part in joined)
                return self.make(expression, f"{after.name}_text")
        if any(isinstance(part, Hole) for part in joined):
            return Joined(tuple(joined))
        return "".join(part for part in joined if isinstance(part, str))

    def _free(self, name: str) -> str:
        number, free = 2, name
        while free in self._names:
            number, free = number + 1, f"{name}_{number}"
        return free


def flat(parts: Iterable[Text]) -> Iterator[str | Hole]:
    """The texts and holes of several values."""
    for part in parts:
        if isinstance(part, Joined):
            yield from part.parts
        else:
            yield part


def variable(name: str) -> str:
    """The name in the form of an environment variable: `OrdersQueue.Arn` is `ORDERS_QUEUE_ARN`."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    plain = re.sub(r"[^A-Za-z0-9]+", "_", split).strip("_").upper()[:80]
    return plain if re.match(r"[A-Z]", plain) else f"VALUE_{plain}".rstrip("_")


def holes_of(value: Any) -> Iterator[Hole]:
    """Every hole in a value, in order."""
    match value:
        case Joined(parts):
            yield from (part for part in parts if isinstance(part, Hole))
        case dict():
            for item in value.values():
                yield from holes_of(item)
        case list():
            for item in value:
                yield from holes_of(item)


def written(value: Any) -> Any:
    """The value as the config file has it: holes are `${NAME}`, a `${` that means itself is `$${`. Shares nothing."""
    match value:
        case str():
            return value.replace("${", "$${")
        case Joined(parts):
            return "".join(f"${{{part.name}}}" if isinstance(part, Hole) else written(part) for part in parts)
        case dict():
            return {key: written(item) for key, item in value.items()}
        case list():
            return [written(item) for item in value]
        case _:
            return value


def filled(value: Any, samples: Mapping[str, str]) -> Any:
    """The value with its holes filled in."""
    match value:
        case Joined(parts):
            return "".join(samples[part.name] if isinstance(part, Hole) else part for part in parts)
        case dict():
            return {key: filled(item, samples) for key, item in value.items()}
        case list():
            return [filled(item, samples) for item in value]
        case _:
            return value


def shown(text: Any, most: int = _SHOWN) -> str:
    """Foreign text in one line of a comment or a terminal: no line breaks, no control characters, not too long."""
    plain = "".join(letter if letter.isprintable() else " " for letter in str(text)[: most * 4])
    line = " ".join(plain.split())
    return line if len(line) <= most else f"{line[:most]}..."
