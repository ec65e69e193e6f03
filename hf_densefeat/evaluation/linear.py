"""Linear probes, all strengths at once: ridge in closed form, logistic regression by Newton steps, warm-started."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# EHRSHOT's thirteen strengths; weakest last, so that each fit starts from the one before.
CS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
# Ridge penalties per training row.
ALPHAS = tuple(float(10.0**power) for power in np.arange(-6, 3.5, 0.5))


@dataclass(frozen=True)
class Standardizer:
    """Standardised features in the principal axes of the training rows, with a last column of ones.

    In these axes the columns are orthogonal, so ridge is a division, and the Hessian of the logistic loss is nearly
    diagonal. The L2 penalty does not see the rotation: solutions are those of the standardised features.
    """

    mean: np.ndarray
    axes: np.ndarray
    squares: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, dtype: type = np.float64) -> "Standardizer":
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


def ridge_path(standardizer: Standardizer, y: np.ndarray, alphas: Sequence[float] = ALPHAS) -> np.ndarray:
    """Coefficients (r + 1, alphas) of ``min ‖y - A w‖² + N a ‖w‖²``, intercept free, every a from one decomposition.

    Equals `sklearn.linear_model.Ridge(alpha=N * a)` on the standardised features.
    """
    penalty = len(y) * np.asarray(alphas)[None, :] * np.append(np.ones(len(standardizer.squares) - 1), 0.0)[:, None]
    return (standardizer.rows.T @ y)[:, None] / (standardizer.squares[:, None] + penalty)


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
    standardizer: Standardizer, y: np.ndarray, classes: int = 2, cs: Sequence[float] = CS, tolerance: float = 1e-4
) -> np.ndarray:
    """Coefficients (cs, r + 1, 1 or classes) of L2 logistic regression for each C, each started from the one before.

    Minimises ``Σ_i loss_i + ‖w‖²/(2C)`` with a free intercept: `sklearn.linear_model.LogisticRegression(C=C)` (sigmoid
    for two classes, softmax for more) on the standardised features. Newton steps by conjugate gradients; ends where
    no derivative of the mean loss is above ``tolerance``, by default scikit-learn's.
    """
    a = standardizer.rows
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
            step = _newton_step(a, p, penalty, standardizer.squares, gradient)
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


def fit_path(x: np.ndarray, y: np.ndarray, kind: str, classes: int) -> tuple[Standardizer, np.ndarray]:
    """The standardizer of the training rows, and coefficients (strengths, r + 1, outputs) for `predict`."""
    if kind == "regression":
        standardizer, mean = Standardizer.of(x.astype(np.float64)), y.mean()
        path = ridge_path(standardizer, y - mean).T
        path[:, -1] += mean
        return standardizer, path[:, :, None]
    standardizer = Standardizer.of(x, np.float32)
    return standardizer, logistic_path(standardizer, y, classes)


def predict(features: np.ndarray, w: np.ndarray, kind: str) -> np.ndarray:
    """Predictions (N,) of a regression, or probabilities (N, classes), at the coefficients (r + 1, outputs)."""
    logits = _dot(features, w)
    if kind == "regression":
        return logits[:, 0]
    p = _probabilities(logits)[0]
    return np.column_stack([1 - p, p]) if p.shape[1] == 1 else p
