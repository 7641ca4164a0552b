"""`poller demo` as a user runs it: a process of its own, with MiniStack and the daemon as its children."""

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

from poller import demo

pytestmark = pytest.mark.integration

_ROOT = Path(__file__).parents[2]
_END_SECONDS = 60.0


@contextmanager
def running(tmp_path: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
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
        "TMPDIR": str(tmp_path),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "poller", "demo", *arguments],
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
    steps = [output.index(f">> {number}/4") for number in (1, 2, 3, 4)]
    assert steps == sorted(steps)
    order, shard = re.search(r"any batch with order (\d+) .*? Its shard (#\d) is blocked", output).groups()
    blocked = [line for line in output[steps[1] : steps[3]].splitlines() if "BLOCKED" in line]
    assert blocked
    for line in blocked:
        assert re.search(rf"{shard} BLOCKED [\d.]+ s, attempt \d+, by …\d+", line)
        assert line.count("running") == 3
    taken = re.search(rf"Order {order} was taken at attempt (\d+); .* delivered (\d+) orders in that time", output)
    assert int(taken[1]) > 1
    assert int(taken[2]) > 0


def test_the_first_lines_say_what_runs_where(finished):
    """Ports, config file, status page and the command to try stand before the first record."""
    _, output, _, _ = finished
    head = output[: output.index(">> 1/4")]
    for pattern in (
        r"http://127\.0\.0\.1:\d+ \(MiniStack",
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
        until(process, r">> 2/4")
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=_END_SECONDS)
        assert (process.returncode, errors) == (0, "")
    assert "All that was produced was delivered" in output


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
