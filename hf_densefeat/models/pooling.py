"""Hidden states and an attention mask to one embedding a row: the poolings of sentence-transformers, by its names."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def mean_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the attended tokens: hidden (B, L, d), mask (B, L) of 0 and 1 -> (B, d); zeros where none is attended."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def mean_sqrt_len_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sum of the n attended tokens over sqrt(n): (B, L, d), (B, L) -> (B, d); zeros where none is attended."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1).sqrt()


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


@dataclass(frozen=True)
class Pooling:
    """An entry of `POOLINGS`: all that training, saving and the model card need of a pooling."""

    function: Callable[[Tensor, Tensor], Tensor]  # hidden states (B, L, d) and mask (B, L) to embeddings (B, d)
    mode: str  # name in the pooling config of sentence-transformers, after `pooling_mode_`
    snippet: str  # the same in lines of PyTorch, of `hidden` and `tokens` to `embeddings`, for the card


POOLINGS = {
    "mean": Pooling(
        mean_pooling,
        "mean_tokens",
        'mask = tokens["attention_mask"].unsqueeze(-1)\nembeddings = (hidden * mask).sum(1) / mask.sum(1)',
    ),
    "cls": Pooling(cls_pooling, "cls_token", "embeddings = hidden[:, 0]"),
    "last": Pooling(
        last_pooling,
        "lasttoken",
        'last = tokens["attention_mask"].sum(1) - 1\nembeddings = hidden[torch.arange(len(last)), last]',
    ),
    "max": Pooling(
        max_pooling,
        "max_tokens",
        'mask = tokens["attention_mask"].unsqueeze(-1) == 0\nembeddings = hidden.masked_fill(mask, -torch.inf).amax(1)',
    ),
    "mean_sqrt_len": Pooling(
        mean_sqrt_len_pooling,
        "mean_sqrt_len_tokens",
        'mask = tokens["attention_mask"].unsqueeze(-1)\nembeddings = (hidden * mask).sum(1) / mask.sum(1).sqrt()',
    ),
}


def over_chunks(z: Tensor, tokens: Tensor, chunk_to_note: Tensor, num_notes: int) -> Tensor:
    """Mean over the chunks of each note, weighted by tokens: z (R, d), tokens, chunk_to_note (R,) -> (num_notes, d).

    Under mean pooling that is the mean over all tokens of the note. Every note in 0 ... num_notes - 1 owns a chunk.
    """
    weight = tokens.to(z.dtype).unsqueeze(1)
    total = z.new_zeros(num_notes, z.shape[1]).index_add(0, chunk_to_note, z * weight)
    return total / z.new_zeros(num_notes, 1).index_add(0, chunk_to_note, weight)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Embeddings (B, d) by the named pooling; half precision is widened first, so that sums over tokens are exact."""
    widened = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    return POOLINGS[pooling].function(widened, mask)


def without_prompt(mask: Tensor, length: int) -> Tensor:
    """The mask (B, L) without its first tokens, those of a prompt that is not pooled."""
    return torch.cat([torch.zeros_like(mask[:, :length]), mask[:, length:]], 1) if length else mask
