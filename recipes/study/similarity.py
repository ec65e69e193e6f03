"""Similarity of one encoder's embeddings: as they are, and by the content and form view that its validation notes choose."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from domains import Domain
from torch import Tensor
from torch.nn.functional import normalize

from hf_densefeat import DenseHead
from hf_densefeat.evaluation.similarity import similarity_of, similarity_rows
from hf_densefeat.models.choosing import choose_views

BOOTSTRAPS = 1000
SHOWN = {  # metrics that the tables have, by kind
    "neighbours": ("precision_at_10",),
    "retrieval": ("mrr",),
    "same_patient": ("mrr",),
    "clusters": ("nmi",),
    "few_labels": ("accuracy_at_4", "accuracy_at_16"),
}
Encode = Callable[[Sequence[str]], Tensor]


def maps_of(domain: Domain) -> tuple[str, ...]:
    """How similarity is measured; by the views where the domain has pairs of texts that they are fitted on."""
    return ("as it is", "content view", "form view", "with words") if domain.pairs else ("as it is", "centred")


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
        self,
        encode: Encode,
        train: Tensor,
        width: int | None = None,
        words: Encode | None = None,
        *,
        for_similarity: bool = False,
    ) -> dict[str, np.ndarray]:
        """`task: metric, map` to the value and its replicates; `view` to what was chosen.

        Args:
            encode: texts -> their embeddings (N, D).
            train: embeddings of training notes, for their mean.
            width: d of the embedding, by default D; the columns behind it are the input layer's.
            words: texts -> embeddings of their words, whose content view stands beside that of the encoder.
            for_similarity: the embeddings are made for cosine, as those of words are.
        """
        width, found = width or train.shape[1], {}
        maps: dict[str, Encode] = {"as it is": lambda texts: encode(texts)[:, :width]}
        if self.domain.pairs:
            views, chosen = self._views(encode, width, for_similarity)
            found["view"], maps = np.array([chosen]), maps | views
            if words:
                both = views["content view"], self._views(words, None, True)[0]["content view"]
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

    def _views(self, encode: Encode, width: int | None, for_similarity: bool) -> tuple[dict[str, Encode], str]:
        """The content view, if validation pairs speak for it, and the form view; which content view, in words."""
        train, validation = (
            {kind: (encode(first), encode(second)) for kind, (first, second) in part.items()}
            for part in (self.domain.pairs, self.domain.judged)
        )
        width = width or train["adjacent"][0].shape[1]
        views, (choice, *_) = choose_views(train, validation, width=width, for_similarity=for_similarity)
        heads = {f"{name} view": views.get(name) for name in ("content", "form")}
        return {title: mapped(encode, head, width) for title, head in heads.items()}, str(choice)


def mapped(encode: Encode, head: DenseHead | None, width: int) -> Encode:
    """Texts to embeddings after a head, of as many columns as it was fitted on; None for the first `width` columns."""
    return lambda texts: encode(texts)[:, :width] if head is None else head(encode(texts)[:, : len(head.mean)])
