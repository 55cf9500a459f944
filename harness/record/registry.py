"""Studies under ROOT: a study opened from its YAML or by its name, resolved to its Runs, and registered as submitted.

scale_up.json and tuned.json of a study are read and written here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.common.disk import naming_a_full_disk, write_atomically
from harness.record.root import Root, read_model_if_there
from harness.study.grid import UNKNOWN_FINGERPRINT, CorpusView, GridPoint, expand, view_corpus
from harness.study.run import Digest, Frozen
from harness.study.schema import Study, load_study
from harness.study.tune import Tuned
from ssmttm.corpus.manifest import load_manifest, verify_corpus
from ssmttm.errors import InputError


def open_study(
    study: str, root: Path | None, changes: Sequence[str] | None, *, fetch: bool = True
) -> ResolvedStudy:
    """Open a study from its YAML, or by the name it was submitted under; `fetch` as for `resolve`."""
    path = Path(study)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        loaded = load_study(path, changes or ())
        return resolve(loaded, Root(root or loaded.root or Path("runs")), study, fetch=fetch)
    is_name = "/" not in study and not study.startswith(".")
    found = resolve_registered(Root(root or Path("runs")), study) if is_name else None
    if found is None:
        raise InputError(
            f"{study}: neither a file nor the name of a study under {(root or Path('runs')) / 'studies'}"
        )
    if changes:
        raise InputError(f"{study}: --set changes a YAML file; this is a study as it was submitted")
    return found


def place_of(study: str, root: Path | None, changes: Sequence[str] | None = None) -> tuple[Study, Root]:
    """A study and where its runs are kept; neither its corpus nor a submission is needed."""
    path = Path(study)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        loaded = load_study(path, changes or ())
        return loaded, Root(root or loaded.root or Path("runs"))
    resolved = open_study(study, root, changes)
    return resolved.study, resolved.root


def registered(study: str, root: Path | None, *, fetch: bool = False) -> ResolvedStudy:
    """Open a study as it was submitted; the YAML itself where it was not, `fetch` as for `resolve`."""
    path = Path(study)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        loaded = load_study(path)
        place = Root(root or loaded.root or Path("runs"))
        return resolve_registered(place, loaded.name) or resolve(loaded, place, study, fetch=fetch)
    return open_study(study, root, None)


class Registration(Frozen):
    """ROOT/studies/NAME/study.json: a study as it was submitted, and what it found of corpus and encoder then."""

    study: Study
    corpus: CorpusView
    text_encoder: Digest | None = None
    tuned: Tuned | None = None
    """The learning rates it was submitted with, where it leaves them to tuning: tuning again moves no Run of it."""

    def expand(self, where: str) -> tuple[GridPoint, ...]:
        """Every Run of the grid; raises InputError beginning with `where`."""
        return tuple(expand(self.study, self.corpus, self.text_encoder, where, self.tuned))


@dataclass(frozen=True)
class ResolvedStudy:
    """A study with the Runs it stands for here."""

    study: Study
    root: Root
    corpus: CorpusView
    text_encoder: str | None
    """Fingerprint of the frozen text encoder."""
    points: tuple[GridPoint, ...]
    where: str
    """Name in errors: the file it was read from."""
    tuned: Tuned | None = None
    """Source of its learning rates, where it leaves them to tuning."""


def resolve(study: Study, root: Root, where: str, *, fetch: bool = True) -> ResolvedStudy:
    """Find the study's corpus and encoder and expand its grid; raises InputError where that cannot be.

    fetch: whether an encoder that is not here is fetched; else Runs that need it have no identity, and nothing is
    written.
    """
    corpus = view_corpus(study, where)
    text = text_of(study, root, corpus, where, fetch=fetch)
    tuned = (read_tuned(root, study.name) or submitted_with(root, study.name)) if study.uses_tuned else None
    points = tuple(expand(study, corpus, text, where, tuned))
    return ResolvedStudy(study, root, corpus, text, points, where, tuned)


def trials_name(study_name: str) -> str:
    """Name of the trials of a study's tuning: a place of their own below the study's, and no study's name."""
    return f"{study_name}/tune"


def submitted_with(root: Root, name: str) -> Tuned | None:
    """The learning rates a study of that name was last submitted with, here or where it was imported from."""
    held = read_model_if_there(root.study(name) / "study.json", Registration)
    return held.tuned if held else None


def resolve_registered(root: Root, name: str) -> ResolvedStudy | None:
    """The study of that name as it was last submitted, or None; its corpus need not be here any more."""
    path = root.study(name) / "study.json"
    held = read_model_if_there(path, Registration)
    if held is None:
        return None
    points, where = held.expand(str(path)), str(path)
    return ResolvedStudy(held.study, root, held.corpus, held.text_encoder, points, where, held.tuned)


def text_of(study: Study, root: Root, corpus: CorpusView, where: str, *, fetch: bool = True) -> str | None:
    """Fingerprint of the study's frozen text encoder, None without one; raises what `text_fingerprint` raises.

    Unknown where the encoder would have to be fetched and `fetch` is false, and where the corpus is not known: then no
    Run has an identity, and planning needs no encoder.
    """
    if study.text.encoder == "bytes":
        return None
    from ssmttm.text.encoder_files import encoder_is_here

    text = study.text
    if not corpus.is_known or not (fetch or text.fingerprint is not None or encoder_is_here(text.encoder)):
        return UNKNOWN_FINGERPRINT
    return text_fingerprint(study, root, where, remember=fetch)


def text_fingerprint(study: Study, root: Root, where: str, *, remember: bool = True) -> str:
    """Fingerprint of the study's frozen text encoder, from the study or from the weights; `remember` what they hash to.

    Raises InputError where the weights are not to be had or have another width than the study says.
    """
    if study.text.fingerprint is not None:
        return study.text.fingerprint
    from ssmttm.text.encoder_files import encoder_fingerprint, encoder_width

    encoder = study.text.encoder
    try:
        fingerprint = encoder_fingerprint(root.text, encoder, remember=remember)
        width = encoder_width(encoder)
    except InputError as error:
        raise InputError(f"{where}: text.encoder: {error}") from error
    if width not in {None, study.text.dim}:
        raise InputError(f"{where}: text.dim: {study.text.dim}: {encoder} gives embeddings of width {width}")
    return fingerprint


def check_before_training(resolved: ResolvedStudy) -> None:
    """Raise InputError unless the corpus is here and whole: what planning can do without, training cannot."""
    path = resolved.study.corpus.path
    if not resolved.corpus.is_known:
        raise InputError(
            f"{resolved.where}: corpus.path: {path}: is not here; build it with `ssmscale data build` or correct it"
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


def register(resolved: ResolvedStudy) -> None:
    """Keep the study as submitted under ROOT/studies, where the later verbs find it."""
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
    path = resolved.root.study(study.name) / "study.json"
    text = json.dumps(document, indent=1) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def read_tuned(root: Root, study_name: str) -> Tuned | None:
    """tuned.json of a study, or None; raises InputError where it is damaged."""
    return read_model_if_there(root.study(study_name) / "tuned.json", Tuned)


def record_path(root: Root, study: str) -> Path:
    """Path of a study's scale_up.json: every step up that was proposed, oldest first and never changed."""
    return root.study(study) / "scale_up.json"


def read_records(root: Root, study: str) -> list[dict[str, Any]]:
    """Read what was proposed, each with when it was (`made`); raises InputError where the file is no such list."""
    path = record_path(root, study)
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        records = None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(
            f"{path}: is not the list of proposals that `ssmscale scale-up` writes; move it away"
        )
    return records


def add_record(root: Root, study: str, proposed: Mapping[str, Any]) -> None:
    """Add a proposal under a lock, unless it repeats the newest; raises DiskFull."""
    path = record_path(root, study)
    with naming_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            records = read_records(root, study)
            if records and {key: value for key, value in records[-1].items() if key != "made"} == proposed:
                return
            records.append({"made": datetime.now(UTC).isoformat(timespec="seconds"), **proposed})
            write_atomically(path, json.dumps(records, indent=1, allow_nan=False) + "\n")
