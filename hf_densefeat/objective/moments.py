"""Moments of embeddings: all that the objective needs of a batch, added over micro-batches, ranks and steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_densefeat.objective.anchor import AnchorMoments, Rows, anchor_pullback
from hf_densefeat.objective.precision import full_precision, rounding_variance

SECOND = (2, 7)  # places of the second moments of both sides, which are symmetric, among `PairMoments.sums`


class _Scatter(torch.autograd.Function):
    """Y^T Y with a backward of one matrix product, y (G + G^T), where autograd takes two."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.mT @ y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        gradient: Tensor = y @ (grad + grad.mT)
        return gradient


@dataclass(frozen=True)
class Moments:
    """Sums over the rows y = z - shift of an embedding matrix Z (N, d), about a constant `shift`.

    | field               | value         | shape  |
    |---------------------|---------------|--------|
    | shift               | any constant  | (d,)   |
    | count               | N             | ()     |
    | first               | sum y         | (d,)   |
    | second              | sum y y^T     | (d, d) |
    | square_weighted_sum | sum |y|^2 y   | (d,)   |
    | quartic_sum         | sum |y|^4     | ()     |

    The paper's terms are functions of `count`, `first` and `second` alone; the last two serve the unbiased estimator,
    which leaves out the i = j terms. A shift near the mean keeps fp32 exact: the one-pass E[z z^T] - mu mu^T about zero
    is 33 % wrong at mean 1e3 and standard deviation 1.

    `a + b` is the moments of the rows of both. Half precision is widened to float32; autocast is off inside.
    No rows: every sum is zero.
    """

    shift: Tensor
    count: Tensor
    first: Tensor
    second: Tensor
    square_weighted_sum: Tensor
    quartic_sum: Tensor

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
            second: Tensor = _Scatter.apply(y)  # type: ignore[no-untyped-call]
            return cls(shift, count, y.sum(0), second, square @ y, square.square().sum())

    def about(self, shift: Tensor) -> Moments:
        """The same rows about another shift: y' = y + delta, expanded."""
        # the same tensor is the usual case, and costs nothing; an equal one would have to be compared
        if shift is self.shift:
            return self
        with torch.autocast(shift.device.type, enabled=False):
            # |y + delta|^2 = |y|^2 + 2 y.delta + |delta|^2, summed with each power that a field holds
            n, delta = self.count, self.shift - shift
            length = delta @ delta
            along, trace = self.first @ delta, self.second.trace()
            outer = torch.outer(self.first, delta)
            added = 2 * self.second @ delta + length * self.first + (trace + 2 * along + n * length) * delta
            return Moments(
                shift,
                n,
                self.first + n * delta,
                self.second + outer + outer.mT + n * torch.outer(delta, delta),
                self.square_weighted_sum + added,
                self.quartic_sum_about(shift),
            )

    def quartic_sum_about(self, shift: Tensor) -> Tensor:
        """Sum |z - shift|^4 over the rows."""
        with torch.autocast(shift.device.type, enabled=False):
            n, delta = self.count, self.shift - shift
            length, along, trace = delta @ delta, self.first @ delta, self.second.trace()
            mixed = delta @ self.second @ delta + self.square_weighted_sum @ delta
            return self.quartic_sum + 4 * mixed + length * (2 * trace + 4 * along + n * length)

    def __add__(self, other: Moments) -> Moments:
        other = other.about(self.shift)
        return Moments(self.shift, *(x + y for x, y in zip(self.sums, other.sums, strict=True)))

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The additive fields, all but the shift."""
        return self.count, self.first, self.second, self.square_weighted_sum, self.quartic_sum

    @property
    def mean(self) -> Tensor:
        """Mean row (d,); the shift if there are no rows."""
        return self.shift + self.first / self.count.clamp(min=1)

    def covariance(self, center: bool) -> Tensor:
        """Sigma (d, d): Z^T Z / N as the paper writes it (section 3), or about the mean. Equals `np.cov(z.T, ddof=0)`."""
        n = self.count.clamp(min=1)
        # the mean about the shift is small, so that the difference of squares loses no digits
        mean = self.first / n
        centred = torch.addr(self.second / n, mean, mean, alpha=-1)
        if center:
            return centred
        total = mean + self.shift
        return torch.addr(centred, total, total)

    def resolution(self, center: bool) -> Tensor:
        """Variance (d,) below which a column is constant to rounding, so that its direction is noise."""
        square = self.second.diagonal() / self.count.clamp(min=1)
        return rounding_variance(self.shift, square, center=center)

    def noise_of_purity(self, square: Tensor, trace: Tensor, center: bool) -> Tensor:
        """||Sigma_hat||_F^2 minus its U-statistic: what the i = j terms add, which measures N and not the model.

        With rows x about the mean, S = sum x x^T and q = sum |x|^4, the U-statistic
        [||S||_F^2 - q + (tr S)^2 / ((n-1)(n-2)) - 2 q / (n-2)] / (n (n-3)) is unbiased for ||Sigma||_F^2 (Song et al.,
        2012, with both kernels Z Z^T); uncentred it is (||S||_F^2 - q) / (n (n-1)). Rows must be independent. With fewer
        than 4 rows (2 uncentred) all of ||Sigma_hat||_F^2 is noise. `square` is ||Sigma_hat||_F^2, `trace` tr Sigma_hat.
        """
        n = self.count
        if center:
            q = self.quartic_sum_about(self.mean)
            rest = (n * trace).square() / ((n - 1) * (n - 2)).clamp(min=1) - 2 * q / (n - 2).clamp(min=1)
            unbiased = (n.square() * square - q + rest) / (n * (n - 3)).clamp(min=1)
            # Sigma_hat divides by n, the unbiased covariance by n - 1
            unbiased = unbiased * ((n - 1) / n.clamp(min=1)).square()
        else:
            q = self.quartic_sum_about(torch.zeros_like(self.shift))
            unbiased = (n.square() * square - q) / (n * (n - 1)).clamp(min=1)
        # below that many rows the U-statistic has no denominator: all of it is noise
        return torch.where(n >= (4 if center else 2), square - unbiased, square)


@dataclass(frozen=True)
class PairMoments:
    """Moments of both sides of pairs, row i of b after row i of a, and sums over pairs; `p + q` is of the pairs of both."""

    a: Moments
    b: Moments
    product_sum: Tensor  # sum (z_a - a.shift) . (z_b - b.shift), ()
    cross: Tensor | None = None  # sum (z_a - a.shift)(z_b - b.shift)^T, (d, d), where it is asked for
    anchor: AnchorMoments | None = None  # sums with the rows of the frozen start, where there is one

    @classmethod
    def of(
        cls, z_a: Tensor, z_b: Tensor, shift: Tensor | None = None, *, cross: bool = False, start: Rows | None = None
    ) -> PairMoments:
        """Moments of the rows of `z_a` and `z_b` (N, d), differentiable in both.

        `shift` is as in `Moments.of`, and `start` the rows that the frozen start gives of the same notes, both sides.
        """
        if z_a.shape != z_b.shape:
            shapes = f"{tuple(z_a.shape)}, {tuple(z_b.shape)}"
            raise ValueError(f"Expected pairs of rows, z_a and z_b of one shape (n, d), but got {shapes}.")
        a, b = Moments.of(z_a, shift), Moments.of(z_b, shift)
        with torch.autocast(z_a.device.type, enabled=False):
            y_a, y_b = full_precision(z_a) - a.shift, full_precision(z_b) - b.shift
            anchor = None if start is None else AnchorMoments.of((z_a, z_b), start)
            return cls(a, b, (y_a * y_b).sum(), y_a.mT @ y_b if cross else None, anchor)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """All additive fields: five of a, five of b, `product_sum`, the cross moment and the anchor's, where there are."""
        cross = () if self.cross is None else (self.cross,)
        return (*self.a.sums, *self.b.sums, self.product_sum, *cross, *(self.anchor.sums if self.anchor else ()))

    def with_sums(self, sums: Iterable[Tensor]) -> PairMoments:
        """About the same shifts, other values of `sums`."""
        values = list(sums)
        a, b, rest = Moments(self.a.shift, *values[:5]), Moments(self.b.shift, *values[5:10]), values[11:]
        cross = None if self.cross is None else rest.pop(0)
        return PairMoments(a, b, values[10], cross, AnchorMoments(*rest) if rest else None)

    def detached(self, requires_grad: bool = False) -> PairMoments:
        """The same values as leaves of a new graph."""
        return self.with_sums(x.detach().requires_grad_(requires_grad) for x in self.sums)

    def about(self, shift_a: Tensor, shift_b: Tensor) -> PairMoments:
        """The same pairs about other shifts: (y_a + delta_a)(y_b + delta_b)^T and its trace, expanded."""
        if shift_a is self.a.shift and shift_b is self.b.shift:
            return self
        delta_a, delta_b = self.a.shift - shift_a, self.b.shift - shift_b
        moved_b = self.b.first + self.b.count * delta_b
        product_sum = self.product_sum + self.a.first @ delta_b + delta_a @ moved_b
        cross = self.cross
        if cross is not None:
            cross = torch.addr(torch.addr(cross, self.a.first, delta_b), delta_a, moved_b)
        return PairMoments(self.a.about(shift_a), self.b.about(shift_b), product_sum, cross, self.anchor)

    def __add__(self, other: PairMoments) -> PairMoments:
        # a missing moment is not zero: adding it would be silently wrong
        for name, option in (("cross", "cross"), ("anchor", "start")):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise ValueError(
                    f"Only one of these moments of pairs has `{name}`: pass `{option}` to both or neither."
                )
        other = other.about(self.a.shift, self.b.shift)
        return self.with_sums(x + y for x, y in zip(self.sums, other.sums, strict=True))

    def cross_covariance(self, center: bool) -> Tensor:
        """C_ab (d, d): Z_a^T Z_b / N, or about the means of both sides. ValueError without the cross moment."""
        if self.cross is None:
            raise ValueError("These moments have no cross moment: make them by PairMoments.of(..., cross=True).")
        n = self.a.count.clamp(min=1)
        centred = torch.addr(self.cross / n, self.a.first / n, self.b.first / n, alpha=-1)
        return centred if center else torch.addr(centred, self.a.mean, self.b.mean)


@dataclass(frozen=True)
class PairGradient:
    """Gradients of a function by `PairMoments.sums`, about the shifts of both sides; None stands for zeros.

    Moments are sums over rows, so with the gradients held constant that of <gradients, moments> by a row is the gradient of
    the function by that row: exact for any cut of the batch.
    """

    shifts: tuple[Tensor, Tensor]
    sums: tuple[Tensor | None, ...]
    cross: bool

    @classmethod
    def of(cls, pair: PairMoments, gradients: Sequence[Tensor | None]) -> PairGradient:
        """From autograd's gradients; the antisymmetric part of one by a second moment has no effect on any row."""
        sums = ((g + g.mT) / 2 if g is not None and i in SECOND else g for i, g in enumerate(gradients))
        return cls((pair.a.shift, pair.b.shift), tuple(sums), pair.cross is not None)

    @torch.no_grad()
    def pullback(self, z_a: Tensor, z_b: Tensor, start: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Gradients (N, d) with respect to the rows of both sides, any share of the pairs behind the moments."""
        with torch.autocast(z_a.device.type, enabled=False):
            y_a, y_b = (full_precision(z.detach()) - s for z, s in zip((z_a, z_b), self.shifts, strict=True))
            g_a, g_b = pullback(self.sums[:5], y_a), pullback(self.sums[5:10], y_b)
            product_sum, *rest = self.sums[10:]
            if product_sum is not None:
                g_a, g_b = g_a + product_sum * y_b, g_b + product_sum * y_a
            cross = rest.pop(0) if self.cross else None
            if cross is not None:  # <G, sum y_a y_b^T>: y_a sees G y_b, y_b sees G^T y_a
                g_a, g_b = g_a + y_b @ cross.mT, g_b + y_a @ cross
            if start is not None and rest:
                by_anchor = anchor_pullback(rest, (z_a, z_b), start)
                g_a, g_b = g_a + by_anchor[0], g_b + by_anchor[1]
        return g_a, g_b


def pullback(gradients: Sequence[Tensor | None], y: Tensor) -> Tensor:
    """Gradient (N, d) by rows y = z - shift of the gradients G by `Moments.sums`.

    G_first + 2 G_second y + |y|^2 G_w + 2 (G_w . y) y + 4 G_q |y|^2 y, with G_w and G_q those of the last two sums and
    G_second symmetric.
    """
    _, first, second, weighted, quartic = gradients
    first = y.new_zeros(y.shape[1]) if first is None else first
    gradient = first.expand_as(y) if second is None else torch.addmm(first, y, second, alpha=2)
    square = y.square().sum(1, keepdim=True)
    if weighted is not None:
        gradient = gradient + square * weighted + 2 * (y @ weighted).unsqueeze(1) * y
    return gradient if quartic is None else gradient + 4 * quartic * square * y
