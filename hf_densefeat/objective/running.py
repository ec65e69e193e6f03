"""Running averages of covariances (paper 4.5), which follow an encoder that moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_densefeat.objective.moments import Moments


class Sample:
    """Second-order statistics of one side of one update, each computed when it is first asked for.

    They are differentiable in the moments; `resolution` and what follows from it have no gradient.
    """

    def __init__(self, moments: Moments, center: bool):
        self.moments, self.center = moments, center

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


@dataclass(frozen=True)
class Average:
    """Running average of Sigma / tr Sigma (d, d), the noise in it, and the weight of this update's, as numbers."""

    covariance: Tensor
    noise: Tensor
    gain: Tensor


@dataclass
class RunningCovariance:
    """Running average of trace-normalised covariances C_t / tr C_t (paper 4.5: "running estimates of covariance statistics").

    average <- average + gain (C_t / tr C_t - average), and the gradient flows through C_t at full strength (`Side`).

    A fixed exponential average runs away: while the encoder moves, the average looks spread when it is only each batch
    that collapses in another direction. So the gain is Kalman's, from two variances that the moments give without bias:
    `noise`, of the average about its expectation, and the squared distance that the encoder has drifted from it,

        |C_t|^2_U + |average|^2 - noise - 2 <C_t, average>        (|.|^2_U: the U-statistic)
        gain = (4 drift + noise) / (4 drift + noise + noise_t),   noise_t = |C_t|^2 - |C_t|^2_U

    with the distance averaged over about ten steps and doubled, for the lag. While the encoder drifts the batch stands
    almost alone; once it is steady the average is over `averaging_window` samples, but no more than ten steps. The first
    step has gain 1, the second about a half: no start-up bias. A batch without variance or with a non-finite value is
    left out.
    """

    covariance: Tensor | None = None
    noise: Tensor | None = None
    drift: Tensor | None = None

    @torch.no_grad()
    def average(self, seen: Sample, averaging_window: float) -> Average:
        """The new average; the state moves on by one step."""
        gain, drift = self.gain(seen, averaging_window)
        return self.advance(seen, gain, drift, seen.varies)

    @torch.no_grad()
    def gain(self, seen: Sample, averaging_window: float) -> tuple[Tensor, Tensor]:
        """Weight of this step's covariance in the average, and the new drift."""
        if self.covariance is None or self.noise is None or self.drift is None:
            self.covariance, self.noise = torch.zeros_like(seen.batch_normalised), torch.zeros_like(seen.batch_noise)
            # NaN marks the first step, whose drift has no past to be averaged with
            self.drift = torch.full_like(seen.batch_noise, torch.nan)
        past, noise = self.covariance, seen.batch_noise
        empty = past.trace() == 0
        # ||C_t - average||^2, expanded: three inner products read the matrices and write none
        distance = seen.batch_purity - 2 * inner(seen.batch_normalised, past) + inner(past, past) - noise - self.noise
        drift = torch.where(self.drift.isnan(), distance, self.drift.lerp(distance, 0.1))
        uncertain = 4 * drift.clamp(min=0) + self.noise
        gain = uncertain / (uncertain + noise.clamp(min=0)).clamp(min=torch.finfo(noise.dtype).tiny)
        # at least the share of a window that this step is, and never more than ten steps of memory
        gain = torch.maximum(gain, seen.moments.count / averaging_window).clamp(0.1, 1)
        return torch.where(empty, 1, gain), torch.where(empty, self.drift, drift)

    @torch.no_grad()
    def advance(self, seen: Sample, gain: Tensor, drift: Tensor, usable: Tensor) -> Average:
        """The new average, by what `gain` returned; a step that is not usable leaves the state as it was."""
        assert self.covariance is not None
        assert self.noise is not None
        assert self.drift is not None
        average = self.covariance.lerp(seen.batch_normalised, gain)
        # variances of independent parts add with the squares of their weights
        variance = (1 - gain).square() * self.noise + gain.square() * seen.batch_noise
        keep = usable & seen.batch_purity.isfinite()
        if keep:  # on a GPU this waits, as the small eigendecomposition of the next step does anyway
            self.covariance, self.noise, self.drift = average, variance, drift
        return Average(average, variance, gain)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<X, Y>, the sum of products of entries, ()."""
    return torch.dot(x.flatten(), y.flatten())
