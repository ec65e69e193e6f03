"""Splits are by patient: none shared, none lost."""

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_densefeat.data.splits import split_by_patient


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
