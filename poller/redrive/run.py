"""Read failure records from a box, deliver their batches, remove what succeeded."""

import asyncio
import os
import random
import signal
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from poller.aws.session import AwsClients
from poller.clock import SystemClock, system_random
from poller.control import known_mappings
from poller.core.filters import compile_filter
from poller.core.model import (
    MAX_PAYLOAD_BYTES,
    NO_TRACE,
    Delivered,
    Invocation,
    Mapping,
    MappingId,
    Outcome,
    Partial,
    Record,
    Reply,
    Row,
    ShardId,
    SourceSpec,
    Throttled,
    Window,
)
from poller.core.notices import UNKNOWN_STATE, FailureRecord, Kept, identity_of, parse, parse_kept
from poller.core.replies import WINDOW_BYTES, idempotency_key, judge, payload, window_tail
from poller.core.retry import Backoff
from poller.errors import PollerError, StoreUnavailable
from poller.mappings import find_mapping, parse_source, resolve_function
from poller.ports import CheckpointStore, Target
from poller.redrive.boxes import find_kept, open_box
from poller.redrive.lock import locked
from poller.redrive.model import Box, Found
from poller.redrive.refetch import RangeTrimmed, Refetcher, pieces, records_of
from poller.redrive.show import Summary, Teller
from poller.runtime.gate import Gate
from poller.runtime.invoke import new_request_id
from poller.settings import FunctionSettings, Settings, StoreSettings
from poller.sources import Sources, traits
from poller.stores import open_store
from poller.targets import open_target
from poller.telemetry import Metrics

_TRIES = 8  # of one batch at a target that is throttled or cannot be reached
_REMOVE_TRIES = 4
_HOLD_MARGIN = 60.0  # seconds that a batch is held beyond its invocation's timeout
_AHEAD = 10  # batches that wait for a worker
_MOST_RECORDS = 10_000  # of one invocation, where the batch does not say
_NOTHING = Kept()


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said. `place`: see `open_box`. `mapping`, `requests`: only those; empty: all.

    `target`: FunctionName to invoke instead of the mapping's. `rate`: invocations a second. `limit`: batches at most.
    `partial`: deliver what the stream still has of a batch. `dry`: invoke and remove nothing. `listing`: only show.
    """

    place: str = "store"
    mapping: str = ""
    requests: frozenset[str] = frozenset()
    target: str = ""
    rate: float | None = None
    concurrency: int = 1
    limit: int | None = None
    partial: bool = False
    dry: bool = False
    listing: bool = False
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class _Letter:
    """A failure record with what is known of it."""

    found: Found
    record: FailureRecord
    source: SourceSpec
    mapping: Mapping | None
    uuid: MappingId = ""  # of the mapping, known here or not
    key: str = ""  # of the store's entry
    kept: Kept = _NOTHING  # what that says
    is_pending: bool = False  # the daemon is not done with it

    @property
    def payload(self) -> bytes | None:
        """The whole event."""
        return self.record.payload if self.record.payload is not None else self.kept.payload

    @property
    def window(self) -> Window | None:
        """That of the last invocation, with its state if anybody knows it."""
        if self.record.window is not None and self.record.window.state == UNKNOWN_STATE:
            return self.kept.window or self.record.window
        return self.record.window


class _Function:
    """A target with its limits."""

    def __init__(self, settings: FunctionSettings, target: Target) -> None:
        limits = [limit for limit in (settings.max_concurrency, target.capacity) if limit is not None]
        self.name = settings.name
        self.target = target
        self.gate = Gate(min(limits, default=None), settings.max_invocations_per_second)


class _Undelivered(Exception):  # noqa: N818
    """The batch stays where it is. The message says why; `kind` how it is counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Redrive:
    """One run. `known`: the mappings of the config file and of the store, with their functions."""

    def __init__(
        self,
        settings: Settings,
        options: Options,
        *,
        box: Box,
        clients: AwsClients,
        store: CheckpointStore | None,
        known: Sequence[tuple[Mapping, FunctionSettings]],
        teller: Teller,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.summary = Summary()
        self._settings = settings
        self._options = options
        self._box = box
        self._clients = clients
        self._store = store
        self._known = known
        self._tell = teller
        self._clock = SystemClock(loop)
        self._random: random.Random = system_random()
        self._backoff = Backoff(settings.retry.initial_backoff, settings.retry.maximum_backoff, self._random.random)
        self._sources = Sources(clients, self._clock)
        self._readers: dict[tuple[str, str, str | None], Refetcher] = {}  # stream, function's role, role to read with
        self._functions: dict[tuple[FunctionSettings, str], _Function] = {}
        self._rate = Gate(None, options.rate)
        self._rows: dict[MappingId, dict[ShardId, Row]] = {}
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Begin nothing new; what is being delivered ends."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """`stop` was called."""
        return self._stopped.is_set()

    async def run(self) -> None:
        """Everything that lies in the box, once. Batches of one shard one after the other.

        PollerError: the box or the store cannot be read (any further); what was being delivered has ended.
        """
        lines: list[asyncio.Queue[_Letter | None]] = [asyncio.Queue(_AHEAD) for _ in range(self._options.concurrency)]
        try:
            async with asyncio.TaskGroup() as tasks:
                keeper = tasks.create_task(self._box.keep())
                workers = [tasks.create_task(self._work(line)) for line in lines]
                problem = await self._sort(lines)
                await asyncio.wait(workers)
                keeper.cancel()
            if problem:
                raise problem
        finally:
            for function in self._functions.values():
                await function.target.close()

    async def _sort(self, lines: Sequence[asyncio.Queue[_Letter | None]]) -> PollerError | None:
        """Hand out what was asked for; the problem that ended it early, if any."""
        problem = None
        missing = set(self._options.requests)
        try:
            await self._hand_out(lines, missing)
        except PollerError as error:
            problem = error
        for line in lines:
            await line.put(None)
        if missing and not problem and not self.is_stopped:
            return PollerError(f"there is no batch with request id {', '.join(sorted(missing))} in {self._box.where}")
        return problem

    async def _hand_out(self, lines: Sequence[asyncio.Queue[_Letter | None]], missing: set[str]) -> None:
        taken = 0
        async for found in self._box.read():
            if self.is_stopped:
                return
            self._tell.seen()
            letter = await self._open(found)
            if letter is None:
                self._box.leave(found)
                continue
            missing.discard(letter.record.request_id)
            if self._options.listing:
                self._tell.listed(
                    letter.found.name, letter.record, letter.mapping, _holds(letter), is_pending=letter.is_pending
                )
                self.summary.listed += 1
                self._box.leave(found)
            else:
                shard = f"{letter.record.stream_arn}\n{letter.record.shard}"
                await lines[zlib.crc32(shard.encode()) % len(lines)].put(letter)
            taken += 1
            if taken == self._options.limit:
                missing.clear()
                return

    async def _work(self, line: asyncio.Queue[_Letter | None]) -> None:
        while (letter := await line.get()) is not None:
            if self.is_stopped:
                continue
            try:
                await self._redrive(letter)
            except _Undelivered as error:
                self._box.leave(letter.found)
                self.summary.count(error.kind)
                self._tell.left(letter.found.name, letter.record, str(error))

    async def _open(self, found: Found) -> _Letter | None:
        """None: it is not one of those that were asked for."""
        options = self._options
        try:
            record, source = read(found)
        except ValueError as error:
            if not (options.mapping or options.requests):
                self.summary.count("unreadable")
                self._tell.unreadable(found.name, str(error))
            return None
        if options.requests and record.request_id not in options.requests:
            return None
        uuids = self._candidates(found, record)
        uuid, key, document = await self._kept(found, record, uuids)
        try:
            kept = parse_kept(document) if document is not None else _NOTHING
        except ValueError as error:
            self._tell.note(found.name, record, f"{error}, so it is not used")
            kept, document = _NOTHING, None
        mapping = next((one for one, _ in self._known if one.id == uuid and one.source.kind is record.kind), None)
        if options.mapping and uuid != options.mapping:
            return None
        is_pending = document is not None and not await self._is_settled(uuid, record.shard, kept)
        return _Letter(found, record, source, mapping, uuid, key, kept, is_pending)

    def _candidates(self, found: Found, record: FailureRecord) -> list[MappingId]:
        """The mappings whose batch it may be, the likeliest first: the one in its name, the one of its function, then
        those of its stream, which may have had that function before.
        """
        stream = record.stream_arn.partition("/consumer/")[0]
        near = [mapping for mapping, _ in self._known if mapping.source.arn.partition("/consumer/")[0] == stream]
        exact = [
            mapping.id
            for mapping in near
            if (mapping.source.arn, mapping.function.arn) == (record.stream_arn, record.function_arn)
        ]
        known = {mapping.id for mapping, _ in self._known}
        named = [found.mapping] if found.mapping in known or (found.mapping and not exact) else []
        return list(dict.fromkeys((*named, *exact, *(mapping.id for mapping in near))))

    async def _kept(
        self, found: Found, record: FailureRecord, uuids: Sequence[MappingId]
    ) -> tuple[MappingId, str, dict[str, Any] | None]:
        """The mapping, and what the store remembers of the batch: nothing of what Lambda itself discarded."""
        if found.kept is not None:
            return found.mapping, found.name, found.kept
        for uuid in uuids if self._store is not None else ():
            assert self._store is not None
            identity = identity_of(uuid, record.shard, record.request_id, record.condition, record.start, record.end)
            if (entry := await find_kept(self._store, uuid, record.at, identity)) is not None:
                return uuid, *entry
        is_sure = uuids and (uuids[0] == found.mapping or self._is_exact(uuids[0], record))
        return (uuids[0] if is_sure else ""), "", None

    def _is_exact(self, uuid: MappingId, record: FailureRecord) -> bool:
        whole = (uuid, record.stream_arn, record.function_arn)
        return any(whole == (mapping.id, mapping.source.arn, mapping.function.arn) for mapping, _ in self._known)

    async def _is_settled(self, uuid: MappingId, shard: ShardId, kept: Kept) -> bool:
        """Is the daemon done with it: will it neither report nor deliver it (again) itself? Its position says so."""
        assert self._store is not None
        for is_fresh in (False, True):
            if is_fresh or uuid not in self._rows:
                self._rows[uuid] = await self._store.load(uuid)
            row = self._rows[uuid].get(shard)
            if row is None or kept.is_settled(row.checkpoint):
                return True
        return False

    async def _redrive(self, letter: _Letter) -> None:
        """Deliver a batch and remove its record. _Undelivered: it stays."""
        if letter.is_pending:
            text = "the daemon is not done with it: it reports or delivers it again itself, once it runs"
            raise _Undelivered("pending", text)
        function = self._function(letter)
        events = await self._events(letter)
        count = sum(len(records) for records, _ in events)
        if self._options.dry:
            self.summary.batch("would be delivered", count)
            self._tell.would(letter.found.name, letter.record, function.name, count)
            return
        if letter.window is not None and not letter.window.is_final:
            text = "the state that its function answers goes nowhere: its window went on without the batch"
            self._tell.note(letter.found.name, letter.record, text)
        for records, body in events:
            await self._deliver(letter, function, records, body)
        await self._remove(letter)
        self.summary.batch("delivered", count)

    def _function(self, letter: _Letter) -> _Function:
        name = self._options.target or letter.record.function_arn
        try:
            spec, settings = resolve_function(name, self._settings.functions, letter.source)
        except ValueError as error:
            raise _Undelivered("failed", f"its function {name} {error}; give --to FUNCTION") from None
        del spec
        key = (settings, letter.source.region)
        if key not in self._functions:
            target = open_target(settings, letter.source.region, self._clients, self._clock)
            self._functions[key] = _Function(settings, target)
        return self._functions[key]

    async def _events(self, letter: _Letter) -> list[tuple[Sequence[Record], bytes]]:
        """The batch as events, mostly one; with each its records."""
        record = letter.record
        if letter.payload is not None:
            try:
                return [(records_of(letter.payload, record.kind), letter.payload)]
            except ValueError as error:
                raise _Undelivered("unreadable", str(error)) from None
        window = letter.window
        if window is not None and window.state == UNKNOWN_STATE:
            text = "its window's state is not known; it is only in a payload or the daemon's store"
            raise _Undelivered("stateless", text)
        records = await self._again(letter) if record.count else []
        tail = window_tail(window, record.shard, record.stream_arn) if window else b"]}"
        room = MAX_PAYLOAD_BYTES - (WINDOW_BYTES if window else 0)
        room -= len(window.state) if window else 0
        batch = letter.mapping.batch.size if letter.mapping else 0
        most = min(_MOST_RECORDS, max(record.count, batch))
        parts = list(pieces(records, most, room)) or [()]
        return [(part, payload(part, tail)) for part in parts]

    async def _again(self, letter: _Letter) -> list[Record]:
        """Its records, from the stream."""
        record, mapping = letter.record, letter.mapping
        ids = frozenset(letter.kept.ids)
        wanted: Callable[[Record], bool] = lambda one: one.id in ids  # noqa: E731
        if not ids:
            matches = compile_filter(mapping.filters, mapping.source.kind) if mapping else None
            wanted = matches.matches if matches else _all
        fetch = partial(self._reader(letter).fetch, record.shard, record.start, record.end)
        try:
            records = await fetch(wanted, ids, least=record.count)
            if len(records) < record.count and not ids:
                text = "the filter has changed since, so the whole range is delivered"
                self._tell.note(letter.found.name, record, text)
                records = await fetch(_all, least=record.count)
        except RangeTrimmed as error:
            records = list(error.left)
            if not (self._options.partial and records):
                hint = f"; --partial delivers the {len(records)} that are left" if records else ""
                raise _Undelivered("trimmed", f"{error}{hint}") from None
            self._tell.note(letter.found.name, record, f"{error}; the {len(records)} that are left are delivered")
        except PollerError as error:
            raise _Undelivered("failed", f"its records cannot be read from the stream: {error}") from None
        if ids:
            return records
        if (more := len(records) - record.count) > 0:
            self._tell.note(
                letter.found.name,
                record,
                f"{len(records)} records, {more} more than its batchSize {record.count}: "
                "which of the range were in the batch is not known",
            )
            self.summary.more += more
        return records

    def _reader(self, letter: _Letter) -> Refetcher:
        source = letter.source
        function_arn = letter.record.function_arn
        is_of_mapping = letter.mapping is not None and letter.mapping.function.arn == function_arn
        role = letter.mapping.function.role if letter.mapping and is_of_mapping else _role(function_arn)
        if letter.mapping is not None:
            source = replace(source, role=letter.mapping.source.role)
        key = (source.arn, role, source.role)
        if key not in self._readers:
            facts = traits(parse_source(source.arn.partition("/consumer/")[0]))
            assert facts is not None  # a failure record is of a stream
            self._readers[key] = Refetcher(self._sources.open_again(source, role), facts, self._backoff)
        return self._readers[key]

    async def _deliver(self, letter: _Letter, function: _Function, records: Sequence[Record], body: bytes) -> None:
        """Invoke until there is an answer that is no throttle."""
        record, uuid = letter.record, letter.uuid
        key = idempotency_key(uuid, record.stream_arn, records, record.shard, letter.window)
        tries = 0
        while True:
            async with self._rate, function.gate:
                if self.is_stopped:
                    raise _Undelivered("failed", "stopped before it was delivered")
                await self._hold(letter, function.target.timeout + _HOLD_MARGIN)
                tries += 1
                request = new_request_id(self._random)
                trace = records[0].trace if records else NO_TRACE
                reply = await function.target.invoke(Invocation(uuid, request, tries, key, body, trace))
            outcome = self._judge(reply, records, letter)
            match outcome:
                case Delivered():
                    return
                case Partial(index=index):
                    text = f"the function reported {records[index].id} as failed; the whole batch stays"
                    raise _Undelivered("failed", text)
                case Throttled(error=error, retry_after=retry_after):
                    if tries == _TRIES:
                        raise _Undelivered("failed", f"{error}, {tries} times")
                    await self._pause(self._backoff.delay(tries, retry_after))
                case _:
                    raise _Undelivered("failed", outcome.error)

    def _judge(self, reply: Reply, records: Sequence[Record], letter: _Letter) -> Outcome:
        """As the mapping would. Of a function whose mapping is not known here, an answer that names failures counts:
        passed over, its records would be lost.
        """
        mapping, window = letter.mapping, letter.window
        reports = mapping.retry.report_failures if mapping else b'"batchItemFailures"' in reply.body
        return judge(reply, records, report_failures=reports, ordered=True, window=window)

    async def _hold(self, letter: _Letter, seconds: float) -> None:
        try:
            is_ours = await self._box.hold(letter.found, seconds)
        except PollerError as error:
            raise _Undelivered("failed", f"it cannot be held for its delivery: {error}") from None
        if not is_ours:
            raise _Undelivered("elsewhere", "it is somebody else's by now, or gone")

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    async def _remove(self, letter: _Letter) -> None:
        tries = 0
        while True:
            try:
                await self._box.remove(letter.found)
                break
            except PollerError as error:
                tries += 1
                if tries == _REMOVE_TRIES:
                    text = f"delivered, but its failure record could not be removed, so a redrive repeats it: {error}"
                    raise _Undelivered("unremoved", text) from None
                await asyncio.sleep(self._backoff.delay(tries))
        if letter.key and self._store is not None:
            with suppress(StoreUnavailable):  # it stays in the store's list, where the oldest go first
                await self._store.delete_document(letter.key)


def read(found: Found) -> tuple[FailureRecord, SourceSpec]:
    """The failure record, and the stream that it is of. ValueError: a sentence that says why it is none."""
    if found.problem:
        raise ValueError(found.problem)
    record = parse(found.body)
    try:
        source = parse_source(record.stream_arn)
    except ValueError as error:
        raise ValueError(f"its streamArn {error}") from None
    if source.kind is not record.kind:
        raise ValueError(f"its streamArn is of {source.kind}, but its batch is of {record.kind}")
    return record, source


def _all(_: Record) -> bool:
    return True


def _holds(letter: _Letter) -> str:
    """Where the batch's records will come from."""
    if letter.payload is not None:
        return "payload"
    return "record ids" if letter.kept.ids else "range"


def _role(function_arn: str) -> str:
    """The form that a real function's role is shown in when nobody was asked for it."""
    parts = function_arn.split(":")
    return f"arn:{parts[1]}:iam::{parts[4]}:role/{parts[6]}" if len(parts) > 6 else ""


def run(settings: Settings, options: Options) -> bool:
    """Redrive, tell what became of it, and whether everything succeeded. PollerError."""
    return asyncio.run(_run(settings, options))


async def _run(settings: Settings, options: Options) -> bool:
    async with AsyncExitStack() as stack:
        clients = await stack.enter_async_context(AwsClients(settings.aws))
        store = await _open_store(settings, options, stack)
        known = await known_mappings(settings, store)
        if options.mapping:
            names = [(mapping.id, mapping.function.name) for mapping, _ in known]
            options = replace(options, mapping=find_mapping(options.mapping, names))
        lock = _store_lock(settings)
        box = open_box(options.place, settings.aws.region, clients, store, options.mapping or None, store_lock=lock)
        stack.push_async_callback(box.close)
        count = await box.count()
        is_looking = options.listing or options.dry
        if box.lock is not None and not is_looking:
            stack.enter_context(locked(box.lock, box.where))
        teller = Teller(count, as_json=options.as_json, has_bar=not is_looking)
        stack.callback(teller.close)
        work = Redrive(settings, options, box=box, clients=clients, store=store, known=known, teller=teller)
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None

        def stop() -> None:
            if work.is_stopped:
                main.cancel()
                return
            work.stop()
            teller.say("ending after what is being delivered; once more to end at once")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            await work.run()
        except asyncio.CancelledError:
            teller.say("ended at once: what was being delivered may be delivered again")
        finally:
            teller.close()
            if not options.listing:
                print("\n".join(work.summary.lines(box.where)))
            elif not work.summary.listed and not options.as_json:
                print(f"no discarded batches in {box.where}")
        if work.is_stopped:
            print("stopped: the rest was not tried")
    return not (work.summary.stay or work.is_stopped)


def _store_lock(settings: Settings) -> Path | None:
    """Beside the store's file, the same by whatever name that is known; a shared store has none."""
    if not isinstance(settings.store, StoreSettings):
        return None
    return Path(f"{os.path.realpath(settings.store.path)}-redrive-lock")


async def _open_store(settings: Settings, options: Options, stack: AsyncExitStack) -> CheckpointStore | None:
    """The daemon's own store, beside the daemon. Needed for `store` only; it knows which records were in a batch."""
    metrics = Metrics(SystemClock(asyncio.get_running_loop()), list)
    try:
        return await open_store(settings, metrics.store_observer(), stack, exclusive=False)
    except PollerError as error:
        if options.place == "store":
            raise
        text = f"going on without the store, whole ranges are delivered where a record has no payload: {error}"
        print(text, file=sys.stderr)
        return None
