"""Which content view serves, chosen by validation notes alone: no label is used, and doing nothing is a candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_densefeat.models.head import DenseHead
from hf_densefeat.models.views import PairCovariances, content_head, form_head, unshared_covariance

EPSILONS = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
FORM_EPSILON = 1.0
Sides = tuple[Tensor, Tensor]  # embeddings of pairs, row i of the second belongs to row i of the first


@dataclass(frozen=True)
class Choice:
    """A content view that is tried, and what validation notes say of it.

    Attributes:
        pairs: kind of the training pairs that it is fitted on; "" for the encoder as it is.
        input_layer: it reads the input embeddings beside the last layer.
        center: it subtracts the mean.
        epsilon: see `content_head`.
        found: mean reciprocal rank at which a text finds its pair among everybody's, the mean over kinds of pairs.
        gain: of `found` over the encoder as it is.
        error: standard error of `gain`, paired by text.
    """

    pairs: str = ""
    input_layer: bool = False
    center: bool = False
    epsilon: float = math.inf
    found: float = math.nan
    gain: float = 0.0
    error: float = 0.0

    def __str__(self) -> str:
        """What the view is, in words."""
        if not self.pairs:
            return "the encoder as it is"
        layers = "last and input layer" if self.input_layer else "last layer"
        how = "centring alone" if math.isinf(self.epsilon) else f"{self.pairs}, epsilon {self.epsilon:g}"
        return f"{how}, {'centred, ' if self.center and math.isfinite(self.epsilon) else ''}{layers}"


def reciprocal_ranks(a: Tensor, b: Tensor) -> Tensor:
    """1 / rank (n,) at which row i of `a` (n, d) finds row i of `b` among all rows of `b` by cosine; ties share places."""
    a, b = (torch.nn.functional.normalize(z.float(), dim=1) for z in (a, b))
    found = []
    for start in range(0, len(a), 1024):
        scores = a[start : start + 1024] @ b.mT
        own = scores.diagonal(offset=start)[:, None]
        found.append(1 / (1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2))
    return torch.cat(found)


def side_by_side(z: Tensor, width: int) -> Tensor:
    """Scales (D,) by which the first `width` columns and the others each have a mean square distance of 1 to their mean."""
    parts = (part.double() for part in z.split([width, z.shape[1] - width], dim=1))
    spread = [(part - part.mean(0)).square().sum(1).mean().sqrt().expand(part.shape[1]) for part in parts]
    scale = torch.cat(spread)
    return torch.where(scale > 0, scale, 1).reciprocal()


def choose_content(
    train: Mapping[str, Sides],
    validation: Mapping[str, Sides],
    *,
    width: int,
    epsilons: Sequence[float] = EPSILONS,
) -> tuple[DenseHead | None, list[Choice]]:
    """The content view under which validation texts find their pairs best, and all that was tried, the chosen one first.

    A view is tried for each kind of training pairs, with and without the input embeddings, with and without centring, and for
    each of `epsilons`. A candidate is scored by the mean over kinds of validation pairs of the mean reciprocal rank at which
    the first text finds the second one among everybody's: of adjacent notes, which shows topics, and of the halves of a note,
    which shows how fine content is told apart. The best takes the place of the encoder as it is only if it is ahead by more
    than the standard error of the difference over texts.

    Args:
        train: kind of pairs to embeddings (n, width), or (n, D) with D - width columns of the input embeddings.
        validation: likewise, of other patients.
        width: d of the embedding.
        epsilons: what is tried.

    Returns:
        The view, None where the encoder stays as it is, and the candidates, best first but for the chosen one.
    """
    known = {kind: sides for kind, sides in validation.items() if len(sides[0])}
    base = {kind: reciprocal_ranks(*(z[:, :width] for z in sides)) for kind, sides in known.items()}
    scores = [Choice(found=_mean([one.mean() for one in base.values()]))]
    for kind, sides in train.items():
        if not len(sides[0]):
            continue
        for input_layer in (False, True)[: 1 + (sides[0].shape[1] > width)]:
            view = _View(sides, width, input_layer)
            for center in (True, False):
                for epsilon in epsilons:
                    gains = {one: reciprocal_ranks(*view(known[one], epsilon, center)) - base[one] for one in known}
                    gain = _mean([one.mean() for one in gains.values()])
                    error = _mean([one.var() / len(one) for one in gains.values()]) / max(len(gains), 1)
                    found = scores[0].found + gain
                    scores.append(Choice(kind, input_layer, center, epsilon, found, gain, math.sqrt(error)))
    best = max(scores, key=lambda one: one.found if math.isfinite(one.found) else -1)
    chosen = best if best.gain > best.error else scores[0]
    order = [chosen, *sorted((one for one in scores if one is not chosen), key=lambda one: -one.found)]
    if not chosen.pairs:
        return None, order
    return fit_content(train[chosen.pairs], chosen, width=width), order


def fit_content(sides: Sides, choice: Choice, *, width: int) -> DenseHead:
    """The content view of a choice, of embeddings as they come: the scales of `side_by_side` are a part of its matrix."""
    return _fitted(content_head, sides, choice, width)


def fit_form(train: Mapping[str, Sides], choice: Choice, *, width: int) -> DenseHead | None:
    """The form view by what adjacent notes share, of the layers and centring of the content view; None without such pairs.

    Halves of a note share its form too: what is left of them is neither.
    """
    if "adjacent" not in train:
        return None
    return _fitted(form_head, train["adjacent"], replace(choice, pairs="adjacent", epsilon=FORM_EPSILON), width)


def _fitted(fit: Callable[..., DenseHead], sides: Sides, choice: Choice, width: int) -> DenseHead:
    view = _View(sides, width, choice.input_layer)
    head = fit(view.pairs, epsilon=choice.epsilon, center=choice.center)
    return replace(head, mean=head.mean / view.scale, matrix=head.matrix * view.scale[:, None], pairs=choice.pairs)


class _View:
    """Maps by S_u that share one eigendecomposition, up to the rotation, which no cosine sees."""

    def __init__(self, sides: Sides, width: int, input_layer: bool) -> None:
        self.columns = sides[0].shape[1] if input_layer else width
        a, b = (z[:, : self.columns].double() for z in sides)
        self.scale = side_by_side(torch.cat([a, b]), width)
        self.pairs = PairCovariances.of(a * self.scale, b * self.scale)
        values, self.vectors = torch.linalg.eigh(unshared_covariance(self.pairs.a, self.pairs.b, self.pairs.cross))
        self.values = values.clamp(min=0)

    def __call__(self, sides: Sides, epsilon: float, center: bool) -> Sides:
        floor = self.values + epsilon * self.values.mean()
        scale = floor.rsqrt() if 0 < float(floor.min()) < math.inf else torch.ones_like(floor)
        mean = self.pairs.mean if center else torch.zeros_like(self.pairs.mean)
        matrix = (self.vectors * scale).float()  # enough for ranks, and twice as fast
        a, b = ((z[:, : self.columns].double() * self.scale - mean).float() @ matrix for z in sides)
        return a, b


def _mean(values: list[Tensor]) -> float:
    return float(sum(values) / len(values)) if values else math.nan
