"""A run of `densefeat probe`: encoders and notes are read, each encoder is measured, and a report is written."""

import datetime
import importlib.metadata
import json
import logging
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers.utils import cached_file

from hf_densefeat.commands.measuring import (
    Encoded,
    Measurement,
    check_probes,
    load,
    loading,
    parse_tasks,
    sample,
    tokens_seen,
)
from hf_densefeat.commands.probe import Settings
from hf_densefeat.commands.settings import writable
from hf_densefeat.commands.vectors import given_vectors
from hf_densefeat.data.notes import copied
from hf_densefeat.data.splits import SplitRecord, hold_out
from hf_densefeat.evaluation.embeddings import embed, encoder_key
from hf_densefeat.evaluation.geometry import geometry_report, halves_of, patient_subspaces, principal_angles
from hf_densefeat.evaluation.probes import SHOTS, ProbeResult, meds_predictions
from hf_densefeat.evaluation.similarity import similarity_tasks
from hf_densefeat.evaluation.words import NAME as WORDS
from hf_densefeat.evaluation.words import Words
from hf_densefeat.reporting.comparison import Measured, TaskResults, plain_numbers, verdict
from hf_densefeat.reporting.page import METHOD, render, render_markdown, report_sections
from hf_densefeat.reporting.plots import Picture, plot_projection
from hf_densefeat.reporting.tables import before_after_table, rows_table, terminal

logger = logging.getLogger("probe")


@dataclass(frozen=True)
class Found:
    """What was found of one encoder; what is of adjacent notes is empty where there are none."""

    measured: Measured
    results: TaskResults
    known: Encoded
    max_length: int | None  # tokens of a note that it sees; None for given vectors
    adjacent: dict[str, float]
    per_patient: dict[str, float]
    angles: tuple[np.ndarray, np.ndarray] | None
    seconds: float


def check_words(settings: Settings) -> None:
    """ValueError for words that name no task or use, and for a folder that cannot be written."""
    writable(settings.output, "output")
    if settings.meds:
        Path(settings.meds).mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold patient ids
        writable(settings.meds, "meds")
    similarity_tasks(settings.similarity or [], None)
    check_probes(settings.task, "task")


def named(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Name and path of each `path` or `name=path`; ValueError for a name that is given twice."""
    found: dict[str, str] = {}
    for argument in arguments:
        name, _, source = argument.rpartition("=")
        name = name or Path(source).name or Path(source).resolve().name
        if name in found:
            raise ValueError(
                f"Two models would be called {name!r}: give names, --model first=PATH --model second=PATH."
            )
        found[name] = source
    return list(found.items())


def recorded_split(models: Iterable[str]) -> SplitRecord | None:
    """Who any of the models was trained on, as far as their folders say so: all of them are tested on the others."""
    record: SplitRecord | None = None
    for source in models:
        with loading(source):
            config = json.loads(Path(str(cached_file(source, "config.json"))).read_text())
        split = (config.get("densefeat") or {}).get("split")
        if split:
            found = SplitRecord.from_dict(split, source)
            record = found if record is None else record | found  # the first model's rule splits
    return record


class Reading(Measurement):
    """The notes that a command names, read before anything is encoded, and what is asked of each encoder on them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        sources, count = named([*settings.model, *settings.vectors]), len(settings.model)
        self.models = sources[:count]  # name and source of each
        # first: a model that is not there is said before notes are read
        self.record = recorded_split(source for _, source in self.models)
        every, self.given = given_vectors(sources[count:], settings) if settings.vectors else (settings.read(), {})
        notes = sample(every, settings.max_notes, settings.seed)
        how: dict[str, Any] = {"seed": settings.seed, "record": self.record, "allow_trained": settings.allow_trained}
        parts, _ = hold_out(notes, need=("test",), **how)
        self.left_out = len(every) - len(notes)  # these are too many
        # what geometry is measured on: notes of held-out patients where a model says whom it was trained on, else all
        self.notes = notes if self.record is None else parts["test"]
        self.train = parts["train"]["text"][:]  # for words
        self.fitted = ""  # how words were fitted, once they were
        super().__init__(
            self.notes,
            similarity=settings.similarity,
            asked_of=parts["test"],
            tasks=parse_tasks(settings.task, notes),
            shots=SHOTS if settings.shots is None else settings.shots,
            k=settings.k,
            bootstraps=settings.bootstraps,
            variants=True,
            **how,
        )
        if self.given and set(self.others) - set(every["text"][:]):
            raise ValueError("--vectors are of the notes: tables of their own and column:query need an encoder.")

    def found(self) -> dict[str, Found]:
        """What is found of each encoder, by name: of the models, loaded when their turn comes, then of given vectors."""
        found = {name: self.examine(name, *load(source)) for name, source in self.models}
        return found | {name: self.examine(name, known) for name, known in self.given.items()}

    def examine(self, name: str, model: Any, tokenizer: Any = None) -> Found:
        """Encode what is asked for, once, and measure; the first encoder says how far into each note words read."""
        seen = tokens_seen(model, tokenizer, self.settings.max_length) if tokenizer else None
        if self.train and self.evaluators and not self.fit_words:
            read = None if getattr(model, "long_notes", "") == "chunk" else seen
            much = f"the first {read:,} tokens" if read else "all"
            self.fitted = f"words: TF-IDF of {much} of {len(self.train):,} training notes"
            self.fit_words = partial(Words.fit, self.train, tokenizer, read)
        self.refuse_trained(model)
        start, k, seed = time.perf_counter(), self.k, self.settings.seed
        how: dict[str, Any] = {
            "tokenizer": tokenizer,
            "batch_size": self.settings.batch_size,
            "max_length": seen,
            "cache": not self.settings.no_cache,
            "key": encoder_key(model, tokenizer) if tokenizer else None,
        }
        # other texts are encoded apart, so that another task does not cost another pass over the notes
        z, cut = embed(model, self.texts, return_cut=True, **how)
        rows = torch.from_numpy(z)
        if self.others:
            z = np.concatenate([z, embed(model, self.others, **how)])
        seconds = time.perf_counter() - start
        logger.info("%s: %d texts in %.0f s", name, len(z), seconds)
        geometry = geometry_report(rows, k=k, seed=seed)
        if seen:
            geometry["truncated"] = float(cut.mean())
        adjacent, per_patient, angles = {}, {}, None
        if len(self.pairs) > 3:
            earlier, later = rows[self.pairs.earlier], rows[self.pairs.later]
            groups = torch.from_numpy(self.pairs.patient)
            adjacent = geometry_report(earlier, later, k=k, groups=groups, seed=seed)
            patients = torch.from_numpy(np.unique(np.asarray(self.notes["patient_id"]), return_inverse=True)[1])
            per_patient = patient_subspaces(rows, patients, k, seed=seed)
            if adjacent["k"]:
                angles = _angles_with_floor(earlier, later, groups, int(adjacent["k"]), seed)
        known = Encoded.of(self.texts + self.others, z)
        results = self.results(known)
        if len(self.models) + len(self.given) == 1:
            self.first = self.of_words  # a single encoder is compared with words
        measured = self.compared(name, geometry, rows, results)
        return Found(measured, results, known, seen, adjacent, per_patient, angles, seconds)


def _angles_with_floor(z: torch.Tensor, z_next: torch.Tensor, patients: torch.Tensor, k: int, seed: int):
    """Angles between patients' halves, earlier against later, and earlier against earlier: equal row counts.

    Halves are of patients, because a note is the later one of a pair and the earlier one of the next. They are those of
    `geometry_report`, which lowered ``k`` to what each of them supports. Means over the draws.
    """
    found: tuple[list, list] = ([], [])
    for first, second in halves_of(len(z), patients, seed=seed):
        for angles, other in zip(found, (z_next, z), strict=True):
            angles.append(principal_angles(z[first], other[second], k, center=True).numpy())
    return tuple(np.mean(angles, axis=0) for angles in found)


# ---- The report --------------------------------------------------------------------------------------------------------


def draw_projection(found: dict[str, Found], reading: Reading, output: Path) -> Picture | None:
    """The first probe's rows in the plane."""
    if reading.probes is None:
        return None
    task = reading.probes.tasks[0]
    rows = reading.probes.rows[task.name]
    some = np.random.default_rng(reading.settings.seed).permutation(len(rows.y))[:2000]
    sets = {name: one.known.encode(rows.texts)[some] for name, one in found.items()}
    return plot_projection(sets, rows.y[some], rows.classes, label=task.label, path=output / "projection.png")


def plain(found: ProbeResult) -> dict:
    """A probe's numbers, without the replicates."""
    metrics, shots = ({key: asdict(one) for key, one in part.items()} for part in (found.metrics, found.shots))
    return {"kind": found.kind, "metrics": metrics, "shots": shots, "rows": found.rows, "strength": found.strength}


def write_report(found: dict[str, Found], reading: Reading) -> dict:
    """Page, Markdown, JSON and pictures; returns what the JSON holds."""
    settings, base = reading.settings, next(iter(found.values()))
    output, measured = Path(settings.output), [one.measured for one in found.values()]
    place = 0 if reading.first is reading.of_words else 1  # words come first where they are what is compared with
    measured[place:place] = reading.beside()
    others = [one for one in measured[1:] if one["name"] != WORDS] or measured
    # The newest encoder first: that is what the reader asks about.
    verdicts = {one["name"]: verdict(one, measured[0] if measured[1:] else None) for one in reversed(others)}
    angles = {name: one.angles for name, one in found.items() if one.angles is not None}
    sections = report_sections(
        measured,
        output,
        adjacent={name: one.adjacent for name, one in found.items()} if base.adjacent else None,
        per_patient={name: one.per_patient for name, one in found.items()} if base.per_patient else None,
        angles=angles,
        shots=few_shot_curves(found),
        projection=draw_projection(found, reading, output),
        rows=rows_table(base.results.similarity) + rows_table(base.results.probes)[1:],
    )
    counts = {"notes": len(reading.notes), "notes_left_out": reading.left_out}
    counts |= {"patients": reading.pairs.num_patients, "pairs": len(reading.pairs), "copied": copied(reading.notes)}
    how = {
        "facts": facts_of(found, counts, reading),
        "method": METHOD.format(bootstraps=f"{settings.bootstraps:,}"),
    }
    report = {
        "verdicts": {name: asdict(one) | {"sentence": one.sentence} for name, one in verdicts.items()},
        "notes": counts,
        "measured": measured,
        "adjacent": {name: one.adjacent for name, one in found.items()},
        "per_patient": {name: one.per_patient for name, one in found.items()},
        "probes": {name: {task: plain(r) for task, r in one.results.probes.items()} for name, one in found.items()},
        "encode_seconds": {name: one.seconds for name, one in found.items()},
        "settings": {name: getattr(settings, name) for name in ("k", "bootstraps", "seed")}
        | {"shots": reading.probes.shots if reading.probes else []},
    }
    text = render_markdown(list(verdicts.values()), sections, **how)
    (output / "report.md").write_text(text)
    (output / "report.json").write_text(json.dumps(plain_numbers(report), indent=1) + "\n")
    (output / "report.html").write_text(render(list(verdicts.values()), sections, **how))
    return report


def facts_of(found: dict[str, Found], counts: dict[str, int], reading: Reading) -> str:
    """When, with what, on what and with which options, in a paragraph."""
    encoders = []
    for name, one in found.items():
        length, cut = one.max_length, one.measured["geometry"].get("truncated", 0.0)
        seen = f"{length:,} tokens, which cut {cut:.1%} of the notes" if length else "vectors as given"
        encoders.append(f"{name}: {one.known.width} dimensions, {seen}")
    encoders += [reading.fitted] if reading.fitted else []
    left_out = (
        f" (whole patients drawn at random; {reading.left_out:,} notes are left out)" if reading.left_out else ""
    )
    whose = " of patients that no model was trained on" if reading.record else ""
    copies = (
        f"{counts['copied']:,} of the notes have a text that the same patient has at another time, white space aside: "
        "they lift what finds a patient's own notes, and --drop_copies leaves them out. "
    )
    return (
        f"{datetime.date.today().isoformat()}, hf_densefeat {importlib.metadata.version('hf_densefeat')}. "
        f"{counts['notes']:,} notes of {counts['patients']:,} patients{left_out}, {counts['pairs']:,} adjacent pairs{whose}. "
        f"{copies if counts['copied'] else ''}{'; '.join(encoders)}. "
        f"Subspaces of {reading.k} dimensions, seed {reading.settings.seed}. {different_lengths(found)}"
    )


def different_lengths(found: dict[str, Found]) -> str:
    """What to know where the models do not see the same of a note; nothing where they do."""
    seen = [one for one in found.values() if one.max_length]
    limits = [one.max_length for one in seen if one.measured["geometry"]["truncated"] and one.max_length]
    if len({one.max_length for one in seen}) < 2 or not limits:
        return ""
    return f"The models do not see the same of a note: --max_length {min(limits)} makes them comparable."


def show(report: dict, found: dict[str, Found], output: str) -> None:
    """Print the table, the verdicts, what to know beside them, and where the report is."""
    verdicts = ("\n" + textwrap.fill(one["sentence"], 80) for one in report["verdicts"].values())
    print(terminal(before_after_table(report["measured"])), *verdicts, sep="\n")
    if different_lengths(found):
        print(f"\n{different_lengths(found)}")
    for task, one in next(iter(report["probes"].values()), {}).items():
        untrained = one["rows"].get("classes_without_training_rows")
        if untrained:
            print(f"\n{task}: {untrained} classes of the test rows have no training row, and an AUROC of .500 each.")
    print(f"\nWritten to {output}: report.html, one file that can be sent, report.md and report.json.")


def few_shot_curves(found: dict[str, Found]) -> dict:
    """Task to encoder to number of rows of a class to `Estimate`, the last for all rows."""
    curves: dict[str, dict] = {}
    for name, encoder in found.items():
        for task, one in encoder.results.probes.items():
            if one.shots:
                curves.setdefault(task, {})[name] = one.shots | {"all": one.metrics["auroc"]}
    return curves


def write_predictions(output: str, reading: Reading, found: dict[str, Found]) -> None:
    """One parquet file an encoder and binary task, readable by the user alone: unlike the report, they hold patient ids."""
    for name, one in found.items():
        for task in reading.probes.tasks if reading.probes else ():
            if task.kind == "binary":
                path = Path(output) / f"{name} {task.name}.parquet"
                path.touch(mode=0o600)
                pq.write_table(meds_predictions(task, one.results.probes[task.name]), path)
