"""The images and compose.yaml. With --soak they are built and run as they are, on a stand-in for the base image, which
takes six minutes and Debian's buildah, debootstrap, podman, runc, netavark, aardvark-dns, iptables, catatonit, and
docker-compose 2, which Debian 13 has.
"""

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.container import TOP, Engine, run, tool
from tests.integration.daemon import Ledger
from tests.integration.emulators import free_port
from tests.integration.test_daemon import Aws

FOLDER = TOP / "deploy/container"
COMPOSE = FOLDER / "compose.yaml"
DOCKERFILES = {"deploy/container/Dockerfile": ".", "deploy/container/aws/Dockerfile": "deploy/container/aws"}
IMAGE, AWS_IMAGE = "docker.io/library/esm-poller:local", "docker.io/library/esm-poller-aws:local"  # of compose.yaml
TOKEN = "token-of-the-test"
runs = pytest.mark.soak
DROPPED = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"]


@pytest.fixture(scope="module")
def engine():
    """With the daemon's image."""
    made = Engine()
    try:
        made.make_base()
        made.build("deploy/container/Dockerfile", ".", IMAGE)
        yield made
    finally:
        made.close()


class Container:
    """One that runs as the README says, in the host's network."""

    def __init__(self, engine: Engine, folder: Path, config: dict[str, Any], *arguments: str) -> None:
        self.engine, self.name, self.port = engine, folder.name, free_port()
        server = {"server": {"port": self.port}, "store": "sqlite:///var/lib/poller/poller.db"}
        folder.chmod(0o755)
        (folder / "poller.yaml").write_text(yaml.safe_dump({**server, **config}))
        self.options = [
            *DROPPED, "--network=host", f"--volume={folder}:/etc/poller:ro", f"--volume={self.name}:/var/lib/poller",
            f"--env=POLLER_HEALTH_URL=http://127.0.0.1:{self.port}/healthz",
            *(f"--env={name}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED")),
        ]  # fmt: skip
        self.arguments = arguments

    async def start(self) -> None:
        self.podman("run", "--detach", f"--name={self.name}", *self.options, IMAGE, *self.arguments)
        await until(lambda: self.events("started"), 30, lambda: f"the start of the daemon: {self.logs()}")

    def podman(self, *arguments: str, **more: Any) -> str:
        keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return run(tool("podman"), *arguments, env=self.engine.environment | keys, **more).stdout

    def logs(self) -> list[dict[str, Any]]:
        lines = run(tool("podman"), "logs", self.name, env=self.engine.environment).stderr.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.logs() if entry["event"] == name]

    def state(self) -> dict[str, Any]:
        return self.engine.inspect("container", "inspect", self.name)["State"]

    def stop(self) -> int:
        """By the image's own signal; the exit code."""
        self.podman("stop", "--time=40", self.name)
        return int(self.state()["ExitCode"])


async def until(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Wait until the condition holds; it is looked at again and again, as no event tells of it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not await asyncio.to_thread(condition):
                await asyncio.sleep(0.1)
            return
    raise AssertionError(f"{what()} has not happened in {seconds} s")


def config_of(aws: Aws, ledger: Ledger, queue: str) -> dict[str, Any]:
    return {
        "aws": {"region": "eu-west-1", "endpoint_url": aws.url},
        "functions": {"orders": {"url": ledger.url}},
        "event_source_mappings": [{"EventSourceArn": queue, "FunctionName": "orders"}],
    }


# --- what the tools that read the files say of them ---


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint_finds_nothing(dockerfile):
    """The Dockerfiles keep hadolint's rules."""
    assert run(tool("hadolint"), "--no-color", str(TOP / dockerfile)).stdout == ""


def test_the_build_sees_what_it_copies():
    """Every path that the daemon's Dockerfile copies is let through by its ignore file, and nothing else is."""
    text = (FOLDER / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", text, re.MULTILINE)
    sources = {name.rstrip("/") for line in copied for name in line.split()}
    rules = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert "*" in rules


def compose(*arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return run(tool("docker-compose"), f"--file={COMPOSE}", *arguments, **more)


@runs
def test_compose_reads_it():
    """Docker Compose takes the file; everything is published on 127.0.0.1 only; the daemon has time to stop."""
    document = json.loads(compose("config", "--format=json", env={"POLLER_TOKEN": TOKEN}).stdout)
    services = document["services"]
    assert set(services) == {"poller", "aws", "target", "records", "prometheus", "grafana"}
    for name, service in services.items():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            assert volume["type"] != "bind" or Path(volume["source"]).exists(), volume["source"]
    for name in ("poller", "target", "records"):
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]
    grace = yaml.safe_load((FOLDER / "poller/poller.yaml").read_text())["shutdown_grace_seconds"]
    assert services["poller"]["stop_grace_period"] == "40s"
    assert grace < 40


@runs
def test_compose_asks_for_a_token():
    """Without a token of the user's own nothing starts, and it is said what is missing."""
    done = compose("config", "--quiet", env={}, expect=None)
    assert done.returncode != 0
    assert "POLLER_TOKEN" in done.stderr


def test_promtool_reads_the_scrape_config(tmp_path):
    """Prometheus takes prometheus.yml together with the rules that compose.yaml mounts."""
    text = (FOLDER / "prometheus.yml").read_text()
    assert "- /etc/prometheus/rules/*.rules.yaml" in text
    path = tmp_path / "prometheus.yml"
    path.write_text(text.replace("/etc/prometheus/rules", str(TOP / "deploy/prometheus")))
    assert "1 rule files found" in run(tool("promtool"), "check", "config", str(path)).stdout


# --- the daemon's image ---


@runs
def test_the_image_says_how_to_run_it(engine):
    """User, command, signal, health check and labels are those that the README names."""
    found = engine.inspect("image", "inspect", IMAGE)
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["poller"], ["run"])
    assert config["StopSignal"] == "SIGTERM"
    assert config["ExposedPorts"] == {"9477/tcp": {}}
    assert found["Healthcheck"]["Test"] == ["CMD", "python", "-I", "/opt/poller/healthcheck.py"]
    labels = {name.rpartition(".")[2] for name in config["Labels"] if name.startswith("org.opencontainers.image.")}
    assert labels == {"title", "description", "licenses", "version", "revision"}


@runs
def test_nothing_can_be_installed_in_the_image(engine):
    """No pip, no compiler, and nothing that its user may write but the state and what every Debian has."""
    script = """
        python -c 'import poller.app, opentelemetry.sdk' || exit 9
        ! python -m pip --version && ! python -m ensurepip --version && ! /usr/local/bin/python -m pip --version || exit 8
        ! command -v pip gcc cc make || exit 7
        find / -xdev \\( -path /proc -o -path /dev -o -path /sys \\) -prune -o -writable ! -type l -print 2>/dev/null || true
    """
    options = ("--rm", "--network=none", "--no-healthcheck", "--entrypoint=sh")
    writable = set(engine.podman("run", *options, IMAGE, "-c", script).split())
    assert writable - {"/tmp", "/var/tmp", "/var/lock", "/run/lock"} == {"/var/lib/poller"}


@runs
def test_what_is_installed_is_what_is_locked(engine):
    """The image has every package of the lock file in its version, and no other but the daemon."""
    script = "from importlib.metadata import distributions as d\nfor x in d(): print(x.name, x.version)"
    options = ("--rm", "--network=none", "--no-healthcheck", "--entrypoint=python")
    listed = engine.podman("run", *options, IMAGE, "-I", "-c", script).splitlines()
    installed = {re.sub("[-_.]+", "-", name).lower(): version for name, version in (line.split() for line in listed)}
    lock = (TOP / "deploy/requirements.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", lock, re.MULTILINE))  # a marker means: not on Linux
    assert f"ARG VERSION={installed.pop('esm-poller')}\n" in (FOLDER / "Dockerfile").read_text()
    assert installed == locked


@runs
@pytest.mark.parametrize("arguments", [(), ("run", "--workers=2")])
async def test_it_delivers_from_a_read_only_root(engine, ministack, account, ledger, tmp_path, arguments):
    """As an unprivileged user with a root that cannot be written, on its volume: delivers, is healthy, stops cleanly."""
    aws = Aws(ministack, account)
    queue = aws.queue("orders", VisibilityTimeout="4")  # MiniStack hands messages to a poll that was given up, too
    container = Container(engine, tmp_path, config_of(aws, ledger, queue), *arguments)
    await container.start()
    aws.send("orders", 0, 20)
    await ledger.until(lambda: ledger.count("sqs") == 20, 20, "delivery")
    container.podman("healthcheck", "run", container.name)
    identity = container.podman("exec", container.name, "sh", "-c", "id -u; touch /opt/x 2>&1; ls /var/lib/poller")
    assert identity.startswith("10001\n")
    assert "Read-only file system" in identity
    assert "poller.db" in identity
    assert not [entry for entry in container.logs() if entry["level"] in {"error", "critical"}]
    assert container.stop() == 0
    assert container.events("stopped")
    container.podman("start", container.name)
    aws.send("orders", 20, 5)
    await ledger.until(lambda: ledger.count("sqs") == 25, 30, "delivery after a restart")
    assert not ledger.redelivered()
    assert container.stop() == 0


@runs
async def test_the_health_check_follows_healthz(engine, ministack, account, ledger, tmp_path):
    """0 while the daemon answers; 1, with the reason and within its timeout, when it hangs or nobody listens."""
    aws = Aws(ministack, account)
    container = Container(engine, tmp_path, config_of(aws, ledger, aws.queue("orders")))
    await container.start()
    check = ["exec", "--env=HTTP_PROXY=http://127.0.0.1:1", "--env=http_proxy=http://127.0.0.1:1"]
    script = ["python", "-I", "/opt/poller/healthcheck.py"]
    assert container.podman(*check, container.name, *script) == ""
    nobody = f"--env=POLLER_HEALTH_URL=http://127.0.0.1:{free_port()}/healthz"
    assert "does not answer: " in container.podman(*check, nobody, container.name, *script, expect=1)
    closed = f"--env=POLLER_HEALTH_URL=http://127.0.0.1:{container.port}/nothing"
    assert "answered 404" in container.podman(*check, closed, container.name, *script, expect=1)
    container.podman("pause", container.name)
    listening = ["run", "--rm", "--no-healthcheck", "--entrypoint=python", *container.options, IMAGE, *script[1:]]
    assert "timed out" in container.podman(*listening, expect=1)
    container.podman("unpause", container.name)
    container.podman("healthcheck", "run", container.name)
    assert container.stop() == 0


# --- compose.yaml ---


@pytest.fixture
def docker(engine):
    """Docker's API, by podman, for Compose: the environment that it needs."""
    socket = engine.folder / "api.sock"
    service = subprocess.Popen(
        [tool("podman"), "system", "service", "--time=0", f"unix://{socket}"],
        env=engine.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield {**engine.environment, "DOCKER_HOST": f"unix://{socket}", "POLLER_TOKEN": TOKEN}
    service.terminate()
    service.wait(20)


@runs
async def test_the_example_delivers(engine, docker, tmp_path):
    """Compose starts the daemon, the local AWS, the target and the writer of records, and both sources are delivered."""
    engine.build("deploy/container/aws/Dockerfile", DOCKERFILES["deploy/container/aws/Dockerfile"], AWS_IMAGE)
    await until((engine.folder / "api.sock").exists, 20, lambda: "the start of podman's API")
    port = free_port()
    ports = tmp_path / "ports.yaml"
    ports.write_text(
        f"services: {{poller: {{ports: !override ['127.0.0.1:{port}:9477']}}, aws: {{ports: !override []}}}}"
    )
    options = (f"--file={ports}", "--project-name=example")
    up = subprocess.Popen(
        [tool("docker-compose"), f"--file={COMPOSE}", *options, "up", "--detach", "--no-build", "--pull=never",
         "poller", "aws", "target", "records"],
        env=docker, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def started() -> bool:
        """Health checks are run by hand: podman leaves them to systemd, which need not be here."""
        for name in ("aws", "records"):
            run(tool("podman"), "healthcheck", "run", f"example-{name}-1", env=docker, expect=None)
        return up.poll() is not None

    def delivered() -> bool:
        said = compose(*options, "logs", "target", env=docker).stdout
        return all(f" records of arn:aws:{source}:" in said for source in ("kinesis", "sqs"))

    def logs() -> str:
        return compose(*options, "logs", env=docker).stdout

    try:
        await until(started, 90, lambda: f"the start of the example: {logs()}")
        assert up.returncode == 0, up.stdout.read()
        await until(delivered, 60, lambda: f"delivery of both sources: {logs()}")
        run(tool("podman"), "healthcheck", "run", "example-poller-1", env=docker)
        run(tool("podman"), "healthcheck", "run", "example-target-1", env=docker)
        shown = run(tool("podman"), "exec", "example-poller-1", "poller", "status", env=docker).stdout
        assert shown.startswith("2 mappings, 2 shards, none blocked")
        compose(*options, "stop", env=docker)
        assert engine.inspect("container", "inspect", "example-poller-1")["State"]["ExitCode"] == 0
    finally:
        up.kill()
        up.wait()
        up.stdout.close()
        compose(*options, "down", "--volumes", "--timeout=5", env=docker)
