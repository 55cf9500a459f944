"""Embeddings of a frozen text encoder, computed once for each caption and later read by memory map.

The encoder does not learn, so training does not run it in every step. A cache is a folder of ROOT, named after the
encoder's fingerprint and the other settings that decide the numbers:

    cache.json     the settings
    00000.npy      (positions, dim): some thousands of captions, one after another
    00000.json     the rows of each caption; written last: a shard without it is ignored

Builds take a lock, so that of several processes that start together one computes and the others read. A build continues
a stopped one after the last whole shard; later captions make new shards.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator

from ssmttm.compat import tame_torchaudio
from ssmttm.errors import InputError
from ssmttm.files import Frozen, open_array, read_document, replacing, write_atomically
from ssmttm.locks import file_lock
from ssmttm.text.encoder_files import encoder_fingerprint, encoder_folder
from ssmttm.text.text_batch import TextBatch

Facts = TypeVar("Facts", bound=Frozen)

_SHARD_CAPTIONS = 4096  # 400 MB at 64 positions of 768 in float16
_AT_ONCE = 64  # captions that the encoder takes at once


class _CacheFacts(Frozen):
    format: Literal[1] = 1
    fingerprint: str
    dim: int
    max_positions: int
    dtype: Literal["float16", "float32"]


class _ShardIndex(Frozen):
    rows: int = Field(ge=0)
    captions: dict[str, tuple[int, int]]
    """sha256 of a caption -> (first row, rows)."""

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if not all(0 <= start <= start + rows <= self.rows for start, rows in self.captions.values()):
            raise ValueError(f"the rows of a caption are none of {self.rows}")
        return self


class _Place(NamedTuple):
    shard: Path
    shard_rows: int
    start: int
    rows: int


class EmbeddingCache:
    """The embeddings of a set of captions under one frozen encoder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._facts = _read(folder / "cache.json", _CacheFacts)  # refuses a cache of another version
        self._places: dict[str, _Place] = {}
        for path in sorted(folder.glob("[0-9]*.json")):
            index = _read(path, _ShardIndex)
            for key, (start, rows) in index.captions.items():
                self._places[key] = _Place(path.with_suffix(".npy"), index.rows, start, rows)
        self._shards: dict[Path, np.ndarray] = {}

    def __contains__(self, caption: object) -> bool:
        return isinstance(caption, str) and _key(caption) in self._places

    @classmethod
    def build(
        cls,
        root: Path,
        encoder: str,
        captions: Sequence[str],
        *,
        max_positions: int = 64,
        dtype: Literal["float16", "float32"] = "float16",
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Return the cache of an encoder under `root`, after computing the embeddings of missing captions.

        encoder: a folder, or a model's name on the hub. progress: called with the numbers of captions done and to do.
        Raises InputError if the encoder's files are missing.
        """
        source = encoder_folder(encoder)
        fingerprint = encoder_fingerprint(root, encoder)
        folder = root / f"{fingerprint[:16]}-{max_positions}-{dtype}"
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / "lock"):
            cache = cls(folder) if (folder / "cache.json").exists() else None
            missing = sorted({caption for caption in captions if cache is None or caption not in cache})
            if missing or cache is None:
                for leftover in folder.glob(".*.tmp"):  # of a build that was killed
                    leftover.unlink()
                models = _load(source)
                dim = int(models[1].config.hidden_size)
                facts = _CacheFacts(
                    fingerprint=fingerprint, dim=dim, max_positions=max_positions, dtype=dtype
                )
                write_atomically(folder / "cache.json", facts.model_dump_json().encode())
                for first in range(0, len(missing), _SHARD_CAPTIONS):
                    part = missing[first : first + _SHARD_CAPTIONS]
                    for done in _encode(source, folder, part, facts, models):
                        if progress is not None:
                            progress(first + done, len(missing))
        return cls(folder)

    def embeddings(self, caption: str) -> np.ndarray:
        """Return a caption's embeddings (positions, dim), read-only; raises InputError if the cache lacks them."""
        place = self._places.get(_key(caption))
        if place is None:
            raise InputError(
                f"{self.folder}: no embeddings of caption {caption[:60]!r}; add it to the cache first"
            )
        if place.shard not in self._shards:
            shape = place.shard_rows, self._facts.dim
            try:
                self._shards[place.shard] = open_array(
                    place.shard, self._facts.dtype, shape, "the cache says"
                )
            except FileNotFoundError:
                raise InputError(
                    f"{place.shard}: missing; delete {self.folder} and repeat the command"
                ) from None
        return self._shards[place.shard][place.start : place.start + place.rows]

    def batch(self, captions: Sequence[str], dropped: np.ndarray | Sequence[bool]) -> TextBatch:
        """Return the embeddings of captions, padded on the left; an empty caption counts as dropped."""
        rows = [self.embeddings(caption) for caption in captions]
        return TextBatch.padded_left(rows, 1, captions, dropped)


def _encode(
    source: Path, folder: Path, captions: list[str], facts: _CacheFacts, models: tuple[Any, Any]
) -> Iterator[int]:
    """Write one shard with the embeddings of captions; yield the number of captions done."""
    tokenizer, model = models
    ids = tokenizer(captions, truncation=True, max_length=facts.max_positions)["input_ids"]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).tolist()
    number = 1 + max((int(path.stem) for path in folder.glob("[0-9]*.json")), default=-1)
    target = folder / f"{number:05d}.npy"
    dtype, shape = np.dtype(facts.dtype), (starts[-1], facts.dim)
    # Captions of one length at a time: without padding a caption's embeddings do not depend on others.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    done = 0
    with replacing(target) as file:  # not a memory map: there a full disk kills the process by a signal
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        first, width = file.tell(), dtype.itemsize * facts.dim  # bytes
        while done < len(order):
            length = len(ids[order[done]])
            rows = [i for i in order[done : done + _AT_ONCE] if len(ids[i]) == length]
            with torch.inference_mode():
                tokens = torch.tensor([ids[i] for i in rows], device=model.device)
                hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
            values = hidden.cpu().numpy().astype(facts.dtype)
            if not np.isfinite(values).all():
                raise InputError(f"text encoder {source}: embeddings overflow {facts.dtype}; choose float32")
            for i, value in zip(rows, values, strict=True):
                file.seek(first + starts[i] * width)
                file.write(value.tobytes())
            done += len(rows)
            yield done
    places = {_key(c): (starts[i], starts[i + 1] - starts[i]) for i, c in enumerate(captions)}
    index = _ShardIndex(rows=starts[-1], captions=places)
    write_atomically(target.with_suffix(".json"), index.model_dump_json().encode())


def _load(source: Path) -> tuple[Any, Any]:
    """Return the tokenizer and the encoder, in float32 for all types of files, on a GPU if there is one."""
    tame_torchaudio()
    from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # a library does not write to the terminal
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # T5's decoder stays unused by intention
    try:
        # Never run code that comes with a model; without the option transformers asks at the terminal.
        as_here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        kind = AutoConfig.from_pretrained(source, **as_here).model_type
        loader = T5EncoderModel if kind == "t5" else AutoModel
        tokenizer = AutoTokenizer.from_pretrained(source, **as_here)
        model = loader.from_pretrained(source, **as_here, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # transformers and tokenizers raise errors of many kinds
        raise InputError(f"text encoder {source}: cannot be loaded: {str(error).splitlines()[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _key(caption: str) -> str:
    return hashlib.sha256(caption.encode(errors="replace")).hexdigest()


def _read(path: Path, kind: type[Facts]) -> Facts:
    try:
        return kind.model_validate_json(read_document(path))
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path}: not a readable part of an embedding cache; delete {path.parent} and repeat the command"
        ) from error
