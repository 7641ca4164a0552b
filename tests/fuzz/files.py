"""Files that people write: the config, and templates of other tools."""

import os
import tempfile
from functools import cache
from pathlib import Path

from poller import config, mappings
from poller.errors import ConfigError
from poller.importing import TemplateOptions, import_template
from tests.fuzz.kit import MARKER, Target, refused, silent

NOW = 1_780_000_000.0
_VARIABLE = "POLLER_FUZZ"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _file(name: str, document: bytes) -> str:
    path = Path(_folder().name) / name
    path.write_bytes(document)
    return str(path)


def settings(document: bytes) -> None:
    """The config: settings whose mappings can be built, or mistakes that do not tell what came through `${...}`."""
    path = _file("poller.yaml", document)
    os.environ[_VARIABLE] = MARKER
    try:
        loaded = config.load(path, now=NOW)
    except ConfigError as error:
        refused(error, path, document)
        return
    finally:
        del os.environ[_VARIABLE]
    for warning in loaded.warnings:
        silent(ValueError(warning), document)
    for declared in loaded.mappings:
        mappings.resolve(declared.uuid, declared.document, loaded.functions, path)


def _imported(name: str, document: bytes) -> None:
    path = _file(name, document)
    try:
        found = import_template(path, TemplateOptions(region="eu-west-1", account="123456789012"))
    except ConfigError as error:
        silent(error)
        return
    for remark in found.remarks:
        remark.encode()
    os.environ.update(found.samples)
    try:
        config.load(_file("printed.yaml", found.text.encode()))
    finally:
        for variable in found.samples:
            del os.environ[variable]


def template(document: bytes) -> None:
    """CloudFormation and SAM: what is made of them is a config that loads."""
    _imported("template.yaml", document)


def serverless(document: bytes) -> None:
    """The Serverless Framework's file; as the other kind where it looks like that."""
    _imported("serverless.yml", document)


CONFIG = Target("config", {"config": settings})
TEMPLATES = Target("templates", {"template": template, "serverless": serverless})
