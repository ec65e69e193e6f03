"""Notes of your own, such as MIMIC-IV-Note's, and labels that need no other table and are not in the note itself.

The labels are of what comes after a note:

* `next_note_within_30d` (binary): the patient's next note is at most 30 days later;
* `log_days_to_next` (regression): log(1 + days) to it;
* `next_type` (multiclass): the next note's `note_type`, of types that are next of one note in fifty or more;
* `note_type` itself, for k-means, where the held-out notes are of several.

A patient's last note has none of the first three. Where every patient's dates are shifted by another number of days, as in
de-identified tables, the data end on another day for each of them, and nobody knows which: a last note is the last because
the patient died, left, or because the data end, and a table of notes does not say why. Calling it "no note within 30 days"
would also make an easy answer of a death that the note reports. So what is asked is how soon the next note comes, given
that one comes. Long gaps are somewhat rarer than in life, as they have to end within the data. Only differences of one
patient's times are used, never a date.
"""

import hashlib
from collections import Counter

import datasets
import numpy as np

from domains.rows import standardised
from hf_densefeat import load_notes, split_by_patient
from hf_densefeat.data.columns import column, dense_codes, time_ticks

KINDS = ("binary", "multiclass", "regression", "clustering")
HELD_OUT = 4000  # notes of test patients, drawn at random until there are so many; a patient's stay together
CLUSTER = 30  # held-out notes of a class that k-means is to find


def own_notes(source: str, words: list[str] | None):
    """Notes with a split and labels, tasks (column, kind), no shift, the primary task, and a sentence.

    Args:
        source: what `load_notes` reads. A column `split` is kept; without it patients are split 70/15/15.
        words: `label:kind` of columns of the table or of the labels above; None for all of the latter that there are.
            The first that is binary or multiclass is the primary task.

    Raises:
        ValueError: for a task that is not of this form, an unknown column, too few classes, or no test patients.
    """
    notes = _with_next(_with_split(load_notes(source)))
    if words is None:
        words = ["next_note_within_30d:binary", "log_days_to_next:regression"]
        words += ["next_type:multiclass"] * ("next_type" in notes.column_names)
        words += ["note_type:clustering"] * ("note_type" in notes.column_names and _clusters(notes, "note_type") > 1)
    tasks = []
    for word in words:
        label, _, kind = word.rpartition(":")
        if kind not in KINDS or label not in notes.column_names:
            columns = sorted(notes.column_names)
            raise ValueError(f"Expected --task label:kind of the columns {columns} and kinds {KINDS}, got {word!r}.")
        name = {"regression": f"{label}_sd", "clustering": f"{label} clusters"}.get(kind, label)
        values = labels_of(notes, label)
        if kind == "regression":
            values = standardised(values, notes["split"][:])
        elif kind == "clustering" and _clusters(notes, label) < 2:
            raise ValueError(f"--task {word}: expected two or more classes of at least {CLUSTER} held-out notes each.")
        notes = notes.remove_columns(name) if name in notes.column_names else notes
        notes = notes.add_column(name, values)
        tasks.append((name, kind))
    primary = next((name for name, kind in tasks if kind in ("binary", "multiclass")), None)
    if primary is None:
        raise ValueError(f"Expected a binary or multiclass --task, the first of which is followed; got {words}.")
    return notes, tasks, lambda notes: [], primary, "Notes of your own."


def labels_of(notes: datasets.Dataset, label: str) -> list:
    """A column, with None for an empty cell, which is an empty string in a csv file, and for what is not a number."""
    return [None if value != value or value == "" else value for value in column(notes, label).to_pylist()]


def labels_key(notes: datasets.Dataset, tasks: list[tuple[str, str]]) -> str:
    """A digest of what the tasks ask, and of whom."""
    columns = ["split", *(label for label, _ in tasks)]
    return hashlib.sha256(repr((tasks, [labels_of(notes, label) for label in columns])).encode()).hexdigest()


def _with_split(notes: datasets.Dataset) -> datasets.Dataset:
    """The table's own split or one of ours, and of the test patients as many as are to be encoded."""
    parts = split_by_patient(notes)
    if not {"train", "test"} <= set(parts):
        raise ValueError(f"Expected the splits train and test in the column `split`, got {sorted(parts)}.")
    patient = dense_codes(parts["test"], "patient_id")
    order = np.random.default_rng(0).permutation(patient.max() + 1)
    enough = np.searchsorted(np.bincount(patient)[order].cumsum(), HELD_OUT) + 1
    parts["test"] = parts["test"].select(np.flatnonzero(np.isin(patient, order[:enough])))
    named = []
    for name, part in parts.items():
        part = part.remove_columns("split") if "split" in part.column_names else part
        named.append(part.add_column("split", [name] * len(part)))
    return datasets.concatenate_datasets(named)


def _with_next(notes: datasets.Dataset) -> datasets.Dataset:
    """The labels of what comes next, but for those that the table has a column of."""
    patient, (ticks, day) = dense_codes(notes, "patient_id"), time_ticks(notes)
    followed = np.append(patient[1:] == patient[:-1], False)
    days = np.append(np.diff(ticks) / day, np.inf)
    found = {
        "next_note_within_30d": [int(gap <= 30) if there else None for gap, there in zip(days, followed, strict=True)],
        "log_days_to_next": [
            float(np.log1p(gap)) if there else None for gap, there in zip(days, followed, strict=True)
        ],
    }
    if "note_type" in notes.column_names:
        types = [*labels_of(notes, "note_type")[1:], None]
        types = [name if there else None for name, there in zip(types, followed, strict=True)]
        counts = Counter(name for name in types if name is not None)
        kept = {name for name, count in counts.items() if count >= counts.total() / 50}
        if len(kept) > 1:
            found["next_type"] = [name if name in kept else None for name in types]
    for name, values in found.items():
        if name not in notes.column_names:
            notes = notes.add_column(name, values)
    return notes


def _clusters(notes: datasets.Dataset, label: str) -> int:
    """How many classes have held-out notes enough for k-means."""
    values = [value for value, part in zip(labels_of(notes, label), notes["split"][:], strict=True) if part == "test"]
    return sum(count >= CLUSTER for value, count in Counter(values).items() if value is not None)
