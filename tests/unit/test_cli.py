"""The verbs: exit codes, where output goes, clear refusals."""

import json
import subprocess
import sys

import pytest

from poller.cli import main

VERBS = (
    "run",
    "validate",
    "demo",
    "status",
    "checkpoints",
    "pause",
    "resume",
    "seek",
    "import",
    "filter",
    "redrive",
    "schema",
)


def test_help_names_every_verb(capsys) -> None:
    """All verbs of the contract."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"    {verb}" in out


def test_validate_prints_results_and_mistakes_apart(tmp_path, capsys) -> None:
    """Exit 0 with the mappings on standard output, or 2 with the mistakes on standard error."""
    good = tmp_path / "good.yaml"
    good.write_text(
        "functions: {f: {url: 'http://127.0.0.1:1/'}}\n"
        "event_source_mappings:\n"
        "  - {EventSourceArn: 'arn:aws:sqs:eu-west-1:000000000000:q', FunctionName: f}\n"
    )
    assert main(["validate", "-c", str(good)]) == 0
    assert "arn:aws:sqs:eu-west-1:000000000000:q" in capsys.readouterr().out
    bad = tmp_path / "bad.yaml"
    bad.write_text("function: {}\nserver: {port: 70000}\n")
    for verb in ("validate", "run"):
        assert main([verb, "-c", str(bad)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert [line.split(":")[1] for line in said.err.splitlines()] == ["1", "2"]


def test_a_missing_config_says_where_it_was_looked_for(tmp_path, monkeypatch, capsys) -> None:
    """No traceback for a user's mistake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POLLER_CONFIG", raising=False)
    assert main(["validate"]) == 2
    assert "config/poller.yaml" in capsys.readouterr().err


def test_schema_is_json(capsys) -> None:
    """For editors."""
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$schema"].endswith("2020-12/schema")


def test_status_without_a_daemon_is_a_sentence(capsys) -> None:
    """Exit 1, and what to check."""
    assert main(["status", "--url", "http://127.0.0.1:9"]) == 1
    assert "is `poller run` up" in capsys.readouterr().err
    assert main(["status", "--url", "127.0.0.1"]) == 1
    assert "is not a URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--duration", "x"],
        ["demo", "--duration", "-1"],
        ["run", "--workers", "0"],
        ["run", "--workers", "65"],
        ["run", "--workers", "x"],
        ["nonsense"],
    ],
)
def test_bad_arguments_are_usage_errors(arguments, capsys) -> None:
    """Exit 2, one sentence."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    """`poller schema | head -1` ends quietly."""
    with subprocess.Popen(
        [sys.executable, "-m", "poller", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(30) == 1
        process.stderr.close()
    assert error == b""
