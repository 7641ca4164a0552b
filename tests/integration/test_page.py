"""The status page in a headless Chromium: what a person sees. Runs with --browser; needs Debian's `chromium`."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from poller.core.model import MappingStatus
from poller.server import Server
from poller.settings import BearerAuth, ServerSettings
from tests.fakes.statuses import SetClock, StatusControl, blocked, fleet, mapping, queue, sampled, shard, uuid
from tests.integration.browser import Tab, browsing

pytestmark = pytest.mark.browser

DESK = (1280, 900)
PHONE = (390, 844)


@contextlib.asynccontextmanager
async def serving(*statuses: MappingStatus, **settings: object) -> AsyncIterator[str]:
    """The URL of a server that shows them, with an hour of history."""
    control = StatusControl(*statuses)
    metrics, history = sampled(control)
    server = Server(ServerSettings(port=0, **settings), control, metrics, SetClock(), random.Random(1))
    server.history = history
    port = await server.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        await server.stop()


@pytest.fixture
async def tab() -> AsyncIterator[Tab]:
    async with browsing() as made:
        yield made


WORLDS = {
    "fleet": fleet(),
    "empty": [],
    "one": [mapping(0, *map(shard, range(4)))],
    "all blocked": [mapping(3, *map(blocked, range(40)), name="a-function-with-a-rather-long-name-" * 3)],
    "queues": [queue(1, breaker="open", reason="connection refused"), queue(2), mapping(5, state="Disabled")],
}


@pytest.mark.parametrize("world", WORLDS)
async def test_no_request_leaves_the_host_and_the_policy_is_kept(tab: Tab, world: str) -> None:
    """One document is all that is asked for, and the browser has nothing to complain about: no blocked style, no script.

    It is as wide as the window, on a telephone too, in both colour schemes.
    """
    async with serving(*WORLDS[world]) as url:
        for width, height in (DESK, PHONE):
            for scheme in ("light", "dark"):
                await tab.show(width, height, scheme, phone=(width, height) == PHONE)
                await tab.open(url)
                assert await tab.look("document.documentElement.scrollWidth <= innerWidth")
                ground = await tab.look("getComputedStyle(document.body).backgroundColor")
                assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 20, 25)"}[scheme]
        assert {request.rstrip("/") for request in tab.requests} == {url.rstrip("/")}
        assert tab.complaints == []


@pytest.mark.parametrize(("width", "height"), [DESK, PHONE])
async def test_the_blocked_shard_is_seen_without_scrolling(tab: Tab, width: int, height: int) -> None:
    """Among 500 shards of 50 mappings: which one, since when, why, and how long there is data, on the first screen."""
    async with serving(*fleet()) as url:
        await tab.show(width, height, phone=(width, height) == PHONE)
        await tab.open(url)
        card = "document.querySelector('article')"
        seen = await tab.look(f"{card}.innerText")
        for text in ("shardId-000000000003", "BLOCKED 2 h 42 min", "Data expires in 1 h 12 min", "500 from"):
            assert text in seen
        for part in ("h3", ".bad", ".low", "dd"):
            bottom = await tab.look(f"{card}.querySelector('{part}').getBoundingClientRect().bottom")
            assert 0 < bottom < height, part
        assert await tab.look("document.title") == "1 blocked - esm-poller"
        assert len(await tab.picture()) > 10_000


async def test_it_reloads_by_itself_and_stays_where_the_reader_is(tab: Tab) -> None:
    """The place on the page and what the address keeps unfolded survive; a reader can stop it."""
    async with serving(*fleet()) as url:
        await tab.show(*DESK)
        await tab.open(f"{url}?refresh=2&open={uuid(30)}")
        await tab.look("scrollTo(0, 1500)")
        await tab.look("window.old = true")
        await tab.loaded()
        async with asyncio.timeout(10):
            while await tab.look("scrollY") != 1500:
                await asyncio.sleep(0.05)
        assert await tab.look("window.old") is None
        assert await tab.look(f"document.getElementById('m-{uuid(30)}').querySelector('details').open")
        assert await tab.look("document.querySelectorAll('details[open]').length") == 1
        await tab.look("document.querySelector('header a').click()")
        await tab.loaded()
        assert await tab.look("location.search") == f"?refresh=0&open={uuid(30)}"
        assert await tab.look("document.querySelector('meta[http-equiv]')") is None


async def test_charts_are_drawn(tab: Tab) -> None:
    """Lines have an extent, failures are dashed, and all have a name for those who do not see them."""
    async with serving(mapping(0, shard(0), blocked(1))) as url:
        await tab.show(*DESK)
        await tab.open(url)
        widths = await tab.look("[...document.querySelectorAll('svg path')].map(p => p.getBoundingClientRect().width)")
        assert len(widths) == 5
        assert all(width > 100 for width in widths)
        assert await tab.look("getComputedStyle(document.querySelector('.failed')).strokeDasharray") == "4px, 2px"
        tree = await tab.ask("Accessibility.getFullAXTree")
        names = [one["name"]["value"] for one in tree["nodes"] if one.get("role", {}).get("value") == "image"]
        assert [name.partition(",")[0] for name in names] == ["Lag", "Delivered/s"]


async def test_the_token_is_the_password(tab: Tab) -> None:
    """With `server.auth` a browser is asked for a password, and shows the page with it."""
    async with serving(mapping(0, shard(0)), auth=(BearerAuth("correct horse"),)) as url:
        await tab.open(url.replace("//", "//any:correct%20horse@"))
        assert await tab.look("document.querySelector('h2').innerText") == "orders Enabled"
