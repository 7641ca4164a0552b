"""A template file: which kind it is, and its plain values."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poller.clock import wall_clock
from poller.errors import ConfigError
from poller.importing.cloudformation import CloudFormation
from poller.importing.intrinsics import Place
from poller.importing.judge import Judge
from poller.importing.render import Imported, render
from poller.importing.serverless import Serverless
from poller.importing.values import Holes, shown
from poller.shapes import nearest
from poller.yamldoc import Entry, Node, parse

MAX_FILE_BYTES = 5 * 1024 * 1024
_MAX_DEPTH = 64
_JSON_PAIR = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """What the command line says about where the template is deployed. `stage`: of serverless.yml."""

    region: str | None = None
    account: str | None = None
    stage: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)


def import_template(path: str, options: TemplateOptions) -> Imported:
    """The mappings that a CloudFormation or SAM template or a serverless.yml makes. ConfigError."""
    root = parse(_as_yaml(_read(path)), path, _short_form, _MAX_DEPTH)
    if root is None or not isinstance(root.content, dict):
        raise ConfigError([f"{path}:1: is no template; {_WANTED}"])
    document, holes = plain(root), Holes()
    place = Place(options.region, options.account)
    parameters = dict(options.parameters)
    reader: CloudFormation | Serverless
    if isinstance(document.get("Resources"), dict):
        if options.stage is not None:
            raise ConfigError(["--stage: is only for serverless.yml; give --parameter NAME=VALUE"])
        reader = CloudFormation(document, place, parameters, holes, _lines(root, "Resources"))
        kind = "a SAM template" if "Transform" in document and reader.has_sam else "a CloudFormation template"
    elif isinstance(document.get("functions"), dict | list) and ("provider" in document or "service" in document):
        reader = Serverless(document, place, parameters, options.stage, holes=holes, line_of=_lines(root, "functions"))
        kind = "a Serverless Framework file"
    else:
        raise ConfigError([f"{path}:1: has neither Resources nor service, provider and functions; {_WANTED}"])
    if unknown := [name for name in parameters if not reader.knows(name)]:
        raise ConfigError([_unknown(name, reader.parameters()) for name in unknown])
    found = list(reader.candidates())
    judged = Judge(wall_clock()).judge(found)
    judged.foreign.extend(reader.remarks)
    if not judged.items:
        raise ConfigError([*judged.foreign, f"{path}: has no event source mappings that esm-poller can poll"])
    aws = {"region": reader.place.region} if reader.place.region else {}
    return render(judged, f"{shown(Path(path).name)}, {kind}", aws, [*_ADVICE, *reader.assumed()])


_WANTED = "give a CloudFormation or SAM template (YAML or JSON) or a serverless.yml"
_ADVICE = (
    "Where the stack is deployed, AWS polls these sources until its own mappings are disabled; until then a queue's "
    "messages go to either of the two, a stream's records to both.\n"
    "To take over from mappings that are at work, import from the account: StartingPosition is the template's here."
).splitlines()


def _unknown(name: str, known: tuple[str, ...]) -> str:
    near = nearest(name, known)
    hint = f'did you mean "{shown(near)}"?' if near else f"it has {', '.join(map(shown, known)) or 'none'}"
    return f"--parameter {shown(name)}: the template has no such parameter; {hint}"


def _read(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise ConfigError([f"{shown(path)}: cannot be read: {reason}; {_WANTED}"]) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: the file is larger than {MAX_FILE_BYTES} bytes; {_WANTED}"])
    if Path(path).suffix in {".ts", ".js", ".mjs", ".cjs", ".py", ".tf"}:
        made = "`cdk synth`, `serverless print` or `serverless package` make one; or import from the account"
        raise ConfigError([f"{path}: is a program, no template; {made}"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: the file is not UTF-8 text; save it as UTF-8"]) from None


def _as_yaml(text: str) -> str:
    """JSON is YAML but for tabs between tokens and for pairs of escaped surrogates."""
    if not text.lstrip().startswith("{"):
        return text
    return _JSON_PAIR.sub(_paired, text.replace("\t", " "))


def _paired(found: re.Match[str]) -> str:
    high, low = int(found[2], 16), int(found[3], 16)
    return found[1] + chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


def _short_form(tag: str, node: Node) -> Node:
    """CloudFormation's `!Ref X` is `{"Ref": X}`, every other `!Name X` is `{"Fn::Name": X}`."""
    name = tag.removeprefix("!")
    key = name if name in {"Ref", "Condition"} else f"Fn::{name}"
    return Node(node.line, {key: Entry(node.line, node)}, node.size + 1)


def plain(node: Node) -> Any:
    """The value without its lines."""
    match node.content:
        case dict() as entries:
            return {key: plain(entry.node) for key, entry in entries.items()}
        case list() as items:
            return [plain(item) for item in items]
        case value:
            return value


def _lines(root: Node, section: str) -> Callable[[str], int | None]:
    """Finds the line of an entry of a section."""
    assert isinstance(root.content, dict)
    content = root.content[section].node.content
    lines = {key: entry.line for key, entry in content.items()} if isinstance(content, dict) else {}
    return lines.get
