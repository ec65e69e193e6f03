"""The study's recipe on the bundled cohort, with few steps: tables, files, and a second start that trains nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_notes

from hf_densefeat import DenseTrainingArguments
from hf_densefeat.pairs import adjacent_pairs
from hf_densefeat.scores import patient_weights

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))
SPEC = importlib.util.spec_from_file_location("compare", RECIPES / "compare.py")
compare = importlib.util.module_from_spec(SPEC)
sys.modules["compare"] = compare  # dataclasses look their module up
SPEC.loader.exec_module(compare)

METHODS = "supervised,mlm,mlm+dense,mlm+whitening"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folders of a run with two steps a method."""
    folder = tmp_path_factory.mktemp("study")
    common = ["--steps", "2", "--methods", METHODS, "--work", str(folder / "work"), "--output", str(folder / "out")]
    compare.BOOTSTRAPS, compare.SHOTS, compare.MISSING, compare.MISSING_ROWS = 50, (4,), (0.0, 0.8), 60
    importlib.import_module("domains.text").ENCODED = {"train": 300, "validation": 150}
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
    ):
        assert words in text
    kept = json.loads((folder / "out" / "text.json").read_text())
    assert kept["steps"] == 2
    assert set(kept["methods"]) == set(METHODS.split(","))
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

    monkeypatch.setattr(compare, "make_trainer", refuse)
    again = compare.main([*common, "--table", "1"])
    assert "0 runs of 2 steps to train" in capsys.readouterr().out
    assert again["methods"] == numbers["methods"]
    assert (folder / "out" / "text-table-1.md").exists()


def test_no_note_text_is_written(study):
    folder = study[0]
    domain = importlib.import_module("domains.text").load()
    written = (folder / "out" / "text.md").read_text() + (folder / "out" / "text.json").read_text()
    assert not [text for text in domain.earlier if text[:60] in written]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--domain", "image"], "invalid choice: 'image'"), (["--methods", "mlm,mystery"], "no method mystery")],
)
def test_wrong_names_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(words)
    assert message in capsys.readouterr().err


def test_geometry_replicates_of_patients_once_each_is_the_report():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(12), 6)
    z = torch.from_numpy(rng.normal(size=(72, 8)) * np.arange(1, 9))
    z_next = z + torch.from_numpy(rng.normal(size=(72, 8)))
    report = compare.geometry_report(z, z_next, k=3)
    ones = np.ones((3, 72))

    def once(*args):
        return ones

    original, compare.patient_weights = compare.patient_weights, once
    try:
        found = compare.geometry_replicates(z, z_next, patient, 3)
    finally:
        compare.patient_weights = original
    for key, values in found.items():
        assert values == pytest.approx(np.full(3, report[key]))
    assert patient_weights(patient, 5).shape == (5, 72)


def trainer_of(method, tmp_path, tokenizer):
    """A trainer of the study on tiny notes."""
    notes = make_notes(12)
    model = make_model("bert", tokenizer)
    plain = compare.DenseTrainer(
        model,
        DenseTrainingArguments(output_dir=str(tmp_path), subspace_dim=3, report_to="none"),
        train_dataset=notes,
        processing_class=tokenizer,
    )
    collator = compare.DensePairCollator if hasattr(compare, "DensePairCollator") else type(plain.data_collator)
    domain = type("Domain", (), {})()
    domain.train, domain.processor = plain.train_dataset, tokenizer
    domain.collator = lambda objective: collator(tokenizer, objective)
    domain.training = {"per_device_train_batch_size": 16, "subspace_dim": 3, "use_cpu": True}
    assert len(domain.train.pairs) == len(adjacent_pairs(notes))
    return compare.make_trainer(domain, method, model, 0, 2, tmp_path)


def test_ablation_and_rank_limit_change_the_loss_alone(tmp_path, tokenizer):
    z_a, z_b = torch.randn(40, 24), torch.randn(40, 24)
    found = {}
    for name, change in (("plain", {}), ("no L_spec", {"spec_weight": 0.0}), ("limit", {"most_rank": 2.0})):
        trainer = trainer_of(compare.Method(name, **change), tmp_path, tokenizer)
        found[name] = {key: value.item() for key, value in trainer.objective(z_a, z_b).items()}
    plain = found["plain"]
    for name in ("no L_spec", "limit"):  # the rank of these rows is far above 2
        assert found[name]["spectral_spreading"] == pytest.approx(plain["spectral_spreading"])
        assert found[name]["loss"] == pytest.approx(plain["loss"] - plain["spectral_spreading"])


@pytest.mark.parametrize("change", [{"clean": True}, {"pair_weight": 0.5}, {"broadening": 0.1}])
def test_variants_train(change, tmp_path, tokenizer):
    trainer = trainer_of(compare.Method("variant", **change), tmp_path, tokenizer)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))


def test_clean_input_is_unmasked_for_the_dense_terms(tmp_path, tokenizer):
    trainer = trainer_of(compare.Method("clean", clean=True), tmp_path, tokenizer)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    mask = tokenizer.mask_token_id
    assert (batch["input_ids"] == mask).any()
    assert not (batch["clean"]["input_ids"] == mask).any()
    clean = dict(batch["clean"])
    outputs, z_a, z_b = trainer._forward(trainer.model, batch)
    expected = trainer._forward(trainer.model, clean)
    assert torch.allclose(z_a, expected[1])
    assert torch.allclose(z_b, expected[2])
    assert not torch.allclose(outputs.logits, expected[0].logits)
