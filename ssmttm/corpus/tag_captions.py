"""Make captions of tags: MTG-Jamendo's, and the genre, moods and instruments of AudioCraft's records."""

from collections.abc import Mapping, Sequence


def sentence_from_tags(tags: Sequence[str]) -> str:
    """Return a caption of MTG-Jamendo tags such as `genre---rock`, `instrument---guitar`, `mood/theme---calm`."""
    kinds: dict[str, list[str]] = {}
    for tag in tags:
        kind, _, value = tag.partition("---")
        if value:
            kinds.setdefault(kind.split("/")[0], []).append(_COMPOUNDS.get(value, value))
    return sentence_of(kinds)


def sentence_of(kinds: Mapping[str, Sequence[str]]) -> str:
    """Return a caption of words by kind: genre, instrument and mood."""
    genre, instrument, mood = (kinds.get(kind, []) for kind in ("genre", "instrument", "mood"))
    words = f"{listed(mood)} {listed(genre)} music".strip() if mood or genre else "music"
    return f"{words[:1].upper()}{words[1:]}{f' with {listed(instrument)}' if instrument else ''}."


def listed(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


# The common ones of the compounds that Jamendo writes as one word.
_COMPOUNDS = {
    "acousticguitar": "acoustic guitar",
    "electricguitar": "electric guitar",
    "classicalguitar": "classical guitar",
    "drummachine": "drum machine",
    "easylistening": "easy listening",
    "electricpiano": "electric piano",
    "popfolk": "pop folk",
    "poprock": "pop rock",
    "singersongwriter": "singer-songwriter",
    "hiphop": "hip hop",
    "drumnbass": "drum and bass",
    "triphop": "trip hop",
    "newage": "new age",
    "hardrock": "hard rock",
    "punkrock": "punk rock",
}
