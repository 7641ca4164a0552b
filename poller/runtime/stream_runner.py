"""One stream mapping: finds its shards, runs a worker for each that may be read, restarts one that crashed.

BLOCKED --parents done--> OPEN --lease--> (shard_worker) --ended--> DONE
                           ^                   |
                           +--- after backoff -+ crashed, gone, lease lost
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from math import inf

import structlog

from poller.core import lineage
from poller.core.model import (
    END,
    TRIM_HORIZON,
    Checkpoint,
    Lease,
    Listing,
    Mapping,
    MappingId,
    Position,
    PositionKind,
    Row,
    ShardId,
    ShardState,
    ShardStatus,
    StreamFacts,
)
from poller.errors import AccessDenied, PollerError, SourceGone, SourceThrottled, SourceUnavailable, StoreUnavailable
from poller.ports import StreamSource
from poller.runtime.context import Context, Pipe
from poller.runtime.runner import Stopping
from poller.runtime.shard_worker import ShardWorker
from poller.runtime.waiting import sleep_until, wait_until

_log = structlog.get_logger(__name__)

LISTING_INTERVAL = 30.0  # besides at the end of each shard
_LEAST_RETENTION = 86_400.0  # of a stream, where it does not say
_STALE_RESERVE = 3_600.0
FRESH = 1.0  # how long after its row a LATEST iterator still means the same moment
_RELEASE_TRIES = 5


def seek_key(mapping: MappingId) -> str:
    """The store's document that says where a mapping is to go on, until that has been carried out: `orders`, each
    `{kind, value, shard, by}`; `shard` empty for all of them, `by` for the audit line.
    """
    return f"seek/{mapping}"


def stream_key(mapping: MappingId) -> str:
    """The store's document that says which stream the positions of a mapping belong to."""
    return f"stream/{mapping}"


def _is_replaced(known: dict[str, str], now: dict[str, str]) -> bool:
    if known["arn"] != now["arn"]:
        return True
    return bool(known["incarnation"] and now["incarnation"]) and known["incarnation"] != now["incarnation"]


def _shape(mapping: Mapping) -> tuple[object, ...]:
    """What a worker cannot change while it works."""
    return mapping.batch.factor, mapping.batch.tumbling, mapping.function


def spelled(position: Position) -> str:
    """As the audit lines have it."""
    return f"{position.kind} {position.value}".strip()


class StreamRunner:
    """Implements `Runner` for Kinesis and DynamoDB Streams."""

    breaker = "closed"
    receivers: int | None = None
    receiver_limit: int | None = None

    def __init__(self, context: Context, pipe: Pipe) -> None:
        self.is_reached = False
        self.is_settled = False
        self.retention: float | None = None
        self._context = context
        self._clock = context.clock
        self._pipe = pipe
        self._mapping = pipe.mapping
        self._problem = ""
        self._source: StreamSource | None = None
        self._identity: dict[str, str] | None = None
        self._start = pipe.mapping.start
        self._stopping = Stopping(context.clock, pipe.mapping)
        self._list_now = asyncio.Event()
        self._tasks: dict[ShardId, asyncio.Task[None]] = {}
        self._workers: dict[ShardId, ShardWorker] = {}
        self._idle: dict[ShardId, ShardState] = {}  # shards as of the last listing; a worker knows better
        self._fresh: dict[ShardId, float] = {}  # LATEST rows that this runner created, and when
        self._gone: set[ShardId] = set()  # shards that the source denied to know
        self._failures: dict[ShardId, int] = {}
        self._using: Counter[StreamSource] = Counter()  # shards at work with each source
        self._retired: list[StreamSource] = []  # sources that a retune replaced; shards may still be at work with them

    @property
    def problem(self) -> str:
        """See `Runner.problem`; that of the mapping before that of a shard."""
        return self._problem or next((worker.problem for worker in self._workers.values() if worker.problem), "")

    def stop(self, grace: float = inf) -> None:
        """See `Runner.stop`."""
        self._stopping.ask(grace)

    def retune(self, pipe: Pipe) -> bool:
        """See `Runner.retune`. Another number of lanes or tumbling window, and another function, whose role is in the
        records, take new workers: each shard changes over when what it has in flight has ended, no shard waits for
        another. All else is taken over at once.
        """
        was, mapping = self._mapping, pipe.mapping
        if was.source != mapping.source:
            return False
        self._pipe, self._mapping = pipe, mapping
        if _shape(was) == _shape(mapping):
            for worker in self._workers.values():
                worker.retune(pipe)
            return True
        if self._source is not None:
            self._retired.append(self._source)
            self._source = None
        for worker in self._workers.values():
            worker.stop()
        self._list_now.set()
        return True

    def shards(self) -> tuple[ShardStatus, ...]:
        """Workers first, then the shards that have none."""
        running = [worker.status() for worker in self._workers.values()]
        idle = [ShardStatus(shard, state) for shard, state in self._idle.items() if shard not in self._workers]
        return (*running, *idle)

    def in_flight(self) -> int:
        """Invocations that run now."""
        return sum([worker.in_flight for worker in self._workers.values()])

    async def run(self) -> None:
        """Work until `stop`."""
        try:
            await self._run()
        finally:
            for source in (*self._retired, self._source):
                if source is not None:
                    await source.close()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tender = tasks.create_task(self._tend(tasks))
            await self._stopping.asked.wait()
            tender.cancel()
            for worker in self._workers.values():
                worker.stop()
            await self._stopping.drain(list(self._tasks.values()))
        async with asyncio.TaskGroup() as tasks:
            for worker in self._workers.values():  # cut off: the last write belongs to the parent, not to the task
                tasks.create_task(self._release(worker, worker.checkpoint()))

    # --- discovery

    async def _tend(self, tasks: asyncio.TaskGroup) -> None:
        """List shards and start workers: at once when a shard has ended, and every LISTING_INTERVAL."""
        failures = 0
        while True:
            self._list_now.clear()
            for source in [source for source in self._retired if not self._using[source]]:
                self._retired.remove(source)
                del self._using[source]
                await source.close()
            try:
                if self._source is None:
                    self._source = await self._pipe.open_stream()
                await self._discover(self._source, tasks)
            except PollerError as error:
                failures += 1
                self._set_problem(str(error))
                if isinstance(error, SourceGone):
                    self._identity = None  # when it comes back it may be another stream
                retry_after = error.retry_after if isinstance(error, SourceThrottled) else None
                delay = self._context.trouble.delay(failures, retry_after)
                await sleep_until(self._clock, self._clock.now() + delay)
                continue
            failures = 0
            self._set_problem("")
            await wait_until(self._list_now, self._clock, self._clock.now() + LISTING_INTERVAL)

    async def _discover(self, source: StreamSource, tasks: asyncio.TaskGroup) -> None:
        listing = await source.shards()
        if self._identity is None:
            await self._identify(source)
        self.is_reached = True
        store, mapping = self._context.store, self._mapping.id
        while not self.is_settled:
            self.is_settled = await self._seek(listing)
        plan = lineage.plan(listing, await store.load(mapping), self._start)
        if plan.create:
            await store.create(mapping, plan.create)
            for shard in plan.orphans:
                self._report_loss(shard, "a parent of the shard came and expired without having been seen")
            now = self._clock.now()
            self._fresh.update(
                (row.shard, now) for row in plan.create if row.checkpoint.position.kind is PositionKind.LATEST
            )
        if plan.delete:
            await store.forget(mapping, plan.delete)
        rows = await store.load(mapping)  # again: a shard may have ended since, and must not be started from its end
        ready = [shard for shard in plan.ready if not lineage.is_done(rows[shard])]
        self._idle = {shard: ShardState.DONE for shard, row in rows.items() if lineage.is_done(row)}
        self._idle.update(dict.fromkeys(plan.blocked, ShardState.BLOCKED))
        self._idle.update(dict.fromkeys(ready, ShardState.OPEN))
        listed = {shard.id for shard in listing.shards}
        for shard in ready:
            if shard not in self._tasks:
                has_expired = shard in self._gone and shard not in listed
                self._tasks[shard] = tasks.create_task(self._run_shard(source, rows[shard], has_expired=has_expired))

    async def _seek(self, listing: Listing) -> bool:
        """Carry out the first thing that an operator asked for. True: nothing is left.

        Done again from its start after a crash: the order stands in the store until the new positions do.
        """
        store, mapping, key = self._context.store, self._mapping.id, seek_key(self._mapping.id)
        document = (await store.documents(key)).get(key)
        if document is None:
            return True
        order, *rest = document["orders"]
        to, shard = Position(PositionKind(order["kind"]), order["value"]), order["shard"]
        rows = await store.load(mapping)
        if not shard:
            await store.forget(mapping)
            await store.create(mapping, lineage.plan(listing, {}, to).create)
        elif shard in rows:
            lease = await store.acquire(mapping, rows[shard], self._context.owner)
            if lease is None:
                raise StoreUnavailable(f"the lease of shard {shard} changed hands; the seek waits")
            await store.release(lease, Checkpoint(to))
        else:
            reason = "the mapping has no such shard any more"
            self._log(_log.error, "seek_dropped", shard=shard, by=order["by"], reason=reason)
        for row in rows.values():
            if shard in {"", row.shard}:
                was, now = spelled(row.checkpoint.position), spelled(to)
                self._log(_log.warning, "position_moved", shard=row.shard, by=order["by"], was=was, now=now)
        if rest:
            await store.put_document(key, {"orders": rest})
        else:
            await store.delete_document(key)
        return not rest

    async def _identify(self, source: StreamSource) -> None:
        """Is it still the stream that the stored positions belong to? Positions of a stream that was deleted and made
        anew would hide its records: shards with the same names that are "done", or floors above every new record.
        """
        try:
            facts = await source.facts()
        except AccessDenied as error:  # of a right that reading does not need
            self._log(_log.warning, "stream_facts_unknown", error=str(error))
            facts = StreamFacts(inf)
        self.retention = facts.retention if facts.retention < inf else None
        store, key = self._context.store, stream_key(self._mapping.id)
        identity = {"arn": self._mapping.source.arn, "incarnation": facts.incarnation}
        known = (await store.documents(key)).get(key)
        if known is not None and _is_replaced(known, identity):
            if self._tasks:
                raise SourceUnavailable("the stream was replaced by another one; its shards must end first")
            self._log(_log.error, "stream_replaced", was=known, now=identity, meaning="its positions are dropped")
            await store.forget(self._mapping.id)
            if known["arn"] == identity["arn"]:
                self._start = TRIM_HORIZON  # whatever is in it came after what we knew
        if known != identity:
            await store.put_document(key, identity)
        self._identity = identity

    def _set_problem(self, problem: str) -> None:
        if problem and problem != self._problem:
            self._log(_log.warning, "mapping_problem", error=problem)
        self._problem = problem

    def _log(self, write: Callable[..., object], event: str, **fields: object) -> None:
        write(event, mapping=self._mapping.id, function=self._mapping.function.name, **fields)

    # --- one shard: the failure domain

    async def _run_shard(self, source: StreamSource, row: Row, *, has_expired: bool) -> None:
        """One life of a shard's worker. Whatever goes wrong ends here and is tried again from the stored position."""
        shard = row.shard
        self._using[source] += 1
        try:
            is_well = await self._work(source, row, has_expired=has_expired)
        except StoreUnavailable as error:
            is_well = False
            self._log(_log.error, "store_unavailable", shard=shard, error=str(error))
        except Exception as error:  # noqa: BLE001  # one bad shard never stops another
            is_well = False
            self._log(_log.error, "shard_crashed", shard=shard, exc_info=error)
            if shard in self._workers:
                await self._release(self._workers[shard], None)
        self._using[source] -= 1
        if is_well:
            self._failures.pop(shard, None)
        else:
            failures = self._failures[shard] = self._failures.get(shard, 0) + 1
            delay = self._context.trouble.delay(failures)
            await wait_until(self._stopping.asked, self._clock, self._clock.now() + delay)
        del self._tasks[shard]
        self._list_now.set()

    async def _work(self, source: StreamSource, row: Row, *, has_expired: bool) -> bool:
        """False: wait before the next life. A stop lets an acquire end: cut off, it would leave a lease behind."""
        if self._stopping.asked.is_set():
            return True
        lease = await self._context.store.acquire(self._mapping.id, row, self._context.owner)
        if lease is None:
            return False
        if self._stopping.asked.is_set() or source is not self._source:
            await self._context.store.release(lease, None)
            return True
        if has_expired:
            await self._bury(lease)
            return True
        is_fresh = self._clock.now() - self._fresh.pop(row.shard, -inf) <= FRESH
        retention = self.retention or _LEAST_RETENTION
        is_stale = self._clock.now() - row.saved_at > retention - _STALE_RESERVE
        worker = ShardWorker(self._context, self._pipe, source, row, lease, is_fresh=is_fresh, is_stale=is_stale)
        self._workers[row.shard] = worker
        await worker.run()
        if worker.is_lost:
            self._context.checkpointer.drop(worker)
            del self._workers[row.shard]
            self._log(_log.error, "lease_lost", shard=row.shard)
            return False
        if worker.is_gone:
            self._gone.add(row.shard)
        has_ended = worker.has_ended and not worker.is_gone
        await self._release(worker, Checkpoint(END) if has_ended else worker.checkpoint())
        if has_ended:
            self._log(_log.info, "shard_ended", shard=row.shard)
        return not worker.is_gone

    async def _bury(self, lease: Lease) -> None:
        """The shard has left the stream before it was read to its end: what it still held is lost, and that is said."""
        await self._context.store.release(lease, Checkpoint(END))
        self._gone.discard(lease.shard)
        self._report_loss(lease.shard, "the shard expired before it was read to its end")

    def _report_loss(self, shard: ShardId, reason: str) -> None:
        self._pipe.observer.lost(shard, 1)
        self._log(_log.error, "records_lost", shard=shard, reason=reason)

    async def _release(self, worker: ShardWorker, checkpoint: Checkpoint | None) -> None:
        """Write the last position and give the lease up; a store that is away is asked again, within the grace."""
        shard = worker.lease.shard
        self._context.checkpointer.drop(worker)
        for tries in range(1, _RELEASE_TRIES + 1):
            try:
                await self._context.store.release(worker.lease, checkpoint)
                break
            except StoreUnavailable as error:
                self._log(_log.error, "release_failed", shard=shard, error=str(error), tries=tries)
                again_at = self._clock.now() + self._context.trouble.delay(tries)
                if again_at >= self._stopping.deadline:
                    break
                await sleep_until(self._clock, again_at)
        if checkpoint is not None and checkpoint.position == END:
            self._idle[shard] = ShardState.DONE
        del self._workers[shard]
