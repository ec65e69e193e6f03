"""Real clinical notes and the counter-example as domains of the study, on small tables of their layout."""

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, make_model

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import compare
import finetune
import starts
from domains import entities, findings, mtsamples
from domains.rows import frequent, split_apart

pytestmark = pytest.mark.recipe
HEADERS = ("history", "plan")


def text_of(rng: np.random.Generator, topic: str, kind: str) -> str:
    """Some sixteen words, among them the topic and the kind; long enough to be measured."""
    return " ".join([*rng.choice(WORDS, 14), topic, kind])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eighty notes of two sections, and thirty facilities of four findings."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    notes, sections, found = [], [], []
    for i in range(80):
        topic = ("renal", "cardiac")[i % 2]
        own = [text_of(rng, topic, header) for header in HEADERS]
        label = {"note_id": f"n{i}", "specialty": topic}
        notes.append(label | {"text": " ".join(own), "kind": HEADERS[i // 2 % 2], "summary": f"{topic} {own[0][:30]}"})
        for order, (header, text) in enumerate(zip(HEADERS, own, strict=True)):
            sections.append(label | {"order": order, "section": header, "text": text})
    for i in range(120):
        labels = {"facility": f"f{i // 4}", "received": datetime(2015, 1, 1) + timedelta(days=i % 4)}
        labels |= {"outcome": str(500 + i % 2), "abuse": ("Neglect", None, "Restraints")[i % 3]}
        found.append(
            labels | {"facility_type": ("NF", "RCF")[i // 4 % 2], "text": text_of(rng, str(i % 2), str(i // 4))}
        )
    for name, rows in (
        ("mtsamples/notes", notes),
        ("mtsamples/sections", sections),
        ("care_findings/findings", found),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    """A folder with a small encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    make_model("bert", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_near_copies_of_two_groups_are_in_one_part():
    """60, 15 and 25 % of the groups; the same groups the same parts in any order of the rows."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"{group}{word}" for word in rng.integers(0, 10**6, 20)) for group in range(200)]
    texts[150] = texts[7] + " more"
    groups = [f"g{i}" for i in range(200)]
    parts = split_apart(texts, groups)
    assert parts[150] == parts[7]
    assert [parts.count(name) for name in ("train", "validation", "test")] == pytest.approx([120, 30, 50], abs=2)
    assert split_apart(texts[::-1], groups[::-1]) == parts[::-1]


def test_rare_labels_are_left_out():
    """None, and what is too rare, is None."""
    assert frequent(["a", "a", "b", None], least=2) == ["a", "a", None, None]


def test_a_notes_sections_are_in_the_part_of_the_note_and_have_its_labels(data):
    """Specialty and kind of the note, the header of the section."""
    notes, sections = mtsamples.read(data)
    part = dict(zip(notes["patient_id"], notes["split"], strict=True))
    assert all(part[note] == split for note, split in zip(sections["patient_id"], sections["split"], strict=True))
    assert set(sections["header"]) == set(HEADERS)
    assert set(part.values()) == {"train", "validation", "test"}
    of_note = dict(zip(notes["patient_id"], notes["kind"], strict=True))
    assert sections["kind"][:] == [of_note[note] for note in sections["patient_id"]]


def test_findings_follow_each_other_in_a_facility(data):
    """A facility is a patient and a label that is rare is none."""
    table = findings.read(data)
    assert len(set(table["patient_id"])) == 30
    assert set(table["abuse"]) == {"Neglect", "Restraints", None}
    assert len(set(zip(table["patient_id"], table["split"], strict=True))) == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("domain", "task"), [("mtsamples", "summary → note: mrr"), ("findings", "outcome: precision_at_10")]
)
def test_both_are_domains_of_the_study(data, encoder, tmp_path, domain, task):
    """One update, means of content and form, and no text of the notes in what is written."""
    words = ["--domain", domain, "--data", data, "--model_name_or_path", encoder, "--steps", 1, "--table", 5]
    words += ["--methods", "start,mlm", "--output", tmp_path, "--work", tmp_path / "work"]
    numbers = compare.main(list(map(str, words)))
    assert 0 < numbers["methods"]["mlm"][f"{task}, as it is"]["value"] <= 1
    report = (tmp_path / f"{domain}-table-5.md").read_text()
    assert "content |" in report
    assert "form |" in report
    assert WORDS[0] + " " not in report


@pytest.mark.slow
def test_fine_tuning_gives_each_method_the_same_examples(data, encoder, tmp_path, monkeypatch):
    """Two names for one encoder have one score; what is in the JSON is not run again."""
    monkeypatch.setattr(finetune, "LABELS", {"header": 30})
    for name in ("mlm-0", "mlm+dense-0"):
        (tmp_path / name).symlink_to(encoder)
    words = [
        "--data",
        data,
        "--start",
        encoder,
        "--encoders",
        tmp_path,
        "--seeds",
        1,
        "--sizes",
        50,
        "--output",
        tmp_path,
    ]
    found = finetune.main(list(map(str, words)))["scores"]
    assert found["header, 50, start, 0"] == found["header, 50, mlm, 0"] == found["header, 50, mlm+dense, 0"]
    monkeypatch.setattr(finetune, "tuned", None)
    assert finetune.main(list(map(str, words)))["scores"] == found


@pytest.fixture(scope="module")
def abstracts(tmp_path_factory):
    """Sentences that name one disease each, in the three files."""
    folder, rng = tmp_path_factory.mktemp("abstracts"), np.random.default_rng(0)
    (folder / "ncbi_disease").mkdir()
    for name in entities.FILES.values():
        sentences = [
            [
                *((word, "O") for word in rng.choice(WORDS, 5)),
                ("kidney", "B-Disease"),
                ("failure", "I-Disease"),
                (".", "O"),
            ]
            for _ in range(40)
        ]
        lines = ["".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences]
        (folder / "ncbi_disease" / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["O", "B-Disease", "I-Disease", "O"], {(1, 3)}),
        (["B-Disease", "B-Disease", "I-Disease"], {(0, 1), (1, 3)}),
        (["O", "I-Disease", "O", "B-Disease"], {(1, 2), (3, 4)}),
        (["O"], set()),
    ],
)
def test_spans_of_tags(tags, expected):
    """B begins a span, O ends it, and I after O begins one too."""
    assert entities.spans(tags) == expected


def test_a_words_first_token_has_its_tag(tokenizer):
    """Words of several tokens are labelled once; of a sentence that is cut, the words that are left."""
    long = ["patient"] * 200
    rows = {"words": [["chest-pain", "denies"], long], "tags": [["B-Disease", "O"], ["O"] * 200]}
    found = entities.tokens(rows, tokenizer)
    assert found["first"][0] == [None, 0, None, None, 1, None]
    assert found["labels"][0] == [-100, 1, -100, -100, 0, -100]
    assert found["first"][1][1:-1] == list(range(entities.LENGTH - 2))


def test_an_entity_counts_where_both_its_ends_are_right():
    """One of three exact, one too short, one behind the cut: precision a half, recall a third."""
    b, i = entities.TAGS[1:]
    row = {"tags": [b, i, "O", b, i, "O", b], "first": [None, 0, 1, 2, 3, None, 4, 5, None]}
    guess = [0, 1, 2, 0, 1, 1, 0, 0, 0]
    logits = np.eye(3)[[[*guess, 1, 1]]]  # a padded row
    found = entities.scores(datasets.Dataset.from_list([row]), logits)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((1 / 2, 1 / 3, 2 / 5))


def test_entities_that_are_not_there_are_said_to_be_missing(tmp_path):
    """Where they are looked for, and where they are to be had."""
    with pytest.raises(FileNotFoundError, match=r"ncbi_disease.*MTL-Bioinformatics-2016"):
        entities.read(tmp_path)


@pytest.mark.slow
def test_an_encoder_learns_to_find_entities(abstracts, encoder, tmp_path):
    """The disease is always the same word: almost all are found."""
    words = [
        "--data",
        abstracts,
        "--start",
        encoder,
        "--encoders",
        tmp_path,
        "--labels",
        "disease",
        "--methods",
        "start",
    ]
    words += ["--seeds", 1, "--sizes", 50, "--output", tmp_path]
    assert finetune.main(list(map(str, words)))["scores"]["disease, 50, start, 0"]["f1"] > 0.9


@pytest.mark.slow
def test_a_start_its_peers_and_words_beside(data, encoder, tmp_path, monkeypatch, capsys):
    """A run of each kind, measured at a share; the report's differences to the start are those of its means."""
    monkeypatch.setattr(starts, "CONTRASTIVE", starts.CONTRASTIVE | {"max_steps": 2})
    words = ["--domain", "mtsamples", "--data", str(data), "--start", str(encoder), "--work", str(tmp_path)]
    starts.main([*words, "--methods", "adapted,infonce,simcse,mlm", "--shares", "0.5"])
    kept = np.load(tmp_path / "mtsamples" / "adapted-0-0.5.npz")
    assert kept["ranks adjacent"].shape == np.load(tmp_path / "mtsamples" / "start.npz")["ranks adjacent"].shape
    starts.main([*words, "--report"])
    assert "| adapted, 0.5+words " in capsys.readouterr().out
    found = json.loads((tmp_path / "mtsamples" / "starts.json").read_text())
    for name in ("words", "adapted, 0.5", "infonce, 0.5", "simcse, 0.5", "mlm, 0.5", "start+words"):
        for part, value in found[name]["mean"].items():
            less = found[name]["minus start"][part]
            assert less[0] == pytest.approx(value - found["start"]["mean"][part], abs=2e-4)
            assert less[1] <= less[0] <= less[2]
    assert found["start"]["minus start"]["content"] == [0, 0, 0]
