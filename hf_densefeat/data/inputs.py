"""The contract of an input kind: how notes of that kind become rows, pairs of rows and batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hf_densefeat.data.pairs import NotePairs

Batch = dict[str, Any]  # tensors, and `num_pairs`, an int


class PairDataset(Dataset[dict[str, Any]], ABC):
    """Pairs of rows, looked up by `(pair, mask_seed)` or by pair; a subclass says what a row is.

    Attributes:
        pairs: the row numbers of both notes of each pair.
        lengths: (num_notes,) int64, tokens or events of each note; batches hold pairs of like length.
    """

    pairs: NotePairs
    lengths: np.ndarray

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        """Return one pair."""
        return self.__getitems__([item])[0]

    @abstractmethod
    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Return the pairs of one micro-batch; an empty list for an empty list."""


class ReadingStats(Protocol):
    """What reading did to the notes; `str` gives one line for the log."""

    def counts(self) -> dict[str, int]:
        """Return what the model card says, name to number: what was kept, and how many notes were cut."""
        ...


@runtime_checkable
class PairProcessor(Protocol):
    """One kind of input. `TextProcessor` is that of texts, and `events.EventProcessor` one of timed values.

    A processor is passed to `DenseTrainer` as `processing_class`; a tokenizer is wrapped in a `TextProcessor` there.
    """

    def pairs(
        self, notes: datasets.Dataset, pairs: NotePairs, *, max_length: int | None = None
    ) -> tuple[PairDataset, ReadingStats]:
        """Read the notes of pairs.

        Args:
            notes: with `patient_id`, `time` and `text`.
            pairs: of their rows, as `pair_notes` or `adjacent_pairs` makes them.
            max_length: tokens or events kept of a note.

        Raises:
            ValueError: if a note cannot be read.
        """
        ...

    def collator(
        self, objective: str | None, *, mlm_probability: float, max_length: int | None = None
    ) -> Callable[[list[dict[str, Any]]], Batch]:
        """Return the function from the pairs of a `PairDataset` to one batch of 2B rows, earlier notes first.

        The batch holds what the model's `forward` takes, `labels` (-100 where nothing is predicted) and `num_pairs`. An
        empty list gives two rows without labels, because every rank has to run the model.

        Args:
            objective: "mlm", "causal", or None for no labels.
            mlm_probability: share of what is masked.
            max_length: as for `pairs`.
        """
        ...

    def pad(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """Columns of rows of different lengths to one batch with `attention_mask`, padded on the right."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write the processor beside the model."""
        ...


@runtime_checkable
class StreamProcessor(PairProcessor, Protocol):
    """An input kind that a `PairStream` can read, one batch of texts at a time."""

    def columns(self, texts: list[str], *, max_length: int | None = None) -> dict[str, list[Any]]:
        """Columns of rows, one a text: those of the `PairDataset`, and `cut`, how much of each text was left out."""
        ...
