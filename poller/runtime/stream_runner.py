"""One stream mapping: finds its shards, runs a worker for each that may be read, restarts one that crashed.

BLOCKED --parents done--> OPEN --lease--> (shard_worker) --ended--> DONE
                           ^                   |
                           +--- after backoff -+ crashed, gone, lease lost
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Mapping as MappingABC
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
_SEEK_INTERVAL = 1.0  # between looks whether an order can be carried out


SEEK = "seek/"


def seek_key(mapping: MappingId, at: float | None = None) -> str:
    """The store's document of an order to move a mapping, until it has been carried out: `{kind, value, shard, by}`;
    `shard` empty for all of them, `by` for the audit line. Without `at` how all of a mapping begin.
    """
    return f"{SEEK}{mapping}/" + ("" if at is None else f"{round(at * 1e6):017d}")


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
    may_overlap = True  # a shard is at work with one of them
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
        self._fresh: dict[ShardId, tuple[Position, float]] = {}  # LATEST rows that this runner created, and when
        self._leases = context.leases
        self._listing: Listing | None = None
        self._owners: dict[ShardId, str] = {}  # of shards that may be read, at the last look
        self._waiting: set[ShardId] | None = None  # shards that are still to be moved; None: all
        self._give: dict[ShardId, str] = {}  # shards that are being handed over, and to whom
        self._gone: set[ShardId] = set()  # shards that the source denied to know
        self._told: set[tuple[ShardId, str]] = set()  # losses that were reported
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
        is_same_line = pipe.gate is self._pipe.gate  # lanes that wait for a slot must not wait in the old one
        self._pipe, self._mapping = pipe, mapping
        if _shape(was) == _shape(mapping) and is_same_line:
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
        idle = [
            ShardStatus(shard, state, lease=self._lease_of(shard), owner=self._owners.get(shard))
            for shard, state in self._idle.items()
            if shard not in self._workers
        ]
        return (*running, *idle)

    def _lease_of(self, shard: ShardId) -> str:
        if self._idle[shard] is not ShardState.OPEN:
            return ""
        owner = self._owners.get(shard)
        if owner is None:
            return "free"
        return "other" if self._leases.is_live(owner) else "expired"

    def in_flight(self) -> int:
        """Invocations that run now."""
        return sum([worker.in_flight for worker in self._workers.values()])

    async def run(self) -> None:
        """Work until `stop`."""
        self._leases.on_fence(self._lose_all)
        self._leases.on_end(self._mapping.id, self._list_now.set)
        try:
            await self._run()
        finally:
            for shard in self._tasks:  # cut off
                self._leases.end(self._mapping.id, shard)
            self._leases.off_fence(self._lose_all)
            self._leases.off_end(self._mapping.id, self._list_now.set)
            for source in (*self._retired, self._source):
                if source is not None:
                    await source.close()

    def _lose_all(self) -> None:
        for worker in self._workers.values():
            worker.lose_lease()

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
        if not self._leases.is_alone:
            await self._pass_on()

    async def _pass_on(self) -> None:
        """Give up what was handed over to us while we stopped; if that fails, the others find out in time."""
        store, mapping, me = self._context.store, self._mapping.id, self._leases.me
        try:
            for row in (await store.load(mapping)).values():
                if row.owner == me and row.shard not in self._leases.at_work(mapping):
                    await store.release(Lease(mapping, row.shard, me, row.token), None)
        except StoreUnavailable as error:
            self._log(_log.warning, "leases_not_passed_on", error=str(error))

    # --- discovery

    async def _tend(self, tasks: asyncio.TaskGroup) -> None:
        """List shards, at once when one has ended and every LISTING_INTERVAL; take what is ours to read. In a fleet
        look at the rows in between: others take, release and ask for shards.
        """
        failures, list_at = 0, -inf
        while True:
            is_listing = self._list_now.is_set() or self._source is None or self._clock.now() >= list_at
            self._list_now.clear()
            for source in [source for source in self._retired if not self._using[source]]:
                self._retired.remove(source)
                del self._using[source]
                await source.close()
            try:
                source = await self._opened()
                problem = None
                if is_listing:
                    try:
                        await self._discover(source)
                        list_at = self._clock.now() + LISTING_INTERVAL
                    except PollerError as error:  # what is known goes on although it cannot be listed now
                        problem = error
                if source is self._source:
                    await self._share(source, tasks)
                if problem is not None:
                    raise problem
            except PollerError as error:
                failures += 1
                list_at = -inf
                self._set_problem(str(error))
                if isinstance(error, SourceGone):
                    self._identity = None  # when it comes back it may be another stream
                retry_after = error.retry_after if isinstance(error, SourceThrottled) else None
                delay = self._context.trouble.delay(failures, retry_after)
                await sleep_until(self._clock, self._clock.now() + delay)
                continue
            failures = 0
            self._set_problem("")
            now = self._clock.now()
            look_at = now + self._leases.look_interval
            if not self.is_settled:
                list_at, look_at = -inf, min(look_at, now + _SEEK_INTERVAL)
            await wait_until(self._list_now, self._clock, min(max(list_at, now + _SEEK_INTERVAL), look_at))

    async def _opened(self) -> StreamSource:
        """The source of the mapping as it is now; it may change while one is opened."""
        while self._source is None:
            pipe = self._pipe
            source = await pipe.open_stream()
            if pipe is self._pipe:
                self._source = source
            else:
                await source.close()
        return self._source

    async def _discover(self, source: StreamSource) -> None:
        """Make rows for what is listed and has none, delete those that nobody needs any more."""
        listing = await source.shards()
        unsaved = await self._identify(source) if self._identity is None else None
        self.is_reached = True
        store, mapping = self._context.store, self._mapping.id
        if not self.is_settled:
            self._waiting = await self._seek(listing)
            self.is_settled = self._waiting == set()
            if self._waiting is None:
                return
        plan = lineage.plan(listing, await store.load(mapping), self._start)
        if plan.create:
            for shard in plan.orphans:
                self._report_loss(shard, "a parent of the shard came and expired without having been seen")
            await store.create(mapping, plan.create)
            now = self._clock.now()
            self._fresh.update(
                (row.shard, (row.checkpoint.position, now))
                for row in plan.create
                if row.checkpoint.position.kind is PositionKind.LATEST
            )
        if plan.delete:
            await store.forget(mapping, plan.delete)
        if unsaved is not None:
            await store.put_document(stream_key(mapping), unsaved)
        self._listing = listing

    async def _share(self, source: StreamSource, tasks: asyncio.TaskGroup) -> None:
        """Start workers for the shards that are this member's to read; hand over, and ask for, others.

        Rows are loaded again after planning: a shard may have ended since, and must not be started from its end. Shards
        that are listed and have no row wait for `_discover`: an old listing may name what has expired.
        """
        store, mapping, listing = self._context.store, self._mapping.id, self._listing
        if not self._leases.is_alone and self.is_settled and await store.document_keys(seek_key(mapping)):
            self.seek()
        if listing is None or self._waiting is None:
            return
        rows = await store.load(mapping)
        plan = lineage.plan(listing, rows, self._start)
        ready = [rows[shard] for shard in plan.ready if shard in rows and shard not in self._waiting]
        self._idle = {shard: ShardState.DONE for shard, row in rows.items() if lineage.is_done(row)}
        self._idle.update(dict.fromkeys(plan.blocked, ShardState.BLOCKED))
        self._idle.update({row.shard: ShardState.OPEN for row in ready})
        self._owners = {row.shard: row.owner for row in ready if row.owner is not None}
        moves = self._leases.plan(mapping, ready)
        for shard, member in moves.give:
            if shard in self._workers and shard not in self._give:
                self._give[shard] = member
                self._workers[shard].stop()
        for shard in moves.ask:
            await store.request(mapping, rows[shard], self._leases.me)
        listed = {shard.id for shard in listing.shards}
        for shard in moves.take:
            if shard not in self._tasks:
                has_expired = shard in self._gone and shard not in listed
                self._leases.begin(mapping, shard)
                self._tasks[shard] = tasks.create_task(self._run_shard(source, rows[shard], has_expired=has_expired))

    def seek(self) -> None:
        """The store has orders to move positions: carry them out. What is in flight of the shards that are to be moved
        ends first; the others go on.
        """
        self.is_settled = False
        self._list_now.set()

    async def _seek(self, listing: Listing) -> set[ShardId] | None:
        """Carry out what an operator asked for, in its order. Answers the shards that are still to be moved, because
        something of theirs is in flight; None: all of them.

        An order that was begun is carried out again after a crash: it stands in the store until all positions do.
        """
        store, mapping = self._context.store, self._mapping.id
        waiting: set[ShardId] = set()
        for key in await store.document_keys(seek_key(mapping)):
            order = (await store.documents(key)).get(key)
            if order is None:
                continue
            shard = order["shard"]
            known = await store.load(mapping)
            # Its descendants must not go on beside records that are older than theirs.
            affected = lineage.with_descendants(shard, known) if shard else known.keys()
            if self._stop_moved([known[name] for name in affected]) or waiting & affected or (waiting and not shard):
                if not shard:
                    return None
                waiting |= affected
                continue
            rows = {name: row for name, row in known.items() if shard in {"", name}}
            if not shard and not listing.shards:
                return None  # it would become StartingPosition
            await self._move(order, rows, listing)
            await store.delete_document(key)
        return waiting

    def _stop_moved(self, rows: Sequence[Row]) -> bool:
        """Is any of these shards still at work, here or at another member, or is it another's task to move them?"""
        mine = self._leases.at_work(self._mapping.id) & {row.shard for row in rows}
        for shard in mine & self._workers.keys():
            self._workers[shard].stop()
        others = any(self._leases.is_live(row.owner) for row in rows)
        return bool(mine) or others or not self._leases.is_first or self._leases.is_fenced

    async def _move(self, order: MappingABC[str, str], rows: MappingABC[ShardId, Row], listing: Listing) -> None:
        """Put the new positions into the store. Rows stay, so that their tokens rise: a save that is late must fail."""
        store, mapping, shard = self._context.store, self._mapping.id, order["shard"]
        to = Position(PositionKind(order["kind"]), order["value"])
        wanted = {row.shard: row for row in lineage.plan(listing, {}, to).create} if not shard else {}
        if shard and not rows:
            reason = "the mapping has no such shard any more"
            self._log(_log.error, "seek_dropped", shard=shard, by=order["by"], reason=reason)
        await store.create(mapping, [row for name, row in wanted.items() if name not in rows])
        await store.forget(mapping, [name for name in rows if name not in wanted and not shard])
        for name, row in rows.items():
            target = to if shard else wanted[name].checkpoint.position if name in wanted else None
            was = spelled(row.checkpoint.position)
            now = spelled(target) if target else "forgotten: it has left the stream"
            self._log(_log.warning, "position_moved", shard=name, by=order["by"], was=was, now=now)
            if target is None:
                continue
            lease = await store.acquire(mapping, row, self._leases.me)
            if lease is None:
                raise StoreUnavailable(f"the lease of shard {name} changed hands; the seek begins anew")
            await store.release(lease, Checkpoint(target))

    async def _identify(self, source: StreamSource) -> dict[str, str] | None:
        """Is it still the stream that the stored positions belong to? Positions of a stream that was deleted and made
        anew would hide its records: shards with the same names that are "done", or floors above every new record.

        Answers what is to be stored once the rows are there: stored before, a crash in between would leave a new stream
        that is read from StartingPosition.
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
            self._told.clear()
            if known["arn"] == identity["arn"]:
                self._start = TRIM_HORIZON  # whatever is in it came after what we knew
        self._identity = identity
        return identity if known != identity else None

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
        self._leases.end(self._mapping.id, shard)

    async def _work(self, source: StreamSource, row: Row, *, has_expired: bool) -> bool:
        """False: wait before the next life. A stop lets an acquire end: cut off, it would leave a lease behind."""
        if self._stopping.asked.is_set():
            return True
        lease = await self._context.store.acquire(self._mapping.id, row, self._leases.me)
        if lease is None:
            return False
        me = self._leases.me
        self._leases.count("taken" if row.owner is None else "handed_over" if row.owner == me else "expired")
        if self._stopping.asked.is_set() or source is not self._source:
            await self._context.store.release(lease, None)
            return True
        if has_expired:
            await self._bury(lease)
            return True
        # Another member may have been faster: then its moment counts, and ours came later.
        pinned, pinned_at = self._fresh.pop(row.shard, (None, -inf))
        is_fresh = row.checkpoint.position == pinned and self._clock.now() - pinned_at <= FRESH
        retention = self.retention or _LEAST_RETENTION
        is_stale = self._clock.now() - row.saved_at > retention - _STALE_RESERVE
        if row.checkpoint.window and not self._mapping.batch.tumbling:
            meaning = (
                "TumblingWindowInSeconds was switched off; what the function counted in the open window is dropped"
            )
            self._log(
                _log.warning,
                "window_dropped",
                shard=row.shard,
                window=row.checkpoint.window.partition("\n")[0],
                meaning=meaning,
            )
        worker = ShardWorker(self._context, self._pipe, source, row, lease, is_fresh=is_fresh, is_stale=is_stale)
        self._workers[row.shard] = worker
        self._give.pop(row.shard, None)  # a wish that came while the last worker was being released
        await worker.run()
        if worker.is_lost:
            self._context.checkpointer.drop(worker)
            del self._workers[row.shard]
            self._give.pop(row.shard, None)
            self._log(_log.error, "lease_lost", shard=row.shard)
            self._leases.count("lost")
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
        self._report_loss(lease.shard, "the shard expired before it was read to its end")
        await self._context.store.release(lease, Checkpoint(END))
        self._gone.discard(lease.shard)

    def _report_loss(self, shard: ShardId, reason: str) -> None:
        """Before the store hears of it: after a crash in between it is said again. In the other order it would never be
        said. Once, though the store may be asked again.
        """
        if (shard, reason) in self._told:
            return
        self._told.add((shard, reason))
        self._pipe.observer.lost(shard, 1)
        self._log(_log.error, "records_lost", shard=shard, reason=reason)

    async def _release(self, worker: ShardWorker, checkpoint: Checkpoint | None) -> None:
        """Write the last position and give the lease up; a store that is away is asked again, within the grace."""
        shard = worker.lease.shard
        member = self._give.pop(shard, None)
        has_ended = checkpoint is not None and checkpoint.position == END
        self._context.checkpointer.drop(worker)
        for tries in itertools.count(1):
            try:
                await self._context.store.release(worker.lease, checkpoint, None if has_ended else member)
                self._leases.count("given" if member and not has_ended else "released")
                break
            except StoreUnavailable as error:
                self._log(_log.error, "release_failed", shard=shard, error=str(error), tries=tries)
                again_at = self._clock.now() + self._context.trouble.delay(tries)
                if again_at >= self._stopping.deadline:
                    break
                if self._stopping.asked.is_set():
                    await sleep_until(self._clock, again_at)
                else:
                    await wait_until(self._stopping.asked, self._clock, again_at)
        if has_ended:
            self._idle[shard] = ShardState.DONE
        del self._workers[shard]
