"""What a user of transformers tries: each option, object and call works as there, or is refused in a sentence."""

import copy
import pickle

import datasets
import pytest
import torch
from conftest import QUIET, logs, make_model, make_notes, make_trainer
from torch import nn
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

from hf_densefeat import AutoDenseModel, BatchLoss, DenseObjective, DenseTrainer, DenseTrainingArguments

SHORT = {"max_steps": 2, "logging_steps": 1}


def one(s):
    """A number that never changes."""
    return s.a.trace * 0 + 1


def test_terms_join_those_of_the_arguments(tmp_path, tokenizer, pairs):
    """`terms` of the trainer keeps lambda_pair, centring and window of the arguments; a term called tokens is logged."""
    trainer = make_trainer(
        tmp_path, tokenizer, pairs, extra={"terms": {"tokens": (0.1, one)}}, lambda_pair=0.3, **SHORT
    )
    weights = {name: weight for name, (weight, _) in trainer.objective.terms.items()}
    assert list(weights)[3:] == ["tokens", "unshared_variance"]
    assert (weights["unshared_variance"], trainer.objective.center, trainer.objective.window) == (0.3, True, "auto")
    trainer.train()
    assert [entry["tokens"] for entry in logs(trainer)] == [1.0, 1.0]
    assert 0 <= logs(trainer)[0]["padding_waste"] < 1
    with pytest.raises(ValueError, match="terms or objective, not both"):
        make_trainer(tmp_path, tokenizer, pairs, extra={"terms": {"x": (1.0, one)}, "objective": DenseObjective()})


def test_the_card_and_evaluation_speak_of_the_objective_that_trained(tmp_path, tokenizer, pairs):
    """An objective that was passed brings its own window, centring and k."""
    extra = {"objective": DenseObjective(subspace_dim=3, window=None, center=False), "eval_dataset": pairs}
    trainer = make_trainer(tmp_path, tokenizer, pairs, extra=extra)
    trainer.model.name_or_path = "clinic/alice_smith_mrn"  # a folder that is no longer there
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "alice" not in card
    assert "Continued from a local checkpoint" in card
    rows = [line.split("|") for line in card.splitlines() if line.count("|") > 2]
    settings = {cells[1].strip(): cells[2].strip() for cells in rows}
    assert (settings["covariance window"], settings["centred"]) == ("none", "False")
    assert "3-dimensional" in card
    uncentred = trainer.evaluate()["eval_effective_rank"]
    trainer.objective = DenseObjective(subspace_dim=3, center=True)
    assert trainer.evaluate()["eval_effective_rank"] > uncentred


def test_a_copy_of_the_arguments_is_whole_and_a_pickle_has_no_secrets(tmp_path):
    """deepcopy and copy keep output_dir and token; what is written for the Hub has neither."""
    args = DenseTrainingArguments(str(tmp_path / "run7"), hub_token="hf_x", **QUIET)
    for again in (copy.deepcopy(args), copy.copy(args)):
        assert (again.output_dir, again.hub_token) == (args.output_dir, "hf_x")
    again = pickle.loads(pickle.dumps(args))
    assert (again.output_dir, again.hub_token) == ("run7", None)


def test_model_init_makes_a_model_and_an_objective_for_each_run(tmp_path, tokenizer, pairs):
    """Two runs of one trainer are equal, and a trial's weight of a term is that of its objective."""
    args = DenseTrainingArguments(
        str(tmp_path), **QUIET | SHORT, subspace_dim=4, per_device_train_batch_size=16, seed=3
    )

    def make(trial=None):
        torch.manual_seed(0)
        return make_model("bert", tokenizer)

    trainer = DenseTrainer(args=args, train_dataset=pairs, processing_class=tokenizer, model_init=make)
    trainer.train()
    first = logs(trainer)
    trainer.train()
    assert [entry["loss"] for entry in logs(trainer)] == [entry["loss"] for entry in first]
    args.lambda_sub = 0.5
    trainer.train()
    assert trainer.objective.terms["subspace_consistency"][0] == 0.5
    with pytest.raises(ValueError, match="either a model"):
        DenseTrainer("x", args, model_init=make)


@pytest.mark.parametrize("kind", ["list", "frame", "columns"])
def test_notes_of_any_kind_are_read(tmp_path, tokenizer, kind):
    """A list of dicts, a frame and a dict of columns are read as `load_notes` reads them."""
    notes = make_notes(8)
    made = {"list": notes.to_list, "frame": notes.to_pandas, "columns": notes.to_dict}[kind]()
    trainer = make_trainer(tmp_path, tokenizer, made, extra={"eval_dataset": {"a": made}})
    expected = make_trainer(tmp_path, tokenizer, notes)
    assert len(trainer.train_dataset) == len(trainer.eval_dataset["a"]) == len(expected.train_dataset)


def refused(message, folder, tokenizer, data, **options):
    with pytest.raises(ValueError, match=message):
        make_trainer(folder, tokenizer, data, **options)


def test_what_cannot_work_is_refused_in_a_sentence(tmp_path, tokenizer, pairs):
    """Several sets to train on, a collator of single rows, label smoothing, a tokenizer with more tokens than embeddings."""
    parts = datasets.DatasetDict({"train": make_notes(3), "test": make_notes(3)})
    refused(r"several sets, train, test: pass the one", tmp_path, tokenizer, parts)
    collator = DataCollatorForLanguageModeling(tokenizer)
    refused(
        "DataCollatorForLanguageModeling batches single rows",
        tmp_path,
        tokenizer,
        pairs,
        extra={"data_collator": collator},
    )
    refused("label_smoothing_factor is 0.1, but the loss", tmp_path, tokenizer, pairs, label_smoothing_factor=0.1)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["metforminx"])
    model = make_model("bert", tokenizer)
    refused(r"has [\d,]+ tokens, but BertForMaskedLM has embeddings for", tmp_path, longer, pairs, model=model)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model.encode(["on metforminx"], longer)
    model.resize_token_embeddings(len(longer))
    make_trainer(tmp_path, longer, pairs, model=model)


def test_compute_loss_outside_of_training(tmp_path, tokenizer, pairs):
    """It is the loss of the micro-batch alone, the first of training's."""
    trainer = make_trainer(tmp_path, tokenizer, pairs, dropout=0.0, **SHORT)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    fresh = make_trainer(tmp_path, tokenizer, pairs, dropout=0.0, model=trainer.model, **SHORT)
    fresh.train()
    assert float(loss.detach()) == pytest.approx(logs(fresh)[0]["loss"], rel=1e-5)


# ---- Losses of a whole batch ----


class Exploding(nn.Module):
    """Mean squared difference of two learned maps, infinite in its second call."""

    def __init__(self):
        super().__init__()
        self.map, self.norm, self.calls = nn.Linear(24, 8), nn.BatchNorm1d(8), 0

    def forward(self, z_a, z_b):
        self.calls += 1
        loss = 100 * (self.norm(self.map(z_a)) - self.norm(self.map(z_b))).square().mean()
        return loss * float("inf") if self.calls == 2 else loss


def test_a_skipped_update_leaves_a_batch_loss_as_it_was(tmp_path, tokenizer, pairs):
    """Its parameters stay finite and train on, and their gradient is in the norm and clipped."""
    loss = Exploding()
    extra = {"objective": BatchLoss(loss)}
    trainer = make_trainer(tmp_path, tokenizer, pairs, extra=extra, max_steps=4, logging_steps=1, max_grad_norm=0.5)
    norms = []
    clip = trainer.accelerator.clip_grad_norm_

    def spy(parameters, largest):
        norms.append(clip(parameters := list(parameters), largest))
        if norms[-1].isfinite():
            after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            assert after < 0.5 + 1e-4
            assert loss.map.weight.grad is not None
        return norms[-1]

    trainer.accelerator.clip_grad_norm_ = spy
    trainer.train()
    assert trainer.update_log.skipped == 1
    assert [norm.isfinite().item() for norm in norms] == [True, False, True, True]
    assert all(parameter.isfinite().all() for parameter in loss.parameters())


def test_evaluation_leaves_a_batch_loss_as_it_was(tmp_path, tokenizer, pairs):
    """In evaluation mode: no buffer moves, a last batch of one pair is no error, and training goes on in training mode."""
    loss = Exploding()
    loss.calls = 2
    extra = {"objective": BatchLoss(loss), "eval_dataset": pairs}
    trainer = make_trainer(tmp_path, tokenizer, pairs, extra=extra, per_device_eval_batch_size=len(pairs) - 1)
    before = copy.deepcopy(loss.state_dict())
    trainer.evaluate()
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    assert loss.training


# ---- Adapters ----


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "decoder"]},
        {"target_modules": ["query", "word_embeddings"]},
        {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
        {"target_modules": ["query"], "modules_to_save": ["cls"]},
    ],
)
def test_an_adapter_of_a_tied_weight_is_saved_as_it_was_trained(tmp_path, tokenizer, pairs, options):
    """Merged into the one weight it would change the other module too: each has its own in the folder."""
    import peft

    extra = {"peft_config": peft.LoraConfig(r=2, **options)}
    trainer = make_trainer(tmp_path, tokenizer, pairs, extra=extra, learning_rate=1e-2, **SHORT)
    trainer.train()
    trainer.save_model()
    texts = ["fever and cough", "stable"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**tokens).logits, trainer.model.eval()(**tokens).logits, rtol=1e-4, atol=1e-5)
    z = AutoDenseModel.from_pretrained(str(tmp_path)).encode(texts)
    torch.testing.assert_close(z, trainer.dense_model.encode(texts, tokenizer), rtol=1e-4, atol=1e-5)


def test_resuming_with_another_rank_is_refused(tmp_path, tokenizer, pairs):
    """In a sentence that names peft_config."""
    import peft

    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for rank in (2, 4):
        extra = {"peft_config": peft.LoraConfig(r=rank, target_modules=["query"])}
        trainer = make_trainer(tmp_path, tokenizer, pairs, extra=extra, **settings)
        if rank == 2:
            trainer.train()
    with pytest.raises(ValueError, match="other shapes than that of peft_config"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("settings", [{"dense_weight": 0.0, "expander": 2}, {"dense_weight": 1.0, "expander": 2}])
def test_parameters_beside_the_model_may_have_no_gradient(tmp_path, tokenizer, pairs, settings):
    """An expander without a dense term is left as it was; with one it is trained."""
    trainer = make_trainer(tmp_path, tokenizer, pairs, max_steps=1, learning_rate=1e-2, **settings)
    before = [weight.clone() for weight in trainer.objective.parameters()]
    trainer.train()
    moved = [not torch.equal(*both) for both in zip(before, trainer.objective.parameters(), strict=True)]
    assert any(moved) == bool(settings["dense_weight"])
