"""One redrive at a time."""

import os
from pathlib import Path

import pytest

from poller.errors import PollerError
from poller.redrive import lock as module
from poller.redrive.lock import locked


def test_the_second_is_refused_and_names_the_first(tmp_path: Path) -> None:
    """Until the first has ended; then nothing of the lock is left."""
    path = tmp_path / ".redrive-lock"
    with locked(path, "the place"):
        for _ in range(2):
            with (
                pytest.raises(PollerError, match=f"the place: process {os.getpid()} redrives it already"),
                locked(path, "the place"),
            ):
                pass
    assert list(tmp_path.iterdir()) == []
    with locked(path, "the place"):
        pass


def test_what_a_killed_run_has_left_is_no_lock(tmp_path: Path) -> None:
    """Its file stays, its lock does not."""
    path = tmp_path / ".redrive-lock"
    path.write_text("1234567")
    with locked(path, "the place"):
        assert path.read_text() == str(os.getpid())


def test_a_lock_that_is_removed_while_one_waits_to_lock_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file is not taken for the place's: two runs would each hold one."""
    path = tmp_path / ".redrive-lock"
    plain = module.fcntl.flock
    calls = 0

    def late(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()
        plain(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with locked(path, "the place"):
        assert calls == 2
        monkeypatch.setattr(module.fcntl, "flock", plain)
        with pytest.raises(PollerError, match="already"), locked(path, "the place"):
            pass


def test_a_place_that_cannot_be_locked(tmp_path: Path) -> None:
    """A sentence, before anything is delivered."""
    with (
        pytest.raises(PollerError, match=r"the place: it cannot be locked .*: no such file or directory"),
        locked(tmp_path / "gone" / "x", "the place"),
    ):
        pass
