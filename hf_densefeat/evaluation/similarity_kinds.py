"""The uses of embeddings by cosine: one entry a kind, with what it reads, gives and is called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans

from hf_densefeat.evaluation.metrics import PROBES, Metric, weighted_mean
from hf_densefeat.evaluation.ranking import LABELS, Scores, few_labels, ranking, same_group, same_label, unit_rows
from hf_densefeat.evaluation.similarity_reading import (
    SimilarityRows,
    SimilarityTask,
    beir,
    labelled,
    own_notes,
    questions,
)

Values = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class SimilarityKind:
    """An entry of `SIMILARITY`; a further kind is a further entry. By default it is of notes with a label."""

    # Rows, embeddings (N, d), their similarity, the words' similarity or None, and a seed to one value a scored row for each
    # metric (or clusters, once for all metrics of them).
    values: Callable[[SimilarityRows, Any, Scores, Scores | None, int], Values]
    metrics: dict[str, Metric]  # by name, the headline first
    # word on the command line to the column that it names, if any, and the task's name
    words: dict[str, tuple[str, str]]
    search: bool = False  # it ranks documents, so that rankings by embeddings and by words can be fused
    needs: str = "notes with a label"  # what a task has to have, in words
    has: Callable[[SimilarityTask], Any] = lambda task: task.notes is not None and task.label
    read: Callable[[SimilarityTask], SimilarityRows] = labelled

    @property
    def headline(self) -> str:
        """The metric by which verdicts count."""
        return next(iter(self.metrics))


def _has_tables(task: SimilarityTask) -> bool:
    return all(table is not None for table in (task.queries, task.documents, task.relevance))


def _neighbours(rows: SimilarityRows, z: Any, scores: Scores, beside: Scores | None, seed: int) -> Values:
    return same_label(scores, rows.y, rows.group, apart=rows.apart, beside=beside)


def _retrieval(rows: SimilarityRows, z: Any, scores: Scores, beside: Scores | None, seed: int) -> Values:
    if not rows.queries:
        return _neighbours(rows, z, scores, beside, seed)
    asked, found = rows.relevant.T
    table = csr_matrix((np.ones(len(asked), dtype=bool), (asked, found)), scores.shape)
    return ranking(scores, lambda some: torch.from_numpy(table[some.numpy()].toarray()), beside=beside)


def _clusters(rows: SimilarityRows, z: Any, scores: Scores, beside: Scores | None, seed: int) -> Values:
    # At length 1 Euclidean k-means compares by cosine, like the other uses.
    found = KMeans(int(rows.y.max()) + 1, n_init=4, random_state=seed).fit_predict(unit_rows(z))
    return dict.fromkeys(SIMILARITY["clusters"].metrics, found)


MRR = Metric(weighted_mean, "MRR", True, "mrr", ("information-retrieval", "Information Retrieval"))
RECALL = Metric(weighted_mean, "recall at 10", True, "recall_at_10")
NEAR, FEW = (("feature-extraction", name) for name in ("Neighbours by cosine", "Few-label classification"))


SIMILARITY: dict[str, SimilarityKind] = {
    # Share of a note's label among its 10 nearest notes of other patients.
    "neighbours": SimilarityKind(
        values=_neighbours,
        metrics={"precision_at_10": Metric(weighted_mean, "precision at 10", True, "precision_at_10", NEAR)},
        words={"neighbours": ("label", "{} neighbours")},
        search=True,
    ),
    # MRR, recall and nDCG of relevant documents: of three tables as BEIR has them, of a question for its own row, or of
    # rows of the same label for each other.
    "retrieval": SimilarityKind(
        values=_retrieval,
        metrics={
            "mrr": MRR,
            "recall_at_10": RECALL,
            "ndcg_at_10": Metric(weighted_mean, "nDCG at 10", True, "ndcg_at_10"),
        },
        words={"query": ("question", "{}"), "same": ("label", "same {}")},
        search=True,
        needs="notes with a label or a question, or the tables queries, documents and relevance",
        has=lambda task: _has_tables(task) or (task.notes is not None and (task.question or task.label)),
        read=lambda task: (beir if _has_tables(task) else questions if task.question else labelled)(task),
    ),
    # A patient's other notes among everybody's, and the next one among those of others. Notes that are copies of another of
    # the patient's are counted, and stay: `load_notes(drop_copies=True)` leaves them out.
    "same_patient": SimilarityKind(
        values=lambda rows, z, scores, beside, seed: same_group(scores, rows.group, rows.following, beside=beside),
        metrics={
            "mrr": MRR,
            "recall_at_10": RECALL,
            "adjacent_mrr": replace(MRR, title="MRR of the next note"),
            "adjacent_recall_at_10": replace(RECALL, title="recall at 10 of the next note"),
        },
        words={"same_patient": ("", "own notes")},
        search=True,
        needs="notes with a group",
        has=lambda task: task.notes is not None and task.group,
        read=own_notes,
    ),
    # NMI and ARI of k-means, k the number of classes.
    "clusters": SimilarityKind(
        values=_clusters,
        metrics={name: PROBES["clustering"][name] for name in ("nmi", "ari")},
        words={"clusters": ("label", "{} clusters")},
    ),
    # Accuracy of the nearest class centroid with 4, 8 and 16 labelled notes of each class.
    "few_labels": SimilarityKind(
        values=lambda rows, z, scores, beside, seed: few_labels(z, rows.y, rows.group, seed=seed),
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
    kind = SIMILARITY.get(task.kind)
    if kind is None or not kind.has(task):
        needs = "; ".join(f"{one.needs} for {name}" for name, one in SIMILARITY.items())
        raise ValueError(
            f"Similarity {task.name!r}: expected a kind among {tuple(SIMILARITY)} with what it needs: {needs}. Got "
            f"kind={task.kind!r}, label={task.label!r}, question={task.question!r}, group={task.group!r}."
        )
    rows = kind.read(task)
    if len(rows.y) == 0:
        raise ValueError(f"Similarity {task.name!r}: nothing is left to score ({rows.left_out}).")
    return rows


def similarity_tasks(words: Sequence[str], notes: Any) -> list[SimilarityTask]:
    """Tasks of the words of a command line: `same_patient`, or `column:kind` such as `diagnosis:neighbours`.

    Raises:
        ValueError: for another word, with those that there are.
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
