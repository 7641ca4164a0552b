"""Filter patterns, and records to match them with: `matches` and `explain` never fail and never differ."""

import json

from poller.core.filters import Filter, PatternError
from poller.core.model import Record, SourceKind
from poller.errors import ConfigError
from poller.filtertest import judge
from tests.fuzz.kit import Target, silent

_EVENTS = (
    b'{"messageId":"1","body":"{\\"a\\":[1,\\"x\\",null],\\"b\\":{\\"c\\":2.5}}","attributes":{}}',
    b'{"kinesis":{"partitionKey":"k","data":"eyJhIjpbMSx7ImIiOiJ4In1dfQ=="},"eventID":"s:1"}',
    b'{"eventName":"INSERT","dynamodb":{"Keys":{"id":{"S":"1"}},"NewImage":{"a":{"L":[{"N":"1"}]}}}}',
)


def _compiled(pattern: str, kind: SourceKind | None) -> Filter | None:
    try:
        return Filter([pattern], kind)
    except PatternError as error:
        silent(error)
        return None


def _agree(compiled: Filter, wire: bytes) -> None:
    matched = compiled.matches(Record("1", "", 0.0, wire))
    try:
        event = json.loads(wire)
    except (ValueError, RecursionError):
        return
    if not isinstance(event, dict):
        assert not matched
        return
    decisions = compiled.explain(event)
    assert any(decision.matched for decision in decisions) == matched
    assert all(decision.leaves for decision in decisions if not decision.matched)


def patterns(document: bytes) -> None:
    """A pattern alone, against events of every source."""
    pattern = document.decode(errors="replace")
    for kind in (None, *SourceKind):
        if compiled := _compiled(pattern, kind):
            for wire in _EVENTS:
                _agree(compiled, wire)


def matches(document: bytes) -> None:
    """A pattern in the first line, an event after it."""
    first, _, wire = document.partition(b"\n")
    pattern = first.decode(errors="replace")
    for kind in (None, *SourceKind):
        if compiled := _compiled(pattern, kind):
            _agree(compiled, wire)


def verb(document: bytes) -> None:
    """`poller filter test`: lines that can be printed."""
    first, _, event = document.partition(b"\n")
    try:
        _, lines = judge(first.decode(errors="replace"), event.decode(errors="replace"))
    except ConfigError as error:
        silent(error)
    else:
        "\n".join(lines).encode()


TARGET = Target("filters", {"pattern": patterns, "match": matches, "verb": verb})
