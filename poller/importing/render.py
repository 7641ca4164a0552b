"""What was judged as the text of a config file, with what to know about it in comments and in remarks."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from poller import __version__
from poller.importing.judge import Item, Judged
from poller.importing.values import shown, written

_LONGEST_REMARK = 600
_WIDTH = 110  # of comments


@dataclass(frozen=True, slots=True)
class Imported:
    """`text`: a whole config file. `remarks`: what was not carried over and what to do, a line each.

    `samples`: a value for each variable that the text has, with which it loads.
    """

    text: str
    remarks: tuple[str, ...]
    samples: dict[str, str]


def render(judged: Judged, origin: str, aws: dict[str, Any], advice: Sequence[str]) -> Imported:
    """`origin`: what was read. `aws`: that section of the file. `advice`: what to know about all of it."""
    holes = judged.holes()
    notes = [*advice]
    if holes:
        notes.append("Set these variables before the poller starts; it refuses to start without them:")
        notes += [f"  {hole.name}: {hole.means}" for hole in holes]
    blocks = [_comment([f"Made by `poller import` of esm-poller {__version__} from {origin}.", *notes])]
    if aws:
        blocks.append(_dump({"aws": aws}))
    if judged.functions:
        hint = (
            "Each still invokes its Lambda function. For an HTTP endpoint, write url: URL in the place of lambda: NAME."
        )
        blocks.append(_comment([hint]) + _dump({"functions": written(judged.functions)}))
    blocks.append(_mappings(judged))
    remarks = [f"{item.where}: {note}" for item in judged.items for note in _notes(item)]
    remarks = [shown(remark, _LONGEST_REMARK) for remark in [*remarks, *judged.foreign]]
    remarks += [note.rstrip() for note in notes]
    return Imported("\n".join(blocks), tuple(remarks), {hole.name: judged.samples[hole.name] for hole in holes})


def _notes(item: Item) -> list[str]:
    return [*(f"not carried over: {reason}" for reason in item.refused), *item.notes]


def _mappings(judged: Judged) -> str:
    foreign = textwrap.indent(_comment(judged.foreign), "  ")
    blocks = []
    for item in judged.items:
        text = _dump([written(item.document)])
        head = _comment([item.where, *_notes(item)])
        blocks.append(head + ("".join(f"# {line}\n" for line in text.splitlines()) if item.refused else text))
    good = any(not item.refused for item in judged.items)
    title = "event_source_mappings:\n" if good else "event_source_mappings: []\n"
    return title + "\n".join([textwrap.indent(block, "  ") for block in blocks] + ([foreign] if foreign else []))


def _comment(lines: Sequence[str]) -> str:
    """Each line wrapped, but for those that are indented, such as commands."""
    wrapped: list[str] = []
    for line in lines:
        wrapped += [line] if line.startswith("  ") else textwrap.wrap(shown(line, _LONGEST_REMARK), _WIDTH)
    return "".join(f"# {line}\n" for line in wrapped)


def _dump(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100_000)
    return text
