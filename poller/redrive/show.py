"""What redrive tells a person: results on standard output, everything else on standard error."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tqdm import tqdm

from poller.core.model import Mapping
from poller.core.notices import FailureRecord

# What is counted of batches that stay, in the order of the summary.
_STAY = {
    "failed": "failed",
    "trimmed": "trimmed from the stream",
    "stateless": "of a tumbling window whose state is not known",
    "pending": "not yet given up by the daemon",
    "unreadable": "no failure record that can be read",
    "unremoved": "delivered but not removed",
    "elsewhere": "taken by somebody else",
}


@dataclass(slots=True)
class Summary:
    """What became of a run. `more`: records beyond those that the failure records count."""

    listed: int = 0
    batches: int = 0
    records: int = 0
    more: int = 0
    verb: str = "delivered"
    stay: Counter[str] = field(default_factory=Counter)

    def batch(self, verb: str, records: int) -> None:
        """One batch was, or would be, delivered."""
        self.verb = verb
        self.batches += 1
        self.records += records

    def count(self, kind: str) -> None:
        """One batch stays."""
        self.stay[kind] += 1

    def lines(self, where: str) -> list[str]:
        """The last words of a run."""
        first = f"{_number(self.batches, 'batch', 'batches')} {self.verb}, {_number(self.records, 'record', 'records')}"
        if self.more:
            first += f", {self.more} of them more than the failure records count"
        parts = [f"{self.stay[kind]} {text}" for kind, text in _STAY.items() if self.stay[kind]]
        if not parts:
            return [first]
        return [first, f"{sum(self.stay.values())} left in {where}: {', '.join(parts)}"]


class Teller:
    """Lines and, on a terminal, a progress bar. `total`: batches to expect, None when nobody knows."""

    def __init__(self, total: int | None, *, as_json: bool, has_bar: bool) -> None:
        self._as_json = as_json
        self._bar = tqdm(
            total=total, unit=" batches", file=sys.stderr, disable=None if has_bar else True, dynamic_ncols=True
        )

    def seen(self) -> None:
        """One more was read from the box."""
        self._bar.update()

    def listed(
        self, name: str, record: FailureRecord, mapping: Mapping | None, holds: str, *, is_pending: bool = False
    ) -> None:
        """One line of `--list`. `is_pending`: the daemon is not done with it, so it is not redriven yet."""
        is_of_mapping = mapping is not None and mapping.function.arn == record.function_arn
        function = mapping.function.name if mapping and is_of_mapping else record.function_arn
        if self._as_json:
            self._out(json.dumps({**_document(name, record, mapping, holds), "pending": is_pending}))
            return
        if is_pending:
            holds += ", not yet given up by the daemon"
        extent = f"{record.start}..{record.end}" if record.count else "the final invocation of a window"
        self._out(
            f"{_instant(record.at)}  {record.condition}  {_number(record.attempts, 'attempt', 'attempts')}  "
            f"{_number(record.count, 'record', 'records')}  {function}  {_stream(record)} {record.shard}  {extent}  "
            f"request {record.request_id}  ({holds})"
        )

    def would(self, name: str, record: FailureRecord, function: str, count: int) -> None:
        """One batch of a dry run."""
        shown = f"{_number(count, 'record', 'records')} of {_stream(record)} {record.shard}"
        self._out(f"would deliver request {record.request_id}: {shown} to {function} ({name})")

    def note(self, name: str, record: FailureRecord, text: str) -> None:
        """Something to know about a batch that goes on."""
        self._err(f"{_which(name, record)}: {text}")

    def left(self, name: str, record: FailureRecord, text: str) -> None:
        """A batch that stays."""
        self._err(f"left: {_which(name, record)}: {text}")

    def unreadable(self, name: str, text: str) -> None:
        """Something else lies there."""
        self._err(f"left: {name}: {text}")

    def say(self, text: str) -> None:
        """Something about the run."""
        self._err(text)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _out(self, line: str) -> None:
        with self._bar.external_write_mode():
            print(line)

    def _err(self, line: str) -> None:
        with self._bar.external_write_mode():
            print(line, file=sys.stderr)


def _which(name: str, record: FailureRecord) -> str:
    return f"request {record.request_id} of shard {record.shard} ({name})"


def _stream(record: FailureRecord) -> str:
    return record.stream_arn.split(":", 5)[-1]


def _instant(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _number(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _document(name: str, record: FailureRecord, mapping: Mapping | None, holds: str) -> dict[str, object]:
    return {
        "name": name,
        "request_id": record.request_id,
        "mapping": mapping.id if mapping else None,
        "function_arn": record.function_arn,
        "condition": record.condition,
        "attempts": record.attempts,
        "discarded_at": _instant(record.at),
        "stream_arn": record.stream_arn,
        "shard": record.shard,
        "first_sequence": record.start or None,
        "last_sequence": record.end or None,
        "records": record.count,
        "holds": holds,
    }
