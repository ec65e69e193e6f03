"""The probe recipe end to end: every file written, and nothing private in them."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_model, make_notes
from PIL import Image
from sklearn.metrics import roc_auc_score

from hf_densefeat.commands import probe
from hf_densefeat.commands.measuring import parse_tasks
from hf_densefeat.commands.probing import _angles_with_floor, check_words
from hf_densefeat.commands.settings import parse
from hf_densefeat.data.splits import hold_out
from hf_densefeat.evaluation.geometry import geometry_report, geometry_state

SENTINEL = "zebrasentinel"

pytestmark = [pytest.mark.recipe, pytest.mark.slow]


def measured(words):
    """What the command returns for these words."""
    return probe.run(parse(probe, words))


def sick_notes(patients=60):
    """Notes whose outcome shows in a word, with a sentinel in text and patient id."""
    notes = make_notes(patients)
    rng = np.random.default_rng(1)
    sick = rng.random(len(notes)) < 0.5
    texts = [f"{SENTINEL} {'sepsis sepsis ' * int(s)}{text}" for s, text in zip(sick, notes["text"], strict=True)]
    columns = {
        "patient_id": [f"{SENTINEL}{patient}" for patient in notes["patient_id"]],
        "time": list(notes["time"]),
        "text": texts,
        "sick": sick.tolist(),
        "ward": [("north", "south", "west")[i] for i in rng.integers(0, 3, len(notes))],
        "severity": (sick + rng.normal(size=len(notes))).tolist(),
    }
    return datasets.Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A report on two tiny encoders, made once."""
    work = tmp_path_factory.mktemp(f"{SENTINEL}_work")
    for name, hidden in (("small", 8), ("wide", 32)):
        make_model("bert", tokenizer, hidden=hidden).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    sick_notes().to_parquet(work / "notes.parquet")
    sick_notes(20).remove_columns(["patient_id", "time"]).to_parquet(work / "letters.parquet")
    models = ["--model", f"base={work / 'small'}", "--model", str(work / "wide")]
    tasks = [f"--task={task}" for task in ("sick:binary", "ward:multiclass", "ward:clustering", "severity:regression")]
    tasks.append(f"--task=ward:multiclass:{work / 'letters.parquet'}")
    tasks += ["--similarity=same_patient", "--similarity=ward:neighbours"]
    options = ["--bootstraps", "50", "--shots", "1", "4", "--k", "4", "--no_cache"]
    measured([*models, "--notes", str(work / "notes.parquet"), *tasks, *options, "--output", str(work / "report")])
    return work / "report"


def test_every_file_is_written_and_holds_the_numbers(folder):
    """Page, JSON, Markdown and pictures; the JSON has both encoders, intervals, differences and noise floors."""
    names = {path.name for path in folder.iterdir()}
    pictures = {"similarity.png", "spectrum.png", "angles.png", "shots.png", "projection.png"}
    assert names == {"report.html", "report.json", "report.md"} | pictures
    report = json.loads((folder / "report.json").read_text())
    assert list(report["verdicts"]) == ["wide"]
    assert [one["name"] for one in report["measured"]] == ["base", "words", "wide"]
    wide = report["measured"][2]
    assert (wide["name"], wide["geometry"]["d"]) == ("wide", 32)
    sick = report["probes"]["wide"]["sick"]["metrics"]["auroc"]
    assert sick["low"] <= sick["value"] <= sick["high"]
    assert sick["value"] > 0.7
    assert set(report["probes"]["base"]["sick"]["shots"]) == {"1", "4"}
    assert {key.rsplit(" ", 1)[0] for key in wide["differences"]} == {
        "sick",
        "ward multiclass",
        "ward clustering",
        "severity",
        "letters ward",
        "own notes",
        "ward neighbours",
    }
    own = wide["similarity"]["own notes mrr"]
    assert own[1] <= own[0] <= own[2]
    assert report["adjacent"]["base"]["subspace_noise_floor_centered"] > 0
    assert report["probes"]["base"]["letters ward"]["rows"]["patients"] > 5


def test_pictures_are_drawn(folder):
    """Each PNG is of a printable size and not blank."""
    for path in folder.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) >= 500
        assert pixels.std() > 5


def test_no_text_patient_or_path_is_written(folder):
    """The sentinel of notes, patient ids and folders is in no file; the page asks for nothing outside itself."""
    for path in folder.iterdir():
        assert SENTINEL.encode() not in path.read_bytes()
    page = (folder / "report.html").read_text()
    assert "http" not in page
    assert "src=" in page
    assert all(part.startswith('"data:image/png;base64,') for part in page.split("src=")[1:])


def test_verdict_comes_first(folder):
    """The sentence stands before every table and picture."""
    page = (folder / "report.html").read_text()
    assert page.index('class="verdict"') < page.index("<img") < page.index("<table")
    report = json.loads((folder / "report.json").read_text())
    assert report["verdicts"]["wide"]["state"] in page.split('class="verdict"')[1].split("</p>")[0]


def test_predictions_are_written_for_meds_on_request(folder, tmp_path):
    """One private file an encoder and binary task, beside the report and never in it."""
    notes = sick_notes()
    patient = [int(name.removeprefix(SENTINEL)) for name in notes["patient_id"]]
    notes.remove_columns("patient_id").add_column("patient_id", patient).to_parquet(tmp_path / "notes.parquet")
    model, tasks = f"base={folder.parent / 'small'}", ["--task", "sick:binary", "--task", "ward:multiclass"]
    options = ["--notes", str(tmp_path / "notes.parquet"), "--bootstraps", "0", "--no_cache", "--shots"]
    places = ["--output", str(tmp_path / "report"), "--meds", str(tmp_path / "meds")]
    report = measured(["--model", model, *tasks, *options, *places])
    (path,) = (tmp_path / "meds").iterdir()
    assert path.name == "base sick.parquet"
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    table = pq.read_table(path)
    assert len(table) == report["probes"]["base"]["sick"]["rows"]["test"]
    assert set(table["subject_id"].to_pylist()) < set(patient)
    area = roc_auc_score(table["boolean_value"], table["predicted_boolean_probability"])
    assert area == pytest.approx(report["probes"]["base"]["sick"]["metrics"]["auroc"]["value"], abs=1e-6)
    assert not list((tmp_path / "report").glob("*.parquet"))


def test_patients_of_pretraining_are_not_tested_on(folder, tmp_path, tokenizer):
    """Nobody whom any of the models was trained on is tested, in probes, similarity and geometry, unless allowed."""
    notes = folder.parent / "notes.parquet"
    table, records = datasets.Dataset.from_parquet(str(notes)), {}
    for seed in (3, 4):
        model = make_model("bert", tokenizer, hidden=8)
        records[seed] = hold_out(table, seed=seed)[1]
        records[seed].write_to(model)
        model.save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
    options = ["--notes", str(notes), "--task", "sick:binary", "--bootstraps", "0", "--shots", "--no_cache"]
    models = [f"--model={tmp_path / str(seed)}" for seed in (3, 4)]
    ids = sorted(set(table["patient_id"]))
    test = records[3].rules[0].parts_of(ids) == 2
    both = test & ~records[4].trained_on(ids)
    report = measured([*models, *options, "--output", str(tmp_path / "report")])
    assert report["probes"]["3"]["sick"]["rows"]["patients"] == report["notes"]["patients"] == both.sum() < test.sum()
    report = measured([*models, *options, "--allow_trained", "--output", str(tmp_path / "report")])
    assert report["probes"]["3"]["sick"]["rows"]["patients"] == test.sum()


# ----------------------------------------------------------------------------------------------------- the verdict


def cloud(n, d, slope, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) ** -slope + mean


@pytest.mark.parametrize(
    ("z", "state"),
    [
        (torch.ones(500, 64), "collapsed"),
        (cloud(500, 64, 3.0), "collapsed"),
        (cloud(500, 64, 0.0, mean=30.0), "collapsed"),
        (cloud(500, 64, 0.8), "healthy"),
        (cloud(500, 64, 0.0), "over-spread"),
    ],
    ids=["constant", "few directions", "one common direction", "falling spectrum", "isotropic"],
)
def test_state_of_the_geometry(z, state):
    """Constant, few directions, and a mean that hides the rest are collapsed; white noise is over-spread."""
    assert geometry_state(geometry_report(z, k=2)) == state


@pytest.mark.parametrize("task", ["sick", "sick:ordinal"])
def test_bad_tasks_are_named(task, tmp_path):
    """What was expected is said before the notes are read."""
    settings = SimpleNamespace(output=str(tmp_path / "report"), meds=None, similarity=None, task=[task])
    with pytest.raises(ValueError, match=f"Expected --task label:kind .* got '{task}'"):
        check_words(settings)


def test_a_table_of_another_format_is_named():
    """Before anything is encoded."""
    with pytest.raises(ValueError, match=r"[Ee]xpected"):
        parse_tasks(["sick:binary:letters.docx"], sick_notes(3))


def test_angles_ask_no_more_than_the_report_found():
    """Where texts repeat and some patients have no pair, halves differ in rank: both take the same halves."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(12, 40, generator=generator)[torch.randint(12, (45,), generator=generator)]
        patients = torch.arange(44) // 6 * 3
        k = int(geometry_report(z[:-1], z[1:], k=20, groups=patients, seed=0)["k"])
        angles, floor = _angles_with_floor(z[:-1], z[1:], patients, k, 0)
        assert angles.shape == floor.shape == (k,)
