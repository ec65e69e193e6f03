"""Between a trained model and the start that it was trained from: a dial from form to content that needs no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Share:
    """A share of the way from the start to the trained weights, and what validation notes say of it.

    Attributes:
        share: 0 for the start, 1 for the trained weights.
        found: mean reciprocal rank at which a text finds its pair, the mean over kinds of pairs.
        gain: of `found` over the start.
        error: standard error of `gain`, paired by text.
    """

    share: float
    found: float
    gain: float = 0.0
    error: float = 0.0

    def __str__(self) -> str:
        """In words, for a log."""
        ahead = f", {self.gain:+.4f} ± {self.error:.4f} of the start" if self.share else ""
        rank = f"validation notes find their pairs at a mean reciprocal rank of {self.found:.4f}"
        return f"{self.share:g} of the way: {rank}{ahead}"


def choose_share(
    ranks: Callable[[float], Mapping[str, Tensor]], *, shares: Sequence[float] = SHARES
) -> tuple[Share, list[Share]]:
    """The share at which validation texts find their pairs best, without labels; 0 unless another is ahead of it for sure.

    A share is scored by the mean over kinds of pairs (adjacent notes, halves of a note) of the mean reciprocal rank. The best
    takes the place of the start only if it is ahead by more than the standard error of the paired difference.

    Args:
        ranks: share to {kind: reciprocal ranks (n,)}, of the same texts in the same order for every share.
        shares: above 0, those that are tried.

    Returns:
        The choice, and all that was tried, the start first.
    """
    base = ranks(0.0)
    tried = [Share(0.0, _mean([one.mean() for one in base.values()]))]
    for share in shares:
        gains = [found - base[kind] for kind, found in ranks(share).items()]
        gain, error = _mean([one.mean() for one in gains]), _mean([one.var() / len(one) for one in gains])
        tried.append(Share(share, tried[0].found + gain, gain, math.sqrt(error / len(gains))))
    best = max(tried, key=lambda one: one.found)
    return best if best.gain > best.error else tried[0], tried


def _mean(values: Sequence[Tensor]) -> float:
    return float(sum(values) / len(values))


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
    model.views = {}
