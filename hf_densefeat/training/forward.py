"""The forward of a micro-batch of pairs: embeddings, and logits only where a token is predicted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_densefeat.models.encoding import evaluating
from hf_densefeat.models.modules import through
from hf_densefeat.models.pooling import over_chunks
from hf_densefeat.objective.precision import full_precision

logger = logging.getLogger(__name__)

# keys of a batch that the model's forward does not take
NOT_ROWS = ("labels", "num_pairs", "chunk_to_note", "lengths", "start")
PADDING = 0.05  # largest share of padding that `length_groups` accepts
MAXIMUM_GROUPS = 8
CUTS = 32  # places among the rows at which groups may begin


class Forward(NamedTuple):
    """What the forward of a micro-batch gave."""

    mlm: Tensor  # language-modelling loss, summed over the predicted tokens; 0 where it was not asked for
    z_a: Tensor  # embeddings (B, d) of the earlier notes
    z_b: Tensor  # and of the later ones
    slots: int  # positions that the model computed, padding included
    start: tuple[Tensor, Tensor] | None = None  # both sides by the frozen start, where the objective needs them

    def rows(self) -> Tensor:
        """Embeddings (2B, d) of both sides, earlier notes first, without their graph."""
        return torch.cat([self.z_a, self.z_b]).detach()


def forward_pairs(
    model: nn.Module, dense: Any, batch: dict, *, predict: bool, by_position: bool, grouped: bool
) -> Forward:
    """Both notes of each pair of a collator's batch through `dense`, whose body keeps its last hidden states.

    What is called is `model`: `dense`, what wraps it, or without `predict`, the language-modelling loss, its body alone.
    `by_position`: the head takes chosen positions alone (`predicts_by_position`). `grouped`: rows of like length have a
    forward of their own, so that little is padded (`length_groups`); the batch then has `lengths`, the tokens of each row.
    """
    rows = {name: value for name, value in batch.items() if name not in NOT_ROWS}
    labels, lengths = batch["labels"], batch.get("lengths", [])
    groups = length_groups(lengths) if grouped and lengths else [np.arange(len(labels))]
    losses, parts, slots = [], [], 0
    for group in groups:
        part, wanted = rows, labels
        if len(groups) > 1:
            index, width = torch.from_numpy(group).to(labels.device), lengths[group[0]]
            part = {name: value[index, :width] for name, value in rows.items()}
            wanted = labels[index, :width]
        predicted = wanted.ne(-100)
        # without a loss the head sees no position at all; it is still called, for sharded weights
        chosen = (predicted if predict else torch.zeros_like(predicted)) if by_position else None
        with dense.capture_hidden(chosen):
            outputs = model(**part)
            parts.append(dense.pooled(part["attention_mask"], tail="chunk_to_note" not in batch))
        if predict:
            logits = outputs.logits[0] if by_position else outputs.logits[predicted]
            # not the model's own loss: some ignore the tokens of the update, and without any it is NaN. Labels stand where
            # their logits are, for decoders too
            losses.append(F.cross_entropy(full_precision(logits), wanted[predicted], reduction="sum"))
        slots += part["attention_mask"].numel()
    z = torch.cat(parts)
    if len(groups) > 1:
        z = z[torch.from_numpy(np.argsort(np.concatenate(groups))).to(z.device)]
    pairs = int(batch["num_pairs"])
    if "chunk_to_note" in batch:
        tokens = batch["attention_mask"].sum(1)
        z = through(dense.tail, over_chunks(z, tokens, batch["chunk_to_note"], 2 * max(pairs, 1)))
    half = len(z) // 2
    mlm = torch.stack(losses).sum() if predict else z.new_zeros(())
    return Forward(mlm, z[:pairs], z[half : half + pairs], slots)


def length_groups(lengths: Sequence[int]) -> list[np.ndarray]:
    """Row numbers, longest first, in the fewest groups of which at most 5 % is padding; 8 groups at most.

    A group is padded to its longest row. Among all ways to cut the sorted rows into g groups, at 32 places, the one with
    the fewest positions is taken, for g = 1, 2, ... until few enough are padding.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    sizes = np.asarray(lengths)[order]
    # 32 places, because a search over every row would cost as much as a small forward
    ends = np.unique(np.linspace(0, len(sizes), CUTS + 1).round().astype(int))
    # slots[i, j]: of one group from cut i to cut j
    slots = np.where(
        ends[None] > ends[:, None], (ends[None] - ends[:, None]) * sizes[np.minimum(ends, len(sizes) - 1)][:, None], 0
    )
    best, begun = slots[0].astype(float), [np.zeros(len(ends), dtype=int)]
    while best[-1] * (1 - PADDING) > sizes.sum() and len(begun) < min(MAXIMUM_GROUPS, len(ends) - 1):
        total = best[:, None] + np.where(ends[None] > ends[:, None], slots, np.inf)
        begun.append(total.argmin(0))
        best = total.min(0)
    cuts = [len(ends) - 1]
    for first in reversed(begun[1:]):
        cuts.append(int(first[cuts[-1]]))
    return np.split(order, ends[np.setdiff1d(cuts, [0, len(ends) - 1])])


@torch.no_grad()
def predicts_by_position(dense: Any, batch: dict) -> bool:
    """Whether the head's logits at some positions need those positions alone: then the others are not computed.

    True for the heads of nearly all families; False for a head that mixes or reshapes positions, and for an error inside it.
    `dense` is not wrapped yet, and `batch` a small one, of two rows at least.
    """
    rows = {
        name: value.to(dense.device)
        for name, value in batch.items()
        if isinstance(value, Tensor) and name not in NOT_ROWS
    }
    chosen = torch.zeros_like(batch["labels"], dtype=torch.bool, device=dense.device)
    chosen[0, -1] = True  # alone: a head that mixes positions, or counts them from the first, gives something else
    try:
        with evaluating(dense):
            every = dense(**rows).logits
            with dense.capture_hidden(chosen):
                some = dense(**rows).logits
    except Exception as error:  # whatever a head raises, it does not take positions alone
        logger.info("Logits are computed at every position: %s", type(error).__name__)
        return False
    return some.shape == (1, 1, every.shape[-1]) and torch.allclose(
        some[0].float(), every[chosen].float(), rtol=1e-2, atol=1e-3
    )
