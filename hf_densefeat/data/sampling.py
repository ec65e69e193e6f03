"""Batches of pairs that do not depend on how they are cut into ranks and micro-batches."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from hf_densefeat.data.columns import place_in_run
from hf_densefeat.data.pairs import NotePairs


class PairBatchSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one rank, cut from step batches that do not depend on how they are cut.

    The unit is the step batch: the `batch_size · ranks · accumulation` pairs of one optimiser step. Which pairs form
    a step batch, and in which order, follows from (seed, epoch, that number) alone, so 1 × 32 pairs and 2 ranks × 4
    micro-batches × 4 pairs see the same ones. A step batch, longest pairs first, is cut into micro-steps of
    `batch_size · ranks` pairs and these into contiguous slices, one per rank, whose sizes differ by at most one.

    Every pair comes once per epoch and every rank yields the same number of lists. The last step batch may be short, or is
    left out (`drop_last`); a rank whose slice of it is empty yields an empty list, so that no rank waits for another. Without
    `shuffle` step batches are the same every epoch, from the longest pair to the shortest. A pair is as long as its longer
    note, by `lengths`, (notes,).

    Items are `(pair, mask_seed)`; `mask_seed`, in [0, 2³¹), depends on (seed, epoch, pair) and seeds the masks of that pair.

    Up to `pairs_per_patient` pairs of a patient that follow each other stay in one step batch, unless its border falls among
    them. `spread_patients` has each patient once in a step batch, as estimators need whose rows are to be independent. Pairs
    are drawn at random into buckets of up to 50 step batches: a patient with more pairs in one than it has step batches comes
    as evenly as can be, and the last, short step batch of an epoch may have a patient twice.
    """

    def __init__(
        self,
        pairs: NotePairs,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        ranks: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        pairs_per_patient: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        spread_patients: bool = False,
    ):
        for name, value in {"batch_size": batch_size, "ranks": ranks, "accumulation": accumulation}.items():
            if value < 1:
                raise ValueError(f"Expected `{name}` of at least 1, got {value}.")
        if not 0 <= rank < ranks:
            raise ValueError(f"Expected `rank` in [0, {ranks}), got {rank}.")
        self.step_size = batch_size * ranks * accumulation
        if not 1 <= pairs_per_patient <= self.step_size:
            raise ValueError(
                f"Expected `pairs_per_patient` between 1 and the {self.step_size} pairs of an optimiser step, got "
                f"{pairs_per_patient}. Lower it, or raise `batch_size` or `accumulation`."
            )
        if spread_patients and (pairs_per_patient > 1 or not shuffle):
            raise ValueError(
                "`spread_patients` keeps a patient's pairs apart, so it needs `shuffle` and `pairs_per_patient=1`, got "
                f"shuffle={shuffle} and pairs_per_patient={pairs_per_patient}."
            )
        if drop_last and len(pairs) < self.step_size:
            raise ValueError(
                f"Expected at least the {self.step_size:,} pairs of one optimiser step, got {len(pairs):,}, and "
                "`drop_last` leaves none. Lower `batch_size` or `accumulation`, or keep the last batch."
            )
        if len(lengths) != pairs.num_notes:
            raise ValueError(
                f"Expected one length per note, {pairs.num_notes:,}, got {len(lengths):,}. Pass the `length` column of "
                "the tokenised notes the pairs were made from."
            )
        lengths = np.asarray(lengths, dtype=np.int64)
        self.length, self.patient = np.maximum(lengths[pairs.earlier], lengths[pairs.later]), pairs.patient
        self.batch_size, self.ranks, self.rank, self.accumulation = batch_size, ranks, rank, accumulation
        self.pairs_per_patient, self.seed, self.shuffle = pairs_per_patient, seed, shuffle
        self.drop_last, self.spread_patients = drop_last, spread_patients
        self.epoch = 0

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
        full = n // size * size
        if self.shuffle:
            rng = np.random.default_rng((self.seed, self.epoch))
            # whole runs, of up to so many pairs of a patient, are shuffled, so that what is to stay together does
            run = np.cumsum(place_in_run(self.patient) % self.pairs_per_patient == 0) - 1
            place = np.argsort(rng.permutation(run.max(initial=-1) + 1))  # of each run in a random order
            order = np.argsort(place[run], kind="stable")
            longest = np.zeros(n, dtype=np.int64)
            np.maximum.at(longest, run, self.length)
            batches: list[np.ndarray] = []
            # A bucket holds a quarter of the pairs at most: a small data set too has other batches every epoch.
            bucket = size * int(np.clip(n // (4 * size), 1, 50))
            for mixed in np.split(order[:full], range(bucket, full, bucket)):
                # within a bucket, runs of like length share a step batch: little is padded
                filled = mixed[np.argsort(-longest[run[mixed]], kind="stable")]
                if self.spread_patients:
                    filled = _spread(filled, self.patient[filled], size)
                batches += np.split(filled, range(size, len(filled), size))
            # the step batches in random order, or the longest would come first in every bucket
            batches = [batches[i] for i in rng.permutation(full // size)] + [order[full:]]
        else:
            longest_first = np.argsort(-self.length, kind="stable")
            batches = np.split(longest_first, range(size, full + 1, size))
        if self.drop_last or full == n:
            batches.pop()  # the short one
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
        place[by_patient] = place_in_run(code[by_patient])
        must, may = place < (counts // left)[code], np.flatnonzero(place * left < counts[code])
        taken = may[np.argsort(~must[may], kind="stable")][:size]
        filled.append(pairs[taken])
        pairs, patient = np.delete(pairs, taken), np.delete(patient, taken)
    return np.concatenate([*filled, pairs])
