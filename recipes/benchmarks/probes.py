"""The whole path of linear probes against scikit-learn's `LogisticRegressionCV`, in time and in AUROC at every C.

Measured on one thread: 4 to 33 times its default (five folds), 7 to 25 times `newton-cholesky`, its solver that always
keeps within 0.002 of the minimum, and 1.3 to 10 times L-BFGS on the same split, which at 1,000 rows and 768 columns stops
0.005 from the minimum.

Tried, and what each cost or saved at 5,000 x 768: rotating the rows to their principal axes (60 ms for the product, 48 ms
for the eigenvectors) against a Cholesky factor every second C (7 x 4 ms); no preconditioner (errors of 0.002 to 0.05); all
C at once (a product with 13 columns costs as much as 13 with one); products by PyTorch (0.35 ms) against NumPy (0.24 ms).
What is left is the Gram matrix (30 ms), the factors (27 ms) and some 100 products of the rows (30 to 50 ms).
"""

import argparse
import warnings
from functools import partial

import numpy as np
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from benchmarks.timing import alternate, spread
from hf_densefeat.evaluation.linear import CS, fit_path, predict
from hf_densefeat.evaluation.metrics import class_auroc

SHAPES = ((1000, 384), (5000, 384), (1000, 768), (5000, 768))
VALIDATION = 1500


def embeddings(rows: int, width: int, decades: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a spectrum that falls by so many decades in amplitude, turned, and labels of a noisy linear rule."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    z = (rng.normal(size=(rows, width)) @ np.diag(np.logspace(0, -decades, width)) @ turn).astype(np.float32)
    score = z @ rng.normal(size=(width, 2))
    score += rng.normal(size=score.shape) * score.std()
    return z, score.argmax(1)


def scikit_learn(z: np.ndarray, y: np.ndarray, n: int, **options) -> np.ndarray:
    """AUROC of the validation rows at every C, in float32 like ours; nothing where it cross-validates by itself."""
    x = StandardScaler().fit(z[:n]).transform(z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that end at max_iter
        if "cv" in options:
            LogisticRegressionCV(Cs=list(CS), scoring="roc_auc", max_iter=1000, **options).fit(x[:n], y[:n])
            return np.empty(0)
        split = [(np.arange(n), np.arange(n, len(z)))]
        model = LogisticRegressionCV(
            Cs=list(CS), cv=split, scoring="roc_auc", max_iter=1000, refit=False, **options
        ).fit(x, y)
    return next(iter(model.scores_.values()))[0]


def ours(z: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """The same with `fit_path`."""
    standardizer, path = fit_path(z[:n], y[:n], "binary", 2)
    features, one = standardizer(z[n:]), np.ones((1, len(z) - n))
    return np.array([class_auroc(y[n:], predict(features, w, "binary"), one)[0] for w in path])


def exact(z: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """AUROC at every C of the minimum in float64, by Newton steps until nothing moves."""
    x = StandardScaler().fit(z[:n].astype(float)).transform(z.astype(float))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for c in CS:
            model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-11, max_iter=2000).fit(x[:n], y[:n])
            found.append(roc_auc_score(y[n:], model.decision_function(x[n:])))
    return np.array(found)


def newton_cholesky(z: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """The solver of scikit-learn that keeps within 0.002 of the minimum at every C."""
    return scikit_learn(z, y, n, solver="newton-cholesky")


def five_folds(z: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    """What `LogisticRegressionCV` does by default: five folds, and a last fit."""
    return scikit_learn(z, y, n, cv=5)


ARMS = {"ours": ours, "lbfgs": scikit_learn, "newton-cholesky": newton_cholesky, "lbfgs, 5 folds": five_folds}


def cell(rows: int, width: int, decades: float, repeats: int) -> dict:
    """One size and spectrum: seconds, ratios to ours, the largest error of the AUROC over C."""
    z, y = embeddings(rows + VALIDATION, width, decades)
    minimum = exact(z, y, rows)
    errors = {name: np.abs(ARMS[name](z, y, rows) - minimum).max() for name in ("ours", "lbfgs", "newton-cholesky")}
    seconds = alternate({name: partial(arm, z, y, rows) for name, arm in ARMS.items()}, repeats)
    return {
        "rows": rows,
        "width": width,
        "decades of the spectrum": decades,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times ours": {name: spread(values / seconds["ours"]) for name, values in seconds.items() if name != "ours"},
        "largest error of the AUROC": {name: round(float(error), 5) for name, error in errors.items()},
    }


def probes(args: argparse.Namespace) -> dict:
    """Each of four sizes with a steep and a flat spectrum."""
    cells = [cell(rows, width, decades, args.repeats) for rows, width in SHAPES for decades in (2, 1)]
    return {"strengths": len(CS), "validation rows": VALIDATION, "cells": cells}
