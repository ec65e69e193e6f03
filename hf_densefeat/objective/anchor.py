"""The anchor: what unrelated notes are to each other stays what it was to the encoder that training started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_densefeat.objective.precision import full_precision

Rows = tuple[Tensor, Tensor]  # of both sides of the pairs, each (N, d)


@dataclass(frozen=True)
class AnchorMoments:
    """Sums over the rows x = z / |z| of both sides, and over the frozen start's rows f = z_0 / |z_0| of the same notes.

    Sums of parts of the rows are added. They are about zero and not about a shift: unit rows are small numbers.
    """

    count: Tensor  # 2N, rows of both sides, ()
    gram: Tensor  # sum x x^T, (d, d)
    cross: Tensor  # sum f x^T, (d0, d)
    start: Tensor  # sum f f^T, (d0, d0)
    partners: Tensor  # sum over the pairs (x_a . x_b - f_a . f_b)^2, ()

    @classmethod
    def of(cls, rows: Rows, start: Rows) -> AnchorMoments:
        """Sums over the rows of both sides, differentiable in them, and over those of the frozen start."""
        with torch.autocast(rows[0].device.type, enabled=False):
            x_a, x_b, f_a, f_b = (_unit(full_precision(z)) for z in (*rows, *start))
            x, f = torch.cat([x_a, x_b]), torch.cat([f_a, f_b])
            partners = ((x_a * x_b).sum(1) - (f_a * f_b).sum(1)).square().sum()
            return cls(x.new_tensor(float(len(x))), x.mT @ x, f.mT @ x, f.mT @ f, partners)

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All fields, which are additive."""
        return self.count, self.gram, self.cross, self.start, self.partners

    def value(self) -> Tensor:
        """Mean over pairs of unrelated rows i, j of (x_i . x_j - f_i . f_j)^2, ().

        Over all i, j the sum is ||X^T X||^2 - 2 ||F^T X||^2 + ||F^T F||^2 (Frobenius); a row with itself adds 0, and a row
        with its partner is taken away. In [0, 4] up to rounding; 0 at the start; 0 without gradient for fewer than two
        pairs, where no rows are unrelated.
        """
        n = self.count
        every = self.gram.square().sum() - 2 * self.cross.square().sum() + self.start.square().sum()
        return torch.where(n > 2, (every - 2 * self.partners) / (n * (n - 2)).clamp(min=1), 0)


def _unit(z: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay zeros, without gradient, and no length overflows."""
    scale = z.detach().abs().amax(1, keepdim=True)
    y = z / torch.where(scale == 0, 1, scale)
    return torch.where(scale == 0, 0, y / torch.where(scale == 0, 1, y.norm(dim=1, keepdim=True)))


def anchor_pullback(gradients: Sequence[Tensor | None], rows: Rows, start: Rows) -> Rows:
    """Gradients (N, d) by the rows of both sides, any share of the pairs, of the gradients by `AnchorMoments.sums`."""
    with torch.enable_grad():
        a, b = (full_precision(z.detach()).requires_grad_() for z in rows)
        sums = AnchorMoments.of((a, b), start).sums
        parts = [(g * s).sum() for g, s in zip(gradients, sums, strict=True) if g is not None]
        g_a, g_b = torch.autograd.grad(sum(parts, a.new_zeros(())), (a, b))
    return g_a, g_b
