"""Decide what a build may go on with: a finished corpus, an unfinished one, or nothing.

What an earlier try computed stays where it is exact. A track's frames depend on its file and on part of the
specification, not on captions; the fitted codec and the shards depend on all of it and on the tracks of every split.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import JsonValue

from ssmttm.corpus.contents import changed_files
from ssmttm.corpus.manifest import Manifest, load_manifest
from ssmttm.corpus.source import TrackRef
from ssmttm.corpus.spec import differences, reading
from ssmttm.corpus.tracks import TrackRecord, has_record
from ssmttm.errors import InputError
from ssmttm.files import parse_json, read_document, write_atomically

WORK = ".work"
Recipe = dict[str, JsonValue]
_REFUSED, _RECIPE = "refused", "recipe.json"
_NAMED = 3


def finished_corpus(recipe: Recipe, out: Path, audio: Path | None) -> Manifest:
    """Return the manifest of a finished corpus; raises InputError if another recipe or other files made it."""
    manifest = load_manifest(out)
    # Library versions are recorded and not compared: a finished corpus has its fingerprint.
    before = {key: value for key, value in manifest.recipe.items() if key != "made_with"}
    source = recipe["source"]
    if _by_soundfile(manifest) and isinstance(source, dict):
        recipe = recipe | {"source": {key: value for key, value in source.items() if key != "more"}}
    if found := differences(before, recipe):
        raise InputError(
            f"{out}: was built from another specification ({'; '.join(found)}); build elsewhere, or remove it"
        )
    if audio is not None and (changed := changed_files(out, audio)):
        more = f" and {len(changed) - _NAMED:,} more" if len(changed) > _NAMED else ""
        raise InputError(
            f"{out}: was built from other files ({', '.join(changed[:_NAMED])}{more} changed since); build elsewhere, "
            "or remove it"
        )
    return manifest


def _by_soundfile(manifest: Manifest) -> bool:
    """True if a version built the corpus that saw no files of the endings that only FFmpeg reads."""
    made_with = manifest.recipe.get("made_with")
    return isinstance(made_with, dict) and "soundfile" in made_with


def check_claim(recipe: Recipe, out: Path, refs: Sequence[TrackRef]) -> Recipe | None:
    """Return the recipe of an unfinished build if it differs; raise InputError if that build would be lost.

    The versions of libraries are compared if `recipe` has them. An unfinished build is gone on with if only its music
    or captions differ and some of `refs` have been read. There is nothing to lose if no track was read, or if that
    build was refused: its tracks stay if their frames would be these.
    """
    work = out / WORK
    before = recorded_recipe(out)
    if before is None:
        return None
    if "made_with" not in recipe:
        before.pop("made_with", None)
    if found := differences(before, recipe):
        differing = _differing(before, recipe)
        goes_on = differing == {"source"} and any(has_record(work, ref.track) for ref in refs)
        if not goes_on and not (work / _REFUSED).exists() and any(work.glob("tracks/*.json")):
            raise InputError(
                f"{out}: holds an unfinished build from another specification ({'; '.join(found)}); finish that one, "
                "build elsewhere, or remove it"
            )
        return before
    return None


def claim(recipe: Recipe, out: Path, refs: Sequence[TrackRef]) -> None:
    """Record the recipe of this build while no other build runs; raise as `check_claim` does."""
    work = out / WORK
    before = check_claim(recipe, out, refs) or recipe
    if not _differing(before, recipe) <= {"source", "spec"} or _reading(before) != _reading(recipe):
        shutil.rmtree(work / "tracks", ignore_errors=True)
        shutil.rmtree(out / "codec", ignore_errors=True)
    remove_leftovers(out)
    write_atomically(work / _RECIPE, json.dumps(recipe, indent=1).encode())
    (work / _REFUSED).unlink(missing_ok=True)


@contextmanager
def noting_refusal(out: Path) -> Iterator[None]:
    """Note an InputError of the block, which says that this specification makes no corpus of this music."""
    try:
        yield
    except InputError:
        (out / WORK / _REFUSED).touch()
        raise


def keep_only_results_of(
    recipe: Recipe, splits: Mapping[str, Sequence[TrackRecord]], out: Path, *, fitted: bool
) -> None:
    """Remove the shards, and a `fitted` codec, that an earlier try made of other tracks or by another recipe."""
    tracks = {
        split: [(one.track, one.frames, one.file.sha256 if one.file else "") for one in records]
        for split, records in splits.items()
    }
    digest = hashlib.sha256(json.dumps([recipe["spec"], tracks]).encode()).hexdigest().encode()
    path = out / WORK / "splits.sha256"
    if path.is_file() and path.read_bytes() == digest:
        return
    for folder in ("shards", "codec") if fitted else ("shards",):
        shutil.rmtree(out / folder, ignore_errors=True)
    write_atomically(path, digest)


def _reading(recipe: Recipe) -> dict[str, JsonValue] | None:
    spec = recipe.get("spec")
    return reading(spec) if isinstance(spec, dict) else None


def _differing(before: Recipe, recipe: Recipe) -> set[str]:
    return {key for key in before.keys() | recipe.keys() if before.get(key) != recipe.get(key)}


def remove_leftovers(out: Path) -> None:
    """Remove files that killed workers had begun to write, while no other build runs or when all files are there."""
    for leftover in [*out.glob(".*.tmp"), *out.glob("shards/.*.tmp"), *out.glob("codec/.*.tmp")]:
        leftover.unlink(missing_ok=True)


def recorded_recipe(out: Path) -> Recipe | None:
    """Return the recipe of an unfinished build; None if there is none."""
    path = out / WORK / _RECIPE
    if not path.exists():
        return None
    try:
        recipe = parse_json(read_document(path))
    except (OSError, ValueError):
        return {}
    return recipe if isinstance(recipe, dict) else {}
