"""Running averages of trace-normalised covariances C_t / tr C_t (paper 4.5), which follow an encoder that moves.

average <- average + gain (C_t / tr C_t - average), and the gradient flows through C_t at full strength (`Side`).

A fixed exponential average runs away: while the encoder moves, the average looks spread when it is only each batch that
collapses in another direction. So the gain is Kalman's, from two variances that the moments give without bias: `noise`, of
the average about its expectation, and the squared distance that the encoder has drifted from it,

    |C_t|^2_U + |average|^2 - noise - 2 <C_t, average>        (|.|^2_U: the U-statistic)
    gain = (4 drift + noise) / (4 drift + noise + noise_t),   noise_t = |C_t|^2 - |C_t|^2_U

with the distance averaged over about ten steps and doubled, for the lag. While the encoder drifts the batch stands almost
alone; once it is steady the average is over `averaging_window` samples, but no more than ten steps. The first step has gain
1, the second about a half: no start-up bias.
"""

import torch
from torch import Tensor

from hf_densefeat.objective.statistics import Average, Side, inner


def no_average(seen: Side) -> Average:
    """Before the first step: NaN marks a drift that has no past to be averaged with."""
    zero = torch.zeros_like(seen.batch_noise)
    return Average(torch.zeros_like(seen.batch_normalised), zero, torch.full_like(zero, torch.nan), zero)


def gain_of(past: Average, seen: Side, averaging_window: float) -> tuple[Tensor, Tensor]:
    """Weight of this step's covariance in the average, and the new drift."""
    empty = past.covariance.trace() == 0
    noise = seen.batch_noise
    # ||C_t - average||^2, expanded: three inner products read the matrices and write none
    distance = seen.batch_purity - 2 * inner(seen.batch_normalised, past.covariance)
    distance = distance + inner(past.covariance, past.covariance) - noise - past.noise
    drift = torch.where(past.drift.isnan(), distance, past.drift.lerp(distance, 0.1))
    uncertain = 4 * drift.clamp(min=0) + past.noise
    gain = uncertain / (uncertain + noise.clamp(min=0)).clamp(min=torch.finfo(noise.dtype).tiny)
    # at least the share of a window that this step is, and never more than ten steps of memory
    gain = torch.maximum(gain, seen.moments.count / averaging_window).clamp(0.1, 1)
    return torch.where(empty, 1, gain), torch.where(empty, past.drift, drift)


def averaged(past: Average, seen: Side, gain: Tensor, drift: Tensor) -> Average:
    """The average with this step, by what `gain_of` returned."""
    # variances of independent parts add with the squares of their weights
    variance = (1 - gain).square() * past.noise + gain.square() * seen.batch_noise
    return Average(past.covariance.lerp(seen.batch_normalised, gain), variance, drift, gain)
