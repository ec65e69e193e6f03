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

from typing import Any

import torch
from torch import Tensor

from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.objective.statistics import Statistics, inner
from hf_densefeat.objective.subspace import distance_gradients, distance_squared

Pooled = tuple[Tensor, Tensor]  # P (d, d), and the trace t, 1 where nothing varies


def pooled_of(seen: Statistics, *, batch: bool = False) -> Pooled:
    """P and t of the covariances that the terms see, or with `batch` of this update's alone; without gradient."""
    one = torch.ones_like(seen.a.trace)
    sides = seen.a, seen.b
    (x_a, c_a), (x_b, c_b) = ((side.batch_covariance, one) if batch else side.scaled for side in sides)
    trace = (x_a.trace() * c_a + x_b.trace() * c_b) / 2
    trace = torch.where(trace > seen.resolution.sum(), trace, 1)
    return (x_a * (c_a / (2 * trace))).addcmul_(x_b, c_b / (2 * trace)), trace


def paper_terms(seen: Statistics, pooled: Pooled, pair: PairMoments) -> tuple[Tensor, Tensor, Tensor]:
    """L_spec, L_sub and L_orth, differentiable in `pair`; L_orth for centred sides alone.

    `seen` are the statistics of the same moments without gradient, and `pooled` is `pooled_of(seen)`.
    """
    moments = pair.a.first, pair.a.second, pair.b.first, pair.b.second
    values: tuple[Tensor, Tensor, Tensor] = _PaperTerms.apply(seen, pooled, *moments)  # type: ignore[no-untyped-call]
    return values


class _PaperTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, seen: Statistics, pooled: Pooled, *moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        purity = inner(pooled[0], pooled[0])
        # a NaN trace counts as resolved, so that the loss is NaN too and the update is skipped
        resolved = ~((seen.a.trace + seen.b.trace) / 2 <= seen.resolution.sum())
        batch, trace = pooled if seen.a.average is None else pooled_of(seen, batch=True)
        variance = batch.diagonal()
        varies = variance * trace > seen.resolution
        inverse = torch.where(varies, 1 / torch.where(varies, variance, 1), 0)
        rows = batch.square() @ inverse
        ctx.set_materialize_grads(False)  # a term that is not in the loss costs no gradient
        ctx.seen, ctx.pooled, ctx.spread, ctx.columns = seen, pooled, (purity, resolved), (batch, trace, inverse, rows)
        spread = torch.where(resolved, purity, 1) - 1 / len(inverse)
        orthogonal = inverse @ rows + len(inverse) - 2 * inverse.count_nonzero()
        return spread, distance_squared(seen.a.eigenspace, seen.b.eigenspace, seen.subspace_dim), orthogonal

    @staticmethod
    def backward(
        ctx: Any, spread: Tensor | None, subspace: Tensor | None, orthogonal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        seen, (pooled, trace), (purity, resolved) = ctx.seen, ctx.pooled, ctx.spread
        with torch.autocast(pooled.device.type, enabled=False):
            weight = resolved / trace * (0.0 if spread is None else spread)
            base = pooled * weight
            base.diagonal().sub_(weight * purity)
            own = None if orthogonal is None else _orthogonality_gradient(orthogonal, *ctx.columns)
            if own is not None and seen.a.average is None:  # of the same covariances
                base, own = base.add_(own), None
            spaces, grads = (seen.a.eigenspace, seen.b.eigenspace), []
            factors = distance_gradients(*spaces, seen.subspace_dim, seen.broadening) if subspace is not None else []
            for i, side in enumerate((seen.a, seen.b)):
                g = base if i else base.clone()  # the second side's in place: nobody needs `base` after it
                if subspace is not None:
                    g.addmm_(factors[i][0] * subspace, factors[i][1].mT)
                if side.average is not None:
                    # Sigma = average x trace of this update, whose normalised covariance has the gradient of the average's
                    g.diagonal().add_(inner(g, side.average.covariance) - inner(g, side.batch_normalised))
                if own is not None:
                    g.add_(own)
                g.mul_(side.varies / side.count)  # rounding has no gradient
                # N Sigma = second - first first^T / N; uncentred the terms with the shift: first shift^T + shift first^T
                first = g @ (side.moments.first * (-2 / side.count) if side.center else 2 * side.moments.shift)
                grads += [first, g]
        return None, None, *grads


def _orthogonality_gradient(weight: Tensor, batch: Tensor, trace: Tensor, inverse: Tensor, rows: Tensor) -> Tensor:
    """By either covariance: (w w^T o P - diag(w^2 r)) weight / t, with w `inverse`, 0 for constant columns, and r `rows`."""
    weighted = inverse * (weight / trace)
    gradient = torch.outer(weighted, inverse).mul_(batch)
    gradient.diagonal().sub_(weighted * inverse * rows)
    return gradient
