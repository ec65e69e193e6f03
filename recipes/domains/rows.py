"""Rows of a domain's table: columns, splits, samples, and the probes on them."""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import datasets
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_densefeat import ProbeTask, SimilarityTask
from hf_densefeat.data.columns import column

ENCODED = {"train": 2200, "validation": 800}  # rows at random of each split; of test patients all
COHORT_KINDS = ("ambulatory", "wellness", "emergency")


def training(learning_rate: float = 1e-3) -> dict:
    """Options of `DenseTrainingArguments` that every method of a domain has."""
    return {
        "per_device_train_batch_size": 32,
        "learning_rate": learning_rate,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "subspace_dim": 20,
    }


def values_of(episodes: datasets.Dataset, name: str) -> list:
    """A column, read in one go."""
    return column(episodes, name).to_pylist()


def rows_with(episodes: datasets.Dataset, name: str, value) -> datasets.Dataset:
    """The rows with this value."""
    return episodes.select([i for i, found in enumerate(values_of(episodes, name)) if found == value])


def resplit(episodes: datasets.Dataset, split: list[str | None]) -> datasets.Dataset:
    """The rows that have a split, with it."""
    rows = [i for i, part in enumerate(split) if part]
    return episodes.select(rows).remove_columns("split").add_column("split", [split[i] for i in rows])


def split_apart(texts: Sequence[str], groups: Sequence[str], near: float = 0.8) -> list[str]:
    """The part of each row, 60 % of groups in train, 15 in validation, 25 in test; groups that share a near-copy together.

    Near-copies have a cosine above `near` between their TF-IDF of words and of pairs of words.
    """
    ids, code = np.unique(np.array(groups, dtype=object), return_inverse=True)
    counted = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit_transform(texts)
    close = (counted @ counted.T).tocoo()
    close = [code[side[close.data > near]] for side in (close.row, close.col)]
    together = csr_array((np.ones(len(close[0])), tuple(close)), shape=(len(ids), len(ids)))
    block = connected_components(together, directed=False)[1]
    name = dict(zip(block[::-1], ids[::-1], strict=True))  # a block is named by its first group
    # by a hash of the name, so that the split is the same whatever the package does with ids
    ranked = sorted(name, key=lambda one: blake2b(f"0:{name[one]}".encode(), digest_size=8).digest())
    held_out = ["validation"] * round(0.15 * len(ranked)) + ["test"] * round(0.25 * len(ranked))
    part = dict(zip(ranked, held_out + ["train"] * (len(ranked) - len(held_out)), strict=True))
    return [part[block[one]] for one in code]


def frequent(labels: list[str | None], least: int = 30) -> list[str | None]:
    """The labels that so many rows have; None in the place of the others."""
    count = Counter(labels)
    return [label if label and count[label] >= least else None for label in labels]


def standardised(values: list[float | None], split: list[str]) -> list[float | None]:
    """In standard deviations of the training rows: RMSE 1 is a constant."""
    values = np.array(values, dtype=float)
    known = np.isfinite(values)
    train = (np.array(split) == "train") & known
    found = (values - values[train].mean()) / values[train].std()
    return [value if there else None for value, there in zip(found.tolist(), known, strict=True)]


def with_cohort_labels(rows: datasets.Dataset) -> datasets.Dataset:
    """The bundled cohort's rows with the age in standard deviations, and the frequent kinds of visit."""
    rows = rows.add_column("age_sd", standardised(values_of(rows, "age"), values_of(rows, "split")))
    return rows.add_column("kind", [kind if kind in COHORT_KINDS else None for kind in values_of(rows, "note_type")])


def sample(rows: datasets.Dataset) -> datasets.Dataset:
    """What is encoded: some rows of training and validation patients, and all of the test patients'."""
    split, rng = np.array(values_of(rows, "split")), np.random.default_rng(0)
    kept = [rng.permutation(np.flatnonzero(split == name))[:most] for name, most in ENCODED.items()]
    return rows.select(np.sort(np.concatenate([*kept, np.flatnonzero(split == "test")])))


def balanced(episodes: datasets.Dataset, label: str, most: int) -> datasets.Dataset:
    """Up to so many held-out rows of each class that has half as many: k-means is for classes of like size."""
    values, rng, rows = np.array(values_of(episodes, label), dtype=object), np.random.default_rng(0), []
    held_out = np.array(values_of(episodes, "split")) == "test"
    for kind in sorted({value for value in values if value is not None}):
        own = rng.permutation(np.flatnonzero((values == kind) & held_out))[:most]
        rows += own.tolist() if len(own) >= most / 2 else []
    return episodes.select(sorted(rows)).select_columns(["patient_id", "text", label])


def task(episodes: datasets.Dataset, label: str, kind: str, name: str | None = None) -> ProbeTask:
    """A probe on the rows that have the label."""
    columns = ["patient_id", "text", "split", label]
    return ProbeTask(name or label, episodes.select_columns(columns), label, kind)


def own_similarity(
    rows: datasets.Dataset, labels: list[str], labelled: datasets.Dataset | None = None
) -> list[SimilarityTask]:
    """A patient's own rows among everybody's; each label among the nearest rows of other patients, in clusters, from few.

    Args:
        rows: of test patients.
        labels: columns.
        labelled: the rows that labels are asked of; None for all.
    """
    tasks = [SimilarityTask(name="own notes", kind="same_patient", notes=rows)]
    asked = rows if labelled is None else labelled
    for label in labels:
        for name, kind in (("", "neighbours"), (", clusters", "clusters"), (", few labels", "few_labels")):
            tasks.append(SimilarityTask(name=label + name, kind=kind, notes=asked, label=label))
    return tasks
