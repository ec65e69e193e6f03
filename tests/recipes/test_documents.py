"""The study of documents, on a table of MedQuAD's layout: similarity of every method, and the default's own terms."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS, make_model
from scipy.stats import f_oneway

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import compare
from domains import sections
from study.directions import between_classes
from study.methods import METHODS, Method
from study.training import study_objective

from hf_densefeat import DenseTrainingArguments

pytestmark = [pytest.mark.recipe, pytest.mark.slow]
PARTS = {"train": 40, "validation": 8, "test": 40}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents of three answers, each of its own disease, two documents a disease."""
    rng, rows = np.random.default_rng(0), []
    for split, documents in PARTS.items():
        for document in range(documents):
            topic = rng.choice(WORDS, 6)
            for order, kind in enumerate(("information", "symptoms", "treatment"), start=1):
                rows.append(
                    {
                        "document_id": f"{split} {document}",
                        "order": str(order),
                        "text": " ".join(np.r_[rng.choice(topic, 8), rng.choice(WORDS, 4), [kind]]),
                        "question": f"{kind} of {topic[0]} ?",
                        "question_type": kind,
                        "focus": f"{split} {document // 2}",
                        "semantic_type": ("T047", "T191")[document % 2],
                        "split": split,
                    }
                )
    folder = tmp_path_factory.mktemp("data")
    (folder / "medquad").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "medquad" / "answers.parquet")
    return folder


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    """A folder with a small encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    make_model("bert", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_tables_of_similarity_are_written_with_every_map(data, encoder, tmp_path):
    """As it is, by the views, and beside words, with the verdict first; no text of the documents."""
    words = ["--domain", "documents", "--data", data, "--model_name_or_path", encoder, "--steps", 2]
    words += ["--methods", "features,start,mlm,mlm+dense", "--output", tmp_path, "--work", tmp_path / "work"]
    numbers = compare.main(list(map(str, words)))
    report = (tmp_path / "documents.md").read_text()
    for title in (
        "Table 5. Similarity, cosine as it is",
        "Table 5, content view",
        "Table 5, form view",
        "Table 5, with words",
        "By every map",
        "Fewer bits",
        "What the variance is of",
        "In short",
    ):
        assert title in report
    assert (tmp_path / "documents.png").exists()
    assert report.index("Content, as it is: MLM + dense (default) − MLM") < report.index("Table 5")
    assert 0 < numbers["methods"]["mlm"]["question → answer: mrr, as it is"]["value"] <= 1
    assert "information of" not in report


def test_trained_encoders_are_kept_and_others_measured_beside_them(data, encoder, tmp_path):
    """A second run trains nothing and finds the same; a folder that no method of ours made is a row of its own."""
    words = ["--domain", "documents", "--data", data, "--model_name_or_path", encoder, "--steps", 2, "--table", "maps"]
    words = [*map(str, words), "--encoders", str(tmp_path), "--output", str(tmp_path / "out")]
    (tmp_path / "another").symlink_to(encoder)
    first = compare.main([*words, "--methods", "start,mlm", "--work", str(tmp_path / "one")])["methods"]
    assert (tmp_path / "mlm-0" / "model.safetensors").exists()
    again = compare.main([*words, "--methods", "mlm,another", "--work", str(tmp_path / "two")])["methods"]
    values = [{key: one["value"] for key, one in found.items()} for found in (again["mlm"], again["another"])]
    for found, expected in zip(values, (first["mlm"], first["start"]), strict=True):
        assert found == pytest.approx({key: one["value"] for key, one in expected.items()}, rel=1e-4, nan_ok=True)
    with pytest.raises(SystemExit):
        compare.main([*words, "--methods", "nobody"])


def test_the_sweep_of_documents_compares_content_and_form_with_the_default(data, encoder, tmp_path):
    """Settings that are named, beside the default; the difference is that of the means."""
    words = ["--domain", "documents", "--data", data, "--model_name_or_path", encoder, "--steps", 2, "--sweep"]
    words += ["--methods", "center False,per_device_train_batch_size 8", "--output", tmp_path]
    found = compare.main([*map(str, words), "--work", str(tmp_path / "work")])["methods"]
    assert list(found) == ["mlm+dense", "center False", "per_device_train_batch_size 8"]
    lines = (tmp_path / "documents-sweep.md").read_text().splitlines()
    cells = {
        line.split("|")[1].strip(): [one.strip() for one in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    head, default, changed = (cells[name] for name in ("Method", "MLM + dense (default) (1)", "center False (1)"))
    assert head[4] == "content − MLM + dense (default)"
    assert default[4] == ""
    assert float(changed[4].split()[0]) == pytest.approx(float(changed[0]) - float(default[0]), abs=1.1e-3)
    assert (tmp_path / "documents-sweep.png").exists()


def test_a_share_of_the_way_is_measured_with_interpolated_weights(data, encoder, tmp_path, monkeypatch):
    """With nothing of the way the numbers are the start's."""
    monkeypatch.setitem(compare.CANDIDATES, "share 0.25", Method("none of the way", share=0.0))
    words = ["--domain", "documents", "--data", data, "--model_name_or_path", encoder, "--steps", 2, "--table", 5]
    words += ["--methods", "start,mlm+dense,share 0.25", "--output", tmp_path, "--work", tmp_path / "work"]
    start, trained, none = compare.main(list(map(str, words)))["methods"].values()
    start, trained, none = ([found[key]["value"] for key in start] for found in (start, trained, none))
    assert np.array_equal(none, start, equal_nan=True)
    assert not np.array_equal(trained, start, equal_nan=True)


def test_trained_on_sections_and_measured_on_answers(data, encoder, tmp_path):
    """Two sources, or one; none is refused with the names of the files."""
    both = tmp_path / "both"
    shutil.copytree(data, both)
    words = ["--domain", "sections", "--model_name_or_path", encoder, "--steps", 1, "--methods", "mlm"]
    words = [*map(str, words), "--work", str(tmp_path / "work"), "--output", str(tmp_path), "--data", str(both)]
    with pytest.raises(FileNotFoundError, match=r"sections\.parquet in pubmedqa or aci_bench"):
        compare.main(words)
    for source, document in sections.SOURCES.items():
        (both / source).mkdir()
        rows = [
            {document: str(i // 3), "section_index": str(2 - i % 3), "text": f"{WORDS[i]} {WORDS[i + 1]} {i}"}
            for i in range(60)
        ]
        pq.write_table(pa.Table.from_pylist(rows), both / source / "sections.parquet")
    train = sections.read_sections(both)
    assert len(train) == 120
    assert train["patient_id"][0] == "aci_bench 0"
    assert train["text"][:3] == [f"{WORDS[i]} {WORDS[i + 1]} {i}" for i in (2, 1, 0)]  # in the order of the sections
    found = compare.main(words)
    assert "Trained on 120 sections (80 pairs" in found["facts"]
    assert "same disease: mrr, as it is" in found["methods"]["mlm"]


def test_a_missing_encoder_is_said_at_once(data):
    """The domain has no encoder of its own."""
    with pytest.raises(SystemExit):
        compare.main(["--domain", "documents", "--data", str(data)])


@pytest.mark.parametrize(("method", "weight"), [("mlm+dense", 0.3), ("mlm+dense-spec", 0.3), ("mlm+dense-pair", None)])
def test_the_studys_objective_is_that_of_the_arguments(tmp_path, method, weight):
    """What a method changes does not lose the pairing of the default."""
    args = DenseTrainingArguments(output_dir=str(tmp_path), report_to="none", **METHODS[method].arguments)
    terms = study_objective(args, METHODS[method], 8).terms
    assert terms.get("unshared_variance", (None,))[0] == weight
    assert terms["spectral_spreading"][0] == METHODS[method].spec_weight


def test_the_share_between_classes_is_epsilon_squared():
    """Kelley's formula from SciPy's F in one dimension; 1 where a class is a point, about 0 for unrelated classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 400)
    z = rng.normal(size=400) + 0.5 * y
    f = f_oneway(*(z[y == label] for label in range(5))).statistic
    within, between = 395, 4
    expected = (between * f - between) / (between * f + within)  # (SS_b - (C - 1) MS_w) / SS_t
    centred = torch.from_numpy(z - z.mean())[:, None]
    assert between_classes(centred, y) == pytest.approx(expected, rel=1e-10)
    points = torch.eye(5, dtype=torch.float64)[y]
    assert between_classes(points - points.mean(0), y) == pytest.approx(1)
    noise = torch.from_numpy(rng.normal(size=(400, 30)))
    assert abs(between_classes(noise - noise.mean(0), y)) < 0.01
