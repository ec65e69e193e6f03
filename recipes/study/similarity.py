"""Similarity of one encoder's embeddings: as they are, and by the content and the form view of its own best choice."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from domains import Domain
from torch import Tensor
from torch.nn.functional import normalize

from hf_densefeat import DenseHead
from hf_densefeat.evaluation.similarity import similarity_of
from hf_densefeat.evaluation.similarity_tasks import similarity_rows
from hf_densefeat.models.head import mean_reciprocal_rank
from hf_densefeat.models.views import PairCovariances, content_head, form_head

EPSILONS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
FORM_EPSILON = 1.0
BOOTSTRAPS = 1000
SHOWN = {  # metrics that the tables have, by kind
    "neighbours": ("precision_at_10",),
    "retrieval": ("mrr",),
    "same_patient": ("mrr",),
    "clusters": ("nmi",),
    "few_labels": ("accuracy_at_4", "accuracy_at_16"),
}
Pairs = tuple[Tensor, Tensor]
Encode = Callable[[Sequence[str]], Tensor]


def maps_of(domain: Domain) -> tuple[str, ...]:
    """How similarity is measured; by the views where the domain has pairs of texts that they are fitted on."""
    return ("as it is", "content view", "form view", "with words") if domain.pairs else ("as it is", "centred")


class Chosen(NamedTuple):
    """A map, the validation score that chose it, and what it is."""

    score: float
    map: Callable[[Tensor], Tensor]
    what: str


class Beside(NamedTuple):
    """The first d columns of embeddings, or with the input embeddings behind them at the same total variance; then a head."""

    width: int
    scale: float | None
    head: DenseHead | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """(N, D) to (N, D'), D at least d."""
        last = z[:, : self.width]
        rows = last if self.scale is None else torch.cat([last, self.scale * z[:, self.width :]], 1)
        return rows if self.head is None else self.head(rows)


def content_view(fitted: dict[str, Pairs], judged: dict[str, Pairs], width: int) -> Chosen:
    """The map that validation notes choose without labels: which pairs, centred or not, epsilon, with the input layer or not.

    The score is the mean over the kinds of pairs (adjacent notes, halves of a note) of the reciprocal rank at which the first
    of a validation pair finds the second among everybody's. The embedding as it is is a candidate.

    Args:
        fitted: kind of pairs -> embeddings (P, D) of both sides, of training notes.
        judged: the same of validation notes.
        width: d of the last layer's embedding; the columns behind it are the input layer's, where there are any.
    """
    plain = Beside(width, None)
    found = [Chosen(_score(plain, judged), plain, "as it is")]
    for layers in [plain, beside] if (beside := _beside(fitted, width)).scale else [plain]:
        for kind, both in fitted.items():
            pairs = PairCovariances.of(*map(layers, both))
            for center, epsilon in product((True, False), EPSILONS):
                one = layers._replace(head=content_head(pairs, epsilon=epsilon, center=center))
                what = f"{'last' if layers is plain else 'both'}, {kind}, {'centred' if center else 'uncentred'}, {epsilon:g}"
                found.append(Chosen(_score(one, judged), one, what))
    return max(found, key=lambda one: one.score)


def form_view(fitted: dict[str, Pairs], width: int) -> Callable[[Tensor], Tensor]:
    """What adjacent notes share, whitened at epsilon 1; of both layers where there are two."""
    layers = _beside(fitted, width)
    pairs = PairCovariances.of(*map(layers, fitted["adjacent"]))
    return layers._replace(head=form_head(pairs, epsilon=FORM_EPSILON))


def _beside(fitted: dict[str, Pairs], width: int) -> Beside:
    variance = [side.var(0, correction=0).sum() for side in torch.cat(fitted["adjacent"]).split(width, dim=1)]
    return Beside(width, math.sqrt(variance[0] / variance[1]) if len(variance) > 1 else None)


def _score(one: Callable[[Tensor], Tensor], judged: dict[str, Pairs]) -> float:
    return float(np.mean([mean_reciprocal_rank(*map(one, both)) for both in judged.values()]))


class SimilarityMeasures:
    """The tasks of a domain, read once, and what they find in embeddings of its inputs."""

    def __init__(self, domain: Domain):
        self.domain, self.maps = domain, maps_of(domain)
        self.rows = {task.name: similarity_rows(task) for task in domain.similarity}
        self.inputs = {text for rows in self.rows.values() for text in (*rows.texts, *rows.queries)}
        self.inputs.update(
            text for part in (domain.pairs, domain.judged) for both in part.values() for side in both for text in side
        )

    def of(
        self, encode: Encode, train: Tensor, width: int | None = None, words: Encode | None = None
    ) -> dict[str, np.ndarray]:
        """`task: metric, map` to the value and its replicates; `view` to what was chosen.

        Args:
            encode: texts -> their embeddings (N, D).
            train: embeddings of training notes, for their mean.
            width: d, see `content_view`; by default D.
            words: texts -> embeddings of their words, whose content view stands beside that of the encoder.
        """
        width, found = width or train.shape[1], {}
        maps: dict[str, Encode] = {"as it is": lambda texts: encode(texts)[:, :width]}
        if self.domain.pairs:
            own = self._content(encode, width)
            found["view"] = np.array([own.what])
            maps["content view"] = lambda texts: own.map(encode(texts))
            form = form_view(self._embedded(encode, self.domain.pairs), width)
            maps["form view"] = lambda texts: form(encode(texts))
            if words:
                other = self._content(words, None)
                both = (maps["content view"], lambda texts: other.map(words(texts)))
                maps["with words"] = lambda texts: torch.cat([normalize(one(texts).double()) for one in both], 1)
        else:
            head = DenseHead.fit(train)
            maps["centred"] = lambda texts: head(encode(texts))
        for name, rows in self.rows.items():
            validation = name.startswith("validation ")
            for title, embed in maps.items():
                if validation and title == "centred":
                    continue
                whole = title == "as it is" and not validation
                codes, divisors = (("float", "binary", "int8"), (1, 4)) if whole else (("float",), (1,))
                options = {"codes": codes, "divisors": divisors, "bootstraps": BOOTSTRAPS}
                queries = embed(rows.queries) if rows.queries else None
                result = similarity_of(embed(rows.texts), rows, queries=queries, **options)
                for metric in [one for one in result.metrics if one.startswith(SHOWN[rows.kind])]:
                    values = np.append(result.metrics[metric].value, result.replicates[metric])
                    found[f"{name}: {metric}, {title}"] = values.astype(np.float32)
        return found

    def _content(self, encode: Encode, width: int | None) -> Chosen:
        fitted, judged = (self._embedded(encode, part) for part in (self.domain.pairs, self.domain.judged))
        return content_view(fitted, judged, width or fitted["adjacent"][0].shape[1])

    def _embedded(self, encode: Encode, part: dict[str, tuple[list[str], list[str]]]) -> dict[str, Pairs]:
        return {kind: (encode(first), encode(second)) for kind, (first, second) in part.items()}
