"""What `pretrain` measures before and after, on patients that it does not train on."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from hf_densefeat.commands.options import RecipeArguments
from hf_densefeat.data.pairs import NotePairs, adjacent_pairs, pair_notes
from hf_densefeat.evaluation.geometry import geometry_report, spectrum
from hf_densefeat.evaluation.probes import ProbeEvaluator
from hf_densefeat.evaluation.similarity import SimilarityEvaluator
from hf_densefeat.evaluation.similarity_tasks import SimilarityTask
from hf_densefeat.evaluation.tasks import Kind, ProbeTask
from hf_densefeat.reporting.comparison import Both, Measured, measured_of
from hf_densefeat.training.arguments import DenseTrainingArguments

SIMILARITY = {  # kind on the command line -> how the task is made of the column
    "query": lambda column: {"kind": "retrieval", "question": column},
    "same": lambda column: {"kind": "retrieval", "label": column},
    "neighbours": lambda column: {"kind": "neighbours", "label": column},
    "clusters": lambda column: {"kind": "clusters", "label": column},
    "few_labels": lambda column: {"kind": "few_labels", "label": column},
}


def similarity_tasks(arguments: Sequence[str], notes: Any) -> list[SimilarityTask]:
    """Tasks of the words `column:kind`, and `same_patient` for a patient's own notes among everybody's.

    * `question:query`: the text of the column is a query for the note of its row;
    * `disease:same`: notes of one value are right for each other;
    * `diagnosis:neighbours`, `diagnosis:clusters`, `diagnosis:few_labels`: see `SimilarityTask`.

    Raises:
        ValueError: for another word, with those that there are.
    """
    tasks = []
    for argument in arguments:
        column, _, kind = argument.rpartition(":")
        if argument == "same_patient":
            tasks.append(SimilarityTask(name="own notes", kind="same_patient", notes=notes))
        elif kind in SIMILARITY and column:
            name = {"query": column, "same": f"same {column}"}.get(kind, f"{column} {kind.replace('_', ' ')}")
            tasks.append(SimilarityTask(name=name, notes=notes, **SIMILARITY[kind](column)))
        else:
            raise ValueError(
                f"Expected --similarity same_patient or column:kind, kind one of {', '.join(SIMILARITY)}, but got "
                f"{argument!r}, as in --similarity diagnosis:neighbours."
            )
    return tasks


def pairs_if_any(notes: Any) -> NotePairs:
    """Adjacent pairs, or none where no patient has two notes: then there is less to measure, and no mistake."""
    patients = len(np.unique(np.asarray(notes["patient_id"])))
    if patients < len(notes):
        return adjacent_pairs(notes)
    none = np.empty(0, dtype=np.int64)
    return NotePairs(none, none, none, len(notes), patients)


class Measurement:
    """Similarity and geometry of held-out patients' notes, and linear probes over all patients', of a frozen encoder."""

    def __init__(self, recipe: RecipeArguments, parts: dict, args: DenseTrainingArguments) -> None:
        held_out = sample(parts["test"], recipe.max_measured_notes // 2, args.seed)
        texts, self.pairs = pair_notes(held_out, args.pairs)
        self.texts, self.k, self.device = list(texts["text"]), args.subspace_dim, args.device
        probed = {name: sample(part, recipe.max_measured_notes // 3, args.seed) for name, part in parts.items()}
        words = [task.split(":") for task in recipe.probe]
        probes = [ProbeTask(label, probed, label, cast(Kind, kind)) for label, kind in words]
        similarity = similarity_tasks(recipe.similarity, held_out)
        self.probes = ProbeEvaluator(probes, seed=args.seed, cache=False) if probes else None
        self.uses = (
            SimilarityEvaluator(similarity, codes=("float",), divisors=(1,), cache=False, seed=args.seed)
            if similarity
            else None
        )
        self.first: Both | None = None

    def __call__(self, name: str, model: Any, tokenizer: Any) -> Measured:
        """Numbers by name: geometry, similarity and probes with intervals, differences to the first call, the spectrum."""
        model.to(self.device)
        z = model.encode(self.texts, tokenizer, show_progress_bar=True)
        z_a, z_b = z[self.pairs.earlier], z[self.pairs.later]
        probes = self.probes.evaluate(model, tokenizer) if self.probes else {}
        uses = self.uses.evaluate(model, tokenizer) if self.uses else {}
        geometry = geometry_report(z_a, z_b, k=self.k, groups=torch.from_numpy(self.pairs.patient))
        found = measured_of(name, geometry, spectrum(z, center=True), (uses, probes), base=self.first)
        self.first = self.first or (uses, probes)
        return found


def sample(notes: Any, maximum: int, seed: int) -> Any:
    """Notes of whole patients, drawn at random, until there are `maximum`."""
    patients, codes = np.unique(np.asarray(notes["patient_id"]), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(patients))
    kept = order[np.cumsum(np.bincount(codes)[order]) <= maximum]
    return notes.select(np.flatnonzero(np.isin(codes, kept if len(kept) else order[:1])))
