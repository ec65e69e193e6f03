"""What a frozen encoder's metric is good for: neighbours, search, a patient's own notes, clusters and few labels.

A linear probe with tuned strength hardly sees an invertible linear map of the features; these uses do. Embeddings are
compared by cosine, as they are or after a map, also from int8 and binary codes and from their first dimensions.
Intervals are the 2.5 and 97.5 percentiles of bootstrap replicates that redraw patients (or queries), the same ones for
every encoder, so that `paired_difference` compares two encoders on the same notes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.cluster import KMeans

from hf_densefeat.evaluation.evaluator import Evaluator
from hf_densefeat.evaluation.metrics import (
    CODES,
    PROBES,
    WITH_WORDS,
    Metric,
    MetricFunction,
    PatientWeights,
    Result,
    estimated,
    rows_of_some_patients,
    weighted_mean,
)
from hf_densefeat.evaluation.ranking import LABELS, Rows, Scores, coded, cosines, few_labels, searched, unit_rows
from hf_densefeat.evaluation.similarity_reading import (
    SimilarityRows,
    SimilarityTask,
    beir,
    labelled,
    own_notes,
    questions,
)

DIVISORS = (1, 2, 4, 8)
ASKED = 10_000  # queries: every one is compared with every document, for every code and encoder


# ---- The kinds ------------------------------------------------------------------------------------------------------

Values = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class SimilarityKind:
    """An entry of `SIMILARITY`; a further kind is a further entry."""

    metrics: dict[str, Metric]  # by name, the headline first
    # word on the command line to the column that it names, if any, and the task's name
    words: dict[str, tuple[str, str]]
    # Rows, their similarity (with its embeddings at length 1) and a seed to one value a scored row for each metric (or
    # clusters, once for all metrics of them); None for a search, whose values are those of `ranking`.
    values: Callable[[SimilarityRows, Scores, int], Values] | None = None
    # what a task has to have to what reads it then, the first that fits
    readers: dict[str, Callable[[SimilarityTask], SimilarityRows]] = field(
        default_factory=lambda: {"notes label": labelled}
    )

    @property
    def headline(self) -> str:
        """The metric by which verdicts count."""
        return next(iter(self.metrics))

    @property
    def search(self) -> bool:
        """It ranks documents, so that rankings by embeddings and by words can be fused."""
        return self.values is None


def _clusters(rows: SimilarityRows, scores: Scores, seed: int) -> Values:
    # At length 1 Euclidean k-means compares by cosine, like the other uses.
    found = KMeans(int(rows.y.max()) + 1, n_init=4, random_state=seed).fit_predict(scores.documents)
    return dict.fromkeys(SIMILARITY["clusters"].metrics, found)


MRR = Metric(weighted_mean, "MRR", True, "mrr", ("information-retrieval", "Information Retrieval"))
RECALL = Metric(weighted_mean, "recall at 10", True, "recall_at_10")
NEAR, FEW = (("feature-extraction", name) for name in ("Neighbours by cosine", "Few-label classification"))


SIMILARITY: dict[str, SimilarityKind] = {
    # Share of a note's label among its 10 nearest notes of other patients.
    "neighbours": SimilarityKind(
        metrics={"precision_at_10": Metric(weighted_mean, "precision at 10", True, "precision_at_10", NEAR)},
        words={"neighbours": ("label", "{} neighbours")},
    ),
    # MRR, recall and nDCG of relevant documents: of three tables as BEIR has them, of a question for its own row, or of
    # rows of the same label for each other.
    "retrieval": SimilarityKind(
        metrics={
            "mrr": MRR,
            "recall_at_10": RECALL,
            "ndcg_at_10": Metric(weighted_mean, "nDCG at 10", True, "ndcg_at_10"),
        },
        words={"query": ("question", "{}"), "same": ("label", "same {}")},
        readers={"queries documents relevance": beir, "notes question": questions, "notes label": labelled},
    ),
    # A patient's other notes among everybody's, and the next one among those of others. Notes that are copies of another of
    # the patient's are counted, and stay: `load_notes(drop_copies=True)` leaves them out.
    "same_patient": SimilarityKind(
        metrics={
            "mrr": MRR,
            "recall_at_10": RECALL,
            "adjacent_mrr": replace(MRR, title="MRR of the next note"),
            "adjacent_recall_at_10": replace(RECALL, title="recall at 10 of the next note"),
        },
        words={"same_patient": ("", "own notes")},
        readers={"notes group": own_notes},
    ),
    # NMI and ARI of k-means, k the number of classes.
    "clusters": SimilarityKind(
        values=_clusters,
        metrics={name: PROBES["clustering"][name] for name in ("nmi", "ari")},
        words={"clusters": ("label", "{} clusters")},
    ),
    # Accuracy of the nearest class centroid with 4, 8 and 16 labelled notes of each class.
    "few_labels": SimilarityKind(
        values=lambda rows, scores, seed: few_labels(scores.documents, rows.y, rows.group, seed=seed),
        metrics={
            f"accuracy_at_{k}": Metric(weighted_mean, f"accuracy, {k} labels a class", True, "accuracy", FEW)
            for k in LABELS
        },
        words={"few_labels": ("label", "{} few labels")},
    ),
}


def similarity_rows(task: SimilarityTask) -> SimilarityRows:
    """Read a task's tables.

    Raises:
        ValueError: for a kind without what it needs, a missing column, a row without text or patient, one class,
            unknown or repeated ids, or nothing to score.
    """
    readers = SIMILARITY[task.kind].readers if task.kind in SIMILARITY else {}
    given = {name for name, value in vars(task).items() if value is not None}
    read = next((reader for needs, reader in readers.items() if given.issuperset(needs.split())), None)
    if read is None:
        needs = "; ".join(f"{' or '.join(kind.readers)} for {name}" for name, kind in SIMILARITY.items())
        raise ValueError(
            f"Similarity {task.name!r}: expected a kind among {tuple(SIMILARITY)} with what it needs: {needs}. Got "
            f"kind={task.kind!r}, label={task.label!r}, question={task.question!r}, group={task.group!r}."
        )
    rows = read(task)
    if len(rows.y) == 0:
        raise ValueError(f"Similarity {task.name!r}: nothing is left to score ({rows.left_out}).")
    return rows


def similarity_tasks(words: Sequence[str], notes: Any) -> list[SimilarityTask]:
    """Tasks of the words of a command line: `same_patient`, or `column:kind` such as `diagnosis:neighbours`.

    ValueError for another word, with those that there are.
    """
    known = {word: (name, *how) for name, kind in SIMILARITY.items() for word, how in kind.words.items()}
    forms = ", ".join(f"column:{word}" if column else word for word, (_, column, _) in known.items())
    tasks = []
    for given in words:
        column, _, word = given.rpartition(":")
        kind, attribute, title = known.get(word, ("", "", ""))
        if not kind or bool(attribute) != bool(column):
            raise ValueError(
                f"Expected --similarity among {forms}, but got {given!r}, as in --similarity diagnosis:neighbours."
            )
        named: dict[str, Any] = {attribute: column} if attribute else {}
        tasks.append(SimilarityTask(name=title.format(column), kind=kind, notes=notes, **named))
    return tasks


# ---- One task, one encoder after another -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SimilarityResult(Result):
    """What one task found: ``mrr``, and ``mrr_binary``, ``mrr_d_over_4`` for codes and dimensions."""

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
    words: Any = None,
    bootstraps: int = 1000,
    seed: int = 0,
    maximum: int = ASKED,
) -> SimilarityResult:
    """One task on embeddings (N, d) of its texts and (Q, d) of its queries, where there are any, without a model.

    Codes are of the embeddings at length 1, with the int8 ranges of ``z``; sparse embeddings (words) have none. With
    `Words`, kinds that search also have ``mrr_with_words``, of the ranking fused with theirs. These kinds ask ``maximum``
    rows, of whole patients drawn at random, and search all documents. One ``seed`` redraws the same patients for every
    encoder. ValueError for another number of embeddings than of texts or queries, or embeddings that are not finite.
    """
    kind, sides = SIMILARITY[rows.kind], [z] if queries is None else [z, queries]
    counts = z.shape[0], 0 if queries is None else queries.shape[0]
    if counts != (len(rows.texts), len(rows.queries)):
        raise ValueError(
            f"Expected {len(rows.texts)} embeddings and {len(rows.queries)} of queries but got {counts[0]} and "
            f"{counts[1]}."
        )
    values, functions = Values(), dict[str, MetricFunction]()
    asked = None
    if kind.search and len(rows.y) > maximum:
        asked = torch.from_numpy(rows_of_some_patients(rows.group, maximum, seed))
    if issparse(z):
        codes, divisors = ("float",), (1,)
    for suffix, code, width in _variants(codes, divisors, z.shape[1]):
        units = [unit_rows(side[:, :width]) for side in sides]
        # Queries take the documents' ranges: an index is built before anybody asks.
        units = [coded(side, code, units[0]) for side in units]
        searches = {suffix: cosines(units[-1], units[0], asked=asked)}
        if words is not None and kind.search and not suffix:
            known = [words.encode(texts) for texts in (rows.texts, rows.queries) if texts]
            searches[WITH_WORDS] = replace(searches[suffix], beside=cosines(known[-1], known[0]))
        for end, scores in searches.items():
            found = kind.values(rows, scores, seed) if kind.values else searched(scores, rows.searches)
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
        return similarity_rows(task)

    def _metrics(self, kind: str) -> dict[str, Metric]:
        return SIMILARITY[kind].metrics

    def evaluate(
        self, model: Any, tokenizer: Any = None, *, points: bool = False, words: Any = None
    ) -> dict[str, SimilarityResult]:
        """Task name to `SimilarityResult` with bootstrap intervals; embeddings come from the cache where they are there.

        The model is one of our encoders, a `SentenceTransformer`, or `Words`. With `points` there are values alone: no
        intervals, nothing from the disk. With `words`, beside an encoder, there are also rankings fused with theirs.
        """
        how: dict[str, Any] = {"codes": self.codes, "divisors": self.divisors, "words": words, "seed": self.seed}
        how["bootstraps"] = 0 if points else self.bootstraps
        embedded = self._embedded(model, tokenizer, points, head=self.head)
        return {name: similarity_of(z, self.rows[name], queries=q, **how) for name, (z, q) in embedded.items()}
