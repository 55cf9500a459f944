"""Read from captions and from tags in sound files the facts that keep tracks together, as texts `kind:value`.

Names are compared without case, and words such as `Various Artists` or `Unknown` name none. Two albums of one title are
one album unless their album artists differ, since a compilation has an artist for each track.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssmttm.corpus.spec import BuildSpec

_ALBUM_ARTISTS = ("album_artist", "albumartist", "album_artists", "albumartists")
_NAMES = {
    "artist": ("artist", "artists", "artist_name", "artist_names", "track_artist", *_ALBUM_ARTISTS),
    "album": ("album", "album_name", "album_title", "release"),
}
_IDS = {"artist": ("artist_id", "artistid", "artist_ids"), "album": ("album_id", "albumid", "release_id")}
_VIDEOS = ("ytid", "youtube_id", "yt_id", "video_id")
_MOST_CHARACTERS = 200  # of a value
_NO_NAME = {
    *(
        "",
        "-",
        "?",
        "n/a",
        "na",
        "nan",
        "none",
        "null",
        "0",
        "-1",
        "various",
        "various artists",
        "va",
        "v.a.",
        "v/a",
    ),
    *(
        "unknown",
        "<unknown>",
        "[unknown]",
        "(unknown)",
        "unknown artist",
        "unknown album",
        "unknown artists",
        "artist",
    ),
    *(
        "album",
        "untitled",
        "untitled album",
        "no artist",
        "no album",
        "[no artist]",
        "anonymous",
        "diverse",
        "misc",
    ),
}
_USUAL_TITLES = {
    "greatest hits",
    "the greatest hits",
    "best of",
    "the best of",
    "live",
    "singles",
    "single",
    "demo",
}
_GUEST = re.compile(r"\s[(\[]?(?:feat\.?|ft\.?|featuring)\s.*", re.IGNORECASE)


def keys_of(record: Mapping[str, Any], spec: BuildSpec) -> tuple[str, ...]:
    """Return the keys of a record of captions or tags, for the kinds that a specification groups by."""
    plain = {_plain(name): value for name, value in record.items()}
    return tuple(dict.fromkeys(f"{kind}:{value}" for kind in spec.group_by for value in _values(kind, plain)))


def sound_tags(path: Path) -> dict[str, str]:
    """Return the tags in a sound file (ID3, Vorbis comments, MP4 and RIFF); none if it cannot be opened."""
    import av

    try:
        options = {"probesize": "32768"}  # tags come first; FFmpeg else searches megabytes of sound
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            streams = [stream.metadata for stream in container.streams.audio]
            return {
                key.lower(): value for tags in (*streams, container.metadata) for key, value in tags.items()
            }
    except (av.error.FFmpegError, OSError):
        return {}  # the reason is given where its sound is read


def _values(kind: str, record: Mapping[str, Any]) -> Iterator[str]:
    if kind == "content":
        # Clips of one video are parts of one recording.
        yield from (f"video {text}" for key in _VIDEOS for text in _texts(record.get(key)))
    elif kind == "artist":
        for key in _NAMES["artist"]:
            yield from _names(_GUEST.sub("", text) for text in _texts(record.get(key)))
        yield from _ids(kind, record)
    elif kind == "album":
        by = next(_names(text for key in _ALBUM_ARTISTS for text in _texts(record.get(key))), "")
        for key in _NAMES["album"]:
            for name in _names(_texts(record.get(key))):
                if by or name not in _USUAL_TITLES:
                    yield f"{name} by {by}" if by else name
        yield from _ids(kind, record)
    else:
        yield from _names(_texts(record.get(_plain(kind))))


def _ids(kind: str, record: Mapping[str, Any]) -> Iterator[str]:
    for key in _IDS[kind]:
        yield from (f"#{name}" for name in _names(_texts(record.get(key))))


def _names(texts: Iterator[str]) -> Iterator[str]:
    """Yield the texts that name something, in one spelling."""
    for text in texts:
        name = " ".join(unicodedata.normalize("NFKC", text).casefold().split())[:_MOST_CHARACTERS]
        if name not in _NO_NAME:
            yield name


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a value: a text with semicolons, a number, a list of them, or a record with name and id."""
    if isinstance(value, str):
        yield from (part.strip() for part in value.split(";"))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield f"{value:.15g}"
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, Mapping):
        for key in ("name", "title", "id"):
            yield from _texts(value.get(key))


def _plain(name: object) -> str:
    return re.sub(r"[\s.\-]+", "_", str(name).strip().lower())
