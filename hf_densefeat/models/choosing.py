"""Which content view serves: set by how the encoder was trained, taken if validation notes speak for it. No label is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_densefeat.models.head import DenseHead, PairCovariances, content_head, form_head

STRONG, MILD = 0.03, 10.0  # epsilon of an encoder of language modelling, and of one that was trained for similarity
FORM_EPSILON = 0.5
Sides = tuple[Tensor, Tensor]  # embeddings of pairs, row i of the second belongs to row i of the first


@dataclass(frozen=True)
class Choice:
    """A content view that is tried, and what validation notes say of it."""

    pairs: str = ""  # kind of the training pairs that it is fitted on; "" for the encoder as it is
    input_layer: bool = False  # it reads the input embeddings beside the last layer, where they are given
    center: bool = False  # it subtracts the mean
    epsilon: float = math.inf  # see `content_head`
    # kind of validation pairs to the mean reciprocal rank at which a text finds its pair among everybody's
    ranks: Mapping[str, float] = field(default_factory=dict)
    # in rank over the encoder as it is, on the kinds of pairs that the view was not fitted on, or else on its own
    gain: float = 0.0
    error: float = 0.0  # standard error of `gain`, paired by text

    @property
    def found(self) -> float:
        """Mean of `ranks` over the kinds of pairs; NaN without any."""
        return sum(self.ranks.values()) / len(self.ranks) if self.ranks else math.nan

    def __str__(self) -> str:
        """What the view is, in words."""
        if not self.pairs:
            return "the encoder as it is"
        layers = "last and input layer" if self.input_layer else "last layer"
        if math.isinf(self.epsilon):
            return f"centring alone, {layers}"
        return f"{self.pairs}, epsilon {self.epsilon:g}, {'centred, ' if self.center else ''}{layers}"


def reciprocal_ranks(a: Tensor, b: Tensor) -> Tensor:
    """1 / rank (n,) at which row i of `a` (n, d) finds row i of `b` among all rows of `b` by cosine; ties share places."""
    a, b = (torch.nn.functional.normalize(z.float(), dim=1) for z in (a, b))
    found = []
    for start in range(0, len(a), 1024):
        scores = a[start : start + 1024] @ b.mT
        own = scores.diagonal(offset=start)[:, None]
        found.append(1 / (1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2))
    return torch.cat(found)


def paired_gain(found: Tensor, base: Tensor) -> tuple[float, float]:
    """Mean gain of values (n,) over those of the same texts before, and its standard error."""
    gain = found - base
    return float(gain.mean()), math.sqrt(float(gain.var()) / len(gain))


def side_by_side(z: Tensor, width: int) -> Tensor:
    """Scales (D,) by which the first `width` columns and the others each have a mean square distance of 1 to their mean."""
    parts = (part.double() for part in z.split([width, z.shape[1] - width], dim=1))
    spread = [(part - part.mean(0)).square().sum(1).mean().sqrt().expand(part.shape[1]) for part in parts]
    scale = torch.cat(spread)
    return torch.where(scale > 0, scale, 1).reciprocal()


def choose_views(
    train: Mapping[str, Sides],
    validation: Mapping[str, Sides],
    *,
    width: int,
    for_similarity: bool = False,
    epsilon: float | None = None,
) -> tuple[dict[str, DenseHead], list[Choice]]:
    """The views "content" and "form", as far as pairs speak for them, and what was tried for content: see `choose_content`.

    The form view of an encoder of language modelling reads the input layer too, also where content is the last layer alone:
    which kind of text it is shows in the words. Content is then widened, because a folder has its layers once; it is the
    encoder as it is where no content view serves, because the first view of a folder is the default.
    """
    content, tried = choose_content(train, validation, width=width, for_similarity=for_similarity, epsilon=epsilon)
    form = fit_form(train, width=width, input_layer=not for_similarity)
    if form is not None:
        as_it_is = DenseHead(torch.zeros(width).double(), torch.eye(width).double(), math.inf)
        content = (content or as_it_is).widened(len(form.mean))
    views = {"content": content, "form": form}
    return {name: head for name, head in views.items() if head is not None}, tried


def choose_content(
    train: Mapping[str, Sides],
    validation: Mapping[str, Sides],
    *,
    width: int,
    for_similarity: bool = False,
    epsilon: float | None = None,
) -> tuple[DenseHead | None, list[Choice]]:
    """The content view that validation pairs speak for, None for no view, and all that was tried, the chosen one first.

    An encoder of language modelling gets a strong map: of the last and the input layer, centred, by adjacent notes if these
    teach more than the halves of a note do, else by halves; or else it is centred alone. They teach more if validation notes
    find the next ones better by them, by more than the standard error. One whose cosines serve as they are gets a mild map: of
    the last layer, not centred, by halves, or else by adjacent notes.

    Taken is the first that is ahead of the encoder as it is, by more than the standard error, in the ranks at which validation
    texts find their pairs: pairs of the kind that it was not fitted on, so that the others share the matter, not the author.

    Embeddings are (n, width), or (n, D) with the input embeddings behind. `for_similarity` says that the encoder was trained
    for cosine; `epsilon` takes the place of `STRONG` or `MILD`.
    """
    known = {kind: sides for kind, sides in validation.items() if len(sides[0])}
    base = {kind: reciprocal_ranks(*(z[:, :width] for z in sides)) for kind, sides in known.items()}
    tried = [Choice(ranks={kind: float(found.mean()) for kind, found in base.items()})]
    kinds = [kind for kind in ("adjacent", "halves") if kind in train and len(train[kind][0])]
    if for_similarity:
        candidates = [Choice(kind, epsilon=epsilon or MILD) for kind in kinds[::-1]]
    else:
        wide = [train[kind][0].shape[1] > width for kind in kinds]
        candidates = [Choice(*one, True, epsilon or STRONG) for one in zip(kinds, wide, strict=True)]
        candidates += [Choice(kind, center=True) for kind in kinds[:1]]
    views = []
    for candidate in candidates:
        head = fit_content(train[candidate.pairs], candidate, width=width)
        found = {kind: reciprocal_ranks(*(head(z[:, : len(head.mean)]) for z in known[kind])) for kind in known}
        views.append((candidate, head, found))
    if not for_similarity and len(kinds) == 2 and "adjacent" in known:
        gain, error = _gain(views[0][2], views[1][2], ["adjacent"])
        if gain <= error:
            views.pop(0)
    for candidate, head, found in views:
        fitted = candidate.pairs if math.isfinite(candidate.epsilon) else ""
        gain, error = _gain(found, base, [kind for kind in found if kind != fitted] or list(found))
        ranks = {kind: float(values.mean()) for kind, values in found.items()}
        choice = replace(candidate, ranks=ranks, gain=gain, error=error)
        if gain > error:
            return head, [choice, *tried]
        tried.append(choice)
    return None, tried


def _gain(found: Mapping[str, Tensor], base: Mapping[str, Tensor], kinds: Sequence[str]) -> tuple[float, float]:
    """Mean over the kinds of pairs of `paired_gain`; 0 and 0 without a kind."""
    gains, n = [paired_gain(found[kind], base[kind]) for kind in kinds], max(len(kinds), 1)
    return sum(gain for gain, _ in gains) / n, math.hypot(*(error for _, error in gains)) / n


def fit_content(sides: Sides, choice: Choice, *, width: int) -> DenseHead:
    """The content view of a choice, of embeddings as they come: the scales of `side_by_side` are a part of its matrix."""
    sides = _columns(sides, choice.input_layer, width)
    scale = side_by_side(torch.cat(sides), width)
    head = content_head(_covariances(sides, scale), epsilon=choice.epsilon, center=choice.center)
    return _unscaled(head, scale, choice.pairs)


def fit_form(train: Mapping[str, Sides], *, width: int, input_layer: bool) -> DenseHead | None:
    """The centred form view by what adjacent notes share and halves, if there are any, do not; None without the former."""
    if "adjacent" not in train:
        return None
    sides = {kind: _columns(pair, input_layer, width) for kind, pair in train.items() if len(pair[0])}
    scale = side_by_side(torch.cat(sides["adjacent"]), width)
    pairs = {kind: _covariances(pair, scale) for kind, pair in sides.items()}
    head = form_head(pairs["adjacent"], epsilon=FORM_EPSILON, halves=pairs.get("halves"))
    return _unscaled(head, scale, "adjacent")


def _columns(sides: Sides, input_layer: bool, width: int) -> Sides:
    return sides if input_layer else (sides[0][:, :width], sides[1][:, :width])


def _covariances(sides: Sides, scale: Tensor) -> PairCovariances:
    return PairCovariances.of(*(z.double() * scale for z in sides))


def _unscaled(head: DenseHead, scale: Tensor, pairs: str) -> DenseHead:
    return replace(head, mean=head.mean / scale, matrix=head.matrix * scale[:, None], pairs=pairs)
