"""Enhanced fan-out: the contract of streams, and everything that a subscription may do."""

import asyncio
import base64
import gc
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from botocore.eventstream import ChecksumMismatch, EventStreamBuffer

from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.core.model import END, TRIM_HORIZON, Fetch, Position, PositionKind, Record, SourceKind, SourceSpec
from poller.errors import (
    AccessDenied,
    IteratorExpired,
    PositionTrimmed,
    SourceGone,
    SourceThrottled,
    SourceUnavailable,
)
from poller.sources import Sources, fanout, traits
from poller.sources.fanout import FanOutSource
from poller.sources.kinesis import ReadLimits
from tests.contract.test_sources import StreamRig, mapping_of
from tests.contract.test_sources import TestStreams as Contract
from tests.fakes.fanout import (
    FanOut,
    breaks_after,
    event,
    exception,
    frame,
    message,
    nothing,
    running,
    sends,
    silence,
)
from tests.integration import emulators
from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon
from tests.integration.test_daemon import Aws, assert_order, assert_within_promise, config, stream_of

pytestmark = pytest.mark.integration

SHARD = "shardId-000000000000"
LATEST = Position(PositionKind.LATEST, "1545084650.5")
AFTER, AT = PositionKind.AFTER, PositionKind.AT


def spec_of(account: str, stream: str = "orders") -> SourceSpec:
    arn = f"arn:aws:kinesis:{REGION}:{account}:stream/{stream}/consumer/c:1545084650"
    return SourceSpec(SourceKind.KINESIS, arn, REGION, account, stream, fan_out=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of AWS, a hundred times shorter."""
    monkeypatch.setattr(fanout, "RESUBSCRIBE_INTERVAL", 0.05)
    monkeypatch.setattr(fanout, "CALL_INTERVAL", 0.01)
    monkeypatch.setattr(fanout, "SILENCE_LIMIT", 0.2)


@pytest.fixture
async def fake(quick: None) -> AsyncIterator[FanOut]:
    async with running(guard=0.04, heartbeat=0.05) as made:
        yield made


@pytest.fixture
async def source(fake: FanOut, account: str, connect: Callable[[str], Awaitable[AwsClients]]) -> Any:
    made = await Sources(await connect(fake.url), SystemClock(asyncio.get_running_loop())).open_stream(
        mapping_of(spec_of(account))
    )
    assert isinstance(made, FanOutSource)
    yield made
    await made.close()
    await fake.until(lambda: not fake.open)


def text(record: Record) -> str:
    return base64.b64decode(json.loads(record.wire)["kinesis"]["data"]).decode()


async def take(source: Any, token: str | None, count: int, limit: int = 100) -> tuple[list[str], str | None]:
    """At least `count` records' texts, and the token after them; waits as a worker does when it is told to."""
    found: list[str] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            assert token is not None
            try:
                fetch = await source.fetch(SHARD, token, limit)
            except SourceThrottled as error:
                await asyncio.sleep(error.retry_after or 0.05)
                continue
            found += [text(record) for record in fetch.records]
            token = fetch.next_iterator
    return found, token


async def next_event(source: Any, token: str) -> Fetch:
    async with asyncio.timeout(5):
        return await source.fetch(SHARD, token, 100)


# --- the fake is a true one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_the_fakes_frames_are_botocores(cut: int) -> None:
    """botocore's own parser reads them, whatever the pieces they come in, and sees a flipped bit."""
    data = event({}, "initial-response") + event({"Records": []}) + exception("KMSDisabledException", "no key")
    buffer = EventStreamBuffer()
    messages = []
    for start in range(0, len(data), cut):
        buffer.add_data(data[start : start + cut])
        messages += list(buffer)
    assert [message.headers[":message-type"] for message in messages] == ["event", "event", "exception"]
    assert [json.loads(message.payload) for message in messages] == [{}, {"Records": []}, {"message": "no key"}]
    broken = bytearray(event({"Records": []}))
    broken[-6] ^= 1
    buffer.add_data(bytes(broken))
    with pytest.raises(ChecksumMismatch):
        next(buffer)


async def test_botocores_client_reads_the_fake(fake: FanOut, account: str, connect: Any) -> None:
    """Subscriptions of the fake make sense to aiobotocore, from the initial response to the shard's end."""
    numbers = await fake.put("a", "b")
    children = await fake.split()
    kinesis = await (await connect(fake.url)).client("kinesis", REGION)
    answer = await kinesis.subscribe_to_shard(
        ConsumerARN=spec_of(account).arn, ShardId=SHARD, StartingPosition={"Type": "TRIM_HORIZON"}
    )
    [last] = [entry["SubscribeToShardEvent"] async for entry in answer["EventStream"]]
    assert [record["SequenceNumber"] for record in last["Records"]] == numbers
    assert [record["Data"] for record in last["Records"]] == [b"a", b"b"]
    assert [child["ShardId"] for child in last["ChildShards"]] == list(children)
    assert "ContinuationSequenceNumber" not in last


# --- reading --------------------------------------------------------------------------------------------------------


async def test_records_look_as_polled_ones_but_for_the_consumer(fake: FanOut, source: Any, account: str) -> None:
    """Same bytes, same key order; the eventSourceARN is the consumer's."""
    [number] = await fake.put("stream-data-1", key="test")
    fetch = await next_event(source, await source.iterator(SHARD, TRIM_HORIZON))
    [record] = fetch.records
    arrival = fake.shards[SHARD].records[0]["ApproximateArrivalTimestamp"]
    assert record[:3] == (number, "test", arrival)
    assert (
        record.wire
        == json.dumps(
            {
                "kinesis": {
                    "kinesisSchemaVersion": "1.0",
                    "partitionKey": "test",
                    "sequenceNumber": number,
                    "data": "c3RyZWFtLWRhdGEtMQ==",
                    "approximateArrivalTimestamp": arrival,
                },
                "eventSource": "aws:kinesis",
                "eventVersion": "1.0",
                "eventID": f"{SHARD}:{number}",
                "eventName": "aws:kinesis:record",
                "invokeIdentityArn": "arn:aws:iam::1:role/f",
                "awsRegion": REGION,
                "eventSourceARN": spec_of(account).arn,
            },
            separators=(",", ":"),
        ).encode()
    )
    assert (fetch.newest, fetch.read, fetch.nbytes, fetch.lag) == (number, 1, len(record.wire), 0.0)
    assert fake.subscribed[0]["ConsumerARN"] == spec_of(account).arn


@pytest.mark.parametrize(
    ("position", "sent"),
    [
        (TRIM_HORIZON, {"Type": "TRIM_HORIZON"}),
        (Position(PositionKind.AT_TIMESTAMP, "1545084650.987"), {"Type": "AT_TIMESTAMP", "Timestamp": 1545084650.987}),
        (Position(PositionKind.AT_TIMESTAMP, "0"), {"Type": "AT_TIMESTAMP", "Timestamp": 0.0}),
        (Position(AT, "49"), {"Type": "AT_SEQUENCE_NUMBER", "SequenceNumber": "49"}),
        (Position(AFTER, "49"), {"Type": "AFTER_SEQUENCE_NUMBER", "SequenceNumber": "49"}),
    ],
)
async def test_positions_are_asked_for_exactly(fake: FanOut, source: Any, position: Position, sent: dict) -> None:
    """The token is the position; the subscription begins there, and only with the first fetch."""
    token = await source.iterator(SHARD, position)
    assert not fake.calls
    assert (await next_event(source, token)).read == 0
    assert [call["StartingPosition"] for call in fake.subscribed] == [sent]


async def test_one_subscription_gives_event_after_event(fake: FanOut, source: Any) -> None:
    """What is written while it is open comes by it at once; nothing is asked for twice."""
    token: str | None = await source.iterator(SHARD, TRIM_HORIZON)
    for number in range(5):
        await fake.put(str(number))
        found, token = await take(source, token, 1)
        assert found == [str(number)]
    assert len(fake.calls) == 1


async def test_an_empty_event_is_an_empty_fetch(fake: FanOut, source: Any) -> None:
    """It says that the shard is at its tip, and its ContinuationSequenceNumber is the next token."""
    [number] = await fake.put("x")
    _, token = await take(source, await source.iterator(SHARD, TRIM_HORIZON), 1)
    fetch = await next_event(source, token or "")
    assert (fetch.records, fetch.newest, fetch.read, fetch.nbytes, fetch.lag) == ((), "", 0, 0, 0.0)
    assert json.loads(fetch.next_iterator or "") == {"Type": "AFTER_SEQUENCE_NUMBER", "SequenceNumber": number}


async def test_the_limit_is_kept_and_the_rest_is_not_lost(fake: FanOut, source: Any) -> None:
    """An event is handed out in pieces, without another call; before its last piece the shard is not at its tip."""
    await fake.put(*"abcde")
    token = await source.iterator(SHARD, TRIM_HORIZON)
    fetches = []
    for _ in range(3):
        fetches.append(await source.fetch(SHARD, token, 2))
        token = fetches[-1].next_iterator
    assert [[text(record) for record in fetch.records] for fetch in fetches] == [["a", "b"], ["c", "d"], ["e"]]
    assert [fetch.lag > 0 for fetch in fetches] == [True, True, False]
    assert len(fake.calls) == 1


async def test_an_earlier_token_reads_again(fake: FanOut, source: Any) -> None:
    """A token names the record last handed out, also in the middle of an event; read again it gives the same."""
    await fake.put(*"abcde")
    first, token = await take(source, await source.iterator(SHARD, TRIM_HORIZON), 2, limit=2)
    for _ in range(2):
        assert (await take(source, token, 3, limit=3))[0] == ["c", "d", "e"]
    assert first == ["a", "b"]
    assert len(fake.subscribed) == 2, "the second time, the subscription was past it"


async def test_lag_is_in_seconds(fake: FanOut, source: Any) -> None:
    """MillisBehindLatest; None where an event has none."""
    behind = {"Records": [], "ContinuationSequenceNumber": "1", "MillisBehindLatest": 2500}
    fake.faults.append(sends(event(behind), event({"Records": [], "ContinuationSequenceNumber": "1"})))
    token = await source.iterator(SHARD, TRIM_HORIZON)
    first = await next_event(source, token)
    assert first.lag == 2.5
    assert (await next_event(source, first.next_iterator or "")).lag is None


async def test_latest_is_a_place_for_ever(fake: FanOut, source: Any) -> None:
    """The token is of the tip when it was made, whatever breaks before anything was read."""
    await fake.put("before")
    token = await source.iterator(SHARD, LATEST)
    assert [call["StartingPosition"] for call in fake.subscribed] == [{"Type": "LATEST"}]
    await source.close()
    await fake.put("between")
    assert (await take(source, token, 1))[0] == ["between"]


async def test_latest_of_a_busy_shard_begins_with_the_record_that_came(fake: FanOut, source: Any) -> None:
    """When the first event has records already, the token names the first of them, that one included."""
    record = {"SequenceNumber": "77", "PartitionKey": "k", "Data": "YQ==", "ApproximateArrivalTimestamp": 1.5}
    fake.faults.append(sends(event({"Records": [record], "ContinuationSequenceNumber": "77"})))
    token = await source.iterator(SHARD, LATEST)
    assert json.loads(token) == {"Type": "AT_SEQUENCE_NUMBER", "SequenceNumber": "77"}
    assert (await take(source, token, 1))[0] == ["a"]


# --- the end of a shard ---------------------------------------------------------------------------------------------


async def test_a_reshard_ends_the_shard_after_its_last_record(fake: FanOut, source: Any) -> None:
    """ChildShards are the end, once every record before it has been handed out; the children are read from there."""
    await fake.put("a", "b", "c")
    children = await fake.split()
    await fake.put("d", shard=children[0])
    token = await source.iterator(SHARD, TRIM_HORIZON)
    first = await source.fetch(SHARD, token, 2)
    assert first.next_iterator is not None
    last = await source.fetch(SHARD, first.next_iterator, 2)
    assert ([text(record) for record in last.records], last.next_iterator) == (["c"], None)
    await fake.until(lambda: not fake.open)
    listed = {shard.id: shard for shard in (await source.shards()).shards}
    assert listed[SHARD].closed
    assert listed[children[0]].parents == (SHARD,)
    fetch = await source.fetch(children[0], await source.iterator(children[0], TRIM_HORIZON), 10)
    assert [text(record) for record in fetch.records] == ["d"]


async def test_latest_of_a_shard_that_closed_meanwhile_ends(fake: FanOut, source: Any) -> None:
    """The end has no place of its own; it comes with the first fetch, also when the subscription was lost."""
    await fake.split()
    token = await source.iterator(SHARD, LATEST)
    assert (await next_event(source, token)).next_iterator is None
    assert (await next_event(source, token)).next_iterator is None


EMPTY = {"Records": [], "ContinuationSequenceNumber": "120", "MillisBehindLatest": 0}
NO_END = {
    "ended in order": [event(EMPTY)],
    "an empty list of children": [event({**EMPTY, "ChildShards": []})],
    "children null": [event({**EMPTY, "ChildShards": None})],
}


@pytest.mark.parametrize("frames", NO_END.values(), ids=NO_END.keys())
async def test_the_end_of_a_subscription_is_not_the_end_of_the_shard(fake: FanOut, source: Any, frames: list) -> None:
    """It is renewed within the fetch, after the ContinuationSequenceNumber; nobody notices."""
    await fake.put("a", "b", "c")
    fake.faults.append(sends(*frames))
    fetch = await next_event(source, await source.iterator(SHARD, Position(AFTER, "110")))
    assert fetch.next_iterator is not None
    assert (await take(source, fetch.next_iterator, 1))[0] == ["c"], "120 is b"
    assert fake.subscribed[1]["StartingPosition"] == {"Type": "AFTER_SEQUENCE_NUMBER", "SequenceNumber": "120"}


RECORD = {"SequenceNumber": "110", "PartitionKey": "k", "Data": "YQ==", "ApproximateArrivalTimestamp": 1.5}
BAD_CRC = event(EMPTY)[:-1] + b"\x00"
UNUSABLE = {
    "no first event": nothing,
    "no continuation": sends(event({"Records": [RECORD]})),
    "empty continuation": sends(event({"Records": [], "ContinuationSequenceNumber": ""})),
    "no records": sends(event({"ContinuationSequenceNumber": "120"})),
    "no records, children": sends(event({"ChildShards": [{"ShardId": "s"}]})),
    "half a record": sends(event({**EMPTY, "Records": [{"PartitionKey": "k"}]})),
    "no object": sends(event([])),  # type: ignore[arg-type]
    "no JSON": sends(frame({":message-type": "event", ":event-type": "SubscribeToShardEvent"}, b'{"Records":[')),
    "half a frame": sends(event(EMPTY)[:-5]),
    "half a prelude": sends(event(EMPTY)[:5]),
    "half a frame, broken": breaks_after(event(EMPTY)[:-5]),
    "broken": breaks_after(),
    "bad checksum": sends(BAD_CRC),
    "not a frame": sends(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"),
    "unknown message type": sends(frame({":message-type": "surprise"})),
    "no message type": sends(frame({})),
    "unknown header type": sends(message(b"\x01a\x63")),
    "header not UTF-8": sends(message(b"\x01\xff\x00")),
    "header cut off": sends(message(b"\x01a\x07\x00")),
}


async def test_what_cannot_be_understood_is_asked_for_again(fake: FanOut, source: Any) -> None:
    """SourceUnavailable, nothing handed out, no connection left; the same token gives every record."""
    await fake.put("a", "b")
    token = await source.iterator(SHARD, TRIM_HORIZON)
    for what, fault in UNUSABLE.items():
        fake.faults.append(fault)
        try:
            fetch = await next_event(source, token)
        except SourceUnavailable as error:
            assert str(error).startswith("SubscribeToShard: "), what  # noqa: PT017
        else:
            pytest.fail(f"{what}: {fetch}")
        await fake.until(lambda: not fake.open)
    assert (await take(source, token, 2))[0] == ["a", "b"]


@pytest.mark.parametrize("size", [5, len(event(EMPTY)) - 5])
async def test_a_subscription_that_ends_within_an_event_is_no_orderly_end(fake: FanOut, source: Any, size: int) -> None:
    """Also after whole events, also when the connection was closed in good order: something is wrong, and it shows."""
    fake.faults.append(sends(event(EMPTY) + event(EMPTY)[:size]))
    first = await next_event(source, await source.iterator(SHARD, TRIM_HORIZON))
    with pytest.raises(SourceUnavailable, match="in the middle of an event"):
        await next_event(source, first.next_iterator or "")


async def test_an_event_of_a_new_kind_is_passed_over(fake: FanOut, source: Any) -> None:
    """AWS may add some; the events around it are read."""
    fake.faults.append(sends(event({"x": 1}, "SomethingNew"), event({**EMPTY, "Records": [RECORD]})))
    assert (await take(source, await source.iterator(SHARD, TRIM_HORIZON), 1))[0] == ["a"]


# --- trouble --------------------------------------------------------------------------------------------------------

TRIMMED = (
    "StartingSequenceNumber 495 used in SubscribeToShard on shard s in stream orders under account 1 is invalid because "
    "it did not come from this stream."
)
REFUSALS = [
    ("InternalFailureException", "", SourceUnavailable),
    ("KMSThrottlingException", "", SourceThrottled),
    ("LimitExceededException", "", SourceThrottled),
    ("ResourceInUseException", "Another active subscription exists for this consumer", SourceThrottled),
    ("AccessDeniedException", "", AccessDenied),
    ("KMSAccessDeniedException", "", AccessDenied),
    ("KMSDisabledException", "", AccessDenied),
    ("KMSInvalidStateException", "", AccessDenied),
    ("KMSNotFoundException", "", AccessDenied),
    ("KMSOptInRequired", "", AccessDenied),
    ("ResourceNotFoundException", "", SourceGone),
    ("InvalidArgumentException", TRIMMED, PositionTrimmed),
    ("InvalidArgumentException", "ConsumerARN is wrong", SourceUnavailable),
    ("ExpiredTokenException", "", SourceUnavailable),
    ("SomethingNew", "", SourceUnavailable),
]


@pytest.mark.parametrize("place", ["answer", "event", "later event"])
async def test_errors_say_what_to_do(fake: FanOut, source: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whether the call is refused or the error comes by an open subscription; no connection is left."""
    monkeypatch.setattr(fanout, "RESUBSCRIBE_INTERVAL", 0.01)
    fake.guard = 0.0
    for code, text_, kind in REFUSALS:
        if place == "answer":
            fake.answers.append((400, {"__type": code, "message": text_}))
        else:
            fake.faults.append(sends(*([event(EMPTY)] if place == "later event" else []), exception(code, text_)))
        token = await source.iterator(SHARD, TRIM_HORIZON)
        if place == "later event":
            token = (await next_event(source, token)).next_iterator
        with pytest.raises(kind, match=f"SubscribeToShard: {code}") as caught:
            await next_event(source, token)
        assert type(caught.value) is kind
        if code == "ResourceInUseException":
            assert caught.value.retry_after == 0.01
        await fake.until(lambda: not fake.open)


async def test_an_error_message_of_the_transport_is_one(fake: FanOut, source: Any) -> None:
    """`:message-type` error carries its code and text in headers; secrets in it are not shown."""
    headers = {":message-type": "error", ":error-code": "InternalError", ":error-message": "at AKIAABCDEFGHIJKLMNOP\nx"}
    fake.faults.append(sends(frame(headers)))
    with pytest.raises(SourceUnavailable, match=r"^SubscribeToShard: InternalError: at \*\*\*$"):
        await next_event(source, await source.iterator(SHARD, TRIM_HORIZON))


async def test_an_endpoint_without_the_operation_says_so(fake: FanOut, source: Any) -> None:
    """A 200 that is no event stream is never read as a subscription."""
    fake.answers.append((200, {}))
    with pytest.raises(SourceUnavailable, match="no event stream"):
        await next_event(source, await source.iterator(SHARD, TRIM_HORIZON))


async def test_a_garbled_token_is_an_expired_one(fake: FanOut, source: Any) -> None:
    """So the worker asks for a new one; nothing is called."""
    with pytest.raises(IteratorExpired):
        await source.fetch(SHARD, "AAAAAAAAAAFQ", 10)
    assert not fake.calls


async def test_a_silent_subscription_is_cut(fake: FanOut, source: Any) -> None:
    """No event for the limit, empty ones included, is SourceUnavailable: the connection may be half open."""
    await fake.put("a")
    fake.faults.append(silence)
    token = await source.iterator(SHARD, TRIM_HORIZON)
    with pytest.raises(SourceUnavailable, match=r"no event for 0\.2 s"):
        await next_event(source, token)
    await fake.until(lambda: not fake.open)
    assert (await take(source, token, 1))[0] == ["a"]


async def test_calls_keep_their_distance(fake: FanOut, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a success the next call waits for the interval, so it is not refused; after a refusal only for the short one."""
    await fake.put("a", "b", "c")
    await source.shards()  # the client is made
    fake.guard = 0.14
    fake.faults.extend([sends(event(EMPTY)), sends(event(EMPTY))])
    fake.answers.append((400, {"__type": "LimitExceededException"}))
    token = await source.iterator(SHARD, TRIM_HORIZON)
    monkeypatch.setattr(fanout, "RESUBSCRIBE_INTERVAL", 5.0)
    with pytest.raises(SourceThrottled):
        await next_event(source, token)
    monkeypatch.setattr(fanout, "RESUBSCRIBE_INTERVAL", 0.15)
    for _ in range(2):
        token = (await next_event(source, token)).next_iterator
    assert (await take(source, token, 1))[0] == ["c"]
    times = [at for at, _ in fake.calls]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(fake.subscribed) == 3
    assert 0.01 <= gaps[0] < 3
    assert all(gap >= 0.15 for gap in gaps[1:])


async def test_early_calls_are_waited_out(fake: FanOut, source: Any) -> None:
    """A subscriber that we know nothing of, such as our own former process, costs waiting and no record."""
    fake.guard = 0.12
    await fake.put("a")
    await next_event(source, await source.iterator(SHARD, TRIM_HORIZON))
    await source.close()  # and with it the memory of the last call
    assert (await take(source, await source.iterator(SHARD, TRIM_HORIZON), 1))[0] == ["a"]
    assert len(fake.calls) > len(fake.subscribed) == 2


async def test_a_subscription_taken_over_is_waited_for(fake: FanOut, source: Any, account: str, connect: Any) -> None:
    """Another subscriber ends ours with ResourceInUseException, in the stream."""
    token = (await next_event(source, await source.iterator(SHARD, TRIM_HORIZON))).next_iterator
    clock = SystemClock(asyncio.get_running_loop())
    other = FanOutSource(spec_of(account), "role", await connect(fake.url), clock, ReadLimits())
    await asyncio.sleep(fake.guard)
    await next_event(other, token)
    with pytest.raises(SourceThrottled, match="took over"):
        for _ in range(10):
            token = (await next_event(source, token)).next_iterator
    await other.close()


async def test_no_record_is_lost_whatever_happens(fake: FanOut, source: Any) -> None:
    """A hundred subscriptions that end, break and stall in the middle of everything: each record once, in order."""
    rng = random.Random(7)
    fake.life, fake.per_event, fake.guard = 0.01, 7, 0.0
    numbers = await fake.put(*map(str, range(300)))
    faults = [
        nothing,
        breaks_after(),
        sends(BAD_CRC),
        sends(exception("InternalFailureException")),
        sends(event(EMPTY)[:9]),
    ]
    found: list[str] = []
    token = await source.iterator(SHARD, TRIM_HORIZON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fanout, "RESUBSCRIBE_INTERVAL", 0.0)
        patch.setattr(fanout, "CALL_INTERVAL", 0.0)
        async with asyncio.timeout(20):
            while len(found) < len(numbers):
                if rng.random() < 0.5:
                    fake.faults.append(rng.choice(faults))
                if rng.random() < 0.2:
                    await source.close()
                try:
                    fetch = await source.fetch(SHARD, token, rng.randint(1, 9))
                except SourceUnavailable:
                    continue
                found += [record.id for record in fetch.records]
                token = fetch.next_iterator
    assert found == numbers
    assert len(fake.subscribed) > 20


async def test_an_idle_connection_that_the_service_closed_costs_no_error(stub: Any, connect: Any, account: str) -> None:
    """The call is repeated once when the connection broke before an answer began; twice is SourceUnavailable."""

    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def subscribed(request: web.Request) -> web.Response:
        return web.Response(body=event(EMPTY), content_type="application/vnd.amazon.eventstream")

    clock = SystemClock(asyncio.get_running_loop())
    source = FanOutSource(spec_of(account), "role", await connect(stub.url), clock, ReadLimits())
    stub.script["SubscribeToShard"] = [hang_up, subscribed]
    token = await source.iterator(SHARD, TRIM_HORIZON)
    assert (await next_event(source, token)).read == 0
    stub.script["SubscribeToShard"] = [hang_up]
    stub.calls.clear()
    with pytest.raises(SourceUnavailable, match="SubscribeToShard"):
        await source.fetch("shardId-000000000001", token, 1)
    assert len(stub.calls) == 2
    await source.close()


async def test_a_call_that_is_not_answered_has_its_time(
    stub: Any, connect: Any, account: str, monkeypatch: Any
) -> None:
    """SourceUnavailable in the end, and no connection left."""
    release = asyncio.Event()

    async def never(request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    monkeypatch.setattr(fanout, "_ANSWER_TIMEOUT", 0.1)
    stub.script["SubscribeToShard"] = [never]
    clock = SystemClock(asyncio.get_running_loop())
    source = FanOutSource(spec_of(account), "role", await connect(stub.url), clock, ReadLimits())
    with pytest.raises(SourceUnavailable, match="SubscribeToShard: timed out"):
        await source.fetch(SHARD, await source.iterator(SHARD, TRIM_HORIZON), 1)
    release.set()
    gc.collect()  # what was left open would warn now


# --- connections ----------------------------------------------------------------------------------------------------


async def cancel(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_fetch_that_is_cancelled_hangs_up(fake: FanOut, source: Any) -> None:
    """The worker has gone: the service sees it at once, and the next worker goes on from its own token."""
    [number] = await fake.put("a")
    _, token = await take(source, await source.iterator(SHARD, TRIM_HORIZON), 1)
    waiting = asyncio.ensure_future(source.fetch(SHARD, token, 10))
    await asyncio.sleep(0)
    assert fake.open == [SHARD]
    await cancel(waiting)
    await fake.until(lambda: not fake.open)
    await fake.put("b")
    assert (await take(source, token, 1))[0] == ["b"]
    assert fake.subscribed[-1]["StartingPosition"]["SequenceNumber"] == number


async def test_a_call_that_is_cancelled_leaves_no_connection(fake: FanOut, source: Any) -> None:
    """Cancelled while subscribing, also while waiting for its turn."""
    token = await source.iterator(SHARD, TRIM_HORIZON)
    for _ in range(3):
        waiting = asyncio.ensure_future(source.fetch(SHARD, token, 10))
        calls = len(fake.calls)
        async with asyncio.timeout(5):
            while len(fake.calls) == calls:
                await asyncio.sleep(0)
        await cancel(waiting)
    waiting = asyncio.ensure_future(source.fetch(SHARD, token, 10))
    await asyncio.sleep(0)
    await cancel(waiting)
    await fake.until(lambda: not fake.open)
    gc.collect()  # what was left open would warn now


async def test_a_subscription_that_nobody_reads_is_closed(fake: FanOut, source: Any, monkeypatch: Any) -> None:
    """Of a blocked shard, or of a worker that left without a fetch under way; what it had buffered comes again."""
    monkeypatch.setattr(fanout, "UNREAD_LIMIT", 0.05)
    await fake.put(*"abc")
    found, token = await take(source, await source.iterator(SHARD, TRIM_HORIZON), 1, limit=1)
    await fake.until(lambda: not fake.open)
    assert found + (await take(source, token, 2))[0] == ["a", "b", "c"]


async def test_a_subscription_that_is_read_stays_open(fake: FanOut, source: Any, monkeypatch: Any) -> None:
    """However long its events take to come."""
    monkeypatch.setattr(fanout, "UNREAD_LIMIT", 0.03)
    fake.heartbeat = 0.06
    token: str | None = await source.iterator(SHARD, TRIM_HORIZON)
    for _ in range(4):
        token = (await next_event(source, token or "")).next_iterator
    assert len(fake.calls) == 1


async def test_a_latest_that_is_cancelled_hangs_up(fake: FanOut, source: Any) -> None:
    """While it waits for the first event, which names the place."""
    fake.faults.append(silence)
    waiting = asyncio.ensure_future(source.iterator(SHARD, LATEST))
    async with asyncio.timeout(5):
        while not (SHARD in source._feeds and source._feeds[SHARD].is_open):
            await asyncio.sleep(0)
    await cancel(waiting)
    await fake.until(lambda: not fake.open)


async def test_close_ends_every_subscription(fake: FanOut, source: Any) -> None:
    """Of all shards; the timers too."""
    children = await fake.split()
    for shard in children:
        await source.fetch(shard, await source.iterator(shard, TRIM_HORIZON), 10)
    assert sorted(fake.open) == sorted(children)
    await source.close()
    await fake.until(lambda: not fake.open)


async def test_shards_that_are_gone_are_forgotten(fake: FanOut, source: Any) -> None:
    """Else a stream that reshards for years would fill the memory. One that is still being read stays."""
    children = await fake.split()
    await next_event(source, await source.iterator(SHARD, TRIM_HORIZON))  # to its end
    await source.fetch(children[0], await source.iterator(children[0], TRIM_HORIZON), 10)
    del fake.shards[SHARD], fake.shards[children[0]]
    await source.shards()
    assert set(source._feeds) == {children[0]}


async def test_fetches_of_many_shards_do_not_wait_for_each_other(fake: FanOut, source: Any) -> None:
    """More subscriptions than a cold client has connections, and listing still works."""
    for number in range(1, 120):
        fake.shards[f"shardId-{number:012d}"] = type(fake.shards[SHARD])()
    async with asyncio.TaskGroup() as tasks:
        for shard in fake.shards:
            tasks.create_task(source.fetch(shard, await source.iterator(shard, TRIM_HORIZON), 10))
    assert len(fake.open) == 120
    assert len((await source.shards()).shards) == 120
    assert (await source.facts()).retention == 86_400


# --- an independent implementation ----------------------------------------------------------------------------------


class Patient:
    """Waits as a worker does when it is told to come later."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    async def fetch(self, shard: str, iterator: str, limit: int) -> Fetch:
        while True:
            try:
                return await self._source.fetch(shard, iterator, limit)
            except SourceThrottled:
                await asyncio.sleep(0.05)


async def registered(clients: AwsClients, name: str) -> str:
    kinesis = await clients.client("kinesis", REGION)
    await kinesis.create_stream(StreamName=name, ShardCount=1)
    await kinesis.get_waiter("stream_exists").wait(StreamName=name, WaiterConfig={"Delay": 0.05, "MaxAttempts": 100})
    stream = (await kinesis.describe_stream_summary(StreamName=name))["StreamDescriptionSummary"]["StreamARN"]
    consumer = (await kinesis.register_stream_consumer(StreamARN=stream, ConsumerName="c"))["Consumer"]["ConsumerARN"]
    async with asyncio.timeout(10):
        while True:
            described = await kinesis.describe_stream_consumer(ConsumerARN=consumer)
            if described["ConsumerDescription"]["ConsumerStatus"] == "ACTIVE":
                return str(consumer)
            await asyncio.sleep(0.05)


@pytest.fixture
async def rig(quick: None, ministack: str, account: str, connect: Any, monkeypatch: Any) -> AsyncIterator[StreamRig]:
    """As the contract's own, for a consumer."""
    monkeypatch.setattr(fanout, "SILENCE_LIMIT", 10.0)
    name = f"t{account}"
    clients, nowhere = await connect(ministack), await connect(f"http://127.0.0.1:{emulators.free_port()}")
    kinesis = await clients.client("kinesis", REGION)
    spec = replace(spec_of(account, name), arn=await registered(clients, name))
    clock = SystemClock(asyncio.get_running_loop())

    async def opened(where: AwsClients, which: SourceSpec) -> Any:
        return Patient(await Sources(where, clock).open_stream(mapping_of(which)))

    async def put(key: str, text: str) -> None:
        await kinesis.put_record(StreamName=name, PartitionKey=key, Data=text.encode())

    made = StreamRig(
        await opened(clients, spec),
        await opened(clients, spec_of(account, "gone")),
        await opened(nowhere, spec),
        put,
        text,
    )
    made.shard = (await made.source.shards()).shards[0].id
    yield made
    for source in (made.source, made.missing, made.nowhere):
        await source.close()


class TestFanOut(Contract):
    """The contract of streams on MiniStack. What a token promises is another thing where reading is a subscription."""

    async def test_latest_sees_only_what_comes_later_and_its_iterator_may_be_used_again(self, rig: StreamRig) -> None:
        """A LATEST iterator fixes its place when it is made; a read that failed may be repeated with it."""
        await rig.put("k", "before")
        token = await rig.source.iterator(rig.shard, Position(PositionKind.LATEST))
        await rig.put("k", "after")
        for _ in range(2):
            fetch = await rig.source.fetch(rig.shard, token, 10)
            while not fetch.records:
                fetch = await rig.source.fetch(rig.shard, fetch.next_iterator or "", 10)
            assert [rig.text(record) for record in fetch.records] == ["after"]
            await rig.source.close()

    async def test_a_stream_that_does_not_exist_is_gone(self, rig: StreamRig) -> None:
        """Neither its shards nor a subscription can be had."""
        with pytest.raises(SourceGone):
            await rig.missing.shards()
        with pytest.raises(SourceGone):
            await rig.missing.fetch(rig.shard, await rig.missing.iterator(rig.shard, TRIM_HORIZON), 1)
        with pytest.raises(SourceGone):
            await rig.missing.iterator(rig.shard, LATEST)

    async def test_nobody_there_is_unavailable(self, rig: StreamRig) -> None:
        """A refused connection is SourceUnavailable, for cold calls and subscriptions alike."""
        with pytest.raises(SourceUnavailable):
            await rig.nowhere.shards()
        with pytest.raises(SourceUnavailable, match="SubscribeToShard"):
            await rig.nowhere.fetch(rig.shard, await rig.nowhere.iterator(rig.shard, TRIM_HORIZON), 1)

    async def test_the_end_has_no_iterator(self, rig: StreamRig) -> None:
        """Asking for one at SHARD_END is the caller's mistake."""
        with pytest.raises(ValueError, match="end"):
            await rig.source.iterator(rig.shard, END)

    async def test_a_split_ends_the_shard(self, rig: StreamRig, ministack: str, connect: Any) -> None:
        """MiniStack's last event has ChildShards too, though beside a ContinuationSequenceNumber."""
        await rig.put("k", "x")
        fetch = await rig.source.fetch(rig.shard, await rig.source.iterator(rig.shard, TRIM_HORIZON), 10)
        kinesis = await (await connect(ministack)).client("kinesis", REGION)
        name = fetch.records and json.loads(fetch.records[0].wire)["eventSourceARN"].split("/")[1]
        await kinesis.split_shard(StreamName=name, ShardToSplit=rig.shard, NewStartingHashKey=str(2**127))
        async with asyncio.timeout(10):
            while fetch.next_iterator is not None:
                fetch = await rig.source.fetch(rig.shard, fetch.next_iterator, 10)
        assert sorted(shard.parents for shard in (await rig.source.shards()).shards) == [(rig.shard,), (rig.shard,)]


def test_a_consumer_is_pushed_to(account: str) -> None:
    """No pause between its reads, no room reserved while it waits; a stream's own reads keep theirs."""
    pushed, polled = traits(spec_of(account)), traits(replace(spec_of(account), fan_out=False))
    assert pushed is not None
    assert polled is not None
    assert (pushed.min_interval, pushed.tip_interval, pushed.is_pushed) == (0.0, 0.0, True)
    assert (polled.min_interval, polled.tip_interval, polled.is_pushed) == (0.2, 1.0, False)


async def test_two_thousand_records_survive_a_kill(ministack, account, connect, ledger, daemons) -> None:
    """The daemon with a consumer ARN: all delivered in order, again only what was under way when it was killed."""
    aws, each = Aws(ministack, account), 2000
    consumer = await registered(await connect(ministack), "efo")
    daemon: Daemon = daemons(config(aws, ledger, stream_of(consumer)))
    await asyncio.to_thread(aws.put_stream, "efo", 0, each // 2)
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) >= each // 3, 30, "the first third")
    await daemon.kill()
    kill = asyncio.get_running_loop().time()
    await asyncio.to_thread(aws.put_stream, "efo", each // 2, each // 4)
    await daemon.start()
    await ledger.until(lambda: len(ledger.deliveries) >= each * 3 // 4, 60, "three quarters")
    await asyncio.to_thread(aws.put_stream, "efo", each * 3 // 4, each // 4)
    await ledger.until(lambda: len(ledger.deliveries) >= each, 30, "the last delivery")
    _, metrics = await daemon.get("/metrics")
    assert await daemon.stop() == 0
    assert ledger.count("kinesis") == each
    assert_order(ledger)
    assert_within_promise(ledger, [kill])
    assert {entry["eventSourceARN"] for entry in ledger.events} == {consumer}
    assert 'operation="SubscribeToShard",outcome="success"' in metrics
    assert 'operation="GetRecords",outcome="success",source="kinesis"} 0.0' in metrics
    assert not daemon.clean_logs()
