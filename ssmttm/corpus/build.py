"""Build a corpus: read every track, fit the codec on the training split unless it is pretrained, write token shards.

A build can be stopped at any instant and started again with the same specification: finished tracks are not read
again, and the corpus has the same fingerprint as that of an uninterrupted build, for any number of workers. A build
returns a finished corpus unchanged, and never touches a corpus of another specification or other files.

Builds of the parts of one corpus share its folder. Each reads tracks as parts.py says; when all tracks are read, the
first fits the codec, all write shards, and the first to find every shard writes the manifest. A build in one process
is that of one part.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path

from filelock import Timeout
from pydantic import JsonValue

from ssmttm.codec.base import CODEC_FILE
from ssmttm.corpus.claim import (
    WORK,
    check_claim,
    claim,
    finished_corpus,
    keep_only_results_of,
    noting_refusal,
    recorded_recipe,
    remove_leftovers,
)
from ssmttm.corpus.contents import write_files
from ssmttm.corpus.groups import group_tracks, report_groups
from ssmttm.corpus.manifest import MANIFEST, Manifest, Skipped, load_manifest
from ssmttm.corpus.packages import installed_version
from ssmttm.corpus.parts import PartLocks, Share, divide, in_turn
from ssmttm.corpus.progress import Progress, pulsing
from ssmttm.corpus.published import SPLIT_COLUMN
from ssmttm.corpus.source import Source, TrackRef
from ssmttm.corpus.spec import RECIPE, BuildSpec
from ssmttm.corpus.split import limited, split_tracks
from ssmttm.corpus.stages import (
    SAME_MUSIC,
    clip_lines,
    fit_codec,
    near_tracks,
    pretrained_codec,
    read_tracks,
    usable_tracks,
    write_shards,
)
from ssmttm.corpus.tracks import TrackRecord, make_source
from ssmttm.corpus.workers import LocalWorkers, Workers
from ssmttm.corpus.writer import write_clips, write_manifest
from ssmttm.errors import InputError
from ssmttm.files import write_atomically
from ssmttm.limits import usable_cores
from ssmttm.locks import file_lock

_JOINS = "joins.lock"
"""Lock of the worker that does what one alone does for all parts: fit the codec, and write the manifest."""
_BEGIN_SECONDS = 60.0
"""Longest time to wait for other workers that begin; builds of former versions hold the lock to their end."""
JOBS = "jobs"
"""Folder in the work folder for who starts builds: it is left when the rest is removed."""


class OpenBuild:
    """A build of one corpus: what it is made of, checked; nothing is written yet."""

    def __init__(
        self, spec: BuildSpec, out: Path, device: str = "cpu", *, computes_elsewhere: bool = False
    ) -> None:
        """Open a build. Raises InputError if the source or the codec's model is wrong, or `out` holds something else.

        device: `cpu` or `cuda`, where a pretrained codec computes: of this machine unless the build
        `computes_elsewhere`.
        """
        if computes_elsewhere and device not in {"cpu", "cuda"}:
            raise InputError(f"--device {device}: other machines compute; choose cpu or cuda")
        is_here = spec.codec == "rvq" or not computes_elsewhere
        self.codec = pretrained_codec(spec, device if is_here else "cpu")
        self.spec = spec if self.codec is None else spec.settled(self.codec.facts)
        self.out, self.work = out, out / WORK
        self.device = device
        self.source = make_source(self.spec)
        self.recipe: dict[str, JsonValue] = {
            "recipe": RECIPE,
            "spec": self.spec.identity(),
            "source": self.source.identity(),
        }
        if self.codec is not None:
            self.recipe["codec"] = self.codec.fingerprint
        is_new = not self.is_finished and not self.work.exists()
        if is_new and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: exists and is not a corpus; choose another folder or empty it")

    def check(self) -> None:
        """Raise InputError if `out` holds a build of another specification, finished or not."""
        if self.is_finished:
            self.result()
        else:
            check_claim(self.recipe, self.out, self.tracks[0])

    @property
    def is_finished(self) -> bool:
        """True if the corpus is there."""
        return (self.out / MANIFEST).exists()

    def result(self) -> Manifest:
        """Return the manifest of the finished corpus; raises InputError if other files or choices made it."""
        return finished_corpus(self.recipe, self.out, self.spec.audio)

    @cached_property
    def full_recipe(self) -> dict[str, JsonValue]:
        """The recipe with the versions of the libraries."""
        return {**self.recipe, "made_with": _made_with(self.source, self.device if self.codec else None)}

    @cached_property
    def tracks(self) -> tuple[list[TrackRef], list[Skipped]]:
        """The tracks to read, and those that cannot be used; reading this raises InputError if the source is wrong."""
        refs, unused = self.source.tracks()
        return limited(refs, self.spec), unused


OpenWorkers = Callable[[OpenBuild, Progress], AbstractContextManager[Workers]]
"""Starts the workers of a build, which end with the block."""


def build_corpus(
    spec: BuildSpec,
    out: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Manifest:
    """Build the corpus of a specification at `out`, or return it if it is there already.

    device: `cpu` or `cuda`, where a pretrained codec computes. Raises InputError if the source or the codec's model is
    wrong, if `out` holds something else, or if another specification made the corpus there (the message names the
    differences); RuntimeError if a worker dies. With several workers the caller's main module must be importable
    (`if __name__ == "__main__":`), since they are spawned.
    """
    manifest = build_part(OpenBuild(spec, out, device), Share(), local_workers(workers), progress)
    assert manifest is not None  # no other worker reads tracks of this build
    return manifest


def local_workers(count: int | None = None) -> OpenWorkers:
    """Return what starts so many processes of this machine, one a core if not given."""
    return lambda build, progress: LocalWorkers(
        build.spec, build.out, build.work, count or usable_cores(), progress, build.codec, build.device
    )


def build_part(
    build: OpenBuild, share: Share, open_workers: OpenWorkers, progress: Progress | None = None
) -> Manifest | None:
    """Do one part of a build, and finish the corpus with the other parts' workers.

    Returns None if other workers still read tracks after WAIT_SECONDS; the last of them finishes the corpus. Raises as
    build_corpus does.
    """
    if build.is_finished:
        return build.result()
    progress = progress or Progress()
    progress.stage("find tracks", 1, 0)  # captions of a million tracks take half a minute
    build.tracks  # noqa: B018  # before the claim, so that a wrong source blocks no other build
    progress.advance()
    build.work.mkdir(parents=True, exist_ok=True)
    with PartLocks(build.work, share.of) as locks:
        if not _begin(build, share, locks):
            return build.result()
        try:
            with noting_refusal(build.out):
                is_finished = _Building(build, share, progress).run(locks, open_workers)
        except FileNotFoundError:
            if not build.is_finished:
                raise
            is_finished = True  # another worker finished the corpus and removed the files of the work
    if not is_finished:
        return None
    _tidy(build.work)
    return load_manifest(build.out)


def _begin(build: OpenBuild, share: Share, locks: PartLocks) -> bool:
    """Take a part and record the recipe; False if the corpus is finished. Raises InputError if another build runs."""
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(build.work / "lock").acquire(timeout=_BEGIN_SECONDS))
        except Timeout:
            raise _is_built(build.out) from None
        if build.is_finished:
            return False
        if locks.are_others() or (not locks.take(share.part) and share.of == 1):
            raise _is_built(build.out)
        if not locks.are_alive():
            locks.forget()  # tracks may have changed since
            claim(build.full_recipe, build.out, build.tracks[0])
        elif recorded_recipe(build.out) != build.full_recipe:
            check_claim(build.full_recipe, build.out, build.tracks[0])  # says what differs
            raise _is_built(build.out)
        if build.codec is not None and not (build.out / "codec" / CODEC_FILE).exists():
            build.codec.save(build.out / "codec")
    return True


def _is_built(out: Path) -> InputError:
    return InputError(f"{out}: another build is writing it; wait for its end or stop it")


class _Building:
    """One worker's build, from its tracks to the corpus."""

    def __init__(self, build: OpenBuild, share: Share, progress: Progress) -> None:
        self.build, self.share, self.progress = build, share, progress
        self.seconds: dict[str, float] = {}
        """Wall seconds of each stage."""
        self.known: dict[str, TrackRecord] = {}
        """Records of the tracks that this worker read or found."""
        self.audio_seconds = 0.0
        """Seconds of audio that this worker read, in all its tracks."""

    def run(self, locks: PartLocks, open_workers: OpenWorkers) -> bool:
        """Read tracks, and finish the corpus unless other workers still read; False if they do."""
        build, progress, seconds, spec = self.build, self.progress, self.seconds, self.build.spec
        with _timed(seconds, "all"):
            refs, unused = build.tracks
            parts = divide(refs, self.share.of)
            with open_workers(build, progress) as workers:
                with _timed(seconds, "read tracks"):
                    if not locks.read_all(
                        self.share, lambda part: self._read(workers, parts[part]), progress.pulse
                    ):
                        return False
                    if missing := [ref for ref in refs if ref.track not in self.known]:
                        self._read(workers, missing)
                records = sorted(self.known.values(), key=lambda record: record.track)
                published = {ref.track: ref.split for ref in refs if ref.split}
                usable, skipped = usable_tracks(records, spec, published=bool(published))
                near = pulsing(lambda: near_tracks(usable, build.work, spec), progress.pulse)
                groups = group_tracks(usable, refs, spec, near)
                splits = split_tracks(groups, spec, published)
                with _timed(seconds, "fit codec"), in_turn(build.work / _JOINS, progress.pulse):
                    if build.is_finished:  # else what others made could be taken for another build's
                        return True
                    keep_only_results_of(build.recipe, splits, build.out, fitted=build.codec is None)
                    fitted = build.codec or fit_codec(
                        build.out / "codec", build.work, splits["train"], spec, progress
                    )
                with _timed(seconds, "write shards"):
                    first = self.share.part / self.share.of
                    shards = write_shards(workers, splits, spec, progress, first)
        with in_turn(build.work / _JOINS, progress.pulse):
            if build.is_finished:
                return True
            remove_leftovers(build.out)
            described = {
                split: write_clips(build.out, split, clip_lines(tracks, spec), shards[split])
                for split, tracks in splits.items()
            }
            write_files(build.out, [(record.track, record.file) for record in records if record.file])
            twins = sum(one.reason.startswith(SAME_MUSIC) for one in skipped)
            report = self._report(workers.count)  # no part of the corpus's identity
            write_atomically(build.out / "build.json", (json.dumps(report, indent=1) + "\n").encode())
            write_manifest(
                build.out,
                source=build.source.name,
                codec=fitted.facts,
                frames=spec.frames,
                splits=described,
                licences={record.facts.licence for record in usable if record.facts},
                skipped=sorted([*unused, *skipped], key=lambda one: one.track),
                set_aside=build.source.set_aside(),
                grouping=report_groups(
                    groups, splits, spec, twins, published=_origin(spec) if published else ""
                ),
                recipe=build.full_recipe,
            )
        return True

    def _read(self, workers: Workers, refs: Sequence[TrackRef]) -> None:
        build = self.build
        records, seconds = read_tracks(workers, refs, build.spec, build.out, build.work, self.progress)
        self.known |= {record.track: record for record in records}
        self.audio_seconds += seconds

    def _report(self, workers: int) -> dict[str, JsonValue]:
        reading = self.seconds["read tracks"]
        return {
            "parts": self.share.of,
            "workers": workers,
            "seconds": dict(self.seconds),
            "hours_read_a_second": round(self.audio_seconds / 3600 / reading, 6) if reading else 0.0,
            **_peak_mib(),
        }


def _origin(spec: BuildSpec) -> str:
    """Return the origin of a published split, without the folders of this machine."""
    return (
        spec.splits_path.name if spec.splits_path else f"column {spec.splits or SPLIT_COLUMN} of the captions"
    )


def _made_with(source: Source, device: str | None) -> dict[str, JsonValue]:
    """Return the versions of the libraries, and the device of a pretrained codec."""
    names = ("numpy", "scipy", "scikit-learn") if device is None else ("numpy", "torch", "transformers")
    found = source.made_with() | {name: installed_version(name) for name in names}
    # A GPU rounds differently from a CPU, and sometimes another entry is the nearest.
    return found if device is None else found | {"device": device}


def _tidy(work: Path) -> None:
    """Remove the work folder of a finished build, but for that of its jobs."""
    for path in list(work.iterdir()) if work.is_dir() else []:
        if path.is_dir() and path.name != JOBS:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != JOBS:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        work.rmdir()


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


def _peak_mib() -> dict[str, float]:
    """Return the peak resident memory of this process and of the largest of its ended children."""
    import resource  # here, since some platforms lack it

    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    processes = {"parent_peak_mib": resource.RUSAGE_SELF, "worker_peak_mib": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(who).ru_maxrss / unit, 1) for name, who in processes.items()}
