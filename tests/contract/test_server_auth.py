"""AWS Signature Version 4 at our own door: boto3, a signer written by the book, and those who may not get in."""

import hashlib
import hmac
import io
import json
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
import structlog
from multidict import CIMultiDict

from poller.server import api, app
from poller.settings import AccessKeys, BearerAuth
from tests.contract.test_server import MAPPINGS, QUEUE, FixedClock, client_error, configuration, lambda_call, serving

ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
KEYS = AccessKeys((("AKIDOTHER", "another secret"), (ID, SECRET)))
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
MISMATCH = (
    "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key "
    "and signing method. Consult the service documentation for details."
)
INVALID = "The security token included in the request is invalid."


def stamp(at=AT):
    return at.strftime("%Y%m%dT%H%M%SZ")


def signed(method, path, body=b"", *, query="", headers=(), at=AT, key=(ID, SECRET), names=None, **scope):
    """Headers of a request signed by the book, without botocore. `path` and `query` are percent-encoded once."""
    scope = {"date": stamp(at)[:8], "region": "eu-west-1", "service": "lambda", "term": "aws4_request"} | scope
    headers = [("Host", "localhost"), ("X-Amz-Date", stamp(at)), *headers]
    names = names or sorted({name.lower() for name, _ in headers})
    lines = ""
    for name in names:
        values = [" ".join(value.split()) for other, value in headers if other.lower() == name]
        lines += f"{name}:{','.join(values)}\n"
    pairs = sorted(query.split("&")) if query else []
    payload = hashlib.sha256(body).hexdigest()
    payload = dict(headers).get("X-Amz-Content-SHA256", payload)
    parts = [method, quote(path, safe="/~"), "&".join(pairs), lines, ";".join(names), payload]
    place = "/".join(scope.values())
    text = f"AWS4-HMAC-SHA256\n{stamp(at)}\n{place}\n{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"
    signing = b"AWS4" + key[1].encode()
    for part in scope.values():
        signing = hmac.digest(signing, part.encode(), "sha256")
    signature = hmac.digest(signing, text.encode(), "sha256").hex()
    made = CIMultiDict(headers)
    made["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={key[0]}/{place}, SignedHeaders={';'.join(names)}, Signature={signature}"
    )
    return made


class Wall:
    """A wall clock to move."""

    def __init__(self):
        self.at = AT

    def __call__(self):
        return self.at.timestamp()


@pytest.fixture
async def locked():
    async with serving(auth=(KEYS, BearerAuth("token"))) as harness:
        yield harness


@pytest.fixture
async def fixed():
    """It is `AT` for this one."""
    wall = Wall()
    async with serving(auth=(KEYS,), wall=wall) as harness:
        harness.wall = wall
        yield harness


async def refusal(harness, method, path, **kwargs):
    """The error of one request that is refused: code and message."""
    status, headers, text = await harness.ask(method, path, **kwargs)
    assert status == 403, text
    document = json.loads(text)
    assert document.keys() == {"message"}, "AWS's front end sends no type"
    return headers["x-amzn-ErrorType"], document["message"]


# --- boto3 ---


async def test_boto3_does_everything_with_its_keys(locked):
    """With any configured key all operations work, whatever stands in path, query and body."""
    arn = configuration()["EventSourceMappingArn"]
    made = configuration()["UUID"]
    odd = "a b+c&d=\u00e9/%~*'()!:@,;?#[]"
    for run in (
        lambda c: c.create_event_source_mapping(
            EventSourceArn=QUEUE, FunctionName="orders", Tags={"k\u00e9": "\u2713"}
        ),
        lambda c: c.get_event_source_mapping(UUID=made),
        lambda c: c.update_event_source_mapping(UUID=made, BatchSize=7),
        lambda c: c.list_event_source_mappings(),
        lambda c: c.list_event_source_mappings(FunctionName=odd, EventSourceArn=odd, MaxItems=3),
        lambda c: c.list_tags(Resource=arn),
        lambda c: c.tag_resource(Resource=arn, Tags={"\u20ac": odd}),
        lambda c: c.untag_resource(Resource=arn, TagKeys=["b", "a", odd]),
        lambda c: c.delete_event_source_mapping(UUID=made),
    ):
        for keys in (ID, SECRET), ("AKIDOTHER", "another secret"):
            if keys[0] == ID or run.__code__.co_names[0] != "delete_event_source_mapping":
                answer = await lambda_call(locked, run, keys=keys)
                assert answer["ResponseMetadata"]["HTTPStatusCode"] in {200, 202, 204}
    assert (arn, ["b", "a", odd]) in locked.control.calls
    assert await locked.count("poller_auth_failures_total") == 0


@pytest.mark.parametrize(
    ("keys", "session", "code", "message"),
    [
        ((ID, "wrong"), None, "InvalidSignatureException", MISMATCH),
        ((ID, "another secret"), None, "InvalidSignatureException", MISMATCH),
        (("AKIDNOBODY", SECRET), None, "UnrecognizedClientException", INVALID),
        (("AKIDNOBODY", "no secret of anybody"), None, "UnrecognizedClientException", INVALID),
        ((ID, SECRET), "a session", "UnrecognizedClientException", INVALID),
    ],
)
async def test_boto3_with_wrong_keys_is_refused_as_by_aws(locked, keys, session, code, message):
    """Wrong secret, unknown id, a session token that is nobody's: AWS's codes and texts, counted, nothing done."""
    run = client_error(lambda c: c.create_event_source_mapping(EventSourceArn=QUEUE, FunctionName="f"))
    response = await lambda_call(locked, run, keys=keys, session=session)
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert (response["Error"]["Code"], response["Error"]["Message"]) == (code, message)
    assert locked.control.calls == []
    assert await locked.count("poller_auth_failures_total") == 1


async def test_keys_do_not_close_the_door_for_tokens(locked):
    """Each entry of `server.auth` opens by itself; a secret is no token."""
    for token, status in (("token", 200), (SECRET, 401), (ID, 401)):
        assert (await locked.ask("GET", "/", headers={"Authorization": f"Bearer {token}"}))[0] == status


# --- what is signed ---


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (MAPPINGS, ""),
        (MAPPINGS, "FunctionName=a%20b%2Bc&EventSourceArn=arn%3Aaws&FunctionName=%C3%A9"),
        (MAPPINGS + "/", "MaxItems=1"),
        ("/2017-03-31/tags/arn%3Aaws%3Alambda%3Aeu-west-1%3A123456789012%3Afunction%3Af", ""),
        ("/2017-03-31/tags/arn:aws:lambda:eu-west-1:123456789012:function:f%2F%25", ""),
        ("/api/status", ""),
    ],
)
async def test_a_signature_by_the_book_opens(fixed, path, query):
    """Paths are encoded a second time for the signature, queries sorted; every path is opened by a key."""
    headers = signed("GET", path, query=query)
    target = f"{path}?{query}" if query else path
    assert (await fixed.raw("GET", target, headers)).startswith(b"HTTP/1.1 200 ")


async def test_any_headers_may_be_signed(fixed):
    """Repeated ones, blanks within, those that botocore never signs, and one that is not sent at all."""
    more = [("X-A", "  1   2 "), ("X-A", "3"), ("User-Agent", "curl"), ("X-Amzn-Trace-Id", "Root=1"), ("X-E", "\u00e9")]
    headers = signed("GET", MAPPINGS, headers=more)
    assert (await fixed.raw("GET", MAPPINGS, headers)).startswith(b"HTTP/1.1 200 ")
    names = ["host", "x-amz-date", "x-not-there"]
    headers = signed("GET", MAPPINGS, headers=[("X-Not-Signed", "x")], names=names)
    assert (await fixed.raw("GET", MAPPINGS, headers)).startswith(b"HTTP/1.1 200 ")


async def test_a_date_header_will_do(fixed):
    """Without X-Amz-Date the Date header counts, as HTTP writes it or in the basic form."""
    for text in ("Sat, 31 Jan 2026 12:00:00 GMT", stamp()):
        headers = signed("GET", MAPPINGS, headers=[("Date", text)], names=["date", "host"])
        del headers["X-Amz-Date"]
        assert (await fixed.raw("GET", MAPPINGS, headers)).startswith(b"HTTP/1.1 200 "), text


@pytest.mark.parametrize(
    ("method", "path", "change"),
    [
        ("PUT", f"{MAPPINGS}/x", {}),
        ("POST", f"{MAPPINGS}/", {}),
        ("POST", f"{MAPPINGS}?MaxItems=1", {}),
        ("POST", MAPPINGS, {"body": b'{"a": 2}'}),
        ("POST", MAPPINGS, {"body": b""}),
        ("POST", MAPPINGS, {"header": ("X-Signed", "2")}),
        ("POST", MAPPINGS, {"header": ("Host", "127.0.0.1")}),
        ("POST", MAPPINGS, {"header": ("X-Amz-Date", stamp(AT + timedelta(seconds=1)))}),
        ("POST", MAPPINGS, {"header": ("X-Signed", b"\xff")}),
        ("POST", f"{MAPPINGS}?a=%FF", {}),
    ],
)
async def test_whatever_was_changed_after_signing_is_refused(fixed, method, path, change):
    """Method, path, query, body, each signed header."""
    headers = signed("POST", MAPPINGS, b'{"a": 1}', headers=[("X-Signed", "1")])
    if "header" in change:
        headers[change["header"][0]] = change["header"][1]
    answer = await fixed.raw(method, path, headers, change.get("body", b'{"a": 1}'))
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"InvalidSignatureException" in answer
    assert MISMATCH.encode() in answer
    assert fixed.control.calls == []


@pytest.mark.parametrize("claimed", ["UNSIGNED-PAYLOAD", hashlib.sha256(b"other").hexdigest(), ""])
async def test_the_hash_of_a_body_is_never_believed(fixed, claimed):
    """X-Amz-Content-SHA256 may be signed, but what counts is the body that came."""
    body, right = b"{}", hashlib.sha256(b"{}").hexdigest()
    for value, status in ((claimed, 403), (right, 202)):
        headers = signed("POST", MAPPINGS, body, headers=[("X-Amz-Content-SHA256", value)])
        assert (await fixed.raw("POST", MAPPINGS, headers, body)).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("method", "target"),
    [
        *(("GET", target) for target in (b"/\xff", b"/?\xff", b"*", b"]x", b"/?a=[", b"//x", b"/%zz", b"http://h/x")),
        *(("GET", target) for target in (b"http://h", b"http://h?a", b"http://[::1]x/", b"@x/x", b"/x#]")),
        ("OPTIONS", b"*"),
        ("CONNECT", b"[x:1"),
        ("CONNECT", b"x]:1"),
        ("CONNECT", b"x:1"),
    ],
)
async def test_odd_targets_are_no_bug(fixed, method, target):
    """Nothing in the request line makes the verifier fail; it is refused, not there, or no HTTP at all."""
    with structlog.testing.capture_logs() as logs:
        answer = await fixed.raw(method, target, signed("GET", "/x"))
    assert answer.split()[1] in {b"400", b"401", b"404"}
    assert [entry["event"] for entry in logs] in ([], ["request_unauthorized"], ["request_malformed"])


# --- when ---


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (300, None),
        (-300, None),
        (301, "Signature expired: 20260131T120000Z is now earlier than 20260131T120001Z (20260131T120501Z - 5 min.)"),
        (
            -301,
            (
                "Signature not yet current: 20260131T120000Z is still later than 20260131T115959Z "
                "(20260131T115459Z + 5 min.)"
            ),
        ),
    ],
)
async def test_a_date_is_good_for_five_minutes(fixed, seconds, message):
    """Before and after, in AWS's words, with which SDKs correct their clocks."""
    fixed.wall.at = AT + timedelta(seconds=seconds)
    if message is None:
        assert (await fixed.ask("GET", MAPPINGS, headers=signed("GET", MAPPINGS)))[0] == 200
    else:
        found = await refusal(fixed, "GET", MAPPINGS, headers=signed("GET", MAPPINGS))
        assert found == ("InvalidSignatureException", message)


# --- what is no signature ---

GOOD = f"Credential={ID}/20260131/eu-west-1/lambda/aws4_request"
NAMES = "SignedHeaders=host;x-amz-date"
HEX = "Signature=" + "0" * 64


@pytest.mark.parametrize(
    ("authorization", "code", "message"),
    [
        (
            "AWS4-HMAC-SHA256",
            "IncompleteSignatureException",
            (
                "Authorization header requires 'Credential' parameter. Authorization header requires 'Signature' parameter. "
                "Authorization header requires 'SignedHeaders' parameter."
            ),
        ),
        (
            f"AWS4-HMAC-SHA256 {GOOD}, {NAMES}, Signature=",
            "IncompleteSignatureException",
            "Authorization header requires 'Signature' parameter.",
        ),
        (
            f"AWS4-HMAC-SHA256 {GOOD}, {NAMES}, x",
            "IncompleteSignatureException",
            "Invalid key=value pair (missing equal-sign) in Authorization header.",
        ),
        (
            f"AWS4-HMAC-SHA256 {GOOD}, {GOOD}, {NAMES}, {HEX}",
            "IncompleteSignatureException",
            "Authorization header has the 'Credential' parameter twice.",
        ),
        (
            f"AWS4-ECDSA-P256-SHA256 {GOOD}, {NAMES}, {HEX}",
            "IncompleteSignatureException",
            "Unsupported AWS 'algorithm': 'AWS4-ECDSA-P256-SHA256' (only AWS4-HMAC-SHA256 for now).",
        ),
        (
            f"AWS4-HMAC-SHA256 {GOOD}, SignedHeaders=x-amz-date, {HEX}",
            "InvalidSignatureException",
            "'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization.",
        ),
        (
            f"AWS4-HMAC-SHA256 Credential={ID}/20260131/lambda/aws4_request, {NAMES}, {HEX}",
            "IncompleteSignatureException",
            (
                "Credential must have exactly 5 slash-delimited elements, e.g. keyid/date/region/service/term, "
                f"got '{ID}/20260131/lambda/aws4_request'"
            ),
        ),
        (
            f"AWS4-HMAC-SHA256 Credential={ID}/20260130/r/s3/aws5, {NAMES}, {HEX}",
            "InvalidSignatureException",
            (
                "Credential should be scoped to correct service: 'lambda'. Credential should be scoped with a valid "
                "terminator: 'aws4_request', not 'aws5'. Date in Credential scope does not match YYYYMMDD from ISO-8601 "
                "version of date from HTTP: '20260130' != '20260131', from '20260131T120000Z'."
            ),
        ),
        (f"AWS4-HMAC-SHA256 {GOOD},{NAMES},{HEX}", "InvalidSignatureException", MISMATCH),
        (f"AWS4-HMAC-SHA256 {GOOD},{NAMES};x-y;;x-y,{HEX}", "InvalidSignatureException", MISMATCH),
        (f"AWS4-HMAC-SHA256 {GOOD},{NAMES},Signature=zz", "InvalidSignatureException", MISMATCH),
        (
            f"AWS4-HMAC-SHA256 {GOOD},{NAMES},Signature=\u00e9",
            "IncompleteSignatureException",
            "The Authorization header is not ASCII text.",
        ),
    ],
)
async def test_what_is_no_signature_is_refused_as_by_aws(fixed, authorization, code, message):
    """In the order in which AWS looks at it: parts, date, host, algorithm, scope, then the signature."""
    headers = {"Host": "localhost", "X-Amz-Date": stamp(), "Authorization": authorization}
    assert await refusal(fixed, "GET", MAPPINGS, headers=headers) == (code, message)


@pytest.mark.parametrize("date", ["", "x", "20260131T120000", "20260231T120000Z", "2026-01-31T12:00:00Z", "Foo GMT"])
async def test_what_is_no_date_is_refused(fixed, date):
    """Also two of them."""
    headers = signed("GET", MAPPINGS)
    headers["X-Amz-Date"] = date
    text = f"Date must be in ISO-8601 'basic format'. Got '{date}'. See http://en.wikipedia.org/wiki/ISO_8601"
    assert await refusal(fixed, "GET", MAPPINGS, headers=headers) == ("IncompleteSignatureException", text)
    headers = signed("GET", MAPPINGS)
    headers.add("X-Amz-Date", date)
    assert (await refusal(fixed, "GET", MAPPINGS, headers=headers))[0] == "IncompleteSignatureException"


async def test_a_signature_without_a_date_is_refused(fixed):
    """AWS names both headers that could have it."""
    headers = signed("GET", MAPPINGS)
    del headers["X-Amz-Date"]
    text = "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header."
    assert await refusal(fixed, "GET", MAPPINGS, headers=headers) == ("IncompleteSignatureException", text)


async def test_two_authorizations_are_refused(fixed):
    """Which of them is meant nobody can know."""
    headers = signed("GET", MAPPINGS)
    headers.add("Authorization", headers["Authorization"])
    assert (await refusal(fixed, "GET", MAPPINGS, headers=headers))[0] == "IncompleteSignatureException"


async def test_presigned_urls_and_nothing_at_all_are_refused(fixed):
    """A signature in a URL would stand in every log on the way."""
    text = "Presigned URLs are not taken; sign the headers."
    query = {"X-Amz-Algorithm": "AWS4-HMAC-SHA256", "X-Amz-Signature": "0"}
    assert await refusal(fixed, "GET", MAPPINGS, params=query) == ("IncompleteSignatureException", text)
    found = await refusal(fixed, "GET", "/2017-03-31/tags/x")
    assert found == ("MissingAuthenticationTokenException", "Missing Authentication Token")
    assert await fixed.count("poller_auth_failures_total") == 2


# --- what a stranger can do ---


async def test_a_strangers_body_is_bounded_in_size_and_time(fixed, monkeypatch):
    """It has to be read to be judged: 413 above the bound, 408 when it does not come; not at all for a bad scope."""
    body = b"x" * (api.MAX_BODY_BYTES + 1)
    headers = signed("POST", MAPPINGS, key=("AKIDNOBODY", ""))
    assert (await fixed.ask("POST", MAPPINGS, headers=headers, data=io.BytesIO(body)))[0] == 413
    monkeypatch.setattr(api, "BODY_TIMEOUT", 0.05)
    headers["Content-Length"] = "10"
    assert (await fixed.raw("POST", MAPPINGS, headers)).startswith(b"HTTP/1.1 408 ")
    monkeypatch.setattr(api, "BODY_TIMEOUT", 60)
    fixed.wall.at += timedelta(hours=1)
    assert (await fixed.raw("POST", MAPPINGS, headers)).startswith(b"HTTP/1.1 403 ")


class MovedClock(FixedClock):
    at = 1_000_000.0

    def now(self):
        return self.at


async def test_guessing_does_not_fill_the_log(monkeypatch):
    """One line in ten seconds, which counts the others; no secret, signature or token in it."""
    clock = MovedClock()
    async with serving(clock=clock, auth=(KEYS, BearerAuth("token")), wall=Wall()) as harness:
        headers = signed("GET", MAPPINGS, key=(ID, "guess-of-a-secret"))
        with structlog.testing.capture_logs() as logs:
            for _ in range(5):
                await harness.ask("GET", MAPPINGS, headers=headers)
            clock.at += app.REPORT_INTERVAL
            await harness.ask("GET", "/", headers={"Authorization": "Bearer guessed-token"})
        assert await harness.count("poller_auth_failures_total") == 6
    found = [(entry["event"], entry["log_level"], entry["reason"], entry["unreported"]) for entry in logs]
    assert found == [
        ("request_unauthorized", "info", "InvalidSignatureException", 0),
        ("request_unauthorized", "info", "UnrecognizedClientException", 4),
    ]
    for secret in (SECRET, "token'", "guess", headers["Authorization"][-64:]):
        assert secret not in repr(logs).replace("security token", "")
    assert SECRET not in repr(KEYS)


async def test_handlers_know_who_it_was(monkeypatch):
    """The access key's id, `bearer`, or `local` where nobody is asked."""
    seen = []

    async def listing(_, request):
        seen.append(request[api.IDENTITY])
        return app.web.Response()

    monkeypatch.setattr(api._Api, "list", listing)
    async with serving(auth=(KEYS, BearerAuth("token")), wall=Wall()) as harness:
        await harness.ask("GET", MAPPINGS, headers=signed("GET", MAPPINGS))
        await harness.ask("GET", MAPPINGS, headers={"Authorization": "Bearer token"})
        await harness.ask("GET", MAPPINGS)
    async with serving() as harness:
        await harness.ask("GET", MAPPINGS)
    assert seen == [ID, "bearer", "local"]


async def test_the_open_paths_stay_open(fixed):
    """No credentials, or wrong ones, close them."""
    for path in ("/metrics", "/healthz", "/readyz"):
        assert (await fixed.ask("GET", path, headers={"Authorization": "AWS4-HMAC-SHA256 x"}))[0] == 200


async def test_a_server_without_keys_says_so(monkeypatch):
    """Somebody whose boto3 is refused learns what to add."""
    async with serving(auth=(BearerAuth("token"),)) as harness:
        response = await lambda_call(harness, client_error(lambda c: c.list_event_source_mappings()))
    assert response["Error"]["Code"] == "UnrecognizedClientException"
    assert response["Error"]["Message"].startswith(INVALID)
    assert "{type: sigv4, access_keys: {ID: SECRET}}" in response["Error"]["Message"]
