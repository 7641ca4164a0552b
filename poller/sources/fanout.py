"""Kinesis Data Streams, read by enhanced fan-out: a SubscribeToShard for each shard (semantics.md 2.1).

    subscribe --> event --> handed out, `limit` records a fetch --> next event --> ... --> ChildShards: the shard's end
        ^                              |
        +-- ended after 5 minutes, broken, silent, left unread: again, from the token of the last hand-out

A token is the StartingPosition of what comes next, so that a subscription may be given up at any moment without losing
anything. The call is documented for HTTP/2; like botocore's clients this one speaks HTTP/1.1.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Literal, TypeAlias

import aiohttp
import msgspec
from botocore.eventstream import EventStreamBuffer, EventStreamMessage, ParserError

from poller.aws.errors import ErrorTable, translate
from poller.aws.lean import AwsError, describe, parse, safe_text
from poller.aws.session import AwsClients
from poller.core.model import Fetch, Listing, Position, PositionKind, ShardId, SourceSpec, StreamFacts, StreamTraits
from poller.errors import IteratorExpired, PollerError, PositionTrimmed, SourceThrottled, SourceUnavailable
from poller.ports import Clock
from poller.sources.kinesis import Encoder, KinesisRecord, KinesisSource, ReadLimits, is_trimmed

RESUBSCRIBE_INTERVAL = 5.0  # AWS refuses a call within 5 s of a successful one for the same consumer and shard
CALL_INTERVAL = 1.0  # and allows one call a second for them, refused ones included
SILENCE_LIMIT = 30.0  # an idle subscription gets an empty event about every 5 s; without any, it is dead
UNREAD_LIMIT = 30.0  # a subscription that nobody reads for so long is closed: its shard is blocked, or its worker gone

TRAITS = StreamTraits(
    fetch_limit=10_000,
    tip_interval=0.0,
    has_timestamps=True,
    min_interval=0.0,
    is_pushed=True,
    operations=("SubscribeToShard", "SubscribeToShard"),
)

_WHAT = "SubscribeToShard"
_TARGET = f"Kinesis_20131202.{_WHAT}"
_ANSWER_TIMEOUT = 20.0
_CONTENT_TYPE = "application/vnd.amazon.eventstream"
_LEAST_LAG = 0.001  # says that the tip is not reached
_IN_USE = "ResourceInUseException"
_ERRORS: ErrorTable = {_IN_USE: SourceThrottled}


class Start(msgspec.Struct, frozen=True, omit_defaults=True):
    """StartingPosition of SubscribeToShard. Its JSON is our token."""

    Type: Literal["AT_SEQUENCE_NUMBER", "AFTER_SEQUENCE_NUMBER", "TRIM_HORIZON", "LATEST", "AT_TIMESTAMP"]
    SequenceNumber: str | None = None
    Timestamp: float | None = None


class _Request(msgspec.Struct):
    ConsumerARN: str
    ShardId: str
    StartingPosition: Start


class _Child(msgspec.Struct):
    ShardId: str


class Event(msgspec.Struct):
    """A SubscribeToShardEvent. Only ChildShards say that the shard has ended; what is missing never does."""

    Records: list[KinesisRecord]
    ContinuationSequenceNumber: str | None = None
    MillisBehindLatest: float | None = None
    ChildShards: list[_Child] | None = None


_events = msgspec.json.Decoder(Event)
_starts = msgspec.json.Decoder(Start)
_json = msgspec.json.Encoder().encode

Subscribe: TypeAlias = Callable[[Start], Awaitable["Subscription"]]


class Subscription:
    """An open answer to SubscribeToShard, as events."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.is_silent = True  # no event has come yet
        self._response = response
        self._frames = EventStreamBuffer()
        self._unparsed_bytes = 0

    async def next(self) -> Event | None:
        """The next event, however long it takes; None when the service has ended the subscription.

        SourceUnavailable: it broke or makes no sense. Errors that the service sends are translated as those of a call.
        """
        try:
            while True:
                message: EventStreamMessage | None = next(self._frames, None)
                if message is None:
                    chunk = await self._response.content.readany()
                    if not chunk:
                        break
                    self._unparsed_bytes += len(chunk)
                    self._frames.add_data(chunk)
                    continue
                self._unparsed_bytes -= message.prelude.total_length
                if (event := _event(message)) is not None:
                    self.is_silent = False
                    return event
        except (aiohttp.ClientError, OSError) as error:
            raise SourceUnavailable(f"{_WHAT}: {describe(error)}") from None
        except (ParserError, struct.error, KeyError, ValueError) as error:  # of the frame and its headers
            raise SourceUnavailable(f"{_WHAT}: an event cannot be read ({type(error).__name__})") from None
        if self._unparsed_bytes:
            raise SourceUnavailable(f"{_WHAT}: the subscription ended in the middle of an event")
        return None

    def close(self) -> None:
        """Close the connection; the service sees it at once."""
        self._response.close()


def _event(message: EventStreamMessage) -> Event | None:
    """None for what is no SubscribeToShardEvent: the initial response, kinds of events that are yet to be invented."""
    headers = message.headers
    match headers.get(":message-type"):
        case "event":
            if headers.get(":event-type") != "SubscribeToShardEvent":
                return None
            return _checked(parse(_events, message.payload, _WHAT))
        case "exception":
            raise _refusal(_error(headers.get(":exception-type"), message.payload))
        case "error":
            text = safe_text(str(headers.get(":error-message", "")))
            raise _refusal(AwsError(safe_text(str(headers.get(":error-code"))), 500, text))
        case _:
            raise SourceUnavailable(f"{_WHAT}: a message of an unknown kind came")


def _checked(event: Event) -> Event:
    """An event after which one knows how to go on, or that the shard has ended."""
    if not event.ContinuationSequenceNumber and not event.ChildShards:
        raise SourceUnavailable(f"{_WHAT}: an event has neither ContinuationSequenceNumber nor ChildShards")
    return event


class _Message(msgspec.Struct):
    message: str = ""


def _error(code: object, payload: bytes) -> AwsError:
    try:
        text = msgspec.json.decode(payload, type=_Message).message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = ""
    return AwsError(safe_text(str(code)), 400, safe_text(text))


def _refusal(error: AwsError) -> PollerError:
    if error.code == _IN_USE:
        return SourceThrottled(f"{_WHAT}: {error}", RESUBSCRIBE_INTERVAL)
    if is_trimmed(error):
        return PositionTrimmed(f"{_WHAT}: {error}")
    return translate(error, _ERRORS, _WHAT)


class _Feed:
    """One shard: its subscription, and the event that is being handed out. Read by one task at a time.

    `_token` names what comes next: the first record of `_event` that is not handed out, else the next event.
    Empty when there is nothing to go on with.
    """

    def __init__(self, subscribe: Subscribe, encoder: Encoder, clock: Clock) -> None:
        self._subscribe = subscribe
        self._encode = encoder.encode
        self._clock = clock
        self._subscription: Subscription | None = None
        self._token = ""
        self._event: Event | None = None
        self._handed_out = 0  # records of `_event`
        self._call_at = 0.0  # earliest next SubscribeToShard
        self._unread: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """There is a subscription."""
        return self._subscription is not None

    async def fetch(self, token: str, limit: int) -> Fetch:
        """See `FanOutSource.fetch`. Whatever goes wrong, cancellation included, leaves no subscription behind."""
        with ExitStack() as undo:
            undo.callback(self.close)
            self._go_to(token)
            if self._event is None:
                self._event = await self._next_event()
            fetch = self._hand_out(self._event, limit)
            if fetch.next_iterator is not None:
                undo.pop_all()
                self._watch()
        return fetch

    async def settle_latest(self) -> str:
        """Subscribe at LATEST; a token of that very place, which names it for ever."""
        with ExitStack() as undo:
            undo.callback(self.close)
            self.close()
            self._token = _token(Start("LATEST"))
            event = self._event = await self._next_event()
            if event.Records:
                self._token = _token(Start("AT_SEQUENCE_NUMBER", event.Records[0].SequenceNumber))
            elif event.ContinuationSequenceNumber:
                self._token = _after(event.ContinuationSequenceNumber)
            # Else the shard has ended, and its tip stays where it is.
            undo.pop_all()
            self._watch()
        return self._token

    def close(self) -> None:
        """Give up the subscription and what came by it. The tokens that were handed out bring it back."""
        self._unwatch()
        self._hang_up()
        self._token = ""
        self._event = None
        self._handed_out = 0

    def _go_to(self, token: str) -> None:
        self._unwatch()
        if token != self._token:
            self.close()
            self._token = token

    def _watch(self) -> None:
        self._unread = asyncio.get_running_loop().call_later(UNREAD_LIMIT, self.close)

    def _unwatch(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _hang_up(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    async def _next_event(self) -> Event:
        """The next event. A subscription that the service has ended, as it does after 5 minutes, is renewed."""
        while True:
            subscription = self._subscription or await self._open()
            try:
                async with asyncio.timeout(SILENCE_LIMIT):
                    event = await subscription.next()
            except TimeoutError:
                raise SourceUnavailable(f"{_WHAT}: no event for {SILENCE_LIMIT:g} s") from None
            if event is not None:
                return event
            if subscription.is_silent:
                raise SourceUnavailable(f"{_WHAT}: the subscription ended before its first event")
            self._hang_up()

    async def _open(self) -> Subscription:
        """Subscribe at the token, not sooner than AWS allows."""
        try:
            start = _starts.decode(self._token)
        except msgspec.MsgspecError:
            raise IteratorExpired("this is no token of enhanced fan-out") from None
        if (delay := self._call_at - self._clock.now()) > 0:
            await asyncio.sleep(delay)
        self._call_at = self._clock.now() + RESUBSCRIBE_INTERVAL  # cut off, it may have succeeded
        try:
            self._subscription = await self._subscribe(start)
        except AwsError as error:
            self._call_at = self._clock.now() + CALL_INTERVAL
            raise _refusal(error) from None
        self._call_at = self._clock.now() + RESUBSCRIBE_INTERVAL
        return self._subscription

    def _hand_out(self, event: Event, limit: int) -> Fetch:
        first, end = self._handed_out, min(self._handed_out + limit, len(event.Records))
        encode = self._encode
        records = tuple([encode(record) for record in event.Records[first:end]])
        lag = None if event.MillisBehindLatest is None else event.MillisBehindLatest / 1000
        iterator: str | None
        if end < len(event.Records):
            self._handed_out = end
            iterator = _after(records[-1].id)
            # The event's own lag is that of its last record, perhaps 0: the shard is not at its tip before that one.
            waits = self._clock.now() - event.Records[end].ApproximateArrivalTimestamp
            lag = None if lag is None else max(lag, waits, _LEAST_LAG)
        else:
            self._event, self._handed_out = None, 0
            iterator = None if event.ChildShards else _after(event.ContinuationSequenceNumber or "")
        self._token = iterator or ""
        return Fetch(
            records=records,
            newest=records[-1].id if records else "",
            next_iterator=iterator,
            lag=lag,
            nbytes=sum([len(record.wire) for record in records]),
            read=len(records),
        )


class FanOutSource:
    """A `StreamSource` over a stream's registered consumer: `spec.arn` is the consumer's."""

    def __init__(self, spec: SourceSpec, role: str, clients: AwsClients, clock: Clock, limits: ReadLimits) -> None:
        self._spec = spec
        self._role = role
        self._clients = clients
        self._clock = clock
        self._stream = KinesisSource(spec, role, clients, clock, limits)
        self._feeds: dict[ShardId, _Feed] = {}

    async def shards(self) -> Listing:
        """Every page of the stream's shards, closed ones included."""
        listing = await self._stream.shards()
        listed = {shard.id for shard in listing.shards}
        for shard in [shard for shard, feed in self._feeds.items() if shard not in listed and not feed.is_open]:
            del self._feeds[shard]
        return listing

    async def facts(self) -> StreamFacts:
        """Of the stream."""
        return await self._stream.facts()

    async def iterator(self, shard: ShardId, at: Position) -> str:
        """A token, good for ever. Nothing is called, but for LATEST: that place is named by subscribing there."""
        match at.kind:
            case PositionKind.END:
                raise ValueError(f"shard {shard} is read to its end: there is no iterator")
            case PositionKind.LATEST:
                return await self._feed(shard).settle_latest()
            case PositionKind.TRIM_HORIZON:
                return _token(Start("TRIM_HORIZON"))
            case PositionKind.AT_TIMESTAMP:
                return _token(Start("AT_TIMESTAMP", Timestamp=float(at.value)))
            case PositionKind.AT:
                return _token(Start("AT_SEQUENCE_NUMBER", at.value))
            case PositionKind.AFTER:
                return _after(at.value)

    async def fetch(self, shard: ShardId, iterator: str, limit: int) -> Fetch:
        """At most `limit` records of the shard's next event, or of what is left of the last one; waits for it.

        An event without records is an empty fetch. Subscribes where there is no subscription that stands at `iterator`.
        """
        return await self._feed(shard).fetch(iterator, limit)

    async def close(self) -> None:
        """End every subscription."""
        for feed in self._feeds.values():
            feed.close()
        self._feeds.clear()

    def _feed(self, shard: ShardId) -> _Feed:
        feed = self._feeds.get(shard)
        if feed is None:

            async def subscribe(start: Start) -> Subscription:
                return await self._subscribe(shard, start)

            feed = self._feeds[shard] = _Feed(subscribe, Encoder(self._spec, shard, self._role), self._clock)
        return feed

    async def _subscribe(self, shard: ShardId, start: Start) -> Subscription:
        """AwsError: refused. Other errors as `LeanClient.stream`."""
        lean = await self._clients.lean("kinesis", self._spec.region)
        response = await lean.stream(_TARGET, _json(_Request(self._spec.arn, shard, start)), _ANSWER_TIMEOUT)
        if response.content_type != _CONTENT_TYPE:
            response.close()
            raise SourceUnavailable(f"{_WHAT}: the answer is no event stream; does this endpoint have the operation?")
        return Subscription(response)


def _token(start: Start) -> str:
    return _json(start).decode()


def _after(sequence: str) -> str:
    return _token(Start("AFTER_SEQUENCE_NUMBER", sequence))
