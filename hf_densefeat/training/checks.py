"""What the trainer refuses before the first step, in a sentence that says what to do."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import find_tied_parameters
from datasets import IterableDataset
from peft import PeftModel

from hf_densefeat.data.inputs import StreamProcessor
from hf_densefeat.objective.base import Objective
from hf_densefeat.training.arguments import DenseTrainingArguments


def check_functions(kwargs: dict, data_collator: Any) -> None:
    """Refuse what the stock Trainer takes, and this one would ignore or fail on."""
    room = getattr(data_collator, "__module__", "") or ""
    if data_collator is not None and room.startswith("transformers."):
        raise ValueError(
            f"{getattr(data_collator, '__name__', type(data_collator).__name__)} batches single rows, but DenseTrainer trains "
            "on pairs of notes: leave data_collator out, or pass a DensePairCollator."
        )
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


def check_objective(objective: Objective, model, args: DenseTrainingArguments) -> None:
    """Refuse language modelling without a head for it, and a `BatchLoss` over whose parts it does not add up."""
    if args.mlm_weight and model.language_modeling is None:
        raise ValueError(
            f"mlm_weight is {args.mlm_weight} but {type(model).__name__} has no language-modelling head. Load the model "
            "by name, AutoDenseModel.from_pretrained(...), which adds one where its family has it, or set mlm_weight=0 "
            "to train with the dense objective alone."
        )
    if not objective.adds_up and (args.gradient_accumulation_steps > 1 or args.world_size > 1):
        raise ValueError(
            "A BatchLoss is that of one whole batch, but gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps} and there are {args.world_size} ranks: its parts would not add up to "
            "it. Use one of each, and a larger per_device_train_batch_size."
        )


def check_subspace(pairs: float, batch: int, d: int, objective: Objective) -> None:
    """Refuse a subspace dimension above the rank that the samples behind a covariance can have."""
    window = d if objective.window == "auto" else float(objective.window or 0)
    samples = min(max(batch, window), pairs)
    rank = min(d, int(samples) - objective.center)
    if objective.subspace_dim is not None and objective.subspace_dim > rank:
        raise ValueError(
            f"subspace_dim is {objective.subspace_dim}, but the covariance of {int(samples)} pairs (batch of {batch}, "
            f"window {objective.window}, {pairs} in all) in {d} dimensions has rank {max(rank, 0)} at most. Lower "
            "subspace_dim, or raise the batch size or the window."
        )


def check_trainable(model) -> None:
    """Refuse a model whose parameters are all frozen: it would fail in autograd, in the middle of the first step."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"No parameter of {type(model).__name__} is trainable: requires_grad is False for all of them. Set it for "
            "those to train, or pass peft_config to train an adapter."
        )


def check_run(trainer: Any) -> None:
    """Refuse what shows only at the end of the constructor, when devices, ranks and sharding are known."""
    args, model, objective = trainer.args, trainer.dense_model, trainer.objective
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if args.n_gpu > 1:
        raise ValueError(f"One process sees {args.n_gpu} GPUs. Start one process a GPU: accelerate launch ...")
    if isinstance(trainer.model, PeftModel) and sharded:
        raise ValueError("An adapter cannot be merged into sharded weights. Train it without FSDP and DeepSpeed.")
    if args.keep_graphs and sharded:
        raise ValueError("keep_graphs needs the weights of all micro-batches at once: set it to False under sharding.")
    if sharded and objective.parameters():
        raise ValueError(
            "What an objective trains along is not sharded: leave the expander or FSDP and DeepSpeed out."
        )
    for shared in find_tied_parameters(model) if trainer.is_fsdp_enabled else ():
        # tied embeddings are known to accelerate; another shared parameter would be in two groups of FSDP2
        if model.get_parameter(shared[0]) is not model.get_input_embeddings().weight:
            raise ValueError(
                f"FSDP2 cannot shard {type(model).__name__}: {' and '.join(shared)} are one parameter. Train it without "
                "FSDP (one whole model a GPU), or take a family without shared biases, such as ModernBERT."
            )
    streamed = isinstance(trainer.train_dataset, IterableDataset)
    if streamed and not isinstance(trainer.processor, StreamProcessor):
        raise ValueError(
            f"{type(trainer.processor).__name__} cannot read a stream: pass the notes as a datasets.Dataset, which is "
            "memory-mapped."
        )
    if streamed and args.dataloader_num_workers > 1:
        raise ValueError(
            f"A stream is read by one process a rank, got dataloader_num_workers={args.dataloader_num_workers}. "
            "Set it to 1 to read and tokenise beside the training."
        )
    if streamed:
        args.ignore_data_skip = True  # the stream goes on by itself where the checkpoint left it
    objective.module.to(args.device, torch.promote_types(model.dtype, torch.float32))
    if trainer.train_dataset is not None and args.dense_weight:
        pairs = math.inf if streamed else len(trainer.train_dataset)
        check_subspace(pairs, trainer.get_total_train_batch_size(args), model.embedding_dimension, objective)
