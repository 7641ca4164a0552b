"""The protocols between the runtime and the adapters. The runtime imports no adapter; `app` hands them in."""

from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from typing import Any, Protocol

from poller.core.model import (
    Batch,
    Checkpoint,
    Fetch,
    Invocation,
    Lease,
    Listing,
    MappingId,
    MappingStatus,
    Member,
    Notice,
    Position,
    Record,
    Reply,
    Row,
    ShardId,
    SourceSpec,
    StreamFacts,
    Trace,
)
from poller.settings import LambdaFunction


class Clock(Protocol):
    """The one timeline: epoch seconds that never go back. A jump ahead means that the process was suspended."""

    def now(self) -> float:
        """Epoch seconds; moves with the event loop's clock, so differences are durations."""
        ...

    def loop(self, at: float) -> float:
        """The same instant on `loop.time()`, for `asyncio.timeout_at` and `call_at`."""
        ...


class StreamSource(Protocol):
    """A sharded, ordered source, opened for one mapping. May be called for many shards at once."""

    async def shards(self) -> Listing:
        """Every page, closed shards included. SourceThrottled, SourceUnavailable, SourceGone, AccessDenied."""
        ...

    async def facts(self) -> StreamFacts:
        """Retention and incarnation. Errors as `shards`."""
        ...

    async def iterator(self, shard: ShardId, at: Position) -> str:
        """A read token. PositionTrimmed: `at` has left retention; SourceGone: the shard has; else as `shards`."""
        ...

    async def fetch(self, shard: ShardId, iterator: str, limit: int) -> Fetch:
        """One read of at most `limit` records. IteratorExpired, PositionTrimmed, else as `shards`.

        An answer without its `Records` is SourceUnavailable, never the end of a shard.
        """
        ...

    async def close(self) -> None:
        """Release what the source holds; its calls must have ended."""
        ...


class QueueSource(Protocol):
    """A queue, opened for one mapping. May be called from several receive loops at once."""

    async def visibility_timeout(self) -> float:
        """The queue's own, in seconds. SourceGone, AccessDenied, SourceUnavailable, SourceThrottled."""
        ...

    async def receive(self, limit: int, wait: float, visibility: float) -> Sequence[Record]:
        """At most 10 messages after at most `wait` (0 to 20) seconds, invisible to others for `visibility` seconds.

        `Record.expires` allows for the time that the answer was on its way. Errors as above.
        """
        ...

    async def delete(self, records: Sequence[Record]) -> Sequence[Record]:
        """Delete in tens; answers those that were not deleted. A failing call is no exception."""
        ...

    async def extend(self, records: Sequence[Record], seconds: float) -> Sequence[Record]:
        """Set visibility in tens, 0 returns them to the queue at once; answers those that were not changed."""
        ...

    async def close(self) -> None:
        """Release what the source holds; its calls must have ended."""
        ...


class Target(Protocol):
    """What a function name means: an HTTP endpoint or a Lambda function. Shared by every mapping that names it."""

    capacity: int | None
    """Calls it takes at once; None: no limit of its own."""
    timeout: float
    """Longest that an invocation takes, in seconds."""

    async def invoke(self, invocation: Invocation) -> Reply:
        """Call the function once. Never raises for what the function or the network does: that is a Reply."""
        ...

    async def check(self) -> str | None:
        """Can it be reached with these credentials, without running it? None, or the reason why not."""
        ...

    async def close(self) -> None:
        """Release connections; its calls must have ended."""
        ...


class Destination(Protocol):
    """Where discarded batches are reported. Shared by the mappings that name it; many lanes may call it at once."""

    limit: int | None
    """Longest body in bytes; None: it takes the form with payload, whatever its length (S3, HTTP, files).

    Look at it before each try: it falls when a queue says that it takes less.
    """

    async def send(self, notice: Notice, body: bytes) -> None:
        """Hand over one failure record and return when it is safe there. DestinationFailed: why it is not.

        A repeat after an answer that was lost is a duplicate there; nothing is ever lost.
        """
        ...

    async def check(self) -> str | None:
        """Can it be reached with these credentials, without writing to it? None, or the reason why not."""
        ...

    async def close(self) -> None:
        """Release connections; its calls must have ended."""
        ...


class CheckpointStore(Protocol):
    """Positions and leases of shards, the members that hold them, and the mapping documents made through the API.
    Survives `kill -9`.

    Every method may raise StoreUnavailable. What a method has returned from is durable; what raised may have been done
    or not, and may be done a little later still. A lease lives as long as its owner is seen to beat.
    """

    problem: str
    """Why nothing can be written now, for people; empty while it works."""

    async def create(self, mapping: MappingId, rows: Sequence[Row]) -> None:
        """Put each row that is absent; rows that exist stay as they are. All or none."""
        ...

    async def load(self, mapping: MappingId) -> dict[ShardId, Row]:
        """Every row of a mapping."""
        ...

    async def acquire(self, mapping: MappingId, row: Row, owner: str) -> Lease | None:
        """Take the lease if the stored (owner, token) is still the row's; token + 1. None: somebody was faster.

        A repeat, because the answer was lost, is answered with the lease that `owner` got then. Ends the row's wish.
        """
        ...

    async def save(self, changes: Sequence[tuple[Lease, Checkpoint]]) -> Sequence[Lease]:
        """Write checkpoints in one commit; answers the leases whose token no longer matches (not written)."""
        ...

    async def release(self, lease: Lease, checkpoint: Checkpoint | None, to: str | None = None) -> bool:
        """Write the last checkpoint, if any, and give the lease up, in one step. False: the token no longer matched.

        `to`: the member that owns the shard from then on, with the next token. A repeat, because the answer was lost,
        is answered True as long as nobody took it since. Ends the row's wish.
        """
        ...

    async def request(self, mapping: MappingId, row: Row, member: str) -> bool:
        """Ask the owner to hand the shard over: `wanted_by`, if the stored (owner, token) is still the row's; in place
        of whoever asked before. False: it is not.
        """
        ...

    async def beat(self, member: Member) -> None:
        """Write that a member lives."""
        ...

    async def members(self) -> dict[str, Member]:
        """All that have beaten and not left, dead ones too."""
        ...

    async def leave(self, member: str) -> None:
        """Forget a member; absent is fine."""
        ...

    async def forget(self, mapping: MappingId, shards: Sequence[ShardId] | None = None) -> None:
        """Delete the rows of a mapping, or of some of its shards."""
        ...

    async def mappings(self) -> Sequence[MappingId]:
        """Every mapping that has rows, in order, whether anybody still knows it or not."""
        ...

    async def restore(
        self,
        rows: MappingABC[MappingId, Sequence[Row]],
        leases: Sequence[Lease],
        documents: MappingABC[str, MappingABC[str, Any] | None],
    ) -> bool:
        """Put these rows in place of all that these mappings have, and documents (None: deleted), all or none; a row's
        `saved_at` is kept, inf means now. False, nothing done: `leases` are not all their rows, or one is lost.
        """
        ...

    async def put_document(self, key: str, document: MappingABC[str, Any]) -> None:
        """Keep a JSON document under a key (API-made mappings: `mapping/UUID`)."""
        ...

    async def delete_document(self, key: str) -> None:
        """Forget a document; absent is fine."""
        ...

    async def documents(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Every document whose key starts with the prefix."""
        ...

    async def document_keys(self, prefix: str) -> Sequence[str]:
        """Every key that starts with the prefix, in order: to read documents one by one where all would be too much."""
        ...

    async def prune_documents(self, prefix: str, keep: int) -> None:
        """Delete all but the last `keep` documents, in the order of their keys, whose key starts with the prefix."""
        ...

    async def close(self) -> None:
        """Finish what was asked, close."""
        ...


class MappingObserver(Protocol):
    """What one mapping reports. Called on the hot path, once per call or batch, never per record; must not raise."""

    def polled(self, operation: str, outcome: str, events: int) -> None:
        """One read call: outcome success, throttled, expired or error; `events` it returned, filtered ones included."""
        ...

    def filtered(self, events: int) -> None:
        """Records that a filter took out."""
        ...

    def invoking(self, change: int) -> None:
        """+1 when an invocation starts, -1 when it has ended."""
        ...

    def invoked(self, outcome: str, events: int, seconds: float) -> None:
        """One invocation: outcome success, error, throttle, timeout, partial or unreachable."""
        ...

    def dropped(self, events: int) -> None:
        """Records discarded without a failure destination having them."""
        ...

    def reported(self, outcome: str, events: int) -> None:
        """One request to the failure destination: outcome success or error; on success `events` have arrived there."""
        ...

    def deleted(self, events: int) -> None:
        """Messages deleted from a queue."""
        ...

    def lost(self, shard: ShardId, events: int) -> None:
        """Records that left retention before they were done; at least 1 when the number cannot be known."""
        ...

    def saved(self, positions: int, seconds: float) -> None:
        """Positions saved, and how long the save took."""
        ...


class Span(Protocol):
    """One invocation, traced. To be ended once."""

    trace: Trace
    """What the target is told: the span, or the first record's trace where there is none of it."""

    def end(self, outcome: str, status_code: int | None = None, error: str = "") -> None:
        """It is over. `outcome`: as of `MappingObserver.invoked`, or cancelled. Must not raise."""
        ...


class Tracer(Protocol):
    """Traces the invocations of one mapping. Called on the hot path, once per batch; must not raise."""

    def begin(self, batch: Batch, shard: ShardId, request_id: str) -> Span:
        """An invocation starts. `shard` is empty for a queue."""
        ...


class StoreObserver(Protocol):
    """What the store reports."""

    def requested(self, operation: str, outcome: str) -> None:
        """One request: outcome success or error."""
        ...


class Probe(Protocol):
    """Is what a mapping names there? Whoever cannot be asked is believed to be."""

    async def source(self, source: SourceSpec) -> None:
        """ApiError: the source is not there, or may not be read."""
        ...

    async def position(self, source: SourceSpec, shard: ShardId, sequence: str) -> None:
        """ApiError: the shard has no such record, or not any more."""
        ...

    async def function(self, function: LambdaFunction, region: str) -> None:
        """ApiError: there is no such function."""
        ...


class Overview(Protocol):
    """How the daemon does."""

    def status(self) -> Sequence[MappingStatus]:
        """Every mapping, now. Cheap enough for each scrape."""
        ...

    def health(self) -> str | None:
        """None while no mapping's task has died, else the reason."""
        ...

    def unready(self) -> Sequence[str]:
        """What has not been reached yet since the start, and a store that fails; a sentence each, empty when ready."""
        ...

    def store_problem(self) -> str:
        """Why positions cannot be saved now; empty while they can."""
        ...


class Control(Overview, Protocol):
    """What the HTTP server may ask of the daemon. Mapping operations answer EventSourceMappingConfiguration objects."""

    async def create(self, document: MappingABC[str, Any]) -> dict[str, Any]:
        """CreateEventSourceMapping. ApiError."""
        ...

    def get(self, uuid: str) -> dict[str, Any]:
        """GetEventSourceMapping. ApiError."""
        ...

    def list(self) -> Sequence[dict[str, Any]]:
        """Every mapping, in a stable order."""
        ...

    async def update(self, uuid: str, changes: MappingABC[str, Any]) -> dict[str, Any]:
        """UpdateEventSourceMapping. ApiError."""
        ...

    async def delete(self, uuid: str) -> dict[str, Any]:
        """DeleteEventSourceMapping. ApiError."""
        ...

    def tags(self, arn: str) -> dict[str, str]:
        """ListTags of a mapping's ARN. ApiError."""
        ...

    async def tag(self, arn: str, tags: Any) -> None:
        """TagResource; `tags` as the request has them. ApiError."""
        ...

    async def untag(self, arn: str, keys: Sequence[str]) -> None:
        """UntagResource; keys that are not there are no error. ApiError."""
        ...

    async def pause(self, name: str, by: str) -> dict[str, Any]:
        """Disable a mapping: UUID, the beginning of one, or a function's name. `by`: who, for the audit line. ApiError.

        Answers `{uuid, state}` at once; it is paused when its state is Disabled.
        """
        ...

    async def resume(self, name: str, by: str) -> dict[str, Any]:
        """Enable it again, where it stopped. As `pause`."""
        ...

    async def seek(self, name: str, order: MappingABC[str, Any], by: str) -> dict[str, Any]:
        """Move it: `{position: TRIM_HORIZON | LATEST}`, `{position: AT_TIMESTAMP, timestamp}` or `{shard, sequence}`.
        As `pause`; it has moved when its status has no `seek_pending`.
        """
        ...
