"""One small Bach corpus for all tests that need real tokens, built once a session."""

from pathlib import Path

import pytest

from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.spec import BuildSpec

BACH = BuildSpec(source="bach", limit=6, codebooks=2, codebook_size=64, segment_seconds=5, valid=0.2)


@pytest.fixture(scope="session")
def bach_spec() -> BuildSpec:
    return BACH


@pytest.fixture(scope="session")
def bach_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpora") / "bach"
    build_corpus(BACH, out, workers=1)
    return out
