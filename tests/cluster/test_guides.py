"""Run every command that README.md and the guides print, with the changes that a small folder asks for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from slurm.devcluster.cluster import DevCluster
from tests.cluster.slurm_study import PROFILE
from tests.conftest import REPOSITORY, Command
from tests.studies import tiny_study

GUIDES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md"))]
PROGRAMS = ("ssmscale", "python", "make", "pip", "srun", "sbatch", "sed", "source")

ADAPTED = [
    (r"--cluster h100x8|--ray-address \S+", "--cluster profile.yaml"),
    (r"--budget \S+", "--budget 0.001"),  # GPU-hours of a tiny study
    (r"evaluate demo --limit \d+", "evaluate demo RUN --limit 2"),
    (r"\[0,1,2\]", "[0,1]"),
    (r"(.*corpus\.path=.*)", r"\1 --dry-run"),  # trains the demo once more
    (r" -f$", ""),  # follows a log until Ctrl-C
    (r"/shared/runs", "runs"),
    (r"RUN_ID|\bRUN\b", "$RUN"),
    (r"--gpus 8", "--wait --gpus 2"),
    (r"--nnodes .* --rdzv-endpoint \S+", "--standalone --nproc_per_node 1"),
    (r"/tmp/cluster", "cluster"),
]
"""Changes that make a printed command fit the small studies, the folder and the cluster of these tests."""


def printed_commands() -> Iterator[str]:
    """Yield the commands in the guides' indented blocks, without comments and variables."""
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^    (?:\$ )?(\S.*)$", text, re.M):
            for command in re.split(r";\s+", re.split(r"\s+# ", line)[0]):
                words = command.split()
                while words and re.match(r"[A-Z_]+=", words[0]):
                    del words[0]
                if words and words[0] in PROGRAMS:
                    yield " ".join(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """A folder with all that the guides name, small: studies, a corpus, recordings, and the demo trained."""
    folder = tmp_path_factory.mktemp("guides")
    shutil.copytree(REPOSITORY / "sweeps", folder / "sweeps")
    shutil.copytree(tiny_corpus, folder / "corpora" / "bach")
    demo = tiny_study(Path("corpora/bach")) | {"name": "demo"}
    demo["grid"] |= {
        "architectures": {"prefix_simba": None, "cross_transformer": None},
        "sizes": {f"d{width}": {"n_blocks": 1, "d_model": width} for width in (8, 16, 24)},
        "iterations": [4, 8, 16],
    }
    search = {"optimiser.lr": {"choices": [0.01, 0.02]}}
    tuned = demo | {"name": "tune_lr"}
    tuned["tune"] = {"sizes": ["d8", "d16"], "trials": 1, "sampler": "random", "search": search}
    for fields in (demo, tuned):
        path = folder / "sweeps" / f"{fields['name']}.yaml"
        path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    (folder / "profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
    (folder / "recordings").mkdir()
    tone = np.sin(np.arange(16000 * 12) / 20).astype(np.float32)
    for number in range(4):
        soundfile.write(folder / "recordings" / f"{number}.wav", tone * (0.2 + 0.2 * number), 16000)
    captions = "".join(f"{number}.wav,Tone {number}\n" for number in range(4))
    (folder / "captions.csv").write_text("file,caption\n" + captions, encoding="utf-8")
    (folder / "captions.txt").write_text("A tone\nAnother tone\n", encoding="utf-8")
    (folder / ".venv").symlink_to(sys.prefix)
    words = ["submit", "sweeps/demo.yaml", "--on", "local"]
    subprocess.run([sys.executable, "-m", "harness", *words], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> str:
    """Id of a finished run of the demo."""
    status = subprocess.check_output(
        [sys.executable, "-m", "harness", "status", "demo", "--json"], cwd=folder
    )
    return next(row["run_id"] for row in json.loads(status)["runs"] if row["state"] == "done")


@pytest.mark.parametrize("command", dict.fromkeys(printed_commands()))
def test_a_printed_command_runs(
    command: str,
    folder: Path,
    finished: str,
    devcluster: DevCluster,
    ssmscale: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    activated = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    for name, value in {**devcluster.env, **activated, "RUN": finished}.items():
        monkeypatch.setenv(name, value)
    program, *words = shlex.split(command)
    for pattern, replacement in ADAPTED:
        command = re.sub(pattern, replacement, command)
    if command.startswith("ssmscale serve"):
        assert '"harness", "serve"' in (Path(__file__).parent / "servers.py").read_text()  # runs until Ctrl-C
    elif program == "ssmscale":
        answer = ssmscale(*(finished if word == "$RUN" else word for word in shlex.split(command)[1:]))
        problems = (
            1 if words[0] == "doctor" else 0
        )  # this cluster shares no file system, which doctor reports
        assert answer.status <= problems, f"{command}\n{answer.err}\n{answer.out}"
    elif program == "make":
        makefile = (REPOSITORY / "Makefile").read_text().replace("$(VENV)", ".venv")
        assert re.search(rf"^{re.escape(words[0])}:", makefile, re.M)
    elif program == "pip":
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        named = {name for found in re.findall(r"\[([a-z,]+)\]", command) for name in found.split(",")}
        assert named <= extras.keys()
    else:
        if program == "python":
            command = f"{command} && {command.replace(' up ', ' down ')}"  # the cluster it starts
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}\n{done.stdout}"
