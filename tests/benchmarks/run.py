"""Run one client against the stub and take its figures. Everything here blocks; the work is in other processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.records import RECORD_BYTES, REGION, stream_arn
from tests.benchmarks.stub import Plan, process_cpu
from tests.fakes.certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
STALL_SECONDS = 60.0  # in which nothing moved
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.05
_QUICK_SHARE = 0.05

Figures = dict[str, float]


class BenchmarkError(Exception):
    """A client ended, stalled, or lost, repeated or reordered records: its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is offered: `shards` of each of so many `streams`, each of which has a mapping; a queue is one shard. `page`:
    the most records of one GetRecords answer of Kinesis.

    `records` in the measured stretch, of all shards. `warm`: batches of each shard before it. `mapping`: further fields
    of the daemon's mappings. `answer`: the target's. `tls`: to the services and the target.
    """

    source: str
    batch: int
    records: int
    streams: int = 1
    shards: int = 1
    warm: int = 2
    page: int = 10_000
    mapping: Mapping[str, Any] = field(default_factory=dict)
    answer: str = "{}"
    tls: bool = False

    def plan(self, client: str, share: float) -> Plan:
        """Whole batches in every shard, at least two."""
        warm = self.warm * self.batch
        batches = max(2, round(self.records * share / (self.streams * self.shards) / self.batch))
        return Plan(
            source=self.source,
            streams=self.streams,
            shards=self.shards,
            batch=self.batch,
            warm=warm,
            records=warm + batches * self.batch,
            page=self.page,
            audit=client != "bare",
            keyed=self.mapping.get("ParallelizationFactor", 1) > 1,
            answer=self.answer,
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
    arguments: Sequence[str], cpu: int | None, log: Path, *, pipe: bool = False, ca: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child of this interpreter, on a CPU of its own from its first instruction; ended on leaving. `ca`: what its AWS
    clients trust.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "POLLER_"))}
    environment |= {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    if ca:
        environment["AWS_CA_BUNDLE"] = str(ca)
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


@dataclass(frozen=True, slots=True)
class Bench:
    """The stub of a whole run, what it is asked, and where clients run. `is_quick`: it only shows that all works."""

    url: str
    tls_url: str
    ca: Path
    cpus: Cpus
    is_quick: bool = False

    @property
    def share(self) -> float:
        """Of the records of every scenario."""
        return _QUICK_SHARE if self.is_quick else 1.0

    def ask(self, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET, or POST of a document."""
        body = None if document is None else json.dumps(document).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data=body), timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    @property
    def stats(self) -> dict[str, Any]:
        """The stub's figures now."""
        return self.ask("/_stats")


@contextlib.contextmanager
def bench(cpus: Cpus, *, is_quick: bool = False) -> Iterator[Bench]:
    """Start the stub; end it on leaving."""
    with tempfile.TemporaryDirectory(prefix="poller-bench-") as text:
        folder = Path(text)
        authority = Authority(folder)
        paths = folder / "cert.pem", folder / "key.pem"
        for path, content in zip(paths, authority.issue(), strict=True):
            path.write_bytes(content)
        arguments = ["-m", "tests.benchmarks.stub", "--cert", str(paths[0]), "--key", str(paths[1])]
        with _process(arguments, cpus.stub, folder / "stub.log", pipe=True) as child:
            assert child.stdout
            line = child.stdout.readline()
            if not line:
                raise BenchmarkError(f"the stub did not start: {(folder / 'stub.log').read_text()[-2_000:]}")
            ports = json.loads(line)
            # The certificate is localhost's.
            urls = f"http://127.0.0.1:{ports['port']}", f"https://localhost:{ports['tls_port']}"
            yield Bench(*urls, authority.ca, cpus, is_quick)


def _daemon_config(folder: Path, url: str, ca: Path, mappings: Sequence[dict[str, Any]], timeout: float) -> Path:
    """The daemon as shipped: every default but the endpoints, a port of its own and a store in a temporary folder."""
    function: dict[str, Any] = {"url": f"{url}/target", "timeout_seconds": timeout}
    if url.startswith("https:"):
        function["tls"] = {"ca": str(ca)}
    document = {
        "aws": {"region": REGION, "endpoint_url": url},
        "functions": {"bench": function},
        "event_source_mappings": mappings,
        "store": f"sqlite://{folder}/poller.db",
        "server": {"host": "127.0.0.1", "port": 0},
        "log": {"level": "info", "format": "json"},
    }
    path = folder / "poller.yaml"
    path.write_text(json.dumps(document, indent=2))  # JSON is YAML
    return path


class Client:
    """A client under measurement. `began`: when it was started, in monotonic time."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, began: float) -> None:
        self.pid = process.pid
        self.began = began
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
    bench: Bench,
    name: str,
    plan: Plan,
    *,
    queues: int = 1,
    timeout: float = 30.0,
    mapping: Mapping[str, Any] | None = None,
    tls: bool = False,
) -> Iterator[Client]:
    """Offer the plan and start a client on it. Of the daemon: the number of `queues`, which the stub takes for the same
    one, the `timeout` of its function, and further fields of its mappings.
    """
    bench.ask("/_configure", asdict(plan))
    url = bench.tls_url if tls else bench.url
    with tempfile.TemporaryDirectory(prefix="poller-bench-") as text:
        folder = Path(text)
        if name == "daemon":
            fields: dict[str, Any] = {"FunctionName": "bench", "BatchSize": plan.batch, **(mapping or {})}
            if plan.source != "sqs":
                fields["StartingPosition"] = "TRIM_HORIZON"
            count = queues if plan.source == "sqs" else plan.streams
            mappings = [{"EventSourceArn": stream_arn(plan.source, n), **fields} for n in range(count)]
            config = _daemon_config(folder, url, bench.ca, mappings, timeout)
            arguments = ["-m", "poller", "run", "-c", str(config)]
        else:
            arguments = ["-m", "tests.benchmarks.peers", name, plan.source, "--endpoint", url]
            arguments += ["--batch", str(plan.batch), "--shards", str(plan.shards)]
            arguments += ["--database", str(folder / "positions.db")]
            arguments += ["--ca", str(bench.ca)] if tls else []
        began = time.monotonic()
        with _process(arguments, bench.cpus.client, folder / "log", ca=bench.ca if tls else None) as process:
            client = Client(name, process, folder / "log", began)
            bench.ask("/_watch", {"pid": client.pid})
            yield client


def _until(bench: Bench, client: Client, is_done: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any], float]:
    """The stub's figures once they are done, and the most memory seen until then. BenchmarkError when nothing moves."""
    moved, most, progress = time.monotonic(), 0.0, None
    while True:
        stats = bench.stats
        client.check()
        most = max(most, client.resident_mb())
        if is_done(stats):
            return stats, most
        now = (stats["delivered"], stats["deleted"], stats["shards_read"])
        if now != progress:
            progress, moved = now, time.monotonic()
        elif time.monotonic() - moved > STALL_SECONDS:
            counts = {name: value for name, value in stats.items() if name not in {"start", "end"}}
            raise client.error(f"stalled: {counts}")
        time.sleep(_POLL_SECONDS)


def _has_end(stats: dict[str, Any]) -> bool:
    return stats["end"] is not None


def _audit(bench: Bench, client: Client, plan: Plan) -> None:
    """BenchmarkError for anything lost, repeated, reordered or not understood, now that the client has stopped."""
    stats = bench.stats
    wrong = {key: stats[key] for key in ("duplicates", "out_of_order", "unknown_records", "unknown_operations")}
    if plan.audit and stats["delivered"] != stats["expected"]:
        wrong["lost"] = stats["expected"] - stats["delivered"]
    if any(wrong.values()):
        raise client.error(f"delivered wrongly: { {key: value for key, value in wrong.items() if value} }")


def throughput(bench: Bench, client_name: str, scenario: Scenario) -> Figures:
    """One measured stretch: CPU per record, how busy the client and the stub were, what a batch and a read held."""
    plan = scenario.plan(client_name, bench.share)
    with _client(bench, client_name, plan, mapping=scenario.mapping, tls=scenario.tls) as client:
        stats, most = _until(bench, client, _has_end)
        client.stop()
        _audit(bench, client, plan)
    taken = {key: stats["end"][key] - stats["start"][key] for key in stats["end"]}
    records, wall, cpu = taken["done"], taken["wall"], taken["client_cpu"]
    return {
        "records": records,
        "us_per_record": cpu / records * 1e6,
        "records_per_cpu_second": records / cpu,
        "mb_per_cpu_second": records * RECORD_BYTES / cpu / 1e6,
        "events": taken["events"],
        "reads": taken["reads"],
        "wall_seconds": wall,
        "client_busy": cpu / wall,
        "stub_busy": taken["stub_cpu"] / wall,
        "rss_mb_most": most,
    }


def _until_read(bench: Bench, client: Client, plan: Plan) -> None:
    """Each shard was read, and twice on average. BenchmarkError when that takes too long."""
    shards = plan.streams * plan.shards
    _until(bench, client, lambda stats: stats["shards_read"] == shards)
    began = time.monotonic()
    while bench.stats["calls"]["GetRecords"] < 2 * shards:
        client.check()
        if time.monotonic() - began > STALL_SECONDS:
            raise client.error(f"did not read {shards} shards twice")
        time.sleep(_POLL_SECONDS)


def idle(bench: Bench, client_name: str, shards: int, seconds: float) -> Figures:
    """Kinesis shards without a record, after each was read: CPU per poll, polls a second, memory."""
    plan = Plan(source="kinesis", shards=shards, batch=100)
    with _client(bench, client_name, plan) as client:
        _until_read(bench, client, plan)
        start, cpu, polls = time.monotonic(), process_cpu(client.pid), bench.stats["calls"]["GetRecords"]
        time.sleep(seconds)
        wall, cpu = time.monotonic() - start, process_cpu(client.pid) - cpu
        polls = bench.stats["calls"]["GetRecords"] - polls
        resident = client.resident_mb()
        client.stop()
        _audit(bench, client, plan)
    return {
        "us_per_poll": cpu / polls * 1e6,
        "polls_per_second": polls / wall,
        "client_busy": cpu / wall,
        "rss_mb": resident,
    }


def memory(bench: Bench, shards: int, most: int) -> Figures:
    """The daemon's memory once it has read so many idle Kinesis shards, and what each further one takes up to `most`."""
    resident = []
    for count in (shards, most):
        plan = Plan(source="kinesis", shards=count, batch=100)
        with _client(bench, "daemon", plan) as client:
            _until_read(bench, client, plan)
            resident.append(client.resident_mb())
            client.stop()
            _audit(bench, client, plan)
    few, many = resident
    return {"rss_mb": few, "rss_mb_most": many, "kb_per_shard": (many - few) * 1_024 / (most - shards), "most": most}


def startup(bench: Bench, shards: int, latency_ms: float) -> Figures:
    """Seconds from the start of the daemon until each Kinesis shard was read once; the services take their time."""
    plan = Plan(source="kinesis", shards=shards, batch=100, aws_latency_ms=latency_ms)
    with _client(bench, "daemon", plan) as client:
        stats, _ = _until(bench, client, lambda stats: stats["all_read_at"] is not None)
        client.stop()
        _audit(bench, client, plan)
    return {"seconds": stats["all_read_at"] - client.began}


def idle_queues(bench: Bench, queues: int, seconds: float) -> Figures:
    """The daemon over queues without a message, each long-polled: its share of a core, memory, descriptors."""
    plan = Plan(source="sqs", batch=10)
    with _client(bench, "daemon", plan, queues=queues) as client:
        began = time.monotonic()
        while bench.stats["calls"].get("ReceiveMessage", 0) < queues:
            client.check()
            if time.monotonic() - began > STALL_SECONDS:
                raise client.error(f"does not poll {queues} queues")
            time.sleep(_POLL_SECONDS)
        calls, start, cpu = bench.stats["calls"], time.monotonic(), process_cpu(client.pid)
        time.sleep(seconds)
        wall, cpu = time.monotonic() - start, process_cpu(client.pid) - cpu
        polls = bench.stats["calls"]["ReceiveMessage"] - calls["ReceiveMessage"]
        figures = {"client_busy": cpu / wall, "polls_per_minute": polls / wall * 60}
        figures |= {"rss_mb": client.resident_mb(), "descriptors": client.descriptors()}
        client.stop()
    return figures


def added_latency(bench: Bench, source: str, seconds: float) -> Figures:
    """1,000 records a second to the daemon, from ten shards or in tens from a queue: milliseconds from the last byte of
    the answer that brings a record, as handed to the stub's transport, to the first byte of the request that carries it.
    No shard has more than one batch at a time, and no slot is waited for.
    """
    shards, batch, trickle = (10, 1_000, 1) if source == "kinesis" else (1, 10, 10)
    warm = 100
    plan = Plan(
        source=source,
        shards=shards,
        batch=batch,
        warm=warm,
        records=warm + round(seconds * 1_000 / shards),
        trickle_ms=10,
        trickle=trickle,
    )
    with _client(bench, "daemon", plan) as client:
        stats, _ = _until(bench, client, _has_end)
        client.stop()
        _audit(bench, client, plan)
    start, end = stats["start"], stats["end"]
    wall = end["wall"] - start["wall"]
    figures = {f"{name}_ms": value for name, value in stats["added_ms"].items()}
    figures |= {"records_per_second": (end["done"] - start["done"]) / wall}
    return figures | {"client_busy": (end["client_cpu"] - start["client_cpu"]) / wall}


def stalled(bench: Bench, shards: int, seconds: float, timeout: float) -> Figures:
    """Full shards, each a mapping's, and a target that never answers: each try ends by its timeout. Memory and
    descriptors a fifth of the way and at the end, and the most that was seen.
    """
    plan = Plan(
        source="kinesis", shards=shards, batch=100, warm=20_000, records=20_001, latency_ms=86_400_000, audit=False
    )
    samples: list[tuple[float, int]] = []
    with _client(bench, "daemon", plan, timeout=timeout) as client:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            client.check()
            samples.append((client.resident_mb(), client.descriptors()))
            time.sleep(1)
        tries = bench.stats["events"]
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
