"""Columns of a Points table, and the conversion of their cells to values.

A cell that is text in a column of numbers, or an impossible number, is an error that names file, row, column and value.
An empty cell, NaN, zero or infinity is a gap: its row is set aside if the law needs the column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.errors import InputError
from analysis.laws.catalogue import registered_inputs
from analysis.points.files import MAX_CELL
from analysis.points.units import number_of
from analysis.points.where import plain

REQUIRED = ("architecture", "n_params", "tokens", "loss")
OPTIONAL = ("run_id", "cluster", "iterations", "flops", "seed", "annealed", "n_params_non_embedding")
TEXT = ("architecture", "run_id", "cluster", "state")
CODEBOOK = re.compile(r"loss_q\d{1,4}")
"""Columns of the losses of single codebooks: loss_q0, loss_q1, ..."""
AXES = ("n_params", "tokens")
ABSENT = 1.0
"""Stands for the size, or the tokens, of every row of a table without that column, which its law does not use."""

CEILING = {"loss": 1e3, "flops": 1e40, "n_params_non_embedding": 1e18}
"""Largest value of each column that is no input of a law; an input has its own."""
FLOOR = 1e-6
"""Smallest value of any column of numbers."""

TRUE = ("true", "1", "1.0", "yes")
FALSE = ("false", "0", "0.0", "no")
EMPTY = ("", "nan", "none", "null", "na", "n/a", "<na>", "-")
FINISHED = ("finished", "done", "completed", "complete", "success", "succeeded", "ok")
UNFINISHED = (
    *("crashed", "failed", "killed", "running", "pending", "queued", "preempted", "cancelled", "canceled"),
    *("aborted", "diverged", "interrupted", "timeout", "oom", "error", "new", "preempting", "submitted"),
)
"""Words by which trackers and schedulers call a run that has no final loss."""

SETTINGS = frozenset(
    (
        *("lr", "learningrate", "maxlr", "peaklr", "lrpeak", "baselr", "minlr"),
        *("batch", "batchsize", "globalbatchsize", "globalbatch", "batchtokens", "trainbatchsize"),
        *("context", "contextlength", "contextlen", "ctx", "ctxlen", "seqlen", "seqlength", "sequencelength"),
        *("maxseqlen", "blocksize", "frames", "warmup", "warmupsteps", "warmupratio", "warmupiters"),
        *(
            "weightdecay",
            "wd",
            "optimizer",
            "optimiser",
            "schedule",
            "scheduler",
            "lrschedule",
            "lrscheduler",
        ),
        *("dropout", "beta1", "beta2", "momentum", "gradclip", "labelsmoothing", "precision", "dtype"),
        *("dataset", "tokenizer", "vocabsize", "vocabulary"),
    )
)
"""Settings of training as tables call them, in small letters without signs between words."""


def is_setting(name: str) -> bool:
    """Return True for the name of a setting of training, also of a nested one: config.optim.learning_rate."""
    return re.sub(r"[^a-z0-9]", "", re.split(r"[./]", name.lower())[-1]) in SETTINGS


def known_columns() -> tuple[str, ...]:
    """Return the columns that every frame has: those of every study and the inputs of registered laws."""
    return tuple(dict.fromkeys((*REQUIRED, *OPTIONAL, *registered_inputs())))


def may_be_mapped(name: str) -> bool:
    """Return True for a name that --column may give to a column of a file."""
    return name in known_columns() or name == "state" or bool(CODEBOOK.fullmatch(name)) or is_setting(name)


@dataclass(frozen=True)
class Cells:
    """The cells of one column with their place, and the converted values."""

    name: str
    """This project's name of the column."""
    theirs: str
    cells: Sequence[object]
    rows: Sequence[int]
    source: str
    unit: float = 1.0
    comma_is_decimal: bool = False

    def texts(self) -> list[str | None]:
        """Return texts, None for an empty cell."""
        return [self._text(i) or None for i in range(len(self.cells))]

    def settings(self) -> list[str]:
        """Return the values of a setting as texts; equal numbers have one text, fractions to four digits."""
        found = []
        for i in range(len(self.cells)):
            text = self._text(i)
            try:
                number = number_of(text)
            except ValueError:
                found.append(plain(text))
            else:
                found.append(f"{number:.0f}" if number.is_integer() and number < 1e15 else f"{number:.4g}")
        return found

    def flags(self) -> list[bool]:
        """Return truth values, True for an empty cell; raises InputError for another text."""
        found = []
        for i in range(len(self.cells)):
            text = self._text(i).lower()
            if text not in (*TRUE, *FALSE, *EMPTY):
                raise InputError(f"{self._place(i)} {self._text(i)!r} is neither true nor false.")
            found.append(text not in FALSE)
        return found

    def seeds(self) -> list[float]:
        """Return whole numbers from 0 on, not a number for an empty cell; raises InputError for another value."""
        found = []
        for i in range(len(self.cells)):
            number = self._number(i)
            if not (math.isnan(number) or number.is_integer()):
                raise InputError(f"{self._place(i)} {self._text(i)} is not a whole number.")
            if number < 0:
                raise InputError(f"{self._place(i)} {self._text(i)} is below 0; number the seeds from 0 on.")
            found.append(number)
        return found

    def numbers(self) -> tuple[list[float], dict[int, str]]:
        """Return numbers above 0, and by place the gaps, which are not a number: "is empty", "is 0".

        Raises InputError for text, and for a number that is negative or far too small or large.
        """
        ceilings: Mapping[str, float] = CEILING | {
            name: one.ceiling for name, one in registered_inputs().items()
        }
        ceiling = ceilings.get(self.name, CEILING["loss"] if CODEBOOK.fullmatch(self.name) else math.inf)
        found, gaps = [], {}
        for i in range(len(self.cells)):
            number = self._number(i)
            if math.isfinite(number) and FLOOR <= number <= ceiling:
                found.append(number)
                continue
            if math.isfinite(number) and number != 0:
                raise InputError(
                    f"{self._place(i)} {self._text(i)} is out of range; it must be above 0 (at least {FLOOR:g}) and at "
                    f"most {ceiling:g}."
                )
            found.append(math.nan)
            gaps[i] = f"is {self._text(i) or 'empty'}"
        return found, gaps

    def _number(self, i: int) -> float:
        cell = self.cells[i]
        if type(cell) is float:
            return cell * self.unit
        text = self._text(i)
        if text.lower() in EMPTY:
            return math.nan
        try:
            if self.name == "loss" or CODEBOOK.fullmatch(self.name):
                return float(text) * self.unit
            written = number_of(text, comma_is_decimal=self.comma_is_decimal)
            return written if text[-1:].isalpha() and math.isfinite(written) else written * self.unit
        except ValueError as error:
            hint = "it must be a number"
            if "," in text and text.replace(",", ".", 1).replace(".", "", 1).isdigit():
                hint = "write decimals with a point"
            if str(error).startswith("may be"):
                hint = f"it {error}"
            raise InputError(f"{self._place(i)} {text!r} is not a number; {hint}.") from None

    def _text(self, i: int) -> str:
        cell = self.cells[i]
        text = "" if cell is None else str(cell).strip()
        if len(text) > MAX_CELL:
            raise InputError(
                f"{self._place(i)} has {len(text):,} characters, and at most {MAX_CELL:,} are read."
            )
        return "" if self.name in TEXT and text in {"nan", "None", "<NA>", "NaN"} else text

    def _place(self, i: int) -> str:
        return f"{self.source}: row {self.rows[i]}, column {self.theirs}:"
