"""`poller import`: templates and accounts become configs of ours that load; what is left out is named."""

import argparse
import json
import re
import textwrap

import pytest
import yaml
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poller import config, yamldoc
from poller.errors import AccessDenied, ConfigError, SourceUnavailable
from poller.importing import AccountOptions, TemplateOptions, import_template
from poller.importing.account import read_account
from poller.importing.intrinsics import MISSING, Place, Resolver
from poller.importing.values import Hole, Holes, Joined, shown, variable, written
from poller.verbs import importing

PLACE = {"region": "eu-west-1", "account": "123456789012"}
QUEUE = "arn:aws:sqs:eu-west-1:123456789012:jobs"
STREAM = "arn:aws:kinesis:eu-west-1:123456789012:stream/orders"
TABLE = "arn:aws:dynamodb:eu-west-1:123456789012:table/t/stream/2026-01-01T00:00:00.000"
NOW = 1_780_000_000.0


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Import a text as a template file; what is printed must load with its variables set."""

    def read(text, name="template.yaml", parameters=None, stage=None, **place):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        found = import_template(str(path), TemplateOptions(**place, stage=stage, parameters=parameters or {}))
        return Loaded(found, tmp_path, monkeypatch)

    return read


class Loaded:
    """What was printed, loaded by the config's own code."""

    def __init__(self, found, tmp_path, monkeypatch):
        self.text, self.remarks, self.samples = found.text, found.remarks, found.samples
        for name, value in found.samples.items():
            monkeypatch.setenv(name, value)
        printed = tmp_path / "printed.yaml"
        printed.write_text(found.text)
        self.settings = config.load(str(printed))
        self.mappings = [item.document for item in self.settings.mappings]
        self.functions = self.settings.functions

    def said(self, *words):
        """Is there a remark with these words?"""
        return any(all(word in remark for word in words) for remark in self.remarks)


def esm(properties, more="", **place):
    """A CloudFormation template with one mapping and more resources."""
    return textwrap.dedent("Resources:\n") + textwrap.indent(
        textwrap.dedent(more)
        + "Mapping:\n  Type: AWS::Lambda::EventSourceMapping\n  Properties:\n"
        + textwrap.indent(textwrap.dedent(properties), "    "),
        "  ",
    )


# --- CloudFormation


def test_a_template_becomes_a_config(read):
    """Names of the template's own resources resolve; defaults are dropped; aliases keep their qualifier."""
    found = read(
        """
        AWSTemplateFormatVersion: 2010-09-09
        Parameters:
          Stage: {Type: String, Default: dev}
        Resources:
          Orders:
            Type: AWS::Kinesis::Stream
            Properties: {Name: !Sub "orders-${Stage}"}
          Failed:
            Type: AWS::SQS::Queue
            Properties: {QueueName: failed}
          Handle:
            Type: AWS::Lambda::Function
            Properties: {FunctionName: handle-orders, Timeout: 60}
          Live:
            Type: AWS::Lambda::Alias
            Properties: {FunctionName: !Ref Handle, Name: live}
          Mapping:
            Type: AWS::Lambda::EventSourceMapping
            Properties:
              EventSourceArn: !GetAtt Orders.Arn
              FunctionName: !Ref Live
              StartingPosition: LATEST
              BatchSize: "250"
              Enabled: "true"
              MaximumRetryAttempts: -1
              ParallelizationFactor: 10
              Tags: [{Key: team, Value: orders}]
              DestinationConfig: {OnFailure: {Destination: !GetAtt Failed.Arn}}
              FilterCriteria: {Filters: [{Pattern: '{"data": {"kind": ["${a}"]}}'}]}
        """,
        **PLACE,
    )
    [document] = found.mappings
    assert document["EventSourceArn"] == "arn:aws:kinesis:eu-west-1:123456789012:stream/orders-dev"
    assert document["FunctionName"] == "handle-orders:live"
    assert document["BatchSize"] == 250
    assert document["Tags"] == {"team": "orders"}
    assert document["DestinationConfig"] == {"OnFailure": {"Destination": "arn:aws:sqs:eu-west-1:123456789012:failed"}}
    assert document["FilterCriteria"]["Filters"] == [{"Pattern": '{"data": {"kind": ["${a}"]}}'}]
    assert found.functions["handle-orders"].timeout == 60
    assert found.functions["handle-orders"].arn == "handle-orders"
    assert found.samples == {}
    assert "Enabled" not in found.text
    assert "MaximumRetryAttempts" not in found.text
    assert found.said("Parameters with the template's defaults: Stage=dev")
    assert found.settings.aws.region == "eu-west-1"


def test_what_only_the_stack_knows_is_a_variable(read):
    """Unset, the config is refused; the comments say which expression each variable stands for."""
    found = read(
        esm(
            """
            EventSourceArn: !GetAtt Jobs.Arn
            FunctionName: !GetAtt Handle.Arn
            BatchSize: !Ref Size
            ScalingConfig: {MaximumConcurrency: !ImportValue most}
            """,
            """
            Jobs: {Type: AWS::SQS::Queue, Properties: {FifoQueue: true}}
            Handle: {Type: AWS::Lambda::Function, Properties: {Timeout: !Ref Time}}
            """,
        ).replace("Resources:", "Parameters: {Size: {Type: Number}, Time: {Type: Number}}\nResources:", 1)
    )
    names = {"JOBS_ARN", "HANDLE_ARN", "PARAM_SIZE", "PARAM_TIME", "MAPPING_SCALING_CONFIG"}
    assert set(found.samples) == names
    assert found.samples["JOBS_ARN"].endswith(".fifo")
    assert found.said("JOBS_ARN: !GetAtt Jobs.Arn")
    assert found.said("MAPPING_SCALING_CONFIG: !ImportValue most")
    assert "lambda: ${HANDLE_ARN}" in found.text
    assert found.mappings[0]["FunctionName"] == "Handle"


def test_an_unset_variable_is_an_error(read, monkeypatch, tmp_path):
    """Nothing is silently wrong."""
    read(esm("EventSourceArn: !GetAtt Q.Arn\nFunctionName: f\n", "Q: {Type: AWS::SQS::Queue}\n"))
    monkeypatch.delenv("Q_ARN")
    with pytest.raises(ConfigError, match="the variable Q_ARN is not set"):
        config.load(str(tmp_path / "printed.yaml"))


@pytest.mark.parametrize(
    ("expression", "arn"),
    [
        ("!GetAtt Jobs.Arn", "arn:aws:sqs:eu-west-1:123456789012:jobs"),
        ("!GetAtt [Jobs, Arn]", "arn:aws:sqs:eu-west-1:123456789012:jobs"),
        ('{"Fn::GetAtt": [Jobs, Arn]}', "arn:aws:sqs:eu-west-1:123456789012:jobs"),
        ('!Sub "${Jobs.Arn}"', "arn:aws:sqs:eu-west-1:123456789012:jobs"),
        ('!Sub "arn:${AWS::Partition}:sqs:${AWS::Region}:${AWS::AccountId}:${Jobs.QueueName}"', QUEUE),
        ('!Sub ["arn:aws:sqs:eu-west-1:123456789012:${Name}", {Name: !GetAtt Jobs.QueueName}]', QUEUE),
        ('!Join [":", [arn, aws, sqs, !Ref "AWS::Region", !Ref "AWS::AccountId", jobs]]', QUEUE),
        ("!Select [1, [a, !GetAtt Jobs.Arn]]", QUEUE),
        (f'!Select ["1", !Split [",", "a,{QUEUE}"]]', QUEUE),
        ("!FindInMap [Queues, !Ref Stage, Arn]", QUEUE),
        (f"!FindInMap [Queues, none, Arn, {{DefaultValue: '{QUEUE}'}}]", QUEUE),
        (f'!If [IsDev, !GetAtt Jobs.Arn, "{STREAM}"]', QUEUE),
        (f'!If [Both, "{STREAM}", !GetAtt Jobs.Arn]', QUEUE),
        ("!Ref List", QUEUE),
    ],
)
def test_intrinsic_functions(read, expression, arn):
    """Each function that the template itself decides."""
    source = "!Select [0, !Ref List]" if expression == "!Ref List" else expression
    text = f"""
    Parameters:
      Stage: {{Type: String, Default: dev}}
      List: {{Type: CommaDelimitedList, Default: "{QUEUE}, other"}}
    Conditions:
      IsDev: !Equals [!Ref Stage, dev]
      IsProd: !Not [!Condition IsDev]
      Both: !And [!Condition IsDev, !Or [!Condition IsProd, !Equals [a, b]]]
    Mappings:
      Queues: {{dev: {{Arn: "{QUEUE}"}}}}
    Resources:
      Jobs: {{Type: AWS::SQS::Queue, Properties: {{QueueName: jobs}}}}
      Mapping:
        Type: AWS::Lambda::EventSourceMapping
        Properties:
          EventSourceArn: {source}
          FunctionName: worker
          FilterCriteria: !If [IsProd, {{Filters: [{{Pattern: "x"}}]}}, !Ref "AWS::NoValue"]
    """
    [document] = read(text, **PLACE).mappings
    assert document["EventSourceArn"] == arn
    assert "FilterCriteria" not in document


@pytest.mark.parametrize(
    "expression",
    [
        "!ImportValue x",
        "!GetAZs ''",
        "!Select [9, [a]]",
        "!Select [a, [a]]",
        "!Split ['', x]",
        "!Sub [x]",
        "!Sub {a: b}",
        "!Join [a]",
        "!Join ['', !Ref Unknown]",
        "!FindInMap [a, b, c]",
        "!FindInMap []",
        "!If [Unknown, a, b]",
        "!If x",
        "!Ref [a]",
        "!Ref Unknown",
        "!GetAtt x",
        "!GetAtt [a, b, c]",
        "!Whatever x",
        "{Fn::Transform: {Name: x}}",
        "{Fn::If: {a: b}}",
        "'{{resolve:ssm:/jobs/arn:1}}'",
        "!Sub '${Unknown}'",
        "!Sub '$${Unknown}'",
        "!Ref A",
        "!GetAtt A.Arn",
    ],
)
def test_what_cannot_be_resolved_is_one_variable(read, expression):
    """Odd, unknown and circular expressions never fail: the user is asked for the value."""
    circle = """
        A: {Type: AWS::SQS::Queue, Properties: {QueueName: !Ref B}}
        B: {Type: AWS::Kinesis::Stream, Properties: {Name: !Ref C}}
        C: {Type: AWS::Kinesis::Stream, Properties: {Name: !Ref B}}
        """
    found = read(esm(f"EventSourceArn: {expression}\nFunctionName: worker\n", circle), **PLACE)
    assert len(found.samples) == 1
    assert len(found.mappings) == 1


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ("!Ref Handle", "handle"),
        ("!GetAtt Handle.Arn", "handle"),
        ('!Sub "${Handle}"', "handle"),
        ('!Sub "${Handle.Arn}:live"', "handle:live"),
        ("!Ref Live", "handle:live"),
        ("!Join [':', [!GetAtt Handle.Arn, v2]]", "handle:v2"),
        ("arn:aws:lambda:eu-west-1:123456789012:function:other:7", "other:7"),
        ("123456789012:function:other", "other"),
        ("!Ref Unnamed", "Unnamed"),
        ("!Ref LiveUnnamed", "Unnamed:live"),
        ('!Sub "${AWS::StackName}-worker"', "Mapping"),
        ("!ImportValue 'x y'", "Mapping"),
    ],
)
@pytest.mark.parametrize("place", [{}, PLACE])
def test_function_names(read, kept, left, place):
    """The function is under `functions` by its own name, else by the template's; the qualifier stays in the mapping."""
    more = """
        Handle: {Type: AWS::Lambda::Function, Properties: {FunctionName: handle, Timeout: 7}}
        Unnamed: {Type: AWS::Lambda::Function, Properties: {Timeout: 7}}
        Live: {Type: AWS::Lambda::Alias, Properties: {FunctionName: !GetAtt Handle.Arn, Name: live}}
        LiveUnnamed: {Type: AWS::Lambda::Alias, Properties: {FunctionName: !Ref Unnamed, Name: live}}
        """
    found = read(esm(f"EventSourceArn: {QUEUE}\nFunctionName: {kept}\n", more), **place)
    assert found.mappings[0]["FunctionName"] == left
    key = left.partition(":")[0]
    assert list(found.functions) == [key]
    assert (found.functions[key].timeout == 7) == (key in {"handle", "Unnamed"})


def test_functions_of_one_name_are_two_entries(read):
    """A name and an ARN of elsewhere may mean two functions; the same one is one entry."""
    arn = "arn:aws:lambda:eu-west-1:210987654321:function:f"
    more = "".join(
        f"M{n}: {{Type: AWS::Lambda::EventSourceMapping, Properties: {{EventSourceArn: '{QUEUE}{n}', FunctionName: '{name}'}}}}\n"
        for n, name in enumerate((arn, f"{arn}:live", "f"))
    )
    found = read(esm(f"EventSourceArn: {QUEUE}\nFunctionName: f\n", more))
    assert [item["FunctionName"] for item in found.mappings] == ["f", "f:live", "f-2", "f-2"]
    assert {name: function.arn for name, function in found.functions.items()} == {"f": arn, "f-2": "f"}


def test_bisect_is_left_out_and_named(read):
    """With the remedy, or with the news that the mapping has it already."""
    stream = f"EventSourceArn: {STREAM}\nFunctionName: f\nStartingPosition: LATEST\nBisectBatchOnFunctionError: true\n"
    found = read(esm(stream))
    assert len(found.mappings) == 1
    assert found.said("Mapping", "BisectBatchOnFunctionError was left out", "give FunctionResponseTypes")
    found = read(esm(stream + "FunctionResponseTypes: [ReportBatchItemFailures]\n"))
    assert found.said("BisectBatchOnFunctionError", "which the mapping has")
    found = read(esm(stream.replace("true", '"false"')))
    assert not found.said("Bisect")


def test_other_sources_are_named(read):
    """Kafka, MQ and DocumentDB by what they are; the mappings beside them are carried over."""
    more = """
        Kafka:
          Type: AWS::Lambda::EventSourceMapping
          Properties:
            EventSourceArn: arn:aws:kafka:eu-west-1:123456789012:cluster/c/1
            FunctionName: f
            Topics: [t]
        Broker:
          Type: AWS::Lambda::EventSourceMapping
          Properties: {EventSourceArn: !GetAtt B.Arn, FunctionName: f, Queues: [q], SourceAccessConfigurations: [{Type: BASIC_AUTH, URI: x}]}
        Own:
          Type: AWS::Lambda::EventSourceMapping
          Properties: {FunctionName: f, SelfManagedEventSource: {Endpoints: {KafkaBootstrapServers: [a]}}}
        Documents:
          Type: AWS::Lambda::EventSourceMapping
          Properties: {EventSourceArn: "arn:aws:rds:eu-west-1:123456789012:cluster:c", FunctionName: f}
        Nested: {Type: AWS::CloudFormation::Stack}
        "Fn::ForEach::Loop": [a, [b], {}]
        """
    found = read(esm(f"EventSourceArn: {QUEUE}\nFunctionName: f\nKmsKeyArn: k\nLoggingConfig: {{a: b}}\n", more))
    assert len(found.mappings) == 1
    assert found.said("Kafka (line", "not carried over", "Amazon MSK")
    assert found.said("Broker", "Amazon MQ")
    assert found.said("Own", "self-managed Apache Kafka")
    assert found.said("Documents", "Amazon DocumentDB")
    assert found.said("Nested", "a stack of its own")
    assert found.said("Fn::ForEach::Loop")
    assert found.said("KMSKeyArn was left out")
    assert found.said("LoggingConfig was left out")
    assert "# Kafka (line" in found.text


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ("BatchSize: 100", "Maximum batch window in seconds must be greater than 0"),
        ("BatchSize: many", "BatchSize"),
        ("FilterCriteria: {Filters: [{Pattern: '{'}]}", "Invalid filter pattern"),
        ("FilterCriteria: !ImportValue x", "FilterCriteria: !ImportValue x is not decided by the template alone"),
        ("FunctionName: 'no name'", "functions"),
        ("FunctionName: {a: b}", "functions"),
        ("EventSourceArn: !Sub '${AWS::StackName}'\nBatchSize: [1]", "BatchSize"),
    ],
)
def test_a_mapping_that_aws_would_refuse_is_printed_in_comments(read, properties, said):
    """With the reason; the others go on being printed."""
    given = {"EventSourceArn": QUEUE, "FunctionName": "f"}
    given = "".join(f"{name}: {value}\n" for name, value in given.items() if name not in properties)
    good = (
        f"Good: {{Type: AWS::Lambda::EventSourceMapping, Properties: {{EventSourceArn: '{QUEUE}', FunctionName: g}}}}\n"
    )
    found = read(esm(given + properties + "\n", good))
    assert len(found.mappings) == 1
    assert found.said("Mapping (line", "not carried over", said)
    assert "  # - EventSourceArn: " in found.text


def test_conditions(read):
    """A condition that does not hold leaves the mapping out; one that is not known is told."""
    text = f"""
    Parameters: {{Stage: {{Type: String, Default: dev}}, Other: {{Type: String}}, Ssm: {{Type: "AWS::SSM::Parameter::Value<String>", Default: /x}}}}
    Conditions:
      Prod: !And [!Condition Unknown, !Equals [!Ref Stage, prod]]
      Either: !Or [!Condition Unknown, !Equals [a, a]]
      Circle: !Not [!Condition Circle]
      Unknown: !Or [!Equals [!Ref Other, a], !Equals [!Ref Ssm, /x]]
    Resources:
      One: {{Type: AWS::Lambda::EventSourceMapping, Condition: Prod, Properties: {{EventSourceArn: "{QUEUE}", FunctionName: f}}}}
      Nil: {{Type: AWS::Lambda::EventSourceMapping, Condition: Circle, Properties: {{EventSourceArn: "{QUEUE}-nil", FunctionName: f}}}}
      Two: {{Type: AWS::Lambda::EventSourceMapping, Condition: Unknown, Properties: {{EventSourceArn: "{QUEUE}", FunctionName: f, Enabled: !If [Either, false, true]}}}}
    """
    found = read(text)
    assert len(found.mappings) == 2
    assert not found.mappings[1]["Enabled"]
    assert "TWO_ENABLED" not in found.samples
    assert found.said("Nil", "only where the condition Circle holds")
    assert found.said("One", "its condition Prod does not hold with these parameters")
    assert found.said("Two", "only where the condition Unknown holds")
    found = read(text, parameters={"Stage": "prod"})
    assert found.said("Two", "not carried over", "the same source and function as One")


def test_parameters_of_another_account(read):
    """A hole in an ARN's account is an account, whatever the parameter is called."""
    text = esm('EventSourceArn: !Sub "arn:${P}:sqs:${R}:${Owner}:jobs"\nFunctionName: f\n').replace(
        "Resources:", "Parameters: {P: {Type: String}, R: {Type: String}, Owner: {Type: String}}\nResources:", 1
    )
    assert len(read(text).mappings) == 1
    [document] = read(text, parameters={"P": "aws", "R": "eu-west-1", "Owner": "210987654321"}).mappings
    assert document["EventSourceArn"] == "arn:aws:sqs:eu-west-1:210987654321:jobs"


def test_partitions(read):
    """China and GovCloud have ARNs of their own."""
    text = esm(
        "EventSourceArn: !GetAtt Q.Arn\nFunctionName: f\n", "Q: {Type: AWS::SQS::Queue, Properties: {QueueName: q}}\n"
    )
    for region, partition in (("cn-north-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov"), ("us-east-1", "aws")):
        [document] = read(text, region=region, account="123456789012").mappings
        assert document["EventSourceArn"] == f"arn:{partition}:sqs:{region}:123456789012:q"


@pytest.mark.parametrize("loader", [yamldoc._Loader, yaml.SafeLoader])
def test_json_templates(read, monkeypatch, loader):
    """As CDK and troposphere write them: tabs, escaped surrogates, escaped slashes; with libyaml and without."""
    monkeypatch.setattr(yamldoc, "_Loader", loader)
    template = {
        "Description": "\U0001f600",
        "Resources": {
            "M": {
                "Type": "AWS::Lambda::EventSourceMapping",
                "Properties": {
                    "EventSourceArn": {"Fn::Sub": f"{QUEUE}"},
                    "FunctionName": {"Ref": "F"},
                    "FilterCriteria": {
                        "Filters": [{"Pattern": '{"body":{"face":["\U0001f600"],"x":["\\\\ud83d\\\\ude00"]}}'}]
                    },
                },
            },
            "F": {"Type": "AWS::Lambda::Function", "Properties": {"FunctionName": "f"}},
        },
    }
    for indent in (None, 2, "\t"):
        found = read(json.dumps(template, indent=indent).replace("/", "\\/"), "template.json")
        [document] = found.mappings
        assert json.loads(document["FilterCriteria"]["Filters"][0]["Pattern"]) == json.loads(
            template["Resources"]["M"]["Properties"]["FilterCriteria"]["Filters"][0]["Pattern"]
        )


# --- SAM


def test_sam_events(read):
    """Events of functions are mappings; Globals count; an alias that SAM publishes is what is invoked."""
    found = read(
        f"""
        Transform: AWS::Serverless-2016-10-31
        Globals: {{Function: {{Timeout: 20}}}}
        Resources:
          Worker:
            Type: AWS::Serverless::Function
            Properties:
              FunctionName: worker
              AutoPublishAlias: live
              Events:
                Jobs: {{Type: SQS, Properties: {{Queue: !GetAtt Jobs.Arn, BatchSize: 5, ScalingConfig: {{MaximumConcurrency: 4}}}}}}
                Topic: {{Type: SNS, Properties: {{Topic: t, SqsSubscription: true}}}}
                Own: {{Type: SNS, Properties: {{Topic: t, SqsSubscription: {{QueueArn: "{QUEUE}-own", QueueUrl: u, BatchSize: 3}}}}}}
                Web: {{Type: Api, Properties: {{Path: /}}}}
                Kafka: {{Type: MSK, Properties: {{Stream: x}}}}
                Odd: 5
          Reader:
            Type: AWS::Serverless::Function
            Properties:
              Timeout: 5
              Events:
                Clicks:
                  Type: Kinesis
                  Properties:
                    Stream: {STREAM}
                    StartingPosition: AT_TIMESTAMP
                    StartingPositionTimestamp: 1700000000
                    DestinationConfig: {{OnFailure: {{Type: SQS}}}}
                Table:
                  Type: DynamoDB
                  Properties:
                    Stream: !GetAtt Customers.StreamArn
                    StartingPosition: LATEST
                    DestinationConfig: {{OnFailure: {{Type: SNS, Destination: !Ref Failed}}}}
          Jobs: {{Type: AWS::SQS::Queue, Properties: {{QueueName: jobs}}}}
          Customers: {{Type: AWS::DynamoDB::Table}}
          Failed: {{Type: AWS::SNS::Topic, Properties: {{TopicName: failed}}}}
        """,
        **PLACE,
    )
    jobs, topic, own, clicks, table = found.mappings
    assert (jobs["FunctionName"], jobs["BatchSize"], jobs["ScalingConfig"]) == (
        "worker:live",
        5,
        {"MaximumConcurrency": 4},
    )
    assert topic["EventSourceArn"] == found.samples["WORKER_TOPIC_QUEUE_ARN"]
    assert clicks["StartingPositionTimestamp"] == 1_700_000_000
    assert clicks["DestinationConfig"]["OnFailure"]["Destination"] == found.samples["READER_CLICKS_DESTINATION"]
    assert "/stream/" in table["EventSourceArn"]
    assert table["DestinationConfig"]["OnFailure"]["Destination"] == "arn:aws:sns:eu-west-1:123456789012:failed"
    assert (own["EventSourceArn"], own["BatchSize"]) == (f"{QUEUE}-own", 3)
    assert (found.functions["worker"].timeout, found.functions["Reader"].timeout) == (20, 5)
    assert found.said("Worker.Web", "nothing to poll")
    assert found.said("Worker.Kafka", "Amazon MSK")
    assert "a SAM template" in found.text


# --- Serverless Framework

SERVERLESS = """
service: shop
custom:
  stage: ${opt:stage, self:provider.stage}
  prefix: ${self:service}-${self:custom.stage}
  queues: {dev: "arn:aws:sqs:eu-west-1:123456789012:jobs-dev", prod: "arn:aws:sqs:eu-west-1:123456789012:jobs"}
  patterns: [{body: {kind: ["${x}"]}}]
  sizes: {small: 5}
params: {default: {table: customers}, prod: {table: people}}
provider: {name: aws, stage: dev, region: eu-west-1, timeout: 12}
functions:
  worker:
    handler: x.y
    provisionedConcurrency: 1
    events:
      - sqs: ${self:custom.queues.${self:custom.stage}}
      - sqs:
          arn: !GetAtt Jobs.Arn
          batchSize: ${self:custom.sizes.small}
          functionResponseType: ReportBatchItemFailures
          maximumConcurrency: 7
          filterPatterns: ${self:custom.patterns}
      - stream:
          type: kinesis
          arn: {Fn::GetAtt: [Clicks, Arn]}
          batchWindow: 3
          bisectBatchOnFunctionError: true
          destinations: {onFailure: {type: sqs, arn: !GetAtt Jobs.Arn}}
      - stream: {type: dynamodb, arn: "${ssm:/orders/stream}", startingPosition: LATEST, oddOption: 1}
      - stream: {type: kinesis, arn: "arn:aws:kinesis:${aws:region}:${aws:accountId}:stream/x", consumer: true, enabled: false}
      - http: GET /
      - msk: {arn: x}
      - schedule
  two:
    name: ${self:custom.prefix}-named
    events:
      - stream: arn:aws:dynamodb:${AWS::Region}:123456789012:table/${param:table}/stream/2026-01-01T00:00:00.000
      - sqs: {arn: "arn:aws:sqs:${env:QUEUE_REGION}:123456789012:${self:nothing, 'fallback'}", maximumBatchingWindow: 9}
  three: ${file(three.yml)}
resources:
  - Resources:
      Jobs: {Type: AWS::SQS::Queue, Properties: {QueueName: "${self:custom.prefix}-jobs"}}
  - Resources:
      Clicks: {Type: AWS::Kinesis::Stream}
"""


def test_serverless_events(read):
    """Variables of the file, the framework's own defaults and names, and resources of the file."""
    found = read(SERVERLESS, "serverless.yml", account="123456789012")
    first, second, clicks, table, consumer, plain, last = found.mappings
    assert first["EventSourceArn"] == "arn:aws:sqs:eu-west-1:123456789012:jobs-dev"
    assert first["FunctionName"] == "shop-dev-worker:provisioned"
    assert second["EventSourceArn"] == "arn:aws:sqs:eu-west-1:123456789012:shop-dev-jobs"
    assert (second["BatchSize"], second["ScalingConfig"]) == (5, {"MaximumConcurrency": 7})
    assert second["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
    assert second["FilterCriteria"] == {"Filters": [{"Pattern": '{"body":{"kind":["${x}"]}}'}]}
    assert (clicks["BatchSize"], clicks["MaximumBatchingWindowInSeconds"]) == (10, 3)
    assert clicks["DestinationConfig"]["OnFailure"]["Destination"] == second["EventSourceArn"]
    assert (table["StartingPosition"], table["EventSourceArn"]) == ("LATEST", found.samples["SSM_ORDERS_STREAM"])
    assert "/consumer/" in consumer["EventSourceArn"]
    assert not consumer["Enabled"]
    assert plain["EventSourceArn"].startswith("arn:aws:dynamodb:eu-west-1:123456789012:table/customers/stream/")
    assert (plain["FunctionName"], plain["StartingPosition"]) == ("shop-dev-named", "TRIM_HORIZON")
    assert last["EventSourceArn"].endswith(":123456789012:fallback")
    assert "QUEUE_REGION" in found.samples
    assert found.functions["shop-dev-worker"].timeout == 12
    assert found.said("worker.events[2]", "BisectBatchOnFunctionError")
    assert found.said("worker.events[3]", "oddOption was left out")
    assert found.said("worker.events[5]", "http", "nothing to poll")
    assert found.said("worker.events[6]", "Amazon MSK")
    assert found.said("three", "not read")
    assert found.said("The stage is dev, the Region eu-west-1")


def test_serverless_stage_region_and_parameters(read):
    """The command line speaks before the file."""
    options = {"account": "123456789012", "region": "us-east-2", "stage": "prod", "parameters": {"table": "given"}}
    found = read(SERVERLESS, "serverless.yml", **options)
    assert found.mappings[0]["EventSourceArn"].endswith(":jobs")
    assert found.mappings[0]["FunctionName"] == "shop-prod-worker:provisioned"
    assert found.mappings[5]["EventSourceArn"].startswith("arn:aws:dynamodb:us-east-2:123456789012:table/given/")
    assert found.settings.aws.region == "us-east-2"


@pytest.mark.parametrize(
    "variable",
    [
        "${self:custom.a}",
        "${self:custom.list}",
        "${self:custom.list.9}",
        "x${self:custom.list}",
        "${self:custom.twice}",
        "${opt:nothing}",
        "${file(x.yml):a.b}",
        "${cf:stack.Output}",
        "${self:custom.${ssm:/x}, self:custom.b}",
        "${env:A B}",
        "${:}",
        "${,}",
        "${sls:instanceId}",
        "a${",
        "${unclosed:x",
    ],
)
def test_serverless_variables_that_the_file_does_not_tell(read, variable):
    """Circles, foreign sources, what is not there: the mapping is printed with a variable, or in comments."""
    text = f"""
    service: s
    provider: {{name: aws}}
    custom:
      a: ${{self:custom.b}}
      b: ${{self:custom.a}}
      list: [1]
      twice: ${{self:custom.a}}${{self:custom.b}}
    functions:
      f: {{events: [sqs: {{arn: {json.dumps(variable)}}}]}}
    """
    found = read(text, "serverless.yml")
    assert len(found.mappings) == len(found.samples) or found.said("not carried over")


# --- files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is no template"),
        (b"- a", "is no template"),
        (b"a: b", "has neither Resources nor service"),
        (b"Resources: 5", "has neither Resources"),
        (b"Resources: {}", "has no event source mappings that esm-poller can poll"),
        (
            b"Resources: {A: {Type: AWS::Serverless::Function, Properties: {Events: {E: {Type: Api}}}}}",
            "nothing to poll",
        ),
        (b"Resources:\n  A: [", "template.yaml:3: not valid YAML"),
        (b"Resources: \xff", "not UTF-8"),
        (b"Resources: \x01", "a character that YAML does not allow"),
        (b"a: " + b"[" * 200, "nested deeper than 64 levels"),
        (b"a: " + b"!Sub [" * 200, "nested deeper"),
        (
            b"a: &a [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(
                b"b%d: &b%d [%s]\n" % (n, n, b",".join([b"*b%d" % (n - 1) if n else b"*a"] * 9)) for n in range(9)
            ),
            "aliases expanded",
        ),
        (b"Resources: {}\n--- \n", "a second document"),
        (b"#" * (5 * 1024 * 1024 + 1), "larger than"),
    ],
)
def test_bad_files(read, text, said):
    """A mistake in a few words, with the line where there is one."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        read(text)


def test_files_that_are_no_templates(read, tmp_path):
    """Programs name what makes a template of them; a missing file is a mistake."""
    with pytest.raises(ConfigError, match="cdk synth"):
        read("x", "app.ts")
    for path in (str(tmp_path / "none"), "a\0b", str(tmp_path)):
        with pytest.raises(ConfigError, match="cannot be read"):
            import_template(path, TemplateOptions())


def test_unknown_parameters_and_a_stage_are_mistakes(read):
    """A typo must not fall back to a default silently."""
    text = esm(f"EventSourceArn: {QUEUE}\nFunctionName: f\n") + "Parameters: {Stage: {Type: String, Default: dev}}\n"
    with pytest.raises(ConfigError, match=r'--parameter Stag: .*did you mean "Stage"'):
        read(text, parameters={"Stag": "x"})
    with pytest.raises(ConfigError, match="--stage"):
        read(text, stage="x")
    assert read(text, parameters={"AWS::StackName": "s"}).mappings


def test_references_that_double_end(read):
    """Neither names, conditions, aliases nor serverless variables take for ever."""
    count = 200
    names = "".join(
        f"A{n}: {{Type: AWS::Kinesis::Stream, Properties: {{Name: !Sub '${{A{n + 1}}}${{A{n + 1}}}'}}}}\n"
        for n in range(count)
    )
    names += f"A{count}: {{Type: AWS::Kinesis::Stream, Properties: {{Name: abcdefgh}}}}\n"
    names += "".join(
        f"L{n}: {{Type: AWS::Lambda::Alias, Properties: {{FunctionName: !Sub '${{L{n + 1}}}${{L{n + 1}}}', Name: x}}}}\n"
        for n in range(count)
    )
    names += "X: {Type: AWS::Kinesis::Stream, Properties: {Name: !Sub '${Y}${Y}'}}\n"
    names += "Y: {Type: AWS::Kinesis::Stream, Properties: {Name: !Sub '${X}${X}'}}\n"
    names += "Z: {Type: AWS::Lambda::EventSourceMapping, Properties: {EventSourceArn: !Ref X, FunctionName: f}}\n"
    conditions = "Conditions:\n" + "".join(
        f"  C{n}: !And [!Condition C{n + 1}, !Condition C{n + 1}]\n" for n in range(count)
    )
    properties = (
        "EventSourceArn: !GetAtt A0.Arn\nFunctionName: !Ref L0\nStartingPosition: !If [C0, LATEST, TRIM_HORIZON]\n"
    )
    found = read(conditions + esm(properties, names))
    assert len(found.text) < 100_000
    custom = "".join(f"  v{n}: ${{self:custom.v{n + 1}}}${{self:custom.v{n + 1}}}\n" for n in range(30))
    with pytest.raises(ConfigError, match="variables"):
        read(
            f"service: s\nprovider: {{}}\ncustom:\n{custom}functions: {{f: {{events: [sqs: '${{self:custom.v0}}']}}}}\n",
            "serverless.yml",
        )


def test_deep_values_are_shown_in_comments(read):
    """What is refused may be nested as deep as the file may be."""
    deep = "{a: !Sub " * 28 + "x" + "}" * 28
    found = read(esm(f"EventSourceArn: {QUEUE}\nFunctionName: f\nScalingConfig: {deep}\n"))
    assert found.mappings == []
    deep = "[!Foo " * 56 + "x" + "]" * 56
    assert read(esm(f"EventSourceArn: {QUEUE}\nFunctionName: f\nScalingConfig: {deep}\n")).mappings == []
    deep = "[" * 56 + "x" + "]" * 56
    assert read(esm(f"EventSourceArn: {QUEUE}\nFunctionName: f\nFilterCriteria: {deep}\n")).mappings == []


def test_hostile_texts_stay_in_their_comment(read):
    """Names and values of the template end no comment, and send nothing to a terminal."""
    name = '"a\\nb: c\\u2028d\\e[31m"'
    text = f"Resources:\n  {name}:\n    Type: AWS::Lambda::EventSourceMapping\n    Condition: {name}\n"
    text += f"    Properties: {{EventSourceArn: {QUEUE}, FunctionName: f, {name}: x, FilterCriteria: {{Filters: [{{Pattern: {name}}}]}}}}\n"
    found = read(text)
    assert found.mappings == []
    assert "\x1b" not in found.text + "".join(found.remarks)
    assert all("\n" not in remark for remark in found.remarks)


# --- property

_leaf = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 20_000),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        [
            QUEUE,
            STREAM,
            TABLE,
            "LATEST",
            "ReportBatchItemFailures",
            "${A}",
            "$",
            "${A::B}",
            "${self:custom.a}",
            "${opt:x}",
            '{"a":[1]}',
            "f:live",
        ]
    ),
)
_expressions = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["Filters", "Pattern", "OnFailure", "Destination", "MaximumConcurrency"]), inner, max_size=2
        ),
        st.builds(
            lambda name, value: {name: value},
            st.sampled_from(
                [
                    "Ref",
                    "Fn::GetAtt",
                    "Fn::Sub",
                    "Fn::Join",
                    "Fn::Select",
                    "Fn::Split",
                    "Fn::FindInMap",
                    "Fn::If",
                    "Fn::ToJsonString",
                    "Fn::X",
                ]
            ),
            inner,
        ),
        st.sampled_from(
            [
                {"Ref": "Q"},
                {"Ref": "P"},
                {"Fn::GetAtt": "Q.Arn"},
                {"Fn::Sub": "$${P}${Q.Arn}-${AWS::Region}"},
                {"Ref": "AWS::NoValue"},
            ]
        ),
    ),
    max_leaves=6,
)
_names = [
    *(
        "BatchSize",
        "BisectBatchOnFunctionError",
        "DestinationConfig",
        "Enabled",
        "FilterCriteria",
        "FunctionResponseTypes",
    ),
    *(
        "MaximumBatchingWindowInSeconds",
        "MaximumRecordAgeInSeconds",
        "MaximumRetryAttempts",
        "MetricsConfig",
        "Options",
    ),
    *(
        "ParallelizationFactor",
        "ProvisionedPollerConfig",
        "ScalingConfig",
        "StartingPosition",
        "StartingPositionTimestamp",
    ),
    *("Tags", "Topics", "TumblingWindowInSeconds", "UUID", "Odd"),
]
_SERVERLESS = ["batchSize", "batchWindow", "enabled", "startingPosition", "maximumConcurrency", "maximumRetryAttempts"]
_mappings = st.fixed_dictionaries(
    {
        "EventSourceArn": st.one_of(
            st.sampled_from([QUEUE, STREAM, TABLE, {"Fn::GetAtt": ["Q", "Arn"]}]), _expressions
        ),
        "FunctionName": st.one_of(st.sampled_from(["f", {"Ref": "F"}]), _expressions),
    },
    optional=dict.fromkeys(_names, _expressions),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_mappings, min_size=1, max_size=3), st.booleans())
def test_whatever_is_printed_loads(read, mappings, is_placed):
    """No template makes a config that does not load, and nothing but a ConfigError is raised."""
    resources = {
        f"M{n}": {"Type": "AWS::Lambda::EventSourceMapping", "Properties": found} for n, found in enumerate(mappings)
    }
    resources |= {"Q": {"Type": "AWS::SQS::Queue", "Properties": {}}, "F": {"Type": "AWS::Lambda::Function"}}
    text = json.dumps({"Parameters": {"P": {"Type": "String"}}, "Resources": resources})
    try:
        read(text, "template.json", **(PLACE if is_placed else {}))
    except ConfigError as error:
        assert "can poll" in str(error) or "YAML" in str(error)  # noqa: PT017 - some texts are no YAML


_events = st.lists(
    st.dictionaries(
        st.sampled_from(["stream", "sqs"]),
        st.one_of(
            _expressions,
            st.fixed_dictionaries(
                {"arn": _expressions},
                optional=dict.fromkeys(
                    [*_SERVERLESS, "type", "consumer", "destinations", "filterPatterns", "functionResponseType", "odd"],
                    _expressions,
                ),
            ),
        ),
        max_size=1,
    ),
    max_size=3,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_events, _leaf, _leaf, _leaf)
def test_whatever_is_printed_of_serverless_loads(read, events, name, service, stage):
    """The same of the other kind of file."""
    function = {"name": name, "timeout": stage, "events": events}
    document = {"service": service, "provider": {"stage": stage}, "custom": {"a": name}, "functions": {"f": function}}
    try:
        read(json.dumps(document), "serverless.yml")
    except ConfigError as error:
        assert "can poll" in str(error) or "YAML" in str(error)  # noqa: PT017 - some texts are no YAML


@given(
    st.lists(
        st.one_of(
            st.text(max_size=4), st.sampled_from(["$", "${", "$${", "}"]), st.builds(Hole, st.just("A_B"), st.just("x"))
        )
    )
)
def test_texts_survive_the_config_syntax(parts):
    """What is written with `${` in it reads back as itself, holes filled."""
    text = Holes().join([Joined((part,)) if isinstance(part, Hole) else part for part in parts])
    pieces = text.parts if isinstance(text, Joined) else (text,)
    expected = "".join("<H>" if isinstance(part, Hole) else part for part in pieces)
    filled = re.sub(r"\$\$\{|\$\{([^}]*)\}", lambda found: "<H>" if found[1] else "${", written(text))
    assert filled == expected


def test_names_of_variables():
    """Upper case, a letter first, and never two expressions under one name."""
    assert variable("OrdersQueue.Arn") == "ORDERS_QUEUE_ARN"
    assert variable("SQSQueue-1") == "SQS_QUEUE_1"
    assert variable("1 a") == "VALUE_1_A"
    assert variable("") == "VALUE"
    holes = Holes()
    assert holes.make("a", "X y") == holes.make("a", "X y")
    assert [holes.make(text, "X y").whole.name for text in "ab"] == ["X_Y", "X_Y_2"]
    assert shown("a\n\x1b[0m b", 100) == "a [0m b"


def test_resolver_has_a_depth():
    """A chain of references ends in a variable before Python's stack does."""
    resources = {
        f"A{n}": {"Type": "AWS::Kinesis::Stream", "Properties": {"Name": {"Ref": f"A{n + 1}"}}} for n in range(5_000)
    }
    resolver = Resolver({"Resources": resources}, Place(), {}, Holes())
    assert isinstance(resolver.resolve({"Ref": "A0"}), Joined)
    assert resolver.resolve({"Ref": "AWS::NoValue"}) is MISSING
    assert resolver.resolve({"Fn::ToJsonString": {"a": [1]}}) == '{"a": [1]}'


# --- accounts


def answer(uuid, arn, function="orders", **more):
    """One mapping as AWS lists it."""
    document = {
        "UUID": f"6d9bce8e-836b-442c-8070-{uuid:012d}",
        "EventSourceArn": arn,
        "EventSourceMappingArn": f"arn:aws:lambda:eu-west-1:123456789012:event-source-mapping:{uuid}",
        "FunctionArn": f"arn:aws:lambda:eu-west-1:123456789012:function:{function}",
        "LastModified": 1.0,
        "LastProcessingResult": "OK",
        "State": "Enabled",
        "StateTransitionReason": "User action",
        "BatchSize": 10 if ":sqs:" in arn else 100,
        "MaximumBatchingWindowInSeconds": 0,
        "FunctionResponseTypes": [],
    }
    if ":sqs:" not in arn:
        document |= {"StartingPosition": "LATEST", "MaximumRecordAgeInSeconds": -1, "BisectBatchOnFunctionError": False}
        document |= {"DestinationConfig": {"OnFailure": {}}, "TumblingWindowInSeconds": 0, "ParallelizationFactor": 1}
    return {**document, **more}


class Lambda:
    """A client of Lambda: pages of mappings, and the timeout of each function or an error."""

    def __init__(self, *pages, timeout=30):
        self.pages, self.timeout, self.asked = pages, timeout, []

    async def list_event_source_mappings(self, MaxItems, Marker="0"):
        assert MaxItems == 100
        number = int(Marker)
        page = {"EventSourceMappings": self.pages[number]}
        return page | ({"NextMarker": str(number + 1)} if number + 1 < len(self.pages) else {})

    async def get_function_configuration(self, FunctionName):
        self.asked.append(FunctionName)
        if isinstance(self.timeout, str):
            raise ClientError({"Error": {"Code": self.timeout, "Message": "no"}}, "GetFunctionConfiguration")
        return {"Timeout": self.timeout}


@pytest.fixture
def account(tmp_path, monkeypatch):
    """Import from a client; what is printed must load."""

    async def account(client, **options):
        return Loaded(await read_account(client, "eu-west-1", AccountOptions(**options), NOW), tmp_path, monkeypatch)

    return account


async def test_every_page_of_an_account(account):
    """UUIDs are kept, functions are asked once, and each mapping has its command for the switch-over."""
    client = Lambda(
        [answer(1, QUEUE, "orders:live"), answer(2, f"{QUEUE}-2", "orders:live")], [answer(3, TABLE, "other")]
    )
    found = await account(client)
    assert [item.uuid[-1] for item in found.settings.mappings] == ["1", "2", "3"]
    assert [item["FunctionName"] for item in found.mappings] == ["orders:live", "orders:live", "other"]
    assert found.functions["orders"].arn == "arn:aws:lambda:eu-west-1:123456789012:function:orders"
    assert found.functions["orders"].timeout == 30
    assert len(client.asked) == 2
    for number in (1, 2, 3):
        command = f"aws lambda update-event-source-mapping --region eu-west-1 --uuid 6d9bce8e-836b-442c-8070-{number:012d} --no-enabled"
        assert found.said(command)
        assert f"#   {command}\n" in found.text
    assert found.said("AWS polls these sources until its own mappings are disabled")
    for default in ("BatchSize", "Maximum", "Bisect", "FunctionResponseTypes", "DestinationConfig", "State:"):
        assert default not in found.text


async def test_where_a_stream_of_an_account_starts(account):
    """Kinesis: the overlap before now. TRIM_HORIZON where nothing nearer is known to be early enough."""
    mappings = [
        answer(1, STREAM),
        answer(2, f"{STREAM}-2", LastProcessingResult="PROBLEM: Function call failed"),
        answer(3, f"{STREAM}-3", State="Disabled"),
        answer(4, TABLE),
        answer(5, f"{STREAM}-5", StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp=5.0),
        answer(6, QUEUE),
    ]
    found = await account(Lambda(mappings), overlap=60.0)
    starts = [(item.get("StartingPosition"), item.get("StartingPositionTimestamp")) for item in found.mappings]
    moment = ("AT_TIMESTAMP", NOW - 60)
    rest = ("TRIM_HORIZON", None)
    assert starts == [moment, rest, rest, rest, moment, (None, None)]
    assert [item["Enabled"] for item in found.mappings] == [True, True, False, True, True, True]
    assert not found.said("--uuid 6d9bce8e-836b-442c-8070-000000000003")
    assert found.said("starts 60 s before this import", "AWS's own StartingPosition was LATEST")
    assert found.said("may be far behind")
    assert found.said("disabled at AWS, and where it stopped")
    assert found.said("a DynamoDB stream has no other position")


async def test_a_consumer_has_one_reader(account):
    """Both would push each other off its shards."""
    found = await account(Lambda([answer(1, f"{STREAM}/consumer/c:1700000000")]))
    assert found.said("disable AWS's mapping before the poller starts")


async def test_filters_that_cannot_be_read_are_not_dropped(account):
    """Without its filter a mapping would deliver everything."""
    error = {"ErrorCode": "KMSAccessDeniedException", "Message": "no key"}
    found = await account(
        Lambda([answer(1, QUEUE, FilterCriteriaError=error, KMSKeyArn="arn:aws:kms:x"), answer(2, TABLE)])
    )
    assert len(found.mappings) == 1
    assert found.said("not carried over", "its filters cannot be read", "no key")


async def test_kafka_of_an_account_is_named(account):
    """With the UUID; alone it is nothing to print."""
    kafka = answer(1, "arn:aws:kafka:eu-west-1:123456789012:cluster/c/1", Topics=["t"])
    found = await account(Lambda([kafka, answer(2, QUEUE, State="Deleting"), answer(3, TABLE)]))
    assert len(found.mappings) == 1
    assert found.said("6d9bce8e-836b-442c-8070-000000000001", "Amazon MSK")
    assert found.said("AWS is deleting it")
    with pytest.raises(ConfigError, match="Amazon MSK"):
        await account(Lambda([kafka]))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        ("orders", 2),
        ("orders:live", 1),
        ("123456789012:function:orders", 2),
        ("arn:aws:lambda:eu-west-1:123456789012:function:orders", 2),
        ("arn:aws:lambda:eu-west-1:123456789012:function:orders:live", 1),
    ],
)
async def test_one_function_of_an_account(account, function, count):
    """A name means its aliases too, which AWS's own filter does not find."""
    client = Lambda([answer(1, QUEUE), answer(2, QUEUE, "orders:live"), answer(3, QUEUE, "orders2")])
    assert len((await account(client, function=function)).mappings) == count


async def test_nothing_found_is_a_mistake(account):
    """Rather than an empty config of the wrong Region."""
    with pytest.raises(ConfigError, match="no event source mappings of the function other in eu-west-1"):
        await account(Lambda([answer(1, QUEUE)]), function="other")


async def test_timeouts_that_cannot_be_read(account):
    """No right to ask is asked for once and told; a function that is gone is no failure; other trouble is."""
    client = Lambda([answer(1, QUEUE), answer(2, QUEUE, "other")], timeout="AccessDeniedException")
    found = await account(client)
    assert len(client.asked) == 1
    assert found.said("timeout_seconds could not be read", "AccessDenied")
    assert "timeout_seconds: " not in found.text
    await account(Lambda([answer(1, QUEUE)], timeout="ResourceNotFoundException"))
    with pytest.raises(SourceUnavailable):
        await account(Lambda([answer(1, QUEUE)], timeout="ServiceException"))


async def test_an_account_that_refuses_or_goes_in_circles(account):
    """No endless paging; AWS's refusal is passed on."""
    client = Lambda([answer(1, QUEUE)], [answer(2, QUEUE, "g")])

    async def circle(**_):
        return {"EventSourceMappings": [], "NextMarker": "x"}

    async def refuse(**_):
        raise ClientError({"Error": {"Code": "AccessDeniedException", "Message": "not you"}}, "List")

    client.list_event_source_mappings = circle
    with pytest.raises(SourceUnavailable, match="came twice"):
        await account(client)
    client.list_event_source_mappings = refuse
    with pytest.raises(AccessDenied, match="not you"):
        await account(client)


async def test_the_endpoint_is_kept(account):
    """In the config and in the commands, quoted for a shell."""
    found = await account(Lambda([answer(1, QUEUE)]), endpoint_url="http://127.0.0.1:4566/?a=b;c")
    assert found.settings.aws.endpoint_url == "http://127.0.0.1:4566/?a=b;c"
    assert found.said("--endpoint-url 'http://127.0.0.1:4566/?a=b;c'")


# --- the verb


@pytest.fixture
def verb(capsys):
    """One call of `poller import`: exit code, standard output, standard error."""

    def verb(*arguments):
        parser = argparse.ArgumentParser(prog="poller")
        importing.add(parser.add_subparsers())
        try:
            given = parser.parse_args(["import", *arguments])
            code = given.verb(given)
        except SystemExit as end:
            code = end.code
        except ConfigError as error:
            code = 2
            return code, capsys.readouterr().out, "\n".join(error.mistakes)
        said = capsys.readouterr()
        return code, said.out, said.err

    return verb


def test_the_verb_prints_a_config_and_remarks(verb, tmp_path):
    """The config alone on standard output."""
    path = tmp_path / "t.yaml"
    path.write_text(
        esm(
            "EventSourceArn: !GetAtt Q.Arn\nFunctionName: f\n",
            "Q: {Type: AWS::SQS::Queue, Properties: {QueueName: !Ref P}}\n",
        )
        + "Parameters: {P: {}}\n"
    )
    code, out, err = verb(
        str(path), "--region", "eu-west-1", "--account", "123456789012", "--parameter", "P=jobs=1".replace("=1", "")
    )
    assert code == 0
    assert QUEUE in out
    assert out.startswith("# Made by `poller import`")
    assert "Where the stack is deployed" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["t.yaml", "--function", "f", "--overlap", "5"], "--function: is for an account"),
        (["--stage", "x", "--parameter", "a=b", "--account", "123456789012"], "--stage: belongs to a TEMPLATE"),
        (["t.yaml", "--account", "12"], "not an account number"),
        (["t.yaml", "--parameter", "x"], "NAME=VALUE"),
        (["--endpoint-url", "http://u:secret@h"], "without a user name"),
        (["--endpoint-url", "ftp://h"], "not a URL"),
        (["--region", "EU"], "not a Region"),
        (["--overlap", "-1"], "not a number of seconds"),
        (["none.yaml"], "cannot be read"),
    ],
)
def test_mistakes_of_the_command_line(verb, arguments, said):
    """Exit code 2, and a secret is not repeated."""
    code, out, err = verb(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "secret" not in err
