"""The other way round: trained on sections of abstracts and of visits' notes, measured on answers to questions (MedQuAD).

`data` holds `medquad` as for `documents`, and `pubmedqa/sections.parquet` (pmid, section_index, text) or
`aci_bench/sections.parquet` (encounter_id, section_index, text), or both: a document as a patient, its sections as notes
in order. No label is used in training.
"""

from pathlib import Path

import datasets
import pyarrow.parquet as pq

from domains import Domain
from domains.documents import FORM, dialogues, domain_of, read_parts, searched_tasks
from hf_densefeat import load_notes

SOURCES = {"pubmedqa": "pmid", "aci_bench": "encounter_id"}  # folder and the column that names the document


def load(data: Path, model_name_or_path: str) -> Domain:
    """The domain, from a folder of data sets and an encoder to start from."""
    folder = Path(data)
    train, searched = read_sections(folder), read_parts(folder)[1]
    facts = "Sections of PubMedQA's abstracts (MIT) and of ACI-Bench's notes (CC BY 4.0), a document as a patient."
    similarity = searched_tasks(searched) + dialogues(folder)
    held_out = (searched["validation"], searched["test"])
    return domain_of("sections", facts, "sections", train, *held_out, similarity, FORM, model_name_or_path)


def read_sections(folder: Path) -> datasets.Dataset:
    """The sections of all sources that are there, as notes; `patient_id` is source and document, `time` the order."""
    rows: dict[str, list] = {"patient_id": [], "time": [], "text": []}
    for source, document in SOURCES.items():
        path = folder / source / "sections.parquet"
        if path.exists():
            table = pq.read_table(path, columns=[document, "section_index", "text"]).to_pydict()
            rows["patient_id"] += [f"{source} {name}" for name in table[document]]
            rows["time"] += map(int, table["section_index"])
            rows["text"] += table["text"]
    if not rows["text"]:
        raise FileNotFoundError(
            f"--data: expected sections.parquet in {' or '.join(SOURCES)} under {folder}, found neither."
        )
    return load_notes(datasets.Dataset.from_dict(rows))
