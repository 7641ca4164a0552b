"""`server.tls`: what is refused, what is served, and what happens when the files change."""

import asyncio
import contextlib
import http.server
import json
import os
import random
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import structlog

from poller.cli import main
from poller.errors import ConfigError
from poller.server import Server, certificate
from poller.settings import ServerSettings, ServerTls
from poller.telemetry import Metrics
from tests.contract.test_server import FakeControl, FixedClock
from tests.fakes.certificates import Authority


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


class Files:
    """The files of `server.tls`, replaced as certbot does it: one after the other."""

    def __init__(self, authority):
        self.settings = ServerTls(
            str(authority.folder / "cert.pem"), str(authority.folder / "key.pem"), "poller.yaml:3"
        )
        self.ca = str(authority.ca)

    def put(self, cert, key):
        for path, content in ((self.settings.cert, cert), (self.settings.key, key)):
            new = Path(f"{path}.new")
            new.write_bytes(content)
            new.replace(path)


@pytest.fixture
def files(authority):
    made = Files(authority)
    made.put(*authority.issue())
    return made


@contextlib.asynccontextmanager
async def serving(files):
    """A server with the files, and the task that follows them."""
    control = FakeControl()
    metrics = Metrics(FixedClock(), control.status)
    server = Server(
        ServerSettings(host="localhost", port=0, tls=files.settings), control, metrics, FixedClock(), random.Random(1)
    )
    port = await server.start()
    running = asyncio.ensure_future(server.run())
    try:
        yield server, port
    finally:
        running.cancel()
        await asyncio.wait([running])
        await server.stop()


async def serial(port, ca, version=None):
    """The serial number of the certificate that a new connection gets."""
    context = ssl.create_default_context(cafile=ca)
    if version is not None:
        context.maximum_version = version
    _, writer = await asyncio.open_connection("localhost", port, ssl=context)
    try:
        return int(writer.get_extra_info("peercert")["serialNumber"], 16)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def cli(files, port, *arguments, **environment):
    """Exit code, output and errors of the command."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "poller", *arguments, "--url", f"https://localhost:{port}",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip
    out, error = await process.communicate()
    return process.returncode, out.decode(), error.decode()


# --- what is refused ---


def refusal(settings):
    with pytest.raises(ConfigError) as caught:
        certificate.load(settings)
    [mistake] = caught.value.mistakes
    return mistake


def test_a_good_pair_is_loaded(files):
    """With Python's defaults: nothing older than TLS 1.2; and its end is known."""
    context, ends_at = certificate.load(files.settings)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert 89 < (ends_at - certificate.wall_clock()) / 86_400 < 91


def test_a_comment_in_any_language_is_none_of_our_business(authority, files):
    """What stands before a certificate is for people, and `openssl` writes names there."""
    cert, key = authority.issue()
    files.put("subject=CN = Zoë Müller\n".encode() + cert, key)
    assert certificate.load(files.settings)[1] > 0


@pytest.mark.parametrize(
    ("issued", "key", "sentence"),
    [
        ({"ends": -0.5}, "cert", "has expired; renew it"),
        ({"begins": 1}, "cert", "is not valid yet"),
        ({"server": False}, "cert", "is not one for a server"),
        ({"password": b"secret"}, "key", "is encrypted; give a key without a password"),
    ],
)
def test_a_certificate_that_no_client_would_take_is_refused(authority, files, issued, key, sentence):
    """At the start, with the place in the config and the file, and not by each client."""
    files.put(*authority.issue(**issued))
    mistake = refusal(files.settings)
    assert mistake.startswith(f"poller.yaml:3: server.tls.{key}: ")
    assert getattr(files.settings, key) in mistake
    assert sentence in mistake


def test_another_certificates_key_is_refused(authority, files):
    """Both files are named."""
    files.put(authority.issue()[0], authority.issue()[1])
    mistake = refusal(files.settings)
    assert mistake == (
        f"poller.yaml:3: server.tls.key: {files.settings.key} is not the key of the certificate in {files.settings.cert}"
    )


@pytest.mark.parametrize("which", ["cert", "key"])
def test_files_that_are_none_are_refused(files, which):
    """Absent, a directory, no PEM: a sentence with the file's name each."""
    path = Path(getattr(files.settings, which))
    path.unlink()
    assert f"server.tls.{which}: {path} cannot be read: No such file" in refusal(files.settings)
    path.mkdir()
    assert f"server.tls.{which}: {path} cannot be read: Is a directory" in refusal(files.settings)
    path.rmdir()
    path.write_bytes(b"\xff\x00nonsense")
    assert str(path) in refusal(files.settings)


def test_validate_and_run_refuse_it_before_they_begin(files, authority, tmp_path, capsys):
    """Exit 2 with the line of the config."""
    files.put(*authority.issue(ends=-0.5))
    config = tmp_path / "poller.yaml"
    config.write_text(f"server:\n  tls: {{cert: {files.settings.cert}, key: {files.settings.key}}}\n")
    for verb in ("validate", "run"):
        assert main([verb, "-c", str(config)]) == 2
        assert f"{config}:2: server.tls.cert: the certificate in" in capsys.readouterr().err


# --- what is served ---


async def test_the_server_speaks_tls_only(files):
    """1.2 and 1.3, with the certificate of the file; nothing without TLS."""
    async with serving(files) as (_, port):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert await serial(port, files.ca, version) == 2
        reader, writer = await asyncio.open_connection("localhost", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert not await reader.read()
        writer.close()


async def test_the_verbs_speak_to_it(files):
    """With --ca or POLLER_CA; without the CA it is a sentence that says what to give."""
    async with serving(files) as (_, port):
        code, out, _ = await cli(files, port, "status", "--json", "--ca", files.ca)
        assert (code, json.loads(out)["mappings"]) == (0, [])
        code, out, _ = await cli(files, port, "status", POLLER_CA=files.ca)
        assert (code, out) == (0, "no mappings\n")
        code, _, error = await cli(files, port, "pause", "orders")
        assert code == 1
        assert "the certificate is not trusted: " in error
        assert "--ca or POLLER_CA" in error
        code, _, error = await cli(files, port, "status", "--ca", files.settings.key)
        assert (code, "the CA file" in error, "Traceback" in error) == (1, True, False)


def test_the_wrong_scheme_is_a_sentence(capsys):
    """https:// where http is spoken."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as plain:
        threading.Thread(target=plain.handle_request).start()
        assert main(["status", "--url", f"https://127.0.0.1:{plain.server_port}"]) == 1
    assert "does not answer with TLS" in capsys.readouterr().err


async def test_http_to_a_tls_port_is_a_sentence(files, capsys):
    """The remedy is named."""
    async with serving(files) as (_, port):
        assert await asyncio.to_thread(main, ["status", "--url", f"http://localhost:{port}"]) == 1
    assert "is it https:// there" in capsys.readouterr().err


# --- what changes ---


async def test_a_new_certificate_is_served_without_a_restart(files, authority):
    """To new connections, once somebody says that it may have changed; the old connections stay."""
    async with serving(files) as (server, port):
        context = ssl.create_default_context(cafile=files.ca)
        reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
        files.put(*authority.issue(serial=3))
        with structlog.testing.capture_logs() as logs:
            server.renew()
            await until(lambda: any(entry["event"] == "certificate_loaded" for entry in logs))
        assert await serial(port, files.ca) == 3
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_a_bad_pair_keeps_the_old_one(files, authority):
    """An error in the log, once; the good pair that follows is taken."""
    async with serving(files) as (server, port):
        with structlog.testing.capture_logs() as logs:
            files.put(authority.issue(serial=3)[0], authority.issue()[1])
            server.renew()
            await until(lambda: any(entry["event"] == "certificate_refused" for entry in logs))
            assert await serial(port, files.ca) == 2
            files.put(*authority.issue(serial=4))
            server.renew()
            await until(lambda: any(entry["event"] == "certificate_loaded" for entry in logs))
        assert await serial(port, files.ca) == 4
        [refused] = [entry for entry in logs if entry["event"] == "certificate_refused"]
        assert refused["log_level"] == "error"
        assert "is not the key of the certificate" in refused["mistakes"][0]


async def test_the_files_are_looked_at_by_themselves(files, authority):
    """Now and then, for whoever renews a certificate tells nobody; one that ends soon is warned about."""
    watched = certificate.Certificate(files.settings)
    files.put(*authority.issue(ends=3))
    with structlog.testing.capture_logs() as logs:
        task = asyncio.ensure_future(watched.watch(interval=0.01))
        await until(lambda: any(entry["event"] == "certificate_ends_soon" for entry in logs))
        task.cancel()
        await asyncio.wait([task])
    assert [entry for entry in logs if entry["event"] == "certificate_loaded"]
    assert next(entry for entry in logs if entry["event"] == "certificate_ends_soon")["days"] == pytest.approx(
        3, abs=0.1
    )


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
