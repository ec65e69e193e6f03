"""What the function of a term gets: covariances, means and leading subspaces of both sides of the pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hf_densefeat.objective.moments import Moments, PairMoments
from hf_densefeat.objective.subspace import Eigenspace


class Average(NamedTuple):
    """Running average of Sigma / tr Sigma, as numbers: `running.py`."""

    covariance: Tensor  # the average, (d, d)
    noise: Tensor  # squared Frobenius norm of its sampling error, ()
    drift: Tensor  # squared distance between the average and what the encoder is now, ()
    gain: Tensor  # weight of the last update's covariance in the average, ()


class Side:
    """One side of the pairs in one update, each number computed when it is first asked for, differentiable in the moments.

    Where the objective has an averaging window, `covariance` is the running average of trace-normalised covariances,
    scaled by this update's trace; its gradient is that of this update's covariance at full strength. Otherwise it is
    `batch_covariance`. What follows from `resolution` has no gradient.

    Attributes:
        average: None without an averaging window.
        eigenspace: leading eigenvectors and eigenvalues of `covariance`, without gradient, exact or tracked as the
            objective is told: see `subspace.subspace_distance_squared`.
    """

    eigenspace: Eigenspace

    def __init__(self, moments: Moments, center: bool, average: Average | None = None):
        self.moments, self.center, self.average = moments, center, average

    @cached_property
    def count(self) -> Tensor:
        """N, the rows of this update, at least 1, ()."""
        return self.moments.count.clamp(min=1)

    @cached_property
    def mean(self) -> Tensor:
        """Mean row of this update, (d,); also where covariances are centred."""
        return self.moments.mean

    @cached_property
    def batch_covariance(self) -> Tensor:
        """Sigma of this update alone (d, d), about the mean if `center`."""
        return self.moments.covariance(self.center)

    @cached_property
    def trace(self) -> Tensor:
        """Trace of `batch_covariance`, ()."""
        return self.batch_covariance.trace()

    @cached_property
    def resolution(self) -> Tensor:
        """Variance of each column that is rounding, (d,), without gradient."""
        return self.moments.resolution(self.center)

    @cached_property
    def varies(self) -> Tensor:
        """Whether the trace is more than rounding, (): a side that does not vary has no spectrum."""
        return self.trace > self.resolution.sum()

    @cached_property
    def scale(self) -> Tensor:
        """The trace, or 1 where nothing varies, ()."""
        return torch.where(self.varies, self.trace, 1)

    @cached_property
    def batch_normalised(self) -> Tensor:
        """`batch_covariance` over its trace, (d, d)."""
        return self.batch_covariance / self.scale

    @cached_property
    def batch_purity(self) -> Tensor:
        """||`batch_normalised`||_F^2, (); not finite if an entry is not."""
        return inner(self.batch_normalised, self.batch_normalised)

    @cached_property
    def batch_noise(self) -> Tensor:
        """Squared Frobenius norm of the sampling error of `batch_normalised`, estimated, (): see `noise_of_purity`."""
        square = self.batch_purity * self.scale * self.scale
        return self.moments.noise_of_purity(square, self.trace, self.center) / self.scale / self.scale

    @property
    def usable(self) -> Tensor:
        """Whether it may enter a running average, (): it varies, and every entry is finite."""
        return self.varies & self.batch_purity.isfinite()

    @property
    def scaled(self) -> tuple[Tensor, Tensor]:
        """`covariance` as numbers: a matrix (d, d), and the scalar that multiplies it."""
        if self.average is None:
            return self.batch_covariance, torch.ones_like(self.trace)
        return self.average.covariance, self.trace

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

    def of(self, pair: PairMoments) -> Statistics:
        """Of other moments, with the averages and eigenspaces of these."""
        a, b = Side(pair.a, self.center, self.a.average), Side(pair.b, self.center, self.b.average)
        a.eigenspace, b.eigenspace = self.a.eigenspace, self.b.eigenspace
        return replace(self, a=a, b=b, pair=pair)

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
        """Squared Frobenius norm of the sampling error of `pooled` over its trace, an upper estimate, ().

        The sides are correlated, so the noise of their mean is taken to be the mean of theirs.
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
        batch = self.batch_cross_covariance / self.cross_scale
        # the value of the average, the gradient of this update at full strength
        return (self.average_cross + (batch - batch.detach())) * self.cross_scale

    @property
    def cross_scale(self) -> Tensor:
        """Geometric mean of both traces: the joint covariance of both normalised sides has C_ab over it off its diagonal."""
        return (self.a.scale * self.b.scale).sqrt()

    def columns(self) -> tuple[Tensor, Tensor]:
        """Centred covariance (d, d) and resolution (d,) of all 2N rows of this update.

        Without `center` about the mean of all rows, with it about each side's own mean.
        """
        if not self.center:
            both = self.pair.a + self.pair.b
            return both.covariance(center=True), both.resolution(center=True)
        return (self.a.batch_covariance + self.b.batch_covariance) / 2, self.resolution


TermFunction = Callable[[Statistics], Tensor]
Term = tuple[float, TermFunction]


def sees_pairing(function: TermFunction) -> TermFunction:
    """Mark a term that needs the cross covariance of the pairs, which is then summed and reduced with the moments."""
    function.needs_cross_moment = True  # type: ignore[attr-defined]
    return function


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<X, Y>, the sum of products of entries, ()."""
    return torch.dot(x.flatten(), y.flatten())
