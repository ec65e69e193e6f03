"""Running averages of covariances (paper 4.5), which follow an encoder that moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningCovariance:
    """Running average of trace-normalised covariances C_t / tr C_t (paper 4.5: "running estimates of covariance statistics").

    average <- average + gain (C_t / tr C_t - average), and the gradient flows through C_t at full strength.

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
    def gain(self, normalised: Tensor, noise: Tensor, count: Tensor, averaging_window: float) -> tuple[Tensor, Tensor]:
        """Weight of this step's C_t / tr C_t (d, d) in the average, and the new drift."""
        if self.covariance is None or self.noise is None or self.drift is None:
            self.covariance, self.noise = torch.zeros_like(normalised), torch.zeros_like(noise)
            self.drift = torch.full_like(noise, torch.nan)
        empty = self.covariance.trace() == 0
        distance = (normalised - self.covariance).square().sum() - noise - self.noise
        drift = torch.where(self.drift.isnan(), distance, self.drift.lerp(distance, 0.1))
        uncertain = 4 * drift.clamp(min=0) + self.noise
        gain = uncertain / (uncertain + noise.clamp(min=0)).clamp(min=torch.finfo(noise.dtype).tiny)
        gain = torch.maximum(gain, count / averaging_window).clamp(0.1, 1)
        return torch.where(empty, 1, gain), torch.where(empty, self.drift, drift)

    def advance(
        self, normalised: Tensor, noise: Tensor, gain: Tensor, drift: Tensor, usable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The new average (d, d) and its noise, by a gain that `gain` returned; a step that is not usable is left out."""
        assert self.covariance is not None
        assert self.noise is not None
        assert self.drift is not None
        with torch.no_grad():
            average = self.covariance.lerp(normalised, gain)
            variance = (1 - gain).square() * self.noise + gain.square() * noise
            keep = usable & average.isfinite().all()
            self.covariance = torch.where(keep, average, self.covariance)
            self.noise = torch.where(keep, variance, self.noise)
            self.drift = torch.where(keep, drift, self.drift)
        return average + (normalised - normalised.detach()), variance + gain * (noise - noise.detach())

    def average(
        self, normalised: Tensor, noise: Tensor, count: Tensor, averaging_window: float, usable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The new average (d, d) and its noise, given C_t / tr C_t, noise_t and the rows behind it."""
        gain, drift = self.gain(normalised, noise, count, averaging_window)
        return self.advance(normalised, noise, gain, drift, usable)
