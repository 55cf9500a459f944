"""JSON lines: invalid lines, such as torn ones, are skipped.

Readers may rely on the type and range of every field named here; other fields are kept unchecked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from harness.common.validation import first_mistake

CHUNK = 2**20
"""Bytes read at once, and the length above which a line is invalid."""

Whole = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, lt=2.0**38)]
"""Seconds since 1970, within the range of a database's dates: some 8700 years."""


class ProcessFields(TypedDict, total=False):
    """A process as process.identify_process describes it."""

    host: str
    pid: Annotated[int, Field(ge=0, lt=2**31)]
    boot_id: str | None
    started_ticks: Whole
    process_started: float


class LayoutFields(TypedDict, total=False):
    """A record.root.Layout as a worker journals it."""

    ranks: Annotated[int, Field(ge=1, lt=2**31)]
    micro_batch: Annotated[int, Field(ge=1, lt=2**31)]
    accumulation: Whole
    zero_stage: Whole
    threads: Whole
    kernels: str


class LineFields(ProcessFields, total=False):
    """Fields of a line of a journal or of control.jsonl; its configuration applies to nested fields too."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    t: Required[Seconds]
    event: Required[str]
    step: Whole
    loss: float
    loss_codebooks: list[float]
    lr: float
    tokens: Whole
    tokens_per_second: float
    grad_norm: float
    mfu: float
    cpu_percent: float
    memory_gib: float
    gpu_percent: float
    gpu_memory_gib: float
    seconds: float
    reason: str
    kind: str
    text: str
    device: str
    dispatcher: str
    job_id: str
    commit: str | None
    layout: LayoutFields
    gpu_share: Annotated[float, Field(gt=0, le=1)]
    runs: list[str]
    attempts: dict[str, Whole]
    process: ProcessFields


_LINE = TypeAdapter(LineFields)


@dataclass(frozen=True)
class Damage:
    """A line that is skipped."""

    number: int
    """Line number, counted from 1."""
    why: str


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line without its newline; raises ValueError with the reason why it is invalid."""
    try:
        return dict(_LINE.validate_json(line))
    except ValidationError as error:
        raise ValueError(first_mistake(error, whole="")) from None


@dataclass
class LineReader:
    """Reads what was appended to a file since the last reading."""

    path: Path
    offset: int = 0
    """Bytes of the whole lines read so far."""
    number: int = 0
    """Number of lines read so far."""
    torn: bool = False
    """True if a line without a newline follows them."""
    _skipping: bool = False

    def read(
        self, check: Callable[[dict[str, Any]], None] | None = None
    ) -> Iterator[dict[str, Any] | Damage]:
        """Yield the fields of every new whole line, or its Damage, in bounded memory; raises OSError.

        `check` may raise ValueError for fields that are valid one by one but not together.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            held = b""
            while part := file.read(CHUNK):
                *lines, held = (held + part).split(b"\n")
                for line in lines:
                    self.offset += len(line) + 1
                    self.number += 1
                    if self._skipping or len(line) > CHUNK:
                        self._skipping = False
                        yield Damage(self.number, f"longer than {CHUNK} bytes")
                        continue
                    try:
                        fields = parse_line(line)
                        if check is not None:
                            check(fields)
                    except ValueError as problem:
                        yield Damage(self.number, str(problem))
                    else:
                        yield fields
                if len(held) > CHUNK:
                    self.offset += len(held)
                    held, self._skipping = b"", True
            self.torn = bool(held) or self._skipping


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the valid lines of a file, oldest first; none if there is no such file."""
    with suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
        yield from (line for line in LineReader(path).read() if not isinstance(line, Damage))
