"""The trainer: exact accumulation with dropout, the stock trajectory without dense terms, logs, and nothing lost."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_notes
from transformers import Trainer, TrainerCallback

from hf_densefeat import (
    DenseTrainer,
    DenseTrainingArguments,
    orthogonality_loss,
    spectral_spreading_loss,
    subspace_consistency_loss,
)
from hf_densefeat.pooling import mean_pooling

TERMS = {"mlm_weight": 1.0, "dense_weight": 2.0, "lambda_sub": 0.1, "lambda_orth": 0.01, "subspace_dim": 4}
LITERAL = {"window": "none", "center": False, "power_iterations": 0}


def arguments(folder, **kwargs):
    defaults = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 2}
    return DenseTrainingArguments(str(folder), **{**defaults, **TERMS, **kwargs})


class Gradients(TrainerCallback):
    """Keep the gradients of every update."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def relative(a, b):
    """Norm of the difference of all gradients, over the norm of one."""
    return (sum((a[n] - b[n]).square().sum() for n in b) / sum(b[n].square().sum() for n in b)).sqrt().item()


def reference(trainer, model, batches, states):
    """The paper's formulas on the concatenated Z of all micro-batches, and the mean over all predicted tokens."""
    z_a, z_b, summed, tokens = [], [], 0.0, 0
    model.train()
    model.zero_grad()
    for batch, state in zip(batches, states, strict=True):
        torch.set_rng_state(state)
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "num_pairs")}
        outputs = model(**inputs, output_hidden_states=True)
        a, b = mean_pooling(model.base_model_last, batch["attention_mask"]).chunk(2)
        z_a, z_b = [*z_a, a], [*z_b, b]
        keep = batch["labels"] != -100
        summed = summed + F.cross_entropy(outputs.logits[keep], batch["labels"][keep], reduction="sum")
        tokens += keep.sum()
    z_a, z_b = torch.cat(z_a), torch.cat(z_b)
    z = torch.cat([z_a, z_b])
    dense = spectral_spreading_loss(z) + 0.1 * subspace_consistency_loss(z_a, z_b, 4, broadening=1.0)
    (summed / tokens + 2.0 * (dense + 0.01 * orthogonality_loss(z))).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(32, 1), (16, 2), (8, 4), (4, 8), (6, 5)])
def test_accumulation_is_exact_with_dropout(family, batch_size, accumulation, tokenizer, tmp_path):
    """Every cut has the gradient of one graph over all of it, dropout as drawn; without the window pass it has not."""
    model = make_model(family, tokenizer, dropout=0.1)
    args = arguments(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0,
        learning_rate=0.0,
        **LITERAL,
    )
    gradients = Gradients()
    notes = make_notes(12)  # 45 pairs: a whole update of 30 to 32
    trainer = DenseTrainer(model, args, train_dataset=notes, processing_class=tokenizer, callbacks=[gradients])
    batches, states = [], []
    original = trainer._forward

    def watched(forward_model, inputs):
        if torch.is_grad_enabled():
            states.append(torch.get_rng_state())
            batches.append({k: v for k, v in inputs.items()})
        return original(forward_model, inputs)

    trainer._forward = watched
    trainer.train()
    assert len(batches) == accumulation

    def keep(module, inputs, output):
        model.base_model_last = output[0]

    handle = model.base_model.register_forward_hook(keep)
    expected = reference(trainer, model, batches, states)
    assert relative(gradients.seen[0], expected) <= 1e-5
    other = reference(trainer, model, batches, [torch.get_rng_state() for _ in states])
    assert relative(other, expected) > 1e-2, "dropout is not active: the test would show nothing"
    handle.remove()
    if accumulation > 1:
        naive = {}
        for batch, state in zip(batches, states, strict=True):
            handle = model.base_model.register_forward_hook(keep)
            part = reference(trainer, model, [batch], [state])
            handle.remove()
            naive = {n: naive.get(n, 0) + g / accumulation for n, g in part.items()}
        assert relative(naive, expected) > 1e-2


def test_without_dense_terms_it_is_the_stock_trainer(tokenizer, notes, tmp_path):
    """dense_weight 0 follows the stock Trainer's trajectory for a model that the stock Trainer scales right."""
    finals, losses = [], []
    for stock in (False, True):
        model = make_model("modernbert", tokenizer, dropout=0.0)
        args = arguments(
            tmp_path, dense_weight=0.0, per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=6
        )
        ours = DenseTrainer(model, args, train_dataset=notes, processing_class=tokenizer)
        trainer = ours
        if stock:

            class Stock(Trainer):
                def get_train_dataloader(self, ours=ours):
                    return ours.get_train_dataloader()

            def collate(batch, collator=ours.data_collator):
                tokens = collator(batch)
                tokens.pop("num_pairs")
                return tokens

            ours.data_collator = collate
            trainer = Stock(model, args, train_dataset=ours.train_dataset, processing_class=tokenizer)
        trainer.train()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_logged_terms_add_up_to_the_logged_loss(accumulation, tokenizer, notes, tmp_path):
    """loss = mlm_weight mlm_loss + dense_weight (spread + lambda_sub subspace + lambda_orth orth)."""
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, max_steps=5)
    trainer = DenseTrainer(make_model("bert", tokenizer), args, train_dataset=notes, processing_class=tokenizer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 5
    for log in logs:
        dense = log["spectral_spreading"] + 0.1 * log["subspace_consistency"] + 0.01 * log["orthogonality"]
        assert log["loss"] == pytest.approx(log["mlm_loss"] + 2.0 * dense, rel=1e-4)
        assert 1 <= log["effective_rank"] <= 24
        assert 0 <= log["padding_waste"] < 1
        assert log["skipped_updates"] == 0


def test_evaluation_does_not_depend_on_the_batch_size(tokenizer, notes, tmp_path):
    """The terms are those of all pairs together, and the evaluator's numbers stand beside them."""
    metrics = []
    for size in (3, 64):
        args = arguments(tmp_path, per_device_eval_batch_size=size)
        trainer = DenseTrainer(
            make_model("bert", tokenizer),
            args,
            eval_dataset=notes,
            processing_class=tokenizer,
            evaluator=lambda model, tokenizer: {"width": model.encode(["fever"], tokenizer).shape[1]},
        )
        metrics.append({k: v for k, v in trainer.evaluate().items() if "second" not in k and "time" not in k})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    assert metrics[0]["eval_width"] == 24
    dense = metrics[0]["eval_spectral_spreading"] + 0.1 * metrics[0]["eval_subspace_consistency"]
    dense += 0.01 * metrics[0]["eval_orthogonality"]
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[0]["eval_mlm_loss"] + 2 * dense, rel=1e-5)


def test_the_best_model_can_be_chosen_by_the_evaluator(tokenizer, notes, tmp_path):
    """metric_for_best_model sees the evaluator's metrics, and the best checkpoint is loaded at the end."""
    scores = iter([0.1, 0.9, 0.5])
    args = arguments(
        tmp_path,
        per_device_train_batch_size=8,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="probe",
        greater_is_better=True,
    )
    trainer = DenseTrainer(
        make_model("bert", tokenizer),
        args,
        train_dataset=notes,
        eval_dataset=notes,
        processing_class=tokenizer,
        evaluator=lambda model, tokenizer: {"probe": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_metric == 0.9
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_non_finite_batch_is_skipped_and_counted(clip, tokenizer, notes, tmp_path):
    """The weights stay as they were, the running state stays finite, and the run ends well."""
    model = make_model("bert", tokenizer)
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=5, max_grad_norm=clip)
    weights = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            weights.append(model.bert.embeddings.word_embeddings.weight.detach().clone())

    trainer = DenseTrainer(model, args, train_dataset=notes, processing_class=tokenizer, callbacks=[Watch()])
    forwards = iter(range(100))
    model.bert.encoder.layer[1].output.LayerNorm.register_forward_hook(
        lambda module, inputs, output: output * torch.nan if next(forwards) == 2 else None
    )
    trainer.train()
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
    assert trainer.skipped_updates == 1
    assert [log["skipped_updates"] for log in trainer.state.log_history if "loss" in log] == [0, 0, 1, 1, 1]
    assert all(value.isfinite().all() for value in trainer.objective.state_dict().values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_dense_terms_alone_leave_the_head_as_it_is(tokenizer, notes, tmp_path):
    """mlm_weight 0 trains the encoder and freezes the language-modelling head."""
    model = make_model("bert", tokenizer)
    head = model.cls.predictions.transform.dense.weight.detach().clone()
    body = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    args = arguments(tmp_path, mlm_weight=0.0, per_device_train_batch_size=8)
    DenseTrainer(model, args, train_dataset=notes, processing_class=tokenizer).train()
    assert torch.equal(head, model.cls.predictions.transform.dense.weight)
    assert not torch.equal(body, model.bert.encoder.layer[0].output.dense.weight)


RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import make_model, make_notes, make_tokenizer
from hf_densefeat import DenseTrainer
from test_trainer import arguments
torch.set_num_threads(1)
tokenizer = make_tokenizer()
args = arguments({folder!r}, max_steps=9, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                 save_strategy="steps", save_steps=4, learning_rate=1e-3, window="auto")
trainer = DenseTrainer(make_model("bert", tokenizer), args, train_dataset=make_notes(), processing_class=tokenizer)
if {stop!r}:
    from transformers import TrainerCallback
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                import os, signal
                os.kill(os.getpid(), signal.SIGKILL)
    trainer.add_callback(Stop())
trainer.train(resume_from_checkpoint={resume!r})
import json
print("LOGS", json.dumps([log for log in trainer.state.log_history if "loss" in log]))
"""


def logs_of(folder, stop=False, resume=None):
    """Training logs of a run in a process of its own; None if it was killed."""
    code = RUN.format(tests=str(Path(__file__).parent), folder=str(folder), stop=stop, resume=resume)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if stop:
        assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
        return None
    line = next((line for line in result.stdout.splitlines() if line.startswith("LOGS")), None)
    assert line, result.stderr[-2000:]
    return json.loads(line[5:])


def test_killed_and_resumed_it_goes_on_bit_for_bit(tmp_path):
    """SIGKILL after a checkpoint in mid-epoch: the next losses, into the second epoch, are those of a run in one go."""
    whole = logs_of(tmp_path / "whole")
    assert logs_of(tmp_path / "cut", stop=True) is None
    resumed = logs_of(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-4"))
    assert len(whole) == len(resumed) == 9
    assert whole[-1]["epoch"] > 1
    for before, after in zip(whole[4:], resumed[4:], strict=True):
        assert before == after


def test_a_foreign_checkpoint_is_refused(tokenizer, notes, tmp_path):
    """Missing state or missing weights are an error on resume, not a warning."""
    args = arguments(tmp_path, per_device_train_batch_size=8, save_strategy="steps", save_steps=2)
    trainer = DenseTrainer(make_model("bert", tokenizer), args, train_dataset=notes, processing_class=tokenizer)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    other = DenseTrainer(make_model("modernbert", tokenizer), args, train_dataset=notes, processing_class=tokenizer)
    with pytest.raises(ValueError, match="does not fit the model"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "densefeat_state.safetensors").unlink()
    again = DenseTrainer(make_model("bert", tokenizer), args, train_dataset=notes, processing_class=tokenizer)
    with pytest.raises(ValueError, match="DenseTrainer did not write it"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_what_cannot_work_is_refused_before_training(tokenizer, notes, tmp_path):
    """A model without a head, k above the rank, notes without pairs: one error that says what to do."""
    bare = make_model("bert", tokenizer).bert
    with pytest.raises(ValueError, match=r"no language-modelling head.*mlm_weight=0"):
        DenseTrainer(bare, arguments(tmp_path), train_dataset=notes, processing_class=tokenizer)
    DenseTrainer(bare, arguments(tmp_path, mlm_weight=0.0), train_dataset=notes, processing_class=tokenizer).train()
    model = make_model("bert", tokenizer)
    few = arguments(tmp_path, window="none", subspace_dim=8, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=r"subspace_dim is 8.*batch of 8.*rank 7.*raise the batch size"):
        DenseTrainer(model, few, train_dataset=notes, processing_class=tokenizer)
    with pytest.raises(ValueError, match="two notes"):
        DenseTrainer(model, arguments(tmp_path), train_dataset=notes.select([0]), processing_class=tokenizer)
