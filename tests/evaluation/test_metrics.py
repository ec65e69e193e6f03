"""Weighted metrics against scikit-learn, and the bootstrap over patients against a slow reference."""

import numpy as np
import pytest
from letters import area, features, thirds
from sklearn import metrics

from hf_densefeat.evaluation.metrics import (
    PatientWeights,
    adjusted_rand,
    auroc,
    average_precision,
    macro_f1,
    mutual_information,
)
from hf_densefeat.evaluation.probes import probe


@pytest.fixture
def scored():
    """Labels, scores with many ties, patients, and integer bootstrap weights."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 80)
    score = np.round(y + rng.normal(size=80), 1)
    patient = np.repeat(np.arange(20), 4)
    return y, score, patient, PatientWeights.of(patient, 30, seed=1)[:]


def test_weighted_auroc_and_average_precision_equal_scikit_learn(scored):
    """For each weighting, ties included."""
    y, score, _, weights = scored
    area, precision = auroc(y == 1, score, weights), average_precision(y == 1, score, weights)
    for b, w in enumerate(weights):
        assert area[b] == pytest.approx(metrics.roc_auc_score(y, score, sample_weight=w), abs=1e-12)
        assert precision[b] == pytest.approx(metrics.average_precision_score(y, score, sample_weight=w), abs=1e-12)


def test_bootstrap_equals_a_slow_reference_over_patients(scored):
    """A replicate is the metric of the rows of the patients drawn, each as often as drawn."""
    y, score, patient, weights = scored
    area = auroc(y == 1, score, weights)
    for b, w in enumerate(weights):
        drawn = [p for p in range(20) for _ in range(int(w[patient == p][0]))]
        assert len(drawn) == 20
        rows = np.concatenate([np.flatnonzero(patient == p) for p in drawn])
        assert area[b] == pytest.approx(metrics.roc_auc_score(y[rows], score[rows]), abs=1e-12)


def test_f1_rand_and_information_equal_scikit_learn(scored):
    """Weighted macro-F1; ARI and NMI of the rows as they are."""
    y, score, _, weights = scored
    grade, cluster = (score > 0).astype(int) + y, np.digitize(score, [-1, 0, 1, 2])
    predicted = np.minimum(cluster, 2)
    for b, value in enumerate(macro_f1(grade, predicted, weights)):
        expected = metrics.f1_score(grade, predicted, average="macro", sample_weight=weights[b])
        assert value == pytest.approx(expected, abs=1e-12)
    one = np.ones((1, len(y)))
    assert adjusted_rand(grade, cluster, one)[0] == pytest.approx(metrics.adjusted_rand_score(grade, cluster))
    expected = metrics.normalized_mutual_info_score(grade, cluster)
    assert mutual_information(grade, cluster, one)[0] == pytest.approx(expected)


def test_redrawn_rows_do_not_raise_the_rand_index():
    """Unrelated clusters stay near 0 in every replicate, although rows are drawn twice; plain resampling would not."""
    rng = np.random.default_rng(0)
    y, cluster = rng.integers(0, 10, 200), rng.integers(0, 10, 200)
    weights = PatientWeights.of(np.arange(200), 200)[:]
    rows = [np.repeat(np.arange(200), w.astype(int)) for w in weights]
    naive = np.mean([metrics.adjusted_rand_score(y[r], cluster[r]) for r in rows])
    point = metrics.adjusted_rand_score(y, cluster)
    assert naive > point + 0.02
    assert adjusted_rand(y, cluster, weights).mean() == pytest.approx(point, abs=0.01)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_reported_values_equal_scikit_learn_on_the_reported_output(kind):
    """The numbers in the result are those of its own labels and predictions."""
    z, y = features(400, 12, 2 if kind == "binary" else 3)
    y = z @ np.ones(12) + y if kind == "regression" else y
    found = probe(z, y, np.arange(400) // 2, thirds(400), kind, bootstraps=50)
    value = {name: estimate.value for name, estimate in found.metrics.items()}
    if kind == "regression":
        assert value["rmse"] == pytest.approx(metrics.root_mean_squared_error(found.y, found.output))
        assert value["r2"] == pytest.approx(metrics.r2_score(found.y, found.output))
    else:
        predicted = found.output.argmax(1) if kind == "multiclass" else found.output[:, 1] >= found.threshold
        assert value["auroc"] == pytest.approx(area(found.y, found.output))
        assert value["macro_f1"] == pytest.approx(metrics.f1_score(found.y, predicted, average="macro"))
    if kind == "binary":
        assert value["brier"] == pytest.approx(metrics.brier_score_loss(found.y, found.output[:, 1]))
        assert value["auprc"] == pytest.approx(metrics.average_precision_score(found.y, found.output[:, 1]))
    for estimate in found.metrics.values():
        assert estimate.low <= estimate.value <= estimate.high
