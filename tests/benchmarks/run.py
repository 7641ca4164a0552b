"""Run one client against the stub and take its figures. Everything here blocks; the work is in other processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.stub import ARNS, REGION, Plan, process_cpu

ROOT = Path(__file__).resolve().parents[2]
STALL_SECONDS = 60.0  # without a record or message delivered
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.05


class BenchmarkError(Exception):
    """A client ended, stalled, or lost, repeated or reordered records: its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is offered: a source, its shards and the batch size. `records` per measured stretch, by client."""

    source: str
    shards: int
    batch: int
    records: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.source} {self.batch}"

    def plan(self, client: str, share: float) -> Plan:
        """Whole batches in every shard, at least four; two more to warm up, and ten of a queue."""
        warm = self.batch * (10 if self.source == "sqs" else 2)
        batches = max(4, round(self.records[client] * share / self.shards / self.batch))
        return Plan(
            source=self.source,
            shards=self.shards,
            batch=self.batch,
            warm=warm,
            records=warm + batches * self.batch,
            audit=client != "bare",
        )


@dataclass(frozen=True, slots=True)
class Cpus:
    """Where the stub and the client run. None: anywhere, there is one CPU only."""

    stub: int | None
    client: int | None


def choose_cpus() -> Cpus:
    """Two different ones, if this process may use two."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cpus(allowed[0], allowed[1]) if len(allowed) > 1 else Cpus(None, None)


@contextlib.contextmanager
def _process(
    arguments: Sequence[str], cpu: int | None, log: Path, *, pipe: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A child of this interpreter, on a CPU of its own from its first instruction; ended on leaving."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "POLLER_"))}
    environment |= {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = os.sched_getaffinity(0)
    with log.open("ab") as errors:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})  # the child inherits it
        try:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else errors,
                stderr=errors,
            )
        finally:
            os.sched_setaffinity(0, before)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child.stdout:
            child.stdout.close()


class StubProcess:
    """The stub of a whole run, and what it is asked."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET, or POST of a document."""
        body = None if document is None else json.dumps(document).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data=body), timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer


@contextlib.contextmanager
def stub_process(cpus: Cpus) -> Iterator[StubProcess]:
    """Start the stub; end it on leaving."""
    with (
        tempfile.TemporaryDirectory(prefix="poller-bench-") as folder,
        _process(["-m", "tests.benchmarks.stub"], cpus.stub, Path(folder) / "stub.log", pipe=True) as child,
    ):
        assert child.stdout
        line = child.stdout.readline()
        if not line:
            raise BenchmarkError(f"the stub did not start: {(Path(folder) / 'stub.log').read_text()[-2_000:]}")
        yield StubProcess(json.loads(line)["port"])


def _mappings(source: str, batch: int, count: int = 1) -> list[dict[str, Any]]:
    """Mappings of so many streams or queues, which the stub takes for the same one."""
    mapping: dict[str, Any] = {"FunctionName": "bench", "BatchSize": batch}
    if source != "sqs":
        mapping["StartingPosition"] = "TRIM_HORIZON"
    return [{"EventSourceArn": ARNS[source] + (f"-{n}" if n else ""), **mapping} for n in range(count)]


def _daemon_config(folder: Path, url: str, mappings: Sequence[dict[str, Any]], timeout: float = 30.0) -> Path:
    """The daemon as shipped: every default but the endpoints, a port of its own and a store in a temporary folder."""
    document = {
        "aws": {"region": REGION, "endpoint_url": url},
        "functions": {"bench": {"url": f"{url}/target", "timeout_seconds": timeout}},
        "event_source_mappings": mappings,
        "store": f"sqlite://{folder}/poller.db",
        "server": {"host": "127.0.0.1", "port": 0},
        "log": {"level": "info", "format": "json"},
    }
    path = folder / "poller.yaml"
    path.write_text(json.dumps(document, indent=2))  # JSON is YAML
    return path


class Client:
    """A client under measurement."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.pid = process.pid
        self._name = name
        self._process = process
        self._log = log

    def check(self) -> None:
        """BenchmarkError when it has ended."""
        if self._process.poll() is not None:
            raise self.error(f"ended with exit code {self._process.returncode}")

    def error(self, what: str) -> BenchmarkError:
        """With the end of its log."""
        lines = self._log.read_text(errors="replace").splitlines()[-30:]
        return BenchmarkError("\n".join([f"{self._name} {what}; the end of its log:", *lines]))

    def stop(self) -> None:
        """SIGTERM. BenchmarkError when the daemon does not stop cleanly."""
        self._process.terminate()
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise self.error(f"did not stop within {STOP_SECONDS:.0f} s") from None
        if self._name == "daemon" and code != 0:
            raise self.error(f"ended with exit code {code} after SIGTERM")

    def kill(self) -> None:
        """What it holds is never done: it would use up its whole grace."""
        self._process.kill()
        self._process.wait()

    def resident_mb(self) -> float:
        """VmRSS."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1_024

    def descriptors(self) -> int:
        """Open ones."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())


@contextlib.contextmanager
def _client(
    name: str, plan: Plan, stub: StubProcess, cpus: Cpus, *, mappings: int = 1, timeout: float = 30.0
) -> Iterator[Client]:
    """Offer the plan and start a client on it. `mappings`, `timeout`: of the daemon and its function."""
    stub.ask("/_configure", asdict(plan))
    with tempfile.TemporaryDirectory(prefix="poller-bench-") as text:
        folder = Path(text)
        log = folder / "log"
        if name == "daemon":
            config = _daemon_config(folder, stub.url, _mappings(plan.source, plan.batch, mappings), timeout)
            arguments = ["-m", "poller", "run", "-c", str(config)]
        else:
            arguments = ["-m", "tests.benchmarks.peers", name, plan.source, "--endpoint", stub.url]
            arguments += ["--batch", str(plan.batch), "--shards", str(plan.shards)]
            arguments += ["--database", str(folder / "positions.db")]
        with _process(arguments, cpus.client, log) as process:
            client = Client(name, process, log)
            stub.ask("/_watch", {"pid": client.pid})
            yield client


def _until(client: Client, stub: StubProcess, key: str) -> dict[str, Any]:
    """The stub's figures once they have `key`. BenchmarkError when nothing moves any more."""
    progress, moved = -1, time.monotonic()
    while True:
        stats = stub.ask("/_stats")
        if stats[key]:
            return stats
        client.check()
        if (now := stats["delivered"] + stats["deleted"]) != progress:
            progress, moved = now, time.monotonic()
        elif time.monotonic() - moved > STALL_SECONDS:
            counts = {name: value for name, value in stats.items() if name not in {"start", "end"}}
            raise client.error(f"stalled: {counts}")
        time.sleep(_POLL_SECONDS)


def _audit(client: Client, plan: Plan, stats: dict[str, Any]) -> None:
    """BenchmarkError for anything lost, repeated, reordered or not understood."""
    wrong = {key: stats[key] for key in ("duplicates", "out_of_order", "unknown_records", "unknown_operations")}
    if plan.audit and stats["delivered"] != stats["expected"]:
        wrong["lost"] = stats["expected"] - stats["delivered"]
    if any(wrong.values()):
        raise client.error(f"delivered wrongly: { {key: value for key, value in wrong.items() if value} }")


def throughput(client_name: str, scenario: Scenario, share: float, stub: StubProcess, cpus: Cpus) -> dict[str, float]:
    """One measured stretch: CPU per record, and how busy the client and the stub were."""
    plan = scenario.plan(client_name, share)
    with _client(client_name, plan, stub, cpus) as client:
        stats = _until(client, stub, "end")
        resident = client.resident_mb()
        client.stop()
        _audit(client, plan, stub.ask("/_stats"))
    start, end = stats["start"], stats["end"]
    records, wall = end["done"] - start["done"], end["wall"] - start["wall"]
    cpu = end["client_cpu"] - start["client_cpu"]
    return {
        "records": records,
        "us_per_record": cpu / records * 1e6,
        "records_per_cpu_second": records / cpu,
        "wall_seconds": wall,
        "client_busy": cpu / wall,
        "stub_busy": (end["stub_cpu"] - start["stub_cpu"]) / wall,
        "rss_mb": resident,
    }


def idle(client_name: str, shards: int, seconds: float, stub: StubProcess, cpus: Cpus) -> dict[str, float]:
    """Kinesis shards without a record, after each was read twice: CPU per poll, polls a second, memory."""
    plan = Plan(source="kinesis", shards=shards, batch=100)
    with _client(client_name, plan, stub, cpus) as client:
        began = time.monotonic()
        while (stats := stub.ask("/_stats"))["calls"].get("GetRecords", 0) < 2 * shards:
            client.check()
            if time.monotonic() - began > STALL_SECONDS:
                raise client.error(f"did not read {shards} shards twice: {stats['calls']}")
            time.sleep(_POLL_SECONDS)
        start, cpu, polls = time.monotonic(), process_cpu(client.pid), stub.ask("/_stats")["calls"]["GetRecords"]
        time.sleep(seconds)
        wall, cpu = time.monotonic() - start, process_cpu(client.pid) - cpu
        polls = stub.ask("/_stats")["calls"]["GetRecords"] - polls
        resident = client.resident_mb()
        client.stop()
        _audit(client, plan, stub.ask("/_stats"))
    return {
        "us_per_poll": cpu / polls * 1e6,
        "polls_per_second": polls / wall,
        "client_busy": cpu / wall,
        "rss_mb": resident,
    }


def idle_queues(queues: int, seconds: float, stub: StubProcess, cpus: Cpus) -> dict[str, float]:
    """The daemon over queues without a message, each long-polled: its share of a core, memory, descriptors."""
    plan = Plan(source="sqs", batch=10)
    with _client("daemon", plan, stub, cpus, mappings=queues) as client:
        began = time.monotonic()
        while stub.ask("/_stats")["calls"].get("ReceiveMessage", 0) < queues:
            client.check()
            if time.monotonic() - began > STALL_SECONDS:
                raise client.error(f"does not poll {queues} queues")
            time.sleep(_POLL_SECONDS)
        calls, start, cpu = stub.ask("/_stats")["calls"], time.monotonic(), process_cpu(client.pid)
        time.sleep(seconds)
        wall, cpu = time.monotonic() - start, process_cpu(client.pid) - cpu
        polls = stub.ask("/_stats")["calls"]["ReceiveMessage"] - calls["ReceiveMessage"]
        figures = {"client_busy": cpu / wall, "polls_per_minute": polls / wall * 60}
        figures |= {"rss_mb": client.resident_mb(), "descriptors": client.descriptors()}
        client.stop()
    return figures


def stalled(shards: int, seconds: float, timeout: float, stub: StubProcess, cpus: Cpus) -> dict[str, float]:
    """Full shards, each a mapping's, and a target that never answers: each try ends by its timeout. Memory and
    descriptors a fifth of the way and at the end, and the most that was seen.
    """
    plan = Plan(
        source="kinesis", shards=shards, batch=100, warm=20_000, records=20_001, latency_ms=86_400_000, audit=False
    )
    samples: list[tuple[float, int]] = []
    with _client("daemon", plan, stub, cpus, timeout=timeout) as client:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            client.check()
            samples.append((client.resident_mb(), client.descriptors()))
            time.sleep(1)
        tries = stub.ask("/_stats")["events"]
        client.kill()
    early = samples[len(samples) // 5]
    return {
        "tries": tries,
        "rss_mb_early": early[0],
        "rss_mb_end": samples[-1][0],
        "rss_mb_most": max(memory for memory, _ in samples),
        "descriptors_early": early[1],
        "descriptors_end": samples[-1][1],
        "descriptors_most": max(descriptors for _, descriptors in samples),
    }


def latency(client_name: str, messages: int, stub: StubProcess, cpus: Cpus) -> dict[str, float]:
    """One SQS message each 10 ms to a client that long-polls: from there to be received until it is at the target."""
    plan = Plan(source="sqs", shards=1, batch=10, warm=100, records=100 + messages, trickle_ms=10)
    with _client(client_name, plan, stub, cpus) as client:
        stats = _until(client, stub, "end")
        client.stop()
        _audit(client, plan, stub.ask("/_stats"))
    return {f"{name}_ms": value for name, value in stats["latency_ms"].items()}
