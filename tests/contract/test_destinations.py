"""Every failure destination keeps these rules: AWS's four on MiniStack, HTTP against a scripted server, files on disk."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from poller.aws.session import AwsClients
from poller.core.model import (
    TRIM_HORIZON,
    BatchPolicy,
    DiscardReason,
    FunctionSpec,
    Mapping,
    Notice,
    Record,
    RetryPolicy,
    SourceKind,
    SourceSpec,
)
from poller.core.notices import identity, parse, report, s3_key
from poller.destinations import Destinations
from poller.errors import ConfigError, DestinationFailed
from poller.ports import Destination
from tests.fakes.scripted_http import Request, Script, Server, answering, closing, serving
from tests.integration import emulators
from tests.integration.conftest import REGION, account, connect  # noqa: F401

pytestmark = pytest.mark.integration

AWS = ("sqs", "sns", "s3", "events")
KINDS = (*AWS, "http", "file")
# Those that other programs answer.
REMOTE = (*AWS, "http")

Connect = Callable[[str], Awaitable[AwsClients]]


def notice_of(number: int = 1) -> Notice:
    stream = f"arn:aws:kinesis:{REGION}:123456789012:stream/orders"
    mapping = Mapping(
        "6d9bce8e-836b-442c-8070-74e77903c815",
        SourceSpec(SourceKind.KINESIS, stream, REGION, "123456789012", "orders"),
        FunctionSpec("f", f"arn:aws:lambda:{REGION}:123456789012:function:f", "arn:aws:iam::123456789012:role/f"),
        BatchPolicy(10),
        RetryPolicy(),
        TRIM_HORIZON,
    )
    wire = json.dumps({"data": "h\u00e4llo \U0001f600 \uffff"}, ensure_ascii=False).encode()
    records = (Record(str(number), "k", 1573691884.0, wire), Record(str(number + 1), "k", 1573691885.0, wire))
    request = f"c9b8fa9f-5a7f-4f0d-af9c-{number:012}"
    return Notice(mapping, "shardId-000000000001", records, DiscardReason.RETRIES, 3, request, 1573691886.021)


def body_of(destination: Destination, notice: Notice) -> bytes:
    return report(notice, destination.limit).body


async def deliver(destination: Destination, notice: Notice) -> bytes:
    body = body_of(destination, notice)
    await destination.send(notice, body)
    return body


@dataclass
class Rig:
    """A destination, one that is not there, one where nobody answers; and what the first has been given."""

    kind: str
    target: str
    destination: Destination
    missing: Destination
    nowhere: Destination
    arrived: Callable[[int], Awaitable[list[bytes]]]
    """Waits until that many have come, then answers all that is there."""
    clients: AwsClients
    server: Server | None = None
    directory: Path = field(default_factory=Path)


@pytest.fixture(params=KINDS)
async def rig(request: pytest.FixtureRequest, account: str, connect: Connect, tmp_path: Path) -> AsyncIterator[Rig]:  # noqa: F811
    kind = request.param
    clients = await connect(emulators.running("ministack"))
    alone = await connect(f"http://127.0.0.1:{emulators.free_port()}")
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(answering(204, b"")))
        target, gone, arrived = await prepare(kind, clients, account, server, tmp_path)
        here, elsewhere = Destinations(clients, 10.0), Destinations(alone, 10.0)
        stack.push_async_callback(here.close)
        stack.push_async_callback(elsewhere.close)
        nowhere = gone if kind in {"http", "file"} else target
        yield Rig(
            kind,
            target,
            here.open(target, REGION),
            here.open(gone, REGION),
            elsewhere.open(nowhere, REGION),
            arrived,
            clients,
            server,
            tmp_path / "failed",
        )


async def prepare(
    kind: str, clients: AwsClients, owner: str, server: Server, tmp_path: Path
) -> tuple[str, str, Callable[[int], Awaitable[list[bytes]]]]:
    """Make the destination; its name, the name of one that is not there, and how to read what has arrived."""
    if kind == "http":

        async def posted(count: int) -> list[bytes]:
            return [each.body for each in server.requests]

        return f"{server.url}/failed", f"http://127.0.0.1:{emulators.free_port()}/failed", posted
    if kind == "file":

        async def written(count: int) -> list[bytes]:
            return [path.read_bytes() for path in sorted((tmp_path / "failed").iterdir())]

        return f"file://{tmp_path}/failed", f"file://{tmp_path}/not/there", written
    if kind == "s3":
        s3 = await clients.client("s3", REGION)
        bucket = f"failed-{owner}"
        await s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})

        async def stored(count: int) -> list[bytes]:
            keys = [each["Key"] for each in (await s3.list_objects_v2(Bucket=bucket)).get("Contents", [])]
            return [await (await s3.get_object(Bucket=bucket, Key=key))["Body"].read() for key in keys]

        return f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}-gone", stored

    sqs = await clients.client("sqs", REGION)
    url = (await sqs.create_queue(QueueName="failed"))["QueueUrl"]
    queue = f"arn:aws:sqs:{REGION}:{owner}:failed"

    async def received(count: int) -> list[bytes]:
        found: list[bytes] = []
        async with asyncio.timeout(10):
            while True:
                wait = 0 if len(found) >= count else 2
                answer = await sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=wait)
                if not (messages := answer.get("Messages", [])) and wait == 0:
                    return found
                found += [message["Body"].encode() for message in messages]

    if kind == "sqs":
        return queue, f"{queue}-gone", received
    if kind == "sns":
        sns = await clients.client("sns", REGION)
        topic = str((await sns.create_topic(Name="failed"))["TopicArn"])
        await sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue, ReturnSubscriptionArn=True)
        return topic, f"{topic}-gone", received
    events = await clients.client("events", REGION)
    bus = str((await events.create_event_bus(Name="failed"))["EventBusArn"])
    await events.put_rule(Name="all", EventBusName="failed", EventPattern='{"source":["esm-poller"]}', State="ENABLED")
    await events.put_targets(Rule="all", EventBusName="failed", Targets=[{"Id": "q", "Arn": queue}])
    return bus, f"{bus}-gone", received


def inner(kind: str, raw: bytes) -> Any:
    """The failure record in what a destination's consumer gets."""
    document = json.loads(raw)
    if kind == "sns":
        return json.loads(document["Message"])
    return document["detail"] if kind == "events" else document


class TestDelivery:
    async def test_a_notice_arrives_once_and_complete(self, rig: Rig) -> None:
        """What is read back is the record as it was sent, and `parse` reads it in the consumer's envelope."""
        notice = notice_of()
        body = await deliver(rig.destination, notice)
        [raw] = await rig.arrived(1)
        assert inner(rig.kind, raw) == json.loads(body)
        found = parse(raw)
        assert (found.request_id, found.start, found.end, found.count) == (notice.request_id, "1", "2", 2)
        if rig.kind not in {"sns", "events"}:
            assert raw == body

    async def test_the_payload_is_there_where_there_is_no_limit(self, rig: Rig) -> None:
        """S3, HTTP and files take the form with payload, the others one without unless asked for."""
        await deliver(rig.destination, notice_of())
        [raw] = await rig.arrived(1)
        assert (
            (parse(raw).payload is not None) == (rig.destination.limit is None) == (rig.kind in {"s3", "http", "file"})
        )

    async def test_notices_sent_at_the_same_time_all_arrive(self, rig: Rig) -> None:
        """Many lanes may send at once, and each notice is a message, an object, a file of its own."""
        notices = [notice_of(number) for number in range(1, 8)]
        await asyncio.gather(*(deliver(rig.destination, notice) for notice in notices))
        found = sorted(parse(raw).request_id for raw in await rig.arrived(len(notices)))
        assert found == [notice.request_id for notice in notices]

    async def test_a_repeat_makes_no_second_object_or_file(self, rig: Rig) -> None:
        """Sent again, objects and files are replaced; queues, topics, buses and URLs get a duplicate."""
        notice = notice_of()
        for _ in range(2):
            await deliver(rig.destination, notice)
        count = 1 if rig.kind in {"s3", "file"} else 2
        assert len(await rig.arrived(count)) == count

    async def test_check_has_nothing_to_say_and_writes_nothing(self, rig: Rig) -> None:
        """A destination that is there is None, and has still been given nothing."""
        reason = await rig.destination.check()
        if rig.kind == "events":
            # AWS takes a bus's ARN as its name. MiniStack does not: it is the service's answer that is shown here.
            assert reason is not None
            assert "events:DescribeEventBus" in reason
        else:
            assert reason is None
        if rig.kind == "file":
            assert not rig.directory.exists()
        else:
            assert await rig.arrived(0) == []

    async def test_it_works_after_close(self, rig: Rig) -> None:
        """Closing twice is fine, and a destination that is used again opens what it needs."""
        await deliver(rig.destination, notice_of())
        for _ in range(2):
            await rig.destination.close()
        await deliver(rig.destination, notice_of(5))
        assert len(await rig.arrived(2)) == 2


class TestNotThere:
    async def test_a_destination_that_does_not_exist(self, rig: Rig) -> None:
        """check() gives the reason; send() is DestinationFailed, but for a bus: EventBridge takes events for any."""
        reason = await rig.missing.check()
        assert reason is not None
        assert ("gone" if rig.kind in AWS else "there" if rig.kind == "file" else "127.0.0.1") in reason
        if rig.kind == "events":
            return
        with pytest.raises(DestinationFailed) as caught:
            await deliver(rig.missing, notice_of())
        assert name_of(rig.kind, rig.missing) in str(caught.value)

    async def test_nobody_there(self, rig: Rig) -> None:
        """A refused connection is DestinationFailed that names the destination, and check() says the same."""
        with pytest.raises(DestinationFailed) as caught:
            await deliver(rig.nowhere, notice_of())
        reason = await rig.nowhere.check()
        assert reason is not None
        for text in (str(caught.value), reason):
            assert name_of(rig.kind, rig.nowhere) in text


def name_of(kind: str, destination: Any) -> str:
    match kind:
        case "http":
            return str(destination._where)
        case "file":
            return str(destination._directory)
        case _:
            return str(destination._service.where)


async def test_an_objects_key_and_type(account: str, connect: Connect) -> None:  # noqa: F811
    """The key has mapping, shard, day, time and the notice's identity; the type is AWS's own."""
    clients = await connect(emulators.running("ministack"))
    s3 = await clients.client("s3", REGION)
    bucket = f"typed-{account}"
    await s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    notice = notice_of()
    await deliver(Destinations(clients).open(f"arn:aws:s3:::{bucket}", REGION), notice)
    key = s3_key(notice, identity(notice))
    assert key.startswith(
        "aws/lambda/6d9bce8e-836b-442c-8070-74e77903c815/shardId-000000000001/2019/11/14/2019-11-14T00.38.06-"
    )
    found = await s3.get_object(Bucket=bucket, Key=key)
    assert found["ContentType"] == "application/octet-stream"
    assert parse(await found["Body"].read()).request_id == notice.request_id


async def test_an_events_envelope(account: str, connect: Connect) -> None:  # noqa: F811
    """Source, detail type and resources let a rule pick the records of one mapping or condition."""
    clients = await connect(emulators.running("ministack"))
    async with serving(answering()) as server:
        target, _, arrived = await prepare("events", clients, account, server, Path())
    notice = notice_of()
    await deliver(Destinations(clients).open(target, REGION), notice)
    [raw] = await arrived(1)
    event = json.loads(raw)
    assert (event["source"], event["detail-type"]) == ("esm-poller", "RetryAttemptsExhausted")
    assert event["resources"] == [notice.mapping.function.arn, notice.mapping.source.arn]


JSON = "Content-Type: application/x-amz-json-1.1"
XML = "Content-Type: text/xml"


def refusing(kind: str, status: int, code: str, message: str = "secret quote") -> Script:
    """The service's own form of an error."""
    if kind in {"sqs", "events"}:
        return answering(status, json.dumps({"__type": code, "message": message}).encode(), JSON)
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    whole = error if kind == "s3" else f"<ErrorResponse>{error}<RequestId>r</RequestId></ErrorResponse>"
    return answering(status, whole.encode(), XML)


def target_at(kind: str, owner: str, url: str) -> str:
    return {
        "sqs": f"arn:aws:sqs:{REGION}:{owner}:failed",
        "sns": f"arn:aws:sns:{REGION}:{owner}:failed",
        "s3": "arn:aws:s3:::failed",
        "events": f"arn:aws:events:{REGION}:{owner}:event-bus/failed",
        "http": url.replace("http://", "http://user:hunter2@") + "/token-in-path?key=s3cr3t#frag",
    }[kind]


@pytest.fixture(params=REMOTE)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


SendTo = Callable[..., Awaitable[tuple[DestinationFailed, Server, Destination]]]


@pytest.fixture
def fail_at(kind: str, account: str, connect: Connect) -> SendTo:  # noqa: F811
    """Send one notice to a server that misbehaves; what was raised, which names the destination and nothing secret."""

    async def failed(script: Script, timeout: float = 5.0) -> tuple[DestinationFailed, Server, Destination]:
        async def scripted(request: Request, writer: asyncio.StreamWriter) -> None:
            if request.headers.get("x-amz-target", "").endswith(".GetQueueUrl"):
                answer = json.dumps({"QueueUrl": f"{server.url}/{account}/failed"}).encode()
                await answering(200, answer, JSON)(request, writer)
            else:
                if "expect" in request.headers:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    request.body = await request.reader.readexactly(int(request.headers["content-length"]))
                await script(request, writer)

        # S3's client sends the body only when it is told to.
        async with serving(scripted, early=kind == "s3") as server:
            clients = await connect(server.url)
            destinations = Destinations(clients, timeout)
            target = target_at(kind, account, server.url)
            destination = destinations.open(target, REGION)
            try:
                with pytest.raises(DestinationFailed) as caught:
                    await deliver(destination, notice_of())
            finally:
                await destinations.close()
        text = f"{caught.value!r} {caught.value}"
        assert name_of(kind, destination) in text
        for secret in ("hunter2", "token-in-path", "s3cr3t", "frag", "user:", "h\u00e4llo"):
            assert secret not in text
        assert caught.value.__cause__ is None
        return caught.value, server, destination

    return failed


def sends(server: Server) -> int:
    return sum(not request.headers.get("x-amz-target", "").endswith(".GetQueueUrl") for request in server.requests)


class TestFailures:
    async def test_a_server_error_is_a_failure_at_once(self, kind: str, fail_at: SendTo) -> None:
        """5xx is DestinationFailed after one request: the caller repeats it, and nobody's words are quoted."""
        error, server, _ = await fail_at(refusing(kind, 503, "ServiceUnavailable"))
        assert sends(server) == 1
        assert "503" in str(error)
        assert "secret quote" not in str(error)

    async def test_a_throttle_is_a_failure_at_once(self, kind: str, fail_at: SendTo) -> None:
        """So is a throttle."""
        error, server, _ = await fail_at(refusing(kind, 429, "ThrottlingException"))
        assert sends(server) == 1
        assert ("429" if kind == "http" else "ThrottlingException") in str(error)

    async def test_access_denied_says_what_is_needed(self, kind: str, fail_at: SendTo) -> None:
        """AWS's refusal names the right that the poller's credentials lack; a URL's its status."""
        error, _, _ = await fail_at(refusing(kind, 403, "AccessDenied" if kind == "s3" else "AccessDeniedException"))
        action = {
            "sqs": "sqs:SendMessage",
            "sns": "sns:Publish",
            "s3": "s3:PutObject",
            "events": "events:PutEvents",
            "http": "403",
        }[kind]
        assert action in str(error)
        assert kind == "http" or "access denied" in str(error)

    async def test_gone_is_a_failure(self, kind: str, fail_at: SendTo) -> None:
        """What was deleted meanwhile is DestinationFailed, too."""
        code = {"sqs": "QueueDoesNotExist", "sns": "NotFound", "s3": "NoSuchBucket"}.get(
            kind, "ResourceNotFoundException"
        )
        error, _, _ = await fail_at(refusing(kind, 404, code))
        assert ("404" if kind == "http" else "does not exist") in str(error)

    @pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 2"], ids=["nothing", "half-a-status"])
    @pytest.mark.parametrize("reset", [False, True])
    async def test_a_connection_that_ends_before_the_answer(
        self, kind: str, fail_at: SendTo, sent: bytes, reset: bool
    ) -> None:
        """No whole status, no delivery: it is not known to be taken."""
        await fail_at(closing(sent, reset))

    async def test_what_is_no_http(self, fail_at: SendTo) -> None:
        """An answer in another protocol is a failure."""
        await fail_at(closing(b"220 mail.example ESMTP\r\n\r\n", reset=False))

    async def test_no_answer_in_time(self, fail_at: SendTo) -> None:
        """A server that reads and says nothing is given up on after the destination's timeout."""

        async def silent(request: Request, writer: asyncio.StreamWriter) -> None:
            await request.hung_up()

        error, _, _ = await fail_at(silent, timeout=0.15)
        assert "0.15 s" in str(error)


@pytest.mark.parametrize("kind", ["sqs", "sns", "events"])
class TestAnswers:
    async def test_a_success_that_does_not_say_it_was_taken(self, kind: str, fail_at: SendTo) -> None:
        """200 without the id of a message is no delivery."""
        empty = answering(200, b"<PublishResponse/>", XML) if kind == "sns" else answering(200, b"{}", JSON)
        error, _, _ = await fail_at(empty)
        assert "not known" in str(error)

    async def test_a_success_cut_off_in_its_body(self, kind: str, fail_at: SendTo) -> None:
        """An answer that ends too early cannot be read."""
        await fail_at(closing(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", reset=False))

    @pytest.mark.parametrize("body", [b"<html>secret quote", b"<html/>", b"[]", b"null", b'"x"', b"1", b"", b"\xff"])
    async def test_a_success_that_is_something_else(self, kind: str, fail_at: SendTo, body: bytes) -> None:
        """Neither can one that is something else, a proxy's page for one."""
        error, _, _ = await fail_at(answering(200, body, JSON))
        assert "secret quote" not in str(error)


@pytest.mark.parametrize("kind", ["events"])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("InternalFailure", "InternalFailure"),
        ("ThrottlingException", "ThrottlingException"),
        ("NotAuthorized", "access denied"),
        ("ResourceNotFoundException", "does not exist"),
        (None, "not known"),
    ],
)
async def test_an_entry_that_was_not_taken(kind: str, fail_at: SendTo, code: str | None, expected: str) -> None:
    """PutEvents answers 200 with FailedEntryCount: that is a failure, in the words of one of the whole call."""
    entry = {"ErrorCode": code, "ErrorMessage": "secret quote"} if code else {"EventId": "e"}
    answer = {"FailedEntryCount": 1, "Entries": [entry]}
    error, _, _ = await fail_at(answering(200, json.dumps(answer).encode(), JSON))
    assert expected in str(error)
    assert "secret quote" not in str(error)


async def test_a_bus_that_is_there(account: str, connect: Connect) -> None:  # noqa: F811
    """check() asks for the bus by its ARN, as AWS takes it, and puts no event."""
    async with serving(answering(200, b'{"Name":"failed"}', JSON)) as server:
        destination = Destinations(await connect(server.url)).open(target_at("events", account, server.url), REGION)
        assert await destination.check() is None
    [request] = server.requests
    assert request.headers["x-amz-target"] == "AWSEvents.DescribeEventBus"
    assert json.loads(request.body) == {"Name": target_at("events", account, server.url)}


@pytest.mark.parametrize("kind", ["sqs"])
async def test_a_queue_that_takes_less_lowers_the_limit(kind: str, fail_at: SendTo) -> None:
    """The next try knows how long a message may be."""
    text = "One or more parameters are invalid. Reason: Message must be shorter than 100 bytes."
    error, _, destination = await fail_at(refusing(kind, 400, "InvalidParameterValue", text))
    assert destination.limit == 100
    assert "MaximumMessageSize" in str(error)


@pytest.fixture
async def destinations(account: str, connect: Connect) -> AsyncIterator[Destinations]:  # noqa: F811
    """With AWS clients that have nobody to talk to."""
    made = Destinations(await connect("http://127.0.0.1:1"), 5.0)
    yield made
    await made.close()


class TestHttp:
    async def test_headers(self, destinations: Destinations) -> None:
        """One POST of JSON that says whose it is; its key is the same for a repeat, never for another notice."""
        async with serving(answering(202, b"queued")) as server:
            target = target_at("http", "", server.url)
            destination = destinations.open(target, REGION)
            for notice in (notice_of(1), notice_of(1), notice_of(3)):
                await deliver(destination, notice)
        first, again, other = server.requests
        assert (first.method, first.target) == ("POST", "/token-in-path?key=s3cr3t")
        assert first.headers["content-type"] == "application/json"
        assert first.headers["user-agent"].startswith("esm-poller/")
        assert first.headers["x-poller-mapping"] == notice_of().mapping.id
        assert first.headers["x-poller-request-id"] == notice_of(1).request_id
        assert first.headers["authorization"] == "Basic " + base64.b64encode(b"user:hunter2").decode()
        assert first.headers["idempotency-key"] == again.headers["idempotency-key"] == identity(notice_of(1))
        assert other.headers["idempotency-key"] != first.headers["idempotency-key"]
        assert server.connections == 1

    async def test_a_redirect_is_not_followed(self, destinations: Destinations) -> None:
        """A record goes only where the user sent it."""
        async with serving(answering(307, b"", "Location: /elsewhere")) as server:
            with pytest.raises(DestinationFailed, match="307; redirects are not followed"):
                await deliver(destinations.open(server.url, REGION), notice_of())
        assert len(server.requests) == 1

    @pytest.mark.parametrize(("value", "seconds"), [("7", 7.0), ("soon", None), ("-1", None), ("", None)])
    async def test_a_throttle_says_how_long(
        self, destinations: Destinations, value: str, seconds: float | None
    ) -> None:
        """Retry-After is passed on in seconds, and left out when it makes no sense."""
        async with serving(answering(429, b"", f"Retry-After: {value}")) as server:
            with pytest.raises(DestinationFailed) as caught:
                await deliver(destinations.open(server.url, REGION), notice_of())
        assert caught.value.retry_after == seconds

    async def test_a_status_is_enough(self, destinations: Destinations) -> None:
        """2xx is taken even when the connection ends within the body, and the next one gets a new connection."""
        async with serving(closing(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx", reset=False)) as server:
            destination = destinations.open(server.url, REGION)
            await deliver(destination, notice_of(1))
            await deliver(destination, notice_of(3))
        assert server.connections == 2


class TestFiles:
    async def test_a_file_is_whole_and_alone(self, destinations: Destinations, tmp_path: Path) -> None:
        """Its name has mapping, shard, time and identity, and nothing temporary is left beside it."""
        notice = notice_of()
        body = await deliver(destinations.open(f"file://{tmp_path}/a%20b", REGION), notice)
        [path] = (tmp_path / "a b").iterdir()
        assert path.name == (f"{notice.mapping.id}-shardId-000000000001-2019-11-14T00.38.06-{identity(notice)}.json")
        assert path.read_bytes() == body

    async def test_a_name_stays_within_the_directory(self, destinations: Destinations, tmp_path: Path) -> None:
        """Whatever a shard is called, its file has a name that a file system takes, in the one directory."""
        notice = replace(notice_of(), shard="../" * 300)
        await deliver(destinations.open(f"file://{tmp_path}/failed", REGION), notice)
        assert [path.name for path in tmp_path.iterdir()] == ["failed"]
        assert len(list((tmp_path / "failed").iterdir())) == 1

    async def test_a_write_that_fails_leaves_nothing(self, destinations: Destinations, tmp_path: Path) -> None:
        """A file that cannot be put in its place is DestinationFailed, and its temporary one is gone."""
        notice = notice_of()
        destination = destinations.open(f"file://{tmp_path}/failed", REGION)
        await deliver(destination, notice)
        [path] = (tmp_path / "failed").iterdir()
        path.unlink()
        path.mkdir()
        with pytest.raises(DestinationFailed, match=str(tmp_path)):
            await deliver(destination, notice)
        assert list((tmp_path / "failed").iterdir()) == [path]

    async def test_what_is_no_directory(self, destinations: Destinations, tmp_path: Path) -> None:
        """A file in its place is DestinationFailed, and check() says so."""
        (tmp_path / "failed").write_bytes(b"")
        destination = destinations.open(f"file://{tmp_path}/failed", REGION)
        with pytest.raises(DestinationFailed, match="not a directory"):
            await deliver(destination, notice_of())
        assert await destination.check() == f"{tmp_path}/failed: it is not a directory"


@pytest.mark.parametrize(
    "target",
    [
        "arn:aws:lambda:eu-west-1:123456789012:function:f",
        "arn:aws:sqs:eu-west-1:123456789012:failed.fifo",
        "arn:aws:sqs:eu-west-1:12:failed",
        "file://host/failed",
        "file:failed",
        "file:///failed?hunter2",
        "file:///a%00b",
        "http://",
        "http://127.0.0.1:hunter2/",
        "https://user:hunter2@" + "a" * 64 + ".example/",
        "https://user:hunter2@a..example/",
        "ftp://user:hunter2@127.0.0.1/",
    ],
)
async def test_what_names_no_destination_is_refused(destinations: Destinations, target: str) -> None:
    """A ConfigError that says what would be right and quotes nothing secret."""
    with pytest.raises(ConfigError) as caught:
        destinations.open(target, REGION)
    assert "DestinationConfig.OnFailure.Destination" in str(caught.value)
    assert "hunter2" not in str(caught.value)


async def test_mappings_that_name_the_same_one_share_it(destinations: Destinations) -> None:
    """One destination for each name, and for a bucket for each region it is looked for in."""
    first = destinations.open("arn:aws:s3:::failed", REGION)
    assert destinations.open("arn:aws:s3:::failed", REGION) is first
    assert destinations.open("arn:aws:s3:::failed", "us-east-1") is not first
