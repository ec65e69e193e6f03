"""Metrics for many weightings of the rows at once, and what they are for: bootstrap intervals over patients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import entr

# Ends the name of a metric of the ranking that is fused with the ranking by words.
WITH_WORDS = "_with_words"

MetricFunction = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Labels (N,), output and weights (B, N) to the metric under each weighting (B,)."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval over patients (NaN where no bootstrap was asked for)."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @classmethod
    def of(cls, value: float, replicates: np.ndarray) -> "Estimate":
        """The 2.5 and 97.5 percentiles of the replicates (B,); those without a value, for want of a class, are left out."""
        defined = replicates[np.isfinite(replicates)]
        low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
        return cls(float(value), float(low), float(high))


def rows_of_some_patients(patient: np.ndarray, maximum: int, seed: int) -> np.ndarray:
    """Rows of whole patients, drawn at random, until there are `maximum`; in their order. At least one patient's."""
    codes = np.unique(patient, return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(codes.max() + 1)
    kept = order[np.cumsum(np.bincount(codes)[order]) <= maximum]
    return np.flatnonzero(np.isin(codes, kept if len(kept) else order[:1]))


@dataclass(frozen=True)
class PatientWeights:
    """Row weights (replicates, N), how often each row's patient is drawn when patients are drawn with replacement.

    It is read in slices, ``weights[i:j]``: all of it would take 8 bytes a row and replicate.
    """

    drawn: np.ndarray  # how often each patient is drawn, (replicates, patients)
    codes: np.ndarray  # the patient of each row, (N,)

    @classmethod
    def of(cls, patient: np.ndarray, replicates: int, seed: int = 0) -> "PatientWeights":
        """Draw as many patients as there are, so many times."""
        codes = np.unique(patient, return_inverse=True)[1]
        count, rng = int(codes.max()) + 1, np.random.default_rng(seed)
        drawn = np.empty((replicates, count), np.uint16)
        for one in drawn:
            one[:] = np.bincount(rng.integers(0, count, size=count), minlength=count)
        return cls(drawn, codes)

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.drawn[part][:, self.codes].astype(np.float64)


def replicate(metric: MetricFunction, y: np.ndarray, output: np.ndarray, weights: PatientWeights) -> np.ndarray:
    """The metric for all weightings, a few at a time: it holds several arrays of the size of the weights."""
    step = max(1, 2_000_000 // len(y))
    parts = [metric(y, output, weights[i : i + step]) for i in range(0, len(weights), step)]
    return np.concatenate(parts) if parts else np.empty(0)


def plain(metric: MetricFunction, y: np.ndarray, output: np.ndarray) -> float:
    """The metric with all weights 1."""
    return float(metric(y, output, np.ones((1, len(y))))[0])


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one task found on its scored rows."""

    kind: str  # the task's
    metrics: dict[str, Estimate]  # by name
    # metric name to the bootstrap values (B,); replicate b redraws the same patients for any encoder
    replicates: dict[str, np.ndarray] = field(repr=False)
    rows: dict[str, int]  # numbers of rows and patients, by what they are
    y: np.ndarray = field(repr=False)  # labels of the scored rows: codes or values, or query numbers
    patient: np.ndarray = field(repr=False)  # their patient codes


def estimated(
    functions: Mapping[str, MetricFunction], y: np.ndarray, outputs: Mapping[str, np.ndarray], weights: PatientWeights
) -> tuple[dict[str, Estimate], dict[str, np.ndarray]]:
    """Metric name to `Estimate`, and to the bootstrap values; of each function with the output of its name."""
    drawn = {name: replicate(function, y, outputs[name], weights) for name, function in functions.items()}
    return {name: Estimate.of(plain(functions[name], y, outputs[name]), drawn[name]) for name in functions}, drawn


def paired_difference(ours: Result, theirs: Result) -> dict[str, Estimate]:
    """Metric name to ``ours - theirs`` with its 95 % interval, both scored on the same redrawn patients.

    Of the metrics that both have. ``mrr_with_words`` is compared with ``mrr`` where ``theirs``, of words alone, lacks it.

    Raises:
        ValueError: for other test rows, no metric in common, or another number of replicates.
    """
    if not np.array_equal(ours.y, theirs.y) or not np.array_equal(ours.patient, theirs.patient):
        raise ValueError("Expected two results of the same task, seed and split; their test rows differ.")
    both = ((name, other) for name in ours.metrics for other in (name.removesuffix(WITH_WORDS), name))
    named = {name: other for name, other in both if other in theirs.metrics}
    if not named:
        raise ValueError(f"Expected a metric in common but got {list(ours.metrics)} and {list(theirs.metrics)}.")
    found = {}
    for name, other in named.items():
        if len(ours.replicates[name]) != len(theirs.replicates[other]):
            raise ValueError("Expected two results with the same number of bootstrap replicates.")
        drawn = ours.replicates[name] - theirs.replicates[other]
        found[name] = Estimate.of(ours.metrics[name].value - theirs.metrics[other].value, drawn)
    return found


def _sums(weights: np.ndarray, codes: np.ndarray, cells: int) -> np.ndarray:
    """Sum of the weights (B, N) of the rows of each code, (B, cells)."""
    return weights @ csr_matrix((np.ones(len(codes)), (np.arange(len(codes)), codes)), (len(codes), cells))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted area under the ROC curve, ties counted half, one value for each row of ``weights`` (B, N).

    Equals `sklearn.metrics.roc_auc_score(positive, score, sample_weight=weights[b])`; NaN where a class has no weight.
    """
    # Rows of equal score are one cell, so that ties cost nothing and count half.
    cells, codes = np.unique(score, return_inverse=True)
    positives = _sums(weights * positive, codes, len(cells))
    negatives = _sums(weights, codes, len(cells)) - positives
    # negatives below each cell, and half of those in it: a tie is half a win
    below = np.cumsum(negatives, axis=1) - 0.5 * negatives
    return _ratio((positives * below).sum(1), positives.sum(1) * negatives.sum(1))


def average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted average precision (AUPRC), (B,). Equals `sklearn.metrics.average_precision_score`."""
    cells, codes = np.unique(-score, return_inverse=True)
    positives = _sums(weights * positive, codes, len(cells))
    hits = np.cumsum(positives, axis=1)
    # a cell without weight has no precision, and adds nothing
    precision = np.nan_to_num(_ratio(hits, _sums(weights, codes, len(cells)).cumsum(1)))
    return _ratio((positives * precision).sum(1), hits[:, -1])


def _tables(y: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted contingency tables (B, labels, others)."""
    labels, others = int(y.max()) + 1, int(other.max()) + 1
    return _sums(weights, y * others + other, labels * others).reshape(-1, labels, others)


def macro_f1(y: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of 2 TP/(labelled + predicted) over the classes that have weight, (B,).

    Equals `sklearn.metrics.f1_score(average="macro")` where every class that occurs has weight.
    """
    classes = np.union1d(y, predicted)
    is_labelled, is_predicted = y[:, None] == classes, predicted[:, None] == classes
    return _mean_of_defined(
        _ratio(2 * weights @ (is_labelled & is_predicted), weights @ is_labelled + weights @ is_predicted)
    )


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN."""
    defined = np.isfinite(values)
    return _ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1).astype(float))


def adjusted_rand(y: np.ndarray, cluster: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Adjusted Rand index (B,). Equals `sklearn.metrics.adjusted_rand_score` for weights of one.

    Pairs are pairs of different rows: a row drawn twice is not a pair with itself, which would raise every replicate.
    """
    table, squares = _tables(y, cluster, weights), _tables(y, cluster, weights**2)

    def pairs(total: np.ndarray, same: np.ndarray) -> np.ndarray:
        return 0.5 * (total**2 - same).reshape(len(total), -1).sum(1)

    both, everything = pairs(table, squares), pairs(table.sum((1, 2)), squares.sum((1, 2)))
    labels, clusters = pairs(table.sum(2), squares.sum(2)), pairs(table.sum(1), squares.sum(1))
    # what two random partitions with the same sizes have
    expected = labels * clusters / np.maximum(everything, 1)
    return _ratio(both - expected, 0.5 * (labels + clusters) - expected)


def mutual_information(y: np.ndarray, cluster: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Normalised mutual information, arithmetic mean of the entropies, (B,). Equals sklearn's default."""
    table = _tables(y, cluster, weights)
    # joint shares; their margins are those of labels and clusters
    p = table / table.sum((1, 2), keepdims=True)
    own, other, both = (entr(q).reshape(len(q), -1).sum(1) for q in (p.sum(2), p.sum(1), p))
    return _ratio(own + other - both, 0.5 * (own + other))


def _odds(output: np.ndarray, c: int) -> np.ndarray:
    """Odds of a class (N,): they tell sure predictions apart where probabilities are rounded to 1."""
    others = np.delete(output, c, axis=1).sum(1)
    return np.divide(output[:, c], others, out=np.full(len(output), np.inf), where=others > 0)


def _each_class(metric: MetricFunction, y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric of the positive class, or its mean over all classes one against the rest that have weight."""
    classes = [1] if output.shape[1] == 2 else range(output.shape[1])
    return _mean_of_defined(np.stack([metric(y == c, _odds(output, c), weights) for c in classes], axis=1))


class_auroc: MetricFunction = partial(_each_class, auroc)
class_auprc: MetricFunction = partial(_each_class, average_precision)
"""AUROC and average precision of probabilities (N, K): of class 1 where K = 2, else the mean over the classes, (B,)."""


def brier(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Brier score of probabilities (N, K), (B,): of class 1 where K = 2, else summed over the classes (his own form)."""
    errors = (output - np.eye(output.shape[1])[y]) ** 2
    return weights @ (errors[:, 1] if output.shape[1] == 2 else errors.sum(1)) / weights.sum(1)


def rmse(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Root mean squared error of predictions (N,), (B,)."""
    return np.sqrt(weights @ (y - output) ** 2 / weights.sum(1))


def r2(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficient of determination of predictions (N,), (B,); NaN where the labels are constant."""
    # About the overall mean: the difference of two large numbers would lose the variance.
    shifted, total = y - y.mean(), weights.sum(1)
    variance = weights @ shifted**2 / total - (weights @ shifted / total) ** 2
    return 1 - _ratio(weights @ (y - output) ** 2 / total, variance)


def macro_f1_at(y: np.ndarray, output: np.ndarray, weights: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Macro-F1 of probabilities (N, K): class 1 from the threshold on where K = 2, else the largest, (B,)."""
    predicted = (output[:, 1] >= threshold).astype(np.int64) if output.shape[1] == 2 else output.argmax(1)
    return macro_f1(y, predicted, weights)


def weighted_mean(y: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of one value a row (N,), (B,); rows without a value (NaN) do not count."""
    defined = np.isfinite(values)
    return _ratio(weights @ np.where(defined, values, 0), weights @ defined.astype(float))


@dataclass(frozen=True)
class Metric:
    """A metric of a kind of probe (`PROBES`) or of similarity (`SIMILARITY`), with all that tables and cards need."""

    # of probabilities (N, K), predictions, clusters or, for similarity, one value a row, (N,)
    function: MetricFunction
    title: str  # heading in tables
    higher_is_better: bool  # False for errors
    hub_name: str  # metric type in a model card's `model-index`
    # type and name of the task there, by which the Hub groups results; None for that of the group
    hub_task: tuple[str, str] | None = None

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.higher_is_better else -1


CLUSTERING = ("feature-extraction", "Clustering")
_CLASSES = {
    "auroc": Metric(class_auroc, "AUROC", True, "roc_auc"),
    "auprc": Metric(class_auprc, "AUPRC", True, "average_precision"),
    "brier": Metric(brier, "Brier", False, "brier_score"),
    "macro_f1": Metric(macro_f1_at, "macro-F1", True, "f1"),
}
PROBES: dict[str, dict[str, Metric]] = {
    "binary": dict(_CLASSES),
    "multiclass": dict(_CLASSES),
    "regression": {"rmse": Metric(rmse, "RMSE", False, "rmse"), "r2": Metric(r2, "R²", True, "r_squared")},
    "clustering": {
        "ari": Metric(adjusted_rand, "ARI", True, "ari", CLUSTERING),
        "nmi": Metric(mutual_information, "NMI", True, "nmi", CLUSTERING),
    },
}
"""Metrics of each kind of `ProbeTask`, the first one its headline; those of similarity are in `SIMILARITY`."""

CODES = ("float", "int8", "binary")


def best_threshold(y: np.ndarray, p: np.ndarray) -> float:
    """The threshold with the best macro-F1 on these (validation) rows."""
    order = np.argsort(-p, kind="stable")
    hits, taken = np.cumsum(y[order]), np.arange(1, len(y) + 1)
    positives, negatives = y.sum(), len(y) - y.sum()
    f1 = 2 * hits / (taken + positives) + 2 * (negatives - taken + hits) / (len(y) - taken + negatives)
    # A threshold can only lie between different probabilities.
    last = np.append(np.diff(p[order]) != 0, True)
    return float(p[order][np.argmax(np.where(last, f1, -1))])
