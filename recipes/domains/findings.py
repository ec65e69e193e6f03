"""The counter-example: findings of care homes' inspectors, where what follows shares the facility and not the matter.

`data` holds `care_findings/findings.parquet` (facility, received, facility_type, abuse, outcome, text), The Oregonian's
(MIT, on condition of credit). A facility is a patient, its findings by date are its notes. The column `split` is not used:
see `rows.split_apart`. No label is used in training.
"""

from pathlib import Path

import datasets
import pyarrow.parquet as pq

from domains import Domain
from domains.documents import domain_of
from domains.rows import frequent, rows_with, split_apart
from hf_densefeat import SimilarityTask, load_notes

FORM = (
    "own facility",
    "type of facility",
    "type of facility, few labels",
)  # whose finding; the others ask for the matter


def load(data: Path, model_name_or_path: str) -> Domain:
    """The domain, from a folder of data sets and an encoder to start from."""
    findings = read(Path(data))
    parts = [rows_with(findings, "split", name) for name in ("train", "validation", "test")]
    similarity = [
        SimilarityTask(**(vars(task) | {"name": prefix + task.name}))
        for part, prefix in ((parts[2], ""), (parts[1], "validation "))
        for task in tasks_of(part)
    ]
    train, validation, test = (len(set(part["patient_id"][:])) for part in parts)
    facts = (
        f"The Oregonian's long-term care database (MIT, credit: The Oregonian/OregonLive): {len(findings):,} findings; "
        f"{train:,} facilities for training, {validation} for validation, {test} for the test, near-copies together."
    )
    return domain_of("findings", facts, "findings", *parts, similarity, FORM, model_name_or_path)


def read(folder: Path) -> datasets.Dataset:
    """Findings as notes: `patient_id` is the facility, `time` the date; the frequent values of each label."""
    table = pq.read_table(folder / "care_findings" / "findings.parquet").to_pydict()
    rows = {
        "patient_id": table["facility"],
        "time": table["received"],
        "text": table["text"],
        "outcome": frequent(table["outcome"]),
        "abuse": frequent(table["abuse"]),
        "type": table["facility_type"],
        "split": split_apart(table["text"], table["facility"]),
    }
    return load_notes(datasets.Dataset.from_dict(rows))


def tasks_of(findings: datasets.Dataset) -> list[SimilarityTask]:
    """Outcome and kind of abuse among neighbours, in clusters, from few labels; the facility and its type."""
    tasks = [SimilarityTask(name="own facility", kind="same_patient", notes=findings)]
    for title, label in (("outcome", "outcome"), ("kind of abuse", "abuse"), ("type of facility", "type")):
        for part, kind in (("", "neighbours"), (", clusters", "clusters"), (", few labels", "few_labels")):
            if label != "type" or kind != "clusters":
                tasks.append(SimilarityTask(name=title + part, kind=kind, notes=findings, label=label))
    return tasks
