"""Functions of embeddings that use their metric as it is: ranks by cosine, neighbours, few labels, low-precision codes.

Each function gives one value a row or query, NaN where none is defined, so that any weighting of the rows, a bootstrap
over patients above all, is one product. Similarity is the cosine, in float32; a zero vector has cosine 0 with all.

Ties: cosines closer than `TIE` (the rounding of float32; equal texts have equal embeddings) count as equal, and equal
documents as if they stood in random order: a position that several documents share holds their mean relevance, and the
rank of the first relevant document is the expected one, ``above + (t + 1)/(r + 1)`` with t tied documents, r relevant.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

TIE = 2.0**-21
NEIGHBOURS = 10
LABELS = (4, 8, 16)
_CHUNK = 8_000_000

# Of a slice of the queries: which documents are relevant (queries, documents), bool.
Mask = Callable[[slice], Tensor]


def unit_rows(z: np.ndarray | Tensor) -> Tensor:
    """Rows of length 1, float32 (N, d); zero rows stay zero.

    Raises:
        ValueError: if ``z`` is not (N, d) or not finite.
    """
    z = torch.as_tensor(z).detach().float().cpu()
    if z.ndim != 2:
        raise ValueError(f"Expected embeddings of shape (N, d) but got {tuple(z.shape)}.")
    if not torch.isfinite(z).all():
        raise ValueError("Expected finite embeddings but got NaN or infinity; has the encoder diverged?")
    norm = z.norm(dim=1, keepdim=True)
    return z / norm.where(norm > 0, torch.ones(()))


def coded(z: Tensor, code: str, reference: Tensor | None = None) -> Tensor:
    """Embeddings (N, d) after a round trip through low-precision codes, as `sentence_transformers` defines them.

    ``binary``: 1 where the value is above 0, else −1; their cosine is ``1 − 2 · Hamming/d``. ``int8``: the range of each
    dimension of ``reference`` (the documents; by default ``z``) in 255 steps, less 128. Equals ``quantize_embeddings``.
    """
    if code == "float":
        return z
    if code == "binary":
        return (z > 0).float() * 2 - 1
    if code != "int8":
        raise ValueError(f"Expected a code among float, int8 and binary but got {code!r}.")
    low, high = torch.aminmax(z if reference is None else reference, dim=0)
    step = (high - low) / 255
    return ((z - low) / step.where(step > 0, torch.ones(()))).floor().clamp(0, 255) - 128


def _expected_relevance(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Mean relevance of the documents that share each of the first k positions, (queries, k)."""
    top, index = scores.topk(k, dim=1)
    hit = relevant.gather(1, index).float()
    # Only the last group of ties can reach beyond the first k positions; the others are whole among them.
    tied = (scores - top[:, -1:]).abs() <= TIE
    share = (tied & relevant).count_nonzero(1) / tied.count_nonzero(1).clamp_min(1)
    same = ((top[:, :, None] - top[:, None, :]).abs() <= TIE).float()
    inside = (same * hit[:, None, :]).sum(2) / same.sum(2).clamp_min(1)
    expected = torch.where(top - top[:, -1:] <= TIE, share[:, None], inside)
    return torch.where(torch.isfinite(top), expected, 0.0)


def _first_rank(scores: Tensor, relevant: Tensor) -> Tensor:
    """Expected rank of the first relevant document, (queries,)."""
    # tied documents stand in random order: the first relevant of m among n is at (n + 1) / (m + 1) on average
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    tied = (scores - best).abs() <= TIE
    above = (scores > best + TIE).count_nonzero(1)
    return above + (tied.count_nonzero(1) + 1) / ((tied & relevant).count_nonzero(1) + 1)


def ranking(
    queries: np.ndarray | Tensor,
    documents: np.ndarray | Tensor,
    relevant: Mask,
    allowed: Mask | None = None,
    k: int = NEIGHBOURS,
) -> dict[str, np.ndarray]:
    """Search of the documents (M, d) by cosine for each query (Q, d), scored by its relevant documents.

    Equals sentence-transformers' `InformationRetrievalEvaluator` where no cosines are tied (it breaks ties by name).

    Args:
        queries: embeddings (Q, d).
        documents: embeddings (M, d).
        relevant: of a slice of the queries, the relevant documents as (queries, M) bool.
        allowed: likewise the documents that are searched; by default all.
        k: cut of precision, recall and nDCG.

    Returns:
        ``mrr``: reciprocal rank of the first relevant document, of the whole ranking; ``recall_at_k``: share of the
        relevant ones among the first k; ``ndcg_at_k``: with discount 1/log2(1 + position); ``precision_at_k``: of
        the first k documents, or of all where fewer are searched. Each (Q,); NaN without a relevant document.
    """
    queries, documents = unit_rows(queries), unit_rows(documents)
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"Expected queries of width {documents.shape[1]} but got {queries.shape[1]}.")
    names, k = ("mrr", f"recall_at_{k}", f"ndcg_at_{k}", f"precision_at_{k}"), min(k, len(documents))
    discount = 1 / torch.log2(torch.arange(k) + 2.0)
    # of a ranking with all relevant documents first, by their number
    ideal = torch.cat([torch.zeros(1), discount.cumsum(0)])
    parts: list[Tensor] = []
    step = max(1, _CHUNK // max(1, len(documents)))
    # In slices of the queries: the whole table of cosines may not fit into memory.
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        scores, wanted = queries[rows] @ documents.T, relevant(rows)
        searched = torch.full((len(scores),), len(documents))
        if allowed is not None:
            mask = allowed(rows)
            # what is not searched ranks last and is not relevant
            scores, wanted, searched = scores.masked_fill(~mask, -torch.inf), wanted & mask, mask.count_nonzero(1)
        expected, count = _expected_relevance(scores, wanted, k), wanted.count_nonzero(1)
        values = torch.stack(
            [
                1 / _first_rank(scores, wanted),
                expected.sum(1) / count,
                (expected * discount).sum(1) / ideal[count.clamp_max(k)],
                expected.sum(1) / searched.clamp(1, k),
            ]
        )
        parts.append(torch.where(count > 0, values, torch.nan))
    found = torch.cat(parts, 1).double().numpy() if parts else np.empty((4, 0))
    return dict(zip(names, found, strict=True))


def _codes(values: Sequence | np.ndarray | Tensor) -> Tensor:
    return torch.from_numpy(np.unique(np.asarray(values), return_inverse=True)[1].reshape(-1))


def _equal(codes: Tensor) -> Mask:
    return lambda rows: codes[rows, None] == codes[None, :]


def _other_row(count: int) -> Mask:
    every = torch.arange(count)
    return lambda rows: every[rows, None] != every[None, :]


def same_label(
    z: np.ndarray | Tensor, y: np.ndarray, group: np.ndarray, k: int = NEIGHBOURS, apart: bool = True
) -> dict[str, np.ndarray]:
    """`ranking` of the rows (N, d) by each other; relevant is what has the same label.

    A row never finds itself, nor, with ``apart``, a row of its own group (patient). A row whose label nobody else has
    gets NaN. ``precision_at_k`` is the share of the label among the k nearest neighbours.
    """
    labels, groups = _codes(y), _codes(group)
    own, itself = _equal(groups), _other_row(len(labels))
    return ranking(z, z, _equal(labels), (lambda rows: ~own(rows)) if apart else itself, k)


def same_group(
    z: np.ndarray | Tensor, group: np.ndarray, following: np.ndarray, k: int = NEIGHBOURS
) -> dict[str, np.ndarray]:
    """A patient's other notes among everybody's, and the note that follows among those of others; no label is used.

    Args:
        z: embeddings (N, d).
        group: patient codes (N,).
        following: the row of the patient's next note, −1 for none, (N,).
        k: cut of the recall.

    Returns:
        ``mrr`` and ``recall_at_k``: all other notes of the patient are relevant; ``adjacent_mrr`` and
        ``adjacent_recall_at_k``: the next one is, and the patient's other notes are not searched. Each (N,).
    """
    own, itself, target = _equal(_codes(group)), _other_row(len(z)), torch.as_tensor(following)
    every = torch.arange(len(z))

    def follows(rows: slice) -> Tensor:
        return target[rows, None] == every[None, :]

    anyone = ranking(z, z, own, itself, k)
    adjacent = ranking(z, z, follows, lambda rows: ~own(rows) | follows(rows), k)
    names = [name for name in anyone if name.startswith(("mrr", "recall"))]
    return {name: anyone[name] for name in names} | {f"adjacent_{name}": adjacent[name] for name in names}


def few_labels(
    z: np.ndarray | Tensor,
    y: np.ndarray,
    group: np.ndarray,
    labels: Sequence[int] = LABELS,
    draws: int = 10,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Accuracy of the nearest class centroid, by cosine, with few labelled rows of each class.

    In each draw the classes' rows are shuffled and the first k of each, or half of a smaller class, are the labelled
    ones: samples are nested. Rows of patients without a labelled row are classified; a centroid is the mean of its
    rows at length 1. Classes with one row are left out.

    Returns:
        ``accuracy_at_k`` for each k: the share of the draws in which a row was classified right, (N,); NaN for rows
        that no draw classified. Equally near classes share the credit.
    """
    z, group = unit_rows(z), np.asarray(group)
    classes, codes, sizes = np.unique(y, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(sizes > 1)
    column = np.full(len(classes), -1)
    column[kept] = np.arange(len(kept))
    own = torch.from_numpy(column[codes])
    if len(kept) < 2:
        raise ValueError(f"Few labels need two classes of at least two rows; {len(kept)} of {len(classes)} have them.")
    right = {k: torch.zeros(len(z), dtype=torch.float64) for k in labels}
    tested = {k: torch.zeros(len(z), dtype=torch.float64) for k in labels}
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        shuffled = [rng.permutation(np.flatnonzero(codes == c)) for c in kept]
        for k in labels:
            support = [rows[: min(k, len(rows) // 2)] for rows in shuffled]
            centroids = unit_rows(torch.stack([z[rows].mean(0) for rows in support]))
            scores = z @ centroids.T
            # Classes that are equally near share the credit, as tied documents do.
            near = scores >= scores.amax(1, keepdim=True) - TIE
            credit = near.gather(1, own.clamp_min(0)[:, None])[:, 0] / near.sum(1)
            # A labelled note must not find its own patient.
            asked = torch.from_numpy(~np.isin(group, group[np.concatenate(support)])) & (own >= 0)
            right[k] += torch.where(asked, credit.double(), 0.0)
            tested[k] += asked
    return {
        f"accuracy_at_{k}": torch.where(tested[k] > 0, right[k] / tested[k].clamp_min(1), torch.nan).numpy()
        for k in labels
    }
