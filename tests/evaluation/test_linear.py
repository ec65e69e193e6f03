"""Linear probes against scikit-learn: every penalty, the best strength, dense and sparse rows."""

import numpy as np
import pytest
from letters import area, features, thirds
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from hf_densefeat.evaluation.metrics import class_auroc
from hf_densefeat.evaluation.probes import ALPHAS, CS, fit_path, predict, probe, ridge_path


@pytest.mark.parametrize(("n", "d"), [(300, 20), (40, 60)])
@pytest.mark.parametrize("sparse", [False, True])
def test_ridge_path_equals_scikit_learn(n, d, sparse):
    """Every penalty of the path gives scikit-learn's predictions, with fewer and with more rows than columns."""
    z, _ = features(n, d, 2)
    y = z @ np.linspace(-1, 1, d) + np.random.default_rng(1).normal(size=n)
    x = csr_matrix(z.astype(float)) if sparse else StandardScaler().fit_transform(z.astype(float))
    penalties = ALPHAS[8:] if sparse else ALPHAS  # conjugate gradients on unscaled columns end early for weak ones
    for alpha, w in zip(penalties, ridge_path(x, y, penalties), strict=True):
        expected = Ridge(alpha=n * alpha, tol=1e-10).fit(x.toarray() if sparse else x, y).predict(x)
        np.testing.assert_allclose(predict(x, w, "regression"), expected, rtol=1e-3, atol=5e-3)


def test_a_class_without_training_rows_has_probability_zero():
    """Two or three classes of four among the training rows, as in few shots."""
    z, y = features(200, 10, 4)
    for present in ([1, 3], [0, 1, 3]):
        kept = np.isin(y, present)
        standard, path = fit_path(z[kept], y[kept], "multiclass", 4)
        p = predict(standard(z), path[6], "multiclass")
        model = LogisticRegression().fit(standard(z[kept]), y[kept])
        np.testing.assert_allclose(p[:, present], model.predict_proba(standard(z)), atol=2e-3)
        np.testing.assert_allclose(p.sum(1), 1)
        assert (np.delete(p, present, axis=1) == 0).all()


def test_sure_predictions_keep_their_order():
    """Log-odds of 40 and of 60 are both probability 1, and are still told apart."""
    w, x = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[60.0], [40.0], [39.0], [-50.0]])
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


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_best_strength_is_that_of_separate_fits(classes, sparse):
    """Same grid, same validation rows: test AUROC and validation loss are those of scikit-learn's fits from nothing."""
    n = 600
    z, y = features(n, 32, classes)
    split, kind = thirds(n), "binary" if classes == 2 else "multiclass"
    x = csr_matrix(z) if sparse else StandardScaler().fit(z[split == 0]).transform(z)
    result = probe(csr_matrix(z) if sparse else z, y, np.arange(n), split, kind, bootstraps=0)
    models = [LogisticRegression(C=c, max_iter=5000).fit(x[split == 0], y[split == 0]) for c in CS]
    best = max(models, key=lambda model: area(y[split == 1], model.predict_proba(x[split == 1])))
    expected = area(y[split == 2], best.predict_proba(x[split == 2]))
    assert result.metrics["auroc"].value == pytest.approx(expected, abs=0.002)
    standard, path = fit_path(x[split == 0], y[split == 0], kind, classes)
    losses = [log_loss(y[split == 1], predict(standard(x[split == 1]), w, kind)) for w in path]
    theirs = [log_loss(y[split == 1], model.predict_proba(x[split == 1])) for model in models]
    assert min(losses) == pytest.approx(min(theirs), abs=2e-3)
