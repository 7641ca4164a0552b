"""Reading error answers, and texts without secrets."""

import errno
import json

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
)

from poller.aws.errors import translate, translated
from poller.aws.lean import AwsError, _was_idle, describe, parse_error, safe_text
from poller.aws.session import AwsClients
from poller.errors import AccessDenied, IteratorExpired, SourceGone, SourceThrottled, SourceUnavailable
from poller.settings import AwsSettings


@pytest.mark.parametrize(
    ("status", "headers", "body", "code", "message"),
    [
        (400, {}, {"__type": "ExpiredIteratorException", "message": "old"}, "ExpiredIteratorException", "old"),
        (400, {}, {"__type": "com.amazonaws.sqs#QueueDoesNotExist", "Message": "no"}, "QueueDoesNotExist", "no"),
        (
            400,
            {"x-amzn-query-error": "AWS.SimpleQueueService.NonExistentQueue;Sender"},
            {"__type": "com.amazonaws.sqs#QueueDoesNotExist", "message": "no"},
            "QueueDoesNotExist",
            "no",
        ),
        (400, {"x-amzn-query-error": "OverLimit;Sender"}, {}, "OverLimit", ""),
        (
            404,
            {"x-amzn-errortype": "ResourceNotFoundException:http://internal.amazon.com/coral/com.amazonaws/"},
            {"Message": "Function not found"},
            "ResourceNotFoundException",
            "Function not found",
        ),
        (400, {}, {"code": "Throttling", "message": None}, "Throttling", ""),
        (403, {}, {"Code": "AccessDenied"}, "AccessDenied", ""),
        (503, {}, b"<html><body>Service Unavailable</body></html>", "HTTP503", ""),
        (500, {}, b"", "HTTP500", ""),
        (500, {}, b"[1,2]", "HTTP500", ""),
        (500, {}, b'{"__type": 5, "message": {}}', "HTTP500", ""),
        (500, {}, b'{"__type":"Cut', "HTTP500", ""),
        (500, {}, b'{"__type":"\xff"}', "HTTP500", ""),
        (500, {}, b"[" * 100_000, "HTTP500", ""),
    ],
)
def test_error_answers_are_read(status: int, headers: dict, body: object, code: str, message: str) -> None:
    """The code without its namespace, wherever it stands; the status when there is none."""
    error = parse_error(status, headers, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert (error.code, error.status, error.message) == (code, status, message)
    assert str(error) == (f"{code}: {message}" if message else code)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("ProvisionedThroughputExceededException", 400, SourceThrottled),
        ("LimitExceededException", 400, SourceThrottled),
        ("KMSThrottlingException", 400, SourceThrottled),
        ("AWS.SimpleQueueService.OverLimit", 403, SourceThrottled),
        ("RequestThrottled", 403, SourceThrottled),
        ("HTTP429", 429, SourceThrottled),
        ("AccessDeniedException", 400, AccessDenied),
        ("KMSAccessDeniedException", 400, AccessDenied),
        ("KMSDisabledException", 400, AccessDenied),
        ("UnrecognizedClientException", 400, AccessDenied),
        ("SignatureDoesNotMatch", 403, AccessDenied),
        ("HTTP403", 403, AccessDenied),
        ("ResourceNotFoundException", 400, SourceGone),
        ("QueueDoesNotExist", 400, SourceGone),
        ("AWS.SimpleQueueService.NonExistentQueue", 400, SourceGone),
        ("ExpiredTokenException", 400, SourceUnavailable),
        ("ExpiredToken", 403, SourceUnavailable),
        ("InternalFailure", 500, SourceUnavailable),
        ("HTTP503", 503, SourceUnavailable),
        ("InvalidArgumentException", 400, SourceUnavailable),
        ("ExpiredIteratorException", 400, IteratorExpired),
    ],
)
def test_codes_say_what_to_do(code: str, status: int, kind: type) -> None:
    """The adapter's table first, then the common one, then the status; unknown codes are worth another try."""
    error = translate(AwsError(code, status, "why"), {"ExpiredIteratorException": IteratorExpired}, "GetRecords")
    assert type(error) is kind
    assert str(error) == f"GetRecords: {code}: why"


def test_cold_calls_errors_are_translated_without_their_cause() -> None:
    """Errors of aiobotocore become ours; their texts, which may hold secrets, are not carried along."""
    denied = ClientError(
        {"Error": {"Code": "AccessDenied", "Message": "no\ntoken"}, "ResponseMetadata": {}}, "ListShards"
    )
    for raised, kind, text in (
        (denied, AccessDenied, "ListShards: AccessDenied: no"),
        (NoCredentialsError(), AccessDenied, "ListShards: no AWS credentials found"),
        (CredentialRetrievalError(provider="p", error_msg="secret"), SourceUnavailable, "cannot be loaded"),
        (
            EndpointConnectionError(endpoint_url="http://u:p@h"),
            SourceUnavailable,
            'ListShards: Could not connect to the endpoint URL: "http://h"',
        ),
        (TimeoutError(), SourceUnavailable, "ListShards: TimeoutError"),
    ):
        with pytest.raises(kind, match=text) as caught, translated("ListShards", {}):
            raise raised
        assert caught.value.__cause__ is None
        assert "p@h" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_foreign_texts_lose_their_secrets() -> None:
    """One short line, no access key id, no password of a URL; the canonical request of a bad signature is cut off."""
    text = safe_text(
        "Credential=AKIAIOSFODNN7EXAMPLE/20260102 at http://user:pass@proxy:3128/ is wrong\n\n"
        "The Canonical String should have been\nx-amz-security-token:SECRET"
    )
    assert text == "Credential=***/20260102 at http://proxy:3128/ is wrong"
    assert len(safe_text("x" * 5000)) == 300


def test_network_trouble_is_described_without_urls() -> None:
    """A word for a human: what the system said, or the kind of error."""
    assert describe(TimeoutError()) == "timed out"
    assert describe(ConnectionRefusedError(111, "Connection refused")) == "Connection refused"
    assert describe(aiohttp.ServerDisconnectedError("http://u:p@h")) == "ServerDisconnectedError"


def test_only_a_connection_that_was_closed_while_idle_is_tried_again() -> None:
    """A reset or hang-up before the answer; not a refused connection, not an answer that broke off."""
    key = ConnectionKey("h", 1, is_ssl=False, ssl=False, proxy=None, proxy_auth=None, proxy_headers_hash=None)
    assert _was_idle(aiohttp.ServerDisconnectedError())
    assert _was_idle(aiohttp.ClientOSError(errno.ECONNRESET, "reset"))
    assert _was_idle(aiohttp.ClientConnectionResetError("closing transport"))
    assert not _was_idle(aiohttp.ClientConnectorError(key, ConnectionResetError(errno.ECONNRESET, "reset")))
    assert not _was_idle(aiohttp.ClientOSError(errno.EHOSTUNREACH, "no route"))


@pytest.mark.parametrize("output", ["no json", "", "[1]", '{"Version": 7}'])
async def test_a_credential_program_that_misbehaves_is_waited_out(output, tmp_path, monkeypatch) -> None:
    """Whatever a provider brings up is SourceUnavailable, never a crash of what only wanted to sign."""
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = /bin/echo '{output}'\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    async with AwsClients(AwsSettings(endpoint_url="http://127.0.0.1:9")) as clients:
        with pytest.raises(SourceUnavailable):
            await clients.lean("kinesis", "eu-west-1")
        with pytest.raises(SourceUnavailable):
            await clients.credentials.frozen()
