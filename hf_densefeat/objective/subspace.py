"""Leading eigenspace of a covariance, and the distance of two of them with a gradient that survives closing gaps."""

import functools
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def check_dimension(k: int, d: int) -> None:
    """ValueError for a subspace dimension outside 1..d."""
    if not 1 <= k <= d:
        raise ValueError(f"Expected a subspace dimension k between 1 and d = {d} but got k = {k}.")


@functools.lru_cache
def warn_if_unsupported(k: int, rank: int) -> None:
    """Say once that the rows cannot have k leading directions."""
    if rank < k:
        logger.warning("Subspace dimension reduced from %d to %d, the rank that the rows can have.", k, max(rank, 0))


@dataclass(frozen=True)
class Eigenspace:
    """Leading eigenvectors `basis` (d, m) and eigenvalues `values` (m,), largest first, of a covariance (d, d).

    `rest` stands for each of the d - m eigenvalues that are left out: their mean. It is exact where they are all
    equal, as for the null space of N < d rows.
    """

    basis: Tensor
    values: Tensor
    rest: Tensor

    def leading(self, k: int) -> Tensor:
        """Mask (min(k, m),): the leading k directions that carry variance above rounding."""
        eps = 16 * torch.finfo(self.values.dtype).eps
        return (self.values[:k] > eps * self.values[0]) & (self.values[:k] > 0)

    def top(self, k: int) -> Tensor:
        """The leading k directions (d, min(k, m)), zeros for those without variance."""
        return self.basis[:, :k] * self.leading(k)

    def gap(self, k: int) -> Tensor:
        """lambda_k - lambda_{k+1}, in units of the mean eigenvalue."""
        d, m = self.basis.shape
        below = self.values[k] if k < m else self.rest
        mean = (self.values.sum() + (d - m) * self.rest) / d
        return (self.values[min(k, m) - 1] - below) / mean.clamp(min=torch.finfo(mean.dtype).tiny)


@torch.no_grad()
def eigenspace(covariance: Tensor) -> Eigenspace:
    """All of it, exactly. Equals `np.linalg.eigh`, largest first."""
    values, basis = torch.linalg.eigh(_finite(covariance))
    return Eigenspace(basis.flip(1), values.flip(0).clamp(min=0), values.new_zeros(()))


@torch.no_grad()
def eigenspace_of_rows(z: Tensor) -> Eigenspace:
    """Of Z^T Z / N, by a thin SVD of Z (N, d): the min(N, d) directions that the rows span; the rest is zero."""
    _, singular, basis = torch.linalg.svd(z, full_matrices=False)
    return Eigenspace(basis.mT, singular.square() / len(z), z.new_zeros(()))


@torch.no_grad()
def subspace_iteration(covariance: Tensor, basis: Tensor, iterations: int = 1, *, warm: bool = True) -> Eigenspace:
    """Block power steps from an orthonormal `basis` (d, m), then Rayleigh-Ritz: O(d^2 m) a step, no d x d decomposition.

    Warm-started with the basis of the step before, it tracks a slowly moving covariance (paper 4.5, A.4). A warm start
    filters: with v the smallest Ritz value of `basis`, which is at most lambda_m (Cauchy's interlacing), the steps are
    Sigma - c_j I with c_j the roots of the Chebyshev polynomial of [0, v], which damps all that is left out most (Zhou et
    al., 2006); 2 of them, for 256 new rows of spectrum 1/i a step, leave 1/4 to 1/10 of the squared distance that 2
    plain steps leave. Never differentiated: `subspace_distance_squared` knows the gradient of the projector.
    """
    image = covariance @ basis
    edge = torch.linalg.eigvalsh(_finite(basis.mT @ image))[0].clamp(min=0) if warm else 0.0
    for j in range(iterations):
        root = edge * (1 + math.cos(math.pi * (2 * j + 1) / (2 * iterations))) / 2
        basis = image.sub_(root * basis)
        if j % 2 or j == iterations - 1 or not warm:  # two filtered steps of float32 keep the directions apart
            basis = torch.linalg.qr(basis).Q
        image = covariance @ basis
    values, rotation = torch.linalg.eigh(_finite(basis.mT @ image))
    values = values.flip(0).clamp(min=0)
    d, m = basis.shape
    rest = (covariance.trace() - values.sum()).clamp(min=0) / max(d - m, 1)
    return Eigenspace(basis @ rotation.flip(1), values, rest)


def _finite(matrix: Tensor) -> Tensor:
    """The matrix, or zeros if an entry is not finite: LAPACK raises on NaN, where the loss can say NaN and be skipped."""
    return matrix if matrix.isfinite().all() else torch.zeros_like(matrix)


def distance_squared(a: Eigenspace, b: Eigenspace, k: int) -> Tensor:
    """||P_a - P_b||_F^2 = k_a + k_b - 2 ||U_a^T U_b||_F^2 of the leading k directions with variance, ()."""
    top_a, top_b = a.top(k), b.top(k)
    return a.leading(k).sum() + b.leading(k).sum() - 2 * (top_a.mT @ top_b).square().sum()


def distance_gradients(a: Eigenspace, b: Eigenspace, k: int, broadening: float) -> list[tuple[Tensor, Tensor]]:
    """Of `distance_squared` by either covariance: factors X, Y (d, 2k) for a and for b, the gradient being X Y^T."""
    factors = []
    for side, other in ((a, b), (b, a)):
        top, other_top = side.top(k), other.top(k)
        # L = const - 2 tr(P_a P_b): the gradient with respect to one projector is -2 times the other
        moved = -2 * _projector_gradient(side, top, other_top @ (other_top.mT @ top), k, broadening)
        factors.append((torch.cat([moved, top], 1), torch.cat([top, moved], 1)))
    return factors


def _projector_gradient(side: Eigenspace, top: Tensor, image: Tensor, k: int, broadening: float) -> Tensor:
    """H (d, k) of the gradient H U^T + U H^T with respect to Sigma of <G, P>, with `image` = G U (d, k), G symmetric.

    dP = sum_{i <= k < j} (u_i^T dSigma u_j) / (l_i - l_j) (u_i u_j^T + u_j u_i^T): only gaps across k enter.
    1/g is replaced by g / (g^2 + eps^2) with eps = broadening x the mean eigenvalue, and 0 at g = eps = 0.
    """
    d, m = side.basis.shape
    below = side.basis[:, k:]
    mean = (side.values.sum() + (d - m) * side.rest) / d
    upper = side.values[: top.shape[1]]

    def inverse(gap: Tensor) -> Tensor:
        square = gap.square() + (broadening * mean).square()
        return torch.where(square > 0, gap / square.clamp(min=torch.finfo(gap.dtype).tiny), 0)

    inside = below.mT @ image
    outside = image - top @ (top.mT @ image) - below @ inside
    moved = below @ (inside * inverse(upper - side.values[k:, None]))
    # `outside` lies in the directions that are not tracked, and in those of the leading k that have no variance
    return moved + outside * inverse(upper - side.rest)


def subspace_distance_squared(
    covariance_a: Tensor, covariance_b: Tensor, a: Eigenspace, b: Eigenspace, k: int, broadening: float
) -> Tensor:
    """||P_a - P_b||_F^2 = k_a + k_b - 2 ||U_a^T U_b||_F^2 (paper 4.3, A.2), in [0, 2k]; differentiable in both covariances.

    `a`, `b` are their eigenspaces. Directions without variance are no part of a subspace: k_a and k_b count those that
    have some, so that a collapsed side lowers the range to [0, k_a + k_b] and nothing becomes NaN. The gradient is that
    of the projector (design note: ties inside the leading k do not enter it), broadened as `_projector_gradient` says;
    `broadening=0` is the exact gradient. With m < d directions the trailing eigenvalues enter through their mean.
    """
    distance = distance_squared(a, b, k)
    for covariance, (x, y) in zip((covariance_a, covariance_b), distance_gradients(a, b, k, broadening), strict=True):
        # <X Y^T, Sigma>, without its value
        distance = distance + (x * ((covariance - covariance.detach()) @ y)).sum()
    return distance
