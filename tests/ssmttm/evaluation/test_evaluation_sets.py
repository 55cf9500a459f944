"""Which captions are evaluated, and what with: pairs where a recording is known for each, sets where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssmttm.codec.load import load_codec
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.errors import InputError
from ssmttm.evaluation.sets import RECORDING_RATE, choose_prompts


@pytest.fixture
def data(tiny_corpus: Path) -> TokenDataset:
    return TokenDataset(tiny_corpus, "valid")


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    for name, seconds in (("a.wav", 0.3), ("more/b.flac", 3.0)):
        soundfile.write(folder / name, np.sin(np.arange(int(seconds * 8000)) * 0.2), 8000)
    return folder


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_by_default_held_out_clips_are_decoded_and_paired_with_their_captions(data: TokenDataset) -> None:
    chosen = choose_prompts(data, 40, None, None, limit=5)
    assert chosen.captions == tuple(data.captions(range(5)))
    assert chosen.paired
    codec = load_codec(data.corpus / "codec")
    clips, rate = chosen.reference.clips([4, 1], codec)
    assert rate == 16000
    assert [len(clip) for clip in clips] == [n * 320 for n in np.minimum(data.lengths([4, 1]), 40)]
    assert np.array_equal(clips[1], codec.decode(data.codes([1])[..., :40].astype(np.uint16))[0])


def test_recordings_without_names_are_one_set_for_all_prompts(
    data: TokenDataset, recordings: Path, tmp_path: Path
) -> None:
    prompts = written(tmp_path / "p.csv", "caption\nOne\nTwo\nThree\n")
    for file in (None, prompts):
        chosen = choose_prompts(data, 50, file, recordings, limit=None)
        assert not chosen.paired
        assert len(chosen.reference) == 2
    clips, rate = chosen.reference.clips([0, 1], load_codec(data.corpus / "codec"))
    assert rate == RECORDING_RATE
    assert [len(clip) for clip in clips] == pytest.approx([0.3 * rate, 1.0 * rate], abs=2)


def test_recordings_are_found_by_path_or_by_name_without_suffix(
    data: TokenDataset, recordings: Path, tmp_path: Path
) -> None:
    prompts = written(
        tmp_path / "p.jsonl", '{"path": "more/b.flac", "caption": "B"}\n{"ytid": "a", "caption": "A"}\n'
    )
    chosen = choose_prompts(data, 50, prompts, recordings, limit=None)
    assert chosen.paired
    assert [path.name for path in chosen.reference.paths] == ["b.flac", "a.wav"]


def test_the_digest_is_of_the_recordings_and_not_of_their_names(data: TokenDataset, recordings: Path) -> None:
    before = choose_prompts(data, 50, None, recordings, None).reference.digest
    (recordings / "a.wav").rename(recordings / "0.wav")
    assert choose_prompts(data, 50, None, recordings, None).reference.digest == before
    (recordings / "0.wav").unlink()
    assert choose_prompts(data, 50, None, recordings, None).reference.digest != before


def test_what_is_missing_is_named(data: TokenDataset, recordings: Path, tmp_path: Path) -> None:
    gone = written(tmp_path / "gone.csv", "ytid,caption\nxyz,A\n")
    with pytest.raises(InputError, match=r"holds none of the recordings .*such as 'xyz'"):
        choose_prompts(data, 50, gone, recordings, None)
    with pytest.raises(InputError, match="holds no prompts"):
        choose_prompts(data, 50, written(tmp_path / "none.csv", "caption\n"), None, None)
    written(recordings / "a.wav", "no sound")
    damaged = choose_prompts(data, 50, None, recordings, None).reference
    with pytest.raises(InputError, match=r"a\.wav: unreadable audio"):
        damaged.clips([0], load_codec(data.corpus / "codec"))


def test_a_held_out_clip_sounds_the_same_whatever_clips_are_beside_it(data: TokenDataset) -> None:
    reference = choose_prompts(data, 50, None, None, limit=2).reference
    assert len(set(data.lengths([0, 1]))) == 2
    codec = load_codec(data.corpus / "codec")
    together, _ = reference.clips([0, 1], codec)
    for item, clip in enumerate(together):
        assert np.array_equal(clip, reference.clips([item], codec)[0][0])


def test_a_name_that_several_recordings_have_is_not_guessed(
    data: TokenDataset, recordings: Path, tmp_path: Path
) -> None:
    (recordings / "a.flac").write_bytes((recordings / "more" / "b.flac").read_bytes())
    by_path = written(tmp_path / "by_path.csv", "path,caption\na.flac,x\nb,y\n")
    chosen = choose_prompts(data, 40, by_path, recordings, None)
    assert [path.name for path in chosen.reference.paths] == ["a.flac", "b.flac"]
    by_name = written(tmp_path / "by_name.csv", "ytid,caption\na,x\n")
    with pytest.raises(InputError, match=r"prompt of 'a': may be a\.flac or a\.wav; name its path"):
        choose_prompts(data, 40, by_name, recordings, None)
