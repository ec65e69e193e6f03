"""What a frozen encoder knows: linear probes with intervals over patients, after EHRSHOT's protocol.

Embeddings are computed once. Rows are split by patient 70/15/15 (or as given); features are standardised on the
training rows; the regularisation is chosen on the validation rows; the test rows are used once, for the numbers.
Intervals are the 2.5 and 97.5 percentiles of bootstrap replicates that redraw *patients*, never rows.
"""

import hashlib
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.constants import HF_HOME
from sklearn.cluster import KMeans

logger = logging.getLogger(__name__)

Kind = Literal["binary", "multiclass", "regression", "clustering"]
SPLITS = {"train": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "tuning": 1, "test": 2, "held_out": 2}
# EHRSHOT's thirteen strengths; weakest last, so that each fit starts from the one before.
CS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
# Ridge penalties per training row.
ALPHAS = tuple(float(10.0**power) for power in np.arange(-6, 3.5, 0.5))
SHOTS = (1, 2, 4, 8, 16, 32, 64, 128)


# ---------------------------------------------------------------------------------------------- tasks and splits


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


def _column(table: Any, name: str, task: ProbeTask) -> list:
    if name not in table.column_names:
        raise ValueError(f"Probe {task.name!r} needs the column {name!r}; the table has {sorted(table.column_names)}.")
    return list(table[name])


def _split_code(name: Any, task: ProbeTask) -> int:
    if str(name) not in SPLITS:
        raise ValueError(f"Probe {task.name!r}: expected split names among {sorted(SPLITS)} but got {name!r}.")
    return SPLITS[str(name)]


def _encoded_labels(labels: list, task: ProbeTask) -> tuple[np.ndarray, list]:
    if task.kind == "regression":
        y = np.asarray(labels, dtype=np.float64)
        if not np.isfinite(y).all():
            raise ValueError(f"Probe {task.name!r}: column {task.label!r} holds infinite values.")
        return y, []
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
    if task.kind not in ("binary", "multiclass", "regression", "clustering"):
        raise ValueError(
            f"Probe {task.name!r}: expected kind binary, multiclass, regression or clustering but got {task.kind!r}."
        )
    parts = task.dataset if isinstance(task.dataset, dict) else {None: task.dataset}
    texts, labels, patients, splits = [], [], [], []
    for name, table in parts.items():
        texts += _column(table, task.text, task)
        labels += _column(table, task.label, task)
        alone = [(name, i) for i in range(len(table))]
        patients += alone if task.patient is None else _column(table, task.patient, task)
        if name is not None:
            splits += [_split_code(name, task)] * len(table)
        elif task.split in table.column_names:
            splits += [_split_code(value, task) for value in table[task.split]]
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
        if not (split == 1).any():
            train = split == 0
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


# ---------------------------------------------------------------------------------------------------- embeddings


def _accepted(model: Any, **options: Any) -> dict[str, Any]:
    known = inspect.signature(model.encode).parameters
    return {name: value for name, value in options.items() if value is not None and name in known}


def encoder_key(model: Any, tokenizer: Any = None) -> str:
    """SHA-256 over the weights below the head, architecture, config and tokenizer: equal keys, equal embeddings."""
    digest = hashlib.sha256(repr(model).encode())
    if hasattr(model, "config"):
        digest.update(model.config.to_json_string().encode())
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is not None:
        digest.update(repr(tokenizer).encode() + repr(sorted(tokenizer.get_vocab().items())).encode())
    # The body only: a language-modelling head has no part in embeddings, and is random where a checkpoint has none.
    for name, weight in sorted(getattr(model, "base_model", model).state_dict().items()):
        digest.update(f"{name}{weight.dtype}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def embed(
    model: Any,
    texts: Sequence[str],
    tokenizer: Any = None,
    batch_size: int = 32,
    max_length: int | None = None,
    cache: str | Path | bool = False,
    key: str | None = None,
) -> np.ndarray:
    """Embeddings (N, d) float32 of the texts, each different text encoded once, longest first; bf16 autocast on CUDA.

    Args:
        model: anything with ``encode(texts, ...)``: one of our encoders or a `SentenceTransformer`.
        texts: N strings.
        tokenizer: passed on where ``encode`` takes one.
        batch_size: passed on.
        max_length: passed on where ``encode`` takes it.
        cache: True for the private folder ``$HF_HOME/hf_densefeat/embeddings``, or a folder; made with mode 0700.
            The file name is a hash of weights, tokenizer, options and texts; the file holds numbers only.
        key: `encoder_key` of the model, where it is known already.
    """
    unique, inverse = np.unique(np.asarray(texts, dtype=object), return_inverse=True)
    path = None
    if cache:
        folder = Path(HF_HOME) / "hf_densefeat" / "embeddings" if cache is True else Path(cache)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = hashlib.sha256(f"{key or encoder_key(model, tokenizer)} {max_length}".encode())
        for text in unique:
            digest.update(hashlib.sha256(text.encode()).digest())
        path = folder / f"{digest.hexdigest()}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)[inverse]
    order = np.argsort([-len(text) for text in unique], kind="stable")
    options = _accepted(model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    device = next(model.parameters()).device.type if isinstance(model, torch.nn.Module) else "cpu"
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        encoded = torch.as_tensor(model.encode([unique[i] for i in order], **options)).float().cpu().numpy()
    z = np.empty_like(encoded)
    z[order] = encoded
    if path is not None:
        partial = path.with_suffix(f".{time.monotonic_ns()}.tmp")
        with open(partial, "wb") as file:
            partial.chmod(0o600)
            np.save(file, z)
        partial.rename(path)
    return z[inverse]


# ------------------------------------------------------------------------------------------------------- solvers


@dataclass(frozen=True)
class Design:
    """Standardised features in the principal axes of the training rows, with a last column of ones.

    In these axes the columns are orthogonal, so ridge is a division, and the Hessian of the logistic loss is nearly
    diagonal. The L2 penalty does not see the rotation: solutions are those of the standardised features.
    """

    mean: np.ndarray
    axes: np.ndarray
    squares: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, dtype: type = np.float64) -> "Design":
        """Scaler and axes of the training rows ``x`` (N, d); ``dtype`` is that of the large products."""
        x = x.astype(dtype, copy=False)
        mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
        scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-6 * np.abs(mean))
        standard = (x - mean.astype(dtype)) * scale.astype(dtype)
        if len(x) > x.shape[1]:
            axes = _eigenvectors(standard.T @ standard)[1]
        else:
            # Fewer rows than columns: the axes are combinations of the rows, in float64 as small ones are divided by.
            standard = standard.astype(np.float64)
            values, vectors = _eigenvectors(standard @ standard.T)
            kept = values > 1e-10 * max(values[-1], np.finfo(float).tiny)
            axes = (standard.T @ (vectors[:, kept] / np.sqrt(values[kept]))).astype(dtype)
            standard = standard.astype(dtype)
        rows = np.column_stack([standard @ axes, np.ones(len(x), dtype)])
        return cls(mean, scale[:, None] * axes, np.square(rows).sum(0, dtype=np.float64), rows)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The same features of other rows."""
        dtype = self.rows.dtype
        standard = x - self.mean.astype(dtype)
        return np.column_stack([standard.astype(dtype) @ self.axes.astype(dtype), np.ones(len(x), dtype)])


def _eigenvectors(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # PyTorch's LAPACK is up to twice as fast as NumPy's here, and knows float32.
    values, vectors = torch.linalg.eigh(torch.from_numpy(gram))
    return values.numpy(), vectors.numpy()


def ridge_path(design: Design, y: np.ndarray, alphas: Sequence[float] = ALPHAS) -> np.ndarray:
    """Coefficients (r + 1, alphas) of ``min ‖y - A w‖² + N a ‖w‖²``, intercept free, every a from one decomposition.

    Equals `sklearn.linear_model.Ridge(alpha=N * a)` on the standardised features.
    """
    penalty = len(y) * np.asarray(alphas)[None, :] * np.append(np.ones(len(design.squares) - 1), 0.0)[:, None]
    return (design.rows.T @ y)[:, None] / (design.squares[:, None] + penalty)


def _probabilities(logits: np.ndarray) -> tuple[np.ndarray, float]:
    """Sigmoid of one column or softmax of several, and the log-partition sum."""
    if logits.shape[1] == 1:
        return 0.5 * (1 + np.tanh(0.5 * logits)), float(np.logaddexp(0, logits).sum())
    top = logits.max(1, keepdims=True)
    # Cut at e^-60: smaller numbers are denormal in float32, and those are slow.
    p = np.exp(np.maximum(logits - top, -60))
    total = p.sum(1, keepdims=True)
    return p / total, float((np.log(total) + top).sum())


def _curved(p: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Second derivative of the log-partition at ``p``, applied to a change of the logits."""
    if p.shape[1] == 1:
        return p * (1 - p) * direction
    return p * (direction - (p * direction).sum(1, keepdims=True))


def _newton_step(
    a: np.ndarray, p: np.ndarray, penalty: np.ndarray, squares: np.ndarray, gradient: np.ndarray, steps: int = 25
) -> np.ndarray:
    """Conjugate gradients on the Hessian, preconditioned by its diagonal in the orthogonal axes."""
    inverse = 1 / (squares[:, None] * np.maximum((p * (1 - p)).mean(0), 1e-12) + penalty)
    step, residual = np.zeros_like(gradient), -gradient
    conditioned = inverse * residual
    direction, product = conditioned, float((residual * conditioned).sum())
    target = 0.1 * product
    for _ in range(steps):
        image = _dot(a.T, _curved(p, _dot(a, direction))) + penalty * direction
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        length = product / curvature
        step, residual = step + length * direction, residual - length * image
        conditioned = inverse * residual
        previous, product = product, float((residual * conditioned).sum())
        if product <= target:
            break
        direction = conditioned + (product / previous) * direction
    return step


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product in the dtype of the large matrix ``a``, result in float64."""
    return (a @ b.astype(a.dtype)).astype(np.float64)


def logistic_path(
    design: Design, y: np.ndarray, classes: int = 2, cs: Sequence[float] = CS, tolerance: float = 1e-4
) -> np.ndarray:
    """Coefficients (cs, r + 1, 1 or classes) of L2 logistic regression for each C, each started from the one before.

    Minimises ``Σ_i loss_i + ‖w‖²/(2C)`` with a free intercept: `sklearn.linear_model.LogisticRegression(C=C)` (sigmoid
    for two classes, softmax for more) on the standardised features. Newton steps by conjugate gradients; ends where
    no derivative of the mean loss is above ``tolerance``, by default scikit-learn's.
    """
    a = design.rows
    target = y[:, None].astype(float) if classes == 2 else np.eye(classes)[y]
    w = np.zeros((a.shape[1], target.shape[1]))
    logits = np.zeros_like(target)
    path = []
    for c in cs:
        penalty = np.append(np.full(a.shape[1] - 1, 1 / c), 0.0)[:, None]
        p, partition = _probabilities(logits)
        value = partition - float((target * logits).sum()) + 0.5 * float((penalty * w * w).sum())
        for _ in range(100):
            gradient = _dot(a.T, p - target) + penalty * w
            if np.abs(gradient).max() <= tolerance * len(y):
                break
            step = _newton_step(a, p, penalty, design.squares, gradient)
            slope, change, size = float((gradient * step).sum()), _dot(a, step), 1.0
            for _ in range(30):
                trial, moved = logits + size * change, w + size * step
                trial_p, partition = _probabilities(trial)
                lower = partition - float((target * trial).sum()) + 0.5 * float((penalty * moved * moved).sum())
                if lower <= value + 1e-4 * size * slope + 1e-7 * abs(value):
                    break
                size /= 2
            w, logits, p, value = moved, trial, trial_p, lower
        path.append(w)
    return np.stack(path)


# ------------------------------------------------------------------- metrics, for many weightings of the rows at once


def _sums(weights: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the weights (B, N) within each code, (B, cells), and the codes in order."""
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    return np.add.reduceat(weights[:, order], starts, axis=1), present


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted area under the ROC curve, ties counted half, one value for each row of ``weights`` (B, N).

    Equals `sklearn.metrics.roc_auc_score(positive, score, sample_weight=weights[b])`; NaN where a class has no weight.
    """
    codes = np.unique(score, return_inverse=True)[1]
    everyone, ours = _sums(weights, codes)[0], _sums(weights * positive, codes)[0]
    others = everyone - ours
    below = np.cumsum(others, axis=1) - 0.5 * others
    return _ratio((ours * below).sum(1), ours.sum(1) * others.sum(1))


def average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted average precision (AUPRC), (B,). Equals `sklearn.metrics.average_precision_score`."""
    codes = np.unique(-score, return_inverse=True)[1]
    everyone, ours = np.cumsum(_sums(weights, codes)[0], axis=1), _sums(weights * positive, codes)[0]
    hits = np.cumsum(ours, axis=1)
    precision = np.divide(hits, everyone, out=np.zeros_like(hits), where=everyone > 0)
    return _ratio((ours * precision).sum(1), hits[:, -1])


def _tables(y: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted contingency tables (B, labels, others)."""
    shape = int(y.max()) + 1, int(other.max()) + 1
    sums, present = _sums(weights, y * shape[1] + other)
    tables = np.zeros((len(weights), shape[0] * shape[1]))
    tables[:, present] = sums
    return tables.reshape(len(weights), *shape)


def macro_f1(y: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of 2 TP/(labelled + predicted) over the classes that have weight, (B,).

    Equals `sklearn.metrics.f1_score(average="macro")` where every class that occurs has weight.
    """
    classes, codes = np.unique(np.concatenate([y, predicted]), return_inverse=True)
    square = np.concatenate([weights, np.zeros((len(weights), len(classes)))], axis=1)
    corner = np.arange(len(classes))
    table = _tables(np.append(codes[: len(y)], corner), np.append(codes[len(y) :], corner), square)
    f1 = _ratio(2 * np.diagonal(table, axis1=1, axis2=2), table.sum(1) + table.sum(2))
    return _mean_of_defined(f1)


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
    expected = labels * clusters / np.maximum(everything, 1)
    return _ratio(both - expected, 0.5 * (labels + clusters) - expected)


def mutual_information(y: np.ndarray, cluster: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Normalised mutual information, arithmetic mean of the entropies, (B,). Equals sklearn's default."""
    table = _tables(y, cluster, weights)
    p = table / table.sum((1, 2), keepdims=True)

    def entropy(q: np.ndarray) -> np.ndarray:
        return -(q * np.log(np.where(q > 0, q, 1))).reshape(len(q), -1).sum(1)

    own, other = entropy(p.sum(2)), entropy(p.sum(1))
    return _ratio(own + other - entropy(p), 0.5 * (own + other))


def _each_class(metric: Callable, y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric of the positive class, or its mean over all classes one against the rest that have weight."""
    if output.shape[1] == 2:
        return metric(y == 1, output[:, 1], weights)
    return _mean_of_defined(np.stack([metric(y == c, output[:, c], weights) for c in range(output.shape[1])], axis=1))


def _auroc(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _each_class(auroc, y, output, weights)


def _auprc(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _each_class(average_precision, y, output, weights)


def _brier(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of the positive class alone with two classes, summed over classes with more (Brier's own form)."""
    errors = (output - np.eye(output.shape[1])[y]) ** 2
    return weights @ (errors[:, 1] if output.shape[1] == 2 else errors.sum(1)) / weights.sum(1)


def _rmse(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.sqrt(weights @ (y - output) ** 2 / weights.sum(1))


def _r2(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    # About the overall mean: the difference of two large numbers would lose the variance.
    shifted, total = y - y.mean(), weights.sum(1)
    variance = weights @ shifted**2 / total - (weights @ shifted / total) ** 2
    return 1 - _ratio(weights @ (y - output) ** 2 / total, variance)


def _metrics(kind: Kind, threshold: float) -> dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]:
    """The metrics of a kind, each a function of labels, output and weights (B, N) with values (B,).

    The output is probabilities (N, K), predictions (N,) or clusters (N,).
    """
    if kind == "clustering":
        return {"ari": adjusted_rand, "nmi": mutual_information}
    if kind == "regression":
        return {"rmse": _rmse, "r2": _r2}

    def f1(y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
        predicted = (output[:, 1] >= threshold).astype(np.int64) if kind == "binary" else output.argmax(1)
        return macro_f1(y, predicted, weights)

    return {"auroc": _auroc, "auprc": _auprc, "brier": _brier, "macro_f1": f1}


def _best_threshold(y: np.ndarray, p: np.ndarray) -> float:
    """The threshold with the best macro-F1 on these (validation) rows."""
    order = np.argsort(-p, kind="stable")
    hits, taken = np.cumsum(y[order]), np.arange(1, len(y) + 1)
    positives, negatives = y.sum(), len(y) - y.sum()
    f1 = 2 * hits / (taken + positives) + 2 * (negatives - taken + hits) / (len(y) - taken + negatives)
    last = np.append(np.diff(p[order]) != 0, True)
    return float(p[order][np.argmax(np.where(last, f1, -1))])


# ---------------------------------------------------------------------------------------------- one probe, its result


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval over patients (NaN where no bootstrap was asked for)."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class ProbeResult:
    """What one probe found on its test rows.

    Attributes:
        kind: the task's kind.
        metrics: metric name to `Estimate`.
        replicates: metric name to the bootstrap values (B,), replicate b redrawing the same patients for any encoder.
        rows: row counts: train, validation, test, unlabelled; ``patients`` in the test rows.
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


def patient_weights(patient: np.ndarray, replicates: int, seed: int = 0) -> np.ndarray:
    """Row weights (replicates, N): how often each row's patient is drawn when patients are drawn with replacement."""
    codes = np.unique(patient, return_inverse=True)[1]
    count = codes.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)
    return drawn[:, codes].astype(np.float64)


def _in_slices(metric: Callable, y: np.ndarray, output: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric for all weightings, a few at a time: it holds several arrays of the size of the weights."""
    step = max(1, 2_000_000 // len(y))
    parts = [metric(y, output, weights[i : i + step]) for i in range(0, len(weights), step)]
    return np.concatenate(parts) if parts else np.empty(0)


def _estimate(value: float, replicates: np.ndarray) -> Estimate:
    defined = replicates[np.isfinite(replicates)]
    if len(defined) == 0:
        return Estimate(float(value))
    low, high = np.percentile(defined, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def _fitted(x: np.ndarray, y: np.ndarray, kind: Kind, classes: int) -> tuple[Design, np.ndarray]:
    if kind == "regression":
        design, mean = Design.of(x.astype(np.float64)), y.mean()
        path = ridge_path(design, y - mean).T
        path[:, -1] += mean
        return design, path[:, :, None]
    design = Design.of(x, np.float32)
    return design, logistic_path(design, y, classes)


def _output(features: np.ndarray, w: np.ndarray, kind: Kind) -> np.ndarray:
    logits = _dot(features, w)
    if kind == "regression":
        return logits[:, 0]
    p = _probabilities(logits)[0]
    return np.column_stack([1 - p, p]) if p.shape[1] == 1 else p


def _chosen(features: np.ndarray, path: np.ndarray, y: np.ndarray, kind: Kind) -> int:
    """Index into the path of the best RMSE or AUROC on the validation rows; log-loss decides between equal AUROCs."""
    outputs = [_output(features, w, kind) for w in path]
    if kind == "regression":
        return int(np.argmin([np.mean((y - output) ** 2) for output in outputs]))
    one, rows = np.ones((1, len(y))), np.arange(len(y))
    area = [np.nan_to_num(_auroc(y, output, one)[0]) for output in outputs]
    loss = [-np.log(np.maximum(output[rows, y], 1e-12)).mean() for output in outputs]
    return int(np.lexsort((loss, -np.round(area, 9)))[0])


def _nested_shots(y: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of each class in a random order; the first k are the k-shot sample, so samples are nested."""
    return [rng.permutation(rows[y[rows] == c]) for c in np.unique(y[rows])]


def _shot_curve(z, y, split, kind, classes, patient, shots, draws, bootstraps, seed) -> dict[int, Estimate]:
    test = split == 2
    outputs: dict[int, list[np.ndarray]] = {}
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        train, validation = (_nested_shots(y, np.flatnonzero(split == code), rng) for code in (0, 1))
        for k in shots:
            if k > max(len(rows) for rows in train):
                continue
            t, v = (np.concatenate([rows[:k] for rows in side]) for side in (train, validation))
            design, path = _fitted(z[t], y[t], kind, classes)
            w = path[_chosen(design(z[v]), path, y[v], kind)]
            outputs.setdefault(k, []).append(_output(design(z[test]), w, kind))
    weights = patient_weights(patient[test], bootstraps, seed) if bootstraps else np.empty((0, int(test.sum())))
    one, curve = np.ones((1, int(test.sum()))), {}
    for k, found in outputs.items():
        drawn = np.mean([_in_slices(_auroc, y[test], output, weights) for output in found], axis=0)
        curve[k] = _estimate(np.mean([_auroc(y[test], output, one)[0] for output in found]), drawn)
    return curve


def probe(
    z: np.ndarray,
    y: np.ndarray,
    patient: np.ndarray,
    split: np.ndarray,
    kind: Kind,
    bootstraps: int = 1000,
    shots: Sequence[int] = (),
    draws: int = 3,
    seed: int = 0,
) -> ProbeResult:
    """One probe on embeddings (N, d): ridge, logistic regression or k-means, and its metrics on the test rows.

    Args:
        z: embeddings (N, d).
        y: label codes 0, 1, … (int) or values (float), (N,).
        patient: patient codes (N,).
        split: 0 train, 1 validation, 2 test, (N,). Not used by clustering, which takes all rows.
        kind: see `ProbeTask`.
        bootstraps: replicates over patients; 0 for none.
        shots: k of the few-shot curve (classes only): k training and k validation rows of each class, or all that a
            class has; EHRSHOT's nested samples, without its oversampling.
        draws: random draws of the few-shot samples.
        seed: seed of k-means, samples and bootstrap.
    """
    z = np.asarray(z)
    if not np.isfinite(z).all():
        raise ValueError("Expected finite embeddings but got NaN or infinity; has the encoder diverged?")
    classes, strength, threshold = int(y.max()) + 1 if kind != "regression" else 0, None, 0.5
    rows = {name: int((split == code).sum()) for code, name in enumerate(("train", "validation", "test"))}
    if kind == "clustering":
        test = np.arange(len(y))
        rows = {"train": 0, "validation": 0, "test": len(y)}
        output = KMeans(classes, n_init=10, random_state=seed).fit_predict(z)
    else:
        train, validation, test = (np.flatnonzero(split == code) for code in range(3))
        design, path = _fitted(z[train], y[train], kind, classes)
        features = design(z[validation])
        best = _chosen(features, path, y[validation], kind)
        strength = (ALPHAS if kind == "regression" else CS)[best]
        output = _output(design(z[test]), path[best], kind)
        if kind == "binary":
            threshold = _best_threshold(y[validation], _output(features, path[best], kind)[:, 1])
    ours, owners, one = y[test], patient[test], np.ones((1, len(test)))
    weights = patient_weights(owners, bootstraps, seed) if bootstraps else np.empty((0, len(test)))
    metrics = _metrics(kind, threshold)
    drawn = {name: _in_slices(metric, ours, output, weights) for name, metric in metrics.items()}
    curve = {}
    if shots and kind in ("binary", "multiclass"):
        curve = _shot_curve(z, y, split, kind, classes, patient, shots, draws, bootstraps, seed)
    return ProbeResult(
        kind=kind,
        metrics={name: _estimate(f(ours, output, one)[0], drawn[name]) for name, f in metrics.items()},
        replicates=drawn,
        rows=rows | {"patients": len(np.unique(owners))},
        strength=strength,
        shots=curve,
        test_index=test,
        y=ours,
        output=output,
        threshold=threshold,
        patient=owners,
    )


def paired_difference(ours: ProbeResult, theirs: ProbeResult) -> dict[str, Estimate]:
    """Metric name to ``ours - theirs`` with its 95 % interval, both scored on the same redrawn patients.

    Raises:
        ValueError: if the two are not of the same test rows, or have no replicates.
    """
    if not np.array_equal(ours.y, theirs.y) or not np.array_equal(ours.patient, theirs.patient):
        raise ValueError("Expected two results of the same task, seed and split; their test rows differ.")
    if [len(drawn) for drawn in ours.replicates.values()] != [len(drawn) for drawn in theirs.replicates.values()]:
        raise ValueError("Expected two results with the same number of bootstrap replicates.")
    return {
        name: _estimate(ours.metrics[name].value - theirs.metrics[name].value, drawn - theirs.replicates[name])
        for name, drawn in ours.replicates.items()
    }


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
    columns = [np.asarray(_column(task.dataset, name, task)) for name in (task.patient, time)]
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


class ProbeEvaluator:
    """Probes of one encoder after another, on tasks that are read once.

    Called as ``evaluator(model, tokenizer)`` it gives flat numbers (``mortality_auroc``) for a trainer's log and
    ``metric_for_best_model``; `evaluate` gives intervals, replicates and few-shot curves.
    """

    def __init__(
        self,
        tasks: Sequence[ProbeTask],
        bootstraps: int = 1000,
        shots: Sequence[int] = (),
        batch_size: int = 32,
        max_length: int | None = None,
        cache: str | Path | bool = True,
        seed: int = 0,
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

        Raises:
            ValueError: for tasks that cannot be split or read, see `task_rows`; before any encoding.
        """
        names = [task.name for task in tasks]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"Expected at least one task, with different names, but got {names}.")
        self.tasks, self.bootstraps, self.shots = list(tasks), bootstraps, shots
        self.batch_size, self.max_length, self.cache, self.seed = batch_size, max_length, cache, seed
        self.rows = {task.name: task_rows(task, seed) for task in tasks}
        for name, rows in self.rows.items():
            if rows.unlabelled:
                logger.info("Probe %s: %d rows without a label are left out.", name, rows.unlabelled)

    def _embeddings(self, model: Any, tokenizer: Any, cache: str | Path | bool) -> dict[str, np.ndarray]:
        key = encoder_key(model, tokenizer) if cache else None
        texts = [text for rows in self.rows.values() for text in rows.texts]
        z = embed(model, texts, tokenizer, self.batch_size, self.max_length, cache, key)
        ends = np.cumsum([len(rows.texts) for rows in self.rows.values()])
        return dict(zip(self.rows, np.split(z, ends[:-1]), strict=True))

    def _probe(self, name: str, z: np.ndarray, kind: Kind, bootstraps: int, shots: Sequence[int]) -> ProbeResult:
        rows = self.rows[name]
        result = probe(z, rows.y, rows.patient, rows.split, kind, bootstraps, shots, seed=self.seed)
        result.rows["unlabelled"] = rows.unlabelled
        result.test_index[:] = rows.index[result.test_index]
        return result

    def __call__(self, model: Any, tokenizer: Any = None) -> dict[str, float]:
        """Point values, ``{task}_{metric}``, and ``probe_seconds``.

        Every rank encodes every text in the same order and nothing is read from disk, so that ranks stay in step where
        a forward is a collective (FSDP); the numbers are the same on all ranks.
        """
        start = time.perf_counter()
        z = self._embeddings(model, tokenizer, cache=False)
        metrics = {}
        for task in self.tasks:
            result = self._probe(task.name, z[task.name], task.kind, 0, ())
            metrics |= {f"{task.name}_{name}": found.value for name, found in result.metrics.items()}
        return metrics | {"probe_seconds": time.perf_counter() - start}

    def evaluate(self, model: Any, tokenizer: Any = None) -> dict[str, ProbeResult]:
        """Task name to `ProbeResult` with bootstrap intervals; embeddings come from the cache where they are there."""
        z = self._embeddings(model, tokenizer, self.cache)
        return {t.name: self._probe(t.name, z[t.name], t.kind, self.bootstraps, self.shots) for t in self.tasks}
