"""Between a trained model and the start that it was trained from: a dial from form to content that needs no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_densefeat.models.choosing import paired_gain

SHARES = (0.25, 0.5, 0.75, 1.0)
LOST = 0.03  # of the start's rank of halves, at most


@dataclass(frozen=True)
class Share:
    """A share of the way from the start to the trained weights, and what validation notes say of it."""

    share: float  # 0 for the start, 1 for the trained weights
    ranks: Mapping[str, float]  # kind of pairs to the mean reciprocal rank at which a text finds its pair
    gains: Mapping[str, tuple[float, float]]  # kind to the gain of that over the start, and its standard error, paired

    @property
    def serves(self) -> bool:
        """Whether it is ahead of the start for some kind of pairs, beyond the standard error, and keeps the rank of halves."""
        gain, _ = self.gains.get("halves", (0.0, 0.0))
        kept = gain >= -LOST * (self.ranks.get("halves", 0.0) - gain)
        return kept and any(gain > error for gain, error in self.gains.values())

    def __str__(self) -> str:
        """In words, for a log."""
        shown = {kind: f" ({gain:+.4f} ± {error:.4f})" for kind, (gain, error) in self.gains.items() if self.share}
        kinds = (f"{kind} {rank:.3f}{shown.get(kind, '')}" for kind, rank in self.ranks.items())
        return f"{self.share:g} of the way: validation notes find their pairs at mean reciprocal ranks of {', '.join(kinds)}"


def choose_share(
    ranks: Callable[[float], Mapping[str, Tensor]], *, shares: Sequence[float] = SHARES
) -> tuple[Share, list[Share]]:
    """The largest share that serves validation texts, without labels, 0 if none does; and all that was tried, 0 first.

    The two halves of a note share what tells it from other notes: an encoder that finds them worse will find worse what a
    question asks for. Adjacent notes share topics, but an author too, so that a lower rank of theirs need not be a loss. A
    share serves if it is ahead of the start for some kind of pairs, by more than the standard error of the paired difference,
    and loses at most 3 % of the rank of halves (`recipes/results/minilm.md`). The largest one is tried first, and the first
    that serves is taken.

    `ranks` gives {kind: reciprocal ranks (n,)} of a share, of the same texts in the same order for every share.
    """
    base = ranks(0.0)
    tried = [_share(0.0, base, base)]
    for share in sorted(shares, reverse=True):
        tried.append(_share(share, ranks(share), base))
        if tried[-1].serves:
            return tried[-1], tried
    return tried[0], tried


def _share(share: float, found: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Share:
    ranks = {kind: float(values.mean()) for kind, values in found.items()}
    return Share(share, ranks, {kind: paired_gain(values, base[kind]) for kind, values in found.items()})


@torch.no_grad()
def interpolate_weights(model: Any, start: Any, share: float, *, new: Collection[str] = ()) -> None:
    """W <- W_start + share (W - W_start) for every weight and floating-point buffer of `model`, in place.

    Weight interpolation of a fine-tuned model and its start (WiSE-FT: Wortsman et al., 2022). 0 is the start, 1 the model as
    it is; above 1 goes on in the same direction. Half precision is interpolated in float32 and rounded once. The views of
    `model` are dropped, because their mean and axes are those of other embeddings.

    Args:
        model: as `AutoDenseModel` gives it, trained from `start`.
        start: of the same architecture and vocabulary.
        share: at least 0.
        new: names of weights that the start's checkpoint does not have, such as a masked-LM head: these stay the model's.

    Raises:
        ValueError: for a share that is no finite number from 0 on, and for a start of other weights or shapes.
    """
    if not 0 <= share < math.inf:
        raise ValueError(f"Expected share to be a finite number of at least 0 but got {share}.")
    ours, theirs = model.state_dict(), start.state_dict()
    other = sorted(ours.keys() ^ theirs.keys())
    if other:
        which = "model" if other[0] in ours else "start"
        raise ValueError(
            f"Expected the start that the model was trained from, with the same weights, but only the {which} has {other[0]}."
        )
    found = {}
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            raise ValueError(
                f"Expected the start that the model was trained from, but {name} is {tuple(value.shape)} in the model and "
                f"{tuple(theirs[name].shape)} in the start."
            )
        if value.is_floating_point() and name not in new:
            first = theirs[name].to(value.device, torch.promote_types(value.dtype, torch.float32))
            found[name] = torch.lerp(first, value.to(first.dtype), share).to(value.dtype)
    model.load_state_dict(found, strict=False)  # values first, then copies: a tied weight has two names
    torch.clear_autocast_cache()  # or an encode in the same autocast would go on with the weights of before
    model.views = {}
