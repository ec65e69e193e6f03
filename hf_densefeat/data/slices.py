"""Notes as they stand in a table, a slice at a time: neither sorted nor compared with each other, in flat memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from hf_densefeat.data.columns import column
from hf_densefeat.data.notes import no_notes, other_codes
from hf_densefeat.data.sources import open_source

DIGEST_ROWS = 10_000


class NoteTable:
    """A table of notes of any size; files are memory-mapped.

    Patients and times stand as they do in the table, because reading them all would take memory that grows with the notes.
    Source and columns are those of `load_notes`.
    """

    def __init__(self, source: Any, columns: str | Mapping[str, str] = "auto"):
        opened = open_source(source, columns, None)
        self.preset, self.data = opened.layout.preset, opened.layout.renamed(opened.data)
        self.others = other_codes(self.data, self.preset)  # of a MEDS table, a byte an event
        extra = [name for name in self.data.column_names if name.lower() == "note_id"]
        self.names = ["patient_id", "time", *extra]

    def __len__(self) -> int:
        """Rows, with those that are no notes."""
        return len(self.data)

    def slice(self, start: int, stop: int) -> tuple[pa.Table, list[str]]:
        """The notes among these rows: a table of `row` (from 0), patient_id, time and note_id if there is one; the texts."""
        some = self.data.select(range(start, min(stop, len(self))))
        dropped = [self.others[start:stop], *no_notes(some, self.preset).values()]
        kept = np.flatnonzero(~np.logical_or.reduce(dropped))
        columns = {"row": pa.chunked_array([pa.array(kept + start)])}
        columns |= {name: column(some, name).take(pa.array(kept)) for name in self.names}
        return pa.table(columns), column(some, "text").take(pa.array(kept)).to_pylist()

    def digest(self) -> str:
        """SHA-256 of the patients, times and texts of all rows, in order."""
        found = hashlib.sha256()
        for start in range(0, len(self), DIGEST_ROWS):
            some = self.data.select(range(start, min(start + DIGEST_ROWS, len(self))))
            for name in ("patient_id", "time", "text"):
                values = column(some, name).combine_chunks()
                found.update(pa.record_batch([values], [name]).serialize())
        return found.hexdigest()
