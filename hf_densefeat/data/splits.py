"""Train, validation and test, no patient in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np

from hf_densefeat.data.columns import column, dense_codes

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "tuning"),
    "test": ("test", "testing", "held_out"),
}


@dataclass(frozen=True)
class SplitRecord:
    """How patients were split, without naming any: what a trained folder's config keeps under `densefeat["split"]`.

    A patient's place is a hash of (seed, patient id) as a fraction of its range, so the record says of any patient, of this
    table or another, in which part he was.

    Attributes:
        seed: Seed of the hash.
        shares: Shares of patients for train, validation and, if three are given, test.
        rule: `hash` where places decide, `column` where the table brought its own splits: then the record cannot say.
        cuts: Places at which validation ends, test (if any) ends, and train begins.
    """

    seed: int = 0
    shares: tuple[float, ...] = (0.7, 0.15, 0.15)
    rule: str = "hash"
    cuts: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For a config that is saved as JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SplitRecord:
        """From what `to_dict` gave."""
        return cls(int(record["seed"]), tuple(record["shares"]), str(record["rule"]), tuple(record["cuts"]))

    def parts_of(self, ids: Sequence[Hashable]) -> np.ndarray | None:
        """0 (train), 1 (validation) or 2 (test) of each patient id, (n,); None where a column decided."""
        if self.rule != "hash":
            return None
        order = (*range(1, len(self.shares)), 0)
        return np.array(order)[np.searchsorted(self.cuts, _places(ids, self.seed), side="right")]


def _places(ids: Sequence[Hashable], seed: int) -> np.ndarray:
    """Where each patient stands, in [0, 1)."""
    keys = [hashlib.blake2b(f"{seed}:{one}".encode(), digest_size=8).digest() for one in ids]
    return np.array(keys, dtype="S8").view(">u8").astype(np.float64) / 2.0**64


def split_patients(
    ids: Sequence[Hashable],
    shares: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    stratum: Sequence[Hashable] | np.ndarray | None = None,
) -> tuple[np.ndarray, SplitRecord]:
    """Parts 0 (train), 1 (validation), 2 (test) of different patient ids, (n,), and the record of the split.

    Patients are ranked by their place, a hash of (seed, id): neither their order nor the number of their notes matters.
    With `stratum`, a label for each patient, each stratum is split by itself, so that a rare outcome reaches every part;
    such a split cannot be told from a record, whose rule is then `stratified`.

    Raises:
        ValueError: If there are fewer patients than parts, or the shares are not positive and add up to 1.
    """
    if len(shares) not in (2, 3) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"Expected two or three positive `fractions` that add up to 1, got {tuple(shares)}.")
    if len(ids) < len(shares):
        raise ValueError(
            f"Expected at least {len(shares)} patients, one for each of {list(SPLITS)[: len(shares)]}, got {len(ids)}. "
            "A split is by patient: bring more patients, or pass fewer `fractions`."
        )
    place, shares = _places(ids, seed), tuple(float(share) for share in shares)
    if stratum is not None:
        return _stratified(place, shares, stratum), SplitRecord(seed, shares, "stratified")
    # every part gets a patient; what the rounding takes is taken from the largest
    sizes = [max(1, round(len(ids) * share)) for share in shares[1:]]
    while sum(sizes) >= len(ids):
        sizes[int(np.argmax(sizes))] -= 1
    ranked, ends = np.sort(place), np.cumsum(sizes)
    # Between two patients, so that a record names the place of neither.
    record = SplitRecord(seed, shares, "hash", tuple(float(cut) for cut in (ranked[ends - 1] + ranked[ends]) / 2))
    parts = record.parts_of(ids)
    assert parts is not None
    return parts, record


def _stratified(place: np.ndarray, shares: tuple[float, ...], stratum: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """Along places sorted within strata, each run of 20 patients is cut in the given shares."""
    label = np.unique(np.asarray(stratum), return_inverse=True)[1]
    order = np.lexsort((place, label))
    block = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(20) + 0.5) / 20)
    # Spread over the block, so that a stratum smaller than a block reaches every part.
    block = block[np.argsort((np.arange(20) * 0.6180339887) % 1, kind="stable")]
    parts = np.empty(len(place), dtype=np.int64)
    parts[order] = np.resize(block, len(place))
    return parts


def split_by_patient(
    notes: datasets.Dataset,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    split_column: str | None = "split",
    *,
    record: SplitRecord | None = None,
) -> datasets.DatasetDict:
    """Split notes so that no patient is in two splits.

    Patients are split by `split_patients`. Where the table brings its own splits in `split_column`, these are kept
    instead. `split_record` tells how.

    Args:
        notes: What `load_notes` returns.
        fractions: Shares of *patients* for train, validation and, if three are given, test; they add up to 1.
        seed: Another seed, another split.
        split_column: Column with the table's own splits (train, validation or tuning, test or held_out), used if it
            exists; None to split anew.
        record: Of a trained model: its patients, shares and seed instead of those above, in any table.

    Returns:
        `train`, `validation` and `test`, each in the order of `notes`.

    Raises:
        ValueError: If a split would be empty, if the table's own splits share a patient, or lack a name we know.
    """
    patient = dense_codes(notes, "patient_id")
    if split_column is not None and split_column in notes.column_names:
        return _own_splits(notes, patient, split_column)
    ids = sorted(column(notes, "patient_id").unique().to_pylist())
    known = None if record is None else record.parts_of(ids)
    # a record that cannot be told from its rule (stratified, or a column) is split anew
    group = split_patients(ids, fractions, seed)[0] if known is None else known
    names = list(SPLITS)[: len(fractions if known is None or record is None else record.shares)]
    parts = {name: notes.select(np.flatnonzero(group[patient] == number)) for number, name in enumerate(names)}
    return _without_overlap(datasets.DatasetDict(parts))


def split_record(
    notes: datasets.Dataset,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    split_column: str | None = "split",
) -> SplitRecord:
    """The record of what `split_by_patient` does with the same arguments."""
    if split_column is not None and split_column in notes.column_names:
        return SplitRecord(seed, tuple(fractions), "column")
    return split_patients(column(notes, "patient_id").unique().to_pylist(), fractions, seed)[1]


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
    seen: dict[str, set[object]] = {
        name: set(column(part, "patient_id").unique().to_pylist()) for name, part in parts.items()
    }
    for one in seen:
        for other in seen:
            shared = len(seen[one] & seen[other])
            if one < other and shared:
                raise ValueError(
                    f"{shared:,} patients have notes both in `{one}` and in `{other}`: what is learnt there would "
                    "leak. Mend the split column, or pass `split_column=None` to split by patient anew."
                )
    return parts
