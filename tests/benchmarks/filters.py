"""What filtering costs: events per CPU-second with 5 filters, and how that compares to parsing the event and no more.

    python -m tests.benchmarks --filters

One process, no network. Events are 1 KB payloads inside the record that Lambda would get. Of the five filters, which
use every kind of operator, the last or none matches, so that all of them are tried.
"""

import base64
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec

from poller.core.filters import Filter
from poller.core.model import Record, SourceKind
from tests.benchmarks.records import order

EVENTS = 20_000
PAYLOAD_BYTES = 1_024

_LAST: dict[str, Any] = {
    "state": [{"prefix": "ship"}],
    "items": {"sku": ["sku-7"], "quantity": [{"numeric": [">=", 7]}]},
}
_NEVER: dict[str, Any] = {
    "state": [{"prefix": "ship"}],
    "items": {"sku": ["sku-7"], "quantity": [{"numeric": [">", 7]}]},
}
_OTHERS: list[dict[str, Any]] = [
    {"state": ["open", "waiting"], "total": [{"numeric": [">", 0, "<=", 300]}]},
    {"customer": {"country": [{"anything-but": ["DE", "FR"]}]}},
    {"items": {"path": [{"wildcard": "dir/*/*.jpg"}]}, "customer": {"ip": [{"cidr": "10.0.0.0/8"}]}},
    {"$or": [{"cancelled": [{"exists": True}]}, {"state": [{"equals-ignore-case": "LOST"}]}]},
]


def stream_filters() -> list[dict[str, str]]:
    """`FilterCriteria.Filters` for a Kinesis stream of the stub's: the last one of five lets every record through."""
    return [{"Pattern": json.dumps({"data": pattern})} for pattern in [*_OTHERS, _LAST]]


def _typed(value: Any) -> dict[str, Any]:
    match value:
        case str():
            return {"S": value}
        case dict():
            return {"M": {name: _typed(item) for name, item in value.items()}}
        case list():
            return {"L": [_typed(item) for item in value]}
        case _:
            return {"N": str(value)}


def _typed_pattern(pattern: dict[str, Any]) -> dict[str, Any]:
    """The same question to an image: types are part of the path, numbers are text."""
    typed: dict[str, Any] = {}
    for name, item in pattern.items():
        if name == "$or":
            typed[name] = [_typed_pattern(one) for one in item]
        elif isinstance(item, dict):
            inner = _typed_pattern(item)
            typed[name] = {"L": {"M": inner}} if name == "items" else {"M": inner}
        elif name in {"total", "quantity"}:
            typed[name] = {"N": [{"wildcard": "7*"}] if ">=" in json.dumps(item) else ["none"]}
        else:
            typed[name] = {"S": item}
    return typed


def _sources() -> dict[SourceKind, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]]:
    """Of each source a record, and how a question to the payload becomes a pattern."""
    payload = order(PAYLOAD_BYTES)
    text = json.dumps(payload)
    arn = "arn:aws:x:eu-west-1:123456789012:orders"
    return {
        SourceKind.SQS: (
            {"messageId": "m", "body": text, "attributes": {}, "eventSource": "aws:sqs", "eventSourceARN": arn},
            lambda pattern: {"body": pattern},
        ),
        SourceKind.KINESIS: (
            {
                "kinesis": {"partitionKey": "p", "data": base64.b64encode(text.encode()).decode()},
                "eventSource": "aws:kinesis",
                "eventSourceARN": arn,
            },
            lambda pattern: {"data": pattern},
        ),
        SourceKind.DYNAMODB: (
            {
                "eventName": "INSERT",
                "dynamodb": {"Keys": {"orderId": {"S": "o-17"}}, "NewImage": _typed(payload)["M"]},
                "eventSource": "aws:dynamodb",
                "eventSourceARN": arn,
            },
            lambda pattern: {"dynamodb": {"NewImage": _typed_pattern(pattern)}},
        ),
    }


def _cost(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of one call, the median of the rounds."""
    taken = []
    for _ in range(rounds):
        begun = time.process_time()
        for _ in range(EVENTS // rounds):
            work()
        taken.append((time.process_time() - begun) / (EVENTS // rounds))
    return statistics.median(taken)


def _parse(kind: SourceKind, wire: bytes) -> None:
    """The record, and the payload in it: what any filter has to do."""
    event = msgspec.json.decode(wire)
    if kind is SourceKind.SQS:
        msgspec.json.decode(event["body"])
    elif kind is SourceKind.KINESIS:
        msgspec.json.decode(base64.b64decode(event["kinesis"]["data"]))


def measure(rounds: int) -> list[dict[str, Any]]:
    """Prints a line for each source and outcome, and answers the figures."""
    print(f"\n5 filters, {PAYLOAD_BYTES}-byte payloads, one process, no network")
    print(f"{'source':<10}{'matches':<9}{'events/CPU-s':>14}{'us/event':>10}{'x parsing alone':>17}")
    answer = []
    for kind, (document, ask) in _sources().items():
        wire = json.dumps(document, separators=(",", ":")).encode()
        record = Record("1", "", 0.0, wire)
        parsing = _cost(lambda kind=kind, wire=wire: _parse(kind, wire), rounds)
        for outcome, last in (("last", _LAST), ("none", _NEVER)):
            compiled = Filter([json.dumps(ask(pattern)) for pattern in [*_OTHERS, last]], kind)
            if compiled.matches(record) is not (outcome == "last"):
                raise AssertionError(f"the filters for {kind} do not decide as they should")
            seconds = _cost(lambda compiled=compiled, record=record: compiled.matches(record), rounds)
            figures = {
                "events_per_cpu_second": 1 / seconds,
                "us_per_event": seconds * 1e6,
                "times_parsing": seconds / parsing,
            }
            print(
                f"{kind:<10}{outcome:<9}{figures['events_per_cpu_second']:>14,.0f}{figures['us_per_event']:>10.2f}"
                f"{figures['times_parsing']:>17.2f}",
                flush=True,
            )
            answer.append({"source": kind.value, "matches": outcome, "filters": 5, **figures})
    return answer
