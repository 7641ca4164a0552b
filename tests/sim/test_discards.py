"""The store's entry of a discarded batch: there before its report, and written once."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any

from poller.core.flow import ShardFlow
from poller.core.model import (
    BatchPolicy,
    Checkpoint,
    DiscardReason,
    FailureDestination,
    FunctionSpec,
    Mapping,
    Position,
    PositionKind,
    Record,
    RetryPolicy,
    SourceKind,
    SourceSpec,
)
from poller.core.retry import Backoff
from poller.errors import DestinationFailed, StoreUnavailable
from poller.runtime.discards import Discards
from poller.stores.memory import MemoryStore
from tests.sim.loop import run_virtual

MAPPING = Mapping(
    id="m",
    source=SourceSpec(SourceKind.KINESIS, "arn:aws:kinesis:eu-west-1:1:stream/s", "eu-west-1", "1", "s"),
    function=FunctionSpec("f", "arn:aws:lambda:eu-west-1:1:function:f", ""),
    batch=BatchPolicy(1),
    retry=RetryPolicy(max_age=0.0),
    start=Position(PositionKind.TRIM_HORIZON),
    destination=FailureDestination("arn:aws:sqs:eu-west-1:1:q", include_payload=True),
)


class Clock:
    def now(self) -> float:
        return 1000.0 + asyncio.get_running_loop().time()

    def loop(self, at: float) -> float:
        return at - 1000.0


class Store(MemoryStore):
    """Counts what is put; the first `refusals` are refused."""

    def __init__(self, refusals: int = 0) -> None:
        super().__init__()
        self.refusals = refusals
        self.puts = 0

    async def put_document(self, key: str, document: Any) -> None:
        self.puts += 1
        if self.puts <= self.refusals:
            raise StoreUnavailable("disk full")
        await super().put_document(key, document)


class Desk:
    """Refuses so many reports. `limits`: what it takes, from try to try. `is_read`: a redrive beside it has the first
    report all the same, and removes what the store has of it.
    """

    def __init__(
        self, store: Store, refusals: int, limits: tuple[int, ...] = (10_000,), *, is_read: bool = False
    ) -> None:
        self.is_read = is_read
        self.store = store
        self.refusals = refusals
        self.limits = list(limits)
        self.tries = 0
        self.kept: list[int] = []

    @property
    def limit(self) -> int:
        return self.limits[min(self.tries, len(self.limits) - 1)]

    async def send(self, notice: Any, body: bytes) -> None:
        self.tries += 1
        found = await self.store.documents("discarded/")
        self.kept.append(len(found))
        for key in found if self.is_read else ():
            await self.store.delete_document(key)
        if self.tries <= self.refusals:
            raise DestinationFailed("the desk is closed")


def given_up(store: Store, desk: Desk) -> dict[str, dict[str, Any]]:
    """What the store has once the batch is settled."""

    async def main() -> dict[str, dict[str, Any]]:
        flow = ShardFlow(MAPPING.batch, MAPPING.retry, lambda *_: 0.0, Checkpoint(Position(PositionKind.TRIM_HORIZON)))
        flow.admit((Record("1", "k", 0.0, b'{"n":1}'),), "1", 1000.0)
        work = flow.take(0, 1000.0)
        assert work is not None
        assert work.reason is DiscardReason.AGE  # type: ignore[union-attr]
        context = SimpleNamespace(
            clock=Clock(), random=random.Random(1), store=store, backoff=Backoff(1.0, 1.0, lambda: 0.5)
        )
        observer = SimpleNamespace(reported=lambda *_: None, dropped=lambda *_: None)
        pipe = SimpleNamespace(mapping=MAPPING, destination=desk, observer=observer)
        await Discards(context, pipe, "s").give_up(flow, work, None)  # type: ignore[arg-type]
        assert flow.checkpoint() == Checkpoint(Position(PositionKind.AFTER, "1"))
        return await store.documents("discarded/")

    return run_virtual(main())


def test_a_report_that_is_tried_again_does_not_write_the_entry_again() -> None:
    """An entry that was removed meanwhile would come back, and its batch be delivered twice."""
    store = Store()
    desk = Desk(store, refusals=5, is_read=True)
    assert given_up(store, desk) == {}
    assert (store.puts, desk.tries) == (1, 6)
    assert desk.kept == [1, 0, 0, 0, 0, 0]


def test_a_write_that_failed_is_repeated_before_the_report() -> None:
    """The report names a range; only the entry says which of it."""
    store = Store(refusals=3)
    desk = Desk(store, refusals=0)
    [document] = given_up(store, desk).values()
    assert (store.puts, desk.kept) == (4, [1])
    assert document["ids"] == ["1"]


def test_a_payload_that_the_desk_refuses_later_is_kept_then() -> None:
    """A queue says only then how little it takes; the pointer must lead somewhere."""
    store = Store()
    [document] = given_up(store, Desk(store, refusals=1, limits=(10_000, 500))).values()
    assert store.puts == 2
    assert document["payload"] == '{"Records":[{"n":1}]}'
