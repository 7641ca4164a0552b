"""The policies in deploy/iam: exactly what the code calls, and sound by a linter's knowledge of IAM."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore import xform_name
from botocore.session import Session

import poller

PACKAGE = Path(poller.__file__).parent
FOLDER = PACKAGE.parent / "deploy" / "iam"
POLICIES = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != "assume-role-trust")
SERVICES = ("kinesis", "dynamodb", "dynamodbstreams", "sqs", "lambda", "sns", "s3", "events", "sts")

# Which part of the code needs which policy, and the prefix of its rights.
USERS = {
    "kinesis": [("sources/kinesis.py", "kinesis")],
    "kinesis-fan-out": [("sources/kinesis.py", "kinesis"), ("sources/fanout.py", "kinesis")],
    "dynamodb-streams": [("sources/dynamodb.py", "dynamodb")],
    "sqs": [("sources/sqs.py", "sqs"), ("aws/queues.py", "sqs")],
    "lambda-target": [("targets/lambda_.py", "lambda")],
    "destination-sqs": [("destinations/aws.py:SqsDestination", "sqs"), ("aws/queues.py", "sqs")],
    "destination-sns": [("destinations/aws.py:SnsDestination", "sns")],
    "destination-s3": [("destinations/aws.py:S3Destination", "s3")],
    "destination-eventbridge": [("destinations/aws.py:EventsDestination", "events")],
    "store-dynamodb": [("stores/dynamotable.py", "dynamodb")],
    "import": [("importing/account.py", "lambda")],
    "redrive": [
        ("redrive/boxes.py:SqsBox", "sqs"),
        ("aws/queues.py", "sqs"),
        ("redrive/boxes.py:S3Box", "s3"),
    ],
    "kcl-import": [("kcl.py", "dynamodb")],
    "assume-role": [("aws/role.py", "sts")],
}
# What is asked of a mapping that is made through the API, and how a function's role is found out.
PROBE = {
    "ListShards": {"kinesis", "kinesis-fan-out"},
    "DescribeStreamConsumer": {"kinesis-fan-out"},
    "DescribeStream": {"dynamodb-streams"},
    "GetShardIterator": {"kinesis", "kinesis-fan-out", "dynamodb-streams"},
    "GetFunction": {"lambda-target"},
}
# Rights that are not called as their operation is.
RIGHTS = {
    "ChangeMessageVisibilityBatch": ["ChangeMessageVisibility"],
    "DeleteMessageBatch": ["DeleteMessage"],
    "HeadBucket": ["ListBucket"],
    "Invoke": ["InvokeFunction"],
    "ListObjectsV2": ["ListBucket"],
    "TransactWriteItems": ["PutItem", "DeleteItem", "ConditionCheckItem"],
}
LAMBDA_INVOKE = "/invocations"  # a path, where the other hot calls have a name
VALUES = {
    "REGION": "eu-west-1",
    "SOURCE_ACCOUNT_ID": "210987654321",
    "ACCOUNT_ID": "123456789012",
    "SOURCE_KEY_ID": "1234abcd-12ab-34cd-56ef-1234567890ab",
    "DESTINATION_KEY_ID": "1234abcd-12ab-34cd-56ef-1234567890ac",
    "FAILURE_BUCKET_NAME": "failures",
}


def operations() -> dict[str, str]:
    """Every operation of the services, by its own name and by that of botocore's method."""
    session = Session()
    found = {}
    for service in SERVICES:
        for name in session.get_service_model(service).operation_names:
            found[name] = found[xform_name(name)] = name
    return found


OPERATIONS = operations()


def called(place: str) -> set[str]:
    """The operations that a module, or a class of it, calls or names."""
    module, _, name = place.partition(":")
    tree: ast.AST = ast.parse((PACKAGE / module).read_text())
    if name:
        tree = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {OPERATIONS[word] for word in words(tree) if word in OPERATIONS} | (
        {"Invoke"} if any(LAMBDA_INVOKE in word for word in words(tree)) else set()
    )


def words(tree: ast.AST) -> Iterator[str]:
    """Methods that are called on something else than `self`, and strings."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="client" | "streams" | "kinesis"), attr=name)):
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="_client"), attr=name)):
                yield name
            case ast.Constant(value=str() as text):
                yield text.rpartition(".")[2]


def rights(place: str, prefix: str) -> set[str]:
    return {f"{prefix}:{right}" for name in called(place) for right in RIGHTS.get(name, [name])}


def statements(policy: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{policy}.json").read_text())["Statement"]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def filled(policy: str) -> str:
    text = (FOLDER / f"{policy}.json").read_text()
    for name, value in VALUES.items():
        text = text.replace(name, value)
    return re.sub(r"[A-Z]+(_[A-Z]+)*_NAME", "orders", text)


@pytest.mark.parametrize("policy", USERS)
def test_a_policy_has_what_the_code_calls_and_nothing_else(policy):
    """A call without its right fails in production only; a right without a call is an attack waiting."""
    needed = {right for place, prefix in USERS[policy] for right in rights(place, prefix)}
    for operation, policies in PROBE.items():
        if policy in policies:
            needed.add(f"{USERS[policy][0][1]}:{operation}")
    allowed = {action for statement in statements(policy) for action in listed(statement["Action"])}
    assert allowed == needed


def test_every_call_has_a_policy():
    """Who calls a service anew is asked for one; the demo has an AWS of its own."""
    assert called("aws/probe.py") == PROBE.keys()
    known = {place.partition(":")[0] for users in USERS.values() for place, _ in users} | {"aws/probe.py"}
    for path in PACKAGE.rglob("*.py"):
        module = str(path.relative_to(PACKAGE))
        if module in known or module.startswith("demo/"):
            continue
        tree = ast.parse(path.read_text())
        calls = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in {"client", "streams", "kinesis"}
        }
        assert not calls & OPERATIONS.keys(), f"{module} calls {calls & OPERATIONS.keys()}"


def test_the_classes_of_a_module_are_all_of_it():
    """What stands between classes is not overlooked."""
    for module in ("destinations/aws.py", "redrive/boxes.py"):
        parts = {place for users in USERS.values() for place, _ in users if place.startswith(f"{module}:")}
        assert called(module) - {"Scan", "Query"} == {name for part in parts for name in called(part)}


def test_a_linter_that_knows_iam_finds_nothing(tmp_path):
    """Unknown rights, rights that the kind of resource does not have, malformed ARNs: each of two wrong ones is found."""
    for policy in POLICIES:
        (tmp_path / f"{policy}.json").write_text(filled(policy))
    assert lint(tmp_path) == set()
    (tmp_path / "unknown.json").write_text(filled("sqs").replace("sqs:ReceiveMessage", "sqs:ReceiveMessages"))
    (tmp_path / "unfit.json").write_text(filled("sqs").replace("arn:aws:sqs", "arn:aws:sns"))
    assert lint(tmp_path) == {"unknown.json", "unfit.json"}


def lint(folder: Path) -> set[str]:
    """The files in which parliament finds something. A program of its own, for its imports warn."""
    command = [Path(sys.executable).parent / "parliament", "--directory", folder, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    return {Path(json.loads(line)["location"]["filepath"]).name for line in ended.stdout.splitlines()}


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_allowed_by_a_wildcard(policy):
    """No right has one. A resource is everything only where the right knows no resource."""
    for statement in statements(policy):
        assert statement["Effect"] == "Allow"
        assert not any("*" in action for action in listed(statement["Action"]))
        if "*" in listed(statement["Resource"]):
            assert statement["Action"] == "lambda:ListEventSourceMappings"


def test_the_trust_policy_lets_one_role_in():
    """It names the daemon's role, not an account and not everybody."""
    [statement] = statements("assume-role-trust")
    assert statement["Principal"] == {"AWS": "arn:aws:iam::ACCOUNT_ID:role/POLLER_ROLE_NAME"}
    assert statement["Action"] == "sts:AssumeRole"


def test_the_table_names_every_file_and_every_placeholder():
    """Nobody has to open a file to know what to replace."""
    table = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.json"):
        [row] = [line for line in table.splitlines() if line.startswith("|") and f"`{path.name}`" in line.split("|")[1]]
        left = set(re.findall(r"\b(?:[A-Z]+_)+(?:NAME|ID)\b", path.read_text())) - {"ACCOUNT_ID"}
        assert left <= set(re.findall(r"`(\w+)`", row)), path.name
