"""DenseTrainer: the transformers Trainer on adjacent notes, with an exact dense objective for any cut of the batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_utils import EvalLoopOutput

from hf_densefeat.data.inputs import PairDataset, ReadingStats
from hf_densefeat.data.streaming import PairStream
from hf_densefeat.models.adapters import without_adapter
from hf_densefeat.models.sentence_transformers import evaluated
from hf_densefeat.objective.base import Objective
from hf_densefeat.objective.statistics import Term
from hf_densefeat.reporting.comparison import Measured
from hf_densefeat.training.arguments import DenseTrainingArguments
from hf_densefeat.training.checkpoints import read_objective, write_objective
from hf_densefeat.training.checks import check_functions, check_head, check_objective, check_run, check_trainable
from hf_densefeat.training.forward import Forward, forward_pairs, predicts_by_position
from hf_densefeat.training.held_out import covariance_rank, evaluation_model, held_out_terms
from hf_densefeat.training.loaders import pair_loader, pair_stream, stream_loader, train_loader
from hf_densefeat.training.preparation import (
    pair_collator,
    pair_datasets,
    pair_processor,
    prepare_model,
    prepare_tokenizer,
)
from hf_densefeat.training.resumable import ResumableTrainer
from hf_densefeat.training.run import described_run, run_fingerprint, write_card
from hf_densefeat.training.update import Update, UpdateLog, check_replay, moments_of


class DenseTrainer(ResumableTrainer):
    """Continued pretraining with the loss of `DenseTrainingArguments`: MLM and the dense terms.

    The same global batch gives the same loss and the same gradient however it is cut into ranks and micro-batches. The
    dense terms are functions of the moments of all embeddings of an update: these are summed over micro-batches and
    ranks without gradient, and each row receives the gradient at the global moments (`DenseObjective.gradient`). With
    gradient accumulation a pass without gradient over the update's micro-batches comes first, and each forward is
    replayed with the same dropout. The language-modelling term is the mean over all predicted tokens of the update.

    Args:
        model: Hub name, folder, or model; `DenseFeatureMixin` is mixed into it.
        args: `DenseTrainingArguments`.
        train_dataset: notes as `load_notes` returns them (pairs and tokens are made here), `PairDataset`, or with
            `max_steps` a `datasets.IterableDataset` of notes sorted by patient and time: see `PairStream`.
        eval_dataset: notes or `PairDataset`, or a dict of such.
        terms: terms of the objective beside those of `args`, as for `DenseObjective`. Log, evaluation and checkpoints have
            each of them.
        objective: a `DenseObjective` to train in the place of that of `args`, whose lambda_sub and other options of the
            objective are then without effect; or a `BatchLoss`, which is refused with gradient accumulation and with
            several ranks.
        model_init: in the place of `model`, as for `Trainer`: the function that makes the model of each `train`.
        processing_class: the tokenizer, or the `PairProcessor` of another kind of input; by default that of the model.
        peft_config: train this adapter (LoRA and its kin) and freeze the rest. What is saved is the encoder with the adapter
            merged in, and in `adapter/` the adapter, from which a run resumes. A `PeftModel` as `model` does the same.
        evaluator: called as `evaluator(model, tokenizer)` at each evaluation, on every rank, or as sentence-transformers'
            are, `evaluator(SentenceTransformer)`; its numbers join the metrics, where `metric_for_best_model` sees them.
        kwargs: as for `Trainer`.

    An update whose gradient is not finite is skipped on all ranks, and counted; 50 in a row are a RuntimeError. Raises
    ValueError before training for a model without the head that `mlm_weight > 0` needs, a `subspace_dim` that
    the batch cannot support, notes without pairs, and functions of `Trainer` that would never be called.
    """

    args: DenseTrainingArguments
    objective: Objective
    train_dataset: Any
    eval_dataset: Any
    stream: PairStream | None
    measured: Sequence[Measured] = ()  # what was measured before and after training, for the model card
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole update

    def __init__(
        self,
        model=None,
        args: DenseTrainingArguments | None = None,
        data_collator=None,
        train_dataset: Dataset | PairDataset | IterableDataset | None = None,
        eval_dataset: Dataset | PairDataset | dict | None = None,
        processing_class=None,
        evaluator=None,
        peft_config: PeftConfig | None = None,
        *,
        terms: Mapping[str, Term | float] | None = None,
        objective: Objective | None = None,
        model_init: Any = None,
        **kwargs,
    ):
        args = args or DenseTrainingArguments()
        check_functions(kwargs, data_collator)
        if (model is None) == (model_init is None):
            raise ValueError("Expected either a model (a name, a folder or the model itself) or model_init.")
        if terms and objective is not None:
            raise ValueError("Expected terms or objective, not both: give the objective its terms itself.")
        self._peft_config, self._terms, self._given = peft_config, terms, objective
        # before the first random weight, as the stock Trainer does
        set_seed(args.seed)
        self.model_init = model_init
        model, adapted = prepare_model(model if model_init is None else self._initialised(None), args, peft_config)
        processing_class = prepare_tokenizer(processing_class, model)
        self.processor = pair_processor(processing_class, model, args)
        self.evaluator = evaluator
        self.objective = args.dense_objective(terms=terms) if objective is None else objective
        self._objective_start = copy.deepcopy(self.objective.state_dict())
        check_objective(self.objective, args)
        check_head(model, args)
        # copied before a checkpoint is loaded, so that a resumed run has the same start
        wanted = self.objective.needs_start and args.dense_weight > 0
        self.start: Any = copy.deepcopy(model).requires_grad_(False).eval() if wanted else None
        self.reading_stats: dict[str, ReadingStats] = {}
        with args.main_process_first(desc="tokenising notes"):
            train_dataset = self._pairs(train_dataset, "train", model, args)
            eval_dataset = self._pairs(eval_dataset, "eval", model, args)
        self.update_log, self.stream = UpdateLog(), None
        self.mlm_weight_before = args.mlm_weight
        self._micro_batches: list = []
        self._awaited = 0  # micro-batches of the update for which `compute_loss` has not been called
        self._update: Update | None = None
        super().__init__(
            model=adapted,
            args=args,
            data_collator=data_collator or pair_collator(self.processor, model, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_init = model_init
        if self.start is not None:
            self.start.to(args.device)
        self.model_accepts_loss_kwargs = False  # or the Trainer counts tokens, with one more collective
        check_run(self)
        self.by_position = self._takes_positions()

    def _pairs(self, notes, name: str, model, args: DenseTrainingArguments):
        limits: dict[str, Any] = {"max_length": model.max_length, "kinds": args.pairs, "max_gap": args.max_gap}
        return pair_datasets(notes, name, processor=self.processor, stats=self.reading_stats, **limits)

    def _takes_positions(self) -> bool:
        """Whether the head is given predicted positions alone; a compiled model would be compiled for each number of them."""
        wanted = self.args.mlm_weight > 0 and not self.args.torch_compile
        return wanted and predicts_by_position(self.dense_model, self.data_collator([]))

    def predict(self, *args, **kwargs):
        """Refused: evaluation keeps moments, not predictions."""
        raise ValueError(
            "DenseTrainer keeps no predictions: `trainer.evaluate(notes)` gives the terms of the loss, and "
            "`trainer.dense_model.encode(texts)` the embeddings."
        )

    # ---- The loss ----

    def call_model_init(self, trial=None):
        """A fresh model for a run or a trial, and a fresh objective of the arguments that a trial has set."""
        model, adapted = prepare_model(self._initialised(trial), self.args, self._peft_config)
        model._densefeat_tokenizer = self.processing_class
        if self._given is None:
            self.objective = self.args.dense_objective(terms=self._terms)
        else:
            self.objective.load_state_dict(self._objective_start)
        self.update_log = UpdateLog()
        return adapted

    def _initialised(self, trial):
        return super().call_model_init(trial)

    def create_optimizer(self, *args, **kwargs):
        """Also with the parameters of the objective; a model without a trainable parameter is refused."""
        check_trainable(self.model)
        own = self.objective.parameters() if self.optimizer is None else []
        optimizer = super().create_optimizer(*args, **kwargs)
        if own:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    @property
    def dense_model(self):
        """The model that is trained, without what wraps it: DDP, FSDP, torch.compile, an adapter."""
        return without_adapter(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Also remember the update's micro-batches: `compute_loss` needs all of them before the first backward."""
        self._micro_batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._update, self._awaited = None, len(self._micro_batches)
        self.objective.module.zero_grad()  # the stock Trainer zeroes the gradients of the model alone
        for batch in self._micro_batches:
            if self.stream is not None:
                self.stream.position = batch.pop("stream")
        return self._micro_batches, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the update's loss: shares add up over micro-batches and average over ranks.

        Without `get_batch_samples` before, which `train` calls, the micro-batch is the whole update.
        """
        if not self._awaited:
            self._micro_batches, self._update, self._awaited = [inputs], None, 1
        self._awaited -= 1
        if self._update is None:
            # here and not in get_batch_samples, after which a resumed Trainer restores the random state
            self._update = self._planned(model)
        update, ranks = self._update, self.args.world_size
        made = update.kept.pop(0) if update.kept else self._replayed(model, inputs, update)
        if update.tokens is None:
            update.plan(self.objective, moments_of(made, self.objective), inputs["labels"].ne(-100).sum())
        loss = 0.0
        if self.args.mlm_weight:
            mlm = made.mlm / update.tokens.clamp(min=1)
            update.add({"mlm_loss": mlm * ranks})
            loss = loss + self.args.mlm_weight * ranks * mlm
        if self.args.dense_weight:
            loss = loss + self.args.dense_weight * update.dense_share(self.objective, made, ranks)
        update.add_slots(inputs["attention_mask"], made.slots)
        return (loss, made) if return_outputs else loss

    def _planned(self, model) -> Update:
        """The update, planned where more than one forward is needed for it, or none."""
        update = Update(len(self._micro_batches), told_to_stop=self.told_to_stop)
        if not self.args.dense_weight:
            tokens = sum(batch["labels"].ne(-100).sum() for batch in self._micro_batches)
            counts = update.counts(tokens.to(self.args.device))
            update.tokens, update.stops = self.accelerator.reduce(counts, reduction="sum")
        elif len(self._micro_batches) > 1:
            # DDP reduces gradients after a forward that it is told to: the last one is made when its turn has come
            graphs = len(self._micro_batches) - (self.args.world_size > 1) if self.args.keep_graphs else 0
            update.moments_pass(
                map(self._with_start, self._micro_batches),
                partial(self._first_forward, model),
                self.objective,
                keep_graphs=graphs,
                keep_embeddings=self.state.global_step == getattr(self, "_initial_global_step", None),
            )
        return update

    def agreed_to_stop(self) -> bool:
        """Whether any rank was told to, as the collective of the update found."""
        return self._update is not None and bool(self._update.stops)

    def _first_forward(self, model, inputs) -> Forward:
        """A forward of the moments pass; without a graph, logits and wrappers are left out where that can be."""
        if torch.is_grad_enabled():
            return self.embed_pairs(model, inputs)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile):
            model = self.dense_model.base_model  # the wrappers are for gradients, and for these three
        with self.accelerator.autocast():  # which the wrapped model brings, but not its body
            return self.embed_pairs(model, inputs, predict=False)

    def _replayed(self, model, inputs, update: Update) -> Forward:
        """The forward of a micro-batch, with the dropout of its first one if there was one."""
        if update.random_states:
            update.random_states.pop(0).restore()
        made = self.embed_pairs(model, inputs)
        if update.expected:
            check_replay(update.expected.pop(0), made.rows())
        return made

    def embed_pairs(self, model, inputs, *, predict: bool = True) -> Forward:
        """Both notes of each pair through the model; without `predict` the language-modelling loss is 0."""
        made = forward_pairs(
            model,
            self.dense_model,
            inputs,
            predict=predict and self.args.mlm_weight > 0,
            by_position=self.by_position,
            # a sharded model gathers weights in each forward, and all ranks must make the same number of them
            grouped=not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile),
        )
        if self.start is None:
            return made
        return made._replace(start=inputs["start"] if "start" in inputs else self._start_rows(inputs))

    @torch.no_grad()
    def _start_rows(self, inputs) -> tuple[Tensor, Tensor]:
        """Embeddings of the same notes by the frozen start: a second forward, which reads no cache and fits any stream."""
        with self.accelerator.autocast():
            made = forward_pairs(
                self.start.base_model, self.start, inputs, predict=False, by_position=False, grouped=True
            )
        return made.z_a, made.z_b

    def _with_start(self, batch: dict) -> dict:
        """A micro-batch on the device, with the rows of the frozen start, which the replay of its forward reuses."""
        inputs = self._prepare_inputs(batch)
        if self.start is not None:
            batch["start"] = inputs["start"] = self._start_rows(inputs)
        return inputs

    def _clip_grad_norm(self, model, largest: float | None = None):
        """Also of what the objective trains along."""
        own = self.objective.parameters()
        if not own:
            return super()._clip_grad_norm(model)
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

    # ---- Logs ----

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

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank, which no one else shards."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset: notes with patient_id, time and text.")
        options: dict[str, Any] = {"collator": self.data_collator, "args": self.args}
        if isinstance(self.train_dataset, IterableDataset):
            options |= {"processor": self.processor, "max_length": self.dense_model.max_length}
            self.stream = pair_stream(self.train_dataset, self._train_batch_size, **options)
            return stream_loader(self.stream, self.args)
        return train_loader(self.train_dataset, self._train_batch_size, **options)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """All pairs once, longest first, the same masks each time."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        eval_dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if eval_dataset is None:
            raise ValueError("Evaluation needs an eval_dataset: notes with patient_id, time and text.")
        pairs = self._pairs(eval_dataset, "eval", self.dense_model, self.args)
        return pair_loader(
            pairs, self.args.eval_batch_size, collator=self.data_collator, args=self.args, shuffle=False
        )

    # ---- Checkpoints and the card ----

    def fingerprint(self) -> dict[str, Any]:
        """Options that change the mathematics, and digests of model and data, not the steps, devices or what is saved."""
        return run_fingerprint(self)

    def _save_optimizer_and_scheduler(self, output_dir):
        """The stock Trainer knows nothing of the objective: its state is saved once, the same on all ranks."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            position = self.stream.position if self.stream else ""
            state = self.objective.state_dict()
            write_objective(Path(output_dir), state, skipped=self.update_log.skipped, stream=position)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As `_save_optimizer_and_scheduler`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state, self.update_log.skipped, position = read_objective(Path(checkpoint), self.args.device)
        self.objective.load_state_dict(state)
        if self.stream is not None:
            if not position:
                raise ValueError(
                    "The checkpoint is not of a run on a stream. Resume it with the notes it was trained on."
                )
            self.stream.load_state(position)

    # keyword-only here, unlike in transformers
    def create_model_card(  # type: ignore[override]
        self, *, model_name: str | None = None, finetuned_from: str | None = None, **options
    ) -> None:
        """Write README.md: numbers, never text, and usage that runs as printed.

        `measured`, a list on the trainer, holds what was measured before and after, if anything was. `language`,
        `license`, `tags` and `dataset` are as for `reporting.card.model_card`.
        """
        if self.is_world_process_zero():
            run = described_run(self, finetuned_from)
            folder = Path(str(self.args.output_dir))
            name = self.hub_model_id or self.args.hub_model_id or model_name or folder.absolute().name
            write_card(folder, name, self.dense_model, run, self.measured, **options)

    # ---- Evaluation ----

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Terms of the whole evaluation set, from its moments, so that they do not depend on the batch size."""
        model = evaluation_model(self)
        model.eval()
        self.objective.module.train(False)

        def prepared():
            for inputs in dataloader:
                yield self._prepare_inputs(inputs)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        metrics = held_out_terms(
            prepared(),
            partial(self.embed_pairs, model),
            self.objective,
            mlm_weight=self.args.mlm_weight,
            dense_weight=self.args.dense_weight,
        )
        self.objective.module.train()
        if self.evaluator is not None:
            metrics |= evaluated(self.evaluator, self.dense_model, self.processing_class)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))  # type: ignore[arg-type]
