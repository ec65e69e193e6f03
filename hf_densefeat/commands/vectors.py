"""Vectors that are there already, of an API or of `densefeat encode`, joined to the notes that they are of."""

import logging
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset as arrow

from hf_densefeat.commands.measuring import Encoded
from hf_densefeat.commands.settings import NotesTable
from hf_densefeat.data.sources import open_source

logger = logging.getLogger(__name__)

IDS = ("note_id", "row")


def numbered_notes(settings: NotesTable) -> Any:
    """The notes, with the number of the row of the table that each was read from, from 0, as column `row`."""
    table = open_source(settings.notes, settings.columns(), None).data
    if "row" not in table.column_names:
        table = table.add_column("row", np.arange(len(table)))
    return settings.read(table)


def given_vectors(sources: Sequence[tuple[str, str]], settings: Any) -> tuple[Any, dict[str, Encoded]]:
    """The notes that have a vector in each of the tables, given by name and path, and these vectors by the name."""
    notes = numbered_notes(settings)
    tables = {name: read_vectors(source, notes, settings.id_column) for name, source in sources}
    kept = reduce(np.intersect1d, (found for found, _ in tables.values()))
    if len(kept) < len(notes):
        logger.warning("%d of %d notes have no vector and are left out.", len(notes) - len(kept), len(notes))
    notes = notes.select(kept)
    texts = notes["text"][:]
    return notes, {name: Encoded.of(texts, z[np.searchsorted(found, kept)]) for name, (found, z) in tables.items()}


def read_vectors(source: str, notes: Any, id_column: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the notes that have a vector (N,), and their vectors (N, d), float32, of a file or folder of parquet files.

    A column of lists, or all columns of floats, are the vectors. `id_column`, or else `note_id` or `row`, joins them to notes.
    """
    path = Path(source)
    files: Any = sorted(map(str, path.glob("*.parquet"))) if path.is_dir() else str(path)
    if not files or not path.exists():
        raise ValueError(f"--vectors: there is no file or folder of parquet files {source!r}.")
    table = arrow.dataset(files, format="csv" if path.suffix == ".csv" else "parquet").to_table()
    both = set(table.column_names) & set(notes.column_names)
    shared = [name for name in ([id_column] if id_column else IDS) if name in both]
    if not shared:
        raise ValueError(
            f"--vectors: expected a column {id_column or ' or '.join(IDS)} in the vectors and in the notes; the vectors "
            f"have {sorted(table.column_names)[:20]}. Name it with --id_column."
        )
    ids = table[shared[0]].cast(pa.string()).combine_chunks()
    if len(pc.unique(ids)) < len(ids) or ids.null_count:
        raise ValueError(f"--vectors: expected one vector a {shared[0]}; some repeat or are missing.")
    z = _matrix(table)
    asked = pa.array([str(one) for one in notes[shared[0]][:]])
    place = pc.index_in(asked, value_set=ids)
    found = np.flatnonzero(place.is_valid())
    if len(found) == 0:
        raise ValueError(
            f"--vectors: no note has a vector: no {shared[0]} of the notes is among those of the vectors."
        )
    return found, z[place.drop_null()]


def _matrix(table: pa.Table) -> np.ndarray:
    """Vectors (N, d) of the column of lists, or of all columns of floats."""
    lists = [one.name for one in table.schema if pa.types.is_list(one.type) or pa.types.is_fixed_size_list(one.type)]
    floats = [one.name for one in table.schema if pa.types.is_floating(one.type)]
    if len(lists) == 1 and pa.types.is_floating(table.schema.field(lists[0]).type.value_type):
        column = table[lists[0]].combine_chunks()
        lengths = pc.unique(pc.list_value_length(column))
        if len(lengths) != 1 or column.null_count:
            raise ValueError(f"--vectors: expected vectors of one length in every row of {lists[0]!r}.")
        z = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    elif not lists and floats:
        z = np.column_stack([table[name].to_numpy() for name in floats])
    else:
        raise ValueError(
            "--vectors: expected one column of lists of floats, or columns of floats; whole numbers are codes, whose "
            "ranges are not known here."
        )
    if not np.isfinite(z).all():
        raise ValueError(f"--vectors: {int((~np.isfinite(z)).any(1).sum())} vectors are not finite.")
    return z.astype(np.float32)
