"""The dense head: an affine map of embeddings in closed form, kept beside the encoder, that ends a high mean cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_densefeat.models.modules import SentenceModule, dense_options


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
