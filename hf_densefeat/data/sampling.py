"""Batches of pairs that do not depend on how they are cut into ranks and micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from hf_densefeat.data.pairs import NotePairs


class PairBatchSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one rank, cut from step batches that do not depend on how they are cut.

    The unit is the step batch: the `batch_size · ranks · accumulation` pairs of one optimiser step. Which pairs form
    a step batch, and in which order, follows from (seed, epoch, that number) alone, so 1 × 32 pairs and 2 ranks × 4
    micro-batches × 4 pairs see the same ones. A step batch, longest pairs first, is cut into micro-steps of
    `batch_size · ranks` pairs and these into contiguous slices, one per rank, whose sizes differ by at most one.

    Every pair comes once per epoch and every rank yields the same number of lists. The last step batch may be short;
    a rank whose slice of it is empty yields an empty list, so that no rank waits for another.

    Items are `(pair, mask_seed)`; `mask_seed`, in [0, 2³¹), depends on (seed, epoch, pair) and seeds the masks of that pair.

    Args:
        pairs: What `adjacent_pairs` returns.
        lengths: (notes,) tokens per note; a pair is as long as its longer note.
        batch_size: Pairs per rank and micro-batch.
        ranks: Number of ranks.
        rank: This rank.
        accumulation: Micro-batches per optimiser step.
        pairs_per_patient: Up to so many pairs of a patient that follow each other stay in one step batch.
        spread_patients: Have each patient once in a step batch, as estimators need whose rows are to be independent;
            needs `shuffle` and `pairs_per_patient` 1. Pairs are drawn at random into buckets of up to 50 step batches:
            a patient with more pairs in one than it has step batches comes as evenly as can be, and the last, short
            step batch of an epoch may have a patient twice.
        seed: Seed of everything random here.
        shuffle: New step batches every epoch; False: the same every epoch, from the longest pair to the shortest.
        drop_last: Leave out the last step batch if it is short.
    """

    def __init__(
        self,
        pairs: NotePairs,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        ranks: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        pairs_per_patient: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        spread_patients: bool = False,
    ):
        lengths = np.asarray(lengths, dtype=np.int64)
        _check(batch_size, ranks, rank, accumulation, pairs_per_patient)
        if len(lengths) != pairs.num_notes:
            raise ValueError(
                f"Expected one length per note, {pairs.num_notes:,}, got {len(lengths):,}. Pass the `length` column of "
                "the tokenised notes the pairs were made from."
            )
        self.length = np.maximum(lengths[pairs.earlier], lengths[pairs.later])
        self.patient = pairs.patient
        self.batch_size, self.ranks, self.rank, self.accumulation = batch_size, ranks, rank, accumulation
        self.pairs_per_patient, self.seed, self.shuffle, self.drop_last = pairs_per_patient, seed, shuffle, drop_last
        self.spread_patients = spread_patients
        if spread_patients and (pairs_per_patient > 1 or not shuffle):
            raise ValueError(
                "`spread_patients` keeps a patient's pairs apart, so it needs `shuffle` and `pairs_per_patient=1`, got "
                f"shuffle={shuffle} and pairs_per_patient={pairs_per_patient}."
            )
        self.step_size = batch_size * ranks * accumulation
        self.epoch = 0
        if drop_last and len(pairs) < self.step_size:
            raise ValueError(
                f"Expected at least the {self.step_size:,} pairs of one optimiser step, got {len(pairs):,}, and "
                "`drop_last` leaves none. Lower `batch_size` or `accumulation`, or keep the last batch."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of micro-batches per rank and epoch."""
        full, rest = divmod(len(self.length), self.step_size)
        return full * self.accumulation + (0 if self.drop_last else -(-rest // (self.batch_size * self.ranks)))

    def step_batches(self) -> list[np.ndarray]:
        """Return the pairs of each optimiser step of the epoch, in order, longest pair first within each."""
        n, size = len(self.length), self.step_size
        full, rest = n // size * size, n % size
        if self.shuffle:
            rng = np.random.default_rng((self.seed, self.epoch))
            # whole runs are shuffled, so that what is to stay together does
            start, count = _runs(self.patient, self.pairs_per_patient)
            order = rng.permutation(len(start))
            # A bucket holds a quarter of the pairs at most: a small data set too has other batches every epoch.
            bucket = size * int(np.clip(n // (4 * size), 1, 50))
            capacities = [bucket] * (full // bucket) + [full % bucket] * (full % bucket > 0)
            start, count = _pack(start[order], count[order], capacities + [rest] * (rest > 0))
            ends = np.cumsum(count)
            # within a bucket, runs of like length share a step batch: little is padded
            longest = np.maximum.reduceat(self.length[_expand(start, count)], ends - count)
            batches, pieces = [], np.searchsorted(ends, np.cumsum(capacities, dtype=np.int64)) + 1
            for piece in np.split(np.arange(len(start)), pieces):
                piece = piece[np.argsort(-longest[piece], kind="stable")]
                inside = int(count[piece].sum())
                filled = _expand(*_pack(start[piece], count[piece], [size] * (inside // size)))
                if self.spread_patients:
                    filled = _spread(filled, self.patient[filled], size)
                batches += [filled[cut : cut + size] for cut in range(0, inside, size)]
            # the step batches in random order, or the longest would come first in every bucket
            order = rng.permutation(full // size)
            batches = [batches[i] for i in order] + batches[full // size :]
        else:
            longest_first = np.argsort(-self.length, kind="stable")
            batches = [longest_first[cut : cut + size] for cut in range(0, n, size)]
        if self.drop_last and rest:
            batches.pop()
        # longest first, ties by number: a step batch does not depend on how it was filled
        return [batch[np.lexsort((batch, -self.length[batch]))] for batch in batches]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's micro-batches of `(pair, mask_seed)`."""
        # of all pairs, also of other ranks': a pair's seed does not depend on who trains on it
        rng = np.random.default_rng((self.seed, self.epoch if self.shuffle else 0, 1))
        mask_seeds = rng.integers(2**31, size=len(self.length))
        for batch in self.step_batches():
            for start in range(0, len(batch), self.batch_size * self.ranks):
                micro_step = batch[start : start + self.batch_size * self.ranks]
                # slices that differ by one pair at most, empty for some ranks in the last, short batch
                mine = np.array_split(micro_step, self.ranks)[self.rank]
                yield list(zip(mine.tolist(), mask_seeds[mine].tolist(), strict=True))


def _check(batch_size: int, ranks: int, rank: int, accumulation: int, pairs_per_patient: int) -> None:
    """ValueError for numbers that cut no step batch."""
    for name, value in {"batch_size": batch_size, "ranks": ranks, "accumulation": accumulation}.items():
        if value < 1:
            raise ValueError(f"Expected `{name}` of at least 1, got {value}.")
    if not 0 <= rank < ranks:
        raise ValueError(f"Expected `rank` in [0, {ranks}), got {rank}.")
    if pairs_per_patient < 1 or pairs_per_patient > batch_size * ranks * accumulation:
        raise ValueError(
            f"Expected `pairs_per_patient` between 1 and the {batch_size * ranks * accumulation} pairs of an "
            f"optimiser step, got {pairs_per_patient}. Lower it, or raise `batch_size` or `accumulation`."
        )


def _runs(patient: np.ndarray, maximum: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut each patient's consecutive pairs into runs of up to `maximum`: first pair and size of every run."""
    # pairs of a patient stand together, because pairs are sorted by patient
    begins = np.flatnonzero(np.r_[True, patient[1:] != patient[:-1]])
    place = np.arange(len(patient)) - np.repeat(begins, np.diff(np.r_[begins, len(patient)]))
    start = np.flatnonzero(place % maximum == 0)
    return start, np.diff(np.r_[start, len(patient)])


def _expand(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the pairs of all runs, run after run."""
    expanded: np.ndarray = np.arange(count.sum()) + np.repeat(start - (np.cumsum(count) - count), count)
    return expanded


def _pack(start: np.ndarray, count: np.ndarray, capacities: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Reorder runs so that they fill the capacities exactly, one after the other; what is left comes last.

    Greedy: the first run in the given order that still fits goes in; only where none fits is one cut in two.
    """
    # every capacity ends where a run ends, as with runs of one: nothing to do
    if np.isin(np.cumsum(capacities), np.cumsum(count)).all():
        return start, count
    waiting: dict[int, deque[tuple[int, int]]] = {size: deque() for size in range(1, int(count.max()) + 1)}
    for rank, (first, size) in enumerate(zip(start.tolist(), count.tolist(), strict=True)):
        waiting[size].append((rank, first))
    packed = []
    for capacity in [*capacities, int(count.sum()) - sum(capacities)]:
        while capacity > 0:
            # of the runs that fit, the one that comes first in the given order
            size = min((s for s in waiting if s <= capacity and waiting[s]), key=lambda s: waiting[s][0], default=0)
            if size == 0:
                size = min((s for s in waiting if waiting[s]), key=lambda s: waiting[s][0])
                rank, first = waiting[size].popleft()
                # the rest of the cut run keeps its place in the order
                waiting[size - capacity].appendleft((rank, first + capacity))
                packed.append((first, capacity))
                break
            packed.append((waiting[size].popleft()[1], size))
            capacity -= size
    start, count = np.array(packed, dtype=np.int64).T
    return start, count


def _spread(pairs: np.ndarray, patient: np.ndarray, size: int) -> np.ndarray:
    """Reorder pairs so that each patient is in as many batches of `size` as can be, else keep the order.

    Of a patient's c pairs, with b batches left, the next takes ⌊c/b⌋ at least and ⌈c/b⌉ at most: the former add up to
    `size` at most, the latter at least, so every batch can be filled.
    """
    filled = []
    for left in range(len(pairs) // size, 0, -1):
        _, code, counts = np.unique(patient, return_inverse=True, return_counts=True)
        by_patient = np.argsort(code, kind="stable")
        place = np.empty(len(pairs), dtype=np.int64)
        place[by_patient] = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
        must, may = place < (counts // left)[code], np.flatnonzero(place * left < counts[code])
        taken = may[np.argsort(~must[may], kind="stable")][:size]
        filled.append(pairs[taken])
        pairs, patient = np.delete(pairs, taken), np.delete(patient, taken)
    return np.concatenate([*filled, pairs])
