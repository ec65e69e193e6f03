"""What a frozen encoder's metric is good for: neighbours, search, a patient's own notes, clusters and few labels.

A linear probe with tuned strength hardly sees an invertible linear map of the features; these uses do. Embeddings are
compared by cosine, as they are or after a map, also from int8 and binary codes and from their first dimensions.
Intervals are the 2.5 and 97.5 percentiles of bootstrap replicates that redraw patients (or queries), the same ones for
every encoder, so that `paired_difference` compares two encoders on the same notes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse

from hf_densefeat.evaluation.evaluator import Evaluator
from hf_densefeat.evaluation.metrics import (
    CODES,
    WITH_WORDS,
    Metric,
    MetricFunction,
    PatientWeights,
    Result,
    estimated,
    rows_of_some_patients,
)
from hf_densefeat.evaluation.ranking import Rows, Scores, coded, cosines, unit_rows
from hf_densefeat.evaluation.similarity_kinds import SIMILARITY, similarity_rows
from hf_densefeat.evaluation.similarity_reading import SimilarityRows, SimilarityTask

logger = logging.getLogger(__name__)

DIVISORS = (1, 2, 4, 8)
ASKED = 10_000  # queries: every one is compared with every document, for every code and encoder


@dataclass(frozen=True, kw_only=True)
class SimilarityResult(Result):
    """What one task found.

    ``metrics`` has ``mrr``, and ``mrr_binary``, ``mrr_d_over_4`` for codes and dimensions; ``rows`` counts ``scored``,
    ``patients``, ``searched`` and what was left out.
    """

    # metric name to one value a row or query, NaN where none is defined; for clusters their codes
    values: dict[str, np.ndarray] = field(repr=False)


def _variants(codes: Sequence[str], divisors: Sequence[int], width: int) -> list[tuple[str, str, int]]:
    """Suffix of the metric names, code and number of dimensions: every code at full width, then fewer dimensions."""
    if not codes or codes[0] not in CODES or any(int(one) < 1 for one in divisors):
        raise ValueError(f"Expected codes among {CODES} and divisors of d from 1 on but got {codes} and {divisors}.")
    whole = [("" if code == "float" else f"_{code}", code, width) for code in codes]
    return whole + [(f"_d_over_{n}", "float", max(1, width // n)) for n in divisors if n != 1]


def similarity_of(
    z: Rows,
    rows: SimilarityRows,
    *,
    queries: Rows | None = None,
    codes: Sequence[str] = CODES,
    divisors: Sequence[int] = DIVISORS,
    words: tuple[csr_matrix, csr_matrix | None] | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    maximum: int = ASKED,
) -> SimilarityResult:
    """One task on embeddings, without a model.

    Args:
        z: embeddings (N, d) of ``rows.texts``; sparse ones (words) are compared as they are, without codes.
        rows: the task, see `similarity_rows`.
        queries: embeddings (Q, d) of ``rows.queries``, where there are any.
        codes: float, int8 and binary codes of the embeddings at length 1; the ranges of int8 are those of ``z``.
        divisors: the first d/2, d/4, … dimensions, as floats.
        words: of `Words`, of the texts and of the queries: kinds that search then also have ``mrr_with_words``, of the
            ranking fused with that by words (see `ranking`).
        bootstraps: replicates over patients or queries; 0 for none.
        seed: seed of k-means, samples and bootstrap; one seed redraws the same patients for every encoder.
        maximum: kinds that search ask so many rows, of whole patients drawn at random; all documents are searched.

    Raises:
        ValueError: for another number of embeddings than of texts or queries, or embeddings that are not finite.
    """
    kind, sparse = SIMILARITY[rows.kind], issparse(z)
    counts = z.shape[0], 0 if queries is None else queries.shape[0]
    if counts != (len(rows.texts), len(rows.queries)):
        raise ValueError(
            f"Expected {len(rows.texts)} embeddings and {len(rows.queries)} of queries but got {counts[0]} and "
            f"{counts[1]}."
        )
    variants, sides = [("", "float", z.shape[1])], [z] if queries is None else [z, queries]
    if not sparse:
        variants = _variants(codes, divisors, z.shape[1])
        sides = [torch.as_tensor(side).detach().float().cpu() for side in sides]
    values, functions = dict[str, np.ndarray](), dict[str, MetricFunction]()
    asked = None
    if kind.search and len(rows.y) > maximum:
        asked = torch.from_numpy(rows_of_some_patients(rows.group, maximum, seed))
    for suffix, code, width in variants:
        units = [unit_rows(side if sparse else side[:, :width]) for side in sides]
        if not sparse:
            # Queries take the documents' ranges: an index is built before anybody asks.
            units = [coded(side, code, units[0]) for side in units]
        scores = cosines(units[-1], units[0], asked=asked)
        searches: dict[str, Scores | None] = {suffix: None}
        if words is not None and kind.search and not suffix:
            searches[WITH_WORDS] = cosines(words[0] if words[1] is None else words[1], words[0])
        for end, beside in searches.items():
            found = kind.values(rows, units[0], scores, beside, seed)
            values |= {name + end: found[name] for name in kind.metrics}
            functions |= {name + end: metric.function for name, metric in kind.metrics.items()}
    metrics, replicates = estimated(functions, rows.y, values, PatientWeights.of(rows.group, bootstraps, seed))
    # Labels alone decide which rows have a value, so the same ones have it for every encoder.
    defined, not_asked = np.isfinite(values[kind.headline]), 0 if asked is None else len(rows.y) - len(asked)
    found_rows = {"scored": int(defined.sum()), "patients": len(np.unique(rows.group[defined]))}
    found_rows |= {"searched": len(rows.texts), "undefined": int((~defined).sum()) - not_asked} | rows.left_out
    return SimilarityResult(
        kind=rows.kind,
        metrics=metrics,
        replicates=replicates,
        values=values,
        rows=found_rows | ({"not_asked": not_asked} if not_asked else {}),
        y=rows.y,
        patient=rows.group,
    )


@dataclass(eq=False, repr=False, kw_only=True)
class SimilarityEvaluator(Evaluator):
    """Similarity of one encoder after another, on `SimilarityTask`s that are read at once, before any encoding.

    Called as ``evaluator(model, tokenizer)`` it gives flat numbers (``disease_mrr``, ``disease_mrr_binary``) for a
    trainer's log and ``metric_for_best_model``; `evaluate` gives intervals and replicates. To choose a model in training
    ``codes=("float",)`` with ``divisors=(1,)`` is enough.

    Raises:
        ValueError: for tasks that cannot be read, see `similarity_rows`.
    """

    head: bool = True  # what `encode` gives, with the model's own head if it has one
    codes: Sequence[str] = CODES  # see `similarity_of`
    divisors: Sequence[int] = DIVISORS  # see `similarity_of`

    what = "similarity"

    def _read(self, task: SimilarityTask) -> SimilarityRows:
        rows = similarity_rows(task)
        left_out = {reason: count for reason, count in rows.left_out.items() if count}
        if left_out:
            logger.info("Similarity %s: rows apart: %s.", task.name, left_out)
        return rows

    def _metrics(self, kind: str) -> dict[str, Metric]:
        return SIMILARITY[kind].metrics

    def evaluate(
        self, model: Any, tokenizer: Any = None, *, points: bool = False, words: Any = None
    ) -> dict[str, SimilarityResult]:
        """Task name to `SimilarityResult` with bootstrap intervals; embeddings come from the cache where they are there.

        Args:
            model: one of our encoders, a `SentenceTransformer`, or `Words` by themselves.
            tokenizer: passed to ``encode`` where it takes one.
            points: values alone: no intervals, nothing from the disk.
            words: `Words`, for rankings fused with theirs beside the encoder's.
        """
        z, found = self._embedded(model, tokenizer, points, head=self.head), {}
        how: dict[str, Any] = {"codes": self.codes, "divisors": self.divisors}
        how["bootstraps"] = 0 if points else self.bootstraps
        how["seed"] = self.seed
        for name, rows in self.rows.items():
            documents, queries = z[name]
            beside = None
            if words is not None and SIMILARITY[rows.kind].search:
                beside = words.encode(rows.texts), words.encode(rows.queries) if rows.queries else None
            asked = queries if rows.queries else None
            found[name] = similarity_of(documents, rows, queries=asked, words=beside, **how)
        return found
