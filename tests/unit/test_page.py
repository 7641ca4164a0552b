"""The status page as text: what it says, in which order, how much of it, and that no value becomes markup."""

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from poller.core.model import ShardState
from poller.server import page
from poller.server.page import REFRESH, View, render
from poller.server.status import status_document
from tests.fakes.statuses import DAY, NOW, StatusControl, blocked, fleet, mapping, queue, sampled, shard, uuid

LIMIT = 1_000_000
_VOID = {"meta", "br", "path"}


class Reader(HTMLParser):
    """Well-formed or nothing: every element ends, in order. Keeps the elements and the text that a person sees."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.seen = []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.seen.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join("".join(self.seen).split())


USUAL = View()


def shown(*statuses, view=USUAL, past=True):
    recent = sampled(StatusControl(*statuses))[1].read(with_series=True) if past else None
    html = render(status_document(statuses, NOW, recent), view)
    return html, Reader(html)


# --- what it says ---


def test_a_blocked_shard_is_the_first_thing_after_the_totals() -> None:
    """Which one, by what, since when, until when there is data, in absolute and relative time."""
    _, read = shown(*fleet())
    text = read.text
    assert text.index("Blocked shards1") < text.index("refunds-1 Enabled") < text.index("orders-0 Enabled")
    for said in (
        "1 of 10 shards BLOCKED",
        "shardId-000000000003 BLOCKED 2 h 42 min Data expires in 1 h 12 min, at 13:59:13 UTC",
        "500 from 127.0.0.1:8080/orders: the answer was not a success",
        "10:05:13 UTC, 163 attempts, the next in 42 s, at 12:47:55 UTC",
        "49590338271490256608559692538361571095921575989136588898 to 4959033827149025660855969254092570275932420852",
        "As of 2026-11-23 12:47:13 UTC",
    ):
        assert said in text
    title = text.partition("esm-poller")[0]
    assert title == "1 blocked - "


def test_headroom_that_is_gone_says_so() -> None:
    """0 is not "in 0 s"."""
    _, read = shown(mapping(1, replace(blocked(0), oldest_arrival=NOW - 2 * DAY)))
    assert "Data expires now: records may be lost already" in read.text


def test_every_state_of_a_mapping_is_said() -> None:
    """Paused, circuit open, loops, seek pending, reason, lost and dropped records, where it comes from, last result."""
    statuses = (
        queue(1, breaker="open", reason="connection refused", declared_in=None),
        mapping(2, shard(0), state="Disabled", seek_pending=True, last_result="PROBLEM: Function call failed"),
        mapping(3, shard(0, last_error="AccessDenied"), replace(shard(1), state=ShardState.BLOCKED)),
    )
    control = StatusControl(*statuses)
    document = status_document(statuses, NOW, sampled(control)[1].read(with_series=True))
    document["mappings"][2] |= {"records_lost": 1_234, "records_dropped": 56}
    text = Reader(render(document, View())).text
    for said in (
        "circuit open", "Receiving is paused", "connection refused", "3 of at most 20", "made through the API",
        "Disabled: paused", "seek pending", "last result: PROBLEM: Function call failed",
        "declared in /etc/poller/poller.yaml", "AccessDenied", "waits for parent",
        "1,234 records left the stream", "56 records given up",
    ):  # fmt: skip
        assert said in text, said


def test_several_troubled_mappings_have_a_list_with_links() -> None:
    """The first of them may fill a screen; each link leads to what it names."""
    _, read = shown(mapping(1, blocked(0)), mapping(2, shard(0)), queue(3, breaker="open"))
    assert "billing from kinesis billing: 1 shard blocked; data expires in 1 h 12 min" in read.text
    targets = {attributes["id"] for _, attributes in read.elements if "id" in attributes}
    links = {link["href"][1:] for link in read.all("a") if link["href"].startswith("#")}
    assert {f"m-{uuid(1)}", f"m-{uuid(3)}"} <= links <= targets


def test_healthy_shards_are_folded_and_troubled_ones_are_not() -> None:
    """Unless more are in trouble than have a card: then the table is open, with the same facts."""
    _, read = shown(mapping(1, *map(shard, range(10))), mapping(2, blocked(0), *map(shard, range(1, 9))))
    assert ["open" in one for one in read.all("details")] == [False, False]
    assert len(read.all("article")) == 1
    html, read = shown(mapping(1, *map(blocked, range(20))))
    assert ["open" in one for one in read.all("details")] == [True]
    assert len(read.all("article")) == 5
    assert "15 more shards in trouble" in read.text
    assert html.count("163 attempts, the next in 42 s") == 25
    assert html.count("49590338271490256608559692540925702759324208523137515618") == 25


def test_nothing_is_said_of_nothing() -> None:
    """Without mappings, and before the first sample."""
    assert "No mappings." in shown()[1].text
    _, read = shown(mapping(1, shard(0)), past=False)
    assert read.all("svg") == []


# --- charts ---


def test_charts_say_in_words_what_they_show() -> None:
    """Each has a name for those who do not see it; a queue has no lag; failures are a dashed line of their own."""
    html, read = shown(mapping(1, blocked(0)), queue(2))
    labels = [svg["aria-label"] for svg in read.all("svg")]
    assert all(svg["role"] == "img" for svg in read.all("svg"))
    assert labels[0] == "Lag, last hour: highest 22 h 48 min"
    assert re.fullmatch(r"Delivered/s, last hour: highest \d+, failed dashed, highest 6\.7", labels[1])
    assert len(labels) == 3
    assert html.count('<path class="failed"') == 1


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([1.0] * 240, "M0 2 119 2h1"),  # a level stretch is two points
        ([None] * 238 + [0.0, 0.0], "M119 39h1"),
        ([4.0, None, None, None, 2.0, 4.0] + [None] * 234, "M0 2h1M2 2h1"),  # a gap is a gap
        ([0.0, 2.0] + [1.0] * 2 + [None] * 236, "M0 2 1 20h1"),  # the worse of two, never below the peak
    ],
)
def test_a_line_is_what_was_sampled(values, drawn) -> None:
    """Two samples a point, gaps where nothing is known, one sample alone still seen."""
    document = status_document([queue(1)], NOW, sampled(StatusControl(queue(1)))[1].read(with_series=True))
    document["mappings"][0]["history"] |= {"records_per_second": values, "failed_per_second": [None] * 240}
    assert f'<path d="{drawn}"/>' in render(document, View())


# --- how much ---


def test_a_usual_fleet_leaves_nothing_out() -> None:
    """50 mappings with 10 shards each, one blocked: all of them are there."""
    html, read = shown(*fleet())
    assert len(html.encode()) < 300_000
    assert html.count('<th scope="row">') == 500
    assert len(read.all("section")) == 50
    assert len(read.all("svg")) == 99  # a paused mapping's lag is not known
    assert "Lag: not known in the last hour" in read.text


@pytest.mark.parametrize(
    "statuses",
    [
        [mapping(1, *map(shard, range(10_000)))],
        [mapping(1, *(replace(blocked(n), last_error="x" * 5_000) for n in range(10_000)))],
        [mapping(n, *(replace(blocked(m), last_error="x" * 5_000) for m in range(20))) for n in range(400)],
        fleet(mappings=1_000, shards=4),
    ],
    ids=["one large", "all blocked", "many blocked", "many mappings"],
)
def test_it_stays_under_a_megabyte_and_says_what_it_leaves_out(statuses) -> None:
    """However much there is, and with the shards of one mapping asked for."""
    few = [replace(status, shards=status.shards[:1]) for status in statuses[:200]]
    document = status_document(statuses, NOW, sampled(StatusControl(*few))[1].read(with_series=True))
    for view in (View(), View(opened=uuid(1))):
        html = render(document, view)
        assert len(html.encode()) < LIMIT
        assert re.search(r"[1-9][0-9,]* more (shards|mappings), none of them worse: see ", html)


def test_the_worst_are_kept() -> None:
    """A blocked shard among thousands of mappings is on the page."""
    statuses = [mapping(n, shard(0)) for n in range(3_000)] + [mapping(3_000, *map(shard, range(500)), blocked(77_777))]
    html, read = shown(*statuses, past=False)
    assert "shardId-000000077777" in html
    assert len(read.all("article")) == 1
    assert "2,850 more shards" not in read.text
    assert "2,851 more mappings, none of them worse" in read.text


# --- the address ---


def test_a_reader_can_stop_the_reloads_and_keep_shards_unfolded() -> None:
    """Without script: both are links, and each keeps what the other chose."""
    _, read = shown(mapping(1, shard(0)))
    assert read.all("meta")[-1] == {"http-equiv": "refresh", "content": str(REFRESH)}
    assert [link["href"] for link in read.all("a")][-1] == f"/?open={uuid(1)}"
    _, read = shown(mapping(1, shard(0)), mapping(2, shard(0)), view=View(0, uuid(1)))
    assert not any("http-equiv" in meta for meta in read.all("meta"))
    assert ["open" in one for one in read.all("details")] == [True, False]
    links = [link["href"] for link in read.all("a") if link["href"].startswith("/")]
    assert links == [f"/?open={uuid(1)}", "/?refresh=0", f"/?refresh=0&open={uuid(2)}"]


@pytest.mark.parametrize(
    ("query", "refresh"),
    [
        ({}, REFRESH), ({"refresh": "0"}, 0), ({"refresh": "60"}, 60), ({"refresh": "1"}, 2), ({"refresh": "99999"}, REFRESH),
        ({"refresh": "-1"}, REFRESH), ({"refresh": "x"}, REFRESH), ({"refresh": "\u0663"}, REFRESH), ({"refresh": ""}, REFRESH),
    ],
)  # fmt: skip
def test_what_the_address_asks_is_bounded(query, refresh) -> None:
    """Nobody makes the page reload in a tight loop, and nonsense is ignored."""
    assert View.of(query).refresh == refresh


# --- safety and access ---


def test_no_value_becomes_markup() -> None:
    """Every text may be anybody's: names, errors, ids, states, the address itself."""
    evil = "<script>alert('x')</script>\"&"
    bad = replace(blocked(0), id=evil, last_error=evil, first_sequence=evil, last_sequence=evil)
    status = replace(
        mapping(1, bad), id=evil, function=evil, source_arn=f"arn:a:b:c:d:x/{evil}", state=evil, reason=evil,
        breaker=evil, last_result=evil, declared_in=evil,
    )  # fmt: skip
    html, read = shown(status, mapping(2, blocked(1)), view=View(opened=evil))
    assert "script" not in {tag for tag, _ in read.elements}
    assert html.count("&lt;script&gt;") >= 12
    for tag, attributes in read.elements:
        assert not any(name.startswith("on") or name in {"style", "src"} for name in attributes), tag
        assert re.match(r"/$|/\?|#", attributes.get("href", "/")), tag


def test_tables_and_headings_are_for_everybody() -> None:
    """A caption, scopes, a language, one first heading, no heading level left out."""
    _, read = shown(*fleet())
    assert read.all("html") == [{"lang": "en"}]
    assert len(read.all("caption")) == len(read.all("table")) == 50
    assert all(cell.get("scope") in {"col", "row"} for cell in read.all("th"))
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def luminance(colour):
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read(scheme) -> None:
    """WCAG AA: 4.5 to 1 for every pair of text and background that is used; 3 to 1 for lines that mean something."""
    blocks = re.findall(r":root \{([^}]*)\}", page._STYLE)
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", blocks[scheme]))

    def contrast(one, other):
        high, low = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for ground in ("bg", "panel", "tint"):
        for text in ("fg", "soft", "bad", "link"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("badfg", "badbg") >= 4.5
    assert contrast("warnfg", "warnbg") >= 4.5
    assert contrast("badbg", "panel") >= 3
