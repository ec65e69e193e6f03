"""Hidden states and an attention mask to one embedding a row: the four ways of sentence-transformers, by its names."""

import torch
from torch import Tensor

from hf_densefeat.objective.precision import full_precision


def mean_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the attended tokens: hidden (B, L, d), mask (B, L) of 0 and 1 -> (B, d); zeros where none is attended."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def cls_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
    """First attended token, left- or right-padded: (B, L, d), (B, L) -> (B, d)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.long().argmax(1)]


def last_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
    """Last attended token, left- or right-padded: (B, L, d), (B, L) -> (B, d)."""
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def max_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the attended tokens, by feature: (B, L, d), (B, L) -> (B, d)."""
    return hidden.masked_fill(~mask.unsqueeze(-1).bool(), torch.finfo(hidden.dtype).min).amax(1)


def over_chunks(z: Tensor, tokens: Tensor, owner: Tensor, notes: int) -> Tensor:
    """Mean over the chunks of each note, weighted by their tokens: z (R, d), tokens (R,), owner (R,) -> (notes, d).

    Under mean pooling that is the mean over all tokens of the note. Every note in 0 ... notes - 1 owns a chunk.
    """
    weight = tokens.to(z.dtype).unsqueeze(1)
    total = z.new_zeros(notes, z.shape[1]).index_add(0, owner, z * weight)
    return total / z.new_zeros(notes, 1).index_add(0, owner, weight)


POOLINGS = {"mean": mean_pooling, "cls": cls_pooling, "last": last_pooling, "max": max_pooling}


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Embeddings (B, d) by the named pooling; half precision is widened first, so that sums over tokens are exact."""
    return POOLINGS[pooling](full_precision(hidden), mask)
