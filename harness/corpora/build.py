"""Build a corpus by tasks: divide it into parts, choose their resources, and run them or hand them over.

Every part may die at any instant and is begun again. No part joins the others' work: the last of them finishes the
corpus (ssmttm.corpus.parts). With Ray Data there is one task, a driver for all tracks.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.common.format import Estimate, counted
from harness.corpora.part import BuildRequest
from harness.dispatch.arrays import ArrayStore
from harness.dispatch.base import Backend, SubmitTarget
from harness.dispatch.part import PARTS, Part
from harness.plan.cluster import Cluster, this_machine
from harness.record.jobs import JobView, SchedulerUnavailable
from harness.submit.parts import (
    PartsHandedOver,
    PartState,
    PartStatus,
    hand_over_parts,
    live_jobs,
    open_backend_for_parts,
    run_parts,
    states_of_parts,
)
from ssmttm.corpus.build import JOBS, OpenBuild, build_part
from ssmttm.corpus.manifest import Manifest
from ssmttm.corpus.parts import Share, divide, estimated_seconds
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError

MOST_PARTS = 16
"""Largest number of parts unless the user gives one: more of them wait in queues for little."""
SPEEDS = {"bach": 10.0, "rvq": 50.0, "cpu": 2.0, "cuda": 100.0}
"""Seconds of audio that one part reads in a second: scores that are rendered, recordings for rvq, and recordings for a
pretrained codec by its device. Slow cases, since jobs ask for time by them; a job that runs out of it goes on."""
_DRIVER = "ray-data"


@dataclass(frozen=True)
class CorpusTasks:
    """The tasks of a corpus, checked and ready to be submitted; nothing is written yet."""

    build: OpenBuild
    backend: Backend
    parts: tuple[Part, ...]

    @property
    def jobs_dir(self) -> Path:
        """Folder of the tasks' arrays, journals and logs."""
        return jobs_folder(self.build)

    def states(self) -> list[PartStatus]:
        """Return the state of each part, by the scheduler too."""
        return states_of_parts(self.parts, self.jobs_dir, live_jobs(self.jobs_dir))

    def run(self, on_progress: Callable[[Sequence[PartStatus]], None]) -> list[PartStatus]:
        """Do the parts here; return their states in the end. Raises as `run_parts` does."""
        self._forget_a_lost_corpus()
        return run_parts(self.parts, self.backend, self.jobs_dir, on_progress)

    def hand_over(self) -> PartsHandedOver:
        """Submit the parts that no live job has; raises SchedulerUnavailable."""
        self._forget_a_lost_corpus()
        return hand_over_parts(self.parts, self.backend, self.jobs_dir)

    def _forget_a_lost_corpus(self) -> None:
        """Have all parts begin again if they are done, but their corpus was removed."""
        if all(one.state is PartState.DONE for one in states_of_parts(self.parts, self.jobs_dir)):
            shutil.rmtree(self.jobs_dir / PARTS, ignore_errors=True)


def jobs_folder(build: OpenBuild) -> Path:
    """Return the folder of a build's tasks."""
    return build.work / JOBS


def open_tasks(
    spec: BuildSpec, out: Path, device: str, target: SubmitTarget, parts: int | None
) -> CorpusTasks:
    """Check a build and divide it into so many parts, as many as before if not given, else one a core or GPU.

    Raises InputError for anything that would stop the tasks, before anything is written.
    """
    spec, out = _absolute(spec), out.absolute()
    computes_elsewhere = target.profile is not None or target.ray_address is not None
    build = OpenBuild(spec, out, device, computes_elsewhere=computes_elsewhere)
    build.check()
    backend = open_backend_for_parts(target, jobs_folder(build))
    if build.is_finished:
        return CorpusTasks(build, backend, ())
    places = _places(spec, out)
    offered = backend.offer(places)
    if device != "cpu" and not offered.gpus:
        raise InputError(f"--device {device}: {backend.where} has no GPUs; use --device cpu")
    backend.check(places)
    refs, _ = build.tracks
    drives = backend.name == "ray"
    live = live_jobs(build.work / JOBS)
    number = (
        parts
        or (None if drives else _parts_before(build, live))
        or min(MOST_PARTS, _devices(offered, device))
    )
    seconds = [sum(map(estimated_seconds, part)) for part in divide(refs, number)]
    made = _parts(build, spec, offered, seconds, drives=drives)
    _refuse_others(build, made, live)
    return CorpusTasks(build, backend, tuple(made))


def _refuse_others(build: OpenBuild, made: Sequence[Part], live: Mapping[str, JobView]) -> None:
    """Raise InputError if live jobs do other work on this corpus than these parts."""
    arrays = ArrayStore(jobs_folder(build)).read().values()
    submitted = {task.series_id: task.order for array in arrays for task in array.tasks}
    orders = {part.series_id: part.order for part in made}
    if others := [job for name, job in live.items() if submitted.get(name) != orders.get(name)]:
        jobs = ", ".join(dict.fromkeys(job.job_id.split("_")[0] for job in others))
        raise InputError(
            f"{build.out}: {counted(len(others), 'task')} with other options or --parts queued or running "
            f"(job {jobs}); repeat the command that submitted them, or cancel the job"
        )


def build_by_ray_here(spec: BuildSpec, out: Path, device: str, progress: Progress) -> Manifest:
    """Build a corpus by Ray Data on a Ray that is started on this machine.

    Raises as `build_corpus` does, and RayDown.
    """
    from harness.corpora.ray_data import ray_workers
    from harness.dispatch.ray.cluster import DATA_STORE_BYTES, ray_here
    from harness.dispatch.ray.dispatcher import connected

    build = OpenBuild(_absolute(spec), out.absolute(), device)
    if not build.is_finished:
        build.check()  # every mistake is reported before a Ray starts
        log_dir = jobs_folder(build) / "ray"
        with ray_here(this_machine(), log_dir, dashboard=False, object_store_bytes=DATA_STORE_BYTES) as ray:
            os.environ |= ray.environment()
            with connected(ray.address):
                build_part(build, Share(), ray_workers, progress)
        forget_tasks(build)
    return build.result()


def forget_tasks(build: OpenBuild) -> None:
    """Remove what is left of the tasks of a finished corpus, unless some of them live."""
    folder = jobs_folder(build)
    with suppress(SchedulerUnavailable):
        if not folder.is_dir() or live_jobs(folder):
            return
        shutil.rmtree(folder, ignore_errors=True)
        if build.work.is_dir() and not any(build.work.iterdir()):
            build.work.rmdir()


def _absolute(spec: BuildSpec) -> BuildSpec:
    """Return a specification that holds in any directory: tasks begin elsewhere."""
    paths: dict[str, Path | str] = {key: one.absolute() for key, one in spec if isinstance(one, Path)}
    if spec.splits_path is not None:
        paths["splits"] = str(spec.splits_path.absolute())
    if spec.codec_model is not None and Path(spec.codec_model).is_dir():
        paths["codec_model"] = str(Path(spec.codec_model).absolute())
    return spec.model_copy(update=paths)


def _places(spec: BuildSpec, out: Path) -> dict[str, Path]:
    """Return the paths that every task must see, by their options; the corpus is written below the first."""
    given = {
        "--audio": spec.audio,
        "--captions": spec.captions,
        "--tags": spec.tags,
        "--splits": spec.splits_path,
    }
    if spec.codec_model is not None and Path(spec.codec_model).is_dir():
        given["--codec-model"] = Path(spec.codec_model)
    return {"--out": out, **{option: path for option, path in given.items() if path is not None}}


def _devices(offered: Cluster, device: str) -> int:
    """Return the number of cores, or of GPUs if a codec computes there."""
    return offered.nodes * (offered.gpus if device != "cpu" else offered.cores)


def _parts_before(build: OpenBuild, live: Iterable[str]) -> int | None:
    """Return into how many parts the build is divided so far: those of live jobs, else of the newest folder."""
    folders = sorted((jobs_folder(build) / PARTS).glob("part-*-of-*"), key=lambda path: path.stat().st_mtime)
    names = [*(path.name for path in folders), *live]
    found = [match for name in names if (match := re.fullmatch(r"part-\d+-of-(\d+)", name))]
    return int(found[-1][1]) if found else None


def _parts(
    build: OpenBuild, spec: BuildSpec, offered: Cluster, seconds: Sequence[float], *, drives: bool
) -> list[Part]:
    """Return the parts of a build, whose tracks last so many seconds; with Ray Data one for all of them."""
    on_gpu = build.device != "cpu"
    speed = SPEEDS[
        build.device.partition(":")[0] if build.codec else "bach" if spec.source == "bach" else "rvq"
    ]
    # A GPU is kept busy by all cores that its node has for it.
    threads = max(1, offered.cores // offered.gpus) if on_gpu else 1
    of = len(seconds)
    made = []
    for number, length in enumerate([sum(seconds) / of] if drives else seconds):
        request = BuildRequest(
            spec=spec,
            out=build.out,
            device=build.device,
            part=number,
            of=1 if drives else of,
            workers=threads,
            by_ray_data=drives,
        )
        name = _DRIVER if drives else f"part-{number}-of-{of}"
        hours = length / 3600 / speed
        made.append(
            Part.of(
                jobs_folder(build) / PARTS / name,
                "corpus",
                request.model_dump(mode="json", exclude_unset=True),
                ranks=of if drives else 1,
                threads=threads,
                seconds=3600 * hours,
                hours=Estimate(hours / 10, hours / 3, hours),
                label=f"{name} of {build.out.name}",
                on_gpu=on_gpu,
                drives_ray=drives,
            )
        )
    return made
