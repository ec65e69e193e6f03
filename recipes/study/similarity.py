"""Similarity of one encoder's embeddings: as they are, centred, and after the dense head of the best epsilon."""

from collections.abc import Callable

import numpy as np
from domains import Domain
from torch import Tensor

from hf_densefeat import DenseHead
from hf_densefeat.evaluation.similarity import similarity_of
from hf_densefeat.evaluation.similarity_tasks import similarity_rows

EPSILONS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
BOOTSTRAPS = 1000
SHOWN = {  # metrics that the tables have, by kind
    "neighbours": ("precision_at_10",),
    "retrieval": ("mrr",),
    "same_patient": ("mrr",),
    "clusters": ("nmi",),
    "few_labels": ("accuracy_at_4", "accuracy_at_16"),
}


def maps_of(domain: Domain) -> tuple[str, ...]:
    """How similarity is measured; by the best map where the domain has notes that choose its epsilon."""
    return ("as it is", "centred", "mapped") if domain.label_free else ("as it is", "centred")


class SimilarityMeasures:
    """The tasks of a domain, read once, and what they find in embeddings of its inputs."""

    def __init__(self, domain: Domain):
        self.rows = {task.name: similarity_rows(task) for task in domain.similarity}
        self.maps = maps_of(domain)
        self.label_free = similarity_rows(domain.label_free) if domain.label_free else None
        self.inputs = {text for rows in self.rows.values() for text in (*rows.texts, *rows.queries)}
        if self.label_free:
            self.inputs.update(self.label_free.texts)

    def of(self, encode: Callable[[list[str]], Tensor], train: Tensor) -> dict[str, np.ndarray]:
        """`task: metric, map` to the value and its replicates; `epsilon` to the one that was chosen.

        Args:
            encode: texts → their embeddings (N, d).
            train: embeddings of training notes, on which the maps are fitted.
        """
        epsilon = self.best_epsilon(encode, train)
        maps = {"as it is": None, "centred": DenseHead.fit(train), "mapped": DenseHead.fit(train, epsilon=epsilon)}
        maps = {title: maps[title] for title in self.maps}
        found = {"epsilon": np.array([epsilon])}
        for name, rows in self.rows.items():
            z, queries = encode(rows.texts), encode(rows.queries) if rows.queries else None
            for title, head in maps.items():
                if title != "as it is" and name.startswith("validation "):
                    continue
                whole = title == "as it is" and not name.startswith("validation ")
                codes, divisors = (("float", "binary", "int8"), (1, 4)) if whole else (("float",), (1,))
                options = {"codes": codes, "divisors": divisors, "bootstraps": BOOTSTRAPS}
                result = similarity_of(z, rows, queries=queries, head=head, **options)
                for metric in [one for one in result.metrics if one.startswith(SHOWN[rows.kind])]:
                    values = np.append(result.metrics[metric].value, result.replicates[metric])
                    found[f"{name}: {metric}, {title}"] = values.astype(np.float32)
        return found

    def best_epsilon(self, encode: Callable[[list[str]], Tensor], train: Tensor) -> float:
        """The epsilon after whose map a validation patient's next note ranks highest among everybody's: no label is used."""
        if self.label_free is None:
            return np.inf
        z, options = encode(self.label_free.texts), {"codes": ("float",), "divisors": (1,), "bootstraps": 0}
        scores = {}
        for epsilon in EPSILONS:
            result = similarity_of(z, self.label_free, head=DenseHead.fit(train, epsilon=epsilon), **options)
            scores[epsilon] = result.metrics["adjacent_mrr"].value
        return max(scores, key=scores.get)
