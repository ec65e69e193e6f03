"""Checkpoints as folders: whole or not there, each with a manifest of its files."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
OBJECTIVE_STATE = "densefeat_state.safetensors"
UNFINISHED = "unfinished"  # the folder in output_dir in which a checkpoint is written, until it is whole


class CheckpointError(ValueError):
    """A checkpoint that is not there, or not as it was written: the sentence says which file, and what to do."""


class SavedState(TrainerState):
    """Saved without the best checkpoint's folder, a path of this machine: `best_global_step` says which one it is."""

    def save_to_json(self, json_path: str) -> None:
        """Save as transformers does, without that path."""
        state = copy.copy(self)
        state.best_model_checkpoint = None
        TrainerState.save_to_json(state, json_path)


# ---- Whole or not there ----


def seal(folder: Path, run: Mapping[str, Any] | None = None) -> None:
    """Write the manifest: size and SHA-256 of every file in the folder, by its path there, and what tells the run apart."""
    manifest = {"run": dict(run or {}), "files": entries_of(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def entries_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in the folder but the manifest, by its path there."""
    # also those in folders: an adapter's, and the shards of FSDP and DeepSpeed
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def publish(folder: Path, target: Path, run: Mapping[str, Any] | None = None) -> None:
    """Seal a folder that has been written, and give it its name. A folder of that name is replaced."""
    seal(folder, run)
    if target.exists():  # of a run that went further, and was resumed from before it
        shutil.rmtree(target)
    folder.rename(target)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a sentence that names the file; None where every file is as it was written."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which DenseTrainer writes last"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size:,} bytes of {entry['size']:,}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} is damaged: its SHA-256 is not that of the file that was written"
    return None


def other_run(folder: Path, run: Mapping[str, Any] | None = None) -> str | None:
    """What tells the run that wrote a checkpoint from this one, "of another run (seed 42, here 7)"; None for this run."""
    wrote, here = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("run", {}), run or {}
    differing = [
        f"{name} {wrote[name]}, here {here[name]}" for name in wrote if here.get(name, wrote[name]) != wrote[name]
    ]
    return f"of another run ({', '.join(differing)})" if differing else None


def check_whole(folder: Path, run: Mapping[str, Any] | None = None) -> None:
    """CheckpointError for a checkpoint that is damaged, not there or of another run, before anything of it is loaded."""
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no checkpoint {folder.name}. Name a folder that a run with save_strategy wrote."
        )
    if wrong := damage(folder):
        before = newest_whole(folder.parent, run, below=_step(folder))
        wrong, advice = f"not whole: {wrong}", "There is no whole checkpoint before it: begin anew."
        advice = f"Resume from {before.name}." if before else advice
    elif wrong := other_run(folder, run):
        advice = "Resume it with its options, or choose another output_dir."
    else:
        return
    raise CheckpointError(
        f"{folder.name} is {wrong}. {advice} To start from its weights alone, pass it as the model instead."
    )


def newest_whole(output_dir: Path, run: Mapping[str, Any] | None = None, below: float = math.inf) -> Path | None:
    """This run's whole checkpoint of most steps, fewer than `below`; a warning names each that is passed over, and why."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    for folder in sorted(folders, key=_step, reverse=True):
        if not 0 <= _step(folder) < below:
            continue
        wrong = damage(folder)
        if wrong is None and (other := other_run(folder, run)):
            wrong = f"it is {other}"
        if wrong is None:
            return folder
        logger.warning("%s is passed over: %s.", folder.name, wrong)
    return None


def warn_of_unfinished(output_dir: Path) -> None:
    """Say which checkpoints a run that was killed left half-written; they are not deleted here."""
    left = sorted(path.name for path in (output_dir / UNFINISHED).glob("*"))
    if left:
        logger.warning(
            "%s holds what a run that was killed left half-written: %s. It is never read; delete the folder if you like.",
            UNFINISHED,
            ", ".join(left),
        )


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- The objective's state ----


def write_objective(folder: Path, state: dict[str, Tensor], *, skipped: int, stream: str) -> None:
    """The running covariances and bases, the number of skipped updates, and where a stream goes on."""
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    save_file(tensors, folder / OBJECTIVE_STATE, metadata={"skipped_updates": str(skipped), "stream": stream})


def read_objective(folder: Path, device: torch.device | str) -> tuple[dict[str, Tensor], int, str]:
    """What `write_objective` wrote: state, skipped updates, stream; ValueError for a checkpoint without it."""
    path = folder / OBJECTIVE_STATE
    if not path.is_file():
        raise CheckpointError(
            f"{folder.name} has no {OBJECTIVE_STATE}: it was saved with save_only_model. To start from its weights, pass it "
            "as the model instead of resuming."
        )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    return state, int(metadata["skipped_updates"]), metadata.get("stream", "")


def sync_folder(folder: Path) -> None:
    """Have the operating system write the folder's entries, so that a rename survives a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
