"""Linear probes, all strengths at once: ridge in closed form, logistic regression by Newton steps, warm-started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# EHRSHOT's thirteen strengths; weakest penalty last, so that each fit starts from the ones before.
CS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
# Ridge penalties per training row.
ALPHAS = tuple(float(10.0**power) for power in np.arange(-6, 3.5, 0.5))
# A factor serves until the penalty, relative to the curvature, has changed this much.
_STALE = 20.0
# Numbers in the factors of all classes.
_LARGEST = 50_000_000


@dataclass(frozen=True)
class Standardizer:
    """The mean and scale of the training rows, and their standardised features.

    With fewer rows than columns the features are coordinates along the principal axes of the rows: the L2 penalty does
    not see a rotation, so solutions are those of the standardised columns.

    Attributes:
        mean: of the columns, (d,).
        scale: one over the standard deviation, 0 for constant columns, (d,).
        axes: principal axes (d, r), orthonormal; None where the columns are used as they are.
        rows: features of the training rows, (N, r).
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray | None
    rows: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, dtype: type = np.float64) -> Standardizer:
        """Fit to the training rows ``x`` (N, d); ``dtype`` is that of the large products."""
        x = x.astype(dtype, copy=False)
        mean = x.mean(0, dtype=np.float64)
        standard = x - mean.astype(dtype)
        deviation = np.sqrt(np.square(standard).mean(0, dtype=np.float64))
        scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-6 * np.abs(mean))
        standard *= scale.astype(dtype)
        if len(x) > x.shape[1]:
            return cls(mean, scale, None, standard)
        # The axes are combinations of the rows; in float64, because the combination divides by small eigenvalues.
        standard = standard.astype(np.float64)
        values, vectors = _eigenvectors(standard @ standard.T)
        kept = values > 1e-10 * max(values[-1], np.finfo(float).tiny)
        axes = standard.T @ (vectors[:, kept] / np.sqrt(values[kept]))
        return cls(mean, scale, axes.astype(dtype), (standard @ axes).astype(dtype))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The same features of other rows, (M, r)."""
        dtype = self.rows.dtype
        standard = (x.astype(dtype, copy=False) - self.mean.astype(dtype)) * self.scale.astype(dtype)
        return standard if self.axes is None else standard @ self.axes


def _eigenvectors(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # PyTorch's LAPACK is up to twice as fast as NumPy's here, and knows float32.
    values, vectors = torch.linalg.eigh(torch.from_numpy(gram))
    return values.numpy(), vectors.numpy()


def ridge_path(rows: np.ndarray, y: np.ndarray, alphas: Sequence[float] = ALPHAS) -> np.ndarray:
    """Coefficients (r + 1, alphas) of ``min ‖y - A w - b‖² + N a ‖w‖²``, every a from one decomposition; b is last.

    Equals `sklearn.linear_model.Ridge(alpha=N * a)` on the same features (N, r), whose columns have mean 0.
    """
    values, vectors = _eigenvectors(rows.T @ rows)
    shrunk = (vectors.T @ (rows.T @ y))[:, None] / (values.clip(0)[:, None] + len(y) * np.asarray(alphas)[None, :])
    return np.vstack([vectors @ shrunk, np.full((1, len(alphas)), y.mean())])


# ------------------------------------------------------------------------------------------- logistic regression


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # In the dtype of the large matrix. A product with one column is several times faster as one with a vector.
    b = b.astype(a.dtype, copy=False)
    return (a @ b[:, 0])[:, None] if b.shape[1] == 1 else a @ b


def _gram(a: np.ndarray) -> np.ndarray:
    # NumPy computes one triangle of a product with its own transpose; PyTorch computes both.
    return a.T @ a


@dataclass(frozen=True)
class _Step:
    """A change of coefficients, intercepts and logits; how the objective changes along it, and what it took."""

    w: np.ndarray
    b: np.ndarray
    logits: np.ndarray
    slope: float
    iterations: int


@dataclass(frozen=True)
class _Point:
    """Coefficients (r, K), intercepts (K,), and what follows: logits and probabilities (N, K), summed log-loss."""

    w: np.ndarray
    b: np.ndarray
    logits: np.ndarray
    p: np.ndarray
    loss: float

    @classmethod
    def of(cls, w: np.ndarray, b: np.ndarray, logits: np.ndarray, target: np.ndarray) -> _Point:
        """The point with these logits; sigmoid of one column, softmax of several."""
        tensor = torch.from_numpy(logits)
        if logits.shape[1] == 1:
            p, partition = torch.sigmoid(tensor), torch.nn.functional.softplus(tensor).sum()
        else:
            p, partition = torch.softmax(tensor, 1), torch.logsumexp(tensor, 1).sum()
        return cls(w, b, logits, p.numpy(), float(partition) - float(np.vdot(target, logits)))

    def moved(self, step: _Step, size: float, target: np.ndarray) -> _Point:
        """The point after a part of the step."""
        return _Point.of(self.w + size * step.w, self.b + size * step.b, self.logits + size * step.logits, target)

    def value(self, penalty: float) -> float:
        """The penalised objective."""
        return self.loss + 0.5 * penalty * float(np.vdot(self.w, self.w))

    @property
    def curvature(self) -> float:
        """Second derivative of a row's loss, the mean over rows and classes."""
        return float((self.p * (1 - self.p)).mean())


class _Factor:
    """Preconditioner: Cholesky factors of the approximate Hessians ``Aᵀ W A + penalty``, of all classes or of each.

    ``Aᵀ W A`` are given, (1 or K, r, r), and overwritten.
    """

    def __init__(self, grams: np.ndarray, curvature: float, penalty: float) -> None:
        self.ratio = curvature / penalty
        diagonal = np.einsum("kii->ki", grams)
        diagonal += penalty
        # Rounding may leave directions below zero. Raising them makes a weaker preconditioner, not another solution.
        raised = float(diagonal.mean()) * np.finfo(grams.dtype).eps
        lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(grams))
        while failed.any():
            raised *= 16
            diagonal += raised
            lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(grams))
        self.lower = lower if len(grams) > 1 else lower[0]

    @classmethod
    def shared(cls, gram: np.ndarray, point: _Point, penalty: float) -> _Factor:
        """One for all classes, with the mean curvature of the rows."""
        curvature = point.curvature
        return cls(gram[None] * gram.dtype.type(curvature), curvature, penalty)

    @classmethod
    def exact(cls, a: np.ndarray, point: _Point, penalty: float) -> _Factor:
        """One for each class, each row with its own curvature; its mean over the classes where they would fill memory."""
        curvatures = point.p * (1 - point.p)
        if curvatures.shape[1] * a.shape[1] ** 2 > _LARGEST:
            curvatures = curvatures.mean(1, keepdims=True)
        roots = np.sqrt(curvatures).astype(a.dtype)
        grams = np.stack([_gram(a * roots[:, k, None]) for k in range(roots.shape[1])])
        return cls(grams, point.curvature, penalty)

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        right = torch.from_numpy(gradient)
        right = right if self.lower.ndim == 2 else right.T[:, :, None].contiguous()
        half = torch.linalg.solve_triangular(self.lower, right, upper=False)
        found = torch.linalg.solve_triangular(self.lower.mT, half, upper=True)
        return (found if self.lower.ndim == 2 else found[:, :, 0].T).numpy()


def _newton_step(
    a: np.ndarray, point: _Point, target: np.ndarray, penalty: float, precondition: _Factor, patience: int
) -> _Step:
    """Conjugate gradients on the Hessian until a tenth of the residual is left, or patience ends."""
    excess = point.p - target
    gradient, of_intercept = _times(a.T, excess) + a.dtype.type(penalty) * point.w, excess.sum(0)
    # In float64: 1 - p is where float32 has no digits left.
    p, weight = point.p, point.p * (1 - point.p)
    inverse = 1 / np.maximum(weight.sum(0), 1e-12)
    scalar = a.dtype.type  # a Python float times an array keeps its dtype, a NumPy float64 does not

    w, b, logits = np.zeros_like(gradient), np.zeros_like(of_intercept), np.zeros_like(p)
    left, left_b = -gradient, -of_intercept
    along, along_b = precondition(left), inverse * left_b
    product = first = float(np.vdot(left, along)) + float(left_b @ along_b)
    iterations = 0
    while iterations < patience and product > 0.1 * first:
        iterations += 1
        change = _times(a, along) + along_b
        bent = weight * change if p.shape[1] == 1 else p * (change - (p * change).sum(1, keepdims=True))
        image, image_b = _times(a.T, bent) + scalar(penalty) * along, bent.sum(0)
        bend = float(np.vdot(along, image)) + float(along_b @ image_b)
        if bend <= 0:
            break
        length = product / bend
        w, b, logits = w + scalar(length) * along, b + length * along_b, logits + length * change
        left, left_b = left - scalar(length) * image, left_b - length * image_b
        conditioned, conditioned_b = precondition(left), inverse * left_b
        before, product = product, float(np.vdot(left, conditioned)) + float(left_b @ conditioned_b)
        share = product / before
        along, along_b = conditioned + scalar(share) * along, conditioned_b + share * along_b
    slope = float(np.vdot(gradient, w)) + float(of_intercept @ b)
    return _Step(w, b, logits, slope, iterations)


def _descended(point: _Point, step: _Step, target: np.ndarray, penalty: float) -> _Point:
    """The first of step, half a step, … that lowers the objective, up to rounding; the point itself if none does."""
    value = point.value(penalty)
    for halvings in range(12):
        size = 0.5**halvings
        trial = point.moved(step, size, target)
        if trial.value(penalty) <= value + 1e-4 * size * step.slope + 1e-6 * abs(value):
            return trial
    return point


def _predicted(past: list[tuple[float, _Point]], c: float, target: np.ndarray) -> _Point:
    """A start for the next strength: the last two solutions continued along log C, or the last one if that is lower."""
    (_, point), penalty = past[-1], 1 / c
    if len(past) < 2:
        return point
    (c0, before), (c1, _) = past[-2:]
    share = math.log(c / c1) / math.log(c1 / c0)
    change = _Step(point.w - before.w, point.b - before.b, point.logits - before.logits, 0.0, 0)
    further = point.moved(change, share, target)
    return further if further.value(penalty) < point.value(penalty) else point


def logistic_path(
    rows: np.ndarray, y: np.ndarray, classes: int = 2, cs: Sequence[float] = CS, tolerance: float = 2e-3
) -> np.ndarray:
    """Coefficients (cs, r + 1, 1 or classes) of L2 logistic regression for each C; the intercept is last.

    Minimises ``Σ_i loss_i + ‖w‖²/(2C)`` with a free intercept: `sklearn.linear_model.LogisticRegression(C=C)` (sigmoid
    for two classes, softmax for more) on the same features (N, r). Newton's method, its steps by preconditioned
    conjugate gradients; each C starts from the two before.

    A fit ends where half the squared Newton decrement, which estimates the distance to the minimum, is below
    ``tolerance`` of the objective. A bound on the gradient, scikit-learn's rule, ends at once for C ≥ 100, where a
    nearly separable problem has small gradients far from its minimum.
    """
    a, kept = np.ascontiguousarray(rows), []
    target = (y[:, None] if classes == 2 else np.eye(classes)[y]).astype(np.float64)
    nothing = np.zeros((a.shape[1], target.shape[1]), a.dtype)
    point = _Point.of(nothing, np.zeros(target.shape[1]), np.zeros_like(target), target)
    gram, exact, past = _gram(a), False, [(0.0, point)]
    factor: _Factor | None = None
    # Steps of conjugate gradients that cost about as much as a factor of the Hessian.
    patience = max(20, a.shape[1] // 12)
    for c in cs:
        penalty, rebuilt = 1 / c, exact
        point = _predicted(past if past[0][0] else past[-1:], c, target)
        if exact:
            factor = _Factor.exact(a, point, penalty)
        for _ in range(50):
            if factor is None or (not exact and not 1 / _STALE <= point.curvature / penalty / factor.ratio <= _STALE):
                factor = _Factor.shared(gram, point, penalty)
            step = _newton_step(a, point, target, penalty, factor, patience)
            moved = _descended(point, step, target, penalty)
            # A step that patience ended understates the decrement, most where the preconditioner is poor.
            complete = rebuilt or step.iterations < patience
            finished = complete and -step.slope <= 2 * tolerance * moved.value(penalty)
            stuck, point = moved is point, moved
            if finished or stuck:
                break
            if step.iterations == patience:
                # The rows differ too much in curvature for their mean to serve.
                factor, exact, rebuilt = _Factor.exact(a, point, penalty), True, True
        past = [past[-1], (c, point)]
        kept.append(np.vstack([point.w.astype(np.float64), point.b[None, :]]))
    return np.stack(kept)


def fit_path(x: np.ndarray, y: np.ndarray, kind: str, classes: int) -> tuple[Standardizer, np.ndarray]:
    """The standardizer of the training rows, and coefficients (strengths, r + 1, outputs) for `predict`."""
    if kind == "regression":
        standardizer = Standardizer.of(x.astype(np.float64))
        return standardizer, ridge_path(standardizer.rows, y).T[:, :, None]
    standardizer = Standardizer.of(x, np.float32)
    return standardizer, logistic_path(standardizer.rows, y, classes)


def predict(features: np.ndarray, w: np.ndarray, kind: str) -> np.ndarray:
    """Predictions (N,) of a regression, or probabilities (N, classes), at the coefficients (r + 1, outputs)."""
    logits = (features @ w[:-1].astype(features.dtype)).astype(np.float64) + w[-1]
    if kind == "regression":
        return logits[:, 0]
    if logits.shape[1] == 1:
        # Not 1 - p for the other class: sure predictions would all be the same.
        return torch.sigmoid(torch.from_numpy(np.column_stack([-logits, logits]))).numpy()
    return torch.softmax(torch.from_numpy(logits), 1).numpy()
