"""`status`."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence

from poller.errors import PollerError
from poller.statusview import (
    Document,
    duration,
    expiry,
    headroom_of,
    instant,
    is_blocked,
    is_low,
    is_open,
    is_troubled,
    mapping_lag,
    mappings_worst_first,
    next_attempt,
    per_second,
    shard_lag,
    source_name,
    totals,
    worst_first,
)
from poller.verbs.common import OK, Verbs, add_url, add_verb, ask, seconds

_WATCH_SECONDS = 2.0
_TEXT = """\
Show the mappings and shards of a running daemon: totals, then a line for each mapping and each of its shards, the
worst first: state, lag, how long until its data expires, records delivered a second (over the last minute), what is in
flight, the last result. Beneath a blocked shard: its last error, its failing batch, and when it is tried again.
"""


def add(verbs: Verbs) -> None:
    """Add it."""
    text = "show the mappings and shards of a running daemon"
    made = add_verb(verbs, "status", text, _status, description=_TEXT)
    add_url(made)
    made.add_argument("--json", action="store_true", help="print what /api/status answers")
    made.add_argument("--brief", action="store_true", help="leave out the shards that nothing is wrong with")
    made.add_argument(
        "--watch",
        nargs="?",
        type=seconds,
        const=_WATCH_SECONDS,
        metavar="SECONDS",
        help=f"show it again every SECONDS (default: {_WATCH_SECONDS:g}) until Ctrl-C",
    )


def _status(given: argparse.Namespace) -> int:
    url = given.url.rstrip("/") + "/api/status"
    if given.watch is None:
        found = _fetch(url, given.ca)
        print(json.dumps(found, indent=2) if given.json else "\n".join(status_lines(found, brief=given.brief)))
        return OK
    try:
        _watch(url, given)
    except KeyboardInterrupt:
        return OK
    return OK


def _watch(url: str, given: argparse.Namespace) -> None:
    """Again and again, until KeyboardInterrupt. The first time somebody must answer; later it waits for the daemon.

    On a terminal it draws over what was there, and as much as fits; elsewhere one after the other.
    """
    redraws = sys.stdout.isatty() and not given.json
    found: Document | None = None
    while True:
        next_at = time.monotonic() + given.watch
        try:
            found = _fetch(url, given.ca)
            lines = [json.dumps(found)] if given.json else status_lines(found, brief=given.brief)
        except PollerError as error:
            if found is None:
                raise
            lines = []
            if redraws:
                lines = [str(error)]
            else:
                print(f"poller: {error}", file=sys.stderr)
        if redraws:
            print(_screen(lines, shutil.get_terminal_size()), end="", flush=True)
        else:
            print("\n".join(lines), end="\n" if given.json else "\n\n", flush=True)
        time.sleep(max(0.0, next_at - time.monotonic()))


def _screen(lines: Sequence[str], size: os.terminal_size) -> str:
    """What draws the lines over the last ones: from the top, each cut at the edge, the last saying what is left out."""
    room = max(2, size.lines - 1)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... {len(lines) - room + 1} more lines; make the window larger, or give --brief"]
    return "\x1b[H" + "".join(f"{line[: size.columns]}\x1b[K\n" for line in lines) + "\x1b[J"


def _fetch(url: str, ca: str | None) -> Document:
    found = ask(url, ca=ca)
    if not isinstance(found, dict) or not isinstance(found.get("mappings"), list):
        raise PollerError(f"{url} does not answer as a poller does; is it the daemon's address?")
    return found


_HEAD = f"{'STATE':<9} {'LAG':>7} {'EXPIRES':>7} {'REC/S':>7} {'FLIGHT':>6}  MAPPING, SHARD; LAST RESULT"
_INDENT = " " * 4


def status_lines(status: Document, *, brief: bool = False) -> list[str]:
    """Totals, then a line per mapping and per shard, worst first; beneath it what is wrong with it.

    `brief`: healthy shards are only counted. What an older daemon does not say is shown as `-`.
    """
    mappings = mappings_worst_first(status["mappings"])
    problem = status.get("store", {}).get("problem")
    trouble = [_plain(f"positions cannot be saved: {problem}")] if problem else []
    if not mappings:
        return [*trouble, "no mappings"]
    now = status.get("at") or time.time()
    prefixes = _prefixes([mapping["uuid"] for mapping in mappings])
    lines = trouble + [_plain(line) for line in (_first_line(mappings), "", _HEAD)]
    for mapping, prefix in zip(mappings, prefixes, strict=True):
        lines += map(_plain, _mapping_lines(mapping, prefix))
        ranked = worst_first(mapping["shards"])
        shown = [shard for shard in ranked if is_troubled(shard)] if brief else ranked
        for shard in shown:
            lines += map(_plain, _shard_lines(shard, now))
        if len(shown) < len(ranked):
            more = len(ranked) - len(shown)
            lines.append(f"{_INDENT}{more} shard{'s' * (more != 1)} that nothing is wrong with")
    return lines


def _first_line(mappings: Sequence[Document]) -> str:
    found = totals(mappings)
    paused = f" ({found.disabled} paused)" if found.disabled else ""
    parts = [
        f"{found.mappings} mapping{'s' * (found.mappings != 1)}{paused}",
        f"{found.shards} shard{'s' * (found.shards != 1)}",
        f"{found.blocked} BLOCKED" if found.blocked else "none blocked",
    ]
    if found.lag is not None:
        parts.append(f"worst lag {_short(found.lag)}")
    if found.headroom is not None:
        parts.append(f"least headroom {_short(found.headroom)}{' LOW' * is_low(found.headroom)}")
    return ", ".join(parts)


def _mapping_lines(mapping: Document, prefix: str) -> Iterator[str]:
    figures = (mapping_lag(mapping), headroom_of(mapping))
    result = mapping.get("last_result")
    yield _columns(
        mapping["state"],
        *figures,
        rate=per_second(mapping.get("records_per_second")),
        in_flight=mapping["in_flight"],
        name=f"{prefix} {mapping['function']} < {source_name(mapping)}{f'; {result}' if result else ''}",
    )
    if mapping.get("receivers") is not None:
        yield f"{_INDENT}receive loops {mapping['receivers']} of at most {mapping['receiver_limit']}"
    if failed := mapping.get("failed_per_second"):
        yield f"{_INDENT}{per_second(failed)} failed records a second"
    if is_open(mapping):
        yield f"{_INDENT}circuit {mapping['breaker']}: receiving is paused"
    if mapping.get("seek_pending"):
        yield f"{_INDENT}seek pending: its positions are to be moved"
    if mapping.get("records_lost"):
        yield f"{_INDENT}{mapping['records_lost']} records left the stream before they were done"
    if mapping["reason"]:
        yield f"{_INDENT}{mapping['reason']}"


def _shard_lines(shard: Document, now: float) -> Iterator[str]:
    state: str = shard["state"]
    state = "BLOCKED" if is_blocked(shard) else _STATES.get(state, state)
    figures = (shard_lag(shard), shard.get("headroom_seconds"))
    yield _columns(state, *figures, rate="", in_flight=shard.get("in_flight"), name=f"  {shard['id']}")
    if shard.get("last_error"):
        yield f"{_INDENT}{shard['last_error']}"
    if is_blocked(shard):
        blocked = shard["blocked_seconds"]
        since = f"{duration(blocked)}, since {instant(now - blocked, now)}"
        yield f"{_INDENT}blocked for {since}, {shard['attempts']} attempts"
        yield f"{_INDENT}next attempt {next_attempt(shard, now)}"
        if shard["first_sequence"] is not None:
            yield f"{_INDENT}batch {shard['first_sequence']}"
            yield f"{_INDENT}   to {shard['last_sequence']}"
    if is_low(shard.get("headroom_seconds")):
        yield f"{_INDENT}DATA EXPIRES {expiry(shard, now)}"


_STATES = {"blocked": "waiting"}  # for its parent; not what an operator means by blocked


def _columns(
    state: str, lag: float | None, headroom: float | None, *, rate: str, in_flight: int | None, name: str
) -> str:
    flying = "-" if in_flight is None else in_flight
    return f"{state:<9} {_short(lag):>7} {_short(headroom):>7} {rate:>7} {flying:>6}  {name}"


def _short(time_span: float | None) -> str:
    """`1h12m`."""
    return duration(time_span).replace("min", "m").replace(" ", "")


def _prefixes(uuids: Sequence[str]) -> list[str]:
    """The beginning of each that the other verbs take: unique, 8 characters at least."""
    for length in range(8, 37):
        found = [uuid[:length] for uuid in uuids]
        if len(set(found)) == len(found):
            return found
    return list(uuids)


def _plain(line: str) -> str:
    """Without what a terminal would obey: an error's text may come from anywhere."""
    return "".join(char if char.isprintable() else "?" for char in line)
