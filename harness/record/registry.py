"""Studies under ROOT: opened from a YAML file or by name, resolved to their Runs, registered when submitted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.common.disk import make_folder, naming_a_full_disk, write_atomically
from harness.common.format import hint
from harness.common.validation import with_home
from harness.record.root import Root, read_model_if_there, read_run
from harness.record.trust import believe
from harness.study.grid import UNKNOWN_FINGERPRINT, CorpusView, GridPoint, expand, view_corpus
from harness.study.run import Digest, Frozen
from harness.study.schema import Study, load_study
from harness.study.tune import Tuned
from ssmttm.corpus.manifest import load_manifest, verify_corpus
from ssmttm.errors import InputError
from ssmttm.files import read_document
from ssmttm.locks import file_lock


def open_study(
    study: str, root: Path | None, changes: Sequence[str] | None, *, fetch: bool = True
) -> ResolvedStudy:
    """Open a study from its YAML, or by the name it was submitted under; `fetch` as for `resolve`."""
    if loaded := _load(study, root, changes):
        return resolve(*loaded, study, fetch=fetch)
    is_name = study.removesuffix(TRIALS).count("/") == 0 and not study.startswith(".")
    place = root or Path("runs")
    found = resolve_registered(Root(place), study) if is_name else None
    if found is None:
        raise InputError(
            f"{study}: there is no such file, and no study of that name under {place / 'studies'}"
        )
    if changes:
        raise InputError(f"{study}: --set works with a YAML file, not with the name of a submitted study")
    return found


def _load(study: str, root: Path | None, changes: Sequence[str] | None = None) -> tuple[Study, Root] | None:
    """Load a study and its ROOT from its YAML; None if `study` is a name."""
    path = with_home(Path(study))
    if path.suffix not in {".yaml", ".yml"} and not path.is_file():
        return None
    loaded = load_study(path, changes or ())
    return loaded, Root(root or loaded.root or Path("runs"))


def place_of(study: str, root: Path | None, changes: Sequence[str] | None = None) -> tuple[Study, Root]:
    """Return a study and its ROOT; a YAML file needs neither its corpus nor a submission.

    Raises InputError if the study is opened by name and its record is not believed.
    """
    if loaded := _load(study, root, changes):
        return loaded
    resolved = open_study(study, root, changes)
    _believe_record(resolved)
    return resolved.study, resolved.root


def registered(study: str, root: Path | None, *, fetch: bool = False) -> ResolvedStudy:
    """Open a study as it was submitted, else the YAML itself; `fetch` as for `resolve`."""
    if loaded := _load(study, root):
        return resolve_registered(loaded[1], loaded[0].name) or resolve(*loaded, study, fetch=fetch)
    return open_study(study, root, None)


def to_retry(study: str, root: Path | None) -> ResolvedStudy:
    """Open a study as it was submitted; a YAML with the same Runs gives its resources, tracking and root."""
    held = registered(study, root, fetch=True)
    loaded = _load(study, root)
    if loaded is None or held.record is None:
        return held
    written = resolve(*loaded, study)
    same = {point.run_id for point in written.points} == {point.run_id for point in held.points}
    return written if same else held


class Registration(Frozen):
    """ROOT/studies/NAME/study.json: a study as it was submitted, with its corpus and encoder at that time."""

    study: Study
    corpus: CorpusView
    text_encoder: Digest | None = None
    tuned: Tuned | None = None
    """Tuned learning rates it was submitted with; later tuning changes none of its Runs."""

    def expand(self, where: str) -> tuple[GridPoint, ...]:
        """Return every Run of the grid; raises InputError beginning with `where`."""
        return tuple(expand(self.study, self.corpus, self.text_encoder, where, self.tuned))


@dataclass(frozen=True)
class ResolvedStudy:
    """A study with all its Runs."""

    study: Study
    root: Root
    corpus: CorpusView
    text_encoder: str | None
    """Fingerprint of the frozen text encoder."""
    points: tuple[GridPoint, ...]
    where: str
    """The file it was read from, for messages."""
    tuned: Tuned | None = None
    """Source of its tuned learning rates."""
    record: Path | None = None
    """The study.json it was read from; None if it was read from the user's YAML."""

    @property
    def places(self) -> dict[str, Path]:
        """The paths that its tasks need, each by the name that the user knows; they write below the first."""
        return {"--root": self.root.path, "corpus.path": self.study.corpus.path}


def resolve(study: Study, root: Root, where: str, *, fetch: bool = True) -> ResolvedStudy:
    """Find the study's corpus and encoder, downloaded only with `fetch`, and expand its grid; raises InputError."""
    corpus = view_corpus(study, where)
    text = text_of(study, root, corpus, where, fetch=fetch)
    tuned = None
    if study.uses_tuned:
        held = read_model_if_there(root.study(study.name) / "tuned.json", Tuned)
        tuned = held or submitted_with(root, study.name)
    points = tuple(expand(study, corpus, text, where, tuned))
    return ResolvedStudy(study, root, corpus, text, points, where, tuned)


TRIALS = "/tune"


def trials_name(study_name: str) -> str:
    """Return the name of the trials of a study's tuning: a folder within the study's, which no study can be called."""
    return f"{study_name}{TRIALS}"


def record_trial(root: Root, study_name: str, number: int, points: Sequence[GridPoint]) -> None:
    """Record a trial of a study's tuning, from which `resolve_registered` finds its Runs."""
    architecture, size = points[0].architecture, points[0].size
    runs = [point.run_id for point in points]
    control = root.control(trials_name(study_name))
    control.append("trial", trial=number, architecture=architecture, size=size, runs=runs)


def _points_of_trials(root: Root, name: str) -> tuple[GridPoint, ...]:
    """Return the Runs of all trials that were submitted, each once."""
    found: dict[str, GridPoint] = {}
    for event in root.control(name).read():
        for run_id in event.get("runs", ()) if event["event"] == "trial" else ():
            if run_id not in found and (root.run(run_id) / "run.json").exists():
                run = read_run(root.run(run_id))
                found[run_id] = GridPoint(event["architecture"], event["size"], run, run_id, run.series_id)
    return tuple(found.values())


def submitted_with(root: Root, name: str) -> Tuned | None:
    """Return the tuned learning rates that a study of that name was last submitted with."""
    held = read_model_if_there(root.study(name) / "study.json", Registration)
    return held.tuned if held else None


def resolve_registered(root: Root, name: str) -> ResolvedStudy | None:
    """Return the study of that name, or of a study's trials, as it was last submitted, or None.

    Its corpus may be gone.
    """
    path = root.study(name) / "study.json"
    held = read_model_if_there(path, Registration)
    if held is None:
        return None
    where, study = str(path), held.study
    if name.endswith(TRIALS):
        study, points = study.model_copy(update={"name": name}), _points_of_trials(root, name)
    else:
        points = held.expand(where)
    return ResolvedStudy(study, root, held.corpus, held.text_encoder, points, where, held.tuned, path)


def text_of(study: Study, root: Root, corpus: CorpusView, where: str, *, fetch: bool = True) -> str | None:
    """Return the fingerprint of the study's frozen text encoder, from the study or the weights; None without one.

    Return UNKNOWN_FINGERPRINT if the corpus is not known, or if the encoder would have to be downloaded without
    `fetch`: no Run then has an identity. Raises InputError if the weights are missing or of another width.
    """
    text = study.text
    if text.encoder == "bytes":
        return None
    from ssmttm.text.encoder_files import encoder_fingerprint, encoder_is_here, encoder_width

    if not corpus.is_known or not (fetch or text.fingerprint is not None or encoder_is_here(text.encoder)):
        return UNKNOWN_FINGERPRINT
    if text.fingerprint is not None:
        return text.fingerprint
    try:
        fingerprint = encoder_fingerprint(root.text, text.encoder, remember=fetch)
        width = encoder_width(text.encoder)
    except InputError as error:
        raise InputError(f"{where}: text.encoder: {error}") from error
    if width not in {None, text.dim}:
        raise InputError(f"{where}: text.dim: {text.dim}: {text.encoder} gives embeddings of width {width}")
    return fingerprint


def check_before_training(resolved: ResolvedStudy) -> None:
    """Raise InputError unless the study is believed, and its corpus here, whole and unchanged since the submission."""
    _believe_record(resolved)
    if resolved.record is not None and resolved.study.name.endswith(TRIALS):
        raise InputError(f"{resolved.study.name}: `ssmscale tune` alone trains these trials")
    path = resolved.study.corpus.path
    if not resolved.corpus.is_known:
        raise InputError(
            f"{resolved.where}: corpus.path: {path}: does not exist; correct it, or build the corpus with "
            f"{hint('data', 'build', '--out', str(path))}"
        )
    try:
        manifest = load_manifest(path)
        verify_corpus(path, manifest)
    except InputError as error:
        raise InputError(f"{resolved.where}: corpus.path: {error}") from error
    for split in ("train", "valid"):
        if split not in manifest.splits or not manifest.splits[split].clips:
            raise InputError(f"{resolved.where}: corpus.path: {path}: its split {split!r} has no clips")
    if manifest.fingerprint != resolved.corpus.fingerprint:
        raise InputError(f"{resolved.where}: corpus.path: {path}: has changed since the study was submitted")


def _believe_record(resolved: ResolvedStudy) -> None:
    if resolved.record is not None:
        believe(resolved.record, "what is trained, and by which programs", "submit the study's YAML file")


def register(resolved: ResolvedStudy, name: str | None = None) -> None:
    """Write study.json, from which later verbs open the study, under its own name or another; identify a new ROOT."""
    resolved.root.identity()
    study = resolved.study
    fields = study.model_dump(mode="json", exclude_unset=True)
    fields["corpus"]["path"] = str(study.corpus.path.absolute())
    if Path(study.text.encoder).is_dir():
        fields["text"]["encoder"] = str(Path(study.text.encoder).absolute())
    document = {
        "study": fields,
        "corpus": resolved.corpus.model_dump(),
        "text_encoder": resolved.text_encoder,
    }
    if resolved.tuned is not None:
        document["tuned"] = resolved.tuned.model_dump(mode="json")
    path = resolved.root.study(name or study.name) / "study.json"
    text = json.dumps(document, indent=1) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def record_path(root: Root, study: str) -> Path:
    """Return the path of a study's scale_up.json: all proposals of `ssmscale scale-up`, oldest first."""
    return root.study(study) / "scale_up.json"


def read_records(root: Root, study: str) -> list[dict[str, Any]]:
    """Read all proposals, each with its time (`made`); raises InputError if the file is not a list of them."""
    path = record_path(root, study)
    if not path.exists():
        return []
    try:
        return TypeAdapter(list[dict[str, Any]]).validate_json(read_document(path))
    except ValidationError as error:
        raise InputError(
            f"{path}: is not the list of proposals that `ssmscale scale-up` writes; move it away"
        ) from error


def add_record(root: Root, study: str, proposed: Mapping[str, Any]) -> None:
    """Append a proposal under a lock, unless it equals the newest; raises DiskFull."""
    path = record_path(root, study)
    with naming_a_full_disk(path):
        make_folder(path.parent)
        with file_lock(Path(f"{path}.lock")):
            records = read_records(root, study)
            if records and {key: value for key, value in records[-1].items() if key != "made"} == proposed:
                return
            records.append({"made": datetime.now(UTC).isoformat(timespec="seconds"), **proposed})
            write_atomically(path, json.dumps(records, indent=1, allow_nan=False) + "\n")
