"""A store that fails shows wherever an operator looks."""

from types import SimpleNamespace

import pytest

from poller.control import ControlPlane
from poller.errors import StoreUnavailable
from poller.server.page import View, render
from poller.server.remote import Remote, _Report
from poller.server.status import status_document
from poller.settings import DynamoStoreSettings
from poller.stores.dynamodb import DynamoStore
from poller.stores.memory import MemoryStore
from poller.telemetry import MetricsReport
from poller.verbs.status import status_lines

PROBLEM = "The store /x <failed>: database or disk is full (SQLITE_FULL). Make room on its disk."


def test_the_status_document() -> None:
    """Null while positions can be saved."""
    assert status_document([], 0.0)["store"] == {"problem": None}
    assert status_document([], 0.0, None, PROBLEM)["store"] == {"problem": PROBLEM}


def test_poller_status() -> None:
    """Before everything else; a daemon of an older release does not say."""
    assert status_lines(status_document([], 0.0, None, PROBLEM)) == [
        f"positions cannot be saved: {PROBLEM}",
        "no mappings",
    ]
    assert status_lines(status_document([], 0.0)) == ["no mappings"]
    assert status_lines({"mappings": []}) == ["no mappings"]


def test_the_page() -> None:
    """With the reason, as text."""
    assert "The store /x &lt;failed&gt;: " in render(status_document([], 0.0, None, PROBLEM), View())
    assert "Positions cannot be saved" not in render(status_document([], 0.0), View())


def test_readiness() -> None:
    """Not ready before anything that has not been reached, until it works again."""
    store = MemoryStore()
    supervisor = SimpleNamespace(unready=lambda: ["mapping m has not reached its source"])
    control = ControlPlane(store, supervisor, SimpleNamespace())
    assert control.unready() == ["mapping m has not reached its source"]
    assert control.store_problem() == ""
    store.problem = PROBLEM
    assert control.unready() == [f"positions cannot be saved: {PROBLEM}", "mapping m has not reached its source"]
    assert control.store_problem() == PROBLEM


def test_workers() -> None:
    """The daemon shows what any of them says."""
    remote = Remote(2, SimpleNamespace(now=lambda: 0.0))
    assert remote.store_problem() == ""
    for number, problem in enumerate(("", PROBLEM)):
        report = _Report((), None, (), MetricsReport(), problem)
        remote._up[number] = SimpleNamespace(report=report)
    assert remote.store_problem() == PROBLEM


async def test_a_table() -> None:
    """A write that fails is a problem until a write succeeds; reads that go on say nothing about it."""
    clients, observer = SimpleNamespace(), SimpleNamespace(requested=lambda operation, outcome: None)
    store = DynamoStore(clients, DynamoStoreSettings("t", "eu-west-1"), observer)
    with pytest.raises(StoreUnavailable):
        async with store._doing("save"):
            raise StoreUnavailable(PROBLEM)
    assert store.problem == PROBLEM
    async with store._doing("members"):
        pass
    assert store.problem == PROBLEM
    async with store._doing("beat"):
        pass
    assert store.problem == ""
