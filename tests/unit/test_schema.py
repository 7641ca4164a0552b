"""The JSON Schema of the config file agrees with the loader."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from poller import config
from poller.errors import ConfigError
from poller.mappings import FIELDS
from poller.schema import config_schema

SCHEMA = config_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CONFIG = Path(__file__).parents[2] / "config"
SQS = "arn:aws:sqs:eu-west-1:123456789012:orders"


class TextDates(yaml.SafeLoader):
    """YAML as editors read it: JSON's types only."""


TextDates.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def errors(text):
    return [error.message for error in VALIDATOR.iter_errors(yaml.load(text, Loader=TextDates))]


def test_the_schema_is_a_schema():
    """Valid by the meta-schema of 2020-12."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", sorted(CONFIG.glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_example_is_valid(path):
    """config/: no error in an editor."""
    assert errors(path.read_text()) == []


def test_every_field_of_the_tables_is_described():
    """Editors show a sentence for each key, and know every mapping field."""
    item = SCHEMA["properties"]["event_source_mappings"]["items"]
    assert set(item["properties"]) == {field.name for field in FIELDS}
    assert item["required"] == ["EventSourceArn", "FunctionName"]
    assert all(field["description"] for field in item["properties"].values())
    assert all(section["description"] for section in SCHEMA["properties"].values())


def test_patterns_are_plain_javascript():
    """Editors read patterns as ECMAScript, which has no (?P<name>...)."""
    assert "(?P" not in repr(SCHEMA)


def test_references_may_stand_for_any_plain_value():
    """${...} in a number's, boolean's or choice's place."""
    assert (
        errors("server: {port: '${PORT}'}\nlog: {level: '${LEVEL:-info}', payloads: '${P}'}\nstore: '${STORE}'") == []
    )


@pytest.mark.parametrize(
    "text",
    [
        "stroe: x",
        "server: {port: 65536}",
        "server: {port: true}",
        "server: {auth: {type: bearer}}",
        "server: {auth: {type: sigv4}}",
        "server: {auth: {type: sigv4, access_keys: {'a b': x}}}",
        "server: {auth: [{type: digest}]}",
        "functions: {'a b': {url: 'http://x/'}}",
        "functions: {f: {url: 'http://x/', timeout_seconds: 901}}",
        "functions: {f: {url: 'http://x/', headers: {A: 5}}}",
        "functions: {f: {url: 'http://x/', protocol: grpc}}",
        "aws: {endpoint_urls: {kinesys: 'http://x/'}}",
        "log: {level: INFO}",
        "event_source_mappings: [{FunctionName: f}]",
        f"event_source_mappings: [{{EventSourceArn: '{SQS}', FunctionName: f, BatchSize: 0}}]",
        f"event_source_mappings: [{{EventSourceArn: '{SQS}', FunctionName: f, batchSize: 1}}]",
        f"event_source_mappings: [{{EventSourceArn: '{SQS}', FunctionName: f, FunctionResponseTypes: [X]}}]",
        f"event_source_mappings: [{{EventSourceArn: '{SQS}', FunctionName: f, UUID: x}}]",
    ],
)
def test_what_the_schema_refuses_the_loader_refuses(text, tmp_path):
    """One table behind both."""
    assert errors(text)
    file = tmp_path / "poller.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(str(file))
    assert all(re.search(r":1: ", mistake) for mistake in caught.value.mistakes)
