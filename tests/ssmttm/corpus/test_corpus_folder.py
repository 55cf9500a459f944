"""The source `folder`: sound files and captions in their usual forms, and the messages for wrong ones."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssmttm.corpus.audio import stream_audio
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.corpus.folder import FolderSource
from ssmttm.corpus.manifest import load_manifest
from ssmttm.corpus.source import SkipTrackError
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.tag_captions import sentence_from_tags
from ssmttm.errors import InputError

JAMENDO = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\n"


def melody(seconds: float, rate: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    notes = np.repeat(rng.choice([220, 262, 330, 392, 440, 523], int(seconds * 4) + 1), rate // 4)
    time = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * np.cumsum(notes[: len(time)]) / rate)).astype(np.float32)


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """Four files of 5 to 8 s in four formats, three sample rates, one of them stereo."""
    root = tmp_path / "music"
    (root / "00").mkdir(parents=True)
    soundfile.write(root / "one.wav", melody(5, 16000, 1), 16000)
    soundfile.write(root / "two.flac", np.stack([melody(6, 44100, 2)] * 2, axis=1), 44100)
    soundfile.write(root / "three.ogg", melody(7, 22050, 3), 22050)
    soundfile.write(root / "00/4.mp3", melody(8, 44100, 4), 44100)
    return root


ROWS = {
    "one.wav": "A first tune.",
    "two.flac": "A second tune.",
    "three.ogg": "A third.",
    "00/4.mp3": "A fourth.",
}


def spec_for(root: Path, **changed: object) -> BuildSpec:
    small = {"codebooks": 1, "codebook_size": 16, "segment_seconds": 2.0, "valid": 0.25}
    return BuildSpec.model_validate({"source": "folder", "audio": root, **small, **changed})


def write_csv(path: Path, rows: dict[str, str]) -> Path:
    path.write_text("path,caption,licence\n" + "".join(f'{k},"{v}",CC-BY-4.0\n' for k, v in rows.items()))
    return path


def captions_of(spec: BuildSpec) -> dict[str, str]:
    return {ref.track: ref.captions[0] for ref in FolderSource(spec).tracks()[0]}


def test_a_folder_becomes_a_corpus_whose_clips_take_captions_in_turn(music: Path, tmp_path: Path) -> None:
    captions = write_csv(tmp_path / "c.csv", ROWS)
    with captions.open("a") as file:
        file.write("00/4.mp3,The fourth again.,CC-BY-4.0\n")
    manifest = build_corpus(spec_for(music, captions=captions), tmp_path / "out", workers=1)
    assert manifest.splits["train"].tracks == 3
    assert manifest.splits["valid"].tracks == 1
    assert manifest.licences == ("CC-BY-4.0",)
    assert not manifest.skipped
    clips = {}
    for split in ("train", "valid"):
        dataset = TokenDataset(tmp_path / "out", split)
        for clip in map(dataset.clip, range(len(dataset))):
            assert clip.caption == ROWS[clip.track] or clip.track == "00/4.mp3"
            clips.setdefault(clip.track, []).append((clip.start_seconds, clip.frames, clip.caption))
    # 5 s in clips of 2 s: two whole ones, and a half-full last one.
    assert [clip[:2] for clip in clips["one.wav"]] == [(0.0, 100), (2.0, 100), (4.0, 50)]
    starts, _, captions = zip(*clips["00/4.mp3"], strict=True)
    assert starts == (0.0, 2.0, 4.0, 6.0)
    assert captions == ("A fourth.", "The fourth again.") * 2


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("json", json.dumps(ROWS)),
        ("json", json.dumps([{"file_name": k, "text": v} for k, v in ROWS.items()])),
        ("jsonl", "".join(json.dumps({"audio": k, "caption": v}) + "\n" for k, v in ROWS.items())),
    ],
    ids=["mapping", "records", "lines"],
)
def test_captions_are_read_in_every_form(music: Path, tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"captions.{suffix}"
    path.write_text(text)
    assert captions_of(spec_for(music, captions=path)) == ROWS


def test_captions_inside_the_folder_are_found(music: Path) -> None:
    write_csv(music / "captions.csv", ROWS)
    assert captions_of(spec_for(music)) == ROWS


def test_jamendo_tags_make_the_captions_that_are_missing(music: Path, tmp_path: Path) -> None:
    tags = tmp_path / "raw_30s.tsv"
    tags.write_text(
        JAMENDO
        + "track_0000004\tartist_1\talbum_1\t00/4.mp3\t8.0\t"
        + "genre---rock\tinstrument---electricguitar\tmood/theme---calm\n"
        + "track_0000005\tartist_1\talbum_1\t05/5.mp3\t8.0\tgenre---pop\n"  # not downloaded
        + "track_0000001\tartist_1\talbum_1\tone.wav\t5.0\tgenre---pop\n"
    )
    captions = write_csv(tmp_path / "c.csv", {"one.wav": "A first tune."})
    spec = spec_for(music, captions=captions, tags=tags)
    assert captions_of(spec) == {
        "00/4.mp3": "Calm rock music with electric guitar.",
        "one.wav": "A first tune.",
    }
    assert {one.track: one.reason for one in FolderSource(spec).tracks()[1]} == {
        "two.flac": "no caption",
        "three.ogg": "no caption",
    }
    assert captions_of(spec_for(music, tags=tags)).keys() == {"00/4.mp3", "one.wav"}


def test_jamendo_ids_and_low_quality_files_are_found(music: Path, tmp_path: Path) -> None:
    (music / "00/4.mp3").rename(music / "00/4.low.mp3")
    by_path = write_csv(tmp_path / "a.csv", {"00/4.mp3": "A fourth."})
    by_id = tmp_path / "b.jsonl"
    by_id.write_text(json.dumps({"track_id": "track_0000004", "caption": "A fourth."}) + "\n")
    for captions in (by_path, by_id):
        assert captions_of(spec_for(music, captions=captions)) == {"00/4.low.mp3": "A fourth."}


def test_sentences_of_tags() -> None:
    tags = ["genre---pop", "genre---rock", "instrument---piano"]
    assert sentence_from_tags(tags) == "Pop and rock music with piano."
    assert sentence_from_tags(["instrument---piano"]) == "Music with piano."


def test_an_unreadable_file_is_left_out_with_its_reason(music: Path, tmp_path: Path) -> None:
    (music / "broken.mp3").write_bytes(b"not music at all" * 100)
    soundfile.write(music / "short.wav", melody(0.5, 16000, 0), 16000)
    soundfile.write(music / "nan.wav", np.full(48000, np.nan, np.float32), 16000, subtype="FLOAT")
    rows = {**ROWS, "broken.mp3": "x", "short.wav": "y", "nan.wav": "z"}
    spec = spec_for(music, captions=write_csv(tmp_path / "c.csv", rows))
    manifest = build_corpus(spec, tmp_path / "out", workers=1)
    reasons = {one.track: one.reason for one in manifest.skipped}
    assert reasons.keys() == {"broken.mp3", "short.wav", "nan.wav"}
    assert "unreadable audio" in reasons["broken.mp3"]
    assert "0.5 s long; a clip needs 1 s" in reasons["short.wav"]
    assert "not numbers" in reasons["nan.wav"]


@pytest.mark.parametrize("name", ["../secret.wav", "/etc/passwd", "00/../../x.wav", "C:/x.wav", "..\\x.wav"])
def test_a_path_out_of_the_folder_is_set_aside(music: Path, tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / "secret.wav", melody(5, 16000, 0), 16000)
    captions = tmp_path / "c.json"
    captions.write_text(json.dumps({**ROWS, name: "x"}))
    source = FolderSource(spec_for(music, captions=captions))
    assert {ref.track for ref in source.tracks()[0]} == set(ROWS)
    (one,) = source.set_aside()
    assert one.rows == 1
    assert "outside the audio directory" in one.reason
    assert ascii(name) in one.first[0]


def test_wrong_folders_are_explained(music: Path, tmp_path: Path) -> None:
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken/broken.wav").write_bytes(b"RIFF")
    captions = write_csv(tmp_path / "c.csv", ROWS)
    broken = write_csv(tmp_path / "d.csv", {"broken.wav": "x"})
    absent = write_csv(tmp_path / "e.csv", {"five.wav": "x", "six.wav": "y"})
    wrong = (
        (
            spec_for(tmp_path / "broken", captions=broken),
            r"none of 1 tracks can be used; .* unreadable audio",
        ),
        (
            spec_for(music, captions=absent),
            r"none of its 4 sound files has a caption \(e\.csv, line 2 \('five\.wav'\): names a file .*2 rows",
        ),
        (spec_for(music, captions=captions, limit=1), "1 usable pieces are too few"),
        (spec_for(tmp_path / "nowhere"), "no such directory"),
        (spec_for(tmp_path / "empty", captions=captions), r"holds no sound file \(.wav"),
        (
            spec_for(music),
            r"has no captions; give `captions` .* or `tags`, .* captions\.jsonl.* a song\.json",
        ),
    )
    for number, (spec, message) in enumerate(wrong):
        with pytest.raises(InputError, match=message):
            build_corpus(spec, tmp_path / f"out{number}", workers=1)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("c.csv", "path,caption\none.wav,A tune, with a comma\n", "line 2: has more fields than the header"),
        ("c.csv", "path,caption\none.wav,\n", "line 2: has no caption"),
        (
            "c.csv",
            "song,caption\none.wav,x\n",
            "line 1: no column is named for the file .* says 'song', 'caption'",
        ),
        (
            "c.csv",
            "path,captoin\none.wav,x\n",
            "line 1: no column is named for the caption .* says 'path', 'captoin'",
        ),
        ("c.csv", "", "is empty; its first line must name the columns"),
        ("c.csv", "path,caption\n", r"none of its 4 sound files has a caption \(c\.csv holds no rows"),
        ("c.csv", "x" * 2**21, "line 1: is longer than 1,048,576 characters; it must name the columns"),
        ("c.csv", "path,caption\none.wav,café\n", "line 2: not UTF-8 text .*; save it as UTF-8"),
        ("c.json", "{", "not valid JSON"),
        ("c.json", "[" * 100_000, "not valid JSON"),
        ("c.csv", f"path,caption\none.wav,{'x' * 2**21}\n", "line 2: is longer than 1,048,576 characters"),
        ("c.csv", "path,caption" + "," * 1000, "more than 1,000 columns"),
        ("c.jsonl", f'{{"path": "one.wav", "caption": "{"x" * 2**21}"}}', "line 1: is longer than"),
        ("c.txt", "x" * 2**21, "line 1: is longer than"),
        ("c.json", "3", "mapping from file to caption"),
        ("c.jsonl", "{oops\n{oops\n", r"line 1: is not valid JSON \(2 rows\)"),
        (
            "c.jsonl",
            '{"path": "one.wav", "duration": 5, "sample_rate": 16000}',
            "AudioCraft's facts; without",
        ),
        ("c.csv.gz", "x", "not a whole gzip file"),
        ("c.parquet", "x", "not a whole Parquet file"),
        ("c.jsonl", '["one.wav"]\n', "line 1: should be a record"),
        ("c.tsv", "a\tb\n", "no column is named for the caption .* says 'a', 'b'"),
        ("c.tsv", JAMENDO + "track_1\tx\n", "line 2: has fewer than the 6 fields"),
        ("c.doc", "x", r"not \.doc"),
        ("c.txt", "x", "line 1: names no file"),
    ],
)
def test_a_wrong_caption_file_is_explained(
    music: Path, tmp_path: Path, name: str, text: str, match: str
) -> None:
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=match):
        FolderSource(spec_for(music, captions=tmp_path / name)).tracks()


def test_changed_captions_or_files_make_another_corpus(music: Path, tmp_path: Path) -> None:
    captions = write_csv(tmp_path / "c.csv", ROWS)
    spec = spec_for(music, captions=captions)
    first = build_corpus(spec, tmp_path / "out", workers=1)
    assert build_corpus(spec, tmp_path / "out") == first
    moved = music.rename(tmp_path / "elsewhere")
    assert build_corpus(spec_for(moved, captions=captions), tmp_path / "out") == first
    write_csv(captions, {**ROWS, "one.wav": "Another tune."})
    with pytest.raises(InputError, match=r"source\.captions"):
        build_corpus(spec_for(moved, captions=captions), tmp_path / "out")
    write_csv(captions, ROWS)
    soundfile.write(moved / "more.wav", melody(5, 16000, 9), 16000)
    with pytest.raises(InputError, match=r"source\.listing"):
        build_corpus(spec_for(moved, captions=captions), tmp_path / "out")
    assert load_manifest(tmp_path / "out") == first


def test_a_corpus_from_before_ffmpeg_is_returned_though_its_folder_holds_other_endings(
    music: Path, tmp_path: Path
) -> None:
    captions = write_csv(tmp_path / "c.csv", ROWS)
    spec = spec_for(music, captions=captions)
    first = build_corpus(spec, tmp_path / "out", workers=1)
    (music / "five.m4a").write_bytes(b"was not read")
    with pytest.raises(InputError, match=r"source\.more: nothing before"):
        build_corpus(spec, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["recipe"]["made_with"] = {"soundfile": "0.13.1", "soxr": "1.0.0"}
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    assert build_corpus(spec, tmp_path / "out").fingerprint == first.fingerprint


def test_a_limit_takes_the_same_tracks_in_another_folder_and_with_more_workers(
    music: Path, tmp_path: Path
) -> None:
    captions = write_csv(tmp_path / "c.csv", ROWS)
    first = build_corpus(spec_for(music, captions=captions, limit=2, valid=0.5), tmp_path / "one", workers=1)
    moved = music.rename(tmp_path / "elsewhere")
    again = build_corpus(spec_for(moved, captions=captions, limit=2, valid=0.5), tmp_path / "two", workers=2)
    assert first.splits["train"].tracks == first.splits["valid"].tracks == 1
    assert first.fingerprint == again.fingerprint


def test_a_stream_is_mono_resampled_and_whole(music: Path) -> None:
    for name, seconds in (("one.wav", 5), ("two.flac", 6), ("three.ogg", 7)):
        audio = np.concatenate(list(stream_audio(music / name, 16000)))
        assert len(audio) == pytest.approx(seconds * 16000, abs=2)
        assert 0.3 < np.abs(audio).max() < 0.6
    with pytest.raises(SkipTrackError, match="unreadable"):
        list(stream_audio(music / "absent.wav", 16000))


@pytest.mark.parametrize(("rate", "channels"), [(2**31 - 1, 1), (16000, 512)])
def test_a_header_of_sound_that_cannot_be_is_unreadable(tmp_path: Path, rate: int, channels: int) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros((100, 1)), 16000)
    sound = bytearray((tmp_path / "x.wav").read_bytes())
    sound[22:34] = struct.pack("<HIIH", channels, rate, min(rate * channels * 2, 2**32 - 1), channels * 2)
    (tmp_path / "x.wav").write_bytes(sound)
    with pytest.raises(SkipTrackError, match=f"its header says {rate:,} Hz and {channels} channels"):
        list(stream_audio(tmp_path / "x.wav", 16000))


def test_a_long_file_needs_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    import tracemalloc

    from ssmttm.codec.mel import LogMel

    mel = LogMel(sample_rate=16000, frame_rate=50, bands=64)
    peaks = []
    for minutes in (1, 4):
        path = tmp_path / f"{minutes}.wav"
        soundfile.write(path, np.tile(melody(60, 16000, 0), minutes), 16000)
        tracemalloc.start()
        frames = sum(len(group) for group in mel.stream(stream_audio(path, 16000)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert frames == minutes * 60 * 50
    assert peaks[1] < 1.2 * peaks[0]
