"""Columns of a table of notes as Arrow and NumPy: no text is copied."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NAME = re.compile(r"(?=.{1,40}$)[A-Za-z_][\w.\-]*( [\w.\-]+){0,2}")


def column(notes: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """Return one column as Arrow, in the order of the rows, without reading the others.

    Raises:
        ValueError: If the column does not exist.
    """
    if name not in notes.column_names:
        raise ValueError(
            f"Expected a column `{name}`, got {shown(notes.column_names)}{close_names(name, notes.column_names)}."
        )
    values = notes.data.column(name)
    if notes._indices is None:
        return values
    # `notes[name]` would take the rows out of a table of thousands of chunks, ten times slower than out of one.
    return pa.chunked_array([values.combine_chunks().take(notes._indices.column(0).combine_chunks())])


def time_ticks(notes: datasets.Dataset) -> tuple[np.ndarray, float]:
    """Return the times as numbers, and how many of these make a day: microseconds for timestamps, else days."""
    time = column(notes, "time")
    if pa.types.is_temporal(time.type):
        return time.cast(pa.timestamp("us", getattr(time.type, "tz", None))).cast(pa.int64()).to_numpy(), 86_400e6
    return time.to_numpy(), 1.0


def dense_codes(notes: datasets.Dataset, name: str) -> np.ndarray:
    """Return int64 codes 0, 1, … of a column's values, which sort as the values do; empty cells share the first code.

    Raises:
        ValueError: If the column does not exist, or holds lists or objects.
    """
    values = column(notes, name)
    if pa.types.is_null(values.type):
        return np.zeros(len(values), dtype=np.int64)
    if pa.types.is_nested(values.type):
        raise ValueError(
            f"Column {name} holds {values.type}: expected numbers, strings or times. Remove or rename it."
        )
    rank = pc.rank(values, tiebreaker="dense").to_numpy().astype(np.int64)  # from 1
    empty = values.is_null().to_numpy()
    codes: np.ndarray = np.where(empty, 0, rank) if empty.any() else rank - 1
    return codes


def order_of_notes(notes: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return (order, patient): the rows sorted by (patient, time, `note_seq`), and every row's patient code.

    Codes are dense and follow the order of the patient ids. Both are int64, in the order of rows they index.
    """
    patient = dense_codes(notes, "patient_id")
    keys = [time_ticks(notes)[0], patient]
    for name in ("note_seq", "section_index"):
        if name in notes.column_names:
            keys.insert(0, dense_codes(notes, name))
    later, tied = np.zeros(len(patient) - 1, dtype=bool), np.ones(len(patient) - 1, dtype=bool)
    for key in reversed(keys):
        step = np.diff(key)
        later |= tied & (step < 0)
        tied &= step == 0
    # Sorting notes that are sorted, as all that `load_notes` returns are, would take most of the time of pairing.
    return np.lexsort(keys) if later.any() else np.arange(len(patient)), patient


def shown(names: Sequence[str]) -> str:
    """List the names of columns, unless they may be a row: a table without a header has patient text for names."""
    if all(NAME.fullmatch(name) for name in names):
        return str(list(names))
    return f"{len(names)} columns, some without a proper name (is the first row a header?)"


def close_names(name: str, names: Sequence[str]) -> str:
    """Say which names come close, if any."""
    close = difflib.get_close_matches(name.lower(), [other.lower() for other in names], n=3, cutoff=0.6)
    close = [other for other in names if other.lower() in close and NAME.fullmatch(other)]
    return f" (did you mean {' or '.join(f'`{other}`' for other in close)}?)" if close else ""
