"""Functions of embeddings that use their metric as it is: ranks by cosine, neighbours, few labels, low-precision codes.

Each function gives one value a row or query, NaN where none is defined, so that any weighting of the rows, a bootstrap
over patients above all, is one product. Similarity is the cosine, in float32; a zero vector has cosine 0 with all. Rows
are dense, or sparse (words), which stay sparse: only the cosines of a slice of the queries are held.

Ties: cosines closer than `TIE` (the rounding of float32; equal texts have equal embeddings) count as equal, and equal
documents as if they stood in random order: a position that several documents share holds their mean relevance, and the
rank of the first relevant document is the expected one, ``above + (t + 1)/(r + 1)`` with t tied documents, r relevant.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse
from torch import Tensor
from torch.nn.functional import normalize

TIE = 2.0**-21
NEIGHBOURS = 10
# Reciprocal rank fusion: the constant of Cormack, Clarke and Büttcher (2009), and how much of each ranking is fused.
FUSION, DEPTH = 60, 1000
LABELS = (4, 8, 16)
_CHUNK = 8_000_000

# Of some queries, by their numbers: which documents are relevant (queries, documents), bool.
Mask = Callable[[Tensor], Tensor]
Masks = tuple[Mask, Mask | None]  # of what is relevant, and of what is searched; None for all
Rows = Any  # an array or tensor (N, d), or a SciPy CSR matrix, which has no types


def unit_rows(z: Rows) -> Rows:
    """Rows of length 1, float32 (N, d); zero rows stay zero. A tensor, or of sparse rows a CSR matrix.

    ValueError if ``z`` is not (N, d) or not finite.
    """
    if issparse(z):
        length = np.sqrt(np.asarray(z.multiply(z).sum(1)))
        return z.multiply(1 / np.where(length > 0, length, 1)).astype(np.float32).tocsr()
    z = torch.as_tensor(z).detach().float().cpu()
    if z.ndim != 2:
        raise ValueError(f"Expected embeddings of shape (N, d) but got {tuple(z.shape)}.")
    if not torch.isfinite(z).all():
        raise ValueError("Expected finite embeddings but got NaN or infinity; has the encoder diverged?")
    return normalize(z, eps=torch.finfo(z.dtype).tiny)


def coded(z: Tensor, code: str, reference: Tensor | None = None) -> Tensor:
    """Embeddings (N, d) in low-precision codes, as sentence-transformers' ``quantize_embeddings`` defines them.

    ``binary``: 1 where the value is above 0, else −1; their cosine is ``1 − 2 · Hamming/d``. ``int8``: the range of each
    dimension of ``reference`` (the documents; by default ``z``) in 255 steps, less 128.
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


@dataclass(frozen=True)
class Scores:
    """Cosine of every query with every document, computed for some queries at a time; see `cosines`."""

    queries: Rows  # at length 1, (Q, d)
    documents: Rows  # at length 1, (M, d)
    asked: Tensor | None = None  # numbers of the queries that are asked; None for all
    # a second similarity of the same queries and documents, whose ranking is fused with this one
    beside: "Scores | None" = None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and documents."""
        return self.queries.shape[0], self.documents.shape[0]

    @property
    def sparse(self) -> bool:
        """Documents with a score of 0 are not found at all: they share no word with the query."""
        return issparse(self.documents)

    @cached_property
    def _columns(self) -> Rows:
        return self.documents.T.tocsr() if self.sparse else self.documents.T

    def of(self, rows: Tensor) -> Tensor:
        """Those of some queries, by their numbers, (queries, documents)."""
        some = self.queries[rows.numpy()] @ self._columns
        return torch.from_numpy(some.toarray()) if self.sparse else some


def cosines(queries: Rows, documents: Rows | None = None, *, asked: Tensor | None = None) -> Scores:
    """Cosine of queries (Q, d) with documents (M, d), by default with each other; ValueError for other widths."""
    left = unit_rows(queries)
    right = left if documents is None else unit_rows(documents)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"Expected queries of width {right.shape[1]} but got {left.shape[1]}.")
    return Scores(left, right, asked)


def _reciprocal_ranks(scores: Tensor, sparse: bool) -> Tensor:
    """``1/(60 + rank)`` of the first 1,000 documents, 0 of the others; tied documents have their mean rank."""
    top, index = scores.topk(min(DEPTH, scores.shape[1]), dim=1)
    place = torch.arange(top.shape[1]).expand_as(top)
    begins = torch.ones_like(top, dtype=torch.bool)
    begins[:, 1:] = top[:, :-1] - top[:, 1:] > TIE
    ends = torch.ones_like(begins)
    ends[:, :-1] = begins[:, 1:]
    first = place.where(begins, 0).cummax(1).values
    last = place.where(ends, top.shape[1]).flip(1).cummin(1).values.flip(1)
    share = 1 / (FUSION + 1 + (first + last) / 2)
    return torch.zeros_like(scores).scatter(1, index, share.where(top > (TIE if sparse else -torch.inf), 0.0))


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
    scores: Scores, relevant: Mask, allowed: Mask | None = None, *, k: int = NEIGHBOURS
) -> dict[str, np.ndarray]:
    """Search of the documents for each query, scored by its relevant documents.

    Equals sentence-transformers' `InformationRetrievalEvaluator` where no cosines are tied (it breaks ties by name). With
    scores `beside` others, documents are ordered by ``Σ 1/(60 + rank)`` over both rankings of what is searched: reciprocal
    rank fusion (Cormack, Clarke and Büttcher, 2009) of the first 1,000 of each.

    Returns:
        ``mrr``: reciprocal rank of the first relevant document, of the whole ranking; ``recall_at_k``: share of the
        relevant ones among the first k; ``ndcg_at_k``: with discount 1/log2(1 + position); ``precision_at_k``: of
        the first k documents, or of all where fewer are searched. Each (Q,); NaN without a relevant document and
        for queries that are not asked.
    """
    queries, documents = scores.shape
    names, k = ("mrr", f"recall_at_{k}", f"ndcg_at_{k}", f"precision_at_{k}"), min(k, documents)
    discount = 1 / torch.log2(torch.arange(k) + 2.0)
    # of a ranking with all relevant documents first, by their number
    ideal = torch.cat([torch.zeros(1), discount.cumsum(0)])
    table = torch.full((4, queries), torch.nan, dtype=torch.float64)
    asked = torch.arange(queries) if scores.asked is None else scores.asked
    # A few queries at a time: the whole table of cosines may not fit into memory.
    for rows in asked.split(max(1, _CHUNK // max(1, documents))):
        wanted, searched = relevant(rows), torch.full((len(rows),), documents)
        sides = [scores] if scores.beside is None else [scores, scores.beside]
        found = [side.of(rows) for side in sides]
        if allowed is not None:
            mask = allowed(rows)
            # what is not searched ranks last and is not relevant
            found = [one.masked_fill_(~mask, -torch.inf) for one in found]
            wanted, searched = wanted & mask, mask.sum(1)
        order = found[0]
        if len(sides) == 2:
            ranks = [_reciprocal_ranks(one, side.sparse) for one, side in zip(found, sides, strict=True)]
            order = (ranks[0] + ranks[1]).masked_fill(order.isneginf(), -torch.inf)
        expected, count = _expected_relevance(order, wanted, k), wanted.count_nonzero(1)
        values = [
            1 / _first_rank(order, wanted),
            expected.sum(1) / count,
            (expected * discount).sum(1) / ideal[count.clamp_max(k)],
            expected.sum(1) / searched.clamp(1, k),
        ]
        table[:, rows] = torch.where(count > 0, torch.stack(values), torch.nan).double()
    return dict(zip(names, table.numpy(), strict=True))


def searched(scores: Scores, searches: Mapping[str, Masks]) -> dict[str, np.ndarray]:
    """`ranking` for each of several searches by the prefix of its names."""
    return {f"{prefix}{name}": v for prefix, m in searches.items() for name, v in ranking(scores, *m).items()}


# Masks are partial functions: evaluators, which hold them, are pickled for other processes.
def _equal(left: np.ndarray, right: np.ndarray, rows: Tensor) -> Tensor:
    return torch.as_tensor(left)[rows, None] == torch.as_tensor(right)


def _apart_from(own: Mask, but: Mask | None, rows: Tensor) -> Tensor:
    return ~own(rows) if but is None else ~own(rows) | but(rows)


def same_label(y: np.ndarray, group: np.ndarray, *, apart: bool = True) -> Masks:
    """Of N rows that search each other: relevant is what has the same label; a row never finds itself.

    With ``apart`` it also finds no row of its own group (patient). ``precision_at_k`` is then the share of the label among
    the k nearest neighbours, and a row whose label nobody else has gets NaN.
    """
    own = group if apart else np.arange(len(y))
    return partial(_equal, y, y), partial(_apart_from, partial(_equal, own, own), None)


def same_group(group: np.ndarray, following: np.ndarray) -> dict[str, Masks]:
    """A patient's other notes among everybody's, and as ``adjacent_`` the next note among those of others.

    Of N rows ``group`` has the patient codes and ``following`` the row of the patient's next note, −1 for none.
    """
    every = np.arange(len(group))
    own, follows = partial(_equal, group, group), partial(_equal, following, every)
    return {
        "": (own, partial(_apart_from, partial(_equal, every, every), None)),
        "adjacent_": (follows, partial(_apart_from, own, follows)),
    }


def few_labels(
    z: Rows,
    y: np.ndarray,
    group: np.ndarray,
    *,
    labels: Sequence[int] = LABELS,
    draws: int = 10,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Accuracy of the nearest class centroid, by cosine, with few labelled rows of each class.

    In each draw the classes' rows are shuffled and the first k of each, or half of a smaller class, are the labelled
    ones: samples are nested. Rows of patients without a labelled row are classified; a centroid is the mean of its
    rows at length 1. Classes with one row are left out.

    ``accuracy_at_k`` is the share of the draws in which a row was classified right, (N,); NaN for rows that no draw
    classified. Equally near classes share the credit.
    """
    z, group = unit_rows(z), np.asarray(group)
    codes, sizes = np.unique(y, return_inverse=True, return_counts=True)[1:]
    kept = np.flatnonzero(sizes > 1)
    if len(kept) < 2:
        raise ValueError(f"Few labels need two classes of at least two rows; {len(kept)} of {len(sizes)} have them.")
    column = np.full(len(sizes), -1)
    column[kept] = np.arange(len(kept))
    own = torch.from_numpy(column[codes])
    right, tested = np.zeros((2, len(labels), len(codes)))
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        shuffled = [rng.permutation(np.flatnonzero(codes == c)) for c in kept]
        for i, k in enumerate(labels):
            support = [rows[: min(k, len(rows) // 2)] for rows in shuffled]
            means = [z[rows].mean(0) for rows in support]
            centroids = csr_matrix(np.vstack(means)) if issparse(z) else torch.stack(means)
            scores = cosines(z, centroids).of(torch.arange(len(own)))
            # Classes that are equally near share the credit, as tied documents do.
            near = scores >= scores.amax(1, keepdim=True) - TIE
            credit = near.gather(1, own.clamp_min(0)[:, None])[:, 0] / near.sum(1)
            # A labelled note must not find its own patient.
            asked = ~np.isin(group, group[np.concatenate(support)]) & (column[codes] >= 0)
            right[i] += np.where(asked, credit, 0)
            tested[i] += asked
    shares = np.divide(right, tested, out=np.full_like(right, np.nan), where=tested > 0)
    return {f"accuracy_at_{k}": share for k, share in zip(labels, shares, strict=True)}
