"""Terms that the study tried in the place of the objective's or beside them; importing this makes them known by name.

Terms that invert a covariance put a floor under its eigenvalues, relative to their mean l: `epsilon` times l, or with
epsilon "noise" the root mean square of the eigenvalues that sampling alone would give, sqrt(d) ||S_hat - S||_F / tr S times
l, at least 0.001 l. The norm is estimated from the moments (`Statistics.noise`); for Gaussian rows it is about tr S sqrt((1 +
purity) / n), so that the floor is sqrt(d / n) l for a flat spectrum of n rows. The floor is held constant in the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_densefeat.objective.extra_terms import EXTRA_TERMS, eigenvalues, normalised
from hf_densefeat.objective.statistics import Statistics
from hf_densefeat.objective.terms import spectral_spreading

LEAST_FLOOR = 1e-3  # of the mean eigenvalue: what float32 can factorise at d = 1,000


@dataclass(frozen=True)
class MutualInformation:
    """-I / d, with I = 1/2 log(det S_a det S_b / det S_ab) in nats: minimising it maximises what pairs tell of each other.

    I is the mutual information of jointly Gaussian z_a and z_b, -1/2 sum_i log(1 - rho_i^2) of their canonical
    correlations (Cover and Thomas, 2006, section 8; Borga, 2001), S_ab = [[S_a, C], [C^T, S_b]]; of the covariances that
    the objective keeps, running if it has an averaging window. It is invariant to any invertible linear map of either
    side but for the floor, which is added to both diagonals and makes it finite: (1 / 2) log((1 + e)^2 / (e^2 + 2 e)) a
    direction at most where b = a. In (-inf, 0], 0 for sides without correlation; a side without variance reads 0 without
    gradient. With fewer rows than dimensions sample correlations are near 1 and the value says nothing without a floor:
    use `epsilon="noise"` or an averaging window, and `center`.

    Args:
        epsilon: floor, in units of each side's mean eigenvalue, or "noise".
    """

    epsilon: float | str = "noise"
    needs_cross_moment: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_floor(self.epsilon)

    def __call__(self, s: Statistics) -> Tensor:
        """The value, ()."""
        d = s.dimension
        both = s.a.varies & s.b.varies
        identity = torch.eye(d, dtype=s.a.covariance.dtype, device=s.a.covariance.device)
        # each side at mean eigenvalue 1, which changes no correlation; the diagonal blocks of dead sides are I
        floor_a, floor_b = (_floor(side.noise, d, self.epsilon) for side in (s.a, s.b))
        a = torch.where(both, s.a.covariance * (d / s.a.scale), 0) + torch.where(both, floor_a, 1) * identity
        b = torch.where(both, s.b.covariance * (d / s.b.scale), 0) + torch.where(both, floor_b, 1) * identity
        c = torch.where(both, s.cross_covariance * (d / (s.a.scale * s.b.scale).sqrt()), 0)
        joint = torch.cat([torch.cat([a, c], 1), torch.cat([c.mT, b], 1)])
        return -(log_determinant(a) + log_determinant(b) - log_determinant(joint)) / (2 * d)


@dataclass(frozen=True)
class Sphericity:
    """log(tr S / d) - (log det S) / d of the covariance of both sides: what L_spec does not see, the tail of the spectrum.

    -(1/d) log of Mauchly's sphericity statistic W (Mauchly, 1940), and min over sigma of (2/d) KL(N(0, S) || N(0,
    sigma^2 I)). With normalised eigenvalues p its gradient by log p_i is p_i - 1/d: every direction of the tail is lifted
    at the same rate, where that of L_spec, 2 p_i (p_i - sum p^2), vanishes. The floor is added to S and to tr S / d. In
    [0, log((1 + e) / e)], 0 for an isotropic S; rotation- and scale-invariant. Without variance it is the largest value,
    without gradient.

    Args:
        epsilon: floor, in units of the mean eigenvalue, or "noise"; small values lift directions that no row has.
    """

    epsilon: float | str = "noise"

    def __post_init__(self) -> None:
        _check_floor(self.epsilon)

    def __call__(self, s: Statistics) -> Tensor:
        """The value, ()."""
        scaled, varies = normalised(s)
        floor = _floor(s.noise, s.dimension, self.epsilon)
        identity = torch.eye(s.dimension, dtype=scaled.dtype, device=scaled.device)
        log_det = log_determinant(torch.where(varies, scaled, 0) + floor * identity)
        value = (1 + floor).log() - log_det / s.dimension
        return torch.where(varies, value, ((1 + floor) / floor).log())


@dataclass(frozen=True)
class TargetSpectrum:
    """KL(q || p) of the normalised eigenvalues p of both sides' covariance from a power law q_i ~ i^-alpha, largest first.

    alpha = 1 is what cortex and good self-supervised encoders show (Stringer et al., 2019; Agrawal et al., 2022,
    alpha-ReQ). alpha = 0 is `Sphericity`. The gradient by log p_i is p_i - q_i: the tail is lifted to its share and no
    higher. p = (l_i / l + e) / (d (1 + e)) with the floor e. One eigendecomposition a call; the gradient is
    sum_i (dKL/dl_i) u_i u_i^T, bounded by 1 / e and without differences of eigenvalues, so ties are harmless. In
    [0, inf), 0 at the target; rotation- and scale-invariant. Without variance it is KL(q || uniform), without gradient.

    Args:
        alpha: exponent of the target, >= 0.
        epsilon: floor, in units of the mean eigenvalue, or "noise".
    """

    alpha: float = 1.0
    epsilon: float | str = "noise"

    def __post_init__(self) -> None:
        _check_floor(self.epsilon)
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"Expected a finite alpha >= 0 but got {self.alpha}.")

    def __call__(self, s: Statistics) -> Tensor:
        """The value, ()."""
        scaled, varies = normalised(s)
        d, floor = s.dimension, _floor(s.noise, s.dimension, self.epsilon)
        values = eigenvalues(scaled)
        target = torch.arange(1, d + 1, dtype=values.dtype, device=values.device) ** -self.alpha
        target = target / target.sum()
        share = torch.where(varies, (values + floor) / (d * (1 + floor)), 1 / d)
        return (target * (target / share).log()).sum()


@dataclass(frozen=True)
class BoundedRank:
    """max(0, L_spec - (1 / rank - 1 / d)): L_spec until the effective rank reaches `rank`, nothing above it.

    The effective rank is the participation ratio (tr S)^2 / ||S||_F^2 = 1 / (L_spec + 1/d). To be given in the place of
    L_spec: `terms={"spectral_spreading": (0.0, spectral_spreading_term), "bounded_rank": (1.0, BoundedRank(rank=32))}`.

    Args:
        rank: above 1; from d on the value is that of L_spec.
    """

    rank: float = 32.0

    def __post_init__(self) -> None:
        if not self.rank > 1:
            raise ValueError(f"Expected a rank above 1 but got {self.rank}.")

    def __call__(self, s: Statistics) -> Tensor:
        """The value, ()."""
        if s.unbiased:
            value = (s.a.purity + s.b.purity) / 2 - 1 / s.dimension
        else:
            value = spectral_spreading(s.pooled, s.dimension, s.resolution.sum())
        return (value - max(1 / self.rank - 1 / s.dimension, 0)).clamp(min=0)


class _LogDeterminant(torch.autograd.Function):
    """By Cholesky, with a symmetric gradient: the inverse from the same factor."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(matrix)
        ctx.save_for_backward(factor)
        value = 2 * factor.diagonal().log().sum()
        return torch.where(info == 0, value, torch.nan)  # not positive definite: the update is skipped as non-finite

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        return grad * torch.cholesky_inverse(factor)


def log_determinant(matrix: Tensor) -> Tensor:
    """Log det of a positive definite matrix (d, d); NaN, and no error, for one that is not."""
    value: Tensor = _LogDeterminant.apply(matrix)  # type: ignore[no-untyped-call]
    return value


def _floor(noise: Tensor, d: int, epsilon: float | str) -> Tensor:
    if isinstance(epsilon, str):
        return (d * noise.detach()).clamp(min=LEAST_FLOOR**2).sqrt()
    return torch.full_like(noise.detach(), epsilon)


def _check_floor(epsilon: float | str) -> None:
    if epsilon != "noise" and not (isinstance(epsilon, (int, float)) and 0 < epsilon < math.inf):
        raise ValueError(f'Expected epsilon to be "noise" or a finite number above 0 but got {epsilon!r}.')


EXTRA_TERMS |= {
    "mutual_information": MutualInformation(),
    "sphericity": Sphericity(),
    "target_spectrum": TargetSpectrum(),
    "bounded_rank": BoundedRank(),
}
