"""Episodes to tensors, and pairs of episodes to one batch with masks."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from torch import Tensor
from transformers import FeatureExtractionMixin

from hf_densefeat.data.columns import column
from hf_densefeat.data.inputs import Batch, PairCollator, PairDataset, Row, pad_rows, rows_of
from hf_densefeat.data.pairs import NotePairs
from hf_densefeat.events.records import events_of, latest_of_each

logger = logging.getLogger(__name__)

POINTS = 65  # quantiles that are stored of each code
MASKED = -1.0  # in place of a quantile that is to be predicted


@dataclass(frozen=True)
class EventStats:
    """What reading did to the episodes: their number, events kept, events of unknown codes, events over the limit."""

    episodes: int
    events: int
    unknown: int
    cut: int
    max_length: int

    def counts(self) -> dict[str, int]:
        """What the model card says."""
        return {"events": self.events, f"events over {self.max_length} an episode, cut": self.cut}

    def __str__(self) -> str:
        return (
            f"{self.events:,} events in {self.episodes:,} episodes; {self.unknown:,} of unknown codes dropped, "
            f"{self.cut:,} over {self.max_length:,} an episode cut"
        )


class EpisodeProcessor(ABC):
    """What the processors of episodes have in common as `PairProcessor`s: a subclass reads episodes."""

    model_input_names: tuple[str, ...]  # the columns of a row, and `attention_mask`

    @abstractmethod
    def read(self, episodes: Sequence[str], max_length: int | None = None) -> tuple[list[Row], EventStats]:
        """One row an episode, and the counts; ValueError for one that cannot be read or has nothing that can be embedded."""

    def rows(self, episodes: Sequence[str], max_length: int | None = None) -> dict[str, list[np.ndarray]]:
        """The columns of all rows, not padded; `pad` makes tensors of them."""
        rows, stats = self.read(episodes, max_length)
        if stats.unknown:
            logger.warning("Codes that the processor does not know are dropped: %s.", stats)
        return {name: [row[name] for row in rows] for name in self.model_input_names[:-1]}

    def pairs(
        self, episodes: datasets.Dataset, pairs: NotePairs, *, max_length: int | None = None
    ) -> tuple[EpisodePairs, EventStats]:
        """The episodes of pairs, read; and the counts."""
        rows, stats = self.read(column(episodes, "text").to_pylist(), max_length)
        return EpisodePairs(rows, pairs), stats


class EventProcessor(EpisodeProcessor, FeatureExtractionMixin):
    """Episodes to tensors: codes as numbers, values as quantiles of the training values of their code.

    It stands where a tokenizer stands, and an event is a token.
    Codes unknown to it are dropped, with a warning that counts them. Of an episode with more than `max_events` the latest
    of each code are kept first, then the latest but one, and so on: a morning's only lactate outlives the tenth heart rate.

    A quantile is the mid-rank of the value among the training values of its code, in [0, 1], linear between the stored
    quantiles; values outside the training range become 0 or 1.

    Args:
        codes: known codes; code i has number i + 1, 0 is padding.
        values: for each code, increasing values …
        levels: … and their quantiles.
        max_events: events kept of an episode.
        bins: number of equal bins that a masked quantile is predicted in.
        max_hours: length of an episode, for the scale of time.
        kwargs: as for `FeatureExtractionMixin`.
    """

    model_input_names = ("input_ids", "quantiles", "hours", "attention_mask")

    def __init__(self, codes=(), values=(), levels=(), *, max_events=128, bins=32, max_hours=24.0, **kwargs):
        super().__init__(**kwargs)
        self.codes, self.values, self.levels = list(codes), list(values), list(levels)
        self.max_events, self.bins, self.max_hours = max_events, bins, max_hours

    @classmethod
    def fit(cls, episodes: Sequence[str], *, max_events: int = 128, min_count: int = 10) -> EventProcessor:
        """Codes, quantiles and hours of training patients' episodes; episodes without events are passed over.

        A code needs `min_count` events to become known. `POINTS` quantiles of each, the least and the largest value among
        them, are saved and pushed with the processor.
        """
        _, names, value, hours = events_of(episodes)
        place: dict[str, int] = {}
        number = np.array([place.setdefault(name, len(place)) for name in names], dtype=np.int64)
        codes, count = list(place), np.bincount(number)
        grid = np.linspace(0, 1, POINTS)
        known, values, levels = [], [], []
        for i in sorted(np.flatnonzero(count >= min_count), key=codes.__getitem__):
            quantiles = np.quantile(value[number == i], grid)
            # a value that is frequent stands at several quantiles: its level is their mean, its mid-rank
            distinct, of = np.unique(quantiles, return_inverse=True)
            known.append(codes[i])
            values.append(distinct.tolist())
            levels.append((np.bincount(of, grid) / np.bincount(of)).tolist())
        if not known:
            raise ValueError(
                f"Expected a code with at least {min_count} events, got none in {len(episodes)} episodes."
            )
        return cls(known, values, levels, max_events=max_events, max_hours=float(max(hours.max(), 1.0)))

    @property
    def vocab_size(self) -> int:
        """Codes and padding."""
        return len(self.codes) + 1

    def get_vocab(self) -> dict[str, int]:
        """Code to number."""
        return {code: number for number, code in enumerate(self.codes, 1)}

    def read(
        self, episodes: Sequence[str], max_length: int | None = None, *, empty: bool = False
    ) -> tuple[list[Row], EventStats]:
        """One row an episode, `input_ids`, `quantiles` and `hours`, and the counts.

        ValueError for an episode that cannot be read or, unless `empty` ones are taken, in which no event is left.
        """
        limit = min(max_length or self.max_events, self.max_events)
        episode, names, value, hours = events_of(episodes)
        vocabulary = self.get_vocab()
        number = np.array([vocabulary.get(name, 0) for name in names], dtype=np.int64)
        known = np.flatnonzero(number)
        kept = known
        # the sorting below is for episodes that are too long alone
        if np.bincount(episode[known], minlength=1).max() > limit:
            kept = known[latest_of_each(episode[known], number[known], hours[known], limit)]
        order = kept[np.lexsort((value[kept], number[kept], hours[kept], episode[kept]))]
        unknown, cut = len(number) - len(known), len(known) - len(kept)
        episode, number, value, hours = episode[order], number[order], value[order], hours[order]
        columns: dict[str, np.ndarray] = {
            "input_ids": number,
            "quantiles": self._quantiles(number, value).astype(np.float32),
            "hours": hours.astype(np.float32),
        }
        # an episode without events is an empty slice between two equal cuts
        cuts = np.searchsorted(episode, np.arange(1, len(episodes)))
        rows = rows_of({name: np.split(values, cuts) for name, values in columns.items()})
        nothing = next((i for i, row in enumerate(rows) if not len(row["input_ids"])), None)
        if nothing is not None and not empty:
            raise ValueError(
                f"Episode {nothing} has no event of a known code, so there is nothing to embed. Leave such episodes out, or "
                "use the multimodal encoder, which takes a note alone."
            )
        return rows, EventStats(len(episodes), len(number), unknown, cut, limit)

    def _quantiles(self, number: np.ndarray, value: np.ndarray) -> np.ndarray:
        quantiles, order = np.empty(len(value)), np.argsort(number, kind="stable")
        cuts = np.searchsorted(number[order], np.arange(1, self.vocab_size + 1))
        for i, rows in enumerate(np.split(order, cuts)[1:-1]):
            quantiles[rows] = np.interp(value[rows], self.values[i], self.levels[i])
        return quantiles

    def pad(self, rows: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Tensor]:
        """One batch, padded on the right to the longest row: (B, L) each, and `attention_mask`."""
        return pad_rows(rows)

    def collator(
        self, objective: str | None, *, mlm_probability: float, max_length: int | None = None
    ) -> EpisodePairCollator:
        """See `PairProcessor`; `mlm_probability` is the share of values to predict."""
        return EpisodePairCollator(self, objective, mlm_probability)


class EpisodePairs(PairDataset):
    """Pairs of episodes that have been read."""

    def __init__(self, rows: list[Row], pairs: NotePairs):
        lengths = [sum(len(values) for name, values in row.items() if name.endswith("ids")) for row in rows]
        super().__init__(pairs, np.array(lengths))
        self.rows = rows

    def read(self, notes: np.ndarray) -> list[Row]:
        """Return the rows of these episodes."""
        return [self.rows[i] for i in notes]


class EpisodePairCollator(PairCollator):
    """B pairs of episodes to one batch of 2B rows, earlier episodes first, with a share of the values masked.

    The label of a masked value is the bin of its quantile. `MASKED` stands in its place: the value is not in the batch but
    as a label. With the objective None nothing is masked, and there are no labels.
    """

    def __init__(self, processor: Any, objective: str | None = "mlm", mask_probability: float = 0.30):
        if objective not in ("mlm", None):
            raise ValueError(f'Expected `objective` "mlm" or None, got {objective!r}.')
        if not 0 <= mask_probability <= 1:
            raise ValueError(f"Expected `mask_probability` in [0, 1], got {mask_probability}.")
        self.processor, self.objective, self.mask_probability = processor, objective, mask_probability

    def row(self, row: Row, seed: tuple[int, int]) -> Row:
        """The row with masked values, and its labels."""
        if self.objective is None:
            return row | {"labels": np.full(len(row["input_ids"]), -100)}
        masked = np.random.default_rng(seed).random(len(row["input_ids"])) < self.mask_probability
        bins = np.minimum((row["quantiles"] * self.processor.bins).astype(np.int64), self.processor.bins - 1)
        quantiles = np.where(masked, np.float32(MASKED), row["quantiles"])
        return row | {"quantiles": quantiles, "labels": np.where(masked, bins, -100)}

    def nothing(self) -> Row:
        """One event."""
        zero = np.zeros(1, np.float32)
        return {"input_ids": np.ones(1, np.int64), "quantiles": zero, "hours": zero, "labels": np.full(1, -100)}

    def batch(self, rows: list[Row]) -> Batch:
        """The rows as the processor pads them."""
        return self.processor.pad({name: [row[name] for row in rows] for name in rows[0]})
