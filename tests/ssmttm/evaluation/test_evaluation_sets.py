"""Captions and references of an evaluation: pairs if each prompt names a recording, sets otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ssmttm.codec.load import load_codec
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.errors import InputError
from ssmttm.evaluation.sets import RECORDING_RATE, PromptSet, choose_prompts


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


@pytest.fixture
def choose(data: TokenDataset, recordings: Path, tmp_path: Path) -> Callable[..., PromptSet]:
    """Choose prompts from the text of a file, None for the held-out clips, with the recordings as reference."""

    def chosen(text: str | None = None, suffix: str = "csv") -> PromptSet:
        prompts = None
        if text is not None:
            prompts = tmp_path / f"prompts.{suffix}"
            prompts.write_text(text, encoding="utf-8")
        return choose_prompts(data, 50, prompts, recordings, limit=None)

    return chosen


def names(chosen: PromptSet) -> list[str]:
    return [path.name for path in chosen.reference.paths]


def test_by_default_held_out_clips_are_decoded_and_paired_with_their_captions(data: TokenDataset) -> None:
    chosen = choose_prompts(data, 40, None, None, limit=5)
    assert chosen.captions == tuple(data.captions(range(5)))
    assert chosen.paired
    codec = load_codec(data.corpus / "codec")
    clips, rate = chosen.reference.clips([4, 1], codec)
    assert rate == 16000
    assert [len(clip) for clip in clips] == [n * 320 for n in np.minimum(data.lengths([4, 1]), 40)]
    assert np.array_equal(clips[1], codec.decode(data.codes([1])[..., :40].astype(np.uint16))[0])


def test_recordings_without_names_are_one_set_for_all_prompts(choose: Callable[..., PromptSet]) -> None:
    for text in (None, "caption\nOne\nTwo\nThree\n"):
        chosen = choose(text)
        assert not chosen.paired
        assert len(chosen.reference) == 2
    clips, rate = chosen.reference.clips([0, 1], codec=None)
    assert rate == RECORDING_RATE
    assert [len(clip) for clip in clips] == pytest.approx([0.3 * rate, 1.0 * rate], abs=2)


def test_recordings_are_found_by_path_or_by_name_without_suffix(choose: Callable[..., PromptSet]) -> None:
    chosen = choose('{"path": "more/b.flac", "caption": "B"}\n{"ytid": "a", "caption": "A"}\n', "jsonl")
    assert chosen.paired
    assert names(chosen) == ["b.flac", "a.wav"]


def test_the_digest_covers_the_recordings_without_their_names(choose: Any, recordings: Path) -> None:
    before = choose().reference.digest
    (recordings / "a.wav").rename(recordings / "0.wav")
    assert choose().reference.digest == before
    (recordings / "0.wav").unlink()
    assert choose().reference.digest != before


def test_missing_recordings_and_prompts_are_explained(choose: Any, recordings: Path) -> None:
    with pytest.raises(InputError, match=r"holds none of the recordings .*such as 'xyz'"):
        choose("ytid,caption\nxyz,A\n")
    with pytest.raises(InputError, match="holds no prompts"):
        choose("caption\n")
    (recordings / "a.wav").write_text("no sound")
    with pytest.raises(InputError, match=r"a\.wav: unreadable audio"):
        choose().reference.clips([0], codec=None)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (
            "a.wav",
            lambda sound: sound[: len(sound) // 2],
            r"a\.wav: damaged: its file ends after 0\.1[45] s of 0\.30 s",
        ),
        ("a.wav", lambda sound: sound[:44] + bytes(len(sound) - 44), r"a\.wav: silent"),
        ("more/b.flac", lambda sound: sound[:9000], r"b\.flac: damaged: its file ends after"),
    ],
)
def test_a_damaged_or_silent_recording_is_named(
    choose: Any, recordings: Path, name: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    (recordings / name).write_bytes(damage((recordings / name).read_bytes()))
    with pytest.raises(InputError, match=said + ".*; remove it from the reference"):
        choose().reference.clips([0, 1], codec=None)


def test_a_held_out_clip_does_not_depend_on_the_other_clips(data: TokenDataset) -> None:
    reference = choose_prompts(data, 50, None, None, limit=2).reference
    assert len(set(data.lengths([0, 1]))) == 2
    codec = load_codec(data.corpus / "codec")
    together, _ = reference.clips([0, 1], codec)
    for item, clip in enumerate(together):
        assert np.array_equal(clip, reference.clips([item], codec)[0][0])


def test_a_name_shared_by_several_recordings_is_refused(choose: Any, recordings: Path) -> None:
    (recordings / "a.flac").write_bytes((recordings / "more" / "b.flac").read_bytes())
    assert names(choose("path,caption\na.flac,x\nb,y\n")) == ["a.flac", "b.flac"]
    with pytest.raises(InputError, match=r"prompt of 'a': may be a\.flac or a\.wav; give the path"):
        choose("ytid,caption\na,x\n")
