"""One note cut into sections, several joined to one window: no text is lost."""

import datasets
import pytest

from hf_densefeat.data.notes import load_notes
from hf_densefeat.data.pairs import adjacent_pairs
from hf_densefeat.data.sections import join_windows, split_into_sections


def test_sections_of_single_notes():
    """Only patients with one note are cut; nothing of the text is lost; sections make adjacent pairs in order."""
    text = "Preamble\n\nHISTORY\n\nChief Complaint:\nchest pain, 3: days\nand cough\n# Plan\ngo home"
    notes = load_notes(
        datasets.Dataset.from_dict({"patient_id": [1, 2, 2], "time": [0, 0, 1], "text": [text, text, "PLAN:\nb"]})
    )
    cut = split_into_sections(notes)
    pieces = [text for text, patient in zip(cut["text"], cut["patient_id"], strict=True) if patient == 1]
    assert pieces == ["Preamble", "HISTORY\n\nChief Complaint:\nchest pain, 3: days\nand cough", "# Plan\ngo home"]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    pairs = adjacent_pairs(cut)
    assert list(zip(pairs.earlier, pairs.later, strict=True)) == [(0, 1), (1, 2), (3, 4)]
    assert cut["section_index"][:] == [0, 1, 2, 0, 0]


def test_windows_of_notes():
    """Windows join consecutive notes of one patient and lose none."""
    notes = datasets.Dataset.from_dict(
        {"patient_id": [1] * 5 + [2] * 2, "time": [4, 3, 2, 1, 0, 0, 1], "text": list("edcbafg")}
    )
    windows = join_windows(notes, 2)
    assert windows["text"][:] == ["a\n\nb", "c\n\nd", "e", "f\n\ng"]
    assert len(adjacent_pairs(windows)) == 2
    with pytest.raises(ValueError, match="at least 1"):
        join_windows(notes, 0)
