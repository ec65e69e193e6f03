"""The study's recipe on the bundled cohort and on a table with MIMIC's columns, with few steps."""

import datetime
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import WORDS, make_model, make_notes
from scipy.stats import norm, spearmanr

from hf_densefeat import DenseTrainer, DenseTrainingArguments, geometry_report
from hf_densefeat.data.pairs import adjacent_pairs
from hf_densefeat.evaluation.metrics import PatientWeights

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import compare
from domains import features, rows, text
from domains import notes as own
from study import measures, methods, plots, runs, tables, training
from study.methods import METHODS, Method, sweep_methods
from study.results import Results

pytestmark = [pytest.mark.slow, pytest.mark.recipe]

NAMES = "features,mlm,mlm+dense,mlm+whitening"


@pytest.fixture(scope="module", autouse=True)
def small():
    """Less of everything that takes time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BOOTSTRAPS": 40, "GEOMETRY_BOOTSTRAPS": 40, "SHOTS": (16,), "MISSING_ROWS": 60}.items():
            patch.setattr(measures, name, value)
        patch.setattr(measures, "MISSING", (0.0, 0.6))
        patch.setattr(rows, "ENCODED", {"train": 300, "validation": 150})
        yield


@pytest.fixture(scope="module")
def study(small, tmp_path_factory):
    """Folders of a run with two steps a method."""
    folder = tmp_path_factory.mktemp("study")
    common = ["--steps", "2", "--methods", NAMES]
    common += ["--work", str(folder / "work"), "--output", str(folder / "out")]
    return folder, common, compare.main(common)


def test_it_writes_tables_numbers_and_plots(study):
    folder, _, numbers = study
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"text.md", "text.json", "text-pareto.png", "text-missing.png"}
    text = (folder / "out" / "text.md").read_text()
    for words in (
        "## Table 1.",
        "## Table 2.",
        "## Table 3.",
        "## Table 4.",
        "51.6",
        "0.618",
        "within the interval of",
        "Spearman's correlation",
    ):
        assert words in text
    kept = json.loads((folder / "out" / "text.json").read_text())
    assert kept["steps"] == 2
    assert set(kept["methods"]) == set(NAMES.split(","))
    for found in kept["methods"].values():
        estimate = found["acute_within_1y auroc"]
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert numbers["methods"].keys() == kept["methods"].keys()


def test_whitening_reaches_any_rank(study):
    found = study[2]["methods"]
    rank = "geometry effective_rank_centered"
    assert found["mlm+whitening"][rank]["value"] > 2 * found["mlm"][rank]["value"]


def test_a_second_start_trains_nothing(study, monkeypatch, capsys):
    folder, common, numbers = study

    def refuse(*args, **kwargs):
        raise AssertionError("it trains again")

    monkeypatch.setattr(runs, "make_trainer", refuse)
    again = compare.main([*common, "--table", "1"])
    assert "0 runs of 2 steps to train" in capsys.readouterr().out
    assert again["methods"] == numbers["methods"]
    assert (folder / "out" / "text-table-1.md").exists()


def test_no_note_text_is_written(study):
    folder = study[0]
    notes = text.load_notes(str(text.DATA / "cohort" / "notes.parquet"))["text"]
    written = (folder / "out" / "text.md").read_text() + (folder / "out" / "text.json").read_text()
    assert not [text for note in notes if note[:60] in written]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--domain", "image"], "invalid choice: 'image'"),
        (["--methods", "mlm,mystery"], "no method mystery"),
        (["--domain", "tabular", "--data", "nowhere"], "a folder with physionet2012 in it for --domain tabular"),
    ],
)
def test_wrong_names_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(words)
    assert message in capsys.readouterr().err


def test_geometry_replicates_of_patients_once_each_is_the_report(monkeypatch):
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(12), 6)
    z = torch.from_numpy(rng.normal(size=(72, 8)) * np.arange(1, 9))
    z_next = z + torch.from_numpy(rng.normal(size=(72, 8)))
    report = geometry_report(z, z_next, k=3)
    monkeypatch.setattr(measures.PatientWeights, "of", lambda *args: np.ones((3, 72)))
    found = measures.geometry_replicates(z, z_next, patient, 3)
    for key, values in found.items():
        assert values == pytest.approx(np.full(3, report[key]))
    monkeypatch.undo()
    assert PatientWeights.of(patient, 5)[:].shape == (5, 72)


def trainer_of(method, tmp_path, tokenizer):
    """A trainer of the study on tiny notes."""
    notes = make_notes(12)
    model = make_model("bert", tokenizer)
    plain = DenseTrainer(
        model,
        DenseTrainingArguments(output_dir=str(tmp_path), subspace_dim=3, report_to="none"),
        train_dataset=notes,
        processing_class=tokenizer,
    )
    domain = type("Domain", (), {})()
    domain.train, domain.processor = plain.train_dataset, tokenizer
    domain.collator = lambda objective: type(plain.data_collator)(tokenizer, objective)
    domain.training = {"per_device_train_batch_size": 16, "subspace_dim": 3, "use_cpu": True}
    assert len(domain.train.pairs) == len(adjacent_pairs(notes))
    return training.make_trainer(domain, method, model, 0, 2, tmp_path)


def test_ablation_and_rank_limit_change_the_loss_alone(tmp_path, tokenizer):
    z_a, z_b = torch.randn(40, 24), torch.randn(40, 24)
    found = {}
    for name, change in (("plain", {}), ("no L_spec", {"spec_weight": 0.0}), ("limit", {"most_rank": 2.0})):
        trainer = trainer_of(Method(name, **change), tmp_path, tokenizer)
        found[name] = {key: value.item() for key, value in trainer.objective(z_a, z_b).items()}
    plain = found["plain"]
    for name in ("no L_spec", "limit"):  # the rank of these rows is far above 2
        assert found[name]["spectral_spreading"] == pytest.approx(plain["spectral_spreading"])
        assert found[name]["loss"] == pytest.approx(plain["loss"] - plain["spectral_spreading"])


@pytest.mark.parametrize("change", [{"clean": True}, {"arguments": {"lambda_pair": 0.5}}, {"broadening": 0.1}])
def test_variants_train(change, tmp_path, tokenizer):
    trainer = trainer_of(Method("variant", **change), tmp_path, tokenizer)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))


def test_clean_input_is_unmasked_for_the_dense_terms(tmp_path, tokenizer):
    trainer = trainer_of(Method("clean", clean=True), tmp_path, tokenizer)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    mask = tokenizer.mask_token_id
    assert (batch["input_ids"] == mask).any()
    assert not (batch["clean"]["input_ids"] == mask).any()
    clean = dict(batch["clean"])
    masked = trainer.embed_pairs(trainer.model, {name: value for name, value in batch.items() if name != "clean"})
    both = trainer.embed_pairs(trainer.model, batch)
    expected = trainer.embed_pairs(trainer.model, clean)
    assert torch.allclose(both.z_a, expected.z_a)
    assert torch.allclose(both.z_b, expected.z_b)
    assert not torch.allclose(both.z_a, masked.z_a)
    assert torch.allclose(both.mlm, masked.mlm)


def test_features_of_events():
    """Against the definition: aggregates, then normal scores; what a window lacks is the training median, a score of 0."""
    windows = [json.dumps({"events": events}) for events in ([["HR", 80, 2], ["HR", 60, 1]], [["HR", 90, 0]], [])]
    table = features.aggregated(windows)
    assert list(table.columns.get_level_values(0)) == ["count", "mean", "min", "max", "last"]
    assert table.to_numpy()[:2].tolist() == [[2, 70, 60, 80, 80], [1, 90, 90, 90, 90]]
    train = [json.dumps({"events": [["HR", value, 0]]}) for value in range(60, 101)]
    others = [*windows, json.dumps({"events": [["Lactate", 2, 0]]})]
    z = features.of_events(train, others)
    assert z.shape == (4, 10)
    means = z[:, list(features.aggregated(others).columns).index(("mean", "HR"))]
    assert means == pytest.approx(norm.ppf([0.25, 0.75, 0.5, 0.5]), abs=0.02)


def test_rank_and_probes():
    """Spearman's correlation over encoders; what is none is left out."""
    domain = SimpleNamespace(tasks=[SimpleNamespace(name="died", kind="binary")])
    names = ["features", "start", "mlm", "infonce", "simcse", "dense"]
    numbers = [(1, 0.9), (2, 0.5), (3, 0.6), (5, 0.7), (8, 0.8), (9, 0.6)]
    found = {
        name: [{tables.RANK: np.array([rank, rank]), "died auroc": np.array([area, area])}]
        for name, (rank, area) in zip(names, numbers, strict=True)
    }
    expected = spearmanr(*zip(*numbers[1:], strict=True)).statistic
    assert f"| over 5 encoders | {expected:+.2f} |" in tables.table_rank(Results(found, domain, METHODS))
    del found["mlm"]
    assert "too few" in tables.table_rank(Results(found, domain, METHODS))


def test_features_of_words_are_fitted_on_training_inputs(notes):
    train, test = notes["text"][:40], notes["text"][40:]
    z = features.of_words(train, test, list)
    assert z.shape[0] == len(test)
    assert np.allclose(features.of_words(train, test[::-1], list)[::-1], z)


def test_sweep(study, monkeypatch):
    """One row a setting, compared with the default."""
    folder, common, _ = study
    monkeypatch.setattr(methods, "SWEEP", {"lambda_orth": [{"lambda_orth": 1e-3}]})
    monkeypatch.setattr(methods, "SWEEP_METHODS", {"broadening 10": {"broadening": 10.0}})
    place = common.index("--methods")
    found = compare.main([*common[:place], *common[place + 2 :], "--sweep"])["methods"]
    assert list(found) == ["mlm", "mlm+dense", "lambda_orth 0.001", "broadening 10"]
    ranks = [run["geometry effective_rank_centered"]["value"] for run in found.values()]
    assert len(set(ranks)) == 4
    written = (folder / "out" / "text-sweep.md").read_text()
    assert all(f"| {title} " in written for title in ("lambda_orth 0.001", "broadening 10", "MLM + dense (default)"))
    assert (folder / "out" / "text-sweep.png").exists()


def test_every_run_has_a_file_of_its_own(tmp_path):
    """Names of settings hold dots, and a path must keep what follows them; what is not trained has one seed."""
    study = object.__new__(runs.Study)
    study.folder, study.steps, study.warm_up = tmp_path, 2, 0
    methods = (METHODS | sweep_methods()).items()
    paths = [study.path(name, method, seed) for name, method in methods for seed in range(1 + method.trained)]
    assert len({path.name for path in paths}) == len(paths)
    assert {path.suffix for path in paths} == {".npz"}


def test_names_beside_points_are_apart_and_in_order():
    places = np.array([0.5, 0.50, 0.51, 0.9, 0.1])
    moved = plots._apart(places, 0.1, 0.0, 1.0)
    assert (np.diff(np.sort(moved)) > 0.1 - 1e-9).all()
    assert (np.argsort(moved, kind="stable") == np.argsort(places, kind="stable")).all()
    assert (moved[[3, 4]] == places[[3, 4]]).all()
    assert plots._apart(np.zeros(11), 0.1, 0.0, 1.0) == pytest.approx(np.linspace(0, 1, 11))


# ---- Notes of your own ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mimic(tmp_path_factory):
    """A table with the columns of MIMIC-IV-Note and a label; each patient's dates are shifted by some other century."""
    rng = np.random.default_rng(0)
    rows = []
    for patient in range(10_000_000, 10_000_060):
        time = datetime.datetime(2100, 1, 1) + datetime.timedelta(days=int(rng.integers(36_500)))
        for sequence in range(int(rng.integers(6, 14))):
            kind = str(rng.choice(["DS", "RR", "AR"], p=[0.4, 0.595, 0.005]))
            soon = bool(rng.random() < 0.5)
            words = rng.choice(WORDS[:20] if soon else WORDS[20:], 30)
            rows.append(
                {
                    "note_id": f"{patient}-{kind}-{sequence}",
                    "subject_id": patient,
                    "hadm_id": 20_000_000 + len(rows),
                    "note_type": kind,
                    "note_seq": sequence,
                    "charttime": time.isoformat(sep=" "),
                    "storetime": time.isoformat(sep=" "),
                    "text": " ".join(words),
                    "grade": None if sequence == 0 else ["low", "high"][soon],
                }
            )
            time += datetime.timedelta(hours=int(rng.integers(24, 700) if soon else rng.integers(740, 7000)))
    path = tmp_path_factory.mktemp("mimic") / "notes.csv"
    datasets.Dataset.from_list(rows).to_csv(str(path))
    return path


def test_labels_of_what_comes_next(mimic):
    """Against a plain loop; a patient's last note has none, whatever the date."""
    notes, tasks, _, primary, _ = own.own_notes(str(mimic), None)
    expected = ("next_note_within_30d", "log_days_to_next_sd", "next_type", "note_type clusters")
    assert tuple(name for name, _ in tasks) == expected
    assert primary == "next_note_within_30d"
    rows = list(notes)
    for row, later in zip(rows, [*rows[1:], {"patient_id": None}], strict=True):
        if row["patient_id"] != later["patient_id"]:
            assert row["next_note_within_30d"] is row["log_days_to_next"] is row["next_type"] is None
        else:
            days = (later["time"] - row["time"]).total_seconds() / 86400
            assert row["next_note_within_30d"] == int(days <= 30)
            assert row["log_days_to_next"] == pytest.approx(np.log1p(days))
            assert row["next_type"] == (
                later["note_type"] if later["note_type"] != "AR" else None
            )  # rarer than 1 in 50
    train = [row["log_days_to_next_sd"] for row in rows if row["split"] == "train" and row["next_type"]]
    assert np.std([value for value in train if value is not None]) == pytest.approx(1, abs=0.05)


def test_own_split_is_kept_and_held_out_patients_are_drawn_whole(mimic, tmp_path, monkeypatch):
    notes = text.load_notes(str(mimic))
    names = [("train", "tuning", "held_out")[patient % 3] for patient in notes["patient_id"]]
    notes.add_column("split", names).to_parquet(str(tmp_path / "split.parquet"))
    monkeypatch.setattr(own, "HELD_OUT", 50)
    found = own.own_notes(str(tmp_path / "split.parquet"), ["grade:binary"])[0]
    counts = {patient: notes["patient_id"][:].count(patient) for patient in set(notes["patient_id"])}
    held_out = [row["patient_id"] for row in found if row["split"] == "test"]
    assert 50 <= len(held_out) < 50 + max(counts.values())
    assert all(patient % 3 == 2 and held_out.count(patient) == counts[patient] for patient in held_out)
    assert sum(row["split"] == "train" for row in found) == names.count("train")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grade"], "Expected --task label:kind"),
        (["mystery:binary"], "Expected --task label:kind"),
        (["grade:ordinal"], "Expected --task label:kind"),
        (["grade:clustering"], "Expected a binary or multiclass"),
        (["note_id:clustering"], "two or more classes"),
    ],
)
def test_tasks_that_cannot_be_are_refused(words, message, mimic):
    with pytest.raises(ValueError, match=message):
        own.own_notes(str(mimic), words)


def test_the_study_runs_on_a_table_with_mimics_columns(mimic, tmp_path, tokenizer, capsys):
    """With a checkpoint to start from and one label more; another label is another study."""
    model = make_model("bert", tokenizer)
    model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    words = ["--notes", str(mimic), "--model_name_or_path", str(tmp_path / "encoder"), "--max_length", "32"]
    words += [
        "--steps",
        "1",
        "--methods",
        "supervised,mlm",
        "--work",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    tasks = ["--task", "grade:multiclass", "--task", "next_note_within_30d:binary", "--task", "note_type:clustering"]
    found = compare.main(words + tasks)["methods"]["mlm"]
    assert {"grade auroc", "next_note_within_30d auroc", "note_type clusters ari"} <= found.keys()
    assert found["grade auroc"]["value"] > 0.8  # the words tell
    capsys.readouterr()
    compare.main([*words, "--task", "next_note_within_30d:binary"])
    printed = capsys.readouterr().out
    assert "2 runs of 1 steps to train" in printed
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").glob("text.*")) + printed


@pytest.mark.parametrize(
    "words", [["--domain", "tabular", "--notes", "x"], ["--task", "a:binary"], ["--notes", "x", "--data", "y"]]
)
def test_options_that_do_not_go_together_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        compare.main(words)
    assert "--notes" in capsys.readouterr().err
