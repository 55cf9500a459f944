"""Runs that differ in a setting of training alone are a sweep: their best is kept, and they are never seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.findings.document import fit_points
from analysis.points.checks import seed_noise
from analysis.points.sweeps import differing_settings
from analysis.points.table import CheckedPoints, check_points, read_table
from tests.analysis.conftest import checked
from tests.analysis.synthetic import SyntheticStudy

ONE_SEED = SyntheticStudy(seeds=(1, 1, 1, 1))


def swept(rates: dict[float, float], *, column: str = "lr", seeds: int = 1) -> pd.DataFrame:
    """Return a study whose every run was trained at each rate, with that factor on its loss."""
    table = SyntheticStudy(seeds=(seeds,) * 4).table(0)
    return pd.concat(
        table.assign(
            **{column: rate},
            loss=table["loss"] * factor,
            run_id=table["run_id"] + f"-{rate}",
            cluster=table["cluster"] + f"-{rate}",
        )
        for rate, factor in rates.items()
    )


def read(table: pd.DataFrame, path: Path, best: tuple[str, ...] = ()) -> CheckedPoints:
    table.to_csv(path / "p.csv", index=False)
    return check_points(read_table(path / "p.csv", settings=best), best=best)


def test_the_best_of_the_case_are_the_rows_at_the_best_rate_and_no_seeds(cases: Path) -> None:
    points = check_points(read_table(cases / "rates.csv"), best=["lr"])
    expected = read_table(cases / "rates.csv", where=["lr=3e-4"])
    assert points.frame["row"].tolist() == expected["row"].tolist()
    assert all(not seed_noise(rows) for rows in points.frames.values())
    assert [gone.code for gone in points.exclusions] == ["not_best"] * 40
    assert points.exclusions[0].reason.startswith("lr 0.0001 has the mean loss 4.3159, and 0.0003 the lowest")
    document = fit_points(points, resamples=100)
    notes = {note.code: note.text for note in document.notes}
    assert "20 of 60 rows were kept" in notes["best_selected"]
    assert "lowest of 3 losses" in notes["best_selected"]
    plain = fit_points(check_points(expected), resamples=100)
    assert document.architectures["ssm"].params == plain.architectures["ssm"].params


@pytest.mark.parametrize("column", ["lr", "config.optim.learning_rate", "batch_size", "seq_len", "Optimizer"])
def test_a_sweep_that_is_not_resolved_is_refused_with_both_remedies(tmp_path: Path, column: str) -> None:
    table = swept({1e-4: 1.01, 3e-4: 1.0}, column=column)
    with pytest.raises(InputError) as caught:
        read(table, tmp_path)
    said = str(caught.value)
    assert f"{tmp_path / 'p.csv'}: rows 2, 26 have one architecture, size and budget" in said
    assert f"{column} (0.0001, 0.0003)" in said
    assert f"--best {column}" in said
    assert f"--where '{column}=0.0001'" in said


def test_a_column_that_only_the_user_calls_a_setting_is_one(tmp_path: Path) -> None:
    table = swept({1: 1.01, 2: 1.0}, column="recipe")
    assert all(seed_noise(rows) for rows in read(table, tmp_path).frames.values())
    points = read(table, tmp_path, ("recipe",))
    assert set(points.frame["recipe"]) == {"2"}
    with pytest.raises(InputError, match="--best rate: the table has no such setting of training"):
        read(table, tmp_path, ("rate",))
    with pytest.raises(InputError, match="--best seed"):
        read(table, tmp_path, ("seed",))


def test_the_seeds_of_the_best_setting_stay_and_their_mean_decides(tmp_path: Path) -> None:
    table = swept({1e-4: 1.01, 3e-4: 1.0}, seeds=3)
    lucky = (table["lr"] == 1e-4) & (table["seed"] == 1)
    table.loc[lucky, "loss"] *= 0.985
    points = read(table, tmp_path, ("lr",))
    assert set(points.frame["lr"]) == {"0.0003"}
    assert all({one.seeds for one in seed_noise(rows)} == {3} for rows in points.frames.values())


def test_sizes_that_a_setting_changes_a_little_are_one_size(tmp_path: Path) -> None:
    table = swept({512: 1.0, 1024: 1.01}, column="context_length")
    table["n_params"] *= np.where(table["context_length"] == 1024, 1.004, 1.0)
    with pytest.raises(InputError, match="they are a sweep and no seeds"):
        read(table, tmp_path)
    assert set(read(table, tmp_path, ("context_length",)).frame["context_length"]) == {"512"}


def test_two_settings_are_chosen_together_and_one_alone_leaves_the_other(tmp_path: Path) -> None:
    table = pd.concat(swept({1e-4: f, 3e-4: 1.0}).assign(batch=b) for b, f in ((32, 1.02), (64, 0.99)))
    table["run_id"] += table["batch"].astype(str)
    points = read(table, tmp_path, ("lr", "batch"))
    assert set(zip(points.frame["lr"], points.frame["batch"], strict=True)) == {("0.0001", "64")}
    with pytest.raises(InputError, match=r"differ in .*batch \(32, 64\)"):
        read(table, tmp_path, ("lr",))


def test_a_setting_that_follows_size_or_budget_is_no_sweep() -> None:
    table = ONE_SEED.table(0)
    table["lr"] = 1e-3 * (table["n_params"] / 1e5) ** -0.5
    table["batch_size"] = table["iterations"] / 10
    assert len(checked(table).frame) == len(table)


def test_uneven_numbers_of_candidates_and_a_best_at_the_edge_are_noted(tmp_path: Path) -> None:
    table = swept({1e-4: 1.02, 3e-4: 1.01, 1e-3: 1.0})
    table = table[(table["architecture"] == "prefix_simba") | (table["lr"] >= 3e-4)]
    notes = {note.code: note.text for note in read(table, tmp_path, ("lr",)).notes}
    assert "Cross Transformer 2, Prefix SiMBA 3" in notes["selection_uneven"]
    assert "lowest of 2 to 3 losses" in notes["best_selected"]
    assert "in 24 of 24 sizes and budgets" in notes["best_at_edge"]
    middle = read(swept({1e-4: 1.02, 3e-4: 1.0, 1e-3: 1.01}), tmp_path, ("lr",))
    assert {note.code for note in middle.notes} == {"best_selected"}


def test_a_setting_that_differs_between_architectures_is_noted_with_its_values() -> None:
    table = ONE_SEED.table(0)
    table["context"] = np.where(table["architecture"] == "prefix_simba", 2048, 1024)
    table["lr"] = 3e-4
    document = fit_points(checked(table), resamples=100)
    (note,) = [note for note in document.notes if note.code == "arms_differ"]
    assert "differ in context: Cross Transformer 1024; Prefix SiMBA 2048" in note.text
    assert differing_settings(checked(table).frame) == ["context"]


def test_the_best_of_dense_sizes_are_not_refused_as_another_sweep(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    count = 400
    table = pd.DataFrame({"architecture": "a", "loss": rng.uniform(2, 3, count)})
    table["n_params"], table["tokens"] = (rng.uniform(1.0e8, 1.1e8, count) for _ in range(2))
    table["lr"] = rng.choice([1e-4, 3e-4], count)
    points = read(table, tmp_path, ("lr",))
    assert 100 < len(points.frame) < 350
