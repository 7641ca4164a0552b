"""SQS: visibility, receive counts, message groups, dead letters, and the history of every message for the test.

A message that is received is in flight until its visibility ends, in a group of a FIFO queue together with what was
received with it: none of the group is given out meanwhile. Queues and messages are kept in memory only; there are no
delays, policies or encryption, and what a request must not say here is an error.
"""

import asyncio
import base64
import hashlib
import heapq
import itertools
import json
import struct
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tests.fakes.aws.shards import AwsFault, Caller, Service, required

MAX_VISIBILITY = 43_200
MAX_WAIT = 20
MAX_ENTRIES = 10
IN_FLIGHT = 120_000
DEDUPLICATION_SECONDS = 300.0

# Codes of the older protocol, which botocore shows instead (header x-amzn-query-error).
QUERY_CODES = {
    "QueueDoesNotExist": "AWS.SimpleQueueService.NonExistentQueue",
    "TooManyEntriesInBatchRequest": "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
    "EmptyBatchRequest": "AWS.SimpleQueueService.EmptyBatchRequest",
    "BatchEntryIdsNotDistinct": "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
    "MessageNotInflight": "AWS.SimpleQueueService.MessageNotInflight",
}


class Message:
    """One message. `history`: what happened to it and when: sent, received, changed, visible, deleted, dead, stale.

    `due`: when it becomes visible again; None while it is visible or gone. `stale` is a deletion with an old receipt.
    """

    __slots__ = (
        "attributes", "body", "deduplication", "due", "first_received", "group", "handle", "history", "id",
        "is_gone", "order", "received", "receives", "sent", "source", "trace",
    )  # fmt: skip

    def __init__(self, order: int, body: str, sent: float, group: str = "", deduplication: str = "") -> None:
        self.order = order
        self.id = str(uuid.uuid4())
        self.body = body
        self.sent = sent
        self.group = group
        self.deduplication = deduplication
        self.attributes: dict[str, dict[str, str]] = {}
        self.trace = ""
        self.source = ""  # ARN of the queue whose dead letter it is
        self.receives = 0
        self.first_received = 0.0
        self.received = 0.0
        self.due: float | None = None
        self.handle = ""
        self.is_gone = False
        self.history: list[tuple[str, float]] = [("sent", sent)]

    def times(self, what: str) -> list[float]:
        """When that happened."""
        return [at for name, at in self.history if name == what]


class Queue:
    """One queue. `messages`: all that ever were in it, by id."""

    def __init__(self, arn: str, attributes: dict[str, str], now: Callable[[], float]) -> None:
        self.arn = arn
        self.name = arn.rpartition(":")[2]
        self.account = arn.split(":")[4]
        self.attributes = {"VisibilityTimeout": "30", "ReceiveMessageWaitTimeSeconds": "0", **attributes}
        self.is_fifo = self.name.endswith(".fifo")
        self.is_deleted = False
        self.messages: dict[str, Message] = {}
        self.in_flight = 0
        self.in_flight_limit = IN_FLIGHT
        self.polls = 0  # ReceiveMessage calls that wait now
        self.asked: list[tuple[int, float, int]] = []  # limit, wait and visibility of every receive
        self.failing: dict[str, deque[frozenset[int]]] = {}  # by operation: entries of the next calls that fail
        self.dead_letters: Queue | None = None
        self._now = now
        self._orders = itertools.count(1)
        self._due: list[tuple[float, int, Message]] = []  # entries whose message says another time are void
        self._visible: deque[Message] = deque()  # of a standard queue
        self._groups: dict[str, dict[int, Message]] = {}  # what is there of each group, in order
        self._locks: dict[str, int] = {}  # messages of a group in flight
        self._ready: dict[str, None] = {}  # groups that are not locked and not empty, the longest waiting first
        self._duplicates: dict[str, tuple[Message, float]] = {}
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def max_receives(self) -> int:
        """Receives after which a message is dead; 0: never."""
        policy = self.attributes.get("RedrivePolicy")
        return int(json.loads(policy)["maxReceiveCount"]) if policy else 0

    @property
    def visible(self) -> int:
        """How many could be received, locked groups included."""
        self._advance()
        return len([1 for message in self.messages.values() if not message.is_gone]) - self.in_flight

    def send(self, body: str, group: str = "", deduplication: str = "") -> Message:
        """A new message, or the one that it repeats."""
        now = self._now()
        if self.is_fifo:
            if not group:
                raise AwsFault("MissingParameter", "The request must contain the parameter MessageGroupId.")
            if not deduplication:
                if self.attributes.get("ContentBasedDeduplication") != "true":
                    raise AwsFault("InvalidParameterValue", "MessageDeduplicationId is missing")
                deduplication = hashlib.sha256(body.encode()).hexdigest()
            known = self._duplicates.get(deduplication)
            if known is not None and now - known[1] < DEDUPLICATION_SECONDS:
                return known[0]
        message = Message(next(self._orders), body, now, group, deduplication)
        if self.is_fifo:
            self._duplicates[deduplication] = (message, now)
        self._add(message)
        return message

    async def receive(self, limit: int, wait: float, visibility: int) -> list[Message]:
        """What can be had now, or comes within `wait` seconds."""
        self.asked.append((limit, wait, visibility))
        ends = asyncio.get_running_loop().time() + wait
        while True:
            self._assert_there()
            found = self._take(limit, visibility)
            if found or asyncio.get_running_loop().time() >= ends:
                self._wake()  # there may be more, for the next one who waits
                return found
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            self._watch()
            self.polls += 1
            try:
                async with asyncio.timeout_at(ends):
                    await waiter
            except TimeoutError:
                pass
            finally:
                self.polls -= 1
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                else:
                    self._wake()  # it was woken and may not be able to receive

    def delete(self, handle: str) -> None:
        """An older receipt of a message deletes nothing and is no error (SQS, DeleteMessage)."""
        message = self._message(handle)
        now = self._now()
        if message.is_gone:
            return
        if message.handle != handle:
            message.history.append(("stale", now))
            return
        if self.is_fifo and message.due is None:
            raise AwsFault("InvalidParameterValue", "The receipt handle has expired")
        message.history.append(("deleted", now))
        self._drop(message)

    def change(self, handle: str, seconds: int) -> None:
        """Visible after so many seconds from now."""
        message = self._message(handle)
        now = self._now()
        if not 0 <= seconds <= MAX_VISIBILITY or now + seconds > message.received + MAX_VISIBILITY + 1:
            raise AwsFault(
                "InvalidParameterValue",
                f"Value {seconds} for parameter VisibilityTimeout is invalid. Reason: Total VisibilityTimeout for the "
                f"message is beyond the limit [{MAX_VISIBILITY} seconds]",
            )
        if message.handle != handle or message.due is None or message.is_gone:
            raise AwsFault("MessageNotInflight", "The message is not in flight")
        message.history.append((f"changed {seconds}", now))
        if seconds:
            self._hide(message, now + seconds)
        else:
            self._show(message)
        self._wake()

    def end(self) -> None:
        """The queue is gone; whoever waits learns it."""
        self.is_deleted = True
        if self._timer is not None:
            self._timer.cancel()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def _assert_there(self) -> None:
        if self.is_deleted:
            raise AwsFault("QueueDoesNotExist", "The specified queue does not exist.")

    def _message(self, handle: str) -> Message:
        message = self.messages.get(handle.partition("#")[0])
        if message is None or "#" not in handle:
            raise AwsFault("ReceiptHandleIsInvalid", "The input receipt handle is invalid.")
        self._advance()
        return message

    def _add(self, message: Message) -> None:
        self.messages[message.id] = message
        if self.is_fifo:
            self._groups.setdefault(message.group, {})[message.order] = message
            if not self._locks.get(message.group):
                self._ready[message.group] = None
        else:
            self._visible.append(message)
        self._wake()

    def _drop(self, message: Message) -> None:
        message.is_gone = True
        if message.due is not None:
            self._land(message)
        if self.is_fifo:
            del self._groups[message.group][message.order]
            self._unlock(message.group)
        self._wake()

    def _hide(self, message: Message, due: float) -> None:
        if message.due is None:
            self.in_flight += 1
            if self.is_fifo:
                self._locks[message.group] = self._locks.get(message.group, 0) + 1
        message.due = due
        heapq.heappush(self._due, (due, message.order, message))
        if self._waiters:
            self._watch()

    def _show(self, message: Message) -> None:
        self._land(message)
        if self.is_fifo:
            self._unlock(message.group)
        else:
            self._visible.append(message)

    def _land(self, message: Message) -> None:
        message.due = None
        self.in_flight -= 1
        if self.is_fifo:
            self._locks[message.group] -= 1

    def _unlock(self, group: str) -> None:
        if not self._groups[group]:
            self._ready.pop(group, None)
        elif not self._locks.get(group):
            self._ready.setdefault(group)

    def _advance(self) -> None:
        now = self._now()
        while self._due and self._due[0][0] <= now:
            due, _, message = heapq.heappop(self._due)
            if message.due == due and not message.is_gone:
                message.history.append(("visible", due))
                self._show(message)

    def _take(self, limit: int, visibility: int) -> list[Message]:
        self._advance()
        if self.in_flight >= self.in_flight_limit:
            if self.is_fifo:
                return []
            raise AwsFault("OverLimit", "Too many messages in flight", 403)
        limit = min(limit, self.in_flight_limit - self.in_flight)
        found: list[Message] = []
        if not self.is_fifo:
            while self._visible and len(found) < limit:
                message = self._visible.popleft()
                if not message.is_gone and not self._is_dead(message):
                    self._give_out(message, visibility, found)
        while self._ready and len(found) < limit:
            group = next(iter(self._ready))
            del self._ready[group]
            for message in list(self._groups[group].values())[: limit - len(found)]:
                if not self._is_dead(message):
                    self._give_out(message, visibility, found)
            self._unlock(group)
        if visibility == 0:
            for message in found:
                self._show(message)
        return found

    def _give_out(self, message: Message, visibility: int, found: list[Message]) -> None:
        now = self._now()
        message.receives += 1
        message.received = now
        message.first_received = message.first_received or now
        message.handle = f"{message.id}#{message.receives}#{uuid.uuid4()}"
        message.history.append(("received", now))
        self._hide(message, now + visibility)
        found.append(message)

    def _is_dead(self, message: Message) -> bool:
        """Moved to the dead letters, because it was received often enough."""
        if self.dead_letters is None or self.dead_letters.is_deleted or message.receives < self.max_receives:
            return False
        message.history.append(("dead", self._now()))
        if self.is_fifo:
            del self._groups[message.group][message.order]
        del self.messages[message.id]
        message.source = self.arn
        message.order = next(self.dead_letters._orders)
        self.dead_letters._add(message)
        return True

    def _wake(self) -> None:
        """One who waits may try; when it has received it wakes the next."""
        if self._visible or self._ready:
            while self._waiters:
                waiter = self._waiters.popleft()
                if not waiter.done():
                    waiter.set_result(None)
                    return

    def _watch(self) -> None:
        """Wake somebody when the next message becomes visible."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._due:
            delay = max(0.0, self._due[0][0] - self._now()) + 0.001
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._advance()
        self._wake()
        if self._waiters:
            self._watch()


class Sqs:
    """The operations. `base`: what queue URLs begin with; a URL is a name, whoever dials it finds nobody."""

    def __init__(self, now: Callable[[], float], base: str = "http://sqs.invalid") -> None:
        self._now = now
        self._base = base
        self.queues: dict[str, Queue] = {}  # by ARN
        entries = frozenset({"QueueUrl", "Entries"})
        one = frozenset({"QueueUrl", "ReceiptHandle"})
        self.service = Service(
            target="AmazonSQS",
            content_type="application/x-amz-json-1.0",
            namespace="com.amazonaws.sqs#",
            operations={
                "CreateQueue": (self._create_queue, frozenset({"QueueName", "Attributes"})),
                "DeleteQueue": (self._delete_queue, frozenset({"QueueUrl"})),
                "GetQueueUrl": (self._get_queue_url, frozenset({"QueueName", "QueueOwnerAWSAccountId"})),
                "GetQueueAttributes": (self._get_queue_attributes, frozenset({"QueueUrl", "AttributeNames"})),
                "SetQueueAttributes": (self._set_queue_attributes, frozenset({"QueueUrl", "Attributes"})),
                "SendMessage": (self._send_message, frozenset({"QueueUrl", *_MESSAGE})),
                "SendMessageBatch": (self._send_message_batch, entries),
                "ReceiveMessage": (
                    self._receive_message,
                    frozenset(
                        {
                            "QueueUrl",
                            "MaxNumberOfMessages",
                            "WaitTimeSeconds",
                            "VisibilityTimeout",
                            "AttributeNames",
                            "MessageSystemAttributeNames",
                            "MessageAttributeNames",
                        }
                    ),
                ),
                "DeleteMessage": (self._delete_message, one),
                "DeleteMessageBatch": (self._delete_message_batch, entries),
                "ChangeMessageVisibility": (self._change_visibility, one | {"VisibilityTimeout"}),
                "ChangeMessageVisibilityBatch": (self._change_visibility_batch, entries),
            },
        )

    def create(self, caller: Caller, name: str, attributes: dict[str, str]) -> Queue:
        """The queue of that name, a new one if there is none."""
        arn = f"arn:aws:sqs:{caller.region}:{caller.account}:{name}"
        if arn not in self.queues:
            self.queues[arn] = Queue(arn, attributes, self._now)
            self._redrive(self.queues[arn])
        return self.queues[arn]

    def queue(self, arn: str) -> Queue:
        """QueueDoesNotExist when there is none."""
        if (queue := self.queues.get(arn)) is None:
            raise AwsFault("QueueDoesNotExist", "The specified queue does not exist.")
        return queue

    def delete(self, arn: str) -> None:
        """Whoever waits for its messages learns that it is gone."""
        self.queue(arn).end()
        del self.queues[arn]

    def close(self) -> None:
        """End every poll."""
        for queue in self.queues.values():
            queue.end()

    def _redrive(self, queue: Queue) -> None:
        if policy := queue.attributes.get("RedrivePolicy"):
            target = self.queues.get(json.loads(policy)["deadLetterTargetArn"])
            if target is None or target.is_fifo != queue.is_fifo:
                raise AwsFault("InvalidAttributeValue", "Invalid value for the parameter RedrivePolicy.")
            queue.dead_letters = target

    def _url(self, queue: Queue) -> str:
        return f"{self._base}/{queue.account}/{queue.name}"

    def _at(self, caller: Caller, request: dict[str, Any]) -> Queue:
        account, _, name = str(required(request, "QueueUrl")).removeprefix(self._base).strip("/").rpartition("/")
        return self.queue(f"arn:aws:sqs:{caller.region}:{account.rpartition('/')[2]}:{name}")

    def _create_queue(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        return {
            "QueueUrl": self._url(self.create(caller, required(request, "QueueName"), request.get("Attributes", {})))
        }

    def _delete_queue(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        self.delete(self._at(caller, request).arn)
        return {}

    def _get_queue_url(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        owner = request.get("QueueOwnerAWSAccountId") or caller.account
        name = required(request, "QueueName")
        return {"QueueUrl": self._url(self.queue(f"arn:aws:sqs:{caller.region}:{owner}:{name}"))}

    def _get_queue_attributes(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        queue = self._at(caller, request)
        known = {
            **queue.attributes,
            "QueueArn": queue.arn,
            "ApproximateNumberOfMessages": str(queue.visible),
            "ApproximateNumberOfMessagesNotVisible": str(queue.in_flight),
            "ApproximateNumberOfMessagesDelayed": "0",
        }
        names = request.get("AttributeNames", [])
        return {"Attributes": {name: value for name, value in known.items() if name in names or "All" in names}}

    def _set_queue_attributes(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        queue = self._at(caller, request)
        queue.attributes |= required(request, "Attributes")
        self._redrive(queue)
        return {}

    def _send_message(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        return self._sent(
            self._at(caller, request), {name: value for name, value in request.items() if name != "QueueUrl"}
        )

    def _sent(self, queue: Queue, entry: dict[str, Any]) -> dict[str, Any]:
        if unknown := entry.keys() - _MESSAGE:
            raise AwsFault("UnsupportedOperation", f"{min(unknown)} is not known here")
        body = required(entry, "MessageBody")
        message = queue.send(body, entry.get("MessageGroupId", ""), entry.get("MessageDeduplicationId", ""))
        message.attributes = entry.get("MessageAttributes", {})
        message.trace = entry.get("MessageSystemAttributes", {}).get("AWSTraceHeader", {}).get("StringValue", "")
        answer = {"MessageId": message.id, "MD5OfMessageBody": _md5(body.encode())}
        if message.attributes:
            answer["MD5OfMessageAttributes"] = digest(message.attributes)
        if queue.is_fifo:
            answer["SequenceNumber"] = f"{message.order:020d}"
        return answer

    def _send_message_batch(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        queue = self._at(caller, request)

        def send(entry: dict[str, Any]) -> dict[str, Any]:
            return self._sent(queue, {name: value for name, value in entry.items() if name != "Id"})

        return self._batch(queue, "SendMessageBatch", request, send)

    async def _receive_message(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        queue = self._at(caller, request)
        limit = _number(request, "MaxNumberOfMessages", 1, 1, 10)
        own_wait = int(queue.attributes["ReceiveMessageWaitTimeSeconds"])
        wait = _number(request, "WaitTimeSeconds", own_wait, 0, MAX_WAIT)
        own_visibility = int(queue.attributes["VisibilityTimeout"])
        visibility = _number(request, "VisibilityTimeout", own_visibility, 0, MAX_VISIBILITY)
        found = await queue.receive(limit, wait, visibility)
        if not found:
            return {}
        system = request.get("MessageSystemAttributeNames") or request.get("AttributeNames") or []
        custom = request.get("MessageAttributeNames") or []
        return {"Messages": [_shown(queue, message, system, custom) for message in found]}

    def _delete_message(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        self._at(caller, request).delete(required(request, "ReceiptHandle"))
        return {}

    def _delete_message_batch(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        queue = self._at(caller, request)

        def delete(entry: dict[str, Any]) -> dict[str, Any]:
            queue.delete(required(entry, "ReceiptHandle"))
            return {}

        return self._batch(queue, "DeleteMessageBatch", request, delete)

    def _change_visibility(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        self._at(caller, request).change(required(request, "ReceiptHandle"), required(request, "VisibilityTimeout"))
        return {}

    def _change_visibility_batch(self, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
        queue = self._at(caller, request)

        def change(entry: dict[str, Any]) -> dict[str, Any]:
            queue.change(required(entry, "ReceiptHandle"), required(entry, "VisibilityTimeout"))
            return {}

        return self._batch(queue, "ChangeMessageVisibilityBatch", request, change)

    @staticmethod
    def _batch(
        queue: Queue, operation: str, request: dict[str, Any], act: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        entries: Sequence[dict[str, Any]] = required(request, "Entries")
        if not entries:
            raise AwsFault("EmptyBatchRequest", "There should be at least one entry in the request.")
        if len(entries) > MAX_ENTRIES:
            raise AwsFault("TooManyEntriesInBatchRequest", f"Maximum number of entries per request are {MAX_ENTRIES}.")
        if len({entry["Id"] for entry in entries}) < len(entries):
            raise AwsFault("BatchEntryIdsNotDistinct", "An id is repeated.")
        waiting = queue.failing.get(operation)
        failing = waiting.popleft() if waiting else frozenset[int]()
        done: list[dict[str, Any]] = []
        failed: list[dict[str, Any]] = []
        for index, entry in enumerate(entries):
            fault = {"Id": entry["Id"], "SenderFault": False, "Code": "InternalError", "Message": "Internal error"}
            if index in failing:
                failed.append(fault)
                continue
            try:
                done.append({"Id": entry["Id"], **act(entry)})
            except AwsFault as error:
                failed.append({**fault, "SenderFault": True, "Code": error.code, "Message": error.message})
        return {"Successful": done, **({"Failed": failed} if failed else {})}


_MESSAGE = frozenset(
    {
        "MessageBody",
        "MessageAttributes",
        "MessageSystemAttributes",
        "MessageGroupId",
        "MessageDeduplicationId",
    }
)


def _shown(queue: Queue, message: Message, system: Sequence[str], custom: Sequence[str]) -> dict[str, Any]:
    known = {
        "SenderId": queue.account,
        "SentTimestamp": str(int(message.sent * 1000)),
        "ApproximateReceiveCount": str(message.receives),
        "ApproximateFirstReceiveTimestamp": str(int(message.first_received * 1000)),
    }
    if message.trace:
        known["AWSTraceHeader"] = message.trace
    if message.source:
        known["DeadLetterQueueSourceArn"] = message.source
    if queue.is_fifo:
        known["SequenceNumber"] = f"{message.order:020d}"
        known["MessageGroupId"] = message.group
        known["MessageDeduplicationId"] = message.deduplication
    shown: dict[str, Any] = {
        "MessageId": message.id,
        "ReceiptHandle": message.handle,
        "MD5OfBody": _md5(message.body.encode()),
        "Body": message.body,
    }
    if attributes := {name: value for name, value in known.items() if name in system or "All" in system}:
        shown["Attributes"] = attributes
    wanted = {name: value for name, value in message.attributes.items() if name in custom or "All" in custom}
    if wanted:
        shown["MessageAttributes"] = wanted
        shown["MD5OfMessageAttributes"] = digest(wanted)
    return shown


def digest(attributes: dict[str, dict[str, str]]) -> str:
    """MD5 of message attributes (SQS developer guide, "Calculating the MD5 message digest for message attributes")."""
    joined = b""
    for name, attribute in sorted(attributes.items()):
        kind = attribute["DataType"]
        if kind.startswith("Binary"):
            marked = b"\2" + _counted(base64.b64decode(attribute["BinaryValue"]))
        else:
            marked = b"\1" + _counted(attribute["StringValue"].encode())
        joined += _counted(name.encode()) + _counted(kind.encode()) + marked
    return _md5(joined)


def _counted(text: bytes) -> bytes:
    return struct.pack("!I", len(text)) + text


def _md5(text: bytes) -> str:
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


def _number(request: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = request.get(name, default)
    if not isinstance(value, int) or not least <= value <= most:
        raise AwsFault(
            "InvalidParameterValue",
            f"Value {value} for parameter {name} is invalid. Reason: Must be between {least} and {most}, if provided.",
        )
    return value
