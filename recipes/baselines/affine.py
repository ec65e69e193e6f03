"""Affine maps of embeddings after training, in closed form: z -> (z - mean) @ matrix."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def fit_whitening(z: Tensor, floor: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Mean (d,) and matrix (d, d) after which these rows (N, d) have covariance I (Su et al., 2021), for `apply_affine`.

    ZCA, which moves the rows least. Directions with less than `floor` of the largest variance, which rounding of float32
    fills and a LayerNorm leaves empty, go to 0: the covariance is then a projector.
    """
    mean = z.double().mean(0)
    rows = z.double() - mean
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(z))
    kept = values > floor * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(kept, values, torch.inf).rsqrt()
    return mean, vectors * scale @ vectors.mT


@torch.no_grad()
def fit_all_but_the_top(z: Tensor, directions: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and matrix that removes the leading directions of these rows (N, d), for `apply_affine`.

    All-but-the-top (Mu and Viswanath, 2018): d/100 directions, rounded, one at least, unless `directions` says how many.
    """
    mean = z.double().mean(0)
    rows = z.double() - mean
    count = max(1, round(z.shape[1] / 100)) if directions is None else directions
    top = torch.linalg.eigh(rows.mT @ rows)[1][:, z.shape[1] - count :]
    return mean, torch.eye(z.shape[1], dtype=torch.float64) - top @ top.mT


def apply_affine(z: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """(z - mean) @ matrix, in float64, back in the dtype of z."""
    return ((z.double() - mean) @ matrix).to(z.dtype)
