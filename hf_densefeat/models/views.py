"""Views: affine maps in closed form that bring out what notes of a pair share, or what they do not share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_densefeat.models.head import DenseHead

VIEWS = ("content", "form")


class PairCovariances(NamedTuple):
    """Second moments of pairs of embeddings (z_a, z_b), each side about its own mean: all that the views need."""

    mean: Tensor  # (d,), of all rows, of both sides
    a: Tensor  # covariance (d, d) of the first side
    b: Tensor  # covariance (d, d) of the second side
    cross: Tensor  # C = E[(z_a - mu_a)(z_b - mu_b)^T] (d, d), not symmetric

    @classmethod
    def of(cls, z_a: Tensor, z_b: Tensor) -> PairCovariances:
        """Of embeddings (P, d), in float64: row i of `z_b` belongs to row i of `z_a`.

        Raises:
            ValueError: for sides of unlike shapes, no pair, or values that are not finite.
        """
        if z_a.shape != z_b.shape or z_a.ndim != 2 or len(z_a) == 0:
            raise ValueError(
                "Expected two sides of pairs, both of one shape (n, d) with n >= 1, but got "
                f"{tuple(z_a.shape)} and {tuple(z_b.shape)}."
            )
        if not (torch.isfinite(z_a).all() and torch.isfinite(z_b).all()):
            raise ValueError("Expected finite embeddings but got NaN or infinity; has the encoder diverged?")
        z_a, z_b = (z.detach().double().cpu() for z in (z_a, z_b))
        y_a, y_b = z_a - z_a.mean(0), z_b - z_b.mean(0)
        n = len(z_a)
        return cls((z_a.mean(0) + z_b.mean(0)) / 2, y_a.mT @ y_a / n, y_b.mT @ y_b / n, y_a.mT @ y_b / n)


def unshared_covariance(covariance_a: Tensor, covariance_b: Tensor, cross: Tensor) -> Tensor:
    """S_u = (Sigma_a + Sigma_b - C - C^T) / 2 (d, d): half the covariance of z_a - z_b, what the notes of a pair do not share.

    It is positive semidefinite, and 0 where both notes of every pair are alike.
    """
    return (covariance_a + covariance_b - cross - cross.mT) / 2


def shared_covariance(cross: Tensor) -> Tensor:
    """S_s (d, d): the non-negative part of (C + C^T) / 2, what the notes of a pair share.

    Directions in which the notes of a pair differ more than notes of different pairs have negative eigenvalues, set to 0.
    """
    values, vectors = torch.linalg.eigh((cross + cross.mT) / 2)
    return vectors * values.clamp(min=0) @ vectors.mT


def content_head(pairs: PairCovariances, *, epsilon: float, center: bool = True) -> DenseHead:
    """The map (z - mu)(S_u + epsilon u I)^(-1/2) V, u = tr S_u / d: cosine compares what the notes of a pair share.

    Relevant component analysis (Bar-Hillel, Hertz, Shental, Weinshall, JMLR 2005) and within-class covariance normalisation
    (Hatch, Kajarekar, Stolcke, 2006), with pairs as classes. V are the principal axes of the result, the largest first.
    Without anything unshared (one pair, or pairs of equal rows) the map is z - mu.

    Args:
        pairs: second moments of training pairs.
        epsilon: >= 0; inf for z - mu. At 0, and with fewer pairs than d, directions that no pair tells of go to 0.
        center: subtract mu, which masked-LM encoders need; without, mu is 0.

    Raises:
        ValueError: for an epsilon below 0 or NaN.
    """
    return _whitened(pairs, unshared_covariance(pairs.a, pairs.b, pairs.cross), epsilon, center)


def form_head(
    pairs: PairCovariances, *, epsilon: float, center: bool = True, halves: PairCovariances | None = None
) -> DenseHead:
    """The map (z - mu)(S_s + epsilon s I)^(-1/2) V, s = tr S_s / d: cosine compares what the notes of a pair do not share.

    That is the kind of text where pairs share the matter, and chance. Chance is what the halves of a note do not share: with
    `halves`, the mean of S_s and their S_u, each at mean eigenvalue 1, takes the place of S_s. Other arguments as of
    `content_head`; if S_s has no positive eigenvalue and there are no halves, the map is z - mu.
    """
    noise = shared_covariance(pairs.cross)
    if halves is not None:
        chance = unshared_covariance(halves.a, halves.b, halves.cross)
        noise = (_at_level_one(noise) + _at_level_one(chance)) / 2
    return _whitened(pairs, noise, epsilon, center)


def _at_level_one(covariance: Tensor) -> Tensor:
    level = covariance.trace() / len(covariance)
    return covariance / level if level > 0 else covariance


def _whitened(pairs: PairCovariances, noise: Tensor, epsilon: float, center: bool) -> DenseHead:
    spread = (pairs.a + pairs.b) / 2
    if not center:  # the axes of a map without centring are those of the second moment about 0
        spread = torch.addr(spread, pairs.mean, pairs.mean)
    mean = pairs.mean if center else torch.zeros_like(pairs.mean)
    return DenseHead.of_covariance(mean, noise, epsilon=epsilon, spread=spread)
