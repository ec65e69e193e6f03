"""Terms of a whole evaluation set, from its moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hf_densefeat.evaluation.geometry import effective_rank_of_spectrum
from hf_densefeat.objective.base import Objective
from hf_densefeat.objective.distributed import mean_over_ranks, sum_over_ranks
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.training.forward import Forward
from hf_densefeat.training.update import moments_of


@torch.no_grad()
def held_out_terms(
    batches: Iterable[dict],
    forward: Callable[[dict], Forward],
    objective: Objective,
    *,
    mlm_weight: float,
    dense_weight: float,
) -> dict[str, float]:
    """Every term of the set, unweighted, `loss`, and the effective rank of both sides; independent of the batch size.

    The effective rank is centred where the objective is. A `BatchLoss` has no value of a whole set: its terms are means
    over batches. Without `mlm_weight` there is no `mlm_loss`.

    Args:
        batches: of this rank, prepared.
        forward: of one batch.
        objective: that which trains; its running state is left out and stays as it is.
        mlm_weight: of the language-modelling loss, in `loss`.
        dense_weight: of the objective, in `loss`.
    """
    pair: PairMoments | None = None
    of_batches = []
    sums = torch.zeros(2, dtype=torch.float64)
    for inputs in batches:
        made = forward(inputs)
        # one shift for all batches and ranks, near the mean, so that sums add and lose no digits
        shift = mean_over_ranks(made.rows()) if pair is None else pair.a.shift
        moments = moments_of(made, objective, shift)
        pair = moments if pair is None else pair + moments
        of_batches.append(objective.of_batch(made.z_a, made.z_b))
        if mlm_weight:
            sums = sums.to(made.mlm.device)
            sums[0] += made.mlm
            sums[1] += inputs["labels"].ne(-100).sum()
    if pair is None:
        raise ValueError("The evaluation set has no batch: it needs at least one pair of adjacent notes.")
    pair, sums = sum_over_ranks(pair, sums.to(pair.a.shift.device))
    terms = {name: value.item() for name, value in objective.evaluate(pair, of_batches).items()}
    loss = dense_weight * terms.pop("loss")
    if mlm_weight:
        terms["mlm_loss"] = (sums[0] / sums[1].clamp(min=1)).item()
        loss += mlm_weight * terms["mlm_loss"]
    pooled = (pair.a.covariance(objective.center) + pair.b.covariance(objective.center)) / 2
    return {"loss": loss, **terms, "effective_rank": covariance_rank(pooled)}


def covariance_rank(covariance: Tensor) -> float:
    """Effective rank of a covariance (d, d); one that is not finite counts as zeros."""
    return effective_rank_of_spectrum(torch.linalg.eigvalsh(torch.nan_to_num(covariance)).clamp(min=0))


def evaluation_model(trainer: Any) -> torch.nn.Module:
    """The model as `train` wrapped it, or wrapped for evaluation alone.

    Args:
        trainer: a `DenseTrainer`, whose model is wrapped here where it is to be sharded.
    """
    if trainer.is_in_train or trainer.model_wrapped is not trainer.model or trainer.accelerator._models:
        return trainer.model_wrapped
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.model = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
        return trainer.model
    return trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
