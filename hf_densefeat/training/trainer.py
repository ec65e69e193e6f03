"""DenseTrainer: the transformers Trainer on adjacent notes, with an exact dense objective for any cut of the batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_utils import EvalLoopOutput

from hf_densefeat.data.inputs import PairDataset, ReadingStats
from hf_densefeat.data.streaming import PairStream
from hf_densefeat.models.sentence_transformers import evaluated
from hf_densefeat.objective.base import Objective
from hf_densefeat.objective.distributed import sum_over_ranks
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.objective.statistics import Term
from hf_densefeat.reporting.comparison import Measured
from hf_densefeat.training.arguments import DenseTrainingArguments
from hf_densefeat.training.checkpoints import read_objective, write_objective
from hf_densefeat.training.checks import check_functions, check_objective, check_run
from hf_densefeat.training.forward import predicts_by_position
from hf_densefeat.training.preparation import (
    pair_datasets,
    pair_loader,
    pair_processor,
    prepare_model,
    prepare_tokenizer,
    stream_loader,
)
from hf_densefeat.training.run import run_fingerprint, write_card
from hf_densefeat.training.update import UpdateLog, UpdateTrainer, covariance_rank, moments_of


class DenseTrainer(UpdateTrainer):
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

    train_dataset: Any
    eval_dataset: Any
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
        *,
        evaluator=None,
        peft_config: PeftConfig | None = None,
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
        given: Any = super().call_model_init() if model is None else model
        model, adapted = prepare_model(given, args, peft_config)
        processing_class = prepare_tokenizer(processing_class, model)
        self.processor = pair_processor(processing_class, model, args)
        self.evaluator = evaluator
        made = {"terms": terms, "width": model.embedding_dimension}
        self.objective = args.dense_objective(**made) if objective is None else objective
        self._objective_start = copy.deepcopy(self.objective.state_dict())
        check_objective(self.objective, model, args)
        # copied before a checkpoint is loaded, so that a resumed run has the same start
        wanted = self.objective.needs_start and args.dense_weight > 0
        self.start: Any = copy.deepcopy(model).requires_grad_(False).eval() if wanted else None
        self.reading_stats: dict[str, ReadingStats] = {}
        reading = (self.processor, model, args, self.reading_stats)
        with args.main_process_first(desc="tokenising notes"):
            train_dataset = pair_datasets(train_dataset, "train", *reading)
            eval_dataset = pair_datasets(eval_dataset, "eval", *reading)
        self.update_log, self.mlm_weight_before = UpdateLog(), args.mlm_weight
        predicted = model.language_modeling if args.mlm_weight else None
        how: dict[str, Any] = {"mlm_probability": args.mlm_probability, "max_length": model.max_length}
        super().__init__(
            model=adapted,
            args=args,
            data_collator=data_collator or self.processor.collator(predicted, **how),
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
        # a compiled model would be compiled for each number of positions
        wanted = args.mlm_weight > 0 and not args.torch_compile
        self.by_position = wanted and predicts_by_position(self.dense_model, self.data_collator([]))

    def call_model_init(self, trial=None):
        """A fresh model for a run or a trial, and a fresh objective of the arguments that a trial has set."""
        model, adapted = prepare_model(super().call_model_init(trial), self.args, self._peft_config)
        model._densefeat_tokenizer = self.processing_class
        if self._given is None:
            self.objective = self.args.dense_objective(terms=self._terms, width=model.embedding_dimension)
        else:
            self.objective.load_state_dict(self._objective_start)
        self.update_log = UpdateLog()
        return adapted

    def predict(self, *args, **kwargs):
        """Refused: evaluation keeps moments, not predictions."""
        raise ValueError(
            "DenseTrainer keeps no predictions: `trainer.evaluate(notes)` gives the terms of the loss, and "
            "`trainer.dense_model.encode(texts)` the embeddings."
        )

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank, which no one else shards."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset: notes with patient_id, time and text.")
        options: dict[str, Any] = {"collator": self.data_collator, "args": self.args}
        if isinstance(self.train_dataset, IterableDataset):
            options |= {"processor": self.processor, "max_length": self.dense_model.max_length}
            loader = stream_loader(self.train_dataset, self._train_batch_size, **options)
            self.stream = cast(PairStream, loader.dataset)
            return loader
        return pair_loader(self.train_dataset, self._train_batch_size, train=True, **options)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """All pairs once, longest first, the same masks each time."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        eval_dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if eval_dataset is None:
            raise ValueError("Evaluation needs an eval_dataset: notes with patient_id, time and text.")
        pairs = pair_datasets(eval_dataset, "eval", self.processor, self.dense_model, self.args, self.reading_stats)
        options: dict[str, Any] = {"collator": self.data_collator, "args": self.args}
        return pair_loader(pairs, self.args.eval_batch_size, train=False, **options)

    # ---- Checkpoints and the card ----

    fingerprint = run_fingerprint
    create_model_card = write_card  # type: ignore[assignment]  # keyword-only here, unlike in transformers

    def _save_optimizer_and_scheduler(self, output_dir):
        """The stock Trainer knows nothing of the objective: its state is saved once, the same on all ranks."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            position = self.stream.position if self.stream else ""
            state = self.objective.state_dict()
            write_objective(Path(output_dir), state, skipped=self.update_log.skipped, stream=position)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The stock Trainer knows nothing of what `_save_optimizer_and_scheduler` wrote: it is restored here."""
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

    # ---- Evaluation ----

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Terms of the whole evaluation set, from its moments, so that they do not depend on the batch size.

        Every term unweighted, `loss`, and the effective rank of both sides, centred where the objective is. A `BatchLoss` has
        no value of a whole set: its terms are means over batches. Without `mlm_weight` there is no `mlm_loss`.
        """
        model = self._evaluated_model()
        model.eval()
        self.objective.module.train(False)
        metrics = self._held_out_terms(model, dataloader)
        self.objective.module.train()
        if self.evaluator is not None:
            metrics |= evaluated(self.evaluator, self.dense_model, self.processing_class)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))  # type: ignore[arg-type]

    def _held_out_terms(self, model, batches) -> dict[str, float]:
        pair: PairMoments | None = None
        of_batches = []
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            made = self.embed_pairs(model, inputs)
            pair = moments_of(made.z_a, made.z_b, self.objective, start=made.start, before=pair)
            of_batches.append(self.objective.of_batch(made.z_a, made.z_b))
            sums += torch.stack([made.mlm.double(), inputs["labels"].ne(-100).sum().double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if pair is None:
            raise ValueError("The evaluation set has no batch: it needs at least one pair of adjacent notes.")
        pair, (mlm, tokens) = sum_over_ranks(pair, sums)
        terms = {name: value.item() for name, value in self.objective.evaluate(pair, of_batches).items()}
        loss = self.args.dense_weight * terms.pop("loss")
        if self.args.mlm_weight:
            terms["mlm_loss"] = (mlm / tokens.clamp(min=1)).item()
            loss += self.args.mlm_weight * terms["mlm_loss"]
        pooled = (pair.a.covariance(self.objective.center) + pair.b.covariance(self.objective.center)) / 2
        return {"loss": loss, **terms, "effective_rank": covariance_rank(pooled)}

    def _evaluated_model(self) -> torch.nn.Module:
        """The model as `train` wrapped it, or wrapped for evaluation alone."""
        if self.is_in_train or self.model_wrapped is not self.model or self.accelerator._models:
            return self.model_wrapped
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.model = self.model_wrapped = self.accelerator.prepare(self.model)
            return self.model
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)
