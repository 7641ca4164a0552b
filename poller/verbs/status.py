"""`status`."""

import argparse
import json
from typing import Any

from poller.verbs.common import OK, Verbs, add_url, add_verb, ask


def add(verbs: Verbs) -> None:
    """Add it."""
    made = add_verb(verbs, "status", "show the mappings and shards of a running daemon", _status)
    add_url(made)
    made.add_argument("--json", action="store_true", help="print what /api/status answers")


def _status(given: argparse.Namespace) -> int:
    status = ask(given.url.rstrip("/") + "/api/status")
    if given.json:
        print(json.dumps(status, indent=2))
        return OK
    for line in status_lines(status):
        print(line)
    return OK


def status_lines(status: dict[str, Any]) -> list[str]:
    """One line per mapping and per shard: state, lag, in flight, a queue's receive loops, last result."""
    lines = []
    for mapping in status["mappings"]:
        parts = [
            f"{mapping['uuid']}  {mapping['source']:<8} {mapping['function']}  {mapping['state']}",
            f"in flight {mapping['in_flight']}",
        ]
        if mapping.get("receivers") is not None:  # an older daemon does not say
            parts.append(f"receive loops {mapping['receivers']}/{mapping['receiver_limit']}")
        if mapping["breaker"] != "closed":
            parts.append(f"circuit {mapping['breaker']}: receiving is paused")
        if mapping["reason"]:
            parts.append(mapping["reason"])
        lines.append("  ".join(parts))
        lines.extend(_shard_line(shard) for shard in mapping["shards"])
    return lines or ["no mappings"]


def _shard_line(shard: dict[str, Any]) -> str:
    parts = [f"  {shard['id']}  {shard['state']}"]
    if shard["lag_seconds"] is not None:
        parts.append(f"lag {shard['lag_seconds']:.1f} s")
    if shard["blocked_seconds"]:
        parts.append(
            f"blocked for {shard['blocked_seconds']:.0f} s by {shard['first_sequence']}..{shard['last_sequence']}, "
            f"{shard['attempts']} attempts"
        )
    if shard["last_error"]:
        parts.append(shard["last_error"])
    return "  ".join(parts)
