"""The HTTP server over real sockets on loopback, with a fake Control; the mapping API through boto3 itself."""

import asyncio
import base64
import contextlib
import io
import json
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator

import aiohttp
import boto3
import botocore.exceptions
import pytest
import structlog
from botocore.config import Config

from poller.core.model import MappingStatus, ShardState, ShardStatus, SourceKind
from poller.errors import ApiError, PollerError, StoreUnavailable
from poller.server import Server, api, app
from poller.settings import BearerAuth, ServerSettings
from poller.telemetry import Metrics

NOW = 1_000_000.0
TOKEN = "correct horse"
UNKNOWN = "The resource you requested does not exist."
# Resolves to 127.0.0.1 but is no address in its usual form, so the server cannot know that it is loopback.
BEYOND_LOOPBACK = "127.1"
MAPPINGS = "/2015-03-31/event-source-mappings"
QUEUE = "arn:aws:sqs:eu-west-1:123456789012:q"


class FixedClock:
    def now(self):
        return NOW

    def loop(self, at):
        return at


def configuration(number=0, function="orders", source=QUEUE):
    mapping_id = str(uuid.UUID(int=number, version=4))
    return {
        "UUID": mapping_id,
        "BatchSize": 10,
        "EventSourceArn": source,
        "EventSourceMappingArn": f"arn:aws:lambda:eu-west-1:123456789012:event-source-mapping:{mapping_id}",
        "FunctionArn": f"arn:aws:lambda:eu-west-1:123456789012:function:{function}",
        "FunctionResponseTypes": [],
        "LastModified": 1764085200.123,
        "MaximumBatchingWindowInSeconds": 0,
        "State": "Enabled",
        "StateTransitionReason": "USER_INITIATED",
    }


class FakeControl:
    def __init__(self):
        self.mappings = {}
        self.statuses = []
        self.reason = None
        self.missing = []
        self.calls = []
        self.error = None
        self.context = {}

    def add(self, *configurations):
        self.mappings.update({item["UUID"]: item for item in configurations})

    def status(self):
        return self.statuses

    def health(self):
        return self.reason

    def unready(self):
        return self.missing

    def store_problem(self):
        return ""

    def list(self):
        return list(self.mappings.values())

    def get(self, uuid):
        if uuid not in self.mappings:
            raise ApiError("ResourceNotFoundException", 404, UNKNOWN)
        return self.mappings[uuid]

    async def create(self, document):
        self.calls.append(dict(document))
        self.context = structlog.contextvars.get_contextvars()
        if self.error:
            raise self.error
        made = configuration(len(self.mappings)) | {"State": "Creating"}
        self.add(made)
        return made

    async def update(self, uuid, changes):
        self.calls.append(dict(changes))
        return self.get(uuid) | {"State": "Updating"} | changes

    async def delete(self, uuid):
        self.get(uuid)
        return self.mappings.pop(uuid) | {"State": "Deleting"}

    def tags(self, arn):
        self.calls.append(arn)
        return {"team": "a"}

    async def tag(self, arn, tags):
        self.calls.append((arn, tags))

    async def untag(self, arn, keys):
        self.calls.append((arn, keys))


class Harness:
    """A running server, its fake, and a client that keeps to raw HTTP."""

    def __init__(self, server, control, metrics, port, session):
        self.server = server
        self.control = control
        self.metrics = metrics
        self.port = port
        self.session = session

    async def ask(self, method, path, **kwargs):
        """Status, headers and text of one answer."""
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self.session.request(method, url, skip_auto_headers=["Content-Type"], **kwargs) as answer:
            return answer.status, answer.headers, await answer.text()

    async def raw(self, method, target, headers, body=b""):
        """The answer to bytes written as they are: no client in between that would encode a path anew."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = [b"%s %s HTTP/1.1" % (method.encode(), target if isinstance(target, bytes) else target.encode())]
        fields = [*headers.items(), ("Connection", "close")]
        if "Content-Length" not in headers:
            fields.append(("Content-Length", str(len(body))))
        for name, value in fields:
            lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()))
        try:
            writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
            async with asyncio.timeout(10):
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (line for line in head.lower().splitlines() if line.startswith(b"content-length:")), b":0"
                )
                return head + await reader.readexactly(int(length.partition(b":")[2]))
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def count(self, line):
        text, _ = await self.metrics.exposition()
        return float(next(row for row in text.decode().splitlines() if row.startswith(line)).rpartition(" ")[2])


@contextlib.asynccontextmanager
async def serving(clock=None, wall=time.time, **settings) -> AsyncIterator[Harness]:
    control = FakeControl()
    metrics = Metrics(FixedClock(), control.status)
    clock = clock or FixedClock()
    server = Server(ServerSettings(port=0, **settings), control, metrics, clock, random.Random(1), wall=wall)
    port = await server.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Harness(server, control, metrics, port, session)
    finally:
        await server.stop()


@pytest.fixture
async def local():
    async with serving() as harness:
        yield harness


@pytest.fixture
async def locked():
    async with serving(auth=(BearerAuth("first"), BearerAuth(TOKEN))) as harness:
        yield harness


async def lambda_call(harness, run, token=None, keys=("test", "test"), session=None):
    """What `run(client)` answers, with a boto3 Lambda client in a thread."""

    def call():
        client = boto3.client(
            "lambda",
            endpoint_url=f"http://127.0.0.1:{harness.port}",
            region_name="eu-west-1",
            aws_access_key_id=keys[0],
            aws_secret_access_key=keys[1],
            aws_session_token=session,
            config=Config(retries={"total_max_attempts": 1}),
        )
        if token:
            client.meta.events.register(
                "before-send.lambda",
                lambda request, **_: request.headers.update(Authorization=f"Bearer {token}"),
            )
        try:
            return run(client)
        finally:
            client.close()

    return await asyncio.to_thread(call)


def client_error(run):
    """A run that answers the ClientError of another."""

    def call(client):
        with pytest.raises(botocore.exceptions.ClientError) as caught:
            run(client)
        return caught.value.response

    return call


# --- the mapping API ---


async def test_boto3_does_the_five_operations(local):
    """Create, get, list, update and delete work with nothing changed but the endpoint."""
    made = await lambda_call(
        local, lambda c: c.create_event_source_mapping(EventSourceArn=QUEUE, FunctionName="orders", BatchSize=5)
    )
    assert local.control.calls == [{"EventSourceArn": QUEUE, "FunctionName": "orders", "BatchSize": 5}]
    assert made["ResponseMetadata"]["HTTPStatusCode"] == 202
    assert uuid.UUID(made["ResponseMetadata"]["RequestId"]).version == 4
    assert (made["State"], made["LastModified"].timestamp()) == ("Creating", 1764085200.123)
    got = await lambda_call(local, lambda c: c.get_event_source_mapping(UUID=made["UUID"]))
    assert (got["ResponseMetadata"]["HTTPStatusCode"], got["EventSourceArn"]) == (200, QUEUE)
    changed = await lambda_call(local, lambda c: c.update_event_source_mapping(UUID=made["UUID"], BatchSize=7))
    assert (changed["ResponseMetadata"]["HTTPStatusCode"], changed["BatchSize"]) == (202, 7)
    listed = await lambda_call(local, lambda c: c.list_event_source_mappings())
    assert [item["UUID"] for item in listed["EventSourceMappings"]] == [made["UUID"]]
    assert "NextMarker" not in listed
    gone = await lambda_call(local, lambda c: c.delete_event_source_mapping(UUID=made["UUID"]))
    assert (gone["ResponseMetadata"]["HTTPStatusCode"], gone["State"]) == (202, "Deleting")
    assert local.control.mappings == {}


@pytest.mark.parametrize(
    ("error", "member"),
    [
        (ApiError("InvalidParameterValueException", 400, "Unrecognized event source."), "message"),
        (ApiError("ResourceConflictException", 409, "already exists"), "message"),
        (ApiError("ResourceNotFoundException", 404, UNKNOWN), "Message"),
        (ApiError("ResourceInUseException", 400, "in use"), "Message"),
        (ApiError("ServiceException", 500, "sorry"), "Message"),
        (ApiError("ValidationException", 400, "1 validation error detected: ..."), "message"),
    ],
)
async def test_errors_have_awss_shape(local, error, member):
    """boto3 reads code, message and status; the body's member is spelled as the service spells it for that code."""
    local.control.error = error
    response = await lambda_call(
        local, client_error(lambda c: c.create_event_source_mapping(EventSourceArn=QUEUE, FunctionName="f"))
    )
    assert response["Error"]["Code"] == error.code
    assert response["Error"]["Message"] == error.message
    assert response["ResponseMetadata"]["HTTPStatusCode"] == error.status
    status, headers, text = await local.ask("POST", MAPPINGS, data=b"{}")
    expected = {member: error.message, "Type": "User" if status < 500 else "Service"}
    if error.code == "ValidationException":
        del expected["Type"]
    assert json.loads(text) == expected
    assert headers["x-amzn-ErrorType"] == error.code
    assert "x-amzn-RequestId" in headers


async def test_an_unknown_uuid_is_not_found(local):
    """Get, update and delete of a mapping that is not there are ResourceNotFoundException."""
    unknown = configuration(99)["UUID"]
    for run in (
        lambda c: c.get_event_source_mapping(UUID=unknown),
        lambda c: c.update_event_source_mapping(UUID=unknown, BatchSize=1),
        lambda c: c.delete_event_source_mapping(UUID=unknown),
    ):
        response = await lambda_call(local, client_error(run))
        assert (response["Error"]["Code"], response["Error"]["Message"]) == ("ResourceNotFoundException", UNKNOWN)


async def test_the_paginator_sees_every_mapping_once(local):
    """250 mappings come in pages of at most 100, whatever MaxItems says."""
    local.control.add(*(configuration(number) for number in range(250)))
    pages = await lambda_call(
        local,
        lambda c: list(c.get_paginator("list_event_source_mappings").paginate(PaginationConfig={"PageSize": 1000})),
    )
    assert [len(page["EventSourceMappings"]) for page in pages] == [100, 100, 50]
    seen = [item["UUID"] for page in pages for item in page["EventSourceMappings"]]
    assert sorted(seen) == sorted(local.control.mappings)


async def test_pages_stay_right_while_mappings_come_and_go(local):
    """A mapping that is there all the time is listed once even if the one that ended a page is deleted."""
    local.control.add(*(configuration(number) for number in range(5)))
    _, _, text = await local.ask("GET", MAPPINGS, params={"MaxItems": "2"})
    first = json.loads(text)
    local.control.mappings.pop(first["EventSourceMappings"][1]["UUID"])
    _, _, text = await local.ask("GET", MAPPINGS, params={"MaxItems": "9", "Marker": first["NextMarker"]})
    rest = json.loads(text)
    assert [item["UUID"] for item in rest["EventSourceMappings"]] == sorted(local.control.mappings)[1:]
    assert "NextMarker" not in rest


async def test_list_filters_by_source_and_function(local):
    """Both filters must hold; a function is meant by name, partial ARN or ARN, and its qualifier is part of it."""
    local.control.add(
        configuration(0),
        configuration(1, function="orders:live"),
        configuration(2, source=QUEUE + "2"),
        configuration(3),
    )
    first, live, other, third = local.control.mappings
    arn = "arn:aws:lambda:eu-west-1:123456789012:function:orders"
    for query, expected in [
        ({"EventSourceArn": QUEUE + "2"}, {other}),
        ({"EventSourceArn": "arn:aws:sqs:eu-west-1:123456789012:none"}, set()),
        ({"FunctionName": "orders"}, {first, other, third}),
        ({"FunctionName": "123456789012:function:orders"}, {first, other, third}),
        ({"FunctionName": arn}, {first, other, third}),
        ({"FunctionName": "orders:live"}, {live}),
        ({"FunctionName": arn + ":live"}, {live}),
        ({"FunctionName": "order"}, set()),
        ({"FunctionName": "orders", "EventSourceArn": QUEUE}, {first, third}),
    ]:
        listed = await lambda_call(local, lambda c, query=query: c.list_event_source_mappings(**query))
        assert {item["UUID"] for item in listed["EventSourceMappings"]} == expected, query


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        (
            {"MaxItems": "0"},
            "ValidationException",
            (
                "1 validation error detected: Value '0' at 'maxItems' failed to satisfy constraint: "
                "Member must have value greater than or equal to 1"
            ),
        ),
        (
            {"MaxItems": "10001"},
            "ValidationException",
            (
                "1 validation error detected: Value '10001' at 'maxItems' failed to satisfy constraint: "
                "Member must have value less than or equal to 10000"
            ),
        ),
        ({"MaxItems": "many"}, "SerializationException", "MaxItems can not be converted to an Integer"),
        ({"MaxItems": "9" * 5000}, "SerializationException", "MaxItems can not be converted to an Integer"),
        ({"Marker": "x"}, "InvalidParameterValueException", "Marker is not one that this API returned."),
    ],
)
async def test_bad_list_parameters_are_refused(local, query, code, message):
    """Page sizes out of range and markers that we never gave are the caller's error."""
    status, headers, text = await local.ask("GET", MAPPINGS, params=query)
    assert (status, headers["x-amzn-ErrorType"], json.loads(text)["message"]) == (400, code, message)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"not json",
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800x"}',
        b"[]",
        b'"text"',
        b"null",
        b"[" * 200_000,
    ],
    ids=lambda body: repr(body[:16]),
)
async def test_a_body_that_is_no_json_object_is_refused(local, body):
    """Malformed JSON is SerializationException and never reaches Control."""
    status, headers, text = await local.ask("POST", MAPPINGS, data=body)
    assert (status, headers["x-amzn-ErrorType"]) == (400, "SerializationException")
    assert json.loads(text)["Type"] == "User"
    assert local.control.calls == []


@pytest.mark.parametrize("declared", [True, False])
async def test_bodies_are_bounded(local, declared):
    """More than 1 MiB is 413, whether its length is declared or not."""
    body = b'{"a": "' + b"x" * api.MAX_BODY_BYTES + b'"}'

    async def pieces():
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    status, headers, _ = await local.ask("POST", MAPPINGS, data=io.BytesIO(body) if declared else pieces())
    assert (status, headers["x-amzn-ErrorType"]) == (413, "RequestTooLargeException")
    assert local.control.calls == []


async def test_a_body_without_a_length_is_read(local):
    """Chunked bodies work, and so does none at all."""

    async def pieces():
        yield b'{"Batch'
        yield b'Size": 3}'

    assert (await local.ask("POST", MAPPINGS, data=pieces()))[0] == 202
    assert (await local.ask("POST", MAPPINGS))[0] == 202
    assert local.control.calls == [{"BatchSize": 3}, {}]


async def test_a_body_that_is_not_what_its_headers_say_is_refused(local):
    """A broken gzip stream is the caller's error."""
    status, headers, _ = await local.ask("POST", MAPPINGS, data=b"no gzip", headers={"Content-Encoding": "gzip"})
    assert (status, headers.get("x-amzn-ErrorType")) == (400, "SerializationException")


@pytest.mark.parametrize("slash", ["", "/"])
async def test_paths_work_with_and_without_a_trailing_slash(local, slash):
    """Older SDKs send the slash."""
    status, _, text = await local.ask("POST", MAPPINGS + slash, data=b"{}")
    path = f"{MAPPINGS}/{json.loads(text)['UUID']}{slash}"
    assert status == 202
    assert (await local.ask("GET", path))[0] == 200
    assert (await local.ask("PUT", path, data=b"{}"))[0] == 202
    assert (await local.ask("DELETE", path))[0] == 202
    assert (await local.ask("GET", MAPPINGS + slash))[0] == 200


async def test_tags_go_through_boto3_and_curl(local):
    """The ARN stands in the path, percent-encoded or not, with or without a slash at its end."""
    arn = configuration(7)["EventSourceMappingArn"]
    assert (await lambda_call(local, lambda c: c.list_tags(Resource=arn)))["Tags"] == {"team": "a"}
    answers = [
        await lambda_call(local, lambda c: c.tag_resource(Resource=arn, Tags={"k\u00e9y": "v w"})),
        await lambda_call(local, lambda c: c.untag_resource(Resource=arn, TagKeys=["a b", "c"])),
    ]
    assert [answer["ResponseMetadata"]["HTTPStatusCode"] for answer in answers] == [204, 204]
    assert local.control.calls == [arn, (arn, {"k\u00e9y": "v w"}), (arn, ["a b", "c"])]
    for path in (arn, arn.replace(":", "%3A"), arn + "/"):
        assert (await local.ask("GET", f"/2017-03-31/tags/{path}"))[2] == '{"Tags": {"team": "a"}}'
    assert local.control.calls[3:] == [arn] * 3
    status, _, text = await local.ask("POST", f"/2017-03-31/tags/{arn}", data=b"{}")
    assert (status, text, local.control.calls[-1]) == (204, "", (arn, None))


async def test_unknown_paths_and_methods_have_awss_shape(local):
    """404 and 405 are JSON with an error type, and 405 says what is allowed."""
    status, headers, text = await local.ask("GET", "/2015-03-31/functions")
    assert (status, headers["x-amzn-ErrorType"]) == (404, "UnknownOperationException")
    assert "message" in json.loads(text)
    status, headers, _ = await local.ask("PATCH", MAPPINGS)
    assert (status, headers["x-amzn-ErrorType"]) == (405, "MethodNotAllowedException")
    assert headers["Allow"] == "GET,HEAD,POST"


async def test_a_bug_shows_its_request_id_and_nothing_else(local):
    """An unexpected exception is a ServiceException without internals; all logs of the request have its id."""
    local.control.error = RuntimeError("the secret inside")
    with structlog.testing.capture_logs() as logs:
        status, headers, text = await local.ask("POST", MAPPINGS, data=b"{}")
    assert (status, headers["x-amzn-ErrorType"], json.loads(text)["Type"]) == (500, "ServiceException", "Service")
    assert "secret" not in text
    (entry,) = logs
    assert (entry["event"], entry["request_id"]) == ("request_failed", headers["x-amzn-RequestId"])
    assert entry["exc_info"]
    assert local.control.context == {"request_id": entry["request_id"]}


async def test_a_store_that_does_not_answer_is_no_bug(local):
    """StoreUnavailable is a ServiceException that boto3 retries, and no traceback in the log."""
    local.control.error = StoreUnavailable("disk at /secret/path")
    with structlog.testing.capture_logs() as logs:
        status, headers, text = await local.ask("POST", MAPPINGS, data=b"{}")
    assert (status, headers["x-amzn-ErrorType"]) == (500, "ServiceException")
    assert "secret" not in text
    assert logs == []


# --- health, metrics, status ---


async def test_health_follows_control(local):
    """200 while nothing has died, else 503 with the reason."""
    assert (await local.ask("GET", "/healthz"))[0] == 200
    local.control.reason = "the task of mapping m1 died"
    status, _, text = await local.ask("GET", "/healthz")
    assert (status, text) == (503, "the task of mapping m1 died\n")


async def test_readiness_names_what_is_missing(local):
    """200 once everything was reached, else 503 with a line for each that was not."""
    assert (await local.ask("GET", "/readyz"))[0] == 200
    local.control.missing = ["m1: no stream", "m2: no queue"]
    status, _, text = await local.ask("GET", "/readyz")
    assert (status, text) == (503, "m1: no stream\nm2: no queue\n")


async def test_metrics_in_both_formats_and_head(local):
    """The content type follows Accept; HEAD answers as GET does, without a body."""
    status, headers, text = await local.ask("GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "poller_build_info{" in text
    status, headers, text = await local.ask("GET", "/metrics", headers={"Accept": "application/openmetrics-text"})
    assert headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert text.endswith("# EOF\n")
    for path in ("/metrics", "/healthz", "/readyz", "/", "/api/status", MAPPINGS):
        status, _, text = await local.ask("HEAD", path)
        assert (status, text) == (200, "")


def status(**fields):
    return MappingStatus(**({"id": "m1", "function": "orders", "source": SourceKind.KINESIS} | fields))


async def test_api_status_is_the_contract(local):
    """Every key of the contract is there; ages are seconds, what is unknown is null."""
    local.control.statuses = [
        status(
            source_arn="arn:k",
            state="Enabled",
            reason="slow",
            in_flight=2,
            retention=100.0,
            last_result="OK",
            declared_in="/etc/poller.yaml",
            shards=(
                ShardStatus(
                    "s1",
                    ShardState.RUNNING,
                    lag=4.0,
                    batch_arrival=NOW - 30,
                    oldest_arrival=NOW - 40,
                    blocked_since=NOW - 20,
                    in_flight=1,
                    held=9,
                    attempts=3,
                    first_sequence="49",
                    last_sequence="50",
                    last_error="500",
                    next_attempt=NOW + 2,
                ),
                ShardStatus("s2", ShardState.OPEN),
            ),
        )
    ]
    code, headers, text = await local.ask("GET", "/api/status")
    assert (code, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    document = json.loads(text)
    assert document.keys() == {"version", "at", "store", "mappings"}
    assert document["at"] == NOW
    (mapping,) = document["mappings"]
    shards = mapping.pop("shards")
    assert mapping == {
        "uuid": "m1",
        "function": "orders",
        "source": "kinesis",
        "source_arn": "arn:k",
        "state": "Enabled",
        "declared_in": "/etc/poller.yaml",
        "reason": "slow",
        "last_result": "OK",
        "in_flight": 2,
        "breaker": "closed",
        "receivers": None,
        "receiver_limit": None,
        "seek_pending": False,
        "retention_seconds": 100.0,
        "lag_seconds": 30.0,
        "headroom_seconds": 60.0,
        "blocked_shards": 1,
        "records_per_second": None,
        "failed_per_second": None,
        "records_dropped": None,
        "records_lost": None,
    }
    assert shards[0] == {
        "id": "s1",
        "state": "running",
        "lag_seconds": 4.0,
        "iterator_age_seconds": 30.0,
        "headroom_seconds": 60.0,
        "blocked_seconds": 20.0,
        "in_flight": 1,
        "held": 9,
        "attempts": 3,
        "first_sequence": "49",
        "last_sequence": "50",
        "last_error": "500",
        "next_attempt": NOW + 2,
        "lease": None,
        "owner": None,
    }
    assert {name for name, value in shards[1].items() if value is None} == {
        "lease",
        "owner",
        "lag_seconds",
        "iterator_age_seconds",
        "headroom_seconds",
        "first_sequence",
        "last_sequence",
        "last_error",
        "next_attempt",
    }


async def test_api_status_has_rates_and_history(local):
    """Once it was sampled: rates and totals; the last hour where it is asked for; no NaN, which is not JSON."""
    local.control.statuses = [status(source_arn="arn:k", state="Enabled")]
    local.server.history.sample()
    _, _, text = await local.ask("GET", "/api/status")
    (mapping,) = json.loads(text)["mappings"]
    assert "history" not in mapping
    assert (mapping["records_per_second"], mapping["records_lost"]) == (None, 0)
    _, _, text = await local.ask("GET", "/api/status?history=1")
    assert "NaN" not in text
    history = json.loads(text)["mappings"][0]["history"]
    assert (history["step_seconds"], abs(history["ends_at"] - NOW) <= 7.5) == (15, True)
    assert all(len(history[name]) == 240 for name in ("lag_seconds", "records_per_second", "failed_per_second"))


async def test_an_attempt_that_waits_for_nothing_is_due_now(local):
    """JSON has no infinity."""
    shard = ShardStatus("s", ShardState.RUNNING, blocked_since=NOW - 1, next_attempt=-float("inf"))
    local.control.statuses = [status(source_arn="arn:k", state="Enabled", shards=(shard,))]
    _, _, text = await local.ask("GET", "/api/status")
    assert json.loads(text)["mappings"][0]["shards"][0]["next_attempt"] == NOW


async def test_the_page_is_locked_down(local):
    """HTML that nothing may load into, run in or frame, and that is not kept."""
    local.control.statuses = [status(source_arn="arn:k", state="Enabled")]
    code, headers, text = await local.ask("GET", "/?refresh=0")
    assert (code, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "orders" in text
    assert 'http-equiv="refresh"' not in text
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert all(f"{name} 'none'" in policy for name in ("base-uri", "form-action", "frame-ancestors"))
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


# --- doors ---


@pytest.mark.parametrize("path", ["/", "/api/status", MAPPINGS, f"{MAPPINGS}/x", "/nothing", "/metrics/", "//metrics"])
async def test_beyond_loopback_without_auth_the_doors_are_closed(path):
    """Every path but the three open ones is 403 and names what would open it."""
    async with serving(host=BEYOND_LOOPBACK) as harness:
        for method in ("GET", "POST"):
            code, _, text = await harness.ask(method, path, headers={"Authorization": "Bearer x"})
            assert code == 403
            assert "server.auth" in text
        for open_path in ("/metrics", "/healthz", "/readyz"):
            assert (await harness.ask("GET", open_path))[0] == 200
        assert await harness.count("poller_auth_failures_total") == 0


async def test_beyond_loopback_a_token_opens():
    """With `server.auth` the token opens, under any host name."""
    async with serving(host=BEYOND_LOOPBACK, auth=(BearerAuth(TOKEN),)) as harness:
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": "poller.example.com"}
        assert (await harness.ask("GET", "/api/status", headers=headers))[0] == 200


def basic(password, user="any"):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN}", 200),
        ("Bearer first", 200),
        (basic(TOKEN), 200),
        (basic(TOKEN, user=""), 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        (f"Bearer {TOKEN}x", 401),
        ("Bearer sch\u00f6n", 401),
        (basic("wrong"), 401),
        (basic(""), 401),
        ("Basic !!!", 401),
        ("Basic \u00e9", 401),
        ("AWS4-HMAC-SHA256 Credential=x", 401),
    ],
)
async def test_only_a_token_opens(locked, authorization, code):
    """On loopback too: any of the tokens, as Bearer or as a Basic password; every refusal is counted."""
    headers = {} if authorization is None else {"Authorization": authorization}
    found, answer, _ = await locked.ask("GET", "/api/status", headers=headers)
    assert found == code
    assert await locked.count("poller_auth_failures_total") == (code != 200)
    if code == 401:
        assert answer["WWW-Authenticate"].startswith("Basic realm=")


async def test_an_empty_token_opens_nothing():
    """A token that was left empty in the settings is no open door."""
    async with serving(auth=(BearerAuth(""),)) as harness:
        for authorization in ("Bearer ", basic("")):
            assert (await harness.ask("GET", "/", headers={"Authorization": authorization}))[0] == 401


async def test_refused_credentials_look_like_awss_to_the_api(locked):
    """boto3 gets 403 with a code: without access keys its signature is no credential here, a token is."""
    response = await lambda_call(locked, client_error(lambda c: c.list_event_source_mappings()))
    assert (response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]) == (
        403,
        "UnrecognizedClientException",
    )
    assert "server.auth" in response["Error"]["Message"]
    code, headers, _ = await locked.ask("GET", MAPPINGS)
    assert (code, headers["x-amzn-ErrorType"]) == (403, "MissingAuthenticationTokenException")
    listed = await lambda_call(locked, lambda c: c.list_event_source_mappings(), token=TOKEN)
    assert listed["EventSourceMappings"] == []


async def test_no_token_reaches_the_log(locked):
    """Neither what was presented nor what would be right is logged."""
    with structlog.testing.capture_logs() as logs:
        await locked.ask("GET", "/", headers={"Authorization": "Bearer presented"})
    assert logs
    assert "presented" not in repr(logs)
    assert TOKEN not in repr(logs)


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:9477", 200),
        ("127.8.9.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("evil.example:9477", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("169.254.169.254", 403),
        ("", 403),
    ],
)
async def test_a_rebound_name_does_not_get_in(local, host, code):
    """On loopback the Host header must be loopback, so a page whose name resolves to us is refused."""
    assert (await local.ask("GET", "/api/status", headers={"Host": host}))[0] == code
    assert (await local.ask("GET", "/healthz", headers={"Host": host}))[0] in {200, 400}


async def test_pages_of_other_sites_do_not_get_in(local):
    """A foreign Origin is refused for every method; our own is not."""
    own = f"http://127.0.0.1:{local.port}"
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://[", ""):
        for method in ("GET", "POST"):
            code, _, text = await local.ask(method, MAPPINGS, headers={"Origin": origin}, data=b"{}")
            assert (code, "other sites" in text) == (403, True), origin
    assert local.control.calls == []
    assert (await local.ask("POST", MAPPINGS, headers={"Origin": own}, data=b"{}"))[0] == 202


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain;charset=UTF-8", "multipart/form-data; boundary=x"]
)
async def test_forms_do_not_change_anything(local, kind):
    """What a plain HTML form can send is no API request."""
    code, _, text = await local.ask("POST", MAPPINGS, headers={"Content-Type": kind}, data=b"{}")
    assert (code, "application/json" in text) == (415, True)
    assert local.control.calls == []


def test_what_is_loopback():
    """Only what surely never leaves the machine."""
    assert all(map(app._is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost"]))
    assert not any(map(app._is_loopback, ["", "0.0.0.0", "::", "10.0.0.1", "example.com", "127.1", "localhost.x"]))


# --- sockets ---


async def test_an_address_in_use_is_said_with_a_remedy(local):
    """The error names host, port and the keys to change; the failed server leaves nothing open."""
    other = Server(ServerSettings(port=local.port), local.control, local.metrics, FixedClock(), random.Random(1))
    with pytest.raises(
        PollerError, match=rf"cannot listen on 127\.0\.0\.1 port {local.port}: .*in use.*`server\.port`"
    ):
        await other.start()
    await other.stop()


async def test_a_host_that_is_not_ours_is_said_with_a_remedy():
    """An address of another machine is an error of the same kind."""
    control = FakeControl()
    settings = ServerSettings(host="192.0.2.1", port=0)
    server = Server(settings, control, Metrics(FixedClock(), control.status), FixedClock(), random.Random(1))
    with pytest.raises(PollerError, match=r"cannot listen on 192\.0\.2\.1 port 0: .*`server\.host`"):
        await server.start()


async def test_stop_closes_idle_connections_and_the_port(local):
    """After stop, which may be called twice, the port is free and keep-alive connections are closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", local.port)
    await local.server.stop()
    await local.server.stop()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", local.port)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
async def test_a_client_that_never_ends_its_head_is_cut_off(monkeypatch, sent):
    """A connection without a complete request head is closed after the idle timeout."""
    monkeypatch.setattr(app, "IDLE_TIMEOUT", 0.1)
    async with serving() as harness:
        reader, writer = await asyncio.open_connection("127.0.0.1", harness.port)
        writer.write(sent)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_a_body_that_never_ends_is_cut_off(local, monkeypatch):
    """408 after the body timeout, and the connection is closed."""
    monkeypatch.setattr(api, "BODY_TIMEOUT", 0.05)
    monkeypatch.setattr(app, "SHUTDOWN_TIMEOUT", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", local.port)
    writer.write(f"POST {MAPPINGS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{{".encode())
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close" in head
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_goes_away_is_not_a_bug(local):
    """A connection that breaks within the body leaves no error in the log."""
    with structlog.testing.capture_logs() as logs:
        _, writer = await asyncio.open_connection("127.0.0.1", local.port)
        writer.write(f"POST {MAPPINGS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{{".encode())
        await writer.drain()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        writer.transport.abort()
        assert (await local.ask("GET", "/healthz"))[0] == 200
        await local.server.stop()
    assert logs == []
    assert local.control.calls == []


HEAD = b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CREATE = b"POST " + MAPPINGS.encode() + HEAD
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def library_logs(caplog):
    """What aiohttp and asyncio say, from the level that a daemon shows on."""
    caplog.set_level("INFO")
    yield caplog.messages
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GARBAGE\r\n\r\n", "BadHttpMethod"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "BadHttpMethod"),
        (b"GET /healthz" + HEAD + b"\r\nGARBAGE s3cret\r\n\r\n", None),
        (b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", "LineTooLong"),
        (b"GET /healthz" + HEAD + b"X: " + b"x" * 10_000 + b"\r\n\r\n", "LineTooLong"),
        (b"GET /healthz" + HEAD + b"Author\xffization: Bearer s3cret\r\n\r\n", "BadHttpMessage"),
        (b"GET http://[/" + HEAD + b"\r\n", "InvalidURLError"),
        (b"GET /healthz HTTP/9.x\r\nHost: localhost\r\n\r\n", "BadStatusLine"),
        (CREATE + CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", None),
        (CREATE + CHUNKED + b"2\r\n{}s3cret\r\n0\r\n\r\n", None),
        (CREATE + b"Content-Length: s3cret\r\n\r\n{}", "BadHttpMessage"),
        (CREATE + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", "RequestPayloadError"),
        (b"GET /healthz" + HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", "RequestPayloadError"),
    ],
)
async def test_what_is_no_http_is_a_line_without_a_traceback(local, library_logs, sent, reason):
    """It is no error of ours. The line says who and what kind, never what was sent; the connection is closed."""
    with structlog.testing.capture_logs() as logs:
        reader, writer = await asyncio.open_connection("127.0.0.1", local.port)
        writer.write(sent)
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert (await local.ask("GET", "/healthz"))[0] == 200
    [line] = logs
    assert (line["event"], line["log_level"], line["unreported"]) == ("request_malformed", "info", 0)
    assert line["remote"] in {"127.0.0.1", None}
    assert reason in {None, line["reason"]}
    assert "s3cret" not in str(line)
    assert answer.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))


async def test_malformed_requests_do_not_fill_the_log(library_logs):
    """One line in ten seconds, which counts the others."""

    class Moved(FixedClock):
        at = NOW

        def now(self):
            return self.at

    clock = Moved()
    async with serving(clock=clock) as harness:
        with structlog.testing.capture_logs() as logs:
            for seconds in (0, 1, 1, app.REPORT_INTERVAL):
                clock.at += seconds
                reader, writer = await asyncio.open_connection("127.0.0.1", harness.port)
                writer.write(b"GARBAGE\r\n\r\n")
                await reader.read()
                writer.close()
                await writer.wait_closed()
    assert [line["unreported"] for line in logs] == [0, 2]


def test_an_error_of_the_library_keeps_its_traceback(caplog):
    """Only what a client sent is made short."""
    wire = app._WireLog(app._Rare("request_malformed", FixedClock()))
    with structlog.testing.capture_logs() as logs:
        wire.exception("Unhandled exception", exc_info=ZeroDivisionError())
        wire.debug("not shown at this level")
    [record] = caplog.records
    assert (record.name, record.message) == ("aiohttp.server", "Unhandled exception")
    assert record.exc_info[0] is ZeroDivisionError
    assert logs == []
