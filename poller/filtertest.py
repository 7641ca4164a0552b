"""`poller filter test`: does a pattern match an event, and which leaf decided.

The event is a Lambda event with `Records`, one such record, or any JSON document. Records of Kinesis, DynamoDB and SQS
are opened as a mapping opens them; everything else is matched as it is.
"""

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from poller.core.filters import INVALID_PATTERN, MAX_PATTERNS, Decision, Filter, Leaf, PatternError
from poller.core.model import SourceKind
from poller.errors import ConfigError

_KINDS = {
    "aws:kinesis": SourceKind.KINESIS,
    "aws:dynamodb": SourceKind.DYNAMODB,
    "aws:sqs": SourceKind.SQS,
}
_IDS = ("messageId", "eventID")  # what names a record, the first that it has
_LONGEST = 200  # characters of a value or a rule that are shown


def judge(pattern: str, event: str) -> tuple[bool, list[str]]:
    """Whether any record of the event passes the pattern, and the lines that say so for each.

    `pattern`: a pattern, or FilterCriteria: `{"Filters": [{"Pattern": "..."}]}`. ConfigError: a pattern is refused, or
    the event is not JSON.
    """
    patterns = _patterns(pattern)
    document = _document(event)
    records = document.get("Records") if isinstance(document, dict) else None
    if not isinstance(records, list):
        matched, lines = _judge(patterns, document, "")
        return matched, _printable(lines)
    if not records:
        _judge(patterns, {}, "")  # a bad pattern is refused all the same
        return False, ["no match: the event has no records"]
    matched, lines = False, []
    for number, record in enumerate(records, 1):
        one, said = _judge(patterns, record, f"record {number}{_name(record)}: ")
        matched = matched or one
        lines += said
    return matched, _printable(lines)


def _printable(lines: Sequence[str]) -> list[str]:
    """JSON may hold half a pair of surrogates, which no terminal takes."""
    return [line.encode(errors="backslashreplace").decode() for line in lines]


def _patterns(text: str) -> list[str]:
    """The patterns of FilterCriteria, else the text as the one pattern: no pattern looks like FilterCriteria."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    filters = document.get("Filters") if isinstance(document, dict) and len(document) == 1 else None
    if not isinstance(filters, list) or not filters or not all(isinstance(one, dict) for one in filters):
        return [text]
    patterns = [one["Pattern"] for one in filters if list(one) == ["Pattern"] and isinstance(one["Pattern"], str)]
    if len(patterns) < len(filters):
        return [text]
    if len(patterns) > MAX_PATTERNS:
        raise ConfigError([f"PATTERN: FilterCriteria has {len(patterns)} filters; give at most {MAX_PATTERNS}"])
    return patterns


def _document(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, at line {error.lineno}, character {error.colno}"
    except ValueError as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deep"
    raise ConfigError([f"EVENT: not JSON: {reason}"])


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _judge(patterns: Sequence[str], event: Any, label: str) -> tuple[bool, list[str]]:
    source = event.get("eventSource") if isinstance(event, dict) else None
    compiled = _compile(patterns, _KINDS.get(source) if isinstance(source, str) else None)
    if not isinstance(event, dict):
        return False, [f"{label}no match: only a JSON object can match"]
    decisions = compiled.explain(event)
    matched = any(decision.matched for decision in decisions)
    lines = [f"{label}{_verdict(matched)}"]
    for number, decision in enumerate(decisions, 1):
        if len(decisions) > 1:
            lines.append(f"  pattern {number}: {_verdict(decision.matched)}")
        lines += _leaves(decision, "    " if len(decisions) > 1 else "  ")
    return matched, lines


def _compile(patterns: Sequence[str], kind: SourceKind | None) -> Filter:
    """Reports every bad pattern at once."""
    mistakes = []
    for number, pattern in enumerate(patterns, 1):
        try:
            Filter([pattern], kind)
        except PatternError as error:
            which = f"PATTERN {number}" if len(patterns) > 1 else "PATTERN"
            mistakes.append(f"{which}: {INVALID_PATTERN} {str(error)[0].upper()}{str(error)[1:]}")
    if mistakes:
        raise ConfigError(mistakes)
    return Filter(patterns, kind)


def _verdict(matched: bool) -> str:
    return "match" if matched else "no match"


def _leaves(decision: Decision, indent: str) -> list[str]:
    return [f"{indent}{_leaf(leaf)}" for leaf in decision.leaves]


def _leaf(leaf: Leaf) -> str:
    verb = "matches" if leaf.matched else "does not match"
    return f"{leaf.path}: {_shortened(leaf.found)} {verb} {_shortened(leaf.rule)}"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _name(record: Any) -> str:
    names = [record[key] for key in _IDS if isinstance(record.get(key), str)] if isinstance(record, dict) else []
    return f" ({names[0]})" if names else ""
