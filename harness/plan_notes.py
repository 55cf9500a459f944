"""What a plan says beside its figures: coded notes on what they rest on and what stands in the way."""

from __future__ import annotations

import shutil
from collections.abc import Collection

from harness.cluster import Cluster
from harness.grid import CorpusView
from harness.memory import GIB
from harness.rundir import Root
from harness.study import Study

Note = tuple[str, str]


def notes_on(
    study: Study,
    corpus: CorpusView,
    cluster: Cluster,
    root: Root,
    *,
    text_is_known: bool,
    sources: Collection[str],
    needed: float,
    passing: float,
) -> tuple[Note, ...]:
    """Coded notes, (code, text): `sources` are what the speeds rest on, `needed` and `passing` GiB of disk."""
    on_corpus = _on_corpus(study, corpus, text_is_known=text_is_known)
    return (*on_corpus, *_on_speed(cluster, sources), *_on_disk(root, needed, passing))


def _on_corpus(study: Study, corpus: CorpusView, *, text_is_known: bool) -> list[Note]:
    path, encoder, facts = study.corpus.path, study.text.encoder, study.corpus.facts
    if not corpus.is_known:
        text = f"{path} is not here: costs follow corpus.facts, runs have no ids and cannot be submitted"
        if encoder != "bytes":
            text += f"; {encoder} was not looked for"
        return [("corpus_unknown", text)]
    if not path.exists():
        text = f"{path} is not here: captions count as long as they may be; `submit` needs the corpus"
        return [("corpus_elsewhere", text)]
    notes = []
    if not text_is_known:
        text = f"text encoder {encoder} is not here: runs have no ids and finished ones are not found"
        notes.append(("text_unknown", f"{text}; `submit` fetches it from the hub"))
    if facts is not None and facts.clips != corpus.clips:
        text = f"{path} has {corpus.clips:,} clips to train on; corpus.facts.clips is {facts.clips:,}"
        notes.append(("corpus_facts", text))
    return notes


def _on_speed(cluster: Cluster, sources: Collection[str]) -> list[Note]:
    notes = []
    if cluster.gpus:
        text = "memory is checked against engines on the CPU, which does not validate what CUDA kernels keep"
        notes.append(("memory_estimated", text))
    else:
        text = "no GPU here: a device is a CPU rank and GPU-hours are hours of such ranks"
        notes.append(("cpu_ranks", text))
    if "assumed" in sources:
        text = "no run on such a device has finished under this root: hours follow an assumed speed"
        notes.append(("speed_assumed", text))
    elif "borrowed" in sources:
        text = "some architectures have no finished run on such a device: their hours follow another's speed"
        notes.append(("speed_borrowed", text))
    return notes


def _on_disk(root: Root, needed: float, passing: float) -> list[Note]:
    place = root.path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    if free >= needed:
        return []
    text = (
        f"{root.path} has {free:.4g} GiB free, and training what is left takes about {needed:.4g} GiB, "
        f"{passing:.4g} GiB of them in passing; `ssmscale prune` frees what finished studies no longer need"
    )
    return [("disk_short", text)]
