"""The spectrum of an embedding cloud: eigenvalues, effective rank, condition number, mean cosine.

Every function takes embeddings ``(N, d)`` of any float dtype on any device, computes in float64 without gradient and
returns plain numbers or float64 tensors on the CPU. ``center=False`` is the paper's covariance ``ZᵀZ/N``;
``center=True`` removes the mean row first, so that one shared direction does not hide the rest.
"""

import torch
from torch import Tensor

CONDITION_FLOOR = 1e-10


def checked(z: Tensor) -> Tensor:
    """The embeddings (N, d) without gradient on the CPU; ValueError where they are not (N, d), empty or not finite."""
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"Expected embeddings of shape (N, d) with at least one row but got {tuple(z.shape)}.")
    if not torch.isfinite(z).all():
        bad = int((~torch.isfinite(z)).any(1).nonzero()[0])
        raise ValueError(f"Expected finite embeddings but row {bad} (the first such) holds NaN or infinity.")
    return z.detach().cpu()


def gram_and_mean(z: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """The smaller of ``ZᵀZ/N`` (d, d) and ``ZZᵀ/N`` (N, N), equal in non-zero eigenvalues, and the mean removed."""
    n, d = z.shape
    mean = z.double().mean(0) if center else torch.zeros(d, dtype=torch.float64)
    if n <= d:
        rows = z.double() - mean
        return rows @ rows.T / n, mean
    # In slices, so that a large cohort is never held twice in float64.
    return sum((s := part.double() - mean).T @ s for part in z.split(8192)) / n, mean


def without_rounding(values: Tensor, z: Tensor, center: bool) -> Tensor:
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
    z = checked(z)
    return without_rounding(torch.linalg.eigvalsh(gram_and_mean(z, center)[0]).flip(0), z, center)


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


def condition_of_spectrum(values: Tensor, attainable: int, floor: float) -> tuple[float, float]:
    """Largest eigenvalue over the smallest of the first ``attainable`` ones, floored, and over their median."""
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
    return condition_of_spectrum(spectrum(z, center), min(n - int(center), d), floor)[0]


@torch.no_grad()
def mean_cosine(z: Tensor) -> float:
    """Mean cosine over all pairs of different rows: ``(‖Σ_i u_i‖² - n)/(n(n - 1))``, ``u_i = z_i/‖z_i‖``.

    The expectation over a random pair, without drawing any. Range ``[-1/(n - 1), 1]``; near 0 is spread, near 1 is one
    shared direction. Zero rows have no direction and are left out; with fewer than two others the result is 1.0.
    """
    z = checked(z).double()
    norm = z.norm(dim=1)
    units = z[norm > 0] / norm[norm > 0, None]
    n = len(units)
    return float((units.sum(0).square().sum() - n) / (n * (n - 1))) if n > 1 else 1.0
