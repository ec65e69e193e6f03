"""What a frozen encoder's metric is good for: neighbours, search, a patient's own notes, clusters and few labels.

A linear probe with tuned strength hardly sees an invertible linear map of the features; these uses do. Embeddings are
compared by cosine, as they are or after a map, also from int8 and binary codes and from their first dimensions.
Intervals are the 2.5 and 97.5 percentiles of bootstrap replicates that redraw patients (or queries), the same ones for
every encoder, so that `paired_difference` compares two encoders on the same notes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from hf_densefeat.data.splits import refuse_trained
from hf_densefeat.evaluation.embeddings import embed, encoder_key
from hf_densefeat.evaluation.metrics import CODES, METRICS_OF, Estimate, metric_named, patient_weights, replicate
from hf_densefeat.evaluation.ranking import coded, few_labels, ranking, same_group, same_label, unit_rows
from hf_densefeat.evaluation.similarity_tasks import SimilarityKind, SimilarityRows, SimilarityTask, similarity_rows

logger = logging.getLogger(__name__)

DIVISORS = (1, 2, 4, 8)
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SimilarityResult:
    """What one task found.

    Attributes:
        kind: the task's kind.
        metrics: metric name to `Estimate`; ``mrr``, and ``mrr_binary``, ``mrr_d_over_4`` for codes and dimensions.
        replicates: metric name to the bootstrap values (B,), replicate b redrawing the same patients for any encoder.
        values: metric name to one value a row or query, NaN where none is defined; for clusters their codes.
        rows: counts: ``scored``, ``patients``, ``searched`` and what was left out.
        y: label codes or query numbers of the scored rows.
        patient: patient codes of the scored rows.
    """

    kind: SimilarityKind
    metrics: dict[str, Estimate]
    replicates: dict[str, np.ndarray] = field(repr=False)
    values: dict[str, np.ndarray] = field(repr=False)
    rows: dict[str, int]
    y: np.ndarray = field(repr=False)
    patient: np.ndarray = field(repr=False)


def centred_on(z: np.ndarray | Tensor) -> Map:
    """The map that removes the mean of these embeddings (N, d)."""
    mean = torch.as_tensor(z).float().mean(0)
    return lambda rows: rows - mean


def _values(rows: SimilarityRows, z: Tensor, queries: Tensor | None, seed: int) -> dict[str, np.ndarray]:
    """One value a scored row for each metric of the kind; clusters once for all of theirs."""
    if rows.kind == "clusters":
        # At length 1 Euclidean k-means compares by cosine, like the other uses.
        found = KMeans(int(rows.y.max()) + 1, n_init=4, random_state=seed).fit_predict(unit_rows(z).numpy())
        return dict.fromkeys(METRICS_OF["clusters"], found)
    if rows.kind == "few_labels":
        return few_labels(z, rows.y, rows.group, seed=seed)
    if rows.kind == "same_patient":
        return same_group(z, rows.group, rows.following)
    if queries is None:
        return same_label(z, rows.y, rows.group, apart=rows.apart)
    pairs = torch.from_numpy(rows.relevant[np.argsort(rows.relevant[:, 0], kind="stable")])

    def relevant(part: slice) -> Tensor:
        mask = torch.zeros(part.stop - part.start, len(z), dtype=torch.bool)
        ends = torch.searchsorted(pairs[:, 0].contiguous(), torch.tensor([part.start, part.stop]))
        chosen = pairs[ends[0] : ends[1]]
        mask[chosen[:, 0] - part.start, chosen[:, 1]] = True
        return mask

    return ranking(queries, z, relevant)


def _variants(codes: Sequence[str], divisors: Sequence[int], width: int) -> list[tuple[str, str, int]]:
    """Suffix of the metric names, code and number of dimensions: every code at full width, then fewer dimensions."""
    if not codes or codes[0] not in CODES or any(int(one) < 1 for one in divisors):
        raise ValueError(f"Expected codes among {CODES} and divisors of d from 1 on but got {codes} and {divisors}.")
    whole = [("" if code == "float" else f"_{code}", code, width) for code in codes]
    return whole + [(f"_d_over_{n}", "float", max(1, width // n)) for n in divisors if n != 1]


def similarity_of(
    z: np.ndarray | Tensor,
    rows: SimilarityRows,
    *,
    queries: np.ndarray | Tensor | None = None,
    head: Map | str | None = None,
    codes: Sequence[str] = CODES,
    divisors: Sequence[int] = DIVISORS,
    bootstraps: int = 1000,
    seed: int = 0,
) -> SimilarityResult:
    """One task on embeddings, without a model.

    Args:
        z: embeddings (N, d) of ``rows.texts``.
        rows: the task, see `similarity_rows`.
        queries: embeddings (Q, d) of ``rows.queries``, where there are any.
        head: a map of embeddings (a `DenseHead`, `centred_on`), applied first; "centred" removes the mean of ``z``.
        codes: float, int8 and binary codes of the embeddings at length 1; the ranges of int8 are those of ``z``.
        divisors: the first d/2, d/4, … dimensions, as floats.
        bootstraps: replicates over patients or queries; 0 for none.
        seed: seed of k-means, samples and bootstrap; one seed redraws the same patients for every encoder.

    Raises:
        ValueError: for another number of embeddings than of texts or queries, or embeddings that are not finite.
    """
    z = torch.as_tensor(z).detach().float().cpu()
    asked = None if queries is None else torch.as_tensor(queries).detach().float().cpu()
    if len(z) != len(rows.texts) or len(rows.queries) != (0 if asked is None else len(asked)):
        raise ValueError(
            f"Expected {len(rows.texts)} embeddings and {len(rows.queries)} of queries but got {len(z)} and "
            f"{0 if asked is None else len(asked)}."
        )
    mapped = centred_on(z) if head == "centred" else head
    if callable(mapped):
        z, asked = mapped(z), None if asked is None else mapped(asked)
    values: dict[str, np.ndarray] = {}
    for suffix, code, width in _variants(codes, divisors, z.shape[1]):
        documents = unit_rows(z[:, :width])
        sides = [documents] if asked is None else [documents, unit_rows(asked[:, :width])]
        # Queries take the documents' ranges: an index is built before anybody asks.
        made = [coded(side, code, documents) for side in sides]
        found = _values(rows, made[0], made[1] if asked is not None else None, seed)
        values |= {name + suffix: found[name] for name in METRICS_OF[rows.kind]}
    return _result(rows, values, bootstraps, seed)


def _result(rows: SimilarityRows, values: dict[str, np.ndarray], bootstraps: int, seed: int) -> SimilarityResult:
    one, count = np.ones((1, len(rows.y))), len(rows.y)
    weights = patient_weights(rows.group, bootstraps, seed) if bootstraps else np.empty((0, count))
    metrics: dict[str, Estimate] = {}
    drawn: dict[str, np.ndarray] = {}
    for name, output in values.items():
        function = metric_named(name).function
        drawn[name] = replicate(function, rows.y, output, weights)
        metrics[name] = Estimate.of(function(rows.y, output, one)[0], drawn[name])
    # Labels alone decide which rows have a value, so the same ones have it for every encoder.
    defined = np.isfinite(values[METRICS_OF[rows.kind][0]])
    counts = {"scored": int(defined.sum()), "patients": len(np.unique(rows.group[defined]))}
    counts |= {"searched": len(rows.texts), "undefined": int((~defined).sum())} | rows.left_out
    return SimilarityResult(rows.kind, metrics, drawn, values, counts, rows.y, rows.group)


class SimilarityEvaluator:
    """Similarity of one encoder after another, on tasks that are read once.

    Called as ``evaluator(model, tokenizer)`` it gives flat numbers (``disease_mrr``, ``disease_mrr_binary``) for a
    trainer's log and ``metric_for_best_model``; `evaluate` gives intervals and replicates.
    """

    def __init__(
        self,
        tasks: Sequence[SimilarityTask],
        *,
        head: Map | str | bool | None = None,
        codes: Sequence[str] = CODES,
        divisors: Sequence[int] = DIVISORS,
        bootstraps: int = 1000,
        batch_size: int = 32,
        max_length: int | None = None,
        cache: str | Path | bool = True,
        seed: int = 0,
        allow_trained: bool = False,
    ) -> None:
        """Read the tasks' tables; nothing is encoded yet.

        Args:
            tasks: the `SimilarityTask`s; names must differ.
            head: None for the embeddings that the model's ``encode`` gives, with its own head if it has one; False
                without that; "centred" or a map of embeddings in its place.
            codes: see `similarity_of`; ``("float",)`` with ``divisors=(1,)`` is enough to choose a model in training.
            divisors: see `similarity_of`.
            bootstraps: replicates of `evaluate`.
            batch_size: passed to ``encode``.
            max_length: passed to ``encode`` where it takes it.
            cache: disk cache of `evaluate`, see `embed`.
            seed: seed of k-means, samples and bootstrap.
            allow_trained: score notes of patients that the model was trained on, instead of refusing them by their number.

        Raises:
            ValueError: for tasks that cannot be read, see `similarity_rows`; before any encoding.
        """
        names = [task.name for task in tasks]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"Expected at least one task, with different names, but got {names}.")
        self.tasks, self.head, self.bootstraps = list(tasks), head, bootstraps
        self.codes, self.divisors = tuple(codes), tuple(divisors)
        self.batch_size, self.max_length, self.cache, self.seed = batch_size, max_length, cache, seed
        self.allow_trained = allow_trained
        self.rows = {task.name: similarity_rows(task) for task in tasks}
        self._say_left_out()

    def _say_left_out(self) -> None:
        for name, rows in self.rows.items():
            left_out = {reason: count for reason, count in rows.left_out.items() if count}
            if left_out:
                logger.info("Similarity %s: rows apart: %s.", name, left_out)

    def refuse_trained(self, model: Any) -> None:
        """ValueError, with their number, for scored patients that the model was trained on, unless that is allowed."""
        for name, rows in self.rows.items() if not self.allow_trained else ():
            refuse_trained(rows.tested, model, f"Similarity {name!r}")

    def _results(
        self, model: Any, tokenizer: Any, cache: str | Path | bool, bootstraps: int
    ) -> dict[str, SimilarityResult]:
        self.refuse_trained(model)
        # All texts in one call, so that a text of several tasks is encoded once.
        parts = [part for rows in self.rows.values() for part in (rows.texts, rows.queries)]
        key = encoder_key(model, tokenizer) if cache else None
        texts = [text for part in parts for text in part]
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "cache": cache,
            "key": key,
        }
        z = embed(model, texts, tokenizer, head=self.head is None, **options)
        cut = iter(np.split(z, np.cumsum([len(part) for part in parts])[:-1]))
        found = {}
        for name, rows in self.rows.items():
            documents, queries = next(cut), next(cut)
            found[name] = similarity_of(
                documents,
                rows,
                queries=queries if rows.queries else None,
                head=None if isinstance(self.head, bool) else self.head,
                codes=self.codes,
                divisors=self.divisors,
                bootstraps=bootstraps,
                seed=self.seed,
            )
        return found

    def __call__(
        self, model: Any, tokenizer: Any = None, epoch: int = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Point values, ``{task}_{metric}``, and ``similarity_seconds``.

        Every rank encodes every text in the same order and nothing is read from disk, so that ranks stay in step where
        a forward is a collective (FSDP); the numbers are the same on all ranks. sentence-transformers may call it, as
        `evaluator(model, output_path, epoch, steps)`: these are without effect.
        """
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        for task, result in self._results(model, tokenizer, False, 0).items():
            metrics |= {f"{task}_{name}": found.value for name, found in result.metrics.items()}
        return metrics | {"similarity_seconds": time.perf_counter() - start}

    def evaluate(self, model: Any, tokenizer: Any = None) -> dict[str, SimilarityResult]:
        """Task name to `SimilarityResult` with bootstrap intervals; embeddings come from the cache where they are there."""
        return self._results(model, tokenizer, self.cache, self.bootstraps)
