"""How a corpus looks in a terminal: what was built, what is in it, and which tracks were left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from harness.sheet import Sheet
from harness.terminal import counted

if TYPE_CHECKING:
    from ssmttm.corpus.describe import CorpusDescription
    from ssmttm.corpus.manifest import Manifest

_NAMED = 10  # tracks named a reason; --json names all


def print_built(console: Console, corpus: Path, manifest: Manifest) -> None:
    """One line of a corpus that is finished, and the tracks that are not in it."""
    from ssmttm.corpus.describe import left_out

    hours = sum(manifest.hours(split) for split in manifest.splits)
    _say(
        console,
        f"{corpus}: {hours:.2f} hours in {len(manifest.splits)} splits, fingerprint {manifest.fingerprint[:12]}",
    )
    _print_left_out(console, left_out(manifest))


def print_corpus(console: Console, corpus: Path, about: CorpusDescription) -> None:
    """What a corpus holds."""
    codec = about.codec
    _say(console, f"{corpus}: {about.name}, from {about.source}, fingerprint {about.fingerprint[:12]}")
    _say(
        console,
        f"codec {codec.name} ({codec.fingerprint[:12]}): {codec.sample_rate:,} Hz, {codec.frame_rate:g} frames a "
        f"second, {counted(codec.n_codebooks, 'codebook')} of {codec.codebook_size:,} entries",
    )
    books = range(1, codec.n_codebooks + 1)
    columns = ["split", "clips", "tracks", "hours", "tokens"]
    columns += [f"bits {n}" for n in books] + [f"same {n}" for n in books]
    title = (
        f"clips of {about.clip_seconds:.2f} s, {about.frames:,} frames; a codebook's entropy in bits, and the share of "
        "its codes that are the same as the one before"
    )
    sheet = Sheet(title, columns, columns[1:])
    for name, split in about.splits.items():
        counts = (f"{split.clips:,}", f"{split.tracks:,}", f"{split.hours:.2f}", f"{split.tokens:,}")
        of_books = [*split.entropy_bits, *split.repeat_share]
        sheet.add_row(name, *counts, *(f"{value:.2f}" for value in of_books))
    sheet.print(console)
    for name, lines in (("licences", about.licences), ("captions, of the first clips", about.captions)):
        _say(console, f"{name}:")
        for line in lines:
            _say(console, f"  {line}")
    _print_left_out(console, about.skipped_reasons)


def _print_left_out(console: Console, reasons: Mapping[str, Sequence[str]]) -> None:
    if not reasons:
        return
    _say(console, f"left out: {counted(sum(map(len, reasons.values())), 'track')}")
    for reason, tracks in reasons.items():
        more = f" and {len(tracks) - _NAMED} more" if len(tracks) > _NAMED else ""
        _say(console, f"  {', '.join(tracks[:_NAMED])}{more}: {reason}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
