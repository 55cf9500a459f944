"""Find the sound file that a row of captions means, as data sets and their downloaders name files.

Only files of the listing are ever found, so that no row of a stranger's captions file opens another file.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

from ssmttm.corpus.audio import SUFFIXES

OUTSIDE = "names a file outside the audio directory; give a path relative to it"
ABSENT = "names a file that is not in the audio directory"
SEVERAL = "fits several files; give the path in the audio directory"

# A clip of a video: `ytid-30`, `ytid_30_40`, `[ytid]-[30-40]`, `ytid_30000_40000`.
_CLIP = re.compile(r"\[?([\w-]{11})\]?[-_ ]+\[?(\d+)(?:\.\d+)?(?:[-_]\d+(?:\.\d+)?)?\]?")
_Index = dict[str, list[str]]


class FileNames:
    """The sound files of a directory, by all names that captions give them."""

    def __init__(self, root: Path, files: Iterable[str]) -> None:
        self._roots = {root.absolute().as_posix(), root.resolve().as_posix()}
        self._own = _folded(root.absolute().name)
        self._files = frozenset(files)

    def named(self, name: str) -> str | None:
        """Return the file of a name, if there is one."""
        return self.find(name)[0] or None

    def find(self, given: str, start: str = "") -> tuple[str, str]:
        """Return (file, reason): the file that a row names, or an empty text and why there is none.

        start: the second at which the row's clip begins in its video.
        """
        if given in self._files:
            return given, ""
        name = self._relative(given.replace("\\", "/"))
        if name is None:
            return "", OUTSIDE
        if name in self._files:
            return name, ""
        for candidates in self._candidates(name):
            if candidates:
                meant = _narrowed(candidates, name, start)
                return (meant[0], "") if len(meant) == 1 else ("", SEVERAL)
        return "", ABSENT

    def _relative(self, name: str) -> str | None:
        """Return a name relative to the directory; None if it leads out."""
        for root in self._roots:
            if name.startswith(f"{root}/"):
                name = name[len(root) + 1 :]
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or ":" in "".join(plain.parts[:1]):
            return None
        return str(plain)

    def _candidates(self, name: str) -> Iterator[list[str]]:
        """Yield the files that a name may mean, the surest first."""
        key = _folded(name)
        whole = key.endswith(SUFFIXES)
        keys = [key, key.removeprefix(f"{self._own}/")]
        if whole:  # the file of MTG-Jamendo's low-quality audio for the row 14/214.mp3 is 14/214.low.mp3
            low = PurePosixPath(key)
            keys.append(low.with_name(f"{low.stem}.low{low.suffix}").as_posix())
        for index in (self._paths,) if whole else (self._paths, self._without_suffix):
            yield from (index.get(one, []) for one in keys)
        if "/" in name:
            return
        if whole:
            yield self._names.get(key, [])
            return
        yield self._stems.get(key, [])
        yield self._stems.get(key.removeprefix("track_").lstrip("0"), [])
        yield self._clips.get(name, [])

    @cached_property
    def _paths(self) -> _Index:
        return self._by(lambda file: [_folded(file)])

    @cached_property
    def _without_suffix(self) -> _Index:
        return self._by(lambda file: [_folded(os.path.splitext(file)[0])])  # noqa: PTH122  # a text, not a Path

    @cached_property
    def _names(self) -> _Index:
        return self._by(lambda file: [_folded(PurePosixPath(file).name)])

    @cached_property
    def _stems(self) -> _Index:
        return self._by(lambda file: {stem := _folded(PurePosixPath(file).stem), stem.removesuffix(".low")})

    @cached_property
    def _clips(self) -> _Index:
        return self._by(lambda file: [found[1]] if (found := _clip(file)) else [])

    def _by(self, names: Callable[[str], Iterable[str]]) -> _Index:
        index: _Index = {}
        for file in self._files:
            for name in names(file):
                index.setdefault(name, []).append(file)
        return index


def _narrowed(files: list[str], name: str, start: str) -> list[str]:
    """Return those of several files that are spelt as the name is, or else begin at that second of their video."""
    if len(files) == 1:
        return files
    spelt = [one for one in files if name in {one, (path := PurePosixPath(one)).name, path.stem}]
    return spelt or [one for one in files if _begins_at(one, start)] or files


def _clip(file: str) -> re.Match[str] | None:
    return _CLIP.fullmatch(PurePosixPath(file).stem)


def _begins_at(file: str, start: str) -> bool:
    """Return True if the name of a clip says that it begins at that second, in seconds or milliseconds."""
    found = _clip(file)
    try:
        return found is not None and int(found[2]) in (int(float(start)), int(1000 * float(start)))
    except (ValueError, OverflowError):
        return False


def _folded(name: str) -> str:
    """Return a name without differences of case and of composed or decomposed letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
