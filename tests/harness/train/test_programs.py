"""A worker starts no compiler: DeepSpeed would ask each for what it could build, and build some of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from harness.record.root import Root
from tests.conftest import REPOSITORY
from tests.harness.trainer import prepared, progress_of
from tests.studies import Fields, with_iterations

NOTING = REPOSITORY / "tests" / "programs_started"


def test_git_is_the_only_program_that_a_worker_starts(study_fields: Fields, tmp_path: Path) -> None:
    fields = with_iterations(study_fields, 5)
    root, noted = Root(tmp_path / "runs"), tmp_path / "noted"
    noted.touch()
    ((_, (run,)),) = prepared(root, fields)
    subprocess.run(
        [sys.executable, "-m", "harness.train.worker", str(root.run(run.run_id))],
        env={**os.environ, "PYTHONPATH": f"{NOTING}:{REPOSITORY}", "PROGRAMS_STARTED": str(noted)},
        check=True,
        capture_output=True,
    )
    assert progress_of(root, fields)[0].result
    started = {Path(line).name for line in noted.read_text(encoding="utf-8").splitlines()}
    assert started == {"git"}  # which tells the commit
