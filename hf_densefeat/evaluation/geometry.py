"""The shape of an embedding cloud: effective rank, condition number, subspace distance with its noise floor, spectrum.

Every function takes embeddings ``(N, d)`` of any float dtype on any device, computes in float64 without gradient and
returns plain numbers or float64 tensors on the CPU. ``center=False`` is the paper's covariance ``ZᵀZ/N``;
``center=True`` removes the mean row first, so that one shared direction does not hide the rest.
"""

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CONDITION_FLOOR = 1e-10


def _checked(z: Tensor) -> Tensor:
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"Expected embeddings of shape (N, d) with at least one row but got {tuple(z.shape)}.")
    if not torch.isfinite(z).all():
        bad = int((~torch.isfinite(z)).any(1).nonzero()[0])
        raise ValueError(f"Expected finite embeddings but row {bad} (the first such) holds NaN or infinity.")
    return z.detach().cpu()


def _gram(z: Tensor, center: bool) -> tuple[Tensor, Tensor]:
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


@torch.no_grad()
def spectrum(z: Tensor, center: bool = False) -> Tensor:
    """Eigenvalues of the covariance, largest first: ``λ_i = s_i²/N``, shape ``(min(N, d),)``, float64.

    Equals ``scipy.linalg.svdvals(z) ** 2 / len(z)``. ``N`` divides, with and without centring. The absolute accuracy
    is about ``1e-16 · min(N, d) · λ_1``. A centred constant matrix gives exact zeros.

    Raises:
        ValueError: if ``z`` is not (N, d), is empty, or holds NaN or infinity.
    """
    z = _checked(z)
    return _without_rounding(torch.linalg.eigvalsh(_gram(z, center)[0]).flip(0), z, center)


def effective_rank_of_spectrum(values: Tensor) -> float:
    """`effective_rank` of eigenvalues (d,), none below 0; 0.0 where all are 0."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def effective_rank(z: Tensor, center: bool = False) -> float:
    """Number of directions in use: ``exp(-Σ p_i log p_i)``, ``p_i = λ_i/Σ_j λ_j`` (paper, section 5.2 and A.1).

    Equals ``exp(scipy.stats.entropy(eigenvalues))``. Range ``[1, min(N, d)]``, ``[1, min(N - 1, d)]`` centred, so it
    must be read beside N and never compared across different N. A matrix without any variance (all zero, or constant
    and centred) uses no direction and gives 0.0. (RankMe takes the entropy of the singular values, not of their
    squares: its numbers are larger.)
    """
    return effective_rank_of_spectrum(spectrum(z, center))


def _condition(values: Tensor, attainable: int, floor: float) -> tuple[float, float]:
    top = values[0]
    if attainable < 1 or top == 0:
        return 1 / floor, 1 / floor
    values = values[:attainable].clamp_min(floor * top)
    return float(top / values[-1]), float(top / values.quantile(0.5))


def condition_number(z: Tensor, center: bool = False, floor: float = CONDITION_FLOOR) -> float:
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
    return _condition(spectrum(z, center), min(n - int(center), d), floor)[0]


def _basis(z: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Covariance eigenvalues that are above rounding, and their directions (d, r), leading first."""
    z = _checked(z)
    gram, mean = _gram(z, center)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = _without_rounding(values.flip(0), z, center), vectors.flip(1)
    rank = int((values > values[0] * max(z.shape) * torch.finfo(torch.float64).eps).sum())
    if len(z) <= z.shape[1]:
        # Left vectors of the rows; QR restores the orthonormality that dividing by a small singular value loses.
        vectors = torch.linalg.qr((z.double() - mean).T @ vectors[:, :rank])[0]
    return values[:rank], vectors[:, :rank]


def _leading(z: Tensor, k: int, center: bool, name: str) -> Tensor:
    directions = _basis(z, center)[1]
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


def _distance(u: Tensor, v: Tensor) -> float:
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
    distance = _distance(_leading(z_a, k, center, "z_a"), _leading(z_b, k, center, "z_b"))
    return distance / (2 * k) if normalized else distance


def _halves(n: int, groups: Tensor | None, draws: int, seed: int) -> list[tuple[Tensor, Tensor]]:
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
    halves = _halves(len(z), groups, draws, seed)
    return sum(subspace_distance(z[a], z[b], k, center, normalized) for a, b in halves) / draws


@torch.no_grad()
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


def _side(z: Tensor, center: bool) -> dict[str, float]:
    values = spectrum(z, center)
    condition, over_median = _condition(values, min(len(z) - int(center), z.shape[1]), CONDITION_FLOOR)
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
        return _basis(rows, center)[1][:, :k]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    here = [(lead(z[a]), lead(z[b])) for a, b in halves]
    if z_next is None:
        floor = mean([_distance(u, v) for u, v in here])
        return {"subspace_noise_floor": floor, "subspace_noise_floor_normalized": floor / (2 * k)}
    there = [(lead(z_next[a]), lead(z_next[b])) for a, b in halves]
    floor = mean([_distance(u, v) for u, v in here + there])
    # Crosswise, so that these two halves share no row either: same N, same independence as the floor.
    half = mean([_distance(*p) for (ua, ub), (va, vb) in zip(here, there, strict=True) for p in ((ua, vb), (ub, va))])
    full = _distance(lead(z), lead(z_next))
    raw = {
        "subspace_distance": full,
        "subspace_distance_half": half,
        "subspace_noise_floor": floor,
        "subspace_excess": half - floor,
    }
    return raw | {f"{name}_normalized": value / (2 * k) for name, value in raw.items()}


@torch.no_grad()
def geometry_report(
    z: Tensor, z_next: Tensor | None = None, k: int = 20, groups: Tensor | None = None, seed: int = 0
) -> dict[str, float]:
    """Everything above in one flat dictionary; names ending in ``_centered`` are with each side's mean removed.

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
    z = _checked(z)
    n, d = z.shape
    if z_next is not None and z_next.shape != z.shape:
        raise ValueError(f"Expected z_next of shape {tuple(z.shape)} like z but got {tuple(z_next.shape)}.")
    report = {"n": n, "d": d, "attainable_rank": min(n - 1, d), "condition_floor": CONDITION_FLOOR}
    report["mean_cosine"] = mean_cosine(z)
    for suffix, center in (("", False), ("_centered", True)):
        report |= {name + suffix: value for name, value in _side(z, center).items()}

    sides = [z] if z_next is None else [z, _checked(z_next)]
    halves = _halves(n, groups, 4, seed)
    parts = [side[rows] for side in sides for pair in halves for rows in pair]
    supported = min(0 if 0 in part.shape else _basis(part, True)[1].shape[1] for part in parts)
    used = min(k, supported)
    if used < k:
        logger.warning(
            "Subspaces are reported at k = %d instead of %d: %d rows in %d groups and %d dimensions support no more in "
            "halves.",
            used, k, n, n if groups is None else len(torch.as_tensor(groups).unique()), d,
        )  # fmt: skip
    report |= {"k": used, "k_requested": k}
    if used:
        for suffix, center in (("", False), ("_centered", True)):
            distances = _distances(z, None if z_next is None else sides[1], used, center, halves)
            report |= {name + suffix: value for name, value in distances.items()}
    return report


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
        cuts = [(torch.arange(middle), torch.arange(middle, len(rows))), *_halves(len(rows), None, draws, seed)]
        if middle < k + int(center):
            continue
        bases = [(_basis(own[a], center)[1], _basis(own[b], center)[1]) for a, b in cuts]
        if min(basis.shape[1] for pair in bases for basis in pair) < k:
            continue
        distances = [_distance(u[:, :k], v[:, :k]) for u, v in bases]
        pairs.append((distances[0], sum(distances[1:]) / draws))
    report = {"k": k, "patients": len(pairs), "patients_skipped": len(groups) - len(pairs)}
    if pairs:
        distance, floor = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        report |= {"distance": distance, "noise_floor": floor}
        report |= {"distance_normalized": distance / (2 * k), "noise_floor_normalized": floor / (2 * k)}
    return report
