"""DenseTrainer: the transformers Trainer on adjacent notes, with an exact dense objective for any cut of the batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_densefeat.data.streaming import PairStream
from hf_densefeat.data.tokens import TokenPairs, TokenStats
from hf_densefeat.evaluation.geometry import effective_rank_of_spectrum
from hf_densefeat.models.adapters import without_adapter
from hf_densefeat.objective.batch_loss import BatchLoss
from hf_densefeat.objective.distributed import mean_over_ranks, sum_over_ranks
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.reporting.comparison import Measured
from hf_densefeat.training.arguments import DenseTrainingArguments
from hf_densefeat.training.checkpoints import Saving
from hf_densefeat.training.checks import (
    check_functions,
    check_head,
    check_objective,
    check_sharding,
    check_stream,
    check_subspace,
    check_trainable,
)
from hf_densefeat.training.loaders import Loading
from hf_densefeat.training.preparation import pair_collator, prepare_model, prepare_tokenizer, token_pairs
from hf_densefeat.training.update import RandomState, Update, add_parameters, check_replay, summed_cross_entropy

logger = logging.getLogger(__name__)

MOST_SKIPPED = 50  # in a row; the loss scale of float16 may need some


class DenseTrainer(Loading, Saving, Trainer):
    """Continued pretraining with the loss of `DenseTrainingArguments`: MLM and the dense terms.

    The same global batch gives the same loss and the same gradient however it is cut into ranks and micro-batches. The
    dense terms are functions of the moments of all embeddings of an update: these are summed over micro-batches and
    ranks without gradient, and each row receives the gradient at the global moments (`DenseObjective.gradient`). With
    gradient accumulation a pass without gradient over the update's micro-batches comes first, and each forward is
    replayed with the same dropout. The language-modelling term is the mean over all predicted tokens of the update.

    Args:
        model: Hub name, folder, or model; `DenseFeatureMixin` is mixed into it.
        args: `DenseTrainingArguments`.
        train_dataset: notes as `load_notes` returns them (pairs and tokens are made here), `TokenPairs`, or with
            `max_steps` a `datasets.IterableDataset` of notes sorted by patient and time: see `PairStream`.
        eval_dataset: notes or `TokenPairs`, or a dict of such.
        objective: the `DenseObjective` to train instead of that of `args` (whose lambda_sub and other options of the
            objective are then without effect), with terms of your own, or a `BatchLoss`, which is refused with gradient
            accumulation and with several ranks. Log, evaluation and checkpoints have each of its terms.
        processing_class: the tokenizer, or the processor of windows (`events`); by default that of the model.
        peft_config: train this adapter (LoRA and its kin) and freeze the rest. What is saved is the encoder with the adapter
            merged in, and in `adapter/` the adapter, from which a run resumes. A `PeftModel` as `model` does the same.
        evaluator: called as `evaluator(model, tokenizer)` at each evaluation, on every rank; its dict of numbers joins
            the metrics, where `metric_for_best_model` and early stopping see them.
        kwargs: as for `Trainer`.

    An update whose gradient is not finite is skipped on all ranks, and counted; 50 in a row are a RuntimeError. Raises
    ValueError before training for a model without the head that `mlm_weight > 0` needs, a `subspace_dim` that
    the batch cannot support, notes without pairs, and functions of `Trainer` that would never be called.
    """

    measured: Sequence[Measured] = ()  # what was measured before and after training, for the model card
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole update

    def __init__(
        self,
        model,
        args: DenseTrainingArguments | None = None,
        data_collator=None,
        train_dataset: Dataset | TokenPairs | IterableDataset | None = None,
        eval_dataset: Dataset | TokenPairs | dict | None = None,
        processing_class=None,
        evaluator=None,
        peft_config: PeftConfig | None = None,
        *,
        objective: DenseObjective | BatchLoss | None = None,
        **kwargs,
    ):
        args = args if args is not None else DenseTrainingArguments()
        check_functions(kwargs)
        model, adapted = prepare_model(model, args, peft_config)
        processing_class = prepare_tokenizer(processing_class, model)
        self.evaluator = evaluator
        self.objective = args.dense_objective() if objective is None else objective
        check_objective(self.objective, args)
        check_head(model, args)
        self.token_stats: dict[str, TokenStats] = {}
        data_collator = data_collator or pair_collator(processing_class, model, args)
        with args.main_process_first(desc="tokenising notes"):
            make = partial(
                token_pairs, processing_class=processing_class, model=model, args=args, stats=self.token_stats
            )
            train_dataset, eval_dataset = make(train_dataset, "train"), make(eval_dataset, "eval")
        super().__init__(
            model=adapted,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._check()
        if isinstance(self.objective, BatchLoss):
            self.objective.to(args.device)
        self.model_accepts_loss_kwargs = False  # or the Trainer counts tokens, with one more collective
        self.skipped_updates = self._skipped_in_a_row = self._updates_summed = 0
        self._micro_batches: list[dict] = []
        self._stream: PairStream | None = None
        self._stream_state = ""
        self._update: Update | None = None
        self._sums: dict[str, Tensor] = {}

    def _check(self) -> None:
        """What can be refused only when devices, ranks and sharding are known."""
        args, model = self.args, self.dense_model
        if args.n_gpu > 1:
            raise ValueError(f"One process sees {args.n_gpu} GPUs. Start one process a GPU: accelerate launch ...")
        if isinstance(self.model, PeftModel) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("An adapter cannot be merged into sharded weights. Train it without FSDP and DeepSpeed.")
        if self.is_fsdp_enabled:
            check_sharding(model)
        streamed = isinstance(self.train_dataset, IterableDataset)
        if streamed:
            check_stream(args, self.processing_class)
            args.ignore_data_skip = True  # the stream goes on by itself where the checkpoint left it
        if self.train_dataset is not None and args.dense_weight and isinstance(self.objective, DenseObjective):
            pairs = math.inf if streamed else len(self.train_dataset)
            check_subspace(pairs, self.get_total_train_batch_size(args), model.config.hidden_size, self.objective)

    def predict(self, *args, **kwargs):
        """Refused: evaluation keeps moments, not predictions."""
        raise ValueError(
            "DenseTrainer keeps no predictions: `trainer.evaluate(notes)` gives the terms of the loss, and "
            "`trainer.dense_model.encode(texts)` the embeddings."
        )

    # ---- The loss ----

    def create_optimizer(self, *args, **kwargs):
        """Also with the parameters of a `BatchLoss`; a model without a trainable parameter is refused."""
        check_trainable(self.model)
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and isinstance(self.objective, BatchLoss):
            add_parameters(optimizer, self.objective.parameters())
        return optimizer

    @property
    def dense_model(self):
        """The model that is trained, without what wraps it: DDP, FSDP, torch.compile, an adapter."""
        return without_adapter(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Also remember the update's micro-batches: `compute_loss` needs all of them before the first backward."""
        micro_batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches, self._update = micro_batches, None
        for batch in micro_batches:
            self._stream_state = batch.pop("stream", "")
        return micro_batches, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the update's loss: shares add up over micro-batches and average over ranks."""
        if self._update is None:
            # here and not in get_batch_samples, after which a resumed Trainer restores the random state
            self._update = Update(len(self._micro_batches))
            if not self.args.dense_weight:
                tokens = sum(batch["labels"].ne(-100).sum() for batch in self._micro_batches)
                self._update.tokens = self.accelerator.reduce(tokens.to(self.args.device), reduction="sum")
            elif len(self._micro_batches) > 1:
                self._window_pass(model, self._update)
        update, ranks = self._update, self.args.world_size
        if update.random_states:
            update.random_states.pop(0).restore()
        outputs, z_a, z_b = self.embed_pairs(model, inputs)
        if update.tokens is None:
            with torch.no_grad():
                shift = self._shift(torch.cat([z_a, z_b]))
                tokens = inputs["labels"].ne(-100).sum()[None]
                self._plan(update, self._moments(z_a.detach(), z_b.detach(), shift), tokens)
        if update.expected:
            check_replay(update.expected.pop(0), torch.cat([z_a, z_b]).detach())
        loss = 0.0
        if self.args.mlm_weight:
            mlm = summed_cross_entropy(outputs.logits, inputs["labels"]) / update.tokens.clamp(min=1)
            update.add("mlm_loss", mlm * ranks)
            loss = loss + self.args.mlm_weight * ranks * mlm
        if self.args.dense_weight:
            loss = loss + self.args.dense_weight * self._dense_term(update, z_a, z_b)
        update.add("tokens", inputs["attention_mask"].sum())
        update.add("slots", torch.full_like(update.tokens, inputs["attention_mask"].numel()))
        return (loss, outputs) if return_outputs else loss

    def _dense_term(self, update: Update, z_a: Tensor, z_b: Tensor) -> Tensor:
        """This micro-batch's share: the value of the terms, and their gradient by the rows at the global moments."""
        if isinstance(self.objective, BatchLoss):
            values = self.objective(z_a, z_b)
            for name, value in values.items():
                update.add(name, value)
            return values["loss"]
        gradients = update.gradient.pullback(z_a, z_b)
        surrogate = sum((g * z).sum() for g, z in zip(gradients, (z_a, z_b), strict=True)) * self.args.world_size
        value = update.terms["loss"] / update.micro_batches
        return surrogate + (value - surrogate).detach()

    def embed_pairs(self, model, inputs):
        """One forward of both notes of each pair: outputs, Z_a and Z_b, both (pairs, d)."""
        pairs = int(inputs["num_pairs"])
        tokens = {
            name: value for name, value in inputs.items() if name not in ("labels", "num_pairs", "chunk_to_note")
        }
        dense = self.dense_model
        with dense.capture_hidden():
            outputs = model(**tokens)
            z = dense.pooled(tokens["attention_mask"], inputs.get("chunk_to_note"), num_notes=2 * max(pairs, 1))
        half = len(z) // 2
        return outputs, z[:pairs], z[half : half + pairs]

    @torch.no_grad()
    def _window_pass(self, model, update: Update) -> None:
        """Moments of all micro-batches of the update, and the random state from which each forward is to be replayed."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile):
            model = self.dense_model.base_model  # no logits; the wrappers are for gradients, and for these three
        totals, tokens = None, 0
        for micro_batch in self._micro_batches:
            inputs = self._prepare_inputs(micro_batch)
            update.random_states.append(RandomState(inputs))
            with self.accelerator.autocast():
                _, z_a, z_b = self.embed_pairs(model, inputs)
            shift = self._shift(torch.cat([z_a, z_b])) if totals is None else totals.a.shift
            pair = self._moments(z_a, z_b, shift)
            totals = pair if totals is None else totals + pair
            tokens = tokens + inputs["labels"].ne(-100).sum()[None]
            if self.state.global_step == self._initial_global_step:
                update.expected.append(torch.cat([z_a, z_b]))
        self._plan(update, totals, tokens)

    @torch.no_grad()
    def _plan(self, update: Update, pair: PairMoments, tokens: Tensor) -> None:
        """One all-reduce, then the terms and their gradient, the same on every rank."""
        if isinstance(self.objective, BatchLoss):
            update.tokens = tokens[0]
            return
        pair, counts = sum_over_ranks(pair, tokens)
        update.tokens = counts[0]
        update.terms, update.gradient = self.objective.gradient(pair)
        for name, value in (update.terms | self.objective.diagnostics).items():
            update.add(name, value)

    def _moments(self, z_a: Tensor, z_b: Tensor, shift: Tensor) -> PairMoments:
        return PairMoments.of(z_a, z_b, shift, cross=self.objective.needs_cross_moment)

    def _shift(self, z: Tensor) -> Tensor:
        return self.objective.shift if self.objective.shift is not None else mean_over_ranks(z)

    def _get_grad_norm(self, model, grad_norm=None):
        """Drop the gradients if they are not finite: reduced over ranks, they are so on all ranks or on none."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if math.isfinite(grad_norm):
            for name, value in self._update.sums.items():
                self._sums[name] = self._sums.get(name, 0) + value
            self._updates_summed += 1
            self._skipped_in_a_row = 0
        else:
            self.skipped_updates += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row == MOST_SKIPPED:
                raise RuntimeError(
                    f"{MOST_SKIPPED} updates in a row had a gradient that is not finite, up to step "
                    f"{self.state.global_step + 1}: nothing is being trained. Lower the learning rate, try float32 or bf16, "
                    "and look for NaN in the model's weights. Checkpoints are in output_dir as they were saved."
                )
            logger.warning("Step %d: non-finite gradient, update skipped.", self.state.global_step + 1)
            model.zero_grad(set_to_none=True)
        return grad_norm

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, unweighted, and the state of the spectrum to the training log."""
        if "loss" in logs:
            logs |= {"skipped_updates": self.skipped_updates}
            if self._updates_summed:
                logs |= self._mean_terms()
            self._sums, self._updates_summed = {}, 0
        super().log(logs, start_time)

    def _mean_terms(self) -> dict[str, float]:
        """Means over the updates since the last log, without those that were skipped."""
        sums = self.accelerator.reduce(self._sums, reduction="mean")
        tokens, slots = sums.pop("tokens"), sums.pop("slots")
        terms = {name: value.item() / self._updates_summed for name, value in sums.items() if name != "loss"}
        if self.objective.covariance is not None:
            terms["effective_rank"] = _effective_rank(self.objective.covariance)
        return terms | {"padding_waste": 1 - (tokens / slots).item()}

    # ---- Evaluation ----

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Terms of the whole evaluation set, from its moments, so that they do not depend on the batch size."""
        model = self._evaluation_model()
        model.eval()
        pair, batch_values = None, []
        sums = torch.zeros(2, device=self.args.device, dtype=torch.float64)
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            outputs, z_a, z_b = self.embed_pairs(model, inputs)
            if pair is None:
                pair = self._moments(z_a, z_b, mean_over_ranks(torch.cat([z_a, z_b])))
            else:
                pair = pair + self._moments(z_a, z_b, pair.a.shift)
            if isinstance(self.objective, BatchLoss):
                batch_values.append(self.objective(z_a, z_b))
            if self.args.mlm_weight:
                sums[0] += summed_cross_entropy(outputs.logits, inputs["labels"])
                sums[1] += inputs["labels"].ne(-100).sum()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        pair, sums = sum_over_ranks(pair, sums)
        args = self.args
        if isinstance(self.objective, BatchLoss):  # of single batches: there is no value of the whole set
            values = {name: torch.stack([v[name] for v in batch_values]).mean() for name in batch_values[0]}
        else:
            values = self.objective.pure().values(pair)
        terms = {name: value.item() for name, value in values.items()}
        loss = args.dense_weight * terms.pop("loss")
        if args.mlm_weight:
            terms["mlm_loss"] = (sums[0] / sums[1].clamp(min=1)).item()
            loss += args.mlm_weight * terms["mlm_loss"]
        pooled = (pair.a.covariance(args.center) + pair.b.covariance(args.center)) / 2
        metrics = {"loss": loss, **terms, "effective_rank": _effective_rank(pooled)}
        if self.evaluator is not None:
            metrics |= self.evaluator(self.dense_model, self.processing_class)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    def _evaluation_model(self):
        """The model as `train` wrapped it, or wrapped for evaluation alone."""
        if self.is_in_train or self.model_wrapped is not self.model or self.accelerator._models:
            return self.model_wrapped
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.model = self.model_wrapped = self.accelerator.prepare(self.model)
            return self.model
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)


def _effective_rank(covariance: Tensor) -> float:
    return effective_rank_of_spectrum(torch.linalg.eigvalsh(torch.nan_to_num(covariance)).clamp(min=0))
