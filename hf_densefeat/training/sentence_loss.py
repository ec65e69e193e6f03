"""The dense objective as a loss of sentence-transformers' own trainer."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_densefeat.objective.distributed import sum_over_ranks
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.training.arguments import CONTRASTIVE, DenseTrainingArguments
from hf_densefeat.training.update import moments_of


class DenseLoss(nn.Module):
    """The dense objective for `SentenceTransformerTrainer(model, ..., loss=DenseLoss(model))`, on two columns of texts.

    The columns are an earlier note and the one that follows, or two spans of a note: `pair_texts(notes, kinds)` makes such
    a dataset. The loss is `weight` times the objective of the embeddings of the batch, those of the model's last module,
    and has the gradient that `DenseTrainer` gives for the same batch.

    It is exact for one batch, and for several processes (DDP), whose moments are summed: the loss is that of all their
    pairs. It is not for `gradient_accumulation_steps` above 1: each micro-batch is then a batch of its own, which
    `DenseTrainer` does not do. Terms are logged under their names, times their weights, so that they add up to the loss.

    Args:
        model: the `SentenceTransformer`; for an anchor a frozen copy of it is kept, as it is now.
        objective: by default that of a contrastive start: L_spec, L_pair and the anchor, weighted as `pretrain` does.
        weight: of the objective.

    Raises:
        ValueError: for an objective with an expander, which nothing would train.
    """

    def __init__(self, model: Any, *, objective: DenseObjective | None = None, weight: float | None = None):
        super().__init__()
        # not the arguments themselves: making them anew resets the accelerator of a trainer that has begun
        default: Any = SimpleNamespace(
            **{one.name: one.default for one in fields(DenseTrainingArguments)} | CONTRASTIVE
        )
        self.model = model
        self.objective = DenseTrainingArguments.dense_objective(default) if objective is None else objective
        if self.objective.parameters():
            raise ValueError(
                "DenseLoss trains nothing beside the model: leave the expander out, or take DenseTrainer."
            )
        self.weight = default.dense_weight if weight is None else weight
        # in a list, because a trainer that wraps the model puts it in the place of every model that a loss registers
        self.start = [deepcopy(model).requires_grad_(False).eval()] if self.objective.needs_start else []

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms by name, whose sum is the loss; `labels` are ignored.

        Raises:
            ValueError: for another number of columns than two.
        """
        features = list(sentence_features)
        if len(features) != 2:
            raise ValueError(f"Expected two columns of texts, the two sides of the pairs, but got {len(features)}.")
        z_a, z_b = (self.model(dict(one))["sentence_embedding"] for one in features)
        start = None
        if self.start:
            with torch.no_grad():
                f_a, f_b = (self.start[0].to(z_a.device)(dict(one))["sentence_embedding"] for one in features)
                start = f_a, f_b
        pair = moments_of(z_a, z_b, self.objective, start=start)
        pair, ranks = sum_over_ranks(pair, pair.a.shift.new_ones(1))
        if not torch.is_grad_enabled():
            return self._weighted(self.objective.evaluate(pair))
        values = self._weighted(self.objective.plan(pair))
        share, _ = self.objective.share(z_a, z_b, start=start, ranks=int(ranks))
        name = next(iter(values))
        values[name] = values[name] + self.weight * (share - share.detach())
        return values

    def _weighted(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self.weight * weight * values[name] for name, (weight, _) in self.objective.terms.items() if weight
        }
