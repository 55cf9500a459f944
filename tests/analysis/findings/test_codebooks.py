"""Each codebook's losses are fitted and compared, and a codebook that ranks otherwise is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.findings.document import fit_points
from analysis.findings.results import FitDocument
from tests.analysis.conftest import checked
from tests.analysis.report.test_report import page_of
from tests.analysis.synthetic import SIMBA, TRANSFORMER, TRUE_RATIO, SyntheticStudy, against, loss_by

STUDY = SyntheticStudy(seeds=(2, 2, 2, 2), cluster_noise=1e-3, row_noise=1e-3)


def with_books(*gaps: float) -> pd.DataFrame:
    """Return a table whose codebooks have the noise of the loss, and laws whose A differs by each gap of SiMBA."""
    table = STUDY.table(0)
    noise = table["loss"] / [
        loss_by(against()[row.architecture], row.n_params, row.tokens) for row in table.itertuples()
    ]
    for book, gap in enumerate(gaps):
        laws = {"cross_transformer": TRANSFORMER, "prefix_simba": SIMBA | {"A": 60.0 + gap}}
        clean = [loss_by(laws[row.architecture], row.n_params, row.tokens) for row in table.itertuples()]
        table[f"loss_q{book}"] = clean * noise
    table["loss"] = table[[f"loss_q{book}" for book in range(len(gaps))]].mean(axis=1)
    return table


@pytest.fixture(scope="module")
def document() -> FitDocument:
    return fit_points(checked(with_books(-24.0, -30.0, 12.0)), resamples=100)


def test_each_codebook_has_its_own_laws_and_size_ratio(document: FitDocument) -> None:
    books = document.comparison.codebooks
    assert [one.codebook for one in books] == ["loss_q0", "loss_q1", "loss_q2"]
    assert books[0].params["cross_transformer"]["A"] == pytest.approx(60.0, rel=0.3)
    top = max(row.reference_n_params for row in document.comparison.size_ratio)
    for one in books:
        (row,) = one.size_ratio
        assert row.reference_n_params <= top
    assert books[0].size_ratio[0].ratio == pytest.approx(TRUE_RATIO, rel=0.15)
    assert FitDocument.model_validate(document.model_dump(mode="json")).comparison.codebooks == books


def test_a_codebook_that_ranks_the_architectures_otherwise_is_named(document: FitDocument) -> None:
    assert [one.ranking[0] for one in document.comparison.codebooks] == [
        *("prefix_simba", "prefix_simba", "cross_transformer"),
    ]
    notes = [note.text for note in document.notes if note.code == "codebooks_rank_otherwise"]
    (text,) = notes
    assert text.startswith(
        "by loss_q2, Cross Transformer has a lower loss than Prefix SiMBA at 3M parameters"
    )
    assert "by more than the noise" in text


def test_the_report_lists_each_codebook_in_the_order_of_its_losses(
    document: FitDocument, tmp_path: Path
) -> None:
    _, page = page_of(checked(with_books(-24.0, -30.0, 12.0)), document, tmp_path)
    rows = page.tables["codebooks"][1:]
    assert [(row[0], row[1]) for row in rows[-2:]] == [
        ("loss_q2", "Cross Transformer"),
        ("loss_q2", "Prefix SiMBA"),
    ]
    assert [row[-1] for row in rows].count("reference") == 3
    assert float(rows[0][2]) < float(rows[1][2])


def test_a_difference_within_the_noise_is_called_one() -> None:
    table = with_books(-24.0, 0.0)
    rng = np.random.default_rng(5)
    for _ in range(20):
        table["loss_q1"] = table["loss_q1"] * np.exp(1e-3 * rng.normal(size=len(table)))
        found = fit_points(checked(table), resamples=100)
        notes = [note.text for note in found.notes if note.code == "codebooks_rank_otherwise"]
        if notes:
            assert "the difference lies within the noise" in notes[0]
            return
    pytest.fail("two equal architectures were never ranked the other way round")


def test_a_codebook_without_all_its_losses_is_left_out_and_without_any_nothing_is_said() -> None:
    table = with_books(-24.0, -30.0)
    table.loc[table.index[3], "loss_q1"] = np.nan
    found = fit_points(checked(table), resamples=100)
    assert [one.codebook for one in found.comparison.codebooks] == ["loss_q0"]
    (note,) = [note for note in found.notes if note.code == "codebook_incomplete"]
    assert "loss_q1 is empty in 1 of 48 rows" in note.text
    plain = fit_points(checked(STUDY.table(0)), resamples=100)
    assert plain.comparison.codebooks == ()
