"""`evaluate.load` module: effective rank of embeddings."""

import datasets
import evaluate
import torch

from hf_densefeat.evaluation import geometry

_DESCRIPTION = """
Effective rank exp(-sum p log p) of the covariance eigenvalues of N embeddings; at most min(N, d).
"""

_INPUTS = """
Args:
    embeddings: N rows of d numbers.
    center (bool): remove the mean row first. Default False.
Returns:
    effective_rank (float), n (int), d (int), attainable (int): without N and its maximum the rank means nothing.
"""


class EffectiveRank(evaluate.Metric):
    """`hf_densefeat.evaluation.geometry.effective_rank` for `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"embeddings": row}),
        )

    def _compute(self, embeddings, center: bool = False) -> dict[str, float]:
        z = torch.as_tensor(embeddings)
        rank = geometry.effective_rank(z, center=center)
        n, d = z.shape
        return {"effective_rank": rank, "n": n, "d": d, "attainable": min(n - int(center), d)}
