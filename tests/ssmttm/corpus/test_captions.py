"""Captions as data sets write them: lists, tables of all kinds, files beside the sound, and rows that are wrong."""

import gzip
import json
import os
import unicodedata
from pathlib import Path

import pytest

from ssmttm.corpus.caption_files import Faults, read_captions
from ssmttm.corpus.folder import FolderSource
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError

MANY = ["first", "second, with a comma", "it's a third"]


def read(path: Path) -> list[tuple[str, str]]:
    return [(row.name, row.caption) for row in read_captions(path)]


def music(root: Path, *names: str) -> Path:
    """Make a folder of files that are listed and never opened."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def source(root: Path, **given: object) -> FolderSource:
    return FolderSource(BuildSpec.model_validate({"source": "folder", "audio": root, **given}))


def captions(root: Path, **given: object) -> dict[str, tuple[str, ...]]:
    return {ref.track: ref.captions for ref in source(root, **given).tracks()[0]}


def test_every_caption_of_a_list_is_one_of_the_clips(cases: Path, tmp_path: Path) -> None:
    root = music(tmp_path / "music", *(f"t{number}.wav" for number in range(4)))
    found = captions(root, captions=cases.parent / "audio/captions_as_lists.jsonl")
    assert found == {f"t{n}.wav": (f"first {n}", f"second {n}", f"third {n}") for n in range(4)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.jsonl", json.dumps({"path": "a.wav", "caption": MANY})),
        ("c.json", json.dumps({"a.wav": MANY})),
        ("c.json", json.dumps({"a.wav": {"captions": [{"caption": one} for one in MANY]}})),
        ("c.json", json.dumps({"path": {"0": "a.wav"}, "caption": {"0": MANY}})),
        ("c.json", json.dumps({"data": [{"id": "a.wav", "text": MANY}]})),
        ("c.json", json.dumps({"path": "a.wav", "caption": MANY})),
        ("c.json", "".join(json.dumps({"path": "a.wav", "caption": one}) + "\n" for one in MANY)),
        ("c.csv", f'path,caption\na.wav,"{MANY!s}"\n'.replace('"it\'s', '""it\'s').replace('third"]', 'third""]')),
        ("c.csv", 'path;caption\na.wav;"[""first"", ""second, with a comma"", ""it\'s a third""]"\n'),
        ("c.csv", "path\tcaption\na.wav\t\"['first' 'second, with a comma'\n ''it's a third'']\"\n".replace(
            "''it's a third''", '""it\'s a third""')),
        ("c.csv", 'File Name,Caption_1,caption_2,caption_10\na.wav,first,"second, with a comma",it\'s a third\n'),
        ("c.csv", 'file,caption,caption.1,caption.2\na.wav,first,"second, with a comma",it\'s a third\n'),
        ("c.csv", 'file,caption,caption,caption\na.wav,first,"second, with a comma",it\'s a third\n'),
        ("c.csv", "sep=|\r\nfile|caption\r\n" + "".join(f"a.wav|{one}\r\n" for one in MANY)),
        ("c.tsv", "file\tcaption\n" + "".join(f"a.wav\t{one}\n" for one in MANY)),
    ],
)  # fmt: skip
def test_many_captions_are_read_in_every_form(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name) == [("a.wav", one) for one in MANY]


def test_a_text_in_brackets_is_no_list(tmp_path: Path) -> None:
    texts = ["[Verse] soft piano [drums]", "(calm)", "[fast, loud]"]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"path": "a", "caption": one}) + "\n" for one in texts)
    )
    assert [caption for _, caption in read(tmp_path / "c.jsonl")] == texts


def test_a_prompt_is_the_first_caption_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"ytid": "a", "caption": MANY}) + "\n")
    assert [(row.name, row.caption) for row in read_captions(tmp_path / "c.jsonl", named=False)] == [
        ("a", "first")
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv"])
def test_tables_are_read_in_the_encodings_of_spreadsheets(tmp_path: Path, suffix: str, encoding: str) -> None:
    content = "file;caption\r\ncafé.wav;süß; x\r\n".replace("; x", "").encode(encoding)
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert read(path) == [("café.wav", "süß")]


def test_parquet_is_read_without_the_sound_in_it(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = {"audio": [{"bytes": b"RIFF", "path": "a.wav"}], "captions": [MANY], "start_s": [30]}
    write_table(pa.table(rows), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet") == [("a.wav", one) for one in MANY]


def test_wrong_rows_are_set_aside_by_reason_and_the_others_used(tmp_path: Path) -> None:
    root = music(tmp_path / "music", "a.wav", "b.wav", "1/c.wav", "2/c.wav")
    good = json.dumps({"path": "a.wav", "caption": "x"})
    wrong = [
        *('{"path": "b.wav", "caption": ""}', '{"path": "b.wav", "caption": []}', '{"path": "b.wav"}'),
        *('{"caption": "x"}', "{oops", "3", '{"path": "gone.wav", "caption": "x"}'),
        *('{"path": "c.wav", "caption": "x"}', '{"path": "../a.wav", "caption": "x"}'),
        '{"path": "b.wav", "caption": "' + "x" * 2**21 + '"}',
    ]
    (tmp_path / "c.jsonl").write_text("\n".join([*wrong, good]))
    made = source(root, captions=tmp_path / "c.jsonl")
    refs, skipped = made.tracks()
    assert [ref.track for ref in refs] == ["a.wav"]
    assert {one.track for one in skipped} == {"b.wav", "1/c.wav", "2/c.wav"}
    reasons = {one.reason.split(";")[0]: (one.rows, one.first) for one in made.set_aside()}
    assert reasons == {
        "has no caption": (3, ("line 1", "line 2", "line 3")),
        "names no file": (1, ("line 4",)),
        "is not valid JSON": (1, ("line 5",)),
        "should be a record with path and caption, is int": (1, ("line 6",)),
        "names a file that is not in the audio directory": (1, ("line 7 ('gone.wav')",)),
        "fits several files": (1, ("line 8 ('c.wav')",)),
        "names a file outside the audio directory": (1, ("line 9 ('../a.wav')",)),
        "is longer than 1,048,576 characters": (1, ("line 10",)),
    }


def test_a_wrong_line_of_a_table_does_not_hide_the_next(tmp_path: Path) -> None:
    rows = ["", "file,caption", "a.wav,x", f"b.wav,{'x' * 2**21}", "c.wav,x,y", "", "d.wav,", ",", "e.wav,x"]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    faults = Faults()
    found = [row.name for row in read_captions(tmp_path / "c.csv", faults=faults)]
    assert found == ["a.wav", "e.wav"]
    assert {one.first: one.reason.split(";")[0] for one in faults.found()} == {
        ("line 4",): "is longer than 1,048,576 characters",
        ("line 5",): "has more fields than the header",
        ("line 7",): "has no caption",
    }


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_lonely_quotation_mark_costs_its_row_alone(tmp_path: Path, delimiter: str) -> None:
    rows = [
        *("file,caption", 'a.wav,"bright" piano', 'b.wav,"bright piano', "c.wav,x", 'd.wav,"calm', "e.wav,x"),
        *('f.wav,"two', 'lines"', 'g.wav,"', *("h.wav,x",) * 100),
    ]
    (tmp_path / "c.csv").write_text("\n".join(rows).replace(",", delimiter))
    faults = Faults()
    found = [(row.name, row.caption) for row in read_captions(tmp_path / "c.csv", faults=faults)]
    whole = [("a.wav", "bright piano"), ("c.wav", "x"), ("e.wav", "x"), ("f.wav", "two lines")]
    assert found == [*whole, *[("h.wav", "x")] * 100]
    assert [(one.first, one.reason) for one in faults.found()] == [
        (("line 3", "line 5", "line 9"), "is not CSV; close its quotation mark")
    ]


@pytest.mark.parametrize(
    ("given", "there"),
    [
        ("SONG.mp3", "song.MP3"),
        (unicodedata.normalize("NFD", "café.wav"), unicodedata.normalize("NFC", "café.wav")),
        ("song.wav", "deep/er/song.wav"),
        ("music/deep/song.wav", "deep/song.wav"),
        ("{root}/deep/song.wav", "deep/song.wav"),
        ("./deep\\song.wav", "deep/song.wav"),
        ("deep/song", "deep/song.wav"),
        ("-0Gj8-vB1q4", "-0Gj8-vB1q4.wav"),
        ("-0Gj8-vB1q4", "[-0Gj8-vB1q4]-[30-40].wav"),
        ("-0Gj8-vB1q4", "clips/-0Gj8-vB1q4_30_40.wav"),
        ("-0Gj8-vB1q4", "-0Gj8-vB1q4_30000_40000.wav"),
        ("-0Gj8-vB1q4", "-0Gj8-vB1q4-30.wav"),
    ],
)
def test_the_file_of_a_row_is_found_by_its_usual_names(tmp_path: Path, given: str, there: str) -> None:
    root = music(tmp_path / "music", there, "other.wav", "0_______abc-30.wav")
    row = {"ytid": given.format(root=root), "start_s": 30, "caption": "x"}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    assert captions(root, captions=tmp_path / "c.jsonl") == {there: ("x",)}


def test_clips_of_one_video_are_told_by_their_start(tmp_path: Path) -> None:
    root = music(tmp_path / "music", "-0Gj8-vB1q4_30_40.wav", "-0Gj8-vB1q4_50_60.wav")
    (tmp_path / "c.csv").write_text("ytid,start_s,caption\n-0Gj8-vB1q4,50,x\n-0Gj8-vB1q4,70,y\n")
    assert captions(root, captions=tmp_path / "c.csv") == {"-0Gj8-vB1q4_50_60.wav": ("x",)}


RECORD = {
    "key": "",
    "artist": "Voyager I",
    "sample_rate": 48000,
    "title": "Enracinement",
    "bpm": 110.0,
    "moods": [],
}


def test_captions_beside_the_sound_files_are_read(tmp_path: Path) -> None:
    root = music(tmp_path / "music", "a.wav", "b.mp3", "deep/c.wav", "d.wav", "e.wav", "f.wav", "g.wav")
    described = {**RECORD, "description": "A chill song.", "genre": "electronic", "licence": "CC0"}
    tagged = {
        **RECORD,
        "description": None,
        "genre": "electronic",
        "moods": ["calm"],
        "instrument": "Piano, Bass",
    }
    (root / "a.json").write_text(json.dumps(described))
    (root / "b.json").write_text(json.dumps(tagged))
    (root / "deep/c.wav.txt").write_text("A third.\nA third again.\n")
    (root / "d.json").write_text("{oops")
    (root / "e.json").write_text(json.dumps(RECORD))
    (root / "f.json").write_text("[1]")
    made = source(root)
    refs, skipped = made.tracks()
    assert [(ref.track, ref.captions, ref.title) for ref in refs] == [
        ("a.wav", ("A chill song.",), "Enracinement"),
        ("b.mp3", ("Calm electronic music with piano and bass.",), "Enracinement"),
        ("deep/c.wav", ("A third.", "A third again."), "c"),
    ]
    assert refs[0].licence == "CC0"
    assert {one.track for one in skipped} == {"d.wav", "e.wav", "f.wav", "g.wav"}
    assert {one.first for one in made.set_aside()} == {("d.json",), ("e.json",), ("f.json",)}
    before = made.identity()
    (root / "a.json").write_text(json.dumps({**described, "description": "A warm song."}))
    assert source(root).identity() != before


def test_captions_may_be_a_folder_beside_that_of_the_sound(tmp_path: Path) -> None:
    root = music(tmp_path / "music", "a.wav", "deep/b.wav")
    music(tmp_path / "texts", "deep/b.txt")
    (tmp_path / "texts/deep/b.txt").write_text("A tune.")
    assert captions(root, captions=tmp_path / "texts") == {"deep/b.wav": ("A tune.",)}


def test_linked_folders_are_listed_once_and_broken_links_named(tmp_path: Path) -> None:
    root = music(tmp_path / "music", "a.wav", "z/b.wav")
    elsewhere = music(tmp_path / "disk", "c.wav", "d/e.wav")
    (root / "album").symlink_to(elsewhere)
    (root / "song.wav").symlink_to(elsewhere / "c.wav")
    (root / "again").symlink_to(root / "z")
    (root / "z/up").symlink_to(root)
    (elsewhere / "d/up").symlink_to(elsewhere)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    names = ["a.wav", "album/c.wav", "album/d/e.wav", "song.wav", "z/b.wav"]
    (tmp_path / "c.json").write_text(json.dumps(dict.fromkeys(names, "x")))
    refs, skipped = source(root, captions=tmp_path / "c.json").tracks()
    assert [ref.track for ref in refs] == names
    assert {(one.track, one.reason) for one in skipped} == {
        ("gone", "its link is broken"),
        ("gone.wav", "its link is broken"),
    }


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    root = music(tmp_path / "music", "a.wav", "closed/b.wav")
    (tmp_path / "c.json").write_text(json.dumps({"a.wav": "x"}))
    (root / "closed").chmod(0)
    try:
        if os.access(root / "closed", os.R_OK):
            pytest.skip("this user may read every folder")
        (one,) = source(root, captions=tmp_path / "c.json").tracks()[1]
    finally:
        (root / "closed").chmod(0o755)
    assert (one.track, one.reason) == ("closed", "cannot be listed: Permission denied")


def test_a_latin_1_table_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes("file,caption\na.wav,x\nb.wav,café\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"c\.csv, line 3: not UTF-8 text"):
        read(tmp_path / "c.csv")
