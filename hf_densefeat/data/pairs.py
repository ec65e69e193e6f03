"""Notes to adjacent pairs, as row indices, and the batches in which training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np

from hf_densefeat.data.columns import column, dense_codes, order_of_notes, time_ticks


@dataclass(frozen=True)
class NotePairs:
    """Pairs (note, the same patient's next note) as row indices into the notes they were made from.

    Attributes:
        earlier: (P,) int64, rows of the earlier notes. Pairs are ordered by patient, then time.
        later: (P,) int64, rows of the notes that follow them.
        patient: (P,) int64, a dense code per patient, 0 … num_patients − 1; equal codes mean the same patient.
        num_notes: Number of notes the pairs were made from.
        num_patients: Number of patients among these notes.
        removed: Number of adjacent pairs each filter took away, by the filter's name.
    """

    earlier: np.ndarray
    later: np.ndarray
    patient: np.ndarray
    num_notes: int
    num_patients: int
    removed: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.earlier)

    def __str__(self) -> str:
        """Return one line of counts."""
        paired = len(np.unique(self.patient))
        text = f"{len(self):,} pairs of {paired:,} patients, from {self.num_notes:,} notes of {self.num_patients:,} patients"
        gone = ", ".join(f"{count:,} by {name}" for name, count in self.removed.items())
        return f"{text}; removed: {gone}" if gone else text


def adjacent_pairs(
    notes: datasets.Dataset,
    max_gap: float | None = None,
    same: str | Sequence[str] = (),
    max_overlap: float | None = None,
) -> NotePairs:
    """Pair every note with the same patient's next note: Σ_p (n_p − 1) pairs before filters.

    Only the small columns are read; the notes may lie in any order. Ties in time are broken by `note_seq` where the
    table has it, then by row. Split by patient *before* pairing, so that no pair spans two splits.

    Args:
        notes: What `load_notes` returns.
        max_gap: Largest time between the two notes, in days (a fraction is fine); pairs further apart are left out.
        same: Names of columns in which the two notes must agree, such as `note_type` or `hadm_id`. An empty cell
            agrees with nothing.
        max_overlap: Largest share, in [0, 1], of the later note's runs of five words that the earlier note has too;
            pairs above it, notes copied forward, are left out. Reads the texts of the pairs that are left so far.

    Returns:
        The pairs, with the number that each filter removed; filters act in the order of the arguments.

    Raises:
        ValueError: If no pair is left, or a column named in `same` does not exist.
    """
    order, patient = order_of_notes(notes)
    patients = int(patient.max()) + 1 if len(patient) else 0
    sorted_patient = patient[order]
    # a note and the next one in the order are a pair where they are of one patient
    first = np.flatnonzero(sorted_patient[1:] == sorted_patient[:-1])
    earlier, later = order[first], order[first + 1]
    adjacent, removed = len(first), {}

    def keep(name: str, mask: np.ndarray) -> None:
        nonlocal earlier, later
        removed[name] = int(len(mask) - mask.sum())
        earlier, later = earlier[mask], later[mask]

    if max_gap is not None:
        ticks, ticks_per_day = time_ticks(notes)
        keep("max_gap", ticks[later] - ticks[earlier] <= max_gap * ticks_per_day)
    for name in [same] if isinstance(same, str) else same:
        codes, known = dense_codes(notes, name), column(notes, name).is_valid().to_numpy()
        keep(f"same {name}", (codes[earlier] == codes[later]) & known[earlier])
    if max_overlap is not None:
        keep("max_overlap", _overlap(notes, earlier, later) <= max_overlap)
    pairs = NotePairs(earlier, later, patient[earlier], len(notes), patients, removed)
    if len(pairs) == 0:
        gone = ", ".join(f"{count:,} by {name}" for name, count in removed.items()) or "none by filters"
        raise ValueError(
            f"No pair of adjacent notes: expected patients with at least two notes, got {len(notes):,} notes of "
            f"{patients:,} patients, {adjacent:,} adjacent pairs of which were removed: {gone}. Loosen the filters, "
            "add notes, or, where patients have one long note each, pair its sections: see `split_into_sections`."
        )
    return pairs


def _overlap(notes: datasets.Dataset, earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Return the share of each later note's five-word shingles that its earlier note has too."""
    texts, shares = notes.select_columns("text"), []
    for start in range(0, len(earlier), 1000):
        pair = slice(start, start + 1000)
        rows, places = np.unique(np.r_[earlier[pair], later[pair]], return_inverse=True)
        shingles = [_shingles(text) for text in texts[rows]["text"]]
        before, after = np.split(places, 2)
        shares += [np.isin(shingles[b], shingles[a]).mean() for a, b in zip(before, after, strict=True)]
    return np.array(shares)


def _shingles(text: str, size: int = 5) -> np.ndarray:
    """Return the hashes of all runs of five words; a shorter text is one run."""
    words = np.array([hash(word) for word in text.split()], dtype=np.int64).view(np.uint64)
    size = min(size, len(words))
    runs = np.lib.stride_tricks.sliding_window_view(words, size)
    return np.unique(runs @ (np.uint64(0x9E3779B97F4A7C15) ** np.arange(size, dtype=np.uint64)))
