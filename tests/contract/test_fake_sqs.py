"""The fake SQS keeps the rules of SQS; where MiniStack does too, both run the same test."""
# ruff: noqa: F811  # fixtures are imported by name and then named as arguments

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import ClientError

from poller.aws.session import AwsClients
from poller.clock import SystemClock
from poller.core.model import SourceKind, SourceSpec
from poller.ports import QueueSource
from poller.sources import Sources
from tests.contract import test_sources
from tests.contract.test_fake_aws import process  # noqa: F401
from tests.contract.test_sources import queue  # noqa: F401
from tests.fakes.aws import FakeAws
from tests.integration import emulators
from tests.integration.conftest import REGION, account, connect, fake_aws  # noqa: F401

pytestmark = pytest.mark.integration

Connect = Callable[[str], Awaitable[AwsClients]]


class TestQueuesOnTheFake(test_sources.TestQueues):
    """Every rule that our source keeps with MiniStack and roto."""

    @pytest.fixture
    async def make_queue(
        self, account: str, connect: Connect, fake_aws: FakeAws
    ) -> Callable[..., Awaitable[test_sources.QueueRig]]:
        async def made(name: str, **attributes: str) -> test_sources.QueueRig:
            clients = await connect(fake_aws.url)
            nowhere = await connect(f"http://127.0.0.1:{emulators.free_port()}")
            sqs = await clients.client("sqs", REGION)
            url = (await sqs.create_queue(QueueName=name, Attributes=attributes))["QueueUrl"]

            async def send(body: str, **extra: Any) -> Any:
                return await sqs.send_message(QueueUrl=url, MessageBody=body, **extra)

            async def opened(where: AwsClients, which: str) -> QueueSource:
                arn = f"arn:aws:sqs:{REGION}:{account}:{which}"
                spec = SourceSpec(SourceKind.SQS, arn, REGION, account, which, fifo=which.endswith(".fifo"))
                clock = SystemClock(asyncio.get_running_loop())
                return await Sources(where, clock).open_queue(test_sources.mapping_of(spec))

            return test_sources.QueueRig(
                await opened(clients, name),
                await opened(clients, "nobody-made-this"),
                await opened(nowhere, name),
                send,
            )

        return made


@dataclass
class Rig:
    """One queue of one backend."""

    sqs: Any
    url: str
    arn: str

    async def send(self, *bodies: str, group: str = "", **extra: Any) -> None:
        if group:
            extra["MessageGroupId"] = group
        for body in bodies:
            more = {"MessageDeduplicationId": f"{group} {body}"} if group else {}
            await self.sqs.send_message(QueueUrl=self.url, MessageBody=body, **extra, **more)

    async def receive(self, limit: int = 10, wait: int = 0, **extra: Any) -> list[dict[str, Any]]:
        answer = await self.sqs.receive_message(
            QueueUrl=self.url,
            MaxNumberOfMessages=limit,
            WaitTimeSeconds=wait,
            MessageSystemAttributeNames=["All"],
            MessageAttributeNames=["All"],
            **extra,
        )
        return answer.get("Messages", [])

    async def delete(self, message: dict[str, Any]) -> None:
        await self.sqs.delete_message(QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])

    async def change(self, message: dict[str, Any], seconds: int) -> None:
        await self.sqs.change_message_visibility(
            QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=seconds
        )


Make = Callable[..., Awaitable[Rig]]


async def made(clients: AwsClients, name: str, attributes: dict[str, str]) -> Rig:
    sqs = await clients.client("sqs", REGION)
    url = (await sqs.create_queue(QueueName=name, Attributes=attributes))["QueueUrl"]
    known = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
    return Rig(sqs, url, known["Attributes"]["QueueArn"])


@pytest.fixture(params=["fake", "ministack"])
def make(request: pytest.FixtureRequest, account: str, connect: Connect, fake_aws: FakeAws) -> Make:
    """Makes queues on one backend."""
    url = fake_aws.url if request.param == "fake" else emulators.running("ministack")

    async def on_one(name: str = "q", **attributes: str) -> Rig:
        return await made(await connect(url), name, attributes)

    return on_one


@pytest.fixture
def make_fake(account: str, connect: Connect, fake_aws: FakeAws) -> Make:
    """Makes queues on the fake."""

    async def on_fake(name: str = "q", **attributes: str) -> Rig:
        return await made(await connect(fake_aws.url), name, attributes)

    return on_fake


def bodies(messages: list[dict[str, Any]]) -> list[str]:
    return [message["Body"] for message in messages]


class TestStandard:
    async def test_a_message_is_invisible_and_comes_back(self, make: Make) -> None:
        """With one more receive and a new receipt; a long poll ends when the visibility does."""
        queue = await make(VisibilityTimeout="1")
        await queue.send("a")
        [first] = await queue.receive()
        assert await queue.receive() == []
        began = time.monotonic()
        [again] = await queue.receive(wait=10)
        assert 0.7 < time.monotonic() - began < 3
        assert first["ReceiptHandle"] != again["ReceiptHandle"]
        assert [m["Attributes"]["ApproximateReceiveCount"] for m in (first, again)] == ["1", "2"]
        assert again["MessageId"] == first["MessageId"]
        assert (
            again["Attributes"]["ApproximateFirstReceiveTimestamp"]
            == (first["Attributes"]["ApproximateFirstReceiveTimestamp"])
        )

    async def test_a_long_poll_wakes_for_a_message(self, make: Make) -> None:
        """Each of two polls gets one of two messages."""
        queue = await make()
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            polls = [tasks.create_task(queue.receive(1, 20)) for _ in range(2)]
            await queue.send("a", "b")
        assert sorted(bodies([message for poll in polls for message in poll.result()])) == ["a", "b"]

    async def test_visibility_is_changed(self, make: Make) -> None:
        """Longer keeps it away beyond its timeout; nothing returns it at once."""
        queue = await make(VisibilityTimeout="1")
        await queue.send("a")
        [message] = await queue.receive()
        await queue.change(message, 30)
        assert await queue.receive(wait=2) == []
        await queue.change(message, 0)
        assert len(await queue.receive()) == 1

    async def test_after_enough_receives_a_message_is_dead(self, make: Make) -> None:
        """Moved by the receive after the last, with its id, body and the queue that it comes from."""
        dead = await make("dead")
        policy = json.dumps({"deadLetterTargetArn": dead.arn, "maxReceiveCount": 2})
        queue = await make("q", VisibilityTimeout="0", RedrivePolicy=policy)
        await queue.send("a")
        received = [message for _ in range(4) for message in await queue.receive()]
        assert len(received) == 2
        [letter] = await dead.receive()
        assert (letter["MessageId"], letter["Body"]) == (received[0]["MessageId"], "a")
        assert letter["Attributes"]["DeadLetterQueueSourceArn"] == queue.arn

    async def test_a_batch_fails_in_part(self, make: Make) -> None:
        """A receipt that is none is answered, the others are deleted."""
        queue = await make()
        await queue.send("a", "b")
        messages = [*await queue.receive(1), *await queue.receive(1)]
        entries = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(messages)]
        answer = await queue.sqs.delete_message_batch(
            QueueUrl=queue.url, Entries=[*entries, {"Id": "bad", "ReceiptHandle": "x"}]
        )
        assert [entry["Id"] for entry in answer["Successful"]] == ["0", "1"]
        assert [(entry["Id"], entry["SenderFault"]) for entry in answer["Failed"]] == [("bad", True)]
        answer = await queue.sqs.change_message_visibility_batch(
            QueueUrl=queue.url, Entries=[{"Id": "bad", "ReceiptHandle": "x", "VisibilityTimeout": 1}]
        )
        assert answer["Failed"][0]["Code"] == "ReceiptHandleIsInvalid"

    async def test_attributes_come_when_asked_for(self, make: Make) -> None:
        """With digests that botocore checks too."""
        queue = await make()
        attributes = {
            "text": {"DataType": "String", "StringValue": "é"},
            "number": {"DataType": "Number", "StringValue": "6"},
            "blob": {"DataType": "Binary", "BinaryValue": b"\0\1"},
        }
        trace = {"AWSTraceHeader": {"DataType": "String", "StringValue": "Root=1-5759e988-bd862e3fe1be46a994272793"}}
        sent = await queue.sqs.send_message(
            QueueUrl=queue.url, MessageBody="a", MessageAttributes=attributes, MessageSystemAttributes=trace
        )
        [message] = await queue.receive(VisibilityTimeout=0)
        assert message["MessageAttributes"] == attributes
        assert message["MD5OfMessageAttributes"] == sent["MD5OfMessageAttributes"]
        assert message["MD5OfBody"] == sent["MD5OfMessageBody"]
        assert message["Attributes"]["AWSTraceHeader"] == trace["AWSTraceHeader"]["StringValue"]
        answer = await queue.sqs.receive_message(QueueUrl=queue.url)
        assert not answer["Messages"][0].keys() & {"Attributes", "MessageAttributes", "MD5OfMessageAttributes"}

    async def test_counters_tell_what_is_visible_and_what_is_not(self, make: Make) -> None:
        """As they are now, without the delay of AWS."""
        queue = await make()
        await queue.send("a", "b", "c")
        await queue.receive(1)
        known = await queue.sqs.get_queue_attributes(QueueUrl=queue.url, AttributeNames=["All"])
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        assert [known["Attributes"][name] for name in names] == ["2", "1"]

    async def test_a_deleted_queue_is_gone_until_it_is_made_again(self, make: Make) -> None:
        """And empty then."""
        queue = await make()
        await queue.send("a")
        await queue.sqs.delete_queue(QueueUrl=queue.url)
        with pytest.raises(ClientError) as caught:
            await queue.receive()
        assert caught.value.response["Error"]["Code"] == "AWS.SimpleQueueService.NonExistentQueue"
        assert await (await make()).receive() == []

    @pytest.mark.parametrize(
        ("operation", "request_", "code"),
        [
            ("receive_message", {"MaxNumberOfMessages": 11}, "InvalidParameterValue"),
            ("delete_message", {"ReceiptHandle": "x"}, "ReceiptHandleIsInvalid"),
            ("delete_message_batch", {"Entries": []}, "AWS.SimpleQueueService.EmptyBatchRequest"),
            (
                "delete_message_batch",
                {"Entries": [{"Id": str(n), "ReceiptHandle": "x"} for n in range(11)]},
                "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
            ),
            (
                "delete_message_batch",
                {"Entries": [{"Id": "same", "ReceiptHandle": "x"}] * 2},
                "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
            ),
        ],
    )
    async def test_bad_requests_are_answered_as_aws_does(self, make: Make, operation, request_, code) -> None:
        """With the codes of the older protocol."""
        queue = await make()
        with pytest.raises(ClientError) as caught:
            await getattr(queue.sqs, operation)(QueueUrl=queue.url, **request_)
        assert caught.value.response["Error"]["Code"] == code


class TestFifo:
    async def test_a_group_is_in_order_and_locked(self, make: Make) -> None:
        """Several of a group in one receive; none while one of them is in flight; other groups go on."""
        queue = await make("q.fifo", FifoQueue="true")
        await queue.send("a0", "a1", "a2", group="a")
        await queue.send("b0", group="b")
        first = await queue.receive(2)
        assert bodies(first) == ["a0", "a1"]
        assert [m["Attributes"]["MessageGroupId"] for m in first] == ["a", "a"]
        assert first[0]["Attributes"]["SequenceNumber"] < first[1]["Attributes"]["SequenceNumber"]
        assert bodies(await queue.receive()) == ["b0"]
        await queue.delete(first[0])
        assert await queue.receive() == []
        await queue.delete(first[1])
        assert bodies(await queue.receive()) == ["a2"]

    async def test_order_is_kept_after_the_visibility_timeout(self, make: Make) -> None:
        """What was received comes again before what was not."""
        queue = await make("q.fifo", FifoQueue="true", VisibilityTimeout="1")
        await queue.send("a0", "a1", "a2", "a3", group="a")
        await queue.receive(2)
        assert bodies(await queue.receive(wait=10)) == ["a0", "a1", "a2", "a3"]

    async def test_one_of_a_group_that_is_returned_stays_locked(self, make: Make) -> None:
        """While others of the group are in flight; then they come in order."""
        queue = await make("q.fifo", FifoQueue="true")
        await queue.send("a0", "a1", "a2", group="a")
        first = await queue.receive()
        await queue.change(first[1], 0)
        assert await queue.receive() == []
        await queue.change(first[2], 0)
        await queue.delete(first[0])
        assert bodies(await queue.receive()) == ["a1", "a2"]

    async def test_a_repeated_message_is_one(self, make: Make) -> None:
        """Within five minutes, even after it was deleted."""
        queue = await make("q.fifo", FifoQueue="true")
        await queue.send("a0", "a0", group="a")
        [message] = await queue.receive()
        await queue.delete(message)
        await queue.send("a0", group="a")
        assert await queue.receive() == []

    async def test_a_dead_letter_frees_its_group(self, make: Make) -> None:
        """The next message follows; the letter is in the dead letter queue."""
        dead = await make("dead.fifo", FifoQueue="true")
        policy = json.dumps({"deadLetterTargetArn": dead.arn, "maxReceiveCount": 1})
        queue = await make("q.fifo", FifoQueue="true", RedrivePolicy=policy)
        await queue.send("a0", "a1", group="a")
        [message] = await queue.receive(1)
        await queue.change(message, 0)
        assert bodies(await queue.receive(1)) == ["a1"]
        assert bodies(await dead.receive()) == ["a0"]


class TestFakeOnly:
    async def test_twelve_hours_are_the_most(self, make_fake: Make, fake_aws: FakeAws) -> None:
        """From the receive, not from the change."""
        queue = await make_fake()
        await queue.send("a")
        [message] = await queue.receive(VisibilityTimeout=43_200)
        now = time.time()
        fake_aws.clock = lambda: now + 100
        await queue.change(message, 43_000)
        with pytest.raises(ClientError, match="beyond the limit"):
            await queue.change(message, 43_200)

    async def test_an_old_receipt_deletes_nothing(self, make_fake: Make, fake_aws: FakeAws) -> None:
        """It is no error either; the history says so."""
        queue = await make_fake(VisibilityTimeout="0")
        await queue.send("a")
        [old] = await queue.receive()
        [_] = await queue.receive(VisibilityTimeout=30)
        await queue.delete(old)
        [message] = fake_aws.messages(queue.arn)
        assert [what for what, _ in message["history"]] == ["sent", "received", "received", "stale"]
        assert not message["is_gone"]

    async def test_an_expired_receipt(self, make_fake: Make) -> None:
        """It cannot be changed; in a FIFO queue not deleted, elsewhere it can."""
        queue = await make_fake("q.fifo", FifoQueue="true", VisibilityTimeout="0")
        await queue.send("a", group="a")
        [message] = await queue.receive()
        with pytest.raises(ClientError) as caught:
            await queue.change(message, 10)
        assert caught.value.response["Error"]["Code"] == "AWS.SimpleQueueService.MessageNotInflight"
        with pytest.raises(ClientError, match="has expired"):
            await queue.delete(message)
        queue = await make_fake("q", VisibilityTimeout="0")
        await queue.send("a")
        [message] = await queue.receive()
        await queue.delete(message)
        assert await queue.receive() == []

    async def test_too_many_in_flight(self, make_fake: Make, fake_aws: FakeAws) -> None:
        """OverLimit; nothing for a FIFO queue."""
        queue, fifo = await make_fake(), await make_fake("q.fifo", FifoQueue="true")
        for one, group in ((queue, ""), (fifo, "a")):
            await one.send("a", "b", group=group)
            fake_aws.queue_of(one.arn).in_flight_limit = 1
            assert len(await one.receive()) == 1
        with pytest.raises(ClientError) as caught:
            await queue.receive()
        assert caught.value.response["Error"]["Code"] == "OverLimit"
        assert await fifo.receive() == []

    async def test_a_poll_that_is_cut_off_takes_nothing(self, make_fake: Make, fake_aws: FakeAws) -> None:
        """It ends with its client, as MiniStack's do a moment later; the next message goes to the next poll."""
        queue = await make_fake()
        there = fake_aws.queue_of(queue.arn)
        poll = asyncio.create_task(queue.receive(1, 20))
        while not there.polls:
            await asyncio.sleep(0.01)
        poll.cancel()
        await asyncio.wait({poll})
        while there.polls:
            await asyncio.sleep(0.01)
        await queue.send("a")
        assert bodies(await queue.receive(1, 5)) == ["a"]

    async def test_a_haunted_poll_takes_what_nobody_gets(self, make_fake: Make, fake_aws: FakeAws) -> None:
        """As SQS may do when a client hangs up."""
        queue = await make_fake()
        fake_aws.haunt(True)
        poll = asyncio.create_task(queue.receive(1, 20))
        there = fake_aws.queue_of(queue.arn)
        while not there.polls:
            await asyncio.sleep(0.01)
        poll.cancel()
        await asyncio.wait({poll})
        await queue.send("a")
        assert await queue.receive(1, 1) == []
        assert there.in_flight == 1

    async def test_faults_on_demand(self, make_fake: Make, fake_aws: FakeAws) -> None:
        """A refusal and a flaky call do nothing; a truncated one is done; entries of a batch fail alone."""
        queue = await make_fake()
        await queue.send("a", "b")
        fake_aws.refuse("ReceiveMessage", "OverLimit")
        with pytest.raises(ClientError, match="OverLimit"):
            await queue.receive()
        fake_aws.refuse("ReceiveMessage", None)
        fake_aws.flake("ReceiveMessage", 1.0)
        with pytest.raises(ClientError, match="ServiceUnavailable"):
            await queue.receive()
        fake_aws.flake("ReceiveMessage", 0.0)
        fake_aws.truncate("ReceiveMessage", True)
        assert await queue.receive(1) == [], "what botocore makes of it"
        fake_aws.truncate("ReceiveMessage", False)
        [message] = await queue.receive()
        assert fake_aws.queue_of(queue.arn).in_flight == 2
        fake_aws.fail_entries(queue.arn, "DeleteMessageBatch", [0])
        entries = [{"Id": "0", "ReceiptHandle": message["ReceiptHandle"]}]
        answer = await queue.sqs.delete_message_batch(QueueUrl=queue.url, Entries=entries)
        assert [(entry["Id"], entry["SenderFault"]) for entry in answer["Failed"]] == [("0", False)]
        answer = await queue.sqs.delete_message_batch(QueueUrl=queue.url, Entries=entries)
        assert [entry["Id"] for entry in answer["Successful"]] == ["0"]

    async def test_a_queue_that_is_deleted_ends_its_polls(self, make_fake: Make, fake_aws: FakeAws) -> None:
        """They learn that it is gone."""
        queue = await make_fake()
        poll = asyncio.create_task(queue.receive(1, 20))
        while not fake_aws.queue_of(queue.arn).polls:
            await asyncio.sleep(0.01)
        fake_aws.delete_queue(queue.arn)
        with pytest.raises(ClientError, match="does not exist"):
            await poll

    async def test_a_poll_that_was_woken_and_cut_off_wakes_the_next(self, make_fake: Make, fake_aws: FakeAws) -> None:
        """A message does not lie about while somebody waits."""
        there = fake_aws.queue_of((await make_fake()).arn)
        first, second = (asyncio.create_task(there.receive(1, 20, 30)) for _ in range(2))
        while there.polls < 2:
            await asyncio.sleep(0)
        there.send("a")
        first.cancel()
        async with asyncio.timeout(5):
            assert [message.body for message in await second] == ["a"]

    async def test_commands_over_http(self, process, account, connect) -> None:
        """A queue, messages in groups, and their history."""
        async with aiohttp.ClientSession() as http:

            async def command(verb: str, **arguments: Any) -> Any:
                async with http.post(f"{process}/_fake/{verb}", json=arguments) as answer:
                    assert answer.status == 200
                    return await answer.json()

            arn = await command("queue", name="q.fifo", account=account, region=REGION)
            ids = await command("send", queue=arn, bodies=["x", "y"], groups=["a", "b"])
            queue = await made(await connect(process), "q.fifo", {})
            assert [message["MessageId"] for message in await queue.receive()] == ids
            found = await command("messages", queue=arn)
            assert [(one["body"], one["group"], one["receives"]) for one in found] == [("x", "a", 1), ("y", "b", 1)]
            assert [what for what, _ in found[0]["history"]] == ["sent", "received"]
            await command("fail_entries", queue=arn, operation="DeleteMessageBatch", entries=[0])
            await command("flake", operation="ReceiveMessage", share=0)
            await command("truncate", operation="ReceiveMessage", on=False)
            await command("haunt", on=False)

    async def test_a_hundred_thousand_messages_are_received_and_deleted_once(self, fake_aws: FakeAws) -> None:
        """A long queue costs no more a message than a short one."""
        arn = fake_aws.queue("q")
        fake_aws.send(arn, [base64.b16encode(b"%d" % n).decode() for n in range(100_000)])
        queue = fake_aws.queue_of(arn)
        while found := await queue.receive(10, 0, 30):
            for message in found:
                queue.delete(message.handle)
        assert all(message.is_gone and message.receives == 1 for message in queue.messages.values())
        assert queue.in_flight == 0
