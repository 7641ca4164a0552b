"""What both services share: the log of one shard, read tokens, limits by load, errors. No clock, no I/O."""

import base64
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import msgspec

encode = msgspec.json.Encoder().encode


class AwsFault(Exception):  # noqa: N818  # AWS's own word
    """An error answer: AWS's code, its sentence, and the HTTP status."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status


class Caller(NamedTuple):
    """Who signed a request: a 12-digit access key is an account, as with MiniStack and roto."""

    account: str
    region: str


Answer: TypeAlias = dict[str, Any] | bytes
Operation: TypeAlias = Callable[[Caller, dict[str, Any]], Answer | Awaitable[Answer]]


class Service(NamedTuple):
    """One of AWS's services as the server sees it: its operations, each with the members that a request may have."""

    target: str
    content_type: str
    namespace: str
    operations: dict[str, tuple[Operation, frozenset[str]]]


def required(document: dict[str, Any], name: str) -> Any:
    """A member that must be there."""
    if name not in document:
        raise AwsFault("ValidationException", f"{name} is missing")
    return document[name]


class Token(NamedTuple):
    """What a shard iterator says. It may be used again and fixes its place when it is made.

    `place` counts every record that the shard ever had. `epoch` is older than the shard's once it was made to expire.
    `reader` stays the same over a chain of reads.
    """

    stream: str
    shard: str
    place: int
    reader: int
    epoch: int
    issued: float

    def text(self) -> str:
        """As a client sees it."""
        return base64.urlsafe_b64encode(encode(self)).decode()


_tokens = msgspec.json.Decoder(Token)


def read_token(text: object) -> Token | None:
    """The token; None for any other text."""
    try:
        return _tokens.decode(base64.urlsafe_b64decode(str(text)))
    except (ValueError, msgspec.MsgspecError):
        return None


class Rate:
    """So many calls in any second."""

    __slots__ = ("_times", "per_second")

    def __init__(self, per_second: int) -> None:
        self.per_second = per_second
        self._times: deque[float] = deque()

    def allows(self, now: float) -> bool:
        """Count a call, unless there were too many within the last second; a refused call does not count."""
        while self._times and now - self._times[0] >= 1.0:
            self._times.popleft()
        if len(self._times) >= self.per_second:
            return False
        self._times.append(now)
        return True


class Bandwidth:
    """So many bytes in any second; a larger answer is allowed and then weighs for as long as it should have taken.

    2 MiB a second and an answer of 10 MiB: nothing for five seconds, as the documentation of GetRecords says.
    """

    __slots__ = ("_answers", "_bytes_per_second")

    def __init__(self, bytes_per_second: int) -> None:
        self._bytes_per_second = bytes_per_second
        self._answers: list[tuple[float, int]] = []  # until when, how much

    def allows(self, now: float) -> bool:
        """Less than a second's bytes weigh now."""
        self._answers = [(until, nbytes) for until, nbytes in self._answers if until > now]
        return sum(nbytes for _, nbytes in self._answers) < self._bytes_per_second

    def answered(self, now: float, nbytes: int) -> None:
        """Count an answer."""
        if nbytes:
            self._answers.append((now + max(1.0, nbytes / self._bytes_per_second), nbytes))


class Readers:
    """At most so many different readers in any second."""

    __slots__ = ("_limit", "_seen")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: dict[int, float] = {}

    def allows(self, now: float, reader: int) -> bool:
        """A reader more than the limit is refused for as long as the others go on."""
        self._seen = {one: at for one, at in self._seen.items() if now - at < 1.0}
        if reader not in self._seen and len(self._seen) >= self._limit:
            return False
        self._seen[reader] = now
        return True


class Shard:
    """The log of one shard. Records are kept as the JSON bytes that GetRecords sends.

    An index counts every record that the shard ever had; the first `trimmed` of them are gone.
    """

    def __init__(self, shard_id: str, parents: tuple[str, ...], starting: int) -> None:
        self.id = shard_id
        self.parents = parents
        self.starting = starting
        self.ending: int | None = None
        self.trimmed = 0
        self.epoch = 0
        self.empty_pages = 0
        self.sequences: list[int] = []
        self.arrivals: list[float] = []
        self._wires: list[bytes] = []
        self._ends: list[int] = []  # bytes of all records up to and with this one, since the shard began
        self._trimmed_bytes = 0
        self._horizon = starting  # no position before this sequence number can be read any more

    @property
    def end(self) -> int:
        """The index of the record that comes next."""
        return self.trimmed + len(self._wires)

    @property
    def is_closed(self) -> bool:
        return self.ending is not None

    def append(self, sequence: int, wire: bytes, arrival: float, nbytes: int) -> None:
        """One more record; `nbytes` is what it counts for in limits."""
        assert not self.is_closed
        self.sequences.append(sequence)
        self.arrivals.append(arrival)
        self._wires.append(wire)
        self._ends.append((self._ends[-1] if self._ends else self._trimmed_bytes) + nbytes)

    def index_at(self, sequence: int) -> int:
        """Of the first record not before a sequence number."""
        return self.trimmed + bisect_left(self.sequences, sequence)

    def index_since(self, instant: float) -> int:
        """Of the first record that did not arrive before an instant."""
        return self.trimmed + bisect_left(self.arrivals, instant)

    def is_trimmed(self, sequence: int) -> bool:
        """The sequence number is before the trim point."""
        return sequence < self._horizon

    def read(self, index: int, limit: int, max_bytes: int) -> tuple[list[bytes], int]:
        """At most `limit` records of together at most `max_bytes`, but one at least if there is one; and their bytes.

        An index that was trimmed reads from the horizon.
        """
        first = max(0, index - self.trimmed)
        before = self._ends[first - 1] if first else self._trimmed_bytes
        last = min(first + limit, len(self._wires))
        stop = bisect_right(self._ends, before + max_bytes, lo=first, hi=last)
        stop = max(stop, min(first + 1, last))
        nbytes = self._ends[stop - 1] - before if stop > first else 0
        return self._wires[first:stop], nbytes

    def trim(self, count: int) -> int:
        """Drop the oldest records; answers how many there were."""
        count = min(count, len(self._wires))
        if count:
            self._horizon = self.sequences[count - 1] + 1
            self._trimmed_bytes = self._ends[count - 1]
            self.trimmed += count
            for column in (self.sequences, self.arrivals, self._wires, self._ends):
                del column[:count]
        return count

    def described(self) -> dict[str, Any]:
        """As listings show it."""
        numbers = {"StartingSequenceNumber": str(self.starting)}
        if self.ending is not None:
            numbers["EndingSequenceNumber"] = str(self.ending)
        parents = zip(("ParentShardId", "AdjacentParentShardId"), self.parents, strict=False)
        return {"ShardId": self.id, "SequenceNumberRange": numbers, **dict(parents)}


class Stream:
    """The shards of one stream, expired ones forgotten, and what is asked of them on demand."""

    def __init__(self, arn: str, name: str, caller: Caller, created: float) -> None:
        self.arn = arn
        self.name = name
        self.account = caller.account
        self.region = caller.region
        self.created = created
        self.shards: dict[str, Shard] = {}
        self.epoch = 0  # of listing tokens
        self._readers = 0

    def shard(self, shard_id: str) -> Shard:
        """ResourceNotFoundException when it has expired or never was."""
        if (shard := self.shards.get(shard_id)) is None:
            raise AwsFault("ResourceNotFoundException", f"Shard {shard_id} in stream {self.name} does not exist")
        return shard

    def chosen(self, shard_id: str | None) -> list[Shard]:
        """The one that is named, else all."""
        return list(self.shards.values()) if shard_id is None else [self.shard(shard_id)]

    def token(self, shard: Shard, index: int, now: float, reader: int | None = None) -> str:
        """A token of a new reader, or the next one of a reader."""
        if reader is None:
            self._readers += 1
            reader = self._readers
        return Token(self.arn, shard.id, index, reader, shard.epoch, now).text()

    def expire_iterators(self, shards: Iterable[Shard]) -> None:
        """Every token that was made until now is too old: iterators of these shards, and all tokens of listings."""
        self.epoch += 1
        for shard in shards:
            shard.epoch += 1

    def trim(self, shards: Iterable[Shard], records: int | None) -> dict[str, int]:
        """The oldest records, or all, leave retention; answers how many did by shard."""
        return {shard.id: shard.trim(shard.end if records is None else records) for shard in shards}

    def expire_shards(self, shards: Iterable[Shard]) -> dict[str, int]:
        """Closed shards leave the stream with all they hold; open ones only lose their records."""
        gone = self.trim(shards, None)
        for shard_id in gone:
            if self.shards[shard_id].is_closed:
                del self.shards[shard_id]
        return gone
