"""Training of the encoders of events, alone and beside a note: half precision, accumulation and resuming."""

import math

import pytest
import test_multimodal
import test_tabular
import torch
from conftest import logs, make_window_trainer
from transformers import TrainerCallback

from hf_densefeat.events import EventProcessor, MultimodalProcessor


@pytest.fixture(scope="module", params=["tabular", "multimodal"])
def make_encoder_trainer(request, tokenizer):
    """A function that makes the trainer of one encoder."""
    encoder, learning_rate = {"tabular": (test_tabular, 3e-3), "multimodal": (test_multimodal, 5e-3)}[request.param]
    episodes = encoder.make_episodes()
    processor = EventProcessor.fit(episodes["text"][:])
    if request.param == "multimodal":
        processor = MultimodalProcessor(tokenizer, processor)

    def make(folder, dropout=0.1, **options):
        model = encoder.make_model(processor, dropout)
        return make_window_trainer(folder, model, episodes, processor, learning_rate=learning_rate, **options)

    return make


def test_half_precision(make_encoder_trainer, tmp_path):
    """Under bf16 autocast the loss is finite and near that of full precision."""
    losses = []
    for bf16 in (False, True):
        trainer = make_encoder_trainer(tmp_path, dropout=0.0, max_steps=1, bf16=bf16)
        trainer.train()
        losses.append(logs(trainer)[0]["loss"])
    assert abs(losses[0] - losses[1]) < 0.02 * abs(losses[0])


def test_accumulation_is_exact(make_encoder_trainer, tmp_path):
    """Without dropout, 1 × 16 pairs and 2 × 8 pairs have the same loss and gradient."""
    gradients, losses = [], []

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())

    for size, accumulation in ((16, 1), (8, 2)):
        trainer = make_encoder_trainer(
            tmp_path,
            dropout=0.0,
            callbacks=[KeepGradients()],
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
        )
        trainer.train()
        losses.append(logs(trainer)[0]["loss"])
    assert math.isfinite(losses[0])
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    assert abs(losses[0] - losses[1]) < 1e-4


def test_resume_is_bit_equal(make_encoder_trainer, tmp_path):
    """A run resumed from a checkpoint ends with the weights of the run that went on."""
    whole = make_encoder_trainer(tmp_path / "run", save_strategy="steps", save_steps=3)
    whole.train()
    again = make_encoder_trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, ours), theirs in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
