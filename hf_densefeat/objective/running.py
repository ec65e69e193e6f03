"""Running averages of covariances (paper 4.5), which follow an encoder that moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_densefeat.objective.statistics import Average, Side, inner


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
    def gain(self, seen: Side, averaging_window: float) -> tuple[Tensor, Tensor]:
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
    def advance(self, seen: Side, gain: Tensor, drift: Tensor, usable: Tensor) -> Average:
        """The new average, by what `gain` returned; a step that is not usable leaves the state as it was."""
        assert self.covariance is not None
        assert self.noise is not None
        average = self.covariance.lerp(seen.batch_normalised, gain)
        # variances of independent parts add with the squares of their weights
        variance = (1 - gain).square() * self.noise + gain.square() * seen.batch_noise
        if usable:  # on a GPU this waits, as the small eigendecomposition of the next step does anyway
            self.covariance, self.noise, self.drift = average, variance, drift
        return Average(average, variance, gain)
