"""The contract of an input kind: how notes of that kind become rows, pairs of rows and batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_densefeat.data.pairs import NotePairs

Row = dict[str, Any]  # the columns of one note: tokens, or codes, values and hours
Batch = dict[str, Any]  # tensors, and `num_pairs`, an int


class PairDataset(Dataset[dict[str, Any]], ABC):
    """Pairs of rows, looked up by `(pair, mask_seed)` or by pair: `{"earlier": row, "later": row, "mask_seed": seed}`.

    `lengths` are the tokens or events of each note, (num_notes,) int64; batches hold pairs of like length.
    """

    def __init__(self, pairs: NotePairs, lengths: np.ndarray):
        if len(lengths) != pairs.num_notes:
            raise ValueError(
                f"Expected the tokens of the {pairs.num_notes:,} notes that the pairs were made from, or the events of "
                f"so many episodes, got {len(lengths):,} rows."
            )
        self.pairs, self.lengths = pairs, lengths

    @abstractmethod
    def read(self, notes: np.ndarray) -> list[Row]:
        """Return the rows of these notes."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Return the pairs of one micro-batch, read in one go; an empty list for an empty list."""
        if not items:
            return []
        chosen, mask_seeds = zip(*(item if isinstance(item, tuple) else (item, 0) for item in items), strict=True)
        index = np.array(chosen)
        return paired(self.read(np.r_[self.pairs.earlier[index], self.pairs.later[index]]), mask_seeds)


def paired(rows: Sequence[Row], mask_seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One dict a pair, of the rows of all earlier notes followed by those of all later ones."""
    n = len(mask_seeds)
    return [
        {"earlier": earlier, "later": later, "mask_seed": int(mask_seed)}
        for earlier, later, mask_seed in zip(rows[:n], rows[n:], mask_seeds, strict=True)
    ]


def rows_of(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Columns as one dict a row."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class PairCollator(ABC):
    """B pairs to one batch of 2B rows, earlier notes first, with `labels` (−100 where nothing is predicted) and `num_pairs`.

    What is masked in a row is drawn from (mask_seed, side), and does not depend on the rest of the batch. An empty list,
    the share of a rank for which no pairs were left, gives two rows without labels: every rank has to run the model.
    """

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> Batch:
        """Return the batch of the pairs that a `PairDataset` yields."""
        sides = enumerate(("earlier", "later"))
        rows = [self.row(pair[name], (pair["mask_seed"], side)) for side, name in sides for pair in pairs]
        return self.batch(rows or [self.nothing()] * 2) | {"num_pairs": len(pairs)}

    @abstractmethod
    def row(self, row: Row, seed: tuple[int, int]) -> Row:
        """Return the columns that the model reads, as arrays, with what is masked and its labels."""

    @abstractmethod
    def nothing(self) -> Row:
        """Return a minimal row without labels."""

    @abstractmethod
    def batch(self, rows: list[Row]) -> Batch:
        """Return the rows as padded tensors."""


def pad_rows(rows: Mapping[str, Sequence[np.ndarray]], padding: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Columns of arrays of different lengths to (B, L) tensors, L at least 1, padded on the right.

    Labels are padded with −100, other columns with what `padding` says, or else with 0. `attention_mask`, 1 where a row
    has something, comes with them. Padding is on the right because decoders read the last token, and because position ids
    count from the left.
    """
    lengths = np.array([len(row) for row in next(iter(rows.values()))])
    shape, padding = (len(lengths), max(int(lengths.max()), 1)), {"labels": -100} | dict(padding or {})
    inside = np.arange(shape[1]) < lengths[:, None]
    batch = {"attention_mask": torch.from_numpy(inside.astype(np.int64))}
    for name, values in rows.items():
        padded = np.full(shape, padding.get(name, 0), dtype=values[0].dtype)
        padded[inside] = np.concatenate(values)
        batch[name] = torch.from_numpy(padded)
    return batch


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
        """Read the notes of pairs; ValueError for one that cannot be read.

        Args:
            notes: with `patient_id`, `time` and `text`.
            pairs: of their rows, as `pair_notes` or `adjacent_pairs` makes them.
            max_length: tokens or events kept of a note.
        """
        ...

    def collator(
        self, objective: str | None, *, mlm_probability: float, max_length: int | None = None
    ) -> Callable[[list[dict[str, Any]]], Batch]:
        """Return the function from the pairs of a `PairDataset` to a batch, as `PairCollator` says.

        Args:
            objective: "mlm", "causal", or None for no labels.
            mlm_probability: share of what is masked.
            max_length: as for `pairs`.
        """
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
