"""Which content view serves, chosen by validation notes alone: no label is used, and doing nothing is a candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
        ranks: kind of validation pairs to the mean reciprocal rank at which a text finds its pair among everybody's.
        gain: of rank over the encoder as it is, on the kinds of pairs that it was not fitted on, or else on its own.
        error: standard error of `gain`, paired by text.
    """

    pairs: str = ""
    input_layer: bool = False
    center: bool = False
    epsilon: float = math.inf
    ranks: Mapping[str, float] = field(default_factory=dict)
    gain: float = 0.0
    error: float = 0.0

    @property
    def found(self) -> float:
        """Mean of `ranks` over the kinds of pairs; NaN without any."""
        return sum(self.ranks.values()) / len(self.ranks) if self.ranks else math.nan

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
    """The content view that validation pairs speak for, and all that was tried, the chosen one first.

    A view is tried for each kind of training pairs, with and without the input embeddings, with and without centring, and for
    each of `epsilons`. Each is scored by the ranks at which validation texts find their pairs: adjacent notes, which show
    topics, and the halves of a note, which show how fine content is told apart. A view is better than its own kind of pairs
    deserves, so:

    1. It must be ahead of the encoder as it is, by more than the standard error, on the kind that it was not fitted on.
    2. Of one kind, layers and centring, epsilon is that of the best rank of adjacent notes, where there are such.
    3. Of one kind, layers and centring are those that gain most on the other kind; of the kinds, the best mean rank counts.

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
    as_it_is = Choice(ranks={kind: float(found.mean()) for kind, found in base.items()})
    tried, ahead = [], []
    for kind, sides in train.items():
        groups = []
        for input_layer in (False, True)[: 1 + (sides[0].shape[1] > width)] if len(sides[0]) else ():
            view = _View(sides, width, input_layer)
            for center in (True, False):
                group = []
                for epsilon in epsilons:
                    found = {one: reciprocal_ranks(*view(pairs, epsilon, center)) for one, pairs in known.items()}
                    group.append(_scored(Choice(kind, input_layer, center, epsilon), found, base))
                tried += group
                groups += _best(group, lambda one: one.ranks.get("adjacent", one.found))
        ahead += _best(groups, lambda one: one.gain)
    chosen = (_best(ahead, lambda one: one.found) or [as_it_is])[0]
    order = [chosen, *sorted((one for one in (as_it_is, *tried) if one is not chosen), key=lambda one: -one.found)]
    if not chosen.pairs:
        return None, order
    return fit_content(train[chosen.pairs], chosen, width=width), order


def _scored(choice: Choice, found: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Choice:
    others = [one for one in found if one != choice.pairs] or list(found)
    gains = [found[one] - base[one] for one in others]
    return replace(
        choice,
        ranks={one: float(values.mean()) for one, values in found.items()},
        gain=sum(float(one.mean()) for one in gains) / max(len(gains), 1),
        error=math.sqrt(sum(float(one.var()) / len(one) for one in gains)) / max(len(gains), 1),
    )


def _best(choices: Sequence[Choice], score: Callable[[Choice], float]) -> list[Choice]:
    """The one with the highest score of those that are visibly ahead of the encoder as it is, if any is."""
    ahead = [one for one in choices if one.gain > one.error]
    return [max(ahead, key=score)] if ahead else []


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
