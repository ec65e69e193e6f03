"""Notes, windows or streams to the micro-batches of one rank."""

from __future__ import annotations

from functools import partial

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from hf_densefeat.data.sampling import PairBatchSampler
from hf_densefeat.data.streaming import PairStream
from hf_densefeat.data.tokens import TokenPairs, tokenize_texts
from hf_densefeat.training.preparation import token_pairs


class PairDataLoader(DataLoader):
    """A loader whose batch sampler is told the epoch, and which cuts batches over ranks itself."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        self.batch_sampler.set_epoch(epoch)


class Loading:
    """The part of `DenseTrainer` that makes loaders; it stands before `Trainer` among the bases."""

    def _pair_loader(self, dataset: TokenPairs, batch_size: int, **sampling) -> PairDataLoader:
        sampler = PairBatchSampler(
            dataset.pairs,
            dataset.lengths,
            batch_size=batch_size,
            ranks=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            **sampling,
        )
        return PairDataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank. The sampler cuts the global batch, so accelerate must not shard it again."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset: notes with patient_id, time and text.")
        if isinstance(self.train_dataset, IterableDataset):
            return self._stream_loader()
        return self._pair_loader(
            self.train_dataset,
            self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            pairs_per_patient=self.args.pairs_per_patient,
            drop_last=self.args.dataloader_drop_last,
            spread_patients=self.args.unbiased,
        )

    def _stream_loader(self) -> DataLoader:
        model, args = self.dense_model, self.args
        self._stream = PairStream(
            self.train_dataset,
            partial(
                tokenize_texts,
                tokenizer=self.processing_class,
                max_length=model.max_length,
                word_ids=args.whole_word_mask,
                chunk=model.long_notes == "chunk",
            ),
            self.data_collator,
            self._train_batch_size,
            args.world_size,
            args.process_index,
            args.gradient_accumulation_steps,
            args.pairs_per_patient,
            args.unbiased,
            args.max_gap,
            args.data_seed if args.data_seed is not None else args.seed,
        )
        return DataLoader(
            self._stream,
            batch_size=None,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            generator=torch.Generator(),  # its own: a loader that starts draws a number, a resumed run starts one more
        )

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """All pairs once, longest first, the same masks each time."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        eval_dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if eval_dataset is None:
            raise ValueError("Evaluation needs an eval_dataset: notes with patient_id, time and text.")
        if isinstance(eval_dataset, Dataset):
            eval_dataset = token_pairs(
                eval_dataset,
                "eval",
                processing_class=self.processing_class,
                model=self.dense_model,
                args=self.args,
                stats=self.token_stats,
            )
        return self._pair_loader(eval_dataset, self.args.eval_batch_size, shuffle=False)
