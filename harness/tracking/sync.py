"""Bring MLflow to what the journals say: all of it for `sync`, the newest for `points`, `fit` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.common.console import warn
from harness.common.disk import write_atomically
from harness.common.validation import first_line
from harness.record.registry import ResolvedStudy
from harness.record.status import RunState, RunStatus
from harness.tracking.store import redact, tracking_uri
from harness.tracking.tracker import Mirrored, Tracker
from ssmttm.errors import InputError


class TrackerProblem(OSError):
    """MLflow did not take everything; the journals still hold it."""


def replay(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> tuple[Tracker, Mirrored]:
    """Check everything against the journals and settle it; raises TrackerProblem where MLflow does not take it."""
    uri = tracking_uri(resolved.study, resolved.root)
    try:
        return _mirrored(resolved, uri, rows, thorough=True)
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:  # whatever a tracker raises
        raise TrackerProblem(
            f"MLflow at {redact(uri)}: {first_line(error)}; the journals keep everything"
        ) from error


def kept_by(tracker: Tracker, rows: Sequence[RunStatus]) -> str:
    """A sentence: how many of the finished Runs MLflow holds; a run that was deleted there, or refused, it does not."""
    done, known = [row.run_id for row in rows if row.state is RunState.DONE], tracker.mlflow_ids()
    held = sum(run_id in known for run_id in done)
    of_all = "" if held == len(done) else f" of {len(done)}"
    return f"{held}{of_all} finished runs are in {redact(tracker.uri)}"


def bring_up_to_date(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> Tracker | None:
    """Mirror what has happened since; None, and one warning, where that cannot be: what follows needs no tracker."""
    uri = tracking_uri(resolved.study, resolved.root)
    try:
        tracker, done = _mirrored(resolved, uri, rows, thorough=False)
    except Exception as error:  # whatever a tracker raises
        warn(f"MLflow at {redact(uri)}: {first_line(error)}; reading the journals, which keep everything")
        return None
    warn(*done.notes)
    return tracker


def _mirrored(
    resolved: ResolvedStudy, uri: str, rows: Sequence[RunStatus], *, thorough: bool
) -> tuple[Tracker, Mirrored]:
    """Mirror, and once more after an error: a server whose database was restarted fails the first request."""
    from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_fixed

    again = Retrying(
        stop=stop_after_attempt(4 if thorough else 2),
        wait=wait_fixed(0.5),
        retry=retry_if_not_exception_type((InputError, ModuleNotFoundError)),
        reraise=True,
    )

    def mirror() -> tuple[Tracker, Mirrored]:
        tracker = Tracker(uri, resolved.study.name, resolved.root)
        return tracker, tracker.mirror(rows, settle=True, thorough=thorough)

    return again(mirror)


def keep_report(
    resolved: ResolvedStudy, rows: Sequence[RunStatus], out: Path, tracker: Tracker | None
) -> None:
    """Keep a copy of the newest report with the study, and with its run in MLflow."""
    folder = resolved.root.study(resolved.study.name) / "report"
    for name in ("report.html", "fit.json"):
        if (out / name).is_file():
            write_atomically(folder / name, (out / name).read_bytes())
    if tracker is not None:
        try:
            warn(*tracker.mirror(rows, settle=True).notes)
        except Exception as error:  # whatever a tracker raises
            warn(f"MLflow at {redact(tracker.uri)} has no copy of the report: {first_line(error)}")
