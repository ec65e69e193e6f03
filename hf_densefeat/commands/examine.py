"""What `densefeat probe` reads, encodes and measures: encoders, notes with their tasks, and what one encoder gives."""

import json
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from hf_densefeat.commands.measuring import Encoded, default_similarity, loading, other_texts, pairs_if_any, sample
from hf_densefeat.commands.probe import Settings
from hf_densefeat.commands.settings import writable
from hf_densefeat.commands.vectors import numbered_notes, read_vectors
from hf_densefeat.data.layouts import Layout
from hf_densefeat.data.pairs import NotePairs
from hf_densefeat.data.readers import read_files
from hf_densefeat.data.splits import SplitRecord, hold_out
from hf_densefeat.evaluation.embeddings import embed, encoder_key
from hf_densefeat.evaluation.geometry import geometry_report, patient_subspaces, principal_angles, spectrum
from hf_densefeat.evaluation.probes import SHOTS, ProbeEvaluator
from hf_densefeat.evaluation.similarity import SimilarityEvaluator
from hf_densefeat.evaluation.similarity_kinds import similarity_tasks
from hf_densefeat.evaluation.similarity_tasks import SimilarityTask
from hf_densefeat.evaluation.subspaces import halves_of
from hf_densefeat.evaluation.tasks import PROBE_KINDS, Kind, ProbeTask
from hf_densefeat.evaluation.words import WordRows, Words
from hf_densefeat.models.dense import AutoDenseModel
from hf_densefeat.models.tokenizers import load_tokenizer
from hf_densefeat.reporting.comparison import Both

logger = logging.getLogger("probe")


# ------------------------------------------------------------------------------------------------ reading and encoding


@dataclass
class Encoder:
    """A model under the name that the report gives it, and how many tokens of a text it sees; None for given vectors."""

    name: str
    model: Any
    tokenizer: Any = None
    max_length: int | None = None


def named(argument: str, names: Collection[str]) -> tuple[str, str]:
    """Name and path of `path` or `name=path`; ValueError for a name that is given already."""
    name, _, source = argument.rpartition("=")
    name = name or Path(source).name or Path(source).resolve().name
    if name in names:
        raise ValueError(f"Two models would be called {name!r}: give names, --model first=PATH --model second=PATH.")
    return name, source


def given_vectors(settings: Settings) -> tuple[datasets.Dataset, dict[str, Encoded]]:
    """The notes that have a vector in each of the tables, and these vectors by the name of the table."""
    notes = numbered_notes(settings)
    tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for argument in settings.vectors:
        name, source = named(argument, tables)
        tables[name] = read_vectors(source, notes, settings.id_column)
    kept = reduce(np.intersect1d, (found for found, _ in tables.values()))
    if len(kept) < len(notes):
        logger.warning("%d of %d notes have no vector and are left out.", len(notes) - len(kept), len(notes))
    texts = notes.select(kept)["text"][:]
    given = {name: Encoded.of(texts, z[np.searchsorted(found, kept)]) for name, (found, z) in tables.items()}
    return notes.select(kept), given


def load_encoder(argument: str, names: set[str], max_length: int | None) -> Encoder:
    """A folder or Hub name, as `path` or `name=path`, that sees `max_length` tokens; the path is never the name."""
    name, source = named(argument, names)
    with loading(source):
        model = AutoDenseModel.from_pretrained(source)
        tokenizer = load_tokenizer(source)
    limits = (max_length, model.max_length, tokenizer.model_max_length)
    seen = min(int(limit) for limit in limits if limit)
    return Encoder(name, model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, seen)


def _config(source: str) -> dict[str, Any]:
    with loading(source):
        return json.loads(Path(str(cached_file(source, "config.json"))).read_text())


def recorded_split(models: Sequence[str]) -> SplitRecord | None:
    """Who any of the models was trained on, as far as their folders say so: all of them are tested on the others."""
    record: SplitRecord | None = None
    for argument in models:
        source = argument.rpartition("=")[2]
        block = _config(source).get("densefeat") or {}
        if block.get("split"):
            found = SplitRecord.from_dict(block["split"], source)
            record = found if record is None else record | found  # the first model's rule splits
    return record


def check_words(settings: Settings) -> None:
    """ValueError for words of tasks and uses that are none, and for a folder that cannot be written."""
    writable(settings.output, "output")
    if settings.meds:
        Path(settings.meds).mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold patient ids
        writable(settings.meds, "meds")
    similarity_tasks(settings.similarity or [], None)
    for argument in settings.task:
        if [*argument.split(":"), ""][1] not in PROBE_KINDS:
            raise ValueError(
                f"Expected --task label:kind or label:kind:table, kind one of {', '.join(PROBE_KINDS)}, got {argument!r}."
            )


def parse_tasks(arguments: Sequence[str], notes: datasets.Dataset) -> list[ProbeTask]:
    """`label:kind` for a column of the notes, `label:kind:table` for a table of its own."""
    tasks = []
    for argument in arguments:
        label, kind, table = (*argument.split(":", 2), "")[:3]
        if not table:
            tasks.append(ProbeTask(label, notes, label, cast(Kind, kind)))
            continue
        data = read_table(table)
        patient = next((name for name in ("patient_id", "subject_id") if name in data.column_names), None)
        tasks.append(ProbeTask(f"{Path(table).stem} {label}", data, label, cast(Kind, kind), patient=patient))
    names = [task.name for task in tasks]
    # One column may be both predicted and clustered.
    return [task if names.count(task.name) == 1 else replace(task, name=f"{task.name} {task.kind}") for task in tasks]


def parse_similarity(arguments: Sequence[str] | None, test: datasets.Dataset) -> list[SimilarityTask]:
    """Uses by cosine, on the notes of held-out patients; without words a patient's own notes, where any has two."""
    return similarity_tasks(default_similarity(test) if arguments is None else arguments, test)


def read_table(path: str) -> datasets.Dataset:
    """A table of texts and labels, in any format that notes may have; `patient_id` is the column of that name, if any."""

    def layout(names: Sequence[str], meds: bool) -> Layout:
        wanted = [name for name in ("text", "patient_id", "subject_id") if name in names]
        return Layout("a probe's table", {name: name for name in wanted})

    return read_files(Path(path), layout).data


# ------------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Reading:
    """The notes, what is asked of an encoder on them, and the texts that have to be encoded for it.

    Attributes:
        notes: those that geometry is measured on: of held-out patients where a model says whom it was trained on, else all.
        pairs: adjacent ones.
        patients: patient codes (N,).
        probes: linear probes and k-means, if any.
        similarity: uses by cosine, on held-out patients' notes, if any.
        others: texts of other tables, and of patients who were trained on.
        record: of whom the models were trained on.
        train: texts of training patients, for words.
        left_out: notes that were read and are not measured on, because they are too many.
        given: vectors that are there already, by name.
    """

    notes: datasets.Dataset
    pairs: NotePairs
    patients: torch.Tensor
    probes: ProbeEvaluator | None
    similarity: SimilarityEvaluator | None
    others: list[str]
    record: SplitRecord | None
    train: list[str]
    left_out: int
    given: dict[str, Encoded]

    @classmethod
    def of(cls, settings: Settings) -> "Reading":
        """Read everything that the command names, before anything is encoded."""
        record = recorded_split(settings.model)  # first: a model that is not there is said before the notes are read
        every, given = given_vectors(settings) if settings.vectors else (settings.read(), {})
        allow = settings.allow_trained
        notes = sample(every, settings.max_notes, settings.seed)
        left_out = len(every) - len(notes)
        parts, _ = hold_out(notes, seed=settings.seed, record=record, allow_trained=allow, need=("test",))
        options: dict[str, Any] = {"bootstraps": settings.bootstraps, "cache": False, "seed": settings.seed}
        options["allow_trained"] = allow
        tasks = parse_tasks(settings.task, notes)
        shots = SHOTS if settings.shots is None else settings.shots
        probes = ProbeEvaluator(tasks, shots=shots, record=record, **options) if tasks else None
        uses = parse_similarity(settings.similarity, parts["test"])
        similarity = SimilarityEvaluator(uses, **options) if uses else None
        notes = notes if record is None else parts["test"]
        others = other_texts(notes["text"][:], probes, similarity)
        patients = torch.from_numpy(np.unique(np.asarray(notes["patient_id"]), return_inverse=True)[1])
        if given and set(others) - set(every["text"][:]):
            raise ValueError("--vectors are of the notes: tables of their own and column:query need an encoder.")
        train = parts["train"]["text"][:]
        return cls(notes, pairs_if_any(notes), patients, probes, similarity, others, record, train, left_out, given)

    def texts(self) -> list[str]:
        """All that has to be encoded."""
        return [*self.notes["text"], *self.others]

    def results(self, known: Any, words: Any = None) -> Both:
        """Similarity and probes of texts that are encoded."""
        similarity = self.similarity.evaluate(known, words=words) if self.similarity else {}
        return similarity, self.probes.evaluate(known) if self.probes else {}


@dataclass(frozen=True)
class Found:
    """What was found of one encoder; without adjacent notes, what is of these is empty."""

    encoder: Encoder
    known: Encoded
    geometry: dict[str, float]
    spectrum: torch.Tensor
    adjacent: dict[str, float]
    per_patient: dict[str, float]
    angles: tuple[np.ndarray, np.ndarray] | None
    results: Both
    seconds: float


@dataclass(frozen=True)
class FoundWords:
    """What was found of words: their rows, how they were fitted, and similarity and probes."""

    known: WordRows
    fitted: str
    results: Both


def examine_words(encoder: Encoder, reading: Reading) -> FoundWords | None:
    """Fit words on training notes, as far into each as the encoder reads, and measure; None without any such note."""
    if not reading.train or not (reading.similarity or reading.probes):
        return None
    read = None if getattr(encoder.model, "long_notes", "") == "chunk" else encoder.max_length
    words = Words.fit(reading.train, encoder.tokenizer, read)
    known = words.known(reading.texts())
    much = f"the first {read:,} tokens" if read else "all"
    return FoundWords(
        known, f"words: TF-IDF of {much} of {len(reading.train):,} training notes", reading.results(known)
    )


def examine(encoder: Encoder, reading: Reading, words: FoundWords | None, settings: Settings) -> Found:
    """Encode what is asked for, once, and measure."""
    start, texts = time.perf_counter(), list(reading.notes["text"])
    for evaluator in (reading.probes, reading.similarity):
        if evaluator:
            evaluator.refuse_trained(encoder.model)
    how: dict[str, Any] = {
        "tokenizer": encoder.tokenizer,
        "batch_size": settings.batch_size,
        "max_length": encoder.max_length,
        "cache": not settings.no_cache,
        "key": encoder_key(encoder.model, encoder.tokenizer) if encoder.tokenizer else None,
    }
    # Apart, so that another task does not cost another pass over the notes.
    z, cut = embed(encoder.model, texts, return_cut=True, **how)
    rows = torch.from_numpy(z)
    if reading.others:
        z = np.concatenate([z, embed(encoder.model, reading.others, **how)])
    seconds = time.perf_counter() - start
    known = Encoded.of(texts + reading.others, z)
    logger.info("%s: %d texts in %.0f s", encoder.name, len(z), seconds)
    geometry = geometry_report(rows, k=settings.k, seed=settings.seed)
    if encoder.max_length:
        geometry["truncated"] = float(cut.mean())
    adjacent, per_patient, angles = {}, {}, None
    if len(reading.pairs) > 3:
        earlier, later = rows[reading.pairs.earlier], rows[reading.pairs.later]
        groups = torch.from_numpy(reading.pairs.patient)
        adjacent = geometry_report(earlier, later, settings.k, groups, settings.seed)
        per_patient = patient_subspaces(rows, reading.patients, settings.k, seed=settings.seed)
        if adjacent["k"]:
            angles = _angles_with_floor(earlier, later, groups, int(adjacent["k"]), settings.seed)
    return Found(
        encoder,
        known,
        geometry,
        spectrum(rows, center=True),
        adjacent,
        per_patient,
        angles,
        reading.results(known, words.known if words else None),
        seconds,
    )


def _angles_with_floor(z: torch.Tensor, z_next: torch.Tensor, patients: torch.Tensor, k: int, seed: int):
    """Angles between patients' halves, earlier against later, and earlier against earlier: equal row counts.

    Halves are of patients, because a note is the later one of a pair and the earlier one of the next. They are those of
    `geometry_report`, which lowered ``k`` to what each of them supports. Means over the draws.
    """
    found: tuple[list, list] = ([], [])
    for first, second in halves_of(len(z), patients, 4, seed):
        for angles, other in zip(found, (z_next, z), strict=True):
            angles.append(principal_angles(z[first], other[second], k, center=True).numpy())
    return tuple(np.mean(angles, axis=0) for angles in found)


def encoders(settings: Settings, reading: Reading) -> Iterator[Encoder]:
    """One after the other: the models, loaded when their turn comes, then given vectors."""
    names = set(reading.given)
    for argument in settings.model:
        encoder = load_encoder(argument, names, settings.max_length)
        names.add(encoder.name)
        yield encoder
    yield from (Encoder(name, known) for name, known in reading.given.items())


def examine_all(settings: Settings) -> tuple[Reading, dict[str, Found], FoundWords | None]:
    """Read the notes, then encode and measure them with one encoder after the other; what is found stands under its name.

    Words read as far as the first encoder does.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("sentence_transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    check_words(settings)
    reading = Reading.of(settings)
    found: dict[str, Found] = {}
    words: FoundWords | None = None
    for encoder in encoders(settings, reading):
        words = words if found else examine_words(encoder, reading)
        found[encoder.name] = examine(encoder, reading, words, settings)
    return reading, found, words
