"""What an encoder makes of your notes: similarity, geometry and linear probes, for one encoder or several side by side.

    densefeat probe --model out/ --model answerdotai/ModernBERT-base --notes notes.parquet \
        --similarity same_patient --similarity diagnosis:neighbours --task died:binary --task age:regression

The first --model is the base that the others are compared with. A model is a folder, a Hub name or a
sentence-transformers folder, as `path` or `name=path`. A task is `label:kind` for a column of the notes, or
`label:kind:table` for a table of its own with a `text` column and, where there are such, a `patient_id` or
`subject_id` column (else every row is a patient) and a `split` column; kinds are binary, multiclass, regression and
clustering. --similarity names uses of the embeddings by cosine, measured on the notes of held-out patients:
`same_patient` (the default: a patient's other notes among everybody's), or `column:kind` with a kind of query, same,
neighbours, clusters or few_labels.

Written to --output: `report.html` (one file that can be sent to a colleague), `report.json`, `report.md` and the PNGs.
They hold numbers, names of columns and label values, and no note text, patient id or path. With --meds FOLDER, the test
rows' predictions of binary tasks go to that folder in the schema of meds-evaluation, with patient ids.
"""

import argparse
import datetime
import importlib.metadata
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from hf_densefeat.commands.measure import SIMILARITY, similarity_tasks
from hf_densefeat.data.notes import load_notes
from hf_densefeat.data.pairs import NotePairs, adjacent_pairs
from hf_densefeat.data.splits import SplitRecord, split_by_patient
from hf_densefeat.evaluation.embeddings import embed, encoder_key
from hf_densefeat.evaluation.geometry import geometry_report, patient_subspaces, principal_angles, spectrum
from hf_densefeat.evaluation.probes import SHOTS, ProbeEvaluator, ProbeResult, meds_predictions
from hf_densefeat.evaluation.similarity import SimilarityEvaluator, SimilarityResult
from hf_densefeat.evaluation.similarity_tasks import SimilarityTask
from hf_densefeat.evaluation.tasks import PROBE_KINDS, ProbeTask, refuse_trained
from hf_densefeat.models.dense import AutoDenseModel
from hf_densefeat.reporting.comparison import Measured, plain_numbers, triples, verdict
from hf_densefeat.reporting.page import METHOD, render, render_markdown, report_sections
from hf_densefeat.reporting.plots import Picture, plot_projection
from hf_densefeat.reporting.tables import before_after_table, rows_table, terminal

logger = logging.getLogger("probe")


# ------------------------------------------------------------------------------------------------ reading and encoding


@dataclass
class Encoder:
    """A model under the name that the report gives it, and how many tokens of a text it sees."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int


class Lookup:
    """Embeddings that are already there, in the shape of an encoder."""

    def __init__(self, texts: Sequence[str], z: np.ndarray) -> None:
        self.rows, self.z = {text: row for row, text in enumerate(texts)}, z

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of the texts."""
        return self.z[[self.rows[text] for text in texts]]


def load_encoder(argument: str, names: set[str], max_length: int | None) -> Encoder:
    """A folder or Hub name, as `path` or `name=path`, that sees `max_length` tokens; the path is never the name."""
    name, _, source = argument.rpartition("=")
    name = name or Path(source).name or Path(source).resolve().name
    if name in names:
        raise ValueError(f"Two models would be called {name!r}: give names, --model first=PATH --model second=PATH.")
    config = json.loads(Path(str(_file(source, "config.json"))).read_text())
    if _file(source, "modules.json", needed=False) and "densefeat" not in config:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(source)
        model.max_seq_length = min(max_length or model.max_seq_length, model.max_seq_length)
        return Encoder(name, model, model.tokenizer, model.max_seq_length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoDenseModel.from_pretrained(source).to(device).eval()
    tokenizer = model._default_tokenizer()
    limits = (max_length, model.max_length, tokenizer.model_max_length)
    return Encoder(name, model, tokenizer, min(limit for limit in limits if limit))


def _file(source: str, name: str, needed: bool = True) -> str | None:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=needed)


def recorded_split(models: Sequence[str]) -> SplitRecord | None:
    """How the patients of the first model that says so were split for training: all models are tested on the others."""
    for argument in models:
        path = _file(argument.rpartition("=")[2], "config.json")
        block = json.loads(Path(str(path)).read_text()).get("densefeat") or {}
        if block.get("split"):
            return SplitRecord.from_dict(block["split"])
    return None


def parse_tasks(arguments: Sequence[str], notes: datasets.Dataset) -> list[ProbeTask]:
    """`label:kind` for a column of the notes, `label:kind:table` for a table of its own."""
    tasks = []
    for argument in arguments:
        label, kind, table = (*argument.split(":", 2), "")[:3] if argument.count(":") else (argument, "", "")
        if kind not in PROBE_KINDS:
            raise ValueError(
                f"Expected --task label:kind or label:kind:table, kind one of {list(PROBE_KINDS)}, got {argument!r}."
            )
        if not table:
            tasks.append(ProbeTask(label, notes, label, kind))
            continue
        data = read_table(table)
        patient = next((name for name in ("patient_id", "subject_id") if name in data.column_names), None)
        tasks.append(ProbeTask(f"{Path(table).stem} {label}", data, label, kind, patient=patient))
    names = [task.name for task in tasks]
    # One column may be both predicted and clustered.
    return [task if names.count(task.name) == 1 else replace(task, name=f"{task.name} {task.kind}") for task in tasks]


def parse_similarity(
    arguments: Sequence[str] | None, notes: datasets.Dataset, seed: int, split: SplitRecord | None
) -> list[SimilarityTask]:
    """Uses by cosine, on the notes of held-out patients; without words a patient's own notes, where any has two."""
    test = split_by_patient(notes, seed=seed, record=split)["test"]
    if arguments is None:
        return similarity_tasks(["same_patient"], test) if len(adjacent_pairs(test)) else []
    return similarity_tasks(arguments, test)


def read_table(path: str) -> datasets.Dataset:
    """A parquet, csv or jsonl file."""
    kinds = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
    if Path(path).suffix not in kinds:
        raise ValueError(f"Expected a table with a name ending in {', '.join(kinds)} but got {Path(path).name!r}.")
    return datasets.load_dataset(kinds[Path(path).suffix], data_files=path, split="train")


def truncated_share(encoder: Encoder, texts: Sequence[str]) -> float:
    """Share of the texts that are longer than what the encoder sees."""
    lengths = encoder.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    return float(np.mean([len(ids) > encoder.max_length for ids in lengths]))


# ------------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Reading:
    """The notes, what is asked of an encoder on them, and the texts that have to be encoded for it.

    Attributes:
        notes: all of them; geometry is that of these.
        pairs: adjacent ones.
        patients: patient codes (N,).
        probes: linear probes and k-means, if any.
        similarity: uses by cosine, on held-out patients' notes, if any.
        others: texts of other tables.
    """

    notes: datasets.Dataset
    pairs: NotePairs
    patients: torch.Tensor
    probes: ProbeEvaluator | None
    similarity: SimilarityEvaluator | None
    others: list[str]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Reading":
        """Read everything that the command names, before anything is encoded."""
        notes = load_notes(arguments.notes)
        options = {"bootstraps": arguments.bootstraps, "cache": False, "seed": arguments.seed}
        tasks, split = parse_tasks(arguments.task, notes), recorded_split(arguments.model)
        probes = ProbeEvaluator(tasks, shots=arguments.shots, split=split, **options) if tasks else None
        uses = parse_similarity(arguments.similarity, notes, arguments.seed, split)
        similarity = SimilarityEvaluator(uses, **options) if uses else None
        own = set(notes["text"])
        rows = probes.rows.values() if probes else ()
        others = sorted({text for one in rows for text in one.texts} - own)
        if similarity:
            asked = {text for one in similarity.rows.values() for text in (*one.texts, *one.queries)}
            others = sorted({*others, *asked} - own)
        patients = torch.from_numpy(np.unique(np.asarray(notes["patient_id"]), return_inverse=True)[1])
        return cls(notes, adjacent_pairs(notes), patients, probes, similarity, others)


@dataclass(frozen=True)
class Found:
    """What was found of one encoder; without adjacent notes, what is of these is empty."""

    encoder: Encoder
    known: Lookup
    geometry: dict[str, float]
    spectrum: np.ndarray
    adjacent: dict[str, float]
    per_patient: dict[str, float]
    angles: tuple[np.ndarray, np.ndarray] | None
    probes: dict[str, ProbeResult]
    similarity: dict[str, SimilarityResult]
    seconds: float


def examine(encoder: Encoder, reading: Reading, arguments: argparse.Namespace) -> Found:
    """Encode what is asked for, once, and measure."""
    start, texts = time.perf_counter(), list(reading.notes["text"])
    if reading.probes and not arguments.allow_trained:
        for name, task in reading.probes.rows.items():
            refuse_trained(task, name, encoder.model)
    how: dict[str, Any] = {
        "tokenizer": encoder.tokenizer,
        "batch_size": arguments.batch_size,
        "max_length": encoder.max_length,
        "cache": not arguments.no_cache,
        "key": encoder_key(encoder.model, encoder.tokenizer),
    }
    # Apart, so that another task does not cost another pass over the notes.
    z = embed(encoder.model, texts, **how)
    rows = torch.from_numpy(z)
    if reading.others:
        z = np.concatenate([z, embed(encoder.model, reading.others, **how)])
    seconds, known = time.perf_counter() - start, Lookup(texts + reading.others, z)
    logger.info("%s: %d texts in %.0f s", encoder.name, len(z), seconds)
    geometry = geometry_report(rows, k=arguments.k, seed=arguments.seed)
    geometry["truncated"] = truncated_share(encoder, texts)
    adjacent, per_patient, angles = {}, {}, None
    if len(reading.pairs) > 3:
        earlier, later = rows[reading.pairs.earlier], rows[reading.pairs.later]
        groups = torch.from_numpy(reading.pairs.patient)
        adjacent = geometry_report(earlier, later, arguments.k, groups, arguments.seed)
        per_patient = patient_subspaces(rows, reading.patients, arguments.k, seed=arguments.seed)
        if adjacent["k"]:
            angles = _angles_with_floor(earlier, later, groups, int(adjacent["k"]), arguments.seed)
    return Found(
        encoder,
        known,
        geometry,
        spectrum(rows, center=True).numpy(),
        adjacent,
        per_patient,
        angles,
        reading.probes.evaluate(known) if reading.probes else {},
        reading.similarity.evaluate(known) if reading.similarity else {},
        seconds,
    )


def _angles_with_floor(z: torch.Tensor, z_next: torch.Tensor, patients: torch.Tensor, k: int, seed: int):
    """Angles between patients' halves, earlier against later, and earlier against earlier: equal row counts.

    Halves are of patients, because a note is the later one of a pair and the earlier one of the next.
    Means over four draws.
    """
    generator = torch.Generator().manual_seed(seed)
    found: tuple[list, list] = ([], [])
    count = int(patients.max()) + 1
    for _ in range(4):
        first = torch.randperm(count, generator=generator)[: count // 2]
        half = torch.isin(patients, first)
        for angles, other in zip(found, (z_next, z), strict=True):
            angles.append(principal_angles(z[half], other[~half], k, center=True).numpy())
    return tuple(np.mean(angles, axis=0) for angles in found)


# ------------------------------------------------------------------------------------------------------ the report


def measured_of(found: dict[str, Found]) -> list[Measured]:
    """Plain numbers, with differences to the first encoder."""
    base = next(iter(found.values()))
    measured: list[Measured] = []
    for name, one in found.items():
        compared = one is not base
        measured.append(
            {
                "name": name,
                "geometry": one.geometry,
                "spectrum": one.spectrum.tolist(),
                "similarity": triples(one.similarity),
                "probes": triples(one.probes),
                "differences": {
                    **(triples(one.similarity, base.similarity) if compared else {}),
                    **(triples(one.probes, base.probes) if compared else {}),
                },
            }
        )
    return measured


def draw_projection(found: dict[str, Found], reading: Reading, arguments: argparse.Namespace) -> Picture | None:
    """The first probe's rows in the plane."""
    if reading.probes is None:
        return None
    task = reading.probes.tasks[0]
    rows = reading.probes.rows[task.name]
    some = np.random.default_rng(arguments.seed).permutation(len(rows.y))[:2000]
    sets = {name: one.known.encode(rows.texts)[some] for name, one in found.items()}
    place = Path(arguments.output) / "projection.png"
    return plot_projection(sets, rows.y[some], rows.classes, label=task.label, path=place)


def write_report(found: dict[str, Found], reading: Reading, arguments: argparse.Namespace) -> dict:
    """Page, Markdown, JSON and pictures; returns what the JSON holds."""
    output, base = Path(arguments.output), next(iter(found.values()))
    measured = measured_of(found)
    others = measured[1:] or measured
    # The newest encoder first: that is what the reader asks about.
    verdicts = {one["name"]: verdict(one, measured[0] if measured[1:] else None) for one in reversed(others)}
    angles = {name: one.angles for name, one in found.items() if one.angles is not None}
    sections = report_sections(
        measured,
        output,
        adjacent={name: one.adjacent for name, one in found.items()} if base.adjacent else None,
        per_patient={name: one.per_patient for name, one in found.items()} if base.per_patient else None,
        angles=angles,
        shots=few_shot_curves({name: one.probes for name, one in found.items()}),
        projection=draw_projection(found, reading, arguments),
        rows=rows_table(base.similarity) + rows_table(base.probes)[1:],
    )
    counts = {"notes": len(reading.notes), "patients": reading.pairs.patients, "pairs": len(reading.pairs)}
    settings = {name: getattr(arguments, name) for name in ("k", "bootstraps", "shots", "seed")}
    how = {
        "facts": facts_of(found, counts, arguments),
        "method": METHOD.format(bootstraps=f"{arguments.bootstraps:,}"),
    }
    report = {
        "verdicts": {name: asdict(one) | {"sentence": one.sentence} for name, one in verdicts.items()},
        "notes": counts,
        "measured": measured,
        "adjacent": {name: one.adjacent for name, one in found.items()},
        "per_patient": {name: one.per_patient for name, one in found.items()},
        "probes": {name: {task: _result(r) for task, r in one.probes.items()} for name, one in found.items()},
        "encode_seconds": {name: one.seconds for name, one in found.items()},
        "settings": settings,
    }
    text = render_markdown(list(verdicts.values()), sections, **how)
    (output / "report.md").write_text(text)
    (output / "report.json").write_text(json.dumps(plain_numbers(report), indent=1) + "\n")
    (output / "report.html").write_text(render(list(verdicts.values()), sections, **how))
    return report


def facts_of(found: dict[str, Found], counts: dict[str, int], arguments: argparse.Namespace) -> str:
    """When, with what, on what and with which options, in a paragraph."""
    encoders = "; ".join(
        f"{name}: {one.known.z.shape[1]} dimensions, {one.encoder.max_length:,} tokens, which cut "
        f"{one.geometry['truncated']:.1%} of the notes"
        for name, one in found.items()
    )
    return (
        f"{datetime.date.today().isoformat()}, hf_densefeat {importlib.metadata.version('hf_densefeat')}. "
        f"{counts['notes']:,} notes of {counts['patients']:,} patients, {counts['pairs']:,} adjacent pairs. {encoders}. "
        f"Subspaces of {arguments.k} dimensions, seed {arguments.seed}."
    )


def run(arguments: argparse.Namespace) -> dict:
    """Read, encode, measure, write; returns what `report.json` holds."""
    reading = Reading.of(arguments)
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    found: dict[str, Found] = {}
    for argument in arguments.model:
        encoder = load_encoder(argument, set(found), arguments.max_length)
        found[encoder.name] = examine(encoder, reading, arguments)
    report = write_report(found, reading, arguments)
    measured = report["measured"]
    print(
        terminal(before_after_table(measured)),
        *(f"\n{one['sentence']}" for one in report["verdicts"].values()),
        sep="\n",
    )
    print(f"\nWritten to {arguments.output}: report.html, one file that can be sent, report.md and report.json.")
    if arguments.meds:
        write_predictions(Path(arguments.meds), reading.probes.tasks if reading.probes else [], found)
    return report


def few_shot_curves(results: dict[str, dict[str, ProbeResult]]) -> dict:
    """Task to encoder to number of rows of a class to `Estimate`, the last for all rows."""
    curves: dict[str, dict] = {}
    for name, tasks in results.items():
        for task, one in tasks.items():
            if one.shots:
                curves.setdefault(task, {})[name] = one.shots | {"all": one.metrics["auroc"]}
    return curves


def write_predictions(folder: Path, tasks: Sequence[ProbeTask], found: dict[str, Found]) -> None:
    """One parquet file an encoder and binary task, readable by the user alone: unlike the report, they hold patient ids."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, one in found.items():
        for task in tasks:
            if task.kind == "binary":
                path = folder / f"{name} {task.name}.parquet"
                path.touch(mode=0o600)
                pq.write_table(meds_predictions(task, one.probes[task.name]), path)


def _result(found: ProbeResult) -> dict:
    return {
        "kind": found.kind,
        "metrics": {name: asdict(estimate) for name, estimate in found.metrics.items()},
        "shots": {k: asdict(estimate) for k, estimate in found.shots.items()},
        "rows": found.rows,
        "strength": found.strength,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", action="append", required=True, help="PATH or NAME=PATH; the first is the base")
    found.add_argument("--notes", required=True, help="table of notes, see load_notes")
    found.add_argument("--task", action="append", default=[], help="label:kind or label:kind:table")
    found.add_argument(
        "--similarity", action="append", help=f"same_patient, or column:kind, kind one of {', '.join(SIMILARITY)}"
    )
    found.add_argument("--output", default="probe_report", help="folder to write")
    found.add_argument("--k", type=int, default=20, help="subspace dimension")
    found.add_argument("--bootstraps", type=int, default=1000, help="redraws of the test patients")
    found.add_argument("--shots", type=int, nargs="*", default=SHOTS, help="few-shot sizes; none: --shots")
    found.add_argument("--batch_size", type=int, default=32)
    found.add_argument("--max_length", type=int, help="tokens of a note, default: what the encoder can see")
    found.add_argument("--no_cache", action="store_true", help="do not keep embeddings under HF_HOME/hf_densefeat")
    found.add_argument("--meds", help="folder for binary tasks' predictions as MEDS tables; these hold patient ids")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--allow_trained", action="store_true", help="test on patients that a model was trained on")
    return found


def main(argv: Sequence[str] | None = None) -> dict:
    """Read the command line and run."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("sentence_transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return run(parser().parse_args(argv))


if __name__ == "__main__":
    main()
