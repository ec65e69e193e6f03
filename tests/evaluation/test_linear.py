"""Linear probes against scikit-learn: every strength of the path, and the time."""

import time
import warnings

import numpy as np
import pytest
from letters import area, features, thirds
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from hf_densefeat.evaluation.linear import ALPHAS, CS, Standardizer, fit_path, logistic_path, predict, ridge_path
from hf_densefeat.evaluation.metrics import class_auroc
from hf_densefeat.evaluation.probes import probe


@pytest.mark.parametrize(("n", "d", "classes"), [(300, 20, 2), (40, 60, 2), (300, 20, 4), (40, 60, 3)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_logistic_path_equals_scikit_learn(n, d, classes, dtype):
    """Every C of the path gives scikit-learn's probabilities, with fewer and with more rows than columns."""
    z, y = features(n, d, classes)
    standardizer = Standardizer.of(z, dtype)
    x = StandardScaler().fit_transform(z.astype(np.float64))
    strengths = (1e-4, 1e-2, 1.0, 10.0)
    tolerance = 1e-10 if dtype is np.float64 else 1e-7
    path = logistic_path(standardizer.rows, y, classes, strengths, tolerance=tolerance)
    for c, w in zip(strengths, path, strict=True):
        expected = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, y).predict_proba(x)
        np.testing.assert_allclose(predict(standardizer(z), w, "classes"), expected, atol=2e-4)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (40, 60)])
def test_ridge_path_equals_scikit_learn(n, d):
    """Every penalty of the path gives scikit-learn's predictions."""
    z, _ = features(n, d, 2)
    y = z @ np.linspace(-1, 1, d) + np.random.default_rng(1).normal(size=n)
    x = StandardScaler().fit_transform(z.astype(np.float64))
    standardizer = Standardizer.of(z.astype(np.float64))
    for alpha, w in zip(ALPHAS, ridge_path(standardizer.rows, y).T, strict=True):
        expected = Ridge(alpha=n * alpha, tol=1e-10).fit(x, y).predict(x)
        np.testing.assert_allclose(predict(standardizer(z), w[:, None], "regression"), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("n", "d", "slope"), [(700, 100, -2.0), (200, 150, -1.0)])
def test_weak_penalties_are_fitted_too(n, d, slope):
    """The AUROC of unseen rows is the exact solution's for every C, also where the classes can be separated.

    A path that ends by the size of the gradient keeps C = 10's solution for all larger C.
    """
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    z = (rng.normal(size=(n + 1500, d)) @ np.diag(np.logspace(0, slope, d)) @ turn).astype(np.float32)
    score = z @ rng.normal(size=d)
    y = (score + rng.normal(size=len(z)) * score.std() > 0).astype(int)
    standardizer, path = fit_path(z[:n], y[:n], "binary", 2)
    unseen, x = standardizer(z[n:]), StandardScaler().fit(z[:n].astype(float)).transform(z.astype(float))
    norms = np.linalg.norm(path[:, :-1, 0], axis=1)
    for c, w in zip(CS, path, strict=True):
        exact = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-8, max_iter=500).fit(x[:n], y[:n])
        expected = roc_auc_score(y[n:], exact.decision_function(x[n:]))
        assert class_auroc(y[n:], predict(unseen, w, "binary"), np.ones((1, 1500)))[0] == pytest.approx(
            expected, abs=0.002
        ), c
    assert (np.diff(norms) > -1e-3 * norms[1:]).all()


def test_sure_predictions_keep_their_order():
    """Log-odds of 40 and of 60 are both probability 1, and are still told apart."""
    w, x = np.array([[1.0], [0.0]]), np.array([[60.0], [40.0], [39.0], [-50.0]])
    p, y = predict(x, w, "binary"), np.array([1, 0, 1, 0])
    assert (p[:3, 1] == 1).all()
    assert class_auroc(y, p, np.ones((1, 4)))[0] == 0.75
    np.testing.assert_allclose(p[:, 0], 1 / (1 + np.exp(x[:, 0])), rtol=1e-12)


def test_constant_columns_do_no_harm():
    """A dead feature neither divides by zero nor changes the fit."""
    z, y = features(200, 10, 2)
    dead = np.column_stack([z, np.full(200, 7.1, dtype=np.float32)])
    one = probe(z, y, np.arange(200), thirds(200), "binary", bootstraps=0)
    two = probe(dead, y, np.arange(200), thirds(200), "binary", bootstraps=0)
    assert one.metrics["auroc"].value == pytest.approx(two.metrics["auroc"].value, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 5])
def test_probe_matches_logistic_regression_cv_and_is_faster(classes):
    """Same grid, same validation rows: the AUROC within 0.002 of scikit-learn's best C, in a fraction of the time."""
    n = 1600
    z, y = features(n, 192, classes)
    split, kind = thirds(n), "binary" if classes == 2 else "multiclass"
    ours = []
    for _ in range(2):
        start = time.perf_counter()
        result = probe(z, y, np.arange(n), split, kind, bootstraps=0)
        ours.append(time.perf_counter() - start)
    scaler = StandardScaler().fit(z[split == 0])
    x = scaler.transform(z)
    scoring = "roc_auc" if classes == 2 else "roc_auc_ovr"
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LogisticRegressionCV(Cs=list(CS), cv=5, scoring=scoring, max_iter=1000).fit(x[split < 2], y[split < 2])
    theirs = time.perf_counter() - start
    best = max(
        (LogisticRegression(C=c, max_iter=5000).fit(x[split == 0], y[split == 0]) for c in CS),
        key=lambda model: area(y[split == 1], model.predict_proba(x[split == 1])),
    )
    expected = area(y[split == 2], best.predict_proba(x[split == 2]))
    assert result.metrics["auroc"].value == pytest.approx(expected, abs=0.002)
    # About 15 on an idle core; the bound leaves room for a busy one.
    assert theirs / min(ours) > 4
