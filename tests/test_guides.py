"""Run every command that README.md and the guides print, as printed, or name the test that runs it."""

from __future__ import annotations

import json
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

from tests.conftest import REPOSITORY, Command
from tests.studies import tiny_study

GUIDES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md"))]
PROGRAMS = ("ssmscale", "python", "make", "pip", "srun", "sbatch", "sed", "source")

ELSEWHERE = {
    "ssmscale serve": "cluster/test_serve.py",
    "python -m slurm.devcluster": "cluster/conftest.py",
    "srun torchrun": "cluster/slurm_study.py",
    "sbatch": "cluster/test_slurm.py",
    "source .venv/bin/activate": "checkouts.py",
}
"""Commands that need servers or an environment of their own, and the file of tests that has them."""

ADAPTED = [
    (r"--ray-address \S+", "--cluster h100x8"),
    (r"(--on (slurm|ray|auto)\b.*)", r"\1 --dry-run --yes"),  # those nodes are not here
    (r"--budget \S+", "--budget 0.001"),  # GPU-hours of a tiny study
    (r"--limit \d+", "--limit 2"),
    (r"/shared/runs", "runs"),
]
"""Changes that make a printed command fit the small studies in this folder."""


def printed_commands() -> Iterator[tuple[str, str]]:
    """Yield the guide and the text of each command in the guides' indented blocks, comments left out."""
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^    (?:\$ )?(\S.*)$", text, re.M):
            for command in re.split(r";\s+", re.split(r"\s+# ", line)[0]):
                words = [word for word in command.split() if not re.match(r"[A-Z_]+=", word)]
                if words and words[0] in PROGRAMS:
                    yield str(guide.relative_to(REPOSITORY)), " ".join(command.split())


COMMANDS = list(dict.fromkeys(printed_commands()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """A folder with all that the guides speak of, small: studies, a corpus, recordings, and the demo trained."""
    folder = tmp_path_factory.mktemp("guides")
    for name in ("sweeps", "slurm"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copytree(tiny_corpus, folder / "corpora" / "bach")
    demo = tiny_study(Path("corpora/bach")) | {"name": "demo", "resources": {"jobs": 1}}
    demo["grid"] |= {
        "architectures": {"prefix_simba": None, "cross_transformer": None},
        "sizes": {f"d{width}": {"n_blocks": 1, "d_model": width} for width in (8, 16, 24)},
        "iterations": [4, 8, 16],
    }
    tuned = demo | {"name": "tune_lr", "tune": {"sizes": ["d8", "d16"], "trials": 1, "sampler": "random"}}
    tuned["tune"]["search"] = {"optimiser.lr": {"choices": [0.01]}}
    for fields in (demo, tuned):
        (folder / "sweeps" / f"{fields['name']}.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    (folder / "recordings").mkdir()
    tone = np.sin(np.arange(16000 * 12) / 20).astype(np.float32)
    for number in range(4):
        soundfile.write(folder / "recordings" / f"{number}.wav", tone * (0.2 + 0.2 * number), 16000)
    (folder / "captions.csv").write_text("file,caption\n" + "".join(f"{n}.wav,Tone {n}\n" for n in range(4)))
    (folder / "captions.txt").write_text("A tone\nAnother tone\n")
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


@pytest.mark.parametrize(("guide", "command"), COMMANDS)
def test_a_printed_command_runs(
    guide: str, command: str, folder: Path, finished: str, ssmscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prefix, file in ELSEWHERE.items():
        if command.startswith(prefix):
            assert (REPOSITORY / "tests" / file).is_file()
            return
    monkeypatch.chdir(folder)
    if command.startswith("ssmscale"):
        for pattern, replacement in ADAPTED:
            command = re.sub(pattern, replacement, command)
        answer = ssmscale(*(finished if word == "RUN" else word for word in shlex.split(command)[1:]))
        assert answer.status == 0, (command, answer.err, answer.out)
    elif command.startswith("sed"):
        subprocess.run(["sh", "-c", command], check=True)
    elif command.startswith("make"):
        target = command.split()[1]
        assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.M)
    elif "pip" in command:
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        named = {name for found in re.findall(r"\[([a-z,]+)\]", command) for name in found.split(",")}
        assert named <= extras.keys()
    else:
        pytest.fail(f"{guide} prints {command!r}, which no test runs")
