"""Nobody whom a model was trained on is tested, however its table was split and however an id is written."""

import numpy as np
import pandas as pd
import pytest
from conftest import make_model, make_notes

from hf_densefeat import AutoDenseModel, ProbeEvaluator, ProbeTask, SimilarityEvaluator, SimilarityTask, load_notes
from hf_densefeat.commands import fitting, head, interpolate, probe, probing
from hf_densefeat.commands.settings import parse
from hf_densefeat.data.splits import LISTED, SplitRecord, hold_out, parts_of_patients

PATIENTS = 60
WRITTEN = {  # how a table has its ids -> its ids, and the ending of its file
    "integers": (lambda ids: ids, "parquet"),
    "floats": (lambda ids: ids.astype(float), "parquet"),
    "csv of floats": (lambda ids: ids.astype(float), "csv"),
    "strings": (lambda ids: [f" {one}" for one in ids], "parquet"),
    "strings with zeros": (lambda ids: [f"{one:08}" for one in ids], "csv"),
}


def numbers(ids):
    """Ids, however written, as integers."""
    return {int(float(one)) for one in ids}


@pytest.fixture(scope="module")
def frame():
    """Notes of patients 1 to 60, with a label."""
    notes = make_notes(PATIENTS).to_pandas()
    notes["patient_id"] += 1
    notes["sick"] = np.random.default_rng(1).random(len(notes)) < 0.5
    return notes


@pytest.fixture(scope="module", params=["hash", "column", "stratified"])
def trained(request, tmp_path_factory, frame, tokenizer):
    """A folder as pretraining leaves it, the patients it was trained on, and the table with the splits that it brought."""
    folder, table, ids = tmp_path_factory.mktemp(request.param), frame, np.arange(1, PATIENTS + 1)
    if request.param != "hash":
        stratum = ids % 10 == 0 if request.param == "stratified" else None
        parts = parts_of_patients(ids, seed=5, stratum=stratum)
        names = np.array(["train", "tuning", "held_out"])[parts]
        table = frame.assign(split=frame["patient_id"].map(dict(zip(ids, names, strict=True))))
    parts, record = hold_out(load_notes(table), seed=42)
    model = make_model("bert", tokenizer, hidden=8)
    record.write_to(model)
    model.save_pretrained(folder)
    record.save(folder)
    tokenizer.save_pretrained(folder)
    return folder, numbers(parts["train"]["patient_id"]), table


def written(frame, how, folder):
    """The table with its ids in this form, as a file."""
    ids, ending = WRITTEN[how]
    table, path = frame.assign(patient_id=ids(frame["patient_id"].to_numpy())), folder / f"notes.{ending}"
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("how", WRITTEN)
def test_nobody_who_was_trained_on_is_tested(trained, frame, how, tmp_path, monkeypatch):
    """In probe (probes, clusters, similarity, geometry), head, interpolate, and by evaluators; the head's fit is recorded."""
    folder, patients, _ = trained
    path = str(written(frame, how, tmp_path))
    everything = [
        "--task=sick:binary",
        "--task=sick:clustering",
        f"--task=sick:binary:{path}",
        "--similarity=same_patient",
    ]
    reading = probing.Reading(parse(probe, ["--model", str(folder), "--notes", path, *everything]))
    tested = [numbers(rows.tested) for one in (reading.probes, reading.similarity) for rows in one.rows.values()]
    assert len(tested) == 4
    for some in (*tested, numbers(reading.notes["patient_id"])):
        assert some
        assert not some & patients

    seen = []

    class Noted(fitting.Measurement):
        def __init__(self, notes, **options):
            seen.append(numbers(notes["patient_id"]))
            super().__init__(notes, **options)

    monkeypatch.setattr(fitting, "Measurement", Noted)
    words = ["--model", str(folder), "--notes", path, "--epsilon", "auto"]
    head.run(parse(head, [*words, "--output", str(tmp_path / "head")]))
    turned = ["--start", str(folder), "--share", "0.5", "--output", str(tmp_path / "half")]
    interpolate.run(parse(interpolate, [*words, *turned]))
    for held_out, name in zip(seen, ("head", "half"), strict=True):
        assert held_out
        assert not held_out & patients
        record = SplitRecord.of(AutoDenseModel.from_pretrained(str(tmp_path / name)))
        known = record.trained_on(range(1, PATIENTS + 1))
        assert set(np.flatnonzero(known) + 1) >= patients
        assert not held_out & set(np.flatnonzero(known) + 1)

    model, notes = AutoDenseModel.from_pretrained(str(folder)), load_notes(path)
    uses = [SimilarityTask(name="own", kind="same_patient", notes=notes)]
    probes = [ProbeTask("sick", notes, "sick"), ProbeTask("groups", notes, "sick", "clustering")]
    for evaluator in (SimilarityEvaluator(uses, bootstraps=0), ProbeEvaluator(probes, seed=1, bootstraps=0)):
        with pytest.raises(ValueError, match="test patients were trained on"):
            evaluator(model)
    record = SplitRecord.of(model)
    assert ProbeEvaluator(probes, bootstraps=0, record=record)(model)
    assert SimilarityEvaluator(uses, bootstraps=0, allow_trained=True)(model)


def test_a_contradiction_is_refused_unless_told(trained, frame, tmp_path):
    """A table whose own splits hold out who was trained on; a list that is lost; the very table of training is fine."""
    folder, patients, table = trained
    other = frame.assign(split=np.where(frame["patient_id"] % 3 == 0, "test", "train"))
    path = tmp_path / "other.parquet"
    other.to_parquet(path)
    held = set(range(3, PATIENTS + 1, 3))
    wrong = f"{len(held & patients)} of {len(held)} validation and test patients"
    words = ["--model", str(folder), "--notes", str(path)]
    with pytest.raises(ValueError, match=wrong):
        probing.Reading(parse(probe, words))
    with pytest.raises(ValueError, match=wrong):
        head.run(parse(head, [*words, "--output", str(tmp_path / "head")]))
    reading = probing.Reading(parse(probe, [*words, "--allow_trained"]))
    assert numbers(reading.notes["patient_id"]) == held
    table.to_parquet(path)
    assert not numbers(probing.Reading(parse(probe, words)).notes["patient_id"]) & patients
    if (folder / LISTED).exists():
        kept = (folder / LISTED).read_bytes()
        (folder / LISTED).unlink()
        try:
            with pytest.raises(ValueError, match=r"cannot be told.*allow_trained"):
                probing.Reading(parse(probe, words))
        finally:
            (folder / LISTED).write_bytes(kept)


def test_every_command_says_which_part_is_missing(trained, frame, tmp_path):
    """A table that names training patients alone, before anything is encoded."""
    path = tmp_path / "train.parquet"
    pd.DataFrame(frame.assign(split="train")).to_parquet(path)
    words = ["--model", str(trained[0]), "--notes", str(path)]
    with pytest.raises(ValueError, match=r"Nobody is in test.*column `split` names patients for train alone"):
        probing.Reading(parse(probe, words))
    with pytest.raises(ValueError, match=r"Nobody is in test, which this command needs"):
        head.run(parse(head, [*words, "--output", str(tmp_path / "head")]))
