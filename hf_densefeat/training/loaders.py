"""Pairs or streams to the micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from hf_densefeat.data.inputs import PairDataset, StreamProcessor
from hf_densefeat.data.sampling import PairBatchSampler
from hf_densefeat.data.streaming import PairStream
from hf_densefeat.training.arguments import DenseTrainingArguments


def pair_loader(
    dataset: PairDataset, batch_size: int, *, collator: Callable, args: DenseTrainingArguments, **sampling
) -> DataLoader:
    """The micro-batches of this rank, which accelerate must not shard again; `sampling` goes to `PairBatchSampler`."""
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
    stream = PairStream(notes, columns, collator, batch_size, **paired, **_cut(args), **mixing(args))
    # a loader draws a seed when it starts: drawn from the global generator, that would change a resumed run
    return DataLoader(stream, batch_size=None, generator=torch.Generator(), **_reading(args))


def mixing(args: DenseTrainingArguments) -> dict[str, Any]:
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
