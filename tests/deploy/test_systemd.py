"""`deploy/systemd/`, read by systemd's own tools. Needs Debian's `systemd`, and `faketime` for a clock that is set."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from poller.settings import Settings
from poller.workers import parent
from tests.deploy.test_clock import Wall
from tests.integration.daemon import Daemon
from tests.integration.test_daemon import config
from tests.integration.test_notify import listening

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
COMMAND = "/opt/esm-poller/bin/poller"
EXPOSURE = 1.5
"""The most that `systemd-analyze security` may find; it calls anything below 2.0 well done."""
DROP_INS = sorted(path.name for path in (FOLDER / "poller.service.d").iterdir())


def ran(*command: str) -> str:
    """What it said; it has to end well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def install(tmp_path):
    """Installs the unit with some of its drop-ins, and something that can be run in place of the daemon."""

    def make(*drop_ins: str) -> str:
        command = tmp_path / "poller"
        command.write_text("#!/bin/sh\n")
        command.chmod(0o755)
        unit = tmp_path / "poller.service"
        for name in ("poller.service", *(f"poller.service.d/{one}" for one in drop_ins)):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text((FOLDER / name).read_text().replace(COMMAND, str(command)))
        return str(unit)

    return make


def settings() -> configparser.SectionProxy:
    """The unit's [Service], of a key that is there twice the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(FOLDER / "poller.service")
    return parser["Service"]


@pytest.mark.parametrize("drop_ins", [(), *((name,) for name in DROP_INS), tuple(DROP_INS)])
def test_systemd_understands_every_line(install, drop_ins) -> None:
    """The unit alone, with each of its examples and with all of them: no error and no warning."""
    assert ran("systemd-analyze", "verify", "--man=no", install(*drop_ins)) == ""


@pytest.mark.parametrize("drop_ins", [(), tuple(DROP_INS)])
def test_it_is_hardened(install, drop_ins) -> None:
    """The exposure that `systemd-analyze security` finds, with its examples too."""
    said = ran("systemd-analyze", "security", "--offline=true", f"--threshold={int(EXPOSURE * 10)}", install(*drop_ins))
    assert " OK " in said.splitlines()[-1]


def test_the_check_of_the_hardening_finds_something(install) -> None:
    """Without one of its lines the unit is above the threshold, and the tool says so by its exit code."""
    unit = Path(install())
    unit.write_text(unit.read_text().replace("SystemCallFilter=", "# "))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={int(EXPOSURE * 10)}", str(unit)],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1


def test_the_user_and_the_folders_can_be_made(tmp_path) -> None:
    """`systemd-sysusers` and `systemd-tmpfiles` make them as the unit wants them; only root sees the secrets."""
    root = tmp_path / "root"
    for name, folder in (("poller.sysusers", "sysusers.d"), ("poller.tmpfiles", "tmpfiles.d")):
        (root / "etc" / folder).mkdir(parents=True)
        shutil.copy(FOLDER / name, root / "etc" / folder / "poller.conf")
    ran("systemd-sysusers", f"--root={root}", "poller.conf")
    users = [line.split(":") for line in (root / "etc/passwd").read_text().splitlines()]
    [user] = [one for one in users if one[0] == settings()["User"]]
    assert user[5] == settings()["WorkingDirectory"]
    assert user[6].endswith("nologin")
    ran("systemd-tmpfiles", f"--root={root}", "--create", "poller.conf")
    config, secrets = (root / "etc/poller").stat(), (root / "etc/poller/credentials").stat()
    assert (config.st_mode & 0o777, config.st_uid, config.st_gid) == (0o750, 0, int(user[3]))
    assert (secrets.st_mode & 0o777, secrets.st_uid) == (0o700, 0)


def test_systemd_waits_for_an_ordinary_stop() -> None:
    """The default grace, and what a parent gives its workers beyond it: the daemon never has to ask for more time."""
    stop = float(settings()["TimeoutStopSec"])
    assert stop >= Settings.__dataclass_fields__["shutdown_grace"].default + parent._LATE + parent._AT_ONCE
    assert settings()["NotifyAccess"] == "main"
    assert settings()["KillMode"] == "mixed", "a worker must not be signalled"


async def test_beginning_anew_is_a_reload_to_systemd(fake_aws, account, ledger, daemons, tmp_path) -> None:
    """A clock that is set back stops everything in the process: called a stop, systemd would end the process."""
    wall = Wall(tmp_path)
    daemon: Daemon = daemons(config(fake_aws, ledger))
    daemon.environment |= wall.environment
    async with listening(daemon, str(tmp_path / "notify")) as manager:
        await daemon.start()
        await manager.until("READY=1")
        wall.set(-7200)
        await manager.until("RELOADING=1")
        await manager.until("READY=1")
        await manager.until("WATCHDOG=1")
        assert not [one for one in manager.fields if one == "STOPPING=1"]
        assert await daemon.stop() == 0
