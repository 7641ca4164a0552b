"""Was every promise kept? Judges what happened in a run from what was written down; it talks to nobody."""

import enum
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, NamedTuple, TypeAlias

from tests.faults.ledger import Attempt
from tests.faults.proxy import Kind

SLACK = 0.8  # on top of the checkpoint interval: a machine that does other things too, a save that is under way
TOUCH = 0.05  # two clocks were read, or a hit ended in the middle of a packet
DELETING = 12.0  # seconds that the deletes of a batch are tried for
NEVER = frozenset(
    (
        *("shard_crashed", "mapping_crashed", "read_crashed", "receive_loop_crashed", "position_unknown"),
        *("records_lost", "not_json", "stream_replaced", "window_dropped", "seek_dropped"),
    )
)
"""What no daemon may log, whatever the world does to it."""


class Source(enum.StrEnum):
    """What a mapping reads."""

    KINESIS = "kinesis"
    DYNAMODB = "dynamodb"
    SQS = "sqs"
    FIFO = "fifo"

    @property
    def is_stream(self) -> bool:
        return self in {Source.KINESIS, Source.DYNAMODB}


class Side(enum.StrEnum):
    """What the daemon talks to."""

    SOURCE = "source"
    TARGET = "target"
    STORE = "store"
    DESTINATION = "destination"


@dataclass(frozen=True, slots=True)
class Written:
    """A record that was put. It is ordered by each of `keys`, `place` says where; a record without keys is not ordered.

    `shard` is empty for a message.
    """

    name: str
    place: int
    keys: tuple[str, ...] = ()
    shard: str = ""


class Hit(NamedTuple):
    """A fault met a request, or a connection."""

    begins: float
    ends: float
    kind: Kind


class Suspension(NamedTuple):
    """From SIGSTOP to SIGCONT."""

    life: int
    begins: float
    ends: float


class Step(NamedTuple):
    """The wall clock of the daemon was set so many seconds ahead, or back."""

    at: float
    seconds: float


class Stall(NamedTuple):
    """The machine let the daemon, or what it talks to, wait for so long: measured, not guessed."""

    begins: float
    ends: float


@dataclass(slots=True)
class Life:
    """One process, from its start to its end. `code` None: it was killed, or runs. `counts` are its own, by metric, summed
    over labels; None when nobody could ask before its end.
    """

    number: int
    began: float
    ended: float = inf
    ending: Literal["", "killed", "stopped"] = ""
    code: int | None = None
    logs: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, float] | None = None

    def has_logged(self, event: str) -> bool:
        return any(entry["event"] == event for entry in self.logs)

    @property
    def is_cut_off(self) -> bool:
        """It was killed, or could not end all that was in flight: both are crashes for what was."""
        return self.ending == "killed" or self.has_logged("stop_grace_exceeded")


class Report(NamedTuple):
    """A failure record that arrived."""

    at: float
    request_id: str
    condition: str
    invocations: int
    shard: str
    first: int
    last: int
    count: int


Event: TypeAlias = tuple[str, float]
"""What happened to a message, and when: received, deleted, stale, visible, changed N, dead."""


@dataclass(slots=True)
class Story:
    """A run. All times are the loop's. `lease` 0: nobody else can use the store. `retries`: None for without end. `messages`: what became of each, of a queue;
    `dead` those that the queue's redrive took. `complaints` are what the rig itself saw.
    """

    source: Source
    interval: float
    timeout: float
    lease: float = 0.0
    retries: int | None = None
    written: dict[str, Written] = field(default_factory=dict)
    poison: frozenset[str] = frozenset()
    attempts: list[Attempt] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    suspensions: list[Suspension] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    hits: dict[Side, list[Hit]] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    messages: dict[str, Sequence[Event]] = field(default_factory=dict)
    dead: frozenset[str] = frozenset()
    complaints: list[str] = field(default_factory=list)

    @property
    def is_calm(self) -> bool:
        """Nothing was done to anything, and the machine had time for everybody."""
        is_undisturbed = not self.suspensions and not self.steps and not self.stalls and not any(self.hits.values())
        return is_undisturbed and all(life.ending != "killed" for life in self.lives)


@dataclass(slots=True)
class Verdict:
    """`problems`: empty when every promise was kept. `causes`: of redeliveries. `ages`: for each of those after a crash,
    seconds from its success to the crash.
    """

    problems: list[str] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)
    ages: list[float] = field(default_factory=list)
    discarded: int = 0


def judge(story: Story) -> Verdict:
    """Every promise of interface.md against a run that has come to its end."""
    verdict = Verdict(problems=list(story.complaints))
    discarded = _discarded(story, verdict)
    verdict.discarded = len(discarded)
    settled = _settled(story, discarded)
    _judge_fates(story, verdict, settled)
    _judge_order(story, verdict, settled)
    _judge_together(story, verdict)
    _judge_batches(story, verdict)
    _judge_repeats(story, verdict)
    _judge_receives(story, verdict)
    _judge_counts(story, verdict, discarded)
    _judge_lives(story, verdict)
    return verdict


# --- what became of each record


def records_of(story: Story, report: Report) -> set[str]:
    """What a failure record is about: the part of its request that it names; a request that never reached the target is
    known by the range alone.
    """
    attempt = next((one for one in story.attempts if one.request_id == report.request_id), None)
    if attempt is not None:
        return {
            name
            for name in attempt.records
            if name in story.written and report.first <= story.written[name].place <= report.last
        }
    return {
        one.name
        for one in story.written.values()
        if one.shard == report.shard and report.first <= one.place <= report.last
    }


def _discarded(story: Story, verdict: Verdict) -> dict[str, float]:
    """When the first failure record about each record came."""
    found: dict[str, float] = {}
    known = {attempt.request_id for attempt in story.attempts}
    for report in sorted(story.reports):
        names = records_of(story, report)
        what = f"the failure record of request {report.request_id}"
        if len(names) < report.count or (report.request_id in known and len(names) > report.count):
            verdict.problems.append(f"{what} says {report.count} records, and it is about {len(names)}")
        if report.request_id not in known and not story.hits.get(Side.TARGET):
            verdict.problems.append(f"{what} is of no request that was made")
        if report.condition != "RetryAttemptsExhausted" or story.retries is None:
            verdict.problems.append(f"{what} has the condition {report.condition}")
        elif report.invocations != story.retries + 1:
            verdict.problems.append(f"{what} says {report.invocations} invocations, not {story.retries + 1}")
        for name in names:
            found.setdefault(name, report.at)
    return found


def _settled(story: Story, discarded: dict[str, float]) -> dict[str, float]:
    """When each record was first settled: a success, a failure record about it, or the queue's own redrive."""
    settled = {}
    for name, at in discarded.items():
        settled[name] = at - TOUCH
    for name in story.dead:
        settled[name] = min(settled.get(name, inf), *(at for what, at in story.messages[name] if what == "dead"))
    for attempt in story.attempts:
        for name in attempt.done:
            settled[name] = min(settled.get(name, inf), attempt.ended)
    return settled


def _judge_fates(story: Story, verdict: Verdict, settled: dict[str, float]) -> None:
    lost = story.written.keys() - settled.keys()
    if lost:
        verdict.problems.append(f"{len(lost)} of {len(story.written)} records are lost: {_some(lost)}")
    if foreign := {name for attempt in story.attempts for name in attempt.records} - story.written.keys():
        verdict.problems.append(f"{len(foreign)} records were delivered that nobody wrote: {_some(foreign)}")
    if not story.source.is_stream:
        gone = {name for name, events in story.messages.items() if any(what == "deleted" for what, _ in events)}
        if left := story.written.keys() - gone - story.dead:
            verdict.problems.append(f"{len(left)} messages are still in the queue: {_some(left)}")
        if stolen := gone - settled.keys():
            verdict.problems.append(f"{len(stolen)} messages were deleted without a success: {_some(stolen)}")


# --- promise 2


def _judge_order(story: Story, verdict: Verdict, settled: dict[str, float]) -> None:
    """No attempt at a record before every earlier record of its key was settled, or is before it in the same attempt."""
    lines: dict[str, list[Written]] = defaultdict(list)
    for one in story.written.values():
        for key in one.keys:
            lines[key].append(one)
    index: dict[tuple[str, str], int] = {}
    latest: dict[str, list[float]] = {}
    for key, line in lines.items():
        line.sort(key=lambda one: one.place)
        index.update(((key, one.name), at) for at, one in enumerate(line))
        latest[key] = list(itertools.accumulate((settled.get(one.name, inf) for one in line), max))
    for attempt in story.attempts:
        by_key: dict[str, list[int]] = defaultdict(list)
        for name in attempt.records:
            for key in story.written[name].keys if name in story.written else ():
                by_key[key].append(index[key, name])
        for key, places in by_key.items():
            if places != sorted(places):
                verdict.problems.append(f"request {attempt.request_id} has {key} out of order")
                continue
            first, inside = places[0], set(places)
            too_early = first > 0 and latest[key][first - 1] > attempt.began
            between = (at for at in range(first, places[-1]) if at not in inside)
            too_early |= any(settled.get(lines[key][at].name, inf) > attempt.began for at in between)
            if too_early:
                verdict.problems.append(
                    f"request {attempt.request_id} (life {attempt.life}, attempt {attempt.number}) began at "
                    f"{attempt.began:.3f} with {attempt.records[0]}, before an earlier record of {key} was settled"
                )


def _judge_together(story: Story, verdict: Verdict) -> None:
    """Never two attempts at a key at once, unless the caller has given the first one up."""
    open_: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in sorted(story.attempts, key=lambda one: one.began):
        keys = {key for name in attempt.records if name in story.written for key in story.written[name].keys}
        for key in keys:
            open_[key] = [one for one in open_[key] if one.ended > attempt.began]
            for earlier in open_[key]:
                if not _is_given_up(story, earlier, attempt.began):
                    verdict.problems.append(
                        f"requests {earlier.request_id} and {attempt.request_id} have {key} at once, "
                        f"at {attempt.began:.3f}"
                    )
            open_[key].append(attempt)


def _is_given_up(story: Story, attempt: Attempt, at: float) -> bool:
    """Has the caller ended, or run out of patience, or lost the connection, before `at`?"""
    return (
        _life(story, attempt).ended <= at
        or at - attempt.began >= story.timeout - TOUCH
        or _hit(story, Side.TARGET, attempt.began, at) is not None
        or any(one.life == attempt.life and one.begins <= at and one.ends >= attempt.began for one in story.suspensions)
    )


def _judge_batches(story: Story, verdict: Verdict) -> None:
    """An Idempotency-Key never stands for two different batches."""
    batches: dict[str, tuple[str, ...]] = {}
    for attempt in story.attempts:
        if batches.setdefault(attempt.key, attempt.records) != attempt.records:
            verdict.problems.append(f"request {attempt.request_id} has the Idempotency-Key of another batch")


# --- promises 3 and 4


def _judge_repeats(story: Story, verdict: Verdict) -> None:
    """What came again after a success has a cause that the promises allow."""
    by_record: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in sorted(story.attempts, key=lambda one: one.began):
        for name in attempt.records:
            by_record[name].append(attempt)
    unexplained: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, attempts in by_record.items():
        for earlier, later in itertools.pairwise(attempts):
            if name not in earlier.done:
                continue
            cause = _cause(story, verdict, name, earlier, later)
            if cause:
                verdict.causes[cause] += 1
            else:
                unexplained[earlier.request_id, later.request_id].append(name)
    by_id = {attempt.request_id: attempt for attempt in story.attempts}
    for (first, second), names in unexplained.items():
        earlier, later = by_id[first], by_id[second]
        verdict.problems.append(
            f"{len(names)} records ({_some(names)}) succeeded in request {first} (life {earlier.life}, "
            f"{earlier.began:.3f} to {earlier.ended:.3f}) and came again in {second} (life {later.life}, attempt "
            f"{later.number}, {later.began:.3f}) for no reason"
        )


def _cause(story: Story, verdict: Verdict, name: str, earlier: Attempt, later: Attempt) -> str:
    """Why a record came again after a success; empty when nothing explains it."""
    life = _life(story, earlier)
    if (hit := _hit(story, Side.TARGET, earlier.began, earlier.ended)) is not None:
        return f"answer spoiled ({hit.kind})"
    unsaved = story.interval + SLACK
    if life.is_cut_off and life.ended <= later.began and life.ended - earlier.ended <= unsaved:
        if life.ending == "killed":
            verdict.ages.append(life.ended - earlier.ended)
        return life.ending
    if cause := _cause_of_pause(story, earlier, later):
        return cause
    if not story.source.is_stream:
        return _cause_of_queue(story, name, earlier, later)
    # What the store did not take while it was away: until the fence has passed, or to the end of the process.
    hit = _hit(story, Side.STORE, earlier.ended - unsaved, earlier.ended + unsaved + story.lease)
    if hit is not None and hit.begins <= later.began:
        return f"store away ({hit.kind})"
    return ""


def _cause_of_pause(story: Story, earlier: Attempt, later: Attempt) -> str:
    """A process that goes on sees that its leases, its messages and its answers may be too old. For a member of a fleet
    a clock that jumps ahead is such a pause; a fence that a beat has missed in one passes after it.
    """
    pauses: list[tuple[str, float, float]] = [
        ("suspended", one.begins, one.ends) for one in story.suspensions if one.life == earlier.life
    ]
    if story.lease:
        pauses += [("clock stepped", step.at, step.at) for step in story.steps]
    pauses += [("machine stalled", one.begins, one.ends + story.lease) for one in story.stalls]
    for cause, begins, ends in pauses:
        is_near = begins - earlier.ended <= story.interval + SLACK and earlier.began <= ends + SLACK
        if begins <= later.began and is_near:
            return cause
    return ""


def _cause_of_queue(story: Story, name: str, earlier: Attempt, later: Attempt) -> str:
    ends = min(later.began, earlier.ended + DELETING)
    if (hit := _hit(story, Side.SOURCE, earlier.ended, ends)) is not None:
        return f"delete spoiled ({hit.kind})"
    events = story.messages[name]
    received = max((at for what, at in events if what == "received" and at <= earlier.began + TOUCH), default=-inf)
    expired = [at for what, at in events if what == "visible" and received <= at <= later.began]
    if expired and (hit := _hit(story, Side.SOURCE, received, min(expired))) is not None:
        return f"visibility ran out ({hit.kind})"
    if any(received <= step.at <= later.began for step in story.steps):
        return "clock stepped"
    return ""


def _judge_receives(story: Story, verdict: Verdict) -> None:
    """A message that was received is delivered: it costs one of its lives, and holds up its group."""
    attempts: dict[str, list[float]] = defaultdict(list)
    for attempt in story.attempts:
        for name in attempt.records:
            attempts[name].append(attempt.began)
    idle: list[str] = []
    for name, events in story.messages.items():
        for (what, received), (then, visible) in itertools.pairwise(events):
            if (what, then) != ("received", "visible") or _is_disturbed(story, received, visible):
                continue
            if not any(received - TOUCH <= at <= visible for at in attempts[name]):
                idle.append(name)
    if idle:
        verdict.problems.append(f"{len(idle)} times a message was received and left alone: {_some(idle)}")


def _is_disturbed(story: Story, begins: float, ends: float) -> bool:
    """Was anything done to anybody in a time?"""
    return (
        any(_hit(story, side, begins - SLACK, ends) is not None for side in Side)
        or any(life.ending and begins - SLACK <= life.ended <= ends for life in story.lives)
        or any(one.begins <= ends and one.ends >= begins - SLACK for one in story.suspensions)
        or any(begins - SLACK <= step.at <= ends for step in story.steps)
        or any(one.begins <= ends and one.ends >= begins - SLACK for one in story.stalls)
    )


def _hit(story: Story, side: Side, begins: float, ends: float) -> Hit | None:
    """The first fault of a side that overlaps a time."""
    return next(
        (hit for hit in story.hits.get(side, ()) if hit.begins <= ends + TOUCH and hit.ends >= begins - TOUCH), None
    )


def _life(story: Story, attempt: Attempt) -> Life:
    return story.lives[attempt.life - 1]


# --- counted, and healthy


def _judge_counts(story: Story, verdict: Verdict, discarded: dict[str, float]) -> None:
    """What was discarded was counted by somebody who lived to say so; nothing was dropped, nothing was lost."""
    said: set[str] = set()
    for life in story.lives:
        lines = [entry for entry in life.logs if entry["event"] == "records_discarded"]
        said |= {entry["request_id"] for entry in lines if entry["reported"]}
        if any(not entry["reported"] for entry in lines):
            verdict.problems.append(f"life {life.number} discarded records without a failure record")
        if life.counts is None:
            continue
        counted = life.counts.get("poller_on_failure_destination_delivered_events_total", 0.0)
        if counted != sum(entry["records"] for entry in _since_start(life, "records_discarded")):
            verdict.problems.append(f"life {life.number} counted {counted:g} reported events, and logged others")
        for name in ("poller_dropped_events_total", "poller_records_lost_total"):
            if value := life.counts.get(name, 0.0):
                verdict.problems.append(f"life {life.number}: {name} is {value:g}")
    counted_names = {
        name for report in story.reports if report.request_id in said for name in records_of(story, report)
    }
    successes = {name for attempt in story.attempts for name in attempt.done}
    if uncounted := discarded.keys() - successes - counted_names:
        verdict.problems.append(f"{len(uncounted)} discarded records were counted nowhere: {_some(uncounted)}")


def _since_start(life: Life, event: str) -> list[dict[str, Any]]:
    """A daemon whose clock was set back begins anew in its process, and counts from zero."""
    started = max((at for at, entry in enumerate(life.logs) if entry["event"] == "started"), default=0)
    return [entry for entry in life.logs[started:] if entry["event"] == event]


def _judge_lives(story: Story, verdict: Verdict) -> None:
    for life in story.lives:
        bad = [entry for entry in life.logs if _is_bad(entry)]
        if story.is_calm:
            bad += [entry for entry in life.logs if entry.get("level") == "error" and not _is_bad(entry)]
        if bad:
            verdict.problems.append(f"life {life.number} logged {bad[:2]}")
        if life.ending == "stopped" and life.code != 0:
            verdict.problems.append(f"life {life.number} was stopped and ended with {life.code}: {life.logs[-3:]}")
        if not life.ending and life.code is not None:
            verdict.problems.append(f"life {life.number} ended by itself with {life.code}: {life.logs[-3:]}")
    if story.lives and story.lives[-1].has_logged("stop_grace_exceeded"):
        verdict.problems.append("the last stop, of a daemon that nothing troubled any more, exceeded its grace")


def _is_bad(entry: dict[str, Any]) -> bool:
    if entry["event"] in NEVER or entry.get("level") == "critical" or "exception" in entry:
        return True
    # asyncio says here that a task's exception was never retrieved, or that a pending task was destroyed.
    return entry["event"] == "library_log" and entry.get("logger") == "asyncio" and entry.get("level") != "debug"


def _some(names: Iterable[str], most: int = 3) -> str:
    return ", ".join(sorted(names)[:most])
