"""Questions put to frozen embeddings: labelled rows of a table, and their split by patient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from hf_densefeat.data.splits import SPLITS

Kind = Literal["binary", "multiclass", "regression", "clustering"]
PROBE_KINDS = get_args(Kind)
SPLIT_CODES = {alias: code for code, aliases in enumerate(SPLITS.values()) for alias in aliases}


@dataclass(frozen=True)
class ProbeTask:
    """A question put to frozen embeddings: one label column of one table of texts.

    Attributes:
        name: prefix of the metric names.
        dataset: a `datasets.Dataset`, or a mapping of split names to such (a `DatasetDict`).
        label: label column. Rows without a label are left out and counted.
        kind: ``binary`` (two values; the larger one is the positive class), ``multiclass``, ``regression``,
            ``clustering`` (k-means of all labelled rows, k = number of classes; nothing is trained).
        patient: patient column; splits and bootstrap keep a patient's rows together. None where every row is a
            patient.
        text: text column.
        split: column of a given split; used if the table has it. Its values, like the keys of a mapping, are train,
            validation (valid, val, dev, tuning) and test (held_out). Without validation rows, 15 in 85 of the training
            patients serve.
    """

    name: str
    dataset: Any
    label: str
    kind: Kind = "binary"
    patient: str | None = "patient_id"
    text: str = "text"
    split: str = "split"

    def column(self, table: Any, name: str) -> list:
        """A column of the table, or ValueError with those that there are."""
        if name not in table.column_names:
            raise ValueError(
                f"Probe {self.name!r} needs the column {name!r}; the table has {sorted(table.column_names)}."
            )
        return list(table[name][:])  # a column by itself is read row by row


@dataclass(frozen=True)
class Rows:
    """The labelled rows of a task as arrays: texts, label codes or values, patient codes, split codes 0/1/2."""

    texts: list[str]
    y: np.ndarray
    patient: np.ndarray
    split: np.ndarray
    classes: list
    index: np.ndarray
    unlabelled: int


def _split_code(name: Any, task: ProbeTask) -> int:
    if str(name) not in SPLIT_CODES:
        raise ValueError(f"Probe {task.name!r}: expected split names among {sorted(SPLIT_CODES)} but got {name!r}.")
    return SPLIT_CODES[str(name)]


def _encoded_labels(labels: list, task: ProbeTask) -> tuple[np.ndarray, list]:
    if task.kind == "regression":
        values = np.asarray(labels, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"Probe {task.name!r}: column {task.label!r} holds infinite values.")
        return values, []
    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    if len(classes) < 2 or (task.kind == "binary" and len(classes) > 2):
        raise ValueError(
            f"Probe {task.name!r}: column {task.label!r} has {len(classes)} different values, "
            f"{'exactly two' if task.kind == 'binary' else 'at least two'} are needed for kind={task.kind!r}."
        )
    return y, classes.tolist()


def task_rows(task: ProbeTask, seed: int = 0) -> Rows:
    """Read a task's table: labelled rows, label codes, patient codes, the split.

    Raises:
        ValueError: for a missing column, an unknown split name, a wrong number of classes, patients in two splits,
            or a split without rows (or, for classes, without two classes).
    """
    if task.kind not in PROBE_KINDS:
        raise ValueError(f"Probe {task.name!r}: expected a kind among {PROBE_KINDS} but got {task.kind!r}.")
    parts = task.dataset if isinstance(task.dataset, dict) else {None: task.dataset}
    texts: list[str] = []
    labels: list[Any] = []
    patients: list[Any] = []
    splits: list[int] = []
    for name, table in parts.items():
        texts += task.column(table, task.text)
        labels += task.column(table, task.label)
        alone = ((name, i) for i in range(len(table)))
        patients += list(alone) if task.patient is None else task.column(table, task.patient)
        if name is not None:
            splits += [_split_code(name, task)] * len(table)
        elif task.split in table.column_names:
            splits += [_split_code(value, task) for value in task.column(table, task.split)]
    keep = [i for i, label in enumerate(labels) if label is not None and label == label]
    y, classes = _encoded_labels([labels[i] for i in keep], task)
    for i in keep:
        if not isinstance(texts[i], str) or patients[i] is None:
            column = task.patient if patients[i] is None else task.text
            raise ValueError(f"Probe {task.name!r}: row {i} has a label but nothing in column {column!r}.")
    codes = {patient: code for code, patient in enumerate(sorted({patients[i] for i in keep}, key=str))}
    patient = np.array([codes[patients[i]] for i in keep])
    if splits:
        split = np.array([splits[i] for i in keep])
        _refuse_leak(patient, split, task)
        train = split == 0
        if train.any() and not (split == 1).any():
            split[train] = np.where(split_patients(patient[train], y[train], task.kind, (0.85, 0.15), seed) == 1, 1, 0)
    else:
        split = split_patients(patient, y, task.kind, (0.7, 0.15, 0.15), seed)
    if task.kind != "clustering":
        _refuse_empty(y, split, task)
    return Rows([texts[i] for i in keep], y, patient, split, classes, np.array(keep), len(labels) - len(keep))


def _refuse_leak(patient: np.ndarray, split: np.ndarray, task: ProbeTask) -> None:
    seen = np.zeros((patient.max() + 1, 3), dtype=bool)
    seen[patient, split] = True
    shared = seen.sum(1) > 1
    if shared.any():
        row = int(np.flatnonzero(shared[patient])[0])
        raise ValueError(
            f"Probe {task.name!r}: {int(shared.sum())} patients have rows in more than one split (first such: "
            f"labelled row {row}). Split by patient, or drop the column {task.split!r} and have it split here."
        )


def _refuse_empty(y: np.ndarray, split: np.ndarray, task: ProbeTask) -> None:
    for code, name in enumerate(("train", "validation", "test")):
        present = y[split == code]
        if len(present) == 0 or (task.kind != "regression" and len(np.unique(present)) < 2):
            raise ValueError(
                f"Probe {task.name!r}: the {name} split has {len(present)} labelled rows of "
                f"{len(np.unique(present))} classes. More labelled patients, or another split, are needed."
            )


def split_patients(
    patient: np.ndarray, y: np.ndarray, kind: Kind, fractions: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0
) -> np.ndarray:
    """Split codes 0, 1, … of the rows, whole patients each, in the given fractions.

    For classes, patients are stratified by their largest label code, so that a rare outcome reaches every split.
    """
    count = patient.max() + 1
    stratum = np.zeros(count)
    if kind != "regression":
        np.maximum.at(stratum, patient, y)
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    order = order[np.argsort(stratum[order], kind="stable")]
    # Along this order each block of 20 patients is cut in the given fractions.
    block = np.searchsorted(np.cumsum(fractions)[:-1], (np.arange(20) + 0.5) / 20)
    drawn = np.concatenate([rng.permutation(block) for _ in range(-(-count // 20))])[:count]
    code = np.empty(count, dtype=np.int64)
    code[order] = drawn
    present = np.isin(np.arange(count), patient)
    return np.where(present, code, 0)[patient]
