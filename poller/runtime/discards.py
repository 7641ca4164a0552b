"""What becomes of a discarded batch: kept in the store for redrive, reported to the failure destination."""

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from poller.core import notices
from poller.core.flow import ShardFlow
from poller.core.model import Discard, MappingId, Notice, Record, ShardId
from poller.errors import DestinationFailed, StoreUnavailable
from poller.runtime.context import Context, Pipe
from poller.runtime.invoke import Attempt, new_request_id
from poller.runtime.waiting import sleep_until

_log = structlog.get_logger(__name__)

MOST_KEPT = 10_000  # discarded batches of one mapping that the store remembers; the oldest go first
_PRUNE_EVERY = 100


def discarded_key(mapping: MappingId, at: float | None = None, unique: str = "") -> str:
    """The store's key of a discarded batch, in the order of time; without `at` how all keys of a mapping begin."""
    return f"discarded/{mapping}/" + ("" if at is None else f"{round(at * 1000):013d}-{unique}")


@dataclass(slots=True)
class _Report:
    """A report on its way, and what the store's entry has of it."""

    notice: Notice
    is_kept: bool = False
    has_payload: bool = False


class Discards:
    """Gives up batches of one shard. `reporting`: the lanes whose report is on its way; a stop lets it arrive.

    `pipe` may be replaced: the next try of a report goes to its destination.
    """

    def __init__(self, context: Context, pipe: Pipe, shard: ShardId) -> None:
        self.reporting: set[int] = set()
        self.is_stopped = False
        self._context = context
        self.pipe = pipe
        self._names = {"mapping": pipe.mapping.id, "function": pipe.mapping.function.name, "shard": shard}
        self._shard = shard
        self._kept = 0

    async def give_up(self, flow: ShardFlow, discard: Discard, last: Attempt | None) -> None:
        """Report a batch, then settle it. `last`: its last failed invocation, if any.

        While nobody takes the report its lane waits; after a stop it is not settled, and the next owner gives it up.
        """
        clock = self._context.clock
        notice = Notice(
            mapping=self.pipe.mapping,
            shard=self._shard,
            records=discard.records,
            reason=discard.reason,
            attempts=max(1, discard.attempts),
            request_id=last.request_id if last else new_request_id(self._context.random),
            at=clock.now(),
            response=last.response if last else None,
            window=discard.window,
        )
        report = _Report(notice)
        tries = 0
        while True:
            try:
                await self._report(discard.lane, report)
                break
            except (DestinationFailed, StoreUnavailable) as error:
                tries += 1
                retry_after = error.retry_after if isinstance(error, DestinationFailed) else None
                delay = self._context.backoff.delay(tries, retry_after)
                _log.warning(
                    "destination_waits", error=str(error), attempt=tries, retry_in=round(delay, 3), **self._names
                )
                flow.hold(discard, str(error), clock.now(), clock.now() + delay)
            if self.is_stopped:
                return
            await sleep_until(clock, clock.now() + delay)
        flow.confirm(discard, clock.now())
        _log.warning(
            "records_discarded",
            reason=discard.reason.value,
            attempts=discard.attempts,
            request_id=notice.request_id,
            reported=self.pipe.destination is not None,
            **self._names,
            **extent(discard.records),
        )

    async def _report(self, lane: int, report: _Report) -> None:
        """Return when the report is safe. DestinationFailed, StoreUnavailable: it is not.

        The store comes first: `redrive` finds there which records of the failure record's range were meant, and the
        payload that did not fit into it. A crash in between leaves an entry without a record, never the reverse.
        Written once: a `redrive` removes the entry, and a later try must not bring it back.
        """
        notice, destination, observer = report.notice, self.pipe.destination, self.pipe.observer
        made = notices.report(notice, destination.limit) if destination else None
        self.reporting.add(lane)
        try:
            await self._keep(report, has_payload=made is not None and made.is_kept_in_store)
            if destination is None or made is None:
                observer.dropped(len(notice.records))
                return
            await destination.send(notice, made.body)
            observer.reported("success", len(notice.records))
        except DestinationFailed:
            observer.reported("error", 0)
            raise
        finally:
            self.reporting.discard(lane)

    async def _keep(self, report: _Report, *, has_payload: bool) -> None:
        """Once, and again only when the destination has said since that it does not take the payload."""
        if report.is_kept and (report.has_payload or not has_payload):
            return
        notice = report.notice
        key = discarded_key(notice.mapping.id, notice.at, notices.identity(notice))
        await self._context.store.put_document(key, notices.kept(notice, has_payload=has_payload))
        report.is_kept, report.has_payload = True, has_payload
        self._kept += 1
        if self._kept % _PRUNE_EVERY == 0:
            await self._context.store.prune_documents(discarded_key(notice.mapping.id), MOST_KEPT)


def extent(records: Sequence[Record]) -> dict[str, object]:
    """What a log line says of records; the final invocation of a tumbling window has none."""
    if not records:
        return {"records": 0}
    return {"records": len(records), "first_sequence": records[0].id, "last_sequence": records[-1].id}
