"""`poller redrive` as a process: discarded batches reach a target that is healthy again, and nothing is lost."""

import asyncio
import json
import os
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from aiohttp import web

from tests.fakes.aws import FakeAws
from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import config, stream_of
from tests.integration.test_streams_on_fake import Stream, Table, calls, until

pytestmark = pytest.mark.integration

ONE_SHARD = "shardId-000000000000"
SECONDS = 60.0


@dataclass
class Ended:
    """What a command left behind."""

    code: int
    out: list[str]
    err: str


@dataclass
class Desk:
    """A target. `hook` may answer an event; None: 200 and the event counts as delivered."""

    url: str = ""
    hook: Callable[[dict[str, Any]], Awaitable[web.Response | None]] | None = None
    delivered: list[list[str]] = field(default_factory=list)  # the records of each event, as the ledger names them
    events: list[dict[str, Any]] = field(default_factory=list)  # of `delivered`
    headers: list[dict[str, str]] = field(default_factory=list)  # of all requests
    keys: Counter[str] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        event = json.loads(await request.read())
        self.headers.append(dict(request.headers))
        self.keys[request.headers["Idempotency-Key"]] += 1
        self.paths.append(request.path)
        self.times.append(asyncio.get_running_loop().time())
        if self.hook is not None and (answer := await self.hook(event)) is not None:
            return answer
        self.events.append(event)
        self.delivered.append([Ledger.name(record) for record in event["Records"]])
        return web.json_response({})

    @property
    def names(self) -> Counter[str]:
        """How often each record was delivered."""
        return Counter(name for names in self.delivered for name in names)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    """A target in this process."""
    made = Desk()
    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.router.add_post("/{path:.*}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/f"
    yield made
    await runner.cleanup()


async def failing(_: dict[str, Any]) -> web.Response:
    return web.Response(status=500)


def started(path: Path, *arguments: str) -> Awaitable[asyncio.subprocess.Process]:
    return asyncio.create_subprocess_exec(
        sys.executable, "-m", "poller", "redrive", *arguments, "-c", str(path),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )  # fmt: skip


async def ended(process: asyncio.subprocess.Process) -> Ended:
    try:
        async with asyncio.timeout(SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        raise AssertionError(f"redrive does not end: {await process.communicate()}") from None
    assert process.returncode is not None
    text = err.decode()
    assert "Traceback" not in text, text
    return Ended(process.returncode, out.decode().splitlines(), text)


async def reached(process: asyncio.subprocess.Process, event: asyncio.Event) -> None:
    """Wait for an event that the process brings about."""
    waiting = [asyncio.create_task(each) for each in (event.wait(), process.wait())]
    await asyncio.wait(waiting, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()
    assert event.is_set(), f"redrive did not get there: {process.returncode}"


async def redrive(path: Path, *arguments: str) -> Ended:
    """The command's end."""
    return await ended(await started(path, *arguments))


class World:
    """A stream on the fake, a config file whose mapping invokes the desk, and a place of failure records: a directory,
    or with `use_queue` an SQS queue, which takes some seconds to say that it is empty.
    """

    def __init__(self, aws: FakeAws, account: str, desk: Desk, folder: Path) -> None:
        self.aws = aws
        self.account = account
        self.desk = desk
        self.folder = folder
        self.path = folder / "poller.yaml"
        self.stream = Stream(aws, account)
        self.queue = ""
        self.directory = folder / "failed"
        self.directory.mkdir()
        self.place = str(self.directory)

    def use_queue(self) -> None:
        """From now on the failure records are in a queue."""
        self.place = self.queue = self.aws.queue("failed", self.account, REGION)

    async def create(self, shards: int = 1, records: int = 0) -> list[str]:
        """The stream, and so many records in its first shard; answers their sequence numbers."""
        await self.stream.create(shards)
        return await self.write(records) if records else []

    async def write(self, records: int) -> list[str]:
        """So many more in the first shard."""
        return [name.rpartition(":")[2] for name in await self.stream.write(records, 0)]

    def document(self, *mappings: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The daemon's config."""
        return {**config(self.aws, self.desk, *mappings), **more}  # type: ignore[arg-type]

    def configure(self, *mappings: dict[str, Any], **more: Any) -> None:
        """Write the config file; its store does not exist."""
        store = f"sqlite:///{str(self.folder).lstrip('/')}/none/poller.db"
        self.path.write_text(yaml.safe_dump({"store": store, **self.document(*mappings, **more)}))

    @property
    def function(self) -> str:
        """The ARN of the configured function."""
        return f"arn:aws:lambda:{REGION}:{self.account}:function:f"

    def letter(self, sequences: list[str], count: int | None = None, **more: Any) -> dict[str, Any]:
        """Lambda's failure record of a range in the first shard (semantics 10.2)."""
        return {
            "requestContext": {
                "requestId": str(uuid.uuid4()),
                "functionArn": self.function,
                "condition": "RetryAttemptsExhausted",
                "approximateInvokeCount": 1,
            },
            "responseContext": {"statusCode": 200, "executedVersion": "$LATEST", "functionError": "Unhandled"},
            "version": "1.0",
            "timestamp": "2019-11-14T00:38:06.021Z",
            "KinesisBatchInfo": {
                "shardId": ONE_SHARD,
                "startSequenceNumber": sequences[0],
                "endSequenceNumber": sequences[-1],
                "approximateArrivalOfFirstRecord": "2019-11-14T00:38:04.835Z",
                "approximateArrivalOfLastRecord": "2019-11-14T00:38:05.580Z",
                "batchSize": len(sequences) if count is None else count,
                "streamArn": self.stream.arn,
            },
            **more,
        }

    def put(self, *letters: dict[str, Any] | str) -> None:
        """Failure records, or other texts."""
        bodies = [one if isinstance(one, str) else json.dumps(one) for one in letters]
        if self.queue:
            self.aws.send(self.queue, bodies)
            return
        for number, body in enumerate(bodies):
            (self.directory / f"{number:03d}.json").write_text(body)

    def left(self) -> dict[str, str]:
        """What still lies there, by name."""
        if self.queue:
            return {one["id"]: one["body"] for one in self.aws.messages(self.queue) if not one["is_gone"]}
        return {path.name: path.read_text() for path in sorted(self.directory.iterdir())}

    def visible(self) -> int:
        """How many messages somebody would get now."""
        return self.aws.queue_of(self.queue).visible

    def names(self, sequences: list[str]) -> list[str]:
        return [f"kinesis {ONE_SHARD}:{sequence}" for sequence in sequences]


@pytest.fixture
def world(fake_aws: FakeAws, account: str, desk: Desk, tmp_path: Path) -> World:
    """What redrive needs."""
    return World(fake_aws, account, desk, tmp_path)


def discarding(arn: str, destination: str | None = None, **more: Any) -> dict[str, Any]:
    reporting = {"DestinationConfig": {"OnFailure": {"Destination": destination}}} if destination else {}
    return stream_of(arn, MaximumRetryAttempts=0, **reporting, **more)


async def discarded(daemon: Daemon, desk: Desk, records: int) -> None:
    """Run the daemon against a target that fails until it has given up so many records."""
    desk.hook = failing
    await daemon.start()

    def given_up() -> int:
        return sum(event["records"] for event in daemon.events("records_discarded"))

    await until(lambda: given_up() >= records, SECONDS, f"{records} discarded records")
    assert given_up() == records
    desk.hook = None


@pytest.mark.parametrize("is_running", [True, False], ids=["daemon runs", "daemon stopped"])
async def test_a_thousand_discarded_batches_are_delivered(world: World, desk: Desk, daemons, is_running: bool) -> None:
    """Each of them once, none missing; the queue is empty then, and nothing is left to list anywhere."""
    world.use_queue()
    await world.create(shards=2)
    names = [*await world.stream.write(500), *await world.stream.write(500)]
    mapping = discarding(world.stream.arn, world.queue, BatchSize=1, ParallelizationFactor=5)
    daemon = daemons(world.document(mapping))
    await discarded(daemon, desk, 1000)
    if not is_running:
        assert await daemon.stop() == 0
    assert len(world.left()) == 1000
    reads = calls(world.aws, "GetRecords")
    extra = ["--rate", "2000", "--concurrency", "4"] if is_running else []
    done = await redrive(daemon.path, world.queue, *extra)
    assert (done.code, done.out) == (0, ["1000 batches delivered, 1000 records"]), done.err
    assert desk.names == Counter(names)
    assert set(desk.keys.values()) == {2}, "the target cannot tell that it saw these batches before"
    assert not world.left()
    if not is_running:
        assert calls(world.aws, "GetRecords") - reads < 50
    listed = await redrive(daemon.path, "--list")
    assert (listed.code, len(listed.out)) == (0, 1)
    assert listed.out[0].startswith("no discarded batches in ")
    again = await redrive(daemon.path, world.queue)
    assert (again.code, again.out) == (0, ["0 batches delivered, 0 records"])
    if is_running:
        assert await daemon.stop() == 0


@pytest.mark.parametrize("place", ["store", "directory", "s3", "queue", "queue with payload"])
async def test_every_place_gives_its_batches_back(
    world: World, desk: Desk, daemons, place: str, request: pytest.FixtureRequest
) -> None:
    """Lanes' batches lie over each other, so only the ids, or the payload, tell which records they had."""
    world.use_queue()
    await world.create()
    names = world.names(await world.write(60))
    more: dict[str, Any] = {}
    mapping: dict[str, Any] = {}
    match place:
        case "store":
            destination, given = None, []
        case "directory":
            destination, given = f"file://{world.directory}", [str(world.directory)]
        case "s3":
            url = request.getfixturevalue("ministack")
            keys = {"aws_access_key_id": world.account, "aws_secret_access_key": "secret"}
            s3 = boto3.client("s3", region_name=REGION, endpoint_url=url, **keys)
            bucket = f"failed-{world.account}"
            await asyncio.to_thread(
                s3.create_bucket, Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION}
            )
            more = {"aws": {"region": REGION, "endpoint_url": world.aws.url, "endpoint_urls": {"s3": url}}}
            destination, given = f"arn:aws:s3:::{bucket}", [f"s3://{bucket}"]
        case "queue":
            destination, given = world.queue, [world.queue]
        case _:
            destination, given = world.queue, [world.queue]
            mapping = {"Options": {"IncludePayload": True}}
    daemon = daemons(
        world.document(
            discarding(world.stream.arn, destination, BatchSize=4, ParallelizationFactor=3, **mapping), **more
        )
    )
    await discarded(daemon, desk, 60)
    assert await daemon.stop() == 0
    batches = len(desk.headers)
    has_payload = place not in {"store", "queue"}
    if has_payload:
        world.aws.trim(world.stream.arn)
    listed = await redrive(daemon.path, *given, "--list")
    assert (listed.code, len(listed.out)) == (0, batches), listed.err
    assert all(("(payload)" if has_payload else "(record ids)") in line for line in listed.out)
    done = await redrive(daemon.path, *given)
    assert (done.code, done.out) == (0, [f"{batches} batches delivered, 60 records"]), done.err
    assert desk.names == Counter(names)
    assert set(desk.keys.values()) == {2}
    for given_again in ([], given):
        none = await redrive(daemon.path, *given_again, "--list")
        assert (none.code, len(none.out)) == (0, 1)
        assert none.out[0].startswith("no discarded batches in ")


async def test_without_ids_the_filter_decides_and_the_surplus_is_counted(world: World, desk: Desk) -> None:
    """The whole range that the filter lets through, and how many more than the record says."""
    await world.create()
    sequences = [(await world.write(1))[0] for _ in range(6)]
    pattern = json.dumps({"partitionKey": ["key-0"]})
    world.configure(discarding(world.stream.arn, FilterCriteria={"Filters": [{"Pattern": pattern}]}))
    await world.stream.write(3, 0)  # key-0, key-1, key-2, of which one fits
    tail = await world.write(1)
    sequences = [*sequences, *tail]
    world.put(world.letter(sequences, 5))
    done = await redrive(world.path, world.place)
    assert done.code == 0, done.err
    assert len(desk.delivered) == 1
    assert len(desk.delivered[0]) == 8
    assert {record["kinesis"]["partitionKey"] for record in desk.events[0]["Records"]} == {"key-0"}
    assert done.out == ["1 batch delivered, 8 records, 3 of them more than the failure records count"]
    assert "8 records, 3 more than its batchSize 5" in done.err
    assert "going on without the store" in done.err
    assert not world.left()


async def test_a_filter_that_has_changed_does_not_lose_records(world: World, desk: Desk) -> None:
    """It lets fewer through than there were: the whole range is delivered, and that is said."""
    await world.create()
    sequences = await world.write(4)
    pattern = json.dumps({"partitionKey": ["key-0"]})
    world.configure(discarding(world.stream.arn, FilterCriteria={"Filters": [{"Pattern": pattern}]}))
    world.put(world.letter(sequences))
    done = await redrive(world.path, world.place)
    assert done.code == 0, done.err
    assert desk.delivered == [world.names(sequences)]
    assert "the filter has changed since" in done.err


async def test_records_that_have_been_trimmed_are_said_and_stay(world: World, desk: Desk) -> None:
    """Exit 2 and the record stays; `--partial` delivers what is left; of a batch without any nothing can be."""
    world.use_queue()
    await world.create()
    sequences = await world.write(30)
    world.configure(discarding(world.stream.arn))
    world.put(*(world.letter(sequences[first : first + 10]) for first in (0, 10, 20)))
    world.aws.trim(world.stream.arn, ONE_SHARD, 14)
    done = await redrive(world.path, world.place)
    assert done.code == 2
    assert done.out[0] == "1 batch delivered, 10 records"
    assert done.out[1] == f"2 left in {world.place}: 2 trimmed from the stream"
    assert "all its records have been trimmed from the stream" in done.err
    assert "its first records have been trimmed from the stream; --partial delivers the 6 that are left" in done.err
    assert desk.delivered == [world.names(sequences[20:])]
    assert (len(world.left()), world.visible()) == (2, 2)
    done = await redrive(world.path, world.place, "--partial")
    assert done.code == 2
    assert done.out[0] == "1 batch delivered, 6 records"
    assert desk.delivered[1:] == [world.names(sequences[14:20])]
    assert len(world.left()) == 1


async def test_partial_with_a_filter_delivers_what_it_lets_through(world: World, desk: Desk) -> None:
    """That records are missing says nothing about the filter, and an event without records is never sent."""
    await world.create()
    sequences = await world.write(20)  # key-0 is the first
    last = [(await world.write(1))[0] for _ in range(2)]  # key-0 again
    await world.write(3)
    pattern = json.dumps({"partitionKey": ["key-0"]})
    world.configure(discarding(world.stream.arn, FilterCriteria={"Filters": [{"Pattern": pattern}]}))
    world.put(world.letter([*sequences, *last], 3), world.letter(sequences, 1))
    world.aws.trim(world.stream.arn, ONE_SHARD, 1)
    done = await redrive(world.path, world.place, "--partial")
    assert done.code == 2
    assert desk.delivered == [world.names(last)]
    assert "the filter has changed" not in done.err
    assert len(world.left()) == 1


async def test_a_batch_whose_stream_is_gone_stays(world: World, desk: Desk) -> None:
    """A sentence, and the others go on."""
    await world.create()
    sequences = await world.write(2)
    world.configure(discarding(world.stream.arn))
    gone = world.letter(sequences)
    gone["KinesisBatchInfo"]["streamArn"] += "-gone"
    world.put(gone, world.letter(sequences))
    done = await redrive(world.path, world.place)
    assert done.code == 2
    assert desk.delivered == [world.names(sequences)]
    assert "left the stream" in done.err
    assert len(world.left()) == 1


async def test_lambdas_own_record_is_delivered_elsewhere(world: World, desk: Desk) -> None:
    """Its function is not configured here: a real one, unless `--to` names another."""
    await world.create()
    sequences = await world.write(5)
    world.configure()
    letter = world.letter(sequences)
    letter["requestContext"]["functionArn"] = "arn:aws:lambda:us-east-2:111111111111:function:myfunction"
    world.put(letter)
    done = await redrive(world.path, world.place, "--to", "f")
    assert (done.code, done.out) == (0, ["1 batch delivered, 5 records"]), done.err
    assert desk.delivered == [world.names(sequences)]
    assert desk.events[0]["Records"][0]["invokeIdentityArn"] == "arn:aws:iam::111111111111:role/myfunction"
    assert not world.left()


async def test_to_invokes_another_function(world: World, desk: Desk) -> None:
    """`--to` outranks the mapping's own; one that does not exist is a sentence, and nothing is removed."""
    await world.create()
    sequences = await world.write(5)
    functions = {"f": {"url": desk.url}, "g": {"url": desk.url.removesuffix("/f") + "/g"}}
    world.configure(discarding(world.stream.arn), functions=functions)
    world.put(world.letter(sequences))
    done = await redrive(world.path, world.place, "--to", "not a function")
    assert done.code == 2
    assert "not a function" in done.err
    assert len(world.left()) == 1
    done = await redrive(world.path, world.place, "--to", "g")
    assert (done.code, desk.paths) == (0, ["/g"]), done.err
    assert not world.left()


async def test_a_dynamodb_range_is_read_from_a_closed_shard(world: World, desk: Desk) -> None:
    """Over empty answers, whose lag nobody knows."""
    table = Table(world.aws, world.account)
    names = table.write(20)
    [shard] = table.open_shards()
    table.write(5)
    world.aws.roll(table.arn)
    world.aws.empty(table.arn, 5)
    world.configure(discarding(table.arn))
    letter = world.letter([name.removeprefix("dynamodb ") for name in names])
    info = letter.pop("KinesisBatchInfo")
    letter["DDBStreamBatchInfo"] = {**info, "shardId": shard, "streamArn": table.arn}
    world.put(letter)
    done = await redrive(world.path, world.place)
    assert (done.code, done.out) == (0, ["1 batch delivered, 20 records"]), done.err
    assert desk.delivered == [names]


async def test_junk_is_named_and_left(world: World, desk: Desk) -> None:
    """What is no failure record is not removed, and nothing of it is printed."""
    world.use_queue()
    await world.create()
    sequences = await world.write(2)
    world.configure(discarding(world.stream.arn))
    world.put("secret text", '{"secret":1}', world.letter(sequences), '{"requestContext":{},"requestPayload":"secret"}')
    done = await redrive(world.path, world.place)
    assert done.code == 2
    assert done.out[0] == "1 batch delivered, 2 records"
    assert done.out[1] == f"3 left in {world.place}: 3 no failure record that can be read"
    assert "secret" not in done.err
    names = sorted(world.left())
    assert len(names) == 3
    assert all(f"left: {name}: " in line for name, line in zip(names, _left(done), strict=True)), done.err
    assert world.visible() == 3


def _left(done: Ended) -> list[str]:
    """The lines about what stays, by name."""
    return sorted(line for line in done.err.splitlines() if line.startswith("left: "))


async def test_a_bad_record_does_not_end_a_run(world: World, desk: Desk) -> None:
    """It is named and left, and those behind it are delivered."""
    await world.create()
    sequences = await world.write(4)
    world.configure(discarding(world.stream.arn))
    queue = world.letter(sequences[:1])
    queue["KinesisBatchInfo"]["streamArn"] = f"arn:aws:sqs:{REGION}:{world.account}:q"
    early = world.letter(sequences[:1], timestamp="0001-01-01T00:00:00+23:59")
    half = world.letter(sequences[:1])
    half["requestContext"]["requestId"] = "\ud800"
    world.put(queue, early, half, world.letter(sequences))
    for more in ["--list"], []:
        done = await redrive(world.path, world.place, *more)
        assert "its streamArn is of sqs, but its batch is of kinesis" in done.err
        assert "timestamp is not between 1970 and 9999" in done.err
        assert "requestContext.requestId has characters that cannot be printed" in done.err
        assert done.code == 2
    assert done.out == [
        "1 batch delivered, 4 records",
        f"3 left in {world.place}: 3 no failure record that can be read",
    ]
    assert desk.delivered == [world.names(sequences)]


async def windowed(world: World, desk: Desk, daemons: Any, destination: str | None, *, is_final: bool) -> Daemon:
    """A daemon that has given up the final invocation of a window, or a batch of it, and was stopped."""

    async def counting(event: dict[str, Any]) -> web.Response:
        if event["isFinalInvokeForWindow"] is is_final:
            return web.Response(status=500)
        return web.json_response({"state": {"n": event["state"].get("n", 0) + len(event["Records"])}})

    await world.create()
    await world.write(5)
    desk.hook = counting
    daemon = daemons(world.document(discarding(world.stream.arn, destination, TumblingWindowInSeconds=1)))
    await daemon.start()
    await until(lambda: daemon.events("records_discarded"), SECONDS, "a discarded invocation")
    assert await daemon.stop() == 0
    return daemon


@pytest.mark.parametrize("place", ["store", "directory", "queue"])
async def test_the_final_invocation_of_a_window_has_its_state_again(
    world: World, desk: Desk, daemons, place: str
) -> None:
    """As it was, from the payload or from the store, and with the same key; else the sum of the window would be lost."""
    if place == "queue":
        world.use_queue()
    destination = {"store": None, "directory": f"file://{world.directory}", "queue": world.queue}[place]
    daemon = await windowed(world, desk, daemons, destination, is_final=True)
    desk.events.clear()
    desk.hook = None
    given = "store" if place == "store" else world.place
    done = await redrive(daemon.path, given)
    assert done.code == 0, done.err
    finals = [event for event in desk.events if event["isFinalInvokeForWindow"]]
    assert finals
    assert desk.events == finals
    assert all(event["state"]["n"] > 0 for event in finals)
    assert sum(event["state"]["n"] for event in finals) == 5
    assert {desk.keys[headers["Idempotency-Key"]] for headers in desk.headers[-len(finals) :]} == {2}


async def test_a_batch_of_a_window_says_that_its_answer_goes_nowhere(world: World, desk: Desk, daemons) -> None:
    """It is delivered with the state that it had; the window is over without it."""
    daemon = await windowed(world, desk, daemons, None, is_final=False)

    async def answering(event: dict[str, Any]) -> web.Response:
        desk.events.append(event)
        return web.json_response({"state": {}})

    desk.hook = answering
    done = await redrive(daemon.path)
    assert done.code == 0, done.err
    assert "the state that its function answers goes nowhere" in done.err
    assert not any(event["isFinalInvokeForWindow"] for event in desk.events)


async def test_a_window_whose_state_nobody_knows_stays(world: World, desk: Desk) -> None:
    """Lambda's own record has none: an empty state would be taken for the sum of the window."""
    await world.create()
    sequences = await world.write(2)
    world.configure(discarding(world.stream.arn, TumblingWindowInSeconds=60))
    window = {"start": "2019-11-14T00:38:00Z", "end": "2019-11-14T00:39:00Z"}
    more = {"window": window, "isFinalInvokeForWindow": False, "isWindowTerminatedEarly": False}
    world.put(world.letter(sequences, timeWindowInfo=more))
    for given in [], ["--dry-run"], ["--partial"]:
        done = await redrive(world.path, world.place, *given)
        assert done.code == 2
        assert "its window's state is not known; it is only in a payload or the daemon's store" in done.err
        assert done.out[1] == f"1 left in {world.place}: 1 of a tumbling window whose state is not known"
    assert desk.headers == []
    assert len(world.left()) == 1


@pytest.mark.parametrize("place", ["store", "queue", "directory"])
async def test_batches_of_a_mapping_that_was_pointed_elsewhere(world: World, desk: Desk, daemons, place: str) -> None:
    """They are still its own, with exactly their records; `--to` changes nothing of that."""
    world.use_queue()
    await world.create()
    names = world.names(await world.write(40))
    uid = "11111111-1111-4111-8111-111111111111"
    destination = {"store": None, "directory": f"file://{world.directory}", "queue": world.queue}[place]
    mapping = discarding(world.stream.arn, destination, BatchSize=4, ParallelizationFactor=3, UUID=uid)
    functions = {"f": {"url": desk.url}, "g": {"url": desk.url.removesuffix("/f") + "/g"}}
    daemon = daemons({**world.document(mapping), "functions": functions})
    await discarded(daemon, desk, 40)
    assert await daemon.stop() == 0
    document = yaml.safe_load(daemon.path.read_text())
    document["event_source_mappings"][0]["FunctionName"] = "g"
    daemon.path.write_text(yaml.safe_dump(document))
    batches = len(desk.headers)
    given = {"store": "store", "directory": str(world.directory), "queue": world.queue}[place]
    done = await redrive(daemon.path, given, "--mapping", uid[:8], "--limit", "2")
    assert (done.code, done.out[0].split(",")[0]) == (0, "2 batches delivered"), done.err
    assert set(desk.paths) == {"/f"}
    done = await redrive(daemon.path, given, "--to", "g")
    assert (done.code, done.out[0].split(",")[0]) == (0, f"{batches - 2} batches delivered"), done.err
    assert desk.names == Counter(names)
    assert set(desk.paths[-(batches - 2) :]) == {"/g"}
    assert set(desk.keys.values()) == {2}


async def test_what_the_daemon_still_reports_is_not_redriven(world: World, desk: Desk, daemons) -> None:
    """Beside a daemon that waits for its destination, and after it was stopped: it gives the batch up again itself."""
    await world.create()
    names = world.names(await world.write(4))
    is_down = is_failing = True

    async def both(event: dict[str, Any]) -> web.Response | None:
        if "requestContext" in event:
            return web.Response(status=500 if is_down else 200)
        return web.Response(status=500) if is_failing else None

    desk.hook = both
    url = desk.url.removesuffix("/f") + "/failed"
    daemon = daemons(world.document(discarding(world.stream.arn, url, BatchSize=4)))
    await daemon.start()
    await until(lambda: daemon.events("destination_waits"), SECONDS, "a refused report")
    is_failing = False
    listed = await redrive(daemon.path, "--list")
    assert listed.out[0].endswith("(record ids, not yet given up by the daemon)")
    done = await redrive(daemon.path)
    assert (done.code, done.out[1]) == (2, "1 left in the store: 1 not yet given up by the daemon")
    assert desk.delivered == []
    is_down = False
    await until(lambda: daemon.events("records_discarded"), SECONDS, "the report")
    assert await daemon.stop() == 0
    done = await redrive(daemon.path)
    assert (done.code, done.out) == (0, ["1 batch delivered, 4 records"]), done.err
    assert desk.delivered == [names]


@pytest.mark.parametrize("place", ["store", "directory"])
async def test_a_second_run_at_the_same_place_is_refused(world: World, desk: Desk, daemons, place: str) -> None:
    """It would deliver the same batches; looking is allowed, and nothing is left of the lock."""
    await world.create()
    await world.write(3)
    destination = f"file://{world.directory}" if place == "directory" else None
    daemon = daemons(world.document(discarding(world.stream.arn, destination, BatchSize=1)))
    await discarded(daemon, desk, 3)
    assert await daemon.stop() == 0
    given = str(world.directory) if place == "directory" else "store"
    arrived, may_answer = asyncio.Event(), asyncio.Event()

    async def stuck(_: dict[str, Any]) -> None:
        arrived.set()
        await may_answer.wait()

    desk.hook = stuck
    first = await started(daemon.path, given)
    await reached(first, arrived)
    second = await redrive(daemon.path, given)
    assert (second.code, second.out) == (2, [])
    assert f"process {first.pid} redrives it already; wait until that has ended" in second.err
    assert len((await redrive(daemon.path, given, "--list")).out) == 3
    may_answer.set()
    done = await ended(first)
    assert (done.code, done.out) == (0, ["3 batches delivered, 3 records"]), done.err
    assert set(desk.names.values()) == {1}
    assert world.left() == {}


async def test_a_failing_batch_stays_and_the_others_go_on(world: World, desk: Desk) -> None:
    """Exit 2, with the function's answer; the next run takes it."""
    world.use_queue()
    await world.create()
    sequences = await world.write(30)
    world.configure(discarding(world.stream.arn))
    world.put(*(world.letter(sequences[first : first + 10]) for first in (0, 10, 20)))

    async def picky(event: dict[str, Any]) -> web.Response | None:
        is_bad = Ledger.name(event["Records"][0]) == world.names(sequences)[10]
        return web.Response(status=500) if is_bad else None

    desk.hook = picky
    done = await redrive(world.path, world.place)
    assert (done.code, done.out) == (
        2,
        ["2 batches delivered, 20 records", f"1 left in {world.place}: 1 failed"],
    )
    assert len(desk.headers) == 3
    assert len(_left(done)) == 1
    assert "500" in _left(done)[0]
    assert (len(world.left()), world.visible()) == (1, 1)
    desk.hook = None
    done = await redrive(world.path, world.place)
    assert done.code == 0, done.err
    assert desk.names == Counter(world.names(sequences))


@pytest.mark.parametrize("is_known", [True, False], ids=["mapping", "no mapping"])
async def test_an_answer_that_names_failures_keeps_the_batch(world: World, desk: Desk, is_known: bool) -> None:
    """Whole, because its failure record can say no less; also when nobody knows whether the mapping reports."""
    await world.create()
    sequences = await world.write(10)
    mapping = discarding(world.stream.arn, FunctionResponseTypes=["ReportBatchItemFailures"])
    world.configure(*([mapping] if is_known else []))
    world.put(world.letter(sequences))

    async def reporting(event: dict[str, Any]) -> web.Response:
        failed = event["Records"][3]["kinesis"]["sequenceNumber"]
        return web.json_response({"batchItemFailures": [{"itemIdentifier": failed}]})

    desk.hook = reporting
    done = await redrive(world.path, world.place, *([] if is_known else ["--to", "f"]))
    assert done.code == 2
    assert f"the function reported {sequences[3]} as failed; the whole batch stays" in done.err
    assert len(world.left()) == 1
    desk.hook = None
    assert (await redrive(world.path, world.place, *([] if is_known else ["--to", "f"]))).code == 0
    assert not world.left()


async def test_a_throttled_target_is_waited_for(world: World, desk: Desk) -> None:
    """429 is no answer: tried again with the same key and a higher attempt number."""
    await world.create()
    sequences = await world.write(4)
    world.configure(discarding(world.stream.arn))
    world.put(world.letter(sequences))
    throttles = iter([429, 503, 429])

    async def throttling(_: dict[str, Any]) -> web.Response | None:
        status = next(throttles, None)
        return web.Response(status=status) if status else None

    desk.hook = throttling
    done = await redrive(world.path, world.place)
    assert (done.code, done.out) == (0, ["1 batch delivered, 4 records"]), done.err
    assert [headers["X-Poller-Attempt"] for headers in desk.headers] == ["1", "2", "3", "4"]
    assert len(desk.keys) == 1
    assert len({headers["X-Poller-Request-Id"] for headers in desk.headers}) == 4


async def test_a_target_that_is_not_there_keeps_everything(world: World, desk: Desk) -> None:
    """After some tries the batch stays, with the reason."""
    await world.create()
    sequences = await world.write(4)
    world.configure(discarding(world.stream.arn), functions={"f": {"url": "http://127.0.0.1:9/f"}})
    world.put(world.letter(sequences))
    done = await redrive(world.path, world.place)
    assert done.code == 2
    assert "8 times" in done.err
    assert len(world.left()) == 1


async def test_a_rate_is_kept(world: World, desk: Desk) -> None:
    """10 a second: in no second more, throttled tries included."""
    await world.create()
    sequences = await world.write(25)
    world.configure(discarding(world.stream.arn))
    world.put(*(world.letter([one]) for one in sequences))
    done = await redrive(world.path, world.place, "--rate", "10")
    assert done.code == 0, done.err
    assert desk.names == Counter(world.names(sequences))
    assert all(later - earlier > 0.9 for earlier, later in zip(desk.times, desk.times[10:], strict=False))


async def test_a_dry_run_changes_nothing(world: World, desk: Desk) -> None:
    """Everything is read, nothing invoked or removed, and the messages are there for others at once."""
    world.use_queue()
    await world.create()
    sequences = await world.write(30)
    world.configure(discarding(world.stream.arn))
    letters = [world.letter(sequences[first : first + 10]) for first in (0, 10, 20)]
    world.put(*letters)
    world.aws.trim(world.stream.arn, ONE_SHARD, 10)
    done = await redrive(world.path, world.place, "--dry-run")
    assert done.code == 2
    ids = list(world.left())
    assert done.out[:2] == [
        f"would deliver request {letter['requestContext']['requestId']}: 10 records of stream/orders {ONE_SHARD} to f "
        f"({name})"
        for letter, name in zip(letters[1:], ids[1:], strict=True)
    ]
    assert done.out[2:] == [
        "2 batches would be delivered, 20 records",
        f"1 left in {world.place}: 1 trimmed from the stream",
    ]
    assert desk.headers == []
    assert (len(world.left()), world.visible()) == (3, 3)
    await redrive(world.path, world.place, "--dry-run", "--limit", "1")
    assert world.visible() == 3


async def test_batches_are_listed(world: World, desk: Desk) -> None:
    """A line each for people, an object each for programs; nothing is invoked, and all is visible at once."""
    world.use_queue()
    await world.create()
    sequences = await world.write(3)
    world.configure(discarding(world.stream.arn))
    letters = [world.letter(sequences), world.letter(sequences[:1])]
    world.put(*letters)
    listed = await redrive(world.path, world.place, "--list")
    assert listed.code == 0
    assert listed.out == [
        f"2019-11-14T00:38:06Z  RetryAttemptsExhausted  1 attempt  {count}  f  stream/orders {ONE_SHARD}  "
        f"{sequences[0]}..{last}  request {letter['requestContext']['requestId']}  (range)"
        for letter, count, last in zip(
            letters, ("3 records", "1 record"), (sequences[2], sequences[0]), strict=True
        )
    ]  # fmt: skip
    assert world.visible() == 2
    listed = await redrive(world.path, world.place, "--list", "--json")
    documents = [json.loads(line) for line in listed.out]
    mapping = documents[0].pop("mapping")
    assert uuid.UUID(mapping)
    assert documents[0] == {
        "name": next(iter(world.left())),
        "request_id": letters[0]["requestContext"]["requestId"],
        "function_arn": world.function,
        "condition": "RetryAttemptsExhausted",
        "attempts": 1,
        "discarded_at": "2019-11-14T00:38:06Z",
        "stream_arn": world.stream.arn,
        "shard": ONE_SHARD,
        "first_sequence": sequences[0],
        "last_sequence": sequences[2],
        "records": 3,
        "holds": "range",
        "pending": False,
    }
    assert desk.headers == []
    assert world.visible() == 2
    assert (await redrive(world.path, world.place, "--json")).code == 2


async def test_an_empty_list_is_valid_json_lines(world: World) -> None:
    """For programs no line at all; for people a sentence."""
    world.configure()
    assert (await redrive(world.path, world.place, "--list", "--json")).out == []
    assert (await redrive(world.path, world.place, "--list")).out == [f"no discarded batches in {world.place}"]


async def test_some_are_chosen(world: World, desk: Desk) -> None:
    """By request id, by mapping, and how many at most; the others stay for others at once."""
    world.use_queue()
    await world.create()
    sequences = await world.write(5)
    other = discarding(f"arn:aws:kinesis:{REGION}:{world.account}:stream/other", FunctionName="g")
    functions = {"f": {"url": desk.url}, "g": {"url": desk.url}}
    world.configure(discarding(world.stream.arn), other, functions=functions)
    letters = [world.letter([sequence]) for sequence in sequences]
    world.put("junk", *letters)
    wanted = [letters[n]["requestContext"]["requestId"] for n in (1, 3)]
    done = await redrive(world.path, world.place, "--request-id", wanted[0], "--request-id", wanted[1])
    assert (done.code, done.out) == (0, ["2 batches delivered, 2 records"]), done.err
    assert desk.names == Counter(world.names([sequences[1], sequences[3]]))
    assert (len(world.left()), world.visible()) == (4, 4)
    done = await redrive(world.path, world.place, "--mapping", "g")
    assert (done.code, done.out) == (0, ["0 batches delivered, 0 records"]), done.err
    done = await redrive(world.path, world.place, "--mapping", "f", "--limit", "1")
    assert (done.code, done.out) == (0, ["1 batch delivered, 1 record"]), done.err
    assert (len(world.left()), world.visible()) == (3, 3)
    done = await redrive(world.path, world.place, "--mapping", "f")
    assert (done.code, done.out) == (0, ["2 batches delivered, 2 records"]), done.err
    assert list(world.left().values()) == ["junk"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--mapping", "nobody"], "there is no mapping nobody"),
        (["arn:aws:sqs:eu-west-1:111122223333:absent"], "arn:aws:sqs:eu-west-1:111122223333:absent"),
        (["/does/not/exist"], "/does/not/exist"),
        (["arn:aws:sns:eu-west-1:111122223333:topic"], "subscribe"),
        (["store"], "none/poller.db"),
    ],
)
async def test_a_mistake_is_a_sentence(world: World, arguments: list[str], text: str) -> None:
    """Exit 2, nothing on standard output."""
    await world.create()
    world.configure(discarding(world.stream.arn))
    place = [world.place] if arguments[0].startswith("--") else []
    done = await redrive(world.path, *place, *arguments)
    assert (done.code, done.out) == (2, [])
    assert text in done.err


async def test_a_bucket_that_is_not_there_is_a_sentence(world: World, ministack: str) -> None:
    """It is first asked while batches are already looked for."""
    aws = {"region": REGION, "endpoint_url": world.aws.url, "endpoint_urls": {"s3": ministack}}
    world.configure(aws=aws)
    done = await redrive(world.path, "s3://absent-bucket-of-nobody")
    assert done.code == 2
    assert "absent-bucket-of-nobody" in done.err


@pytest.mark.parametrize("concurrency", ["1", "4"])
async def test_an_interrupt_ends_the_run_in_order(world: World, desk: Desk, concurrency: str) -> None:
    """What is being delivered ends and is removed; the rest is there for others at once, and the run says so."""
    world.use_queue()
    await world.create(shards=2)
    sequences = await world.write(40)
    world.configure(discarding(world.stream.arn))
    world.put(*(world.letter([one]) for one in sequences))
    arrived, may_answer = asyncio.Event(), asyncio.Event()

    async def slow(_: dict[str, Any]) -> None:
        if len(desk.delivered) >= 3:
            arrived.set()
            await may_answer.wait()

    desk.hook = slow
    process = await started(world.path, world.place, "--concurrency", concurrency)
    await reached(process, arrived)
    process.send_signal(signal.SIGINT)
    loop = asyncio.get_running_loop()
    loop.call_later(0.1, may_answer.set)
    done = await ended(process)
    assert done.code == 2
    assert done.out[0] == "4 batches delivered, 4 records"
    assert done.out[1] == "stopped: the rest was not tried"
    assert desk.names == Counter(world.names(sequences[:4]))
    assert (len(world.left()), world.visible()) == (36, 36)


async def test_a_second_interrupt_ends_the_run_at_once(world: World, desk: Desk) -> None:
    """What was under way is not waited for and not removed."""
    world.use_queue()
    await world.create()
    world.configure(discarding(world.stream.arn))
    world.put(*(world.letter([one]) for one in await world.write(30)))
    arrived, may_answer = asyncio.Event(), asyncio.Event()

    async def stuck(_: dict[str, Any]) -> None:
        arrived.set()
        await may_answer.wait()

    desk.hook = stuck
    process = await started(world.path, world.place)
    await reached(process, arrived)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # another one, so that the two cannot become one on their way
    done = await ended(process)
    may_answer.set()
    assert done.code == 2
    assert "ended at once" in done.err
    assert (len(world.left()), world.visible()) == (30, 30)


@pytest.mark.soak
async def test_a_slow_function_does_not_lose_hold_of_what_waits(world: World, desk: Desk) -> None:
    """Messages that were received ahead are kept from others until their turn, however long that takes."""
    world.use_queue()
    await world.create()
    sequences = await world.write(30)
    world.configure(discarding(world.stream.arn), functions={"f": {"url": desk.url, "timeout_seconds": 900}})
    world.put(*(world.letter([one]) for one in sequences))

    async def slow(_: dict[str, Any]) -> None:
        if not desk.delivered:
            await asyncio.sleep(130)  # more than the visibility that messages are received with

    desk.hook = slow
    process = await started(world.path, world.place)
    async with asyncio.timeout(200):
        await process.wait()
    done = await ended(process)
    assert (done.code, done.out) == (0, ["30 batches delivered, 30 records"]), done.err
    assert desk.names == Counter(world.names(sequences))
    assert not world.left()
