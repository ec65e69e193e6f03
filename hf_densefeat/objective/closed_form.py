"""The paper's three terms: values, and one gradient of both sides in few passes over d x d.

The functions of `terms.py` and `subspace.py` say what the terms are; a chain of them under autograd writes some forty d x d
matrices an update. Their gradients by the covariances of both sides share one matrix, the pooled covariance P at trace 1:
with t the trace of the pooled covariance and o the product entry by entry,

    dL_spec / dSigma_x = (P - ||P||_F^2 I) / t
    dL_orth / dSigma_x = (w w^T o P - diag(w^2 r)) / t,   w = 1 / diag P,  r = (P o P) w
    dL_sub  / dSigma_x = H_x U_x^T + U_x H_x^T                                              (`subspace.distance_gradients`)

and only the last, of rank 2k, differs between the sides. Tests hold both ways equal.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.objective.statistics import Statistics, inner
from hf_densefeat.objective.subspace import Eigenspace, distance_gradients, distance_squared


class ClosedForm:
    """What the values and the gradient share, as numbers.

    Args:
        seen: of this update, without gradient; L_orth is for centred sides alone.
    """

    def __init__(self, seen: Statistics):
        self.seen, self.sides, self.resolution = seen, (seen.a, seen.b), seen.resolution
        self.averaged = seen.a.average is not None

    def values(self, pair: PairMoments) -> tuple[Tensor, Tensor, Tensor]:
        """L_spec, L_sub and L_orth, differentiable in `pair`, whose numbers these are."""
        moments = pair.a.first, pair.a.second, pair.b.first, pair.b.second
        values: tuple[Tensor, Tensor, Tensor] = _Values.apply(self, *moments)  # type: ignore[no-untyped-call]
        return values

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """The values without gradient; L_spec and L_orth as the functions of `terms.py` of the pooled covariance."""
        spread = torch.where(self._resolved, self.purity, 1) - 1 / len(self.resolution)
        _, inverse, rows = self._standardised
        orthogonal = inverse @ rows + len(inverse) - 2 * inverse.count_nonzero()
        return spread, distance_squared(*self._spaces, self.seen.subspace_dim), orthogonal

    def gradient(self, spread: Tensor | None, subspace: Tensor | None, orthogonal: Tensor | None) -> list[Tensor]:
        """Gradient by first and second of a, then of b, of the terms weighted by what is given; None costs nothing."""
        pooled, trace = self.pooled
        weight = self._resolved / trace * (0.0 if spread is None else spread)
        base = pooled * weight
        base.diagonal().sub_(weight * self.purity)
        own = None if orthogonal is None else self._orthogonal_gradient(orthogonal)
        if own is not None and not self.averaged:  # of the same covariances
            base, own = base.add_(own), None
        factors = None
        if subspace is not None:
            factors = distance_gradients(*self._spaces, self.seen.subspace_dim, self.seen.broadening)
        grads = []
        for i, side in enumerate(self.sides):
            if factors is not None and subspace is not None:
                # the second side's in place: nobody needs `base` after it
                g = torch.addmm(base, factors[i][0] * subspace, factors[i][1].mT, out=base if i else None)
            else:
                g = base if i else base.clone()
            if side.average is not None:
                # Sigma = average x trace of this update, whose normalised covariance has the gradient of the average's
                g.diagonal().add_(inner(g, side.average.covariance) - inner(g, side.batch_normalised))
            if own is not None:
                g.add_(own)
            g.mul_(side.varies / side.count)  # rounding has no gradient
            # N Sigma = second - first first^T / N; uncentred the terms with the shift: first shift^T + shift first^T
            first = g @ (side.moments.first * (-2 / side.count) if side.center else 2 * side.moments.shift)
            grads += [first, g]
        return grads

    @cached_property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """P, the mean of both covariances over its trace (d, d), and the trace, 1 where nothing varies."""
        return self._mean_of([side.scaled for side in self.sides])

    @cached_property
    def batch_pooled(self) -> tuple[Tensor, Tensor]:
        """The same of this update alone."""
        one = torch.ones_like(self.resolution.sum())
        return self._mean_of([(side.batch_covariance, one) for side in self.sides]) if self.averaged else self.pooled

    @cached_property
    def purity(self) -> Tensor:
        """||P||_F^2, ()."""
        return inner(self.pooled[0], self.pooled[0])

    @property
    def _spaces(self) -> tuple[Eigenspace, Eigenspace]:
        return self.seen.a.eigenspace, self.seen.b.eigenspace

    @cached_property
    def _resolved(self) -> Tensor:
        # a NaN trace counts as resolved, so that the loss is NaN too and the update is skipped
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

    def _orthogonal_gradient(self, weight: Tensor) -> Tensor:
        pooled, inverse, rows = self._standardised
        weighted = inverse * (weight / self.batch_pooled[1])
        gradient = torch.outer(weighted, inverse).mul_(pooled)
        gradient.diagonal().sub_(weighted * inverse * rows)
        return gradient


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: ClosedForm, *moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.form = form
        ctx.set_materialize_grads(False)  # a term that is not in the loss costs no gradient
        return form.numbers()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.form.resolution.device.type, enabled=False):
            return None, *ctx.form.gradient(*grads)
