"""Rules of the config file: what is read, what is filled in, what is refused and with which words."""

import json
import os
import re
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poller import config, yamldoc
from poller.errors import ConfigError
from poller.mappings import derived_uuid
from poller.settings import (
    AccessKeys,
    AwsSettings,
    BasicAuth,
    BearerAuth,
    DynamoStoreSettings,
    HttpFunction,
    LambdaFunction,
    LimitSettings,
    RetrySettings,
    ServerSettings,
    ServerTls,
    Settings,
    SigV4Auth,
    StoreSettings,
    TlsSettings,
    TracingSettings,
)

NOW = 1_780_000_000.0
KINESIS = "arn:aws:kinesis:eu-west-1:123456789012:stream/orders"
SQS = "arn:aws:sqs:eu-west-1:123456789012:orders"
UUID = "6d9bce8e-836b-442c-8070-74e77903c815"
ORDERS = "functions: {orders: {url: 'http://127.0.0.1:8080/'}}\n"
CONFIG = Path(__file__).parents[2] / "config"
EXAMPLES = sorted(CONFIG.glob("**/*.yaml"))


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a text as `poller.yaml` in the working directory, so that mistakes name it so."""
    monkeypatch.chdir(tmp_path)

    def load(text):
        Path("poller.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.load("poller.yaml", now=NOW)

    return load


@pytest.fixture
def mistakes(load):
    """The mistakes of a text, without the file's name."""

    def mistakes(text):
        with pytest.raises(ConfigError) as caught:
            load(text)
        assert all(mistake.startswith("poller.yaml:") for mistake in caught.value.mistakes)
        return [mistake.removeprefix("poller.yaml:") for mistake in caught.value.mistakes]

    return mistakes


def function(text):
    return f"functions:\n  f: {text}\n"


def mapping(text, arn=SQS):
    return f"event_source_mappings:\n  - EventSourceArn: {arn}\n    FunctionName: f\n    {text}\n"


# --- what is read ---------------------------------------------------------------------------------------------------


def test_a_whole_file(load):
    """Every key of interface.md arrives where the daemon looks for it."""
    settings = load(
        f"""
aws:
  region: eu-west-1
  endpoint_url: http://127.0.0.1:4566
  endpoint_urls: {{kinesis: http://127.0.0.1:4567}}
functions:
  orders:
    url: https://127.0.0.1:8080/orders
    timeout_seconds: 12.5
    headers: {{X-Api-Key: key}}
    auth: {{type: bearer, token: token}}
    max_concurrency: 20
    max_invocations_per_second: 2.5
    protocol: rie
    tls: {{ca: ca.pem, cert: c.pem, key: k.pem}}
  basic: {{url: http://127.0.0.1/, auth: {{type: basic, username: u, password: p}}}}
  signed: {{url: http://127.0.0.1/, auth: {{type: sigv4, service: execute-api}}}}
  billing: {{lambda: "arn:aws:lambda:eu-west-1:123456789012:function:billing:live", max_concurrency: 2}}
event_source_mappings:
  - EventSourceArn: {KINESIS}
    FunctionName: orders
    StartingPosition: TRIM_HORIZON
  - UUID: {UUID.upper()}
    EventSourceArn: {SQS}
    FunctionName: billing
store: sqlite:./poller.db
server: {{host: "::1", port: 0, auth: [{{type: bearer, token: a}}, {{type: bearer, token: b}}]}}
log: {{level: debug, format: console, payloads: false}}
retry: {{initial_backoff_seconds: 1, maximum_backoff_seconds: 2}}
limits: {{buffer_bytes: 2097152, shard_series: 0}}
checkpoint_interval_seconds: 0.5
shutdown_grace_seconds: 3
"""
    )
    assert settings.aws == AwsSettings("eu-west-1", "http://127.0.0.1:4566", (("kinesis", "http://127.0.0.1:4567"),))
    assert settings.functions == {
        "orders": HttpFunction(
            "orders",
            "https://127.0.0.1:8080/orders",
            12.5,
            (("X-Api-Key", "key"),),
            BearerAuth("token"),
            20,
            2.5,
            "rie",
            TlsSettings("ca.pem", "c.pem", "k.pem"),
        ),
        "basic": HttpFunction("basic", "http://127.0.0.1/", auth=BasicAuth("u", "p")),
        "signed": HttpFunction("signed", "http://127.0.0.1/", auth=SigV4Auth("execute-api")),
        "billing": LambdaFunction(
            "billing", "arn:aws:lambda:eu-west-1:123456789012:function:billing:live", max_concurrency=2
        ),
    }
    first, second = settings.mappings
    orders_arn = "arn:aws:lambda:eu-west-1:123456789012:function:orders"
    assert (first.uuid, first.line) == (derived_uuid(KINESIS, orders_arn), 20)
    assert (first.document["BatchSize"], first.document["StartingPosition"]) == (100, "TRIM_HORIZON")
    assert (second.uuid, second.line, "UUID" in second.document) == (UUID, 23, False)
    assert settings.store == StoreSettings("sqlite:./poller.db", "./poller.db")
    assert settings.server == ServerSettings("::1", 0, (BearerAuth("a"), BearerAuth("b")))
    assert (settings.log.level, settings.log.format, settings.log.payloads) == ("debug", "console", False)
    assert settings.retry == RetrySettings(1, 2)
    assert settings.limits == LimitSettings(buffer_bytes=2_097_152, shard_series=0)
    assert (settings.checkpoint_interval, settings.shutdown_grace) == (0.5, 3.0)
    assert settings.warnings == ()


def test_what_is_absent_or_empty_keeps_its_default(load):
    """A section whose lines are all commented out is no mistake."""
    assert load("aws:\nfunctions:\nevent_source_mappings:\nserver: {}\nstore:\n") == Settings("poller.yaml")


def test_json_is_yaml(load):
    """A JSON file loads."""
    assert load('{"functions": {"f": {"url": "http://x/"}}, "store": "sqlite:///a.db"}').store.path == "/a.db"


def test_a_byte_order_mark_is_no_part_of_the_first_key(load):
    """Some editors write one."""
    assert load(b"\xef\xbb\xbflog: {level: debug}").log.level == "debug"


def test_one_auth_entry_needs_no_list(load):
    """server.auth: one or a list."""
    assert load("server: {auth: {type: bearer, token: t}}").server.auth == (BearerAuth("t"),)


def test_the_server_takes_tokens_and_access_keys(load, monkeypatch):
    """In any order; every secret of them is masked, and no repr has one."""
    monkeypatch.setenv("KEY", "hunter2")
    settings = load(
        "server:\n  auth:\n    - {type: sigv4, access_keys: {AKIDFIRST: '${KEY}', AKID_2: second}}\n"
        "    - {type: bearer, token: third}\n    - {type: sigv4, access_keys: {AKIDLAST: fourth}}\n"
    )
    assert settings.server.auth == (
        AccessKeys((("AKIDFIRST", "hunter2"), ("AKID_2", "second"))),
        BearerAuth("third"),
        AccessKeys((("AKIDLAST", "fourth"),)),
    )
    assert {"hunter2", "second", "third", "fourth"} <= settings.secrets()
    assert not any(secret in repr(settings) for secret in ("hunter2", "second", "third", "fourth"))


def test_an_access_key_id_has_one_secret(mistakes):
    """Which of two would hold, nobody could know; both lines are named, the id is not."""
    (found,) = mistakes(
        "server:\n  auth:\n    - {type: sigv4, access_keys: {AKID: one}}\n"
        "    - {type: sigv4, access_keys: {AKIDB: two, AKID: three}}\n"
    )
    said = "4: server.auth[1].access_keys: has an access key id that is on line 3 too; take one of them out"
    assert found == said


def test_aliases_and_merges_share_defaults(load):
    """Anchors, aliases and `<<` work; a mapping's own key wins over a merged one."""
    settings = load(
        "functions:\n  a: &a {url: http://x/, timeout_seconds: 5}\n  b: {<<: *a, timeout_seconds: 6}\n  c: *a\n"
    )
    assert [item.timeout for item in settings.functions.values()] == [5, 6, 5]
    assert {item.url for item in settings.functions.values()} == {"http://x/"}


@pytest.mark.parametrize("moment", ["2026-01-01T00:00:00Z", "2026-01-01 00:00:00", "2026-01-01", "1767225600"])
def test_a_timestamp_may_be_a_date_time_or_a_number(load, moment):
    """StartingPositionTimestamp becomes epoch seconds, in whichever form YAML has it."""
    text = mapping(f"StartingPosition: AT_TIMESTAMP\n    StartingPositionTimestamp: {moment}", KINESIS)
    assert load(text).mappings[0].document["StartingPositionTimestamp"] == 1_767_225_600.0


# --- filling in -----------------------------------------------------------------------------------------------------


def test_references_are_filled_in_values_only(load, monkeypatch, tmp_path):
    """${NAME}, ${NAME:-default}, ${file:PATH} and $${, in values, after parsing, never in keys."""
    monkeypatch.setenv("KEY", "a: [b")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    (tmp_path / "secret").write_bytes(b"line\n\n")
    (tmp_path / "crlf").write_bytes(b"line\r\n")
    settings = load(
        """
functions:
  f:
    url: http://127.0.0.1/
    headers:
      A: ${KEY}
      B: "x-${KEY}-${UNSET:-d}"
      C: ${EMPTY:-default}
      D: "${EMPTY}"
      E: $${KEY} $KEY ${UNSET:-}
      F: ${file:crlf}
    auth: {type: basic, username: "${UNSET:-a}", password: "${KEY}"}
"""
    )
    (function,) = settings.functions.values()
    assert dict(function.headers) == {
        "A": "a: [b",
        "B": "x-a: [b-d",
        "C": "default",
        "D": "",
        "E": "${KEY} $KEY ",
        "F": "line",
    }
    assert function.auth == BasicAuth("a", "a: [b")


def test_only_one_line_break_is_stripped_from_a_file(mistakes, tmp_path):
    """The rest is the secret's own, and a header cannot carry it; the text does not show it."""
    (tmp_path / "secret").write_bytes(b"hunter2\n\n")
    (mistake,) = mistakes(function("{url: 'http://x/', headers: {A: '${file:secret}'}}"))
    assert mistake == "2: functions.f.headers.A: has a line break or control character; give one line"


def test_filled_text_becomes_the_number_or_boolean_that_is_needed(load, monkeypatch):
    """Environment variables are text; what was written in quotes without a reference stays text."""
    monkeypatch.setenv("N", "12")
    monkeypatch.setenv("YES", "True")
    settings = load(
        "server: {port: '${N}'}\nshutdown_grace_seconds: ${G:-1.5}\n"
        + mapping(
            "BatchSize: ${N}\n    MaximumBatchingWindowInSeconds: ${W:-3}\n    Options: {CircuitBreaker: '${YES}'}"
        )
    )
    assert (settings.server.port, settings.shutdown_grace) == (12, 1.5)
    document = settings.mappings[0].document
    assert (document["BatchSize"], document["MaximumBatchingWindowInSeconds"]) == (12, 3)
    assert document["Options"] == {"CircuitBreaker": True}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("${NOPE}", "the variable NOPE is not set; set it, or write ${NOPE:-default}"),
        ("${file:nope}", "the file 'nope' cannot be read: No such file or directory; give a readable text file"),
        ("${file:.}", "the file '.' cannot be read: Is a directory; give a readable text file"),
        ("${NOPE", "${ has no closing }; close it, or write $${ for the two characters"),
        ("${}", "${...} is malformed; write ${NAME}, ${NAME:-default} or ${file:PATH}, and $${ for ${ itself"),
        ("${a-b}", "${...} is malformed; write ${NAME}, ${NAME:-default} or ${file:PATH}, and $${ for ${ itself"),
    ],
)
def test_a_reference_that_cannot_be_filled_is_one_mistake(mistakes, monkeypatch, value, said):
    """It names the variable or file and the place; nothing else is said about the missing value."""
    monkeypatch.delenv("NOPE", raising=False)
    assert mistakes(f"server:\n  port: '{value}'\n") == [f"2: server.port: {said}"]
    assert mistakes(function(f"{{url: '{value}'}}")) == [f"2: functions.f.url: {said}"]
    assert mistakes(mapping(f"BatchSize: '{value}'")) == [f"4: event_source_mappings[0].BatchSize: {said}"]


def test_files_that_are_no_text_or_too_large_are_mistakes(mistakes, tmp_path):
    """A wrong path to a secret does not fill the memory."""
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "large").write_bytes(b"x" * (1024 * 1024 + 1))
    assert "is not UTF-8 text" in mistakes("store: '${file:binary}'")[0]
    assert "is larger than 1048576 bytes" in mistakes("store: '${file:large}'")[0]
    assert "cannot be read" in mistakes('store: "${file:a\\0b}"')[0]


def test_a_variable_that_is_no_text_is_a_mistake(mistakes, monkeypatch):
    """Bytes in the environment cannot become a header or a token."""
    monkeypatch.setenv("BYTES", os.fsdecode(b"\xff"))
    assert mistakes("store: '${BYTES:-x}'") == ["1: store: the variable BYTES is not UTF-8 text; set it to text"]


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_ten_different_mistakes_are_ten_lines(mistakes, monkeypatch):
    """All at once, each with its line, its key and what would be right."""
    monkeypatch.delenv("TOKEN", raising=False)
    text = f"""\
aws: {{regoin: eu-west-1}}
functions:
  orders:
    url: ftp://127.0.0.1/
    timeout_seconds: 901
    auth: {{type: bearer, token: "${{TOKEN}}"}}
event_source_mappings:
  - EventSourceArn: {KINESIS}
    FunctionName: orders
    batchSize: 5
  - EventSourceArn: {SQS}
    FunctionName: orders
    BatchSize: 100
    BatchSize: 10
  - EventSourceArn: {SQS}
    FunctionName: orders
server: {{port: true}}
"""
    url = "give a URL such as http://127.0.0.1:8080/path"
    start = "give TRIM_HORIZON (all that is retained), LATEST, or for Kinesis AT_TIMESTAMP"
    window = "Maximum batch window in seconds must be greater than 0 if maximum batch size is greater than 10"
    sizes = "give MaximumBatchingWindowInSeconds 1 or more, or a BatchSize of at most 10"
    change = "take one of them out or change it"
    assert mistakes(text) == [
        '1: aws.regoin: is not a known key; did you mean "region"?',
        f'4: functions.orders.url: "ftp://127.0.0.1/" has no scheme http:// or https://; {url}',
        "5: functions.orders.timeout_seconds: 901 is too large; give a number from 1 to 900",
        "6: functions.orders.auth.token: the variable TOKEN is not set; set it, or write ${TOKEN:-default}",
        f"8: event_source_mappings[0].StartingPosition: is missing; {start}",
        '10: event_source_mappings[0].batchSize: is not a known key; did you mean "BatchSize"?',
        f"13: event_source_mappings[1].BatchSize: {window}; {sizes}",
        "14: event_source_mappings[1].BatchSize: the key is already given on line 13; take one of them out",
        f"15: event_source_mappings[2]: has the same source and function as the mapping on line 11; {change}",
        "17: server.port: true is a boolean; give a whole number from 0 to 65535",
    ]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("functions: []", "1: functions: is a list; give a mapping of names to values"),
        ("event_source_mappings: {a: 1}", "1: event_source_mappings: is a mapping; give a list; each item: a mapping"),
        ("event_source_mappings: [1]", "1: event_source_mappings[0]: 1 is a number; give a mapping with the keys"),
        ("event_source_mappings: [null]", "1: event_source_mappings[0]: is empty; give a mapping with the keys"),
        ("hello", '1: the file: "hello" is text; give a mapping with the keys aws, functions'),
        ("[1, 2]", "1: the file: is a list; give a mapping"),
        ("stroe: x", '1: stroe: is not a known key; did you mean "store"?'),
        ("'a.b': x", "1: 'a.b': is not a known key; the known keys are aws, functions"),
        ("aws: {region: EU West}", '1: aws.region: "EU West" has the wrong form; give a Region such as eu-west-1'),
        ("aws: {endpoint_urls: {kinesys: http://x/}}", 'is not a known key; did you mean "kinesis"?'),
        ("aws: {endpoint_url: 127.0.0.1:4566}", "has no scheme http:// or https://"),
        ("aws: {endpoint_url: 'http://'}", '"http://" is not a URL'),
        ("aws: {endpoint_url: 'http://x:99999/'}", '"http://x:99999/" is not a URL'),
        ("aws: {endpoint_url: 'http://[x/'}", '"http://[x/" is not a URL'),
        ("aws: {endpoint_url: 'http://x/ y'}", '"http://x/ y" is not a URL'),
        (function("{}"), "2: functions.f: has neither url nor lambda; give one of them"),
        (function("{url: 'http://x/', lambda: f}"), "2: functions.f: has both url and lambda; give one of them"),
        (function("{url: 'http://x/#a'}"), "has a #fragment"),
        (function("{url: 'http://x/', timeout_seconds: 0}"), "0 is too small; give a number from 1 to 900"),
        (function("{url: 'http://x/', timeout_seconds: .nan}"), "NaN is too small; give a number from 1 to 900"),
        (function("{url: 'http://x/', timeout_seconds: .inf}"), "Infinity is too large"),
        (function("{url: 'http://x/', timeout_seconds: '30'}"), '"30" is text; give a number from 1 to 900'),
        (function("{url: 'http://x/', max_concurrency: 0}"), "0 is too small; give a whole number from 1 up"),
        (function("{url: 'http://x/', max_invocations_per_second: 0}"), "0 is too small; give a number from 0.001 to"),
        (function("{url: 'http://x/', protocol: grpc}"), '"grpc" is not known; give one of http, rie'),
        (function("{url: 'http://x/', headers: {User-Agent: x}}"), "the key is a header that esm-poller sets itself"),
        (function("{url: 'http://x/', headers: {X-Poller-Try: x}}"), "the key is a header that esm-poller sets itself"),
        (function("{url: 'http://x/', headers: {'a b': x}}"), "functions.f.headers.'a b': the key has the wrong form"),
        (function("{url: 'http://x/', headers: {A: x, a: y}}"), "headers.a: is the same header as A; take one out"),
        (
            function("{url: 'http://x/', headers: {A: 5}}"),
            "2: functions.f.headers.A: is a number; give text, in quotes",
        ),
        (function("{url: 'http://x/', auth: {token: x}}"), "2: functions.f.auth.type: is missing; give a mapping"),
        (function("{url: 'http://x/', auth: {type: digest}}"), "is not known; give one of bearer, basic, sigv4"),
        (function("{url: 'http://x/', auth: {type: bearer}}"), "2: functions.f.auth.token: is missing; give text"),
        (function("{url: 'http://x/', auth: {type: bearer, token: ''}}"), "functions.f.auth.token: is empty"),
        (function("{url: 'http://x/', auth: {type: basic, username: 'a:b', password: c}}"), "without a colon"),
        (
            function("{url: 'http://x/', headers: {authorization: x}, auth: {type: bearer, token: y}}"),
            "functions.f.headers.authorization: is given beside auth",
        ),
        (function("{lambda: f, headers: {A: b}}"), "2: functions.f.headers: is only for a function with url"),
        (function("{lambda: 'a b'}"), '2: functions.f.lambda: "a b" has the wrong form; give a function name'),
        (function("{url: 'https://x/', tls: {cert: a}}"), "2: functions.f.tls: has only one of cert and key"),
        (function("{url: 'http://x/', tls: {ca: a}}"), "2: functions.f.tls: has no effect on an http:// url"),
        ("functions: {'a.b': {url: 'http://x/'}}", "1: functions.'a.b': the key has the wrong form; give a function"),
        ("store: /var/lib/x.db", '1: store: "/var/lib/x.db" is not a store; give sqlite:///ABSOLUTE/PATH'),
        ("store: sqlite://x.db", "is not a store"),
        ("store: 'sqlite:///'", "is not a store"),
        ("store: sqlite:x.db", "is not a store"),
        ("server: {port: 65536}", "1: server.port: 65536 is too large; give a whole number from 0 to 65535"),
        ("server: {host: 'http://x'}", '1: server.host: "http://x" is not a host; give a host name or an IP address'),
        ("server: {host: '127.0.0.1:80'}", "is not a host"),
        ("server: {auth: {type: bearer, token: ''}}", "1: server.auth.token: is empty; give text"),
        ("server: {auth: [{type: bearer}]}", "1: server.auth[0].token: is missing"),
        ("server: {auth: {type: sigv4}}", "1: server.auth.access_keys: is missing; give a mapping of names to values"),
        (
            "server: {auth: {type: sigv4, access_keys: {}}}",
            "1: server.auth.access_keys: has no keys; give at least one",
        ),
        (
            "server: {auth: [{type: sigv4, access_keys: {AK: ''}}]}",
            "1: server.auth[0].access_keys: is empty; give text",
        ),
        ("server: {auth: {type: sigv4, access_keys: {AK: }}}", "1: server.auth.access_keys: is empty; give text"),
        (
            "server: {auth: {type: sigv4, access_keys: {'a/b': s}}}",
            "access_keys: the key has the wrong form; give an access",
        ),
        ("server: {auth: {type: sigv4, access_keys: [AK]}}", "1: server.auth.access_keys: is a list"),
        ("log: {level: INFO}", '"INFO" is not known; did you mean "info"?'),
        ("log: {payloads: 1}", "1: log.payloads: 1 is a number; give true or false"),
        ("retry: {initial_backoff_seconds: 9, maximum_backoff_seconds: 2}", "9 is above the maximum"),
        ("limits: {buffer_bytes: 1000}", "1000 is too small; give a whole number from 1048576 up"),
        ("limits: {buffer_bytes: 1048576.0}", "1048576.0 is a number; give a whole number from 1048576 up"),
        ("checkpoint_interval_seconds: 0", "0 is too small; give a number from 0.01 to 60"),
        ("shutdown_grace_seconds: -1", "-1 is too small"),
        (
            mapping("Options: {CircuitBreaker: true}\n    StartingPosition: LATEST", KINESIS),
            "4: event_source_mappings[0].Options.CircuitBreaker: Options.CircuitBreaker is only for SQS queues; take it",
        ),
        (
            mapping("ProvisionedPollerConfig: {}"),
            "4: event_source_mappings[0].ProvisionedPollerConfig: Either MinimumPollers or MaximumPollers are required",
        ),
        (mapping("UUID: abc"), '4: event_source_mappings[0].UUID: "abc" has the wrong form; give a UUID such as'),
        (mapping("Enabled: 'yes'"), '4: event_source_mappings[0].Enabled: "yes" is text; give true or false'),
        (
            mapping("BatchSize: 1", "arn:aws:s3:::b"),
            '2: event_source_mappings[0].EventSourceArn: "arn:aws:s3:::b" is not the ARN of a Kinesis stream',
        ),
        (
            mapping("StartingPosition: LATEST", "arn:aws:dynamodb:eu-west-1:123456789012:table/t"),
            "table/t\" is a table's ARN; give the ARN of its stream, LatestStreamArn of DescribeTable",
        ),
        (
            mapping("StartingPosition: AT_TIMESTAMP\n    StartingPositionTimestamp: 2030-01-01", KINESIS),
            '5: event_source_mappings[0].StartingPositionTimestamp: "2030-01-01" is in the future',
        ),
        (
            mapping("BisectBatchOnFunctionError: true\n    StartingPosition: LATEST", KINESIS),
            "batches are never split; use FunctionResponseTypes: [ReportBatchItemFailures]",
        ),
        ("event_source_mappings: [{FunctionName: f}]", "1: event_source_mappings[0].EventSourceArn: is missing"),
        (f"event_source_mappings: [{{EventSourceArn: '{SQS}'}}]", "event_source_mappings[0].FunctionName: is missing"),
    ],
)
def test_one_mistake(mistakes, text, mistake):
    """Each rule of the file: one line with the place, what is wrong and what would be right."""
    (found,) = mistakes(text)
    assert mistake in found
    assert re.match(r"\d+: \S.*: .+; .+|\d+: \S.*: .+\?$", found), found


@pytest.mark.parametrize("value", ["false", "'${UNSET:-no}'", ""])
def test_payloads_are_not_logged_unless_asked_for(load, monkeypatch, value):
    """Only true asks for them."""
    monkeypatch.delenv("UNSET", raising=False)
    assert load(f"log: {{level: debug, payloads: {value}}}").log.payloads is False


def test_logged_payloads_need_the_level(load):
    """Asked for where they would not show, that is warned about."""
    assert load("log: {level: debug, payloads: true}").warnings == ()
    settings = load("log: {payloads: true}")
    assert settings.log.payloads
    assert settings.warnings == ("poller.yaml:1: log.payloads: has no effect unless log.level is debug",)


def test_the_certificate_knows_its_place(load):
    """Errors about its files name the line; where it stands does not make it another one."""
    tls = load("log: {level: info}\nserver:\n  port: 1\n  tls: {cert: a.pem, key: b.pem}").server.tls
    assert tls == ServerTls("a.pem", "b.pem")
    assert tls.place == "poller.yaml:4"


def test_tracing_needs_its_extra(load, mistakes, monkeypatch):
    """Without its packages a config with tracing is refused, with the command that installs them."""
    text = "tracing: {endpoint: 'https://traces.example.com/?key=s3cret-key'}"
    settings = load(text)
    assert settings.tracing == TracingSettings("https://traces.example.com/?key=s3cret-key")
    assert "s3cret" not in repr(settings)
    assert "key=s3cret-key" in settings.secrets()
    assert load(ORDERS).tracing is load("tracing: null").tracing is None

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    (mistake,) = mistakes(text)
    assert mistake == (
        "1: tracing: needs opentelemetry-sdk, which is not installed here; run pip install 'esm-poller[tracing]' "
        "or take tracing out"
    )
    assert load(ORDERS).tracing is None


def test_one_emulator_has_one_rate_whatever_its_names(mistakes, load):
    """Its names share the one invocation that it takes at a time, so they share the line for it."""
    text = "functions:\n  a: {url: 'http://x/', protocol: rie}\n  b: {url: 'http://x/', protocol: %s%s}\n"
    (mistake,) = mistakes(text % ("rie", ", max_invocations_per_second: 5"))
    assert mistake == (
        "3: functions.b.max_invocations_per_second: is another one than that of functions.a, which has the same url "
        "and takes one invocation at a time; give both the same"
    )
    assert len(load(text % ("rie", "")).functions) == 2
    assert len(load(text % ("http", ", max_invocations_per_second: 5")).functions) == 2


@pytest.mark.parametrize(
    "url",
    [
        "dynamodb://t", "dynamodb://t?x=1", "dynamodb://table?create=yes", "dynamodb://table?region=", "dynamodb://",
        "dynamodb://table?create=true&create=true", "dynamodb://table?endpoint_url=ftp://x", "dynamodb://table/path",
    ],
)  # fmt: skip
def test_what_names_no_table_is_no_store(mistakes, url):
    """With the form that it should have."""
    [found] = mistakes(f"store: '{url}'")
    assert found.endswith("; give dynamodb://TABLE[?region=REGION&endpoint_url=URL&create=true]")


def test_a_table_is_a_store(load):
    """Its saves are paid for, so they are further apart; what is absent comes from `aws`."""
    found = load("store: dynamodb://table\nfunctions: {f: {url: 'http://x/'}}\n")
    assert found.store == DynamoStoreSettings("dynamodb://table", "table")
    assert (found.checkpoint_interval, found.lease_duration) == (1.0, 10.0)
    url = "dynamodb://table?region=eu-west-1&endpoint_url=http%3A%2F%2F127.0.0.1%3A1&create=true"
    found = load(
        f"store: {url}\ncheckpoint_interval_seconds: 3\nlease_seconds: 5\nfunctions: {{f: {{url: 'http://x/'}}}}\n"
    )
    assert found.store == DynamoStoreSettings(url, "table", "eu-west-1", "http://127.0.0.1:1", True)
    assert (found.checkpoint_interval, found.lease_duration) == (3.0, 5.0)


def test_duplicate_uuids_are_refused(mistakes):
    """Given twice, in any case, or given what another one derives."""
    first = f"event_source_mappings:\n  - {{EventSourceArn: '{SQS}', FunctionName: a, UUID: {UUID}}}\n"
    second = f"  - {{EventSourceArn: '{SQS}', FunctionName: b, UUID: {UUID.upper()}}}\n"
    assert mistakes(first + second) == [
        "3: event_source_mappings[1].UUID: has the same UUID as the mapping on line 2; take one of them out or change it"
    ]
    derived = derived_uuid(SQS, "arn:aws:lambda:eu-west-1:123456789012:function:b")
    clash = first.replace(UUID, derived) + f"  - {{EventSourceArn: '{SQS}', FunctionName: b}}\n"
    assert len(mistakes(clash)) == 1


def test_the_same_function_by_name_and_by_arn_is_a_duplicate(mistakes):
    """One mapping per source and function, however it is written; another qualifier is another function."""
    arn = "arn:aws:lambda:eu-west-1:123456789012:function:a"
    item = "  - {{EventSourceArn: '{}', FunctionName: '{}'}}\n"
    text = "event_source_mappings:\n" + item.format(SQS, "a") + item.format(SQS, arn)
    assert "3: event_source_mappings[1]: has the same source and function as the mapping on line 2" in mistakes(text)[0]


def test_a_given_uuid_takes_the_place_of_the_derived_one(load):
    """Two mappings may swap the UUIDs that would be derived, as after a rename that keeps positions."""
    derived = [derived_uuid(SQS, f"arn:aws:lambda:eu-west-1:123456789012:function:{name}") for name in "ab"]
    item = "  - {{EventSourceArn: '{}', FunctionName: {}, UUID: {}}}\n"
    text = "event_source_mappings:\n" + item.format(SQS, "a", derived[1]) + item.format(SQS, "b", derived[0])
    assert [declared.uuid for declared in load(text).mappings] == derived[::-1]


def test_another_qualifier_is_another_function(load):
    """semantics.md 1.7: base function and alias mappings on one source coexist."""
    item = "  - {{EventSourceArn: '{}', FunctionName: '{}'}}\n"
    assert len(load("event_source_mappings:\n" + item.format(SQS, "a") + item.format(SQS, "a:live")).mappings) == 2


@pytest.mark.parametrize(
    "text",
    [
        function("{url: 'http://x/', headers: {X-Api-Key: \"hunter2\\nx\"}}"),
        function("{url: 'http://x/', headers: [hunter2]}"),
        function("{url: 'http://x/', headers: hunter2}"),
        function("{url: 'http://x/', auth: hunter2}"),
        function("{url: 'http://x/', auth: {type: hunter2}}"),
        function("{url: 'http://x/', auth: {type: bearer, tokn: hunter2}}"),
        function("{url: 'http://x/', auth: {type: bearer, token: [hunter2]}}"),
        function("{url: 'http://x/', auth: {type: basic, username: 'hunter2:', password: x}}"),
        function("{url: 'http://user:hunter2@x/'}"),
        function("{url: 'ftp://x/?code=hunter2'}"),
        function("{url: 'http://x/', api_key: hunter2}"),
        'server: {auth: {type: bearer, token: "hunter2\\r"}}',
        "server: {auth: {type: sigv4, access_keys: {hunter2/: AKID}}}",
        "server: {auth: {type: sigv4, access_keys: {hunter2: }}}",
        "server: {auth: {type: sigv4, access_keys: {hunter2: '${UNSET}'}}}",
        "server: {auth: {type: sigv4, access_keys: {hunter2: a, hunter2: a}}}",
        "server: {auth: {type: sigv4, access_keys: hunter2}}",
        'server: {auth: {type: sigv4, access_keys: {AKID: "hunter2\\n"}}}',
        "server: {port: '${SECRET}'}",
        "server: {host: 'x y ${SECRET}'}",
        "log: {level: '${SECRET}'}",
        "store: '${file:secret}'",
        "aws: {region: '${UNSET:-HUNTER2 hunter2}'}",
        mapping("BatchSize: '${SECRET}'"),
        mapping("StartingPosition: '${SECRET}'", KINESIS),
        mapping("StartingPosition: AT_TIMESTAMP", "'${STREAM}'"),
        mapping("MetricsConfig: {Metrics: ['${SECRET}']}"),
        mapping("Tags: {a: ['${SECRET}']}"),
        "event_source_mappings: ['${SECRET}']",
        "'${SECRET}'",
    ],
)
def test_no_secret_is_in_a_mistake(mistakes, monkeypatch, tmp_path, text):
    """Values of headers and credentials, URL passwords and queries, and all that came through a reference."""
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("STREAM", "arn:aws:dynamodb:eu-west-1:123456789012:table/hunter2/stream/1")
    monkeypatch.delenv("UNSET", raising=False)
    (tmp_path / "secret").write_text("hunter2")
    assert "hunter2" not in "\n".join(mistakes(text))


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        (
            "ordres",
            '"ordres" is not under functions and means a real Lambda function; did you mean "orders"?',
        ),
        (
            "arn:aws:lambda:eu-west-1:999999999999:function:orders",
            'means a real Lambda function of another account than the source; write "orders" for the one under',
        ),
    ],
)
def test_a_name_that_looks_like_a_configured_one_is_warned_about(load, name, warning):
    """Legal, because it is a real Lambda function then; but the user probably meant something else."""
    settings = load(f"{ORDERS}event_source_mappings:\n  - EventSourceArn: {SQS}\n    FunctionName: {name}\n")
    (found,) = settings.warnings
    assert found.startswith("poller.yaml:4: event_source_mappings[0].FunctionName: ")
    assert warning in found


@pytest.mark.parametrize("name", ["orders", "orders:live", "something-else"])
def test_other_names_are_not_warned_about(load, name):
    """Configured names and names that are like none of them."""
    text = f"{ORDERS}event_source_mappings: [{{EventSourceArn: '{SQS}', FunctionName: '{name}'}}]"
    assert load(text).warnings == ()


# --- the text itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "1: the file is empty; give at least functions and event_source_mappings"),
        ("# nothing\n", "1: the file is empty; give at least functions and event_source_mappings"),
        ("~", "1: the file is empty; give at least functions and event_source_mappings"),
        ("a: 1\nb: [1, 2\nc: 3\n", "3: not valid YAML: "),
        ("a:\n\tb: 1\n", "2: not valid YAML: "),
        ("functions:\n  f: {url: ${URL}, timeout_seconds: 5}\n", 'put "${...}" in quotes'),
        ("a: 1\n---\nb: 2\n", "2: a second document starts here; give one document in a file"),
        ("a: !!python/object:os.system x\n", "1: the tag tag:yaml.org,2002:python/object:os.system is not supported"),
        ("a: !secret\n  b: 1\n", "1: the tag !secret is not supported; take it out"),
        ("a: *x\n", "1: *x has no anchor before it; write &x first"),
        ("a: &x [*x]\n", "1: *x has no anchor before it; write &x first"),
        ("? [a, b]\n: c\n", "1: a key must be text, not a list or mapping; write name: value"),
        ("functions: {<<: 5}\n", "1: << needs a mapping or a list of mappings; give *ANCHOR of one"),
        (f"{'k' * 257}: 1\n", "1: a key is longer than 256 characters; make it shorter"),
        ("a: 1\nb: \x00\n", "2: a character that YAML does not allow, '\\x00'; take it out"),
        (b"a: 1\nb: \xff\n", "2: the file is not UTF-8 text; save it as UTF-8"),
        ("[" * 40 + "]" * 40, "1: values are nested deeper than 32 levels; make the file flatter"),
        ("[" * 100_000, "1: "),
    ],
)
def test_a_mistake_of_the_text_is_one_line(mistakes, text, mistake):
    """With its line number and without a traceback."""
    (found,) = mistakes(text)
    assert mistake in found
    assert "\n" not in found


def test_a_bomb_of_aliases_is_refused_before_it_is_expanded(mistakes):
    """Ten levels of ten aliases are ten thousand million values; none of them is made."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (found,) = mistakes("\n".join(lines))
    assert f"more than {yamldoc.MAX_VALUES} values, aliases expanded" in found


def test_a_bomb_of_merges_is_refused(mistakes):
    """The same through `<<`."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    assert f"more than {yamldoc.MAX_VALUES} values" in mistakes("\n".join(lines))[0]


def test_a_file_that_is_too_large_is_refused(load, monkeypatch):
    """Its size is bounded before it is parsed."""
    monkeypatch.setattr(config, "MAX_FILE_BYTES", 100)
    assert load("log: {}" + " " * 93) == Settings("poller.yaml")
    with pytest.raises(ConfigError, match=r"^poller.yaml: the file is larger than 100 bytes; split it up$"):
        load("#" * 101)


def test_numbers_that_yaml_cannot_make_stay_text(mistakes):
    """Five thousand digits and `0x_` look like numbers and are none."""
    assert len(mistakes(f"server: {{port: {'9' * 5000}}}")) == 1
    assert mistakes("server: {port: 0x_}")[0].startswith('1: server.port: "0x_" is text')


@pytest.mark.parametrize("path", ["missing.yaml", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_a_config_error(load, path):
    """No traceback for a wrong path."""
    with pytest.raises(ConfigError, match=r"cannot be read: .+; give a readable file with -c FILE"):
        config.load(path)


KEYS = """
    aws region endpoint_url endpoint_urls kinesis functions f url lambda headers auth type token tls cert server port
    host log level store retry initial_backoff_seconds maximum_backoff_seconds limits event_source_mappings UUID
    EventSourceArn FunctionName StartingPosition StartingPositionTimestamp BatchSize ScalingConfig FilterCriteria Filters
    DestinationConfig OnFailure Destination Options access_keys tracing timeout_seconds << 'a.b' ~ '' 5
"""
keys = st.sampled_from(KEYS.split())
yaml_texts = st.recursive(
    st.sampled_from(
        [
            "x", "5", "-1", "true", "~", "1e999", "2026-13-45", "'${NOPE}'", "'${HOME}'", "'${file:x}'", "*a", "&a y",
            f"'{SQS}'", f"'{KINESIS}'", "TRIM_HORIZON", "http://x/", "'http://[/'", "sqlite:./x", "bearer", "!!int x",
            "'dynamodb://['", "!!bool maybe", "!!float x", "0b_", "190:20:30", "=", "<<",
        ]
    ),
    lambda inner: st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
    | st.lists(st.tuples(keys, inner), max_size=6).map(
        lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"
    ),
    max_leaves=30,
)  # fmt: skip
sections = st.lists(st.tuples(keys, yaml_texts), min_size=1, max_size=8).map(
    lambda items: "\n".join(f"{key}: {value}" for key, value in items)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(sections | yaml_texts | st.text() | st.binary())
def test_nothing_but_a_config_error_is_raised(load, text):
    """Whatever the file holds, the answer is settings or mistakes with a line each."""
    try:
        loaded = load(text.encode(errors="replace") if isinstance(text, str) else text)
    except ConfigError as error:
        mistakes = error.mistakes
    else:
        config.resolved(loaded)
        return
    assert all(re.match(r"poller\.yaml:\d+: .", mistake) for mistake in mistakes)


WHOLE = {
    "aws": {"region": "eu-west-1", "endpoint_url": "http://x/", "endpoint_urls": {"sqs": "http://x/"}},
    "functions": {
        "f": {
            "url": "https://x/",
            "timeout_seconds": 5,
            "headers": {"A": "b"},
            "auth": {"type": "basic", "username": "u", "password": "p"},
            "tls": {"ca": "a", "cert": "b", "key": "c"},
        },
        "g": {"lambda": "g", "max_concurrency": 2, "max_invocations_per_second": 0.5},
    },
    "event_source_mappings": [
        {
            "EventSourceArn": KINESIS,
            "FunctionName": "f",
            "StartingPosition": "AT_TIMESTAMP",
            "StartingPositionTimestamp": "2026-01-01",
            "DestinationConfig": {"OnFailure": {"Destination": ""}},
            "FunctionResponseTypes": ["ReportBatchItemFailures"],
        },
        {
            "EventSourceArn": SQS,
            "FunctionName": "g",
            "BatchSize": 5,
            "ScalingConfig": {"MaximumConcurrency": 2},
            "Options": {"CircuitBreaker": False, "ScaleUpPerMinute": 60},
        },
    ],
    "store": "sqlite:./x",
    "server": {"host": "::1", "port": 5, "auth": [{"type": "bearer", "token": "t"}]},
    "log": {"level": "info", "payloads": False},
    "retry": {"initial_backoff_seconds": 1, "maximum_backoff_seconds": 2},
    "limits": {"buffer_bytes": 2_000_000},
    "shutdown_grace_seconds": 5,
}
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(
        ["${NOPE}", "${HOME}", "${file:x}", "${", SQS, KINESIS, "http://[", "dynamodb://[", "sigv4", "f"]
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def damaged(draw):
    """A whole file with one to four of its values replaced, taken out or joined by a strange key."""
    tree = json.loads(json.dumps(WHOLE))
    for _ in range(draw(st.integers(1, 4))):
        places = [tree]
        for place in places:
            places += [
                item
                for item in (place.values() if isinstance(place, dict) else place)
                if isinstance(item, dict | list) and item
            ]
        place = draw(st.sampled_from(places))
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        match draw(st.sampled_from(["replace", "remove", "insert"])):
            case "remove" if len(place) > 1:
                del place[key]
            case "insert" if isinstance(place, dict):
                place[draw(keys)] = draw(junk)
            case _:
                place[key] = draw(junk)
    return json.dumps(tree)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=300)
@given(damaged())
def test_a_damaged_file_raises_nothing_but_a_config_error(load, text):
    """A file that is almost right gets past the first checks, and still only settings or mistakes come out."""
    try:
        loaded = load(text)
    except ConfigError as error:
        mistakes = error.mistakes
    else:
        config.resolved(loaded)
        return
    assert all(re.match(r"poller\.yaml:1: .+", mistake) for mistake in mistakes)


def test_the_undamaged_file_loads(load):
    """What the damage is done to has no mistake of its own."""
    assert len(load(json.dumps(WHOLE)).mappings) == 2


def test_a_thousand_mappings_load(load):
    """A file of the size that one daemon carries."""
    item = "  - {{EventSourceArn: '{}-{}', FunctionName: orders, BatchSize: 5}}\n"
    text = ORDERS + "event_source_mappings:\n" + "".join(item.format(SQS, number) for number in range(1000))
    assert len({declared.uuid for declared in load(text).mappings}) == 1000


# --- finding and printing -------------------------------------------------------------------------------------------


def test_the_file_is_looked_for_in_order(tmp_path, monkeypatch):
    """interface.md: -c, $POLLER_CONFIG, /etc/poller/poller.yaml, ./config/poller.yaml; else all that was tried."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "PLACES", (str(tmp_path / "etc.yaml"), "config/poller.yaml"))
    monkeypatch.delenv("POLLER_CONFIG", raising=False)
    with pytest.raises(ConfigError, match=r"\$POLLER_CONFIG is not set and none of .*etc\.yaml, config/poller\.yaml"):
        config.find_path(None)
    Path("config").mkdir()
    Path("config/poller.yaml").touch()
    assert config.find_path(None) == "config/poller.yaml"
    Path("etc.yaml").touch()
    assert config.find_path(None) == str(tmp_path / "etc.yaml")
    monkeypatch.setenv("POLLER_CONFIG", "env.yaml")
    assert config.find_path(None) == "env.yaml"
    assert config.find_path("option.yaml") == "option.yaml"


def test_the_places_are_those_of_the_interface():
    """interface.md, Command line."""
    assert config.PLACES == ("/etc/poller/poller.yaml", "config/poller.yaml")


def test_resolved_mappings_are_readable_and_without_secrets(load, monkeypatch):
    """One block for each mapping, defaults in, in the file's order; queries of URLs are masked."""
    monkeypatch.setenv("SECRET", "hunter2")
    text = (
        "functions: {f: {url: 'https://x/y?code=hunter2', headers: {A: '${SECRET}'},"
        " auth: {type: bearer, token: '${SECRET}'}}}\n"
        f"event_source_mappings:\n  - {{UUID: {UUID}, EventSourceArn: '{SQS}', FunctionName: f}}\n"
        f"  - {{EventSourceArn: '{SQS}', FunctionName: 'g:live'}}\n"
    )
    loaded = load(text)
    first, second = config.resolved(loaded).split("\n\n")
    assert first.splitlines() == [
        f"mapping {UUID}",
        "  declared: poller.yaml:3",
        f"  source: sqs {SQS}",
        "  function: arn:aws:lambda:eu-west-1:123456789012:function:f -> https://x/y?***",
        "  Enabled: true",
        "  BatchSize: 10",
        "  MaximumBatchingWindowInSeconds: 0",
        "  FunctionResponseTypes: []",
    ]
    assert "function:g:live -> Lambda function g:live" in second
    assert "hunter2" not in repr(loaded).replace("?code=hunter2", "")
    assert config.resolved(load("log: {level: info}")) == "poller.yaml declares no event source mappings"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path, monkeypatch, tmp_path):
    """config/: no mistake, no warning, and at least one mapping each."""
    secret = tmp_path / "orders"
    secret.write_text("token\n")
    text = path.read_text().replace("/run/secrets/orders", str(secret))
    for name in ("ORDERS_API_KEY", "STOCK_PASSWORD", "POLLER_API_TOKEN"):
        monkeypatch.setenv(name, "secret")
    copy = tmp_path / path.name
    copy.write_text(text)
    loaded = config.load(str(copy))
    assert loaded.mappings
    assert loaded.warnings == ()


def test_the_main_example_shows_all_three_sources():
    """config/poller.yaml: three sources, one HTTP target, a local AWS."""
    loaded = config.load(str(CONFIG / "poller.yaml"))
    kinds = [declared.document["EventSourceArn"].split(":")[2] for declared in loaded.mappings]
    assert kinds == ["kinesis", "dynamodb", "sqs"]
    assert loaded.aws.endpoint("sqs") == "http://127.0.0.1:4566"
    assert {declared.document["FunctionName"] for declared in loaded.mappings} == set(loaded.functions)


def test_what_came_through_references_is_a_secret(tmp_path, monkeypatch):
    """Also in a URL's path, where webhooks have theirs: masked in logs and in what `validate` prints."""
    monkeypatch.setenv("HOOK", "s3cr3t-hook-token")
    monkeypatch.setenv("PORT", "8080")
    (tmp_path / "token").write_text("t0ken-of-a-file\n")
    path = tmp_path / "poller.yaml"
    path.write_text(
        "functions:\n"
        "  f: {url: 'http://127.0.0.1:${PORT}/hooks/${HOOK}', auth: {type: bearer, token: '${file:"
        + str(tmp_path)
        + "/token}'}}\n"
        "event_source_mappings:\n"
        "  - {EventSourceArn: 'arn:aws:sqs:eu-west-1:123456789012:q', FunctionName: f}\n"
    )
    settings = config.load(str(path))
    assert settings.secrets() == {"s3cr3t-hook-token", "t0ken-of-a-file"}
    assert "s3cr3t" not in config.resolved(settings)
    assert "s3cr3t" not in repr(settings)
