"""Rules of mapping documents: checks and their texts, normal form, updates, functions, answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.core.model import FunctionSpec, PositionKind, QueuePolicy, SourceKind
from poller.mappings import (
    FIELDS,
    MOST_BUFFER_RECORDS,
    UnsupportedSource,
    Uses,
    build,
    check_create,
    check_update,
    derived_uuid,
    describe,
    merge_update,
    normalize,
    parse_source,
    resolve_function,
    source_of,
)
from poller.settings import HttpFunction, LambdaFunction

NOW = 1_780_000_000.0
KINESIS = "arn:aws:kinesis:eu-west-1:123456789012:stream/orders"
TABLE = "arn:aws:dynamodb:eu-west-1:123456789012:table/orders"
DYNAMODB = f"{TABLE}/stream/2026-01-01T00:00:00.000"
SQS = "arn:aws:sqs:eu-west-1:123456789012:orders"
FIFO = SQS + ".fifo"
ROLE = "arn:aws:iam::123456789012:role/reader"
FUNCTION_ARN = "arn:aws:lambda:eu-west-1:123456789012:function:f"
UUID = "6d9bce8e-836b-442c-8070-74e77903c815"
INVALID, VALIDATION = "InvalidParameterValueException", "ValidationException"
UNSUPPORTED = "Unsupported {} parameter for given event source mapping type."
BOUNDS = "MinimumPollers should be between [2, 200] and MaximumPollers should be between [MinimumPollers, 10000]"
WINDOW_NEEDED = "Maximum batch window in seconds must be greater than 0 if maximum batch size is greater than 10"


def stream(**fields):
    return {"EventSourceArn": KINESIS, "FunctionName": "f", "StartingPosition": "TRIM_HORIZON", **fields}


def queue(**fields):
    return {"EventSourceArn": SQS, "FunctionName": "f", **fields}


def problems(document, **options):
    return check_create(document, now=NOW, **options)


def only(document, **options):
    found = problems(document, **options)
    assert len(found) == 1, found
    return found[0]


def constraint(value, path, rest):
    return f"1 validation error detected: Value {value} at '{path}' failed to satisfy constraint: {rest}"


@pytest.mark.parametrize(
    "document",
    [
        stream(),
        stream(EventSourceArn=DYNAMODB),
        stream(StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp=NOW),
        stream(StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp="2026-01-01T00:00:00Z"),
        stream(BatchSize=10_000, ParallelizationFactor=10, MaximumBatchingWindowInSeconds=300),
        stream(BatchSize=101),
        stream(MaximumRetryAttempts=0, MaximumRecordAgeInSeconds=60),
        stream(MaximumRetryAttempts=-1, MaximumRecordAgeInSeconds=-1, TumblingWindowInSeconds=0),
        stream(BisectBatchOnFunctionError=False, DestinationConfig={"OnFailure": {}}, FilterCriteria={"Filters": []}),
        stream(DestinationConfig={"OnFailure": {"Destination": ""}, "OnSuccess": {}}, KMSKeyArn="", Options={}),
        stream(FunctionResponseTypes=["ReportBatchItemFailures"], MetricsConfig={"Metrics": ["EventCount"]}),
        stream(Tags={"team": "orders"}, Enabled=False, BatchSize=None, FilterCriteria=None, DestinationConfig=None),
        queue(),
        queue(BatchSize=100, MaximumBatchingWindowInSeconds=1),
        queue(ScalingConfig={"MaximumConcurrency": 1}, ProvisionedPollerConfig=None),
        queue(ProvisionedPollerConfig={"MinimumPollers": 200}, ScalingConfig={}),
        queue(ProvisionedPollerConfig={"MinimumPollers": 2, "MaximumPollers": 2}),
        queue(ProvisionedPollerConfig={"MaximumPollers": 10_000, "MinimumPollers": None}),
        queue(Options={"CircuitBreaker": False, "ScaleUpPerMinute": 1, "MaximumReceivers": 10_000}),
        stream(Options={"IncludePayload": False, "CircuitBreaker": None}),
        queue(EventSourceArn=FIFO, BatchSize=10, MaximumBatchingWindowInSeconds=0),
    ],
)
def test_legal_documents_have_no_problem(document):
    """What AWS and interface.md allow is allowed, nulls count as absent."""
    assert problems(document) == []


@pytest.mark.parametrize(
    ("document", "path", "code", "message"),
    [
        ({"FunctionName": "f"}, "EventSourceArn", INVALID, "Unrecognized event source."),
        (queue(EventSourceArn="arn:aws:s3:::b"), "EventSourceArn", INVALID, "Unrecognized event source."),
        (queue(EventSourceArn="nonsense"), "EventSourceArn", INVALID, "Unrecognized event source."),
        (
            {"EventSourceArn": SQS},
            "FunctionName",
            VALIDATION,
            constraint("null", "functionName", "Member must not be null"),
        ),
        (
            stream(StartingPosition=None),
            "StartingPosition",
            INVALID,
            constraint("null", "startingPosition", "Member must not be null."),
        ),
        (
            stream(StartingPosition="invalid"),
            "StartingPosition",
            VALIDATION,
            constraint(
                "'invalid'",
                "startingPosition",
                "Member must satisfy enum value set: [LATEST, AT_TIMESTAMP, TRIM_HORIZON]",
            ),
        ),
        (
            stream(EventSourceArn=DYNAMODB, StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp=1),
            "StartingPosition",
            INVALID,
            f"Unsupported starting position for arn type: {DYNAMODB}",
        ),
        (
            stream(StartingPosition="AT_TIMESTAMP"),
            "StartingPositionTimestamp",
            INVALID,
            "Need to specify a timestamp",
        ),
        (
            stream(StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp=NOW + 1),
            "StartingPositionTimestamp",
            INVALID,
            "StartingPositionTimestamp must not be in the future",
        ),
        (
            stream(StartingPositionTimestamp=1),
            "StartingPositionTimestamp",
            INVALID,
            "StartingPositionTimestamp needs StartingPosition AT_TIMESTAMP",
        ),
        (
            queue(StartingPosition="LATEST"),
            "StartingPosition",
            INVALID,
            "StartingPosition is not valid for SQS event sources.",
        ),
        *(
            (queue(**{name: value}), name, INVALID, UNSUPPORTED.format(name))
            for name, value in {
                "MaximumRetryAttempts": 1,
                "MaximumRecordAgeInSeconds": 60,
                "BisectBatchOnFunctionError": True,
                "ParallelizationFactor": 1,
                "TumblingWindowInSeconds": 0,
                "DestinationConfig": {"OnFailure": {"Destination": SQS}},
            }.items()
        ),
        (
            stream(ScalingConfig={"MaximumConcurrency": 2}),
            "ScalingConfig",
            INVALID,
            UNSUPPORTED.format("ScalingConfig"),
        ),
        (
            stream(DestinationConfig={"OnSuccess": {"Destination": SQS}}),
            "DestinationConfig.OnSuccess",
            INVALID,
            UNSUPPORTED.format("DestinationConfig"),
        ),
        (queue(BatchSize=11), "BatchSize", INVALID, WINDOW_NEEDED),
        (
            queue(EventSourceArn=FIFO, MaximumBatchingWindowInSeconds=1),
            "MaximumBatchingWindowInSeconds",
            INVALID,
            "Batching window is not supported for FIFO queues",
        ),
        (
            queue(EventSourceArn=FIFO, BatchSize=11),
            "BatchSize",
            INVALID,
            "Batch size must not exceed 10 for FIFO queues",
        ),
        (
            queue(ProvisionedPollerConfig={}),
            "ProvisionedPollerConfig",
            INVALID,
            "Either MinimumPollers or MaximumPollers are required if ProvisionedPollerConfig is provided.",
        ),
        *(
            (queue(ProvisionedPollerConfig=bounds), "ProvisionedPollerConfig", INVALID, BOUNDS)
            for bounds in (
                {"MinimumPollers": 1},
                {"MaximumPollers": 1},
                {"MinimumPollers": 20, "MaximumPollers": 10},
                {"MinimumPollers": 1, "MaximumPollers": 10},
            )
        ),
        (
            stream(ProvisionedPollerConfig={}),
            "ProvisionedPollerConfig",
            INVALID,
            UNSUPPORTED.format("ProvisionedPollerConfig"),
        ),
        *(
            (stream(Options={name: value}), f"Options.{name}", INVALID, f"Options.{name} is only for SQS queues.")
            for name, value in {"CircuitBreaker": True, "ScaleUpPerMinute": 5, "MaximumReceivers": 5}.items()
        ),
        (
            queue(MetricsConfig={"Metrics": ["KafkaMetrics"]}),
            "MetricsConfig.Metrics",
            INVALID,
            "Only EventCount metrics are supported for event source mappings.",
        ),
        (
            stream(MaximumRecordAgeInSeconds=59),
            "MaximumRecordAgeInSeconds",
            INVALID,
            "MaximumRecordAgeInSeconds must be -1 or from 60 to 604800",
        ),
        (
            stream(FunctionName="arn:aws:lambda:us-east-1:123456789012:function:f"),
            "FunctionName",
            INVALID,
            "The function and the event source must be in the same Region.",
        ),
        (
            stream(DestinationConfig={"OnFailure": {"Destination": FIFO}}),
            "DestinationConfig.OnFailure.Destination",
            INVALID,
            "The destination must not be a FIFO queue or FIFO topic.",
        ),
        (
            stream(DestinationConfig={"OnFailure": {"Destination": "kafka://topic"}}),
            "DestinationConfig.OnFailure.Destination",
            INVALID,
            "The destination must be an SQS queue, SNS topic, S3 bucket or event bus ARN, or a URL.",
        ),
        (stream(Topics=["t"]), "Topics", INVALID, "Topics is for another kind of event source."),
    ],
)
def test_a_broken_rule_has_awss_code_and_text(document, path, code, message):
    """semantics.md 1.3 and 1.4: the code and the message, word for word."""
    problem = only(document)
    assert (problem.path, problem.code, problem.message) == (path, code, message)


@pytest.mark.parametrize(
    ("name", "value", "path", "rest"),
    [
        ("BatchSize", 0, "batchSize", "Member must have value greater than or equal to 1"),
        ("BatchSize", 10_001, "batchSize", "Member must have value less than or equal to 10000"),
        ("MaximumBatchingWindowInSeconds", 301, "maximumBatchingWindowInSeconds", "less than or equal to 300"),
        ("ParallelizationFactor", 11, "parallelizationFactor", "less than or equal to 10"),
        ("MaximumRetryAttempts", -2, "maximumRetryAttempts", "greater than or equal to -1"),
        ("MaximumRecordAgeInSeconds", 604_801, "maximumRecordAgeInSeconds", "less than or equal to 604800"),
        ("TumblingWindowInSeconds", 901, "tumblingWindowInSeconds", "less than or equal to 900"),
    ],
)
def test_a_number_out_of_range_is_a_validation_exception(name, value, path, rest):
    """interface.md, Fine print, API: value, camelCase path and bound."""
    problem = only(stream(**{name: value}))
    assert problem.code == VALIDATION
    assert problem.message.startswith(constraint(f"'{value}'", path, "Member must have value"))
    assert problem.message.endswith(rest)
    assert problem.hint.startswith("give a whole number from ")
    assert problem.said in {"is too small", "is too large"}


def test_nested_paths_are_camel_case_in_the_message():
    """The message's path is AWS's, the problem's is the document's."""
    problem = only(queue(ScalingConfig={"MaximumConcurrency": 1001}))
    assert problem.path == "ScalingConfig.MaximumConcurrency"
    assert "Value '1001' at 'scalingConfig.maximumConcurrency' failed" in problem.message
    problem = only(queue(ProvisionedPollerConfig={"MinimumPollers": 201}))
    assert problem.message.startswith(
        constraint("'201'", "provisionedPollerConfig.minimumPollers", "Member must have value less than")
    )
    problem = only(stream(FilterCriteria={"Filters": [{"Pattern": '{"a":[1]}'}, {"Pattern": "x" * 4097}]}))
    assert problem.path == "FilterCriteria.Filters[1].Pattern"
    assert "at 'filterCriteria.filters.2.member.pattern'" in problem.message
    assert problem.message.endswith("Member must have length less than or equal to 4096")
    problem = only(stream(FunctionResponseTypes=["Other"]))
    assert problem.path == "FunctionResponseTypes[0]"
    assert problem.message == constraint(
        "'[Other]'",
        "functionResponseTypes",
        "Member must satisfy constraint: [Member must satisfy enum value set: [ReportBatchItemFailures]]",
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("BatchSize", True),
        ("BatchSize", "10"),
        ("BatchSize", 10.0),
        ("Enabled", "true"),
        ("Enabled", 1),
        ("FunctionName", 7),
        ("EventSourceArn", ["x"]),
        ("FilterCriteria", "x"),
        ("FilterCriteria", {"Filters": {}}),
        ("FunctionResponseTypes", "ReportBatchItemFailures"),
        ("Tags", {"a": 1}),
        ("StartingPosition", 1),
        ("StartingPositionTimestamp", True),
        ("StartingPositionTimestamp", "yesterday"),
        ("StartingPositionTimestamp", float("nan")),
        ("StartingPositionTimestamp", -1),
    ],
)
def test_a_wrong_type_is_one_problem_that_names_the_field(field, value):
    """A boolean is no number, text is no boolean; the other rules stay quiet about a field of the wrong type."""
    document = stream(StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp=1) | {field: value}
    problem = only(document)
    assert problem.path.startswith(field)
    assert problem.code == VALIDATION


def test_a_broken_window_is_not_taken_for_a_missing_one():
    """One mistake is reported once: no rule speaks about a default in the place of a broken value."""
    assert only(queue(BatchSize=100, MaximumBatchingWindowInSeconds=301)).path == "MaximumBatchingWindowInSeconds"


@pytest.mark.parametrize("key", ["batch_size", "batchSize", "Batchsize", "BatchSze", "BATCH-SIZE"])
def test_an_unknown_key_names_the_nearest_one(key):
    """A typo and a wrong case get the right spelling named."""
    problem = only(stream(**{key: 5}))
    assert problem.hint == 'did you mean "BatchSize"?'
    assert "BatchSize" in problem.message


def test_an_unknown_key_like_no_other_lists_the_known_ones():
    """Where nothing is near, all keys are named."""
    assert "EventSourceArn, FunctionName" in only(stream(zzz=1)).hint
    assert 'did you mean "MaximumConcurrency"?' in only(queue(ScalingConfig={"maxConcurrency": 2})).hint


@pytest.mark.parametrize("document", [stream(Options={"AssumeRoleArn": ROLE}), queue(Options={"AssumeRoleArn": ROLE})])
def test_a_role_belongs_to_the_source(document):
    """It is what the source is read with; without one that is our own credentials."""
    assert problems(document) == []
    normal = normalize(document)
    spec, _ = resolve_function("f", {}, source_of(normal))
    assert build("u", normal, spec, None).source.role == source_of(normal).role == ROLE
    assert source_of(normalize({**document, "Options": {}})).role is None


@pytest.mark.parametrize(
    "role", ["role/reader-of-orders", "arn:aws:iam::123456789012:user/x", "arn:aws:iam::1:role/reader", ROLE + " "]
)
def test_what_is_no_role_is_refused(role):
    """The form is checked where it is written, not by STS days later."""
    problem = only(stream(Options={"AssumeRoleArn": role}))
    assert problem.path == "Options.AssumeRoleArn"
    assert "the ARN of a role" in problem.hint


def test_every_option_that_does_not_fit_is_named():
    """All at once, of those that are for queues only."""
    found = problems(stream(Options={"ScaleUpPerMinute": 5, "CircuitBreaker": True}))
    assert [problem.path for problem in found] == ["Options.ScaleUpPerMinute", "Options.CircuitBreaker"]


def test_bisect_is_refused_with_the_way_out():
    """interface.md: the refusal names ReportBatchItemFailures."""
    problem = only(stream(BisectBatchOnFunctionError=True))
    assert problem.path == "BisectBatchOnFunctionError"
    assert "ReportBatchItemFailures" in problem.message


def test_kms_key_is_refused():
    """interface.md: KMSKeyArn is refused."""
    assert only(queue(KMSKeyArn="arn:aws:kms:eu-west-1:123456789012:key/k")).path == "KMSKeyArn"


def test_tumbling_windows_exclude_lanes_and_filters():
    """semantics.md 1.3, both rules at once."""
    criteria = {"Filters": [{"Pattern": '{"data":{"a":[1]}}'}]}
    found = problems(stream(TumblingWindowInSeconds=5, ParallelizationFactor=2, FilterCriteria=criteria))
    assert [problem.message for problem in found] == [
        "TumblingWindowInSeconds cannot be used with a ParallelizationFactor above 1",
        "TumblingWindowInSeconds cannot be used with FilterCriteria",
    ]


def filtered(document, *patterns):
    return {**document, "FilterCriteria": {"Filters": [{"Pattern": pattern} for pattern in patterns]}}


@pytest.mark.parametrize(
    "pattern", [None, "simple string", "[", '{"eventSource": "aws:sqs"}', '{"eventSource": []}', "{}", '{"a": {}}']
)
def test_a_bad_filter_pattern_is_refused_with_aws_text(pattern):
    """semantics.md 1.4, the recorded cases and empty objects; create and update."""
    problem = only(filtered(queue(), pattern))
    assert (problem.path, problem.code) == ("FilterCriteria.Filters[0].Pattern", INVALID)
    assert problem.message == "Invalid filter pattern definition."
    (problem,) = check_update(normalize(queue()), filtered({}, pattern))
    assert problem.message == "Invalid filter pattern definition."


def test_every_bad_pattern_is_named_with_its_place_and_the_reason():
    """For people: which filter, where in its pattern, what is wrong, what would be right; all filters at once."""
    good, unknown, broken = '{"body": {"a": [1]}}', '{"body": {"a": [1, {"Prefix": "x"}]}}', '{"body": [1}'
    found = problems(filtered(queue(), good, unknown, broken, '{"x": [1], "x": [2]}'))
    assert [(problem.path[-10:], problem.said, problem.hint) for problem in found] == [
        ("1].Pattern", 'is not a filter pattern: at body.a[1]: "Prefix" is no operator here', 'did you mean "prefix"?'),
        (
            "2].Pattern",
            "is not a filter pattern: at character 12: the pattern is not JSON: Expecting ',' delimiter",
            "",
        ),
        (
            "3].Pattern",
            "is not a filter pattern: at x: the key stands twice in one object, and only the last would count",
            "merge the two",
        ),
    ]


def test_a_pattern_is_checked_for_its_source():
    """semantics.md 9.4: text patterns for `data` and `dynamodb` are an error; for `body` they are not."""
    assert "always matched as JSON" in only(filtered(stream(), '{"data": ["text"]}')).said
    assert "always matched as JSON" in only(filtered(stream(EventSourceArn=DYNAMODB), '{"dynamodb": ["x"]}')).said
    assert not problems(filtered(queue(), '{"body": ["text"]}'))


def test_filters_are_echoed_and_run():
    """Up to ten, in their order; the API shows them as they were given, cleared ones not at all."""
    patterns = [f'{{"body":\n[{number}]}}' for number in range(10)]
    document = normalize(filtered(queue(), *patterns))
    assert document["FilterCriteria"] == {"Filters": [{"Pattern": pattern} for pattern in patterns]}
    assert build(UUID, document, FunctionSpec("f", FUNCTION_ARN, "r"), None).filters == tuple(patterns)
    assert (
        describe(document, UUID, FUNCTION_ARN, "Enabled", "", 0.0, None)["FilterCriteria"] == document["FilterCriteria"]
    )
    assert build(UUID, normalize(queue()), FunctionSpec("f", FUNCTION_ARN, "r"), None).filters == ()
    assert only(filtered(queue(), *patterns, "{}")).message.endswith("Member must have length less than or equal to 10")
    assert "FilterCriteria" not in merge_update(document, {"FilterCriteria": {"Filters": []}})


def test_provisioned_mode_excludes_maximum_concurrency():
    """semantics.md 1.4, word for word; an update may change from one to the other."""
    pollers, scaling = {"MaximumPollers": 5}, {"MaximumConcurrency": 5}
    message = (
        "Provisioned mode for SQS ESM does not support maximum concurrency feature. "
        "Use MaximumPollers as the control mechanism and remove maximum concurrency."
    )
    assert only(queue(ProvisionedPollerConfig=pollers, ScalingConfig=scaling)).message == message
    current = normalize(queue(ScalingConfig=scaling))
    (problem,) = check_update(current, {"ProvisionedPollerConfig": pollers})
    assert problem.message == message
    assert check_update(current, {"ProvisionedPollerConfig": pollers, "ScalingConfig": {}}) == []
    current = normalize(queue(ProvisionedPollerConfig=pollers))
    assert check_update(current, {"ProvisionedPollerConfig": {}, "ScalingConfig": scaling}) == []


def test_an_update_of_one_bound_keeps_the_other():
    """As AWS: what is not given keeps its value, and the rule holds on both."""
    current = normalize(queue(ProvisionedPollerConfig={"MinimumPollers": 5, "MaximumPollers": 50}))
    merged = merge_update(current, {"ProvisionedPollerConfig": {"MaximumPollers": 70, "MinimumPollers": None}})
    assert merged["ProvisionedPollerConfig"] == {"MinimumPollers": 5, "MaximumPollers": 70}
    (problem,) = check_update(current, {"ProvisionedPollerConfig": {"MaximumPollers": 4}})
    assert problem.message == BOUNDS
    assert check_update(current, {"ProvisionedPollerConfig": {"MinimumPollers": 50}}) == []
    (problem,) = check_update(current, {"ProvisionedPollerConfig": {"MinimumPollers": 51}})
    assert problem.message == BOUNDS


def test_more_than_fifty_tags_are_refused():
    """semantics.md 1.2: at most 50 tags."""
    assert problems(queue(Tags={f"k{n}": "" for n in range(50)})) == []
    assert only(queue(Tags={f"k{n}": "" for n in range(51)})).path == "Tags"


def test_a_bare_function_name_has_at_most_64_characters():
    """semantics.md 1.2; in a partial ARN it may be longer."""
    assert problems(queue(FunctionName="f" * 64)) == []
    assert only(queue(FunctionName="f" * 65)).path == "FunctionName"
    assert only(queue(FunctionName="a b")).message.startswith("1 validation error detected: Value 'a b'")


def test_a_table_arn_says_that_the_stream_is_needed():
    """The usual mistake with DynamoDB has its own sentence, and the other rules are still checked."""
    found = problems(stream(EventSourceArn=TABLE, BisectBatchOnFunctionError=True))
    assert [problem.path for problem in found] == ["EventSourceArn", "BisectBatchOnFunctionError"]
    assert "give the ARN of its stream" in found[0].message


def test_shape_comes_before_source_and_source_before_the_rest():
    """interface.md, API: the order of checks."""
    found = problems({"EventSourceArn": "x", "BatchSize": 0})
    assert [problem.path for problem in found] == ["BatchSize", "FunctionName", "EventSourceArn"]


def test_uuid_is_only_for_a_config_file():
    """A UUID in a create request is an unknown key, in a file it must be one."""
    assert problems(queue(UUID=UUID), declared=True) == []
    assert only(queue(UUID=UUID)).path == "UUID"
    assert only(queue(UUID="x"), declared=True).hint.startswith("give a UUID")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(
    st.sampled_from([field.name for field in FIELDS]) | st.text(max_size=5),
    json_values | st.sampled_from([KINESIS, DYNAMODB, SQS, FIFO, TABLE, "f", "AT_TIMESTAMP", "LATEST", 1, True]),
    max_size=8,
)


@given(documents, st.sampled_from([KINESIS, DYNAMODB, SQS, FIFO, None]))
def test_checks_never_fail_and_what_passes_can_be_run(document, arn):
    """Whatever the document is, the checks answer; a document without problems normalizes, builds and shows."""
    document = {**document, **({"EventSourceArn": arn, "FunctionName": "f"} if arn else {})}
    if problems(document):
        return
    normal = normalize(document)
    assert normalize(normal) == normal
    assert problems(normal) == []
    build(UUID, normal, FunctionSpec("f", FUNCTION_ARN, "r"), None)
    json.dumps(describe(normal, UUID, FUNCTION_ARN, "Enabled", "User action", NOW, None))


@given(documents)
def test_update_checks_never_fail_and_what_passes_is_a_legal_document(changes):
    """An accepted update leads to a document that create would accept."""
    for current in (normalize(stream()), normalize(queue())):
        if not check_update(current, changes):
            assert problems(merge_update(current, changes)) == []


def test_normal_form_of_a_stream():
    """All stream fields with AWS's defaults, nulls out, the UUID out."""
    assert normalize(stream(UUID=UUID, BatchSize=None)) == {
        "EventSourceArn": KINESIS,
        "FunctionName": "f",
        "Enabled": True,
        "BatchSize": 100,
        "MaximumBatchingWindowInSeconds": 0,
        "StartingPosition": "TRIM_HORIZON",
        "ParallelizationFactor": 1,
        "MaximumRecordAgeInSeconds": -1,
        "MaximumRetryAttempts": -1,
        "BisectBatchOnFunctionError": False,
        "FunctionResponseTypes": [],
        "DestinationConfig": {"OnFailure": {}},
        "TumblingWindowInSeconds": 0,
    }


def test_normal_form_of_a_queue():
    """No stream fields; empty options are dropped."""
    empty = {"FilterCriteria": {"Filters": []}, "ScalingConfig": {}, "MetricsConfig": {"Metrics": []}, "Tags": {}}
    assert normalize(queue(**empty, KMSKeyArn="", Options={"CircuitBreaker": None}, ProvisionedPollerConfig={})) == {
        "EventSourceArn": SQS,
        "FunctionName": "f",
        "Enabled": True,
        "BatchSize": 10,
        "MaximumBatchingWindowInSeconds": 0,
        "FunctionResponseTypes": [],
    }


def test_defaults_are_not_shared_between_documents():
    """Changing one normal form does not change the next."""
    normalize(stream())["DestinationConfig"]["OnFailure"]["Destination"] = "x"
    assert normalize(stream())["DestinationConfig"] == {"OnFailure": {}}


@pytest.mark.parametrize(
    ("given_value", "seconds"),
    [
        (1_767_225_600, 1_767_225_600.0),
        (1_767_225_600.25, 1_767_225_600.25),
        ("2026-01-01T00:00:00Z", 1_767_225_600.0),
        ("2026-01-01 00:00:00", 1_767_225_600.0),
        ("2026-01-01T01:00:00+01:00", 1_767_225_600.0),
        ("2026-01-01", 1_767_225_600.0),
        ("1767225600", 1_767_225_600.0),
    ],
)
def test_timestamps_become_epoch_seconds(given_value, seconds):
    """Numbers and ISO 8601 mean the same moment; without a zone it is UTC."""
    document = normalize(stream(StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp=given_value))
    assert document["StartingPositionTimestamp"] == seconds
    mapping = build(UUID, document, FunctionSpec("f", FUNCTION_ARN, "r"), None)
    assert (mapping.start.kind, float(mapping.start.value)) == (PositionKind.AT_TIMESTAMP, seconds)


def test_absent_and_null_fields_of_an_update_keep_their_value():
    """semantics.md 1.7."""
    current = normalize(stream(BatchSize=7, MaximumRetryAttempts=3))
    assert merge_update(current, {"BatchSize": None, "Enabled": False}) == {**current, "Enabled": False}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"FilterCriteria": {}}, "FilterCriteria"),
        ({"FilterCriteria": {"Filters": []}}, "FilterCriteria"),
        ({"ScalingConfig": {}}, "ScalingConfig"),
        ({"ProvisionedPollerConfig": {}}, "ProvisionedPollerConfig"),
        ({"ProvisionedPollerConfig": {"MinimumPollers": None}}, "ProvisionedPollerConfig"),
        ({"Options": {}}, "Options"),
        ({"MetricsConfig": {"Metrics": []}}, "MetricsConfig"),
    ],
)
def test_clearing_idioms_take_a_field_out(changes, field):
    """semantics.md 1.7 and interface.md: empty objects clear."""
    values = {"FilterCriteria": {"Filters": [{"Pattern": "{}"}]}, "MetricsConfig": {"Metrics": ["EventCount"]}}
    current = {**normalize(queue(ScalingConfig={"MaximumConcurrency": 5})), **values}
    current |= {
        "ProvisionedPollerConfig": {"MinimumPollers": 2, "MaximumPollers": 9},
        "Options": {"MaximumReceivers": 9},
    }
    assert merge_update(current, changes) == {name: value for name, value in current.items() if name != field}


@pytest.mark.parametrize("cleared", [{}, {"OnFailure": {}}, {"OnFailure": {"Destination": ""}}, {"OnFailure": None}])
def test_a_destination_is_cleared_to_the_empty_one(cleared):
    """semantics.md 1.7: AWS answers DestinationConfig {"OnFailure": {}} then."""
    current = {**normalize(stream()), "DestinationConfig": {"OnFailure": {"Destination": SQS}}}
    assert merge_update(current, {"DestinationConfig": cleared})["DestinationConfig"] == {"OnFailure": {}}


def test_an_update_is_checked_with_what_the_mapping_has():
    """Rules between fields hold on the whole document; a window alone may make it illegal."""
    current = normalize(queue(BatchSize=100, MaximumBatchingWindowInSeconds=5))
    assert check_update(current, {"MaximumBatchingWindowInSeconds": 0})[0].message == WINDOW_NEEDED
    assert check_update(current, {"BatchSize": 10, "MaximumBatchingWindowInSeconds": 0}) == []
    assert check_update(current, {"ParallelizationFactor": 2})[0].message == UNSUPPORTED.format("ParallelizationFactor")
    assert check_update(current, {"BatchSize": 0})[0].code == VALIDATION


@pytest.mark.parametrize("field", [field.name for field in FIELDS if field.uses is Uses.CREATE])
def test_an_update_cannot_change_what_only_create_sets(field):
    """semantics.md 1.7: source, start and tags are fixed."""
    (problem,) = check_update(normalize(stream()), {field: "x"})
    assert problem.path == field
    assert "cannot be changed by an update" in problem.message


def test_an_update_of_an_old_timestamp_mapping_passes():
    """A mapping with AT_TIMESTAMP can be updated."""
    current = normalize(stream(StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp=5))
    assert check_update(current, {"BatchSize": 5}) == []


@pytest.mark.parametrize(
    ("arn", "kind", "name", "fifo"),
    [
        (KINESIS, SourceKind.KINESIS, "orders", False),
        (DYNAMODB, SourceKind.DYNAMODB, "orders", False),
        (SQS, SourceKind.SQS, "orders", False),
        (FIFO, SourceKind.SQS, "orders.fifo", True),
    ],
)
def test_sources_are_taken_apart(arn, kind, name, fifo):
    """Kind, Region, account and name of each source."""
    source = parse_source(arn)
    assert (source.kind, source.arn, source.name, source.fifo) == (kind, arn, name, fifo)
    assert (source.region, source.account) == ("eu-west-1", "123456789012")


def test_arns_of_other_partitions_and_emulators_are_sources():
    """Not only arn:aws and real Regions."""
    assert parse_source("arn:aws-cn:kinesis:cn-north-1:123456789012:stream/s").region == "cn-north-1"
    assert (
        parse_source("arn:aws:dynamodb:ddblocal:000000000000:table/t/stream/2026-01-01T00:00:00.0").region == "ddblocal"
    )


def test_a_consumer_is_a_source_of_its_stream():
    """Enhanced fan-out: the name is the stream's, the ARN the consumer's; a stream's own ARN means polling."""
    source = parse_source(f"{KINESIS}/consumer/my-app_1.x:1545084650")
    assert (source.kind, source.name, source.fan_out) == (SourceKind.KINESIS, "orders", True)
    assert source.arn == f"{KINESIS}/consumer/my-app_1.x:1545084650"
    assert not any(parse_source(arn).fan_out for arn in (KINESIS, DYNAMODB, SQS))
    assert not problems(stream(EventSourceArn=source.arn, StartingPosition="AT_TIMESTAMP", StartingPositionTimestamp=1))


@pytest.mark.parametrize("rest", ["", "/", "/c", "/c:", "/c:x", "/c:1/2"])
def test_half_a_consumer_is_refused_with_where_to_find_the_whole(rest):
    """The creation time is part of the ARN; a stream of that name is not meant either."""
    problem = only(stream(EventSourceArn=f"{KINESIS}/consumer{rest}"))
    assert problem.path == "EventSourceArn"
    assert problem.said == "is not the whole ARN of a consumer"
    assert "DescribeStreamConsumer" in problem.hint


@pytest.mark.parametrize(
    "arn",
    [
        "",
        "arn:aws:kinesis:eu-west-1:123456789012:stream/",
        "arn:aws:kinesis:eu-west-1:12345:stream/s",
        "arn:aws:kinesis:eu-west-1:123456789012:stream/s\n",
        "arn:aws:sqs:eu-west-1:123456789012:a/b",
        "arn:aws:sqs:eu-west-1:123456789012:a.b",
        "arn:aws:kafka:eu-west-1:123456789012:cluster/c",
        "https://sqs.eu-west-1.amazonaws.com/123456789012/q",
    ],
)
def test_what_is_no_source_is_refused_with_examples(arn):
    """The error says what a right ARN looks like."""
    with pytest.raises(ValueError, match="arn:aws:kinesis:eu-west-1:123456789012:stream/NAME") as caught:
        parse_source(arn)
    assert not isinstance(caught.value, UnsupportedSource)


HTTP = HttpFunction("f", "http://127.0.0.1/")
CONFIGURED = {
    "f": HTTP,
    "billing": LambdaFunction("billing", "arn:aws:lambda:eu-west-1:210987654321:function:real:live"),
}


@pytest.mark.parametrize(
    ("name", "arn"),
    [
        ("f", FUNCTION_ARN),
        (FUNCTION_ARN, FUNCTION_ARN),
        ("123456789012:function:f", FUNCTION_ARN),
        ("f:$LATEST", FUNCTION_ARN + ":$LATEST"),
        ("123456789012:function:f:$LATEST", FUNCTION_ARN + ":$LATEST"),
        (FUNCTION_ARN + ":live", FUNCTION_ARN + ":live"),
        ("f:7", FUNCTION_ARN + ":7"),
    ],
)
def test_a_configured_function_is_found_by_every_form_of_its_name(name, arn):
    """interface.md, Functions: name, partial or full ARN; semantics.md 1.5: the qualifier is echoed as given."""
    spec, settings = resolve_function(name, CONFIGURED, parse_source(SQS))
    assert settings is HTTP
    assert (spec.name, spec.arn, spec.role) == ("f", arn, "arn:aws:iam::123456789012:role/f")


@pytest.mark.parametrize(
    "name", ["other", "other:live", "arn:aws:lambda:eu-west-1:999999999999:function:f", "999999999999:function:f"]
)
def test_every_other_name_is_a_real_lambda_function(name):
    """Unknown names, and the name of a configured function in another account; invoked as given."""
    spec, settings = resolve_function(name, CONFIGURED, parse_source(SQS))
    assert settings == LambdaFunction(spec.name, name, is_configured=False)


def test_the_account_of_an_arn_is_kept():
    """A full or partial ARN's own account and Region are echoed, not the source's."""
    spec, _ = resolve_function("999999999999:function:x", {}, parse_source(SQS))
    assert spec.arn == "arn:aws:lambda:eu-west-1:999999999999:function:x"
    assert spec.role == "arn:aws:iam::999999999999:role/x"
    spec, _ = resolve_function("x", {}, parse_source("arn:aws-cn:sqs:cn-north-1:123456789012:q"))
    assert spec.arn == "arn:aws-cn:lambda:cn-north-1:123456789012:function:x"


def test_a_qualifier_selects_the_version_of_a_configured_lambda():
    """FunctionName billing:prod invokes prod of the function that billing means, in place of its own qualifier."""
    _, settings = resolve_function("billing:prod", CONFIGURED, parse_source(SQS))
    assert settings == LambdaFunction("billing", "arn:aws:lambda:eu-west-1:210987654321:function:real:prod")
    assert resolve_function("billing", CONFIGURED, parse_source(SQS))[1] is CONFIGURED["billing"]


def test_a_malformed_function_name_is_a_value_error():
    """resolve_function says so rather than guess."""
    with pytest.raises(ValueError, match="function name"):
        resolve_function("a b", {}, parse_source(SQS))


def test_derived_uuids_are_stable():
    """The same for ever for the same pair: positions are kept under it. Never change this literal."""
    assert derived_uuid(SQS, FUNCTION_ARN) == derived_uuid(SQS, FUNCTION_ARN)
    assert derived_uuid(SQS, FUNCTION_ARN) != derived_uuid(SQS, FUNCTION_ARN + ":live")
    assert derived_uuid(SQS, FUNCTION_ARN) == "0480d2a3-13b8-580c-a4f9-f5d369820ba9"


def test_build_takes_every_field():
    """Documents have AWS's names, the core has its own: one place between."""
    document = normalize(
        stream(
            BatchSize=500,
            MaximumBatchingWindowInSeconds=5,
            ParallelizationFactor=4,
            MaximumRetryAttempts=3,
            MaximumRecordAgeInSeconds=120,
            FunctionResponseTypes=["ReportBatchItemFailures"],
            Enabled=False,
            StartingPosition="LATEST",
        )
    )
    spec = FunctionSpec("f", FUNCTION_ARN, "role")
    mapping = build(UUID, document, spec, "poller.yaml")
    assert (mapping.id, mapping.function, mapping.declared_in, mapping.enabled) == (UUID, spec, "poller.yaml", False)
    assert (mapping.batch.size, mapping.batch.window, mapping.batch.factor) == (500, 5.0, 4)
    assert mapping.batch.buffer_records == 4000
    assert (mapping.retry.attempts, mapping.retry.max_age, mapping.retry.report_failures) == (3, 120.0, True)
    assert mapping.start.kind is PositionKind.LATEST
    assert mapping.queue == QueuePolicy()
    queued = build(UUID, normalize(queue(ScalingConfig={"MaximumConcurrency": 3})), spec, None)
    assert (queued.queue, queued.batch.size, queued.retry.attempts) == (QueuePolicy(ceiling=3, shared=3), 10, -1)


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({}, QueuePolicy(1250, 1, 300.0, True)),
        ({"ScalingConfig": {"MaximumConcurrency": 1}}, QueuePolicy(ceiling=1, shared=1)),
        ({"ProvisionedPollerConfig": {"MinimumPollers": 7}}, QueuePolicy(ceiling=200, floor=7, shared=200)),
        ({"ProvisionedPollerConfig": {"MaximumPollers": 2000}}, QueuePolicy(ceiling=2000, floor=2, shared=2000)),
        ({"Options": {"MaximumReceivers": 2000}}, QueuePolicy(ceiling=2000)),
        (
            {"ScalingConfig": {"MaximumConcurrency": 9}, "Options": {"MaximumReceivers": 4, "ScaleUpPerMinute": 60}},
            QueuePolicy(ceiling=4, growth=60.0, shared=9),
        ),
        (
            {"ProvisionedPollerConfig": {"MinimumPollers": 9}, "Options": {"MaximumReceivers": 4}},
            QueuePolicy(ceiling=4, floor=4, shared=200),
        ),
        ({"Options": {"CircuitBreaker": False}}, QueuePolicy(circuit_breaker=False)),
    ],
)
def test_a_queue_is_received_from_as_it_says(fields, policy):
    """The ceiling is the least bound that is given, the floor never above it; the rest has the documented defaults."""
    spec = FunctionSpec("f", FUNCTION_ARN, "role")
    assert build(UUID, normalize(queue(**fields)), spec, None).queue == policy


def test_the_buffer_is_bounded_and_some_lane_can_always_fill():
    """At least 2,000 records, and never fewer than BatchSize times ParallelizationFactor."""
    spec = FunctionSpec("f", FUNCTION_ARN, "role")
    assert build(UUID, normalize(stream()), spec, None).batch.buffer_records == 2000
    largest = build(UUID, normalize(stream(BatchSize=10_000, ParallelizationFactor=10)), spec, None).batch
    assert largest.buffer_records == MOST_BUFFER_RECORDS >= largest.size * largest.factor


def test_the_answer_for_a_stream_is_awss_key_for_key():
    """semantics.md 1.5, recorded right after Create with all defaults."""
    answer = describe(normalize(stream(Tags={"a": "b"})), UUID, FUNCTION_ARN, "Creating", "User action", 1.5, None)
    assert list(answer.items()) == [
        ("BatchSize", 100),
        ("BisectBatchOnFunctionError", False),
        ("DestinationConfig", {"OnFailure": {}}),
        ("EventSourceArn", KINESIS),
        ("EventSourceMappingArn", f"arn:aws:lambda:eu-west-1:123456789012:event-source-mapping:{UUID}"),
        ("FunctionArn", FUNCTION_ARN),
        ("FunctionResponseTypes", []),
        ("LastModified", 1.5),
        ("LastProcessingResult", "No records processed"),
        ("MaximumBatchingWindowInSeconds", 0),
        ("MaximumRecordAgeInSeconds", -1),
        ("MaximumRetryAttempts", -1),
        ("ParallelizationFactor", 1),
        ("StartingPosition", "TRIM_HORIZON"),
        ("State", "Creating"),
        ("StateTransitionReason", "User action"),
        ("TumblingWindowInSeconds", 0),
        ("UUID", UUID),
    ]


def test_the_answer_for_a_queue_is_awss_key_for_key():
    """semantics.md 1.5: no stream fields, never a LastProcessingResult; what is set is echoed."""
    answer = describe(normalize(queue()), UUID, FUNCTION_ARN, "Creating", "USER_INITIATED", 1.5, "OK")
    assert list(answer) == [
        "BatchSize",
        "EventSourceArn",
        "EventSourceMappingArn",
        "FunctionArn",
        "FunctionResponseTypes",
        "LastModified",
        "MaximumBatchingWindowInSeconds",
        "State",
        "StateTransitionReason",
        "UUID",
    ]
    extras = {"ScalingConfig": {"MaximumConcurrency": 2}, "MetricsConfig": {"Metrics": ["EventCount"]}}
    answer = describe(normalize(queue(**extras)), UUID, FUNCTION_ARN, "Enabled", "USER_INITIATED", 1.5, None)
    assert {name: answer[name] for name in extras} == extras
    pollers = {"ProvisionedPollerConfig": {"MinimumPollers": 5}, "Options": {"CircuitBreaker": False}}
    answer = describe(normalize(queue(**pollers)), UUID, FUNCTION_ARN, "Enabled", "USER_INITIATED", 1.5, None)
    assert answer["ProvisionedPollerConfig"] == {"MinimumPollers": 5, "MaximumPollers": 200}
    assert "Options" not in answer
    start = {"StartingPosition": "AT_TIMESTAMP", "StartingPositionTimestamp": 5}
    answer = describe(normalize(stream(**start)), UUID, FUNCTION_ARN, "Enabled", "User action", 1.5, "OK")
    assert (answer["StartingPositionTimestamp"], answer["LastProcessingResult"]) == (5.0, "OK")
