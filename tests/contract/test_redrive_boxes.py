"""Where failure records lie: four kinds of place, one suite; then what only one of them does."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from poller.aws.session import AwsClients
from poller.core import notices
from poller.core.model import Notice
from poller.destinations import Destinations
from poller.errors import ConfigError, PollerError
from poller.ports import CheckpointStore
from poller.redrive import boxes
from poller.redrive.boxes import find_kept, open_box
from poller.redrive.model import Box, Found
from poller.runtime.discards import discarded_key
from poller.settings import AwsSettings
from poller.stores.memory import MemoryStore
from tests.contract.test_destinations import deliver, notice_of
from tests.fakes.scripted_http import Request, Script, answering, serving
from tests.integration import emulators
from tests.integration.conftest import REGION, Stub, account, broken, connect, error, stub, truncated  # noqa: F401

pytestmark = pytest.mark.integration

KINDS = ("sqs", "s3", "directory", "store")
MAPPING = notice_of().mapping.id
OTHER = "11111111-2222-4333-8444-555555555555"

Connect = Callable[[str], Awaitable[AwsClients]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long polls, no repeats of calls that fail."""
    monkeypatch.setattr(boxes, "_WAIT", 0)
    monkeypatch.setattr(boxes, "_ATTEMPTS", 1)


def at(number: int, mapping: str = MAPPING) -> Notice:
    """A notice of the second `number`."""
    made = notice_of(number)
    return replace(made, mapping=replace(made.mapping, id=mapping), at=1573691886.021 + number)


async def keep(store: CheckpointStore, notice: Notice, *, has_payload: bool = False) -> str:
    """As `runtime.discards` does."""
    key = discarded_key(notice.mapping.id, notice.at, notices.identity(notice))
    await store.put_document(key, notices.kept(notice, has_payload=has_payload))
    return key


@dataclass
class Rig:
    """A place, how records get there, and a place that is not there."""

    kind: str
    place: str
    missing: str
    clients: AwsClients
    store: MemoryStore

    def open(self, place: str = "", mapping: str | None = None) -> Box:
        return open_box(place or self.place, REGION, self.clients, self.store, mapping)

    async def put(self, *found: Notice) -> None:
        """One after the other, the way the daemon does."""
        destinations = Destinations(self.clients, 10.0)
        target = f"arn:aws:s3:::{self.place.removeprefix('s3://')}" if self.kind == "s3" else self.place
        for notice in found:
            if self.kind == "store":
                await keep(self.store, notice)
            else:
                await deliver(destinations.open(target, REGION), notice)
        await destinations.close()


@pytest.fixture(params=KINDS)
async def rig(request: pytest.FixtureRequest, account: str, connect: Connect, tmp_path: Path) -> Rig:  # noqa: F811
    clients = await connect(emulators.running("ministack"))
    place, missing = "store", ""
    match request.param:
        case "sqs":
            sqs = await clients.client("sqs", REGION)
            await sqs.create_queue(QueueName="failed")
            place = f"arn:aws:sqs:{REGION}:{account}:failed"
            missing = f"{place}-gone"
        case "s3":
            s3 = await clients.client("s3", REGION)
            place, missing = f"s3://boxed-{account}", f"s3://boxed-{account}-gone"
            await s3.create_bucket(
                Bucket=place.removeprefix("s3://"), CreateBucketConfiguration={"LocationConstraint": REGION}
            )
        case "directory":
            (tmp_path / "failed").mkdir()
            place, missing = f"file://{tmp_path}/failed", f"{tmp_path}/gone"
    return Rig(request.param, place, missing, clients, MemoryStore())


async def everything(box: Box) -> list[Found]:
    return [found async for found in box.read()]


def requests(found: list[Found]) -> list[str]:
    return [notices.parse(each.body).request_id for each in found]


class TestEveryBox:
    async def test_everything_is_read_once_oldest_first(self, rig: Rig) -> None:
        """Each record as it was put there, in the order of their times; more of them than one receive brings."""
        put = [at(number) for number in range(1, 14)]
        await rig.put(*put[6:], *put[:6])
        found = await everything(box := rig.open())
        order = sorted if rig.kind == "sqs" else list
        assert order(requests(found)) == [notice.request_id for notice in put]
        assert len({each.name for each in found}) == 13
        assert not any(each.problem for each in found)
        await box.close()

    async def test_nothing_there(self, rig: Rig) -> None:
        """Reading ends at once, closing gives nothing back."""
        box = rig.open()
        assert await everything(box) == []
        assert await box.count() in {0, None}
        await box.close()

    async def test_how_many(self, rig: Rig) -> None:
        """About; a bucket does not say."""
        await rig.put(at(1), at(2), at(3))
        assert await rig.open().count() == (None if rig.kind == "s3" else 3)

    async def test_what_was_not_removed_is_there_again(self, rig: Rig) -> None:
        """At once after `close`, for everybody; what was removed is not."""
        await rig.put(*(at(number) for number in range(1, 13)))
        box = rig.open()
        first = await everything(box)
        for found in first[::2]:
            assert await box.hold(found, 60.0)
            await box.remove(found)
        await box.close()
        again = rig.open()
        assert sorted(requests(await everything(again))) == sorted(requests(first[1::2]))
        await again.close()

    async def test_reading_may_end_early(self, rig: Rig) -> None:
        """What was received and never handed out comes back, too."""
        await rig.put(*(at(number) for number in range(1, 8)))
        box = rig.open()
        async for _ in box.read():
            break
        await box.close()
        assert len(await everything(rig.open())) == 7

    async def test_removing_twice(self, rig: Rig) -> None:
        """Gone already is fine."""
        await rig.put(at(1))
        [found] = await everything(box := rig.open())
        for _ in range(2):
            await box.remove(found)
        await box.close()
        assert await everything(rig.open()) == []

    async def test_removed_while_it_is_read(self, rig: Rig) -> None:
        """Each is removed before the next is read, and none is passed over."""
        await rig.put(*(at(number) for number in range(1, 13)))
        box = rig.open()
        count = 0
        async for found in box.read():
            await box.remove(found)
            count += 1
        assert count == 12
        await box.close()
        assert await everything(rig.open()) == []

    async def test_only_one_mappings(self, rig: Rig) -> None:
        """Where the place can tell; a queue hands out everybody's."""
        await rig.put(at(1), at(2, OTHER), at(3))
        box = rig.open(mapping=OTHER)
        assert len(await everything(box)) == (3 if rig.kind == "sqs" else 1)
        await box.close()

    async def test_a_place_that_is_not_there(self, rig: Rig) -> None:
        """A PollerError that names it."""
        if not rig.missing:
            return  # the store is the caller's
        box = rig.open(rig.missing)
        with pytest.raises(PollerError, match=r"gone.*(does not exist|is not there)"):
            await everything(box)
        await box.close()

    async def test_whose_it_is(self, rig: Rig) -> None:
        """The name says the mapping's UUID, but for a message's."""
        await rig.put(at(1, OTHER))
        [found] = await everything(box := rig.open())
        assert found.mapping == ("" if rig.kind == "sqs" else OTHER)
        await box.close()

    async def test_what_is_no_failure_record_is_handed_out(self, rig: Rig) -> None:
        """The reader tells that from a record, not the place."""
        match rig.kind:
            case "sqs":
                sqs = await rig.clients.client("sqs", REGION)
                url = (await sqs.get_queue_url(QueueName="failed"))["QueueUrl"]
                await sqs.send_message(QueueUrl=url, MessageBody='{"other":1}')
            case "s3":
                s3 = await rig.clients.client("s3", REGION)
                key = "aws/lambda/x"
                await s3.put_object(Bucket=rig.place.removeprefix("s3://"), Key=key, Body=b'{"other":1}')
            case "directory":
                (Path(rig.place.removeprefix("file://")) / "x.json").write_bytes(b'{"other":1}')
            case _:
                await rig.store.put_document("discarded/m/0000000000001-x", {"other": 1})
        [found] = await everything(box := rig.open())
        assert json.loads(found.body) == {"other": 1}
        await box.close()


def received(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"Messages": [{"MessageId": name, "ReceiptHandle": receipt, "Body": "{}"} for name, receipt in messages]}


def changed(count: int = 1) -> dict[str, Any]:
    return {"Successful": [{"Id": str(index)} for index in range(count)], "Failed": []}


def refused(code: str, *, is_ours: bool = True) -> dict[str, Any]:
    entry = {"Id": "0", "Code": code, "SenderFault": is_ours, "Message": "secret quote"}
    return {"Successful": [], "Failed": [entry]}


RECEIVE, CHANGE, DELETE = "ReceiveMessage", "ChangeMessageVisibilityBatch", "DeleteMessageBatch"


@pytest.fixture
async def queue(stub: Stub, connect: Connect) -> Box:  # noqa: F811
    """A box at a scripted queue."""
    clients = await connect(stub.url)
    return open_box(f"https://sqs.{REGION}.amazonaws.com/123456789012/failed", None, clients, None, None)


def entries(stub: Stub, operation: str) -> list[dict[str, Any]]:  # noqa: F811
    return [entry for call in stub.asked(operation) for entry in call["Entries"]]


class TestQueue:
    async def test_a_message_that_comes_again(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """It is handed out once, and its latest receipt is the one that counts."""
        stub.script = {RECEIVE: [received(("a", "a1")), received(("a", "a2"), ("b", "b1")), {}], DELETE: [changed()]}
        stub.script[CHANGE] = [changed()]
        found = await everything(queue)
        assert [each.name for each in found] == ["a", "b"]
        assert await queue.hold(found[0], 10)
        await queue.remove(found[0])
        await queue.close()
        assert [(each["ReceiptHandle"], each["VisibilityTimeout"]) for each in entries(stub, CHANGE)] == [
            ("a2", 10),
            ("b1", 0),
        ]
        assert [each["ReceiptHandle"] for each in entries(stub, DELETE)] == ["a2"]

    async def test_a_hold_outlasts_a_second_receive(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """Received again while its batch is delivered, it stays hidden for as long as was asked for."""
        stub.script = {RECEIVE: [received(("a", "a1")), received(("a", "a2"), ("b", "b")), {}], CHANGE: [changed()]}
        reading = queue.read()
        assert await queue.hold(await anext(reading), 900)
        await anext(reading)
        first, second = entries(stub, CHANGE)
        assert (first["ReceiptHandle"], first["VisibilityTimeout"]) == ("a1", 900)
        assert second["ReceiptHandle"] == "a2"
        assert 880 < second["VisibilityTimeout"] <= 900

    async def test_a_removed_message_that_comes_again(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """SQS allows for a copy that survives: it is deleted as well and not delivered again."""
        stub.script = {RECEIVE: [received(("a", "a1")), received(("a", "a2"), ("b", "b")), {}], DELETE: [changed()]}
        reading = queue.read()
        await queue.remove(await anext(reading))
        assert [each.name async for each in reading] == ["b"]
        assert [each["ReceiptHandle"] for each in entries(stub, DELETE)] == ["a1", "a2"]

    async def test_only_messages_that_were_seen(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """Reading ends, though the queue never does, but not at the first receive without a new one."""
        old = received(*((str(index), "r") for index in range(10)))
        stub.script = {RECEIVE: [old, old, old, received(("new", "r")), old]}
        assert [each.name for each in await everything(queue)] == [*map(str, range(10)), "new"]
        assert len(stub.asked(RECEIVE)) == 4 + 10

    async def test_how_it_receives(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """Ten at a time, from the URL that was given, hidden for two minutes."""
        stub.script = {RECEIVE: [{}]}
        await everything(queue)
        [call] = stub.asked(RECEIVE)
        assert call == {
            "QueueUrl": f"https://sqs.{REGION}.amazonaws.com/123456789012/failed",
            "MaxNumberOfMessages": 10,
            "WaitTimeSeconds": 0,
            "VisibilityTimeout": 120,
        }
        assert f"/{REGION}/sqs/" in stub.requests[0].headers["Authorization"]

    @pytest.mark.parametrize("code", ["ReceiptHandleIsInvalid", "AWS.SimpleQueueService.MessageNotInflight"])
    async def test_a_receipt_that_is_no_longer_good(self, queue: Box, stub: Stub, code: str) -> None:  # noqa: F811
        """The message is somebody else's by now, or gone."""
        stub.script = {RECEIVE: [received(("a", "a1")), {}], CHANGE: [refused(code)]}
        [found] = await everything(queue)
        assert not await queue.hold(found, 10)

    @pytest.mark.parametrize(
        "answer",
        [refused("InternalError", is_ours=False), refused("RequestThrottled"), {}, {"Successful": [{"Id": "1"}]}],
    )
    async def test_a_hold_that_is_not_known(self, queue: Box, stub: Stub, answer: Any) -> None:  # noqa: F811
        """Neither held nor lost: an error that quotes nobody's words."""
        stub.script = {RECEIVE: [received(("a", "a1")), {}], CHANGE: [answer]}
        [found] = await everything(queue)
        with pytest.raises(PollerError, match="sqs:ChangeMessageVisibility") as caught:
            await queue.hold(found, 10)
        assert "secret quote" not in str(caught.value)

    async def test_a_message_that_was_left_too_long(
        self,
        queue: Box,
        stub: Stub,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Others could have it by now: it is neither held nor made visible under their hands."""
        monkeypatch.setattr(boxes, "_VISIBILITY", 0)
        stub.script = {RECEIVE: [received(("a", "a1")), {}]}
        [found] = await everything(queue)
        assert not await queue.hold(found, 10)
        await queue.close()
        assert stub.asked(CHANGE) == []

    async def test_a_hold_has_a_bound(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """SQS hides a message for 12 hours in all; a part of a second counts whole."""
        stub.script = {RECEIVE: [received(("a", "a1")), {}], CHANGE: [changed()]}
        [found] = await everything(queue)
        for seconds in (1e9, 0.5):
            assert await queue.hold(found, seconds)
        most, least = (each["VisibilityTimeout"] for each in entries(stub, CHANGE))
        assert 43_190 < most < 43_200
        assert least == 1

    async def test_what_is_worked_at_is_kept(
        self,
        queue: Box,
        stub: Stub,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Hidden anew before its hold ends: a pause between two tries may be longer than that. What was left is not; one
        refusal says nothing of the others.
        """
        monkeypatch.setattr(boxes, "_KEEP_INTERVAL", 0.001)
        monkeypatch.setattr(boxes, "_now", lambda: 100.0)
        refusal = {"Id": "0", "Code": "ReceiptHandleIsInvalid", "SenderFault": True}
        stub.script = {RECEIVE: [received(("a", "a"), ("b", "b"), ("c", "c")), {}]}
        stub.script[CHANGE] = [changed(), {"Successful": [{"Id": "1"}], "Failed": [refusal]}, changed()]
        waiting, working, left = await everything(queue)
        assert await queue.hold(working, 900)
        queue.leave(left)
        held: Any = queue
        for each in held._held.values():
            each.until = 100.001
        task = asyncio.ensure_future(queue.keep())
        async with asyncio.timeout(5):
            while len(stub.asked(CHANGE)) < 3 or held._held[waiting.name].until < 101:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        task.cancel()
        _, first, second = stub.asked(CHANGE)
        assert [each["ReceiptHandle"] for each in first["Entries"]] == ["a", "b"]
        assert [each["ReceiptHandle"] for each in second["Entries"]] == ["a"]
        assert held._held[left.name].until == 100.001

    async def test_changes_of_a_message_do_not_overtake_each_other(
        self,
        queue: Box,
        stub: Stub,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A hold waits for a short extension under way: that would end it early if it arrived last."""
        monkeypatch.setattr(boxes, "_KEEP_INTERVAL", 0.001)
        stub.script = {RECEIVE: [received(("a", "a")), {}], CHANGE: [changed()]}
        [found] = await everything(queue)
        box: Any = queue
        box._held["a"].until = boxes._now() + 1000
        shown: list[int] = []
        is_under_way, may_end = asyncio.Event(), asyncio.Event()

        async def slow(_: Any, seconds: int) -> set[int]:
            if seconds == boxes._VISIBILITY:
                is_under_way.set()
                await may_end.wait()
            shown.append(seconds)
            return set()

        monkeypatch.setattr(box, "_show", slow)
        monkeypatch.setattr(boxes._Held, "is_ending", True)
        keeping = asyncio.ensure_future(box._keep([box._held["a"]]))
        await is_under_way.wait()
        holding = asyncio.ensure_future(queue.hold(found, 900))
        await asyncio.sleep(0.01)
        may_end.set()
        assert await holding
        await keeping
        assert shown == [120, 900]

    async def test_a_delete_that_is_refused(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """The record is still there, so it is an error; and it is given back."""
        stub.script = {RECEIVE: [received(("a", "a1")), {}], DELETE: [refused("ReceiptHandleIsInvalid")]}
        stub.script[CHANGE] = [changed()]
        [found] = await everything(queue)
        with pytest.raises(PollerError, match="sqs:DeleteMessage: refused"):
            await queue.remove(found)
        await queue.close()
        assert [each["ReceiptHandle"] for each in entries(stub, CHANGE)] == ["a1"]

    async def test_close_gives_back_in_tens(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """Whatever becomes of one call, closing is no error, nor is closing again."""
        names = [f"{index:02}" for index in range(25)]
        batches = [received(*((name, name) for name in names[start : start + 10])) for start in (0, 10, 20)]
        stub.script = {RECEIVE: [*batches, {}], CHANGE: [error("ServiceUnavailable", status=503), changed(10)]}
        await everything(queue)
        for _ in range(2):
            await queue.close()
        assert sorted(len(call["Entries"]) for call in stub.asked(CHANGE)) == [5, 10, 10]
        assert sorted(each["ReceiptHandle"] for each in entries(stub, CHANGE)) == names

    async def test_counting_is_not_needed(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """Credentials without the right to count may redrive all the same."""
        stub.script = {"GetQueueAttributes": [error("AccessDeniedException", status=403), {}]}
        assert await queue.count() is None
        assert await queue.count() is None

    @pytest.mark.parametrize(
        ("operation", "action"),
        [(RECEIVE, "sqs:ReceiveMessage"), (CHANGE, "sqs:ChangeMessageVisibility"), (DELETE, "sqs:DeleteMessage")],
    )
    async def test_errors_name_place_and_right(
        self,
        queue: Box,
        stub: Stub,  # noqa: F811
        operation: str,
        action: str,
    ) -> None:
        """Denied says what the credentials need; gone and a server error say so; none quotes what AWS says of a
        request.
        """
        stub.script = {RECEIVE: [received(("a", "a1")), {}]}
        [found] = await everything(queue)
        calls = {
            RECEIVE: lambda: everything(queue),
            CHANGE: lambda: queue.hold(found, 10),
            DELETE: lambda: queue.remove(found),
        }
        for answer, expected in (
            (error("AccessDeniedException", "no", 403), f"access denied .* need {action} on it"),
            (error("KmsAccessDenied", "no kms", 400), f"need {action} on it and kms:Decrypt on its key"),
            (error("QueueDoesNotExist"), "does not exist .*; look at its name, Region and account"),
            (error("InternalError", "secret quote", 500), f"{action}: InternalError: HTTP status 500"),
            (broken, action),
        ):
            stub.script[operation] = [answer]
            with pytest.raises(PollerError, match=expected) as caught:
                await calls[operation]()
            assert queue.where in str(caught.value)
            assert "secret quote" not in str(caught.value)
            assert caught.value.__cause__ is None

    @pytest.mark.parametrize("answer", [{"Messages": [{}]}, {"Messages": 1}, ["x"]])
    async def test_an_answer_that_is_something_else(self, queue: Box, stub: Stub, answer: Any) -> None:  # noqa: F811
        """It cannot be read."""
        stub.script = {RECEIVE: [answer]}
        with pytest.raises(PollerError, match="sqs:ReceiveMessage: the answer cannot be read"):
            await everything(queue)

    async def test_a_half_answer_to_a_delete(self, queue: Box, stub: Stub) -> None:  # noqa: F811
        """200 that does not say it was done is an error: botocore reads a document cut in half as an empty one."""
        stub.script = {RECEIVE: [received(("a", "a1")), {}], DELETE: [truncated]}
        [found] = await everything(queue)
        with pytest.raises(PollerError, match="sqs:DeleteMessage: the answer cannot be read"):
            await queue.remove(found)

    async def test_a_message_somebody_else_deletes(self, account: str, connect: Connect) -> None:  # noqa: F811
        """A hold says that it is gone."""
        clients = await connect(emulators.running("ministack"))
        sqs = await clients.client("sqs", REGION)
        url = (await sqs.create_queue(QueueName="failed"))["QueueUrl"]
        await sqs.send_message(QueueUrl=url, MessageBody="{}")
        [found] = await everything(box := open_box(url, REGION, clients, None, None))
        await sqs.purge_queue(QueueUrl=url)
        assert not await box.hold(found, 10)
        await box.close()

    async def test_a_region_that_nobody_knows(self, stub: Stub, connect: Connect) -> None:  # noqa: F811
        """The standard chain may know it; else the error names the setting."""
        clients = await connect(stub.url)
        box = open_box("http://queues.example/123456789012/failed", None, clients, None, None)
        with pytest.raises(PollerError, match=r"http://queues.example/123456789012/failed: aws\.region: not set"):
            await box.count()


Route = Callable[[str], Script]


@pytest.fixture
async def bucket(account: str, connect: Connect) -> AsyncIterator[Callable[[Route], Awaitable[Box]]]:  # noqa: F811
    """A box at a scripted S3: a function of the request line says what it answers."""
    stack: list[Any] = []

    async def made(route: Route) -> Box:
        async def script(request: Request, writer: asyncio.StreamWriter) -> None:
            await route(f"{request.method} {request.target}")(request, writer)

        context = serving(script, early=True)
        server = await context.__aenter__()
        stack.append(context)
        return open_box("s3://failed/p/", REGION, await connect(server.url), None, None)

    yield made
    for context in stack:
        await context.__aexit__(None, None, None)


def listing(*keys: str, token: str = "") -> bytes:
    contents = "".join(f"<Contents><Key>{key}</Key><Size>2</Size></Contents>" for key in keys)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    end = more if token else "<IsTruncated>false</IsTruncated>"
    return f"<ListBucketResult><EncodingType>url</EncodingType>{contents}{end}</ListBucketResult>".encode()


def xml(status: int, code: str) -> Script:
    return answering(status, f"<Error><Code>{code}</Code><Message>secret quote</Message></Error>".encode())


class TestBucket:
    async def test_pages(self, bucket: Callable[[Route], Awaitable[Box]]) -> None:
        """All of the listing is read; keys with anything in them, folders left out."""
        asked: list[str] = []

        def route(line: str) -> Script:
            asked.append(line)
            if "list-type=2" not in line:
                return answering(200, b"{}")
            first = listing("p/", "p/a+b%2B1", token="t/1")
            return answering(200, listing("p/z") if "continuation-token=t%2F1" in line else first)

        found = await everything(await bucket(route))
        assert [(each.name, each.body) for each in found] == [("p/a b+1", b"{}"), ("p/z", b"{}")]
        assert all("prefix=p%2F" in line for line in asked if "list-type" in line)

    @pytest.mark.parametrize("code", ["NoSuchKey", "404"])
    async def test_what_vanishes(self, bucket: Callable[[Route], Awaitable[Box]], code: str) -> None:
        """An object that is listed and gone is passed over."""

        def route(line: str) -> Script:
            if "list-type=2" in line:
                return answering(200, listing("p/a", "p/b"))
            return xml(404, code) if "/p/a" in line else answering(200, b"{}")

        assert [each.name for each in await everything(await bucket(route))] == ["p/b"]

    async def test_what_is_archived(self, bucket: Callable[[Route], Awaitable[Box]]) -> None:
        """It is handed out with the reason, and the others are read."""

        def route(line: str) -> Script:
            if "list-type=2" in line:
                return answering(200, listing("p/a", "p/b"))
            return xml(403, "InvalidObjectState") if "/p/a" in line else answering(200, b"{}")

        first, second = await everything(await bucket(route))
        assert first == Found("p/a", b"", problem="it is archived; restore it first")
        assert second.body == b"{}"

    async def test_errors_name_place_and_right(self, bucket: Callable[[Route], Awaitable[Box]]) -> None:
        """Denied says what the credentials need, of each call."""
        answers: dict[str, Script] = {}

        def route(line: str) -> Script:
            return answers["list" if "list-type=2" in line else line.split(maxsplit=1)[0]]

        box = await bucket(route)
        answers["list"] = answering(200, listing("p/a"))
        for call, action, run in (
            ("DELETE", "s3:DeleteObject", lambda: box.remove(Found("p/a", b""))),
            ("GET", "s3:GetObject", lambda: everything(box)),
            ("list", "s3:ListBucket", lambda: everything(box)),
        ):
            for answer, expected in (
                (xml(403, "AccessDenied"), f"access denied .* need {action} on it"),
                (xml(404, "NoSuchBucket"), "does not exist"),
                (xml(500, "InternalError"), f"{action}: InternalError: HTTP status 500"),
            ):
                answers[call] = answer
                with pytest.raises(PollerError, match=expected) as caught:
                    await run()
                assert "s3://failed/p/" in str(caught.value)
                assert call == "list" or "InternalError" not in expected or "secret quote" not in str(caught.value)

    @pytest.mark.parametrize(
        "answer",
        [
            answering(200, b"<html>secret quote</html>"),
            answering(200, b"<html/>"),
            answering(200, b""),
            answering(200, b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"),
        ],
    )
    async def test_a_listing_that_is_something_else(
        self, bucket: Callable[[Route], Awaitable[Box]], answer: Script
    ) -> None:
        """It is not taken for an empty bucket, nor for the last page."""
        box = await bucket(lambda _: answer)
        with pytest.raises(PollerError, match="s3:ListBucket: the answer cannot be read") as caught:
            await everything(box)
        assert "secret quote" not in str(caught.value)

    async def test_a_body_that_is_cut_off(self, bucket: Callable[[Route], Awaitable[Box]]) -> None:
        """Half an object is not handed out."""

        async def half(request: Request, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            await writer.drain()
            writer.close()

        box = await bucket(lambda line: answering(200, listing("p/a")) if "list-type=2" in line else half)
        with pytest.raises(PollerError, match="s3://failed/p/: s3:GetObject"):
            await everything(box)

    async def test_what_is_too_large(
        self, bucket: Callable[[Route], Awaitable[Box]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is handed out with the reason, without its body, though it grew after it was listed."""
        monkeypatch.setattr(boxes, "_MOST_BYTES", 2)

        def route(line: str) -> Script:
            if "list-type=2" not in line:
                return answering(200, b"{}" if "/p/a" in line else b"{ }")
            return answering(200, listing("p/a", "p/b", "p/c").replace(b"c</Key><Size>2", b"c</Key><Size>9"))

        small, grown, large = await everything(await bucket(route))
        assert (small.body, small.problem) == (b"{}", "")
        assert (grown.body, grown.problem) == (b"", "it has 3 bytes, so it is not a failure record")
        assert (large.body, large.problem) == (b"", "it has 9 bytes, so it is not a failure record")

    async def test_without_a_region(self, account: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        """botocore's own chain decides; a bucket is found without one."""
        monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
        async with AwsClients(AwsSettings(endpoint_url=emulators.running("ministack"))) as clients:
            s3 = await clients.client("s3", REGION)
            name = f"plain-{account}"
            await s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
            await s3.put_object(Bucket=name, Key="x/1", Body=b"{}")
            await s3.put_object(Bucket=name, Key="y/1", Body=b"{}")
            [found] = await everything(open_box(f"arn:aws:s3:::{name}/x/", None, clients, None, None))
        assert found == Found("x/1", b"{}")


@pytest.fixture
async def idle(connect: Connect) -> AwsClients:  # noqa: F811
    """Clients that have nobody to talk to."""
    return await connect("http://127.0.0.1:1")


class TestDirectory:
    async def test_the_order(self, idle: AwsClients, tmp_path: Path) -> None:
        """By the time in the name, for whatever else is there by its last change; then by name."""
        unique = "6d9bce8e-836b-442c-8070-74e77903c815.json"
        early, late = f"z-2019-11-14T00.38.06-{unique}", f"a-2019-11-14T00.38.08-{unique}"
        for name in (early, late, "between.json", "same.json", ".early.json", ".x.json.tmp", "notes.txt"):
            (tmp_path / name).write_bytes(b"{}")
        for name in ("between.json", "same.json"):
            os.utime(tmp_path / name, (0, 1573691887))  # 2019-11-14T00:38:07Z
        (tmp_path / "directory.json").mkdir()
        box = open_box(str(tmp_path), None, idle, None, None)
        assert [each.name for each in await everything(box)] == [early, "between.json", "same.json", late]
        assert await box.count() == 4

    async def test_what_vanishes_or_cannot_be_read(
        self, idle: AwsClients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The one is passed over, the other is handed out with the reason; those behind them are read."""
        monkeypatch.setattr(boxes, "_MOST_BYTES", 2)
        for name in ("a.json", "b.json", "c.json", "d.json", "e.json"):
            (tmp_path / name).write_bytes(b"{ }" if name == "d.json" else b"{}")
            os.utime(tmp_path / name, (0, 0))
        reading = open_box(str(tmp_path), None, idle, None, None).read()
        assert (await anext(reading)).name == "a.json"
        (tmp_path / "b.json").unlink()
        (tmp_path / "c.json").unlink()
        (tmp_path / "c.json").mkdir()
        found = [each async for each in reading]
        assert [(each.name, each.problem) for each in found] == [
            ("c.json", "is a directory"),
            ("d.json", "it has 3 bytes, so it is not a failure record"),
            ("e.json", ""),
        ]

    async def test_what_cannot_be_removed(self, idle: AwsClients, tmp_path: Path) -> None:
        """The error names the directory."""
        (tmp_path / "a.json").mkdir()
        box = open_box(str(tmp_path), None, idle, None, None)
        with pytest.raises(PollerError, match=str(tmp_path)):
            await box.remove(Found("a.json", b""))

    async def test_what_is_no_directory(self, idle: AwsClients, tmp_path: Path) -> None:
        """A file is none."""
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(PollerError, match="file: not a directory"):
            await open_box(f"{tmp_path}/file", None, idle, None, None).count()


def store_box(clients: AwsClients, store: MemoryStore) -> Box:
    return open_box("store", None, clients, store, None)


class TestStore:
    async def test_an_entry_names_its_mapping(self, idle: AwsClients) -> None:
        """And is handed out whole: its function may not be the mapping's any more."""
        store = MemoryStore()
        key = await keep(store, at(1, OTHER))
        [found] = await everything(store_box(idle, store))
        assert (found.mapping, found.kept) == (OTHER, (await store.documents(key))[key])

    async def test_the_order_is_that_of_time(self, idle: AwsClients) -> None:
        """Across mappings; only the wanted mapping's when there is one."""
        store = MemoryStore()
        keys = [await keep(store, at(number, (MAPPING, OTHER)[number % 2])) for number in (1, 2, 3, 4)]
        await store.put_document("mapping/x", {})
        assert [each.name for each in await everything(open_box("store", None, idle, store, None))] == keys
        assert [each.name for each in await everything(open_box("store", None, idle, store, OTHER))] == keys[::2]

    async def test_the_payload(self, idle: AwsClients) -> None:
        """It is in the record where the store keeps it."""
        store = MemoryStore()
        await keep(store, at(1))
        await keep(store, at(2), has_payload=True)
        without, whole = (notices.parse(each.body) for each in await everything(store_box(idle, store)))
        assert without.payload is None
        assert whole.payload == notices.event(at(2)).encode()

    async def test_what_vanishes(self, idle: AwsClients) -> None:
        """An entry that was pruned meanwhile is passed over; documents are not all read at once."""
        store = MemoryStore()
        keys = [await keep(store, at(number)) for number in (1, 2, 3)]
        reading = store_box(idle, store).read()
        await anext(reading)
        await store.delete_document(keys[1])
        assert [each.name async for each in reading] == [keys[2]]

    @pytest.mark.parametrize("fraction", [0.0, 0.021, 0.0214, 0.0215, 0.0219999, 0.0015, 0.9996])
    async def test_the_entry_of_a_failure_record(self, fraction: float) -> None:
        """It is found from what the record says, though that cuts off the milliseconds which the key rounds."""
        store = MemoryStore()
        notice = replace(at(1), at=1573691886 + fraction)
        key = await keep(store, notice)
        await keep(store, replace(notice, records=notice.records[:1]))
        record = notices.parse(notices.body(notice))
        identity = notices.identity_of(
            MAPPING, record.shard, record.request_id, record.condition, record.start, record.end
        )
        found = await find_kept(store, MAPPING, record.at, identity)
        assert found is not None
        assert (found[0], found[1]["ids"]) == (key, ["1", "2"])
        assert await find_kept(store, OTHER, record.at, identity) is None

    async def test_an_entry_without_records(self) -> None:
        """The final invocation of an empty window has no extent."""
        store = MemoryStore()
        notice = replace(at(1), records=())
        key = await keep(store, notice)
        record = notices.parse(notices.body(notice))
        identity = notices.identity_of(MAPPING, record.shard, record.request_id, record.condition, "", "")
        assert await find_kept(store, MAPPING, record.at, identity) == (
            key,
            {"record": notices.record(notice), "ids": [], "hashes": []},
        )


class TestPlaces:
    @pytest.mark.parametrize(
        ("place", "where"),
        [
            ("store", "the store"),
            ("arn:aws-cn:sqs:cn-north-1:123456789012:q", "arn:aws-cn:sqs:cn-north-1:123456789012:q"),
            ("arn:aws:sqs:eu-west-1:123456789012:q.fifo", "arn:aws:sqs:eu-west-1:123456789012:q.fifo"),
            ("http://127.0.0.1:4566/000000000000/q", "http://127.0.0.1:4566/000000000000/q"),
            ("s3://bucket", "s3://bucket/aws/lambda/M/"),
            ("s3://bucket/", "s3://bucket/aws/lambda/M/"),
            ("s3://bucket/a b/c", "s3://bucket/a b/c"),
            ("arn:aws:s3:::bucket", "s3://bucket/aws/lambda/M/"),
            ("arn:aws:s3:::bucket/x/", "s3://bucket/x/"),
            ("file:///a%20b", "/a b"),
            ("/a/b", "/a/b"),
            ("./failed", "failed"),
            ("..", ".."),
            ("failed/", "failed"),
        ],
    )
    async def test_what_is_a_place(self, idle: AwsClients, place: str, where: str) -> None:
        """And how it is called. No network, no look at the disk."""
        assert open_box(place, REGION, idle, MemoryStore(), "M").where == where

    async def test_a_directory_that_is_there(
        self, idle: AwsClients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A plain word is one if it is there, but `store` is the store."""
        for name in ("failed", "store"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path)
        assert open_box("failed", None, idle, None, None).where == "failed"
        assert open_box("store", None, idle, MemoryStore(), None).where == "the store"

    @pytest.mark.parametrize(
        ("host", "region"),
        [
            ("sqs.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
            ("sqs.cn-north-1.amazonaws.com.cn", "cn-north-1"),
            ("sqs-fips.us-east-2.amazonaws.com", "us-east-2"),
            ("sqs.eu-west-3.api.aws", "eu-west-3"),
            ("vpce-1-2.sqs.eu-west-2.vpce.amazonaws.com", "eu-west-2"),
            ("eu-central-1.queue.amazonaws.com", "eu-central-1"),
            ("localhost:4566", REGION),
        ],
    )
    async def test_the_region_of_a_url(self, idle: AwsClients, host: str, region: str) -> None:
        """The URL's own, else the one that is configured."""
        box: Any = open_box(f"https://{host}/123456789012/q", REGION, idle, None, None)
        assert box._service.region == region

    @pytest.mark.parametrize(
        ("place", "expected"),
        [
            ("arn:aws:sns:eu-west-1:123456789012:t", "subscribe an SQS queue to it"),
            ("arn:aws:events:eu-west-1:123456789012:event-bus/b", "make an SQS queue the target of a rule"),
            ("https://example.com/hook?key=s3cr3t", "cannot be read back"),
            ("HTTPS://user:s3cr3t@sqs.eu-west-1.amazonaws.com/123456789012/q", "cannot be read back"),
            ("https://sqs.eu-west-1.amazonaws.com/123456789012/q?s3cr3t", "cannot be read back"),
            ("https://[s3cr3t/123456789012/q", "cannot be read back"),
            ("https:///123456789012/q", "cannot be read back"),
            ("arn:aws:sqs:eu-west-1:12:q", "give `store`"),
            ("arn:aws:lambda:eu-west-1:123456789012:function:f", "give `store`"),
            ("s3://", "give `store`"),
            ("s3:/bucket", "give `store`"),
            ("gs://bucket/x", "give `store`"),
            ("file://host/x", "give `store`"),
            ("file:x", "give `store`"),
            ("stor", "give `store`"),
            ("", "give `store`"),
            ("a/\0", "give `store`"),
        ],
    )
    async def test_what_is_none(self, idle: AwsClients, place: str, expected: str) -> None:
        """A ConfigError that says what would do, and quotes nothing secret."""
        with pytest.raises(ConfigError, match=expected) as caught:
            open_box(place, REGION, idle, None, None)
        assert str(caught.value).startswith("FROM: ")
        assert "s3cr3t" not in str(caught.value)
