"""The status page: one self-contained document, no script, nothing fetched. Every value is escaped."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
section { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; padding: .75rem 1rem; }
p { margin: .25rem 0; overflow-wrap: anywhere; } small { opacity: .75; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid var(--line); padding: .25rem .5rem; text-align: left; vertical-align: top; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; } td.e { min-width: 14rem; overflow-wrap: anywhere; }
.bad { color: var(--bad); } .state { background: var(--soft); border-radius: 4px; padding: 0 .4rem; }
"""

# The second lock, if an escape were ever forgotten: nothing but this style may load or run.
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}

_COLUMNS = ("Shard", "State", "Lag", "Iterator age", "Headroom", "Blocked", "In flight", "Attempts", "Last error")


def render(status: Mapping[str, Any]) -> str:
    """The page for a document of `/api/status`."""
    mappings: Sequence[Mapping[str, Any]] = status["mappings"]
    body = "".join(map(_mapping, mappings)) or "<p>No mappings.</p>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="refresh" content="5"><title>esm-poller</title>'
        f"<style>{_STYLE}</style></head><body><h1>esm-poller <small>{escape(status['version'])}</small></h1>"
        f"{body}</body></html>\n"
    )


def _mapping(mapping: Mapping[str, Any]) -> str:
    reason = f'<p class="bad">{escape(mapping["reason"])}</p>' if mapping["reason"] else ""
    breaker = ""
    if mapping["breaker"] != "closed":
        breaker = f' <span class="bad">circuit {escape(mapping["breaker"])}: receiving is paused</span>'
    loops = ""
    if mapping["receivers"] is not None:
        loops = f", {mapping['receivers']} of at most {mapping['receiver_limit']} receive loops"
    return (
        f"<section><h2>{escape(mapping['function'])} "
        f'<span class="state">{escape(mapping["state"])}</span>{breaker}</h2>'
        f"<p>{escape(mapping['source_arn'])}</p><p><small>{escape(mapping['uuid'])}</small></p>{reason}"
        f"<p>{mapping['in_flight']} in flight{loops}</p>{_shards(mapping['shards'])}</section>"
    )


def _shards(shards: Sequence[Mapping[str, Any]]) -> str:
    if not shards:
        return ""
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(map(_shard, shards))}</table></div>'


def _shard(shard: Mapping[str, Any]) -> str:
    numbers = (
        _seconds(shard["lag_seconds"]),
        _seconds(shard["iterator_age_seconds"]),
        _seconds(shard["headroom_seconds"]),
        _seconds(shard["blocked_seconds"]),
        str(shard["in_flight"]),
        str(shard["attempts"]),
    )
    cells = "".join(f'<td class="n">{text}</td>' for text in numbers)
    error = escape(shard["last_error"] or "")
    return (
        f'<tr><td>{escape(shard["id"])}</td><td>{escape(shard["state"])}</td>{cells}<td class="e bad">{error}</td></tr>'
    )


def _seconds(seconds: float | None) -> str:
    """`1.2 s`, `3 min`, `5 h`, `2.0 d`; a dash where unknown."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
