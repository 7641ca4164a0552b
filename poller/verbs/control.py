"""`pause`, `resume`, `seek`: a running daemon, through its API."""

import argparse
import time
from datetime import datetime
from typing import Any
from urllib.parse import quote

from poller.errors import PollerError
from poller.verbs.common import OK, Verbs, add_url, add_verb, ask, seconds

_LOOK_INTERVAL = 0.2
_SEEK = """\
Move a mapping to another position. What is in flight ends first; open batches and tumbling windows are dropped; then
it reads on from there. Records before the position are skipped, records after it are delivered again.
"""


def add(verbs: Verbs) -> None:
    """Add them."""
    pause = add_verb(verbs, "pause", "pause a mapping of a running daemon: what is in flight ends", _pause)
    resume = add_verb(verbs, "resume", "resume a paused mapping where it stopped", _resume)
    seek = add_verb(verbs, "seek", "move a mapping of a running daemon to another position", _seek, description=_SEEK)
    for made in (pause, resume, seek):
        made.add_argument("mapping", metavar="MAPPING", help="UUID, the beginning of one, or a function's name")
        add_url(made)
        made.add_argument(
            "--wait", type=seconds, default=60.0, metavar="N", help="seconds to wait until it is done (default: 60)"
        )
    where = seek.add_mutually_exclusive_group(required=True)
    where.add_argument("--trim-horizon", action="store_true", help="the oldest record that the stream has")
    where.add_argument("--latest", action="store_true", help="only what arrives from now on")
    where.add_argument(
        "--at", metavar="TIMESTAMP", help="what arrived from then on: ISO 8601 or epoch seconds (Kinesis)"
    )
    where.add_argument("--sequence", metavar="N", help="that record of one shard, with --shard")
    seek.add_argument("--shard", metavar="S", help="only this shard, with --sequence")


def _pause(given: argparse.Namespace) -> int:
    return _order(given, "pause", {}, "Disabled", "paused")


def _resume(given: argparse.Namespace) -> int:
    return _order(given, "resume", {}, "Enabled", "resumed")


def _seek(given: argparse.Namespace) -> int:
    if (given.shard is None) != (given.sequence is None):
        raise PollerError("--shard and --sequence belong together")
    for name, value in (("--at", given.at), ("--shard", given.shard), ("--sequence", given.sequence)):
        if value == "":
            raise PollerError(f"{name} is empty; is a variable not set?")
    if given.shard is not None:
        order: dict[str, Any] = {"shard": given.shard, "sequence": given.sequence}
    elif given.at is not None:
        order = {"position": "AT_TIMESTAMP", "timestamp": _epoch(given.at)}
    else:
        order = {"position": "LATEST" if given.latest else "TRIM_HORIZON"}
    return _order(given, "seek", order, None, "moved")


def _order(given: argparse.Namespace, verb: str, order: dict[str, Any], state: str | None, done: str) -> int:
    """Ask, then wait until the daemon has done it."""
    base = given.url.rstrip("/")
    answer = ask(f"{base}/api/mappings/{quote(given.mapping, safe='')}/{verb}", order, ca=given.ca)
    uuid, ends_at = answer["uuid"], time.monotonic() + given.wait
    while True:
        shown = ask(f"{base}/api/status", ca=given.ca)["mappings"]
        mapping = next((one for one in shown if one["uuid"] == uuid), None)
        if mapping is None:
            raise PollerError(f"mapping {uuid} was deleted meanwhile")
        if state is None and mapping["state"] == "Disabled":
            print(f"{uuid} is paused; it goes on from there when it is resumed")
            return OK
        if mapping["state"] == (state or "Enabled") and (state or not mapping["seek_pending"]):
            print(f"{uuid} {done}")
            return OK
        if time.monotonic() >= ends_at:
            reason = mapping["reason"] or f"{mapping['in_flight']} invocations are still in flight"
            raise PollerError(f"{uuid} is accepted but not {done} after {given.wait:g} s: {reason}")
        time.sleep(_LOOK_INTERVAL)


def _epoch(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise PollerError(f"--at {text} is neither ISO 8601, such as 2026-11-23T08:00:00Z, nor epoch seconds") from None
    if at.tzinfo is None:
        raise PollerError(f"--at {text} has no time zone; add Z for UTC")
    return at.timestamp()
