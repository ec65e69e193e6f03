"""Pairs or streams to the micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from hf_densefeat.data.inputs import PairDataset, StreamProcessor
from hf_densefeat.data.sampling import PairBatchSampler
from hf_densefeat.data.streaming import PairStream
from hf_densefeat.training.arguments import DenseTrainingArguments


class PairDataLoader(DataLoader):
    """A loader whose batch sampler is told the epoch, and which cuts batches over ranks itself."""

    batch_sampler: PairBatchSampler

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        self.batch_sampler.set_epoch(epoch)


def pair_loader(
    dataset: PairDataset, batch_size: int, *, collator: Callable, args: DenseTrainingArguments, **sampling
) -> PairDataLoader:
    """The micro-batches of this rank; `sampling` goes to `PairBatchSampler`.

    The sampler cuts the global batch, so accelerate must not shard it again.
    """
    sampler = PairBatchSampler(
        dataset.pairs,
        dataset.lengths,
        batch_size=batch_size,
        ranks=args.world_size,
        rank=args.process_index,
        seed=_data_seed(args),
        **sampling,
    )
    return PairDataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=_pinned(args),
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def train_loader(
    dataset: PairDataset, batch_size: int, *, collator: Callable, args: DenseTrainingArguments
) -> PairDataLoader:
    """As `pair_loader`, grouped and mixed as the arguments ask."""
    return pair_loader(
        dataset,
        batch_size,
        collator=collator,
        args=args,
        accumulation=args.gradient_accumulation_steps,
        pairs_per_patient=args.pairs_per_patient,
        drop_last=args.dataloader_drop_last,
        spread_patients=args.unbiased,
    )


def pair_stream(
    notes: IterableDataset,
    batch_size: int,
    *,
    processor: StreamProcessor,
    max_length: int | None,
    collator: Callable,
    args: DenseTrainingArguments,
) -> PairStream:
    """The micro-batches of this rank of notes that are streamed; it goes on where a checkpoint left it."""
    return PairStream(
        notes,
        partial(processor.columns, max_length=max_length),
        collator,
        batch_size,
        ranks=args.world_size,
        rank=args.process_index,
        accumulation=args.gradient_accumulation_steps,
        pairs_per_patient=args.pairs_per_patient,
        spread_patients=args.unbiased,
        kinds=args.pairs,
        max_gap=args.max_gap,
        seed=_data_seed(args),
    )


def stream_loader(stream: PairStream, args: DenseTrainingArguments) -> DataLoader:
    """The stream, read here or by one worker."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=args.dataloader_num_workers,
        pin_memory=_pinned(args),
        generator=torch.Generator(),  # a starting loader draws from it; drawing from the global one would change a resumed run
    )


def _data_seed(args: DenseTrainingArguments) -> int:
    return args.data_seed if args.data_seed is not None else args.seed


def _pinned(args: DenseTrainingArguments) -> bool:
    return args.dataloader_pin_memory and args.device.type != "cpu"
