"""Probes against scikit-learn, bootstrap against a slow reference, a protocol that cannot see the test patients."""

import datetime
import stat
import time
import warnings

import datasets
import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.preprocessing import StandardScaler

from hf_densefeat.evaluation.embeddings import embed
from hf_densefeat.evaluation.linear import ALPHAS, CS, Design, logistic_path, ridge_path
from hf_densefeat.evaluation.metrics import (
    adjusted_rand,
    auroc,
    average_precision,
    macro_f1,
    mutual_information,
    patient_weights,
)
from hf_densefeat.evaluation.probes import ProbeEvaluator, meds_predictions, paired_difference, probe
from hf_densefeat.evaluation.tasks import ProbeTask, split_patients, task_rows


class LetterCounts(torch.nn.Module):
    """An encoder of the plainest kind: how often each letter occurs, times a weight. Counts its calls."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((26,), scale))
        self.seen = []

    def encode(self, texts, batch_size=32):
        self.seen.append(list(texts))
        return torch.tensor([[text.count(chr(97 + i)) for i in range(26)] for text in texts]) * self.scale.detach()


def notes(patients=120, each=3, seed=0):
    """Notes of random letters; `sick` shows in the letter x, `grade` and `age` in the first four letters."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3, size=(patients * each, 26))
    sick = rng.random(len(counts)) < 0.4
    counts[sick, 23] += 12
    texts = ["".join(chr(97 + i) * n for i, n in enumerate(row)) + " " for row in counts]
    score = counts[:, :4] @ np.array([1.0, -1.0, 0.5, 2.0])
    return datasets.Dataset.from_dict(
        {
            "patient_id": [f"p{i // each}" for i in range(len(texts))],
            "text": texts,
            "sick": sick.tolist(),
            "grade": np.digitize(score, np.quantile(score, [0.33, 0.66])).tolist(),
            "age": (40 + 5 * score).tolist(),
            "coin": rng.integers(0, 2, len(texts)).tolist(),
        }
    )


TASKS = [
    ("sick", "binary"),
    ("grade", "multiclass"),
    ("age", "regression"),
    ("grade", "clustering"),
]


def tasks(table):
    return [ProbeTask(f"{label}_{kind}", table, label, kind) for label, kind in TASKS]


def features(n, d, classes, seed=0):
    """Embeddings with a falling spectrum and a common mean, labels of a noisy linear rule."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    z = (rng.normal(size=(n, d)) * np.linspace(3, 0.1, d)) @ turn + rng.normal(size=d)
    logits = (z - z.mean(0)) @ rng.normal(size=(d, classes))
    return z.astype(np.float32), (1.5 * logits / logits.std() + rng.gumbel(size=logits.shape)).argmax(1)


def thirds(n):
    return np.repeat([0, 1, 2], [n - 2 * (n // 4), n // 4, n // 4])


# ------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize(("n", "d", "classes"), [(300, 20, 2), (40, 60, 2), (300, 20, 4), (40, 60, 3)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_logistic_path_equals_scikit_learn(n, d, classes, dtype):
    """Every C of the path gives scikit-learn's probabilities, with fewer and with more rows than columns."""
    z, y = features(n, d, classes)
    design = Design.of(z, dtype)
    x = StandardScaler().fit_transform(z.astype(np.float64))
    strengths = (1e-4, 1e-2, 1.0, 10.0)
    for c, w in zip(strengths, logistic_path(design, y, classes, strengths, tolerance=1e-7), strict=True):
        expected = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, y).predict_proba(x)
        logits = design(z) @ w
        p = 1 / (1 + np.exp(-logits)) if classes == 2 else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(p[:, -1], expected[:, -1], atol=2e-4)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (40, 60)])
def test_ridge_path_equals_scikit_learn(n, d):
    """Every penalty of the path gives scikit-learn's predictions."""
    z, _ = features(n, d, 2)
    y = z @ np.linspace(-1, 1, d) + np.random.default_rng(1).normal(size=n)
    x = StandardScaler().fit_transform(z.astype(np.float64))
    design = Design.of(z.astype(np.float64))
    for alpha, w in zip(ALPHAS, ridge_path(design, y - y.mean()).T, strict=True):
        expected = Ridge(alpha=n * alpha, tol=1e-10).fit(x, y).predict(x)
        np.testing.assert_allclose(design(z) @ w + y.mean(), expected, rtol=1e-4, atol=1e-3)


def test_constant_columns_do_no_harm():
    """A dead feature neither divides by zero nor changes the fit."""
    z, y = features(200, 10, 2)
    dead = np.column_stack([z, np.full(200, 7.1, dtype=np.float32)])
    one = probe(z, y, np.arange(200), thirds(200), "binary", bootstraps=0)
    two = probe(dead, y, np.arange(200), thirds(200), "binary", bootstraps=0)
    assert one.metrics["auroc"].value == pytest.approx(two.metrics["auroc"].value, abs=1e-3)


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
        key=lambda model: _area(y[split == 1], model.predict_proba(x[split == 1])),
    )
    expected = _area(y[split == 2], best.predict_proba(x[split == 2]))
    assert result.metrics["auroc"].value == pytest.approx(expected, abs=0.002)
    # About 15 on an idle core; the bound leaves room for a busy one.
    assert theirs / min(ours) > 4


def _area(y, p):
    return metrics.roc_auc_score(y, p[:, 1]) if p.shape[1] == 2 else metrics.roc_auc_score(y, p, multi_class="ovr")


# ------------------------------------------------------------------------------------------------------- metrics


@pytest.fixture
def scored():
    """Labels, scores with many ties, patients, and integer bootstrap weights."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 80)
    score = np.round(y + rng.normal(size=80), 1)
    patient = np.repeat(np.arange(20), 4)
    return y, score, patient, patient_weights(patient, 30, seed=1)


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
    weights = patient_weights(np.arange(200), 200)
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
        assert value["auroc"] == pytest.approx(_area(found.y, found.output))
        assert value["macro_f1"] == pytest.approx(metrics.f1_score(found.y, predicted, average="macro"))
    if kind == "binary":
        assert value["brier"] == pytest.approx(metrics.brier_score_loss(found.y, found.output[:, 1]))
        assert value["auprc"] == pytest.approx(metrics.average_precision_score(found.y, found.output[:, 1]))
    for estimate in found.metrics.values():
        assert estimate.low <= estimate.value <= estimate.high


# ------------------------------------------------------------------------------------------------- what it can find


def test_planted_linear_label_is_found_and_shuffled_labels_are_not():
    """AUROC 1.0 and R² 1.0 for a rule in the features; shuffled labels stay at chance over eight shuffles."""
    table = notes()
    found = ProbeEvaluator(tasks(table), cache=False)(LetterCounts())
    assert found["sick_binary_auroc"] == 1.0
    assert found["age_regression_r2"] == pytest.approx(1.0, abs=1e-4)
    z, y = features(900, 8, 2)
    rng = np.random.default_rng(0)
    chance = [
        probe(z, rng.permutation(y), np.arange(900), thirds(900), "binary", bootstraps=0).metrics["auroc"].value
        for _ in range(8)
    ]
    assert np.mean(chance) == pytest.approx(0.5, abs=0.03)


def test_test_labels_do_not_reach_the_fit():
    """Changing the labels of test rows changes neither the strength chosen nor any prediction."""
    z, y = features(400, 12, 2)
    split = thirds(400)
    turned = np.where(split == 2, 1 - y, y)
    one, two = (probe(z, labels, np.arange(400), split, "binary", bootstraps=0) for labels in (y, turned))
    assert one.strength == two.strength
    assert one.threshold == two.threshold
    np.testing.assert_array_equal(one.output, two.output)


def test_interval_covers_and_counts_patients_not_rows():
    """Copies of a patient's rows leave the interval as it is; as rows they would halve it."""
    z, y = features(600, 6, 2)
    split, patient = thirds(600), np.arange(600)
    copies = np.repeat(np.arange(600), 4)
    once = probe(z, y, patient, split, "binary").metrics["auroc"]
    grouped = probe(z[copies], y[copies], patient[copies], split[copies], "binary").metrics["auroc"]
    as_rows = probe(z[copies], y[copies], np.arange(2400), split[copies], "binary").metrics["auroc"]
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.1)
    assert as_rows.high - as_rows.low < 0.6 * (once.high - once.low)


def test_paired_difference_is_narrower_than_unpaired():
    """Two encoders on the same patients: the better one is seen although the two intervals overlap."""
    z, y = features(1200, 20, 2)
    noisy = z + np.random.default_rng(0).normal(size=z.shape)
    good, bad = (probe(x, y, np.arange(1200), thirds(1200), "binary") for x in (z, noisy))
    difference = paired_difference(good, bad)["auroc"]
    assert difference.value == pytest.approx(good.metrics["auroc"].value - bad.metrics["auroc"].value)
    assert difference.low > 0
    separate = good.metrics["auroc"].high - good.metrics["auroc"].low
    assert difference.high - difference.low < separate
    other = probe(z, y, np.arange(1200), thirds(1200)[::-1], "binary")
    with pytest.raises(ValueError, match="test rows differ"):
        paired_difference(good, other)
    with pytest.raises(ValueError, match="same number"):
        paired_difference(good, probe(z, y, np.arange(1200), thirds(1200), "binary", bootstraps=10))


def test_few_shot_curve_rises_and_samples_are_nested(monkeypatch):
    """More shots, better probe; the k-shot rows are among the 2k-shot rows; k above every class is left out."""
    z, y = features(800, 10, 2)
    fitted, original = [], Design.of.__func__
    monkeypatch.setattr(Design, "of", classmethod(lambda cls, x, *rest: fitted.append(x) or original(cls, x, *rest)))
    found = probe(z, y, np.arange(800), thirds(800), "binary", bootstraps=20, shots=(1, 4, 16, 64, 4096), draws=2)
    assert list(found.shots) == [1, 4, 16, 64]
    assert found.shots[64].value > found.shots[1].value
    samples = [{tuple(row) for row in x} for x in fitted[1:5]]
    assert [len(sample) for sample in samples] == [2, 8, 32, 128]
    assert samples[0] < samples[1] < samples[2] < samples[3]


# -------------------------------------------------------------------------------------------------------- splits


def test_split_is_by_patient_stratified_and_independent_of_row_order():
    """70/15/15 of the patients, no patient twice, a rare outcome in every part."""
    patient = np.repeat(np.arange(200), 3)
    y = (patient % 20 == 0).astype(int)
    split = split_patients(patient, y, "binary", seed=3)
    shares = np.array([len(np.unique(patient[split == code])) for code in range(3)])
    assert shares.sum() == 200
    np.testing.assert_allclose(shares, [140, 30, 30], atol=2)
    assert all(y[split == code].sum() > 0 for code in range(3))
    table, order = notes(), np.random.default_rng(0).permutation(360)
    task, shuffled = ProbeTask("t", table, "sick"), ProbeTask("t", table.select(order), "sick")
    np.testing.assert_array_equal(task_rows(task).split[order], task_rows(shuffled).split)


def test_given_splits_are_used_and_validation_is_cut_from_train():
    """A split column, MEDS names, a mapping of splits; without validation, whole training patients serve."""
    table = notes()
    names = ["train"] * 240 + ["tuning"] * 60 + ["held_out"] * 60
    rows = task_rows(ProbeTask("t", table.add_column("split", names), "sick"))
    np.testing.assert_array_equal(rows.split, np.repeat([0, 1, 2], [240, 60, 60]))
    parts = datasets.DatasetDict({"train": table.select(range(300)), "test": table.select(range(300, 360))})
    rows = task_rows(ProbeTask("t", parts, "sick"))
    assert set(rows.split[:300]) == {0, 1}
    assert not set(rows.patient[rows.split == 0]) & set(rows.patient[rows.split == 1])
    assert 0.1 < (rows.split[:300] == 1).mean() < 0.2


def test_clusters_need_no_training_rows_and_probes_say_that_they_do():
    """A table of held-out notes alone can be clustered; a probe of it is refused by the name of the empty split."""
    table = notes().add_column("split", ["test"] * 360)
    result = ProbeEvaluator([ProbeTask("t", table, "grade", "clustering")], 10, cache=False).evaluate(LetterCounts())[
        "t"
    ]
    assert len(result.y) == 360
    assert np.isfinite(result.metrics["ari"].value)
    with pytest.raises(ValueError, match="the train split has 0 labelled rows"):
        task_rows(ProbeTask("t", table, "sick"))


def test_planted_leak_across_given_splits_is_refused_without_naming_the_patient():
    """One patient in train and test stops the probe; the error counts, and does not quote the id."""
    table = notes()
    names = ["train"] * 241 + ["validation"] * 59 + ["test"] * 60
    with pytest.raises(ValueError, match="1 patients have rows in more than one split") as error:
        task_rows(ProbeTask("t", table.add_column("split", names), "sick"))
    assert "p80" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "nothing"}, "needs the column 'nothing'"),
        ({"patient": "nobody"}, "needs the column 'nobody'"),
        ({"label": "grade"}, "3 different values, exactly two"),
        ({"kind": "ordinal"}, "expected a kind among"),
        ({"split": "coin"}, "expected split names among"),
    ],
)
def test_bad_tasks_are_refused_before_encoding(change, message):
    """What was expected, what came, which task."""
    fields = {"name": "t", "dataset": notes(), "label": "sick"} | change
    with pytest.raises(ValueError, match=message):
        ProbeEvaluator([ProbeTask(**fields)])


def test_rows_without_label_are_left_out_and_counted():
    """None and NaN are no label; every other row keeps its place in the table."""
    table = notes()
    age = [None if i % 5 == 0 else value for i, value in enumerate(table["age"])]
    gaps = table.remove_columns("age").add_column("age", age)
    result = ProbeEvaluator([ProbeTask("t", gaps, "age", "regression")], 10, cache=False).evaluate(LetterCounts())["t"]
    assert result.rows["unlabelled"] == 72
    assert not np.isin(result.test_index, np.arange(0, 360, 5)).any()
    np.testing.assert_allclose(result.y, np.array(table["age"])[result.test_index])


def test_too_few_patients_are_refused():
    """Two patients cannot fill three splits."""
    with pytest.raises(ValueError, match="split has 0 labelled rows"):
        task_rows(ProbeTask("t", notes(patients=2, each=10), "age", "regression"))


# ---------------------------------------------------------------------------------------- embeddings and evaluator


def test_texts_are_encoded_once_longest_first():
    """Repeated texts share one embedding, in the order of the request."""
    model = LetterCounts()
    z = embed(model, ["a", "bbb", "a", "cc"])
    assert model.seen == [["bbb", "cc", "a"]]
    np.testing.assert_array_equal(z[:, :3], [[1, 0, 0], [0, 3, 0], [1, 0, 0], [0, 0, 2]])


def test_cache_is_private_and_keyed_by_weights_and_texts(tmp_path):
    """A second look reads the file; other weights or other texts do not; nobody else may read it; no text is in it."""
    folder, texts = tmp_path / "cache", ["sentinel alpha", "sentinel beta"]
    model = LetterCounts()
    first = embed(model, texts, cache=folder)
    np.testing.assert_array_equal(embed(model, texts, cache=folder), first)
    assert len(model.seen) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    embed(LetterCounts(2.0), texts, cache=folder)
    embed(model, texts[:1], cache=folder)
    assert len(model.seen) == 2
    assert len(list(folder.iterdir())) == 3
    assert not any(b"sentinel" in file.read_bytes() for file in folder.iterdir())


def test_evaluator_gives_flat_numbers_for_a_trainer(tmp_path):
    """Task and metric in the name, floats only, equal to the values of `evaluate`, and nothing on disk."""
    evaluator = ProbeEvaluator(tasks(notes()), bootstraps=20, shots=(1, 8), cache=tmp_path)
    flat = evaluator(LetterCounts(), None)
    assert not list(tmp_path.iterdir())
    assert {"sick_binary_auroc", "age_regression_rmse", "grade_clustering_ari", "probe_seconds"} <= flat.keys()
    assert all(isinstance(value, float) for value in flat.values())
    results = evaluator.evaluate(LetterCounts())
    assert list(tmp_path.iterdir())
    for task, result in results.items():
        for name, estimate in result.metrics.items():
            assert flat[f"{task}_{name}"] == pytest.approx(estimate.value)
            assert len(result.replicates[name]) == 20
    assert list(results["sick_binary"].shots) == [1, 8]
    assert results["sick_binary"].rows["patients"] < results["sick_binary"].rows["test"]


def test_diverged_encoder_is_named():
    """NaN embeddings raise instead of scoring chance."""
    with pytest.raises(ValueError, match="diverged"):
        ProbeEvaluator(tasks(notes()), cache=False)(LetterCounts(float("nan")))


def test_meds_predictions_have_the_schema_and_the_rows():
    """Types and names of meds-evaluation's PredictionSchema; each row is the patient and label it speaks of."""
    table = notes()
    days = [datetime.datetime(2020, 1, 1) + datetime.timedelta(days=i) for i in range(len(table))]
    table = table.map(lambda row: {"subject_id": int(row["patient_id"][1:])}).add_column("time", days)
    task = ProbeTask("t", table, "sick", patient="subject_id")
    result = ProbeEvaluator([task], 0, cache=False).evaluate(LetterCounts())["t"]
    found = meds_predictions(task, result)
    assert [str(kind) for kind in found.schema.types] == ["int64", "timestamp[us]", "bool", "bool", "float"]
    rows = table.select(result.test_index)
    assert found["subject_id"].to_pylist() == list(rows["subject_id"])
    assert found["boolean_value"].to_pylist() == list(rows["sick"])
    assert found["prediction_time"].to_pylist() == list(rows["time"])
    with pytest.raises(ValueError, match="need a binary task"):
        meds_predictions(ProbeTask("t", table, "age", "regression"), result)
    with pytest.raises(ValueError, match="subject ids are integers"):
        meds_predictions(ProbeTask("t", table, "sick"), result)
