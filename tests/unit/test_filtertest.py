"""`poller filter test`: exit codes, what is judged, what is printed."""

import base64
import io
import json

import pytest

from poller.cli import main

SQS = {"messageId": "m1", "eventSource": "aws:sqs", "body": '{"state": "open"}'}
TEXT = {"messageId": "m2", "eventSource": "aws:sqs", "body": "text"}
KINESIS = {
    "kinesis": {"partitionKey": "p", "data": base64.b64encode(b'{"state": "open"}').decode()},
    "eventID": "shardId-0:7",
    "eventSource": "aws:kinesis",
}
DYNAMODB = {"eventID": "e", "eventSource": "aws:dynamodb", "dynamodb": {"NewImage": {"state": {"S": "open"}}}}


@pytest.fixture
def run(tmp_path, capsys):
    """One call: exit code, lines on standard output, lines on standard error."""

    def call(pattern, event):
        path = tmp_path / "event.json"
        path.write_text(event if isinstance(event, str) else json.dumps(event))
        code = main(["filter", "test", pattern if isinstance(pattern, str) else json.dumps(pattern), str(path)])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return call


def test_one_record_is_opened_as_its_source_says(run):
    """eventSource decides where the data is; the leaf that matched is shown with its value and its rule."""
    rules = {"state": ["done", {"prefix": "op"}]}
    shown = '"open" matches {"prefix": "op"}'
    assert run({"body": rules}, SQS) == (0, ["match", f"  body.state: {shown}"], [])
    assert run({"data": rules}, KINESIS) == (0, ["match", f"  data.state: {shown}"], [])
    image = {"dynamodb": {"NewImage": {"state": {"S": rules["state"]}}}}
    assert run(image, DYNAMODB) == (0, ["match", f"  dynamodb.NewImage.state.S: {shown}"], [])


def test_any_other_json_is_matched_as_it_is(run):
    """No member is parsed or moved; what is no object never matches."""
    assert run({"body": ['{"a": 1}']}, {"body": '{"a": 1}'})[0] == 0
    assert run({"a": {"b": [{"exists": False}]}}, {"a": 1}) == (
        0,
        ["match", '  a.b: absent matches {"exists": false}'],
        [],
    )
    assert run({"a": [1]}, {"eventSource": ["odd"]}) == (1, ["no match", "  a: absent does not match [1]"], [])
    for odd in ("5", '"x"', "[1]", "null"):
        assert run({"a": [1]}, odd) == (1, ["no match: only a JSON object can match"], [])


def test_each_record_of_a_lambda_event_is_judged(run):
    """The exit code is 0 when any of them matches; records are numbered and named."""
    code, out, _ = run({"body": {"state": ["open"]}}, {"Records": [SQS, TEXT]})
    assert code == 0
    assert out == [
        "record 1 (m1): match",
        '  body.state: "open" matches "open"',
        "record 2 (m2): no match",
        '  body.state: absent (the payload is not JSON) does not match ["open"]',
    ]
    code, out, _ = run({"data": {"state": ["x"]}}, {"Records": [KINESIS, 5]})
    assert code == 1
    assert [out[0], out[-1]] == ["record 1 (shardId-0:7): no match", "record 2: no match: only a JSON object can match"]
    assert run({"a": [1]}, {"Records": []}) == (1, ["no match: the event has no records"], [])
    assert run({"a": 1}, {"Records": []})[0] == 2
    assert run({"Records": [1]}, {"Records": 1})[0] == 0


def test_filter_criteria_is_several_patterns(run):
    """As in a mapping: any pattern may match; each has its own leaf."""
    criteria = {"Filters": [{"Pattern": '{"body": ["text"]}'}, {"Pattern": '{"body": {"state": ["open"]}}'}]}
    assert run(criteria, SQS) == (
        0,
        [
            "match",
            "  pattern 1: no match",
            '    body: JSON (not plain text) does not match ["text"]',
            "  pattern 2: match",
            '    body.state: "open" matches "open"',
        ],
        [],
    )
    code, out, err = run({"Filters": [{"Pattern": "x"}, {"Pattern": "{}"}]}, SQS)
    assert (code, out) == (2, [])
    assert [line.split(":")[0] for line in err] == ["PATTERN 1", "PATTERN 2"]
    code, _, err = run({"Filters": [{"Pattern": '{"a": [1]}'}] * 11}, SQS)
    assert (code, err) == (2, ["PATTERN: FilterCriteria has 11 filters; give at most 10"])
    assert run({"Filters": {"Pattern": ["x"]}}, {"Filters": {"Pattern": "x"}})[0] == 0
    assert run({"Filters": ["x"]}, {"Filters": "x"})[0] == 0


@pytest.mark.parametrize(
    ("pattern", "event", "said"),
    [
        (
            '{"body": [{"prefx": "a"}]}',
            SQS,
            'PATTERN: Invalid filter pattern definition. At body[0]: "prefx" is no operator here; did you mean "prefix"?',
        ),
        (
            "{",
            SQS,
            (
                "PATTERN: Invalid filter pattern definition. At character 2: the pattern is not JSON: "
                "Expecting property name enclosed in double quotes"
            ),
        ),
        (
            '{"data": ["x"]}',
            KINESIS,
            (
                "PATTERN: Invalid filter pattern definition. At data: it is always matched as JSON; give an object of its "
                "fields, not a list of rules"
            ),
        ),
        (
            '{"a": [1]}',
            "{\n1}",
            "EVENT: not JSON: Expecting property name enclosed in double quotes, at line 2, character 1",
        ),
        ('{"a": [1]}', "", "EVENT: not JSON: Expecting value, at line 1, character 1"),
        ('{"a": [1]}', "[NaN]", "EVENT: not JSON: NaN is no JSON value"),
        ('{"a": [1]}', "[" * 100_000, "EVENT: not JSON: it is nested too deep"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(run, pattern, event, said):
    """Exit 2, the place and the reason on standard error, nothing on standard output."""
    assert run(pattern, event) == (2, [], [said])


def test_files_and_standard_input(tmp_path, monkeypatch, capsys):
    """@FILE is a pattern in a file, - is the event on standard input; what cannot be read is said."""
    pattern = tmp_path / "pattern.json"
    pattern.write_bytes(b'\xef\xbb\xbf{"body":\n  ["text"]}\n')
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(TEXT).encode())))
    assert main(["filter", "test", f"@{pattern}", "-"]) == 0
    assert capsys.readouterr().out == 'match\n  body: "text" matches "text"\n'
    missing = tmp_path / "missing"
    assert main(["filter", "test", f"@{missing}", "-"]) == 2
    assert capsys.readouterr().err == f"PATTERN: cannot read {missing}: No such file or directory\n"
    assert main(["filter", "test", "{}", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err
    pattern.write_bytes(b"\xff")
    assert main(["filter", "test", '{"a": [1]}', str(pattern)]) == 2
    assert capsys.readouterr().err == f"EVENT: {pattern} is not UTF-8 text\n"


def test_long_values_are_shortened(run):
    """A line stays readable whatever the record holds."""
    _, out, _ = run({"k": ["x"]}, {"k": "y" * 10_000})
    assert len(out[1]) < 300
    assert "..." in out[1]


@pytest.mark.parametrize(
    "arguments", [["filter"], ["filter", "test"], ["filter", "test", "{}"], ["filter", "try", "a"]]
)
def test_missing_arguments_are_usage_errors(arguments, capsys):
    """Exit 2 and how to call it."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: poller filter" in capsys.readouterr().err
