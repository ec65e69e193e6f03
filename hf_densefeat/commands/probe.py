r"""Measure what encoders make of your notes: similarity, geometry and linear probes, side by side.

    densefeat probe --model out/ --model answerdotai/ModernBERT-base --notes notes.parquet \
        --similarity same_patient --similarity diagnosis:neighbours --task died:binary --task age:regression

The first --model is the base that the others are compared with. A model is a folder, a Hub name or a
sentence-transformers folder, as `path` or `name=path`. A task is `label:kind` for a column of the notes, or
`label:kind:table` for a table of its own with a `text` column and, where there are such, a `patient_id` or
`subject_id` column (else every row is a patient) and a `split` column; kinds are binary, multiclass, regression and
clustering. --similarity names uses of the embeddings by cosine, measured on the notes of held-out patients:
`same_patient` (the default: a patient's other notes among everybody's), or `column:kind` such as `diagnosis:neighbours`
or `question:query`; any other word lists all. Words (TF-IDF of training patients' notes) are measured beside the encoders.

--vectors measures vectors of any origin, such as an API: a parquet or csv table, or a folder of parquet files as `densefeat
encode` writes it, of an id and a column of lists (or columns) of floats. Notes without a vector are left out.

Written to --output: `report.html` (one file that can be sent to a colleague), `report.json`, `report.md` and the PNGs.
They hold numbers, names of columns and label values, and no note text, patient id or path. With --meds FOLDER, the test
rows' predictions of binary tasks go to that folder in the schema of meds-evaluation, with patient ids.
"""

import logging
from dataclasses import dataclass

from hf_densefeat.commands.settings import NotesTable
from hf_densefeat.training.options import option


@dataclass(kw_only=True)
class Settings(NotesTable):
    """Options of the command."""

    model: list[str] = option([], help="PATH or NAME=PATH; the first is the base")
    vectors: list[str] = option([], help="PATH or NAME=PATH of vectors that are there already, with or without models")
    id_column: str | None = option(None, help="joins vectors and notes; default: note_id, else the row's number")
    task: list[str] = option([], help="label:kind or label:kind:table")
    similarity: list[str] | None = option(None, help="same_patient, or column:kind")
    output: str = option("probe_report", help="folder to write")
    k: int = option(20, help="subspace dimension")
    bootstraps: int = option(1000, help="redraws of the test patients")
    shots: list[int] | None = option(None, help="few-shot sizes (1 to 128 by default); none: --shots")
    batch_size: int = option(32, help="notes at once")
    max_length: int | None = option(None, help="tokens of a note, default: what the encoder can see")
    max_notes: int = option(100_000, help="notes, of whole patients drawn at random, to measure on")
    no_cache: bool = option(False, help="do not keep embeddings under HF_HOME/hf_densefeat")
    meds: str | None = option(None, help="folder for binary tasks' predictions as MEDS tables; these hold patient ids")
    seed: int = option(0, help="of the split by patient, where no model records one, and of every draw")
    allow_trained: bool = option(False, help="test on patients that a model was trained on")


def run(settings: Settings) -> dict:
    """Read, encode, measure, write; returns what `report.json` holds."""
    if not settings.model and not settings.vectors:
        raise ValueError("Nothing to measure: pass --model, a folder or Hub name, or --vectors, a table.")
    from hf_densefeat.commands.measuring import quiet
    from hf_densefeat.commands.probing import Reading, check_words, show, write_predictions, write_report

    quiet(logging.INFO)
    check_words(settings)
    reading = Reading(settings)
    found = reading.found()
    report = write_report(found, reading)
    show(report, found, settings.output)
    if settings.meds:
        write_predictions(settings.meds, reading, found)
    return report
