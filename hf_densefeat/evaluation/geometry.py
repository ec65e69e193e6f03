"""The shape of an embedding cloud: spectrum, leading subspaces, one report, and the state that it says the encoder is in.

Every function takes embeddings ``(N, d)`` of any float dtype on any device, computes in float64 without gradient and
returns plain numbers or float64 tensors on the CPU. ``center=False`` is the paper's covariance ``ZᵀZ/N``;
``center=True`` removes the mean row first, so that one shared direction does not hide the rest.
"""

import functools
import logging
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CONDITION_FLOOR = 1e-10
State = Literal["collapsed", "healthy", "over-spread"]
# A state is a statement about the centred embeddings of all notes, as they are used.
COLLAPSED_RANK = 0.03
COLLAPSED_DIRECTIONS = 3
COLLAPSED_VARIANCE = 0.10
OVERSPREAD_RANK = 0.60


def _checked(z: Tensor) -> Tensor:
    """The embeddings (N, d) without gradient on the CPU; ValueError where they are not (N, d), empty or not finite."""
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"Expected embeddings of shape (N, d) with at least one row but got {tuple(z.shape)}.")
    if not torch.isfinite(z).all():
        bad = int((~torch.isfinite(z)).any(1).nonzero()[0])
        raise ValueError(f"Expected finite embeddings but row {bad} (the first such) holds NaN or infinity.")
    return z.detach().cpu()


# ---- The spectrum ---------------------------------------------------------------------------------------------------


def _gram_and_mean(z: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """The smaller of ``ZᵀZ/N`` (d, d) and ``ZZᵀ/N`` (N, N), equal in non-zero eigenvalues, and the mean removed."""
    n, d = z.shape
    mean = z.double().mean(0) if center else torch.zeros(d, dtype=torch.float64)
    if n <= d:
        rows = z.double() - mean
        return rows @ rows.T / n, mean
    # In slices, so that a large cohort is never held twice in float64.
    return sum((s := part.double() - mean).T @ s for part in z.split(8192)) / n, mean


def _without_rounding(values: Tensor, z: Tensor, center: bool) -> Tensor:
    """Clamp at zero; all of it becomes zero where centring left only the rounding error of the stored numbers."""
    values = values.clamp_min(0.0)
    if center:
        eps = torch.finfo(torch.float64 if z.dtype == torch.float64 else torch.float32).eps
        if values.sum() <= eps**2 * z.double().square().sum() / len(z):
            return torch.zeros_like(values)
    return values


def spectrum(z: Tensor, *, center: bool = False) -> Tensor:
    """Eigenvalues of the covariance, largest first: ``λ_i = s_i²/N``, shape ``(min(N, d),)``, float64.

    Equals ``scipy.linalg.svdvals(z) ** 2 / len(z)``. ``N`` divides, with and without centring. The absolute accuracy
    is about ``1e-16 · min(N, d) · λ_1``. A centred constant matrix gives exact zeros. ValueError as of `geometry_report`.
    """
    z = _checked(z)
    return _without_rounding(torch.linalg.eigvalsh(_gram_and_mean(z, center)[0]).flip(0), z, center)


def effective_rank_of_spectrum(values: Tensor) -> float:
    """`effective_rank` of eigenvalues (d,), none below 0; 0.0 where all are 0."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def effective_rank(z: Tensor, *, center: bool = False) -> float:
    """Number of directions in use: ``exp(-Σ p_i log p_i)``, ``p_i = λ_i/Σ_j λ_j`` (paper, section 5.2 and A.1).

    Equals ``exp(scipy.stats.entropy(eigenvalues))``. Range ``[1, min(N, d)]``, ``[1, min(N - 1, d)]`` centred, so it
    must be read beside N and never compared across different N. A matrix without any variance (all zero, or constant
    and centred) uses no direction and gives 0.0. (RankMe takes the entropy of the singular values, not of their
    squares: its numbers are larger.)
    """
    return effective_rank_of_spectrum(spectrum(z, center=center))


def _condition_of_spectrum(values: Tensor, attainable: int, floor: float) -> tuple[float, float]:
    """Largest eigenvalue over the smallest of the first ``attainable`` ones, floored, and over their median."""
    top = values[0]
    if attainable < 1 or top == 0:
        return 1 / floor, 1 / floor
    values = values[:attainable].clamp_min(floor * top)
    return float(top / values[-1]), float(top / values.quantile(0.5))


def condition_number(z: Tensor, *, center: bool = False, floor: float = CONDITION_FLOOR) -> float:
    """Largest over smallest attainable covariance eigenvalue: ``λ_1/max(λ_r, floor · λ_1)``, ``r = min(N, d)``.

    ``r = min(N - 1, d)`` centred: eigenvalues that the row count forces to zero do not count. Range ``[1, 1/floor]``.
    The floor of 1e-10 relative to ``λ_1`` is well above what rounding to float32 leaves (1e-14), so 1/floor says
    "singular as far as can be measured"; it is also the value without any variance. Equals
    ``numpy.linalg.cond(z) ** 2`` where that is below 1/floor (paper, Table 1).

    An encoder that ends in a LayerNorm, ``z = g * x + b`` with ``Σ_i x_i = 0``, has one exactly singular direction
    when centred, and is at the floor whatever it learned; compare such encoders by ``condition_resolved`` of
    `geometry_report`.
    """
    n, d = z.shape
    return _condition_of_spectrum(spectrum(z, center=center), min(n - int(center), d), floor)[0]


def mean_cosine(z: Tensor) -> float:
    """Mean cosine over all pairs of different rows: ``(‖Σ_i u_i‖² - n)/(n(n - 1))``, ``u_i = z_i/‖z_i‖``.

    The expectation over a random pair, without drawing any. Range ``[-1/(n - 1), 1]``; near 0 is spread, near 1 is one
    shared direction. Zero rows have no direction and are left out; with fewer than two others the result is 1.0.
    """
    z = _checked(z).double()
    norm = z.norm(dim=1)
    units = z[norm > 0] / norm[norm > 0, None]
    n = len(units)
    return float((units.sum(0).square().sum() - n) / (n * (n - 1))) if n > 1 else 1.0


# ---- Leading subspaces ----------------------------------------------------------------------------------------------


def _basis(z: Tensor, center: bool) -> Tensor:
    """Directions (d, r) of the covariance whose eigenvalues are above rounding, leading first."""
    gram, mean = _gram_and_mean(z, center)
    values, vectors = torch.linalg.eigh(gram)
    values = _without_rounding(values.flip(0), z, center)
    rank = int((values > values[0] * max(z.shape) * torch.finfo(torch.float64).eps).sum())
    vectors = vectors.flip(1)[:, :rank]
    if len(z) <= z.shape[1]:
        # Left vectors of the rows; QR restores the orthonormality that dividing by a small singular value loses.
        vectors = torch.linalg.qr((z.double() - mean).T @ vectors)[0]
    return vectors


def _leading(z: Tensor, k: int, center: bool, name: str) -> Tensor:
    directions = _basis(_checked(z), center)
    if not 1 <= k <= directions.shape[1]:
        raise ValueError(
            f"Expected 1 <= k <= {directions.shape[1]} but got k={k}: {name} of shape {tuple(z.shape)}"
            f"{' after centring' if center else ''} has rank {directions.shape[1]}. Lower k or give more rows."
        )
    return directions[:, :k]


def principal_angles(z_a: Tensor, z_b: Tensor, k: int = 20, *, center: bool = False) -> Tensor:
    """Angles between the leading k-dimensional subspaces, radians in ``[0, π/2]``, smallest first, shape ``(k,)``.

    Equals ``scipy.linalg.subspace_angles(U_a, U_b)`` in reverse order. ValueError as of `subspace_distance`.
    """
    u, v = _leading(z_a, k, center, "z_a"), _leading(z_b, k, center, "z_b")
    overlap = u.T @ v
    cosines = torch.linalg.svdvals(overlap).clamp(0, 1)
    sines = torch.linalg.svdvals(v - u @ overlap).flip(0).clamp(0, 1)
    # Sines are exact for small angles, cosines for large ones; atan2 uses each where it is.
    return torch.atan2(sines, cosines)


def _distance(u: Tensor, v: Tensor) -> float:
    """Squared projector distance of the spans of two orthonormal bases (d, k)."""
    # 2k - 2‖UᵀV‖² cancels near zero; the residual does not.
    return 2 * float((v - u @ (u.T @ v)).square().sum())


def subspace_distance(z_a: Tensor, z_b: Tensor, k: int = 20, *, center: bool = False) -> float:
    """Squared projector distance of the leading subspaces: ``‖P_a - P_b‖_F² = 2k - 2‖U_aᵀU_b‖_F²`` (paper, A.2).

    Range ``[0, 2k]``. Twice the sum of the squared sines of the principal angles. Only the subspaces are compared, so
    the two sides may have different row counts. Where ``λ_k = λ_{k+1}`` the subspace is not unique and the value depends
    on rounding; the noise floor of `geometry_report` says what to expect from sampling alone.

    Raises:
        ValueError: if either side has fewer than ``k`` directions, or the two differ in ``d``.
    """
    if z_a.shape[-1] != z_b.shape[-1]:
        raise ValueError(f"Expected equal widths but got {tuple(z_a.shape)} and {tuple(z_b.shape)}.")
    return _distance(_leading(z_a, k, center, "z_a"), _leading(z_b, k, center, "z_b"))


def halves_of(n: int, groups: Tensor | None = None, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Four draws of disjoint random halves of the rows, as row numbers; whole groups (integer codes, (n,)) go to one side."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.arange(n) if groups is None else torch.unique(torch.as_tensor(groups), return_inverse=True)[1]
    count = int(code.max()) + 1
    halves = []
    for _ in range(4):
        order = torch.randperm(count, generator=generator)
        first = torch.zeros(count, dtype=torch.bool)
        first[order[: count // 2]] = True
        halves.append((first[code].nonzero()[:, 0], (~first[code]).nonzero()[:, 0]))
    return halves


def patient_subspaces(z: Tensor, patients: Tensor, k: int = 20, *, seed: int = 0) -> dict[str, float]:
    """Subspace distance of the earlier and the later half of each patient's notes (paper, Table 2), with its floor.

    Rows must be in time order within a patient. They are cut in the middle; the floor cuts the same rows at random, so
    both compare sets of the same size, each without its mean. The distance and its floor are means over ``patients``, raw
    and normalised as in `geometry_report`. Patients with a half that does not support ``k`` directions (fewer than 2k + 2
    notes, or too few distinct ones) are counted in ``patients_skipped``, not used.
    """
    code = torch.unique(torch.as_tensor(patients), return_inverse=True)[1]
    groups = torch.argsort(code, stable=True).split(torch.bincount(code).tolist())
    pairs = []
    for rows in groups:
        middle, own = len(rows) // 2, z[rows]
        if middle <= k:
            continue
        cuts = [(torch.arange(middle), torch.arange(middle, len(rows))), *halves_of(len(rows), seed=seed)]
        bases = [(_basis(_checked(own[a]), True), _basis(_checked(own[b]), True)) for a, b in cuts]
        if min(side.shape[1] for pair in bases for side in pair) >= k:
            distance, *floors = (_distance(u[:, :k], v[:, :k]) for u, v in bases)
            pairs.append((distance, sum(floors) / len(floors)))
    report: dict[str, float] = {"k": k, "patients": len(pairs), "patients_skipped": len(groups) - len(pairs)}
    if pairs:
        distance, floor = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        report |= {"distance": distance, "noise_floor": floor}
        report |= {"distance_normalized": distance / (2 * k), "noise_floor_normalized": floor / (2 * k)}
    return report


# ---- One report, and the state --------------------------------------------------------------------------------------


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


def _spectral(z: Tensor, center: bool) -> dict[str, float]:
    values = spectrum(z, center=center)
    condition, over_median = _condition_of_spectrum(values, min(len(z) - int(center), z.shape[1]), CONDITION_FLOOR)
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


def _subspaces(sides: list[Tensor], k: int, center: bool, halves: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    def distance(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(_distance(u[:, :k], v[:, :k]) for u, v in pairs) / len(pairs)

    bases = [[(_basis(z[a], center), _basis(z[b], center)) for a, b in halves] for z in sides]
    raw = {"subspace_noise_floor": distance([pair for side in bases for pair in side])}
    if len(sides) == 2:
        # Half a of one side against half b of the other: they share no row, as those of the noise floor.
        crossed = [p for (ua, ub), (va, vb) in zip(*bases, strict=True) for p in ((ua, vb), (ub, va))]
        raw["subspace_distance_half"] = distance(crossed)
        raw["subspace_distance"] = distance([(_basis(sides[0], center), _basis(sides[1], center))])
        raw["subspace_excess"] = raw["subspace_distance_half"] - raw["subspace_noise_floor"]
    return raw | {f"{name}_normalized": value / (2 * k) for name, value in raw.items()}


@functools.lru_cache
def _warn_once(used: int, k: int, n: int, groups: int, d: int) -> None:
    """Warn once of the same notes, not for each encoder."""
    logger.warning(
        "Subspaces are reported at k = %d instead of %d: %d rows in %d groups and %d dimensions support no more in halves.",
        *(used, k, n, groups, d),
    )


def geometry_report(
    z: Tensor, z_next: Tensor | None = None, *, k: int = 20, groups: Tensor | None = None, seed: int = 0
) -> dict[str, float]:
    """All measures in one flat dictionary; names ending in ``_centered`` are with each side's mean removed.

    Always there: ``n``, ``d``, ``attainable_rank = min(N - 1, d)``, ``condition_floor``, ``mean_cosine``; and, plain
    and centred: ``effective_rank``, ``condition_number`` (largest over smallest attainable eigenvalue),
    ``condition_over_median`` (largest over median), ``condition_resolved`` (largest over the smallest above the floor)
    and the number of these, ``resolved_rank``; ``top_eigenvalue_share``, ``total_variance``.

    ``k`` is ``k_requested``, or what the halves support, with a warning; at 0 no distance is given. Distances are raw, in
    ``[0, 2k]``, and ``_normalized``, in ``[0, 1]``: ``subspace_noise_floor``, which sampling alone produces, the mean
    over four random splits of the rows into halves; and with ``z_next`` ``subspace_distance`` at all N rows (small by
    construction in chains of adjacent notes, whose two sides share most rows), ``subspace_distance_half`` between
    disjoint halves of the two sides, which may be compared with the floor since the sampling part falls about as 1/N,
    and their difference ``subspace_excess``.

    Args:
        z: embeddings (N, d).
        z_next: embeddings (N, d) of the notes that follow, row by row.
        k: subspace dimension.
        groups: integer codes (N,), of patients, whose pairs stay in one half, so that halves share no row.
        seed: seed of these splits.

    Raises:
        ValueError: if ``z`` is not (N, d), is not finite, or ``z_next`` has another shape.
    """
    z = _checked(z)
    n, d = z.shape
    if z_next is not None and z_next.shape != z.shape:
        raise ValueError(f"Expected z_next of shape {tuple(z.shape)} like z but got {tuple(z_next.shape)}.")
    sides = [z] if z_next is None else [z, _checked(z_next)]
    halves = halves_of(n, groups, seed=seed)
    parts = [side[rows] for side in sides for pair in halves for rows in pair]
    used = min(k, *(_basis(part, True).shape[1] if len(part) else 0 for part in parts))
    if used < k:
        _warn_once(used, k, n, n if groups is None else len(torch.as_tensor(groups).unique()), d)
    report = {"n": n, "d": d, "attainable_rank": min(n - 1, d), "condition_floor": CONDITION_FLOOR}
    report |= {"mean_cosine": mean_cosine(z), "k": used, "k_requested": k}
    for suffix, center in (("", False), ("_centered", True)):
        found = _spectral(z, center) | (_subspaces(sides, used, center, halves) if used else {})
        report |= {name + suffix: value for name, value in found.items()}
    return report
