"""The source `bach`: real scores become corpora that are whole, the same every time, and never half-written."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssmttm.corpus.bach import BachSource
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.corpus.describe import describe
from ssmttm.corpus.manifest import load_manifest, verify_corpus
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError
from tests.waiting import PATIENCE

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


def test_no_piece_is_in_two_splits(bach_corpus: Path) -> None:
    pieces = {}
    for split in ("train", "valid"):
        dataset = TokenDataset(bach_corpus, split)
        pieces[split] = {dataset.clip(i).track.split("-")[0] for i in range(len(dataset))}
    assert pieces["train"]
    assert pieces["valid"]
    assert not pieces["train"] & pieces["valid"]


def test_captions_say_what_the_score_says() -> None:
    spec = BuildSpec(source="bach")
    captions = _track(spec, "bach/bwv269").facts.captions
    assert len(set(captions)) == len(captions) > 2
    for caption in captions:
        for said in (
            "Aus meines Herzens Grunde",
            "G major",
            "3/4",
            "90",
            "soprano, alto, tenor and bass",
            "{part}",
        ):
            assert said.lower() in caption.lower()


def test_clips_say_where_in_the_piece_they_are(bach_corpus: Path) -> None:
    dataset = TokenDataset(bach_corpus, "train")
    captions = dataset.captions(range(len(dataset)))
    assert not any("{part}" in caption for caption in captions)
    for place in ("opening of", "passage from", "close of"):
        assert any(place in caption.lower() for caption in captions)


def test_every_clip_names_its_licences(bach_corpus: Path) -> None:
    manifest = load_manifest(bach_corpus)
    assert manifest.licences
    assert all("GPL-2.0" in licence and "music21" in licence for licence in manifest.licences)
    clip = TokenDataset(bach_corpus, "valid").clip(0)
    assert clip.licence in manifest.licences


def test_scores_whose_encoder_reserves_the_rights_are_left_out(bach_corpus: Path) -> None:
    skipped = {one.track: one.reason for one in load_manifest(bach_corpus).skipped}
    assert "reserves the rights" in skipped["bach/bwv366"]


def test_variety_comes_only_when_asked_for() -> None:
    plain = BuildSpec(source="bach")
    varied = plain.model_copy(update={"transpose": True, "orchestrate": True, "versions": 8})
    own = _track(plain, "bach/bwv269").facts
    others = [_track(varied, f"bach/bwv269#{n}").facts for n in range(8)]
    assert "G major" in own.captions[0]
    assert "soprano" in own.captions[0].lower()
    assert len({tuple(sorted(facts.captions)) for facts in others}) > 5
    assert not any("soprano" in facts.captions[0].lower() for facts in others)
    assert {facts.content for facts in others} == {own.content}  # the same music all the same


def test_versions_of_a_score_stay_in_one_split(tmp_path: Path) -> None:
    spec = BuildSpec(
        source="bach",
        limit=4,
        versions=3,
        transpose=True,
        codebooks=1,
        codebook_size=16,
        segment_seconds=5,
        valid=0.25,
    )
    manifest = build_corpus(spec, tmp_path / "c", workers=1)
    assert manifest.splits["train"].tracks == 9
    assert manifest.splits["valid"].tracks == 3
    valid = TokenDataset(tmp_path / "c", "valid")
    assert len({valid.clip(i).track.split("#")[0] for i in range(len(valid))}) == 1


def test_the_number_of_workers_changes_nothing(
    bach_corpus: Path, bach_spec: BuildSpec, tmp_path: Path
) -> None:
    again = build_corpus(bach_spec, tmp_path / "again", workers=2)
    assert again.fingerprint == load_manifest(bach_corpus).fingerprint


def test_building_a_finished_corpus_loads_nothing_that_builds(
    bach_corpus: Path, bach_spec: BuildSpec
) -> None:
    before = (bach_corpus / "manifest.json").stat().st_mtime_ns
    script = (
        "import sys; from pathlib import Path; from ssmttm.corpus.build import build_corpus;"
        "from ssmttm.corpus.spec import BuildSpec;"
        "build_corpus(BuildSpec.model_validate_json(sys.argv[1]), Path(sys.argv[2]));"
        "heavy = {'torch', 'music21', 'sklearn', 'symusic', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, bach_spec.model_dump_json(), str(bach_corpus)], check=True)
    assert (bach_corpus / "manifest.json").stat().st_mtime_ns == before


def test_another_specification_is_refused_and_the_difference_named(
    bach_corpus: Path, bach_spec: BuildSpec
) -> None:
    other = bach_spec.model_copy(update={"codebooks": 4, "seed": 1})
    with pytest.raises(InputError, match=r"spec\.codebooks: 2 before, 4 now; spec\.seed: 0 before, 1 now"):
        build_corpus(other, bach_corpus, workers=1)
    verify_corpus(bach_corpus, load_manifest(bach_corpus))


def test_a_killed_build_goes_on_where_it_was(bach_corpus: Path, bach_spec: BuildSpec, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-c", BUILD, bach_spec.model_dump_json(), str(out), "2"]
    child = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + PATIENCE
    while len(_records(out)) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    while _alive(child.pid) and time.monotonic() < deadline:  # its workers notice and end by themselves
        time.sleep(0.01)
    assert not _alive(child.pid)
    before = _records(out)
    assert len(before) >= 2
    assert not (out / "manifest.json").exists()
    read: list[int] = []

    class Count:
        def stage(self, name: str, total: int, done: int) -> None:
            if name == "read tracks":
                read.extend([total, done])
                assert {k: v for k, v in _records(out).items() if k in before} == before

        def advance(self, pieces: int = 1) -> None:
            pass

    manifest = build_corpus(bach_spec, out, workers=1, progress=Count())
    assert read == [6, len(before)]
    assert manifest.fingerprint == load_manifest(bach_corpus).fingerprint


def _alive(session: int) -> bool:
    """Whether a process of this session is left, zombies aside."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


def test_an_unfinished_build_is_not_mixed_with_another(bach_spec: BuildSpec, tmp_path: Path) -> None:
    out = tmp_path / "c"

    class Stop:
        def stage(self, name: str, total: int, done: int) -> None:
            pass

        def advance(self, pieces: int = 1) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(bach_spec, out, workers=1, progress=Stop())
    with pytest.raises(InputError, match=r"unfinished build.*spec\.seed"):
        build_corpus(bach_spec.model_copy(update={"seed": 5}), out, workers=1)


def test_two_builds_do_not_write_one_corpus(bach_spec: BuildSpec, tmp_path: Path) -> None:
    out = tmp_path / "c"

    class BuildMeanwhile:
        def stage(self, name: str, total: int, done: int) -> None:
            with pytest.raises(InputError, match="another build is writing"):
                build_corpus(bach_spec, out, workers=1)
            raise KeyboardInterrupt

        def advance(self, pieces: int = 1) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        build_corpus(bach_spec, out, workers=1, progress=BuildMeanwhile())


def test_a_folder_of_other_things_is_never_written_to(bach_spec: BuildSpec, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not a corpus"):
        build_corpus(bach_spec, tmp_path, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_segment_longer_than_all_music_is_refused(tmp_path: Path) -> None:
    spec = BuildSpec(source="bach", limit=2, segment_seconds=2000, codebooks=1, codebook_size=16)
    with pytest.raises(InputError, match=r"segment_seconds is 2000, but the longest track has only \d+"):
        build_corpus(spec, tmp_path / "c", workers=1)


def test_more_codes_than_frames_are_refused(tmp_path: Path) -> None:
    spec = BuildSpec(source="bach", limit=2, segment_seconds=5, valid=0.5, codebooks=1, codebook_size=60000)
    with pytest.raises(InputError, match="codebook_size is 60000"):
        build_corpus(spec, tmp_path / "c", workers=1)


def test_a_description_counts_what_is_there(bach_corpus: Path) -> None:
    described = describe(bach_corpus)
    train = described.splits["train"]
    dataset = TokenDataset(bach_corpus, "train")
    frames = dataset.lengths(range(len(dataset))).sum()
    assert train.tokens == 2 * frames
    assert train.hours == pytest.approx(frames / 50 / 3600)
    # Tokens worth modelling: all codes in use, each frame like the one before but not always the same.
    assert all(4.0 < bits <= 6.0 for bits in train.entropy_bits)
    assert 0.3 < train.repeat_share[0] < 0.97
    assert len(described.captions) == 5


def test_the_report_of_a_build_names_its_stages(bach_corpus: Path) -> None:
    report = json.loads((bach_corpus / "build.json").read_text())
    assert set(report["seconds"]) == {"read tracks", "fit codec", "write shards", "all"}
    assert report["parent_peak_mib"] > 10


def test_rendering_twice_gives_the_same_bits() -> None:
    # Violin and viola share samples, and the trumpets' loops end with their samples: see soundfont.py and render.py.
    spec = BuildSpec(source="bach")
    first = {
        name: np.concatenate(list(_track(spec, name).blocks)) for name in ("bach/bwv97.9", "bach/bwv195.6")
    }
    for name in reversed(first):
        assert np.array_equal(np.concatenate(list(_track(spec, name).blocks)), first[name])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"versions": 2}, "all would be the same"),
        ({"valid": 0.6, "test": 0.4}, "nothing to train on"),
        ({"sample_rate": 16001}, "not a multiple of frame_rate"),
        ({"audio": "/somewhere"}, "audio is for source folder"),
        ({"language": "de"}, "English captions"),
        ({"segment_seconds": 0.01}, "less than two frames"),
    ],
)
def test_specifications_that_cannot_be_are_refused(wrong: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BuildSpec.model_validate({"source": "bach", **wrong})
