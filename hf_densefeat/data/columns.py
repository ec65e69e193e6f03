"""Columns of a table of notes: which is patient, time and text, and each as Arrow and NumPy, without a copy of the texts."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NAME = re.compile(r"(?=.{1,40}$)[A-Za-z_][\w.\-]*( [\w.\-]+){0,2}")
# A time of "a|b" is column a, and where that is missing or empty, column b. The first layout that fits is taken.
PRESETS = {
    "plain": {"patient_id": "patient_id", "time": "time", "text": "text"},
    "MIMIC-III": {"patient_id": "subject_id", "time": "charttime|chartdate", "text": "text"},
    "MIMIC-IV-Note": {"patient_id": "subject_id", "time": "charttime", "text": "text"},
    "MEDS": {"patient_id": "subject_id", "time": "time", "text": "text_value"},
    "OMOP": {"patient_id": "person_id", "time": "note_datetime|note_date", "text": "note_text"},
}
# A table without this column is of another layout, though it has the others.
NEEDED = {"MIMIC-III": "chartdate"}


@dataclass(frozen=True)
class Layout:
    """Which columns of a table are what: `roles` are our names to the table's.

    Where the column of times has none, the column `fallback` has it.
    """

    preset: str
    roles: dict[str, str]
    fallback: str | None = None

    def renamed(self, table: datasets.Dataset) -> datasets.Dataset:
        """The table with our names for patient, time and text; ValueError where one of these is taken."""
        names = {theirs: ours for ours, theirs in self.roles.items() if ours != theirs}
        hidden = sorted(set(names.values()) & set(table.column_names) - set(names))
        if hidden or len(set(self.roles.values())) < len(self.roles):
            raise ValueError(
                f"Cannot take {self.roles}: {hidden or 'one column'} would be there twice. Rename or remove columns."
            )
        return table.rename_columns(names) if names else table


def match_columns(names: Sequence[str], columns: str | Mapping[str, str], meds: bool = False) -> Layout:
    """The layout of a table with these names, regardless of case and of spaces around them; `columns` as for `load_notes`.

    ValueError if a column is missing, naming those that come close, or two names differ in case alone.
    """
    if isinstance(columns, Mapping):
        if unknown := sorted(set(columns) - set(PRESETS["plain"])):
            raise ValueError(f"Expected `columns` to name {list(PRESETS['plain'])}, got {unknown}.")
        tried = {"your columns": PRESETS["MEDS" if meds else "plain"] | dict(columns)}
    elif columns == "auto":
        tried = {"MEDS": PRESETS["MEDS"]} if meds else PRESETS
    else:
        tried = {columns: PRESETS[columns]}
    for preset, wanted in tried.items():
        found = {role: _found(names, theirs) for role, theirs in wanted.items()}
        if all(found.values()) and (preset not in NEEDED or _found(names, NEEDED[preset])):
            fallback = found["time"][1] if len(found["time"]) > 1 else None
            return Layout(preset, {role: theirs[0] for role, theirs in found.items()}, fallback)
    if "resourceType" in names:
        raise ValueError(
            "The table holds FHIR resources, of which a DocumentReference keeps its text in base64. Make a table of "
            "subject.reference, date and the decoded content[0].attachment.data, as patient_id, time and text."
        )
    nearest = min(tried.values(), key=lambda wanted: sum(not _found(names, theirs) for theirs in wanted.values()))
    lacking = [f"`{theirs}`{close_names(theirs, names)}" for theirs in nearest.values() if not _found(names, theirs)]
    raise ValueError(
        f"Missing column {', '.join(lacking)}: the table has {shown(names)}. Name yours with "
        '`columns={"patient_id": ..., "time": ..., "text": ...}`.'
    )


def _found(names: Sequence[str], wanted: str) -> list[str]:
    """The table's columns for `a|b`, in that order: by the very name, else by the only one that differs in case or space."""
    found = []
    for one in wanted.split("|"):
        alike = [name for name in names if name.strip().lower() == one.strip().lower()]
        if one in names:
            found.append(one)
        elif len(alike) > 1:
            raise ValueError(f"The table has {' and '.join(f'`{name}`' for name in alike)}: say which with `columns`.")
        else:
            found += alike
    return found


def column(notes: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """One column as Arrow, in the order of the rows, without reading the others; ValueError where there is none."""
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
    """Codes 0, 1, … (int64) of a column's values, which sort as the values do; empty cells share the first code."""
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
    """(order, patient), int64: the rows sorted by (patient, time, `note_seq`), and every row's dense code of its patient."""
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


def place_in_run(*keys: np.ndarray) -> np.ndarray:
    """0, 1, … within each run of rows that are equal in every key."""
    place = np.arange(len(keys[0]))
    same = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
    place[1:] -= np.maximum.accumulate(np.where(same, 0, place[1:]))
    return place


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
