"""Replies judged, payloads joined, keys derived."""

import json

import pytest

from poller.core.model import Delivered, Failed, Partial, Record, Reply, ReplyStatus, Throttled
from poller.core.replies import idempotency_key, judge, payload, payload_bytes

RECORDS = tuple(Record(name, "k", 0.0, json.dumps({"n": name}).encode()) for name in ("10", "11", "12"))


def answer(body: str, *, ordered: bool = True, report: bool = True):
    return judge(Reply(ReplyStatus.OK, body.encode()), RECORDS, report_failures=report, ordered=ordered)


def failures(*items) -> str:
    return json.dumps({"batchItemFailures": list(items)})


def named(name) -> dict:
    return {"itemIdentifier": name}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    "body",
    ["", "null", '""', "[]", "{}", failures(), '{"batchItemFailures": null}', ' {"x": 1} ', '"ok"', "42", "true"],
)
def test_nothing_reported_is_success(body: str, ordered: bool) -> None:
    """Null, empty string, empty list, empty object, no or empty or null failures: success, streams and queues alike."""
    assert answer(body, ordered=ordered) == Delivered()


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        failures(named("")),
        failures(named(None)),
        failures({"foo": 123}),
        failures({"foo": None}),
        failures({}),
        failures(named(123)),
        failures(named(10)),
        failures(named("99")),
        failures(named("10"), named("99")),
        failures("10"),
        failures(None),
        '{"batchItemFailures": {}}',
        '{"batchItemFailures": "10"}',
        '{"batchItemFailures": 1}',
        "[1]",
        "not json",
        "{",
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_anything_malformed_fails_the_whole_batch(body: str, ordered: bool) -> None:
    """One malformed item, an id that is not in the batch, or no JSON: every record again."""
    assert isinstance(answer(body, ordered=ordered), Failed)


def test_streams_go_on_at_the_lowest_named() -> None:
    """The numerically lowest sequence is the checkpoint; the others carry no meaning."""
    assert answer(failures(named("12"), named("11"))) == Partial(index=1)
    assert answer(failures(named("10"))) == Partial(index=0)


def test_of_equal_ids_the_first_is_named() -> None:
    """A source that repeats a sequence number must not make us skip a record."""
    twice = (RECORDS[0], RECORDS[0], RECORDS[1])
    reply = Reply(ReplyStatus.OK, failures(named("10")).encode())
    assert judge(reply, twice, report_failures=True, ordered=True) == Partial(index=0)


def test_queues_keep_exactly_what_was_named() -> None:
    """No order is inferred, not even on FIFO queues."""
    assert answer(failures(named("12"), named("10"), named("12")), ordered=False) == Partial(
        failed=frozenset(("10", "12"))
    )


def delayed(name, seconds) -> dict:
    return {"itemIdentifier": name, "delaySeconds": seconds}


def test_a_queue_s_message_may_say_when_it_wants_to_come_back() -> None:
    """Seconds, whole or not, for that message only; null says nothing, and of two the last one counts."""
    body = failures(delayed("10", 0), named("11"), delayed("12", 7))
    everything = frozenset(("10", "11", "12"))
    assert answer(body, ordered=False) == Partial(failed=everything, delays=(("10", 0.0), ("12", 7.0)))
    assert answer(failures(delayed("10", 43_200), delayed("12", 0.5)), ordered=False).delays == (
        ("10", 43_200.0),
        ("12", 0.5),
    )
    assert answer(failures(delayed("10", None)), ordered=False) == Partial(failed=frozenset(("10",)))
    again = failures(delayed("10", 5), delayed("10", 9), delayed("10", None), named("10"))
    assert answer(again, ordered=False) == Partial(failed=frozenset(("10",)), delays=(("10", 9.0),))


@pytest.mark.parametrize(
    "seconds", [-1, -0.001, 43_200.001, 43_201, 10**30, True, False, "5", "", [], {}, float("nan"), float("inf")]
)
def test_a_delay_that_is_none_fails_the_whole_batch(seconds) -> None:
    """A wrong delaySeconds is a malformed answer, also beside good ones; the text says which member."""
    for body in (failures(delayed("10", seconds)), failures(delayed("11", 5), delayed("10", seconds))):
        outcome = answer(body, ordered=False)
        assert outcome == Failed("batchItemFailures has a delaySeconds that is no number from 0 to 43200")


@pytest.mark.parametrize("seconds", [5, -1, True, "5", None])
def test_streams_know_no_delay(seconds) -> None:
    """As AWS does with members that it does not know: not looked at."""
    assert answer(failures(delayed("11", seconds))) == Partial(index=1)


def test_without_the_feature_the_body_is_not_read() -> None:
    """The body of a success is ignored unless FunctionResponseTypes has ReportBatchItemFailures."""
    assert answer(failures(named("10")), report=False) == Delivered()
    assert answer("not json", report=False) == Delivered()


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (ReplyStatus.FUNCTION_ERROR, Failed("e")),
        (ReplyStatus.TIMEOUT, Failed("e")),
        (ReplyStatus.TOO_LARGE, Failed("e")),
        (ReplyStatus.THROTTLED, Throttled("e", 3.0)),
        (ReplyStatus.UNREACHABLE, Throttled("e", 3.0, unreachable=True)),
    ],
)
def test_what_ran_counts_and_what_never_ran_does_not(status: ReplyStatus, outcome) -> None:
    """Function error, timeout and a too large event are attempts; throttles and unreachable targets wait."""
    reply = Reply(status, b"{}", error="e", retry_after=3.0)
    assert judge(reply, RECORDS, report_failures=True, ordered=True) == outcome


def test_payload_is_the_lambda_event() -> None:
    """Records are joined as they are; the length is known without joining."""
    assert json.loads(payload(RECORDS)) == {"Records": [{"n": "10"}, {"n": "11"}, {"n": "12"}]}
    for count in range(4):
        some = RECORDS[:count]
        assert len(payload(some)) == payload_bytes(count, sum(len(r.wire) for r in some))


def test_idempotency_key_names_the_batch() -> None:
    """The same for the same mapping, source and records; another for any other."""
    key = idempotency_key("m", "arn", RECORDS)
    assert key == idempotency_key("m", "arn", tuple(RECORDS))
    others = {
        idempotency_key("m2", "arn", RECORDS),
        idempotency_key("m", "arn2", RECORDS),
        idempotency_key("m", "arn", RECORDS[:2]),
        idempotency_key("m", "arn", RECORDS[1:]),
        idempotency_key("m", "arn", (RECORDS[0], RECORDS[2])),
        idempotency_key("m", "arn", RECORDS, "another shard"),
    }
    assert len(others | {key}) == 7
