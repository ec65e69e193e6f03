"""Terms beside the paper's three, functions of the same moments; none is trained unless `terms` of the objective names it.

`DenseObjective(terms={"rank_deficit": 0.1})` takes one by its name. Any function of `Statistics` can be one; the study has
more of them (`recipes/study/terms.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_densefeat.objective.statistics import Statistics, TermFunction
from hf_densefeat.objective.subspace import eigenspace


def unshared_variance(s: Statistics) -> Tensor:
    """1 - 2 tr C_ab / (tr S_a + tr S_b), all of this update and centred: the share of variance that pairs do not share.

    L_pair, of weight `lambda_pair` in `DenseTrainingArguments`. In [0, 2]: 0 where b = a up to a constant shift, 1 for
    unrelated sides. It equals the mean squared difference of centred pairs over the total variance: 1 minus the intraclass
    correlation of pairs (Fisher, 1925), and half the mean Delta-value of slow feature analysis (Wiskott and Sejnowski,
    2002). It sees which note follows which, where L_sub compares marginal subspaces. Without variance it is 1, without
    gradient.
    """
    pair, n = s.pair, s.a.count
    a, b = pair.a.first / n, pair.b.first / n
    total = (pair.a.second.trace() + pair.b.second.trace()) / n - a @ a - b @ b
    varies = total > pair.a.resolution(True).sum() + pair.b.resolution(True).sum()
    # tr C_ab about both means needs no cross moment but its trace
    return torch.where(varies, 1 - 2 * (pair.product_sum / n - a @ b) / torch.where(varies, total, 1), 1)


def anchor(s: Statistics) -> Tensor:
    """Mean over pairs of unrelated notes of (cos - cos of the frozen start)^2, of this update: see `AnchorMoments.value`.

    It keeps what the start knows of unrelated notes, where a contrastive start is trained on few pairs; a note and its
    partner are left out. Distillation of similarities (Tung and Mori, 2019; Park et al., 2019), exact for any cut of the
    batch. In [0, 4], 0 at the start. ValueError where the moments were made without the rows of the start.
    """
    if s.pair.anchor is None:
        raise ValueError("The anchor needs the rows of the frozen start: objective(z_a, z_b, start=(rows_a, rows_b)).")
    return s.pair.anchor.value()


anchor.needs_start = True  # type: ignore[attr-defined]


def rank_deficit(s: Statistics) -> Tensor:
    """log(d / r), r = exp(-sum_i p_i log p_i) the effective rank (Roy and Vetterli, 2007) of both sides' covariance.

    Of the normalised eigenvalues p it is KL(p || uniform): log d minus the von Neumann entropy that VNE (Kim et al., 2023)
    maximises, there of the uncentred covariance of unit rows. The gradient by log p_i is p_i (log p_i - sum_j p_j log p_j),
    against 2 p_i (p_i - sum_j p_j^2) of L_spec: directions below the mean are lifted by more, and a direction without
    variance, to rounding, not at all. In [0, log d], 0 for an isotropic covariance;
    rotation- and scale-invariant. Without variance it is log d, without gradient.
    """
    scaled, varies = normalised(s)
    share = eigenvalues(scaled) / s.dimension
    resolved = varies & (share > s.dimension * torch.finfo(share.dtype).eps * share.detach().amax())
    # entr(1) = 0, with a finite gradient, which entr(0) has not
    entropy: Tensor = torch.special.entr(torch.where(resolved, share, 1)).sum()
    return math.log(s.dimension) - entropy


def normalised(s: Statistics) -> tuple[Tensor, Tensor]:
    """Covariance of both sides at mean eigenvalue 1 (d, d), and whether it varies."""
    trace = s.pooled.trace()
    varies = trace > s.resolution.sum()
    return s.pooled * (s.dimension / torch.where(varies, trace, 1)), varies


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues (d,), largest first and at least 0, whose gradient has no differences of eigenvalues."""
    vectors = eigenspace(matrix).basis
    # l_i = u_i^T S u_i with u_i held constant has the value and the gradient of the eigenvalue
    values: Tensor = (vectors * (matrix @ vectors)).sum(0).clamp(min=0)
    return values


EXTRA_TERMS: dict[str, TermFunction] = {
    "unshared_variance": unshared_variance,
    "anchor": anchor,
    "rank_deficit": rank_deficit,
}
