"""What an encoder makes of your notes: geometry report and linear probes, for one encoder or several side by side.

    python recipes/probe.py --model out/ --model answerdotai/ModernBERT-base \
        --notes notes.parquet --task died:binary --task specialty:multiclass --task age:regression

The first --model is the base that the others are compared with. A model is a folder, a Hub name or a
sentence-transformers folder, as `path` or `name=path`. A task is `label:kind` for a column of the notes, or
`label:kind:table` for a table of its own with a `text` column and, where there are such, a `patient_id` or
`subject_id` column (else every row is a patient) and a `split` column; kinds are binary, multiclass, regression and
clustering.

Written to --output: `report.html` (one file that can be sent to a colleague), `report.json`, `report.md` and the PNGs.
They hold numbers, names of columns and label values, and no note text, patient id or path. With --meds FOLDER, the test
rows' predictions of binary tasks go to that folder in the schema of meds-evaluation, with patient ids.
"""

import argparse
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

from hf_densefeat import AutoDenseModel, ProbeEvaluator, ProbeTask, adjacent_pairs, geometry_report, load_notes
from hf_densefeat.evaluation.embeddings import embed, encoder_key
from hf_densefeat.evaluation.geometry import patient_subspaces, principal_angles, spectrum
from hf_densefeat.evaluation.probes import SHOTS, ProbeResult, meds_predictions
from hf_densefeat.evaluation.tasks import PROBE_KINDS
from hf_densefeat.reporting.comparison import Measured, plain_numbers, triples, verdict
from hf_densefeat.reporting.page import METHOD, Section, render, render_markdown
from hf_densefeat.reporting.plots import Picture, plot_angles, plot_projection, plot_shots, plot_spectra
from hf_densefeat.reporting.tables import comparison_table, geometry_table, rows_table, subspace_table

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
    config = json.loads(Path(_file(source, "config.json")).read_text())
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


# ---------------------------------------------------------------------------------------------------------- the run


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


def run(arguments: argparse.Namespace) -> dict:
    """Encode, measure, write; returns what `report.json` holds."""
    notes = load_notes(arguments.notes)
    tasks = parse_tasks(arguments.task, notes)
    options = {"bootstraps": arguments.bootstraps, "shots": arguments.shots, "cache": False, "seed": arguments.seed}
    evaluator = ProbeEvaluator(tasks, **options) if tasks else None
    pairs = adjacent_pairs(notes)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    texts = list(notes["text"])
    own = set(texts)
    others = sorted({t for rows in (evaluator.rows.values() if evaluator else ()) for t in rows.texts if t not in own})
    patients = torch.from_numpy(np.unique(np.asarray(notes["patient_id"]), return_inverse=True)[1])

    found, geometry, subspaces, per_patient, spectra, angles, results, seconds = ({} for _ in range(8))
    for argument in arguments.model:
        encoder = load_encoder(argument, set(found), arguments.max_length)
        name, start = encoder.name, time.perf_counter()
        how = {
            "tokenizer": encoder.tokenizer,
            "batch_size": arguments.batch_size,
            "max_length": encoder.max_length,
            "cache": not arguments.no_cache,
            "key": encoder_key(encoder.model, encoder.tokenizer),
        }
        # Apart, so that another task does not cost another pass over the notes.
        z = embed(encoder.model, texts, **how)
        rows = torch.from_numpy(z)
        if others:
            z = np.concatenate([z, embed(encoder.model, others, **how)])
        seconds[name] = time.perf_counter() - start
        logger.info("%s: %d texts in %.0f s", name, len(z), seconds[name])
        found[name] = Lookup(texts + others, z)
        geometry[name] = geometry_report(rows, k=arguments.k, seed=arguments.seed)
        geometry[name]["truncated"] = truncated_share(encoder, texts)
        spectra[name] = spectrum(rows, center=True).numpy()
        if len(pairs) > 3:
            earlier, later = rows[pairs.earlier], rows[pairs.later]
            groups = torch.from_numpy(pairs.patient)
            subspaces[name] = geometry_report(earlier, later, arguments.k, groups, arguments.seed)
            per_patient[name] = patient_subspaces(rows, patients, arguments.k, seed=arguments.seed)
            if subspaces[name]["k"]:
                angles[name] = _angles_with_floor(earlier, later, groups, int(subspaces[name]["k"]), arguments.seed)
        if evaluator:
            results[name] = evaluator.evaluate(found[name])

    base = next(iter(found))
    measured: list[Measured] = [
        {
            "name": name,
            "geometry": geometry[name],
            "spectrum": spectra[name].tolist(),
            "probes": triples(results.get(name, {})),
            "differences": triples(results[name], results[base]) if evaluator and name != base else {},
        }
        for name in found
    ]
    verdicts = {one["name"]: verdict(one, measured[0] if one["name"] != base else None) for one in measured}
    # The newest encoder first: that is what the reader asks about.
    sentences = list(reversed(verdicts.values()))

    spectrum_picture = plot_spectra(spectra, output / "spectrum.png")
    angle_pictures = [plot_angles(angles, output / "angles.png")] if angles else []
    probe_pictures: list[Picture] = []
    if curves := few_shot_curves(results):
        probe_pictures.append(plot_shots(curves, output / "shots.png"))
    if evaluator:
        rows = evaluator.rows[tasks[0].name]
        some = np.random.default_rng(arguments.seed).permutation(len(rows.y))[:2000]
        sets = {name: known.encode(rows.texts)[some] for name, known in found.items()}
        place = output / "projection.png"
        probe_pictures.append(plot_projection(sets, rows.y[some], rows.classes, label=tasks[0].label, path=place))
    sections = [Section("Geometry", geometry_table(measured), [spectrum_picture])]
    if subspaces:
        table = subspace_table(subspaces, per_patient)
        sections.append(Section("Subspaces of adjacent notes", table, angle_pictures))
    if evaluator:
        table = comparison_table(measured, ("probes", "clusterings"), "probe")
        sections.append(Section("Probes", table, probe_pictures))
        sections.append(Section("Rows behind the numbers", rows_table(results[base])))
    facts = f"{len(notes):,} notes of {pairs.patients:,} patients, {len(pairs):,} adjacent pairs."
    how = {"facts": facts, "method": METHOD.format(bootstraps=f"{arguments.bootstraps:,}")}
    report = {
        "verdicts": {name: asdict(one) for name, one in verdicts.items()},
        "notes": {"notes": len(notes), "patients": pairs.patients, "pairs": len(pairs)},
        "measured": measured,
        "adjacent": subspaces,
        "per_patient": per_patient,
        "probes": {name: {task: _result(one) for task, one in tasks.items()} for name, tasks in results.items()},
        "encode_seconds": seconds,
        "settings": {name: getattr(arguments, name) for name in ("k", "bootstraps", "shots", "seed")},
    }
    text = render_markdown(sentences, sections, **how)
    (output / "report.md").write_text(text)
    (output / "report.json").write_text(json.dumps(plain_numbers(report), indent=1) + "\n")
    (output / "report.html").write_text(render(sentences, sections, **how))
    print(text)
    if arguments.meds:
        write_predictions(Path(arguments.meds), tasks, results)
    return report


def few_shot_curves(results: dict[str, dict[str, ProbeResult]]) -> dict:
    """Task to encoder to number of rows of a class to `Estimate`, the last for all rows."""
    curves: dict[str, dict] = {}
    for name, tasks in results.items():
        for task, one in tasks.items():
            if one.shots:
                curves.setdefault(task, {})[name] = one.shots | {"all": one.metrics["auroc"]}
    return curves


def write_predictions(folder: Path, tasks: Sequence[ProbeTask], results: dict[str, dict[str, ProbeResult]]) -> None:
    """One parquet file an encoder and binary task, readable by the user alone: unlike the report, they hold patient ids."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, found in results.items():
        for task in tasks:
            if task.kind == "binary":
                path = folder / f"{name} {task.name}.parquet"
                path.touch(mode=0o600)
                pq.write_table(meds_predictions(task, found[task.name]), path)


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
    found.add_argument("--output", default="probe_report", help="folder to write")
    found.add_argument("--k", type=int, default=20, help="subspace dimension")
    found.add_argument("--bootstraps", type=int, default=1000, help="redraws of the test patients")
    found.add_argument("--shots", type=int, nargs="*", default=SHOTS, help="few-shot sizes; none: --shots")
    found.add_argument("--batch_size", type=int, default=32)
    found.add_argument("--max_length", type=int, help="tokens of a note, default: what the encoder can see")
    found.add_argument("--no_cache", action="store_true", help="do not keep embeddings under HF_HOME/hf_densefeat")
    found.add_argument("--meds", help="folder for binary tasks' predictions as MEDS tables; these hold patient ids")
    found.add_argument("--seed", type=int, default=0)
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
