"""`poller demo` as a user runs it: a process of its own, with MiniStack, roto and the daemon as its children."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from poller import demo
from poller.demo import processes
from poller.demo.traffic import Shard, Target

pytestmark = pytest.mark.integration

_ROOT = Path(__file__).parents[2]
_END_SECONDS = 60.0
_COMMAND = ("-m", "poller")
_WITHOUT_ROTO = (
    "-c",
    """
import sys
from importlib import metadata
find = metadata.files
def files(name):
    if name == "roto-aws":
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.files = files
from poller.cli import main
sys.exit(main(sys.argv[1:]))
""",
)


@contextmanager
def running(tmp_path: Path, *arguments: str, command: tuple[str, ...] = _COMMAND) -> Iterator["subprocess.Popen[str]"]:
    """The demo under a user whose AWS variables lead to nowhere; killed if the test leaves it running."""
    (tmp_path / "credentials").write_text("[company]\naws_access_key_id = AKIAREAL\naws_secret_access_key = real\n")
    hostile = {
        "AWS_PROFILE": "no-such-profile",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL_KINESIS": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "AKIAREAL",
        "AWS_SECRET_ACCESS_KEY": "real",
        "AWS_SESSION_TOKEN": "real",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "POLLER_CONFIG": str(tmp_path / "no-config"),
        "GATEWAY_PORT": "1",
        "ROTO_DATA_DIR": str(tmp_path / "no-data"),
        "TMPDIR": str(tmp_path),
    }
    process = subprocess.Popen(
        [sys.executable, *command, "demo", *arguments],
        cwd=_ROOT,
        env={**os.environ, **hostile},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(process: "subprocess.Popen[str]", pattern: str) -> str:
    """Reads the demo's output up to the first line that matches; answers everything read."""
    read = []
    for line in process.stdout:
        read.append(line)
        if re.search(pattern, line):
            return "".join(read)
    raise AssertionError(f"no line matches {pattern}:\n{''.join(read)}\n{process.stderr.read()}")


def press_ctrl_c(process: "subprocess.Popen[str]") -> None:
    """What a terminal does: SIGINT to the whole process group."""
    os.killpg(process.pid, signal.SIGINT)


def counts(output: str) -> dict[str, tuple[int, ...]]:
    """The summary's rows: produced, delivered, twice."""
    rows = re.findall(r"^(kinesis|dynamodb|sqs) +(\d+) +(\d+) +(\d+) +(?:\d+|-)$", output, re.MULTILINE)
    return {source: tuple(map(int, numbers)) for source, *numbers in rows}


def daemon_pid(head: str) -> int:
    return int(re.search(r"\(pid (\d+)\)", head)[1])


def left_behind(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("esm-poller-demo-*"))


def wait_refused(url: str) -> None:
    """Returns when nobody listens there any more."""
    address = (urlsplit(url).hostname, urlsplit(url).port)
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=5).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:  # it closes at this moment
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} is still served")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, str, list[Path]]:
    """Exit code, output, errors and leftovers of `poller demo --duration 8`."""
    tmp_path = tmp_path_factory.mktemp("demo")
    with running(tmp_path, "--duration", "8") as process:
        output, errors = process.communicate(timeout=_END_SECONDS)
    return process.returncode, output, errors, left_behind(tmp_path)


def test_everything_produced_is_delivered_and_nothing_is_left(finished):
    """One command, no account: all three sources arrive, once each, exit code 0, no file stays behind."""
    code, output, errors, files = finished
    assert (code, errors, files) == (0, "", []), output
    found = counts(output)
    assert set(found) == {"kinesis", "dynamodb", "sqs"}
    for produced, delivered, twice in found.values():
        assert produced == delivered > 0
        assert twice == 0


def test_one_shard_is_blocked_and_recovers_while_the_others_go_on(finished):
    """The poison record blocks its shard only, and is itself delivered after the repair."""
    _, output, _, _ = finished
    steps = [output.index(f">> {number}/8") for number in (1, 2, 3, 4)]
    assert steps == sorted(steps)
    order, shard = re.search(r"any batch with order (\d+) .*? Its shard (#\d) is blocked", output).groups()
    blocked = [line for line in output[steps[1] : steps[3]].splitlines() if "BLOCKED" in line]
    assert blocked
    for line in blocked:
        assert re.search(rf"{shard} BLOCKED [\d.]+ s, attempt \d+, by \d+", line)
        assert line.count("running") == 3
    taken = re.search(rf"Order {order} was taken at attempt (\d+); .* delivered (\d+) orders in that time", output)
    assert int(taken[1]) > 1
    assert int(taken[2]) > 0


def test_a_split_and_a_merge_are_followed_in_order(finished):
    """The parents end, then are done, only then the children run; nothing is lost, twice, early or out of order."""
    _, output, _, _ = finished
    states = dict(re.findall(r"^>> ([5-8])/8  .*\n\n.*  shards: (.*)$", output, re.MULTILINE))
    assert list(states) == ["5", "6", "7", "8"], output
    assert re.search(r"#2 ending, [1-9]\d* to deliver  #3 running  #4 waits for #2  #5 waits for #2$", states["5"])
    assert states["6"] == "#0 running  #1 running  #3 running  #4 running  #5 running  done #2"
    assert re.search(
        r"#4 ending, [1-9]\d* to deliver  #5 ending, [1-9]\d* to deliver  #6 waits for #4 and #5  done #2$", states["7"]
    )
    assert states["8"] == "#0 running  #1 running  #3 running  #6 running  done #2 #4 #5"
    assert "0 came out of order within their key or shard, 0 came twice" in output
    summary = re.search(r"^Shard #2 was split into #4 and #5, these merged into #6; (\d+) orders", output, re.MULTILINE)
    assert int(summary[1]) > 0
    assert output.endswith("All that was produced was delivered, in order within each shard and key.\n")


def test_the_first_lines_say_what_runs_where(finished):
    """Ports, config file, status page and the command to try stand before the first record."""
    _, output, _, _ = finished
    head = output[: output.index(">> 1/8")]
    for pattern in (
        r"http://127\.0\.0\.1:\d+ \(MiniStack",
        r"http://127\.0\.0\.1:\d+ \(roto",
        r"http://127\.0\.0\.1:\d+/orders",
        r"poller run -c /\S+/poller\.yaml \(pid \d+\)",
        r"status page +http://127\.0\.0\.1:\d+/",
        r"poller status --url http://127\.0\.0\.1:\d+",
    ):
        assert re.search(pattern, head), pattern


def test_ctrl_c_ends_it_in_order(tmp_path):
    """SIGINT stops producing, what is on the way arrives, children and files go, exit code 0."""
    with running(tmp_path) as process:
        head = until(process, r"kinesis [1-9]")
        press_ctrl_c(process)
        output, errors = process.communicate(timeout=_END_SECONDS)
        assert (process.returncode, errors) == (0, "")
    assert all(produced == delivered > 0 for produced, delivered, _ in counts(output).values())
    assert left_behind(tmp_path) == []
    for url in set(re.findall(r"http://127\.0\.0\.1:\d+", head)):
        wait_refused(url)


def test_a_signal_while_the_shard_is_blocked_repairs_the_target(tmp_path):
    """SIGTERM in the middle of the story does not lose the poison record."""
    with running(tmp_path) as process:
        until(process, r">> 2/8")
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=_END_SECONDS)
        assert (process.returncode, errors) == (0, "")
    assert "All that was produced was delivered" in output


def test_ctrl_c_while_a_parent_is_ending_delivers_its_children(tmp_path):
    """The slow batch is answered at once, the parent ends, what waited in the children arrives; no merge follows."""
    with running(tmp_path, "--duration", "20") as process:
        head = until(process, r">> 5/8")
        press_ctrl_c(process)
        output, errors = process.communicate(timeout=_END_SECONDS)
        assert (process.returncode, errors) == (0, "")
    assert "Shard #2 was split into #4 and #5;" in output
    assert "merged" not in output
    assert "All that was produced was delivered" in output
    assert left_behind(tmp_path) == []
    for url in set(re.findall(r"http://127\.0\.0\.1:\d+", head)):
        wait_refused(url)


def test_without_roto_it_leaves_the_reshard_out(tmp_path):
    """No roto-aws: one line says so, Kinesis comes from MiniStack, four steps, and all else is as always."""
    with running(tmp_path, "--duration", "8", command=_WITHOUT_ROTO) as process:
        output, errors = process.communicate(timeout=_END_SECONDS)
        assert (process.returncode, errors) == (0, ""), output
    assert len(re.findall(r"^Kinesis .*without roto-aws the demo leaves that out$", output, re.MULTILINE)) == 1
    assert re.findall(r"^>> (\d/\d) ", output, re.MULTILINE) == ["1/4", "2/4", "3/4", "4/4"]
    assert "split" not in output
    assert all(produced == delivered > 0 for produced, delivered, _ in counts(output).values())


def test_roto_is_found_by_what_its_package_installed(monkeypatch):
    """The program itself, by a full path; nothing when the package is absent or lists no such file."""
    program = processes.roto_server()
    assert program is not None
    assert Path(program).is_absolute()
    assert os.access(program, os.X_OK)
    monkeypatch.setattr(processes.metadata, "files", lambda _: None)
    assert processes.roto_server() is None


@pytest.mark.parametrize(("first", "early"), [("parent", 0), ("child", 1)])
async def test_a_child_that_overtakes_its_parent_is_counted(first, early):
    """A record of a child before the last one of its parent is early; after it, it is not."""

    def event(shard: str, number: int) -> dict[str, object]:
        data = base64.b64encode(json.dumps({"number": number, "poison": False}).encode()).decode()
        kinesis = {"data": data, "partitionKey": f"key of {shard}"}
        return {"Records": [{"eventSource": "aws:kinesis", "eventID": f"shardId-{shard}:1", "kinesis": kinesis}]}

    target = Target()
    target.shards = {
        "shardId-0": Shard((0, 9), (), produced=1),
        "shardId-1": Shard((0, 9), ("shardId-0",), produced=1),
    }
    events = {
        "parent": event("0", target.tallies["kinesis"].put(0.0)),
        "child": event("1", target.tallies["kinesis"].put(0.0)),
    }
    app = web.Application()
    app.router.add_post("/", target.handle)
    async with TestClient(TestServer(app)) as client:
        for name in sorted(events, key=lambda name: name != first):
            answer = await client.post("/", json=events[name], headers={"X-Poller-Attempt": "1"})
            assert answer.status == 200
    assert target.early == early
    assert target.on_the_way(target.shards) == 0


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    """Two SIGINTs: exit code 1 without a summary, even where the daemon would not stop; the children are gone."""
    with running(tmp_path) as process:
        head = until(process, r"kinesis [1-9]")
        os.kill(daemon_pid(head), signal.SIGSTOP)
        press_ctrl_c(process)
        until(process, r">> The end")
        press_ctrl_c(process)
        output, errors = process.communicate(timeout=_END_SECONDS)
        assert (process.returncode, errors) == (1, "poller demo: ended at once\n")
    assert counts(output) == {}
    assert left_behind(tmp_path) == []
    for url in set(re.findall(r"http://127\.0\.0\.1:\d+", head)):
        wait_refused(url)


def test_a_dead_daemon_is_told_with_its_last_lines(tmp_path):
    """The daemon dies: exit code 1, how it ended, the end of its log, and where the files are kept."""
    with running(tmp_path) as process:
        head = until(process, r"kinesis [1-9]")
        os.kill(daemon_pid(head), signal.SIGKILL)
        _, errors = process.communicate(timeout=_END_SECONDS)
        assert process.returncode == 1
    assert "poller demo: daemon ended by itself with signal 9" in errors
    assert '"event":"started"' in errors.replace(" ", "")
    (kept,) = left_behind(tmp_path)
    assert str(kept) in errors
    assert (kept / "poller.yaml").exists()
    assert (kept / "daemon.log").exists()
    assert "Traceback" not in errors


def test_children_do_not_outlive_a_killed_demo(tmp_path):
    """SIGKILL leaves the demo no chance; MiniStack and the daemon end all the same."""
    with running(tmp_path) as process:
        head = until(process, r"kinesis [1-9]")
        process.kill()
    for url in set(re.findall(r"http://127\.0\.0\.1:\d+", head)):
        wait_refused(url)


def test_a_closed_pipe_ends_it_quietly(tmp_path):
    """`poller demo | head -1`: nobody reads any more, so it ends without a traceback and without children."""
    with running(tmp_path) as process:
        head = until(process, r"kinesis [1-9]")
        process.stdout.close()
        assert process.wait(_END_SECONDS) == 1
        assert process.stderr.read() == ""
        process.stdout = None
    for url in set(re.findall(r"http://127\.0\.0\.1:\d+", head)):
        wait_refused(url)


@pytest.mark.parametrize("absent", [{"rich"}, {"ministack"}, {"ministack", "rich"}])
def test_without_the_extra_it_says_what_to_install(absent, monkeypatch, capsys):
    """Exit code 2 and one sentence with the pip command; nothing is started."""
    found = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name in absent else found(name))
    assert demo.run(1.0) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert all(name in errors for name in absent)
    assert "pip install 'esm-poller[demo]'" in errors
