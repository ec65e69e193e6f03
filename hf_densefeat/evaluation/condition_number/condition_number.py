"""`evaluate.load` module: condition number of embeddings."""

import datasets
import evaluate
import torch

from hf_densefeat.evaluation import geometry

_DESCRIPTION = """
Largest over smallest attainable covariance eigenvalue of N embeddings;
the smallest is floored relative to the largest.
"""

_INPUTS = """
Args:
    embeddings: N rows of d numbers.
    center (bool): remove the mean row first. Default False.
    floor (float): smallest eigenvalue that counts, relative to the largest. Default 1e-10.
Returns:
    condition_number (float), floor (float), n (int), d (int).
"""


class ConditionNumber(evaluate.Metric):
    """`hf_densefeat.evaluation.geometry.condition_number` for `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"embeddings": row}),
        )

    def _compute(self, embeddings, center: bool = False, floor: float = geometry.CONDITION_FLOOR) -> dict[str, float]:
        z = torch.as_tensor(embeddings)
        condition = geometry.condition_number(z, center=center, floor=floor)
        return {"condition_number": condition, "floor": floor, "n": len(z), "d": z.shape[1]}
