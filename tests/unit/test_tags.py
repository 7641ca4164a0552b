"""Tags of mappings: what is refused, where they are kept, and that the file's are the file's."""

import pytest

from poller.control import ControlPlane
from poller.errors import ApiError
from poller.mappings import MAX_TAGS, normalize
from poller.settings import Declared
from tests.unit.test_control import MAKE, STREAM, Probe, SlowStore, Supervisor, settings

PLACE = "arn:aws:lambda:eu-west-1:123456789012"
UNKNOWN = f"{PLACE}:event-source-mapping:6d9bce8e-836b-442c-8070-74e77903c815"
DECLARED = Declared(
    "6d9bce8e-0000-442c-8070-74e77903c815",
    normalize({"EventSourceArn": STREAM, "FunctionName": "f", "StartingPosition": "LATEST", "Tags": {"by": "file"}}),
    3,
)


@pytest.fixture
async def control() -> ControlPlane:
    made = ControlPlane(SlowStore(), Supervisor(), Probe())
    await made.load(settings(DECLARED))
    return made


async def refused(operation) -> tuple[str, int, str]:
    with pytest.raises(ApiError) as caught:
        await operation
    return caught.value.code, caught.value.status, caught.value.message


async def test_tags_come_with_create_and_change_one_by_one(control) -> None:
    """They are shown by ListTags only, survive updates and a restart, and restart nothing."""
    made = await control.create({**MAKE, "Tags": {"a": "1", "b": ""}})
    arn = made["EventSourceMappingArn"]
    assert "Tags" not in made
    assert control.tags(arn) == {"a": "1", "b": ""}
    before = control._supervisor.wanted[made["UUID"]]
    await control.tag(arn, {"b": "2", "c": "\u00e9 _.:/=+-@"})
    await control.untag(arn, ["a", "nothing"])
    assert control._supervisor.wanted[made["UUID"]] is before
    assert control.get(made["UUID"]) == made | {"State": "Enabled"}
    await control.update(made["UUID"], {"BatchSize": 3})
    again = ControlPlane(control._store, Supervisor(), Probe())
    await again.load(settings())
    upper = arn.replace(made["UUID"], made["UUID"].upper())
    assert again.tags(upper) == {"b": "2", "c": "\u00e9 _.:/=+-@"}
    assert again.get(made["UUID"])["BatchSize"] == 3
    await again.untag(arn, ["b", "c"])
    assert again.tags(arn) == {}


async def test_the_files_tags_are_the_files(control) -> None:
    """They can be read; a change is refused, naming the file."""
    arn = control.get(DECLARED.uuid)["EventSourceMappingArn"]
    assert control.tags(arn) == {"by": "file"}
    for operation in (control.tag(arn, {"a": "b"}), control.untag(arn, ["by"])):
        code, status, message = await refused(operation)
        assert (code, status) == ("ResourceConflictException", 409)
        assert "is declared in poller.yaml" in message


@pytest.mark.parametrize(
    ("arn", "code", "status", "message"),
    [
        (UNKNOWN, "ResourceNotFoundException", 404, f"Event source mapping not found: {UNKNOWN}"),
        (f"{PLACE}:function:f", "ResourceNotFoundException", 404, f"Function not found: {PLACE}:function:f"),
        (
            STREAM,
            "ValidationException",
            400,
            (
                f"1 validation error detected: Value '{STREAM}' at 'resource' failed to satisfy constraint: Member must "
                "satisfy regular expression pattern: arn:aws"
            ),
        ),
    ],
)
async def test_what_has_no_tags_is_refused(control, arn, code, status, message) -> None:
    """semantics.md 1.4 for a mapping; nothing else of Lambda is here."""

    async def listing() -> None:
        control.tags(arn)

    for operation in (listing(), control.tag(arn, {"a": "b"}), control.untag(arn, ["a"])):
        found = await refused(operation)
        assert found[:2] == (code, status)
        assert found[2].startswith(message)


async def test_an_arn_of_another_account_or_region_is_not_the_mapping(control) -> None:
    """The whole ARN names it, not only the UUID at its end."""
    arn = (await control.create(MAKE))["EventSourceMappingArn"]
    for other in (arn.replace("123456789012", "210987654321"), arn.replace("eu-west-1", "us-east-1")):
        with pytest.raises(ApiError, match=f"Event source mapping not found: {other}"):
            control.tags(other)


async def test_a_mapping_that_is_being_deleted_has_no_tags(control) -> None:
    """They went with its document."""
    made = await control.create({**MAKE, "Tags": {"a": "1"}})
    await control.delete(made["UUID"])
    with pytest.raises(ApiError, match="Event source mapping not found"):
        control.tags(made["EventSourceMappingArn"])


@pytest.mark.parametrize(
    ("tags", "code", "message"),
    [
        (
            None,
            "ValidationException",
            "1 validation error detected: Value null at 'tags' failed to satisfy constraint: Member must not be null",
        ),
        ({}, "InvalidParameterValueException", "An error occurred and the request cannot be processed."),
        ([], "ValidationException", "Tags is a list"),
        ({"": "x"}, "ValidationException", "Tags.'' the key is empty; give a tag key of 1 to 128 characters"),
        ({"k" * 129: "x"}, "ValidationException", "the key is too long; give at most 128 characters"),
        ({"k": "x" * 257}, "ValidationException", "Member must have length less than or equal to 256"),
        ({"k": 1}, "ValidationException", "Tags.k is a number"),
        ({"k": None}, "ValidationException", "Tags.k is empty"),
        ({"AWS:x": "x"}, "ValidationException", "the key begins with aws:, which is AWS's own; give another key"),
        ({"k;": "x"}, "ValidationException", "the key has a character that tags do not have"),
        ({"k": "x;"}, "ValidationException", "Tags.k has a character that tags do not have; use letters, digits"),
        ({f"k{n}": "" for n in range(51)}, "InvalidParameterValueException", "Number of tags exceeds resource tag limit."),
    ],
)  # fmt: skip
async def test_bad_tags_are_refused_and_change_nothing(control, tags, code, message) -> None:
    """At TagResource, and at create as far as tags may be left out there."""
    made = await control.create(MAKE)
    found = await refused(control.tag(made["EventSourceMappingArn"], tags))
    assert found[:2] == (code, 400)
    assert message in found[2]
    assert control.tags(made["EventSourceMappingArn"]) == {}
    if tags:
        found = await refused(control.create({**MAKE, "FunctionName": "f:live", "Tags": tags}))
        assert (found[0], message in found[2]) == (code, True)


async def test_a_mapping_has_at_most_fifty_tags(control) -> None:
    """Counted together; a new value for a key that is there takes no more room."""
    arn = (await control.create({**MAKE, "Tags": {f"k{n}": "" for n in range(MAX_TAGS)}}))["EventSourceMappingArn"]
    await control.tag(arn, {"k1": "new"})
    found = await refused(control.tag(arn, {"one": "more"}))
    assert found == ("InvalidParameterValueException", 400, "Number of tags exceeds resource tag limit.")


async def test_untag_needs_keys(control) -> None:
    """As AWS's front end says it."""
    arn = (await control.create(MAKE))["EventSourceMappingArn"]
    code, _, message = await refused(control.untag(arn, []))
    assert code == "ValidationException"
    assert message.endswith("Value null at 'tagKeys' failed to satisfy constraint: Member must not be null")
