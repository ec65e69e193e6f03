"""Questions put to frozen embeddings: labelled rows of a table, and their split by patient."""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from hf_densefeat.data.columns import shown
from hf_densefeat.data.identity import identities
from hf_densefeat.data.splits import SplitRecord, parts_in_table, parts_of_patients

logger = logging.getLogger(__name__)

Kind = Literal["binary", "multiclass", "regression", "clustering"]
PROBE_KINDS = get_args(Kind)


@dataclass(frozen=True)
class ProbeTask:
    """A question put to frozen embeddings: one label column of one table of texts.

    Attributes:
        name: prefix of the metric names.
        dataset: a `datasets.Dataset`, or a mapping of split names to such (a `DatasetDict`).
        label: label column. Rows without a label are left out and counted.
        kind: ``binary`` (two values; the larger one is the positive class), ``multiclass``, ``regression``,
            ``clustering`` (k-means of all labelled rows, k = number of classes; nothing is trained; with the record of a
            model, of the test rows).
        patient: patient column; splits and bootstrap keep a patient's rows together. None where every row is a
            patient.
        text: text column.
        split: column of a given split; used if the table has it. Its values, like the keys of a mapping, are train,
            validation (valid, val, dev, tuning) and test (held_out). Without validation rows, 15 in 85 of the training
            patients serve. Without such a column patients are split as `split_by_patient` splits them.
        stratify: split patients by their largest label instead, so that a rare outcome reaches every split.
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
                f"Probe {self.name!r} needs the column {name!r}; the table has {shown(table.column_names)}."
            )
        return list(table[name][:])  # a column by itself is read row by row


@dataclass(frozen=True)
class ProbeRows:
    """The labelled rows of a task as arrays."""

    texts: list[str]
    y: np.ndarray  # label codes or values, (N,)
    patient: np.ndarray  # patient codes, (N,)
    split: np.ndarray  # 0 train, 1 validation, 2 test, (N,)
    classes: list  # the label of each code
    index: np.ndarray  # positions in the task's table, (N,)
    left_out: dict[str, int]  # rows left out, by reason
    # Ids of the patients of the test rows, or of all rows that are clustered; none where the table has no patients. For the
    # comparison with a `SplitRecord`, never written anywhere.
    tested: list = field(repr=False)
    queries: tuple[str, ...] = ()  # none: a probe asks an encoder for nothing but the texts


def _encoded_labels(labels: list, task: ProbeTask) -> tuple[np.ndarray, list]:
    if task.kind == "regression":
        try:
            values = np.asarray(labels, dtype=np.float64)
        except (ValueError, TypeError):  # whose message quotes the label
            raise ValueError(f"Probe {task.name!r}: column {task.label!r} does not hold numbers alone.") from None
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


def _read(task: ProbeTask) -> tuple[list, list, list, list]:
    """Texts, labels, patients ("" for none) and splits of all rows; no splits where the table has none."""
    parts = task.dataset if isinstance(task.dataset, dict) else {None: task.dataset}
    texts, labels, patients, splits = list[Any](), list[Any](), list[Any](), list[Any]()
    for name, table in parts.items():
        texts += task.column(table, task.text)
        labels += task.column(table, task.label)
        if task.patient is not None:
            # in one form and type in all tables of a mapping
            ids = identities(task.column(table, task.patient)).to_pylist()
            patients += ["" if one is None else str(one) for one in ids]
        if name is not None:
            splits += [name] * len(table)
        elif task.split in table.column_names:
            splits += task.column(table, task.split)
    return texts, labels, patients or [str(row) for row in range(len(texts))], splits


def task_rows(
    task: ProbeTask, *, seed: int = 0, record: SplitRecord | None = None, allow_trained: bool = False
) -> ProbeRows:
    """Read a task's table: labelled rows, label codes, patient codes, the split.

    With the record of a trained model nobody whom it was trained on is tested, in any table (see `parts_of_patients`), unless
    ``allow_trained`` keeps the table's own split.

    Raises:
        ValueError: for a missing column, an unknown split name, a wrong number of classes, patients in two splits,
            or a split without rows (or, for classes, without two classes), or that tests who was trained on.
    """
    if task.kind not in PROBE_KINDS:
        raise ValueError(f"Probe {task.name!r}: expected a kind among {PROBE_KINDS} but got {task.kind!r}.")
    texts, labels, patients, splits = _read(task)
    # None or NaN, which is not equal to itself, is no label.
    chosen = np.array([i for i, label in enumerate(labels) if label is not None and label == label], dtype=np.int64)
    y, classes = _encoded_labels([labels[i] for i in chosen], task)
    for i in chosen:
        if not isinstance(texts[i], str) or not patients[i]:
            column = task.text if patients[i] else task.patient
            raise ValueError(f"Probe {task.name!r}: row {i} has a label but nothing in column {column!r}.")
    # Of all patients of the table, labelled or not: these are who pretraining on the table splits.
    everybody, code = np.unique(np.array(patients, dtype=object), return_inverse=True)
    present, patient = np.unique(code[chosen], return_inverse=True)
    ids = everybody[present].tolist()
    if task.patient is None and record is not None:
        logger.warning(
            "Probe %s: its table has no patients, so nobody can say whom the model was trained on.", task.name
        )
    how: dict[str, Any] = {"seed": seed, "allow_trained": allow_trained, "table": f"probe {task.name!r}"}
    how["record"] = record if task.patient is not None else None
    if splits:
        given = parts_in_table(splits, chosen, patient, f"Probe {task.name!r}, its splits")
        of_patient = parts_of_patients(ids, given, **how)
        train = np.flatnonzero(of_patient == 0)
        if len(train) and not (of_patient == 1).any():
            stratum = _largest_label(patient, y, task)[train]
            trained = [ids[i] for i in train]
            of_patient[train] = parts_of_patients(trained, shares=(0.85, 0.15), seed=seed, stratum=stratum)
    elif task.stratify:
        of_patient = parts_of_patients(ids, stratum=_largest_label(patient, y, task), **how)
    else:
        named = everybody[everybody != ""]
        of_patient = parts_of_patients(named, **how)[np.searchsorted(named, ids)]
    part, left_out = of_patient[patient], {"unlabelled": len(labels) - len(chosen)}
    if task.kind != "clustering":
        _refuse_empty(y, part, task)
    elif record is not None and not allow_trained:  # all rows are clustered, so they must be those of the test
        chosen, y, patient, part = (some[part == 2] for some in (chosen, y, patient, part))
    tested = patient if task.kind == "clustering" else patient[part == 2]
    who = [] if task.patient is None else [ids[one] for one in np.unique(tested)]
    return ProbeRows([texts[i] for i in chosen], y, patient, part, classes, chosen, left_out, who)


def _largest_label(patient: np.ndarray, y: np.ndarray, task: ProbeTask) -> np.ndarray:
    """The largest label code of each patient, by which patients are stratified; one stratum for numbers."""
    stratum = np.zeros(int(patient.max()) + 1)
    if task.kind != "regression":
        np.maximum.at(stratum, patient, y)
    return stratum


def _refuse_empty(y: np.ndarray, split: np.ndarray, task: ProbeTask) -> None:
    for code, name in enumerate(("train", "validation", "test")):
        present, needed = y[split == code], 1 if task.kind == "regression" else 2
        if len(np.unique(present)) < needed:
            raise ValueError(
                f"Probe {task.name!r}: the {name} split has {len(present)} labelled rows of "
                f"{len(np.unique(present))} classes. Give more labelled patients or another split, or set stratify=True."
            )
