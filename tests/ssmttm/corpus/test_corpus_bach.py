"""The source `bach`: real scores become corpora that are complete and the same every time."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from ssmttm.corpus.bach import BachSource
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.corpus.describe import describe
from ssmttm.corpus.manifest import load_manifest, verify_corpus
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError
from tests.waiting import is_running, wait_until

BUILD = """
import sys
from pathlib import Path
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.spec import BuildSpec
if __name__ == "__main__":
    build_corpus(BuildSpec.model_validate_json(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]))
"""


def _track(spec: BuildSpec, name: str):  # type: ignore[no-untyped-def]
    source = BachSource(spec)
    return source.open(next(ref for ref in source.tracks()[0] if ref.track == name))


def pieces_of(dataset: TokenDataset) -> set[str]:
    return {re.split("[-#]", dataset.clip(i).track)[0] for i in range(len(dataset))}


def _records(corpus: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (corpus / ".work/tracks").glob("*.json")}


def test_a_corpus_holds_what_its_manifest_says(bach_corpus: Path) -> None:
    manifest = load_manifest(bach_corpus)
    verify_corpus(bach_corpus, manifest)
    dataset = TokenDataset(bach_corpus, "train")
    codes, lengths = dataset.codes(range(len(dataset))), dataset.lengths(range(len(dataset)))
    assert codes.shape == (len(dataset), 2, 250)
    assert codes.max() < 64
    assert lengths.max() == 250
    assert lengths.min() >= 125
    assert all((clip[:, n:] == 0).all() for clip, n in zip(codes, lengths, strict=True))
    assert not (bach_corpus / ".work").exists()
    report = json.loads((bach_corpus / "build.json").read_text())
    assert set(report["seconds"]) == {"read tracks", "fit codec", "write shards", "all"}
    assert report["parent_peak_mib"] > 10


def test_captions_give_the_facts_of_the_score() -> None:
    spec = BuildSpec(source="bach")
    captions = _track(spec, "bach/bwv269").facts.captions
    assert len(set(captions)) == len(captions) > 2
    facts = ["aus meines herzens grunde", "g major", "3/4", "90", "soprano, alto, tenor and bass", "{part}"]
    for caption in captions:
        assert all(fact in caption.lower() for fact in facts)


def test_a_piece_is_in_one_split_and_captions_give_the_place_of_a_clip_in_it(bach_corpus: Path) -> None:
    train, valid = (TokenDataset(bach_corpus, split) for split in ("train", "valid"))
    assert pieces_of(train)
    assert pieces_of(valid)
    assert not pieces_of(train) & pieces_of(valid)
    captions = train.captions(range(len(train)))
    assert not any("{part}" in caption for caption in captions)
    for place in ("opening of", "passage from", "close of"):
        assert any(place in caption.lower() for caption in captions)


def test_licences_are_named_and_reserved_scores_are_left_out(bach_corpus: Path) -> None:
    manifest = load_manifest(bach_corpus)
    assert manifest.licences
    assert all("GPL-2.0" in licence and "music21" in licence for licence in manifest.licences)
    clip = TokenDataset(bach_corpus, "valid").clip(0)
    assert clip.licence in manifest.licences
    skipped = {one.track: one.reason for one in manifest.skipped}
    assert "reserves the rights" in skipped["bach/bwv366"]


def test_renderings_vary_only_if_the_specification_says_so() -> None:
    plain = BuildSpec(source="bach")
    varied = plain.model_copy(update={"transpose": True, "orchestrate": True, "versions": 8})
    own = _track(plain, "bach/bwv269").facts
    others = [_track(varied, f"bach/bwv269#{n}").facts for n in range(8)]
    assert "G major" in own.captions[0]
    assert "soprano" in own.captions[0].lower()
    assert len({tuple(sorted(facts.captions)) for facts in others}) > 5
    assert not any("soprano" in facts.captions[0].lower() for facts in others)
    assert {facts.content for facts in others} == {own.content}  # still the same music


def test_versions_of_a_score_stay_in_one_split(tmp_path: Path) -> None:
    sizes = {"codebooks": 1, "codebook_size": 16, "segment_seconds": 5, "valid": 0.25}
    spec = BuildSpec(source="bach", limit=4, versions=3, transpose=True, **sizes)
    manifest = build_corpus(spec, tmp_path / "c", workers=1)
    assert manifest.splits["train"].tracks == 9
    assert manifest.splits["valid"].tracks == 3
    assert len(pieces_of(TokenDataset(tmp_path / "c", "valid"))) == 1


def test_building_a_finished_corpus_imports_no_library_of_the_build(
    bach_corpus: Path, bach_spec: BuildSpec
) -> None:
    before = (bach_corpus / "manifest.json").stat().st_mtime_ns
    heavy = "{'torch', 'music21', 'sklearn', 'symusic', 'scipy'} & set(sys.modules)"
    command = [sys.executable, "-c", f"{BUILD}    assert not {heavy}", bach_spec.model_dump_json()]
    subprocess.run([*command, str(bach_corpus), "1"], check=True)
    assert (bach_corpus / "manifest.json").stat().st_mtime_ns == before


def test_a_killed_build_of_two_workers_is_continued_by_one_to_the_same_corpus(
    bach_corpus: Path, bach_spec: BuildSpec, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-c", BUILD, bach_spec.model_dump_json(), str(out), "2"]
    child = subprocess.Popen(command, start_new_session=True)
    wait_until(lambda: len(_records(out)) >= 2 or child.poll() is not None, at_once=True)
    child.kill()
    child.wait()
    wait_until(lambda: not _alive(child.pid))  # its workers end by themselves
    before = _records(out)
    assert len(before) >= 2
    assert not (out / "manifest.json").exists()
    read: list[int] = []

    class Count(Progress):
        def stage(self, name: str, total: int, done: int) -> None:
            if name == "read tracks":
                read.extend([total, done])
                assert {k: v for k, v in _records(out).items() if k in before} == before

    manifest = build_corpus(bach_spec, out, workers=1, progress=Count())
    assert read == [6, len(before)]
    assert manifest.fingerprint == load_manifest(bach_corpus).fingerprint


def _alive(session: int) -> bool:
    """Return True if a process of this session is alive, zombies excepted."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and is_running(process):
                return True
    return False


def test_two_builds_do_not_write_one_corpus(bach_spec: BuildSpec, tmp_path: Path) -> None:
    out = tmp_path / "c"

    class BuildMeanwhile(Progress):
        def stage(self, name: str, total: int, done: int) -> None:
            if name != "read tracks":
                return
            with pytest.raises(InputError, match="another build is writing"):
                build_corpus(bach_spec, out, workers=1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(bach_spec, out, workers=1, progress=BuildMeanwhile())


def test_a_folder_of_other_things_is_never_written_to(bach_spec: BuildSpec, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not a corpus"):
        build_corpus(bach_spec, tmp_path, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"segment_seconds": 2000, "codebook_size": 16},
            r"segment_seconds is 2000, but the longest track has only \d+",
        ),
        ({"segment_seconds": 5, "valid": 0.5, "codebook_size": 60000}, "codebook_size is 60000"),
    ],
)
def test_segments_and_codebooks_beyond_the_music_are_refused(sizes, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    spec = BuildSpec(source="bach", limit=2, codebooks=1, **sizes)
    with pytest.raises(InputError, match=message):
        build_corpus(spec, tmp_path / "c", workers=1)


def test_a_description_counts_the_tokens_of_the_corpus(bach_corpus: Path) -> None:
    described = describe(bach_corpus)
    train = described.splits["train"]
    dataset = TokenDataset(bach_corpus, "train")
    frames = dataset.lengths(range(len(dataset))).sum()
    assert train.tokens == 2 * frames
    assert train.hours == pytest.approx(frames / 50 / 3600)
    # Tokens worth modelling: all codes are used, and frames often, but not always, repeat the one before.
    assert all(4.0 < bits <= 6.0 for bits in train.entropy_bits)
    assert 0.3 < train.repeat_share[0] < 0.97
    assert len(described.captions) == 5


def test_rendering_twice_gives_the_same_bits() -> None:
    # Violin and viola share samples, and the trumpets' loops end with their samples (soundfont.py, render.py).
    spec = BuildSpec(source="bach")
    first = {
        name: np.concatenate(list(_track(spec, name).blocks)) for name in ("bach/bwv97.9", "bach/bwv195.6")
    }
    for name in reversed(first):
        assert np.array_equal(np.concatenate(list(_track(spec, name).blocks)), first[name])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"versions": 2}, "all are the same"),
        ({"valid": 0.6, "test": 0.4}, "nothing to train on"),
        ({"sample_rate": 16001}, "not a multiple of frame_rate"),
        ({"audio": "/somewhere"}, "audio is for source folder"),
        ({"language": "de"}, "the captions of source bach are English"),
        ({"segment_seconds": 0.01}, "shorter than two frames"),
    ],
)
def test_contradictory_specifications_are_refused(wrong: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BuildSpec.model_validate({"source": "bach", **wrong})
