"""Checkpoints: a killed run resumes to the bit, the best model is found again, and they open as models."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import logs, make_notes, make_trainer
from transformers import AutoModelForMaskedLM

from hf_densefeat import DenseFeatureMixin
from hf_densefeat.training.checkpoints import OBJECTIVE_STATE, CheckpointError

pytestmark = pytest.mark.slow

# ---- Kill and resume ----

RESUME = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 4,
}

# Trains as the test does, and is killed after update 6 of 12 or resumes; writes its log when it ends.
WORKER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from conftest import logs, make_notes, make_trainer
from test_checkpoints import RESUME
from transformers import PreTrainedTokenizerFast, TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

folder, tokenizer, job = sys.argv[1], PreTrainedTokenizerFast.from_pretrained(sys.argv[2]), sys.argv[3]
extra = {"callbacks": [Kill()]} if job == "kill" else {}
trainer = make_trainer(folder, tokenizer, make_notes(), extra=extra, **RESUME)
trainer.train(resume_from_checkpoint=job == "resume")
json.dump(logs(trainer), open(os.path.join(folder, "log.json"), "w"))
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tokenizer, pairs):
    """12 updates of two epochs with dropout, window "auto" and accumulation, checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, tokenizer, pairs, **RESUME)
    trainer.train()
    assert trainer.state.global_step == 12
    return folder, logs(trainer), trainer


def assert_same_log(found, expected, start):
    found = [entry for entry in found if entry["step"] > start]
    expected = [entry for entry in expected if entry["step"] > start]
    assert len(found) == 12 - start
    for entry, other in zip(found, expected, strict=True):
        for name in entry.keys() | other.keys():
            assert entry[name] == other[name], (entry["step"], name)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, tokenizer, uninterrupted):
    """SIGKILL after a mid-epoch checkpoint, resumed by a new process: every later log entry is equal to the bit."""
    _, expected, _ = uninterrupted
    worker, saved = tmp_path / "worker.py", tmp_path / "tokenizer"
    worker.write_text(WORKER)
    tokenizer.save_pretrained(saved)
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    )
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    out = tmp_path / "out"
    for job, code in (("kill", -signal.SIGKILL), ("resume", 0)):
        done = subprocess.run(
            [sys.executable, str(worker), str(out), str(saved), job],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stderr[-3000:]
        assert (out / "checkpoint-4" / OBJECTIVE_STATE).is_file()
        assert (out / "log.json").is_file() == (job == "resume")
    found = json.loads((out / "log.json").read_text())
    assert_same_log([entry for entry in found if entry["step"] > 4], expected, 4)


def test_resumed_in_the_second_epoch_equals_uninterrupted(tmp_path, tokenizer, pairs, uninterrupted):
    """From a checkpoint inside the second epoch the log and the final weights are equal to the bit, skips remembered."""
    folder, expected, whole = uninterrupted
    trainer = make_trainer(tmp_path, tokenizer, pairs, **RESUME)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same_log(logs(trainer), expected, 8)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    for name, value in trainer.objective.state_dict().items():
        assert torch.equal(value, whole.objective.state_dict()[name]), name


def test_skipped_updates_survive_a_resume(tmp_path, tokenizer, pairs):
    """The count of skipped updates is saved with the checkpoint and restored."""
    first = make_trainer(tmp_path, tokenizer, pairs, **RESUME | {"max_steps": 4})
    first.update_log.skipped = 5
    first.train()
    second = make_trainer(tmp_path, tokenizer, pairs, **RESUME | {"max_steps": 5})
    second.train(resume_from_checkpoint=True)
    assert second.update_log.skipped == 5


def test_checkpoint_of_someone_else_is_refused(tmp_path, tokenizer, pairs, uninterrupted):
    """A checkpoint without our state, or of another model, is one clear error and not a silent restart."""
    folder, _, _ = uninterrupted
    foreign = tmp_path / "checkpoint-4"
    shutil.copytree(folder / "checkpoint-4", foreign)
    (foreign / OBJECTIVE_STATE).unlink()
    with pytest.raises(ValueError, match=f"not whole: {OBJECTIVE_STATE} is missing.*pass it as the model"):
        make_trainer(tmp_path, tokenizer, pairs, **RESUME).train(resume_from_checkpoint=str(foreign))
    with pytest.raises(ValueError, match=r"of another run \(.*model \w+, here \w+\).*pass it as the model"):
        make_trainer(tmp_path, tokenizer, pairs, family="modernbert", **RESUME).train(
            resume_from_checkpoint=str(folder / "checkpoint-4")
        )


def test_checkpoints_open_as_models(uninterrupted, tokenizer):
    """A checkpoint is a native folder with tokenizer and pooling: AutoModelForMaskedLM and SentenceTransformer open it."""
    from sentence_transformers import SentenceTransformer

    folder, _, trainer = uninterrupted
    texts = make_notes(patients=2)["text"][:5]
    expected = trainer.model.encode(texts, tokenizer)
    found = SentenceTransformer(str(folder / "checkpoint-12"), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    native = AutoModelForMaskedLM.from_pretrained(folder / "checkpoint-12")
    assert type(native).__name__ == "BertForMaskedLM"
    for path in (folder / "checkpoint-12").rglob("*"):
        assert path.suffix not in (".pkl", ".py"), path


# ---- The best model ----


@pytest.mark.parametrize("metric", ["loss", "probe_auroc"])
def test_best_model_is_chosen_by_terms_and_by_the_evaluator(tmp_path, tokenizer, pairs, metric):
    """metric_for_best_model sees eval_loss and what the evaluator returns; the best checkpoint is loaded at the end."""
    scores, seen = iter([0.2, 0.9, 0.4]), []

    def evaluator(model, processor):
        assert isinstance(model, DenseFeatureMixin)
        assert processor is tokenizer
        assert not model.training
        seen.append({n: v.clone() for n, v in model.state_dict().items()})
        return {"probe_auroc": next(scores)}

    trainer = make_trainer(
        tmp_path,
        tokenizer,
        pairs,
        extra={"eval_dataset": pairs, "evaluator": evaluator},
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model=metric,
        greater_is_better=metric == "probe_auroc",
        load_best_model_at_end=True,
    )
    trainer.train()
    values = [entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    best = int(np.argmax(values) if metric == "probe_auroc" else np.argmin(values))
    assert len(values) == 3
    assert trainer.state.best_metric == pytest.approx(values[best])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, seen[best][name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("step", "folder"), [(2, "a"), (2, "b"), (3, "a")])
def test_best_checkpoint_is_found_again_though_no_checkpoint_names_its_folder(
    tmp_path, tokenizer, pairs, step, folder
):
    """Resumed in the same folder, in another, or when nothing is left to do; and it is not deleted as an old one."""

    def run(folder, scores, checkpoint=None, **kwargs):
        scores = iter(scores)
        trainer = make_trainer(
            tmp_path / folder,
            tokenizer,
            pairs,
            extra={"eval_dataset": pairs, "evaluator": lambda model, tokenizer: {"score": next(scores)}},
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            metric_for_best_model="score",
            greater_is_better=True,
            load_best_model_at_end=True,
            **kwargs,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
        return trainer

    run("a", [0.9, 0.2, 0.4])
    for path in (tmp_path / "a").rglob("trainer_state.json"):
        assert json.loads(path.read_text())["best_global_step"] == 1
        assert str(tmp_path) not in path.read_text()
    trainer = run(folder, [0.3], str(tmp_path / "a" / f"checkpoint-{step}"), save_total_limit=1)
    best = tmp_path / "a" / "checkpoint-1"
    assert Path(trainer.state.best_model_checkpoint) == best
    expected = AutoModelForMaskedLM.from_pretrained(best).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_checkpoint_of_another_run_is_named_and_never_taken(tmp_path, tokenizer, pairs, caplog):
    """Another seed, rate or weight in the same folder: nothing is resumed, by name or as the newest, and why is said."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, tokenizer, pairs, **settings).train()
    other = make_trainer(tmp_path, tokenizer, pairs, **settings | {"seed": 7, "lambda_pair": 1.0})
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is of another run \(seed 3, here 7.*another output_dir"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        other.train(resume_from_checkpoint=True)
    assert "checkpoint-1 is passed over: it is of another run (seed 3, here 7" in caplog.text
    fewer = make_trainer(tmp_path, tokenizer, make_notes(7), **settings)
    with pytest.raises(CheckpointError, match=r"of another run \(data \w+, here \w+\)"):
        fewer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # the same run, cut otherwise and with more steps
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 3}
    again = make_trainer(tmp_path, tokenizer, pairs, **settings | cut)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
