"""The paper's terms and the unshared variance together: values, and one gradient of both sides in few passes over d x d.

The functions of `terms.py` and `subspace.py` and `UnsharedVariance` say what the terms are; a chain of them under autograd
writes some forty d x d matrices an update. Their gradients by the covariances of both sides share one matrix, the pooled
covariance P at trace 1: with t the trace of the pooled covariance and o the product entry by entry,

    dL_spec / dSigma_x = (P - ||P||_F^2 I) / t
    dL_orth / dSigma_x = (w w^T o P - diag(w^2 r)) / t,   w = 1 / diag P,  r = (P o P) w
    dL_sub  / dSigma_x = H_x U_x^T + U_x H_x^T                                              (`subspace.distance_gradients`)

and only the last, of rank 2k, differs between the sides. Of the unshared variance 1 - 2 h / T, with h = tr C_ab and T = tr
Sigma_a + tr Sigma_b of this update, centred, the gradient by Sigma_x is (2 h / T^2) I and that by C_ab is -(2 / T) I, so
that no cross moment is needed but its trace. Tests hold both ways equal.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_densefeat.objective.moments import MomentsGradient, PairGradient, PairMoments
from hf_densefeat.objective.running import Average, Observed, inner
from hf_densefeat.objective.subspace import Eigenspace, distance_gradients, distance_squared

Weight = Tensor | float | None
CLOSED = ("spectral_spreading", "subspace_consistency", "orthogonality", "unshared_variance")


class ClosedForm:
    """What the values and the gradient share, as numbers.

    Args:
        pair: the moments of this update, without gradient.
        sides: both sides of this update.
        averages: of both sides the running average of Sigma / tr Sigma, or None: Sigma is that of this update.
        spaces: eigenspaces of both covariances.
        k: dimension of the leading subspaces.
        broadening: of their gradient.
    """

    def __init__(
        self,
        pair: PairMoments,
        sides: tuple[Observed, Observed],
        averages: tuple[Average | None, Average | None],
        spaces: tuple[Eigenspace, Eigenspace],
        k: int,
        broadening: float,
    ):
        self.pair, self.sides, self.averages, self.spaces = pair, sides, averages, spaces
        self.k, self.broadening = k, broadening
        self.resolution = (sides[0].resolution + sides[1].resolution) / 2

    def values(self) -> tuple[Tensor, ...]:
        """The values of `CLOSED`, in that order; L_orth is right for centred sides alone."""
        return (
            self.spectral_spreading(),
            distance_squared(*self.spaces, self.k),
            self.orthogonality(),
            self._unshared[0],
        )

    def spectral_spreading(self) -> Tensor:
        """L_spec: as `terms.spectral_spreading` of the pooled covariance."""
        return torch.where(self._resolved, self.purity, 1) - 1 / len(self.resolution)

    def orthogonality(self) -> Tensor:
        """L_orth of this update, for centred sides: as `terms.orthogonality` of the pooled covariance."""
        _, inverse, rows = self._standardised
        return inverse @ rows + len(inverse) - 2 * inverse.count_nonzero()

    def gradient(self, spread: Weight, subspace: Weight, orthogonal: Weight, unshared: Weight = None) -> PairGradient:
        """Gradient by the moments of the terms weighted by what is given; None and 0 cost nothing."""
        averaged = self.averages[0] is not None
        base = self._shared(spread, None if averaged else orthogonal)
        factors = distance_gradients(*self.spaces, self.k, self.broadening) if subspace is not None else None
        own = self._orthogonal_gradient(orthogonal) if averaged and orthogonal is not None else None
        grads = []
        for i, (side, average) in enumerate(zip(self.sides, self.averages, strict=True)):
            if factors is not None and subspace is not None:
                # the second side's in place: nobody needs `base` after it
                g = torch.addmm(base, factors[i][0] * subspace, factors[i][1].mT, out=base if i else None)
            else:
                g = base if i else base.clone()
            if average is not None:
                # Sigma = average x trace of this update, whose normalised covariance has the gradient of the average's
                g.diagonal().add_(inner(g, average.covariance) - inner(g, side.normalised))
            if own is not None:
                g.add_(own)
            g.mul_(side.varies / side.count)  # rounding has no gradient
            # N Sigma = second - first first^T / N; uncentred the terms with the shift: first shift^T + shift first^T
            first = g @ (side.moments.first * (-2 / side.count) if side.center else 2 * side.moments.shift)
            grads.append(MomentsGradient(side.moments.shift, first, g))
        product_sum = None if unshared is None else self._add_unshared(grads, unshared)
        return PairGradient(grads[0], grads[1], product_sum)

    def _add_unshared(self, grads: list[MomentsGradient], weight: Tensor | float) -> Tensor:
        """Add the gradient of the unshared variance by either side's moments in place; returns that by `product_sum`."""
        _, shared, total, varies = self._unshared
        n = self.sides[0].count
        by_shared = -2 / total / n * varies * weight
        by_total = 2 * shared / total.square() / n * varies * weight
        for own, side, other in zip(grads, self.sides, self.sides[::-1], strict=True):
            own.second.diagonal().add_(by_total)
            own.first.sub_((2 * by_total * side.moments.first + by_shared * other.moments.first) / n)
        return by_shared

    @cached_property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """P, the mean of both covariances over its trace (d, d), and the trace, 1 where nothing varies."""
        return self._mean_of([scaled(x, a) for x, a in zip(self.sides, self.averages, strict=True)])

    @cached_property
    def batch_pooled(self) -> tuple[Tensor, Tensor]:
        """The same of this update alone."""
        return self.pooled if self.averages[0] is None else self._mean_of([scaled(x, None) for x in self.sides])

    @cached_property
    def purity(self) -> Tensor:
        """||P||_F^2, ()."""
        return inner(self.pooled[0], self.pooled[0])

    @cached_property
    def _unshared(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.pair.unshared_variance()

    @cached_property
    def _resolved(self) -> Tensor:
        # a trace that is no number counts as resolved, so that the loss is none either and the update is skipped
        return ~((self.sides[0].trace + self.sides[1].trace) / 2 <= self.resolution.sum())

    def _mean_of(self, weighted: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(X_a c_a + X_b c_b) / 2 over its trace, and the trace."""
        (x_a, c_a), (x_b, c_b) = weighted
        trace = (x_a.trace() * c_a + x_b.trace() * c_b) / 2
        trace = torch.where(trace > self.resolution.sum(), trace, 1)
        return (x_a * (c_a / (2 * trace))).addcmul_(x_b, c_b / (2 * trace)), trace

    @cached_property
    def _standardised(self) -> tuple[Tensor, Tensor, Tensor]:
        """P of this update, w = 1 / diag P, 0 for constant columns, and r = (P o P) w."""
        pooled, trace = self.batch_pooled
        variance = pooled.diagonal()
        varies = variance * trace > self.resolution
        inverse = torch.where(varies, 1 / torch.where(varies, variance, 1), 0)
        return pooled, inverse, pooled.square() @ inverse

    def _shared(self, spread: Weight, orthogonal: Weight) -> Tensor:
        """Gradient by either covariance of L_spec, and without averages of L_orth, as a new matrix (d, d)."""
        pooled, trace = self.pooled
        weight = self._resolved / trace * (0.0 if spread is None else spread)
        shared = pooled * weight if orthogonal is None else self._orthogonal_gradient(orthogonal).add_(pooled * weight)
        shared.diagonal().sub_(weight * self.purity)
        return shared

    def _orthogonal_gradient(self, weight: Tensor | float) -> Tensor:
        pooled, inverse, rows = self._standardised
        weighted = inverse * (weight / self.batch_pooled[1])
        gradient = torch.outer(weighted, inverse).mul_(pooled)
        gradient.diagonal().sub_(weighted * inverse * rows)
        return gradient


def scaled(side: Observed, average: Average | None) -> tuple[Tensor, Tensor]:
    """Sigma of a side as a matrix (d, d) and the scalar that multiplies it."""
    return (side.scatter, 1 / side.count) if average is None else (average.covariance, side.trace)


class _ValuesOfMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: ClosedForm, *moments: Tensor) -> tuple[Tensor, ...]:
        ctx.form = form
        ctx.set_materialize_grads(False)  # a term that is not in the loss costs no gradient
        return form.values()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = ctx.form.gradient(*grads)
        a, b = gradient.a, gradient.b
        return None, a.first, a.second, b.first, b.second, gradient.product_sum


class _ValuesOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: ClosedForm, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, ...]:
        ctx.form = form
        ctx.save_for_backward(z_a, z_b)
        ctx.set_materialize_grads(False)
        return form.values()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z_a, z_b = ctx.saved_tensors
        g_a, g_b = ctx.form.gradient(*grads).pullback(z_a, z_b)
        return None, g_a.to(z_a.dtype), g_b.to(z_b.dtype)


def values_of_moments(form: ClosedForm, pair: PairMoments) -> tuple[Tensor, ...]:
    """The values of `CLOSED`, differentiable in the moments of the pairs behind `form`."""
    moments = pair.a.first, pair.a.second, pair.b.first, pair.b.second, pair.product_sum
    values: tuple[Tensor, ...] = _ValuesOfMoments.apply(form, *moments)  # type: ignore[no-untyped-call]
    return values


def values_of_rows(form: ClosedForm, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, ...]:
    """The same, differentiable in the rows behind the moments, without autograd on the way."""
    values: tuple[Tensor, ...] = _ValuesOfRows.apply(form, z_a, z_b)  # type: ignore[no-untyped-call]
    return values
