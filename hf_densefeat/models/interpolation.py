"""Between a trained model and the start that it was trained from: a dial from form to content that needs no training."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch


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
