"""Kernels' configurations are timed once for a type of GPU, and every later process takes the same."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from harness.record.root import Root
from harness.train.kernel_choices import KernelChoices, keep_choices
from tests.ssmttm.kernel_devices import FOLDER, kernels_compiled_for, using

CONFIGS = ("small", "medium", "large")
KEY = (256, 64, "torch.float32")


class Tuner:
    """As much of Triton's Autotuner as asks for a choice."""

    def __init__(self, times: Sequence[float], meanwhile: Callable[[], object] = lambda: None) -> None:
        self.base_fn = SimpleNamespace(__name__="kernel")
        self.cache: dict[object, str] = {}
        self._times, self._meanwhile = dict(zip(CONFIGS, times, strict=True)), meanwhile

    def choice(self, folder: Path) -> tuple[str, bool]:
        """Return the configuration chosen by a folder, and True if it was timed here."""
        choices = KernelChoices(folder)
        choices.take_over(self)

        def time_all() -> None:
            self._meanwhile()
            self.configs_timings = {config: [seconds] for config, seconds in self._times.items()}
            self.cache[KEY] = min(self._times, key=self._times.__getitem__)

        self.check_disk_cache(KEY, CONFIGS, time_all)
        return self.cache[KEY], choices.timed == 1


def test_a_later_process_takes_the_choice_of_the_first_and_times_nothing(tmp_path):
    assert Tuner([3, 1, 2]).choice(tmp_path / "gpu") == ("medium", True)
    assert Tuner([1, 2, 3]).choice(tmp_path / "gpu") == ("medium", False)


def test_processes_that_time_at_once_agree_on_the_choice_noted_first(tmp_path):
    other = Tuner([1, 2, 3])
    assert Tuner([3, 2, 1], meanwhile=lambda: other.choice(tmp_path)).choice(tmp_path) == ("small", True)
    assert Tuner([3, 2, 1]).choice(tmp_path) == ("small", False)


@pytest.mark.parametrize("damage", ["", "{", '{"kernel": "kernel", "key": "(1,)", "config": "small"}', None])
def test_a_file_that_names_no_configuration_of_the_kernel_is_replaced(tmp_path, damage):
    Tuner([3, 1, 2]).choice(tmp_path)
    (path,) = tmp_path.glob("kernel-*.json")
    path.write_text(path.read_text().replace("medium", "huge") if damage is None else damage)
    assert Tuner([1, 2, 3]).choice(tmp_path) == ("small", True)
    assert Tuner([3, 1, 2]).choice(tmp_path) == ("small", False)


def test_where_nothing_can_be_written_each_process_chooses_for_itself(tmp_path):
    (tmp_path / "file").touch()
    assert Tuner([1, 2, 3]).choice(tmp_path / "file" / "gpu") == ("small", True)
    assert Tuner([3, 2, 1]).choice(tmp_path / "file" / "gpu") == ("large", True)


def test_a_configuration_that_cannot_run_is_not_noted(tmp_path):
    Tuner([math.inf] * 3).choice(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_journal_gets_the_counts_once_each_time_they_change(tmp_path):
    choices = KernelChoices(tmp_path)
    assert choices.report() == {}
    choices.count_compiled(times=SimpleNamespace(total=2_500_000), cache_hit=False, src=None)
    expected = {"kernels_found": 0, "kernels_timed": 0, "kernels_compiled": 1, "kernels_seconds": 2.5}
    assert choices.report() == expected
    assert choices.report() == {}


def test_on_the_cpu_nothing_is_kept(tmp_path):
    assert keep_choices(Root(tmp_path), "cpu") is None
    assert list(tmp_path.iterdir()) == []


def choose_for_absent_gpu(root: Path, times: Sequence[float]) -> None:
    """Print the choice for a kernel of mamba-ssm whose configurations take these times, and what the journal gets."""
    import torch

    with (
        kernels_compiled_for(90, iter(times)) as (kernels, launches),
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA H100 80GB HBM3"),
        using(kernels),
    ):
        from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_bwd

        choices = keep_choices(Root(root), "cuda:0")
        assert choices is not None
        steps = torch.rand(1, 2, 1, 64)  # (batch, heads, chunks, chunk)
        _chunk_cumsum_bwd(steps, steps, torch.rand(1, 64, 2), torch.rand(2))
        print(json.dumps([launches[-1].config, choices.report()]))


@pytest.mark.verify
def test_triton_chooses_by_the_folder_also_for_kernels_that_clear_their_result_first(tmp_path):
    if not FOLDER.is_dir():
        pytest.skip(f"no mamba-ssm in {FOLDER}: make verify installs it")

    def choice(times: Sequence[float], cache: str) -> tuple[str, dict[str, float]]:
        program = f"from {__name__} import *; choose_for_absent_gpu(Path({str(tmp_path)!r}), {times})"
        environment = {"TRITON_CACHE_DIR": str(tmp_path / cache)}
        with mock.patch.dict("os.environ", environment):
            done = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    times = [7.0, 6.0, 1.0, 5.0, 4.0, 3.0, 2.0]
    config, first = choice(times, "first")
    assert "BLOCK_SIZE_H 4," in config
    assert (first["kernels_found"], first["kernels_timed"], first["kernels_compiled"]) == (0, 1, len(times))
    again, later = choice(sorted(times), "later")
    assert again == config
    assert (later["kernels_found"], later["kernels_timed"], later["kernels_compiled"]) == (1, 0, 1)
    (note,) = tmp_path.glob(
        "kernels/NVIDIA-H100-80GB-HBM3/torch-*-mamba-ssm-*/_chunk_cumsum_bwd_kernel-*.json"
    )
    assert json.loads(note.read_text())["config"].startswith("BLOCK_SIZE_H: 4,")
