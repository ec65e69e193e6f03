"""`evaluate.load` module: distance of the leading subspaces of two sets of embeddings."""

import datasets
import evaluate
import torch

from hf_densefeat.evaluation import geometry

_DESCRIPTION = """
Squared projector distance of the leading k-dimensional subspaces of two sets of embeddings,
with its noise floor.
"""

_INPUTS = """
Args:
    embeddings: N rows of d numbers.
    next_embeddings: N rows of d numbers, the notes that follow row by row.
    k (int): subspace dimension. Default 20.
    center (bool): remove each side's mean row first. Default False.
Returns:
    subspace_distance (float, in [0, 2k]), subspace_distance_normalized (over 2k), subspace_distance_half and
    subspace_noise_floor (both between disjoint halves of the rows, so comparable with one another), k (int), n (int).
"""


class SubspaceDistance(evaluate.Metric):
    """`hf_densefeat.evaluation.geometry.subspace_distance` for `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"embeddings": row, "next_embeddings": row}),
        )

    def _compute(self, embeddings, next_embeddings, k: int = 20, center: bool = False) -> dict[str, float]:
        z, z_next = torch.as_tensor(embeddings), torch.as_tensor(next_embeddings)
        report = geometry.geometry_report(z, z_next, k=k)
        if report["k"] < k:
            supported = report["k"]
            raise ValueError(
                f"Halves of {len(z)} rows support k <= {supported} but got k={k}: lower it, or more rows."
            )
        suffix = "_centered" if center else ""
        names = ("distance", "distance_normalized", "distance_half", "noise_floor")
        return {f"subspace_{name}": report[f"subspace_{name}{suffix}"] for name in names} | {"k": k, "n": len(z)}
