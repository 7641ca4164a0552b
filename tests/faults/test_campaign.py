"""The campaign, thirty runs of it; and an oracle that sees each kind of broken promise."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.campaign import Scenario, Totals, places, run_all, scenario
from tests.faults.ledger import Attempt, Outcome
from tests.faults.oracle import Hit, Life, Report, Side, Source, Stall, Step, Story, Suspension, Written, judge
from tests.faults.proxy import Kind

RUNS = 30
PARALLEL = 5  # most of a run is waiting

# --- the oracle. A story: three records of one key, a batch of two and one of one.

NAMES = ("101", "102", "103")


def attempt(number: int, began: float, *names: str, life: int = 1, outcome: Outcome = Outcome.SUCCESS) -> Attempt:
    """A request that took 10 ms. A success but for what `outcome` says."""
    done = frozenset(names if outcome is Outcome.SUCCESS else ())
    key = f"key of {' '.join(names)}"
    return Attempt(f"request-{began}", number, key, life, began, names, began + 0.01, outcome, done)


def story(*attempts: Attempt, **more) -> Story:
    """A stream that was delivered without trouble, unless the attempts say otherwise."""
    made = list(attempts) or [attempt(1, 10.0, "101", "102"), attempt(1, 10.1, "103")]
    written = {name: Written(name, int(name), ("k", "shard"), "shard") for name in NAMES}
    lives = [Life(1, 5.0, 20.0, "stopped", 0)]
    return Story(**{
        "source": Source.KINESIS, "interval": 0.1, "timeout": 1.0, "written": written, "attempts": made, "lives": lives,
        **more,
    })  # fmt: skip


def queue_story(*attempts: Attempt, events: dict[str, list[tuple[str, float]]] | None = None, **more) -> Story:
    """The same of a FIFO queue."""
    made = story(*attempts, **more)
    made.source = Source.FIFO
    made.messages = {name: [("received", 9.9), ("deleted", 10.2)] for name in NAMES} | (events or {})
    return made


def problems(told: Story) -> str:
    return "\n".join(judge(told).problems)


def killed(at: float) -> list[Life]:
    """Two lives; the first one was killed."""
    return [Life(1, 5.0, at, "killed"), Life(2, at + 1.0, at + 20.0, "stopped", 0)]


def failed_batch(*, life: Life | None = None, **more) -> Story:
    """A batch that failed three times and was given up, and what followed it."""
    tries = [attempt(n, 10.0 + n, "101", "102", outcome=Outcome.FAILURE) for n in (1, 2, 3)]
    logs = [{"event": "records_discarded", "request_id": tries[-1].request_id, "reported": True, "records": 2}]
    report = Report(13.2, tries[-1].request_id, "RetryAttemptsExhausted", 3, "shard", 101, 102, 2)
    counts = {"poller_on_failure_destination_delivered_events_total": 2.0}
    lives = [life or Life(1, 5.0, 20.0, "stopped", 0, logs, counts)]
    return story(*tries, attempt(1, 14.0, "103"), **{"retries": 2, "reports": [report], "lives": lives, **more})


def test_a_run_without_trouble_is_right() -> None:
    """Of a stream, of a queue, and with records that were given up."""
    assert problems(story()) == ""
    assert problems(queue_story()) == ""
    assert problems(failed_batch()) == ""


def test_a_lost_record_is_seen() -> None:
    """One that was never delivered; one whose only attempt failed; a message that was deleted without a success."""
    first, second = attempt(1, 10.0, "101", "102"), attempt(1, 10.1, "103", outcome=Outcome.FAILURE)
    assert "1 of 3 records are lost: 103" in problems(story(first))
    assert "1 of 3 records are lost: 103" in problems(story(first, second))
    assert "1 of 3 records are lost: 103" in problems(story(first, replace(second, outcome=Outcome.GONE)))
    assert "1 messages were deleted without a success: 103" in problems(queue_story(first))


def test_a_message_that_is_left_is_seen() -> None:
    """It succeeded, and is in the queue still: it would come again. What the redrive took is none of it."""
    left = {"103": [("received", 9.9)]}
    assert "1 messages are still in the queue: 103" in problems(queue_story(events=left))
    dead = {"103": [("received", 9.9), ("dead", 10.3)]}
    assert problems(queue_story(events=dead, dead=frozenset({"103"}))) == ""


def test_a_record_that_nobody_wrote_is_seen() -> None:
    """As when a stream is read that is another's."""
    told = story(attempt(1, 10.0, "101", "102", "999"), attempt(1, 10.1, "103"))
    assert "1 records were delivered that nobody wrote: 999" in problems(told)


def test_a_reordered_key_is_seen() -> None:
    """Overtaken in another request, left out in the middle of one, and the wrong way round in one."""
    overtaken = story(attempt(1, 10.0, "103"), attempt(1, 10.1, "101", "102"))
    assert "before an earlier record of k was settled" in problems(overtaken)
    skipped = story(attempt(1, 10.0, "101", "103"), attempt(1, 10.1, "102"))
    assert "before an earlier record of k was settled" in problems(skipped)
    turned = story(attempt(1, 10.0, "102", "101"), attempt(1, 10.1, "103"))
    assert "has k out of order" in problems(turned)
    after_failure = story(
        attempt(1, 10.0, "101", "102", outcome=Outcome.FAILURE),
        attempt(1, 10.1, "103"),
        attempt(2, 10.2, "101", "102"),
    )
    assert "before an earlier record of k was settled" in problems(after_failure)


def test_what_follows_a_discard_may_begin_after_its_failure_record_only() -> None:
    """The record came at 13.2."""
    told = failed_batch()
    told.attempts[-1] = attempt(1, 13.1, "103")
    assert "before an earlier record of k was settled" in problems(told)


def test_order_after_a_crash_is_that_of_first_settlements() -> None:
    """What was done already is repeated from its beginning; what was not may not come before it."""
    again = [attempt(1, 10.0, "101", "102"), attempt(1, 12.0, "102", life=2), attempt(1, 12.1, "103", life=2)]
    assert problems(story(*again, lives=killed(10.05))) == ""
    early = [attempt(1, 10.0, "101"), attempt(1, 12.0, "103", life=2), attempt(1, 12.1, "102", life=2)]
    assert "before an earlier record of k was settled" in problems(story(*early, lives=killed(10.05)))


def test_two_attempts_at_once_are_seen() -> None:
    """Unless the first one was given up: a timeout, a broken connection, a death."""
    long = replace(attempt(1, 10.0, "101", "102"), ended=11.5)
    told = story(long, attempt(2, 10.5, "101", "102"), attempt(1, 12.0, "103"))
    assert "have k at once" in problems(told)
    reset = {Side.TARGET: [Hit(10.0, 10.4, Kind.RESET)]}
    assert problems(replace(told, hits=reset)) == ""
    late = story(long, attempt(2, 11.0, "101", "102"), attempt(1, 12.0, "103"))
    assert "at once" not in problems(late)
    dead = story(long, attempt(1, 10.5, "101", "102", life=2), attempt(1, 12.0, "103", life=2), lives=killed(10.2))
    assert "at once" not in problems(dead)


def test_one_key_for_two_batches_is_seen() -> None:
    """A target that remembers keys would skip the second one."""
    second = replace(attempt(1, 10.1, "103"), key="key of 101 102")
    assert "has the Idempotency-Key of another batch" in problems(story(attempt(1, 10.0, "101", "102"), second))


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({}, ""),
        ({"lives": killed(10.05)}, "killed"),
        ({"lives": killed(11.5)}, ""),
        ({"suspensions": [Suspension(1, 10.5, 11.0)]}, "suspended"),
        ({"suspensions": [Suspension(1, 11.5, 11.8)]}, ""),
        ({"stalls": [Stall(10.5, 11.0)]}, "machine stalled"),
        ({"stalls": [Stall(11.5, 11.8)]}, ""),
        ({"hits": {Side.TARGET: [Hit(10.0, 10.5, Kind.LATE)]}}, "answer spoiled (late)"),
        ({"hits": {Side.TARGET: [Hit(10.2, 10.5, Kind.LATE)]}}, ""),
        ({"hits": {Side.STORE: [Hit(10.1, 10.5, Kind.ERROR_500)]}}, "store away (error_500)"),
        ({"hits": {Side.SOURCE: [Hit(10.0, 10.5, Kind.RESET)]}}, ""),
        ({"hits": {Side.DESTINATION: [Hit(10.0, 10.5, Kind.RESET)]}}, ""),
        ({"steps": [Step(10.1, 3600.0)]}, ""),
        ({"steps": [Step(10.1, 3600.0)], "lease": 2.0}, "clock stepped"),
        ({"lives": [Life(1, 5.0, 10.5, "stopped", 0), Life(2, 11.0, 20.0, "stopped", 0)]}, ""),
    ],
)
def test_what_comes_again_needs_a_cause(more: dict, cause: str) -> None:
    """A crash explains its last interval, a fault what it touched; a clean stop, and trouble elsewhere, nothing."""
    second = 2 if len(more.get("lives", ())) > 1 else 1
    again = attempt(1, 12.6, "101", "102", life=second)
    told = story(attempt(1, 10.0, "101", "102"), again, attempt(1, 13.0, "103", life=second), **more)
    verdict = judge(told)
    if cause:
        assert verdict.problems == []
        assert verdict.causes == {cause: 2}
    else:
        [problem] = verdict.problems
        assert problem.startswith("2 records (101, 102) succeeded in request request-10.0")
        assert problem.endswith("for no reason")


def test_a_message_that_comes_again_needs_a_cause_too() -> None:
    """A delete that was spoiled, a visibility that ran out because of a fault; else there is none."""
    first, again = attempt(1, 10.0, "101"), attempt(1, 13.0, "101")
    rest = [attempt(1, 13.1, "102"), attempt(1, 13.2, "103")]
    events = {"101": [("received", 9.9), ("visible", 12.9), ("received", 12.95), ("deleted", 13.1)]}
    told = queue_story(first, again, *rest, events=events)
    assert "for no reason" in problems(told)
    spoiled = judge(replace(told, hits={Side.SOURCE: [Hit(10.1, 10.2, Kind.RESET)]}))
    assert (spoiled.problems, spoiled.causes) == ([], {"delete spoiled (reset)": 1})


def test_a_message_that_nobody_delivered_is_seen() -> None:
    """Received, and let go of: it lost one of its lives, and its group some time. A crash or a fault may do that."""
    events = {"103": [("received", 7.0), ("visible", 9.8), ("received", 9.9), ("deleted", 10.2)]}
    assert "1 times a message was received and left alone: 103" in problems(queue_story(events=events))
    hits = {Side.SOURCE: [Hit(6.9, 7.1, Kind.RESET)]}
    assert problems(queue_story(events=events, hits=hits)) == ""


def test_a_discard_that_is_not_told_or_not_counted_is_seen() -> None:
    """No failure record; one that says other records; none in the log; another number in the metrics; dropped."""
    assert "2 of 3 records are lost: 101, 102" in problems(failed_batch(reports=[]))
    [report] = failed_batch().reports
    assert "says 3 records, and it is about 2" in problems(failed_batch(reports=[report._replace(count=3)]))
    assert "says 2 invocations, not 3" in problems(failed_batch(reports=[report._replace(invocations=2)]))
    assert "is of no request that was made" in problems(failed_batch(reports=[report._replace(request_id="x")]))
    silent = Life(1, 5.0, 20.0, "stopped", 0)
    assert "2 discarded records were counted nowhere: 101, 102" in problems(failed_batch(life=silent))
    [life] = failed_batch().lives
    for counts in ({}, {"poller_on_failure_destination_delivered_events_total": 3.0}):
        assert "reported events, and logged others" in problems(failed_batch(life=replace(life, counts=counts)))
    dropped = {**life.counts, "poller_dropped_events_total": 2.0}
    assert "poller_dropped_events_total is 2" in problems(failed_batch(life=replace(life, counts=dropped)))


@pytest.mark.parametrize(
    ("entry", "is_bad"),
    [
        ({"event": "records_lost", "level": "error"}, True),
        ({"event": "shard_crashed", "level": "error"}, True),
        ({"event": "not_json", "line": "Traceback"}, True),
        ({"event": "anything", "level": "warning", "exception": "Traceback"}, True),
        ({"event": "library_log", "logger": "asyncio", "level": "error"}, True),
        ({"event": "invocation_failed", "level": "warning"}, False),
        ({"event": "store_unavailable", "level": "error"}, True),  # nothing had been done to it
        ({"event": "stop_grace_exceeded", "level": "warning"}, True),
    ],
)
def test_a_log_that_shows_a_defect_is_seen(entry: dict, is_bad: bool) -> None:
    """Crashes, losses, tracebacks, tasks that nobody waited for; errors while there is no trouble."""
    told = story(lives=[Life(1, 5.0, 20.0, "stopped", 0, [entry])])
    assert bool(problems(told)) == is_bad


def test_a_bad_end_is_seen() -> None:
    """A stop that is no 0, an end that nobody asked for, and what the rig complains of."""
    assert "ended with 1" in problems(story(lives=[Life(1, 5.0, 20.0, "stopped", 1)]))
    assert "ended by itself with 1" in problems(story(lives=[Life(1, 5.0, 20.0, "", 1)]))
    assert problems(story(complaints=["too many descriptors"])) == "too many descriptors"


# --- the campaign


def test_a_thousand_seeds_have_every_fault_everywhere() -> None:
    """Each kind at each place, most pairs of kinds, every deed at every source and store."""
    made = [scenario(seed) for seed in range(1000)]
    alone = [one for one in made if len(one.troubles) == 1]
    met = {(one.source, one.store, trouble.side, trouble.fault.kind) for one in alone for trouble in one.troubles}
    assert met == {(*place, kind) for place in places() for kind in Kind}
    pairs = {tuple(sorted(one.fault.kind for one in run.troubles)) for run in made if len(run.troubles) == 2}
    assert len(pairs) > 80
    assert len({(one.source, one.store, one.deed) for one in made if not one.is_clock_left_out}) >= 40


def chosen() -> list[int]:
    """Thirty short runs: each is the one that has most of what the ones before it have met least."""
    made = [scenario(seed) for seed in range(600)]
    short = [
        one
        for one in made
        if not one.begins_again
        and len(one.moments) < 2
        and one.seconds != 5.0
        and (one.source.is_stream or not (one.options.poison or one.temper.failures))  # they wait for their visibility
    ]

    def features(one: Scenario) -> set[object]:
        places = {(trouble.side, trouble.fault.kind) for trouble in one.troubles}
        return places | {(one.source, one.store, weight) for weight in range(4)} | {one.deed}

    seeds: list[int] = []
    met: Counter[object] = Counter({"step": 4, "kill": 1, "stop": 1})  # what costs more comes less often
    for _ in range(RUNS):
        best = max(short, key=lambda one: (sum(2.0 ** -met[each] for each in features(one)), -one.seed))
        short.remove(best)
        seeds.append(best.seed)
        met.update(features(best))
    return seeds


@pytest.mark.integration
def test_thirty_runs_keep_every_promise(tmp_path: Path) -> None:
    """The real daemon, kill -9, SIGSTOP, SIGTERM, faults on every wire: `python -m tests.faults` has the long version."""
    seeds, totals = chosen(), Totals()
    for result in run_all(seeds, str(tmp_path), PARALLEL):
        totals.add(result)
        for problem in result.problems:
            print(f"seed {result.seed}: {problem}\n    {scenario(result.seed).described()}; kept in {result.folder}")
    print(f"\n{totals.table()}")
    made = [scenario(seed) for seed in seeds]
    assert {(one.source, one.store) for one in made} == {place[:2] for place in places()}
    assert {trouble.fault.kind for one in made for trouble in one.troubles} == set(Kind)
    assert {trouble.side for one in made for trouble in one.troubles} == set(Side)
    assert not totals.failed
