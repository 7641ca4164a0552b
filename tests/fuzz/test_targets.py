"""Every fuzz target for some seconds: the corpus, then documents near it, the same ones in every run."""

from collections.abc import Iterator
from functools import partial
from random import Random

import pytest
import structlog
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.kit import CORPUS, TooSlow, bounded, end, quiet
from tests.fuzz.mutate import near
from tests.fuzz.targets import TARGETS

KINDS = [(name, kind) for name, target in TARGETS.items() for kind in target.kinds]


@pytest.fixture(scope="module", autouse=True)
def silence() -> Iterator[None]:
    before = structlog.get_config()
    quiet()
    yield
    structlog.configure(**before)
    end()


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_corpus_is_read(name: str, kind: str) -> None:
    """Each parser has a document of its own, and takes every one without a word."""
    seeds = TARGETS[name].seeds(kind)
    assert seeds
    for seed in seeds:
        TARGETS[name].feed(kind, seed)


def test_each_document_of_the_corpus_is_for_a_target() -> None:
    """A misspelt name would never be read."""
    known = {path for name, kind in KINDS for path in (CORPUS / name).glob(f"{kind}-*")}
    assert {path for path in CORPUS.rglob("*") if path.is_file()} == known


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_damaged_documents_are_refused_or_read(name: str, kind: str) -> None:
    """Only documented errors, in time, with the rules of each target held."""

    seeds = TARGETS[name].seeds(kind)

    @settings(max_examples=200, phases=[Phase.generate])  # a failing document is small as it is
    @given(st.builds(Random, st.integers(0, 2**32)).map(partial(near, seeds)) | st.binary(max_size=200))
    def damaged(document: bytes) -> None:
        TARGETS[name].feed(kind, document)

    damaged()


def test_an_endless_parser_is_found() -> None:
    """The bound is of processor time: a slow machine does not fail it, a loop without an end does."""
    with pytest.raises(TooSlow), bounded(0.05):
        while True:
            pass
