"""Questions put to frozen embeddings: labelled rows of a table, and their split by patient."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from hf_densefeat.data.splits import SPLITS, SplitRecord, split_patients

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
            patients serve. Without such a column patients are split as `split_by_patient` splits them.
        stratify: split patients by their largest label instead, so that a rare outcome reaches every split. Then the test
            patients are not those of `split_by_patient`, which pretraining left out.
    """

    name: str
    dataset: Any
    label: str
    kind: Kind = "binary"
    patient: str | None = "patient_id"
    text: str = "text"
    split: str = "split"
    stratify: bool = False

    def column(self, table: Any, name: str) -> list:
        """A column of the table, or ValueError with those that there are."""
        if name not in table.column_names:
            raise ValueError(
                f"Probe {self.name!r} needs the column {name!r}; the table has {sorted(table.column_names)}."
            )
        return list(table[name][:])  # a column by itself is read row by row


@dataclass(frozen=True)
class Rows:
    """The labelled rows of a task as arrays.

    Attributes:
        texts: texts, (N,).
        y: label codes or values, (N,).
        patient: patient codes, (N,), numbers of ``ids``.
        split: 0 train, 1 validation, 2 test, (N,).
        classes: the label of each code.
        index: positions in the task's table, (N,).
        unlabelled: rows left out.
        ids: patient ids; for the comparison with a `SplitRecord`, never written anywhere.
    """

    texts: list[str]
    y: np.ndarray
    patient: np.ndarray
    split: np.ndarray
    classes: list
    index: np.ndarray
    unlabelled: int
    ids: list = field(repr=False)


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


def _read(task: ProbeTask) -> tuple[list[Any], list[Any], list[Any], list[int]]:
    """Texts, labels, patients and split codes of all rows; no split codes where the table has none."""
    parts = task.dataset if isinstance(task.dataset, dict) else {None: task.dataset}
    texts: list[Any] = []
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
    return texts, labels, patients, splits


def task_rows(task: ProbeTask, seed: int = 0, split: SplitRecord | None = None) -> Rows:
    """Read a task's table: labelled rows, label codes, patient codes, the split.

    Args:
        task: the task.
        seed: seed of the split, where the table has none and no record is given.
        split: a trained model's record: its test patients are tested on here, in any table.

    Raises:
        ValueError: for a missing column, an unknown split name, a wrong number of classes, patients in two splits,
            or a split without rows (or, for classes, without two classes).
    """
    if task.kind not in PROBE_KINDS:
        raise ValueError(f"Probe {task.name!r}: expected a kind among {PROBE_KINDS} but got {task.kind!r}.")
    texts, labels, patients, splits = _read(task)
    # None or NaN, which is not equal to itself, is no label.
    keep = [i for i, label in enumerate(labels) if label is not None and label == label]
    y, classes = _encoded_labels([labels[i] for i in keep], task)
    for i in keep:
        if not isinstance(texts[i], str) or patients[i] is None:
            column = task.patient if patients[i] is None else task.text
            raise ValueError(f"Probe {task.name!r}: row {i} has a label but nothing in column {column!r}.")
    ids = sorted({patients[i] for i in keep}, key=str)
    codes = {patient: code for code, patient in enumerate(ids)}
    patient = np.array([codes[patients[i]] for i in keep])
    if splits:
        part = np.array([splits[i] for i in keep])
        _refuse_leak(patient, part, task)
        train = part == 0
        if train.any() and not (part == 1).any():
            part[train] = _stratified(patient[train], y[train], ids, task, (0.85, 0.15), seed)
    elif task.stratify:
        part = _stratified(patient, y, ids, task, (0.7, 0.15, 0.15), seed)
    else:
        everybody = sorted({one for one in patients if one is not None}, key=str)
        found = None if split is None else split.parts_of(everybody)
        # Of all patients of the table, labelled or not: these are who pretraining on the table splits.
        of_all = split_patients(everybody, seed=seed)[0] if found is None else found
        part_of = dict(zip(everybody, of_all, strict=True))
        part = np.array([part_of[one] for one in ids])[patient]
    if task.kind != "clustering":
        _refuse_empty(y, part, task)
    return Rows([texts[i] for i in keep], y, patient, part, classes, np.array(keep), len(labels) - len(keep), ids)


def _stratified(
    patient: np.ndarray, y: np.ndarray, ids: list, task: ProbeTask, shares: tuple[float, ...], seed: int
) -> np.ndarray:
    """Split codes of the rows, whole patients each, patients stratified by their largest label code."""
    present, own = np.unique(patient, return_inverse=True)
    stratum = np.zeros(len(present))
    if task.kind != "regression":
        np.maximum.at(stratum, own, y)
    return split_patients([ids[code] for code in present], shares, seed, stratum)[0][own]


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
                f"{len(np.unique(present))} classes. Give more labelled patients or another split, or set stratify=True."
            )


def refuse_trained(rows: Rows, name: str, model: Any) -> None:
    """Refuse test patients that the model was trained on, as far as the split in its config tells.

    Raises:
        ValueError: with their number.
    """
    record = trained_split(model)
    parts = None if record is None else record.parts_of(rows.ids)
    if parts is None:
        return
    test = np.unique(rows.patient[rows.split == 2])
    trained = int((parts[test] == 0).sum())
    if trained:
        raise ValueError(
            f"Probe {name!r}: {trained} of {len(test)} test patients were trained on, by the split that the model's config "
            "records. Split as it does (split=trained_split(model)); or, if these are other patients with the same ids or "
            "you want it so, allow it (allow_trained=True)."
        )


def trained_split(model: Any) -> SplitRecord | None:
    """The record of the patients that a model was trained on, if its config has one."""
    block = getattr(getattr(model, "config", None), "densefeat", None) or {}
    return SplitRecord.from_dict(block["split"]) if block.get("split") else None
