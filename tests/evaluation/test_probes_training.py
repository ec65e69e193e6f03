"""Probes inside training: they choose the best model, stop it early, and say the same on every process."""

import json

import numpy as np
import pytest
from conftest import make_model, make_notes
from distributed_worker import Ranks, train
from transformers import EarlyStoppingCallback

from hf_densefeat import (
    DenseTrainer,
    DenseTrainingArguments,
    ProbeEvaluator,
    ProbeTask,
    SimilarityEvaluator,
    SimilarityTask,
)


@pytest.fixture(scope="module")
def evaluator():
    """`sick` shows in a word that is repeated."""
    notes = make_notes(40, seed=1)
    sick = np.random.default_rng(0).random(len(notes)) < 0.5
    texts = [f"{'sepsis ' * 4 * int(s)}{text}" for s, text in zip(sick, notes["text"], strict=True)]
    table = notes.remove_columns("text").add_column("text", texts).add_column("sick", sick.tolist())
    return ProbeEvaluator([ProbeTask("sick", table, "sick")], cache=False)


class Scripted:
    """The evaluator, with its AUROC replaced from a list and the weights that it saw kept."""

    def __init__(self, evaluator, values):
        self.evaluator, self.values, self.seen = evaluator, list(values), []

    def __call__(self, model, tokenizer):
        self.seen.append(model.get_input_embeddings().weight.detach().clone())
        return self.evaluator(model, tokenizer) | {"sick_auroc": self.values[len(self.seen) - 1]}


def arguments(folder, **options):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "subspace_dim": 3,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "sick_auroc",
        "greater_is_better": True,
    }
    return DenseTrainingArguments(output_dir=str(folder), **defaults | options)


def trainer_of(folder, tokenizer, notes, evaluator, callbacks=(), **options):
    model, args = make_model("bert", tokenizer), arguments(folder, **options)
    data = {"train_dataset": notes, "eval_dataset": notes, "processing_class": tokenizer}
    return DenseTrainer(model, args, evaluator=evaluator, callbacks=list(callbacks), **data)


def test_probes_reach_the_log_and_the_best_model(tokenizer, notes, evaluator, tmp_path):
    """Each evaluation logs every probe metric and the seconds; the best AUROC of the log is that of the model kept."""
    trainer = trainer_of(tmp_path, tokenizer, notes, evaluator)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
    for entry in logs:
        assert {"eval_sick_auroc", "eval_sick_auprc", "eval_sick_brier", "eval_sick_macro_f1"} <= entry.keys()
        assert 0 < entry["eval_probe_seconds"] < entry["eval_runtime"]
    areas = [entry["eval_sick_auroc"] for entry in logs]
    assert min(areas) > 0.7
    assert trainer.state.best_metric == max(areas)
    assert trainer.state.best_global_step == 1 + int(np.argmax(areas))
    assert evaluator(trainer.model, tokenizer)["sick_auroc"] == pytest.approx(max(areas), abs=1e-6)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["eval_sick_auroc"] == areas[-1]


def test_probes_stop_training_and_the_best_weights_come_back(tokenizer, notes, evaluator, tmp_path):
    """AUROC falls after the second evaluation: with a patience of 2 the fourth is the last, and the second is kept."""
    scripted = Scripted(evaluator, [0.7, 0.9, 0.8, 0.6, 1.0])
    trainer = trainer_of(tmp_path, tokenizer, notes, scripted, [EarlyStoppingCallback(2)], max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_metric == 0.9
    kept = trainer.model.get_input_embeddings().weight.detach()
    assert [bool((kept == weight).all()) for weight in scripted.seen] == [False, True, False, False]


def test_probes_leave_training_as_it_was(tokenizer, notes, evaluator, tmp_path):
    """Evaluating changes neither the random state of training nor the mode of the model."""
    losses = []
    for name, probes in (("with", evaluator), ("without", None)):
        chosen = "sick_auroc" if probes else "loss"
        options = {"metric_for_best_model": chosen, "load_best_model_at_end": False, "logging_steps": 1}
        options |= {"save_strategy": "no"}
        trainer = trainer_of(tmp_path / name, tokenizer, notes, probes, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def similarity():
    """Notes of one kind share a word; the next note of a patient is to be found."""
    notes = make_notes(30, seed=2)
    kinds = ["sepsis", "asthma", "anemia"]
    texts = [f"{kinds[i % 3]} {kinds[i % 3]} {text}" for i, text in enumerate(notes["text"])]
    table = notes.remove_columns("text").add_column("text", texts)
    table = table.add_column("kind", [kinds[i % 3] for i in range(len(texts))])
    tasks = [
        SimilarityTask(name="near", kind="neighbours", notes=table, label="kind"),
        SimilarityTask(name="own", kind="same_patient", notes=table),
        SimilarityTask(name="groups", kind="clusters", notes=table, label="kind"),
    ]
    return SimilarityEvaluator(tasks, codes=("float", "binary"), divisors=(1, 2), cache=False)


def test_similarity_chooses_the_best_model(tokenizer, notes, similarity, tmp_path):
    """Its keys are in the log and choose the weights that are kept."""
    best = {"metric_for_best_model": "near_precision_at_10"}
    trainer = trainer_of(tmp_path, tokenizer, notes, similarity, **best)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    found = [entry["eval_near_precision_at_10"] for entry in logs]
    assert trainer.state.best_metric == max(found)
    assert {"eval_own_adjacent_mrr_binary", "eval_groups_nmi_d_over_2"} <= logs[0].keys()
    again = similarity(trainer.model, tokenizer)["near_precision_at_10"]
    assert again == pytest.approx(max(found), abs=1e-6)


def in_processes(tokenizer, notes, evaluator, tmp_path, **chosen):
    """Answers of training with one process and with two, by their number."""
    pool = Ranks(2)
    try:
        answers = {}
        for world in (1, 2):
            args = arguments(tmp_path / str(world), per_device_train_batch_size=8 // world, **chosen)
            names = ("per_device_train_batch_size", "subspace_dim", "max_steps", "eval_strategy", "eval_steps")
            names += ("save_steps", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
            options = {name: getattr(args, name) for name in names} | {"save_strategy": "steps"}
            shared = {"tokenizer": tokenizer, "data": notes, "evaluation": notes, "evaluator": evaluator}
            answers[world] = pool.run(train, world, folder=args.output_dir, **shared, **options)
    finally:
        pool.stop()
    return answers


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_measure_the_same_similarity(tokenizer, notes, similarity, tmp_path):
    """On two ranks every number is the same on both, and that of one process up to training's rounding."""
    answers = in_processes(tokenizer, notes, similarity, tmp_path, metric_for_best_model="own_adjacent_mrr")
    (one,), (first, second) = answers[1], answers[2]
    names = [name for name in one["metrics"] if name.startswith(("eval_near_", "eval_own_", "eval_groups_"))]
    assert len(names) == 3 * (1 + 4 + 2)
    for name in names:
        assert first["metrics"][name] == second["metrics"][name]
    assert first["metrics"]["eval_own_mrr"] == pytest.approx(one["metrics"]["eval_own_mrr"], abs=0.02)
    for name, value in first["weights"].items():
        assert (value == second["weights"][name]).all()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_choose_the_same_model(tokenizer, notes, evaluator, tmp_path):
    """On two ranks the probe metrics and the weights that come back are the same, and those of one process."""
    answers = in_processes(tokenizer, notes, evaluator, tmp_path)
    (one,), (first, second) = answers[1], answers[2]
    probes = [name for name in one["metrics"] if name.startswith("eval_sick_")]
    assert len(probes) == 4
    for name in probes:
        assert first["metrics"][name] == second["metrics"][name]
        assert first["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-3)
    assert first["metrics"]["eval_probe_seconds"] > 0
    for name, value in first["weights"].items():
        assert (value == second["weights"][name]).all()
