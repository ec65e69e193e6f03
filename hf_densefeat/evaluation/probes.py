"""What a frozen encoder knows: linear probes with intervals over patients, after EHRSHOT's protocol.

Embeddings are computed once. Rows are split by patient 70/15/15 (or as given); features are standardised on the
training rows; the regularisation is chosen on the validation rows; the test rows are used once, for the numbers.
Intervals are the 2.5 and 97.5 percentiles of bootstrap replicates that redraw *patients*, never rows.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sklearn.cluster import KMeans

from hf_densefeat.data.splits import SplitRecord
from hf_densefeat.evaluation.evaluator import Evaluator
from hf_densefeat.evaluation.linear import ALPHAS, CS, Rows, fit_path, predict
from hf_densefeat.evaluation.metrics import (
    METRICS_OF,
    Estimate,
    PatientWeights,
    best_threshold,
    class_auroc,
    metrics_of,
    replicate,
)
from hf_densefeat.evaluation.tasks import Kind, ProbeTask, task_rows

logger = logging.getLogger(__name__)

SHOTS = (1, 2, 4, 8, 16, 32, 64, 128)


# ---------------------------------------------------------------------------------------------- one probe, its result


@dataclass(frozen=True)
class ProbeResult:
    """What one probe found on its test rows.

    Attributes:
        kind: the task's kind.
        metrics: metric name to `Estimate`.
        replicates: metric name to the bootstrap values (B,), replicate b redrawing the same patients for any encoder.
        rows: row counts: train, validation, test, unlabelled; ``patients`` in the test rows; where there are such,
            ``classes_without_training_rows`` of the test rows, whose AUROC is that of a guess.
        strength: the C, or the ridge penalty per row, that the validation rows chose; None for clustering.
        shots: k to the AUROC `Estimate` with k rows of each class, mean over the draws.
        test_index: position of the test rows in the task's table.
        y: their label codes or values.
        output: probabilities (N, K), predictions (N,) or clusters (N,).
        threshold: the validation rows' threshold for macro-F1 (binary).
        patient: patient codes of the test rows.
    """

    kind: Kind
    metrics: dict[str, Estimate]
    replicates: dict[str, np.ndarray] = field(repr=False)
    rows: dict[str, int]
    strength: float | None
    shots: dict[int, Estimate]
    test_index: np.ndarray = field(repr=False)
    y: np.ndarray = field(repr=False)
    output: np.ndarray = field(repr=False)
    threshold: float
    patient: np.ndarray = field(repr=False)


def _chosen(features: Rows, path: np.ndarray, y: np.ndarray, kind: Kind) -> int:
    """Index into the path of the best RMSE or AUROC on the validation rows; log-loss decides between equal AUROCs."""
    outputs = [predict(features, w, kind) for w in path]
    if kind == "regression":
        return int(np.argmin([np.mean((y - output) ** 2) for output in outputs]))
    one, rows = np.ones((1, len(y))), np.arange(len(y))
    area = [np.nan_to_num(class_auroc(y, output, one)[0]) for output in outputs]
    # probabilities of 0 would make the loss of one row decide
    loss = [-np.log(np.maximum(output[rows, y], 1e-12)).mean() for output in outputs]
    # areas that differ by rounding are equal
    return int(np.lexsort((loss, -np.round(area, 9)))[0])


def _nested_shots(y: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of each class in a random order; the first k are the k-shot sample, so samples are nested."""
    return [rng.permutation(rows[y[rows] == c]) for c in np.unique(y[rows])]


@dataclass(frozen=True)
class _Fitted:
    """A fitted probe: positions of its test rows, their output, the chosen strength and threshold."""

    test: np.ndarray
    output: np.ndarray
    strength: float | None = None
    threshold: float = 0.5


def _fitted(z: Rows, y: np.ndarray, split: np.ndarray, kind: Kind, classes: int) -> _Fitted:
    """Fit every strength on the training rows, choose on the validation rows, predict the test rows."""
    train, validation, test = (np.flatnonzero(split == code) for code in range(3))
    standard, path = fit_path(z[train], y[train], kind, classes)
    features = standard(z[validation])
    best = _chosen(features, path, y[validation], kind)
    output = predict(standard(z[test]), path[best], kind)
    strength = (ALPHAS if kind == "regression" else CS)[best]
    if kind != "binary":
        return _Fitted(test, output, strength)
    return _Fitted(test, output, strength, best_threshold(y[validation], predict(features, path[best], kind)[:, 1]))


def _shot_curve(
    z: Rows,
    y: np.ndarray,
    split: np.ndarray,
    kind: Kind,
    weights: PatientWeights,
    *,
    shots: Sequence[int],
    draws: int,
    seed: int,
) -> dict[int, Estimate]:
    """AUROC with k training and k validation rows of each class, mean over the draws."""
    classes, y_test = int(y.max()) + 1, y[split == 2]
    outputs: dict[int, list[np.ndarray]] = {}
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        train, validation = (_nested_shots(y, np.flatnonzero(split == code), rng) for code in (0, 1))
        for k in shots:
            if k > max(len(rows) for rows in train):
                continue
            t, v = (np.concatenate([rows[:k] for rows in side]) for side in (train, validation))
            # The same fit as with all rows: only who trains and who validates differs.
            few = np.full(len(y), -1)
            few[t], few[v], few[split == 2] = 0, 1, 2
            outputs.setdefault(k, []).append(_fitted(z, y, few, kind, classes).output)
    one, curve = np.ones((1, len(y_test))), {}
    for k, found in outputs.items():
        drawn = np.mean([replicate(class_auroc, y_test, output, weights) for output in found], axis=0)
        curve[k] = Estimate.of(np.mean([class_auroc(y_test, output, one)[0] for output in found]), drawn)
    return curve


def probe(
    z: Rows,
    y: np.ndarray,
    patient: np.ndarray,
    split: np.ndarray,
    kind: Kind,
    *,
    bootstraps: int = 1000,
    shots: Sequence[int] = (),
    draws: int = 3,
    seed: int = 0,
) -> ProbeResult:
    """One probe on embeddings (N, d): ridge, logistic regression or k-means, and its metrics on the test rows.

    Args:
        z: embeddings (N, d), or words as a sparse matrix, which is not standardised.
        y: label codes 0, 1, … (int) or values (float), (N,).
        patient: patient codes (N,).
        split: 0 train, 1 validation, 2 test, (N,). Clustering takes all rows.
        kind: see `ProbeTask`.
        bootstraps: replicates over patients; 0 for none.
        shots: k of the few-shot curve (classes only): k training and k validation rows of each class, or all that a
            class has; EHRSHOT's nested samples, without its oversampling.
        draws: random draws of the few-shot samples.
        seed: seed of k-means, samples and bootstrap.

    Raises:
        ValueError: for embeddings that are not finite.
    """
    if not np.isfinite(z if isinstance(z, np.ndarray) else z.data).all():
        raise ValueError("Expected finite embeddings but got NaN or infinity; has the encoder diverged?")
    rows = {name: int((split == code).sum()) for code, name in enumerate(("train", "validation", "test"))}
    if kind == "clustering":
        rows = {"train": 0, "validation": 0, "test": len(y)}
        clusters = KMeans(int(y.max()) + 1, n_init=10, random_state=seed).fit_predict(z)
        fitted = _Fitted(np.arange(len(y)), clusters)
    else:
        fitted = _fitted(z, y, split, kind, int(y.max()) + 1 if kind != "regression" else 0)
        untrained = np.setdiff1d(y[split == 2], y[split == 0]) if kind == "multiclass" else ()
        rows |= {"classes_without_training_rows": len(untrained)} if len(untrained) else {}
    # weight 1 for the value itself, and a row of weights for each redraw of the patients
    ours, owners, one = y[fitted.test], patient[fitted.test], np.ones((1, len(fitted.test)))
    weights = PatientWeights.of(owners, bootstraps, seed)
    metrics = metrics_of(kind, fitted.threshold)
    drawn = {name: replicate(metric, ours, fitted.output, weights) for name, metric in metrics.items()}
    curve = {}
    if shots and kind in ("binary", "multiclass"):
        curve = _shot_curve(z, y, split, kind, weights, shots=shots, draws=draws, seed=seed)
    return ProbeResult(
        kind=kind,
        metrics={name: Estimate.of(f(ours, fitted.output, one)[0], drawn[name]) for name, f in metrics.items()},
        replicates=drawn,
        rows=rows | {"patients": len(np.unique(owners))},
        strength=fitted.strength,
        shots=curve,
        test_index=fitted.test,
        y=ours,
        output=fitted.output,
        threshold=fitted.threshold,
        patient=owners,
    )


def meds_predictions(task: ProbeTask, result: ProbeResult, time: str = "time") -> pa.Table:
    """The test rows' predictions in the schema of meds-evaluation, one row a prediction. It holds patient ids.

    Columns: ``subject_id`` int64, ``prediction_time`` timestamp[us], ``boolean_value``, ``predicted_boolean_value``
    (at the validation rows' threshold), ``predicted_boolean_probability`` float32.

    Raises:
        ValueError: if the task is not binary, comes as a mapping of splits, or lacks integer patients or the time.
    """
    if task.kind != "binary" or isinstance(task.dataset, dict) or task.patient is None:
        raise ValueError(
            f"Probe {task.name!r}: MEDS predictions need a binary task on one table with a patient column."
        )
    columns = [np.asarray(task.column(task.dataset, name)) for name in (task.patient, time)]
    patients, times = (column[result.test_index] for column in columns)
    if patients.dtype.kind not in "iu":
        raise ValueError(f"Probe {task.name!r}: MEDS subject ids are integers; the column {task.patient!r} is not.")
    return pa.table(
        {
            "subject_id": pa.array(patients, pa.int64()),
            "prediction_time": pa.array(times.astype("datetime64[us]")),
            "boolean_value": pa.array(result.y == 1),
            "predicted_boolean_value": pa.array(result.output[:, 1] >= result.threshold),
            "predicted_boolean_probability": pa.array(result.output[:, 1], pa.float32()),
        }
    )


# ----------------------------------------------------------------------------------------------------- the evaluator


class ProbeEvaluator(Evaluator):
    """Probes of one encoder after another, on tasks that are read once.

    Called as ``evaluator(model, tokenizer)`` it gives flat numbers (``mortalityclass_auroc``) for a trainer's log and
    ``metric_for_best_model``; `evaluate` gives intervals, replicates and few-shot curves.
    """

    what = "probe"

    def __init__(
        self,
        tasks: Sequence[ProbeTask],
        *,
        bootstraps: int = 1000,
        shots: Sequence[int] = (),
        batch_size: int = 32,
        max_length: int | None = None,
        cache: str | Path | bool = True,
        seed: int = 0,
        record: SplitRecord | None = None,
        allow_trained: bool = False,
    ) -> None:
        """Read the tasks' tables and split them; nothing is encoded yet.

        Args:
            tasks: the `ProbeTask`s; names must differ.
            bootstraps: replicates of `evaluate`.
            shots: k of the few-shot curves of `evaluate`; none by default.
            batch_size: passed to ``encode``.
            max_length: passed to ``encode`` where it takes it.
            cache: disk cache of `evaluate`, see `embed`.
            seed: seed of splits, k-means, samples and bootstrap.
            record: of a trained model, or of several (`a | b`): nobody whom it names is tested.
            allow_trained: test on patients that the model was trained on, instead of refusing them by their number.

        Raises:
            ValueError: for tasks that cannot be split or read, see `task_rows`; before any encoding.
        """
        super().__init__(
            tasks,
            headline=METRICS_OF.get(tasks[0].kind, METRICS_OF["binary"])[0] if tasks else "auroc",
            bootstraps=bootstraps,
            batch_size=batch_size,
            max_length=max_length,
            cache=cache,
            seed=seed,
            allow_trained=allow_trained,
        )
        self.shots = shots
        self.rows = {task.name: task_rows(task, seed, record, allow_trained=allow_trained) for task in tasks}
        for name, rows in self.rows.items():
            if rows.unlabelled:
                logger.info("Probe %s: %d rows without a label are left out.", name, rows.unlabelled)

    def _measured(
        self, model: Any, tokenizer: Any, cache: str | Path | bool, bootstraps: int, shots: Sequence[int] = ()
    ) -> dict[str, ProbeResult]:
        z, found = self._embedded(model, tokenizer, cache), {}
        for task in self.tasks:
            rows = self.rows[task.name]
            how: dict[str, Any] = {"bootstraps": bootstraps, "shots": shots, "seed": self.seed}
            result = probe(z[task.name][0], rows.y, rows.patient, rows.split, task.kind, **how)
            result.rows["unlabelled"] = rows.unlabelled
            # from rows that have a label to rows of the table
            result.test_index[:] = rows.index[result.test_index]
            found[task.name] = result
        return found

    def evaluate(self, model: Any, tokenizer: Any = None) -> dict[str, ProbeResult]:
        """Task name to `ProbeResult` with bootstrap intervals; embeddings come from the cache where they are there."""
        return self._measured(model, tokenizer, self.cache, self.bootstraps, self.shots)
