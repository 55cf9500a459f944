"""What squeue and sacct print, read as jobs."""

import pytest

from harness.dispatch.base import JobState
from harness.dispatch.slurm_queue import STATES, _from_sacct, _from_squeue, _seconds


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("0:07", 7), ("3:20", 200), ("1:00:01", 3601), ("2-00:00:00", 172_800), ("INVALID", 0)],
)
def test_squeues_times_are_read(said: str, seconds: float) -> None:
    assert _seconds(said) == seconds


def test_an_element_of_an_array_waits_for_its_reason() -> None:
    view = _from_squeue("12_3|ssmscale-a|PENDING|0:00||Resources")
    assert view is not None
    assert (view.job_id, view.state, view.reason) == ("12_3", JobState.QUEUED, "Resources")


def test_a_reason_may_hold_the_separator() -> None:
    view = _from_squeue("12_3|ssmscale-a|PENDING|0:00||Nodes|down")
    assert view is not None
    assert view.reason == "Nodes|down"


def test_who_cancelled_a_job_is_no_part_of_its_state() -> None:
    view = _from_sacct("12_3|ssmscale-a|CANCELLED by 1000|17|n1")
    assert view is not None
    assert (view.state, view.seconds) == (JobState.PREEMPTED, 17)


def test_elements_that_wait_together_are_left_to_squeue() -> None:
    assert _from_sacct("12_[4-9%2]|ssmscale-a|PENDING|0|None assigned") is None


def test_every_state_of_slurms_manual_is_known() -> None:
    codes = [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "CONFIGURING",
        "COMPLETING",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PENDING",
        "PREEMPTED",
        "RUNNING",
        "RESV_DEL_HOLD",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "REQUEUED",
        "RESIZING",
        "REVOKED",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
        "SUSPENDED",
        "TIMEOUT",
    ]
    assert set(codes) == set(STATES)
