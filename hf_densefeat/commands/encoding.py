"""The work of `densefeat encode`: a table of notes to parquet shards of vectors, by one process or several."""

import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from hf_densefeat.commands.encode import Settings
from hf_densefeat.commands.measuring import load, quiet
from hf_densefeat.data.notes import NoteTable
from hf_densefeat.evaluation.embeddings import encoder_key
from hf_densefeat.evaluation.ranking import coded
from hf_densefeat.objective.distributed import end_processes
from hf_densefeat.training.checkpoints import entries_of, sync_folder

CALIBRATED = 2000  # notes whose values say the range of int8
MANIFEST = "_manifest.json"  # pyarrow and Spark take names with an underscore for no part of a table
UNFINISHED = ".unfinished"  # files are written here, and renamed when they are whole


def encode_table(settings: Settings) -> None:
    """Read what the command names, and encode the shards that are not there yet."""
    quiet()
    state = PartialState(cpu=not torch.accelerator.is_available())  # else processes of a CPU would not find each other
    output, size = Path(settings.output), settings.shard_size
    if size < 1 or settings.batch_size < 1:
        raise ValueError("Expected --shard_size and --batch_size of 1 or more.")
    told: list[Any] = [None, None]
    try:
        encoding = Encoding(settings, state.device)
        if state.is_main_process:
            table = NoteTable(settings.notes, settings.columns())
            told[0] = begun(output, encoding, table)
    except (ValueError, OSError) as error:
        told[1] = error
    run, wrong = broadcast_object_list(told)  # of the first process
    if wrong is not None:
        if state.is_main_process:
            raise wrong
        sys.exit(1)
    if not state.is_main_process:
        table = NoteTable(settings.notes, settings.columns())  # maps what the first one has converted
    count = -(-len(table) // size)
    shards = {
        output / f"vectors-{i:05}-of-{count:05}.parquet": range(len(table))[i * size :][:size] for i in range(count)
    }
    missing = [path for path in shards if not path.exists()]
    state.wait_for_everyone()  # nobody writes before all have seen what is missing
    if state.is_main_process and len(missing) < count:
        print(f"resumed    {count - len(missing):,} of {count:,} files are there")
    mine = missing[state.process_index :: state.num_processes]
    with progress(encoding.model, sum(len(shards[path]) for path in mine), state) as done:
        for path in mine:
            write_shard(path, shards[path], encoding, table, run["ranges"])
            done(len(shards[path]))
    state.wait_for_everyone()
    if state.is_main_process:
        finish(output, list(shards), run)
    end_processes()


class Encoding:
    """One encoder and the options of its vectors, those of the command."""

    def __init__(self, settings: Settings, device: torch.device):
        self.model, self.tokenizer = load(settings.model, device, dtype=getattr(torch, settings.dtype))
        self.settings = settings
        self.options: dict[str, Any] = {"batch_size": settings.batch_size, "max_length": settings.max_length}
        if settings.view is not None:
            self.options["view"] = None if settings.view == "none" else settings.view

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        """Vectors (N, d) float32, before they are coded, and how many texts were cut."""
        z, cut = self.model.encode(texts, self.tokenizer, return_cut=True, **self.options)
        wanted = self.settings.truncate_dim or z.shape[1]
        if not 1 <= wanted <= z.shape[1]:
            raise ValueError(f"Expected --truncate_dim from 1 to {z.shape[1]}, the encoder's, but got {wanted}.")
        return z[:, :wanted], int(cut.sum())

    def described(self, table: NoteTable) -> dict[str, Any]:
        """What decides the vectors: equal descriptions, equal vectors."""
        names = ("precision", "truncate_dim", "view", "max_length", "dtype", "shard_size")
        return {
            "hf_densefeat": importlib.metadata.version("hf_densefeat"),
            "model": encoder_key(self.model, self.tokenizer),
            "notes": table.digest(),
            "rows": len(table),
        } | {name: getattr(self.settings, name) for name in names}


def begun(output: Path, encoding: Encoding, table: NoteTable) -> dict[str, Any]:
    """The run that the folder is of: begun here, or before with the same model, notes and options."""
    asked, manifest = encoding.described(table), output / MANIFEST
    if manifest.exists():
        run: dict[str, Any] = json.loads(manifest.read_text())["run"]
        other = [name for name, value in asked.items() if run.get(name) != value]
        if other:
            raise ValueError(
                f"{output} holds vectors of another run: {', '.join(other)} differ. Name another folder with --output, or "
                "delete this one."
            )
        return run
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty, and no folder of vectors: name another with --output.")
    output.mkdir(mode=0o700, parents=True, exist_ok=True)
    spread = np.unique(np.linspace(0, len(table) - 1, min(len(table), CALIBRATED)).astype(int)).tolist()
    texts = (text for row in spread for text in table.slice(row, row + 1)[1])
    some = list(islice(texts, CALIBRATED if encoding.settings.precision == "int8" else 1))
    if not some:
        raise ValueError("No row has a text: which column holds the text?")
    ranges = [value.tolist() for value in torch.aminmax(encoding(some)[0], dim=0)]  # also finds options that cannot be
    run = asked | {"ranges": ranges if encoding.settings.precision == "int8" else None}
    write_manifest(output, run, {})
    return run


def write_manifest(output: Path, run: dict[str, Any], files: dict[str, Any]) -> None:
    """What made the vectors, and the files once they are all there."""
    text = json.dumps({"run": run, "files": files}, indent=1) + "\n"
    write_whole(output / MANIFEST, lambda path: path.write_text(text))


def write_shard(path: Path, rows: range, encoding: Encoding, table: NoteTable, ranges: list | None) -> None:
    """Encode these rows, and give the file its name when it is whole."""
    found, texts = table.slice(rows.start, rows.stop)
    z, cut = encoding(texts or ["."])
    values = packed(z[: len(texts)], encoding.settings.precision, ranges)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    found = found.append_column("vector", column).replace_schema_metadata({"cut": str(cut)})
    write_whole(path, lambda place: pq.write_table(found, place))


def packed(z: torch.Tensor, precision: str, ranges: list | None) -> np.ndarray:
    """Vectors as they are stored: (N, d), or (N, ceil(d / 8)) bytes of bits.

    int8 is `coded` with the range of the calibration, so that values beyond it become the first or last step; bits are
    those of `sentence_transformers.quantize_embeddings` with "ubinary".
    """
    if precision == "bits":
        return np.packbits(z.numpy() > 0, axis=-1)
    if precision == "int8":
        return coded(z, "int8", torch.tensor(ranges)).numpy().astype(np.int8)
    return z.numpy().astype(precision)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a private file beside, and rename it: it is there whole or not at all, also after a loss of power."""
    place = path.parent / UNFINISHED / f"{path.name}.{os.getpid()}"
    place.parent.mkdir(mode=0o700, exist_ok=True)
    place.touch(mode=0o600)
    write(place)
    with place.open("rb") as file:
        os.fsync(file.fileno())
    place.rename(path)
    sync_folder(path.parent)


class _Lines:
    """Where a bar is drawn as lines, for a log file."""

    def write(self, text: str) -> None:
        """Each state of the bar is a line."""
        print(text.strip(), end="\n" if text.strip() else "", flush=True)

    def flush(self) -> None:
        """`write` has done it."""


@contextmanager
def progress(model: Any, rows: int, state: PartialState) -> Iterator[Callable[[int], None]]:
    """A bar of the first process's notes, or a line of it now and then where there is no terminal.

    Gives a function that is told how many rows of a shard are done.
    """
    tokens: Any = 0
    began, seen = time.monotonic(), 0
    several = f" (1 of {state.num_processes} processes)" if state.num_processes > 1 else ""
    shown: dict[str, Any] = {} if sys.stderr.isatty() else {"file": _Lines(), "mininterval": 30, "maxinterval": 60}
    bar = tqdm(total=rows, desc=f"encoded{several}", unit=" notes", disable=not state.is_main_process, **shown)

    def forward(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        tokens = tokens + kwargs["attention_mask"].sum()  # on the device, waited for only when the bar is drawn
        if bar.update(min(len(kwargs["attention_mask"]), rows - bar.n)):
            bar.set_postfix_str(f"{int(tokens) / (time.monotonic() - began):,.0f} tokens/s", refresh=False)

    def done(count: int) -> None:
        nonlocal seen
        seen += count
        bar.update(seen - bar.n)  # a long note may be several rows of tokens, and a row without text none

    hook = model.base_model.register_forward_pre_hook(forward, with_kwargs=True)
    with bar:
        yield done
    hook.remove()
    if state.is_main_process and seen:
        seconds = time.monotonic() - began
        rate = f"{seen / seconds:,.0f} notes/s, {int(tokens) / seconds:,.0f} tokens/s"
        print(f"encoded    {seen:,} rows{several}, {rate}")


def finish(output: Path, shards: list[Path], run: dict[str, Any]) -> None:
    """Seal the folder, and say what is in it."""
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)
    write_manifest(output, run, {name: entry for name, entry in entries_of(output).items() if name != MANIFEST})
    (output / UNFINISHED).rmdir()
    vectors = sum(pq.read_metadata(path).num_rows for path in shards)
    width = pq.read_schema(shards[0]).field("vector").type.list_size
    print(f"vectors    {vectors:,} of {width:,} {run['precision']}, in {len(shards):,} files of {output}")
    cut = sum(int(pq.read_schema(path).metadata[b"cut"]) for path in shards)
    if cut:
        print(f"           {cut:,} notes are longer than the encoder sees: they were cut")
    if left := run["rows"] - vectors:
        print(f"           {left:,} rows of the table are no notes: they have no text, or are marked as errors")
