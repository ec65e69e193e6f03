"""Adapters: the gradient is the chain rule's, runs resume, and what is saved is a plain encoder and the adapter."""

import json

import pytest
import torch
from conftest import QUIET, make_model, make_notes
from peft import LoraConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import load_file
from transformers import AutoModel, set_seed

from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments
from hf_densefeat.models.adapters import merged

pytestmark = pytest.mark.slow

TEXTS = make_notes(patients=3)["text"][:7]
R, ALPHA = 4, 8


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A base model without dropout, on disk, as users have it."""
    folder = tmp_path_factory.mktemp("base")
    make_model("bert", tokenizer, dropout=0.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def lora(**kwargs):
    return LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["query", "value"], **kwargs)


def make_trainer(folder, model, tokenizer, pairs, peft_config=None, **kwargs):
    settings = {
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "subspace_dim": 3,
        "lambda_sub": 0.1,
        "lambda_orth": 0.01,
    }
    set_seed(0)  # for the adapter's random half
    return DenseTrainer(
        model,
        DenseTrainingArguments(str(folder), **QUIET | settings | kwargs),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def filled(trainer):
    """Set the adapter's zero half to random numbers, so that it does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return trainer


@pytest.mark.parametrize(("size", "accumulation"), [(16, 1), (5, 4)])
def test_gradient_is_that_of_the_unmerged_reference(tmp_path, tokenizer, pairs, base, size, accumulation):
    """dL/dA = s Bᵀ dL/dW and dL/dB = s dL/dW Aᵀ with dL/dW from the same step of the merged model, trained in full."""

    def gradients(trainer):
        found = {}
        clip = trainer.accelerator.clip_grad_norm_
        trainer.accelerator.clip_grad_norm_ = lambda *args: (
            found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}),
            clip(*args),
        )[1]
        trainer.train()
        return found

    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    cut |= {"learning_rate": 0.0, "max_grad_norm": 1e9}
    adapted = filled(make_trainer(tmp_path, AutoDenseModel.from_pretrained(base), tokenizer, pairs, lora(), **cut))
    plain = make_trainer(tmp_path, merged(adapted.model).requires_grad_(True), tokenizer, pairs, **cut)
    factors = {name: value.detach().clone() for name, value in adapted.model.named_parameters() if "lora_" in name}
    ours, full = gradients(adapted), gradients(plain)
    assert set(ours) == set(factors)
    assert len(ours) == 2 * 2 * 2
    for name, b in factors.items():
        if "lora_B" not in name:
            continue
        a = factors[name.replace("lora_B", "lora_A")]
        weight = full[name.removeprefix("base_model.model.").replace("lora_B.default.", "")]
        scale = ALPHA / R
        torch.testing.assert_close(ours[name], scale * weight @ a.T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours[name.replace("lora_B", "lora_A")], scale * b.T @ weight, rtol=1e-4, atol=1e-6)


def test_only_the_adapter_trains_and_the_saved_folder_is_a_plain_encoder(tmp_path, tokenizer, pairs, base):
    """The base's weights stay; encode, AutoModel and AutoDenseModel agree on the merged folder; the adapter loads."""
    trainer = make_trainer(tmp_path / "out", AutoDenseModel.from_pretrained(base), tokenizer, pairs, lora())
    assert isinstance(trainer.model, PeftModel)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    trainer.save_model()
    now = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    z = trainer.model.encode(TEXTS, tokenizer)
    assert all(torch.equal(value, now[name]) for name, value in trainer.model.state_dict().items())

    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (out / "adapter_config.json").exists()
    assert (out / "1_Pooling" / "config.json").is_file()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert load_file(out / "model.safetensors").keys() == load_file(base + "/model.safetensors").keys()
    assert base not in (out / "adapter" / "adapter_config.json").read_text()
    again = AutoDenseModel.from_pretrained(str(out))
    torch.testing.assert_close(again.encode(TEXTS), z, rtol=1e-5, atol=1e-5)
    plain, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    tokens = tokenizer(TEXTS[:1], return_tensors="pt")
    torch.testing.assert_close(plain.eval()(**tokens).last_hidden_state.mean(1), z[:1], rtol=1e-5, atol=1e-5)
    loaded = PeftModel.from_pretrained(AutoDenseModel.from_pretrained(base), out / "adapter")
    torch.testing.assert_close(loaded.encode(TEXTS, tokenizer), z, rtol=1e-6, atol=1e-6)
    assert (AutoDenseModel.from_pretrained(base).encode(TEXTS) - z).abs().max() > 1e-3


def test_resumed_run_equals_the_uninterrupted_one(tmp_path, tokenizer, pairs, base):
    """Weights after steps 3 and 4 from the checkpoint of step 2 are those of the whole run, bit for bit."""

    def run(folder, checkpoint=None, **kwargs):
        trainer = make_trainer(folder, AutoDenseModel.from_pretrained(base), tokenizer, pairs, lora(), **kwargs)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run(tmp_path / "a", save_strategy="steps", save_steps=2)
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert whole.state.log_history[-2]["loss"] == resumed.state.log_history[-2]["loss"]
    # A checkpoint is an encoder too
    z = AutoDenseModel.from_pretrained(str(tmp_path / "a" / "checkpoint-4")).encode(TEXTS)
    torch.testing.assert_close(z, whole.model.encode(TEXTS, tokenizer), rtol=1e-5, atol=1e-5)


def test_best_adapter_is_loaded_at_the_end(tmp_path, tokenizer, pairs, base):
    """load_best_model_at_end restores the adapter of the best checkpoint, not the last."""
    scores = iter([1.0, 3.0, 2.0, 0.0])
    trainer = make_trainer(
        tmp_path,
        AutoDenseModel.from_pretrained(base),
        tokenizer,
        pairs,
        lora(),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    kept = []
    trainer.evaluator = lambda model, tokenizer: kept.append(model.encode(TEXTS, tokenizer)) or {"score": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    torch.testing.assert_close(trainer.model.encode(TEXTS, tokenizer), kept[1], rtol=0, atol=0)
    assert (kept[1] - kept[3]).abs().max() > 1e-3


def test_a_peft_model_trains_on_with_its_head(tmp_path, tokenizer, pairs, base):
    """An adapter made or loaded elsewhere is taken as the model; modules_to_save train in full and are exported."""
    config = lora(modules_to_save=["cls"])
    first = make_trainer(tmp_path / "a", AutoDenseModel.from_pretrained(base), tokenizer, pairs, config)
    first.train()
    first.save_model()
    weights, old = load_file(tmp_path / "a" / "model.safetensors"), load_file(base + "/model.safetensors")
    assert not torch.equal(
        weights["cls.predictions.transform.dense.weight"], old["cls.predictions.transform.dense.weight"]
    )
    model = PeftModel.from_pretrained(
        AutoDenseModel.from_pretrained(base), tmp_path / "a" / "adapter", is_trainable=True
    )
    z = model.encode(TEXTS, tokenizer)
    torch.testing.assert_close(z, first.model.encode(TEXTS, tokenizer), rtol=1e-6, atol=1e-6)
    second = make_trainer(tmp_path / "b", model, tokenizer, pairs)
    second.train()
    assert (second.model.encode(TEXTS, tokenizer) - z).abs().max() > 1e-3


def test_without_masked_language_modelling_the_head_is_left_alone(tmp_path, tokenizer, pairs, base):
    """mlm_weight=0 trains the adapter by the dense objective alone."""
    trainer = make_trainer(tmp_path, AutoDenseModel.from_pretrained(base), tokenizer, pairs, lora(), mlm_weight=0.0)
    trainer.train()
    assert {name.split(".")[-3] for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_what_cannot_work_says_so(tmp_path, tokenizer, pairs, base):
    """Prefixes cannot be merged; a checkpoint of a full run, or of another rank, does not fit the adapter."""
    model = AutoDenseModel.from_pretrained(base)
    with pytest.raises(ValueError, match="PREFIX_TUNING adds virtual tokens"):
        make_trainer(
            tmp_path, model, tokenizer, pairs, PrefixTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
        )
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path / "full", AutoDenseModel.from_pretrained(base), tokenizer, pairs, **saving).train()
    trainer = make_trainer(tmp_path / "l", AutoDenseModel.from_pretrained(base), tokenizer, pairs, lora())
    with pytest.raises(ValueError, match="no folder 'adapter'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-1"))
    other = LoraConfig(r=R, target_modules=["query"])
    make_trainer(tmp_path / "q", AutoDenseModel.from_pretrained(base), tokenizer, pairs, other, **saving).train()
    with pytest.raises(ValueError, match=r"Missing: \["):
        trainer.train(resume_from_checkpoint=str(tmp_path / "q" / "checkpoint-1"))
