"""Affine maps of embeddings in closed form, kept beside the encoder: the dense head, and content and form views by pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_densefeat.models.modules import SentenceModule, dense_options

VIEWS = ("content", "form")  # what notes of a pair share, and what they do not share


@dataclass(frozen=True, eq=False)
class DenseHead:
    """z -> (z - mu) V (Lambda + epsilon l I)^(-1/2): mean mu, covariance V Lambda V^T of training notes, l = tr Lambda / d.

    epsilon = inf is centring alone, z - mu in the basis of z: the mean cosine of unrelated notes goes to about 0 and
    distances stay as they are. A finite epsilon scales the principal axes, the largest first, so that cutting an
    embedding after its first dimensions loses the least; epsilon -> 0 is full whitening (Su et al., 2021). A large epsilon
    keeps form and coarse topics, a small one finds fine content: shrinkage as in Ledoit and Wolf (2004).

    Attributes:
        mean: mu (d,), float64.
        matrix: V (Lambda + epsilon l I)^(-1/2) (d, d), float64, or I.
        epsilon: see above; inf for centring alone.
        pairs: kind of the pairs that it was fitted on, of `data.pairs`; "" for none.
    """

    mean: Tensor
    matrix: Tensor
    epsilon: float
    pairs: str = ""

    @classmethod
    def fit(cls, z: Tensor, *, epsilon: float = math.inf) -> DenseHead:
        """Fit on embeddings (N, d) of training notes.

        A direction without variance (N < d, constant features) is divided by sqrt(epsilon l), the smallest divisor; with
        epsilon 0 it is set to 0. Equal rows, and a single row, are centred only.

        Raises:
            ValueError: for no rows, values that are not finite, or an epsilon below 0 or NaN.
        """
        if z.ndim != 2 or len(z) == 0:
            raise ValueError(f"Expected embeddings of shape (n, d), n >= 1, but got {tuple(z.shape)}.")
        if not torch.isfinite(z).all():
            raise ValueError("Expected finite embeddings but got NaN or infinity; has the encoder diverged?")
        rows = z.detach().double().cpu()
        mean = rows.mean(0)
        centred = rows - mean
        return cls.of_covariance(mean, centred.mT @ centred / len(rows), epsilon=epsilon)

    @classmethod
    def of_covariance(
        cls, mean: Tensor, covariance: Tensor, *, epsilon: float = math.inf, spread: Tensor | None = None
    ) -> DenseHead:
        """The map (z - mean)(covariance + epsilon l I)^(-1/2) V, l = tr covariance / d, V the principal axes of the result.

        Args:
            mean: (d,).
            covariance: (d, d), of the directions that are to count for less.
            epsilon: inf, or no covariance, gives z - mean in the basis of z.
            spread: covariance (d, d) of the embeddings, by which the axes are ordered; by default `covariance`.
        """
        if not epsilon >= 0:
            raise ValueError(f"Expected epsilon >= 0 (inf for centring alone) but got {epsilon}.")
        mean, covariance = mean.detach().double().cpu(), covariance.detach().double().cpu()
        spread = covariance if spread is None else spread.detach().double().cpu()
        rounding = torch.finfo(torch.float64).eps * len(mean)
        if math.isinf(epsilon) or covariance.trace() <= rounding * spread.trace():
            return cls(mean, torch.eye(len(mean), dtype=torch.float64), math.inf)
        values, vectors = torch.linalg.eigh(covariance)
        floored = values.clamp(min=0) + epsilon * values.mean()
        resolved = floored > rounding * values[-1]
        whitening = vectors * torch.where(resolved, floored, math.inf).rsqrt() @ vectors.mT
        axes = torch.linalg.eigh(whitening @ spread @ whitening).eigenvectors.flip(1)
        # an eigenvector and its negative serve alike: the largest entry is made positive, so that fits agree
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        return cls(mean, whitening @ axes * torch.where(largest < 0, -1.0, 1.0), float(epsilon))

    def __call__(self, z: Tensor) -> Tensor:
        """Embeddings (N, d) to dense embeddings (N, d), computed in float64, in the dtype of `z`.

        Raises:
            ValueError: for embeddings of another width.
        """
        if z.shape[-1] != len(self.mean):
            raise ValueError(
                f"The head was fitted on embeddings of width {len(self.mean)} but got {z.shape[-1]}: fit it anew, "
                "`DenseHead.fit`."
            )
        mean, matrix = self.mean.to(z.device), self.matrix.to(z.device)
        return ((z.double() - mean) @ matrix).to(z.dtype)

    def widened(self, width: int) -> DenseHead:
        """The same map of embeddings (N, width) whose further columns it does not read."""
        more = width - len(self.mean)
        pad = torch.nn.functional.pad
        return replace(self, mean=pad(self.mean, (0, more)), matrix=pad(self.matrix, (0, 0, 0, more)))

    def module(self) -> SentenceModule:
        """The map as a `Dense` module of sentence-transformers without activation, z W^T + b; its metadata say the rest."""
        options = dense_options(*self.matrix.shape, bias=True)
        weights = {"linear.weight": self.matrix.mT.float(), "linear.bias": (-self.mean @ self.matrix).float()}
        return SentenceModule("Dense", options, weights, {"epsilon": str(self.epsilon), "pairs": self.pairs})

    @classmethod
    def of_module(cls, module: SentenceModule) -> DenseHead:
        """The head of a `Dense` module, with the mean found from the bias; epsilon is NaN where `module` did not write it."""
        matrix = module.weights["linear.weight"].double().mT.contiguous()
        bias = module.weights["linear.bias"].double()
        # b = -mu W has a solution in the span of W, and only that part of mu matters
        mean = -torch.linalg.lstsq(matrix.mT, bias[:, None], driver="gelsd").solution[:, 0]
        return cls(mean, matrix, float(module.metadata.get("epsilon", "nan")), module.metadata.get("pairs", ""))


class PairCovariances(NamedTuple):
    """Second moments of pairs of embeddings (z_a, z_b), each side about its own mean: all that the views need."""

    mean: Tensor  # (d,), of all rows, of both sides
    a: Tensor  # covariance (d, d) of the first side
    b: Tensor  # covariance (d, d) of the second side
    cross: Tensor  # C = E[(z_a - mu_a)(z_b - mu_b)^T] (d, d), not symmetric

    @classmethod
    def of(cls, z_a: Tensor, z_b: Tensor) -> PairCovariances:
        """Of embeddings (P, d), in float64: row i of `z_b` belongs to row i of `z_a`."""
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
    shared: Tensor = vectors * values.clamp(min=0) @ vectors.mT
    return shared


def content_head(pairs: PairCovariances, *, epsilon: float, center: bool = True) -> DenseHead:
    """The map (z - mu)(S_u + epsilon u I)^(-1/2) V, u = tr S_u / d: cosine compares what the notes of a pair share.

    Relevant component analysis (Bar-Hillel, Hertz, Shental, Weinshall, JMLR 2005) and within-class covariance normalisation
    (Hatch, Kajarekar, Stolcke, 2006), with pairs as classes. V are the principal axes of the result, the largest first.
    Without anything unshared (one pair, or pairs of equal rows) the map is z - mu.

    Args:
        pairs: second moments of training pairs.
        epsilon: >= 0; inf for z - mu. At 0, and with fewer pairs than d, directions that no pair tells of go to 0.
        center: subtract mu, which masked-LM encoders need; without, mu is 0.
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
