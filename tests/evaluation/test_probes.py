"""Probes: what they find, a protocol that cannot see the test patients, splits, the cache."""

import datetime
import json
import stat
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from letters import LetterCounts, features, notes, tasks, thirds

from hf_densefeat.data.splits import SplitRecord, hold_out, split_by_patient
from hf_densefeat.evaluation import embeddings, probes
from hf_densefeat.evaluation.embeddings import embed
from hf_densefeat.evaluation.metrics import paired_difference
from hf_densefeat.evaluation.probes import ProbeEvaluator, meds_predictions, probe
from hf_densefeat.evaluation.tasks import ProbeTask, task_rows

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
    fitted, original = [], probes.fit_path
    monkeypatch.setattr(probes, "fit_path", lambda x, *rest: fitted.append(x) or original(x, *rest))
    found = probe(z, y, np.arange(800), thirds(800), "binary", bootstraps=20, shots=(1, 4, 16, 64, 4096), draws=2)
    assert list(found.shots) == [1, 4, 16, 64]
    assert found.shots[64].value > found.shots[1].value
    samples = [{tuple(row) for row in x} for x in fitted[1:5]]
    assert [len(sample) for sample in samples] == [2, 8, 32, 128]
    assert samples[0] < samples[1] < samples[2] < samples[3]


# -------------------------------------------------------------------------------------------------------- splits


def test_split_is_that_of_pretraining():
    """Without a split column the test patients are `split_by_patient`'s, labelled or not, in any order of the rows."""
    table, order = notes(), np.random.default_rng(0).permutation(360)
    some = [None if i % 7 == 0 else value for i, value in enumerate(table["sick"])]
    task = ProbeTask("t", table.remove_columns("sick").add_column("sick", some), "sick")
    rows, parts = task_rows(task, seed=3), split_by_patient(table, seed=3)
    for code, name in enumerate(("train", "validation", "test")):
        own = {table[int(i)]["patient_id"] for i in rows.index[rows.split == code]}
        assert own <= set(parts[name]["patient_id"])
    shuffled = task_rows(ProbeTask("t", table.select(order), "sick"), seed=3)
    np.testing.assert_array_equal(task_rows(ProbeTask("t", table, "sick"), seed=3).split[order], shuffled.split)


def test_stratified_where_asked():
    """A rare outcome is in every part, patients are whole, 70/15/15."""
    table = notes(200)
    patient = np.repeat(np.arange(200), 3)
    table = table.add_column("rare", (patient % 20 == 0).tolist())
    rows = task_rows(ProbeTask("t", table, "rare", stratify=True), seed=3)
    shares = np.array([len(np.unique(patient[rows.split == code])) for code in range(3)])
    assert shares.sum() == 200
    np.testing.assert_allclose(shares, [140, 30, 30], atol=2)
    assert all(rows.y[rows.split == code].sum() > 0 for code in range(3))


def test_patients_that_were_trained_on_are_refused():
    """By their number, in another table too; not where split as the record says, nor where told."""
    table = notes(200)
    (parts, record), model = hold_out(table, seed=42), LetterCounts()
    model.config = SimpleNamespace(densefeat={"split": json.loads(json.dumps(record.to_dict()))}, to_json_string=str)
    task, trained = ProbeTask("t", table, "sick"), set(parts["train"]["patient_id"])
    rows = task_rows(task)
    test = {table[int(i)]["patient_id"] for i in rows.index[rows.split == 2]}
    with pytest.raises(
        ValueError, match=f"{len(test & trained)} of {len(test)} test patients were trained on"
    ) as error:
        ProbeEvaluator([task], cache=False)(model)
    assert not any(f"'{one}'" in str(error.value) for one in test)
    ProbeEvaluator([task], cache=False, allow_trained=True)(model)
    assert SplitRecord.of(model) == record
    ProbeEvaluator([task], cache=False, record=record)(model)
    part = ProbeTask("t", table.select(range(150, 600)), "sick")
    few = task_rows(part, record=record)
    assert not {part.dataset[int(i)]["patient_id"] for i in few.index[few.split == 2]} & trained
    # all rows are clustered, so with a record those of its test patients alone
    clusters = replace(task, kind="clustering")
    with pytest.raises(ValueError, match=f"{len(trained)} of 200 test patients were trained on"):
        ProbeEvaluator([clusters], cache=False)(model)
    ProbeEvaluator([clusters], cache=False, record=record)(model)
    model.config.densefeat["split"]["listed"] = True
    with pytest.raises(ValueError, match="cannot be told"):
        ProbeEvaluator([task], cache=False)(model)


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
    evaluator = ProbeEvaluator([ProbeTask("t", table, "grade", "clustering")], bootstraps=10, cache=False)
    result = evaluator.evaluate(LetterCounts())["t"]
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
        ({"split": "coin"}, "no split or one of another name"),
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
    result = ProbeEvaluator([ProbeTask("t", gaps, "age", "regression")], bootstraps=10, cache=False).evaluate(
        LetterCounts()
    )["t"]
    assert result.rows["unlabelled"] == 72
    assert not np.isin(result.test_index, np.arange(0, 360, 5)).any()
    np.testing.assert_allclose(result.y, np.array(table["age"])[result.test_index])


def test_too_few_patients_are_refused():
    """Two patients cannot fill three splits."""
    with pytest.raises(ValueError, match="Expected at least 3 patients"):
        task_rows(ProbeTask("t", notes(patients=2, each=10), "age", "regression"))


# ---------------------------------------------------------------------------------------- embeddings and evaluator


def test_texts_are_encoded_once():
    """Repeated texts share one embedding, in the order of the request."""
    model = LetterCounts()
    z = embed(model, ["a", "bbb", "a", "cc"])
    assert model.seen == [["a", "bbb", "cc"]]
    np.testing.assert_array_equal(z[:, :3], [[1, 0, 0], [0, 3, 0], [1, 0, 0], [0, 0, 2]])


def test_cache_is_private_and_keyed_by_weights_precision_and_texts(tmp_path, monkeypatch):
    """A second look reads the file; other weights, precision or texts do not; nobody else may read it; no text is in it."""
    folder, texts = tmp_path / "cache", ["sentinel alpha", "sentinel beta"]
    model = LetterCounts()
    first = embed(model, texts, cache=folder)
    np.testing.assert_array_equal(embed(model, texts, cache=folder), first)
    assert len(model.seen) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    monkeypatch.setattr(embeddings, "precision_of", lambda model: "bfloat16")
    embed(model, texts, cache=folder)
    assert len(model.seen) == 2
    monkeypatch.undo()
    embed(LetterCounts(2.0), texts, cache=folder)
    embed(model, texts[:1], cache=folder)
    assert len(model.seen) == 3
    assert len(list(folder.iterdir())) == 4
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
    result = ProbeEvaluator([task], bootstraps=0, cache=False).evaluate(LetterCounts())["t"]
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


def test_a_class_that_was_never_trained_is_counted():
    """It is among the test rows alone: the number stands beside the AUROC, of which its share is a guess."""
    rng = np.random.default_rng(0)
    y = np.array([0, 1] * 20 + [2] * 4 + [0, 1] * 4)
    split = np.array([0] * 30 + [1] * 10 + [2] * 12)
    found = probe(rng.normal(size=(52, 4)), y, np.arange(52), split, "multiclass", bootstraps=0)
    assert found.rows["classes_without_training_rows"] == 1
    known = probe(rng.normal(size=(52, 4)), y % 2, np.arange(52), split, "multiclass", bootstraps=0)
    assert "classes_without_training_rows" not in known.rows
