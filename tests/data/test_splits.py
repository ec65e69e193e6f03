"""Splits are by patient: none shared, none lost."""

import json

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_densefeat.data.splits import SplitRecord, split_by_patient, split_patients, split_record


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
            split_by_patient(table, parts, seed)
        return
    first = split_by_patient(table, parts, seed)
    owners = {name: set(part["patient_id"]) for name, part in first.items()}
    assert sum(map(len, owners.values())) == len(set.union(*owners.values())) == len(set(patients))
    assert sorted(int(text) for part in first.values() for text in part["text"]) == list(range(len(patients)))
    assert all(owners.values())
    assert all(
        abs(len(owners[name]) - share * len(set(patients))) <= 2 for name, share in zip(owners, parts, strict=True)
    )
    order = np.random.default_rng(shuffle).permutation(len(patients))
    again = split_by_patient(table.select(order), parts, seed)
    assert owners == {name: set(part["patient_id"]) for name, part in again.items()}


def test_the_tables_own_splits():
    """A split column is kept under its known names; overlap, unknown names and gaps are refused."""
    parts = split_by_patient(two_patients(split=["train", "train", "tuning", "tuning"]))
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "validation": 2}
    with pytest.raises(ValueError, match="1 patients have notes both in"):
        split_by_patient(two_patients(split=["train", "test", "test", "test"]))
    with pytest.raises(ValueError, match=r"1 notes without a split and the names \['fold3'\]"):
        split_by_patient(two_patients(split=["train", "train", None, "fold3"]))
    assert set(split_by_patient(two_patients(split=["?"] * 4), (0.5, 0.5), split_column=None)) == {
        "train",
        "validation",
    }
    with pytest.raises(ValueError, match="add up to 1"):
        split_by_patient(two_patients(), (0.5, 0.6))


def test_record_says_where_a_patient_was():
    """From the record alone, through JSON, for patients of this table, some of them, and others; no id is in it."""
    table = datasets.Dataset.from_dict({"patient_id": list(range(500)), "time": [0] * 500, "text": ["a"] * 500})
    parts, record = split_by_patient(table, seed=7), split_record(table, seed=7)
    record = SplitRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    for code, name in enumerate(("train", "validation", "test")):
        assert set(record.parts_of(parts[name]["patient_id"])) == {code}
    shares = np.bincount(record.parts_of([f"other {i}" for i in range(4000)])) / 4000
    np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.06)
    assert set(record.to_dict()) == {"seed", "shares", "rule", "cuts"}
    assert split_record(table, (0.8, 0.2), seed=7).parts_of([1, 2, 3]).max() <= 1
    own = datasets.Dataset.from_dict({"patient_id": [1], "time": [0], "text": ["a"], "split": ["train"]})
    assert split_record(own).parts_of([1]) is None


def test_strata_reach_every_part():
    """Ten patients of one kind among 190 of another: both in every part, in the shares asked for."""
    stratum = np.arange(200) % 20 == 0
    codes, record = split_patients(range(200), seed=1, stratum=stratum)
    np.testing.assert_allclose(np.bincount(codes), [140, 30, 30], atol=1)
    assert set(codes[stratum]) == set(codes[~stratum]) == {0, 1, 2}
    assert record.parts_of([1]) is None
