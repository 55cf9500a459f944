"""Splits keep together twins, artists, albums and videos; published splits are kept, and their leaks named."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.corpus.describe import describe
from ssmttm.corpus.folder import FolderSource
from ssmttm.corpus.group_keys import keys_of, sound_tags
from ssmttm.corpus.groups import group_tracks, report_groups
from ssmttm.corpus.manifest import load_manifest
from ssmttm.corpus.source import TrackFacts, TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.split import split_tracks
from ssmttm.corpus.tracks import TrackRecord
from ssmttm.errors import InputError
from tests.ssmttm.corpus.test_corpus_folder import JAMENDO, melody, spec_for

Splits = dict[str, set[str]]


def write_tunes(folder: Path, names: Iterable[str], seconds: float = 2.0) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        soundfile.write(folder / name, melody(seconds, 16000, seed), 16000)
    return folder


def write_table(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def splits_of(spec: BuildSpec, contents: dict[str, str] | None = None) -> Splits:
    """Split the tracks of a folder without reading their sound; `contents` gives the hashes of some."""
    refs, _ = FolderSource(spec).tracks()
    return split_refs(refs, spec, contents or {})


def split_refs(refs: list[TrackRef], spec: BuildSpec, contents: dict[str, str]) -> Splits:
    records = [record(ref.track, content=contents.get(ref.track, ref.track)) for ref in refs]
    published = {ref.track: ref.split for ref in refs if ref.split}
    found = split_tracks(group_tracks(records, refs, spec), spec, published)
    return {split: {one.track for one in tracks} for split, tracks in found.items()}


def record(name: str, content: str = "", group: str = "") -> TrackRecord:
    facts = TrackFacts(captions=("x",), title="", licence="", content=content)
    return TrackRecord(track=name, piece=name, group=group or name, frames=100, facts=facts)


def sides(splits: Splits, tracks: set[str]) -> set[str]:
    return {split for split, found in splits.items() if found & tracks}


def tracks_in(corpus: Path) -> Splits:
    found = {}
    for split in load_manifest(corpus).splits:
        data = TokenDataset(corpus, split)
        found[split] = {data.clip(index).track for index in range(len(data))}
    return found


def test_eight_tunes_twice_under_other_names_stand_once_in_the_corpus_with_the_captions_of_both(
    tmp_path: Path,
) -> None:
    music = write_tunes(tmp_path / "music", [f"tune{n}.wav" for n in range(8)], 4.0)
    for n in range(8):
        if n % 2:
            shutil.copy(music / f"tune{n}.wav", music / f"copy{n}.wav")
        else:
            with soundfile.SoundFile(
                music / f"copy{n}.flac", "w", 16000, 1
            ) as file:  # another container, with tags
                file.comment = "ripped again"
                file.write(soundfile.read(music / f"tune{n}.wav", dtype="float32")[0])
    names = sorted(path.name for path in music.iterdir())
    captions = write_table(tmp_path / "c.jsonl", *({"path": n, "caption": f"As {n}."} for n in names))
    manifest = build_corpus(spec_for(music, captions=captions), tmp_path / "out", workers=1)
    found = tracks_in(tmp_path / "out")
    assert {split: len(tracks) for split, tracks in found.items()} == {"train": 6, "valid": 2}
    tunes = [name.strip("tunecopy.wavfl") for tracks in found.values() for name in tracks]
    assert sorted(tunes) == [str(n) for n in range(8)]
    assert sorted(one.track for one in manifest.skipped) == [
        name for name in names if name.startswith("tune")
    ]
    assert manifest.skipped[0].reason == "the same music as another: copy0.flac"
    assert manifest.grouping is not None
    assert (manifest.grouping.twins, manifest.grouping.groups, manifest.grouping.largest) == (8, 8, 1)
    data = TokenDataset(tmp_path / "out", "train")
    heard = {clip.caption for clip in map(data.clip, range(len(data)))}
    assert any("tune" in caption for caption in heard)
    assert any("copy" in caption for caption in heard)


@pytest.mark.parametrize(
    "column",
    [
        {"artist": "Queen"},
        {"Artist_ID": 7},
        {"artists": ["Queen", "Bowie"]},
        {"artist": {"id": 7, "name": "Queen"}},
    ],
)
def test_an_artist_is_in_one_split_by_any_column_that_names_it(
    tmp_path: Path, column: dict[str, object]
) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(12)], 0.1)
    rows = [{"path": f"{n}.wav", "caption": "x"} | (column if n < 3 else {}) for n in range(12)]
    captions = write_table(tmp_path / "c.jsonl", *rows)
    mine = {"0.wav", "1.wav", "2.wav"}
    for seed in range(12):
        assert len(sides(splits_of(spec_for(music, captions=captions, seed=seed)), mine)) == 1
    loose = [
        splits_of(spec_for(music, captions=captions, seed=seed, group_by="content")) for seed in range(12)
    ]
    assert any(len(sides(splits, mine)) == 2 for splits in loose)


def test_artists_and_albums_join_tracks_over_several_steps_and_in_jamendos_table(tmp_path: Path) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(10)], 0.1)
    # A guest of one album has another album, on which a third artist plays.
    facts = ["1\ta", "2\ta", "2\tb", "3\tb", *(f"{n}\tx{n}" for n in range(10, 16))]
    table = "".join(f"t{n}\tartist_{fact}\t{n}.wav\t10\tgenre---rock\n" for n, fact in enumerate(facts))
    (tmp_path / "j.tsv").write_text(JAMENDO + table)
    for seed in range(10):
        splits = splits_of(spec_for(music, tags=tmp_path / "j.tsv", seed=seed))
        assert len(sides(splits, {"0.wav", "1.wav", "2.wav", "3.wav"})) == 1
        assert len(splits["valid"]) in (2, 4)


def test_tags_in_sound_files_name_the_artist(tmp_path: Path) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(8)], 2.0)
    for n in (0, 1, 2):
        ending = ("ogg", "mp3", "flac")[n]
        with soundfile.SoundFile(music / f"a{n}.{ending}", "w", 16000, 1) as file:
            file.artist, file.album = " the  BAND" if n else "The Band", f"Album {n}"
            file.write(melody(2, 16000, 50 + n))
        assert sound_tags(music / f"a{n}.{ending}")["artist"].split()[-1].lower() == "band"
    (music / "captions.csv").write_text(
        "path,caption\n" + "".join(f"{path.name},x\n" for path in sorted(music.iterdir()))
    )
    out = tmp_path / "out"
    manifest = build_corpus(spec_for(music), out, workers=1)
    assert len(sides(tracks_in(out), {"a0.ogg", "a1.mp3", "a2.flac"})) == 1
    assert manifest.grouping is not None
    assert (manifest.grouping.largest, manifest.grouping.largest_by) == (3, ("artist",))
    assert manifest.grouping.shared == {"artist": 1}
    assert describe(out).grouping == manifest.grouping
    assert sound_tags(tmp_path / "absent.mp3") == {}


def test_words_that_name_no_artist_join_nothing_and_guests_and_spelling_do_not_part() -> None:
    spec = BuildSpec(source="bach")
    for empty in ("Various Artists", "unknown", "", None, "VA", float("nan"), "<Unknown>", [], True):
        assert not keys_of({"artist": empty, "album": empty}, spec)
    assert (
        keys_of({"Artist": "Queen feat. Bowie"}, spec)
        == keys_of({"artist": "QUEEN "}, spec)
        == ("artist:queen",)
    )
    assert keys_of({"artist": "A;B"}, spec) == ("artist:a", "artist:b")
    hits = {"album": "Greatest Hits"}
    assert keys_of(hits, spec) == ()
    assert keys_of(hits | {"album_artist": "A"}, spec) != keys_of(hits | {"album_artist": "B"}, spec)
    clip = {"ytid": "-0Gj8-vB1q4", "start_s": 30}
    assert keys_of(clip, spec) == keys_of(clip | {"start_s": 60}, spec) == ("content:video -0Gj8-vB1q4",)


def test_tracks_are_grouped_by_a_column_of_the_users_own(tmp_path: Path) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(8)], 0.1)
    (music / "captions.csv").write_text(
        "path,caption,Concert\n" + "".join(f"{n}.wav,x,{n // 2}\n" for n in range(8))
    )
    spec = spec_for(music, group_by="Concert, content")
    for seed in range(6):
        splits = splits_of(spec.model_copy(update={"seed": seed}))
        assert len(splits["valid"]) == 2
        assert all(len(sides(splits, {f"{n}.wav", f"{n + 1}.wav"})) == 1 for n in (0, 2, 4, 6) if n)
    with pytest.raises(InputError, match="no row of the captions has a value in a column 'label'"):
        splits_of(spec_for(music, group_by="label"))
    with pytest.raises(ValueError, match="commas between them"):
        spec_for(music, group_by="artist,,album")
    assert spec_for(music, group_by="none").group_by == ()


def test_a_share_is_one_of_tracks_where_groups_differ_in_size() -> None:
    spec = BuildSpec(source="folder", audio=Path(), valid=0.1, test=0.1)
    sizes = [60, *[8] * 5, *[1] * 100]  # an artist of 60 tracks, five of 8, and a hundred of one
    refs = [
        TrackRef(
            track=f"{a}-{n}", piece=f"{a}-{n}", group=f"{a}-{n}", path=Path(), group_keys=(f"artist:{a}",)
        )
        for a, size in enumerate(sizes)
        for n in range(size)
    ]
    large_held = 0
    for seed in range(20):
        splits = split_refs(refs, spec.model_copy(update={"seed": seed}), {})
        assert all(abs(len(splits[split]) - 20) <= 4 for split in ("valid", "test"))
        assert sides(splits, {f"0-{n}" for n in range(60)}) == {"train"}
        large_held += len(sides(splits, {"1-0"}) - {"train"})
    assert large_held
    with pytest.raises(
        InputError, match=r"3 usable pieces in 1 groups, of which one has 3 by artist.*group by less"
    ):
        split_refs([ref.model_copy(update={"group_keys": ("artist:a",)}) for ref in refs[:3]], spec, {})


@pytest.mark.parametrize(
    ("pieces", "valid", "test"), [(3, 0.1, 0.0), (23, 0.25, 0.1), (40, 0.5, 0.4), (7, 0.0, 0.3)]
)
def test_tracks_that_share_nothing_are_split_as_by_the_former_rule(
    pieces: int, valid: float, test: float
) -> None:
    from hashlib import sha256

    spec = BuildSpec(source="folder", audio=Path(), valid=valid, test=test, seed=3)
    records = [record(f"{n}#{v}", str(n), group=f"g{n}") for n in range(pieces) for v in range(1 + n % 3)]
    groups = sorted(
        {one.group for one in records}, key=lambda one: sha256(f"3:split:{one}".encode()).hexdigest()
    )
    first = max(1, round(valid * pieces)) if valid else 0
    second = max(1, round(test * pieces)) if test else 0
    expected = {"valid": groups[:first], "test": groups[first : first + second]}
    found = split_tracks(group_tracks(records, [], spec), spec)
    for split, share in (("valid", valid), ("test", test)):
        assert ({one.group for one in found[split]} if share else set()) == set(expected[split])
    assert list(found) == ["train", *(split for split, share in (("valid", valid), ("test", test)) if share)]


LISTED = {"train": ["0.wav", "1.wav", "2.wav"], "valid": ["3.wav"], "test": ["4.wav"]}


def published_as(form: str, folder: Path) -> Path:
    """Write the split LISTED in a form that data sets use."""
    folder.mkdir()
    words = {"train": "train", "valid": "validation", "test": "test"}
    rows = [(name, split) for split, names in LISTED.items() for name in names]
    if form == "table":
        (folder / "s.csv").write_text(
            "file,split\n" + "".join(f"{name},{words[split]}\n" for name, split in rows)
        )
        return folder / "s.csv"
    if form == "mapping":
        (folder / "s.json").write_text(json.dumps({words[split]: names for split, names in LISTED.items()}))
        return folder / "s.json"
    if form == "audiocraft":
        for split, names in LISTED.items():
            (folder / split).mkdir()
            write_table(
                folder / split / "data.jsonl", *({"path": f"/data/x/{n}", "duration": 2} for n in names)
            )
        return folder
    for split, names in LISTED.items():
        lines = "".join(f"t\tartist_1\talbum_1\t{name}\t2\tgenre---rock\n" for name in names)
        (folder / f"autotagging-{words[split]}.tsv").write_text(JAMENDO + lines)
    return folder / "autotagging-train.tsv" if form == "jamendo file" else folder


@pytest.mark.parametrize("form", ["table", "mapping", "audiocraft", "jamendo file", "jamendo folder"])
def test_a_published_split_is_kept_in_any_form_and_tracks_it_does_not_name_are_left_out(
    tmp_path: Path, form: str
) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(6)], 0.1)
    (music / "captions.csv").write_text("path,caption\n" + "".join(f"{n}.wav,x\n" for n in range(6)))
    path = published_as(form, tmp_path / "lists")
    spec = spec_for(music, splits=str(path), valid=None)
    assert splits_of(spec) == {split: set(names) for split, names in LISTED.items()}
    assert [(one.track, one.reason) for one in FolderSource(spec).tracks()[1]] == [
        ("5.wav", "the published split does not name it")
    ]
    with pytest.raises(InputError, match=r"valid is 0\.25, but .* gives the valid split; leave valid out"):
        splits_of(spec_for(music, splits=str(path), valid=0.25))


def test_a_split_column_of_the_captions_is_the_split_unless_splits_are_to_be_drawn(tmp_path: Path) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(8)], 0.1)
    rows = [(f"{n}.wav", ("train", "dev", "Test", "unused")[n % 4], n % 4 == 1) for n in range(8)]
    captions = write_table(
        tmp_path / "c.jsonl",
        *({"path": n, "caption": "x", "split": split, "is_audioset_eval": eval_} for n, split, eval_ in rows),
    )
    spec = spec_for(music, captions=captions, valid=None)
    assert splits_of(spec) == {
        "train": {"0.wav", "4.wav"},
        "valid": {"1.wav", "5.wav"},
        "test": {"2.wav", "6.wav"},
    }
    assert FolderSource(spec).tracks()[1][0].reason == "the published split names another split: unused"
    with pytest.raises(InputError, match="column split of the captions gives the valid split"):
        splits_of(spec_for(music, captions=captions, valid=0.25))
    assert len(splits_of(spec_for(music, captions=captions, splits="none", valid=0.25))["train"]) == 6
    audioset = spec_for(music, captions=captions, splits="is_audioset_eval", valid=None)
    with pytest.raises(InputError, match="gives no validation tracks"):
        splits_of(audioset)
    drawn = splits_of(audioset.model_copy(update={"valid": 0.25}))
    assert drawn["test"] == {"1.wav", "5.wav"}
    assert len(drawn["valid"]) == 2
    with pytest.raises(InputError, match="names no split such as train"):
        splits_of(spec_for(music, captions=captions, splits="colour"))
    with pytest.raises(InputError, match=r"absent\.csv: no such file"):
        splits_of(spec_for(music, captions=captions, splits=str(tmp_path / "absent.csv")))


def test_a_column_that_names_training_alone_leaves_the_splits_to_the_draw(tmp_path: Path) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(4)], 0.1)
    (music / "captions.csv").write_text(
        "path,caption,split\n" + "".join(f"{n}.wav,x,train\n" for n in range(4))
    )
    assert len(splits_of(spec_for(music))["valid"]) == 1


def test_a_list_that_names_a_track_in_two_splits_is_refused(tmp_path: Path) -> None:
    music = write_tunes(tmp_path / "music", ["0.wav", "1.wav"], 0.1)
    (music / "captions.csv").write_text("path,caption\n0.wav,x\n1.wav,x\n")
    (tmp_path / "s.csv").write_text("file,split\n0.wav,train\n1.wav,valid\n0.wav,test\n")
    with pytest.raises(InputError, match=r"s\.csv, line 4: 0\.wav is in test, but in train before it"):
        splits_of(spec_for(music, splits=str(tmp_path / "s.csv"), valid=None))


def test_leaks_of_a_published_split_are_kept_and_named(tmp_path: Path) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(5)], 2.0)
    shutil.copy(music / "0.wav", music / "3.wav")
    rows = "".join(f"{n}.wav,x,{'Queen' if n in (1, 4) else ''}\n" for n in range(5))
    (music / "captions.csv").write_text("path,caption,artist\n" + rows)
    spec = spec_for(
        music, splits=str(published_as("table", tmp_path / "lists")), valid=None, segment_seconds=1
    )
    manifest = build_corpus(spec, tmp_path / "out", workers=1)
    assert tracks_in(tmp_path / "out") == {split: set(names) for split, names in LISTED.items()}
    found = manifest.grouping
    assert found is not None
    assert (found.published, found.leaking, found.twins) == ("s.csv", {"artist": 1, "content": 1}, 0)
    assert [(leak.by, leak.value, leak.tracks) for leak in found.leaks] == [
        ("artist", "queen", {"test": ("4.wav",), "train": ("1.wav",)}),
        ("content", "", {"train": ("0.wav",), "valid": ("3.wav",)}),
    ]
    (tmp_path / "lists" / "s.csv").write_text("file,split\n0.wav,train\n3.wav,valid\n")
    with pytest.raises(InputError, match=r"source\.splits"):
        build_corpus(spec, tmp_path / "out", workers=1)


def test_a_finished_corpus_of_an_earlier_version_is_returned_and_described(tmp_path: Path) -> None:
    music = write_tunes(tmp_path / "music", [f"{n}.wav" for n in range(4)], 2.0)
    (music / "captions.csv").write_text("path,caption,artist\n" + "".join(f"{n}.wav,x,a\n" for n in range(4)))
    spec = spec_for(music, group_by="none")
    build_corpus(spec, tmp_path / "out", workers=1)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del manifest["grouping"]  # as earlier versions wrote it
    del manifest["recipe"]["spec"]["group_by"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    again = build_corpus(spec_for(music), tmp_path / "out", workers=1)
    assert again.grouping is None
    assert describe(tmp_path / "out").grouping is None
    with pytest.raises(InputError, match="group_by: nothing before"):
        build_corpus(spec_for(music, group_by="content"), tmp_path / "out", workers=1)


def test_a_specification_without_new_choices_has_the_identity_that_finished_corpora_hold() -> None:
    assert BuildSpec(source="bach").identity() == {
        "source": "bach",
        "licence": None,
        "language": "en",
        "limit": None,
        "seed": 0,
        "segment_seconds": 10.0,
        "min_fill": 0.5,
        "valid": 0.1,
        "test": 0.0,
        "tempo_bpm": 90.0,
        "transpose": False,
        "orchestrate": False,
        "versions": 1,
        "codec": "rvq",
        "codebooks": 4,
        "codebook_size": 1024,
        "sample_rate": 16000,
        "frame_rate": 50.0,
        "mel_bands": 64,
    }


def test_the_report_bounds_the_leaks_that_it_names() -> None:
    spec = BuildSpec(source="folder", audio=Path(), splits="split")
    refs = [
        TrackRef(track=f"{a}{s}", piece="", group="", path=Path(), group_keys=(f"artist:{a:03}",), split=s)
        for a in range(50)
        for s in ("train", "valid")
    ]
    records = [record(ref.track) for ref in refs]
    groups = group_tracks(records, refs, spec)
    splits = split_tracks(groups, spec, {ref.track: ref.split for ref in refs})
    report = report_groups(groups, splits, spec, 0, "column split of the captions")
    assert report.leaking == {"artist": 50}
    assert len(report.leaks) == 20
    assert np.isclose(report.largest, 2)
