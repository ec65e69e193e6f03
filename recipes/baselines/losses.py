"""Losses on pairs of embeddings that a user might train instead, each as its paper has it.

Of Z_a, Z_b (n, d), row i of b after row i of a, or another view of it. Train one by `DenseTrainer(objective=BatchLoss(...))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def info_nce(z_a: Tensor, z_b: Tensor, temperature: float = 0.05) -> Tensor:
    """Contrastive loss: row i of one side is to find row i of the other among all n by its cosine.

    Mean over rows and both directions of -log softmax_j(cos(a_i, b_j) / temperature) at j = i: equation 1 of SimCSE
    (Gao et al., 2021), whose temperature is 0.05, made symmetric as in CLIP. With both sides the same notes under two
    dropout masks it is unsupervised SimCSE. In [0, log n + 2 / temperature]; 0 for one pair. Rows of zeros have cosine 0.
    """
    logits = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).mT / temperature
    target = torch.arange(len(z_a), device=z_a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


def vicreg(
    z_a: Tensor, z_b: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """VICReg (Bardes et al., 2022): invariance s + variance v + covariance c, weights 25, 25 and 1.

    s = mean squared difference; v = mean over columns and sides of relu(1 - sqrt(var + 1e-4)); c = sum over sides of the
    squared off-diagonal covariances, divided by d. Variances divide by n - 1, as published; one pair has variance 0.
    """
    similar = F.mse_loss(z_a, z_b)
    spread = redundant = z_a.new_zeros(())
    for z in (z_a, z_b):
        rows = z - z.mean(0)
        cov = rows.mT @ rows / max(len(z) - 1, 1)
        spread = spread + F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean() / 2
        redundant = redundant + _off_diagonal(cov).square().sum() / z.shape[1]
    return invariance * similar + variance * spread + covariance * redundant


def barlow_twins(z_a: Tensor, z_b: Tensor, redundancy: float = 0.0051) -> Tensor:
    """Barlow Twins (Zbontar et al., 2021): sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2.

    C is the cross-correlation of both sides, columns standardised as by a BatchNorm (variance / n, + 1e-5). The weight
    of the off-diagonal terms is that of the authors' code, 0.0051; the paper rounds it to 0.005. A constant column reads 1.
    """
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_a, z_b))
    correlation = a.mT @ b / len(a)
    return (1 - correlation.diagonal()).square().sum() + redundancy * _off_diagonal(correlation).square().sum()


def von_neumann_entropy(z: Tensor) -> Tensor:
    """-sum_i l_i log l_i of the eigenvalues of Z^T Z / n, rows of Z scaled to length 1 (VNE; Kim et al., 2023).

    In [0, log min(n, d)]: the log of the effective rank of the normalised, uncentred rows. Eigenvalues at the level of
    rounding count as 0, without gradient, which the authors' code leaves NaN. All zeros: 0.
    """
    rows = F.normalize(z, dim=1)
    # the smaller of both: they have the same non-zero eigenvalues
    gram = (rows @ rows.mT if len(z) < z.shape[1] else rows.mT @ rows) / len(z)
    values = torch.linalg.eigvalsh(gram)
    resolved = values > len(gram) * torch.finfo(values.dtype).eps
    # entr(1) = 0, with a finite gradient, which entr(0) has not
    return torch.special.entr(torch.where(resolved, values, 1)).sum()


def i_vne(z_a: Tensor, z_b: Tensor, entropy: float = 1.0) -> Tensor:
    """I-VNE+ (Kim et al., 2023): -(log(n) mean cosine of the pairs + entropy VNE), VNE the mean over both sides.

    The weights are those of the authors' code: 4.16 = log 64 on the cosine for batches of 64, and 1 on the entropy.
    """
    cosine = F.cosine_similarity(z_a, z_b).mean()
    return -(math.log(len(z_a)) * cosine + entropy * (von_neumann_entropy(z_a) + von_neumann_entropy(z_b)) / 2)


def sigreg(z: Tensor, directions: Tensor, knots: int = 17, most: float = 3.0) -> Tensor:
    """SIGReg (Balestriero and LeCun, 2025): the Epps-Pulley statistic of Z's projections, mean over the directions.

    For x = Z u: n times the integral over t in [-most, most] of |mean exp(itx) - exp(-t^2/2)|^2 exp(-t^2/2) dt, by the
    trapezoidal rule on `knots` points of [0, most], doubled. 0 where every projection is standard normal.

    Args:
        z: embeddings (n, d).
        directions: unit columns (d, m), drawn anew for each batch; see `lejepa`.
        knots: of the quadrature.
        most: end of the integral.
    """
    t = torch.linspace(0, most, knots, device=z.device, dtype=z.dtype)
    normal = torch.exp(-t.square() / 2)
    # the trapezoidal rule on [0, most], doubled for the negative half
    weights = torch.full_like(t, 2 * most / (knots - 1))
    weights[0] = weights[-1] = most / (knots - 1)
    angles = (z @ directions).unsqueeze(-1) * t
    # the characteristic function of the projections against the normal one, whose imaginary part is 0
    error = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
    return len(z) * (error @ (weights * normal)).mean()


def lejepa(z_a: Tensor, z_b: Tensor, weight: float = 0.02, directions: int = 256) -> Tensor:
    """LeJEPA of two views: (1 - weight) mean squared distance to the views' mean + weight SIGReg, mean over the views.

    Weight 0.02, 17 knots on [0, 3] and 256 fresh random directions are those of the authors' minimal implementation.
    """
    u = F.normalize(torch.randn(z_a.shape[1], directions, device=z_a.device, dtype=z_a.dtype), dim=0)
    prediction = ((z_a - z_b) / 2).square().mean()
    return (1 - weight) * prediction + weight * (sigreg(z_a, u) + sigreg(z_b, u)) / 2


def unshared_variance(z_a: Tensor, z_b: Tensor) -> Tensor:
    """1 - 2 tr C_ab / (tr Sigma_a + tr Sigma_b), all centred: the share of the variance that paired rows do not share.

    Unlike L_sub it sees which row follows which: 0 where z_b = z_a up to a shift, 1 for unrelated rows, at most 2. An
    experiment of ours, no paper's. Without variance it is 1, without gradient.
    """
    a, b = z_a - z_a.mean(0), z_b - z_b.mean(0)
    total = a.square().sum() + b.square().sum()
    # a variance that is rounding of the raw values is none
    varies = total > torch.finfo(total.dtype).eps ** 2 * (z_a.square().sum() + z_b.square().sum())
    return 1 - 2 * (a * b).sum() / torch.where(varies, total, torch.inf)


def _off_diagonal(square: Tensor) -> Tensor:
    return square - torch.diag(square.diagonal())


class Expanded(nn.Module):
    """A loss of a three-layer MLP of both sides, as VICReg, Barlow Twins, VNE and LeJEPA have it; probes see what is below.

    Linear, BatchNorm, ReLU twice, then Linear without bias; in a `BatchLoss` it is trained along. Batches need two pairs.

    Args:
        loss: function of (z_a, z_b).
        width: d of the embedding.
        hidden: width of all three layers; the papers take four times that of the embedding.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], width: int, hidden: int | None = None):
        super().__init__()
        self.loss, hidden = loss, hidden or 4 * width
        layers = [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        layers += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.expander = nn.Sequential(*layers, nn.Linear(hidden, hidden, bias=False))

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of the expanded sides."""
        return self.loss(self.expander(z_a), self.expander(z_b))
