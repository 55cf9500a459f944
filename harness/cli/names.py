"""Names of studies and runs: completed by the shell, and offered in place of a mistyped one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import wraps
from glob import escape, glob
from pathlib import Path
from typing import Any

import typer

from ssmttm.errors import InputError


def complete_study(context: typer.Context, incomplete: str) -> list[str]:
    """Return the submitted studies and the YAML files, one folder down at most, that begin with `incomplete`."""
    names = [name for name in _study_names(context.params) if name.startswith(incomplete)]
    return names + _yaml_files(incomplete)


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Return the ids that begin with `incomplete` of the study's runs, or of all runs where the verb takes no study."""
    return [run_id for run_id in _run_ids(context.params) if run_id.startswith(incomplete)]


def suggest_names(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb whose errors about an unknown study or run end with the nearest known names."""

    @wraps(verb)
    def suggesting(**given: Any) -> None:
        try:
            verb(**given)
        except InputError as error:
            near = " or ".join(_nearest(given))
            if near:
                raise InputError(f"{error}; did you mean {near}?") from error
            raise

    return suggesting


def _nearest(given: Mapping[str, Any]) -> Iterable[str]:
    """Return the names nearest to the study of these arguments if it is unknown, else to the first unknown run."""
    study = given.get("study")
    if study is not None and not Path(study).is_file():
        names = _study_names(given)
        if study not in names:
            paths = _yaml_files("") + [str(path) for path in Path(study).parent.glob("*.y*ml")]
            known = {Path(path).stem: path for path in paths} | {name: name for name in (*paths, *names)}
            return dict.fromkeys(known[name] for name in get_close_matches(study, known))
    wanted = given.get("runs") or [run for run in (given.get("run"),) if run]
    run_ids = _run_ids(given) if wanted else []
    for word in wanted:
        beginnings = {run_id[: len(word)]: run_id for run_id in run_ids}
        if word not in beginnings:
            return [beginnings[begun] for begun in get_close_matches(word, beginnings)]
    return []


def _study_names(given: Mapping[str, Any]) -> list[str]:
    return sorted(path.parent.name for path in _root(given).glob("studies/*/study.json"))


def _yaml_files(begun: str) -> list[str]:
    return sorted(path for more in ("*.y*ml", "*/*.y*ml") for path in glob(escape(begun) + more))  # noqa: PTH207


def _run_ids(given: Mapping[str, Any]) -> list[str]:
    with suppress(InputError, OSError):
        if study := given.get("study"):
            from harness.record.registry import registered

            return [point.run_id for point in registered(study, given.get("root")).points]
        return sorted(path.name for path in (_root(given) / "runs").iterdir())
    return []


def _root(given: Mapping[str, Any]) -> Path:
    return given.get("root") or Path("runs")
