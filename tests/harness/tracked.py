"""A study whose journals a test writes and MLflow mirrors, and a counter of the calls to MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from harness.record.root import Root
from harness.study.grid import GridPoint
from harness.tracking.experiment import Held
from harness.tracking.store import default_uri
from harness.tracking.tracker import Mirrored, Tracker
from tests.harness.journals import registered, rows_of
from tests.studies import Fields


def mlflow_runs(uri: str, study: str) -> list[Any]:
    """Return MLflow's runs of a study, but for the study's own."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        return []
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    return [run for run in found if run.data.tags["ssmscale.kind"] != "study"]


class Study:
    """The tiny study of one Series and two Runs, its journals and its experiment."""

    def __init__(self, root: Root, fields: Fields, uri: str | None = None) -> None:
        self.root, self.fields, self.uri = root, fields, uri or default_uri(root)
        self.points: tuple[GridPoint, ...] = registered(root, fields).points

    @property
    def series_id(self) -> str:
        return self.points[0].run.series_id

    def tracker(self) -> Tracker:
        return Tracker(self.uri, "tiny", self.root)

    def mirror(self, tracker: Tracker | None = None, **how: Any) -> Mirrored:
        return (tracker or self.tracker()).mirror(rows_of(self.root, self.fields), **how)

    def found(self, identity: str | None = None, *, deleted: bool = False) -> list[Held]:
        held = [one for one in self.tracker().experiment.search() if one.deleted is deleted]
        return [one for one in held if one.identity == (identity or self.series_id)]

    def history(self, identity: str | None = None, key: str = "train_loss") -> list[tuple[int, int, float]]:
        held = self.the(identity)
        metrics = self.tracker().experiment.client.get_metric_history(held.mlflow_id, key)
        return sorted((metric.step, metric.timestamp, metric.value) for metric in metrics)

    def the(self, identity: str | None = None) -> Held:
        """Return the one MLflow run of a Run, or of the Series."""
        (held,) = self.found(identity)
        return held

    def steps(self, identity: str | None = None, key: str = "train_loss") -> list[int]:
        return [step for step, *_ in self.history(identity, key)]


class Calls:
    """Counts the calls to MLflow, and lets chosen ones fail after MLflow has carried them out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlflow import MlflowClient

        self.made: list[str] = []
        self.failing: set[str] = set()
        self.seconds = 0.0
        """Time that each call takes besides (s)."""
        for name in ("create_run", "log_batch", "set_terminated", "set_tag", "log_artifact"):
            monkeypatch.setattr(MlflowClient, name, self._counted(name, getattr(MlflowClient, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            from mlflow.exceptions import MlflowException

            self.made.append(name)
            time.sleep(self.seconds)
            answer = call(*arguments, **named)
            if name in self.failing:
                self.failing.remove(name)
                raise MlflowException("502 Bad Gateway", error_code=13)
            return answer

        return counted
