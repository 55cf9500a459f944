"""Build again: after a refusal, an interruption, other captions or replaced files, by the same command."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ssmttm.corpus import contents, tracks
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.claim import WORK
from ssmttm.corpus.contents import FILES
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.corpus.folder import FolderSource
from ssmttm.corpus.manifest import MANIFEST, Manifest
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.source import TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError

NAMES = [f"{letter}.wav" for letter in "abcd"]


def write_noise(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    soundfile.write(path, 0.1 * rng.standard_normal(3 * 16000), 16000)


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """Four recordings of 3 s and their captions."""
    root = tmp_path / "music"
    root.mkdir()
    for seed, name in enumerate(NAMES):
        write_noise(root / name, seed)
    write_captions(root, NAMES)
    return root


def write_captions(root: Path, names: list[str], header: str = "file,caption", says: str = "Noise") -> None:
    (root / "captions.csv").write_text("\n".join([header, *(f"{name},{says} {name}" for name in names)]))


def spec_for(root: Path, **changed: object) -> BuildSpec:
    small = {"codebooks": 1, "codebook_size": 16, "segment_seconds": 1.0, "valid": 0.25}
    return BuildSpec.model_validate({"source": "folder", "audio": root, **small, **changed})


def build(root: Path, out: Path, progress: Progress | None = None, **changed: object) -> Manifest:
    return build_corpus(spec_for(root, **changed), out, workers=1, progress=progress)


class StopAt(Progress):
    """Stop a build as Ctrl-C does, in a stage after some of its pieces."""

    def __init__(self, stage: str, after: int = 0) -> None:
        self.of, self.left = stage, after
        self.now = ""

    def stage(self, name: str, total: int, done: int) -> None:
        self.now = name
        self._stop()

    def advance(self, seconds: float = 0.0) -> None:
        if self.now == self.of:
            self.left -= 1
        self._stop()

    def _stop(self) -> None:
        if self.now == self.of and self.left <= 0:
            raise KeyboardInterrupt


def stop(root: Path, out: Path, stage: str, after: int = 0, **changed: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(root, out, StopAt(stage, after), **changed)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tracks that were read."""
    found: list[str] = []
    read = FolderSource.open

    def noted(self: FolderSource, ref: TrackRef) -> Any:
        found.append(ref.track)
        return read(self, ref)

    monkeypatch.setattr(FolderSource, "open", noted)
    return found


def test_a_refused_captions_file_does_not_block_the_corrected_one(music: Path, tmp_path: Path) -> None:
    write_captions(music, NAMES, header="file,captoin")
    with pytest.raises(InputError, match="captoin"):
        build(music, tmp_path / "out")
    write_captions(music, NAMES)
    assert build(music, tmp_path / "out").splits["train"].tracks == 3


def test_a_build_that_read_nothing_yet_blocks_no_other(music: Path, tmp_path: Path) -> None:
    stop(music, tmp_path / "out", "read tracks", codebooks=2)
    assert (tmp_path / "out" / WORK / "recipe.json").is_file()
    (tmp_path / "out" / WORK / "recipe.json").write_text("")  # as a power failure may leave it
    assert build(music, tmp_path / "out").codec.n_codebooks == 1


def test_tracks_that_were_read_stay_with_corrected_captions(
    music: Path, tmp_path: Path, reads: list[str]
) -> None:
    write_captions(music, NAMES[:3], says="Wrong")
    stop(music, tmp_path / "out", "write shards", after=1)
    assert reads == NAMES[:3]
    write_captions(music, NAMES)
    made = build(music, tmp_path / "out")
    assert reads == NAMES
    assert made.fingerprint == build(music, tmp_path / "fresh").fingerprint
    for split in made.splits:
        data = TokenDataset(tmp_path / "out", split)
        assert all(clip.caption == f"Noise {clip.track}" for clip in map(data.clip, range(len(data))))


@pytest.mark.parametrize(
    ("wrong", "reads_again"),
    [
        ({"segment_seconds": 20.0}, False),
        ({"valid": 0.9}, False),
        ({"limit": 1}, False),
        ({"codebook_size": 60000}, False),
        ({"segment_seconds": 20.0, "mel_bands": 32}, True),
    ],
    ids=str,
)
def test_a_refused_specification_does_not_block_the_corrected_one(
    music: Path, tmp_path: Path, reads: list[str], wrong: dict[str, Any], reads_again: bool
) -> None:
    with pytest.raises(InputError):
        build(music, tmp_path / "out", **wrong)
    made = build(music, tmp_path / "out")
    assert sorted(reads) == sorted(NAMES * (2 if reads_again else 1))
    assert made.fingerprint == build(music, tmp_path / "fresh").fingerprint
    assert not made.skipped


def test_an_unfinished_build_of_other_music_or_settings_is_not_lost(music: Path, tmp_path: Path) -> None:
    stop(music, tmp_path / "out", "fit codec")
    with pytest.raises(InputError, match=r"unfinished build .*codebooks: 1 before, 2 now.*build elsewhere"):
        build(music, tmp_path / "out", codebooks=2)
    other = tmp_path / "other"
    other.mkdir()
    for seed, name in enumerate(("x.wav", "y.wav")):
        write_noise(other / name, seed)
    write_captions(other, ["x.wav", "y.wav"])
    with pytest.raises(InputError, match=r"unfinished build .*source\.listing"):
        build(other, tmp_path / "out")
    assert build(music, tmp_path / "out").splits["train"].tracks == 3


@pytest.mark.parametrize("stage", ["read tracks", "write shards"])
def test_a_file_that_is_replaced_between_two_tries_is_read_again(
    music: Path, tmp_path: Path, reads: list[str], stage: str
) -> None:
    stop(music, tmp_path / "out", stage, after=1)
    before = len(reads)
    write_noise(music / "a.wav", 99)
    made = build(music, tmp_path / "out")
    assert reads[before:] == (["a.wav"] if before == 4 else NAMES)
    assert made.fingerprint == build(music, tmp_path / "fresh").fingerprint


def test_a_replaced_file_of_the_same_size_and_times_is_another_corpus(music: Path, tmp_path: Path) -> None:
    made = build(music, tmp_path / "out")
    before = (music / "b.wav").stat()
    write_noise(music / "b.wav", 99)
    os.utime(music / "b.wav", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (music / "b.wav").stat().st_size == before.st_size
    with pytest.raises(InputError, match=r"built from other files \(b\.wav changed since\)"):
        build(music, tmp_path / "out")
    write_noise(music / "b.wav", 1)
    assert build(music, tmp_path / "out") == made


def test_a_copied_or_touched_file_is_the_same_corpus_and_hashed_once(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_SETTLED_NS", 0)
    made = build(music, tmp_path / "out")
    copied = tmp_path / "copied"
    shutil.copytree(music, copied)
    assert build(copied, tmp_path / "out") == made
    (copied / "a.wav").touch()
    hashed: list[Path] = []
    plain = contents.sha256_file
    monkeypatch.setattr(contents, "sha256_file", lambda path: (hashed.append(path), plain(path))[1])
    for _ in range(2):
        assert build(copied, tmp_path / "out") == made
    assert hashed == [copied / "a.wav"]


def test_a_file_that_changes_while_it_is_read_is_left_out(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FolderSource.open

    def changing(self: FolderSource, ref: TrackRef) -> Any:
        if ref.track == "a.wav":
            write_noise(ref.path, time.perf_counter_ns())
        return read(self, ref)

    monkeypatch.setattr(FolderSource, "open", changing)
    made = build(music, tmp_path / "out")
    assert [(one.track, one.reason) for one in made.skipped] == [("a.wav", "changed while it was read")]
    assert tracks._TRIES > 1
    monkeypatch.setattr(FolderSource, "open", read)
    with pytest.raises(InputError, match=r"built from other files \(a\.wav changed since\)"):
        build(music, tmp_path / "out")


def test_a_corpus_without_a_record_of_its_files_is_returned_by_names_and_sizes(
    music: Path, tmp_path: Path
) -> None:
    made = build(music, tmp_path / "out")
    (tmp_path / "out" / FILES).unlink()
    manifest = tmp_path / "out" / MANIFEST
    text = manifest.read_text()
    assert '"set_aside":' in text
    manifest.write_text(text.replace(' "set_aside": [],\n', ""))
    write_noise(music / "b.wav", 99)
    assert build(music, tmp_path / "out") == made
