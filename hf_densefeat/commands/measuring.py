"""What the commands share: models by name, uses and probes by the words of the command line, one encoder's numbers."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from hf_densefeat.data.pairs import NotePairs, adjacent_pairs, pair_notes
from hf_densefeat.data.splits import SplitRecord
from hf_densefeat.evaluation.evaluator import Evaluator
from hf_densefeat.evaluation.geometry import geometry_report, spectrum
from hf_densefeat.evaluation.metrics import rows_of_some_patients
from hf_densefeat.evaluation.probes import ProbeEvaluator
from hf_densefeat.evaluation.similarity import SimilarityEvaluator
from hf_densefeat.evaluation.similarity_kinds import similarity_tasks
from hf_densefeat.evaluation.tasks import Kind, ProbeTask
from hf_densefeat.evaluation.words import NAME as WORDS
from hf_densefeat.evaluation.words import WordRows, Words
from hf_densefeat.reporting.comparison import Both, Measured, measured_of


def quiet() -> None:
    """Warnings alone, and one progress bar: that of encoding."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Inside, what transformers and the Hub say of a missing model becomes a ValueError that names it."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        where = "In the folder" if Path(source).is_dir() else "There is no such folder, and from the Hub"
        raise ValueError(f"the model {source!r} cannot be loaded. {where}: {reason}.") from error


def default_similarity(notes: Any) -> list[str]:
    """What is measured without words: a patient's own notes, where any patient has two."""
    return ["same_patient"] if len(pairs_if_any(notes)) else []


def pairs_if_any(notes: Any) -> NotePairs:
    """Adjacent pairs, or none where no patient has two notes: then there is less to measure, and no mistake."""
    patients = len(np.unique(np.asarray(notes["patient_id"])))
    if patients < len(notes):
        return adjacent_pairs(notes)
    none = np.empty(0, dtype=np.int64)
    return NotePairs(none, none, none, len(notes), patients)


def probes_of(words: Sequence[str], parts: Mapping) -> list[ProbeTask]:
    """Linear probes of the words `label:kind`, on notes by split."""
    return [ProbeTask(label, parts, label, cast(Kind, kind)) for label, kind in (word.split(":") for word in words)]


class Encoded:
    """An encoder that reads each text once, under one map of its embeddings after another.

    Args:
        encode: texts -> embeddings (N, D) below the map.
        head: the map, of the first columns; None for the first `width` columns as they are.
        width: of the embedding.
    """

    def __init__(self, encode: Any, *, width: int, head: Any = None, rows: dict[str, Any] | None = None) -> None:
        self.below, self.width, self.head, self.rows = encode, width, head, {} if rows is None else rows

    @classmethod
    def of(cls, texts: Sequence[str], z: Any) -> "Encoded":
        """Embeddings that are already there."""
        return cls(None, width=z.shape[1], rows=dict(zip(texts, torch.as_tensor(z), strict=True)))

    def under(self, head: Any) -> "Encoded":
        """The same encoder under another map."""
        return Encoded(self.below, width=self.width, head=head, rows=self.rows)

    def encode(self, texts: Sequence[str], tokenizer: Any = None, **_: Any) -> Any:
        """Embeddings (N, d) of the texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        self.rows.update(zip(new, self.below(new), strict=True) if new else ())
        z = torch.stack([self.rows[text] for text in texts])
        return z[:, : self.width] if self.head is None else self.head(z[:, : len(self.head.mean)])


class Measurement:
    """Geometry and similarity of notes, and linear probes, of one frozen encoder after another.

    Args:
        notes: of patients that are held out.
        similarity: uses by cosine of these, as words.
        pairs: how these are paired for the geometry.
        probes: with notes of their own.
        k: subspace dimension.
        seed: of few labels and the bootstrap.
        record: of whom the encoders were trained on, as for `ProbeEvaluator`.
        allow_trained: measure on those too.
        words: gives the words that are measured beside the encoders, once; None for none.
    """

    def __init__(
        self,
        notes: Any,
        *,
        similarity: Sequence[str],
        pairs: Sequence[str] = ("adjacent",),
        probes: Sequence[ProbeTask] = (),
        k: int = 20,
        seed: int = 0,
        record: SplitRecord | None = None,
        allow_trained: bool = False,
        words: Callable[[], Words] | None = None,
    ) -> None:
        texts, self.pairs = (notes, pairs_if_any(notes)) if tuple(pairs) == ("adjacent",) else pair_notes(notes, pairs)
        self.texts, self.k = list(texts["text"]), k
        tasks = similarity_tasks(similarity, notes)
        how: dict[str, Any] = {"cache": False, "seed": seed, "allow_trained": allow_trained}
        self.probes = ProbeEvaluator(probes, record=record, **how) if probes else None
        self.uses = SimilarityEvaluator(tasks, codes=("float",), divisors=(1,), **how) if tasks else None
        self.others = other_texts(self.texts, self.probes, self.uses)
        self.fit_words = words
        self.words: WordRows | None = None
        self.first: Both | None = None
        self.of_words: Both | None = None

    def __call__(self, name: str, model: Any, tokenizer: Any = None) -> Measured:
        """Numbers by name: geometry, similarity and probes with intervals, differences to the first call and to words."""
        for evaluator in (self.probes, self.uses):
            if evaluator:
                evaluator.refuse_trained(model)
        texts = self.texts + self.others
        found = torch.as_tensor(model.encode(texts, tokenizer, show_progress_bar=True))
        z, known = found[: len(self.texts)], Encoded.of(texts, found)
        if self.fit_words and self.words is None:
            self.words = self.fit_words().known(texts)
            self.of_words = self._results(self.words)
        earlier, later = (z[self.pairs.earlier], z[self.pairs.later]) if len(self.pairs) else (z, None)
        groups = torch.from_numpy(self.pairs.patient) if len(self.pairs) else None
        results = self._results(known, self.words)
        geometry = geometry_report(earlier, later, k=self.k, groups=groups)
        base, self.first = self.first, self.first or results
        return measured_of(name, geometry, spectrum(z, center=True), results, base=base, words=self.of_words)

    def _results(self, known: Any, words: WordRows | None = None) -> Both:
        uses = self.uses.evaluate(known, words=words) if self.uses else {}
        return uses, self.probes.evaluate(known) if self.probes else {}

    def beside(self) -> list[Measured]:
        """What words give, compared with the first encoder, for the list of encoders; empty where nothing is asked of them."""
        if self.of_words is None or not any(self.of_words):
            return []
        return [measured_of(WORDS, {}, [], self.of_words, base=self.first)]


def words_of(notes: Any, model: Any, tokenizer: Any) -> Words:
    """The words of training notes, as far into each as the encoder reads."""
    limits = (getattr(model, "max_length", None), getattr(tokenizer, "model_max_length", None))
    read = None if model.long_notes == "chunk" else min((int(one) for one in limits if one), default=None)
    return Words.fit(notes["text"][:], tokenizer, read)


def other_texts(texts: Sequence[str], *evaluators: Evaluator | None) -> list[str]:
    """What these ask of an encoder beside the texts, each once: so that no text is encoded twice."""
    return sorted({text for one in evaluators if one for text in one.texts()} - set(texts))


def sample(notes: Any, maximum: int, seed: int) -> Any:
    """Notes of whole patients, drawn at random, until there are `maximum`."""
    if len(notes) <= maximum:
        return notes
    return notes.select(rows_of_some_patients(np.asarray(notes["patient_id"]), maximum, seed))
