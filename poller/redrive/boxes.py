"""The places of failure records, read back: a queue, a bucket, a directory, the store."""

import asyncio
import json
import math
import os
import re
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from botocore.exceptions import ClientError

from poller.aws.errors import aws_error, translate
from poller.aws.lean import AwsError
from poller.aws.queues import queue_url
from poller.aws.service import READING, Service
from poller.aws.session import COLD_TIMEOUT, AwsClients
from poller.core.model import MappingId
from poller.destinations.file import directory_of
from poller.errors import AccessDenied, ConfigError, DestinationFailed, SourceUnavailable
from poller.ports import CheckpointStore
from poller.redrive.model import Box, Found
from poller.runtime.discards import discarded_key

_ATTEMPTS = 4  # of one AWS call; nothing else repeats it, and a run should survive a hiccup
_MOST_BYTES = 32 * 1024 * 1024  # of one failure record; an event has 6 MiB, twice as many in a JSON string at worst

_RECEIVED = 10  # messages of one ReceiveMessage, and of one batch call
_WAIT = 3  # seconds of a long poll; it ends at once when there are messages
_VISIBILITY = 120  # seconds for which a message is ours once it is received; `hold` makes it longer
_KEEP_INTERVAL = 30.0  # of two such seconds a message that waits is hidden anew
_MOST_AGAIN = 100  # messages that come again in a row, at least, before it is believed that there are no others
_MOST_VISIBILITY = 43_200  # seconds in all, from the receive on
_RETURNS = 8  # batch calls at once
_RETURN_SECONDS = 20.0  # for all of them

_S3_PREFIX = "aws/lambda/"  # where Lambda, too, puts failure records
_SUFFIX = ".json"
_TIME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}\.[0-9]{2}\.[0-9]{2})-[0-9a-f-]{36}\.json")
_TIME_FORMAT = "%Y-%m-%dT%H.%M.%S"
_UUID = "([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_S3_MAPPING = re.compile(f"(?:^|/){_S3_PREFIX}{_UUID}/")
_FILE_MAPPING = re.compile(f"{_UUID}-")

_NAME = r"(?P<name>[a-zA-Z0-9_-]{1,80}|[a-zA-Z0-9_-]{1,75}\.fifo)"
_PARTITION = "arn:aws[a-zA-Z0-9-]*"
_QUEUE = re.compile(_PARTITION + ":sqs:(?P<region>[a-z0-9-]+):(?P<account>[0-9]{12}):" + _NAME)
_QUEUE_PATH = re.compile("/[0-9]{12}/" + _NAME)
_QUEUE_HOST = re.compile(
    r"(?:.*\.)?sqs(?:-fips)?\.(?P<region>[a-z]{2,}-[a-z-]+-[0-9]+)\..+|(?P<old>[a-z]{2,}-[a-z-]+-[0-9]+)\.queue\..+"
)
_SCHEME = re.compile("[a-zA-Z0-9+.-]+:")
_BUCKET = re.compile(
    "(?:s3://|" + _PARTITION + ":s3:::)(?P<bucket>[a-zA-Z0-9._-]{3,255})(?:/(?P<prefix>.*))?", re.DOTALL
)

_FORMS = (
    "FROM: not a place of failure records; give `store`, the ARN or URL of an SQS queue, s3://BUCKET[/PREFIX], "
    "or a directory as a path with a / or as file:///DIR"
)
_TOPIC = "FROM: an SNS topic cannot be read back; subscribe an SQS queue to it and redrive that, or redrive `store`"
_BUS = (
    "FROM: an EventBridge bus cannot be read back; make an SQS queue the target of a rule and redrive that, "
    "or redrive `store`"
)
_URL = (
    "FROM: what was posted to a URL cannot be read back, and this is no queue's, which would be "
    "https://sqs.REGION.amazonaws.com/ACCOUNT/NAME; redrive `store`"
)

T = TypeVar("T")


def open_box(
    place: str,
    region: str | None,
    clients: AwsClients,
    store: CheckpointStore | None,
    mapping: MappingId | None,
    *,
    store_lock: Path | None = None,
) -> Box:
    """What lies at a place; needs no network. ConfigError: it is none, or one that cannot be read back.

    `region`: for a place that names none. `store`: needed for the place `store` only. `mapping`: only its records,
    where that spares reading the others; what is read may be of others all the same. `store_lock`: `Box.lock` of the
    store.
    """
    if place == "store":
        assert store is not None
        return StoreBox(store, mapping, store_lock)
    if parts := _QUEUE.fullmatch(place):
        service = Service("sqs", parts["region"], place, clients, COLD_TIMEOUT, _ATTEMPTS, READING)
        return SqsBox(service, account=parts["account"], name=parts["name"])
    if parts := _BUCKET.fullmatch(place):
        prefix = parts["prefix"] or _S3_PREFIX + (f"{mapping}/" if mapping else "")
        where = f"s3://{parts['bucket']}/{prefix}"
        return S3Box(Service("s3", region, where, clients, COLD_TIMEOUT, _ATTEMPTS, READING), parts["bucket"], prefix)
    scheme = place.partition(":")[0].lower()
    if scheme in {"http", "https"}:
        if not _is_queue(place):
            raise ConfigError([_URL])
        service = Service("sqs", _region(place) or region, place, clients, COLD_TIMEOUT, _ATTEMPTS, READING)
        return SqsBox(service, url=place)
    directory = directory_of(place) if scheme == "file" else _directory(place)
    if directory is not None:
        return DirectoryBox(directory, mapping)
    if re.match(_PARTITION + ":sns:", place):
        raise ConfigError([_TOPIC])
    if re.match(_PARTITION + ":events:", place):
        raise ConfigError([_BUS])
    raise ConfigError([_FORMS])


def _is_queue(url: str) -> bool:
    """Has it the form of a queue's URL, whatever the host is? Passwords are none of it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    whole = parts.netloc and "@" not in parts.netloc and not parts.query and not parts.fragment
    return bool(whole and _QUEUE_PATH.fullmatch(parts.path))


def _region(url: str) -> str | None:
    host = _QUEUE_HOST.fullmatch(urlsplit(url).hostname or "")
    return (host["region"] or host["old"]) if host else None


def _directory(place: str) -> Path | None:
    """A word may be a directory's name if that is there; else it is rather a typing error."""
    if _SCHEME.match(place) or "\0" in place or not place:
        return None
    return Path(place) if "/" in place or place.startswith(".") or Path(place).is_dir() else None


async def find_kept(
    store: CheckpointStore, mapping: MappingId, at: float, identity: str
) -> tuple[str, dict[str, Any]] | None:
    """What the store keeps of the batch of a failure record, and its key; None: nothing. StoreUnavailable.

    `at`: the record's timestamp, `identity`: see `notices.identity_of`. The timestamp's milliseconds are cut off, those
    of the key are rounded.
    """
    milliseconds = round(at * 1000)
    for each in (milliseconds, milliseconds + 1):
        key = discarded_key(mapping, each / 1000, identity)
        if (document := (await store.documents(key)).get(key)) is not None:
            return key, document
    return None


@dataclass(slots=True)
class _Held:
    """A message that is ours. Instants are of the loop's clock, and early rather than late."""

    receipt: str  # the latest; an older one may be refused
    received: float
    until: float
    is_left: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # two changes at once could end the wrong way round

    @property
    def is_ending(self) -> bool:
        """It is still wanted, and soon seen by others unless it is hidden anew."""
        return not self.is_left and 0 < self.until - _now() < 2 * _KEEP_INTERVAL


class SqsBox:
    """A queue. Nothing can be looked at without receiving it: even a listing raises ApproximateReceiveCount, which a
    redrive policy of this queue counts, and hides the messages until `close`.

    A FIFO queue gives no more of a message group while some of it is held: another run reads on there.
    """

    lock: Path | None = None

    def __init__(self, service: Service, account: str = "", name: str = "", url: str = "") -> None:
        """Known by account and name, or by its URL."""
        self.where = service.where
        self._service = service
        self._account = account
        self._name = name
        self._url = url
        self._held: dict[str, _Held] = {}  # by message id
        self._removed: set[str] = set()

    async def count(self) -> int | None:
        """About how many are visible; None when we may not ask, which nothing else needs."""
        async with self._service.calling("sqs:GetQueueAttributes") as client:
            url = await self._queue_url()
            try:
                answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages"])
            except ClientError as error:
                if isinstance(translate(aws_error(error), {}, ""), AccessDenied):
                    return None
                raise
            number = answer.get("Attributes", {}).get("ApproximateNumberOfMessages", "")
            return int(number) if number.isascii() and number.isdigit() else None

    async def read(self) -> AsyncIterator[Found]:
        """Each message once. Ends at an empty receive, or when all that are held have come again without a new one: a
        long look at a large queue outlasts their visibility.
        """
        again = 0
        while True:
            asked = _now()
            messages = await self._receive()
            fresh = []
            for found, receipt in messages:
                if found.name in self._removed:
                    # A copy that survived the delete, which SQS allows for. Its batch was delivered.
                    await self._delete(receipt)
                elif (held := self._held.get(found.name)) is not None:
                    await self._again(held, receipt, asked)
                else:
                    self._held[found.name] = _Held(receipt, asked, asked + _VISIBILITY)
                    fresh.append(found)
            again = 0 if fresh else again + len(messages)
            if not messages or again >= max(len(self._held), _MOST_AGAIN):
                return
            for found in fresh:
                yield found

    async def keep(self) -> None:
        """Hide it again before it is seen: what waits, and what is worked at, whose pauses may be longer than its hold.
        What that fails for lapses, and `hold` says so.
        """
        while True:
            await asyncio.sleep(_KEEP_INTERVAL)
            ending = [held for held in self._held.values() if held.is_ending]
            for start in range(0, len(ending), _RECEIVED):
                await self._keep(ending[start : start + _RECEIVED])

    async def _keep(self, ten: Sequence[_Held]) -> None:
        async with AsyncExitStack() as locks:
            for held in ten:
                await locks.enter_async_context(held.changing)
            still = [held for held in ten if held.is_ending]
            now = _now()
            if not still:
                return
            with suppress(DestinationFailed):
                refused = await self._show([held.receipt for held in still], _VISIBILITY)
                for index, held in enumerate(still):
                    if index not in refused:
                        held.until = now + _VISIBILITY

    def leave(self, found: Found) -> None:
        """It is seen again in time, at the latest after `close`."""
        if held := self._held.get(found.name):
            held.is_left = True

    async def hold(self, found: Found, seconds: float) -> bool:
        """Hide it for so long, 12 hours from its receive at most. False: others could have received it by now."""
        held = self._held.get(found.name)
        if held is None:
            return False
        async with held.changing:
            return held.until > _now() and await self._extend(held, seconds)

    async def remove(self, found: Found) -> None:
        """Delete it."""
        held = self._held.get(found.name)
        if held is None:
            return
        if not await self._delete(held.receipt):
            raise DestinationFailed(f"{self.where}: sqs:DeleteMessage: refused; it was received again by somebody else")
        self._held.pop(found.name, None)
        self._removed.add(found.name)

    async def close(self) -> None:
        """Make what is still ours visible. Best effort: it becomes that by itself."""
        now = _now()
        receipts = [held.receipt for held in self._held.values() if held.until > now]
        self._held.clear()
        tens = [receipts[start : start + _RECEIVED] for start in range(0, len(receipts), _RECEIVED)]
        with suppress(TimeoutError):
            async with asyncio.timeout(_RETURN_SECONDS):
                try:
                    for start in range(0, len(tens), _RETURNS):
                        async with asyncio.TaskGroup() as tasks:
                            for ten in tens[start : start + _RETURNS]:
                                tasks.create_task(self._show(ten, 0))
                except* DestinationFailed:
                    pass

    async def _queue_url(self) -> str:
        if not self._url:
            self._url = await queue_url(self._service.clients, self._service.region, self._account, self._name)
        return self._url

    async def _receive(self) -> list[tuple[Found, str]]:
        async with self._service.calling("sqs:ReceiveMessage") as client:
            url = await self._queue_url()
            answer = await client.receive_message(
                QueueUrl=url, MaxNumberOfMessages=_RECEIVED, WaitTimeSeconds=_WAIT, VisibilityTimeout=_VISIBILITY
            )
            return [
                (Found(each["MessageId"], each["Body"].encode()), each["ReceiptHandle"])
                for each in answer.get("Messages", [])
            ]

    async def _again(self, held: _Held, receipt: str, asked: float) -> None:
        """It was received again, which may have cut a longer hold short."""
        async with held.changing:
            until = held.until
            held.receipt, held.received, held.until = receipt, asked, asked + _VISIBILITY
            if until > held.until:
                await self._extend(held, until - _now())

    async def _extend(self, held: _Held, seconds: float) -> bool:
        now = _now()
        most = _MOST_VISIBILITY - math.ceil(now - held.received)
        if (whole := min(math.ceil(seconds), most)) <= 0:
            return False
        if await self._show([held.receipt], whole):
            return False
        held.until = now + whole
        return True

    async def _show(self, receipts: Sequence[str], seconds: int) -> Collection[int]:
        """Let them be seen in so many seconds. The places of those that are no longer ours."""
        entries = [
            {"Id": str(index), "ReceiptHandle": receipt, "VisibilityTimeout": seconds}
            for index, receipt in enumerate(receipts)
        ]
        return await self._change("sqs:ChangeMessageVisibility", "change_message_visibility_batch", entries)

    async def _delete(self, receipt: str) -> bool:
        entry = {"Id": "0", "ReceiptHandle": receipt}
        return not await self._change("sqs:DeleteMessage", "delete_message_batch", [entry])

    async def _change(self, action: str, operation: str, entries: Sequence[dict[str, Any]]) -> Collection[int]:
        """The receipts that were refused. A batch call even for one: it says of each whether it was done."""
        async with self._service.calling(action) as client:
            url = await self._queue_url()
            answer = await getattr(client, operation)(QueueUrl=url, Entries=entries)
            refused = answer.get("Failed", [])
            if {each["Id"] for each in (*answer.get("Successful", []), *refused)} != {each["Id"] for each in entries}:
                raise self._service.unreadable(action)
            for each in refused:
                error = AwsError(str(each.get("Code", "")), 200, "")
                if not each.get("SenderFault") or not isinstance(translate(error, {}, ""), SourceUnavailable):
                    raise error
            return {int(each["Id"]) for each in refused}


class S3Box:
    """Objects of a bucket under a prefix, in the order of their keys: by mapping, shard and time."""

    lock: Path | None = None

    def __init__(self, service: Service, bucket: str, prefix: str) -> None:
        self.where = service.where
        self._service = service
        self._bucket = bucket
        self._prefix = prefix

    async def count(self) -> int | None:
        """Not known: S3 has no answer but the whole list."""
        return None

    async def read(self) -> AsyncIterator[Found]:
        """Each object; what vanishes meanwhile is passed over."""
        page: dict[str, str] = {}
        while True:
            async with self._service.calling("s3:ListBucket") as client:
                answer = await client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, **page)
                objects = [(each["Key"], each["Size"]) for each in answer.get("Contents", [])]
                is_last = not answer["IsTruncated"]
                page = {} if is_last else {"ContinuationToken": answer["NextContinuationToken"]}
            for key, size in objects:
                if key.endswith("/"):
                    continue  # what consoles make for a folder
                found = _too_large(key, size) if size > _MOST_BYTES else await self._get(key)
                if found is not None:
                    yield found
            if is_last:
                return

    async def keep(self) -> None:
        """Nobody else reads from here."""

    def leave(self, found: Found) -> None:
        """It stays as it is."""

    async def hold(self, found: Found, seconds: float) -> bool:  # noqa: ARG002
        """Nobody takes objects."""
        return True

    async def remove(self, found: Found) -> None:
        """Delete the object; with versioning an older one stays, as always."""
        async with self._service.calling("s3:DeleteObject") as client:
            await client.delete_object(Bucket=self._bucket, Key=found.name)

    async def close(self) -> None:
        """Nothing: the connections belong to the `AwsClients`."""

    async def _get(self, key: str) -> Found | None:
        async with self._service.calling("s3:GetObject") as client:
            try:
                answer = await client.get_object(Bucket=self._bucket, Key=key)
            except ClientError as error:
                match aws_error(error).code:
                    case "NoSuchKey" | "404":
                        return None
                    case "InvalidObjectState":
                        return Found(key, b"", problem="it is archived; restore it first")
                    case _:
                        raise
            async with answer["Body"] as stream:
                if (size := answer["ContentLength"]) > _MOST_BYTES:
                    return _too_large(key, size)
                try:
                    of = _S3_MAPPING.search(key)
                    return Found(key, await stream.read(), mapping=of[1] if of else "")
                except aiohttp.ClientError:
                    raise self._service.unreadable("s3:GetObject") from None


class DirectoryBox:
    """`*.json` files of a directory, in the order of the time in their names, else of their last change."""

    def __init__(self, directory: Path, mapping: MappingId | None) -> None:
        self.where = str(directory)
        self.lock: Path | None = directory / ".redrive-lock"
        self._directory = directory
        self._start = f"{mapping}-" if mapping else ""

    async def count(self) -> int | None:
        """The files."""
        return len(await self._names())

    async def read(self) -> AsyncIterator[Found]:
        """Each file; what vanishes meanwhile is passed over."""
        for name in await self._names():
            if (found := await self._run(partial(_read_file, self._directory, name))) is not None:
                yield found

    async def keep(self) -> None:
        """Nobody else reads from here."""

    def leave(self, found: Found) -> None:
        """It stays as it is."""

    async def hold(self, found: Found, seconds: float) -> bool:  # noqa: ARG002
        """Nobody takes files."""
        return True

    async def remove(self, found: Found) -> None:
        """Delete the file."""
        await self._run(partial((self._directory / found.name).unlink, missing_ok=True))

    async def close(self) -> None:
        """Nothing is open."""

    async def _names(self) -> list[str]:
        return await self._run(partial(_list_files, self._directory, self._start))

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(work)
        except FileNotFoundError:
            raise DestinationFailed(f"{self.where}: it is not there; give the directory of the *.json files") from None
        except OSError as error:
            raise DestinationFailed(f"{self.where}: {_why(error)}") from None


class StoreBox:
    """The batches that the daemon discarded and its store remembers, whether or not they were reported elsewhere."""

    where = "the store"

    def __init__(self, store: CheckpointStore, mapping: MappingId | None, lock: Path | None) -> None:
        self.lock = lock
        self._store = store
        self._prefix = discarded_key(mapping) if mapping else "discarded/"

    async def count(self) -> int | None:
        """The entries."""
        return len(await self._store.document_keys(self._prefix))

    async def read(self) -> AsyncIterator[Found]:
        """Each entry as its failure record, with the payload if that was kept; one document at a time."""
        keys = await self._store.document_keys(self._prefix)
        for key in sorted(keys, key=lambda key: (key.rpartition("/")[2], key)):
            if (document := (await self._store.documents(key)).get(key)) is not None:
                yield Found(key, _record_of(document), mapping=key.split("/")[1], kept=document)

    async def keep(self) -> None:
        """Nobody else reads from here."""

    def leave(self, found: Found) -> None:
        """It stays as it is."""

    async def hold(self, found: Found, seconds: float) -> bool:  # noqa: ARG002
        """Nobody takes entries."""
        return True

    async def remove(self, found: Found) -> None:
        """Delete the entry."""
        await self._store.delete_document(found.name)

    async def close(self) -> None:
        """Nothing: the store belongs to the caller."""


def _now() -> float:
    return asyncio.get_running_loop().time()


def _too_large(name: str, size: int) -> Found:
    return Found(name, b"", problem=f"it has {size} bytes, so it is not a failure record")


def _list_files(directory: Path, start: str) -> list[str]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            if not name.startswith(start) or name.startswith(".") or not name.endswith(_SUFFIX):
                continue
            with suppress(FileNotFoundError):
                if entry.is_file():
                    found.append((_time_of(entry), name))
    return [name for _, name in sorted(found)]


def _time_of(entry: "os.DirEntry[str]") -> str:
    if at := _TIME.search(entry.name):
        return at[1]
    return datetime.fromtimestamp(entry.stat().st_mtime, UTC).strftime(_TIME_FORMAT)


def _read_file(directory: Path, name: str) -> Found | None:
    try:
        with (directory / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            of = _FILE_MAPPING.match(name)
            if size > _MOST_BYTES:
                return _too_large(name, size)
            return Found(name, file.read(), mapping=of[1] if of else "")
    except FileNotFoundError:
        return None
    except OSError as error:
        return Found(name, b"", problem=_why(error))


def _record_of(document: dict[str, Any]) -> bytes:
    """An entry that was edited is passed on as it is: the reader says what is wrong with it."""
    record = document.get("record")
    if not isinstance(record, dict):
        return json.dumps(document).encode()
    return json.dumps({**record, "payload": document["payload"]} if "payload" in document else record).encode()


def _why(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else type(error).__name__
