"""What `densefeat probe` reads, encodes and measures: encoders, notes with their tasks, and what one encoder gives."""

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
from hf_densefeat.data.splits import SplitRecord, hold_out
from hf_densefeat.evaluation.embeddings import embed, encoder_key
from hf_densefeat.evaluation.geometry import (
    geometry_report,
    halves_of,
    patient_subspaces,
    principal_angles,
)
from hf_densefeat.evaluation.probes import SHOTS
from hf_densefeat.evaluation.similarity import similarity_tasks
from hf_densefeat.evaluation.words import Words
from hf_densefeat.reporting.comparison import Measured, TaskResults

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
