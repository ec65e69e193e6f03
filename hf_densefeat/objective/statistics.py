"""What the function of a term gets: covariances, means and leading subspaces of both sides of the pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_densefeat.objective.moments import Moments, PairMoments
from hf_densefeat.objective.running import Average, Sample
from hf_densefeat.objective.subspace import Eigenspace


class Side(Sample):
    """One side as the functions of terms see it: what `Sample` has, and the averages of the objective.

    Where the objective has an averaging window, `covariance` is the running average of trace-normalised covariances,
    scaled by this update's trace; its gradient is that of this update's covariance at full strength. Otherwise it is
    `batch_covariance`. `eigenspace` holds the leading eigenvectors and eigenvalues of `covariance`, without gradient,
    exact or tracked as the objective is told: see `subspace.subspace_distance_squared`.
    """

    def __init__(self, moments: Moments, center: bool, eigenspace: Eigenspace, average: Average | None = None):
        super().__init__(moments, center)
        self.eigenspace, self.average = eigenspace, average

    @cached_property
    def covariance(self) -> Tensor:
        """Sigma (d, d), averaged if the objective has an averaging window."""
        return self.batch_covariance if self.average is None else self.normalised * self.trace

    @cached_property
    def normalised(self) -> Tensor:
        """`covariance` over its trace (d, d)."""
        batch = self.batch_normalised
        return batch if self.average is None else self.average.covariance + (batch - batch.detach())

    @property
    def noise(self) -> Tensor:
        """Squared Frobenius norm of the sampling error of `covariance` over its trace, estimated, ()."""
        noise = self.batch_noise
        return noise if self.average is None else self.average.noise + self.average.gain * (noise - noise.detach())

    @cached_property
    def purity(self) -> Tensor:
        """Unbiased ||Sigma||_F^2 / (tr Sigma)^2, (); 1 where nothing varies."""
        return torch.where(self.varies, self.normalised.square().sum() - self.noise, 1)


@dataclass(eq=False)
class Statistics:
    """Both sides of the pairs, what they have in common, and the options of the objective.

    A term is a function of this that returns a scalar tensor, differentiable in the moments. A term that needs the
    cross covariance is marked by `sees_pairing`.
    """

    a: Side
    b: Side
    pair: PairMoments
    subspace_dim: int
    center: bool
    unbiased: bool
    broadening: float
    average_cross: Tensor | None = None

    @property
    def dimension(self) -> int:
        """The width d of the embedding."""
        return len(self.pair.a.shift)

    @cached_property
    def pooled(self) -> Tensor:
        """Mean of the covariances of both sides, (d, d)."""
        return (self.a.covariance + self.b.covariance) / 2

    @cached_property
    def resolution(self) -> Tensor:
        """Variance (d,) of each column of `pooled` that is rounding."""
        return (self.a.resolution + self.b.resolution) / 2

    @property
    def noise(self) -> Tensor:
        """Squared Frobenius norm of the sampling error of `pooled` over its trace, estimated from above, ().

        The mean over the sides: adjacent notes are not independent, so no less is claimed of both together.
        """
        return (self.a.noise + self.b.noise) / 2

    @cached_property
    def batch_cross_covariance(self) -> Tensor:
        """C_ab = mean of z_a z_b^T over the pairs of this update (d, d), about both means if `center`."""
        return self.pair.cross_covariance(self.center)

    @cached_property
    def cross_covariance(self) -> Tensor:
        """C_ab (d, d), averaged with the covariances if there is an averaging window.

        Averaged with one gain for a, b and the cross covariance, so that the joint covariance [[S_a, C], [C^T, S_b]]
        stays positive semidefinite.
        """
        if self.average_cross is None:
            return self.batch_cross_covariance
        # the geometric mean: what the joint covariance of both normalised sides has off its diagonal
        scale = (self.a.scale * self.b.scale).sqrt()
        batch = self.batch_cross_covariance / scale
        # the value of the average, the gradient of this update at full strength
        return (self.average_cross + (batch - batch.detach())) * scale

    def columns(self) -> tuple[Tensor, Tensor]:
        """Centred covariance (d, d) and resolution (d,) of all 2N rows of this update.

        Without `center` about the mean of all rows, with it about each side's own mean.
        """
        if not self.center:
            both = self.pair.a + self.pair.b
            return both.covariance(center=True), both.resolution(center=True)
        if self.a.average is None and self.b.average is None:
            return self.pooled, self.resolution
        return (self.a.batch_covariance + self.b.batch_covariance) / 2, self.resolution


TermFunction = Callable[[Statistics], Tensor]
Term = tuple[float, TermFunction]


def sees_pairing(function: TermFunction) -> TermFunction:
    """Mark a term that needs the cross covariance of the pairs, which is then summed and reduced with the moments."""
    function.needs_cross_moment = True  # type: ignore[attr-defined]
    return function
