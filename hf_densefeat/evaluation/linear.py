"""Linear probes at every strength: ridge regression from one decomposition, logistic regression by warm-started L-BFGS.

Rows are embeddings, (N, d), or words as a SciPy CSR matrix, which stays sparse.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

Rows = Any  # an array (N, d) or a SciPy CSR matrix, which has no types

# EHRSHOT's thirteen strengths; weakest penalty last, so that each fit starts from the one before.
CS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
# Ridge penalties per training row.
ALPHAS = tuple(float(10.0**power) for power in np.arange(-6, 3.5, 0.5))


def ridge_path(rows: Rows, y: np.ndarray, alphas: Sequence[float] = ALPHAS) -> np.ndarray:
    """Coefficients (alphas, d + 1, 1) of ``min ‖y - X w - b‖² + N a ‖w‖²``; the intercept b is last.

    Equals `sklearn.linear_model.Ridge(alpha=N * a)`, which fits each penalty a > 0 anew; for sparse rows it is that.
    The columns of dense rows X, (N, d), must have mean 0.
    """
    penalties = len(y) * np.asarray(alphas)
    if not isinstance(rows, np.ndarray):
        fits = [Ridge(alpha=one, solver="sparse_cg").fit(rows, y) for one in penalties]
        return np.stack([np.append(fit.coef_, fit.intercept_)[:, None] for fit in fits])
    # Of the smaller of XᵀX and XXᵀ. Eigenvalues that rounding made negative become 0, and the penalty is above 0.
    wide = len(rows) < rows.shape[1]
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    projected = vectors.T @ (y - y.mean() if wide else rows.T @ y)
    w = vectors @ (projected[:, None] / (values.clip(0)[:, None] + penalties))
    w = rows.T @ w if wide else w
    return np.vstack([w, np.full((1, len(penalties)), y.mean())]).T[:, :, None]


def logistic_path(rows: Rows, y: np.ndarray, classes: int) -> np.ndarray:
    """Coefficients (strengths, d + 1, 1 or classes) of L2 logistic regression for each C of `CS`; the intercept is last.

    `sklearn.linear_model.LogisticRegression(C=c)`, sigmoid for two classes and softmax for more, each C from the
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
    if len(present) == classes:
        return found
    if len(present) == 2:
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
    logits = (features @ w[:-1].astype(features.dtype)).astype(np.float64) + w[-1]
    if kind == "regression":
        return logits[:, 0]
    # Softmax gives both classes; 1 - p would make all sure predictions the same number.
    return softmax(np.column_stack([np.zeros(len(logits)), logits]) if logits.shape[1] == 1 else logits, axis=1)
