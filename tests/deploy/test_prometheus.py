"""The alerts, the dashboard and the example of a scrape, as Prometheus reads them. Needs Debian's `prometheus`, which
has `promtool`, and PyPI's `grafana-foundation-sdk`, Grafana's own model of a dashboard.
"""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.integration.conftest import REGION
from tests.integration.daemon import Daemon, Ledger
from tests.integration.test_daemon import config, queue_of, stream_of
from tests.integration.test_streams_on_fake import Stream, Table, until

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((FOLDER / "poller.rules.yaml").read_text())
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "poller.json").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
INTERVAL = "250ms"
PLUGIN = {"titleFormat", "textFormat"}  # of an annotation, the Prometheus plugin's own: the model leaves them out
VARIABLES = {"$job": ".*", "$function": ".*", "$mapping": ".*", "$__rate_interval": "5s"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def queries() -> Iterator[tuple[str, str]]:
    """Every query of a panel, with the panel's title."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], filled(target["expr"])


class Prometheus:
    """A server that scrapes one daemon, with the rules of this project."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def ask(self, path: str, **parameters: str) -> Any:
        """What it answers; AssertionError when it does not like the question."""
        async with aiohttp.ClientSession() as http, http.get(f"{self._url}{path}", params=parameters) as answer:
            document = await answer.json()
            assert document["status"] == "success", (parameters, document)
            return document["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        return (await self.ask("/api/v1/query", query=expression))["result"]

    async def is_ready(self) -> bool:
        try:
            async with aiohttp.ClientSession() as http, http.get(f"{self._url}/-/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientConnectionError:
            return False


@contextlib.asynccontextmanager
async def prometheus(daemon: Daemon, folder: Path) -> AsyncIterator[Prometheus]:
    """A real one, with the example of a scrape: only its pace and its target are the test's."""
    document = yaml.safe_load((FOLDER / "scrape.yaml").read_text())
    document["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
    document["rule_files"] = [str(FOLDER / name) for name in document["rule_files"]]
    [scrape] = document["scrape_configs"]
    scrape |= {"scrape_timeout": INTERVAL, "static_configs": [{"targets": [f"127.0.0.1:{daemon.port}"]}]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(document))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        "--log.level=error",
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        made = Prometheus(f"http://{address}")
        await until(made.is_ready, 30, "the start of Prometheus")
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await process.wait()


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_the_rules_and_the_example() -> None:
    """The rules are well-formed, the example names them, and both are without lint."""
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", "--lint-fatal", "poller.rules.yaml")
    assert "SUCCESS: scrape.yaml is valid" in promtool("check", "config", "--lint-fatal", "scrape.yaml")


def test_the_rules_pass_their_own_tests() -> None:
    """Every alert fires in a case of its own, with its texts, and stays quiet in another one."""
    promtool("test", "rules", "poller.rules.test.yaml")
    fires, is_quiet = set(), set()
    for test in yaml.safe_load((FOLDER / "poller.rules.test.yaml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else is_quiet).add(case["alertname"])
    assert fires == is_quiet == set(ALERTS)


def test_every_alert_says_what_it_must() -> None:
    """How grave, what, which mapping and shard, and where the README says what to do."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        text = rule["annotations"]["summary"] + rule["annotations"]["description"]
        for label in ("mapping", "shard"):
            by = re.findall(r"by \(([^)]*)\)", rule["expr"])
            if by and label in by[-1]:
                assert f"$labels.{label} " in text, (name, label)
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "README.md"
        assert anchor == f"alert-{name.lower()}"
        assert f"#{anchor}" in anchors, name


def test_the_dashboard_is_one_that_grafana_knows() -> None:
    """Read into Grafana's own model and written again nothing is missing: no field is unknown, misspelled or misplaced."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder  # installed for these tests only
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))

    def assert_within(given: Any, known: Any, where: str) -> None:
        if isinstance(given, dict):
            assert isinstance(known, dict), where
            for key, value in given.items():
                if where.startswith("dashboard.annotations") and key in PLUGIN:
                    continue
                assert key in known or value is None, f"{where}.{key} is not a field that Grafana knows"
                assert_within(value, known.get(key), f"{where}.{key}")
        elif isinstance(given, list):
            assert isinstance(known, list), where
            assert len(known) == len(given), where
            for number, (one, other) in enumerate(zip(given, known, strict=True)):
                assert_within(one, other, f"{where}[{number}]")
        else:
            assert given == known, where

    assert_within(DASHBOARD, again, "dashboard")


def test_the_dashboard_hangs_together() -> None:
    """Panels have names and explanations, ids of their own and places that do not overlap; one data source, by variable."""
    assert DASHBOARD["uid"] == "esm-poller"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert sorted(set(ids)) == sorted(ids)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        cells |= taken
    assert all(panel["description"] and panel["title"] for panel in panels())
    sources = re.findall(r'"datasource": (\{"type.*?\}"\})', json.dumps(DASHBOARD))
    assert set(sources) == {'{"type": "prometheus", "uid": "${datasource}"}'}
    assert len(sources) == json.dumps(DASHBOARD).count('"datasource": ')
    rows = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert all(first < second for first, second in pairwise(rows))


async def test_every_query_means_something_to_a_real_prometheus(
    fake_aws, account, ledger: Ledger, daemons, tmp_path
) -> None:
    """A world with all sources, a shard that fails, and a failure destination: each query of the dashboard finds data,
    each alert can be evaluated, and every metric that they name is one that the daemon has.
    """
    failed = tmp_path / "failed"
    failed.mkdir()
    stream, table = Stream(fake_aws, account), Table(fake_aws, account)
    await stream.create(2)
    queue = fake_aws.queue("q", account, REGION)
    limits = {"BatchSize": 1, "MaximumRetryAttempts": 0}
    reported = {**limits, "DestinationConfig": {"OnFailure": {"Destination": f"file://{failed}"}}}
    daemon: Daemon = daemons(
        config(fake_aws, ledger, stream_of(stream.arn), stream_of(table.arn, **reported), queue_of(queue))
    )

    def rule(records: list[dict[str, Any]]) -> int | None:
        [source] = {record["eventSource"] for record in records}
        bad = source == "aws:dynamodb" or records[0]["eventID"].startswith("shardId-000000000001:")
        return 500 if bad else None

    ledger.rule = lambda records: None if "messageId" in records[0] else rule(records)
    await daemon.start()
    async with prometheus(daemon, tmp_path) as server:
        empty: set[str] = set()

        async def is_seen() -> bool:
            await stream.write(4)
            table.write(1)
            fake_aws.send(queue, ["x"])
            empty.clear()
            for title, query in queries():
                found = await server.query(query)
                if all(one["value"][1] == "NaN" for one in found):
                    empty.add(title)
            return not empty

        try:
            await until(is_seen, 60, "data for every query")
        except AssertionError:
            raise AssertionError(f"no data after a minute: {empty}") from None
        groups = (await server.ask("/api/v1/rules"))["groups"]
        rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
        assert rules.keys() == ALERTS.keys()
        await until(lambda: all_healthy(server), 20, "an evaluation of every alert")
        assert {alert["labels"]["alertname"] for alert in (await server.ask("/api/v1/alerts"))["alerts"]} <= {
            "PollerInvocationsFailing"  # waits for its ten minutes
        }
        for expression in [*(rule["expr"] for rule in ALERTS.values()), *annotations()]:
            await server.query(expression)
        for variable in DASHBOARD["templating"]["list"]:
            if variable["type"] == "query":
                selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
                assert all(found["metric"][label] for found in await server.query(filled(selector)))
        known = set(await server.ask("/api/v1/label/__name__/values"))
        named = re.findall(r"\b(?:poller|process|scrape)_\w+", json.dumps(RULES) + json.dumps(DASHBOARD))
        assert {name for name in named if not name.endswith("_interval")} <= known
        assert not await server.query(ALERTS["PollerDown"]["expr"])
        assert await daemon.stop() == 0
        await until(lambda: server.query(ALERTS["PollerDown"]["expr"]), 20, "the notice that the daemon is down")


def annotations() -> list[str]:
    return [filled(one["expr"]) for one in DASHBOARD["annotations"]["list"]]


async def all_healthy(server: Prometheus) -> bool:
    groups = (await server.ask("/api/v1/rules"))["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert not [rule["lastError"] for rule in found if rule.get("lastError")]
    return all(rule["health"] == "ok" for rule in found)
