"""`poller status`, and how a status document is read: what comes first, and how it is said."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from poller.cli import main
from poller.core.model import ShardState
from poller.server.status import status_document
from poller.statusview import duration, instant, mappings_worst_first, per_second, source_name, totals, worst_first
from poller.verbs import status as verb
from poller.verbs.status import status_lines
from tests.fakes.statuses import NOW, blocked, mapping, queue, shard, uuid

OLD = {  # what the first daemon answered
    "version": "0.1.0",
    "mappings": [
        {
            "uuid": uuid(1), "function": "f", "source": "kinesis", "source_arn": "arn:aws:kinesis:r:1:stream/s",
            "state": "Enabled", "reason": "slow", "in_flight": 2, "breaker": "closed",
            "shards": [{
                "id": "shardId-1", "state": "running", "lag_seconds": 1.25, "headroom_seconds": None,
                "blocked_seconds": 12.0, "attempts": 4, "first_sequence": "7", "last_sequence": "9",
                "last_error": "500", "next_attempt": None,
            }],
        }
    ],
}  # fmt: skip


def lines(*statuses, **options):
    return status_lines(status_document(statuses, NOW), **options)


class Daemon:
    """Answers /api/status, each time with the next of its answers, then the last again."""

    def __init__(self, *answers):
        self.answers = list(answers)
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = daemon.answers.pop(0) if len(daemon.answers) > 1 else daemon.answers[0]
                self.send_response(200 if body else 503)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def body(*statuses):
    return json.dumps(status_document(statuses, NOW)).encode()


# --- the lines ---


def test_one_line_per_mapping_and_shard() -> None:
    """State, lag, time until data expires, in flight, last result; 80 columns for names of usual length."""
    found = lines(mapping(1, shard(0), replace(shard(1), state=ShardState.BLOCKED, lag=None), name="pay"))
    assert found[0] == "1 mapping, 2 shards, none blocked, worst lag 0s, least headroom 24h"
    assert [line.split() for line in found[3:]] == [
        ["Enabled", "0s", "24h", "-", "1", uuid(1)[:8], "pay", "<", "kinesis", "pay;", "OK"],
        ["running", "0s", "24h", "0", "shardId-000000000000"],
        ["waiting", "-", "-", "1", "shardId-000000000001"],
    ]
    assert max(map(len, found)) <= 80
    assert status_lines({"version": "1", "mappings": []}) == ["no mappings"]


def test_a_blocked_shard_shows_its_batch_beneath_it() -> None:
    """What fails, since when, how often, when it is tried again, and until when there is data."""
    found = lines(mapping(1, shard(0), blocked(1)))
    assert "1 BLOCKED" in found[0]
    assert "least headroom 1h12m LOW" in found[0]
    at = next(number for number, line in enumerate(found) if line.startswith("BLOCKED"))
    assert found[at].split() == ["BLOCKED", "22h48m", "1h12m", "0", "shardId-000000000001"]
    assert found[at + 1 : at + 7] == [
        "    500 from 127.0.0.1:8080/orders: the answer was not a success",
        "    blocked for 2 h 42 min, since 10:05:13 UTC, 163 attempts",
        "    next attempt in 42 s, at 12:47:55 UTC",
        "    batch 49590338271490256608559692538361571095921575989136588898",
        "       to 49590338271490256608559692540925702759324208523137515618",
        "    DATA EXPIRES in 1 h 12 min, at 13:59:13 UTC",
    ]
    assert max(map(len, found)) <= 80


def test_what_keeps_a_mapping_from_working_is_beneath_it() -> None:
    """Receive loops, an open circuit, a reason, a seek that waits, a pause."""
    found = "\n".join(
        lines(queue(1, breaker="open", reason="refused"), mapping(2, state="Disabled", seek_pending=True))
    )
    for text in (
        "receive loops 3 of at most 20",
        "circuit open: receiving is paused",
        "refused",
        "seek pending",
        "(1 paused)",
    ):
        assert text in found


def test_brief_counts_healthy_shards() -> None:
    """Only what somebody should look at has a line."""
    found = lines(mapping(1, shard(0), shard(1), blocked(2)), brief=True)
    assert sum("shardId" in line for line in found) == 1
    assert found[-1] == "    2 shards that nothing is wrong with"


def test_an_older_daemon_is_shown() -> None:
    """Fields that it does not have are unknown, not an error."""
    found = status_lines(OLD)
    assert found[3].split()[:6] == ["Enabled", "1.2s", "-", "-", "2", uuid(1)[:8]]
    assert any(line.startswith("BLOCKED") for line in found)
    assert "    next attempt not known" in found


def test_prefixes_tell_mappings_apart() -> None:
    """The shortest that the other verbs take for one mapping only."""
    one, other = replace(mapping(1), id="12345678-a"), replace(mapping(1), id="12345678-b")
    found = "\n".join(lines(one, other))
    assert " 12345678-a " in found
    assert " 12345678-b " in found


def test_no_escape_reaches_the_terminal() -> None:
    """An error's text comes from a target, which may be anybody's."""
    found = lines(mapping(1, replace(blocked(0), last_error="\x1b[2Jfine\nreally\u202e")))
    assert "    ?[2Jfine?really?" in found


# --- the verb ---


def test_json_is_what_the_daemon_answers(capsys) -> None:
    """Nothing added, nothing taken away."""
    with Daemon(json.dumps(OLD).encode()) as daemon:
        assert main(["status", "--json", "--url", daemon.url + "/"]) == 0
    assert json.loads(capsys.readouterr().out) == OLD


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'{"mappings": 1}'])
def test_another_server_is_a_sentence(answer, capsys) -> None:
    """Exit 1, no traceback."""
    with Daemon(answer) as daemon:
        assert main(["status", "--url", daemon.url]) == 1
    assert "does not answer as a poller does" in capsys.readouterr().err


def test_watch_repeats_until_interrupted_and_outlives_a_restart(capsys, monkeypatch) -> None:
    """Plain output again and again when nobody is at a terminal; a daemon that is away is waited for; Ctrl-C is exit 0."""
    rounds = []

    def interrupt(_seconds):
        rounds.append(1)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(verb.time, "sleep", interrupt)
    with Daemon(body(mapping(1)), b"", body(mapping(1), mapping(2))) as daemon:
        assert main(["status", "--watch", "--url", daemon.url]) == 0
    said = capsys.readouterr()
    assert ("1 mapping," in said.out, "2 mappings," in said.out) == (True, True)
    assert "\x1b" not in said.out
    assert "answered 503" in said.err


def test_watch_of_nobody_is_exit_1(capsys, monkeypatch) -> None:
    """Somebody has to answer once."""

    def interrupt(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb.time, "sleep", interrupt)
    assert main(["status", "--watch", "--url", "http://127.0.0.1:9"]) == 1
    assert "is `poller run` up" in capsys.readouterr().err


def test_watch_ends_with_ctrl_c() -> None:
    """The real process, interrupted while it waits: exit 0, no traceback."""
    with Daemon(body(mapping(1))) as daemon:
        command = [sys.executable, "-m", "poller", "status", "--watch", "60", "--json", "--url", daemon.url]
        # As a terminal starts it: whoever runs the tests in the background may have SIGINT ignored.
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        finally:
            signal.signal(signal.SIGINT, previous)
        with process:
            assert json.loads(process.stdout.readline())["mappings"]
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert process.stderr.read() == b""


def test_a_screen_holds_what_fits() -> None:
    """Drawn over the last one without a flicker, cut at the edges, and it says how much is left out."""
    screen = verb._screen(["a" * 50, *map(str, range(20))], os.terminal_size((40, 10)))
    drawn = screen.removeprefix("\x1b[H").removesuffix("\x1b[J").split("\x1b[K\n")
    assert drawn[0] == "a" * 40
    assert len(drawn[:-1]) == 9
    assert drawn[-2].startswith("... 13 more lines")
    assert verb._screen(["x"], os.terminal_size((40, 10))) == "\x1b[Hx\x1b[K\n\x1b[J"


# --- what comes first, and how it is said ---


def test_the_worst_comes_first() -> None:
    """Shards and mappings: soonest to lose data, then other troubles, then the furthest behind, then what is done."""
    shards = (
        replace(shard(0), state=ShardState.DONE, lag=None),
        shard(1),
        shard(2, lag=50.0),
        shard(3, last_error="AccessDenied"),
        replace(blocked(4), oldest_arrival=NOW - 100),
        blocked(5),
        shard(6, oldest_arrival=NOW - 86_000),
    )
    document = status_document([mapping(1), mapping(2, shards[3]), mapping(3, *shards)], NOW)
    assert [int(one["id"][-2:]) for one in worst_first(document["mappings"][2]["shards"])] == [6, 5, 4, 3, 2, 1, 0]
    assert [one["uuid"] for one in mappings_worst_first(document["mappings"])] == [uuid(3), uuid(2), uuid(1)]
    found = totals(document["mappings"])
    assert (found.mappings, found.shards, found.blocked, found.headroom) == (3, 8, 2, 400.0)
    assert found.least["uuid"] == uuid(3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0, "0 s"), (0.49, "0.4 s"), (9.99, "9.9 s"), (10.9, "10 s"), (59.9, "59 s"), (60, "1 min"),
        (250, "4 min 10 s"), (2_629, "43 min"), (3_600, "1 h"), (4_320, "1 h 12 min"), (86_400, "24 h"),
        (183_600, "2 d 3 h"), (604_800, "7 d"),
    ],
)  # fmt: skip
def test_durations_are_rounded_down(seconds, text) -> None:
    """Time left is never overstated."""
    assert duration(seconds) == text


def test_rates_instants_and_names() -> None:
    """Short, with the date only when it is not today's; a name for every kind of source."""
    rates = (None, 0, 0.004, 0.25, 1.0, 12.53, 99.96, 1234.5)
    assert [per_second(rate) for rate in rates] == ["-", "0", "0", "0.25", "1", "12.5", "100", "1,234"]
    assert instant(NOW + 60, NOW) == "12:48:13 UTC"
    assert instant(NOW + 50_000, NOW) == "2026-11-24 02:40 UTC"
    arns = (
        "arn:aws:kinesis:r:1:stream/s",
        "arn:aws:dynamodb:r:1:table/t/stream/2026-01-01T00:00:00.000",
        "arn:aws:sqs:r:1:q",
    )
    assert [source_name({"source": "x", "source_arn": arn}) for arn in arns] == ["x s", "x t", "x q"]
