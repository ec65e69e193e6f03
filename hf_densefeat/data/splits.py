"""Train, validation and test, no patient in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import datasets
import numpy as np

from hf_densefeat.data.notes import column, dense_codes

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "tuning"),
    "test": ("test", "testing", "held_out"),
}


def split_by_patient(
    notes: datasets.Dataset,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    split_column: str | None = "split",
) -> datasets.DatasetDict:
    """Split notes so that no patient is in two splits.

    Patients are ranked by a hash of (seed, patient id), so the split depends neither on the order of the rows nor on
    how many notes a patient has. Where the table brings its own splits in `split_column`, these are kept instead.

    Args:
        notes: What `load_notes` returns.
        fractions: Shares of *patients* for train, validation and, if three are given, test; they add up to 1.
        seed: Another seed, another split.
        split_column: Column with the table's own splits (train, validation or tuning, test or held_out), used if it
            exists; None to split anew.

    Returns:
        `train`, `validation` and `test`, each in the order of `notes`.

    Raises:
        ValueError: If a split would be empty, if the table's own splits share a patient, or lack a name we know.
    """
    patient = dense_codes(notes, "patient_id")
    if split_column is not None and split_column in notes.column_names:
        return _own_splits(notes, patient, split_column)
    names = list(SPLITS)[: len(fractions)]
    if len(fractions) not in (2, 3) or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"Expected two or three positive `fractions` that add up to 1, got {tuple(fractions)}.")
    ids = column(notes, "patient_id").unique().to_pylist()
    if len(ids) < len(fractions):
        raise ValueError(
            f"Expected at least {len(fractions)} patients, one for each of {names}, got {len(ids)}. A split is by "
            "patient: bring more patients, or pass fewer `fractions`."
        )
    ids.sort()
    keys = [hashlib.blake2b(f"{seed}:{one}".encode(), digest_size=8).digest() for one in ids]
    by_hash = np.argsort(np.array(keys, dtype="S8").view(">u8"), kind="stable")
    sizes = [max(1, round(len(ids) * share)) for share in fractions[1:]]
    while sum(sizes) >= len(ids):
        sizes[int(np.argmax(sizes))] -= 1
    group = np.zeros(len(ids), dtype=np.int64)
    for number in range(1, len(fractions)):
        group[by_hash[sum(sizes[: number - 1]) : sum(sizes[:number])]] = number
    parts = {name: notes.select(np.flatnonzero(group[patient] == number)) for number, name in enumerate(names)}
    return _without_overlap(datasets.DatasetDict(parts))


def _own_splits(notes: datasets.Dataset, patient: np.ndarray, split_column: str) -> datasets.DatasetDict:
    """Split by the table's own column."""
    known = {alias: name for name, aliases in SPLITS.items() for alias in aliases}
    values = column(notes, split_column).dictionary_encode().unify_dictionaries().combine_chunks()
    labels = values.dictionary.to_pylist()
    unknown = [str(label) for label in labels if label not in known]
    if values.null_count or unknown:
        raise ValueError(
            f"Expected splits {list(known)} in column `{split_column}`, got {values.null_count:,} notes without a "
            f"split and the names {unknown}. Rename them, or pass `split_column=None` to split anew."
        )
    names = np.array([known[label] for label in labels])[values.indices.to_numpy()]
    parts = {name: notes.select(np.flatnonzero(names == name)) for name in SPLITS if (names == name).any()}
    return _without_overlap(datasets.DatasetDict(parts))


def _without_overlap(parts: datasets.DatasetDict) -> datasets.DatasetDict:
    """Refuse splits that share a patient."""
    seen: dict[str, set] = {name: set(column(part, "patient_id").unique().to_pylist()) for name, part in parts.items()}
    for one in seen:
        for other in seen:
            shared = len(seen[one] & seen[other])
            if one < other and shared:
                raise ValueError(
                    f"{shared:,} patients have notes both in `{one}` and in `{other}`: what is learnt there would "
                    "leak. Mend the split column, or pass `split_column=None` to split by patient anew."
                )
    return parts
