"""A note cut in spans: no text is lost, nothing is in two of them, and what is too short is left whole and counted."""

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_densefeat.data.pairs import SHORTEST_HALF, SPANS, halves, pair_notes, sections

SENTENCES = "He came with chest pain since two days. No fever was seen. Aspirin was given at once. Home on Monday."
NOTE = "Preamble\n\nHISTORY\n\nChief Complaint:\nchest pain, 3: days\nand cough\n# Plan\ngo home"


def notes_of(texts, patients=None):
    patients = list(patients or range(len(texts)))
    return datasets.Dataset.from_dict({"patient_id": patients, "time": list(range(len(texts))), "text": list(texts)})


@given(st.text(alphabet="aB.: \n# 。", max_size=400), st.sampled_from(sorted(SPANS)))
def test_spans_are_disjoint_and_lose_nothing(text, kind):
    """Joined again they are the text, up to spaces: no character is in two of them."""
    spans = SPANS[kind](text)
    assert len(spans) != 1 or kind == "sections"
    if spans:
        assert "".join("".join(spans).split()) == "".join(text.split())
    if kind == "halves" and spans:
        assert len(spans) == 2
        assert min(map(len, spans)) >= SHORTEST_HALF


def test_halves_end_with_a_sentence_near_the_middle():
    """Without a sentence that ends in the middle third the cut is between two words; without a space there is none."""
    assert halves(SENTENCES) == [SENTENCES[:58].strip(), SENTENCES[58:].strip()]
    words = "word " * 40
    assert halves(words) == ["word " * 19 + "word", "word " * 19 + "word"]
    assert halves("x" * 400) == halves("Too short. To be cut.") == []


def test_sections_begin_at_headers():
    """A header without a text of its own goes with the section that follows."""
    whole = ["Preamble", "HISTORY\n\nChief Complaint:\nchest pain, 3: days\nand cough", "# Plan\ngo home"]
    assert sections(NOTE) == whole
    assert sections("no header") == ["no header"]


def test_pairs_of_spans_and_mixtures():
    """Spans of one note are paired, patients stand together, and notes that cannot be cut are counted."""
    notes = notes_of([NOTE, SENTENCES, "short", SENTENCES.upper()], patients="baba")
    table, pairs = pair_notes(notes, "halves")
    found = [(table[int(a)]["text"], table[int(b)]["text"]) for a, b in zip(pairs.earlier, pairs.later, strict=True)]
    assert found == [tuple(halves(SENTENCES)), tuple(halves(SENTENCES.upper()))]
    assert (pairs.whole, pairs.patient.tolist(), pairs.num_patients) == ({"halves": 2}, [0, 0], 2)
    table, pairs = pair_notes(notes, ["adjacent", "sections", "halves"])
    assert pairs.kinds == {"adjacent": 2, "sections": 2, "halves": 2}
    assert len(table) == pairs.num_notes == 4 + 3 + 4
    assert pairs.patient.tolist() == [0, 0, 0, 1, 1, 1]
    owner = table["patient_id"][:]
    assert all(owner[a] == owner[b] for a, b in zip(pairs.earlier, pairs.later, strict=True))
    assert str(pairs) == (
        "6 pairs (2 adjacent, 2 sections, 2 halves) of 2 patients, from 11 texts of 2 patients; 3 notes have no sections; "
        "2 notes have no halves"
    )


def test_first_notes_that_cannot_be_cut_do_not_decide_the_types():
    """1,000 short notes are one batch of `map`, without a row."""
    table, pairs = pair_notes(notes_of(["short"] * 1000 + [SENTENCES]), "halves")
    assert (len(table), len(pairs), pairs.whole) == (2, 1, {"halves": 1000})


def test_patients_of_one_note_are_paired_by_its_spans():
    """Adjacent notes beside another kind may be none."""
    pairs = pair_notes(notes_of([SENTENCES, SENTENCES.upper()], patients="ab"), ["adjacent", "halves"])[1]
    assert pairs.kinds == {"adjacent": 0, "halves": 2}


def test_refusals():
    with pytest.raises(ValueError, match=r"No pair of adjacent or halves in 2 notes.*in another way: sections"):
        pair_notes(notes_of(["a", "b"], patients="ab"), ["adjacent", "halves"])
    with pytest.raises(ValueError, match="one or several of adjacent, sections, halves, but got 'thirds'"):
        pair_notes(notes_of(["a"]), "thirds")
    with pytest.raises(ValueError, match=r"No pair of sections or halves in 2 notes.*in another way: adjacent"):
        pair_notes(notes_of(["a", "b"]), ["sections", "halves"])
