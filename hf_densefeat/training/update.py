"""One optimizer update: its plan from the moments of all micro-batches, the loss of each, and its numbers for the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from hf_densefeat.data.streaming import PairStream
from hf_densefeat.evaluation.geometry import effective_rank_of_spectrum
from hf_densefeat.models.adapters import without_adapter
from hf_densefeat.objective.anchor import Rows
from hf_densefeat.objective.base import Objective
from hf_densefeat.objective.distributed import mean_over_ranks, sum_over_ranks
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.training.arguments import DenseTrainingArguments
from hf_densefeat.training.checks import check_trainable
from hf_densefeat.training.forward import Forward, forward_pairs
from hf_densefeat.training.resumable import ResumableTrainer

logger = logging.getLogger(__name__)

MAXIMUM_SKIPPED = 50  # in a row; the loss scale of float16 may need some
SLOTS, TOKENS = "positions that were computed", "tokens at these"  # in the sums of an update


@dataclass
class Update:
    """One optimizer update: its micro-batches, what was planned before the first backward, and sums for the log."""

    batches: list  # the micro-batches of this rank
    left: int  # how many of them have no loss yet
    tokens: Tensor | None = None  # that are predicted in the whole update, on all ranks; None until it is planned
    stops: Tensor | None = None  # how many ranks were told to stop, which the collective of the update counts too
    forwards: list[Callable[[dict], Forward]] = field(default_factory=list)  # planned: kept, or made again
    sums: dict[str, Tensor] = field(default_factory=dict)  # over micro-batches, on the device

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Sum over micro-batches, for the log, without waiting for the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()


class UpdateTrainer(ResumableTrainer):
    """A trainer with the loss of `DenseTrainer`, whose updates do not depend on how a batch is cut."""

    args: DenseTrainingArguments
    objective: Objective
    start: Any  # the frozen start, where the objective needs it
    stream: PairStream | None = None
    by_position: bool  # the head is given predicted positions alone
    mlm_weight_before: float
    update_log: UpdateLog
    _update = Update([], 0)

    @property
    def dense_model(self):
        """The model that is trained, without what wraps it: DDP, FSDP, torch.compile, an adapter."""
        return without_adapter(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    @property
    def whole_forwards(self) -> bool:
        """Whether the model is sharded or compiled: all ranks then call it, as it is wrapped, the same number of times."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile

    # ---- The loss ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Remember the update's micro-batches: `compute_loss` needs all of them before the first backward."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._update = Update(batches, len(batches))
        self.objective.module.zero_grad()  # the stock Trainer zeroes the gradients of the model alone
        for batch in batches:
            if self.stream is not None:
                self.stream.position = batch.pop("stream")
        return batches, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the update's loss: shares add up over micro-batches and average over ranks.

        Without `get_batch_samples` before, which `train` calls, the micro-batch is the whole update.
        """
        if self._update.left == 0 or len(self._update.batches) == 1:
            self._update = Update([inputs], 1)
        update, ranks = self._update, self.args.world_size
        update.left -= 1
        if update.tokens is None:
            # here and not in get_batch_samples, after which a resumed Trainer restores the random state
            self._plan(model, update)
        made = update.forwards.pop(0)(inputs) if update.forwards else self.embed_pairs(model, inputs)
        loss = 0.0
        if self.args.mlm_weight:
            mlm = ranks * made.mlm / update.tokens.clamp(min=1)
            update.add({"mlm_loss": mlm})
            loss = loss + self.args.mlm_weight * mlm
        if self.args.dense_weight:
            of_both: dict[str, Any] = {"start": made.start, "parts": len(update.batches), "ranks": ranks}
            share, values = self.objective.share(made.z_a, made.z_b, **of_both)
            update.add(values)
            loss = loss + self.args.dense_weight * share
        tokens = inputs["attention_mask"].sum()
        update.add({TOKENS: tokens, SLOTS: torch.full_like(tokens, made.slots)})
        return (loss, made) if return_outputs else loss

    def _plan(self, model, update: Update) -> None:
        """What the first backward needs of the whole update: its predicted tokens, and the plan of the objective.

        A single micro-batch, and with `keep_graphs` the others too, keep the graph of this forward for their backward. Else
        forwards run without gradient, and the random state from which each is to be replayed is kept.
        """
        if self.args.dense_weight:
            # DDP reduces gradients after the forward of the last micro-batch alone, which is made when its turn has come
            several = len(update.batches) - (self.args.world_size > 1) if self.args.keep_graphs else 0
            graphs = 1 if len(update.batches) == 1 else several
            checked = self.state.global_step == getattr(self, "_initial_global_step", None)
            # without a graph, for moments alone: logits and wrappers are left out where that can be
            bare = model if self.whole_forwards else self.dense_model.base_model
            pair: Any = None
            for place, batch in enumerate(update.batches):
                inputs = self._prepare_inputs(batch)
                if place < graphs:
                    made = self.embed_pairs(model, inputs)
                    update.forwards.append(lambda _, kept=made: kept)  # type: ignore[misc]
                else:
                    restore = random_state(inputs)
                    # the wrapped model brings autocast, but not its body
                    with torch.no_grad(), self.accelerator.autocast():
                        made = self.embed_pairs(bare, inputs, predict=False)
                    first = made.rows() if checked else None
                    update.forwards.append(partial(self._replayed, model, restore, first))
                if made.start is not None:
                    batch["start"] = made.start  # for the replay
                pair = moments_of(made.z_a, made.z_b, self.objective, start=made.start, before=pair)
        tokens = torch.stack([batch["labels"].ne(-100).sum() for batch in update.batches]).sum().to(self.args.device)
        counts = torch.stack([tokens, torch.full_like(tokens, int(self.told_to_stop))])
        if self.args.dense_weight:
            pair, (update.tokens, update.stops) = sum_over_ranks(pair, counts)
            with torch.no_grad():
                update.add(self.objective.plan(pair))
        else:
            update.tokens, update.stops = self.accelerator.reduce(counts, reduction="sum")

    def _replayed(self, model, restore: Callable[[], None], first: Tensor | None, inputs) -> Forward:
        """The forward of a micro-batch with the dropout of its first one, which gave the embeddings `first` (n, d)."""
        restore()
        made = self.embed_pairs(model, inputs)
        if first is not None and (first - made.rows()).norm() > 1e-2 * (first - first.mean(0)).norm():
            logger.warning(
                "The replayed forward differs from the first: dropout was not reproduced, and the dense gradient is that of "
                "another dropout mask. Set the model's dropout to 0 for exact accumulation."
            )
        return made

    def agreed_to_stop(self) -> bool:
        """Whether any rank was told to stop, as the collective of the update counted."""
        return bool(self._update.stops)

    def embed_pairs(self, model, inputs, *, predict: bool = True) -> Forward:
        """Both notes of each pair through the model; without `predict` the language-modelling loss is 0."""
        made = forward_pairs(
            model,
            self.dense_model,
            inputs,
            predict=predict and self.args.mlm_weight > 0,
            by_position=self.by_position,
            grouped=not self.whole_forwards,
        )
        if self.start is None or "start" in inputs:
            return made._replace(start=inputs.get("start"))
        # a second forward, which reads no cache and fits any stream
        options = {"predict": False, "by_position": False, "grouped": True}
        with torch.no_grad(), self.accelerator.autocast():
            start = forward_pairs(self.start.base_model, self.start, inputs, **options)
        return made._replace(start=(start.z_a, start.z_b))

    # ---- The step ----

    def create_optimizer(self, *args, **kwargs):
        """Add the parameters of the objective; a model without a trainable parameter is refused."""
        check_trainable(self.model)
        own = self.objective.parameters() if self.optimizer is None else []
        optimizer = super().create_optimizer(*args, **kwargs)
        if own:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    def _clip_grad_norm(self, model, largest: float | None = None):
        """The stock Trainer would leave the gradients of what the objective trains along as they are."""
        own = self.objective.parameters()
        if not own:
            return super()._clip_grad_norm(model)
        if self.args.world_size > 1:  # no wrapper of the model averages them
            for weight in (weight for weight in own if weight.grad is not None):
                weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")
        largest = self.args.max_grad_norm if largest is None else largest
        return self.accelerator.clip_grad_norm_([*model.parameters(), *own], largest)

    def _get_grad_norm(self, model, grad_norm=None):
        """Drop the gradients if they are not finite: reduced over ranks, they are so on all ranks or on none."""
        if grad_norm is None and self.objective.parameters():
            grad_norm = self._clip_grad_norm(model, math.inf)
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if math.isfinite(grad_norm):
            self.update_log.add(self._update)
        else:
            self.update_log.skip(self.state.global_step + 1)
            model.zero_grad(set_to_none=True)
            self.objective.module.zero_grad()
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, unweighted, and the state of the spectrum to the training log."""
        if "loss" in logs:
            means = self.update_log.means(partial(self.accelerator.reduce, reduction="mean"))
            if means and self.objective.covariance is not None:
                means["effective_rank"] = covariance_rank(self.objective.covariance)
            logs |= {"skipped_updates": self.update_log.skipped} | means
            if self.args.mlm_weight != self.mlm_weight_before:  # a callback may change it
                logs["mlm_weight"] = self.args.mlm_weight
        super().log(logs, start_time)


@torch.no_grad()
def moments_of(
    z_a: Tensor, z_b: Tensor, objective: Objective, *, start: Rows | None, before: PairMoments | None = None
) -> PairMoments:
    """Moments of the two sides of pairs, of what the terms see, added to those of the pairs `before`.

    All batches and ranks need the same shift, near the mean, so that their moments add up and lose no digits: that of the
    pairs before, the objective's, or the mean over all ranks.
    """
    z_a, z_b = objective.seen(z_a.detach()), objective.seen(z_b.detach())
    shift = objective.shift if before is None else before.a.shift
    shift = mean_over_ranks(torch.cat([z_a, z_b])) if shift is None else shift
    pair = PairMoments.of(z_a, z_b, shift, cross=objective.needs_cross_moment, start=start)
    return pair if before is None else before + pair


def covariance_rank(covariance: Tensor) -> float:
    """Effective rank of a covariance (d, d); one that is not finite counts as zeros."""
    return effective_rank_of_spectrum(torch.linalg.eigvalsh(torch.nan_to_num(covariance)).clamp(min=0))


class UpdateLog:
    """Means of what updates are logged with, and the count of updates whose gradient was not finite, since the run began."""

    def __init__(self):
        self.skipped = self._in_a_row = self._updates = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, update: Update) -> None:
        """Count an update that was made."""
        for name, value in update.sums.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._updates += 1
        self._in_a_row = 0

    def skip(self, step: int) -> None:
        """Count one that was not; RuntimeError for the 50th in a row."""
        self.skipped += 1
        self._in_a_row += 1
        # the loss scale of float16 needs some skips; a run with more of them trains nothing
        if self._in_a_row == MAXIMUM_SKIPPED:
            raise RuntimeError(
                f"{MAXIMUM_SKIPPED} updates in a row had a gradient that is not finite, up to step {step}: nothing is being "
                "trained. Lower the learning rate, try float32 or bf16, and look for NaN in the model's weights. "
                "Checkpoints are in output_dir as they were saved."
            )
        logger.warning("Step %d: non-finite gradient, update skipped.", step)

    def means(self, reduce: Callable[[Any], Any]) -> dict[str, float]:
        """Means over ranks, by `reduce`, and updates since the last call that were not skipped; {} where there was none."""
        # all ranks come here at the same update, so that the collective below is in step
        sums, updates = self._sums, self._updates
        self._sums, self._updates = {}, 0
        if not updates:
            return {}
        sums = {name: value.item() for name, value in reduce(sums).items() if name != "loss"}
        waste = 1 - sums.pop(TOKENS) / sums.pop(SLOTS)
        return {name: value / updates for name, value in sums.items()} | {"padding_waste": waste}


def random_state(inputs: dict) -> Callable[[], None]:
    """A function that restores the random state of now, of the CPU and of the devices of a batch, to replay a forward."""
    cpu, tensors = torch.get_rng_state(), [value for value in inputs.values() if isinstance(value, Tensor)]
    devices, states = get_device_states(*tensors)
    kinds = [tensor.device.type for tensor in tensors if tensor.device.type != "cpu"]

    def restore() -> None:
        torch.set_rng_state(cpu)
        if kinds:
            set_device_states(devices, states, device_type=kinds[0])

    return restore
