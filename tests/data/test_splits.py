"""Splits are by patient: none shared, none lost."""

import json

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_densefeat.data.identity import identities
from hf_densefeat.data.splits import (
    LISTED,
    SplitRecord,
    UnknownTrainingPatients,
    hold_out,
    parts_of_patients,
    split_by_patient,
    split_patients,
)


def two_patients(**columns):
    """Two notes each."""
    table = {"patient_id": [1, 1, 2, 2], "time": [0, 1, 0, 1], "text": ["a", "b", "c", "d"]}
    return datasets.Dataset.from_dict(table | columns)


@given(
    patients=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    seed=st.integers(0, 5),
    shuffle=st.integers(0, 5),
    parts=st.sampled_from([(0.5, 0.5), (0.7, 0.15, 0.15), (0.98, 0.01, 0.01), (0.2, 0.4, 0.4)]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_split_by_patient(patients, seed, shuffle, parts):
    """Splits share no patient, lose no note, are never empty, and do not depend on the order of the rows."""
    table = datasets.Dataset.from_dict(
        {"patient_id": patients, "time": [0] * len(patients), "text": list(map(str, range(len(patients))))}
    )
    if len(set(patients)) < len(parts):
        with pytest.raises(ValueError, match="Expected at least"):
            split_by_patient(table, fractions=parts, seed=seed)
        return
    first = split_by_patient(table, fractions=parts, seed=seed)
    owners = {name: set(part["patient_id"]) for name, part in first.items()}
    assert sum(map(len, owners.values())) == len(set.union(*owners.values())) == len(set(patients))
    assert sorted(int(text) for part in first.values() for text in part["text"]) == list(range(len(patients)))
    assert all(owners.values())
    assert all(
        abs(len(owners[name]) - share * len(set(patients))) <= 2 for name, share in zip(owners, parts, strict=True)
    )
    order = np.random.default_rng(shuffle).permutation(len(patients))
    again = split_by_patient(table.select(order), fractions=parts, seed=seed)
    assert owners == {name: set(part["patient_id"]) for name, part in again.items()}


def test_the_tables_own_splits():
    """A split column is kept under its known names; overlap, unknown names and gaps are refused."""
    parts = split_by_patient(two_patients(split=["train", "train", "tuning", "tuning"]))
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "validation": 2}
    with pytest.raises(ValueError, match="1 patients have rows in more than one split, first row 1"):
        split_by_patient(two_patients(split=["train", "test", "test", "test"]))
    with pytest.raises(ValueError, match="2 of 4 rows have no split or one of another name, first row 3") as error:
        split_by_patient(two_patients(split=["train", "train", None, "Jane"]))
    assert "Jane" not in str(error.value)  # the column may hold anything
    with pytest.raises(ValueError, match=r"Nobody is in validation and test.*names patients for train alone"):
        hold_out(two_patients(split=["train"] * 4), need=("train", "validation", "test"))
    assert set(split_by_patient(two_patients(split=["?"] * 4), fractions=(0.5, 0.5), split_column=None)) == {
        "train",
        "validation",
    }
    with pytest.raises(ValueError, match="add up to 1"):
        split_by_patient(two_patients(), fractions=(0.5, 0.6))


def test_record_says_where_a_patient_was():
    """From the record alone, through JSON, for patients of this table, some of them, and others; no id is in it."""
    table = datasets.Dataset.from_dict({"patient_id": list(range(500)), "time": [0] * 500, "text": ["a"] * 500})
    parts, record = hold_out(table, seed=7)
    record = SplitRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    [rule] = record.rules
    for code, name in enumerate(("train", "validation", "test")):
        assert set(rule.parts_of(parts[name]["patient_id"])) == {code}
    shares = np.bincount(rule.parts_of([f"other {i}" for i in range(4000)])) / 4000
    np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.06)
    assert set(record.to_dict()) == {"rules", "listed", "ids"}
    assert hold_out(table, fractions=(0.8, 0.2), seed=7)[1].rules[0].parts_of([1, 2, 3]).max() <= 1
    np.testing.assert_array_equal(record.trained_on(parts["train"]["patient_id"]), True)
    np.testing.assert_array_equal(record.trained_on(parts["test"]["patient_id"]), False)


def own_splits(patients, column="split"):
    """A table that brings its own splits: two of three patients train."""
    names = ["test" if one % 6 == 0 else "tuning" if one % 3 == 0 else "train" for one in patients]
    table = {"patient_id": list(patients), "time": [0] * len(patients), "text": list(map(str, patients))}
    return datasets.Dataset.from_dict(table | {column: names})


def test_a_list_says_it_where_the_table_brought_its_own_splits(tmp_path):
    """In a file for the user alone, found from a checkpoint too; without it nobody can say, unless told."""
    table = own_splits(range(60))
    parts, record = hold_out(table)
    trained, plain = set(parts["train"]["patient_id"]), table.remove_columns("split")
    record.save(tmp_path)
    assert (tmp_path / LISTED).stat().st_mode & 0o777 == 0o600
    block = json.loads(json.dumps(record.to_dict()))
    assert "key" not in str(block)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        read = SplitRecord.from_dict(block, folder)
        again = split_by_patient(plain, seed=5, record=read)
        assert set(again) == {"train", "validation", "test"}
        assert not trained & {one for name in ("validation", "test") for one in again[name]["patient_id"]}
        np.testing.assert_array_equal(
            read.trained_on([str(float(one)) for one in range(60)]), [i in trained for i in range(60)]
        )
    lost = SplitRecord.from_dict(block, tmp_path / "other" / "folder")
    with pytest.raises(UnknownTrainingPatients, match="its folder lacks _trained"):
        split_by_patient(plain, record=lost)
    assert len(split_by_patient(plain, record=lost, allow_trained=True)["test"])
    # another list is another key: two folders cannot be joined by their hashes
    assert not np.isin(record.lists[0][1], hold_out(table)[1].lists[0][1]).any()


def test_the_record_wins():
    """A table's own splits that would test who was trained on are refused by number; a record grows by what is fitted."""
    table = own_splits(range(200))
    plain = table.remove_columns("split")
    record = hold_out(plain, seed=42)[1]
    trained = np.array(plain["patient_id"])[record.trained_on(plain["patient_id"])]
    held = sum(one % 3 == 0 for one in range(200))
    with pytest.raises(ValueError, match=f"{sum(trained % 3 == 0)} of {held} validation and test patients"):
        split_by_patient(table, record=record)
    parts, grown = hold_out(table, record=record, allow_trained=True)
    assert {name: len(part) for name, part in parts.items()} == {"train": 133, "validation": 33, "test": 34}
    expected = set(trained) | set(parts["train"]["patient_id"])
    np.testing.assert_array_equal(grown.trained_on(range(200)), [one in expected for one in range(200)])
    # two models: nobody whom any was trained on is held out
    both = record | hold_out(plain, seed=7)[1]
    mixed = split_by_patient(plain, record=both)
    for name in ("validation", "test"):
        assert not both.trained_on(mixed[name]["patient_id"]).any()
    everyone = record | SplitRecord((split_patients(range(200), (0.99, 0.005, 0.005), seed=3),))
    with pytest.raises(ValueError, match="nobody is left for"):
        parts_of_patients(range(12), record=everyone)


@pytest.mark.parametrize("kind", [int, float, str, lambda one: f" {one}.0", lambda one: f"00{one}"])
def test_an_id_is_one_patient_however_it_is_written(kind):
    """The record knows him as an integer, a float, a string, as pandas writes it, and with zeros before it."""
    record = hold_out(own_splits(range(1, 100)))[1] | hold_out(own_splits(range(1, 100), "x"), seed=3)[1]
    np.testing.assert_array_equal(record.trained_on(list(map(kind, range(1, 100)))), record.trained_on(range(1, 100)))


def test_identities():
    """Whole floats are integers, zeros before a number stay, and words for nothing are missing."""
    found = identities(["1.0", " 7", "007", "NULL", "nan", "None", "\\N", "", None, "A-1.0", "-3."])
    assert found.to_pylist() == ["1", "7", "007", None, None, None, None, None, None, "A-1.0", "-3"]
    assert identities([1.0, float("nan"), 3.0]).to_pylist() == [1, None, 3]
    assert identities([1, "1", None]).to_pylist() == ["1", "1", None]
    with pytest.raises(ValueError, match="no identifiers, first row 2"):
        identities([1.0, 1.5])


def test_strata_reach_every_part():
    """Ten patients of one kind among 190 of another: both in every part, in the shares asked for."""
    stratum = np.arange(200) % 20 == 0
    codes = parts_of_patients(range(200), seed=1, stratum=stratum)
    np.testing.assert_allclose(np.bincount(codes), [140, 30, 30], atol=1)
    assert set(codes[stratum]) == set(codes[~stratum]) == {0, 1, 2}
    # among those who were not trained on, as many as there are
    record = hold_out(own_splits(range(200)))[1]
    codes = parts_of_patients(range(200), seed=1, stratum=stratum, record=record)
    assert not record.trained_on(np.arange(200)[codes > 0]).any()
    np.testing.assert_allclose(np.bincount(codes), [140, 30, 30], atol=2)
