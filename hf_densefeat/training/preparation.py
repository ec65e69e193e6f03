"""What `DenseTrainer` makes of its arguments, step by step: the model, the processor, the pairs, their micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_densefeat.data.inputs import PairDataset, PairProcessor, ReadingStats, StreamProcessor
from hf_densefeat.data.notes import load_notes
from hf_densefeat.data.pairs import pair_notes
from hf_densefeat.data.sampling import PairBatchSampler
from hf_densefeat.data.streaming import PairStream
from hf_densefeat.data.tokens import TextProcessor
from hf_densefeat.models.adapters import with_adapter, without_adapter
from hf_densefeat.models.dense import AutoDenseModel, as_dense
from hf_densefeat.models.tokenizers import check_vocabulary
from hf_densefeat.training.arguments import DenseTrainingArguments

logger = logging.getLogger(__name__)


def prepare_model(
    model: str | PreTrainedModel | PeftModel, args: DenseTrainingArguments, peft_config: PeftConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedModel | PeftModel]:
    """The dense model of a name, folder or model, and the same inside its adapter, if it has or gets one.

    Without weight on language modelling, what is not in the body of the model is frozen: no gradient reaches it.
    """
    loaded: Any = AutoDenseModel.from_pretrained(model) if isinstance(model, str) else model
    how: dict[str, Any] = {name: getattr(args, name) for name in ("pooling", "max_length", "long_notes")}
    dense = as_dense(without_adapter(loaded), **how)
    if args.mlm_weight == 0:
        body = {id(parameter) for parameter in dense.base_model.parameters()}
        for parameter in dense.parameters():
            if id(parameter) not in body:
                parameter.requires_grad_(False)
    return dense, loaded if peft_config is None else with_adapter(dense, peft_config)


def prepare_tokenizer(processing_class: Any, model: Any) -> Any:
    """The tokenizer or processor given, or that of the model, which `encode` uses from now on."""
    processing_class = processing_class or model._default_tokenizer()
    if isinstance(processing_class, PreTrainedTokenizerBase):
        check_vocabulary(processing_class, model)
        processing_class.padding_side = "right"  # as in training, wherever the saved one is used
    model._densefeat_tokenizer = processing_class
    return processing_class


def pair_processor(processing_class: Any, model: Any, args: DenseTrainingArguments) -> PairProcessor:
    """A tokenizer wrapped for texts, or the processor itself of another kind of input; ValueError for what is neither."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return TextProcessor(
            processing_class,
            chunk=model.long_notes == "chunk",
            prompt=model.prompt,
            whole_words=args.whole_word_mask,
            predict_marks=args.predict_marks,
            num_proc=args.preprocessing_num_workers,
        )
    if not isinstance(processing_class, PairProcessor):
        raise ValueError(
            f"Expected processing_class to be a tokenizer or a PairProcessor (pairs, collator, save_pretrained), got "
            f"{type(processing_class).__name__}. Take the tokenizer of the model: AutoTokenizer.from_pretrained(...)."
        )
    return processing_class


def _is_column(values: Any) -> bool:
    return isinstance(values, (list, np.ndarray)) and not (len(values) and isinstance(values[0], dict))


def pair_datasets(
    notes: Any,
    name: str,
    processor: PairProcessor,
    model: Any,
    args: DenseTrainingArguments,
    stats: dict[str, ReadingStats],
) -> Any:
    """Pairs of the notes, read by the processor, and in `stats[name]` what reading did to them.

    Notes (`datasets.Dataset`, or what else `load_notes` reads) become a `PairDataset`, each set in a dict of notes does so
    under its own name, and pairs, a stream and None stay as they are. ValueError for several sets to train on.
    """
    if notes is None or isinstance(notes, IterableDataset) or hasattr(notes, "pairs"):
        return notes
    if isinstance(notes, dict) and not any(_is_column(value) for value in notes.values()):
        if name == "train":
            raise ValueError(
                f"train_dataset has several sets, {', '.join(map(str, notes))}: pass the one to train on."
            )
        return {key: pair_datasets(value, key, processor, model, args, stats) for key, value in notes.items()}
    if not isinstance(notes, Dataset):
        notes = load_notes(notes)
    if args.pairs != ["adjacent"] and not isinstance(processor, StreamProcessor):
        raise ValueError(
            f"pairs is {' '.join(args.pairs)}, but {type(processor).__name__} reads no plain text that can be cut: "
            "use adjacent."
        )
    paired = pair_notes(notes, args.pairs, max_gap=args.max_gap)
    made: PairDataset
    made, stats[name] = processor.pairs(*paired, max_length=model.max_length)
    logger.info("%s: %s; %s", name, made.pairs, stats[name])
    return made


def pair_loader(
    dataset: PairDataset, batch_size: int, *, collator: Callable, args: DenseTrainingArguments, train: bool
) -> DataLoader:
    """The micro-batches of this rank, which accelerate must not shard again; of `train`, or all once, longest first."""
    sampling: dict[str, Any] = {"shuffle": False}
    if train:
        sampling = {"drop_last": args.dataloader_drop_last, **_mixing(args)}
    sampler = PairBatchSampler(dataset.pairs, dataset.lengths, batch_size, **_cut(args), **sampling)
    loader: Any = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        **_reading(args),
    )
    loader.set_epoch = sampler.set_epoch  # the Trainer tells a loader the epoch, not its sampler
    return loader


def stream_loader(
    notes: IterableDataset,
    batch_size: int,
    *,
    processor: StreamProcessor,
    max_length: int | None,
    collator: Callable,
    args: DenseTrainingArguments,
) -> DataLoader:
    """The micro-batches of this rank of a `PairStream`, the loader's dataset, read here or by one worker."""
    columns = partial(processor.columns, max_length=max_length)
    paired: dict[str, Any] = {"kinds": args.pairs, "max_gap": args.max_gap}
    stream = PairStream(notes, columns, collator, batch_size, **paired, **_cut(args), **_mixing(args))
    # a loader draws a seed when it starts: drawn from the global generator, that would change a resumed run
    return DataLoader(stream, batch_size=None, generator=torch.Generator(), **_reading(args))


def _mixing(args: DenseTrainingArguments) -> dict[str, Any]:
    """How pairs are put into the batches of a training step."""
    return {
        "accumulation": args.gradient_accumulation_steps,
        "pairs_per_patient": args.pairs_per_patient,
        "spread_patients": args.unbiased,
    }


def _cut(args: DenseTrainingArguments) -> dict[str, Any]:
    seed = args.seed if args.data_seed is None else args.data_seed
    return {"ranks": args.world_size, "rank": args.process_index, "seed": seed}


def _reading(args: DenseTrainingArguments) -> dict[str, Any]:
    pinned = args.dataloader_pin_memory and args.device.type != "cpu"
    return {"num_workers": args.dataloader_num_workers, "pin_memory": pinned}
