"""Mirror a study once: all of it for `sync`, new events for `points`, `fit` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.common.address import redact, sqlite_file
from harness.common.console import warn
from harness.common.disk import DiskFull, write_atomically
from harness.common.validation import first_line
from harness.record.registry import ResolvedStudy
from harness.record.status import RunState, RunStatus
from harness.record.trust import believe, may_receive_logins
from harness.tracking.store import tracking_uri
from harness.tracking.tracker import Mirrored, Tracker
from harness.tracking.watch import TrackerSilent, Watch
from ssmttm.errors import InputError

MOST_SILENCE = 4.0
"""Time since the last answer (s) after which a failed mirroring is not repeated: a locked SQLite file takes five."""


class TrackerProblem(OSError):
    """MLflow did not receive everything; the journals still hold it."""


def replay(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> tuple[Tracker, Mirrored]:
    """Check and settle the whole experiment by the journals; raises TrackerProblem if MLflow fails."""
    uri = _tracker_of(resolved)
    try:
        return _mirrored(resolved, uri, rows, thorough=True)
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:  # MLflow's exceptions have no common base
        raise TrackerProblem(
            f"MLflow at {redact(uri)}: {first_line(error)}; the journals keep everything"
        ) from error


def kept_by(tracker: Tracker, rows: Sequence[RunStatus]) -> str:
    """Return a sentence with the number of finished Runs in MLflow, without those deleted there or refused."""
    done, known = [row.run_id for row in rows if row.state is RunState.DONE], tracker.mlflow_ids()
    held = sum(run_id in known for run_id in done)
    of_all = "" if held == len(done) else f" of {len(done)}"
    return f"{held}{of_all} finished runs are in {redact(tracker.uri)}"


def bring_up_to_date(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> Tracker | None:
    """Mirror new events and return the tracker; after an error warn and return None, since the journals suffice."""
    uri = tracking_uri(resolved.study, resolved.root)
    try:
        tracker, done = _mirrored(resolved, _tracker_of(resolved), rows, thorough=False)
    except Exception as error:  # MLflow's exceptions have no common base
        warn(f"MLflow at {redact(uri)}: {first_line(error)}; reading the journals instead")
        return None
    warn(*done.notes)
    return tracker


def _tracker_of(resolved: ResolvedStudy) -> str:
    """Return a study's tracking address; raises InputError if another user's file names it."""
    uri = tracking_uri(resolved.study, resolved.root)
    source = sqlite_file(uri) or resolved.record
    if source is not None and not may_receive_logins(uri, source):
        believe(source, f"that runs are sent to {redact(uri)}", "set MLFLOW_TRACKING_URI to that address")
    return uri


def _mirrored(
    resolved: ResolvedStudy, uri: str, rows: Sequence[RunStatus], *, thorough: bool
) -> tuple[Tracker, Mirrored]:
    """Mirror, and try again after an error: a server whose database was restarted fails its first request.

    Raises TrackerSilent if the tracker does not answer.
    """
    from tenacity import Retrying, retry_if_not_exception_type, wait_fixed

    watch, most = Watch(), 4 if thorough else 2
    again = Retrying(
        stop=lambda state: state.attempt_number >= most or watch.silence > MOST_SILENCE,
        wait=wait_fixed(0.5),
        retry=retry_if_not_exception_type((InputError, ModuleNotFoundError, TrackerSilent)),
        reraise=True,
    )

    def mirror() -> tuple[Tracker, Mirrored]:
        tracker = Tracker(uri, resolved.study.name, resolved.root, watch=watch)
        return tracker, watch.call(lambda: tracker.mirror(rows, settle=True, thorough=thorough))

    return again(mirror)


def keep_report(
    resolved: ResolvedStudy, rows: Sequence[RunStatus], out: Path, tracker: Tracker | None
) -> None:
    """Keep a copy of the newest report with the study, and with its run in MLflow."""
    folder = resolved.root.study(resolved.study.name) / "report"
    try:
        for name in ("report.html", "fit.json"):
            if (out / name).is_file():
                write_atomically(folder / name, (out / name).read_bytes())
    except (OSError, DiskFull) as error:
        warn(f"{resolved.root.path} keeps no copy of the report: {first_line(error)}")
    if tracker is not None:
        try:
            warn(*tracker.watch.call(lambda: tracker.mirror(rows, settle=True)).notes)
        except Exception as error:  # MLflow's exceptions have no common base
            warn(f"MLflow at {redact(tracker.uri)} has no copy of the report: {first_line(error)}")
