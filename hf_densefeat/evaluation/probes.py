"""What a frozen encoder knows: linear probes with intervals over patients, after EHRSHOT's protocol.

Embeddings are computed once. Rows are split by patient 70/15/15 (or as given); features are standardised on the
training rows; the regularisation is chosen on the validation rows; the test rows are used once, for the numbers.
Intervals are the 2.5 and 97.5 percentiles of bootstrap replicates that redraw *patients*, never rows.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import softmax
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from hf_densefeat.data.splits import SplitRecord
from hf_densefeat.evaluation.evaluator import Evaluator
from hf_densefeat.evaluation.metrics import (
    PROBES,
    Estimate,
    Metric,
    PatientWeights,
    Result,
    best_threshold,
    class_auroc,
    estimated,
    macro_f1_at,
    plain,
    replicate,
)
from hf_densefeat.evaluation.ranking import Rows
from hf_densefeat.evaluation.tasks import Kind, ProbeRows, ProbeTask, task_rows

SHOTS = (1, 2, 4, 8, 16, 32, 64, 128)


# ---- Fits at every strength ------------------------------------------------------------------------------------------

# EHRSHOT's thirteen strengths; weakest penalty last, so that each fit starts from the one before.
CS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
# Ridge penalties per training row.
ALPHAS = tuple(float(10.0**power) for power in np.arange(-6, 3.5, 0.5))


def ridge_path(rows: Rows, y: np.ndarray, alphas: Sequence[float] = ALPHAS) -> np.ndarray:
    """Coefficients (alphas, d + 1, 1) of ``min ‖y - X w - b‖² + N a ‖w‖²``, a > 0; the intercept b is last.

    `sklearn.linear_model.Ridge(alpha=N * a)` of each a: as a penalty a target, so that ``XᵀX`` is summed once.
    """
    fit = Ridge(alpha=len(y) * np.asarray(alphas)).fit(rows, np.tile(y[:, None], len(alphas)))
    return np.column_stack([fit.coef_, fit.intercept_])[:, :, None]


def logistic_path(rows: Rows, y: np.ndarray, classes: int) -> np.ndarray:
    """Coefficients (strengths, d + 1, classes) of L2 logistic regression for each C of `CS`; the intercept is last.

    `sklearn.linear_model.LogisticRegression(C=c)`, the softmax of whose logits gives the probabilities, each C from the
    solution of the one before. A class without a row gets the probability 0. L-BFGS ends where the gradient is small:
    where classes can be separated, solutions of C above about 100 stay near the one before, which leaves the best
    validation loss of the path as it is.
    """
    model, present, kept = LogisticRegression(warm_start=True, max_iter=400), np.unique(y), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for c in CS:
            model.set_params(C=c).fit(rows, y)
            kept.append(np.vstack([model.coef_.T, model.intercept_]).astype(np.float64))
    found = np.stack(kept)
    if len(present) == 2:  # scikit-learn has the log-odds of the second class alone
        found = np.concatenate([np.zeros_like(found), found], axis=2)
    path = np.zeros((*found.shape[:2], classes))
    path[:, -1] = -np.inf
    path[:, :, present] = found
    return path


def fit_path(x: Rows, y: np.ndarray, kind: str, classes: int) -> tuple[Callable[[Rows], Rows], np.ndarray]:
    """The standardisation that rows are to pass before `predict`, and coefficients (strengths, d + 1, outputs).

    Dense columns are standardised by the training rows; sparse ones are used as they are, since a mean would fill them
    and TF-IDF has its scale.
    """
    if isinstance(x, np.ndarray):
        dtype = np.float64 if kind == "regression" else np.float32
        scaler = StandardScaler().fit(x.astype(dtype))

    def standard(rows: Rows) -> Rows:
        return scaler.transform(rows.astype(dtype)) if isinstance(rows, np.ndarray) else rows

    return standard, ridge_path(standard(x), y) if kind == "regression" else logistic_path(standard(x), y, classes)


def predict(features: Rows, w: np.ndarray, kind: str) -> np.ndarray:
    """Predictions (N,) of a regression, or probabilities (N, classes), at the coefficients (d + 1, outputs)."""
    outputs = (features @ w[:-1].astype(features.dtype)).astype(np.float64) + w[-1]
    return outputs[:, 0] if kind == "regression" else softmax(outputs, axis=1)


# ---- The protocol ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Result):
    """What one probe found on its test rows; of their classes without training rows the AUROC is that of a guess."""

    strength: float | None  # the C, or the ridge penalty per row, that the validation rows chose; None for clustering
    shots: dict[int, Estimate]  # k to the AUROC with k rows of each class, mean over the draws
    test_index: np.ndarray = field(repr=False)  # positions of the test rows in the task's table
    output: np.ndarray = field(repr=False)  # probabilities (N, K), predictions (N,) or clusters (N,)
    threshold: float  # of the validation rows, for macro-F1 (binary)


def _chosen(outputs: list[np.ndarray], y: np.ndarray, kind: Kind) -> int:
    """Index of the best RMSE or AUROC on the validation rows; log-loss decides between equal AUROCs."""
    if kind == "regression":
        return int(np.argmin([np.mean((y - output) ** 2) for output in outputs]))
    area = [np.nan_to_num(plain(class_auroc, y, output)) for output in outputs]
    # probabilities of 0 would make the loss of one row decide
    loss = [-np.log(np.maximum(output[np.arange(len(y)), y], 1e-12)).mean() for output in outputs]
    # areas that differ by rounding are equal
    return int(np.lexsort((loss, -np.round(area, 9)))[0])


def _fitted(z: Rows, y: np.ndarray, split: np.ndarray, kind: Kind) -> tuple[np.ndarray, float, float]:
    """Output of the test rows, strength and threshold: fitted on the training rows, chosen on the validation rows."""
    train, validation, test = (np.flatnonzero(split == code) for code in range(3))
    standard, path = fit_path(z[train], y[train], kind, 0 if kind == "regression" else int(y.max()) + 1)
    features = standard(z[validation])
    outputs = [predict(features, w, kind) for w in path]
    best = _chosen(outputs, y[validation], kind)
    threshold = best_threshold(y[validation], outputs[best][:, 1]) if kind == "binary" else 0.5
    return predict(standard(z[test]), path[best], kind), (ALPHAS if kind == "regression" else CS)[best], threshold


def _few_shots(
    z: Rows, y: np.ndarray, split: np.ndarray, kind: Kind, shots: Sequence[int], rng: np.random.Generator
) -> dict[int, np.ndarray]:
    """Probabilities of the test rows by the number of training and validation rows of each class."""
    # Rows of each class in a random order: the first k are the k-shot sample, so samples are nested.
    train, validation = (
        [rng.permutation(rows[y[rows] == c]) for c in np.unique(y[rows])]
        for rows in (np.flatnonzero(split == code) for code in (0, 1))
    )
    outputs = {}
    for k in (k for k in shots if k <= max(map(len, train))):
        # The same fit as with all rows: only who trains and who validates differs.
        few = np.where(split == 2, 2, -1)
        for code, side in enumerate((train, validation)):
            few[np.concatenate([rows[:k] for rows in side])] = code
        outputs[k] = _fitted(z, y, few, kind)[0]
    return outputs


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

    ``y``, ``patient`` and ``split`` are as in `ProbeRows`; clustering takes all rows. A few-shot curve (classes only) is of k
    training and k validation rows of each class, or all that a class has: EHRSHOT's nested samples, without its
    oversampling. ValueError for embeddings that are not finite.
    """
    if not np.isfinite(z if isinstance(z, np.ndarray) else z.data).all():
        raise ValueError("Expected finite embeddings but got NaN or infinity; has the encoder diverged?")
    rows = {name: int((split == code).sum()) for code, name in enumerate(("train", "validation", "test"))}
    test, strength, threshold = np.flatnonzero(split == 2), None, 0.5
    if kind == "clustering":
        rows, test = {"train": 0, "validation": 0, "test": len(y)}, np.arange(len(y))
        output = KMeans(int(y.max()) + 1, n_init=10, random_state=seed).fit_predict(z)
    else:
        output, strength, threshold = _fitted(z, y, split, kind)
        untrained = np.setdiff1d(y[split == 2], y[split == 0]) if kind == "multiclass" else ()
        rows |= {"classes_without_training_rows": len(untrained)} if len(untrained) else {}
    labels, owners = y[test], patient[test]
    weights = PatientWeights.of(owners, bootstraps, seed)
    functions = {name: metric.function for name, metric in PROBES[kind].items()}
    if "macro_f1" in functions:
        functions["macro_f1"] = partial(macro_f1_at, threshold=threshold)
    metrics, replicates = estimated(functions, labels, dict.fromkeys(functions, output), weights)
    curve: dict[int, Estimate] = {}
    if shots and kind in ("binary", "multiclass"):
        found = [_few_shots(z, y, split, kind, shots, np.random.default_rng([seed, draw])) for draw in range(draws)]
        for k in found[0]:
            values = [plain(class_auroc, labels, one[k]) for one in found]
            drawn = [replicate(class_auroc, labels, one[k], weights) for one in found]
            curve[k] = Estimate.of(float(np.mean(values)), np.mean(drawn, axis=0))
    return ProbeResult(
        kind=kind,
        metrics=metrics,
        replicates=replicates,
        rows=rows | {"patients": len(np.unique(owners))},
        strength=strength,
        shots=curve,
        test_index=test,
        y=labels,
        output=output,
        threshold=threshold,
        patient=owners,
    )


def meds_predictions(task: ProbeTask, result: ProbeResult) -> pa.Table:
    """The test rows' predictions in the schema of meds-evaluation, one row a prediction. It holds patient ids.

    Raises:
        ValueError: if the task is not binary, comes as a mapping of splits, or lacks integer patients or the column ``time``.
    """
    if task.kind != "binary" or isinstance(task.dataset, dict) or task.patient is None:
        raise ValueError(
            f"Probe {task.name!r}: MEDS predictions need a binary task on one table with a patient column."
        )
    columns = [np.asarray(task.column(task.dataset, name)) for name in (task.patient, "time")]
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


@dataclass(eq=False, repr=False, kw_only=True)
class ProbeEvaluator(Evaluator):
    """Probes of one encoder after another, on `ProbeTask`s that are read and split at once, before any encoding.

    Called as ``evaluator(model, tokenizer)`` it gives flat numbers (``mortalityclass_auroc``) for a trainer's log and
    ``metric_for_best_model``; `evaluate` gives intervals, replicates and few-shot curves.

    Raises:
        ValueError: for tasks that cannot be split or read, see `task_rows`.
    """

    shots: Sequence[int] = ()  # k of the few-shot curves of `evaluate`
    # of a trained model, or of several (`a | b`): nobody whom it names is tested
    record: SplitRecord | None = None

    what = "probe"

    def _read(self, task: ProbeTask) -> ProbeRows:
        return task_rows(task, seed=self.seed, record=self.record, allow_trained=self.allow_trained)

    def _metrics(self, kind: str) -> dict[str, Metric]:
        return PROBES[kind]

    def evaluate(self, model: Any, tokenizer: Any = None, *, points: bool = False) -> dict[str, ProbeResult]:
        """Task name to `ProbeResult` with bootstrap intervals; embeddings come from the cache where they are there.

        With `points` there are values alone: no intervals, no few-shot curves, nothing from the disk.
        """
        z, found = self._embedded(model, tokenizer, points), {}
        how: dict[str, Any] = {"bootstraps": 0 if points else self.bootstraps, "seed": self.seed}
        how["shots"] = () if points else self.shots
        for task in self.tasks:
            rows = self.rows[task.name]
            result = probe(z[task.name][0], rows.y, rows.patient, rows.split, task.kind, **how)
            result.rows.update(rows.left_out)
            # from rows that have a label to rows of the table
            result.test_index[:] = rows.index[result.test_index]
            found[task.name] = result
        return found
