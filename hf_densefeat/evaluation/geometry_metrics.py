"""Geometry for `evaluate.load`: effective_rank, condition_number, subspace_distance, each with the numbers it depends on.

evaluate.load("path/of/geometry_metrics.py", "effective_rank").compute(embeddings=z, center=True)
"""

from typing import Any

import datasets
import evaluate
import torch

from hf_densefeat.evaluation import geometry

_INPUTS = """
embeddings, and for subspace_distance next_embeddings of the notes that follow: N rows of d numbers. Options are those of
hf_densefeat.evaluation.geometry: center; floor of condition_number; k of subspace_distance.
Returns effective_rank, its attainable maximum, n, d; or condition_number, floor, n, d; or subspace_distance (in [0, 2k]),
subspace_distance_normalized (over 2k), subspace_distance_half and subspace_noise_floor (both between disjoint halves of the
rows, so comparable with one another), k, n.
"""


def _rank(z: torch.Tensor, *, center: bool = False) -> dict[str, float]:
    n, d = z.shape
    rank = geometry.effective_rank(z, center=center)
    return {"effective_rank": rank, "n": n, "d": d, "attainable": min(n - int(center), d)}


def _condition(z: torch.Tensor, *, center: bool = False, floor: float = geometry.CONDITION_FLOOR) -> dict[str, float]:
    number = geometry.condition_number(z, center=center, floor=floor)
    return {"condition_number": number, "floor": floor, "n": z.shape[0], "d": z.shape[1]}


def _distance(z: torch.Tensor, z_next: torch.Tensor, *, k: int = 20, center: bool = False) -> dict[str, float]:
    report = geometry.geometry_report(z, z_next, k=k)
    if report["k"] < k:
        raise ValueError(f"Halves of {len(z)} rows support k <= {report['k']} but got k={k}: lower it, or more rows.")
    suffix, names = "_centered" if center else "", ("distance", "distance_normalized", "distance_half", "noise_floor")
    return {f"subspace_{name}": report[f"subspace_{name}{suffix}"] for name in names} | {"k": k, "n": len(z)}


COMPUTED: dict[str, Any] = {"effective_rank": _rank, "condition_number": _condition, "subspace_distance": _distance}


class GeometryMetrics(evaluate.Metric):
    """Functions of `hf_densefeat.evaluation.geometry` for `evaluate`; the configuration names the function."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in COMPUTED:
            raise ValueError(f"Expected a configuration among {sorted(COMPUTED)} but got {self.config_name!r}.")
        sides = ["embeddings", *(["next_embeddings"] if self.config_name == "subspace_distance" else [])]
        return evaluate.MetricInfo(
            description=f"{self.config_name.replace('_', ' ').capitalize()} of N embeddings.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(dict.fromkeys(sides, datasets.Sequence(datasets.Value("float32")))),
        )

    def _compute(self, **given: Any) -> dict[str, float]:
        rows = {name: torch.as_tensor(given.pop(name)) for name in tuple(given) if name.endswith("embeddings")}
        return COMPUTED[self.config_name](*rows.values(), **given)
