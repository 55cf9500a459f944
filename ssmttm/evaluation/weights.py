"""The models that judge music: no package ships their weights, so they come from the hub or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssmttm.compat import tame_torchaudio
from ssmttm.errors import InputError
from ssmttm.pretrained import CONFIG, pretrained_folder, read_config
from ssmttm.text.encoder_files import ENCODER_FILES, files_fingerprint


def judge_folder(name: str, option: str, model_type: str, files: str) -> Path:
    """The folder of a judging model's files: itself, or the hub's local copy.

    option: what names it on the command line. model_type: what its config.json must say. files: what it needs beside
    configuration and weights. Raises InputError, a sentence that says what to put where.
    """
    folder = pretrained_folder(name, option, ENCODER_FILES, f"{CONFIG}, model.safetensors, {files}")
    found = read_config(folder).get("model_type")
    if found != model_type:
        raise InputError(f"{option} {name}: {folder / CONFIG}: model_type is {found!r}, not {model_type!r}")
    return folder


def judge_fingerprint(memory: Path, folder: Path) -> str:
    """64 hex digits over the model's files, its preprocessing included, by name and content.

    memory: a folder that remembers the hashes of large files.
    """
    return files_fingerprint(memory, folder, "judge 1")


def load_judge(folder: Path, model: str, device: str, *parts: str) -> list[Any]:
    """The network in evaluation mode on a device, then its parts (a processor, an extractor), by transformers' names.

    Raises InputError where a file is damaged or the weights are not whole.
    """
    tame_torchaudio()
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # a library does not write to the terminal
    try:
        network, about = getattr(transformers, model).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        loaded = [
            getattr(transformers, part).from_pretrained(folder, local_files_only=True) for part in parts
        ]
    except Exception as error:  # each kind of file is read by a library with errors of its own
        raise InputError(f"{folder}: cannot be read as a {model}: {error}") from error
    if about["missing_keys"]:
        raise InputError(f"{folder}: the weights lack {sorted(about['missing_keys'])[0]} and maybe more")
    return [network.to(device).eval(), *loaded]
