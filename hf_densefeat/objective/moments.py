"""Moments of embeddings: everything the objective needs of a batch, added over micro-batches, ranks and steps."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor


def full_precision(z: Tensor) -> Tensor:
    """Widen half precision to float32; float32 and float64 stay as they are."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


class _Scatter(torch.autograd.Function):
    """Y^T Y with a backward of one matrix product, y (G + G^T), where autograd takes two."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.mT @ y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return y @ (grad + grad.mT)


@dataclass(frozen=True)
class Moments:
    """Sums over the rows y = z - shift of an embedding matrix Z (N, d), about a constant `shift`.

    | field  | value           | shape  |
    |--------|-----------------|--------|
    | shift  | any constant    | (d,)   |
    | count  | N               | ()     |
    | first  | sum y           | (d,)   |
    | second | sum y y^T       | (d, d) |
    | third  | sum |y|^2 y     | (d,)   |
    | fourth | sum |y|^4       | ()     |

    The paper's terms are functions of `count`, `first` and `second` alone; `third` and `fourth` serve the unbiased
    estimator, which leaves out the i = j terms. A shift near the mean keeps fp32 exact: the one-pass
    E[z z^T] - mu mu^T about zero is 33 % wrong at mean 1e3 and standard deviation 1.

    `a + b` is the moments of the rows of both. Half precision is widened to float32; autocast is off inside.
    No rows: every sum is zero.
    """

    shift: Tensor
    count: Tensor
    first: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor

    @classmethod
    def of(cls, z: Tensor, shift: Tensor | None = None) -> Moments:
        """Moments of the rows of `z` (N, d), differentiable in `z`; `shift` is the mean of the rows if not given."""
        if z.ndim != 2:
            raise ValueError(f"Expected embeddings of shape (n, d) but got {tuple(z.shape)}.")
        with torch.autocast(z.device.type, enabled=False):
            z = full_precision(z)
            if shift is None:
                shift = z.detach().mean(0) if len(z) else z.new_zeros(z.shape[1])
            y = z - shift
            square = y.square().sum(1)
            count = z.new_tensor(float(len(z)))
            return cls(shift, count, y.sum(0), _Scatter.apply(y), square @ y, square.square().sum())

    def about(self, shift: Tensor) -> Moments:
        """The same rows about another shift: y' = y + delta, expanded."""
        with torch.autocast(shift.device.type, enabled=False):
            n, delta = self.count, self.shift - shift
            length = delta @ delta
            along, trace = self.first @ delta, self.second.trace()
            cross = torch.outer(self.first, delta)
            third = 2 * self.second @ delta + length * self.first + (trace + 2 * along + n * length) * delta
            return Moments(
                shift,
                n,
                self.first + n * delta,
                self.second + cross + cross.mT + n * torch.outer(delta, delta),
                self.third + third,
                self.fourth_about(shift),
            )

    def fourth_about(self, shift: Tensor) -> Tensor:
        """Sum |z - shift|^4 over the rows."""
        with torch.autocast(shift.device.type, enabled=False):
            n, delta = self.count, self.shift - shift
            length, along, trace = delta @ delta, self.first @ delta, self.second.trace()
            quadratic = delta @ self.second @ delta
            return self.fourth + 4 * (quadratic + self.third @ delta) + length * (2 * trace + 4 * along + n * length)

    def __add__(self, other: Moments) -> Moments:
        if other.shift is not self.shift:
            other = other.about(self.shift)
        return Moments(self.shift, *(x + y for x, y in zip(self.sums, other.sums, strict=True)))

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The additive fields, all but the shift."""
        return tuple(getattr(self, field.name) for field in fields(self)[1:])

    @property
    def mean(self) -> Tensor:
        """Mean row (d,); the shift if there are no rows."""
        return self.shift + self.first / self.count.clamp(min=1)

    def covariance(self, center: bool) -> Tensor:
        """Sigma (d, d): Z^T Z / N as the paper writes it (section 3), or about the mean. Equals `np.cov(z.T, ddof=0)`."""
        n = self.count.clamp(min=1)
        mean = self.first / n
        if center:
            return torch.addr(self.second / n, mean, mean, alpha=-1)
        total = mean + self.shift
        return torch.addr(torch.addr(self.second / n, mean, mean, alpha=-1), total, total)

    def resolution(self, center: bool) -> Tensor:
        """Variance (d,) below which a column is constant to rounding, so that its direction is noise."""
        eps = 16 * torch.finfo(self.shift.dtype).eps
        if not center:
            return torch.full_like(self.shift, torch.finfo(self.shift.dtype).tiny)
        square = self.second.diagonal() / self.count.clamp(min=1)
        rounding = eps * square + (eps * self.shift).square()
        # a column far below the others is none: some checkpoints have such, and 1 / variance would overflow
        rounding = rounding + eps**2 * square.mean()
        return rounding.detach() + torch.finfo(self.shift.dtype).tiny

    def detached(self, requires_grad: bool = False) -> Moments:
        """The same values as leaves of a new graph."""
        return Moments(self.shift, *(x.detach().requires_grad_(requires_grad) for x in self.sums))

    @torch.no_grad()
    def pullback(self, z: Tensor) -> Tensor:
        """Gradient (N, d) with respect to the rows `z`, when `self` holds the gradient with respect to their moments.

        Moments are sums over rows, so with G held constant the gradient of <G, moments> at a row y = z - shift is
        G_first + 2 G_second y + |y|^2 G_third + 2 (G_third . y) y + 4 G_fourth |y|^2 y: exact for any cut of the batch.
        """
        with torch.autocast(z.device.type, enabled=False):
            y = full_precision(z.detach()) - self.shift
            square = y.square().sum(1, keepdim=True)
            along = (y @ self.third).unsqueeze(1)
            linear = self.first + y @ (self.second + self.second.mT)
            return linear + square * self.third + (2 * along + 4 * self.fourth * square) * y


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
    almost alone; once it is steady the average fills `window` samples, but no more than ten steps. The first step has
    gain 1, the second about a half: no start-up bias. A batch without variance or with a non-finite value is left out.
    """

    covariance: Tensor | None = None
    noise: Tensor | None = None
    drift: Tensor | None = None

    def average(
        self, normalised: Tensor, noise: Tensor, count: Tensor, window: float, usable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The new average (d, d) and its noise, given C_t / tr C_t, noise_t and the rows behind it."""
        with torch.no_grad():
            if self.covariance is None:
                self.covariance, self.noise = torch.zeros_like(normalised), torch.zeros_like(noise)
                self.drift = torch.full_like(noise, torch.nan)
            empty = self.covariance.trace() == 0
            distance = (normalised - self.covariance).square().sum() - noise - self.noise
            drift = torch.where(self.drift.isnan(), distance, self.drift.lerp(distance, 0.1))
            uncertain = 4 * drift.clamp(min=0) + self.noise
            gain = uncertain / (uncertain + noise.clamp(min=0)).clamp(min=torch.finfo(noise.dtype).tiny)
            gain = torch.maximum(gain, count / window).clamp(0.1, 1)
            gain = torch.where(empty, 1, gain)
            average = self.covariance.lerp(normalised, gain)
            variance = (1 - gain).square() * self.noise + gain.square() * noise
            keep = usable & average.isfinite().all()
            self.covariance = torch.where(keep, average, self.covariance)
            self.noise = torch.where(keep, variance, self.noise)
            self.drift = torch.where(keep & ~empty, drift, self.drift)
        return average + (normalised - normalised.detach()), variance + gain * (noise - noise.detach())


@torch.no_grad()
def sum_over_ranks(a: Moments, b: Moments, counts: Tensor) -> tuple[Moments, Moments, Tensor]:
    """Global moments of both sides and global `counts` (m,): one all-reduce of one packed buffer, without gradient.

    The buffer holds the upper triangles: (d^2 + 5 d + 4 + m numbers whatever the batch, in the dtype of the moments.
    All ranks must use the same shift. A rank without rows takes part with zeros. One process: returned as they are.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return a, b, counts
    d = len(a.shift)
    upper = torch.triu_indices(d, d, device=a.shift.device)
    parts = [counts.to(a.shift)]
    for side in (a, b):
        parts += [side.count[None], side.first, side.second[upper[0], upper[1]], side.third, side.fourth[None]]
    buffer = torch.cat(parts)
    dist.all_reduce(buffer)
    counts, *parts = buffer.split([len(part) for part in parts])
    sides = []
    for side, (n, first, triangle, third, fourth) in zip((a, b), (parts[:5], parts[5:]), strict=True):
        second = first.new_zeros(d, d)
        second[upper[0], upper[1]] = triangle
        second = second + second.triu(1).mT
        sides.append(Moments(side.shift, n[0], first, second, third, fourth[0]))
    return *sides, counts


@torch.no_grad()
def mean_over_ranks(z: Tensor) -> Tensor:
    """Mean row (d,) of the rows on all ranks: a first shift, before any moments are known."""
    z = full_precision(z)
    sums = torch.cat([z.sum(0), z.new_tensor([float(len(z))])])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums[:-1] / sums[-1].clamp(min=1)
