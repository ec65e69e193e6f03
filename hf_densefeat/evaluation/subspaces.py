"""Leading subspaces of embedding clouds: principal angles, projector distance and the distance of sampling alone."""

import torch
from torch import Tensor

from hf_densefeat.evaluation.spectrum import checked, gram_and_mean, without_rounding


def basis(z: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Covariance eigenvalues that are above rounding, and their directions (d, r), leading first."""
    z = checked(z)
    gram, mean = gram_and_mean(z, center)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = without_rounding(values.flip(0), z, center), vectors.flip(1)
    rank = int((values > values[0] * max(z.shape) * torch.finfo(torch.float64).eps).sum())
    if len(z) <= z.shape[1]:
        # Left vectors of the rows; QR restores the orthonormality that dividing by a small singular value loses.
        vectors = torch.linalg.qr((z.double() - mean).T @ vectors[:, :rank])[0]
    return values[:rank], vectors[:, :rank]


def _leading(z: Tensor, k: int, center: bool, name: str) -> Tensor:
    directions = basis(z, center)[1]
    if not 1 <= k <= directions.shape[1]:
        raise ValueError(
            f"Expected 1 <= k <= {directions.shape[1]} but got k={k}: {name} of shape {tuple(z.shape)}"
            f"{' after centring' if center else ''} has rank {directions.shape[1]}. Lower k or give more rows."
        )
    return directions[:, :k]


def _angles(u: Tensor, v: Tensor) -> Tensor:
    overlap = u.T @ v
    cosines = torch.linalg.svdvals(overlap).clamp(0, 1)
    sines = torch.linalg.svdvals(v - u @ overlap).flip(0).clamp(0, 1)
    # Sines are exact for small angles, cosines for large ones; atan2 uses each where it is.
    return torch.atan2(sines, cosines)


@torch.no_grad()
def principal_angles(z_a: Tensor, z_b: Tensor, k: int = 20, center: bool = False) -> Tensor:
    """Angles between the leading k-dimensional subspaces, radians in ``[0, π/2]``, smallest first, shape ``(k,)``.

    Equals ``scipy.linalg.subspace_angles(U_a, U_b)`` in reverse order.

    Raises:
        ValueError: if either side has fewer than ``k`` directions.
    """
    return _angles(_leading(z_a, k, center, "z_a"), _leading(z_b, k, center, "z_b"))


def distance_of(u: Tensor, v: Tensor) -> float:
    """Squared projector distance of the spans of two orthonormal bases (d, k)."""
    # 2k - 2‖UᵀV‖² cancels near zero; the residual does not.
    return 2 * float((v - u @ (u.T @ v)).square().sum())


@torch.no_grad()
def subspace_distance(z_a: Tensor, z_b: Tensor, k: int = 20, center: bool = False, normalized: bool = False) -> float:
    """Squared projector distance of the leading subspaces: ``‖P_a - P_b‖_F² = 2k - 2‖U_aᵀU_b‖_F²`` (paper, A.2).

    Range ``[0, 2k]``; ``normalized`` divides by 2k. Twice the sum of the squared sines of the principal angles. Only
    the subspaces are compared, so the two sides may have different row counts. Where ``λ_k = λ_{k+1}`` the subspace
    is not unique and the value depends on rounding; `subspace_noise_floor` says what to expect from sampling alone.

    Raises:
        ValueError: if either side has fewer than ``k`` directions, or the two differ in ``d``.
    """
    if z_a.shape[-1] != z_b.shape[-1]:
        raise ValueError(f"Expected equal widths but got {tuple(z_a.shape)} and {tuple(z_b.shape)}.")
    distance = distance_of(_leading(z_a, k, center, "z_a"), _leading(z_b, k, center, "z_b"))
    return distance / (2 * k) if normalized else distance


def halves_of(n: int, groups: Tensor | None, draws: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Disjoint random halves of the rows, as row numbers; whole groups go to one side."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.arange(n) if groups is None else torch.unique(torch.as_tensor(groups), return_inverse=True)[1]
    count = int(code.max()) + 1
    halves = []
    for _ in range(draws):
        order = torch.randperm(count, generator=generator)
        first = torch.zeros(count, dtype=torch.bool)
        first[order[: count // 2]] = True
        halves.append((first[code].nonzero()[:, 0], (~first[code]).nonzero()[:, 0]))
    return halves


@torch.no_grad()
def subspace_noise_floor(
    z: Tensor,
    k: int = 20,
    center: bool = False,
    normalized: bool = False,
    groups: Tensor | None = None,
    draws: int = 4,
    seed: int = 0,
) -> float:
    """Subspace distance that sampling alone produces: the mean over ``draws`` random splits of the rows into halves.

    The halves have N/2 rows, and the sampling part of the distance falls about as 1/N, so this is the floor of a
    comparison of two N/2-row sets, about twice that of two N-row sets. Compare it with a distance at N/2 rows, as
    `geometry_report` does (``subspace_distance_half``), not with one at N.

    Args:
        z: embeddings (N, d).
        k: subspace dimension; both halves must support it.
        center: remove each half's mean.
        normalized: divide by 2k.
        groups: integer codes (N,), for example of patients; a group is never split, so that the halves are
            independent.
        draws: number of random splits.
        seed: seed of the splits.

    Raises:
        ValueError: if a half has fewer than ``k`` directions (always with N < 2k).
    """
    halves = halves_of(len(z), groups, draws, seed)
    return sum(subspace_distance(z[a], z[b], k, center, normalized) for a, b in halves) / draws


@torch.no_grad()
def patient_subspaces(
    z: Tensor, patients: Tensor, k: int = 20, center: bool = True, draws: int = 4, seed: int = 0
) -> dict[str, float]:
    """Subspace distance of the earlier and the later half of each patient's notes (paper, Table 2), with its floor.

    Rows must be in time order within a patient. A patient's rows are cut in the middle of time; the floor cuts the
    same rows at random, so both compare sets of the same size. Patients with a half that does not support ``k``
    directions (fewer than 2k notes, or 2k + 2 centred, or too few distinct ones) are counted in
    ``patients_skipped``, not used.

    Returns:
        ``k``, ``patients``, ``patients_skipped`` and, with at least one patient, the means over patients of
        ``distance`` and ``noise_floor`` (raw, ``[0, 2k]``) and ``distance_normalized``, ``noise_floor_normalized``.
    """
    code = torch.unique(torch.as_tensor(patients), return_inverse=True)[1]
    order = torch.argsort(code, stable=True)
    groups = order.split(torch.bincount(code).tolist())
    pairs = []
    for rows in groups:
        middle, own = len(rows) // 2, z[rows]
        cuts = [(torch.arange(middle), torch.arange(middle, len(rows))), *halves_of(len(rows), None, draws, seed)]
        if middle < k + int(center):
            continue
        bases = [(basis(own[a], center)[1], basis(own[b], center)[1]) for a, b in cuts]
        if min(basis.shape[1] for pair in bases for basis in pair) < k:
            continue
        distances = [distance_of(u[:, :k], v[:, :k]) for u, v in bases]
        pairs.append((distances[0], sum(distances[1:]) / draws))
    report: dict[str, float] = {"k": k, "patients": len(pairs), "patients_skipped": len(groups) - len(pairs)}
    if pairs:
        distance, floor = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        report |= {"distance": distance, "noise_floor": floor}
        report |= {"distance_normalized": distance / (2 * k), "noise_floor_normalized": floor / (2 * k)}
    return report
