"""Names that a user types: completed by the shell, and corrected where they are mistyped; help that shows how."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from harness.cli.app import FIRST_STEPS, VERBS, app, load_verb
from harness.record.root import Root
from tests.conftest import REPOSITORY, Command, Write
from tests.harness.journals import registered
from tests.studies import Fields

HEAVY = {
    "torch",
    "deepspeed",
    "ray",
    "mlflow",
    "transformers",
    "numpy",
    "pandas",
    "scipy",
    "matplotlib",
    "plotly",
}
BASE = {"pydantic", "yaml", "filelock", "psutil", "analysis", "ssmttm"}
PROGRAM = """
import sys
unneeded = set(sys.argv.pop(1).split())
sys.argv[0] = "ssmscale"
from harness.cli.app import main
try:
    main()
finally:
    sys.stderr.write(" ".join(unneeded & set(sys.modules)))
"""


@pytest.fixture
def run_ids(tmp_path: Path, study_fields: Fields, write_study: Write) -> list[str]:
    """Ids of a submitted study's runs, whose YAML lies in ./sweeps."""
    (tmp_path / "sweeps").mkdir()
    write_study(study_fields, "sweeps/tiny.yaml")
    return [point.run_id for point in registered(Root(tmp_path / "runs"), study_fields).points]


@pytest.mark.usefixtures("run_ids")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("re", ["retry", "report"]),
        ("status --wa", ["--watch"]),
        ("status ti", ["tiny"]),
        ("plan sw", ["sweeps/tiny.yaml"]),
        ("cancel unknown ", []),
        ("status --root elsewhere ti", []),
    ],
)
def test_the_shell_completes_verbs_options_and_studies(
    words: str,
    offered: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in asked_by_bash(words).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        typer.main.get_command(app)(prog_name="ssmscale")
    assert capsys.readouterr().out.split() == offered


def asked_by_bash(words: str) -> dict[str, str]:
    words = f"ssmscale {words}"
    return {"_SSMSCALE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}


def run(folder: Path, *arguments: str, unneeded: set[str] = HEAVY, **environment: str) -> str:
    """Call the command in a process of its own, which imports nothing of `unneeded`, and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, " ".join(unneeded), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.usefixtures("run_ids")
@pytest.mark.parametrize("words", ["--help", "plan sweeps/tiny.yaml", "status tiny"])
def test_the_light_verbs_import_nothing_heavy(words: str, tmp_path: Path) -> None:
    run(tmp_path, *words.split(), unneeded=HEAVY | (BASE if words == "--help" else set()))


def test_the_shell_completes_run_ids_without_importing_anything_heavy(
    tmp_path: Path, run_ids: list[str]
) -> None:
    assert run(tmp_path, **asked_by_bash(f"logs tiny {run_ids[1][:4]}")).split() == [run_ids[1]]


def test_a_completion_script_is_printed_on_request(tmp_path: Path) -> None:
    shown = run(tmp_path, "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_SSMSCALE_COMPLETE=complete_bash" in shown


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("statis tiny", "'status'"),
        ("data biuld", "'build'"),
        ("status tiny --wach", "--watch"),
        ("status tinny", "did you mean tiny?"),
        ("plan sweeps/tinny.yaml", "did you mean sweeps/tiny.yaml?"),
        ("plan sweeps/tiny.yaml --set training.bacth=16", "did you mean 'batch'?"),
    ],
)
@pytest.mark.usefixtures("run_ids")
def test_a_mistyped_word_is_answered_with_the_nearest_known_one(
    words: str, offered: str, ssmscale: Command
) -> None:
    ssmscale(*words.split()).assert_refused(offered)


def test_a_mistyped_run_id_is_answered_with_the_nearest_one(run_ids: list[str], ssmscale: Command) -> None:
    first = run_ids[0]
    wrong = first[:7] + ("0" if first[7] != "0" else "1") + first[8:]
    ssmscale("logs", "tiny", wrong).assert_refused(f"did you mean {first}?")
    ssmscale("cancel", "tiny", wrong[:8]).assert_refused(f"did you mean {first}?")
    assert "did you mean" not in ssmscale("status", "entirely-different").err


def test_the_command_alone_tells_a_newcomer_what_to_do_first(ssmscale: Command) -> None:
    answer = ssmscale()
    assert (answer.status, answer.out.strip()) == (0, FIRST_STEPS)
    assert len(answer.out.splitlines()) <= 15


def commands_in(text: str) -> Iterator[list[str]]:
    for command in re.findall(r"^ *ssmscale (.+?)(?:  |$)", text.replace("\\\n", ""), re.MULTILINE):
        yield shlex.split(command)


COMMANDS = [
    *commands_in(FIRST_STEPS.partition("\n")[2]),
    *([name, *shlex.split(example)] for name, verb in VERBS.items() for example in verb.examples),
    *(command for sub in load_verb("data").commands.values() for command in commands_in(sub.epilog)),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_that_the_help_shows_is_one_of_its_own(words: list[str]) -> None:
    command = load_verb(words[0])
    rest = words[1:]
    if words[0] == "data":
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(words[0], rest)


def test_the_help_of_each_verb_shows_examples(ssmscale: Command) -> None:
    assert all(verb.examples for name, verb in VERBS.items() if name != "data")
    shown = ssmscale("prune", "-h").out
    assert "ssmscale prune demo --dry-run" in shown


def options() -> Iterator[tuple[str, Any]]:
    for name in VERBS:
        command = load_verb(name)
        for verb in getattr(command, "commands", {name: command}).values():
            yield from (
                (verb.name, parameter) for parameter in verb.params if parameter.param_type_name == "option"
            )


def test_one_letter_stands_for_the_same_option_in_every_verb() -> None:
    letters: defaultdict[str, set[str]] = defaultdict(set)
    names: defaultdict[str, set[str]] = defaultdict(set)
    for _, option in options():
        long, *short = sorted(option.opts, key=len, reverse=True)
        names[long].add("".join(short))
        for letter in short:
            letters[letter].add(long)
    assert all(len(found) == 1 for found in letters.values()), letters
    assert all(len(found) == 1 for found in names.values()), names


def test_the_version_names_the_commit_and_the_build_of_torch_without_importing_it(tmp_path: Path) -> None:
    first, second = run(tmp_path, "--version").splitlines()
    assert re.fullmatch(r"ssmscale \d+\.\d+\.\d+( \(commit [0-9a-f]{12}(, with changes)?\))?", first)
    assert re.fullmatch(r"Python \d\.\d+\.\d+, torch \d\S+, (built without CUDA|CUDA \S+)", second)
