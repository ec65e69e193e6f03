"""The shape of an embedding cloud in one report, and the state that it says the encoder is in.

The measures are in `spectrum` (effective rank, condition number, mean cosine) and `subspaces` (distance, noise floor).
"""

import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from hf_densefeat.evaluation.spectrum import (
    CONDITION_FLOOR,
    checked,
    condition_number,
    condition_of_spectrum,
    effective_rank,
    effective_rank_of_spectrum,
    mean_cosine,
    spectrum,
)
from hf_densefeat.evaluation.subspaces import (
    basis,
    distance_of,
    halves_of,
    patient_subspaces,
    principal_angles,
    subspace_distance,
    subspace_noise_floor,
)

__all__ = [
    "COLLAPSED_DIRECTIONS",
    "COLLAPSED_RANK",
    "COLLAPSED_VARIANCE",
    "CONDITION_FLOOR",
    "OVERSPREAD_RANK",
    "State",
    "condition_number",
    "effective_rank",
    "effective_rank_of_spectrum",
    "geometry_report",
    "geometry_state",
    "mean_cosine",
    "patient_subspaces",
    "principal_angles",
    "spectrum",
    "subspace_distance",
    "subspace_noise_floor",
    "variance_share",
]

logger = logging.getLogger(__name__)

State = Literal["collapsed", "healthy", "over-spread"]
# A state is a statement about the centred embeddings of all notes, as they are used.
COLLAPSED_RANK = 0.03
COLLAPSED_DIRECTIONS = 3
COLLAPSED_VARIANCE = 0.10
OVERSPREAD_RANK = 0.60


def variance_share(report: dict[str, float]) -> float:
    """Share of the embeddings' mean squared length that is variance about their mean, in [0, 1]; 0 for all zeros.

    One minus it is ``‖μ‖²`` over the mean squared length, close to the mean cosine of random notes.
    """
    total = report["total_variance"]
    return report["total_variance_centered"] / total if total > 0 else 0.0


def geometry_state(report: dict[str, float]) -> State:
    """Collapsed, healthy or over-spread, from the geometry of the notes alone (`geometry_report`).

    * collapsed: the centred effective rank is below `COLLAPSED_RANK` of what is attainable, or below
      `COLLAPSED_DIRECTIONS`; or less than `COLLAPSED_VARIANCE` of the squared length is variance, which is a mean cosine
      above about 0.9;
    * over-spread: the centred effective rank is above `OVERSPREAD_RANK` of what is attainable, close to noise;
    * healthy: between.
    """
    attainable = max(report["attainable_rank"], 1)
    rank = report["effective_rank_centered"]
    if rank < max(COLLAPSED_DIRECTIONS, COLLAPSED_RANK * attainable) or variance_share(report) < COLLAPSED_VARIANCE:
        return "collapsed"
    return "over-spread" if rank > OVERSPREAD_RANK * attainable else "healthy"


def _side(z: Tensor, center: bool) -> dict[str, float]:
    values = spectrum(z, center)
    condition, over_median = condition_of_spectrum(values, min(len(z) - int(center), z.shape[1]), CONDITION_FLOOR)
    total = float(values.sum())
    resolved = int((values > CONDITION_FLOOR * values[0]).sum())
    return {
        "effective_rank": effective_rank_of_spectrum(values),
        "condition_number": condition,
        "condition_over_median": over_median,
        "condition_resolved": float(values[0] / values[resolved - 1]) if resolved else 1 / CONDITION_FLOOR,
        "resolved_rank": resolved,
        "top_eigenvalue_share": float(values[0]) / total if total > 0 else 1.0,
        "total_variance": total,
    }


def _distances(z: Tensor, z_next: Tensor | None, k: int, center: bool, halves: list) -> dict[str, float]:
    def lead(rows: Tensor) -> Tensor:
        return basis(rows, center)[1][:, :k]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    here = [(lead(z[a]), lead(z[b])) for a, b in halves]
    if z_next is None:
        floor = mean([distance_of(u, v) for u, v in here])
        return {"subspace_noise_floor": floor, "subspace_noise_floor_normalized": floor / (2 * k)}
    there = [(lead(z_next[a]), lead(z_next[b])) for a, b in halves]
    floor = mean([distance_of(u, v) for u, v in here + there])
    # Crosswise, so that these two halves share no row either: same N, same independence as the floor.
    half = mean(
        [distance_of(*p) for (ua, ub), (va, vb) in zip(here, there, strict=True) for p in ((ua, vb), (ub, va))]
    )
    full = distance_of(lead(z), lead(z_next))
    raw = {
        "subspace_distance": full,
        "subspace_distance_half": half,
        "subspace_noise_floor": floor,
        "subspace_excess": half - floor,
    }
    return raw | {f"{name}_normalized": value / (2 * k) for name, value in raw.items()}


@torch.no_grad()
@functools.lru_cache
def _warn_once(used: int, k: int, n: int, groups: int, d: int) -> None:
    """Say it once of the same notes, not for each encoder."""
    logger.warning(
        "Subspaces are reported at k = %d instead of %d: %d rows in %d groups and %d dimensions support no more in halves.",
        *(used, k, n, groups, d),
    )


def geometry_report(
    z: Tensor, z_next: Tensor | None = None, k: int = 20, groups: Tensor | None = None, seed: int = 0
) -> dict[str, float]:
    """All measures in one flat dictionary; names ending in ``_centered`` are with each side's mean removed.

    Always there: ``n``, ``d``, ``attainable_rank = min(N - 1, d)``, ``condition_floor``, ``mean_cosine``; and, plain
    and centred: ``effective_rank``, ``condition_number`` (largest over smallest attainable eigenvalue),
    ``condition_over_median`` (largest over median), ``condition_resolved`` (largest over the smallest above the floor)
    and the number of these, ``resolved_rank``; ``top_eigenvalue_share``, ``total_variance``.

    With at least two directions also ``k`` and ``subspace_noise_floor`` (see there; raw in ``[0, 2k]`` and
    ``_normalized`` in ``[0, 1]``); and with ``z_next`` ``subspace_distance`` at all N rows, ``subspace_distance_half``
    between disjoint halves of the two sides, which is what may be compared with the floor, and their difference
    ``subspace_excess``. (In chains of adjacent notes the two sides share most of their rows, which makes the distance
    at all N rows small by construction.) ``k_requested`` is the argument: where the halves do not support it, ``k`` is
    lowered for every entry alike and a warning says so. If not even k = 1 is supported, ``k`` is 0 and no distance is
    given.

    Args:
        z: embeddings (N, d).
        z_next: embeddings (N, d) of the notes that follow, row by row.
        k: subspace dimension.
        groups: integer codes (N,), of patients: a patient's pairs stay in one half of the splits, so that halves share
            no row.
        seed: seed of these splits.

    Raises:
        ValueError: if ``z`` is not (N, d), is not finite, or ``z_next`` has another shape.
    """
    z = checked(z)
    n, d = z.shape
    if z_next is not None and z_next.shape != z.shape:
        raise ValueError(f"Expected z_next of shape {tuple(z.shape)} like z but got {tuple(z_next.shape)}.")
    report = {"n": n, "d": d, "attainable_rank": min(n - 1, d), "condition_floor": CONDITION_FLOOR}
    report["mean_cosine"] = mean_cosine(z)
    for suffix, center in (("", False), ("_centered", True)):
        report |= {name + suffix: value for name, value in _side(z, center).items()}

    sides = [z] if z_next is None else [z, checked(z_next)]
    halves = halves_of(n, groups, 4, seed)
    parts = [side[rows] for side in sides for pair in halves for rows in pair]
    supported = min(0 if 0 in part.shape else basis(part, True)[1].shape[1] for part in parts)
    used = min(k, supported)
    if used < k:
        _warn_once(used, k, n, n if groups is None else len(torch.as_tensor(groups).unique()), d)
    report |= {"k": used, "k_requested": k}
    if used:
        for suffix, center in (("", False), ("_centered", True)):
            distances = _distances(z, None if z_next is None else sides[1], used, center, halves)
            report |= {name + suffix: value for name, value in distances.items()}
    return report
