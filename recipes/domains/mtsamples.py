"""Real clinical notes (MTSamples): a note as a patient, its sections as notes in order.

`data` holds `mtsamples/notes.parquet` (note_id, text, specialty, kind, summary) and `mtsamples/sections.parquet` (note_id,
order, text, section). The columns' own split is not used: see `rows.split_apart`. No label is used in training.
"""

from pathlib import Path

import datasets
import pyarrow.parquet as pq

from domains import Domain
from domains.documents import domain_of
from domains.rows import frequent, rows_with, split_apart
from hf_densefeat import SimilarityTask, load_notes

SHORTEST = 60  # characters of a section that is measured
FORM = ("section header", "section header, few labels", "kind of note")  # the other tasks ask for content


def load(data: Path, model_name_or_path: str) -> Domain:
    """The domain, from a folder of data sets and an encoder to start from."""
    notes, sections = read(Path(data))
    parts = {name: rows_with(sections, "split", name) for name in ("train", "validation", "test")}
    measured = {name: long_enough(part) for name, part in parts.items()}
    similarity = [
        SimilarityTask(**(vars(task) | {"name": prefix + task.name}))
        for name, prefix in (("test", ""), ("validation", "validation "))
        for task in tasks_of(rows_with(notes, "split", name), measured[name])
    ]
    counts = {name: len(set(part["patient_id"][:])) for name, part in parts.items()}
    facts = (
        f"MTSamples (CC0 as published; not bundled): {len(notes):,} real notes, {counts['train']:,} of them for training, "
        f"{counts['validation']} for validation, {counts['test']} for the test, near-copies together."
    )
    held_out = (measured["validation"], measured["test"])
    return domain_of("mtsamples", facts, "sections", parts["train"], *held_out, similarity, FORM, model_name_or_path)


def read(folder: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Notes and sections with `patient_id`, `text`, the frequent values of each label, and our own `split`."""
    notes, sections = (
        pq.read_table(folder / "mtsamples" / f"{name}.parquet").to_pydict() for name in ("notes", "sections")
    )
    split = dict(zip(notes["note_id"], split_apart(notes["text"], notes["note_id"]), strict=True))
    kind, specialty = (
        dict(zip(notes["note_id"], frequent(notes[name]), strict=True)) for name in ("kind", "specialty")
    )
    table = {
        "patient_id": notes["note_id"],
        "text": notes["text"],
        "specialty": list(specialty.values()),
        "kind": list(kind.values()),
        "summary": notes["summary"],
        "split": list(split.values()),
    }
    rows = {
        "patient_id": sections["note_id"],
        "time": sections["order"],
        "text": sections["text"],
        "header": frequent(sections["section"]),
        "specialty": [specialty[note] for note in sections["note_id"]],
        "kind": [kind[note] for note in sections["note_id"]],
        "split": [split[note] for note in sections["note_id"]],
    }
    return datasets.Dataset.from_dict(table), load_notes(datasets.Dataset.from_dict(rows))


def long_enough(sections: datasets.Dataset) -> datasets.Dataset:
    """Sections of some words."""
    return sections.filter(lambda text: len(text) >= SHORTEST, input_columns="text")


def tasks_of(notes: datasets.Dataset, sections: datasets.Dataset) -> list[SimilarityTask]:
    """Specialty of notes and of sections, the summary as a query, the sections of one note; headers and kinds."""
    whole = {name: notes[name][:] for name in ("patient_id", "text", "specialty", "kind", "summary")}
    return [
        SimilarityTask(name="specialty", kind="neighbours", notes=whole, label="specialty"),
        SimilarityTask(name="specialty, clusters", kind="clusters", notes=whole, label="specialty"),
        SimilarityTask(name="specialty, few labels", kind="few_labels", notes=whole, label="specialty"),
        SimilarityTask(name="specialty of a section", kind="neighbours", notes=sections, label="specialty"),
        SimilarityTask(name="specialty of a section, clusters", kind="clusters", notes=sections, label="specialty"),
        SimilarityTask(name="summary → note", kind="retrieval", notes=whole, question="summary", group=None),
        SimilarityTask(name="sections of one note", kind="same_patient", notes=sections),
        SimilarityTask(name="section header", kind="neighbours", notes=sections, label="header"),
        SimilarityTask(name="section header, few labels", kind="few_labels", notes=sections, label="header"),
        SimilarityTask(name="kind of note", kind="neighbours", notes=whole, label="kind"),
    ]
