"""Signatures: botocore's own signer is the oracle."""

import datetime as dt

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st

from poller.aws import signer

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
KEYS = ReadOnlyCredentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "session//token==", None)
LAMBDA = "https://lambda.eu-west-1.amazonaws.com/2015-03-31/functions"
CALL = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": "Kinesis_20131202.GetRecords"}
URLS = (
    "https://kinesis.eu-west-1.amazonaws.com/",
    "https://kinesis.eu-west-1.amazonaws.com",
    "https://KINESIS.eu-west-1.amazonaws.com:443/",
    "http://127.0.0.1:4566/",
    "http://[::1]:4566/a//b/../c/./d/",
    "https://example.com:80/~user/%20x?b=2&a=1&a=%2F&b&c=",
    f"{LAMBDA}/arn%3Aaws%3Alambda%3Aeu-west-1%3A1%3Afunction%3Af/invocations?Qualifier=live",
)
TEXT = st.text(st.characters(codec="ascii", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
NAMES = st.sampled_from(["X-Amz-Target", "x-api-key", "User-Agent", "Accept", "Connection", "X-Amzn-Trace-Id"])


def assert_same(
    keys: ReadOnlyCredentials, url: str, headers: dict[str, str], body: bytes, when: dt.datetime = NOW
) -> None:
    """What botocore adds to its own request, our signer adds to ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.auth.get_current_datetime", lambda: when)
        patch.setattr(signer, "wall_clock", when.timestamp)
        oracle = AWSRequest(method="POST", url=url, headers=dict(headers), data=body)
        SigV4Auth(keys, "kinesis", "eu-west-1").add_auth(oracle)
        ours = dict(headers)
        signer.sign(keys, "kinesis", "eu-west-1", "POST", url, ours, body)
    assert ours == dict(oracle.headers.items())


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("keys", [KEYS, ReadOnlyCredentials("ID", "secret", None, None)])
def test_the_signature_is_botocores_own(url: str, keys: ReadOnlyCredentials) -> None:
    """Every header that botocore's signer adds to its own request is the same on ours."""
    assert_same(keys, url, CALL, '{"ShardIterator":"\u00e4"}'.encode())


@given(body=st.binary(max_size=200), secret=TEXT, headers=st.dictionaries(NAMES, TEXT.filter(str.strip)))
def test_the_signature_is_botocores_own_for_any_request(body: bytes, secret: str, headers: dict[str, str]) -> None:
    """Whatever is sent, with whatever secret; headers that proxies change are not signed."""
    assert_same(ReadOnlyCredentials("AKIDEXAMPLE", secret, None, None), URLS[0], headers, body)


def test_nothing_that_is_kept_outlives_its_day_or_its_keys() -> None:
    """The next second, the next day and renewed credentials are signed as what they are."""
    other = ReadOnlyCredentials("AKIDOTHER", "another secret", "another token", None)
    for keys in (KEYS, other, KEYS):
        for later in (0, 1, 86_400, 0):
            assert_same(keys, URLS[0], CALL, b"{}", NOW + dt.timedelta(seconds=later))


def test_a_repeat_signs_what_the_first_try_signed() -> None:
    """A call whose connection was closed is sent again with the headers that it has by then."""
    headers = dict(CALL)
    for keys in (KEYS, ReadOnlyCredentials("AKIDOTHER", "another secret", None, None)):
        for _ in range(2):
            signer.sign(keys, "sqs", "eu-west-1", "POST", URLS[0], headers, b"{}")
        once = dict(CALL)
        signer.sign(keys, "sqs", "eu-west-1", "POST", URLS[0], once, b"{}")
        assert headers["Authorization"] == once["Authorization"]
        assert headers == once
