"""How published tables of notes name their columns, and which of a table's columns are patient, time and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets

from hf_densefeat.data.columns import close_names, shown

ROLES = ("patient_id", "time", "text")
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
# Rows in which this column is 1 are no notes: MIMIC-III marks what a physician called an error.
FLAGGED = {"MIMIC-III": "iserror"}


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
        unknown = sorted(set(columns) - set(ROLES))
        if unknown:
            raise ValueError(f"Expected `columns` to name {list(ROLES)}, got {unknown}.")
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
        alike = [name for name in names if _plain(name) == _plain(one)]
        if one in names:
            found.append(one)
        elif len(alike) > 1:
            raise ValueError(f"The table has {' and '.join(f'`{name}`' for name in alike)}: say which with `columns`.")
        else:
            found += alike
    return found


def _plain(name: str) -> str:
    return name.strip().lower()
