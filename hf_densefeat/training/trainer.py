"""DenseTrainer: the transformers Trainer on adjacent notes, with an exact dense objective for any cut of the batch."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_densefeat.data.collator import DensePairCollator
from hf_densefeat.data.pairs import TokenPairs
from hf_densefeat.data.streaming import PairStream
from hf_densefeat.evaluation.geometry import effective_rank_of_spectrum
from hf_densefeat.models.adapters import with_adapter, without_adapter
from hf_densefeat.models.dense import AutoDenseModel, as_dense
from hf_densefeat.objective.batch_loss import BatchLoss
from hf_densefeat.objective.distributed import mean_over_ranks, sum_over_ranks
from hf_densefeat.objective.moments import PairGradient, PairMoments
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.training.arguments import DenseTrainingArguments
from hf_densefeat.training.checkpoints import Saving
from hf_densefeat.training.loaders import Loading

logger = logging.getLogger(__name__)

MOST_SKIPPED = 50  # in a row; the loss scale of float16 may need some


class DenseTrainer(Loading, Saving, Trainer):
    """Continued pretraining with loss = mlm_weight MLM + dense_weight (L_spec + lambda_sub L_sub + lambda_orth L_orth).

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
        processing_class: the tokenizer, or the processor of windows (`encoders`); by default that of the model.
        peft_config: train this adapter (LoRA and its kin) and freeze the rest. What is saved is the encoder with the adapter
            merged in, and in `adapter/` the adapter, from which a run resumes. A `PeftModel` as `model` does the same.
        evaluator: called as `evaluator(model, tokenizer)` at each evaluation, on every rank; its dict of numbers joins
            the metrics, where `metric_for_best_model` and early stopping see them.
        kwargs: as for `Trainer`.

    An update whose gradient is not finite is skipped on all ranks, and counted; 50 in a row are a RuntimeError. Raises
    ValueError before training for a model without the head that `mlm_weight > 0` needs, a `subspace_dim` that
    the batch cannot support, notes without pairs, and functions of `Trainer` that would never be called.
    """

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
        _check_functions(kwargs)
        if isinstance(model, str):
            model = AutoDenseModel.from_pretrained(model)
        adapted, model = model, as_dense(without_adapter(model), args.pooling, args.max_length, args.long_notes)
        processing_class = processing_class or model._default_tokenizer()
        processing_class.padding_side = "right"  # as in training, wherever the saved one is used
        model._densefeat_tokenizer = processing_class
        self.evaluator = evaluator
        self.objective = args.dense_objective() if objective is None else objective
        _check_objective(self.objective, args)
        _check_head(model, args)
        chunk = model.long_notes == "chunk"
        if chunk and model.max_length is None:
            raise ValueError("long_notes is chunk, but nothing says how long a chunk is: set max_length.")
        language_modeling = model.language_modeling if args.mlm_weight else None
        if data_collator is None and hasattr(processing_class, "pair_collator"):  # of windows, not a tokenizer
            data_collator = processing_class.pair_collator(language_modeling, args.mlm_probability)
        data_collator = data_collator or DensePairCollator(
            processing_class,
            objective=language_modeling,
            mlm_probability=args.mlm_probability,
            whole_word_mask=args.whole_word_mask and model.language_modeling == "mlm",
            chunk_length=model.max_length if chunk else None,
        )
        self.token_stats = {}
        with args.main_process_first(desc="tokenising notes"):
            if isinstance(train_dataset, Dataset):
                train_dataset = self._token_pairs(train_dataset, "train", model, args, processing_class)
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    name: self._token_pairs(notes, name, model, args, processing_class)
                    for name, notes in eval_dataset.items()
                }
            elif isinstance(eval_dataset, Dataset):
                eval_dataset = self._token_pairs(eval_dataset, "eval", model, args, processing_class)
        if args.mlm_weight == 0:
            body = {id(parameter) for parameter in model.base_model.parameters()}
            for parameter in model.parameters():
                if id(parameter) not in body:
                    parameter.requires_grad_(False)
        if peft_config is not None:
            adapted = with_adapter(model, peft_config)
        super().__init__(
            model=adapted,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if args.n_gpu > 1:
            raise ValueError(f"One process sees {args.n_gpu} GPUs. Start one process a GPU: accelerate launch ...")
        if isinstance(adapted, PeftModel) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("An adapter cannot be merged into sharded weights. Train it without FSDP and DeepSpeed.")
        if self.is_fsdp_enabled:
            _check_sharding(model)
        if train_dataset is not None and args.dense_weight:
            pairs = math.inf if isinstance(train_dataset, IterableDataset) else len(train_dataset)
            if isinstance(self.objective, DenseObjective):
                batch = self.get_total_train_batch_size(args)
                _check_subspace(pairs, batch, model.config.hidden_size, self.objective)
        if isinstance(self.objective, BatchLoss):
            self.objective.to(args.device)
        self.model_accepts_loss_kwargs = False  # or the Trainer counts tokens, with one more collective
        self.measured: list[dict] = []
        self.skipped_updates = 0
        self._skipped_in_a_row = 0
        self._micro_batches: list[dict] = []
        self._stream: PairStream | None = None
        self._stream_state = ""
        if isinstance(train_dataset, IterableDataset):
            args.ignore_data_skip = True  # the stream goes on by itself where the checkpoint left it
            if hasattr(processing_class, "window_pairs"):
                raise ValueError("Windows are not streamed: pass them as a datasets.Dataset, which is memory-mapped.")
            if args.dataloader_num_workers > 1:
                raise ValueError(
                    f"A stream is read by one process a rank, got dataloader_num_workers={args.dataloader_num_workers}. "
                    "Set it to 1 to read and tokenise beside the training."
                )
        self._update: _Update | None = None
        self._sums: dict[str, Tensor] = {}
        self._updates_summed = 0

    # ---- The loss ----

    def create_optimizer(self, *args, **kwargs):
        """Also with the parameters of a `BatchLoss`."""
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
            self._update = _Update(len(self._micro_batches))
            if not self.args.dense_weight:
                tokens = sum(batch["labels"].ne(-100).sum() for batch in self._micro_batches)
                self._update.tokens = self.accelerator.reduce(tokens.to(self.args.device), reduction="sum")
            elif len(self._micro_batches) > 1:
                self._window_pass(model, self._update)
        update, ranks = self._update, self.args.world_size
        if update.random_states:
            _set_random_state(update.random_states.pop(0), self.args.device)
        outputs, z_a, z_b = self._forward(model, inputs)
        if update.tokens is None:
            with torch.no_grad():
                shift = self._shift(torch.cat([z_a, z_b]))
                tokens = inputs["labels"].ne(-100).sum()[None]
                self._plan(update, self._moments(z_a.detach(), z_b.detach(), shift), tokens)
        if update.expected:
            _check_replay(update.expected.pop(0), torch.cat([z_a, z_b]).detach())
        loss = 0.0
        if self.args.mlm_weight:
            mlm = _summed_cross_entropy(outputs.logits, inputs["labels"]) / update.tokens.clamp(min=1)
            update.add("mlm_loss", mlm * ranks)
            loss = loss + self.args.mlm_weight * ranks * mlm
        if self.args.dense_weight:
            loss = loss + self.args.dense_weight * self._dense_term(update, z_a, z_b)
        update.add("tokens", inputs["attention_mask"].sum())
        update.add("slots", torch.full_like(update.tokens, inputs["attention_mask"].numel()))
        return (loss, outputs) if return_outputs else loss

    def _dense_term(self, update: _Update, z_a: Tensor, z_b: Tensor) -> Tensor:
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

    def _forward(self, model, inputs):
        """One forward of both notes of each pair: outputs, Z_a and Z_b, both (pairs, d)."""
        pairs = int(inputs["num_pairs"])
        tokens = {name: value for name, value in inputs.items() if name not in ("labels", "num_pairs", "owner")}
        dense = self.dense_model
        with dense.capture_hidden():
            outputs = model(**tokens)
            z = dense.pooled(tokens["attention_mask"], inputs.get("owner"), num_notes=2 * max(pairs, 1))
        half = len(z) // 2
        return outputs, z[:pairs], z[half : half + pairs]

    @torch.no_grad()
    def _window_pass(self, model, update: _Update) -> None:
        """Moments of all micro-batches of the update, and the random state from which each forward is to be replayed."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile):
            model = self.dense_model.base_model  # no logits; the wrappers are for gradients, and for these three
        totals, tokens = None, 0
        for micro_batch in self._micro_batches:
            inputs = self._prepare_inputs(micro_batch)
            update.random_states.append(_random_state(self.args.device))
            with self.accelerator.autocast():
                _, z_a, z_b = self._forward(model, inputs)
            shift = self._shift(torch.cat([z_a, z_b])) if totals is None else totals.a.shift
            pair = self._moments(z_a, z_b, shift)
            totals = pair if totals is None else totals + pair
            tokens = tokens + inputs["labels"].ne(-100).sum()[None]
            if self.state.global_step == self._initial_global_step:
                update.expected.append(torch.cat([z_a, z_b]))
        self._plan(update, totals, tokens)

    @torch.no_grad()
    def _plan(self, update: _Update, pair: PairMoments, tokens: Tensor) -> None:
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
            outputs, z_a, z_b = self._forward(model, inputs)
            if pair is None:
                pair = self._moments(z_a, z_b, mean_over_ranks(torch.cat([z_a, z_b])))
            else:
                pair = pair + self._moments(z_a, z_b, pair.a.shift)
            if isinstance(self.objective, BatchLoss):
                batch_values.append(self.objective(z_a, z_b))
            if self.args.mlm_weight:
                sums[0] += _summed_cross_entropy(outputs.logits, inputs["labels"])
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


def add_parameters(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Train these along with the model, without weight decay."""
    if parameters:
        optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})

        def zero(*_) -> None:
            for parameter in parameters:  # the Trainer zeroes the gradients of the model alone
                parameter.grad = None

        optimizer.register_step_post_hook(zero)


class _Update:
    """What is known of an optimizer update: the plan before its first backward, and sums for the log."""

    def __init__(self, micro_batches: int):
        self.micro_batches = micro_batches
        self.tokens: Tensor | None = None
        self.terms: dict[str, Tensor] = {}
        self.gradient: PairGradient | None = None
        self.random_states: list = []
        self.expected: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Sum over micro-batches, for the log, on the device and without waiting for it."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().float()


def _summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the predicted tokens, in float32 or wider. Labels stand where their logits are, for decoders too.

    Not the model's own loss: some classes ignore the number of tokens of the update, and a batch without any is NaN.
    """
    predicted = labels.ne(-100)
    logits = logits[predicted]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels[predicted], reduction="sum")


def _effective_rank(covariance: Tensor) -> float:
    return effective_rank_of_spectrum(torch.linalg.eigvalsh(torch.nan_to_num(covariance)).clamp(min=0))


def _random_state(device: torch.device):
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _check_replay(expected: Tensor, z: Tensor) -> None:
    if (expected - z).norm() > 1e-2 * (expected - expected.mean(0)).norm():
        logger.warning(
            "The replayed forward differs from the first: dropout was not reproduced, and the dense gradient is that of "
            "another dropout mask. Set the model's dropout to 0 for exact accumulation."
        )


def _check_functions(kwargs: dict) -> None:
    """What of the stock Trainer would be ignored without a word."""
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} would never be called: evaluation keeps moments, not predictions. Pass evaluator=, called as "
                "evaluator(model, tokenizer), whose dict of numbers joins the metrics; ProbeEvaluator is one."
            )
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func would never be called: the loss is mlm_weight MLM + dense_weight (L_spec + ...). Set its "
            "weights, or override compute_loss."
        )


def _check_head(model, args: DenseTrainingArguments) -> None:
    if args.mlm_weight and model.language_modeling is None:
        raise ValueError(
            f"mlm_weight is {args.mlm_weight} but {type(model).__name__} has no language-modelling head. Load the model "
            "by name, AutoDenseModel.from_pretrained(...), which adds one where its family has it, or set mlm_weight=0 "
            "to train with the dense objective alone."
        )
    if not hasattr(model.config, "hidden_size"):
        raise ValueError(f"{type(model).__name__} is not a text encoder: its config has no hidden_size.")


def _check_sharding(model) -> None:
    """Accelerate knows of tied embeddings; a parameter with two names elsewhere would be in two groups of FSDP2."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    names.pop(model.get_input_embeddings().weight)
    for shared in names.values():
        if len(shared) > 1:
            raise ValueError(
                f"FSDP2 cannot shard {type(model).__name__}: {' and '.join(shared)} are one parameter. Train it without "
                "FSDP (one whole model a GPU), or take a family without shared biases, such as ModernBERT."
            )


def _check_objective(objective: DenseObjective | BatchLoss, args: DenseTrainingArguments) -> None:
    if isinstance(objective, BatchLoss) and (args.gradient_accumulation_steps > 1 or args.world_size > 1):
        raise ValueError(
            "A BatchLoss is that of one whole batch, but gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps} and there are {args.world_size} ranks: its parts would not add up to "
            "it. Use one of each, and a larger per_device_train_batch_size."
        )


def _check_subspace(pairs: int, batch: int, d: int, objective: DenseObjective) -> None:
    """K must be below the rank that the samples behind a covariance can have."""
    window = {None: 0, "auto": d}.get(objective.window, objective.window)
    samples = min(max(batch, window), pairs)
    rank = min(d, int(samples) - objective.center)
    if objective.subspace_dim > rank:
        raise ValueError(
            f"subspace_dim is {objective.subspace_dim}, but the covariance of {int(samples)} pairs (batch of {batch}, "
            f"window {objective.window}, {pairs} in all) in {d} dimensions has rank {max(rank, 0)} at most. Lower "
            "subspace_dim, or raise the batch size or the window."
        )
