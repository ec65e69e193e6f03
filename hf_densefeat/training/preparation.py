"""What `DenseTrainer` makes of its arguments, step by step: the model, the tokenizer, the collator, the pairs of tokens."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from hf_densefeat.data.collator import DensePairCollator
from hf_densefeat.data.pairs import adjacent_pairs
from hf_densefeat.data.tokens import TokenPairs, TokenStats, tokenize_notes
from hf_densefeat.models.adapters import with_adapter, without_adapter
from hf_densefeat.models.dense import AutoDenseModel, as_dense
from hf_densefeat.training.arguments import DenseTrainingArguments

logger = logging.getLogger(__name__)


def prepare_model(
    model: str | PreTrainedModel | PeftModel, args: DenseTrainingArguments, peft_config: PeftConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedModel | PeftModel]:
    """The dense model of a name, folder or model, and the same inside its adapter, if it has or gets one.

    Without weight on language modelling, what is not in the body of the model is frozen: no gradient reaches it.
    """
    if isinstance(model, str):
        model = AutoDenseModel.from_pretrained(model)
    dense = as_dense(without_adapter(model), args.pooling, args.max_length, args.long_notes)
    if args.mlm_weight == 0:
        body = {id(parameter) for parameter in dense.base_model.parameters()}
        for parameter in dense.parameters():
            if id(parameter) not in body:
                parameter.requires_grad_(False)
    return dense, model if peft_config is None else with_adapter(dense, peft_config)


def prepare_tokenizer(processing_class: Any, model: PreTrainedModel) -> Any:
    """The tokenizer given, or that of the model, which `encode` uses from now on."""
    processing_class = processing_class or model._default_tokenizer()
    processing_class.padding_side = "right"  # as in training, wherever the saved one is used
    model._densefeat_tokenizer = processing_class
    return processing_class


def pair_collator(processing_class: Any, model: PreTrainedModel, args: DenseTrainingArguments) -> Any:
    """Pairs of tokenised notes, or of windows of events, to the batches that the arguments ask for.

    Raises:
        ValueError: for chunks of no known length.
    """
    chunk = model.long_notes == "chunk"
    if chunk and model.max_length is None:
        raise ValueError("long_notes is chunk, but nothing says how long a chunk is: set max_length.")
    language_modeling = model.language_modeling if args.mlm_weight else None
    if hasattr(processing_class, "pair_collator"):  # of windows, not a tokenizer
        return processing_class.pair_collator(language_modeling, args.mlm_probability)
    return DensePairCollator(
        processing_class,
        objective=language_modeling,
        mlm_probability=args.mlm_probability,
        whole_word_mask=args.whole_word_mask and model.language_modeling == "mlm",
        chunk_length=model.max_length if chunk else None,
    )


def token_pairs(
    notes: Any,
    name: str,
    *,
    processing_class: Any,
    model: PreTrainedModel,
    args: DenseTrainingArguments,
    stats: dict[str, TokenStats],
) -> Any:
    """Adjacent pairs of tokenised notes, and in `stats[name]` what tokenising did to the notes.

    Notes (`datasets.Dataset`) become `TokenPairs`, each set in a dict of notes does so under its own name, and
    anything else (pairs, a stream, None) stays as it is.
    """
    common = {"processing_class": processing_class, "model": model, "args": args, "stats": stats}
    if isinstance(notes, dict):
        return {key: token_pairs(value, key, **common) for key, value in notes.items()}
    if not isinstance(notes, Dataset):
        return notes
    if hasattr(processing_class, "window_pairs"):
        made, stats[name] = processing_class.window_pairs(notes, args.max_gap, model.max_length)
        logger.info("%s: %s; %s", name, made.pairs, stats[name])
        return made
    pairs = adjacent_pairs(notes, max_gap=args.max_gap)
    tokens, stats[name] = tokenize_notes(
        notes,
        processing_class,
        max_length=model.max_length,
        num_proc=args.preprocessing_num_workers,
        word_ids=args.whole_word_mask,
        chunk=model.long_notes == "chunk",
    )
    logger.info("%s: %s; %s", name, pairs, stats[name])
    return TokenPairs(tokens, pairs)
