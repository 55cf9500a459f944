"""Sound files are read whole, with their true length, or left out by name: whatever the format, damage or content."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from ssmttm.corpus.audio import SUFFIXES, stream_audio
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.folder import FolderSource
from ssmttm.corpus.source import SkipTrackError
from ssmttm.corpus.spec import BuildSpec
from tests.sounds import Sound, ape, encode, id3v1, id3v2, mp3, music

RATE = 16000


@pytest.fixture
def recorded(cases: Path) -> Path:
    """Folder of sound files that went wrong."""
    return cases.parent / "audio"


def read(path: Path, rate: int = RATE) -> Sound:
    return np.concatenate([np.zeros(0, np.float32), *stream_audio(path, rate)])


def seconds(path: Path) -> float:
    return len(read(path)) / RATE


def refusal(path: Path) -> str:
    with pytest.raises(SkipTrackError) as caught:
        read(path)
    return str(caught.value)


def by_soundfile(path: Path, rate: int) -> Sound:
    """Read as earlier versions did: libsndfile, the mean of the channels, soxr."""
    blocks = []
    with soundfile.SoundFile(path) as file:
        resample = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32")
        while len(block := file.read(10 * file.samplerate, dtype="float32", always_2d=True)):
            mono = block.mean(axis=1, dtype=np.float32)
            blocks.append(mono if rate == file.samplerate else resample.resample_chunk(mono))
        if rate != file.samplerate:
            blocks.append(resample.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(blocks)


def test_the_recorded_cases_are_whole_or_named(recorded: Path) -> None:
    assert seconds(recorded / "vbr_without_header.mp3") == pytest.approx(6.0, abs=0.07)
    assert refusal(recorded / "damaged_middle.mp3").startswith("damaged: the 4,179 bytes at 2.98 s")
    assert refusal(recorded / "truncated.mp3") == "damaged: its file ends after 2.95 s of 6.00 s"
    assert refusal(recorded / "truncated.ogg") == "damaged: its file is cut off after 0.99 s"


@pytest.mark.parametrize(("channels", "rate"), [(1, 44100), (2, 44100), (2, 16000), (8, 16000)])
@pytest.mark.parametrize(
    ("kind", "subtypes"),
    [
        ("wav", "PCM_U8 PCM_16 PCM_24 PCM_32 FLOAT DOUBLE ULAW"),
        ("flac", "PCM_S8 PCM_16 PCM_24"),
        ("aiff", "PCM_16 PCM_24 FLOAT"),
    ],
)
def test_lossless_files_keep_every_bit_of_earlier_versions(
    tmp_path: Path, kind: str, subtypes: str, channels: int, rate: int
) -> None:
    sound = music(10.1, rate, channels).T  # two blocks
    for subtype in subtypes.split():
        path = tmp_path / f"x.{kind}"
        soundfile.write(path, sound, rate, subtype=subtype)
        assert read(path).tobytes() == by_soundfile(path, RATE).tobytes(), subtype


def test_lossy_files_differ_from_earlier_versions_by_rounding_alone(tmp_path: Path) -> None:
    sound = music(3, 44100, 2)
    soundfile.write(tmp_path / "x.ogg", sound.T, 44100)
    mp3(tmp_path / "x.mp3", sound, 44100)
    for name in ("x.ogg", "x.mp3"):
        before, now = by_soundfile(tmp_path / name, RATE), read(tmp_path / name)
        assert len(before) == len(now) == 3 * RATE
        assert np.abs(before - now).max() < 3e-6


FORMATS: dict[str, Callable[[Path], object]] = {
    "aac.m4a": lambda path: encode(path, "aac", music(3, 44100, 2), 44100),
    "faststart.mp4": lambda path: encode(path, "aac", music(3, 8000), 8000, muxed={"movflags": "faststart"}),
    "fragments.mp4": lambda path: encode(
        path, "aac", music(3, 44100), 44100, muxed={"movflags": "frag_keyframe+empty_moov"}
    ),
    "lossless.m4a": lambda path: encode(path, "alac", music(3, 44100, 2), 44100),
    "adts.aac": lambda path: encode(path, "aac", music(3, 44100), 44100, muxer="adts"),
    "x.opus": lambda path: encode(path, "libopus", music(3, 48000, 2), 48000),
    "opus.ogg": lambda path: encode(path, "libopus", music(3, 48000), 48000),
    "flac.oga": lambda path: encode(path, "flac", music(3, 44100), 44100, muxer="ogg"),
    "x.webm": lambda path: encode(path, "libopus", music(3, 48000), 48000),
    "x.mka": lambda path: encode(path, "flac", music(3, 44100, 2), 44100),
    "x.aif": lambda path: encode(path, "pcm_s16be", music(3, 44100, 2), 44100),
    "x.au": lambda path: encode(path, "pcm_s16be", music(3, 22050), 22050),
    "x.mp2": lambda path: encode(path, "mp2", music(3, 44100, 2), 44100),
    "cbr.mp3": lambda path: mp3(path, music(3, 44100, 2), 44100, bit_rate=128000),
    "vbr.mp3": lambda path: mp3(path, music(3, 48000, 6)[:1], 48000, flags="+qscale", global_quality="400"),
    "mpeg25.mp3": lambda path: mp3(path, music(3, 8000), 8000),
    "headerless.mp3": lambda path: mp3(path, music(3, 22050), 22050, header=False),
    "six.wav": lambda path: encode(path, "pcm_s24le", music(3, 96000, 6), 96000),
    "mp3 in a.wav": lambda path: encode(path, "libmp3lame", music(3, 44100), 44100),
    "x.flac": lambda path: encode(path, "flac", music(3, 96000, 2), 96000),
    "vorbis.ogg": lambda path: soundfile.write(path, music(3, 44100, 2).T, 44100),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a file of each format."""
    folder = tmp_path_factory.mktemp("formats")
    for name, write in FORMATS.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_with_its_true_length(written: Path, name: str) -> None:
    assert Path(name).suffix in SUFFIXES
    found = read(written / name)
    # What keeps no padding ends with the encoder's last frame: 1,024 samples of AAC, 0.13 s at 8 kHz.
    assert len(found) / RATE == pytest.approx(3.0, abs=0.13 if name == "faststart.mp4" else 0.065)
    assert 0.1 < np.abs(found).max() < 0.8


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_cut_off_is_named_and_never_short(written: Path, tmp_path: Path, name: str) -> None:
    path, whole = tmp_path / name, (written / name).read_bytes()
    path.write_bytes(whole[: len(whole) * 45 // 100 + 1])
    assert refusal(path).startswith(("damaged: its file", "unreadable audio: the index of an MP4"))


@pytest.mark.parametrize(
    "name", sorted(FORMATS.keys() - {"six.wav", "x.aif", "x.au"})
)  # every value is a sample of PCM
@pytest.mark.parametrize("damage", ["noise", "zeros"])
def test_a_file_damaged_in_the_middle_is_named(written: Path, tmp_path: Path, name: str, damage: str) -> None:
    path, whole = tmp_path / name, (written / name).read_bytes()
    lost = min(6000, len(whole) // 4)
    other = np.random.default_rng(0).bytes(lost) if damage == "noise" else bytes(lost)
    path.write_bytes(whole[: len(whole) // 2] + other + whole[len(whole) // 2 + lost :])
    assert refusal(path).startswith("damaged: ")


def test_one_wrong_bit_of_a_flac_is_found(tmp_path: Path) -> None:
    path = encode(tmp_path / "x.flac", "flac", music(3, 44100), 44100)
    sound = bytearray(path.read_bytes())
    sound[len(sound) // 2] ^= 4
    path.write_bytes(sound)
    assert refusal(path).startswith("damaged: ")


def test_joined_files_are_read_to_the_end(tmp_path: Path) -> None:
    one = mp3(tmp_path / "one.mp3", music(3, 44100, 2), 44100, bit_rate=128000)
    other = mp3(tmp_path / "other.mp3", music(2, 48000), 48000, bit_rate=64000)
    plain = mp3(tmp_path / "plain.mp3", music(2, 22050), 22050, header=False, bit_rate=32000)
    aac = encode(tmp_path / "x.aac", "aac", music(3, 44100), 44100, muxer="adts").read_bytes()
    soundfile.write(tmp_path / "x.ogg", music(3, 22050)[0], 22050)
    ogg = (tmp_path / "x.ogg").read_bytes()
    for name, content, length in (
        ("a.mp3", one + one, 6.0),
        ("b.mp3", one + other, 5.0),
        ("c.mp3", one + id3v1() + id3v2(b"x" * 3000) + other + ape(header=True), 5.0),
        ("d.mp3", plain + one, 5.0),
        ("e.mp3", one + plain, 5.0),
        ("f.aac", aac + aac, 6.0),
        ("g.ogg", ogg + ogg, 6.0),
    ):
        (tmp_path / name).write_bytes(content)
        assert seconds(tmp_path / name) == pytest.approx(length, abs=0.1), name
    (tmp_path / "a.mp3").write_bytes(one + one[: len(one) // 2])
    assert refusal(tmp_path / "a.mp3") == "damaged: its file ends after 4.46 s of 6.00 s"
    sound = soundfile.SoundFile(tmp_path / "x.wav", "w", 8000, 1)
    sound.write(music(3, 8000)[0])
    sound.close()
    (tmp_path / "x.wav").write_bytes((tmp_path / "x.wav").read_bytes() * 2)
    assert "another WAV file is joined" in refusal(tmp_path / "x.wav")


def test_both_parts_of_joined_files_are_at_the_corpus_rate(tmp_path: Path) -> None:
    parts = []
    for rate in (44100, 8000):
        tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)[None].astype(np.float32)
        parts.append(mp3(tmp_path / "x.mp3", tone, rate))
    (tmp_path / "x.mp3").write_bytes(b"".join(parts))
    found = read(tmp_path / "x.mp3")
    for part in (found[: 2 * RATE], found[2 * RATE : 4 * RATE]):
        assert np.argmax(np.abs(np.fft.rfft(part[:RATE]))) == 440


def test_tags_padding_and_junk_at_the_ends_are_no_damage(tmp_path: Path) -> None:
    sound = mp3(tmp_path / "x.mp3", music(3, 44100), 44100, header=False)
    with_header = mp3(tmp_path / "x.mp3", music(3, 44100), 44100)
    frames = id3v2(b"APIC" + sound[:9000])  # a picture in which a reader could find frames
    aac = encode(tmp_path / "x.aac", "aac", music(3, 44100), 44100, muxer="adts").read_bytes()
    flac = encode(tmp_path / "x.flac", "flac", music(3, 44100), 44100).read_bytes()
    lyrics = b"LYRICSBEGININD0000200" + b"la " * 50 + b"000171LYRICS200"
    for name, content in (
        ("picture.mp3", frames + sound),
        ("padded.mp3", id3v2(b"x", padding=2000) + sound),
        ("old tag.mp3", sound + id3v1()),
        ("ape.mp3", sound + ape(header=True) + id3v1()),
        ("ape 1.mp3", sound + ape(header=False) + id3v1()),
        ("lyrics.mp3", sound + lyrics + id3v1()),
        ("junk.mp3", sound + b"\1" * 3000),
        ("zeros.mp3", with_header + bytes(50_000)),
        ("before.mp3", b"abc" * 1000 + sound),
        ("tag.aac", aac + ape(header=True) + id3v1()),
        ("tag.flac", id3v2(b"x" * 500) + flac + id3v1()),
    ):
        (tmp_path / name).write_bytes(content)
        assert seconds(tmp_path / name) == pytest.approx(3.0, abs=0.06), name
    (tmp_path / "lost.mp3").write_bytes(sound + bytes(50_000))
    assert refusal(tmp_path / "lost.mp3").startswith("damaged: the last 50,000 bytes, after 3.03 s")


def test_an_mp3_cut_out_of_a_longer_one_is_read(tmp_path: Path) -> None:
    whole = mp3(tmp_path / "x.mp3", music(6, 44100), 44100, bit_rate=64000)
    (tmp_path / "x.mp3").write_bytes(whole[len(whole) // 2 :])  # its first frames need bytes of those before
    assert seconds(tmp_path / "x.mp3") == pytest.approx(3.0, abs=0.1)


def test_a_wav_written_to_a_pipe_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, music(3, 44100)[0], 44100)
    sound = bytearray(path.read_bytes())
    for size in (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        sound[40:44] = size.to_bytes(4, "little")
        path.write_bytes(sound)
        assert seconds(path) == pytest.approx(3.0, abs=0.001), hex(size)
    sound[40:44] = (len(sound) - 8).to_bytes(4, "little")  # a program that counts the header as sound
    path.write_bytes(sound)
    assert seconds(path) == pytest.approx(3.0, abs=0.001)


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    sound = mp3(tmp_path / "x.mp3", music(3, 44100), 44100)
    (tmp_path / "x.wav").write_bytes(sound)
    assert seconds(tmp_path / "x.wav") == pytest.approx(3.0, abs=0.01)
    (tmp_path / "list.mp3").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'x.mp3'}\n")
    assert "in a format that is not read" in refusal(tmp_path / "list.mp3")
    (tmp_path / "list.m4a").write_text(f"#EXTM3U\n#EXTINF:3,\n{tmp_path / 'x.mp3'}\n")
    assert refusal(tmp_path / "list.m4a").startswith("unreadable audio")


def test_pictures_are_no_sound(tmp_path: Path) -> None:
    def with_pictures(path: Path, sound: Sound | None) -> Path:
        with av.open(str(path), "w") as container:
            film = container.add_stream("mpeg4", rate=10)
            film.width = film.height = 64
            film.pix_fmt = "yuv420p"
            stream = container.add_stream("aac", rate=44100, layout="mono") if sound is not None else None
            for number in range(50):
                frame = av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), format="yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(film.encode(frame))
            container.mux(film.encode(None))
            if stream is not None:
                whole = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
                whole.rate, whole.pts, whole.time_base = 44100, 0, Fraction(1, 44100)
                for each in [
                    *av.AudioResampler("fltp", "mono", 44100, frame_size=1024).resample(whole),
                    None,
                ]:
                    container.mux(stream.encode(each))
        return path

    # The sound is shorter than the film.
    assert seconds(with_pictures(tmp_path / "film.mp4", music(3, 44100))) == pytest.approx(3.0, abs=0.06)
    assert (
        refusal(with_pictures(tmp_path / "silent.mp4", None)) == "unreadable audio: the file holds no sound"
    )


def in_every_codec(folder: Path, sound: Sound) -> list[Path]:
    """Write sound at 44,100 Hz as WAV, MP3 and Vorbis."""
    soundfile.write(folder / "x.wav", sound.T, 44100)
    soundfile.write(folder / "x.ogg", sound.T, 44100)
    mp3(folder / "x.mp3", sound, 44100)
    return [folder / "x.wav", folder / "x.ogg", folder / "x.mp3"]


def test_content_that_is_no_music_is_named(tmp_path: Path) -> None:
    tune = music(3, 44100)
    still = np.zeros_like(tune)
    dither = np.random.default_rng(0).triangular(-1, 0, 1, tune.shape).astype(np.float32) / 32768
    for sound, reason in (
        (still, "silent: nothing is louder than -80 dBFS"),
        (np.concatenate([dither, dither[:, ::-1]]), "silent: nothing is louder than -80 dBFS"),
        (still + np.float32(0.3), "constant: all samples are near 0.3"),
        (np.concatenate([tune, -tune]), "channels cancel: they are in antiphase, so that mono is silent"),
        (
            np.concatenate([tune, -0.97 * tune]),
            "channels cancel: they are in antiphase, so that mono is silent",
        ),
    ):
        for path in in_every_codec(tmp_path, sound):
            found = refusal(path)
            assert found.startswith(reason) or (reason[:8] == found[:8] == "constant"), path.name


def test_music_that_is_quiet_sparse_wide_or_off_centre_is_kept(tmp_path: Path) -> None:
    tune = music(3, 44100)
    fades = np.exp(-np.arange(44100) / 3000).astype(np.float32)
    hit = np.concatenate(
        [np.zeros((1, 44100), np.float32), tune[:, :44100] * fades, tune[:, 44100:88200] * 0], axis=1
    )
    for sound in (
        tune * 0.002,  # -60 dBFS
        hit,
        np.concatenate([tune, -0.75 * tune]),
        np.concatenate([tune, tune * 0]),
        tune * 0.3 + np.float32(0.3),
    ):
        for path in in_every_codec(tmp_path, sound):
            assert seconds(path) == pytest.approx(3.0, abs=0.01), path.name
    soundfile.write(tmp_path / "eight.wav", np.concatenate([tune, np.zeros((7, 3 * 44100))]).T, 44100)
    soundfile.write(tmp_path / "hot.wav", tune[0] * 20, 44100, subtype="FLOAT")  # 20 dB above full scale
    assert seconds(tmp_path / "eight.wav") == seconds(tmp_path / "hot.wav") == 3.0


def test_one_absurd_sample_is_named_and_the_build_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "music"
    root.mkdir()
    for number in range(3):
        soundfile.write(root / f"{number}.wav", music(4, RATE, seed=number)[0], RATE)
    wrong = {"huge": 1e30, "endless": np.inf, "nameless": np.nan, "integers": 12_000}
    for name, value in wrong.items():
        sound = music(4, RATE, 2).astype(np.float64)
        sound[:, 30_000] = value, -value  # the mean of the channels is finite
        soundfile.write(root / f"{name}.wav", sound.T, RATE, subtype="DOUBLE" if value == 1e30 else "FLOAT")
    names = sorted(path.name for path in root.iterdir())
    (root / "captions.csv").write_text("path,caption\n" + "".join(f"{name},A tune.\n" for name in names))
    spec = BuildSpec(
        source="folder", audio=root, codebooks=1, codebook_size=16, segment_seconds=2.0, valid=0.3
    )
    assert len(FolderSource(spec).tracks()[0]) == 7
    manifest = build_corpus(spec, tmp_path / "out", workers=1)
    assert {one.track: one.reason for one in manifest.skipped} == {
        "huge.wav": "absurd values: up to 1e+30, where full scale is 1",
        "endless.wav": "absurd values: some are infinite or not numbers",
        "nameless.wav": "absurd values: some are infinite or not numbers",
        "integers.wav": "absurd values: up to 1.2e+04, where full scale is 1",
    }
    assert manifest.splits["train"].tracks + manifest.splits["valid"].tracks == 3


def test_no_more_is_read_and_judged_than_asked_for(tmp_path: Path) -> None:
    sound = np.concatenate([music(25, RATE)[0], np.full(RATE, 1e30)])
    soundfile.write(tmp_path / "x.wav", sound, RATE, subtype="FLOAT")
    assert sum(map(len, stream_audio(tmp_path / "x.wav", RATE, seconds=12))) == 20 * RATE  # two blocks
    assert refusal(tmp_path / "x.wav").startswith("absurd values")
