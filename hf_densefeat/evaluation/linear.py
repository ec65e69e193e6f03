"""Linear probes at every strength: ridge regression in one fit, logistic regression by warm-started L-BFGS.

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
