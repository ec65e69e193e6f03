"""The bundled cohort and tokenizer, as committed: cheap checks that need no generator.

`python -m pytest tests/test_cohort.py -k bag_of_words -s` prints the reference figures of recipes/data/README.md.
"""

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score, root_mean_squared_error
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

DATA = Path(__file__).parents[2] / "recipes" / "data"
SPLITS = ("train", "validation", "test")
NEVER_WRITTEN = ("social history", "never smoked", "socioeconomic", "currently has", "(disorder)", "(finding)")


def load(name):
    """A committed table as a dict of numpy arrays; missing labels are NaN."""
    table = pq.read_table(DATA / "cohort" / f"{name}.parquet").to_pydict()
    labels = ("died_within_5y", "acute_within_1y")
    return {key: np.array(column, dtype=float if key in labels else None) for key, column in table.items()}


@pytest.fixture(scope="module")
def notes():
    return load("notes")


@pytest.fixture(scope="module")
def patients():
    return load("patients")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "encoder")


def test_columns_and_size(notes, patients):
    assert list(patients) == ["patient_id", "sex", "birth_date", "death_date", "split"]
    assert list(notes) == [
        *("patient_id", "time", "note_seq", "note_type", "text", "age"),
        *("died_within_5y", "acute_within_1y", "split"),
    ]
    assert list(load("observations")) == ["patient_id", "time", "code", "value", "unit", "name"]
    assert sum(path.stat().st_size for path in (DATA / "cohort").iterdir()) <= 4_000_000


def test_each_patient_is_in_one_split_of_the_right_size(notes, patients):
    assert len(set(patients["patient_id"])) == len(patients["patient_id"])
    split = dict(zip(patients["patient_id"], patients["split"], strict=True))
    assert set(split) == set(notes["patient_id"])
    assert all(split[patient] == part for patient, part in zip(notes["patient_id"], notes["split"], strict=True))
    shares = [np.mean(patients["split"] == part) for part in SPLITS]
    np.testing.assert_allclose(shares, (0.7, 0.15, 0.15), atol=0.01)


def test_rows_are_sorted_and_notes_adjacent(notes):
    order = np.lexsort((notes["note_seq"], notes["time"], notes["patient_id"]))
    np.testing.assert_array_equal(order, np.arange(len(order)))
    starts = np.flatnonzero(np.diff(notes["patient_id"], prepend=-1))
    counts = np.diff(starts, append=len(order))
    assert counts.min() >= 2
    assert counts.max() <= 24
    np.testing.assert_array_equal(notes["note_seq"], np.arange(len(order)) - np.repeat(starts, counts))
    repeated = (notes["text"][1:] == notes["text"][:-1]) & (notes["note_seq"][1:] > 0)
    assert not repeated.any()


def test_observations_are_sorted_and_within_the_notes(notes):
    values = load("observations")
    order = np.lexsort((values["code"], values["time"], values["patient_id"]))
    np.testing.assert_array_equal(order, np.arange(len(order)))
    assert len(set(values["code"])) == 40
    assert np.isfinite(values["value"]).all()
    times = {patient: notes["time"][notes["patient_id"] == patient] for patient in set(notes["patient_id"])}
    last = np.array([times[patient].max() for patient in values["patient_id"]])
    first = np.array([times[patient].min() for patient in values["patient_id"]])
    assert (values["time"] <= last).all()
    assert (values["time"] >= first - timedelta(days=365)).all()


def test_death_label_follows_from_the_death_date(notes, patients):
    death = dict(zip(patients["patient_id"], patients["death_date"], strict=True))
    for patient, time, died in zip(notes["patient_id"], notes["time"], notes["died_within_5y"], strict=True):
        if death[patient] is None:
            assert died == 0
            continue
        days = (death[patient] - time.date()).days
        assert days >= 0
        if days != 5 * 365:  # the date alone does not decide that day
            assert died == (days < 5 * 365)


def test_acute_label_is_missing_only_where_death_forestalls_it(notes):
    missing = np.isnan(notes["acute_within_1y"])
    assert 0 < missing.mean() < 0.1
    assert (notes["died_within_5y"][missing] == 1).all()


@pytest.mark.parametrize("label", ["died_within_5y", "acute_within_1y"])
def test_both_classes_in_each_split(notes, label):
    for part in SPLITS:
        assert 0.05 < np.nanmean(notes[label][notes["split"] == part]) < 0.7


def test_text_carries_no_name_and_nothing_of_the_future(notes):
    assert max(map(len, notes["text"])) <= 1500
    for text, age in zip(notes["text"], notes["age"], strict=True):
        assert f"History of Present Illness: Patient is a {int(age + 0.02)} year-old" in text or (
            f"History of Present Illness: Patient is a {int(age - 0.02)} year-old" in text
        )
        assert not any(phrase in text.lower() for phrase in NEVER_WRITTEN)


def test_tokenizer_and_config_fit_each_other(notes, tokenizer):
    config = AutoConfig.from_pretrained(DATA / "encoder")
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 128 <= config.max_position_embeddings
    assert config.vocab_size == len(tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert AutoModelForMaskedLM.from_config(config).num_parameters() < 2_000_000
    ids = tokenizer(list(notes["text"][::10]), truncation=True)["input_ids"]
    assert max(map(len, ids)) == 128
    unknown = np.mean([token == tokenizer.unk_token_id for row in ids for token in row])
    assert unknown < 1e-4
    text = "patient is a 64 year - old female with chronic kidney disease stage 3."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_files_name_no_place_on_a_disk():
    for path in (DATA / "encoder").glob("*.json"):
        words = json.dumps(json.loads(path.read_text()))
        assert "_name_or_path" not in words
        assert "/tmp" not in words


@pytest.mark.slow
def test_a_bag_of_words_is_above_chance_and_below_the_ceiling(notes, tokenizer):
    ends = tokenizer(list(notes["text"]), truncation=True, return_offsets_mapping=True)["offset_mapping"]
    first = [text[: spans[-2][1]] for text, spans in zip(notes["text"], ends, strict=True)]
    train, test = notes["split"] == "train", notes["split"] == "test"
    for name, texts in (("whole notes", list(notes["text"])), ("first 128 tokens", first)):
        x = TfidfVectorizer(min_df=3, sublinear_tf=True).fit(np.array(texts)[train]).transform(texts)
        auroc = {}
        for label in ("acute_within_1y", "died_within_5y"):
            known = ~np.isnan(notes[label])
            model = LogisticRegression(max_iter=1000).fit(x[train & known], notes[label][train & known])
            auroc[label] = roc_auc_score(notes[label][test & known], model.decision_function(x[test & known]))
        model = LogisticRegression(max_iter=1000).fit(x[train], notes["note_type"][train])
        correct = np.mean(model.predict(x[test]) == notes["note_type"][test])
        age = Ridge(1.0).fit(x[train], notes["age"][train]).predict(x[test])
        rmse, r2 = root_mean_squared_error(notes["age"][test], age), r2_score(notes["age"][test], age)
        print(f"\n{name}: " + ", ".join(f"{label} AUROC {value:.3f}" for label, value in auroc.items()), end="; ")
        print(f"note_type accuracy {correct:.3f}; age RMSE {rmse:.2f} years, R2 {r2:.3f}")
        assert 0.6 < auroc["acute_within_1y"] < 0.9
        assert 0.5 < auroc["died_within_5y"] < 0.9
        assert 0.1 < r2 < 0.9
