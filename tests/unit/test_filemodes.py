"""Which files others may read or replace."""

import pytest

from poller import config, filemodes
from poller.cli import main
from poller.filemodes import loose_modes

SECRET = "server: {auth: {type: bearer, token: 'a literal secret'}}"
FILLED = "server: {auth: {type: bearer, token: '${TOKEN}'}}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "from the environment")
    made = tmp_path / "store"
    made.mkdir(mode=0o700)
    return made


def settings(folder, text="log: {level: info}", mode=0o600):
    path = folder.parent / "poller.yaml"
    path.write_text(f"{text}\nstore: sqlite://{folder}/poller.db\n")
    path.chmod(mode)
    return config.load(str(path))


@pytest.mark.parametrize("text", [SECRET, FILLED])
@pytest.mark.parametrize(
    ("mode", "reason"), [(0o644, "can be read by every user"), (0o640, "can be read by its group"), (0o600, None)]
)
def test_a_config_with_secrets_is_for_its_owner(folder, text, mode, reason):
    """Literal ones and `${...}`; the warning has the path, the mode and a command."""
    found = loose_modes(settings(folder, text, mode))
    if reason is None:
        assert found == []
        return
    [loose] = found
    assert (loose.path, loose.mode) == (str(folder.parent / "poller.yaml"), f"{mode:04o}")
    assert reason in loose.reason
    assert loose.remedy == f"chmod go-rwx {loose.path}"


def test_a_config_without_secrets_may_be_read(folder):
    """There is nothing in it to hide."""
    assert loose_modes(settings(folder, mode=0o644)) == []


def test_a_file_that_is_ours_by_its_group_is_no_matter(folder, monkeypatch):
    """root:poller and 640, as packages install it; the rest of the world is one all the same."""
    group = folder.stat().st_gid
    monkeypatch.setattr(filemodes.os, "geteuid", lambda: folder.stat().st_uid + 1)
    monkeypatch.setattr(filemodes.os, "getegid", lambda: group)
    assert loose_modes(settings(folder, SECRET, 0o640)) == []
    [loose] = loose_modes(settings(folder, SECRET, 0o644))
    assert loose.remedy.startswith("chmod o-rwx ")


def test_the_store_and_its_log_are_for_their_owner(folder):
    """What is in them is in both."""
    for name in ("poller.db", "poller.db-wal"):
        (folder / name).touch(mode=0o600)
    assert loose_modes(settings(folder)) == []
    for name in ("poller.db", "poller.db-wal"):
        (folder / name).chmod(0o644)
    assert [loose.path for loose in loose_modes(settings(folder))] == [f"{folder}/poller.db", f"{folder}/poller.db-wal"]


def test_nobody_else_may_replace_the_store(folder):
    """A directory that all may write to is warned about, unless its files are safe there, as in /tmp."""
    folder.chmod(0o777)
    [loose] = loose_modes(settings(folder))
    assert (loose.path, loose.mode, loose.remedy) == (str(folder), "0777", f"chmod o-w {folder}")
    folder.chmod(0o1777)
    assert loose_modes(settings(folder)) == []


def test_validate_says_it(folder, capsys):
    """As a warning: the exit code is 0."""
    loaded = settings(folder, SECRET, 0o644)
    assert main(["validate", "-c", loaded.path]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "mode" in line]
    assert line == (
        f"warning: {loaded.path} has or names secrets and can be read by every user (mode 0644); "
        f"run chmod go-rwx {loaded.path}"
    )
