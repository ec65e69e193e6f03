"""The dense head: an affine map of embeddings in closed form, kept beside the encoder, that ends a high mean cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_densefeat.models.modules import SentenceModule

EPSILONS = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
SAMPLE = 20_000  # notes are plenty for a covariance: d is some hundreds


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
    """

    mean: Tensor
    matrix: Tensor
    epsilon: float

    @classmethod
    def fit(cls, z: Tensor, *, epsilon: float = math.inf) -> DenseHead:
        """Fit on embeddings (N, d) of training notes.

        Directions in which the notes do not differ (N < d, constant features) are divided by sqrt(epsilon l) as all others
        are at least, and to rounding they are 0; with epsilon 0 they go to 0. Equal rows, and one, are centred only.

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

    def module(self) -> SentenceModule:
        """The map as a `Dense` module of sentence-transformers without activation, z W^T + b; its metadata say epsilon."""
        d = len(self.mean)
        activation = "torch.nn.modules.linear.Identity"
        options = {"in_features": d, "out_features": d, "bias": True, "activation_function": activation}
        weights = {"linear.weight": self.matrix.mT.float(), "linear.bias": (-self.mean @ self.matrix).float()}
        return SentenceModule("Dense", options, weights, {"epsilon": str(self.epsilon)})

    @classmethod
    def of_module(cls, module: SentenceModule) -> DenseHead | None:
        """The head that `module` wrote, with the mean found from the bias; None for a module that no head wrote."""
        if "epsilon" not in module.metadata:
            return None
        matrix = module.weights["linear.weight"].double().mT.contiguous()
        bias = module.weights["linear.bias"].double()
        # b = -mu W has a solution in the span of W, and only that part of mu matters
        mean = -torch.linalg.lstsq(matrix.mT, bias[:, None], driver="gelsd").solution[:, 0]
        return cls(mean, matrix, float(module.metadata["epsilon"]))


def epsilon_of(word: str) -> float | str:
    """What `center`, `auto` or a number above 0 says of epsilon: inf, "auto" or the number; ValueError for another word."""
    if word in ("center", "auto"):
        return math.inf if word == "center" else word
    try:
        epsilon = float(word)
    except ValueError:
        epsilon = math.nan
    if not epsilon > 0:
        raise ValueError(f"Expected center, auto or a number above 0 but got {word!r}.")
    return epsilon


def mean_reciprocal_rank(earlier: Tensor, later: Tensor) -> float:
    """Mean of 1 / rank at which row i of `earlier` finds row i of `later` among all rows by cosine; both (N, d)."""
    a, b = (torch.nn.functional.normalize(z.float(), dim=1) for z in (earlier, later))
    ranks = []
    for start in range(0, len(a), 1024):
        scores = a[start : start + 1024] @ b.mT
        own = scores.diagonal(offset=start)[:, None]
        # a tie takes the middle of its places
        ranks.append(1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2)
    return float((1 / torch.cat(ranks)).mean())


def choose_epsilon(z: Tensor, earlier: Tensor, later: Tensor, *, epsilons: Sequence[float] = EPSILONS) -> float:
    """The epsilon after which validation patients' next notes rank highest among everybody's: no label is used.

    Args:
        z: embeddings (N, d) of training notes, on which each head is fitted.
        earlier: embeddings (P, d) of validation notes.
        later: embeddings (P, d) of the notes that follow them.
        epsilons: what is tried; of equal ones the first is taken.
    """
    scores = []
    for epsilon in epsilons:
        head = DenseHead.fit(z, epsilon=epsilon)
        scores.append(mean_reciprocal_rank(head(earlier), head(later)))
    return epsilons[scores.index(max(scores))]


def fit_head(
    encode: Callable[..., Tensor],
    texts: Sequence[Any],
    *,
    epsilon: float | str = math.inf,
    pairs: tuple[Sequence[Any], Sequence[Any]] | None = None,
    seed: int = 0,
) -> DenseHead:
    """Fit a head for an encoder on a sample of at most 20,000 training notes.

    Args:
        encode: notes -> embeddings (N, d) without a head, such as `partial(model.encode, head=False)`.
        texts: training notes, unmasked.
        epsilon: see `DenseHead`, or "auto" for `choose_epsilon` on `pairs`.
        pairs: validation notes and the notes that follow them; needed for "auto" alone.
        seed: of the sample.

    Raises:
        ValueError: for "auto" without pairs, and as `DenseHead.fit`.
    """
    if isinstance(epsilon, str) and (epsilon != "auto" or pairs is None or not len(pairs[0])):
        raise ValueError(
            f'Expected epsilon as a number or "auto", which needs pairs of validation notes, but got {epsilon!r}'
            f"{' without pairs' if epsilon == 'auto' else ''}."
        )
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:SAMPLE].tolist()
    z = encode([texts[i] for i in sorted(order)])
    if isinstance(epsilon, str):
        assert pairs is not None
        epsilon = choose_epsilon(z, encode(list(pairs[0])), encode(list(pairs[1])))
    return DenseHead.fit(z, epsilon=epsilon)
