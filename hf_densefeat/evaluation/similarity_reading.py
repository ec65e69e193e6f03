"""What a similarity task asks, and its tables read into arrays."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from hf_densefeat.data.columns import shown
from hf_densefeat.data.identity import identities
from hf_densefeat.evaluation.ranking import Masks, same_group, same_label


@dataclass(frozen=True, kw_only=True)
class SimilarityTask:
    """A use of embeddings' own metric, on one table of notes or on tables of queries and documents.

    Attributes:
        name: prefix of the metric names.
        kind: ``neighbours``, ``retrieval``, ``same_patient``, ``clusters`` or ``few_labels``: the entries of `SIMILARITY`
            say what each reads and gives.
        notes: table of notes: `datasets.Dataset`, Arrow table, data frame or dict of columns.
        label: label column. Rows without a label (None, NaN, "") are neither searched nor scored, and are counted.
        question: column of a note's question. Notes without one are searched and not asked for.
        queries: table with an id (``_id``, ``id``, ``query_id``) and a ``text`` (or ``query``) column.
        documents: table with an id (``_id``, ``id``, ``document_id``) and ``text`` (or ``document``), ``title`` optional.
        relevance: table with ``query-id``, ``corpus-id`` and optionally ``score`` (relevant above 0); also ``query_id``
            and ``document_id`` (or ``query``, ``document``, ``relevance``).
        group: patient column, of the notes or of the queries; None where every row is its own patient, as it is where
            the queries have no such column. The bootstrap redraws patients.
        apart: leave a row's own patient out of the search. By default only ``neighbours`` does.
        text: text column of the notes.
        order: time column of the notes (``same_patient``); the order of the rows where the table has none.
    """

    name: str
    kind: str
    notes: Any = None
    label: str | None = None
    question: str | None = None
    queries: Any = None
    documents: Any = None
    relevance: Any = None
    group: str | None = "patient_id"
    apart: bool | None = None
    text: str = "text"
    order: str = "time"


@dataclass(frozen=True, kw_only=True)
class SimilarityRows:
    """A task read into arrays; what `similarity_of` needs beside the embeddings."""

    kind: str
    texts: list[str]  # the notes or documents, (N,)
    queries: list[str] = field(default_factory=list)  # (Q,); none where the notes themselves are the queries
    y: np.ndarray  # label codes of the notes, (N,), or the number of the query, (Q,)
    group: np.ndarray  # patient codes of the scored rows, (N,) or (Q,)
    # ids of these patients; for the comparison with a `SplitRecord`, never written anywhere
    tested: list = field(repr=False)
    searches: dict[str, Masks]  # what is to be found, by the prefix of the metrics' names
    left_out: dict[str, int]  # rows left out, by reason; of `same_patient` also how many are `copied`, and stay


def _columns(table: Any) -> list[str]:
    return list(getattr(table, "column_names", None) or list(table))


def _column(task: SimilarityTask, table: Any, *names: str) -> list:
    """The first of the columns that the table has, as a list of Python values."""
    for name in names:
        if name in _columns(table):
            values = table[name]
            values = values.to_pylist() if hasattr(values, "to_pylist") else values[:]
            return values.tolist() if hasattr(values, "tolist") else list(values)
    raise ValueError(
        f"Similarity {task.name!r}: expected a column {' or '.join(map(repr, names))}; the table has "
        f"{shown(_columns(table))}."
    )


def _present(values: Sequence) -> np.ndarray:
    """Rows that have a value. NaN, which is not equal to itself, is none."""
    return np.array(
        [i for i, one in enumerate(values) if one is not None and one == one and one != ""], dtype=np.int64
    )


def _texts(task: SimilarityTask, values: Sequence, column: str) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"Similarity {task.name!r}: row {row} has no text in column {column!r}.")
    return list(values)


def _patients(task: SimilarityTask, table: Any, kept: np.ndarray, *, required: bool = True) -> dict[str, Any]:
    """``group`` and ``tested`` of some rows; each is its own patient without a column, where none is required."""
    if task.group is None or (not required and task.group not in _columns(table)):
        return {"group": kept, "tested": []}
    ids = identities(_column(task, table, task.group))
    if ids.null_count:
        row = int(ids.is_null().to_numpy().argmax())
        raise ValueError(f"Similarity {task.name!r}: row {row} has nothing in column {task.group!r}.")
    tested, group = np.unique(ids.cast("string").to_numpy()[kept], return_inverse=True)
    return {"group": group, "tested": tested.tolist()}


def _listed(table: csr_matrix, rows: Tensor) -> Tensor:
    return torch.from_numpy(table[rows.numpy()].toarray())


def _paired(pairs: np.ndarray, shape: tuple[int, int]) -> Masks:
    """All documents are searched; relevant are those that are given for a query, (P, 2)."""
    return partial(_listed, csr_matrix((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape)), None


def beir(task: SimilarityTask) -> SimilarityRows:
    """Queries, documents and relevance; queries without a relevant document are left out."""
    ids = [str(one) for one in _column(task, task.queries, "_id", "id", "query_id", "query-id")]
    names = [str(one) for one in _column(task, task.documents, "_id", "id", "document_id", "corpus-id")]
    texts = _texts(task, _column(task, task.documents, "text", "document"), "text")
    if "title" in _columns(task.documents):
        titles = _column(task, task.documents, "title")
        texts = [f"{title or ''} {text}".strip() for title, text in zip(titles, texts, strict=True)]
    asked = _column(task, task.relevance, "query-id", "query_id", "query")
    found = _column(task, task.relevance, "corpus-id", "document_id", "document")
    scored = [name for name in ("score", "relevance") if name in _columns(task.relevance)]
    score = _column(task, task.relevance, scored[0]) if scored else [1] * len(asked)
    query_of, document_of = ({name: i for i, name in enumerate(side)} for side in (ids, names))
    # BEIR lists documents that were judged and found irrelevant, with a score of 0
    pairs = [(str(q), str(d)) for q, d, s in zip(asked, found, score, strict=True) if s > 0]
    unknown = sum(q not in query_of or d not in document_of for q, d in pairs)
    if unknown or len(query_of) < len(ids) or len(document_of) < len(names):
        raise ValueError(
            f"Similarity {task.name!r}: expected different ids and a relevance that names them, but {unknown} of "
            f"{len(pairs)} relevant pairs name an unknown id, {len(ids) - len(query_of)} queries and "
            f"{len(names) - len(document_of)} documents repeat one."
        )
    named = np.array([(query_of[q], document_of[d]) for q, d in pairs], dtype=np.int64).reshape(-1, 2)
    relevant = np.unique(named, axis=0)
    # a query without a relevant document has no rank
    kept = np.unique(relevant[:, 0])
    # From rows of the table to rows of the queries that are asked.
    relevant[:, 0] = np.searchsorted(kept, relevant[:, 0])
    queries = _texts(task, _column(task, task.queries, "text", "query"), "text")
    return SimilarityRows(
        kind=task.kind,
        texts=texts,
        queries=[queries[i] for i in kept],
        y=kept,
        searches={"": _paired(relevant, (len(kept), len(texts)))},
        left_out={"without_relevant": len(ids) - len(kept)},
        **_patients(task, task.queries, kept, required=False),
    )


def questions(task: SimilarityTask) -> SimilarityRows:
    """Notes with a question, each the query for its own row; notes without one are searched and not asked for."""
    texts = _texts(task, _column(task, task.notes, task.text), task.text)
    asked = _column(task, task.notes, task.question or "")
    kept = _present(asked)
    return SimilarityRows(
        kind=task.kind,
        texts=texts,
        queries=[str(asked[i]) for i in kept],
        y=kept,
        searches={"": _paired(np.column_stack([np.arange(len(kept)), kept]), (len(kept), len(texts)))},
        left_out={"without_question": len(texts) - len(kept)},
        **_patients(task, task.notes, kept),
    )


def labelled(task: SimilarityTask) -> SimilarityRows:
    """Notes with a label; those without are left out."""
    texts, labels = _column(task, task.notes, task.text), _column(task, task.notes, task.label or "")
    kept = _present(labels)
    classes, y = np.unique(np.array([str(labels[i]) for i in kept], dtype=object), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"Similarity {task.name!r}: column {task.label!r} has {len(classes)} different values in {len(kept)} "
            "labelled rows, at least two are needed."
        )
    patients = _patients(task, task.notes, kept)
    # for neighbours a patient's own notes would be found for their template, not their label
    apart = task.kind == "neighbours" if task.apart is None else task.apart
    return SimilarityRows(
        kind=task.kind,
        texts=_texts(task, [texts[i] for i in kept], task.text),
        y=y,
        searches={"": same_label(y, patients["group"], apart=apart)},
        left_out={"unlabelled": len(texts) - len(kept)},
        **patients,
    )


def own_notes(task: SimilarityTask) -> SimilarityRows:
    """Notes and their patients; those of patients with one note are searched and have no value."""
    texts = _texts(task, _column(task, task.notes, task.text), task.text)
    every = np.arange(len(texts))
    patients = _patients(task, task.notes, every)
    group = patients["group"]
    times = _column(task, task.notes, task.order) if task.order in _columns(task.notes) else every
    # by patient, within the patient by time, at equal times as in the table
    order = np.lexsort((np.unique(np.asarray(times), return_inverse=True)[1], group))
    following, same = np.full(len(texts), -1), group[order[:-1]] == group[order[1:]]
    following[order[:-1][same]] = order[1:][same]
    # Notes with a text that their patient has again, white space aside, are found without any understanding.
    found = Counter((patient, "".join(text.split())) for patient, text in zip(group.tolist(), texts, strict=True))
    copied = sum(count for count in found.values() if count > 1)
    return SimilarityRows(
        kind=task.kind,
        texts=texts,
        y=every,
        searches=same_group(group, following),
        left_out={"alone": int((np.bincount(group) == 1).sum()), "copied": copied},
        **patients,
    )
