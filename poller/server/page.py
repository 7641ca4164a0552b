"""The status page: one self-contained document, no script, nothing fetched. Every value is escaped.

It is for somebody who was woken up: what is wrong comes first, with the batch that blocks, why, and how long until
data expires. Nothing is said by colour alone. However many shards there are, it stays under a megabyte: the worst are
shown, and it says how many are not.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from itertools import accumulate

from poller.statusview import (
    Document,
    Totals,
    duration,
    expiry,
    has_trouble,
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
    shard_state,
    source_name,
    totals,
    worst_first,
)

REFRESH = 10
"""Seconds between reloads unless asked otherwise."""
# What a page shows at most, so that it stays under a megabyte: mappings, charts of the first of them, cards of troubled
# shards, rows of the mapping that is asked for and of any other, and characters of the rows of all others.
_MAPPINGS = 150
_CHARTED = 60
_CARDS = 100
_CARDS_OF_ONE = 5
_ROWS_OF_OPENED = 400
_ROWS_OF_ONE = 100
_ROOM = 250_000
_VERB = '<span class="id">poller status</span>'
_TEXT = 400  # characters of an error or a name that may be any length

_STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --fg: #1b1f24; --soft: #57606a; --line: #c4ccd4; --panel: #f5f7f9;
  --bad: #ab1019; --badbg: #ab1019; --badfg: #ffffff; --tint: #fdecec; --warnbg: #ffd95c; --warnfg: #2e2100;
  --link: #0a58b8; --area: #0a58b822; }
@media (prefers-color-scheme: dark) { :root { --bg: #0f1419; --fg: #e6edf3; --soft: #9fabb8; --line: #3a4653;
  --panel: #171d24; --bad: #ff9d95; --badbg: #ff8078; --badfg: #1c0000; --tint: #35191b; --warnbg: #f2cc60;
  --warnfg: #241a00; --link: #79b8ff; --area: #79b8ff33; } }
* { box-sizing: border-box; }
body { background: var(--bg); color: var(--fg); font: 15px/1.45 system-ui, sans-serif; margin: 0 auto;
  max-width: 90rem; padding: .75rem; }
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1, h2, h3, p, dd, .id { overflow-wrap: anywhere; }
h1 { font-size: 1.15rem; }
h2 { font-size: 1.05rem; }
h3 { font-size: 1rem; }
a { color: var(--link); }
header { align-items: baseline; display: flex; flex-wrap: wrap; gap: .25rem 1rem; justify-content: space-between; }
small, .soft, dt, caption, figcaption { color: var(--soft); font-size: .85rem; font-weight: normal; }
.id { font-family: ui-monospace, monospace; font-size: .88em; }
.sum { display: grid; gap: .5rem; grid-template-columns: repeat(6, 1fr); margin: .75rem 0; }
.sum div { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .4rem .6rem; }
.sum dd { font-size: 1.2rem; font-variant-numeric: tabular-nums; font-weight: 600; line-height: 1.3; }
.sum small { display: block; }
.sum .bad { background: var(--badbg); border-color: var(--badbg); color: var(--badfg); }
.sum .low { background: var(--warnbg); border-color: var(--warnbg); color: var(--warnfg); }
.sum .bad *, .sum .low * { color: inherit; }
.index { border-left: 4px solid var(--badbg); list-style: none; margin: 0 0 .75rem; padding: .1rem 0 .1rem .6rem; }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; min-width: 0;
  padding: .6rem .75rem; }
section.trouble { border: 2px solid var(--badbg); grid-column: 1 / -1; }
.badge { border: 1px solid; border-radius: 4px; display: inline-block; font-size: .85rem; font-weight: 600;
  line-height: 1.3; padding: 0 .4rem; }
.badge.bad { background: var(--badbg); border-color: var(--badbg); color: var(--badfg); }
.badge.low { background: var(--warnbg); border-color: var(--warnbg); color: var(--warnfg); }
.say { color: var(--bad); font-weight: 600; }
article { background: var(--tint); border-left: 4px solid var(--badbg); margin: .5rem 0; padding: .5rem .75rem; }
article dl { display: grid; gap: .15rem .75rem; grid-template-columns: max-content minmax(0, 1fr); margin-top: .35rem; }
.now { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .35rem 0; }
.now dt, .now dd { display: inline; }
.now dd { font-variant-numeric: tabular-nums; font-weight: 600; }
.charts { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); margin: .4rem 0; }
svg { border-bottom: 1px solid var(--line); display: block; height: 44px; width: 100%; }
svg path { fill: none; stroke: var(--link); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
svg .area { fill: var(--area); stroke: none; }
svg .failed { stroke: var(--bad); stroke-dasharray: 4 2; stroke-width: 2; }
.ends { display: flex; justify-content: space-between; }
.scroll { overflow-x: auto; }
summary { cursor: pointer; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
caption { padding: .3rem 0; text-align: left; }
th, td { border-top: 1px solid var(--line); padding: .2rem .5rem .2rem 0; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
.more td { border: 0; color: var(--bad); font-size: .85rem; overflow-wrap: anywhere; }
tbody th { font-weight: normal; min-width: 8.6rem; }
footer { margin-top: 1rem; }
@media (max-width: 45rem) {
  .sum { grid-template-columns: repeat(3, 1fr); }
  .sum div { padding: .3rem .4rem; }
  .sum dd { font-size: 1rem; }
  article { padding: .4rem .5rem; }
  article dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  article dd { margin-bottom: .2rem; }
}
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


@dataclass(frozen=True, slots=True)
class View:
    """What the address asks for. `refresh`: seconds between reloads, 0 for none. `opened`: the UUID of the mapping
    whose shards are shown unfolded, and stay so when the page reloads; empty for none.
    """

    refresh: int = REFRESH
    opened: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "View":
        """From a query string; what is not understood is as if it were not there."""
        refresh = query.get("refresh", "")
        wanted = int(refresh) if refresh.isascii() and refresh.isdecimal() and len(refresh) <= 4 else REFRESH
        return cls(wanted if wanted == 0 else max(2, wanted), query.get("open", ""))


def render(status: Document, view: View) -> str:
    """The page for a document of `/api/status` with history."""
    return _Page(status, view).text()


class _Page:
    """One page being written; counts how much it may still show."""

    def __init__(self, status: Document, view: View) -> None:
        self._status = status
        self._view = view
        self._now: float = status["at"]
        self._cards = _CARDS
        self._room = _ROOM
        self._charts = _CHARTED

    def text(self) -> str:
        found = mappings_worst_first(self._status["mappings"])
        all_of_them = totals(found)
        shown = found[:_MAPPINGS]
        sections = (
            "".join(map(self._mapping, shown))
            or "<p>No mappings. The config file declares them under event_source_mappings, or the API makes them.</p>"
        )
        more = ""
        if len(found) > len(shown):
            more = f"<p>{len(found) - len(shown):,} more mappings, none of them worse: see {_VERB}.</p>"
        refresh = self._view.refresh
        meta = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
        lead = f"{all_of_them.blocked} blocked - " if all_of_them.blocked else ""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">{meta}'
            f"<title>{lead}esm-poller</title><style>{_STYLE}</style></head><body>"
            f"<header><h1>esm-poller <small>{escape(self._status['version'])}</small></h1>{self._asked()}</header>"
            f"<main>{self._store()}{_summary(all_of_them)}{_index(found, self._now)}"
            f'<div class="grid">{sections}</div>{more}</main>'
            '<footer><p class="soft">Lag: the larger of how far reading is behind the tip and the age of the batch in '
            "work. Headroom: until the oldest record that is not done leaves the stream. Rates: of the last minute; "
            "failed counts the records of every invocation that was not a success.</p></footer></body></html>\n"
        )

    def _asked(self) -> str:
        """When this was, and the switch for reloading."""
        at = datetime.fromtimestamp(self._now, UTC)
        moment = f'<time datetime="{at:%Y-%m-%dT%H:%M:%SZ}">{at:%Y-%m-%d %H:%M:%S} UTC</time>'
        refresh = self._view.refresh
        if refresh:
            how = f'reloads every {refresh} s (<a href="{self._address(refresh=0)}">stop</a>)'
        else:
            how = f'does not reload (<a href="{self._address(refresh=REFRESH)}">reload every {REFRESH} s</a>)'
        return f'<p class="soft">As of {moment}, {how}</p>'

    def _store(self) -> str:
        problem = self._status["store"]["problem"]
        return f'<p class="say">Positions cannot be saved. {escape(problem)}</p>' if problem else ""

    def _address(self, refresh: int | None = None, opened: str | None = None) -> str:
        refresh = self._view.refresh if refresh is None else refresh
        opened = self._view.opened if opened is None else opened
        query = [f"refresh={refresh}"] if refresh != REFRESH else []
        query += [f"open={_word(opened)}"] if opened else []
        return "/?" + "&amp;".join(query) if query else "/"

    def _mapping(self, mapping: Document) -> str:
        ranked = worst_first(mapping["shards"])
        troubled = [shard for shard in ranked if is_troubled(shard)]
        cards = troubled[: min(_CARDS_OF_ONE, self._cards)]
        self._cards -= len(cards)
        more = ""
        if len(troubled) > len(cards):
            more = f'<p class="say">{len(troubled) - len(cards):,} more shards in trouble: see the table below.</p>'
        kind = ' class="trouble"' if has_trouble(mapping) else ""
        return (
            f'<section{kind} id="m-{_word(mapping["uuid"])}"><h2>{_clip(mapping["function"])} {_badges(mapping)}</h2>'
            f'<p class="soft">from {_clip(source_name(mapping))}<br>'
            f'<span class="id">{_clip(mapping["uuid"])}</span></p>'
            f"{_reasons(mapping)}{''.join(_card(shard, self._now) for shard in cards)}{more}{_figures(mapping)}"
            f"{self._charts_of(mapping)}{self._more_of(mapping, ranked, unfold=bool(more))}</section>"
        )

    def _charts_of(self, mapping: Document) -> str:
        history = mapping.get("history")
        if history is None or self._charts <= 0:
            return ""
        self._charts -= 1
        return _charts(mapping, history)

    def _more_of(self, mapping: Document, ranked: Sequence[Document], *, unfold: bool) -> str:
        """What is folded away unless troubled shards stand there only: its shards, and where the mapping comes from."""
        opened = mapping["uuid"] == self._view.opened
        origin = mapping.get("declared_in")
        made = f"declared in {_clip(origin)}" if origin else "made through the API"
        if not ranked:
            title = "No shards yet" if mapping["source"] != "sqs" else "Details"
        else:
            states = Counter(map(shard_state, ranked))
            title = f"{len(ranked):,} shard{'s' * (len(ranked) != 1)}: " + ", ".join(
                f"{count:,} {escape(state)}" for state, count in states.most_common()
            )
        uuid = mapping["uuid"]
        keep = f'<a href="{self._address(opened="")}">Fold when the page reloads</a>'
        if not opened:
            keep = f'<a href="{self._address(opened=uuid)}">Keep unfolded when the page reloads</a>'
        result = f", last result: {_clip(mapping['last_result'])}" if mapping.get("last_result") else ""
        return (
            f"<details{' open' * (opened or unfold)}><summary>{title}</summary>"
            f'<p class="soft"><span class="id">{_clip(mapping["source_arn"])}</span>, {made}{result}. {keep}</p>'
            f"{self._table(ranked, opened=opened)}</details>"
        )

    def _table(self, ranked: Sequence[Document], *, opened: bool) -> str:
        if not ranked:
            return ""
        rows = [_row(shard, self._now) for shard in ranked[: _ROWS_OF_OPENED if opened else _ROWS_OF_ONE]]
        if not opened:
            lengths = accumulate(map(len, rows))
            rows = [row for row, length in zip(rows, lengths, strict=True) if length <= self._room]
            self._room -= sum(map(len, rows))
        left_out = len(ranked) - len(rows)
        more = f"<p>{left_out:,} more shards, none of them worse: see {_VERB}.</p>" if left_out else ""
        if not rows:
            return more
        head = "".join(f'<th scope="col">{name}</th>' for name in ("Shard", "Lag", "Headroom", "In flight, held"))
        return (
            '<div class="scroll"><table><caption>Shards, worst first</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}"
        )


def _summary(found: Totals) -> str:
    """The line on top."""
    least = ""
    if found.least is not None:
        least = f' <small><a href="#m-{_word(found.least["uuid"])}">{_clip(found.least["function"])}</a></small>'
    mappings = f"{found.mappings:,}"
    if found.disabled:
        mappings += f" <small>{found.disabled:,} paused</small>"
    failing = "" if not found.failed else f" <small>{per_second(found.failed)} failed/s</small>"
    tiles = (
        ("Blocked shards", f"{found.blocked:,}", "bad" if found.blocked else ""),
        ("Least headroom", duration(found.headroom) + least, "low" if is_low(found.headroom) else ""),
        ("Worst lag", duration(found.lag), ""),
        ("Delivered records/s", per_second(found.records) + failing, ""),
        ("Mappings", mappings, ""),
        ("Shards", f"{found.shards:,}", ""),
    )
    shown = "".join(
        f"<div{f' class={kind}' if kind else ''}><dt>{name}</dt><dd>{text}</dd></div>" for name, text, kind in tiles
    )
    return f'<dl class="sum">{shown}</dl>'


def _index(ranked: Sequence[Document], now: float) -> str:
    """A line for each troubled mapping, when they are several: the first of them may fill a telephone's screen."""
    troubled = [mapping for mapping in ranked if has_trouble(mapping)]
    if len(troubled) < 2:
        return ""
    lines = []
    for mapping in troubled[:10]:
        link = (
            f'<a href="#m-{_word(mapping["uuid"])}">{_clip(mapping["function"])}</a> from {_clip(source_name(mapping))}'
        )
        lines.append(f"<li>{link}: {_in_short(mapping, now)}</li>")
    if len(troubled) > 10:
        lines.append(f"<li>and {len(troubled) - 10:,} more mappings</li>")
    return f'<ul class="index">{"".join(lines)}</ul>'


def _in_short(mapping: Document, now: float) -> str:
    blocked = sum(map(is_blocked, mapping["shards"]))
    said = []
    if blocked:
        said.append(f"<strong>{blocked:,} shard{'s' * (blocked != 1)} blocked</strong>")
    if is_low(headroom := headroom_of(mapping)):
        said.append(f"<strong>data expires {expiry({'headroom_seconds': headroom}, now)}</strong>")
    if is_open(mapping):
        said.append(f"circuit {escape(mapping['breaker'])}")
    if mapping["reason"]:
        said.append(_clip(mapping["reason"]))
    return "; ".join(said) or "trouble with its source"


def _badges(mapping: Document) -> str:
    """The state, and what else decides whether anything moves."""
    paused = ": paused" if mapping["state"] == "Disabled" else ""
    badges = [f'<span class="badge">{_clip(mapping["state"])}{paused}</span>']
    blocked = sum(map(is_blocked, mapping["shards"]))
    if blocked:
        badges.append(f'<span class="badge bad">{blocked:,} of {len(mapping["shards"]):,} shards BLOCKED</span>')
    if is_open(mapping):
        badges.append(f'<span class="badge bad">circuit {escape(mapping["breaker"])}</span>')
    if mapping.get("seek_pending"):
        badges.append('<span class="badge low">seek pending</span>')
    return " ".join(badges)


def _reasons(mapping: Document) -> str:
    said = []
    if mapping["reason"]:
        said.append(_clip(mapping["reason"]))
    if is_open(mapping):
        said.append("Receiving is paused: the target cannot be reached or throttles. It is tried again by itself.")
    if mapping.get("records_lost"):
        said.append(f"{mapping['records_lost']:,} records left the stream before they were done, since the start.")
    shown = "".join(f'<p class="say">{text}</p>' for text in said)
    if mapping.get("records_dropped"):
        shown += f"<p>{mapping['records_dropped']:,} records given up by a retry or age limit, since the start.</p>"
    if mapping.get("seek_pending"):
        shown += "<p>Its positions are to be moved, once it runs and what is in flight has ended.</p>"
    return shown


def _figures(mapping: Document) -> str:
    figures = [
        ("delivered", f"{per_second(mapping.get('records_per_second'))}/s"),
        ("failed", f"{per_second(mapping.get('failed_per_second'))}/s"),
        ("in flight", f"{mapping['in_flight']:,}"),
    ]
    if mapping["source"] != "sqs":
        figures += [("lag", duration(mapping_lag(mapping))), ("headroom", duration(headroom_of(mapping)))]
    if mapping.get("receivers") is not None:
        figures.append(("receive loops", f"{mapping['receivers']:,} of at most {mapping['receiver_limit']:,}"))
    return f'<dl class="now">{"".join(f"<div><dt>{name}</dt> <dd>{text}</dd></div>" for name, text in figures)}</dl>'


def _card(shard: Document, now: float) -> str:
    """A troubled shard: what blocks it, since when, why, when it is tried again, and when its data expires."""
    badges, facts = [], []
    if is_blocked(shard):
        badges.append(f'<span class="badge bad">BLOCKED {duration(shard["blocked_seconds"])}</span>')
    if is_low(shard["headroom_seconds"]):
        badges.append(f'<span class="badge low">Data expires {expiry(shard, now)}</span>')
    elif shard["headroom_seconds"] is not None:
        facts.append(("Data expires", expiry(shard, now)))
    if shard["last_error"]:
        facts.append(("Last error", f"<strong>{_clip(shard['last_error'])}</strong>"))
    if is_blocked(shard):
        since = instant(now - shard["blocked_seconds"], now)
        times = f"attempt{'s' * (shard['attempts'] != 1)}"
        facts.append(("Blocked since", f"{since}, {shard['attempts']:,} {times}, the next {next_attempt(shard, now)}"))
    if shard["first_sequence"] is not None:
        facts.append(("Failing batch", _batch(shard)))
    facts.append(("Lag", f"{duration(shard_lag(shard))}, {shard['in_flight']:,} in flight, {shard['held']:,} held"))
    shown = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts)
    return (
        f'<article><h3><span class="id">{_clip(shard["id"])}</span> {" ".join(badges)}</h3><dl>{shown}</dl></article>'
    )


def _row(shard: Document, now: float) -> str:
    state = "" if shard["state"] == "running" else f" <small>{escape(shard_state(shard))}</small>"
    notes = []
    if is_blocked(shard):
        notes.append(f"<strong>BLOCKED {duration(shard['blocked_seconds'])}</strong>")
    if shard["last_error"]:
        notes.append(_clip(shard["last_error"], 80))
    if is_blocked(shard):
        notes.append(f"{shard['attempts']:,} attempts, the next {next_attempt(shard, now)}")
    if shard["first_sequence"] is not None:
        notes.append(f"batch {_batch(shard)}")
    headroom = duration(shard["headroom_seconds"])
    if is_low(shard["headroom_seconds"]):
        headroom = f"<strong>{headroom}: low</strong>"
    cells = (duration(shard_lag(shard)), headroom, f"{shard['in_flight']:,}, {shard['held']:,}")
    more = f'<tr class="more"><td colspan="4">{"; ".join(notes)}</td></tr>' if notes else ""
    return (
        f'<tr><th scope="row"><span class="id">{_clip(shard["id"])}</span>{state}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>{more}"
    )


def _batch(shard: Document) -> str:
    """The first and last sequence number of the failing batch."""
    ends = dict.fromkeys((shard["first_sequence"], shard["last_sequence"] or shard["first_sequence"]))
    return " to ".join(f'<span class="id">{_clip(end)}</span>' for end in ends)


# --- charts: the last hour, two samples to a point

_WIDTH, _HEIGHT = 120, 40


def _charts(mapping: Document, history: Document) -> str:
    rates = _halved(history["records_per_second"]), _halved(history["failed_per_second"])
    charts = []
    if mapping["source"] != "sqs":
        lag = _halved(history["lag_seconds"])
        charts.append(_figure("Lag", "", [("", lag)], duration))
    legend = ", failed dashed" if any(rates[1]) else ""
    charts.append(_figure("Delivered/s", legend, [("", rates[0]), ("failed", rates[1])], per_second))
    return f'<div class="charts">{"".join(charts)}</div>'


def _figure(
    name: str, legend: str, lines: Sequence[tuple[str, Sequence[float | None]]], say: Callable[[float], str]
) -> str:
    """A chart with its words: the caption says in text what the lines show."""
    values = [value for _, line in lines for value in line if value is not None]
    if not values:
        return f"<figure><figcaption>{name}: not known in the last hour</figcaption></figure>"
    top = max(values)
    main = [value for value in lines[0][1] if value is not None]
    peak = f"highest {say(max(main))}" if main else ""
    if len(lines) > 1 and legend:
        peak += f"{legend}, highest {say(max(value for value in lines[1][1] if value is not None))}"
    text = f"{name}, last hour: {peak}"
    paths = [_path(line, top, kind) for kind, line in lines if not kind or any(line)]
    return (
        f"<figure><figcaption>{name}, {peak}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{text}">'
        f'{"".join(paths)}</svg><div class="ends soft" aria-hidden="true"><span>1 h ago</span><span>now</span></div>'
        "</figure>"
    )


def _halved(values: Sequence[float | None]) -> list[float | None]:
    """Half as many points, each the worse of two: a peak must not vanish."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return [max((value for value in pair if value is not None), default=None) for pair in pairs]


def _path(values: Sequence[float | None], top: float, kind: str) -> str:
    """The line, with gaps where nothing is known, and what is under it."""
    runs: list[list[tuple[int, int]]] = [[]]
    for x, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((x, round(_HEIGHT - 1 - (_HEIGHT - 3) * value / top) if top > 0 else _HEIGHT - 1))
    drawn, under = [], []
    for run in filter(None, runs):
        line = " ".join(f"{x} {y}" for x, y in _corners(run))
        drawn.append(f"M{line}h1")  # what one sample draws must be seen too
        under.append(f"M{line}h1V{_HEIGHT}H{run[0][0]}z")
    if kind:
        return f'<path class="{kind}" d="{"".join(drawn)}"/>'
    return f'<path class="area" d="{"".join(under)}"/><path d="{"".join(drawn)}"/>'


def _corners(run: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without the points inside a level stretch."""
    inner = zip(run, run[1:], run[2:], strict=False)
    kept = [point for before, point, after in inner if not before[1] == point[1] == after[1]]
    return [run[0], *kept, *run[-1:][: len(run) > 1]]


# --- text


def _clip(text: str, length: int = _TEXT) -> str:
    """Escaped, and of bounded length."""
    return escape(text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}")


def _word(text: str) -> str:
    """For an id or an address: nothing but what a UUID has."""
    return "".join(char for char in text[:64] if char.isascii() and (char.isalnum() or char == "-"))
